// SPDX-License-Identifier: MIT
// What stands around the source and in front of the target.
#pragma once

#include <string>
#include <vector>

#include "sluice/core/token.hpp"
#include "sluice/io/tokenizer.hpp"

namespace duplex_text {

/// The text of one dialogue round, the source left out, as group position encoding arranges it
/// (arXiv 2505.16983): header and instruction begin the source, the end of the user's turn ends it,
/// the assistant's header begins the target.
struct Turns {
  std::string prompt_text;             ///< to be shown
  std::vector<sluice::Token> prompt;   ///< the first source unit; may be empty
  std::vector<sluice::Token> closing;  ///< the last source unit; may be empty
  std::vector<sluice::Token> opening;  ///< of the target; never empty
};

/// In the model's chat template if there are both a prompt and a template; else the prompt's text
/// behind the begin token, and a target that opens with the begin token (or the end token, or a
/// line feed).
/// \throws sluice::Error(kUnsupported) for a template that leaves messages out, and what templates
/// and tokenisers throw.
Turns make_turns(const sluice::Tokenizer& tokenizer, const std::string& prompt);

}  // namespace duplex_text
