// SPDX-License-Identifier: MIT
/// The arithmetic of the kernels that are linked, which need not be what the test is compiled for.
#pragma once

#include <cmath>

#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/nn/linear.hpp"

namespace sluice::test {

/// What the kernels say of themselves.
inline const sluice::detail::LinearExtents& kernels() {
  static const sluice::detail::LinearExtents extents =
      sluice::detail::linear_extents(32, 1, Activations::kInt8);
  return extents;
}

/// a * b + c with their roundings: one where they have fused multiply-add.
inline float multiply_add(float a, float b, float c) {
  if (kernels().fused) return std::fma(a, b, c);
  const volatile float product = a * b;
  return product + c;
}

}  // namespace sluice::test
