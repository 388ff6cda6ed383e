// The element types of the GPU kernels.
#pragma once

#include <cstdint>

namespace packedbert::cuda {

enum class Dtype { float32, float16, bfloat16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of matrices in scratch memory begin at multiples of 16 bytes, as copies of 16 bytes at once want it.
constexpr int64_t row_pitch(Dtype dtype, int64_t columns) {
  const int64_t elements = 16 / size_of(dtype);
  return (columns + elements - 1) / elements * elements;
}

}  // namespace packedbert::cuda
