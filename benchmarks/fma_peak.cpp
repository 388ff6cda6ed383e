// Prints the FLOP/s of fused multiply-adds on registers alone, with as many threads as the argument says: what the
// processor can do when nothing has to be loaded. 12 chains of AVX2 or 24 of AVX-512 hide the latency.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __AVX512F__
using Vec = __m512;
constexpr int kLanes = 16, kChains = 24;
static Vec broadcast(float x) { return _mm512_set1_ps(x); }
static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Vec = __m256;
constexpr int kLanes = 8, kChains = 12;
static Vec broadcast(float x) { return _mm256_set1_ps(x); }
static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif

constexpr long kSteps = 20'000'000;
volatile float sink;

static void work() {
  Vec sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = broadcast(float(i));
  const Vec factor = broadcast(0.999f), term = broadcast(0.001f);
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], factor, term);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = fma(sum[0], factor, sum[i]);
  sink = reinterpret_cast<float*>(&sum[0])[0];
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) pool.emplace_back(work);
    for (std::thread& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2.0 * kLanes * kChains * kSteps * threads / seconds.count());
  }
  std::printf("%.0f\n", best);
}
