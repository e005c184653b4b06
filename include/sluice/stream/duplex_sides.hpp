// SPDX-License-Identifier: MIT
/// The two sides of a Duplex on the CPU: what reads the source into its group and what feeds the
/// target to its own. DuplexEngine (duplex_engine.hpp) says when; other backends have sides of
/// their own.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "sluice/cache/group.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/position/position.hpp"
#include "sluice/stream/duplex_options.hpp"
#include "sluice/stream/sampler.hpp"

namespace sluice {

/// Source and target as groups (cache/group.hpp) with a workspace and a team each. Allocates at
/// construction alone. Functions of the source side are one thread's, those of the target side one
/// thread's; they may be the same.
template <KvElement Key, KvElement Value, GroupLayout Layout>
class CpuDuplexSides {
 public:
  using Model = Decoder;
  using PositionLayout = Layout;
  static constexpr bool kInArrivalOrder = detail::kInArrivalOrder<Layout>;

  static const Decoder& decoder_of(const Model& model) { return model; }

  /// \throws Error(kConfig) for groups that do not fit the model, the options or each other.
  CpuDuplexSides(std::shared_ptr<const Model> model, const DuplexOptions& options,
                 const DuplexNeeds& needs, Layout layout)
      : model_(std::move(model)),
        layout_(std::move(layout)),
        source_(model_->make_group<Key, Value>(
            "source", kSourceGroup, plan_duplex_source(model_->config(), options, layout_))),
        target_(model_->make_group<Key, Value>(
            "target", kTargetGroup,
            plan_duplex_target(model_->config(), options, needs.max_provisional, layout_))),
        reader_(source_->open_reader()),
        source_team_(team_of(options, options.source_threads)),
        target_team_(team_of(options, options.target_threads)),
        source_workspace_(*model_, source_->cache().max_chunk(), source_->cache().max_entries(),
                          source_team_->size(), DecoderWorkspace::kDefaultSegments,
                          options.activations, options.onednn),
        target_workspace_(*model_, target_->cache().max_chunk(),
                          source_->cache().max_entries() + target_->cache().max_entries(),
                          target_team_->size(), DecoderWorkspace::kDefaultSegments,
                          options.activations, options.onednn),
        positions_(kInArrivalOrder
                       ? static_cast<std::size_t>(
                             std::max(source_->cache().max_chunk(), target_->cache().max_chunk()))
                       : 0),
        logits_(static_cast<std::size_t>(model_->config().vocab_size)),
        bidirectional_prefix_(options.bidirectional_prefix) {
    detail::check_prefix_fits(options, target_->cache().max_chunk());
    check_positions();
  }

  const Decoder& model() const { return *model_; }
  const Group<Key, Value>& source() const { return *source_; }
  const Group<Key, Value>& target() const { return *target_; }
  /// Memory of keys and values, both groups'.
  std::size_t cache_bytes() const { return source_->cache().bytes() + target_->cache().bytes(); }

  // ---- the source side -----------------------------------------------------------------------

  /// Tokens read so far.
  std::int64_t source_total() const { return source_->cache().total(); }
  /// Tokens that may be read now: none overwrites what the target holds.
  std::int64_t source_room() const { return source_->room(); }
  /// Reads tokens or embeddings, in chunks; hold() may name them afterwards.
  /// Precondition: room for them.
  void read_source(const DecoderInput& input) {
    feed(*source_, input, GroupReader<Key, Value>{.own_group = kSourceGroup}, source_workspace_,
         *source_team_);
  }

  // ---- the target side -----------------------------------------------------------------------

  /// From now on at most the first `tokens` of the source are seen, and no fewer again.
  void hold(std::int64_t tokens) { source_->hold(reader_, tokens); }
  /// Nothing more is fed: the source need not wait.
  void close() { source_->close_reader(reader_); }
  /// Whether so many tokens can be fed at once.
  CacheStatus target_status(std::int64_t tokens) const { return target_->cache().status(tokens); }
  /// Feeds tokens that see the first `visible` of the source; logits() are the last one's. `probe`
  /// is formed for single tokens. Preconditions: target_status(); visible tokens are held.
  void feed_target(std::span<const Token> tokens, std::int64_t visible, const MassProbe& probe) {
    const std::array<GroupView<Key, Value>, 1> sees{source_->view(visible)};
    GroupReader<Key, Value> reader{.own_group = kTargetGroup, .sees = sees};
    reader.bidirectional = bidirectional_prefix_ && tokens.size() > 1;
    reader.probe = probe;
    feed(*target_, DecoderInput{tokens}, reader, target_workspace_, *target_team_);
    model_->logits(target_workspace_.hidden_states().rows - 1,
                   {logits_.data(), 1, static_cast<std::int64_t>(logits_.size())},
                   target_workspace_, *target_team_);
  }
  /// The next token, drawn from logits().
  Token choose(Sampler& sampler) { return sampler.sample(logits_.span()); }
  /// [vocab_size], behind the last token fed.
  std::span<const float> logits() const { return logits_.span(); }
  /// What the probe found, a mean over query heads. Precondition: a probe, one token fed.
  float newest_source_mass() const {
    float sum = 0;
    for (const float share : target_workspace_.attention_mass()) sum += share;
    return sum / static_cast<float>(model_->config().num_qo_heads);
  }
  /// Removes the newest target tokens.
  void take_back(std::int64_t tokens) {
    target_->cache().truncate(tokens);
    target_->publish();
    if constexpr (kInArrivalOrder) layout_.retract(kTargetGroup, static_cast<Position>(tokens));
  }

 private:
  static std::shared_ptr<ThreadTeam> team_of(const DuplexOptions& options, int threads) {
    return options.team ? options.team : std::make_shared<ThreadTeam>(threads);
  }

  void check_positions() const {
    if constexpr (kInArrivalOrder)
      for (const Group<Key, Value>* group : {source_.get(), target_.get()})
        if (!group->cache().takes_positions())
          throw Error(ErrorCode::kConfig,
                      {"this layout needs rotated keys in text positions", "DuplexOptions",
                       group->name() + ".position_rule", "in-text", "in-cache or raw keys"});
  }

  /// Appends tokens or embeddings to a group in chunks and publishes them.
  void feed(Group<Key, Value>& group, const DecoderInput& whole,
            const GroupReader<Key, Value>& reader, DecoderWorkspace& workspace, ThreadTeam& team) {
    for (std::int64_t done = 0; done < whole.count();) {
      const std::int64_t count = std::min(whole.count() - done, group.cache().max_chunk());
      DecoderInput input;
      if (whole.embeddings.rows > 0)
        input.embeddings = whole.embeddings.middle_rows(done, count);
      else
        input.tokens =
            whole.tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
      if constexpr (kInArrivalOrder) {
        for (std::int64_t t = 0; t < count; ++t)
          positions_[static_cast<std::size_t>(t)] = on_all_axes(layout_.place(group.id(), 1));
        input.positions = positions_.span().first(static_cast<std::size_t>(count));
      }
      model_->forward(input, group.cache(), reader, workspace, team);
      group.cache().commit();
      done += count;
    }
    group.publish();
  }

  std::shared_ptr<const Model> model_;
  Layout layout_;
  std::unique_ptr<Group<Key, Value>> source_;
  std::unique_ptr<Group<Key, Value>> target_;
  int reader_;
  std::shared_ptr<ThreadTeam> source_team_;
  std::shared_ptr<ThreadTeam> target_team_;
  DecoderWorkspace source_workspace_;
  DecoderWorkspace target_workspace_;
  Buffer<Position3> positions_;  // of a chunk, for layouts that depend on the order
  Buffer<float> logits_;         // [vocab_size]
  bool bidirectional_prefix_;
};

}  // namespace sluice
