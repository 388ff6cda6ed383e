// A linear layer's product and what follows it, over Vec: shared by packed_linear and the encoder. Included
// inside the namespace and the target region of one instruction set, after its products_*.h. It uses nothing
// of the standard library: see target_region.h.
//
// The work is cut into units, one tile (at most kUnitRows rows) times one panel (kPanelWidth columns) each,
// so that both many rows and a single one keep every thread busy. Bias, activation and residual are applied
// to a tile before it leaves the first-level cache. A norm needs whole rows: it is a second pass.

// A thread is woken for no less than this many multiplications (some 5 us of work) or elements of a norm.
constexpr int64_t kMultiplicationsPerThread = 1 << 19;
constexpr int64_t kNormElementsPerThread = 1 << 14;

// Input rows worth so many bytes are multiplied by all panels before the next rows: they, and a panel, stay
// in the second-level cache, however many rows there are.
constexpr int64_t kRowBlockBytes = 512 * 1024;

// The order of the units: blocks of tiles, in each block the panels, for each panel the tiles.
struct Units {
  int64_t rows;
  int64_t depth;
  int64_t columns;
  int64_t panels;
  int64_t tiles;
  int64_t tiles_per_block;

  Units(int64_t rows, const Matrix& weight)
      : rows(rows),
        depth(weight.in_features),
        columns(weight.out_features),
        panels(panel_count(weight.out_features)),
        tiles(ceil_div(rows, kUnitRows)),
        tiles_per_block(larger(1, kRowBlockBytes / (4 * kUnitRows * larger(1, weight.in_features)))) {}

  int64_t count() const { return tiles * panels; }

  // So many units are worth a thread.
  int64_t grain() const {
    if (rows == 0) return 1;
    return ceil_div(kMultiplicationsPerThread, larger(1, depth) * kPanelWidth * ceil_div(rows, tiles));
  }

  // Tiles differ by one step of rows at most: 28 + 1 rows are three tiles of 9 and 10, not two full ones and
  // a single row.
  int64_t first_row(int64_t tile) const {
    return smaller(rows, ceil_div(rows, kRowStep) * tile / tiles * kRowStep);
  }

  void find(int64_t unit, int64_t* tile, int64_t* panel) const {
    const int64_t first_tile = unit / (tiles_per_block * panels) * tiles_per_block;
    const int64_t block_tiles = smaller(tiles_per_block, tiles - first_tile);
    const int64_t unit_of_block = unit - first_tile * panels;
    *panel = unit_of_block / block_tiles;
    *tile = first_tile + unit_of_block % block_tiles;
  }
};

// Brings a row of `size` floats to the first-level cache, to be read.
PACKEDBERT_INLINE void prefetch_row(const float* row, int64_t size) {
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(row + i, 0, 3);
}

// Brings rows of kPanelWidth floats, `stride` apart, to the first-level cache, to be written.
PACKEDBERT_INLINE void prefetch_tile(const float* to, int64_t rows, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    __builtin_prefetch(to + row * stride, 1, 3);
    __builtin_prefetch(to + row * stride + kPanelWidth / 2, 1, 3);
  }
}

// A unit of work as multiply_units has it: rows of a tile, and the panel that they meet.
struct Unit {
  int64_t row;
  int64_t rows;
  int64_t panel;

  PACKEDBERT_INLINE int64_t column() const { return panel * kPanelWidth; }
};

// The two kinds of product that multiply_units takes. Both read kPanelWidth * sizeof(float) bytes of weights
// a step: of one input in float, of kGroup inputs in int8. Both leave sums [rows, kPanelWidth], of which
// complete() makes floats, and call meanwhile as multiply_floats does.
constexpr int64_t kStepBytes = kPanelWidth * sizeof(float);
static_assert(kStepBytes == kPanelWidth * kGroup);

struct FloatProduct {
  FloatRows input;
  const Matrix& weight;

  PACKEDBERT_INLINE int64_t steps() const { return weight.in_features; }
  template <typename Meanwhile>
  PACKEDBERT_INLINE void multiply(const Unit& unit,
                                  int64_t next_panel,
                                  int64_t columns,
                                  float* sums,
                                  Prefetch ahead,
                                  ProductScope& scope,
                                  const Meanwhile& meanwhile) const {
    const auto at = [&](int64_t i) { return i < 0 ? nullptr : weight.floats() + i * steps() * kPanelWidth; };
    multiply_floats(input, unit.row, unit.rows, at(unit.panel), at(next_panel), columns, steps(), sums,
                    kPanelWidth, ahead, scope, meanwhile);
  }
  PACKEDBERT_INLINE void complete(const Unit&, int64_t, int64_t, float*) const {}
};

struct QuantizedProduct {
  QuantizedRows input;
  const Matrix& weight;

  PACKEDBERT_INLINE int64_t steps() const { return group_count(weight.in_features); }
  template <typename Meanwhile>
  PACKEDBERT_INLINE void multiply(const Unit& unit,
                                  int64_t /*next_panel*/,
                                  int64_t columns,
                                  float* sums,
                                  Prefetch ahead,
                                  ProductScope& /*scope*/,
                                  const Meanwhile& meanwhile) const {
    multiply_quantized(input, unit.row, unit.rows, weight.quantized_panel(unit.panel), columns, sums, ahead,
                       meanwhile);
  }
  PACKEDBERT_INLINE void complete(const Unit& unit, int64_t begin, int64_t end, float* sums) const {
    complete_quantized(input, unit.row, begin, end, weight.quantized_panel(unit.panel), sums);
  }
};

// The units [begin, end) of a product. Each tile goes to finish(sums [rows, kPanelWidth], first row, rows,
// first column) from the first-level cache; with few rows while the next one is multiplied, a part at a time.
//   next: the weight that this thread will read afterwards, or null.
// While a panel is multiplied, the next one is brought to the second-level cache, a share of it with each
// tile: 2 to 9 percent, because the processor's own prefetching starts anew with every panel. AMX's products
// differ in that: see products_amx.h.
template <typename Product, typename Finish>
PACKEDBERT_INLINE void multiply_units(const Units& units,
                                      const Product& product,
                                      const void* next,
                                      int64_t begin,
                                      int64_t end,
                                      const Finish& finish) {
  alignas(64) float sums[2][kUnitRows * kPanelWidth];
  ProductScope scope;
  const int64_t panel_bytes = product.steps() * kStepBytes;
  const int64_t tiles_of_panel = smaller(units.tiles, units.tiles_per_block);
  const int64_t share = ceil_div(kStepBytes, tiles_of_panel);
  const char* panels = static_cast<const char*>(product.weight.data);
  Unit before{};  // without rows: there is none
  int turn = 0;
  const auto finish_before = [&](int64_t part, int64_t parts) PACKEDBERT_INLINE_LAMBDA {
    if (before.rows == 0) return;
    const int64_t first = before.rows * part / parts;
    const int64_t last = before.rows * (part + 1) / parts;
    if (first == last) return;
    float* made = sums[1 - turn];
    product.complete(before, first, last, made);
    finish(made + first * kPanelWidth, before.row + first, last - first, before.column());
  };
  for (int64_t i = begin; i < end; ++i, turn = 1 - turn) {
    int64_t tile = 0;
    Unit unit{};
    units.find(i, &tile, &unit.panel);
    unit.row = units.first_row(tile);
    unit.rows = units.first_row(tile + 1) - unit.row;
    const char* this_panel = panels + unit.panel * panel_bytes;
    const char* next_panel =
        i + tiles_of_panel < end ? this_panel + panel_bytes : static_cast<const char*>(next);
    Prefetch ahead{this_panel, 0};
    if (next_panel) ahead = {next_panel + tile % units.tiles_per_block * share * product.steps(), share};
    finish.prepare(unit.row, unit.rows, unit.column());
    int64_t next_tile = 0;
    int64_t panel_after = -1;
    if (i + 1 < end) units.find(i + 1, &next_tile, &panel_after);
    // Where a panel meets several tiles, reading it is not what takes the time, and both at once clock lower.
    if (tiles_of_panel > 1) {
      finish_before(0, 1);
      before.rows = 0;
    }
    product.multiply(unit, panel_after, smaller(kPanelWidth, units.columns - unit.column()), sums[turn],
                     ahead, scope, finish_before);
    before = unit;
  }
  finish_before(0, 1);
}

// The inputs of a matrix of either kind: rows of floats, and scratch for what its product makes of them
// first (prepared_rows_size).
struct Inputs {
  const float* values;  // [rows, weight.in_features] with `stride` between rows
  int64_t stride;
  float* scratch;
  int64_t rows;
  const Matrix& weight;

  FloatRows floats() const { return FloatRows::in(values, stride, scratch, rows, weight.in_features); }
  QuantizedRows quantized() const { return QuantizedRows::in(scratch, rows, weight.in_features); }

  // Whether prepare() has to be called for every row before it is multiplied.
  bool are_prepared() const { return weight.quantized || FloatRows::kPrepared; }

  void prepare(int64_t row) const {
    if (weight.quantized) {
      quantize_row(values + row * stride, weight.input_scale(), weight.in_features, quantized(), row);
    } else {
      floats().prepare(row, weight.in_features);
    }
  }
};

// multiply_units with a matrix of either kind.
template <typename Finish>
PACKEDBERT_INLINE void multiply_units(const Units& units,
                                      const Inputs& inputs,
                                      const void* next,
                                      int64_t begin,
                                      int64_t end,
                                      const Finish& finish) {
  if (inputs.weight.quantized) {
    multiply_units(units, QuantizedProduct{inputs.quantized(), inputs.weight}, next, begin, end, finish);
  } else {
    multiply_units(units, FloatProduct{inputs.floats(), inputs.weight}, next, begin, end, finish);
  }
}

template <Activation kActivation>
PACKEDBERT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::relu) return relu(x);
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_new) return gelu_new(x);
  return x;
}

// output = activation(tile + bias) + residual, for the rows and columns of one tile.
//   tile [rows, kPanelWidth]; output and residual (or null, or the output): [rows, columns] with `stride`
//   between rows; bias [columns].
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

using FinishTile = decltype(&finish_tile<Activation::none>);

PACKEDBERT_INLINE FinishTile finish_tile_for(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return finish_tile<Activation::relu>;
    case Activation::gelu:
      return finish_tile<Activation::gelu>;
    case Activation::gelu_new:
      return finish_tile<Activation::gelu_new>;
    default:
      return finish_tile<Activation::none>;
  }
}

// What multiply_units does with a tile of a linear layer: output = activation(tile + bias) + residual.
struct LinearFinish {
  FinishTile finish;
  int64_t out_features;
  const float* bias;      // [out_features]
  const float* residual;  // [rows, out_features] with `stride` between rows, or null; may be the output
  float* output;          // the same
  int64_t stride;

  PACKEDBERT_INLINE void prepare(int64_t row, int64_t rows, int64_t column) const {
    prefetch_tile(output + row * stride + column, rows, stride);
  }

  PACKEDBERT_INLINE void operator()(const float* sums, int64_t row, int64_t rows, int64_t column) const {
    const int64_t at = row * stride + column;
    finish(sums, rows, smaller(kPanelWidth, out_features - column), bias + column,
           residual ? residual + at : nullptr, output + at, stride);
  }
};

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

// to = norm(from) of one row [size]: (from - mean) * scale * weight + bias. `to` may be `from`.
inline void normalize_row(Norm norm,
                          const float* from,
                          int64_t size,
                          const float* weight,
                          const float* bias,
                          float eps,
                          float* to) {
  if (norm == Norm::none) return copy(from, size, to);
  float mean = 0.0f;
  float scale = 1.0f;
  if (norm == Norm::layer_norm) {
    // The variance takes a pass of its own, because E[x^2] - mean^2 cancels.
    mean = row_mean(from, size, Identity{});
    const float variance = row_mean(from, size, SquaredDistance{Vec::broadcast(mean)});
    scale = 1.0f / __builtin_sqrtf(variance + eps);
  }
  const Vec center = Vec::broadcast(mean);
  const Vec factor = Vec::broadcast(scale);
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) {
    const Vec unit = (Vec::load(from + i) - center) * factor;
    fma(unit, Vec::load(weight + i), Vec::load(bias + i)).store(to + i);
  }
  if (const int64_t left = size - i) {
    const Vec unit = (Vec::load_partial(from + i, left) - center) * factor;
    fma(unit, Vec::load_partial(weight + i, left), Vec::load_partial(bias + i, left))
        .store_partial(to + i, left);
  }
}
