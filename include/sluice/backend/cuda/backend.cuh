// SPDX-License-Identifier: MIT
/// The CUDA backend's tag, its error check, and the questions that its kernels ask of the
/// architecture they are compiled for. Nothing reachable from here includes Eigen.
#pragma once

#include <source_location>
#include <string>

#include <cuda_runtime.h>

#include "sluice/core/backend.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// NVIDIA GPUs, compute capability 8.0 and later.
struct cuda : generic_backend {};

/// Turns a failed runtime call into an exception that names the call and the line it stands in.
/// \throws Error(kDevice) unless `status` is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* call,
                       std::source_location at = std::source_location::current()) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kDevice,
              {std::string(cudaGetErrorString(status)),
               std::string(at.file_name()) + ":" + std::to_string(at.line()), call, "cudaSuccess",
               cudaGetErrorName(status)});
}

namespace detail {

/// Holds a kernel that was launched early back until the kernel before it is complete and its
/// writes are visible. Without early launch, or before sm_90, there is nothing to wait for.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel of the stream start, if it was launched early; it still waits for this
/// one's writes in wait_for_previous_kernel(). Call it after one's own wait: then whatever was
/// written two kernels ago is visible to a kernel from its first instruction on.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace detail
}  // namespace sluice
