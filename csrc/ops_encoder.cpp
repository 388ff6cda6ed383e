// The kernels of pruned_attention and the encoder as torch sees them; see ops.cpp.
#include "ops_encoder.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "packed_layout.h"
#include "prepared.h"

namespace packedbert {
namespace {

// ---------------------------------------------------------------- pruned_attention

constexpr const char* kPrunedAttention = "pruned_attention";

// The bounds of the sequences, as the kernels want them.
std::vector<int64_t> take_bounds(const Tensor& cu_seqlens, int64_t tokens) {
  const char* op = kPrunedAttention;
  if (!cu_seqlens.is_cpu()) fail(op, "cu_seqlens", "a tensor on cpu", device_of(cu_seqlens));
  if (cu_seqlens.scalar_type() != ScalarType::Int) {
    fail(op, "cu_seqlens", "int32", to_string(cu_seqlens.scalar_type()));
  }
  if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) < 1) {
    fail(op, "cu_seqlens", "[batch + 1]", to_string(shape_of(cu_seqlens)));
  }
  const int32_t* data = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t stride = cu_seqlens.stride(0);
  std::vector<int64_t> bounds(cu_seqlens.size(0));
  bool ascending = true;
  for (size_t i = 0; i < bounds.size(); ++i) {
    bounds[i] = data[static_cast<int64_t>(i) * stride];
    ascending = ascending && (i == 0 || bounds[i - 1] <= bounds[i]);
  }
  if (!ascending || bounds.front() != 0 || bounds.back() != tokens) {
    fail(op, "cu_seqlens", "ascending from 0 to " + std::to_string(tokens) + ", the tokens of qkv",
         to_string(bounds));
  }
  return bounds;
}

// Whether products of attention are in int8.
bool parse_precision(const char* op, const char* argument, const std::string& name, int64_t head_size) {
  if (name == "fp32") return false;
  if (name != "int8") fail(op, argument, "one of 'fp32', 'int8'", "'" + name + "'");
  if (head_size > cpu::kMaxQuantizedHead) {
    fail(op, argument,
         "'fp32' with heads of more than " + std::to_string(cpu::kMaxQuantizedHead) + " dimensions",
         "'int8' with " + std::to_string(head_size));
  }
  return true;
}

Tensor pruned_attention_cpu(const Tensor& qkv,
                            const Tensor& cu_seqlens,
                            int64_t num_heads,
                            StringHandle precision_handle) {
  const char* op = kPrunedAttention;
  const std::string precision = take_string(precision_handle);
  check_float32(op, "qkv", qkv);
  if (num_heads < 0) fail(op, "num_heads", "0 or more", std::to_string(num_heads));
  const int64_t row = qkv.dim() == 2 ? qkv.size(1) : -1;
  if (row < 0 || (num_heads == 0 ? row != 0 : row % (3 * num_heads) != 0)) {
    fail(op, "qkv", "[tokens, 3 * " + std::to_string(num_heads) + " heads * head_size]",
         to_string(shape_of(qkv)));
  }
  const int64_t tokens = qkv.size(0);
  const cpu::RaggedBatch batch(take_bounds(cu_seqlens, tokens));
  const cpu::Heads heads{num_heads, num_heads == 0 ? 0 : row / (3 * num_heads)};
  const bool quantized = parse_precision(op, "precision", precision, heads.size);
  const Tensor input = qkv.is_contiguous() ? qkv : torch::stable::contiguous(qkv);
  const int64_t of_keys =
      quantized ? cpu::quantized_keys_values_size(batch.view(), heads) : cpu::keys_size(batch.view(), heads);
  const Floats keys(of_keys);
  const Floats values(quantized ? 0 : cpu::values_size(batch.view(), heads));
  Tensor output = empty_floats({tokens, heads.width()});
  cpu::pruned_attention(
      {
          .batch = batch.view(),
          .heads = heads,
          .quantized = quantized,
          .qkv = input.const_data_ptr<float>(),
          .keys = keys.get(),
          .values = values.get(),
          .output = output.mutable_data_ptr<float>(),
      },
      cpu::torch_parallel_for);
  return output;
}

// ---------------------------------------------------------------- encoder_prepacked

constexpr const char* kEncoderPrepacked = "encoder_prepacked";
constexpr size_t kTensorsOfALayer = 12;  // reference.LayerWeights

// Checks one tensor after the other of the flat list of weights. There are 144 of them in a BERT-base, so a
// tensor that fits costs no allocation.
struct WeightReader {
  const char* op;
  const std::vector<Tensor>& weights;
  size_t at = 0;

  [[noreturn]] void refuse(const std::string& expected, const std::string& got) const {
    const std::string name = "weights[" + std::to_string(at) + "]";
    fail(op, name.c_str(), expected, got);
  }

  const float* next(std::initializer_list<int64_t> shape) {
    const Tensor& tensor = weights[at];
    if (!tensor.is_cpu()) refuse("a tensor on cpu", device_of(tensor));
    if (tensor.scalar_type() != ScalarType::Float) refuse("float32", to_string(tensor.scalar_type()));
    const auto sizes = tensor.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
      refuse(to_string(Shape(shape)), to_string(shape_of(tensor)));
    }
    if (!tensor.is_contiguous()) refuse("a contiguous tensor", "strides");
    ++at;
    return tensor.const_data_ptr<float>();
  }

  const float* vector(int64_t size) { return next({size}); }
  cpu::Matrix matrix(int64_t out_features, int64_t in_features) {
    const Tensor& tensor = weights[at];
    if (tensor.scalar_type() == ScalarType::Char) {
      const std::string name = "weights[" + std::to_string(at) + "]";
      check_quantized(op, name.c_str(), tensor, out_features, in_features);
      ++at;
    } else {
      next({panel_count(out_features), in_features, kPanelWidth});
    }
    return cpu::matrix_of(tensor, out_features, in_features);
  }
  // The length of the vector that comes `ahead` tensors after the next.
  int64_t peek(size_t ahead) const {
    const Tensor& tensor = weights[at + ahead];
    if (tensor.dim() != 1) refuse("a vector after it", to_string(shape_of(tensor)));
    return tensor.size(0);
  }
};

std::vector<cpu::EncoderLayer> take_layers(const char* op,
                                           const std::vector<Tensor>& weights,
                                           const std::vector<int64_t>& num_heads,
                                           int64_t hidden,
                                           const std::string& attention) {
  if (weights.size() != kTensorsOfALayer * num_heads.size()) {
    fail(op, "weights",
         std::to_string(kTensorsOfALayer * num_heads.size()) + " tensors for " +
             std::to_string(num_heads.size()) + " layers",
         std::to_string(weights.size()));
  }
  std::vector<cpu::EncoderLayer> layers;
  layers.reserve(num_heads.size());
  WeightReader read{op, weights};
  for (const int64_t count : num_heads) {
    const int64_t qkv = read.peek(1);
    if (count < 0 || (count == 0 ? qkv != 0 : qkv % (3 * count) != 0)) {
      fail(op, "num_heads", "a divisor of a third of " + std::to_string(qkv) + " qkv features",
           std::to_string(count));
    }
    const cpu::Heads heads{count, count == 0 ? 0 : qkv / (3 * count)};
    const int64_t width = read.peek(7);
    layers.push_back({
        .heads = heads,
        // A layer whose projections are not quantized was found to need float.
        .quantized_attention = parse_precision(op, "attention", attention, heads.size) &&
                               weights[read.at].scalar_type() == ScalarType::Char,
        .qkv_weight = read.matrix(qkv, hidden),
        .qkv_bias = read.vector(qkv),
        .attention_output_weight = read.matrix(hidden, heads.width()),
        .attention_output_bias = read.vector(hidden),
        .attention_norm_weight = read.vector(hidden),
        .attention_norm_bias = read.vector(hidden),
        .up_weight = read.matrix(width, hidden),
        .up_bias = read.vector(width),
        .down_weight = read.matrix(hidden, width),
        .down_bias = read.vector(hidden),
        .output_norm_weight = read.vector(hidden),
        .output_norm_bias = read.vector(hidden),
    });
  }
  return layers;
}

Tensor run_encoder(const char* op,
                   const EncoderWeights& weights,
                   const Tensor& hidden_states,
                   const std::optional<Tensor>& attention_mask) {
  const RealTokens tokens(op, attention_mask, hidden_states.size(0), hidden_states.size(1));
  const Tensor input =
      hidden_states.is_contiguous() ? hidden_states : torch::stable::contiguous(hidden_states);
  Tensor output = empty_floats(shape_of(input));
  float* states = output.mutable_data_ptr<float>();
  if (!tokens.are_all()) std::fill_n(states, input.numel(), 0.0f);
  run_encoder(weights, tokens, input.const_data_ptr<float>(), states);
  return output;
}

void check_states(const char* op, const Tensor& hidden_states) {
  check_float32(op, "hidden_states", hidden_states);
  if (hidden_states.dim() != 3) {
    fail(op, "hidden_states", "[batch, length, hidden_size]", to_string(shape_of(hidden_states)));
  }
}

Tensor encoder_prepacked_cpu(const Tensor& hidden_states,
                             const std::optional<Tensor>& attention_mask,
                             const std::vector<Tensor>& weights,
                             const std::vector<int64_t>& num_heads,
                             StringHandle activation_handle,
                             StringHandle norm_handle,
                             double eps,
                             StringHandle attention_handle) {
  const char* op = kEncoderPrepacked;
  const std::string activation = take_string(activation_handle);
  const std::string norm = take_string(norm_handle);
  const std::string attention = take_string(attention_handle);
  check_states(op, hidden_states);
  const int64_t hidden_size = hidden_states.size(2);
  const EncoderWeights checked{
      .tensors = {},
      .layers = take_layers(op, weights, num_heads, hidden_size, attention),
      .hidden_size = hidden_size,
      .activation = parse_activation(op, activation),
      .norm = parse_norm(op, norm),
      .eps = static_cast<float>(eps),
  };
  return run_encoder(op, checked, hidden_states, attention_mask);
}

// ---------------------------------------------------------------- prepare_encoder, encoder_prepared

// The encoders that prepare_encoder was given, until release_encoder.
Registry<EncoderWeights>& encoders() {
  static Registry<EncoderWeights>& registry = *new Registry<EncoderWeights>;  // see Registry
  return registry;
}

int64_t prepare_encoder_cpu(const std::vector<Tensor>& weights,
                            const std::vector<int64_t>& num_heads,
                            StringHandle activation_handle,
                            StringHandle norm_handle,
                            double eps,
                            StringHandle attention_handle) {
  const char* op = "prepare_encoder";
  const std::string activation = take_string(activation_handle);
  const std::string norm = take_string(norm_handle);
  const std::string attention = take_string(attention_handle);
  constexpr size_t kAttentionOutputBias = 3;
  const bool known = weights.size() > kAttentionOutputBias && weights[kAttentionOutputBias].dim() == 1;
  const int64_t hidden_size = known ? weights[kAttentionOutputBias].size(0) : 0;
  auto checked = std::make_shared<EncoderWeights>(EncoderWeights{
      .tensors = weights,
      .layers = take_layers(op, weights, num_heads, hidden_size, attention),
      .hidden_size = hidden_size,
      .activation = parse_activation(op, activation),
      .norm = parse_norm(op, norm),
      .eps = static_cast<float>(eps),
  });
  return encoders().add(std::move(checked));
}

Tensor encoder_prepared_cpu(const Tensor& hidden_states,
                            const std::optional<Tensor>& attention_mask,
                            int64_t key) {
  const char* op = "encoder_prepared";
  const std::shared_ptr<const EncoderWeights> weights = find_encoder(op, key);
  check_states(op, hidden_states);
  if (hidden_states.size(2) != weights->hidden_size) {
    fail(op, "hidden_states", "[batch, length, " + std::to_string(weights->hidden_size) + "]",
         to_string(shape_of(hidden_states)));
  }
  return run_encoder(op, *weights, hidden_states, attention_mask);
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CPU, m) {
  m.impl("pruned_attention", TORCH_BOX(&pruned_attention_cpu));
  m.impl("encoder_prepacked", TORCH_BOX(&encoder_prepacked_cpu));
  m.impl("prepare_encoder", TORCH_BOX(&prepare_encoder_cpu));
  m.impl("encoder_prepared", TORCH_BOX(&encoder_prepared_cpu));
}

}  // namespace

namespace {

// What is not 0 in a mask of numbers.
template <typename Number>
std::unique_ptr<bool[]> where_not_zero(const Tensor& mask) {
  std::unique_ptr<bool[]> real(new bool[mask.numel()]);
  const Number* from = mask.const_data_ptr<Number>();
  std::transform(from, from + mask.numel(), real.get(), [](Number x) { return x != 0; });
  return real;
}

}  // namespace

RealTokens::RealTokens(
    const char* op, const std::optional<Tensor>& mask, int64_t sequences, int64_t length, bool numbers)
    : batch(cpu::RaggedBatch({0})), padded_(sequences * length) {
  if (!mask) {
    batch = cpu::RaggedBatch::from_mask(nullptr, sequences, length, &rows);
    return;
  }
  const Shape shape{sequences, length};
  if (!mask->is_cpu()) fail(op, "attention_mask", "a tensor on cpu", device_of(*mask));
  if (shape_of(*mask) != shape)
    fail(op, "attention_mask", to_string(shape) + " or None", to_string(shape_of(*mask)));
  const Tensor contiguous = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
  const ScalarType type = mask->scalar_type();
  std::unique_ptr<bool[]> real;
  if (numbers && type == ScalarType::Long) {
    real = where_not_zero<int64_t>(contiguous);
  } else if (numbers && type == ScalarType::Int) {
    real = where_not_zero<int32_t>(contiguous);
  } else if (numbers && type == ScalarType::Float) {
    real = where_not_zero<float>(contiguous);
  } else if (type != ScalarType::Bool) {
    fail(op, "attention_mask", numbers ? "bool, int64, int32 or float32" : "bool", to_string(type));
  }
  batch = cpu::RaggedBatch::from_mask(real ? real.get() : contiguous.const_data_ptr<bool>(), sequences,
                                      length, &rows);
}

void run_encoder(const EncoderWeights& weights, const RealTokens& tokens, const float* input, float* output) {
  const cpu::Encoder encoder{
      .batch = tokens.batch.view(),
      .hidden_size = weights.hidden_size,
      .layer_count = static_cast<int64_t>(weights.layers.size()),
      .layers = weights.layers.data(),
      .activation = weights.activation,
      .norm = weights.norm,
      .eps = weights.eps,
      .rows = tokens.rows.data(),
      .input = input,
      .output = output,
  };
  const cpu::EncoderPlan plan =
      cpu::plan_encoder(encoder, torch::stable::get_num_threads(), cpu::active_isa());
  const Floats scratch(plan.size);
  cpu::encoder(encoder, plan, scratch.get(), cpu::torch_parallel_for);
}

std::shared_ptr<const EncoderWeights> find_encoder(const char* op, int64_t key) {
  std::shared_ptr<const EncoderWeights> weights = encoders().find(key);
  if (!weights) fail(op, "key", "one of prepare_encoder", std::to_string(key));
  return weights;
}

void release_encoder(int64_t key) { encoders().release(key); }

}  // namespace packedbert
