// Runs a .cu file on the host. The file is compiled by a C++ compiler with -DPACKEDBERT_EMULATED and this
// header included first; emulator.cpp runs its threads as fibers, one at a time, a block after the other.
//
// What it checks while it runs: barriers that not all threads reach, warp-wide operations that not all lanes
// of their mask reach, deadlocks, alignment and bounds of copies and matrix loads. Shared memory is a heap
// block of the exact size, filled with NaN. Copies by cp.async land when they are waited for, and are NaN
// until then. Compiled with -fsanitize=thread, whose hooks emulator.cpp implements itself, each access is
// also checked for races within the block and counted, and, where a Queue overlaps, for being made before
// what came before is waited for; with -fsanitize=address, for bounds.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

struct Options {
  uint64_t seed = 0;         // 0: warp after warp, each as far as it gets; else random priorities of warps
  int copies_land = 1;       // cp.async: 0 at once, 1 when waited for, 2 either, at random
  bool races = false;        // check for races (in a build with -fsanitize=thread)
  bool only_record = false;  // don't run: only note what is launched
  bool overlaps = false;     // the Queue that encoders get
};

// A kernel that was launched, and what it did.
struct Launch {
  std::string kernel;  // mangled name
  dim3 grid;
  int threads;
  int shared_bytes;
  std::string arguments;  // the bytes of its parameter
  uint64_t matrix_loads = 0;
  uint64_t bank_conflicts = 0;  // of ldmatrix
  uint64_t multiplications = 0;
  // Distinct bytes of each buffer, in a build with -fsanitize=thread: [buffer] -> read, written.
  std::vector<std::pair<uint64_t, uint64_t>> traffic;
};

extern Options options;
extern std::vector<Launch> launches;
void watch(std::vector<std::pair<const void*, size_t>> buffers);  // whose traffic is counted
const std::string& last_error();

bool launch(const void* kernel,
            dim3 grid,
            int threads,
            int shared_bytes,
            const void* arguments,
            size_t arguments_size,
            bool overlaps,
            const std::function<void()>& body);

[[noreturn]] void fail(const char* format, ...);
unsigned char* shared_memory();
void barrier(const char* where);
int lane();

// One operation of all lanes in `mask`; the last lane to arrive runs it for all.
using WarpOperation = void (*)(unsigned mask, const void* const* inputs, void* const* outputs);
void warp_operation(const char* name, unsigned mask, const void* input, void* output, WarpOperation run);

void copy_async(void* target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int pending);
void wait_for_kernel_before();
void note_written(const void* data, size_t size);  // by a kernel that is not ours
void load_matrices(uint32_t (&matrices)[4], uintptr_t row, bool transposed);

template <typename T>
float widen(uint16_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
  };
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  warp_operation(
      "mma.m16n8k16", ~0u, &mine, sums, [](unsigned, const void* const* inputs, void* const* outputs) {
        launches.back().multiplications++;
        float a[16][16];
        float b[8][16];  // [column][k]
        const auto half = [](uint32_t word, int i) { return static_cast<uint16_t>(word >> (16 * (i & 1))); };
        for (int l = 0; l < 32; ++l) {
          const Fragments& f = *static_cast<const Fragments*>(inputs[l]);
          const int group = l / 4;
          const int thread = l % 4;
          for (int i = 0; i < 8; ++i)
            a[group + 8 * (i / 2 % 2)][2 * thread + i % 2 + 8 * (i / 4)] = widen<T>(half(f.a[i / 2], i));
          for (int i = 0; i < 4; ++i)
            b[group][2 * thread + i % 2 + 8 * (i / 2)] = widen<T>(half(f.b[i / 2], i));
        }
        for (int l = 0; l < 32; ++l) {
          float* sums = static_cast<float*>(outputs[l]);
          for (int i = 0; i < 4; ++i) {
            const float* row = a[l / 4 + 8 * (i / 2)];
            const float* column = b[l % 4 * 2 + i % 2];
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            sums[i] += sum;
          }
        }
      });
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int from) {
  struct Input {
    T value;
    int from;
  };
  const Input input{value, from};
  T output;
  warp_operation(name, mask, &input, &output,
                 [](unsigned mask, const void* const* inputs, void* const* outputs) {
                   for (int l = 0; l < 32; ++l) {
                     if (!(mask >> l & 1)) continue;
                     const int from = static_cast<const Input*>(inputs[l])->from;
                     if (!(mask >> from & 1))
                       fail("a shuffle reads lane %d, which is not in its mask %08x", from, mask);
                     *static_cast<T*>(outputs[l]) = static_cast<const Input*>(inputs[from])->value;
                   }
                 });
  return output;
}

}  // namespace emulator

#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define __syncthreads() emulator::barrier(__FILE__ ":" EMULATOR_TEXT(__LINE__))

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulator::shuffle("shfl.bfly", mask, value, emulator::lane() ^ distance);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::shuffle("shfl.idx", mask, value, from & 31);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return emulator::shuffle(
      "shfl.up", mask, value,
      std::max(emulator::lane() - distance, 0) + (emulator::lane() < distance ? emulator::lane() : 0));
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::warp_operation("syncwarp", mask, nullptr, nullptr,
                           [](unsigned, const void* const*, void* const*) {});
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned output;
  emulator::warp_operation("ballot", mask, &predicate, &output,
                           [](unsigned mask, const void* const* inputs, void* const* outputs) {
                             unsigned bits = 0;
                             for (int l = 0; l < 32; ++l)
                               if (mask >> l & 1)
                                 bits |= unsigned{*static_cast<const int*>(inputs[l]) != 0} << l;
                             for (int l = 0; l < 32; ++l)
                               if (mask >> l & 1) *static_cast<unsigned*>(outputs[l]) = bits;
                           });
  return output;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
using std::max;
using std::min;
