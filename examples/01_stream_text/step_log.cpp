// SPDX-License-Identifier: MIT
#include "step_log.hpp"

#include <algorithm>
#include <utility>

#include "support/terminal.hpp"

namespace stream_text {

namespace {

constexpr std::int64_t kFirstWidth = 16;
constexpr int kBinsPerPart = 8;

void append(StepBin& bin, const StepBin& next) {
  bin.to = next.to;
  bin.latency.merge(next.latency);
  bin.resident_bytes = next.resident_bytes;
}

}  // namespace

StepLog::StepLog(std::int64_t total, int parts)
    : parts_(parts),
      width_(total > 0 ? (total + parts - 1) / parts : kFirstWidth),
      bins_(static_cast<std::size_t>(total > 0 ? parts : parts * kBinsPerPart)) {}

void StepLog::record(std::int64_t duration_ns) {
  if (used_ == 0 || bins_[used_ - 1].to - bins_[used_ - 1].from == width_) {
    if (used_ == bins_.size()) join_pairs();
    StepBin& fresh = bins_[used_++];
    fresh.latency.reset();
    fresh.from = fresh.to = steps_;
  }
  StepBin& bin = bins_[used_ - 1];
  bin.latency.record(duration_ns);
  bin.to = ++steps_;
  if (bin.to - bin.from == width_) bin.resident_bytes = support::resident_bytes();
}

void StepLog::join_pairs() {
  const std::size_t pairs = (used_ + 1) / 2;
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    if (pair > 0) std::swap(bins_[pair], bins_[2 * pair]);
    if (2 * pair + 1 < used_) append(bins_[pair], bins_[2 * pair + 1]);
  }
  used_ = pairs;
  width_ *= 2;
}

std::vector<StepBin> StepLog::finish() {
  if (used_ > 0 && bins_[used_ - 1].resident_bytes == 0)
    bins_[used_ - 1].resident_bytes = support::resident_bytes();
  bins_.resize(used_);
  const auto parts = std::min(used_, static_cast<std::size_t>(parts_));
  std::vector<StepBin> joined;
  for (std::size_t part = 0; part < parts; ++part) {
    const std::size_t begin = used_ * part / parts;
    const std::size_t end = used_ * (part + 1) / parts;
    joined.push_back(std::move(bins_[begin]));
    for (std::size_t bin = begin + 1; bin < end; ++bin) append(joined.back(), bins_[bin]);
  }
  return joined;
}

}  // namespace stream_text
