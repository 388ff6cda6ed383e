// A ragged batch: the real tokens of all its sequences, one after the other.
#pragma once

#include <cstdint>
#include <vector>

namespace packedbert::cpu {

// What the kernels see of a RaggedBatch. A sequence may be empty.
struct Ragged {
  int64_t tokens;
  int64_t sequences;
  int64_t key_slots;           // a multiple of kPanelWidth
  const int64_t* first_token;  // [sequences + 1], ascending from 0 to tokens
  const int64_t* first_slot;   // [sequences], multiples of kPanelWidth: of the sequence's first key
  const int64_t* sequence_of;  // [tokens]
};

class RaggedBatch {
 public:
  // first_token: [sequences + 1], ascending from 0 to the number of tokens.
  explicit RaggedBatch(std::vector<int64_t> first_token);

  // Of a mask [batch, length]: a token where it is true, each row a sequence. `rows` becomes the tokens'
  // positions in the padded batch. A null mask has all tokens.
  static RaggedBatch from_mask(const bool* mask, int64_t batch, int64_t length, std::vector<int64_t>* rows);

  Ragged view() const;

 private:
  int64_t key_slots_ = 0;
  std::vector<int64_t> first_token_;
  std::vector<int64_t> first_slot_;
  std::vector<int64_t> sequence_of_;
};

}  // namespace packedbert::cpu
