// SPDX-License-Identifier: MIT
/// What device_session.hpp declares: a decoder with one session, and the graph of its step. A step
/// is one launch: the token comes from page-locked host memory, its choice goes back there.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decoder.cuh"
#include "sluice/backend/cuda/device_session.hpp"
#include "sluice/backend/cuda/memory.cuh"

namespace sluice {

namespace detail {

/// nll[row] = -ln softmax(logits[row])[targets[row]], in nats: a block per row, two passes.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    likelihood_kernel(const float* logits, const std::int32_t* targets, std::int64_t vocab,
                      float* nll) {
  __shared__ float scratch[kThreads / kWarpSize];
  const float* const row = logits + static_cast<std::int64_t>(blockIdx.x) * vocab;
  const int tid = static_cast<int>(threadIdx.x);
  float top = -__int_as_float(0x7f800000);
  for (std::int64_t i = tid; i < vocab; i += kThreads) top = fmaxf(top, row[i]);
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, step));
  if (tid % kWarpSize == 0) scratch[tid / kWarpSize] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / kWarpSize; ++i) top = fmaxf(top, scratch[i]);
  __syncthreads();  // scratch is used again
  float sum = 0;
  for (std::int64_t i = tid; i < vocab; i += kThreads) sum += expf(row[i] - top);
  sum = sum_of_block<kThreads>(sum, scratch);
  if (tid == 0) nll[blockIdx.x] = logf(sum) - (row[targets[blockIdx.x]] - top);
}

/// to[row] = the token of the greatest of logits[row], of equals the first: a block per row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    best_tokens_kernel(const float* logits, std::int64_t vocab, Token* to) {
  __shared__ TokenCandidate best[kThreads / kWarpSize];
  const float* const row = logits + static_cast<std::int64_t>(blockIdx.x) * vocab;
  TokenCandidate mine{-__int_as_float(0x7f800000), 0};
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads)
    mine = better(mine, {row[i], i});
  mine = best_of_block<kThreads>(mine, best);
  if (threadIdx.x == 0) to[blockIdx.x] = mine.token;
}

/// Copies `height` runs of `width` elements, `to_pitch` and `from_pitch` elements apart.
template <class T>
void copy_runs(T* to, std::int64_t to_pitch, const T* from, std::int64_t from_pitch,
               std::int64_t width, std::int64_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  if (width == 0 || height == 0) return;
  const auto bytes = [](std::int64_t elements) {
    return static_cast<std::size_t>(elements) * sizeof(T);
  };
  check_cuda(cudaMemcpy2DAsync(to, bytes(to_pitch), from, bytes(from_pitch), bytes(width),
                               static_cast<std::size_t>(height), kind, stream),
             "cudaMemcpy2DAsync");
}

/// `size` elements of page-locked host memory, which the device reads and writes in stream order.
template <class T>
class PageLocked {
 public:
  explicit PageLocked(std::size_t size) : size_(size) {
    void* memory = nullptr;
    check_cuda(cudaMallocHost(&memory, size * sizeof(T)), "cudaMallocHost");
    data_ = static_cast<T*>(memory);
    std::fill_n(data_, size, T{});
  }
  ~PageLocked() { static_cast<void>(cudaFreeHost(data_)); }
  PageLocked(const PageLocked&) = delete;
  PageLocked& operator=(const PageLocked&) = delete;

  T* data() const { return data_; }
  std::span<const T> span() const { return {data_, size_}; }

 private:
  std::size_t size_;
  T* data_ = nullptr;
};

/// Whose kernels go first where a multiprocessor falls free.
enum class StreamPriority { kLeast, kGreatest };

/// A stream that waits for no other.
class OwnStream {
 public:
  explicit OwnStream(StreamPriority priority = StreamPriority::kLeast) {
    int least = 0;
    int greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriority");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking,
                                            priority == StreamPriority::kLeast ? least : greatest),
               "cudaStreamCreate");
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t get() const { return stream_; }
  void wait() const { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Held while a session is made: nobody may wait for the device, as a decoder's constructor does,
/// while a stream of another session is captured.
inline std::mutex& capture_mutex() {
  static std::mutex mutex;
  return mutex;
}

/// Ends what lives on a device with that device current, as cuBLASLt asks for.
template <class T>
void destroy_on(int device, std::unique_ptr<T>& owned) noexcept {
  try {
    const CudaDeviceScope scope(device);
    owned.reset();
  } catch (const Error&) {  // the device is gone
    owned.reset();
  }
}

/// What was launched while a stream was captured.
class CapturedGraph {
 public:
  CapturedGraph() = default;
  ~CapturedGraph() {
    if (executable_ != nullptr) static_cast<void>(cudaGraphExecDestroy(executable_));
  }
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  /// Calls record(), which launches into the stream. \throws what it throws, Error(kDevice).
  template <class Record>
  void capture(cudaStream_t stream, Record&& record) {
    cudaGraph_t graph = nullptr;
    // Other threads may allocate meanwhile.
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    try {
      record();
    } catch (...) {
      static_cast<void>(cudaStreamEndCapture(stream, &graph));
      if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
      static_cast<void>(cudaGetLastError());  // that the capture failed has been said
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    check_cuda(status, "cudaGraphInstantiate");
  }
  void launch(cudaStream_t stream) const {
    check_cuda(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch");
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

/// place_quantised() of a whole matrix. \throws Error(kShape, kDevice).
inline CudaQuantisedMatrix quantised_of(std::span<const CudaPackedRows> parts, std::int64_t rows,
                                        std::int64_t cols, const char* name) {
  std::int64_t found = 0;
  for (const CudaPackedRows& part : parts) found += part.rows;
  if (found != rows)
    throw Error(ErrorCode::kShape, {"content does not fit", "CudaDeviceModel", name,
                                    std::to_string(rows), std::to_string(found)});
  return place_quantised(parts, cols);
}

/// The step of one stream. Config: CudaDeviceSessionConfig, or a group's of CudaDeviceDuplexConfig.
/// The rotation must outlive what is made of it.
template <class Config>
DecodeStepConfig step_of_one(const Config& config, const CudaRotation& rotation) {
  return {.num_sink_tokens = config.num_sink_tokens,
          .window_size = config.window_size,
          .capacity = config.capacity,
          .position_rule = config.position_rule,
          .origin = config.origin,
          .batch_size = 1,
          .frequencies = rotation.frequencies,
          .attention_factor = rotation.attention_factor,
          .interleaved = rotation.interleaved};
}

}  // namespace detail

// --- The model -----------------------------------------------------------------------------------

template <class Element>
struct CudaDeviceModel<Element>::Content {
  CudaDecoderWeights<Element> weights;
  CudaRotation rotation;
  int device;

  CudaDeviceScope scope() const { return CudaDeviceScope(device); }
};

template <class Element>
void CudaDeviceModel<Element>::require_device(int device) {
  static_cast<void>(require_cuda_device("CudaDeviceModel", device));
}

template <class Element>
CudaDeviceModel<Element>::CudaDeviceModel(const CudaDecoderShape& shape, CudaRotation rotation,
                                          bool tied, int device) {
  device = require_cuda_device("CudaDeviceModel", device);
  const CudaDeviceScope scope(device);
  content_ = std::make_unique<Content>(
      Content{CudaDecoderWeights<Element>(shape, tied, false), std::move(rotation), device});
}
template <class Element>
CudaDeviceModel<Element>::~CudaDeviceModel() {
  detail::destroy_on(content_->device, content_);
}

template <class Element>
void CudaDeviceModel<Element>::set_embedding(std::span<const Element> embedding) {
  const CudaDeviceScope scope = content_->scope();
  content_->weights.embedding.upload(embedding);
}
template <class Element>
void CudaDeviceModel<Element>::set_output(std::span<const Element> output) {
  const CudaDeviceScope scope = content_->scope();
  CudaDecoderWeights<Element>& weights = content_->weights;
  weights.set(weights.output, shape().vocab_size, shape().hidden_size, output);
}
template <class Element>
void CudaDeviceModel<Element>::set_output(const CudaPackedRows& output) {
  const CudaDeviceScope scope = content_->scope();
  content_->weights.quantised_output =
      detail::quantised_of(std::array{output}, shape().vocab_size, shape().hidden_size, "output");
}
template <class Element>
void CudaDeviceModel<Element>::set_output_norm(std::span<const float> norm) {
  const CudaDeviceScope scope = content_->scope();
  content_->weights.output_norm.upload(norm);
}
template <class Element>
void CudaDeviceModel<Element>::set_layer(std::int64_t layer,
                                         const CudaLayerContent<Element>& content) {
  const CudaDeviceScope scope = content_->scope();
  CudaDecoderWeights<Element>& weights = content_->weights;
  CudaLayerWeights<Element>& to = weights.layers[static_cast<std::size_t>(layer)];
  const CudaDecoderShape& s = weights.shape();
  to.attention_norm.upload(content.attention_norm);
  to.feed_forward_norm.upload(content.feed_forward_norm);
  if (content.packed_query.content.empty())
    weights.set_query_key_value(layer, content.query, content.key, content.value);
  else
    to.quantised_query_key_value = detail::quantised_of(
        std::array{content.packed_query, content.packed_key, content.packed_value}, s.fused_size(),
        s.hidden_size, "query, key and value");
  if (content.packed_output.content.empty())
    weights.set(to.output, s.hidden_size, s.query_size(), content.output);
  else
    to.quantised_output = detail::quantised_of(std::array{content.packed_output}, s.hidden_size,
                                               s.query_size(), "output of attention");
  if (content.packed_gate_up.content.empty())
    weights.set_gate_up(layer, content.gate, content.up);
  else
    to.quantised_gate_up = detail::quantised_of(
        std::array{content.packed_gate_up}, 2 * s.intermediate_size, s.hidden_size, "gate and up");
  if (content.packed_down.content.empty())
    weights.set(to.down, s.hidden_size, s.intermediate_size, content.down);
  else
    to.quantised_down = detail::quantised_of(std::array{content.packed_down}, s.hidden_size,
                                             s.intermediate_size, "down");
}

template <class Element>
const CudaDecoderShape& CudaDeviceModel<Element>::shape() const {
  return content_->weights.shape();
}
template <class Element>
const CudaRotation& CudaDeviceModel<Element>::rotation() const {
  return content_->rotation;
}
template <class Element>
int CudaDeviceModel<Element>::device_index() const {
  return content_->device;
}
template <class Element>
std::size_t CudaDeviceModel<Element>::bytes() const {
  return content_->weights.bytes();
}

// --- The stream ----------------------------------------------------------------------------------

template <class Element, class Cache>
struct CudaDeviceSession<Element, Cache>::State {
  template <int kHeadDim>
  using DecoderOf = std::unique_ptr<CudaDecoder<Element, kHeadDim, Cache>>;

  State(const CudaDeviceModel<Element>& model, const CudaDeviceSessionConfig& config)
      : device(model.device_index()),
        vocab(model.shape().vocab_size),
        token(1),
        chosen(1),
        logits(static_cast<std::size_t>(vocab)),
        nll(static_cast<std::size_t>(config.likelihood_rows)),
        targets(static_cast<std::size_t>(config.likelihood_rows)),
        nll_on_device(static_cast<std::size_t>(config.likelihood_rows)),
        draft(static_cast<std::size_t>(config.max_chunk)),
        depths(draft.size()),
        ancestor_words((config.max_chunk + 63) / 64),
        ancestors(draft.size() * static_cast<std::size_t>(ancestor_words)),
        bests(static_cast<std::size_t>(config.likelihood_rows)),
        bests_on_device(static_cast<std::size_t>(config.likelihood_rows)),
        rows(static_cast<std::size_t>(config.max_chunk > 1 ? config.likelihood_rows * vocab : 0)) {
    const std::lock_guard<std::mutex> lock(detail::capture_mutex());
    CudaDecoderOptions options;
    options.step = detail::step_of_one(config, model.rotation());
    options.max_chunk = config.max_chunk > 1 ? config.max_chunk : 0;
    options.keep_hidden = true;
    const CudaDecoderWeights<Element>& weights = model.content().weights;
    switch (model.shape().head_dim) {
      case 64: decoder = std::make_unique<CudaDecoder<Element, 64, Cache>>(weights, options); break;
      case 128:
        decoder = std::make_unique<CudaDecoder<Element, 128, Cache>>(weights, options);
        break;
      default:
        throw Error(ErrorCode::kShape, {"no kernels for this head size", "CudaDeviceSession",
                                        "head_dim", "64 or 128 (smaller ones padded with zeros)",
                                        std::to_string(model.shape().head_dim)});
    }
    // A first step outside the capture: what a launch does once is done then.
    visit([&](auto& d) { d.step(stream.get()); });
    set_total(0);
    graph.capture(stream.get(), [&] {
      visit([&](auto& d) {
        d.feed_from(token.data(), stream.get());
        d.step(stream.get());
      });
      copy_choice();
    });
    const CudaDecoderShape& s = model.shape();
    runs = s.num_layers * s.num_kv_heads;
    capacity = config.capacity;
    head_dim = s.head_dim;
    layer_runs = s.num_kv_heads;
    hidden_size = s.hidden_size;
    place_slots = config.place_slots;
    const auto place_rows = static_cast<std::size_t>(runs * place_slots);
    const std::size_t place_elements = place_rows * static_cast<std::size_t>(head_dim);
    const std::size_t place_scales = CudaCode<Cache> ? place_rows : 0;
    for (int i = 0; i < config.places; ++i)
      places.push_back({Buffer<Cache, cuda>(place_elements), Buffer<Cache, cuda>(place_elements),
                        Buffer<float, cuda>(place_scales), Buffer<float, cuda>(place_scales),
                        Buffer<float, cuda>(static_cast<std::size_t>(hidden_size)), false});
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
  }

  CudaDeviceScope scope() const { return CudaDeviceScope(device); }

  template <class F>
  auto visit(F&& f) const {
    return std::visit([&](auto& d) { return f(*d); }, decoder);
  }

  void set_total(std::int64_t to) {
    visit([&](auto& d) { d.set_totals(std::array{to}, stream.get()); });
    total = to;
    logits_here = false;
  }
  void copy_choice() {
    visit([&](auto& d) {
      check_cuda(cudaMemcpyAsync(chosen.data(), d.tokens_data(), sizeof(Token),
                                 cudaMemcpyDeviceToHost, stream.get()),
                 "cudaMemcpyAsync");
    });
  }
  /// nll of `next` by rows of logits on the device.
  void score(const float* from, std::span<const Token> next, std::span<float> to) {
    targets.upload(next, stream.get());
    constexpr int kThreads = 256;
    detail::likelihood_kernel<kThreads>
        <<<static_cast<unsigned>(next.size()), kThreads, 0, stream.get()>>>(
            from, targets.data(), vocab, nll_on_device.data());
    check_cuda(cudaGetLastError(), "likelihood_kernel");
    check_cuda(cudaMemcpyAsync(nll.data(), nll_on_device.data(), next.size() * sizeof(float),
                               cudaMemcpyDeviceToHost, stream.get()),
               "cudaMemcpyAsync");
    stream.wait();
    std::copy_n(nll.data(), next.size(), to.begin());
  }

  /// What was read last has left its logits, its choice and its state on the device.
  void read_done() { logits_here = logits_stale = hidden_normed = false; }
  /// Another state was put behind the last token.
  void set_state(std::int64_t to, bool normed) {
    set_total(to);
    logits_stale = true;
    hidden_normed = normed;
  }
  /// Forms logits and choice where the state behind the last token came from elsewhere.
  void ensure_logits() {
    if (!logits_stale) return;
    visit([&](auto& d) { d.choose_again(hidden_normed, stream.get()); });
    copy_choice();
    stream.wait();
    logits_stale = false;
  }
  void copy_hidden(float* to, const float* from) const {
    detail::copy_runs(to, hidden_size, from, hidden_size, hidden_size, 1, cudaMemcpyDefault,
                      stream.get());
  }
  /// Rows where they lie: T and Scale are const where they are only read.
  template <class T, class Scale>
  struct Rows {
    T* keys;
    T* values;
    Scale* key_scales;  // null where rows have none
    Scale* value_scales;
    std::int64_t pitch;  // slots from head to head
  };
  /// Copies `slots` slots of each of `heads` heads, which follow one another.
  template <class To, class From>
  void copy_rows(const To& to, const From& from, std::int64_t slots, std::int64_t heads,
                 cudaMemcpyKind kind = cudaMemcpyDeviceToDevice) const {
    const auto copy = [&](auto* target, const auto* origin, std::int64_t width) {
      detail::copy_runs(target, to.pitch * width, origin, from.pitch * width, slots * width, heads,
                        kind, stream.get());
    };
    copy(to.keys, from.keys, head_dim);
    copy(to.values, from.values, head_dim);
    if constexpr (CudaCode<Cache>) {
      copy(to.key_scales, from.key_scales, 1);
      copy(to.value_scales, from.value_scales, 1);
    }
  }
  /// A decoder's rows from a slot of a head on; heads are counted over all layers.
  template <class Decoder>
  auto rows_of(Decoder& d, std::int64_t head = 0, std::int64_t slot = 0) const {
    const std::int64_t row = head * capacity + slot;
    return Rows{d.keys_data() + row * head_dim, d.values_data() + row * head_dim,
                CudaCode<Cache> ? d.key_scales_data() + row : nullptr,
                CudaCode<Cache> ? d.value_scales_data() + row : nullptr, capacity};
  }
  /// What capture() keeps.
  struct Place {
    Buffer<Cache, cuda> keys;          // [layers, num_kv_heads, place_slots, head_dim]
    Buffer<Cache, cuda> values;        // the same
    Buffer<float, cuda> key_scales;    // [layers, num_kv_heads, place_slots], of codes
    Buffer<float, cuda> value_scales;  // the same
    Buffer<float, cuda> hidden;        // [hidden_size]
    bool normed;
  };
  auto rows_of_host(const CudaCacheRows<Cache>& rows, std::int64_t slots) const {
    return Rows<Cache, float>{rows.keys.data(), rows.values.data(), rows.key_scales.data(),
                              rows.value_scales.data(), slots};
  }
  template <class SomePlace>
  auto rows_of_place(SomePlace& place) const {
    return Rows{place.keys.data(), place.values.data(), place.key_scales.data(),
                place.value_scales.data(), place_slots};
  }
  /// Logits behind token i of the draft are in rows[i - first_row].
  void form_rows(std::int64_t i) {
    const std::int64_t most = static_cast<std::int64_t>(bests.span().size());
    if (first_row >= 0 && i >= first_row && i < first_row + most) return;
    first_row = i / most * most;
    const std::int64_t count = std::min(most, draft_size - first_row);
    visit([&](auto& d) { d.chunk_logits(first_row, count, rows.data(), stream.get()); });
    constexpr int kThreads = 256;
    detail::best_tokens_kernel<kThreads>
        <<<static_cast<unsigned>(count), kThreads, 0, stream.get()>>>(rows.data(), vocab,
                                                                      bests_on_device.data());
    check_cuda(cudaGetLastError(), "best_tokens_kernel");
    check_cuda(cudaMemcpyAsync(bests.data(), bests_on_device.data(),
                               static_cast<std::size_t>(count) * sizeof(Token),
                               cudaMemcpyDeviceToHost, stream.get()),
               "cudaMemcpyAsync");
    stream.wait();
  }
  void copy_logits(const float* from) {
    check_cuda(cudaMemcpyAsync(logits.data(), from, static_cast<std::size_t>(vocab) * sizeof(float),
                               cudaMemcpyDeviceToHost, stream.get()),
               "cudaMemcpyAsync");
    stream.wait();
  }

  int device;
  std::int64_t vocab;
  std::int64_t total = 0;
  std::int64_t runs = 0;        // [layers, num_kv_heads] of the cache
  std::int64_t layer_runs = 0;  // num_kv_heads
  std::int64_t capacity = 0;    // slots of a head
  std::int64_t head_dim = 0;
  std::int64_t hidden_size = 0;
  std::int64_t place_slots = 0;
  std::int64_t draft_size = 0;
  std::int64_t first_row = -1;        // of the draft, in rows; -1: none was formed
  bool logits_here = false;           // logits belongs to the last token read
  bool logits_stale = false;          // on the device they do not
  bool hidden_normed = false;         // as set_hidden() said
  detail::OwnStream stream;           // all of the following is used in its order
  detail::PageLocked<Token> token;    // that the next step reads
  detail::PageLocked<Token> chosen;   // of the last one
  detail::PageLocked<float> logits;   // [vocab]
  detail::PageLocked<float> nll;      // [likelihood_rows]
  Buffer<Token, cuda> targets;        // [likelihood_rows]
  Buffer<float, cuda> nll_on_device;  // [likelihood_rows]
  Buffer<Token, cuda> draft;          // [max_chunk]
  Buffer<std::int32_t, cuda> depths;  // [max_chunk], of a draft's nodes
  std::int64_t ancestor_words;
  Buffer<std::uint64_t, cuda> ancestors;  // [max_chunk, ancestor_words]
  detail::PageLocked<Token> bests;  // [likelihood_rows], of the draft's tokens from first_row on
  Buffer<Token, cuda> bests_on_device;  // [likelihood_rows]
  Buffer<float, cuda> rows;             // [likelihood_rows, vocab]
  std::variant<DecoderOf<64>, DecoderOf<128>> decoder;
  detail::CapturedGraph graph;
  std::vector<Place> places;
};

template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::CudaDeviceSession(const CudaDeviceModel<Element>& model,
                                                     const CudaDeviceSessionConfig& config) {
  const CudaDeviceScope scope(model.device_index());
  state_ = std::make_unique<State>(model, config);
}
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::~CudaDeviceSession() {
  if (state_ != nullptr) detail::destroy_on(state_->device, state_);
}
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::CudaDeviceSession(CudaDeviceSession&& other) noexcept = default;
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>& CudaDeviceSession<Element, Cache>::operator=(
    CudaDeviceSession&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

template <class Element, class Cache>
std::int64_t CudaDeviceSession<Element, Cache>::total() const {
  return state_->total;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::set_total(std::int64_t total) {
  const CudaDeviceScope scope = state_->scope();
  state_->set_total(total);
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::read(std::span<const Token> tokens) {
  if (tokens.size() == 1) return step(tokens[0]);
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.read_done();
  s.visit([&](auto& d) { d.prefill(0, tokens, s.stream.get()); });
  s.total += static_cast<std::int64_t>(tokens.size());
  s.copy_choice();
  s.stream.wait();
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::step(Token token) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.read_done();
  *s.token.data() = token;
  s.graph.launch(s.stream.get());
  s.stream.wait();
  ++s.total;
}

template <class Element, class Cache>
Token CudaDeviceSession<Element, Cache>::best() {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.ensure_logits();
  return *s.chosen.data();
}
template <class Element, class Cache>
std::span<const float> CudaDeviceSession<Element, Cache>::logits() {
  State& s = *state_;
  if (!s.logits_here) {
    const CudaDeviceScope scope = s.scope();
    s.ensure_logits();
    s.copy_logits(s.visit([](auto& d) -> const float* { return d.logits_data(); }));
    s.logits_here = true;
  }
  return s.logits.span();
}
template <class Element, class Cache>
double CudaDeviceSession<Element, Cache>::likelihood(Token next) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.ensure_logits();
  float nll = 0;
  s.score(s.visit([](auto& d) { return d.logits_data(); }), {&next, 1}, {&nll, 1});
  return nll;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::likelihoods(std::span<const Token> next,
                                                    std::span<float> nll) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  const std::size_t most = s.targets.size();
  for (std::size_t done = 0; done < next.size(); done += most) {
    const std::size_t count = std::min(most, next.size() - done);
    s.visit([&](auto& d) {
      d.chunk_logits(static_cast<std::int64_t>(done), static_cast<std::int64_t>(count),
                     s.rows.data(), s.stream.get());
    });
    s.score(s.rows.data(), next.subspan(done, count), nll.subspan(done, count));
  }
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::read_draft(std::span<const Token> tokens,
                                                   std::span<const std::int32_t> depths,
                                                   std::span<const std::uint64_t> ancestors) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.draft.upload(tokens, s.stream.get());
  s.draft_size = static_cast<std::int64_t>(tokens.size());
  s.first_row = -1;
  ChunkTree tree;
  if (!depths.empty()) {
    s.depths.upload(depths, s.stream.get());
    s.ancestors.upload(ancestors, s.stream.get());
    tree = {s.depths.data(), s.ancestors.data(), s.ancestor_words};
  }
  s.visit([&](auto& d) {
    d.append_chunk(0, s.total, s.draft.data(), s.draft_size, s.stream.get(), tree);
  });
}
template <class Element, class Cache>
Token CudaDeviceSession<Element, Cache>::draft_best(std::int64_t i) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.form_rows(i);
  return s.bests.span()[static_cast<std::size_t>(i - s.first_row)];
}
template <class Element, class Cache>
std::span<const float> CudaDeviceSession<Element, Cache>::draft_logits(std::int64_t i) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.form_rows(i);
  s.logits_here = false;
  s.copy_logits(s.rows.data() + (i - s.first_row) * s.vocab);
  return s.logits.span();
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::move_slot(std::int64_t from, std::int64_t to) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](auto& d) { s.copy_rows(s.rows_of(d, 0, to), s.rows_of(d, 0, from), 1, s.runs); });
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::keep_draft(std::int64_t tokens) {
  const CudaDeviceScope scope = state_->scope();
  state_->set_total(state_->total + tokens);
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::capture(int place, std::int64_t slots) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  typename State::Place& to = s.places[static_cast<std::size_t>(place)];
  s.visit([&](const auto& d) {
    s.copy_rows(s.rows_of_place(to), s.rows_of(d), slots, s.runs);
    s.copy_hidden(to.hidden.data(), d.hidden_data());
  });
  to.normed = s.hidden_normed;
  s.stream.wait();
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::revert(int place, std::int64_t slots, std::int64_t total) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  const typename State::Place& from = s.places[static_cast<std::size_t>(place)];
  s.visit([&](auto& d) {
    s.copy_rows(s.rows_of(d), s.rows_of_place(from), slots, s.runs);
    s.copy_hidden(d.hidden_data(), from.hidden.data());
  });
  s.set_state(total, from.normed);
}
template <class Element, class Cache>
std::size_t CudaDeviceSession<Element, Cache>::place_bytes() const {
  if (state_->places.empty()) return 0;
  const typename State::Place& place = state_->places.front();
  return place.keys.bytes() + place.values.bytes() + place.key_scales.bytes() +
         place.value_scales.bytes() + place.hidden.bytes();
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::copy_from(const CudaDeviceSession& other,
                                                  std::int64_t slots) {
  State& s = *state_;
  const State& from = *other.state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](auto& d) {
    using Decoder = std::remove_reference_t<decltype(d)>;
    const Decoder& same = *std::get<std::unique_ptr<Decoder>>(from.decoder);
    s.copy_rows(s.rows_of(d), s.rows_of(same), slots, s.runs);
    s.copy_hidden(d.hidden_data(), same.hidden_data());
  });
  s.set_state(from.total, from.hidden_normed);
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::download(std::int64_t layer, std::int64_t slots,
                                                 const CudaCacheRows<Cache>& rows) const {
  const State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](const auto& d) {
    s.copy_rows(s.rows_of_host(rows, slots), s.rows_of(d, layer * s.layer_runs), slots,
                s.layer_runs, cudaMemcpyDeviceToHost);
  });
  s.stream.wait();
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::upload(std::int64_t layer, std::int64_t slots,
                                               const CudaCacheRows<Cache>& rows) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](auto& d) {
    s.copy_rows(s.rows_of(d, layer * s.layer_runs), s.rows_of_host(rows, slots), slots,
                s.layer_runs, cudaMemcpyHostToDevice);
  });
  s.stream.wait();
}
template <class Element, class Cache>
bool CudaDeviceSession<Element, Cache>::hidden(std::span<float> to) const {
  const State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](const auto& d) { s.copy_hidden(to.data(), d.hidden_data()); });
  s.stream.wait();
  return s.hidden_normed;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::set_hidden(std::span<const float> hidden, bool normed) {
  State& s = *state_;
  const CudaDeviceScope scope = s.scope();
  s.visit([&](auto& d) { s.copy_hidden(d.hidden_data(), hidden.data()); });
  s.set_state(s.total, normed);
}

template <class Element, class Cache>
std::size_t CudaDeviceSession<Element, Cache>::cache_bytes() const {
  return state_->visit([](auto& d) { return d.cache_bytes(); });
}

}  // namespace sluice
