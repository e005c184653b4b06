// SPDX-License-Identifier: MIT
/// Tokenisers from files: the metadata of a GGUF model, or Hugging Face's tokenizer.json with the
/// tokenizer_config.json and chat_template.jinja beside it. File content is untrusted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/mapped_file.hpp"
#include "sluice/io/tokenizer.hpp"

namespace sluice {

namespace detail {

// Published with the models named; (?i:...) as their tokenizer.json has it.
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581

inline PreTokenizerStep split_regex(std::string_view pattern,
                                    SplitBehavior behavior = SplitBehavior::kIsolated) {
  return {.kind = PreTokenizerStep::Kind::kSplitRegex,
          .pattern = std::string(pattern),
          .behavior = behavior};
}

[[noreturn]] inline void refuse_json(const std::string& field, std::string_view where,
                                     std::string_view expected, std::string found) {
  throw Error(ErrorCode::kFormat, {"JSON field has the wrong type or value", std::string(where),
                                   field, std::string(expected), std::move(found)});
}

// A member of a JSON file together with its path, so that errors can name it.
class JsonField {
 public:
  JsonField(const Json& value, std::string_view where, std::string path = "")
      : value_(&value), where_(where), path_(std::move(path)) {}

  const Json& value() const { return *value_; }
  const std::string& path() const { return path_; }
  bool is_null() const { return value_->is_null(); }

  /// The member, or nothing when it is absent or null.
  std::optional<JsonField> find(std::string_view key) const {
    if (!value_->is_object()) mismatch("an object");
    const auto& members = value_->get_ref<const Json::object_t&>();
    const auto member = members.find(key);
    if (member == members.end() || member->second.is_null()) return std::nullopt;
    return JsonField(member->second, where_, child(key));
  }
  JsonField at(std::string_view key) const {
    if (auto member = find(key)) return *member;
    throw Error(ErrorCode::kFormat,
                {"JSON field is missing", std::string(where_), child(key), "a value", "none"});
  }
  std::string string() const {
    if (!value_->is_string()) mismatch("a string");
    return value_->get<std::string>();
  }
  bool boolean() const {
    if (!value_->is_boolean()) mismatch("true or false");
    return value_->get<bool>();
  }
  bool boolean_or(std::string_view key, bool fallback) const {
    const auto member = find(key);
    return member ? member->boolean() : fallback;
  }
  std::string string_or(std::string_view key, std::string fallback) const {
    const auto member = find(key);
    return member ? member->string() : std::move(fallback);
  }
  Token token() const {
    const auto number = to_int(*value_);
    if (!number || *number < 0 || *number > 0x7FFFFFFE) mismatch("a token number");
    return static_cast<Token>(*number);
  }
  std::vector<JsonField> elements() const {
    if (!value_->is_array()) mismatch("an array");
    std::vector<JsonField> result;
    result.reserve(value_->size());
    for (const Json& element : *value_)
      result.emplace_back(element, where_, path_ + "[" + std::to_string(result.size()) + "]");
    return result;
  }
  [[noreturn]] void mismatch(std::string_view expected) const {
    refuse_json(path_, where_, expected, describe_json(*value_));
  }
  [[noreturn]] void unsupported(std::string what, std::string expected) const {
    throw Error(ErrorCode::kUnsupported, {std::move(what), std::string(where_), path_,
                                          std::move(expected), describe_json(*value_)});
  }

 private:
  std::string child(std::string_view key) const {
    return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
  }

  const Json* value_;
  std::string_view where_;
  std::string path_;
};

/// Reads tokenizer.json into a spec.
class TokenizerJsonReader {
 public:
  TokenizerJsonReader(const Json& file, std::string where)
      : where_(std::move(where)), root_(file, where_) {
    spec_.where = where_;
  }

  TokenizerSpec read() {
    const JsonField model = root_.at("model");
    read_vocabulary(model);
    read_model(model);
    if (const auto normalizer = root_.find("normalizer")) read_normalizer(*normalizer);
    if (const auto pre_tokenizer = root_.find("pre_tokenizer")) read_pre_tokenizer(*pre_tokenizer);
    if (const auto decoder = root_.find("decoder")) read_decoder(*decoder);
    if (const auto processor = root_.find("post_processor")) read_post_processor(*processor);
    if (spec_.byte_fallback)
      for (std::size_t token = 0; token < spec_.pieces.size(); ++token)
        if (byte_of_piece(spec_.pieces[token])) spec_.types[token] = TokenType::kByte;
    return std::move(spec_);
  }

 private:
  // Numbers beyond any real file's holes: what a small file may make us allocate is bounded.
  std::size_t max_tokens(std::size_t listed) const { return 4 * listed + 65536; }

  void place(const JsonField& field, Token token, const std::string& piece, std::size_t limit) {
    const auto at = static_cast<std::size_t>(token);
    if (at >= limit)
      refuse_json(field.path(), where_, "a token number below " + std::to_string(limit),
                  std::to_string(token));
    if (at >= spec_.pieces.size()) spec_.pieces.resize(at + 1);
    if (!spec_.pieces[at].empty() && spec_.pieces[at] != piece)
      refuse_json(field.path(), where_, "one text for token " + std::to_string(token),
                  quote_text(spec_.pieces[at]) + " and " + quote_text(piece));
    spec_.pieces[at] = piece;
  }

  void read_vocabulary(const JsonField& model) {
    const JsonField vocabulary = model.at("vocab");
    if (!vocabulary.value().is_object()) vocabulary.mismatch("an object of token numbers");
    const auto added = root_.find("added_tokens");
    const std::size_t limit =
        max_tokens(vocabulary.value().size() +
                   (added && added->value().is_array() ? added->value().size() : 0));
    for (const auto& [piece, number] : vocabulary.value().get_ref<const Json::object_t&>()) {
      const auto token = to_int(number);
      if (!token || *token < 0 || *token > 0x7FFFFFFE)
        refuse_json(vocabulary.path() + "[" + quote_text(piece) + "]", where_, "a token number",
                    describe_json(number));
      if (piece.empty()) vocabulary.mismatch("pieces that are not empty");
      place(vocabulary, static_cast<Token>(*token), piece, limit);
    }
    if (added) read_added(*added, vocabulary, limit);
    spec_.types.resize(spec_.pieces.size(), TokenType::kNormal);
  }

  void read_added(const JsonField& added, const JsonField& vocabulary, std::size_t limit) {
    const auto& known = vocabulary.value().get_ref<const Json::object_t&>();
    std::vector<TokenType>& types = spec_.types;
    for (const JsonField& element : added.elements()) {
      AddedToken token{.id = element.at("id").token(),
                       .content = element.at("content").string(),
                       .special = element.boolean_or("special", false),
                       .single_word = element.boolean_or("single_word", false),
                       .lstrip = element.boolean_or("lstrip", false),
                       .rstrip = element.boolean_or("rstrip", false),
                       .normalized = element.boolean_or("normalized", true)};
      if (token.content.empty()) element.at("content").mismatch("text");
      const auto other = known.find(token.content);
      if (other != known.end() && other->second != token.id)
        refuse_json(element.path() + ".id", where_,
                    "the number that the vocabulary has for " + quote_text(token.content) + ", " +
                        describe_json(other->second),
                    std::to_string(token.id));
      place(element.at("id"), token.id, token.content, limit);
      const auto at = static_cast<std::size_t>(token.id);
      if (types.size() <= at) types.resize(at + 1, TokenType::kNormal);
      types[at] = token.special ? TokenType::kControl : TokenType::kUserDefined;
      spec_.added.push_back(std::move(token));
    }
  }

  void read_model(const JsonField& model) {
    const std::string type = model.string_or("type", model.find("merges") ? "BPE" : "none");
    if (type != "BPE")
      throw Error(ErrorCode::kUnsupported, {"tokeniser model is not supported", where_,
                                            "model.type", "'BPE'", quote_text(type)});
    for (const std::string_view name : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (const auto affix = model.find(name); affix && !affix->string().empty())
        affix->unsupported("BPE with marked parts of words is not supported", "null or ''");
    if (const auto dropout = model.find("dropout"); dropout && dropout->value() != 0)
      dropout->unsupported("BPE with dropout is not supported", "null or 0");
    spec_.fuse_unknown = model.boolean_or("fuse_unk", false);
    spec_.byte_fallback = model.boolean_or("byte_fallback", false);
    spec_.ignore_merges = model.boolean_or("ignore_merges", false);
    if (const auto unknown = model.find("unk_token"))
      spec_.unknown = find_piece(*unknown, unknown->string());
    const JsonField merges = model.at("merges");
    if (!merges.value().is_array()) merges.mismatch("an array");
    spec_.merges.reserve(merges.value().size());
    for (const Json& merge : merges.value()) {
      const auto fail = [&](std::string_view expected) {
        refuse_json(merges.path() + "[" + std::to_string(spec_.merges.size()) + "]", where_,
                    expected, describe_json(merge));
      };
      if (merge.is_string()) {
        const auto& text = merge.get_ref<const std::string&>();
        const std::size_t space = text.find(' ');
        if (space == std::string::npos || space == 0 || space + 1 == text.size() ||
            text.find(' ', space + 1) != std::string::npos)
          fail("two pieces with a space between them");
        spec_.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
      } else {
        if (!merge.is_array() || merge.size() != 2 || !merge[0].is_string() ||
            !merge[1].is_string())
          fail("a pair of pieces");
        spec_.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      }
    }
  }

  Token find_piece(const JsonField& field, const std::string& piece) const {
    // Few look-ups per file: a scan needs no index.
    const auto found = std::find(spec_.pieces.begin(), spec_.pieces.end(), piece);
    if (piece.empty() || found == spec_.pieces.end()) field.mismatch("a piece of the vocabulary");
    return static_cast<Token>(found - spec_.pieces.begin());
  }

  // A pattern is {"String": "..."} or {"Regex": "..."}.
  static std::pair<std::string, bool> read_pattern(const JsonField& step) {
    const JsonField pattern = step.at("pattern");
    if (const auto text = pattern.find("String")) return {text->string(), false};
    return {pattern.at("Regex").string(), true};
  }

  void read_normalizer(const JsonField& step) {
    using Kind = NormalizerStep::Kind;
    auto& steps = spec_.normalizer;
    const std::string type = step.at("type").string();
    if (type == "Sequence") {
      for (const JsonField& part : step.at("normalizers").elements()) read_normalizer(part);
    } else if (type == "Prepend") {
      steps.push_back({.kind = Kind::kPrepend, .content = step.at("prepend").string()});
    } else if (type == "Replace") {
      auto [pattern, is_regex] = read_pattern(step);
      steps.push_back({.kind = is_regex ? Kind::kReplaceRegex : Kind::kReplace,
                       .pattern = std::move(pattern),
                       .content = step.at("content").string()});
    } else if (type == "Strip") {
      steps.push_back({.kind = Kind::kStrip,
                       .left = step.boolean_or("strip_left", true),
                       .right = step.boolean_or("strip_right", true)});
    } else if (type == "NFC") {
      steps.push_back({.kind = Kind::kNfc});
    } else if (type == "NFD") {
      steps.push_back({.kind = Kind::kNfd});
    } else if (type == "NFKC") {
      steps.push_back({.kind = Kind::kNfkc});
    } else if (type == "NFKD") {
      steps.push_back({.kind = Kind::kNfkd});
    } else if (type == "Lowercase") {
      steps.push_back({.kind = Kind::kLowercase});
    } else {
      step.at("type").unsupported(
          "normaliser is not supported",
          "Sequence, Prepend, Replace, Strip, NFC, NFD, NFKC, NFKD or Lowercase");
    }
  }

  static PreTokenizerStep::Prepend read_prepend(const JsonField& step) {
    using Prepend = PreTokenizerStep::Prepend;
    const auto scheme = step.find("prepend_scheme");
    const std::string name = scheme ? scheme->string() : "always";
    if (name == "never" || !step.boolean_or("add_prefix_space", true)) return Prepend::kNever;
    if (name == "first") return Prepend::kFirst;
    if (name != "always") scheme->mismatch("'always', 'first' or 'never'");
    return Prepend::kAlways;
  }

  static SplitBehavior read_behavior(const JsonField& field) {
    const std::string name = field.string();
    if (name == "Removed") return SplitBehavior::kRemoved;
    if (name == "Isolated") return SplitBehavior::kIsolated;
    if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
    if (name == "Contiguous") return SplitBehavior::kContiguous;
    field.mismatch("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
  }

  void read_pre_tokenizer(const JsonField& step) {
    using Kind = PreTokenizerStep::Kind;
    auto& steps = spec_.pre_tokenizer;
    const std::string type = step.at("type").string();
    // After ByteLevel, other steps would see the 256 characters that stand for bytes.
    if (spec_.byte_level)
      step.at("type").unsupported("pre-tokeniser after ByteLevel is not supported",
                                  "ByteLevel last");
    if (type == "Sequence") {
      for (const JsonField& part : step.at("pretokenizers").elements()) read_pre_tokenizer(part);
    } else if (type == "Split") {
      auto [pattern, is_regex] = read_pattern(step);
      steps.push_back({.kind = is_regex ? Kind::kSplitRegex : Kind::kSplitText,
                       .pattern = std::move(pattern),
                       .behavior = read_behavior(step.at("behavior")),
                       .invert = step.boolean_or("invert", false)});
    } else if (type == "Digits") {
      steps.push_back(split_regex(R"(\p{N})", step.boolean_or("individual_digits", false)
                                                  ? SplitBehavior::kIsolated
                                                  : SplitBehavior::kContiguous));
    } else if (type == "ByteLevel") {
      if (step.boolean_or("add_prefix_space", true)) steps.push_back({.kind = Kind::kSpacePrefix});
      if (step.boolean_or("use_regex", true)) steps.push_back(split_regex(kGpt2Pattern));
      spec_.byte_level = true;
    } else if (type == "Metaspace") {
      const std::string mark = step.string_or("replacement", std::string(kSpaceMark));
      if (mark.empty()) step.at("replacement").mismatch("a character");
      steps.push_back({.kind = Kind::kMetaspace, .pattern = mark, .prepend = read_prepend(step)});
      if (step.boolean_or("split", true))
        steps.push_back({.kind = Kind::kSplitText,
                         .pattern = mark,
                         .behavior = SplitBehavior::kMergedWithNext});
    } else {
      step.at("type").unsupported("pre-tokeniser is not supported",
                                  "Sequence, Split, Digits, ByteLevel or Metaspace");
    }
  }

  void read_decoder(const JsonField& step) {
    const std::string type = step.at("type").string();
    if (type == "Sequence") {
      for (const JsonField& part : step.at("decoders").elements()) read_decoder(part);
    } else if (type == "Replace") {
      const auto [pattern, is_regex] = read_pattern(step);
      const JsonField content = step.at("content");
      if (is_regex || content.string() != " ")
        content.unsupported("decoder is not supported", "replacement of a string by a space");
      spec_.space_mark = pattern;
    } else if (type == "Metaspace") {
      spec_.space_mark = step.string_or("replacement", std::string(kSpaceMark));
      spec_.drop_leading_space = read_prepend(step) != PreTokenizerStep::Prepend::kNever;
    } else if (type == "Strip") {
      const auto stop = step.find("stop");
      if (step.at("content").string() != " " || step.at("start").token() > 1 ||
          (stop && stop->token() != 0))
        step.unsupported("decoder is not supported", "at most one leading space stripped");
      spec_.drop_leading_space = step.at("start").token() == 1;
    } else if (type != "ByteLevel" && type != "ByteFallback" && type != "Fuse") {
      step.at("type").unsupported(
          "decoder is not supported",
          "Sequence, Replace, ByteFallback, Fuse, Strip, Metaspace or ByteLevel");
    }
  }

  void read_post_processor(const JsonField& step) {
    const std::string type = step.at("type").string();
    if (type == "Sequence") {
      for (const JsonField& part : step.at("processors").elements()) read_post_processor(part);
    } else if (type == "TemplateProcessing") {
      bool after_text = false;
      for (const JsonField& item : step.at("single").elements()) {
        if (const auto sequence = item.find("Sequence")) {
          if (after_text) item.unsupported("template is not supported", "the text once");
          after_text = true;
          continue;
        }
        const JsonField special = item.at("SpecialToken");
        const std::string name = special.at("id").string();
        for (const JsonField& id : step.at("special_tokens").at(name).at("ids").elements()) {
          if (static_cast<std::size_t>(id.token()) >= spec_.pieces.size())
            id.mismatch("a token of the vocabulary");
          (after_text ? spec_.suffix : spec_.prefix).push_back(id.token());
        }
      }
      if (!after_text) step.at("single").mismatch("a template with the text in it");
    } else if (type != "ByteLevel") {  // which only moves offsets
      step.at("type").unsupported("post-processor is not supported",
                                  "Sequence, TemplateProcessing or ByteLevel");
    }
  }

  TokenizerSpec spec_;
  std::string where_;
  JsonField root_;
};

/// Applies tokenizer_config.json: special tokens, whether they are added, the chat template.
inline void apply_tokenizer_config(TokenizerSpec& spec, const Json& file,
                                   const std::string& where) {
  const JsonField root(file, where);
  const auto token = [&](std::string_view key) -> std::optional<Token> {
    const auto field = root.find(key);
    if (!field) return std::nullopt;
    const JsonField content = field->value().is_object() ? field->at("content") : *field;
    const std::string text = content.string();
    const auto found = std::find(spec.pieces.begin(), spec.pieces.end(), text);
    if (text.empty() || found == spec.pieces.end()) content.mismatch("a token of the vocabulary");
    return static_cast<Token>(found - spec.pieces.begin());
  };
  if (const auto bos = token("bos_token")) spec.bos = bos;
  if (const auto eos = token("eos_token")) spec.eos = eos;
  const auto adds = [&](std::string_view key, std::optional<Token> special,
                        std::vector<Token>& around) {
    const auto field = root.find(key);
    if (!field || !special) return;
    const bool is_there = std::find(around.begin(), around.end(), *special) != around.end();
    if (field->boolean() && !is_there) around.insert(around.begin(), *special);
    if (!field->boolean()) std::erase(around, *special);
  };
  adds("add_bos_token", spec.bos, spec.prefix);
  adds("add_eos_token", spec.eos, spec.suffix);
  if (const auto chat = root.find("chat_template")) {
    if (chat->value().is_array()) {  // several by name
      for (const JsonField& entry : chat->elements())
        if (entry.at("name").string() == "default")
          spec.chat_template = entry.at("template").string();
    } else {
      spec.chat_template = chat->string();
    }
  }
}

}  // namespace detail

/// A tokeniser's definition from the content of a tokenizer.json and, where not nullptr, of a
/// tokenizer_config.json. `where` names the first in errors. Understood: BPE models, with the
/// normalisers Prepend, Replace, Strip, NFC, NFD, NFKC, NFKD, Lowercase, the pre-tokenisers Split,
/// Digits, ByteLevel, Metaspace, the decoders and post-processors that go with them, and sequences
/// of all these. Truncation and padding settings are passed over. Without a configuration the begin
/// token is the template's first token, and there is no eos.
/// \throws Error(kFormat) naming file, field, expected and found; Error(kUnsupported) naming what.
inline TokenizerSpec tokenizer_spec_from_json(const Json& file, const Json* config,
                                              const std::string& where,
                                              const std::string& config_where) {
  TokenizerSpec spec = detail::TokenizerJsonReader(file, where).read();
  if (!spec.prefix.empty()) spec.bos = spec.prefix.front();
  if (config != nullptr) detail::apply_tokenizer_config(spec, *config, config_where);
  return spec;
}

/// The same from a tokenizer.json on disk, with the tokenizer_config.json and the
/// chat_template.jinja beside it where they exist; the latter has the last word on the template.
/// \throws Error(kIo) when a file cannot be read, and as above.
inline TokenizerSpec tokenizer_spec_from_json(const std::string& path) {
  const auto beside = [&](const char* name) {
    return (std::filesystem::path(path).parent_path() / name).string();
  };
  const auto exists = [](const std::string& file) {
    std::error_code ignored;
    return std::filesystem::is_regular_file(file, ignored);
  };
  const std::string config_path = beside("tokenizer_config.json");
  std::optional<Json> config;
  if (exists(config_path)) config = read_json_file(config_path);
  TokenizerSpec spec = tokenizer_spec_from_json(read_json_file(path), config ? &*config : nullptr,
                                                path, config_path);
  if (const std::string chat_path = beside("chat_template.jinja"); exists(chat_path)) {
    const MappedFile chat(chat_path);
    spec.chat_template.assign(reinterpret_cast<const char*>(chat.bytes().data()),
                              chat.bytes().size());
  }
  return spec;
}

/// A tokeniser's definition from the metadata of a GGUF file: tokenizer.ggml.model "gpt2" with the
/// pre-tokenisers gpt-2, default, llama-bpe, qwen2 and smollm, or "llama". Qwen2's text is put into
/// the normal form NFC, as its own tokeniser does though the metadata does not say so.
/// \throws Error(kFormat) naming file and key; Error(kUnsupported) naming another kind.
inline TokenizerSpec tokenizer_spec_from_gguf(const GgufFile& file) {
  using Kind = NormalizerStep::Kind;
  const auto key = [](std::string_view name) {
    return "tokenizer.ggml." + std::string(name);
  };
  const auto unsupported = [&](std::string what, std::string_view name, std::string expected) {
    throw Error(ErrorCode::kUnsupported,
                {std::move(what), file.path(), key(name), std::move(expected),
                 detail::quote_text(file.get_string(key(name)))});
  };

  TokenizerSpec spec;
  spec.where = file.path();
  for (const std::string_view piece : file.get_strings(key("tokens")))
    spec.pieces.emplace_back(piece);
  spec.types.assign(spec.pieces.size(), TokenType::kNormal);
  if (file.has(key("token_type"))) {
    const std::vector<std::int64_t> types = file.get_ints(key("token_type"));
    spec.types.assign(types.size(), TokenType::kNormal);
    for (std::size_t token = 0; token < types.size(); ++token) {
      if (types[token] < 1 || types[token] > 6)
        throw Error(ErrorCode::kFormat, {"unknown token type", file.path(),
                                         key("token_type") + "[" + std::to_string(token) + "]",
                                         "1 to 6", std::to_string(types[token])});
      spec.types[token] = static_cast<TokenType>(types[token]);
    }
  }
  const auto token = [&](std::string_view name) -> std::optional<Token> {
    if (!file.has(key(name))) return std::nullopt;
    const std::uint64_t number = file.get_uint(key(name));
    if (number >= spec.pieces.size())
      throw Error(ErrorCode::kFormat,
                  {"token is not in the vocabulary", file.path(), key(name),
                   "below " + std::to_string(spec.pieces.size()), std::to_string(number)});
    return static_cast<Token>(number);
  };
  spec.bos = token("bos_token_id");
  spec.eos = token("eos_token_id");
  for (const std::string_view name : {"eot_token_id", "eom_token_id"})
    if (const auto end = token(name)) spec.end_tokens.push_back(*end);
  spec.chat_template = file.get_string_or("tokenizer.chat_template", "");

  bool adds_bos = false;
  const std::string_view model = file.get_string(key("model"));
  if (model == "llama") {
    spec.model = TokenizerSpec::Model::kScoredMerges;
    for (const double score : file.get_floats(key("scores")))
      spec.scores.push_back(static_cast<float>(score));
    spec.byte_fallback = spec.fuse_unknown = true;
    spec.unknown = token("unknown_token_id");
    spec.space_mark = detail::kSpaceMark;
    if (file.get_bool_or(key("add_space_prefix"), true)) {
      spec.normalizer.push_back({.kind = Kind::kPrepend, .content = " "});
      spec.drop_leading_space = true;
    }
    spec.normalizer.push_back({.kind = Kind::kReplace, .pattern = " ", .content = spec.space_mark});
    adds_bos = true;
  } else if (model == "gpt2") {
    // unknown_token_id is left aside: reference tokenisers of this kind have no unknown token, and
    // files name an end token there.
    spec.byte_level = true;
    std::size_t index = 0;
    for (const std::string_view merge : file.get_strings(key("merges"))) {
      const std::size_t space = merge.find(' ', 1);
      if (space == std::string_view::npos)
        throw Error(ErrorCode::kFormat,
                    {"merge is no pair of pieces", file.path(),
                     key("merges") + "[" + std::to_string(index) + "]",
                     "two pieces with a space between them", detail::quote_text(merge)});
      spec.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
      ++index;
    }
    const std::string_view pre = file.get_string_or(key("pre"), "default");
    const auto split = [&](std::string_view pattern) {
      spec.pre_tokenizer.push_back(detail::split_regex(pattern));
    };
    if (pre == "gpt-2" || pre == "gpt2") {
      split(kGpt2Pattern);
    } else if (pre == "smollm") {
      split(R"(\p{N})");
      split(kGpt2Pattern);
    } else if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") {
      split(detail::kLlama3Pattern);
      spec.ignore_merges = true;
      adds_bos = true;
    } else if (pre == "qwen2") {
      spec.normalizer.push_back({.kind = Kind::kNfc});
      split(detail::kQwen2Pattern);
    } else if (pre == "default") {
      // llama.cpp's rule for files that do not say.
      split(R"([\p{P}\$\+<=>\^~\|]+)");
      split(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S))");
      split(R"(\p{N}+)");
      split("[0-9][0-9][0-9]");
    } else {
      unsupported("pre-tokeniser is not supported", "pre",
                  "gpt-2, default, llama-bpe, qwen2 or smollm");
    }
  } else {
    unsupported("tokeniser model is not supported", "model", "gpt2 or llama");
  }

  for (std::size_t at = 0; at < spec.types.size() && at < spec.pieces.size(); ++at) {
    const TokenType type = spec.types[at];
    const bool special = type == TokenType::kControl || type == TokenType::kUnknown;
    if ((special || type == TokenType::kUserDefined) && !spec.pieces[at].empty())
      spec.added.push_back(
          {.id = static_cast<Token>(at), .content = spec.pieces[at], .special = special});
  }
  if (file.get_bool_or(key("add_bos_token"), adds_bos) && spec.bos) spec.prefix = {*spec.bos};
  if (file.get_bool_or(key("add_eos_token"), false) && spec.eos) spec.suffix = {*spec.eos};
  return spec;
}

/// The tokeniser of a GGUF file, or of a tokenizer.json, or of the tokenizer.json in a folder.
/// \throws Error as the functions above and Tokenizer's constructor do.
inline Tokenizer load_tokenizer(const std::filesystem::path& path) {
  if (path.extension() == ".gguf")
    return Tokenizer(tokenizer_spec_from_gguf(GgufFile(path.string())));
  std::error_code ignored;
  const bool is_folder = std::filesystem::is_directory(path, ignored);
  return Tokenizer(tokenizer_spec_from_json((is_folder ? path / "tokenizer.json" : path).string()));
}

}  // namespace sluice
