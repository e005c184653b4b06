// SPDX-License-Identifier: MIT
/// Reading on one CUDA stream while writing on another, against both in turns on one: whole runs,
/// random weights. The target's steps are as many as take the time that reading takes alone
/// (r near 1). One JSON object a line.
///
/// usage: duplex_bench [--model 1b|7b] [--chunk N]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <sluice/backend/cuda/duplex.cuh>

#include "cuda/measure.cuh"
#include "cuda/random_weights.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;

constexpr std::int64_t kSourceTokens = 4096;

/// Milliseconds of a run, the median of some.
template <class Pair>
double time_run(Pair& pair, const std::vector<std::int32_t>& source, std::int64_t steps,
                DuplexStreams streams, int trials = 3) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  for (int trial = 0; trial < trials; ++trial) {
    pair.begin(source, 7);
    check_cuda(cudaEventRecord(begin, pair.writer()), "cudaEventRecord");
    pair.submit(steps, streams);
    check_cuda(cudaEventRecord(end, pair.writer()), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(static_cast<double>(milliseconds));
  }
  check_cuda(cudaEventDestroy(begin), "destroy");
  check_cuda(cudaEventDestroy(end), "destroy");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <int kHeadDim>
void measure(const char* name, const CudaDecoderShape& shape, std::int64_t chunk) {
  const auto weights = random_weights(shape);
  std::vector<double> frequencies;
  for (int i = 0; i < kHeadDim / 2; ++i)
    frequencies.push_back(std::pow(500000.0, -2.0 * i / kHeadDim));
  CudaDuplexOptions options;
  options.source.step = {.capacity = kSourceTokens, .frequencies = frequencies};
  options.source.max_chunk = chunk;
  options.target.step = {
      .num_sink_tokens = 4, .window_size = 1020, .capacity = 1024, .frequencies = frequencies};
  options.target.history_size = 8;
  options.policy = {chunk, 0, 1};
  std::vector<std::int32_t> source;
  for (std::int64_t i = 0; i < kSourceTokens; ++i)
    source.push_back(static_cast<std::int32_t>((i * 7919) % shape.vocab_size));

  // What either side takes alone.
  double reading = 0;
  double step = 0;
  {
    CudaDuplex<bf16, kHeadDim> pair(*weights, options);
    time_run(pair, source, 8, DuplexStreams::kOne, 1);  // algorithms are chosen
    reading = time_run(pair, source, 0, DuplexStreams::kOne);
    step = (time_run(pair, source, 64, DuplexStreams::kOne) - reading) / 64;
  }
  const auto steps = static_cast<std::int64_t>(reading / step);
  options.policy.read =
      std::max<std::int64_t>(1, (kSourceTokens - chunk) / std::max<std::int64_t>(steps, 1));
  double one = 0;
  for (const int multiprocessors : {0, 66}) {  // of the target's products; 0: all
    options.target.vector_multiprocessors = multiprocessors;
    CudaDuplex<bf16, kHeadDim> pair(*weights, options);
    time_run(pair, source, 8, DuplexStreams::kTwo, 1);
    const double in_turns = time_run(pair, source, steps, DuplexStreams::kOne, 3);
    if (multiprocessors == 0) one = in_turns;  // in turns, either side has the whole machine
    const std::vector<std::int32_t> text_of_one = pair.target().history();
    const double two = time_run(pair, source, steps, DuplexStreams::kTwo);
    const bool same = pair.target().history() == text_of_one;
    const double writing = one - reading;
    std::printf(
        "{\"bench\": \"duplex_cuda\", \"model\": \"%s\", \"source_tokens\": %lld, \"chunk\": %lld, "
        "\"vector_multiprocessors\": %d, \"steps\": %lld, \"reading_ms\": %.3f, "
        "\"writing_ms\": %.3f, \"r\": %.3f, \"one_stream_ms\": %.3f, \"two_streams_ms\": %.3f, "
        "\"speed_up\": %.3f, \"overlap_efficiency\": %.3f, \"same_text\": %s}\n",
        name, static_cast<long long>(kSourceTokens), static_cast<long long>(chunk), multiprocessors,
        static_cast<long long>(steps), reading, writing, reading / writing, one, two, one / two,
        (one - two) / std::min(reading, writing), same ? "true" : "false");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::string only;
  std::int64_t chunk = 0;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--model") == 0 && i + 1 < count) {
      only = arguments[++i];
    } else if (std::strcmp(arguments[i], "--chunk") == 0 && i + 1 < count) {
      chunk = std::atoll(arguments[++i]);
    } else {
      std::fprintf(stderr, "usage: duplex_bench [--model 1b|7b] [--chunk N]\n");
      return 2;
    }
  }
  try {
    for (const std::int64_t length : {256, 1024}) {
      if (chunk != 0 && chunk != length) continue;
      if (only.empty() || only == "1b")  // Llama 3.2 1B
        measure<64>("llama-3.2-1b", {128256, 2048, 8192, 32, 8, 64, 16, 1e-5, 1 / std::sqrt(64.0)},
                    length);
      if (only.empty() || only == "7b")  // Llama 2 7B
        measure<128>("llama-2-7b",
                     {32000, 4096, 11008, 32, 32, 128, 32, 1e-5, 1 / std::sqrt(128.0)}, length);
    }
  } catch (const Error& error) {
    std::fprintf(stderr, "duplex_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
