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

/// Blocks that run at the same time on neighbouring multiprocessors and may write each other's
/// shared memory. Before sm_90 every block is a cluster of its own.
struct ClusterPlace {
  int rank = 0;
  int size = 1;
};

__device__ inline ClusterPlace cluster_place() {
  ClusterPlace place;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(place.rank));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(place.size));
#endif
  return place;
}

/// The barrier of a cluster in its two halves; threads that have ended are not waited for. What a
/// thread wrote before arriving is visible after waiting.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// Stores into the shared memory of the cluster's block `rank`, at the address that `to` has here.
__device__ inline void cluster_store(float4* to, int rank, float4 x) {
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<unsigned>(__cvta_generic_to_shared(to));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
#else
  *to = x;
#endif
}
__device__ inline void cluster_store(float2* to, int rank, float2 x) {
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<unsigned>(__cvta_generic_to_shared(to));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(x.x), "f"(x.y)
               : "memory");
#else
  *to = x;
#endif
}

}  // namespace detail
}  // namespace sluice
