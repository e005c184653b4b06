// SPDX-License-Identifier: MIT
/// GGUF model files, versions 2 and 3, little endian: metadata and tensors, read in place from a
/// memory map. The content is untrusted: each count, length and offset is checked before it is
/// used.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/detail/name_index.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/file_tensor.hpp"
#include "sluice/io/mapped_file.hpp"

namespace sluice {

static_assert(std::endian::native == std::endian::little,
              "GGUF tensors are used where they lie in the file, which is little endian");

/// The type of a metadata value; the numbers are those of the file.
enum class GgufType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

/// The word for a metadata type, for messages.
constexpr std::string_view to_string(GgufType type) {
  switch (type) {
    case GgufType::kUint8: return "uint8";
    case GgufType::kInt8: return "int8";
    case GgufType::kUint16: return "uint16";
    case GgufType::kInt16: return "int16";
    case GgufType::kUint32: return "uint32";
    case GgufType::kInt32: return "int32";
    case GgufType::kFloat32: return "float32";
    case GgufType::kBool: return "bool";
    case GgufType::kString: return "string";
    case GgufType::kArray: return "array";
    case GgufType::kUint64: return "uint64";
    case GgufType::kInt64: return "int64";
    case GgufType::kFloat64: return "float64";
  }
  return "unknown";
}

/// The number by which GGUF files name an element type.
constexpr std::uint32_t ggml_type_number(ElementType type) {
  switch (type) {
    case ElementType::kF32: return 0;
    case ElementType::kF16: return 1;
    case ElementType::kQ4_0: return 2;
    case ElementType::kQ4_1: return 3;
    case ElementType::kQ8_0: return 8;
    case ElementType::kQ4_K: return 12;
    case ElementType::kQ6_K: return 14;
    case ElementType::kBF16: return 30;
  }
  return 0;
}

/// The element type for a number in a file, or nothing where the library does not implement it.
constexpr std::optional<ElementType> element_type_from_ggml(std::uint32_t number) {
  switch (number) {
    case 0: return ElementType::kF32;
    case 1: return ElementType::kF16;
    case 2: return ElementType::kQ4_0;
    case 3: return ElementType::kQ4_1;
    case 8: return ElementType::kQ8_0;
    case 12: return ElementType::kQ4_K;
    case 14: return ElementType::kQ6_K;
    case 30: return ElementType::kBF16;
    default: return std::nullopt;
  }
}

/// A tensor of a GGUF file. The file lists extents innermost first; `shape` is outermost first.
using GgufTensor = FileTensor;

namespace detail {

inline constexpr std::uint32_t kGgufMagic = 0x46554747;  // "GGUF"
inline constexpr std::uint64_t kGgufDefaultAlignment = 32;
inline constexpr std::uint32_t kGgufMaxDims = 4;
// Far more than any file uses; keeps the recursion over nested arrays flat.
inline constexpr int kGgufMaxArrayNesting = 4;

// Bytes of a value of this type, or 0 where it varies.
constexpr std::size_t gguf_fixed_size(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool: return 1;
    case GgufType::kUint16:
    case GgufType::kInt16: return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32: return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64: return 8;
    case GgufType::kString:
    case GgufType::kArray: return 0;
  }
  return 0;
}

// The least bytes that a value of this type takes: a string its length, an array type and length.
constexpr std::size_t gguf_least_size(GgufType type) {
  if (type == GgufType::kString) return 8;
  if (type == GgufType::kArray) return 12;
  return gguf_fixed_size(type);
}

inline constexpr std::size_t kGgufLeastEntry = 8 + 4 + 1;  // key length, type, a byte
inline constexpr std::size_t kGgufLeastTensor =
    8 + 4 + 8 + 4 + 8;  // name, rank, extent, type, offset

template <class T>
T load_as(const std::byte* address) {  // the file aligns nothing but tensors
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

inline std::string_view as_text(const std::byte* address, std::uint64_t length) {
  return {reinterpret_cast<const char*>(address), static_cast<std::size_t>(length)};
}

// The name of a number in a file that stands for a type not implemented here; may be empty.
constexpr std::string_view ggml_type_name(std::uint32_t number) {
  constexpr std::string_view kNames[] = {
      "F32",     "F16",    "Q4_0",    "Q4_1",  "",       "",      "Q5_0",  "Q5_1",
      "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
      "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
      "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16"};
  return number < std::size(kNames) ? kNames[number] : std::string_view{};
}

/// A position in the file that never passes its end. `subject` is what is being read ("key 'a'"),
/// for errors; text is only put together when one is thrown.
class GgufCursor {
 public:
  GgufCursor(std::span<const std::byte> bytes, std::string_view file)
      : bytes_(bytes), file_(file) {}

  std::size_t position() const noexcept { return position_; }
  std::size_t remaining() const noexcept { return bytes_.size() - position_; }
  const std::byte* address() const noexcept { return bytes_.data() + position_; }

  /// From here on, errors are about this: something with a name, with a number, or the file.
  void set_subject(std::string_view kind, std::string_view name) {
    subject_kind_ = kind;
    subject_name_ = name;
    subject_number_.reset();
  }
  void set_subject(std::string_view kind, std::uint64_t number) {
    subject_kind_ = kind;
    subject_number_ = number;
  }
  void clear_subject() { subject_kind_ = {}; }

  template <class T>
  T read(std::string_view field) {
    need(sizeof(T), field);
    const T value = load_as<T>(address());
    position_ += sizeof(T);
    return value;
  }

  std::string_view read_string(std::string_view field) {
    const std::size_t start = position_;
    const auto length = read<std::uint64_t>(field);
    if (length > remaining())
      fail(ErrorCode::kFormat, "GGUF string does not fit into the file", field, start,
           "a length of at most " + std::to_string(remaining()), std::to_string(length));
    const std::string_view text = as_text(address(), length);
    position_ += static_cast<std::size_t>(length);
    return text;
  }

  /// Passes over bytes; the caller has checked that they fit.
  void skip(std::size_t bytes) noexcept { position_ += bytes; }

  void need(std::size_t bytes, std::string_view field) const {
    if (bytes > remaining())
      fail(ErrorCode::kFormat, "GGUF file ends too early", field, position_,
           std::to_string(bytes) + " bytes", std::to_string(remaining()));
  }

  [[noreturn]] void fail(ErrorCode code, std::string what, std::string_view field, std::size_t at,
                         std::string expected, std::string found) const {
    std::string name(field);
    if (!subject_kind_.empty()) {
      name += " of ";
      name += subject_kind_;
      name +=
          " " + (subject_number_ ? std::to_string(*subject_number_) : quote_text(subject_name_));
    }
    throw Error(code, {std::move(what), std::string(file_), at_byte(name, at), std::move(expected),
                       std::move(found)});
  }

 private:
  std::span<const std::byte> bytes_;  // the whole file
  std::string_view file_;
  std::string_view subject_kind_;
  std::string_view subject_name_;
  std::optional<std::uint64_t> subject_number_;  // while the name is not known yet
  std::size_t position_ = 0;
};

}  // namespace detail

/// One GGUF file: metadata and tensors. Reads the header once, at construction; tensors and strings
/// stay in the map. Const afterwards: any number of threads may read. Movable, not copyable; moving
/// keeps all addresses. Source: the GGUF specification of the ggml project (docs/gguf.md), versions
/// 2 and 3. Deviations: big-endian files and version 1 are refused; arrays nest at most 4 deep;
/// files of a split model open one by one.
class GgufFile {
 public:
  /// Maps and parses a file. Allocates in proportion to the number of keys and tensors.
  /// \throws Error(kIo) as MappedFile does; Error(kFormat) for damaged content; Error(kUnsupported)
  /// for versions, byte orders and tensor types that are not implemented. Each names the file, the
  /// field with its byte offset, what was expected and what was found.
  explicit GgufFile(std::string path) : map_(std::in_place, std::move(path)) {
    name_ = map_->path();
    bytes_ = map_->bytes();
    parse();
  }

  /// Parses a file that is in memory already; `name` stands for it in errors. The caller keeps the
  /// bytes alive, and starts them at a multiple of 8 bytes if tensors are to be read in place.
  /// \throws Error as the constructor does, without kIo.
  static GgufFile from_bytes(std::span<const std::byte> bytes, std::string name) {
    return GgufFile(bytes, std::move(name));
  }

  /// The path, or the name given to from_bytes.
  const std::string& path() const noexcept { return name_; }

  /// The whole file.
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

  /// 2 or 3.
  std::uint32_t version() const noexcept { return version_; }

  /// What tensor offsets are a multiple of, in bytes: a power of two, at least 8.
  std::size_t alignment() const noexcept { return alignment_; }

  /// All tensors, in the order of the header.
  std::span<const GgufTensor> tensors() const noexcept { return tensors_; }

  /// The tensor of this name, or nullptr. Logarithmic in the number of tensors.
  const GgufTensor* find_tensor(std::string_view name) const {
    const std::size_t index = tensor_index_.find(tensors_, tensor_name, name);
    return index == detail::NameIndex::kNone ? nullptr : &tensors_[index];
  }

  /// The tensor of this name. \throws Error(kFormat) naming the file and the tensor.
  const GgufTensor& tensor(std::string_view name) const {
    const GgufTensor* const found = find_tensor(name);
    if (found != nullptr) return *found;
    std::string count = "none among " + std::to_string(tensors_.size());
    if (const Entry* split = find("split.count"); split != nullptr && is_integer(split->type))
      count += " (the file is one part of a split model)";
    throw Error(ErrorCode::kFormat,
                {"GGUF file lacks a tensor", name_, "tensor " + detail::quote_text(name),
                 "a tensor of this name", std::move(count)});
  }

  /// All metadata keys, in the order of the file; views into the file.
  std::vector<std::string_view> keys() const {
    std::vector<std::string_view> result;
    result.reserve(entries_.size());
    for (const Entry& entry : entries_) result.push_back(entry.key);
    return result;
  }

  /// Whether the metadata has this key.
  bool has(std::string_view key) const { return find(key) != nullptr; }

  /// \name Metadata by type
  /// Each throws Error(kFormat) naming file, key, expected and found type when the key is missing
  /// or of another type. The `_or` forms give the fallback when the key is missing; another type is
  /// still an error. Strings are views into the file.
  /// @{

  /// The type of a value; kArray for arrays.
  GgufType value_type(std::string_view key) const { return at(key, "any value").type; }

  /// Any integer type, the value not negative.
  std::uint64_t get_uint(std::string_view key) const {
    constexpr std::string_view kExpected = "an integer of at least 0";
    return integer<std::uint64_t>(at(key, kExpected), kExpected);
  }
  std::uint64_t get_uint_or(std::string_view key, std::uint64_t fallback) const {
    return has(key) ? get_uint(key) : fallback;
  }

  /// Any integer type, the value within int64.
  std::int64_t get_int(std::string_view key) const {
    constexpr std::string_view kExpected = "an integer within int64";
    return integer<std::int64_t>(at(key, kExpected), kExpected);
  }
  std::int64_t get_int_or(std::string_view key, std::int64_t fallback) const {
    return has(key) ? get_int(key) : fallback;
  }

  /// float32 or float64; integers are not taken.
  double get_float(std::string_view key) const {
    constexpr std::string_view kExpected = "float32 or float64";
    const Entry& entry = at(key, kExpected);
    if (!is_float(entry.type)) mismatch(entry, kExpected);
    return load_float(entry.type, entry.value);
  }
  double get_float_or(std::string_view key, double fallback) const {
    return has(key) ? get_float(key) : fallback;
  }

  bool get_bool(std::string_view key) const {
    const Entry& entry = at(key, "bool");
    if (entry.type != GgufType::kBool) mismatch(entry, "bool");
    return detail::load_as<std::uint8_t>(entry.value) != 0;
  }
  bool get_bool_or(std::string_view key, bool fallback) const {
    return has(key) ? get_bool(key) : fallback;
  }

  std::string_view get_string(std::string_view key) const {
    const Entry& entry = at(key, "string");
    if (entry.type != GgufType::kString) mismatch(entry, "string");
    return detail::as_text(entry.value, entry.count);
  }
  std::string_view get_string_or(std::string_view key, std::string_view fallback) const {
    return has(key) ? get_string(key) : fallback;
  }

  /// The number of elements of an array of any kind.
  std::size_t array_size(std::string_view key) const {
    const Entry& entry = at(key, "array");
    if (entry.type != GgufType::kArray) mismatch(entry, "array");
    return static_cast<std::size_t>(entry.count);
  }

  /// An array of strings: views into the file. Allocates the vector.
  std::vector<std::string_view> get_strings(std::string_view key) const {
    const Entry& entry =
        array(key, "array of string", [](GgufType type) { return type == GgufType::kString; });
    std::vector<std::string_view> result;
    result.reserve(static_cast<std::size_t>(entry.count));
    const std::byte* address = entry.value;
    for (std::uint64_t i = 0; i < entry.count; ++i) {
      const auto length = detail::load_as<std::uint64_t>(address);  // checked when parsed
      result.push_back(detail::as_text(address + sizeof(length), length));
      address += sizeof(length) + length;
    }
    return result;
  }

  /// An array of any integer type, every value within int64. Allocates the vector.
  std::vector<std::int64_t> get_ints(std::string_view key) const {
    constexpr std::string_view kExpected = "array of integers within int64";
    const Entry& entry = array(key, kExpected, is_integer);
    std::vector<std::int64_t> result;
    result.reserve(static_cast<std::size_t>(entry.count));
    for_each_element(entry, [&](const std::byte* address) {
      const auto value = load_integer<std::int64_t>(entry.element, address);
      if (!value) mismatch(entry, kExpected);
      result.push_back(*value);
    });
    return result;
  }

  /// An array of float32 or float64. Allocates the vector.
  std::vector<double> get_floats(std::string_view key) const {
    const Entry& entry = array(key, "array of float32 or float64", is_float);
    std::vector<double> result;
    result.reserve(static_cast<std::size_t>(entry.count));
    for_each_element(entry, [&](const std::byte* address) {
      result.push_back(load_float(entry.element, address));
    });
    return result;
  }

  /// An array of bool. Allocates the vector.
  std::vector<bool> get_bools(std::string_view key) const {
    const Entry& entry =
        array(key, "array of bool", [](GgufType type) { return type == GgufType::kBool; });
    std::vector<bool> result;
    result.reserve(static_cast<std::size_t>(entry.count));
    for_each_element(entry, [&](const std::byte* address) {
      result.push_back(detail::load_as<std::uint8_t>(address) != 0);
    });
    return result;
  }
  /// @}

 private:
  struct Entry {
    std::string_view key;
    GgufType type = GgufType::kUint8;
    GgufType element = GgufType::kUint8;  // of an array
    std::uint64_t count = 0;              // elements of an array, bytes of a string
    const std::byte* value = nullptr;     // the scalar, the first character, the first element
    std::size_t offset = 0;               // of the value, from the start of the file
  };

  static constexpr auto entry_key = [](const Entry& entry) -> std::string_view {
    return entry.key;
  };
  static constexpr auto tensor_name = [](const GgufTensor& tensor) -> std::string_view {
    return tensor.name;
  };

  GgufFile(std::span<const std::byte> bytes, std::string name)
      : name_(std::move(name)), bytes_(bytes) {
    parse();
  }

  static constexpr bool is_integer(GgufType type) {
    switch (type) {
      case GgufType::kUint8:
      case GgufType::kInt8:
      case GgufType::kUint16:
      case GgufType::kInt16:
      case GgufType::kUint32:
      case GgufType::kInt32:
      case GgufType::kUint64:
      case GgufType::kInt64: return true;
      default: return false;
    }
  }
  static constexpr bool is_float(GgufType type) {
    return type == GgufType::kFloat32 || type == GgufType::kFloat64;
  }
  static double load_float(GgufType type, const std::byte* address) {
    if (type == GgufType::kFloat64) return detail::load_as<double>(address);
    return static_cast<double>(detail::load_as<float>(address));
  }

  // Calls function(value) with the integer in its own type.
  template <class Function>
  static auto visit_integer(GgufType type, const std::byte* address, Function function) {
    switch (type) {
      case GgufType::kUint8: return function(detail::load_as<std::uint8_t>(address));
      case GgufType::kInt8: return function(detail::load_as<std::int8_t>(address));
      case GgufType::kUint16: return function(detail::load_as<std::uint16_t>(address));
      case GgufType::kInt16: return function(detail::load_as<std::int16_t>(address));
      case GgufType::kUint32: return function(detail::load_as<std::uint32_t>(address));
      case GgufType::kInt32: return function(detail::load_as<std::int32_t>(address));
      case GgufType::kUint64: return function(detail::load_as<std::uint64_t>(address));
      default: return function(detail::load_as<std::int64_t>(address));
    }
  }
  template <class Result>
  static std::optional<Result> load_integer(GgufType type, const std::byte* address) {
    return visit_integer(type, address, [](auto value) -> std::optional<Result> {
      if (!std::in_range<Result>(value)) return std::nullopt;
      return static_cast<Result>(value);
    });
  }
  template <class Result>
  Result integer(const Entry& entry, std::string_view expected) const {
    if (!is_integer(entry.type)) mismatch(entry, expected);
    const auto value = load_integer<Result>(entry.type, entry.value);
    if (!value) mismatch(entry, expected);
    return *value;
  }

  template <class Function>
  static void for_each_element(const Entry& entry, Function function) {
    const std::size_t size = detail::gguf_fixed_size(entry.element);
    for (std::size_t i = 0; i < entry.count; ++i) function(entry.value + i * size);
  }

  const Entry* find(std::string_view key) const {
    const std::size_t index = entry_index_.find(entries_, entry_key, key);
    return index == detail::NameIndex::kNone ? nullptr : &entries_[index];
  }
  const Entry& at(std::string_view key, std::string_view expected) const {
    const Entry* const entry = find(key);
    if (entry == nullptr)
      throw Error(ErrorCode::kFormat,
                  {"GGUF file lacks a metadata key", name_, detail::quote_text(key),
                   std::string(expected), "no such key"});
    return *entry;
  }
  template <class Accepts>
  const Entry& array(std::string_view key, std::string_view expected, Accepts accepts) const {
    const Entry& entry = at(key, expected);
    if (entry.type != GgufType::kArray || !accepts(entry.element)) mismatch(entry, expected);
    return entry;
  }

  [[noreturn]] void mismatch(const Entry& entry, std::string_view expected) const {
    std::string found;
    if (entry.type == GgufType::kArray) {
      found = "array of " + std::to_string(entry.count) + " ";
      found += to_string(entry.element);
    } else {
      found = to_string(entry.type);
    }
    if (is_integer(entry.type))
      found += " " + visit_integer(entry.type, entry.value,
                                   [](auto value) { return std::to_string(value); });
    throw Error(ErrorCode::kFormat, {"GGUF metadata has the wrong type or value", name_,
                                     detail::at_byte(detail::quote_text(entry.key), entry.offset),
                                     std::string(expected), std::move(found)});
  }

  void parse() {
    detail::GgufCursor cursor(bytes_, name_);
    const auto magic = cursor.read<std::uint32_t>("magic");
    if (magic != detail::kGgufMagic)
      cursor.fail(ErrorCode::kFormat, "not a GGUF file", "magic", 0, "'GGUF'",
                  detail::quote_text(detail::as_text(bytes_.data(), sizeof(magic))));
    version_ = cursor.read<std::uint32_t>("version");
    if (version_ != 2 && version_ != 3)
      cursor.fail(ErrorCode::kUnsupported,
                  (version_ & 0xffffU) == 0 && version_ != 0 ? "GGUF file is big endian"
                                                             : "GGUF version is not implemented",
                  "version", sizeof(magic), "2 or 3, little endian", std::to_string(version_));
    const std::uint64_t tensor_count = read_count(cursor, "tensor count", detail::kGgufLeastTensor);
    const std::uint64_t entry_count = read_count(cursor, "metadata count", detail::kGgufLeastEntry);
    parse_metadata(cursor, entry_count);
    parse_tensors(cursor, tensor_count);
  }

  // A count of things that each take at least `least` of the bytes that follow.
  static std::uint64_t read_count(detail::GgufCursor& cursor, std::string_view field,
                                  std::size_t least) {
    const std::size_t start = cursor.position();
    const auto count = cursor.read<std::uint64_t>(field);
    const std::uint64_t most = cursor.remaining() / least;
    if (count > most)
      cursor.fail(ErrorCode::kFormat, "GGUF file is too short for what it says it holds", field,
                  start, "at most " + std::to_string(most), std::to_string(count));
    return count;
  }

  void parse_metadata(detail::GgufCursor& cursor, std::uint64_t count) {
    entries_.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t i = 0; i < count; ++i) {
      Entry entry;
      cursor.set_subject("metadata entry", i);
      entry.key = cursor.read_string("key");
      cursor.set_subject("metadata", entry.key);
      entry.type = read_type(cursor, "value type");
      entry.offset = cursor.position();
      if (entry.type == GgufType::kString) {
        const std::string_view text = cursor.read_string("value");
        entry.count = text.size();
        entry.value = cursor.address() - text.size();
      } else if (entry.type == GgufType::kArray) {
        entry.element = read_type(cursor, "array element type");
        entry.count = read_count(cursor, "array length", detail::gguf_least_size(entry.element));
        entry.value = cursor.address();
        skip_elements(cursor, entry.element, entry.count, 1);
      } else {
        entry.value = cursor.address();
        skip_scalars(cursor, entry.type, 1);
      }
      entries_.push_back(entry);
    }
    entry_index_ = detail::NameIndex(entries_, entry_key);
    const std::size_t twice = entry_index_.duplicate(entries_, entry_key);
    if (twice != detail::NameIndex::kNone)
      throw Error(ErrorCode::kFormat,
                  {"GGUF metadata key occurs twice", name_,
                   detail::at_byte("key " + detail::quote_text(entries_[twice].key),
                                   entries_[twice].offset),
                   "one occurrence", "two"});

    cursor.clear_subject();
    const std::uint64_t alignment = get_uint_or("general.alignment", detail::kGgufDefaultAlignment);
    if (!std::has_single_bit(alignment) || alignment < 8 || alignment > kMaxAlignment)
      cursor.fail(ErrorCode::kFormat, "GGUF alignment makes no sense", "general.alignment",
                  find("general.alignment")->offset,
                  "a power of two from 8 to " + std::to_string(kMaxAlignment),
                  std::to_string(alignment));
    alignment_ = static_cast<std::size_t>(alignment);
  }

  static GgufType read_type(detail::GgufCursor& cursor, std::string_view field) {
    const std::size_t start = cursor.position();
    const auto number = cursor.read<std::uint32_t>(field);
    if (number > static_cast<std::uint32_t>(GgufType::kFloat64))
      cursor.fail(ErrorCode::kFormat, "GGUF metadata type is unknown", field, start, "0 to 12",
                  std::to_string(number));
    return static_cast<GgufType>(number);
  }

  // Passes over values of a fixed size.
  static void skip_scalars(detail::GgufCursor& cursor, GgufType type, std::uint64_t count) {
    // The count of an array was bounded by the bytes that are left, so the product fits.
    const std::size_t size = detail::gguf_fixed_size(type) * static_cast<std::size_t>(count);
    cursor.need(size, "value");
    if (type == GgufType::kBool) {
      for (std::size_t i = 0; i < size; ++i) {
        const auto value = detail::load_as<std::uint8_t>(cursor.address() + i);
        if (value > 1)
          cursor.fail(ErrorCode::kFormat, "GGUF bool is neither 0 nor 1", "value",
                      cursor.position() + i, "0 or 1", std::to_string(value));
      }
    }
    cursor.skip(size);
  }

  // Checks and passes over the elements of an array, `count` bounded by read_count.
  static void skip_elements(detail::GgufCursor& cursor, GgufType element, std::uint64_t count,
                            int depth) {
    if (element == GgufType::kString) {
      for (std::uint64_t i = 0; i < count; ++i) cursor.read_string("string in array");
    } else if (element == GgufType::kArray) {
      if (depth >= detail::kGgufMaxArrayNesting)
        cursor.fail(ErrorCode::kUnsupported, "GGUF arrays are nested too deeply", "array",
                    cursor.position(),
                    "at most " + std::to_string(detail::kGgufMaxArrayNesting) + " levels", "more");
      for (std::uint64_t i = 0; i < count; ++i) {
        const GgufType inner = read_type(cursor, "nested array element type");
        const std::uint64_t inner_count =
            read_count(cursor, "nested array length", detail::gguf_least_size(inner));
        skip_elements(cursor, inner, inner_count, depth + 1);
      }
    } else {
      skip_scalars(cursor, element, count);
    }
  }

  void parse_tensors(detail::GgufCursor& cursor, std::uint64_t count) {
    struct Place {
      std::uint64_t offset;  // from the start of the data section
      std::size_t field;     // where the header says so
    };
    std::vector<Place> places;  // [tensors]
    places.reserve(static_cast<std::size_t>(count));
    tensors_.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t i = 0; i < count; ++i) {
      cursor.set_subject("tensor", i);
      const std::string_view name = cursor.read_string("name");
      cursor.set_subject("tensor", name);
      tensors_.push_back(parse_tensor_shape(cursor, name));
      const std::size_t field = cursor.position();
      places.push_back({cursor.read<std::uint64_t>("offset"), field});
    }
    tensor_index_ = detail::NameIndex(tensors_, tensor_name);
    const std::size_t twice = tensor_index_.duplicate(tensors_, tensor_name);
    if (twice != detail::NameIndex::kNone)
      throw Error(ErrorCode::kFormat,
                  {"GGUF tensor name occurs twice", name_,
                   detail::at_byte("tensor " + detail::quote_text(tensors_[twice].name),
                                   places[twice].field),
                   "one occurrence", "two"});
    if (tensors_.empty()) return;

    // The data section starts at the next multiple of the alignment.
    const std::size_t padding = (alignment_ - cursor.position() % alignment_) % alignment_;
    cursor.clear_subject();
    cursor.need(padding, "tensor data");
    cursor.skip(padding);
    const std::uint64_t section = cursor.remaining();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      GgufTensor& tensor = tensors_[i];
      const Place place = places[i];
      cursor.set_subject("tensor", tensor.name);
      if (place.offset % alignment_ != 0)
        cursor.fail(ErrorCode::kFormat, "GGUF tensor is not aligned", "offset", place.field,
                    "a multiple of " + std::to_string(alignment_), std::to_string(place.offset));
      if (tensor.bytes > section || place.offset > section - tensor.bytes)
        cursor.fail(ErrorCode::kFormat, "GGUF tensor lies outside the file", "offset", place.field,
                    std::to_string(tensor.bytes) + " bytes within a data section of " +
                        std::to_string(section),
                    "offset " + std::to_string(place.offset));
      tensor.data = cursor.address() + place.offset;
    }

    std::vector<std::size_t> order(tensors_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return places[a].offset < places[b].offset; });
    for (std::size_t rank = 1; rank < order.size(); ++rank) {
      const std::size_t before = order[rank - 1];
      const std::size_t after = order[rank];
      const std::uint64_t end = places[before].offset + tensors_[before].bytes;
      if (places[after].offset >= end) continue;
      cursor.set_subject("tensor", tensors_[after].name);
      cursor.fail(ErrorCode::kFormat, "GGUF tensors overlap", "offset", places[after].field,
                  "at least " + std::to_string(end) + ", the end of " +
                      detail::quote_text(tensors_[before].name),
                  std::to_string(places[after].offset));
    }
  }

  // Name, shape, type and size; leaves the cursor at the offset.
  static GgufTensor parse_tensor_shape(detail::GgufCursor& cursor, std::string_view name) {
    GgufTensor tensor;
    tensor.name = name;
    std::size_t field = cursor.position();
    const auto num_dims = cursor.read<std::uint32_t>("dimension count");
    if (num_dims < 1 || num_dims > detail::kGgufMaxDims)
      cursor.fail(ErrorCode::kFormat, "GGUF tensor has an impossible number of dimensions",
                  "dimension count", field, "1 to " + std::to_string(detail::kGgufMaxDims),
                  std::to_string(num_dims));
    tensor.shape.resize(num_dims);
    constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    std::uint64_t values = 1;
    const std::size_t first_extent_field = cursor.position();
    for (std::uint32_t axis = 0; axis < num_dims; ++axis) {
      field = cursor.position();
      const auto extent = cursor.read<std::uint64_t>("extent");
      if (extent < 1 || extent > kMost / values)
        cursor.fail(ErrorCode::kFormat, "GGUF tensor has an impossible extent", "extent", field,
                    "1 to " + std::to_string(kMost / values), std::to_string(extent));
      values *= extent;
      tensor.shape[num_dims - 1 - axis] = static_cast<std::int64_t>(extent);
    }
    field = cursor.position();
    const auto number = cursor.read<std::uint32_t>("element type");
    const auto type = element_type_from_ggml(number);
    if (!type) {
      const std::string_view known = detail::ggml_type_name(number);
      cursor.fail(ErrorCode::kUnsupported, "GGUF tensor type is not implemented", "element type",
                  field, "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K",
                  "type " + std::to_string(number) +
                      (known.empty() ? std::string() : " (" + std::string(known) + ")"));
    }
    tensor.type = *type;
    const BlockShape block = block_shape(*type);
    const auto block_values = static_cast<std::uint64_t>(block.values);
    const auto row = static_cast<std::uint64_t>(tensor.shape.back());
    if (row % block_values != 0)
      cursor.fail(ErrorCode::kFormat, "GGUF tensor has rows of broken blocks", "extent",
                  first_extent_field,
                  "a multiple of " + std::to_string(block_values) + ", the block size of " +
                      std::string(to_string(*type)),
                  std::to_string(row));
    const std::uint64_t blocks = values / block_values;
    const std::uint64_t most_blocks = cursor.remaining() / static_cast<std::uint64_t>(block.bytes);
    if (blocks > most_blocks)
      cursor.fail(ErrorCode::kFormat, "GGUF tensor is larger than the file", "extent",
                  first_extent_field,
                  "at most " + std::to_string(most_blocks * block_values) + " values in all",
                  std::to_string(values));
    tensor.bytes = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(block.bytes);
    return tensor;
  }

  // Beyond any page or device; keeps offsets and padding far from overflow.
  static constexpr std::uint64_t kMaxAlignment = std::uint64_t{1} << 30;

  std::optional<MappedFile> map_;     // none when the bytes are the caller's
  std::string name_;                  // for errors
  std::span<const std::byte> bytes_;  // the whole file
  std::uint32_t version_ = 0;
  std::size_t alignment_ = 0;
  std::vector<Entry> entries_;
  std::vector<GgufTensor> tensors_;
  detail::NameIndex entry_index_;
  detail::NameIndex tensor_index_;
};

}  // namespace sluice
