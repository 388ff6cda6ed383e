// The kernels for AVX-512 (F, BW, DQ and VL) with VNNI.
#include "cpu/isa.h"

#if PACKEDBERT_X86

#if !defined(__clang__)
// g++ 12's own _mm512_undefined_*, PR 105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "cpu/attention.h"
#include "cpu/embed.h"
#include "cpu/encoder.h"
#include "cpu/head.h"
#include "cpu/packed_linear.h"
#include "cpu/target_region.h"
#include "packed_layout.h"

PACKEDBERT_BEGIN_TARGET("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace packedbert::cpu::avx512_vnni {

constexpr int kTileRows = 14;  // 28 sums, 2 weights and 1 input: 31 of 32 registers
constexpr int64_t kDepthBlock = 128;
constexpr int64_t kNearPrefetch = 0;

// clang-format off: each builds on the one before
#include "cpu/vec_avx512.h"
#include "cpu/dot_avx512_vnni.h"
#include "cpu/products_vector.h"
#include "cpu/bodies.h"
// clang-format on

}  // namespace packedbert::cpu::avx512_vnni
PACKEDBERT_END_TARGET

#endif  // PACKEDBERT_X86
