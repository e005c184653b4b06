// expect: CPU headers of sluice must not be compiled by nvcc
// SPDX-License-Identifier: MIT
#define __CUDACC__ 1
#include <sluice/sluice.hpp>
