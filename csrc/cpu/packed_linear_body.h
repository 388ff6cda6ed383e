// packed_linear, over Vec. Included inside the namespace and the target region of one instruction set, after
// its vec_*.h, vec_math.h and multiply_tile.h. It uses nothing of the standard library: see target_region.h.
//
// The work is cut into units, one tile (at most kTileRows rows) times one panel (kPanelWidth columns) each,
// so that both many rows and a single one keep every thread busy. Bias, activation and residual are applied
// to a tile before it leaves the first-level cache. A norm needs whole rows: it is a second pass.

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A thread is woken for no less than this many multiplications (some 5 us of work) or elements of a norm.
constexpr int64_t kMultiplicationsPerThread = 1 << 19;
constexpr int64_t kNormElementsPerThread = 1 << 14;

// Input rows worth so many bytes are multiplied by all panels before the next rows: they, and a panel, stay
// in the second-level cache, however many rows there are.
constexpr int64_t kRowBlockBytes = 512 * 1024;

// The order of the units: blocks of tiles, in each block the panels, for each panel the tiles.
struct Units {
  int64_t rows;
  int64_t panels;
  int64_t tiles;
  int64_t tiles_per_block;

  explicit Units(const PackedLinear& linear)
      : rows(linear.rows),
        panels(panel_count(linear.out_features)),
        tiles(ceil_div(linear.rows, kTileRows)),
        tiles_per_block(larger(1, kRowBlockBytes / (4 * kTileRows * larger(1, linear.in_features)))) {}

  int64_t count() const { return tiles * panels; }

  // Tiles differ by one row at most: 28 + 1 rows are three tiles of 9 and 10, not two full ones and a single
  // row.
  int64_t first_row(int64_t tile) const { return rows * tile / tiles; }

  void find(int64_t unit, int64_t* tile, int64_t* panel) const {
    const int64_t first_tile = unit / (tiles_per_block * panels) * tiles_per_block;
    const int64_t block_tiles = smaller(tiles_per_block, tiles - first_tile);
    const int64_t unit_of_block = unit - first_tile * panels;
    *panel = unit_of_block / block_tiles;
    *tile = first_tile + unit_of_block % block_tiles;
  }
};

template <Activation kActivation>
PACKEDBERT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::relu) return relu(x);
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_new) return gelu_new(x);
  return x;
}

// output = activation(tile + bias) + residual, for the rows and columns of one tile.
//   tile [rows, kPanelWidth]; output and residual (or null): [rows, columns] with `stride` between rows; bias
//   [columns].
template <Activation kActivation>
void finish_tile(const float* tile,
                 int64_t rows,
                 int64_t columns,
                 const float* bias,
                 const float* residual,
                 float* output,
                 int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* sums = tile + row * kPanelWidth;
    const int64_t at = row * stride;
    int64_t j = 0;
    for (; j + Vec::kWidth <= columns; j += Vec::kWidth) {
      Vec y = activate<kActivation>(Vec::load(sums + j) + Vec::load(bias + j));
      if (residual) y = y + Vec::load(residual + at + j);
      y.store(output + at + j);
    }
    if (const int64_t left = columns - j) {
      Vec y = activate<kActivation>(Vec::load(sums + j) + Vec::load_partial(bias + j, left));
      if (residual) y = y + Vec::load_partial(residual + at + j, left);
      y.store_partial(output + at + j, left);
    }
  }
}

// The units [begin, end) of the PackedLinear that context points to.
template <Activation kActivation>
void run_units(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  const Units units(linear);
  alignas(64) float tile_sums[kTileRows * kPanelWidth];
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t tile = 0;
    int64_t panel = 0;
    units.find(unit, &tile, &panel);
    const int64_t row = units.first_row(tile);
    const int64_t rows = units.first_row(tile + 1) - row;
    const int64_t column = panel * kPanelWidth;
    const int64_t at = row * linear.out_features + column;
    multiply_tile(linear.input + row * linear.in_features, rows,
                  linear.weight + panel * linear.in_features * kPanelWidth, linear.in_features, tile_sums);
    finish_tile<kActivation>(tile_sums, rows, smaller(kPanelWidth, linear.out_features - column),
                             linear.bias + column, linear.residual ? linear.residual + at : nullptr,
                             linear.output + at, linear.out_features);
  }
}

// The mean of f(x[i]) over x [size], where f maps a Vec to a Vec. Four sums at a time: their additions
// overlap, and each stays short, which rounds less.
template <typename Function>
PACKEDBERT_INLINE float row_mean(const float* x, int64_t size, Function f) {
  Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= size; i += 4 * Vec::kWidth) {
    PACKEDBERT_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + f(Vec::load(x + i + j * Vec::kWidth));
  }
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) sum[0] = sum[0] + f(Vec::load(x + i));
  float total = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < size; ++i) total += first_lane(f(Vec::broadcast(x[i])));
  return total / static_cast<float>(size);
}

struct Identity {
  PACKEDBERT_INLINE Vec operator()(Vec x) const { return x; }
};

struct SquaredDistance {
  Vec center;
  PACKEDBERT_INLINE Vec operator()(Vec x) const { return (x - center) * (x - center); }
};

// The rows [begin, end) of the output, normalised in place: (x - mean) * scale * norm_weight + norm_bias.
void norm_rows(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  const int64_t size = linear.out_features;
  for (int64_t row = begin; row < end; ++row) {
    float* x = linear.output + row * size;
    float mean = 0.0f;
    float scale = 1.0f;
    if (linear.norm == Norm::layer_norm) {
      // The variance takes a pass of its own, because E[x^2] - mean^2 cancels.
      mean = row_mean(x, size, Identity{});
      const float variance = row_mean(x, size, SquaredDistance{Vec::broadcast(mean)});
      scale = 1.0f / __builtin_sqrtf(variance + linear.eps);
    }
    const Vec center = Vec::broadcast(mean);
    const Vec factor = Vec::broadcast(scale);
    int64_t i = 0;
    for (; i + Vec::kWidth <= size; i += Vec::kWidth) {
      const Vec unit = (Vec::load(x + i) - center) * factor;
      fma(unit, Vec::load(linear.norm_weight + i), Vec::load(linear.norm_bias + i)).store(x + i);
    }
    if (const int64_t left = size - i) {
      const Vec unit = (Vec::load_partial(x + i, left) - center) * factor;
      fma(unit, Vec::load_partial(linear.norm_weight + i, left),
          Vec::load_partial(linear.norm_bias + i, left))
          .store_partial(x + i, left);
    }
  }
}

PACKEDBERT_INLINE RangeTask task_for(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return run_units<Activation::relu>;
    case Activation::gelu:
      return run_units<Activation::gelu>;
    case Activation::gelu_new:
      return run_units<Activation::gelu_new>;
    default:
      return run_units<Activation::none>;
  }
}

void packed_linear(const PackedLinear& linear, ParallelFor parallel_for) {
  const Units units(linear);
  if (units.count() == 0) return;
  const int64_t multiplications =
      larger(1, linear.in_features) * kPanelWidth * ceil_div(units.rows, units.tiles);
  parallel_for(units.count(), ceil_div(kMultiplicationsPerThread, multiplications),
               task_for(linear.activation), &linear);
  if (linear.norm != Norm::none) {
    parallel_for(linear.rows, ceil_div(kNormElementsPerThread, linear.out_features), norm_rows, &linear);
  }
}
