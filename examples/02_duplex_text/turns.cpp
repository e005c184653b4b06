// SPDX-License-Identifier: MIT
#include "turns.hpp"

#include <cstddef>
#include <string_view>

#include "sluice/core/error.hpp"
#include "sluice/io/chat_template.hpp"

namespace duplex_text {

namespace {

/// Plain words, because templates trim and some of them look for marks.
constexpr std::string_view kStandIn = "The source stands here.";

void put_bos_first(const sluice::Tokenizer& tokenizer, std::vector<sluice::Token>& tokens) {
  if (tokenizer.adds_bos() && (tokens.empty() || tokens.front() != *tokenizer.bos()))
    tokens.insert(tokens.begin(), *tokenizer.bos());
}

std::vector<sluice::Token> begin_token(const sluice::Tokenizer& tokenizer) {
  if (const auto token = tokenizer.bos()) return {*token};
  if (const auto token = tokenizer.eos()) return {*token};
  std::vector<sluice::Token> tokens = tokenizer.encode("\n", {.add_special = false});
  if (tokens.empty())
    throw sluice::Error(sluice::ErrorCode::kText, {"nothing to begin the target with", "the model",
                                                   "begin token", "one", "none"});
  return tokens;
}

}  // namespace

Turns make_turns(const sluice::Tokenizer& tokenizer, const std::string& prompt) {
  const auto encode = [&](std::string_view text) {
    return tokenizer.encode(text, {.add_special = false, .parse_special = true});
  };
  Turns turns;
  turns.prompt_text = prompt;
  if (prompt.empty() || tokenizer.chat_template().empty()) {
    if (!prompt.empty()) turns.prompt = encode(prompt + "\n");
    put_bos_first(tokenizer, turns.prompt);
    turns.opening = begin_token(tokenizer);
    return turns;
  }
  const sluice::ChatTemplate chat = sluice::ChatTemplate::from_tokenizer(tokenizer);
  const std::vector<sluice::ChatMessage> messages{{"user", prompt + "\n" + std::string(kStandIn)}};
  const std::string whole = chat.render(messages, true);
  const std::string closed = chat.render(messages, false);
  const std::size_t begin = whole.find(kStandIn);
  if (begin == std::string::npos)
    throw sluice::Error(sluice::ErrorCode::kUnsupported,
                        {"a chat template that leaves messages out", "chat template", "",
                         "the text of every message", "none"});
  const std::size_t end = begin + kStandIn.size();
  // Where the template's two answers part, the assistant's header begins.
  const bool parts = closed.size() >= end && closed.size() < whole.size() &&
                     whole.compare(0, closed.size(), closed) == 0;
  const std::size_t header = parts ? closed.size() : end;
  turns.prompt = encode(std::string_view(whole).substr(0, begin));
  put_bos_first(tokenizer, turns.prompt);
  turns.closing = encode(std::string_view(whole).substr(end, header - end));
  turns.opening = encode(std::string_view(whole).substr(header));
  if (turns.opening.empty()) turns.opening = begin_token(tokenizer);
  return turns;
}

}  // namespace duplex_text
