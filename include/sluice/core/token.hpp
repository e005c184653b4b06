// SPDX-License-Identifier: MIT
/// The number by which models and tokenisers name a token.
#pragma once

#include <cstdint>

namespace sluice {

/// An index into a vocabulary: 0 .. vocab_size - 1. Signed, so that -1 can stand for "none" inside
/// a table; no public function takes or returns a negative token.
using Token = std::int32_t;

}  // namespace sluice
