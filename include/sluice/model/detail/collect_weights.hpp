// SPDX-License-Identifier: MIT
/// From tensors in a file to the weights of a decoder: what the GGUF and safetensors loaders share.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/io/file_tensor.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::detail {

/// What a file calls the tensors of one layer; an empty name: this kind of file has none.
struct LayerTensorNames {
  std::string attention_norm, query, key, value, output;
  std::string query_norm, key_norm, post_attention_norm;
  std::string feed_forward_norm, gate, up, down, post_feed_forward_norm;
};

/// What a file calls the other tensors. A name without ".weight" / ".bias".
struct TensorNames {
  std::string embedding, output_norm, output;
  std::function<LayerTensorNames(std::int64_t)> layer;
};

/// Collects weights from `File` (find_tensor(name) -> const FileTensor*), checking every shape. Rows
/// that a file does not align are copied.
template <class File>
class WeightCollector {
 public:
  WeightCollector(std::shared_ptr<const File> file, std::string where)
      : where_(std::move(where)), storage_(std::make_shared<Storage>()) {
    storage_->file = std::move(file);
  }

  DecoderWeights collect(const DecoderConfig& config, const TensorNames& names) {
    const std::int64_t q_size = config.num_qo_heads * config.head_dim;
    const std::int64_t kv_size = config.num_kv_heads * config.head_dim;
    const std::int64_t hidden = config.hidden_size;
    DecoderWeights weights;
    weights.embedding = matrix(names.embedding, config.vocab_size, hidden);
    weights.output = has(names.output) ? matrix(names.output, config.vocab_size, hidden)
                                       : weights.embedding;
    weights.output_norm = vector(names.output_norm + ".weight", hidden);
    for (std::int64_t l = 0; l < config.num_layers(); ++l) {
      const LayerTensorNames n = names.layer(l);
      DecoderLayerWeights layer;
      layer.attention_norm = vector(n.attention_norm + ".weight", hidden);
      layer.query = matrix(n.query, q_size, hidden);
      layer.key = matrix(n.key, kv_size, hidden);
      layer.value = matrix(n.value, kv_size, hidden);
      layer.output = matrix(n.output, hidden, q_size);
      layer.query_bias = optional_vector(n.query, ".bias", q_size);
      layer.key_bias = optional_vector(n.key, ".bias", kv_size);
      layer.value_bias = optional_vector(n.value, ".bias", kv_size);
      layer.output_bias = optional_vector(n.output, ".bias", hidden);
      layer.query_norm = optional_vector(n.query_norm, ".weight", config.head_dim);
      layer.key_norm = optional_vector(n.key_norm, ".weight", config.head_dim);
      layer.post_attention_norm = optional_vector(n.post_attention_norm, ".weight", hidden);
      layer.feed_forward_norm = vector(n.feed_forward_norm + ".weight", hidden);
      layer.gate = matrix(n.gate, config.intermediate_size, hidden);
      layer.up = matrix(n.up, config.intermediate_size, hidden);
      layer.down = matrix(n.down, hidden, config.intermediate_size);
      layer.post_feed_forward_norm = optional_vector(n.post_feed_forward_norm, ".weight", hidden);
      refuse_bias(n.gate);
      refuse_bias(n.up);
      refuse_bias(n.down);
      weights.layers.push_back(std::move(layer));
    }
    weights.storage = storage_;
    return weights;
  }

  /// A vector as float32. \throws Error(kFormat, kShape).
  std::vector<float> vector(const std::string& name, std::int64_t size) {
    const FileTensor* tensor = storage_->file->find_tensor(name);
    if (tensor == nullptr) missing(name);
    expect_shape(*tensor, {size});
    return to_floats(*tensor);
  }

  /// A matrix in its stored type, from the tensor `stem`.weight. \throws Error(kFormat, kShape).
  WeightMatrix matrix(const std::string& stem, std::int64_t rows, std::int64_t cols) {
    const FileTensor* tensor = storage_->file->find_tensor(stem + ".weight");
    if (tensor == nullptr) missing(stem + ".weight");
    expect_shape(*tensor, {rows, cols});
    const void* data = tensor->data;
    const bool plain = block_shape(tensor->type).values == 1;
    const auto alignment =
        plain ? static_cast<std::uintptr_t>(block_shape(tensor->type).bytes) : std::uintptr_t{1};
    if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0) {
      storage_->copies.emplace_back(tensor->bytes);
      std::memcpy(storage_->copies.back().data(), data, tensor->bytes);
      data = storage_->copies.back().data();
    }
    return {tensor->type, data, rows, cols};
  }

  /// Keeps every matrix that was given out alive.
  std::shared_ptr<const void> storage() const { return storage_; }

  bool has(const std::string& name) const {
    return !name.empty() && storage_->file->find_tensor(name + ".weight") != nullptr;
  }

  static std::vector<float> to_floats(const FileTensor& tensor) {
    std::int64_t count = 1;
    for (const std::int64_t extent : tensor.shape) count *= extent;
    std::vector<std::uint64_t> aligned((tensor.bytes + 7) / 8);
    std::memcpy(aligned.data(), tensor.data, tensor.bytes);
    std::vector<float> values(static_cast<std::size_t>(count));
    dequantise(tensor.type, aligned.data(), count, values.data());
    return values;
  }

 private:
  struct Storage {
    std::shared_ptr<const File> file;
    std::vector<Buffer<std::uint8_t>> copies;
  };

  [[noreturn]] void missing(const std::string& name) const {
    throw Error(ErrorCode::kFormat,
                {"a tensor is missing", where_, name, "a tensor of this name", "none"});
  }

  void expect_shape(const FileTensor& tensor, const std::vector<std::int64_t>& shape) const {
    if (tensor.shape == shape) return;
    const auto text = [](const std::vector<std::int64_t>& extents) {
      std::string result = "[";
      for (std::size_t i = 0; i < extents.size(); ++i)
        result += (i == 0 ? "" : ", ") + std::to_string(extents[i]);
      return result + "]";
    };
    throw Error(ErrorCode::kShape, {"tensor does not fit the model", where_, tensor.name,
                                    text(shape), text(tensor.shape)});
  }

  std::vector<float> optional_vector(const std::string& stem, const char* suffix,
                                     std::int64_t size) {
    if (stem.empty() || storage_->file->find_tensor(stem + suffix) == nullptr) return {};
    return vector(stem + suffix, size);
  }

  void refuse_bias(const std::string& stem) const {
    if (storage_->file->find_tensor(stem + ".bias") != nullptr)
      throw Error(ErrorCode::kUnsupported, {"a bias in the feed-forward layers", where_,
                                            stem + ".bias", "no such tensor", "one"});
  }

  std::string where_;
  std::shared_ptr<Storage> storage_;
};

}  // namespace sluice::detail
