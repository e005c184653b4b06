// SPDX-License-Identifier: MIT
/// What was fed and not yet read: a bounded queue of source units, each a few tokens or a few rows
/// of embeddings.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/spsc_ring.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"

namespace sluice {

/// A source unit in the queue.
struct QueuedUnit {
  std::int64_t first = 0;       ///< its first token or row, counted from the first of its kind
  std::int64_t tokens = 0;      ///< or rows
  std::int64_t arrival_ns = 0;  ///< when it was fed
  bool last = false;            ///< nothing follows
  bool embedded = false;        ///< rows of embeddings, not tokens
};

/// Units in order of arrival; one thread pushes, one pops, no lock. Allocates at construction only.
class UnitQueue {
 public:
  /// max_rows, width: room for embeddings, [max_rows, width]; 0: units are tokens alone.
  /// \throws Error(kConfig) unless max_units and max_tokens are at least 1 (and at most 2^32), and
  /// max_rows and width both or neither.
  UnitQueue(std::int64_t max_units, std::int64_t max_tokens, std::int64_t max_rows = 0,
            std::int64_t width = 0)
      : units_(checked("max_units", max_units, 1)),
        tokens_(static_cast<std::size_t>(checked("max_tokens", max_tokens, 1))),
        width_(checked("width", width, max_rows > 0 ? 1 : 0, max_rows > 0 ? kMostWidth : 0)),
        rows_(static_cast<std::size_t>(checked("max_rows", max_rows, 0) * width)) {}

  std::int64_t max_tokens() const noexcept { return static_cast<std::int64_t>(tokens_.size()); }
  /// Rows of embeddings that fit; 0 for a queue of tokens.
  std::int64_t max_rows() const noexcept {
    return width_ > 0 ? static_cast<std::int64_t>(rows_.size()) / width_ : 0;
  }

  /// Producer. False when there is no room for all of it: nothing was pushed then.
  bool try_push(std::span<const Token> unit, std::int64_t arrival_ns, bool last) noexcept {
    const auto count = static_cast<std::int64_t>(unit.size());
    const std::int64_t used = pushed_tokens_ - popped_tokens_.load(std::memory_order_acquire);
    if (units_.room() == 0 || count > max_tokens() - used) return false;
    for (std::int64_t i = 0; i < count; ++i)
      tokens_[token_place(pushed_tokens_ + i)] = unit[static_cast<std::size_t>(i)];
    units_.try_push({pushed_tokens_, count, arrival_ns, last, false});
    pushed_tokens_ += count;
    return true;
  }
  /// The same for a unit of embeddings. unit: [rows, width].
  bool try_push(MatrixView<const float> unit, std::int64_t arrival_ns, bool last) noexcept {
    SLUICE_ASSERT(unit.cols == width_);
    const std::int64_t used = pushed_rows_ - popped_rows_.load(std::memory_order_acquire);
    if (units_.room() == 0 || unit.rows > max_rows() - used) return false;
    for (std::int64_t i = 0; i < unit.rows; ++i)
      std::copy_n(unit.row(i), width_, row_place(pushed_rows_ + i));
    units_.try_push({pushed_rows_, unit.rows, arrival_ns, last, true});
    pushed_rows_ += unit.rows;
    return true;
  }

  /// Consumer: the oldest unit, or null.
  const QueuedUnit* front() const noexcept { return units_.front(); }
  /// Consumer: copies the oldest unit's tokens. Precondition: it has tokens, and out holds them.
  void copy_front(std::span<Token> out) const noexcept {
    const QueuedUnit& unit = *units_.front();
    SLUICE_ASSERT(!unit.embedded && static_cast<std::int64_t>(out.size()) >= unit.tokens);
    for (std::int64_t i = 0; i < unit.tokens; ++i)
      out[static_cast<std::size_t>(i)] = tokens_[token_place(unit.first + i)];
  }
  /// Consumer: copies the oldest unit's embeddings. Precondition: it has some. out: [at least its
  /// rows, width].
  void copy_front(MatrixView<float> out) const noexcept {
    const QueuedUnit& unit = *units_.front();
    SLUICE_ASSERT(unit.embedded && out.rows >= unit.tokens && out.cols == width_);
    for (std::int64_t i = 0; i < unit.tokens; ++i)
      std::copy_n(row_place(unit.first + i), width_, out.row(i));
  }
  /// Consumer. Precondition: front() is not null.
  void pop() noexcept {
    const QueuedUnit& unit = *units_.front();
    (unit.embedded ? popped_rows_ : popped_tokens_)
        .store(unit.first + unit.tokens, std::memory_order_release);
    units_.pop();
  }

 private:
  static constexpr std::int64_t kMostWidth = std::int64_t{1} << 24;  // channels of a row

  static std::int64_t checked(const char* field, std::int64_t value, std::int64_t least,
                              std::int64_t most = std::int64_t{1} << 32) {
    if (value < least || value > most)
      throw Error(ErrorCode::kConfig,
                  {"queue size out of range", "UnitQueue", field,
                   std::to_string(least) + " to " + std::to_string(most), std::to_string(value)});
    return value;
  }
  std::size_t token_place(std::int64_t token) const noexcept {
    return static_cast<std::size_t>(token % max_tokens());
  }
  float* row_place(std::int64_t row) noexcept { return rows_.data() + row % max_rows() * width_; }
  const float* row_place(std::int64_t row) const noexcept {
    return rows_.data() + row % max_rows() * width_;
  }

  SpscRing<QueuedUnit> units_;
  Buffer<Token> tokens_;
  std::int64_t width_;
  Buffer<float> rows_;              // [max_rows, width_]
  std::int64_t pushed_tokens_ = 0;  // the producer's
  std::int64_t pushed_rows_ = 0;    // the producer's
  std::atomic<std::int64_t> popped_tokens_{0};
  std::atomic<std::int64_t> popped_rows_{0};
};

}  // namespace sluice
