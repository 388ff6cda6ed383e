// The kernels of embed, pruned_attention and the encoder as torch sees them; see ops.cpp.
#include "ops_encoder.h"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cpu/attention.h"
#include "cpu/embed.h"
#include "cpu/encoder.h"
#include "cpu/ragged_batch.h"
#include "ops_common.h"
#include "packed_layout.h"

namespace packedbert {
namespace {

// ---------------------------------------------------------------- embed

constexpr const char* kEmbed = "embed";

// Ids of the shape of `like`, each a row of a table; contiguous.
Tensor take_ids(const char* argument, const Tensor& ids, const Tensor& like, int64_t table_rows) {
  if (!ids.is_cpu()) fail(kEmbed, argument, "a tensor on cpu", device_of(ids));
  if (ids.scalar_type() != ScalarType::Long) fail(kEmbed, argument, "int64", to_string(ids.scalar_type()));
  if (shape_of(ids) != shape_of(like)) {
    fail(kEmbed, argument, to_string(shape_of(like)) + " (the shape of input_ids)", to_string(shape_of(ids)));
  }
  const Tensor contiguous = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
  const int64_t* id = contiguous.const_data_ptr<int64_t>();
  const int64_t* const end = id + ids.numel();
  id = std::find_if(id, end, [=](int64_t row) { return row < 0 || row >= table_rows; });
  if (id != end) fail(kEmbed, argument, "0 to " + std::to_string(table_rows - 1), std::to_string(*id));
  return contiguous;
}

Tensor embed_cpu(const Tensor& input_ids,
                 const std::optional<Tensor>& token_type_ids,
                 const Tensor& words,
                 const Tensor& types,
                 const Tensor& positions,
                 StringHandle norm_handle,
                 const Tensor& norm_weight,
                 const Tensor& norm_bias,
                 double eps) {
  const std::string norm = take_string(norm_handle);
  if (input_ids.dim() != 2) fail(kEmbed, "input_ids", "[batch, length]", to_string(shape_of(input_ids)));
  check_float32(kEmbed, "words", words);
  if (words.dim() != 2) fail(kEmbed, "words", "[vocab_size, hidden_size]", to_string(shape_of(words)));
  const int64_t length = input_ids.size(1);
  const int64_t hidden_size = words.size(1);
  const Checker check{kEmbed, words};
  const auto check_table = [&](const char* argument, const Tensor& table) {
    return check(argument, table, {table.dim() > 0 ? table.size(0) : 0, hidden_size}, " (a row for each id)");
  };
  // They own what `embeddings` points to.
  const Tensor word_table = check_table("words", words);
  const Tensor type_table = check_table("types", types);
  const Tensor position_table = check_table("positions", positions);
  const Tensor weight = check("norm_weight", norm_weight, {hidden_size});
  const Tensor bias = check("norm_bias", norm_bias, {hidden_size});
  if (length > position_table.size(0)) {
    fail(kEmbed, "input_ids", "at most " + std::to_string(position_table.size(0)) + " positions",
         std::to_string(length));
  }
  if (type_table.size(0) == 0) fail(kEmbed, "types", "a row at least", to_string(shape_of(types)));
  const Tensor word_ids = take_ids("input_ids", input_ids, input_ids, word_table.size(0));
  std::optional<Tensor> type_ids;
  if (token_type_ids) type_ids = take_ids("token_type_ids", *token_type_ids, input_ids, type_table.size(0));
  Tensor output = torch::stable::new_empty(words, Shape{input_ids.size(0), length, hidden_size});
  const cpu::Embeddings embeddings{
      .tokens = input_ids.numel(),
      .length = length,
      .hidden_size = hidden_size,
      .word_ids = word_ids.const_data_ptr<int64_t>(),
      .type_ids = type_ids ? type_ids->const_data_ptr<int64_t>() : nullptr,
      .words = word_table.const_data_ptr<float>(),
      .types = type_table.const_data_ptr<float>(),
      .positions = position_table.const_data_ptr<float>(),
      .norm = parse_norm(kEmbed, norm),
      .norm_weight = weight.const_data_ptr<float>(),
      .norm_bias = bias.const_data_ptr<float>(),
      .eps = static_cast<float>(eps),
      .output = output.mutable_data_ptr<float>(),
  };
  cpu::embed(embeddings, cpu::torch_parallel_for);
  return output;
}

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
  Tensor keys = torch::stable::new_empty(qkv, Shape{of_keys});
  Tensor values = torch::stable::new_empty(qkv, Shape{quantized ? 0 : cpu::values_size(batch.view(), heads)});
  Tensor output = torch::stable::new_empty(qkv, Shape{tokens, heads.width()});
  cpu::pruned_attention(
      {
          .batch = batch.view(),
          .heads = heads,
          .quantized = quantized,
          .qkv = input.const_data_ptr<float>(),
          .keys = keys.mutable_data_ptr<float>(),
          .values = values.mutable_data_ptr<float>(),
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

// The weights of an encoder, checked, and what else does not change from call to call.
struct EncoderWeights {
  std::vector<Tensor> tensors;  // own what `layers` points to
  std::vector<cpu::EncoderLayer> layers;
  int64_t hidden_size;
  Activation activation;
  Norm norm;
  float eps;
};

// An attention mask: true, or where integers are allowed not 0, for real tokens.
class Mask {
 public:
  Mask(const char* op, const Tensor& mask, const Shape& shape, bool integers) {
    if (!mask.is_cpu()) fail(op, "attention_mask", "a tensor on cpu", device_of(mask));
    const bool integer = integers && mask.scalar_type() == ScalarType::Long;
    if (!integer && mask.scalar_type() != ScalarType::Bool)
      fail(op, "attention_mask", integers ? "bool or int64" : "bool", to_string(mask.scalar_type()));
    if (shape_of(mask) != shape)
      fail(op, "attention_mask", to_string(shape) + " or None", to_string(shape_of(mask)));
    contiguous_ = mask.is_contiguous() ? mask : torch::stable::contiguous(mask);
    if (!integer) return;
    const int64_t* from = contiguous_.const_data_ptr<int64_t>();
    converted_ = std::make_unique<bool[]>(contiguous_.numel());
    std::transform(from, from + contiguous_.numel(), converted_.get(), [](int64_t x) { return x != 0; });
  }

  const bool* real() const { return converted_ ? converted_.get() : contiguous_.const_data_ptr<bool>(); }

 private:
  Tensor contiguous_;
  std::unique_ptr<bool[]> converted_;
};

Tensor run_encoder(const char* op,
                   const EncoderWeights& weights,
                   const Tensor& hidden_states,
                   const std::optional<Tensor>& attention_mask,
                   bool integer_mask = false) {
  const int64_t sequences = hidden_states.size(0);
  const int64_t length = hidden_states.size(1);
  const Tensor input =
      hidden_states.is_contiguous() ? hidden_states : torch::stable::contiguous(hidden_states);

  std::optional<Mask> mask;
  if (attention_mask) mask.emplace(op, *attention_mask, Shape{sequences, length}, integer_mask);
  std::vector<int64_t> rows;
  const cpu::RaggedBatch batch =
      cpu::RaggedBatch::from_mask(mask ? mask->real() : nullptr, sequences, length, &rows);
  const bool padded = static_cast<int64_t>(rows.size()) != sequences * length;
  Tensor output = padded ? torch::stable::new_zeros(input, shape_of(input))
                         : torch::stable::new_empty(input, shape_of(input));
  const cpu::Encoder encoder{
      .batch = batch.view(),
      .hidden_size = weights.hidden_size,
      .layer_count = static_cast<int64_t>(weights.layers.size()),
      .layers = weights.layers.data(),
      .activation = weights.activation,
      .norm = weights.norm,
      .eps = weights.eps,
      .rows = rows.data(),
      .input = input.const_data_ptr<float>(),
      .output = output.mutable_data_ptr<float>(),
  };
  const cpu::EncoderPlan plan =
      cpu::plan_encoder(encoder, torch::stable::get_num_threads(), cpu::active_isa());
  Tensor scratch = torch::stable::new_empty(input, Shape{plan.size});
  cpu::encoder(encoder, plan, scratch.mutable_data_ptr<float>(), cpu::torch_parallel_for);
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
struct PreparedEncoders {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const EncoderWeights>> of_key;
  // Keys begin anywhere, so that one of another process is not found here.
  int64_t last_key = static_cast<int64_t>(std::random_device{}()) << 20;

  // Never destroyed: at the end of a process nobody knows whether torch is still there.
  static PreparedEncoders& all() {
    static PreparedEncoders& encoders = *new PreparedEncoders;
    return encoders;
  }
};

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
  PreparedEncoders& encoders = PreparedEncoders::all();
  const std::lock_guard<std::mutex> lock(encoders.mutex);
  encoders.of_key.emplace(++encoders.last_key, std::move(checked));
  return encoders.last_key;
}

Tensor run_prepared(const char* op,
                    const Tensor& hidden_states,
                    const std::optional<Tensor>& attention_mask,
                    bool integer_mask,
                    int64_t key) {
  std::shared_ptr<const EncoderWeights> weights;
  {
    PreparedEncoders& encoders = PreparedEncoders::all();
    const std::lock_guard<std::mutex> lock(encoders.mutex);
    const auto found = encoders.of_key.find(key);
    if (found == encoders.of_key.end()) fail(op, "key", "one of prepare_encoder", std::to_string(key));
    weights = found->second;
  }
  check_states(op, hidden_states);
  if (hidden_states.size(2) != weights->hidden_size) {
    fail(op, "hidden_states", "[batch, length, " + std::to_string(weights->hidden_size) + "]",
         to_string(shape_of(hidden_states)));
  }
  return run_encoder(op, *weights, hidden_states, attention_mask, integer_mask);
}

Tensor encoder_prepared_cpu(const Tensor& hidden_states,
                            const std::optional<Tensor>& attention_mask,
                            int64_t key) {
  return run_prepared("encoder_prepared", hidden_states, attention_mask, false, key);
}

Tensor bert_prepared_cpu(const Tensor& input_ids,
                         const std::optional<Tensor>& token_type_ids,
                         const std::optional<Tensor>& attention_mask,
                         const Tensor& words,
                         const Tensor& types,
                         const Tensor& positions,
                         StringHandle norm,
                         const Tensor& norm_weight,
                         const Tensor& norm_bias,
                         double eps,
                         int64_t key) {
  const Tensor embedded =
      embed_cpu(input_ids, token_type_ids, words, types, positions, norm, norm_weight, norm_bias, eps);
  return run_prepared("bert_prepared", embedded, attention_mask, true, key);
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CPU, m) {
  m.impl("embed", TORCH_BOX(&embed_cpu));
  m.impl("pruned_attention", TORCH_BOX(&pruned_attention_cpu));
  m.impl("encoder_prepacked", TORCH_BOX(&encoder_prepacked_cpu));
  m.impl("prepare_encoder", TORCH_BOX(&prepare_encoder_cpu));
  m.impl("encoder_prepared", TORCH_BOX(&encoder_prepared_cpu));
  m.impl("bert_prepared", TORCH_BOX(&bert_prepared_cpu));
}

}  // namespace

void release_encoder(int64_t key) {
  std::shared_ptr<const EncoderWeights> weights;  // destroyed after the lock
  PreparedEncoders& encoders = PreparedEncoders::all();
  const std::lock_guard<std::mutex> lock(encoders.mutex);
  const auto found = encoders.of_key.find(key);
  if (found == encoders.of_key.end()) return;
  weights = std::move(found->second);
  encoders.of_key.erase(found);
}

}  // namespace packedbert
