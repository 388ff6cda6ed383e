// A warp takes a row, eight neighbouring elements a lane at a time. Rows of up to kChunks * 256 elements stay
// in registers between mean, variance and output; longer ones are computed anew for each.
#include "cuda/row_epilogue.h"

#include <type_traits>

#include "cuda/elements.cuh"

namespace packedbert::cuda {

constexpr int kRowThreads = 128;
constexpr int kRowsOfBlock = kRowThreads / kWarp;
constexpr int kChunkElements = kWarp * kEight;

struct RowArguments {
  const float* sums;
  const void* input;
  const void* bias;
  const void* residual;
  const void* norm_weight;
  const void* norm_bias;
  void* output;
  const int32_t* output_rows;
  const int32_t* rows_used;
  int64_t input_pitch;
  int64_t residual_pitch;
  int64_t output_pitch;
  int rows;
  int size;
  int splits;
  bool aligned;  // all rows, to 16 bytes
  Activation activation;
  Norm norm;
  float eps;
};

// Eight neighbouring elements of a row, and of what is done to them.
template <typename T>
struct RowChunk {
  Eight<T> bias{};
  Eight<T> norm_weight{};
  Eight<T> norm_bias{};
  Eight<T> input{};
  Eight<T> residual{};
};

// What no kernel writes.
template <typename T>
__device__ __forceinline__ void load_weights(const RowArguments& a, int column, RowChunk<T>& chunk) {
  const int count = a.size - column;
  if (a.bias) chunk.bias = load_eight(static_cast<const T*>(a.bias) + column, count, a.aligned);
  if (a.norm == Norm::none) return;
  chunk.norm_weight = load_eight(static_cast<const T*>(a.norm_weight) + column, count, a.aligned);
  chunk.norm_bias = load_eight(static_cast<const T*>(a.norm_bias) + column, count, a.aligned);
}

template <typename T>
__device__ __forceinline__ void load_row(const RowArguments& a, int row, int column, RowChunk<T>& chunk) {
  const int count = a.size - column;
  if (a.input) {
    chunk.input = load_eight(static_cast<const T*>(a.input) + row * a.input_pitch + column, count, a.aligned);
  }
  if (a.residual) {
    chunk.residual =
        load_eight(static_cast<const T*>(a.residual) + row * a.residual_pitch + column, count, a.aligned);
  }
}

// Adds a part of the sums.
__device__ __forceinline__ void add_part(
    const RowArguments& a, int split, int row, int column, float (&x)[kEight]) {
  const float* part = a.sums + (int64_t{split} * a.rows + row) * a.size + column;
  add_eight(load_eight(part, a.size - column, a.aligned), x);
}

// x, the sum of the parts or the input, as it is before the norm.
template <typename T>
__device__ __forceinline__ void finish_sums(const RowArguments& a,
                                            const RowChunk<T>& chunk,
                                            float (&x)[kEight]) {
  if (a.input) to_floats(chunk.input, x);
  if (a.bias) add_eight(chunk.bias, x);
  if constexpr (std::is_same_v<T, float>) activate(a.activation, x);
  if (a.residual) add_eight(chunk.residual, x);
}

// kChunks == 0: rows of any size.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kRowThreads) row_kernel(const RowArguments a) {
  const int lane = threadIdx.x % kWarp;
  const int row = blockIdx.x * kRowsOfBlock + threadIdx.x / kWarp;
  constexpr int kept_chunks = kChunks > 0 ? kChunks : 1;
  float kept[kept_chunks][kEight] = {};
  RowChunk<T> chunks[kept_chunks];

  // Everything but parts of sums is asked for before any of it is used, and the weights before the kernel
  // before is done.
  let_next_kernel_begin();
  const auto for_each_kept = [&](auto&& use) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = i * kChunkElements + lane * kEight;
      if (column < a.size) use(column, kept[i], chunks[i]);
    }
  };
  for_each_kept([&](int column, auto&, RowChunk<T>& chunk) { load_weights(a, column, chunk); });
  wait_for_kernel_before();
  const int rows = a.rows_used ? *a.rows_used : a.rows;
  if (row >= rows) return;
  for_each_kept([&](int column, auto&, RowChunk<T>& chunk) { load_row(a, row, column, chunk); });
  if (!a.input) {
    for (int split = 0; split < a.splits; ++split) {
      for_each_kept([&](int column, float (&x)[kEight], auto&) { add_part(a, split, row, column, x); });
    }
  }
  for_each_kept([&](int, float (&x)[kEight], const RowChunk<T>& chunk) { finish_sums(a, chunk, x); });

  const auto for_each_chunk = [&](auto&& use) {
    if constexpr (kChunks > 0) {
      for_each_kept(use);
    } else {
#pragma unroll 1
      for (int column = lane * kEight; column < a.size; column += kChunkElements) {
        RowChunk<T> chunk;
        float x[kEight] = {};
        load_weights(a, column, chunk);
        load_row(a, row, column, chunk);
        if (!a.input) {
          for (int split = 0; split < a.splits; ++split) add_part(a, split, row, column, x);
        }
        finish_sums(a, chunk, x);
        use(column, x, chunk);
      }
    }
  };
  float mean = 0.0f;
  float scale = 1.0f;
  if (a.norm == Norm::layer_norm) {
    float sum = 0.0f;
    for_each_chunk([&](int, const float (&x)[kEight], auto&) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum += x[i];
    });
    mean = sum_over<kWarp>(sum) / static_cast<float>(a.size);
    float squares = 0.0f;
    for_each_chunk([&](int column, const float (&x)[kEight], auto&) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const float d = column + i < a.size ? x[i] - mean : 0.0f;
        squares = fmaf(d, d, squares);
      }
    });
    scale = 1.0f / sqrtf(sum_over<kWarp>(squares) / static_cast<float>(a.size) + a.eps);
  }
  T* output = static_cast<T*>(a.output) + (a.output_rows ? a.output_rows[row] : row) * a.output_pitch;
  for_each_chunk([&](int column, float (&x)[kEight], const RowChunk<T>& chunk) {
    if (a.norm != Norm::none) {
      float weight[kEight];
      float bias[kEight];
      to_floats(chunk.norm_weight, weight);
      to_floats(chunk.norm_bias, bias);
#pragma unroll
      for (int i = 0; i < kEight; ++i) x[i] = fmaf((x[i] - mean) * scale, weight[i], bias[i]);
    }
    store_eight(output + column, a.size - column, a.aligned, x);
  });
}

namespace {

template <typename T>
cudaError_t launch_rows(const RowEpilogue& e, const Queue& queue) {
  const auto aligned = [](const void* pointer, int64_t pitch, int64_t element_size) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && pitch * element_size % 16 == 0;
  };
  constexpr int64_t element = sizeof(T);
  const RowArguments arguments{
      .sums = e.sums,
      .input = e.input,
      .bias = e.bias,
      .residual = e.residual,
      .norm_weight = e.norm_weight,
      .norm_bias = e.norm_bias,
      .output = e.output,
      .output_rows = e.output_rows,
      .rows_used = e.rows_used,
      .input_pitch = e.input_pitch,
      .residual_pitch = e.residual_pitch,
      .output_pitch = e.output_pitch,
      .rows = static_cast<int>(e.rows),
      .size = static_cast<int>(e.size),
      .splits = e.splits,
      .aligned = aligned(e.sums, e.size, e.sums ? sizeof(float) : 0) &&
                 aligned(e.input, e.input_pitch, element) && aligned(e.bias, 0, 0) &&
                 aligned(e.residual, e.residual_pitch, element) && aligned(e.norm_weight, 0, 0) &&
                 aligned(e.norm_bias, 0, 0) && aligned(e.output, e.output_pitch, element),
      .activation = e.activation,
      .norm = e.norm,
      .eps = e.eps,
  };
  const dim3 grid(static_cast<unsigned>((e.rows + kRowsOfBlock - 1) / kRowsOfBlock));
  // hidden_size of BERT-base and less, of BERT-large (1024), and all others.
  const auto kernel = e.size <= 3 * kChunkElements   ? &row_kernel<T, 3>
                      : e.size <= 4 * kChunkElements ? &row_kernel<T, 4>
                                                     : &row_kernel<T, 0>;
  return launch(kernel, grid, kRowThreads, 0, queue, arguments);
}

}  // namespace

cudaError_t row_epilogue(const RowEpilogue& epilogue, const Queue& queue) {
  if (epilogue.rows == 0 || epilogue.size == 0) return cudaSuccess;  // an empty grid is a launch error
  if (epilogue.dtype != Dtype::float32 && epilogue.activation != Activation::none) {
    return cudaErrorInvalidValue;
  }
  switch (epilogue.dtype) {
    case Dtype::float32:
      return launch_rows<float>(epilogue, queue);
    case Dtype::float16:
      return launch_rows<__half>(epilogue, queue);
    case Dtype::bfloat16:
      return launch_rows<__nv_bfloat16>(epilogue, queue);
  }
  return cudaErrorInvalidValue;
}

}  // namespace packedbert::cuda
