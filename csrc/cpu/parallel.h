// How a torch-free kernel asks for threads.
#pragma once

#include <cstdint>

namespace packedbert::cpu {

// Works on the items [begin, end).
using RangeTask = void (*)(const void* context, int64_t begin, int64_t end);

// Calls task(context, begin, end) on disjoint ranges that together cover [0, count), perhaps on several
// threads, and returns when all are done. A range has `grain` items at least (the last one may have fewer).
// ops_common.h has torch's own pool, tests pass a plain loop.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeTask task, const void* context);

// One of a sequence of steps that several threads work on, all zero at first. Whoever comes takes a share of
// the items, and another one, until none is left; then waits for those that others are still at work on.
// Nobody waits for a thread that has not begun, so any number of threads is right: one alone does everything.
struct SharedStep {
  int64_t done;       // items
  uint64_t taken[7];  // a bit for each share; that makes a cache line
};
static_assert(sizeof(SharedStep) == 64);

// A step is cut into so many shares at most.
inline constexpr int64_t kMostShares = 64 * 7;

// The first share from `first` on, and then from 0 on, that nobody has taken; it is taken then. -1 if there
// is none. A thread that begins at the same one in every step finds what it made in the step before in its
// own caches.
int64_t take_share(SharedStep& step, int64_t shares, int64_t first);

// Waits until all items of a step are done.
void wait_for(const SharedStep& step, int64_t count);

}  // namespace packedbert::cpu
