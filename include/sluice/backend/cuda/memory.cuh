// SPDX-License-Identifier: MIT
/// Device memory whose size is fixed at construction: Buffer for the CUDA backend.
#pragma once

#include <cstddef>
#include <limits>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/core/memory.hpp"

namespace sluice {

/// `size` elements of a trivial type on the current device, zero-initialised, aligned to 256 bytes.
/// Movable, not copyable. data() is a device pointer: the host may not follow it.
/// upload() and download() wait for the stream; nothing else here does.
template <class T>
class Buffer<T, cuda> {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  /// \throws Error(kDevice) if there is no such memory.
  explicit Buffer(std::size_t size) : size_(size) {
    if (size == 0) return;
    if (size > std::numeric_limits<std::size_t>::max() / sizeof(T))
      throw std::bad_array_new_length();
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes()), "cudaMalloc");
    data_ = static_cast<T*>(memory);
    const cudaError_t status = cudaMemset(data_, 0, bytes());
    if (status != cudaSuccess) free_memory();
    check_cuda(status, "cudaMemset");
  }
  /// A copy of `content`.
  explicit Buffer(std::span<const T> content) : Buffer(content.size()) { upload(content); }
  ~Buffer() { free_memory(); }
  Buffer(Buffer&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    if (this == &other) return *this;
    free_memory();
    size_ = std::exchange(other.size_, 0);
    data_ = std::exchange(other.data_, nullptr);
    return *this;
  }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return size_ * sizeof(T); }

  /// Copies `content` to the front of the buffer. \throws Error(kShape) if it is longer.
  void upload(std::span<const T> content, cudaStream_t stream = nullptr) {
    if (content.size() > size_)
      throw Error(ErrorCode::kShape,
                  {"content does not fit", "Buffer<T, cuda>::upload", "elements",
                   "at most " + std::to_string(size_), std::to_string(content.size())});
    if (content.empty()) return;
    check_cuda(cudaMemcpyAsync(data_, content.data(), content.size_bytes(), cudaMemcpyHostToDevice,
                               stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  /// All elements, on the host. Allocates.
  std::vector<T> download(cudaStream_t stream = nullptr) const {
    std::vector<T> result(size_);
    if (size_ == 0) return result;
    check_cuda(cudaMemcpyAsync(result.data(), data_, bytes(), cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return result;
  }

 private:
  void free_memory() noexcept {
    // A failure here is the echo of an earlier one that was reported where it happened.
    if (data_ != nullptr) static_cast<void>(cudaFree(data_));
    data_ = nullptr;
  }

  std::size_t size_ = 0;
  T* data_ = nullptr;
};

}  // namespace sluice
