// y = norm(activation(x W^T + b) + residual) on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epilogue.h"

namespace packedbert::cuda {

enum class Dtype { float32, float16, bfloat16 };

// Every array is of the same type, row-major and contiguous. A size may be 0.
struct PackedLinear {
  Dtype dtype;
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  const void* input;        // [rows, in_features]
  const void* weight;       // [out_features, in_features]: the canonical layout
  const void* bias;         // [out_features]
  const void* residual;     // [rows, out_features], or null
  const void* norm_weight;  // [out_features]; null with Norm::none
  const void* norm_bias;    // [out_features]; null with Norm::none
  void* output;             // [rows, out_features], overlaps nothing
  Activation activation;
  Norm norm;
  float eps;
};

// Queues the work on `stream` of the current device, and returns the error of the launch, if any.
cudaError_t packed_linear(const PackedLinear& linear, cudaStream_t stream);

}  // namespace packedbert::cuda
