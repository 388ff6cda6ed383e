// Dot for AVX-512 VNNI. Included inside namespace packedbert::cpu::avx512_vnni and its target region, after
// vec_avx512.h. The interface is the same in every dot_*.h; dot_scalar.h describes it.

struct Dot {
  using Input = uint8_t;
  static constexpr int64_t kColumns = 16;

  using Inputs = __m512i;
  using Weights = __m512i;
  __m512i sum;

  // sum (input - zero_point) weight = sum input weight - zero_point sum weight
  static PACKEDBERT_INLINE Dot start(int32_t zero_point, const int32_t* column_sums) {
    return {_mm512_mullo_epi32(_mm512_set1_epi32(-zero_point), _mm512_loadu_si512(column_sums))};
  }
  static PACKEDBERT_INLINE Inputs broadcast(const Input* group) {
    int32_t four;
    __builtin_memcpy(&four, group, sizeof(four));
    return _mm512_set1_epi32(four);
  }
  static PACKEDBERT_INLINE Weights load(const int8_t* from) { return _mm512_loadu_si512(from); }
  PACKEDBERT_INLINE void add(Inputs inputs, Weights weights) {
    sum = _mm512_dpbusd_epi32(sum, inputs, weights);
    PACKEDBERT_PIN(sum);
  }
  static PACKEDBERT_INLINE void store(const Dot& a, const Dot& b, int32_t* to) {
    _mm512_storeu_si512(to, a.sum);
    _mm512_storeu_si512(to + kColumns, b.sum);
  }
  static PACKEDBERT_INLINE void store_inputs(Vec x, int32_t zero_point, Input* to) {
    // To the nearest whatever mode is set, because what rounded below 0 would become 255: that is what
    // narrowing makes of all it reads as more, a NaN's integer too.
    const __m512i rounded = _mm512_cvt_roundps_epi32(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm512_cvtusepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(zero_point))));
  }
};
