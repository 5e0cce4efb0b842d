// The ring of stages between a producer and its consumers (sm_90).
#pragma once

#include <cstdint>

namespace fused_peft::cuda {

// A place in the ring: how often it has gone round decides the parity.
template <int kStages>
struct RingPlace {
  uint32_t stage = 0, phase = 0;
  __device__ void advance(uint32_t count) {
    stage += count;
    phase ^= stage / kStages & 1;
    stage %= kStages;
  }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fused_peft::cuda
