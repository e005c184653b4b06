// SPDX-License-Identifier: MIT
#include "support/report_text.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include <unistd.h>

#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"

namespace support {

namespace {

/// Calls visit for every weight matrix once, a tied output not again.
template <class Visit>
void each_matrix(const sluice::DecoderWeights& weights, Visit&& visit) {
  visit(weights.embedding);
  if (weights.output.data != weights.embedding.data) visit(weights.output);
  for (const sluice::DecoderLayerWeights& layer : weights.layers)
    for (const sluice::WeightMatrix* matrix : {&layer.query, &layer.key, &layer.value,
                                               &layer.output, &layer.gate, &layer.up, &layer.down})
      visit(*matrix);
}

}  // namespace

std::string megabytes(std::int64_t bytes) {
  return bytes < (1 << 20) ? format("%.1f KiB", static_cast<double>(bytes) / (1 << 10))
                           : format("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

ModelFacts facts_of(const sluice::Decoder& model) {
  ModelFacts facts;
  std::map<sluice::ElementType, std::int64_t> by_type;
  each_matrix(model.weights(), [&](const sluice::WeightMatrix& matrix) {
    facts.parameters += matrix.rows * matrix.cols;
    facts.bytes += matrix.bytes();
    by_type[matrix.type] += matrix.bytes();
  });
  std::vector<std::pair<std::int64_t, sluice::ElementType>> order;
  for (const auto& [type, bytes] : by_type) order.emplace_back(bytes, type);
  std::sort(order.rbegin(), order.rend());
  for (const auto& [bytes, type] : order)
    facts.types += (facts.types.empty() ? "" : ", ") + std::string(to_string(type));
  return facts;
}

std::int64_t cache_bytes(const sluice::Decoder& model, const sluice::CacheOptions& cache,
                         std::int64_t element_bytes) {
  const std::size_t of_halves = model.cache_bytes<sluice::f16>(plan_cache(model.config(), cache));
  return static_cast<std::int64_t>(of_halves) / 2 * element_bytes;
}

void require_memory(std::int64_t bytes, const std::string& what) {
  const std::int64_t memory = std::int64_t{::sysconf(_SC_PHYS_PAGES)} * ::sysconf(_SC_PAGESIZE);
  if (memory > 0 && bytes > memory)
    throw sluice::Error(sluice::ErrorCode::kCapacity,
                        {"the cache does not fit into this machine's memory", what, "",
                         "at most " + megabytes(memory), megabytes(bytes)});
}

std::string latency_text(const sluice::LatencySummary& s) {
  return format("p50 %.2f  p95 %.2f  p99 %.2f  p99.9 %.2f  max %.2f ms", s.p50_ms, s.p95_ms,
                s.p99_ms, s.p99_9_ms, s.max_ms);
}

sluice::Json latency_json(const sluice::LatencySummary& s) {
  return {{"count", s.count}, {"min", s.min_ms}, {"mean", s.mean_ms},   {"p50", s.p50_ms},
          {"p95", s.p95_ms},  {"p99", s.p99_ms}, {"p99_9", s.p99_9_ms}, {"max", s.max_ms}};
}

std::string deadline_text(const sluice::DeadlineReport& r) {
  return format("missed %lld of %lld", static_cast<long long>(r.misses),
                static_cast<long long>(r.frames)) +
         (r.frames > 0 ? format(" (%.2f%%)", 100 * r.miss_rate) : std::string()) +
         (r.frames > 1 ? format(", jitter %.2f ms, largest gap %.1f ms", r.gap_deviation_ms,
                                r.largest_gap_ms)
                       : std::string());
}

sluice::Json deadline_json(const sluice::DeadlineReport& r) {
  const auto number = [](double value) {
    return std::isfinite(value) ? sluice::Json(value) : sluice::Json();
  };
  return {{"frames", r.frames},
          {"misses", r.misses},
          {"miss_rate", number(r.miss_rate)},
          {"jitter_ms", number(r.gap_deviation_ms)},
          {"gap_p99_less_p50_ms", number(r.gap_p99_less_p50_ms)},
          {"largest_gap_ms", number(r.largest_gap_ms)}};
}

}  // namespace support
