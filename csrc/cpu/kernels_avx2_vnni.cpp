// The kernels for AVX2 + FMA with AVX-VNNI.
#include "cpu/isa.h"

#if PACKEDBERT_X86

#include <immintrin.h>

#include "cpu/attention.h"
#include "cpu/embed.h"
#include "cpu/encoder.h"
#include "cpu/head.h"
#include "cpu/packed_linear.h"
#include "cpu/target_region.h"
#include "packed_layout.h"

PACKEDBERT_BEGIN_TARGET("avxvnni,avx2,fma")
namespace packedbert::cpu::avx2_vnni {

constexpr int kTileRows = 6;  // 12 sums, 2 weights and 1 input: 15 of 16 registers
// Rounds about as PyTorch's sgemm does: 1024 rounds twice as much, and is no faster.
constexpr int64_t kDepthBlock = 256;
// A pass reads every other cache line, which the processor's own prefetching can't follow.
constexpr int64_t kNearPrefetch = 8;

// clang-format off: each builds on the one before
#include "cpu/vec_avx2.h"
#include "cpu/dot_avx2_vnni.h"
#include "cpu/products_vector.h"
#include "cpu/bodies.h"
// clang-format on

}  // namespace packedbert::cpu::avx2_vnni
PACKEDBERT_END_TARGET

#endif  // PACKEDBERT_X86
