// The packed weight format: its single definition.
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

}  // namespace packedbert
