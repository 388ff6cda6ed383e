// The embeddings of tokens, over Vec. Included inside the namespace and the target region of one instruction
// set, after linear_body.h.

// to = a + b + c of one row [size].
inline void add_rows(const float* a, const float* b, const float* c, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth)
    (Vec::load(a + i) + Vec::load(b + i) + Vec::load(c + i)).store(to + i);
  for (; i < size; ++i) to[i] = a[i] + b[i] + c[i];
}

// Tokens [begin, end).
void embed_tokens(const void* context, int64_t begin, int64_t end) {
  const Embeddings& e = *static_cast<const Embeddings*>(context);
  const int64_t size = e.hidden_size;
  for (int64_t token = begin; token < end; ++token) {
    if (token + 1 < end) {
      // A word's row is anywhere in 90 MB.
      prefetch_row(e.words + e.word_ids[token + 1] * size, size);
    }
    float* x = e.output + token * size;
    add_rows(e.words + e.word_ids[token] * size, e.types + (e.type_ids ? e.type_ids[token] * size : 0),
             e.positions + token % e.length * size, size, x);
    normalize_row(e.norm, x, size, e.norm_weight, e.norm_bias, e.eps, x);
  }
}

void embed(const Embeddings& embeddings, ParallelFor parallel_for) {
  if (embeddings.tokens == 0 || embeddings.hidden_size == 0) return;
  parallel_for(embeddings.tokens, ceil_div(kNormElementsPerThread, embeddings.hidden_size), embed_tokens,
               &embeddings);
}
