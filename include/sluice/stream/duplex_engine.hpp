// SPDX-License-Identifier: MIT
/// The two sides of a stream that reads while it writes, as steps: the source side reads units into
/// the source group, the target side asks its policy and writes into the target group. Duplex
/// (duplex.hpp) runs them on two threads or on one. What computes is a type of its own, one for
/// each backend.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/cache/segment_rule.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/spsc_ring.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/duplex_metrics.hpp"
#include "sluice/stream/duplex_options.hpp"
#include "sluice/stream/policy.hpp"
#include "sluice/stream/sampler.hpp"
#include "sluice/stream/unit_queue.hpp"

namespace sluice {

/// What the target side hands to its reader.
struct DuplexOutput {
  enum class Kind : std::uint8_t {
    kFinal,        ///< a token, for good
    kProvisional,  ///< a token that may be taken back
    kConfirmed,    ///< the oldest `count` provisional tokens became final
    kRetracted,    ///< the newest `count` provisional tokens were taken back
  };
  Kind kind = Kind::kFinal;
  Token token = 0;               ///< kFinal, kProvisional
  std::int64_t count = 1;        ///< tokens
  std::int64_t units_read = 0;   ///< source units visible when it was predicted
  std::int64_t tokens_read = 0;  ///< source tokens visible then
  std::int64_t time_ns = 0;      ///< monotonic_ns()
};

/// Why a target ended.
enum class DuplexEnd : std::uint8_t {
  kRunning,      ///< it has not
  kEndToken,     ///< an end token was to be written
  kPolicyStop,   ///< the policy answered kStop
  kTokenLimit,   ///< max_target_tokens were written
  kNothingLeft,  ///< the policy wanted to read or wait, and the source had ended
  kTargetFull,   ///< a full target cache has no room for another token
  kStopped,      ///< stop() was called
  kError,        ///< something threw; the caller gets it
};

constexpr std::string_view to_string(DuplexEnd end) {
  switch (end) {
    case DuplexEnd::kRunning: return "running";
    case DuplexEnd::kEndToken: return "end-token";
    case DuplexEnd::kPolicyStop: return "policy-stop";
    case DuplexEnd::kTokenLimit: return "token-limit";
    case DuplexEnd::kNothingLeft: return "nothing-left";
    case DuplexEnd::kTargetFull: return "target-full";
    case DuplexEnd::kStopped: return "stopped";
    case DuplexEnd::kError: return "error";
  }
  return "unknown";
}

/// Two groups of a model on some backend and what feeds them, with the members of CpuDuplexSides
/// (duplex_sides.hpp), whose comments say what each does.
template <class T>
concept DuplexSides = requires(T& sides, const T& seen, const typename T::Model& model,
                               const DecoderInput& input, std::span<const Token> tokens,
                               std::int64_t count, const MassProbe& probe, Sampler& sampler) {
  typename T::PositionLayout;
  { T::kInArrivalOrder } -> std::convertible_to<bool>;
  { T::decoder_of(model) } -> std::same_as<const Decoder&>;
  { seen.model() } -> std::same_as<const Decoder&>;
  { seen.cache_bytes() } -> std::same_as<std::size_t>;
  { seen.source_total() } -> std::same_as<std::int64_t>;
  { seen.source_room() } -> std::same_as<std::int64_t>;
  sides.read_source(input);
  sides.hold(count);
  sides.close();
  { seen.target_status(count) } -> std::same_as<CacheStatus>;
  sides.feed_target(tokens, count, probe);
  { sides.choose(sampler) } -> std::same_as<Token>;
  { seen.logits() } -> std::same_as<std::span<const float>>;
  { seen.newest_source_mass() } -> std::same_as<float>;
  sides.take_back(count);
};

/// State and steps. One thread at a time calls the source's functions, one those of the target;
/// they may be the same. No step allocates, locks, or makes a virtual call; it throws only what the
/// policy throws, and on a device what the device refuses.
///
/// The target sees a source snapshot: the units that its READs have shown it, whole units only,
/// fixed until the next READ. Keys and values of a unit depend on the source alone, so the same
/// answers of the policy give the same bits whenever the source side ran.
template <ReadWritePolicy Policy, DuplexSides Sides>
class DuplexEngine {
 public:
  /// How far a step got.
  enum class Progress : std::uint8_t {
    kStepped,      ///< something was done: call again
    kNeedsSource,  ///< waits for a unit, or the source's end
    kNeedsRoom,    ///< source: the target is too far behind; target: the output is full
    kEnded,        ///< nothing more will be done
  };

  using Model = typename Sides::Model;
  using Layout = typename Sides::PositionLayout;

  DuplexEngine(std::shared_ptr<const Model> model, const DuplexOptions& options, Policy policy,
               Layout layout)
      : options_(checked(options, Sides::decoder_of(*model))),
        policy_(std::move(policy)),
        needs_(needs_of(policy_, Sides::decoder_of(*model))),
        sides_(std::move(model), options, needs_, std::move(layout)),
        sampler_(options.sampler, this->model().config().vocab_size),
        queue_(options.queue_units, options.queue_tokens, options.queue_embeddings,
               options.queue_embeddings > 0 ? this->model().config().hidden_size : 0),
        units_(static_cast<std::size_t>(options.max_lead_units)),
        unit_tokens_(static_cast<std::size_t>(options.max_unit_tokens * options.coalesce_units)),
        unit_rows_(options.queue_embeddings > 0
                       ? unit_tokens_.size() *
                             static_cast<std::size_t>(this->model().config().hidden_size)
                       : 0),
        outputs_(options.output_capacity),
        provisional_(static_cast<std::size_t>(max_provisional() + 1)),
        metrics_(options.delay_capacity),
        last_kept_(options.target_prefix.back()) {}

  /// What a constructor would throw because of the options or the policy, whatever the backend.
  /// \throws Error(kConfig) naming what makes no sense.
  static void check(const DuplexOptions& options, const Policy& policy, const Decoder& model) {
    static_cast<void>(checked(options, model));
    static_cast<void>(needs_of(policy, model));
  }

  const Decoder& model() const { return sides_.model(); }
  const DuplexOptions& options() const { return options_; }
  const Sides& sides() const { return sides_; }
  /// The groups, on a backend that has them as such.
  const auto& source() const { return sides_.source(); }
  const auto& target() const { return sides_.target(); }
  /// Memory of keys and values.
  std::size_t cache_bytes() const { return sides_.cache_bytes(); }
  DuplexMetrics& metrics() { return metrics_; }
  const DuplexMetrics& metrics() const { return metrics_; }
  UnitQueue& queue() { return queue_; }
  SpscRing<DuplexOutput>& outputs() { return outputs_; }

  /// Any thread: nothing will be fed any more. The queue may still hold units.
  void end_input() { input_ended_.store(true, std::memory_order_release); }

  /// The source side: reads the next unit, or units, from the queue and publishes them.
  Progress step_source() {
    // Asked before the queue: a unit fed before the end is then seen.
    const bool ended = input_ended_.load(std::memory_order_acquire);
    const QueuedUnit* unit = queue_.front();
    if (unit == nullptr) {
      if (!ended) return Progress::kNeedsSource;
      source_done_.store(true, std::memory_order_release);
      return Progress::kEnded;
    }
    const std::int64_t published = units_published_.load(std::memory_order_relaxed);
    const std::int64_t unit_room =
        options_.max_lead_units - (published - units_seen_.load(std::memory_order_acquire));
    const std::int64_t token_room = sides_.source_room();
    std::int64_t units = 0;
    std::int64_t tokens = 0;
    std::array<UnitEnd, kMostCoalesced> ends;
    const bool embedded = unit->embedded;
    const std::int64_t width = model().config().hidden_size;
    while (unit != nullptr && unit->embedded == embedded && units < options_.coalesce_units &&
           units < unit_room && tokens + unit->tokens <= token_room) {
      if (embedded)
        queue_.copy_front({unit_rows_.data() + tokens * width, unit->tokens, width});
      else
        queue_.copy_front(unit_tokens_.span().subspan(static_cast<std::size_t>(tokens)));
      tokens += unit->tokens;
      ends[static_cast<std::size_t>(units++)] = {sides_.source_total() + tokens, unit->arrival_ns,
                                                 unit->last};
      queue_.pop();
      unit = queue_.front();
    }
    if (units == 0) return Progress::kNeedsRoom;
    const std::int64_t begin = monotonic_ns();
    DecoderInput input;
    if (embedded)
      input.embeddings = {unit_rows_.data(), tokens, width};
    else
      input.tokens = unit_tokens_.span().first(static_cast<std::size_t>(tokens));
    sides_.read_source(input);
    const std::int64_t end = monotonic_ns();
    metrics_.on_source_work(end - begin, end, tokens);
    for (std::int64_t u = 0; u < units; ++u)
      units_[static_cast<std::size_t>((published + u) % options_.max_lead_units)] =
          ends[static_cast<std::size_t>(u)];
    units_published_.store(published + units, std::memory_order_release);
    return Progress::kStepped;
  }

  /// The target side: completes a READ, feeds a token, or asks the policy and does what it says.
  Progress step_target() {
    if (end_ != DuplexEnd::kRunning) return Progress::kEnded;
    if (reading_ && !see_next_unit()) return Progress::kNeedsSource;
    if (outputs_.room() < kMostOutputs) return Progress::kNeedsRoom;
    if (!to_feed_.empty()) return feed_target();
    const PolicyState asked = state();
    const Decision decision = policy_.decide(asked);
    switch (decision.action) {
      case Action::kWrite: return write(decision);
      case Action::kRead: return read(decision);
      case Action::kWait:
        return asked.source_ended || asked.all_arrived ? finish(DuplexEnd::kNothingLeft)
                                                       : Progress::kNeedsSource;
      case Action::kStop: break;
    }
    settle(decision.confirm);
    return finish(DuplexEnd::kPolicyStop);
  }

  /// The target side: source units in its snapshot, and outputs ever written.
  std::int64_t units_read() const { return units_read_; }
  std::int64_t outputs_put() const { return outputs_put_; }

  /// The target side. What is provisional stays as it is.
  DuplexEnd end() const { return end_; }
  Progress finish(DuplexEnd end) {
    if (end_ == DuplexEnd::kRunning) end_ = end;
    sides_.close();
    return Progress::kEnded;
  }

  /// What the policy is asked with.
  PolicyState state() const {
    PolicyState state;
    state.units_read = units_read_;
    state.tokens_read = tokens_read_;
    state.all_arrived = source_done_.load(std::memory_order_acquire);
    state.units_arrived = units_published_.load(std::memory_order_acquire);
    state.source_ended = source_ended_;
    state.tokens_written = tokens_final_;
    state.provisional = provisional_.span().first(static_cast<std::size_t>(num_provisional_));
    state.tokens_since_read = since_read_;
    state.candidate = candidate_;
    if (candidate_) state.logits = sides_.logits();
    state.newest_source_mass = newest_source_mass_;
    return state;
  }

 private:
  static constexpr std::int64_t kMostCoalesced = 64;
  static constexpr std::int64_t kMostOutputs = 3;  // of one decision

  /// Where a published unit ends.
  struct UnitEnd {
    std::int64_t tokens = 0;  // source tokens up to here
    std::int64_t arrival_ns = 0;
    bool last = false;
  };

  static const DuplexOptions& checked(const DuplexOptions& options, const Decoder& model) {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "DuplexOptions", field, expected, std::to_string(found)});
    };
    if (options.target_prefix.empty()) fail("target_prefix", "at least one token", 0);
    for (const auto* tokens : {&options.target_prefix, &options.end_tokens})
      for (const Token token : *tokens)
        if (token < 0 || token >= model.config().vocab_size)
          fail(tokens == &options.target_prefix ? "target_prefix" : "end_tokens",
               "tokens from 0 to " + std::to_string(model.config().vocab_size - 1), token);
    for (const auto& [field, value] : {std::pair{"max_target_tokens", options.max_target_tokens},
                                       std::pair{"max_unit_tokens", options.max_unit_tokens},
                                       std::pair{"max_lead_units", options.max_lead_units},
                                       std::pair{"coalesce_units", options.coalesce_units}})
      if (value < 1) fail(field, "at least 1", value);
    if (options.max_unit_tokens > kMaxLead / 4)
      fail("max_unit_tokens", "at most " + std::to_string(kMaxLead / 4), options.max_unit_tokens);
    if (options.max_lead_units > kMaxLead)
      fail("max_lead_units", "at most " + std::to_string(kMaxLead), options.max_lead_units);
    if (options.coalesce_units > kMostCoalesced)
      fail("coalesce_units", "at most " + std::to_string(kMostCoalesced), options.coalesce_units);
    if (options.output_capacity < kMostOutputs + 1)
      fail("output_capacity", "at least " + std::to_string(kMostOutputs + 1),
           options.output_capacity);
    if (options.queue_embeddings != 0 && options.queue_embeddings < options.max_unit_tokens)
      fail("queue_embeddings",
           "0 or at least max_unit_tokens = " + std::to_string(options.max_unit_tokens),
           options.queue_embeddings);
    if (options.queue_tokens < options.max_unit_tokens)
      fail("queue_tokens", "at least max_unit_tokens = " + std::to_string(options.max_unit_tokens),
           options.queue_tokens);
    if (options.max_lead_tokens != 0 && options.max_lead_tokens < options.max_unit_tokens)
      fail("max_lead_tokens",
           "0 or at least max_unit_tokens = " + std::to_string(options.max_unit_tokens),
           options.max_lead_tokens);
    for (const CacheOptions* cache : {&options.source, &options.target})
      if (cache->lead < 0)
        fail(cache == &options.source ? "source.lead" : "target.lead", "at least 0", cache->lead);
    for (const CacheOptions* cache : {&options.source, &options.target})
      if (cache->policy == CachePolicy::kRecompute)
        throw Error(ErrorCode::kConfig,
                    {"a recomputed window is no group of its own", "DuplexOptions",
                     cache == &options.source ? "source.policy" : "target.policy",
                     "sink-window, window or full", "recompute"});
    const bool per_head = options.source.policy == CachePolicy::kPerHead;
    if (per_head != (options.target.policy == CachePolicy::kPerHead) ||
        (per_head && !options.source.heads.has_classes_of(options.target.heads)))
      throw Error(ErrorCode::kConfig, {"both sides' heads must fall into the same classes",
                                       "DuplexOptions", "source.heads and target.heads",
                                       "heads that retain alike on both sides", "others"});
    if (Sides::kInArrivalOrder && options.concurrent)
      throw Error(ErrorCode::kConfig, {"positions of this layout depend on the order of arrival",
                                       "DuplexOptions", "concurrent", "false", "true"});
    return options;
  }

  /// \throws Error(kConfig) for a layer to be probed that the model has not.
  static DuplexNeeds needs_of(const Policy& policy, const Decoder& model) {
    const DuplexNeeds needs = DuplexNeeds::of(policy, model.config());
    const std::int64_t layers = model.config().num_layers();
    const std::int64_t layer = needs.probe.layer;
    if (needs.probe.newest > 0 && (layer < 0 || layer >= layers))
      throw Error(ErrorCode::kConfig,
                  {"the model has no such layer", "the policy", "probe_layer",
                   std::to_string(-layers) + " to " + std::to_string(layers - 1),
                   std::to_string(layer < 0 ? layer - layers : layer)});
    return needs;
  }
  std::int64_t max_provisional() const { return needs_.max_provisional; }

  bool is_end_token(Token token) const {
    return std::find(options_.end_tokens.begin(), options_.end_tokens.end(), token) !=
           options_.end_tokens.end();
  }

  /// Takes the next unit into the snapshot. False: it is not there, and may yet come.
  bool see_next_unit() {
    const bool done = source_done_.load(std::memory_order_acquire);
    if (units_published_.load(std::memory_order_acquire) == units_read_) {
      if (!done) return false;
      source_ended_ = true;
      reading_ = false;
      return true;
    }
    const UnitEnd unit = units_[static_cast<std::size_t>(units_read_ % options_.max_lead_units)];
    tokens_read_ = unit.tokens;
    source_ended_ = unit.last;
    ++units_read_;
    since_read_ = 0;
    reading_ = false;
    sides_.hold(tokens_read_);
    units_seen_.store(units_read_, std::memory_order_release);
    metrics_.on_read(unit.arrival_ns);
    return true;
  }

  /// Feeds what is due (the prefix, a written token, one to be fed again) and predicts the next.
  Progress feed_target() {
    const auto count = static_cast<std::int64_t>(to_feed_.size());
    if (sides_.target_status(count) != CacheStatus::kOk) return finish(DuplexEnd::kTargetFull);
    const MassProbe probe = DuplexNeeds::of(policy_, model().config()).probe;
    const std::int64_t begin = monotonic_ns();
    sides_.feed_target(to_feed_, tokens_read_, probe);
    to_feed_ = {};
    if (probe.newest > 0 && count == 1) newest_source_mass_ = sides_.newest_source_mass();
    candidate_ = sides_.choose(sampler_);
    const std::int64_t end = monotonic_ns();
    metrics_.on_target_work(end - begin, end);
    return Progress::kStepped;
  }

  Progress write(const Decision& decision) {
    if (!candidate_) {
      to_feed_ = options_.target_prefix;
      return Progress::kStepped;
    }
    if (is_end_token(*candidate_)) return end_of_text();
    // Without room to take it back a token cannot be provisional.
    if (decision.provisional && num_provisional_ < max_provisional()) {
      put({.kind = DuplexOutput::Kind::kProvisional, .token = *candidate_});
      metrics_.on_written(last_output_ns_, units_read_, tokens_read_);
      feed_next(*candidate_, true);
    } else {
      settle(num_provisional_);
      write_final(*candidate_);
    }
    return tokens_final_ + num_provisional_ >= options_.max_target_tokens ? end_at_limit()
                                                                          : Progress::kStepped;
  }

  Progress end_of_text() {
    settle(num_provisional_);
    return finish(DuplexEnd::kEndToken);
  }

  Progress end_at_limit() {
    settle(num_provisional_);
    return finish(DuplexEnd::kTokenLimit);
  }

  Progress read(const Decision& decision) {
    if (source_ended_) {
      settle(decision.confirm);
      return finish(DuplexEnd::kNothingLeft);
    }
    reading_ = true;
    if (!candidate_) return Progress::kStepped;
    if (decision.last_token == LastToken::kKeep) {
      if (is_end_token(*candidate_)) return end_of_text();
      settle(num_provisional_);
      write_final(*candidate_);
      if (tokens_final_ >= options_.max_target_tokens) return finish(DuplexEnd::kTokenLimit);
      return Progress::kStepped;
    }
    // The candidate and what is not confirmed go; the last token that stays is fed again.
    const std::int64_t dropped = settle(decision.confirm);
    sides_.take_back(dropped + 1);
    refed_[0] = last_kept_;
    to_feed_ = refed_;
    candidate_.reset();
    return Progress::kStepped;
  }

  /// A token for good: output, history, and next in line to be fed.
  void write_final(Token token) {
    put({.kind = DuplexOutput::Kind::kFinal, .token = token});
    metrics_.on_written(last_output_ns_, units_read_, tokens_read_);
    make_final(token);
    feed_next(token, false);
  }

  void make_final(Token token) {
    sampler_.accept(token);
    metrics_.on_final(units_read_);
    last_kept_ = token;
    ++tokens_final_;
  }

  void feed_next(Token token, bool provisional) {
    if (provisional) provisional_[static_cast<std::size_t>(num_provisional_++)] = token;
    refed_[0] = token;
    to_feed_ = refed_;
    candidate_.reset();
    ++since_read_;
  }

  /// Makes the oldest `confirmed` provisional tokens final and takes the others out of the list;
  /// returns how many those were. Their keys and values are the caller's to remove.
  std::int64_t settle(std::int64_t confirmed) {
    confirmed = std::clamp<std::int64_t>(confirmed, 0, num_provisional_);
    for (std::int64_t i = 0; i < confirmed; ++i)
      make_final(provisional_[static_cast<std::size_t>(i)]);
    const std::int64_t dropped = num_provisional_ - confirmed;
    if (confirmed > 0) put({.kind = DuplexOutput::Kind::kConfirmed, .count = confirmed});
    if (dropped > 0) {
      put({.kind = DuplexOutput::Kind::kRetracted, .count = dropped});
      metrics_.on_retracted(dropped);
    }
    num_provisional_ = 0;
    return dropped;
  }

  void put(DuplexOutput output) {
    output.units_read = units_read_;
    output.tokens_read = tokens_read_;
    output.time_ns = last_output_ns_ = monotonic_ns();
    [[maybe_unused]] const bool put = outputs_.try_push(output);
    SLUICE_ASSERT(put);  // step_target() made sure
    ++outputs_put_;
  }

  DuplexOptions options_;
  Policy policy_;
  DuplexNeeds needs_;
  Sides sides_;
  Sampler sampler_;
  UnitQueue queue_;
  Buffer<UnitEnd> units_;      // [max_lead_units], unit u at u % max_lead_units
  Buffer<Token> unit_tokens_;  // the source side's
  Buffer<float> unit_rows_;    // the same for embeddings, [max tokens, hidden_size]
  SpscRing<DuplexOutput> outputs_;
  Buffer<Token> provisional_;
  DuplexMetrics metrics_;

  alignas(64) std::atomic<bool> input_ended_{false};
  alignas(64) std::atomic<std::int64_t> units_published_{0};
  std::atomic<bool> source_done_{false};
  alignas(64) std::atomic<std::int64_t> units_seen_{0};

  // The target side's alone.
  alignas(64) std::int64_t units_read_ = 0;
  std::int64_t tokens_read_ = 0;  // the snapshot
  std::int64_t tokens_final_ = 0;
  std::int64_t num_provisional_ = 0;
  std::int64_t since_read_ = 0;
  std::int64_t last_output_ns_ = 0;
  std::int64_t outputs_put_ = 0;
  std::optional<Token> candidate_;
  Token last_kept_;  // of the prefix and the final tokens
  std::array<Token, 1> refed_{};
  std::span<const Token> to_feed_;  // due to be fed
  float newest_source_mass_ = 0;
  bool reading_ = false;       // a READ waits for its unit
  bool source_ended_ = false;  // a READ found the end
  DuplexEnd end_ = DuplexEnd::kRunning;
};

}  // namespace sluice
