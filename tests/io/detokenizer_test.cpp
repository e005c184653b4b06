// SPDX-License-Identifier: MIT
/// Streaming detokenisation against whole decoding, and against the replacement rule of the Unicode
/// standard worked out by hand.
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "sluice/io/detokenizer.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "sluice/io/tokenizer.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::string_view kReplaced = "\xEF\xBF\xBD";

// One token per byte, then special ones.
Tokenizer byte_tokenizer(bool drop_leading_space = false) {
  TokenizerSpec spec;
  spec.drop_leading_space = drop_leading_space;
  for (unsigned byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    spec.pieces.push_back({'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'});
    spec.types.push_back(TokenType::kByte);
  }
  spec.pieces.push_back("<end>");
  spec.types.push_back(TokenType::kControl);
  spec.pieces.push_back(" word");
  spec.types.push_back(TokenType::kNormal);
  return Tokenizer(std::move(spec));
}
constexpr Token kEnd = 256;
constexpr Token kWord = 257;

std::string replaced(std::string_view bytes) {
  static const Tokenizer tokenizer = byte_tokenizer();
  StreamingDetokenizer stream(tokenizer);
  std::string text;
  for (const char byte : bytes) stream.push(static_cast<unsigned char>(byte), text);
  stream.finish(text);
  return text;
}

TEST(Detokenizer, HoldsBackIncompleteCharacters) {
  const Tokenizer tokenizer = byte_tokenizer();
  StreamingDetokenizer stream(tokenizer);
  EXPECT_EQ(stream.push('a'), "a");
  EXPECT_EQ(stream.push(0xF0), "");  // U+1F600 byte by byte
  EXPECT_EQ(stream.push(0x9F), "");
  EXPECT_EQ(stream.push(0x98), "");
  EXPECT_EQ(stream.held_back(), 3U);
  EXPECT_EQ(stream.push(0x80), "\xF0\x9F\x98\x80");
  EXPECT_EQ(stream.held_back(), 0U);
  EXPECT_EQ(stream.push(0xC3), "");
  EXPECT_EQ(stream.push(0xA9), "\xC3\xA9");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.finish(), kReplaced);
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push('b'), "b");
}

TEST(Detokenizer, ReplacesMaximalParts) {
  const std::string r(kReplaced);
  // The table of the Unicode standard (3.9, U+FFFD substitution of maximal subparts) and the rows
  // that Python's bytes.decode("utf-8", "replace") gives.
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
      {"\x80", r},
      {"\xC3(", r + "("},
      {"\xE2\x82", r},
      {"\xE2\x82\xC3\xA9", r + "\xC3\xA9"},
      {"\xF0\x9F\x98\xF0\x9F\x98\x80", r + "\xF0\x9F\x98\x80"},
      {"\xF5\x80", r + r},
  };
  for (const auto& [bytes, text] : cases) EXPECT_EQ(replaced(bytes), text);
}

TEST(Detokenizer, SpecialTokens) {
  const Tokenizer tokenizer = byte_tokenizer();
  StreamingDetokenizer skips(tokenizer);
  EXPECT_EQ(skips.push(kEnd), "");
  EXPECT_EQ(skips.push(0xC3), "");
  EXPECT_EQ(skips.push(kEnd), "");
  EXPECT_EQ(skips.push(0xA9), "\xC3\xA9");  // the character goes on behind it
  StreamingDetokenizer shows(tokenizer, {.skip_special = false});
  EXPECT_EQ(shows.push(kEnd), "<end>");
  EXPECT_EQ(shows.push(0xC3), "");
  EXPECT_EQ(shows.push(kEnd), std::string(kReplaced) + "<end>");
  EXPECT_EQ(shows.push(-1), "");
  EXPECT_EQ(shows.push(1'000'000), "");
}

TEST(Detokenizer, LeadingSpace) {
  const Tokenizer tokenizer = byte_tokenizer(true);
  StreamingDetokenizer at_start(tokenizer);
  EXPECT_EQ(at_start.push(kEnd), "");  // gives no text: the start is still to come
  EXPECT_EQ(at_start.push(kWord), "word");
  EXPECT_EQ(at_start.push(kWord), " word");
  StreamingDetokenizer continued(tokenizer, {.starts_text = false});
  EXPECT_EQ(continued.push(kWord), " word");
  StreamingDetokenizer after_letter(tokenizer);
  EXPECT_EQ(after_letter.push('x'), "x");
  EXPECT_EQ(after_letter.push(kWord), " word");
  StreamingDetokenizer one_space(tokenizer);
  EXPECT_EQ(one_space.push(' '), "");
  EXPECT_EQ(one_space.push(' '), " ");
  const Tokenizer keeps = byte_tokenizer(false);
  StreamingDetokenizer kept(keeps);
  EXPECT_EQ(kept.push(kWord), " word");
}

TEST(Detokenizer, StreamIsDecode) {
  Random random(5);
  for (const char* name : {"llama2", "gemma", "gpt2", "metaspace"}) {
    const Tokenizer tokenizer =
        load_tokenizer(std::string(SLUICE_TEST_DATA) + "/tokenizers/" + name + ".json");
    for (int round = 0; round < 200; ++round) {
      std::vector<Token> tokens;  // any tokens: half characters, byte tokens, special ones
      for (std::size_t i = random.below(40); i > 0; --i)
        tokens.push_back(static_cast<Token>(random.below(tokenizer.vocab_size())));
      for (const bool skip : {false, true}) {
        StreamingDetokenizer stream(tokenizer, {.skip_special = skip});
        std::string text;
        for (const Token token : tokens) {
          const std::string piece = stream.push(token);
          EXPECT_EQ(detail::find_invalid_utf8(piece), std::string::npos);
          EXPECT_LE(stream.held_back(), 3U);
          text += piece;
        }
        text += stream.finish();
        EXPECT_EQ(text, tokenizer.decode(tokens, {.skip_special = skip}));
      }
    }
  }
}

TEST(Detokenizer, ACopyContinues) {
  const Tokenizer tokenizer = byte_tokenizer(true);
  StreamingDetokenizer stream(tokenizer);
  stream.push(0xE2);
  StreamingDetokenizer copy = stream;
  for (StreamingDetokenizer* each : {&stream, &copy}) {
    EXPECT_EQ(each->push(0x82), "");
    EXPECT_EQ(each->push(0xAC), "\xE2\x82\xAC");
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
