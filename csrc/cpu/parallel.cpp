// How threads that share steps wait for each other.
#include "cpu/parallel.h"

#include <thread>

#include "cpu/isa.h"

namespace packedbert::cpu {

int64_t take_share(SharedStep& step, int64_t shares, int64_t first) {
  for (int64_t i = 0; i < shares; ++i) {
    const int64_t share = first + i < shares ? first + i : first + i - shares;
    uint64_t* word = &step.taken[share / 64];
    const uint64_t bit = uint64_t{1} << share % 64;
    if (__atomic_load_n(word, __ATOMIC_RELAXED) & bit) continue;
    if (!(__atomic_fetch_or(word, bit, __ATOMIC_RELAXED) & bit)) return share;
  }
  return -1;
}

void wait_for(const SharedStep& step, int64_t count) {
  // What is left is about as much as was done here: soon over, unless its thread has lost its core.
  constexpr int kPatience = 200;
  for (int turn = 0; __atomic_load_n(&step.done, __ATOMIC_ACQUIRE) < count; ++turn) {
    if (turn > kPatience) std::this_thread::yield();
#if PACKEDBERT_X86
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace packedbert::cpu
