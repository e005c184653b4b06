// SPDX-License-Identifier: MIT
#include "sluice/io/json.hpp"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;
using test::loads_or_throws;
using test::TempFolder;

std::string nested(int depth) {
  return std::string(static_cast<std::size_t>(depth), '[') +
         std::string(static_cast<std::size_t>(depth), ']');
}

TEST(ParseJson, BuildsTheSameValueAsTheLibrarysOwnParser) {
  const char* const texts[] = {
      "null",
      "true",
      "-3",
      "18446744073709551615",
      "1.5e-3",
      "\"a\\u00e9\\n\"",
      "[]",
      "{}",
      R"([1,[2,[3,[]]],{"a":[{}]},null,"x"])",
      R"({"b":{"c":[1,2,{"d":null}],"e":"f"},"a":[[],{}],"":0,"z":{"b":{"b":{}}}})",
      "\xef\xbb\xbf {\"bom\": 1} "};
  for (const char* const text : texts)
    EXPECT_EQ(parse_json(text, "text"), nlohmann::json::parse(text)) << text;
}

TEST(ParseJson, ErrorsNameTheFileAndTheByte) {
  // Each text with the offset of the byte at which it stops being JSON.
  const struct {
    std::string text;
    int at;
  } cases[] = {{"", 0},           {"{\"a\":}", 5},    {"[1,2", 4},    {"[1 2]", 3},
               {"tru", 3},        {"\"a\x01\"", 2},   {"[1]x", 3},    {"\"\xff\"", 1},
               {"[\"\xc3\"]", 3}, {"{\"a\":1,}", 7},  {"[1e999]", 5}, {"NaN", 0},
               {"{1:2}", 1},      {"\"\\ud800\"", 7}, {"[-]", 2},     {"\"abc", 4}};
  for (const auto& one : cases)
    expect_error(ErrorCode::kFormat, {"in some.json", "(byte " + std::to_string(one.at) + ")"},
                 [&] { parse_json(one.text, "some.json"); });
  expect_error(ErrorCode::kFormat, {"(byte 13)"},
               [&] { parse_json("{\"a\":}", "file", DuplicateKeys::kReject, 8); });
}

TEST(ParseJson, NestingIsBoundedAndBracketsInStringsDoNotCount) {
  EXPECT_EQ(parse_json(nested(kMaxJsonDepth), "text").size(), 1U);
  expect_error(ErrorCode::kFormat, {"nested", "(byte 128)", "at most 128"},
               [] { parse_json(nested(kMaxJsonDepth + 1), "text"); });
  // Deep enough to overflow the stack of a recursive parser or destructor.
  expect_error(ErrorCode::kFormat, {"nested"}, [] { parse_json(nested(10'000'000), "text"); });
  expect_error(ErrorCode::kFormat, {"nested"},
               [] { parse_json(std::string(10'000'000, '['), "text"); });
  std::string objects;
  for (int i = 0; i < 1000; ++i) objects += "{\"a\":";
  expect_error(ErrorCode::kFormat, {"nested"}, [&] { parse_json(objects, "text"); });
  const std::string brackets =
      "\"" + std::string(1000, '[') + "\\\"" + std::string(1000, '{') + "\"";
  EXPECT_EQ(parse_json(brackets, "text").get<std::string>().size(), 2001U);
  expect_error(ErrorCode::kFormat, {"(byte 0)"}, [] { parse_json("]]]]", "text"); });
}

TEST(ParseJson, DuplicateNames) {
  const std::string text = R"({"a":1,"b":{"a":2},"a":{"c":3}})";
  EXPECT_EQ(parse_json(text, "text"), Json::parse(R"({"a":{"c":3},"b":{"a":2}})"));
  expect_error(ErrorCode::kFormat, {"duplicate", "field 'a'"},
               [&] { parse_json(text, "text", DuplicateKeys::kReject); });
  EXPECT_NO_THROW(parse_json(R"([{"a":1},{"a":1}])", "text", DuplicateKeys::kReject));
}

TEST(ParseJson, MessagesStayShortAndPrintable) {
  const auto error =
      test::expected_error([] { parse_json("{\"\x1b[31m" + std::string(100'000, 'x'), "text"); });
  ASSERT_TRUE(error);
  EXPECT_LT(std::string(error->what()).size(), 600U);
  EXPECT_EQ(std::string(error->what()).find('\x1b'), std::string::npos);
}

TEST(ParseJson, TruncatedAndMutatedTextNeverCrashes) {
  const std::string text =
      R"({"name":"a\u00e9\"","list":[1,-2,3.5e7,true,null,{"deep":[[]]}],"empty":{}})";
  for (std::size_t size = 0; size < text.size(); ++size) {
    const std::vector<char> exact(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_FALSE(loads_or_throws([&] { parse_json({exact.data(), size}, "text"); })) << size;
  }
  for (std::size_t at = 0; at < text.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::vector<char> exact(text.begin(), text.end());
      exact[at] = static_cast<char>(value);
      loads_or_throws([&] { parse_json({exact.data(), exact.size()}, "text"); });
    }
  }
}

TEST(ReadJsonFile, ReadsAndNamesTheFile) {
  const TempFolder folder;
  EXPECT_EQ(read_json_file(folder.write("good.json", "{\"a\": [1]}"))["a"][0], 1);
  expect_error(ErrorCode::kIo, {folder.path("none.json"), "No such file"},
               [&] { read_json_file(folder.path("none.json")); });
  expect_error(ErrorCode::kFormat, {folder.path("bad.json"), "byte 5"},
               [&] { read_json_file(folder.write("bad.json", "{\"a\":}")); });
  expect_error(ErrorCode::kFormat, {folder.path("empty.json"), "byte 0"},
               [&] { read_json_file(folder.write("empty.json", "")); });
}

class JsonFields : public ::testing::Test {
 protected:
  const Json object_ = parse_json(
      R"({"int":-7,"big":18446744073709551615,"real":2.0,"bool":true,"text":"word","null":null,
          "ints":[1,-2],"mixed":[1,"2"],"floats":[1,0.5],"texts":["a","b"],"object":{"x":1}})",
      "config.json");
};

TEST_F(JsonFields, GiveTypedValues) {
  EXPECT_EQ(json_int(object_, "int", "f"), -7);
  EXPECT_EQ(json_uint(object_, "big", "f"), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(json_float(object_, "real", "f"), 2.0);
  EXPECT_EQ(json_float(object_, "int", "f"), -7.0);
  EXPECT_TRUE(json_bool(object_, "bool", "f"));
  EXPECT_EQ(json_string(object_, "text", "f"), "word");
  EXPECT_EQ(json_ints(object_, "ints", "f"), (std::vector<std::int64_t>{1, -2}));
  EXPECT_EQ(json_floats(object_, "floats", "f"), (std::vector<double>{1, 0.5}));
  EXPECT_EQ(json_strings(object_, "texts", "f"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(json_int(json_object(object_, "object", "f"), "x", "f"), 1);
  EXPECT_EQ(json_array(object_, "ints", "f").size(), 2U);
  EXPECT_TRUE(json_has(object_, "int"));
  EXPECT_FALSE(json_has(object_, "null"));
  EXPECT_FALSE(json_has(object_, "absent"));
}

TEST_F(JsonFields, FallBackWhenAbsentOrNull) {
  for (const char* const key : {"absent", "null"}) {
    EXPECT_EQ(json_int_or(object_, key, "f", 5), 5);
    EXPECT_EQ(json_uint_or(object_, key, "f", 6), 6U);
    EXPECT_EQ(json_float_or(object_, key, "f", 0.5), 0.5);
    EXPECT_TRUE(json_bool_or(object_, key, "f", true));
    EXPECT_EQ(json_string_or(object_, key, "f", "other"), "other");
  }
  EXPECT_EQ(json_int_or(object_, "int", "f", 5), -7);
  EXPECT_EQ(json_string_or(object_, "text", "f", "other"), "word");
  expect_error(ErrorCode::kFormat, {"config.json", "'text'", "an integer", "string 'word'"},
               [&] { json_int_or(object_, "text", "config.json", 5); });
}

TEST_F(JsonFields, ErrorsNameFileFieldExpectedAndFound) {
  const auto bad = [&](std::initializer_list<std::string_view> parts, auto get) {
    expect_error(ErrorCode::kFormat, parts, [&] { get(object_, "config.json"); });
  };
  bad({"config.json", "'absent'", "an integer", "no such field"},
      [](const Json& o, auto where) { json_int(o, "absent", where); });
  bad({"'real'", "an integer", "real number 2.0"},
      [](const Json& o, auto where) { json_int(o, "real", where); });
  bad({"'big'", "an integer", "integer 18446744073709551615"},
      [](const Json& o, auto where) { json_int(o, "big", where); });
  bad({"'int'", "at least 0", "integer -7"},
      [](const Json& o, auto where) { json_uint(o, "int", where); });
  bad({"'text'", "a number", "string 'word'"},
      [](const Json& o, auto where) { json_float(o, "text", where); });
  bad({"'int'", "true or false"}, [](const Json& o, auto where) { json_bool(o, "int", where); });
  bad({"'null'", "a string", "found null"},
      [](const Json& o, auto where) { json_string(o, "null", where); });
  bad({"'mixed'[1]", "integers", "string '2'"},
      [](const Json& o, auto where) { json_ints(o, "mixed", where); });
  bad({"'int'", "an array of strings"},
      [](const Json& o, auto where) { json_strings(o, "int", where); });
  bad({"'ints'", "an object", "array of 2"},
      [](const Json& o, auto where) { json_object(o, "ints", where); });
  bad({"'object'", "an array", "object of 1"},
      [](const Json& o, auto where) { json_array(o, "object", where); });
  expect_error(ErrorCode::kFormat, {"config.json", "'a'", "an object", "array of 0"},
               [] { json_int(Json::array(), "a", "config.json"); });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
