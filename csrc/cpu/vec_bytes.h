// Narrowing a Vec of integers -128..127 to bytes, for instruction sets without instructions for it
// (vec_avx512.h has its own). Included after Vec.

// to [Vec::kWidth]: one byte each, side by side.
PACKEDBERT_INLINE void store_bytes(Vec x, int8_t* to) {
  int32_t integers[Vec::kWidth];
  x.store_integers(integers);
  for (int64_t i = 0; i < Vec::kWidth; ++i) to[i] = static_cast<int8_t>(integers[i]);
}

// The first `count` lanes to every fourth byte.
PACKEDBERT_INLINE void store_every_fourth_byte(Vec x, int8_t* to, int64_t count) {
  int32_t integers[Vec::kWidth];
  x.store_integers(integers);
  for (int64_t i = 0; i < count; ++i) to[4 * i] = static_cast<int8_t>(integers[i]);
}
