// SPDX-License-Identifier: MIT
/// The device's half of a stream that reads while it writes, as the host compiler sees it: two
/// caches of one model, of which one is read on a stream of its own while the other is written.
/// Defined in device_duplex.cuh; what to link is said in device_session.hpp (a program's own .cu
/// file instantiates CudaDeviceDuplex beside the two classes there).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "sluice/backend/cuda/device_session.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/token.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// What a group on the device keeps: members of RetentionConfig (kPerQuery, kRotated).
struct CudaDeviceGroupConfig {
  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = 0;
  std::int64_t capacity = 0;
  std::int64_t max_chunk = 1;
  PositionRule position_rule = PositionRule::kInCache;
  Position origin = 0;
};

struct CudaDeviceDuplexConfig {
  CudaDeviceGroupConfig source;
  CudaDeviceGroupConfig target;  ///< is fed token by token: max_chunk is not looked at
  std::int64_t max_tokens = 1;   ///< of one read()
  std::int64_t max_rows = 0;     ///< of one read() of embeddings
  bool logits = false;           ///< every step brings its logits to the host
};

/// Source and target of one stream on the model's device, which must outlive it. One thread at a
/// time calls the source's functions, one the target's; they may be different threads, whose
/// current device stays what it was. All functions wait for the device, each for its own stream.
///
/// A step allocates nothing; a read allocates what cuBLASLt needs for a length that it has not
/// seen. All \throw Error(kDevice) when the device refuses.
template <class Element>
class CudaDeviceDuplex {
 public:
  /// \throws Error(kConfig, kShape) for extents that do not fit; Error(kDevice).
  CudaDeviceDuplex(const CudaDeviceModel<Element>& model, const CudaDeviceDuplexConfig& config);
  ~CudaDeviceDuplex();
  CudaDeviceDuplex(const CudaDeviceDuplex&) = delete;
  CudaDeviceDuplex& operator=(const CudaDeviceDuplex&) = delete;

  /// Source: reads behind what was read, in chunks, as matrices: inputs of products are rounded to
  /// Element. Steps may then see it. Preconditions: 1 to max_tokens of the vocabulary; none of
  /// their slots holds what a step still sees.
  void read(std::span<const Token> tokens);
  /// The same for [rows, hidden_size] embeddings. Precondition: 1 to max_rows rows.
  void read(std::span<const float> rows);

  /// Target: feeds one token that sees the first `visible` tokens of the source, activations in
  /// float32. Preconditions: a token of the vocabulary, room in a full cache; the source has read
  /// `visible` tokens, and their slots were not written over.
  void step(Token token, std::int64_t visible);
  /// Target: goes on behind the first `total` tokens. Precondition: what their window needs is
  /// still in the cache.
  void set_target_total(std::int64_t total);

  /// Target: the token of the greatest logit behind the last step, of equals the first.
  Token best() const;
  /// Target: the last step's logits. [vocab_size], page-locked, valid until the next step; empty
  /// without CudaDeviceDuplexConfig::logits.
  std::span<const float> logits() const;

  /// Device memory of keys and values.
  std::size_t cache_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

extern template class CudaDeviceDuplex<bf16>;
extern template class CudaDeviceDuplex<f16>;

}  // namespace sluice
