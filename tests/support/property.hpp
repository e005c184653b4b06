// SPDX-License-Identifier: MIT
/// What property tests need again and again.
#pragma once

#include <cstdint>
#include <optional>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"

namespace sluice::test {

/// The Error that `action` throws, if it does.
template <class Action>
std::optional<Error> error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

/// A number from low to high, both included.
inline std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(high - low + 1)));
}

}  // namespace sluice::test
