// SPDX-License-Identifier: MIT
/// Float tensors by name: what encoders are built from. A file gives them (model/load_encoder.hpp),
/// or a seed, for programs and tests without trained weights.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"

namespace sluice {

/// A set of tensors. Const after it was filled: any number of threads may read.
class NamedTensors {
 public:
  struct Tensor {
    std::vector<std::int64_t> shape;  ///< outermost axis first
    std::vector<float> values;
  };

  /// `where` names the set in errors, for example a file.
  explicit NamedTensors(std::string where) : where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  bool has(const std::string& name) const { return tensors_.find(name) != tensors_.end(); }
  std::size_t size() const { return tensors_.size(); }
  /// Pairs of a name and its tensor, by name.
  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }

  /// \throws Error(kShape) unless there are as many values as the shape says.
  void add(std::string name, std::vector<std::int64_t> shape, std::vector<float> values) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    if (count != static_cast<std::int64_t>(values.size()))
      throw Error(ErrorCode::kShape, {"values do not fill the tensor", where_, name,
                                      std::to_string(count), std::to_string(values.size())});
    tensors_.insert_or_assign(std::move(name), Tensor{std::move(shape), std::move(values)});
  }

  /// A tensor of any shape. \throws Error(kFormat) if there is none of this name.
  const Tensor& get(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end())
      throw Error(ErrorCode::kFormat,
                  {"a tensor is missing", where_, name, "a tensor of this name", "none"});
    return found->second;
  }
  /// The values of a tensor of this shape.
  /// \throws Error(kFormat) if there is none of this name, Error(kShape) if its shape is another.
  const std::vector<float>& get(const std::string& name,
                                const std::vector<std::int64_t>& shape) const {
    const Tensor& tensor = get(name);
    if (tensor.shape != shape)
      throw Error(ErrorCode::kShape,
                  {"tensor does not fit the model", where_, name, text(shape), text(tensor.shape)});
    return tensor.values;
  }
  /// The same, empty where there is none of this name.
  std::vector<float> optional(const std::string& name,
                              const std::vector<std::int64_t>& shape) const {
    return has(name) ? get(name, shape) : std::vector<float>{};
  }

 private:
  static std::string text(const std::vector<std::int64_t>& shape) {
    std::string result = "[";
    for (std::size_t i = 0; i < shape.size(); ++i)
      result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return result + "]";
  }

  std::string where_;
  std::map<std::string, Tensor> tensors_;
};

/// Fills tensors from a seed, for models without weights: uniform with variance 1 / fan-in where
/// there is more than one axis, one value in a vector.
class RandomTensors {
 public:
  explicit RandomTensors(std::uint64_t seed) : tensors_("random weights"), random_(seed) {}

  /// [rows, ...] matrix or kernel.
  RandomTensors& matrix(const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    const double range =
        std::sqrt(3.0 * static_cast<double>(shape.front()) / static_cast<double>(count));
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>((2 * random_.uniform() - 1) * range);
    tensors_.add(name, std::move(shape), std::move(values));
    return *this;
  }
  RandomTensors& vector(const std::string& name, std::int64_t size, float value) {
    tensors_.add(name, {size}, std::vector<float>(static_cast<std::size_t>(size), value));
    return *this;
  }
  const NamedTensors& tensors() const { return tensors_; }

 private:
  NamedTensors tensors_;
  Random random_;
};

}  // namespace sluice
