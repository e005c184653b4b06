// SPDX-License-Identifier: MIT
#include "feeder.hpp"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/stream/clock.hpp"

namespace duplex_text {

Feeder::Feeder(const Options& options, const Turns& turns, UnitReader reader, FeederTarget target,
               View& view, std::mutex& view_lock, Wakeup& wakeup)
    : options_(options),
      turns_(turns),
      reader_(std::move(reader)),
      target_(std::move(target)),
      view_(view),
      view_lock_(view_lock),
      wakeup_(wakeup),
      thread_([this] { run(); }) {}

Feeder::~Feeder() {
  wakeup_.raise();
  if (thread_.joinable()) thread_.join();
}

void Feeder::wait_for_feed() {
  std::unique_lock lock(lock_);
  fed_.wait_for(lock, std::chrono::milliseconds(50), [&] { return news_; });
  news_ = false;
}

void Feeder::join() {
  wakeup_.raise();
  if (thread_.joinable()) thread_.join();
  if (error_) std::rethrow_exception(error_);
}

void Feeder::run() {
  try {
    feed_all();
  } catch (...) {
    error_ = std::current_exception();
    target_.stop();
  }
  notify();
}

void Feeder::feed_all() {
  if (!turns_.prompt.empty() && !send(turns_.prompt, turns_.prompt_text, FedUnit::Kind::kPrompt))
    return;
  const std::int64_t start = sluice::monotonic_ns();
  double words = 0;
  for (SourceUnit unit; reader_.next(unit);) {
    if (options_.words_per_minute > 0) {
      words += static_cast<double>(unit.words);
      const double due = words * 60'000 / options_.words_per_minute;
      for (;;) {
        const double left = due - static_cast<double>(sluice::monotonic_ns() - start) * 1e-6;
        if (left <= 0) break;
        if (!wakeup_.wait(-1, static_cast<int>(std::min(left, 1e6)) + 1)) return;
      }
    }
    if (!send(unit.tokens, unit.text, FedUnit::Kind::kSource)) return;
  }
  // A wakeup means that nobody listens any more.
  if (!wakeup_.wait(-1, 0)) return;
  if (!turns_.closing.empty())
    send(turns_.closing, {}, FedUnit::Kind::kClosing);
  else
    target_.end_input();
}

bool Feeder::send(std::span<const sluice::Token> tokens, std::string_view text,
                  FedUnit::Kind kind) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  tokens_ += count;
  if (options_.layout == LayoutKind::kBatch && tokens_ > options_.source_tokens)
    throw sluice::Error(
        sluice::ErrorCode::kCapacity,
        {"the source is longer than the batch layout was told", "duplex_text", "--source-tokens",
         "at most " + std::to_string(options_.source_tokens), "more"});
  if (options_.source.policy == sluice::CachePolicy::kFull && tokens_ > options_.source.capacity)
    throw sluice::Error(
        sluice::ErrorCode::kCapacity,
        {"the source's full cache cannot hold the source", "duplex_text", "--groups",
         "at most " + std::to_string(options_.source.capacity) + " source tokens", "more"});
  for (;;) {
    {
      // Held over both, so that nothing that follows from the unit is shown before it.
      const std::lock_guard lock(view_lock_);
      const std::int64_t now = sluice::monotonic_ns();
      const sluice::FeedStatus status = target_.try_feed(tokens, kind == FedUnit::Kind::kClosing);
      if (status == sluice::FeedStatus::kStopped) return false;
      if (status == sluice::FeedStatus::kAccepted) {
        source_units_ += kind == FedUnit::Kind::kSource ? 1 : 0;
        view_.fed({kind, units_++, count, text, now});
        break;
      }
    }
    if (!wakeup_.wait(-1, 2)) return false;
  }
  notify();
  return true;
}

void Feeder::notify() {
  {
    const std::lock_guard lock(lock_);
    news_ = true;
  }
  fed_.notify_all();
}

}  // namespace duplex_text
