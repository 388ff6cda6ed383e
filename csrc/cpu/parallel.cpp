// How threads that share steps wait for each other.
#include "cpu/parallel.h"

#include <thread>

#include "cpu/isa.h"

namespace packedbert::cpu {

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
