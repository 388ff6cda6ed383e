// Where kernels are queued.
#pragma once

#include <cuda_runtime_api.h>

namespace packedbert::cuda {

struct Queue {
  cudaStream_t stream = nullptr;  // of the current device
  // A kernel may begin while the one before it in the stream ends (programmatic dependent launch, CUDA C++
  // programming guide; compute capability 9.0 and up). For kernels that call wait_for_kernel_before, after
  // one of ours that does.
  bool overlaps = false;
};

}  // namespace packedbert::cuda
