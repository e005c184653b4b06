// SPDX-License-Identifier: MIT
// After construction a listener allocates nothing: not when samples are accepted, utterances end,
// words are written or events are taken, with threads or without.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "sluice/io/gguf.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/listener.hpp"
#include "support/count_allocations.hpp"
#include "support/listen_scene.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(ListenerAllocations, AreZeroAfterConstruction) {
  const test::TinyListen tiny(1);
  const std::vector<std::byte> bytes = tiny.file().bytes();
  const auto model =
      load_listen_model(std::make_shared<const GgufFile>(GgufFile::from_bytes(bytes, "tiny.gguf")));
  const std::vector<float> samples = tiny.sound(60000, 9);
  for (const bool concurrent : {false, true})
    for (const Activations activations : {Activations::kFloat32, Activations::kInt8}) {
      ListenerOptions options;
      options.concurrent = concurrent;
      options.activations = activations;
      options.source_threads = 2;
      options.endpoint_ms = 300;
      if (activations == Activations::kInt8) {
        options.deadline_ms = 1;
        options.shedding = Shedding::kShortenWrite;
      }
      Listener listener(model, options);
      const auto before = test::allocation_count();
      std::int64_t words = 0;
      std::int64_t endpoints = 0;
      const auto take = [&](const ListenEvent& event) {
        words += event.kind == ListenEvent::Kind::kWord ? 1 : 0;
        endpoints += event.kind == ListenEvent::Kind::kEndpoint ? 1 : 0;
      };
      for (std::size_t done = 0; done < samples.size(); done += 333) {
        listener.accept(
            std::span(samples).subspan(done, std::min<std::size_t>(333, samples.size() - done)));
        if (concurrent)
          while (const auto event = listener.poll()) take(*event);
        else
          listener.for_each(take);
      }
      listener.finish();
      listener.for_each(take);
      static_cast<void>(listener.report());
      EXPECT_EQ(test::allocation_count() - before, 0) << (concurrent ? "threads" : "in turns");
      EXPECT_GT(words, 20);
      EXPECT_GE(endpoints, 2);
    }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
