// SPDX-License-Identifier: MIT
/// One model, a few tasks, one JSON object a line: what versus_llama_cpp.py runs in turns with the
/// peer. Tasks:
///   decode:N    milliseconds of single tokens behind N cached ones (full cache)
///   prefill:N   milliseconds to read N tokens at once, no logits but the last's
///   ttft:N      the same and the first token
///   endless:N   milliseconds of N tokens in the steady state of 4 sinks + 1,020 keys
///   window:W    milliseconds of single tokens in the steady state of W keys, 4 of them sinks
///   stream:N    milliseconds to read N tokens through 4 sinks + 1,020 keys
///   limits      what the machine allows the same threads at this moment
///   jitter:N    N steps of `endless` in turns with N of about the same length that only count in
///               registers, and N that only read as many bytes: how even steps can be here at all.
///               A line for each of the three with median, p99, p99.9 and longest (for a p99.9 that
///               means something N is 10,000 or more)
///   pieces:N    N steps with 64 keys in turns with N times the step's products alone, N times what
///               only reads the same weights in the same pieces, and N times the same bytes in one
///               piece: what is left to gain. A line for each of the four with the median and GB/s
/// Beside the times stand what a row has to do at least: bytes to read for a token, or the products
/// of weights and of attention.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <iostream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/machine_limits.hpp"
#include "support/random_decoder.hpp"

#include "sluice/backend/cpu/kernel_table.hpp"
#include "sluice/backend/cpu/linear_task.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/nn/linear.hpp"
#include "sluice/stream/session.hpp"

namespace {

using namespace sluice;

constexpr const char* kHelp =
    "usage: speed_bench MODEL.gguf THREADS [int8] [onednn | no-onednn] TASK...\n"
    "MODEL.gguf may be random-TYPE or random-1b-TYPE (Q8_0, Q4_0, BF16, F32): SmolLM2-135M's or\n"
    "Llama 3.2 1B's geometry, seeded weights\n"
    "int8: activations are rounded, to 8 bits where weights are quantised, to bf16 where they are "
    "that\n"
    "onednn, no-onednn: chunks through oneDNN always, or never; else where the processor has AMX\n"
    "tasks: decode:N prefill:N ttft:N endless:N (N tokens) window:W stream:N limits jitter:N "
    "pieces:N; JSON lines\n";

using Model = std::shared_ptr<const Decoder>;

std::vector<Token> random_tokens(const Model& model, std::int64_t count) {
  Random random(7);
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Token& token : tokens)
    token =
        static_cast<Token>(random.below(static_cast<std::uint64_t>(model->config().vocab_size)));
  return tokens;
}

double ms_since(std::int64_t begin) {
  return static_cast<double>(monotonic_ns() - begin) * 1e-6;
}

/// Peak resident memory of this program alone: getrusage's would be that of whoever started it
/// where that is more. 0 where the system has no /proc.
double peak_resident_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == "VmHWM:") {
      double kib = 0;
      status >> kib;
      return kib / 1024;
    }
  return 0;
}

struct Setting {
  int threads = 1;
  Activations activations = Activations::kFloat32;
  OneDnn onednn = OneDnn::kWhereFaster;
};

Session<f16> make_session(const Model& model, CachePolicy policy, std::int64_t capacity,
                          const Setting& setting, std::int64_t window = 1024,
                          std::shared_ptr<ThreadTeam> team = nullptr) {
  SessionOptions options;
  options.team = std::move(team);
  options.activations = setting.activations;
  options.onednn = setting.onednn;
  options.cache.policy = policy;
  options.cache.num_sink_tokens = 4;
  options.cache.window_size = window - 4;
  options.cache.capacity = capacity;
  options.num_threads = setting.threads;
  return Session<f16>(model, options);
}

std::vector<double> decode(const Model& model, std::int64_t cached, const Setting& setting) {
  constexpr std::int64_t kSteps = 48;
  Session<f16> session = make_session(model, CachePolicy::kFull, cached + kSteps + 8, setting);
  session.accept(random_tokens(model, std::max<std::int64_t>(cached, 1)));
  session.step();
  session.step();
  std::vector<double> ms;
  for (std::int64_t i = 0; i < kSteps; ++i) {
    const std::int64_t begin = monotonic_ns();
    session.step();
    ms.push_back(ms_since(begin));
  }
  return ms;
}

std::vector<double> read(const Model& model, CachePolicy policy, std::int64_t tokens,
                         const Setting& setting, bool writes) {
  Session<f16> session = make_session(model, policy, tokens + 8, setting);
  const std::vector<Token> prompt = random_tokens(model, tokens);
  std::vector<double> ms;
  for (int i = 0; i < 3; ++i) {
    session.reset();
    const std::int64_t begin = monotonic_ns();
    session.accept(prompt);
    if (writes) session.step();
    ms.push_back(ms_since(begin));
  }
  return ms;
}

/// Milliseconds of `tokens` single tokens once `window` keys, 4 of them sinks, are there.
std::vector<double> endless(const Model& model, std::int64_t window, std::int64_t tokens,
                            const Setting& setting) {
  Session<f16> session = make_session(model, CachePolicy::kSinkWindow, 0, setting, window);
  session.accept(random_tokens(model, window + 76));
  session.step();
  std::vector<double> ms;
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::int64_t begin = monotonic_ns();
    session.step();
    ms.push_back(ms_since(begin));
  }
  return ms;
}

/// What a task has to do at least.
struct Work {
  double bytes = 0;     // to read, of one token
  double products = 0;  // multiplications and additions of all tokens that are read
};

/// Of weights without the embedding's row lookups, and of f16 keys and values.
Work work_of(const Model& model, std::int64_t tokens, std::int64_t keys, bool causal) {
  const DecoderConfig& c = model->config();
  const DecoderWeights& weights = model->weights();
  double bytes = static_cast<double>(weights.output.bytes());
  double values = 0;
  for (const DecoderLayerWeights& layer : weights.layers)
    for (const WeightMatrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output,
                                       &layer.gate, &layer.up, &layer.down}) {
      bytes += static_cast<double>(matrix->bytes());
      values += static_cast<double>(matrix->rows * matrix->cols);
    }
  const auto layers = static_cast<double>(c.num_layers());
  const auto n = static_cast<double>(tokens);
  const auto k = static_cast<double>(keys);
  // Of T tokens that read themselves, token t sees t keys, at most `keys`.
  const double seen =
      causal ? std::min(n, k) * (std::min(n, k) + 1) / 2 + std::max(0.0, n - k) * k : n * k;
  const auto head_values = static_cast<double>(c.num_qo_heads * c.head_dim);
  Work work;
  work.bytes = bytes + layers * 2 * 2 * k * static_cast<double>(c.num_kv_heads * c.head_dim);
  work.products = 2 * values * n + layers * 4 * head_values * seen;
  return work;
}

/// Steps of the same team that do nothing of a model: each member takes its share of one fork-join.
class EmptySteps {
 public:
  /// `bytes` to read a step, by all members together. Allocates them.
  EmptySteps(ThreadTeam& team, double bytes)
      : team_(team),
        memory_(static_cast<std::size_t>(bytes) / sizeof(float)),
        sums_(static_cast<std::size_t>(team.size()) * 16) {}

  void read() {
    constexpr std::int64_t kStreams = 4;
    constexpr std::int64_t kBehind = 2048;  // floats that the prefetches reach
    const std::int64_t share = static_cast<std::int64_t>(memory_.size()) / team_.size() / 16 * 16;
    team_.run([&](int member, int) {
      sum(member) +=
          bench::detail::read_streams(memory_.data() + member * share, share - kBehind, kStreams);
    });
  }

  /// So many rounds of multiplications in registers on each member.
  void count(std::int64_t rounds) {
    constexpr int kChains = 12;
    team_.run([&](int member, int) {
      simd::VecF sums[kChains] = {};
      const simd::VecF x = simd::broadcast(0.5F);
      for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < kChains; ++k) sums[k] = simd::in_register(simd::fma(x, x, sums[k]));
      }
      for (const simd::VecF& chain : sums) sum(member) += simd::reduce_add(chain) * 1e-30F;
    });
  }

 private:
  float& sum(int member) {
    return sums_[static_cast<std::size_t>(member) * 16];
  }

  ThreadTeam& team_;
  Buffer<float> memory_;
  std::vector<float> sums_;
};

template <class Step>
double timed_ms(Step&& step) {
  const std::int64_t begin = monotonic_ns();
  step();
  return ms_since(begin);
}

/// The value that a share of `sorted` is not above.
double quantile(const std::vector<double>& sorted, double share) {
  const auto last = static_cast<double>(sorted.size() - 1);
  return sorted[static_cast<std::size_t>(std::ceil(share * last))];
}

void print_jitter(const Model& model, std::int64_t steps, const Setting& setting) {
  constexpr std::int64_t kTogether = 200;  // steps of one kind before it is another's turn
  constexpr std::int64_t kWindow = 1024;
  const auto team = std::make_shared<ThreadTeam>(setting.threads);
  Session<f16> session = make_session(model, CachePolicy::kSinkWindow, 0, setting, kWindow, team);
  session.accept(random_tokens(model, kWindow + 76));
  session.step();
  EmptySteps empty(*team, work_of(model, 1, kWindow, false).bytes);

  const auto decode_step = [&] {
    session.step();
  };
  const auto median_of = [](auto&& step) {
    std::vector<double> ms;
    for (int i = 0; i < 50; ++i) ms.push_back(timed_ms(step));
    std::sort(ms.begin(), ms.end());
    return quantile(ms, 0.5);
  };
  constexpr std::int64_t kProbe = 100'000;
  const double wanted = median_of(decode_step);
  const auto rounds = static_cast<std::int64_t>(static_cast<double>(kProbe) * wanted /
                                                median_of([&] { empty.count(kProbe); }));
  const auto count_step = [&] {
    empty.count(rounds);
  };
  const auto read_step = [&] {
    empty.read();
  };

  std::array<std::vector<double>, 3> ms;
  for (std::vector<double>& kind : ms) kind.reserve(static_cast<std::size_t>(steps));
  for (std::int64_t done = 0; done < steps; done += kTogether) {
    const std::int64_t count = std::min(kTogether, steps - done);
    for (std::int64_t i = 0; i < count; ++i) ms[0].push_back(timed_ms(decode_step));
    for (std::int64_t i = 0; i < count; ++i) ms[1].push_back(timed_ms(count_step));
    for (std::int64_t i = 0; i < count; ++i) ms[2].push_back(timed_ms(read_step));
  }
  const std::array<const char*, 3> names{"decode", "registers", "reads"};
  for (std::size_t kind = 0; kind < ms.size(); ++kind) {
    std::vector<double>& sorted = ms[kind];
    std::sort(sorted.begin(), sorted.end());
    const double median = quantile(sorted, 0.5);
    std::cout << "{\"task\": \"jitter:" << steps << "\", \"steps\": \"" << names[kind]
              << "\", \"threads\": " << setting.threads << ", \"median_ms\": " << median
              << ", \"p99_ms\": " << quantile(sorted, 0.99)
              << ", \"p99_9_ms\": " << quantile(sorted, 0.999) << ", \"max_ms\": " << sorted.back()
              << ", \"p99_9_over_median\": " << quantile(sorted, 0.999) / median << "}"
              << std::endl;
  }
}

/// A single token's products of a model, one fork-join for what a step has in one, with nothing
/// between them; and the same fork-joins that only read.
class Products {
 public:
  /// Allocates activations and scratch. The weights stay the model's.
  Products(const Model& model, ThreadTeam& team, Activations activations)
      : model_(model), team_(team), sums_(static_cast<std::size_t>(team.size()) * 16) {
    const DecoderWeights& weights = model->weights();
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    const auto add = [&](std::initializer_list<const WeightMatrix*> matrices) {
      std::vector<LinearTask>& tasks = pieces_.emplace_back();
      std::int64_t together = 0;
      for (const WeightMatrix* matrix : matrices) {
        tasks.emplace_back().weight = *matrix;
        together += matrix->rows;
        cols = std::max(cols, matrix->cols);
        bytes_ += static_cast<double>(matrix->bytes());
      }
      rows = std::max(rows, together);
    };
    for (const DecoderLayerWeights& layer : weights.layers) {
      add({&layer.query, &layer.key, &layer.value});
      add({&layer.output});
      add({&layer.gate, &layer.up});
      add({&layer.down});
    }
    add({&weights.output});
    x_ = Buffer<float>(static_cast<std::size_t>(cols));
    std::fill(x_.data(), x_.data() + cols, 0.5F);
    y_ = Buffer<float>(static_cast<std::size_t>(rows));
    for (std::vector<LinearTask>& tasks : pieces_) {
      float* y = y_.data();
      for (LinearTask& task : tasks) {
        task.y = MatrixView<float>(y, 1, task.weight.rows);
        y += task.weight.rows;
      }
    }
    workspace_ = std::make_unique<LinearWorkspace>(cols, team.size(), activations, 1);
  }

  double bytes() const { return bytes_; }

  void multiply() {
    for (const std::vector<LinearTask>& tasks : pieces_)
      linear_many(tasks, MatrixView<const float>(x_.data(), 1, tasks[0].weight.cols), *workspace_,
                  team_);
  }

  /// Each member reads every line of its share of the rows, four of them side by side, as the
  /// products do.
  void read() {
    for (const std::vector<LinearTask>& tasks : pieces_)
      team_.run([&](int member, int num_members) {
        for (const LinearTask& task : tasks) {
          const std::int64_t row_bytes = task.weight.row_bytes();
          const detail::StreamRows all(share_of(task.weight.rows, member, num_members, 4), 4);
          simd::VecF sums[4] = {};
          for (std::int64_t pass = 0; pass < all.apart; ++pass)
            for (std::int64_t at = 0; at < row_bytes; at += 64)
#pragma GCC unroll 4
              for (int r = 0; r < 4; ++r) {
                const std::int64_t row = std::min(all.row(pass, r), all.rows.end - 1);
                // The line's last lane, within the row: a line is fetched whole.
                const std::int64_t last = std::min<std::int64_t>(at + 64, row_bytes);
                sums[r] += simd::load(reinterpret_cast<const float*>(
                    static_cast<const char*>(task.weight.data) + row * row_bytes + last -
                    static_cast<std::int64_t>(simd::kWidth * sizeof(float))));
              }
          sums_[static_cast<std::size_t>(member) * 16] +=
              simd::reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
        }
      });
  }

 private:
  Model model_;  // whose weights are read
  ThreadTeam& team_;
  std::vector<std::vector<LinearTask>> pieces_;
  double bytes_ = 0;
  Buffer<float> x_;
  Buffer<float> y_;
  std::unique_ptr<LinearWorkspace> workspace_;
  std::vector<float> sums_;
};

void print_pieces(const Model& model, std::int64_t times, const Setting& setting) {
  constexpr std::int64_t kWindow = 64;
  const auto team = std::make_shared<ThreadTeam>(setting.threads);
  Session<f16> session = make_session(model, CachePolicy::kSinkWindow, 0, setting, kWindow, team);
  session.accept(random_tokens(model, kWindow + 76));
  session.step();
  Products products(model, *team, setting.activations);
  EmptySteps empty(*team, products.bytes());
  std::array<std::vector<double>, 4> ms;
  for (std::int64_t i = 0; i < times; ++i) {
    ms[0].push_back(timed_ms([&] { session.step(); }));
    ms[1].push_back(timed_ms([&] { products.multiply(); }));
    ms[2].push_back(timed_ms([&] { products.read(); }));
    ms[3].push_back(timed_ms([&] { empty.read(); }));
  }
  const std::array<const char*, 4> names{"step", "products", "reads in pieces", "reads at once"};
  for (std::size_t kind = 0; kind < ms.size(); ++kind) {
    std::sort(ms[kind].begin(), ms[kind].end());
    const double median = quantile(ms[kind], 0.5);
    std::cout << "{\"task\": \"pieces:" << times << "\", \"what\": \"" << names[kind]
              << "\", \"threads\": " << setting.threads << ", \"median_ms\": " << median
              << ", \"p10_ms\": " << quantile(ms[kind], 0.1)
              << ", \"weight_gb_per_s\": " << products.bytes() / median * 1e-6 << "}" << std::endl;
  }
}

void print_limits(const Setting& setting) {
  ThreadTeam team(setting.threads);
  const bench::MachineLimits limits = bench::measure_machine(team);
  std::cout << "{\"task\": \"limits\", \"threads\": " << setting.threads << ", \"kernels\": \""
            << kernel_target() << "\", \"read_gb_per_s\": " << limits.read_gb_per_s
            << ", \"f32_gflop_per_s\": " << limits.f32_gflop_per_s
            << ", \"bf16_gflop_per_s\": " << limits.bf16_gflop_per_s
            << ", \"int8_gop_per_s\": " << limits.int8_gop_per_s << "}" << std::endl;
}

Model load(const std::string& name) {
  for (const ElementType type :
       {ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kBF16, ElementType::kF32})
    for (const auto& [prefix, geometry] :
         {std::pair{"random-", bench::smollm2_135m()}, std::pair{"random-1b-", bench::llama_1b()}})
      if (name == prefix + std::string(to_string(type)))
        return bench::random_decoder(geometry, type);
  return load_decoder(std::make_shared<const GgufFile>(name));
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && arguments[0] == "--benchmark_list_tests") {
    std::cout << "decode\nprefill\nttft\nendless\nwindow\nstream\nlimits\njitter\npieces\n";
    return 0;
  }
  if (arguments.size() < 3) {
    std::cerr << kHelp;
    return arguments.empty() || arguments[0] == "--help" ? 0 : 2;
  }
  const std::int64_t begin = monotonic_ns();
  const Model model = load(arguments[0]);
  const double load_ms = ms_since(begin);
  Setting setting{.threads = std::atoi(arguments[1].c_str())};
  std::span<const std::string> tasks = std::span(arguments).subspan(2);
  const auto take = [&](std::string_view word) {
    const bool found = !tasks.empty() && tasks.front() == word;
    if (found) tasks = tasks.subspan(1);
    return found;
  };
  if (take("int8")) setting.activations = Activations::kInt8;
  if (take("onednn")) setting.onednn = OneDnn::kAlways;
  if (take("no-onednn")) setting.onednn = OneDnn::kNever;
  for (const std::string& task : tasks) {
    const std::size_t colon = task.find(':');
    const std::string name = task.substr(0, colon);
    const std::int64_t count =
        colon == std::string::npos ? 0 : std::atoll(task.c_str() + colon + 1);
    if (name == "limits") {
      print_limits(setting);
      continue;
    }
    if (name == "jitter" && count >= 1) {
      print_jitter(model, count, setting);
      continue;
    }
    if (name == "pieces" && count >= 1) {
      print_pieces(model, count, setting);
      continue;
    }
    std::vector<double> ms;
    Work work;
    if (name == "decode") {
      ms = decode(model, count, setting);
      work.bytes = work_of(model, 1, count, false).bytes;
    } else if (name == "prefill" || name == "ttft") {
      ms = read(model, CachePolicy::kFull, count, setting, name == "ttft");
      work.products = work_of(model, count, count, true).products;
    } else if (name == "stream") {
      ms = read(model, CachePolicy::kSinkWindow, count, setting, false);
      work.products = work_of(model, count, 1024, true).products;
    } else if (name == "endless" || (name == "window" && count >= 8)) {
      constexpr std::int64_t kSteps = 64;
      ms = name == "endless" ? endless(model, 1024, count, setting)
                             : endless(model, count, kSteps, setting);
      work.bytes = work_of(model, 1, name == "endless" ? 1024 : count, false).bytes;
    } else {
      throw std::invalid_argument("unknown task '" + task + "'");
    }
    std::cout << "{\"task\": \"" << task << "\", \"load_ms\": " << load_ms
              << ", \"peak_resident_mb\": " << peak_resident_mb() << ", \"bytes\": " << work.bytes
              << ", \"products\": " << work.products << ", \"ms\": [";
    for (std::size_t i = 0; i < ms.size(); ++i) std::cout << (i == 0 ? "" : ", ") << ms[i];
    std::cout << "]}" << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << "speed_bench: " << error.what() << "\n";
  return 2;
}
