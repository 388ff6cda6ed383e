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

}  // namespace packedbert::cpu
