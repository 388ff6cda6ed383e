// Dot for AVX-512 without VNNI. Included inside namespace packedbert::cpu::avx512 and its target region,
// after vec_avx512.h. The interface is the same in every dot_*.h; dot_scalar.h describes it, dot_avx2.h has
// the method.

struct Dot {
  using Input = int16_t;
  static constexpr int64_t kColumns = 8;

  using Inputs = __m512i;
  using Weights = __m512i;
  __m512i sum;  // two lanes a column, of inputs 0 and 1 and of 2 and 3

  static PACKEDBERT_INLINE Dot start(int32_t, const int32_t*) { return {_mm512_setzero_si512()}; }
  static PACKEDBERT_INLINE Inputs broadcast(const Input* group) {
    int64_t four;
    __builtin_memcpy(&four, group, sizeof(four));
    return _mm512_set1_epi64(four);
  }
  static PACKEDBERT_INLINE Weights load(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  PACKEDBERT_INLINE void add(Inputs inputs, Weights weights) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(inputs, weights));
    PACKEDBERT_PIN(sum);
  }
  static PACKEDBERT_INLINE void store(const Dot& a, const Dot& b, int32_t* to) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_permutex2var_epi32(a.sum, even, b.sum),
                                             _mm512_permutex2var_epi32(a.sum, odd, b.sum)));
  }
  static PACKEDBERT_INLINE void store_inputs(Vec x, int32_t zero_point, Input* to) {
    const __m512i least = _mm512_set1_epi32(-zero_point);
    const __m512i most = _mm512_set1_epi32(255 - zero_point);
    const __m512i integers = _mm512_max_epi32(least, _mm512_min_epi32(most, _mm512_cvtps_epi32(x.value)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(integers));
  }
};
