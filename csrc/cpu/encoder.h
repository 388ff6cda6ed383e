// All layers of a packed BERT encoder in one call, on the CPU: activations in float, and the inputs of a
// product in int8 where its matrix is.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/parallel.h"
#include "cpu/ragged_batch.h"
#include "epilogue.h"

namespace packedbert::cpu {

// The weights of one layer, reference.LayerWeights, the four matrices packed. Arrays are contiguous and need
// no alignment beyond a float's.
struct EncoderLayer {
  Heads heads;
  bool quantized_attention;            // its products in int8
  Matrix qkv_weight;                   // [3 * heads.width(), hidden_size]
  const float* qkv_bias;               // [3 * heads.width()]
  Matrix attention_output_weight;      // [hidden_size, heads.width()]
  const float* attention_output_bias;  // [hidden_size]
  const float* attention_norm_weight;  // [hidden_size]
  const float* attention_norm_bias;    // [hidden_size]
  Matrix up_weight;                    // [ffn_width, hidden_size]
  const float* up_bias;                // [ffn_width]
  Matrix down_weight;                  // [hidden_size, ffn_width]
  const float* down_bias;              // [hidden_size]
  const float* output_norm_weight;     // [hidden_size]
  const float* output_norm_bias;       // [hidden_size]
};

struct Encoder {
  Ragged batch;
  int64_t hidden_size;
  int64_t layer_count;
  const EncoderLayer* layers;
  Activation activation;
  Norm norm;
  float eps;
  const int64_t* rows;  // [batch.tokens]: the row of input and output that belongs to each token
  const float* input;   // [rows of the padded batch, hidden_size]
  float* output;        // the same, and may be it; rows that belong to no token are left alone
};

// A layer's steps, at most (run_layer in encoder_body.h).
inline constexpr int64_t kMostSteps = 9;

// How the work is cut, and what lies where in the scratch memory. Places are in floats from its beginning.
struct EncoderPlan {
  Isa isa;  // that it is for
  // Token panels, evenly sized: each is taken through a whole layer by one thread. 0: the tokens are too few,
  // each step of a layer is split among the threads instead.
  int64_t panels;
  int64_t threads;        // at most
  int64_t row_step;       // panels begin at a multiple
  int64_t hidden_stride;  // between rows; likewise below
  int64_t query_stride;
  int64_t inner_stride;
  int64_t hidden;      // [tokens, hidden_size]: the hidden states
  int64_t queries;     // [tokens, heads]
  int64_t keys[2];     // as attention.h says; layers take turns, because a thread may still read those of one
  int64_t values[2];   // layer while another thread writes those of the next
  int64_t inner;       // [workers, rows of a panel, context or FFN activations, whichever is wider]
  int64_t inner_size;  // of one worker
  int64_t inner_rows;  // of a panel, at most
  int64_t prepared;    // [workers, prepared_rows_size(rows of a panel)]: the inputs of one matrix
  int64_t prepared_size;  // of one worker
  int64_t steps;          // SharedStep [step_count], zero at first
  int64_t step_count;
  int64_t size;  // floats in all

  // Of a panel, of so many tokens; that of the panel after the last is their number.
  int64_t first_token(int64_t panel, int64_t tokens) const {
    const int64_t first = (tokens + row_step - 1) / row_step * panel / panels * row_step;
    return first < tokens ? first : tokens;
  }
};

// threads: how many the ParallelFor has at most, 1 or more. The plan depends on it, the result does not.
EncoderPlan plan_encoder(const Encoder& encoder, int64_t threads, Isa isa);

// Runs the body for plan.isa. The result has the same bits whatever the number of threads, and those of a
// sequence do not depend on the batch that it is in.
//   scratch: plan.size floats, best aligned to a cache line; need not be initialised.
void encoder(const Encoder& encoder, const EncoderPlan& plan, float* scratch, ParallelFor parallel_for);

PACKEDBERT_DECLARE_FOR_EACH_ISA(
    void encoder(const Encoder& encoder, const EncoderPlan& plan, float* scratch, ParallelFor parallel_for))

}  // namespace packedbert::cpu
