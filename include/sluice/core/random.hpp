// SPDX-License-Identifier: MIT
/// A small generator whose sequence is the same on every machine and standard library, so that a
/// seed reproduces a text. State is four words: it is saved and restored with a session.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace sluice {

/// xoshiro256** (Blackman and Vigna, 2018), seeded by splitmix64.
class Random {
 public:
  using State = std::array<std::uint64_t, 4>;

  explicit constexpr Random(std::uint64_t seed) : state_{} {
    for (auto& word : state_) {
      seed += 0x9e3779b97f4a7c15ULL;
      std::uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
      word = z ^ (z >> 31);
    }
  }

  constexpr std::uint64_t next() {
    const std::uint64_t result = std::rotl(state_[1] * 5, 7) * 9;
    const std::uint64_t t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }

  /// Uniform in [0, 1), 53 bits.
  constexpr double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  /// Standard normal (Box and Muller, one of the pair).
  double normal() {
    const double u = 1.0 - uniform();
    const double v = uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }

  /// Uniform integer in [0, bound), bound > 0. The bias is below bound / 2^53.
  constexpr std::uint64_t below(std::uint64_t bound) {
    return static_cast<std::uint64_t>(uniform() * static_cast<double>(bound));
  }

  constexpr const State& state() const { return state_; }
  constexpr void set_state(const State& state) { state_ = state; }

 private:
  State state_;
};

}  // namespace sluice
