// SPDX-License-Identifier: MIT
// How what was heard is shown.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "options.hpp"

#include "sluice/model/listen_model.hpp"
#include "sluice/stream/listener_engine.hpp"
#include "sluice/stream/listener_metrics.hpp"

namespace listen {

/// Gets every event, in order, on one thread.
class View {
 public:
  View(const sluice::ListenModel& model, std::int64_t start_ns)
      : model_(model), start_ns_(start_ns) {}
  virtual ~View() = default;

  void show(const sluice::ListenEvent& event);
  /// After the last event, or an error: leaves the terminal as it was.
  virtual void close() {}

 protected:
  /// The word, partial text or whole utterance that an event stands for.
  struct Shown {
    const sluice::ListenEvent& event;
    std::string text;
    double audio_ms;   // when it was decided, on the audio's clock
    double spoken_ms;  // kWord: where the word ends; negative: not known
    double wall_ms;    // since the program began to listen
  };
  virtual void put(const Shown& shown) = 0;

  std::string text_of(std::span<const sluice::Token> pieces) const;

 private:
  double audio_ms(std::int64_t samples) const {
    return 1000 * static_cast<double>(samples) / model_.sample_rate();
  }

  const sluice::ListenModel& model_;
  std::int64_t start_ns_;
  std::string utterance_;
};

/// The view that the options ask for.
std::unique_ptr<View> make_view(const Options& options, const sluice::ListenModel& model,
                                std::int64_t start_ns);

/// --stats. late: packets that were handed over behind their time, of how many.
struct Outcome {
  sluice::ListenerReport report;
  std::int64_t cache_bytes = 0;
  std::int64_t packets = 0;
  std::int64_t late = 0;
  double max_late_ms = 0;
};
void print_stats(const Options& options, const sluice::ListenModel& model, const Outcome& outcome);
std::string stats_json(const Options& options, const sluice::ListenModel& model,
                       const Outcome& outcome);

}  // namespace listen
