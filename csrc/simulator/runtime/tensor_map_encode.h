// cuTensorMapEncodeTiled.
#pragma once

namespace fused_peft::sim {

// The driver function's address.
void* tensor_map_encode_tiled();

}  // namespace fused_peft::sim
