// SPDX-License-Identifier: MIT
/// The syntax of chat templates (a part of Jinja 2, see jinja.hpp): values, the syntax tree, the
/// lexer and the parser. Source is untrusted: its length and nesting are bounded.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/detail/unicode.hpp"

namespace sluice::detail::jinja {

// Real templates stay below a tenth of both.
inline constexpr std::size_t kMaxSourceBytes = 1 << 20;
inline constexpr int kMaxDepth = 150;  // of expressions, blocks and values: bounds the stack

// ---- values ------------------------------------------------------------------------------------

struct List;
struct Dict;
struct Undefined {
  std::string_view name;  // what was looked for; lives as long as the template
};
struct None {};
struct Function {
  std::string_view name;
};
using Text = std::shared_ptr<const std::string>;
// Lists and dictionaries belong to the rendering, not to values: they may refer to each other.
using Value =
    std::variant<Undefined, None, bool, std::int64_t, double, Text, List*, Dict*, Function>;

struct List {
  std::vector<Value> items;
  bool is_tuple = false;
};
struct Dict {
  enum class Kind { kMapping, kNamespace, kLoop };
  std::vector<std::pair<std::string, Value>> items;  // in the order of insertion
  Kind kind = Kind::kMapping;

  const Value* find(std::string_view key) const {
    for (const auto& [name, value] : items)
      if (name == key) return &value;
    return nullptr;
  }
  void set(std::string_view key, Value value) {
    for (auto& [name, old] : items) {
      if (name == key) {
        old = std::move(value);
        return;
      }
    }
    items.emplace_back(std::string(key), std::move(value));
  }
};

inline Value make_text(std::string text) {
  return std::make_shared<const std::string>(std::move(text));
}
template <class T>
bool is(const Value& value) {
  return std::holds_alternative<T>(value);
}
inline const std::string& text_of(const Value& value) {
  return *std::get<Text>(value);
}

// ---- syntax tree -------------------------------------------------------------------------------

enum class ExprKind {
  kLiteral,
  kName,         // text
  kList,         // children
  kTuple,        // children
  kDict,         // children: key, value, key, value, ...
  kAttribute,    // children[0] . text
  kItem,         // children[0] [ children[1] ]
  kSlice,        // children[0] [ children[1] : children[2] : children[3] ], each may be null
  kCall,         // children[0] ( children[1...], named )
  kFilter,       // children[0] | text ( children[1...], named )
  kTest,         // children[0] is text ( children[1...] )
  kUnary,        // text children[0]
  kBinary,       // children[0] text children[1]
  kCompare,      // children[0] operators[0] children[1] operators[1] ...
  kConditional,  // children[1] if children[0] else children[2], which may be null
};

struct Expr {
  ExprKind kind;
  std::size_t offset;  // in the source
  std::string text = {};
  Value literal = {};
  std::vector<std::unique_ptr<Expr>> children = {};
  std::vector<std::pair<std::string, std::unique_ptr<Expr>>> named = {};
  std::vector<std::string> operators = {};
  int depth = 1;
};
using ExprPtr = std::unique_ptr<Expr>;

enum class StatementKind { kText, kOutput, kIf, kFor, kSet, kSetBlock, kBreak, kContinue, kGroup };

struct Statement;
struct Branch {
  ExprPtr condition;  // null: always
  std::vector<Statement> body;
};

struct Statement {
  StatementKind kind;
  std::size_t offset;
  std::string text = {};                // kText; kSet: the attribute of a namespace, or empty
  std::vector<std::string> names = {};  // kFor, kSet: what is assigned
  ExprPtr value = nullptr;              // kOutput, kSet; kFor: what is walked over
  ExprPtr filter = nullptr;             // kFor: which elements
  std::vector<Branch> branches = {};    // kIf: in order; kFor: body, else; others: body
};
struct Template {
  std::string source;
  std::vector<Statement> body;
};

/// "line 3, column 7" of a byte in the source.
inline std::string position(std::string_view source, std::size_t offset) {
  const std::string_view before = source.substr(0, offset);
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  const std::size_t start = before.rfind('\n') + 1;  // npos + 1 is 0
  return "line " + std::to_string(line) + ", column " + std::to_string(before.size() - start + 1);
}

// Without `found`, the error quotes the source there.
[[noreturn]] inline void fail(ErrorCode code, std::string_view source, std::size_t offset,
                              std::string what, std::string expected = "", std::string found = "") {
  if (found.empty()) found = quote_text(source.substr(offset).substr(0, 40));
  throw Error(code, {std::move(what), "chat template", position(source, offset),
                     std::move(expected), std::move(found)});
}

/// What Python's str.isspace says.
inline bool is_python_space(char32_t code) {
  return is_space(code) || (code >= 0x1C && code <= 0x1F);
}

// ---- lexer -------------------------------------------------------------------------------------

struct Lexeme {
  enum class Kind {
    kData,
    kOutputBegin,
    kOutputEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string text;
  std::size_t offset;
};

/// Cuts a source into lexemes. White space around tags is taken away here, as in Jinja's lexer.
class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  std::vector<Lexeme> run() {
    while (at_ < source_.size()) {
      const std::size_t tag = find_tag();
      if (tag == std::string_view::npos) {
        add(Lexeme::Kind::kData, std::string(source_.substr(at_)), at_);
        at_ = source_.size();
        break;
      }
      const std::size_t start = at_;
      std::string text(source_.substr(start, tag - start));
      at_ = tag + 2;
      const char sign = at_ < source_.size() && (source_[at_] == '-' || source_[at_] == '+')
                            ? source_[at_++]
                            : '\0';
      trim_before(text, sign, source_[tag + 1] != '{', line_start_);
      if (!text.empty()) add(Lexeme::Kind::kData, std::move(text), start);
      switch (source_[tag + 1]) {
        case '#': comment(tag); break;
        case '{': inside(tag, Lexeme::Kind::kOutputBegin, Lexeme::Kind::kOutputEnd, "}}"); break;
        default:
          if (!raw(tag)) inside(tag, Lexeme::Kind::kBlockBegin, Lexeme::Kind::kBlockEnd, "%}");
      }
    }
    add(Lexeme::Kind::kEnd, "", source_.size());
    return std::move(lexemes_);
  }

 private:
  std::size_t find_tag() const {
    for (std::size_t at = source_.find('{', at_); at != std::string_view::npos;
         at = source_.find('{', at + 1)) {
      const char next = at + 1 < source_.size() ? source_[at + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return at;
    }
    return std::string_view::npos;
  }

  static void trim_before(std::string& text, char sign, bool is_block, bool starts_line) {
    if (sign == '-') {
      text.resize(text.size() - trailing_python_space(text));
    } else if (sign != '+' && is_block) {  // lstrip_blocks
      const std::size_t line = text.rfind('\n') + 1;
      if ((line > 0 || starts_line) && trailing_python_space(text) >= text.size() - line)
        text.resize(line);
    }
  }
  static std::size_t trailing_python_space(std::string_view text) {
    std::size_t end = text.size();
    while (end > 0) {
      const std::size_t at = last_character(text.substr(0, end));
      if (!is_python_space(scan_utf8(text.substr(at)).code)) break;
      end = at;
    }
    return text.size() - end;
  }
  void skip_space() {
    while (at_ < source_.size()) {
      const Utf8Unit unit = scan_utf8(source_.substr(at_));
      if (!is_python_space(unit.code)) break;
      at_ += unit.length;
    }
  }

  // The end of a tag at at_: "-%}" takes the white space after it, "%}" one newline (trim_blocks).
  bool tag_end(std::string_view end, bool trims_line) {
    const std::string_view rest = source_.substr(at_);
    if (rest.starts_with(end)) {
      at_ += end.size();
      line_start_ = trims_line && source_.substr(at_).starts_with('\n');
      if (line_start_) ++at_;
      return true;
    }
    if (rest.empty() || !rest.substr(1).starts_with(end)) return false;
    if (rest[0] == '-') {
      at_ += 1 + end.size();
      skip_space();
      line_start_ = source_[at_ - 1] == '\n';
      return true;
    }
    if (rest[0] == '+' && trims_line) {
      at_ += 1 + end.size();
      line_start_ = false;
      return true;
    }
    return false;
  }

  void comment(std::size_t tag) {
    for (; at_ < source_.size(); ++at_)
      if (tag_end("#}", true)) return;
    fail(ErrorCode::kFormat, source_, tag, "comment without an end", "'#}'", "the end");
  }

  bool raw(std::size_t tag) {
    const std::size_t after_sign = at_;
    const auto word = [&](std::string_view name) {
      skip_space();
      if (!source_.substr(at_).starts_with(name)) return false;
      at_ += name.size();
      skip_space();
      return true;
    };
    if (!word("raw") || !tag_end("%}", false)) {
      at_ = after_sign;
      return false;
    }
    const std::size_t start = at_;
    const bool starts_line = line_start_;
    for (std::size_t end = start; (end = source_.find("{%", end)) != std::string_view::npos;
         ++end) {
      at_ = end + 2;
      const char sign = at_ < source_.size() && (source_[at_] == '-' || source_[at_] == '+')
                            ? source_[at_++]
                            : '\0';
      if (!word("endraw") || !tag_end("%}", true)) continue;
      std::string text(source_.substr(start, end - start));
      trim_before(text, sign, true, starts_line);
      if (!text.empty()) add(Lexeme::Kind::kData, std::move(text), start);
      return true;
    }
    fail(ErrorCode::kFormat, source_, tag, "raw block without an end", "endraw", "the end");
  }

  void inside(std::size_t tag, Lexeme::Kind begin, Lexeme::Kind end, std::string_view closing) {
    add(begin, "", tag);
    std::string open;  // closing brackets that are due: "}}" inside them ends no tag
    while (at_ < source_.size()) {
      skip_space();
      const std::size_t offset = at_;
      if (open.empty() && tag_end(closing, closing == "%}")) {
        add(end, "", offset);
        return;
      }
      if (at_ == source_.size()) break;
      const char character = source_[at_];
      if (is_digit(character)) {
        number();
      } else if (is_name(character)) {
        while (at_ < source_.size() && (is_name(source_[at_]) || is_digit(source_[at_]))) ++at_;
        add(Lexeme::Kind::kName, std::string(source_.substr(offset, at_ - offset)), offset);
      } else if (character == '\'' || character == '"') {
        string();
      } else {
        operation(open);
      }
    }
    fail(ErrorCode::kFormat, source_, tag, "tag without an end", quote_text(closing), "the end");
  }

  static bool is_digit(char character) { return character >= '0' && character <= '9'; }
  static bool is_name(char character) {
    return (character >= 'a' && character <= 'z') || (character >= 'A' && character <= 'Z') ||
           character == '_' || static_cast<unsigned char>(character) >= 0x80;
  }

  void number() {
    const std::size_t offset = at_;
    const auto digits = [&] {
      while (at_ < source_.size() &&
             (is_digit(source_[at_]) ||
              (source_[at_] == '_' && at_ + 1 < source_.size() && is_digit(source_[at_ + 1]))))
        ++at_;
    };
    const auto digit_at = [&](std::size_t at) {
      return at < source_.size() && is_digit(source_[at]);
    };
    digits();
    bool is_float = false;
    const bool after_dot = offset > 0 && source_[offset - 1] == '.';  // x.0: an attribute
    if (!after_dot && at_ < source_.size() && source_[at_] == '.' && digit_at(at_ + 1)) {
      is_float = true;
      ++at_;
      digits();
    }
    if (!after_dot && at_ < source_.size() && (source_[at_] == 'e' || source_[at_] == 'E')) {
      const std::size_t sign =
          at_ + 1 < source_.size() && (source_[at_ + 1] == '+' || source_[at_ + 1] == '-') ? 1 : 0;
      if (digit_at(at_ + 1 + sign)) {
        is_float = true;
        at_ += 1 + sign;
        digits();
      }
    }
    std::string text(source_.substr(offset, at_ - offset));
    std::erase(text, '_');
    if (at_ < source_.size() && is_name(source_[at_]))
      fail(ErrorCode::kFormat, source_, at_, "number runs into a name", "a decimal number",
           quote_text(source_.substr(offset, 16)));
    add(is_float ? Lexeme::Kind::kFloat : Lexeme::Kind::kInteger, std::move(text), offset);
  }

  void string() {
    const std::size_t offset = at_;
    const char quote = source_[at_++];
    std::string text;
    while (at_ < source_.size() && source_[at_] != quote) {
      if (source_[at_] != '\\') {
        text += source_[at_++];
      } else if (++at_ < source_.size()) {
        escape(text, offset);
      }
    }
    if (at_ >= source_.size())
      fail(ErrorCode::kFormat, source_, offset, "string without an end", std::string(1, quote),
           "the end");
    ++at_;
    add(Lexeme::Kind::kString, std::move(text), offset);
  }

  // Python's escapes; an unknown one stays as it is written.
  void escape(std::string& text, std::size_t offset) {
    constexpr std::string_view kNames = "ntr\\'\"abfv";
    constexpr std::string_view kValues = "\n\t\r\\'\"\a\b\f\v";
    const char name = source_[at_++];
    if (const std::size_t found = kNames.find(name); found != std::string_view::npos) {
      text += kValues[found];
    } else if (name == '\n') {  // a line that goes on
    } else if (name >= '0' && name <= '7') {
      unsigned code = static_cast<unsigned>(name - '0');
      for (int i = 0; i < 2 && at_ < source_.size() && source_[at_] >= '0' && source_[at_] <= '7';
           ++i)
        code = code * 8 + static_cast<unsigned>(source_[at_++] - '0');
      append_utf8(text, code);
    } else if (name == 'x' || name == 'u' || name == 'U') {
      const std::size_t length = name == 'x' ? 2 : name == 'u' ? 4 : 8;
      const std::string_view digits = source_.substr(at_, length);
      std::uint32_t code = 0;
      const auto [end, status] =
          std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
      if (status != std::errc() || digits.size() != length || end != digits.data() + length ||
          code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
        fail(ErrorCode::kFormat, source_, offset, "string with a broken escape",
             std::to_string(length) + " hexadecimal digits of a character", quote_text(digits));
      append_utf8(text, code);
      at_ += length;
    } else if (name == 'N') {
      fail(ErrorCode::kUnsupported, source_, offset, "escape that names a character");
    } else {
      text += {'\\', name};
    }
  }

  void operation(std::string& open) {
    constexpr std::array<std::string_view, 27> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]",
        "(",  ")",  "{",  "}",  ">",  "<",  "=", ".", ":", "|", ",", ";", "!"};
    const std::size_t offset = at_;
    for (const std::string_view name : kOperators) {
      if (!source_.substr(at_).starts_with(name)) continue;
      at_ += name.size();
      if (name == "(" || name == "[" || name == "{")
        open += name == "(" ? ')' : name == "[" ? ']' : '}';
      if (name == ")" || name == "]" || name == "}") {
        if (open.empty() || open.back() != name[0])
          fail(ErrorCode::kFormat, source_, offset, "bracket that does not match",
               open.empty() ? "none" : std::string(1, open.back()), std::string(name));
        open.pop_back();
      }
      add(Lexeme::Kind::kOperator, std::string(name), offset);
      return;
    }
    fail(ErrorCode::kFormat, source_, offset, "character that starts nothing", "",
         quote_text(source_.substr(offset, 1)));
  }

  void add(Lexeme::Kind kind, std::string text, std::size_t offset) {
    lexemes_.push_back({kind, std::move(text), offset});
  }

  std::string_view source_;
  std::size_t at_ = 0;
  bool line_start_ = true;  // whether the text after the last tag starts a line
  std::vector<Lexeme> lexemes_;
};

// ---- parser ------------------------------------------------------------------------------------

/// Recursive descent with Jinja's precedences.
class Parser {
 public:
  explicit Parser(std::string_view source) : source_(source), lexemes_(Lexer(source).run()) {}

  std::vector<Statement> run() { return statements({}, lexemes_.front().offset); }

 private:
  using Kind = Lexeme::Kind;

  // Counts how deep the parser's own calls nest.
  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.depth_ > kMaxDepth)
        fail(ErrorCode::kCapacity, parser_.source_, parser_.peek().offset,
             "template is nested too deeply", "at most " + std::to_string(kMaxDepth) + " levels",
             "more");
    }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;
    ~Nested() { --parser_.depth_; }

   private:
    Parser& parser_;
  };

  const Lexeme& peek(std::size_t ahead = 0) const {
    return lexemes_[std::min(at_ + ahead, lexemes_.size() - 1)];
  }
  const Lexeme& next() {
    const Lexeme& lexeme = peek();
    if (at_ + 1 < lexemes_.size()) ++at_;
    return lexeme;
  }
  bool is_operator(std::string_view name, std::size_t ahead = 0) const {
    return peek(ahead).kind == Kind::kOperator && peek(ahead).text == name;
  }
  bool is_word(std::string_view name, std::size_t ahead = 0) const {
    return peek(ahead).kind == Kind::kName && peek(ahead).text == name;
  }
  bool skip_operator(std::string_view name) { return is_operator(name) && (next(), true); }
  bool skip_word(std::string_view name) { return is_word(name) && (next(), true); }
  void expect_operator(std::string_view name) {
    if (!skip_operator(name)) unexpected(quote_text(name));
  }
  void expect(Kind kind, std::string_view what) {
    if (peek().kind != kind) unexpected(std::string(what));
    next();
  }
  std::string expect_name() {
    if (peek().kind != Kind::kName) unexpected("a name");
    return next().text;
  }
  [[noreturn]] void unexpected(std::string expected) const {
    const Lexeme& lexeme = peek();
    std::string found;
    switch (lexeme.kind) {
      case Kind::kEnd: found = "the end"; break;
      case Kind::kData: found = "text"; break;
      case Kind::kOutputBegin:
      case Kind::kBlockBegin: found = "a tag"; break;
      case Kind::kOutputEnd:
      case Kind::kBlockEnd: found = "the end of the tag"; break;
      default: found = quote_text(lexeme.text);
    }
    fail(ErrorCode::kFormat, source_, lexeme.offset, "template syntax", std::move(expected),
         std::move(found));
  }

  // --- statements ---

  // Up to a tag that starts with one of `ends`, whose name is then the next lexeme.
  std::vector<Statement> statements(std::span<const std::string_view> ends, std::size_t opened) {
    const Nested nested(*this);
    std::vector<Statement> body;
    while (true) {
      const Lexeme& lexeme = next();
      switch (lexeme.kind) {
        case Kind::kEnd:
          if (!ends.empty())
            fail(ErrorCode::kFormat, source_, opened, "block without an end",
                 std::string(ends.back()), "the end");
          return body;
        case Kind::kData:
          body.push_back(
              {.kind = StatementKind::kText, .offset = lexeme.offset, .text = lexeme.text});
          break;
        case Kind::kOutputBegin:
          body.push_back(
              {.kind = StatementKind::kOutput, .offset = lexeme.offset, .value = tuple()});
          expect(Kind::kOutputEnd, "'}}'");
          break;
        default:
          for (const std::string_view end : ends)
            if (is_word(end)) return body;
          body.push_back(statement(lexeme.offset));
          expect(Kind::kBlockEnd, "'%}'");
      }
    }
  }
  std::vector<Statement> block(std::span<const std::string_view> ends, std::size_t opened) {
    expect(Kind::kBlockEnd, "'%}'");
    return statements(ends, opened);
  }

  Statement statement(std::size_t offset) {
    const std::string name = expect_name();
    if (name == "if") return if_statement(offset);
    if (name == "for") return for_statement(offset);
    if (name == "set") return set_statement(offset);
    if (name == "generation") {
      static constexpr std::array<std::string_view, 1> kEnds = {"endgeneration"};
      Statement result{.kind = StatementKind::kGroup, .offset = offset};
      result.branches.push_back({nullptr, block(kEnds, offset)});
      next();
      return result;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) fail(ErrorCode::kFormat, source_, offset, name + " outside of a loop");
      return {.kind = name == "break" ? StatementKind::kBreak : StatementKind::kContinue,
              .offset = offset};
    }
    constexpr std::array<std::string_view, 13> kKnown = {
        "macro", "call", "filter", "include",    "import", "from", "extends",
        "block", "with", "do",     "autoescape", "trans",  "debug"};
    if (std::find(kKnown.begin(), kKnown.end(), name) != kKnown.end())
      fail(ErrorCode::kUnsupported, source_, offset, "statement " + quote_text(name));
    fail(ErrorCode::kFormat, source_, offset, "template syntax", "a statement", quote_text(name));
  }

  Statement if_statement(std::size_t offset) {
    static constexpr std::array<std::string_view, 3> kEnds = {"elif", "else", "endif"};
    static constexpr std::array<std::string_view, 1> kLast = {"endif"};
    Statement result{.kind = StatementKind::kIf, .offset = offset};
    while (true) {
      ExprPtr condition = tuple();
      result.branches.push_back({std::move(condition), block(kEnds, offset)});
      const std::string end = next().text;
      if (end == "elif") continue;
      if (end == "else") {
        result.branches.push_back({nullptr, block(kLast, offset)});
        next();
      }
      return result;
    }
  }

  Statement for_statement(std::size_t offset) {
    static constexpr std::array<std::string_view, 2> kEnds = {"else", "endfor"};
    static constexpr std::array<std::string_view, 1> kLast = {"endfor"};
    Statement result{.kind = StatementKind::kFor, .offset = offset, .names = targets()};
    if (!skip_word("in")) unexpected("'in'");
    result.value = tuple(false);
    if (skip_word("if")) result.filter = expression();
    if (is_word("recursive"))
      fail(ErrorCode::kUnsupported, source_, peek().offset, "recursive loop");
    ++loops_;
    result.branches.push_back({nullptr, block(kEnds, offset)});
    --loops_;
    if (next().text == "else") {
      result.branches.push_back({nullptr, block(kLast, offset)});
      next();
    }
    return result;
  }

  Statement set_statement(std::size_t offset) {
    static constexpr std::array<std::string_view, 1> kEnds = {"endset"};
    Statement result{.kind = StatementKind::kSet, .offset = offset, .names = targets()};
    if (result.names.size() == 1 && skip_operator(".")) result.text = expect_name();
    if (skip_operator("=")) {
      result.value = tuple();
      return result;
    }
    if (is_operator("|")) fail(ErrorCode::kUnsupported, source_, offset, "set block with a filter");
    result.kind = StatementKind::kSetBlock;
    if (result.names.size() != 1) unexpected("'='");
    // A loop around the set does not reach into the text that is set.
    const int loops = std::exchange(loops_, 0);
    result.branches.push_back({nullptr, block(kEnds, offset)});
    loops_ = loops;
    next();
    return result;
  }

  std::vector<std::string> targets() {
    std::vector<std::string> names;
    const bool parenthesised = skip_operator("(");
    do {
      if (!names.empty() && peek().kind != Kind::kName) break;
      names.push_back(expect_name());
    } while (skip_operator(","));
    if (parenthesised) expect_operator(")");
    return names;
  }

  // --- expressions, from the loosest binding to the tightest ---

  ExprPtr make(ExprKind kind, std::size_t offset, std::string text = "") const {
    return std::make_unique<Expr>(Expr{.kind = kind, .offset = offset, .text = std::move(text)});
  }
  void adopt(Expr& parent, ExprPtr child) const {
    if (child != nullptr) {
      parent.depth = std::max(parent.depth, child->depth + 1);
      if (parent.depth > kMaxDepth)
        fail(ErrorCode::kCapacity, source_, parent.offset, "expression is nested too deeply",
             "at most " + std::to_string(kMaxDepth) + " levels", "more");
    }
    parent.children.push_back(std::move(child));
  }
  template <class... Children>
  ExprPtr join(ExprKind kind, std::size_t offset, std::string text, Children... children) const {
    ExprPtr result = make(kind, offset, std::move(text));
    (adopt(*result, std::move(children)), ...);
    return result;
  }

  // One expression, or several with commas between them: a tuple.
  ExprPtr tuple(bool with_condition = true, bool may_be_empty = false) {
    const std::size_t offset = peek().offset;
    std::vector<ExprPtr> items;
    bool is_tuple = false;
    while (true) {
      if (peek().kind == Kind::kOutputEnd || peek().kind == Kind::kBlockEnd || is_operator(")"))
        break;
      items.push_back(with_condition ? expression() : disjunction());
      if (!skip_operator(",")) break;
      is_tuple = true;
    }
    if (!is_tuple && !items.empty()) return std::move(items.front());
    if (items.empty() && !may_be_empty) unexpected("an expression");
    ExprPtr result = make(ExprKind::kTuple, offset);
    for (ExprPtr& item : items) adopt(*result, std::move(item));
    return result;
  }

  ExprPtr expression() {
    const Nested nested(*this);
    ExprPtr left = disjunction();
    while (is_word("if")) {
      const std::size_t offset = next().offset;
      ExprPtr condition = disjunction();
      ExprPtr otherwise = skip_word("else") ? expression() : nullptr;
      left = join(ExprKind::kConditional, offset, "", std::move(condition), std::move(left),
                  std::move(otherwise));
    }
    return left;
  }
  ExprPtr disjunction() {
    ExprPtr left = conjunction();
    while (is_word("or")) {
      const std::size_t offset = next().offset;
      left = join(ExprKind::kBinary, offset, "or", std::move(left), conjunction());
    }
    return left;
  }
  ExprPtr conjunction() {
    ExprPtr left = negation();
    while (is_word("and")) {
      const std::size_t offset = next().offset;
      left = join(ExprKind::kBinary, offset, "and", std::move(left), negation());
    }
    return left;
  }
  ExprPtr negation() {
    if (!is_word("not")) return comparison();
    const Nested nested(*this);
    const std::size_t offset = next().offset;
    return join(ExprKind::kUnary, offset, "not", negation());
  }
  ExprPtr comparison() {
    constexpr std::array<std::string_view, 6> kOperators = {"==", "!=", "<", ">", "<=", ">="};
    ExprPtr left = sum();
    ExprPtr result;
    while (true) {
      std::string name;
      const std::size_t offset = peek().offset;
      if (is_word("in")) {
        name = "in";
      } else if (is_word("not") && is_word("in", 1)) {
        next();
        name = "not in";
      } else if (peek().kind == Kind::kOperator &&
                 std::find(kOperators.begin(), kOperators.end(), peek().text) != kOperators.end()) {
        name = peek().text;
      } else {
        return result != nullptr ? std::move(result) : std::move(left);
      }
      next();
      if (result == nullptr) result = join(ExprKind::kCompare, offset, "", std::move(left));
      result->operators.push_back(std::move(name));
      adopt(*result, sum());
    }
  }
  ExprPtr sum() {
    ExprPtr left = concatenation();
    while (is_operator("+") || is_operator("-")) {
      const Lexeme& sign = next();
      left = join(ExprKind::kBinary, sign.offset, sign.text, std::move(left), concatenation());
    }
    return left;
  }
  ExprPtr concatenation() {
    ExprPtr left = product();
    while (is_operator("~")) {
      const std::size_t offset = next().offset;
      left = join(ExprKind::kBinary, offset, "~", std::move(left), product());
    }
    return left;
  }
  ExprPtr product() {
    ExprPtr left = power();
    while (is_operator("*") || is_operator("/") || is_operator("//") || is_operator("%")) {
      const Lexeme& sign = next();
      left = join(ExprKind::kBinary, sign.offset, sign.text, std::move(left), power());
    }
    return left;
  }
  ExprPtr power() {
    ExprPtr left = unary(true);
    while (is_operator("**")) {
      const std::size_t offset = next().offset;
      left = join(ExprKind::kBinary, offset, "**", std::move(left), unary(true));
    }
    return left;
  }
  ExprPtr unary(bool with_filters) {
    const Nested nested(*this);
    ExprPtr result;
    if (is_operator("-") || is_operator("+")) {
      const Lexeme& sign = next();
      result = join(ExprKind::kUnary, sign.offset, sign.text, unary(false));
    } else {
      result = primary();
    }
    result = postfix(std::move(result));
    if (!with_filters) return result;
    while (true) {
      if (is_operator("|")) {
        const std::size_t offset = next().offset;
        result = join(ExprKind::kFilter, offset, expect_name(), std::move(result));
        if (is_operator("(")) arguments(*result);
      } else if (is_word("is")) {
        result = test(std::move(result));
      } else if (is_operator("(")) {
        result = call(std::move(result));
      } else {
        return result;
      }
    }
  }
  ExprPtr test(ExprPtr subject) {
    const std::size_t offset = next().offset;
    const bool negated = skip_word("not");
    ExprPtr result = join(ExprKind::kTest, offset, expect_name(), std::move(subject));
    const Lexeme& following = peek();
    const bool is_argument = following.kind == Kind::kString || following.kind == Kind::kInteger ||
                             following.kind == Kind::kFloat || is_operator("[") ||
                             is_operator("{") ||
                             (following.kind == Kind::kName && following.text != "else" &&
                              following.text != "or" && following.text != "and");
    if (is_operator("(")) {
      arguments(*result);
    } else if (is_word("is")) {
      unexpected("one test");
    } else if (is_argument) {
      adopt(*result, postfix(primary()));
    }
    return negated ? join(ExprKind::kUnary, offset, "not", std::move(result)) : std::move(result);
  }
  ExprPtr call(ExprPtr function) {
    ExprPtr result = join(ExprKind::kCall, peek().offset, "", std::move(function));
    arguments(*result);
    return result;
  }
  void arguments(Expr& owner) {
    expect_operator("(");
    while (!skip_operator(")")) {
      if (is_operator("*") || is_operator("**"))
        fail(ErrorCode::kUnsupported, source_, peek().offset, "unpacked arguments");
      if (peek().kind == Kind::kName && is_operator("=", 1)) {
        std::string name = next().text;
        next();
        ExprPtr value = expression();
        owner.depth = std::max(owner.depth, value->depth + 1);
        owner.named.emplace_back(std::move(name), std::move(value));
      } else {
        if (!owner.named.empty()) unexpected("a named argument");
        adopt(owner, expression());
      }
      if (!is_operator(")")) expect_operator(",");
    }
  }
  ExprPtr postfix(ExprPtr result) {
    while (true) {
      if (is_operator(".")) {
        const std::size_t offset = next().offset;
        if (peek().kind == Kind::kInteger) {
          ExprPtr index = primary();
          result = join(ExprKind::kItem, offset, "", std::move(result), std::move(index));
        } else {
          std::string name = expect_name();
          result = join(ExprKind::kAttribute, offset, std::move(name), std::move(result));
        }
      } else if (is_operator("[")) {
        result = subscript(std::move(result));
      } else if (is_operator("(")) {
        result = call(std::move(result));
      } else {
        return result;
      }
    }
  }
  ExprPtr subscript(ExprPtr subject) {
    const std::size_t offset = next().offset;
    std::array<ExprPtr, 3> parts;
    std::size_t part = 0;
    for (; part < 3; ++part) {
      if (!is_operator(":") && !is_operator("]")) parts[part] = expression();
      if (part == 2 || !skip_operator(":")) break;
    }
    if (is_operator(","))
      fail(ErrorCode::kUnsupported, source_, peek().offset, "subscript with several indices");
    expect_operator("]");
    if (part > 0)
      return join(ExprKind::kSlice, offset, "", std::move(subject), std::move(parts[0]),
                  std::move(parts[1]), std::move(parts[2]));
    if (parts[0] == nullptr)
      fail(ErrorCode::kFormat, source_, offset, "template syntax", "an index", "']'");
    return join(ExprKind::kItem, offset, "", std::move(subject), std::move(parts[0]));
  }
  ExprPtr primary() {
    const Lexeme& lexeme = next();
    const std::size_t offset = lexeme.offset;
    ExprPtr result = make(ExprKind::kLiteral, offset);
    switch (lexeme.kind) {
      case Kind::kName:
        if (lexeme.text == "true" || lexeme.text == "True") {
          result->literal = true;
        } else if (lexeme.text == "false" || lexeme.text == "False") {
          result->literal = false;
        } else if (lexeme.text == "none" || lexeme.text == "None") {
          result->literal = None{};
        } else {
          result->kind = ExprKind::kName;
          result->text = lexeme.text;
        }
        return result;
      case Kind::kString: {
        std::string text = lexeme.text;
        while (peek().kind == Kind::kString) text += next().text;
        result->literal = make_text(std::move(text));
        return result;
      }
      case Kind::kInteger: {
        std::int64_t number = 0;
        const char* const last = lexeme.text.data() + lexeme.text.size();
        if (std::from_chars(lexeme.text.data(), last, number).ec != std::errc())
          fail(ErrorCode::kUnsupported, source_, offset, "integer beyond 64 bits");
        result->literal = number;
        return result;
      }
      case Kind::kFloat: {
        double number = 0;
        const char* const last = lexeme.text.data() + lexeme.text.size();
        if (std::from_chars(lexeme.text.data(), last, number).ec != std::errc())
          fail(ErrorCode::kUnsupported, source_, offset, "number out of range");
        result->literal = number;
        return result;
      }
      case Kind::kOperator:
        if (lexeme.text == "(") {
          result = tuple(true, true);
          expect_operator(")");
          return result;
        }
        if (lexeme.text == "[") {
          result->kind = ExprKind::kList;
          while (!skip_operator("]")) {
            adopt(*result, expression());
            if (!is_operator("]")) expect_operator(",");
          }
          return result;
        }
        if (lexeme.text == "{") {
          result->kind = ExprKind::kDict;
          while (!skip_operator("}")) {
            adopt(*result, expression());
            expect_operator(":");
            adopt(*result, expression());
            if (!is_operator("}")) expect_operator(",");
          }
          return result;
        }
        break;
      default: break;
    }
    if (lexeme.kind != Kind::kEnd) --at_;
    unexpected("an expression");
  }

  std::string_view source_;
  std::vector<Lexeme> lexemes_;
  std::size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;
};

/// Parses a template. \throws Error(kFormat, kUnsupported, kCapacity) with line and column.
inline Template parse(std::string source) {
  if (source.size() > kMaxSourceBytes)
    throw Error(ErrorCode::kCapacity, {"template is too long", "chat template", "",
                                       "at most " + std::to_string(kMaxSourceBytes) + " bytes",
                                       std::to_string(source.size())});
  if (const std::size_t invalid = find_invalid_utf8(source); invalid != std::string::npos)
    throw Error(ErrorCode::kFormat, {"template is not valid UTF-8", "chat template",
                                     at_byte("character", invalid), "valid UTF-8", ""});
  replace_all(source, "\r\n", "\n");
  replace_all(source, "\r", "\n");
  if (source.ends_with('\n')) source.pop_back();
  Template result{std::move(source), {}};
  result.body = Parser(result.source).run();
  return result;
}

}  // namespace sluice::detail::jinja
