// Dot for AVX2. Included inside namespace packedbert::cpu::avx2 and its target region, after vec_avx2.h.
// The interface is the same in every dot_*.h; dot_scalar.h describes it.
//
// vpmaddubsw would take bytes as they are, but its 16-bit sums saturate (255 * 127 + 255 * 127 > 32767), so
// the weights are widened and vpmaddwd, whose sums have 32 bits, does the products.

struct Dot {
  using Input = int16_t;
  static constexpr int64_t kColumns = 4;

  using Inputs = __m256i;
  using Weights = __m256i;
  __m256i sum;  // two lanes a column, of inputs 0 and 1 and of 2 and 3

  static PACKEDBERT_INLINE Dot start(int32_t, const int32_t*) { return {_mm256_setzero_si256()}; }
  static PACKEDBERT_INLINE Inputs broadcast(const Input* group) {
    int64_t four;
    __builtin_memcpy(&four, group, sizeof(four));
    return _mm256_set1_epi64x(four);
  }
  static PACKEDBERT_INLINE Weights load(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  PACKEDBERT_INLINE void add(Inputs inputs, Weights weights) {
    // sum += madd(inputs, weights). As intrinsics g++ 12 moves the two apart, for which there is no register
    // left.
    __m256i products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(products)
            : "x"(inputs), "x"(weights));
  }
  static PACKEDBERT_INLINE void store(const Dot& a, const Dot& b, int32_t* to) {
    const __m256i columns = _mm256_hadd_epi32(a.sum, b.sum);  // 0 1 4 5, 2 3 6 7
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(columns, 0xd8));
  }
  static PACKEDBERT_INLINE void store_inputs(Vec x, int32_t zero_point, Input* to) {
    const __m256i least = _mm256_set1_epi32(-zero_point);
    const __m256i most = _mm256_set1_epi32(255 - zero_point);
    const __m256i integers = _mm256_max_epi32(least, _mm256_min_epi32(most, _mm256_cvtps_epi32(x.value)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(_mm256_castsi256_si128(integers),
                                                                     _mm256_extracti128_si256(integers, 1)));
  }
};
