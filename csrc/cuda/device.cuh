// What the kernels need of the device beyond CUDA C++: one PTX instruction a function, and the launch. With
// PACKEDBERT_EMULATED each function has a body for the host: the tests compile the same kernels with a C++
// compiler and run them without a GPU (tests/cuda_emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/queue.h"

namespace packedbert::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef PACKEDBERT_EMULATED

// Addresses in shared memory as PTX takes them.
using SharedAddress = uint32_t;

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes, the first `bytes` of them from `source`, the others 0. Of 0 bytes nothing is
// read.
__device__ __forceinline__ void copy_async(SharedAddress target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes)
               : "memory");
}

// The same of all 16 bytes: several instructions less.
__device__ __forceinline__ void copy_async(SharedAddress target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies but those of the last `kPending` groups.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for all of this thread's copies, in whatever group.
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit values; lanes 8i to 8i + 7 give the addresses of the rows of matrix i. Lane l
// gets of each matrix row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

// The same, transposed: lane l gets column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8], in the fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"). With g = lane / 4 and t = lane % 4: sums[0..1] are row g, columns 2t and 2t + 1; sums[2..3]
// are row g + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4],
                                             const uint32_t (&a)[4],
                                             uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sums)[4],
                                                     const uint32_t (&a)[4],
                                                     uint32_t b0,
                                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sums)[4],
                                                            const uint32_t (&a)[4],
                                                            uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, approximately (2 ulp).
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The oldest architecture whose kernels can overlap, as __CUDA_ARCH__ has it.
#define PACKEDBERT_OVERLAP_ARCH 900

// In a Queue that overlaps: waits until the kernel before is done and what it wrote can be read. Before that
// a kernel reads nothing but weights, and writes nothing.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= PACKEDBERT_OVERLAP_ARCH
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may take the places that this one leaves free, once all of its blocks have come here.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= PACKEDBERT_OVERLAP_ARCH
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Queues a kernel; its arguments are one structure. No kernel here is ever launched with an empty grid.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments),
                   dim3 grid,
                   int threads,
                   int shared_bytes,
                   const Queue& queue,
                   const Arguments& arguments) {
  constexpr int without_asking = 48 * 1024;
  if (shared_bytes > without_asking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = queue.stream;
  config.attrs = &overlap;
  config.numAttrs = queue.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

#else  // on the host

using SharedAddress = uintptr_t;

inline unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }
inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }
inline void copy_async(SharedAddress target, const void* source, int bytes) {
  emulator::copy_async(reinterpret_cast<void*>(target), source, bytes);
}
inline void copy_async(SharedAddress target, const void* source) { copy_async(target, source, 16); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}
inline void wait_for_all_copies() {
  emulator::commit_copies();
  emulator::wait_for_copies(0);
}
inline void load_matrices(uint32_t (&matrices)[4], SharedAddress row) {
  emulator::load_matrices(matrices, row, false);
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], SharedAddress row) {
  emulator::load_matrices(matrices, row, true);
}
template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_add<T>(sums, a, b0, b1);
}
inline float exp2_fast(float x) { return exp2f(x); }
inline void wait_for_kernel_before() { emulator::wait_for_kernel_before(); }
inline void let_next_kernel_begin() {}
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments),
                   dim3 grid,
                   int threads,
                   int shared_bytes,
                   const Queue& queue,
                   const Arguments& arguments) {
  return emulator::launch(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, &arguments,
                          sizeof(arguments), queue.overlaps, [=] { kernel(arguments); })
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}

#endif

}  // namespace packedbert::cuda
