// Where kernels are queued.
#pragma once

#include <cuda_runtime_api.h>

namespace packedbert::cuda {

struct Queue {
  cudaStream_t stream = nullptr;  // of the current device
  // A kernel may begin while the one before it in the stream ends (programmatic dependent launch, CUDA C++
  // programming guide). What it reads before it calls wait_for_kernel_before has to be written before the
  // last kernel that did not overlap.
  bool overlaps = false;
};

// Whether the kernels may overlap on the current device: as they were compiled for it, they wait.
bool kernels_can_overlap();

}  // namespace packedbert::cuda
