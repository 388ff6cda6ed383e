// What the ops*.cpp share: names and checks of tensors, and the arguments that the stable ABI hands over.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/parallel.h"
#include "epilogue.h"
#include "packed_layout.h"

namespace packedbert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string to_string(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    default:
      return torch::headeronly::toString(type);
  }
}

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another kind of device";
}

// Raises RuntimeError "op: argument: expected ..., got ...".
[[noreturn]] inline void fail(const char* op,
                              const char* argument,
                              const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string("packedbert::") + op + ": " + argument + ": expected " + expected +
                           ", got " + got);
}

// Checks the tensors of one call, which must agree with `like` in device and dtype.
struct Checker {
  const char* op;
  const Tensor& like;

  // Returns `tensor`, or a contiguous copy.
  Tensor operator()(const char* argument,
                    const Tensor& tensor,
                    const Shape& shape,
                    const std::string& why = "") const {
    if (device_of(tensor) != device_of(like))
      fail(op, argument, "a tensor on " + device_of(like), device_of(tensor));
    if (tensor.scalar_type() != like.scalar_type()) {
      fail(op, argument, to_string(like.scalar_type()), to_string(tensor.scalar_type()));
    }
    if (shape_of(tensor) != shape) fail(op, argument, to_string(shape) + why, to_string(shape_of(tensor)));
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }
};

// A `str` argument of an op, owned. Kernels take a StringHandle, because the conversion to std::string in
// torch 2.13's headers leaks the string that it makes (torch/csrc/stable/stableivalue_conversions.h,
// ToImpl<std::string>).
inline std::string take_string(StringHandle handle) {
  size_t size = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &size));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, size);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new") return Activation::gelu_new;
  fail(op, "activation", "one of 'none', 'relu', 'gelu', 'gelu_new'", "'" + name + "'");
}

inline Norm parse_norm(const char* op, const std::string& name) {
  if (name == "none") return Norm::none;
  if (name == "layer_norm") return Norm::layer_norm;
  if (name == "no_norm") return Norm::no_norm;
  fail(op, "norm", "one of 'none', 'layer_norm', 'no_norm'", "'" + name + "'");
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline void check_float32(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float)
    fail(op, argument, "float32", to_string(tensor.scalar_type()));
}

// An int8 weight has to be what packed_layout.h says. Its shape tells no more than the number of bytes. One
// that fits costs no allocation.
inline void check_quantized(
    const char* op, const char* argument, const Tensor& weight, int64_t out_features, int64_t in_features) {
  const int64_t size = quantized_size(out_features, in_features);
  if (!weight.is_cpu()) fail(op, argument, "a tensor on cpu", device_of(weight));
  if (weight.dim() != 1 || weight.size(0) != size) {
    fail(op, argument,
         to_string({size}) + " (pack_quantized of a " + to_string({out_features, in_features}) +
             " int8 weight)",
         to_string(shape_of(weight)));
  }
  if (!weight.is_contiguous()) fail(op, argument, "a contiguous tensor", "strides");
  if (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % alignof(float) != 0)
    fail(op, argument, "memory aligned for float", "a view that begins in between: clone() it");
  if (in_features > kMaxQuantizedInputs) {
    fail(op, argument, "at most " + std::to_string(kMaxQuantizedInputs) + " int8 inputs",
         std::to_string(in_features));
  }
}

// Scratch memory of one call, uninitialised, from a cache line on. From the C library, as torch's own is on
// the CPU.
class Floats {
 public:
  explicit Floats(int64_t size)
      : memory_(std::aligned_alloc(kLineBytes, (size * sizeof(float) / kLineBytes + 1) * kLineBytes)) {
    if (!memory_) throw std::bad_alloc();
  }
  float* get() const { return static_cast<float*>(memory_.get()); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static constexpr size_t kLineBytes = 64;
  std::unique_ptr<void, Free> memory_;
};

// A contiguous tensor of float32 on the CPU, uninitialised. Not by new_empty, which looks its op up by name
// and goes through torch's dispatcher: that took 30 us after an encoder, when none of it is in the caches.
inline Tensor empty_floats(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 0 ? shape[i] : 1);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

namespace cpu {

// A checked weight, of either kind.
inline Matrix matrix_of(const Tensor& weight, int64_t out_features, int64_t in_features) {
  return {out_features, in_features, weight.const_data_ptr(), weight.scalar_type() == ScalarType::Char};
}

// The ParallelFor of the CPU ops: torch's own pool.
inline void torch_parallel_for(int64_t count, int64_t grain, RangeTask task, const void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { task(context, begin, end); });
}

}  // namespace cpu

}  // namespace packedbert
