// SPDX-License-Identifier: MIT
/// What rounding costs: perplexity of one text with the products of each kind (Activations), beside
/// the same weights converted to float32, which are multiplied with float32 activations. One JSON
/// object a line. The kernels are those that the environment variable SLUICE_KERNEL_TARGET names in
/// a program that holds several.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cpu/kernel_table.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/likelihood.hpp"

namespace {

using namespace sluice;

constexpr const char* kHelp =
    "usage: perplexity_bench MODEL TEXT [TOKENS=20000] [THREADS=2] [ACTIVATIONS...]\n"
    "reads TOKENS tokens through 4 sinks + 1,020 keys of f16, first with the weights widened to\n"
    "float32, then with each of ACTIVATIONS (f32, bf16, int8; all of them unless named; onednn:\n"
    "int8 where chunks go through oneDNN, in a build with SLUICE_ONEDNN); JSON lines on stdout\n";

/// The same model with every matrix in float32.
std::shared_ptr<const Decoder> dequantised(const Decoder& model) {
  auto storage = std::make_shared<std::vector<Buffer<float>>>();
  const auto convert = [&](const WeightMatrix& matrix) {
    storage->emplace_back(static_cast<std::size_t>(matrix.rows * matrix.cols));
    float* const values = storage->back().data();
    for (std::int64_t r = 0; r < matrix.rows; ++r)
      dequantise(matrix.type, matrix.row(r), matrix.cols, values + r * matrix.cols);
    return WeightMatrix::of(values, matrix.rows, matrix.cols);
  };
  DecoderWeights weights = model.weights();
  const bool tied = weights.output.data == weights.embedding.data;
  weights.embedding = convert(weights.embedding);
  weights.output = tied ? weights.embedding : convert(weights.output);
  for (DecoderLayerWeights& layer : weights.layers)
    for (WeightMatrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate,
                                 &layer.up, &layer.down})
      *matrix = convert(*matrix);
  weights.storage = storage;
  return std::make_shared<const Decoder>(model.config(), std::move(weights));
}

/// Mean negative log-likelihood in nats of tokens[1 ...].
double mean_loss(const Decoder& model, std::span<const Token> tokens, Activations activations,
                 OneDnn onednn, int threads) {
  constexpr std::int64_t kChunk = 256;
  CacheOptions options;
  options.policy = CachePolicy::kSinkWindow;
  options.num_sink_tokens = 4;
  options.window_size = 1020;
  options.chunk_size = kChunk;
  KvCache<f16> cache = model.make_cache<f16>(plan_cache(model.config(), options));
  DecoderWorkspace workspace(model, kChunk, 4 + 1020 + kChunk, threads,
                             DecoderWorkspace::kDefaultSegments, activations, onednn);
  ThreadTeam team(threads);
  const std::int64_t vocab = model.config().vocab_size;
  Buffer<float> logits(static_cast<std::size_t>(kChunk * vocab));
  const auto count = static_cast<std::int64_t>(tokens.size());
  double loss = 0;
  for (std::int64_t first = 0; first < count - 1; first += kChunk) {
    const std::int64_t size = std::min(kChunk, count - 1 - first);
    model.forward(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(size)),
                  cache, workspace, team);
    cache.commit();
    model.logits(0, MatrixView<float>(logits.data(), size, vocab), workspace, team);
    for (std::int64_t t = 0; t < size; ++t)
      loss += negative_log_likelihood({logits.data() + t * vocab, static_cast<std::size_t>(vocab)},
                                      tokens[static_cast<std::size_t>(first + t + 1)]);
  }
  return loss / static_cast<double>(count - 1);
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && arguments[0] == "--benchmark_list_tests") {
    std::cout << "perplexity\n";
    return 0;
  }
  if (arguments.size() < 2) {
    std::cerr << kHelp;
    return arguments.empty() || arguments[0] == "--help" ? 0 : 2;
  }
  const LoadedModel model = load_model(arguments[0]);
  std::ifstream file(arguments[1], std::ios::binary);
  if (!file) throw std::invalid_argument("cannot open '" + arguments[1] + "'");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const std::int64_t wanted = arguments.size() > 2 ? std::atoll(arguments[2].c_str()) : 20000;
  const int threads = arguments.size() > 3 ? std::atoi(arguments[3].c_str()) : 2;
  std::vector<Token> tokens = model.tokenizer->encode(text);
  if (static_cast<std::int64_t>(tokens.size()) < wanted || wanted < 2)
    throw std::invalid_argument("the text has " + std::to_string(tokens.size()) + " tokens");
  tokens.resize(static_cast<std::size_t>(wanted));
  const std::span<const std::string> named =
      std::span<const std::string>(arguments).subspan(std::min<std::size_t>(4, arguments.size()));
  constexpr Activations kKinds[] = {Activations::kFloat32, Activations::kBf16, Activations::kInt8};
  for (const std::string& name : named)
    if (name != "onednn" &&
        std::ranges::none_of(kKinds, [&](Activations a) { return to_string(a) == name; }))
      throw std::invalid_argument("'" + name + "' is no form of activations");

  double exact = 0;
  const auto measure = [&](const Decoder& decoder, const std::string& name, Activations activations,
                           OneDnn onednn = OneDnn::kNever) {
    const std::int64_t begin = monotonic_ns();
    const double loss = mean_loss(decoder, tokens, activations, onednn, threads);
    const double seconds = static_cast<double>(monotonic_ns() - begin) * 1e-9;
    if (exact == 0) exact = loss;
    std::cout << "{\"products\": \"" << name << "\", \"kernels\": \"" << kernel_target()
              << "\", \"tokens\": " << wanted << ", \"perplexity\": " << std::exp(loss)
              << ", \"more_than_float32_percent\": " << 100 * std::expm1(loss - exact)
              << ", \"seconds\": " << seconds << "}" << std::endl;
  };
  measure(*dequantised(*model.decoder), "float32 weights", Activations::kFloat32);
  for (const Activations activations : kKinds)
    if (named.empty() || std::ranges::find(named, to_string(activations)) != named.end())
      measure(*model.decoder, std::string(to_string(activations)), activations);
  if (std::ranges::find(named, "onednn") != named.end())
    measure(*model.decoder, "onednn", Activations::kInt8, OneDnn::kAlways);
} catch (const std::exception& error) {
  std::cerr << "perplexity_bench: " << error.what() << "\n";
  return 2;
}
