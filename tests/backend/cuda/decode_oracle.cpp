// SPDX-License-Identifier: MIT
#include "backend/cuda/decode_oracle.hpp"

#include <array>
#include <optional>
#include <span>

#include <sluice/attention/reference.hpp>
#include <sluice/cache/kv_element.hpp>
#include <sluice/cache/retention.hpp>
#include <sluice/position/rotary.hpp>

namespace sluice_test {

using namespace sluice;

struct DecodeOracle::State {
  OracleConfig config;
  Retention retention;
  std::optional<Rotary> rotary;
};

namespace {

RetentionConfig retention_config(const OracleConfig& c) {
  RetentionConfig result = c.window_size == 0
                               ? RetentionConfig::full(c.capacity, 1)
                               : RetentionConfig::sink_window(c.num_sink_tokens, c.window_size, 1);
  result.num_sink_tokens = c.num_sink_tokens;
  result.capacity = c.capacity;
  result.position_rule = c.in_text ? PositionRule::kInText : PositionRule::kInCache;
  result.origin = c.origin;
  return result;
}

std::optional<Rotary> make_rotary(const OracleConfig& c) {
  if (c.rotary_dim == 0) return std::nullopt;
  RotaryConfig config{.head_dim = c.head_dim, .rotary_dim = c.rotary_dim, .theta = c.theta};
  config.pairing = c.interleaved ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit;
  if (c.yarn) config.scaling = YarnScaling{.factor = 4};
  return Rotary(config);
}

}  // namespace

DecodeOracle::DecodeOracle(const OracleConfig& config)
    : state_(new State{config, Retention(retention_config(config)), make_rotary(config)}) {}
DecodeOracle::~DecodeOracle() = default;
DecodeOracle::DecodeOracle(DecodeOracle&&) noexcept = default;

std::vector<double> DecodeOracle::frequencies() const {
  std::vector<double> result;
  for (int i = 0; i < state_->config.rotary_dim / 2; ++i)
    result.push_back(state_->rotary->frequency(i));
  return result;
}

double DecodeOracle::attention_factor() const {
  return state_->rotary ? state_->rotary->attention_factor() : 1;
}

std::vector<float> DecodeOracle::angles(double position) const {
  std::vector<float> row(static_cast<std::size_t>(state_->config.rotary_dim));
  if (state_->rotary) state_->rotary->angles(position, row.data());
  return row;
}

void DecodeOracle::skip(std::int64_t tokens) {
  for (std::int64_t i = 0; i < tokens; ++i) {
    state_->retention.append(1);
    state_->retention.commit();
  }
}

std::int64_t DecodeOracle::total() const {
  return state_->retention.total();
}

std::int64_t DecodeOracle::append() {
  state_->retention.append(1);
  std::array<SegmentRule, Retention::kMaxSegments> rules;
  const int count = state_->retention.rules(1, rules);
  const SegmentRule& newest = rules[static_cast<std::size_t>(count - 1)];
  return newest.first_slot + newest.count - 1;
}

std::vector<float> DecodeOracle::stored_key(const float* key) const {
  std::vector<float> result(key, key + state_->config.head_dim);
  if (state_->rotary) {
    const double position = state_->retention.write_position(state_->retention.total() - 1);
    state_->rotary->rotate(angles(position).data(), key, result.data());
  }
  return result;
}

void DecodeOracle::attend(const float* query, const float* keys, const float* values, double* out,
                          double* lse) const {
  const OracleConfig& c = state_->config;
  std::array<SegmentRule, Retention::kMaxSegments> rules;
  const int count = state_->retention.rules(1, rules);
  std::vector<Segment<float>> segments;
  for (int i = 0; i < count; ++i) {
    Segment<float> segment;
    segment.rule = rules[static_cast<std::size_t>(i)];
    segment.keys = keys + segment.rule.first_slot * c.head_dim;
    segment.values = values + segment.rule.first_slot * c.head_dim;
    segment.key_head_stride = segment.value_head_stride = c.capacity * c.head_dim;
    segment.key_token_stride = segment.value_token_stride = c.head_dim;
    segments.push_back(segment);
  }
  const std::int64_t index = state_->retention.total() - 1;
  const AttentionVariant<> variant{c.sm_scale,
                                   CausalWindow{state_->retention.window(), c.num_sink_tokens}};
  attend_reference(HeadsView<const float>(query, 1, c.num_qo_heads, c.head_dim), index,
                   state_->retention.write_position(index),
                   std::span<const Segment<float>>(segments), variant,
                   state_->rotary ? &*state_->rotary : nullptr, c.num_kv_heads,
                   HeadsView<double>(out, 1, c.num_qo_heads, c.head_dim), lse);
}

void DecodeOracle::commit() {
  state_->retention.commit();
}

template <class Element>
float quantise_on_cpu(std::span<const float> row, Element* to) {
  float scale = 0;
  KvRow<Element>::quantise(row.data(), static_cast<std::int64_t>(row.size()), to, &scale);
  return scale;
}
template float quantise_on_cpu(std::span<const float> row, std::int8_t* to);
template float quantise_on_cpu(std::span<const float> row, fp8_e4m3* to);

}  // namespace sluice_test
