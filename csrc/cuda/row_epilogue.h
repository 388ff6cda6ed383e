// What is left to do with whole rows of a product: norm(activation(sum of parts + bias) + residual).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/queue.h"
#include "epilogue.h"

namespace packedbert::cuda {

// Every matrix is row-major; a pitch is the distance of its rows, in elements. A size may be 0.
struct RowEpilogue {
  Dtype dtype;  // of everything but float sums
  int64_t rows;
  int64_t size;              // of a row
  const int32_t* rows_used;  // on the device: rows from there on may stay unwritten; null: all are used
  // The parts: float [splits, rows, size], or (null) one of `dtype` in `input`. No split at all counts as 0.
  const float* sums;
  int splits;
  const void* input;  // [rows, size]; may be `output`
  int64_t input_pitch;
  const void* bias;      // [size], or null
  const void* residual;  // [rows, size], or null
  int64_t residual_pitch;
  const void* norm_weight;  // [size]; null with Norm::none
  const void* norm_bias;    // [size]; null with Norm::none
  void* output;             // [rows, size]
  int64_t output_pitch;
  const int32_t* output_rows;  // on the device, [rows]: where in `output` each row goes; null: in order
  Activation activation;       // none but in float32: in half precision packed_linear has applied it
  Norm norm;
  float eps;
};

// Queues the work, and returns the error of the launch, if any.
cudaError_t row_epilogue(const RowEpilogue& epilogue, const Queue& queue);

}  // namespace packedbert::cuda
