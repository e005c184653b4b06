// SPDX-License-Identifier: MIT
/// The inner loops of attend() on the CPU, free of variants and segments. One query row: products
/// of a few query heads with a run of keys, and weighted sums of a run of values, each read once
/// for all heads of the group. Several rows: the two products of a tile with query rows as columns,
/// so that keys and values are used as they are stored, and maxima, exponentials and sums go down
/// columns without a horizontal step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/core/config.hpp"

namespace sluice::detail {

// ---- one query row ---------------------------------------------------------------------------

/// Heads whose products or sums one pass over keys or values forms, at most.
inline constexpr int kDecodeHeads = simd::kNumRegisters >= 32 ? 4 : 2;
/// Registers of a value row that one pass sums up, at most.
inline constexpr int kDecodeVectors = simd::kNumRegisters >= 32 ? 4 : 3;

/// Bits of a code of KIVI's words; 0: no such element.
template <class Element>
inline constexpr int kFieldBits = 0;
template <int kBits, class Tail>
inline constexpr int kFieldBits<KiviElement<kBits, Tail>> = kBits;

/// kWidth channels of a row from channel `first` on, those of a pair-wise format in the order of
/// simd::load_codes().
template <class Element>
[[gnu::always_inline]] inline simd::VecF load_channels(const Element* row, std::int64_t first) {
  if constexpr (std::is_same_v<Element, int4x2> || BlockElement<Element>)
    return simd::load_codes(row, first);
  else if constexpr (kFieldBits<Element> > 0)
    return simd::load_fields<kFieldBits<Element>>(row, first);
  else
    return simd::load(row + first);
}

/// What a kernel does to the channels that it loads: nothing, or the scale of their block of 32.
struct PlainRows {
  [[gnu::always_inline]] simd::VecF operator()(simd::VecF x, std::int64_t, std::int64_t) const {
    return x;
  }
  PlainRows from(std::int64_t) const { return *this; }
  PlainRows repeated() const { return *this; }
};
struct BlockRows {
  const float* scales;  // [rows, blocks]
  std::int64_t stride;

  [[gnu::always_inline]] simd::VecF operator()(simd::VecF x, std::int64_t row,
                                               std::int64_t channel) const {
    return x * simd::broadcast(scales[row * stride + channel / 32]);
  }
  BlockRows from(std::int64_t row) const { return {scales + row * stride, stride}; }
  BlockRows repeated() const { return {scales, 0}; }
};

/// to = from in the order of load_channels() for Element; dim a multiple of the format's unit.
template <class Element>
inline void order_channels(const float* from, std::int64_t dim, float* to) {
  if constexpr (std::is_same_v<Element, int4x2>) {
    for (std::int64_t d = 0; d < dim; d += 2 * simd::kWidth)
      for (std::int64_t i = 0; i < simd::kWidth; ++i) {
        to[d + i] = from[d + 2 * i];
        to[d + simd::kWidth + i] = from[d + 2 * i + 1];
      }
  } else {
    std::copy_n(from, dim, to);
  }
}
/// The inverse.
template <class Element>
inline void restore_channels(const float* from, std::int64_t dim, float* to) {
  if constexpr (std::is_same_v<Element, int4x2>) {
    for (std::int64_t d = 0; d < dim; d += 2 * simd::kWidth)
      for (std::int64_t i = 0; i < simd::kWidth; ++i) {
        to[d + 2 * i] = from[d + i];
        to[d + 2 * i + 1] = from[d + simd::kWidth + i];
      }
  } else {
    std::copy_n(from, dim, to);
  }
}

/// Rows that are read next, which a pass over others fetches into the second-level cache as it
/// goes: keys while values are summed, values while keys are multiplied. A pass is too short for
/// the processor to see what comes behind it. Rows that are read at once are not fetched: few lines
/// can be under way to the first-level cache, and one that waits for memory there keeps others from
/// coming (13 instead of 23 GB/s on a Zen 4 core).
struct NextRows {
  const void* rows = nullptr;
  std::int64_t stride = 0;  ///< bytes from row to row
  std::int64_t bytes = 0;   ///< of a row
  std::int64_t count = 0;

  [[gnu::always_inline]] void fetch(std::int64_t row) const {
    if (row >= count) return;
    const auto* const line = static_cast<const unsigned char*>(rows) + row * stride;
    for (std::int64_t i = 0; i < bytes; i += 64) simd::prefetch_far(line + i);
  }
};

/// Deals `heads` heads to a kernel that serves several at once: calls kernel<count>(first) for
/// kDecodeHeads at a time, and for those that are left over.
template <class Kernel>
[[gnu::always_inline]] inline void deal_heads(std::int64_t heads, Kernel&& kernel) {
  std::int64_t h = 0;
  for (; heads - h >= kDecodeHeads; h += kDecodeHeads) kernel.template operator()<kDecodeHeads>(h);
  if constexpr (kDecodeHeads > 3)
    if (heads - h == 3) return kernel.template operator()<3>(h);
  if constexpr (kDecodeHeads > 2)
    if (heads - h == 2) return kernel.template operator()<2>(h);
  if (heads - h == 1) kernel.template operator()<1>(h);
}

/// scores[h * score_stride + j] = <query_h, key_j> for kHeads heads and four keys: key_j = keys + j
/// * stride, query_h = query + h * dim, channels in the order of load_channels(); dim a multiple of
/// simd::kWidth, and of twice that for pairs. The order of additions of a
/// score does not depend on kHeads.
template <int kHeads, class Key, class Rows>
[[gnu::always_inline]] inline void decode_products(const float* query, std::int64_t dim,
                                                   const Key* keys, std::int64_t stride,
                                                   float* scores, std::int64_t score_stride,
                                                   Rows rows) {
  simd::VecF sum[kHeads][4];
  for (int h = 0; h < kHeads; ++h)
    for (int j = 0; j < 4; ++j) sum[h][j] = simd::zero();
  for (std::int64_t d = 0; d < dim; d += simd::kWidth) {
    simd::VecF k[4];
    for (int j = 0; j < 4; ++j)
      k[j] = simd::in_register(rows(load_channels(keys + j * stride, d), j, d));
    for (int h = 0; h < kHeads; ++h) {
      const simd::VecF q = simd::load(query + h * dim + d);
      for (int j = 0; j < 4; ++j) sum[h][j] = simd::fma(q, k[j], sum[h][j]);
    }
  }
  for (int h = 0; h < kHeads; ++h) simd::add_lanes(sum[h], scores + h * score_stride);
}

/// The same for any number of heads: keys are loaded once from memory.
template <class Key, class Rows>
[[gnu::always_inline]] inline void decode_products(std::int64_t heads, const float* query,
                                                   std::int64_t dim, const Key* keys,
                                                   std::int64_t stride, float* scores,
                                                   std::int64_t score_stride, Rows rows) {
  deal_heads(heads, [&]<int kHeads>(std::int64_t h) {
    decode_products<kHeads>(query + h * dim, dim, keys, stride, scores + h * score_stride,
                            score_stride, rows);
  });
}

/// scores[h * score_stride + j] = <query_h, key_j> for `heads` heads and `count` keys.
template <class Key, class Rows = PlainRows>
inline void decode_scores(std::int64_t heads, const float* query, std::int64_t dim, const Key* keys,
                          std::int64_t stride, std::int64_t count, float* scores,
                          std::int64_t score_stride, Rows scaled = {}, const NextRows& next = {}) {
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int row = 0; row < 4; ++row) next.fetch(j + row);
    decode_products(heads, query, dim, keys + j * stride, stride, scores + j, score_stride,
                    scaled.from(j));
  }
  // The same key four times: its score is that of any other place.
  for (; j < count; ++j)
    for (std::int64_t h = 0; h < heads; ++h) {
      float sums[4];
      decode_products<1>(query + h * dim, dim, keys + j * stride, 0, sums, 4,
                         scaled.from(j).repeated());
      scores[h * score_stride + j] = sums[0];
    }
}

/// sums[h * dim + d] += sum over j of weights[h * weight_stride + j] * channel first + d of row j
/// of values for kHeads heads and kVectors registers of channels.
template <int kHeads, int kVectors, class Value, class Rows>
[[gnu::always_inline]] inline void decode_sum(const float* weights, std::int64_t weight_stride,
                                              const Value* values, std::int64_t stride,
                                              std::int64_t first, std::int64_t count, float* sums,
                                              std::int64_t dim, Rows rows) {
  simd::VecF sum[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::load(sums + h * dim + v * simd::kWidth);
  for (std::int64_t j = 0; j < count; ++j, values += stride) {
    simd::VecF x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t channel = first + v * simd::kWidth;
      x[v] = simd::in_register(rows(load_channels(values, channel), j, channel));
    }
    for (int h = 0; h < kHeads; ++h) {
      const simd::VecF weight = simd::broadcast(weights[h * weight_stride + j]);
      for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::fma(weight, x[v], sum[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) simd::store(sums + h * dim + v * simd::kWidth, sum[h][v]);
}

template <int kVectors, class Value, class Rows>
[[gnu::always_inline]] inline void decode_sum_heads(std::int64_t heads, const float* weights,
                                                    std::int64_t weight_stride, const Value* values,
                                                    std::int64_t stride, std::int64_t first,
                                                    std::int64_t count, float* sums,
                                                    std::int64_t dim, Rows rows) {
  // As deal_heads(), through which GCC 12 makes sums of f16 rows up to 13% slower.
  std::int64_t h = 0;
  const auto some = [&]<int kHeads>() {
    decode_sum<kHeads, kVectors>(weights + h * weight_stride, weight_stride, values, stride, first,
                                 count, sums + h * dim, dim, rows);
    h += kHeads;
  };
  while (heads - h >= kDecodeHeads) some.template operator()<kDecodeHeads>();
  if constexpr (kDecodeHeads > 3)
    if (heads - h == 3) return some.template operator()<3>();
  if constexpr (kDecodeHeads > 2)
    if (heads - h == 2) return some.template operator()<2>();
  if (heads - h == 1) some.template operator()<1>();
}

/// sums[h * dim + d] = sum over j of weights[h * weight_stride + j] * channel d of the row at
/// values
/// + j * stride, for `heads` heads, `count` rows and dim channels, a multiple as decode_products()
/// wants it and in the order of load_channels().
template <class Value, class Rows = PlainRows>
inline void decode_sums(std::int64_t heads, const float* weights, std::int64_t weight_stride,
                        const Value* values, std::int64_t stride, std::int64_t count, float* sums,
                        std::int64_t dim, Rows scaled = {}, const NextRows& next = {}) {
  // Rows of one stretch stay in the first-level cache while all heads and channels pass over them.
  constexpr std::int64_t kStretch = 16;
  std::fill_n(sums, heads * dim, 0.0F);
  for (std::int64_t begin = 0; begin < count; begin += kStretch) {
    const std::int64_t rows = std::min(kStretch, count - begin);
    const Value* const from = values + begin * stride;
    for (std::int64_t row = begin; row < begin + rows; ++row) next.fetch(row);
    std::int64_t d = 0;
    const auto channels = [&]<int kVectors>() {
      decode_sum_heads<kVectors>(heads, weights + begin, weight_stride, from, stride, d, rows,
                                 sums + d, dim, scaled.from(begin));
      d += kVectors * simd::kWidth;
    };
    while (dim - d >= kDecodeVectors * simd::kWidth) channels.template operator()<kDecodeVectors>();
    if constexpr (kDecodeVectors > 3)
      if (dim - d == 3 * simd::kWidth) channels.template operator()<3>();
    if (dim - d == 2 * simd::kWidth) channels.template operator()<2>();
    if (dim - d == simd::kWidth) channels.template operator()<1>();
  }
}

/// scores[h * score_stride + i] = sum over d of query_h[d] * code first + i of channel d, +
/// offset_h for kHeads heads and kVectors registers of tokens: KIVI's keys, of which channels lie
/// one behind the other, `channel_bytes` apart, and their tokens side by side.
template <int kBits, int kHeads, int kVectors>
inline void field_products(const float* query, std::int64_t dim, const std::uint8_t* words,
                           std::int64_t channel_bytes, std::int64_t first, const float* offsets,
                           float* scores, std::int64_t score_stride) {
  simd::VecF sum[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::zero();
  for (std::int64_t d = 0; d < dim; ++d, words += channel_bytes) {
    simd::VecF n[kVectors];
    for (int v = 0; v < kVectors; ++v)
      n[v] = simd::in_register(simd::load_fields<kBits>(words, first + v * simd::kWidth));
    for (int h = 0; h < kHeads; ++h) {
      const simd::VecF q = simd::in_register(simd::broadcast(query[h * dim + d]));
      for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::fma(q, n[v], sum[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v)
      simd::store(scores + h * score_stride + v * simd::kWidth,
                  sum[h][v] + simd::broadcast(offsets[h]));
}

/// The same for any number of heads.
template <int kBits, int kVectors>
inline void field_products(std::int64_t heads, const float* query, std::int64_t dim,
                           const std::uint8_t* words, std::int64_t channel_bytes,
                           std::int64_t first, const float* offsets, float* scores,
                           std::int64_t score_stride) {
  deal_heads(heads, [&]<int kHeads>(std::int64_t h) {
    field_products<kBits, kHeads, kVectors>(query + h * dim, dim, words, channel_bytes, first,
                                            offsets + h, scores + h * score_stride, score_stride);
  });
}

// ---- several query rows ----------------------------------------------------------------------

/// Rows and registers of columns of a block of accumulators: 8 x 3 and the 3 registers of a row
/// leave 5 of 32 registers; 4 x 2 suit 16.
inline constexpr int kTileBlockRows = simd::kNumRegisters >= 32 ? 8 : 4;
inline constexpr int kTileVectors = simd::kNumRegisters >= 32 ? 3 : 2;
/// Columns of a panel: query rows that pass through a tile of keys together.
inline constexpr int kTileColumns = kTileVectors * simd::kWidth;

/// scores[j, c] = sum over d of keys[j * key_stride + d] * query[d * kTileColumns + c] for `count`
/// rows rounded up to kTileBlockRows and kVectors registers of columns. Rows of scores are
/// kTileColumns long.
template <int kVectors>
inline void tile_scores(const float* SLUICE_RESTRICT keys, std::int64_t key_stride,
                        std::int64_t count, const float* SLUICE_RESTRICT query, std::int64_t dim,
                        float* SLUICE_RESTRICT scores) {
  for (std::int64_t j = 0; j < count; j += kTileBlockRows) {
    const float* const block = keys + j * key_stride;
    simd::VecF sum[kTileBlockRows][kVectors];
    for (int r = 0; r < kTileBlockRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = simd::zero();
    for (std::int64_t d = 0; d < dim; ++d) {
      simd::VecF q[kVectors];
      for (int v = 0; v < kVectors; ++v)
        q[v] = simd::load(query + d * kTileColumns + v * simd::kWidth);
      for (int r = 0; r < kTileBlockRows; ++r) {
        const simd::VecF k = simd::broadcast(block[r * key_stride + d]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = simd::fma(k, q[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kTileBlockRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        simd::store(scores + (j + r) * kTileColumns + v * simd::kWidth, sum[r][v]);
  }
}

/// sums[d, c] = factors[c] * sums[d, c] + sum over j < count of values[j * value_stride + d] *
/// weights[j * kTileColumns + c] for dim channels, a multiple of kTileBlockRows, and kVectors
/// registers of columns. Rows of sums are kTileColumns long.
template <int kVectors>
inline void tile_sums(const float* SLUICE_RESTRICT values, std::int64_t value_stride,
                      std::int64_t count, const float* SLUICE_RESTRICT weights, std::int64_t dim,
                      const float* SLUICE_RESTRICT factors, float* SLUICE_RESTRICT sums) {
  for (std::int64_t d = 0; d < dim; d += kTileBlockRows) {
    simd::VecF sum[kTileBlockRows][kVectors];
    for (int r = 0; r < kTileBlockRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = simd::load(sums + (d + r) * kTileColumns + v * simd::kWidth) *
                    simd::load(factors + v * simd::kWidth);
    for (std::int64_t j = 0; j < count; ++j) {
      simd::VecF weight[kVectors];
      for (int v = 0; v < kVectors; ++v)
        weight[v] = simd::load(weights + j * kTileColumns + v * simd::kWidth);
      for (int r = 0; r < kTileBlockRows; ++r) {
        const simd::VecF x = simd::broadcast(values[j * value_stride + d + r]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = simd::fma(x, weight[v], sum[r][v]);
      }
    }
    for (int r = 0; r < kTileBlockRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        simd::store(sums + (d + r) * kTileColumns + v * simd::kWidth, sum[r][v]);
  }
}

/// One step of an online softmax down the columns of a tile: scores become e^(score - max) with the
/// new maxima, `max` and `sum` of each column are brought up to date, and factors[c] is what
/// earlier sums must be multiplied by. Columns without a visible key keep a maximum of minus
/// infinity and get weights of 0. Exponentials are simd::exp's, 2 ulp.
template <int kVectors>
inline void tile_softmax(float* scores, std::int64_t count, float* max, float* sum,
                         float* factors) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  // What stands for a maximum of minus infinity, which must not be subtracted from itself.
  const auto finite = [](simd::VecF m) {
    return simd::max(m, simd::broadcast(std::numeric_limits<float>::lowest()));
  };
  simd::VecF highest[kVectors];
  for (int v = 0; v < kVectors; ++v) highest[v] = simd::broadcast(kMinusInfinity);
  for (std::int64_t j = 0; j < count; ++j)
    for (int v = 0; v < kVectors; ++v)
      highest[v] = simd::max(highest[v], simd::load(scores + j * kTileColumns + v * simd::kWidth));
  simd::VecF shift[kVectors];
  simd::VecF total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const simd::VecF before = simd::load(max + v * simd::kWidth);
    const simd::VecF now = simd::max(before, highest[v]);
    shift[v] = finite(now);
    const simd::VecF factor = simd::exp(finite(before) - shift[v]);
    simd::store(factors + v * simd::kWidth, factor);
    simd::store(max + v * simd::kWidth, now);
    total[v] = simd::load(sum + v * simd::kWidth) * factor;
  }
  for (std::int64_t j = 0; j < count; ++j)
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + j * kTileColumns + v * simd::kWidth;
      const simd::VecF weight = simd::exp(simd::load(at) - shift[v]);
      simd::store(at, weight);
      total[v] += weight;
    }
  for (int v = 0; v < kVectors; ++v) simd::store(sum + v * simd::kWidth, total[v]);
}

/// to[c * to_stride + r] = from[r * from_stride + c] for rows x cols, both multiples of
/// simd::kWidth.
inline void transpose(const float* SLUICE_RESTRICT from, std::int64_t from_stride,
                      std::int64_t rows, std::int64_t cols, float* SLUICE_RESTRICT to,
                      std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += simd::kWidth)
    for (std::int64_t c = 0; c < cols; c += simd::kWidth) {
      simd::VecF block[simd::kWidth];
      for (int i = 0; i < simd::kWidth; ++i)
        block[i] = simd::load(from + (r + i) * from_stride + c);
      simd::transpose(block);
      for (int i = 0; i < simd::kWidth; ++i) simd::store(to + (c + i) * to_stride + r, block[i]);
    }
}

}  // namespace sluice::detail
