// A padded batch and its mask as a list of real tokens, without the host knowing how many they are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/queue.h"

namespace packedbert::cuda {

// Everything is on the device.
struct RaggedBatch {
  Dtype dtype;
  int64_t sequences;
  int64_t length;
  int64_t hidden_size;
  const bool* mask;     // [sequences, length], true for real tokens; null: all are
  const void* padded;   // [sequences, length, hidden_size]
  int32_t* cu_seqlens;  // [sequences + 1], written: where each sequence's tokens begin
  // Written unless null: the real tokens, and where in the padded batch each of them stands.
  void* tokens;  // [tokens, hidden_size]
  int64_t tokens_pitch;
  int32_t* positions;  // [tokens]
  // Written unless null: 0 in the place of each padded token, nothing in the others'.
  void* output;  // [sequences, length, hidden_size]
};

// Queues the work, and returns the error of the launches, if any.
cudaError_t gather_tokens(const RaggedBatch& batch, const Queue& queue);

}  // namespace packedbert::cuda
