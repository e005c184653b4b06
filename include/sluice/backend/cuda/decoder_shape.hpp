// SPDX-License-Identifier: MIT
/// The extents of a decoder on the GPU and the types of its cache, for host compilers and nvcc
/// alike.
#pragma once

#include <concepts>
#include <cstdint>

#include "sluice/core/element.hpp"

namespace sluice {

/// Types of keys and values that are codes of a byte, with a float scale for each row
/// (cache/kv_element.hpp).
template <class T>
concept CudaCode = std::same_as<T, std::int8_t> || std::same_as<T, fp8_e4m3>;

/// Extents of a decoder: DecoderConfig's, for the models that this backend runs (Llama 2 and 3,
/// Mistral, SmolLM2): RMS norms, one rotation for all layers, SiLU, no biases.
struct CudaDecoderShape {
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;        ///< a multiple of 8
  std::int64_t intermediate_size = 0;  ///< a multiple of 8
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t num_layers = 0;
  double norm_eps = 1e-5;
  double sm_scale = 0;  ///< of attention scores: 1 / sqrt(head_dim)

  std::int64_t query_size() const { return num_qo_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
  std::int64_t fused_size() const { return query_size() + 2 * kv_size(); }
};

}  // namespace sluice
