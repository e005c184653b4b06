// SPDX-License-Identifier: MIT
/// Chat templates against recordings of Jinja2 (tests/oracle/make_chat_goldens.py), and hostile
/// ones against the limits.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "sluice/core/random.hpp"
#include "sluice/io/chat_template.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;

std::string chat_path(const std::string& name) {
  return std::string(SLUICE_TEST_DATA) + "/chat/" + name;
}

const Json& chat_goldens() {
  static const Json file = read_json_file(chat_path("goldens.json"));
  return file;
}

std::string template_source(const std::string& name) {
  std::ifstream file(chat_path("templates/" + name + ".jinja"), std::ios::binary);
  EXPECT_TRUE(file.good()) << name;
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<ChatMessage> dialogue(const std::string& name) {
  std::vector<ChatMessage> messages;
  for (const Json& message : chat_goldens().at("dialogues").at(name))
    messages.push_back({message.at("role"), message.at("content")});
  return messages;
}

std::string render(const std::string& source, std::vector<ChatVariable> variables = {}) {
  return ChatTemplate(source, "<s>", "</s>").render(dialogue("rounds"), true, variables);
}

TEST(ChatTemplateGoldens, RendersTheFamiliesAsJinja) {
  std::map<std::string, int> rendered;
  for (const Json& entry : chat_goldens().at("cases")) {
    const std::string name = entry.at("template");
    SCOPED_TRACE(name + ", " + entry.at("dialogue").get<std::string>());
    const ChatTemplate chat(template_source(name), "<s>", "</s>");
    std::vector<ChatVariable> variables;
    for (const auto& [variable, value] : entry.at("variables").items())
      variables.push_back({variable, value.get<bool>()});
    const auto messages = dialogue(entry.at("dialogue"));
    const bool prompt = entry.at("add_generation_prompt");
    if (entry.contains("text")) {
      EXPECT_EQ(chat.render(messages, prompt, variables), entry.at("text").get<std::string>());
      ++rendered[name];
    } else {
      const auto error = test::expected_error([&] { chat.render(messages, prompt, variables); });
      ASSERT_TRUE(error);
      const std::string reason = entry.at("error");
      if (error->code() == ErrorCode::kConfig) {
        EXPECT_EQ(error->detail().what, reason);  // raise_exception, in the template's words
      } else {
        EXPECT_NE(reason.find("has no"), std::string::npos) << reason << error->what();
      }
    }
  }
  EXPECT_EQ(rendered.size(), 11U);
  for (const auto& [name, count] : rendered) EXPECT_GE(count, 4) << name;
}

TEST(ChatTemplateGoldens, EveryPieceOfTheLanguageAsJinja) {
  std::size_t texts = 0;
  std::size_t errors = 0;
  for (const Json& entry : chat_goldens().at("snippets")) {
    const std::string source = entry.at("source");
    SCOPED_TRACE(source);
    const std::vector<ChatVariable> variables = {{"flag", true},
                                                 {"off", false},
                                                 {"count", std::int64_t{7}},
                                                 {"name", "Zoë Smith"},
                                                 {"text", " a b  c "}};
    if (entry.contains("text")) {
      ++texts;
      EXPECT_EQ(render(source, variables), entry.at("text").get<std::string>());
    } else {
      ++errors;
      const auto error = test::expected_error([&] { render(source, variables); });
      if (!error) continue;
      EXPECT_EQ(error->detail().where, "chat template");
      EXPECT_NE(error->detail().field.find("line "), std::string::npos) << error->what();
    }
  }
  EXPECT_GE(texts, 80U);
  EXPECT_GE(errors, 50U);
}

TEST(ChatTemplate, OfATokeniser) {
  Json config = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  const Json file = read_json_file(std::string(SLUICE_TEST_DATA) + "/tokenizers/llama2.json");
  const auto tokenizer = [&] {
    return Tokenizer(tokenizer_spec_from_json(file, &config, "tokenizer.json", "config"));
  };
  expect_error(ErrorCode::kConfig, {"tokenizer.json", "chat_template"},
               [&] { ChatTemplate::from_tokenizer(tokenizer()); });
  config["chat_template"] = template_source("llama2");
  const Tokenizer loaded = tokenizer();
  const ChatTemplate chat = ChatTemplate::from_tokenizer(loaded);
  const std::string text = chat.render(dialogue("one"), true);
  EXPECT_EQ(text, "<s>[INST] Hello! [/INST]");
  const std::vector<Token> ids = loaded.encode(text, {.add_special = false, .parse_special = true});
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 1), 1);  // one begin token, not two
}

TEST(ChatTemplate, ErrorsSayWhere) {
  expect_error(ErrorCode::kUnsupported, {"filter 'xmlattr'", "line 2, column 8"},
               [] { render("{% if true %}\n{{ 'x' | xmlattr }}{% endif %}"); });
  const auto error_of = [](const std::string& source) {
    return *test::expected_error([&] { render(source); });
  };
  EXPECT_EQ(error_of("{% macro m() %}{% endmacro %}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{% include 'x' %}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{{ messages.append(1) }}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{{ '%s' % 1 }}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{{ 9223372036854775807 + 1 }}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{{ 99999999999999999999 }}").code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error_of("{% if %}{% endif %}").code(), ErrorCode::kFormat);
  EXPECT_EQ(error_of("text\n\n  {{ 1 + }}").detail().field, "line 3, column 10");
  EXPECT_EQ(error_of("\xFF").code(), ErrorCode::kFormat);
  EXPECT_EQ(error_of("{{ raise_exception('no') }}").code(), ErrorCode::kConfig);
  const Error missing = error_of("{{ messages[0].author.name }}");
  EXPECT_EQ(missing.code(), ErrorCode::kFormat);
  EXPECT_EQ(missing.detail().found, "'author'");
}

TEST(ChatTemplate, MessagesMustBeUtf8) {
  const ChatTemplate chat("{{ messages[0].content }}");
  const std::vector<ChatMessage> messages = {{"user", "fine"}, {"user", "ab\xC3"}};
  expect_error(ErrorCode::kText, {"message 1 (byte 2)"}, [&] { chat.render(messages, false); });
}

TEST(ChatTemplate, LongDialogues) {
  // Steps and bytes are allowed in proportion to the dialogue.
  std::vector<ChatMessage> messages;
  for (int i = 0; i < 4000; ++i)
    messages.push_back({i % 2 == 0 ? "user" : "assistant", std::string(500, 'x')});
  for (const char* name : {"smollm2", "llama3.1", "qwen3", "gemma3", "mistral-v0.3"}) {
    const ChatTemplate chat(template_source(name), "<s>", "</s>");
    EXPECT_GT(chat.render(messages, true).size(), 4000U * 500U) << name;
  }
}

std::string repeated(std::string_view text, int count) {
  std::string result;
  for (int i = 0; i < count; ++i) result += text;
  return result;
}

TEST(ChatTemplateLimits, HostileTemplatesEnd) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"parentheses", "{{ " + repeated("(", 5000) + "1" + repeated(")", 5000) + " }}"},
      {"lists", "{{ " + repeated("[", 5000) + repeated("]", 5000) + " }}"},
      {"signs", "{{ " + repeated("-", 5000) + "1 }}"},
      {"nots", "{{ " + repeated("not ", 5000) + "1 }}"},
      {"conditions", "{{ " + repeated("1 if 1 else ", 5000) + "1 }}"},
      {"sums", "{{ 1" + repeated(" + 1", 5000) + " }}"},
      {"attributes", "{{ messages" + repeated(".a", 5000) + " }}"},
      {"filters", "{{ 'a'" + repeated("|trim", 5000) + " }}"},
      {"calls", "{{ namespace" + repeated("()", 5000) + " }}"},
      {"blocks", repeated("{% if true %}", 5000) + repeated("{% endif %}", 5000)},
      {"loops", repeated("{% for x in range(99) %}", 20) + "x" + repeated("{% endfor %}", 20)},
      {"range", "{{ range(10 ** 15)|length }}"},
      {"range to the end", "{{ range(-9223372036854775807, 9223372036854775807)|length }}"},
      {"repeat", "{{ 'abc' * 10 ** 12 }}"},
      {"power", "{{ 1 ** (10 ** 15) }}"},
      {"doubling text",
       "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
       "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"},
      {"doubling list",
       "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}"
       "{% set ns.s = ns.s + ns.s %}{% endfor %}"},
      {"doubling replace",
       "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
       "{% set ns.s = ns.s|replace('x', 'xxxxxxxxxx') %}{% endfor %}"},
      {"join",
       "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
       "{% set ns.s = [ns.s, ns.s, ns.s]|join(ns.s) %}{% endfor %}"},
      {"deep list",
       "{% set ns = namespace(s=[]) %}{% for i in range(5000) %}"
       "{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}"},
      {"deep equality",
       "{% set ns = namespace(s=[], t=[]) %}{% for i in range(5000) %}"
       "{% set ns.s = [ns.s] %}{% set ns.t = [ns.t] %}{% endfor %}"
       "{{ ns.s == ns.t }}"},
      {"deep json",
       "{% set ns = namespace(s=[]) %}{% for i in range(5000) %}"
       "{% set ns.s = {'a': ns.s} %}{% endfor %}{{ ns.s|tojson }}"},
      {"output", "{% for i in range(999999) %}" + std::string(1000, 'x') + "{% endfor %}"},
      {"indent", "{{ 'x'|indent(999999999, true) }}"},
      {"length", std::string(3 << 20, 'x')},
  };
  for (const auto& [name, source] : cases) {
    SCOPED_TRACE(name);
    const auto error = test::expected_error([&, &text = source] { render(text); });
    if (error) {
      EXPECT_EQ(error->code(), ErrorCode::kCapacity) << error->what();
    }
  }
}

TEST(ChatTemplateLimits, ValuesThatReferToEachOtherLeaveNothingBehind) {
  // A cycle: its text is refused, and a leak checker finds nothing.
  EXPECT_EQ(render("{% set ns = namespace() %}{% set ns.me = [ns] %}{{ ns.me|length }}"), "1");
  EXPECT_EQ(test::expected_error([] {
              render("{% set ns = namespace() %}{% set ns.me = [ns] %}{{ ns.me }}");
            })->code(),
            ErrorCode::kUnsupported);
}

TEST(ChatTemplateDamage, TruncatedAndMutated) {
  Random random(41);
  for (const char* name : {"llama3.1", "qwen3", "gemma3", "llama2", "mistral-v0.3"}) {
    const std::string source = template_source(name);
    const auto attempt = [&](const std::string& text) {
      try {
        render(text);
      } catch (const Error& error) {
        EXPECT_FALSE(error.detail().what.empty());
        EXPECT_FALSE(error.detail().where.empty());
      }
    };
    for (std::size_t size = 0; size < source.size(); size += 3) attempt(source.substr(0, size));
    for (int round = 0; round < 500; ++round) {
      std::string damaged = source;
      for (std::size_t changes = 1 + random.below(4); changes > 0; --changes) {
        const std::size_t at = random.below(damaged.size());
        constexpr std::string_view kCharacters = "{}%#()[]'\"|.,:-+*/~=<>! \n0a_\\";
        switch (random.below(3)) {
          case 0: damaged[at] = kCharacters[random.below(kCharacters.size())]; break;
          case 1: damaged.erase(at, 1 + random.below(8)); break;
          default:
            damaged.insert(at, damaged.substr(random.below(damaged.size()), 1 + random.below(20)));
        }
        if (damaged.empty()) damaged = "{";
      }
      attempt(damaged);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
