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

// As in vec_bytes.h.
PACKEDBERT_INLINE void store_bytes(Vec x, int8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.value)));
}
PACKEDBERT_INLINE void store_every_fourth_byte(Vec x, int8_t* to, int64_t count) {
  const __mmask64 lowest = 0x1111111111111111 & _cvtu64_mask64(~0ull >> (64 - 4 * count));
  _mm512_mask_storeu_epi8(to, lowest, _mm512_cvtps_epi32(x.value));
}
