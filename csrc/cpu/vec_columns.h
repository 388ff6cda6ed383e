// Rows of Vecs stored by columns, for instruction sets without instructions for it (vec_avx512.h has its
// own). Included after Vec.

// Column i of row t goes to `to` + i * stride + t.
PACKEDBERT_INLINE void store_columns(const Vec (&rows)[4], float* to, int64_t stride) {
  float values[4][Vec::kWidth];
  for (int row = 0; row < 4; ++row) rows[row].store(values[row]);
  for (int64_t i = 0; i < Vec::kWidth; ++i) {
    for (int row = 0; row < 4; ++row) to[i * stride + row] = values[row][i];
  }
}

// Integers -128..127 as bytes; kRows is 1 or kGroup.

// Group g of row t, kGroup columns, goes to `to` + g * stride + t * kGroup; the first `count` groups.
template <int kRows>
PACKEDBERT_INLINE void store_byte_groups(const Vec (&rows)[kRows],
                                         int8_t* to,
                                         int64_t stride,
                                         int64_t count) {
  int32_t integers[kRows][Vec::kWidth];
  for (int row = 0; row < kRows; ++row) rows[row].store_integers(integers[row]);
  for (int64_t group = 0; group < count; ++group) {
    for (int64_t i = 0; i < kRows * kGroup; ++i)
      to[group * stride + i] = static_cast<int8_t>(integers[i / kGroup][group * kGroup + i % kGroup]);
  }
}

// Column i of row t goes to `to` + i * kGroup + t.
template <int kRows>
PACKEDBERT_INLINE void store_byte_columns(const Vec (&rows)[kRows], int8_t* to) {
  int32_t integers[kRows][Vec::kWidth];
  for (int row = 0; row < kRows; ++row) rows[row].store_integers(integers[row]);
  for (int64_t i = 0; i < Vec::kWidth; ++i) {
    for (int row = 0; row < kRows; ++row) to[i * kGroup + row] = static_cast<int8_t>(integers[row][i]);
  }
}
