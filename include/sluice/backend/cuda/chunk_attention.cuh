// SPDX-License-Identifier: MIT
/// Attention of a chunk of one sequence's new tokens on the GPU: rotates, appends to the ring, and
/// attends over sinks and window (or the full cache), on the tensor cores. The counterpart of
/// decode_attention.cuh for prefill: the same cache, the same positions, any chunking.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/hopper_attention.cuh"
#include "sluice/backend/cuda/memory.cuh"

namespace sluice {

/// The tensors of one layer's chunk, in device memory, as DecodeAttentionTensors has them.
template <class Element>
struct ChunkAttentionTensors {
  const float* query = nullptr;  ///< [tokens, num_qo_heads, head_dim], not rotated
  const float* key = nullptr;    ///< [tokens, num_kv_heads, head_dim], not rotated
  const float* value = nullptr;  ///< [tokens, num_kv_heads, head_dim]
  std::int64_t stride = 0;       ///< from token to token, of all three
  void* out = nullptr;           ///< [tokens, num_qo_heads, head_dim] of `output_type`, no gaps
  ElementType output_type = element_type_of<Element>;  ///< this or kF32

  Element* keys = nullptr;  ///< of the sequence: [num_kv_heads, capacity, head_dim] by the strides
  Element* values = nullptr;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
};

namespace detail {

inline constexpr int kChunkTile = 64;  // queries of a block, keys of a tile
inline constexpr int kChunkThreads = 128;
/// Elements that widen a row in shared memory, so that eight rows' 16 bytes lie in distinct banks.
inline constexpr int kChunkPadding = 8;

struct ChunkAttentionParams {
  const float* query;
  const float* key;
  const float* value;
  void* out;
  std::uint16_t* keys;
  std::uint16_t* values;
  std::uint16_t* rotated;  // [2 (own place, sinks), tokens, num_qo_heads, head_dim]
  float* rows;             // [tokens, 2 (own place, sinks), 2 (cos, sin), num_pairs]
  const TurnFrequency* frequencies;
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
};

/// Cosines and sines of a chunk's tokens: a block per token.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    chunk_rotation_kernel(const __grid_constant__ ChunkAttentionParams p) {
  const std::int64_t own = p.base + blockIdx.x;
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

/// Rotates queries to both their places and appends keys and values: a block per token.
template <class Element, int kHeadDim>
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
  const int kv_pairs = p.num_kv_heads * kPairs;
  for (int e = static_cast<int>(threadIdx.x); e < 2 * query_pairs + 2 * kv_pairs;
       e += kRowThreads) {
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

/// A block is 64 queries of one head; a warp 16 of them. Keys come in tiles of 64, in the order of
/// their indices, first the sinks, then what the window shows.
template <class Element, int kHeadDim>
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
  const std::uint16_t* const keys = p.keys + kv_head * p.head_stride;
  const std::uint16_t* const values = p.values + kv_head * p.head_stride;

  const std::int64_t first = p.base + block * kChunkTile;  // index of the block's first query
  const std::int64_t last = p.base + min((block + 1) * kChunkTile, p.tokens) - 1;
  const std::int64_t sinks_seen = min(static_cast<std::int64_t>(p.sinks), last + 1);
  const std::int64_t oldest = max(static_cast<std::int64_t>(p.sinks), first - p.window + 1);
  const int sink_tiles = static_cast<int>((sinks_seen + kChunkTile - 1) / kChunkTile);
  const int ring_tiles =
      last < oldest ? 0 : static_cast<int>((last - oldest + kChunkTile) / kChunkTile);
  const int count = sink_tiles + ring_tiles;
  const auto first_key = [&](int n) {
    return n < sink_tiles ? std::int64_t{n} * kChunkTile
                          : oldest + std::int64_t{n - sink_tiles} * kChunkTile;
  };
  const auto end_key = [&](int n) {
    return n < sink_tiles ? sinks_seen : last + 1;
  };

  const auto load_tile = [&](int n) {
    const std::int64_t from = first_key(n);
    const auto slot0 = static_cast<int>(p.slot(from));
    const auto present = static_cast<int>(min(end_key(n) - from, std::int64_t{kChunkTile}));
    std::uint16_t* const to = tiles + n % 2 * (2 * kChunkTile * kRow);
    constexpr int kVectors = kHeadDim / 8;
    for (int i = tid; i < kChunkTile * kVectors; i += kChunkThreads) {
      const int j = i / kVectors;
      const int c = i % kVectors * 8;
      const bool inside = j < present;
      int slot = inside ? slot0 + j : slot0;
      if (n >= sink_tiles && slot >= p.sinks + p.ring) slot = p.sinks + (slot - p.sinks) % p.ring;
      copy_async_or_zero(to + j * kRow + c, keys + slot * p.token_stride + c, inside);
      copy_async_or_zero(to + (kChunkTile + j) * kRow + c, values + slot * p.token_stride + c,
                         inside);
    }
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
  float maximum[2] = {-kInfinity, -kInfinity};  // of rows g and g + 8, base-2 scores
  float sum[2] = {0, 0};
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
    const std::int64_t from = first_key(n);
    const std::int64_t window = n < sink_tiles ? DecodeStepConfig::kUnlimitedWindow : p.window;
    const bool whole =
        from + kChunkTile - 1 <= first && from + kChunkTile <= end_key(n) && from > last - window;
    if (!whole) {
      const std::int64_t end = end_key(n);
#pragma unroll
      for (int b = 0; b < kKeyBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t k = from + 8 * b + 2 * t + i % 2;
          const std::int64_t q = own + i / 2 * 8;
          if (k > q || k >= end || k <= q - window) s[b][i] = -kInfinity;
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
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffU, sum[half], 2);
    const int token = block * kChunkTile + warp * 16 + g + 8 * half;
    if (token >= p.tokens) continue;
    const float scale = 1 / sum[half];  // a query sees itself: never 0
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

}  // namespace detail

/// Which kernel attends.
enum class ChunkKernel {
  kAuto,    ///< kHopper where it runs
  kMma,     ///< every GPU, every shape
  kHopper,  ///< wgmma and the copy engine: H100 and H200, head size 128, at most 16 sinks
};

/// Scratch and launches of a chunk's attention; layers share it. Only construction allocates.
/// Queries and probabilities are rounded to Element once: outputs are within 2^-8 of exact ones
/// where decode_attention()'s are within 2^-16.
template <class Element, int kHeadDim>
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
    check_cuda(
        cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
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
  void rotate(const DecodeStep& step, std::int64_t base, std::int64_t tokens, cudaStream_t stream) {
    if (step.rotary_dim() == 0) return;
    const detail::ChunkAttentionParams p = params(step, {}, base, tokens, 1);
    detail::chunk_rotation_kernel<detail::kChunkThreads>
        <<<static_cast<unsigned>(tokens), detail::kChunkThreads, 0, stream>>>(p);
    check_cuda(cudaGetLastError(), "chunk_rotation_kernel");
  }

  /// Appends the chunk to the cache and attends. `step` is not changed: its owner counts.
  /// Preconditions: rotate() for the same tokens; alignment and extents as ChunkAttentionTensors
  /// says; a full cache has room. \throws Error(kDevice) if a launch is refused.
  void launch(const DecodeStep& step, const ChunkAttentionTensors<Element>& x, std::int64_t base,
              std::int64_t tokens, float sm_scale, cudaStream_t stream) {
    const detail::ChunkAttentionParams p = params(step, x, base, tokens, sm_scale);
    detail::launch_kernel("chunk_append_kernel", detail::chunk_append_kernel<Element, kHeadDim>,
                          dim3(static_cast<unsigned>(tokens)), detail::kRowThreads, stream,
                          overlap_, p);
    attend(step, x, base, tokens, sm_scale, stream);
  }

  /// The second half of launch(): attention alone, of the chunk that launch() rotated and appended
  /// last. For measurements.
  void attend(const DecodeStep& step, const ChunkAttentionTensors<Element>& x, std::int64_t base,
              std::int64_t tokens, float sm_scale, cudaStream_t stream) {
    const detail::ChunkAttentionParams p = params(step, x, base, tokens, sm_scale);
    if constexpr (kHeadDim == detail::kItemDim) {
      if (multiprocessors_ > 0) return attend_hopper(step, p, stream);
    }
    const dim3 grid(static_cast<unsigned>((tokens + detail::kChunkTile - 1) / detail::kChunkTile),
                    static_cast<unsigned>(shape_.num_qo_heads));
    detail::launch_kernel_with("chunk_attention_kernel", kernel_, grid, detail::kChunkThreads,
                               kSharedBytes, stream, overlap_, p);
  }

 private:
  static constexpr int kSharedBytes =
      4 * detail::kChunkTile * (kHeadDim + detail::kChunkPadding) * 2;

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
                                      const ChunkAttentionTensors<Element>& x, std::int64_t base,
                                      std::int64_t tokens, float sm_scale) {
    const DecodeStepConfig& config = step.config();
    return {.query = x.query,
            .key = x.key,
            .value = x.value,
            .out = x.out,
            .keys = reinterpret_cast<std::uint16_t*>(x.keys),
            .values = reinterpret_cast<std::uint16_t*>(x.values),
            .rotated = rotated_.data(),
            .rows = rows_.data(),
            .frequencies = step.frequencies(),
            .stride = x.stride,
            .head_stride = x.head_stride,
            .token_stride = x.token_stride,
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
  void (*kernel_)(detail::ChunkAttentionParams) = detail::chunk_attention_kernel<Element, kHeadDim>;
  void (*hopper_kernel_)(detail::HopperAttentionParams) = nullptr;
  DecodeAttentionShape shape_;
  std::int64_t max_tokens_ = 0;
  bool overlap_ = false;
  int multiprocessors_ = 0;  // of a GPU that runs the Hopper kernel; 0: mma
  Buffer<std::uint16_t, cuda> rotated_;
  Buffer<float, cuda> rows_;
};

}  // namespace sluice
