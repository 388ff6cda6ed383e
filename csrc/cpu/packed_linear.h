// y = norm(activation(x W^T + b) + residual) on the CPU, in float.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/parallel.h"
#include "epilogue.h"

namespace packedbert::cpu {

// Every array is row-major and contiguous, and needs no alignment beyond a float's. A size may be 0.
struct PackedLinear {
  int64_t rows;
  Matrix weight;             // [out_features, in_features]
  const float* input;        // [rows, in_features]
  const float* bias;         // [out_features]
  const float* residual;     // [rows, out_features], or null
  const float* norm_weight;  // [out_features]; null with Norm::none
  const float* norm_bias;    // [out_features]; null with Norm::none
  float* output;             // [rows, out_features], overlaps nothing
  float* prepared_rows;      // scratch, prepared_rows_size(isa, weight.quantized, rows, in_features) floats
  Activation activation;
  Norm norm;
  float eps;
  Isa isa;
};

// Runs the body for linear.isa. The result has the same bits whatever the number of threads.
void packed_linear(const PackedLinear& linear, ParallelFor parallel_for);

// Copies weight[n, k] = weight[n * row_stride + k * column_stride] to `packed`, laid out as packed_layout.h
// says.
void prepack_linear(const float* weight,  // [out_features, in_features], with strides in elements
                    int64_t row_stride,
                    int64_t column_stride,
                    int64_t out_features,
                    int64_t in_features,
                    float* packed,  // [panel_count(out_features), in_features, kPanelWidth]
                    ParallelFor parallel_for);

PACKEDBERT_DECLARE_FOR_EACH_ISA(void packed_linear(const PackedLinear& linear, ParallelFor parallel_for))

}  // namespace packedbert::cpu
