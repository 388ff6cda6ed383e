// Vec for AVX2 + FMA: 8 floats. Included inside namespace packedbert::cpu::avx2 and its target region.
// The interface is the same in every vec_*.h; vec_scalar.h describes it.

struct Vec {
  static constexpr int64_t kWidth = 8;
  __m256 value;

  static PACKEDBERT_INLINE __m256i first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }

  static PACKEDBERT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static PACKEDBERT_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static PACKEDBERT_INLINE Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static PACKEDBERT_INLINE Vec load_partial(const float* from, int64_t count) {
    return {_mm256_maskload_ps(from, first(count))};
  }
  static PACKEDBERT_INLINE Vec load_integers(const int32_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  PACKEDBERT_INLINE void store_integers(int32_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtps_epi32(value));
  }
  PACKEDBERT_INLINE void store(float* to) const { _mm256_storeu_ps(to, value); }
  PACKEDBERT_INLINE void store_partial(float* to, int64_t count) const {
    _mm256_maskstore_ps(to, first(count), value);
  }
};

PACKEDBERT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec inverse(Vec a) { return Vec::broadcast(1.0f) / a; }
PACKEDBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
PACKEDBERT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.value, b.value)}; }
PACKEDBERT_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.value)}; }
PACKEDBERT_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PACKEDBERT_INLINE Vec times_exp2(Vec x, Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.value), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.value, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}
PACKEDBERT_INLINE bool has_nan(Vec a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.value, a.value, _CMP_UNORD_Q)) != 0;
}
PACKEDBERT_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.value); }
PACKEDBERT_INLINE float sum_of_lanes(Vec a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a.value), _mm256_extractf128_ps(a.value, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}
PACKEDBERT_INLINE float max_of_lanes(Vec a) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(a.value), _mm256_extractf128_ps(a.value, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
}

#include "cpu/vec_columns.h"
