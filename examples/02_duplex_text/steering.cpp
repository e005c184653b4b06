// SPDX-License-Identifier: MIT
#include "steering.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "sluice/core/error.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

namespace {

/// Reads everything before it writes, in numbers that wait-k can add to.
constexpr std::int64_t kAll = std::int64_t{1} << 60;

std::vector<sluice::Token> separator_tokens(const Options& options,
                                            const sluice::Tokenizer& tokenizer) {
  std::vector<sluice::Token> tokens;
  for (const std::string& separator : options.separators) {
    const std::size_t before = tokens.size();
    for (std::size_t t = 0; t < tokenizer.vocab_size(); ++t)
      if (!separator.empty() && tokenizer.bytes(static_cast<sluice::Token>(t)).ends_with(separator))
        tokens.push_back(static_cast<sluice::Token>(t));
    if (tokens.size() == before)
      throw sluice::Error(sluice::ErrorCode::kConfig,
                          {"no token ends with this text", "duplex_text", "--separator",
                           "the end of a token's text", "'" + separator + "'"});
  }
  return tokens;
}

sluice::Token silence_token(const Options& options, const sluice::Tokenizer& tokenizer) {
  if (options.silence.empty()) {
    if (!tokenizer.end_tokens().empty()) return tokenizer.end_tokens().front();
    throw sluice::Error(sluice::ErrorCode::kConfig,
                        {"the model has no end token", "duplex_text", "--silence",
                         "the text of a token", "nothing"});
  }
  const std::vector<sluice::Token> tokens =
      tokenizer.encode(options.silence, {.add_special = false, .parse_special = true});
  if (tokens.size() != 1)
    throw sluice::Error(sluice::ErrorCode::kConfig,
                        {"this text is not one token", "duplex_text", "--silence", "1 token",
                         std::to_string(tokens.size()) + " tokens"});
  return tokens.front();
}

}  // namespace

Steering::Steering(Policy policy, std::vector<sluice::Token> end_tokens, bool stop_at_end_token)
    : policy_(std::move(policy)),
      end_tokens_(std::move(end_tokens)),
      stop_at_end_token_(stop_at_end_token),
      ended_by_token_(std::make_shared<std::atomic<bool>>(false)) {}

bool Steering::ends(sluice::Token token) const {
  return std::find(end_tokens_.begin(), end_tokens_.end(), token) != end_tokens_.end();
}

sluice::Decision Steering::decide(const sluice::PolicyState& state) {
  if (support::caught_signal() != 0) return sluice::Decision::stop();
  const bool end_token = state.candidate && ends(*state.candidate);
  if (end_token && (state.source_ended || stop_at_end_token_)) {
    ended_by_token_->store(true);
    return sluice::Decision::stop(static_cast<std::int64_t>(state.provisional.size()));
  }
  return std::visit(
      [&](auto& policy) -> sluice::Decision {
        if (!end_token) return policy.decide(state);
        if constexpr (requires { policy.confirm(state.provisional); }) {
          // The hypothesis is complete, whichever of the end tokens closed it.
          sluice::PolicyState complete = state;
          complete.candidate = end_tokens_.front();
          return policy.decide(complete);
        } else {
          if constexpr (requires { policy.reset(); }) policy.reset();
          return sluice::Decision::read();
        }
      },
      policy_);
}

std::int64_t Steering::max_provisional() const {
  return std::visit(
      [](const auto& policy) -> std::int64_t {
        if constexpr (requires { policy.max_provisional(); })
          return policy.max_provisional();
        else
          return 0;
      },
      policy_);
}

std::int64_t Steering::newest_source_tokens() const {
  const auto* const policy = std::get_if<sluice::AttentionGuided>(&policy_);
  return policy == nullptr ? 0 : policy->newest_source_tokens();
}

std::int64_t Steering::probe_layer() const {
  const auto* const policy = std::get_if<sluice::AttentionGuided>(&policy_);
  return policy == nullptr ? -1 : policy->probe_layer();
}

bool Steering::needs_logits() const {
  return std::holds_alternative<sluice::SpeakOrSilence>(policy_);
}

Steering make_steering(const Options& options, const sluice::Tokenizer& tokenizer,
                       std::int64_t prompt_units) {
  std::vector<sluice::Token> ends;
  if (!options.ignore_eos)
    ends.assign(tokenizer.end_tokens().begin(), tokenizer.end_tokens().end());
  const std::int64_t first = prompt_units + options.first;
  const sluice::Token end = ends.empty() ? -1 : ends.front();
  const auto words = [&] {
    return sluice::WordUnits{word_classes(tokenizer)};
  };
  const auto steering = [&](Steering::Policy policy) {
    return Steering(std::move(policy), ends, options.stop_at_end_token);
  };
  switch (options.policy) {
    case PolicyKind::kWaitK:
      return steering(sluice::WaitK<sluice::WordUnits>(options.k, words(), prompt_units));
    case PolicyKind::kSeparator:
      return steering(sluice::ReadUntilSeparator(separator_tokens(options, tokenizer), first));
    case PolicyKind::kLocalAgreement:
      return steering(sluice::LocalAgreement(options.longest, end, first));
    case PolicyKind::kHoldN: return steering(sluice::HoldN(options.n, options.longest, end, first));
    case PolicyKind::kAttention:
      return steering(sluice::AttentionGuided(static_cast<float>(options.alpha), options.newest,
                                              first, options.layer));
    case PolicyKind::kSpeak: {
      // Silence is the policy's to understand, also where it is an end token.
      const sluice::Token silence = silence_token(options, tokenizer);
      std::erase(ends, silence);
      return steering(sluice::SpeakOrSilence(silence, static_cast<float>(options.threshold),
                                             options.longest, first));
    }
    case PolicyKind::kBatch: break;
  }
  return steering(sluice::WaitK<sluice::WordUnits>(kAll, words(), prompt_units));
}

std::vector<std::uint8_t> word_classes(const sluice::Tokenizer& tokenizer) {
  std::vector<std::uint8_t> classes(tokenizer.vocab_size());
  for (std::size_t t = 0; t < classes.size(); ++t)
    classes[t] = sluice::WordUnits::classify(tokenizer.bytes(static_cast<sluice::Token>(t)));
  return classes;
}

sluice::GroupedLayout make_grouped_layout(const Options& options, std::int64_t source_tokens) {
  switch (options.layout) {
    case LayoutKind::kGroup: return sluice::GroupedLayout::group_positions(options.phi);
    case LayoutKind::kGap: return sluice::GroupedLayout::gap_isolated(options.gap);
    case LayoutKind::kBatch:
      return sluice::GroupedLayout::group_positions(static_cast<double>(source_tokens));
    default: return sluice::GroupedLayout::group_decoupled();
  }
}

}  // namespace duplex_text
