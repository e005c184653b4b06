// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "watcher.hpp"

#include "sluice/cache/kind_kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/vision_encoder.hpp"
#include "sluice/nn/patch_embedding.hpp"
#include "sluice/position/vision_positions.hpp"
#include "sluice/stream/clock.hpp"

namespace watch {

using sluice::Token;

namespace {

class CpuWatcher final : public Watcher {
 public:
  CpuWatcher(const Models& models, const WatcherConfig& config)
      : held_decoder_(models.make_decoder()),
        held_encoder_(models.make_encoder()),
        decoder_(*held_decoder_),
        encoder_(*held_encoder_),
        config_(config),
        team_(static_cast<int>(config.threads)),
        cache_(decoder_.make_kind_cache<sluice::bf16>(config.retention)),
        workspace_(decoder_, config.retention.max_chunk, cache_.max_entries(),
                   static_cast<int>(team_.size()), 64),
        encoder_workspace_(encoder_, config.rows, config.cols, static_cast<int>(team_.size())),
        grid_{.frames = 1,
              .rows = config.rows,
              .cols = config.cols,
              .frame_step = sluice::time_step(config.seconds_per_frame)},
        positions_(static_cast<std::size_t>(grid_.num_tokens())),
        patch_rows_({.width = config.cols * models.encoder().merge * models.encoder().patch_size,
                     .height = config.rows * models.encoder().merge * models.encoder().patch_size,
                     .channels = models.encoder().channels,
                     .patch = models.encoder().patch_size,
                     .temporal_patch = models.encoder().grid_frames,
                     .merge = models.encoder().merge}),
        picture_(patch_rows_.make_state()),
        patches_(static_cast<std::size_t>(patch_rows_.rows_per_grid() * patch_rows_.row_width())),
        logits_(static_cast<std::size_t>(models.decoder().vocab_size)),
        random_(config.seed) {
    said_.reserve(static_cast<std::size_t>(config.retention.max_reply));
  }

  void read_prompt(std::span<const Token> head, std::span<const Token> previous,
                   std::span<const Token> tail) override {
    read_text(sluice::SpanRole::kHead, head);
    read_text(sluice::SpanRole::kPrevious, previous);
    read_text(sluice::SpanRole::kTail, tail);
  }
  bool take(std::span<const std::uint8_t> pixels) override {
    return patch_rows_.accept(pixels, picture_);
  }
  FrameTimes see(std::int64_t reply) override;
  std::span<const Token> last_reply() const override { return said_; }
  const sluice::KindRetention& retention() const override { return cache_.retention(); }
  std::size_t token_bytes() const override { return cache_.token_bytes(); }
  std::size_t cache_bytes() const override { return cache_.bytes(); }
  std::string device() const override { return "CPU"; }

 private:
  void read_text(sluice::SpanRole role, std::span<const Token> tokens);
  Token choose();

  std::shared_ptr<const sluice::Decoder> held_decoder_;
  std::unique_ptr<const sluice::VisionEncoder> held_encoder_;
  const sluice::Decoder& decoder_;
  const sluice::VisionEncoder& encoder_;
  WatcherConfig config_;
  sluice::ThreadTeam team_;
  sluice::KindKvCache<sluice::bf16> cache_;
  sluice::DecoderWorkspace workspace_;
  sluice::VisionEncoder::Workspace encoder_workspace_;
  sluice::VisionGrid grid_;
  std::vector<sluice::Position3> positions_;
  sluice::PatchRows patch_rows_;
  sluice::PatchRows::State picture_;
  std::vector<float> patches_;
  std::vector<float> logits_;
  std::vector<Token> said_;
  sluice::Random random_;
};

void CpuWatcher::read_text(sluice::SpanRole role, std::span<const Token> tokens) {
  cache_.begin_span(role);
  const auto most = static_cast<std::size_t>(cache_.max_chunk());
  for (std::size_t done = 0; done < tokens.size(); done += most) {
    decoder_.forward(tokens.subspan(done, std::min(most, tokens.size() - done)), cache_, workspace_,
                     team_);
    cache_.commit();
  }
}

FrameTimes CpuWatcher::see(std::int64_t reply) {
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
Token CpuWatcher::choose() {
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

}  // namespace

template <>
std::unique_ptr<Watcher> make_watcher<sluice::cpu>(const Models& models,
                                                   const WatcherConfig& config) {
  return std::make_unique<CpuWatcher>(models, config);
}

}  // namespace watch
