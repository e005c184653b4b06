// SPDX-License-Identifier: MIT
/// Counts heap allocations of the whole program, all threads. Defines replacements of the
/// allocation functions: include it in exactly one translation unit of an executable.
///
/// With the GNU C library the malloc family itself is replaced, so that operator new, Eigen (which
/// calls malloc) and C libraries are all seen. Under a sanitizer, which brings its own malloc, and
/// with other C libraries, only operator new is.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "support/sanitizers.hpp"

#if defined(__GLIBC__) && !SLUICE_TEST_SANITIZED
#define SLUICE_TEST_COUNTS_MALLOC 1
#else
#define SLUICE_TEST_COUNTS_MALLOC 0
#endif

namespace sluice::test {

namespace detail {
inline constinit std::atomic<std::int64_t> allocations{0};
inline void count_allocation() noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace detail

/// Allocations (calls that may return new memory, realloc included) since the program began. A step
/// allocates nothing if two readings around it are equal.
inline std::int64_t allocation_count() noexcept {
  return detail::allocations.load(std::memory_order_relaxed);
}

}  // namespace sluice::test

#if SLUICE_TEST_COUNTS_MALLOC

extern "C" {

void* __libc_malloc(std::size_t size) noexcept;
void* __libc_calloc(std::size_t count, std::size_t size) noexcept;
void* __libc_realloc(void* pointer, std::size_t size) noexcept;
void* __libc_memalign(std::size_t alignment, std::size_t size) noexcept;

void* malloc(std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  return __libc_calloc(count, size);
}
void* realloc(void* pointer, std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  return __libc_realloc(pointer, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** result, std::size_t alignment, std::size_t size) noexcept {
  sluice::test::detail::count_allocation();
  void* const pointer = __libc_memalign(alignment, size);
  if (pointer == nullptr) return ENOMEM;
  *result = pointer;
  return 0;
}

}  // extern "C"

#else

namespace sluice::test::detail {

inline void* allocate(std::size_t size, std::size_t alignment) noexcept {
  count_allocation();
  if (size == 0) size = 1;
  if (alignment <= __STDCPP_DEFAULT_NEW_ALIGNMENT__) return std::malloc(size);
  return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

inline void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  void* const pointer = allocate(size, alignment);
  if (pointer == nullptr) throw std::bad_alloc();
  return pointer;
}

// Not inlined: the compiler would see free() meet operator new, and warn.
[[gnu::noinline]] inline void release(void* pointer) noexcept {
  std::free(pointer);
}

}  // namespace sluice::test::detail

void* operator new(std::size_t size) {
  return sluice::test::detail::allocate_or_throw(size, 1);
}
void* operator new[](std::size_t size) {
  return sluice::test::detail::allocate_or_throw(size, 1);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return sluice::test::detail::allocate_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return sluice::test::detail::allocate_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return sluice::test::detail::allocate(size, 1);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return sluice::test::detail::allocate(size, 1);
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return sluice::test::detail::allocate(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return sluice::test::detail::allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* pointer) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete(void* pointer, std::size_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer, std::size_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete(void* pointer, std::align_val_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer, std::align_val_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer, std::size_t, std::align_val_t) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete(void* pointer, const std::nothrow_t&) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer, const std::nothrow_t&) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete(void* pointer, std::align_val_t, const std::nothrow_t&) noexcept {
  sluice::test::detail::release(pointer);
}
void operator delete[](void* pointer, std::align_val_t, const std::nothrow_t&) noexcept {
  sluice::test::detail::release(pointer);
}

#endif
