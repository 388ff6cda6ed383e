// The matrix products of AMX, whose registers are tiles: 16 rows of 64 bytes. Included inside the namespace
// and the target region of an instruction set with AMX and AVX-512, after its dot_*.h. The interface is that
// of products_vector.h.
//
// Products of bytes are exact, as they are everywhere. Products in float are made of bfloat16, 16 times the
// rate of AVX-512: a float is exactly the sum of three of them (8 + 8 + 8 bits), x = h + m + l, and
//     x y = h h' + h m' + m h' + h l' + m m' + l h' + less than 2^-21 |x y|
// (Henry, Tang and Heinecke, arXiv 1904.06376). TDPBF16PS adds the products up in float, so a result is as
// exact as an FMA's; but it takes subnormal numbers, parts and products among them, as 0.

// clang-format off: each builds on the one before
#include "cpu/vec_math.h"
#include "cpu/multiply_tile.h"
// clang-format on

// A strip is up to kStripRows rows, two tiles of inputs, and meets two tiles of weights, a panel's width:
// each tile that is loaded takes part in two products at least.
//     tiles 0 to 3: sums, row by row; 4 and 5: inputs; 6 and 7: weights
// Inputs lie as tiles, one after the other, so that reading a strip is reading memory in order.
constexpr int64_t kTileRowsMost = 16;
static_assert(kStripRows == 2 * kTileRowsMost && kPanelWidth == 2 * kTileRowsMost);

// A unit is a strip: what follows its product then finds the sums in the first-level cache. Units of four
// strips took 1.03 (int8) to 1.07 times as long at 4,096 tokens.
constexpr int64_t kUnitRows = kStripRows;
constexpr int64_t kQueryRows = kStripRows;
constexpr int64_t kRowStep = kTileRowsMost;

// Of one tile: inputs in bytes and in bfloat16.
constexpr int64_t kTileBytes = 64;
constexpr int64_t kTileHalves = 32;
constexpr int64_t kTileSize = kTileRowsMost * kTileHalves;

// ------------------------------------------------------------------------------------------- tile registers

template <int kTile>
PACKEDBERT_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// stride: bytes between rows.
template <int kTile>
PACKEDBERT_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PACKEDBERT_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kSum, int kInputs, int kWeights>
PACKEDBERT_INLINE void multiply_halves() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kInputs), "i"(kWeights));
}
template <int kSum, int kInputs, int kWeights>
PACKEDBERT_INLINE void multiply_bytes() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kInputs), "i"(kWeights));
}

// The operand of LDTILECFG (Intel SDM): the shape of each tile. All have all rows: those that there are no
// inputs for cost little, as long as there are many others.
struct TileShapes {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) inline constexpr TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof(TileShapes) == 64);

// ------------------------------------------------------------------------------------------------- in float

// x = high + middle + low, each a bfloat16, which is the upper half of a float: these are the upper halves of
// the three. The first is rounded (halves away from 0), so that what it leaves has 16 bits and either sign;
// the second is cut off, and leaves 8. All is exact. Were the first one cut off too, the products that are
// left out would all have the sign of x y.
struct Split {
  __m512i high;
  __m512i middle;
  __m512i low;

  explicit PACKEDBERT_INLINE Split(__m512 x) {
    high = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    const __m512 rest = _mm512_sub_ps(x, value(high));
    middle = _mm512_castps_si512(rest);
    low = _mm512_castps_si512(_mm512_sub_ps(rest, value(middle)));
  }
  static PACKEDBERT_INLINE __m512i upper_halves() {
    return _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  }
  static PACKEDBERT_INLINE __m512 value(__m512i upper) {
    return _mm512_castsi512_ps(_mm512_and_si512(upper, upper_halves()));
  }
};

// So many inputs are added up in tiles; longer sums in blocks, which rounds less.
constexpr int64_t kSumDepth = 768;

// Which inputs of a block a step multiplies: a few of each of its quarters, while there are whole steps of
// them. Neighbouring inputs would be one page of weights a step, and the processor, which reads ahead within
// a page and only 20 lines (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Data
// Prefetching"), would begin anew with every step: that took 1.15 to 1.2 times as long at 32 to 128 tokens.
constexpr int64_t kQuarter = kTileHalves / 4;
struct StepInputs {
  int64_t first;
  int64_t stride;  // from those of one quarter to those of the next
  int64_t count;   // kTileHalves, or fewer

  PACKEDBERT_INLINE StepInputs(int64_t step, int64_t depth) {
    const int64_t whole = depth / kTileHalves;
    const bool last = step >= whole;
    first = last ? whole * kTileHalves : step * kQuarter;
    stride = last ? kQuarter : whole * kQuarter;
    count = last ? depth - first : kTileHalves;
  }
};

// The inputs of a product in float, split.
struct FloatRows {
  static constexpr bool kPrepared = true;

  const float* values;
  int64_t stride;
  int32_t* damaged;  // [rows]: 1 where a row has a NaN or an infinity, also after rounding
  uint16_t* planes;  // [tiles of rows, steps, kPlanes, kTileRowsMost, kTileHalves]
  int64_t tile_size;

  static constexpr int64_t size(int64_t rows, int64_t in_features) {
    return split_rows_size(rows, in_features);
  }
  static FloatRows in(
      const float* values, int64_t stride, float* scratch, int64_t rows, int64_t in_features) {
    if (!scratch) return {values, stride, nullptr, nullptr, 0};
    return {values, stride, reinterpret_cast<int32_t*>(scratch),
            reinterpret_cast<uint16_t*>(scratch + whole_lines(rows)),
            ceil_div(in_features, kTileHalves) * kPlanes * kTileSize};
  }

  void prepare(int64_t row, int64_t in_features) const {
    if (!planes) return;
    const float* x = values + row * stride;
    uint16_t* to = planes + row / kTileRowsMost * tile_size + row % kTileRowsMost * kTileHalves;
    // The upper halves of two vectors, the first one's first.
    alignas(64) static constexpr uint16_t order[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                       23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                       45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(order);
    Vec damage = Vec::zero();
    for (int64_t k = 0; k < in_features; k += kSumDepth) {
      const int64_t depth = smaller(kSumDepth, in_features - k);
      for (int64_t step = 0; step < ceil_div(depth, kTileHalves); ++step, to += kPlanes * kTileSize) {
        const StepInputs inputs(step, depth);
        const auto load = [&](int64_t quarter) PACKEDBERT_INLINE_LAMBDA {
          const float* from = x + k + inputs.first + quarter * inputs.stride;
          const int64_t left = inputs.count - quarter * kQuarter;
          if (left >= kQuarter) return _mm256_loadu_ps(from);
          return _mm256_maskz_loadu_ps(static_cast<__mmask8>(left > 0 ? (1 << left) - 1 : 0), from);
        };
        const auto load_two = [&](int64_t quarter) PACKEDBERT_INLINE_LAMBDA {
          return _mm512_insertf32x8(_mm512_castps256_ps512(load(quarter)), load(quarter + 1), 1);
        };
        const Split a(load_two(0));
        const Split b(load_two(2));
        damage = fma(Vec::zero(), Vec{Split::value(a.high)} + Vec{Split::value(b.high)}, damage);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a.high, odd, b.high));
        _mm512_storeu_si512(to + kTileSize, _mm512_permutex2var_epi16(a.middle, odd, b.middle));
        _mm512_storeu_si512(to + 2 * kTileSize, _mm512_permutex2var_epi16(a.low, odd, b.low));
      }
    }
    damaged[row] = has_nan(damage) ? 1 : 0;
  }
};

// The weights of a step, kTileHalves inputs, split: [kPlanes, two tiles], a row of which has 16 columns'
// pairs of inputs.
constexpr int64_t kStepSize = kPlanes * 2 * kTileSize;

// To be alive on a thread while it multiplies.
struct ProductScope {
  ProductScope() { __asm__ volatile("ldtilecfg %0" : : "m"(kTileShapes)); }
  // As long as tiles hold something they are saved at every switch of threads.
  ~ProductScope() { __asm__ volatile("tilerelease"); }

  // Weights of one step, split, and the place for those of the next.
  alignas(64) uint16_t weights[2][kStepSize];
  int turn = 0;
  // The block whose first step is in weights[turn], and whose second one's early pairs are in the other.
  const float* ready = nullptr;
};

// Where the weights of a step lie in a block of a panel; null where there are none.
struct StepWeights {
  const float* from;  // [4, kQuarter, kPanelWidth], `stride` from quarter to quarter
  int64_t stride;
  int64_t inputs;  // kTileHalves, or fewer

  static PACKEDBERT_INLINE StepWeights of(const float* block, int64_t depth, int64_t step) {
    if (!block) return {nullptr, 0, 0};
    const StepInputs inputs(step, depth);
    return {block + inputs.first * kPanelWidth, inputs.stride * kPanelWidth, inputs.count};
  }
  PACKEDBERT_INLINE bool whole() const { return inputs == kTileHalves; }
  PACKEDBERT_INLINE const float* at(int64_t pair) const {
    constexpr int64_t kPairs = kQuarter / 2;
    return from + pair / kPairs * stride + pair % kPairs * 2 * kPanelWidth;
  }
};

// A strip's inputs: the first tile, and `below` more the second one, or 0 where there is one tile.
struct Strip {
  const uint16_t* inputs;
  int64_t below;

  PACKEDBERT_INLINE Strip of_step(int64_t step) const { return {inputs + step * kPlanes * kTileSize, below}; }
};

// What a step needs, on its way: its weights are split, its inputs brought to the first-level cache, and so
// are the weights of a step after it. The second-level cache alone keeps tiles waiting: 1.08 times as long.
struct StepAhead {
  StepWeights weights;
  uint16_t* to;         // [kStepSize]
  StepWeights fetched;  // a whole step
  Strip strip;          // of the step

  // Of a pair of inputs.
  static PACKEDBERT_INLINE void split(__m512 x, __m512 y, uint16_t* row) {
    const Split a(x);
    const Split b(y);
    const auto store = [&](int64_t plane, __m512i first, __m512i second) PACKEDBERT_INLINE_LAMBDA {
      constexpr int kFirstOrUpperSecond = 0xf8;  // a | (b & c)
      _mm512_store_si512(row + plane * 2 * kTileSize,
                         _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second,
                                                   Split::upper_halves(), kFirstOrUpperSecond));
    };
    store(0, a.high, b.high);
    store(1, a.middle, b.middle);
    store(2, a.low, b.low);
  }

  // Pairs [kBegin, kEnd), and the like share of the rest.
  template <int kBegin, int kEnd>
  PACKEDBERT_INLINE void prepare_pairs() const {
    if (!weights.whole()) return split_last_pairs(kBegin, kEnd);
    PACKEDBERT_UNROLL
    for (int64_t pair = kBegin; pair < kEnd; ++pair) {
      PACKEDBERT_UNROLL
      for (int64_t line = 0; line < 2 * kPanelWidth; line += kLine)
        __builtin_prefetch(fetched.at(pair) + line, 0, 3);
      PACKEDBERT_UNROLL
      for (int64_t plane = 0; plane < kPlanes; ++plane) {
        const uint16_t* inputs = strip.inputs + (pair * kPlanes + plane) * kTileHalves;
        __builtin_prefetch(inputs, 0, 3);
        __builtin_prefetch(inputs + strip.below, 0, 3);
      }
      PACKEDBERT_UNROLL
      for (int64_t half = 0; half < 2; ++half) {
        const float* x = weights.at(pair) + half * Vec::kWidth;
        split(_mm512_loadu_ps(x), _mm512_loadu_ps(x + kPanelWidth),
              to + half * kTileSize + pair * kTileHalves);
      }
    }
  }
  // The same, with 0 for the inputs that there are not.
  void split_last_pairs(int64_t begin, int64_t end) const {
    for (int64_t pair = begin; pair < end && weights.from; ++pair) {
      for (int64_t half = 0; half < 2; ++half) {
        const float* x = weights.at(pair) + half * Vec::kWidth;
        split(2 * pair < weights.inputs ? _mm512_loadu_ps(x) : _mm512_setzero_ps(),
              2 * pair + 1 < weights.inputs ? _mm512_loadu_ps(x + kPanelWidth) : _mm512_setzero_ps(),
              to + half * kTileSize + pair * kTileHalves);
      }
    }
  }
};

template <bool kTwo>
PACKEDBERT_INLINE void zero_sums() {
  zero_tile<0>(), zero_tile<1>();
  if constexpr (kTwo) zero_tile<2>(), zero_tile<3>();
}
template <bool kTwo>
PACKEDBERT_INLINE void store_sums(void* sums, int64_t row_bytes) {
  char* top = static_cast<char*>(sums);
  char* bottom = top + kTileRowsMost * row_bytes;
  store_tile<0>(top, row_bytes), store_tile<1>(top + kTileBytes, row_bytes);
  if constexpr (kTwo) store_tile<2>(bottom, row_bytes), store_tile<3>(bottom + kTileBytes, row_bytes);
}

// So many pairs of a step are split during the one before the last: see multiply_step.
constexpr int kEarlyPairs = 5;

// sums += inputs weights, of one step. Meanwhile, in the shadow of the products, the weights of the next one
// are split, all but the early pairs, which have been; and then those of the one after it: once the products
// have all weights in tiles, `weights`, where these lay, is to be its place. That leaves the last stores two
// products' time before a tile is loaded from them. Without it every step waited for them: 1.08 times as
// long.
template <bool kTwo>
PACKEDBERT_INLINE void multiply_step(const Strip& strip,
                                     const uint16_t* weights,
                                     const StepAhead& next,
                                     const StepAhead& after_next) {
  const auto load_inputs = [&](int64_t plane) PACKEDBERT_INLINE_LAMBDA {
    load_tile<4>(strip.inputs + plane * kTileSize, kTileBytes);
    if constexpr (kTwo) load_tile<5>(strip.inputs + strip.below + plane * kTileSize, kTileBytes);
  };
  const auto load_weights = [&](int64_t plane) PACKEDBERT_INLINE_LAMBDA {
    load_tile<6>(weights + 2 * plane * kTileSize, kTileBytes);
    load_tile<7>(weights + (2 * plane + 1) * kTileSize, kTileBytes);
  };
  const auto multiply = [&]() PACKEDBERT_INLINE_LAMBDA {
    multiply_halves<0, 4, 6>(), multiply_halves<1, 4, 7>();
    if constexpr (kTwo) multiply_halves<2, 5, 6>(), multiply_halves<3, 5, 7>();
  };
  // In this order one side stays in its tiles from each product to the next one.
  static_assert(kTileRowsMost == 16);
  load_inputs(0), load_weights(2), multiply(), next.prepare_pairs<kEarlyPairs, 8>();
  load_weights(1), multiply(), next.prepare_pairs<8, 11>();
  load_inputs(1), multiply(), next.prepare_pairs<11, 14>();
  load_weights(0), multiply(), next.prepare_pairs<14, 16>();
  load_inputs(2), multiply(), after_next.prepare_pairs<0, 3>();
  load_inputs(0), multiply(), after_next.prepare_pairs<3, kEarlyPairs>();
}

// sums [rows of a strip, kPanelWidth] = inputs panel^T, panel [depth, kPanelWidth], depth > 0.
// The weights of a step are split while those of the one before are multiplied, so that they never leave the
// first-level cache. Every strip does it anew: splitting them once, for all strips, was slower, because they
// came from the second-level cache then.
//   next: the block of weights after these, of next_depth inputs; or null.
template <bool kTwo>
void multiply_strip(Strip strip,
                    const float* panel,
                    int64_t depth,
                    const float* next,
                    int64_t next_depth,
                    float* sums,
                    int64_t sums_stride,
                    ProductScope& scope) {
  const int64_t steps = ceil_div(depth, kTileHalves);
  const auto weights = [&](int64_t step) PACKEDBERT_INLINE_LAMBDA {
    return step < steps ? StepWeights::of(panel, depth, step)
                        : StepWeights::of(next, next_depth, step - steps);
  };
  const auto ahead = [&](int64_t step, uint16_t* to) PACKEDBERT_INLINE_LAMBDA {
    const StepWeights fetched = weights(step + 1);
    return StepAhead{weights(step), to, fetched.whole() ? fetched : weights(0),
                     strip.of_step(step < steps ? step : 0)};
  };
  if (scope.ready != panel) {
    ahead(0, scope.weights[scope.turn]).split_last_pairs(0, kTileRowsMost);
    ahead(1, scope.weights[1 - scope.turn]).split_last_pairs(0, kEarlyPairs);
  }
  zero_sums<kTwo>();
  for (int64_t step = 0; step < steps; ++step) {
    uint16_t* ready = scope.weights[scope.turn];
    scope.turn = 1 - scope.turn;
    multiply_step<kTwo>(strip.of_step(step), ready, ahead(step + 1, scope.weights[scope.turn]),
                        ahead(step + 2, ready));
  }
  store_sums<kTwo>(sums, sums_stride * 4);
  // Of a next block that is a single step, what comes after it isn't known here.
  scope.ready = next_depth > kTileHalves ? next : nullptr;
}

// As in products_vector.h. Rows with a NaN or an infinity, which a difference would make a NaN at once, are
// multiplied by FMAs. Splitting weights keeps the core busy, so nothing else is done during a product: that
// took 1.00 to 1.04 of the time.
template <typename Meanwhile>
PACKEDBERT_INLINE void multiply_floats(const FloatRows& rows,
                                       int64_t first_row,
                                       int64_t count,
                                       const float* panel,
                                       const float* next_panel,
                                       int64_t columns,
                                       int64_t depth,
                                       float* tile,
                                       int64_t tile_stride,
                                       Prefetch /*ahead*/,
                                       ProductScope& scope,
                                       const Meanwhile& meanwhile) {
  meanwhile(0, 1);
  const auto use_fma = [&](int64_t row, int64_t few) {
    multiply_tile(rows.values + (first_row + row) * rows.stride, rows.stride, few, panel, columns, depth,
                  tile + row * tile_stride, tile_stride, no_prefetch(panel));
  };
  if (!rows.planes || depth == 0) {
    for (int64_t row = 0; row < count; row += kTileRows) use_fma(row, smaller(kTileRows, count - row));
    return;
  }
  const auto multiply = count > kTileRowsMost ? multiply_strip<true> : multiply_strip<false>;
  const uint16_t* inputs = rows.planes + first_row / kTileRowsMost * rows.tile_size;
  for (int64_t k = 0; k < depth; k += kSumDepth) {
    alignas(64) float more[kStripRows * kPanelWidth];
    const Strip strip{inputs + k * kPlanes * kTileRowsMost, count > kTileRowsMost ? rows.tile_size : 0};
    const int64_t after = k + kSumDepth;
    const float* next = after < depth ? panel + after * kPanelWidth : next_panel;
    const int64_t next_depth = smaller(kSumDepth, after < depth ? depth - after : depth);
    multiply(strip, panel + k * kPanelWidth, smaller(kSumDepth, depth - k), next, next_depth,
             k == 0 ? tile : more, k == 0 ? tile_stride : kPanelWidth, scope);
    for (int64_t row = 0; k > 0 && row < count; ++row) {
      for (int64_t j = 0; j < kPanelWidth; j += Vec::kWidth) {
        float* sum = tile + row * tile_stride + j;
        (Vec::load(sum) + Vec::load(more + row * kPanelWidth + j)).store(sum);
      }
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    if (rows.damaged[first_row + row]) use_fma(row, 1);
  }
}

// -------------------------------------------------------------------------------------------------- in int8

// The inputs of a quantized matrix.
struct QuantizedRows {
  static_assert(sizeof(Dot::Input) == 1);

  float* scale;         // [rows]
  int32_t* zero_point;  // [rows]
  Dot::Input* values;   // [tiles of rows, steps, kTileRowsMost, kTileBytes]
  int64_t tile_size;

  // In scratch memory of quantized_rows_size(rows, at least in_features) floats.
  static QuantizedRows in(float* scratch, int64_t rows, int64_t in_features) {
    return {scratch, reinterpret_cast<int32_t*>(scratch + rows),
            reinterpret_cast<Dot::Input*>(scratch + whole_lines(2 * rows)),
            ceil_div(in_features, kTileBytes) * kTileRowsMost * kTileBytes};
  }
  // The inputs from i on, a multiple of Vec::kWidth, up to the next one.
  PACKEDBERT_INLINE Dot::Input* at(int64_t row, int64_t i) const {
    return values + row / kTileRowsMost * tile_size + i / kTileBytes * kTileRowsMost * kTileBytes +
           row % kTileRowsMost * kTileBytes + i % kTileBytes;
  }
};

#include "cpu/quantize_rows.h"

// A strip alone fetches weights so many steps ahead. Half of a step's lines before what is done meanwhile,
// half after it: prefetches wait for free buffers, and what follows waits behind them. Reading and finishing
// tiles took turns without it: 1.01 to 1.03 times as long with warm caches, 1.15 to 1.2 with cold ones.
constexpr int64_t kStepsAhead = 2;

// sums [rows of a strip, kPanelWidth] of products of bytes. The tiles' units work on their own: what is
// called meanwhile takes the others of the core.
//   inputs: its first tile, and with kTwo `below` more the second one; panel [steps, kTileRowsMost,
//   kPanelWidth, kGroup]; tail: another step of it, or null; ahead: memory to prefetch, `lines` a step;
//   meanwhile: as in multiply_floats.
template <bool kTwo, typename Meanwhile>
PACKEDBERT_INLINE void multiply_byte_strip(const uint8_t* inputs,
                                           int64_t below,
                                           const int8_t* panel,
                                           int64_t steps,
                                           const int8_t* tail,
                                           int32_t* sums,
                                           const char* ahead,
                                           int64_t lines,
                                           const Meanwhile& meanwhile) {
  constexpr int64_t kPanelRow = kPanelWidth * kGroup;
  const auto multiply = [&](const int8_t* weights) PACKEDBERT_INLINE_LAMBDA {
    load_tile<4>(inputs, kTileBytes);
    load_tile<6>(weights, kPanelRow);
    load_tile<7>(weights + kPanelRow / 2, kPanelRow);
    multiply_bytes<0, 4, 6>(), multiply_bytes<1, 4, 7>();
    if constexpr (kTwo) {
      load_tile<5>(inputs + below, kTileBytes);
      multiply_bytes<2, 5, 6>(), multiply_bytes<3, 5, 7>();
    }
    inputs += kTileRowsMost * kTileBytes;
  };
  zero_sums<kTwo>();
  const auto prefetch = [&](int64_t count) PACKEDBERT_INLINE_LAMBDA {
    for (int64_t line = 0; line < count; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  };
  for (int64_t step = 0; step < steps; ++step, panel += kTileRowsMost * kPanelRow) {
    multiply(panel);
    prefetch(lines / 2);
    meanwhile(step, steps);
    prefetch(lines - lines / 2);
  }
  if (tail) multiply(tail);
  if (steps == 0) meanwhile(0, 1);
  store_sums<kTwo>(sums, kPanelWidth * 4);
}

// As in multiply_quantized.h, for up to kUnitRows rows. sums are integers until complete_quantized.
template <typename Meanwhile>
PACKEDBERT_INLINE void multiply_quantized(const QuantizedRows& rows,
                                          int64_t first_row,
                                          int64_t count,
                                          const QuantizedPanel& panel,
                                          int64_t /*columns*/,
                                          float* sums,
                                          Prefetch ahead,
                                          const Meanwhile& meanwhile) {
  constexpr int64_t kStepBytesOfPanel = kTileRowsMost * kPanelWidth * kGroup;
  alignas(64) int8_t last[kStepBytesOfPanel];
  const int64_t steps = panel.groups / kTileRowsMost;
  const int64_t left = panel.groups % kTileRowsMost * kPanelWidth * kGroup;
  if (left > 0) {
    // The inputs beyond the last one are whatever lies there; the weights have to be zero, and the panel to
    // end where it does.
    __builtin_memcpy(last, panel.values + steps * kStepBytesOfPanel, static_cast<size_t>(left));
    __builtin_memset(last + left, 0, static_cast<size_t>(kStepBytesOfPanel - left));
  }
  // A strip that meets its panel alone would have all of the next one to fetch: it fetches its own instead.
  const bool alone = ahead.bytes >= kPanelWidth * kGroup;
  if (alone) ahead.from = reinterpret_cast<const char*>(panel.values + kStepsAhead * kStepBytesOfPanel);
  const int64_t lines = steps == 0 ? 0 : panel.groups * ahead.bytes / 64 / steps;
  const uint8_t* inputs = rows.values + first_row / kTileRowsMost * rows.tile_size;
  const int8_t* tail = left > 0 ? last : nullptr;
  int32_t* integers = reinterpret_cast<int32_t*>(sums);
  if (count > kTileRowsMost) {
    multiply_byte_strip<true>(inputs, rows.tile_size, panel.values, steps, tail, integers, ahead.from, lines,
                              meanwhile);
  } else {
    multiply_byte_strip<false>(inputs, rows.tile_size, panel.values, steps, tail, integers, ahead.from, lines,
                               meanwhile);
  }
}

// tile = the integers of the rows [begin, end) of a strip as floats, with tile_stride between rows; it may be
// sums.
PACKEDBERT_INLINE void convert_sums(const QuantizedRows& rows,
                                    int64_t first_row,
                                    int64_t begin,
                                    int64_t end,
                                    const QuantizedPanel& panel,
                                    const float* sums,
                                    float* tile,
                                    int64_t tile_stride) {
  for (int64_t row = begin; row < end; ++row) {
    const __m512i shift = _mm512_set1_epi32(-rows.zero_point[first_row + row]);
    const Vec row_scale = Vec::broadcast(rows.scale[first_row + row]);
    PACKEDBERT_UNROLL
    for (int64_t j = 0; j < kPanelWidth; j += Vec::kWidth) {
      // sum (input - zero_point) weight = sum input weight - zero_point sum weight
      const __m512i correction = _mm512_mullo_epi32(shift, _mm512_loadu_si512(panel.column_sums + j));
      const __m512i integers = _mm512_add_epi32(_mm512_load_si512(sums + row * kPanelWidth + j), correction);
      (Vec{_mm512_cvtepi32_ps(integers)} * (row_scale * Vec::load(panel.scale + j)))
          .store(tile + row * tile_stride + j);
    }
  }
}

PACKEDBERT_INLINE void complete_quantized(const QuantizedRows& rows,
                                          int64_t first_row,
                                          int64_t begin,
                                          int64_t end,
                                          const QuantizedPanel& panel,
                                          float* sums) {
  convert_sums(rows, first_row, begin, end, panel, sums, sums, kPanelWidth);
}

// As in multiply_quantized.h, for up to kUnitRows rows.
inline void multiply_quantized_panel(const QuantizedRows& rows,
                                     int64_t first_row,
                                     int64_t count,
                                     const QuantizedPanel& panel,
                                     int64_t columns,
                                     float* tile,
                                     int64_t tile_stride,
                                     Prefetch ahead) {
  alignas(64) float sums[kStripRows * kPanelWidth];
  multiply_quantized(rows, first_row, count, panel, columns, sums, ahead, Nothing{});
  convert_sums(rows, first_row, 0, count, panel, sums, tile, tile_stride);
}
