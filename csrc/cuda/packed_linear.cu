// packed_linear for CUDA, as plainly as it can be written: no tensor cores, no shared-memory tiles. It
// defines the right answers for the fast kernels to come. nvcc compiles it; it has NOT been run on a GPU yet.
#include "cuda/packed_linear.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace packedbert::cuda {
namespace {

constexpr int kThreads = 256;  // of a block, in both kernels
constexpr int kWarp = 32;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

__device__ float activate(Activation activation, float x) {
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

// output = activation(input weight^T + bias) + residual. One thread an output, in a grid-stride loop.
template <typename T>
__global__ void __launch_bounds__(kThreads) linear_kernel(const PackedLinear linear) {
  const T* weight = static_cast<const T*>(linear.weight);
  const int64_t count = linear.rows * linear.out_features;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < count; at += step) {
    const int64_t row = at / linear.out_features;
    const int64_t column = at % linear.out_features;
    const T* x = static_cast<const T*>(linear.input) + row * linear.in_features;
    const T* w = weight + column * linear.in_features;
    float sum = 0.0f;
    for (int64_t k = 0; k < linear.in_features; ++k) sum = fmaf(to_float(x[k]), to_float(w[k]), sum);
    float y = activate(linear.activation, sum + to_float(static_cast<const T*>(linear.bias)[column]));
    if (linear.residual) y += to_float(static_cast<const T*>(linear.residual)[at]);
    static_cast<T*>(linear.output)[at] = from_float<T>(y);
  }
}

// The sum of `value` over the block, for every thread of it.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[kThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warp_sums[warp];
  return sum;
}

// Normalises the rows of output [rows, out_features] in place. One block a row, in a grid-stride loop.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const PackedLinear linear) {
  const T* norm_weight = static_cast<const T*>(linear.norm_weight);
  const T* norm_bias = static_cast<const T*>(linear.norm_bias);
  const int64_t size = linear.out_features;
  for (int64_t row = blockIdx.x; row < linear.rows; row += gridDim.x) {
    T* x = static_cast<T*>(linear.output) + row * size;
    float mean = 0.0f;
    float scale = 1.0f;
    if (linear.norm == Norm::layer_norm) {
      float sum = 0.0f;
      for (int64_t i = threadIdx.x; i < size; i += kThreads) sum += to_float(x[i]);
      mean = block_sum(sum) / static_cast<float>(size);
      float squares = 0.0f;
      for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        const float d = to_float(x[i]) - mean;
        squares = fmaf(d, d, squares);
      }
      scale = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(size) + linear.eps);
    }
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      x[i] = from_float<T>(
          fmaf((to_float(x[i]) - mean) * scale, to_float(norm_weight[i]), to_float(norm_bias[i])));
    }
  }
}

unsigned int grid_for(int64_t blocks) {
  constexpr int64_t most = 1 << 20;  // the kernels' loops take the rest
  return static_cast<unsigned int>(blocks < most ? blocks : most);
}

template <typename T>
cudaError_t launch(const PackedLinear& linear, cudaStream_t stream) {
  const int64_t count = linear.rows * linear.out_features;
  if (count == 0) return cudaSuccess;  // an empty grid is a launch error
  linear_kernel<T><<<grid_for((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(linear);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (linear.norm == Norm::none) return cudaSuccess;
  norm_kernel<T><<<grid_for(linear.rows), kThreads, 0, stream>>>(linear);
  return cudaGetLastError();
}

}  // namespace

cudaError_t packed_linear(const PackedLinear& linear, cudaStream_t stream) {
  switch (linear.dtype) {
    case Dtype::float32:
      return launch<float>(linear, stream);
    case Dtype::float16:
      return launch<__half>(linear, stream);
    case Dtype::bfloat16:
      return launch<__nv_bfloat16>(linear, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace packedbert::cuda
