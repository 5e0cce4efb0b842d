// Small kernels for blocks of 128 threads, each with one fault where FAULTY is 1 and mended where
// it is 0. Whatever the schedule, the line with "// expect: KIND" is named for that fault (or one
// of several kinds; one of several lines where who comes last decides); lines with "// or: KIND"
// may be named as well.
#include <cstdint>

#ifndef FAULTY
#error "compile with -DFAULTY=0 or 1"
#endif

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- bounds and alignment

KERNEL global_read_behind_end(const float* in, float* out, int n) {
  int i = threadIdx.x + FAULTY;
  if (i < n + FAULTY) out[threadIdx.x] = in[i];  // expect: out of bounds
}

KERNEL global_write_before_start(float* out) {
  out[int(threadIdx.x) - FAULTY] = 1.0f;  // expect: out of bounds
}

KERNEL null_pointer(const float* in, float* out, const float* null) {
  const float* p = FAULTY && threadIdx.x == 77 ? null : in + threadIdx.x;
  out[threadIdx.x] = *p;  // expect: out of bounds
}

KERNEL shared_write_behind_end(float* out) {
  extern __shared__ float tile[];     // 128 floats
  tile[threadIdx.x + FAULTY] = 2.0f;  // expect: out of bounds
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x / 2 + 1];
}

KERNEL shared_null(float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = 1.0f;
  uint32_t address = FAULTY ? 4 * threadIdx.x : shared_address(tile + threadIdx.x);
  float x;
  // clang-format off: the finding names one line
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");  // expect: out of bounds
  // clang-format on
  out[threadIdx.x] = x;
}

KERNEL local_read_behind_end(float* out, int extent) {
  volatile float own[8];
  for (int i = 0; i < 8; ++i) own[i] = float(i);
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < extent + FAULTY; ++i) {
    sum += own[i];  // expect: out of bounds
  }
  out[threadIdx.x] = sum;
}

KERNEL global_misaligned(const char* in, float4* out) {
  const char* p = in + 16 * threadIdx.x + 4 * FAULTY;
  out[threadIdx.x] = *reinterpret_cast<const float4*>(p);  // expect: misaligned
}

KERNEL shared_misaligned(double* out) {
  __shared__ float tile[260];
  for (int i = threadIdx.x; i < 260; i += 128) tile[i] = 0.0f;
  __syncthreads();
  uint32_t address = shared_address(tile) / 8 * 8 + 8 * threadIdx.x + 4 * FAULTY;
  double x;
  // clang-format off: the finding names one line
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory");  // expect: misaligned
  // clang-format on
  out[threadIdx.x] = x;
}

__constant__ int table[32];
KERNEL constant_behind_end(int* out, int far) {
  int i = threadIdx.x % 32;
  const int* p = table + i + FAULTY * far;
  int x;
  asm volatile("ld.const.s32 %0, [%1];"
               : "=r"(x)
               : "l"(__cvta_generic_to_constant(p)));  // expect: out of bounds
  out[threadIdx.x] = x;
}

KERNEL atomic_behind_end(int* bins, int n) {
  atomicAdd(bins + (threadIdx.x % n) * (1 + FAULTY), 1);  // expect: out of bounds
}

// ---- uninitialised data

KERNEL shared_uninitialised(float* out) {
  __shared__ float tile[128];
  if (!FAULTY || threadIdx.x != 40) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = 3.0f * tile[127 - threadIdx.x];  // expect: uninitialised
}

KERNEL register_uninitialised(float* out) {
  float x;
  if (FAULTY) {
    asm volatile("{ .reg .f32 fresh; add.f32 %0, fresh, fresh; }" : "=f"(x));
  } else {
    x = 1.0f;
  }
  out[threadIdx.x] = x + 1.0f;  // expect: uninitialised
}

// `fresh` has been allocated and never written.
KERNEL global_uninitialised(float* fresh, float* out) {
  if (!FAULTY) fresh[threadIdx.x] = 1.0f;
  out[threadIdx.x] = fresh[threadIdx.x];  // expect: uninitialised
}

KERNEL uninitialised_index(const float* in, float* out) {
  __shared__ volatile int index[128];
  if (!FAULTY) index[threadIdx.x] = threadIdx.x;
  int i = index[threadIdx.x] & 127;
  out[threadIdx.x] = in[i];  // expect: uninitialised
}

KERNEL uninitialised_counter(int* out) {
  __shared__ int counter;
  if (!FAULTY && threadIdx.x == 0) counter = 0;
  __syncthreads();
  atomicAdd(&counter, 1);  // expect: uninitialised
  __syncthreads();
  if (threadIdx.x == 0 && !FAULTY) *out = counter;
}

KERNEL uninitialised_branch(float* out) {
  __shared__ volatile int flag;
  if (!FAULTY && threadIdx.x == 0) flag = 1;
  __syncthreads();
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %0, 0; @p bra DONE; st.global.s32 [%1], 7; DONE: }" ::"r"(
          flag),
      "l"(out + threadIdx.x));  // expect: uninitialised
}

// ---- races

KERNEL read_before_barrier(float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = float(threadIdx.x);  // or: race
  if (!FAULTY) __syncthreads();
  float x = tile[127 - threadIdx.x];  // expect: race
  out[threadIdx.x] = x;               // or: uninitialised
}

KERNEL write_before_readers_are_done(float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  float x = tile[127 - threadIdx.x];  // or: race
  if (!FAULTY) __syncthreads();
  tile[threadIdx.x] = x;  // expect: race
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x / 2];
}

KERNEL two_warps_write(int* out) {
  __shared__ int word;
  if (FAULTY ? threadIdx.x % 32 == 0 : threadIdx.x == 0) word = threadIdx.x;  // expect: race
  __syncthreads();
  if (threadIdx.x == 0) *out = word;
}

// Every fourth byte is another warp's: no race but at the shared byte.
KERNEL neighbouring_bytes(unsigned char* out) {
  __shared__ unsigned char bytes[128];
  int i = 4 * (threadIdx.x % 32) + threadIdx.x / 32;
  if (FAULTY && i == 6) i = 5;
  bytes[i] = static_cast<unsigned char>(threadIdx.x);  // expect: race
  __syncthreads();
  out[threadIdx.x] = bytes[FAULTY ? threadIdx.x & ~7u : threadIdx.x];
}

KERNEL blocks_write_one_word(int* out) {
  if (FAULTY ? threadIdx.x == 0 : blockIdx.x == 0 && threadIdx.x == 0)
    *out = blockIdx.x;  // expect: race
}

// Block 0 writes when all others have read, but nothing says that they have.
KERNEL write_behind_readers_of_other_blocks(int* data, volatile int* readers, int* out) {
  if (blockIdx.x != 0) {
    int x = data[threadIdx.x];
    atomicAdd(out, x);
    if (!FAULTY) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(const_cast<int*>(readers), 1);
  } else {
    if (threadIdx.x == 0) {
      while (*readers < int(gridDim.x) - 1) {
      }
      __threadfence();
    }
    __syncthreads();
    data[127 - threadIdx.x] = 1;  // expect: race
  }
}

KERNEL plain_beside_atomic(int* sum) {
  if (threadIdx.x != 0) return;
  if (FAULTY && blockIdx.x == 1)
    *sum = 1;  // expect: race
  else
    atomicAdd(sum, 1);  // expect: race
}

// The last block to take a ticket adds up what all have stored.
KERNEL ticket_without_fence(int* partial, int* ticket, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    if (!FAULTY) __threadfence();
    last = atomicAdd(ticket, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < int(gridDim.x); ++i) {
      sum += partial[i];  // expect: race
    }
    *out = sum;
  }
}

// Block 1 waits for block 0's data.
KERNEL flag_without_fence(int* data, volatile int* flag, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = threadIdx.x;
    if (!FAULTY) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *flag = 1;
  } else {
    if (threadIdx.x == 0) {
      while (*flag == 0) {
      }
      __threadfence();
    }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];  // expect: race
  }
}

// A fence of block scope orders nothing for another block.
KERNEL fence_of_narrow_scope(int* data, volatile int* flag, int* out) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    *data = 42;
    if (FAULTY)
      __threadfence_block();
    else
      __threadfence();
    *flag = 1;
  } else {
    while (*flag == 0) {
    }
    __threadfence();
    *out = *data;  // expect: race
  }
}

KERNEL reader_without_acquire(int* data, int* flag, int* out) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    *data = 42;
    asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
  } else {
    int seen = 0;
    while (seen == 0) {
      if (FAULTY)
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
      else
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    }
    *out = *data;  // expect: race
  }
}

// Warps 0 and 1 fill for warps 2 and 3.
KERNEL named_barrier_missing(float* out) {
  __shared__ float tile[64];
  if (threadIdx.x < 64) {
    tile[threadIdx.x] = float(threadIdx.x);  // expect: race
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    if (!FAULTY) asm volatile("bar.sync 1, 128;" ::: "memory");
    float x = tile[threadIdx.x - 64];  // expect: race
    out[threadIdx.x - 64] = x;         // or: uninitialised
    if (FAULTY) asm volatile("bar.sync 1, 128;" ::: "memory");
  }
}

KERNEL lanes_without_syncwarp(float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = float(threadIdx.x);
  if (!FAULTY) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];  // expect: race
}

// Each half of a warp synchronises by itself, so it may read its own half's data only.
KERNEL half_warp_reads_the_other_half(float* out) {
  __shared__ float tile[128];
  tile[threadIdx.x] = float(threadIdx.x);
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = tile[threadIdx.x ^ (FAULTY ? 16 : 1)];  // expect: race
}

// ---- barriers

KERNEL divergent_barrier(float* out) {
  out[threadIdx.x] = 0.0f;
  if (FAULTY) {
    if (threadIdx.x % 2 == 0)
      asm volatile("barrier.sync.aligned 0;" ::: "memory");  // expect: divergent barrier
    else
      asm volatile("barrier.sync.aligned 0;" ::: "memory");  // or: divergent barrier
  } else {
    __syncthreads();
  }
}

// ---- asynchronous copies

KERNEL copy_not_waited(const float4* in, float4* out) {
  __shared__ float4 tile[128];
  copy_async_16(tile + threadIdx.x, in + threadIdx.x);
  commit_async();
  if (!FAULTY) wait_async<0>();
  out[threadIdx.x] = tile[threadIdx.x];  // expect: asynchronous copy not waited for
  wait_async<0>();
}

KERNEL copy_waited_for_too_few(const float4* in, float4* out) {
  __shared__ float4 tile[2][128];
  for (int stage = 0; stage < 2; ++stage) {
    copy_async_16(tile[stage] + threadIdx.x, in + threadIdx.x);
    commit_async();
  }
  wait_async<FAULTY>();
  out[threadIdx.x] = tile[1][threadIdx.x];  // expect: asynchronous copy not waited for
  wait_async<0>();
}

KERNEL copy_not_committed(const float4* in, float4* out) {
  __shared__ float4 tile[128];
  copy_async_16(tile + threadIdx.x, in + threadIdx.x);
  if (!FAULTY) commit_async();
  wait_async<0>();
  out[threadIdx.x] = tile[threadIdx.x];  // expect: asynchronous copy not waited for
  commit_async();
  wait_async<0>();
}

KERNEL copy_without_barrier(const float4* in, float4* out) {
  __shared__ float4 tile[128];
  copy_async_16(tile + threadIdx.x, in + threadIdx.x);  // or: race
  commit_async();
  wait_async<0>();
  if (!FAULTY) __syncthreads();
  // A warp that comes later reads behind the wait of the one that copied, an earlier one before it.
  out[threadIdx.x] =
      tile[127 -
           threadIdx.x];  // expect: race | asynchronous copy not waited for // or: uninitialised
}

KERNEL copy_over_readers(const float4* in, float4* out) {
  __shared__ float4 tile[128];
  tile[threadIdx.x] = make_float4(0.0f, 1.0f, 2.0f, 3.0f);
  __syncthreads();
  float4 x = tile[127 - threadIdx.x];  // or: race | asynchronous copy not waited for
  if (!FAULTY) __syncthreads();
  copy_async_16(tile + threadIdx.x, in + threadIdx.x);  // expect: race
  commit_async();
  wait_async<0>();
  out[threadIdx.x] = make_float4(x.x, tile[threadIdx.x].y, 0.0f, 0.0f);
}

KERNEL matrix_load_not_waited(const float4* in, uint32_t* out) {
  __shared__ float4 tile[32];
  if (threadIdx.x >= 32) return;
  copy_async_16(tile + threadIdx.x, in + threadIdx.x);
  commit_async();
  if (!FAULTY) wait_async<0>();
  __syncwarp();
  uint32_t a, b, c, d;
  uint32_t row = shared_address(tile + threadIdx.x);
  // clang-format off: the finding names one line
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(row) : "memory");  // expect: asynchronous copy not waited for
  // clang-format on
  out[threadIdx.x] = a ^ b ^ c ^ d;
  wait_async<0>();
}

KERNEL copy_from_behind_end(const float4* in, float4* out) {
  __shared__ float4 tile[128];
  copy_async_16(tile + threadIdx.x, in + threadIdx.x + FAULTY);  // expect: out of bounds
  commit_async();
  wait_async<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x & 63];
}
