// softmax(q k^T / sqrt(head_size)) v within each sequence of a ragged batch, on the CPU, in float or int8.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/ragged_batch.h"
#include "packed_layout.h"

namespace packedbert::cpu {

// The heads that are left of a layer.
struct Heads {
  int64_t count;
  int64_t size;

  constexpr int64_t width() const { return count * size; }
};

// Keys and values as panels (packed_layout.h), so that q k^T and the product with v run on the microkernel of
// the linear layers. The keys of a sequence begin at a new panel, and key `slot` of a head is column
// slot % kPanelWidth of panel slot / kPanelWidth.
//   keys    [heads, key_slots / kPanelWidth, head_size, kPanelWidth]
//   values  [heads, panel_count(head_size), tokens, kPanelWidth]
// What no token fills is never initialised: it reaches only sums that nobody reads.
constexpr int64_t keys_size(const Ragged& batch, Heads heads) { return heads.width() * batch.key_slots; }
constexpr int64_t values_size(const Ragged& batch, Heads heads) {
  return heads.count * panel_count(heads.size) * batch.tokens * kPanelWidth;
}

// The same in int8, both together: see quantized_attention_body.h.
constexpr int64_t quantized_keys_values_size(const Ragged& batch, Heads heads) {
  const int64_t of_keys = heads.count * batch.key_slots * group_count(heads.size);
  const int64_t of_values = heads.count * batch.key_slots * panel_count(heads.size) * kPanelWidth / kGroup;
  return 3 * heads.count * batch.key_slots + of_keys + of_values;
}

// The widest head whose products may be in int8.
inline constexpr int64_t kMaxQuantizedHead = 512;

struct PrunedAttention {
  Ragged batch;
  Heads heads;
  bool quantized;    // products in int8
  const float* qkv;  // [tokens, 3 * heads.width()]
  float* keys;       // scratch, keys_size(batch, heads) floats; quantized_keys_values_size if quantized
  float* values;     // scratch, values_size(batch, heads) floats; null if quantized
  float* output;     // [tokens, heads.width()]
};

// Runs the body for active_isa(). The result has the same bits whatever the number of threads, and those of a
// sequence do not depend on the batch that it is in.
void pruned_attention(const PrunedAttention& attention, ParallelFor parallel_for);

PACKEDBERT_DECLARE_FOR_EACH_ISA(void pruned_attention(const PrunedAttention& attention,
                                                      ParallelFor parallel_for))

}  // namespace packedbert::cpu
