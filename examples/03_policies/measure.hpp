// SPDX-License-Identifier: MIT
// One stream through one cache, whatever its policy is: likelihood, time, and what is recalled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/likelihood.hpp"

namespace policies {

/// A cache at work: feeds tokens in chunks and knows the likelihood of what comes next.
template <class Cache>
class Stream {
 public:
  /// model, cache and team must outlive it.
  Stream(const sluice::Decoder& model, Cache& cache, sluice::ThreadTeam& team,
         sluice::Activations activations)
      : model_(model),
        cache_(cache),
        team_(team),
        workspace_(model, cache.max_chunk(), cache.max_entries(), team.size(),
                   std::max(sluice::DecoderWorkspace::kDefaultSegments, Cache::kMaxSegments),
                   activations),
        logits_(static_cast<std::size_t>(cache.max_chunk() * vocab())) {}

  /// Reads tokens, at most `most` at once; appends the negative log-likelihood of each, given all
  /// before it, to `nll` (of a stream's first token: 0). Caches that score by it are told (SirLLM:
  /// a segment's first token, whose likelihood nobody knows, gets the largest of the segment).
  void read(std::span<const sluice::Token> tokens, std::vector<double>& nll,
            std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
    for (std::size_t done = 0; done < tokens.size();) {
      const std::size_t count =
          std::min(tokens.size() - done, static_cast<std::size_t>(std::min(most, room())));
      const std::span<const sluice::Token> chunk = tokens.subspan(done, count);
      const std::size_t first = nll.size();
      nll.push_back(has_next_ ? sluice::negative_log_likelihood(next(), chunk[0]) : 0.0);
      model_.forward(chunk, cache_, workspace_, team_);
      const auto rows = static_cast<std::int64_t>(count);
      model_.logits(0, {logits_.data(), rows, vocab()}, workspace_, team_);
      for (std::size_t t = 1; t < count; ++t)
        nll.push_back(
            sluice::negative_log_likelihood(row(static_cast<std::int64_t>(t) - 1), chunk[t]));
      if constexpr (requires { cache_.give_scores(std::span<const float>()); }) {
        std::vector<float> scores(nll.begin() + static_cast<std::ptrdiff_t>(first), nll.end());
        if (!has_next_) scores[0] = *std::max_element(scores.begin(), scores.end());
        if (cache_.policy().source == sluice::ScoreSource::kGiven) cache_.give_scores(scores);
      }
      if constexpr (requires { cache_.commit(team_); })
        cache_.commit(team_);
      else
        cache_.commit();
      if constexpr (requires { cache_.end_prompt(); })
        if (cache_.total() == cache_.config().max_prompt) cache_.end_prompt();
      last_row_ = rows - 1;
      has_next_ = true;
      done += count;
    }
  }

  /// Tokens to read between two looks at what the user wants: whole chunks.
  std::size_t piece() const {
    constexpr std::int64_t kTokens = 64;
    const std::int64_t chunk = cache_.max_chunk();
    return static_cast<std::size_t>(chunk * std::max<std::int64_t>(1, kTokens / chunk));
  }

  /// Writes the most likely tokens.
  std::vector<sluice::Token> write(std::int64_t count) {
    std::vector<sluice::Token> tokens;
    std::vector<double> ignored;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::span<const float> logits = next();
      tokens.push_back(static_cast<sluice::Token>(std::max_element(logits.begin(), logits.end()) -
                                                  logits.begin()));
      read({&tokens.back(), 1}, ignored);
    }
    return tokens;
  }

 private:
  /// Tokens that the cache takes at once here.
  std::int64_t room() const {
    std::int64_t room = cache_.max_chunk();
    if constexpr (requires { cache_.room_in_block(); })
      room = std::min(room, cache_.room_in_block());
    if constexpr (requires { cache_.end_prompt(); })
      if (cache_.prompt_open()) room = std::min(room, cache_.config().max_prompt - cache_.total());
    return room;
  }
  std::int64_t vocab() const { return model_.config().vocab_size; }
  std::span<const float> row(std::int64_t r) const {
    return {logits_.data() + r * vocab(), static_cast<std::size_t>(vocab())};
  }
  std::span<const float> next() const { return row(last_row_); }

  const sluice::Decoder& model_;
  Cache& cache_;
  sluice::ThreadTeam& team_;
  sluice::DecoderWorkspace workspace_;
  std::vector<float> logits_;  // [max_chunk, vocab_size]
  std::int64_t last_row_ = 0;
  bool has_next_ = false;
};

/// What a policy did with a text.
struct Measured {
  std::size_t tokens = 0;      ///< read: all of them, or as far as it came
  double perplexity = 0;       ///< over all tokens but the first
  double late_perplexity = 0;  ///< over those that came after the budget was full
  double tokens_per_s = 0;     ///< reading, likelihoods included
  double step_ms = 0;          ///< median of single tokens at the end
  std::int64_t entries = 0;    ///< of the head that holds most, at the end
  std::int64_t cache_bytes = 0;
};

inline double perplexity_of(std::span<const double> nll) {
  double sum = 0;
  for (const double x : nll) sum += x;
  return nll.empty() ? 0 : std::exp(sum / static_cast<double>(nll.size()));
}

/// Entries of the fullest head.
template <class Cache>
std::int64_t entries_of(const Cache& cache) {
  std::int64_t most = 0;
  if constexpr (requires { cache.size_of(0, 0); }) {
    for (std::int64_t l = 0; l < cache.shape().num_layers; ++l)
      for (std::int64_t h = 0; h < cache.shape().num_kv_heads; ++h)
        most = std::max(most, cache.size_of(l, h));
  } else if constexpr (requires { cache.retentions(); }) {
    for (const sluice::Retention& retention : cache.retentions())
      most = std::max(most, retention.size());
  } else {
    most = cache.total();  // keeps everything
  }
  return most;
}

/// Reads `tokens`, those from `singles` on one by one, and the last few so in any case.
/// progress(tokens read) is called now and then and says whether to go on; what was measured until
/// then is returned.
template <class Cache, class Progress>
Measured measure(Stream<Cache>& stream, const Cache& cache, std::span<const sluice::Token> tokens,
                 std::int64_t budget, std::int64_t singles, Progress&& progress) {
  constexpr std::size_t kSteps = 33;
  const std::size_t chunked = tokens.size() - std::min(tokens.size() - 1, kSteps);
  std::vector<double> nll;
  const std::int64_t begin = sluice::monotonic_ns();
  for (std::size_t done = 0; done < chunked && progress(done); done = nll.size()) {
    const auto whole = static_cast<std::size_t>(std::max<std::int64_t>(0, singles));
    const bool single = done >= whole;
    const std::size_t end = single ? chunked : std::min(chunked, whole);
    stream.read(tokens.subspan(done, std::min(stream.piece(), end - done)), nll,
                single ? 1 : cache.max_chunk());
  }
  const double seconds = static_cast<double>(sluice::monotonic_ns() - begin) * 1e-9;
  Measured m;
  const bool whole = nll.size() == chunked;
  m.tokens_per_s = static_cast<double>(nll.size()) / seconds;
  std::vector<double> ms;
  for (std::size_t t = nll.size(); whole && t < tokens.size() && progress(t); ++t) {
    const std::int64_t step = sluice::monotonic_ns();
    stream.read(tokens.subspan(t, 1), nll);
    ms.push_back(static_cast<double>(sluice::monotonic_ns() - step) * 1e-6);
  }
  if (!ms.empty()) {
    std::nth_element(ms.begin(), ms.begin() + std::ssize(ms) / 2, ms.end());
    m.step_ms = ms[ms.size() / 2];
  }
  m.tokens = nll.size();
  const std::span<const double> all(nll);
  m.perplexity = perplexity_of(all.subspan(std::min<std::size_t>(1, all.size())));
  m.late_perplexity =
      perplexity_of(all.subspan(std::min(all.size(), static_cast<std::size_t>(budget))));
  m.entries = entries_of(cache);
  m.cache_bytes = static_cast<std::int64_t>(cache.bytes());
  return m;
}

}  // namespace policies
