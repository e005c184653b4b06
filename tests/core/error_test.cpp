// SPDX-License-Identifier: MIT
#include "sluice/core/error.hpp"

#include <set>
#include <string>
#include <type_traits>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

std::string text(ErrorDetail detail) {
  return Error(ErrorCode::kFormat, std::move(detail)).what();
}

TEST(Error, TextNamesEveryPartThatIsGiven) {
  EXPECT_EQ(text({"bad count", "model.gguf", "tensor_count at byte 8", "at most 10", "11"}),
            "format: bad count in model.gguf, field tensor_count at byte 8: expected at most 10, "
            "found 11");
  EXPECT_EQ(text({"bad count", "", "", "", ""}), "format: bad count");
  EXPECT_EQ(text({"bad count", "model.gguf", "", "", ""}), "format: bad count in model.gguf");
  EXPECT_EQ(text({"bad count", "", "n", "", "11"}), "format: bad count, field n: found 11");
  EXPECT_EQ(text({"bad count", "", "n", "10", ""}), "format: bad count, field n: expected 10");
}

TEST(Error, KeepsCodeAndDetailAndIsARuntimeError) {
  try {
    throw Error(ErrorCode::kShape, {"what", "where", "field", "expected", "found"});
  } catch (const std::runtime_error& caught) {
    const auto* error = dynamic_cast<const Error*>(&caught);
    ASSERT_NE(error, nullptr);
    EXPECT_EQ(error->code(), ErrorCode::kShape);
    EXPECT_EQ(error->detail().what, "what");
    EXPECT_EQ(error->detail().where, "where");
    EXPECT_EQ(error->detail().field, "field");
    EXPECT_EQ(error->detail().expected, "expected");
    EXPECT_EQ(error->detail().found, "found");
  }
}

TEST(Error, EveryCodeHasAWordOfItsOwn) {
  std::set<std::string_view> words;
  for (ErrorCode code :
       {ErrorCode::kIo, ErrorCode::kFormat, ErrorCode::kUnsupported, ErrorCode::kShape,
        ErrorCode::kConfig, ErrorCode::kCapacity, ErrorCode::kOrder, ErrorCode::kText}) {
    EXPECT_NE(to_string(code), "unknown");
    words.insert(to_string(code));
  }
  EXPECT_EQ(words.size(), 8U);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
