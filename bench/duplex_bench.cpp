// SPDX-License-Identifier: MIT
/// Reading while writing, measured. JSON lines on stdout, progress on stderr:
///
///   overlap  the same source of N units (m tokens each; the target writes k tokens for each) by
///            sequential       the published loop: one forward at a time, group positions
///            duplex           source and target on a thread each
///            interleaved      one cache, positions in order of arrival, the source sees the target
///            re-encoding      "batch-streaming": everything so far is encoded anew at every READ
///            in turns within one run, at several m : k, hence several r = source work / target
///            work. sequential and duplex are given one thread a side; sequential, interleaved and
///            re-encoding also run with both threads in every forward (named with their threads).
///   switch   what a switch from reading to writing costs as the source grows: taking the snapshot
///            and listing all layers' segments; beside it, copying both caches together, as the
///            released code of group position encoding does, and the forward that follows.
///   endless  N source and N target tokens through bounded groups: latency and resident memory by
///            tenths.
///
/// The model is the GGUF file that SLUICE_MODEL names, else random weights of a geometry. The
/// backend is the tag that the program is compiled for; threads and the switch experiment are the
/// CPU's.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/stream/backend_traits.hpp"
#include "sluice/stream/duplex_backend.hpp"
#include "sluice/stream/lagging.hpp"
#include "sluice/stream/session.hpp"
#include "support/arguments.hpp"
#include "support/backend.hpp"
#include "support/json_record.hpp"
#include "support/random_decoder.hpp"

namespace {

using namespace sluice;
using bench::number;
using bench::numbers;
using bench::Record;
using bench::split;
using bench::Tag;

constexpr bool kOnCpu = std::same_as<Tag, cpu>;

constexpr const char* kHelp = R"(usage: duplex_bench [EXPERIMENT...] [option=value...]

experiments (all if none is named): overlap switch endless; on a GPU: overlap endless

  pairs=M:K,...     source tokens a unit : target tokens a unit   (default 2:4,4:4,8:4,16:4,32:4)
  units=N           units of a stream                              (default 32)
  rounds=N          runs of each way, in turns; medians are given  (default 5)
  geometry=NAME     smollm2-135m or llama-1b, random Q8_0 weights, where SLUICE_MODEL is not set
  sources=N,...     source lengths of the switch experiment        (default 1024,8192,65536)
  tokens=N          source and target tokens of the endless run    (default 100000)
  --help            this text

Prints one JSON object a line on stdout.
)";

struct Options {
  std::vector<std::string> experiments;
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs{
      {2, 4}, {4, 4}, {8, 4}, {16, 4}, {32, 4}};
  std::int64_t units = 32;
  std::int64_t rounds = 5;
  std::string geometry = "smollm2-135m";
  std::vector<std::int64_t> sources{1024, 8192, 65536};
  std::int64_t tokens = 100000;
};

Options parse(std::span<char*> arguments) {
  Options options;
  for (const std::string argument : arguments) {
    const std::size_t equal = argument.find('=');
    const std::string name = argument.substr(0, equal);
    const std::string value = equal == std::string::npos ? "" : argument.substr(equal + 1);
    if (name == "overlap" || (name == "switch" && kOnCpu) || name == "endless") {
      options.experiments.push_back(name);
    } else if (name == "pairs") {
      options.pairs.clear();
      for (const std::string_view pair : split(value, ',')) {
        const auto parts = split(pair, ':');
        if (parts.size() != 2) throw std::invalid_argument(argument + ": expected M:K,...");
        options.pairs.emplace_back(number(parts[0], argument), number(parts[1], argument));
      }
    } else if (name == "sources") {
      options.sources = numbers(value, argument);
    } else if (name == "geometry" && (value == "smollm2-135m" || value == "llama-1b")) {
      options.geometry = value;
    } else if (name == "units") {
      options.units = number(value, argument);
    } else if (name == "rounds") {
      options.rounds = number(value, argument);
    } else if (name == "tokens") {
      options.tokens = number(value, argument);
    } else {
      throw std::invalid_argument("unknown argument '" + argument + "'");
    }
  }
  if (options.experiments.empty()) {
    options.experiments = {"overlap", "endless"};
    if (kOnCpu) options.experiments.insert(options.experiments.begin() + 1, "switch");
  }
  return options;
}

struct Model {
  std::string name;
  std::shared_ptr<const Decoder> decoder;
  std::shared_ptr<const ModelOn<Tag>> placed =
      place_model<Tag>(decoder);  ///< where streams read it
};

Model load(const Options& options) {
  if (const char* path = std::getenv("SLUICE_MODEL")) {
    const std::string file = path;
    return {file.substr(file.find_last_of('/') + 1),
            load_decoder(std::make_shared<const GgufFile>(file))};
  }
  std::cerr << "making random weights, " << options.geometry << "\n";
  return {"random Q8_0, " + options.geometry,
          bench::random_decoder(
              options.geometry == "llama-1b" ? bench::llama_1b() : bench::smollm2_135m(),
              ElementType::kQ8_0)};
}

std::vector<Token> random_tokens(const Decoder& model, std::int64_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Token& token : tokens)
    token = static_cast<Token>(random.below(static_cast<std::uint64_t>(model.config().vocab_size)));
  return tokens;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// ---- overlap -----------------------------------------------------------------------------------

struct Timing {
  double wall_ms = 0;
  double source_ms = 0;
  double target_ms = 0;
  double ttft_ms = 0;  // from the first unit fed
};

constexpr Token kPrefix = 1;

Timing group_stream(const Model& model, std::int64_t m, std::int64_t k, std::int64_t units,
                    bool concurrent, int threads) {
  DuplexOptions options;
  options.target_prefix = {kPrefix};
  options.source.policy = options.target.policy = CachePolicy::kFull;
  options.source.capacity = m * units;
  options.target.capacity = k * units + 8;
  options.max_target_tokens = k * units;
  options.max_unit_tokens = m;
  options.queue_units = units;
  options.queue_tokens = m * units;
  options.output_capacity = k * units + 8;
  options.source_threads = options.target_threads = threads;
  options.concurrent = concurrent;
  DuplexOn<Tag, WaitK<FixedUnits>> duplex(model.placed, options, WaitK(1, FixedUnits{k}, 0));
  const std::vector<Token> source = random_tokens(*model.decoder, m * units, 7);
  const std::int64_t begin = monotonic_ns();
  for (std::int64_t u = 0; u < units; ++u)
    duplex.feed(
        std::span(source).subspan(static_cast<std::size_t>(u * m), static_cast<std::size_t>(m)),
        u + 1 == units);
  duplex.for_each([](const DuplexOutput&) {});
  const DuplexReport report = duplex.report();
  return {static_cast<double>(monotonic_ns() - begin) * 1e-6, report.source_busy_ms,
          report.target_busy_ms, report.ttft_from_first_unit_ms};
}

/// One cache; a READ appends the unit (interleaved) or encodes everything anew (re-encoding).
Timing one_cache_stream(const Model& model, std::int64_t m, std::int64_t k, std::int64_t units,
                        bool encodes_anew, int threads) {
  SessionOptions options;
  options.cache.policy = CachePolicy::kFull;
  options.cache.capacity = (m + k) * units + 8;
  options.num_threads = threads;
  SessionOn<Tag> session(model.placed, options);
  const std::vector<Token> source = random_tokens(*model.decoder, m * units, 7);
  std::vector<Token> target{kPrefix};
  std::vector<Token> all;
  Timing timing;
  const std::int64_t begin = monotonic_ns();
  for (std::int64_t u = 0; u < units; ++u) {
    const std::int64_t reads = monotonic_ns();
    if (encodes_anew) {
      session.reset();
      all.assign(source.begin(), source.begin() + (u + 1) * m);
      all.insert(all.end(), target.begin(), target.end());
      session.accept(all);
    } else {
      session.accept(
          std::span(source).subspan(static_cast<std::size_t>(u * m), static_cast<std::size_t>(m)));
    }
    const std::int64_t writes = monotonic_ns();
    timing.source_ms += static_cast<double>(writes - reads) * 1e-6;
    for (std::int64_t t = 0; t < k; ++t) {
      target.push_back(session.step().value());
      if (target.size() == 2) timing.ttft_ms = static_cast<double>(monotonic_ns() - begin) * 1e-6;
    }
    timing.target_ms += static_cast<double>(monotonic_ns() - writes) * 1e-6;
  }
  timing.wall_ms = static_cast<double>(monotonic_ns() - begin) * 1e-6;
  return timing;
}

void overlap(const Model& model, const Options& options) {
  for (const auto& [m, k] : options.pairs) {
    struct Way {
      std::string name;
      int threads;
      std::function<Timing()> run;
      std::vector<Timing> timings;
    };
    const std::int64_t units = options.units;
    std::vector<Way> ways;
    const auto add = [&](const char* name, int threads, auto run) {
      ways.push_back({name, threads, run, {}});
    };
    const std::int64_t source_unit = m;
    const std::int64_t target_unit = k;
    // Nobody's threads compute on a GPU.
    const int most_threads = kOnCpu ? 2 : 1;
    for (int threads = 1; threads <= most_threads; ++threads)
      add("sequential", threads, [&model, source_unit, target_unit, units, threads] {
        return group_stream(model, source_unit, target_unit, units, false, threads);
      });
    add("duplex", 1, [&model, source_unit, target_unit, units] {
      return group_stream(model, source_unit, target_unit, units, true, 1);
    });
    for (const bool anew : {false, true})
      add(anew ? "re-encoding" : "interleaved", most_threads,
          [&model, source_unit, target_unit, units, anew, most_threads] {
            return one_cache_stream(model, source_unit, target_unit, units, anew, most_threads);
          });
    for (std::int64_t round = 0; round < options.rounds; ++round)
      for (Way& way : ways) {
        // It takes tens of times as long and varies little.
        if (way.name == "re-encoding" && round > 0) continue;
        std::cerr << "overlap " << m << ":" << k << " round " << round + 1 << " " << way.name
                  << " x" << way.threads << "\n";
        way.timings.push_back(way.run());
      }
    const auto of = [](const Way& way, double Timing::*field) {
      std::vector<double> values;
      for (const Timing& timing : way.timings) values.push_back(timing.*field);
      return median(std::move(values));
    };
    const double sequential = of(ways[0], &Timing::wall_ms);
    const double source = of(ways[0], &Timing::source_ms);
    const double target = of(ways[0], &Timing::target_ms);
    for (const Way& way : ways) {
      const double wall = of(way, &Timing::wall_ms);
      Record record("overlap");
      record.field("model", model.name)
          .field("backend", std::string(backend_traits<Tag>::kName))
          .field("source_tokens_per_unit", m)
          .field("target_tokens_per_unit", k)
          .field("units", units)
          .field("way", way.name)
          .field("threads_per_side", static_cast<std::int64_t>(way.threads))
          .field("runs", static_cast<std::int64_t>(way.timings.size()))
          .field("wall_ms", wall)
          .field("source_ms", of(way, &Timing::source_ms))
          .field("target_ms", of(way, &Timing::target_ms))
          .field("ttft_ms", of(way, &Timing::ttft_ms))
          .field("r", source / target)
          .field("bound", overlap_bound(source / target))
          .field("speedup_over_sequential_x1", sequential / wall);
      if (way.name == "duplex") {
        std::vector<double> speedups;  // of neighbours in time: the machine drifts
        for (std::size_t i = 0; i < way.timings.size(); ++i)
          speedups.push_back(ways[0].timings[i].wall_ms / way.timings[i].wall_ms);
        record.field("speedup_min", *std::min_element(speedups.begin(), speedups.end()))
            .field("speedup_max", *std::max_element(speedups.begin(), speedups.end()))
            .field("overlap_efficiency", overlap_efficiency(sequential, wall, source, target));
        if (kOnCpu)
          record.field("speedup_over_sequential_x2", of(ways[1], &Timing::wall_ms) / wall);
      }
    }
  }
}

// ---- switch ------------------------------------------------------------------------------------

/// Appends tokens without computing them: rows stay zero, bookkeeping is what it would be.
void fill(Group<f16>& group, std::int64_t tokens) {
  while (group.cache().total() < tokens) {
    group.cache().append(std::min(group.cache().max_chunk(), tokens - group.cache().total()));
    group.cache().commit();
  }
  group.publish();
}

void switches(const Model& model, const Options& options) {
  const Decoder& decoder = *model.decoder;
  const std::int64_t target_tokens = 256;
  for (const std::int64_t length : options.sources) {
    std::cerr << "switch, " << length << " source tokens\n";
    CacheOptions cache{.policy = CachePolicy::kFull, .capacity = length, .chunk_size = 1};
    const auto source =
        decoder.make_group<f16>("source", kSourceGroup, plan_cache(decoder.config(), cache));
    cache.capacity = target_tokens + 64;
    const auto target =
        decoder.make_group<f16>("target", kTargetGroup, plan_cache(decoder.config(), cache));
    fill(*source, length);
    fill(*target, target_tokens);
    const int reader = source->open_reader();
    const std::int64_t layers = decoder.config().num_layers();
    std::array<Segment<f16>, KvCache<f16>::kMaxSegments> segments;

    LatencyHistogram snapshot;
    std::int64_t listed = 0;
    for (int i = 0; i < 2000; ++i) {
      const std::int64_t begin = monotonic_ns();
      const std::int64_t seen = source->published();
      source->hold(reader, seen);
      const GroupView<f16> view = source->view(seen);
      for (std::int64_t layer = 0; layer < layers; ++layer)
        listed += view.cache->snapshot_segments(
            layer, view.visible, target->cache().retention(layer).reader_place(), segments);
      snapshot.record(monotonic_ns() - begin);
    }

    // What joining the caches by copying moves, at least: all keys and values of the source.
    const std::size_t bytes = source->cache().bytes();
    std::vector<char> joined(bytes);
    LatencyHistogram copy;
    for (int i = 0; i < 5; ++i) {
      source->cache().segments(0, 0, segments);
      const char* from = reinterpret_cast<const char*>(segments[0].keys);
      const std::int64_t begin = monotonic_ns();
      // Keys of all layers lie together, and so do values: two runs of half the bytes.
      std::memcpy(joined.data(), from, bytes / 2);
      std::memcpy(joined.data() + bytes / 2, reinterpret_cast<const char*>(segments[0].values),
                  bytes / 2);
      copy.record(monotonic_ns() - begin);
    }

    DecoderWorkspace workspace(decoder, 1, length + target_tokens + 64, 2);
    ThreadTeam team(2);
    const std::array<GroupView<f16>, 1> sees{source->view(length)};
    LatencyHistogram forward;
    const std::array<Token, 1> token{kPrefix};
    for (int i = 0; i < 15; ++i) {
      const std::int64_t begin = monotonic_ns();
      decoder.forward(DecoderInput{token}, target->cache(),
                      GroupReader<f16, f16>{.own_group = kTargetGroup, .sees = sees}, workspace,
                      team);
      target->cache().commit();
      forward.record(monotonic_ns() - begin);
    }
    Record("switch")
        .field("model", model.name)
        .field("source_tokens", length)
        .field("snapshot_us_median", static_cast<double>(snapshot.quantile_ns(0.5)) * 1e-3)
        .field("snapshot_us_p99", static_cast<double>(snapshot.quantile_ns(0.99)) * 1e-3)
        .field("segments_listed", listed / 2000)
        .field("cache_bytes_moved", source->cache().bytes_moved() + target->cache().bytes_moved())
        .field("copying_bytes", static_cast<std::int64_t>(bytes))
        .field("copying_ms", static_cast<double>(copy.quantile_ns(0.5)) * 1e-6)
        .field("write_forward_ms", static_cast<double>(forward.quantile_ns(0.5)) * 1e-6);
  }
}

// ---- endless -----------------------------------------------------------------------------------

std::int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  std::int64_t total = 0;
  std::int64_t resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

void endless(const Model& model, const Options& options) {
  const std::int64_t unit = 4;
  const std::int64_t units = options.tokens / unit;
  DuplexOptions duplex_options;
  duplex_options.target_prefix = {kPrefix};
  duplex_options.source = {
      .policy = CachePolicy::kSinkWindow, .num_sink_tokens = 4, .window_size = 508};
  duplex_options.target = duplex_options.source;
  duplex_options.max_target_tokens = units * unit;
  duplex_options.max_unit_tokens = unit;
  DuplexOn<Tag, WaitK<FixedUnits>> duplex(model.placed, duplex_options,
                                          WaitK(1, FixedUnits{unit}, 0));
  std::jthread feeder([&] {
    Random random(5);
    std::vector<Token> tokens(static_cast<std::size_t>(unit));
    for (std::int64_t u = 0; u < units; ++u) {
      for (Token& token : tokens)
        token = static_cast<Token>(
            random.below(static_cast<std::uint64_t>(model.decoder->config().vocab_size)));
      if (duplex.feed(tokens, u + 1 == units) != FeedStatus::kAccepted) return;
    }
  });
  const std::int64_t total = units * unit;
  const std::int64_t tenth = std::max<std::int64_t>(total / 10, 1);
  LatencyHistogram latency;
  std::string bins;
  std::int64_t written = 0;
  std::int64_t last_ns = 0;
  while (const auto output = duplex.next()) {
    if (last_ns != 0) latency.record(output->time_ns - last_ns);
    last_ns = output->time_ns;
    if (++written % tenth != 0) continue;
    std::cerr << "endless " << written << " of " << total << "\n";
    const auto us = [&](double q) {
      return std::to_string(static_cast<double>(latency.quantile_ns(q)) * 1e-3);
    };
    bins += (bins.empty() ? "[" : ", ") + std::string("{\"from\": ") +
            std::to_string(written - tenth) + ", \"to\": " + std::to_string(written) +
            ", \"median_us\": " + us(0.5) + ", \"p99_us\": " + us(0.99) +
            ", \"p999_us\": " + us(0.999) + ", \"max_us\": " + us(1.0) +
            ", \"rss_bytes\": " + std::to_string(resident_bytes()) + "}";
    latency.reset();
  }
  const DuplexReport report = duplex.report();
  Record record("endless");
  record.field("model", model.name + " duplex")
      .field("backend", std::string(backend_traits<Tag>::kName))
      .field("policy", std::string("sink-window"))
      .field("sinks", std::int64_t{4})
      .field("window", std::int64_t{508})
      .field("source_tokens", report.source_tokens)
      .field("target_tokens", report.tokens_written)
      .field("wall_ms", report.wall_ms)
      .field("source_ms", report.source_busy_ms)
      .field("target_ms", report.target_busy_ms)
      .field("cache_bytes", static_cast<std::int64_t>(duplex.engine().cache_bytes()))
      .field("end", std::string(to_string(duplex.end_reason())))
      .json("bins", bins + "]");
  const auto note_moves = [&]([[maybe_unused]] const auto& engine) {
    if constexpr (kOnCpu)
      record.field("bytes_moved",
                   engine.source().cache().bytes_moved() + engine.target().cache().bytes_moved());
  };
  note_moves(duplex.engine());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::span<char*> arguments(argv + 1, static_cast<std::size_t>(argc - 1));
    for (const std::string_view argument : arguments) {
      if (argument == "--help" || argument == "-h") {
        std::cout << kHelp;
        return 0;
      }
      if (argument == "--benchmark_list_tests") {
        std::cout << (kOnCpu ? "overlap\nswitch\nendless\n" : "overlap\nendless\n");
        return 0;
      }
    }
    const Options options = parse(arguments);
    const Model model = load(options);
    for (const std::string& experiment : options.experiments) {
      if (experiment == "overlap") overlap(model, options);
      if (experiment == "switch") switches(model, options);
      if (experiment == "endless") endless(model, options);
    }
  } catch (const std::exception& error) {
    std::cerr << "duplex_bench: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
