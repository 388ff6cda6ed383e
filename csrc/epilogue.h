// What happens to a linear layer's sums before they are stored. Shared by the CPU and the CUDA kernels.
#pragma once

namespace packedbert {

enum class Activation {
  none,
  relu,      // max(x, 0); a NaN stays a NaN
  gelu,      // x * Phi(x), Phi the exact normal distribution function
  gelu_new,  // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
};

enum class Norm {
  none,
  layer_norm,  // (x - mean) / sqrt(variance + eps) * norm_weight + norm_bias, over the row; biased variance
  no_norm,     // x * norm_weight + norm_bias (nn_pruning's NoNorm)
};

inline constexpr float kLog2E = 1.4426950408889634f;  // e^x = 2^(x log2(e)): GELU's, and the softmax's

}  // namespace packedbert
