// SPDX-License-Identifier: MIT
/// Products of a weight matrix with up to 8 vectors at once, at the speed of the memory bus: a step
/// of a few sessions, a chunk of a few tokens. The norm before the product and what follows it are
/// part of the launch, as in matrix_vector.cuh.
///
/// How it works. A cluster of up to four blocks owns consecutive rows and its blocks a slice of the
/// columns each; a block's warps own chunks of 64 columns in turn, so that together they read runs
/// of 1 KB of 16 rows. A warp holds its part of all vectors in registers, as matrix B of the tensor
/// cores, in the very layout in which it comes from memory: x = high + low, both of Element, which
/// keeps 16 bits of x (bf16; 22 for f16, after a scaling by a power of two). Where registers do not
/// hold a slice, it is taken in passes. Weights come through a ring of shared memory per warp,
/// which is filled before the kernel waits for the one before it, with some more on its way to the
/// L2, and two launches share a multiprocessor (matrix_vector.cuh says why). Warps' sums of a tile
/// of 16 rows meet in shared memory, in that of the block that finishes the tile, and are added in
/// a fixed order: the same bits twice.
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
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// One product with several vectors. All pointers are device memory, aligned to 16 bytes. y must
/// not overlap what is read, but for kAdd its own old values.
template <class Element>
struct MatrixColumnsTask {
  const Element* matrix = nullptr;  ///< [rows, cols], row after row
  std::int64_t rows = 0;
  std::int64_t cols = 0;      ///< a multiple of 8
  int count = 0;              ///< vectors: 1 to MatrixColumnsPlan::kMostColumns
  const float* x = nullptr;   ///< [count, cols]
  std::int64_t x_stride = 0;  ///< floats from vector to vector, a multiple of 4
  /// [cols] or null: every x is replaced by x * norm / sqrt(mean(x^2) + norm_eps).
  const float* norm = nullptr;
  float norm_eps = 0;
  float* y = nullptr;         ///< [count, rows], kGatedSilu: [count, rows / 2]
  std::int64_t y_stride = 0;  ///< floats from vector to vector
};

namespace detail {

inline constexpr int kColumnsThreads = 256;
inline constexpr int kColumnsWarps = kColumnsThreads / kWarpSize;
inline constexpr int kColumnsMost = 8;        // vectors: columns of the matrix instruction
inline constexpr int kColumnsTile = 16;       // rows of the matrix instruction
inline constexpr int kColumnsChunk = 64;      // columns of a chunk: 128 bytes of a row
inline constexpr int kColumnsMostChunks = 4;  // that a warp holds of every vector at a time
inline constexpr int kColumnsStages = 3;
/// Chunks before a warp's last request at which the next kernel may start.
inline constexpr int kColumnsLead = 1;
/// Tiles that are fetched as far as the second-level cache while the kernel before this one ends.
inline constexpr int kColumnsAhead = 1;
/// Tiles whose sums meet at one barrier.
inline constexpr int kColumnsGroup = kColumnsThreads / (kColumnsTile * kColumnsMost);
/// Floats of a warp's sums of a tile: [kColumnsMost, 16], rows widened so that no bank is met
/// twice.
inline constexpr int kColumnsPartRow = 20;
inline constexpr int kColumnsPart = kColumnsMost * kColumnsPartRow;
inline constexpr int kColumnsSums = kColumnsMost * kColumnsTile;  // floats of a tile's sums
inline constexpr int kColumnsMostCluster = 4;
inline constexpr int kColumnsRingBytes =
    kColumnsStages * kColumnsWarps * kColumnsTile * kColumnsChunk * 2;
inline constexpr int kColumnsPartBytes = 2 * kColumnsGroup * kColumnsWarps * kColumnsPart * 4;

struct MatrixColumnsParams {
  const std::uint16_t* matrix;
  const float* x;
  const float* norm;
  float* y;
  std::int64_t x_stride;
  std::int64_t y_stride;
  float norm_eps;
  int rows;
  int cols;
  int count;
  int passes;
  int slots;  // tiles that a block finishes, at most
  VectorEpilogue epilogue;
};

/// A warp's part of the vectors: lane 4 g + t has columns 4 t ... 4 t + 3 of every 16 of its chunks
/// of vector g, so that lanes of one g read whole sectors. Two words each of the high and of the
/// low parts are matrix B of the 16 columns.
template <class Element, int kChunks>
struct ColumnVectors {
  using H = Half<Element>;
  static constexpr bool kScaled = std::is_same_v<Element, f16>;
  static constexpr int kRuns = kColumnsChunk / 16;

  std::uint32_t high[kChunks][kRuns][2];
  std::uint32_t low[kChunks][kRuns][2];
  /// What sums of vectors 2 t and 2 t + 1 are to be multiplied by.
  float factor[2] = {1, 1};

  /// `column`: the lane's first in its first chunk, `end`: behind the last that it may read. `x` is
  /// the lane's vector or null; norm_of(chunk) is the norm of the lane's first columns of a chunk.
  /// Returns the sum of the lane's squares.
  template <class NormOf>
  __device__ float load(const float* x, bool normed, const NormOf& norm_of, int column, int end,
                        int lane) {
    float square = 0;
    float4 v[kChunks][kRuns];
    const auto at = [&](int c, int run) {
      return column + c * kColumnsWarps * kColumnsChunk + 16 * run;
    };
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        v[c][run] = {0, 0, 0, 0};
        if (x != nullptr && at(c, run) < end)
          v[c][run] = __ldcg(reinterpret_cast<const float4*>(x + at(c, run)));
      }
    if (normed) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          if (at(c, run) >= end) continue;
          float4& y = v[c][run];
          const float4 w = *reinterpret_cast<const float4*>(norm_of(c) + 16 * run);
          square += (y.x * y.x + y.y * y.y) + (y.z * y.z + y.w * y.w);
          y = {y.x * w.x, y.y * w.y, y.z * w.z, y.w * w.w};
        }
    }
    float scale = 1;
    if constexpr (kScaled) {
      float top = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          const float4& y = v[c][run];
          top = fmaxf(top, fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w))));
        }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
      // 2^14 <= top 2^e < 2^15, as far as 2^e and 2^-e are numbers.
      const int exponent = max(static_cast<int>(__float_as_uint(top) >> 23), 127 - 112);
      scale = __int_as_float((127 + 14 + 127 - exponent) << 23);
      const float inverse = __int_as_float((exponent - 14) << 23);
      factor[0] = __shfl_sync(0xffffffffU, inverse, 8 * (lane % 4));
      factor[1] = __shfl_sync(0xffffffffU, inverse, 8 * (lane % 4) + 4);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const float4& y = v[c][run];
        split(y.x * scale, y.y * scale, high[c][run][0], low[c][run][0]);
        split(y.z * scale, y.w * scale, high[c][run][1], low[c][run][1]);
      }
    return square;
  }

 private:
  static __device__ void split(float a, float b, std::uint32_t& high, std::uint32_t& low) {
    high = H::pack(a, b);
    low = H::pack(a - H::low(high), b - H::high(high));
  }
};

/// The pair of rows of each of its tiles that a thread finishes, for one vector.
struct ColumnsPlace {
  static constexpr int kPairs = kColumnsTile / 2;
  static constexpr int kSlots = kColumnsThreads / (kPairs * kColumnsMost);  // at once

  int slot = static_cast<int>(threadIdx.x) / (kPairs * kColumnsMost);  // the first of its tiles
  int vector = static_cast<int>(threadIdx.x) / kPairs % kColumnsMost;
  int row = static_cast<int>(threadIdx.x) % kPairs * 2;  // in a tile

  /// Of the cluster's rows.
  __device__ int row_of(int at, const ClusterPlace& cluster) const {
    return (at * cluster.size + cluster.rank) * kColumnsTile + row;
  }
};

/// y's old values in rows [row, row + 2), where they are.
__device__ inline float2 old_pair(const float* y, int row, int count) {
  return {row < count ? y[row] : 0, row + 1 < count ? y[row + 1] : 0};
}

/// What becomes of the sums of the block's tiles: [blocks of parts][slots][vectors, rows of a
/// tile]. `first`, `count`: rows of the cluster; `residual`: for kAdd, old_pair() of the thread's
/// first tile, read ahead; `scale`: of the thread's vector.
__device__ inline void finish_columns(const MatrixColumnsParams& p, int first, int count,
                                      const ClusterPlace& cluster, const float* sums,
                                      float2 residual, float scale) {
  constexpr int kAtOnce = 4;
  const ColumnsPlace mine;
  const int tiles = (count + kColumnsTile - 1) / kColumnsTile;
  const int owned = (tiles - cluster.rank + cluster.size - 1) / cluster.size;
  const int parts = p.passes * cluster.size;
  const bool gated = p.epilogue == VectorEpilogue::kGatedSilu;
  float* const y = p.y + mine.vector * p.y_stride + (gated ? first / 2 : first);
  for (int base = mine.slot; base < owned; base += kAtOnce * ColumnsPlace::kSlots) {
    float2 total[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) total[k] = {0, 0};
    const float* from = sums + base * kColumnsSums + mine.vector * kColumnsTile + mine.row;
    for (int i = 0; i < parts; ++i) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (base + k * ColumnsPlace::kSlots >= owned) continue;
        const float2 part =
            *reinterpret_cast<const float2*>(from + k * ColumnsPlace::kSlots * kColumnsSums);
        total[k].x += part.x;
        total[k].y += part.y;
      }
      from += p.slots * kColumnsSums;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int slot = base + k * ColumnsPlace::kSlots;
      const int row = mine.row_of(slot, cluster);
      if (slot >= owned || row >= count) continue;
      const float2 sum = {total[k].x * scale, total[k].y * scale};
      if (gated) {
        y[row / 2] = sum.x / (1 + __expf(-sum.x)) * sum.y;
        continue;
      }
      float2 old = {0, 0};
      if (p.epilogue == VectorEpilogue::kAdd)
        old = slot == mine.slot ? residual : old_pair(y, row, count);
      y[row] = old.x + sum.x;
      if (row + 1 < count) y[row + 1] = old.y + sum.y;
    }
  }
}

template <class Element, int kChunks>
__global__ void __launch_bounds__(kColumnsThreads, 2)
    matrix_columns_kernel(const __grid_constant__ MatrixColumnsParams p) {
  using H = Half<Element>;
  // The ring [stages, warps, 16 rows, 64 columns]; sums of the warps [2, tiles of a group, warps];
  // sums of the blocks [passes, blocks, slots].
  extern __shared__ __align__(128) unsigned char columns_memory[];
  __shared__ float squares[kColumnsWarps][kColumnsMost];
  __shared__ float block_squares[kColumnsMostCluster][kColumnsMost];

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const ClusterPlace cluster = cluster_place();
  uint4* const ring = reinterpret_cast<uint4*>(columns_memory);
  float* const parts = reinterpret_cast<float*>(columns_memory + kColumnsRingBytes);
  float* const sums =
      reinterpret_cast<float*>(columns_memory + kColumnsRingBytes + kColumnsPartBytes);

  // Rows of the cluster, in pairs, and columns of the block.
  const auto border = [&](int index) {
    const std::int64_t pairs = (p.rows + 1) / 2;
    return min(p.rows, static_cast<int>(pairs * index / cluster.count) * 2);
  };
  const int first = border(cluster.index);
  const int count = border(cluster.index + 1) - first;
  const int tiles = (count + kColumnsTile - 1) / kColumnsTile;
  const int chunks = (p.cols + kColumnsChunk - 1) / kColumnsChunk;
  const int first_chunk = chunks * cluster.rank / cluster.size;
  const int end_column = min(p.cols, chunks * (cluster.rank + 1) / cluster.size * kColumnsChunk);
  const int warp_column = (first_chunk + warp) * kColumnsChunk;

  // A lane copies 16 bytes lane % 8 of rows lane / 8, + 4, + 8, + 12 of a chunk. Runs of 32 bytes
  // are permuted by the row, so that reads meet no bank twice.
  const int steps = p.passes * tiles * kChunks;
  const int copy_row = lane / 8;
  const int copy_column = warp_column + lane % 8 * 8;
  constexpr int kStageQuads = kColumnsTile * kColumnsChunk * 2 / 16;
  uint4* const copy_to = ring + warp * kStageQuads + copy_row * 8 + (lane % 8 ^ copy_row * 2);
  const std::uint16_t* const copy_from =
      p.matrix + static_cast<std::int64_t>(first + copy_row) * p.cols + copy_column;
  int fetched = 0;
  int fetch_tile = 0;
  int fetch_chunk = 0;  // c of the pass
  int fetch_pass = 0;
  const auto fetch = [&](int stage) {
    if (fetched < steps) {
      const int skipped = (fetch_pass * kChunks + fetch_chunk) * kColumnsWarps * kColumnsChunk;
      const bool inside = copy_column + skipped < end_column;
      const int row = fetch_tile * kColumnsTile;
      const std::uint16_t* from = copy_from + static_cast<std::int64_t>(row) * p.cols + skipped;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        copy_async_or_zero(copy_to + stage * kColumnsWarps * kStageQuads + j * 32, from,
                           inside && row + copy_row + 4 * j < count);
        from += 4 * p.cols;
      }
      ++fetched;
      if (++fetch_chunk == kChunks) {
        fetch_chunk = 0;
        if (++fetch_tile == tiles) {
          fetch_tile = 0;
          ++fetch_pass;
        }
      }
    }
    copies_commit();
  };
  cluster_arrive();
  // The norm of the first pass, in what holds the warp's first sums later.
  const auto norm_of = [&](int c) {
    return parts + (c / 2 * kColumnsWarps + warp) * kColumnsPart + c % 2 * kColumnsChunk;
  };
  if (p.norm != nullptr) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = warp_column + c * kColumnsWarps * kColumnsChunk + 4 * lane;
      if (4 * lane < kColumnsChunk)
        copy_async_or_zero(norm_of(c) + 4 * lane, p.norm + column, column < end_column);
    }
    copies_commit();
  }
#pragma unroll
  for (int stage = 0; stage < kColumnsStages; ++stage) fetch(stage);
  if (tid < kColumnsAhead * kColumnsTile) {
    const int row = kColumnsStages / kChunks * kColumnsTile + tid;
    const int begin = first_chunk * kColumnsChunk;
    const int end = min(end_column, begin + kChunks * kColumnsWarps * kColumnsChunk);
    if (row < count && begin < end)
      prefetch_bytes(p.matrix + static_cast<std::int64_t>(first + row) * p.cols + begin,
                     (end - begin) * 2);
  }
  wait_for_previous_kernel();

  const ColumnsPlace mine;
  float2 residual = {0, 0};
  if (p.epilogue == VectorEpilogue::kAdd && mine.vector < p.count)
    residual =
        old_pair(p.y + mine.vector * p.y_stride + first, mine.row_of(mine.slot, cluster), count);
  if (p.norm != nullptr) {
    copies_wait_but<kColumnsStages>();
    __syncwarp();
  }

  const float* const own = g < p.count ? p.x + g * p.x_stride : nullptr;
  float square = 0;
  int step = 0;
  int stage = 0;
  int buffer = 0;
  const int tail = steps - kColumnsStages - kColumnsLead;
  if (tail <= 0) let_next_kernel_start();
  for (int pass = 0; pass < p.passes; ++pass) {
    ColumnVectors<Element, kChunks> x;
    const int skipped = pass * kChunks * kColumnsWarps * kColumnsChunk;
    square += x.load(
        own, p.norm != nullptr,
        [&](int c) {
          return (pass == 0 ? norm_of(c)
                            : p.norm + warp_column + skipped + c * kColumnsWarps * kColumnsChunk) +
                 4 * t;
        },
        warp_column + skipped + 4 * t, end_column, lane);
    __syncwarp();
    if (p.norm != nullptr && pass + 1 == p.passes) {
      square += __shfl_xor_sync(0xffffffffU, square, 1);
      square += __shfl_xor_sync(0xffffffffU, square, 2);
      if (t == 0) squares[warp][g] = square;
    }
    if (pass == 0) cluster_wait();  // every block of the cluster has begun: its memory is there
    for (int tile = 0; tile < tiles; ++tile) {
      float high[4] = {0, 0, 0, 0};
      float low[4] = {0, 0, 0, 0};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (++step == tail) let_next_kernel_start();
        copies_wait_but<kColumnsStages - 1>();
        __syncwarp();
        const uint4* const from = ring + (stage * kColumnsWarps + warp) * kStageQuads;
        uint2 w[4][2];
#pragma unroll
        for (int run = 0; run < 4; ++run)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            w[run][half] =
                reinterpret_cast<const uint2*>(from + (g + 8 * half) * 8 + (run ^ g % 4) * 2)[t];
        __syncwarp();
        fetch(stage);
        stage = stage + 1 == kColumnsStages ? 0 : stage + 1;
#pragma unroll
        for (int run = 0; run < 4; ++run) {
          const std::uint32_t a[4] = {w[run][0].x, w[run][1].x, w[run][0].y, w[run][1].y};
          H::multiply_add(high, a, x.high[c][run][0], x.high[c][run][1]);
          H::multiply_add(low, a, x.low[c][run][0], x.low[c][run][1]);
        }
      }
      const int in_group = tile % kColumnsGroup;
      float* const part =
          parts + ((buffer * kColumnsGroup + in_group) * kColumnsWarps + warp) * kColumnsPart;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        part[(2 * t + i % 2) * kColumnsPartRow + g + i / 2 * 8] =
            (high[i] + low[i]) * x.factor[i % 2];
      if (in_group + 1 < kColumnsGroup && tile + 1 < tiles) continue;

      __syncthreads();
      const int of_group = tid / kColumnsSums;  // of the group's tiles
      if (of_group <= in_group) {
        const int vector = tid % kColumnsSums / kColumnsTile;
        const int row = tid % kColumnsTile;
        const float* from = parts +
                            (buffer * kColumnsGroup + of_group) * kColumnsWarps * kColumnsPart +
                            vector * kColumnsPartRow + row;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kColumnsWarps; ++i) sum += from[i * kColumnsPart];
        const int whole = tile - in_group + of_group;
        float* const to =
            sums +
            ((pass * cluster.size + cluster.rank) * p.slots + whole / cluster.size) * kColumnsSums +
            tid % kColumnsSums;
        store_in_cluster(to, whole % cluster.size, sum);
      }
      if (p.norm != nullptr && pass + 1 == p.passes && tile + 1 == tiles &&
          tid < kColumnsMost * cluster.size) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kColumnsWarps; ++i) sum += squares[i][tid % kColumnsMost];
        store_in_cluster(&block_squares[cluster.rank][tid % kColumnsMost], tid / kColumnsMost, sum);
      }
      buffer ^= 1;
    }
  }
  cluster_publish();
  cluster_wait();

  if (mine.vector >= p.count) return;
  float scale = 1;
  if (p.norm != nullptr) {
    float sum = 0;
    for (int i = 0; i < cluster.size; ++i) sum += block_squares[i][mine.vector];
    scale = 1 / sqrtf(sum / static_cast<float>(p.cols) + p.norm_eps);
  }
  finish_columns(p, first, count, cluster, sums, residual, scale);
}

}  // namespace detail

/// Launches products with several vectors on the current device. Holds no memory. `overlap`: as
/// MatrixVectorPlan.
template <class Element>
class MatrixColumnsPlan {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>);

 public:
  static constexpr int kMostColumns = detail::kColumnsMost;

  /// multiprocessors: how many a launch takes up, so that another stream's kernels keep the rest;
  /// 0: all. \throws Error(kDevice).
  explicit MatrixColumnsPlan(bool overlap, int multiprocessors = 0)
      : device_(overlap, multiprocessors) {
    for (const Kernel kernel : kernels_) device_.prepare(kernel);
    clusters_[0] = device_.blocks();
    for (std::size_t i = 1; i < clusters_.size(); ++i) clusters_[i] = clusters_at_once(1 << i);
  }

  /// Whether launches start early: asked for, and the GPU can.
  bool overlap() const { return device_.overlap(); }

  /// May be captured. `alone`: as MatrixVectorPlan::launch(). Rows beyond what shared memory holds
  /// sums of (some 300,000 at 4,096 columns) take further launches.
  /// \throws Error(kShape) if the extents do not fit or the epilogue is kChoose; Error(kDevice) if
  /// the launch is refused.
  void launch(const MatrixColumnsTask<Element>& task, VectorEpilogue epilogue, cudaStream_t stream,
              bool alone = false) const {
    check(task, epilogue);
    const Cut cut = cut_of(task.rows, task.cols);
    const std::int64_t most = (device_.most_bytes() - kFixedBytes) / cut.slot_bytes() *
                              cut.cluster * cut.clusters * detail::kColumnsTile;
    if (most <= 0)
      throw Error(ErrorCode::kShape,
                  {"product with several vectors does not fit", "MatrixColumnsTask", "cols",
                   "what shared memory holds sums of", std::to_string(task.cols)});
    const bool gated = epilogue == VectorEpilogue::kGatedSilu;
    for (std::int64_t row = 0; row < task.rows; row += most) {
      const std::int64_t rows = std::min(most, task.rows - row);
      const int slots = cut.slots(rows);
      std::int64_t bytes = kFixedBytes + slots * cut.slot_bytes();
      if (alone) bytes = device_.bytes_alone(bytes);
      detail::MatrixColumnsParams p{};
      p.matrix = reinterpret_cast<const std::uint16_t*>(task.matrix) + row * task.cols;
      p.x = task.x;
      p.norm = task.norm;
      p.y = task.y + (gated ? row / 2 : row);
      p.x_stride = task.x_stride;
      p.y_stride = task.y_stride;
      p.norm_eps = task.norm_eps;
      p.rows = static_cast<int>(rows);
      p.cols = static_cast<int>(task.cols);
      p.count = task.count;
      p.passes = cut.passes;
      p.slots = slots;
      p.epilogue = epilogue;
      launch_kernel(kernels_[static_cast<std::size_t>(cut.chunks - 1)], p, cut, bytes, stream);
    }
  }

 private:
  using Kernel = void (*)(detail::MatrixColumnsParams);
  static constexpr std::int64_t kFixedBytes = detail::kColumnsRingBytes + detail::kColumnsPartBytes;

  /// How a product is divided.
  struct Cut {
    int cluster;   // blocks that share columns
    int clusters;  // that share rows
    int passes;
    int chunks;  // of a warp in a pass

    /// Shared memory of a tile that a block finishes.
    std::int64_t slot_bytes() const {
      return std::int64_t{passes} * cluster * detail::kColumnsSums * 4;
    }
    /// Tiles that a block finishes, at most.
    int slots(std::int64_t rows) const {
      const std::int64_t of_cluster = 2 * (((rows + 1) / 2 + clusters - 1) / clusters);
      const std::int64_t tiles = (of_cluster + detail::kColumnsTile - 1) / detail::kColumnsTile;
      return static_cast<int>((tiles + cluster - 1) / cluster);
    }
  };

  static void check(const MatrixColumnsTask<Element>& task, VectorEpilogue epilogue) {
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape,
                    {"product with several vectors does not fit", "MatrixColumnsTask", field,
                     expected, std::to_string(found)});
    };
    require(task.count >= 1 && task.count <= kMostColumns, "count", "1 to 8", task.count);
    require(task.cols >= 8 && task.cols % 8 == 0 && task.cols <= (1 << 20), "cols",
            "a positive multiple of 8, at most 2^20", task.cols);
    require(task.rows >= 1 && task.rows <= (std::int64_t{1} << 30), "rows", "1 to 2^30", task.rows);
    require(task.x_stride % 4 == 0, "x_stride", "a multiple of 4", task.x_stride);
    require(epilogue != VectorEpilogue::kGatedSilu || task.rows % 2 == 0, "rows",
            "an even number where gated", task.rows);
    require(epilogue != VectorEpilogue::kChoose, "epilogue", "another than kChoose",
            static_cast<std::int64_t>(epilogue));
  }

  /// Clusters as large as leave every warp a chunk, as far as two launches then fit on a
  /// multiprocessor; else the ones that need the least memory.
  Cut cut_of(std::int64_t rows, std::int64_t cols) const {
    const std::int64_t chunks = (cols + detail::kColumnsChunk - 1) / detail::kColumnsChunk;
    const auto divide = [&](std::size_t i) {
      constexpr std::int64_t kMost = detail::kColumnsMostChunks * detail::kColumnsWarps;
      const int cluster = 1 << i;
      const std::int64_t of_block = (chunks + cluster - 1) / cluster;
      const std::int64_t passes = (of_block + kMost - 1) / kMost;
      const std::int64_t at_once = passes * detail::kColumnsWarps;
      return Cut{cluster, clusters_[i], static_cast<int>(passes),
                 static_cast<int>((of_block + at_once - 1) / at_once)};
    };
    Cut best = divide(0);
    std::int64_t best_bytes = best.slots(rows) * best.slot_bytes();
    for (std::size_t i = 1; i < clusters_.size(); ++i) {
      if (clusters_[i] == 0 || chunks < (detail::kColumnsWarps << i)) continue;
      const Cut cut = divide(i);
      const std::int64_t bytes = cut.slots(rows) * cut.slot_bytes();
      if (kFixedBytes + bytes > device_.half_bytes() && bytes >= best_bytes) continue;
      best = cut;
      best_bytes = bytes;
    }
    return best;
  }

  void launch_kernel(Kernel kernel, const detail::MatrixColumnsParams& p, const Cut& cut,
                     std::int64_t bytes, cudaStream_t stream) const {
    std::array<cudaLaunchAttribute, 2> attributes{};
    cudaLaunchConfig_t launch = config_of(cut.cluster, cut.clusters, bytes, attributes.data());
    launch.stream = stream;
    if (overlap()) {
      cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    check_cuda(cudaLaunchKernelEx(&launch, kernel, p), "matrix_columns_kernel");
  }

  /// attributes: room for two, of which this uses the first if there are clusters.
  static cudaLaunchConfig_t config_of(int cluster, int clusters, std::int64_t bytes,
                                      cudaLaunchAttribute* attributes) {
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(cluster * clusters));
    launch.blockDim = dim3(detail::kColumnsThreads);
    launch.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    launch.attrs = attributes;
    if (cluster > 1) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
      attributes[0].val.clusterDim.y = 1;
      attributes[0].val.clusterDim.z = 1;
      launch.numAttrs = 1;
    }
    return launch;
  }

  /// Clusters that run at once with a block on each multiprocessor, 0 where there are none.
  int clusters_at_once(int cluster) const {
    if (!device_.has_clusters()) return 0;
    std::array<cudaLaunchAttribute, 2> attributes{};
    const cudaLaunchConfig_t config =
        config_of(cluster, 1, device_.bytes_alone(kFixedBytes), attributes.data());
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernels_.back(), &config),
               "cudaOccupancyMaxActiveClusters");
    return std::min(count, device_.blocks() / cluster);
  }

  // By the chunks that a warp holds: those that the attributes are set on (backend.cuh).
  std::array<Kernel, detail::kColumnsMostChunks> kernels_ = {
      detail::matrix_columns_kernel<Element, 1>, detail::matrix_columns_kernel<Element, 2>,
      detail::matrix_columns_kernel<Element, 3>, detail::matrix_columns_kernel<Element, 4>};
  detail::VectorDevice device_;
  std::array<int, 3> clusters_{};  // of 1, 2 and 4 blocks
};

}  // namespace sluice
