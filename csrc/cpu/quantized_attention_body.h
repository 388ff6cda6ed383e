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

// put(i, integers) gets rows of x [kRows, size], with `stride` between them, each over its scale, rounded to
// -127..127: of each row Vec::kWidth of them at a time, of which those beyond size are 0. scale [kRows]:
// where a row has a NaN or an infinity, that is a NaN. Several rows at once overlap in what is a chain for
// one.
template <int kRows, typename Put>
PACKEDBERT_INLINE void quantize_symmetric(
    const float* x, int64_t stride, int64_t size, float* scale, const Put& put) {
  const auto load = [&](int row, int64_t i) PACKEDBERT_INLINE_LAMBDA {
    const float* from = x + row * stride + i;
    return i + Vec::kWidth <= size ? Vec::load(from) : Vec::load_partial(from, size - i);
  };
  Vec top[kRows];
  Vec damage[kRows];
  PACKEDBERT_UNROLL
  for (int row = 0; row < kRows; ++row) top[row] = damage[row] = Vec::zero();
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec value = load(row, i);
      top[row] = max(top[row], abs(value));
      damage[row] = fma(Vec::zero(), value, damage[row]);
    }
  }
  Vec factor[kRows];
  PACKEDBERT_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const bool sound = !has_nan(damage[row]);
    const float largest = max_of_lanes(top[row]) / 127.0f;
    const float of_row = largest > kMinScale ? largest : kMinScale;
    factor[row] = Vec::broadcast(sound ? 1.0f / of_row : 0.0f);
    scale[row] = sound ? of_row : __builtin_nanf("");
  }
  const Vec limit = Vec::broadcast(127.0f);
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    Vec integers[kRows];
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      // A NaN, of infinity times 0, becomes the limit: it is a number, and the scale is none.
      integers[row] = max(min(round(load(row, i) * factor[row]), limit), Vec::zero() - limit);
    }
    put(i, integers);
  }
}

// The keys and values of kTokens tokens, one or kGroup, whose slots are neighbours in one group.
//   keys_values: [kTokens, 2 * heads.width()] with `stride` between rows; slot: of the first.
template <int kTokens>
void place_quantized_group(const QuantizedKeysValues& to,
                           const Ragged& batch,
                           Heads heads,
                           const float* keys_values,
                           int64_t stride,
                           int64_t slot) {
  const int64_t groups = group_count(heads.size);
  for (int64_t head = 0; head < heads.count; ++head) {
    const int64_t at = head * batch.key_slots + slot;
    int8_t* key = to.keys + (at / kPanelWidth * groups * kPanelWidth + at % kPanelWidth) * kGroup;
    Vec sum[kTokens];
    PACKEDBERT_UNROLL
    for (int token = 0; token < kTokens; ++token) sum[token] = Vec::zero();
    const auto put_keys = [&](int64_t i, const Vec(&integers)[kTokens]) PACKEDBERT_INLINE_LAMBDA {
      PACKEDBERT_UNROLL
      for (int token = 0; token < kTokens; ++token) sum[token] = sum[token] + integers[token];
      store_byte_groups(integers, key + i * kPanelWidth, kPanelWidth * kGroup,
                        smaller(Vec::kWidth / kGroup, groups - i / kGroup));
    };
    quantize_symmetric<kTokens>(keys_values + head * heads.size, stride, heads.size, to.key_scale + at,
                                put_keys);
    PACKEDBERT_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      // Exact: 127 * 512 at most.
      to.key_sums[at + token] = static_cast<int32_t>(sum_of_lanes(sum[token]));
    }

    const auto put_values = [&](int64_t d, const Vec(&integers)[kTokens]) PACKEDBERT_INLINE_LAMBDA {
      const int64_t panel = head * panel_count(heads.size) + d / kPanelWidth;
      store_byte_columns(integers, to.values +
                                       (panel * batch.key_slots + slot / kGroup * kGroup) * kPanelWidth +
                                       d % kPanelWidth * kGroup + slot % kGroup);
    };
    quantize_symmetric<kTokens>(keys_values + heads.width() + head * heads.size, stride, heads.size,
                                to.value_scale + at, put_values);
  }
}

// The keys and values of tokens [begin, end): keys_values [end - begin, 2 * heads.width()] with `stride`
// between rows. kGroup at a time where they fill a group of slots; the next ones are fetched, because where
// threads share a step others have written half of them.
inline void place_quantized(const QuantizedKeysValues& to,
                            const Ragged& batch,
                            Heads heads,
                            const float* keys_values,
                            int64_t stride,
                            int64_t begin,
                            int64_t end) {
  int64_t fetched = begin;
  for (int64_t token = begin; token < end;) {
    const int64_t sequence = batch.sequence_of[token];
    const int64_t slot = batch.first_slot[sequence] + token - batch.first_token[sequence];
    const bool group = slot % kGroup == 0 && token + kGroup <= smaller(end, batch.first_token[sequence + 1]);
    const float* row = keys_values + (token - begin) * stride;
    token += group ? kGroup : 1;
    for (; fetched < smaller(end, token + kGroup); ++fetched)
      prefetch_row(keys_values + (fetched - begin) * stride, 2 * heads.width());
    if (group) {
      place_quantized_group<kGroup>(to, batch, heads, row, stride, slot);
    } else {
      place_quantized_group<1>(to, batch, heads, row, stride, slot);
    }
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
  alignas(64) float factors[kKeyBlock];
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

    // The largest value scale, or a NaN if one of them is; what the probability of each key is multiplied by.
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
    const Vec to_integers = Vec::broadcast(255.0f / largest);
    for (int64_t k = 0; k < keys; k += Vec::kWidth) (value_scale(k) * to_integers).store(factors + k);

    const QuantizedRows probabilities = QuantizedRows::in(scratch, kQueryRows, kKeyBlock);
    for (int64_t row = 0; row < rows; ++row) {
      probabilities.scale[row] = largest / 255.0f;
      probabilities.zero_point[row] = 0;
      const auto put = [&](int64_t k, Vec e) PACKEDBERT_INLINE_LAMBDA {
        Dot::store_inputs(e * Vec::load(factors + k), 0, probabilities.at(row, k));
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
