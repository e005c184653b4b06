// SPDX-License-Identifier: MIT
/// Linear layers against this machine's limits. Names are linear/<type>/<activations>, where f32,
/// bf16 and int8 are those of sluice::Activations and onednn, in a build with SLUICE_ONEDNN, is
/// int8 where chunks go through oneDNN; arguments are tokens, rows (out features), cols (in
/// features) and threads. With few tokens, weights rotate through copies that together exceed any
/// cache, as the layers of a model do; counters are GB/s of weight bytes and GFLOP/s (two per
/// weight and token). `of_read` and `of_peak` are these over what the machine allows, measured in
/// the same run: `read`, the bandwidth with which the team sums a buffer that no cache holds, and
/// `peak`, the rate of the kind of multiplication that the products are made of, registers by
/// registers. `crossover` compares the two paths of the CPU backend at the same shape: its
/// kStreamTokens comes from there.
///
/// The counters are those of the fastest single call, which a busy neighbour disturbs least; the
/// times are Google Benchmark's means over all calls. A small matrix may find one of its copies
/// still in the last-level cache: for bandwidth read the rows with 49152 rows, larger than any such
/// cache.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/nn/linear.hpp"

namespace {

using sluice::Activations;
using sluice::Buffer;
using sluice::ElementType;
using sluice::LinearTask;
using sluice::LinearWorkspace;
using sluice::MatrixView;
using sluice::OneDnn;
using sluice::ThreadTeam;
using sluice::WeightMatrix;
using sluice::WorkRange;

constexpr std::int64_t kPoolBytes = std::int64_t{160} << 20;

// Copies of a matrix of random blocks; block scales are small finite numbers.
Buffer<unsigned char> random_pool(ElementType type, std::int64_t matrix_bytes,
                                  std::int64_t copies) {
  Buffer<unsigned char> pool(static_cast<std::size_t>(matrix_bytes * copies));
  std::mt19937 random(1);
  const sluice::BlockShape shape = sluice::block_shape(type);
  const auto small = [&] {
    return sluice::f16(static_cast<float>(random() % 1000) * 1e-5F);
  };
  unsigned char* matrix = pool.data();
  for (std::int64_t b = 0; b < matrix_bytes / shape.bytes; ++b) {
    unsigned char* block = matrix + b * shape.bytes;
    const sluice::f16 halves[2] = {small(), small()};
    const float value = static_cast<float>(halves[0]);
    const sluice::bf16 brain(value);
    switch (type) {
      case ElementType::kF32: std::memcpy(block, &value, 4); break;
      case ElementType::kF16: std::memcpy(block, halves, 2); break;
      case ElementType::kBF16: std::memcpy(block, &brain, 2); break;
      default:
        for (int i = 0; i < shape.bytes; ++i) block[i] = static_cast<unsigned char>(random());
        if (type == ElementType::kQ6_K)
          std::memcpy(block + 208, halves, 2);
        else
          std::memcpy(block, halves,
                      type == ElementType::kQ8_0 || type == ElementType::kQ4_0 ? 2 : 4);
    }
  }
  for (std::int64_t i = 1; i < copies; ++i)
    std::memcpy(matrix + i * matrix_bytes, matrix, static_cast<std::size_t>(matrix_bytes));
  return pool;
}

std::vector<float> random_values(std::int64_t count) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// The shortest of the calls it was given, in seconds.
class Fastest {
 public:
  template <class Function>
  void time(Function&& function) {
    const auto start = std::chrono::steady_clock::now();
    function();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    seconds_ = std::min(seconds_, took.count());
  }
  double seconds() const { return seconds_; }

 private:
  double seconds_ = std::numeric_limits<double>::infinity();
};

enum class Path { kChosen, kStream, kPanels };

void multiply(const LinearTask& task, MatrixView<const float> x, LinearWorkspace& workspace,
              ThreadTeam& team, Path path) {
  if (path == Path::kPanels)
    sluice::detail::panel_tasks({&task, 1}, x, workspace, team);
  else
    sluice::linear_many({&task, 1}, x, workspace, team);
}

// The sum of a buffer, read as eight streams an eighth apart: nothing but loads bounds it, and one
// stream alone does not occupy a core's memory requests.
float sum_of(const float* data, WorkRange range) {
  namespace simd = sluice::simd;
  const std::int64_t apart = (range.end - range.begin) / 8;
  simd::VecF sums[8] = {};
  for (std::int64_t i = range.begin; i + simd::kWidth <= range.begin + apart; i += simd::kWidth)
    for (int k = 0; k < 8; ++k) sums[k] += simd::load(data + k * apart + i);
  for (int k = 1; k < 8; ++k) sums[0] += sums[k];
  return simd::reduce_add(sums[0]);
}

// Bytes per second with which a team reads a buffer that no cache holds.
double read_bandwidth(int threads) {
  const Buffer<float> data(static_cast<std::size_t>(kPoolBytes) / sizeof(float));
  ThreadTeam team(threads);
  std::vector<float> sums(static_cast<std::size_t>(threads) * 16);
  Fastest fastest;
  for (int i = 0; i < 12; ++i)
    fastest.time([&] {
      team.run([&](int member, int num_members) {
        sums[static_cast<std::size_t>(member) * 16] = sum_of(
            data.data(),
            sluice::share_of(static_cast<std::int64_t>(data.size()), member, num_members, 1024));
      });
    });
  benchmark::DoNotOptimize(sums.data());
  return static_cast<double>(data.bytes()) / fastest.seconds();
}

// The multiplications that products are made of: float32, pairs of bf16, fours of bytes.
enum class Multiply { kFloat, kPairs, kBytes };

Multiply multiply_of(ElementType type, Activations activations) {
  if (type == ElementType::kBF16 && activations != Activations::kFloat32) return Multiply::kPairs;
  const bool quantised = sluice::block_shape(type).values > 1;
  return quantised && activations == Activations::kInt8 ? Multiply::kBytes : Multiply::kFloat;
}

// Products per second, times two, of a team whose members multiply registers by registers.
double multiply_peak(Multiply kind, int threads) {
  namespace simd = sluice::simd;
  constexpr int kChains = simd::kNumRegisters >= 32 ? 16 : 8;
  constexpr std::int64_t kRounds = 100'000;
  ThreadTeam team(threads);
  std::vector<float> results(static_cast<std::size_t>(threads) * 16);
  const auto loop = [&](int member, auto&& multiply_add) {
    simd::VecF sums[kChains];
    // Chains that begin alike would be one to the compiler.
    for (simd::VecF& sum : sums) sum = simd::in_register(simd::zero());
    simd::VecF factor = simd::zero();
    for (std::int64_t i = 0; i < kRounds; ++i) {
      factor = simd::in_register(factor);
#pragma GCC unroll 16
      for (int k = 0; k < kChains; ++k) sums[k] = multiply_add(sums[k], factor);
    }
    for (int k = 1; k < kChains; ++k) sums[0] += sums[k];
    results[static_cast<std::size_t>(member) * 16] = simd::reduce_add(sums[0]);
  };
  Fastest fastest;
  for (int i = 0; i < 5; ++i)
    fastest.time([&] {
      team.run([&](int member, int) {
        switch (kind) {
          case Multiply::kFloat:
            return loop(member, [](simd::VecF sum, simd::VecF a) { return simd::fma(a, a, sum); });
          case Multiply::kPairs:
            return loop(member, [](simd::VecF sum, simd::VecF a) {
              return simd::dot_pairs(sum, simd::bits_as_int(a), simd::bits_as_int(a));
            });
          case Multiply::kBytes:
            return loop(member, [](simd::VecF sum, simd::VecF a) {
              return simd::bits_as_float(simd::dot_levels(
                  simd::bits_as_int(sum), simd::bits_as_int(a), simd::bits_as_int(a)));
            });
        }
      });
    });
  benchmark::DoNotOptimize(results.data());
  const int products = kind == Multiply::kFloat ? 1 : kind == Multiply::kPairs ? 2 : 4;
  return 2.0 * products * simd::kWidth * kChains * static_cast<double>(kRounds * threads) /
         fastest.seconds();
}

// The machine's limits, measured once in a run for each number of threads.
double limit(int threads, int which) {
  static std::map<std::pair<int, int>, double> known;
  const auto [place, is_new] = known.try_emplace({threads, which});
  if (is_new)
    place->second =
        which < 0 ? read_bandwidth(threads) : multiply_peak(static_cast<Multiply>(which), threads);
  return place->second;
}
double read_limit(int threads) {
  return limit(threads, -1);
}
double multiply_limit(Multiply kind, int threads) {
  return limit(threads, static_cast<int>(kind));
}

void run_linear(benchmark::State& state, ElementType type, Activations activations, Path path,
                OneDnn onednn = OneDnn::kNever) {
  const std::int64_t tokens = state.range(0);
  const std::int64_t rows = state.range(1);
  const std::int64_t cols = state.range(2);
  const auto threads = static_cast<int>(state.range(3));
  if (cols % sluice::block_shape(type).values != 0) {
    state.SkipWithError("cols is not a multiple of the type's block");
    return;
  }
  WeightMatrix weight{type, nullptr, rows, cols};
  const std::int64_t copies = tokens > 64 ? 1 : (kPoolBytes + weight.bytes() - 1) / weight.bytes();
  const Buffer<unsigned char> pool = random_pool(type, weight.bytes(), copies);
  const std::vector<float> x = random_values(tokens * cols);
  std::vector<float> y(static_cast<std::size_t>(tokens * rows));
  ThreadTeam team(threads);
  LinearWorkspace workspace(cols, threads, activations, LinearWorkspace::kDefaultTokens, onednn);
  std::int64_t copy = 0;
  Fastest fastest;
  for (auto _ : state) {
    weight.data = pool.data() + copy * weight.bytes();
    copy = (copy + 1) % copies;
    const LinearTask task{.weight = weight, .y = {y.data(), tokens, rows}};
    fastest.time([&] { multiply(task, {x.data(), tokens, cols}, workspace, team, path); });
    benchmark::DoNotOptimize(y.data());
  }
  const double bandwidth = static_cast<double>(weight.bytes()) / fastest.seconds();
  const double flops = 2.0 * static_cast<double>(tokens * rows * cols) / fastest.seconds();
  state.counters["GB/s"] = bandwidth * 1e-9;
  state.counters["GFLOP/s"] = flops * 1e-9;
  state.counters["of_read"] = bandwidth / read_limit(threads);
  const Multiply kind =
      onednn == OneDnn::kAlways ? Multiply::kPairs : multiply_of(type, activations);
  state.counters["of_peak"] = flops / multiply_limit(kind, threads);
}

void read(benchmark::State& state) {
  const auto threads = static_cast<int>(state.range(0));
  double best = 0.0;
  for (auto _ : state) best = std::max(best, read_bandwidth(threads));
  state.counters["GB/s"] = best * 1e-9;
}

void peak(benchmark::State& state, Multiply kind) {
  const auto threads = static_cast<int>(state.range(0));
  double best = 0.0;
  for (auto _ : state) best = std::max(best, multiply_peak(kind, threads));
  state.counters["GFLOP/s"] = best * 1e-9;
}

constexpr ElementType kTypes[] = {ElementType::kF32,  ElementType::kF16,  ElementType::kBF16,
                                  ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kQ4_1,
                                  ElementType::kQ4_K, ElementType::kQ6_K};

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};
// SmolLM2's shapes, with 768 in place of 576 for the types whose blocks are 256 wide.
std::vector<Shape> shapes_of(ElementType type) {
  const std::int64_t width = sluice::block_shape(type).values == 256 ? 768 : 576;
  return {{576, width}, {1536, width}, {576, 1536}, {49152, width}};
}

void register_type(ElementType type, Activations activations) {
  const std::string name =
      std::string(sluice::to_string(type)) + "/" + std::string(to_string(activations));
  const std::vector<Shape> shapes = shapes_of(type);
  const std::int64_t width = shapes.front().cols;
  auto* bench = benchmark::RegisterBenchmark(("linear/" + name).c_str(),
                                             [type, activations](benchmark::State& state) {
                                               run_linear(state, type, activations, Path::kChosen);
                                             });
  bench->ArgNames({"tokens", "rows", "cols", "threads"})
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
  for (const std::int64_t tokens : {1, 512})
    for (const Shape shape : shapes)
      for (const std::int64_t threads : {1, 2}) {
        if (tokens == 512 && shape.rows == 49152) continue;  // logits are taken of one token
        bench->Args({tokens, shape.rows, shape.cols, threads});
      }
  for (const auto& [path_name, path] :
       {std::pair{"stream", Path::kStream}, std::pair{"panels", Path::kPanels}}) {
    auto* crossover =
        benchmark::RegisterBenchmark(("crossover/" + name + "/" + path_name).c_str(),
                                     [type, activations, path = path](benchmark::State& state) {
                                       run_linear(state, type, activations, path);
                                     });
    crossover->ArgNames({"tokens", "rows", "cols", "threads"})
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
    for (const std::int64_t tokens : {2, 3, 4, 6, 8}) crossover->Args({tokens, 1536, width, 1});
  }
}

#if SLUICE_ONEDNN
void register_onednn(ElementType type) {
  auto* bench = benchmark::RegisterBenchmark(
      ("linear/" + std::string(sluice::to_string(type)) + "/onednn").c_str(),
      [type](benchmark::State& state) {
        run_linear(state, type, Activations::kInt8, Path::kChosen, OneDnn::kAlways);
      });
  bench->ArgNames({"tokens", "rows", "cols", "threads"})
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
  for (const std::int64_t tokens : {32, 128, 512})
    for (const Shape shape : shapes_of(type))
      for (const std::int64_t threads : {1, 2})
        if (shape.rows != 49152) bench->Args({tokens, shape.rows, shape.cols, threads});
}
#endif

void register_all() {
  benchmark::RegisterBenchmark("read", read)
      ->ArgName("threads")
      ->Arg(1)
      ->Arg(2)
      ->Iterations(1)
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
  for (const auto& [name, kind] :
       {std::pair{"f32", Multiply::kFloat}, std::pair{"bf16", Multiply::kPairs},
        std::pair{"int8", Multiply::kBytes}})
    benchmark::RegisterBenchmark((std::string("peak/") + name).c_str(),
                                 [kind = kind](benchmark::State& state) { peak(state, kind); })
        ->ArgName("threads")
        ->Arg(1)
        ->Arg(2)
        ->Iterations(1)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  for (const ElementType type : kTypes) {
    register_type(type, Activations::kFloat32);
    if (sluice::block_shape(type).values > 1) register_type(type, Activations::kInt8);
    if (type == ElementType::kBF16) register_type(type, Activations::kBf16);
#if SLUICE_ONEDNN
    if (sluice::block_shape(type).values > 1 || type == ElementType::kBF16) register_onednn(type);
#endif
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
