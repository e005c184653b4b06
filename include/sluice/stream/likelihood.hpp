// SPDX-License-Identifier: MIT
/// How likely a model held a token to be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// -ln softmax(logits)[target]: what perplexity averages, in nats. logits: [vocab_size].
inline double negative_log_likelihood(std::span<const float> logits, Token target) {
  const float* data = logits.data();
  const auto count = static_cast<std::int64_t>(logits.size());
  const std::int64_t whole = count - count % simd::kWidth;
  simd::VecF max = simd::broadcast(data[0]);
  for (std::int64_t i = 0; i < whole; i += simd::kWidth) max = simd::max(max, simd::load(data + i));
  float top = simd::reduce_max(max);
  for (std::int64_t i = whole; i < count; ++i) top = std::max(top, data[i]);
  double sum = 0;
  const simd::VecF shift = simd::broadcast(top);
  for (std::int64_t i = 0; i < whole; i += simd::kWidth)
    sum += static_cast<double>(simd::reduce_add(simd::exp(simd::load(data + i) - shift)));
  for (std::int64_t i = whole; i < count; ++i) sum += std::exp(static_cast<double>(data[i] - top));
  return std::log(sum) - static_cast<double>(data[target] - top);
}

}  // namespace sluice
