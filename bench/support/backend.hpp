// SPDX-License-Identifier: MIT
/// The backend that a benchmark is compiled for: a tag, and the header that knows it, which the
/// build names where it is not the CPU.
#pragma once

#include "sluice/stream/backend_traits.hpp"

#if defined(SLUICE_BENCH_BACKEND)
#include SLUICE_BENCH_BACKEND_HEADER
#else
#define SLUICE_BENCH_BACKEND cpu
#endif

namespace sluice::bench {

using Tag = SLUICE_BENCH_BACKEND;

}  // namespace sluice::bench
