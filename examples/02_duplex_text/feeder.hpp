// SPDX-License-Identifier: MIT
// The thread that reads the source and feeds it, while others write.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <string_view>
#include <thread>
#include <vector>

#include "options.hpp"
#include "sluice/core/token.hpp"
#include "sluice/stream/duplex.hpp"
#include "turns.hpp"
#include "units.hpp"
#include "view.hpp"

namespace duplex_text {

/// What the feeder needs of a stream, whatever the stream's type is.
struct FeederTarget {
  std::function<sluice::FeedStatus(std::span<const sluice::Token> unit, bool last)> try_feed;
  std::function<void()> end_input;
  std::function<void()> stop;
};

/// Feeds prompt, source and closing, each unit whole and at its time, and shows what it fed. A full
/// stream makes it wait, and the source with it.
class Feeder {
 public:
  /// Starts the thread. All references must outlive it; view_lock serialises calls of `view`.
  Feeder(const Options& options, const Turns& turns, UnitReader reader, FeederTarget target,
         View& view, std::mutex& view_lock, Wakeup& wakeup);
  /// Ends the thread, also while it waits for input.
  ~Feeder();

  /// Waits until something was fed since the last call, or the source's end, or a moment is over.
  void wait_for_feed();
  /// Ends the thread and throws what ended it early, if anything did.
  void join();
  /// After join(): source units that were fed, without prompt and closing.
  std::int64_t source_units() const { return source_units_; }

 private:
  void run();
  void feed_all();
  /// False when the stream has ended.
  bool send(std::span<const sluice::Token> tokens, std::string_view text, FedUnit::Kind kind);
  void notify();

  const Options& options_;
  const Turns& turns_;
  UnitReader reader_;
  FeederTarget target_;
  View& view_;
  std::mutex& view_lock_;
  Wakeup& wakeup_;
  std::int64_t units_ = 0;
  std::int64_t tokens_ = 0;
  std::int64_t source_units_ = 0;
  std::exception_ptr error_;
  std::mutex lock_;
  std::condition_variable fed_;
  bool news_ = false;   // under lock_
  std::thread thread_;  // last: starts when all else is there
};

}  // namespace duplex_text
