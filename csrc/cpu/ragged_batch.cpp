#include "cpu/ragged_batch.h"

#include <utility>

#include "packed_layout.h"

namespace packedbert::cpu {

RaggedBatch::RaggedBatch(std::vector<int64_t> first_token) : first_token_(std::move(first_token)) {
  const int64_t sequences = static_cast<int64_t>(first_token_.size()) - 1;
  first_slot_.reserve(first_token_.size());
  sequence_of_.reserve(first_token_.back());
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t length = first_token_[sequence + 1] - first_token_[sequence];
    first_slot_.push_back(key_slots_);
    key_slots_ += panel_count(length) * kPanelWidth;
    sequence_of_.insert(sequence_of_.end(), length, sequence);
  }
}

RaggedBatch RaggedBatch::from_mask(const bool* mask,
                                   int64_t batch,
                                   int64_t length,
                                   std::vector<int64_t>* rows) {
  rows->clear();
  rows->reserve(batch * length);
  std::vector<int64_t> first_token{0};
  first_token.reserve(batch + 1);
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    for (int64_t row = sequence * length; row < (sequence + 1) * length; ++row) {
      if (!mask || mask[row]) rows->push_back(row);
    }
    first_token.push_back(static_cast<int64_t>(rows->size()));
  }
  return RaggedBatch(std::move(first_token));
}

Ragged RaggedBatch::view() const {
  return {
      .tokens = first_token_.back(),
      .sequences = static_cast<int64_t>(first_token_.size()) - 1,
      .key_slots = key_slots_,
      .first_token = first_token_.data(),
      .first_slot = first_slot_.data(),
      .sequence_of = sequence_of_.data(),
  };
}

}  // namespace packedbert::cpu
