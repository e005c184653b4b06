// SPDX-License-Identifier: MIT
/// What decode attention on the GPU must compute, from the library's own bookkeeping (Retention),
/// rotations (Rotary) and float64 attention. Compiled by the host compiler alone; nothing here
/// names a type that nvcc must not see.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace sluice_test {

struct OracleConfig {
  int num_qo_heads = 1;
  int num_kv_heads = 1;
  int head_dim = 64;
  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = 0;  ///< 0: unlimited
  std::int64_t capacity = 0;
  bool in_text = false;
  double origin = 0;
  int rotary_dim = 0;  ///< 0: heads are not rotated
  double theta = 10000;
  bool interleaved = false;
  bool yarn = false;
  float sm_scale = 1;
};

/// One sequence.
class DecodeOracle {
 public:
  explicit DecodeOracle(const OracleConfig& config);
  ~DecodeOracle();
  DecodeOracle(DecodeOracle&&) noexcept;

  std::vector<double> frequencies() const;  // [rotary_dim / 2]
  double attention_factor() const;
  /// Cosines and sines of a position: [2, rotary_dim / 2].
  std::vector<float> angles(double position) const;

  /// Tokens pass whose keys and values are not looked at.
  void skip(std::int64_t tokens);
  std::int64_t total() const;
  /// The next token comes. Returns its slot.
  std::int64_t append();
  /// The appended token's key as it must be stored, before rounding. key: [head_dim].
  std::vector<float> stored_key(const float* key) const;
  /// Attention of the appended token. query: [num_qo_heads, head_dim]; keys, values:
  /// [num_kv_heads, capacity, head_dim], what the cache holds; out: [num_qo_heads, head_dim].
  void attend(const float* query, const float* keys, const float* values, double* out,
              double* lse) const;
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Quantises a row as the CPU's cache does (KvRow). to: row.size() codes. Returns the row's scale.
/// Element: std::int8_t or fp8_e4m3.
template <class Element>
float quantise_on_cpu(std::span<const float> row, Element* to);

}  // namespace sluice_test
