// The kernels in plain C++, for any processor.
#include "cpu/attention.h"
#include "cpu/embed.h"
#include "cpu/encoder.h"
#include "cpu/head.h"
#include "cpu/packed_linear.h"
#include "cpu/target_region.h"
#include "packed_layout.h"

namespace packedbert::cpu::scalar {

constexpr int kTileRows = 6;  // 12 sums, 2 weights and 1 input: 15 of the 16 registers of x86-64's baseline
constexpr int64_t kDepthBlock = 128;
constexpr int64_t kNearPrefetch = 0;

// clang-format off: each builds on the one before
#include "cpu/vec_scalar.h"
#include "cpu/dot_scalar.h"
#include "cpu/products_vector.h"
#include "cpu/bodies.h"
// clang-format on

}  // namespace packedbert::cpu::scalar
