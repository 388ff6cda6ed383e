// The encoder, over Vec. Included inside the namespace and the target region of one instruction set, after
// attention_body.h.
//
// A layer is a list of steps, each of them units of work on a range of tokens. With many tokens a thread
// takes one panel of them through all steps, up to the queries, keys and values of the next layer, while they
// lie in its second-level cache: then only the end of a layer has to be waited for (attention needs the keys
// of all tokens). With few tokens all threads share each step. Both are run_layer; they differ in its
// ParallelFor. Threads are asked for once, and meet at SharedSteps.

// A range of tokens in one layer: the context of every step.
struct LayerRun {
  const Encoder* encoder;
  const EncoderPlan* plan;
  float* scratch;
  int64_t layer;  // -1: before the first
  int64_t first;  // token
  int64_t tokens;
  float* inner;     // scratch of the range: [tokens, plan->inner_stride]
  float* prepared;  // scratch of the range: of its Inputs

  const EncoderLayer& weights() const { return encoder->layers[layer]; }
  const EncoderLayer& next_weights() const { return encoder->layers[layer + 1]; }
  bool is_last() const { return layer + 1 == encoder->layer_count; }
  float* hidden() const { return scratch + plan->hidden + first * plan->hidden_stride; }

  // Of any layer, and of all tokens.
  QueriesKeysValues qkv_of(int64_t of_layer) const {
    const int64_t turn = of_layer & 1;
    return {encoder->batch,     encoder->layers[of_layer].heads, scratch + plan->queries,
            plan->query_stride, scratch + plan->keys[turn],      scratch + plan->values[turn]};
  }

  Units units(const Matrix& weight) const { return Units(tokens, weight); }
  // Of the range: the hidden states, or what lies in `inner`.
  Inputs from_hidden(const Matrix& weight) const {
    return {hidden(), plan->hidden_stride, prepared, plan->inner_rows, weight};
  }
  Inputs from_inner(const Matrix& weight) const {
    return {inner, plan->inner_stride, prepared, plan->inner_rows, weight};
  }
};

// Calls work(token, row) for the rows [begin, end) of `size` floats, and brings the next one to the
// first-level cache: where threads share a step, others have written half of it.
template <typename Work>
PACKEDBERT_INLINE void for_rows(
    float* rows, int64_t stride, int64_t size, int64_t begin, int64_t end, const Work& work) {
  for (int64_t token = begin; token < end; ++token) {
    float* row = rows + token * stride;
    if (token + 1 < end) prefetch_row(row + stride, size);
    work(token, row);
  }
}

inline const LayerRun& run_of(const void* context) { return *static_cast<const LayerRun*>(context); }

// Tokens [begin, end) of the range, from the padded batch.
void gather_tokens(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const int64_t size = run.encoder->hidden_size;
  for (int64_t token = begin; token < end; ++token) {
    float* x = run.hidden() + token * run.plan->hidden_stride;
    copy(run.encoder->input + run.encoder->rows[run.first + token] * size, size, x);
    run.from_hidden(run.next_weights().qkv_weight).prepare(token);
  }
}

// What multiply_units does with a tile of q, k and v.
struct QkvFinish {
  QueriesKeysValues to;
  const float* bias;
  int64_t first;  // token

  // Fetching its places ahead gained nothing.
  PACKEDBERT_INLINE void prepare(int64_t, int64_t, int64_t) const {}

  PACKEDBERT_INLINE void operator()(const float* sums, int64_t row, int64_t rows, int64_t column) const {
    const int64_t columns = smaller(kPanelWidth, 3 * to.heads.width() - column);
    place_qkv(to, sums, kPanelWidth, first + row, rows, column, columns, bias + column);
  }
};

// The same where attention is quantized: keys and values are, when a token has all of them. Until then they
// lie in the scratch of the range.
struct QuantizedQkvFinish {
  float* queries;
  int64_t query_stride;
  float* keys_values;  // [tokens, 2 * width]
  int64_t stride;
  int64_t width;
  const float* bias;

  PACKEDBERT_INLINE void prepare(int64_t, int64_t, int64_t) const {}

  PACKEDBERT_INLINE void operator()(const float* sums, int64_t row, int64_t rows, int64_t column) const {
    const int64_t end = smaller(column + kPanelWidth, 3 * width);
    const int64_t of_queries = larger(0, smaller(end, width) - column);
    if (of_queries > 0) {
      place_rows(sums, kPanelWidth, rows, of_queries, bias + column, queries + row * query_stride + column,
                 query_stride);
    }
    const int64_t rest = column + of_queries;
    if (rest < end) {
      place_rows(sums + of_queries, kPanelWidth, rows, end - rest, bias + rest,
                 keys_values + row * stride + rest - width, stride);
    }
  }
};

void project_qkv(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.next_weights();
  if (w.quantized_attention) {
    const QuantizedQkvFinish finish{
        run.scratch + run.plan->queries + run.first * run.plan->query_stride,
        run.plan->query_stride,
        run.inner,
        run.plan->inner_stride,
        w.heads.width(),
        w.qkv_bias,
    };
    multiply_units(run.units(w.qkv_weight), run.from_hidden(w.qkv_weight), w.attention_output_weight.data,
                   begin, end, finish);
    return;
  }
  const QkvFinish finish{run.qkv_of(run.layer + 1), w.qkv_bias, run.first};
  multiply_units(run.units(w.qkv_weight), run.from_hidden(w.qkv_weight), w.attention_output_weight.data,
                 begin, end, finish);
}

// The keys and values of tokens [begin, end), from where QuantizedQkvFinish put them.
void quantize_keys_values(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const QueriesKeysValues next = run.qkv_of(run.layer + 1);
  const QuantizedKeysValues to = QuantizedKeysValues::at(next.keys, next.batch, next.heads);
  place_quantized(to, next.batch, next.heads, run.inner + begin * run.plan->inner_stride,
                  run.plan->inner_stride, run.first + begin, run.first + end);
}

// The context of tokens [begin, end), all heads, ready for project_context.
void attend(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  const AttendTile tile = w.quantized_attention ? attend_quantized_tile : attend_tile;
  const int64_t stride = run.plan->inner_stride;
  if (w.heads.size > 0) {
    ProductScope scope;
    for (int64_t head = 0; head < w.heads.count; ++head) {
      attend_head(tile, run.qkv_of(run.layer), head, run.first + begin, run.first + end,
                  run.inner + begin * stride + head * w.heads.size, stride, scope);
    }
  }
  const Inputs inputs = run.from_inner(w.attention_output_weight);
  if (!inputs.are_prepared()) return;
  for (int64_t token = begin; token < end; ++token) inputs.prepare(token);
}

// hidden += inner weight^T + bias: both linear layers that end in a residual.
PACKEDBERT_INLINE void project_back(const LayerRun& run,
                                    const Matrix& weight,
                                    const float* bias,
                                    const void* next,
                                    int64_t begin,
                                    int64_t end) {
  const LinearFinish finish{
      finish_tile<Activation::none>, run.encoder->hidden_size, bias, run.hidden(), run.hidden(),
      run.plan->hidden_stride};
  multiply_units(run.units(weight), run.from_inner(weight), next, begin, end, finish);
}

// The inputs [begin, end) of project_down, where they are prepared.
void prepare_ffn(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const Inputs inputs = run.from_inner(run.weights().down_weight);
  for_rows(run.inner, run.plan->inner_stride, inputs.weight.in_features, begin, end,
           [&](int64_t token, const float*) PACKEDBERT_INLINE_LAMBDA { inputs.prepare(token); });
}

void project_context(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  project_back(run, w.attention_output_weight, w.attention_output_bias, w.up_weight.data, begin, end);
}

void normalize_attention(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  const int64_t size = run.encoder->hidden_size;
  for_rows(run.hidden(), run.plan->hidden_stride, size, begin, end,
           [&](int64_t token, float* x) PACKEDBERT_INLINE_LAMBDA {
             normalize_row(run.encoder->norm, x, size, w.attention_norm_weight, w.attention_norm_bias,
                           run.encoder->eps, x);
             run.from_hidden(w.up_weight).prepare(token);
           });
}

void project_up(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  const LinearFinish finish{finish_tile_for(run.encoder->activation),
                            w.up_weight.out_features,
                            w.up_bias,
                            nullptr,
                            run.inner,
                            run.plan->inner_stride};
  multiply_units(run.units(w.up_weight), run.from_hidden(w.up_weight), w.down_weight.data, begin, end,
                 finish);
}

void project_down(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  const void* next = run.is_last() ? nullptr : run.next_weights().qkv_weight.data;
  project_back(run, w.down_weight, w.down_bias, next, begin, end);
}

// After the last layer the rows go to where they belong in the padded batch.
void normalize_output(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  const int64_t size = run.encoder->hidden_size;
  for_rows(run.hidden(), run.plan->hidden_stride, size, begin, end,
           [&](int64_t token, float* x) PACKEDBERT_INLINE_LAMBDA {
             float* to =
                 run.is_last() ? run.encoder->output + run.encoder->rows[run.first + token] * size : x;
             normalize_row(run.encoder->norm, x, size, w.output_norm_weight, w.output_norm_bias,
                           run.encoder->eps, to);
             if (!run.is_last()) run.from_hidden(run.next_weights().qkv_weight).prepare(token);
           });
}

// A ParallelFor without threads.
void run_here(int64_t count, int64_t, RangeTask task, const void* context) { task(context, 0, count); }

// A ParallelFor that shares the items with whoever else calls it for the same steps, in the same order.
struct SharedSteps {
  SharedStep* next;
  int64_t worker;
  int64_t workers;
  int64_t shares_of_worker;  // about

  void operator()(int64_t count, int64_t /*grain*/, RangeTask task, const void* context) {
    SharedStep& step = *next++;
    if (count == 0) return;
    const int64_t share = ceil_div(count, smaller(kMostShares, workers * shares_of_worker));
    const int64_t shares = ceil_div(count, share);
    const int64_t first = worker * shares / workers;
    for (int64_t i; (i = take_share(step, shares, first)) >= 0;) {
      const int64_t begin = i * share;
      const int64_t end = smaller(count, begin + share);
      task(context, begin, end);
      __atomic_fetch_add(&step.done, end - begin, __ATOMIC_RELEASE);
    }
    wait_for(step, count);
  }
};

// The steps of one layer for a range of tokens; for layer -1 what comes before the first.
template <typename Parallel>
void run_layer(const LayerRun& run, Parallel&& parallel_for) {
  const auto for_tokens = [&](RangeTask task) {
    parallel_for(run.tokens, ceil_div(kNormElementsPerThread, run.encoder->hidden_size), task, &run);
  };
  const auto multiply = [&](const Matrix& weight, RangeTask task) {
    const Units units = run.units(weight);
    if (units.count() > 0) parallel_for(units.count(), units.grain(), task, &run);
  };
  if (run.layer < 0) {
    for_tokens(gather_tokens);
  } else {
    const EncoderLayer& w = run.weights();
    for_tokens(attend);
    multiply(w.attention_output_weight, project_context);
    for_tokens(normalize_attention);
    multiply(w.up_weight, project_up);
    if (run.from_inner(w.down_weight).are_prepared()) for_tokens(prepare_ffn);
    multiply(w.down_weight, project_down);
    for_tokens(normalize_output);
  }
  if (!run.is_last()) {
    multiply(run.next_weights().qkv_weight, project_qkv);
    if (run.next_weights().quantized_attention) for_tokens(quantize_keys_values);
  }
}

// What the threads of one call have in common.
struct SharedRun {
  LayerRun all;  // of all tokens
  SharedStep* steps;
  int64_t workers;
};

// Panels [begin, end) of one layer, whose run of all tokens context points to.
void run_panels(const void* context, int64_t begin, int64_t end) {
  const LayerRun& all = run_of(context);
  for (int64_t panel = begin; panel < end; ++panel) {
    LayerRun run = all;
    run.first = all.plan->first_token(panel, all.tokens);
    run.tokens = all.plan->first_token(panel + 1, all.tokens) - run.first;
    run_layer(run, run_here);
  }
}

// The work of one thread, worker `begin`, through all layers.
void run_worker(const void* context, int64_t begin, int64_t) {
  const SharedRun& shared = *static_cast<const SharedRun*>(context);
  LayerRun run = shared.all;
  const EncoderPlan& plan = *run.plan;
  if (plan.panels > 0) {
    run.inner += begin * plan.inner_size;
    run.prepared += begin * plan.prepared_size;
  }
  // A panel at a time (up to kMostShares): how many a worker takes depends on how fast the threads are.
  SharedSteps steps{shared.steps, begin, shared.workers, larger(1, plan.panels / shared.workers)};
  for (; run.layer < run.encoder->layer_count; ++run.layer) {
    if (plan.panels > 0) {
      steps(plan.panels, 1, run_panels, &run);
    } else if (shared.workers > 1) {
      run_layer(run, steps);
    } else {
      run_layer(run, run_here);
    }
  }
}

// How many threads have something to do where they share each step.
inline int64_t useful_workers(const LayerRun& run, int64_t threads) {
  int64_t useful = 1;
  for (int64_t i = 0; i < run.encoder->layer_count; ++i) {
    const EncoderLayer& w = run.encoder->layers[i];
    const Matrix* matrices[] = {&w.qkv_weight, &w.attention_output_weight, &w.up_weight, &w.down_weight};
    for (const Matrix* matrix : matrices) {
      const Units units = run.units(*matrix);
      useful = larger(useful, ceil_div(units.count(), units.grain()));
    }
  }
  return smaller(useful, threads);
}

void encoder(const Encoder& encoder, const EncoderPlan& plan, float* scratch, ParallelFor parallel_for) {
  if (encoder.batch.tokens == 0 || encoder.hidden_size == 0) return;
  if (encoder.layer_count == 0) {
    for (int64_t token = 0; token < encoder.batch.tokens; ++token) {
      const int64_t at = encoder.rows[token] * encoder.hidden_size;
      copy(encoder.input + at, encoder.hidden_size, encoder.output + at);
    }
    return;
  }
  const int64_t tokens = encoder.batch.tokens;
  SharedRun shared{
      .all =
          {
              .encoder = &encoder,
              .plan = &plan,
              .scratch = scratch,
              .layer = -1,
              .first = 0,
              .tokens = tokens,
              .inner = scratch + plan.inner,
              .prepared = scratch + plan.prepared,
          },
      .steps = reinterpret_cast<SharedStep*>(scratch + plan.steps),
      .workers = plan.threads,
  };
  if (plan.panels == 0) shared.workers = useful_workers(shared.all, plan.threads);
  for (int64_t step = 0; step < plan.step_count; ++step) shared.steps[step] = {};
  parallel_for(shared.workers, 1, run_worker, &shared);
}
