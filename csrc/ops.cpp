// The kernels of packed_linear and prepack_linear as torch sees them: checks, allocation, dispatch. ops*.cpp
// are the only files that know torch, through LibTorch's stable ABI. The schemas and the ops' documentation
// are in packedbert/ops.py.
#include <torch/csrc/stable/accelerator.h>

#include "cpu/packed_linear.h"
#include "ops_common.h"
#include "packed_layout.h"
#ifdef PACKEDBERT_CUDA
#include "cuda/packed_linear.h"
#endif

namespace packedbert {
namespace {

// What both devices make of packed_linear's arguments: checked, contiguous, with an output to write to.
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

constexpr const char* kPackedLinear = "packed_linear";
constexpr const char* kPrepackLinear = "prepack_linear";

LinearCall check_linear(const Tensor& input,
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
    const Shape packed =
        input.is_cuda() ? canonical : Shape{panel_count(out_features), in_features, kPanelWidth};
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

// ---------------------------------------------------------------- CPU

void check_weight(const Tensor& weight) {
  if (weight.dim() != 2) {
    fail(kPrepackLinear, "weight", "[out_features, in_features]", to_string(shape_of(weight)));
  }
}

Tensor prepack_linear_cpu(const Tensor& weight) {
  check_float32(kPrepackLinear, "weight", weight);
  check_weight(weight);
  const int64_t out_features = weight.size(0);
  const int64_t in_features = weight.size(1);
  Tensor packed =
      torch::stable::new_empty(weight, Shape{panel_count(out_features), in_features, kPanelWidth});
  cpu::prepack_linear(weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1), out_features,
                      in_features, packed.mutable_data_ptr<float>(), cpu::torch_parallel_for);
  return packed;
}

Tensor packed_linear_cpu(const Tensor& input,
                         const Tensor& weight,
                         const Tensor& bias,
                         StringHandle activation,
                         const std::optional<Tensor>& residual,
                         StringHandle norm,
                         const std::optional<Tensor>& norm_weight,
                         const std::optional<Tensor>& norm_bias,
                         double eps) {
  const std::string activation_name = take_string(activation);
  const std::string norm_name = take_string(norm);
  check_float32(kPackedLinear, "input", input);
  const LinearCall call =
      check_linear(input, weight, bias, activation_name, residual, norm_name, norm_weight, norm_bias);
  const cpu::Matrix matrix = cpu::matrix_of(call.weight, call.out_features, call.in_features);
  Tensor quantized_rows = torch::stable::new_empty(
      input, Shape{matrix.quantized ? cpu::quantized_rows_size(call.rows, call.in_features) : 0});
  cpu::packed_linear(
      {
          .rows = call.rows,
          .weight = matrix,
          .input = call.input.const_data_ptr<float>(),
          .bias = call.bias.const_data_ptr<float>(),
          .residual = static_cast<const float*>(data_or_null(call.residual)),
          .norm_weight = static_cast<const float*>(data_or_null(call.norm_weight)),
          .norm_bias = static_cast<const float*>(data_or_null(call.norm_bias)),
          .output = call.output.mutable_data_ptr<float>(),
          .quantized_rows = quantized_rows.mutable_data_ptr<float>(),
          .activation = call.activation,
          .norm = call.norm,
          .eps = static_cast<float>(eps),
      },
      cpu::torch_parallel_for);
  return call.output;
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CPU, m) {
  m.impl("prepack_linear", TORCH_BOX(&prepack_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_cpu));
}

// ---------------------------------------------------------------- CUDA

#ifdef PACKEDBERT_CUDA

cuda::Dtype cuda_dtype(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cuda::Dtype::float32;
    case ScalarType::Half:
      return cuda::Dtype::float16;
    case ScalarType::BFloat16:
      return cuda::Dtype::bfloat16;
    default:
      fail(op, argument, "float32, float16 or bfloat16", to_string(tensor.scalar_type()));
  }
}

// The kernel reads the canonical layout; it gets a copy all the same, so that the result of the op never
// aliases.
Tensor prepack_linear_cuda(const Tensor& weight) {
  cuda_dtype(kPrepackLinear, "weight", weight);
  check_weight(weight);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  Tensor packed = torch::stable::new_empty(weight, shape_of(weight));
  return torch::stable::copy_(packed, weight);
}

Tensor packed_linear_cuda(const Tensor& input,
                          const Tensor& weight,
                          const Tensor& bias,
                          StringHandle activation,
                          const std::optional<Tensor>& residual,
                          StringHandle norm,
                          const std::optional<Tensor>& norm_weight,
                          const std::optional<Tensor>& norm_bias,
                          double eps) {
  const std::string activation_name = take_string(activation);
  const std::string norm_name = take_string(norm);
  if (!input.is_cuda())
    fail(kPackedLinear, "input", "a CUDA tensor, as another argument is", device_of(input));
  const cuda::Dtype dtype = cuda_dtype(kPackedLinear, "input", input);
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const LinearCall call =
      check_linear(input, weight, bias, activation_name, residual, norm_name, norm_weight, norm_bias);
  const auto stream = torch::stable::accelerator::getCurrentStream(device);
  const cudaError_t error = cuda::packed_linear(
      {
          .dtype = dtype,
          .rows = call.rows,
          .in_features = call.in_features,
          .out_features = call.out_features,
          .input = call.input.const_data_ptr(),
          .weight = call.weight.const_data_ptr(),
          .bias = call.bias.const_data_ptr(),
          .residual = data_or_null(call.residual),
          .norm_weight = data_or_null(call.norm_weight),
          .norm_bias = data_or_null(call.norm_bias),
          .output = call.output.mutable_data_ptr(),
          .activation = call.activation,
          .norm = call.norm,
          .eps = static_cast<float>(eps),
      },
      static_cast<cudaStream_t>(stream.nativeHandle()));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("packedbert::packed_linear: CUDA: ") + cudaGetErrorString(error));
  }
  return call.output;
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CUDA, m) {
  m.impl("prepack_linear", TORCH_BOX(&prepack_linear_cuda));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_cuda));
}

#endif  // PACKEDBERT_CUDA

}  // namespace
}  // namespace packedbert
