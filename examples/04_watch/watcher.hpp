// SPDX-License-Identifier: MIT
// One conversation about a video: frames through a vision encoder into a decoder's cache, and a few
// words about each.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/cache/kind_kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/vision_encoder.hpp"
#include "sluice/nn/patch_embedding.hpp"
#include "sluice/position/vision_positions.hpp"

namespace watch {

/// A small decoder with three-axis positions and weights from a seed.
std::shared_ptr<const sluice::Decoder> random_decoder(std::uint64_t seed);

/// The extents of an encoder, read off the shapes of its tensors.
sluice::VisionEncoderConfig config_of(const sluice::NamedTensors& tensors, std::int64_t num_heads);

struct WatcherConfig {
  sluice::KindRetentionConfig retention;
  std::int64_t rows = 4;  // tokens of a frame
  std::int64_t cols = 4;
  double seconds_per_frame = 0.125;
  float temperature = 0.9F;
  std::uint64_t seed = 1;
};

/// When the parts of a frame were done, monotonic_ns().
struct FrameTimes {
  std::int64_t begin = 0;
  std::int64_t encoded = 0;
  std::int64_t read = 0;
  std::int64_t first_token = 0;  // 0: nothing was said
  std::int64_t done = 0;
};

class Watcher {
 public:
  Watcher(const sluice::Decoder& decoder, const sluice::VisionEncoder& encoder,
          const WatcherConfig& config, sluice::ThreadTeam& team);

  /// The text before the video: structure, what was said before, structure.
  void read_prompt(std::span<const sluice::Token> head, std::span<const sluice::Token> previous,
                   std::span<const sluice::Token> tail);
  /// Takes a frame's pixels: whether there are as many now as are encoded together.
  bool take(std::span<const std::uint8_t> pixels) { return patch_rows_.accept(pixels, picture_); }
  /// A round: what was taken, then `reply` tokens about it, which last_reply() gives.
  FrameTimes see(std::int64_t reply);
  std::span<const sluice::Token> last_reply() const { return said_; }
  const sluice::KindKvCache<sluice::bf16>& cache() const { return cache_; }

 private:
  void read_text(sluice::SpanRole role, std::span<const sluice::Token> tokens);
  sluice::Token choose();

  const sluice::Decoder& decoder_;
  const sluice::VisionEncoder& encoder_;
  WatcherConfig config_;
  sluice::ThreadTeam& team_;
  sluice::KindKvCache<sluice::bf16> cache_;
  sluice::DecoderWorkspace workspace_;
  sluice::VisionEncoder::Workspace encoder_workspace_;
  sluice::VisionGrid grid_;
  std::vector<sluice::Position3> positions_;
  sluice::PatchRows patch_rows_;
  sluice::PatchRows::State picture_;
  std::vector<float> patches_;
  std::vector<float> logits_;
  std::vector<sluice::Token> said_;
  sluice::Random random_;
};

}  // namespace watch
