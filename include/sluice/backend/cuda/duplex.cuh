// SPDX-License-Identifier: MIT
/// Reading while writing on the GPU: one stream reads the source in chunks, another writes the
/// target token by token and sees a prefix of what was read. Both work on one cache, nothing is
/// copied. Needs cublasLt.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decoder.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/segment_attention.cuh"

namespace sluice {

/// Wait-k (arXiv 1810.08398): step t of the target sees the first wait + t / write * read tokens
/// of the source, or all of them.
struct CudaDuplexPolicy {
  std::int64_t wait = 1;   ///< tokens of the source before the first of the target
  std::int64_t read = 1;   ///< then so many
  std::int64_t write = 1;  ///< for so many of the target

  std::int64_t needed(std::int64_t step, std::int64_t source_tokens) const {
    return std::min(source_tokens, wait + step / write * read);
  }
};

struct CudaDuplexOptions {
  CudaDecoderOptions source;  ///< one session, a full cache, max_chunk at least 1
  CudaDecoderOptions target;  ///< one session; any window
  CudaDuplexPolicy policy;
  double shift = 0;  ///< from the target's positions to the source's numbering
};

/// How the two sides run.
enum class DuplexStreams {
  kOne,  ///< in turns, on the writer's stream: the sequential run
  kTwo,  ///< side by side
};

namespace detail {

/// Everything that was written before it in the stream may be read by who acquires the count.
template <int kUnused>
__global__ void publish_kernel(std::int64_t* published, std::int64_t count) {
  asm volatile("st.release.gpu.global.s64 [%0], %1;" ::"l"(published), "l"(count) : "memory");
}

/// The prefix that the next step sees. The host lets no step begin before what its policy needs is
/// read, so that the snapshot follows from the step's index alone.
template <int kUnused>
__global__ void take_snapshot_kernel(const std::int64_t* published, const std::int64_t* totals,
                                     const std::int64_t* source_tokens, CudaDuplexPolicy policy,
                                     std::int64_t* snapshot) {
  const std::int64_t needed = policy.wait + *totals / policy.write * policy.read;
  *snapshot = min(min(needed, *source_tokens), load_acquire(published));
}

}  // namespace detail

/// The two sides of one model. Only construction and the first run() allocate.
///
/// A step of the target takes a snapshot of the published count (acquire), forms the segment lists
/// of all layers from it and runs; it is captured once and replayed. Chunks of the source end with
/// a publication (release). With the same policy both ways of running give the same bits: a step
/// sees as many tokens as the policy says, never what happens to be there.
template <class Element, int kHeadDim>
class CudaDuplex {
 public:
  /// The weights must outlive this. \throws Error(kConfig, kShape, kDevice).
  CudaDuplex(const CudaDecoderWeights<Element>& weights, const CudaDuplexOptions& options)
      : options_(checked(options)),
        source_(weights, options.source),
        target_(weights, options.target),
        counts_(3),
        source_tokens_(static_cast<std::size_t>(options.source.step.capacity)) {
    target_.see(source_.view(counts_.data() + kSnapshot, options.shift));
    // The writer's many small kernels go first wherever a multiprocessor falls free.
    int least = 0;
    int greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriority");
    check_cuda(cudaStreamCreateWithPriority(&reader_, cudaStreamNonBlocking, least),
               "cudaStreamCreate");
    check_cuda(cudaStreamCreateWithPriority(&writer_, cudaStreamNonBlocking, greatest),
               "cudaStreamCreate");
    const std::int64_t chunks =
        (options.source.step.capacity + options.source.max_chunk - 1) / options.source.max_chunk;
    events_.resize(static_cast<std::size_t>(chunks) + 2);
    for (cudaEvent_t& event : events_)
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~CudaDuplex() {
    static_cast<void>(cudaDeviceSynchronize());
    if (step_ != nullptr) static_cast<void>(cudaGraphExecDestroy(step_));
    for (cudaEvent_t event : events_) static_cast<void>(cudaEventDestroy(event));
    for (cudaStream_t stream : {reader_, writer_}) static_cast<void>(cudaStreamDestroy(stream));
  }
  CudaDuplex(const CudaDuplex&) = delete;
  CudaDuplex& operator=(const CudaDuplex&) = delete;

  CudaDecoder<Element, kHeadDim>& source() { return source_; }
  CudaDecoder<Element, kHeadDim>& target() { return target_; }

  /// Begins both streams anew: reads `source_tokens` and writes `steps` tokens, the first step
  /// feeding `first_token`. Waits for the end; target().history() has the text.
  /// \throws Error(kShape) for tokens that do not fit the cache or the vocabulary; Error(kDevice).
  void run(std::span<const std::int32_t> source_tokens, std::int64_t steps,
           std::int32_t first_token, DuplexStreams streams) {
    begin(source_tokens, first_token);
    submit(steps, streams);
    check_cuda(cudaStreamSynchronize(reader_), "cudaStreamSynchronize");
    check_cuda(cudaStreamSynchronize(writer_), "cudaStreamSynchronize");
  }

  /// run() in two halves, for measurements: what is prepared, and what is then submitted to
  /// writer() and joined there.
  void begin(std::span<const std::int32_t> source_tokens, std::int32_t first_token) {
    if (source_tokens.empty() || source_tokens.size() > source_tokens_.size())
      throw Error(ErrorCode::kShape, {"the source does not fit", "CudaDuplex::run", "source_tokens",
                                      "1 to " + std::to_string(source_tokens_.size()),
                                      std::to_string(source_tokens.size())});
    for (const std::int32_t token : source_tokens)
      if (token < 0 || token >= source_.shape().vocab_size)
        throw Error(ErrorCode::kShape,
                    {"a token outside the vocabulary", "CudaDuplex::run", "token",
                     "below " + std::to_string(source_.shape().vocab_size), std::to_string(token)});
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    count_ = static_cast<std::int64_t>(source_tokens.size());
    source_tokens_.upload(source_tokens, writer_);
    const std::int64_t counts[3] = {0, 0, count_};  // published, snapshot, tokens of the source
    counts_.upload(counts, writer_);
    const std::int64_t zero[1] = {0};
    source_.set_totals(zero, writer_);
    target_.set_totals(zero, writer_);
    const std::int32_t token[1] = {first_token};
    target_.feed(token, writer_);
    if (step_ == nullptr) capture();
    check_cuda(cudaStreamSynchronize(writer_), "cudaStreamSynchronize");
  }
  /// Precondition: begin() came before. A target with a full cache has room for `steps`.
  void submit(std::int64_t steps, DuplexStreams streams) {
    const bool two = streams == DuplexStreams::kTwo;
    const cudaStream_t reader = two ? reader_ : writer_;
    if (two) {
      check_cuda(cudaEventRecord(events_[events_.size() - 1], writer_), "cudaEventRecord");
      check_cuda(cudaStreamWaitEvent(reader_, events_[events_.size() - 1]), "cudaStreamWaitEvent");
    }
    std::int64_t step = 0;
    std::size_t chunk = 0;
    for (std::int64_t base = 0; base < count_; base += options_.source.max_chunk, ++chunk) {
      const std::int64_t length = std::min(options_.source.max_chunk, count_ - base);
      source_.append_chunk(0, base, source_tokens_.data() + base, length, reader);
      detail::publish_kernel<0><<<1, 1, 0, reader>>>(counts_.data() + kPublished, base + length);
      check_cuda(cudaGetLastError(), "publish_kernel");
      if (two) {
        check_cuda(cudaEventRecord(events_[chunk], reader_), "cudaEventRecord");
        check_cuda(cudaStreamWaitEvent(writer_, events_[chunk]), "cudaStreamWaitEvent");
      }
      for (; step < steps && options_.policy.needed(step, count_) <= base + length; ++step)
        check_cuda(cudaGraphLaunch(step_, writer_), "cudaGraphLaunch");
    }
    if (two) {
      check_cuda(cudaEventRecord(events_[events_.size() - 2], reader_), "cudaEventRecord");
      check_cuda(cudaStreamWaitEvent(writer_, events_[events_.size() - 2]), "cudaStreamWaitEvent");
    }
  }
  cudaStream_t writer() const { return writer_; }

 private:
  static constexpr int kPublished = 0;
  static constexpr int kSnapshot = 1;
  static constexpr int kSourceTokens = 2;

  static const CudaDuplexOptions& checked(const CudaDuplexOptions& o) {
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kConfig, {"the two sides do not fit", "CudaDuplexOptions", field,
                                         expected, std::to_string(found)});
    };
    require(o.source.step.batch_size == 1, "source.step.batch_size", "1", o.source.step.batch_size);
    require(o.target.step.batch_size == 1, "target.step.batch_size", "1", o.target.step.batch_size);
    // Nobody holds the reader back here.
    require(o.source.step.window_size >= DecodeStepConfig::kUnlimitedWindow,
            "source.step.window_size", "unlimited", o.source.step.window_size);
    require(o.source.max_chunk >= 1, "source.max_chunk", "at least 1", o.source.max_chunk);
    require(o.policy.wait >= 1, "policy.wait", "at least 1", o.policy.wait);
    require(o.policy.read >= 0, "policy.read", "at least 0", o.policy.read);
    require(o.policy.write >= 1, "policy.write", "at least 1", o.policy.write);
    return o;
  }

  void capture() {
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(writer_, cudaStreamCaptureModeThreadLocal), "begin capture");
    detail::take_snapshot_kernel<0><<<1, 1, 0, writer_>>>(
        counts_.data() + kPublished, target_.state().totals_data(), counts_.data() + kSourceTokens,
        options_.policy, counts_.data() + kSnapshot);
    target_.step(writer_);
    check_cuda(cudaStreamEndCapture(writer_, &graph), "end capture");
    const cudaError_t status = cudaGraphInstantiate(&step_, graph, 0);
    check_cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check_cuda(status, "cudaGraphInstantiate");
  }

  CudaDuplexOptions options_;
  CudaDecoder<Element, kHeadDim> source_;
  CudaDecoder<Element, kHeadDim> target_;
  Buffer<std::int64_t, cuda> counts_;
  Buffer<std::int32_t, cuda> source_tokens_;
  std::int64_t count_ = 0;
  cudaStream_t reader_ = nullptr;
  cudaStream_t writer_ = nullptr;
  cudaGraphExec_t step_ = nullptr;
  std::vector<cudaEvent_t> events_;
};

}  // namespace sluice
