// SPDX-License-Identifier: MIT
// Words and numbers that the examples put into their reports.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

#include "sluice/io/json.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/deadline.hpp"
#include "sluice/stream/metrics.hpp"

namespace support {

/// snprintf() into a string of at most 255 characters.
template <class... Values>
std::string format(const char* pattern, Values... values) {
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(), pattern, values...);
  return text.data();
}

std::string megabytes(std::int64_t bytes);

struct ModelFacts {
  std::int64_t parameters = 0;  // of the matrices
  std::int64_t bytes = 0;
  std::string types;  // by falling share
};
ModelFacts facts_of(const sluice::Decoder& model);

/// Bytes of keys and values that a cache of these options will hold, before it is made.
std::int64_t cache_bytes(const sluice::Decoder& model, const sluice::CacheOptions& cache,
                         std::int64_t element_bytes);
/// \throws sluice::Error(kCapacity) when the machine has not as much memory. Systems that promise
/// more than they have would end the program later, without a word. `what` names the cache.
void require_memory(std::int64_t bytes, const std::string& what);

std::string latency_text(const sluice::LatencySummary& s);
sluice::Json latency_json(const sluice::LatencySummary& s);

/// Deadlines missed, of how many, and jitter.
std::string deadline_text(const sluice::DeadlineReport& r);
sluice::Json deadline_json(const sluice::DeadlineReport& r);

}  // namespace support
