// The CPU kernels of packed_linear and prepack_linear as torch sees them: checks, allocation, dispatch.
// ops*.cpp are the only files that know torch, through LibTorch's stable ABI. The schemas and the ops'
// documentation are in packedbert/ops.py.
#include "cpu/packed_linear.h"
#include "ops_linear.h"

namespace packedbert {
namespace {

Tensor prepack_linear_cpu(const Tensor& weight) {
  check_float32(kPrepackLinear, "weight", weight);
  check_canonical(weight);
  const int64_t out_features = weight.size(0);
  const int64_t in_features = weight.size(1);
  Tensor packed = empty_floats({panel_count(out_features), in_features, kPanelWidth});
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
  const cpu::Isa isa = cpu::active_isa();
  const Floats prepared_rows(cpu::prepared_rows_size(isa, matrix.quantized, call.rows, call.in_features));
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
          .prepared_rows = prepared_rows.get(),
          .activation = call.activation,
          .norm = call.norm,
          .eps = static_cast<float>(eps),
          .isa = isa,
      },
      cpu::torch_parallel_for);
  return call.output;
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CPU, m) {
  m.impl("prepack_linear", TORCH_BOX(&prepack_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_cpu));
}

}  // namespace
}  // namespace packedbert
