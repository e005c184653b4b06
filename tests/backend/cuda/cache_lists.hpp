// SPDX-License-Identifier: MIT
/// What the CPU's caches let a query see after random operations, as plain numbers: segment lists
/// of each class of heads, rows as f16 holds them. Compiled by the host compiler; nothing here
/// names a type that nvcc must not see.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/cuda/segment_oracle.hpp"

namespace sluice_test {

/// One query of all heads in one layer.
struct CacheLists {
  std::string name;
  std::int64_t qo_heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t first_index = 0;
  double first_position = 0;
  double sm_scale = 1;
  OracleRotation rotation;
  std::vector<float> query;                        ///< [qo_heads, head_dim], not rotated
  std::vector<std::vector<std::int32_t>> classes;  ///< KV heads of each
  /// Of each class what the query sees, all of it; keys rotated, rows exact in f16.
  std::vector<std::vector<OracleSegment>> lists;
  std::vector<float> attended;  ///< attend() of the CPU: [qo_heads, head_dim]
};

/// After random appends, commits and roll-backs, at several moments of each stream: a DuoAttention
/// head map, a scored cache whose heads share a budget and whose entries stand at their ranks,
/// Quest's pages, sinks and a window.
std::vector<CacheLists> random_cache_lists(std::uint64_t seed);

}  // namespace sluice_test
