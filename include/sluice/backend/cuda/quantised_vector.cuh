// SPDX-License-Identifier: MIT
/// Products of a quantised matrix with one vector, as matrix_vector.cuh has them for 16-bit ones:
/// the same launches, the same epilogues, a fourth to a half of the bytes.
///
/// How it works. Memory is read as there: a block's tiles (quantised_layout.hpp) are one run, cut
/// into equal spans of chunks, one per warp, through a ring that is filled before the kernel waits
/// for the one before it. Widening every weight to float32 and reading its x would cost more
/// instructions and shared memory than the bus leaves time for at 4 bits. So levels become f16
/// (exact: integers up to 128), and a tensor core multiplies 8 rows' levels (matrix B) by x (matrix
/// A): x 2^e = high + low, both f16, in alternate rows of A; e for each chunk's columns such that
/// the largest fits. An x is then off by 2^-23 of itself at most, or by 2^-39 of its chunk's
/// largest where that is more. Products of levels are exact in float32; sums are float32, by blocks
/// of one scale, and each block's sum meets its scale once.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/quantised_layout.hpp"
#include "sluice/core/element.hpp"

namespace sluice {

/// One product, as MatrixVectorTask. All pointers are device memory, aligned to 16 bytes.
struct QuantisedVectorTask {
  ElementType type = ElementType::kF32;  ///< a type with is_quantised()
  const std::uint8_t* matrix = nullptr;  ///< [quantised_bytes(type, rows, cols)]
  std::int64_t rows = 0;
  std::int64_t cols = 0;        ///< a multiple of the type's block
  const float* x = nullptr;     ///< [cols]
  const float* norm = nullptr;  ///< [cols] or null, as MatrixVectorTask::norm
  float norm_eps = 0;
  float* y = nullptr;  ///< [rows], kGatedSilu: [rows / 2]

  // kChoose only.
  TokenCandidate* candidates = nullptr;  ///< [QuantisedVectorPlan::blocks()]
  TokenChoice choice{};
  const std::int64_t* totals = nullptr;  ///< as MatrixVectorTask::totals
  std::int64_t sequence = 0;
};

namespace detail {

struct QuantisedVectorParams {
  MatrixVectorParams common;
  VectorEpilogue epilogue;
};

/// Chunks per warp in flight. Two blocks share a multiprocessor with 14,336 columns; 5 and 6 stages
/// are as fast at 4 bits and slower at 8 (bench/cuda/NOTES.md).
inline constexpr int kQuantisedStages = 4;

// Two levels as f16, exact: 2^10 + level is written into the bits, and 2^10 is taken away.

/// Bytes of `word` that `selector` names (0x4140: the first two, 0x4342: the last), less 128.
__device__ inline std::uint32_t halves_of_bytes(std::uint32_t word, std::uint32_t selector) {
  std::uint32_t result;
  asm("sub.f16x2 %0, %1, %2;"
      : "=r"(result)
      : "r"(__byte_perm(word, 0x64646464U, selector)), "r"(0x64806480U));
  return result;
}
/// Bits that `mask` keeps, and the two exponents: one instruction, of which one constant may be
/// written into it.
template <std::uint32_t kMask>
__device__ std::uint32_t masked_halves(std::uint32_t word) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;"  // (a & b) | c
      : "=r"(result)
      : "r"(word), "n"(kMask), "r"(0x64006400U));
  return result;
}
/// Nibbles 0 and 4 of `word`, less kOffset (0 or 8).
template <int kOffset>
__device__ std::uint32_t halves_of_nibbles(std::uint32_t word) {
  std::uint32_t result;
  asm("sub.f16x2 %0, %1, %2;"
      : "=r"(result)
      : "r"(masked_halves<0x000f000fU>(word)), "r"(kOffset == 8 ? 0x64086408U : 0x64006400U));
  return result;
}
/// Nibbles 1 and 5: (2^10 + 16 q) / 16 - 64 - kOffset.
template <int kOffset>
__device__ std::uint32_t halves_of_upper_nibbles(std::uint32_t word) {
  std::uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(masked_halves<0x00f000f0U>(word)), "r"(0x2c002c00U),
        "r"(kOffset == 8 ? 0xd480d480U : 0xd400d400U));
  return result;
}

/// 16 bytes to shared memory beside everything else, if `wanted`, without a branch.
__device__ inline void copy_async_if(void* to, const void* from, bool wanted) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %2, 0;\n\t"
      "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n\t}" ::"r"(
          static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(wanted ? 1 : 0)
      : "memory");
}

/// What a thread needs of a chunk, and its part of the product. The two sums of a thread belong to
/// rows 2 t and 2 t + 1 of the tile, t = lane % 4.
template <ElementType kType>
struct QuantisedChunk {
  static constexpr QuantisedLayout kLayout = quantised_layout(kType);
  static constexpr bool kBytes = kLayout.chunk_cols == 64;
  static constexpr int kOffset = kType == ElementType::kQ4_0 ? 8 : 0;
  static constexpr int kPairs = kLayout.chunk_cols / 32;  // of 16 columns

  uint4 levels;
  uint4 scales;     // the first table of the layout, and the second of bytes
  uint4 more = {};  // the last table, where there is one

  __device__ void load(const unsigned char* chunk, int lane) {
    const int t = lane % 4;
    levels = *reinterpret_cast<const uint4*>(chunk + 16 * lane);
    const unsigned char* const from = chunk + kQuantisedLevelBytes;
    if constexpr (kBytes) {
      const uint2 s = *reinterpret_cast<const uint2*>(from + 8 * t);
      scales = {s.x, s.y, 0, 0};
      if constexpr (kType == ElementType::kQ6_K)
        more.x = *reinterpret_cast<const std::uint32_t*>(from + 32 + 4 * t);
    } else {
      scales = *reinterpret_cast<const uint4*>(from + 16 * t);
      if constexpr (kType == ElementType::kQ4_1)
        more = *reinterpret_cast<const uint4*>(from + 64 + 16 * t);
      if constexpr (kType == ElementType::kQ4_K) {
        const uint2 d = *reinterpret_cast<const uint2*>(from + 64 + 8 * t);
        more = {d.x, d.y, 0, 0};
      }
    }
  }

  /// x: the thread's part of the chunk's x; x_sums: of its blocks of 32 columns, read if there are
  /// minima. `own`: 1 in threads whose part counts minima, else 0. Returns sums that are to be
  /// multiplied by the chunk's 2^-e.
  __device__ float2 multiply(const uint4* x, const float* x_sums, float own) const {
    const std::uint32_t words[4] = {levels.x, levels.y, levels.z, levels.w};
    const std::uint32_t scale_words[4] = {scales.x, scales.y, scales.z, scales.w};
    const std::uint32_t more_words[4] = {more.x, more.y, more.z, more.w};
    float2 sum = {0, 0};
    float2 minima = {0, 0};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      // One matrix A for both: its rows 0 ... 7 are x at the first 16 columns, 8 ... 15 at the
      // second. What each product has in the other's rows is not looked at.
      const uint4 quad = x[8 * pair];
      const std::uint32_t a[4] = {quad.x, quad.y, quad.z, quad.w};
      float first[4] = {0, 0, 0, 0};
      float second[4] = {0, 0, 0, 0};
      if constexpr (kBytes) {
        const std::uint32_t low = words[2 * pair];
        const std::uint32_t high = words[2 * pair + 1];
        Half<f16>::multiply_add(first, a, halves_of_bytes(low, 0x4140),
                                halves_of_bytes(low, 0x4342));
        Half<f16>::multiply_add(second, a, halves_of_bytes(high, 0x4140),
                                halves_of_bytes(high, 0x4342));
      } else {
        const std::uint32_t low = words[pair];
        const std::uint32_t high = words[pair] >> 8;
        Half<f16>::multiply_add(first, a, halves_of_nibbles<kOffset>(low),
                                halves_of_upper_nibbles<kOffset>(low));
        Half<f16>::multiply_add(second, a, halves_of_nibbles<kOffset>(high),
                                halves_of_upper_nibbles<kOffset>(high));
      }
      if constexpr (kType == ElementType::kQ6_K) {
        const std::uint32_t s = scale_words[pair];
        sum.x = fmaf(signed_byte(s, 0), first[0], sum.x);
        sum.y = fmaf(signed_byte(s, 1), first[1], sum.y);
        sum.x = fmaf(signed_byte(s, 2), second[2], sum.x);
        sum.y = fmaf(signed_byte(s, 3), second[3], sum.y);
        continue;
      }
      const float2 block = {first[0] + second[2], first[1] + second[3]};
      if constexpr (kType == ElementType::kQ4_K) {
        // scale words 0 and 1: scales of blocks 0, 1 and 2, 3; words 2 and 3: minima.
        const std::uint32_t s = scale_words[pair / 2] >> (pair % 2 * 16);
        const std::uint32_t m = scale_words[2 + pair / 2] >> (pair % 2 * 16);
        const float total = x_sums[pair];
        sum.x = fmaf(static_cast<float>(s & 0xffU), block.x, sum.x);
        sum.y = fmaf(static_cast<float>(s >> 8 & 0xffU), block.y, sum.y);
        minima.x = fmaf(static_cast<float>(m & 0xffU), total, minima.x);
        minima.y = fmaf(static_cast<float>(m >> 8 & 0xffU), total, minima.y);
      } else {
        const std::uint32_t s = scale_words[pair];
        sum.x = fmaf(Half<f16>::low(s), block.x, sum.x);
        sum.y = fmaf(Half<f16>::high(s), block.y, sum.y);
        if constexpr (kType == ElementType::kQ4_1) {
          const float total = x_sums[pair];
          minima.x = fmaf(Half<f16>::low(more_words[pair]), total, minima.x);
          minima.y = fmaf(Half<f16>::high(more_words[pair]), total, minima.y);
        }
      }
    }
    if constexpr (kType == ElementType::kQ6_K) {
      sum.x *= Half<f16>::low(more.x);
      sum.y *= Half<f16>::high(more.x);
    }
    if constexpr (kType == ElementType::kQ4_1) {
      sum.x = fmaf(own, minima.x, sum.x);
      sum.y = fmaf(own, minima.y, sum.y);
    }
    if constexpr (kType == ElementType::kQ4_K) {
      sum.x = Half<f16>::low(more.x) * sum.x - own * Half<f16>::low(more.y) * minima.x;
      sum.y = Half<f16>::high(more.x) * sum.y - own * Half<f16>::high(more.y) * minima.y;
    }
    return sum;
  }

 private:
  static __device__ float signed_byte(std::uint32_t word, int index) {
    return static_cast<float>(static_cast<std::int8_t>(word >> (8 * index)));
  }
};

/// Shared memory of a launch: x as high and low halves; the ring; x's sums by blocks of 32 columns,
/// where there are minima; 2^-e by chunks; the rows' sums.
struct QuantisedMemory {
  std::int64_t ring;
  std::int64_t x_sums;
  std::int64_t factors;
  std::int64_t sums;
  std::int64_t bytes;
};
__host__ __device__ inline QuantisedMemory quantised_memory(const QuantisedLayout& layout,
                                                            std::int64_t chunks,
                                                            std::int64_t rows_of_block) {
  QuantisedMemory m{};
  m.ring = chunks * layout.chunk_cols * 4;
  m.x_sums = m.ring + std::int64_t{kQuantisedStages} * kVectorWarps * layout.chunk_bytes;
  m.factors = m.x_sums + (layout.has_min ? chunks * layout.chunk_cols / 32 * 4 : 0);
  m.sums = m.factors + (chunks + 3) / 4 * 16;
  m.bytes = m.sums + rows_of_block * 4;
  return m;
}

template <ElementType kType>
__global__ void __launch_bounds__(kVectorThreads, 2)
    quantised_vector_kernel(const __grid_constant__ QuantisedVectorParams params) {
  constexpr QuantisedLayout kLayout = QuantisedChunk<kType>::kLayout;
  constexpr int kStages = kQuantisedStages;
  constexpr int kScaleRuns = (kLayout.chunk_bytes - kQuantisedLevelBytes) / 16;
  constexpr int kQuads = kLayout.chunk_cols / 4;  // threads that arrange a chunk of x
  static_assert(kQuantisedLevelBytes == 16 * kWarpSize && kScaleRuns <= kWarpSize);
  extern __shared__ __align__(16) unsigned char quantised_vector_memory[];
  __shared__ float carry[kVectorWarps][kQuantisedTileRows];  // of a tile that another warp began
  __shared__ float squares[kVectorWarps];
  __shared__ TokenCandidate best[kVectorWarps];

  const MatrixVectorParams& p = params.common;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int chunks = (p.cols + kLayout.chunk_cols - 1) / kLayout.chunk_cols;
  const QuantisedMemory memory = quantised_memory(kLayout, chunks, 0);
  uint4* const xs = reinterpret_cast<uint4*>(quantised_vector_memory);
  unsigned char* const ring = quantised_vector_memory + memory.ring + warp * kLayout.chunk_bytes;
  float* const x_sums = reinterpret_cast<float*>(quantised_vector_memory + memory.x_sums);
  float* const factors = reinterpret_cast<float*>(quantised_vector_memory + memory.factors);
  float* const sums = reinterpret_cast<float*>(quantised_vector_memory + memory.sums);

  const int tiles = (p.rows + kQuantisedTileRows - 1) / kQuantisedTileRows;
  const auto border = [&](unsigned block) {
    return static_cast<int>(static_cast<std::int64_t>(tiles) * block / gridDim.x);
  };
  const int first_tile = border(blockIdx.x);
  const int total = (border(blockIdx.x + 1) - first_tile) * chunks;
  const int first = first_tile * kQuantisedTileRows;
  const int count = min(border(blockIdx.x + 1) * kQuantisedTileRows, p.rows) - first;
  const int span = (total + kVectorWarps - 1) / kVectorWarps;
  const int begin = min(warp * span, total);
  const int end = min(begin + span, total);

  const unsigned char* from =
      static_cast<const unsigned char*>(p.matrix) +
      (static_cast<std::int64_t>(first_tile) * chunks + begin) * kLayout.chunk_bytes + 16 * lane;
  int fetched = begin;
  const auto fetch = [&](int stage) {
    unsigned char* const to = ring + stage * kVectorWarps * kLayout.chunk_bytes + 16 * lane;
    copy_async_if(to, from, fetched < end);
    copy_async_if(to + kQuantisedLevelBytes, from + kQuantisedLevelBytes,
                  fetched < end && lane < kScaleRuns);
    from += kLayout.chunk_bytes;
    ++fetched;
    copies_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  if (p.norm != nullptr) {
    for (int i = tid * 32; i < p.cols; i += kVectorThreads * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + i));
  }
  wait_for_previous_kernel();

  float residual = 0;
  if (params.epilogue == VectorEpilogue::kAdd && tid < count) residual = p.y[first + tid];
  float square = 0;
  // Whole warps: their threads exchange what they find.
  const int quads = chunks * kQuads;
#pragma unroll 2
  for (int i = tid; i - lane < quads; i += kVectorThreads) {
    float4 x = {0, 0, 0, 0};
    if (4 * i < p.cols) {
      x = __ldcg(reinterpret_cast<const float4*>(p.x) + i);
      if (p.norm != nullptr) {
        const float4 w = __ldg(reinterpret_cast<const float4*>(p.norm) + i);
        square += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
        x = {x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w};
      }
    }
    float top = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
#pragma unroll
    for (int step = kQuads / 2; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, step));
    // 2^14 <= top 2^e < 2^15, as far as 2^e and 2^-e are numbers.
    const int exponent = max(static_cast<int>(__float_as_uint(top) >> 23), 127 - 112);
    const float grow = __uint_as_float(static_cast<unsigned>(254 + 14 - exponent) << 23);
    x = {x.x * grow, x.y * grow, x.z * grow, x.w * grow};
    const std::uint32_t high[2] = {Half<f16>::pack(x.x, x.y), Half<f16>::pack(x.z, x.w)};
    const std::uint32_t low[2] = {
        Half<f16>::pack(x.x - Half<f16>::low(high[0]), x.y - Half<f16>::high(high[0])),
        Half<f16>::pack(x.z - Half<f16>::low(high[1]), x.w - Half<f16>::high(high[1]))};
    float sum = 0;
    if constexpr (kLayout.has_min) {
      sum = (x.x + x.y) + (x.z + x.w);
#pragma unroll
      for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    }
    if (i < quads) {
      // [32 columns][high, low][4 threads] of 16 bytes: columns 0, 1 of 4 of the first 16 and of
      // the second, columns 2, 3 of both.
      std::uint32_t* const to =
          reinterpret_cast<std::uint32_t*>(xs + i / 8 * 8 + i % 4) + i / 4 % 2;
      to[0] = high[0];
      to[2] = high[1];
      to[16] = low[0];
      to[18] = low[1];
      if (i % kQuads == 0)
        factors[i / kQuads] = __uint_as_float(static_cast<unsigned>(exponent - 14) << 23);
      if constexpr (kLayout.has_min)
        if (i % 8 == 0) x_sums[i / 8] = sum;
    }
  }
  if (p.norm != nullptr) {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      square += __shfl_xor_sync(0xffffffffU, square, step);
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();

  // Groups of four threads take high and low in turns: the first two count.
  const int part = lane / 4 % 2;
  const uint4* const my_x = xs + 4 * part + lane % 4;
  const float own = part == 0 ? 1.0F : 0.0F;
  float2 sum = {0, 0};
  int chunk = begin % chunks;
  int tile = begin / chunks;
  bool whole = chunk == 0;  // the tile's first chunk is this warp's
  int stage = 0;
  const int tail = end - kStages - kVectorLead;
  if (begin >= tail) let_next_kernel_start();
  for (int i = begin; i < end; ++i) {
    if (i + 1 == tail) let_next_kernel_start();
    copies_wait_but<kStages - 1>();
    __syncwarp();  // scales come from other threads
    QuantisedChunk<kType> weights;
    weights.load(ring + stage * kVectorWarps * kLayout.chunk_bytes, lane);
    __syncwarp();
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    const float2 more =
        weights.multiply(my_x + chunk * kQuads, x_sums + chunk * (kLayout.chunk_cols / 32), own);
    const float factor = factors[chunk];
    sum.x = fmaf(factor, more.x, sum.x);
    sum.y = fmaf(factor, more.y, sum.y);
    const bool last = ++chunk == chunks;
    if (last || i + 1 == end) {
      sum.x += __shfl_xor_sync(0xffffffffU, sum.x, 4);
      sum.y += __shfl_xor_sync(0xffffffffU, sum.y, 4);
      float* const to = whole ? sums + tile * kQuantisedTileRows : carry[warp];
      if (lane < 4) {
        to[2 * lane] = sum.x;
        to[2 * lane + 1] = sum.y;
      }
      sum = {0, 0};
      chunk = 0;
      whole = true;
      ++tile;
    }
  }
  __syncthreads();

  float scale = 1;
  if (p.norm != nullptr) {
    float mean = 0;
#pragma unroll
    for (int i = 0; i < kVectorWarps; ++i) mean += squares[i];
    scale = 1 / sqrtf(mean / static_cast<float>(p.cols) + p.norm_eps);
  }
  const auto total_of = [&](int r) {
    const int t = r / kQuantisedTileRows;
    float row = sums[r];
    for (int w = t * chunks / span + 1; w < kVectorWarps && w * span < (t + 1) * chunks; ++w)
      row += carry[w][r % kQuantisedTileRows];
    return row * scale;
  };
  using enum VectorEpilogue;
  switch (params.epilogue) {
    case kStore: return finish_rows<kStore>(p, first, count, residual, total_of, best);
    case kAdd: return finish_rows<kAdd>(p, first, count, residual, total_of, best);
    case kGatedSilu: return finish_rows<kGatedSilu>(p, first, count, residual, total_of, best);
    case kChoose: return finish_rows<kChoose>(p, first, count, residual, total_of, best);
  }
}

struct DequantiseParams {
  const std::uint8_t* matrix;
  std::uint16_t* to;  // [rows, cols]
  int rows;
  int cols;
  int chunks;
};

inline constexpr int kDequantiseThreads = 256;

/// Values as the host's dequantise() has them, rounded to Element: a warp per chunk.
template <class Element, ElementType kType>
__global__ void __launch_bounds__(kDequantiseThreads)
    dequantise_kernel(const __grid_constant__ DequantiseParams p) {
  constexpr QuantisedLayout kLayout = QuantisedChunk<kType>::kLayout;
  constexpr bool kBytes = QuantisedChunk<kType>::kBytes;
  const std::int64_t index =
      std::int64_t{blockIdx.x} * (kDequantiseThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t row = index / p.chunks * kQuantisedTileRows + g;
  const int begin = static_cast<int>(index % p.chunks) * kLayout.chunk_cols;
  if (row >= p.rows) return;
  const std::uint8_t* const chunk = p.matrix + index * kLayout.chunk_bytes;
  const uint4 run = *reinterpret_cast<const uint4*>(chunk + 16 * lane);
  const std::uint32_t words[4] = {run.x, run.y, run.z, run.w};
  const std::uint8_t* const scales = chunk + kQuantisedLevelBytes;
  // Entry `block` of this row, in tables of `stride` bytes per thread (quantised_layout.hpp).
  const auto half_at = [&](int offset, int stride, int block) {
    return Half<f16>::widen(*reinterpret_cast<const std::uint16_t*>(
        scales + offset + g / 2 * stride + 2 * (2 * block + g % 2)));
  };
  const auto byte_at = [&](int offset, int stride, int block) {
    return scales[offset + g / 2 * stride + 2 * block + g % 2];
  };
#pragma unroll
  for (int part = 0; part < kLayout.chunk_cols / 16; ++part) {
    const int col = begin + 16 * part + 4 * t;
    if (col >= p.cols) return;
    const int block = part * 16 / kLayout.block_cols;
    float scale;
    float min = 0;  // is taken away
    if constexpr (kType == ElementType::kQ8_0) {
      scale = half_at(0, 8, block);
    } else if constexpr (kType == ElementType::kQ6_K) {
      scale =
          half_at(32, 4, 0) * static_cast<float>(static_cast<std::int8_t>(byte_at(0, 8, block)));
    } else if constexpr (kType == ElementType::kQ4_K) {
      scale = half_at(64, 8, 0) * static_cast<float>(byte_at(0, 16, block));
      min = half_at(64, 8, 1) * static_cast<float>(byte_at(8, 16, block));
    } else {
      scale = half_at(0, 16, block);
      if constexpr (kType == ElementType::kQ4_1) min = -half_at(64, 16, block);
    }
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int level;
      if constexpr (kBytes) {
        level = static_cast<int>(words[part] >> (8 * i) & 0xffU) - 128;
      } else {
        const int nibble = i / 2 + 4 * (i % 2) + 2 * (part % 2);
        level = static_cast<int>(words[part / 2] >> (4 * nibble) & 15U);
        if constexpr (kType == ElementType::kQ4_0) level -= 8;
      }
      values[i] = fmaf(scale, static_cast<float>(level), -min);
    }
    *reinterpret_cast<uint2*>(p.to + row * p.cols + col) = {
        Half<Element>::pack(values[0], values[1]), Half<Element>::pack(values[2], values[3])};
  }
}

}  // namespace detail

/// Launches products of quantised matrices with one vector on the current device, as
/// MatrixVectorPlan those of 16-bit ones. Holds no memory.
class QuantisedVectorPlan {
 public:
  /// \throws Error(kDevice).
  explicit QuantisedVectorPlan(bool overlap, int multiprocessors = 0)
      : device_(overlap, multiprocessors) {
    for (const Kernel kernel : kernels_) device_.prepare(kernel);
  }

  /// Blocks of every launch: candidates that kChoose leaves.
  int blocks() const { return device_.blocks(); }

  /// May be captured. `alone`: as MatrixVectorPlan::launch().
  /// \throws Error(kShape) if type or extents do not fit; Error(kDevice) if the launch is refused.
  void launch(const QuantisedVectorTask& task, VectorEpilogue epilogue, cudaStream_t stream,
              bool alone = false) const {
    // Texts are made for an error alone: a launch allocates nothing.
    const auto require = [](bool good, const char* field, auto&& expected, auto&& found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"matrix-vector product does not fit", "QuantisedVectorTask",
                                        field, expected(), found()});
    };
    const auto text = [](const char* words) {
      return [words] {
        return std::string(words);
      };
    };
    const auto number = [](std::int64_t value) {
      return [value] {
        return std::to_string(value);
      };
    };
    require(is_quantised(task.type), "type", text("a quantised type"),
            [&] { return std::string(to_string(task.type)); });
    const std::int64_t block = block_shape(task.type).values;
    require(
        task.cols >= block && task.cols % block == 0, "cols",
        [&] { return "a positive multiple of " + std::to_string(block); }, number(task.cols));
    require(task.rows >= 1 && task.rows <= (std::int64_t{1} << 30), "rows", text("1 to 2^30"),
            number(task.rows));
    require(epilogue != VectorEpilogue::kGatedSilu || task.rows % 2 == 0, "rows",
            text("an even number where gated"), number(task.rows));
    const QuantisedLayout layout = quantised_layout(task.type);
    const std::int64_t chunks = (task.cols + layout.chunk_cols - 1) / layout.chunk_cols;
    const std::int64_t tiles = (task.rows + kQuantisedTileRows - 1) / kQuantisedTileRows;
    std::int64_t bytes =
        detail::quantised_memory(layout, chunks,
                                 ((tiles + blocks() - 1) / blocks() + 1) * kQuantisedTileRows)
            .bytes;
    require(bytes <= device_.most_bytes(), "cols and rows", text("what shared memory holds"),
            [&] { return std::to_string(bytes) + " bytes"; });
    if (alone) bytes = device_.bytes_alone(bytes);
    const detail::QuantisedVectorParams params{detail::vector_params(task), epilogue};
    detail::launch_vector_kernel("quantised_vector_kernel", kernels_[index_of(task.type)], params,
                                 blocks(), bytes, device_.overlap(), stream);
  }

 private:
  using Kernel = void (*)(detail::QuantisedVectorParams);
  static constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ6_K,
                                           ElementType::kQ4_0, ElementType::kQ4_1,
                                           ElementType::kQ4_K};

  static std::size_t index_of(ElementType type) {
    return static_cast<std::size_t>(std::find(std::begin(kTypes), std::end(kTypes), type) -
                                    std::begin(kTypes));
  }

  // By kTypes: those that the attributes are set on (backend.cuh).
  std::array<Kernel, 5> kernels_ = {
      detail::quantised_vector_kernel<kTypes[0]>, detail::quantised_vector_kernel<kTypes[1]>,
      detail::quantised_vector_kernel<kTypes[2]>, detail::quantised_vector_kernel<kTypes[3]>,
      detail::quantised_vector_kernel<kTypes[4]>};
  detail::VectorDevice device_;
};

/// Writes rows of a quantised matrix as Element, rounded once: to [rows, cols], from the tiles that
/// begin at `matrix`. Waits for nothing; may be captured. \throws Error(kShape, kDevice).
template <class Element>
void dequantise(ElementType type, const std::uint8_t* matrix, std::int64_t rows, std::int64_t cols,
                Element* to, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const int chunk_cols = quantised_layout(type).chunk_cols;
    const std::int64_t chunks = (cols + chunk_cols - 1) / chunk_cols;
    const detail::DequantiseParams params{.matrix = matrix,
                                          .to = reinterpret_cast<std::uint16_t*>(to),
                                          .rows = static_cast<int>(rows),
                                          .cols = static_cast<int>(cols),
                                          .chunks = static_cast<int>(chunks)};
    constexpr int kWarps = detail::kDequantiseThreads / detail::kWarpSize;
    const std::int64_t all = (rows + kQuantisedTileRows - 1) / kQuantisedTileRows * chunks;
    kernel<<<static_cast<unsigned>((all + kWarps - 1) / kWarps), detail::kDequantiseThreads, 0,
             stream>>>(params);
    check_cuda(cudaGetLastError(), "dequantise_kernel");
  };
  switch (type) {
    using enum ElementType;
    case kQ8_0: return launch(detail::dequantise_kernel<Element, kQ8_0>);
    case kQ6_K: return launch(detail::dequantise_kernel<Element, kQ6_K>);
    case kQ4_0: return launch(detail::dequantise_kernel<Element, kQ4_0>);
    case kQ4_1: return launch(detail::dequantise_kernel<Element, kQ4_1>);
    case kQ4_K: return launch(detail::dequantise_kernel<Element, kQ4_K>);
    case kF32:
    case kF16:
    case kBF16: break;
  }
  throw Error(ErrorCode::kShape, {"not a quantised type", "dequantise", "type", "a quantised type",
                                  std::string(to_string(type))});
}

}  // namespace sluice
