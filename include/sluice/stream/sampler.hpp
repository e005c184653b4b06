// SPDX-License-Identifier: MIT
/// From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, in this
/// order, and a seeded draw. The order and the edges are those of Hugging Face Transformers'
/// logits processors (generation/logits_process.py, 5.23), so that settings carry over.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <system_error>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// How the next token is chosen. The defaults choose the most likely one.
struct SamplerOptions {
  /// Logits are divided by it; 0 takes the most likely token (greedy; top_k, top_p, min_p and seed
  /// are then without effect). Finite, >= 0.
  double temperature = 0.0;
  /// Keeps the top_k most likely tokens, and those that tie with the last of them. 0 keeps all.
  int top_k = 0;
  /// Keeps the smallest set of most likely tokens whose probabilities sum to top_p or more, among
  /// what top_k kept; of tied tokens the lower numbers enter first. 0 to 1; 1 keeps all.
  double top_p = 1.0;
  /// Keeps tokens at least min_p times as likely as the most likely one. 0 to 1; 0 keeps all.
  double min_p = 0.0;
  /// Divides positive and multiplies negative logits of the tokens accepted lately, once each
  /// (CTRL, arXiv 1909.05858, section 4.1). Above 1 discourages, below 1 encourages; > 0, finite.
  double repetition_penalty = 1.0;
  /// How many of the last accepted tokens repetition_penalty looks at, 0 to 2^20. (Transformers
  /// looks at all of them: for an endless stream that would be the whole vocabulary.)
  int repetition_window = 64;
  /// Seed of the draw. The same seed, options and logits give the same tokens on every machine, as
  /// far as its exp() agrees to the last bit.
  std::uint64_t seed = 0;

  /// \throws Error(kConfig) naming the field, what it may be and what it is.
  void validate() const {
    check(std::isfinite(temperature) && temperature >= 0.0, "temperature", "finite, 0 or more",
          temperature);
    check(top_k >= 0, "top_k", "0 or more", top_k);
    check(top_p >= 0.0 && top_p <= 1.0, "top_p", "0 to 1", top_p);
    check(min_p >= 0.0 && min_p <= 1.0, "min_p", "0 to 1", min_p);
    check(std::isfinite(repetition_penalty) && repetition_penalty > 0.0, "repetition_penalty",
          "finite, above 0", repetition_penalty);
    check(repetition_window >= 0 && repetition_window <= (1 << 20), "repetition_window",
          "0 to 1048576", repetition_window);
  }

 private:
  static void check(bool valid, const char* field, const char* expected, double found) {
    if (valid) return;
    std::array<char, 32> text{};
    const auto [end, status] = std::to_chars(text.data(), text.data() + text.size(), found);
    throw Error(ErrorCode::kConfig,
                {"option out of range", "SamplerOptions", field, expected,
                 status == std::errc() ? std::string(text.data(), end) : std::string("?")});
  }
};

/// Draws tokens from logits. Allocates at construction (16 bytes a vocabulary entry, twice that
/// if top_p is in use, and 4 bytes a token of the repetition window) and never again. One thread at
/// a time; each stream has its own.
///
/// A NaN logit counts as minus infinity: that token is never drawn. If no logit is above minus
/// infinity, token 0 is the result and nothing_to_sample() says so. If some are plus infinity,
/// these share the whole probability equally.
class Sampler {
 public:
  /// One token that survived the filters.
  struct Candidate {
    Token token;
    double probability;
  };

  /// \throws Error(kConfig) for options out of range, or unless 1 <= vocab_size < 2^31.
  Sampler(const SamplerOptions& options, std::int64_t vocab_size)
      : options_(checked(options)),
        random_(options.seed),
        scratch_(checked_size(vocab_size)),
        boundary_(options.top_p < 1.0 ? scratch_.size() : 0),
        history_(static_cast<std::size_t>(options.repetition_window)) {}

  /// The next token. logits: [vocab_size]. Takes one random number, or none when greedy: how many
  /// tokens survive does not shift the sequence. Does not call accept(). Greedy: ties go to the
  /// lowest token. Costs one pass over the logits if greedy and without a penalty, else a few, with
  /// top_k a heap of that many, and one exp() for each token that top_k leaves.
  Token sample(std::span<const float> logits) noexcept {
    SLUICE_ASSERT(logits.size() == scratch_.size());
    if (options_.temperature == 0.0 && options_.repetition_penalty == 1.0) return take_best(logits);
    count_ = gather(logits);
    nothing_to_sample_ = count_ == 0;
    const double draw = options_.temperature > 0.0 ? random_.uniform() : 0.0;
    if (count_ == 0) {
      scratch_[0] = {0, 1.0};
      count_ = 1;
    } else if (options_.temperature > 0.0) {
      keep_top_k();
      weigh();
      keep_top_p();
      keep_min_p();
      return draw_token(draw);
    } else {
      scratch_[0] = {std::min_element(begin(), end(), more_likely)->token, 1.0};
      count_ = 1;
    }
    return scratch_[0].token;
  }

  /// Tells the repetition penalty that `token` is part of the text: called for every token that is
  /// read or written. Tokens outside the vocabulary have no effect. O(1).
  void accept(Token token) noexcept {
    if (history_.size() == 0) return;
    history_[next_] = token;
    next_ = (next_ + 1) % history_.size();
    held_ = std::min(held_ + 1, history_.size());
  }

  /// Back to the state after construction.
  void reset() noexcept {
    random_ = Random(options_.seed);
    next_ = held_ = count_ = 0;
    nothing_to_sample_ = false;
  }

  /// What the last sample() drew from, probabilities summing to 1: by falling probability (ties by
  /// token) if top_k is in use, else by token. Tokens whose probability is 0 in double are not in
  /// it. Valid until the next call of sample() or reset(); empty before the first.
  std::span<const Candidate> candidates() const noexcept { return scratch_.span().first(count_); }

  /// Whether the last sample() met no logit above minus infinity: the model's output is broken, and
  /// the token it returned means nothing.
  bool nothing_to_sample() const noexcept { return nothing_to_sample_; }

  const SamplerOptions& options() const noexcept { return options_; }
  std::int64_t vocab_size() const noexcept { return static_cast<std::int64_t>(scratch_.size()); }

  /// What the following tokens depend on, for going back to it in the same process.
  class Checkpoint {
   public:
    std::size_t bytes() const noexcept { return sizeof(Random::State) + history_.bytes(); }

   private:
    friend class Sampler;
    Random::State random_{};
    Buffer<Token> history_;
    std::size_t next_ = 0;
    std::size_t held_ = 0;
  };
  /// An empty checkpoint with the room that capture() needs. Allocates it.
  Checkpoint make_checkpoint() const {
    Checkpoint checkpoint;
    checkpoint.history_ = Buffer<Token>(history_.size());
    return checkpoint;
  }
  /// Takes the state of now. Allocates nothing.
  void capture(Checkpoint& checkpoint) const noexcept {
    SLUICE_ASSERT(checkpoint.history_.size() == history_.size());
    checkpoint.random_ = random_.state();
    std::copy(history_.span().begin(), history_.span().end(), checkpoint.history_.data());
    checkpoint.next_ = next_;
    checkpoint.held_ = held_;
  }
  /// Continues where a captured sampler stood. Allocates nothing.
  /// Precondition: it had the same repetition_window.
  void revert(const Checkpoint& checkpoint) noexcept {
    SLUICE_ASSERT(checkpoint.history_.size() == history_.size());
    random_.set_state(checkpoint.random_);
    std::copy_n(checkpoint.history_.data(), history_.size(), history_.data());
    next_ = checkpoint.next_;
    held_ = checkpoint.held_;
    count_ = 0;
    nothing_to_sample_ = false;
  }
  /// Continues where `other` stands. Allocates nothing. Precondition: as revert().
  void copy_from(const Sampler& other) noexcept {
    SLUICE_ASSERT(other.history_.size() == history_.size());
    random_ = other.random_;
    std::copy_n(other.history_.data(), history_.size(), history_.data());
    next_ = other.next_;
    held_ = other.held_;
    count_ = 0;
    nothing_to_sample_ = false;
  }
  /// Draws from another sequence from now on: continuations of one text that shall differ.
  void reseed(std::uint64_t seed) noexcept { random_ = Random(seed); }

  /// Writes what the following tokens depend on: the random state and the accepted tokens.
  void save(ByteWriter& writer) const {
    writer.write_span(std::span<const std::uint64_t>(random_.state()));
    writer.write(static_cast<std::uint64_t>(history_.size()));
    writer.write(static_cast<std::uint64_t>(held_));
    writer.write(static_cast<std::uint64_t>(next_));
    writer.write_span(history_.span());
  }

  /// Continues where the saved sampler stood, bit for bit if options and vocabulary are the same.
  /// \throws Error(kFormat) if the content is damaged or of another repetition_window; the sampler
  /// is then unchanged.
  void restore(ByteReader& reader) {
    Random::State state;
    const std::size_t begin = reader.offset();
    reader.read_span("sampler random state", std::span(state));
    if (state == Random::State{})
      reader.fail_at(begin, "impossible value", "sampler random state", "not all zero", "all zero");
    reader.read_expected("sampler repetition_window", static_cast<std::uint64_t>(history_.size()));
    const std::size_t held_at = reader.offset();
    const auto held = reader.read<std::uint64_t>("sampler history count");
    if (held > history_.size())
      reader.fail_at(held_at, "value out of range", "sampler history count",
                     "at most " + std::to_string(history_.size()), std::to_string(held));
    const std::size_t next_at = reader.offset();
    const auto next = reader.read<std::uint64_t>("sampler history position");
    // A ring that is not full has its next place after the last token.
    if (held < history_.size() ? next != held : next >= std::max<std::size_t>(history_.size(), 1))
      reader.fail_at(next_at, "impossible value", "sampler history position",
                     "a place in the history", std::to_string(next));
    reader.read_span("sampler history", history_.span());  // all or nothing, and nothing after it
    random_.set_state(state);
    next_ = static_cast<std::size_t>(next);
    held_ = static_cast<std::size_t>(held);
    count_ = 0;
    nothing_to_sample_ = false;
  }

 private:
  static constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  static constexpr std::size_t kBands = 1024;

  static const SamplerOptions& checked(const SamplerOptions& options) {
    options.validate();
    return options;
  }
  static std::size_t checked_size(std::int64_t vocab_size) {
    constexpr std::int64_t kMax = std::numeric_limits<Token>::max();
    if (vocab_size < 1 || vocab_size > kMax)
      throw Error(ErrorCode::kConfig, {"vocabulary size out of range", "Sampler", "vocab_size",
                                       "1 to " + std::to_string(kMax), std::to_string(vocab_size)});
    return static_cast<std::size_t>(vocab_size);
  }

  /// A strict total order: what is kept and the order of summing do not depend on the library's
  /// sorting algorithms. (While filtering, `probability` holds a logit and then a weight.)
  static bool more_likely(const Candidate& a, const Candidate& b) {
    return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
  }

  Candidate* begin() noexcept { return scratch_.data(); }
  Candidate* end() noexcept { return scratch_.data() + count_; }

  /// Greedy without a penalty: one pass over the logits, and another as far as the result.
  Token take_best(std::span<const float> logits) noexcept {
    // Maxima of every kLanes-th logit, which compilers form in registers; a NaN is above none.
    constexpr std::size_t kLanes = 64;
    std::array<float, kLanes> best;
    best.fill(-std::numeric_limits<float>::infinity());
    std::size_t i = 0;
    for (; i + kLanes <= logits.size(); i += kLanes)
      for (std::size_t lane = 0; lane < kLanes; ++lane)
        best[lane] = logits[i + lane] > best[lane] ? logits[i + lane] : best[lane];
    for (; i < logits.size(); ++i) best[0] = logits[i] > best[0] ? logits[i] : best[0];
    const float largest = *std::max_element(best.begin(), best.end());
    nothing_to_sample_ = !(largest > -std::numeric_limits<float>::infinity());
    const auto found =
        nothing_to_sample_ ? logits.begin() : std::find(logits.begin(), logits.end(), largest);
    scratch_[0] = {static_cast<Token>(found - logits.begin()), 1.0};
    count_ = 1;
    return scratch_[0].token;
  }

  /// Fills the scratch with the tokens above minus infinity and their penalised logits, by token.
  std::size_t gather(std::span<const float> logits) noexcept {
    for (std::size_t i = 0; i < logits.size(); ++i)
      scratch_[i] = {static_cast<Token>(i), static_cast<double>(logits[i])};
    for (std::size_t i = 0; i < held_; ++i) {
      const Token token = history_[i];
      if (token < 0 || token >= vocab_size()) continue;
      // From the original logit: a token that was accepted twice is penalised once.
      const double logit = static_cast<double>(logits[static_cast<std::size_t>(token)]);
      scratch_[static_cast<std::size_t>(token)].probability =
          logit < 0.0 ? logit * options_.repetition_penalty : logit / options_.repetition_penalty;
    }
    const Candidate* kept = std::remove_if(
        begin(), begin() + logits.size(),
        [](const Candidate& candidate) { return !(candidate.probability > kMinusInfinity); });
    return static_cast<std::size_t>(kept - begin());
  }

  void keep_top_k() noexcept {
    const auto top_k = static_cast<std::size_t>(options_.top_k);
    if (top_k == 0 || top_k >= count_) {
      if (top_k != 0) std::sort(begin(), end(), more_likely);
      return;
    }
    std::partial_sort(begin(), begin() + top_k, end(), more_likely);
    const double last = scratch_[top_k - 1].probability;
    Candidate* const tied_end = std::partition(
        begin() + top_k, end(),
        [last](const Candidate& candidate) { return candidate.probability == last; });
    std::sort(begin() + top_k, tied_end, more_likely);
    count_ = static_cast<std::size_t>(tied_end - begin());
  }

  /// Turns logits into probabilities relative to the most likely token's. The temperature divides
  /// differences from the largest logit, which cannot overflow however small it is.
  void weigh() noexcept {
    double largest = kMinusInfinity;
    for (const Candidate& candidate : candidates())
      largest = std::max(largest, candidate.probability);
    for (Candidate& candidate : scratch_.span().first(count_))
      candidate.probability =
          candidate.probability == largest  // also when both are infinite
              ? 1.0
              : std::exp((candidate.probability - largest) / options_.temperature);
  }

  /// Finds the last token to keep without sorting what is certainly in or out: masses are summed by
  /// bands of weight, and only the band in which the sum passes top_p is sorted. Keeps the order.
  void keep_top_p() noexcept {
    if (options_.top_p >= 1.0) return;
    std::array<double, kBands> mass_of_band{};
    double total = 0.0;
    for (const Candidate& candidate : candidates()) {
      mass_of_band[band_of(candidate.probability)] += candidate.probability;
      total += candidate.probability;
    }
    const double wanted = options_.top_p * total;
    double mass = 0.0;
    std::size_t band = 0;
    while (band < kBands && mass + mass_of_band[band] < wanted) mass += mass_of_band[band++];
    if (band == kBands) return;  // top_p so close to 1 that rounding decides: all stay

    Candidate* const first = boundary_.data();
    Candidate* const last = std::copy_if(begin(), end(), first, [band](const Candidate& candidate) {
      return band_of(candidate.probability) == band;
    });
    std::sort(first, last, more_likely);
    // The band of the most likely token is the first, and never empty: one token always stays.
    const Candidate* kept = first;
    for (mass += kept->probability; mass < wanted && kept + 1 < last; mass += kept->probability)
      ++kept;
    const Candidate least = *kept;
    count_ = static_cast<std::size_t>(std::remove_if(begin(), end(),
                                                     [&least](const Candidate& candidate) {
                                                       return more_likely(least, candidate);
                                                     }) -
                                      begin());
  }

  /// 16 bands to each power of two, from weight 1 down; all below about 2^-64 share the last.
  static std::size_t band_of(double weight) noexcept {
    constexpr std::uint64_t kOne = std::bit_cast<std::uint64_t>(1.0) >> 48;
    return static_cast<std::size_t>(
        std::min<std::uint64_t>(kOne - (std::bit_cast<std::uint64_t>(weight) >> 48), kBands - 1));
  }

  /// Also drops weights that came out as zero, whatever min_p is: they cannot be drawn.
  void keep_min_p() noexcept {
    const double least = std::max(options_.min_p, std::numeric_limits<double>::denorm_min());
    const Candidate* kept = std::remove_if(begin(), end(), [least](const Candidate& candidate) {
      return candidate.probability < least;  // the most likely token's weight is exactly 1
    });
    count_ = static_cast<std::size_t>(kept - begin());
  }

  /// Makes the weights probabilities and returns the token at the fraction `draw`, in [0, 1), of
  /// their sum.
  Token draw_token(double draw) noexcept {
    double total = 0.0;
    for (const Candidate& candidate : candidates()) total += candidate.probability;
    const double target = draw * total;
    // If rounding keeps the sum from passing the target, the last token it is.
    Token drawn = scratch_[count_ - 1].token;
    double cumulative = 0.0;
    bool found = false;
    for (Candidate& candidate : scratch_.span().first(count_)) {
      cumulative += candidate.probability;
      if (!found && cumulative > target) {
        drawn = candidate.token;
        found = true;
      }
      candidate.probability /= total;
    }
    return drawn;
  }

  SamplerOptions options_;
  Random random_;
  Buffer<Candidate> scratch_;   // [vocab_size], the first count_ in use
  Buffer<Candidate> boundary_;  // [vocab_size] if top_p is in use: one band, see keep_top_p()
  Buffer<Token> history_;       // [repetition_window], a ring
  std::size_t next_ = 0;        // where the next accepted token goes
  std::size_t held_ = 0;        // accepted tokens in the ring
  std::size_t count_ = 0;
  bool nothing_to_sample_ = false;
};

}  // namespace sluice
