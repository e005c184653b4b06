// SPDX-License-Identifier: MIT
// Rounds of a dialogue as text: what a model must read between one reply and the next.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "sluice/core/token.hpp"
#include "sluice/io/chat_template.hpp"
#include "sluice/io/tokenizer.hpp"

namespace stream_text {

/// Renders single rounds, so that an endless dialogue needs no history but what the cache holds.
///
/// The first round is the template's text of [system, user] and the invitation to reply. A later
/// round is what the template puts after a reply, up to the next one: it renders a dialogue of a
/// stand-in round and the new message, and takes what follows the stand-in reply. For templates
/// whose text of a message does not depend on older messages, which are all in common use, the
/// rounds joined are the text of the whole dialogue.
class ChatRounds {
 public:
  /// `tokenizer` must outlive it. `system`: "" for the template's own default.
  /// \throws sluice::Error when there is no template, or one that cannot be used.
  ChatRounds(const sluice::Tokenizer& tokenizer, std::string system);

  /// Tokens of the first round.
  std::vector<sluice::Token> first(const std::string& message) const;
  /// Tokens of a later round. `last_written`: the reply's last token; where it is the end token
  /// that the template puts after a reply, that is left out: the stream has it.
  std::vector<sluice::Token> next(const std::string& message, sluice::Token last_written) const;

 private:
  std::vector<sluice::ChatMessage> opening() const;

  const sluice::Tokenizer* tokenizer_;
  sluice::ChatTemplate template_;
  std::string system_;
};

}  // namespace stream_text
