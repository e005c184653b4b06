// SPDX-License-Identifier: MIT
/// Products of a quantised matrix with up to 8 vectors, in one pass over its bytes: what a short
/// chunk of a stream, or a few sessions that step together, cost. Norm before and epilogue after
/// are part of the launch, as in quantised_vector.cuh.
///
/// How it works. A tensor core multiplies the levels of two tiles of 8 rows (matrix A; levels are
/// exact as f16) by 16 columns of 8 vectors (matrix B): the layout's fragments fit as they are. So
/// 8 vectors take half the matrix instructions that one takes there, and a scale is widened once
/// for two vectors' sums. Vectors are f16 in shared memory, times a power of two for each vector
/// and 128 columns such that the largest fits: an x is off by 2^-11 of itself at most, or by 2^-35
/// of the largest of its 128 where that is more. 8 wide vectors do not fit beside the ring of
/// weights: blocks of a cluster then share the columns, and add up through each other's shared
/// memory. Sums are float32 in a fixed order: the same bits twice, and a vector's result does not
/// depend on the others.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/quantised_layout.hpp"
#include "sluice/backend/cuda/quantised_vector.cuh"
#include "sluice/core/element.hpp"

namespace sluice {

/// One product with several vectors. All pointers are device memory, aligned to 16 bytes.
struct QuantisedColumnsTask {
  ElementType type = ElementType::kF32;  ///< a type with is_quantised()
  const std::uint8_t* matrix = nullptr;  ///< [quantised_bytes(type, rows, cols)]
  std::int64_t rows = 0;
  std::int64_t cols = 0;        ///< a multiple of the type's block
  int count = 0;                ///< vectors, 1 to QuantisedColumnsPlan::kMostColumns
  const float* x = nullptr;     ///< [count, cols], by x_stride
  std::int64_t x_stride = 0;    ///< from vector to vector, a multiple of 4
  const float* norm = nullptr;  ///< [cols] or null, as MatrixVectorTask::norm, of each vector
  float norm_eps = 0;
  float* y = nullptr;  ///< [count, rows], kGatedSilu: [count, rows / 2]; by y_stride
  std::int64_t y_stride = 0;
};

namespace detail {

inline constexpr int kMostQuantisedColumns = 8;
inline constexpr int kQuantisedColumnsWarps = 8;
inline constexpr int kQuantisedColumnsThreads = kQuantisedColumnsWarps * kWarpSize;
/// Pairs of chunks per warp in flight.
__host__ __device__ constexpr int quantised_columns_stages(const QuantisedLayout& layout) {
  return layout.chunk_cols == 64 ? 4 : 6;
}
/// Pairs of chunks before a warp's last request at which the next kernel may start.
inline constexpr int kQuantisedColumnsLead = 2;
inline constexpr int kQuantisedColumnsGroup = 128;  // columns under one power of two
inline constexpr int kQuantisedColumnsPairRows = 2 * kQuantisedTileRows;
inline constexpr int kQuantisedColumnsPairSums = kQuantisedColumnsPairRows * kMostQuantisedColumns;

struct QuantisedColumnsParams {
  const std::uint8_t* matrix;
  const float* x;
  const float* norm;
  float* y;
  std::int64_t x_stride;
  std::int64_t y_stride;
  float norm_eps;
  int rows;
  int cols;
  int count;
  int ways;  // the least power of two from count on: vectors that warps convert side by side
  VectorEpilogue epilogue;
};

/// Where a chunk's levels and its scales lie; `index`: tile * chunks of a row + chunk.
template <ElementType kType>
struct QuantisedChunkPlace {
  static constexpr QuantisedLayout kLayout = quantised_layout(kType);
  static constexpr int kScaleBytes = kLayout.chunk_bytes - kQuantisedLevelBytes;

  static __device__ const unsigned char* levels(const unsigned char* matrix, std::int64_t index) {
    return matrix + index * kLayout.chunk_bytes;
  }
  static __device__ const unsigned char* scales(const unsigned char* matrix, std::int64_t index) {
    return levels(matrix, index) + kQuantisedLevelBytes;
  }
};

/// A thread's levels of one chunk, and the scales of row g = lane / 4 of its tile.
template <ElementType kType>
struct QuantisedColumnsChunk {
  static constexpr QuantisedLayout kLayout = quantised_layout(kType);
  static constexpr bool kBytes = kLayout.chunk_cols == 64;
  /// Whether levels stay in the bits where they are (fragment()).
  static constexpr bool kInPlace = kLayout.has_min;
  /// By how many bits sums are too small then.
  static constexpr int kLevelBits = kInPlace ? 24 : 0;

  uint4 levels;
  uint2 scales;       // kBlocks of f16, or of bytes in .x
  uint2 minima = {};  // the same, where there are minima
  float scale = 1;    // of the bytes
  float minimum = 1;

  __device__ void load(const unsigned char* from, const unsigned char* table, int lane) {
    const int g = lane / 4;
    const bool odd = g % 2 != 0;
    levels = *reinterpret_cast<const uint4*>(from + 16 * lane);
    const auto half_at = [&](int at) {
      return Half<f16>::widen(*reinterpret_cast<const std::uint16_t*>(table + at));
    };
    const std::uint32_t halves = odd ? 0x7632U : 0x5410U;
    const std::uint32_t bytes = odd ? 0x7531U : 0x6420U;
    if constexpr (kType == ElementType::kQ8_0) {
      const uint2 s = *reinterpret_cast<const uint2*>(table + g / 2 * 8);
      scales = {__byte_perm(s.x, s.y, halves), 0};
    } else if constexpr (kType == ElementType::kQ6_K) {
      const uint2 s = *reinterpret_cast<const uint2*>(table + g / 2 * 8);
      scales = {__byte_perm(s.x, s.y, bytes), 0};
      scale = half_at(32 + 2 * g);
    } else {
      const uint4 s = *reinterpret_cast<const uint4*>(table + g / 2 * 16);
      if constexpr (kType == ElementType::kQ4_K) {
        scales = {__byte_perm(s.x, s.y, bytes), 0};
        minima = {__byte_perm(s.z, s.w, bytes), 0};
        scale = half_at(64 + g / 2 * 8 + g % 2 * 2);
        minimum = half_at(64 + g / 2 * 8 + g % 2 * 2 + 4);
      } else {
        scales = {__byte_perm(s.x, s.y, halves), __byte_perm(s.z, s.w, halves)};
      }
      if constexpr (kType == ElementType::kQ4_1) {
        const uint4 m = *reinterpret_cast<const uint4*>(table + 64 + g / 2 * 16);
        minima = {__byte_perm(m.x, m.y, halves), __byte_perm(m.z, m.w, halves)};
      }
    }
  }

  /// Levels of the 16 columns `part` of the chunk: two registers of a fragment. In the lowest bits
  /// of an f16 a level q is the number 2^-24 q, four bits higher 2^-20 q, exact like every f16.
  /// That is enough for types with minima; where an offset must be taken away, 2^10 + q and 2^10 +
  /// 16 q are made first.
  __device__ uint2 fragment(int part) const {
    const std::uint32_t words[4] = {levels.x, levels.y, levels.z, levels.w};
    if constexpr (kBytes) {
      const std::uint32_t word = words[part];
      return {halves_of_bytes(word, 0x4140), halves_of_bytes(word, 0x4342)};
    } else {
      const std::uint32_t word = part % 2 == 0 ? words[part / 2] : words[part / 2] >> 8;
      if constexpr (kInPlace) return {word & 0x000f000fU, word & 0x00f000f0U};
      uint2 halves;
      asm("{\n\t.reg .b32 low, high;\n\t"
          "lop3.b32 low, %2, 0x000f000f, %3, 0xea;\n\t"  // (a & b) | c
          "lop3.b32 high, %2, 0x00f000f0, %3, 0xea;\n\t"
          "sub.f16x2 %0, low, %4;\n\t"           // less 2^10 + 8
          "fma.rn.f16x2 %1, high, %5, %6;\n\t}"  // times 2^-4, less 2^6 + 8
          : "=r"(halves.x), "=r"(halves.y)
          : "r"(word), "r"(0x64006400U), "r"(0x64086408U), "r"(0x2c002c00U), "r"(0xd480d480U));
      return halves;
    }
  }
  __device__ float scale_of(int block) const { return entry(scales, block); }
  __device__ float minimum_of(int block) const { return entry(minima, block); }

 private:
  static __device__ float entry(uint2 table, int block) {
    if constexpr (kType == ElementType::kQ6_K) {
      return static_cast<float>(static_cast<std::int8_t>(table.x >> (8 * block)));
    } else if constexpr (kType == ElementType::kQ4_K) {
      return static_cast<float>(table.x >> (8 * block) & 0xffU);
    } else {
      const std::uint32_t word = block < 2 ? table.x : table.y;
      return block % 2 == 0 ? Half<f16>::low(word) : Half<f16>::high(word);
    }
  }
};

/// sums[2 j + i]: of row g of tile j and vector 2 t + i, without the power of two of x. x: the
/// thread's part of the chunk's vectors, 32 columns every 512 bytes, in even and odd blocks;
/// x_sums: of vectors 2 t, 2 t + 1, by blocks of 32 columns, where there are minima.
template <ElementType kType>
__device__ void multiply_pair(const QuantisedColumnsChunk<kType> (&w)[2], const unsigned char* x,
                              const unsigned char* x_of_odd, const float* x_sums,
                              float (&sums)[4]) {
  using Chunk = QuantisedColumnsChunk<kType>;
  float minima[4] = {0, 0, 0, 0};
#pragma unroll
  for (int block = 0; block < Chunk::kLayout.chunk_cols / 32; ++block) {
    const uint4 b = *reinterpret_cast<const uint4*>((block % 2 == 0 ? x : x_of_odd) + 512 * block);
    float2 totals = {0, 0};
    if constexpr (Chunk::kLayout.has_min)
      totals = *reinterpret_cast<const float2*>(x_sums + kMostQuantisedColumns * block);
    float products[4] = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 first = w[0].fragment(2 * block + half);
      const uint2 second = w[1].fragment(2 * block + half);
      const std::uint32_t a[4] = {first.x, second.x, first.y, second.y};
      Half<f16>::multiply_add(products, a, half == 0 ? b.x : b.z, half == 0 ? b.y : b.w);
      if constexpr (kType == ElementType::kQ6_K) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i] = fmaf(w[i / 2].scale_of(2 * block + half), products[i], sums[i]);
          products[i] = 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType != ElementType::kQ6_K)
        sums[i] = fmaf(w[i / 2].scale_of(block), products[i], sums[i]);
      if constexpr (Chunk::kLayout.has_min)
        minima[i] = fmaf(w[i / 2].minimum_of(block), i % 2 == 0 ? totals.x : totals.y, minima[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == ElementType::kQ4_1) sums[i] += minima[i];
    if constexpr (kType == ElementType::kQ6_K) sums[i] *= w[i / 2].scale;
    if constexpr (kType == ElementType::kQ4_K)
      sums[i] = w[i / 2].scale * sums[i] - w[i / 2].minimum * minima[i];
  }
}

/// Shared memory of a launch: vectors; the ring; vectors' sums by blocks of 32 columns, where there
/// are minima; 2^-e by groups; the rows' sums; those of pairs that another warp began.
struct QuantisedColumnsMemory {
  std::int64_t ring;
  std::int64_t x_sums;
  std::int64_t factors;
  std::int64_t carry;
  std::int64_t sums;
  std::int64_t bytes;
};
__host__ __device__ inline QuantisedColumnsMemory quantised_columns_memory(
    const QuantisedLayout& layout, std::int64_t groups, std::int64_t pairs) {
  QuantisedColumnsMemory m{};
  m.ring = groups * kQuantisedColumnsGroup * kMostQuantisedColumns * 2;
  m.x_sums = m.ring + std::int64_t{quantised_columns_stages(layout)} * kQuantisedColumnsWarps * 2 *
                          layout.chunk_bytes;
  m.factors =
      m.x_sums +
      (layout.has_min ? groups * (kQuantisedColumnsGroup / 32) * kMostQuantisedColumns * 4 : 0);
  m.carry = m.factors + groups * kMostQuantisedColumns * 4;
  m.sums = m.carry + std::int64_t{kQuantisedColumnsWarps} * kQuantisedColumnsPairSums * 4;
  m.bytes = m.sums + pairs * kQuantisedColumnsPairSums * 4;
  return m;
}

template <ElementType kType>
__global__ void __launch_bounds__(kQuantisedColumnsThreads, 2)
    quantised_columns_kernel(const __grid_constant__ QuantisedColumnsParams p) {
  using Chunk = QuantisedColumnsChunk<kType>;
  using Place = QuantisedChunkPlace<kType>;
  constexpr QuantisedLayout kLayout = Chunk::kLayout;
  constexpr int kStages = quantised_columns_stages(kLayout);
  constexpr int kScaleRuns = Place::kScaleBytes / 16;
  constexpr int kChunksOfGroup = kQuantisedColumnsGroup / kLayout.chunk_cols;
  constexpr int kBlocksOfChunk = kLayout.chunk_cols / 32;
  // Of columns 2 and 3 of 4, whose levels may lie 4 bits higher.
  constexpr float kUpper = Chunk::kInPlace ? 0x1p-4F : 1.0F;
  static_assert(kQuantisedLevelBytes == 16 * kWarpSize && kScaleRuns <= kWarpSize / 2);
  extern __shared__ __align__(16) unsigned char quantised_columns_memory_[];
  __shared__ float squares[kQuantisedColumnsWarps];
  __shared__ float block_squares[kMostQuantisedColumns];

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const ClusterPlace cluster = cluster_place();
  const int all_chunks = (p.cols + kLayout.chunk_cols - 1) / kLayout.chunk_cols;
  const int all_groups = (p.cols + kQuantisedColumnsGroup - 1) / kQuantisedColumnsGroup;
  const int first_group = all_groups * cluster.rank / cluster.size;
  const int groups = all_groups * (cluster.rank + 1) / cluster.size - first_group;
  const int first_chunk = first_group * kChunksOfGroup;
  const int chunks = min((first_group + groups) * kChunksOfGroup, all_chunks) - first_chunk;
  // The same in all blocks of a cluster, which look into each other's memory.
  const QuantisedColumnsMemory memory =
      quantised_columns_memory(kLayout, (all_groups + cluster.size - 1) / cluster.size, 0);
  unsigned char* const xs = quantised_columns_memory_;
  unsigned char* const ring = xs + memory.ring + warp * (2 * kLayout.chunk_bytes);
  float* const x_sums = reinterpret_cast<float*>(xs + memory.x_sums);
  float* const factors = reinterpret_cast<float*>(xs + memory.factors);
  float* const carry = reinterpret_cast<float*>(xs + memory.carry);
  float* const sums = reinterpret_cast<float*>(xs + memory.sums);

  const int all_tiles = (p.rows + kQuantisedTileRows - 1) / kQuantisedTileRows;
  const auto border = [&](int index) {
    return static_cast<int>(static_cast<std::int64_t>(all_tiles) * index / cluster.count);
  };
  const int first_tile = border(cluster.index);
  const int tiles = border(cluster.index + 1) - first_tile;
  const int pairs = (tiles + 1) / 2;
  const int first = first_tile * kQuantisedTileRows;
  const int rows = min(tiles * kQuantisedTileRows, p.rows - first);
  const int total = pairs * chunks;
  const int span = (total + kQuantisedColumnsWarps - 1) / kQuantisedColumnsWarps;
  const int begin = min(warp * span, total);
  const int end = min(begin + span, total);

  // A warp takes a chunk of both tiles of a pair at a time.
  int chunk = begin % chunks;
  int pair = begin / chunks;
  int fetched = begin;
  int fetch_chunk = chunk;
  int fetch_tile = 2 * pair;
  const auto fetch = [&](int stage) {
    unsigned char* const to = ring + stage * (kQuantisedColumnsWarps * 2 * kLayout.chunk_bytes);
    const bool wanted = fetched < end;
    const bool both = wanted && fetch_tile + 1 < tiles;
    const std::int64_t index =
        static_cast<std::int64_t>(first_tile + fetch_tile) * all_chunks + first_chunk + fetch_chunk;
    copy_async_if(to + 16 * lane, Place::levels(p.matrix, index) + 16 * lane, wanted);
    copy_async_if(to + kLayout.chunk_bytes + 16 * lane,
                  Place::levels(p.matrix, index + all_chunks) + 16 * lane, both);
    // Half a warp for each tile's scales.
    const int which = lane / (kWarpSize / 2);
    const int run = lane % (kWarpSize / 2);
    copy_async_if(to + which * kLayout.chunk_bytes + kQuantisedLevelBytes + 16 * run,
                  Place::scales(p.matrix, index + which * all_chunks) + 16 * run,
                  (which == 0 ? wanted : both) && run < kScaleRuns);
    ++fetched;
    if (++fetch_chunk == chunks) {
      fetch_chunk = 0;
      fetch_tile += 2;
    }
    copies_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  if (p.norm != nullptr) {
    for (int i = tid * 32; i < groups * kQuantisedColumnsGroup; i += kQuantisedColumnsThreads * 32)
      if (first_group * kQuantisedColumnsGroup + i < p.cols)
        asm volatile(
            "prefetch.global.L2 [%0];" ::"l"(p.norm + first_group * kQuantisedColumnsGroup + i));
  }
  wait_for_previous_kernel();

  // What this block adds up at the end: outputs of the cluster's rows, cut among its blocks.
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  const int units = gated ? rows / 2 : rows;
  const int first_unit =
      static_cast<int>(static_cast<std::int64_t>(units) * cluster.rank / cluster.size);
  const int my_units =
      static_cast<int>(static_cast<std::int64_t>(units) * (cluster.rank + 1) / cluster.size) -
      first_unit;
  const int outputs = my_units * p.count;
  const auto output_at = [&](int e) {
    return p.y + e / my_units * p.y_stride + (gated ? first / 2 : first) + first_unit +
           e % my_units;
  };
  float residual = 0;
  if (p.epilogue == VectorEpilogue::kAdd && tid < outputs) residual = *output_at(tid);

  // A warp converts 128 columns of one vector at a time, always of the same one.
  float square = 0;
  const int vector = warp % p.ways;
  if (vector < p.count) {
    const float* const x = p.x + vector * p.x_stride;
    const int step = kQuantisedColumnsWarps / p.ways;
    constexpr int kBatch = 8;
    for (int group = warp / p.ways; group < groups; group += kBatch * step) {
      float4 batch[kBatch];
      float4 weights[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int col = (first_group + group + i * step) * kQuantisedColumnsGroup + 4 * lane;
        const bool inside = group + i * step < groups && col < p.cols;
        batch[i] = weights[i] = {0, 0, 0, 0};
        if (inside) batch[i] = __ldcg(reinterpret_cast<const float4*>(x + col));
        if (inside && p.norm != nullptr)
          weights[i] = __ldg(reinterpret_cast<const float4*>(p.norm + col));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = group + i * step;
        if (at >= groups) break;
        float4 v = batch[i];
        if (p.norm != nullptr) {
          const float4 w = weights[i];
          square += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
          v = {v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w};
        }
        // Bits of what is not negative are in the order of the numbers; infinities and what is no
        // number are above them.
        const auto bits = [](float f) {
          return __float_as_uint(f) & 0x7fffffffU;
        };
        const unsigned top = __reduce_max_sync(
            0xffffffffU, max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w))));
        // 2^14 <= top 2^e < 2^15, as far as 2^e and 2^-e are numbers.
        const int exponent =
            min(max(static_cast<int>(top >> 23), 127 - 112), 254 + 14 - Chunk::kLevelBits);
        const float grow = __uint_as_float(static_cast<unsigned>(254 + 14 - exponent) << 23);
        const float grow_upper = grow * kUpper;
        const uint2 packed = {Half<f16>::pack(v.x * grow, v.y * grow),
                              Half<f16>::pack(v.z * grow_upper, v.w * grow_upper)};
        // [32 columns][8 vectors][4 threads] of 16 bytes: columns 0 ... 3 of 4 of the first 16 and
        // of the second. Every other block has neighbouring vectors swapped, for the banks.
        const int block = lane / 8;
        *reinterpret_cast<uint2*>(xs + (at * 4 + block) * 512 + (vector ^ (block & 1)) * 64 +
                                  lane % 4 * 16 + lane / 4 % 2 * 8) = packed;
        if (lane == 0)
          factors[at * kMostQuantisedColumns + vector] =
              __uint_as_float(static_cast<unsigned>(exponent - 14 + Chunk::kLevelBits) << 23);
        if constexpr (kLayout.has_min) {
          // Of the rounded numbers: their errors then count by a weight's size, not by its parts'.
          float sum = ((Half<f16>::low(packed.x) + Half<f16>::high(packed.x)) +
                       (Half<f16>::low(packed.y) + Half<f16>::high(packed.y)) * (1 / kUpper)) *
                      __uint_as_float((127U - Chunk::kLevelBits) << 23);
#pragma unroll
          for (int lanes = 4; lanes > 0; lanes /= 2)
            sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
          if (lane % 8 == 0) x_sums[(at * 4 + block) * kMostQuantisedColumns + vector] = sum;
        }
      }
    }
  }
  if (p.norm != nullptr) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
      square += __shfl_xor_sync(0xffffffffU, square, lanes);
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();

  const int g = lane / 4;
  const int t = lane % 4;
  const unsigned char* const my_x = xs + lane * 16;
  const unsigned char* const my_x_of_odd = xs + (g ^ 1) * 64 + t * 16;
  float part[4] = {0, 0, 0, 0};
  bool whole = chunk == 0;  // the pair's first chunk is this warp's
  int stage = 0;
  const int tail = end - kStages - kQuantisedColumnsLead;
  if (begin >= tail) let_next_kernel_start();
  for (int i = begin; i < end; ++i) {
    if (i + 1 == tail) let_next_kernel_start();
    copies_wait_but<kStages - 1>();
    __syncwarp();  // scales come from other threads
    QuantisedColumnsChunk<kType> weights[2];
    const unsigned char* const from =
        ring + stage * (kQuantisedColumnsWarps * 2 * kLayout.chunk_bytes);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      weights[j].load(from + j * kLayout.chunk_bytes,
                      from + j * kLayout.chunk_bytes + kQuantisedLevelBytes, lane);
    __syncwarp();
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    float products[4] = {0, 0, 0, 0};
    multiply_pair<kType>(weights, my_x + chunk * (kBlocksOfChunk * 512),
                         my_x_of_odd + chunk * (kBlocksOfChunk * 512),
                         x_sums + chunk * (kBlocksOfChunk * kMostQuantisedColumns) + 2 * t,
                         products);
    const float2 factor = *reinterpret_cast<const float2*>(
        factors + chunk / kChunksOfGroup * kMostQuantisedColumns + 2 * t);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      part[j] = fmaf(j % 2 == 0 ? factor.x : factor.y, products[j], part[j]);
    const bool last = ++chunk == chunks;
    if (last || i + 1 == end) {
      float* const to = (whole ? sums + pair * kQuantisedColumnsPairSums
                               : carry + warp * kQuantisedColumnsPairSums) +
                        2 * t * kQuantisedColumnsPairRows + g;  // [vectors][rows of a pair]
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[j % 2 * kQuantisedColumnsPairRows + j / 2 * kQuantisedTileRows] = part[j];
        part[j] = 0;
      }
      chunk = 0;
      whole = true;
      ++pair;
    }
  }
  __syncthreads();

  for (int i = tid; i < pairs * kQuantisedColumnsPairSums; i += kQuantisedColumnsThreads) {
    const int of = i / kQuantisedColumnsPairSums;
    float sum = sums[i];
    for (int w = of * chunks / span + 1; w < kQuantisedColumnsWarps && w * span < (of + 1) * chunks;
         ++w)
      sum += carry[w * kQuantisedColumnsPairSums + i % kQuantisedColumnsPairSums];
    sums[i] = sum;
  }
  if (p.norm != nullptr && tid < p.count) {
    float sum = 0;
    for (int w = tid; w < kQuantisedColumnsWarps; w += p.ways) sum += squares[w];
    block_squares[tid] = sum;
  }
  __syncthreads();
  if (cluster.size > 1) {
    cluster_publish();
    cluster_wait();
  }

  // Reads of other blocks' memory take long: those of an output are under way together.
  const auto finish = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    const auto sum_at = [&](const float* at) {
      float parts[kSize];
#pragma unroll
      for (int rank = 0; rank < kSize; ++rank) parts[rank] = read_of_block(at, rank);
      float sum = parts[0];
#pragma unroll
      for (int rank = 1; rank < kSize; ++rank) sum += parts[rank];
      return sum;
    };
    const auto row_at = [&](int n, int row) {
      return sum_at(sums + row / kQuantisedColumnsPairRows * kQuantisedColumnsPairSums +
                    n * kQuantisedColumnsPairRows + row % kQuantisedColumnsPairRows);
    };
    for (int e = tid; e < outputs; e += kQuantisedColumnsThreads) {
      const int n = e / my_units;
      const int unit = first_unit + e % my_units;
      float* const to = output_at(e);
      float sum = row_at(n, gated ? 2 * unit : unit);
      const float up = gated ? row_at(n, 2 * unit + 1) : 0;
      float scale = 1;
      if (p.norm != nullptr)
        scale = 1 / sqrtf(sum_at(block_squares + n) / static_cast<float>(p.cols) + p.norm_eps);
      sum *= scale;
      if (gated) sum = sum / (1 + __expf(-sum)) * (scale * up);
      if (p.epilogue == VectorEpilogue::kAdd) sum += e == tid ? residual : *to;
      *to = sum;
    }
  };
  switch (cluster.size) {
    case 1: finish(std::integral_constant<int, 1>()); break;
    case 2: finish(std::integral_constant<int, 2>()); break;
    case 4: finish(std::integral_constant<int, 4>()); break;
    default: finish(std::integral_constant<int, 8>());
  }
  // Others may still read this block's memory.
  if (cluster.size > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace detail

/// Launches products of quantised matrices with up to 8 vectors on the current device, as
/// QuantisedVectorPlan with one. Holds no memory.
class QuantisedColumnsPlan {
 public:
  static constexpr int kMostColumns = detail::kMostQuantisedColumns;

  /// overlap, multiprocessors: as MatrixVectorPlan. \throws Error(kDevice).
  explicit QuantisedColumnsPlan(bool overlap, int multiprocessors = 0)
      : device_(overlap, multiprocessors) {
    for (const Kernel kernel : kernels_) device_.prepare(kernel);
    for (std::size_t i = 0; i < clusters_.size(); ++i) clusters_[i] = clusters_of(1 << i);
  }

  /// Whether a matrix of these extents can be multiplied here: vectors must fit shared memory.
  bool fits(ElementType type, std::int64_t rows, std::int64_t cols) const {
    return is_quantised(type) && cut(type, rows, cols).bytes <= device_.most_bytes();
  }

  /// May be captured. `alone`: as MatrixVectorPlan::launch().
  /// \throws Error(kShape) if type or extents do not fit, or for kChoose, which is for one vector;
  /// Error(kDevice) if the launch is refused.
  void launch(const QuantisedColumnsTask& task, VectorEpilogue epilogue, cudaStream_t stream,
              bool alone = false) const {
    // Texts are made for an error alone: a launch allocates nothing.
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape,
                    {"product with several vectors does not fit", "QuantisedColumnsTask", field,
                     expected, std::to_string(found)});
    };
    require(epilogue != VectorEpilogue::kChoose, "epilogue", "not kChoose",
            static_cast<std::int64_t>(epilogue));
    require(is_quantised(task.type), "type", "a quantised type",
            static_cast<std::int64_t>(task.type));
    require(task.cols >= 1 && task.cols % block_shape(task.type).values == 0, "cols",
            "a positive multiple of the type's block", task.cols);
    require(task.rows >= 1 && task.rows <= (std::int64_t{1} << 30), "rows", "1 to 2^30", task.rows);
    require(epilogue != VectorEpilogue::kGatedSilu || task.rows % 2 == 0, "rows",
            "an even number where gated", task.rows);
    require(task.count >= 1 && task.count <= kMostColumns, "count", "1 to 8", task.count);
    require(task.x_stride % 4 == 0, "x_stride", "a multiple of 4", task.x_stride);
    const Cut c = cut(task.type, task.rows, task.cols);
    require(c.bytes <= device_.most_bytes(), "cols and rows", "what shared memory holds", c.bytes);
    int ways = 1;
    while (ways < task.count) ways *= 2;
    const detail::QuantisedColumnsParams params{.matrix = task.matrix,
                                                .x = task.x,
                                                .norm = task.norm,
                                                .y = task.y,
                                                .x_stride = task.x_stride,
                                                .y_stride = task.y_stride,
                                                .norm_eps = task.norm_eps,
                                                .rows = static_cast<int>(task.rows),
                                                .cols = static_cast<int>(task.cols),
                                                .count = task.count,
                                                .ways = ways,
                                                .epilogue = epilogue};
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (c.size > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {static_cast<unsigned>(c.size), 1, 1};
    }
    if (device_.overlap()) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(c.clusters * c.size));
    launch.blockDim = dim3(detail::kQuantisedColumnsThreads);
    launch.dynamicSmemBytes =
        static_cast<std::size_t>(alone ? device_.bytes_alone(c.bytes) : c.bytes);
    launch.stream = stream;
    launch.attrs = attributes;
    launch.numAttrs = count;
    check_cuda(cudaLaunchKernelEx(&launch, kernels_[index_of(task.type)], params),
               "quantised_columns_kernel");
  }

 private:
  using Kernel = void (*)(detail::QuantisedColumnsParams);
  static constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ6_K,
                                           ElementType::kQ4_0, ElementType::kQ4_1,
                                           ElementType::kQ4_K};

  /// How a product is dealt out: `clusters` share the rows, `size` blocks of each the columns.
  struct Cut {
    int size = 1;
    int clusters = 0;
    std::int64_t bytes = 0;
  };

  /// Clusters that find room at once, a multiprocessor for each block; 0 if the device has none.
  int clusters_of(int size) const {
    if (size == 1) return device_.blocks();
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(size));
    launch.blockDim = dim3(detail::kQuantisedColumnsThreads);
    launch.dynamicSmemBytes = static_cast<std::size_t>(device_.bytes_alone(0));
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernels_[0], &launch) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // as in check_cuda()
      return 0;
    }
    return std::min(count, device_.blocks() / size);
  }

  /// Clusters of four read and convert a fourth of the vectors each, and are the fastest
  /// (bench/cuda/NOTES.md), if two blocks fit on a multiprocessor, so that a launch can fetch while
  /// the one before it ends. Else the next that do; else what needs least.
  Cut cut(ElementType type, std::int64_t rows, std::int64_t cols) const {
    const std::int64_t groups =
        (cols + detail::kQuantisedColumnsGroup - 1) / detail::kQuantisedColumnsGroup;
    const std::int64_t tiles = (rows + kQuantisedTileRows - 1) / kQuantisedTileRows;
    Cut least;
    for (const int order : {2, 3, 1, 0}) {
      const int size = 1 << order;
      const int clusters = clusters_[static_cast<std::size_t>(order)];
      if (clusters < 1 || size > groups) continue;
      const std::int64_t pairs = ((tiles + clusters - 1) / clusters + 1) / 2;
      const std::int64_t bytes = detail::quantised_columns_memory(quantised_layout(type),
                                                                  (groups + size - 1) / size, pairs)
                                     .bytes;
      if (least.clusters == 0 || bytes < least.bytes) least = {size, clusters, bytes};
      if (bytes <= device_.half_bytes()) return {size, clusters, bytes};
    }
    return least;
  }

  static std::size_t index_of(ElementType type) {
    return static_cast<std::size_t>(std::find(std::begin(kTypes), std::end(kTypes), type) -
                                    std::begin(kTypes));
  }

  // By kTypes: those that the attributes are set on (backend.cuh).
  std::array<Kernel, 5> kernels_ = {
      detail::quantised_columns_kernel<kTypes[0]>, detail::quantised_columns_kernel<kTypes[1]>,
      detail::quantised_columns_kernel<kTypes[2]>, detail::quantised_columns_kernel<kTypes[3]>,
      detail::quantised_columns_kernel<kTypes[4]>};
  detail::VectorDevice device_;
  std::array<int, 4> clusters_{};  // of 1, 2, 4, 8 blocks that find room at once, a
                                   // multiprocessor for each block
};

}  // namespace sluice
