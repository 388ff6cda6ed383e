// Which instruction sets this machine runs, and which one the kernels use.
#pragma once

#include <vector>

#if defined(__x86_64__)
#define PACKEDBERT_X86 1
#else
#define PACKEDBERT_X86 0
#endif

namespace packedbert::cpu {

enum class Isa {
  scalar,       // whatever the compiler makes of plain C++ for the baseline of the platform
  avx2,         // AVX2 + FMA
  avx2_vnni,    // and AVX-VNNI, the dot products of bytes
  avx512,       // AVX-512 F, BW, DQ and VL
  avx512_vnni,  // and AVX-512 VNNI
  avx512_amx,   // and AMX, tiles of bfloat16 and of bytes
};

// A kernel has one body, compiled once for each instruction set: this declares all of them, and
// PACKEDBERT_CALL_FOR_ISA calls the one for `isa`.
#if PACKEDBERT_X86
#define PACKEDBERT_DECLARE_FOR_EACH_ISA(declaration) \
  namespace scalar {                                 \
  declaration;                                       \
  }                                                  \
  namespace avx2 {                                   \
  declaration;                                       \
  }                                                  \
  namespace avx2_vnni {                              \
  declaration;                                       \
  }                                                  \
  namespace avx512 {                                 \
  declaration;                                       \
  }                                                  \
  namespace avx512_vnni {                            \
  declaration;                                       \
  }                                                  \
  namespace avx512_amx {                             \
  declaration;                                       \
  }
#define PACKEDBERT_CALL_FOR_ISA(isa, function, ...) \
  switch (isa) {                                    \
    case Isa::avx512_amx:                           \
      return avx512_amx::function(__VA_ARGS__);     \
    case Isa::avx512_vnni:                          \
      return avx512_vnni::function(__VA_ARGS__);    \
    case Isa::avx512:                               \
      return avx512::function(__VA_ARGS__);         \
    case Isa::avx2_vnni:                            \
      return avx2_vnni::function(__VA_ARGS__);      \
    case Isa::avx2:                                 \
      return avx2::function(__VA_ARGS__);           \
    default:                                        \
      return scalar::function(__VA_ARGS__);         \
  }
#else
#define PACKEDBERT_DECLARE_FOR_EACH_ISA(declaration) \
  namespace scalar {                                 \
  declaration;                                       \
  }
#define PACKEDBERT_CALL_FOR_ISA(isa, function, ...) return scalar::function(__VA_ARGS__)
#endif

const char* isa_name(Isa isa);

// Those that the processor has and the operating system saves the registers of, slowest first; never empty.
const std::vector<Isa>& available_isas();

// The one that kernels use: the last of available_isas() until set_active_isa chose another.
Isa active_isa();

// Returns false, and changes nothing, where the machine cannot run `isa`. Safe beside running kernels: a call
// keeps the instruction set that it started with.
[[nodiscard]] bool set_active_isa(Isa isa);

}  // namespace packedbert::cpu
