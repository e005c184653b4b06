// SPDX-License-Identifier: MIT
/// Attention of a chunk of one sequence's new tokens on the GPU: rotates, appends to the ring, and
/// attends over sinks and window (or the full cache), on the tensor cores. The counterpart of
/// decode_attention.cuh for prefill: the same cache, the same positions, any chunking.
///
/// Caches of codes. New rows are quantised into the cache as the CPU's are, and are read back from
/// there. What attends multiplies 16-bit numbers, so rows are widened to scale * code, rounded to
/// Element: the product of 7 or 4 bits of a code and 24 of its scale has no room there. That moves
/// an entry by 2^-9 (bf16) or 2^-12 (f16, or 2^-25 where that is more) of itself at most, as
/// storing it in 16 bits would, where the code stands up to 2^-8 of the row's largest entry
/// (int8_t), or 2^-4 of its own (fp8_e4m3), from the value that came. Up to 8 tokens are read code
/// by code, in shared memory; for more, a launch ahead of each layer's attention widens the rows to
/// a scratch, which all layers share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/backend/cuda/hopper_attention.cuh"
#include "sluice/backend/cuda/kv_codes.cuh"
#include "sluice/backend/cuda/memory.cuh"

namespace sluice {

/// A chunk that is a tree of guesses (attention/draft_tree.hpp), in device memory: its tokens are
/// the nodes, parents before their children. A node stands where its depth puts it, and sees what a
/// token there would of those before the chunk, its ancestors and itself.
struct ChunkTree {
  const std::int32_t* depths = nullptr;      ///< [tokens]; null: the chunk is a run of tokens
  const std::uint64_t* ancestors = nullptr;  ///< [tokens, words], bit by node, its own included
  std::int64_t words = 0;
};

/// The tensors of one layer's chunk, in device memory, as DecodeAttentionTensors has them; heads of
/// inputs at multiples of 16 bytes. Cache: of keys and values, Element or a CudaCode.
template <class Element, class Cache = Element>
struct ChunkAttentionTensors {
  const float* query = nullptr;  ///< [tokens, num_qo_heads, head_dim], not rotated
  const float* key = nullptr;    ///< [tokens, num_kv_heads, head_dim], not rotated
  const float* value = nullptr;  ///< [tokens, num_kv_heads, head_dim]
  std::int64_t stride = 0;       ///< from token to token, of all three
  void* out = nullptr;           ///< [tokens, num_qo_heads, head_dim] of `output_type`, no gaps
  ElementType output_type = element_type_of<Element>;  ///< this or kF32

  Cache* keys = nullptr;  ///< of the sequence: [num_kv_heads, capacity, head_dim] by the strides
  Cache* values = nullptr;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  float* key_scales = nullptr;  ///< of codes: [num_kv_heads, capacity] by the stride
  float* value_scales = nullptr;
  std::int64_t scale_head_stride = 0;

  ChunkTree tree = {};
};

namespace detail {

inline constexpr int kChunkTile = 64;  // queries of a block, keys of a tile
inline constexpr int kChunkThreads = 128;
/// Elements that widen a row in shared memory, so that eight rows' 16 bytes lie in distinct banks.
inline constexpr int kChunkPadding = 8;

/// Where the rows of a cache of codes lie.
struct ChunkCodes {
  std::uint8_t* keys = nullptr;
  std::uint8_t* values = nullptr;
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t scale_head_stride = 0;
};

struct ChunkAttentionParams {
  const float* query;
  const float* key;
  const float* value;
  void* out;
  std::uint16_t* keys;  // of a cache of codes: the widened rows
  std::uint16_t* values;
  ChunkCodes codes;        // of such a cache
  std::uint16_t* rotated;  // [2 (own place, sinks), tokens, num_qo_heads, head_dim]
  float* rows;             // [tokens, 2 (own place, sinks), 2 (cos, sin), num_pairs]
  const TurnFrequency* frequencies;
  ChunkTree tree;
  std::int64_t stride;
  std::int64_t head_stride;
  std::int64_t token_stride;
  std::int64_t base;  // index of the chunk's first token
  std::int64_t window;
  std::int64_t ceiling;
  double origin;
  double attention_factor;
  int tokens;
  int sinks;
  int ring;  // slots that are no sinks'
  int num_qo_heads;
  int num_kv_heads;
  int num_pairs;
  bool interleaved;
  bool wide;  // outputs are float32
  float scale_log2;

  /// The slot of a token.
  __device__ std::int64_t slot(std::int64_t index) const {
    return index < sinks ? index : sinks + (index - sinks) % ring;
  }
  /// How far behind the chunk's first token a token stands.
  __device__ std::int64_t depth(std::int64_t token) const {
    return tree.depths == nullptr ? token : tree.depths[token];
  }
  /// Whether a node sees another.
  __device__ bool sees(std::int64_t node, std::int64_t other) const {
    return (tree.ancestors[node * tree.words + other / 64] >> (other % 64) & 1) != 0;
  }
};

/// Cosines and sines of a chunk's tokens: a block per token.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    chunk_rotation_kernel(const __grid_constant__ ChunkAttentionParams p) {
  const std::int64_t own = p.base + p.depth(blockIdx.x);
  float* const rows = p.rows + static_cast<std::int64_t>(blockIdx.x) * 4 * p.num_pairs;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * p.num_pairs; i += kThreads) {
    const int which = i >= p.num_pairs ? 1 : 0;
    const int pair = i - which * p.num_pairs;
    const std::int64_t index = which == 1 && own > p.ceiling ? p.ceiling : own;
    const float2 turned =
        rotation_at(p.origin + static_cast<double>(index), p.frequencies[pair], p.attention_factor);
    rows[which * 2 * p.num_pairs + pair] = turned.x;
    rows[(which * 2 + 1) * p.num_pairs + pair] = turned.y;
  }
}

/// Quantises the rows of a token, keys rotated by `rotation`: a warp per row, of all of the grid's
/// that have the token.
template <class Cache, int kHeadDim>
__device__ void append_codes(const ChunkAttentionParams& p, std::int64_t token,
                             const float* rotation) {
  constexpr int kWarps = kRowThreads / kWarpSize;
  __shared__ __align__(16) float turned[kWarps][kHeadDim];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t slot = p.slot(p.base + token);
  const ChunkCodes& codes = p.codes;
  for (int r = static_cast<int>(blockIdx.y) * kWarps + warp; r < 2 * p.num_kv_heads;
       r += static_cast<int>(gridDim.y) * kWarps) {
    const bool is_key = r < p.num_kv_heads;
    const std::int64_t head = is_key ? r : r - p.num_kv_heads;
    const float* row = (is_key ? p.key : p.value) + token * p.stride + head * kHeadDim;
    if (is_key) {
      for (int pair = lane; pair < kHeadDim / 2; pair += kWarpSize) {
        const RotatedPair x = rotate_pair(p.num_pairs, p.interleaved, rotation, row, pair);
        turned[warp][x.first] = x.a;
        turned[warp][x.second] = x.b;
      }
      __syncwarp();
      row = turned[warp];
    }
    std::uint8_t* const to =
        (is_key ? codes.keys : codes.values) + head * codes.head_stride + slot * codes.token_stride;
    const float scale = quantise_row<Cache, kHeadDim>(row, reinterpret_cast<Cache*>(to), lane);
    if (lane == 0)
      (is_key ? codes.key_scales : codes.value_scales)[head * codes.scale_head_stride + slot] =
          scale;
    __syncwarp();  // the row has been read
  }
}

/// Rotates queries to both their places and appends keys and values: blocks (token, part).
template <class Element, int kHeadDim, class Cache>
__global__ void __launch_bounds__(kRowThreads)
    chunk_append_kernel(const __grid_constant__ ChunkAttentionParams p) {
  using H = Half<Element>;
  constexpr int kPairs = kHeadDim / 2;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t token = blockIdx.x;
  const float* const rows = p.rows + token * 4 * p.num_pairs;
  const std::int64_t at = p.slot(p.base + token) * p.token_stride;
  const auto write = [](std::uint16_t* to, const RotatedPair& x) {
    const std::uint32_t packed = H::pack(x.a, x.b);
    to[x.first] = static_cast<std::uint16_t>(packed);
    to[x.second] = static_cast<std::uint16_t>(packed >> 16);
  };
  const int query_pairs = p.num_qo_heads * kPairs;
  const int kv_pairs = CudaCode<Cache> ? 0 : p.num_kv_heads * kPairs;
  for (int e = static_cast<int>(blockIdx.y * kRowThreads + threadIdx.x);
       e < 2 * query_pairs + 2 * kv_pairs; e += static_cast<int>(gridDim.y) * kRowThreads) {
    if (e < 2 * query_pairs) {
      const int which = e / query_pairs;
      if (which == 1 && p.sinks == 0) continue;
      const int head = e % query_pairs / kPairs;
      write(
          p.rotated + ((which * std::int64_t{p.tokens} + token) * p.num_qo_heads + head) * kHeadDim,
          rotate_pair(p.num_pairs, p.interleaved, rows + which * 2 * p.num_pairs,
                      p.query + token * p.stride + head * kHeadDim, e % kPairs));
    } else if (const int k = e - 2 * query_pairs; k < kv_pairs) {
      const int head = k / kPairs;
      write(p.keys + head * p.head_stride + at,
            rotate_pair(p.num_pairs, p.interleaved, rows,
                        p.key + token * p.stride + head * kHeadDim, k % kPairs));
    } else {
      const int v = k - kv_pairs;
      const int head = v / kPairs;
      const int pair = v % kPairs;
      const float2 x =
          *reinterpret_cast<const float2*>(p.value + token * p.stride + head * kHeadDim + 2 * pair);
      *reinterpret_cast<std::uint32_t*>(p.values + head * p.head_stride + at + 2 * pair) =
          H::pack(x.x, x.y);
    }
  }
  if constexpr (CudaCode<Cache>) append_codes<Cache, kHeadDim>(p, token, rows);
}

/// scale * code of 8 codes, rounded to Element.
template <class Element, class Cache>
__device__ uint4 widen_codes(uint2 eight, float scale) {
  using H = Half<Element>;
  std::uint32_t wide[4];
  ByteCodes<Cache>::widen(eight.x, wide[0], wide[1]);
  ByteCodes<Cache>::widen(eight.y, wide[2], wide[3]);
#pragma unroll
  for (std::uint32_t& two : wide)
    two = H::pack(Half<f16>::low(two) * scale, Half<f16>::high(two) * scale);
  return {wide[0], wide[1], wide[2], wide[3]};
}

/// Widens the first `slots` slots of a cache of codes: a thread per 8 channels, blocks (part, KV
/// head, keys or values).
template <class Element, int kHeadDim, class Cache>
__global__ void __launch_bounds__(kRowThreads)
    widen_cache_kernel(const __grid_constant__ ChunkAttentionParams p, std::int64_t slots) {
  constexpr int kVectors = kHeadDim / 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const ChunkCodes& codes = p.codes;
  const std::int64_t head = blockIdx.y;
  const bool is_key = blockIdx.z == 0;
  const std::uint8_t* const from = (is_key ? codes.keys : codes.values) + head * codes.head_stride;
  const float* const scales =
      (is_key ? codes.key_scales : codes.value_scales) + head * codes.scale_head_stride;
  std::uint16_t* const to = (is_key ? p.keys : p.values) + head * p.head_stride;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
       i < slots * kVectors; i += static_cast<std::int64_t>(gridDim.x) * kRowThreads) {
    const std::int64_t slot = i / kVectors;
    const int c = static_cast<int>(i % kVectors) * 8;
    const auto eight = *reinterpret_cast<const uint2*>(from + slot * codes.token_stride + c);
    *reinterpret_cast<uint4*>(to + slot * p.token_stride + c) =
        widen_codes<Element, Cache>(eight, scales[slot]);
  }
}

__device__ inline void load_matrices(std::uint32_t (&r)[4], const std::uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], const std::uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// Copies 4 bytes to shared memory, or zeros.
__device__ inline void copy_async_word_or_zero(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 4 : 0)
               : "memory");
}

/// The keys that queries [first, last] see, in tiles of 64 in the order of their indices: first the
/// sinks, then what the window shows.
template <int kHeadDim>
struct ChunkTiles {
  static constexpr int kRow = kHeadDim + kChunkPadding;
  static constexpr int kElements = 2 * kChunkTile * kRow;   // of a tile's keys and values
  static constexpr int kCodes = 2 * kChunkTile * kHeadDim;  // the same of codes
  /// Bytes of a tile of codes and its scales, [2 (keys, values), 64].
  static constexpr int kCodeBytes = kCodes + 2 * kChunkTile * 4;

  const ChunkAttentionParams& p;
  const std::uint16_t* keys;
  const std::uint16_t* values;
  int kv_head;
  std::int64_t last;
  std::int64_t sinks_seen;
  std::int64_t oldest;
  int sink_tiles;
  int count;

  __device__ ChunkTiles(const ChunkAttentionParams& params, int head, std::int64_t first_query,
                        std::int64_t last_query)
      : p(params),
        keys(params.keys + head * params.head_stride),
        values(params.values + head * params.head_stride),
        kv_head(head),
        last(last_query),
        sinks_seen(min(static_cast<std::int64_t>(params.sinks), last_query + 1)),
        oldest(max(static_cast<std::int64_t>(params.sinks), first_query - params.window + 1)) {
    sink_tiles = static_cast<int>((sinks_seen + kChunkTile - 1) / kChunkTile);
    count = sink_tiles +
            (last < oldest ? 0 : static_cast<int>((last - oldest + kChunkTile) / kChunkTile));
  }

  __device__ std::int64_t first_key(int n) const {
    return n < sink_tiles ? std::int64_t{n} * kChunkTile
                          : oldest + std::int64_t{n - sink_tiles} * kChunkTile;
  }
  __device__ std::int64_t end_key(int n) const { return n < sink_tiles ? sinks_seen : last + 1; }

  /// The slot of a tile's key j, which is present: slot0 is the first's.
  __device__ int slot_of(int n, int slot0, int j) const {
    const int slot = slot0 + j;
    return n >= sink_tiles && slot >= p.sinks + p.ring ? p.sinks + (slot - p.sinks) % p.ring : slot;
  }

  /// Asks for tile n: to [2 (keys, values), 64, kRow].
  __device__ void load(int n, std::uint16_t* to) const {
    const std::int64_t from = first_key(n);
    const auto slot0 = static_cast<int>(p.slot(from));
    const auto present = static_cast<int>(min(end_key(n) - from, std::int64_t{kChunkTile}));
    constexpr int kVectors = kHeadDim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < kChunkTile * kVectors; i += kChunkThreads) {
      const int j = i / kVectors;
      const int c = i % kVectors * 8;
      const bool inside = j < present;
      const int slot = slot_of(n, slot0, inside ? j : 0);
      copy_async_or_zero(to + j * kRow + c, keys + slot * p.token_stride + c, inside);
      copy_async_or_zero(to + (kChunkTile + j) * kRow + c, values + slot * p.token_stride + c,
                         inside);
    }
  }

  /// Asks for tile n of a cache of codes: to [2 (keys, values), 64, head_dim], scales behind them.
  __device__ void load_codes(int n, unsigned char* to) const {
    const ChunkCodes& codes = p.codes;
    const std::int64_t from = first_key(n);
    const auto slot0 = static_cast<int>(p.slot(from));
    const auto present = static_cast<int>(min(end_key(n) - from, std::int64_t{kChunkTile}));
    constexpr int kVectors = kHeadDim / 16;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kChunkTile * kVectors; i += kChunkThreads) {
      const int row = i / kVectors;  // of keys, then of values
      const int c = i % kVectors * 16;
      const bool is_key = row < kChunkTile;
      const bool inside = row % kChunkTile < present;
      const int slot = slot_of(n, slot0, inside ? row % kChunkTile : 0);
      copy_async_or_zero(to + row * kHeadDim + c,
                         (is_key ? codes.keys : codes.values) + kv_head * codes.head_stride +
                             slot * codes.token_stride + c,
                         inside);
    }
    static_assert(2 * kChunkTile == kChunkThreads);
    const int row = static_cast<int>(threadIdx.x);
    const bool inside = row % kChunkTile < present;
    copy_async_word_or_zero(to + kCodes + 4 * row,
                            (row < kChunkTile ? codes.key_scales : codes.value_scales) +
                                kv_head * codes.scale_head_stride +
                                slot_of(n, slot0, inside ? row % kChunkTile : 0),
                            inside);
  }
};

/// The running maximum and sum of two rows' softmax, base-2 scores, in a thread that holds columns
/// 2 t and 2 t + 1 of every 8; the sum is of its own columns.
struct ChunkSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};

  /// Turns scores into weights; earlier outputs are to be multiplied by `factor`.
  template <int kBlocks>
  __device__ void add(float (&s)[kBlocks][4], float scale_log2, float (&factor)[2]) {
    const float kInfinity = __int_as_float(0x7f800000);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -kInfinity;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
        most = fmaxf(most, fmaxf(s[b][2 * half], s[b][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      most = fmaxf(most * scale_log2, maximum[half]);
      const float base = most == -kInfinity ? 0 : most;
      factor[half] = power_of_two(maximum[half] - base);
      maximum[half] = most;
      float total = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[b][2 * half + i];
          x = power_of_two(fmaf(x, scale_log2, -base));
          total += x;
        }
      sum[half] = sum[half] * factor[half] + total;
    }
  }
  /// The sums of whole rows.
  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 2);
    }
  }
};

/// A block is 64 queries of one head; a warp 16 of them. Keys come in tiles of 64, in the order of
/// their indices, first the sinks, then what the window shows.
template <class Element, int kHeadDim, bool kTree>
__global__ void __launch_bounds__(kChunkThreads)
    chunk_attention_kernel(const __grid_constant__ ChunkAttentionParams p) {
  using H = Half<Element>;
  constexpr int kRow = kHeadDim + kChunkPadding;
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kKeyBlocks = kChunkTile / 8;
  const float kInfinity = __int_as_float(0x7f800000);
  extern __shared__ __align__(16) unsigned char chunk_memory[];
  // [2 (stages), 2 (keys, values), 64, kRow]
  std::uint16_t* const tiles = reinterpret_cast<std::uint16_t*>(chunk_memory);

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  // The last queries see most: they begin first.
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (p.num_qo_heads / p.num_kv_heads);

  const std::int64_t first = p.base + block * kChunkTile;  // index of the block's first query
  const std::int64_t last = p.base + min((block + 1) * kChunkTile, p.tokens) - 1;
  // Of a tree any node may stand where its root does.
  const ChunkTiles<kHeadDim> seen(p, kv_head, kTree ? p.base : first, last);
  const int count = seen.count;
  const int sink_tiles = seen.sink_tiles;
  const auto load_tile = [&](int n) {
    seen.load(n, tiles + n % 2 * seen.kElements);
    copies_commit();
  };

  std::uint32_t query[kSteps][4];
  const auto load_queries = [&](int which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows beyond the chunk repeat its last.
      const int token = min(block * kChunkTile + warp * 16 + g + 8 * half, p.tokens - 1);
      const std::uint16_t* const row =
          p.rotated +
          ((which * std::int64_t{p.tokens} + token) * p.num_qo_heads + head) * kHeadDim + 2 * t;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        query[s][half] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s);
        query[s][half + 2] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s + 8);
      }
    }
  };

  float out[kHeadDim / 8][4] = {};
  ChunkSoftmax softmax;  // of rows g and g + 8
  const std::int64_t own = first + warp * 16 + g;

  load_tile(0);
  load_queries(sink_tiles > 0 ? 1 : 0);
  for (int n = 0; n < count; ++n) {
    copies_wait();
    __syncthreads();
    if (n + 1 < count) load_tile(n + 1);
    if (n == sink_tiles && n > 0) load_queries(0);
    const std::uint16_t* const key_tile = tiles + n % 2 * (2 * kChunkTile * kRow);
    const std::uint16_t* const value_tile = key_tile + kChunkTile * kRow;

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
    const std::int64_t from = seen.first_key(n);
    const std::int64_t window = n < sink_tiles ? DecodeStepConfig::kUnlimitedWindow : p.window;
    const bool whole = from + kChunkTile - 1 <= (kTree ? p.base - 1 : first) &&
                       from + kChunkTile <= seen.end_key(n) && from > last - window;
    if (!whole) {
      const std::int64_t end = seen.end_key(n);
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t k = from + 8 * b + 2 * t + i % 2;
          if constexpr (kTree) {
            // Rows beyond the chunk repeat its last.
            const std::int64_t node =
                min(own + i / 2 * 8 - p.base, static_cast<std::int64_t>(p.tokens) - 1);
            const bool shown = k < end && (k >= p.base ? p.sees(node, k - p.base)
                                                       : k > p.base + p.depth(node) - window);
            if (!shown) s[b][i] = -kInfinity;
          } else {
            const std::int64_t q = own + i / 2 * 8;
            if (k > q || k >= end || k <= q - window) s[b][i] = -kInfinity;
          }
        }
    }

    float factor[2];
    softmax.add(s, p.scale_log2, factor);
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
  softmax.finish();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = block * kChunkTile + warp * 16 + g + 8 * half;
    if (token >= p.tokens) continue;
    const float scale = 1 / softmax.sum[half];  // a query sees itself: never 0
    const std::int64_t at =
        (static_cast<std::int64_t>(token) * p.num_qo_heads + head) * kHeadDim + 2 * t;
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c) {
      const float2 y = {out[c][2 * half] * scale, out[c][2 * half + 1] * scale};
      if (p.wide)
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at + 8 * c) = y;
      else
        *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(p.out) + at + 8 * c) =
            H::pack(y.x, y.y);
    }
  }
}

inline constexpr int kFewTokens = 8;
inline constexpr int kFewStages = 3;
inline constexpr int kFewRows = 2 * kFewTokens;
inline constexpr int kFewParts = 8;  // blocks that divide the keys between them, at most
inline constexpr int kFewWarps = kChunkThreads / kWarpSize;
inline constexpr int kFewKeys = kChunkTile / kFewWarps;  // of a tile that a warp looks at

/// At most 8 queries: keys are divided instead. A block is the queries of one head or two of a KV
/// head (the halves of a fragment's 16 rows) and a part of the tiles, each warp 16 keys of a tile;
/// warps merge in shared memory, and the blocks of a cluster, which hold all parts, in each
/// other's. Order of sums: warps, then blocks. Of codes, a warp widens its keys and values of a
/// tile when they have come.
template <class Element, int kHeadDim, class Cache>
__global__ void __launch_bounds__(kChunkThreads)
    few_attention_kernel(const __grid_constant__ ChunkAttentionParams p) {
  using H = Half<Element>;
  using Tiles = ChunkTiles<kHeadDim>;
  constexpr int kSteps = kHeadDim / 16;
  const float kInfinity = __int_as_float(0x7f800000);
  extern __shared__ __align__(16) unsigned char few_memory[];
  // Tiles [stages, 2 (keys, values), 64, kRow]; of codes [stages, kCodeBytes], and one tile as it
  // is widened; later outputs [warps, rows, channels].
  std::uint16_t* const tiles = reinterpret_cast<std::uint16_t*>(few_memory);
  float* const outputs = reinterpret_cast<float*>(few_memory);
  __shared__ float maxima[kFewWarps][kFewRows];
  __shared__ float sums[kFewWarps][kFewRows];
  __shared__ float shares[kFewParts][kFewRows];  // of the blocks in the result

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const ClusterPlace cluster = cluster_place();
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int heads = group % 2 == 0 ? 2 : 1;  // of this block
  const int first_head = static_cast<int>(blockIdx.y) * heads;
  const Tiles seen(p, first_head / group, p.base, p.base + p.tokens - 1);
  const int begin = seen.count * cluster.rank / cluster.size;
  const int end = seen.count * (cluster.rank + 1) / cluster.size;

  const auto load_tile = [&](int n) {
    const int stage = (n - begin) % kFewStages;
    if constexpr (CudaCode<Cache>) {
      if (n < end) seen.load_codes(n, few_memory + stage * Tiles::kCodeBytes);
    } else {
      if (n < end) seen.load(n, tiles + stage * Tiles::kElements);
    }
    copies_commit();
  };
  // The first of the warp's rows of tile n, keys first, values a tile further on.
  const auto rows_of_tile = [&](int n) -> const std::uint16_t* {
    const int stage = (n - begin) % kFewStages;
    const int first_row = warp * kFewKeys;
    if constexpr (CudaCode<Cache>) {
      const unsigned char* const codes = few_memory + stage * Tiles::kCodeBytes;
      const auto* const scales = reinterpret_cast<const float*>(codes + Tiles::kCodes);
      auto* const wide =
          reinterpret_cast<std::uint16_t*>(few_memory + kFewStages * Tiles::kCodeBytes);
      constexpr int kVectors = kHeadDim / 8;
#pragma unroll 4
      for (int i = lane; i < 2 * kFewKeys * kVectors; i += kWarpSize) {
        const int of_warp = i / kVectors;  // keys, then values
        const int c = i % kVectors * 8;
        const int row = of_warp / kFewKeys * kChunkTile + first_row + of_warp % kFewKeys;
        *reinterpret_cast<uint4*>(wide + row * Tiles::kRow + c) = widen_codes<Element, Cache>(
            *reinterpret_cast<const uint2*>(codes + row * kHeadDim + c), scales[row]);
      }
      __syncwarp();
      return wide + first_row * Tiles::kRow;
    } else {
      return tiles + stage * Tiles::kElements + first_row * Tiles::kRow;
    }
  };
  const auto load_first = [&] {
#pragma unroll
    for (int i = 0; i < kFewStages - 1; ++i) load_tile(begin + i);
  };
  // Tokens of earlier chunks are in the cache since long ago.
  const int ahead = min(begin + kFewStages - 1, end);
  const bool early = ahead == begin ||
                     min(seen.first_key(ahead - 1) + kChunkTile, seen.end_key(ahead - 1)) <= p.base;
  if (early) load_first();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!early) load_first();

  // Row g is query g of the first head, row g + 8 of the second; what is not there repeats.
  const int token = min(g, p.tokens - 1);
  std::uint32_t query[kSteps][4];
  const auto load_queries = [&](int which) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + min(half, heads - 1);
      const std::uint16_t* const row =
          p.rotated +
          ((which * std::int64_t{p.tokens} + token) * p.num_qo_heads + head) * kHeadDim + 2 * t;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        query[s][half] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s);
        query[s][half + 2] = *reinterpret_cast<const std::uint32_t*>(row + 16 * s + 8);
      }
    }
  };

  float out[kHeadDim / 8][4] = {};
  ChunkSoftmax softmax;
  const std::int64_t own = p.base + token;
  load_queries(begin < seen.sink_tiles ? 1 : 0);
  for (int n = begin; n < end; ++n) {
    copies_wait_but<kFewStages - 2>();
    __syncthreads();
    load_tile(n + kFewStages - 1);
    if (n == seen.sink_tiles && n > begin) load_queries(0);
    const std::uint16_t* const key_tile = rows_of_tile(n);
    const std::uint16_t* const value_tile = key_tile + kChunkTile * Tiles::kRow;

    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t r[4];
      load_matrices(
          r, key_tile + (lane / 16 * 8 + lane % 8) * Tiles::kRow + 16 * step + lane / 8 % 2 * 8);
      H::multiply_add(s[0], query[step], r[0], r[1]);
      H::multiply_add(s[1], query[step], r[2], r[3]);
    }
    const std::int64_t from = seen.first_key(n) + warp * kFewKeys + 2 * t;
    const std::int64_t window = n < seen.sink_tiles ? DecodeStepConfig::kUnlimitedWindow : p.window;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t k = from + 8 * b + i % 2;
        if (k > own || k >= seen.end_key(n) || k <= own - window) s[b][i] = -kInfinity;
      }
    float factor[2];
    softmax.add(s, p.scale_log2, factor);
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[c][i] *= factor[i / 2];
    const std::uint32_t a[4] = {H::pack(s[0][0], s[0][1]), H::pack(s[0][2], s[0][3]),
                                H::pack(s[1][0], s[1][1]), H::pack(s[1][2], s[1][3])};
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; c += 2) {
      std::uint32_t r[4];
      load_matrices_transposed(
          r, value_tile + (lane / 8 % 2 * 8 + lane % 8) * Tiles::kRow + 8 * c + lane / 16 * 8);
      H::multiply_add(out[c], a, r[0], r[1]);
      H::multiply_add(out[c + 1], a, r[2], r[3]);
    }
  }
  softmax.finish();
  __syncthreads();  // tiles have been read

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    if (t == 0) {
      maxima[warp][row] = softmax.maximum[half];
      sums[warp][row] = softmax.sum[half];
    }
    float* const to = outputs + (warp * kFewRows + row) * kHeadDim + 2 * t;
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
      *reinterpret_cast<float2*>(to + 8 * c) = {out[c][2 * half], out[c][2 * half + 1]};
  }
  __syncthreads();
  // Of the warps, into the first one's place.
  for (int i = tid; i < kFewRows * kHeadDim; i += kChunkThreads) {
    const int row = i / kHeadDim;
    float most = -kInfinity;
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w) most = fmaxf(most, maxima[w][row]);
    const float base = most == -kInfinity ? 0 : most;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w)
      sum = fmaf(power_of_two(maxima[w][row] - base), outputs[w * kFewRows * kHeadDim + i], sum);
    outputs[i] = sum;
  }
  float most = -kInfinity;
  float total = 0;
  if (tid < kFewRows) {
    for (int w = 0; w < kFewWarps; ++w) most = fmaxf(most, maxima[w][tid]);
    const float base = most == -kInfinity ? 0 : most;
    for (int w = 0; w < kFewWarps; ++w) total += power_of_two(maxima[w][tid] - base) * sums[w][tid];
  }
  __syncthreads();
  if (tid < kFewRows) {
    maxima[0][tid] = most;
    sums[0][tid] = total;
  }
  __syncthreads();
  if (cluster.size > 1) {
    cluster_publish();
    cluster_wait();
  }

  // Each block finishes a part of the channels of all rows.
  const auto finish = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    if (tid < kFewRows) {
      float tops[kSize];
      float totals[kSize];
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) {
        tops[rank] = read_of_block(&maxima[0][tid], rank);
        totals[rank] = read_of_block(&sums[0][tid], rank);
      }
      float top = -kInfinity;
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) top = fmaxf(top, tops[rank]);
      float sum = 0;
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) {  // a query sees itself: the top is a number
        tops[rank] = power_of_two(tops[rank] - top);
        sum = fmaf(tops[rank], totals[rank], sum);
      }
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) shares[rank][tid] = tops[rank] / sum;
    }
    __syncthreads();
    constexpr int kChannels = kHeadDim / kSize;
    for (int i = tid; i < kFewRows * kChannels; i += kChunkThreads) {
      const int row = i / kChannels;
      const int channel = cluster.rank * kChannels + i % kChannels;
      if (row % kFewTokens >= p.tokens || row / kFewTokens >= heads) continue;
      float parts[kSize];
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank)
        parts[rank] = read_of_block(outputs + row * kHeadDim + channel, rank);
      float y = 0;
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) y = fmaf(shares[rank][row], parts[rank], y);
      const std::int64_t at = (static_cast<std::int64_t>(row % kFewTokens) * p.num_qo_heads +
                               first_head + row / kFewTokens) *
                                  kHeadDim +
                              channel;
      if (p.wide)
        static_cast<float*>(p.out)[at] = y;
      else
        static_cast<std::uint16_t*>(p.out)[at] = static_cast<std::uint16_t>(H::pack(y, 0));
    }
  };
  switch (cluster.size) {
    case 1: finish(std::integral_constant<int, 1>()); break;
    case 2: finish(std::integral_constant<int, 2>()); break;
    case 4: finish(std::integral_constant<int, 4>()); break;
    default: finish(std::integral_constant<int, kFewParts>());
  }
  // Others may still read this block's memory.
  if (cluster.size > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace detail

/// Which kernel attends.
enum class ChunkKernel {
  kAuto,    ///< kHopper where it runs; chunks of up to 8 tokens by one that divides the keys
  kMma,     ///< every GPU, every shape
  kHopper,  ///< wgmma and the copy engine: H100 and H200, head size 128, at most 16 sinks
};

/// Scratch and launches of a chunk's attention; layers share it. Only construction allocates.
/// Queries and probabilities are rounded to Element once: outputs are within 2^-8 of exact ones
/// where decode_attention()'s are within 2^-16. Caches of codes are read rounded to Element as
/// well, and cost a scratch of one layer's rows in Element.
template <class Element, int kHeadDim, class Cache = Element>
class ChunkAttentionPlan {
 public:
  /// For chunks of up to `max_tokens`. overlap: what launch() launches may start early, and lets
  /// the next kernel start (sm_90 and later). \throws Error(kShape, kDevice).
  ChunkAttentionPlan(const DecodeAttentionShape& shape, const DecodeStepConfig& step,
                     std::int64_t max_tokens, ChunkKernel kernel = ChunkKernel::kAuto,
                     bool overlap = false)
      : shape_(shape), max_tokens_(max_tokens), overlap_(overlap) {
    const bool limited = step.window_size < DecodeStepConfig::kUnlimitedWindow;
    // The chunk's first query still sees keys that its last one's would have evicted.
    const std::int64_t most =
        limited ? step.capacity - step.num_sink_tokens - step.window_size + 1 : step.capacity;
    if (max_tokens < 1 || max_tokens > most)
      throw Error(ErrorCode::kShape,
                  {"a chunk does not fit the cache", "ChunkAttentionPlan", "max_tokens",
                   "1 to " + std::to_string(most), std::to_string(max_tokens)});
    rotated_ = Buffer<std::uint16_t, cuda>(
        static_cast<std::size_t>(2 * max_tokens * shape.num_qo_heads * kHeadDim));
    rows_ = Buffer<float, cuda>(static_cast<std::size_t>(max_tokens) * 4 * step.frequencies.size());
    if (CudaCode<Cache>)
      for (Buffer<std::uint16_t, cuda>* wide : {&wide_keys_, &wide_values_})
        *wide = Buffer<std::uint16_t, cuda>(
            static_cast<std::size_t>(shape.num_kv_heads * step.capacity * kHeadDim));
    for (const auto kernel_of_all : {kernel_, tree_kernel_})
      check_cuda(cudaFuncSetAttribute(kernel_of_all, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kSharedBytes),
                 "cudaFuncSetAttribute");
    int device = 0;
    int major = 0;
    int most_shared = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    check_cuda(
        cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
    // Without clusters keys are not divided.
    if (kernel == ChunkKernel::kAuto && major >= 9 && kFewBytes + 1024 <= most_shared) {
      int multiprocessors = 0;
      check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                 "cudaDeviceGetAttribute");
      check_cuda(
          cudaFuncSetAttribute(few_kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, kFewBytes),
          "cudaFuncSetAttribute");
      few_parts_ = 1;
      while (few_parts_ < detail::kFewParts && 2 * few_parts_ * few_blocks() <= multiprocessors)
        few_parts_ *= 2;
    }
    if constexpr (kHeadDim == detail::kItemDim) {
      if (kernel != ChunkKernel::kMma && step.num_sink_tokens <= detail::kItemSinks)
        multiprocessors_ = detail::hopper_multiprocessors();
      if (multiprocessors_ > 0) {
        hopper_kernel_ = detail::hopper_attention_kernel<Element>;
        check_cuda(cudaFuncSetAttribute(hopper_kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        detail::kItemSharedBytes),
                   "cudaFuncSetAttribute");
      }
    }
    if (kernel == ChunkKernel::kHopper && multiprocessors_ == 0)
      throw Error(ErrorCode::kConfig,
                  {"no such kernel here", "ChunkAttentionPlan", "kernel",
                   "an H100 or H200, head size 128, at most 16 sinks", "something else"});
  }

  std::int64_t max_tokens() const { return max_tokens_; }
  /// kMma or kHopper.
  ChunkKernel kernel() const {
    return multiprocessors_ > 0 ? ChunkKernel::kHopper : ChunkKernel::kMma;
  }

  /// Forms the rotations of the tokens `base` .. `base + tokens - 1`: once for all layers.
  void rotate(const DecodeStep& step, std::int64_t base, std::int64_t tokens, cudaStream_t stream,
              const ChunkTree& tree = {}) {
    if (step.rotary_dim() == 0) return;
    ChunkAttentionTensors<Element, Cache> none;
    none.tree = tree;
    const detail::ChunkAttentionParams p = params(step, none, base, tokens, 1);
    detail::chunk_rotation_kernel<detail::kChunkThreads>
        <<<static_cast<unsigned>(tokens), detail::kChunkThreads, 0, stream>>>(p);
    check_cuda(cudaGetLastError(), "chunk_rotation_kernel");
  }

  /// Appends the chunk to the cache and attends. `step` is not changed: its owner counts.
  /// Preconditions: rotate() for the same tokens and tree; alignment and extents as
  /// ChunkAttentionTensors says; a full cache has room. \throws Error(kDevice) if a launch is
  /// refused.
  void launch(const DecodeStep& step, const ChunkAttentionTensors<Element, Cache>& x,
              std::int64_t base, std::int64_t tokens, float sm_scale, cudaStream_t stream) {
    const detail::ChunkAttentionParams p = params(step, x, base, tokens, sm_scale);
    detail::launch_kernel("chunk_append_kernel",
                          detail::chunk_append_kernel<Element, kHeadDim, Cache>,
                          dim3(static_cast<unsigned>(tokens), append_parts(tokens)),
                          detail::kRowThreads, stream, overlap_, p);
    attend(step, x, base, tokens, sm_scale, stream);
  }

  /// The second half of launch(): attention alone, of the chunk that launch() rotated and appended
  /// last. For measurements.
  void attend(const DecodeStep& step, const ChunkAttentionTensors<Element, Cache>& x,
              std::int64_t base, std::int64_t tokens, float sm_scale, cudaStream_t stream) {
    const detail::ChunkAttentionParams p = params(step, x, base, tokens, sm_scale);
    if (few_parts_ > 0 && tokens <= detail::kFewTokens && x.tree.depths == nullptr)
      return attend_few(p, stream);
    if constexpr (CudaCode<Cache>) widen(step, p, stream);
    if constexpr (kHeadDim == detail::kItemDim) {
      if (multiprocessors_ > 0 && x.tree.depths == nullptr) return attend_hopper(step, p, stream);
    }
    const dim3 grid(static_cast<unsigned>((tokens + detail::kChunkTile - 1) / detail::kChunkTile),
                    static_cast<unsigned>(shape_.num_qo_heads));
    detail::launch_kernel_with("chunk_attention_kernel",
                               x.tree.depths == nullptr ? kernel_ : tree_kernel_, grid,
                               detail::kChunkThreads, kSharedBytes, stream, overlap_, p);
  }

 private:
  static constexpr int kSharedBytes =
      4 * detail::kChunkTile * (kHeadDim + detail::kChunkPadding) * 2;

  using Tiles = detail::ChunkTiles<kHeadDim>;
  static constexpr int kFewBytes =
      std::max(CudaCode<Cache> ? detail::kFewStages * Tiles::kCodeBytes + 2 * Tiles::kElements
                               : detail::kFewStages * Tiles::kElements * 2,
               detail::kFewWarps* detail::kFewRows* kHeadDim * 4);

  /// Blocks that share a token's rotation: few tokens would leave most of the chip idle.
  unsigned append_parts(std::int64_t tokens) const {
    const std::int64_t pairs = (shape_.num_qo_heads + shape_.num_kv_heads) * kHeadDim;
    const std::int64_t most = (pairs + detail::kRowThreads - 1) / detail::kRowThreads;
    return static_cast<unsigned>(std::clamp<std::int64_t>(256 / tokens, 1, most));
  }

  /// Blocks that share no keys' part: of one query head, or two.
  int few_blocks() const {
    const auto heads = static_cast<int>(shape_.num_qo_heads);
    return shape_.num_qo_heads / shape_.num_kv_heads % 2 == 0 ? heads / 2 : heads;
  }
  /// Widens what has been written of a cache of codes, the chunk included.
  void widen(const DecodeStep& step, const detail::ChunkAttentionParams& p, cudaStream_t stream) {
    const std::int64_t slots = std::min(p.base + p.tokens, step.config().capacity);
    const std::int64_t vectors = slots * (kHeadDim / 8);
    const auto parts =
        static_cast<unsigned>((vectors + detail::kRowThreads - 1) / detail::kRowThreads);
    detail::launch_kernel("widen_cache_kernel",
                          detail::widen_cache_kernel<Element, kHeadDim, Cache>,
                          dim3(parts, static_cast<unsigned>(p.num_kv_heads), 2),
                          detail::kRowThreads, stream, overlap_, p, slots);
  }
  void attend_few(const detail::ChunkAttentionParams& p, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(few_parts_), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(few_parts_), static_cast<unsigned>(few_blocks()));
    launch.blockDim = dim3(detail::kChunkThreads);
    launch.dynamicSmemBytes = kFewBytes;
    launch.stream = stream;
    launch.attrs = attributes;
    launch.numAttrs = overlap_ ? 2 : 1;
    check_cuda(cudaLaunchKernelEx(&launch, few_kernel_, p), "few_attention_kernel");
  }

  void attend_hopper(const DecodeStep& step, const detail::ChunkAttentionParams& p,
                     cudaStream_t stream) {
    constexpr std::uint64_t kDim = kHeadDim;
    const auto heads = static_cast<std::uint64_t>(p.num_qo_heads);
    const auto tokens = static_cast<std::uint64_t>(p.tokens);
    const std::int64_t capacity = step.config().capacity;
    const std::uint64_t dims[3] = {kDim, static_cast<std::uint64_t>(capacity),
                                   static_cast<std::uint64_t>(p.num_kv_heads)};
    const std::uint64_t strides[2] = {static_cast<std::uint64_t>(2 * p.token_stride),
                                      static_cast<std::uint64_t>(2 * p.head_stride)};
    const std::uint32_t tile[3] = {64, detail::kItemKeys, 1};
    const std::uint32_t sinks[3] = {64, detail::kItemSinks, 1};
    // What runs at once reads the windows of a band of heads, and as many blocks of queries further
    // on: that must stay in the second-level cache, of which a multiprocessor is near to one half.
    constexpr std::int64_t kNear = std::int64_t{20} << 20;
    constexpr std::int64_t kRowBytes = 2 * 2 * kHeadDim;
    const std::int64_t group = p.num_qo_heads / p.num_kv_heads;
    const std::int64_t queries = multiprocessors_ / group * detail::kItemQueries;
    const std::int64_t seen = std::min(p.window, p.base + p.tokens);
    const std::int64_t band =
        std::clamp<std::int64_t>((kNear / kRowBytes - queries) / seen, 1, p.num_kv_heads);
    detail::HopperAttentionParams params{
        .query =
            detail::tensor_map<Element, 4>(p.rotated, {kDim, heads, tokens, 2},
                                           {2 * kDim, 2 * kDim * heads, 2 * kDim * heads * tokens},
                                           {64, 1, detail::kItemQueries, 1}),
        .keys = detail::tensor_map<Element, 3>(p.keys, dims, strides, tile),
        .values = detail::tensor_map<Element, 3>(p.values, dims, strides, tile),
        .sink_keys = detail::tensor_map<Element, 3>(p.keys, dims, strides, sinks),
        .sink_values = detail::tensor_map<Element, 3>(p.values, dims, strides, sinks),
        .out = p.out,
        .wide = p.wide,
        .base = p.base,
        .window = p.window,
        .tokens = p.tokens,
        .sinks = p.sinks,
        .ring = p.ring,
        .num_qo_heads = p.num_qo_heads,
        .group = static_cast<int>(group),
        .band = static_cast<int>(band * group),
        .written = static_cast<int>(std::min(p.base + p.tokens, capacity)),
        .scale_log2 = p.scale_log2};
    const std::int64_t items =
        (p.tokens + detail::kItemQueries - 1) / detail::kItemQueries * shape_.num_qo_heads;
    const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, multiprocessors_));
    detail::launch_kernel_with("hopper_attention_kernel", hopper_kernel_, dim3(blocks),
                               detail::kItemThreads, detail::kItemSharedBytes, stream, overlap_,
                               params);
  }

  detail::ChunkAttentionParams params(const DecodeStep& step,
                                      const ChunkAttentionTensors<Element, Cache>& x,
                                      std::int64_t base, std::int64_t tokens, float sm_scale) {
    const DecodeStepConfig& config = step.config();
    constexpr bool kCodes = CudaCode<Cache>;
    detail::ChunkCodes codes;
    if constexpr (kCodes)
      codes = {reinterpret_cast<std::uint8_t*>(x.keys),
               reinterpret_cast<std::uint8_t*>(x.values),
               x.key_scales,
               x.value_scales,
               x.head_stride,
               x.token_stride,
               x.scale_head_stride};
    return {.query = x.query,
            .key = x.key,
            .value = x.value,
            .out = x.out,
            .keys = kCodes ? wide_keys_.data() : reinterpret_cast<std::uint16_t*>(x.keys),
            .values = kCodes ? wide_values_.data() : reinterpret_cast<std::uint16_t*>(x.values),
            .codes = codes,
            .rotated = rotated_.data(),
            .rows = rows_.data(),
            .frequencies = step.frequencies(),
            .tree = x.tree,
            .stride = x.stride,
            .head_stride = kCodes ? config.capacity * kHeadDim : x.head_stride,
            .token_stride = kCodes ? kHeadDim : x.token_stride,
            .base = base,
            .window = config.window_size,
            .ceiling = step.ceiling(),
            .origin = config.origin,
            .attention_factor = config.attention_factor,
            .tokens = static_cast<int>(tokens),
            .sinks = static_cast<int>(config.num_sink_tokens),
            .ring = static_cast<int>(config.capacity - config.num_sink_tokens),
            .num_qo_heads = static_cast<int>(shape_.num_qo_heads),
            .num_kv_heads = static_cast<int>(shape_.num_kv_heads),
            .num_pairs = step.rotary_dim() / 2,
            .interleaved = config.interleaved,
            .wide = x.output_type == ElementType::kF32,
            .scale_log2 = sm_scale * 1.44269504088896340736F};
  }

  // What the attributes are set on (backend.cuh).
  using Kernel = void (*)(detail::ChunkAttentionParams);
  Kernel kernel_ = detail::chunk_attention_kernel<Element, kHeadDim, false>;
  Kernel tree_kernel_ = detail::chunk_attention_kernel<Element, kHeadDim, true>;
  Kernel few_kernel_ = detail::few_attention_kernel<Element, kHeadDim, Cache>;
  int few_parts_ = 0;  // blocks that divide the keys between them; 0: not used
  void (*hopper_kernel_)(detail::HopperAttentionParams) = nullptr;
  DecodeAttentionShape shape_;
  std::int64_t max_tokens_ = 0;
  bool overlap_ = false;
  int multiprocessors_ = 0;  // of a GPU that runs the Hopper kernel; 0: mma
  Buffer<std::uint16_t, cuda> rotated_;
  Buffer<float, cuda> rows_;
  Buffer<std::uint16_t, cuda> wide_keys_;    // [num_kv_heads, capacity, head_dim], of codes
  Buffer<std::uint16_t, cuda> wide_values_;  // the same
};

}  // namespace sluice
