// The matrix products of AMX, whose registers are tiles: 16 rows of 64 bytes. Included inside the namespace
// and the target region of an instruction set with AMX and AVX-512, after its dot_*.h. The interface is that
// of products_vector.h.
//
// Products of bytes are exact, as they are everywhere. Products in float are made of bfloat16, 16 times the
// rate of AVX-512: a float is exactly the sum of three of them (8 + 8 + 8 bits), x = h + m + l, and
//     x y = h h' + h m' + m h' + h l' + m m' + l h' + less than 2^-21 |x y|
// (Henry, Tang and Heinecke, arXiv 1904.06376). TDPBF16PS adds the products up in float, so a result is as
// exact as an FMA's; but it takes subnormal numbers, in and out, as 0.

// clang-format off
#include "cpu/vec_math.h"
#include "cpu/multiply_tile.h"
#include "cpu/quantize_rows.h"
// clang-format on

// A strip is up to kStripRows rows, two tiles of inputs, and meets two tiles of weights, a panel's width:
// each tile that is loaded takes part in two products at least.
//     tiles 0 to 3: sums, row by row; 4 and 5: inputs; 6 and 7: weights
constexpr int64_t kTileRowsMost = 16;
static_assert(kStripRows == 2 * kTileRowsMost && kPanelWidth == 2 * kTileRowsMost);

// Four strips: they share what it costs to split a block of weights.
constexpr int64_t kUnitRows = 4 * kStripRows;
constexpr int64_t kQueryRows = kStripRows;

// A strip's products of so many inputs are added up in tiles before the sums go to memory. The weights of as
// many, split, take half of the first-level cache.
constexpr int64_t kSplitDepth = 128;

// Of one tile: inputs in bytes and in bfloat16.
constexpr int64_t kTileBytes = 64;
constexpr int64_t kTileHalves = 32;

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

// The operand of LDTILECFG (Intel SDM): the shape of each tile.
struct TileShapes {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

// `count` rows as strips of `rows` each, the last of which may go beyond them.
struct Strips {
  int64_t rows;
  int64_t top;  // in tiles 0, 1 and 4; the rest in 2, 3 and 5

  explicit Strips(int64_t count) : rows(ceil_div(count, ceil_div(count, kStripRows))) {
    top = rows <= kTileRowsMost ? rows : ceil_div(rows, 2);
  }
  bool two() const { return rows > top; }
};

// The rows of the strips that this thread's tiles are shaped for; 0: for none.
inline thread_local int64_t shaped_rows = 0;

inline void shape_tiles(const Strips& strips) {
  if (shaped_rows == strips.rows) return;
  shaped_rows = strips.rows;
  alignas(64) TileShapes shapes{};
  shapes.palette = 1;
  const auto shape = [&](int tile, int64_t rows) {
    shapes.row_bytes[tile] = static_cast<uint16_t>(kTileBytes);
    shapes.rows[tile] = static_cast<uint8_t>(rows);
  };
  const int64_t bottom = strips.two() ? strips.rows - strips.top : 1;
  constexpr int kTop[] = {0, 1, 4}, kBottom[] = {2, 3, 5}, kWeights[] = {6, 7};
  for (const int tile : kTop) shape(tile, strips.top);
  for (const int tile : kBottom) shape(tile, bottom);
  for (const int tile : kWeights) shape(tile, kTileRowsMost);
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

// The thread gives its tiles back: as long as they hold something they are saved at every switch of threads.
struct ProductScope {
  ~ProductScope() {
    if (shaped_rows != 0) __asm__ volatile("tilerelease");
    shaped_rows = 0;
  }
};

// ------------------------------------------------------------------------------------------------- in float

// x = high + middle + low, each a bfloat16, which is the upper half of a float. Cutting off, not rounding,
// never overflows, and leaves 16 bits of the first difference and 8 of the second: both are exact.
struct Split {
  __m512i high;
  __m512i middle;
  __m512i low;

  explicit PACKEDBERT_INLINE Split(__m512 x) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    high = _mm512_castps_si512(x);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(high, upper)));
    middle = _mm512_castps_si512(rest);
    low = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_and_si512(middle, upper))));
  }
};

// The inputs of a product in float, split.
struct FloatRows {
  static constexpr bool kPrepared = true;

  const float* values;
  int64_t stride;
  int32_t* damaged;  // [rows]: 1 where a row has a NaN or an infinity
  uint16_t* planes;  // [rows, kPlanes, split_stride]
  int64_t plane_stride;

  static constexpr int64_t size(int64_t rows, int64_t in_features) {
    return split_rows_size(rows, in_features);
  }
  static FloatRows at(
      const float* values, int64_t stride, float* scratch, int64_t rows, int64_t in_features) {
    if (!scratch) return {values, stride, nullptr, nullptr, 0};
    return {values, stride, reinterpret_cast<int32_t*>(scratch),
            reinterpret_cast<uint16_t*>(scratch + whole_lines(rows)), split_stride(in_features)};
  }
  int64_t row_stride() const { return kPlanes * plane_stride; }

  void prepare(int64_t row, int64_t in_features) const {
    if (!planes) return;
    const float* x = values + row * stride;
    uint16_t* to = planes + row * row_stride();
    // The upper halves of two vectors, the first one's first.
    alignas(64) static constexpr uint16_t order[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                       23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                       45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(order);
    Vec damage = Vec::zero();
    for (int64_t i = 0; i < in_features; i += kTileHalves) {
      const int64_t left = in_features - i;
      const auto load = [&](int64_t j) PACKEDBERT_INLINE_LAMBDA {
        if (left >= kTileHalves) return Vec::load(x + i + j);
        return left > j ? Vec::load_partial(x + i + j, smaller(Vec::kWidth, left - j)) : Vec::zero();
      };
      const Vec first = load(0);
      const Vec second = load(Vec::kWidth);
      damage = fma(Vec::zero(), first + second, damage);
      const Split a(first.value);
      const Split b(second.value);
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a.high, odd, b.high));
      _mm512_storeu_si512(to + plane_stride + i, _mm512_permutex2var_epi16(a.middle, odd, b.middle));
      _mm512_storeu_si512(to + 2 * plane_stride + i, _mm512_permutex2var_epi16(a.low, odd, b.low));
    }
    damaged[row] = sum_of_lanes(damage) == 0.0f ? 0 : 1;
  }
};

// The weights of a step, kTileHalves inputs, split: [kPlanes, two tiles], a row of which has 16 columns'
// pairs of inputs.
constexpr int64_t kStepHalves = kPlanes * kTileHalves * kPanelWidth;

// to [steps, kStepHalves] = panel [depth, kPanelWidth], depth <= kSplitDepth; zero beyond it.
inline void split_weights(const float* panel, int64_t depth, uint16_t* to) {
  const __mmask32 odd = 0xaaaaaaaa;
  for (int64_t k = 0; k < depth; k += 2) {
    uint16_t* step = to + k / kTileHalves * kStepHalves + k % kTileHalves / 2 * kTileHalves;
    PACKEDBERT_UNROLL
    for (int64_t half = 0; half < 2; ++half) {
      const float* from = panel + k * kPanelWidth + half * Vec::kWidth;
      const Split a(_mm512_loadu_ps(from));
      const Split b(k + 1 < depth ? _mm512_loadu_ps(from + kPanelWidth) : _mm512_setzero_ps());
      const auto store = [&](int64_t plane, __m512i first, __m512i second) PACKEDBERT_INLINE_LAMBDA {
        uint16_t* tile = step + (plane * 2 + half) * kTileRowsMost * kTileHalves;
        _mm512_storeu_si512(tile, _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(first, 16), second));
      };
      store(0, a.high, b.high);
      store(1, a.middle, b.middle);
      store(2, a.low, b.low);
    }
  }
  for (int64_t k = (depth + 1) / 2 * 2; k % kTileHalves != 0; k += 2) {
    uint16_t* step = to + k / kTileHalves * kStepHalves + k % kTileHalves / 2 * kTileHalves;
    for (int64_t tile = 0; tile < 2 * kPlanes; ++tile)
      _mm512_storeu_si512(step + tile * kTileRowsMost * kTileHalves, _mm512_setzero_si512());
  }
}

template <int kFirst>
PACKEDBERT_INLINE void load_tiles(const void* first, const void* second, int64_t stride) {
  load_tile<kFirst>(first, stride);
  load_tile<kFirst + 1>(second, stride);
}

// sums [rows of a strip, kPanelWidth] = inputs weights, or += with `add`.
//   inputs: the planes of its first row; weights [steps, kStepHalves]; prefetch: so many lines a step.
template <bool kTwo>
inline void multiply_split_strip(const uint16_t* inputs,
                                 const FloatRows& rows,
                                 int64_t top,
                                 const uint16_t* weights,
                                 int64_t steps,
                                 bool add,
                                 float* sums,
                                 int64_t sums_stride,
                                 const char* ahead,
                                 int64_t lines) {
  const int64_t stride = rows.row_stride() * 2;
  const int64_t plane = rows.plane_stride;
  const int64_t below = top * rows.row_stride();
  const int64_t to_stride = sums_stride * 4;
  if (add) {
    load_tiles<0>(sums, sums + Vec::kWidth, to_stride);
    if constexpr (kTwo) {
      load_tiles<2>(sums + top * sums_stride, sums + top * sums_stride + Vec::kWidth, to_stride);
    }
  } else {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (kTwo) zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t step = 0; step < steps; ++step, inputs += kTileHalves, weights += kStepHalves) {
    for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    const auto load_inputs = [&](int64_t which) PACKEDBERT_INLINE_LAMBDA {
      load_tile<4>(inputs + which * plane, stride);
      if constexpr (kTwo) load_tile<5>(inputs + which * plane + below, stride);
    };
    const auto load_weights = [&](int64_t which) PACKEDBERT_INLINE_LAMBDA {
      const uint16_t* from = weights + which * 2 * kTileRowsMost * kTileHalves;
      load_tiles<6>(from, from + kTileRowsMost * kTileHalves, kTileBytes);
    };
    const auto multiply = [&]() PACKEDBERT_INLINE_LAMBDA {
      multiply_halves<0, 4, 6>(), multiply_halves<1, 4, 7>();
      if constexpr (kTwo) multiply_halves<2, 5, 6>(), multiply_halves<3, 5, 7>();
    };
    // In this order one side stays in its tiles from each product to the next one.
    load_inputs(0), load_weights(2), multiply();
    load_weights(1), multiply();
    load_inputs(1), multiply();
    load_weights(0), multiply();
    load_inputs(2), multiply();
    load_inputs(0), multiply();
  }
  store_tile<0>(sums, to_stride), store_tile<1>(sums + Vec::kWidth, to_stride);
  if constexpr (kTwo) {
    float* bottom = sums + top * sums_stride;
    store_tile<2>(bottom, to_stride), store_tile<3>(bottom + Vec::kWidth, to_stride);
  }
}

// As in products_vector.h. Rows with a NaN or an infinity, which a difference would make a NaN at once, are
// multiplied by FMAs.
inline void multiply_floats(const FloatRows& rows,
                            int64_t first_row,
                            int64_t count,
                            const float* panel,
                            int64_t columns,
                            int64_t depth,
                            float* tile,
                            int64_t tile_stride,
                            Prefetch ahead) {
  const auto use_fma = [&](int64_t row, int64_t few) {
    multiply_tile(rows.values + (first_row + row) * rows.stride, rows.stride, few, panel, columns, depth,
                  tile + row * tile_stride, tile_stride, no_prefetch(panel));
  };
  if (!rows.planes) {
    for (int64_t row = 0; row < count; row += kTileRows) use_fma(row, smaller(kTileRows, count - row));
    return;
  }
  alignas(64) uint16_t weights[kSplitDepth / kTileHalves * kStepHalves];
  const Strips strips(count);
  shape_tiles(strips);
  const uint16_t* inputs = rows.planes + first_row * rows.row_stride();
  const int64_t all_steps = ceil_div(depth, kTileHalves) * ceil_div(count, kStripRows);
  const int64_t lines = all_steps == 0 ? 0 : depth / kPasses * ahead.bytes / 64 / all_steps;
  for (int64_t k = 0; k < depth || k == 0; k += kSplitDepth) {
    const int64_t block = smaller(kSplitDepth, depth - k);
    const int64_t steps = ceil_div(block, kTileHalves);
    split_weights(panel + k * kPanelWidth, block, weights);
    for (int64_t row = 0; row < count; row += strips.rows, ahead.from += steps * lines * 64) {
      const auto strip = strips.two() ? multiply_split_strip<true> : multiply_split_strip<false>;
      strip(inputs + row * rows.row_stride() + k, rows, strips.top, weights, steps, k > 0,
            tile + row * tile_stride, tile_stride, ahead.from, lines);
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    if (rows.damaged[first_row + row]) use_fma(row, 1);
  }
}

// -------------------------------------------------------------------------------------------------- in int8

// sums [rows of a strip, kPanelWidth] of products of bytes.
//   inputs: of its first row, with `stride` between rows; panel [steps, kTileRowsMost, kPanelWidth, kGroup];
//   tail: another step of it, or null.
template <bool kTwo>
inline void multiply_byte_strip(const uint8_t* inputs,
                                int64_t stride,
                                int64_t top,
                                const int8_t* panel,
                                int64_t steps,
                                const int8_t* tail,
                                int32_t* sums,
                                const char* ahead,
                                int64_t lines) {
  constexpr int64_t kPanelRow = kPanelWidth * kGroup;
  const auto multiply = [&](const int8_t* weights) PACKEDBERT_INLINE_LAMBDA {
    load_tile<4>(inputs, stride);
    load_tiles<6>(weights, weights + kPanelRow / 2, kPanelRow);
    multiply_bytes<0, 4, 6>(), multiply_bytes<1, 4, 7>();
    if constexpr (kTwo) {
      load_tile<5>(inputs + top * stride, stride);
      multiply_bytes<2, 5, 6>(), multiply_bytes<3, 5, 7>();
    }
    inputs += kTileBytes;
  };
  zero_tile<0>(), zero_tile<1>();
  if constexpr (kTwo) zero_tile<2>(), zero_tile<3>();
  for (int64_t step = 0; step < steps; ++step, panel += kTileRowsMost * kPanelRow) {
    for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    multiply(panel);
  }
  if (tail) multiply(tail);
  constexpr int64_t kStride = kPanelWidth * 4;
  store_tile<0>(sums, kStride), store_tile<1>(sums + Vec::kWidth, kStride);
  if constexpr (kTwo) {
    int32_t* bottom = sums + top * kPanelWidth;
    store_tile<2>(bottom, kStride), store_tile<3>(bottom + Vec::kWidth, kStride);
  }
}

// As in multiply_quantized.h, for up to kUnitRows rows.
inline void multiply_quantized_panel(const QuantizedRows& rows,
                                     int64_t first_row,
                                     int64_t count,
                                     const int8_t* panel,
                                     const float* scale,
                                     const int32_t* column_sums,
                                     int64_t /*columns*/,
                                     int64_t groups,
                                     float* tile,
                                     int64_t tile_stride,
                                     Prefetch ahead) {
  static_assert(sizeof(Dot::Input) == 1);
  constexpr int64_t kStepBytesOfPanel = kTileRowsMost * kPanelWidth * kGroup;
  alignas(64) int32_t sums[kStripRows * kPanelWidth];
  alignas(64) int8_t last[kStepBytesOfPanel];
  const Strips strips(count);
  shape_tiles(strips);
  const int64_t steps = groups / kTileRowsMost;
  const int64_t left = groups % kTileRowsMost * kPanelWidth * kGroup;
  if (left > 0) {
    // The inputs beyond the last one are whatever lies there; the weights have to be zero, and the panel to
    // end where it does.
    __builtin_memcpy(last, panel + steps * kStepBytesOfPanel, static_cast<size_t>(left));
    __builtin_memset(last + left, 0, static_cast<size_t>(kStepBytesOfPanel - left));
  }
  const int64_t all_steps = steps * ceil_div(count, kStripRows);
  const int64_t lines = all_steps == 0 ? 0 : groups * ahead.bytes / 64 / all_steps;
  const auto strip = strips.two() ? multiply_byte_strip<true> : multiply_byte_strip<false>;
  for (int64_t row = 0; row < count; row += strips.rows, ahead.from += steps * lines * 64) {
    strip(rows.values + (first_row + row) * rows.stride, rows.stride, strips.top, panel, steps,
          left > 0 ? last : nullptr, sums, ahead.from, lines);
    const int64_t end = smaller(count, row + strips.rows);
    for (int64_t i = row; i < end; ++i) {
      const __m512i shift = _mm512_set1_epi32(-rows.zero_point[first_row + i]);
      const Vec row_scale = Vec::broadcast(rows.scale[first_row + i]);
      PACKEDBERT_UNROLL
      for (int64_t j = 0; j < kPanelWidth; j += Vec::kWidth) {
        // sum (input - zero_point) weight = sum input weight - zero_point sum weight
        const __m512i correction = _mm512_mullo_epi32(shift, _mm512_loadu_si512(column_sums + j));
        const __m512i integers =
            _mm512_add_epi32(_mm512_load_si512(sums + (i - row) * kPanelWidth + j), correction);
        (Vec{_mm512_cvtepi32_ps(integers)} * (row_scale * Vec::load(scale + j)))
            .store(tile + i * tile_stride + j);
      }
    }
  }
}
