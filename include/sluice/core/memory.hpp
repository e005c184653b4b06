// SPDX-License-Identifier: MIT
/// Owning storage whose size is fixed at construction. A `Buffer` never grows: that is what makes
/// "a step allocates nothing" checkable by reading the types.
#pragma once

#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "sluice/core/backend.hpp"

namespace sluice {

/// Alignment of every buffer: a cache line, and the widest vector register.
inline constexpr std::size_t kAlignment = 64;

/// `size` elements of a trivial type, zero-initialised, aligned to kAlignment. Movable, not
/// copyable: copies of caches and weights are always explicit. Those of 4 MiB and more ask the
/// system for large pages (Linux: transparent huge pages), in which a pass over a cache meets fewer
/// misses of address translation; without them nothing else is different.
template <class T, Backend Tag = cpu>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  /// \throws std::bad_alloc if there is no such memory.
  explicit Buffer(std::size_t size)
      : size_(size), data_(allocate(size), Free{alignment_of(size * sizeof(T))}) {
    std::uninitialized_value_construct_n(data_.get(), size);
  }
  Buffer(Buffer&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::move(other.data_)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    size_ = std::exchange(other.size_, 0);
    data_ = std::move(other.data_);
    return *this;
  }

  T* data() noexcept { return data_.get(); }
  const T* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return size_ * sizeof(T); }
  T& operator[](std::size_t index) { return data_.get()[index]; }
  const T& operator[](std::size_t index) const { return data_.get()[index]; }
  std::span<T> span() noexcept { return {data_.get(), size_}; }
  std::span<const T> span() const noexcept { return {data_.get(), size_}; }

 private:
  static T* allocate(std::size_t size) {
    if (size == 0) return nullptr;
    // Sizes may come from files: a product that wraps must not succeed with a few bytes.
    if (size > std::numeric_limits<std::size_t>::max() / sizeof(T))
      throw std::bad_array_new_length();
    const std::size_t bytes = size * sizeof(T);
    T* const data = static_cast<T*>(::operator new(bytes, alignment_of(bytes)));
#if defined(MADV_HUGEPAGE)
    // A hint. What is behind the last whole page stays with what the allocator has there.
    if (bytes >= kLargeBytes) ::madvise(data, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
    return data;
  }

  static constexpr std::size_t kLargePage = std::size_t{2} << 20;
  static constexpr std::size_t kLargeBytes = 2 * kLargePage;
  static constexpr std::align_val_t alignment_of(std::size_t bytes) {
    return std::align_val_t{bytes >= kLargeBytes ? kLargePage : kAlignment};
  }

  struct Free {
    std::align_val_t alignment{kAlignment};
    void operator()(T* pointer) const noexcept { ::operator delete(pointer, alignment); }
  };
  std::size_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace sluice
