// SPDX-License-Identifier: MIT
#include "sluice/stream/speech_segmenter.hpp"

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Border = SpeechSegmenter::Border;

TEST(SpeechSegmenter, TypedInExample) {
  SpeechSegmenter segmenter;
  const std::vector<double> probabilities{.1, .6, .9, .45, .4, .3, .2, .7,
                                          .3, .3, .3, .3,  .3, .1, .8, .2};
  for (std::size_t window = 0; window < probabilities.size(); ++window) {
    const std::optional<Border> border = segmenter.accept(probabilities[window]);
    if (window == 1) {
      EXPECT_EQ(border, (Border{true, 32}));
    } else if (window == 12) {
      EXPECT_EQ(border, (Border{false, 4576}));
    } else if (window == 14) {
      EXPECT_EQ(border, (Border{true, 6688}));
    } else {
      EXPECT_FALSE(border) << window;
    }
  }
  EXPECT_TRUE(segmenter.speaking());
  EXPECT_EQ(segmenter.finish(), (Border{false, 16 * 512}));
  EXPECT_FALSE(segmenter.finish());
}

TEST(SpeechSegmenter, NothingBeginsBeforeTheStream) {
  SpeechSegmenter segmenter;
  EXPECT_EQ(segmenter.accept(0.9), (Border{true, 0}));
  segmenter.reset();
  EXPECT_EQ(segmenter.samples(), 0);
  EXPECT_FALSE(segmenter.accept(std::nan("")));
  EXPECT_EQ(segmenter.accept(0.5), (Border{true, 32}));
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(segmenter.accept(std::nan("")));
  EXPECT_TRUE(segmenter.speaking());
}

TEST(SpeechSegmenter, SnapshotsContinue) {
  SpeechSegmenter first;
  for (const double probability : {.9, .9, .2, .2}) first.accept(probability);
  ByteWriter writer;
  first.save(writer);
  SpeechSegmenter second;
  ByteReader reader(writer.bytes());
  second.restore(reader);
  for (const double probability : {.2, .4, .2, .2, .9})
    EXPECT_EQ(first.accept(probability), second.accept(probability));
  ByteWriter wrong;
  wrong.write(std::int64_t{5});
  wrong.write(std::int64_t{6});
  wrong.write(std::uint8_t{1});
  ByteReader damaged(wrong.bytes());
  EXPECT_TRUE(test::error_of([&] { second.restore(damaged); }));
}

TEST(SpeechSegmenter, RefusesConfigurationsByName) {
  const auto field_of = [](SpeechSegmenterConfig config) {
    const auto error = test::error_of([&] { SpeechSegmenter segmenter(config); });
    return error ? error->detail().field : std::string("none");
  };
  EXPECT_EQ(field_of({}), "none");
  EXPECT_EQ(field_of({.sample_rate = 0}), "sample_rate");
  EXPECT_EQ(field_of({.window = 0}), "window");
  EXPECT_EQ(field_of({.on = 0}), "on");
  EXPECT_EQ(field_of({.off = 0.6}), "off");
  EXPECT_EQ(field_of({.min_silence_ms = -1}), "min_silence_ms");
  EXPECT_EQ(field_of({.pad_ms = std::nan("")}), "pad_ms");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
