// What of packed_linear does not depend on the instruction set: the choice of the body, and prepacking.
#include "cpu/packed_linear.h"

#include "cpu/isa.h"
#include "packed_layout.h"

namespace packedbert::cpu {

void packed_linear(const PackedLinear& linear, ParallelFor parallel_for) {
  PACKEDBERT_CALL_FOR_ISA(linear.isa, packed_linear, linear, parallel_for);
}

namespace {

struct Prepack {
  const float* weight;
  int64_t row_stride;
  int64_t column_stride;
  int64_t out_features;
  int64_t in_features;
  float* packed;
};

void prepack_panels(const void* context, int64_t begin, int64_t end) {
  const Prepack& job = *static_cast<const Prepack*>(context);
  float* to = job.packed + begin * job.in_features * kPanelWidth;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t k = 0; k < job.in_features; ++k) {
      for (int64_t n = panel * kPanelWidth; n < (panel + 1) * kPanelWidth; ++n) {
        *to++ = n < job.out_features ? job.weight[n * job.row_stride + k * job.column_stride] : 0.0f;
      }
    }
  }
}

}  // namespace

void prepack_linear(const float* weight,
                    int64_t row_stride,
                    int64_t column_stride,
                    int64_t out_features,
                    int64_t in_features,
                    float* packed,
                    ParallelFor parallel_for) {
  const Prepack job{weight, row_stride, column_stride, out_features, in_features, packed};
  parallel_for(panel_count(out_features), 4, prepack_panels, &job);
}

}  // namespace packedbert::cpu
