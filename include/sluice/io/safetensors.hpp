// SPDX-License-Identifier: MIT
/// safetensors model files, single and sharded, read in place from a memory map. The content is
/// untrusted: lengths, shapes and offsets are checked before use, shard names stay in their folder.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
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
#include "sluice/io/detail/write_file.hpp"
#include "sluice/io/file_tensor.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/mapped_file.hpp"

namespace sluice {

static_assert(std::endian::native == std::endian::little,
              "safetensors are used where they lie in the file, which is little endian");

/// A tensor of a safetensors file. Extents may be 0, and a scalar has none. The format does not
/// align `data`.
using SafetensorsTensor = FileTensor;

/// A tensor that is in the file, of a dtype that the library does not read.
struct SafetensorsUnsupported {
  std::string name;
  std::string dtype;                ///< as the file spells it, for example I64
  std::vector<std::int64_t> shape;  ///< outermost axis first
};

namespace detail {

inline constexpr std::size_t kSafetensorsLengthBytes = 8;
inline constexpr std::uint64_t kSafetensorsMaxHeader = 100'000'000;  // the reference's limit

constexpr std::optional<ElementType> element_type_from_dtype(std::string_view dtype) {
  if (dtype == "F32") return ElementType::kF32;
  if (dtype == "F16") return ElementType::kF16;
  if (dtype == "BF16") return ElementType::kBF16;
  return std::nullopt;
}

// Bits of an element, or 0 for a dtype that this list does not know.
constexpr std::uint64_t dtype_bits(std::string_view dtype) {
  constexpr std::pair<std::string_view, std::uint64_t> kBits[] = {
      {"F4", 4},          {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8}, {"U8", 8},   {"I8", 8},
      {"F8_E5M2", 8},     {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16},
      {"F8_E4M3FNUZ", 8}, {"BF16", 16},   {"I32", 32},    {"U32", 32}, {"F32", 32}, {"I64", 64},
      {"F8_E5M2FNUZ", 8}, {"U64", 64},    {"F64", 64},    {"C64", 64}};
  for (const auto& [name, bits] : kBits) {
    if (name == dtype) return bits;
  }
  return 0;
}

/// The tensors of one file or of all shards, by name.
class SafetensorsTable {
 public:
  void add(FileTensor tensor) { tensors_.push_back(std::move(tensor)); }
  void add(SafetensorsUnsupported tensor) { unsupported_.push_back(std::move(tensor)); }
  void index() {
    tensor_index_ = NameIndex(tensors_, tensor_name);
    unsupported_index_ = NameIndex(unsupported_, unsupported_name);
  }

  std::span<const FileTensor> tensors() const noexcept { return tensors_; }
  std::span<const SafetensorsUnsupported> unsupported() const noexcept { return unsupported_; }

  bool contains(std::string_view name) const {
    return tensor_index_.find(tensors_, tensor_name, name) != NameIndex::kNone ||
           find_unsupported(name) != nullptr;
  }
  const FileTensor* find(std::string_view name, const std::string& where) const {
    const std::size_t found = tensor_index_.find(tensors_, tensor_name, name);
    if (found != NameIndex::kNone) return &tensors_[found];
    if (const SafetensorsUnsupported* other = find_unsupported(name))
      throw Error(ErrorCode::kUnsupported, {"safetensors dtype is not implemented", where,
                                            "dtype of tensor " + quote_text(name),
                                            "F32, F16 or BF16", quote_text(other->dtype)});
    return nullptr;
  }
  const FileTensor& get(std::string_view name, const std::string& where) const {
    const FileTensor* const found = find(name, where);
    if (found == nullptr)
      throw Error(ErrorCode::kFormat,
                  {"safetensors model lacks a tensor", where, "tensor " + quote_text(name),
                   "a tensor of this name",
                   "none among " + std::to_string(tensors_.size() + unsupported_.size())});
    return *found;
  }

 private:
  static constexpr auto tensor_name = [](const FileTensor& tensor) -> std::string_view {
    return tensor.name;
  };
  static constexpr auto unsupported_name =
      [](const SafetensorsUnsupported& tensor) -> std::string_view {
    return tensor.name;
  };

  const SafetensorsUnsupported* find_unsupported(std::string_view name) const {
    const std::size_t found = unsupported_index_.find(unsupported_, unsupported_name, name);
    return found == NameIndex::kNone ? nullptr : &unsupported_[found];
  }

  std::vector<FileTensor> tensors_;
  std::vector<SafetensorsUnsupported> unsupported_;
  NameIndex tensor_index_;
  NameIndex unsupported_index_;
};

}  // namespace detail

/// One safetensors file. Reads the header once, at construction; tensors stay in the map. Const
/// afterwards: any number of threads may read. Movable, not copyable; moving keeps all addresses.
/// Source: the format's description in the safetensors project (README.md, "Format"), including its
/// rules that names are unique and that the tensors tile the buffer without gap or overlap.
class SafetensorsFile {
 public:
  /// Maps and parses a file. Allocates in proportion to the header.
  /// \throws Error(kIo) as MappedFile does; Error(kFormat) naming file, field, expected and found.
  /// A tensor of a dtype that is not read is no error until it is asked for.
  explicit SafetensorsFile(std::string path) : map_(std::in_place, std::move(path)) {
    name_ = map_->path();
    bytes_ = map_->bytes();
    parse();
  }

  /// Parses a file that is in memory already; `name` stands for it in errors. The caller keeps the
  /// bytes alive. \throws Error(kFormat) as the constructor does.
  static SafetensorsFile from_bytes(std::span<const std::byte> bytes, std::string name) {
    return SafetensorsFile(bytes, std::move(name));
  }

  /// The path, or the name given to from_bytes.
  const std::string& path() const noexcept { return name_; }

  /// The whole file.
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

  /// The tensors that can be read (F32, F16, BF16), in the order of their data.
  std::span<const SafetensorsTensor> tensors() const noexcept { return table_.tensors(); }

  /// The others.
  std::span<const SafetensorsUnsupported> unsupported() const noexcept {
    return table_.unsupported();
  }

  /// The tensor of this name, or nullptr. \throws Error(kUnsupported) naming its dtype if it is one
  /// that is not read.
  const SafetensorsTensor* find_tensor(std::string_view name) const {
    return table_.find(name, name_);
  }

  /// The tensor of this name. \throws Error(kFormat) if there is none, Error(kUnsupported) as
  /// find_tensor does.
  const SafetensorsTensor& tensor(std::string_view name) const { return table_.get(name, name_); }

  /// Whether the file has a tensor of this name, of any dtype.
  bool contains(std::string_view name) const { return table_.contains(name); }

  /// The `__metadata__` strings.
  const std::map<std::string, std::string, std::less<>>& metadata() const noexcept {
    return metadata_;
  }

 private:
  // A tensor with what the header says of its place.
  struct Place {
    FileTensor tensor;  // type and data are set last
    std::string dtype;
    std::uint64_t begin = 0;  // from the start of the buffer
    std::uint64_t end = 0;
  };

  SafetensorsFile(std::span<const std::byte> bytes, std::string name)
      : name_(std::move(name)), bytes_(bytes) {
    parse();
  }

  [[noreturn]] void fail(std::string what, std::string field, std::string expected,
                         std::string found) const {
    throw Error(ErrorCode::kFormat,
                {std::move(what), name_, std::move(field), std::move(expected), std::move(found)});
  }

  void parse() {
    const std::string length_field = detail::at_byte("header length", 0);
    if (bytes_.size() < detail::kSafetensorsLengthBytes)
      fail("safetensors file ends too early", length_field, "8 bytes",
           std::to_string(bytes_.size()));
    std::uint64_t length = 0;
    std::memcpy(&length, bytes_.data(), sizeof(length));
    const std::uint64_t most = std::min<std::uint64_t>(
        bytes_.size() - detail::kSafetensorsLengthBytes, detail::kSafetensorsMaxHeader);
    if (length < 2 || length > most)
      fail("safetensors header does not fit into the file", length_field,
           "2 to " + std::to_string(most), std::to_string(length));
    const std::string_view text{
        reinterpret_cast<const char*>(bytes_.data()) + detail::kSafetensorsLengthBytes,
        static_cast<std::size_t>(length)};
    if (text.front() != '{')
      fail("safetensors header is no JSON object",
           detail::at_byte("header", detail::kSafetensorsLengthBytes), "'{'",
           detail::quote_text(text.substr(0, 1)));
    const Json header =
        parse_json(text, name_, DuplicateKeys::kReject, detail::kSafetensorsLengthBytes);
    const std::span<const std::byte> buffer =
        bytes_.subspan(detail::kSafetensorsLengthBytes + text.size());

    std::vector<Place> places;  // [tensors]
    places.reserve(header.size());
    for (const auto& [name, value] : header.get_ref<const Json::object_t&>()) {
      if (name == "__metadata__") {
        parse_metadata(value);
      } else {
        places.push_back(parse_place(name, value, buffer.size()));
      }
    }
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
      if (a.begin != b.begin) return a.begin < b.begin;
      if (a.end != b.end) return a.end < b.end;
      return a.tensor.name < b.tensor.name;
    });
    std::uint64_t end = 0;
    for (Place& place : places) {
      if (place.begin != end)
        fail(place.begin < end ? "safetensors tensors overlap" : "safetensors tensors leave a gap",
             "data_offsets of tensor " + detail::quote_text(place.tensor.name),
             "a beginning at " + std::to_string(end), std::to_string(place.begin));
      end = place.end;
    }
    if (end != buffer.size())
      fail("safetensors tensors do not fill the file", "data_offsets",
           "an end at " + std::to_string(buffer.size()), std::to_string(end));

    for (Place& place : places) {
      const auto type = detail::element_type_from_dtype(place.dtype);
      if (type) {
        place.tensor.type = *type;
        place.tensor.data = buffer.data() + place.begin;
        place.tensor.bytes = static_cast<std::size_t>(place.end - place.begin);
        table_.add(std::move(place.tensor));
      } else {
        table_.add(SafetensorsUnsupported{std::move(place.tensor.name), std::move(place.dtype),
                                          std::move(place.tensor.shape)});
      }
    }
    table_.index();
  }

  void parse_metadata(const Json& value) {
    if (!value.is_object())
      detail::json_mismatch("'__metadata__'", name_, "an object of strings",
                            detail::describe_json(value));
    for (const auto& [key, text] : value.get_ref<const Json::object_t&>()) {
      if (!text.is_string())
        detail::json_mismatch("'__metadata__' " + detail::quote_text(key), name_, "a string",
                              detail::describe_json(text));
      metadata_.emplace(key, text.get_ref<const std::string&>());
    }
  }

  Place parse_place(const std::string& name, const Json& value, std::uint64_t buffer_size) const {
    // Errors of the typed getters name the tensor along with the file.
    const std::string where = name_ + ", tensor " + detail::quote_text(name);
    Place place;
    place.tensor.name = name;
    place.dtype = json_string(value, "dtype", where);
    place.tensor.shape = json_ints(value, "shape", where);
    const std::vector<std::int64_t> offsets = json_ints(value, "data_offsets", where);
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] ||
        static_cast<std::uint64_t>(offsets[1]) > buffer_size)
      fail("safetensors tensor lies outside the file",
           "data_offsets of tensor " + detail::quote_text(name),
           "[begin, end] with 0 <= begin <= end <= " + std::to_string(buffer_size),
           offsets.size() == 2 ? std::to_string(offsets[0]) + ", " + std::to_string(offsets[1])
                               : std::to_string(offsets.size()) + " numbers");
    place.begin = static_cast<std::uint64_t>(offsets[0]);
    place.end = static_cast<std::uint64_t>(offsets[1]);

    constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    const std::string shape_field = "shape of tensor " + detail::quote_text(name);
    std::uint64_t values = 1;
    for (const std::int64_t extent : place.tensor.shape) {
      if (extent < 0 || (values != 0 && static_cast<std::uint64_t>(extent) > kMost / values))
        fail("safetensors tensor has an impossible extent", shape_field,
             "0 to " + std::to_string(values == 0 ? kMost : kMost / values),
             std::to_string(extent));
      values *= static_cast<std::uint64_t>(extent);
    }
    const std::uint64_t bits = detail::dtype_bits(place.dtype);
    if (bits == 0) return place;  // a dtype of the future: only its place can be checked
    const std::uint64_t bytes = place.end - place.begin;
    if (values > std::numeric_limits<std::uint64_t>::max() / bits || values * bits % 8 != 0 ||
        values * bits / 8 != bytes)
      fail("safetensors tensor does not fill its place", shape_field,
           std::to_string(bytes) + " bytes of " + place.dtype, std::to_string(values) + " values");
    return place;
  }

  std::optional<MappedFile> map_;     // none when the bytes are the caller's
  std::string name_;                  // for errors
  std::span<const std::byte> bytes_;  // the whole file
  detail::SafetensorsTable table_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

namespace detail {

/// The index of a sharded model: for each shard's file name, the tensors it must hold.
using SafetensorsShards = std::map<std::string, std::vector<std::string>, std::less<>>;

/// Parses the text of model.safetensors.index.json; `where` names it in errors.
/// \throws Error(kFormat) for damaged content or a shard that is not a plain file name.
inline SafetensorsShards parse_safetensors_index(std::string_view text, const std::string& where) {
  const Json index = parse_json(text, where, DuplicateKeys::kReject);
  SafetensorsShards shards;
  for (const auto& [tensor, value] :
       json_object(index, "weight_map", where).get_ref<const Json::object_t&>()) {
    if (!value.is_string())
      json_mismatch("'weight_map' " + quote_text(tensor), where, "a file name",
                    describe_json(value));
    const auto& shard = value.get_ref<const std::string&>();
    // A path could make the reader open, and an error message reveal, files elsewhere.
    const bool plain = std::none_of(shard.begin(), shard.end(), [](char character) {
      return character == '/' || character == '\\' || static_cast<unsigned char>(character) < 0x20;
    });
    if (shard.empty() || shard == "." || shard == ".." || !plain)
      json_mismatch("'weight_map' " + quote_text(tensor), where, "a file name without a folder",
                    quote_text(shard));
    shards[shard].push_back(tensor);
  }
  return shards;
}

}  // namespace detail

/// A safetensors model: one file, or the shards that an index names, as one set of tensors. Const
/// after construction: any number of threads may read. Movable, not copyable; moving keeps all
/// addresses.
class SafetensorsModel {
 public:
  /// `path`: a folder, of which model.safetensors is taken, or else the shards that
  /// model.safetensors.index.json names; or one .safetensors file; or one index (*.json). Shards
  /// lie in the index's own folder. Allocates in proportion to the headers. \throws Error(kIo) if a
  /// file cannot be opened; Error(kFormat) as SafetensorsFile does, and if a tensor is in two
  /// shards, if a shard lacks a tensor that the index promises, or if a shard's name is not a plain
  /// file name.
  explicit SafetensorsModel(std::string path) : path_(std::move(path)) {
    std::string file = path_;
    struct stat status {};
    if (::stat(path_.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
      file = path_ + "/model.safetensors";
      if (::stat(file.c_str(), &status) != 0) file += ".index.json";
      if (::stat(file.c_str(), &status) != 0)
        throw Error(ErrorCode::kIo,
                    {"no safetensors model in the folder", path_, "",
                     "model.safetensors or model.safetensors.index.json", "neither"});
    }
    if (file.ends_with(".json")) {
      open_shards(file);
    } else {
      files_.emplace_back(file);
    }
    join();
  }

  /// The path as it was given.
  const std::string& path() const noexcept { return path_; }

  /// The files that hold the tensors.
  std::span<const SafetensorsFile> files() const noexcept { return files_; }

  /// \name Tensors
  /// As those of SafetensorsFile, over all files.
  /// @{
  std::span<const SafetensorsTensor> tensors() const noexcept { return table_.tensors(); }
  std::span<const SafetensorsUnsupported> unsupported() const noexcept {
    return table_.unsupported();
  }
  const SafetensorsTensor* find_tensor(std::string_view name) const {
    return table_.find(name, path_);
  }
  const SafetensorsTensor& tensor(std::string_view name) const { return table_.get(name, path_); }
  bool contains(std::string_view name) const { return table_.contains(name); }
  /// @}

 private:
  void open_shards(const std::string& index_path) {
    const MappedFile index(index_path);
    const auto bytes = index.bytes();
    const detail::SafetensorsShards shards = detail::parse_safetensors_index(
        {reinterpret_cast<const char*>(bytes.data()), bytes.size()}, index_path);
    const std::size_t slash = index_path.rfind('/');
    const std::string folder =
        slash == std::string::npos ? std::string() : index_path.substr(0, slash + 1);
    for (const auto& [shard, tensors] : shards) {
      const SafetensorsFile& file = files_.emplace_back(folder + shard);
      for (const std::string& name : tensors) {
        if (!file.contains(name))
          throw Error(ErrorCode::kFormat,
                      {"safetensors shard lacks a tensor that the index promises", file.path(),
                       "tensor " + detail::quote_text(name), "a tensor of this name", "none"});
      }
    }
  }

  void join() {
    std::map<std::string_view, const SafetensorsFile*> owners;
    const auto claim = [&](std::string_view name, const SafetensorsFile& file) {
      const auto [owner, is_new] = owners.emplace(name, &file);
      if (!is_new)
        throw Error(ErrorCode::kFormat, {"safetensors tensor is in two shards", file.path(),
                                         "tensor " + detail::quote_text(name), "one shard",
                                         "also in " + owner->second->path()});
    };
    for (const SafetensorsFile& file : files_) {
      for (const SafetensorsTensor& tensor : file.tensors()) {
        claim(tensor.name, file);
        table_.add(tensor);
      }
      for (const SafetensorsUnsupported& tensor : file.unsupported()) {
        claim(tensor.name, file);
        table_.add(tensor);
      }
    }
    table_.index();
  }

  std::string path_;
  std::vector<SafetensorsFile> files_;
  detail::SafetensorsTable table_;
};

/// The content of a safetensors file: F32, F16 and BF16 tensors in the given order, and metadata.
/// Allocates it. \throws Error(kUnsupported) for block formats, Error(kConfig) for a name that
/// occurs twice or is "__metadata__", Error(kShape) where a tensor's bytes do not match its shape,
/// Error(kText) for names and metadata that are not UTF-8.
inline std::vector<std::byte> safetensors_bytes(
    std::span<const FileTensor> tensors,
    const std::map<std::string, std::string, std::less<>>& metadata = {}) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const FileTensor& tensor : tensors) {
    const std::string field = "tensor " + detail::quote_text(tensor.name);
    const std::string_view dtype = to_string(tensor.type);
    if (!detail::element_type_from_dtype(dtype))
      throw Error(ErrorCode::kUnsupported,
                  {"safetensors cannot hold this element type", "safetensors_bytes", field,
                   "F32, F16 or BF16", std::string(dtype)});
    if (tensor.name == "__metadata__" || header.contains(tensor.name))
      throw Error(ErrorCode::kConfig, {"safetensors tensor name is taken", "safetensors_bytes",
                                       field, "a new name", "an old one"});
    std::size_t bytes = static_cast<std::size_t>(block_shape(tensor.type).bytes);
    for (const std::int64_t extent : tensor.shape) bytes *= static_cast<std::size_t>(extent);
    if (bytes != tensor.bytes)
      throw Error(ErrorCode::kShape,
                  {"safetensors tensor data does not fill its shape", "safetensors_bytes", field,
                   std::to_string(bytes) + " bytes", std::to_string(tensor.bytes)});
    header[tensor.name] = {
        {"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception& error) {
    throw Error(ErrorCode::kText, {"safetensors name or metadata is not UTF-8", "safetensors_bytes",
                                   "", "UTF-8", error.what()});
  }
  // Spaces, as the format says, so that the data starts at a multiple of 8 bytes.
  text.append((8 - text.size() % 8) % 8, ' ');

  std::vector<std::byte> file(detail::kSafetensorsLengthBytes + text.size() + offset);
  const std::uint64_t length = text.size();
  std::memcpy(file.data(), &length, sizeof(length));
  std::memcpy(file.data() + sizeof(length), text.data(), text.size());
  std::byte* to = file.data() + sizeof(length) + text.size();
  for (const FileTensor& tensor : tensors) {
    std::copy_n(tensor.data, tensor.bytes, to);
    to += tensor.bytes;
  }
  return file;
}

/// Writes a safetensors file, in one step: `path` is replaced when all is written, or left as it
/// was. \throws Error(kIo), and as safetensors_bytes does.
inline void write_safetensors(
    const std::string& path, std::span<const FileTensor> tensors,
    const std::map<std::string, std::string, std::less<>>& metadata = {}) {
  detail::write_file(path, safetensors_bytes(tensors, metadata));
}

}  // namespace sluice
