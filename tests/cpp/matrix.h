// Matrices of any dtype with their values beside them, and threads, for the kernel tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels/common.h"

namespace fused_peft {

inline float round_to(DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kBFloat16) bits &= 0xFFFF0000U;
  if (dtype == DType::kFloat16) bits &= 0xFFFFE000U;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Values that the dtype holds exactly, in its storage, with the numbers beside it.
struct Matrix {
  int64_t rows, cols;
  DType dtype;
  std::vector<double> values;
  std::vector<uint8_t> storage;

  Matrix(int64_t rows_, int64_t cols_, DType dtype_)
      : rows(rows_),
        cols(cols_),
        dtype(dtype_),
        values(static_cast<size_t>(rows_ * cols_)),
        storage(static_cast<size_t>(rows_ * cols_ * element_size(dtype_)), 0xFF) {}

  void* data() { return storage.data(); }
  MatrixView view() const { return {storage.data(), cols, 1, dtype}; }
  double at(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * cols + j)]; }

  void fill(std::mt19937& generator) {
    std::uniform_real_distribution<float> uniform(0.25F, 1.0F);
    for (size_t i = 0; i < values.size(); ++i) {
      const float sign = generator() & 1U ? 1.0F : -1.0F;
      const float value = sign * round_to(dtype, uniform(generator));
      values[i] = value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::kFloat32) std::memcpy(&storage[4 * i], &bits, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::kFloat16)
        half = static_cast<uint16_t>((bits >> 16 & 0x8000U) |
                                     ((bits & 0x7FFFFFFFU) - (112U << 23)) >> 13);
      if (dtype != DType::kFloat32) std::memcpy(&storage[2 * i], &half, 2);
    }
  }

  double read(size_t i) const {
    uint32_t bits = 0;
    if (dtype == DType::kFloat32) {
      std::memcpy(&bits, &storage[4 * i], 4);
    } else {
      uint16_t half;
      std::memcpy(&half, &storage[2 * i], 2);
      bits = static_cast<uint32_t>(half) << 16;
      if (dtype == DType::kFloat16) {
        const int exponent = half >> 10 & 31;
        const int fraction = half & 1023;
        const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                                 : exponent == 31 ? (fraction ? NAN : INFINITY)
                                                  : std::ldexp(fraction + 1024, exponent - 25);
        return half & 0x8000 ? -magnitude : magnitude;
      }
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // Relative Frobenius distance of what was written from what was expected (values).
  double error() const {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const double d = read(i) - values[i];
      difference += d * d;
      norm += values[i] * values[i];
    }
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  }
};

inline void run_threads(int64_t tasks, ParallelFor::Task fn, void* context) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t)
    threads.emplace_back([=] {
      for (int64_t i = t; i < tasks; i += kThreads) fn(context, i);
    });
  for (auto& thread : threads) thread.join();
}

}  // namespace fused_peft
