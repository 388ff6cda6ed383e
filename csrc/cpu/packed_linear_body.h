// packed_linear, over Vec. Included inside the namespace and the target region of one instruction set, after
// linear_body.h.

inline Units units_of(const PackedLinear& linear) {
  return Units(linear.rows, linear.in_features, linear.out_features);
}

// The units [begin, end) of the PackedLinear that context points to.
void multiply_packed_linear(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  const LinearFinish finish{finish_tile_for(linear.activation),
                            linear.out_features,
                            linear.bias,
                            linear.residual,
                            linear.output,
                            linear.out_features};
  multiply_units(units_of(linear), linear.input, linear.in_features, linear.weight, nullptr, begin, end,
                 finish);
}

// The rows [begin, end) of the output, normalised in place.
void normalize_packed_linear(const void* context, int64_t begin, int64_t end) {
  const PackedLinear& linear = *static_cast<const PackedLinear*>(context);
  for (int64_t row = begin; row < end; ++row) {
    float* x = linear.output + row * linear.out_features;
    normalize_row(linear.norm, x, linear.out_features, linear.norm_weight, linear.norm_bias, linear.eps, x);
  }
}

void packed_linear(const PackedLinear& linear, ParallelFor parallel_for) {
  const Units units = units_of(linear);
  if (units.count() == 0) return;
  parallel_for(units.count(), units.grain(), multiply_packed_linear, &linear);
  if (linear.norm != Norm::none) {
    parallel_for(linear.rows, ceil_div(kNormElementsPerThread, linear.out_features), normalize_packed_linear,
                 &linear);
  }
}
