// Prints what the processor can do when nothing has to be loaded, with as many threads as the argument says:
// FLOP/s of fused multiply-adds, and op/s of the int8 products that packedbert's kernels use (vpdpbusd where
// it is compiled with VNNI, else vpmaddwd and vpaddd on bytes that were widened). Enough chains on registers
// alone hide the latency. With AMX two more: FLOP/s of float32 products that are made of six bfloat16 ones in
// tiles, and op/s of int8 products in tiles.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Fma {
  static constexpr long kSteps = 20'000'000;
#ifdef __AVX512F__
  static constexpr int kOperations = 2 * 16, kChains = 24;
  __m512 value;
  explicit Fma(int i) : value(_mm512_set1_ps(float(i))) {}
  void step(const Fma& a, const Fma& b) { value = _mm512_fmadd_ps(value, a.value, b.value); }
#else
  static constexpr int kOperations = 2 * 8, kChains = 12;
  __m256 value;
  explicit Fma(int i) : value(_mm256_set1_ps(float(i))) {}
  void step(const Fma& a, const Fma& b) { value = _mm256_fmadd_ps(value, a.value, b.value); }
#endif
};

struct Dot {
  static constexpr long kSteps = 20'000'000;
#ifdef __AVX512F__
  static constexpr int kChains = 24;
  __m512i value;
  explicit Dot(int i) : value(_mm512_set1_epi32(i)) {}
#ifdef __AVX512VNNI__
  static constexpr int kOperations = 2 * 64;
  void step(const Dot& a, const Dot& b) {
    __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(value) : "v"(a.value), "v"(b.value));
  }
#else
  static constexpr int kOperations = 2 * 32;
  void step(const Dot& a, const Dot& b) {
    __m512i product;
    __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                     : "+v"(value), "=&v"(product)
                     : "v"(a.value), "v"(b.value));
  }
#endif
#else
  static constexpr int kChains = 12;
  __m256i value;
  explicit Dot(int i) : value(_mm256_set1_epi32(i)) {}
#ifdef __AVXVNNI__
  static constexpr int kOperations = 2 * 32;
  void step(const Dot& a, const Dot& b) {
    __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(value) : "x"(a.value), "x"(b.value));
  }
#else
  static constexpr int kOperations = 2 * 16;
  // The two instructions as they are: the compiler would see that the product is always the same.
  void step(const Dot& a, const Dot& b) {
    __m256i product;
    __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(value), "=&x"(product)
                     : "x"(a.value), "x"(b.value));
  }
#endif
#endif
};

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>

// Four sums in tiles, two tiles on each side.
struct TileShapes {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) const TileShapes shapes;
constexpr long kTileSteps = 5'000'000;

void tile_halves() {
  _tile_loadconfig(&shapes);
  for (long step = 0; step < kTileSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

void tile_bytes() {
  _tile_loadconfig(&shapes);
  for (long step = 0; step < kTileSteps; ++step) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif

volatile int sink;

template <typename Chain>
void work() {
  Chain chains[Chain::kChains] = {
#define CHAINS(i) Chain(i), Chain(i + 1), Chain(i + 2), Chain(i + 3)
      CHAINS(0),  CHAINS(4),  CHAINS(8),
#ifdef __AVX512F__
      CHAINS(12), CHAINS(16), CHAINS(20),
#endif
  };
  const Chain a(1), b(0);
  for (long step = 0; step < Chain::kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < Chain::kChains; ++i) chains[i].step(a, b);
  }
#pragma GCC unroll 24
  for (int i = 1; i < Chain::kChains; ++i) chains[0].step(chains[i], b);
  const Chain last = chains[0];
  sink = reinterpret_cast<const int*>(&last)[0];
}

double best_rate(int threads, void (*work)(), double operations) {
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) pool.emplace_back(work);
    for (std::thread& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations * threads / seconds.count());
  }
  return best;
}

template <typename Chain>
double best_chain_rate(int threads) {
  return best_rate(threads, work<Chain>, double(Chain::kOperations) * Chain::kChains * Chain::kSteps);
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  std::printf("%.0f %.0f", best_chain_rate<Fma>(threads), best_chain_rate<Dot>(threads));
#ifdef __AMX_TILE__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
    const double products = 4.0 * kTileSteps * 16 * 16;
    std::printf(" %.0f %.0f", best_rate(threads, tile_halves, products * 32 * 2 / 6),
                best_rate(threads, tile_bytes, products * 64 * 2));
  }
#endif
  std::printf("\n");
}
