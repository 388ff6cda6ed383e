// Dot in plain C++. Included inside namespace packedbert::cpu::scalar, after vec_scalar.h.
//
// Dot is the inner product of quantized inputs and weights for kColumns neighbouring outputs, kGroup inputs
// at a time, in exact 32-bit integers. Every dot_*.h has this interface.

struct Dot {
  // Inputs are stored as the instructions want them: as integers about 0, or shifted by the zero point to
  // 0..255.
  using Input = int16_t;
  static constexpr int64_t kColumns = 4;

  struct Inputs {
    const Input* values;
  };
  struct Weights {
    const int8_t* values;
  };
  int32_t sum[kColumns];

  // An empty sum; column_sums [kColumns] of the weights.
  static PACKEDBERT_INLINE Dot start(int32_t /*zero_point*/, const int32_t* /*column_sums*/) { return {}; }
  static PACKEDBERT_INLINE Inputs broadcast(const Input* group) { return {group}; }
  static PACKEDBERT_INLINE Weights load(const int8_t* from) { return {from}; }
  PACKEDBERT_INLINE void add(Inputs inputs, Weights weights) {
    for (int64_t column = 0; column < kColumns; ++column) {
      for (int64_t i = 0; i < kGroup; ++i)
        sum[column] += int32_t{inputs.values[i]} * weights.values[column * kGroup + i];
    }
  }
  // to [2 * kColumns]: the sums of a, then of b.
  static PACKEDBERT_INLINE void store(const Dot& a, const Dot& b, int32_t* to) {
    for (int64_t column = 0; column < kColumns; ++column) {
      to[column] = a.sum[column];
      to[kColumns + column] = b.sum[column];
    }
  }
  // to [Vec::kWidth]: x rounded to the nearest integers, halves to even, at most 255 - zero_point. x has to
  // round to -zero_point or more, or be a NaN, of which any such integer is made.
  static PACKEDBERT_INLINE void store_inputs(Vec x, int32_t zero_point, Input* to) {
    const Vec integers = min(round(x), Vec::broadcast(static_cast<float>(255 - zero_point)));
    for (int64_t i = 0; i < Vec::kWidth; ++i) to[i] = static_cast<Input>(integers.value[i]);
  }
};
