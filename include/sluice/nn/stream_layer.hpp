// SPDX-License-Identifier: MIT
/// What a layer over a stream of frames is: weights that never change, a state object for each
/// stream, and a step that takes any number of frames. Whatever the chunks, the outputs are those
/// of one call on the whole input.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/stream_timing.hpp"

namespace sluice {

/// What the layer and those within it declare, first to last. A layer of one piece has timing(), a
/// composition timings(). Allocates the list.
template <class Layer>
requires requires(const Layer& layer) {
  { layer.timing() } -> std::same_as<StreamTiming>;
}
std::vector<StreamTiming> timings_of(const Layer& layer) {
  return {layer.timing()};
}
template <class Layer>
requires requires(const Layer& layer) {
  { layer.timings() } -> std::same_as<std::vector<StreamTiming>>;
}
std::vector<StreamTiming> timings_of(const Layer& layer) {
  return layer.timings();
}

/// A layer over frames. Frames are rows: step() reads in[frames, in_width()] and writes
/// out[rows, out_width()].
///
/// - A layer is const once constructed and may serve any number of streams and threads. Everything
///   that a stream changes is in its State: `make_state()` allocates it, and from then on nothing
///   allocates, locks or throws. A copy of a State is a snapshot: what follows from the copy is bit
///   for bit what followed from the original.
/// - `step(in, state, out)` accepts in.rows frames, zero included, and returns how many rows of out
///   it wrote: as many as timing() says. max_outputs(in.rows) rows of room are always enough; in
///   and out do not overlap. Written rows are final. A stream gives the same bits however it is cut
///   into chunks.
/// - `flush(state, out)` says that the input has ended and writes the outputs that waited for more,
///   at most max_flush_outputs(). After it the state may only be reset, restored or assigned.
/// - `reset(state)` returns to the beginning of a stream.
/// - `state_bytes()` is what a stream holds from one step to the next; room to work in, which State
///   has too, is not counted.
/// - `save` and `restore` write and read that state, without a frame around it: see
///   save_stream_state. restore throws Error(kFormat) and leaves an unspecified state then.
///
/// Shapes and rows are asserted in debug builds; constructors throw Error.
template <class Layer>
concept StreamLayer = std::copyable<typename Layer::State> &&
    requires(const Layer& layer, typename Layer::State& state, const typename Layer::State& held,
             MatrixView<const float> in, MatrixView<float> out, std::int64_t frames,
             ByteWriter& writer, ByteReader& reader) {
  { layer.in_width() } -> std::same_as<std::int64_t>;
  { layer.out_width() } -> std::same_as<std::int64_t>;
  { layer.make_state() } -> std::same_as<typename Layer::State>;
  { layer.step(in, state, out) } -> std::same_as<std::int64_t>;
  { layer.flush(state, out) } -> std::same_as<std::int64_t>;
  { layer.reset(state) } -> std::same_as<void>;
  { layer.max_outputs(frames) } -> std::same_as<std::int64_t>;
  { layer.max_flush_outputs() } -> std::same_as<std::int64_t>;
  { layer.state_bytes() } -> std::same_as<std::size_t>;
  { layer.save(held, writer) } -> std::same_as<void>;
  { layer.restore(reader, state) } -> std::same_as<void>;
  { timings_of(layer) } -> std::same_as<std::vector<StreamTiming>>;
};

/// Latency of a layer or a composition, from what it declares.
template <StreamLayer Layer>
StreamLatency latency_of(const Layer& layer) {
  const std::vector<StreamTiming> timings = timings_of(layer);
  return latency_of(std::span<const StreamTiming>(timings));
}

namespace detail {
inline constexpr std::uint64_t kStreamStateMagic = 0x3154'5354'4543'4c53ULL;  // "SLCETST1"
}

/// A stream's state as bytes that outlive the process, with a checksum. Allocates them.
template <StreamLayer Layer>
std::vector<std::byte> save_stream_state(const Layer& layer, const typename Layer::State& state) {
  ByteWriter writer;
  writer.write(detail::kStreamStateMagic);
  writer.write(layer.in_width());
  writer.write(layer.out_width());
  writer.write(static_cast<std::uint64_t>(layer.state_bytes()));
  layer.save(state, writer);
  writer.write_checksum();
  return writer.take();
}

/// Reads such bytes into `state`, which is changed only when all of them were right.
/// \throws Error(kFormat) if they are damaged or of a layer of other shapes. Allocates a copy.
template <StreamLayer Layer>
void restore_stream_state(const Layer& layer, std::span<const std::byte> bytes,
                          typename Layer::State& state) {
  ByteReader reader(bytes, "stream state");
  reader.verify_checksum();
  reader.read_expected("magic", detail::kStreamStateMagic);
  reader.read_expected("in_width", layer.in_width());
  reader.read_expected("out_width", layer.out_width());
  reader.read_expected("state_bytes", static_cast<std::uint64_t>(layer.state_bytes()));
  typename Layer::State read = state;
  layer.restore(reader, read);
  reader.expect_end();
  state = std::move(read);
}

}  // namespace sluice
