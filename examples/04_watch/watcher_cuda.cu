// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sluice/backend/cuda/kind_decoder.cuh>
#include <sluice/backend/cuda/vision_tower.cuh>

#include "random_weights.hpp"
#include "watcher.hpp"

#include "sluice/position/vision_positions.hpp"
#include "sluice/stream/clock.hpp"

namespace watch {

using sluice::bf16;
using sluice::Buffer;
using sluice::check_cuda;
using sluice::cuda;
using sluice::Error;
using sluice::ErrorCode;
using sluice::Token;

namespace {

__global__ void fill_rows(std::uint16_t* to, std::int64_t count, std::int64_t cols,
                          std::int64_t step, std::uint64_t salt, float scale) {
  const std::int64_t all = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += all)
    to[i / cols * step + i % cols] = random_weight(salt, i, scale);
}

/// A matrix from the seed: row r begins `step` elements behind row r - 1.
void fill(bf16* to, std::int64_t rows, std::int64_t cols, std::int64_t step, std::uint64_t salt,
          float scale) {
  fill_rows<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(to), rows * cols, cols, step, salt,
                           scale);
  check_cuda(cudaGetLastError(), "fill_rows");
}

std::vector<bf16> rounded(const std::vector<float>& values) {
  std::vector<bf16> result;
  result.reserve(values.size());
  for (const float value : values) result.push_back(bf16(value));
  return result;
}

/// A decoder's weights and, where it has them, the biases of queries, keys and values.
struct DecoderWeights {
  sluice::CudaDecoderWeights<bf16> weights;
  std::vector<Buffer<float, cuda>> biases;
};

std::unique_ptr<DecoderWeights> decoder_weights(const Models& models) {
  const DecoderGeometry& g = models.decoder();
  const sluice::CudaDecoderShape shape{g.vocab_size,   g.hidden_size,  g.intermediate_size,
                                       g.num_qo_heads, g.num_kv_heads, g.head_dim,
                                       g.num_layers,   g.norm_eps,     g.sm_scale};
  const auto values = [&](std::int64_t layer, const char* name) {
    return models.decoder_weights(layer, name);
  };
  if (models.loaded_decoder() != nullptr) {
    models.require_plain_decoder();
    const std::vector<float> output = values(-1, "output");
    auto made = std::make_unique<DecoderWeights>(
        DecoderWeights{sluice::CudaDecoderWeights<bf16>(shape, output.empty()), {}});
    made->weights.embedding.upload(rounded(values(-1, "embedding")));
    made->weights.output.upload(rounded(output));
    made->weights.output_norm.upload(values(-1, "output_norm"));
    for (std::int64_t l = 0; l < g.num_layers; ++l) {
      sluice::CudaLayerWeights<bf16>& layer = made->weights.layers[static_cast<std::size_t>(l)];
      layer.attention_norm.upload(values(l, "attention_norm"));
      layer.feed_forward_norm.upload(values(l, "feed_forward_norm"));
      layer.output.upload(rounded(values(l, "output")));
      layer.down.upload(rounded(values(l, "down")));
      made->weights.set_query_key_value(l, rounded(values(l, "query")), rounded(values(l, "key")),
                                        rounded(values(l, "value")));
      made->weights.set_gate_up(l, rounded(values(l, "gate")), rounded(values(l, "up")));
      std::vector<float> bias = values(l, "query_bias");
      if (bias.empty()) continue;
      for (const char* name : {"key_bias", "value_bias"}) {
        const std::vector<float> part = values(l, name);
        bias.insert(bias.end(), part.begin(), part.end());
      }
      made->biases.emplace_back(std::span<const float>(bias));
    }
    return made;
  }
  auto made = std::make_unique<DecoderWeights>(
      DecoderWeights{sluice::CudaDecoderWeights<bf16>(shape, false), {}});
  const std::vector<float> ones(static_cast<std::size_t>(g.hidden_size), 1.0F);
  const auto salt = [&](const std::string& name) {
    return salt_of(models.seed(), name);
  };
  const std::int64_t hidden = g.hidden_size;
  fill(made->weights.embedding.data(), g.vocab_size, hidden, hidden, salt("embedding"),
       scale_of(1));
  fill(made->weights.output.data(), g.vocab_size, hidden, hidden, salt("output"), scale_of(hidden));
  made->weights.output_norm.upload(ones);
  for (std::int64_t l = 0; l < g.num_layers; ++l) {
    sluice::CudaLayerWeights<bf16>& layer = made->weights.layers[static_cast<std::size_t>(l)];
    const std::string at = std::to_string(l) + ".";
    const auto matrix = [&](bf16* to, std::int64_t rows, std::int64_t cols, std::int64_t step,
                            const char* name) {
      fill(to, rows, cols, step, salt(at + name), scale_of(cols));
    };
    layer.attention_norm.upload(ones);
    layer.feed_forward_norm.upload(ones);
    bf16* const fused = layer.query_key_value.data();
    matrix(fused, shape.query_size(), hidden, hidden, "query");
    matrix(fused + shape.query_size() * hidden, shape.kv_size(), hidden, hidden, "key");
    matrix(fused + (shape.query_size() + shape.kv_size()) * hidden, shape.kv_size(), hidden, hidden,
           "value");
    matrix(layer.output.data(), hidden, shape.query_size(), shape.query_size(), "output");
    matrix(layer.gate_up.data(), g.intermediate_size, hidden, 2 * hidden, "gate");
    matrix(layer.gate_up.data() + hidden, g.intermediate_size, hidden, 2 * hidden, "up");
    matrix(layer.down.data(), hidden, g.intermediate_size, g.intermediate_size, "down");
  }
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return made;
}

std::unique_ptr<sluice::CudaVisionWeights<bf16>> encoder_weights(const Models& models) {
  const sluice::VisionEncoderConfig& c = models.encoder();
  sluice::CudaVisionShape shape;
  shape.width = c.width;
  shape.num_layers = c.num_layers;
  shape.num_heads = c.num_heads;
  shape.feed_forward_width = c.feed_forward_width;
  shape.out_width = c.out_width;
  shape.patch_size = c.patch_size;
  shape.grid_frames = c.grid_frames;
  shape.channels = c.channels;
  shape.merge = c.merge;
  shape.window_size = c.window_size;
  shape.whole_layers = c.whole_layers;
  shape.rope_theta = c.rope_theta;
  shape.norm_eps = c.norm_eps;
  auto made = std::make_unique<sluice::CudaVisionWeights<bf16>>(shape);
  const std::int64_t width = c.width;
  const std::int64_t wide = c.feed_forward_width;
  const std::int64_t stored = shape.stored_feed_forward();
  const std::int64_t merged = shape.merged_width();
  if (const sluice::NamedTensors* tensors = models.loaded_encoder(); tensors != nullptr) {
    const auto matrix = [&](Buffer<bf16, cuda>& to, const std::string& name, std::int64_t rows,
                            std::int64_t cols) {
      to.upload(rounded(tensors->get(name + ".weight", {rows, cols})));
    };
    const auto bias = [&](Buffer<float, cuda>& to, const std::string& name, std::int64_t rows) {
      const std::vector<float> values = tensors->optional(name + ".bias", {rows});
      if (!values.empty()) to = Buffer<float, cuda>(std::span<const float>(values));
    };
    made->patches.upload(
        rounded(tensors->get("patch_embed.proj.weight",
                             {width, c.channels, c.grid_frames, c.patch_size, c.patch_size})));
    for (std::int64_t l = 0; l < c.num_layers; ++l) {
      const std::string at = "blocks." + std::to_string(l) + ".";
      sluice::CudaVisionLayer<bf16>& layer = made->layers[static_cast<std::size_t>(l)];
      layer.attention_norm.upload(tensors->get(at + "norm1.weight", {width}));
      layer.feed_forward_norm.upload(tensors->get(at + "norm2.weight", {width}));
      matrix(layer.query_key_value, at + "attn.qkv", 3 * width, width);
      bias(layer.query_key_value_bias, at + "attn.qkv", 3 * width);
      matrix(layer.output, at + "attn.proj", width, width);
      bias(layer.output_bias, at + "attn.proj", width);
      made->set_gate_up(l, rounded(tensors->get(at + "mlp.gate_proj.weight", {wide, width})),
                        rounded(tensors->get(at + "mlp.up_proj.weight", {wide, width})));
      std::vector<float> gate = tensors->optional(at + "mlp.gate_proj.bias", {wide});
      std::vector<float> up = tensors->optional(at + "mlp.up_proj.bias", {wide});
      if (!gate.empty() || !up.empty()) {
        gate.resize(static_cast<std::size_t>(wide));  // of one that has none: zeros
        up.resize(static_cast<std::size_t>(wide));
        made->set_gate_up_bias(l, gate, up);
      }
      made->set_down(l, rounded(tensors->get(at + "mlp.down_proj.weight", {width, wide})));
      bias(layer.down_bias, at + "mlp.down_proj", width);
    }
    made->merger_norm.upload(tensors->get("merger.ln_q.weight", {width}));
    matrix(made->merger_first, "merger.mlp.0", merged, merged);
    bias(made->merger_first_bias, "merger.mlp.0", merged);
    matrix(made->merger_second, "merger.mlp.2", c.out_width, merged);
    bias(made->merger_second_bias, "merger.mlp.2", c.out_width);
    return made;
  }
  const auto matrix = [&](bf16* to, std::int64_t rows, std::int64_t cols, std::int64_t step,
                          const std::string& name) {
    fill(to, rows, cols, step, salt_of(models.encoder_seed(), name + ".weight"), scale_of(cols));
  };
  matrix(made->patches.data(), width, shape.patch_values(), shape.patch_values(),
         "patch_embed.proj");
  for (std::int64_t l = 0; l < c.num_layers; ++l) {
    const std::string at = "blocks." + std::to_string(l) + ".";
    sluice::CudaVisionLayer<bf16>& layer = made->layers[static_cast<std::size_t>(l)];
    matrix(layer.query_key_value.data(), 3 * width, width, width, at + "attn.qkv");
    matrix(layer.output.data(), width, width, width, at + "attn.proj");
    matrix(layer.gate_up.data(), wide, width, 2 * width, at + "mlp.gate_proj");
    matrix(layer.gate_up.data() + width, wide, width, 2 * width, at + "mlp.up_proj");
    matrix(layer.down.data(), width, wide, stored, at + "mlp.down_proj");
  }
  matrix(made->merger_first.data(), merged, merged, merged, "merger.mlp.0");
  matrix(made->merger_second.data(), c.out_width, merged, merged, "merger.mlp.2");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return made;
}

/// A tower of any head size.
class Eye {
 public:
  virtual ~Eye() = default;
  virtual const float* encode(const std::uint8_t* frames) = 0;
  virtual std::int64_t frame_bytes() const = 0;
};

template <int kHeadDim>
class EyeOf final : public Eye {
 public:
  EyeOf(const sluice::CudaVisionWeights<bf16>& weights, const WatcherConfig& config,
        cudaStream_t stream)
      : tower_(weights, config.rows, config.cols, stream) {}
  const float* encode(const std::uint8_t* frames) override { return tower_.encode(frames); }
  std::int64_t frame_bytes() const override { return tower_.frame_bytes(); }

 private:
  sluice::CudaVisionTower<bf16, kHeadDim> tower_;
};

[[noreturn]] void refuse_head_dim(const char* field, const char* expected, std::int64_t found) {
  throw Error(ErrorCode::kUnsupported, {"no kernels for heads of this size", "watch_cuda", field,
                                        expected, std::to_string(found)});
}

std::unique_ptr<Eye> make_eye(const sluice::CudaVisionWeights<bf16>& weights,
                              const WatcherConfig& config, cudaStream_t stream) {
  switch (weights.shape().head_dim()) {
    case 64: return std::make_unique<EyeOf<64>>(weights, config, stream);
    case 80: return std::make_unique<EyeOf<80>>(weights, config, stream);
    default: refuse_head_dim("head_dim of the encoder", "64 or 80", weights.shape().head_dim());
  }
}

class Stream {
 public:
  Stream() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) {
    check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  void wait() { check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize"); }
  /// Nanoseconds until `later`; both have happened.
  std::int64_t until(const Event& later) const {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, event_, later.event_), "cudaEventElapsedTime");
    return static_cast<std::int64_t>(static_cast<double>(ms) * 1e6);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

template <int kHeadDim>
class CudaWatcher final : public Watcher {
 public:
  CudaWatcher(const Models& models, const WatcherConfig& config)
      : decoder_weights_(decoder_weights(models)),
        encoder_weights_(encoder_weights(models)),
        decoder_(decoder_weights_->weights, options(models, config), stream_.get(),
                 decoder_weights_->biases),
        eye_(make_eye(*encoder_weights_, config, stream_.get())),
        grid_{.frames = 1,
              .rows = config.rows,
              .cols = config.cols,
              .frame_step = sluice::time_step(config.seconds_per_frame)},
        grid_frames_(models.encoder().grid_frames),
        frames_(static_cast<std::size_t>(grid_frames_ * eye_->frame_bytes())),
        said_(static_cast<std::size_t>(config.retention.max_reply) * sizeof(Token)) {}

  void read_prompt(std::span<const Token> head, std::span<const Token> previous,
                   std::span<const Token> tail) override {
    const auto read = [&](sluice::SpanRole role, std::span<const Token> tokens) {
      decoder_.begin_span(role);
      decoder_.read(tokens);
    };
    read(sluice::SpanRole::kHead, head);
    read(sluice::SpanRole::kPrevious, previous);
    read(sluice::SpanRole::kTail, tail);
    check_cuda(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
  }
  bool take(std::span<const std::uint8_t> pixels) override {
    if (held_ == grid_frames_) held_ = 0;
    std::memcpy(frames_.data() + held_ * eye_->frame_bytes(), pixels.data(), pixels.size());
    return ++held_ == grid_frames_;
  }

  /// The host waits at the end alone; times between are the device's.
  FrameTimes see(std::int64_t reply) override {
    cudaStream_t const stream = stream_.get();
    FrameTimes times;
    times.begin = sluice::monotonic_ns();
    const float* const seen = eye_->encode(reinterpret_cast<const std::uint8_t*>(frames_.data()));
    encoded_.record(stream);

    // A round: what has had its time leaves the cache, the frame comes in, something is said.
    decoder_.begin_round();
    decoder_.begin_span(sluice::SpanRole::kVision, grid_);
    decoder_.see(seen, grid_.num_tokens());
    read_.record(stream);

    decoder_.begin_span(sluice::SpanRole::kReply);
    if (reply > 0) decoder_.choose();
    for (std::int64_t i = 0; i < reply; ++i) {
      check_cuda(cudaMemcpyAsync(said() + i, decoder_.device_token(), sizeof(Token),
                                 cudaMemcpyDeviceToHost, stream),
                 "cudaMemcpyAsync");
      if (i == 0) first_token_.record(stream);
      decoder_.say(1);
    }
    done_.record(stream);
    done_.wait();
    times.done = sluice::monotonic_ns();
    times.encoded = times.done - encoded_.until(done_);
    times.read = times.done - read_.until(done_);
    if (reply > 0) times.first_token = times.done - first_token_.until(done_);
    count_ = reply;
    return times;
  }
  std::span<const Token> last_reply() const override {
    return {said(), static_cast<std::size_t>(count_)};
  }

  const sluice::KindRetention& retention() const override { return decoder_.retention(); }
  std::size_t token_bytes() const override { return decoder_.token_bytes(); }
  std::size_t cache_bytes() const override { return decoder_.cache_bytes(); }
  std::string device() const override {
    int device = 0;
    cudaDeviceProp properties{};
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    return properties.name;
  }

 private:
  static sluice::CudaKindDecoderOptions options(const Models& models, const WatcherConfig& config) {
    const DecoderGeometry& g = models.decoder();
    const bool one_axis = g.sections[0] + g.sections[1] + g.sections[2] == 0;
    sluice::CudaKindDecoderOptions result;
    result.retention = config.retention;
    result.frequencies = g.frequencies;
    result.time_pairs = one_axis ? kHeadDim / 2 : g.sections[0];
    result.height_pairs = one_axis ? 0 : g.sections[1];
    result.choice = {.temperature = config.temperature, .seed = config.seed};
    return result;
  }
  Token* said() const { return reinterpret_cast<Token*>(said_.data()); }

  Stream stream_;
  std::unique_ptr<DecoderWeights> decoder_weights_;
  std::unique_ptr<sluice::CudaVisionWeights<bf16>> encoder_weights_;
  sluice::CudaKindDecoder<bf16, kHeadDim> decoder_;
  std::unique_ptr<Eye> eye_;
  sluice::VisionGrid grid_;
  std::int64_t grid_frames_;
  std::int64_t held_ = 0;
  sluice::PinnedBytes frames_;
  mutable sluice::PinnedBytes said_;
  std::int64_t count_ = 0;
  Event encoded_;
  Event read_;
  Event first_token_;
  Event done_;
};

}  // namespace

template <>
std::unique_ptr<Watcher> make_watcher<cuda>(const Models& models, const WatcherConfig& config) {
  sluice::require_cuda_device("watch_cuda");
  switch (models.decoder().head_dim) {
    case 64: return std::make_unique<CudaWatcher<64>>(models, config);
    case 128: return std::make_unique<CudaWatcher<128>>(models, config);
    default: refuse_head_dim("head_dim of the decoder", "64 or 128", models.decoder().head_dim);
  }
}

}  // namespace watch
