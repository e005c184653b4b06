// SPDX-License-Identifier: MIT
/// Whether this program is built with a sanitizer that brings its own malloc and address layout,
/// and whether that is ThreadSanitizer.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLUICE_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define SLUICE_TEST_SANITIZED 1
#endif
#endif
#if !defined(SLUICE_TEST_SANITIZED)
#define SLUICE_TEST_SANITIZED 0
#endif

// Under it a test that also compares runs without threads may leave those out.
#if defined(__SANITIZE_THREAD__)
#define SLUICE_TEST_THREAD_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SLUICE_TEST_THREAD_SANITIZED 1
#endif
#endif
#if !defined(SLUICE_TEST_THREAD_SANITIZED)
#define SLUICE_TEST_THREAD_SANITIZED 0
#endif
