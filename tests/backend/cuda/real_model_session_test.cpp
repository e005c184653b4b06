// SPDX-License-Identifier: MIT
/// The default model as its file has it, quantised, in sessions on CPU and GPU. Skips without the
/// file.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/element.hpp>
#include <sluice/io/gguf.hpp>
#include <sluice/model/load_gguf.hpp>
#include <sluice/nn/quantised_blocks.hpp>
#include <sluice/stream/session.hpp>

#include "backend/cuda/random_decoder.hpp"
#include "backend/cuda/real_model_oracle.hpp"

namespace {

using namespace sluice;
using host_test::copy;
using host_test::margin_of;
using host_test::norm_of;
using host_test::relative_error;

constexpr int kText = 256;

/// "The history of the steam engine begins long before the railways. In the first century,"
constexpr std::array<Token, 17> kPrompt{504, 1463,  282, 260, 9403, 2327, 5634, 986, 1092,
                                        260, 33214, 30,  533, 260,  808,  2070, 28};

/// The same decoder with its embeddings rounded to bf16, as the GPU looks them up.
class RoundedEmbedding {
 public:
  explicit RoundedEmbedding(std::shared_ptr<const Decoder> file) : file_(std::move(file)) {
    DecoderWeights weights = file_->weights();
    const WeightMatrix& from = weights.embedding;
    std::vector<float> row(static_cast<std::size_t>(from.cols));
    embedding_.reserve(static_cast<std::size_t>(from.rows * from.cols));
    for (std::int64_t r = 0; r < from.rows; ++r) {
      dequantise(from.type, from.row(r), from.cols, row.data());
      for (const float value : row) embedding_.push_back(bf16(value));
    }
    weights.embedding = {ElementType::kBF16, embedding_.data(), from.rows, from.cols};
    decoder_ = std::make_shared<const Decoder>(file_->config(), std::move(weights));
  }

  const std::shared_ptr<const Decoder>& decoder() const { return decoder_; }

 private:
  std::shared_ptr<const Decoder> file_;  // what the other matrices point into
  std::vector<bf16> embedding_;
  std::shared_ptr<const Decoder> decoder_;
};

SessionOptions options_of(std::int64_t chunk) {
  SessionOptions options;
  options.cache.num_sink_tokens = 4;
  options.cache.window_size = 124;
  options.cache.chunk_size = chunk;
  options.activations = Activations::kFloat32;
  return options;
}

/// The cache wraps twice on the way: 272 tokens through 128 slots.
TEST(RealModel, WritesTheSameTextWithTheFilesWeights) {
  SKIP_WITHOUT_DEVICE();
  const std::string path = sluice_test::real_model_path();
  if (path.empty()) GTEST_SKIP() << "no model file";
  const std::shared_ptr<const Decoder> file = load_decoder(std::make_shared<const GgufFile>(path));
  const auto placed = std::make_shared<const CudaModel<bf16>>(file);
  const RoundedEmbedding rounded(file);

  Session<bf16> expected(rounded.decoder(), options_of(1));
  Session<float> exact(rounded.decoder(), options_of(1));
  CudaSession<bf16> found(placed, options_of(1));
  std::vector<Token> text(kPrompt.begin(), kPrompt.end());
  expected.accept(text);
  exact.accept(text);
  found.accept(text);
  double worst = 0;
  double rounding = 0;
  int parted = 0;
  for (int i = 0; i < kText; ++i) {
    const std::vector<float> logits = copy(expected.logits());
    const double error = relative_error(copy(found.logits()), logits);
    ASSERT_TRUE(std::isfinite(error)) << "token " << i;  // a maximum would pass NaN over
    worst = std::max(worst, error);
    rounding = std::max(rounding, relative_error(copy(exact.logits()), logits));
    const Token token = expected.step().value();
    text.push_back(token);
    exact.accept(std::array{token});
    if (found.step() == token) continue;
    // Where two tokens are nearer than the bound either may be the greater.
    EXPECT_LT(margin_of(logits), 2 * error * norm_of(logits)) << "token " << i;
    ++parted;
    found.reset();
    found.accept(text);
  }
  // Float32 on both sides, in another order: each cache's roundings are its own, and take its stream
  // off the exact one by about `rounding` (real_model_test.cu says how that comes). The two are
  // apart by the sum of both at most.
  EXPECT_LE(worst, 2 * rounding);
  EXPECT_LE(rounding, 0.05);
  EXPECT_EQ(parted, 0);

  // The prompt read as one chunk. Weights and inputs of a layer's four products and of the last are
  // rounded, by 2^-9 at most each, in directions that do not agree: the square root of their
  // number.
  CudaSession<bf16> reader(placed, options_of(32));
  Session<bf16> again(rounded.decoder(), options_of(1));
  reader.accept(kPrompt);
  again.accept(kPrompt);
  const double chunked = relative_error(copy(reader.logits()), copy(again.logits()));
  const auto products = static_cast<double>(4 * file->config().num_layers() + 1);
  EXPECT_LE(chunked, std::sqrt(2 * products) * 0x1p-9);
  std::printf(
      "relative error of logits: stepping %.2e, prompt in a chunk %.2e; a bf16 cache %.2e\n", worst,
      chunked, rounding);
  std::printf("%zu bytes of weights on the device\n", placed->bytes());
}

}  // namespace
