// SPDX-License-Identifier: MIT
// A session that is killed while it saves, and what its file is refused for.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/session.hpp"
#include "stream/session_kill.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::killed_options;
using test::KilledSession;

std::shared_ptr<const Decoder> model() {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/llama3";
  return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
}

TEST_F(KilledSession, RestoresToTheStateBeforeOrAfterTheSave) {
  const auto decoder = model();
  test::expect_kills_survived([&] { return Session<float>(decoder, killed_options()); }, path(),
                              200);
}

// The bits that follow depend on how activations meet quantised weights.
TEST_F(KilledSession, OfOtherArithmeticIsRefused) {
  const auto decoder = model();
  Session<float> session(decoder, killed_options());
  session.accept(std::vector<Token>{1, 2, 3});
  session.save(path());
  SessionOptions rounded = killed_options();
  rounded.activations = Activations::kInt8;
  Session<float> other(decoder, rounded);
  const auto error = test::error_of([&] { other.restore(path()); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  EXPECT_EQ(error->detail().field.substr(0, 11), "activations");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
