// SPDX-License-Identifier: MIT
// The policy and the layout that the command line chose, each as one type that can be any of
// several: sluice takes policies and layouts as template arguments.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "options.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/tokenizer.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/policy.hpp"

namespace duplex_text {

/// Any policy, and what an end token means: before the source has ended it is no end but a READ, as
/// simultaneous translation has it; afterwards it ends the target. Ends at a signal.
class Steering {
 public:
  using Policy = std::variant<sluice::WaitK<sluice::WordUnits>, sluice::ReadUntilSeparator,
                              sluice::LocalAgreement, sluice::HoldN, sluice::AttentionGuided,
                              sluice::SpeakOrSilence>;

  Steering(Policy policy, std::vector<sluice::Token> end_tokens, bool stop_at_end_token);

  sluice::Decision decide(const sluice::PolicyState& state);
  std::int64_t max_provisional() const;
  std::int64_t newest_source_tokens() const;
  std::int64_t probe_layer() const;
  bool needs_logits() const;

  /// Set once an end token has ended the target. Shared by copies; any thread.
  std::shared_ptr<const std::atomic<bool>> ended_by_token() const { return ended_by_token_; }

 private:
  bool ends(sluice::Token token) const;

  Policy policy_;
  std::vector<sluice::Token> end_tokens_;
  bool stop_at_end_token_;
  std::shared_ptr<std::atomic<bool>> ended_by_token_;
};

/// prompt_units: source units in front of the source proper.
/// \throws sluice::Error(kConfig) naming the option whose text is no token.
Steering make_steering(const Options& options, const sluice::Tokenizer& tokenizer,
                       std::int64_t prompt_units);

/// The class of each token of the vocabulary, from its text. [vocab_size]
std::vector<std::uint8_t> word_classes(const sluice::Tokenizer& tokenizer);

/// A layout whose positions depend on the order of arrival.
class ArrivalLayout {
 public:
  explicit ArrivalLayout(LayoutKind kind) {
    if (kind == LayoutKind::kOverlapped) layout_ = sluice::OverlappedLayout();
  }
  sluice::Position place(int group, sluice::Position extent) {
    return std::visit([&](auto& layout) { return layout.place(group, extent); }, layout_);
  }
  void retract(int group, sluice::Position extent) {
    std::visit([&](auto& layout) { layout.retract(group, extent); }, layout_);
  }
  sluice::Position next(int group) const {
    return std::visit([&](const auto& layout) { return layout.next(group); }, layout_);
  }
  void reset() {
    std::visit([](auto& layout) { layout.reset(); }, layout_);
  }

 private:
  std::variant<sluice::InterleavedLayout, sluice::OverlappedLayout> layout_;
};

/// All others. source_tokens: of the whole source, for the batch layout.
sluice::GroupedLayout make_grouped_layout(const Options& options, std::int64_t source_tokens);

}  // namespace duplex_text
