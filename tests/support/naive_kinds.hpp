// SPDX-License-Identifier: MIT
/// StreamingVLM's retention as its definition reads (core-algorithms 7.1 to 7.3): a list of spans
/// from which tokens are erased and moved, and contiguous positions on three axes counted anew over
/// what is left. No slots, no shifts, no counters.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/cache/kind_retention.hpp"

namespace sluice::test {

/// Rooms so small that every one of them fills, wraps and refuses within a short conversation.
inline KindRetentionConfig small_kinds(std::int64_t text_rounds, std::int64_t vision_rounds) {
  return {.text_sinks = 3,
          .text_window = 7,
          .text_rounds = text_rounds,
          .vision_rounds = vision_rounds,
          .max_head = 2,
          .max_tail = 2,
          .max_turn = 5,
          .max_reply = 4,
          .max_vision = 24,
          .max_spans = 6,
          .max_chunk = 6};
}

class NaiveKinds {
 public:
  struct Token {
    std::int64_t index;  // in the stream
    TokenKind kind;
    std::array<double, 3> position;  // t, h, w
  };

  explicit NaiveKinds(const KindRetentionConfig& config) : config_(config) {}

  void begin_round() {
    ++rounds_;
    // Kept are the last text_rounds and vision_rounds, the new one included.
    std::vector<Span> left;
    std::vector<std::int64_t> moved;
    for (Span& span : spans_) {
      const bool in_round = span.round > 0;
      const std::int64_t stay =
          span.role == SpanRole::kVision ? config_.vision_rounds : config_.text_rounds;
      if (!in_round || span.round > rounds_ - stay) {
        left.push_back(span);
      } else if (span.role == SpanRole::kReply) {
        moved.insert(moved.end(), span.tokens.begin(), span.tokens.end());
      }
    }
    spans_ = left;
    texts_.insert(texts_.end(), moved.begin(), moved.end());
    const auto most = static_cast<std::size_t>(config_.text_sinks + config_.text_window);
    while (texts_.size() > most) texts_.erase(texts_.begin() + config_.text_sinks);
  }
  void begin_span(SpanRole role, const VisionGrid& grid) {
    role_ = role;
    if (rounds_ > 0) spans_.push_back({role, rounds_, grid, {}});
  }
  void append(std::int64_t index) {
    switch (role_) {
      case SpanRole::kHead: head_.push_back(index); break;
      case SpanRole::kPrevious: texts_.push_back(index); break;
      case SpanRole::kTail: tail_.push_back(index); break;
      case SpanRole::kTurn:
      case SpanRole::kVision:
      case SpanRole::kReply: spans_.back().tokens.push_back(index); break;
    }
  }

  /// Takes the newest tokens of the open span back.
  void take_back(std::int64_t tokens) {
    std::vector<std::int64_t>& open = role_ == SpanRole::kHead       ? head_
                                      : role_ == SpanRole::kPrevious ? texts_
                                      : role_ == SpanRole::kTail     ? tail_
                                                                     : spans_.back().tokens;
    open.resize(open.size() - static_cast<std::size_t>(tokens));
  }

  /// Everything that is kept, in reading order.
  std::vector<Token> tokens() const {
    std::vector<Token> result;
    double next = 0;
    const auto text = [&](std::int64_t index, TokenKind kind) {
      result.push_back({index, kind, {next, next, next}});
      next += 1;
    };
    for (const std::int64_t index : head_) text(index, TokenKind::kPinned);
    for (std::size_t i = 0; i < texts_.size(); ++i)
      text(texts_[i], static_cast<std::int64_t>(i) < config_.text_sinks ? TokenKind::kPinned
                                                                        : TokenKind::kText);
    for (const std::int64_t index : tail_) text(index, TokenKind::kPinned);
    for (const Span& span : spans_) {
      if (span.role != SpanRole::kVision) {
        for (const std::int64_t index : span.tokens) text(index, TokenKind::kText);
        continue;
      }
      const VisionGrid& g = span.grid;
      double most = -1;
      for (std::int64_t i = 0; i < g.frames * g.rows * g.cols; ++i) {
        const double t = static_cast<double>(i / (g.rows * g.cols)) * g.frame_step;
        const auto h = static_cast<double>(i / g.cols % g.rows);
        const auto w = static_cast<double>(i % g.cols);
        most = std::max({most, t, h, w});
        if (i < static_cast<std::int64_t>(span.tokens.size()))
          result.push_back({span.tokens[static_cast<std::size_t>(i)],
                            TokenKind::kVision,
                            {next + t, next + h, next + w}});
      }
      next += most + 1;
    }
    return result;
  }

 private:
  struct Span {
    SpanRole role;
    std::int64_t round;
    VisionGrid grid;
    std::vector<std::int64_t> tokens;
  };

  KindRetentionConfig config_;
  SpanRole role_ = SpanRole::kHead;
  std::int64_t rounds_ = 0;
  std::vector<std::int64_t> head_;
  std::vector<std::int64_t> texts_;
  std::vector<std::int64_t> tail_;
  std::vector<Span> spans_;
};

}  // namespace sluice::test
