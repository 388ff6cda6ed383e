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

// kEight neighbouring elements: 16 or 32 bytes, what a thread moves at once.
inline constexpr int kEight = 8;

// All eight at once, so that eight chains of operations run side by side: one after the other took a GELU
// longer than the products of 768 inputs.
__device__ __forceinline__ void activate(Activation activation, float (&x)[kEight]) {
  switch (activation) {
    case Activation::relu:
#pragma unroll
      for (float& e : x) e = e < 0.0f ? 0.0f : e;  // in this order a NaN stays a NaN
      break;
    case Activation::gelu:
#pragma unroll
      for (float& e : x) {
        // The result is 0 below -6 already; without a bound -infinity would become a NaN.
        e = e < -14.0f ? -14.0f : e;
        e = 0.5f * e * (1.0f + erff(e * 0.70710678118654752f));
      }
      break;
    case Activation::gelu_new:
#pragma unroll
      for (float& e : x) {
        e = e < -100.0f ? -100.0f : e;
        e = 0.5f * e * (1.0f + tanhf(0.79788456080286536f * (e + 0.044715f * e * e * e)));
      }
      break;
    default:
      break;
  }
}

// Eight elements as they lie in memory: what is loaded early and used late takes half the registers.
template <typename T>
struct Eight {
  uint4 bits[sizeof(T) * kEight / sizeof(uint4)];
};

// The elements from `source` on, of which `count` are there; the others are 0. `aligned`: to 16 bytes.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* source, int count, bool aligned) {
  Eight<T> eight;
  if (aligned && count >= kEight) {
#pragma unroll
    for (size_t i = 0; i < sizeof(eight) / sizeof(uint4); ++i) {
      eight.bits[i] = reinterpret_cast<const uint4*>(source)[i];
    }
  } else {
    T values[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) {
        values[i] = source[i];
      } else {
        round_to(0.0f, values[i]);
      }
    }
    memcpy(&eight, values, sizeof(eight));
  }
  return eight;
}

template <typename T>
__device__ __forceinline__ void to_floats(const Eight<T>& eight, float (&x)[kEight]) {
  T values[kEight];
  memcpy(values, &eight, sizeof(values));
#pragma unroll
  for (int i = 0; i < kEight; ++i) x[i] = to_float(values[i]);
}

template <typename T>
__device__ __forceinline__ void add_eight(const Eight<T>& eight, float (&x)[kEight]) {
  float more[kEight];
  to_floats(eight, more);
#pragma unroll
  for (int i = 0; i < kEight; ++i) x[i] += more[i];
}

// Rounds, and stores the first `count`.
template <typename T>
__device__ __forceinline__ void store_eight(T* target, int count, bool aligned, const float (&x)[kEight]) {
  T values[kEight];
#pragma unroll
  for (int i = 0; i < kEight; ++i) round_to(x[i], values[i]);
  if (aligned && count >= kEight) {
    Eight<T> eight;
    memcpy(&eight, values, sizeof(values));
#pragma unroll
    for (size_t i = 0; i < sizeof(eight) / sizeof(uint4); ++i) {
      reinterpret_cast<uint4*>(target)[i] = eight.bits[i];
    }
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
