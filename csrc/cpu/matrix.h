// A linear layer's matrix and inputs as the kernels take them: floats or int8.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "packed_layout.h"

namespace packedbert::cpu {

// One panel of a quantized matrix.
struct QuantizedPanel {
  const int8_t* values;        // [groups, kPanelWidth, kGroup]
  const float* scale;          // [kPanelWidth], of its columns
  const int32_t* column_sums;  // the same
  int64_t groups;
};

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
  QuantizedPanel quantized_panel(int64_t i) const {
    const int64_t column = i * kPanelWidth;
    return {values() + i * quantized_panel_size(in_features), scale() + column, column_sums() + column,
            group_count(in_features)};
  }
};

// Scratch for what a product makes of its inputs, in floats.
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// An odd number of lines of bytes, so that rows don't share sets of the first-level cache.
constexpr int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// For a quantized matrix: of each row its scale, its zero point, and its values, of two bytes at most.
constexpr int64_t quantized_stride(int64_t in_features) { return odd_lines(in_features); }
constexpr int64_t quantized_rows_size(int64_t rows, int64_t in_features) {
  return whole_lines(2 * rows) + rows * quantized_stride(in_features) / 2;
}

// For one in float where it is multiplied in tiles (products_amx.h): whether a row has a NaN or an infinity,
// and its values as the sums of kPlanes values in bfloat16, those of whole lines.
inline constexpr int64_t kPlanes = 3;
constexpr int64_t split_rows_size(int64_t rows, int64_t in_features) {
  const int64_t line = 2 * kLine;  // of bfloat16
  return whole_lines(rows) + rows * kPlanes * ((in_features + line - 1) / line * kLine);
}

// Tiles are read so many rows at a time, also those beyond the last one: these are ignored.
inline constexpr int64_t kStripRows = 32;

// The scratch that `isa` wants for `rows` inputs of a matrix, in floats.
constexpr int64_t prepared_rows_size(Isa isa, bool quantized, int64_t rows, int64_t in_features) {
  const bool tiles = isa == Isa::avx512_amx;
  const int64_t room = tiles ? rows + kStripRows : rows;
  if (quantized) return quantized_rows_size(room, in_features);
  return tiles ? split_rows_size(room, in_features) : 0;
}

}  // namespace packedbert::cpu
