// Vec in plain C++: 4 floats, by the vector extension that g++ and clang share. It becomes SSE2 on x86-64,
// NEON on Arm, and loops elsewhere. Included inside namespace packedbert::cpu::scalar.
//
// Every vec_*.h has this interface, and the kernel bodies are written over it alone.

struct Vec {
  using Lanes = float __attribute__((vector_size(16)));
  using IntegerLanes = int32_t __attribute__((vector_size(16)));
  static constexpr int64_t kWidth = 4;
  Lanes value;

  static PACKEDBERT_INLINE Vec zero() { return broadcast(0.0f); }
  static PACKEDBERT_INLINE Vec broadcast(float x) { return {Lanes{x, x, x, x}}; }

  // Pointers need no alignment. The partial forms touch the first `count` floats only, 0 <= count < kWidth; a
  // partial load leaves zeros in the other lanes.
  static PACKEDBERT_INLINE Vec load(const float* from) {
    Vec a;
    __builtin_memcpy(&a.value, from, sizeof(a.value));
    return a;
  }
  static PACKEDBERT_INLINE Vec load_partial(const float* from, int64_t count) {
    float lanes[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
  }
  // Both ways: floats that are integers, as 32-bit integers.
  static PACKEDBERT_INLINE Vec load_integers(const int32_t* from) {
    IntegerLanes integers;
    __builtin_memcpy(&integers, from, sizeof(integers));
    return {__builtin_convertvector(integers, Lanes)};
  }
  PACKEDBERT_INLINE void store_integers(int32_t* to) const {
    const IntegerLanes integers = __builtin_convertvector(value, IntegerLanes);
    __builtin_memcpy(to, &integers, sizeof(integers));
  }
  PACKEDBERT_INLINE void store(float* to) const { __builtin_memcpy(to, &value, sizeof(value)); }
  PACKEDBERT_INLINE void store_partial(float* to, int64_t count) const {
    float lanes[kWidth];
    store(lanes);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
};

PACKEDBERT_INLINE Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
PACKEDBERT_INLINE Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
PACKEDBERT_INLINE Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
PACKEDBERT_INLINE Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }

// 1 / a, relative error 1.2e-7 at most, where a and 1 / a are normal numbers.
PACKEDBERT_INLINE Vec inverse(Vec a) { return Vec::broadcast(1.0f) / a; }

// a * b + c; rounded once where the instruction set has a fused form.
PACKEDBERT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.value * b.value + c.value}; }

// As the x86 instructions have it: where a or b is a NaN the result is b. So max(limit, x) keeps a NaN in x.
PACKEDBERT_INLINE Vec max(Vec a, Vec b) { return {a.value > b.value ? a.value : b.value}; }
PACKEDBERT_INLINE Vec min(Vec a, Vec b) { return {a.value < b.value ? a.value : b.value}; }
PACKEDBERT_INLINE Vec abs(Vec a) {
  const Vec::IntegerLanes all_but_sign = (Vec::IntegerLanes)a.value & 0x7fffffff;
  return {(Vec::Lanes)all_but_sign};
}

// To the nearest integer, for |a| < 2^22: adding 1.5 * 2^23 pushes the fraction out of the significand.
PACKEDBERT_INLINE Vec round(Vec a) {
  const Vec shift = Vec::broadcast(12582912.0f);
  return (a + shift) - shift;
}

// x 2^n for integers -126 <= n <= 127, which is put together as an exponent field.
PACKEDBERT_INLINE Vec times_exp2(Vec x, Vec n) {
  const Vec::IntegerLanes biased = __builtin_convertvector(n.value, Vec::IntegerLanes) + 127;
  return x * Vec{(Vec::Lanes)(biased << 23)};
}

// Whether a lane is a NaN.
PACKEDBERT_INLINE bool has_nan(Vec a) {
  bool found = false;
  for (int64_t i = 0; i < Vec::kWidth; ++i) found = found || a.value[i] != a.value[i];
  return found;
}
PACKEDBERT_INLINE float first_lane(Vec a) { return a.value[0]; }
PACKEDBERT_INLINE float sum_of_lanes(Vec a) { return (a.value[0] + a.value[1]) + (a.value[2] + a.value[3]); }

// The largest lane; where one is a NaN, any of them.
PACKEDBERT_INLINE float max_of_lanes(Vec a) {
  float top = a.value[0];
  for (int64_t i = 1; i < Vec::kWidth; ++i) top = a.value[i] > top ? a.value[i] : top;
  return top;
}

#include "cpu/vec_columns.h"
