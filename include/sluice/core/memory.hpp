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

#include "sluice/core/backend.hpp"

namespace sluice {

/// Alignment of every buffer: a cache line, and the widest vector register.
inline constexpr std::size_t kAlignment = 64;

/// `size` elements of a trivial type, zero-initialised, aligned to kAlignment. Movable, not
/// copyable: copies of caches and weights are always explicit.
template <class T, Backend Tag = cpu>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  /// \throws std::bad_alloc if there is no such memory.
  explicit Buffer(std::size_t size) : size_(size), data_(allocate(size)) {
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
    return static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kAlignment}));
  }

  struct Free {
    void operator()(T* pointer) const noexcept {
      ::operator delete(pointer, std::align_val_t{kAlignment});
    }
  };
  std::size_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace sluice
