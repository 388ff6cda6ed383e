// Conversions, activations, and eight neighbouring elements at a time.
#pragma once

#include "cuda/device.cuh"
#include "epilogue.h"

namespace packedbert::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void round_to(float x, float& y) { y = x; }
__device__ __forceinline__ void round_to(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // in this order a NaN stays a NaN
    case Activation::gelu:
      // Below -14, x Phi(x) is 0 in float; without the bound -infinity would become a NaN.
      x = x < -14.0f ? -14.0f : x;
      return x * normcdff(x);
    case Activation::gelu_new:
      x = x < -100.0f ? -100.0f : x;
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default:
      return x;
  }
}

// kEight neighbouring elements: 16 or 32 bytes, what a thread moves at once.
inline constexpr int kEight = 8;

// The elements from `source` on, of which `count` are there; the others are 0. `aligned`: to 16 bytes.
template <typename T>
__device__ __forceinline__ void load_eight(const T* source, int count, bool aligned, float (&x)[kEight]) {
  if (aligned && count >= kEight) {
    uint4 bits[sizeof(T) * kEight / sizeof(uint4)];
#pragma unroll
    for (size_t i = 0; i < sizeof(bits) / sizeof(uint4); ++i) {
      bits[i] = reinterpret_cast<const uint4*>(source)[i];
    }
    T values[kEight];
    memcpy(values, bits, sizeof(values));
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

// Rounds, and stores the first `count`.
template <typename T>
__device__ __forceinline__ void store_eight(T* target, int count, bool aligned, const float (&x)[kEight]) {
  T values[kEight];
#pragma unroll
  for (int i = 0; i < kEight; ++i) round_to(x[i], values[i]);
  if (aligned && count >= kEight) {
    uint4 bits[sizeof(T) * kEight / sizeof(uint4)];
    memcpy(bits, values, sizeof(values));
#pragma unroll
    for (size_t i = 0; i < sizeof(bits) / sizeof(uint4); ++i) reinterpret_cast<uint4*>(target)[i] = bits[i];
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) target[i] = values[i];
    }
  }
}

// The sum, or the largest, over the four lanes with the same lane / 4, or over all 32.
template <int kLanes>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <int kLanes>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

}  // namespace packedbert::cuda
