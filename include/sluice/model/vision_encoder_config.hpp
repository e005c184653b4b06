// SPDX-License-Identifier: MIT
/// What a vision encoder of Qwen2.5-VL's kind looks like (arXiv 2502.13923, section 2.1.1). Data
/// only.
#pragma once

#include <cstdint>
#include <vector>

namespace sluice {

/// Extents of an encoder. The defaults are Qwen2.5-VL's.
struct VisionEncoderConfig {
  std::int64_t width = 1280;
  std::int64_t num_layers = 32;
  std::int64_t num_heads = 16;  ///< head_dim = width / num_heads, a multiple of 4
  std::int64_t feed_forward_width = 3420;
  std::int64_t out_width = 3584;  ///< of a token, the decoder's
  std::int64_t patch_size = 14;   ///< pixels
  std::int64_t grid_frames = 2;   ///< frames that make one grid of patches
  std::int64_t channels = 3;
  std::int64_t merge = 2;          ///< merge x merge patches become a token
  std::int64_t window_size = 112;  ///< pixels; 0: every layer sees the whole grid
  std::vector<std::int64_t> whole_layers{7, 15, 23, 31};  ///< layers that see the whole grid
  double rope_theta = 10000;
  double norm_eps = 1e-6;

  /// Values of a patch: [channels, grid_frames, patch_size, patch_size].
  std::int64_t patch_values() const { return channels * grid_frames * patch_size * patch_size; }
  std::int64_t head_dim() const { return width / num_heads; }
};

}  // namespace sluice
