// expect: CPU headers of sluice must not be compiled by nvcc
// SPDX-License-Identifier: MIT
#include <sluice/sluice.hpp>
