// The packed weight formats: their single definition. (packedbert/quantization.py writes and reads the
// second.)
//
// A canonical linear weight W is [out_features, in_features]. Packed for the CPU, it is [panels, in_features,
// kPanelWidth]:
//     packed[p, k, j] = W[p * kPanelWidth + j, k]    (zero where p * kPanelWidth + j >= out_features)
// so that a kernel which computes kPanelWidth neighbouring outputs reads one panel from front to back.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PACKEDBERT_HOST_DEVICE __host__ __device__
#else
#define PACKEDBERT_HOST_DEVICE
#endif

namespace packedbert {

// 32 columns are two AVX-512 registers, four AVX2 registers and eight of the baseline: the width suits every
// instruction set, so a packed weight does not depend on the one that is active.
inline constexpr int64_t kPanelWidth = 32;

constexpr int64_t panel_count(int64_t out_features) { return (out_features + kPanelWidth - 1) / kPanelWidth; }

// A weight quantized to int8: W[n, k] * smoothing[k] ~ values[n, k] * scale[n], |values| <= 127, where the
// inputs are divided by `smoothing` (SmoothQuant, arXiv 2211.10438). It is one array of bytes, parts one
// after the other:
//     int8  panels       [panel_count, groups, kPanelWidth, kGroup]
//                        panels[p, g, j, i] = values[p * kPanelWidth + j, g * kGroup + i], or 0 beyond
//     float scale        [panel_count * kPanelWidth], 0 beyond out_features
//     int32 column_sums  [panel_count * kPanelWidth], the sums of values[n, :]
//     float input_scale  [in_features], 1 / smoothing
// kGroup inputs side by side are what the dot product instructions of x86 and Arm take for one lane.
inline constexpr int64_t kGroup = 4;

constexpr int64_t group_count(int64_t in_features) { return (in_features + kGroup - 1) / kGroup; }

// So many products of an unsigned and a signed byte can't overflow a 32-bit sum: 255 * 127 * 65536 < 2^31.
inline constexpr int64_t kMaxQuantizedInputs = 65536;

// Bytes.
constexpr int64_t quantized_panel_size(int64_t in_features) {
  return group_count(in_features) * kPanelWidth * kGroup;
}
constexpr int64_t quantized_size(int64_t out_features, int64_t in_features) {
  return panel_count(out_features) * (quantized_panel_size(in_features) + 2 * kPanelWidth * 4) +
         in_features * 4;
}

// Packed for a GPU, in half precision, it is [tiles, steps, kTileOutputs, kTileInputs], zero padded. Each of
// its matrices is the image of what a block of threads keeps in shared memory, so that copying one is copying
// bytes in order (csrc/cuda/packed_linear.cu), whatever the sizes are:
//     row r holds the weights of output tile * kTileOutputs + tile_output(r);
//     16 bytes are a chunk of 8 inputs; chunk c of row r lies at tile_chunk(r, c).
// In float32 a GPU gets the canonical weight: that product is PyTorch's.
inline constexpr int64_t kTileOutputs = 64;
inline constexpr int64_t kTileInputs = 32;
inline constexpr int64_t kChunk = 8;

constexpr int64_t tile_count(int64_t out_features) {
  return (out_features + kTileOutputs - 1) / kTileOutputs;
}
constexpr int64_t step_count(int64_t in_features) { return (in_features + kTileInputs - 1) / kTileInputs; }

// A thread of mma.m16n8k16 gets sums for outputs 2t and 2t + 1 of each group of 8. In this order of rows,
// what it gets of four groups are 8 neighbouring outputs, which it stores at once.
PACKEDBERT_HOST_DEVICE constexpr int tile_output(int row) {
  const int group = row / 8 % 4;
  const int thread = row % 8 / 2;
  return row / 32 * 32 + thread * 8 + group * 2 + row % 2;
}

// Rows of 64 bytes: two of them fill the 32 banks of shared memory. Eight rows' chunks of one column, which
// ldmatrix reads together, then lie in different banks.
PACKEDBERT_HOST_DEVICE constexpr int tile_chunk(int row, int chunk) { return chunk ^ (row / 2 % 4); }

}  // namespace packedbert
