// The microkernel of quantized products, over Vec and Dot. Included inside the namespace and the target
// region of one instruction set, after quantize_rows.h.

constexpr int64_t kQuantizedTileColumns = 2 * Dot::kColumns;
constexpr int kQuantizedPasses = kPanelWidth / kQuantizedTileColumns;

// tile [kRows, kQuantizedTileColumns] = the product, as floats.
//   weight: the first kQuantizedTileColumns columns of [groups, kPanelWidth, kGroup]; scale and column_sums:
//   of these columns; tile: with tile_stride between rows.
template <int kRows>
void multiply_quantized_pass(const QuantizedRows& rows,
                             int64_t first_row,
                             const int8_t* weight,
                             const float* scale,
                             const int32_t* column_sums,
                             int64_t groups,
                             float* tile,
                             int64_t tile_stride,
                             Prefetch ahead) {
  // Pointers as in multiply_pass.
  constexpr int kPointers = (kRows + 2) / 3;
  const int64_t stride = rows.stride;
  const Dot::Input* pointer[kPointers];
  for (int i = 0; i < kPointers; ++i) pointer[i] = rows.values + (first_row + 3 * i) * stride;

  Dot sum[kRows][2];
  PACKEDBERT_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const int32_t zero_point = rows.zero_point[first_row + row];
    sum[row][0] = Dot::start(zero_point, column_sums);
    sum[row][1] = Dot::start(zero_point, column_sums + Dot::kColumns);
  }
  const auto multiply_group = [&]() PACKEDBERT_INLINE_LAMBDA {
    if constexpr (kNearPrefetch > 0) __builtin_prefetch(weight + kNearPrefetch * kPanelWidth * kGroup, 0, 3);
    const Dot::Weights weight0 = Dot::load(weight);
    const Dot::Weights weight1 = Dot::load(weight + Dot::kColumns * kGroup);
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Dot::Inputs x = Dot::broadcast(pointer[row / 3] + (row % 3) * stride);
      sum[row][0].add(x, weight0);
      sum[row][1].add(x, weight1);
    }
    PACKEDBERT_UNROLL
    for (int i = 0; i < kPointers; ++i) pointer[i] += kGroup;
    weight += kPanelWidth * kGroup;
  };
  int64_t group = 0;
  for (; group + kQuantizedPasses <= groups; group += kQuantizedPasses) {
    __builtin_prefetch(ahead.from, 0, 2);
    ahead.from += ahead.bytes;
    PACKEDBERT_UNROLL
    for (int i = 0; i < kQuantizedPasses; ++i) multiply_group();
  }
  for (; group < groups; ++group) multiply_group();

  PACKEDBERT_UNROLL
  for (int row = 0; row < kRows; ++row) {
    int32_t integers[kQuantizedTileColumns];
    Dot::store(sum[row][0], sum[row][1], integers);
    const Vec row_scale = Vec::broadcast(rows.scale[first_row + row]);
    for (int64_t i = 0; i < kQuantizedTileColumns; i += Vec::kWidth) {
      (Vec::load_integers(integers + i) * (row_scale * Vec::load(scale + i)))
          .store(tile + row * tile_stride + i);
    }
  }
}

template <int kRows>
PACKEDBERT_INLINE void multiply_quantized_pass_of(int64_t count,
                                                  const QuantizedRows& rows,
                                                  int64_t first_row,
                                                  const int8_t* weight,
                                                  const float* scale,
                                                  const int32_t* column_sums,
                                                  int64_t groups,
                                                  float* tile,
                                                  int64_t tile_stride,
                                                  Prefetch ahead) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      return multiply_quantized_pass_of<kRows - 1>(count, rows, first_row, weight, scale, column_sums, groups,
                                                   tile, tile_stride, ahead);
    }
  }
  multiply_quantized_pass<kRows>(rows, first_row, weight, scale, column_sums, groups, tile, tile_stride,
                                 ahead);
}

// tile = rows [first_row, first_row + count), count <= kTileRows, times one panel, of which `columns` are
// wanted; tile [count, kPanelWidth] with tile_stride between rows.
inline void multiply_quantized_panel(const QuantizedRows& rows,
                                     int64_t first_row,
                                     int64_t count,
                                     const QuantizedPanel& panel,
                                     int64_t columns,
                                     float* tile,
                                     int64_t tile_stride,
                                     Prefetch ahead) {
  for (int64_t column = 0; column < columns; column += kQuantizedTileColumns) {
    multiply_quantized_pass_of<kTileRows>(count, rows, first_row, panel.values + column * kGroup,
                                          panel.scale + column, panel.column_sums + column, panel.groups,
                                          tile + column, tile_stride, ahead);
    ahead.from += panel.groups / kQuantizedPasses * ahead.bytes;
  }
}

// sums [count, kPanelWidth] = the same; meanwhile: as in multiply_floats.
template <typename Meanwhile>
PACKEDBERT_INLINE void multiply_quantized(const QuantizedRows& rows,
                                          int64_t first_row,
                                          int64_t count,
                                          const QuantizedPanel& panel,
                                          int64_t columns,
                                          float* sums,
                                          Prefetch ahead,
                                          const Meanwhile& meanwhile) {
  meanwhile(0, 1);
  multiply_quantized_panel(rows, first_row, count, panel, columns, sums, kPanelWidth, ahead);
}

// Makes floats of the rows [begin, end) of sums: they are.
PACKEDBERT_INLINE void complete_quantized(
    const QuantizedRows&, int64_t, int64_t, int64_t, const QuantizedPanel&, float*) {}
