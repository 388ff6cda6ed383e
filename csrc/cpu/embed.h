// The embeddings of tokens on the CPU: norm(word + token type + position).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "epilogue.h"

namespace packedbert::cpu {

// Every array is row-major and contiguous, and needs no alignment beyond a float's; tables have rows of
// hidden_size, and every id is one of their rows.
struct Embeddings {
  int64_t tokens;
  int64_t length;  // of a sequence: token i is at position i % length
  int64_t hidden_size;
  const int64_t* word_ids;  // [tokens]
  const int64_t* type_ids;  // [tokens], or null: all are 0
  const float* words;
  const float* types;
  const float* positions;
  Norm norm;
  const float* norm_weight;  // [hidden_size]
  const float* norm_bias;    // [hidden_size]
  float eps;
  float* output;  // [tokens, hidden_size], overlaps nothing
};

// Runs the body for active_isa(). The result has the same bits whatever the number of threads.
void embed(const Embeddings& embeddings, ParallelFor parallel_for);

PACKEDBERT_DECLARE_FOR_EACH_ISA(void embed(const Embeddings& embeddings, ParallelFor parallel_for))

}  // namespace packedbert::cpu
