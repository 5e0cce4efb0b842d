// CUB's device-wide and block-wide algorithms on n integers; results go to standard output, one
// line a result.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cub/cub.cuh>

constexpr int kBlock = 128;

__global__ void block_sums(const int* in, int* out) {
  using Reduce = cub::BlockReduce<int, kBlock>;
  __shared__ typename Reduce::TempStorage storage;
  const int sum = Reduce(storage).Sum(in[blockIdx.x * kBlock + threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class T>
T* to_device(const std::vector<T>& host) {
  T* device;
  cudaMalloc(&device, host.size() * sizeof(T));
  cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  return device;
}

template <class T>
void print(const char* name, const T* device, int count) {
  std::vector<T> host(count);
  cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost);
  std::printf("%s", name);
  for (const T value : host) std::printf(" %lld", static_cast<long long>(value));
  std::printf("\n");
}

template <class Algorithm>
void run(Algorithm algorithm) {
  size_t bytes = 0;
  algorithm(nullptr, bytes);
  void* temporary;
  cudaMalloc(&temporary, bytes);
  algorithm(temporary, bytes);
  cudaFree(temporary);
}

int main(int argc, char** argv) {
  const int n = argc > 1 ? std::atoi(argv[1]) : 10007;
  std::vector<int> values(n);
  std::vector<unsigned> keys(n);
  for (int i = 0; i < n; ++i) {
    values[i] = i * 37 % 101 - 50;
    keys[i] = i * 2654435761u ^ 0x5bd1e995u;
  }
  const int* in = to_device(values);
  const unsigned* keys_in = to_device(keys);
  int* out;
  unsigned* keys_out;
  cudaMalloc(&out, n * sizeof(int));
  cudaMalloc(&keys_out, n * sizeof(unsigned));
  run([&](void* temporary, size_t& bytes) {
    cub::DeviceReduce::Sum(temporary, bytes, in, out, n);
  });
  print("reduce", out, 1);
  run([&](void* temporary, size_t& bytes) {
    cub::DeviceScan::InclusiveSum(temporary, bytes, in, out, n);
  });
  print("scan", out, n);
  run([&](void* temporary, size_t& bytes) {
    cub::DeviceRadixSort::SortKeys(temporary, bytes, keys_in, keys_out, n);
  });
  print("sort", keys_out, n);
  block_sums<<<n / kBlock, kBlock>>>(in, out);
  print("blocks", out, n / kBlock);
  return cudaDeviceSynchronize();
}
