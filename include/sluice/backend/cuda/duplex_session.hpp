// SPDX-License-Identifier: MIT
/// Duplex on a GPU, for programs that the host compiler compiles: the sides of stream/duplex.hpp,
/// so that a program changes from one backend to the other by its tag (stream/duplex_backend.hpp).
/// What runs on the device is behind device_duplex.hpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "sluice/backend/cuda/device_duplex.hpp"
#include "sluice/backend/cuda/session.hpp"
#include "sluice/backend/cuda/tag.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/duplex.hpp"
#include "sluice/stream/duplex_backend.hpp"
#include "sluice/stream/duplex_options.hpp"
#include "sluice/stream/policy.hpp"
#include "sluice/stream/sampler.hpp"

namespace sluice {

/// Source and target on the GPU that the model lies on: DuplexSides over CudaDeviceDuplex. What is
/// kept of each group, and where, is a Retention's word, as on the CPU; rows alone are elsewhere.
/// A side waits for its own stream, never for the whole device.
template <CudaElement Element, GroupLayout Layout>
class CudaDuplexSides {
 public:
  using Model = CudaModel<Element>;
  using PositionLayout = Layout;
  static constexpr bool kInArrivalOrder = false;  // such layouts are refused

  static const Decoder& decoder_of(const Model& model) { return model.decoder(); }

  /// \throws Error(kUnsupported) naming the option that the GPU does not do; Error(kConfig) as
  /// CpuDuplexSides; Error(kDevice).
  CudaDuplexSides(std::shared_ptr<const Model> model, const DuplexOptions& options,
                  const DuplexNeeds& needs, const Layout& layout)
      : model_(std::move(model)),
        source_(planned(model_->decoder(), options, needs, layout).source),
        target_(planned(model_->decoder(), options, needs, layout).target),
        greedy_(options.sampler.temperature == 0 && options.sampler.repetition_penalty == 1),
        device_(model_->device(),
                {.source = group_config(source_.config()),
                 .target = group_config(target_.config()),
                 .max_tokens = options.max_unit_tokens * options.coalesce_units,
                 .max_rows = options.queue_embeddings > 0
                                 ? options.max_unit_tokens * options.coalesce_units
                                 : 0,
                 .logits = needs.logits || !greedy_}) {}

  /// Throws what a constructor throws before it looks for a device.
  static void check(const Decoder& decoder, const DuplexOptions& options, const DuplexNeeds& needs,
                    const Layout& layout) {
    static_cast<void>(planned(decoder, options, needs, layout));
  }

  const Decoder& model() const { return model_->decoder(); }
  const std::shared_ptr<const Model>& device_model() const { return model_; }
  /// Device memory of keys and values, both groups'.
  std::size_t cache_bytes() const { return device_.cache_bytes(); }

  std::int64_t source_total() const { return source_.total(); }
  /// As Group::room(), for the one reader that there is.
  std::int64_t source_room() const {
    if (source_.window() >= kUnlimitedWindow) return source_.config().capacity - source_.total();
    const std::int64_t held = held_.load(std::memory_order_acquire);
    if (held == kNobody) return std::numeric_limits<std::int64_t>::max();
    return std::max<std::int64_t>(held + source_.max_lead() - source_.total(), 0);
  }
  void read_source(const DecoderInput& input) {
    if (input.embeddings.rows > 0) {
      SLUICE_ASSERT(input.embeddings.stride == input.embeddings.cols);
      device_.read(std::span<const float>(
          input.embeddings.data,
          static_cast<std::size_t>(input.embeddings.rows * input.embeddings.cols)));
    } else {
      device_.read(input.tokens);
    }
    for (std::int64_t left = input.count(); left > 0;) {
      const std::int64_t count = std::min(left, source_.config().max_chunk);
      append(source_, count);
      left -= count;
    }
  }

  // The reads of a step are over when feed_target() returns, so what is let go here may be written
  // over at once.
  void hold(std::int64_t tokens) { held_.store(tokens, std::memory_order_release); }
  void close() { held_.store(kNobody, std::memory_order_release); }
  CacheStatus target_status(std::int64_t tokens) const { return target_.status(tokens); }
  /// Token by token, whose last one's logits are formed; nothing is probed.
  void feed_target(std::span<const Token> tokens, std::int64_t visible, const MassProbe&) {
    for (const Token token : tokens) device_.step(token, visible);
    append(target_, static_cast<std::int64_t>(tokens.size()));
  }
  /// The greatest logit's token was found on the device; for others the CPU's sampler draws.
  Token choose(Sampler& sampler) {
    return greedy_ ? device_.best() : sampler.sample(device_.logits());
  }
  /// Empty where neither policy nor sampler reads them.
  std::span<const float> logits() const { return device_.logits(); }
  float newest_source_mass() const { return 0; }
  void take_back(std::int64_t tokens) {
    target_.truncate(tokens);
    device_.set_target_total(target_.total());
  }

 private:
  static constexpr std::int64_t kNobody = -1;

  struct Plan {
    RetentionConfig source;
    RetentionConfig target;
  };

  static Plan planned(const Decoder& decoder, const DuplexOptions& options,
                      const DuplexNeeds& needs, const Layout& layout) {
    const auto require = [](bool good, const std::string& where, const std::string& field,
                            const std::string& expected, const std::string& found) {
      if (!good)
        throw Error(ErrorCode::kUnsupported,
                    {"the CUDA backend does not do this", where, field, expected, found});
    };
    const std::string where = "DuplexOptions";
    if constexpr (detail::kInArrivalOrder<Layout>) {
      require(false, "Duplex", "layout", "each group counts for itself (GroupedLayout)",
              "positions in the order of arrival");
      return {};
    } else {
      for (const CacheOptions* cache : {&options.source, &options.target}) {
        const std::string name = cache == &options.source ? "source." : "target.";
        require(cache->policy == CachePolicy::kSinkWindow ||
                    cache->policy == CachePolicy::kWindow || cache->policy == CachePolicy::kFull,
                where, name + "policy", "sink-window, window or full",
                std::string(to_string(cache->policy)));
        require(cache->key_form == KeyForm::kRotated, where, name + "key_form", "rotated", "raw");
      }
      require(options.activations == Activations::kFloat32, where, "activations",
              std::string(to_string(Activations::kFloat32)),
              std::string(to_string(options.activations)));
      require(!options.bidirectional_prefix, where, "bidirectional_prefix", "false", "true");
      require(needs.probe.newest == 0, "the policy", "newest_source_tokens",
              "0: attention is not probed", std::to_string(needs.probe.newest));
      options.sampler.validate();
      const CachePlan source = plan_duplex_source(decoder.config(), options, layout);
      const CachePlan target =
          plan_duplex_target(decoder.config(), options, needs.max_provisional, layout);
      for (const CachePlan* plan : {&source, &target}) {
        const CacheOptions& cache = plan == &source ? options.source : options.target;
        require(plan->retentions.size() == 1, where,
                plan == &source ? "source.window_size" : "target.window_size",
                "at most the windows that layers were trained with",
                cache.policy == CachePolicy::kFull ? "a full cache"
                                                   : std::to_string(cache.window_size));
      }
      detail::check_prefix_fits(options, target.retentions.front().max_chunk);
      return {source.retentions.front(), target.retentions.front()};
    }
  }

  static CudaDeviceGroupConfig group_config(const RetentionConfig& r) {
    return {.num_sink_tokens = r.num_sink_tokens,
            .window_size = r.window_size,
            .capacity = r.capacity,
            .max_chunk = r.max_chunk,
            .position_rule = r.position_rule,
            .origin = r.origin};
  }

  static void append(Retention& retention, std::int64_t tokens) {
    retention.append(tokens);
    retention.commit();
  }

  std::shared_ptr<const Model> model_;
  Retention source_;              // the source side's
  alignas(64) Retention target_;  // the target side's
  bool greedy_;
  CudaDeviceDuplex<Element> device_;
  alignas(64) std::atomic<std::int64_t> held_{0};
};

/// Duplex (stream/duplex.hpp) on a GPU: the same options, policies and verbs, and the same results
/// to rounding. Weights, keys and values are of one type. The source is read on a stream of its own
/// while the target is written on one whose kernels go first.
///
/// Groups: sinks + window, window, full, with rotated keys; positions that depend on the order of
/// arrival (InterleavedLayout, OverlappedLayout), bidirectional_prefix and policies that ask for
/// newest_source_tokens are Error(kUnsupported). Threads of the host compute nothing:
/// source_threads, target_threads and team are not used.
///
/// Arithmetic: the source is read in matrices, whose inputs are rounded to Element; a target token
/// is fed with activations in float32, the prefix token by token. The greedy token is chosen on the
/// device. Otherwise, or where the policy reads logits, these come to the host with every step
/// (4 bytes for each token of the vocabulary), and the CPU's sampler draws.
///
/// The same units and the same answers of the policy give the same bits, with threads or without.
/// Everything is allocated by the constructor, on the device and here, but for what cuBLASLt keeps
/// for a length of chunk that it has not seen. What the device refuses ends the stream and reaches
/// the consumer as Error(kDevice). The stream runs on the model's device, whatever device is
/// current where it is made or used.
template <ReadWritePolicy Policy, CudaElement Element = f16, GroupLayout Layout = GroupedLayout>
class CudaDuplexSession : public BasicDuplex<Policy, CudaDuplexSides<Element, Layout>> {
  using Sides = CudaDuplexSides<Element, Layout>;
  using Base = BasicDuplex<Policy, Sides>;

 public:
  /// \throws Error(kConfig) as Duplex does, Error(kUnsupported) naming the option that the GPU does
  /// not do; Error(kDevice).
  CudaDuplexSession(std::shared_ptr<const CudaModel<Element>> model, const DuplexOptions& options,
                    Policy policy, Layout layout = detail::default_layout<Layout>())
      : Base(std::move(model), options, std::move(policy), std::move(layout)) {}
  /// Copies the weights to the current device for this stream alone. \throws as above, and what
  /// CudaModel throws.
  CudaDuplexSession(std::shared_ptr<const Decoder> model, const DuplexOptions& options,
                    Policy policy, Layout layout = detail::default_layout<Layout>())
      // Braces: what is checked is read before it is moved.
      : CudaDuplexSession{placed(std::move(model), options, policy, layout), options,
                          std::move(policy), std::move(layout)} {}

  const std::shared_ptr<const CudaModel<Element>>& device_model() const {
    return this->engine().sides().device_model();
  }

 private:
  static std::shared_ptr<const CudaModel<Element>> placed(std::shared_ptr<const Decoder> model,
                                                          const DuplexOptions& options,
                                                          const Policy& policy,
                                                          const Layout& layout) {
    CudaModel<Element>::check_supported(*model);
    Base::Engine::check(options, policy, *model);  // before anything is copied
    Sides::check(*model, options, DuplexNeeds::of(policy, model->config()), layout);
    return std::make_shared<const CudaModel<Element>>(std::move(model));
  }
};

template <>
struct duplex_backend<cuda> {
  template <ReadWritePolicy Policy, KvElement Element, GroupLayout Layout>
  using Duplex = CudaDuplexSession<Policy, Element, Layout>;
};

}  // namespace sluice
