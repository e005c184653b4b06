// SPDX-License-Identifier: MIT
/// An interpreter for the part of the Jinja 2 template language that chat templates use. Templates
/// come with model files and are untrusted: nesting, steps and bytes are bounded, there is no way
/// out of the language, and every failure is a typed error with line and column.
///
/// The environment is the one that Hugging Face Transformers gives to chat templates: trim_blocks
/// and lstrip_blocks on, no auto-escaping, loop controls, tojson without HTML escapes,
/// raise_exception. Values behave as Python's do; strings are counted in characters.
/// Left out, as kUnsupported: macros, includes, inheritance, filter blocks, recursive loops, and
/// the filters, tests and methods that no chat template of the supported families needs.
/// Deviations: keys of dictionaries are strings, integers have 64 bits, upper case maps character
/// to character.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/detail/jinja_syntax.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/detail/unicode.hpp"

namespace sluice::detail::jinja {

// What a rendering may cost, besides what its inputs allow. Real templates stay far below.
inline constexpr std::size_t kMaxSteps = 1'000'000;
inline constexpr std::size_t kMaxBytes = 16 << 20;  // of text and lists made

/// One rendering.
class Interpreter {
 public:
  /// `input_bytes`: how much text the variables hold; allows for as many more bytes and steps.
  Interpreter(const Template& source, std::size_t input_bytes)
      : template_(source),
        steps_left_(kMaxSteps + input_bytes),
        bytes_left_(kMaxBytes + 64 * input_bytes) {
    scopes_.emplace_back();
  }

  List* new_list(std::vector<Value> items, bool is_tuple = false) {
    charge(items.size() * sizeof(Value));
    lists_.push_back({std::move(items), is_tuple});
    return &lists_.back();
  }
  Dict* new_dict(Dict::Kind kind = Dict::Kind::kMapping) {
    charge(sizeof(Dict));
    dicts_.push_back({{}, kind});
    return &dicts_.back();
  }
  void set(std::string_view name, Value value) {
    for (auto& [known, old] : scopes_.back()) {
      if (known == name) {
        old = std::move(value);
        return;
      }
    }
    scopes_.back().emplace_back(std::string(name), std::move(value));
  }

  std::string run() {
    std::string out;
    out_ = &out;
    execute(template_.body);
    return out;
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  struct Arguments {
    std::vector<Value> items;
    std::vector<std::pair<std::string_view, Value>> named;
  };

  // --- limits and errors ---

  void step(std::size_t count = 1) {
    if (count > steps_left_) over_limit("steps");
    steps_left_ -= count;
  }
  void charge(std::size_t bytes) {
    if (bytes > bytes_left_) over_limit("bytes");
    bytes_left_ -= bytes;
  }
  [[noreturn]] void over_limit(std::string_view of_what) const {
    fail(ErrorCode::kCapacity, template_.source, here_,
         "template needs too many " + std::string(of_what));
  }
  [[noreturn]] void error(std::string what, std::string expected = "",
                          std::string found = "") const {
    fail(ErrorCode::kFormat, template_.source, here_, std::move(what), std::move(expected),
         std::move(found));
  }
  [[noreturn]] void unsupported(std::string what) const {
    fail(ErrorCode::kUnsupported, template_.source, here_, std::move(what));
  }
  Value text(std::string value) {
    charge(value.size() + 32);
    return make_text(std::move(value));
  }
  static std::string_view type_name(const Value& value) {
    constexpr std::array<std::string_view, 9> kNames = {"undefined",  "none",      "a boolean",
                                                        "an integer", "a float",   "a string",
                                                        "a list",     "a mapping", "a function"};
    return kNames[value.index()];
  }
  void require_defined(const Value& value) const {
    if (const auto* missing = std::get_if<Undefined>(&value))
      error("value is undefined", "a value", quote_text(missing->name));
  }
  const std::string& require_text(const Value& value, std::string_view what) const {
    require_defined(value);
    if (!is<Text>(value)) error(std::string(what), "a string", std::string(type_name(value)));
    return text_of(value);
  }
  std::int64_t require_int(const Value& value, std::string_view what) const {
    require_defined(value);
    if (const auto* number = std::get_if<std::int64_t>(&value)) return *number;
    if (const auto* flag = std::get_if<bool>(&value)) return *flag ? 1 : 0;
    error(std::string(what), "an integer", std::string(type_name(value)));
  }

  // --- statements ---

  Flow execute(const std::vector<Statement>& body) {
    for (const Statement& statement : body) {
      const Flow flow = execute(statement);
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Flow execute(const Statement& statement) {
    here_ = statement.offset;
    step();
    switch (statement.kind) {
      case StatementKind::kText: write(statement.text); break;
      case StatementKind::kOutput: write(to_text(evaluate(*statement.value))); break;
      case StatementKind::kIf:
        for (const auto& [condition, body] : statement.branches)
          if (condition == nullptr || truth(evaluate(*condition))) return execute(body);
        break;
      case StatementKind::kFor: loop(statement); break;
      case StatementKind::kSet: assign(statement, evaluate(*statement.value)); break;
      case StatementKind::kSetBlock: {
        std::string captured;
        std::string* const outer = std::exchange(out_, &captured);
        execute(statement.branches.front().body);
        out_ = outer;
        assign(statement, text(std::move(captured)));
        break;
      }
      case StatementKind::kGroup: return execute(statement.branches.front().body);
      case StatementKind::kBreak: return Flow::kBreak;
      case StatementKind::kContinue: return Flow::kContinue;
    }
    return Flow::kNext;
  }

  void write(std::string_view characters) {
    charge(characters.size());
    *out_ += characters;
  }

  void assign(const Statement& statement, Value value) {
    here_ = statement.offset;
    if (statement.text.empty()) {
      assign(statement.names, std::move(value));
      return;
    }
    const Value target = lookup(statement.names.front());
    Dict* const* const dict = std::get_if<Dict*>(&target);
    if (dict == nullptr || (*dict)->kind != Dict::Kind::kNamespace)
      error("attribute of something that is no namespace", "a namespace",
            quote_text(statement.names.front()));
    charge(sizeof(Value));
    (*dict)->set(statement.text, std::move(value));
  }
  void assign(const std::vector<std::string>& names, Value value) {
    if (names.size() == 1) {
      set(names.front(), std::move(value));
      return;
    }
    const std::vector<Value> items = iterate(value);
    if (items.size() != names.size())
      error("wrong number of values to unpack", std::to_string(names.size()),
            std::to_string(items.size()));
    for (std::size_t i = 0; i < names.size(); ++i) set(names[i], items[i]);
  }

  void loop(const Statement& statement) {
    std::vector<Value> items = iterate(evaluate(*statement.value));
    if (statement.filter != nullptr) {
      std::vector<Value> kept;
      scopes_.emplace_back();
      for (Value& item : items) {
        assign(statement.names, item);
        if (truth(evaluate(*statement.filter))) kept.push_back(std::move(item));
      }
      scopes_.pop_back();
      items = std::move(kept);
    }
    if (items.empty()) {
      if (statement.branches.size() > 1) execute(statement.branches[1].body);
      return;
    }
    Dict* const state = new_dict(Dict::Kind::kLoop);
    const auto count = static_cast<std::int64_t>(items.size());
    for (std::int64_t i = 0; i < count; ++i) {
      step();
      const auto item_at = [&](std::int64_t at) -> Value {
        return at < 0 || at >= count ? Value(Undefined{"loop"})
                                     : items[static_cast<std::size_t>(at)];
      };
      state->set("index", i + 1);
      state->set("index0", i);
      state->set("revindex", count - i);
      state->set("revindex0", count - i - 1);
      state->set("first", i == 0);
      state->set("last", i + 1 == count);
      state->set("length", count);
      state->set("previtem", item_at(i - 1));
      state->set("nextitem", item_at(i + 1));
      scopes_.emplace_back();
      set("loop", state);
      here_ = statement.offset;
      assign(statement.names, items[static_cast<std::size_t>(i)]);
      const Flow flow = execute(statement.branches.front().body);
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
    }
  }

  // --- names and containers ---

  Value lookup(std::string_view name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      for (const auto& [known, value] : *scope)
        if (known == name) return value;
    for (const std::string_view function : {"namespace", "range", "raise_exception", "dict"})
      if (name == function) return Function{function};
    return Undefined{name};
  }

  // The characters of a string, each as a view.
  std::vector<std::string_view> characters(std::string_view value) {
    step(value.size() / 16);
    std::vector<std::string_view> result;
    result.reserve(value.size());
    for (std::size_t at = 0; at < value.size();) {
      const std::size_t length = scan_utf8(value.substr(at)).length;
      result.push_back(value.substr(at, length));
      at += length;
    }
    return result;
  }

  std::vector<Value> iterate(const Value& value) {
    std::vector<Value> result;
    if (const auto* list = std::get_if<List*>(&value)) {
      charge((*list)->items.size() * sizeof(Value));
      result = (*list)->items;
    } else if (const auto* dict = std::get_if<Dict*>(&value);
               dict != nullptr && (*dict)->kind == Dict::Kind::kMapping) {
      for (const auto& [key, item] : (*dict)->items) result.push_back(text(key));
    } else if (is<Text>(value)) {
      for (const std::string_view character : characters(text_of(value)))
        result.push_back(text(std::string(character)));
    } else if (!is<Undefined>(value)) {
      error("value cannot be walked over", "a list, mapping or string",
            std::string(type_name(value)));
    }
    return result;
  }

  Value attribute(const Value& value, std::string_view name) const {
    require_defined(value);
    if (const auto* dict = std::get_if<Dict*>(&value))
      if (const Value* const found = (*dict)->find(name)) return *found;
    return Undefined{name};
  }

  Value item(const Value& value, const Value& key, std::string_view name) {
    require_defined(value);
    require_defined(key);
    if (is<Dict*>(value) && is<Text>(key)) {
      const Value* const found = std::get<Dict*>(value)->find(text_of(key));
      return found != nullptr ? *found : Value(Undefined{name});
    }
    if ((is<List*>(value) || is<Text>(value)) && (is<std::int64_t>(key) || is<bool>(key))) {
      std::int64_t index = require_int(key, "index");
      const auto pick = [&](const auto& items) -> std::optional<std::size_t> {
        const auto count = static_cast<std::int64_t>(items.size());
        if (index < 0) index += count;
        if (index < 0 || index >= count) return std::nullopt;
        return static_cast<std::size_t>(index);
      };
      if (is<List*>(value)) {
        const auto& items = std::get<List*>(value)->items;
        if (const auto at = pick(items)) return items[*at];
      } else {
        const auto items = characters(text_of(value));
        if (const auto at = pick(items)) return text(std::string(items[*at]));
      }
    }
    return Undefined{name};
  }

  // Python's rule for [start:stop:step], as the indices it picks.
  std::vector<std::size_t> slice_indices(const Expr& expr, std::size_t size) {
    const auto count = static_cast<std::int64_t>(size);
    const auto bound = [&](std::size_t child) -> std::optional<std::int64_t> {
      if (expr.children[child] == nullptr) return std::nullopt;
      const Value value = evaluate(*expr.children[child]);
      if (is<None>(value)) return std::nullopt;
      return require_int(value, "slice");
    };
    std::optional<std::int64_t> start = bound(1);
    std::optional<std::int64_t> stop = bound(2);
    const std::int64_t stride = bound(3).value_or(1);
    here_ = expr.offset;
    if (stride == 0) error("slice", "a step that is not 0", "0");
    const auto clamp = [&](std::int64_t index) {
      if (index < 0) index = index < -count ? -1 : index + count;
      return stride > 0 ? std::clamp<std::int64_t>(index, 0, count)
                        : std::clamp<std::int64_t>(index, -1, count - 1);
    };
    // Below the first element, a downward slice ends at -1, which as an index would mean the last.
    std::int64_t at = start ? clamp(*start) : stride > 0 ? 0 : count - 1;
    const std::int64_t end = stop ? clamp(*stop) : stride > 0 ? count : -1;
    std::vector<std::size_t> result;
    while (stride > 0 ? at < end : at > end) {
      result.push_back(static_cast<std::size_t>(at));
      if (stride > 0 ? stride >= end - at : stride <= end - at) break;  // also avoids overflow
      at += stride;
    }
    return result;
  }

  Value slice(const Expr& expr) {
    const Value value = evaluate(*expr.children[0]);
    here_ = expr.offset;
    require_defined(value);
    if (is<List*>(value)) {
      const List& list = *std::get<List*>(value);
      std::vector<Value> result;
      for (const std::size_t index : slice_indices(expr, list.items.size()))
        result.push_back(list.items[index]);
      return new_list(std::move(result), list.is_tuple);
    }
    if (is<Text>(value)) {
      const auto items = characters(text_of(value));
      std::string result;
      for (const std::size_t index : slice_indices(expr, items.size())) result += items[index];
      return text(std::move(result));
    }
    error("slice", "a list or string", std::string(type_name(value)));
  }

  // --- what Python would say of values ---

  static bool truth(const Value& value) {
    switch (value.index()) {
      case 0:
      case 1: return false;
      case 2: return std::get<bool>(value);
      case 3: return std::get<std::int64_t>(value) != 0;
      case 4: return std::get<double>(value) != 0.0;
      case 5: return !text_of(value).empty();
      case 6: return !std::get<List*>(value)->items.empty();
      case 7:
        return std::get<Dict*>(value)->kind != Dict::Kind::kMapping ||
               !std::get<Dict*>(value)->items.empty();
      default: return true;
    }
  }

  static std::optional<double> number(const Value& value) {
    if (const auto* flag = std::get_if<bool>(&value)) return *flag ? 1.0 : 0.0;
    if (const auto* integer = std::get_if<std::int64_t>(&value))
      return static_cast<double>(*integer);
    if (const auto* real = std::get_if<double>(&value)) return *real;
    return std::nullopt;
  }
  static bool is_integral(const Value& value) { return is<bool>(value) || is<std::int64_t>(value); }
  static std::int64_t integer(const Value& value) {
    return is<bool>(value) ? (std::get<bool>(value) ? 1 : 0) : std::get<std::int64_t>(value);
  }

  void check_depth(int depth) const {
    if (depth > kMaxDepth)
      fail(ErrorCode::kCapacity, template_.source, here_, "value is nested too deeply");
  }

  bool equal(const Value& a, const Value& b, int depth = 0) {
    check_depth(depth);
    step();
    if (is_integral(a) && is_integral(b)) return integer(a) == integer(b);
    if (number(a) && number(b)) return *number(a) == *number(b);
    if (a.index() != b.index()) return false;
    if (is<Text>(a)) {
      step(std::min(text_of(a).size(), text_of(b).size()) / 1024);
      return text_of(a) == text_of(b);
    }
    if (is<List*>(a)) {
      const auto& left = std::get<List*>(a)->items;
      const auto& right = std::get<List*>(b)->items;
      if (left.size() != right.size()) return false;
      for (std::size_t i = 0; i < left.size(); ++i)
        if (!equal(left[i], right[i], depth + 1)) return false;
      return true;
    }
    if (is<Dict*>(a)) {
      const Dict& left = *std::get<Dict*>(a);
      const Dict& right = *std::get<Dict*>(b);
      if (&left == &right) return true;
      if (left.kind != Dict::Kind::kMapping || right.kind != Dict::Kind::kMapping ||
          left.items.size() != right.items.size())
        return false;
      step(left.items.size() * right.items.size() / 16);
      for (const auto& [key, value] : left.items) {
        const Value* const other = right.find(key);
        if (other == nullptr || !equal(value, *other, depth + 1)) return false;
      }
      return true;
    }
    if (is<Function>(a)) return std::get<Function>(a).name == std::get<Function>(b).name;
    return true;  // both undefined, both none
  }

  // -1, 0, 1 for values that have an order.
  int compare(const Value& a, const Value& b, int depth = 0) {
    check_depth(depth);
    step();
    require_defined(a);
    require_defined(b);
    if (is_integral(a) && is_integral(b))
      return integer(a) < integer(b) ? -1 : integer(a) > integer(b) ? 1 : 0;
    if (number(a) && number(b))
      return *number(a) < *number(b) ? -1 : *number(a) > *number(b) ? 1 : 0;
    if (is<Text>(a) && is<Text>(b)) {
      const int order = text_of(a).compare(text_of(b));  // UTF-8 sorts as its characters do
      return order < 0 ? -1 : order > 0 ? 1 : 0;
    }
    if (is<List*>(a) && is<List*>(b)) {
      const auto& left = std::get<List*>(a)->items;
      const auto& right = std::get<List*>(b)->items;
      for (std::size_t i = 0; i < std::min(left.size(), right.size()); ++i)
        if (!equal(left[i], right[i])) return compare(left[i], right[i], depth + 1);
      return left.size() < right.size() ? -1 : left.size() > right.size() ? 1 : 0;
    }
    error("values have no order", std::string(type_name(a)), std::string(type_name(b)));
  }

  bool contains(const Value& container, const Value& value) {
    require_defined(container);
    if (is<Text>(container)) {
      const std::string& part = require_text(value, "what is looked for in a string");
      return find_text(text_of(container), part, 0) != std::string::npos;
    }
    if (is<List*>(container)) {
      for (const Value& item : std::get<List*>(container)->items)
        if (equal(item, value)) return true;
      return false;
    }
    if (is<Dict*>(container))
      return is<Text>(value) && std::get<Dict*>(container)->find(text_of(value)) != nullptr;
    error("value contains nothing", "a list, mapping or string", std::string(type_name(container)));
  }

  // string::find, its worst case paid for.
  std::size_t find_text(const std::string& where, std::string_view what, std::size_t from) {
    const std::size_t found = where.find(what, from);
    const std::size_t passed = std::min(found, where.size()) - std::min(from, where.size());
    step(passed / 256 * (1 + what.size() / 64));
    return found;
  }

  static std::string float_text(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    std::array<char, 32> buffer;
    const char* const end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                          std::chars_format::scientific)
                                .ptr;
    const std::string_view written(buffer.data(), static_cast<std::size_t>(end - buffer.data()));
    const std::size_t split = written.find('e');
    std::string digits;
    for (const char character : written.substr(0, split))
      if (character >= '0' && character <= '9') digits += character;
    int exponent = 0;
    const std::string_view power = written.substr(split + (written[split + 1] == '+' ? 2 : 1));
    std::from_chars(power.data(), power.data() + power.size(), exponent);
    std::string result = std::signbit(value) ? "-" : "";
    if (exponent < -4 || exponent >= 16) {  // Python's rule for repr
      result += digits.substr(0, 1);
      if (digits.size() > 1) result += "." + digits.substr(1);
      result += exponent < 0 ? "e-" : "e+";
      const std::string size = std::to_string(std::abs(exponent));
      return result + (size.size() < 2 ? "0" : "") + size;
    }
    if (exponent < 0)
      return result + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
    const auto whole = static_cast<std::size_t>(exponent) + 1;
    if (digits.size() < whole) digits.append(whole - digits.size(), '0');
    result += digits.substr(0, whole) + ".";
    return result + (digits.size() > whole ? digits.substr(whole) : "0");
  }

  std::string to_text(const Value& value) {
    if (is<Undefined>(value)) return "";
    if (is<Text>(value)) return text_of(value);
    return represent(value, 0);
  }

  // Python's repr.
  std::string represent(const Value& value, int depth) {
    check_depth(depth);
    step();
    switch (value.index()) {
      case 0: return "Undefined";
      case 1: return "None";
      case 2: return std::get<bool>(value) ? "True" : "False";
      case 3: return std::to_string(std::get<std::int64_t>(value));
      case 4: return float_text(std::get<double>(value));
      case 5: {
        const std::string& source = text_of(value);
        const bool has_single = source.find('\'') != std::string::npos;
        const char quote = has_single && source.find('"') == std::string::npos ? '"' : '\'';
        std::string result(1, quote);
        for (const char character : source) {
          if (character == quote || character == '\\') {
            result += {'\\', character};
          } else if (character == '\n') {
            result += "\\n";
          } else if (character == '\r') {
            result += "\\r";
          } else if (character == '\t') {
            result += "\\t";
          } else {
            result += character;
          }
        }
        result += quote;
        charge(result.size());
        return result;
      }
      case 6: {
        const List& list = *std::get<List*>(value);
        std::string result = list.is_tuple ? "(" : "[";
        for (std::size_t i = 0; i < list.items.size(); ++i)
          result += (i > 0 ? ", " : "") + represent(list.items[i], depth + 1);
        charge(result.size());
        return result + (list.is_tuple ? (list.items.size() == 1 ? ",)" : ")") : "]");
      }
      case 7: {
        const Dict& dict = *std::get<Dict*>(value);
        if (dict.kind != Dict::Kind::kMapping) unsupported("text of a namespace or loop");
        std::string result = "{";
        for (std::size_t i = 0; i < dict.items.size(); ++i)
          result += (i > 0 ? ", " : "") + represent(make_text(dict.items[i].first), depth + 1) +
                    ": " + represent(dict.items[i].second, depth + 1);
        charge(result.size());
        return result + "}";
      }
      default: unsupported("text of a function");
    }
  }

  // Python's json.dumps(value, ensure_ascii=False, indent=...).
  void to_json(const Value& value, std::optional<std::size_t> indent, std::size_t depth,
               std::string& out) {
    check_depth(static_cast<int>(depth));
    step();
    const auto line = [&](std::size_t level) {
      if (!indent) return;
      charge(*indent * level + 1);
      out += '\n';
      out.append(*indent * level, ' ');
    };
    const auto string = [&](std::string_view source) {
      charge(6 * source.size() + 2);
      out += '"';
      for (const char character : source) {
        constexpr std::string_view kEscaped = "\"\\\n\r\t\b\f";
        constexpr std::string_view kNames = "\"\\nrtbf";
        constexpr std::string_view kDigits = "0123456789abcdef";
        const std::size_t found = kEscaped.find(character);
        const auto byte = static_cast<unsigned char>(character);
        if (found != std::string_view::npos) {
          out += {'\\', kNames[found]};
        } else if (byte < 0x20) {
          out += "\\u00";
          out += {kDigits[byte >> 4], kDigits[byte & 15]};
        } else {
          out += character;
        }
      }
      out += '"';
    };
    switch (value.index()) {
      case 1: out += "null"; return;
      case 2: out += std::get<bool>(value) ? "true" : "false"; return;
      case 3: out += std::to_string(std::get<std::int64_t>(value)); return;
      case 4: {
        const double real = std::get<double>(value);
        out += std::isnan(real)   ? "NaN"
               : std::isinf(real) ? (real < 0 ? "-Infinity" : "Infinity")
                                  : float_text(real);
        return;
      }
      case 5: string(text_of(value)); return;
      case 6: {
        const auto& items = std::get<List*>(value)->items;
        out += '[';
        for (std::size_t i = 0; i < items.size(); ++i) {
          if (i > 0) out += indent ? "," : ", ";
          line(depth + 1);
          to_json(items[i], indent, depth + 1, out);
        }
        if (!items.empty()) line(depth);
        out += ']';
        return;
      }
      case 7: {
        const Dict& dict = *std::get<Dict*>(value);
        if (dict.kind != Dict::Kind::kMapping) break;
        out += '{';
        for (std::size_t i = 0; i < dict.items.size(); ++i) {
          if (i > 0) out += indent ? "," : ", ";
          line(depth + 1);
          string(dict.items[i].first);
          out += ": ";
          to_json(dict.items[i].second, indent, depth + 1, out);
        }
        if (!dict.items.empty()) line(depth);
        out += '}';
        return;
      }
      default: break;
    }
    error("value has no JSON", "plain data", std::string(type_name(value)));
  }

  // --- expressions ---

  Value evaluate(const Expr& expr) {
    step();
    switch (expr.kind) {
      case ExprKind::kLiteral: return expr.literal;
      case ExprKind::kName: return lookup(expr.text);
      case ExprKind::kList:
      case ExprKind::kTuple: {
        std::vector<Value> items;
        for (const ExprPtr& child : expr.children) items.push_back(evaluate(*child));
        return new_list(std::move(items), expr.kind == ExprKind::kTuple);
      }
      case ExprKind::kDict: {
        Dict* const dict = new_dict();
        for (std::size_t i = 0; i < expr.children.size(); i += 2) {
          const Value key = evaluate(*expr.children[i]);
          here_ = expr.offset;
          if (!is<Text>(key)) unsupported("mapping with a key that is no string");
          charge(text_of(key).size() + sizeof(Value));
          step(dict->items.size() / 16);
          dict->set(text_of(key), evaluate(*expr.children[i + 1]));
        }
        return dict;
      }
      case ExprKind::kAttribute: {
        const Value value = evaluate(*expr.children[0]);
        here_ = expr.offset;
        return attribute(value, expr.text);
      }
      case ExprKind::kItem: {
        const Value value = evaluate(*expr.children[0]);
        const Value key = evaluate(*expr.children[1]);
        here_ = expr.offset;
        // The error that may follow names a literal key.
        const Value& literal = expr.children[1]->literal;
        return item(value, key, is<Text>(literal) ? std::string_view(text_of(literal)) : "item");
      }
      case ExprKind::kSlice: return slice(expr);
      case ExprKind::kCall: return call(expr);
      case ExprKind::kFilter: {
        Value value = evaluate(*expr.children[0]);
        const Arguments arguments = evaluate_arguments(expr);
        here_ = expr.offset;
        return apply_filter(expr.text, value, arguments);
      }
      case ExprKind::kTest: {
        const Value value = evaluate(*expr.children[0]);
        const Arguments arguments = evaluate_arguments(expr);
        here_ = expr.offset;
        if (!arguments.named.empty()) unsupported("test with named arguments");
        return apply_test(expr.text, value, arguments.items);
      }
      case ExprKind::kUnary: {
        const Value value = evaluate(*expr.children[0]);
        here_ = expr.offset;
        if (expr.text == "not") return !truth(value);
        require_defined(value);
        if (is_integral(value)) {
          std::int64_t result = 0;
          if (__builtin_sub_overflow(std::int64_t{0}, integer(value), &result))
            unsupported("integer beyond 64 bits");
          return expr.text == "-" ? result : integer(value);
        }
        if (!is<double>(value)) error("sign", "a number", std::string(type_name(value)));
        return expr.text == "-" ? -std::get<double>(value) : std::get<double>(value);
      }
      case ExprKind::kBinary: return binary(expr);
      case ExprKind::kCompare: {
        Value left = evaluate(*expr.children[0]);
        for (std::size_t i = 0; i < expr.operators.size(); ++i) {
          Value right = evaluate(*expr.children[i + 1]);
          here_ = expr.offset;
          const std::string& name = expr.operators[i];
          const bool holds = name == "=="       ? equal(left, right)
                             : name == "!="     ? !equal(left, right)
                             : name == "in"     ? contains(right, left)
                             : name == "not in" ? !contains(right, left)
                             : name == "<"      ? compare(left, right) < 0
                             : name == "<="     ? compare(left, right) <= 0
                             : name == ">"      ? compare(left, right) > 0
                                                : compare(left, right) >= 0;
          if (!holds) return false;
          left = std::move(right);
        }
        return true;
      }
      case ExprKind::kConditional: {
        if (truth(evaluate(*expr.children[0]))) return evaluate(*expr.children[1]);
        if (expr.children[2] != nullptr) return evaluate(*expr.children[2]);
        return Undefined{"inline if"};
      }
    }
    return Undefined{};
  }

  Value binary(const Expr& expr) {
    const std::string& name = expr.text;
    const Value left = evaluate(*expr.children[0]);
    if (name == "and" && !truth(left)) return left;
    if (name == "or" && truth(left)) return left;
    const Value right = evaluate(*expr.children[1]);
    here_ = expr.offset;
    if (name == "and" || name == "or") return right;
    if (name == "~") return text(to_text(left) + to_text(right));
    require_defined(left);
    require_defined(right);
    if (is_integral(left) && is_integral(right) && name != "/")
      return integer_result(name, integer(left), integer(right));
    if (number(left) && number(right)) return real_result(name, *number(left), *number(right));
    if (name == "+" && is<Text>(left) && is<Text>(right))
      return text(text_of(left) + text_of(right));
    if (name == "+" && is<List*>(left) && is<List*>(right)) {
      std::vector<Value> items = iterate(left);
      const std::vector<Value> more = iterate(right);
      items.insert(items.end(), more.begin(), more.end());
      return new_list(std::move(items), std::get<List*>(left)->is_tuple);
    }
    if (name == "*" && is<Text>(left) && is_integral(right))
      return repeat(text_of(left), integer(right));
    if (name == "*" && is_integral(left) && is<Text>(right))
      return repeat(text_of(right), integer(left));
    if (name == "%" && is<Text>(left)) unsupported("string formatted by %");
    error("operator " + quote_text(name) + " does not fit its operands",
          std::string(type_name(left)), std::string(type_name(right)));
  }

  Value repeat(const std::string& source, std::int64_t times) {
    std::string result;
    if (times > 0 && !source.empty()) {
      if (static_cast<std::size_t>(times) > bytes_left_ / source.size()) over_limit("bytes");
      result.reserve(source.size() * static_cast<std::size_t>(times));
      for (std::int64_t i = 0; i < times; ++i) result += source;
    }
    return text(std::move(result));
  }

  Value integer_result(const std::string& name, std::int64_t a, std::int64_t b) {
    std::int64_t result = 0;
    bool overflow = false;
    if (name == "+") {
      overflow = __builtin_add_overflow(a, b, &result);
    } else if (name == "-") {
      overflow = __builtin_sub_overflow(a, b, &result);
    } else if (name == "*") {
      overflow = __builtin_mul_overflow(a, b, &result);
    } else if (name == "**") {
      if (b < 0) return real_result(name, static_cast<double>(a), static_cast<double>(b));
      result = 1;
      for (std::int64_t i = 0; i < b && !overflow; ++i) {
        step();
        overflow = __builtin_mul_overflow(result, a, &result);
      }
    } else {  // // and %: towards minus infinity
      if (b == 0) error("division by zero");
      if (b == -1) {
        overflow = name == "//" && __builtin_sub_overflow(std::int64_t{0}, a, &result);
      } else {
        const std::int64_t rest = a % b;
        const bool rounds = rest != 0 && (rest < 0) != (b < 0);
        result = name == "//" ? a / b - (rounds ? 1 : 0) : rest + (rounds ? b : 0);
      }
    }
    if (overflow) unsupported("integer beyond 64 bits");
    return result;
  }
  Value real_result(const std::string& name, double a, double b) {
    if (name == "+") return a + b;
    if (name == "-") return a - b;
    if (name == "*") return a * b;
    if (name == "**") return std::pow(a, b);
    if (b == 0.0) error("division by zero");
    if (name == "/") return a / b;
    if (name == "//") return std::floor(a / b);
    const double rest = std::fmod(a, b);
    return rest != 0.0 && (rest < 0) != (b < 0) ? rest + b : rest;
  }

  // --- calls ---

  Arguments evaluate_arguments(const Expr& expr) {
    Arguments result;
    for (std::size_t i = 1; i < expr.children.size(); ++i)
      result.items.push_back(evaluate(*expr.children[i]));
    for (const auto& [name, value] : expr.named) result.named.emplace_back(name, evaluate(*value));
    return result;
  }
  // The argument at a position or of a name.
  static const Value* argument(const Arguments& arguments, std::size_t at, std::string_view name) {
    return at < arguments.items.size() ? &arguments.items[at] : named_argument(arguments, name);
  }
  static const Value* named_argument(const Arguments& arguments, std::string_view name) {
    for (const auto& [known, value] : arguments.named)
      if (known == name) return &value;
    return nullptr;
  }
  void at_most(const Arguments& arguments, std::size_t count, std::string_view of) const {
    if (arguments.items.size() + arguments.named.size() > count)
      error(quote_text(of) + " has too many arguments", "at most " + std::to_string(count),
            std::to_string(arguments.items.size() + arguments.named.size()));
  }

  Value call(const Expr& expr) {
    const Expr& callee = *expr.children[0];
    if (callee.kind == ExprKind::kAttribute) {
      const Value object = evaluate(*callee.children[0]);
      const Arguments arguments = evaluate_arguments(expr);
      here_ = callee.offset;
      return call_method(object, callee.text, arguments);
    }
    const Value function = evaluate(callee);
    const Arguments arguments = evaluate_arguments(expr);
    here_ = expr.offset;
    require_defined(function);
    if (!is<Function>(function))
      error("value cannot be called", "a function", std::string(type_name(function)));
    const std::string_view name = std::get<Function>(function).name;
    if (name == "raise_exception") {
      const Value* const message = argument(arguments, 0, "message");
      fail(ErrorCode::kConfig, template_.source, here_,
           message == nullptr ? "the template refuses" : to_text(*message));
    }
    if (name == "range") return range(arguments);
    Dict* const dict =
        new_dict(name == "namespace" ? Dict::Kind::kNamespace : Dict::Kind::kMapping);
    at_most(Arguments{arguments.items, {}}, 1, name);
    if (!arguments.items.empty()) {
      if (!is<Dict*>(arguments.items[0]))
        unsupported(std::string(name) + " of something else than a mapping");
      dict->items = std::get<Dict*>(arguments.items[0])->items;
      charge(dict->items.size() * sizeof(Value));
    }
    for (const auto& [key, value] : arguments.named) dict->set(key, value);
    return dict;
  }

  Value range(const Arguments& arguments) {
    at_most(arguments, 3, "range");
    if (arguments.items.empty()) error("'range' has no arguments", "1 to 3", "0");
    std::vector<std::int64_t> bounds;
    for (const Value& value : arguments.items) bounds.push_back(require_int(value, "range"));
    std::int64_t at = bounds.size() > 1 ? bounds[0] : 0;
    const std::int64_t end = bounds.size() > 1 ? bounds[1] : bounds[0];
    const std::int64_t stride = bounds.size() > 2 ? bounds[2] : 1;
    if (stride == 0) error("range", "a step that is not 0", "0");
    std::vector<Value> items;
    while (stride > 0 ? at < end : at > end) {
      step();
      items.emplace_back(at);
      if (__builtin_add_overflow(at, stride, &at)) break;
    }
    return new_list(std::move(items));
  }

  Value call_method(const Value& object, const std::string& name, const Arguments& arguments) {
    require_defined(object);
    if (!arguments.named.empty())
      unsupported("method " + quote_text(name) + " with named arguments");
    const auto& items = arguments.items;
    if (is<Text>(object)) return text_method(object, name, arguments);
    if (const auto* pointer = std::get_if<Dict*>(&object)) {
      const Dict& dict = **pointer;
      if (dict.kind == Dict::Kind::kMapping) {
        if (name == "get") {
          at_most(arguments, 2, name);
          if (items.empty()) error("'get' has no key", "1 or 2 arguments", "0");
          const Value* const found = is<Text>(items[0]) ? dict.find(text_of(items[0])) : nullptr;
          if (found != nullptr) return *found;
          return items.size() > 1 ? items[1] : Value(None{});
        }
        at_most(arguments, 0, name);
        std::vector<Value> result;
        if (name == "keys") return new_list(iterate(object));
        if (name == "values") {
          for (const auto& [key, value] : dict.items) result.push_back(value);
          return new_list(std::move(result));
        }
        if (name == "items") return pairs(dict);
      } else if (dict.kind == Dict::Kind::kLoop && name == "cycle" && !items.empty()) {
        const auto index = std::get<std::int64_t>(*dict.find("index0"));
        return items[static_cast<std::size_t>(index) % items.size()];
      }
    }
    unsupported("method " + quote_text(name) + " of " + std::string(type_name(object)));
  }

  Value pairs(const Dict& dict) {
    std::vector<Value> result;
    for (const auto& [key, value] : dict.items) {
      std::vector<Value> pair{text(key), value};
      result.push_back(new_list(std::move(pair), true));
    }
    return new_list(std::move(result));
  }

  Value text_method(const Value& object, const std::string& name, const Arguments& arguments) {
    const std::string& self = text_of(object);
    const auto& items = arguments.items;
    step(self.size() / 256);
    const auto text_at = [&](std::size_t at) -> const std::string& {
      if (at >= items.size())
        error("method " + quote_text(name) + " lacks an argument",
              std::to_string(at + 1) + " or more", std::to_string(items.size()));
      return require_text(items[at], "argument of " + quote_text(name));
    };
    const auto count_at = [&](std::size_t at) -> std::int64_t {
      return at < items.size() ? require_int(items[at], "argument of " + quote_text(name)) : -1;
    };
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      at_most(arguments, 1, name);
      const bool by_space = items.empty() || is<None>(items[0]);
      return text(
          strip(self, by_space ? nullptr : &text_at(0), name != "rstrip", name != "lstrip"));
    }
    if (name == "startswith" || name == "endswith") {
      at_most(arguments, 1, name);
      const auto matches = [&](const Value& value) {
        const std::string& part = require_text(value, "argument of " + quote_text(name));
        return name == "startswith" ? self.starts_with(part) : self.ends_with(part);
      };
      if (!items.empty() && is<List*>(items[0])) {
        const auto& parts = std::get<List*>(items[0])->items;
        return std::any_of(parts.begin(), parts.end(), matches);
      }
      text_at(0);
      return matches(items[0]);
    }
    if (name == "split") {
      at_most(arguments, 2, name);
      const bool by_space = items.empty() || is<None>(items[0]);
      return split(self, by_space ? nullptr : &text_at(0), count_at(1));
    }
    if (name == "replace") {
      at_most(arguments, 3, name);
      return text(replace(self, text_at(0), text_at(1), count_at(2)));
    }
    if (name == "find") {
      at_most(arguments, 1, name);
      const std::size_t found = find_text(self, text_at(0), 0);
      if (found == std::string::npos) return std::int64_t{-1};
      return static_cast<std::int64_t>(characters(std::string_view(self).substr(0, found)).size());
    }
    if (name == "count") {
      at_most(arguments, 1, name);
      const std::string& part = text_at(0);
      if (part.empty()) return static_cast<std::int64_t>(characters(self).size()) + 1;
      std::int64_t count = 0;
      for (std::size_t at = 0; (at = find_text(self, part, at)) != std::string::npos;
           at += part.size())
        ++count;
      return count;
    }
    if (name == "join") {
      at_most(arguments, 1, name);
      if (items.empty()) error("'join' lacks an argument", "1", "0");
      std::string result;
      bool first = true;
      for (const Value& item : iterate(items[0])) {
        if (!std::exchange(first, false)) result += self;
        result += require_text(item, "element to join");
        if (result.size() > bytes_left_) over_limit("bytes");
      }
      return text(std::move(result));
    }
    at_most(arguments, 0, name);
    if (name == "upper") return text(upper_case(self));
    if (name == "lower") return text(lower_case(self));
    if (name == "capitalize") return text(capitalise(self));
    if (name == "title")
      return text(title(self, [](char32_t code) {
        const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code));
        return category != UTF8PROC_CATEGORY_LU && category != UTF8PROC_CATEGORY_LL &&
               category != UTF8PROC_CATEGORY_LT;
      }));
    if (name == "splitlines") {
      std::vector<Value> lines;
      std::size_t begin = 0;
      while (begin < self.size()) {
        const std::size_t end = std::min(self.find_first_of("\r\n", begin), self.size());
        lines.push_back(text(self.substr(begin, end - begin)));
        begin = end + (self.compare(end, 2, "\r\n") == 0 ? 2 : 1);
      }
      return new_list(std::move(lines));
    }
    unsupported("method " + quote_text(name) + " of a string");
  }

  std::string strip(const std::string& source, const std::string* set, bool left, bool right) {
    const auto drops = [&](std::string_view character) {
      if (set == nullptr) return is_python_space(scan_utf8(character).code);
      return set->find(character) != std::string::npos;
    };
    std::string_view rest = source;
    while (left && !rest.empty()) {
      step();
      const std::string_view character = rest.substr(0, scan_utf8(rest).length);
      if (!drops(character)) break;
      rest.remove_prefix(character.size());
    }
    while (right && !rest.empty()) {
      step();
      const std::size_t at = last_character(rest);
      if (!drops(rest.substr(at))) break;
      rest = rest.substr(0, at);
    }
    return std::string(rest);
  }

  Value split(const std::string& source, const std::string* separator, std::int64_t limit) {
    std::vector<Value> parts;
    if (separator != nullptr) {
      if (separator->empty()) error("split", "a separator that is not empty", "''");
      std::size_t begin = 0;
      for (std::size_t at;
           limit != 0 && (at = find_text(source, *separator, begin)) != std::string::npos;
           --limit) {
        parts.push_back(text(source.substr(begin, at - begin)));
        begin = at + separator->size();
      }
      parts.push_back(text(source.substr(begin)));
      return new_list(std::move(parts));
    }
    const std::vector<std::string_view> all = characters(source);
    const auto is_space_at = [&](std::size_t at) {
      return is_python_space(scan_utf8(all[at]).code);
    };
    for (std::size_t at = 0; at < all.size();) {
      if (is_space_at(at)) {
        ++at;
        continue;
      }
      std::string part;
      if (limit == 0) {  // the rest as it is
        for (; at < all.size(); ++at) part += all[at];
      } else {
        for (; at < all.size() && !is_space_at(at); ++at) part += all[at];
        --limit;
      }
      parts.push_back(text(std::move(part)));
    }
    return new_list(std::move(parts));
  }

  std::string replace(const std::string& source, const std::string& from, const std::string& to,
                      std::int64_t limit) {
    std::string result;
    std::size_t begin = 0;
    if (from.empty()) {  // between all characters
      for (const std::string_view character : characters(source)) {
        if (limit != 0) {
          result += to;
          --limit;
        }
        result += character;
        if (result.size() > bytes_left_) over_limit("bytes");
      }
      return limit != 0 ? result + to : result;
    }
    for (std::size_t at; limit != 0 && (at = find_text(source, from, begin)) != std::string::npos;
         --limit) {
      step();
      result.append(source, begin, at - begin).append(to);
      begin = at + from.size();
      if (result.size() > bytes_left_) over_limit("bytes");
    }
    return result.append(source, begin);
  }

  std::string capitalise(std::string_view source) {
    if (source.empty()) return "";
    const std::size_t first = scan_utf8(source).length;
    return upper_case(source.substr(0, first)) + lower_case(source.substr(first));
  }

  template <class Separates>
  std::string title(std::string_view source, Separates separates) {
    std::string result;
    bool starts = true;
    for (const std::string_view character : characters(source)) {
      result += starts ? upper_case(character) : lower_case(character);
      starts = separates(scan_utf8(character).code);
    }
    return result;
  }

  // --- filters ---

  Value apply_filter(const std::string& name, const Value& value, const Arguments& arguments) {
    const auto at = [&](std::size_t index, std::string_view key) {
      return argument(arguments, index, key);
    };
    if (name == "default" || name == "d") {
      at_most(arguments, 2, name);
      const Value* const fallback = at(0, "default_value");
      const Value* const boolean = at(1, "boolean");
      const bool missing =
          is<Undefined>(value) || (boolean != nullptr && truth(*boolean) && !truth(value));
      if (!missing) return value;
      return fallback != nullptr ? *fallback : text("");
    }
    if (name == "length" || name == "count") {
      at_most(arguments, 0, name);
      if (is<Text>(value)) return static_cast<std::int64_t>(characters(text_of(value)).size());
      if (is<List*>(value)) return static_cast<std::int64_t>(std::get<List*>(value)->items.size());
      return static_cast<std::int64_t>(iterate(value).size());
    }
    if (name == "tojson") {
      for (const auto& [key, argument_value] : arguments.named) {
        if (key == "ensure_ascii" && !truth(argument_value)) continue;
        if (key != "indent") unsupported("tojson with " + quote_text(key));
      }
      if (!arguments.items.empty()) unsupported("tojson with arguments that have no name");
      std::optional<std::size_t> indent;
      if (const Value* const width = at(0, "indent"); width != nullptr && !is<None>(*width)) {
        const std::int64_t spaces = require_int(*width, "indent");
        if (spaces < 0 || spaces > 64)
          error("tojson", "an indent of 0 to 64", std::to_string(spaces));
        indent = static_cast<std::size_t>(spaces);
      }
      std::string result;
      to_json(value, indent, 0, result);
      return text(std::move(result));
    }
    if (name == "join") {
      at_most(arguments, 2, name);
      const Value* const separator = at(0, "d");
      const Value* const field = at(1, "attribute");
      const std::string between = separator == nullptr ? "" : to_text(*separator);
      std::string result;
      bool first = true;
      for (const Value& item : iterate(value)) {
        if (!std::exchange(first, false)) result += between;
        result += to_text(field == nullptr ? item : path(item, *field));
        if (result.size() > bytes_left_) over_limit("bytes");
      }
      return text(std::move(result));
    }
    if (name == "first" || name == "last") {
      at_most(arguments, 0, name);
      const std::vector<Value> items = iterate(value);
      if (items.empty()) return Undefined{"item"};
      return name == "first" ? items.front() : items.back();
    }
    if (name == "list") {
      at_most(arguments, 0, name);
      return new_list(iterate(value));
    }
    if (name == "items") {
      at_most(arguments, 0, name);
      if (is<Undefined>(value)) return new_list({});
      const auto* dict = std::get_if<Dict*>(&value);
      if (dict == nullptr) error("items", "a mapping", std::string(type_name(value)));
      return pairs(**dict);
    }
    if (name == "reverse") {
      at_most(arguments, 0, name);
      std::vector<Value> items = iterate(value);
      std::reverse(items.begin(), items.end());
      if (!is<Text>(value)) return new_list(std::move(items));
      std::string result;
      for (const Value& item : items) result += text_of(item);
      return text(std::move(result));
    }
    if (name == "selectattr" || name == "rejectattr" || name == "select" || name == "reject")
      return select(name, value, arguments);
    if (name == "map") return map(value, arguments);
    if (name == "int") {
      at_most(arguments, 1, name);
      return to_integer(value, at(0, "default"));
    }
    // The rest works on text; what is no text becomes it.
    const std::string source = to_text(value);
    step(source.size() / 256);
    if (name == "trim") {
      at_most(arguments, 1, name);
      const Value* const set = at(0, "chars");
      const bool by_space = set == nullptr || is<None>(*set);
      return text(strip(source, by_space ? nullptr : &require_text(*set, "trim"), true, true));
    }
    if (name == "replace") {
      at_most(arguments, 3, name);
      const Value* const from = at(0, "old");
      const Value* const to = at(1, "new");
      const Value* const count = at(2, "count");
      if (from == nullptr || to == nullptr) error("'replace' lacks an argument", "2 or 3", "fewer");
      return text(
          replace(source, to_text(*from), to_text(*to),
                  count == nullptr || is<None>(*count) ? -1 : require_int(*count, "replace")));
    }
    if (name == "indent") return indent(source, arguments);
    constexpr std::array<std::string_view, 6> kPlain = {"upper", "lower",  "capitalize",
                                                        "title", "string", "safe"};
    if (std::find(kPlain.begin(), kPlain.end(), name) == kPlain.end())
      unsupported("filter " + quote_text(name));
    at_most(arguments, 0, name);
    if (name == "upper") return text(upper_case(source));
    if (name == "lower") return text(lower_case(source));
    if (name == "capitalize") return text(capitalise(source));
    if (name == "title")
      return text(title(source, [](char32_t code) {
        return is_python_space(code) || code == '-' || code == '(' || code == '{' || code == '[' ||
               code == '<';
      }));
    return text(source);
  }

  // "a.b.0": attributes and indices one after the other.
  Value path(const Value& start, const Value& name) {
    if (is<std::int64_t>(name)) return item(start, name, "item");
    const std::string& whole = require_text(name, "attribute");
    Value value = start;
    for (std::size_t begin = 0; begin <= whole.size();) {
      const std::size_t end = std::min(whole.find('.', begin), whole.size());
      const std::string_view part = std::string_view(whole).substr(begin, end - begin);
      std::int64_t index = 0;
      const bool is_index =
          !part.empty() && std::from_chars(part.data(), part.data() + part.size(), index).ptr ==
                               part.data() + part.size();
      // Part of a value made while rendering: an error later must not name it.
      value = is_index ? item(value, index, "item") : attribute(value, part);
      if (is<Undefined>(value)) value = Undefined{"attribute"};
      begin = end + 1;
    }
    return value;
  }

  Value select(const std::string& name, const Value& value, const Arguments& arguments) {
    if (!arguments.named.empty()) unsupported(name + " with named arguments");
    const bool by_attribute = name.ends_with("attr");
    const bool wants = name.starts_with("select");
    const auto& items = arguments.items;
    std::size_t next = 0;
    if (by_attribute && items.empty())
      error(quote_text(name) + " lacks an attribute", "1 or more", "0");
    if (by_attribute) ++next;
    std::optional<std::string> test;
    if (next < items.size()) test = require_text(items[next++], "name of a test");
    const std::vector<Value> rest(items.begin() + static_cast<std::ptrdiff_t>(next), items.end());
    std::vector<Value> kept;
    for (const Value& element : iterate(value)) {
      const Value subject = by_attribute ? path(element, items[0]) : element;
      const bool holds = test ? apply_test(*test, subject, rest) : truth(subject);
      if (holds == wants) kept.push_back(element);
    }
    return new_list(std::move(kept));
  }

  Value map(const Value& value, const Arguments& arguments) {
    std::vector<Value> result;
    if (arguments.items.empty()) {
      at_most(arguments, 2, "map");
      const Value* const field = named_argument(arguments, "attribute");
      const Value* const fallback = named_argument(arguments, "default");
      if (field == nullptr) error("'map' lacks an argument", "a filter or an attribute", "none");
      for (const Value& element : iterate(value)) {
        const Value found = path(element, *field);
        result.push_back(is<Undefined>(found) && fallback != nullptr ? *fallback : found);
      }
    } else {
      const std::string& filter = require_text(arguments.items[0], "name of a filter");
      // A filter that applies filters could nest without end.
      if (filter == "map" || filter.starts_with("select") || filter.starts_with("reject"))
        unsupported("map of " + quote_text(filter));
      const Arguments rest{{arguments.items.begin() + 1, arguments.items.end()}, arguments.named};
      for (const Value& element : iterate(value))
        result.push_back(apply_filter(filter, element, rest));
    }
    return new_list(std::move(result));
  }

  Value to_integer(const Value& value, const Value* fallback) {
    const Value otherwise = fallback != nullptr ? *fallback : Value(std::int64_t{0});
    if (is_integral(value)) return integer(value);
    if (const auto* real = std::get_if<double>(&value)) {
      if (!(std::abs(*real) < 9e18)) return otherwise;
      return static_cast<std::int64_t>(*real);
    }
    if (!is<Text>(value)) return otherwise;
    const std::string digits = strip(text_of(value), nullptr, true, true);
    const char* const begin = digits.data() + (digits.starts_with('+') ? 1 : 0);
    std::int64_t result = 0;
    const auto [end, status] = std::from_chars(begin, digits.data() + digits.size(), result);
    if (status == std::errc() && end == digits.data() + digits.size()) return result;
    double real = 0;
    const auto [real_end, real_status] =
        std::from_chars(begin, digits.data() + digits.size(), real);
    if (real_status != std::errc() || real_end != digits.data() + digits.size() ||
        !(std::abs(real) < 9e18))
      return otherwise;
    return static_cast<std::int64_t>(real);
  }

  Value indent(const std::string& source, const Arguments& arguments) {
    at_most(arguments, 3, "indent");
    const Value* const width = argument(arguments, 0, "width");
    const Value* const first = argument(arguments, 1, "first");
    const Value* const blank = argument(arguments, 2, "blank");
    std::string by = "    ";
    if (width != nullptr && is<Text>(*width)) {
      by = text_of(*width);
    } else if (width != nullptr) {
      const std::int64_t spaces = require_int(*width, "indent");
      if (spaces > 4096) over_limit("bytes");
      by.assign(static_cast<std::size_t>(std::max<std::int64_t>(spaces, 0)), ' ');
    }
    std::string result;
    std::size_t begin = 0;
    bool is_first = true;
    while (true) {
      const std::size_t end = std::min(source.find('\n', begin), source.size());
      const bool is_blank = begin == end;
      if (is_first ? (first != nullptr && truth(*first))
                   : (!is_blank || (blank != nullptr && truth(*blank))))
        result += by;
      result.append(source, begin, end - begin);
      if (result.size() > bytes_left_) over_limit("bytes");
      if (end == source.size()) return text(std::move(result));
      result += '\n';
      begin = end + 1;
      is_first = false;
    }
  }

  // --- tests ---

  bool apply_test(const std::string& name, const Value& value,
                  const std::vector<Value>& arguments) {
    const auto takes = [&](std::size_t count) {
      if (arguments.size() != count)
        error("test " + quote_text(name), std::to_string(count) + " arguments",
              std::to_string(arguments.size()));
    };
    struct Binary {
      std::string_view name, operation;
    };
    constexpr std::array<Binary, 18> kBinary = {{{"eq", "=="},
                                                 {"equalto", "=="},
                                                 {"==", "=="},
                                                 {"ne", "!="},
                                                 {"!=", "!="},
                                                 {"lt", "<"},
                                                 {"lessthan", "<"},
                                                 {"<", "<"},
                                                 {"le", "<="},
                                                 {"<=", "<="},
                                                 {"gt", ">"},
                                                 {"greaterthan", ">"},
                                                 {">", ">"},
                                                 {"ge", ">="},
                                                 {">=", ">="},
                                                 {"in", "in"},
                                                 {"divisibleby", "%"},
                                                 {"sameas", "is"}}};
    for (const auto& [known, operation] : kBinary) {
      if (name != known) continue;
      takes(1);
      const Value& other = arguments[0];
      if (operation == "==") return equal(value, other);
      if (operation == "!=") return !equal(value, other);
      if (operation == "in") return contains(other, value);
      if (operation == "is") return value.index() == other.index() && equal(value, other);
      if (operation == "%") {
        const std::int64_t divisor = require_int(other, "divisibleby");
        if (divisor == 0) error("division by zero");
        return divisor == -1 || require_int(value, "divisibleby") % divisor == 0;
      }
      const int order = compare(value, other);
      if (operation == "<") return order < 0;
      if (operation == "<=") return order <= 0;
      return operation == ">" ? order > 0 : order >= 0;
    }
    takes(0);
    if (name == "defined") return !is<Undefined>(value);
    if (name == "undefined") return is<Undefined>(value);
    if (name == "none") return is<None>(value);
    if (name == "string") return is<Text>(value);
    if (name == "number") return number(value).has_value();
    if (name == "integer") return is<std::int64_t>(value);
    if (name == "float") return is<double>(value);
    if (name == "boolean") return is<bool>(value);
    if (name == "true") return is<bool>(value) && std::get<bool>(value);
    if (name == "false") return is<bool>(value) && !std::get<bool>(value);
    if (name == "callable") return is<Function>(value);
    const bool is_mapping =
        is<Dict*>(value) && std::get<Dict*>(value)->kind == Dict::Kind::kMapping;
    if (name == "mapping") return is_mapping;
    if (name == "sequence") return is<Text>(value) || is<List*>(value) || is_mapping;
    if (name == "iterable")
      return is<Text>(value) || is<List*>(value) || is_mapping || is<Undefined>(value);
    if (name == "odd") return require_int(value, "odd") % 2 != 0;
    if (name == "even") return require_int(value, "even") % 2 == 0;
    if (name == "lower" || name == "upper") {
      const std::string source = to_text(value);
      const std::string mapped = name == "lower" ? lower_case(source) : upper_case(source);
      const std::string other = name == "lower" ? upper_case(source) : lower_case(source);
      return source == mapped && source != other;  // Python: and there is a letter with case
    }
    unsupported("test " + quote_text(name));
  }

  const Template& template_;
  std::size_t steps_left_;
  std::size_t bytes_left_;
  std::size_t here_ = 0;  // what is being evaluated, for errors
  std::string* out_ = nullptr;
  std::deque<List> lists_;  // a deque: addresses stay
  std::deque<Dict> dicts_;
  std::vector<std::vector<std::pair<std::string, Value>>> scopes_;
};

}  // namespace sluice::detail::jinja
