// All layers of a packed BERT encoder on the real tokens of a padded batch: the kernels in their order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/queue.h"
#include "epilogue.h"

namespace packedbert::cuda {

// A matrix on the device: in half precision as prepack_weight made it, in float32 canonical.
struct Matrix {
  const void* data;
  int64_t out_features;
  int64_t in_features;
};

// Vectors have the length of what they are added to.
struct EncoderLayer {
  int64_t heads;
  int64_t head_size;
  Matrix qkv;
  const void* qkv_bias;
  Matrix attention_output;
  const void* attention_output_bias;
  const void* attention_norm_weight;
  const void* attention_norm_bias;
  Matrix up;
  const void* up_bias;
  Matrix down;
  const void* down_bias;
  const void* output_norm_weight;
  const void* output_norm_bias;
};

// sums [rows, out_features] = x [rows, in_features] W^T in float32, by a library. The rows of x are `pitch`
// elements apart, those of the sums follow each other. Queued on the stream of the call.
using FloatProduct = cudaError_t (*)(
    const void* context, const float* x, int64_t rows, int64_t pitch, const Matrix& weight, float* sums);

struct Encoder {
  Dtype dtype;  // of everything
  int64_t sequences;
  int64_t length;
  int64_t hidden_size;
  int64_t layer_count;
  const EncoderLayer* layers;
  Activation activation;
  Norm norm;
  float eps;
  const bool* mask;   // on the device, [sequences, length], true for real tokens; null: all are
  const void* input;  // [sequences, length, hidden_size]
  void* output;       // the same; 0 at padded positions; overlaps nothing
  int multiprocessors;
  FloatProduct product;  // used in float32
  const void* product_context;

  int64_t tokens() const { return sequences * length; }
};

// Bytes of scratch memory that `encoder` wants, aligned to 16 bytes.
int64_t encoder_scratch_size(const Encoder& encoder);

// Queues the work; allocates nothing and waits for nothing, so that a CUDA
// graph can capture it. Returns the error of the launches, if any.
//
// In half precision a layer is seven launches: qkv, attention, out-projection, norm, up, down, norm. In
// float32 it is nine: each of the four products is followed by what is to be done with its rows.
cudaError_t encoder(const Encoder& encoder, void* scratch, const Queue& queue);

}  // namespace packedbert::cuda
