// SPDX-License-Identifier: MIT
// After construction a duplex allocates nothing: not when units are fed, read, written, taken back
// or polled, with threads or without.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/duplex.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

template <class Policy>
void expect_no_allocation(Policy policy, const char* name) {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/llama3";
  const auto decoder =
      load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
  for (const bool concurrent : {false, true}) {
    DuplexOptions options;
    options.source = {.policy = CachePolicy::kSinkWindow, .num_sink_tokens = 2, .window_size = 9};
    options.target = options.source;
    options.target_prefix = {1};
    options.max_unit_tokens = 4;
    options.max_target_tokens = 300;
    options.sampler = {.temperature = 0.8, .top_k = 20, .repetition_penalty = 1.1};
    options.concurrent = concurrent;
    Duplex<Policy, f16> duplex(decoder, options, policy);
    const std::vector<Token> unit{3, 4, 5};
    const auto before = test::allocation_count();
    std::int64_t outputs = 0;
    for (int u = 0; u < 150; ++u) {
      duplex.feed(unit);
      while (duplex.poll()) ++outputs;
    }
    duplex.end_input();
    while (duplex.next()) ++outputs;
    static_cast<void>(duplex.report());
    EXPECT_EQ(test::allocation_count() - before, 0) << name << (concurrent ? ", threads" : "");
    EXPECT_GT(outputs, 100) << name;
  }
}

TEST(DuplexAllocations, AreZeroAfterConstruction) {
  expect_no_allocation(WaitK(2, FixedUnits{2}), "wait-k");
  expect_no_allocation(LocalAgreement(4), "local agreement");
  expect_no_allocation(HoldN(1, 4), "hold-n");
  expect_no_allocation(AttentionGuided(0.2F, 2), "attention");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
