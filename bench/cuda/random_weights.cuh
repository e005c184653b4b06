// SPDX-License-Identifier: MIT
/// Models of any geometry with weights drawn on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <sluice/backend/cuda/decoder.cuh>
#include <sluice/backend/cuda/quantised_layout.hpp>

#include "cuda/measure.cuh"

namespace sluice::bench {

inline void fill(Buffer<bf16, cuda>& matrix, std::int64_t cols, std::uint64_t salt) {
  fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(matrix.data()),
                             static_cast<std::int64_t>(matrix.size()), salt << 33,
                             1 / std::sqrt(static_cast<float>(cols)));
}

/// Random levels; whatever lies behind a chunk's levels becomes small, as f16 and as bytes.
static __global__ void fill_chunks(std::uint16_t* data, std::int64_t count, int chunk_bytes,
                                   std::uint64_t salt, std::uint16_t exponent) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t z = (static_cast<std::uint64_t>(i) + salt) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    const auto random = static_cast<std::uint16_t>(z >> 40);
    const bool level = 2 * i % chunk_bytes < kQuantisedLevelBytes;
    data[i] = level ? random : static_cast<std::uint16_t>(exponent | (random & 0x3ffU));
  }
}

/// A quantised matrix whose values have a size of some 1 / sqrt(cols).
inline CudaQuantisedMatrix random_quantised(ElementType type, std::int64_t rows, std::int64_t cols,
                                            std::uint64_t salt) {
  CudaQuantisedRows part{
      type, rows, cols,
      Buffer<std::uint8_t, cuda>(static_cast<std::size_t>(quantised_bytes(type, rows, cols)))};
  const int chunk_bytes = quantised_layout(type).chunk_bytes;
  const int level_bits = quantised_layout(type).chunk_cols == 64 ? 6 : 2;
  const auto log_size = static_cast<int>(std::log2(static_cast<double>(cols)) / 2) + level_bits;
  fill_chunks<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(part.content.data()),
                             static_cast<std::int64_t>(part.content.size() / 2), chunk_bytes,
                             salt << 33, static_cast<std::uint16_t>((15 - log_size) << 10));
  CudaQuantisedMatrix matrix;
  matrix.push_back(std::move(part));
  return matrix;
}

/// type: kBF16 or a quantised one, for all matrices but the embedding.
inline std::unique_ptr<CudaDecoderWeights<bf16>> random_weights(
    const CudaDecoderShape& shape, ElementType type = ElementType::kBF16) {
  auto weights =
      std::make_unique<CudaDecoderWeights<bf16>>(shape, false, type == ElementType::kBF16);
  const std::vector<float> ones(static_cast<std::size_t>(shape.hidden_size), 1.0F);
  std::uint64_t salt = 1;
  fill(weights->embedding, 1, salt++);
  if (is_quantised(type))
    weights->quantised_output = random_quantised(type, shape.vocab_size, shape.hidden_size, salt++);
  else
    fill(weights->output, shape.hidden_size, salt++);
  weights->output_norm.upload(ones);
  for (CudaLayerWeights<bf16>& layer : weights->layers) {
    layer.attention_norm.upload(ones);
    layer.feed_forward_norm.upload(ones);
    if (is_quantised(type)) {
      layer.quantised_query_key_value =
          random_quantised(type, shape.fused_size(), shape.hidden_size, salt++);
      layer.quantised_output =
          random_quantised(type, shape.hidden_size, shape.query_size(), salt++);
      layer.quantised_gate_up =
          random_quantised(type, 2 * shape.intermediate_size, shape.hidden_size, salt++);
      layer.quantised_down =
          random_quantised(type, shape.hidden_size, shape.intermediate_size, salt++);
      continue;
    }
    fill(layer.query_key_value, shape.hidden_size, salt++);
    fill(layer.output, shape.query_size(), salt++);
    fill(layer.gate_up, shape.hidden_size, salt++);
    fill(layer.down, shape.intermediate_size, salt++);
  }
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return weights;
}

}  // namespace sluice::bench
