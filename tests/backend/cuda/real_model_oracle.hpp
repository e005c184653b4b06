// SPDX-License-Identifier: MIT
/// A model file with its weights rounded to bf16, for both sides: as bits for the GPU, and as the
/// CPU's decoder. Compiled by the host compiler alone; needs sluice::io.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace sluice_test {

struct RealLayer {
  std::vector<float> attention_norm, feed_forward_norm;
  std::vector<std::uint16_t> query, key, value, output, gate, up, down;  // bf16
};

struct RealModel {
  std::int64_t vocab_size, hidden_size, intermediate_size;
  std::int64_t num_qo_heads, num_kv_heads, head_dim;
  double norm_eps, sm_scale;
  std::vector<double> frequencies;
  bool interleaved;
  std::vector<std::uint16_t> embedding, output;  // bf16
  std::vector<float> output_norm;
  std::vector<RealLayer> layers;
};

/// The model file that tests use, "" where there is none: SLUICE_MODEL, or the default in the
/// cache.
std::string real_model_path();

/// \throws sluice::Error for a file that cannot be read or a model that the GPU does not run.
RealModel load_real_model(const std::string& path);

/// A stream of the CPU's decoder over those weights, keys and values in bf16 or in float32.
class RealStream {
 public:
  RealStream(const RealModel& model, std::int64_t sinks, std::int64_t window, int threads,
             bool rounded_cache);
  ~RealStream();
  /// Feeds a token; logits of the next. [vocab_size]
  std::span<const float> step(std::int32_t token);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice_test
