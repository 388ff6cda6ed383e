// What both devices make of packed_linear's arguments.
#pragma once

#include "ops_common.h"

namespace packedbert {

// Checked, contiguous, with an output to write to.
struct LinearCall {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  Tensor input;
  Tensor weight;
  Tensor bias;
  std::optional<Tensor> residual;
  std::optional<Tensor> norm_weight;
  std::optional<Tensor> norm_bias;
  Tensor output;
  Activation activation;
  Norm norm;
};

inline constexpr const char* kPackedLinear = "packed_linear";
inline constexpr const char* kPrepackLinear = "prepack_linear";

inline LinearCall check_linear(const Tensor& input,
                               const Tensor& weight,
                               const Tensor& bias,
                               const std::string& activation_name,
                               const std::optional<Tensor>& residual,
                               const std::string& norm_name,
                               const std::optional<Tensor>& norm_weight,
                               const std::optional<Tensor>& norm_bias) {
  const char* op = kPackedLinear;
  const Checker check{op, input};
  const Activation activation = parse_activation(op, activation_name);
  const Norm norm = parse_norm(op, norm_name);
  if (input.dim() == 0) fail(op, "input", "[..., in_features]", "a tensor without dimensions");
  if (bias.dim() != 1) fail(op, "bias", "[out_features]", to_string(shape_of(bias)));

  const Shape input_shape = shape_of(input);
  const int64_t in_features = input_shape.back();
  const int64_t out_features = bias.size(0);
  Shape output_shape = input_shape;
  output_shape.back() = out_features;
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < input_shape.size(); ++i) rows *= input_shape[i];

  const Shape canonical{out_features, in_features};
  const auto check_weight = [&]() -> Tensor {
    if (weight.scalar_type() == ScalarType::Char && input.is_cpu()) {
      check_quantized(op, "weight", weight, out_features, in_features);
      return weight;
    }
    Shape packed{panel_count(out_features), in_features, kPanelWidth};
    if (input.is_cuda()) {
      const bool tiles = input.scalar_type() != ScalarType::Float;
      packed = tiles ? Shape{tile_count(out_features), step_count(in_features), kTileOutputs, kTileInputs}
                     : canonical;
    }
    return check("weight", weight, packed, " (prepack_linear of a " + to_string(canonical) + " weight)");
  };

  const auto check_norm = [&](const char* argument,
                              const std::optional<Tensor>& tensor) -> std::optional<Tensor> {
    const std::string with = " with norm='" + norm_name + "'";
    if (norm == Norm::none) {
      if (tensor) fail(op, argument, "None" + with, "a tensor");
      return std::nullopt;
    }
    if (!tensor) fail(op, argument, to_string({out_features}) + with, "None");
    return check(argument, *tensor, {out_features}, " (a value for each output feature)");
  };
  const auto check_residual = [&]() -> std::optional<Tensor> {
    if (!residual) return std::nullopt;
    return check("residual", *residual, output_shape, " (the output's shape)");
  };
  return {
      .rows = rows,
      .in_features = in_features,
      .out_features = out_features,
      .input = check("input", input, input_shape),
      .weight = check_weight(),
      .bias = check("bias", bias, {out_features}),
      .residual = check_residual(),
      .norm_weight = check_norm("norm_weight", norm_weight),
      .norm_bias = check_norm("norm_bias", norm_bias),
      .output = torch::stable::new_empty(input, output_shape),
      .activation = activation,
      .norm = norm,
  };
}

inline void check_canonical(const Tensor& weight) {
  if (weight.dim() != 2) {
    fail(kPrepackLinear, "weight", "[out_features, in_features]", to_string(shape_of(weight)));
  }
}

}  // namespace packedbert
