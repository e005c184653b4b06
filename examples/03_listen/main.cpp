// SPDX-License-Identifier: MIT
// listen: writes down what is said while it is said.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "options.hpp"
#include "view.hpp"

#include "sluice/core/error.hpp"
#include "sluice/io/audio_input.hpp"
#include "sluice/io/byte_source.hpp"
#ifdef SLUICE_LISTEN_SOUND_FILE
#include "sluice/io/sound_file.hpp"
#endif
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/listener.hpp"
#include "sluice/stream/paced_source.hpp"
#include "support/terminal.hpp"

namespace {

using namespace listen;

/// Also asked while nobody speaks.
bool stops() {
  return support::caught_signal() != 0;
}

sluice::AudioInput open_input(const Options& options, std::int64_t sample_rate) {
  const sluice::AudioInputConfig config{.sample_rate = sample_rate, .stop_when = stops};
  if (options.input == "-")
    return sluice::open_pcm(sluice::ByteSource::standard_input(), options.raw, options.encoding,
                            config);
#ifdef SLUICE_LISTEN_SOUND_FILE
  return sluice::open_audio(options.input, config);
#else
  return sluice::open_wav(options.input, config);
#endif
}

sluice::ListenerOptions listener_options(const Options& options, const sluice::ListenModel& model) {
  sluice::ListenerOptions result;
  if (options.latency.milliseconds)
    result = sluice::ListenerOptions::with_delay(model, *options.latency.milliseconds);
  result.wait_words = options.latency.words;
  result.endpoint_ms = options.endpoint_ms;
  result.max_utterance_ms = options.max_utterance_ms;
  result.source_threads = options.source_threads;
  result.target_threads = options.target_threads;
  result.activations = options.activations;
  result.concurrent = !options.sequential;
  result.deadline_ms = options.deadline_ms;
  result.late = options.late;
  result.shedding = options.shedding;
  return result;
}

/// Hands audio over until it, or somebody's patience, ends: at its own times, or as it comes.
template <class Taken>
sluice::PacedSourceCounts feed(const Options& options, sluice::AudioInput& input,
                               sluice::Listener& listener, Taken&& taken) {
  const auto packet = std::max<std::int64_t>(
      1, std::llround(options.packet_ms * static_cast<double>(input.sample_rate()) / 1000));
  const auto goes_on = [&] {
    return !listener.is_finished() && !stops();
  };
  const auto hand_over = [&](std::span<const float> samples) {
    for (std::size_t done = 0; done < samples.size() && !listener.is_finished();) {
      done += listener.accept(samples.subspan(done));
      taken();
    }
  };
  if (options.speed == 0) {
    std::vector<float> samples(static_cast<std::size_t>(packet));
    while (goes_on())
      if (const std::int64_t count = input.read(samples); count > 0)
        hand_over(std::span(samples).first(static_cast<std::size_t>(count)));
      else
        break;
    return {};
  }
  sluice::AudioPackets packets(input, packet, packet);
  sluice::MonotonicClock clock;
  // A scheduler may take so long, and no listener notices.
  constexpr std::int64_t kLateNs = 10'000'000;
  sluice::PacedSource paced(packets, clock,
                            {.speed = options.speed, .late_after_ns = kLateNs, .stop_when = stops});
  auto frame = paced.make_frame();
  while (goes_on() && paced.next(frame) == sluice::FrameStatus::kFrame) hand_over(frame.samples);
  return paced.counts();
}

int run(const Options& options) {
  const auto model = sluice::load_listen_model(options.model);
  sluice::AudioInput input =
      open_input(options, static_cast<std::int64_t>(std::llround(model->sample_rate())));
  sluice::Listener listener(model, listener_options(options, *model));
  const std::unique_ptr<View> view = make_view(options, *model, sluice::monotonic_ns());
  const auto show = [&](const sluice::ListenEvent& event) {
    view->show(event);
  };

  sluice::PacedSourceCounts counts;
  std::exception_ptr broken;  // the view's
  std::exception_ptr silent;  // the input's: what was heard before is shown
  {
    std::jthread shower;
    if (!options.sequential)
      shower = std::jthread([&] {
        try {
          listener.for_each(show);
        } catch (...) {
          broken = std::current_exception();
          listener.stop();
        }
      });
    try {
      counts = feed(options, input, listener, [&] {
        if (options.sequential) listener.for_each(show);
      });
    } catch (const sluice::Error&) {
      silent = std::current_exception();
    } catch (...) {
      listener.stop();
      throw;
    }
    listener.finish();
    if (options.sequential) listener.for_each(show);
  }
  if (broken) std::rethrow_exception(broken);
  view->close();
  if (silent && !stops()) std::rethrow_exception(silent);  // else it was cut short by the signal
  if (options.stats) {
    const Outcome outcome{.report = listener.report(),
                          .cache_bytes = listener.engine().cache_bytes(),
                          .packets = counts.taken,
                          .late = counts.late,
                          .max_late_ms = static_cast<double>(counts.max_late_ns) * 1e-6};
    if (options.json)
      support::write_stdout(stats_json(options, *model, outcome));
    else
      print_stats(options, *model, outcome);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::variant<Options, int> parsed = parse_options(argc, argv);
  if (const int* status = std::get_if<int>(&parsed)) return *status;
  return support::run_program("listen", [&] { return run(std::get<Options>(parsed)); });
}
