// SPDX-License-Identifier: MIT
// The backend that the program is compiled for: a tag, and the header that knows it. The build
// names both where it is not the CPU (examples/CMakeLists.txt); no source says which.
#pragma once

#include "sluice/stream/backend_traits.hpp"

#if defined(STREAM_TEXT_BACKEND)
#include STREAM_TEXT_BACKEND_HEADER
#else
#define STREAM_TEXT_BACKEND cpu
#endif

namespace stream_text {

using Backend = sluice::STREAM_TEXT_BACKEND;
using BackendTraits = sluice::backend_traits<Backend>;

}  // namespace stream_text
