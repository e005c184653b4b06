// SPDX-License-Identifier: MIT
// With SLUICE_TEST_NO_THREADS in the environment a program that links this file can start no
// thread: a test that needs one fails. That proves which tests ThreadSanitizer may leave out.
#include <cerrno>
#include <cstdlib>

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <pthread.h>

#include <system_error>
#include <thread>

// Stands before the C library's, whose declaration it repeats.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*start)(void*), void* argument) noexcept {
  if (std::getenv("SLUICE_TEST_NO_THREADS") != nullptr) return EAGAIN;
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(::dlsym(RTLD_NEXT, "pthread_create"));
  return create == nullptr ? EAGAIN : create(thread, attributes, start, argument);
}

namespace {

// A proof that proves nothing, because the library's function is called after all, ends here.
[[maybe_unused]] const bool kNoThreads = [] {
  if (std::getenv("SLUICE_TEST_NO_THREADS") == nullptr) return false;
  try {
    std::thread([] {}).join();
  } catch (const std::system_error&) {
    return true;
  }
  std::abort();
}();

}  // namespace
#endif
