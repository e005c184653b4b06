// SPDX-License-Identifier: MIT
/// Writes GGUF files, version 3, little endian: for seeded models, converters and tests.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/detail/write_file.hpp"
#include "sluice/io/gguf.hpp"

namespace sluice {

namespace detail {

/// The file's type for a C++ type; only exact types have one, so that nothing converts by accident.
template <class T>
struct GgufTypeOf;
template <>
struct GgufTypeOf<std::uint8_t> : std::integral_constant<GgufType, GgufType::kUint8> {};
template <>
struct GgufTypeOf<std::int8_t> : std::integral_constant<GgufType, GgufType::kInt8> {};
template <>
struct GgufTypeOf<std::uint16_t> : std::integral_constant<GgufType, GgufType::kUint16> {};
template <>
struct GgufTypeOf<std::int16_t> : std::integral_constant<GgufType, GgufType::kInt16> {};
template <>
struct GgufTypeOf<std::uint32_t> : std::integral_constant<GgufType, GgufType::kUint32> {};
template <>
struct GgufTypeOf<std::int32_t> : std::integral_constant<GgufType, GgufType::kInt32> {};
template <>
struct GgufTypeOf<float> : std::integral_constant<GgufType, GgufType::kFloat32> {};
template <>
struct GgufTypeOf<bool> : std::integral_constant<GgufType, GgufType::kBool> {};
template <>
struct GgufTypeOf<std::uint64_t> : std::integral_constant<GgufType, GgufType::kUint64> {};
template <>
struct GgufTypeOf<std::int64_t> : std::integral_constant<GgufType, GgufType::kInt64> {};
template <>
struct GgufTypeOf<double> : std::integral_constant<GgufType, GgufType::kFloat64> {};

}  // namespace detail

/// A C++ type that is a metadata number or bool: the eight sized integers, float, double, bool.
template <class T>
concept GgufScalar = requires {
  detail::GgufTypeOf<T>::value;
};

/// Gathers metadata and tensors, then writes them in the order they were added. Copies what it is
/// given: it allocates as much as the file is long. One thread at a time.
class GgufWriter {
 public:
  /// `alignment`: what tensor offsets are a multiple of, in bytes; other values than 32 are also
  /// written as the key general.alignment.
  /// \throws Error(kConfig) unless it is a power of two of at least 8.
  explicit GgufWriter(std::uint32_t alignment = 32) : alignment_(alignment) {
    if (!std::has_single_bit(alignment) || alignment < 8)
      throw Error(ErrorCode::kConfig, {"GGUF alignment makes no sense", "GgufWriter", "alignment",
                                       "a power of two from 8", std::to_string(alignment)});
    if (alignment != detail::kGgufDefaultAlignment) add("general.alignment", alignment);
  }

  /// Adds a number or bool under its exact type: add("llama.block_count", std::uint32_t{30}).
  /// \throws Error(kConfig) if the key was added before. So do all that follow.
  template <GgufScalar T>
  void add(std::string_view key, T value) {
    put_key(key, detail::GgufTypeOf<T>::value);
    put(metadata_, value);
  }
  void add(std::string_view key, std::string_view value) {
    put_key(key, GgufType::kString);
    put_string(metadata_, value);
  }
  void add(std::string_view key, const char* value) { add(key, std::string_view(value)); }

  /// Adds an array from any sized range of one exact number type, of bool, or of strings.
  template <std::ranges::sized_range Values>
  requires GgufScalar<std::ranges::range_value_t<Values>> ||
      std::convertible_to<std::ranges::range_value_t<Values>, std::string_view>
  void add_array(std::string_view key, const Values& values) {
    using Value = std::ranges::range_value_t<Values>;
    if constexpr (GgufScalar<Value>) {
      put_array(key, detail::GgufTypeOf<Value>::value, std::ranges::size(values));
      for (const Value value : values) put(metadata_, value);
    } else {
      put_array(key, GgufType::kString, std::ranges::size(values));
      for (const std::string_view value : values) put_string(metadata_, value);
    }
  }

  /// Adds a tensor. shape: outermost axis first, [rows, cols]; data: the elements as the file holds
  /// them, rows of whole blocks. Copied.
  /// \throws Error(kShape) for no or more than 4 axes, an extent below 1, a row that is not whole
  /// blocks, or data of another size; Error(kConfig) if the name was added before.
  void add_tensor(std::string_view name, ElementType type, std::span<const std::int64_t> shape,
                  std::span<const std::byte> data) {
    const std::string field = "tensor " + detail::quote_text(name);
    if (shape.empty() || shape.size() > detail::kGgufMaxDims)
      throw Error(ErrorCode::kShape,
                  {"GGUF tensor has an impossible number of dimensions", "GgufWriter", field,
                   "1 to " + std::to_string(detail::kGgufMaxDims), std::to_string(shape.size())});
    const BlockShape block = block_shape(type);
    std::size_t blocks = 1;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      const std::int64_t unit = axis + 1 == shape.size() ? block.values : 1;
      if (shape[axis] < 1 || shape[axis] % unit != 0)
        throw Error(ErrorCode::kShape, {"GGUF tensor has an impossible extent", "GgufWriter",
                                        field + ", axis " + std::to_string(axis),
                                        "a positive multiple of " + std::to_string(unit),
                                        std::to_string(shape[axis])});
      const auto extent = static_cast<std::size_t>(shape[axis] / unit);
      // More blocks than there are data bytes cannot match: stop before the product overflows.
      if (extent > data.size() / blocks) {
        blocks = data.size() + 1;
        break;
      }
      blocks *= extent;
    }
    if (blocks > data.size() || data.size() != blocks * static_cast<std::size_t>(block.bytes))
      throw Error(ErrorCode::kShape,
                  {"GGUF tensor data does not fill its shape", "GgufWriter", field,
                   "as many bytes as shape and type say", std::to_string(data.size()) + " bytes"});
    for (const Tensor& other : tensors_) {
      if (other.name == name)
        throw Error(ErrorCode::kConfig, {"GGUF tensor was added before", "GgufWriter", field,
                                         "a new name", "an old one"});
    }
    tensors_.push_back({std::string(name), type, {shape.begin(), shape.end()}, data_.size()});
    data_.insert(data_.end(), data.begin(), data.end());
    data_.resize(aligned(data_.size()));
  }
  void add_tensor(const FileTensor& tensor) {
    add_tensor(tensor.name, tensor.type, tensor.shape, tensor.span());
  }

  /// The file's content. Allocates it.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> file;
    put(file, detail::kGgufMagic);
    put(file, std::uint32_t{3});
    put(file, std::uint64_t{tensors_.size()});
    put(file, std::uint64_t{keys_.size()});
    file.insert(file.end(), metadata_.begin(), metadata_.end());
    for (const Tensor& tensor : tensors_) {
      put_string(file, tensor.name);
      put(file, static_cast<std::uint32_t>(tensor.shape.size()));
      for (auto extent = tensor.shape.rbegin(); extent != tensor.shape.rend(); ++extent)
        put(file, static_cast<std::uint64_t>(*extent));
      put(file, ggml_type_number(tensor.type));
      put(file, std::uint64_t{tensor.offset});
    }
    file.resize(aligned(file.size()));
    file.insert(file.end(), data_.begin(), data_.end());
    return file;
  }

  /// Writes the file, in one step: `path` is replaced when all is written, or left as it was.
  /// \throws Error(kIo).
  void write(const std::string& path) const { detail::write_file(path, bytes()); }

 private:
  struct Tensor {
    std::string name;
    ElementType type;
    std::vector<std::int64_t> shape;  // outermost first
    std::size_t offset;               // in data_
  };

  template <class T>
  static void put(std::vector<std::byte>& to, T value) {
    const auto* const first = reinterpret_cast<const std::byte*>(&value);
    to.insert(to.end(), first, first + sizeof(T));
  }
  static void put_string(std::vector<std::byte>& to, std::string_view text) {
    put(to, std::uint64_t{text.size()});
    const auto* const first = reinterpret_cast<const std::byte*>(text.data());
    to.insert(to.end(), first, first + text.size());
  }
  void put_key(std::string_view key, GgufType type) {
    for (const std::string& other : keys_) {
      if (other == key)
        throw Error(ErrorCode::kConfig, {"GGUF key was added before", "GgufWriter",
                                         detail::quote_text(key), "a new key", "an old one"});
    }
    keys_.emplace_back(key);
    put_string(metadata_, key);
    put(metadata_, type);
  }
  void put_array(std::string_view key, GgufType element, std::size_t count) {
    put_key(key, GgufType::kArray);
    put(metadata_, element);
    put(metadata_, std::uint64_t{count});
  }
  std::size_t aligned(std::size_t size) const {
    return (size + alignment_ - 1) / alignment_ * alignment_;
  }

  std::size_t alignment_;
  std::vector<std::string> keys_;
  std::vector<std::byte> metadata_;  // entries as the file holds them
  std::vector<Tensor> tensors_;
  std::vector<std::byte> data_;  // padded tensors
};

}  // namespace sluice
