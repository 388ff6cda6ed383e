// The encoder, over Vec. Included inside the namespace and the target region of one instruction set, after
// attention_body.h.
//
// A layer is a list of steps, each of them units of work on a range of tokens. With many tokens a thread
// takes one panel of them through all steps, up to the queries, keys and values of the next layer, while they
// lie in its second-level cache: then only the end of a layer has to be waited for (attention needs the keys
// of all tokens). With few tokens all threads share each step. Both are run_layer; they differ in its
// ParallelFor.

// A range of tokens in one layer: the context of every step.
struct LayerRun {
  const Encoder* encoder;
  const EncoderPlan* plan;
  float* scratch;
  int64_t layer;  // -1: before the first
  int64_t first;  // token
  int64_t tokens;
  int64_t attention_chunks;
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
  for (int64_t token = begin; token < end; ++token)
    place_quantized(to, next.batch, next.heads, run.inner + token * run.plan->inner_stride,
                    run.first + token);
}

void attend(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const AttendTile tile = run.weights().quantized_attention ? attend_quantized_tile : attend_tile;
  attend_units(tile, run.qkv_of(run.layer), run.first, run.tokens, run.attention_chunks, begin, end,
               run.inner, run.plan->inner_stride);
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

// The inputs [begin, end) of project_context and project_down, where they are prepared.
void prepare_context(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const Inputs inputs = run.from_inner(run.weights().attention_output_weight);
  for (int64_t token = begin; token < end; ++token) inputs.prepare(token);
}

void prepare_ffn(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const Inputs inputs = run.from_inner(run.weights().down_weight);
  for (int64_t token = begin; token < end; ++token) inputs.prepare(token);
}

void project_context(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  project_back(run, w.attention_output_weight, w.attention_output_bias, w.up_weight.data, begin, end);
}

void normalize_attention(const void* context, int64_t begin, int64_t end) {
  const LayerRun& run = run_of(context);
  const EncoderLayer& w = run.weights();
  for (int64_t token = begin; token < end; ++token) {
    float* x = run.hidden() + token * run.plan->hidden_stride;
    normalize_row(run.encoder->norm, x, run.encoder->hidden_size, w.attention_norm_weight,
                  w.attention_norm_bias, run.encoder->eps, x);
    run.from_hidden(w.up_weight).prepare(token);
  }
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
  for (int64_t token = begin; token < end; ++token) {
    float* x = run.hidden() + token * run.plan->hidden_stride;
    float* to = run.is_last() ? run.encoder->output + run.encoder->rows[run.first + token] * size : x;
    normalize_row(run.encoder->norm, x, size, w.output_norm_weight, w.output_norm_bias, run.encoder->eps, to);
    if (!run.is_last()) run.from_hidden(run.next_weights().qkv_weight).prepare(token);
  }
}

// A ParallelFor without threads.
void run_here(int64_t count, int64_t, RangeTask task, const void* context) { task(context, 0, count); }

// The steps of one layer for a range of tokens; for layer -1 what comes before the first.
void run_layer(const LayerRun& run, ParallelFor parallel_for) {
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
    const int64_t attention_units = w.heads.count * run.attention_chunks;
    if (w.heads.size > 0 && attention_units > 0) parallel_for(attention_units, 1, attend, &run);
    if (run.from_inner(w.attention_output_weight).are_prepared()) for_tokens(prepare_context);
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

// One layer in panels.
struct PanelRun {
  LayerRun all;  // the tokens of all panels
  int64_t* next_panel;
};

// The work of one thread, worker `begin`: panel after panel, until none is left. How many there are for it
// depends on how fast the threads are, and on how many really run: one alone does everything.
void run_panels(const void* context, int64_t begin, int64_t) {
  const PanelRun& panels = *static_cast<const PanelRun*>(context);
  LayerRun run = panels.all;
  const int64_t count = run.plan->panels;
  run.inner += begin * run.plan->inner_size;
  run.prepared += begin * run.plan->prepared_size;
  run.attention_chunks = 1;
  for (;;) {
    const int64_t panel = __atomic_fetch_add(panels.next_panel, 1, __ATOMIC_RELAXED);
    if (panel >= count) return;
    run.first = run.plan->first_token(panel, panels.all.tokens);
    run.tokens = run.plan->first_token(panel + 1, panels.all.tokens) - run.first;
    run_layer(run, run_here);
  }
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
  LayerRun run{
      .encoder = &encoder,
      .plan = &plan,
      .scratch = scratch,
      .layer = -1,
      .first = 0,
      .tokens = tokens,
      .attention_chunks = attention_chunks(tokens),
      .inner = scratch + plan.inner,
      .prepared = scratch + plan.prepared,
  };
  for (; run.layer < encoder.layer_count; ++run.layer) {
    if (plan.panels == 0) {
      run_layer(run, parallel_for);
    } else {
      int64_t next_panel = 0;
      const PanelRun panels{run, &next_panel};
      parallel_for(plan.workers, 1, run_panels, &panels);
    }
  }
}
