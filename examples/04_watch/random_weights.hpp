// SPDX-License-Identifier: MIT
// Weights from a seed: number i of a tensor is a function of seed, name and i alone, with the same
// bits on the host as on a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

#if defined(__CUDACC__)
#define WATCH_HOST_DEVICE __host__ __device__
#else
#define WATCH_HOST_DEVICE
#endif

namespace watch {

WATCH_HOST_DEVICE inline std::uint64_t mixed_bits(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

/// What tells one tensor's numbers from another's.
inline std::uint64_t salt_of(std::uint64_t seed, std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : name)
    hash = (hash ^ static_cast<std::uint64_t>(static_cast<unsigned char>(c))) * 0x100000001b3ULL;
  return mixed_bits(hash + seed * 0x9e3779b97f4a7c15ULL);
}

/// The scale under which a matrix with `cols` inputs keeps the variance of what goes in.
inline float scale_of(std::int64_t cols) {
  return static_cast<float>(std::sqrt(3.0 / static_cast<double>(cols)));
}

/// The bits of number `index` as bf16: `scale` times a sum of four uniforms, which has a variance
/// of a third. Products and sums but the last are exact, so no compiler can change a bit.
WATCH_HOST_DEVICE inline std::uint16_t random_weight(std::uint64_t salt, std::int64_t index,
                                                     float scale) {
  const std::uint64_t z =
      mixed_bits(salt + static_cast<std::uint64_t>(index) * 0x9e3779b97f4a7c15ULL);
  std::uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<std::uint32_t>(z >> (16 * i)) & 0xffffU;
  const float value = (static_cast<float>(sum) * 0x1p-16F - 2.0F) * scale;
  std::uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}

}  // namespace watch
