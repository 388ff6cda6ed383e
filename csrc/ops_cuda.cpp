// The CUDA kernels as torch sees them; see ops.cpp. Not run on a GPU yet.
#ifdef PACKEDBERT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "cuda/packed_linear.h"
#include "cuda/pruned_attention.h"
#include "cuda/row_epilogue.h"
#include "ops_linear.h"

namespace packedbert {
namespace {

constexpr const char* kPrunedAttention = "pruned_attention";

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

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("packedbert::") + op + ": CUDA: " + cudaGetErrorString(error));
}

// A device of the sizes that the kernels' 32-bit indices hold.
void check_size(const char* op, const char* argument, int64_t size) {
  constexpr int64_t most = int64_t{1} << 30;
  if (size > most) fail(op, argument, "at most " + std::to_string(most) + " of a size", std::to_string(size));
}

cudaStream_t current_stream(int32_t device) {
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
}

int multiprocessors(int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  check_launch("cuda", error);
  return count;
}

// In half precision tiles (packed_layout.h). In float32 a copy of the canonical weight, for PyTorch's
// product: a copy, so that the result of the op never aliases.
Tensor prepack_linear_cuda(const Tensor& weight) {
  const cuda::Dtype dtype = cuda_dtype(kPrepackLinear, "weight", weight);
  check_canonical(weight);
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (dtype == cuda::Dtype::float32) {
    Tensor packed = torch::stable::new_empty(weight, shape_of(weight));
    return torch::stable::copy_(packed, weight);
  }
  const int64_t out_features = weight.size(0);
  const int64_t in_features = weight.size(1);
  check_size(kPrepackLinear, "weight", std::max(out_features, in_features));
  const Tensor canonical = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  Tensor packed = torch::stable::new_empty(
      weight, Shape{tile_count(out_features), step_count(in_features), kTileOutputs, kTileInputs});
  check_launch(kPrepackLinear, cuda::prepack_weight(canonical.const_data_ptr(), out_features, in_features,
                                                    packed.mutable_data_ptr(), current_stream(device)));
  return packed;
}

// rows [rows, columns] as the kernels read them: each at a multiple of 16 bytes. A copy where it isn't so.
Tensor aligned_rows(const Tensor& rows, cuda::Dtype dtype, int64_t count, int64_t columns, int64_t* pitch) {
  *pitch = cuda::row_pitch(dtype, columns);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  if (*pitch == columns && aligned) return rows;
  Tensor copy = torch::stable::new_empty(rows, Shape{count, *pitch});
  Tensor columns_of_copy = torch::stable::narrow(copy, 1, 0, columns);
  torch::stable::copy_(columns_of_copy, torch::stable::view(rows, Shape{count, columns}));
  return copy;
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
  check_size(kPackedLinear, "input", std::max({call.rows, call.in_features, call.out_features}));
  const cudaStream_t stream = current_stream(device);
  cuda::RowEpilogue epilogue{
      .dtype = dtype,
      .rows = call.rows,
      .size = call.out_features,
      .rows_used = nullptr,
      .sums = nullptr,
      .splits = 0,
      .input = nullptr,
      .input_pitch = call.out_features,
      .bias = call.bias.const_data_ptr(),
      .residual = data_or_null(call.residual),
      .residual_pitch = call.out_features,
      .norm_weight = data_or_null(call.norm_weight),
      .norm_bias = data_or_null(call.norm_bias),
      .output = call.output.mutable_data_ptr(),
      .output_pitch = call.out_features,
      .output_rows = nullptr,
      .activation = call.activation,
      .norm = call.norm,
      .eps = static_cast<float>(eps),
  };

  if (dtype == cuda::Dtype::float32) {
    const Tensor rows = torch::stable::view(call.input, Shape{call.rows, call.in_features});
    const Tensor sums = torch::stable::matmul(rows, torch::stable::transpose(call.weight, 0, 1));
    epilogue.sums = sums.const_data_ptr<float>();
    epilogue.splits = 1;
    check_launch(kPackedLinear, cuda::row_epilogue(epilogue, stream));
    return call.output;
  }

  // The activation comes before the sum of parts only if there is one part.
  const bool may_split = call.norm != Norm::none && call.activation == Activation::none;
  const cuda::LinearPlan plan =
      cuda::plan_linear(call.rows, call.out_features, call.in_features, multiprocessors(device), may_split);
  int64_t input_pitch = 0;
  const Tensor rows = aligned_rows(call.input, dtype, call.rows, call.in_features, &input_pitch);
  const bool split = plan.splits > 1;
  const Tensor sums = torch::stable::empty(Shape{split ? plan.splits * call.rows * call.out_features : 0},
                                           ScalarType::Float, std::nullopt, input.device());
  check_launch(kPackedLinear, cuda::packed_linear(
                                  {
                                      .dtype = dtype,
                                      .plan = plan,
                                      .rows = call.rows,
                                      .in_features = call.in_features,
                                      .out_features = call.out_features,
                                      .rows_used = nullptr,
                                      .input = rows.const_data_ptr(),
                                      .input_pitch = input_pitch,
                                      .weight = call.weight.const_data_ptr(),
                                      .bias = call.bias.const_data_ptr(),
                                      .residual = split ? nullptr : data_or_null(call.residual),
                                      .residual_pitch = call.out_features,
                                      .output = split ? nullptr : call.output.mutable_data_ptr(),
                                      .output_pitch = call.out_features,
                                      .sums = split ? sums.mutable_data_ptr<float>() : nullptr,
                                      .activation = call.activation,
                                  },
                                  stream));
  if (call.norm == Norm::none) return call.output;
  epilogue.activation = Activation::none;
  if (split) {
    epilogue.sums = sums.const_data_ptr<float>();
    epilogue.splits = plan.splits;
  } else {
    epilogue.input = call.output.const_data_ptr();
    epilogue.bias = nullptr;
    epilogue.residual = nullptr;
  }
  check_launch(kPackedLinear, cuda::row_epilogue(epilogue, stream));
  return call.output;
}

Tensor pruned_attention_cuda(const Tensor& qkv,
                             const Tensor& cu_seqlens,
                             int64_t num_heads,
                             StringHandle precision_handle) {
  const char* op = kPrunedAttention;
  const std::string precision = take_string(precision_handle);
  const cuda::Dtype dtype = cuda_dtype(op, "qkv", qkv);
  if (precision != "fp32") fail(op, "precision", "'fp32' on a GPU", "'" + precision + "'");
  if (num_heads < 0) fail(op, "num_heads", "0 or more", std::to_string(num_heads));
  const int64_t row = qkv.dim() == 2 ? qkv.size(1) : -1;
  if (row < 0 || (num_heads == 0 ? row != 0 : row % (3 * num_heads) != 0)) {
    fail(op, "qkv", "[tokens, 3 * " + std::to_string(num_heads) + " heads * head_size]",
         to_string(shape_of(qkv)));
  }
  // What cu_seqlens holds stays unchecked: reading it would wait for the GPU.
  if (device_of(cu_seqlens) != device_of(qkv)) {
    fail(op, "cu_seqlens", "a tensor on " + device_of(qkv), device_of(cu_seqlens));
  }
  if (cu_seqlens.scalar_type() != ScalarType::Int) {
    fail(op, "cu_seqlens", "int32", to_string(cu_seqlens.scalar_type()));
  }
  if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) < 1) {
    fail(op, "cu_seqlens", "[batch + 1]", to_string(shape_of(cu_seqlens)));
  }
  const int64_t tokens = qkv.size(0);
  check_size(op, "qkv", std::max(tokens, row));
  const int64_t head_size = num_heads == 0 ? 0 : row / (3 * num_heads);
  if (head_size > cuda::kMaxHeadSize) {
    fail(op, "qkv", "heads of at most " + std::to_string(cuda::kMaxHeadSize) + " dimensions on a GPU",
         std::to_string(head_size));
  }
  const int32_t device = qkv.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = qkv.is_contiguous() ? qkv : torch::stable::contiguous(qkv);
  const Tensor bounds = cu_seqlens.is_contiguous() ? cu_seqlens : torch::stable::contiguous(cu_seqlens);
  Tensor output = torch::stable::new_empty(qkv, Shape{tokens, num_heads * head_size});
  check_launch(op, cuda::pruned_attention(
                       {
                           .dtype = dtype,
                           .tokens = tokens,
                           .sequences = cu_seqlens.size(0) - 1,
                           .heads = num_heads,
                           .head_size = head_size,
                           .cu_seqlens = bounds.const_data_ptr<int32_t>(),
                           .qkv = rows.const_data_ptr(),
                           .qkv_pitch = row,
                           .output = output.mutable_data_ptr(),
                           .output_pitch = num_heads * head_size,
                       },
                       current_stream(device)));
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CUDA, m) {
  m.impl("prepack_linear", TORCH_BOX(&prepack_linear_cuda));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_cuda));
  m.impl("pruned_attention", TORCH_BOX(&pruned_attention_cuda));
}

}  // namespace
}  // namespace packedbert
#endif  // PACKEDBERT_CUDA
