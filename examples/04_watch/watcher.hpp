// SPDX-License-Identifier: MIT
// One conversation about a video: frames through a vision encoder into a decoder's cache, and a few
// words about each. The backend's tag says where: watcher_cpu.cpp or watcher_cuda.cu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "models.hpp"

#include "sluice/cache/kind_retention.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/token.hpp"

namespace watch {

struct WatcherConfig {
  sluice::KindRetentionConfig retention;
  std::int64_t rows = 4;  // tokens of a frame
  std::int64_t cols = 4;
  double seconds_per_frame = 0.125;
  float temperature = 0.9F;  // 0: the likeliest token
  std::uint64_t seed = 1;
  std::int64_t threads = 2;  // of the host, where it computes
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
  virtual ~Watcher() = default;

  /// The text before the video: structure, what was said before, structure.
  virtual void read_prompt(std::span<const sluice::Token> head,
                           std::span<const sluice::Token> previous,
                           std::span<const sluice::Token> tail) = 0;
  /// Takes a frame's pixels: whether there are as many now as are encoded together.
  virtual bool take(std::span<const std::uint8_t> pixels) = 0;
  /// A round: what was taken, then `reply` tokens about it, which last_reply() gives.
  virtual FrameTimes see(std::int64_t reply) = 0;
  virtual std::span<const sluice::Token> last_reply() const = 0;

  virtual const sluice::KindRetention& retention() const = 0;
  /// Keys and values of one token, all layers.
  virtual std::size_t token_bytes() const = 0;
  /// All that the cache has set aside.
  virtual std::size_t cache_bytes() const = 0;
  /// What computes, for reports.
  virtual std::string device() const = 0;

  std::size_t reserved_bytes(sluice::TokenKind kind) const {
    return static_cast<std::size_t>(retention().slots(kind)) * token_bytes();
  }
  std::size_t bytes_in_use(sluice::TokenKind kind) const {
    return static_cast<std::size_t>(retention().kept(kind)) * token_bytes();
  }
};

/// \throws sluice::Error for what does not fit together, or a device that is not there.
template <sluice::Backend Tag>
std::unique_ptr<Watcher> make_watcher(const Models& models, const WatcherConfig& config);

}  // namespace watch
