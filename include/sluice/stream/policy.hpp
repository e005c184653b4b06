// SPDX-License-Identifier: MIT
/// When to read and when to write: the policies of simultaneous generation. A policy is asked one
/// question, each time the model has predicted a token: read, write, wait or stop?
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"
#include "sluice/stream/likelihood.hpp"

namespace sluice {

/// The four answers.
enum class Action : std::uint8_t {
  kRead,   ///< see one source unit more before going on; waits until it is there
  kWrite,  ///< the candidate becomes part of the target
  kWait,   ///< ask again when something has arrived (the source runs at most its lead ahead)
  kStop,   ///< the target is complete
};

constexpr std::string_view to_string(Action action) {
  switch (action) {
    case Action::kRead: return "read";
    case Action::kWrite: return "write";
    case Action::kWait: return "wait";
    case Action::kStop: return "stop";
  }
  return "unknown";
}

/// What happens at a READ to the candidate, the token that was predicted without the new source.
enum class LastToken : std::uint8_t {
  /// The candidate is dropped; the keys and values of the last token of the target are removed and
  /// it is fed again after the READ, so that the next token is predicted with the new source
  /// visible
  /// (group position encoding's loop).
  kFeedAgain,
  /// The candidate is kept: it becomes part of the target and is fed after the READ
  /// (StreamingThinker's separators).
  kKeep,
};

/// A policy's answer.
struct Decision {
  Action action = Action::kWait;
  /// kRead only.
  LastToken last_token = LastToken::kFeedAgain;
  /// kWrite only: the token may still be taken back at a later kRead with kFeedAgain.
  bool provisional = false;
  /// kRead, kStop: so many of the provisional tokens become final now; the others are taken back.
  /// (kWrite of a final token makes all provisional ones final.)
  std::int64_t confirm = 0;

  static constexpr Decision read(LastToken last_token = LastToken::kFeedAgain,
                                 std::int64_t confirm = 0) {
    return {Action::kRead, last_token, false, confirm};
  }
  static constexpr Decision write() { return {Action::kWrite}; }
  static constexpr Decision write_provisional() {
    return {Action::kWrite, LastToken::kFeedAgain, true, 0};
  }
  static constexpr Decision wait() { return {Action::kWait}; }
  static constexpr Decision stop(std::int64_t confirm = 0) {
    return {Action::kStop, LastToken::kFeedAgain, false, confirm};
  }
};

/// What a policy is told. All of it but units_arrived and all_arrived follows from the policy's own
/// earlier answers and the source, never from timing: a policy that does not look at these two
/// gives the same target however fast source and target run.
struct PolicyState {
  std::int64_t units_read = 0;     ///< source units that the target sees
  std::int64_t tokens_read = 0;    ///< their tokens
  std::int64_t units_arrived = 0;  ///< source units ready to be seen now: depends on timing
  /// Nothing beyond units_arrived will come: depends on timing. kWait ends the target then.
  bool all_arrived = false;
  /// A READ has found that nothing follows (or the last unit was fed as the last). Reading on is
  /// useless: kRead and kWait end the target then.
  bool source_ended = false;
  std::int64_t tokens_written = 0;  ///< final target tokens, the prefix not counted
  /// The provisional tokens, oldest first: part of the target so far, not final.
  std::span<const Token> provisional;
  std::int64_t tokens_since_read = 0;  ///< target tokens since the last READ, provisional ones too
  /// The token predicted next; empty before the first kWrite, which feeds the target's prefix.
  std::optional<Token> candidate;
  /// Logits that the candidate was drawn from. [vocab_size]; empty without a candidate, and on a
  /// GPU for policies whose needs_logits() is false.
  std::span<const float> logits;
  /// Share of attention on the newest source tokens when the candidate was predicted, mean over
  /// query heads: for policies with newest_source_tokens() > 0.
  float newest_source_mass = 0;
};

/// Answers the question. Optional members: `std::int64_t newest_source_tokens() const` and
/// `std::int64_t probe_layer() const` (negative: from the last; one that the model lacks is refused
/// when a stream begins) ask for newest_source_mass;
/// `std::int64_t max_provisional() const` says how many tokens may be provisional at once (0 if
/// absent); `bool needs_logits() const`, false, that the logits need not be brought to the host.
/// Both are asked once, at the beginning of a stream. decide() runs on the target's thread; what it
/// throws ends the stream and reaches the caller. It must not allocate if the step is not to. The
/// policies below have a reset() for callers that use one again; a stream never calls it.
template <class T>
concept ReadWritePolicy = requires(T policy, const PolicyState& state) {
  { policy.decide(state) } -> std::same_as<Decision>;
};

/// Where a target unit (a word, a sentence, a turn) ends, seen from the candidate.
enum class UnitEdge : std::uint8_t {
  kInside,           ///< the candidate goes on with the unit
  kBeforeCandidate,  ///< the candidate begins the next unit
  kAfterCandidate,   ///< the candidate ends the unit
  kReadInside,       ///< the candidate goes on with the unit, but one source unit more is due
};

/// Tells where target units end. tokens_in_unit: tokens of the unit so far, the candidate not
/// counted.
template <class T>
concept UnitBoundary = requires(const T boundary, Token candidate, std::int64_t tokens_in_unit) {
  { boundary.edge(candidate, tokens_in_unit) } -> std::same_as<UnitEdge>;
};

/// Units of a fixed number of tokens (Speak-While-Watching, arXiv 2601.06843: up to 3 for a frame).
struct FixedUnits {
  std::int64_t tokens = 1;
  UnitEdge edge(Token, std::int64_t tokens_in_unit) const {
    return tokens_in_unit + 1 >= tokens ? UnitEdge::kAfterCandidate : UnitEdge::kInside;
  }
};

/// Units closed by one of a few tokens, which belong to them (StreamingThinker's end-of-thought).
struct SeparatedUnits {
  std::vector<Token> separators;
  UnitEdge edge(Token candidate, std::int64_t) const {
    return std::find(separators.begin(), separators.end(), candidate) != separators.end()
               ? UnitEdge::kAfterCandidate
               : UnitEdge::kInside;
  }
};

/// Words of text: a token that begins with a space begins a word; punctuation (. , : ; ? !) and
/// overlong words end one. The classes come from the vocabulary, once, so that a step handles no
/// text.
///
/// Group position encoding's released rule looks at the decoded text since its buffer was cleared;
/// it is the same for vocabularies whose tokens hold no space inside, but for one thing: its buffer
/// is not cleared at punctuation, so that it reads there and again at the space that follows. That
/// is `punctuation_ends_word = false`; by default a word with its punctuation is one READ.
struct WordUnits {
  /// [vocab_size], or shorter: tokens beyond it are inside words.
  std::vector<std::uint8_t> classes;
  std::int64_t longest = 50;  ///< tokens
  bool punctuation_ends_word = true;

  static constexpr std::uint8_t kStartsWord = 1;
  static constexpr std::uint8_t kEndsWord = 2;

  /// The class of a token from its text.
  static std::uint8_t classify(std::string_view text) {
    std::uint8_t result = 0;
    if (!text.empty() && (text.front() == ' ' || text.front() == '\n' || text.front() == '\t'))
      result |= kStartsWord;
    if (!text.empty() && std::string_view(".,:;?!").find(text.back()) != std::string_view::npos)
      result |= kEndsWord;
    return result;
  }

  UnitEdge edge(Token candidate, std::int64_t tokens_in_unit) const {
    const auto index = static_cast<std::size_t>(candidate);
    const std::uint8_t type = index < classes.size() ? classes[index] : 0;
    if ((type & kStartsWord) != 0 && tokens_in_unit > 0) return UnitEdge::kBeforeCandidate;
    if ((type & kEndsWord) != 0 || tokens_in_unit + 1 >= longest)
      return punctuation_ends_word ? UnitEdge::kAfterCandidate : UnitEdge::kReadInside;
    return UnitEdge::kInside;
  }
};

/// wait-k's g(i) (Ma et al., arXiv 1810.08398, section 3): of `total` source elements those that
/// are read when target unit i (from 0) is written, k + i units of `unit` elements each: 1 for
/// words, the frames of a fixed stride for speech.
constexpr std::int64_t wait_k_read(std::int64_t k, std::int64_t i, std::int64_t total,
                                   std::int64_t unit = 1) {
  // A huge k must not overflow.
  const std::int64_t units = (total + unit - 1) / unit;
  return k >= units - i ? total : std::min((k + i) * unit, total);
}

/// wait-k (Ma et al., arXiv 1810.08398; group position encoding, arXiv 2505.16983): the target
/// begins when k source units are read beside the first `prompt_units`, and then reads one unit for
/// each that it writes. At the end of a unit that is seen only from the next unit's first token the
/// last token is fed again (LastToken::kFeedAgain); at one that its own last token shows, kept.
template <UnitBoundary Boundary>
class WaitK {
 public:
  /// \throws Error(kConfig) if k < 1 or prompt_units < 0.
  WaitK(std::int64_t k, Boundary boundary, std::int64_t prompt_units = 1)
      : k_(k), prompt_units_(prompt_units), boundary_(std::move(boundary)) {
    const auto require = [](std::int64_t value, std::int64_t least, const char* field) {
      if (value < least)
        throw Error(ErrorCode::kConfig,
                    {"option out of range", "WaitK", field, "at least " + std::to_string(least),
                     std::to_string(value)});
    };
    require(k, 1, "k");
    require(prompt_units, 0, "prompt_units");
  }

  Decision decide(const PolicyState& state) {
    if (!state.candidate)
      return state.units_read < prompt_units_ + k_ && !state.source_ended ? Decision::read()
                                                                          : Decision::write();
    if (state.source_ended) return Decision::write();
    switch (boundary_.edge(*state.candidate, in_unit_)) {
      case UnitEdge::kBeforeCandidate:
        // The first token of the next unit will be predicted again: it belongs to that one.
        in_unit_ = 0;
        return Decision::read(LastToken::kFeedAgain);
      case UnitEdge::kAfterCandidate: in_unit_ = 0; return Decision::read(LastToken::kKeep);
      case UnitEdge::kReadInside: ++in_unit_; return Decision::read(LastToken::kKeep);
      case UnitEdge::kInside: break;
    }
    ++in_unit_;
    return Decision::write();
  }

  void reset() { in_unit_ = 0; }
  bool needs_logits() const { return false; }

 private:
  std::int64_t k_;
  std::int64_t prompt_units_;
  Boundary boundary_;
  std::int64_t in_unit_ = 0;  // tokens of the unit being written
};

/// StreamingThinker (arXiv 2510.17238): after the instruction and the question, one sentence is
/// read each time a separator closes a reasoning unit; the separator is fed after the READ.
class ReadUntilSeparator : public WaitK<SeparatedUnits> {
 public:
  /// first_units: read before the target begins (the instruction, the question, ...).
  /// \throws Error(kConfig) if first_units < 1.
  explicit ReadUntilSeparator(std::vector<Token> separators, std::int64_t first_units = 1)
      : WaitK(1, SeparatedUnits{std::move(separators)}, first_units - 1) {}
};

namespace detail {

/// A hypothesis for each source unit: written provisionally up to `longest` tokens or an end token,
/// of which then a part is confirmed. What confirm(hypothesis) leaves is written anew with the next
/// unit; after the source's end everything is final.
template <class Derived>
class HypothesisPolicy {
 public:
  HypothesisPolicy(const char* name, std::int64_t longest, std::int64_t first_units,
                   Token end_token)
      : longest_(longest), first_units_(first_units), end_token_(end_token) {
    if (longest < 1 || longest > 4096)
      throw Error(ErrorCode::kConfig, {"option out of range", name, "longest hypothesis",
                                       "1 to 4096", std::to_string(longest)});
    if (first_units < 1)
      throw Error(ErrorCode::kConfig, {"option out of range", name, "first_units", "at least 1",
                                       std::to_string(first_units)});
  }

  Decision decide(const PolicyState& state) {
    if (!state.candidate)
      return state.units_read < first_units_ && !state.source_ended ? Decision::read()
                                                                    : Decision::write();
    if (state.source_ended) return Decision::write();
    const bool complete = *state.candidate == end_token_ ||
                          static_cast<std::int64_t>(state.provisional.size()) >= longest_;
    if (!complete) return Decision::write_provisional();
    return Decision::read(LastToken::kFeedAgain,
                          static_cast<Derived*>(this)->confirm(state.provisional));
  }

  std::int64_t max_provisional() const { return longest_; }
  bool needs_logits() const { return false; }

 private:
  std::int64_t longest_;
  std::int64_t first_units_;
  Token end_token_;
};

}  // namespace detail

/// Local agreement (Liu et al., arXiv 2005.11185, where n = 2): what the hypotheses of the last n
/// source units begin with alike is final; nothing before there are n of them.
class LocalAgreement : public detail::HypothesisPolicy<LocalAgreement> {
 public:
  /// longest: tokens of a hypothesis; end_token closes one early (-1: none); n: hypotheses that
  /// must agree. \throws Error(kConfig) unless 1 <= longest <= 4096, first_units >= 1, 2 <= n
  /// <= 64.
  explicit LocalAgreement(std::int64_t longest, Token end_token = -1, std::int64_t first_units = 1,
                          std::int64_t n = 2)
      : HypothesisPolicy("LocalAgreement", longest, first_units, end_token),
        row_(static_cast<std::size_t>(longest)),
        held_(static_cast<std::size_t>(checked(n) - 1)),
        previous_(held_.size() * row_) {}

  /// hypothesis: what follows the tokens that are final.
  std::int64_t confirm(std::span<const Token> hypothesis) {
    std::size_t agreed = seen_ < held_.size() ? 0 : hypothesis.size();
    for (std::size_t h = 0; h < held_.size(); ++h) {
      const Token* const earlier = previous_.data() + h * row_;
      const std::size_t most = std::min(agreed, held_[h]);
      agreed = 0;
      while (agreed < most && earlier[agreed] == hypothesis[agreed]) ++agreed;
    }
    // The oldest makes room; what became final leaves the others.
    const std::size_t oldest = seen_++ % held_.size();
    held_[oldest] = hypothesis.size();
    std::copy(hypothesis.begin(), hypothesis.end(),
              previous_.begin() + static_cast<std::ptrdiff_t>(oldest * row_));
    for (std::size_t h = 0; h < held_.size() && agreed > 0; ++h) {
      const auto first = previous_.begin() + static_cast<std::ptrdiff_t>(h * row_);
      std::copy(first + static_cast<std::ptrdiff_t>(agreed),
                first + static_cast<std::ptrdiff_t>(held_[h]), first);
      held_[h] -= agreed;
    }
    return static_cast<std::int64_t>(agreed);
  }

  void reset() {
    seen_ = 0;
    std::fill(held_.begin(), held_.end(), std::size_t{0});
  }

 private:
  static std::int64_t checked(std::int64_t n) {
    if (n < 2 || n > 64)
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "LocalAgreement", "n", "2 to 64", std::to_string(n)});
    return n;
  }

  std::size_t row_;
  std::vector<std::size_t> held_;  // [n - 1]; tokens of each hypothesis
  std::vector<Token> previous_;    // [n - 1, longest]; hypotheses without what became final
  std::size_t seen_ = 0;           // hypotheses
};

/// hold-n (Liu et al., arXiv 2005.11185): the last n tokens of each hypothesis are withheld.
class HoldN : public detail::HypothesisPolicy<HoldN> {
 public:
  /// \throws Error(kConfig) as LocalAgreement, or if n < 0.
  HoldN(std::int64_t n, std::int64_t longest, Token end_token = -1, std::int64_t first_units = 1)
      : HypothesisPolicy("HoldN", longest, first_units, end_token), n_(n) {
    if (n < 0)
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "HoldN", "n", "at least 0", std::to_string(n)});
  }

  std::int64_t confirm(std::span<const Token> hypothesis) const {
    return std::max<std::int64_t>(0, static_cast<std::int64_t>(hypothesis.size()) - n_);
  }

 private:
  std::int64_t n_;
};

/// In the manner of EDAtt (Papi, Negri, Turchi, arXiv 2212.07850, section 3): a token is written
/// while its attention to the newest `newest` source tokens stays below alpha; otherwise it leans
/// on what has just arrived and waits for more. Deviations: decoder-only self-attention, whose mass
/// is shared with the target, stands in for cross-attention; tokens, not encoder frames, are
/// counted.
class AttentionGuided {
 public:
  /// layer: whose attention; negative: from the last.
  /// \throws Error(kConfig) unless 0 < alpha <= 1, newest >= 1, first_units >= 1.
  AttentionGuided(float alpha, std::int64_t newest, std::int64_t first_units = 1,
                  std::int64_t layer = -1)
      : alpha_(alpha), newest_(newest), first_units_(first_units), layer_(layer) {
    if (!(alpha > 0.0F && alpha <= 1.0F))
      throw Error(ErrorCode::kConfig, {"option out of range", "AttentionGuided", "alpha",
                                       "above 0, at most 1", std::to_string(alpha)});
    if (newest < 1 || first_units < 1)
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "AttentionGuided", newest < 1 ? "newest" : "first_units",
                   "at least 1", std::to_string(newest < 1 ? newest : first_units)});
  }

  Decision decide(const PolicyState& state) const {
    if (!state.candidate)
      return state.units_read < first_units_ && !state.source_ended ? Decision::read()
                                                                    : Decision::write();
    return state.source_ended || state.newest_source_mass < alpha_ ? Decision::write()
                                                                   : Decision::read();
  }

  bool needs_logits() const { return false; }
  std::int64_t newest_source_tokens() const { return newest_; }
  std::int64_t probe_layer() const { return layer_; }

 private:
  float alpha_;
  std::int64_t newest_;
  std::int64_t first_units_;
  std::int64_t layer_;
};

/// When SpeakOrSilence stays silent.
enum class SilenceRule : std::uint8_t {
  kThreshold,  ///< the silence token's probability exceeds the threshold (the paper)
  /// It is the most probable token and its probability is not below the threshold (the released
  /// code, which sets it to 0 below and takes the most probable token then; 0: the most probable).
  kMostProbable,
};

/// Speak or stay silent at each frame (VideoLLM-online, arXiv 2406.11816, section 3.3): where a
/// turn could begin, the stream is silent while the probability of the silence token exceeds
/// `threshold` (see SilenceRule); a turn ends with that token. Either way the next frame is read
/// then.
class SpeakOrSilence {
 public:
  /// longest: tokens of a turn.
  /// \throws Error(kConfig) unless 0 <= threshold <= 1, longest >= 1, silence >= 0.
  SpeakOrSilence(Token silence, float threshold, std::int64_t longest, std::int64_t first_units = 1,
                 SilenceRule rule = SilenceRule::kThreshold)
      : silence_(silence),
        threshold_(threshold),
        longest_(longest),
        first_units_(first_units),
        rule_(rule) {
    if (!(threshold >= 0.0F && threshold <= 1.0F))
      throw Error(ErrorCode::kConfig, {"option out of range", "SpeakOrSilence", "threshold",
                                       "0 to 1", std::to_string(threshold)});
    if (longest < 1 || silence < 0)
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "SpeakOrSilence", longest < 1 ? "longest" : "silence",
                   longest < 1 ? "at least 1" : "a token",
                   std::to_string(longest < 1 ? longest : static_cast<std::int64_t>(silence))});
  }

  Decision decide(const PolicyState& state) {
    if (!state.candidate)
      return state.units_read < first_units_ && !state.source_ended ? Decision::read()
                                                                    : Decision::write();
    const bool begins = in_turn_ == 0;
    const bool silent =
        begins ? stays_silent(state.logits) : *state.candidate == silence_ || in_turn_ >= longest_;
    if (silent) {
      in_turn_ = 0;
      return state.source_ended ? Decision::stop() : Decision::read();
    }
    ++in_turn_;
    return Decision::write();
  }

  void reset() { in_turn_ = 0; }

  /// Whether nothing is said at a frame with these logits.
  bool stays_silent(std::span<const float> logits) const {
    const float share = probability(logits, silence_);
    switch (rule_) {
      case SilenceRule::kThreshold: return share > threshold_;
      case SilenceRule::kMostProbable: break;
    }
    const float own = logits[static_cast<std::size_t>(silence_)];
    return share >= threshold_ && *std::max_element(logits.begin(), logits.end()) == own;
  }

  /// softmax(logits)[token].
  static float probability(std::span<const float> logits, Token token) {
    return static_cast<float>(std::exp(-negative_log_likelihood(logits, token)));
  }

 private:
  Token silence_;
  float threshold_;
  std::int64_t longest_;
  std::int64_t first_units_;
  SilenceRule rule_;
  std::int64_t in_turn_ = 0;
};

/// A token that was written, scored again after more of the source was read.
struct RecheckedToken {
  float logit_then = 0;     ///< its logit when it was written
  float logit_now = 0;      ///< and with what has been read since
  bool still_best = false;  ///< no other token has a larger logit now
};

/// How many of the newest written tokens, given oldest first, stay: those before the first whose
/// logit fell and that is no longer the best (the released streaming decoder of CarelessWhisper,
/// which checks the last two after each chunk, takes back the rest and then writes one token at
/// most). O(tokens); allocates nothing.
constexpr std::int64_t count_stable(std::span<const RecheckedToken> newest) {
  std::int64_t count = 0;
  for (const RecheckedToken& token : newest) {
    if (!token.still_best && token.logit_now < token.logit_then) break;
    ++count;
  }
  return count;
}

}  // namespace sluice
