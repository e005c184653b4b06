// SPDX-License-Identifier: MIT
#include "backend/cuda/real_model_oracle.hpp"

#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include <sluice/core/element.hpp>
#include <sluice/core/error.hpp>
#include <sluice/io/gguf.hpp>
#include <sluice/model/load_gguf.hpp>
#include <sluice/nn/quantised_blocks.hpp>
#include <sluice/position/rotary.hpp>
#include <sluice/stream/session.hpp>

namespace sluice_test {

using namespace sluice;

namespace {

std::vector<std::uint16_t> rounded(const WeightMatrix& matrix) {
  std::vector<float> values(static_cast<std::size_t>(matrix.rows * matrix.cols));
  dequantise(matrix.type, matrix.data, matrix.rows * matrix.cols, values.data());
  std::vector<std::uint16_t> bits;
  bits.reserve(values.size());
  for (const float v : values) bits.push_back(bf16(v).bits);
  return bits;
}

}  // namespace

std::string real_model_path() {
  std::filesystem::path path;
  if (const char* file = std::getenv("SLUICE_MODEL")) {
    path = file;
  } else {
    const char* cache = std::getenv("XDG_CACHE_HOME");
    const char* home = std::getenv("HOME");
    if (cache == nullptr && home == nullptr) return "";
    path = cache != nullptr ? std::filesystem::path(cache) : std::filesystem::path(home) / ".cache";
    path = path / "sluice" / "SmolLM2-135M-Instruct.Q4_1.gguf";
  }
  std::error_code error;
  return std::filesystem::exists(path, error) ? path.string() : "";
}

RealModel load_real_model(const std::string& path) {
  const auto decoder = load_decoder(std::make_shared<const GgufFile>(path));
  const DecoderConfig& c = decoder->config();
  if (c.family != "llama" || c.rotaries.size() != 1)
    throw Error(ErrorCode::kUnsupported,
                {"model", path, "general.architecture", "llama", c.family});
  const DecoderWeights& w = decoder->weights();
  RealModel model{};
  model.vocab_size = c.vocab_size;
  model.hidden_size = c.hidden_size;
  model.intermediate_size = c.intermediate_size;
  model.num_qo_heads = c.num_qo_heads;
  model.num_kv_heads = c.num_kv_heads;
  model.head_dim = c.head_dim;
  model.norm_eps = c.norm_eps;
  model.sm_scale = c.sm_scale;
  const Rotary rotary(c.rotaries[0]);
  for (int i = 0; i < rotary.num_pairs(); ++i) model.frequencies.push_back(rotary.frequency(i));
  model.interleaved = c.rotaries[0].pairing == RotaryPairing::kInterleaved;
  model.embedding = rounded(w.embedding);
  model.output = rounded(w.output);
  model.output_norm = w.output_norm;
  for (const DecoderLayerWeights& layer : w.layers)
    model.layers.push_back({layer.attention_norm, layer.feed_forward_norm, rounded(layer.query),
                            rounded(layer.key), rounded(layer.value), rounded(layer.output),
                            rounded(layer.gate), rounded(layer.up), rounded(layer.down)});
  return model;
}

struct RealStream::State {
  std::shared_ptr<const Decoder> decoder;
  std::unique_ptr<Session<bf16>> session;
  std::unique_ptr<Session<float>> exact;
};

RealStream::RealStream(const RealModel& m, std::int64_t sinks, std::int64_t window, int threads,
                       bool rounded_cache)
    : state_(new State) {
  DecoderConfig c;
  c.family = "llama";
  c.vocab_size = m.vocab_size;
  c.hidden_size = m.hidden_size;
  c.intermediate_size = m.intermediate_size;
  c.num_qo_heads = m.num_qo_heads;
  c.num_kv_heads = m.num_kv_heads;
  c.head_dim = m.head_dim;
  c.norm_eps = m.norm_eps;
  c.sm_scale = m.sm_scale;
  RotaryConfig rotary{.head_dim = static_cast<int>(m.head_dim),
                      .rotary_dim = static_cast<int>(2 * m.frequencies.size())};
  // Frequencies are theta^(-2 i / rotary_dim): the second one tells theta.
  rotary.theta = std::pow(m.frequencies[1], -static_cast<double>(m.frequencies.size()));
  rotary.pairing = m.interleaved ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit;
  c.rotaries.push_back(rotary);
  c.layers.resize(m.layers.size());
  const auto matrix = [](const std::vector<std::uint16_t>& bits, std::int64_t rows,
                         std::int64_t cols) {
    return WeightMatrix{ElementType::kBF16, bits.data(), rows, cols};
  };
  const std::int64_t query = m.num_qo_heads * m.head_dim;
  const std::int64_t kv = m.num_kv_heads * m.head_dim;
  DecoderWeights w;
  w.embedding = matrix(m.embedding, m.vocab_size, m.hidden_size);
  w.output = matrix(m.output, m.vocab_size, m.hidden_size);
  w.output_norm = m.output_norm;
  for (const RealLayer& from : m.layers) {
    DecoderLayerWeights layer;
    layer.attention_norm = from.attention_norm;
    layer.feed_forward_norm = from.feed_forward_norm;
    layer.query = matrix(from.query, query, m.hidden_size);
    layer.key = matrix(from.key, kv, m.hidden_size);
    layer.value = matrix(from.value, kv, m.hidden_size);
    layer.output = matrix(from.output, m.hidden_size, query);
    layer.gate = matrix(from.gate, m.intermediate_size, m.hidden_size);
    layer.up = matrix(from.up, m.intermediate_size, m.hidden_size);
    layer.down = matrix(from.down, m.hidden_size, m.intermediate_size);
    w.layers.push_back(std::move(layer));
  }
  state_->decoder = std::make_shared<const Decoder>(std::move(c), std::move(w));
  SessionOptions options;
  options.cache.num_sink_tokens = sinks;
  options.cache.window_size = window;
  options.cache.chunk_size = 1;
  options.num_threads = threads;
  if (rounded_cache)
    state_->session = std::make_unique<Session<bf16>>(state_->decoder, options);
  else
    state_->exact = std::make_unique<Session<float>>(state_->decoder, options);
}
RealStream::~RealStream() = default;

std::span<const float> RealStream::step(std::int32_t token) {
  const std::array<Token, 1> one{static_cast<Token>(token)};
  if (state_->exact) {
    state_->exact->accept(one);
    return state_->exact->logits();
  }
  state_->session->accept(one);
  return state_->session->logits();
}

}  // namespace sluice_test
