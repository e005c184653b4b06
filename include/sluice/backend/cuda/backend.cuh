// SPDX-License-Identifier: MIT
/// The CUDA backend's error check, and the questions that its kernels ask of the
/// architecture they are compiled for. Nothing reachable from here includes Eigen.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

#include <cuda_runtime.h>

#include "sluice/backend/cuda/tag.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// Turns a failed runtime call into an exception that names the call and the line it stands in.
/// \throws Error(kDevice) unless `status` is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* call,
                       std::source_location at = std::source_location::current()) {
  if (status == cudaSuccess) return;
  // The runtime keeps the error, and the check of the next launch would report it once more.
  static_cast<void>(cudaGetLastError());
  throw Error(ErrorCode::kDevice, {std::string(cudaGetErrorString(status)),
                                   std::string(at.file_name()) + ":" + std::to_string(at.line()),
                                   call, "cudaSuccess", cudaGetErrorName(status)});
}

namespace detail {

/// Does nothing: asked about, it tells for which GPUs the program was compiled.
template <int kUnused>
__global__ void probe_kernel() {}

}  // namespace detail

/// Makes a device the calling thread's current one as long as this lives, then the one that was.
/// What allocates and launches does so on the current device. \throws Error(kDevice).
class CudaDeviceScope {
 public:
  explicit CudaDeviceScope(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == kCurrentDevice || device == before_) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~CudaDeviceScope() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  CudaDeviceScope(const CudaDeviceScope&) = delete;
  CudaDeviceScope& operator=(const CudaDeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// The index of a device, the current one's where `device` is kCurrentDevice. \throws
/// Error(kDevice) saying what was found, unless it is a GPU that this backend runs on and that the
/// program was compiled for. `where`: who asks.
template <int kUnused = 0>
int require_cuda_device(const char* where, int device = kCurrentDevice) {
  const auto fail = [&](const std::string& found) {
    static_cast<void>(cudaGetLastError());  // as in check_cuda()
    throw Error(ErrorCode::kDevice,
                {"no GPU that the CUDA backend can use", where, "device",
                 "an NVIDIA GPU of compute capability 8.0 or later, and its driver", found});
  };
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) fail(cudaGetErrorString(status));
  if (count == 0) fail("none");
  if (device < kCurrentDevice || device >= count)
    throw Error(ErrorCode::kDevice, {"no such GPU", where, "device",
                                     "0 to " + std::to_string(count - 1), std::to_string(device)});
  int major = 0;
  int minor = 0;
  const CudaDeviceScope scope(device);
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  const std::string capability =
      "compute capability " + std::to_string(major) + "." + std::to_string(minor);
  if (major < 8) fail(capability);
  cudaFuncAttributes attributes{};
  const cudaError_t compiled = cudaFuncGetAttributes(&attributes, detail::probe_kernel<kUnused>);
  if (compiled == cudaErrorNoKernelImageForDevice || compiled == cudaErrorInvalidDeviceFunction)
    fail(capability + ", which CMAKE_CUDA_ARCHITECTURES left out");
  check_cuda(compiled, "cudaFuncGetAttributes");
  return device;
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

// Attributes of a kernel belong to the address of its host stub. nvcc gives every translation unit
// that instantiates a kernel template a stub of its own, while the linker keeps one copy of an
// inline function that names it, of whichever unit. So an attribute may be set on one unit's kernel
// and another unit's launched, without it. Whoever sets attributes keeps the address that they were
// set on, and launches that.

/// Asks for the largest share of a multiprocessor's memory as shared memory. Kernels that are to
/// run side by side must agree: a multiprocessor is divided anew only when it is empty.
template <class Kernel>
void prefer_shared_memory(Kernel kernel) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "cudaFuncSetAttribute");
}

/// Asks for bytes to be brought into the second-level cache, beside everything else; a multiple of
/// 16, as is `from`. Before sm_90 it does nothing.
__device__ inline void prefetch_bytes(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/// Blocks that run at the same time on neighbouring multiprocessors and may write each other's
/// shared memory. Before sm_90 every block is a cluster of its own.
struct ClusterPlace {
  int rank;   ///< of this block in its cluster
  int size;   ///< blocks of a cluster
  int index;  ///< of this cluster along x
  int count;  ///< clusters along x
};

__device__ inline ClusterPlace cluster_place() {
#if __CUDA_ARCH__ >= 900
  ClusterPlace place;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(place.rank));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(place.size));
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(place.index));
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(place.count));
  return place;
#else
  return {0, 1, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
#endif
}

/// The barrier of a cluster in its two halves; threads that have ended are not waited for. It
/// orders reads before, and barriers made before, against what other blocks do after it; it
/// publishes no stores.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// The first half for a block that has stored into others' shared memory, or into its own for them:
/// its stores are seen behind their cluster_wait().
__device__ inline void cluster_publish() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
/// Stores into the shared memory of the cluster's block `rank`, at the address that `to` has here.
__device__ inline void store_in_cluster(float* to, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
#else
  *to = x;
#endif
}
/// Reads the shared memory of block `rank` of the cluster, at the address that `from` has here:
/// between the barrier that follows cluster_publish() there and the next.
__device__ inline float read_of_block(const float* from, int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  float x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there));
  return x;
#else
  static_cast<void>(rank);
  return *from;
#endif
}

/// A barrier in shared memory that opens once, when the announced number of bytes has arrived from
/// other blocks. One thread makes it, before cluster_arrive(); one announces.
__device__ inline void byte_barrier_init(std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
          static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
      : "memory");
#endif
}
__device__ inline void byte_barrier_expect(std::uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
#endif
}
__device__ inline void byte_barrier_wait(std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  int open = 0;
  while (open == 0)
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(open)
        : "r"(address)
        : "memory");
#endif
}

/// Stores into the shared memory of the cluster's first block, at the address that `to` has here,
/// and counts the bytes at its `barrier`. The store and its announcement travel together.
template <class T>
__device__ void send_to_first_block(T* to, T x, std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  unsigned barrier_there;
  asm("mapa.shared::cluster.u32 %0, %1, 0;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))));
  asm("mapa.shared::cluster.u32 %0, %1, 0;"
      : "=r"(barrier_there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))));
  if constexpr (sizeof(T) == 16)
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(there),
        "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier_there)
        : "memory");
  else
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
            there),
        "f"(x.x), "f"(x.y), "r"(barrier_there)
        : "memory");
#endif
}

}  // namespace detail
}  // namespace sluice
