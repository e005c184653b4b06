// SPDX-License-Identifier: MIT
/// What the machine allows, measured: how fast a team reads memory, and how many products it forms
/// a second. Programs print both beside their own numbers, of the same minute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/stream/clock.hpp"

namespace sluice::bench {

struct MachineLimits {
  double read_gb_per_s = 0;    ///< the best of several numbers of streams a thread
  double f32_gflop_per_s = 0;  ///< fused multiply-adds count twice
  double bf16_gflop_per_s = 0;
  double int8_gop_per_s = 0;
};

namespace detail {

// Sums every line of `bytes` bytes, as `streams` runs side by side that are prefetched a page
// ahead.
inline float read_streams(const float* data, std::int64_t count, std::int64_t streams) {
  constexpr std::int64_t kLine = 16;  // floats
  constexpr std::int64_t kAhead = 1024;
  const std::int64_t apart = count / streams / kLine * kLine;
  simd::VecF sums[4] = {};
  for (std::int64_t at = 0; at < apart; at += 4 * kLine)
    for (std::int64_t s = 0; s < streams; ++s) {
      const float* const from = data + s * apart + at;
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line) {
        simd::prefetch(from + kAhead + line * kLine);
        for (std::int64_t i = 0; i < kLine; i += simd::kWidth)
          sums[line] += simd::load(from + line * kLine + i);
      }
    }
  return simd::reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Operations a second of `rounds` rounds of `step` on all members, each of `operations`.
template <class Step>
double rate(ThreadTeam& team, double operations, Step&& step) {
  constexpr std::int64_t kRounds = 200000;
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const std::int64_t begin = monotonic_ns();
    team.run([&](int member, int) { step(member, kRounds); });
    const auto ns = static_cast<double>(monotonic_ns() - begin);
    best = std::max(best, operations * kRounds * team.size() / ns);
  }
  return best;
}

}  // namespace detail

/// About half a second; `team` as in the measurement that it stands beside. Allocates 256 MiB.
inline MachineLimits measure_machine(ThreadTeam& team) {
  MachineLimits limits;
  constexpr std::int64_t kFloats = std::int64_t{1} << 26;
  Buffer<float> memory(static_cast<std::size_t>(kFloats));
  std::vector<float> results(static_cast<std::size_t>(team.size()) * 16);
  const auto result = [&](int member) -> float& {
    return results[static_cast<std::size_t>(member) * 16];
  };
  for (const std::int64_t streams : {1, 2, 4, 8}) {
    for (int i = 0; i < 2; ++i) {
      const std::int64_t begin = monotonic_ns();
      team.run([&](int member, int num_members) {
        // Two pages less, which the prefetches reach.
        const std::int64_t share = kFloats / num_members;
        result(member) +=
            detail::read_streams(memory.data() + member * share, share - 2048, streams);
      });
      const auto ns = static_cast<double>(monotonic_ns() - begin);
      limits.read_gb_per_s =
          std::max(limits.read_gb_per_s, static_cast<double>(kFloats) * sizeof(float) / ns);
    }
  }
  constexpr int kChains = 12;
  limits.f32_gflop_per_s =
      detail::rate(team, 2.0 * kChains * simd::kWidth, [&](int member, std::int64_t rounds) {
        simd::VecF sums[kChains] = {};
        const simd::VecF x = simd::broadcast(result(member) + 0.5F);
        for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
          for (int k = 0; k < kChains; ++k) sums[k] = simd::in_register(simd::fma(x, x, sums[k]));
        }
        for (const simd::VecF& sum : sums) result(member) += simd::reduce_add(sum) * 1e-30F;
      });
  limits.bf16_gflop_per_s =
      detail::rate(team, 4.0 * kChains * simd::kWidth, [&](int member, std::int64_t rounds) {
        simd::VecF sums[kChains] = {};
        const simd::VecF one = simd::broadcast(result(member) + 0.5F);
        const simd::VecI x = simd::round_pairs(one, one);
        for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
          for (int k = 0; k < kChains; ++k)
            sums[k] = simd::in_register(simd::dot_pairs(sums[k], x, x));
        }
        for (const simd::VecF& sum : sums) result(member) += simd::reduce_add(sum) * 1e-30F;
      });
  limits.int8_gop_per_s =
      detail::rate(team, 8.0 * kChains * simd::kWidth, [&](int member, std::int64_t rounds) {
        simd::VecI sums[kChains] = {};
        const simd::VecI x = simd::broadcast(std::int32_t{0x01010101});
        for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
          for (int k = 0; k < kChains; ++k) {
            sums[k] = simd::dot_levels(sums[k], x, x);
            // Kept from being formed in one step.
            sums[k] = simd::bits_as_int(simd::in_register(simd::bits_as_float(sums[k])));
          }
        }
        for (const simd::VecI& sum : sums)
          result(member) += simd::reduce_add(simd::to_float(sum)) * 1e-30F;
      });
  return limits;
}

}  // namespace sluice::bench
