// The emulated kernels for Python. Arrays come as addresses (0: none); __init__.py keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/encoder.h"
#include "cuda/packed_linear.h"
#include "cuda/pruned_attention.h"
#include "cuda/ragged_batch.h"
#include "cuda/row_epilogue.h"
#include "emulator.h"

namespace py = pybind11;
using namespace packedbert;
using namespace packedbert::cuda;

namespace {

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(emulator::last_error().empty() ? "cudaError " + std::to_string(error)
                                                          : emulator::last_error());
}

// In the place of a library's.
cudaError_t float_product(
    const void*, const float* x, int64_t rows, int64_t pitch, const Matrix& weight, float* sums) {
  if (emulator::options.only_record) return cudaSuccess;
  emulator::note_written(sums, rows * weight.out_features * sizeof(float));
  const auto* w = static_cast<const float*>(weight.data);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < weight.out_features; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < weight.in_features; ++k)
        sum += double{x[row * pitch + k]} * w[n * weight.in_features + k];
      sums[row * weight.out_features + n] = static_cast<float>(sum);
    }
  }
  return cudaSuccess;
}

// Of a layer: heads, head_size, width, and the addresses of the twelve tensors of reference.LayerWeights.
using Layer = std::tuple<int64_t, int64_t, int64_t, std::vector<uintptr_t>>;

std::vector<EncoderLayer> take_layers(const std::vector<Layer>& layers, int64_t hidden_size) {
  std::vector<EncoderLayer> result;
  for (const auto& [heads, head_size, width, w] : layers) {
    const int64_t inner = heads * head_size;
    result.push_back({heads,
                      head_size,
                      {at(w[0]), 3 * inner, hidden_size},
                      at(w[1]),
                      {at(w[2]), hidden_size, inner},
                      at(w[3]),
                      at(w[4]),
                      at(w[5]),
                      {at(w[6]), width, hidden_size},
                      at(w[7]),
                      {at(w[8]), hidden_size, width},
                      at(w[9]),
                      at(w[10]),
                      at(w[11])});
  }
  return result;
}

py::list launches() {
  py::list result;
  for (const emulator::Launch& l : emulator::launches) {
    py::dict d;
    d["kernel"] = l.kernel;
    d["grid"] = py::make_tuple(l.grid.x, l.grid.y, l.grid.z);
    d["threads"] = l.threads;
    d["shared_bytes"] = l.shared_bytes;
    d["arguments"] = py::bytes(l.arguments);
    d["matrix_loads"] = l.matrix_loads;
    d["bank_conflicts"] = l.bank_conflicts;
    d["multiplications"] = l.multiplications;
    d["traffic"] = l.traffic;
    result.append(d);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(PACKEDBERT_EMULATOR_MODULE, m) {
  m.def("configure", [](uint64_t seed, int copies_land, bool races, bool only_record, bool overlaps) {
    emulator::options = {seed, copies_land, races, only_record, overlaps};
    emulator::launches.clear();
  });
  m.def("watch", [](const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
    std::vector<std::pair<const void*, size_t>> buffers;
    for (const auto& [begin, size] : ranges) buffers.emplace_back(at(begin), size);
    emulator::watch(buffers);
  });
  m.def("launches", &launches);
  m.def("plan_linear", [](int64_t rows, int64_t out, int64_t in, int multiprocessors, bool may_split) {
    const LinearPlan plan = plan_linear(rows, out, in, multiprocessors, may_split);
    return py::make_tuple(plan.rows, plan.columns, plan.splits);
  });
  m.def("prepack_weight", [](uintptr_t weight, int64_t out, int64_t in, uintptr_t packed) {
    check(prepack_weight(at(weight), out, in, at(packed), {}));
  });
  m.def("packed_linear", [](int dtype, std::tuple<int, int, int> plan, int64_t rows, int64_t in, int64_t out,
                            uintptr_t rows_used, uintptr_t input, int64_t input_pitch, uintptr_t weight,
                            uintptr_t bias, uintptr_t residual, int64_t residual_pitch, uintptr_t output,
                            int64_t output_pitch, uintptr_t sums, int activation) {
    check(packed_linear({.dtype = Dtype(dtype),
                         .plan = {std::get<0>(plan), std::get<1>(plan), std::get<2>(plan)},
                         .rows = rows,
                         .in_features = in,
                         .out_features = out,
                         .rows_used = at<int32_t>(rows_used),
                         .input = at(input),
                         .input_pitch = input_pitch,
                         .weight = at(weight),
                         .bias = at(bias),
                         .residual = at(residual),
                         .residual_pitch = residual_pitch,
                         .output = at(output),
                         .output_pitch = output_pitch,
                         .sums = at<float>(sums),
                         .activation = Activation(activation)},
                        {}));
  });
  m.def("row_epilogue",
        [](int dtype, int64_t rows, int64_t size, uintptr_t rows_used, uintptr_t sums, int splits,
           uintptr_t input, int64_t input_pitch, uintptr_t bias, uintptr_t residual, int64_t residual_pitch,
           uintptr_t norm_weight, uintptr_t norm_bias, uintptr_t output, int64_t output_pitch,
           uintptr_t output_rows, int activation, int norm, float eps) {
          check(row_epilogue({.dtype = Dtype(dtype),
                              .rows = rows,
                              .size = size,
                              .rows_used = at<int32_t>(rows_used),
                              .sums = at<float>(sums),
                              .splits = splits,
                              .input = at(input),
                              .input_pitch = input_pitch,
                              .bias = at(bias),
                              .residual = at(residual),
                              .residual_pitch = residual_pitch,
                              .norm_weight = at(norm_weight),
                              .norm_bias = at(norm_bias),
                              .output = at(output),
                              .output_pitch = output_pitch,
                              .output_rows = at<int32_t>(output_rows),
                              .activation = Activation(activation),
                              .norm = Norm(norm),
                              .eps = eps},
                             {}));
        });
  m.def("gather_tokens", [](int dtype, int64_t sequences, int64_t length, int64_t hidden_size, uintptr_t mask,
                            uintptr_t padded, uintptr_t cu_seqlens, uintptr_t tokens, int64_t tokens_pitch,
                            uintptr_t positions, uintptr_t output) {
    check(gather_tokens({.dtype = Dtype(dtype),
                         .sequences = sequences,
                         .length = length,
                         .hidden_size = hidden_size,
                         .mask = at<bool>(mask),
                         .padded = at(padded),
                         .cu_seqlens = at<int32_t>(cu_seqlens),
                         .tokens = at(tokens),
                         .tokens_pitch = tokens_pitch,
                         .positions = at<int32_t>(positions),
                         .output = at(output)},
                        {}));
  });
  m.def("pruned_attention",
        [](int dtype, int64_t tokens, int64_t sequences, int64_t heads, int64_t head_size,
           uintptr_t cu_seqlens, uintptr_t qkv, int64_t qkv_pitch, uintptr_t output, int64_t output_pitch) {
          check(pruned_attention({.dtype = Dtype(dtype),
                                  .tokens = tokens,
                                  .sequences = sequences,
                                  .heads = heads,
                                  .head_size = head_size,
                                  .cu_seqlens = at<int32_t>(cu_seqlens),
                                  .qkv = at(qkv),
                                  .qkv_pitch = qkv_pitch,
                                  .output = at(output),
                                  .output_pitch = output_pitch},
                                 {}));
        });
  // Without scratch memory: how much of it is needed. Else: run.
  m.def("encoder", [](int dtype, int64_t sequences, int64_t length, int64_t hidden_size,
                      const std::vector<Layer>& layers, int activation, int norm, float eps, uintptr_t mask,
                      uintptr_t input, uintptr_t output, int multiprocessors, uintptr_t scratch) {
    const std::vector<EncoderLayer> taken = take_layers(layers, hidden_size);
    const Encoder call{.dtype = Dtype(dtype),
                       .sequences = sequences,
                       .length = length,
                       .hidden_size = hidden_size,
                       .layer_count = static_cast<int64_t>(taken.size()),
                       .layers = taken.data(),
                       .activation = Activation(activation),
                       .norm = Norm(norm),
                       .eps = eps,
                       .mask = at<bool>(mask),
                       .input = at(input),
                       .output = at(output),
                       .multiprocessors = multiprocessors,
                       .product = float_product,
                       .product_context = nullptr};
    if (scratch) check(encoder(call, at(scratch), {nullptr, emulator::options.overlaps}));
    return encoder_scratch_size(call);
  });
}
