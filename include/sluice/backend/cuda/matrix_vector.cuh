// SPDX-License-Identifier: MIT
/// Products of a weight matrix with one vector, at the speed of the memory bus: what a decoder's
/// step at batch 1 consists of. The norm before the product and what follows it (residual sum,
/// gated activation, choice of a token) are part of the launch.
///
/// How it works. A block owns consecutive rows, so its part of the matrix is one run of memory; the
/// run is cut into equal spans, one per warp, whatever the rows' ends. Every thread copies its own
/// 16 bytes of each chunk into a ring in shared memory and reads them back itself: no barrier, and
/// the ring is filled before the kernel waits for the one before it, because weights depend on
/// nothing. Two blocks of different launches fit on a multiprocessor, and a launch lets the next
/// start when its own last requests are out: the bus then has work while one ends and the other
/// begins. Sums are float32 in a fixed order: the same bits twice.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/core/element.hpp"

namespace sluice {

/// A token that may be chosen, and its score: the greatest wins, of equals the first.
struct TokenCandidate {
  float score;
  std::int32_t token;
};

/// How the next token is chosen on the device.
struct TokenChoice {
  /// 0: the token of the greatest logit. Else a draw from softmax(logits / temperature), by adding
  /// Gumbel noise to every logit (Maddison, Tarlow, Minka 2014): no second pass over the
  /// vocabulary.
  float temperature = 0;
  std::uint64_t seed = 0;  ///< noise depends on seed, sequence, number of tokens and token alone
};

/// What becomes of a product's rows.
enum class VectorEpilogue : std::uint8_t {
  kStore,      ///< y[i] = row i
  kAdd,        ///< y[i] += row i
  kGatedSilu,  ///< y[i] = silu(row 2 i) * row 2 i + 1: gate and up, interleaved
  kChoose,     ///< y[i] = row i, and every block's best candidate
};

/// One product. All pointers are device memory, aligned to 16 bytes.
template <class Element>
struct MatrixVectorTask {
  const Element* matrix = nullptr;  ///< [rows, cols], row after row
  std::int64_t rows = 0;
  std::int64_t cols = 0;     ///< a multiple of 8
  const float* x = nullptr;  ///< [cols]
  /// [cols] or null: x is replaced by x * norm / sqrt(mean(x^2) + norm_eps).
  const float* norm = nullptr;
  float norm_eps = 0;
  float* y = nullptr;  ///< [rows], kGatedSilu: [rows / 2]

  // kChoose only.
  TokenCandidate* candidates = nullptr;  ///< [MatrixVectorPlan::blocks()]
  TokenChoice choice{};
  const std::int64_t* totals =
      nullptr;  ///< the sequence's number of tokens; read if temperature > 0
  std::int64_t sequence = 0;
};

namespace detail {

inline constexpr int kVectorThreads = 512;
inline constexpr int kVectorWarps = kVectorThreads / kWarpSize;
inline constexpr int kVectorStages = 6;
/// Chunks before a warp's last request at which the next kernel may start: its blocks then ask for
/// their first weights when this kernel has nothing left to ask for.
inline constexpr int kVectorLead = 4;
inline constexpr int kVectorChunk = 8 * kWarpSize;  // elements of a row that a warp takes at a time

struct MatrixVectorParams {
  const void* matrix;
  const float* x;
  const float* norm;
  float* y;
  TokenCandidate* candidates;
  const std::int64_t* totals;
  std::int64_t sequence;
  std::uint64_t seed;
  float norm_eps;
  float temperature;
  int rows;
  int cols;
};

/// 16 bytes to shared memory beside everything else, zeros if not `inside`; `from` is not followed
/// then.
__device__ inline void copy_async_or_zero(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
template <int kPending>
__device__ void copies_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Uniform in (0, 1), from a hash of its arguments (splitmix64's finaliser, twice).
__device__ inline float hashed_uniform(std::uint64_t seed, std::int64_t sequence,
                                       std::int64_t total, int token) {
  const auto mix = [](std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  };
  std::uint64_t z = mix(seed + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(sequence + 1));
  z = mix(z + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(total));
  z = mix(z + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(token + 1));
  return (static_cast<float>(z >> 41) + 0.5F) * 0x1p-23F;
}

/// A logit's score in the choice of a token.
__device__ inline float token_score(float logit, float temperature, std::uint64_t seed,
                                    std::int64_t sequence, std::int64_t total, int token) {
  if (temperature <= 0) return logit;
  return logit / temperature - logf(-logf(hashed_uniform(seed, sequence, total, token)));
}

__device__ inline TokenCandidate better(TokenCandidate a, TokenCandidate b) {
  const bool second = b.score > a.score || (b.score == a.score && b.token < a.token);
  return second ? b : a;
}

/// The best of a block's candidates, in thread 0. `scratch`: one for each warp.
template <int kThreads>
__device__ TokenCandidate best_of_block(TokenCandidate mine, TokenCandidate* scratch) {
  const auto in_warp = [](TokenCandidate c) {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      c = better(c, {__shfl_xor_sync(0xffffffffU, c.score, step),
                     __shfl_xor_sync(0xffffffffU, c.token, step)});
    return c;
  };
  mine = in_warp(mine);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x < kWarpSize)
    mine = in_warp(scratch[min(static_cast<int>(threadIdx.x), kThreads / kWarpSize - 1)]);
  return mine;
}

/// What becomes of rows [first, first + count), whose sums total_of(row - first) gives. `residual`:
/// for kAdd, the old value of the thread's first row, read ahead. `best`: one for each warp.
template <VectorEpilogue kEpilogue, class TotalOf>
__device__ void finish_rows(const MatrixVectorParams& p, int first, int count, float residual,
                            const TotalOf& total_of, TokenCandidate* best) {
  const int tid = static_cast<int>(threadIdx.x);
  if constexpr (kEpilogue == VectorEpilogue::kGatedSilu) {
    for (int i = tid; 2 * i < count; i += kVectorThreads) {
      const float gate = total_of(2 * i);
      p.y[first / 2 + i] = gate / (1 + __expf(-gate)) * total_of(2 * i + 1);
    }
  } else if constexpr (kEpilogue == VectorEpilogue::kAdd) {
    if (tid < count) p.y[first + tid] = residual + total_of(tid);
    for (int i = tid + kVectorThreads; i < count; i += kVectorThreads)
      p.y[first + i] += total_of(i);
  } else if constexpr (kEpilogue == VectorEpilogue::kStore) {
    for (int i = tid; i < count; i += kVectorThreads) p.y[first + i] = total_of(i);
  } else {
    const std::int64_t tokens = p.temperature > 0 ? p.totals[p.sequence] : 0;
    TokenCandidate mine{-__int_as_float(0x7f800000), 0};
    for (int i = tid; i < count; i += kVectorThreads) {
      const float logit = total_of(i);
      p.y[first + i] = logit;
      mine = better(mine, {token_score(logit, p.temperature, p.seed, p.sequence, tokens, first + i),
                           first + i});
    }
    mine = best_of_block<kVectorThreads>(mine, best);
    if (tid == 0) p.candidates[blockIdx.x] = mine;
  }
}

template <class Element, VectorEpilogue kEpilogue, bool kNorm>
__global__ void __launch_bounds__(kVectorThreads, 2)
    matrix_vector_kernel(const __grid_constant__ MatrixVectorParams p) {
  using H = Half<Element>;
  constexpr int kUnit = kEpilogue == VectorEpilogue::kGatedSilu ? 2 : 1;
  // x, the first and the last four of every eight in a plane each, so that a warp's reads meet no
  // bank twice; then the ring [stages, threads] of 16 bytes; then the rows' sums.
  extern __shared__ __align__(16) unsigned char vector_memory[];
  __shared__ float carry[kVectorWarps];  // of a warp's first row, where another warp began it
  __shared__ float squares[kVectorWarps];
  __shared__ TokenCandidate best[kVectorWarps];

  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / kWarpSize;
  const int lane = tid % kWarpSize;
  const int chunks = (p.cols + kVectorChunk - 1) / kVectorChunk;
  float4* const x_low = reinterpret_cast<float4*>(vector_memory);
  float4* const x_high = x_low + chunks * kWarpSize;
  uint4* const ring = reinterpret_cast<uint4*>(x_high + chunks * kWarpSize);
  float* const sums = reinterpret_cast<float*>(ring + kVectorStages * kVectorThreads);

  const int units = p.rows / kUnit;
  const auto border = [&](unsigned block) {
    return static_cast<int>(static_cast<std::int64_t>(units) * block / gridDim.x) * kUnit;
  };
  const int first = border(blockIdx.x);
  const int count = border(blockIdx.x + 1) - first;
  const int span = (count * chunks + kVectorWarps - 1) / kVectorWarps;
  const int begin = min(warp * span, count * chunks);
  const int end = min(begin + span, count * chunks);

  int chunk = begin % chunks;
  int row = begin / chunks;
  int fetched = begin;
  int fetch_chunk = chunk;
  const std::uint16_t* from = static_cast<const std::uint16_t*>(p.matrix) +
                              static_cast<std::int64_t>(first + row) * p.cols +
                              chunk * kVectorChunk + lane * 8;
  const int row_step = p.cols - (chunks - 1) * kVectorChunk;
  const auto fetch = [&](int stage) {
    if (fetched < end) {
      copy_async_or_zero(ring + stage * kVectorThreads + tid, from,
                         fetch_chunk * kVectorChunk + lane * 8 < p.cols);
      ++fetched;
      const bool last = ++fetch_chunk == chunks;
      from += last ? row_step : kVectorChunk;
      if (last) fetch_chunk = 0;
    }
    copies_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kVectorStages; ++stage) fetch(stage);
  if constexpr (kNorm) {
    for (int i = tid * 32; i < p.cols; i += kVectorThreads * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + i));
  }
  wait_for_previous_kernel();

  float residual = 0;
  if constexpr (kEpilogue == VectorEpilogue::kAdd)
    if (tid < count) residual = p.y[first + tid];
  float square = 0;
#pragma unroll 4
  for (int i = tid; i < chunks * 2 * kWarpSize; i += kVectorThreads) {
    float4 x = {0, 0, 0, 0};
    if (4 * i < p.cols) {
      x = __ldcg(reinterpret_cast<const float4*>(p.x) + i);
      if constexpr (kNorm) {
        const float4 w = __ldg(reinterpret_cast<const float4*>(p.norm) + i);
        square += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
        x = {x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w};
      }
    }
    (i % 2 == 0 ? x_low : x_high)[i / 2] = x;
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      square += __shfl_xor_sync(0xffffffffU, square, step);
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();

  float even = 0;
  float odd = 0;
  bool whole = chunk == 0;  // the row's first chunk is this warp's
  int stage = 0;
  const int tail = end - kVectorStages - kVectorLead;
  if (begin >= tail) let_next_kernel_start();
  for (int i = begin; i < end; ++i) {
    if (i + 1 == tail) let_next_kernel_start();
    copies_wait_but<kVectorStages - 1>();
    const uint4 w = ring[stage * kVectorThreads + tid];
    const float4 a = x_low[chunk * kWarpSize + lane];
    const float4 b = x_high[chunk * kWarpSize + lane];
    even = fmaf(H::low(w.x), a.x, even);
    odd = fmaf(H::high(w.x), a.y, odd);
    even = fmaf(H::low(w.y), a.z, even);
    odd = fmaf(H::high(w.y), a.w, odd);
    even = fmaf(H::low(w.z), b.x, even);
    odd = fmaf(H::high(w.z), b.y, odd);
    even = fmaf(H::low(w.w), b.z, even);
    odd = fmaf(H::high(w.w), b.w, odd);
    fetch(stage);
    stage = stage + 1 == kVectorStages ? 0 : stage + 1;
    const bool last = ++chunk == chunks;
    if (last || i + 1 == end) {
      float sum = even + odd;
#pragma unroll
      for (int step = kWarpSize / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffU, sum, step);
      if (lane == 0) (whole ? sums[row] : carry[warp]) = sum;
      even = odd = 0;
      chunk = 0;
      whole = true;
      ++row;
    }
  }
  __syncthreads();

  float scale = 1;
  if constexpr (kNorm) {
    float mean = 0;
#pragma unroll
    for (int i = 0; i < kVectorWarps; ++i) mean += squares[i];
    scale = 1 / sqrtf(mean / static_cast<float>(p.cols) + p.norm_eps);
  }
  const auto total_of = [&](int r) {
    float sum = sums[r];
    for (int w = r * chunks / span + 1; w < kVectorWarps && w * span < (r + 1) * chunks; ++w)
      sum += carry[w];
    return sum * scale;
  };
  finish_rows<kEpilogue>(p, first, count, residual, total_of, best);
}

template <class Params>
void launch_vector_kernel(const char* name, void (*kernel)(Params), const Params& params,
                          int blocks, std::int64_t shared_bytes, bool overlap,
                          cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.blockDim = dim3(kVectorThreads);
  launch.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = overlap ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&launch, kernel, params), name);
}

}  // namespace detail

namespace detail {

/// What launches of products with one vector need to know of the current device.
class VectorDevice {
 public:
  /// \throws Error(kDevice).
  VectorDevice(bool overlap, int multiprocessors) {
    int device = 0;
    int major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&blocks_, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    if (multiprocessors > 0) blocks_ = std::min(blocks_, multiprocessors);
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    check_cuda(
        cudaDeviceGetAttribute(&most_shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
    clusters_ = major >= 9;
    overlap_ = overlap && clusters_;
  }

  int blocks() const { return blocks_; }
  bool overlap() const { return overlap_; }
  /// Whether blocks can form clusters.
  bool has_clusters() const { return clusters_; }
  /// Dynamic shared memory that a block may have.
  int most_bytes() const { return most_shared_ - kStaticBytes; }
  /// The same if two blocks are to share a multiprocessor.
  int half_bytes() const { return (most_shared_ - 1024) / 2 - kStaticBytes / 2; }
  /// So much that no two blocks share a multiprocessor.
  std::int64_t bytes_alone(std::int64_t bytes) const {
    return std::max<std::int64_t>(bytes, most_shared_ / 2 + 1024);
  }
  /// Sets a kernel's attributes; that address is to be launched (backend.cuh).
  template <class Kernel>
  void prepare(Kernel kernel) const {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes()),
        "cudaFuncSetAttribute");
    prefer_shared_memory(kernel);
  }

 private:
  static constexpr int kStaticBytes = 1024;  // what the kernels declare besides, rounded up

  bool overlap_ = false;
  bool clusters_ = false;
  int blocks_ = 0;
  int most_shared_ = 0;
};

/// A kernel's parameters of a MatrixVectorTask or QuantisedVectorTask.
template <class Task>
MatrixVectorParams vector_params(const Task& task) {
  return {.matrix = task.matrix,
          .x = task.x,
          .norm = task.norm,
          .y = task.y,
          .candidates = task.candidates,
          .totals = task.totals,
          .sequence = task.sequence,
          .seed = task.choice.seed,
          .norm_eps = task.norm_eps,
          .temperature = task.choice.temperature,
          .rows = static_cast<int>(task.rows),
          .cols = static_cast<int>(task.cols)};
}

}  // namespace detail

/// Launches products with one vector on the current device. Holds no memory.
///
/// `overlap`: launches may start before the kernel before them in the stream has ended and fetch
/// weights meanwhile (programmatic dependent launch, sm_90 and later). Nobody may then write
/// weights in the stream.
template <class Element>
class MatrixVectorPlan {
 public:
  /// multiprocessors: how many a launch takes up, so that another stream's kernels keep the rest;
  /// 0: all. \throws Error(kDevice).
  explicit MatrixVectorPlan(bool overlap, int multiprocessors = 0)
      : device_(overlap, multiprocessors) {
    for (const std::array<Kernel, 2>& both : kernels_)
      for (const Kernel kernel : both) device_.prepare(kernel);
  }

  /// Blocks of every launch: candidates that kChoose leaves.
  int blocks() const { return device_.blocks(); }
  /// Whether launches start early: asked for, and the GPU can.
  bool overlap() const { return device_.overlap(); }

  /// May be captured. `alone`: not two of its blocks on a multiprocessor, for a launch whose blocks
  /// find the multiprocessors busy and would crowd on the first that is free.
  /// \throws Error(kShape) if the extents do not fit; Error(kDevice) if the launch is refused.
  void launch(const MatrixVectorTask<Element>& task, VectorEpilogue epilogue, cudaStream_t stream,
              bool alone = false) const {
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"matrix-vector product does not fit", "MatrixVectorTask",
                                        field, expected, std::to_string(found)});
    };
    require(task.cols >= 8 && task.cols % 8 == 0, "cols", "a positive multiple of 8", task.cols);
    require(task.rows >= 1 && task.rows <= (std::int64_t{1} << 30), "rows", "1 to 2^30", task.rows);
    require(epilogue != VectorEpilogue::kGatedSilu || task.rows % 2 == 0, "rows",
            "an even number where gated", task.rows);
    const std::int64_t padded =
        (task.cols + detail::kVectorChunk - 1) / detail::kVectorChunk * detail::kVectorChunk;
    const std::int64_t rows_of_block = 2 * ((task.rows / 2 + blocks() - 1) / blocks()) + 2;
    std::int64_t bytes = (padded + rows_of_block) * static_cast<std::int64_t>(sizeof(float)) +
                         std::int64_t{detail::kVectorStages} * detail::kVectorThreads * 16;
    require(bytes <= device_.most_bytes(), "cols and rows", "what shared memory holds", bytes);
    if (alone) bytes = device_.bytes_alone(bytes);
    detail::launch_vector_kernel(
        "matrix_vector_kernel",
        kernels_[static_cast<std::size_t>(epilogue)][task.norm != nullptr ? 1 : 0],
        detail::vector_params(task), blocks(), bytes, overlap(), stream);
  }

 private:
  using Kernel = void (*)(detail::MatrixVectorParams);

  template <VectorEpilogue kEpilogue>
  static std::array<Kernel, 2> kernels_of() {
    return {detail::matrix_vector_kernel<Element, kEpilogue, false>,
            detail::matrix_vector_kernel<Element, kEpilogue, true>};
  }

  // By epilogue, without and with a norm: those that the attributes are set on (backend.cuh).
  std::array<std::array<Kernel, 2>, 4> kernels_ = {
      kernels_of<VectorEpilogue::kStore>(), kernels_of<VectorEpilogue::kAdd>(),
      kernels_of<VectorEpilogue::kGatedSilu>(), kernels_of<VectorEpilogue::kChoose>()};
  detail::VectorDevice device_;
};

}  // namespace sluice
