// SPDX-License-Identifier: MIT
#include "sluice/stream/listener.hpp"
#include "support/listen_scene.hpp"
#include "support/sanitizers.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/lag_scores.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::Heard;
using test::HearingRule;
using test::load_tiny;
using test::NaiveListener;
using test::options_for;
using test::TinyListen;

/// Feeds samples in pieces of the lengths that `piece` gives, and collects what is final.
std::vector<Heard> listen(const std::shared_ptr<const ListenModel>& model,
                          const ListenerOptions& options, std::span<const float> samples,
                          const std::function<std::size_t()>& piece) {
  Listener listener(model, options);
  std::vector<Heard> heard;
  bool ended = false;
  const auto take = [&](const ListenEvent& event) {
    EXPECT_FALSE(ended);
    if (event.kind == ListenEvent::Kind::kEnd) ended = true;
    if (event.kind != ListenEvent::Kind::kWord && event.kind != ListenEvent::Kind::kEndpoint)
      return;
    const auto tokens = event.tokens();
    heard.push_back({event.kind == ListenEvent::Kind::kEndpoint,
                     event.utterance,
                     event.word,
                     {tokens.begin(), tokens.end()},
                     event.samples,
                     event.spoken_samples});
  };
  for (std::size_t done = 0; done < samples.size();) {
    const std::size_t count = std::min(piece(), samples.size() - done);
    done += listener.accept(samples.subspan(done, count));
    if (options.concurrent)
      while (const auto event = listener.poll()) take(*event);
    else
      listener.for_each(take);
  }
  listener.finish();
  listener.for_each(take);
  EXPECT_TRUE(ended);
  EXPECT_TRUE(listener.is_finished());
  return heard;
}

std::string text_of(const std::vector<Heard>& heard) {
  std::string text;
  for (const Heard& event : heard) {
    text += std::to_string(event.utterance) + (event.endpoint ? "|" : ":") +
            std::to_string(event.word) + " ";
    for (const Token piece : event.pieces) text += std::to_string(piece) + "_";
    text += "@" + std::to_string(event.samples) + "(" + std::to_string(event.spoken) + ") ";
  }
  return text;
}

TEST(Listener, WritesWhatTheDefinitionWritesForAnyPieces) {
  std::int64_t words = 0;
  std::int64_t endpoints = 0;
  std::int64_t early_ends = 0;
  std::int64_t uncounted = 0;
  for (const std::uint64_t seed : {1, 2, 3}) {
    const TinyListen tiny(seed);
    const auto model = load_tiny(tiny.file());
    const std::vector<float> samples = tiny.sound(24000, 100 + seed);
    Random random(seed);
    for (const HearingRule rule :
         {HearingRule{}, HearingRule{.wait_words = 3, .delay = 0},
          HearingRule{.wait_words = 2, .delay = 5, .endpoint_rows = 6, .max_rows = 50},
          HearingRule{.wait_words = ListenerOptions::kWholeUtterance, .endpoint_rows = 8},
          HearingRule{.max_rows = 15, .silence_rows = 40},
          HearingRule{.endpoint_rows = 0, .max_rows = 0, .silence_rows = 0}}) {
      NaiveListener naive(tiny);
      const std::vector<Heard> expected = naive.run(samples, rule);
      // Single precision in a few hundred sums of a few tens of terms.
      ASSERT_GT(naive.margin(), 1e-4) << "seed " << seed << ": a decision that rounding could turn";
      for (const Heard& event : expected) {
        words += event.endpoint ? 0 : 1;
        endpoints += event.endpoint ? 1 : 0;
        uncounted += !event.endpoint && event.spoken < 0 ? 1 : 0;
      }
      early_ends += naive.early_ends();
      ListenerOptions options = options_for(*model, rule);
      for (const bool concurrent : {false, true}) {
        options.concurrent = concurrent;
        options.lead_rows = concurrent ? 3 : 1;
        options.event_capacity = concurrent ? 4 : 256;
        for (const std::size_t longest :
             {std::size_t{1}, std::size_t{37}, std::size_t{1000}, samples.size()}) {
          if (longest == 1 && (rule.wait_words != 1 || concurrent)) continue;
          if (longest == 37 && concurrent) continue;  // threads meet often enough
          if (SLUICE_TEST_THREAD_SANITIZED && !concurrent) continue;
          const auto heard = listen(model, options, samples, [&] {
            return longest == samples.size() ? longest : 1 + random.below(longest);
          });
          const auto apart =
              std::mismatch(heard.begin(), heard.end(), expected.begin(), expected.end());
          ASSERT_TRUE(heard == expected)
              << "seed " << seed << (concurrent ? ", threads" : "") << ", pieces up to " << longest
              << ", event " << apart.first - heard.begin() << " of " << expected.size() << "\n"
              << text_of({apart.first, heard.end()}) << "\n"
              << text_of({apart.second, expected.end()});
        }
      }
    }
  }
  // The sounds are such that every branch was taken.
  EXPECT_GT(words, 150);
  EXPECT_GT(endpoints, 15);
  EXPECT_GT(early_ends, 15);
  EXPECT_GT(uncounted, 10);
}

TEST(Listener, IsTheSameForAnyNumberOfThreads) {
  const TinyListen tiny(7);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(30000, 8);
  const auto whole = [&] {
    return samples.size();
  };
  ListenerOptions options = options_for(*model, {});
  const auto one = listen(model, options, samples, whole);
  options.source_threads = 2;
  options.target_threads = 3;
  EXPECT_EQ(listen(model, options, samples, whole), one);
  options.concurrent = true;
  EXPECT_EQ(listen(model, options, samples, whole), one);
  EXPECT_GT(one.size(), 20U);
}

// Silence, sounds and silence, under limits that agree and limits that do not: each endpoint closes
// words, each word is closed by one, and nothing that was shown for the time being is left.
TEST(Listener, WhatHasNoWordIsNoUtterance) {
  std::int64_t silent_models = 0;
  std::int64_t endpoints = 0;
  std::int64_t taken_back = 0;
  for (const std::uint64_t seed : {1, 2, 3}) {
    const TinyListen tiny(seed);
    const auto model = load_tiny(tiny.file());
    const std::vector<float> silence(16000);
    std::vector<float> samples = silence;
    const std::vector<float> sound = tiny.sound(16000, 30 + seed);
    samples.insert(samples.end(), sound.begin(), sound.end());
    samples.insert(samples.end(), silence.begin(), silence.end());
    for (const HearingRule rule : {HearingRule{.max_rows = 7, .silence_rows = 40},
                                   HearingRule{.max_rows = 1, .silence_rows = 0},
                                   HearingRule{.wait_words = 3, .max_rows = 20, .silence_rows = 5},
                                   HearingRule{.max_rows = 0, .silence_rows = 1}}) {
      for (const std::vector<float>* audio :
           {&silence, static_cast<const std::vector<float>*>(&samples)}) {
        Listener listener(model, options_for(*model, rule));
        std::int64_t words = 0;
        std::int64_t utterances = 0;
        std::int64_t events = 0;
        bool shown = false;
        for (std::size_t done = 0; done < audio->size(); done += 400) {
          const auto take = [&](const ListenEvent& event) {
            ++events;
            EXPECT_EQ(event.utterance, utterances);
            switch (event.kind) {
              case ListenEvent::Kind::kPartial:
                taken_back += shown && event.num_pieces == 0 && words == 0 ? 1 : 0;
                shown = event.num_pieces > 0;
                break;
              case ListenEvent::Kind::kWord: ++words; break;
              case ListenEvent::Kind::kEndpoint:
                EXPECT_GT(event.word, 0);
                EXPECT_EQ(event.word, words);
                words = 0;
                shown = false;
                ++utterances;
                break;
              case ListenEvent::Kind::kEnd:
                EXPECT_EQ(words, 0);
                EXPECT_FALSE(shown);
                break;
            }
          };
          EXPECT_EQ(listener.accept(std::span(*audio).subspan(done, 400)), 400U);
          listener.for_each(take);
          if (done + 400 == audio->size()) {
            listener.finish();
            listener.for_each(take);
          }
        }
        EXPECT_EQ(listener.report().utterances, utterances);
        endpoints += utterances;
        if (audio == &silence && events == 1) ++silent_models;
      }
    }
  }
  // The models and sounds are such that all of it happened.
  EXPECT_GT(silent_models, 0);
  EXPECT_GT(endpoints, 20);
  EXPECT_GT(taken_back, 3);
}

TEST(Listener, PartialTextIsWhatCtcCountedBeyondTheWords) {
  const TinyListen tiny(3);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(40000, 5);
  ListenerOptions options = options_for(*model, {.wait_words = 3});
  Listener listener(model, options);
  listener.accept(samples);
  listener.finish();
  std::int64_t written = 0;
  std::int64_t partials = 0;
  bool has_text = false;
  listener.for_each([&](const ListenEvent& event) {
    switch (event.kind) {
      case ListenEvent::Kind::kPartial:
        ++partials;
        EXPECT_EQ(event.word, written);
        EXPECT_LE(event.num_pieces, static_cast<int>(ListenEvent::kMostPieces));
        has_text = has_text || event.num_pieces > 2;
        break;
      case ListenEvent::Kind::kWord: EXPECT_EQ(event.word, written++); break;
      case ListenEvent::Kind::kEndpoint:
        EXPECT_EQ(event.word, written);
        written = 0;
        break;
      case ListenEvent::Kind::kEnd: break;
    }
  });
  EXPECT_GT(partials, 20);
  EXPECT_TRUE(has_text);

  options.partial_text = false;
  Listener silent(model, options);
  silent.accept(samples);
  silent.finish();
  silent.for_each(
      [&](const ListenEvent& event) { EXPECT_NE(event.kind, ListenEvent::Kind::kPartial); });
}

TEST(Listener, CountsItsWorkAndItsLatencies) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(40000, 101);
  for (const bool concurrent : {false, true}) {
    ListenerOptions options = options_for(*model, {});
    options.silence_ms = 0;  // so that each utterance begins where one ended
    options.concurrent = concurrent;
    Listener listener(model, options);
    EXPECT_TRUE(std::isnan(listener.report().real_time_factor));
    listener.accept(samples);
    std::int64_t words = 0;
    std::int64_t first_words = 0;
    std::int64_t endpoints = 0;
    std::int64_t began = 0;  // the utterance, in samples
    std::vector<double> delays;
    double laal = 0;
    double start_offset = 0;
    std::int64_t with_words = 0;
    listener.finish();
    listener.for_each([&](const ListenEvent& event) {
      if (event.kind == ListenEvent::Kind::kWord)
        delays.push_back(static_cast<double>(event.samples - began) / 4);
      if (event.kind == ListenEvent::Kind::kEndpoint) {
        const double source = static_cast<double>(event.samples - began) / 4;
        if (!delays.empty()) {
          laal += lag_scores(delays, {}, source, 0, LagSource::kMilliseconds).length_adaptive;
          start_offset += delays.front();
          ++with_words;
        }
        began = event.samples;
        delays.clear();
      }
      words += event.kind == ListenEvent::Kind::kWord ? 1 : 0;
      first_words +=
          event.kind == ListenEvent::Kind::kWord && event.word == 0 && event.spoken_samples >= 0
              ? 1
              : 0;
      endpoints += event.kind == ListenEvent::Kind::kEndpoint ? 1 : 0;
      if (event.kind == ListenEvent::Kind::kWord && event.spoken_samples >= 0) {
        EXPECT_LE(event.spoken_samples, event.samples);
        EXPECT_LE(event.spoken_ns, event.time_ns);
      }
    });
    const ListenerReport report = listener.report();
    EXPECT_EQ(report.samples, 40000);
    EXPECT_EQ(report.samples_waiting, 0);
    EXPECT_DOUBLE_EQ(report.audio_ms, 10000);
    EXPECT_EQ(report.words, words);
    EXPECT_EQ(report.utterances, endpoints);
    EXPECT_EQ(report.first_word.count, first_words);
    EXPECT_GT(report.source_rows, 200);
    EXPECT_EQ(report.row.count, report.source_rows);
    EXPECT_LE(report.late_rows, report.source_rows);
    EXPECT_GE(report.target_forwards, words);
    ASSERT_GT(with_words, 1);
    EXPECT_NEAR(report.laal_ms, laal / static_cast<double>(with_words), 1e-9 * laal);
    EXPECT_NEAR(report.start_offset_ms, start_offset / static_cast<double>(with_words), 1e-6);
    EXPECT_GT(report.source_busy_ms, 0);
    EXPECT_NEAR(report.real_time_factor,
                (report.source_busy_ms + report.target_busy_ms) / report.audio_ms, 1e-12);
    EXPECT_GE(report.work_before_end, 0);
    EXPECT_LE(report.work_before_end, 1);
    EXPECT_GE(report.end_to_last_word_ms, 0);
  }
}

TEST(Listener, HasDefinedAnswersToEmptyAndShortAudio) {
  const TinyListen tiny(2);
  const auto model = load_tiny(tiny.file());
  for (const bool concurrent : {false, true})
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{99}}) {
      ListenerOptions options;
      options.concurrent = concurrent;
      Listener listener(model, options);
      EXPECT_EQ(listener.accept(std::vector<float>(count)), count);
      listener.finish();
      listener.finish();
      const auto event = listener.next();
      ASSERT_TRUE(event.has_value());
      EXPECT_EQ(event->kind, ListenEvent::Kind::kEnd);
      EXPECT_FALSE(listener.next().has_value());
    }
}

template <class Call>
ErrorCode code_of(Call&& call, const std::string& field) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(field), std::string::npos) << error.what();
    return error.code();
  }
  ADD_FAILURE() << "no error about " << field;
  return ErrorCode::kIo;
}

TEST(Listener, RefusesWhatIsNoAudio) {
  const TinyListen tiny(2);
  const auto model = load_tiny(tiny.file());
  Listener listener(model);
  std::vector<float> samples(500);
  EXPECT_EQ(listener.accept(samples), 500U);
  samples[17] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(code_of([&] { listener.accept(samples); }, "sample 517"), ErrorCode::kFormat);
  samples[17] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(code_of([&] { listener.accept(samples); }, "sample 517"), ErrorCode::kFormat);
  EXPECT_EQ(listener.report().samples, 500);
  listener.finish();
  EXPECT_EQ(code_of([&] { listener.accept({}); }, "ended"), ErrorCode::kOrder);
}

TEST(Listener, RefusesOptionsThatMakeNoSense) {
  const TinyListen tiny(2);
  const auto model = load_tiny(tiny.file());
  const auto refused = [&](const char* field, auto change) {
    ListenerOptions options;
    change(options);
    EXPECT_EQ(code_of([&] { Listener(model, options); }, field), ErrorCode::kConfig);
  };
  refused("wait_words", [](ListenerOptions& o) { o.wait_words = 0; });
  refused("delay_rows", [](ListenerOptions& o) { o.delay_rows = -2; });
  refused("max_tokens", [](ListenerOptions& o) { o.max_tokens = 0; });
  refused("lead_rows", [](ListenerOptions& o) { o.lead_rows = 0; });
  refused("event_capacity", [](ListenerOptions& o) { o.event_capacity = 3; });
  refused("endpoint_ms", [](ListenerOptions& o) { o.endpoint_ms = -1; });
  refused("max_utterance_ms", [](ListenerOptions& o) { o.max_utterance_ms = std::nan(""); });
  refused("capacity", [](ListenerOptions& o) { o.queue_samples = 0; });
  refused("num_threads", [](ListenerOptions& o) { o.source_threads = 0; });
}

// Text that does not fit is cut short; the stream goes on with the next utterance.
TEST(Listener, CutsTextThatOutgrowsItsRoom) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(40000, 101);
  for (const bool concurrent : {false, true}) {
    ListenerOptions options = options_for(*model, {});
    options.max_tokens = 5;
    options.concurrent = concurrent;
    std::int64_t pieces = 0;
    std::int64_t endpoints = 0;
    for (const Heard& event : listen(model, options, samples, [] { return 4000; })) {
      pieces = event.endpoint ? 0 : pieces + static_cast<std::int64_t>(event.pieces.size());
      endpoints += event.endpoint ? 1 : 0;
      EXPECT_LE(pieces, 5);
    }
    EXPECT_GT(endpoints, 2);
  }
}

TEST(Listener, CanBeStoppedAnyTime) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(200000, 101);
  ListenerOptions options = options_for(*model, {});
  options.concurrent = true;
  options.queue_samples = 500;
  options.event_capacity = 4;
  Listener listener(model, options);
  std::jthread feeder([&] { EXPECT_LT(listener.accept(samples), samples.size()); });
  EXPECT_TRUE(listener.next().has_value());
  listener.stop();
  while (listener.next()) {
  }
  EXPECT_TRUE(listener.is_finished());
}

TEST(LoadListenModel, ReadsEveryKey) {
  const TinyListen tiny(4);
  const auto model = load_tiny(tiny.file());
  EXPECT_EQ(model->sample_rate(), 4000);
  EXPECT_EQ(model->config().front_end.window_length, 100);
  EXPECT_EQ(model->config().front_end.hop_length, 40);
  EXPECT_EQ(model->config().front_end.fft_size, 128);
  EXPECT_EQ(model->config().front_end.num_mels, 20);
  EXPECT_EQ(model->config().frame_window, 12);
  EXPECT_EQ(model->config().trained_delay, 2);
  EXPECT_EQ(model->config().begin_token, 1);
  EXPECT_EQ(model->config().end_token, 2);
  EXPECT_EQ(model->blank(), 60);
  EXPECT_EQ(model->samples_per_row(), 160);
  EXPECT_EQ(model->milliseconds_per_row(), 40);
  EXPECT_TRUE(model->ends_word(4));
  EXPECT_FALSE(model->ends_word(6));
  EXPECT_FALSE(model->ends_word(60));
  std::string text;
  model->append_text(4, text);
  model->append_text(6, text);
  EXPECT_EQ(text, "p4p6");
  std::int64_t parameters = 0;
  for (const auto& [name, tensor] : tiny.tensors)
    if (!name.starts_with("listen.mel"))
      parameters += static_cast<std::int64_t>(tensor.second.size());
  EXPECT_EQ(model->parameters(), parameters);
}

TEST(LoadListenModel, NamesWhatIsMissingOrWrong) {
  const TinyListen tiny(4);
  for (const char* key :
       {"listen.version", "listen.sample_rate", "listen.frame_length", "listen.hop",
        "listen.fft_size", "listen.mel_low_hz", "listen.mel_high_hz", "listen.log_floor",
        "listen.frame_window", "listen.trained_delay", "tokenizer.ggml.tokens",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"})
    EXPECT_EQ(code_of([&] { load_tiny(tiny.file({key})); }, key), ErrorCode::kFormat) << key;
  for (const auto& [name, tensor] : tiny.tensors)
    EXPECT_EQ(code_of([&] { load_tiny(tiny.file({name})); }, name), ErrorCode::kFormat) << name;

  const auto wrong = [&](const std::string& key, double value, const char* field, ErrorCode code) {
    EXPECT_EQ(code_of(
                  [&] {
                    load_tiny(tiny.file({}, {{key, value}}));
                  },
                  field),
              code)
        << key << " " << value;
  };
  wrong("listen.version", 2, "listen.version", ErrorCode::kUnsupported);
  wrong("listen.sample_rate", 0, "sample_rate", ErrorCode::kConfig);
  wrong("listen.hop", 0, "hop_length", ErrorCode::kConfig);
  wrong("listen.hop", 101, "hop_length", ErrorCode::kConfig);
  wrong("listen.fft_size", 99, "fft_size", ErrorCode::kConfig);
  wrong("listen.mel_high_hz", 2001, "mel_high_hz", ErrorCode::kConfig);
  wrong("listen.log_floor", 0, "log_floor", ErrorCode::kConfig);
  wrong("listen.frame_window", 0, "frame_window", ErrorCode::kConfig);
  wrong("listen.frame_window", 1e6, "frame_window", ErrorCode::kConfig);
  wrong("listen.trained_delay", 1001, "trained_delay", ErrorCode::kConfig);
  wrong("tokenizer.ggml.bos_token_id", 60, "begin_token", ErrorCode::kConfig);
  wrong("tokenizer.ggml.eos_token_id", 1, "end_token", ErrorCode::kConfig);

  for (const auto& [name, tensor] : tiny.tensors) {
    if (name == "token_embd.weight" || name == "listen.mel_mean") continue;  // these set extents
    TinyListen other = tiny;
    auto& [shape, values] = other.tensors[name];
    shape.front() += 1;
    values.resize(values.size() / static_cast<std::size_t>(shape.front() - 1) *
                  static_cast<std::size_t>(shape.front()));
    EXPECT_EQ(code_of([&] { load_tiny(other.file()); }, name), ErrorCode::kShape) << name;
  }
  TinyListen other = tiny;
  other.pieces.pop_back();
  EXPECT_EQ(code_of([&] { load_tiny(other.file()); }, "pieces"), ErrorCode::kShape);
  other = tiny;
  other.pieces[9].clear();
  EXPECT_EQ(code_of([&] { load_tiny(other.file()); }, "pieces[9]"), ErrorCode::kFormat);
  other = tiny;
  other.tensors["listen.mel_std"].second[3] = 0;
  EXPECT_EQ(code_of([&] { load_tiny(other.file()); }, "deviation"), ErrorCode::kConfig);
}

// A damaged file gives a typed error, or a model that can be listened with.
TEST(LoadListenModel, SurvivesDamage) {
  const TinyListen tiny(4);
  const std::vector<std::byte> whole = tiny.file().bytes();
  const std::vector<float> samples = tiny.sound(1000, 3);
  Random random(11);
  int errors = 0;
  int models = 0;
  for (int round = 0; round < 400; ++round) {
    std::vector<std::byte> bytes = whole;
    // Most of the file is weights: the keys and the list of tensors are in front.
    for (std::uint64_t i = 1 + random.below(2); i > 0; --i)
      bytes[random.below(5000)] = static_cast<std::byte>(random.below(256));
    if (random.below(10) == 0) bytes.resize(random.below(bytes.size()));
    try {
      const auto model = load_listen_model(
          std::make_shared<const GgufFile>(GgufFile::from_bytes(bytes, "damaged.gguf")));
      ++models;
      if (model->sample_rate() < 1e5 && model->config().frame_window < 1000) {
        Listener listener(model);
        listener.accept(samples);
        listener.finish();
        listener.for_each([](const ListenEvent&) {});
      }
    } catch (const Error& error) {
      EXPECT_FALSE(error.detail().where.empty());
      ++errors;
    }
  }
  EXPECT_GT(errors, 50);
  EXPECT_GT(models, 50);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
