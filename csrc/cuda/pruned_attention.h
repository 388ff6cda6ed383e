// softmax(q k^T / sqrt(head_size)) v within each sequence of a ragged batch, over the heads that are left.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/queue.h"

namespace packedbert::cuda {

inline constexpr int64_t kMaxHeadSize = 128;

// Every matrix is row-major; a pitch is the distance of its rows, in elements. A size may be 0.
struct PrunedAttention {
  Dtype dtype;
  int64_t tokens;  // the most there can be: those that are there, the device knows
  int64_t sequences;
  int64_t heads;
  int64_t head_size;          // at most kMaxHeadSize
  const int32_t* cu_seqlens;  // on the device, [sequences + 1], ascending from 0
  const void* qkv;            // [tokens, 3 * heads * head_size]
  int64_t qkv_pitch;
  void* output;  // [tokens, heads * head_size]
  int64_t output_pitch;
};

// Queues the work, and returns the error of the launch, if any.
cudaError_t pruned_attention(const PrunedAttention& attention, const Queue& queue);

}  // namespace packedbert::cuda
