// A block of threads computes a tile of the output. It walks along the in_features in steps of kTileInputs:
// copies of the next kStages - 1 steps are under way (cp.async) while one is multiplied out of shared memory.
// What the epilogue reads is asked for all at once and early, since memory answers after half a microsecond.
#include "cuda/packed_linear.h"

#include <algorithm>

#include "cuda/elements.cuh"
#include "packed_layout.h"

namespace packedbert::cuda {

constexpr int kChunkBytes = 16;
constexpr int kRowBytes = kTileInputs * 2;  // of a row of a step, in shared memory
constexpr int kRowChunks = kRowBytes / kChunkBytes;
constexpr int kMmaRows = 16;      // of an mma.m16n8k16
constexpr int kWarpColumns = 32;  // four of its 8: see tile_output

// A block's tile, and how its warps share it. Where few blocks run, what takes time is one step after the
// other: then slices of the block take turns with the steps, and their sums are added at the end. (On an H200
// a lone tile of 32 x 64 takes 5.0 us with 768 inputs in place of 6.4; two slices gained nothing for 64 x 64,
// and with several blocks a multiprocessor they cost a tenth to a fifth.)
template <int kRows_, int kColumns_, int kRowWarps_, int kSlices_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kSlices = kSlices_;
  // Steps of a slice in shared memory: one is multiplied, the others are on their way.
  static constexpr int kStages = kStages_;
  static constexpr int kColumnWarps = kColumns / kWarpColumns;
  static constexpr int kSliceWarps = kRowWarps * kColumnWarps;
  static constexpr int kSliceThreads = kSliceWarps * kWarp;
  static constexpr int kThreads = kSlices * kSliceThreads;
  static constexpr int kWarpRows = kRows / kRowWarps;
  static constexpr int kFragments = kWarpRows / kMmaRows;
  static constexpr int kInputBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = kSlices * kStages * kStageBytes;
  // What a thread copies of a step of its slice.
  static constexpr int kInputCopies = kRows * kRowChunks / kSliceThreads;
  static constexpr int kWeightCopies = kColumns * kRowChunks / kSliceThreads;
  static_assert(kInputCopies * kSliceThreads == kRows * kRowChunks);
  static_assert(kWeightCopies * kSliceThreads == kColumns * kRowChunks);
  // The sums of all slices but the first, on their way to it.
  static constexpr int kSumsOfThread = kFragments * kWarpColumns / 8 * 4;
  static_assert((kSlices - 1) * kSliceThreads * kSumsOfThread * 4 <= kSharedBytes);
};

// Many tokens; some; few, where reading the weights is all that counts.
using LargeTile = Tile<128, 128, 2, 1, 4>;
using MiddleTile = Tile<64, 64, 2, 1, 6>;
using SmallTile = Tile<32, 64, 2, 4, 4>;

// What a kernel gets.
struct LinearArguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* residual;
  void* output;
  float* sums;
  const int32_t* rows_used;
  int64_t input_pitch;
  int64_t residual_pitch;
  int64_t output_pitch;
  int rows;
  int in_features;
  int out_features;
  int steps;  // of all in_features
  int steps_of_split;
  bool aligned;        // rows of residual and output, and the bias, to 16 bytes
  bool weights_first;  // the first steps' weights are copied while the kernel before may still run
  Activation activation;
};

template <typename T, typename Tile, bool kSums>
__global__ void __launch_bounds__(Tile::kThreads) linear_kernel(const LinearArguments a) {
  constexpr int slices = Tile::kSlices;
  constexpr int kStages = Tile::kStages;
  const int slice = threadIdx.x / Tile::kSliceThreads;
  const int thread = threadIdx.x % Tile::kSliceThreads;
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int warp_row = warp / Tile::kColumnWarps * Tile::kWarpRows;
  const int warp_column = warp % Tile::kColumnWarps * kWarpColumns;
  // Of the split's steps the slice takes every `slices`-th.
  const int steps_of_split = min(a.steps_of_split, a.steps - static_cast<int>(blockIdx.z) * a.steps_of_split);
  const int rounds = (steps_of_split + slices - 1) / slices;
  const int steps = (steps_of_split - slice + slices - 1) / slices;
  const int first_step = blockIdx.z * a.steps_of_split + slice;
  const SharedAddress shared =
      shared_address(dynamic_shared_memory()) + slice * (kStages * Tile::kStageBytes);

  // ---- Copies. All that doesn't change from step to step is computed here. The weights of a step are
  // kColumns / kTileOutputs tiles, each of them contiguous.
  const T* weight_source[Tile::kWeightCopies];
#pragma unroll
  for (int i = 0; i < Tile::kWeightCopies; ++i) {
    constexpr int tile_chunks = kTileOutputs * kRowChunks;
    const int chunk = thread + i * Tile::kSliceThreads;
    const int64_t tile = int64_t{blockIdx.x} * (Tile::kColumns / kTileOutputs) + chunk / tile_chunks;
    const bool exists = tile * kTileOutputs < a.out_features;
    weight_source[i] = static_cast<const T*>(a.weight) +
                       ((exists ? tile : 0) * a.steps + first_step) * (kTileOutputs * kTileInputs) +
                       chunk % tile_chunks * kChunk;
  }
  const SharedAddress weight_target = shared + Tile::kInputBytes + thread * kChunkBytes;

  // Starts copying a step of this slice, `ahead` of where the sources point to.
  const auto copy_weights = [&](int step, int ahead, int stage) {
    if (step >= steps) return;
#pragma unroll
    for (int i = 0; i < Tile::kWeightCopies; ++i) {
      copy_async(weight_target + stage * Tile::kStageBytes + i * Tile::kSliceThreads * kChunkBytes,
                 weight_source[i] + ahead * (slices * kTileOutputs * kTileInputs));
    }
  };
  let_next_kernel_begin();
  if (a.weights_first) {
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy_weights(step, step, step);
  }
  wait_for_kernel_before();
  const int first_row = blockIdx.y * Tile::kRows;
  const int rows = a.rows_used ? *a.rows_used : a.rows;
  if (first_row >= rows) {
    wait_for_all_copies();
    return;
  }

  const T* source[Tile::kInputCopies];
  int last_bytes[Tile::kInputCopies];  // to copy at the last step of all in_features; the others are whole
  SharedAddress target[Tile::kInputCopies];
#pragma unroll
  for (int i = 0; i < Tile::kInputCopies; ++i) {
    const int row = (thread + i * Tile::kSliceThreads) / kRowChunks;
    const int chunk = thread % kRowChunks;
    // In the place of a row that isn't there the first one is copied: what comes of it is never stored.
    const int from_row = first_row + row < rows ? first_row + row : 0;
    source[i] =
        static_cast<const T*>(a.input) + from_row * a.input_pitch + first_step * kTileInputs + chunk * kChunk;
    const int left = (a.in_features - (a.steps - 1) * kTileInputs - chunk * kChunk) * 2;
    last_bytes[i] = max(0, min(kChunkBytes, left));
    target[i] = shared + row * kRowBytes + tile_chunk(row, chunk) * kChunkBytes;
  }
  const auto copy_inputs = [&](int step, int ahead, int stage) {
    if (step >= steps) return;
    const int offset = stage * Tile::kStageBytes;
    const bool last = first_step + step * slices == a.steps - 1;
#pragma unroll
    for (int i = 0; i < Tile::kInputCopies; ++i) {
      if (last) {
        copy_async(target[i] + offset, source[i] + ahead * (slices * kTileInputs), last_bytes[i]);
      } else {
        copy_async(target[i] + offset, source[i] + ahead * (slices * kTileInputs));
      }
    }
  };

  // ---- What the epilogue reads: the thread has 8 neighbouring outputs of every 8th row.
  const int column = blockIdx.x * Tile::kColumns + warp_column + lane % 4 * kEight;
  const int count = a.out_features - column;
  const auto row_of = [&](int i, int half) {
    return first_row + warp_row + i * kMmaRows + half * 8 + lane / 4;
  };
  Eight<T> bias{};
  Eight<T> residual[Tile::kFragments][2]{};
  const auto load_for_epilogue = [&] {
    if constexpr (kSums) return;
    if (count <= 0 || slice > 0) return;
    bias = load_eight(static_cast<const T*>(a.bias) + column, count, a.aligned);
    if (!a.residual) return;
#pragma unroll
    for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        const T* from = static_cast<const T*>(a.residual) + row * a.residual_pitch + column;
        if (row < rows) residual[i][half] = load_eight(from, count, a.aligned);
      }
    }
  };

  // ---- Products. Lane l gives ldmatrix the address of row l % 16 (of the weights: 8 rows of two groups of
  // outputs), first or second half of the inputs.
  const int input_row = lane % 16;
  const int weight_row = lane % 8 + lane / 16 * 8;
  SharedAddress input_address[2];
  SharedAddress weight_address[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int input_chunk = tile_chunk(input_row, half * 2 + lane / 16);
    const int weight_chunk = tile_chunk(weight_row, half * 2 + lane / 8 % 2);
    input_address[half] = shared + (warp_row + input_row) * kRowBytes + input_chunk * kChunkBytes;
    weight_address[half] =
        shared + Tile::kInputBytes + (warp_column + weight_row) * kRowBytes + weight_chunk * kChunkBytes;
  }

  float sums[Tile::kFragments][4][4] = {};
  const auto multiply_step = [&](int stage) {
    const int offset = stage * Tile::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t inputs[Tile::kFragments][4];
      uint32_t weights[2][4];
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) {
        load_matrices(inputs[i], input_address[half] + offset + i * kMmaRows * kRowBytes);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_matrices(weights[j], weight_address[half] + offset + j * 16 * kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add<T>(sums[i][j], inputs[i], weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (!a.weights_first) copy_weights(step, step, step);
    copy_inputs(step, step, step);
    commit_copies();  // an empty group too: the waits below count groups
  }
  // A large tile has no registers to keep it in meanwhile.
  constexpr bool early = Tile::kFragments <= 2;
  if constexpr (early) load_for_epilogue();
  // A round through all stages, unrolled: where each of them lies is known when this is compiled.
#pragma unroll 1
  for (int first = 0; first < rounds; first += kStages) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (first + stage >= rounds) break;
      wait_for_copies<kStages - 2>();
      __syncthreads();  // everyone's copies are there, and everyone is done with the stage that is filled
                        // next
      constexpr int ahead = kStages - 1;
      copy_weights(first + stage + ahead, stage + ahead, (stage + ahead) % kStages);
      copy_inputs(first + stage + ahead, stage + ahead, (stage + ahead) % kStages);
      commit_copies();
      if (slices == 1 || first + stage < steps) multiply_step(stage);
    }
#pragma unroll
    for (int i = 0; i < Tile::kInputCopies; ++i) source[i] += kStages * slices * kTileInputs;
#pragma unroll
    for (int i = 0; i < Tile::kWeightCopies; ++i) {
      weight_source[i] += kStages * slices * kTileOutputs * kTileInputs;
    }
  }
  if constexpr (!early) load_for_epilogue();

  // ---- The slices' sums, added by the first one.
  if constexpr (slices > 1) {
    const auto sums_of = [&](int of_slice, int i, int j, int e) -> float& {
      const int index = (of_slice - 1) * Tile::kSumsOfThread + (i * 4 + j) * 4 + e;
      return reinterpret_cast<float*>(dynamic_shared_memory())[index * Tile::kSliceThreads + thread];
    };
    const auto for_each_sum = [&](auto&& use) {
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) use(i, j, e);
        }
      }
    };
    __syncthreads();  // everyone is done with the stages
    if (slice > 0) for_each_sum([&](int i, int j, int e) { sums_of(slice, i, j, e) = sums[i][j][e]; });
    __syncthreads();  // and the sums are there
    if (slice > 0) return;
#pragma unroll
    for (int other = 1; other < slices; ++other) {
      for_each_sum([&](int i, int j, int e) { sums[i][j][e] += sums_of(other, i, j, e); });
    }
  }

  // ---- Epilogue
  if (count <= 0) return;
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half);
      if (row >= rows) continue;
      float x[kEight];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[2 * j] = sums[i][j][2 * half];
        x[2 * j + 1] = sums[i][j][2 * half + 1];
      }
      if constexpr (kSums) {
        float* target = a.sums + (int64_t{blockIdx.z} * a.rows + row) * a.out_features + column;
        store_eight(target, count, a.aligned, x);
      } else {
        add_eight(bias, x);
        activate(a.activation, x);
        add_eight(residual[i][half], x);
        store_eight(static_cast<T*>(a.output) + row * a.output_pitch + column, count, a.aligned, x);
      }
    }
  }
}

namespace {

bool is_aligned(const void* pointer, int64_t pitch, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && pitch * element_size % 16 == 0;
}

template <typename T, typename Tile>
cudaError_t launch_tile(const PackedLinear& linear, const Queue& queue) {
  const int64_t steps = step_count(linear.in_features);
  const int64_t steps_of_split = (steps + linear.plan.splits - 1) / linear.plan.splits;
  const bool sums = linear.sums != nullptr;
  const LinearArguments arguments{
      .input = linear.input,
      .weight = linear.weight,
      .bias = linear.bias,
      .residual = linear.residual,
      .output = linear.output,
      .sums = linear.sums,
      .rows_used = linear.rows_used,
      .input_pitch = linear.input_pitch,
      .residual_pitch = linear.residual_pitch,
      .output_pitch = linear.output_pitch,
      .rows = static_cast<int>(linear.rows),
      .in_features = static_cast<int>(linear.in_features),
      .out_features = static_cast<int>(linear.out_features),
      .steps = static_cast<int>(steps),
      .steps_of_split = static_cast<int>(steps_of_split),
      .aligned = sums ? is_aligned(linear.sums, linear.out_features, sizeof(float))
                      : is_aligned(linear.bias, 0, 2) && is_aligned(linear.output, linear.output_pitch, 2) &&
                            is_aligned(linear.residual, linear.residual_pitch, 2),
      // With many blocks each of them waits for its place, not for the kernel before.
      .weights_first = queue.overlaps && linear.rows <= Tile::kRows,
      .activation = linear.activation,
  };
  const dim3 grid(static_cast<unsigned>((linear.out_features + Tile::kColumns - 1) / Tile::kColumns),
                  static_cast<unsigned>((linear.rows + Tile::kRows - 1) / Tile::kRows),
                  static_cast<unsigned>(linear.plan.splits));
  const auto kernel = sums ? &linear_kernel<T, Tile, true> : &linear_kernel<T, Tile, false>;
  return launch(kernel, grid, Tile::kThreads, Tile::kSharedBytes, queue, arguments);
}

template <typename T>
cudaError_t launch_plan(const PackedLinear& linear, const Queue& queue) {
  if (linear.plan.rows == LargeTile::kRows) return launch_tile<T, LargeTile>(linear, queue);
  if (linear.plan.rows == MiddleTile::kRows) return launch_tile<T, MiddleTile>(linear, queue);
  return launch_tile<T, SmallTile>(linear, queue);
}

}  // namespace

cudaError_t packed_linear(const PackedLinear& linear, const Queue& queue) {
  if (linear.rows == 0 || linear.out_features == 0) return cudaSuccess;  // an empty grid is a launch error
  switch (linear.dtype) {
    case Dtype::float16:
      return launch_plan<__half>(linear, queue);
    case Dtype::bfloat16:
      return launch_plan<__nv_bfloat16>(linear, queue);
    default:
      return cudaErrorInvalidValue;
  }
}

// ---------------------------------------------------------------- the plan

LinearPlan plan_linear(
    int64_t rows, int64_t out_features, int64_t in_features, int multiprocessors, bool may_split) {
  // Microseconds on an H200, a fit to what each tile took at 16 to 4,096 rows and 96 to 3,072 inputs.
  struct Choice {
    int rows;
    int columns;
    double alone;       // a block that has its multiprocessor to itself, at least
    double alone_step;  // and each of its steps
    double more;        // each block, where several share a multiprocessor
    double more_step;   // and each of its steps
  };
  constexpr Choice choices[] = {
      {LargeTile::kRows, LargeTile::kColumns, 4.2, 0.445, 2.4, 0.38},
      {MiddleTile::kRows, MiddleTile::kColumns, 3.5, 0.20, 0.4, 0.125},
      {SmallTile::kRows, SmallTile::kColumns, 2.9, 0.10, 0.85, 0.087},
  };
  constexpr double start = 2.3;
  constexpr double part = 0.75;                    // to add one part of the sums
  constexpr double bytes_per_microsecond = 4.0e6;  // for writing and reading it
  constexpr int64_t max_splits = 8;
  constexpr int64_t steps_worth_a_split = 4;

  const int64_t steps = step_count(in_features);
  LinearPlan best{SmallTile::kRows, SmallTile::kColumns, 1};
  double least = 0.0;
  for (const Choice& choice : choices) {
    const int64_t tiles =
        (rows + choice.rows - 1) / choice.rows * ((out_features + choice.columns - 1) / choice.columns);
    for (int64_t splits = 1; splits <= max_splits; splits *= 2) {
      const int64_t steps_of_split = (steps + splits - 1) / splits;
      // No part is empty, and none too short to be worth its sums.
      if (splits > 1 &&
          (!may_split || steps_of_split < steps_worth_a_split || steps_of_split * (splits - 1) >= steps)) {
        continue;
      }
      const auto of_block = [&](double fixed, double step) {
        return fixed + step * static_cast<double>(steps_of_split);
      };
      const int64_t blocks = (tiles * splits + multiprocessors - 1) / multiprocessors;  // a multiprocessor
      double time = std::max(of_block(choice.alone, choice.alone_step),
                             start + static_cast<double>(blocks) * of_block(choice.more, choice.more_step));
      if (splits > 1) {
        const double bytes = 2.0 * sizeof(float) * static_cast<double>(splits * rows * out_features);
        time += part * static_cast<double>(splits) + bytes / bytes_per_microsecond;
      }
      if (least == 0.0 || time < least) {
        least = time;
        best = {choice.rows, choice.columns, static_cast<int>(splits)};
      }
    }
  }
  return best;
}

// ---------------------------------------------------------------- prepacking

struct PrepackArguments {
  const uint16_t* weight;
  uint16_t* packed;
  int out_features;
  int in_features;
  int steps;
};

constexpr int kPrepackThreads = 256;

// One block a tile and step.
__global__ void __launch_bounds__(kPrepackThreads) prepack_kernel(const PrepackArguments a) {
  const int64_t tile = blockIdx.y;
  const int step = blockIdx.x;
  uint16_t* packed = a.packed + (tile * a.steps + step) * (kTileOutputs * kTileInputs);
  for (int i = threadIdx.x; i < kTileOutputs * kTileInputs; i += kPrepackThreads) {
    const int row = i / kTileInputs;
    const int input = i % kTileInputs;
    const int64_t from_row = tile * kTileOutputs + tile_output(row);
    const int from_column = step * kTileInputs + input;
    const bool exists = from_row < a.out_features && from_column < a.in_features;
    packed[row * kTileInputs + tile_chunk(row, input / kChunk) * kChunk + input % kChunk] =
        exists ? a.weight[from_row * a.in_features + from_column] : 0;
  }
}

cudaError_t prepack_weight(
    const void* weight, int64_t out_features, int64_t in_features, void* packed, const Queue& queue) {
  if (out_features == 0 || in_features == 0) return cudaSuccess;
  const PrepackArguments arguments{
      .weight = static_cast<const uint16_t*>(weight),
      .packed = static_cast<uint16_t*>(packed),
      .out_features = static_cast<int>(out_features),
      .in_features = static_cast<int>(in_features),
      .steps = static_cast<int>(step_count(in_features)),
  };
  const dim3 grid(static_cast<unsigned>(step_count(in_features)),
                  static_cast<unsigned>(tile_count(out_features)));
  return launch(&prepack_kernel, grid, kPrepackThreads, 0, queue, arguments);
}

}  // namespace packedbert::cuda
