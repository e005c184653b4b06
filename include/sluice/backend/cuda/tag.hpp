// SPDX-License-Identifier: MIT
/// The CUDA backend's tag by itself, for host code that names a backend and launches nothing.
#pragma once

#include "sluice/core/backend.hpp"

namespace sluice {

/// NVIDIA GPUs, compute capability 8.0 and later.
struct cuda : generic_backend {};

}  // namespace sluice
