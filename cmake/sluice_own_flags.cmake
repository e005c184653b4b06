# SPDX-License-Identifier: MIT
#
# Flags of our own tests, benchmarks and examples. Targets link `sluice_own_flags` PRIVATE; it is
# never exported, so that no user inherits a warning, a sanitizer or an architecture.
include_guard()
include(CheckCXXCompilerFlag)

add_library(sluice_own_flags INTERFACE)
target_compile_options(
  sluice_own_flags INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wno-sign-conversion -Wshadow)
if(SLUICE_WERROR)
  target_compile_options(sluice_own_flags INTERFACE -Werror)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC collects its garbage from 512 MiB on, not from 128: a tenth less time, 350 MiB more a job.
  target_compile_options(sluice_own_flags INTERFACE --param=ggc-min-heapsize=524288)
  # What GCC guesses from optimised code it also guesses inside inlined standard containers: shown,
  # but no error. GCC 12's -Wrestrict is wrong about every second std::string (its bug 105329).
  target_compile_options(sluice_own_flags INTERFACE
    -Wno-restrict -Wno-error=aggressive-loop-optimizations -Wno-error=array-bounds
    -Wno-error=free-nonheap-object -Wno-error=maybe-uninitialized -Wno-error=stringop-overflow
    -Wno-error=stringop-overread)
endif()

# nvcc's host code; gtest's and the generated code's own habits are left alone.
add_library(sluice_own_cuda_flags INTERFACE)
target_compile_options(sluice_own_cuda_flags INTERFACE -Xcompiler=-Wall,-Wextra -lineinfo)
if(SLUICE_WERROR)
  target_compile_options(sluice_own_cuda_flags INTERFACE -Werror=all-warnings)
endif()

if(SLUICE_NATIVE)
  check_cxx_compiler_flag(-march=native SLUICE_COMPILER_KNOWS_NATIVE)
  if(SLUICE_COMPILER_KNOWS_NATIVE)
    target_compile_options(sluice_own_flags INTERFACE -march=native)
  endif()
endif()

if(SLUICE_SANITIZE)
  list(JOIN SLUICE_SANITIZE "," sanitizers)
  target_compile_options(sluice_own_flags INTERFACE
    -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(sluice_own_flags INTERFACE -fsanitize=${sanitizers})
endif()
