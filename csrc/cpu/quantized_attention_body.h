// Attention with int8 products, over Vec and Dot; the softmax is in float. Included inside the namespace and
// the target region of one instruction set, after attention_body.h.
//
// Queries are quantized as the inputs of a linear layer are, keys as its weights: each key of a head is a
// column with a scale of its own. Values have a scale for each key too, which goes into the probabilities:
// these become integers 0 to 255, of 255 value_scale / (the largest value_scale) times e^(score - maximum),
// so that the product with the values needs one factor a row.

// Keys and values in int8, in scratch memory: quantized_keys_values_size(batch, heads) floats.
struct QuantizedKeysValues {
  float* key_scale;    // [heads, key_slots]
  int32_t* key_sums;   // the same
  float* value_scale;  // the same
  int8_t* keys;        // [heads, key_slots / kPanelWidth, group_count(size), kPanelWidth, kGroup]
  int8_t* values;      // [heads, panel_count(size), key_slots / kGroup, kPanelWidth, kGroup]

  static QuantizedKeysValues at(float* scratch, const Ragged& batch, Heads heads) {
    const int64_t slots = heads.count * batch.key_slots;
    int8_t* keys = reinterpret_cast<int8_t*>(scratch + 3 * slots);
    return {scratch, reinterpret_cast<int32_t*>(scratch + slots), scratch + 2 * slots, keys,
            keys + slots * group_count(heads.size) * kGroup};
  }
};

// put(i, integers) gets x [size] / scale, rounded to -127..127, Vec::kWidth of them at a time, of which those
// beyond size are 0; returns the scale. Where x has a NaN or an infinity, that is a NaN.
template <typename Put>
PACKEDBERT_INLINE float quantize_symmetric(const float* x, int64_t size, const Put& put) {
  const auto load = [&](int64_t i) PACKEDBERT_INLINE_LAMBDA {
    return i + Vec::kWidth <= size ? Vec::load(x + i) : Vec::load_partial(x + i, size - i);
  };
  Vec top = Vec::zero();
  Vec damage = Vec::zero();
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    top = max(top, abs(load(i)));
    damage = fma(Vec::zero(), load(i), damage);
  }
  const bool sound = !has_nan(damage);
  const float largest = max_of_lanes(top) / 127.0f;
  const float scale = largest > kMinScale ? largest : kMinScale;
  const Vec factor = Vec::broadcast(sound ? 1.0f / scale : 0.0f);
  const Vec limit = Vec::broadcast(127.0f);
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    // A NaN, of infinity times 0, becomes the limit: it is a number, and the scale is none.
    put(i, max(min(round(load(i) * factor), limit), Vec::zero() - limit));
  }
  return sound ? scale : __builtin_nanf("");
}

// The keys and values of one token: keys_values [2 * heads.width()].
inline void place_quantized(const QuantizedKeysValues& to,
                            const Ragged& batch,
                            Heads heads,
                            const float* keys_values,
                            int64_t token) {
  const int64_t sequence = batch.sequence_of[token];
  const int64_t slot = batch.first_slot[sequence] + token - batch.first_token[sequence];
  const int64_t groups = group_count(heads.size);
  for (int64_t head = 0; head < heads.count; ++head) {
    const int64_t at = head * batch.key_slots + slot;
    int8_t* key = to.keys + (at / kPanelWidth * groups * kPanelWidth + at % kPanelWidth) * kGroup;
    Vec sum = Vec::zero();
    to.key_scale[at] = quantize_symmetric(
        keys_values + head * heads.size, heads.size, [&](int64_t i, Vec integers) PACKEDBERT_INLINE_LAMBDA {
          sum = sum + integers;
          alignas(64) int8_t bytes[Vec::kWidth];
          store_bytes(integers, bytes);
          const int64_t end = smaller(Vec::kWidth, groups * kGroup - i);
          for (int64_t j = 0; j < end; j += kGroup)
            __builtin_memcpy(key + (i + j) * kPanelWidth, bytes + j, kGroup);
        });
    to.key_sums[at] = static_cast<int32_t>(sum_of_lanes(sum));  // exact: 127 * 512 at most

    const float* values = keys_values + heads.width() + head * heads.size;
    to.value_scale[at] =
        quantize_symmetric(values, heads.size, [&](int64_t d, Vec integers) PACKEDBERT_INLINE_LAMBDA {
          const int64_t panel = head * panel_count(heads.size) + d / kPanelWidth;
          int8_t* value = to.values + (panel * batch.key_slots + slot / kGroup * kGroup) * kPanelWidth +
                          d % kPanelWidth * kGroup + slot % kGroup;
          store_every_fourth_byte(integers, value, smaller(Vec::kWidth, heads.size - d));
        });
  }
}

// attend_tile in int8.
inline void attend_quantized_tile(const QueriesKeysValues& in,
                                  int64_t head,
                                  int64_t sequence,
                                  const float* queries,
                                  int64_t rows,
                                  float* context,
                                  int64_t context_stride,
                                  ProductScope& /*scope*/) {
  static_assert(kMaxQuantizedHead <= kKeyBlock);
  alignas(64) static constexpr float ones[kPanelWidth] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                          1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  alignas(64) static constexpr int32_t no_sums[kPanelWidth] = {};
  alignas(64) float scores[kQueryRows * kScoreStride];
  alignas(64) float tile[kQueryRows * kPanelWidth];
  alignas(64) float scratch[quantized_rows_size(kQueryRows, kKeyBlock)];
  float maximum[kQueryRows];
  float sum[kQueryRows];
  float correction[kQueryRows];
  const Ragged& batch = in.batch;
  const int64_t size = in.heads.size;
  const int64_t groups = group_count(size);
  const int64_t length = batch.first_token[sequence + 1] - batch.first_token[sequence];
  const int64_t first_slot = head * batch.key_slots + batch.first_slot[sequence];
  const QuantizedKeysValues kv = QuantizedKeysValues::at(in.keys, batch, in.heads);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t key = 0; key < length; key += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, length - key);
    const bool first = key == 0;
    const bool last = key + keys == length;
    const int64_t slot = first_slot + key;

    const QuantizedRows quantized_queries = QuantizedRows::in(scratch, kQueryRows, size);
    for (int64_t row = 0; row < rows; ++row)
      quantize_row(queries + row * in.query_stride, nullptr, size, quantized_queries, row);
    for (int64_t k = 0; k < keys; k += kPanelWidth) {
      const QuantizedPanel panel{kv.keys + (slot + k) * groups * kGroup, kv.key_scale + slot + k,
                                 kv.key_sums + slot + k, groups};
      multiply_quantized_panel(quantized_queries, 0, rows, panel, smaller(kPanelWidth, keys - k), scores + k,
                               kScoreStride, no_prefetch(queries));
    }

    // The largest value scale, or a NaN if one of them is.
    const auto value_scale = [&](int64_t k) PACKEDBERT_INLINE_LAMBDA {
      const float* from = kv.value_scale + slot + k;
      return keys - k < Vec::kWidth ? Vec::load_partial(from, keys - k) : Vec::load(from);
    };
    Vec top = Vec::zero();
    Vec damage = Vec::zero();
    for (int64_t k = 0; k < keys; k += Vec::kWidth) {
      top = max(top, value_scale(k));
      damage = fma(Vec::zero(), value_scale(k), damage);
    }
    const float largest = max_of_lanes(top) + sum_of_lanes(damage);
    const QuantizedRows probabilities = QuantizedRows::in(scratch, kQueryRows, kKeyBlock);
    const Vec factor = Vec::broadcast(255.0f / largest);
    for (int64_t row = 0; row < rows; ++row) {
      probabilities.scale[row] = largest / 255.0f;
      probabilities.zero_point[row] = 0;
      const auto put = [&](int64_t k, Vec e) PACKEDBERT_INLINE_LAMBDA {
        Dot::store_inputs(e * (value_scale(k) * factor), 0, probabilities.at(row, k));
      };
      correction[row] =
          exponentiate(scores + row * kScoreStride, keys, scale, first, &maximum[row], &sum[row], put);
    }
    for (int64_t panel = 0; panel < panel_count(size); ++panel) {
      const int64_t columns = smaller(kPanelWidth, size - panel * kPanelWidth);
      const int64_t value =
          (head * panel_count(size) + panel) * batch.key_slots + slot - head * batch.key_slots;
      multiply_quantized_panel(probabilities, 0, rows,
                               {kv.values + value * kPanelWidth, ones, no_sums, group_count(keys)}, columns,
                               tile, kPanelWidth, no_prefetch(queries));
      for (int64_t row = 0; row < rows; ++row) {
        accumulate_context(tile + row * kPanelWidth, columns, first, correction[row],
                           last ? 1.0f / sum[row] : 1.0f,
                           context + row * context_stride + panel * kPanelWidth);
      }
    }
  }
}
