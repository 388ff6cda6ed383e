// Compiles a stretch of code for an instruction set that the rest of the file may not use:
//
//     #include <immintrin.h>
//     PACKEDBERT_BEGIN_TARGET("avx2,fma")
//     namespace packedbert::cpu::avx2 { ... }
//     PACKEDBERT_END_TARGET
//
// Whatever comes from outside is included before the region: an inline function that was compiled inside it
// could become the copy that the linker keeps for every file, and crash an older processor.
#pragma once

#define PACKEDBERT_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define PACKEDBERT_BEGIN_TARGET(isa) \
  PACKEDBERT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PACKEDBERT_END_TARGET PACKEDBERT_PRAGMA(clang attribute pop)
#define PACKEDBERT_UNROLL PACKEDBERT_PRAGMA(clang loop unroll(full))
#else
#define PACKEDBERT_BEGIN_TARGET(isa) PACKEDBERT_PRAGMA(GCC push_options) PACKEDBERT_PRAGMA(GCC target(isa))
#define PACKEDBERT_END_TARGET PACKEDBERT_PRAGMA(GCC pop_options)
#define PACKEDBERT_UNROLL PACKEDBERT_PRAGMA(GCC unroll 16)
#endif

// A vector argument must never be passed in memory, and a helper never be left as a call in an inner loop.
#define PACKEDBERT_INLINE inline __attribute__((always_inline))
#define PACKEDBERT_INLINE_LAMBDA __attribute__((always_inline))

// Keeps a vector in its register here. Without it g++ adds integers in an order of its own (floats it may
// not), and spills the sums of a microkernel's inner loop.
#define PACKEDBERT_PIN(vector) __asm__("" : "+v"(vector))
