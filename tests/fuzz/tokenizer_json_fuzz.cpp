// SPDX-License-Identifier: MIT
/// Any bytes as a tokenizer.json, and again as its tokenizer_config.json: what loads, encodes and
/// decodes some text and the last line of the input.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "fuzz/fuzz_target.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "sluice/io/tokenizer.hpp"

namespace {

void encode_and_decode(const sluice::Tokenizer& tokenizer, std::string_view text) {
  for (const bool special : {false, true}) {
    try {
      const std::vector<sluice::Token> tokens =
          tokenizer.encode(text, {.add_special = special, .parse_special = special});
      for (const sluice::Token token : tokens)
        if (token < 0 || static_cast<std::size_t>(token) >= tokenizer.vocab_size())
          throw std::logic_error("a token outside the vocabulary");
      if (sluice::detail::find_invalid_utf8(tokenizer.decode(tokens)) != std::string_view::npos)
        throw std::logic_error("decoded text is not UTF-8");
    } catch (const sluice::Error&) {  // not UTF-8, or a pattern beyond its limits
    }
  }
}

}  // namespace

extern "C" const char* sluice_fuzz_seeds() {
  return "tokenizers/seeds";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const sluice::Json file = sluice::parse_json(text, "input");
    const sluice::Tokenizer tokenizer(
        sluice::tokenizer_spec_from_json(file, &file, "input", "input"));
    encode_and_decode(tokenizer, "the the 1-2 <s>\xC3\xA9\n</s> x");
    encode_and_decode(tokenizer, text.substr(text.rfind('\n') + 1).substr(0, 4096));
  } catch (const sluice::Error&) {
  }
  return 0;
}
