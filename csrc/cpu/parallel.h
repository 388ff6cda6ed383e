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
  int64_t taken;
  int64_t done;
  int64_t line[6];  // each has a cache line of its own
};

// Waits until all items of a step are done.
void wait_for(const SharedStep& step, int64_t count);

}  // namespace packedbert::cpu
