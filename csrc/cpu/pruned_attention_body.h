// pruned_attention, over Vec and Dot. Included inside the namespace and the target region of one instruction
// set, after quantized_attention_body.h.

// The work is cut into units: each a head and a chunk of the tokens, the chunks of a head side by side. Their
// queries share the head's keys and values in the second-level cache.
constexpr int64_t kQueriesPerUnit = 4 * kQueryRows;

constexpr int64_t attention_chunks(int64_t tokens) { return ceil_div(tokens, kQueriesPerUnit); }

// pruned_attention's queries stay where they are.
inline QueriesKeysValues places_of(const PrunedAttention& a) {
  return {a.batch, a.heads, const_cast<float*>(a.qkv), 3 * a.heads.width(), a.keys, a.values};
}

// The keys and values of tokens [begin, end).
void place_pruned_attention(const void* context, int64_t begin, int64_t end) {
  const PrunedAttention& a = *static_cast<const PrunedAttention*>(context);
  const int64_t width = a.heads.width();
  if (a.quantized) {
    const QuantizedKeysValues to = QuantizedKeysValues::at(a.keys, a.batch, a.heads);
    place_quantized(to, a.batch, a.heads, a.qkv + begin * 3 * width + width, 3 * width, begin, end);
    return;
  }
  place_qkv(places_of(a), a.qkv + begin * 3 * width + width, 3 * width, begin, end - begin, width, 2 * width,
            nullptr);
}

void attend_pruned_attention(const void* context, int64_t begin, int64_t end) {
  const PrunedAttention& a = *static_cast<const PrunedAttention*>(context);
  const int64_t tokens = a.batch.tokens;
  const int64_t chunks = attention_chunks(tokens);
  ProductScope scope;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / chunks;
    const int64_t from = tokens * (unit % chunks) / chunks;
    const int64_t to = tokens * (unit % chunks + 1) / chunks;
    attend_head(a.quantized ? attend_quantized_tile : attend_tile, places_of(a), head, from, to,
                a.output + from * a.heads.width() + head * a.heads.size, a.heads.width(), scope);
  }
}

void pruned_attention(const PrunedAttention& attention, ParallelFor parallel_for) {
  const int64_t tokens = attention.batch.tokens;
  if (tokens == 0 || attention.heads.width() == 0) return;
  parallel_for(tokens, ceil_div(kNormElementsPerThread, 2 * attention.heads.width()), place_pruned_attention,
               &attention);
  parallel_for(attention.heads.count * attention_chunks(tokens), 1, attend_pruned_attention, &attention);
}
