// SPDX-License-Identifier: MIT
/// Times whole steps of decoders with random weights in replayed CUDA graphs: single tokens,
/// batches of sessions, short chunks, prefill, and a million tokens of one stream. One JSON object
/// a line, on stdout.
///
/// usage: decoder_bench [--case step|sessions|chunks|prefill|endless|curve] [--weights TYPE]...
///                      [--cache TYPE]... [--parts] [--before] [--tokens N]
///   --case      one of them; without it all but curve, which is a step of the first geometry by
///   the
///               size of its cache, 256 to 16,384 entries (recompute_torch.py)
///   --weights   bf16, q8_0, q6_k, q4_0, q4_1 or q4_k, for all matrices but the embedding; several
///               run in turn (bf16); --parts, endless and curve know bf16 alone
///   --cache     bf16, int8 or fp8, of keys and values; several run in turn (bf16); --parts,
///   endless
///               and curve know bf16 alone. f16 is not built: its bytes and steps are those of bf16
///   --tokens N  how many the endless stream has (a million)
///   --before    also sessions and chunks of up to 8 rows by way of cuBLASLt, as more rows go
///   --parts     also the products of a step, each alone
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sluice/sluice.cuh>

#include "cuda/measure.cuh"
#include "cuda/random_weights.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;

using Weights = CudaDecoderWeights<bf16>;
template <class Cache>
using Model = CudaDecoder<bf16, 128, Cache>;

template <class Cache>
constexpr const char* kCacheName = std::is_same_v<Cache, bf16>          ? "bf16"
                                   : std::is_same_v<Cache, std::int8_t> ? "int8"
                                                                        : "fp8";
constexpr const char* kCacheNames[] = {"bf16", "int8", "fp8"};

/// Calls run(Cache()) for the type of that name.
template <class Run>
void with_cache(const std::string& name, Run&& run) {
  if (name == "int8")
    run(std::int8_t());
  else if (name == "fp8")
    run(fp8_e4m3());
  else
    run(bf16());
}

struct Geometry {
  const char* name;
  CudaDecoderShape shape;
};

constexpr std::pair<const char*, ElementType> kTypes[] = {
    {"bf16", ElementType::kBF16}, {"q8_0", ElementType::kQ8_0}, {"q6_k", ElementType::kQ6_K},
    {"q4_0", ElementType::kQ4_0}, {"q4_1", ElementType::kQ4_1}, {"q4_k", ElementType::kQ4_K}};
/// By its name on the command line; kF32: there is no such type here.
ElementType type_of(const std::string& name) {
  for (const auto& [known, type] : kTypes)
    if (name == known) return type;
  return ElementType::kF32;
}
const char* name_of(ElementType type) {
  for (const auto& [name, known] : kTypes)
    if (type == known) return name;
  return "none";
}

Geometry llama_2_7b() {
  return {"llama-2-7b", {32000, 4096, 11008, 32, 32, 128, 32, 1e-5, 1 / std::sqrt(128.0)}};
}
Geometry llama_3_8b() {
  return {"llama-3-8b", {128256, 4096, 14336, 32, 8, 128, 32, 1e-5, 1 / std::sqrt(128.0)}};
}

/// Of the matrices that a step reads, or of the layers' alone.
double weight_bytes(const CudaDecoderShape& s, ElementType type, bool logits = true) {
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    return static_cast<double>(is_quantised(type) ? quantised_bytes(type, rows, cols)
                                                  : 2 * rows * cols);
  };
  const double layer =
      matrix(s.fused_size(), s.hidden_size) + matrix(s.hidden_size, s.query_size()) +
      matrix(2 * s.intermediate_size, s.hidden_size) + matrix(s.hidden_size, s.intermediate_size);
  return layer * static_cast<double>(s.num_layers) +
         (logits ? matrix(s.vocab_size, s.hidden_size) : 0);
}

CudaDecoderOptions options_for(const CudaDecoderShape& s, std::int64_t batch, std::int64_t window,
                               std::int64_t chunk, std::vector<double>& frequencies) {
  frequencies.clear();
  for (int i = 0; i < s.head_dim / 2; ++i)
    frequencies.push_back(std::pow(500000.0, -2.0 * i / static_cast<double>(s.head_dim)));
  CudaDecoderOptions options;
  options.step = {.num_sink_tokens = 4,
                  .window_size = window - 4,
                  .capacity = window + std::max<std::int64_t>(chunk - 1, 0),
                  .batch_size = batch,
                  .frequencies = frequencies};
  options.max_chunk = chunk;
  return options;
}

/// Of keys and values, their scales included.
template <class Cache>
double cache_bytes(const CudaDecoderShape& s, std::int64_t rows) {
  const std::int64_t row =
      s.head_dim * static_cast<std::int64_t>(sizeof(Cache)) + (CudaCode<Cache> ? 4 : 0);
  return static_cast<double>(rows) * static_cast<double>(2 * s.num_layers * s.num_kv_heads * row);
}

/// Codes that are numbers, of any type.
__global__ void fill_codes(std::uint8_t* codes, std::int64_t count) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t z = (static_cast<std::uint64_t>(i) + 77) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    const auto code = static_cast<std::uint8_t>(z >> 40);
    codes[i] = static_cast<std::uint8_t>((code & 0x7f) == 0x7f ? code ^ 1 : code);  // of fp8: NaN
  }
}
__global__ void fill_scales(float* scales, std::int64_t count, float scale) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride)
    scales[i] = scale;
}

/// Rows of about 1 in all slots.
template <class Cache>
void fill_cache(Model<Cache>& model) {
  model.fill_cache([]<class T>(T* data, std::size_t size) {
    const auto count = static_cast<std::int64_t>(size);
    if constexpr (std::is_same_v<T, float>)
      fill_scales<<<1024, 256>>>(data, count, std::is_same_v<Cache, std::int8_t> ? 0.013F : 0.01F);
    else if constexpr (CudaCode<T>)
      fill_codes<<<1024, 256>>>(reinterpret_cast<std::uint8_t*>(data), count);
    else
      fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(data), count, 77);
  });
}

/// Whether there is memory for that many sessions. Says so where there is not.
template <class Cache>
bool fits(const Geometry& g, ElementType type, std::int64_t batch, std::int64_t entries) {
  std::size_t free = 0;
  std::size_t all = 0;
  check_cuda(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
  const CudaDecoderShape& s = g.shape;
  const double rows = static_cast<double>(
      batch * (4 * s.fused_size() + 4 * s.vocab_size + 8 * s.intermediate_size +
               6 * std::max({s.hidden_size, s.query_size(), s.intermediate_size})));
  // Beside the rows: widened weights, and what cuBLASLt works with.
  const double needed = cache_bytes<Cache>(s, batch * entries) + rows + 256e6;
  if (needed <= static_cast<double>(free)) return true;
  std::fprintf(stderr,
               "decoder_bench: %s, %s weights, %lld sessions x %lld entries in %s: needs %.2f GB, "
               "%.2f GB are free; left out\n",
               g.name, name_of(type), static_cast<long long>(batch),
               static_cast<long long>(entries), kCacheName<Cache>, needed * 1e-9,
               static_cast<double>(free) * 1e-9);
  return false;
}

/// Sessions whose caches are full of random rows.
template <class Cache>
void measure_step(const Geometry& g, const Weights& weights, ElementType type, std::int64_t batch,
                  std::int64_t entries, bool overlap, double ceiling, bool few_rows = true) {
  if (!fits<Cache>(g, type, batch, entries)) return;
  std::vector<double> frequencies;
  CudaDecoderOptions options = options_for(g.shape, batch, entries, 0, frequencies);
  options.overlap = overlap;
  options.few_rows = few_rows;
  Model<Cache> model(weights, options);
  fill_cache<Cache>(model);
  model.set_totals(std::vector<std::int64_t>(static_cast<std::size_t>(batch), 1000000));
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch));
  for (std::size_t b = 0; b < tokens.size(); ++b) tokens[b] = static_cast<std::int32_t>(17 * b + 1);
  model.feed(tokens);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  model.step(nullptr);  // products choose their algorithms outside the capture
  double spread = 0;
  const double us =
      time_graph([&](cudaStream_t stream) { model.step(stream); }, batch > 8 ? 3 : 8, 9, &spread);
  const double bytes = weight_bytes(g.shape, type) + cache_bytes<Cache>(g.shape, batch * entries);
  std::printf(
      "{\"bench\": \"decoder_step\", \"model\": \"%s\", \"type\": \"%s\", \"cache\": \"%s\", "
      "\"sessions\": %lld, "
      "\"entries\": %lld, \"overlap\": %s, \"few_rows\": %s, \"ms\": %.4f, \"spread_ms\": %.4f, "
      "\"tokens_per_s\": "
      "%.1f, \"gbytes\": %.3f, \"tb_per_s\": %.3f, \"of_read_ceiling\": %.3f, "
      "\"cache_mbytes_per_session\": %.1f}\n",
      g.name, name_of(type), kCacheName<Cache>, static_cast<long long>(batch),
      static_cast<long long>(entries), overlap ? "true" : "false", few_rows ? "true" : "false",
      us * 1e-3, spread * 1e-3, static_cast<double>(batch) / us * 1e6, bytes * 1e-9,
      bytes / us * 1e-6, bytes / us * 1e-6 / ceiling,
      static_cast<double>(model.cache_bytes()) / static_cast<double>(batch) * 1e-6);
  std::fflush(stdout);
}

/// A chunk of a few tokens onto a full cache: its layers, no logits.
template <class Cache>
void measure_chunk(const Geometry& g, const Weights& weights, ElementType type, std::int64_t length,
                   std::int64_t entries, double ceiling, bool few_rows) {
  std::vector<double> frequencies;
  CudaDecoderOptions options = options_for(g.shape, 1, entries, length, frequencies);
  options.few_rows = few_rows;
  Model<Cache> model(weights, options);
  fill_cache<Cache>(model);
  std::vector<std::int32_t> content(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < content.size(); ++i)
    content[i] = static_cast<std::int32_t>(17 * i + 1);
  const Buffer<std::int32_t, cuda> tokens{std::span<const std::int32_t>(content)};
  const auto read = [&](cudaStream_t stream) {
    model.append_chunk(0, 1000000, tokens.data(), length, stream);
  };
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  read(nullptr);  // products choose their algorithms outside the capture
  double spread = 0;
  const double us = time_graph(read, 8, 9, &spread);
  const double bytes = weight_bytes(g.shape, type, false) + cache_bytes<Cache>(g.shape, entries);
  std::printf(
      "{\"bench\": \"decoder_chunk\", \"model\": \"%s\", \"type\": \"%s\", \"cache\": \"%s\", "
      "\"tokens\": %lld, "
      "\"entries\": %lld, \"few_rows\": %s, \"ms\": %.4f, \"spread_ms\": %.4f, \"tokens_per_s\": "
      "%.1f, \"gbytes\": %.3f, \"tb_per_s\": %.3f, \"of_read_ceiling\": %.3f}\n",
      g.name, name_of(type), kCacheName<Cache>, static_cast<long long>(length),
      static_cast<long long>(entries), few_rows ? "true" : "false", us * 1e-3, spread * 1e-3,
      static_cast<double>(length) / us * 1e6, bytes * 1e-9, bytes / us * 1e-6,
      bytes / us * 1e-6 / ceiling);
  std::fflush(stdout);
}

/// Each product of a step alone, over all layers.
void measure_parts(const Geometry& g, const Weights& weights, bool overlap) {
  using enum VectorEpilogue;
  const CudaDecoderShape& s = g.shape;
  const MatrixVectorPlan<bf16> plan(overlap);
  Buffer<float, cuda> x(static_cast<std::size_t>(std::max(s.intermediate_size, s.hidden_size)));
  Buffer<float, cuda> y(static_cast<std::size_t>(std::max(2 * s.intermediate_size, s.vocab_size)));
  Buffer<TokenCandidate, cuda> candidates(static_cast<std::size_t>(plan.blocks()));
  const std::vector<float> ones(x.size(), 1.0F);
  x.upload(ones);
  struct Part {
    const char* name;
    VectorEpilogue epilogue;
    std::int64_t rows;
    std::int64_t cols;
    bool norm;
  };
  for (const Part& part :
       {Part{"query_key_value", kStore, s.fused_size(), s.hidden_size, true},
        Part{"output", kAdd, s.hidden_size, s.query_size(), false},
        Part{"gate_up", kGatedSilu, 2 * s.intermediate_size, s.hidden_size, true},
        Part{"down", kAdd, s.hidden_size, s.intermediate_size, false},
        Part{"logits", kChoose, s.vocab_size, s.hidden_size, true}}) {
    const bool logits = part.epilogue == kChoose;
    const std::int64_t launches = logits ? 4 : s.num_layers;
    double spread = 0;
    const double us = time_graph(
                          [&](cudaStream_t stream) {
                            for (std::int64_t l = 0; l < launches; ++l) {
                              const auto& w = weights.layers[static_cast<std::size_t>(l)];
                              MatrixVectorTask<bf16> task;
                              task.matrix = std::strcmp(part.name, "output") == 0 ? w.output.data()
                                            : std::strcmp(part.name, "down") == 0 ? w.down.data()
                                            : std::strcmp(part.name, "gate_up") == 0
                                                ? w.gate_up.data()
                                            : logits ? weights.output.data()
                                                     : w.query_key_value.data();
                              task.rows = part.rows;
                              task.cols = part.cols;
                              task.x = x.data();
                              task.norm = part.norm ? w.attention_norm.data() : nullptr;
                              task.norm_eps = 1e-5F;
                              task.y = y.data();
                              task.candidates = candidates.data();
                              plan.launch(task, part.epilogue, stream);
                            }
                          },
                          8, 9, &spread) /
                      static_cast<double>(launches);
    const double bytes = 2 * static_cast<double>(part.rows * part.cols);
    std::printf(
        "{\"bench\": \"matrix_vector\", \"model\": \"%s\", \"part\": \"%s\", \"rows\": %lld, "
        "\"cols\": %lld, \"overlap\": %s, \"us\": %.3f, \"tb_per_s\": %.3f}\n",
        g.name, part.name, static_cast<long long>(part.rows), static_cast<long long>(part.cols),
        overlap ? "true" : "false", us, bytes / us * 1e-6);
    std::fflush(stdout);
  }
}

/// A prompt read in chunks.
template <class Cache>
void measure_prefill(const Geometry& g, const Weights& weights, ElementType type,
                     std::int64_t prompt, std::int64_t window, std::int64_t chunk) {
  std::vector<double> frequencies;
  Model<Cache> model(weights, options_for(g.shape, 1, window + 4, chunk, frequencies));
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(prompt));
  for (std::size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<std::int32_t>(i * 7919 % static_cast<std::size_t>(g.shape.vocab_size));
  double best = 0;
  for (int trial = 0; trial < 4; ++trial) {
    model.set_totals(std::vector<std::int64_t>{0});
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    check_cuda(cudaEventRecord(begin), "cudaEventRecord");
    model.prefill(0, tokens);
    check_cuda(cudaEventRecord(end), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    best = trial == 0 ? 1e30 : std::min(best, static_cast<double>(ms));
    check_cuda(cudaEventDestroy(begin), "cudaEventDestroy");
    check_cuda(cudaEventDestroy(end), "cudaEventDestroy");
  }
  std::printf(
      "{\"bench\": \"decoder_prefill\", \"model\": \"%s\", \"type\": \"%s\", \"cache\": \"%s\", "
      "\"prompt\": %lld, "
      "\"window\": %lld, "
      "\"chunk\": %lld, \"ms\": %.2f, \"tokens_per_s\": %.0f}\n",
      g.name, name_of(type), kCacheName<Cache>, static_cast<long long>(prompt),
      static_cast<long long>(window), static_cast<long long>(chunk), best,
      static_cast<double>(prompt) / best * 1e3);
  std::fflush(stdout);
}

__global__ void stamp(std::uint64_t* times, const std::int64_t* total, std::int64_t count) {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  times[*total % count] = now;
}

/// `tokens` tokens of one stream through 4 + 1,020 entries, by nothing but replays; every step's
/// time by the device's clock.
void measure_endless(std::int64_t tokens) {
  const CudaDecoderShape shape{49152, 576, 1536, 9, 3, 64, 30, 1e-5, 0.125};
  const std::unique_ptr<Weights> weights = random_weights(shape);
  std::vector<double> frequencies;
  CudaDecoderOptions options = options_for(shape, 1, 1024, 0, frequencies);
  options.choice = {.temperature = 1, .seed = 1};
  CudaDecoder<bf16, 64> model(*weights, options);
  model.feed(std::vector<std::int32_t>{1});
  Buffer<std::uint64_t, cuda> times(static_cast<std::size_t>(tokens));
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  stamp<<<1, 1, 0, stream>>>(times.data(), model.state().totals_data(), tokens);
  model.step(stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  std::size_t before = 0;
  std::size_t after = 0;
  std::size_t all = 0;
  for (std::int64_t i = 0; i < tokens; ++i) {
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    if (i == 2000) {
      check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      check_cuda(cudaMemGetInfo(&before, &all), "cudaMemGetInfo");
    }
  }
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  check_cuda(cudaMemGetInfo(&after, &all), "cudaMemGetInfo");
  const std::vector<std::uint64_t> stamps = times.download(stream);
  std::vector<double> steps;
  for (std::size_t i = 2002; i < stamps.size(); ++i)
    steps.push_back(static_cast<double>(stamps[i] - stamps[i - 1]) * 1e-3);
  const auto quantile = [](std::vector<double> x, double q) {
    std::sort(x.begin(), x.end());
    return x[static_cast<std::size_t>(q * static_cast<double>(x.size() - 1))];
  };
  const auto tenth = static_cast<std::ptrdiff_t>(steps.size() / 10);
  std::printf(
      "{\"bench\": \"decoder_endless\", \"model\": \"smollm2-135m\", \"type\": \"bf16\", "
      "\"tokens\": %lld, \"entries\": 1024, \"median_us\": %.2f, \"p99_9_us\": %.2f, "
      "\"max_us\": %.2f, \"first_tenth_median_us\": %.2f, \"last_tenth_median_us\": %.2f, "
      "\"memory_growth_bytes\": %lld}\n",
      static_cast<long long>(tokens), quantile(steps, 0.5), quantile(steps, 0.999),
      quantile(steps, 1), quantile({steps.begin(), steps.begin() + tenth}, 0.5),
      quantile({steps.end() - tenth, steps.end()}, 0.5),
      static_cast<long long>(before) - static_cast<long long>(after));
  std::fflush(stdout);
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
}

}  // namespace

int main(int count, char** arguments) {
  bool parts = false;
  bool before = false;
  std::string only;
  std::vector<ElementType> types;
  std::vector<std::string> caches;
  std::int64_t tokens = 1000000;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--parts") == 0) {
      parts = true;
    } else if (std::strcmp(arguments[i], "--before") == 0) {
      before = true;
    } else if (std::strcmp(arguments[i], "--case") == 0 && i + 1 < count) {
      only = arguments[++i];
    } else if (std::strcmp(arguments[i], "--weights") == 0 && i + 1 < count &&
               type_of(arguments[i + 1]) != ElementType::kF32) {
      types.push_back(type_of(arguments[++i]));
    } else if (std::strcmp(arguments[i], "--cache") == 0 && i + 1 < count &&
               std::find(std::begin(kCacheNames), std::end(kCacheNames),
                         std::string(arguments[i + 1])) != std::end(kCacheNames)) {
      caches.push_back(arguments[++i]);
    } else if (std::strcmp(arguments[i], "--tokens") == 0 && i + 1 < count) {
      tokens = std::max(10000LL, std::atoll(arguments[++i]));
    } else {
      std::fprintf(stderr,
                   "usage: decoder_bench [--case step|sessions|chunks|prefill|endless|curve] "
                   "[--weights bf16|q8_0|q6_k|q4_0|q4_1|q4_k]... [--cache bf16|int8|fp8]... "
                   "[--parts] [--before] [--tokens N]\n");
      return 2;
    }
  }
  if (types.empty()) types.push_back(ElementType::kBF16);
  if (caches.empty()) caches.push_back("bf16");
  const auto wanted = [&](const char* name) {
    return only.empty() || only == name;
  };
  try {
    const double ceiling = measure_machine();
    if (wanted("endless")) measure_endless(tokens);
    if (only == "endless") return 0;
    if (only == "curve") {
      const Geometry g = llama_2_7b();
      const std::unique_ptr<Weights> weights = random_weights(g.shape);
      for (std::int64_t entries = 256; entries <= 16384; entries *= 2)
        measure_step<bf16>(g, *weights, ElementType::kBF16, 1, entries, true, ceiling);
      return 0;
    }
    for (const Geometry& g : {llama_2_7b(), llama_3_8b()})
      for (const ElementType type : types) {
        const std::unique_ptr<Weights> weights = random_weights(g.shape, type);
        const bool small = g.shape.num_kv_heads == g.shape.num_qo_heads;
        if (parts && type == ElementType::kBF16)
          for (const bool overlap : {false, true}) measure_parts(g, *weights, overlap);
        for (const std::string& cache : caches)
          with_cache(cache, [&]<class Cache>(Cache) {
            if (wanted("step"))
              for (const std::int64_t entries : small
                                                    ? std::vector<std::int64_t>{256, 1024, 4096}
                                                    : std::vector<std::int64_t>{1024, 4096, 32768})
                for (const bool overlap : {false, true})
                  measure_step<Cache>(g, *weights, type, 1, entries, overlap, ceiling);
            if (wanted("sessions"))
              for (const std::int64_t sessions :
                   small ? std::vector<std::int64_t>{1, 2, 4, 8, 64, 112, 240, 256}
                         : std::vector<std::int64_t>{1, 2, 4, 8, 64, 256})
                for (const bool few_rows : {true, false})
                  if (few_rows || (before && sessions > 1 && sessions <= 8))
                    measure_step<Cache>(g, *weights, type, sessions, 1024, true, ceiling, few_rows);
            if (wanted("chunks"))
              for (const std::int64_t length : {1, 2, 4, 8, 16})
                for (const std::int64_t entries : {1024, 4096})
                  for (const bool few_rows : {true, false})
                    if (few_rows || (before && length <= 8))
                      measure_chunk<Cache>(g, *weights, type, length, entries, ceiling, few_rows);
            if (wanted("prefill")) {
              measure_prefill<Cache>(g, *weights, type, 4096, 1024, 1024);
              measure_prefill<Cache>(g, *weights, type, 32768, 4096, 2048);
              // Nothing leaves the window here: what other programs do (decoder_llama_cpp.py).
              measure_prefill<Cache>(g, *weights, type, 4096, 4096, 2048);
            }
          });
      }
  } catch (const Error& error) {
    std::fprintf(stderr, "decoder_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
