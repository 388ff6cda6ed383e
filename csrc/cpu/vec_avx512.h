// Vec for AVX-512: 16 floats. Included inside namespace packedbert::cpu::avx512 and its target region.
// The interface is the same in every vec_*.h; vec_scalar.h describes it.

struct Vec {
  static constexpr int64_t kWidth = 16;
  __m512 value;

  static PACKEDBERT_INLINE __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
  }

  static PACKEDBERT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static PACKEDBERT_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static PACKEDBERT_INLINE Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static PACKEDBERT_INLINE Vec load_partial(const float* from, int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), from)};
  }
  static PACKEDBERT_INLINE Vec load_integers(const int32_t* from) {
    return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))};
  }
  PACKEDBERT_INLINE void store_integers(int32_t* to) const {
    _mm512_storeu_si512(to, _mm512_cvtps_epi32(value));
  }
  PACKEDBERT_INLINE void store(float* to) const { _mm512_storeu_ps(to, value); }
  PACKEDBERT_INLINE void store_partial(float* to, int64_t count) const {
    _mm512_mask_storeu_ps(to, first(count), value);
  }
};

PACKEDBERT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.value, b.value)}; }
// A guess of 14 bits, and a step of Newton's method: dividing would take 16 cycles.
PACKEDBERT_INLINE Vec inverse(Vec a) {
  const __m512 guess = _mm512_rcp14_ps(a.value);
  const __m512 rest = _mm512_fnmadd_ps(a.value, guess, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(guess, rest, guess)};
}
PACKEDBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
PACKEDBERT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.value)}; }
PACKEDBERT_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PACKEDBERT_INLINE Vec times_exp2(Vec x, Vec n) { return {_mm512_scalef_ps(x.value, n.value)}; }
PACKEDBERT_INLINE bool has_nan(Vec a) { return _mm512_cmp_ps_mask(a.value, a.value, _CMP_UNORD_Q) != 0; }
PACKEDBERT_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.value); }
PACKEDBERT_INLINE float sum_of_lanes(Vec a) { return _mm512_reduce_add_ps(a.value); }
PACKEDBERT_INLINE float max_of_lanes(Vec a) { return _mm512_reduce_max_ps(a.value); }

// As in vec_columns.h.
PACKEDBERT_INLINE void store_columns(const Vec (&rows)[4], float* to, int64_t stride) {
  const __m512 low01 = _mm512_unpacklo_ps(rows[0].value, rows[1].value);
  const __m512 low23 = _mm512_unpacklo_ps(rows[2].value, rows[3].value);
  const __m512 high01 = _mm512_unpackhi_ps(rows[0].value, rows[1].value);
  const __m512 high23 = _mm512_unpackhi_ps(rows[2].value, rows[3].value);
  // Of every fourth column each.
  const __m512 columns[4] = {_mm512_shuffle_ps(low01, low23, 0x44), _mm512_shuffle_ps(low01, low23, 0xee),
                             _mm512_shuffle_ps(high01, high23, 0x44),
                             _mm512_shuffle_ps(high01, high23, 0xee)};
  PACKEDBERT_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_ps(to + i * stride, _mm512_castps512_ps128(columns[i]));
    _mm_storeu_ps(to + (4 + i) * stride, _mm512_extractf32x4_ps(columns[i], 1));
    _mm_storeu_ps(to + (8 + i) * stride, _mm512_extractf32x4_ps(columns[i], 2));
    _mm_storeu_ps(to + (12 + i) * stride, _mm512_extractf32x4_ps(columns[i], 3));
  }
}

PACKEDBERT_INLINE __m128i bytes_of(Vec x) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.value)); }

template <int kRows>
PACKEDBERT_INLINE void store_byte_groups(const Vec (&rows)[kRows],
                                         int8_t* to,
                                         int64_t stride,
                                         int64_t count) {
  static_assert(Vec::kWidth == 4 * kGroup && kGroup == 4 && (kRows == 1 || kRows == kGroup));
  if constexpr (kRows == 1) {
    alignas(16) int8_t bytes[Vec::kWidth];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), bytes_of(rows[0]));
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * stride, bytes + i * kGroup, kGroup);
  } else {
    const __m128i a = bytes_of(rows[0]), b = bytes_of(rows[1]), c = bytes_of(rows[2]), d = bytes_of(rows[3]);
    const __m128i ab01 = _mm_unpacklo_epi32(a, b), ab23 = _mm_unpackhi_epi32(a, b);
    const __m128i cd01 = _mm_unpacklo_epi32(c, d), cd23 = _mm_unpackhi_epi32(c, d);
    const __m128i groups[4] = {_mm_unpacklo_epi64(ab01, cd01), _mm_unpackhi_epi64(ab01, cd01),
                               _mm_unpacklo_epi64(ab23, cd23), _mm_unpackhi_epi64(ab23, cd23)};
    PACKEDBERT_UNROLL
    for (int64_t i = 0; i < 4; ++i) {
      if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), groups[i]);
    }
  }
}

template <int kRows>
PACKEDBERT_INLINE void store_byte_columns(const Vec (&rows)[kRows], int8_t* to) {
  static_assert(kGroup == 4 && (kRows == 1 || kRows == kGroup));
  if constexpr (kRows == 1) {
    _mm512_mask_storeu_epi8(to, 0x1111111111111111, _mm512_cvtps_epi32(rows[0].value));
  } else {
    const __m512i low = _mm512_set1_epi32(255);
    __m512i columns = _mm512_slli_epi32(_mm512_cvtps_epi32(rows[3].value), 24);
    PACKEDBERT_UNROLL
    for (int row = 0; row < 3; ++row) {
      const __m512i byte = _mm512_and_si512(_mm512_cvtps_epi32(rows[row].value), low);
      columns = _mm512_or_si512(columns, _mm512_slli_epi32(byte, 8 * row));
    }
    _mm512_storeu_si512(to, columns);
  }
}
