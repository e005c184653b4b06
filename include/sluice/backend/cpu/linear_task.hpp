// SPDX-License-Identifier: MIT
/// What the kernels of linear.hpp (float32 activations), linear_bf16.hpp and linear_int8.hpp
/// (rounded ones) share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::detail {

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Up to this many tokens weights are converted in registers, once per group of up to four tokens;
// above it panels pay. On a Zen 4 core the two meet at about 10 tokens for four-bit types and later
// for the others; bench/linear_bench has both sides under `crossover`.
inline constexpr std::int64_t kStreamTokens = 8;
// Bytes of weights that several groups of tokens visit in turn, so that the later groups find them
// in a second-level cache.
inline constexpr std::int64_t kStretchBytes = 256 * 1024;

/// Rows that are streamed from memory by passes: pass i takes `pass_rows` rows, begin + i and every
/// `apart`-th after it that is there. Each is then the head of a stream that runs through memory
/// without jumps from pass to pass, which the processor's prefetchers follow better than the short
/// rows themselves.
struct StreamRows {
  WorkRange rows;
  std::int64_t apart;  // also the number of passes

  constexpr StreamRows(WorkRange all, std::int64_t pass_rows)
      : rows(all), apart((all.end - all.begin + pass_rows - 1) / pass_rows) {}
  // The pass's row number `index`, which is there if it is below rows.end.
  constexpr std::int64_t row(std::int64_t pass, std::int64_t index) const {
    return rows.begin + index * apart + pass;
  }
};

// y = sum + bias, or y += that.
[[gnu::always_inline]] inline void put_sum(const LinearTask& task, std::int64_t token,
                                           std::int64_t row, float sum) {
  float& y = task.y.row(token)[row];
  if (task.bias != nullptr) sum += task.bias[row];
  y = task.accumulate ? y + sum : sum;
}
// Floats of rounded tokens that several panels visit in turn: 256 KiB.
inline constexpr std::int64_t kRoundedBudget = 64 * 1024;

/// Memory that is read soon, fetched a few lines at a time between products: members that convert
/// rows at the same time all wait for memory, and leave it idle while they multiply.
class Ahead {
 public:
  Ahead() = default;
  /// The columns `cols` of the rows `rows`, as far as the matrix has them; of all columns it is one
  /// run of bytes. `times`: how often fetch() will be called.
  Ahead(const WeightMatrix& weight, WorkRange rows, WorkRange cols, std::int64_t times) {
    cols.end = std::min(cols.end, weight.cols);
    const bool is_one_run = cols.begin == 0 && cols.end == weight.cols;
    const std::int64_t begin = storage_bytes(weight.type, cols.begin);
    const std::int64_t bytes = storage_bytes(weight.type, cols.end) - begin;
    const std::int64_t num_rows = rows.end - rows.begin;
    apart_ = weight.row_bytes();
    run_ = line_ = static_cast<const std::uint8_t*>(weight.data) + rows.begin * apart_ + begin;
    run_lines_ = ((is_one_run ? num_rows * bytes : bytes) + kLine - 1) / kLine;
    left_in_run_ = run_lines_;
    lines_ = is_one_run ? run_lines_ : num_rows * run_lines_;
    lines_at_once_ = lines_ / std::max<std::int64_t>(times, 1) + 1;
  }

  void fetch() {
    for (std::int64_t i = std::min(lines_at_once_, lines_); i > 0; --i, --lines_, line_ += kLine) {
      if (left_in_run_-- == 0) {
        left_in_run_ = run_lines_ - 1;
        line_ = run_ += apart_;
      }
      simd::prefetch_far(line_);
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;  // bytes

  const std::uint8_t* run_ = nullptr;
  const std::uint8_t* line_ = nullptr;
  std::int64_t apart_ = 0;      // bytes between runs
  std::int64_t run_lines_ = 0;  // lines of a run
  std::int64_t left_in_run_ = 0;
  std::int64_t lines_ = 0;
  std::int64_t lines_at_once_ = 0;
};

/// Rows of a matrix that one share of the work takes, a tile at a time.
struct ShareRows {
  WeightMatrix weight{};
  WorkRange rows{0, 0};

  ShareRows() = default;
  ShareRows(const WeightMatrix& matrix, std::int64_t share, std::int64_t num_shares,
            std::int64_t grain)
      : weight(matrix), rows(share_of(matrix.rows, share, num_shares, grain)) {}

  // What follows once the rows before `done` are taken: the share's next tile of up to `tile_rows`,
  // or behind the last one that of the share `next`, of either the first `cols` columns. `times`:
  // how often it will be fetched from.
  Ahead ahead(std::int64_t done, const ShareRows& next, std::int64_t tile_rows, std::int64_t times,
              std::int64_t cols = std::numeric_limits<std::int64_t>::max()) const {
    const bool goes_on = done < rows.end;
    const std::int64_t begin = goes_on ? done : next.rows.begin;
    const std::int64_t end = goes_on ? rows.end : next.rows.end;
    if (begin >= end) return {};
    return {goes_on ? weight : next.weight,
            {begin, std::min(end, begin + tile_rows)},
            {0, cols},
            times};
  }
};

// Fetches `count` floats that will be written, which another member may have read last.
[[gnu::always_inline]] inline void prefetch_for_write(const float* floats, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += 16) simd::prefetch_for_write(floats + i);
  simd::prefetch_for_write(floats + count - 1);
}

// Fetches the columns c ... c + kColumns - 1 of tokens, runs too short for the processor to see.
// Columns that a row does not have do no harm.
template <int kColumns>
[[gnu::always_inline]] inline void prefetch_columns(const MatrixView<const float>& x,
                                                    std::int64_t c) {
  for (std::int64_t t = 0; t < x.rows; ++t)
    for (int i = 0; i < kColumns; i += 16) simd::prefetch(x.row(t) + c + i);
}

// Fetches what a panel's products will be written to, the rows row ... row + kRows - 1 of `tokens`
// tokens from `token` on, before they are formed: outputs are far apart and in no near cache.
template <int kRows>
[[gnu::always_inline]] inline void prefetch_outputs(const LinearTask& task, std::int64_t row,
                                                    std::int64_t token, std::int64_t tokens) {
  for (std::int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < kRows; r += 16)
      if (row + r < task.weight.rows) simd::prefetch_for_write(task.y.row(token + t) + row + r);
}

template <int kRows, int kTokens>
[[gnu::always_inline]] inline void reduce_all(const simd::VecF (&sums)[kRows][kTokens],
                                              float (&result)[kRows][kTokens]) {
  if constexpr (kRows == 4 && kTokens == 1) {
    const simd::VecF four[4] = {sums[0][0], sums[1][0], sums[2][0], sums[3][0]};
    simd::reduce_add(four, &result[0][0]);
  } else {
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; ++t) result[r][t] = simd::reduce_add(sums[r][t]);
  }
}

// Sums over chains of additions, for each of kCount registers, are added by halves: the first half
// of the chains to the second and so on, which is the order in which simd::reduce_add() folds
// lanes. chain_in_order(0), chain_in_order(1), ... is their order with the bits of their numbers
// reversed, in which no more than log2(kChains) sums wait. Chains are a power of two.
constexpr int chain_in_order(int index, int num_chains) {
  int chain = 0;
  for (int bit = 1; bit < num_chains; bit *= 2)
    if ((index & bit) != 0) chain += num_chains / (2 * bit);
  return chain;
}

template <int kChains, int kCount>
struct ChainSums {
  static constexpr int kLevels = std::bit_width(static_cast<unsigned>(kChains));
  simd::VecF waiting[kLevels][kCount];

  // Takes the sums of chain_in_order(index), index being 0, 1, ... in turn.
  [[gnu::always_inline]] void add(int index, simd::VecF (&sums)[kCount]) {
    int level = 0;
    for (; (index >> level & 1) != 0; ++level) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) sums[k] += waiting[level][k];
    }
#pragma GCC unroll 32
    for (int k = 0; k < kCount; ++k) waiting[level][k] = sums[k];
  }
  const simd::VecF (&total() const)[kCount] {
    return waiting[kLevels - 1];
  }
};

}  // namespace sluice::detail
