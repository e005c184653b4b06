// SPDX-License-Identifier: MIT
#include "sluice/cache/span_finder.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr SpanMarkers kMarkers{100, 101, 10, 200, 201};
const std::vector<Token> kPreviousText{7, 8};
const std::vector<Token> kUser{5};
const std::vector<Token> kAssistant{6};

using Tokens = std::vector<Token>;

// Two rounds behind a block; the last reply has not ended.
const Tokens kChat{100, 7, 8,  10, 31,  32,  33,  101, 10,                // previous text
                   100, 5, 10, 41, 200, 50,  50,  201, 101, 10,           // user, vision
                   100, 6, 10, 61, 62,  101, 10,                          // assistant
                   100, 5, 10, 42, 200, 50,  201, 101, 100, 6,  10, 63};  // no line feed; open

TEST(SpanFinder, FindsTurnsFromBothEnds) {
  EXPECT_EQ(find_turn(kChat, kMarkers, kPreviousText, 0), (TokenRange{0, 9}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kPreviousText, 0, false), (TokenRange{0, 8}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kPreviousText, 1), std::nullopt);
  EXPECT_EQ(find_turn(kChat, kMarkers, kUser, 0), (TokenRange{9, 19}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kUser, 1), (TokenRange{26, 34}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kUser, -1), (TokenRange{26, 34}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kUser, -2), (TokenRange{9, 19}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kUser, -3), std::nullopt);
  EXPECT_EQ(find_turn(kChat, kMarkers, kAssistant, 0), (TokenRange{19, 26}));
  EXPECT_EQ(find_turn(kChat, kMarkers, kAssistant, -1), (TokenRange{34, 38}));
  EXPECT_EQ(find_turn({}, kMarkers, kUser, 0), std::nullopt);
  EXPECT_EQ(find_turn(Tokens{100}, kMarkers, kUser, 0), std::nullopt);
}

TEST(SpanFinder, FindsVisionWithItsMarkers) {
  EXPECT_EQ(find_vision(kChat, kMarkers, 0), (TokenRange{13, 17}));
  EXPECT_EQ(find_vision(kChat, kMarkers, -1), (TokenRange{30, 33}));
  EXPECT_EQ(find_vision(kChat, kMarkers, 2), std::nullopt);
  EXPECT_EQ(find_vision(Tokens{200, 50}, kMarkers, 0), (TokenRange{0, 2}));
}

// Specification, test 7.2: head of 4, texts 0 to 9, end token, line feed.
TEST(SpanFinder, CutsTheMiddleOfABlock) {
  Tokens block{100, 7, 8, 10};
  for (Token text = 0; text < 10; ++text) block.push_back(300 + text);
  block.push_back(101);
  block.push_back(10);
  const auto range = find_turn(block, kMarkers, kPreviousText, 0);
  ASSERT_EQ(range, (TokenRange{0, 16}));
  const auto kept = [&](std::int64_t sinks, std::int64_t window, TextCut rule) {
    const TokenRange cut = find_text_cut(*range, 4, 2, sinks, window, rule);
    Tokens left = block;
    left.erase(left.begin() + cut.begin, left.begin() + cut.end);
    return left;
  };
  EXPECT_EQ(find_text_cut(*range, 4, 2, 2, 3, TextCut::kReleased), (TokenRange{6, 12}));
  EXPECT_EQ(kept(2, 3, TextCut::kReleased), (Tokens{100, 7, 8, 10, 300, 301, 308, 309, 101, 10}));
  EXPECT_EQ(kept(512, 512, TextCut::kReleased), block);
  EXPECT_EQ(find_text_cut(*range, 4, 2, 0, 0, TextCut::kReleased), (TokenRange{4, 15}));
  // Ours: three texts of three, and structure stays.
  EXPECT_EQ(kept(2, 3, TextCut::kProtected),
            (Tokens{100, 7, 8, 10, 300, 301, 307, 308, 309, 101, 10}));
  EXPECT_EQ(kept(512, 512, TextCut::kProtected), block);
  EXPECT_EQ(kept(0, 0, TextCut::kProtected), (Tokens{100, 7, 8, 10, 101, 10}));
}

}  // namespace SLUICE_TEST_UNIT
