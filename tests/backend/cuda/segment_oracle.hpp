// SPDX-License-Identifier: MIT
/// What segment attention must compute, in float64 and plain loops, from the definitions alone: no
/// code of the library is used. Compiled by the host compiler; nothing here names a type that nvcc
/// must not see.
#pragma once

#include <cstdint>
#include <vector>

namespace sluice_test {

/// A segment whose rows are floats: [heads of the class, count, head_dim].
struct OracleSegment {
  std::int64_t first_index = 0;
  std::int64_t count = 0;
  std::int64_t visible = 0;
  double first_position = 0;
  double shift = 0;
  double ceiling = 0;
  std::int32_t group = 0;
  std::vector<float> keys;
  std::vector<float> values;
};

struct OracleVariant {
  double sm_scale = 1;
  bool all_visible = false;
  std::int64_t window_size = 0;
  std::int64_t num_sink_tokens = 0;
  std::int32_t own_group = 0;
  bool every_group = false;  ///< the window rules all groups (CausalWindow)
  bool bidirectional = false;
  double soft_cap = 0;        ///< 0: none
  std::vector<float> slopes;  ///< ALiBi, or empty
  std::vector<float> sinks;   ///< logits per query head, or empty

  bool sees(std::int64_t query, std::int64_t key, std::int32_t group) const;
};

struct OracleRotation {
  std::vector<double> frequencies;
  double factor = 1;
  bool interleaved = false;
};

/// One session, the heads of one class. query: [queries, qo_heads, head_dim]; out and lse:
/// [queries, qo_heads(, head_dim)]; only the query heads of `kv_heads` are written.
void attend_oracle(const float* query, std::int64_t queries, std::int64_t qo_heads,
                   std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t first_index,
                   double first_position, const std::vector<OracleSegment>& segments,
                   const std::vector<std::int32_t>& kv_heads, const OracleVariant& variant,
                   const OracleRotation& rotation, double* out, double* lse);

}  // namespace sluice_test
