// SPDX-License-Identifier: MIT
/// The small kernels of a decoder's step: choosing a token and looking up its embedding, norms and
/// gated activations of several rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"

namespace sluice::detail {

inline constexpr int kRowThreads = 256;
/// Blocks that share a row of logits.
inline constexpr int kCandidateParts = 8;

/// Launches with or without early start.
template <class... Parameters, class... Arguments>
void launch_kernel_with(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                        std::size_t shared_bytes, cudaStream_t stream, bool overlap,
                        Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = grid;
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = overlap ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&launch, kernel, Parameters(arguments)...), name);
}
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                   cudaStream_t stream, bool overlap, Arguments&&... arguments) {
  launch_kernel_with(name, kernel, grid, threads, 0, stream, overlap,
                     std::forward<Arguments>(arguments)...);
}

template <int kThreads>
__device__ float sum_of_block(float x, float* scratch) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffU, x, step);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarpSize; ++i) sum += scratch[i];
  return sum;
}

/// y = x * norm / sqrt(mean(x^2) + eps), a block per row, rounded once. cols: a multiple of 4.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    rms_norm_kernel(const float* x, const float* norm, float eps, std::uint16_t* y, int cols) {
  __shared__ float scratch[kRowThreads / kWarpSize];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto row = static_cast<std::int64_t>(blockIdx.x) * cols;
  float square = 0;
  for (int i = 4 * static_cast<int>(threadIdx.x); i < cols; i += 4 * kRowThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + row + i);
    square += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
  }
  const float mean = sum_of_block<kRowThreads>(square, scratch) / static_cast<float>(cols);
  const float scale = 1 / sqrtf(mean + eps);
  for (int i = 4 * static_cast<int>(threadIdx.x); i < cols; i += 4 * kRowThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + row + i);
    const float4 w = *reinterpret_cast<const float4*>(norm + i);
    *reinterpret_cast<uint2*>(y + row + i) = {
        Half<Element>::pack(v.x * w.x * scale, v.y * w.y * scale),
        Half<Element>::pack(v.z * w.z * scale, v.w * w.w * scale)};
  }
}

/// y[i] = silu(x[2 i]) * x[2 i + 1] for `count` outputs, a multiple of 2.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    gated_silu_kernel(const float* x, std::uint16_t* y, std::int64_t count) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t i = 2 * (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x);
  if (i >= count) return;
  const float4 v = *reinterpret_cast<const float4*>(x + 2 * i);
  *reinterpret_cast<std::uint32_t*>(y + i) =
      Half<Element>::pack(v.x / (1 + __expf(-v.x)) * v.y, v.z / (1 + __expf(-v.z)) * v.w);
}

struct TokenChoiceParams {
  const float* logits;             // [rows, vocab_size]
  TokenCandidate* candidates;      // [rows, parts]
  const std::int64_t* totals;      // [sequences]: the index of the token that is chosen
  std::int32_t* tokens;            // [sequences]: the token that comes next
  std::int32_t* history;           // [sequences, history_size] or null
  const std::uint16_t* embedding;  // [vocab_size, hidden_size]
  float* hidden;                   // [sequences, hidden_size]; null: not looked up
  std::int64_t history_size;
  std::int64_t sequence;  // of row 0
  std::uint64_t seed;
  float temperature;
  int parts;
  int vocab_size;
  int hidden_size;
};

/// Candidates of logits that exist already: block (part, row).
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    candidates_kernel(const __grid_constant__ TokenChoiceParams p) {
  __shared__ TokenCandidate best[kThreads / kWarpSize];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t row = blockIdx.y;
  const std::int64_t sequence = p.sequence + row;
  const std::int64_t total = p.totals[sequence];
  const float* const logits = p.logits + row * p.vocab_size;
  TokenCandidate mine{-__int_as_float(0x7f800000), 0};
  for (int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
       i < p.vocab_size; i += p.parts * kThreads)
    mine = better(mine, {token_score(logits[i], p.temperature, p.seed, sequence, total, i), i});
  mine = best_of_block<kThreads>(mine, best);
  if (threadIdx.x == 0) p.candidates[row * p.parts + blockIdx.x] = mine;
}

/// Chooses among candidates, writes the token down and looks up its embedding, if that is wanted: a
/// block per row.
/// Idle sequences stay as they are.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    choose_token_kernel(const __grid_constant__ TokenChoiceParams p) {
  using H = Half<Element>;
  __shared__ TokenCandidate best[kRowThreads / kWarpSize];
  __shared__ std::int32_t chosen;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t row = blockIdx.x;
  const std::int64_t sequence = p.sequence + row;
  const std::int64_t total = p.totals[sequence];
  if (total < 0) return;
  if (p.parts > 0) {
    TokenCandidate mine{-__int_as_float(0x7f800000), 0};
    for (int i = tid; i < p.parts; i += kRowThreads)
      mine = better(mine, p.candidates[row * p.parts + i]);
    mine = best_of_block<kRowThreads>(mine, best);
    if (tid == 0) {
      chosen = mine.token;
      p.tokens[sequence] = mine.token;
      if (p.history != nullptr)
        p.history[sequence * p.history_size + total % p.history_size] = mine.token;
    }
  } else if (tid == 0) {
    chosen = p.tokens[sequence];
  }
  if (p.hidden == nullptr) return;
  __syncthreads();
  const std::uint16_t* const from = p.embedding + static_cast<std::int64_t>(chosen) * p.hidden_size;
  for (int i = 8 * tid; i < p.hidden_size; i += 8 * kRowThreads) {
    const uint4 v = *reinterpret_cast<const uint4*>(from + i);
    float4* const to = reinterpret_cast<float4*>(p.hidden + row * p.hidden_size + i);
    to[0] = {H::low(v.x), H::high(v.x), H::low(v.y), H::high(v.y)};
    to[1] = {H::low(v.z), H::high(v.z), H::low(v.w), H::high(v.w)};
  }
}

/// Embeddings of a chunk's tokens: a block per token.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    embedding_kernel(const std::int32_t* tokens, const std::uint16_t* embedding, float* hidden,
                     int hidden_size) {
  using H = Half<Element>;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint16_t* const from =
      embedding + static_cast<std::int64_t>(tokens[blockIdx.x]) * hidden_size;
  for (int i = 8 * static_cast<int>(threadIdx.x); i < hidden_size; i += 8 * kRowThreads) {
    const uint4 v = *reinterpret_cast<const uint4*>(from + i);
    float4* const to =
        reinterpret_cast<float4*>(hidden + static_cast<std::int64_t>(blockIdx.x) * hidden_size + i);
    to[0] = {H::low(v.x), H::high(v.x), H::low(v.y), H::high(v.y)};
    to[1] = {H::low(v.z), H::high(v.z), H::low(v.w), H::high(v.w)};
  }
}

}  // namespace sluice::detail
