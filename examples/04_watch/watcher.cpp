// SPDX-License-Identifier: MIT
#include "watcher.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/stream/clock.hpp"

namespace watch {

using sluice::Token;

std::shared_ptr<const sluice::Decoder> random_decoder(std::uint64_t seed) {
  sluice::DecoderConfig config;
  config.family = "random";
  config.vocab_size = 512;
  config.hidden_size = 128;
  config.intermediate_size = 384;
  config.num_qo_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 32;
  config.sm_scale = 1 / std::sqrt(32.0);
  config.rotaries = {{.head_dim = 32, .rotary_dim = 32, .theta = 1e6, .sections = {4, 6, 6}}};
  config.layers.resize(4);

  auto storage = std::make_shared<std::vector<std::vector<float>>>();
  sluice::Random random(seed);
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    const double range = std::sqrt(3.0 / static_cast<double>(cols));
    std::vector<float>& values = storage->emplace_back(static_cast<std::size_t>(rows * cols));
    for (float& x : values) x = static_cast<float>((2 * random.uniform() - 1) * range);
    return sluice::WeightMatrix::of(values.data(), rows, cols);
  };
  const std::vector<float> ones(static_cast<std::size_t>(config.hidden_size), 1.0F);
  const std::int64_t q_size = config.num_qo_heads * config.head_dim;
  const std::int64_t kv_size = config.num_kv_heads * config.head_dim;
  sluice::DecoderWeights weights;
  weights.embedding = matrix(config.vocab_size, config.hidden_size);
  weights.output = matrix(config.vocab_size, config.hidden_size);
  weights.output_norm = ones;
  for (std::size_t l = 0; l < config.layers.size(); ++l) {
    sluice::DecoderLayerWeights layer;
    layer.attention_norm = layer.feed_forward_norm = ones;
    layer.query = matrix(q_size, config.hidden_size);
    layer.key = matrix(kv_size, config.hidden_size);
    layer.value = matrix(kv_size, config.hidden_size);
    layer.output = matrix(config.hidden_size, q_size);
    layer.gate = matrix(config.intermediate_size, config.hidden_size);
    layer.up = matrix(config.intermediate_size, config.hidden_size);
    layer.down = matrix(config.hidden_size, config.intermediate_size);
    weights.layers.push_back(std::move(layer));
  }
  weights.storage = storage;
  return std::make_shared<const sluice::Decoder>(std::move(config), std::move(weights));
}

sluice::VisionEncoderConfig config_of(const sluice::NamedTensors& tensors, std::int64_t num_heads) {
  const auto extent = [&](const std::string& name, std::size_t axis) {
    const sluice::NamedTensors::Tensor& tensor = tensors.get(name);
    return axis < tensor.shape.size() ? tensor.shape[axis] : 0;
  };
  const std::string patches = "patch_embed.proj.weight";
  sluice::VisionEncoderConfig config;
  config.width = extent(patches, 0);
  config.channels = extent(patches, 1);
  config.grid_frames = extent(patches, 2);
  config.patch_size = extent(patches, 3);
  config.num_heads = num_heads;
  config.num_layers = 0;
  while (tensors.has("blocks." + std::to_string(config.num_layers) + ".norm1.weight"))
    ++config.num_layers;
  config.feed_forward_width = extent("blocks.0.mlp.gate_proj.weight", 0);
  config.out_width = extent("merger.mlp.2.weight", 0);
  config.merge =
      std::llround(std::sqrt(static_cast<double>(extent("merger.mlp.0.weight", 0)) /
                             static_cast<double>(std::max<std::int64_t>(config.width, 1))));
  config.window_size = config.patch_size * config.merge * 4;
  config.whole_layers.clear();
  for (std::int64_t l = 7; l < config.num_layers; l += 8) config.whole_layers.push_back(l);
  return config;
}

Watcher::Watcher(const sluice::Decoder& decoder, const sluice::VisionEncoder& encoder,
                 const WatcherConfig& config, sluice::ThreadTeam& team)
    : decoder_(decoder),
      encoder_(encoder),
      config_(config),
      team_(team),
      cache_(decoder.make_kind_cache<sluice::bf16>(config.retention)),
      workspace_(decoder, config.retention.max_chunk, cache_.max_entries(),
                 static_cast<int>(team.size()), 64),
      encoder_workspace_(encoder, config.rows, config.cols, static_cast<int>(team.size())),
      grid_{.frames = 1,
            .rows = config.rows,
            .cols = config.cols,
            .frame_step = sluice::time_step(config.seconds_per_frame)},
      positions_(static_cast<std::size_t>(grid_.num_tokens())),
      patch_rows_({.width = config.cols * encoder.config().merge * encoder.config().patch_size,
                   .height = config.rows * encoder.config().merge * encoder.config().patch_size,
                   .patch = encoder.config().patch_size,
                   .temporal_patch = encoder.config().grid_frames,
                   .merge = encoder.config().merge}),
      picture_(patch_rows_.make_state()),
      patches_(static_cast<std::size_t>(patch_rows_.rows_per_grid() * patch_rows_.row_width())),
      logits_(static_cast<std::size_t>(decoder.config().vocab_size)),
      random_(config.seed) {
  const sluice::VisionEncoderConfig& vision = encoder.config();
  if (vision.out_width != decoder.config().hidden_size)
    throw sluice::Error(
        sluice::ErrorCode::kShape,
        {"the encoder is of another decoder", "Watcher", "out_width",
         std::to_string(decoder.config().hidden_size), std::to_string(vision.out_width)});
  said_.reserve(static_cast<std::size_t>(config.retention.max_reply));
}

void Watcher::read_prompt(std::span<const Token> head, std::span<const Token> previous,
                          std::span<const Token> tail) {
  read_text(sluice::SpanRole::kHead, head);
  read_text(sluice::SpanRole::kPrevious, previous);
  read_text(sluice::SpanRole::kTail, tail);
}

void Watcher::read_text(sluice::SpanRole role, std::span<const Token> tokens) {
  cache_.begin_span(role);
  const auto most = static_cast<std::size_t>(cache_.max_chunk());
  for (std::size_t done = 0; done < tokens.size(); done += most) {
    decoder_.forward(tokens.subspan(done, std::min(most, tokens.size() - done)), cache_, workspace_,
                     team_);
    cache_.commit();
  }
}

FrameTimes Watcher::see(std::int64_t reply) {
  FrameTimes times;
  times.begin = sluice::monotonic_ns();
  const sluice::MatrixView<float> patches(patches_.data(), patch_rows_.rows_per_grid(),
                                          patch_rows_.row_width());
  patch_rows_.read(picture_, 0, patches);
  const sluice::MatrixView<const float> seen = encoder_.encode(patches, encoder_workspace_, team_);
  times.encoded = sluice::monotonic_ns();

  // A round: what has had its time leaves the cache, the frame comes in, something is said.
  cache_.begin_round();
  sluice::fill_positions(grid_, cache_.next_position(), positions_);
  cache_.begin_span(sluice::SpanRole::kVision, grid_);
  decoder_.forward(sluice::DecoderInput{.embeddings = seen, .positions = positions_}, cache_, {},
                   workspace_, team_);
  cache_.commit();
  times.read = sluice::monotonic_ns();

  said_.clear();
  cache_.begin_span(sluice::SpanRole::kReply);
  std::int64_t last = seen.rows - 1;
  for (std::int64_t i = 0; i < reply; ++i) {
    decoder_.logits(last, {logits_.data(), 1, decoder_.config().vocab_size}, workspace_, team_);
    said_.push_back(choose());
    if (i == 0) times.first_token = sluice::monotonic_ns();
    decoder_.forward(std::span<const Token>(&said_.back(), 1), cache_, workspace_, team_);
    cache_.commit();
    last = 0;
  }
  times.done = sluice::monotonic_ns();
  return times;
}

/// A draw from softmax(logits / temperature), by Gumbel noise.
Token Watcher::choose() {
  Token best = 0;
  double most = -1e300;
  for (std::size_t i = 0; i < logits_.size(); ++i) {
    const double noise = config_.temperature > 0
                             ? -std::log(-std::log(random_.uniform() + 0x1p-60)) *
                                   static_cast<double>(config_.temperature)
                             : 0;
    const double score = static_cast<double>(logits_[i]) + noise;
    if (score > most) {
      most = score;
      best = static_cast<Token>(i);
    }
  }
  return best;
}

}  // namespace watch
