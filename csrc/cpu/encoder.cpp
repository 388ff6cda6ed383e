// What of the encoder does not depend on the instruction set: how the work is cut, and the choice of the
// body.
#include "cpu/encoder.h"

#include <algorithm>

#include "cpu/embed.h"
#include "cpu/head.h"
#include "cpu/isa.h"

namespace packedbert::cpu {
namespace {

// How tokens are cut.
struct PanelRules {
  // A token panel's hidden states and inner activations take at most so many bytes, or it has at most so many
  // tokens, whichever is more. They go through all steps of a layer together, and each tile of them meets one
  // panel of weights after the other (96 KiB at BERT-base's width, a quarter of that in int8).
  int64_t most_bytes;
  int64_t most_tokens;
  int64_t fewest_tokens;  // in a panel; with fewer, each step is split among the threads instead
  int64_t halved_tokens;  // a panel is halved, for balance, if its halves have as many
  int64_t row_step;       // panels begin at a multiple
  int64_t wide_step;      // the same, where they have halved_tokens each
};

// most_bytes: about the second-level cache of processors with AVX-512. Where that is 2 MiB, 640 KiB was 1 to
// 2 percent slower, because smaller panels read all weights, which lie further away, more often; where it is
// 1 MiB, 256 to 512 KiB took as long.
// fewest_tokens: less does not repay that each thread reads all weights, where with split steps each reads
// its share of them. On two cores panels of 16 took 0.9 of the time of splitting (their threads read the same
// weights at about the same time, and wait once a layer, not six times), panels of 8 took 1.25.
// halved_tokens: two tiles of AVX-512.
constexpr PanelRules kVectorPanels = {
    .most_bytes = 1024 * 1024,
    .most_tokens = 12,
    .fewest_tokens = 12,
    .halved_tokens = 28,
    .row_step = 1,
    .wide_step = 1,
};

// Where any matrix is in int8. Its weights are a quarter, and keys and values want room in that cache too: of
// 1 MiB, panels of 192 to 384 KiB took 0.97 of the time at (8, 384), and no more elsewhere. Wide tokens still
// come in four tiles of AVX-512, because many cores may share what the weights lie in.
constexpr PanelRules kQuantizedVectorPanels = {
    .most_bytes = 384 * 1024,
    .most_tokens = 56,
    .fewest_tokens = 12,
    .halved_tokens = 28,
    .row_step = 1,
    .wide_step = 1,
};

// AMX multiplies so fast that reading weights is what counts: at 24 tokens a thread both took as long, at 28
// panels took 0.9 of the time of splitting. Halving panels of fewer tokens costs more than it balances. Half
// a strip takes more than half its time, but where panels have few strips their balance counts more.
constexpr PanelRules kTilePanels = {
    .most_bytes = 1024 * 1024,
    .most_tokens = 26,
    .fewest_tokens = 26,
    .halved_tokens = 128,
    .row_step = kStripRows / 2,
    .wide_step = kStripRows,
};

// Rows begin at a cache line, and never a multiple of 4 KiB apart: see kCollidingStride in multiply_tile.h.
constexpr int64_t row_stride(int64_t width) {
  const int64_t stride = whole_lines(width);
  return stride % 1024 == 0 ? stride + kLine : stride;
}

}  // namespace

EncoderPlan plan_encoder(const Encoder& encoder, int64_t threads, Isa isa) {
  const Ragged& batch = encoder.batch;
  int64_t query_width = 0;
  int64_t inner_width = 0;
  int64_t keys = 0;
  int64_t values = 0;
  bool quantized = false;
  bool floats = false;
  for (int64_t i = 0; i < encoder.layer_count; ++i) {
    const EncoderLayer& layer = encoder.layers[i];
    query_width = std::max(query_width, layer.heads.width());
    inner_width = std::max({inner_width, layer.heads.width(), layer.up_weight.out_features});
    for (const Matrix* matrix :
         {&layer.qkv_weight, &layer.attention_output_weight, &layer.up_weight, &layer.down_weight})
      (matrix->quantized ? quantized : floats) = true;
    if (layer.quantized_attention) {
      keys = std::max(keys, quantized_keys_values_size(batch, layer.heads));
      inner_width = std::max(inner_width, 2 * layer.heads.width());  // keys and values on their way
    } else {
      keys = std::max(keys, keys_size(batch, layer.heads));
      values = std::max(values, values_size(batch, layer.heads));
    }
  }

  EncoderPlan plan{};
  plan.isa = isa;
  plan.threads = threads;
  plan.hidden_stride = row_stride(encoder.hidden_size);
  plan.query_stride = row_stride(query_width);
  plan.inner_stride = row_stride(inner_width);

  const PanelRules rules = isa == Isa::avx512_amx ? kTilePanels
                           : quantized            ? kQuantizedVectorPanels
                                                  : kVectorPanels;
  int64_t inner_rows = batch.tokens;
  const int64_t tokens_per_thread = (batch.tokens + threads - 1) / threads;
  if (threads == 1 || tokens_per_thread >= rules.fewest_tokens) {
    const int64_t token_bytes = sizeof(float) * (plan.hidden_stride + plan.inner_stride);
    const int64_t most = std::max(rules.most_tokens, rules.most_bytes / token_bytes);
    // As many for each thread, and none much smaller than the others.
    int64_t of_worker = (tokens_per_thread + most - 1) / most;
    // One panel each would leave nothing to share out when something else takes a core: two cost 1 percent,
    // and save 2 to 7 beside one busy process.
    if (of_worker == 1 && tokens_per_thread >= 2 * rules.halved_tokens) of_worker = 2;
    plan.panels = threads * of_worker;
    plan.row_step = batch.tokens >= plan.panels * rules.halved_tokens ? rules.wide_step : rules.row_step;
    for (int64_t panel = 0; panel < plan.panels; ++panel)
      inner_rows = std::max(panel == 0 ? 0 : inner_rows, plan.first_token(panel + 1, batch.tokens) -
                                                             plan.first_token(panel, batch.tokens));
  }
  const int64_t at_once = plan.panels > 0 ? threads : 1;

  const auto place = [&plan](int64_t size) {
    const int64_t at = plan.size;
    plan.size += whole_lines(size);
    return at;
  };
  plan.hidden = place(batch.tokens * plan.hidden_stride);
  plan.queries = place(batch.tokens * plan.query_stride);
  for (int64_t turn = 0; turn < 2; ++turn) {
    plan.keys[turn] = place(keys);
    plan.values[turn] = place(values);
  }
  plan.inner_size = inner_rows * plan.inner_stride;
  plan.inner = place(at_once * plan.inner_size);
  plan.inner_rows = inner_rows;
  const int64_t widest = std::max(encoder.hidden_size, inner_width);
  const auto prepared = [&](bool of_quantized) {
    return whole_lines(prepared_rows_size(isa, of_quantized, inner_rows, widest));
  };
  plan.prepared_size = std::max(quantized ? prepared(true) : 0, floats ? prepared(false) : 0);
  plan.prepared = place(at_once * plan.prepared_size);
  plan.step_count = (encoder.layer_count + 1) * kMostSteps;
  plan.steps = place(plan.step_count * static_cast<int64_t>(sizeof(SharedStep) / sizeof(float)));
  return plan;
}

void encoder(const Encoder& encoder, const EncoderPlan& plan, float* scratch, ParallelFor parallel_for) {
  PACKEDBERT_CALL_FOR_ISA(plan.isa, encoder, encoder, plan, scratch, parallel_for);
}

void embed(const Embeddings& embeddings, ParallelFor parallel_for) {
  PACKEDBERT_CALL_FOR_ISA(active_isa(), embed, embeddings, parallel_for);
}

void head(const Head& head, ParallelFor parallel_for) {
  PACKEDBERT_CALL_FOR_ISA(active_isa(), head, head, parallel_for);
}

void pruned_attention(const PrunedAttention& attention, ParallelFor parallel_for) {
  PACKEDBERT_CALL_FOR_ISA(active_isa(), pruned_attention, attention, parallel_for);
}

}  // namespace packedbert::cpu
