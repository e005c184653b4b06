// SPDX-License-Identifier: MIT
// The backend that the program is compiled for: a tag, and the header that knows it. The build
// names both where it is not the CPU (examples/CMakeLists.txt); no source says which.
#pragma once

#include "sluice/stream/backend_traits.hpp"
#include "sluice/stream/duplex_backend.hpp"

#if defined(DUPLEX_TEXT_BACKEND)
#include DUPLEX_TEXT_BACKEND_HEADER
#else
#define DUPLEX_TEXT_BACKEND cpu
#endif

namespace duplex_text {

using Backend = sluice::DUPLEX_TEXT_BACKEND;
using BackendTraits = sluice::backend_traits<Backend>;

}  // namespace duplex_text
