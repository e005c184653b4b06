// SPDX-License-Identifier: MIT
/// The work of attend() on the CPU. One query row (decoding): keys are split into runs of 64 to
/// 256, each (KV head, split) is a work item that streams its keys and values once for all query
/// heads of the group, and whoever finishes the last split of a head merges them by log-sum-exp.
/// Several rows (prefill): each (KV head, block of query rows) runs an online softmax over key
/// tiles; a tile is converted once and met by the block's query rows a panel of columns at a time,
/// each panel with the keys that it can see. Neither way of cutting depends on the number of
/// threads, so neither does the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "sluice/attention/attention_query.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/backend/cpu/attend.hpp"
#include "sluice/backend/cpu/attend_kernels.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice::detail {

inline constexpr std::int64_t kTileKeys = 128;   // keys of a prefill tile
inline constexpr std::int64_t kBlockPanels = 4;  // panels of a prefill work item, at most
inline constexpr std::int64_t kItems = 16;       // work items that a prefill call should have
inline constexpr std::int64_t kSplitTiles = 4;   // tiles of keys of a split in a prefill, at least
// Rows of all splits of a prefill call, at most: every workspace has room for them.
inline constexpr std::int64_t kPrefillSplitRows = 32;

/// What reads keys of one element type. `rotary`: of the queries, for keys that are stored raw.
struct KeyKernels {
  int unit;  // channels of an element
  /// scores[g * kMostSplitKeys + j] = <query_g, key begin + j> for the heads of a group. query:
  /// [group, dim], rotated and scaled; scratch: key_scratch().
  void (*scores)(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                 std::int64_t count, std::int64_t group, std::int64_t dim, const Rotary* rotary,
                 const float* query, float* scores, float* scratch, const NextRows& next);
  /// The keys, for whoever fetches them; none where an element's rows do not lie apart.
  NextRows (*rows)(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                   std::int64_t count, std::int64_t dim);
  /// Keys as rows of floats, `stride` apart, raw ones rotated.
  void (*load)(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
               std::int64_t count, std::int64_t dim, const Rotary* rotary, std::int64_t stride,
               float* keys);
};

/// What reads values of one element type.
struct ValueKernels {
  int unit;
  /// out[g, d] = sum over j of weights[g * kMostSplitKeys + j] * channel d of value begin + j.
  /// weights may be changed; scratch: value_scratch().
  void (*sums)(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
               std::int64_t count, std::int64_t group, std::int64_t dim, float* weights, float* out,
               float* scratch, const NextRows& next);
  NextRows (*rows)(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                   std::int64_t count, std::int64_t dim);
  /// Values as rows of floats, `stride` apart; channels from dim on are 0.
  void (*load)(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
               std::int64_t count, std::int64_t dim, std::int64_t stride, float* values);
};

// Floats of scratch of KeyKernels::scores and ValueKernels::sums.
constexpr std::int64_t key_scratch(std::int64_t group, std::int64_t dim) {
  return group * (dim + kMostSplitKeys) + kMostSplitKeys / 32 * dim + 2 * kMostSplitKeys;
}
constexpr std::int64_t value_scratch(std::int64_t group, std::int64_t dim) {
  return group * (dim + kMostSplitKeys) + kMostSplitKeys / 32 * dim + 2 * kMostSplitKeys;
}

/// A stored row as floats.
template <class T>
void widen_row(const T* from, const typename KvRow<T>::Scale* scales, std::int64_t count,
               float* to) {
  if constexpr (std::is_same_v<T, int4x2>) {
    KvRow<T>::dequantise(from, scales, count, to);
  } else if constexpr (BlockElement<T>) {
    for (std::int64_t begin = 0; begin < count; begin += KvRow<T>::kGroup) {
      const simd::VecF scale = simd::broadcast_half(scales + begin / KvRow<T>::kGroup);
      for (std::int64_t d = begin; d < begin + KvRow<T>::kGroup; d += simd::kWidth)
        simd::store(to + d, load_channels(from, d) * scale);
    }
  } else {
    float scale = 1;
    if constexpr (QuantisedElement<T>) scale = *scales;
    const auto scaled = [&](auto value, auto factor) {
      if constexpr (QuantisedElement<T>) return value * factor;
      return value;
    };
    std::int64_t d = 0;
    for (; d + simd::kWidth <= count; d += simd::kWidth)
      simd::store(to + d, scaled(simd::load(from + d), simd::broadcast(scale)));
    for (; d < count; ++d) to[d] = scaled(static_cast<float>(from[d]), scale);
  }
}

/// to[g, j] = from[g, j] * scales[j * stride] for the rows of a split.
inline void multiply_rows(std::int64_t group, const float* from, const float* scales,
                          std::int64_t stride, std::int64_t count, float* factors, float* to) {
  for (std::int64_t j = 0; j < count; ++j) factors[j] = scales[j * stride];
  for (std::int64_t g = 0; g < group; ++g)
    for (std::int64_t j = 0; j < count; ++j)
      to[g * kMostSplitKeys + j] = from[g * kMostSplitKeys + j] * factors[j];
}

/// Scales and zeros of one group of channels as floats: [2, kMostSplitKeys].
inline void load_group_scales(const GroupScale* scales, std::int64_t stride, std::int64_t count,
                              float* factors) {
  for (std::int64_t j = 0; j < count; ++j) {
    factors[j] = simd::to_float(scales[j * stride].scale);
    factors[kMostSplitKeys + j] = simd::to_float(scales[j * stride].zero);
  }
}

/// Scores of keys in groups of channels: scale * <q, n> + zero * sum(q), over the groups.
inline void group_scores(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                         std::int64_t count, std::int64_t heads, std::int64_t dim,
                         const float* query, float* scores, float* scratch, const NextRows& next) {
  constexpr std::int64_t kGroup = KvRow<int4x2>::kGroup;
  float* const more = scratch;                           // [heads, kMostSplitKeys]
  float* const factors = more + heads * kMostSplitKeys;  // [2, kMostSplitKeys]
  float* const ordered = factors + 2 * kMostSplitKeys;   // [heads, dim]
  // The query in the order of the products: [groups of channels, heads, channels].
  for (std::int64_t g = 0; g < heads; ++g)
    for (std::int64_t d = 0; d < dim; d += kGroup) {
      const std::int64_t width = std::min(kGroup, dim - d);
      order_channels<int4x2>(query + g * dim + d, width, ordered + d * heads + g * width);
    }
  for (std::int64_t d = 0; d < dim; d += kGroup) {
    const std::int64_t width = std::min(kGroup, dim - d);
    const float* const part = ordered + d * heads;
    float* const to = d == 0 ? scores : more;
    decode_scores(heads, part, width, segment.key<int4x2>(kv_head, begin) + d / 2,
                  segment.key_token_stride, count, to, kMostSplitKeys, PlainRows{},
                  d == 0 ? next : NextRows{});
    load_group_scales(segment.key_scale<int4x2>(kv_head, begin) + d / kGroup,
                      segment.key_scale_token_stride, count, factors);
    for (std::int64_t g = 0; g < heads; ++g) {
      simd::VecF lanes = simd::zero();
      for (std::int64_t i = 0; i < width; i += simd::kWidth)
        lanes += simd::load(part + g * width + i);
      const float sum = simd::reduce_add(lanes);
      float* const row = scores + g * kMostSplitKeys;
      const float* const products = to + g * kMostSplitKeys;
      for (std::int64_t j = 0; j < count; ++j) {
        const float score = products[j] * factors[j] + factors[kMostSplitKeys + j] * sum;
        row[j] = d == 0 ? score : row[j] + score;
      }
    }
  }
}

/// Sums of values in groups of `group` channels: those of w * scale * n, and of w * zero once a
/// group. load_factors(c, factors): as load_group_scales(), of group c of the channels.
template <class Value, class LoadFactors>
void group_sums(const Value* values, std::int64_t stride, std::int64_t count, std::int64_t heads,
                std::int64_t dim, std::int64_t group, const float* weights, float* out,
                float* scratch, const NextRows& next, LoadFactors&& load_factors) {
  float* const more = scratch;                           // [heads, kMostSplitKeys]
  float* const factors = more + heads * kMostSplitKeys;  // [2, kMostSplitKeys]
  float* const rows = factors + 2 * kMostSplitKeys;      // [heads, channels of a group]
  for (std::int64_t d = 0; d < dim; d += group) {
    const std::int64_t width = std::min(group, dim - d);
    load_factors(d / group, factors);
    for (std::int64_t g = 0; g < heads; ++g)
      for (std::int64_t j = 0; j < count; ++j)
        more[g * kMostSplitKeys + j] = weights[g * kMostSplitKeys + j] * factors[j];
    decode_sums(heads, more, kMostSplitKeys, values + KvRow<Value>::stored(d), stride, count, rows,
                width, PlainRows{}, d == 0 ? next : NextRows{});
    for (std::int64_t g = 0; g < heads; ++g) {
      const float* const weight = weights + g * kMostSplitKeys;
      simd::VecF lanes = simd::zero();
      std::int64_t j = 0;
      for (; j + simd::kWidth <= count; j += simd::kWidth)
        lanes = simd::fma(simd::load(weight + j), simd::load(factors + kMostSplitKeys + j), lanes);
      float zero = simd::reduce_add(lanes);
      for (; j < count; ++j) zero += weight[j] * factors[kMostSplitKeys + j];
      float* const to = out + g * dim + d;
      restore_channels<Value>(rows + g * width, width, to);
      for (std::int64_t i = 0; i < width; ++i) to[i] += zero;
    }
  }
}

/// The scales of a split's rows in blocks of 32 channels, as floats: [count, dim / 32].
inline BlockRows load_block_scales(const f16* scales, std::int64_t stride, std::int64_t count,
                                   std::int64_t dim, float* to) {
  const std::int64_t blocks = dim / 32;
  if (stride == blocks) {
    std::int64_t i = 0;
    for (; i + simd::kWidth <= count * blocks; i += simd::kWidth)
      simd::store(to + i, simd::load(scales + i));
    for (; i < count * blocks; ++i) to[i] = simd::to_float(scales[i]);
  } else {
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t b = 0; b < blocks; ++b)
        to[j * blocks + b] = simd::to_float(scales[j * stride + b]);
  }
  return {to, blocks};
}

// ---- KIVI's codes ------------------------------------------------------------------------------

/// The groups of tokens of a segment's keys in one head.
template <int kBits>
struct FieldKeys {
  const std::uint8_t* words;
  const f16* scales;
  std::int64_t group_bytes;
  std::int64_t scale_stride;
  std::int64_t group;          // tokens
  std::int64_t channel_bytes;  // of a group

  template <class Key>
  static FieldKeys of(const AnySegment& segment, std::int64_t kv_head, std::int64_t dim) {
    FieldKeys keys{};
    keys.words = segment.key<Key>(kv_head, 0)->bytes;
    keys.scales =
        static_cast<const f16*>(segment.key_scales) + kv_head * segment.key_scale_head_stride;
    keys.group_bytes = segment.key_token_stride * 4;
    keys.scale_stride = segment.key_scale_token_stride;
    keys.channel_bytes = keys.group_bytes / dim;
    keys.group = keys.channel_bytes * 8 / kBits;
    return keys;
  }
  /// Calls use(words, scales, begin, end, entry) for the tokens begin to end of each group that
  /// entries first to first + count have a part of; `entry` is the first of these, counted from
  /// `first`.
  template <class Use>
  void for_each_group(std::int64_t first, std::int64_t count, Use&& use) const {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t at = (first + done) / group;
      const std::int64_t begin = (first + done) % group;
      const std::int64_t end = std::min(group, begin + count - done);
      use(words + at * group_bytes, scales + at * scale_stride, begin, end, done);
      done += end - begin;
    }
  }
};

/// Keys of a segment as rows of floats.
template <int kBits, class Key>
void load_field_keys(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
                     std::int64_t count, std::int64_t dim, std::int64_t stride, float* to) {
  const auto keys = FieldKeys<kBits>::template of<Key>(segment, kv_head, dim);
  keys.for_each_group(
      segment.key_first + first, count,
      [&](const std::uint8_t* words, const f16* scales, std::int64_t begin, std::int64_t end,
          std::int64_t entry) {
        float* const rows = to + entry * stride;
        if (keys.group % simd::kWidth != 0 || dim % simd::kWidth != 0) {
          for (std::int64_t d = 0; d < dim; ++d)
            for (std::int64_t t = begin; t < end; ++t) {
              const int code = words[d * keys.channel_bytes + t * kBits / 8] >> (t * kBits % 8) &
                               ((1 << kBits) - 1);
              rows[(t - begin) * stride + d] =
                  static_cast<float>(code) * simd::to_float(scales[d]) +
                  simd::to_float(scales[dim + d]);
            }
          return;
        }
        for (std::int64_t t = begin / simd::kWidth * simd::kWidth; t < end; t += simd::kWidth)
          for (std::int64_t d = 0; d < dim; d += simd::kWidth) {
            simd::VecF block[simd::kWidth];
            for (int i = 0; i < simd::kWidth; ++i)
              block[i] = simd::fma(
                  simd::load_fields<kBits>(words + (d + i) * keys.channel_bytes, t),
                  simd::broadcast_half(scales + d + i), simd::broadcast_half(scales + dim + d + i));
            simd::transpose(block);
            for (int i = 0; i < simd::kWidth; ++i)
              if (t + i >= begin && t + i < end)
                simd::store(rows + (t + i - begin) * stride + d, block[i]);
          }
      });
}

/// Scores of a split. Scales go into the query, once a group of tokens, and zeros add up to one
/// number a group: sum q (scale n + zero) = sum (q scale) n + sum q zero.
template <int kBits, class Key>
void field_scores(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                  std::int64_t count, std::int64_t heads, std::int64_t dim, const float* query,
                  float* scores, float* scratch) {
  const auto keys = FieldKeys<kBits>::template of<Key>(segment, kv_head, dim);
  if (keys.group % simd::kWidth != 0) {
    for (std::int64_t j = 0; j < count; j += 4) {
      const std::int64_t some = std::min<std::int64_t>(4, count - j);
      load_field_keys<kBits, Key>(segment, kv_head, begin + j, some, dim, dim, scratch);
      decode_scores(heads, query, dim, scratch, dim, some, scores + j, kMostSplitKeys);
    }
    return;
  }
  constexpr std::int64_t kPart = 2 * simd::kWidth;
  const std::int64_t step = keys.group % kPart == 0 ? kPart : simd::kWidth;
  float* const folded = scratch;                // [heads, dim]
  float* const part = folded + heads * dim;     // [heads, kPart]
  float* const offsets = part + heads * kPart;  // [heads]
  keys.for_each_group(segment.key_first + begin, count,
                      [&](const std::uint8_t* words, const f16* scales, std::int64_t from,
                          std::int64_t to, std::int64_t entry) {
                        for (std::int64_t h = 0; h < heads; ++h) {
                          simd::VecF lanes = simd::zero();
                          for (std::int64_t d = 0; d < dim; d += simd::kWidth) {
                            const simd::VecF q = simd::load(query + h * dim + d);
                            simd::store(folded + h * dim + d, q * simd::load(scales + d));
                            lanes = simd::fma(q, simd::load(scales + dim + d), lanes);
                          }
                          offsets[h] = simd::reduce_add(lanes);
                        }
                        for (std::int64_t t = from / step * step; t < to; t += step) {
                          float* const row = scores + entry + (t - from);
                          const bool whole = t >= from && t + step <= to;
                          float* const target = whole ? row : part;
                          const std::int64_t stride = whole ? kMostSplitKeys : kPart;
                          if (step == kPart)
                            field_products<kBits, 2>(heads, folded, dim, words, keys.channel_bytes,
                                                     t, offsets, target, stride);
                          else
                            field_products<kBits, 1>(heads, folded, dim, words, keys.channel_bytes,
                                                     t, offsets, target, stride);
                          if (whole) continue;
                          for (std::int64_t h = 0; h < heads; ++h)
                            for (std::int64_t i = std::max<std::int64_t>(0, from - t);
                                 i < std::min(step, to - t); ++i)
                              scores[h * kMostSplitKeys + entry + t - from + i] =
                                  part[h * kPart + i];
                        }
                      });
}

/// Channels of a group of a segment's values.
template <int kBits>
std::int64_t field_group(const AnySegment& segment, std::int64_t dim) {
  return 2 * dim / segment.value_scale_token_stride;
}

template <int kBits, class Value>
void load_field_values(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
                       std::int64_t count, std::int64_t dim, std::int64_t stride, float* to) {
  const std::int64_t group = field_group<kBits>(segment, dim);
  for (std::int64_t j = first; j < first + count; ++j, to += stride) {
    const std::uint8_t* const words = segment.value<Value>(kv_head, j)->bytes;
    const f16* const scales = static_cast<const f16*>(segment.value_scales) +
                              kv_head * segment.value_scale_head_stride +
                              j * segment.value_scale_token_stride;
    for (std::int64_t begin = 0; begin < dim; begin += group) {
      const float scale = simd::to_float(scales[begin / group * 2]);
      const float zero = simd::to_float(scales[begin / group * 2 + 1]);
      std::int64_t d = begin;
      for (; d % simd::kWidth == 0 && d + simd::kWidth <= begin + group; d += simd::kWidth)
        simd::store(to + d, simd::fma(simd::load_fields<kBits>(words, d), simd::broadcast(scale),
                                      simd::broadcast(zero)));
      for (; d < begin + group; ++d) {
        const int code = words[d * kBits / 8] >> (d * kBits % 8) & ((1 << kBits) - 1);
        to[d] = static_cast<float>(code) * scale + zero;
      }
    }
    std::fill(to + dim, to + stride, 0.0F);
  }
}

template <int kBits, class Value>
void field_sums(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                std::int64_t count, std::int64_t heads, std::int64_t dim, const float* weights,
                float* out, float* scratch, const NextRows& next) {
  const std::int64_t group = field_group<kBits>(segment, dim);
  if (group % simd::kWidth != 0) {
    std::fill_n(out, heads * dim, 0.0F);
    for (std::int64_t j = 0; j < count; ++j) {
      load_field_values<kBits, Value>(segment, kv_head, begin + j, 1, dim, dim, scratch);
      for (std::int64_t g = 0; g < heads; ++g)
        for (std::int64_t d = 0; d < dim; ++d)
          out[g * dim + d] += weights[g * kMostSplitKeys + j] * scratch[d];
    }
    return;
  }
  const f16* const scales = static_cast<const f16*>(segment.value_scales) +
                            kv_head * segment.value_scale_head_stride +
                            begin * segment.value_scale_token_stride;
  group_sums(segment.value<Value>(kv_head, begin), segment.value_token_stride, count, heads, dim,
             group, weights, out, scratch, next, [&](std::int64_t c, float* factors) {
               for (std::int64_t j = 0; j < count; ++j) {
                 const f16* const pair = scales + j * segment.value_scale_token_stride + 2 * c;
                 factors[j] = simd::to_float(pair[0]);
                 factors[kMostSplitKeys + j] = simd::to_float(pair[1]);
               }
             });
}

/// A segment of KIVI's elements whose rows are not coded, as one of Tail.
template <class Element>
struct FieldTail;
template <int kBits, class TailElement>
struct FieldTail<KiviElement<kBits, TailElement>> {
  using Tail = TailElement;
};

template <class Key>
void load_key_rows(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
                   std::int64_t count, std::int64_t dim, const Rotary* rotary, std::int64_t stride,
                   float* keys) {
  for (std::int64_t entry = first; entry < first + count; ++entry, keys += stride) {
    const Key* const key = segment.key<Key>(kv_head, entry);
    const float* const angles = segment.key_rotation == nullptr
                                    ? nullptr
                                    : segment.key_rotation + entry * segment.key_rotation_stride;
    if constexpr (QuantisedElement<Key>) {
      widen_row(key, segment.key_scale<Key>(kv_head, entry), dim, keys);
      if (angles != nullptr) rotary->rotate(angles, keys, keys);
    } else if (angles != nullptr) {
      rotary->rotate(angles, key, keys);
    } else {
      widen_row(key, nullptr, dim, keys);
    }
  }
}

template <class Key>
void load_keys(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
               std::int64_t count, std::int64_t dim, const Rotary* rotary, std::int64_t stride,
               float* keys) {
  if constexpr (GroupedElement<Key>) {
    SLUICE_ASSERT(segment.key_rotation == nullptr);
    if (segment.key_scales == nullptr)
      load_keys<typename FieldTail<Key>::Tail>(segment, kv_head, first, count, dim, rotary, stride,
                                               keys);
    else
      load_field_keys<kFieldBits<Key>, Key>(segment, kv_head, first, count, dim, stride, keys);
  } else {
    load_key_rows<Key>(segment, kv_head, first, count, dim, rotary, stride, keys);
  }
}

template <class Value>
void load_values(const AnySegment& segment, std::int64_t kv_head, std::int64_t first,
                 std::int64_t count, std::int64_t dim, std::int64_t stride, float* values) {
  if constexpr (GroupedElement<Value>) {
    if (segment.value_scales == nullptr)
      load_values<typename FieldTail<Value>::Tail>(segment, kv_head, first, count, dim, stride,
                                                   values);
    else
      load_field_values<kFieldBits<Value>, Value>(segment, kv_head, first, count, dim, stride,
                                                  values);
  } else {
    for (std::int64_t j = 0; j < count; ++j, values += stride) {
      widen_row(segment.value<Value>(kv_head, first + j),
                segment.value_scale<Value>(kv_head, first + j), dim, values);
      std::fill(values + dim, values + stride, 0.0F);
    }
  }
}

template <class Key>
void split_scores(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                  std::int64_t count, std::int64_t group, std::int64_t dim, const Rotary* rotary,
                  const float* query, float* scores, float* scratch, const NextRows& next) {
  if constexpr (GroupedElement<Key>) {
    if (segment.key_scales == nullptr)
      split_scores<typename FieldTail<Key>::Tail>(segment, kv_head, begin, count, group, dim,
                                                  rotary, query, scores, scratch, next);
    else
      field_scores<kFieldBits<Key>, Key>(segment, kv_head, begin, count, group, dim, query, scores,
                                         scratch);
    return;
  } else if (segment.key_rotation != nullptr) {
    for (std::int64_t j = 0; j < count; j += 4) {
      const std::int64_t some = std::min<std::int64_t>(4, count - j);
      for (std::int64_t i = 0; i < some; ++i) next.fetch(j + i);
      load_keys<Key>(segment, kv_head, begin + j, some, dim, rotary, dim, scratch);
      decode_scores(group, query, dim, scratch, dim, some, scores + j, kMostSplitKeys);
    }
  } else if constexpr (std::is_same_v<Key, int4x2>) {
    group_scores(segment, kv_head, begin, count, group, dim, query, scores, scratch, next);
  } else if constexpr (BlockElement<Key>) {
    decode_scores(group, query, dim, segment.key<Key>(kv_head, begin), segment.key_token_stride,
                  count, scores, kMostSplitKeys,
                  load_block_scales(segment.key_scale<Key>(kv_head, begin),
                                    segment.key_scale_token_stride, count, dim, scratch),
                  next);
  } else {
    decode_scores(group, query, dim, segment.key<Key>(kv_head, begin), segment.key_token_stride,
                  count, scores, kMostSplitKeys, PlainRows{}, next);
    if constexpr (QuantisedElement<Key>)
      multiply_rows(group, scores, segment.key_scale<Key>(kv_head, begin),
                    segment.key_scale_token_stride, count, scratch, scores);
  }
}

template <class Value>
void split_sums(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                std::int64_t count, std::int64_t group, std::int64_t dim, float* weights,
                float* out, float* scratch, const NextRows& next) {
  if constexpr (GroupedElement<Value>) {
    if (segment.value_scales == nullptr)
      split_sums<typename FieldTail<Value>::Tail>(segment, kv_head, begin, count, group, dim,
                                                  weights, out, scratch, next);
    else
      field_sums<kFieldBits<Value>, Value>(segment, kv_head, begin, count, group, dim, weights, out,
                                           scratch, next);
  } else if constexpr (std::is_same_v<Value, int4x2>) {
    group_sums(segment.value<int4x2>(kv_head, begin), segment.value_token_stride, count, group, dim,
               KvRow<int4x2>::kGroup, weights, out, scratch, next,
               [&](std::int64_t c, float* factors) {
                 load_group_scales(segment.value_scale<int4x2>(kv_head, begin) + c,
                                   segment.value_scale_token_stride, count, factors);
               });
  } else if constexpr (BlockElement<Value>) {
    decode_sums(group, weights, kMostSplitKeys, segment.value<Value>(kv_head, begin),
                segment.value_token_stride, count, out, dim,
                load_block_scales(segment.value_scale<Value>(kv_head, begin),
                                  segment.value_scale_token_stride, count, dim, scratch),
                next);
  } else {
    if constexpr (QuantisedElement<Value>)
      multiply_rows(group, weights, segment.value_scale<Value>(kv_head, begin),
                    segment.value_scale_token_stride, count, scratch, weights);
    decode_sums(group, weights, kMostSplitKeys, segment.value<Value>(kv_head, begin),
                segment.value_token_stride, count, out, dim, PlainRows{}, next);
  }
}

// A run of stored rows as bytes.
template <class Element>
NextRows rows_from(const Element* first, std::int64_t stride, std::int64_t count,
                   std::int64_t dim) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Element));
  return {first, stride * kBytes, KvRow<Element>::stored(dim) * kBytes, count};
}
template <class Key>
NextRows key_rows(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                  std::int64_t count, std::int64_t dim) {
  if constexpr (GroupedElement<Key>) {
    if (segment.key_scales != nullptr) return {};
    return key_rows<typename FieldTail<Key>::Tail>(segment, kv_head, begin, count, dim);
  } else {
    return rows_from(segment.key<Key>(kv_head, begin), segment.key_token_stride, count, dim);
  }
}
template <class Value>
NextRows value_rows(const AnySegment& segment, std::int64_t kv_head, std::int64_t begin,
                    std::int64_t count, std::int64_t dim) {
  if constexpr (GroupedElement<Value>) {
    if (segment.value_scales != nullptr) return {};
    return value_rows<typename FieldTail<Value>::Tail>(segment, kv_head, begin, count, dim);
  } else {
    return rows_from(segment.value<Value>(kv_head, begin), segment.value_token_stride, count, dim);
  }
}

/// Channels that a register's codes come from, at least two where an element holds a pair whose
/// halves it takes apart.
template <class T>
inline constexpr int kDecodeUnit = std::is_same_v<T, int4x2> ? 2 : 1;

template <class Key>
const KeyKernels& key_kernels() {
  static constexpr KeyKernels kKernels{kDecodeUnit<Key>, split_scores<Key>, key_rows<Key>,
                                       load_keys<Key>};
  return kKernels;
}
template <class Value>
const ValueKernels& value_kernels() {
  static constexpr ValueKernels kKernels{kDecodeUnit<Value>, split_sums<Value>, value_rows<Value>,
                                         load_values<Value>};
  return kKernels;
}

// Whole registers and whole blocks of accumulators.
constexpr std::int64_t padded_channels(std::int64_t count) {
  constexpr std::int64_t kUnit = std::max(simd::kWidth, kTileBlockRows);
  return (count + kUnit - 1) / kUnit * kUnit;
}
// Panels that the query rows of `tokens` tokens and one KV head fill.
constexpr std::int64_t query_panels(std::int64_t tokens, std::int64_t group) {
  return (tokens * group + kTileColumns - 1) / kTileColumns;
}

SLUICE_KERNEL AttentionExtents attention_extents(const AttentionShape& shape) {
  AttentionExtents extents{padded_channels(shape.head_dim), padded_channels(shape.value_dim), 0};
  const std::int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  const std::int64_t decode =
      group * (extents.key_cols + kMostSplitKeys) +
      std::max(key_scratch(group, extents.key_cols), value_scratch(group, extents.value_cols));
  const std::int64_t columns =
      std::max(query_panels(1, group),
               std::min(kBlockPanels, query_panels(shape.max_queries, group))) *
      kTileColumns;
  const std::int64_t tiles = kTileKeys * (extents.key_cols + extents.value_cols + kTileColumns) +
                             columns * (extents.key_cols + extents.value_cols + 2) + kTileColumns +
                             simd::kWidth * (extents.key_cols + extents.value_cols) + kTileKeys;
  extents.scratch = std::max(decode, tiles) + 64;
  return extents;
}

/// One call of attend() on the CPU.
class CpuAttention {
 public:
  using Workspace = AttentionWorkspace<cpu>;
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  CpuAttention(const AttentionCall& call, const KeyKernels& keys, const ValueKernels& values,
               Workspace& workspace)
      : query_(call.query),
        segments_(call.segments),
        variant_(call.variant),
        keys_(keys),
        values_(values),
        out_(call.out),
        lse_(call.lse),
        workspace_(workspace) {
    SLUICE_ASSERT(query_.rows.head_dim == workspace.shape_.head_dim);
    SLUICE_ASSERT(query_.rows.num_heads == workspace.shape_.num_qo_heads);
    SLUICE_ASSERT(query_.rows.tokens <= workspace.shape_.max_queries);
    SLUICE_ASSERT(out_.head_dim == workspace.shape_.value_dim);
    for ([[maybe_unused]] const AnySegment& segment : segments_)
      SLUICE_ASSERT(segment.key_rotation == nullptr || workspace.rotary() != nullptr);
    for ([[maybe_unused]] const std::int32_t head : query_.kv_heads)
      SLUICE_ASSERT(head >= 0 && head < workspace.shape_.num_kv_heads);
    place_readers();
  }

  void run(ThreadTeam& team) {
    SLUICE_ASSERT(team.size() <= static_cast<int>(workspace_.scratch_.size()));
    if (query_.rows.tokens == 0) return;
    if (query_.rows.tokens == 1 && workspace_.shape_.head_dim % (keys_.unit * simd::kWidth) == 0 &&
        workspace_.shape_.value_dim % (values_.unit * simd::kWidth) == 0)
      decode(team);
    else
      prefill(team);
  }

 private:
  /// Heads on the segments' head axis; kernels below call one of them kv_head.
  std::int64_t segment_heads() const {
    return query_.num_segment_heads(workspace_.shape_.num_kv_heads);
  }
  /// The first query head that reads one of them.
  std::int64_t first_head(std::int64_t kv_head) const {
    return query_.kv_head(kv_head) * workspace_.group_;
  }

  /// Forms the rotations of the query rows for each distinct reader rule.
  void place_readers() {
    if (workspace_.tables_.empty()) return;
    int used = 0;
    Position shifts[Workspace::kMaxSegments];
    Position ceilings[Workspace::kMaxSegments];
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const Position shift = segments_[s].rule.shift;
      const Position ceiling = segments_[s].rule.ceiling;
      int table = 0;
      while (table < used && !(shifts[table] == shift && ceilings[table] == ceiling)) ++table;
      if (table == used) {
        SLUICE_ASSERT(used < static_cast<int>(workspace_.tables_.size()));
        shifts[used] = shift;
        ceilings[used] = ceiling;
        RotaryTable& rotations = workspace_.tables_[static_cast<std::size_t>(used++)];
        if (query_.positions == nullptr)
          rotations.fill_clamped_run(query_.first_position + shift, query_.rows.tokens, ceiling);
        else
          rotations.fill_placed({query_.positions, static_cast<std::size_t>(query_.rows.tokens)},
                                shift, ceiling);
      }
      table_of_[s] = table;
    }
  }

  /// The query head of one row, rotated for segment s and scaled.
  void load_query(std::size_t s, std::int64_t token, std::int64_t head, float* to) const {
    const float* from = query_.rows.head(token, head);
    const std::int64_t dim = query_.rows.head_dim;
    if (workspace_.tables_.empty()) {
      std::copy_n(from, dim, to);
    } else {
      const RotaryTable& table = workspace_.tables_[static_cast<std::size_t>(table_of_[s])];
      table.rotary().rotate(table.row(token), from, to);
    }
    for (std::int64_t d = 0; d < dim; ++d) to[d] *= variant_.sm_scale;
  }

  ScoreRow score_row(const AnySegment& segment, std::int64_t token, std::int64_t head,
                     std::int64_t key) const {
    return {head, segment.rule.reader_position(query_.position(token)),
            segment.rule.first_position + static_cast<Position>(key)};
  }

  QueryInfo query_info(std::int64_t token) const {
    return {query_.first_index + token, query_.position(token)};
  }
  static KeyInfo key_info(const AnySegment& segment, std::int64_t key) {
    return {segment.rule.first_index + key, segment.rule.kind, segment.rule.group};
  }

  TileVisibility classify(const AnySegment& segment, std::int64_t token_begin,
                          std::int64_t token_end, std::int64_t key_begin,
                          std::int64_t key_end) const {
    return variant_.classify(variant_.self, query_.first_index + token_begin,
                             query_.first_index + token_end - 1, key_info(segment, key_begin),
                             segment.rule.first_index + key_end - 1);
  }

  /// The runs that a token does not see of keys key_begin to key_end.
  std::span<const KeyRun> hidden_runs(const AnySegment& segment, std::int64_t token,
                                      std::int64_t key_begin, std::int64_t key_end,
                                      KeyRun (&runs)[kMostKeyRuns]) const {
    const int count = variant_.hidden_runs(variant_.self, query_info(token),
                                           key_info(segment, key_begin), key_end - key_begin, runs);
    return {runs, static_cast<std::size_t>(count)};
  }

  static float row_max(std::span<const float> scores) {
    simd::VecF max = simd::broadcast(kMinusInfinity);
    std::size_t j = 0;
    for (; j + simd::kWidth <= scores.size(); j += simd::kWidth)
      max = simd::max(max, simd::load(scores.data() + j));
    float result = simd::reduce_max(max);
    for (; j < scores.size(); ++j) result = std::max(result, scores[j]);
    return result;
  }

  /// scores[j] = exp(scores[j] - max) in place; returns their sum.
  static float exponentiate(std::span<float> scores, float max) {
    const simd::VecF shift = simd::broadcast(max);
    simd::VecF sum = simd::zero();
    std::size_t j = 0;
    for (; j + simd::kWidth <= scores.size(); j += simd::kWidth) {
      const simd::VecF weight = simd::exp(simd::load(scores.data() + j) - shift);
      simd::store(scores.data() + j, weight);
      sum += weight;
    }
    const auto rest = static_cast<std::int64_t>(scores.size() - j);
    if (rest > 0) {
      const simd::VecF weight = simd::exp(simd::load_partial(scores.data() + j, rest) - shift);
      simd::store_partial(scores.data() + j, weight, rest);
      sum += simd::load_partial(scores.data() + j, rest);
    }
    return simd::reduce_add(sum);
  }

  /// Writes a finished row: accumulated values over their sum and the sink's share.
  void finish(std::int64_t token, std::int64_t head, const float* accumulated,
              const SoftmaxState& state) {
    float* out = out_.head(token, head);
    if (lse_ != nullptr) lse_[token * out_.num_heads + head] = state.lse();
    if (state.empty()) {
      std::fill_n(out, out_.head_dim, 0.0F);
      return;
    }
    const float sink =
        variant_.sink_logit == nullptr ? kMinusInfinity : variant_.sink_logit(variant_.self, head);
    // A sink far above every score would overflow exp: then its share is everything.
    const float sink_weight = sink == kMinusInfinity ? 0.0F : std::exp(sink - state.max);
    const float factor = 1.0F / (state.sum + sink_weight);
    for (std::int64_t d = 0; d < out_.head_dim; ++d) out[d] = accumulated[d] * factor;
  }

  // ---- one query row -------------------------------------------------------------------------

  /// Keys of a split of `keys` in all: enough splits for several threads even where keys are few,
  /// and little to merge where they are many.
  static constexpr std::int64_t split_keys(std::int64_t keys) {
    return keys <= 512 ? 64 : keys <= 2048 ? 128 : kMostSplitKeys;
  }

  void decode(ThreadTeam& team) {
    std::int64_t all_keys = 0;
    for (const AnySegment& segment : segments_) all_keys += segment.rule.visible;
    const std::int64_t length = split_keys(all_keys);
    std::int64_t splits = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const std::int64_t keys = segments_[s].rule.visible;
      for (std::int64_t begin = 0; begin < keys; begin += length) {
        const std::int64_t end = std::min(begin + length, keys);
        const TileVisibility tile = classify(segments_[s], 0, 1, begin, end);
        if (tile == TileVisibility::kNone) continue;
        SLUICE_ASSERT(splits < workspace_.max_splits_);
        workspace_.splits_[static_cast<std::size_t>(splits++)] = {static_cast<int>(s), begin, end,
                                                                  tile == TileVisibility::kSome};
      }
    }
    const std::int64_t heads = segment_heads();
    if (splits == 0) {
      for (std::int64_t j = 0; j < heads; ++j) merge_heads(j, 0);
      return;
    }
    for (std::int64_t j = 0; j < heads; ++j)
      workspace_.splits_left_[static_cast<std::size_t>(j)].store(splits, std::memory_order_relaxed);
    for (auto& loaded : workspace_.loaded_queries_) loaded = {};
    team.for_each(splits * heads, [&](std::int64_t item, int member) {
      const std::int64_t kv_head = item / splits;
      // A member's items follow one another.
      const std::int64_t next = item + 1 < splits * heads ? item + 1 : item;
      decode_split(item % splits, kv_head, next % splits, next / splits, member);
      // The last one has seen what the others wrote.
      if (workspace_.splits_left_[static_cast<std::size_t>(kv_head)].fetch_sub(
              1, std::memory_order_acq_rel) == 1)
        merge_heads(kv_head, splits);
    });
  }

  /// All query heads of one KV head against one split. The keys of the next one are fetched.
  void decode_split(std::int64_t split_index, std::int64_t kv_head, std::int64_t next_split,
                    std::int64_t next_head, int member) {
    float* const scratch = workspace_.scratch_[static_cast<std::size_t>(member)].data();
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t value_dim = workspace_.shape_.value_dim;
    const std::int64_t group = workspace_.group_;
    const std::int64_t head = first_head(kv_head);
    const auto& split = workspace_.splits_[static_cast<std::size_t>(split_index)];
    const AnySegment& segment = segments_[static_cast<std::size_t>(split.segment)];
    const std::int64_t count = split.end - split.begin;
    float* const query = scratch;               // [group, dim]
    float* const scores = query + group * dim;  // [group, kMostSplitKeys]
    float* const more = scores + group * kMostSplitKeys;
    // Kept from item to item.
    auto& loaded = workspace_.loaded_queries_[static_cast<std::size_t>(member)];
    const int table = table_of_[static_cast<std::size_t>(split.segment)];
    if (loaded.kv_head != kv_head || loaded.table != table) {
      for (std::int64_t g = 0; g < group; ++g)
        load_query(static_cast<std::size_t>(split.segment), 0, head + g, query + g * dim);
      loaded = {kv_head, table};
    }
    keys_.scores(segment, kv_head, split.begin, count, group, dim, workspace_.rotary(), query,
                 scores, more, values_.rows(segment, kv_head, split.begin, count, value_dim));
    KeyRun runs[kMostKeyRuns];
    std::span<const KeyRun> hidden;
    if (split.masked) hidden = hidden_runs(segment, 0, split.begin, split.end, runs);
    const std::int64_t first_row = split_index * workspace_.shape_.num_qo_heads + head;
    for (std::int64_t g = 0; g < group; ++g) {
      const std::span<float> row(scores + g * kMostSplitKeys, static_cast<std::size_t>(count));
      if (variant_.transform != nullptr)
        variant_.transform(variant_.self, score_row(segment, 0, head + g, split.begin), row);
      for (const KeyRun& run : hidden)
        std::fill(row.begin() + run.begin, row.begin() + run.end, kMinusInfinity);
      SoftmaxState state{.max = row_max(row), .sum = 0};
      if (!state.empty())
        state.sum = exponentiate(row, state.max);
      else
        std::fill(row.begin(), row.end(), 0.0F);
      workspace_.partial_state_[static_cast<std::size_t>(first_row + g)] = state;
    }
    float* const out = workspace_.partial_out_.data() + first_row * value_dim;
    const auto& next = workspace_.splits_[static_cast<std::size_t>(next_split)];
    values_.sums(segment, kv_head, split.begin, count, group, value_dim, scores, out, more,
                 keys_.rows(segments_[static_cast<std::size_t>(next.segment)], next_head,
                            next.begin, next.end - next.begin, dim));
  }

  /// Merges the splits of a KV head's query heads, of all rows.
  void merge_heads(std::int64_t kv_head, std::int64_t splits) {
    for (std::int64_t token = 0; token < query_.rows.tokens; ++token)
      for (std::int64_t g = 0; g < workspace_.group_; ++g)
        merge_splits(token, first_head(kv_head) + g, splits);
  }

  /// Where a split leaves a row: a place of partial_out_ and partial_state_.
  std::int64_t partial_row(std::int64_t split, std::int64_t token, std::int64_t head) const {
    return (split * query_.rows.tokens + token) * workspace_.shape_.num_qo_heads + head;
  }

  /// Adds the splits of one row in their order; the first split's row is the accumulator.
  void merge_splits(std::int64_t token, std::int64_t head, std::int64_t splits) {
    const std::int64_t dim = workspace_.shape_.value_dim;
    const auto state = [&](std::int64_t s) -> const SoftmaxState& {
      return workspace_.partial_state_[static_cast<std::size_t>(partial_row(s, token, head))];
    };
    SoftmaxState all;
    for (std::int64_t s = 0; s < splits; ++s) all.max = std::max(all.max, state(s).max);
    float* sum = workspace_.partial_out_.data() + partial_row(0, token, head) * dim;
    for (std::int64_t s = 0; s < splits && !all.empty(); ++s) {
      const SoftmaxState& part = state(s);
      const float factor = part.empty() ? 0.0F : std::exp(part.max - all.max);
      const float* from = workspace_.partial_out_.data() + partial_row(s, token, head) * dim;
      if (s == 0)
        for (std::int64_t d = 0; d < dim; ++d) sum[d] *= factor;
      else
        for (std::int64_t d = 0; d < dim; ++d) sum[d] += factor * from[d];
      all.sum += part.sum * factor;
    }
    finish(token, head, sum, all);
  }

  // ---- several query rows --------------------------------------------------------------------

  /// The query rows of an item, as columns: column c is query head c % group of token begin + c /
  /// group. Panels of kTileColumns columns follow each other.
  struct Block {
    std::int64_t begin = 0;    // first token
    std::int64_t end = 0;      // behind the last one
    std::int64_t kv_head = 0;  // on the segments' head axis
    float* keys = nullptr;     // [kTileKeys, key_cols]
    float* values = nullptr;   // [kTileKeys, value_cols]
    float* scores = nullptr;   // [kTileKeys, kTileColumns], of one panel
    float* query = nullptr;    // [panels, key_cols, kTileColumns]
    float* sums = nullptr;     // [panels, value_cols, kTileColumns]
    float* max = nullptr;      // [panels, kTileColumns]
    float* sum = nullptr;      // [panels, kTileColumns]
    float* factors = nullptr;  // [kTileColumns]
    float* rows = nullptr;     // [kWidth, key_cols or value_cols]
    float* line = nullptr;     // [kTileKeys], scores of one row

    std::int64_t columns(std::int64_t group) const { return (end - begin) * group; }
  };

  void prefill(ThreadTeam& team) {
    // A block is whole tokens that fill at most kBlockPanels panels, of fewer panels where that
    // leaves too few items to share out, but at least one token however many heads its group has.
    const std::int64_t tokens = query_.rows.tokens;
    const std::int64_t group = workspace_.group_;
    std::int64_t block_panels = kBlockPanels;
    const auto block_tokens = [&] {
      return std::max<std::int64_t>(1, block_panels * kTileColumns / group);
    };
    const auto blocks = [&] {
      return (tokens + block_tokens() - 1) / block_tokens();
    };
    while (block_panels > 1 && blocks() * segment_heads() < kItems) block_panels /= 2;
    const std::int64_t count = blocks();
    const std::int64_t heads = segment_heads();
    // Few rows over many keys are too few items: their tiles of keys are shared out, too.
    std::int64_t tiles = 0;
    for (const AnySegment& segment : segments_) tiles += tiles_of(segment);
    const std::int64_t splits = std::max<std::int64_t>(
        1, std::min({kItems / (count * heads), kPrefillSplitRows / tokens, tiles / kSplitTiles}));
    if (splits > 1)
      for (std::int64_t j = 0; j < heads; ++j)
        workspace_.splits_left_[static_cast<std::size_t>(j)].store(count * splits,
                                                                   std::memory_order_relaxed);
    team.for_each(count * heads * splits, [&](std::int64_t item, int member) {
      const std::int64_t kv_head = item / (count * splits);
      const std::int64_t split = item / count % splits;
      // Later blocks see more keys than earlier ones: the long items first.
      const std::int64_t block = count - 1 - item % count;
      prefill_block(kv_head, block * block_tokens(), std::min((block + 1) * block_tokens(), tokens),
                    {split, splits, tiles},
                    workspace_.scratch_[static_cast<std::size_t>(member)].data());
      // The last one has seen what the others wrote.
      if (splits > 1 && workspace_.splits_left_[static_cast<std::size_t>(kv_head)].fetch_sub(
                            1, std::memory_order_acq_rel) == 1)
        merge_heads(kv_head, splits);
    });
  }

  /// Which part of all tiles of keys an item takes.
  struct TileSplit {
    std::int64_t index;
    std::int64_t count;
    std::int64_t tiles;

    bool takes(std::int64_t tile) const {
      return tile >= tiles * index / count && tile < tiles * (index + 1) / count;
    }
  };
  static std::int64_t tiles_of(const AnySegment& segment) {
    return (segment.rule.visible + kTileKeys - 1) / kTileKeys;
  }

  void prefill_block(std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                     const TileSplit& split, float* scratch) {
    const std::int64_t group = workspace_.group_;
    const std::int64_t key_cols = workspace_.extents_.key_cols;
    const std::int64_t value_cols = workspace_.extents_.value_cols;
    const std::int64_t columns = query_panels(end - begin, group) * kTileColumns;
    Block block{.begin = begin, .end = end, .kv_head = kv_head};
    const auto take = [&](std::int64_t size) {
      return std::exchange(scratch, scratch + size);
    };
    block.keys = take(kTileKeys * key_cols);
    block.values = take(kTileKeys * value_cols);
    block.scores = take(kTileKeys * kTileColumns);
    block.query = take(columns * key_cols);
    block.sums = take(columns * value_cols);
    block.max = take(columns);
    block.sum = take(columns);
    block.factors = take(kTileColumns);
    block.rows = take(simd::kWidth * std::max(key_cols, value_cols));
    block.line = take(kTileKeys);
    std::fill_n(block.sums, columns * value_cols, 0.0F);
    std::fill_n(block.max, columns, kMinusInfinity);
    std::fill_n(block.sum, columns, 0.0F);

    int loaded = -1;        // the rotation that block.query has
    std::int64_t tile = 0;  // of all segments
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const AnySegment& segment = segments_[s];
      for (std::int64_t first = 0; first < segment.rule.visible; first += kTileKeys) {
        if (!split.takes(tile++)) continue;
        const std::int64_t last = std::min(first + kTileKeys, segment.rule.visible);
        if (classify(segment, begin, end, first, last) == TileVisibility::kNone) continue;
        if (loaded != table_of_[s]) load_queries(s, block);
        loaded = table_of_[s];
        keys_.load(segment, kv_head, first, last - first, workspace_.shape_.head_dim,
                   workspace_.rotary(), key_cols, block.keys);
        values_.load(segment, kv_head, first, last - first, workspace_.shape_.value_dim, value_cols,
                     block.values);
        for (std::int64_t column = 0; column < block.columns(group); column += kTileColumns)
          prefill_panel(segment, block, column, first, last);
      }
    }
    finish_block(block, split);
  }

  /// Query rows of a block as columns, rotated for segment s. Columns beyond the last are 0.
  void load_queries(std::size_t s, const Block& block) const {
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t key_cols = workspace_.extents_.key_cols;
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns = block.columns(group);
    const std::int64_t head = first_head(block.kv_head);
    for (std::int64_t c = 0; c < columns; c += simd::kWidth) {
      for (std::int64_t i = 0; i < simd::kWidth; ++i) {
        float* const row = block.rows + i * key_cols;
        if (c + i < columns)
          load_query(s, block.begin + (c + i) / group, head + (c + i) % group, row);
        const std::int64_t from = c + i < columns ? dim : 0;
        std::fill(row + from, row + key_cols, 0.0F);
      }
      transpose(block.rows, key_cols, simd::kWidth, key_cols,
                block.query + c / kTileColumns * kTileColumns * key_cols + c % kTileColumns,
                kTileColumns);
    }
  }

  /// The panel that begins with `column` against keys first to last of a segment, which
  /// block.keys and block.values hold.
  void prefill_panel(const AnySegment& segment, const Block& block, std::int64_t column,
                     std::int64_t first, std::int64_t last) const {
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns =
        std::min<std::int64_t>(block.columns(group) - column, kTileColumns);
    const std::int64_t token_begin = block.begin + column / group;
    const std::int64_t token_end = block.begin + (column + columns - 1) / group + 1;
    // The keys that some row of the panel may see: those of a later token, or behind a window, are
    // left out a block of rows at a time.
    std::int64_t begin = first;
    const auto hidden = [&](std::int64_t from, std::int64_t to) {
      return classify(segment, token_begin, token_end, from, to) == TileVisibility::kNone;
    };
    while (begin < last && hidden(begin, std::min(begin + kTileBlockRows, last)))
      begin += kTileBlockRows;
    if (begin >= last) return;
    std::int64_t end = last;
    while (true) {
      const std::int64_t from = first + (end - 1 - first) / kTileBlockRows * kTileBlockRows;
      if (!hidden(from, end)) break;
      end = from;
    }
    const std::int64_t count = end - begin;
    const float* const keys = block.keys + (begin - first) * workspace_.extents_.key_cols;
    const float* const values = block.values + (begin - first) * workspace_.extents_.value_cols;
    const float* const query = block.query + column * workspace_.extents_.key_cols;
    float* const sums = block.sums + column * workspace_.extents_.value_cols;
    const auto with_vectors = [&]<int kVectors>() {
      tile_scores<kVectors>(keys, workspace_.extents_.key_cols, count, query,
                            workspace_.shape_.head_dim, block.scores);
      apply_variant(segment, block, column, columns, begin, end, token_begin, token_end);
      tile_softmax<kVectors>(block.scores, count, block.max + column, block.sum + column,
                             block.factors);
      tile_sums<kVectors>(values, workspace_.extents_.value_cols, count, block.scores,
                          workspace_.extents_.value_cols, block.factors, sums);
    };
    if (columns <= simd::kWidth)
      with_vectors.template operator()<1>();
    else if (kTileVectors == 2 || columns <= 2 * simd::kWidth)
      with_vectors.template operator()<2>();
    else
      with_vectors.template operator()<kTileVectors>();
  }

  /// Transforms and masks the scores of a panel against keys begin to end.
  void apply_variant(const AnySegment& segment, const Block& block, std::int64_t column,
                     std::int64_t columns, std::int64_t begin, std::int64_t end,
                     std::int64_t token_begin, std::int64_t token_end) const {
    const std::int64_t group = workspace_.group_;
    const std::int64_t count = end - begin;
    if (variant_.transform != nullptr) {
      for (std::int64_t c = 0; c < columns; ++c) {
        for (std::int64_t j = 0; j < count; ++j) block.line[j] = block.scores[j * kTileColumns + c];
        variant_.transform(variant_.self,
                           score_row(segment, block.begin + (column + c) / group,
                                     first_head(block.kv_head) + (column + c) % group, begin),
                           std::span<float>(block.line, static_cast<std::size_t>(count)));
        for (std::int64_t j = 0; j < count; ++j) block.scores[j * kTileColumns + c] = block.line[j];
      }
    }
    if (classify(segment, token_begin, token_end, begin, end) == TileVisibility::kAll) return;
    KeyRun runs[kMostKeyRuns];
    for (std::int64_t token = token_begin; token < token_end; ++token) {
      const std::int64_t from = std::max((token - block.begin) * group - column, std::int64_t{0});
      const std::int64_t to = std::min((token - block.begin + 1) * group - column, columns);
      for (const KeyRun& run : hidden_runs(segment, token, begin, end, runs))
        for (std::int64_t j = run.begin; j < run.end; ++j)
          std::fill(block.scores + j * kTileColumns + from, block.scores + j * kTileColumns + to,
                    kMinusInfinity);
    }
  }

  /// Leaves the rows of a block where they belong, or as a split's part.
  void finish_block(const Block& block, const TileSplit& split) {
    const std::int64_t value_cols = workspace_.extents_.value_cols;
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns = block.columns(group);
    for (std::int64_t c = 0; c < columns; c += simd::kWidth) {
      transpose(block.sums + c / kTileColumns * kTileColumns * value_cols + c % kTileColumns,
                kTileColumns, value_cols, simd::kWidth, block.rows, value_cols);
      for (std::int64_t i = 0; i < simd::kWidth && c + i < columns; ++i) {
        const std::int64_t token = block.begin + (c + i) / group;
        const std::int64_t head = first_head(block.kv_head) + (c + i) % group;
        const float* const sums = block.rows + i * value_cols;
        const SoftmaxState state{.max = block.max[c + i], .sum = block.sum[c + i]};
        if (split.count == 1) {
          finish(token, head, sums, state);
          continue;
        }
        const std::int64_t row = partial_row(split.index, token, head);
        const std::int64_t dim = workspace_.shape_.value_dim;
        std::copy_n(sums, dim, workspace_.partial_out_.data() + row * dim);
        workspace_.partial_state_[static_cast<std::size_t>(row)] = state;
      }
    }
  }

  const AttentionQuery& query_;
  std::span<const AnySegment> segments_;
  const AnyVariant variant_;
  const KeyKernels& keys_;
  const ValueKernels& values_;
  HeadsView<float> out_;
  float* lse_;
  Workspace& workspace_;
  int table_of_[Workspace::kMaxSegments] = {};
};

#if SLUICE_COMPILED_KERNELS
template <class Use>
void with_kv_type(std::uint32_t tag, Use&& use) {
  if (tag == KvRow<float>::kTag) return use.template operator()<float>();
  if (tag == KvRow<f16>::kTag) return use.template operator()<f16>();
  if (tag == KvRow<bf16>::kTag) return use.template operator()<bf16>();
  if (tag == KvRow<std::int8_t>::kTag) return use.template operator()<std::int8_t>();
  if (tag == KvRow<fp8_e4m3>::kTag) return use.template operator()<fp8_e4m3>();
  if (tag == KvRow<int4x2>::kTag) return use.template operator()<int4x2>();
  if (tag == KvRow<q8_0>::kTag) return use.template operator()<q8_0>();
  if (tag == KvRow<q4_0>::kTag) return use.template operator()<q4_0>();
  const auto kivi = [&]<class Tail>() {
    if (tag == KvRow<KiviElement<2, Tail>>::kTag) use.template operator()<KiviElement<2, Tail>>();
    if (tag == KvRow<KiviElement<4, Tail>>::kTag) use.template operator()<KiviElement<4, Tail>>();
  };
  kivi.template operator()<float>();
  kivi.template operator()<f16>();
  kivi.template operator()<bf16>();
}

void run_attention(const AttentionCall& call, std::uint32_t key_tag, std::uint32_t value_tag,
                   AttentionWorkspace<cpu>& workspace, ThreadTeam& team) {
  const KeyKernels* keys = nullptr;
  const ValueKernels* values = nullptr;
  with_kv_type(key_tag, [&]<class Key>() { keys = &key_kernels<Key>(); });
  with_kv_type(value_tag, [&]<class Value>() { values = &value_kernels<Value>(); });
  SLUICE_ASSERT(keys != nullptr && values != nullptr);
  CpuAttention(call, *keys, *values, workspace).run(team);
}
#else
inline void run_attention(const AttentionCall& call, const KeyKernels& keys,
                          const ValueKernels& values, AttentionWorkspace<cpu>& workspace,
                          ThreadTeam& team) {
  CpuAttention(call, keys, values, workspace).run(team);
}
#endif

}  // namespace sluice::detail
