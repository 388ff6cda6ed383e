// An output layer of few outputs, over Vec. Included inside the namespace and the target region of one
// instruction set, after linear_body.h. With two outputs and a row of inputs that is in the cache nothing is
// gained by prepacked panels.

// The sum of x[i] y[i] over [size]; four sums at a time, as in row_mean.
inline float dot_product(const float* x, const float* y, int64_t size) {
  Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= size; i += 4 * Vec::kWidth) {
    PACKEDBERT_UNROLL
    for (int j = 0; j < 4; ++j)
      sum[j] = fma(Vec::load(x + i + j * Vec::kWidth), Vec::load(y + i + j * Vec::kWidth), sum[j]);
  }
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) sum[0] = fma(Vec::load(x + i), Vec::load(y + i), sum[0]);
  if (const int64_t left = size - i)
    sum[1] = fma(Vec::load_partial(x + i, left), Vec::load_partial(y + i, left), sum[1]);
  return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Tokens [begin, end).
void head_tokens(const void* context, int64_t begin, int64_t end) {
  const Head& h = *static_cast<const Head*>(context);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = h.rows[token];
    for (int64_t i = 0; i < h.outputs; ++i) {
      h.output[i][row] =
          dot_product(h.states + row * h.hidden_size, h.weight + i * h.hidden_size, h.hidden_size) +
          h.bias[i];
    }
  }
}

void head(const Head& head, ParallelFor parallel_for) {
  if (head.tokens == 0 || head.outputs == 0) return;
  const int64_t multiplications = larger(1, head.hidden_size * head.outputs);
  parallel_for(head.tokens, ceil_div(kMultiplicationsPerThread, multiplications), head_tokens, &head);
}
