// The CUDA kernels as torch sees them; see ops.cpp.
#ifdef PACKEDBERT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>

#include "cuda/encoder.h"
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

// Of the sizes that the kernels' grids hold.
void check_size(const char* op, const char* argument, int64_t size) {
  constexpr int64_t most = cuda::kMaxSize;
  if (size > most)
    fail(op, argument, "at most " + std::to_string(most) + " of a size on a GPU", std::to_string(size));
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
                                                    packed.mutable_data_ptr(), {current_stream(device)}));
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
    check_launch(kPackedLinear, cuda::row_epilogue(epilogue, {stream}));
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
                                  {stream}));
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
  check_launch(kPackedLinear, cuda::row_epilogue(epilogue, {stream, cuda::kernels_can_overlap()}));
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
                       {current_stream(device)}));
  return output;
}

// ---------------------------------------------------------------- encoder_prepacked

constexpr const char* kEncoder = "encoder_prepacked";
constexpr size_t kTensorsOfALayer = 12;  // reference.LayerWeights

// Takes one tensor after the other of the flat list of weights, each checked.
struct WeightReader {
  const std::vector<Tensor>& weights;
  const Tensor& like;
  size_t at = 0;

  const void* next(const Shape& shape) {
    const std::string name = "weights[" + std::to_string(at) + "]";
    const Tensor& tensor = weights[at++];
    const Checker check{kEncoder, like};
    check(name.c_str(), tensor, shape);
    if (!tensor.is_contiguous()) fail(kEncoder, name.c_str(), "a contiguous tensor", "strides");
    return tensor.const_data_ptr();
  }
  const void* vector(int64_t size) { return next({size}); }
  cuda::Matrix matrix(int64_t out_features, int64_t in_features) {
    const bool tiles = like.scalar_type() != ScalarType::Float;
    const Shape shape =
        tiles ? Shape{tile_count(out_features), step_count(in_features), kTileOutputs, kTileInputs}
              : Shape{out_features, in_features};
    return {next(shape), out_features, in_features};
  }
  // The length of the vector that comes `ahead` tensors after the next.
  int64_t peek(size_t ahead) const {
    const Tensor& tensor = weights[at + ahead];
    if (tensor.dim() != 1) {
      fail(kEncoder, "weights", "a vector at " + std::to_string(at + ahead), to_string(shape_of(tensor)));
    }
    return tensor.size(0);
  }
};

std::vector<cuda::EncoderLayer> take_layers(const std::vector<Tensor>& weights,
                                            const std::vector<int64_t>& num_heads,
                                            const Tensor& like) {
  const int64_t hidden = like.size(2);
  if (weights.size() != kTensorsOfALayer * num_heads.size()) {
    fail(kEncoder, "weights",
         std::to_string(kTensorsOfALayer * num_heads.size()) + " tensors for " +
             std::to_string(num_heads.size()) + " layers",
         std::to_string(weights.size()));
  }
  std::vector<cuda::EncoderLayer> layers;
  WeightReader read{weights, like};
  for (const int64_t heads : num_heads) {
    const int64_t qkv = read.peek(1);
    if (heads < 0 || (heads == 0 ? qkv != 0 : qkv % (3 * heads) != 0)) {
      fail(kEncoder, "num_heads", "a divisor of a third of " + std::to_string(qkv) + " qkv features",
           std::to_string(heads));
    }
    const int64_t inner = qkv / 3;
    const int64_t head_size = heads == 0 ? 0 : inner / heads;
    if (head_size > cuda::kMaxHeadSize) {
      fail(kEncoder, "weights",
           "heads of at most " + std::to_string(cuda::kMaxHeadSize) + " dimensions on a GPU",
           std::to_string(head_size));
    }
    const int64_t width = read.peek(7);
    layers.push_back({
        .heads = heads,
        .head_size = head_size,
        .qkv = read.matrix(qkv, hidden),
        .qkv_bias = read.vector(qkv),
        .attention_output = read.matrix(hidden, inner),
        .attention_output_bias = read.vector(hidden),
        .attention_norm_weight = read.vector(hidden),
        .attention_norm_bias = read.vector(hidden),
        .up = read.matrix(width, hidden),
        .up_bias = read.vector(width),
        .down = read.matrix(hidden, width),
        .down_bias = read.vector(hidden),
        .output_norm_weight = read.vector(hidden),
        .output_norm_bias = read.vector(hidden),
    });
  }
  return layers;
}

// A FloatProduct: PyTorch's. `context` is a tensor on the device.
cudaError_t torch_product(const void* context,
                          const float* x,
                          int64_t rows,
                          int64_t pitch,
                          const cuda::Matrix& weight,
                          float* sums) {
  const auto device = static_cast<const Tensor*>(context)->device();
  const auto wrap = [&](const void* data, int64_t height, int64_t width, int64_t row_stride) {
    return torch::stable::from_blob(const_cast<void*>(data), Shape{height, width}, Shape{row_stride, 1},
                                    device, ScalarType::Float);
  };
  const Tensor input = wrap(x, rows, weight.in_features, pitch);
  const Tensor matrix = wrap(weight.data, weight.out_features, weight.in_features, weight.in_features);
  Tensor output = wrap(sums, rows, weight.out_features, weight.out_features);
  const Tensor transposed = torch::stable::transpose(matrix, 0, 1);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input),
                                    torch::stable::detail::from(transposed),
                                    torch::stable::detail::from(output)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the handle that the call returned, and lets go of it
  return cudaSuccess;
}

Tensor encoder_prepacked_cuda(const Tensor& hidden_states,
                              const std::optional<Tensor>& attention_mask,
                              const std::vector<Tensor>& weights,
                              const std::vector<int64_t>& num_heads,
                              StringHandle activation_handle,
                              StringHandle norm_handle,
                              double eps,
                              StringHandle attention_handle) {
  const char* op = kEncoder;
  const std::string activation = take_string(activation_handle);
  const std::string norm = take_string(norm_handle);
  const std::string attention = take_string(attention_handle);
  const cuda::Dtype dtype = cuda_dtype(op, "hidden_states", hidden_states);
  // Layers whose weights are float take attention in float, and here all are.
  if (attention != "fp32" && attention != "int8")
    fail(op, "attention", "one of 'fp32', 'int8'", "'" + attention + "'");
  if (hidden_states.dim() != 3) {
    fail(op, "hidden_states", "[batch, length, hidden_size]", to_string(shape_of(hidden_states)));
  }
  const int64_t sequences = hidden_states.size(0);
  const int64_t length = hidden_states.size(1);
  check_size(op, "hidden_states", std::max(sequences * length, hidden_states.size(2)));
  const int32_t device = hidden_states.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<cuda::EncoderLayer> layers = take_layers(weights, num_heads, hidden_states);
  const Tensor input =
      hidden_states.is_contiguous() ? hidden_states : torch::stable::contiguous(hidden_states);
  std::optional<Tensor> mask;
  if (attention_mask) {
    const Shape shape{sequences, length};
    if (device_of(*attention_mask) != device_of(input)) {
      fail(op, "attention_mask", "a tensor on " + device_of(input), device_of(*attention_mask));
    }
    if (attention_mask->scalar_type() != ScalarType::Bool)
      fail(op, "attention_mask", "bool", to_string(attention_mask->scalar_type()));
    if (shape_of(*attention_mask) != shape)
      fail(op, "attention_mask", to_string(shape) + " or None", to_string(shape_of(*attention_mask)));
    mask = attention_mask->is_contiguous() ? *attention_mask : torch::stable::contiguous(*attention_mask);
  }
  Tensor output = torch::stable::new_empty(input, shape_of(input));
  const cuda::Encoder encoder{
      .dtype = dtype,
      .sequences = sequences,
      .length = length,
      .hidden_size = hidden_states.size(2),
      .layer_count = static_cast<int64_t>(layers.size()),
      .layers = layers.data(),
      .activation = parse_activation(op, activation),
      .norm = parse_norm(op, norm),
      .eps = static_cast<float>(eps),
      .mask = mask ? mask->const_data_ptr<bool>() : nullptr,
      .input = input.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .multiprocessors = multiprocessors(device),
      .product = torch_product,
      .product_context = &input,
  };
  const Tensor scratch = torch::stable::empty(Shape{cuda::encoder_scratch_size(encoder)}, ScalarType::Byte,
                                              std::nullopt, input.device());
  const cuda::Queue queue{current_stream(device), cuda::kernels_can_overlap()};
  check_launch(op, cuda::encoder(encoder, scratch.mutable_data_ptr(), queue));
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CUDA, m) {
  m.impl("prepack_linear", TORCH_BOX(&prepack_linear_cuda));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_cuda));
  m.impl("pruned_attention", TORCH_BOX(&pruned_attention_cuda));
  m.impl("encoder_prepacked", TORCH_BOX(&encoder_prepacked_cuda));
}

}  // namespace
}  // namespace packedbert
#endif  // PACKEDBERT_CUDA
