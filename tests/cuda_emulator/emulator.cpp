// The scheduler of the fibers. Compiled without -fsanitize=thread: it implements that sanitizer's hooks.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer to *save, and goes on with another stack (x86-64).
extern "C" void emulator_switch(void** save, void* load);
asm(".text\n.globl emulator_switch\nemulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");

namespace emulator {

Options options;
std::vector<Launch> launches;

namespace {

constexpr size_t kStackBytes = 256 << 10;

struct Copy {
  unsigned char* target;
  const void* source;
  int bytes;
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  bool done = false;
  const char* waits_at = nullptr;
  std::vector<std::vector<Copy>> copies;  // closed groups
  std::vector<Copy> open_copies;
  unsigned warp_syncs = 0;
  bool waited;  // for the kernel before
  void* sanitizer_stack = nullptr;
};

// A warp-wide operation that some lanes have reached.
struct Meeting {
  unsigned mask;
  unsigned here = 0;
  const char* name;
  const void* inputs[32];
  void* outputs[32];
};

std::vector<Fiber> fibers;
std::vector<std::vector<int>> ready;         // of each warp, the fibers that can go on
std::vector<std::vector<Meeting>> meetings;  // of each warp
std::vector<uint32_t> priority;              // of each warp
std::vector<int> at_barrier;
int current = -1;
int ready_count;
int live;
unsigned barrier_count;
void* scheduler_stack_pointer;
const std::function<void()>* kernel_body;
unsigned char* shared;
size_t shared_size;
bool failed;
std::string error;
bool overlaps;  // the kernel that runs
uint64_t random_state;

uint32_t random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33);
}

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_size;
void before_switch(void** save, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(save, stack, size);
}
void after_switch(void* save, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(save, stack, size);
}
#else
const void* scheduler_stack;
size_t scheduler_stack_size;
void before_switch(void**, const void*, size_t) {}
void after_switch(void*, const void**, size_t*) {}
#endif

void wake(int fiber) {
  ready[fiber / 32].push_back(fiber);
  ++ready_count;
}

// Every switch goes through the scheduler.
void to_scheduler() {
  Fiber& me = fibers[current];
  before_switch(me.done ? nullptr : &me.sanitizer_stack, scheduler_stack, scheduler_stack_size);
  emulator_switch(&me.stack_pointer, scheduler_stack_pointer);
  after_switch(me.sanitizer_stack, nullptr, nullptr);
}

void fiber_entry() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*kernel_body)();
  // Or the kernel after this one would not wait for the kernel before it.
  if (!fibers[current].waited) fail("a thread ends without having waited for the kernel before");
  fibers[current].done = true;
  --live;
  to_scheduler();
  std::abort();
}

bool in_shared(const void* pointer, size_t size) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  return p >= shared && p + size <= shared + shared_size;
}

// ---------------------------------------------------------------- races and traffic

enum Access { kRead, kWrite };

// The last two accesses of a kind to a byte of shared memory since the last barrier, by threads of two warps.
struct Shadow {
  struct Last {
    int thread[2] = {-1, -1};
    unsigned warp_syncs[2];
    unsigned barrier = 0;
  } of[2];
};
std::vector<Shadow> shadow;

struct Buffer {
  uintptr_t begin;
  uintptr_t end;
  std::vector<bool> read;
  std::vector<bool> written;
  // Written since the last kernel that began when all before it were done: a kernel of a Queue that overlaps
  // may not look at it before it has waited.
  std::vector<bool> unsettled;
};
std::vector<Buffer> buffers;

void check_race(size_t byte, Access access) {
  static const char* const names[] = {"read", "write"};
  Shadow& s = shadow[byte];
  const Fiber& me = fibers[current];
  for (const Access other : {kRead, kWrite}) {
    const Shadow::Last& last = s.of[other];
    if (access == kRead && other == kRead) continue;
    if (last.barrier != barrier_count) continue;
    for (int i = 0; i < 2; ++i) {
      const int thread = last.thread[i];
      if (thread < 0 || thread == current) continue;
      if (thread / 32 == current / 32 && last.warp_syncs[i] != me.warp_syncs) continue;
      fail("race: %s of shared byte %zu after a %s by thread %d, and no barrier between", names[access], byte,
           names[other], thread);
    }
  }
  Shadow::Last& mine = s.of[access];
  if (mine.barrier != barrier_count) mine.thread[0] = mine.thread[1] = -1;
  if (mine.thread[0] >= 0 && mine.thread[0] / 32 != current / 32) {
    mine.thread[1] = mine.thread[0];
    mine.warp_syncs[1] = mine.warp_syncs[0];
  }
  mine.thread[0] = current;
  mine.warp_syncs[0] = me.warp_syncs;
  mine.barrier = barrier_count;
}

void note_access(const void* pointer, size_t size, Access access) {
  if (current < 0) return;
  if (in_shared(pointer, 1)) {
    const size_t first = static_cast<const unsigned char*>(pointer) - shared;
    if (options.races)
      for (size_t byte = first; byte < std::min(first + size, shared_size); ++byte) check_race(byte, access);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (Buffer& buffer : buffers) {
    if (address < buffer.begin || address >= buffer.end) continue;
    std::vector<bool>& seen = access == kRead ? buffer.read : buffer.written;
    for (size_t i = 0; i < size && address + i < buffer.end; ++i) {
      const size_t byte = address - buffer.begin + i;
      seen[byte] = true;
      if (!fibers[current].waited && (access == kWrite || buffer.unsettled[byte])) {
        fail("a %s before the kernel before was waited for", access == kRead ? "read" : "write");
      }
    }
  }
}

void land(const Copy& copy) {
  note_access(copy.target, 16, kWrite);
  std::memcpy(copy.target, copy.source, copy.bytes);
  std::memset(copy.target + copy.bytes, 0, 16 - copy.bytes);
}

}  // namespace

const std::string& last_error() { return error; }
unsigned char* shared_memory() { return shared; }
int lane() { return current % 32; }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[128];
  snprintf(where, sizeof where, "block (%u, %u, %u) thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z,
           current);
  error = std::string(where) + text;
  failed = true;
  to_scheduler();
  std::abort();
}

void barrier(const char* where) {
  fibers[current].waits_at = where;
  at_barrier.push_back(current);
  // Strict: each thread of the block has to come, as the programming guide asks.
  if (at_barrier.size() == fibers.size()) {
    for (const int fiber : at_barrier) {
      if (std::strcmp(fibers[fiber].waits_at, where) != 0) {
        fail("divergent barriers: %s and %s", fibers[fiber].waits_at, where);
      }
      wake(fiber);
    }
    ++barrier_count;
    at_barrier.clear();
  }
  to_scheduler();
  fibers[current].waits_at = nullptr;
}

void warp_operation(const char* name, unsigned mask, const void* input, void* output, WarpOperation run) {
  const int me = current % 32;
  const int warp = current / 32;
  if (!(mask >> me & 1)) fail("%s: lane %d is not in its own mask %08x", name, me, mask);
  auto& open = meetings[warp];
  auto at = std::find_if(open.begin(), open.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (at == open.end()) {
    open.push_back({.mask = mask, .name = name});
    at = open.end() - 1;
  }
  if (std::strcmp(at->name, name) != 0) fail("a warp diverges: %s meets %s", name, at->name);
  at->inputs[me] = input;
  at->outputs[me] = output;
  at->here |= 1u << me;
  if (at->here == mask) {
    const Meeting meeting = *at;
    open.erase(at);
    run(mask, meeting.inputs, meeting.outputs);
    const bool sync = std::strcmp(name, "syncwarp") == 0;
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      if (sync) ++fibers[warp * 32 + l].warp_syncs;
      if (l != me) wake(warp * 32 + l);
    }
    return;
  }
  fibers[current].waits_at = name;
  to_scheduler();
  fibers[current].waits_at = nullptr;
}

void copy_async(void* target, const void* source, int bytes) {
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(target) % 16 || (bytes && reinterpret_cast<uintptr_t>(source) % 16)) {
    fail("cp.async of unaligned addresses, to %p from %p", target, source);
  }
  if (!in_shared(target, 16)) {
    fail("cp.async to outside of shared memory, offset %ld",
         static_cast<long>(static_cast<unsigned char*>(target) - shared));
  }
  note_access(target, 16, kWrite);
  note_access(source, bytes, kRead);
  const Copy copy{static_cast<unsigned char*>(target), source, bytes};
  const bool now = options.copies_land == 0 || (options.copies_land == 2 && random_number() % 2);
  if (now) {
    land(copy);
  } else {
    std::memset(target, 0xff, 16);
  }
  fibers[current].open_copies.push_back(copy);
}

void commit_copies() {
  fibers[current].copies.push_back(std::move(fibers[current].open_copies));
  fibers[current].open_copies.clear();
}

void wait_for_copies(int pending) {
  auto& groups = fibers[current].copies;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

void wait_for_kernel_before() { fibers[current].waited = true; }

void note_written(const void* data, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  for (Buffer& buffer : buffers) {
    for (uintptr_t byte = std::max(address, buffer.begin); byte < std::min(address + size, buffer.end);
         ++byte)
      buffer.unsettled[byte - buffer.begin] = true;
  }
}

void load_matrices(uint32_t (&matrices)[4], uintptr_t row, bool transposed) {
  if (row % 16 || !in_shared(reinterpret_cast<void*>(row), 16)) {
    fail("ldmatrix of the row at offset %ld", static_cast<long>(row - reinterpret_cast<uintptr_t>(shared)));
  }
  note_access(reinterpret_cast<void*>(row), 16, kRead);
  struct Input {
    uintptr_t row;
    bool transposed;
  };
  const Input input{row, transposed};
  warp_operation(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &input, matrices,
                 [](unsigned, const void* const* inputs, void* const* outputs) {
                   const auto at = [&](int l) { return static_cast<const Input*>(inputs[l]); };
                   ++launches.back().matrix_loads;
                   for (int matrix = 0; matrix < 4; ++matrix) {
                     int hits[8] = {};  // of each 16 of the 128 bytes that one access covers
                     for (int i = 0; i < 8; ++i) ++hits[at(8 * matrix + i)->row / 16 % 8];
                     launches.back().bank_conflicts += *std::max_element(hits, hits + 8) - 1;
                     for (int l = 0; l < 32; ++l) {
                       uint16_t pair[2];
                       for (int i = 0; i < 2; ++i) {
                         int r = l / 4;
                         int c = l % 4 * 2 + i;
                         if (at(0)->transposed) std::swap(r, c);
                         pair[i] = reinterpret_cast<const uint16_t*>(at(8 * matrix + r)->row)[c];
                       }
                       static_cast<uint32_t*>(outputs[l])[matrix] = pair[0] | uint32_t{pair[1]} << 16;
                     }
                   }
                 });
}

void watch(std::vector<std::pair<const void*, size_t>> ranges) {
  buffers.clear();
  for (const auto& [begin, size] : ranges) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    buffers.push_back({address, address + size, {}, {}, std::vector<bool>(size)});
  }
}

namespace {

void start_block(int threads, const std::vector<char*>& stacks) {
  fibers.assign(threads, {});
  for (Fiber& fiber : fibers) fiber.waited = !overlaps;
  ready.assign(threads / 32, {});
  meetings.assign(threads / 32, {});
  at_barrier.clear();
  priority.resize(threads / 32);
  for (uint32_t& p : priority) p = random_number();
  ready_count = 0;
  live = threads;
  ++barrier_count;
  for (int t = 0; t < threads; ++t) {
    fibers[t].stack = stacks[t];
    // What emulator_switch pops: six registers, then the address to return to.
    void** top = reinterpret_cast<void**>(stacks[t] + kStackBytes) - 2;
    top[1] = nullptr;
    top[0] = reinterpret_cast<void*>(fiber_entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    fibers[t].stack_pointer = top;
    wake(t);
  }
}

void run_block() {
  const bool random = options.seed != 0;
  while (ready_count > 0 && !failed) {
    int warp = -1;
    for (int i = 0; i < static_cast<int>(ready.size()); ++i) {
      if (!ready[i].empty() && (warp < 0 || (random && priority[i] > priority[warp]))) warp = i;
    }
    auto& queue = ready[warp];
    const size_t index = random ? random_number() % queue.size() : queue.size() - 1;
    current = queue[index];
    queue[index] = queue.back();
    queue.pop_back();
    --ready_count;
    if (random && random_number() % 512 == 0) priority[warp] = random_number();
    threadIdx = {static_cast<unsigned>(current), 0, 0};
    void* save = nullptr;
    before_switch(&save, fibers[current].stack, kStackBytes);
    emulator_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
    after_switch(save, nullptr, nullptr);
  }
  if (failed || live == 0) return;
  failed = true;
  for (const Fiber& fiber : fibers) {
    if (fiber.done) continue;
    error = "deadlock: " + std::to_string(live) + " of " + std::to_string(fibers.size()) +
            " threads wait, one at " + (fiber.waits_at ? fiber.waits_at : "nothing");
    break;
  }
}

}  // namespace

bool launch(const void* kernel,
            dim3 grid,
            int threads,
            int shared_bytes,
            const void* arguments,
            size_t arguments_size,
            bool overlaps_before,
            const std::function<void()>& body) {
  Dl_info symbol{};
  dladdr(kernel, &symbol);
  launches.push_back({.kernel = symbol.dli_sname ? symbol.dli_sname : "?",
                      .grid = grid,
                      .threads = threads,
                      .shared_bytes = shared_bytes,
                      .arguments = std::string(static_cast<const char*>(arguments), arguments_size)});
  failed = false;
  error.clear();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || threads % 32) {
    error = "a launch of an impossible size";
    return false;
  }
  if (grid.y > 65535 || grid.z > 65535) {
    error = "a grid of more than 65535 in y or z";
    return false;
  }
  if (options.only_record) return true;
  for (Buffer& buffer : buffers) {
    buffer.read.assign(buffer.end - buffer.begin, false);
    buffer.written.assign(buffer.end - buffer.begin, false);
    if (!overlaps_before) buffer.unsettled.assign(buffer.end - buffer.begin, false);
  }
  overlaps = overlaps_before;
  random_state = options.seed * 2654435761u + 1;
  gridDim = grid;
  blockDim = dim3(threads);
  kernel_body = &body;
  std::vector<char*> stacks(threads);
  for (char*& stack : stacks) {
    stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (options.seed)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  for (const unsigned block : order) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    // Of the exact size: an address sanitizer sees the first byte past the end.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) std::abort();
    shared = static_cast<unsigned char*>(memory);
    shared_size = shared_bytes;
    std::memset(shared, 0xff, shared_bytes);
    shadow.assign(options.races ? shared_bytes : 0, {});
    start_block(threads, stacks);
    run_block();
    current = -1;
    std::free(memory);
    if (failed) break;
  }
  for (char* stack : stacks) munmap(stack, kStackBytes);
  for (Buffer& buffer : buffers) {
    for (size_t i = 0; i < buffer.written.size(); ++i) {
      if (buffer.written[i]) buffer.unsettled[i] = true;
    }
    launches.back().traffic.emplace_back(std::count(buffer.read.begin(), buffer.read.end(), true),
                                         std::count(buffer.written.begin(), buffer.written.end(), true));
  }
  return !failed;
}

}  // namespace emulator

// g++ -fsanitize=thread makes the kernels' file call these before each access; the real runtime isn't linked.
extern "C" {
#define EMULATOR_HOOKS(size)                                                                     \
  void __tsan_read##size(void* p) { emulator::note_access(p, size, emulator::kRead); }           \
  void __tsan_write##size(void* p) { emulator::note_access(p, size, emulator::kWrite); }         \
  void __tsan_unaligned_read##size(void* p) { emulator::note_access(p, size, emulator::kRead); } \
  void __tsan_unaligned_write##size(void* p) { emulator::note_access(p, size, emulator::kWrite); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emulator::note_access(p, n, emulator::kRead); }
void __tsan_write_range(void* p, size_t n) { emulator::note_access(p, n, emulator::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  emulator::note_access(from, n, emulator::kRead);
  emulator::note_access(to, n, emulator::kWrite);
  return std::memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  emulator::note_access(to, n, emulator::kWrite);
  return std::memset(to, value, n);
}
}
