// Narrowing a Vec of integers -128..127 to bytes, for instruction sets without instructions for it
// (vec_avx512.h has its own). Included after Vec.

// x: the rows of a matrix [kTokens, Vec::kWidth]; kTokens is 1 or kGroup.

// Group g of row t, kGroup columns, goes to `to` + g * stride + t * kGroup; the first `count` groups.
template <int kTokens>
PACKEDBERT_INLINE void store_groups(const Vec (&x)[kTokens], int8_t* to, int64_t stride, int64_t count) {
  int32_t integers[kTokens][Vec::kWidth];
  for (int token = 0; token < kTokens; ++token) x[token].store_integers(integers[token]);
  for (int64_t group = 0; group < count; ++group) {
    for (int64_t i = 0; i < kTokens * kGroup; ++i)
      to[group * stride + i] = static_cast<int8_t>(integers[i / kGroup][group * kGroup + i % kGroup]);
  }
}

// Column i of row t goes to `to` + i * kGroup + t.
template <int kTokens>
PACKEDBERT_INLINE void store_columns(const Vec (&x)[kTokens], int8_t* to) {
  int32_t integers[kTokens][Vec::kWidth];
  for (int token = 0; token < kTokens; ++token) x[token].store_integers(integers[token]);
  for (int64_t i = 0; i < Vec::kWidth; ++i) {
    for (int token = 0; token < kTokens; ++token)
      to[i * kGroup + token] = static_cast<int8_t>(integers[token][i]);
  }
}
