// A block of threads computes a tile of queries of one head of one sequence. It walks along the sequence's
// keys in tiles, and keeps for each query the largest score so far, the sum of the exponentials relative to
// it, and the sum of values weighted by them (online softmax: Milakov and Gimelshein, arXiv 1805.02867; in
// tiles: Dao et al., FlashAttention, arXiv 2205.14135). No score is ever written to memory.
#include "cuda/pruned_attention.h"

#include "cuda/elements.cuh"
#include "epilogue.h"

namespace packedbert::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kChunkElements16 = 8;  // 16 bytes

struct AttentionArguments {
  const void* qkv;
  void* output;
  const int32_t* cu_seqlens;
  int64_t qkv_pitch;
  int64_t output_pitch;
  int sequences;
  int heads;
  int head_size;
  float scale;   // of the scores, for powers of 2
  bool aligned;  // each head's part of each row, to 16 bytes
};

// Which queries a block computes.
struct QueryTile {
  int begin;  // of the sequence, among all tokens
  int length;
  int first_query;  // within the sequence; beyond its end: there is nothing to do
};

// The `tile`-th tile of kQueries queries in the whole batch. Every warp looks it up by itself.
template <int kQueries>
__device__ __forceinline__ QueryTile find_tile(const AttentionArguments& a, int tile) {
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < a.sequences; first += kWarp) {
    const int sequence = first + lane;
    const int begin = sequence < a.sequences ? a.cu_seqlens[sequence] : 0;
    const int length = sequence < a.sequences ? a.cu_seqlens[sequence + 1] - begin : 0;
    int end = (length + kQueries - 1) / kQueries;  // tiles of these sequences up to this one
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned beyond = __ballot_sync(kAllLanes, tile < end);
    if (beyond) {
      const int found = __ffs(beyond) - 1;
      const int tiles_before = found ? __shfl_sync(kAllLanes, end, found - 1) : 0;
      return {__shfl_sync(kAllLanes, begin, found), __shfl_sync(kAllLanes, length, found),
              (tile - tiles_before) * kQueries};
    }
    tile -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return {0, 0, 0};
}

// ---------------------------------------------------------------- half precision, on tensor cores

constexpr int kQueries = 64;  // 16 a warp
constexpr int kKeys = 64;

// kHead: the head size, padded with zeros. kAny: the head size is another one, at most kHead.
template <typename T, int kHead, bool kAny>
struct HalfAttention {
  static constexpr int kRowBytes = kHead * 2;
  static constexpr int kRowChunks = kHead / kChunkElements16;
  static constexpr int kTileBytes = kKeys * kRowBytes;  // of queries, of keys, and of values
  static constexpr int kStages = 2;                     // keys and values being read, and the next
  static constexpr int kSharedBytes = (1 + 2 * kStages) * kTileBytes;
  static_assert(kQueries == kKeys);
  // At least so many blocks a multiprocessor. Without a number ptxas aims higher, and spills on sm_120.
  static constexpr int kBlocks = kHead > 64 ? 2 : 3;

  // Where a chunk lies in a tile, in bytes: so that eight rows' chunks of one column are in different banks.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int place = kRowChunks >= 8 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
    return row * kRowBytes + place * 16;
  }

  // Starts copying rows of the head to a tile in shared memory; rows from `rows` on become 0.
  static __device__ __forceinline__ void copy_tile(const AttentionArguments& a,
                                                   const T* source,
                                                   int rows,
                                                   unsigned char* tile) {
    constexpr int copies = kKeys * kRowChunks / kAttentionThreads;
    const int chunk = threadIdx.x % kRowChunks;
    const int first_row = threadIdx.x / kRowChunks;
    constexpr int rows_of_copy = kAttentionThreads / kRowChunks;
    const T* from = source + first_row * a.qkv_pitch + chunk * kChunkElements16;
    if (!kAny || a.aligned) {
      const bool in_head = !kAny || chunk * kChunkElements16 < a.head_size;
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        const int row = first_row + i * rows_of_copy;
        copy_async(shared_address(tile + offset(row, chunk)), from, in_head && row < rows ? 16 : 0);
        from += rows_of_copy * a.qkv_pitch;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < copies; ++i) {
        const int row = first_row + i * rows_of_copy;
        T* to = reinterpret_cast<T*>(tile + offset(row, chunk));
#pragma unroll
        for (int e = 0; e < kChunkElements16; ++e) {
          const bool exists = row < rows && chunk * kChunkElements16 + e < a.head_size;
          if (exists) {
            to[e] = from[e];
          } else {
            round_to(0.0f, to[e]);
          }
        }
        from += rows_of_copy * a.qkv_pitch;
      }
    }
  }
};

// Two probabilities as a fragment of mma.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  T pair[2];
  round_to(low, pair[0]);
  round_to(high, pair[1]);
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

template <typename T, int kHead, bool kAny>
__global__ void __launch_bounds__(kAttentionThreads, HalfAttention<T, kHead, kAny>::kBlocks)
    half_attention_kernel(const AttentionArguments a) {
  using Shape = HalfAttention<T, kHead, kAny>;
  let_next_kernel_begin();
  wait_for_kernel_before();
  const QueryTile tile = find_tile<kQueries>(a, blockIdx.x);
  if (tile.length == 0) return;

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int head_size = kAny ? a.head_size : kHead;
  const int width = a.heads * head_size;
  const T* queries = static_cast<const T*>(a.qkv) + tile.begin * a.qkv_pitch + blockIdx.y * head_size;
  const T* keys = queries + width;
  const T* values = keys + width;
  unsigned char* shared_queries = dynamic_shared_memory();
  unsigned char* shared_keys = shared_queries + Shape::kTileBytes;
  unsigned char* shared_values = shared_keys + Shape::kStages * Shape::kTileBytes;

  const auto copy_keys_and_values = [&](int first_key, int stage) {
    if (first_key < tile.length) {
      const int rows = tile.length - first_key;
      Shape::copy_tile(a, keys + first_key * a.qkv_pitch, rows, shared_keys + stage * Shape::kTileBytes);
      Shape::copy_tile(a, values + first_key * a.qkv_pitch, rows, shared_values + stage * Shape::kTileBytes);
    }
    commit_copies();  // an empty group too: the waits count groups
  };
  Shape::copy_tile(a, queries + tile.first_query * a.qkv_pitch, tile.length - tile.first_query,
                   shared_queries);
  copy_keys_and_values(0, 0);
  copy_keys_and_values(kKeys, 1);
  wait_for_copies<1>();
  __syncthreads();

  // The warp's 16 queries.
  uint32_t query[kHead / 16][4];
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    const int chunk = 2 * k + lane / 16;
    load_matrices(query[k], shared_address(shared_queries + Shape::offset(warp * 16 + lane % 16, chunk)));
  }

  // Of the thread's two queries, lane / 4 and 8 more.
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // over the thread's own keys
  float context[kHead / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int first_key = 0; first_key < tile.length; first_key += kKeys) {
    if (first_key > 0) {
      wait_for_copies<1>();
      __syncthreads();
    }
    // ---- Scores: [16 queries, 64 keys].
    const unsigned char* key_tile = shared_keys + stage * Shape::kTileBytes;
    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHead / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t key[4];
        const int row = j * 16 + lane % 8 + lane / 16 * 8;
        load_matrices(key, shared_address(key_tile + Shape::offset(row, 2 * k + lane / 8 % 2)));
        multiply_add<T>(scores[2 * j], query[k], key[0], key[1]);
        multiply_add<T>(scores[2 * j + 1], query[k], key[2], key[3]);
      }
    }
    const int keys_left = tile.length - first_key;
    if (keys_left < kKeys) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (j * 8 + lane % 4 * 2 + i % 2 >= keys_left) scores[j][i] = -INFINITY;
        }
      }
    }

    // ---- Their exponentials, relative to the largest score so far.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        tile_largest = fmaxf(tile_largest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      }
      const float before = largest[half];
      largest[half] = fmaxf(before, max_over<4>(tile_largest));
      const float rescale = exp2_fast((before - largest[half]) * a.scale);
      sum[half] *= rescale;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          // Not score * scale - largest * scale in one: that product is rounded, for large scores by more
          // than an exponent can take.
          scores[j][i] = exp2_fast((scores[j][i] - largest[half]) * a.scale);
          sum[half] += scores[j][i];
        }
      }
#pragma unroll
      for (int j = 0; j < kHead / 8; ++j) {
        context[j][2 * half] *= rescale;
        context[j][2 * half + 1] *= rescale;
      }
    }

    // ---- Values, weighted by them. What mma puts out is laid out as it takes it in.
    const unsigned char* value_tile = shared_values + stage * Shape::kTileBytes;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &scores[2 * k + i / 2][i % 2 * 2];
        weights[i] = pack_pair<T>(pair[0], pair[1]);
      }
#pragma unroll
      for (int j = 0; j < kHead / 16; ++j) {
        uint32_t value[4];
        load_matrices_transposed(
            value, shared_address(value_tile + Shape::offset(k * 16 + lane % 16, 2 * j + lane / 16)));
        multiply_add<T>(context[2 * j], weights, value[0], value[1]);
        multiply_add<T>(context[2 * j + 1], weights, value[2], value[3]);
      }
    }
    __syncthreads();  // everyone is done with this stage
    copy_keys_and_values(first_key + Shape::kStages * kKeys, stage);
    stage = 1 - stage;
  }

  // ---- By way of the warp's own rows of shared memory, so that what is stored is contiguous.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = 1.0f / sum_over<4>(sum[half]);
#pragma unroll
    for (int j = 0; j < kHead / 8; ++j) {
      const uint32_t pair = pack_pair<T>(context[j][2 * half] * scale, context[j][2 * half + 1] * scale);
      unsigned char* to = shared_queries + Shape::offset(warp * 16 + half * 8 + lane / 4, j);
      *reinterpret_cast<uint32_t*>(to + lane % 4 * 4) = pair;
    }
  }
  __syncwarp();
  T* output =
      static_cast<T*>(a.output) + (tile.begin + tile.first_query) * a.output_pitch + blockIdx.y * head_size;
#pragma unroll
  for (int i = lane; i < 16 * Shape::kRowChunks; i += kWarp) {
    const int row = warp * 16 + i / Shape::kRowChunks;
    const int chunk = i % Shape::kRowChunks;
    const int count = head_size - chunk * kChunkElements16;
    if (tile.first_query + row >= tile.length || count <= 0) continue;
    const T* from = reinterpret_cast<const T*>(shared_queries + Shape::offset(row, chunk));
    T* to = output + row * a.output_pitch + chunk * kChunkElements16;
    if (!kAny || a.aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < min(count, kChunkElements16); ++e) to[e] = from[e];
    }
  }
}

// ---------------------------------------------------------------- float32

constexpr int kFloatLanes = 4;  // threads that share a query: each has every fourth dimension
constexpr int kFloatQueries = kAttentionThreads / kFloatLanes;
constexpr int kFloatKeys = 32;

// kHead: the largest head size.
template <int kHead>
__global__ void __launch_bounds__(kAttentionThreads) float_attention_kernel(const AttentionArguments a) {
  let_next_kernel_begin();
  wait_for_kernel_before();
  const QueryTile tile = find_tile<kFloatQueries>(a, blockIdx.x);
  if (tile.length == 0) return;

  constexpr int own = kHead / kFloatLanes;
  const int head_size = a.head_size;
  const int width = a.heads * head_size;
  const int part = threadIdx.x % kFloatLanes;
  const int query_row = tile.first_query + threadIdx.x / kFloatLanes;
  const float* queries = static_cast<const float*>(a.qkv) + tile.begin * a.qkv_pitch + blockIdx.y * head_size;
  float* shared_keys = reinterpret_cast<float*>(dynamic_shared_memory());
  float* shared_values = shared_keys + kFloatKeys * kHead;

  float query[own];
  float context[own];
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const int d = i * kFloatLanes + part;
    query[i] = query_row < tile.length && d < head_size ? queries[query_row * a.qkv_pitch + d] : 0.0f;
    context[i] = 0.0f;
  }
  float largest = -INFINITY;
  float sum = 0.0f;
#pragma unroll 1
  for (int first_key = 0; first_key < tile.length; first_key += kFloatKeys) {
    __syncthreads();  // everyone is done with the keys and values before
    for (int i = threadIdx.x; i < kFloatKeys * kHead; i += kAttentionThreads) {
      const int key = first_key + i / kHead;
      const int d = i % kHead;
      const bool exists = key < tile.length && d < head_size;
      const float* from = queries + key * a.qkv_pitch + width + d;
      shared_keys[i] = exists ? from[0] : 0.0f;
      shared_values[i] = exists ? from[width] : 0.0f;
    }
    __syncthreads();
    const int keys = min(kFloatKeys, tile.length - first_key);
#pragma unroll 1
    for (int key = 0; key < keys; ++key) {
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        score = fmaf(query[i], shared_keys[key * kHead + i * kFloatLanes + part], score);
      }
      score = sum_over<kFloatLanes>(score) * a.scale;
      const float before = largest;
      largest = fmaxf(before, score);
      const float rescale = exp2f(before - largest);
      const float weight = exp2f(score - largest);
      sum = fmaf(sum, rescale, weight);
#pragma unroll
      for (int i = 0; i < own; ++i) {
        context[i] = fmaf(context[i], rescale, weight * shared_values[key * kHead + i * kFloatLanes + part]);
      }
    }
  }
  if (query_row >= tile.length) return;
  float* output =
      static_cast<float*>(a.output) + (tile.begin + query_row) * a.output_pitch + blockIdx.y * head_size;
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const int d = i * kFloatLanes + part;
    if (d < head_size) output[d] = context[i] / sum;
  }
}

namespace {

cudaError_t launch_attention(const PrunedAttention& attention,
                             void (*kernel)(AttentionArguments),
                             int queries,
                             int shared_bytes,
                             const Queue& queue) {
  const int64_t element = size_of(attention.dtype);
  const auto aligned = [&](const void* pointer, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && pitch * element % 16 == 0;
  };
  const AttentionArguments arguments{
      .qkv = attention.qkv,
      .output = attention.output,
      .cu_seqlens = attention.cu_seqlens,
      .qkv_pitch = attention.qkv_pitch,
      .output_pitch = attention.output_pitch,
      .sequences = static_cast<int>(attention.sequences),
      .heads = static_cast<int>(attention.heads),
      .head_size = static_cast<int>(attention.head_size),
      .scale = kLog2E / sqrtf(static_cast<float>(attention.head_size)),
      .aligned = aligned(attention.qkv, attention.qkv_pitch) && attention.head_size * element % 16 == 0 &&
                 aligned(attention.output, attention.output_pitch),
  };
  // Each sequence has at most one tile that isn't full.
  const dim3 grid(static_cast<unsigned>(attention.tokens / queries + attention.sequences),
                  static_cast<unsigned>(attention.heads));
  return launch(kernel, grid, kAttentionThreads, shared_bytes, queue, arguments);
}

template <typename T>
cudaError_t launch_half(const PrunedAttention& attention, const Queue& queue) {
  const auto go = [&](auto shape, void (*kernel)(AttentionArguments)) {
    return launch_attention(attention, kernel, kQueries, decltype(shape)::kSharedBytes, queue);
  };
  const int64_t pitches = attention.qkv_pitch | attention.output_pitch;
  const auto addresses =
      reinterpret_cast<uintptr_t>(attention.qkv) | reinterpret_cast<uintptr_t>(attention.output);
  const bool aligned = pitches % kChunkElements16 == 0 && addresses % 16 == 0;
  if (attention.head_size == 32 && aligned) {
    return go(HalfAttention<T, 32, false>{}, &half_attention_kernel<T, 32, false>);
  }
  if (attention.head_size == 64 && aligned) {
    return go(HalfAttention<T, 64, false>{}, &half_attention_kernel<T, 64, false>);
  }
  return go(HalfAttention<T, 128, true>{}, &half_attention_kernel<T, 128, true>);
}

cudaError_t launch_float(const PrunedAttention& attention, const Queue& queue) {
  const auto go = [&](int head, void (*kernel)(AttentionArguments)) {
    const int shared_bytes = 2 * kFloatKeys * head * static_cast<int>(sizeof(float));
    return launch_attention(attention, kernel, kFloatQueries, shared_bytes, queue);
  };
  if (attention.head_size <= 32) return go(32, &float_attention_kernel<32>);
  if (attention.head_size <= 64) return go(64, &float_attention_kernel<64>);
  return go(128, &float_attention_kernel<128>);
}

}  // namespace

cudaError_t pruned_attention(const PrunedAttention& attention, const Queue& queue) {
  if (attention.head_size > kMaxHeadSize) return cudaErrorInvalidValue;
  const bool nothing = attention.tokens == 0 || attention.sequences == 0 || attention.heads == 0;
  if (nothing) return cudaSuccess;  // an empty grid is a launch error
  switch (attention.dtype) {
    case Dtype::float32:
      return launch_float(attention, queue);
    case Dtype::float16:
      return launch_half<__half>(attention, queue);
    case Dtype::bfloat16:
      return launch_half<__nv_bfloat16>(attention, queue);
  }
  return cudaErrorInvalidValue;
}

}  // namespace packedbert::cuda
