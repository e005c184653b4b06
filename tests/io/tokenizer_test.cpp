// SPDX-License-Identifier: MIT
/// Tokenisers against recordings of Hugging Face tokenizers and SentencePiece
/// (tests/oracle/make_tokenizer_goldens.py), against a merging loop without a heap, and against
/// damaged files.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "sluice/core/random.hpp"
#include "sluice/io/gguf_writer.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "sluice/io/tokenizer.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;
using test::loads_or_throws;

std::string data_path(const std::string& name) {
  return std::string(SLUICE_TEST_DATA) + "/tokenizers/" + name;
}

const Json& goldens() {
  static const Json file = read_json_file(data_path("goldens.json"));
  return file;
}

Json tokenizer_json(const std::string& name) {
  return read_json_file(data_path(name + ".json"));
}

Tokenizer from_json(const Json& file, const Json* config = nullptr) {
  return Tokenizer(
      tokenizer_spec_from_json(file, config, "tokenizer.json", "tokenizer_config.json"));
}

const Json& golden(const std::string& name) {
  for (const Json& entry : goldens().at("cases"))
    if (entry.at("name") == name) return entry;
  throw std::out_of_range(name);
}

// --- against the reference implementations -------------------------------------------------------

TEST(TokenizerGoldens, EncodesAndDecodesAsHuggingFace) {
  std::size_t compared = 0;
  for (const Json& entry : goldens().at("cases")) {
    const std::string name = entry.at("name");
    SCOPED_TRACE(name);
    Json file = tokenizer_json(entry.at("file"));
    file.merge_patch(entry.at("patch"));
    const Tokenizer tokenizer = from_json(file);
    const Json& strings = goldens().at(entry.at("strings").get<std::string>());
    ASSERT_EQ(strings.size(), entry.at("ids").size());
    for (std::size_t i = 0; i < strings.size(); ++i) {
      const std::string text = strings[i];
      SCOPED_TRACE(Json(text).dump());
      const std::vector<Token> ids = tokenizer.encode(text, {.parse_special = true});
      EXPECT_EQ(ids, entry.at("ids")[i].get<std::vector<Token>>());
      EXPECT_EQ(tokenizer.encode(text, {.add_special = false}),
                entry.at("plain_ids")[i].get<std::vector<Token>>());
      // Hugging Face's Metaspace decoder drops every space of the first piece, not just the one
      // that encoding added.
      const bool loses_spaces = entry.at("file") == "metaspace" && text.starts_with(' ');
      if (!loses_spaces) {
        EXPECT_EQ(tokenizer.decode(ids, {.skip_special = true}),
                  entry.at("decoded")[i].get<std::string>());
      }
      ++compared;
    }
  }
  EXPECT_GE(compared, 8 * 60 + 40 * 15);  // neither the cases nor the strings have gone missing
}

struct SentencePieceFile {
  Json file = read_json_file(data_path("sentencepiece.json"));

  void expect_same(const Tokenizer& tokenizer) const {
    for (std::size_t i = 0; i < file.at("strings").size(); ++i) {
      const std::string text = file.at("strings")[i];
      SCOPED_TRACE(Json(text).dump());
      const std::vector<Token> ids = tokenizer.encode(text, {.add_special = false});
      EXPECT_EQ(ids, file.at("ids")[i].get<std::vector<Token>>());
      EXPECT_EQ(tokenizer.decode(ids), file.at("decoded")[i].get<std::string>());
    }
  }
};

TEST(TokenizerGoldens, EncodesAsSentencePiece) {
  const SentencePieceFile golden;
  TokenizerSpec spec;
  spec.pieces = golden.file.at("pieces").get<std::vector<std::string>>();
  spec.scores = golden.file.at("scores").get<std::vector<float>>();
  for (const int type : golden.file.at("types")) spec.types.push_back(static_cast<TokenType>(type));
  spec.model = TokenizerSpec::Model::kScoredMerges;
  spec.byte_fallback = true;
  spec.unknown = golden.file.at("unknown").get<Token>();
  spec.space_mark = "▁";
  spec.drop_leading_space = true;
  spec.normalizer = {
      {.kind = NormalizerStep::Kind::kPrepend, .content = " "},
      {.kind = NormalizerStep::Kind::kReplace, .pattern = " ", .content = spec.space_mark}};
  golden.expect_same(Tokenizer(std::move(spec)));
}

TEST(TokenizerGoldens, EncodesAsSentencePieceFromGguf) {
  const SentencePieceFile golden;
  GgufWriter writer;
  writer.add("tokenizer.ggml.model", "llama");
  writer.add_array("tokenizer.ggml.tokens",
                   golden.file.at("pieces").get<std::vector<std::string>>());
  writer.add_array("tokenizer.ggml.scores", golden.file.at("scores").get<std::vector<float>>());
  writer.add_array("tokenizer.ggml.token_type",
                   golden.file.at("types").get<std::vector<std::int32_t>>());
  for (const char* name : {"bos", "eos", "unknown"})
    writer.add("tokenizer.ggml." + std::string(name) + "_token_id",
               golden.file.at(name).get<std::uint32_t>());
  const auto bytes = writer.bytes();
  const Tokenizer tokenizer(tokenizer_spec_from_gguf(GgufFile::from_bytes(bytes, "sample.gguf")));
  golden.expect_same(tokenizer);
  EXPECT_EQ(tokenizer.encode("a").front(), golden.file.at("bos").get<Token>());
  EXPECT_TRUE(tokenizer.adds_bos());
  ASSERT_EQ(tokenizer.end_tokens().size(), 1U);
  EXPECT_EQ(tokenizer.end_tokens()[0], *tokenizer.eos());
}

// The metadata that a converter would write for a byte-level tokenizer.json.
GgufWriter byte_level_metadata(const Json& file, const std::string& pre) {
  std::map<Token, std::string> pieces;
  for (const auto& [piece, token] : file.at("model").at("vocab").items()) pieces[token] = piece;
  std::map<Token, std::int32_t> types;
  for (const Json& added : file.at("added_tokens")) {
    pieces[added.at("id")] = added.at("content");
    types[added.at("id")] = added.at("special").get<bool>() ? 3 : 4;
  }
  std::vector<std::string> tokens(static_cast<std::size_t>(pieces.rbegin()->first) + 1);
  std::vector<std::int32_t> kinds(tokens.size(), 1);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const auto at = static_cast<Token>(i);
    tokens[i] = pieces.contains(at) ? pieces[at] : "[PAD" + std::to_string(i) + "]";
    kinds[i] = !pieces.contains(at) ? 5 : types.contains(at) ? types[at] : 1;
  }
  std::vector<std::string> merges;
  for (const Json& merge : file.at("model").at("merges"))
    merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  GgufWriter writer;
  writer.add("tokenizer.ggml.model", "gpt2");
  writer.add("tokenizer.ggml.pre", pre);
  writer.add_array("tokenizer.ggml.tokens", tokens);
  writer.add_array("tokenizer.ggml.token_type", kinds);
  writer.add_array("tokenizer.ggml.merges", merges);
  return writer;
}

TEST(TokenizerGoldens, GgufMetadataGivesTheSameAsTokenizerJson) {
  for (const auto& [name, pre] : std::vector<std::pair<std::string, std::string>>{
           {"gpt2", "gpt-2"}, {"llama3", "llama-bpe"}, {"qwen2", "qwen2"}, {"smollm2", "smollm"}}) {
    SCOPED_TRACE(name);
    const auto bytes = byte_level_metadata(tokenizer_json(name), pre).bytes();
    const Tokenizer tokenizer(tokenizer_spec_from_gguf(GgufFile::from_bytes(bytes, "sample.gguf")));
    for (std::size_t i = 0; i < goldens().at("long").size(); ++i) {
      const std::string text = goldens().at("long")[i];
      SCOPED_TRACE(Json(text).dump());
      EXPECT_EQ(tokenizer.encode(text, {.add_special = false}),
                golden(name).at("plain_ids")[i].get<std::vector<Token>>());
    }
  }
}

TEST(TokenizerGoldens, GgufWithoutPreTokeniserSplitsAsLlamaCpp) {
  // llama.cpp's rule: punctuation alone, GPT-2's pattern, then digits by three. The words are those
  // that its regular expressions, applied by hand, give; every byte is a token, so that the words
  // show in which merges apply.
  TokenizerSpec spec = tokenizer_spec_from_json(tokenizer_json("gpt2"), nullptr, "a", "b");
  const auto bytes = byte_level_metadata(tokenizer_json("gpt2"), "default").bytes();
  const TokenizerSpec gguf = tokenizer_spec_from_gguf(GgufFile::from_bytes(bytes, "sample.gguf"));
  spec.pre_tokenizer.clear();
  spec.pieces.clear();
  spec.merges.clear();
  spec.added.clear();
  spec.types.clear();
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char character = static_cast<char>(byte);
    spec.pieces.push_back(detail::spell_bytes({&character, 1}));
  }
  const auto add = [&](const std::string& left, const std::string& right) {
    spec.merges.emplace_back(left, right);
    spec.pieces.push_back(left + right);
  };
  add("1", "2");
  add("12", "3");
  add("123", "4");  // never: digits come by three
  add("a", ".");    // never: punctuation is alone
  add("Ġ", "a");
  spec.pre_tokenizer = gguf.pre_tokenizer;
  const Tokenizer tokenizer(std::move(spec));
  std::vector<std::string> pieces;
  for (const Token token : tokenizer.encode(" a. 12345"))
    pieces.emplace_back(tokenizer.bytes(token));
  EXPECT_EQ(pieces, (std::vector<std::string>{" a", ".", " ", "123", "4", "5"}));
}

std::optional<std::string> model_path() {
  std::string path;
  if (const char* const given = std::getenv("SLUICE_MODEL")) {
    path = given;
  } else {
    const char* const cache = std::getenv("XDG_CACHE_HOME");
    const char* const home = std::getenv("HOME");
    path = (cache != nullptr ? std::string(cache)
                             : std::string(home != nullptr ? home : "") + "/.cache") +
           "/sluice/SmolLM2-135M-Instruct.Q4_1.gguf";
  }
  if (!std::filesystem::exists(path)) return std::nullopt;
  return path;
}

TEST(TokenizerGoldens, EncodesAsSmolLM2) {
  const auto path = model_path();
  if (!path) GTEST_SKIP() << "the model file is not there (SLUICE_MODEL or the user's cache)";
  const Tokenizer tokenizer = load_tokenizer(*path);
  const Json file = read_json_file(data_path("smollm2_goldens.json"));
  for (std::size_t i = 0; i < file.at("strings").size(); ++i) {
    const std::string text = file.at("strings")[i];
    SCOPED_TRACE(Json(text).dump());
    const std::vector<Token> ids = tokenizer.encode(text, {.parse_special = true});
    EXPECT_EQ(ids, file.at("ids")[i].get<std::vector<Token>>());
    EXPECT_EQ(tokenizer.encode(text), file.at("plain_ids")[i].get<std::vector<Token>>());
    EXPECT_EQ(tokenizer.decode(ids, {.skip_special = true}),
              file.at("decoded")[i].get<std::string>());
  }
  EXPECT_EQ(tokenizer.vocab_size(), 49152U);
  EXPECT_FALSE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.find("<|im_end|>"), 2);
  EXPECT_EQ(std::vector<Token>(tokenizer.end_tokens().begin(), tokenizer.end_tokens().end()),
            (std::vector<Token>{0, 2}));
  EXPECT_FALSE(tokenizer.chat_template().empty());
}

// --- properties ----------------------------------------------------------------------------------

std::string random_text(Random& random, std::size_t length) {
  static const std::vector<std::pair<char32_t, char32_t>> ranges = {
      {0x20, 0x7E},       {0x61, 0x7A},     {0x61, 0x63},       {0x09, 0x0D},
      {0x20, 0x20},       {0x30, 0x39},     {0xA0, 0x24F},      {0x300, 0x36F},
      {0x400, 0x4FF},     {0x4E00, 0x4FFF}, {0x2000, 0x206F},   {0xFB00, 0xFDFF},
      {0x1F600, 0x1F64F}, {0xE000, 0xFFFD}, {0x10000, 0x10FFFF}};
  std::string text;
  for (std::size_t i = 0; i < length; ++i) {
    const auto [low, high] = ranges[random.below(ranges.size())];
    detail::append_utf8(text, low + static_cast<char32_t>(random.below(high - low + 1)));
  }
  return text;
}

TEST(TokenizerProperty, ByteLevelDecodesWhatItEncodes) {
  Random random(11);
  for (const char* name : {"gpt2", "llama3"}) {
    const Tokenizer tokenizer = from_json(tokenizer_json(name));
    for (int round = 0; round < 300; ++round) {
      const std::string text = random_text(random, random.below(80));
      const std::vector<Token> ids = tokenizer.encode(text, {.add_special = false});
      EXPECT_EQ(tokenizer.decode(ids), text);
      std::string joined;
      for (const Token id : ids) joined += tokenizer.bytes(id);
      EXPECT_EQ(joined, text);
    }
  }
}

TEST(TokenizerProperty, ByteFallbackDecodesWhatItEncodes) {
  Random random(12);
  for (const char* name : {"llama2", "gemma"}) {
    const Tokenizer tokenizer = from_json(tokenizer_json(name));
    for (int round = 0; round < 300; ++round) {
      std::string text = random_text(random, random.below(80));
      detail::replace_all(text, "▁", " ");  // the mark itself becomes a space
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, {.add_special = false})), text);
    }
  }
}

// Merging as it is defined: as long as there is a pair to merge, the best one, the leftmost of
// equals. `cost` gives nothing for a pair that does not merge.
template <class Cost>
std::vector<std::string> merge_plainly(std::vector<std::string> symbols, Cost cost) {
  while (true) {
    std::optional<double> best;
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const std::optional<double> here = cost(symbols[i], symbols[i + 1]);
      if (here && (!best || *here < *best)) {
        best = here;
        at = i;
      }
    }
    if (!best) return symbols;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(TokenizerProperty, RankedMergesAreThePlainLoop) {
  Random random(21);
  for (int round = 0; round < 60; ++round) {
    TokenizerSpec spec;
    spec.pieces = {"a", "b", "c", "é"};
    std::map<std::pair<std::string, std::string>, double> ranks;
    const std::size_t merges = 4 + random.below(40);
    for (std::size_t i = 0; i < merges; ++i) {
      const std::string left = spec.pieces[random.below(spec.pieces.size())];
      const std::string right = spec.pieces[random.below(spec.pieces.size())];
      if (!ranks.try_emplace({left, right}, static_cast<double>(spec.merges.size())).second)
        continue;
      spec.merges.emplace_back(left, right);
      const std::string joined = left + right;  // one piece may come from several merges
      if (std::find(spec.pieces.begin(), spec.pieces.end(), joined) == spec.pieces.end())
        spec.pieces.push_back(joined);
    }
    const Tokenizer tokenizer(spec);
    for (int word = 0; word < 30; ++word) {
      std::vector<std::string> symbols;
      std::string text;
      for (std::size_t i = random.below(60); i > 0; --i) {
        symbols.push_back(spec.pieces[random.below(4)]);
        text += symbols.back();
      }
      const auto expected = merge_plainly(symbols, [&](const auto& left, const auto& right) {
        const auto found = ranks.find({left, right});
        return found == ranks.end() ? std::nullopt : std::optional(found->second);
      });
      std::vector<std::string> found;
      for (const Token token : tokenizer.encode(text)) found.emplace_back(tokenizer.piece(token));
      EXPECT_EQ(found, expected) << text;
    }
  }
}

TEST(TokenizerProperty, ScoredMergesAreThePlainLoop) {
  Random random(22);
  for (int round = 0; round < 60; ++round) {
    TokenizerSpec spec;
    spec.model = TokenizerSpec::Model::kScoredMerges;
    spec.pieces = {"a", "b", "é"};  // "c" has no piece of its own
    for (std::size_t i = 4 + random.below(60); i > 0; --i) {
      std::string piece;
      for (std::size_t length = 2 + random.below(4); length > 0; --length)
        piece += std::vector<std::string>{"a", "b", "é", "c"}[random.below(4)];
      if (std::find(spec.pieces.begin(), spec.pieces.end(), piece) == spec.pieces.end())
        spec.pieces.push_back(piece);
    }
    std::map<std::string, double> costs;
    for (const std::string& piece : spec.pieces) {
      spec.scores.push_back(static_cast<float>(random.below(8)));  // with many ties
      costs[piece] = -static_cast<double>(spec.scores.back());
    }
    spec.pieces.push_back("<unk>");
    spec.scores.push_back(0.0F);
    spec.types.assign(spec.pieces.size(), TokenType::kNormal);
    spec.types.back() = TokenType::kUnknown;
    spec.unknown = static_cast<Token>(spec.pieces.size()) - 1;
    const Tokenizer tokenizer(spec);
    for (int word = 0; word < 30; ++word) {
      std::vector<std::string> symbols;
      std::string text;
      for (std::size_t i = random.below(60); i > 0; --i) {
        symbols.push_back(std::vector<std::string>{"a", "b", "é", "c"}[random.below(4)]);
        text += symbols.back();
      }
      auto expected = merge_plainly(symbols, [&](const auto& left, const auto& right) {
        const auto found = costs.find(left + right);
        return found == costs.end() ? std::nullopt : std::optional(found->second);
      });
      for (std::string& piece : expected)
        if (piece == "c") piece = "<unk>";
      std::vector<std::string> found;
      for (const Token token : tokenizer.encode(text)) found.emplace_back(tokenizer.piece(token));
      EXPECT_EQ(found, expected) << text;
    }
  }
}

TEST(TokenizerProperty, LongWordsTakeNoQuadraticTime) {
  // 400,000 characters without a word boundary. With a quadratic loop this is 1e11 steps, an hour;
  // the heap takes well below a second, and the bound leaves room for sanitizers and busy machines.
  std::string word;
  for (int i = 0; i < 100'000; ++i) word += i % 3 == 0 ? "thew" : "heel";
  for (const char* name : {"gpt2", "llama2"}) {
    const Tokenizer tokenizer = from_json(tokenizer_json(name));
    const auto start = std::chrono::steady_clock::now();
    const std::vector<Token> ids = tokenizer.encode(word, {.add_special = false});
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30)) << name;
    EXPECT_EQ(tokenizer.decode(ids), word);
  }
}

TEST(TokenizerProperty, ThreadsShareOne) {
  const Tokenizer tokenizer = from_json(tokenizer_json("llama3"));
  std::vector<std::vector<std::vector<Token>>> results(4);
  {
    std::vector<std::jthread> threads;
    for (auto& result : results)
      threads.emplace_back([&] {
        for (const Json& text : goldens().at("long"))
          result.push_back(tokenizer.encode(text.get<std::string>(), {.parse_special = true}));
      });
  }
  for (const auto& result : results)
    EXPECT_EQ(result, golden("llama3").at("ids").get<std::vector<std::vector<Token>>>());
}

TEST(TokenizerProperty, MovingKeepsViews) {
  Tokenizer tokenizer = from_json(tokenizer_json("gpt2"));
  const std::vector<Token> ids = tokenizer.encode("the river");
  const std::string_view view = tokenizer.bytes(ids[0]);
  const Tokenizer moved = std::move(tokenizer);
  EXPECT_EQ(moved.bytes(ids[0]).data(), view.data());
  EXPECT_EQ(moved.encode("the river"), ids);
}

// --- the interface
// ---------------------------------------------------------------------------------

TEST(Tokenizer, TellsAboutTokens) {
  const Tokenizer tokenizer = from_json(tokenizer_json("qwen2"));
  const Token end = *tokenizer.find("<|im_end|>");
  EXPECT_TRUE(tokenizer.is_special(end));
  EXPECT_EQ(tokenizer.bytes(end), "<|im_end|>");
  EXPECT_EQ(tokenizer.piece(end), "<|im_end|>");
  EXPECT_FALSE(tokenizer.is_special(*tokenizer.find("<think>")));
  EXPECT_EQ(tokenizer.bytes(*tokenizer.find("Ġthe")), " the");
  EXPECT_FALSE(tokenizer.find("no such piece"));
  EXPECT_EQ(tokenizer.end_tokens().size(), 2U);  // <|endoftext|>, <|im_end|>
  EXPECT_GE(tokenizer.max_bytes(), std::string_view("<|endoftext|>").size());
  for (const Token outside : {-1, static_cast<Token>(tokenizer.vocab_size()), 1'000'000}) {
    EXPECT_EQ(tokenizer.bytes(outside), "");
    EXPECT_EQ(tokenizer.piece(outside), "");
    EXPECT_FALSE(tokenizer.is_special(outside));
    EXPECT_EQ(tokenizer.decode(std::vector<Token>{outside}), "");
  }
}

TEST(Tokenizer, SpecialTokensInTextAreTextUnlessAskedFor) {
  const Tokenizer tokenizer = from_json(tokenizer_json("qwen2"));
  const Token end = *tokenizer.find("<|im_end|>");
  const auto has = [&](const std::vector<Token>& ids) {
    return std::find(ids.begin(), ids.end(), end) != ids.end();
  };
  EXPECT_FALSE(has(tokenizer.encode("a<|im_end|>")));
  EXPECT_TRUE(has(tokenizer.encode("a<|im_end|>", {.parse_special = true})));
  const std::vector<Token> ids = tokenizer.encode("a<|im_end|>b", {.parse_special = true});
  EXPECT_EQ(tokenizer.decode(ids), "a<|im_end|>b");
  EXPECT_EQ(tokenizer.decode(ids, {.skip_special = true}), "ab");
}

TEST(Tokenizer, ByteTokensAreBytes) {
  const Tokenizer tokenizer = from_json(tokenizer_json("llama2"));
  EXPECT_EQ(tokenizer.bytes(*tokenizer.find("<0x0A>")), "\n");
  EXPECT_EQ(tokenizer.bytes(*tokenizer.find("<0xFF>")), "\xFF");
  EXPECT_EQ(tokenizer.bytes(*tokenizer.find("▁the")), " the");
  // Bytes that are no character: one U+FFFD per maximal part, as Python's "replace" has it.
  const std::vector<Token> ids = {*tokenizer.find("<0xE2>"), *tokenizer.find("<0x82>"),
                                  *tokenizer.find("<0x41>"), *tokenizer.find("<0xFF>")};
  EXPECT_EQ(tokenizer.decode(ids),
            "\xEF\xBF\xBD"
            "A"
            "\xEF\xBF\xBD");
}

TEST(Tokenizer, InvalidUtf8NamesTheByte) {
  const Tokenizer tokenizer = from_json(tokenizer_json("gpt2"));
  const std::vector<std::pair<std::string, std::size_t>> texts = {
      {"\x80", 0},               // a continuation alone
      {"ab\xC3", 2},             // cut short
      {"ab\xC3(", 2},            // another byte instead
      {"\xC0\x80", 0},           // overlong
      {"x\xE0\x80\x80", 1},      // overlong
      {"\xED\xA0\x80", 0},       // a surrogate
      {"é\xF4\x90\x80\x80", 2},  // beyond U+10FFFF
      {"ok \xF0\x9F\x98", 3},    // an emoji cut short
      {"\xFF", 0},
      {std::string("a\0b\xFE", 4), 3}};
  for (const auto& [text, offset] : texts)
    expect_error(ErrorCode::kText, {"(byte " + std::to_string(offset) + ")", "UTF-8"},
                 [&, &bytes = text] { tokenizer.encode(bytes); });
}

TEST(Tokenizer, ConfigurationBesideTheFile) {
  Json config = {{"bos_token", {{"content", "<s>"}}},
                 {"eos_token", "</s>"},
                 {"add_eos_token", true},
                 {"chat_template", "{{ messages }}"}};
  const Json file = tokenizer_json("llama2");
  const Tokenizer tokenizer = from_json(file, &config);
  EXPECT_EQ(tokenizer.bos(), 1);
  EXPECT_EQ(tokenizer.eos(), 2);
  EXPECT_EQ(tokenizer.chat_template(), "{{ messages }}");
  std::vector<Token> ids = tokenizer.encode("a");
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);

  config["add_bos_token"] = false;
  config["add_eos_token"] = nullptr;
  config["chat_template"] = Json::array({{{"name", "tool_use"}, {"template", "tools"}},
                                         {{"name", "default"}, {"template", "plain"}}});
  const Tokenizer without = from_json(file, &config);
  EXPECT_FALSE(without.adds_bos());
  EXPECT_EQ(without.chat_template(), "plain");
  ids = without.encode("a");
  EXPECT_NE(ids.front(), 1);
  EXPECT_NE(ids.back(), 2);

  // Without it: the begin token is what the template puts in front.
  EXPECT_EQ(from_json(file).bos(), 1);
  EXPECT_FALSE(from_json(file).eos());

  config["bos_token"] = "<nowhere>";
  expect_error(ErrorCode::kFormat, {"tokenizer_config.json", "bos_token", "<nowhere>"},
               [&] { from_json(file, &config); });
}

TEST(Tokenizer, LoadsFoldersAndFiles) {
  const test::TempFolder folder;
  std::filesystem::copy_file(data_path("llama2.json"), folder.path("tokenizer.json"));
  EXPECT_EQ(load_tokenizer(folder.path()).encode("a"),
            load_tokenizer(folder.path("tokenizer.json")).encode("a"));
  EXPECT_EQ(load_tokenizer(folder.path()).chat_template(), "");
  folder.write("tokenizer_config.json", R"({"eos_token": "</s>", "chat_template": "old"})");
  EXPECT_EQ(load_tokenizer(folder.path()).eos(), 2);
  EXPECT_EQ(load_tokenizer(folder.path()).chat_template(), "old");
  folder.write("chat_template.jinja", "new");
  EXPECT_EQ(load_tokenizer(folder.path()).chat_template(), "new");
  EXPECT_EQ(test::expected_error([&] { load_tokenizer(folder.path("missing.json")); })->code(),
            ErrorCode::kIo);
  folder.write("tokenizer_config.json", R"({"eos_token": )");
  expect_error(ErrorCode::kFormat, {"tokenizer_config.json", "byte"},
               [&] { load_tokenizer(folder.path()); });
}

// --- damaged files
// ---------------------------------------------------------------------------------

std::string file_text(const std::string& name) {
  const test::Bytes bytes = test::read_bytes(data_path(name));
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Loading ends well or with an Error that names file, field, expected and found; what loads, works.
void load_and_use(const std::string& text) {
  const test::Bytes copy = test::exact_copy(std::as_bytes(std::span(text)));
  const std::string_view view(reinterpret_cast<const char*>(copy.data()), copy.size());
  std::optional<Tokenizer> tokenizer;
  loads_or_throws([&] { tokenizer.emplace(from_json(parse_json(view, "tokenizer.json"))); });
  if (!tokenizer) return;
  loads_or_throws([&] {
    tokenizer->decode(tokenizer->encode("the river 12 é😀 <s><|im_end|>", {.parse_special = true}));
  });
}

TEST(TokenizerDamage, TruncatedAnywhere) {
  for (const char* name : {"llama2.json", "qwen2.json"}) {
    const std::string text = file_text(name);
    for (std::size_t size = 0; size < text.size(); size += size < 300 ? 1 : 97)
      EXPECT_FALSE(loads_or_throws([&] {
        from_json(parse_json(std::string_view(text).substr(0, size), "tokenizer.json"));
      })) << size;
  }
}

TEST(TokenizerDamage, EveryFieldOfEveryWrongType) {
  const std::vector<Json> values = {nullptr,
                                    true,
                                    -1,
                                    7,
                                    1e300,
                                    "text",
                                    "",
                                    "\xC3\xA9",
                                    Json::array(),
                                    Json::object(),
                                    Json::array({1}),
                                    {{"type", "Nonsense"}},
                                    4294967296,
                                    9007199254740993};
  for (const char* name : {"llama3.json", "gemma.json", "mistral.json"}) {
    const Json file = read_json_file(data_path(name));
    const Json flat = file.flatten();
    std::set<std::string> done;
    std::size_t turn = 0;
    for (const auto& [pointer, ignored] : flat.items()) {
      // The vocabulary and the merges have hundreds of members alike: some of them.
      const bool is_table =
          pointer.starts_with("/model/vocab/") || pointer.starts_with("/model/merges/");
      if (is_table && turn++ % 101 != 0) continue;
      for (Json::json_pointer at(pointer); !at.empty(); at.pop_back()) {
        if (!done.insert(at.to_string()).second) break;  // so were its parents
        for (std::size_t i = 0; i < 5; ++i) {
          Json damaged = file;
          damaged[at] = values[turn++ % values.size()];
          load_and_use(damaged.dump());
        }
        Json damaged = file;
        if (damaged[at.parent_pointer()].is_object()) {
          damaged[at.parent_pointer()].erase(at.back());
          load_and_use(damaged.dump());
        }
      }
    }
  }
}

TEST(TokenizerDamage, BytesFlipped) {
  Random random(31);
  for (const char* name : {"smollm2.json", "metaspace.json"}) {
    const std::string text = file_text(name);
    for (int round = 0; round < 400; ++round) {
      std::string damaged = text;
      for (std::size_t flips = 1 + random.below(3); flips > 0; --flips)
        damaged[random.below(damaged.size())] = static_cast<char>(random.below(256));
      load_and_use(damaged);
    }
  }
}

TEST(TokenizerDamage, ErrorsNameTheField) {
  struct Case {
    std::string base;
    Json patch;
    ErrorCode code;
    std::vector<std::string> parts;
  };
  const auto pre = [](Json step) {
    return Json{{"pre_tokenizer", std::move(step)}};
  };
  const auto normal = [](Json step) {
    step["normalizers"] = nullptr;
    return Json{{"normalizer", std::move(step)}};
  };
  const std::vector<Case> cases = {
      {"llama2",
       {{"model", {{"type", "Unigram"}}}},
       ErrorCode::kUnsupported,
       {"model.type", "Unigram", "BPE"}},
      {"llama2", {{"model", {{"vocab", nullptr}}}}, ErrorCode::kFormat, {"model.vocab"}},
      {"llama2",
       {{"model", {{"vocab", {{"▁x", "one"}}}}}},
       ErrorCode::kFormat,
       {"model.vocab", "token number", "one"}},
      {"llama2",
       {{"model", {{"vocab", {{"▁x", 2000000000}}}}}},
       ErrorCode::kFormat,
       {"model.vocab", "below", "2000000000"}},
      {"llama2",
       {{"model", {{"vocab", {{"▁x", 5}}}}}},
       ErrorCode::kFormat,
       {"model.vocab", "one text for token 5"}},
      {"llama2",
       {{"model", {{"merges", {"a b c"}}}}},
       ErrorCode::kFormat,
       {"model.merges[0]", "a b c"}},
      {"llama2",
       {{"model", {{"merges", {"▁ t", Json::array({"▁", 3})}}}}},
       ErrorCode::kFormat,
       {"model.merges[1]"}},
      {"llama2",
       {{"model", {{"merges", Json::array({Json::array({"▁", "nope"})})}}}},
       ErrorCode::kFormat,
       {"merges[0]", "'nope'"}},
      {"llama2",
       {{"model", {{"unk_token", "<nope>"}}}},
       ErrorCode::kFormat,
       {"model.unk_token", "<nope>"}},
      {"llama2", {{"model", {{"dropout", 0.5}}}}, ErrorCode::kUnsupported, {"dropout", "0.5"}},
      {"llama2",
       {{"model", {{"end_of_word_suffix", "</w>"}}}},
       ErrorCode::kUnsupported,
       {"end_of_word_suffix"}},
      {"llama2",
       {{"model", {{"byte_fallback", "yes"}}}},
       ErrorCode::kFormat,
       {"model.byte_fallback", "true or false", "yes"}},
      {"llama2",
       {{"added_tokens", {{{"id", 1}, {"content", "</s>"}}}}},
       ErrorCode::kFormat,
       {"added_tokens[0].id"}},
      {"llama2",
       {{"added_tokens", {{{"id", 1}}}}},
       ErrorCode::kFormat,
       {"added_tokens[0].content"}},
      {"llama2",
       {{"added_tokens", {{{"id", -1}, {"content", "x"}}}}},
       ErrorCode::kFormat,
       {"added_tokens[0].id", "-1"}},
      {"llama2",
       normal({{"type", "Precompiled"}}),
       ErrorCode::kUnsupported,
       {"normalizer.type", "Precompiled"}},
      {"llama2",
       normal({{"type", "Replace"}, {"content", "x"}}),
       ErrorCode::kFormat,
       {"normalizer.pattern"}},
      {"llama2",
       pre({{"type", "BertPreTokenizer"}}),
       ErrorCode::kUnsupported,
       {"pre_tokenizer.type", "BertPreTokenizer"}},
      {"llama2",
       pre({{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}}),
       ErrorCode::kUnsupported,
       {"'('"}},
      {"llama2",
       pre({{"type", "Split"}, {"pattern", {{"Regex", "[a-z&&[^b]]"}}}, {"behavior", "Isolated"}}),
       ErrorCode::kUnsupported,
       {"an intersection of sets"}},
      {"llama2",
       pre({{"type", "Split"}, {"pattern", {{"Regex", "\\w+"}}}, {"behavior", "Isolated"}}),
       ErrorCode::kUnsupported,
       {"\\w"}},
      {"llama2",
       pre({{"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Sideways"}}),
       ErrorCode::kFormat,
       {"pre_tokenizer.behavior", "Sideways"}},
      {"llama2",
       pre({{"type", "Sequence"},
            {"pretokenizers", {{{"type", "ByteLevel"}}, {{"type", "Digits"}}}}}),
       ErrorCode::kUnsupported,
       {"pre_tokenizer.pretokenizers[1].type"}},
      {"llama2",
       pre({{"type", "Metaspace"}, {"prepend_scheme", "sometimes"}}),
       ErrorCode::kFormat,
       {"prepend_scheme", "sometimes"}},
      {"llama2",
       {{"decoder", {{"type", "WordPiece"}}}},
       ErrorCode::kUnsupported,
       {"decoder.type", "WordPiece"}},
      {"llama2",
       {{"decoder", {{"type", "Strip"}, {"content", " "}, {"start", 3}, {"stop", 0}}}},
       ErrorCode::kUnsupported,
       {"decoder"}},
      {"llama2",
       {{"post_processor", {{"type", "BertProcessing"}}}},
       ErrorCode::kUnsupported,
       {"post_processor.type"}},
      {"llama2",
       {{"post_processor", {{"special_tokens", {{"<s>", {{"ids", {99999}}}}}}}}},
       ErrorCode::kFormat,
       {"post_processor.special_tokens.<s>.ids[0]", "99999"}},
      {"llama2",
       {{"post_processor", {{"special_tokens", nullptr}}}},
       ErrorCode::kFormat,
       {"post_processor.special_tokens"}},
  };
  for (const Case& entry : cases) {
    SCOPED_TRACE(entry.patch.dump());
    Json file = tokenizer_json(entry.base);
    file.merge_patch(entry.patch);
    const auto error = test::expected_error([&] { from_json(file); });
    if (!error) continue;
    EXPECT_EQ(error->code(), entry.code) << error->what();
    EXPECT_EQ(error->detail().where, "tokenizer.json") << error->what();
    EXPECT_FALSE(error->detail().field.empty()) << error->what();
    EXPECT_FALSE(error->detail().expected.empty()) << error->what();
    EXPECT_FALSE(error->detail().found.empty()) << error->what();
    for (const std::string& part : entry.parts)
      EXPECT_NE(std::string(error->what()).find(part), std::string::npos)
          << part << " in " << error->what();
  }
}

TEST(TokenizerDamage, GgufMetadata) {
  const auto load = [](const GgufWriter& writer) {
    const auto bytes = writer.bytes();
    return Tokenizer(tokenizer_spec_from_gguf(GgufFile::from_bytes(bytes, "sample.gguf")));
  };
  const auto start = [](const std::string& model) {
    GgufWriter writer;
    writer.add("tokenizer.ggml.model", model);
    writer.add_array("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b", "ab"});
    return writer;
  };
  expect_error(ErrorCode::kFormat, {"sample.gguf", "tokenizer.ggml.tokens"},
               [&] { load(GgufWriter()); });
  expect_error(ErrorCode::kUnsupported, {"tokenizer.ggml.model", "'t5'"},
               [&] { load(start("t5")); });
  expect_error(ErrorCode::kFormat, {"tokenizer.ggml.scores"}, [&] { load(start("llama")); });
  expect_error(ErrorCode::kFormat, {"tokenizer.ggml.merges"}, [&] { load(start("gpt2")); });
  {
    GgufWriter writer = start("llama");
    writer.add_array("tokenizer.ggml.scores", std::vector<float>{0.0F, 1.0F});
    expect_error(ErrorCode::kFormat, {"scores", "expected 3", "found 2"}, [&] { load(writer); });
  }
  {
    GgufWriter writer = start("llama");
    writer.add_array("tokenizer.ggml.scores",
                     std::vector<float>{0.0F, std::numeric_limits<float>::quiet_NaN(), 1.0F});
    expect_error(ErrorCode::kFormat, {"scores[1]", "NaN"}, [&] { load(writer); });
  }
  const auto byte_level = [&](std::vector<std::string> merges) {
    GgufWriter writer = start("gpt2");
    writer.add_array("tokenizer.ggml.merges", merges);
    return writer;
  };
  EXPECT_EQ(load(byte_level({"a b"})).encode("ab"), std::vector<Token>{2});
  expect_error(ErrorCode::kFormat, {"merges[1]", "'ab'"}, [&] { load(byte_level({"a b", "ab"})); });
  expect_error(ErrorCode::kFormat, {"merges[0]", "'c'"}, [&] { load(byte_level({"a c"})); });
  {
    GgufWriter writer = byte_level({"a b"});
    writer.add("tokenizer.ggml.pre", "mystery");
    expect_error(ErrorCode::kUnsupported, {"tokenizer.ggml.pre", "'mystery'"},
                 [&] { load(writer); });
  }
  {
    GgufWriter writer = byte_level({"a b"});
    writer.add("tokenizer.ggml.eos_token_id", std::uint32_t{3});
    expect_error(ErrorCode::kFormat, {"eos_token_id", "below 3", "found 3"}, [&] { load(writer); });
  }
  {
    GgufWriter writer = byte_level({"a b"});
    writer.add_array("tokenizer.ggml.token_type", std::vector<std::int32_t>{1, 9, 1});
    expect_error(ErrorCode::kFormat, {"token_type[1]", "found 9"}, [&] { load(writer); });
  }
  {
    GgufWriter writer = byte_level({"a b"});
    writer.add_array("tokenizer.ggml.token_type", std::vector<std::int32_t>{1, 1});
    expect_error(ErrorCode::kFormat, {"types", "expected 3", "found 2"}, [&] { load(writer); });
  }
  {
    GgufWriter writer = byte_level({"a b"});
    writer.add_array("tokenizer.ggml.token_type", std::vector<std::int32_t>{1, 6, 1});
    expect_error(ErrorCode::kFormat, {"token 1", "<0x00>"}, [&] { load(writer); });
  }
}

TEST(TokenizerDamage, CostlyRegularExpressionsEnd) {
  Json file = tokenizer_json("llama2");
  file["pre_tokenizer"] = {{"type", "Split"},
                           {"pattern", {{"Regex", "(a|aa)+[bc][bc]"}}},
                           {"behavior", "Isolated"},
                           {"invert", false}};
  const Tokenizer tokenizer = from_json(file);
  expect_error(ErrorCode::kText, {"regular expression", "limit"},
               [&] { tokenizer.encode(std::string(80, 'a') + "b"); });
}

TEST(TokenizerDamage, RunsOfSpacesAreWithinTheLimits) {
  // Each pattern backs out of a run of white space one step at a time: the limits must allow it.
  const std::string text = "x" + std::string(300'000, ' ') + "y" + std::string(300'000, '\n') + "z";
  for (const char* name : {"gpt2", "llama3", "qwen2", "smollm2"}) {
    const Tokenizer tokenizer = from_json(tokenizer_json(name));
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, {.add_special = false})), text) << name;
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
