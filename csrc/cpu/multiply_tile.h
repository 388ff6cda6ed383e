// The matrix product's microkernel, over Vec. Included inside the namespace and the target region of one
// instruction set, which has defined
//   kTileRows: the rows whose 2 * kTileRows sums fit its registers beside two of weights and one of input;
//   kDepthBlock: sums over at most so many inputs are kept in registers before they join the tile, because
//   long sums are more exact when they are summed in blocks;
//   kNearPrefetch: the weights of so many inputs ahead are brought to the first-level cache by hand, or 0.

// Two vectors of columns at a time: narrower, an input load feeds too few multiplications; wider, the rows
// get few.
constexpr int64_t kTileColumns = 2 * Vec::kWidth;
static_assert(kPanelWidth % kTileColumns == 0);

// So often the inputs are read for one panel.
constexpr int kPasses = kPanelWidth / kTileColumns;

// Rows a multiple of 4 KiB apart share one set of a usual first-level cache, 8 lines for up to 14 rows:
// blocks of such an input (1024 and 3072 are BERT's own widths) are multiplied from a copy. Copying always
// costs 7 percent, never up to 15.
constexpr int64_t kCollidingStride = 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Copies `count` floats.
PACKEDBERT_INLINE void copy(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) Vec::load(from + i).store(to + i);
  if (i < count) Vec::load_partial(from + i, count - i).store_partial(to + i, count - i);
}

// Memory to bring to the second-level cache during a product: an address for every kPasses inputs of each
// pass, `bytes` apart, so that all passes together ask for as many addresses as there are inputs. It has to
// be mapped memory, although nothing is read: the processor looks the address up, and 0 costs more than the
// product.
struct Prefetch {
  const char* from;
  int64_t bytes;

  // Past what one pass over so many inputs has asked for.
  PACKEDBERT_INLINE void skip(int64_t inputs) { from += inputs / kPasses * bytes; }
};

// The panel itself, which is there anyway.
inline Prefetch no_prefetch(const float* panel) { return {reinterpret_cast<const char*>(panel), 0}; }

// What there is to do while something is multiplied: nothing.
struct Nothing {
  PACKEDBERT_INLINE void operator()(int64_t /*part*/, int64_t /*parts*/) const {}
};

// tile = input weight^T, or tile += input weight^T with `add`, for kRows rows and kTileColumns columns.
//   input [kRows, depth] with input_stride between rows; weight [depth, kPanelWidth], of which the first
//   kTileColumns columns are used; tile [kRows, kTileColumns] with tile_stride between rows.
template <int kRows>
void multiply_pass(const float* input,
                   int64_t input_stride,
                   const float* weight,
                   int64_t depth,
                   bool add,
                   float* tile,
                   int64_t tile_stride,
                   Prefetch ahead) {
  // A pointer for every third row: the other two are addressed as + stride and + 2 * stride, which is free,
  // where a pointer a row would not fit the general registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* pointer[kPointers];
  for (int i = 0; i < kPointers; ++i) pointer[i] = input + 3 * i * input_stride;

  Vec sum[kRows][2];
  const auto multiply_input = [&]() PACKEDBERT_INLINE_LAMBDA {
    if constexpr (kNearPrefetch > 0) __builtin_prefetch(weight + kNearPrefetch * kPanelWidth, 0, 3);
    const Vec weight0 = Vec::load(weight);
    const Vec weight1 = Vec::load(weight + Vec::kWidth);
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec x = Vec::broadcast(pointer[row / 3][(row % 3) * input_stride]);
      sum[row][0] = fma(x, weight0, sum[row][0]);
      sum[row][1] = fma(x, weight1, sum[row][1]);
    }
    PACKEDBERT_UNROLL
    for (int i = 0; i < kPointers; ++i) pointer[i] += 1;
    weight += kPanelWidth;
  };
  do {
    const int64_t block = smaller(kDepthBlock, depth);
    depth -= block;
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = Vec::zero();
    int64_t k = 0;
    for (; k + kPasses <= block; k += kPasses) {
      __builtin_prefetch(ahead.from, 0, 2);
      ahead.from += ahead.bytes;
      PACKEDBERT_UNROLL
      for (int i = 0; i < kPasses; ++i) multiply_input();
    }
    for (; k < block; ++k) multiply_input();
    PACKEDBERT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float* to = tile + row * tile_stride;
      if (add) {
        sum[row][0] = Vec::load(to) + sum[row][0];
        sum[row][1] = Vec::load(to + Vec::kWidth) + sum[row][1];
      }
      sum[row][0].store(to);
      sum[row][1].store(to + Vec::kWidth);
    }
    add = true;
  } while (depth > 0);
}

// multiply_pass for a number of rows known at run time, 1 <= rows <= kRows.
template <int kRows>
PACKEDBERT_INLINE void multiply_pass_of(int64_t rows,
                                        const float* input,
                                        int64_t input_stride,
                                        const float* weight,
                                        int64_t depth,
                                        bool add,
                                        float* tile,
                                        int64_t tile_stride,
                                        Prefetch ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_pass_of<kRows - 1>(rows, input, input_stride, weight, depth, add, tile, tile_stride,
                                         ahead);
    }
  }
  multiply_pass<kRows>(input, input_stride, weight, depth, add, tile, tile_stride, ahead);
}

// Copies `from` [rows, depth], from_stride between rows, to `to`, the same with kDepthBlock between rows.
inline void copy_block(const float* from, int64_t from_stride, int64_t rows, int64_t depth, float* to) {
  for (int64_t row = 0; row < rows; ++row) copy(from + row * from_stride, depth, to + row * kDepthBlock);
}

// tile = input panel^T.
//   input [rows, depth], rows <= kTileRows, with input_stride between rows; panel [depth, kPanelWidth], of
//   which `columns` are wanted; tile [rows, kPanelWidth] with tile_stride between rows: as many columns as
//   the passes need that the wanted ones take.
inline void multiply_tile(const float* input,
                          int64_t input_stride,
                          int64_t rows,
                          const float* panel,
                          int64_t columns,
                          int64_t depth,
                          float* tile,
                          int64_t tile_stride,
                          Prefetch ahead) {
  if (input_stride % kCollidingStride != 0) {
    for (int64_t column = 0; column < columns; column += kTileColumns, ahead.skip(depth)) {
      multiply_pass_of<kTileRows>(rows, input, input_stride, panel + column, depth, false, tile + column,
                                  tile_stride, ahead);
    }
    return;
  }
  alignas(64) float copied[kTileRows * kDepthBlock];
  for (int64_t k = 0; k < depth || k == 0; k += kDepthBlock) {
    const int64_t block = smaller(kDepthBlock, depth - k);
    copy_block(input + k, input_stride, rows, block, copied);
    for (int64_t column = 0; column < columns; column += kTileColumns, ahead.skip(block)) {
      multiply_pass_of<kTileRows>(rows, copied, kDepthBlock, panel + k * kPanelWidth + column, block, k > 0,
                                  tile + column, tile_stride, ahead);
    }
  }
}
