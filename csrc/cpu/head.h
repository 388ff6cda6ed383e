// The output layer of a model that has a few numbers to say of each token, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace packedbert::cpu {

// output[i][row] = states[row] . weight[i] + bias[i]. Arrays are row-major and contiguous, and need no
// alignment beyond a float's.
struct Head {
  int64_t tokens;
  const int64_t* rows;  // [tokens]: the row of states and outputs that belongs to each token
  int64_t hidden_size;
  int64_t outputs;
  const float* states;   // [rows of the padded batch, hidden_size]
  const float* weight;   // [outputs, hidden_size]
  const float* bias;     // [outputs]
  float* const* output;  // [outputs], each [rows of the padded batch]; others' rows are left alone
};

// Runs the body for active_isa(). The result has the same bits whatever the number of threads.
void head(const Head& head, ParallelFor parallel_for);

PACKEDBERT_DECLARE_FOR_EACH_ISA(void head(const Head& head, ParallelFor parallel_for))

}  // namespace packedbert::cpu
