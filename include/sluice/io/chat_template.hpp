// SPDX-License-Identifier: MIT
/// Chat templates: what a model's file says about how a dialogue becomes the text it was trained
/// on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/detail/jinja.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/detail/unicode.hpp"
#include "sluice/io/tokenizer.hpp"

namespace sluice {

/// One turn of a dialogue.
struct ChatMessage {
  std::string role;  ///< "system", "user", "assistant", or what the template knows besides
  std::string content;
};

/// A variable that some templates read besides the messages (Qwen3's enable_thinking, Llama 3.1's
/// date_string).
struct ChatVariable {
  std::string name;
  std::variant<bool, std::int64_t, std::string> value;
};

/// A Jinja template that renders dialogues, as Transformers' apply_chat_template does: the template
/// sees messages, add_generation_prompt, bos_token, eos_token, and none for tools and documents.
/// Const after construction, shared between threads. Templates are untrusted: depth, steps and
/// output are bounded (io/detail/jinja.hpp has the limits, and the part of Jinja that is known).
/// There is no clock: strftime_now is undefined, so that templates take their fixed date.
///
/// The result usually holds special tokens, the begin token included: encode it with
/// {.add_special = false, .parse_special = true}. Message text that spells a special token becomes
/// that token then; check the content first where it is not trusted.
class ChatTemplate {
 public:
  /// \throws Error(kFormat, kUnsupported, kCapacity) with line and column.
  explicit ChatTemplate(std::string source, std::string bos_token = "", std::string eos_token = "")
      : template_(detail::jinja::parse(std::move(source))),
        bos_token_(std::move(bos_token)),
        eos_token_(std::move(eos_token)) {}

  /// The template and the tokens that a tokeniser's file names.
  /// \throws Error(kConfig) when it has no template, and as above.
  static ChatTemplate from_tokenizer(const Tokenizer& tokenizer) {
    if (tokenizer.chat_template().empty())
      throw Error(ErrorCode::kConfig, {"there is no chat template", tokenizer.where(),
                                       "chat_template", "a template", "none"});
    const auto spelled = [&](std::optional<Token> token) {
      return token ? std::string(tokenizer.piece(*token)) : std::string();
    };
    return ChatTemplate(tokenizer.chat_template(), spelled(tokenizer.bos()),
                        spelled(tokenizer.eos()));
  }

  /// The text of a dialogue; with `add_generation_prompt`, up to where the assistant speaks next.
  /// \throws Error(kConfig) with the template's own words when it refuses the dialogue
  /// (raise_exception: roles that do not alternate, for example); Error(kText) when a message is
  /// not valid UTF-8; Error(kFormat) for operations on values that do not fit; Error(kUnsupported)
  /// naming a filter, test or method; Error(kCapacity) beyond the limits.
  std::string render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                     std::span<const ChatVariable> variables = {}) const {
    using detail::jinja::make_text;
    std::size_t input_bytes = 0;
    for (std::size_t i = 0; i < messages.size(); ++i) {
      const std::string field = "message " + std::to_string(i);
      check_utf8(messages[i].role, field);
      check_utf8(messages[i].content, field);
      input_bytes += messages[i].role.size() + messages[i].content.size() + 256;
    }
    detail::jinja::Interpreter interpreter(template_, input_bytes);
    std::vector<detail::jinja::Value> list;
    for (const ChatMessage& message : messages) {
      detail::jinja::Dict* const entry = interpreter.new_dict();
      entry->set("role", make_text(message.role));
      entry->set("content", make_text(message.content));
      list.emplace_back(entry);
    }
    interpreter.set("messages", interpreter.new_list(std::move(list)));
    interpreter.set("add_generation_prompt", add_generation_prompt);
    interpreter.set("bos_token", make_text(bos_token_));
    interpreter.set("eos_token", make_text(eos_token_));
    interpreter.set("tools", detail::jinja::None{});
    interpreter.set("documents", detail::jinja::None{});
    for (const auto& [name, value] : variables) {
      if (const auto* text = std::get_if<std::string>(&value)) {
        check_utf8(*text, name);
        interpreter.set(name, make_text(*text));
      } else if (const auto* flag = std::get_if<bool>(&value)) {
        interpreter.set(name, *flag);
      } else {
        interpreter.set(name, std::get<std::int64_t>(value));
      }
    }
    return interpreter.run();
  }

 private:
  static void check_utf8(const std::string& text, const std::string& field) {
    const std::size_t invalid = detail::find_invalid_utf8(text);
    if (invalid != std::string::npos)
      throw Error(ErrorCode::kText,
                  {"text is not valid UTF-8", "chat", detail::at_byte(field, invalid),
                   "valid UTF-8", detail::quote_text(std::string_view(text).substr(invalid, 4))});
  }

  detail::jinja::Template template_;
  std::string bos_token_;
  std::string eos_token_;
};

}  // namespace sluice
