// SPDX-License-Identifier: MIT
/// Products of a quantised matrix with one vector, as matrix_vector.cuh has them for 16-bit ones:
/// the same launches, the same epilogues, a fourth to a half of the bytes.
///
/// How it works. Memory is read as there: a block's tiles (quantised_layout.hpp) are one run, cut
/// into equal spans of chunks, one per warp, through a ring that is filled before the kernel waits
/// for the one before it. Widening every weight to float32 and reading its x would cost more
/// instructions and shared memory than the bus leaves time for at 4 bits. So levels become f16
/// (exact), and a tensor core multiplies two blocks of 8 rows' levels (matrix A) by x (matrix B):
/// x 2^e = high + low, both f16, a column each for every block; e for each chunk's columns such
/// that the largest fits. An x is then off by 2^-23 of itself at most, or by 2^-39 of its chunk's
/// largest where that is more. Products of levels are exact in float32; sums are float32, by blocks
/// of one scale, and each block's sum meets its scale once. Levels of 4 bits are taken as the file
/// has them, from 0: what they are less (Q4_0's 8) is counted by the block's sum of x.
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

/// How a warp reads: `run` chunks at once, which lie together; so many runs in flight; and how many
/// runs before its last request the next kernel may start. Two blocks share a multiprocessor with
/// 14,336 columns. Why these numbers: bench/cuda/NOTES.md.
struct QuantisedReading {
  int run;
  int stages;
  int lead;
};
__host__ __device__ constexpr QuantisedReading quantised_reading(const QuantisedLayout& layout) {
  return layout.chunk_cols == 64 ? QuantisedReading{2, 2, 0} : QuantisedReading{1, 4, 0};
}

/// Bytes of `word` that `selector` names (0x4140: the first two, 0x4342: the last), less 128, as
/// f16: 2^10 + level is written into the bits, and 2^10 + 128 is taken away.
__device__ inline std::uint32_t halves_of_bytes(std::uint32_t word, std::uint32_t selector) {
  std::uint32_t result;
  asm("sub.f16x2 %0, %1, %2;"
      : "=r"(result)
      : "r"(__byte_perm(word, 0x64646464U, selector)), "r"(0x64806480U));
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

/// What a thread needs of a chunk, and its part of the product.
///
/// Levels are matrix A: rows 0 ... 7 are the tile's rows at one block of columns, rows 8 ... 15 the
/// same rows at the next block. x is matrix B: columns 2 n and 2 n + 1 are x high and low at block
/// n, zeros where A has other blocks. So thread 4 g + t finds the sum of row g and block t in the
/// first half of its results where t is even, in the second where it is odd; the other half is
/// not looked at.
template <ElementType kType>
struct QuantisedChunk {
  static constexpr QuantisedLayout kLayout = quantised_layout(kType);
  static constexpr bool kBytes = kLayout.chunk_cols == 64;
  static constexpr bool kSums = !kBytes;  ///< whether sums of x are needed
  static constexpr int kBlocks = kLayout.chunk_cols / kLayout.block_cols;

  uint4 levels;
  std::uint16_t scale;
  std::uint16_t min;
  std::uint16_t block_scale;
  std::uint16_t block_min;

  __device__ void load(const unsigned char* chunk, int lane) {
    const unsigned char* const scales_at = chunk + kQuantisedLevelBytes;
    const int g = lane / 4;
    const int t = lane % 4;
    levels = *reinterpret_cast<const uint4*>(chunk + 16 * lane);
    // Entry of tables of `entries` for each thread (quantised_layout.hpp).
    const auto entry = [&](int entries, int block) {
      return (g / 2 * entries + block) * 2 + g % 2;
    };
    const auto half_at = [&](int table, int index) {
      return *reinterpret_cast<const std::uint16_t*>(scales_at + table + 2 * index);
    };
    if constexpr (kType == ElementType::kQ8_0) {
      scale = half_at(0, entry(2, t % 2));
    } else if constexpr (kType == ElementType::kQ6_K) {
      scale = scales_at[entry(4, t)];
      block_scale = half_at(32, entry(1, 0));
    } else if constexpr (kType == ElementType::kQ4_K) {
      scale = scales_at[entry(8, t)];
      min = scales_at[entry(8, 4 + t)];
      block_scale = half_at(64, entry(2, 0));
      block_min = half_at(64, entry(2, 1));
    } else {
      scale = half_at(0, entry(4, t));
      if constexpr (kType == ElementType::kQ4_1) min = half_at(64, entry(4, t));
    }
  }

  /// x_even, x_odd: the thread's x of the chunk for blocks 0 and 1 and for blocks 2 and 3, zeros in
  /// threads that have the others; where the chunk has two blocks, x_even is read alone. x_sum: the
  /// sum of x over block t, read if kSums; factor: the chunk's 2^-e; odd: whether t is.
  __device__ float multiply(const uint4& x_even, const uint4& x_odd, float x_sum, float factor,
                            bool odd) const {
    const std::uint32_t words[4] = {levels.x, levels.y, levels.z, levels.w};
    if constexpr (kBytes) {
      float sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        // Q8_0: 16 columns of both blocks; Q6_K: a block of 16 columns and the next.
        constexpr bool kWide = kType == ElementType::kQ8_0;
        const std::uint32_t even = words[kWide ? step : 2 * step];
        const std::uint32_t next = words[kWide ? step + 2 : 2 * step + 1];
        const std::uint32_t a[4] = {halves_of_bytes(even, 0x4140), halves_of_bytes(next, 0x4140),
                                    halves_of_bytes(even, 0x4342), halves_of_bytes(next, 0x4342)};
        if constexpr (kWide)
          Half<f16>::multiply_add(sums, a, step == 0 ? x_even.x : x_even.y,
                                  step == 0 ? x_even.z : x_even.w);
        else
          Half<f16>::multiply_add(sums, a, step == 0 ? x_even.x : x_odd.x,
                                  step == 0 ? x_even.y : x_odd.y);
      }
      const float block = odd ? sums[2] + sums[3] : sums[0] + sums[1];
      if constexpr (kType == ElementType::kQ8_0)
        return Half<f16>::widen(scale) * block * factor;
      else
        return static_cast<float>(static_cast<std::int8_t>(scale)) * Half<f16>::widen(block_scale) *
               block * factor;
    } else {
      // A level q in the lowest bits of an f16 is the number 2^-24 q, four bits higher 2^-20 q.
      float low[4] = {0, 0, 0, 0};
      float high[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const std::uint32_t even = words[2 * step];
        const std::uint32_t next = words[2 * step + 1];
        const uint4& x = step == 0 ? x_even : x_odd;
        const std::uint32_t a[4] = {even & 0x000f000fU, next & 0x000f000fU, even >> 8 & 0x000f000fU,
                                    next >> 8 & 0x000f000fU};
        const std::uint32_t b[4] = {even & 0x00f000f0U, next & 0x00f000f0U, even >> 8 & 0x00f000f0U,
                                    next >> 8 & 0x00f000f0U};
        Half<f16>::multiply_add(low, a, x.x, x.y);
        Half<f16>::multiply_add(high, b, x.z, x.w);
      }
      const float low_sum = odd ? low[2] + low[3] : low[0] + low[1];
      const float high_sum = odd ? high[2] + high[3] : high[0] + high[1];
      const auto total = [&](float begin) {
        return fmaf(low_sum, 0x1p24F, fmaf(high_sum, 0x1p20F, begin));
      };
      if constexpr (kType == ElementType::kQ4_0) {
        return Half<f16>::widen(scale) * total(-8 * x_sum) * factor;
      } else if constexpr (kType == ElementType::kQ4_1) {
        return fmaf(Half<f16>::widen(scale), total(0), Half<f16>::widen(min) * x_sum) * factor;
      } else {
        const float product = static_cast<float>(scale) * total(0);
        const float minimum = static_cast<float>(min) * x_sum;
        return (Half<f16>::widen(block_scale) * product - Half<f16>::widen(block_min) * minimum) *
               factor;
      }
    }
  }
};

/// Shared memory of a launch: x as high and low halves, as many zeros as a run of chunks has x; the
/// ring; x's sum and 2^-e by blocks of 32 columns, or 2^-e by chunks where no sums are needed; the
/// rows' sums.
struct QuantisedMemory {
  std::int64_t zeros;
  std::int64_t ring;
  std::int64_t factors;
  std::int64_t sums;
  std::int64_t bytes;
};
__host__ __device__ inline QuantisedMemory quantised_memory(const QuantisedLayout& layout,
                                                            std::int64_t chunks,
                                                            std::int64_t rows_of_block) {
  QuantisedMemory m{};
  const QuantisedReading reading = quantised_reading(layout);
  chunks = (chunks + reading.run - 1) / reading.run * reading.run;
  m.zeros = chunks * layout.chunk_cols * 4;
  m.ring = m.zeros + reading.run * layout.chunk_cols * 4;
  m.factors =
      m.ring + std::int64_t{reading.stages} * kVectorWarps * reading.run * layout.chunk_bytes;
  m.sums = m.factors + (layout.chunk_cols == 64 ? (chunks + 3) / 4 * 16 : chunks * 32);
  m.bytes = m.sums + rows_of_block * 4;
  return m;
}

template <ElementType kType>
__global__ void __launch_bounds__(kVectorThreads, 2)
    quantised_vector_kernel(const __grid_constant__ QuantisedVectorParams params) {
  using Chunk = QuantisedChunk<kType>;
  constexpr QuantisedLayout kLayout = Chunk::kLayout;
  constexpr int kStages = quantised_reading(kLayout).stages;
  constexpr int kRun = quantised_reading(kLayout).run;
  constexpr int kRunBytes = kRun * kLayout.chunk_bytes;
  constexpr int kGroups = kLayout.chunk_cols / 32;
  constexpr int kArrangers = 4 * kGroups;  // threads that arrange a chunk of x
  static_assert(kQuantisedLevelBytes == 16 * kWarpSize && kRun <= 2);
  extern __shared__ __align__(16) unsigned char quantised_vector_memory[];
  __shared__ float carry[kVectorWarps][kQuantisedTileRows];  // of a tile that another warp began
  __shared__ float squares[kVectorWarps];
  __shared__ TokenCandidate best[kVectorWarps];

  const MatrixVectorParams& p = params.common;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int chunks = (p.cols + kLayout.chunk_cols - 1) / kLayout.chunk_cols;
  const int runs = (chunks + kRun - 1) / kRun;  // of a tile
  const QuantisedMemory memory = quantised_memory(kLayout, chunks, 0);
  unsigned char* const ring = quantised_vector_memory + memory.ring + warp * kRunBytes;
  float* const factors = reinterpret_cast<float*>(quantised_vector_memory + memory.factors);
  float* const sums = reinterpret_cast<float*>(quantised_vector_memory + memory.sums);

  const int tiles = (p.rows + kQuantisedTileRows - 1) / kQuantisedTileRows;
  const auto border = [&](unsigned block) {
    return static_cast<int>(static_cast<std::int64_t>(tiles) * block / gridDim.x);
  };
  const int first_tile = border(blockIdx.x);
  const int total = (border(blockIdx.x + 1) - first_tile) * runs;
  const int first = first_tile * kQuantisedTileRows;
  const int count = min(border(blockIdx.x + 1) * kQuantisedTileRows, p.rows) - first;
  const int span = (total + kVectorWarps - 1) / kVectorWarps;
  const int begin = min(warp * span, total);
  const int end = min(begin + span, total);

  int run = begin % runs;
  int tile = begin / runs;
  const int lone = chunks % kRun == 0 ? -1 : runs - 1;  // a run of one chunk, if kRun is 2
  const unsigned char* from =
      static_cast<const unsigned char*>(p.matrix) +
      (static_cast<std::int64_t>(first_tile + tile) * chunks + run * kRun) * kLayout.chunk_bytes +
      16 * lane;
  int fetched = begin;
  int fetch_run = run;
  const auto fetch = [&](int stage) {
    unsigned char* const to = ring + stage * kVectorWarps * kRunBytes + 16 * lane;
    int bytes = kRunBytes;
    if constexpr (kRun > 1) {
      if (fetch_run == lone) bytes = kLayout.chunk_bytes;
      fetch_run = fetch_run + 1 == runs ? 0 : fetch_run + 1;
    }
    const int wanted = fetched < end ? bytes - 16 * lane : 0;
#pragma unroll
    for (int at = 0; at < kRunBytes; at += 16 * kWarpSize)
      copy_async_if(to + at, from + at, at < wanted);
    from += bytes;
    ++fetched;
    copies_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  // A thread arranges columns 4 t ... 4 t + 3 of 16 columns and of the next 16. The norm's are no
  // other kernel's result.
  const auto load_columns = [&](float4(&to)[2], const float* v, int i) {
    const bool inside = 8 * i < p.cols;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to[half] = inside ? __ldcg(reinterpret_cast<const float4*>(v) + i / 4 * 8 + 4 * half + i % 4)
                        : float4{0, 0, 0, 0};
  };
  float4 norm[2];
  if (p.norm != nullptr) load_columns(norm, p.norm, tid);
  wait_for_previous_kernel();

  float residual = 0;
  if (params.epilogue == VectorEpilogue::kAdd && tid < count) residual = p.y[first + tid];
  float square = 0;
  if (tid < kRun * kLayout.chunk_cols)
    reinterpret_cast<float*>(quantised_vector_memory + memory.zeros)[tid] = 0;
  // Whole warps: their threads exchange what they find. What a turn reads is asked for in the one
  // before.
  const int arrangers = runs * kRun * kArrangers;
  const auto arrange = [&](float4(&x)[2], int i) {
    const int t = i % 4;
    if (p.norm != nullptr) {
      if (i != tid) load_columns(norm, p.norm, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4& v = x[half];
        const float4 w = norm[half];
        square += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
        v = {v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w};
      }
    }
    float top = 0;
#pragma unroll
    for (const float4& v : x)
      top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
#pragma unroll
    for (int step = kArrangers / 2; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, step));
    // 2^14 <= top 2^e < 2^15, as far as 2^e and 2^-e are numbers.
    const int exponent = max(static_cast<int>(__float_as_uint(top) >> 23), 127 - 112);
    const float grow = __uint_as_float(static_cast<unsigned>(254 + 14 - exponent) << 23);
    const float factor = __uint_as_float(static_cast<unsigned>(exponent - 14) << 23);
    std::uint32_t high[2][2];
    std::uint32_t low[2][2];
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4& v = x[half];
      v = {v.x * grow, v.y * grow, v.z * grow, v.w * grow};
      high[half][0] = Half<f16>::pack(v.x, v.y);
      high[half][1] = Half<f16>::pack(v.z, v.w);
      low[half][0] = Half<f16>::pack(v.x - Half<f16>::low(high[half][0]),
                                     v.y - Half<f16>::high(high[half][0]));
      low[half][1] = Half<f16>::pack(v.z - Half<f16>::low(high[half][1]),
                                     v.w - Half<f16>::high(high[half][1]));
      sum += (v.x + v.y) + (v.z + v.w);
    }
    if constexpr (Chunk::kSums) {
#pragma unroll
      for (int step = 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    }
    if (i < arrangers) {
      if constexpr (Chunk::kLayout.block_cols == 16) {
        // [16 columns][high, low][4 threads] of 8 bytes.
        uint2* const to = reinterpret_cast<uint2*>(quantised_vector_memory) + i / 4 * 16 + t;
        to[0] = {high[0][0], high[0][1]};
        to[4] = {low[0][0], low[0][1]};
        to[8] = {high[1][0], high[1][1]};
        to[12] = {low[1][0], low[1][1]};
      } else {
        // [32 columns][high, low][4 threads] of 16 bytes: columns 0, 1 of 4 of the first 16 and of
        // the second, columns 2, 3 of both.
        uint4* const to = reinterpret_cast<uint4*>(quantised_vector_memory) + i / 4 * 8 + t;
        to[0] = {high[0][0], high[1][0], high[0][1], high[1][1]};
        to[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};
      }
      if constexpr (Chunk::kSums) {
        if (t == 0) reinterpret_cast<float2*>(factors)[i / 4] = {sum, factor};
      } else {
        if (i % kArrangers == 0) factors[i / kArrangers] = factor;
      }
    }
  };
  float4 x[2];
  load_columns(x, p.x, tid);
#pragma unroll 1
  for (int i = tid; i - lane < arrangers; i += kVectorThreads) {
    float4 next[2];
    load_columns(next, p.x, i + kVectorThreads);
    arrange(x, i);
    x[0] = next[0];
    x[1] = next[1];
  }
  if (p.norm != nullptr) {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      square += __shfl_xor_sync(0xffffffffU, square, step);
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();

  // A thread's x: 16 bytes of a chunk (Q6_K: 8), or zeros.
  constexpr int kPiece = kLayout.block_cols == 16 ? 8 : 16;
  constexpr int kLanes = kLayout.chunk_cols * 4 / kPiece;  // that have x of their own
  const auto zeros = static_cast<int>(memory.zeros);
  const bool first_half = kLanes < kWarpSize || lane < kWarpSize / 2;
  const int even_base = first_half ? lane % kLanes * kPiece : zeros;
  const int even_step = first_half ? kLayout.chunk_cols * 4 : 0;
  const int odd_base = first_half ? zeros : lane % kLanes * kPiece;
  const int odd_step = first_half ? 0 : kLayout.chunk_cols * 4;
  const auto load_x = [&](int at) {
    if constexpr (kPiece == 16) {
      return *reinterpret_cast<const uint4*>(quantised_vector_memory + at);
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(quantised_vector_memory + at);
      return uint4{x.x, x.y, 0, 0};
    }
  };
  float sum = 0;
  bool whole = run == 0;  // the tile's first chunk is this warp's
  int stage = 0;
  const int tell = max(begin, end - kStages - quantised_reading(kLayout).lead);
  if (begin == end) let_next_kernel_start();
  for (int i = begin; i < end; ++i) {
    if (i == tell) let_next_kernel_start();
    copies_wait_but<kStages - 1>();
    __syncwarp();  // other threads' copies
    const unsigned char* const at = ring + stage * kVectorWarps * kRunBytes;
    Chunk weights[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) weights[j].load(at + j * kLayout.chunk_bytes, lane);
    __syncwarp();
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int chunk = run * kRun;
      uint4 x_odd = {};
      if constexpr (kLanes == kWarpSize)
        x_odd = load_x(odd_base + chunk * odd_step + j * kLayout.chunk_cols * 4);
      const uint4 x_even = load_x(even_base + chunk * even_step + j * kLayout.chunk_cols * 4);
      float2 sum_factor;
      if constexpr (Chunk::kSums)
        sum_factor = reinterpret_cast<const float2*>(factors)[(chunk + j) * kGroups + lane % 4];
      else
        sum_factor = {0, factors[chunk + j]};
      const float product =
          weights[j].multiply(x_even, x_odd, sum_factor.x, sum_factor.y, lane % 2 == 1);
      sum += j > 0 && run == lone ? 0.0F : product;  // the ring has an old one there
    }
    const bool last = ++run == runs;
    if (last || i + 1 == end) {
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      if constexpr (Chunk::kBlocks == 4) sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      float* const to = whole ? sums + tile * kQuantisedTileRows : carry[warp];
      if (lane % 4 == 0) to[lane / 4] = sum;
      sum = 0;
      run = 0;
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
    for (int w = t * runs / span + 1; w < kVectorWarps && w * span < (t + 1) * runs; ++w)
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
