// SPDX-License-Identifier: MIT
/// Models of any geometry with weights drawn on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include <sluice/backend/cuda/decoder.cuh>

#include "cuda/measure.cuh"

namespace sluice::bench {

inline void fill(Buffer<bf16, cuda>& matrix, std::int64_t cols, std::uint64_t salt) {
  fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(matrix.data()),
                             static_cast<std::int64_t>(matrix.size()), salt << 33,
                             1 / std::sqrt(static_cast<float>(cols)));
}

inline std::unique_ptr<CudaDecoderWeights<bf16>> random_weights(const CudaDecoderShape& shape) {
  auto weights = std::make_unique<CudaDecoderWeights<bf16>>(shape, false);
  const std::vector<float> ones(static_cast<std::size_t>(shape.hidden_size), 1.0F);
  std::uint64_t salt = 1;
  fill(weights->embedding, 1, salt++);
  fill(weights->output, shape.hidden_size, salt++);
  weights->output_norm.upload(ones);
  for (CudaLayerWeights<bf16>& layer : weights->layers) {
    layer.attention_norm.upload(ones);
    layer.feed_forward_norm.upload(ones);
    fill(layer.query_key_value, shape.hidden_size, salt++);
    fill(layer.output, shape.query_size(), salt++);
    fill(layer.gate_up, shape.hidden_size, salt++);
    fill(layer.down, shape.intermediate_size, salt++);
  }
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return weights;
}

}  // namespace sluice::bench
