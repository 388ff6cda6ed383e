#include "cuda/encoder.h"

#include <algorithm>

#include "cuda/packed_linear.h"
#include "cuda/pruned_attention.h"
#include "cuda/ragged_batch.h"
#include "cuda/row_epilogue.h"

namespace packedbert::cuda {

namespace {

// A part of the scratch memory: rows of elements of the encoder's type.
struct Rows {
  void* data;
  int64_t pitch;
};

// Scratch memory, one array after the other. Without memory it only adds up.
struct Scratch {
  unsigned char* memory;
  int64_t size = 0;

  void* take(int64_t bytes) {
    constexpr int64_t alignment = 256;
    void* array = memory ? memory + size : nullptr;
    size += (bytes + alignment - 1) / alignment * alignment;
    return array;
  }
};

// What the kernels write between input and output.
struct Arrays {
  int32_t* cu_seqlens;
  int32_t* positions;
  Rows tokens;  // the hidden states at the beginning of a layer
  Rows attended;
  Rows qkv;
  Rows context;
  Rows up;
  float* sums;
};

// Only a norm adds the parts of a product up, so only what comes before one may be split.
LinearPlan plan_before_norm(const Encoder& e, const Matrix& weight) {
  return plan_linear(e.tokens(), weight.out_features, weight.in_features, e.multiprocessors, true);
}

Arrays take_arrays(const Encoder& e, Scratch& scratch) {
  int64_t qkv = 0;
  int64_t context = 0;
  int64_t up = 0;
  int64_t sums = 0;
  for (const EncoderLayer* layer = e.layers; layer != e.layers + e.layer_count; ++layer) {
    qkv = std::max(qkv, layer->qkv.out_features);
    context = std::max(context, layer->attention_output.in_features);
    up = std::max(up, layer->up.out_features);
    if (e.dtype == Dtype::float32) {
      sums = std::max({sums, layer->qkv.out_features, layer->up.out_features, e.hidden_size});
    } else {
      for (const Matrix* weight : {&layer->attention_output, &layer->down}) {
        const int splits = plan_before_norm(e, *weight).splits;
        if (splits > 1) sums = std::max(sums, splits * e.hidden_size);
      }
    }
  }
  const auto take_rows = [&](int64_t columns) -> Rows {
    const int64_t pitch = row_pitch(e.dtype, columns);
    return {scratch.take(e.tokens() * pitch * size_of(e.dtype)), pitch};
  };
  return {
      .cu_seqlens = static_cast<int32_t*>(scratch.take((e.sequences + 1) * 4)),
      .positions = static_cast<int32_t*>(scratch.take(e.tokens() * 4)),
      .tokens = take_rows(e.hidden_size),
      .attended = take_rows(e.hidden_size),
      .qkv = take_rows(qkv),
      .context = take_rows(context),
      .up = take_rows(up),
      .sums = static_cast<float*>(scratch.take(e.tokens() * sums * 4)),
  };
}

// The launches of one call. The first error ends them.
struct Run {
  const Encoder& e;
  const Arrays& arrays;
  const int32_t* rows_used;
  const Queue& queue;

  RowEpilogue epilogue(int64_t size, const void* bias) const {
    return {
        .dtype = e.dtype,
        .rows = e.tokens(),
        .size = size,
        .rows_used = rows_used,
        .sums = nullptr,
        .splits = 0,
        .input = nullptr,
        .input_pitch = 0,
        .bias = bias,
        .residual = nullptr,
        .residual_pitch = 0,
        .norm_weight = nullptr,
        .norm_bias = nullptr,
        .output = nullptr,
        .output_pitch = 0,
        .output_rows = nullptr,
        .activation = Activation::none,
        .norm = Norm::none,
        .eps = e.eps,
    };
  }

  PackedLinear linear(const Rows& input, const Matrix& weight, const void* bias, LinearPlan plan) const {
    return {
        .dtype = e.dtype,
        .plan = plan,
        .rows = e.tokens(),
        .in_features = weight.in_features,
        .out_features = weight.out_features,
        .rows_used = rows_used,
        .input = input.data,
        .input_pitch = input.pitch,
        .weight = weight.data,
        .bias = bias,
        .residual = nullptr,
        .residual_pitch = 0,
        .output = nullptr,
        .output_pitch = 0,
        .sums = nullptr,
        .activation = Activation::none,
    };
  }

  cudaError_t product(const Rows& input, const Matrix& weight) const {
    return e.product(e.product_context, static_cast<const float*>(input.data), e.tokens(), input.pitch,
                     weight, arrays.sums);
  }

  // output = activation(input W^T + bias)
  cudaError_t project(const Rows& input,
                      const Matrix& weight,
                      const void* bias,
                      Activation activation,
                      const Rows& output) const {
    if (weight.out_features == 0) return cudaSuccess;
    if (e.dtype != Dtype::float32) {
      PackedLinear call =
          linear(input, weight, bias,
                 plan_linear(e.tokens(), weight.out_features, weight.in_features, e.multiprocessors, false));
      call.output = output.data;
      call.output_pitch = output.pitch;
      call.activation = activation;
      return packed_linear(call, queue);
    }
    if (const cudaError_t error = product(input, weight); error != cudaSuccess) return error;
    RowEpilogue rest = epilogue(weight.out_features, bias);
    rest.sums = arrays.sums;
    rest.splits = 1;
    rest.output = output.data;
    rest.output_pitch = output.pitch;
    rest.activation = activation;
    return row_epilogue(rest, queue);
  }

  // output = norm(input W^T + bias + residual)
  cudaError_t project_and_normalize(const Rows& input,
                                    const Matrix& weight,
                                    const void* bias,
                                    const Rows& residual,
                                    const void* norm_weight,
                                    const void* norm_bias,
                                    const Rows& output,
                                    const int32_t* output_rows) const {
    RowEpilogue rest = epilogue(e.hidden_size, bias);
    rest.residual = residual.data;
    rest.residual_pitch = residual.pitch;
    rest.norm = e.norm;
    rest.norm_weight = norm_weight;
    rest.norm_bias = norm_bias;
    rest.output = output.data;
    rest.output_pitch = output.pitch;
    rest.output_rows = output_rows;
    cudaError_t error = cudaSuccess;
    if (weight.in_features == 0) {
      // Nothing is left of this half of the layer but what was folded into its bias.
    } else if (e.dtype == Dtype::float32) {
      error = product(input, weight);
      rest.sums = arrays.sums;
      rest.splits = 1;
    } else {
      const LinearPlan plan = plan_before_norm(e, weight);
      PackedLinear call = linear(input, weight, bias, plan);
      if (plan.splits > 1) {
        call.sums = arrays.sums;
        rest.sums = arrays.sums;
        rest.splits = plan.splits;
      } else {
        // In place of the residual: a thread reads of it what it then writes.
        call.residual = residual.data;
        call.residual_pitch = residual.pitch;
        call.output = residual.data;
        call.output_pitch = residual.pitch;
        rest.input = residual.data;
        rest.input_pitch = residual.pitch;
        rest.bias = nullptr;
        rest.residual = nullptr;
      }
      error = packed_linear(call, queue);
    }
    return error != cudaSuccess ? error : row_epilogue(rest, queue);
  }

  cudaError_t layer(const EncoderLayer& layer, const Rows& output, const int32_t* output_rows) const {
    cudaError_t error = project(arrays.tokens, layer.qkv, layer.qkv_bias, Activation::none, arrays.qkv);
    if (error != cudaSuccess) return error;
    error = pruned_attention(
        {
            .dtype = e.dtype,
            .tokens = e.tokens(),
            .sequences = e.sequences,
            .heads = layer.heads,
            .head_size = layer.head_size,
            .cu_seqlens = arrays.cu_seqlens,
            .qkv = arrays.qkv.data,
            .qkv_pitch = arrays.qkv.pitch,
            .output = arrays.context.data,
            .output_pitch = arrays.context.pitch,
        },
        queue);
    if (error != cudaSuccess) return error;
    error = project_and_normalize(arrays.context, layer.attention_output, layer.attention_output_bias,
                                  arrays.tokens, layer.attention_norm_weight, layer.attention_norm_bias,
                                  arrays.attended, nullptr);
    if (error != cudaSuccess) return error;
    error = project(arrays.attended, layer.up, layer.up_bias, e.activation, arrays.up);
    if (error != cudaSuccess) return error;
    return project_and_normalize(arrays.up, layer.down, layer.down_bias, arrays.attended,
                                 layer.output_norm_weight, layer.output_norm_bias, output, output_rows);
  }
};

}  // namespace

int64_t encoder_scratch_size(const Encoder& encoder) {
  Scratch scratch{nullptr};
  take_arrays(encoder, scratch);
  return scratch.size;
}

cudaError_t encoder(const Encoder& e, void* memory, const Queue& queue) {
  if (e.tokens() == 0 || e.hidden_size == 0) return cudaSuccess;
  Scratch scratch{static_cast<unsigned char*>(memory)};
  const Arrays arrays = take_arrays(e, scratch);
  // Without a mask too: a layer writes where it has read its input, and the caller's isn't ours to write.
  cudaError_t error = gather_tokens(
      {
          .dtype = e.dtype,
          .sequences = e.sequences,
          .length = e.length,
          .hidden_size = e.hidden_size,
          .mask = e.mask,
          .padded = e.input,
          .cu_seqlens = arrays.cu_seqlens,
          .tokens = arrays.tokens.data,
          .tokens_pitch = arrays.tokens.pitch,
          .positions = arrays.positions,
          .output = e.output,
      },
      queue);
  const Run run{e, arrays, e.mask ? arrays.cu_seqlens + e.sequences : nullptr, queue};
  if (e.layer_count == 0 && error == cudaSuccess) {
    RowEpilogue copy = run.epilogue(e.hidden_size, nullptr);
    copy.input = arrays.tokens.data;
    copy.input_pitch = arrays.tokens.pitch;
    copy.output = e.output;
    copy.output_pitch = e.hidden_size;
    copy.output_rows = e.mask ? arrays.positions : nullptr;
    return row_epilogue(copy, queue);
  }
  for (int64_t i = 0; i < e.layer_count && error == cudaSuccess; ++i) {
    const bool last = i + 1 == e.layer_count;
    error = last ? run.layer(e.layers[i], {e.output, e.hidden_size}, e.mask ? arrays.positions : nullptr)
                 : run.layer(e.layers[i], arrays.tokens, nullptr);
  }
  return error;
}

}  // namespace packedbert::cuda
