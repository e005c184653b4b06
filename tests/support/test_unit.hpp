// SPDX-License-Identifier: MIT
/// Several test files of a folder are compiled as one translation unit, so that a decoder's kernels
/// are compiled once for all of them. Each file's own names live in `namespace SLUICE_TEST_UNIT`: a
/// name that CMake makes for the file, or the unnamed namespace where it is compiled alone.
#pragma once

#ifndef SLUICE_TEST_UNIT
#define SLUICE_TEST_UNIT
#endif
