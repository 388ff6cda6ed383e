// What linear layers and attention ask of an instruction set's matrix products, in terms of the microkernels
// over Vec and Dot. Included inside the namespace and the target region of one instruction set, after its
// dot_*.h. products_amx.h is the other one of this interface.

// clang-format off: each builds on the one before
#include "cpu/vec_math.h"
#include "cpu/multiply_tile.h"
// clang-format on

// The inputs of a quantized matrix.
struct QuantizedRows {
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows]
  Dot::Input* values;   // [rows, in_features up to the next full Vec] with `stride` between rows
  int64_t stride;

  // In scratch memory of quantized_rows_size(rows, at least in_features) floats.
  static QuantizedRows in(float* scratch, int64_t rows, int64_t in_features) {
    return {scratch, reinterpret_cast<int32_t*>(scratch + rows),
            reinterpret_cast<Dot::Input*>(scratch + whole_lines(2 * rows)), quantized_stride(in_features)};
  }
  // The inputs from i on, a multiple of Vec::kWidth, up to the next one.
  PACKEDBERT_INLINE Dot::Input* at(int64_t row, int64_t i) const { return values + row * stride + i; }
};

// clang-format off
#include "cpu/quantize_rows.h"
#include "cpu/multiply_quantized.h"
// clang-format on

// The rows of one unit of a linear layer's work, and the queries that attention takes at a time.
constexpr int64_t kUnitRows = kTileRows;
constexpr int64_t kQueryRows = kTileRows;

// Units begin at a multiple of so many rows.
constexpr int64_t kRowStep = 1;

// The inputs of a product in float: as they are.
struct FloatRows {
  // Whether prepare() has to be called for every row before it is multiplied.
  static constexpr bool kPrepared = false;

  const float* values;  // [rows, in_features] with `stride` between rows
  int64_t stride;

  // Floats of scratch memory for so many rows.
  static constexpr int64_t size(int64_t /*rows*/, int64_t /*in_features*/) { return 0; }
  // scratch: size(rows, at least in_features), or null for a product without it, which may be slower.
  static FloatRows in(
      const float* values, int64_t stride, float* /*scratch*/, int64_t /*rows*/, int64_t /*in_features*/) {
    return {values, stride};
  }
  void prepare(int64_t /*row*/, int64_t /*in_features*/) const {}
};

// To be alive on a thread while it multiplies.
struct ProductScope {
  ~ProductScope() {}
};

// tile [count, kPanelWidth] = rows [first_row, first_row + count), count <= kUnitRows, times one panel.
//   panel [depth, kPanelWidth], of which `columns` are wanted; next_panel: what the next call will be for, or
//   null; tile: with tile_stride between rows, and room for all rows that a unit may have.
//   meanwhile(part, parts) is called for each part, before or during the product: what else there is to do.
template <typename Meanwhile>
PACKEDBERT_INLINE void multiply_floats(const FloatRows& rows,
                                       int64_t first_row,
                                       int64_t count,
                                       const float* panel,
                                       const float* /*next_panel*/,
                                       int64_t columns,
                                       int64_t depth,
                                       float* tile,
                                       int64_t tile_stride,
                                       Prefetch ahead,
                                       ProductScope& /*scope*/,
                                       const Meanwhile& meanwhile) {
  meanwhile(0, 1);
  multiply_tile(rows.values + first_row * rows.stride, rows.stride, count, panel, columns, depth, tile,
                tile_stride, ahead);
}
