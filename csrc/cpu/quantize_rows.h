// Quantization of inputs, over Vec and Dot. Included inside the namespace and the target region of one
// instruction set, after its QuantizedRows (products_*.h).
//
// A row x of inputs becomes integers q, 0 <= q <= 255, a scale and a zero point, with x ~ (q - zero_point) *
// scale: asymmetric, since what GELU puts out is. Products and their sums are exact, so every instruction set
// has the same; so are the integers themselves, each of whose roundings is one IEEE 754 operation.

// The smallest scale: 255 over it is finite, and it over 255 is not subnormal, as int8 attention wants it.
constexpr float kMinScale = 0x1p-118f;

// Row `row` of `to` = x [size], times input_scale [size] if that is not null. Where x has a NaN or an
// infinity, the scale is a NaN, and with it everything that is computed from the row.
inline void quantize_row(
    const float* x, const float* input_scale, int64_t size, const QuantizedRows& to, int64_t row) {
  const auto load = [&](int64_t i) PACKEDBERT_INLINE_LAMBDA {
    const bool whole = i + Vec::kWidth <= size;
    const Vec value = whole ? Vec::load(x + i) : Vec::load_partial(x + i, size - i);
    if (!input_scale) return value;
    return value * (whole ? Vec::load(input_scale + i) : Vec::load_partial(input_scale + i, size - i));
  };
  // Two of each: their chains overlap.
  Vec low[2] = {Vec::zero(), Vec::zero()};
  Vec high[2] = {Vec::zero(), Vec::zero()};
  Vec broken[2] = {Vec::zero(), Vec::zero()};  // 0 * x is a NaN for what is not finite
  const auto see = [&](int64_t i, int chain) PACKEDBERT_INLINE_LAMBDA {
    const Vec value = load(i);
    low[chain] = min(low[chain], value);
    high[chain] = max(high[chain], value);
    broken[chain] = fma(Vec::zero(), value, broken[chain]);
  };
  int64_t at = 0;
  for (; at + 2 * Vec::kWidth <= size; at += 2 * Vec::kWidth) see(at, 0), see(at + Vec::kWidth, 1);
  for (; at < size; at += Vec::kWidth) see(at, 0);
  if (has_nan(broken[0] + broken[1])) {
    for (int64_t i = 0; i < size; i += Vec::kWidth) Dot::store_inputs(Vec::zero(), 0, to.at(row, i));
    to.scale[row] = __builtin_nanf("");
    to.zero_point[row] = 0;
    return;
  }
  const float lowest = -max_of_lanes(Vec::zero() - min(low[0], low[1]));
  const float range = (max_of_lanes(max(high[0], high[1])) - lowest) / 255.0f;
  const float scale = range > kMinScale ? range : kMinScale;
  const float inverse = 1.0f / scale;
  // The zero point is rounded as the inputs are.
  const int32_t zero_point = static_cast<int32_t>(first_lane(round(Vec::broadcast(-lowest * inverse))));
  const Vec factor = Vec::broadcast(inverse);
  for (int64_t i = 0; i < size; i += Vec::kWidth)
    Dot::store_inputs(load(i) * factor, zero_point, to.at(row, i));
  to.scale[row] = scale;
  to.zero_point[row] = zero_point;
}
