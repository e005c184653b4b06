// SPDX-License-Identifier: MIT
#include "chat.hpp"

#include <algorithm>
#include <utility>

#include "sluice/core/error.hpp"

namespace stream_text {

namespace {

/// Plain words, because templates trim and some of them look for marks in a reply.
constexpr std::string_view kStandInReply = "The reply that stands here.";

}  // namespace

ChatRounds::ChatRounds(const sluice::Tokenizer& tokenizer, std::string system)
    : tokenizer_(&tokenizer),
      template_(sluice::ChatTemplate::from_tokenizer(tokenizer)),
      system_(std::move(system)) {
  static_cast<void>(next("A question.", 0));  // a template that cannot do rounds fails here
}

std::vector<sluice::ChatMessage> ChatRounds::opening() const {
  if (system_.empty()) return {};
  return {{"system", system_}};
}

std::vector<sluice::Token> ChatRounds::first(const std::string& message) const {
  std::vector<sluice::ChatMessage> messages = opening();
  messages.push_back({"user", message});
  std::vector<sluice::Token> tokens = tokenizer_->encode(
      template_.render(messages, true), {.add_special = false, .parse_special = true});
  // Some templates write the begin token, some leave it to the tokeniser.
  if (tokenizer_->adds_bos() && (tokens.empty() || tokens.front() != *tokenizer_->bos()))
    tokens.insert(tokens.begin(), *tokenizer_->bos());
  return tokens;
}

std::vector<sluice::Token> ChatRounds::next(const std::string& message,
                                            sluice::Token last_written) const {
  std::vector<sluice::ChatMessage> messages = opening();
  messages.push_back({"user", "A question."});
  messages.push_back({"assistant", std::string(kStandInReply)});
  messages.push_back({"user", message});
  const std::string text = template_.render(messages, true);
  const std::size_t reply = text.find(kStandInReply);
  if (reply == std::string::npos)
    throw sluice::Error(sluice::ErrorCode::kUnsupported,
                        {"a chat template that leaves replies out", "chat template", "",
                         "the text of every reply", "none"});
  std::vector<sluice::Token> tokens =
      tokenizer_->encode(std::string_view(text).substr(reply + kStandInReply.size()),
                         {.add_special = false, .parse_special = true});
  const auto ends = tokenizer_->end_tokens();
  if (!tokens.empty() && tokens.front() == last_written &&
      std::binary_search(ends.begin(), ends.end(), last_written))
    tokens.erase(tokens.begin());
  return tokens;
}

}  // namespace stream_text
