// Attention, over Vec. Included inside the namespace and the target region of one instruction set, after
// linear_body.h.
//
// A tile of at most kQueryRows queries of one head goes through all keys of its sequence: scores, softmax,
// product with the values. Sequences longer than kKeyBlock take several rounds, each of which corrects what
// the rounds before it left (Milakov and Gimelshein, arXiv 1805.02867).

// The keys of one round. BERT's longest sequence, 512, is one round; the scores of a tile, 29 KB for 14
// queries, fit the first-level cache.
constexpr int64_t kKeyBlock = 512;

// Rows of scores are 33 cache lines apart: with an odd number, they do not share sets of the cache.
constexpr int64_t kScoreStride = kKeyBlock + 16;

// The places of a layer's queries, keys and values; keys and values as attention.h says.
struct QueriesKeysValues {
  Ragged batch;
  Heads heads;
  float* queries;  // [tokens, heads.width()] with query_stride between rows
  int64_t query_stride;
  float* keys;
  float* values;
};

// to = from + bias, of [rows, columns]; bias [columns], or null for none.
inline void place_rows(const float* from,
                       int64_t from_stride,
                       int64_t rows,
                       int64_t columns,
                       const float* bias,
                       float* to,
                       int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    if (!bias) {
      copy(from, columns, to);
      continue;
    }
    int64_t i = 0;
    for (; i + Vec::kWidth <= columns; i += Vec::kWidth)
      (Vec::load(from + i) + Vec::load(bias + i)).store(to + i);
    for (; i < columns; ++i) to[i] = from[i] + bias[i];
  }
}

// So many tokens' keys are placed at once.
constexpr int kKeysAtOnce = 4;

// Column i of from + bias, [kTokens, columns], goes to `to` + i * kPanelWidth: the keys of one token, or of
// kKeysAtOnce whose slots are neighbours in one panel.
//   from_stride: between rows; bias [columns], or null for none.
template <int kTokens>
void place_keys(const float* from, int64_t from_stride, int64_t columns, const float* bias, float* to) {
  int64_t i = 0;
  if constexpr (kTokens == kKeysAtOnce) {
    for (; i + Vec::kWidth <= columns; i += Vec::kWidth) {
      const Vec of_columns = bias ? Vec::load(bias + i) : Vec::zero();
      Vec keys[kTokens];
      PACKEDBERT_UNROLL
      for (int t = 0; t < kTokens; ++t) keys[t] = Vec::load(from + t * from_stride + i) + of_columns;
      store_columns(keys, to + i * kPanelWidth, kPanelWidth);
    }
  }
  for (; i < columns; ++i) {
    for (int t = 0; t < kTokens; ++t)
      to[i * kPanelWidth + t] = from[t * from_stride + i] + (bias ? bias[i] : 0.0f);
  }
}

// Puts columns [column, column + columns) of the q, k and v of tokens [token, token + rows) in their places.
//   from [rows, columns] with from_stride between rows; bias [columns], to be added, or null.
inline void place_qkv(const QueriesKeysValues& to,
                      const float* from,
                      int64_t from_stride,
                      int64_t token,
                      int64_t rows,
                      int64_t column,
                      int64_t columns,
                      const float* bias) {
  const Ragged& batch = to.batch;
  const int64_t width = to.heads.width();
  const int64_t size = to.heads.size;
  while (columns > 0) {
    // A run of columns that lie in one place: all queries, or one head's keys, or one panel of its values.
    const int64_t part = column / width;
    const int64_t in_part = column % width;
    const int64_t head = in_part / size;
    const int64_t d = in_part % size;
    const int64_t in_panel = d % kPanelWidth;
    const int64_t rest = part == 0   ? width - in_part
                         : part == 1 ? size - d
                                     : smaller(size - d, kPanelWidth - in_panel);
    const int64_t run = smaller(columns, rest);
    if (part == 0) {
      float* query = to.queries + token * to.query_stride + in_part;
      place_rows(from, from_stride, rows, run, bias, query, to.query_stride);
    } else if (part == 1) {
      for (int64_t row = 0; row < rows;) {
        const int64_t sequence = batch.sequence_of[token + row];
        const int64_t slot = batch.first_slot[sequence] + token + row - batch.first_token[sequence];
        const int64_t neighbours = smaller(smaller(rows, batch.first_token[sequence + 1] - token) - row,
                                           kPanelWidth - slot % kPanelWidth);
        const int64_t panel = head * (batch.key_slots / kPanelWidth) + slot / kPanelWidth;
        float* key = to.keys + (panel * size + d) * kPanelWidth + slot % kPanelWidth;
        const float* x = from + row * from_stride;
        if (neighbours >= kKeysAtOnce) {
          place_keys<kKeysAtOnce>(x, from_stride, run, bias, key);
          row += kKeysAtOnce;
        } else {
          place_keys<1>(x, from_stride, run, bias, key);
          ++row;
        }
      }
    } else {
      const int64_t panel = head * panel_count(size) + d / kPanelWidth;
      float* value = to.values + (panel * batch.tokens + token) * kPanelWidth + in_panel;
      place_rows(from, from_stride, rows, run, bias, value, kPanelWidth);
    }
    if (bias) bias += run;
    from += run;
    column += run;
    columns -= run;
  }
}

// One round for one query: put(i, e) gets e^(scale (score - maximum)) of scores i to i + Vec::kWidth, for all
// scores [keys], where maximum and sum (of the exponentials) are over all rounds so far. Returns the factor
// that corrects what earlier rounds summed up. The row has room up to the next full Vec. A NaN among the
// scores makes the sum one.
template <typename Put>
PACKEDBERT_INLINE float exponentiate(
    float* scores, int64_t keys, float scale, bool first, float* maximum, float* sum, const Put& put) {
  int64_t end = keys;
  while (end % Vec::kWidth != 0) scores[end++] = -__builtin_inff();  // adds 1e-38 to a sum of 1 or more
  Vec top = Vec::load(scores);
  for (int64_t i = Vec::kWidth; i < end; i += Vec::kWidth) top = max(top, Vec::load(scores + i));
  const float to_base_2 = scale * kLog2E;
  float new_maximum = max_of_lanes(top);
  float correction = 0.0f;
  if (!first) {
    new_maximum = new_maximum > *maximum ? new_maximum : *maximum;
    correction = first_lane(exp2(Vec::broadcast(to_base_2 * (*maximum - new_maximum))));
  }
  // The maximum first: scale * maximum would be rounded, for large scores by more than e^x can take.
  const Vec factor = Vec::broadcast(to_base_2);
  const Vec most = Vec::broadcast(new_maximum);
  Vec total = Vec::zero();
  for (int64_t i = 0; i < end; i += Vec::kWidth) {
    const Vec e = exp2((Vec::load(scores + i) - most) * factor);
    put(i, e);
    total = total + e;
  }
  *maximum = new_maximum;
  *sum = (first ? 0.0f : *sum * correction) + sum_of_lanes(total);
  return correction;
}

// to = to * correction + from, with neither `to` nor correction read in the first round; then * factor.
//   from, to: [columns], columns <= kPanelWidth.
inline void accumulate_context(
    const float* from, int64_t columns, bool first, float correction, float factor, float* to) {
  const Vec scale = Vec::broadcast(factor);
  const Vec c = Vec::broadcast(correction);
  int64_t j = 0;
  for (; j + Vec::kWidth <= columns; j += Vec::kWidth) {
    const Vec x = Vec::load(from + j);
    ((first ? x : fma(Vec::load(to + j), c, x)) * scale).store(to + j);
  }
  if (const int64_t left = columns - j) {
    const Vec x = Vec::load(from + j);
    ((first ? x : fma(Vec::load_partial(to + j, left), c, x)) * scale).store_partial(to + j, left);
  }
}

// The context of `rows` queries, at most kQueryRows, of one head and one sequence.
//   queries, context: [rows, heads.size], of the first of them.
inline void attend_tile(const QueriesKeysValues& in,
                        int64_t head,
                        int64_t sequence,
                        const float* queries,
                        int64_t rows,
                        float* context,
                        int64_t context_stride,
                        ProductScope& scope) {
  alignas(64) float scores[kQueryRows * kScoreStride];
  alignas(64) float tile[kQueryRows * kPanelWidth];
  // First the queries are prepared there, then the probabilities.
  alignas(64) float scratch[larger(1, FloatRows::size(kQueryRows, kKeyBlock))];
  float maximum[kQueryRows];
  float sum[kQueryRows];
  float correction[kQueryRows];
  const Ragged& batch = in.batch;
  const int64_t size = in.heads.size;
  const int64_t first_token = batch.first_token[sequence];
  const int64_t length = batch.first_token[sequence + 1] - first_token;
  const int64_t first_slot = head * batch.key_slots + batch.first_slot[sequence];
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t key = 0; key < length; key += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, length - key);
    const bool first = key == 0;
    const bool last = key + keys == length;
    const FloatRows query_rows =
        FloatRows::in(queries, in.query_stride, size <= kKeyBlock ? scratch : nullptr, kQueryRows, size);
    for (int64_t row = 0; row < rows; ++row) query_rows.prepare(row, size);
    for (int64_t k = 0; k < keys; k += kPanelWidth) {
      const float* panel = in.keys + (first_slot + key + k) * size;
      const float* next = k + kPanelWidth < keys ? panel + kPanelWidth * size : nullptr;
      multiply_floats(query_rows, 0, rows, panel, next, smaller(kPanelWidth, keys - k), size, scores + k,
                      kScoreStride, no_prefetch(panel), scope, Nothing{});
    }
    const FloatRows probabilities = FloatRows::in(scores, kScoreStride, scratch, kQueryRows, keys);
    for (int64_t row = 0; row < rows; ++row) {
      float* score = scores + row * kScoreStride;
      correction[row] = exponentiate(score, keys, scale, first, &maximum[row], &sum[row],
                                     [&](int64_t i, Vec e) PACKEDBERT_INLINE_LAMBDA { e.store(score + i); });
      probabilities.prepare(row, keys);
    }
    for (int64_t panel = 0; panel < panel_count(size); ++panel) {
      const int64_t value = (head * panel_count(size) + panel) * batch.tokens + first_token + key;
      const float* values = in.values + value * kPanelWidth;
      const int64_t columns = smaller(kPanelWidth, size - panel * kPanelWidth);
      multiply_floats(probabilities, 0, rows, values, nullptr, columns, keys, tile, kPanelWidth,
                      no_prefetch(values), scope, Nothing{});
      for (int64_t row = 0; row < rows; ++row) {
        accumulate_context(tile + row * kPanelWidth, columns, first, correction[row],
                           last ? 1.0f / sum[row] : 1.0f,
                           context + row * context_stride + panel * kPanelWidth);
      }
    }
  }
}

// One tile of one head and one sequence: attend_tile or attend_quantized_tile.
using AttendTile = void (*)(const QueriesKeysValues& in,
                            int64_t head,
                            int64_t sequence,
                            const float* queries,
                            int64_t rows,
                            float* context,
                            int64_t context_stride,
                            ProductScope& scope);

// The context of one head for tokens [token, end), whatever sequences they belong to.
//   context: [end - token, heads.size] with context_stride between rows.
inline void attend_head(AttendTile attend,
                        const QueriesKeysValues& in,
                        int64_t head,
                        int64_t token,
                        int64_t end,
                        float* context,
                        int64_t context_stride,
                        ProductScope& scope) {
  while (token < end) {
    const int64_t sequence = in.batch.sequence_of[token];
    const int64_t queries = smaller(end, in.batch.first_token[sequence + 1]) - token;
    const int64_t tiles = ceil_div(queries, kQueryRows);
    const float* first = in.queries + token * in.query_stride + head * in.heads.size;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = queries * tile / tiles;
      const int64_t after = queries * (tile + 1) / tiles;
      // The next tile's queries: what was written a layer ago is in no near cache any more.
      for (int64_t row = after; row < smaller(end - token, after + kQueryRows); ++row)
        prefetch_row(first + row * in.query_stride, in.heads.size);
      attend(in, head, sequence, first + begin * in.query_stride, after - begin,
             context + begin * context_stride, context_stride, scope);
    }
    token += queries;
    context += queries * context_stride;
  }
}
