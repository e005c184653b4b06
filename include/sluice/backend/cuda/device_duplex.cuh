// SPDX-License-Identifier: MIT
/// What device_duplex.hpp declares: two decoders, a stream each, and the graph of the target's
/// step. A step is one launch: token and snapshot come from page-locked host memory, choice and
/// logits go back there.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <variant>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decoder.cuh"
#include "sluice/backend/cuda/device_duplex.hpp"
#include "sluice/backend/cuda/device_session.cuh"
#include "sluice/backend/cuda/memory.cuh"

namespace sluice {

template <class Element>
struct CudaDeviceDuplex<Element>::State {
  template <int kHeadDim>
  struct Pair {
    Pair(const CudaDecoderWeights<Element>& weights, const CudaDecoderOptions& of_source,
         const CudaDecoderOptions& of_target)
        : source(weights, of_source), target(weights, of_target) {}
    CudaDecoder<Element, kHeadDim> source;
    CudaDecoder<Element, kHeadDim> target;
  };
  template <int kHeadDim>
  using PairOf = std::unique_ptr<Pair<kHeadDim>>;

  State(const CudaDeviceModel<Element>& model, const CudaDeviceDuplexConfig& config)
      : device(model.device_index()),
        max_chunk(config.source.max_chunk),
        hidden_size(model.shape().hidden_size),
        vocab(config.logits ? model.shape().vocab_size : 0),
        reader(detail::StreamPriority::kLeast),
        writer(detail::StreamPriority::kGreatest),
        read_tokens(static_cast<std::size_t>(config.max_tokens)),
        read_rows(
            static_cast<std::size_t>(std::max<std::int64_t>(config.max_rows, 1) * hidden_size)),
        token(1),
        visible(1),
        chosen(1),
        logits(static_cast<std::size_t>(std::max<std::int64_t>(vocab, 1))),
        source_tokens(static_cast<std::size_t>(std::max(config.max_tokens, max_chunk))),
        snapshot(1) {
    const std::lock_guard<std::mutex> lock(detail::capture_mutex());
    const CudaDecoderWeights<Element>& weights = model.content().weights;
    CudaDecoderOptions source;
    source.step = detail::step_of_one(config.source, model.rotation());
    source.max_chunk = max_chunk;
    CudaDecoderOptions target;
    target.step = detail::step_of_one(config.target, model.rotation());
    switch (model.shape().head_dim) {
      case 64: pair = std::make_unique<Pair<64>>(weights, source, target); break;
      case 128: pair = std::make_unique<Pair<128>>(weights, source, target); break;
      default:
        throw Error(ErrorCode::kShape, {"no kernels for this head size", "CudaDeviceDuplex",
                                        "head_dim", "64 or 128 (smaller ones padded with zeros)",
                                        std::to_string(model.shape().head_dim)});
    }
    visit([&](auto& d) { d.target.see(d.source.view(snapshot.data())); });
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
    // Once outside the capture, and before there are two threads: what a launch does once is done
    // then. What this writes is written over before anybody sees it.
    visit([&](auto& d) {
      for (const std::int64_t length : {std::int64_t{1}, max_chunk})
        d.source.append_chunk(0, 0, source_tokens.data(), length, reader.get());
      d.target.step(writer.get());
    });
    reader.wait();
    set_target_total(0);
    graph.capture(writer.get(), [&] {
      check_cuda(cudaMemcpyAsync(snapshot.data(), visible.data(), sizeof(std::int64_t),
                                 cudaMemcpyHostToDevice, writer.get()),
                 "cudaMemcpyAsync");
      visit([&](auto& d) {
        d.target.feed_from(token.data(), writer.get());
        d.target.step(writer.get());
        check_cuda(cudaMemcpyAsync(chosen.data(), d.target.tokens_data(), sizeof(Token),
                                   cudaMemcpyDeviceToHost, writer.get()),
                   "cudaMemcpyAsync");
        if (vocab > 0)
          check_cuda(cudaMemcpyAsync(logits.data(), d.target.logits_data(),
                                     static_cast<std::size_t>(vocab) * sizeof(float),
                                     cudaMemcpyDeviceToHost, writer.get()),
                     "cudaMemcpyAsync");
      });
    });
  }

  CudaDeviceScope scope() const { return CudaDeviceScope(device); }

  template <class F>
  auto visit(F&& f) const {
    return std::visit([&](auto& d) { return f(*d); }, pair);
  }

  void set_target_total(std::int64_t total) {
    visit([&](auto& d) { d.target.set_totals(std::array{total}, writer.get()); });
  }
  /// Calls append(done, length) for the chunks of `count` tokens, and waits.
  template <class Append>
  void read(std::int64_t count, Append&& append) {
    for (std::int64_t done = 0; done < count; done += max_chunk)
      append(done, std::min(max_chunk, count - done));
    reader.wait();
    source_total += count;
  }

  int device;
  std::int64_t max_chunk;  // of the source
  std::int64_t hidden_size;
  std::int64_t vocab;             // logits that come to the host
  std::int64_t source_total = 0;  // the source's thread alone
  // A step's many small kernels go first wherever a multiprocessor falls free.
  detail::OwnStream reader;
  detail::OwnStream writer;
  detail::PageLocked<Token> read_tokens;     // [max_tokens]
  detail::PageLocked<float> read_rows;       // [max_rows, hidden_size]
  detail::PageLocked<Token> token;           // that the next step feeds
  detail::PageLocked<std::int64_t> visible;  // tokens of the source that it sees
  detail::PageLocked<Token> chosen;          // of the last step
  detail::PageLocked<float> logits;          // [vocab], its logits
  Buffer<Token, cuda> source_tokens;         // [max_tokens]
  Buffer<std::int64_t, cuda> snapshot;       // what `visible` was when the step began
  std::variant<PairOf<64>, PairOf<128>> pair;
  detail::CapturedGraph graph;
};

template <class Element>
CudaDeviceDuplex<Element>::CudaDeviceDuplex(const CudaDeviceModel<Element>& model,
                                            const CudaDeviceDuplexConfig& config) {
  const CudaDeviceScope scope(model.device_index());
  state_ = std::make_unique<State>(model, config);
}
template <class Element>
CudaDeviceDuplex<Element>::~CudaDeviceDuplex() {
  detail::destroy_on(state_->device, state_);
}

template <class Element>
void CudaDeviceDuplex<Element>::read(std::span<const Token> tokens) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  std::copy(tokens.begin(), tokens.end(), s.read_tokens.data());
  check_cuda(cudaMemcpyAsync(s.source_tokens.data(), s.read_tokens.data(), tokens.size_bytes(),
                             cudaMemcpyHostToDevice, s.reader.get()),
             "cudaMemcpyAsync");
  s.read(static_cast<std::int64_t>(tokens.size()), [&](std::int64_t done, std::int64_t length) {
    s.visit([&](auto& d) {
      d.source.append_chunk(0, s.source_total + done, s.source_tokens.data() + done, length,
                            s.reader.get());
    });
  });
}
template <class Element>
void CudaDeviceDuplex<Element>::read(std::span<const float> rows) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  std::copy(rows.begin(), rows.end(), s.read_rows.data());
  s.read(static_cast<std::int64_t>(rows.size()) / s.hidden_size, [&](std::int64_t done,
                                                                     std::int64_t length) {
    s.visit([&](auto& d) {
      d.source.append_chunk_rows(0, s.source_total + done,
                                 s.read_rows.data() + done * s.hidden_size, length, s.reader.get());
    });
  });
}

template <class Element>
void CudaDeviceDuplex<Element>::step(Token token, std::int64_t visible) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  *s.token.data() = token;
  *s.visible.data() = visible;
  s.graph.launch(s.writer.get());
  s.writer.wait();
}
template <class Element>
void CudaDeviceDuplex<Element>::set_target_total(std::int64_t total) {
  const CudaDeviceScope scope = state_->scope();
  state_->set_target_total(total);
}

template <class Element>
Token CudaDeviceDuplex<Element>::best() const {
  return *state_->chosen.data();
}
template <class Element>
std::span<const float> CudaDeviceDuplex<Element>::logits() const {
  return state_->logits.span().first(static_cast<std::size_t>(state_->vocab));
}

template <class Element>
std::size_t CudaDeviceDuplex<Element>::cache_bytes() const {
  return state_->visit([](auto& d) { return d.source.cache_bytes() + d.target.cache_bytes(); });
}

}  // namespace sluice
