// Dot for AVX-VNNI. Included inside namespace packedbert::cpu::avx2_vnni and its target region, after
// vec_avx2.h. The interface is the same in every dot_*.h; dot_scalar.h describes it.

struct Dot {
  using Input = uint8_t;
  static constexpr int64_t kColumns = 8;

  using Inputs = __m256i;
  using Weights = __m256i;
  __m256i sum;

  // sum (input - zero_point) weight = sum input weight - zero_point sum weight
  static PACKEDBERT_INLINE Dot start(int32_t zero_point, const int32_t* column_sums) {
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_sums));
    return {_mm256_mullo_epi32(_mm256_set1_epi32(-zero_point), sums)};
  }
  static PACKEDBERT_INLINE Inputs broadcast(const Input* group) {
    int32_t four;
    __builtin_memcpy(&four, group, sizeof(four));
    return _mm256_set1_epi32(four);
  }
  static PACKEDBERT_INLINE Weights load(const int8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  PACKEDBERT_INLINE void add(Inputs inputs, Weights weights) {
    sum = _mm256_dpbusd_avx_epi32(sum, inputs, weights);
    PACKEDBERT_PIN(sum);
  }
  static PACKEDBERT_INLINE void store(const Dot& a, const Dot& b, int32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.sum);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kColumns), b.sum);
  }
  static PACKEDBERT_INLINE void store_inputs(Vec x, int32_t zero_point, Input* to) {
    const __m256i integers = _mm256_add_epi32(_mm256_cvtps_epi32(x.value), _mm256_set1_epi32(zero_point));
    // Both ways of narrowing keep to their limits.
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
};
