// The kernels of embed and of a whole model as torch sees them; see ops.cpp.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/embed.h"
#include "cpu/head.h"
#include "ops_encoder.h"
#include "prepared.h"

namespace packedbert {
namespace {

// ---------------------------------------------------------------- embed

constexpr const char* kEmbed = "embed";

// What a model needs to embed ids, checked; it owns what `embeddings` points to.
struct EmbeddingTables {
  std::vector<Tensor> tensors;
  cpu::Embeddings embeddings;  // of no tokens yet
  int64_t word_rows;
  int64_t type_rows;
  int64_t position_rows;
};

EmbeddingTables take_tables(const char* op,
                            const Tensor& words,
                            const Tensor& types,
                            const Tensor& positions,
                            const std::string& norm,
                            const Tensor& norm_weight,
                            const Tensor& norm_bias,
                            double eps) {
  check_float32(op, "words", words);
  if (words.dim() != 2) fail(op, "words", "[vocab_size, hidden_size]", to_string(shape_of(words)));
  const int64_t hidden_size = words.size(1);
  const Checker check{op, words};
  EmbeddingTables tables{};
  const auto take = [&](const char* argument, const Tensor& tensor, const Shape& shape) {
    tables.tensors.push_back(check(argument, tensor, shape, " (hidden_size is that of words)"));
    return tables.tensors.back().const_data_ptr<float>();
  };
  const auto take_table = [&](const char* argument, const Tensor& table, int64_t* rows) {
    *rows = table.dim() > 0 ? table.size(0) : 0;
    return take(argument, table, {*rows, hidden_size});
  };
  tables.embeddings = {
      .hidden_size = hidden_size,
      .words = take_table("words", words, &tables.word_rows),
      .types = take_table("types", types, &tables.type_rows),
      .positions = take_table("positions", positions, &tables.position_rows),
      .norm = parse_norm(op, norm),
      .norm_weight = take("norm_weight", norm_weight, {hidden_size}),
      .norm_bias = take("norm_bias", norm_bias, {hidden_size}),
      .eps = static_cast<float>(eps),
  };
  if (tables.type_rows == 0) fail(op, "types", "a row at least", to_string(shape_of(types)));
  return tables;
}

// Ids of the shape of `like`, each a row of a table; contiguous.
Tensor take_ids(
    const char* op, const char* argument, const Tensor& ids, const Tensor& like, int64_t table_rows) {
  if (!ids.is_cpu()) fail(op, argument, "a tensor on cpu", device_of(ids));
  if (ids.scalar_type() != ScalarType::Long) fail(op, argument, "int64", to_string(ids.scalar_type()));
  if (shape_of(ids) != shape_of(like)) {
    fail(op, argument, to_string(shape_of(like)) + " (the shape of input_ids)", to_string(shape_of(ids)));
  }
  const Tensor contiguous = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
  const int64_t* id = contiguous.const_data_ptr<int64_t>();
  const int64_t* const end = id + ids.numel();
  id = std::find_if(id, end, [=](int64_t row) { return row < 0 || row >= table_rows; });
  if (id != end) fail(op, argument, "0 to " + std::to_string(table_rows - 1), std::to_string(*id));
  return contiguous;
}

void check_ids(const char* op, const Tensor& input_ids, const EmbeddingTables& tables) {
  if (input_ids.dim() != 2) fail(op, "input_ids", "[batch, length]", to_string(shape_of(input_ids)));
  if (input_ids.size(1) > tables.position_rows) {
    fail(op, "input_ids", "at most " + std::to_string(tables.position_rows) + " positions",
         std::to_string(input_ids.size(1)));
  }
}

// output: [batch, length, hidden_size].
void embed(const char* op,
           const EmbeddingTables& tables,
           const Tensor& input_ids,
           const std::optional<Tensor>& token_type_ids,
           float* output) {
  const Tensor word_ids = take_ids(op, "input_ids", input_ids, input_ids, tables.word_rows);
  std::optional<Tensor> type_ids;
  if (token_type_ids) type_ids = take_ids(op, "token_type_ids", *token_type_ids, input_ids, tables.type_rows);
  cpu::Embeddings embeddings = tables.embeddings;
  embeddings.tokens = input_ids.numel();
  embeddings.length = input_ids.size(1);
  embeddings.word_ids = word_ids.const_data_ptr<int64_t>();
  embeddings.type_ids = type_ids ? type_ids->const_data_ptr<int64_t>() : nullptr;
  embeddings.output = output;
  cpu::embed(embeddings, cpu::torch_parallel_for);
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
  const EmbeddingTables tables =
      take_tables(kEmbed, words, types, positions, norm, norm_weight, norm_bias, eps);
  check_ids(kEmbed, input_ids, tables);
  Tensor output = empty_floats({input_ids.size(0), input_ids.size(1), tables.embeddings.hidden_size});
  embed(kEmbed, tables, input_ids, token_type_ids, output.mutable_data_ptr<float>());
  return output;
}

// ---------------------------------------------------------------- prepare_bert, bert_prepared

// A model: embeddings, an encoder that prepare_encoder was given, and perhaps an output layer.
struct BertWeights {
  EmbeddingTables tables;
  // Whoever releases the encoder means its memory to go.
  std::weak_ptr<const EncoderWeights> encoder;
  std::vector<Tensor> head;  // none, or its weight [outputs, hidden_size] and bias [outputs]
};

// The models that prepare_bert was given, until release_bert.
Registry<BertWeights>& models() {
  static Registry<BertWeights>& registry = *new Registry<BertWeights>;  // see Registry
  return registry;
}

int64_t prepare_bert_cpu(const Tensor& words,
                         const Tensor& types,
                         const Tensor& positions,
                         StringHandle norm_handle,
                         const Tensor& norm_weight,
                         const Tensor& norm_bias,
                         double eps,
                         int64_t encoder,
                         const std::optional<Tensor>& head_weight,
                         const std::optional<Tensor>& head_bias) {
  const char* op = "prepare_bert";
  const std::string norm = take_string(norm_handle);
  const std::shared_ptr<const EncoderWeights> prepared = find_encoder(op, encoder);
  auto model = std::make_shared<BertWeights>(BertWeights{
      .tables = take_tables(op, words, types, positions, norm, norm_weight, norm_bias, eps),
      .encoder = prepared,
      .head = {},
  });
  const int64_t hidden_size = model->tables.embeddings.hidden_size;
  if (hidden_size != prepared->hidden_size) {
    fail(op, "words", "[vocab_size, " + std::to_string(prepared->hidden_size) + "]",
         to_string(shape_of(words)));
  }
  if (head_weight.has_value() != head_bias.has_value()) {
    fail(op, "head_bias", head_weight ? "one for head_weight" : "None like head_weight",
         head_bias ? to_string(shape_of(*head_bias)) : "None");
  }
  if (head_weight) {
    const Checker check{op, words};
    const int64_t outputs = head_weight->dim() > 0 ? head_weight->size(0) : 0;
    model->head = {check("head_weight", *head_weight, {outputs, hidden_size}),
                   check("head_bias", *head_bias, {outputs})};
  }
  return models().add(std::move(model));
}

// The last hidden states, of what is no token 0.
Tensor run_without_head(const char* op,
                        const EmbeddingTables& tables,
                        const EncoderWeights& encoder,
                        const RealTokens& tokens,
                        const Tensor& input_ids,
                        const std::optional<Tensor>& token_type_ids) {
  const int64_t size = encoder.hidden_size;
  Tensor output = empty_floats({input_ids.size(0), input_ids.size(1), size});
  float* states = output.mutable_data_ptr<float>();
  embed(op, tables, input_ids, token_type_ids, states);
  run_encoder(encoder, tokens, states, states);
  if (tokens.are_all()) return output;
  int64_t row = 0;
  const auto clear_up_to = [&](int64_t end) {
    std::fill(states + row * size, states + end * size, 0.0f);
    row = end + 1;
  };
  for (const int64_t real : tokens.rows) clear_up_to(real);
  clear_up_to(input_ids.numel());
  return output;
}

// What the head makes of the last hidden states, a tensor for each of its outputs.
std::vector<Tensor> run_with_head(const char* op,
                                  const BertWeights& model,
                                  const EncoderWeights& encoder,
                                  const RealTokens& tokens,
                                  const Tensor& input_ids,
                                  const std::optional<Tensor>& token_type_ids) {
  const int64_t rows = input_ids.numel();
  const float* bias = model.head[1].const_data_ptr<float>();
  std::vector<Tensor> outputs;
  std::vector<float*> places;
  for (int64_t i = 0; i < model.head[1].size(0); ++i) {
    outputs.push_back(empty_floats({input_ids.size(0), input_ids.size(1)}));
    places.push_back(outputs.back().mutable_data_ptr<float>());
    // The states of what is no token are 0.
    if (!tokens.are_all()) std::fill_n(places.back(), rows, bias[i]);
  }
  const Floats states(rows * encoder.hidden_size);
  embed(op, model.tables, input_ids, token_type_ids, states.get());
  run_encoder(encoder, tokens, states.get(), states.get());
  cpu::head(
      {
          .tokens = static_cast<int64_t>(tokens.rows.size()),
          .rows = tokens.rows.data(),
          .hidden_size = encoder.hidden_size,
          .outputs = static_cast<int64_t>(outputs.size()),
          .states = states.get(),
          .weight = model.head[0].const_data_ptr<float>(),
          .bias = bias,
          .output = places.data(),
      },
      cpu::torch_parallel_for);
  return outputs;
}

std::vector<Tensor> bert_prepared_cpu(const Tensor& input_ids,
                                      const std::optional<Tensor>& token_type_ids,
                                      const std::optional<Tensor>& attention_mask,
                                      int64_t key) {
  const char* op = "bert_prepared";
  const std::shared_ptr<const BertWeights> model = models().find(key);
  const std::shared_ptr<const EncoderWeights> encoder = model ? model->encoder.lock() : nullptr;
  if (!encoder) fail(op, "key", "one of prepare_bert, of an encoder that is there", std::to_string(key));
  check_ids(op, input_ids, model->tables);
  const RealTokens tokens(op, attention_mask, input_ids.size(0), input_ids.size(1), true);
  if (model->head.empty())
    return {run_without_head(op, model->tables, *encoder, tokens, input_ids, token_type_ids)};
  return run_with_head(op, *model, *encoder, tokens, input_ids, token_type_ids);
}

STABLE_TORCH_LIBRARY_IMPL(packedbert, CPU, m) {
  m.impl("embed", TORCH_BOX(&embed_cpu));
  m.impl("prepare_bert", TORCH_BOX(&prepare_bert_cpu));
  m.impl("bert_prepared", TORCH_BOX(&bert_prepared_cpu));
}

}  // namespace

void release_bert(int64_t key) { models().release(key); }

}  // namespace packedbert
