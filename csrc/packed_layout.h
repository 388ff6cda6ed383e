// The packed weight formats: their single definition. (packedbert/quantization.py writes and reads the
// second.)
//
// A canonical linear weight W is [out_features, in_features]. Packed, it is [panels, in_features,
// kPanelWidth]:
//     packed[p, k, j] = W[p * kPanelWidth + j, k]    (zero where p * kPanelWidth + j >= out_features)
// so that a kernel which computes kPanelWidth neighbouring outputs reads one panel from front to back.
#pragma once

#include <cstdint>

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

}  // namespace packedbert
