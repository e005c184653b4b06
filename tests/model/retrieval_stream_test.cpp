// SPDX-License-Identifier: MIT
// A stream with questions through RetrievalKvCache: every row's logits are those of a plain decoder
// in double, one dense softmax over what ReKV's definition lets the row see, at its distances, with
// frames picked in double from the decoder's own queries and keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/attention/retrieval_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/decoder.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::kHeadDim;
using test::kVocab;
using test::NaiveDecoder;
using test::random_tokens;
using test::small_decoder;

// As in scored_stream_test.cpp.
constexpr double kTolerance = 1.5e-4;
constexpr std::size_t kKvHeads = 2;
constexpr std::size_t kGroup = 2;

/// One row of everything that was fed: of the stream, or of a question.
struct Row {
  std::int64_t question = -1;     // which one; -1: the stream
  std::int64_t index = 0;         // in the stream or the question
  std::int64_t stream_total = 0;  // tokens of the stream when the question was asked
  std::int64_t first_chunk = 0;   // tokens of the question that picked
};

std::vector<std::int64_t> plain_frames(const RetrievalConfig& c, const NaiveDecoder::Pass& pass,
                                       const std::vector<Row>& rows, std::size_t layer,
                                       std::int64_t question) {
  std::vector<std::size_t> asking;
  std::vector<std::size_t> stream;
  std::int64_t total = 0;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (rows[r].question == question) {
      total = rows[r].stream_total;
      if (rows[r].index < rows[r].first_chunk) asking.push_back(r);
    }
    if (rows[r].question < 0) stream.push_back(r);
  }
  const std::int64_t frames = std::max<std::int64_t>(0, total - c.num_init_tokens) / c.frame_size;
  std::vector<double> scores;
  for (std::int64_t f = 0; f < frames; ++f) {
    double score = 0;
    for (std::int64_t j = 0; j < c.frame_size; ++j) {
      const std::size_t row =
          stream[static_cast<std::size_t>(c.num_init_tokens + f * c.frame_size + j)];
      for (const std::size_t q : asking)
        for (std::size_t h = 0; h < kKvHeads * kGroup; ++h)
          for (std::size_t d = 0; d < kHeadDim; ++d)
            score += pass.queries[layer][q][h * kHeadDim + d] *
                     pass.keys[layer][row][h / kGroup * kHeadDim + d];
    }
    scores.push_back(score);  // the means' common factor changes no order
  }
  std::vector<std::int64_t> picked;
  if (frames <= c.top_frames) {
    for (std::int64_t f = 0; f < frames; ++f) picked.push_back(f);
    return picked;
  }
  std::vector<std::pair<double, std::int64_t>> groups;
  for (std::int64_t g = 0; g * c.chunk_frames < frames; ++g) {
    double sum = 0;
    std::int64_t members = 0;
    for (std::int64_t f = g * c.chunk_frames; f < std::min(frames, (g + 1) * c.chunk_frames); ++f) {
      sum += scores[static_cast<std::size_t>(f)];
      ++members;
    }
    groups.emplace_back(sum / static_cast<double>(members), g);
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  for (std::int64_t i = 0; i < c.top_frames / c.chunk_frames; ++i)
    for (std::int64_t f = groups[static_cast<std::size_t>(i)].second * c.chunk_frames;
         f < std::min(frames, (groups[static_cast<std::size_t>(i)].second + 1) * c.chunk_frames);
         ++f)
      picked.push_back(f);
  std::sort(picked.begin(), picked.end());
  return picked;
}

/// Who loads the frames of a question.
enum class Loads { kBeforeAttention, kByTheStep, kByAnotherThread };

void expect_definition(const RetrievalConfig& config, std::uint64_t seed,
                       Loads loads = Loads::kBeforeAttention) {
  Random random(seed);
  const auto model = small_decoder({.num_layers = 3, .num_qo_heads = 4, .num_kv_heads = 2}, seed);
  auto cache = model->make_retrieval_cache<float>(config);
  ThreadTeam team(1);
  DecoderWorkspace workspace(*model, cache.max_chunk(), cache.max_entries(), 1,
                             static_cast<int>(config.top_frames) + 2);
  cache.overlap_loads(loads != Loads::kBeforeAttention);
  std::jthread loader;
  if (loads == Loads::kByAnotherThread)
    loader = std::jthread([&](const std::stop_token& stop) {
      std::vector<std::byte> record(static_cast<std::size_t>(cache.store().record_bytes()));
      while (!stop.stop_requested())
        if (!cache.load_one(record)) std::this_thread::yield();
    });
  std::vector<Token> tokens;
  std::vector<Row> rows;
  std::vector<std::vector<float>> logits;
  std::map<std::pair<std::int64_t, std::size_t>, std::vector<std::int64_t>> picked;

  std::int64_t question = -1;
  std::int64_t asked = 0;
  std::int64_t first_chunk = 0;
  const auto feed = [&](std::int64_t count) {
    if (random.below(4) == 0) {  // something else is read, and taken back
      model->forward(random_tokens(random, config.max_chunk), cache, workspace, team);
      cache.rollback();
    }
    const std::vector<Token> chunk = random_tokens(random, count);
    const std::int64_t stream_total = cache.total() - asked;
    model->forward(chunk, cache, workspace, team);
    std::vector<float> out(static_cast<std::size_t>(count * kVocab));
    model->logits(0, {out.data(), count, kVocab}, workspace, team);
    if (cache.asking() && asked == 0) first_chunk = count;
    for (std::int64_t i = 0; i < count; ++i) {
      tokens.push_back(chunk[static_cast<std::size_t>(i)]);
      logits.emplace_back(out.begin() + i * kVocab, out.begin() + (i + 1) * kVocab);
      if (cache.asking())
        rows.push_back({question, asked++, stream_total, first_chunk});
      else
        rows.push_back({-1, stream_total + i, 0, 0});
    }
    cache.commit();
    if (cache.asking())
      for (std::size_t layer = 0; layer < 3; ++layer) {
        const auto frames = cache.picked(static_cast<std::int64_t>(layer));
        picked[{question, layer}] = {frames.begin(), frames.end()};
      }
  };
  for (const std::int64_t until : {11, 34, 58}) {
    while (cache.total() < until)
      feed(std::min(until - cache.total(), between(random, 1, config.max_chunk)));
    cache.begin_question();
    ++question;
    asked = 0;
    feed(between(random, 1, config.max_chunk));
    feed(2);
    feed(1);
    cache.end_question();
    asked = 0;
  }
  feed(3);

  NaiveDecoder::Pass pass;
  std::map<std::pair<std::int64_t, std::size_t>, std::vector<std::int64_t>> expected;
  NaiveDecoder(*model).run_heads(
      tokens,
      [&](std::size_t layer, std::size_t, std::size_t query,
          std::size_t key) -> std::optional<double> {
        const Row& reader = rows[query];
        const Row& seen = rows[key];
        if (key > query) return std::nullopt;
        if (reader.question < 0) {
          if (seen.question >= 0) return std::nullopt;
          const std::int64_t distance = reader.index - seen.index;
          if (distance < config.window_size) return static_cast<double>(distance);
          if (seen.index < config.num_init_tokens)
            return static_cast<double>(config.window_size - 1);
          return std::nullopt;
        }
        if (seen.question >= 0 && seen.question != reader.question) return std::nullopt;
        const std::pair<std::int64_t, std::size_t> which{reader.question, layer};
        if (!expected.contains(which))
          expected[which] = plain_frames(config, pass, rows, layer, reader.question);
        const std::vector<std::int64_t>& frames = expected[which];
        const std::int64_t init = std::min(config.num_init_tokens, reader.stream_total);
        const std::int64_t before =
            init + static_cast<std::int64_t>(frames.size()) * config.frame_size;
        std::int64_t rank = seen.index;
        if (seen.question >= 0) {
          rank = before + seen.index;
        } else if (seen.index >= init) {
          const std::int64_t frame = (seen.index - init) / config.frame_size;
          const auto place = std::find(frames.begin(), frames.end(), frame);
          if (place == frames.end()) return std::nullopt;
          rank = init + (place - frames.begin()) * config.frame_size +
                 (seen.index - init) % config.frame_size;
        }
        const std::int64_t distance = before + reader.index - rank;
        if (distance >= config.window_size) return std::nullopt;
        return static_cast<double>(distance);
      },
      pass);
  EXPECT_EQ(picked, expected) << "seed " << seed;
  double largest = 0;
  for (std::size_t t = 0; t < logits.size(); ++t)
    for (std::size_t i = 0; i < logits[t].size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(logits[t][i]) - pass.logits[t][i]));
  EXPECT_LT(largest, kTolerance) << "seed " << seed;
}

TEST(RetrievalStream, IsItsDefinition) {
  RetrievalConfig config{.num_init_tokens = 3,
                         .window_size = 16,
                         .frame_size = 4,
                         .max_frames = 20,
                         .top_frames = 2,
                         .chunk_frames = 1,
                         .num_slots = 3,
                         .max_question = 12,
                         .max_chunk = 5};
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    expect_definition(config, seed);
    RetrievalConfig grouped = config;
    grouped.top_frames = 5;
    grouped.chunk_frames = 2;
    grouped.num_slots = 5;
    grouped.window_size = 40;  // all that is retrieved is seen
    expect_definition(grouped, seed);
    grouped.num_init_tokens = 0;
    grouped.window_size = 7;
    grouped.folder = ::testing::TempDir();
    expect_definition(grouped, seed);
  }
}

/// Frames that come while attention goes on change nothing: what was at hand and what came late are
/// merged.
TEST(RetrievalStream, OverlappedLoadsAreItsDefinitionToo) {
  RetrievalConfig config{.num_init_tokens = 3,
                         .window_size = 40,
                         .frame_size = 4,
                         .max_frames = 20,
                         .top_frames = 5,
                         .chunk_frames = 2,
                         .num_slots = 6,
                         .max_question = 12,
                         .max_chunk = 5};
  for (std::uint64_t seed = 1; seed <= 3; ++seed)
    for (const Loads loads : {Loads::kByTheStep, Loads::kByAnotherThread}) {
      expect_definition(config, seed, loads);
      RetrievalConfig on_disk = config;
      on_disk.folder = ::testing::TempDir();
      on_disk.window_size = 9;
      expect_definition(on_disk, seed, loads);
    }
}

}  // namespace SLUICE_TEST_UNIT
