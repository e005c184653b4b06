// SPDX-License-Identifier: MIT
/// Activation functions and the gated product of feed-forward layers.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <span>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"

namespace sluice {

/// Which function a feed-forward layer applies.
enum class Activation {
  kSilu,      ///< x / (1 + e^-x): Llama, Mistral, Qwen
  kGeluTanh,  ///< 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): Gemma
  kGelu,      ///< 0.5 x (1 + erf(x / sqrt 2)), arXiv 1606.08415
};

namespace detail {

[[gnu::always_inline]] inline simd::VecF silu(simd::VecF x) {
  const simd::VecF one = simd::broadcast(1.0F);
  return x / (one + simd::exp(-x));
}

// 0.5 (1 + tanh(u)) = 1 / (1 + e^-2u), which loses nothing to cancellation where tanh is near -1.
[[gnu::always_inline]] inline simd::VecF gelu_tanh(simd::VecF x) {
  constexpr auto kLinear = static_cast<float>(-2.0 * 0.7978845608028653559);  // -2 sqrt(2 / pi)
  constexpr auto kCubic = static_cast<float>(-2.0 * 0.7978845608028653559 * 0.044715);
  const simd::VecF factor = simd::fma(x * x, simd::broadcast(kCubic), simd::broadcast(kLinear));
  const simd::VecF one = simd::broadcast(1.0F);
  return x / (one + simd::exp(x * factor));
}

// There is no vector form of erf here: models with a gated exact GELU are rare.
[[gnu::always_inline]] inline simd::VecF gelu(simd::VecF x) {
  float lanes[simd::kWidth];
  simd::store(lanes, x);
  for (float& lane : lanes) {
    const auto value = static_cast<double>(lane);
    lane = static_cast<float>(0.5 * value * std::erfc(-value / std::numbers::sqrt2));
  }
  return simd::load(lanes);
}

// out[i] = function(index of a register, its number of lanes in use) over `count` values.
template <class Function>
[[gnu::always_inline]] inline void for_each_register(std::int64_t count, float* out,
                                                     Function&& function) {
  std::int64_t i = 0;
  for (; i + simd::kWidth <= count; i += simd::kWidth)
    simd::store(out + i, function([i](const float* source) { return simd::load(source + i); }));
  if (const std::int64_t rest = count - i; rest != 0)
    simd::store_partial(out + i, function([i, rest](const float* source) {
                          return simd::load_partial(source + i, rest);
                        }),
                        rest);
}

// Calls use(function on a register) for the chosen activation.
template <class Use>
void with_activation(Activation activation, Use&& use) {
  switch (activation) {
    case Activation::kSilu: return use([](simd::VecF x) { return silu(x); });
    case Activation::kGeluTanh: return use([](simd::VecF x) { return gelu_tanh(x); });
    case Activation::kGelu: return use([](simd::VecF x) { return gelu(x); });
  }
}

}  // namespace detail

/// out[i] = activation(x[i]) in float32. x and out have the same size and may be the same memory.
/// SiLU is within 4 ulp of the exact value while that is a normal number; the GELUs are within
/// 4 ulp for x >= -1, and within 1e-7 everywhere (tested over [-30, 30]). Allocates nothing.
inline void activate(Activation activation, std::span<const float> x, std::span<float> out) {
  SLUICE_ASSERT(x.size() == out.size());
  detail::with_activation(activation, [&](auto function) {
    detail::for_each_register(static_cast<std::int64_t>(x.size()), out.data(),
                              [&](auto&& load) { return function(load(x.data())); });
  });
}

/// out[i] = activation(gate[i]) * up[i] for `count` values (the gated unit of arXiv 2002.05202).
/// gate, up, out: [count]; out may be the memory of gate or of up, but may not overlap them
/// otherwise, so threads may take separate ranges. Allocates nothing.
void gate_up(Activation activation, const float* gate, const float* up, float* out,
             std::int64_t count);

#if SLUICE_KERNELS_INCLUDED
SLUICE_KERNEL void gate_up(Activation activation, const float* gate, const float* up, float* out,
                           std::int64_t count) {
  detail::with_activation(activation, [&](auto function) {
    detail::for_each_register(count, out,
                              [&](auto&& load) { return function(load(gate)) * load(up); });
  });
}
#endif

}  // namespace sluice
