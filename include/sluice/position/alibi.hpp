// SPDX-License-Identifier: MIT
/// ALiBi (Press et al., arXiv 2108.12409): no rotation, but a penalty on each score that grows with
/// the distance between query and key.
#pragma once

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// The slope of each query head. [num_heads], positive. For a power of two: 2^(-8 (h + 1) / H).
/// Otherwise the slopes of the next lower power of two c, then every second slope of 2c, from its
/// first (the authors' released rule, which the paper does not state). Allocates the result.
/// \throws Error kConfig if num_heads < 1.
inline std::vector<float> alibi_slopes(int num_heads) {
  if (num_heads < 1) {
    throw Error(ErrorCode::kConfig, {"no slopes for this number of heads", "alibi_slopes",
                                     "num_heads", "at least 1", std::to_string(num_heads)});
  }
  const auto slope = [](int head, int heads) {
    return static_cast<float>(std::exp2(-8.0 * (head + 1) / heads));
  };
  const int lower = static_cast<int>(std::bit_floor(static_cast<unsigned>(num_heads)));
  std::vector<float> slopes;  // [num_heads]
  slopes.reserve(static_cast<std::size_t>(num_heads));
  for (int head = 0; head < lower; ++head) slopes.push_back(slope(head, lower));
  for (int head = 0; head < num_heads - lower; ++head) slopes.push_back(slope(2 * head, 2 * lower));
  return slopes;
}

/// What is added to a score after scaling: slope * (key_position - query_position), at most 0 for a
/// key that is not in the query's future. The difference is formed in double, so it is exact at any
/// place of a long stream.
constexpr float alibi_bias(float slope, Position key_position, Position query_position) {
  return slope * static_cast<float>(key_position - query_position);
}

}  // namespace sluice
