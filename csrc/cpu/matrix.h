// A linear layer's matrix and inputs as the kernels take them: floats or int8.
#pragma once

#include <cstdint>

#include "packed_layout.h"

namespace packedbert::cpu {

// Laid out as packed_layout.h says.
struct Matrix {
  int64_t out_features;
  int64_t in_features;
  const void* data;  // aligned for float
  bool quantized;

  const float* floats() const { return static_cast<const float*>(data); }

  // The parts of a quantized one.
  const int8_t* values() const { return static_cast<const int8_t*>(data); }
  const float* scale() const {
    const int64_t panels = panel_count(out_features);
    return reinterpret_cast<const float*>(values() + panels * quantized_panel_size(in_features));
  }
  const int32_t* column_sums() const {
    return reinterpret_cast<const int32_t*>(scale() + panel_count(out_features) * kPanelWidth);
  }
  const float* input_scale() const {
    return reinterpret_cast<const float*>(column_sums() + panel_count(out_features) * kPanelWidth);
  }
};

// Scratch for the inputs of a quantized matrix, in floats: of each row its scale, its zero point, and its
// values, of two bytes at most.
constexpr int64_t quantized_stride(int64_t in_features) {
  // An odd number of half lines, so that rows don't share sets of the first-level cache.
  const int64_t stride = (in_features + 31) / 32 * 32;
  return stride % 64 == 0 ? stride + 32 : stride;
}
constexpr int64_t quantized_rows_size(int64_t rows, int64_t in_features) {
  return rows * (2 + quantized_stride(in_features) / 2);
}

}  // namespace packedbert::cpu
