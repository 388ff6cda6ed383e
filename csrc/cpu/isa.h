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
  scalar,  // whatever the compiler makes of plain C++ for the baseline of the platform
  avx2,    // AVX2 + FMA
  avx512,  // AVX-512 F, BW, DQ and VL
};

const char* isa_name(Isa isa);

// Those that the processor has and the operating system saves the registers of, slowest first; never empty.
const std::vector<Isa>& available_isas();

// The one that kernels use: the last of available_isas() until set_active_isa chose another.
Isa active_isa();

// Returns false, and changes nothing, where the machine cannot run `isa`. Safe beside running kernels: a call
// keeps the instruction set that it started with.
[[nodiscard]] bool set_active_isa(Isa isa);

}  // namespace packedbert::cpu
