// SPDX-License-Identifier: MIT
/// Beam search over an encoder's output that arrives in blocks (blockwise synchronous beam search,
/// Tsunoo et al., arXiv 2006.14941): hypotheses grow with each block, as far as the block carries
/// them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// One text of a beam.
struct BeamHypothesis {
  std::vector<Token> tokens;  ///< the end token last where it has ended
  double score = 0;           ///< sum of ln p
};

/// The search. Models and their caches are the caller's, who forks and truncates them as hypotheses
/// come and go. Allocates.
class BlockBeam {
 public:
  /// width: hypotheses kept; longest: tokens of one.
  /// \throws Error(kConfig) unless both are at least 1.
  BlockBeam(std::int64_t width, Token end_token, std::int64_t longest)
      : width_(width), end_token_(end_token), longest_(longest), running_(1) {
    for (const auto& [field, value] : {std::pair{"width", width}, std::pair{"longest", longest}})
      if (value < 1)
        throw Error(ErrorCode::kConfig, {"option out of range", "BlockBeam", field, "at least 1",
                                         std::to_string(value)});
  }

  /// A block has arrived. score(tokens, next) writes ln p of every next token, next: [vocab_size],
  /// with all blocks so far. While more blocks follow, the beam grows until one of its hypotheses
  /// would end, or repeat a token it has: both say that the source is used up; that last growth is
  /// discarded. With the last block it grows until no running hypothesis can beat those that ended.
  template <class Score>
  void extend(std::int64_t vocab_size, bool last_block, Score&& score) {
    std::vector<double> next(static_cast<std::size_t>(vocab_size));
    while (!running_.empty() && can_grow()) {
      std::vector<BeamHypothesis> grown;
      for (const BeamHypothesis& hypothesis : running_) {
        score(std::span<const Token>(hypothesis.tokens), std::span<double>(next));
        for (std::size_t token = 0; token < next.size(); ++token) {
          BeamHypothesis longer = hypothesis;
          longer.tokens.push_back(static_cast<Token>(token));
          longer.score += next[token];
          if (longer.score > -std::numeric_limits<double>::infinity())
            grown.push_back(std::move(longer));
        }
      }
      if (grown.empty()) return;  // nothing may follow: what there is stays
      keep_best(grown);
      if (!last_block && std::any_of(grown.begin(), grown.end(),
                                     [&](const BeamHypothesis& h) { return used_up(h); }))
        return;
      running_.clear();
      for (BeamHypothesis& hypothesis : grown)
        (hypothesis.tokens.back() == end_token_ ? ended_ : running_)
            .push_back(std::move(hypothesis));
      keep_best(ended_);
      if (!ended_.empty())  // scores only fall
        std::erase_if(running_, [&](const BeamHypothesis& hypothesis) {
          return hypothesis.score <= ended_.front().score;
        });
    }
  }

  /// Those that go on, and those that have ended, best first.
  std::span<const BeamHypothesis> running() const { return running_; }
  std::span<const BeamHypothesis> ended() const { return ended_; }
  /// The best of all.
  const BeamHypothesis& best() const {
    if (running_.empty()) return ended_.front();
    return ended_.empty() || running_.front().score > ended_.front().score ? running_.front()
                                                                           : ended_.front();
  }

 private:
  bool can_grow() const {
    return static_cast<std::int64_t>(running_.front().tokens.size()) < longest_;
  }
  bool used_up(const BeamHypothesis& hypothesis) const {
    const Token last = hypothesis.tokens.back();
    return last == end_token_ || std::find(hypothesis.tokens.begin(), hypothesis.tokens.end() - 1,
                                           last) != hypothesis.tokens.end() - 1;
  }
  void keep_best(std::vector<BeamHypothesis>& hypotheses) const {
    std::stable_sort(
        hypotheses.begin(), hypotheses.end(),
        [](const BeamHypothesis& a, const BeamHypothesis& b) { return a.score > b.score; });
    if (hypotheses.size() > static_cast<std::size_t>(width_))
      hypotheses.resize(static_cast<std::size_t>(width_));
  }

  std::int64_t width_;
  Token end_token_;
  std::int64_t longest_;
  std::vector<BeamHypothesis> running_;  // at first the empty one
  std::vector<BeamHypothesis> ended_;
};

}  // namespace sluice
