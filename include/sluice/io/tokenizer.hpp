// SPDX-License-Identifier: MIT
/// Tokenisers: text to tokens and back, for the two families that decoders of the Llama kind use:
/// byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-style BPE (Llama 2, Mistral,
/// Gemma). This header knows no file format: a `TokenizerSpec` says everything, and
/// load_tokenizer.hpp fills one from a file.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/detail/regex.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/detail/unicode.hpp"

namespace sluice {

/// What a token of the vocabulary is. The numbers are those of GGUF files.
enum class TokenType : std::uint8_t {
  kNormal = 1,       ///< text that encoding produces
  kUnknown = 2,      ///< stands for text outside the vocabulary
  kControl = 3,      ///< steers the model: begin, end, roles; special
  kUserDefined = 4,  ///< text that is matched whole, before anything else
  kUnused = 5,       ///< never produced by encoding
  kByte = 6,         ///< one byte, written <0x0A>
};

/// A token that is matched in the text before the pre-tokeniser sees it. The flags mean what they
/// mean in tokenizer.json.
struct AddedToken {
  Token id = 0;
  std::string content;       ///< what to match; UTF-8, not empty
  bool special = false;      ///< matched only where EncodeOptions::parse_special asks for it
  bool single_word = false;  ///< not beside a letter, digit or underscore
  bool lstrip = false;       ///< takes the white space before it
  bool rstrip = false;       ///< takes the white space after it
  bool normalized = false;   ///< matched in normalised text, itself normalised
};

/// One step of the normaliser, a map from text to text. Empty text stays empty.
struct NormalizerStep {
  enum class Kind {
    kPrepend,       ///< `content` in front
    kReplace,       ///< every `pattern`, literally, becomes `content`
    kReplaceRegex,  ///< every match of `pattern` becomes `content`, literally
    kNfc,
    kNfd,
    kNfkc,
    kNfkd,
    kLowercase,
    kStrip,  ///< white space off the `left`, the `right`
  };
  Kind kind = Kind::kPrepend;
  std::string pattern = {};
  std::string content = {};
  bool left = false;
  bool right = false;
};

/// What becomes of the matches of a splitting pattern.
enum class SplitBehavior {
  kRemoved,             ///< they disappear
  kIsolated,            ///< each is a word of its own
  kMergedWithPrevious,  ///< each joins what stands before it
  kMergedWithNext,      ///< each joins what stands after it
  kContiguous,          ///< neighbouring matches are one word
};

/// One step of the pre-tokeniser, which cuts text into words; no token crosses a word's edge.
struct PreTokenizerStep {
  enum class Kind {
    kSplitText,    ///< at every `pattern`, literally
    kSplitRegex,   ///< at every match of `pattern`
    kSpacePrefix,  ///< a space in front of every word that has none
    kMetaspace,    ///< spaces become `pattern`, which is also put in front as `prepend` says
  };
  enum class Prepend { kNever, kFirst, kAlways };
  Kind kind = Kind::kSplitText;
  std::string pattern = {};
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  ///< split at what does not match
  Prepend prepend = Prepend::kNever;
};

/// Everything that defines a tokeniser. Plain data; Tokenizer checks it.
struct TokenizerSpec {
  enum class Model {
    kRankedMerges,  ///< a list of merges, the first applies first (BPE as in GPT-2)
    kScoredMerges,  ///< neighbours that join to the piece of highest score (SentencePiece BPE)
  };

  std::string where = "tokenizer";  ///< names the file in errors

  std::vector<std::string> pieces;  ///< [vocab_size], as files spell them; "" for a hole
  std::vector<TokenType> types;     ///< [vocab_size], or empty: all kNormal
  std::vector<float> scores;        ///< [vocab_size] for kScoredMerges, else unused
  std::vector<std::pair<std::string, std::string>> merges;  ///< kRankedMerges: best first
  Model model = Model::kRankedMerges;
  bool byte_level = false;     ///< pieces spell bytes by GPT-2's table of 256 characters
  bool byte_fallback = false;  ///< characters without a piece become kByte tokens
  bool fuse_unknown = false;   ///< neighbouring unknown characters are one unknown token
  bool ignore_merges = false;  ///< a word that is a piece needs no merging

  std::vector<NormalizerStep> normalizer;
  std::vector<PreTokenizerStep> pre_tokenizer;
  std::vector<AddedToken> added;

  std::string space_mark;           ///< what stands for a space in pieces ("▁"); "" for none
  bool drop_leading_space = false;  ///< decoding drops one space at the start of the text

  std::optional<Token> bos, eos, unknown;
  std::vector<Token> prefix, suffix;  ///< what add_special puts around the text
  std::vector<Token> end_tokens;      ///< that end a turn, besides eos and the well-known names

  std::string chat_template;  ///< Jinja source, "" for none
};

/// GPT-2's splitting pattern, which the ByteLevel pre-tokeniser applies.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct EncodeOptions {
  bool add_special = true;     ///< put the spec's prefix (begin token) and suffix around the text
  bool parse_special = false;  ///< text that spells a special token becomes that token
};

struct DecodeOptions {
  bool skip_special = false;  ///< leave special tokens out
};

namespace detail {

/// GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other 68 bytes
/// for the characters from U+0100 on, in order.
inline constexpr std::array<char32_t, 256> kByteCharacters = [] {
  std::array<char32_t, 256> result{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    result[byte] = printable ? byte : next++;
  }
  return result;
}();

/// Bytes in GPT-2's spelling.
inline std::string spell_bytes(std::string_view bytes) {
  std::string result;
  result.reserve(2 * bytes.size());
  for (const char byte : bytes)
    append_utf8(result, kByteCharacters[static_cast<unsigned char>(byte)]);
  return result;
}

/// The bytes that GPT-2's spelling stands for, or nothing when it has other characters.
inline std::optional<std::string> unspell_bytes(std::string_view spelled) {
  static constexpr auto kBytes = [] {
    std::array<std::int16_t, 0x144> result{};
    result.fill(-1);
    for (std::size_t byte = 0; byte < 256; ++byte)
      result[kByteCharacters[byte]] = static_cast<std::int16_t>(byte);
    return result;
  }();
  std::string result;
  for (std::size_t at = 0; at < spelled.size();) {
    const Utf8Unit unit = scan_utf8(spelled.substr(at));
    if (unit.kind != Utf8Kind::kValid || unit.code >= kBytes.size() || kBytes[unit.code] < 0)
      return std::nullopt;
    result += static_cast<char>(kBytes[unit.code]);
    at += unit.length;
  }
  return result;
}

/// The byte that "<0x0A>" names, or nothing.
inline std::optional<unsigned char> byte_of_piece(std::string_view piece) {
  const auto digit = [](char character) {
    if (character >= '0' && character <= '9') return character - '0';
    if (character >= 'A' && character <= 'F') return character - 'A' + 10;
    return -1;
  };
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return std::nullopt;
  const int high = digit(piece[3]);
  const int low = digit(piece[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<unsigned char>(high * 16 + low);
}

/// A fixed map from a pair of tokens to the rank and the result of their merge: open addressing,
/// because a merge looks up two pairs and this is most of the time that encoding takes.
class MergeTable {
 public:
  struct Merge {
    std::uint64_t pair;
    std::uint32_t rank;
    Token result;
  };

  MergeTable() = default;
  explicit MergeTable(std::size_t count) {
    std::size_t size = 16;
    while (size < 2 * count) size *= 2;
    slots_.assign(size, Merge{kEmpty, 0, 0});
  }

  /// The first merge of a pair stays.
  void insert(Token left, Token right, std::uint32_t rank, Token result) {
    const std::uint64_t pair = key(left, right);
    Merge& slot = slots_[find_slot(pair)];
    if (slot.pair == kEmpty) slot = {pair, rank, result};
  }

  const Merge* find(Token left, Token right) const {
    if (slots_.empty() || left < 0 || right < 0) return nullptr;
    const Merge& slot = slots_[find_slot(key(left, right))];
    return slot.pair == kEmpty ? nullptr : &slot;
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};

  static std::uint64_t key(Token left, Token right) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
           static_cast<std::uint32_t>(right);
  }
  std::size_t find_slot(std::uint64_t pair) const {
    std::uint64_t hash = pair * 0x9e3779b97f4a7c15ULL;
    hash ^= hash >> 32;
    std::size_t at = static_cast<std::size_t>(hash) & (slots_.size() - 1);
    while (slots_[at].pair != kEmpty && slots_[at].pair != pair)
      at = (at + 1) & (slots_.size() - 1);
    return at;
  }

  std::vector<Merge> slots_;  // at most half full
};

/// Finds added tokens in text: at each place the longest, from left to right.
class AddedMatcher {
 public:
  /// The first of two tokens with one content stays.
  void add(AddedToken token) {
    auto& lengths = lengths_[static_cast<unsigned char>(token.content.front())];
    const auto at =
        std::lower_bound(lengths.begin(), lengths.end(), token.content.size(), std::greater<>());
    if (at == lengths.end() || *at != token.content.size())
      lengths.insert(at, token.content.size());
    std::string content = token.content;
    tokens_.try_emplace(std::move(content), std::move(token));
  }

  bool empty() const { return tokens_.empty(); }

  const AddedToken* longest_at(std::string_view text, std::size_t at) const {
    for (const std::size_t length : lengths_[static_cast<unsigned char>(text[at])]) {
      if (length > text.size() - at) continue;
      const auto found = tokens_.find(text.substr(at, length));
      if (found != tokens_.end()) return &found->second;
    }
    return nullptr;
  }

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>()(text);
    }
  };
  std::unordered_map<std::string, AddedToken, Hash, std::equal_to<>> tokens_;
  std::array<std::vector<std::size_t>, 256> lengths_;  // by first byte, longest first
};

}  // namespace detail

/// A tokeniser: const after construction, shared between threads without locks. Movable (views from
/// bytes() stay valid), not copyable. Encoding allocates; decoding one token does not.
///
/// Encoding follows Hugging Face tokenizers: added tokens are cut out, the rest is normalised and
/// cut into words, each word is merged. Merging takes O(n log n) for a word of n characters.
/// Deviations: of equal text in the vocabulary the lowest token counts; a word must be shorter than
/// 2 GiB. As there, a character that has neither piece nor byte tokens nor an unknown token is left
/// out: SmolLM2's vocabulary lacks some control characters, for example.
/// Source of the merging: Sennrich et al. 2016 (arXiv 1508.07909) and SentencePiece
/// (arXiv 1808.06226), as the two libraries implement it; SentencePiece's unused pieces are never
/// produced instead of being merged and split again.
class Tokenizer {
 public:
  /// \throws Error(kFormat) naming the part of the spec that contradicts another: a table of
  /// another length than the vocabulary, a merge of pieces that do not exist, a token out of range.
  /// \throws Error(kUnsupported) for a regular expression that cannot be used.
  explicit Tokenizer(TokenizerSpec spec)
      : where_(std::move(spec.where)),
        pieces_(std::move(spec.pieces)),
        types_(std::move(spec.types)),
        scores_(std::move(spec.scores)),
        model_(spec.model),
        byte_level_(spec.byte_level),
        byte_fallback_(spec.byte_fallback),
        fuse_unknown_(spec.fuse_unknown),
        ignore_merges_(spec.ignore_merges),
        drop_leading_space_(spec.drop_leading_space),
        bos_(spec.bos),
        eos_(spec.eos),
        unknown_(spec.unknown),
        prefix_(std::move(spec.prefix)),
        suffix_(std::move(spec.suffix)),
        end_tokens_(std::move(spec.end_tokens)),
        chat_template_(std::move(spec.chat_template)) {
    check_tables();
    index_pieces();
    for (const AddedToken& token : spec.added) check_added(token);
    compile(spec);
    for (AddedToken& token : spec.added)
      if (token.normalized) token.content = normalise(token.content);
    store_bytes(spec);
    index_bytes();
    index_merges(spec);
    index_added(spec);
    collect_end_tokens();
  }
  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;

  /// The tokens of a text.
  /// \throws Error(kText) naming the byte offset where the text is not valid UTF-8, or when an
  /// untrusted regular expression exceeds its limits on it.
  std::vector<Token> encode(std::string_view text, EncodeOptions options = {}) const {
    const std::size_t invalid = detail::find_invalid_utf8(text);
    if (invalid != std::string_view::npos)
      throw Error(ErrorCode::kText, {"text is not valid UTF-8", "text to encode",
                                     detail::at_byte("character", invalid), "valid UTF-8",
                                     detail::quote_text(text.substr(invalid, 4))});
    std::vector<Token> tokens;
    if (options.add_special) tokens = prefix_;
    Scratch scratch;
    const auto emit = [&](Token token) {
      tokens.push_back(token);
    };
    split_added(text, added_, options.parse_special, emit, [&](detail::ByteRange part) {
      const std::string normal = normalise(text.substr(part.begin, part.end - part.begin));
      split_added(normal, added_normalized_, options.parse_special, emit,
                  [&](detail::ByteRange rest) {
                    encode_part(std::string_view(normal).substr(rest.begin, rest.end - rest.begin),
                                part.begin == 0 && rest.begin == 0, scratch, tokens);
                  });
    });
    if (options.add_special) tokens.insert(tokens.end(), suffix_.begin(), suffix_.end());
    return tokens;
  }

  /// The text of tokens: valid UTF-8, where bytes that are none are replaced as Python's "replace"
  /// does (Hugging Face tokenizers puts one U+FFFD per byte for <0x..> tokens). The first space is
  /// dropped where the tokeniser put one there. A StreamingDetokenizer gives the same text.
  std::string decode(std::span<const Token> tokens, DecodeOptions options = {}) const {
    std::string text;
    detail::Utf8Assembler assembler(drop_leading_space_);
    for (const Token token : tokens)
      if (!(options.skip_special && is_special(token))) assembler.push(bytes(token), text);
    assembler.finish(text);
    return text;
  }

  /// The raw bytes that a token stands for: a view that lives as long as this object; not
  /// necessarily whole characters. Empty for a number outside the vocabulary (models often have
  /// more rows than their tokeniser has tokens). Allocates nothing.
  std::string_view bytes(Token token) const noexcept {
    if (token < 0 || static_cast<std::size_t>(token) >= vocab_size()) return {};
    const auto at = static_cast<std::size_t>(token);
    return {bytes_.data() + byte_ends_[at], byte_ends_[at + 1] - byte_ends_[at]};
  }

  /// The length in bytes of the longest bytes() of any token.
  std::size_t max_bytes() const noexcept { return max_bytes_; }

  /// Control and unknown tokens, and what tokenizer.json marks as special. False outside the
  /// vocabulary.
  bool is_special(Token token) const noexcept {
    return token >= 0 && static_cast<std::size_t>(token) < vocab_size() &&
           special_[static_cast<std::size_t>(token)];
  }

  /// How many tokens there are, holes included.
  std::size_t vocab_size() const noexcept { return pieces_.size(); }

  std::optional<Token> bos() const noexcept { return bos_; }
  std::optional<Token> eos() const noexcept { return eos_; }

  /// Whether add_special puts the begin token in front.
  bool adds_bos() const noexcept {
    return bos_ && std::find(prefix_.begin(), prefix_.end(), *bos_) != prefix_.end();
  }

  /// Tokens after which a model has nothing more to say: eos, and special tokens with well-known
  /// names (<|im_end|>, <|eot_id|>, <end_of_turn>, ...). Ascending.
  std::span<const Token> end_tokens() const noexcept { return end_tokens_; }

  /// The token that files spell exactly so ("<|im_end|>", "Ġthe", "▁the"), the lowest if several.
  std::optional<Token> find(std::string_view piece) const {
    const auto found = index_.find(piece);
    return found == index_.end() ? std::nullopt : std::optional(found->second);
  }

  /// How files spell a token; empty outside the vocabulary.
  std::string_view piece(Token token) const noexcept {
    if (token < 0 || static_cast<std::size_t>(token) >= vocab_size()) return {};
    return pieces_[static_cast<std::size_t>(token)];
  }

  /// Whether decoding drops a space at the start of a text.
  bool drops_leading_space() const noexcept { return drop_leading_space_; }

  /// The chat template's Jinja source, "" where the file has none.
  const std::string& chat_template() const noexcept { return chat_template_; }

  /// The file, for messages.
  const std::string& where() const noexcept { return where_; }

 private:
  static constexpr Token kNone = -1;

  // A run of text that merging treats as one; linked, so that joining two is O(1).
  struct Symbol {
    std::size_t begin = 0;
    std::size_t length = 0;  // 0: joined to the symbol before it
    std::ptrdiff_t previous = -1;
    std::ptrdiff_t next = -1;
    Token token = kNone;  // kNone: no piece has this text
  };
  // A possible merge. Stale when the two symbols have changed: a pair that starts at `left` only
  // ever grows, so its length tells.
  struct Candidate {
    double cost;  // rank, or minus the score: the lowest goes first, the leftmost of equals
    std::size_t left;
    std::size_t length;
    Token result;
    bool operator<(const Candidate& other) const {  // std::push_heap keeps the greatest in front
      return cost != other.cost ? cost > other.cost : left > other.left;
    }
  };
  struct Scratch {
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };
  struct Word {
    detail::ByteRange range;
    bool starts_text;
  };
  struct CompiledNormalizer {
    NormalizerStep step;
    std::optional<detail::Regex> regex = std::nullopt;
  };
  struct CompiledPreTokenizer {
    PreTokenizerStep step;
    std::optional<detail::Regex> regex = std::nullopt;
  };

  // --- construction ---------------------------------------------------------------------------

  [[noreturn]] void bad(std::string what, std::string field, std::string expected,
                        std::string found) const {
    throw Error(ErrorCode::kFormat,
                {std::move(what), where_, std::move(field), std::move(expected), std::move(found)});
  }
  void check_token(std::optional<Token> token, std::string_view field) const {
    if (token && (*token < 0 || static_cast<std::size_t>(*token) >= vocab_size()))
      bad("token is not in the vocabulary", std::string(field),
          "0 to " + std::to_string(static_cast<std::ptrdiff_t>(vocab_size()) - 1),
          std::to_string(*token));
  }
  TokenType type(Token token) const {
    return types_.empty() ? TokenType::kNormal : types_[static_cast<std::size_t>(token)];
  }

  void check_tables() {
    const auto length = [&](std::size_t size, std::string_view field) {
      if (size != vocab_size())
        bad("table has another length than the vocabulary", std::string(field),
            std::to_string(vocab_size()), std::to_string(size));
    };
    if (vocab_size() == 0) bad("vocabulary is empty", "pieces", "at least 1 token", "0");
    if (vocab_size() > 0x7FFFFFFF) bad("vocabulary is too large", "pieces", "below 2^31", "more");
    if (!types_.empty()) length(types_.size(), "types");
    if (model_ == TokenizerSpec::Model::kScoredMerges) {
      length(scores_.size(), "scores");
      for (std::size_t token = 0; token < scores_.size(); ++token)
        if (std::isnan(scores_[token]))
          bad("score is no number", "scores[" + std::to_string(token) + "]", "a number", "NaN");
    }
    check_token(bos_, "bos");
    check_token(eos_, "eos");
    check_token(unknown_, "unknown");
    for (const Token token : prefix_) check_token(token, "prefix");
    for (const Token token : suffix_) check_token(token, "suffix");
    for (const Token token : end_tokens_) check_token(token, "end tokens");
  }

  void index_pieces() {
    index_.reserve(vocab_size());
    for (std::size_t token = 0; token < vocab_size(); ++token)
      if (!pieces_[token].empty()) index_.try_emplace(pieces_[token], static_cast<Token>(token));
  }

  void check_added(const AddedToken& token) const {
    check_token(token.id, "added token");
    const std::string field = "added token " + std::to_string(token.id);
    if (token.content.empty()) bad("added token is empty", field, "text", "none");
    const std::size_t invalid = detail::find_invalid_utf8(token.content);
    if (invalid != std::string::npos)
      bad("added token is not valid UTF-8", field, "valid UTF-8",
          detail::quote_text(token.content));
  }

  // What each token stands for, one after the other.
  void store_bytes(const TokenizerSpec& spec) {
    std::vector<const AddedToken*> added(vocab_size(), nullptr);
    for (const AddedToken& token : spec.added) added[static_cast<std::size_t>(token.id)] = &token;
    byte_ends_.reserve(vocab_size() + 1);
    byte_ends_.push_back(0);
    special_.assign(vocab_size(), false);
    for (std::size_t at = 0; at < vocab_size(); ++at) {
      const TokenType kind = type(static_cast<Token>(at));
      // A token that is matched in normalised text stands for that, as its neighbours do.
      std::string text = added[at] != nullptr ? added[at]->content : pieces_[at];
      if (kind == TokenType::kByte) {
        const auto byte = detail::byte_of_piece(text);
        if (!byte)
          bad("byte token does not name a byte", "token " + std::to_string(at),
              "'<0x00>' to '<0xFF>'", detail::quote_text(text));
        text.assign(1, static_cast<char>(*byte));
      } else if (byte_level_) {
        if (added[at] == nullptr)
          if (auto bytes = detail::unspell_bytes(text)) text = std::move(*bytes);
      } else {
        detail::replace_all(text, spec.space_mark, " ");
      }
      bytes_.insert(bytes_.end(), text.begin(), text.end());
      byte_ends_.push_back(bytes_.size());
      max_bytes_ = std::max(max_bytes_, text.size());
      special_[at] = kind == TokenType::kControl || kind == TokenType::kUnknown;
    }
    for (const AddedToken& token : spec.added)
      if (token.special) special_[static_cast<std::size_t>(token.id)] = true;
  }

  // Which token stands for which single byte.
  void index_bytes() {
    byte_tokens_.fill(kNone);
    for (unsigned byte = 0; byte < 256; ++byte) {
      std::string name;
      if (byte_level_) {
        const char bytes[] = {static_cast<char>(byte)};
        name = detail::spell_bytes({bytes, 1});
      } else {
        constexpr std::string_view kDigits = "0123456789ABCDEF";
        name = {'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'};
      }
      if (const auto token = find(name)) byte_tokens_[byte] = *token;
    }
  }

  void index_merges(const TokenizerSpec& spec) {
    for (const std::string& piece : pieces_) max_piece_ = std::max(max_piece_, piece.size());
    if (model_ != TokenizerSpec::Model::kRankedMerges) return;
    merges_ = detail::MergeTable(spec.merges.size());
    for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
      const auto& [left, right] = spec.merges[rank];
      const auto token = [&](const std::string& piece) {
        const auto found = find(piece);
        if (!found)
          bad("merge of something that is not in the vocabulary",
              "merges[" + std::to_string(rank) + "]", "pieces of the vocabulary",
              detail::quote_text(piece));
        return *found;
      };
      const Token first = token(left);
      const Token second = token(right);
      merges_.insert(first, second, static_cast<std::uint32_t>(rank), token(left + right));
    }
  }

  void compile(TokenizerSpec& spec) {
    for (NormalizerStep& step : spec.normalizer) {
      CompiledNormalizer compiled{std::move(step)};
      if (compiled.step.kind == NormalizerStep::Kind::kReplaceRegex)
        compiled.regex.emplace(compiled.step.pattern, where_);
      normalizer_.push_back(std::move(compiled));
    }
    for (PreTokenizerStep& step : spec.pre_tokenizer) {
      CompiledPreTokenizer compiled{std::move(step)};
      if (compiled.step.kind == PreTokenizerStep::Kind::kSplitRegex)
        compiled.regex.emplace(compiled.step.pattern, where_);
      if (compiled.step.kind == PreTokenizerStep::Kind::kMetaspace && compiled.step.pattern.empty())
        bad("space mark is empty", "pre-tokeniser", "a character", "none");
      pre_tokenizer_.push_back(std::move(compiled));
    }
  }

  void index_added(TokenizerSpec& spec) {
    for (AddedToken& token : spec.added) {
      if (!token.content.empty())
        (token.normalized ? added_normalized_ : added_).add(std::move(token));
    }
  }

  void collect_end_tokens() {
    constexpr std::array<std::string_view, 10> kNames = {
        "<|im_end|>", "<|eot_id|>",    "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>",
        "<|end|>",    "<end_of_turn>", "<|eot|>",    "<EOT>",           "</s>"};
    if (eos_) end_tokens_.push_back(*eos_);
    for (const std::string_view name : kNames)
      if (const auto token = find(name); token && is_special(*token)) end_tokens_.push_back(*token);
    std::sort(end_tokens_.begin(), end_tokens_.end());
    end_tokens_.erase(std::unique(end_tokens_.begin(), end_tokens_.end()), end_tokens_.end());
  }

  // --- encoding -------------------------------------------------------------------------------

  // Calls on_token for the added tokens in `text` and on_text for the ranges between them. A token
  // that is found but not wanted is text, and the search goes on behind it.
  template <class OnToken, class OnText>
  static void split_added(std::string_view text, const detail::AddedMatcher& added,
                          bool parse_special, OnToken on_token, OnText on_text) {
    std::size_t done = 0;
    for (std::size_t at = added.empty() ? text.size() : 0; at < text.size();) {
      const AddedToken* const token = added.longest_at(text, at);
      if (token == nullptr) {
        ++at;
        continue;
      }
      std::size_t begin = at;
      std::size_t end = at = begin + token->content.size();
      if (token->special && !parse_special) continue;
      if (token->single_word &&
          (touches_word_before(text.substr(0, begin)) || touches_word_after(text.substr(end))))
        continue;
      if (token->lstrip) begin -= detail::trailing_space(text.substr(0, begin));
      if (token->rstrip) end += detail::leading_space(text.substr(end));
      if (done < begin) on_text(detail::ByteRange{done, begin});
      on_token(token->id);
      done = std::max(done, end);
    }
    if (done < text.size()) on_text(detail::ByteRange{done, text.size()});
  }
  static bool touches_word_before(std::string_view text) {
    return !text.empty() &&
           detail::is_word(detail::scan_utf8(text.substr(detail::last_character(text))).code);
  }
  static bool touches_word_after(std::string_view text) {
    return !text.empty() && detail::is_word(detail::scan_utf8(text).code);
  }

  std::string normalise(std::string_view part) const {
    std::string text(part);
    for (const CompiledNormalizer& compiled : normalizer_) {
      if (text.empty()) break;
      const NormalizerStep& step = compiled.step;
      switch (step.kind) {
        case NormalizerStep::Kind::kPrepend: text.insert(0, step.content); break;
        case NormalizerStep::Kind::kReplace:
          detail::replace_all(text, step.pattern, step.content);
          break;
        case NormalizerStep::Kind::kReplaceRegex: {
          std::string result;
          std::size_t done = 0;
          compiled.regex->for_each(text, [&](detail::ByteRange match) {
            result.append(text, done, match.begin - done).append(step.content);
            done = match.end;
          });
          result.append(text, done);
          text = std::move(result);
          break;
        }
        case NormalizerStep::Kind::kNfc: text = detail::normal_form(text, UTF8PROC_COMPOSE); break;
        case NormalizerStep::Kind::kNfd:
          text = detail::normal_form(text, UTF8PROC_DECOMPOSE);
          break;
        case NormalizerStep::Kind::kNfkc:
          text = detail::normal_form(text, UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
          break;
        case NormalizerStep::Kind::kNfkd:
          text = detail::normal_form(text, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
          break;
        case NormalizerStep::Kind::kLowercase: text = detail::lower_case(text); break;
        case NormalizerStep::Kind::kStrip:
          if (step.right) text.resize(text.size() - detail::trailing_space(text));
          if (step.left) text.erase(0, detail::leading_space(text));
          break;
      }
    }
    return text;
  }

  void encode_part(std::string_view part, bool starts_text, Scratch& scratch,
                   std::vector<Token>& tokens) const {
    std::string text(part);
    std::vector<Word> words{{{0, text.size()}, starts_text}};
    for (const CompiledPreTokenizer& compiled : pre_tokenizer_) {
      switch (compiled.step.kind) {
        case PreTokenizerStep::Kind::kSplitText:
        case PreTokenizerStep::Kind::kSplitRegex: split(compiled, text, words); break;
        case PreTokenizerStep::Kind::kSpacePrefix:
        case PreTokenizerStep::Kind::kMetaspace: rewrite(compiled.step, text, words); break;
      }
    }
    for (const Word& word : words)
      encode_word(
          std::string_view(text).substr(word.range.begin, word.range.end - word.range.begin),
          scratch, tokens);
  }

  static void split(const CompiledPreTokenizer& compiled, std::string_view text,
                    std::vector<Word>& words) {
    struct Piece {
      detail::ByteRange range;
      bool is_match;
    };
    const PreTokenizerStep& step = compiled.step;
    std::vector<Word> result;
    std::vector<Piece> pieces;
    for (const Word& word : words) {
      const std::string_view body =
          text.substr(word.range.begin, word.range.end - word.range.begin);
      pieces.clear();
      std::size_t done = 0;
      const auto on_match = [&](detail::ByteRange match) {
        if (done < match.begin) pieces.push_back({{done, match.begin}, step.invert});
        pieces.push_back({match, !step.invert});
        done = match.end;
      };
      if (compiled.regex) {
        compiled.regex->for_each(body, on_match);
      } else if (!step.pattern.empty()) {
        for (std::size_t at = 0; (at = body.find(step.pattern, at)) != std::string_view::npos;
             at += step.pattern.size())
          on_match({at, at + step.pattern.size()});
      }
      if (done < body.size()) pieces.push_back({{done, body.size()}, step.invert});

      // Joining is decided between neighbours: does this piece continue the one before it?
      const std::size_t first = result.size();
      for (std::size_t i = 0; i < pieces.size(); ++i) {
        const bool is_match = pieces[i].is_match;
        const bool after_match = i > 0 && pieces[i - 1].is_match;
        bool joins = false;
        switch (step.behavior) {
          case SplitBehavior::kRemoved:
            if (is_match) continue;
            break;
          case SplitBehavior::kIsolated: break;
          case SplitBehavior::kMergedWithPrevious: joins = i > 0 && is_match && !after_match; break;
          case SplitBehavior::kMergedWithNext: joins = i > 0 && !is_match && after_match; break;
          case SplitBehavior::kContiguous: joins = i > 0 && is_match == after_match; break;
        }
        const detail::ByteRange range{word.range.begin + pieces[i].range.begin,
                                      word.range.begin + pieces[i].range.end};
        if (joins && result.size() > first) {
          result.back().range.end = range.end;
        } else {
          result.push_back({range, word.starts_text && pieces[i].range.begin == 0});
        }
      }
    }
    std::erase_if(result, [](const Word& word) { return word.range.begin == word.range.end; });
    words = std::move(result);
  }

  static void rewrite(const PreTokenizerStep& step, std::string& text, std::vector<Word>& words) {
    const bool marks = step.kind == PreTokenizerStep::Kind::kMetaspace;
    const std::string_view mark = marks ? std::string_view(step.pattern) : " ";
    std::string result;
    for (Word& word : words) {
      std::string body = text.substr(word.range.begin, word.range.end - word.range.begin);
      if (marks) detail::replace_all(body, " ", mark);
      const bool prepends = !marks || step.prepend == PreTokenizerStep::Prepend::kAlways ||
                            (step.prepend == PreTokenizerStep::Prepend::kFirst && word.starts_text);
      word.range.begin = result.size();
      if (prepends && !body.starts_with(mark)) result += mark;
      result += body;
      word.range.end = result.size();
    }
    text = std::move(result);
  }

  void encode_word(std::string_view word, Scratch& scratch, std::vector<Token>& tokens) const {
    if (word.empty()) return;
    if (word.size() > 0x7FFFFFFF)
      throw Error(ErrorCode::kCapacity,
                  {"word is too long", where_, "text", "below 2 GiB", std::to_string(word.size())});
    if (ignore_merges_) {
      if (const auto token = find(byte_level_ ? detail::spell_bytes(word) : std::string(word))) {
        tokens.push_back(*token);
        return;
      }
    }
    cut(word, scratch.symbols);
    merge(word, scratch);
    bool after_unknown = false;
    for (const Symbol& symbol : scratch.symbols) {
      if (symbol.length == 0) continue;
      if (symbol.token != kNone) {
        tokens.push_back(symbol.token);
        after_unknown = false;
      } else if (!(byte_fallback_ &&
                   push_bytes(word.substr(symbol.begin, symbol.length), tokens))) {
        if (unknown_ && !(fuse_unknown_ && after_unknown)) tokens.push_back(*unknown_);
        after_unknown = true;
      }
    }
  }

  // A word's first symbols: bytes, or characters.
  void cut(std::string_view word, std::vector<Symbol>& symbols) const {
    symbols.clear();
    const auto add = [&](std::size_t begin, std::size_t length, Token token) {
      const auto at = static_cast<std::ptrdiff_t>(symbols.size());
      if (at > 0) symbols.back().next = at;
      symbols.push_back({begin, length, at - 1, -1, token});
    };
    for (std::size_t at = 0; at < word.size();) {
      if (byte_level_) {
        const Token token = byte_tokens_[static_cast<unsigned char>(word[at])];
        if (token != kNone || unknown_) add(at, 1, token);
        ++at;
        continue;
      }
      const std::size_t length = detail::scan_utf8(word.substr(at)).length;
      const std::string_view character = word.substr(at, length);
      const Token token = find_text(character);
      // Ranked merges may join byte tokens, so these exist before merging; scored ones look at
      // text.
      if (token == kNone && byte_fallback_ && model_ == TokenizerSpec::Model::kRankedMerges &&
          has_bytes(character)) {
        for (std::size_t i = 0; i < length; ++i)
          add(at + i, 1, byte_tokens_[static_cast<unsigned char>(word[at + i])]);
      } else if (token != kNone || unknown_ || model_ == TokenizerSpec::Model::kScoredMerges) {
        add(at, length, token);
      }
      at += length;
    }
  }

  // The piece with this text that encoding may produce.
  Token find_text(std::string_view text) const {
    const auto found = index_.find(text);
    if (found == index_.end()) return kNone;
    const TokenType kind = type(found->second);
    return kind == TokenType::kNormal || kind == TokenType::kUserDefined ? found->second : kNone;
  }
  bool has_bytes(std::string_view text) const {
    return std::all_of(text.begin(), text.end(), [&](char byte) {
      return byte_tokens_[static_cast<unsigned char>(byte)] != kNone;
    });
  }
  bool push_bytes(std::string_view text, std::vector<Token>& tokens) const {
    if (!has_bytes(text)) return false;
    for (const char byte : text) tokens.push_back(byte_tokens_[static_cast<unsigned char>(byte)]);
    return true;
  }

  void merge(std::string_view word, Scratch& scratch) const {
    std::vector<Symbol>& symbols = scratch.symbols;
    std::vector<Candidate>& heap = scratch.heap;
    heap.clear();
    const auto consider = [&](std::ptrdiff_t left, std::ptrdiff_t right) {
      if (left < 0 || right < 0) return false;
      const Symbol& a = symbols[static_cast<std::size_t>(left)];
      const Symbol& b = symbols[static_cast<std::size_t>(right)];
      const std::size_t length = a.length + b.length;
      if (model_ == TokenizerSpec::Model::kRankedMerges) {
        const auto* const found = merges_.find(a.token, b.token);
        if (found == nullptr) return false;
        heap.push_back({static_cast<double>(found->rank), static_cast<std::size_t>(left), length,
                        found->result});
      } else {
        if (length > max_piece_) return false;  // keeps a look-up O(1) however long the word is
        const Token token = find_text(word.substr(a.begin, length));
        if (token == kNone) return false;
        heap.push_back({-static_cast<double>(scores_[static_cast<std::size_t>(token)]),
                        static_cast<std::size_t>(left), length, token});
      }
      return true;
    };
    for (std::size_t i = 1; i < symbols.size(); ++i)
      consider(static_cast<std::ptrdiff_t>(i) - 1, static_cast<std::ptrdiff_t>(i));
    std::make_heap(heap.begin(), heap.end());
    while (!heap.empty()) {
      const Candidate best = heap.front();
      std::pop_heap(heap.begin(), heap.end());
      heap.pop_back();
      Symbol& left = symbols[best.left];
      if (left.length == 0 || left.next < 0) continue;
      Symbol& right = symbols[static_cast<std::size_t>(left.next)];
      if (left.length + right.length != best.length) continue;
      left.token = best.result;
      left.length = best.length;
      left.next = right.next;
      right.length = 0;
      const auto at = static_cast<std::ptrdiff_t>(best.left);
      if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = at;
      if (consider(left.previous, at)) std::push_heap(heap.begin(), heap.end());
      if (consider(at, left.next)) std::push_heap(heap.begin(), heap.end());
    }
  }

  std::string where_;
  std::vector<std::string> pieces_;  // [vocab_size]; never changed: index_ has views into it
  std::vector<TokenType> types_;     // [vocab_size] or empty
  std::vector<float> scores_;        // [vocab_size] or empty
  TokenizerSpec::Model model_;
  bool byte_level_;
  bool byte_fallback_;
  bool fuse_unknown_;
  bool ignore_merges_;
  bool drop_leading_space_;
  std::optional<Token> bos_, eos_, unknown_;
  std::vector<Token> prefix_, suffix_, end_tokens_;
  std::string chat_template_;

  std::unordered_map<std::string_view, Token> index_;
  std::vector<char> bytes_;             // of all tokens, one after the other
  std::vector<std::size_t> byte_ends_;  // [vocab_size + 1]: where each token's bytes begin
  std::vector<bool> special_;           // [vocab_size]
  std::size_t max_bytes_ = 0;
  std::size_t max_piece_ = 0;  // bytes of the longest piece, as spelled
  std::array<Token, 256> byte_tokens_{};
  detail::MergeTable merges_;
  std::vector<CompiledNormalizer> normalizer_;
  std::vector<CompiledPreTokenizer> pre_tokenizer_;
  detail::AddedMatcher added_;             // matched in the text as it is
  detail::AddedMatcher added_normalized_;  // matched in normalised text
};

}  // namespace sluice
