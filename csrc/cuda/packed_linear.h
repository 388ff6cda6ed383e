// activation(x W^T + bias) + residual on tensor cores, or a part of its sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/queue.h"
#include "epilogue.h"

namespace packedbert::cuda {

// Rows, in_features and out_features of a product, at most: a grid has 65,535 tiles of at least 32 rows.
inline constexpr int64_t kMaxSize = 65535 * 32;

// How a product is cut into blocks of threads.
struct LinearPlan {
  int rows;     // of a block's tile of the output
  int columns;  // of it
  int splits;   // parts of the in_features, each with blocks of its own: 1 unless the sums are wanted
};

// The plan with the least estimated time: a pure function, so that the same shapes always round alike.
//
// may_split: a row_epilogue follows, which adds the parts. `multiprocessors`: of the device.
LinearPlan plan_linear(
    int64_t rows, int64_t out_features, int64_t in_features, int multiprocessors, bool may_split);

// Every matrix is row-major; a pitch is the distance of its rows, in elements. A size may be 0.
struct PackedLinear {
  Dtype dtype;  // float16 or bfloat16
  LinearPlan plan;
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  const int32_t* rows_used;  // on the device: rows from there on may stay unwritten; null: all are used
  const void* input;         // [rows, in_features], rows aligned to 16 bytes
  int64_t input_pitch;
  const void* weight;    // as prepack_weight made it
  const void* bias;      // [out_features]
  const void* residual;  // [rows, out_features], or null
  int64_t residual_pitch;
  void* output;  // [rows, out_features], overlaps nothing but the residual
  int64_t output_pitch;
  // Instead of `output` (then null): float [splits, rows, out_features], the products alone. Their sum over
  // the splits is x W^T; bias, residual and activation are left to row_epilogue.
  float* sums;
  Activation activation;
};

// Queues the work, and returns the error of the launch, if any.
cudaError_t packed_linear(const PackedLinear& linear, const Queue& queue);

// weight [out_features, in_features], contiguous, to the layout in packed_layout.h.
cudaError_t prepack_weight(
    const void* weight, int64_t out_features, int64_t in_features, void* packed, const Queue& queue);

}  // namespace packedbert::cuda
