// SPDX-License-Identifier: MIT
/// What the benchmark programs print: one JSON object a line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>

namespace sluice::bench {

/// One JSON object, written field by field; printed on stdout when it goes.
class Record {
 public:
  explicit Record(const std::string& kind) { field("kind", kind); }
  ~Record() { std::cout << text_ << "}" << std::endl; }
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  Record& field(const char* name, const std::string& value) {
    return json(name, "\"" + value + "\"");
  }
  Record& field(const char* name, std::int64_t value) { return json(name, std::to_string(value)); }
  /// Six digits; null where it is no number.
  Record& field(const char* name, double value) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.6g", value);
    return json(name, std::isfinite(value) ? buffer : "null");
  }
  /// `value` is JSON already.
  Record& json(const char* name, const std::string& value) {
    text_ += (text_.empty() ? "{\"" : ", \"") + std::string(name) + "\": " + value;
    return *this;
  }

 private:
  std::string text_;
};

}  // namespace sluice::bench
