// SPDX-License-Identifier: MIT
/// Attention over a list of tiles on the GPU: each tile is up to 64 consecutive slots that a reader
/// sees at one place (a segment of cache/segment.hpp, cut). The list lies in device memory, so a
/// captured launch follows a cache whose runs come and go. One kernel for a chunk and for a single
/// token: query heads that share a KV head fill the rows of a block, and tiles are split over
/// blocks, whose parts merge by log-sum-exp. On the tensor cores, sums in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <span>
#include <string>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/chunk_attention.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/position/position.hpp"

namespace sluice {

/// Up to 64 slots in a row. 16 bytes: one load.
struct alignas(16) AttentionTile {
  std::int32_t slot = 0;   ///< of its first key
  std::int32_t count = 0;  ///< keys, 1 to 64
  std::int32_t place = 0;  ///< which of the reader's places it is read from
  /// Number of its first key among the chunk's tokens: key j is seen by tokens from first + j on.
  /// Far below 0: by all.
  std::int32_t first = 0;

  static constexpr std::int32_t kOld = -(1 << 30);
};

namespace detail {

inline constexpr int kMaxPlaces = 32;

/// What a step's kernels read beside the tiles. In device memory.
struct TileStep {
  std::int64_t total;
  std::int32_t num_tiles;
  std::int32_t num_places;
  double shifts[kMaxPlaces];
};

/// Where a chunk's rows come from and go to.
struct TileAppendParams {
  const float* fused;  // [tokens, (num_qo_heads + 2 num_kv_heads) head_dim]
  const float* bias;   // [the same width] or null
  const TileStep* step;
  const Position3* positions;     // [tokens], of the new tokens
  const std::int32_t* slots;      // [tokens]
  const std::int32_t* raw_slots;  // [tokens] or null; negative: none
  const TurnFrequency* frequencies;
  float* rows;             // [1 + places, tokens, 2 (cos, sin), pairs]
  std::uint16_t* rotated;  // [places, tokens, num_qo_heads, head_dim]
  std::uint16_t* keys;
  std::uint16_t* values;
  float* raw_keys;  // [num_kv_heads, raw_stride / head_dim, head_dim]
  std::int64_t head_stride;
  std::int64_t raw_stride;
  int tokens;
  int num_qo_heads;
  int num_kv_heads;
  int first_h;  // pairs before it turn by t
  int first_w;  // pairs from it on turn by w
};

/// Cosines and sines of a chunk's tokens, at their own place and at each place they read from.
template <int kPairs>
__global__ void __launch_bounds__(128)
    tile_rotation_kernel(const __grid_constant__ TileAppendParams p) {
  wait_for_previous_kernel();
  const int token = static_cast<int>(blockIdx.x);
  const Position3 own = p.positions[token];
  const int places = p.step->num_places;
  for (int i = static_cast<int>(threadIdx.x); i < (1 + places) * kPairs; i += 128) {
    const int which = i / kPairs;
    const int pair = i % kPairs;
    const double at = pair < p.first_h ? own.t : pair < p.first_w ? own.h : own.w;
    const double shift = which == 0 ? 0 : p.step->shifts[which - 1];
    const float2 turned = rotation_at(at + shift, p.frequencies[pair], 1);
    float* const row = p.rows + (static_cast<std::int64_t>(which) * p.tokens + token) * 2 * kPairs;
    row[pair] = turned.x;
    row[kPairs + pair] = turned.y;
  }
}

/// Rotates queries to every place, keys to their own, and appends: a block per token.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(256)
    tile_append_kernel(const __grid_constant__ TileAppendParams p) {
  using H = Half<Element>;
  constexpr int kPairs = kHeadDim / 2;
  wait_for_previous_kernel();
  const std::int64_t token = blockIdx.x;
  const std::int64_t width =
      static_cast<std::int64_t>(p.num_qo_heads + 2 * p.num_kv_heads) * kHeadDim;
  const float* const in = p.fused + token * width;
  const int query_pairs = p.num_qo_heads * kPairs;
  const int kv_pairs = p.num_kv_heads * kPairs;
  const int places = p.step->num_places;
  const std::int64_t slot = p.slots[token];
  const int raw = p.raw_slots == nullptr ? -1 : p.raw_slots[token];
  const auto load = [&](std::int64_t channel) {
    return in[channel] + (p.bias == nullptr ? 0.0F : p.bias[channel]);
  };
  const auto turn = [&](int which, int pair, float a, float b, std::uint16_t* to) {
    const float* const row = p.rows + (which * std::int64_t{p.tokens} + token) * 2 * kPairs;
    const std::uint32_t packed =
        H::pack(a * row[pair] - b * row[kPairs + pair], b * row[pair] + a * row[kPairs + pair]);
    to[pair] = static_cast<std::uint16_t>(packed);
    to[pair + kPairs] = static_cast<std::uint16_t>(packed >> 16);
  };
  for (int e = static_cast<int>(threadIdx.x); e < query_pairs + 2 * kv_pairs; e += 256) {
    if (e < query_pairs) {
      const int head = e / kPairs;
      const int pair = e % kPairs;
      const float a = load(head * kHeadDim + pair);
      const float b = load(head * kHeadDim + pair + kPairs);
      for (int place = 0; place < places; ++place)
        turn(1 + place, pair, a, b,
             p.rotated +
                 ((place * std::int64_t{p.tokens} + token) * p.num_qo_heads + head) * kHeadDim);
    } else if (const int k = e - query_pairs; k < kv_pairs) {
      const int head = k / kPairs;
      const int pair = k % kPairs;
      const std::int64_t at = static_cast<std::int64_t>(p.num_qo_heads + head) * kHeadDim;
      const float a = load(at + pair);
      const float b = load(at + pair + kPairs);
      turn(0, pair, a, b, p.keys + head * p.head_stride + slot * kHeadDim);
      if (raw >= 0) {
        float* const to =
            p.raw_keys + head * p.raw_stride + static_cast<std::int64_t>(raw) * kHeadDim;
        to[pair] = a;
        to[pair + kPairs] = b;
      }
    } else {
      const int v = k - kv_pairs;
      const int head = v / kPairs;
      const int pair = v % kPairs;
      const std::int64_t at =
          static_cast<std::int64_t>(p.num_qo_heads + p.num_kv_heads + head) * kHeadDim + 2 * pair;
      *reinterpret_cast<std::uint32_t*>(p.values + head * p.head_stride + slot * kHeadDim +
                                        2 * pair) = H::pack(load(at), load(at + 1));
    }
  }
}

struct TileAttentionParams {
  const std::uint16_t* rotated;  // [places, tokens, num_qo_heads, head_dim]
  const std::uint16_t* keys;
  const std::uint16_t* values;
  const AttentionTile* tiles;
  const TileStep* step;
  float* partial_out;     // [splits, tokens, num_qo_heads, head_dim]
  float2* partial_state;  // [splits, tokens, num_qo_heads]: maximum (log2), sum
  void* out;              // [tokens, num_qo_heads, head_dim], float or Element
  std::int64_t head_stride;
  int tokens;
  int num_qo_heads;
  int group;
  int splits;
  bool own_tile;  // block b of the rows sees tile b alone: windows
  bool wide;      // out is float
  float scale_log2;
};

/// A block is 64 rows (token, query head) of one KV head, a warp 16 of them, and every
/// `splits`-th tile.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kChunkThreads)
    tile_attention_kernel(const __grid_constant__ TileAttentionParams p) {
  using H = Half<Element>;
  constexpr int kRow = kHeadDim + kChunkPadding;
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kKeyBlocks = kChunkTile / 8;
  const float kInfinity = __int_as_float(0x7f800000);
  extern __shared__ __align__(16) unsigned char chunk_memory[];
  // [2 (stages), 2 (keys, values), 64, kRow]
  std::uint16_t* const tiles = reinterpret_cast<std::uint16_t*>(chunk_memory);
  wait_for_previous_kernel();

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z);
  const int rows = p.tokens * p.group;
  const int first_row = static_cast<int>(blockIdx.x) * kChunkTile + warp * 16;
  const bool idle = first_row >= rows;  // the warp has no rows: it only fetches
  const std::uint16_t* const keys = p.keys + kv_head * p.head_stride;
  const std::uint16_t* const values = p.values + kv_head * p.head_stride;
  const int begin = p.own_tile ? static_cast<int>(blockIdx.x) : split;
  const int end = p.own_tile ? begin + 1 : p.step->num_tiles;

  const auto load_tile = [&](const AttentionTile& tile, int stage) {
    std::uint16_t* const to = tiles + stage * (2 * kChunkTile * kRow);
    constexpr int kVectors = kHeadDim / 8;
    for (int i = tid; i < kChunkTile * kVectors; i += kChunkThreads) {
      const int j = i / kVectors;
      const int c = i % kVectors * 8;
      const bool inside = j < tile.count;
      const std::int64_t at =
          static_cast<std::int64_t>(tile.slot + (inside ? j : 0)) * kHeadDim + c;
      copy_async_or_zero(to + j * kRow + c, keys + at, inside);
      copy_async_or_zero(to + (kChunkTile + j) * kRow + c, values + at, inside);
    }
    copies_commit();
  };

  int row_token[2];
  std::int64_t row_at[2];  // (token, head) among all
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first_row + g + 8 * half, rows - 1);
    row_token[half] = row / p.group;
    row_at[half] = static_cast<std::int64_t>(row_token[half]) * p.num_qo_heads + kv_head * p.group +
                   row % p.group;
  }
  std::uint32_t query[kSteps][4] = {};
  const auto load_queries = [&](int place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint16_t* const row =
          p.rotated +
          (static_cast<std::int64_t>(place) * p.tokens * p.num_qo_heads + row_at[half]) * kHeadDim +
          2 * t;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        query[s][half] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s);
        query[s][half + 2] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s + 8);
      }
    }
  };

  float out[kHeadDim / 8][4] = {};
  float maximum[2] = {-kInfinity, -kInfinity};  // of rows g and g + 8, base-2 scores
  float sum[2] = {0, 0};
  int place = -1;
  AttentionTile next = begin < end ? p.tiles[begin] : AttentionTile{};
  if (begin < end) load_tile(next, 0);
  int stage = 0;
  for (int n = begin; n < end; n += p.splits) {
    const AttentionTile tile = next;
    copies_wait();
    __syncthreads();
    if (n + p.splits < end) {
      next = p.tiles[n + p.splits];
      load_tile(next, stage ^ 1);
    }
    const std::uint16_t* const key_tile = tiles + stage * (2 * kChunkTile * kRow);
    const std::uint16_t* const value_tile = key_tile + kChunkTile * kRow;
    stage ^= 1;
    if (idle) continue;
    if (tile.place != place) load_queries(place = tile.place);

    float s[kKeyBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int b = 0; b < kKeyBlocks; b += 2) {
        std::uint32_t r[4];
        load_matrices(
            r, key_tile + (8 * b + lane / 16 * 8 + lane % 8) * kRow + 16 * step + lane / 8 % 2 * 8);
        H::multiply_add(s[b], query[step], r[0], r[1]);
        H::multiply_add(s[b + 1], query[step], r[2], r[3]);
      }
    }
    if (tile.count < kChunkTile || tile.first + kChunkTile - 1 > row_token[0]) {
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 8 * b + 2 * t + i % 2;
          if (j >= tile.count || tile.first + j > row_token[i / 2]) s[b][i] = -kInfinity;
        }
    }

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -kInfinity;
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b)
        most = fmaxf(most, fmaxf(s[b][2 * half], s[b][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      most = fmaxf(most * p.scale_log2, maximum[half]);
      const float base = most == -kInfinity ? 0 : most;
      factor[half] = power_of_two(maximum[half] - base);
      maximum[half] = most;
      float total = 0;
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[b][2 * half + i];
          x = power_of_two(fmaf(x, p.scale_log2, -base));
          total += x;
        }
      sum[half] = sum[half] * factor[half] + total;
    }
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[c][i] *= factor[i / 2];
#pragma unroll
    for (int step = 0; step < kChunkTile / 16; ++step) {
      const std::uint32_t a[4] = {H::pack(s[2 * step][0], s[2 * step][1]),
                                  H::pack(s[2 * step][2], s[2 * step][3]),
                                  H::pack(s[2 * step + 1][0], s[2 * step + 1][1]),
                                  H::pack(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; c += 2) {
        std::uint32_t r[4];
        load_matrices_transposed(r, value_tile + (16 * step + lane / 8 % 2 * 8 + lane % 8) * kRow +
                                        8 * c + lane / 16 * 8);
        H::multiply_add(out[c], a, r[0], r[1]);
        H::multiply_add(out[c + 1], a, r[2], r[3]);
      }
    }
  }
  if (idle) return;
  const std::int64_t all = static_cast<std::int64_t>(p.tokens) * p.num_qo_heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 2);
    if (first_row + g + 8 * half >= rows) continue;
    if (p.splits == 1) {
      const float scale = sum[half] > 0 ? 1 / sum[half] : 0;
      const std::int64_t at = row_at[half] * kHeadDim + 2 * t;
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c) {
        const float x = out[c][2 * half] * scale;
        const float y = out[c][2 * half + 1] * scale;
        if (p.wide)
          *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at + 8 * c) = {x, y};
        else
          *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(p.out) + at + 8 * c) =
              H::pack(x, y);
      }
      continue;
    }
    const std::int64_t at = split * all + row_at[half];
    if (t == 0) p.partial_state[at] = {maximum[half], sum[half]};
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
      *reinterpret_cast<float2*>(p.partial_out + at * kHeadDim + 8 * c + 2 * t) = {
          out[c][2 * half], out[c][2 * half + 1]};
  }
}

/// Merges the splits of a row in their order: a block per row, a thread per channel.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    tile_merge_kernel(const __grid_constant__ TileAttentionParams p) {
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  const std::int64_t all = static_cast<std::int64_t>(p.tokens) * p.num_qo_heads;
  float most = -__int_as_float(0x7f800000);
  for (int s = 0; s < p.splits; ++s) most = fmaxf(most, p.partial_state[s * all + row].x);
  const float base = most == -__int_as_float(0x7f800000) ? 0 : most;
  float sum = 0;
  float value = 0;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s) {
    const float2 state = p.partial_state[s * all + row];
    const float weight = power_of_two(state.x - base);
    sum = fmaf(weight, state.y, sum);
    value = fmaf(weight, p.partial_out[(s * all + row) * kHeadDim + threadIdx.x], value);
  }
  value = sum > 0 ? value / sum : 0;
  const std::int64_t at = row * kHeadDim + threadIdx.x;
  if (p.wide)
    static_cast<float*>(p.out)[at] = value;
  else
    static_cast<std::uint16_t*>(p.out)[at] =
        static_cast<std::uint16_t>(Half<Element>::pack(value, 0));
}

}  // namespace detail

/// Launches of a chunk's attention over tiles; layers share its scratch. Only construction
/// allocates. One stream at a time. Queries and probabilities are rounded to Element once.
template <class Element, int kHeadDim>
class TileAttentionPlan {
  static_assert(kHeadDim % 16 == 0);

 public:
  static constexpr int kMaxPlaces = detail::kMaxPlaces;

  /// frequencies: [head_dim / 2] radians per unit of position; pairs below first_h turn by t, below
  /// first_w by h, the others by w. \throws Error(kShape, kDevice).
  TileAttentionPlan(std::int64_t num_qo_heads, std::int64_t num_kv_heads,
                    std::span<const double> frequencies, int first_h, int first_w,
                    std::int64_t max_tokens, int max_places)
      : num_qo_heads_(static_cast<int>(num_qo_heads)),
        num_kv_heads_(static_cast<int>(num_kv_heads)),
        first_h_(first_h),
        first_w_(first_w),
        max_tokens_(max_tokens) {
    if (num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0 || max_tokens < 1 || max_places < 1 ||
        max_places > kMaxPlaces || frequencies.size() != kHeadDim / 2)
      throw Error(ErrorCode::kShape, {"extents do not fit", "TileAttentionPlan", "heads, places",
                                      "whole groups, 1 to 32 places, a frequency per pair",
                                      std::to_string(max_places)});
    std::vector<detail::TurnFrequency> turns;
    for (const double frequency : frequencies) {
      const long double exact =
          static_cast<long double>(frequency) / (2 * std::numbers::pi_v<long double>);
      const auto high = static_cast<double>(exact);
      turns.push_back({high, static_cast<double>(exact - static_cast<long double>(high))});
    }
    frequencies_ =
        Buffer<detail::TurnFrequency, cuda>(std::span<const detail::TurnFrequency>(turns));
    const auto rows = static_cast<std::size_t>(max_tokens * num_qo_heads);
    rows_ = Buffer<float, cuda>(static_cast<std::size_t>((1 + max_places) * max_tokens) * kHeadDim);
    rotated_ = Buffer<std::uint16_t, cuda>(static_cast<std::size_t>(max_places) * rows * kHeadDim);
    parts_ = static_cast<std::int64_t>(
        std::max<std::size_t>(8 * rows, static_cast<std::size_t>(num_qo_heads) * kMostSplits));
    partial_out_ = Buffer<float, cuda>(static_cast<std::size_t>(parts_) * kHeadDim);
    partial_state_ = Buffer<float2, cuda>(static_cast<std::size_t>(parts_));
    check_cuda(
        cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
  }

  /// Cosines and sines of a chunk: once for all layers. Members of `p` about the step are read.
  void rotate(detail::TileAppendParams p, std::int64_t tokens, cudaStream_t stream) {
    complete(p, tokens);
    detail::tile_rotation_kernel<kHeadDim / 2>
        <<<static_cast<unsigned>(tokens), 128, 0, stream>>>(p);
    check_cuda(cudaGetLastError(), "tile_rotation_kernel");
  }
  /// Appends a chunk to a layer's cache and attends. p: all but scratch and extents.
  /// own_tiles: rows 64 b .. 64 b + 63 see tile b alone, for equal query and KV heads.
  void launch(detail::TileAppendParams p, const AttentionTile* tiles, bool own_tiles,
              float sm_scale, std::int64_t tokens, std::int64_t most_tiles, void* out, bool wide,
              cudaStream_t stream) {
    complete(p, tokens);
    detail::tile_append_kernel<Element, kHeadDim>
        <<<static_cast<unsigned>(tokens), 256, 0, stream>>>(p);
    check_cuda(cudaGetLastError(), "tile_append_kernel");
    detail::TileAttentionParams a{};
    a.rotated = rotated_.data();
    a.keys = p.keys;
    a.values = p.values;
    a.tiles = tiles;
    a.step = p.step;
    a.partial_out = partial_out_.data();
    a.partial_state = partial_state_.data();
    a.out = out;
    a.head_stride = p.head_stride;
    a.tokens = static_cast<int>(tokens);
    a.num_qo_heads = num_qo_heads_;
    a.group = num_qo_heads_ / num_kv_heads_;
    a.own_tile = own_tiles;
    a.wide = wide;
    a.scale_log2 = sm_scale * 1.44269504088896340736F;
    const std::int64_t blocks = (tokens * a.group + detail::kChunkTile - 1) / detail::kChunkTile;
    // Three blocks fit on a multiprocessor; parts have room for so many rows.
    const std::int64_t wanted =
        std::max<std::int64_t>(1, 3 * processors_ / (blocks * num_kv_heads_));
    a.splits = static_cast<int>(
        own_tiles ? 1
                  : std::min({wanted, std::max<std::int64_t>(1, most_tiles),
                              std::int64_t{kMostSplits}, parts_ / (tokens * num_qo_heads_)}));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(num_kv_heads_),
                    static_cast<unsigned>(a.splits));
    kernel_<<<grid, detail::kChunkThreads, kSharedBytes, stream>>>(a);
    check_cuda(cudaGetLastError(), "tile_attention_kernel");
    if (a.splits == 1) return;
    detail::tile_merge_kernel<Element, kHeadDim>
        <<<static_cast<unsigned>(tokens * num_qo_heads_), kHeadDim, 0, stream>>>(a);
    check_cuda(cudaGetLastError(), "tile_merge_kernel");
  }

  const detail::TurnFrequency* frequencies() const { return frequencies_.data(); }
  std::int64_t max_tokens() const { return max_tokens_; }

 private:
  static constexpr int kSharedBytes =
      4 * detail::kChunkTile * (kHeadDim + detail::kChunkPadding) * 2;
  static constexpr int kMostSplits = 128;

  void complete(detail::TileAppendParams& p, std::int64_t tokens) {
    p.frequencies = frequencies_.data();
    p.rows = rows_.data();
    p.rotated = rotated_.data();
    p.tokens = static_cast<int>(tokens);
    p.num_qo_heads = num_qo_heads_;
    p.num_kv_heads = num_kv_heads_;
    p.first_h = first_h_;
    p.first_w = first_w_;
  }

  // What the attribute is set on (backend.cuh).
  void (*kernel_)(detail::TileAttentionParams) = detail::tile_attention_kernel<Element, kHeadDim>;
  int num_qo_heads_;
  int num_kv_heads_;
  int first_h_;
  int first_w_;
  int processors_ = 0;
  std::int64_t max_tokens_;
  std::int64_t parts_ = 0;
  Buffer<detail::TurnFrequency, cuda> frequencies_;
  Buffer<float, cuda> rows_;
  Buffer<std::uint16_t, cuda> rotated_;
  Buffer<float, cuda> partial_out_;
  Buffer<float2, cuda> partial_state_;
};

}  // namespace sluice
