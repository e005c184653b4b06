// SPDX-License-Identifier: MIT
/// Every macro of the library: compiler facts that the language cannot ask for, each defined to 0
/// or 1, the debug assertion, and where kernels are compiled. Nothing else in the library tests a
/// compiler macro, except the vector layer in backend/cpu/simd.hpp.
#pragma once

#if defined(__CUDACC__)
#error \
    "CPU headers of sluice must not be compiled by nvcc: Eigen loses its SIMD code there, and the \
linker may keep that slow copy for the whole program. Include <sluice/sluice.cuh> in .cu files."
#endif

#if !defined(SLUICE_DEBUG_ASSERTS)
#if defined(NDEBUG)
#define SLUICE_DEBUG_ASSERTS 0
#else
#define SLUICE_DEBUG_ASSERTS 1
#endif
#endif

#if SLUICE_DEBUG_ASSERTS
#include <cassert>
/// Checks a precondition of a hot function in debug builds; nothing in release builds.
#define SLUICE_ASSERT(condition) assert(condition)
#else
#define SLUICE_ASSERT(condition) ((void)0)
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SLUICE_RESTRICT __restrict__
#define SLUICE_HAS_VECTOR_EXTENSIONS 1
#else
#define SLUICE_RESTRICT
#define SLUICE_HAS_VECTOR_EXTENSIONS 0
#endif

// The kernels of the CPU backend are compiled where they are used. A program that is linked with
// them instead (the CMake target sluice::kernels defines this to 1) sees their declarations alone.
// One value for all units of a program, libraries included: buffers that one side measures do not
// fit the other's kernels.
#if !defined(SLUICE_COMPILED_KERNELS)
#define SLUICE_COMPILED_KERNELS 0
#endif
// 1 in programs that have oneDNN (backend/cpu/linear_onednn.hpp), for all their units too.
#if !defined(SLUICE_ONEDNN)
#define SLUICE_ONEDNN 0
#endif
// The units of that library define SLUICE_KERNELS_IMPLEMENTATION; SLUICE_KERNEL begins the
// definition of a kernel.
#if SLUICE_COMPILED_KERNELS
#define SLUICE_KERNEL
#else
#define SLUICE_KERNEL inline
#endif
#if !SLUICE_COMPILED_KERNELS || defined(SLUICE_KERNELS_IMPLEMENTATION)
#define SLUICE_KERNELS_INCLUDED 1
#else
#define SLUICE_KERNELS_INCLUDED 0
#endif
// 1 in units whose functions are hidden from the rest of the program (kernels for one of several
// instruction sets): they must not have threads of their own.
#if !defined(SLUICE_KERNELS_ISOLATED)
#define SLUICE_KERNELS_ISOLATED 0
#endif
