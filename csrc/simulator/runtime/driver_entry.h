// Driver functions that programs ask the runtime for by name (cudaGetDriverEntryPoint).
#pragma once

#include <string_view>

namespace fused_peft::sim {

// The driver function's address; nullptr where the simulator has none of that name.
void* find_driver_function(std::string_view name);

}  // namespace fused_peft::sim
