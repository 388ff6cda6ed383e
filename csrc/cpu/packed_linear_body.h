// packed_linear, over Vec. Included inside the namespace and the target region of one instruction set, after
// linear_body.h.

inline Inputs inputs_of(const PackedLinear& linear) {
  return {linear.input, linear.weight.in_features, linear.prepared_rows, linear.rows, linear.weight};
}

// The input rows [begin, end) of the PackedLinear that context points to.
void prepare_packed_linear(const void* context, int64_t begin, int64_t end) {
  const Inputs inputs = inputs_of(*static_cast<const PackedLinear*>(context));
  for (int64_t row = begin; row < end; ++row) inputs.prepare(row);
}

// The units [begin, end).
void multiply_packed_linear(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  const int64_t out_features = linear.weight.out_features;
  const LinearFinish finish{finish_tile_for(linear.activation),
                            out_features,
                            linear.bias,
                            linear.residual,
                            linear.output,
                            out_features};
  multiply_units(Units(linear.rows, linear.weight), inputs_of(linear), nullptr, begin, end, finish);
}

// The rows [begin, end) of the output, normalised in place.
void normalize_packed_linear(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  const int64_t size = linear.weight.out_features;
  for (int64_t row = begin; row < end; ++row) {
    float* x = linear.output + row * size;
    normalize_row(linear.norm, x, size, linear.norm_weight, linear.norm_bias, linear.eps, x);
  }
}

void packed_linear(const PackedLinear& linear, ParallelFor parallel_for) {
  const Units units(linear.rows, linear.weight);
  if (units.count() == 0) return;
  const auto row_grain = [](int64_t features) {
    return ceil_div(kNormElementsPerThread, larger(1, features));
  };
  if (inputs_of(linear).are_prepared())
    parallel_for(linear.rows, row_grain(linear.weight.in_features), prepare_packed_linear, &linear);
  parallel_for(units.count(), units.grain(), multiply_packed_linear, &linear);
  if (linear.norm != Norm::none)
    parallel_for(linear.rows, row_grain(linear.weight.out_features), normalize_packed_linear, &linear);
}
