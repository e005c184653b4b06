// SPDX-License-Identifier: MIT
/// What the tests of the CUDA backend share.
#pragma once

#include <cstddef>
#include <vector>

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <sluice/core/random.hpp>

namespace sluice_test {

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

inline std::vector<float> random_floats(sluice::Random& random, std::size_t count,
                                        double scale = 1) {
  std::vector<float> result(count);
  for (float& x : result) x = static_cast<float>(scale * random.normal());
  return result;
}

template <class Element>
std::vector<Element> rounded_to(const std::vector<float>& x) {
  std::vector<Element> result;
  result.reserve(x.size());
  for (const float v : x) result.push_back(Element(v));
  return result;
}

}  // namespace sluice_test

// Machines without a GPU build every kernel and can run none.
#define SKIP_WITHOUT_DEVICE() \
  if (!sluice_test::has_device()) GTEST_SKIP() << "no CUDA device"
