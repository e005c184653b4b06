// SPDX-License-Identifier: MIT
/// Policies that look at a matrix of attention weights, candidate tokens by encoder frames: how
/// many of a hypothesis' tokens may be written (EDAtt, AlignAtt), and what an endless stream may
/// forget afterwards (StreamAtt). For encoder-decoder models whose cross-attention the caller has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"

namespace sluice {

/// How the rows of an attention matrix are scaled before they are read.
enum class AttentionScale : std::uint8_t {
  kNone,
  kSum,        ///< by their sum: probabilities, also where columns were dropped
  kEuclidean,  ///< by their Euclidean norm: the released EDAtt
};

/// EDAtt (Papi, Negri, Turchi, arXiv 2212.07850), settings of the released agent.
struct EdAtt {
  double alpha = 0.6;
  std::int64_t newest_frames = 2;  ///< lambda: columns at the end that a token must not lean on
  bool drop_last_frame = true;
  AttentionScale scale = AttentionScale::kEuclidean;
};

/// AlignAtt (Papi, Turchi, Negri, arXiv 2305.11408). The released agents differ: FBK's drops the
/// last frame, simulstream's keeps it.
struct AlignAtt {
  std::int64_t frames = 4;  ///< f: the last frames that must not be looked at most
  bool drop_last_frame = true;
  /// Standardise each column over the tokens first, which takes away columns that every token
  /// likes: attention sinks (StreamAtt's agents).
  bool standardise = false;
};

namespace detail {

inline std::int64_t frames_used(const char* where, MatrixView<const float> weights, bool drop) {
  const std::int64_t frames = weights.cols - (drop ? 1 : 0);
  if (weights.rows > 0 && frames < 1)
    throw Error(ErrorCode::kShape,
                {"no frames to look at", where, "weights",
                 drop ? "at least 2 columns" : "at least 1 column", std::to_string(weights.cols)});
  return frames;
}

}  // namespace detail

/// Each row's weight on the newest frames, scaled. weights: [tokens, frames]; sums: [tokens],
/// written. Allocates nothing. \throws Error(kConfig) if newest_frames < 1 (the released slice
/// takes 0 for all of them), Error(kShape) for a matrix without frames or another number of sums.
inline void newest_attention(MatrixView<const float> weights, const EdAtt& policy,
                             std::span<double> sums) {
  const std::int64_t frames =
      detail::frames_used("newest_attention", weights, policy.drop_last_frame);
  if (policy.newest_frames < 1)
    throw Error(ErrorCode::kConfig, {"option out of range", "EdAtt", "newest_frames", "at least 1",
                                     std::to_string(policy.newest_frames)});
  if (static_cast<std::int64_t>(sums.size()) != weights.rows)
    throw Error(ErrorCode::kShape, {"one sum for each token", "newest_attention", "sums",
                                    std::to_string(weights.rows), std::to_string(sums.size())});
  const std::int64_t first = std::max<std::int64_t>(0, frames - policy.newest_frames);
  for (std::int64_t t = 0; t < weights.rows; ++t) {
    const float* row = weights.row(t);
    double newest = 0;
    double whole = 0;
    for (std::int64_t j = 0; j < frames; ++j) {
      const auto weight = static_cast<double>(row[j]);
      if (j >= first) newest += weight;
      whole += policy.scale == AttentionScale::kEuclidean ? weight * weight : weight;
    }
    switch (policy.scale) {
      case AttentionScale::kNone: break;
      case AttentionScale::kSum: newest /= whole; break;
      case AttentionScale::kEuclidean: newest /= std::sqrt(whole); break;
    }
    sums[static_cast<std::size_t>(t)] = newest;
  }
}

/// Tokens that EDAtt writes: those before the first whose weight on the newest frames reaches
/// alpha. \throws as newest_attention(). Allocates.
inline std::int64_t writable_tokens(MatrixView<const float> weights, const EdAtt& policy) {
  std::vector<double> sums(static_cast<std::size_t>(weights.rows));
  newest_attention(weights, policy, sums);
  return std::find_if(sums.begin(), sums.end(), [&](double sum) { return sum >= policy.alpha; }) -
         sums.begin();
}

/// The frame that each token looks at most, the first of equal ones. weights: [tokens, frames];
/// frames: [tokens], written. Allocates where columns are standardised. \throws Error(kShape).
inline void most_attended_frames(MatrixView<const float> weights, const AlignAtt& policy,
                                 std::span<std::int64_t> frames) {
  const std::int64_t used =
      detail::frames_used("most_attended_frames", weights, policy.drop_last_frame);
  if (static_cast<std::int64_t>(frames.size()) != weights.rows)
    throw Error(ErrorCode::kShape, {"one frame for each token", "most_attended_frames", "frames",
                                    std::to_string(weights.rows), std::to_string(frames.size())});
  std::vector<double> mean;
  std::vector<double> deviation;
  if (policy.standardise && weights.rows > 1) {
    const auto rows = static_cast<double>(weights.rows);
    for (std::int64_t j = 0; j < used; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; t < weights.rows; ++t) sum += static_cast<double>(weights.row(t)[j]);
      double squares = 0;
      for (std::int64_t t = 0; t < weights.rows; ++t)
        squares += std::pow(static_cast<double>(weights.row(t)[j]) - sum / rows, 2);
      mean.push_back(sum / rows);
      // A column that is the same for all tokens says nothing.
      deviation.push_back(squares > 0 ? std::sqrt(squares / rows) : 1);
    }
  }
  for (std::int64_t t = 0; t < weights.rows; ++t) {
    const auto value = [&](std::int64_t j) {
      const auto weight = static_cast<double>(weights.row(t)[j]);
      const auto column = static_cast<std::size_t>(j);
      return mean.empty() ? weight : (weight - mean[column]) / deviation[column];
    };
    std::int64_t best = 0;
    for (std::int64_t j = 1; j < used; ++j)
      if (value(j) > value(best)) best = j;
    frames[static_cast<std::size_t>(t)] = best;
  }
}

/// Tokens that AlignAtt writes: those before the first that looks most at one of the last
/// `policy.frames` frames. \throws Error(kShape). Allocates.
inline std::int64_t writable_tokens(MatrixView<const float> weights, const AlignAtt& policy) {
  std::vector<std::int64_t> frames(static_cast<std::size_t>(weights.rows));
  most_attended_frames(weights, policy, frames);
  const std::int64_t last = weights.cols - (policy.drop_last_frame ? 1 : 0) - policy.frames;
  return std::find_if(frames.begin(), frames.end(),
                      [&](std::int64_t frame) { return frame >= last; }) -
         frames.begin();
}

/// What of the text an endless stream keeps after it has written (StreamAtt, arXiv 2406.06097).
struct TextHistory {
  enum class Rule : std::uint8_t {
    kWords,        ///< the last `words`
    kPunctuation,  ///< what follows the last strong punctuation
  };
  Rule rule = Rule::kWords;
  std::int64_t words = 20;
  std::int64_t max_tokens = 128;  ///< whatever the rule keeps, no more
};

/// A token of the text so far.
struct HistoryToken {
  bool begins_word = false;         ///< it carries a begin-of-word mark
  bool strong_punctuation = false;  ///< . ! ? : ; or their full-width forms
  std::int64_t frame = 0;           ///< the encoder frame that it looked at most
};

/// What may be forgotten: text and audio before these places, together.
struct HistoryCut {
  std::int64_t tokens = 0;  ///< from the front of the text
  std::int64_t frames = 0;  ///< encoder frames from the front of the audio
};

/// StreamAtt's selection of history after an emission. Words are counted by begin-of-word marks, so
/// punctuation belongs to the word before it; punctuation at the text's very end does not end what
/// is kept. Audio goes only where text goes: up to the earliest frame that a kept token looked at.
/// Allocates nothing.
inline HistoryCut history_cut(std::span<const HistoryToken> text, const TextHistory& history) {
  const auto count = static_cast<std::int64_t>(text.size());
  const auto token = [&](std::int64_t t) -> const HistoryToken& {
    return text[static_cast<std::size_t>(t)];
  };
  std::int64_t kept_from = 0;
  if (history.rule == TextHistory::Rule::kWords) {
    std::int64_t words = 0;
    for (std::int64_t t = count - 1; t >= 0 && words < history.words; --t) {
      if (!token(t).begins_word) continue;
      ++words;
      if (words == history.words) kept_from = t;
    }
    if (history.words < 1) kept_from = count;
  } else {
    for (std::int64_t t = count - 2; t >= 0; --t)
      if (token(t).strong_punctuation) {
        kept_from = t + 1;
        break;
      }
  }
  kept_from = std::max(kept_from, count - history.max_tokens);
  HistoryCut cut{.tokens = kept_from};
  if (kept_from == 0 || kept_from == count) return cut;
  cut.frames = token(kept_from).frame;
  for (std::int64_t t = kept_from; t < count; ++t)
    cut.frames = std::min(cut.frames, token(t).frame);
  return cut;
}

}  // namespace sluice
