// Two kernels: how many tokens each sequence has, and then each token to its place. A token's place is its
// sequence's beginning and the number of real tokens before it, which a warp counts with ballots: no list of
// tokens has to be made first.
#include "cuda/ragged_batch.h"

#include "cuda/elements.cuh"

namespace packedbert::cuda {

constexpr int kCountThreads = 1024;
constexpr int kGatherThreads = 128;
constexpr int kTokensOfBlock = kGatherThreads / kWarp;

struct RaggedArguments {
  const bool* mask;
  const void* padded;
  int32_t* cu_seqlens;
  void* tokens;
  int32_t* positions;
  void* output;
  int64_t tokens_pitch;
  int sequences;
  int length;
  int hidden_size;
  bool aligned;  // all rows, to 16 bytes
};

// The real tokens among the first `end` of a sequence; the whole warp gets it.
__device__ __forceinline__ int count_tokens(const bool* mask, int end, int lane) {
  int count = 0;
  for (int first = 0; first < end; first += kWarp) {
    const bool real = first + lane < end && mask[first + lane];
    count += __popc(__ballot_sync(kAllLanes, real));
  }
  return count;
}

// cu_seqlens, by one block.
__global__ void __launch_bounds__(kCountThreads) count_kernel(const RaggedArguments a) {
  let_next_kernel_begin();
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int sequence = warp; sequence < a.sequences; sequence += kCountThreads / kWarp) {
    const int count = a.mask ? count_tokens(a.mask + int64_t{sequence} * a.length, a.length, lane) : a.length;
    if (lane == 0) a.cu_seqlens[sequence + 1] = count;
  }
  __syncthreads();
  if (warp > 0) return;
  int sum = 0;  // of all sequences before these 32
  if (lane == 0) a.cu_seqlens[0] = 0;
  for (int first = 0; first < a.sequences; first += kWarp) {
    const int sequence = first + lane;
    int end = sequence < a.sequences ? a.cu_seqlens[sequence + 1] : 0;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    end += sum;
    if (sequence < a.sequences) a.cu_seqlens[sequence + 1] = end;
    sum = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
}

// One warp a position of the padded batch.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const RaggedArguments a) {
  let_next_kernel_begin();
  wait_for_kernel_before();
  const int lane = threadIdx.x % kWarp;
  const int64_t position = int64_t{blockIdx.x} * kTokensOfBlock + threadIdx.x / kWarp;
  if (position >= int64_t{a.sequences} * a.length) return;
  const int sequence = static_cast<int>(position / a.length);
  const int place = static_cast<int>(position % a.length);
  const bool* mask = a.mask ? a.mask + int64_t{sequence} * a.length : nullptr;
  const bool real = mask ? mask[place] : true;
  T* to = static_cast<T*>(a.output) + position * a.hidden_size;
  if (real) {
    const int64_t token = a.cu_seqlens[sequence] + (mask ? count_tokens(mask, place, lane) : place);
    to = static_cast<T*>(a.tokens) + token * a.tokens_pitch;
    if (lane == 0) a.positions[token] = static_cast<int32_t>(position);
  }
  const T* from = static_cast<const T*>(a.padded) + position * a.hidden_size;
  for (int column = lane * kEight; column < a.hidden_size; column += kWarp * kEight) {
    float x[kEight] = {};
    if (real) to_floats(load_eight(from + column, a.hidden_size - column, a.aligned), x);
    store_eight(to + column, a.hidden_size - column, a.aligned, x);
  }
}

namespace {

template <typename T>
cudaError_t launch_gather(const RaggedBatch& batch, RaggedArguments arguments, const Queue& queue) {
  const auto aligned = [](const void* pointer, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 &&
           pitch * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  };
  arguments.aligned = aligned(batch.padded, batch.hidden_size) && aligned(batch.tokens, batch.tokens_pitch) &&
                      aligned(batch.output, batch.hidden_size);
  const int64_t positions = batch.sequences * batch.length;
  const dim3 grid(static_cast<unsigned>((positions + kTokensOfBlock - 1) / kTokensOfBlock));
  return launch(&gather_kernel<T>, grid, kGatherThreads, 0, queue, arguments);
}

}  // namespace

#ifndef PACKEDBERT_EMULATED
// All kernels are compiled for the same architectures. The device's alone does not tell: it also runs what
// the driver makes of the PTX for an older one, in which there is no wait.
bool kernels_can_overlap() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, &count_kernel);
  return error == cudaSuccess && attributes.ptxVersion * 10 >= PACKEDBERT_OVERLAP_ARCH;
}
#endif

cudaError_t gather_tokens(const RaggedBatch& batch, const Queue& queue) {
  const RaggedArguments arguments{
      .mask = batch.mask,
      .padded = batch.padded,
      .cu_seqlens = batch.cu_seqlens,
      .tokens = batch.tokens,
      .positions = batch.positions,
      .output = batch.output,
      .tokens_pitch = batch.tokens_pitch,
      .sequences = static_cast<int>(batch.sequences),
      .length = static_cast<int>(batch.length),
      .hidden_size = static_cast<int>(batch.hidden_size),
      .aligned = false,
  };
  // What comes before this kernel is not ours: it waits until that is done.
  const cudaError_t error = launch(&count_kernel, dim3(1), kCountThreads, 0, {queue.stream}, arguments);
  if (error != cudaSuccess || !batch.tokens || batch.sequences * batch.length == 0) return error;
  switch (batch.dtype) {
    case Dtype::float32:
      return launch_gather<float>(batch, arguments, queue);
    case Dtype::float16:
      return launch_gather<__half>(batch, arguments, queue);
    case Dtype::bfloat16:
      return launch_gather<__nv_bfloat16>(batch, arguments, queue);
  }
  return cudaErrorInvalidValue;
}

}  // namespace packedbert::cuda
