// SPDX-License-Identifier: MIT
/// One attention of a model, for a cache that scores its entries by what was attended.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/attention/attend.hpp"
#include "sluice/cache/segment.hpp"

namespace sluice {

/// What a layer attended to, once attend() has run over one class of its heads.
template <class Key, class Value>
struct ObservedAttention {
  std::int64_t layer = 0;
  int part = 0;          ///< class of the layer's heads (KvCache::head_class)
  AttentionQuery query;  ///< rows [T, num_qo_heads, head_dim], not rotated
  std::span<const Segment<Key, Value>> segments{};
  const float* lse = nullptr;  ///< [T, num_qo_heads]
};

}  // namespace sluice
