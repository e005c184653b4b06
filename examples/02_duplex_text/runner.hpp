// SPDX-License-Identifier: MIT
// One stream from its first unit to its report.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "feeder.hpp"
#include "options.hpp"
#include "report.hpp"
#include "steering.hpp"
#include "transcript.hpp"
#include "turns.hpp"
#include "units.hpp"
#include "view.hpp"

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/duplex.hpp"
#include "sluice/stream/lagging.hpp"
#include "support/report_text.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

/// A stream with its source and its view.
template <class Layout>
class Runner {
 public:
  using Stream = sluice::DuplexOn<Backend, Steering, sluice::f16, Layout>;

  /// Prints the setting and makes the stream.
  /// \throws sluice::Error(kConfig) for options that do not fit together or the model.
  Runner(const sluice::LoadedModel& model, const Options& options, const Turns& turns,
         Layout layout)
      : model_(model),
        options_(options),
        turns_(turns),
        steering_(make_steering(options, *model.tokenizer, turns.prompt.empty() ? 0 : 1)),
        transcript_(*model.tokenizer) {
    const sluice::DuplexOptions duplex = duplex_options();
    if constexpr (std::same_as<Backend, sluice::cpu>) {
      const std::int64_t bytes = support::cache_bytes(*model.decoder, duplex.source, 2) +
                                 support::cache_bytes(*model.decoder, duplex.target, 2);
      support::require_memory(bytes, "--groups " + groups_text(options));
    }
    stream_ = std::make_unique<Stream>(model.decoder, duplex, steering_, std::move(layout));
    print_setting(model, options, duplex, cache_bytes());
  }

  /// Runs to the end. The status to exit with, signals aside.
  int run() {
    const std::int64_t start = sluice::monotonic_ns();
    view_ = make_view(options_, start);
    Wakeup wakeup;
    UnitReader reader(*model_.tokenizer,
                      options_.file ? support::TextSource::from_file(*options_.file)
                                    : support::TextSource::from_stdin(),
                      options_.unit, options_.max_unit_tokens, wakeup);
    Feeder feeder(options_, turns_, std::move(reader),
                  {[this](auto unit, bool last) { return stream_->try_feed(unit, last); },
                   [this] { stream_->end_input(); },
                   [this] {
                     stream_->stop();
                   }},
                  *view_, view_lock_, wakeup);
    take_outputs(feeder);
    feeder.join();

    Outcome outcome;
    outcome.ending = ending();
    outcome.metrics = stream_->report();
    const std::string rest = transcript_.finish();
    outcome.source_units = feeder.source_units();
    outcome.tokens = transcript_.tokens();
    outcome.words = transcript_.words();
    outcome.lagging = lagging(outcome.source_units);
    outcome.cache_bytes = cache_bytes();
    const std::int64_t now = sluice::monotonic_ns();
    show_reads(outcome.metrics.units_read, outcome.metrics.source_tokens, now);
    view_->end(rest, outcome.ending, now);
    view_->report(report_json(model_, options_, outcome));
    view_.reset();
    print_report(options_, outcome, options_.report || support::caught_signal() != 0);
    if (stream_->end_reason() != sluice::DuplexEnd::kTargetFull) return 0;
    std::cerr << "duplex_text: the target's full cache holds " << options_.target.capacity
              << " tokens and no more; --groups target=... raises it or makes it endless\n";
    return 1;
  }

 private:
  sluice::DuplexOptions duplex_options() const {
    sluice::DuplexOptions duplex;
    duplex.source = options_.source;
    duplex.target = options_.target;
    duplex.max_unit_tokens =
        std::max(options_.max_unit_tokens,
                 static_cast<std::int64_t>(std::max(turns_.prompt.size(), turns_.closing.size())));
    duplex.queue_tokens = std::max<std::int64_t>(8192, 4 * duplex.max_unit_tokens);
    // What the stream would choose by itself, so that its memory is known before.
    duplex.source.lead = 4 * duplex.max_unit_tokens;
    duplex.source.chunk_size = std::min(duplex.source.chunk(), duplex.max_unit_tokens);
    duplex.target.chunk_size = static_cast<std::int64_t>(turns_.opening.size());
    duplex.target.lead = steering_.max_provisional() + 1;
    const std::int64_t holds = duplex.target.policy == sluice::CachePolicy::kFull
                                   ? duplex.target.capacity
                                   : duplex.target.window_size;
    if (holds < duplex.target.chunk_size)
      throw sluice::Error(sluice::ErrorCode::kConfig,
                          {"the target's opening does not fit", "duplex_text", "--groups target",
                           "at least " + std::to_string(duplex.target.chunk_size) + " tokens",
                           std::to_string(holds)});
    duplex.target_prefix = turns_.opening;
    duplex.sampler = options_.sampler;
    if (options_.max_tokens != kForEver) duplex.max_target_tokens = options_.max_tokens;
    duplex.source_threads = options_.source_threads;
    duplex.target_threads = options_.target_threads;
    if (options_.shared_threads > 0)
      duplex.team = std::make_shared<sluice::ThreadTeam>(options_.shared_threads);
    duplex.concurrent = !options_.sequential;
    return duplex;
  }

  void take_outputs(Feeder& feeder) {
    for (;;) {
      if (support::caught_signal() != 0) stream_->stop();
      const bool finished = stream_->is_finished();
      const std::optional<sluice::DuplexOutput> output =
          stream_->next_for(std::chrono::milliseconds(50));
      if (!output && finished) return;
      if (!output && options_.sequential && !stream_->is_finished()) feeder.wait_for_feed();
      const std::lock_guard lock(view_lock_);
      if (output)
        show(*output);
      else
        view_->tick();
    }
  }

  void show(const sluice::DuplexOutput& output) {
    show_reads(output.units_read, output.tokens_read, output.time_ns);
    view_->written(transcript_.add(output));
  }

  void show_reads(std::int64_t units, std::int64_t tokens, std::int64_t time_ns) {
    if (units <= units_shown_) return;
    units_shown_ = units;
    view_->read(units, tokens, time_ns);
  }

  std::string ending() const {
    if (support::caught_signal() != 0) return "signal";
    if (steering_.ended_by_token()->load())
      return std::string(to_string(sluice::DuplexEnd::kEndToken));
    return std::string(to_string(stream_->end_reason()));
  }

  /// Of words, in source units; prompt and closing are no source.
  sluice::Lagging lagging(std::int64_t source_units) const {
    const std::int64_t before = turns_.prompt.empty() ? 0 : 1;
    if (transcript_.words() != static_cast<std::int64_t>(transcript_.delays().size())) return {};
    std::vector<std::int64_t> delays = transcript_.delays();
    for (std::int64_t& delay : delays)
      delay = std::clamp<std::int64_t>(delay - before, 0, source_units);
    return sluice::lagging(
        delays, source_units,
        options_.reference_words != 0 ? options_.reference_words : transcript_.words());
  }

  std::int64_t cache_bytes() const {
    return static_cast<std::int64_t>(stream_->engine().cache_bytes());
  }

  const sluice::LoadedModel& model_;
  const Options& options_;
  const Turns& turns_;
  Steering steering_;
  Transcript transcript_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<View> view_;
  std::mutex view_lock_;
  std::int64_t units_shown_ = 0;
};

}  // namespace duplex_text
