// SPDX-License-Identifier: MIT
/// Networks over frames, put together at run time: one layer behind another, a branch beside its
/// input, several branches side by side. What a branch delays is held back on the other side by
/// exactly as many frames, so no delay is ever typed in (kws_streaming's Delay, arXiv 2005.06720,
/// is that by hand); the end of the input goes through layer by layer, front to back.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/stream_layer.hpp"

namespace sluice {

class AnyStreamLayer;

/// The state of an AnyStreamLayer; a copy is a snapshot. Assignment between states of one layer
/// reuses what the target holds.
class AnyStreamState {
 public:
  AnyStreamState() = default;
  AnyStreamState(const AnyStreamState& other)
      : held_(other.held_ != nullptr ? other.held_->clone() : nullptr) {}
  AnyStreamState(AnyStreamState&&) noexcept = default;
  AnyStreamState& operator=(const AnyStreamState& other) {
    if (this == &other) return *this;
    if (held_ == nullptr || other.held_ == nullptr || !held_->assign(*other.held_))
      held_ = other.held_ != nullptr ? other.held_->clone() : nullptr;
    return *this;
  }
  AnyStreamState& operator=(AnyStreamState&&) noexcept = default;

 private:
  friend class AnyStreamLayer;
  struct Base {
    virtual ~Base() = default;
    virtual std::unique_ptr<Base> clone() const = 0;
    virtual bool assign(const Base& other) = 0;
  };
  template <class State>
  struct Holder final : Base {
    explicit Holder(State state) : value(std::move(state)) {}
    std::unique_ptr<Base> clone() const override { return std::make_unique<Holder>(value); }
    bool assign(const Base& other) override {
      if (typeid(other) != typeid(Holder)) return false;
      value = static_cast<const Holder&>(other).value;
      return true;
    }
    State value;
  };
  explicit AnyStreamState(std::unique_ptr<Base> held) : held_(std::move(held)) {}

  std::unique_ptr<Base> held_;
};

/// Any StreamLayer behind one type. Copies share the layer. One virtual call a step: a call per
/// layer and chunk, never per frame or element.
class AnyStreamLayer {
 public:
  using State = AnyStreamState;

  /// Takes the layer by value: weights are moved in. Allocates.
  template <class Layer>
  requires(!std::same_as<std::remove_cvref_t<Layer>, AnyStreamLayer> &&
           StreamLayer<std::remove_cvref_t<Layer>>)
      AnyStreamLayer(Layer&& layer)  // NOLINT: conversion is the purpose
      : held_(
            std::make_shared<const Model<std::remove_cvref_t<Layer>>>(std::forward<Layer>(layer))) {
  }

  std::int64_t in_width() const { return held_->in_width(); }
  std::int64_t out_width() const { return held_->out_width(); }
  State make_state() const { return State(held_->make_state()); }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    return held_->step(in, *state.held_, out);
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    return held_->flush(*state.held_, out);
  }
  void reset(State& state) const { held_->reset(*state.held_); }
  std::int64_t max_outputs(std::int64_t frames) const { return held_->max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return held_->max_flush_outputs(); }
  std::size_t state_bytes() const { return held_->state_bytes(); }
  void save(const State& state, ByteWriter& writer) const { held_->save(*state.held_, writer); }
  void restore(ByteReader& reader, State& state) const { held_->restore(reader, *state.held_); }
  std::vector<StreamTiming> timings() const { return held_->timings(); }

 private:
  using StateBase = AnyStreamState::Base;
  struct Base {
    virtual ~Base() = default;
    virtual std::int64_t in_width() const = 0;
    virtual std::int64_t out_width() const = 0;
    virtual std::unique_ptr<StateBase> make_state() const = 0;
    virtual std::int64_t step(MatrixView<const float> in, StateBase& state,
                              MatrixView<float> out) const = 0;
    virtual std::int64_t flush(StateBase& state, MatrixView<float> out) const = 0;
    virtual void reset(StateBase& state) const = 0;
    virtual std::int64_t max_outputs(std::int64_t frames) const = 0;
    virtual std::int64_t max_flush_outputs() const = 0;
    virtual std::size_t state_bytes() const = 0;
    virtual void save(const StateBase& state, ByteWriter& writer) const = 0;
    virtual void restore(ByteReader& reader, StateBase& state) const = 0;
    virtual std::vector<StreamTiming> timings() const = 0;
  };
  template <class Layer>
  struct Model final : Base {
    using Holder = AnyStreamState::Holder<typename Layer::State>;
    explicit Model(Layer layer_) : layer(std::move(layer_)) {}
    static typename Layer::State& of(StateBase& state) {
      SLUICE_ASSERT(typeid(state) == typeid(Holder));
      return static_cast<Holder&>(state).value;
    }
    static const typename Layer::State& of(const StateBase& state) {
      SLUICE_ASSERT(typeid(state) == typeid(Holder));
      return static_cast<const Holder&>(state).value;
    }
    std::int64_t in_width() const override { return layer.in_width(); }
    std::int64_t out_width() const override { return layer.out_width(); }
    std::unique_ptr<StateBase> make_state() const override {
      return std::make_unique<Holder>(layer.make_state());
    }
    std::int64_t step(MatrixView<const float> in, StateBase& state,
                      MatrixView<float> out) const override {
      return layer.step(in, of(state), out);
    }
    std::int64_t flush(StateBase& state, MatrixView<float> out) const override {
      return layer.flush(of(state), out);
    }
    void reset(StateBase& state) const override { layer.reset(of(state)); }
    std::int64_t max_outputs(std::int64_t frames) const override {
      return layer.max_outputs(frames);
    }
    std::int64_t max_flush_outputs() const override { return layer.max_flush_outputs(); }
    std::size_t state_bytes() const override { return layer.state_bytes(); }
    void save(const StateBase& state, ByteWriter& writer) const override {
      layer.save(of(state), writer);
    }
    void restore(ByteReader& reader, StateBase& state) const override {
      layer.restore(reader, of(state));
    }
    std::vector<StreamTiming> timings() const override { return timings_of(layer); }
    Layer layer;
  };

  std::shared_ptr<const Base> held_;
};

namespace detail {

// Room to work in: what it holds between two steps means nothing, so copying it copies its size.
class FrameScratch {
 public:
  FrameScratch() = default;
  explicit FrameScratch(std::int64_t size) : values_(static_cast<std::size_t>(size)) {}
  FrameScratch(const FrameScratch& other) : values_(other.values_.size()) {}
  FrameScratch(FrameScratch&&) noexcept = default;
  FrameScratch& operator=(const FrameScratch& other) {
    if (values_.size() != other.values_.size()) values_.resize(other.values_.size());
    return *this;
  }
  FrameScratch& operator=(FrameScratch&&) noexcept = default;

  float* data() { return values_.data(); }

 private:
  std::vector<float> values_;
};

// Rows that came in and have not left yet, at most `capacity` of them, oldest first. How many there
// are follows from what the branches hold. Restored bytes may say otherwise, so no call trusts the
// count: a full queue loses its oldest row, and an empty one gives rows of before.
class FrameQueue {
 public:
  FrameQueue() = default;
  FrameQueue(std::int64_t capacity, std::int64_t width)
      : capacity_(capacity), width_(width), values_(static_cast<std::size_t>(capacity * width)) {}

  std::int64_t size() const { return size_; }
  void clear() { first_ = size_ = 0; }
  void push(MatrixView<const float> rows) {
    SLUICE_ASSERT(rows.cols == width_);
    for (std::int64_t t = 0; t < rows.rows; ++t) {
      if (size_ == capacity_) pop(1);
      std::copy_n(rows.row(t), width_, values_.data() + slot(size_++) * width_);
    }
  }
  // Row `index` behind the oldest.
  const float* row(std::int64_t index) const { return values_.data() + slot(index) * width_; }
  void pop(std::int64_t count) {
    count = std::min(count, size_);
    first_ = slot(count);
    size_ -= count;
  }
  static std::size_t bytes(std::int64_t capacity, std::int64_t width) {
    return static_cast<std::size_t>(capacity * width) * sizeof(float) + sizeof(std::int64_t);
  }
  void save(ByteWriter& writer) const {
    writer.write(size_);
    for (std::int64_t i = 0; i < size_; ++i)
      writer.write_span(std::span<const float>(row(i), static_cast<std::size_t>(width_)));
  }
  void restore(ByteReader& reader) {
    const std::size_t at = reader.offset();
    const auto size = reader.read<std::int64_t>("queued frames");
    if (size < 0 || size > capacity_)
      reader.fail_at(at, "count out of range", "queued frames", "0 to " + std::to_string(capacity_),
                     std::to_string(size));
    first_ = 0;
    size_ = size;
    for (std::int64_t i = 0; i < size; ++i)
      reader.read_span("queued frame", std::span<float>(values_.data() + i * width_,
                                                        static_cast<std::size_t>(width_)));
  }

 private:
  std::int64_t slot(std::int64_t index) const { return (first_ + index) % capacity_; }

  std::int64_t capacity_ = 0;
  std::int64_t width_ = 0;
  std::int64_t first_ = 0;
  std::int64_t size_ = 0;
  std::vector<float> values_;  // [capacity, width]
};

inline void require_positive(std::int64_t value, const char* where, const char* field,
                             std::int64_t least = 1) {
  if (value < least)
    throw Error(ErrorCode::kConfig, {"value out of range", where, field,
                                     "at least " + std::to_string(least), std::to_string(value)});
}

inline void require_width(std::int64_t expected, std::int64_t found, const std::string& where,
                          const std::string& field) {
  if (expected != found)
    throw Error(ErrorCode::kShape, {"widths do not fit", where, field, std::to_string(expected),
                                    std::to_string(found)});
}

}  // namespace detail

/// Layers one behind another, each fed with what the one before wrote. Chunks of any size are taken
/// in blocks of `block_frames`, which bounds the room between layers, so the state's size does not
/// depend on the caller's chunks.
class StreamChain {
 public:
  struct State {
    std::vector<AnyStreamState> layers;
    std::vector<detail::FrameScratch> between;  // [room_[i], out_width] behind layer i
  };

  /// \throws Error(kShape) unless each layer takes the width that the one before writes,
  /// Error(kConfig) without a layer or a positive block. Allocates.
  explicit StreamChain(std::vector<AnyStreamLayer> layers, std::int64_t block_frames = 64)
      : layers_(std::move(layers)), block_frames_(block_frames) {
    detail::require_positive(static_cast<std::int64_t>(layers_.size()), "StreamChain", "layers");
    detail::require_positive(block_frames, "StreamChain", "block_frames");
    std::int64_t rows = block_frames;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (i > 0)
        detail::require_width(layers_[i - 1].out_width(), layers_[i].in_width(), "StreamChain",
                              "input of layer " + std::to_string(i));
      rows = std::max(layers_[i].max_outputs(rows), layers_[i].max_flush_outputs());
      room_.push_back(rows);
    }
  }

  std::int64_t in_width() const { return layers_.front().in_width(); }
  std::int64_t out_width() const { return layers_.back().out_width(); }
  const std::vector<AnyStreamLayer>& layers() const { return layers_; }

  State make_state() const {
    State state;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      state.layers.push_back(layers_[i].make_state());
      if (i + 1 < layers_.size()) state.between.emplace_back(room_[i] * layers_[i].out_width());
    }
    return state;
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    for (std::int64_t t = 0; t < in.rows; t += block_frames_)
      written += run(0, in.middle_rows(t, std::min(block_frames_, in.rows - t)), state,
                     out.middle_rows(written, out.rows - written));
    return written;
  }

  std::int64_t flush(State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const MatrixView<float> free = out.middle_rows(written, out.rows - written);
      const MatrixView<float> target = target_of(i, state, free);
      const std::int64_t rows = layers_[i].flush(state.layers[i], target);
      written +=
          i + 1 == layers_.size() ? rows : run(i + 1, target.middle_rows(0, rows), state, free);
    }
    return written;
  }

  void reset(State& state) const {
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].reset(state.layers[i]);
  }

  std::int64_t max_outputs(std::int64_t frames) const {
    for (const AnyStreamLayer& layer : layers_) frames = layer.max_outputs(frames);
    return frames;
  }
  std::int64_t max_flush_outputs() const {
    std::int64_t rows = 0;
    for (const AnyStreamLayer& layer : layers_)
      rows = layer.max_outputs(rows) + layer.max_flush_outputs();
    return rows;
  }
  std::size_t state_bytes() const {
    std::size_t sum = 0;
    for (const AnyStreamLayer& layer : layers_) sum += layer.state_bytes();
    return sum;
  }
  void save(const State& state, ByteWriter& writer) const {
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].save(state.layers[i], writer);
  }
  void restore(ByteReader& reader, State& state) const {
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].restore(reader, state.layers[i]);
  }
  std::vector<StreamTiming> timings() const {
    std::vector<StreamTiming> all;
    for (const AnyStreamLayer& layer : layers_)
      for (const StreamTiming& timing : layer.timings()) all.push_back(timing);
    return all;
  }

 private:
  MatrixView<float> target_of(std::size_t layer, State& state, MatrixView<float> out) const {
    if (layer + 1 == layers_.size()) return out;
    return {state.between[layer].data(), room_[layer], layers_[layer].out_width()};
  }
  // At most a block of frames through the layers from `first` on.
  std::int64_t run(std::size_t first, MatrixView<const float> in, State& state,
                   MatrixView<float> out) const {
    for (std::size_t i = first; i < layers_.size() && in.rows > 0; ++i) {
      const MatrixView<float> target = target_of(i, state, out);
      in = target.middle_rows(0, layers_[i].step(in, state.layers[i], target));
    }
    return in.rows;
  }

  std::vector<AnyStreamLayer> layers_;
  std::int64_t block_frames_;
  std::vector<std::int64_t> room_;  // rows that layer i writes at most for a block or at a flush
};

/// How the outputs of parallel branches become one row.
enum class BranchMerge {
  kAdd,
  kMultiply,
  kConcat,  ///< side by side, in the order of the branches
};

/// Branches that read the same frames, side by side; a row leaves when the slowest branch has it,
/// and the others wait for it. All branches must keep the same rate and end with equally many rows.
class StreamParallel {
 public:
  struct State {
    std::vector<AnyStreamState> branches;
    std::vector<detail::FrameQueue> queues;
    detail::FrameScratch rows;  // what one branch wrote for a block
  };

  /// \throws Error(kShape) if widths do not fit `merge`; Error(kConfig) if branches differ in rate
  /// or in the number of rows they end with, or if there are none. Allocates.
  StreamParallel(std::vector<AnyStreamLayer> branches, BranchMerge merge,
                 std::int64_t block_frames = 64)
      : branches_(std::move(branches)), merge_(merge), block_frames_(block_frames) {
    detail::require_positive(static_cast<std::int64_t>(branches_.size()), "StreamParallel",
                             "branches");
    detail::require_positive(block_frames, "StreamParallel", "block_frames");
    std::int64_t widest = 0;
    std::vector<std::vector<StreamTiming>> timings;
    for (const AnyStreamLayer& branch : branches_) {
      detail::require_width(branches_[0].in_width(), branch.in_width(), "StreamParallel",
                            "input of a branch");
      if (merge != BranchMerge::kConcat)
        detail::require_width(branches_[0].out_width(), branch.out_width(), "StreamParallel",
                              "output of a branch");
      out_width_ =
          merge == BranchMerge::kConcat ? out_width_ + branch.out_width() : branch.out_width();
      widest = std::max(widest, branch.out_width());
      room_ = std::max({room_, branch.max_outputs(block_frames), branch.max_flush_outputs()});
      timings.push_back(branch.timings());
    }
    scratch_ = room_ * widest;
    combine(timings);
    // What a branch has written and the slowest has not: what arrives while that one waits, one
    // row of difference in phase, a block, and what the end adds.
    for (const AnyStreamLayer& branch : branches_)
      capacity_.push_back(ahead() + branch.max_outputs(block_frames) + branch.max_flush_outputs());
  }

  std::int64_t in_width() const { return branches_[0].in_width(); }
  std::int64_t out_width() const { return out_width_; }

  State make_state() const {
    State state;
    for (std::size_t b = 0; b < branches_.size(); ++b) {
      state.branches.push_back(branches_[b].make_state());
      state.queues.emplace_back(capacity_[b], branches_[b].out_width());
    }
    state.rows = detail::FrameScratch(scratch_);
    return state;
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    for (std::int64_t t = 0; t < in.rows; t += block_frames_) {
      const auto block = in.middle_rows(t, std::min(block_frames_, in.rows - t));
      for (std::size_t b = 0; b < branches_.size(); ++b) {
        const MatrixView<float> rows(state.rows.data(), room_, branches_[b].out_width());
        state.queues[b].push(
            rows.middle_rows(0, branches_[b].step(block, state.branches[b], rows)));
      }
      written += merge(state, out.middle_rows(written, out.rows - written));
    }
    return written;
  }

  std::int64_t flush(State& state, MatrixView<float> out) const {
    for (std::size_t b = 0; b < branches_.size(); ++b) {
      const MatrixView<float> rows(state.rows.data(), room_, branches_[b].out_width());
      state.queues[b].push(rows.middle_rows(0, branches_[b].flush(state.branches[b], rows)));
    }
    return merge(state, out);
  }

  void reset(State& state) const {
    for (std::size_t b = 0; b < branches_.size(); ++b) {
      branches_[b].reset(state.branches[b]);
      state.queues[b].clear();
    }
  }

  std::int64_t max_outputs(std::int64_t frames) const {
    // A fast branch may have queued what a slow one releases at once.
    std::int64_t rows = 0;
    for (const AnyStreamLayer& branch : branches_)
      rows = std::max(rows, branch.max_outputs(frames));
    return rows;
  }
  std::int64_t max_flush_outputs() const {
    std::int64_t rows = 0;
    for (const AnyStreamLayer& branch : branches_)
      rows = std::max(rows, branch.max_flush_outputs());
    return rows;
  }
  std::size_t state_bytes() const {
    std::size_t sum = 0;
    for (std::size_t b = 0; b < branches_.size(); ++b)
      sum +=
          branches_[b].state_bytes() + detail::FrameQueue::bytes(ahead(), branches_[b].out_width());
    return sum;
  }
  void save(const State& state, ByteWriter& writer) const {
    for (std::size_t b = 0; b < branches_.size(); ++b) {
      branches_[b].save(state.branches[b], writer);
      state.queues[b].save(writer);
    }
  }
  void restore(ByteReader& reader, State& state) const {
    for (std::size_t b = 0; b < branches_.size(); ++b) {
      branches_[b].restore(reader, state.branches[b]);
      state.queues[b].restore(reader);
    }
  }
  /// The declarations of the branch that waits longest, its reach widened to what the others see.
  std::vector<StreamTiming> timings() const { return timings_; }

 private:
  void combine(const std::vector<std::vector<StreamTiming>>& timings) {
    std::size_t slowest = 0;
    std::int64_t receptive = 0;
    for (std::size_t b = 0; b < timings.size(); ++b) {
      const StreamLatency latency = latency_of(std::span<const StreamTiming>(timings[b]));
      if (b > 0 && (latency.stride != latency_.stride || latency.upsample != latency_.upsample))
        refuse("rate", std::to_string(latency_.upsample) + "/" + std::to_string(latency_.stride),
               std::to_string(latency.upsample) + "/" + std::to_string(latency.stride));
      const std::int64_t wait = latency.look_ahead + latency.max_chunk_wait;
      if (b == 0 || wait > longest_wait_) {
        slowest = b;
        longest_wait_ = wait;
        latency_ = latency;
      }
      const std::int64_t before = latency.receptive_field - wait;  // a bound of the left reach
      receptive = std::max(receptive, before);
    }
    timings_ = timings[slowest];
    if (const std::int64_t missing = receptive + longest_wait_ - latency_.receptive_field;
        missing > 0 && timings_.front().left < kUnboundedFrames)
      timings_.front().left = std::min(timings_.front().left + missing, kUnboundedFrames);
    const std::int64_t frames = 4 * latency_.stride + longest_wait_;
    for (std::int64_t inputs = 0; inputs <= frames; ++inputs)
      for (const std::vector<StreamTiming>& branch : timings) {
        const std::int64_t rows = outputs_at_end(std::span<const StreamTiming>(branch), inputs);
        const std::int64_t first =
            outputs_at_end(std::span<const StreamTiming>(timings[0]), inputs);
        if (rows != first)
          refuse("rows after " + std::to_string(inputs) + " frames and the end",
                 std::to_string(first), std::to_string(rows));
      }
  }
  // Rows that a branch may have written and the slowest not.
  std::int64_t ahead() const {
    return detail::ceil_div(longest_wait_ * latency_.upsample, latency_.stride) + 1;
  }
  [[noreturn]] static void refuse(std::string field, std::string expected, std::string found) {
    throw Error(ErrorCode::kConfig, {"branches do not keep in step", "StreamParallel",
                                     std::move(field), std::move(expected), std::move(found)});
  }

  std::int64_t merge(State& state, MatrixView<float> out) const {
    std::int64_t rows = out.rows;
    for (const detail::FrameQueue& queue : state.queues) rows = std::min(rows, queue.size());
    for (std::int64_t t = 0; t < rows; ++t) {
      float* target = out.row(t);
      for (std::size_t b = 0; b < branches_.size(); ++b) {
        const float* source = state.queues[b].row(t);
        const std::int64_t width = branches_[b].out_width();
        if (merge_ == BranchMerge::kConcat || b == 0) {
          std::copy_n(source, width, target);
          if (merge_ == BranchMerge::kConcat) target += width;
        } else if (merge_ == BranchMerge::kAdd) {
          for (std::int64_t c = 0; c < width; ++c) target[c] += source[c];
        } else {
          for (std::int64_t c = 0; c < width; ++c) target[c] *= source[c];
        }
      }
    }
    for (detail::FrameQueue& queue : state.queues) queue.pop(rows);
    return rows;
  }

  std::vector<AnyStreamLayer> branches_;
  BranchMerge merge_;
  std::int64_t block_frames_;
  std::int64_t out_width_ = 0;
  std::int64_t room_ = 0;
  std::int64_t scratch_ = 0;
  std::int64_t longest_wait_ = 0;
  StreamLatency latency_;
  std::vector<StreamTiming> timings_;
  std::vector<std::int64_t> capacity_;
};

/// out = x + scale * branch(x): the input waits until the branch has its frame. The branch keeps
/// the rate and the width and ends with as many frames as it was given.
class StreamResidual {
 public:
  struct State {
    AnyStreamState branch;
    detail::FrameQueue waiting;
  };

  /// `scale` 0.5 is the half step of a Conformer's feed-forward layers.
  /// \throws Error(kShape) if the branch changes the width, Error(kConfig) if it changes the rate
  /// or the number of frames. Allocates.
  explicit StreamResidual(AnyStreamLayer branch, float scale = 1.0F, std::int64_t block_frames = 64)
      : branch_(std::move(branch)),
        scale_(scale),
        block_frames_(block_frames),
        timings_(branch_.timings()) {
    detail::require_positive(block_frames, "StreamResidual", "block_frames");
    detail::require_width(branch_.in_width(), branch_.out_width(), "StreamResidual",
                          "output of the branch");
    const StreamLatency latency = latency_of(std::span<const StreamTiming>(timings_));
    if (latency.stride != 1 || latency.upsample != 1)
      refuse("rate", "1", std::to_string(latency.upsample) + "/" + std::to_string(latency.stride));
    const std::int64_t wait = latency.look_ahead + latency.max_chunk_wait;
    if (latency.look_ahead < 0) refuse("look-ahead", "at least 0", std::to_string(wait));
    for (std::int64_t inputs = 0; inputs <= wait + 2; ++inputs)
      if (const std::int64_t rows = outputs_at_end(std::span<const StreamTiming>(timings_), inputs);
          rows != inputs)
        refuse("frames at the end", std::to_string(inputs), std::to_string(rows));
    capacity_ = wait + block_frames;
  }

  std::int64_t in_width() const { return branch_.in_width(); }
  std::int64_t out_width() const { return branch_.in_width(); }
  State make_state() const {
    return {branch_.make_state(), detail::FrameQueue(capacity_, in_width())};
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    for (std::int64_t t = 0; t < in.rows; t += block_frames_) {
      const auto block = in.middle_rows(t, std::min(block_frames_, in.rows - t));
      const auto free = out.middle_rows(written, out.rows - written);
      state.waiting.push(block);
      written += add(state, free, branch_.step(block, state.branch, free));
    }
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    return add(state, out, branch_.flush(state.branch, out));
  }
  void reset(State& state) const {
    branch_.reset(state.branch);
    state.waiting.clear();
  }

  std::int64_t max_outputs(std::int64_t frames) const { return branch_.max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return branch_.max_flush_outputs(); }
  std::size_t state_bytes() const {
    return branch_.state_bytes() + detail::FrameQueue::bytes(capacity_ - block_frames_, in_width());
  }
  void save(const State& state, ByteWriter& writer) const {
    branch_.save(state.branch, writer);
    state.waiting.save(writer);
  }
  void restore(ByteReader& reader, State& state) const {
    branch_.restore(reader, state.branch);
    state.waiting.restore(reader);
  }
  std::vector<StreamTiming> timings() const { return timings_; }

 private:
  [[noreturn]] static void refuse(std::string field, std::string expected, std::string found) {
    throw Error(ErrorCode::kConfig, {"the branch does not keep in step", "StreamResidual",
                                     std::move(field), std::move(expected), std::move(found)});
  }
  std::int64_t add(State& state, MatrixView<float> out, std::int64_t rows) const {
    const std::int64_t width = in_width();
    for (std::int64_t t = 0; t < rows; ++t) {
      const float* x = state.waiting.row(t);
      float* y = out.row(t);
      for (std::int64_t c = 0; c < width; ++c) y[c] = x[c] + scale_ * y[c];
    }
    state.waiting.pop(rows);
    return rows;
  }

  AnyStreamLayer branch_;
  float scale_;
  std::int64_t block_frames_;
  std::int64_t capacity_ = 0;
  std::vector<StreamTiming> timings_;
};

}  // namespace sluice
