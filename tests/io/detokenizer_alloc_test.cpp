// SPDX-License-Identifier: MIT
/// That a streaming step of text allocates nothing. An executable of its own: it replaces the
/// allocation functions.
#include <cstddef>
#include <cstdint>
#include <string>

#include <gtest/gtest.h>

#include "sluice/io/detokenizer.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(DetokenizerAllocation, PushIntoAStringWithRoomAllocatesNothing) {
  for (const char* name : {"llama2", "qwen2"}) {
    const Tokenizer tokenizer =
        load_tokenizer(std::string(SLUICE_TEST_DATA) + "/tokenizers/" + name + ".json");
    StreamingDetokenizer stream(tokenizer, {.skip_special = false});
    std::string out;
    out.reserve(3 * tokenizer.max_bytes() + 3);  // what push() says is always enough
    const std::int64_t before = test::allocation_count();
    for (int round = 0; round < 3; ++round) {
      for (Token token = 0; static_cast<std::size_t>(token) < tokenizer.vocab_size(); ++token) {
        out.clear();
        stream.push(token, out);
      }
    }
    out.clear();
    stream.finish(out);
    EXPECT_EQ(test::allocation_count(), before) << name;
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
