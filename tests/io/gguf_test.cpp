// SPDX-License-Identifier: MIT
#include "sluice/io/gguf.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "sluice/io/gguf_writer.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::Bytes;
using test::expect_error;
using test::loads_or_throws;
using test::TempFolder;
using Ints = std::vector<std::int64_t>;

static_assert(!std::is_copy_constructible_v<GgufFile>);
static_assert(std::is_move_constructible_v<GgufFile>);

/// A GGUF file put together byte by byte, after the format's specification and independent of the
/// library's writer. Remembers where each header field is, so that tests can damage it by name.
class Image {
 public:
  struct Field {
    std::string name;
    std::size_t offset;
    std::size_t size;
  };

  template <class T>
  Image& put(const std::string& name, T value) {
    fields_.push_back({name, bytes_.size(), sizeof(T)});
    const auto* const first = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), first, first + sizeof(T));
    return *this;
  }
  Image& u32(const std::string& name, std::uint32_t value) { return put(name, value); }
  Image& u64(const std::string& name, std::uint64_t value) { return put(name, value); }
  Image& string(const std::string& name, std::string_view text) {
    u64(name + " length", text.size());
    const auto* const first = reinterpret_cast<const std::byte*>(text.data());
    bytes_.insert(bytes_.end(), first, first + text.size());
    return *this;
  }
  Image& key(const std::string& name, GgufType type) {
    string(name + " key", name);
    return u32(name + " type", static_cast<std::uint32_t>(type));
  }
  Image& array(const std::string& name, GgufType element, std::uint64_t size) {
    u32(name + " element type", static_cast<std::uint32_t>(element));
    return u64(name + " array length", size);
  }
  Image& tensor(const std::string& name, std::initializer_list<std::uint64_t> extents,
                std::uint32_t type, std::uint64_t offset) {
    string(name + " name", name);
    u32(name + " rank", static_cast<std::uint32_t>(extents.size()));
    int axis = 0;
    for (const std::uint64_t extent : extents)
      u64(name + " extent " + std::to_string(axis++), extent);
    u32(name + " type", type);
    return u64(name + " offset", offset);
  }
  Image& header(std::uint64_t tensors, std::uint64_t entries, std::uint32_t version = 3) {
    return u32("magic", 0x46554747)
        .u32("version", version)
        .u64("tensor count", tensors)
        .u64("metadata count", entries);
  }
  Image& align(std::size_t alignment) {
    header_size_ = bytes_.size();
    while (bytes_.size() % alignment != 0) bytes_.push_back(std::byte{0});
    return *this;
  }
  /// Tensor data: a ramp of bytes.
  Image& data(std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) bytes_.push_back(static_cast<std::byte>(7 * i + 3));
    return *this;
  }
  /// Overwrites a field with a number of its own width.
  Image& set(std::string_view name, std::uint64_t value) {
    const auto field = std::find_if(fields_.begin(), fields_.end(),
                                    [&](const Field& one) { return one.name == name; });
    EXPECT_NE(field, fields_.end()) << name;
    std::memcpy(bytes_.data() + field->offset, &value, field->size);
    return *this;
  }

  const Bytes& bytes() const { return bytes_; }
  const std::vector<Field>& fields() const { return fields_; }
  std::size_t header_size() const { return header_size_; }

 private:
  Bytes bytes_;
  std::vector<Field> fields_;
  std::size_t header_size_ = 0;
};

/// Every kind of header field, two tensors: F32 [3, 2] at 0, Q8_0 [2, 64] at 32.
Image full_image(std::uint32_t version = 3) {
  Image image;
  image.header(2, 9, version);
  image.key("general.alignment", GgufType::kUint32).u32("alignment", 32);
  image.key("s", GgufType::kString).string("string value", "text");
  image.key("u", GgufType::kUint8).put("uint8 value", std::uint8_t{250});
  image.key("i", GgufType::kInt64).put("int64 value", std::int64_t{-5});
  image.key("f", GgufType::kFloat32).put("float value", 0.5F);
  image.key("b", GgufType::kBool).put("bool value", std::uint8_t{1});
  image.key("as", GgufType::kArray).array("as", GgufType::kString, 2);
  image.string("first string", "one").string("second string", "");
  image.key("ai", GgufType::kArray).array("ai", GgufType::kInt16, 3);
  image.put("ai 0", std::int16_t{1}).put("ai 1", std::int16_t{-2}).put("ai 2", std::int16_t{3});
  image.key("aa", GgufType::kArray).array("aa", GgufType::kArray, 2);
  image.array("inner 0", GgufType::kBool, 2).put("b0", std::uint8_t{0}).put("b1", std::uint8_t{1});
  image.array("inner 1", GgufType::kString, 1).string("inner string", "deep");
  image.tensor("wide", {2, 3}, 0, 0).tensor("quant", {64, 2}, 8, 32);
  image.align(32).data(24 + 8 + 2 * 2 * 34);
  return image;
}

/// Parses an exact copy and uses everything that the file offers.
void use(std::span<const std::byte> bytes) {
  const Bytes exact = test::exact_copy(bytes);
  const GgufFile file = GgufFile::from_bytes(exact, "image.gguf");
  unsigned sum = 0;
  for (const GgufTensor& tensor : file.tensors()) {
    ASSERT_GE(tensor.data, exact.data());
    ASSERT_LE(tensor.data + tensor.bytes, exact.data() + exact.size());
    sum += test::touch(tensor.span());
    ASSERT_EQ(file.find_tensor(tensor.name), &tensor);
  }
  for (const std::string_view key : file.keys()) {
    ASSERT_TRUE(file.has(key));
    switch (file.value_type(key)) {
      case GgufType::kString:
        sum += test::touch(std::as_bytes(std::span(file.get_string(key))));
        break;
      case GgufType::kBool: sum += file.get_bool(key) ? 1U : 0U; break;
      case GgufType::kFloat32:
      case GgufType::kFloat64: static_cast<void>(file.get_float(key)); break;
      case GgufType::kArray:
        // One of these fits, or none where arrays are nested.
        loads_or_throws([&] { sum += static_cast<unsigned>(file.get_ints(key).size()); });
        loads_or_throws([&] { sum += static_cast<unsigned>(file.get_floats(key).size()); });
        loads_or_throws([&] { sum += static_cast<unsigned>(file.get_bools(key).size()); });
        loads_or_throws([&] {
          for (const std::string_view text : file.get_strings(key))
            sum += test::touch(std::as_bytes(std::span(text)));
        });
        break;
      default:
        loads_or_throws([&] { static_cast<void>(file.get_int(key)); });
        loads_or_throws([&] { static_cast<void>(file.get_uint(key)); });
    }
  }
  static_cast<void>(sum);
}

TEST(Gguf, ReadsAHandMadeFile) {
  for (const std::uint32_t version : {2U, 3U}) {
    const Image image = full_image(version);
    const GgufFile file = GgufFile::from_bytes(image.bytes(), "image.gguf");
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.path(), "image.gguf");
    EXPECT_EQ(file.alignment(), 32U);
    EXPECT_EQ(file.keys(), (std::vector<std::string_view>{"general.alignment", "s", "u", "i", "f",
                                                          "b", "as", "ai", "aa"}));
    EXPECT_EQ(file.get_string("s"), "text");
    EXPECT_EQ(file.get_uint("u"), 250U);
    EXPECT_EQ(file.get_int("u"), 250);
    EXPECT_EQ(file.get_int("i"), -5);
    EXPECT_EQ(file.get_float("f"), 0.5);
    EXPECT_TRUE(file.get_bool("b"));
    EXPECT_EQ(file.get_strings("as"), (std::vector<std::string_view>{"one", ""}));
    EXPECT_EQ(file.get_ints("ai"), (Ints{1, -2, 3}));
    EXPECT_EQ(file.value_type("aa"), GgufType::kArray);
    EXPECT_EQ(file.array_size("aa"), 2U);

    ASSERT_EQ(file.tensors().size(), 2U);
    const GgufTensor& wide = file.tensor("wide");
    EXPECT_EQ(wide.type, ElementType::kF32);
    EXPECT_EQ(wide.shape, (Ints{3, 2}));  // the file has the innermost extent first
    EXPECT_EQ(wide.bytes, 24U);
    EXPECT_EQ(wide.data[0], std::byte{3});
    const GgufTensor& quant = file.tensor("quant");
    EXPECT_EQ(quant.type, ElementType::kQ8_0);
    EXPECT_EQ(quant.shape, (Ints{2, 64}));
    EXPECT_EQ(quant.bytes, 2U * 2 * 34);
    EXPECT_EQ(quant.data, wide.data + 32);
    EXPECT_EQ(file.find_tensor("absent"), nullptr);
  }
}

TEST(Gguf, ReadsAFileWithoutAnything) {
  Image image;
  image.header(0, 0);
  const GgufFile file = GgufFile::from_bytes(image.bytes(), "empty");
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_TRUE(file.keys().empty());
  EXPECT_EQ(file.alignment(), 32U);
}

TEST(Gguf, MapsAFileAndMoves) {
  const TempFolder folder;
  const std::string path = folder.write("model.gguf", full_image().bytes());
  GgufFile first(path);
  EXPECT_EQ(first.path(), path);
  const std::byte* const address = first.tensor("quant").data;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(address) % 32, 0U);
  const GgufFile second = std::move(first);
  EXPECT_EQ(second.tensor("quant").data, address);
  EXPECT_EQ(second.get_string("s"), "text");
  EXPECT_EQ(second.path(), path);
  expect_error(ErrorCode::kIo, {folder.path("none"), "No such file"},
               [&] { GgufFile{folder.path("none")}; });
  expect_error(ErrorCode::kIo, {folder.path(), "a directory"}, [&] { GgufFile{folder.path()}; });
  expect_error(ErrorCode::kFormat, {folder.path("empty"), "magic (byte 0)", "4 bytes", "found 0"},
               [&] { GgufFile{folder.write("empty", "")}; });
}

TEST(Gguf, MetadataErrorsNameFileKeyExpectedAndFound) {
  const Image image = full_image();
  const GgufFile file = GgufFile::from_bytes(image.bytes(), "image.gguf");
  const auto bad = [&](std::initializer_list<std::string_view> parts, auto get) {
    expect_error(ErrorCode::kFormat, parts, [&] { get(file); });
  };
  using File = const GgufFile&;
  bad({"image.gguf", "'absent'", "at least 0", "no such key"},
      [](File f) { f.get_uint("absent"); });
  bad({"image.gguf", "'i' (byte ", "at least 0", "int64 -5"}, [](File f) { f.get_uint("i"); });
  bad({"'s'", "an integer", "string"}, [](File f) { f.get_int("s"); });
  bad({"'u'", "float32 or float64", "uint8 250"}, [](File f) { f.get_float("u"); });
  bad({"'u'", "bool", "uint8"}, [](File f) { f.get_bool("u"); });
  bad({"'f'", "string", "float32"}, [](File f) { f.get_string("f"); });
  bad({"'as'", "expected string", "array of 2 string"}, [](File f) { f.get_string("as"); });
  bad({"'as'", "integers", "array of 2 string"}, [](File f) { f.get_ints("as"); });
  bad({"'ai'", "array of string", "array of 3 int16"}, [](File f) { f.get_strings("ai"); });
  bad({"'ai'", "array of float32", "array of 3 int16"}, [](File f) { f.get_floats("ai"); });
  bad({"'aa'", "array of bool", "array of 2 array"}, [](File f) { f.get_bools("aa"); });
  bad({"'s'", "array", "string"}, [](File f) { f.array_size("s"); });
  // A fallback is for keys that are missing, not for those of another type.
  EXPECT_EQ(file.get_uint_or("absent", 7), 7U);
  EXPECT_EQ(file.get_int_or("absent", -7), -7);
  EXPECT_EQ(file.get_float_or("absent", 0.25), 0.25);
  EXPECT_TRUE(file.get_bool_or("absent", true));
  EXPECT_EQ(file.get_string_or("absent", "other"), "other");
  EXPECT_EQ(file.get_uint_or("u", 7), 250U);
  bad({"'s'", "at least 0"}, [](File f) { f.get_uint_or("s", 7); });
  expect_error(ErrorCode::kFormat, {"image.gguf", "tensor 'absent'", "none among 2"},
               [&] { file.tensor("absent"); });
}

TEST(Gguf, IntegersOfEveryWidthKeepTheirLimits) {
  GgufWriter writer;
  writer.add("u8", std::numeric_limits<std::uint8_t>::max());
  writer.add("i8", std::numeric_limits<std::int8_t>::min());
  writer.add("u16", std::numeric_limits<std::uint16_t>::max());
  writer.add("i16", std::numeric_limits<std::int16_t>::min());
  writer.add("u32", std::numeric_limits<std::uint32_t>::max());
  writer.add("i32", std::numeric_limits<std::int32_t>::min());
  writer.add("u64", std::numeric_limits<std::uint64_t>::max());
  writer.add("i64", std::numeric_limits<std::int64_t>::min());
  writer.add_array("u64s", std::vector<std::uint64_t>{1, std::uint64_t{1} << 63});
  const Bytes bytes = writer.bytes();
  const GgufFile file = GgufFile::from_bytes(bytes, "limits");
  EXPECT_EQ(file.get_uint("u8"), 255U);
  EXPECT_EQ(file.get_int("i8"), -128);
  EXPECT_EQ(file.get_int("u16"), 65535);
  EXPECT_EQ(file.get_int("i16"), -32768);
  EXPECT_EQ(file.get_int("u32"), 4294967295);
  expect_error(ErrorCode::kFormat, {"'u32'", "uint32 4294967295"}, [&] { file.get_bool("u32"); });
  EXPECT_EQ(file.get_int("i32"), -2147483648LL);
  EXPECT_EQ(file.get_uint("u64"), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(file.get_int("i64"), std::numeric_limits<std::int64_t>::min());
  expect_error(ErrorCode::kFormat, {"'u64'", "within int64", "18446744073709551615"},
               [&] { file.get_int("u64"); });
  expect_error(ErrorCode::kFormat, {"'u64s'", "within int64"}, [&] { file.get_ints("u64s"); });
}

TEST(Gguf, EachDamagedFieldIsNamed) {
  constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();
  struct Damage {
    std::string_view field;
    std::uint64_t value;
    ErrorCode code;
    std::vector<std::string_view> parts;
  };
  const Damage table[] = {
      {"magic", 0x46554746, ErrorCode::kFormat, {"not a GGUF", "magic (byte 0)", "'FGUF'"}},
      {"version", 0, ErrorCode::kUnsupported, {"version (byte 4)", "found 0"}},
      {"version", 1, ErrorCode::kUnsupported, {"version (byte 4)", "2 or 3", "found 1"}},
      {"version", 4, ErrorCode::kUnsupported, {"found 4"}},
      {"version", 0x03000000, ErrorCode::kUnsupported, {"big endian"}},
      {"tensor count", kHuge, ErrorCode::kFormat, {"tensor count (byte 8)", "at most"}},
      {"tensor count", 3, ErrorCode::kFormat, {"tensor 2"}},
      {"metadata count", kHuge, ErrorCode::kFormat, {"metadata count (byte 16)", "at most"}},
      {"s key length", kHuge, ErrorCode::kFormat, {"key of metadata entry 1"}},
      {"s type", 13, ErrorCode::kFormat, {"value type of metadata 's'", "0 to 12", "13"}},
      {"string value length", kHuge - 7, ErrorCode::kFormat, {"value of metadata 's'"}},
      {"bool value", 2, ErrorCode::kFormat, {"value of metadata 'b'", "0 or 1", "found 2"}},
      {"b0", 255, ErrorCode::kFormat, {"value of metadata 'aa'", "0 or 1", "found 255"}},
      {"as element type", 77, ErrorCode::kFormat, {"array element type of metadata 'as'", "77"}},
      {"as array length", kHuge, ErrorCode::kFormat, {"array length of metadata 'as'"}},
      {"as array length", std::uint64_t{1} << 61, ErrorCode::kFormat, {"array length"}},
      {"ai array length", std::uint64_t{1} << 63, ErrorCode::kFormat, {"array length"}},
      {"first string length", kHuge, ErrorCode::kFormat, {"string in array of metadata 'as'"}},
      {"inner 0 element type", 13, ErrorCode::kFormat, {"nested array element type"}},
      {"inner 1 array length", kHuge, ErrorCode::kFormat, {"nested array length"}},
      {"inner string length", 1 << 20, ErrorCode::kFormat, {"string in array"}},
      {"alignment", 0, ErrorCode::kFormat, {"general.alignment", "power of two", "found 0"}},
      {"alignment", 48, ErrorCode::kFormat, {"general.alignment", "power of two", "found 48"}},
      {"alignment", 4, ErrorCode::kFormat, {"general.alignment"}},
      {"alignment", 0x80000000, ErrorCode::kFormat, {"general.alignment"}},
      {"general.alignment type", 6, ErrorCode::kFormat, {"'general.alignment'", "an integer"}},
      {"wide name length", kHuge, ErrorCode::kFormat, {"name of tensor 0"}},
      {"wide rank", 0, ErrorCode::kFormat, {"dimension count of tensor 'wide'", "1 to 4"}},
      {"wide rank", 5, ErrorCode::kFormat, {"dimension count of tensor 'wide'", "found 5"}},
      {"wide extent 0", 0, ErrorCode::kFormat, {"extent of tensor 'wide'", "found 0"}},
      {"wide extent 1", std::uint64_t{1} << 62, ErrorCode::kFormat, {"extent of tensor 'wide'"}},
      {"wide extent 0", kHuge, ErrorCode::kFormat, {"extent of tensor 'wide'"}},
      {"wide extent 1", 1000, ErrorCode::kFormat, {"larger than the file", "'wide'"}},
      {"wide extent 1", 20, ErrorCode::kFormat, {"overlap", "'wide'", "'quant'"}},
      {"wide type", 13, ErrorCode::kUnsupported, {"tensor 'wide'", "type 13 (Q5_K)"}},
      {"wide type", 4, ErrorCode::kUnsupported, {"tensor 'wide'", "type 4"}},
      {"wide type", 0xffffffff, ErrorCode::kUnsupported, {"type 4294967295"}},
      {"wide offset", 16, ErrorCode::kFormat, {"not aligned", "offset of tensor 'wide'", "32"}},
      {"wide offset", 32, ErrorCode::kFormat, {"overlap"}},
      {"quant extent 0", 48, ErrorCode::kFormat, {"broken blocks", "multiple of 32", "48"}},
      {"quant type", 12, ErrorCode::kFormat, {"multiple of 256", "Q4_K", "64"}},
      {"quant offset", 0, ErrorCode::kFormat, {"overlap"}},
      {"quant offset", 64, ErrorCode::kFormat, {"outside the file", "offset of tensor 'quant'"}},
      {"quant offset", kHuge - 31, ErrorCode::kFormat, {"outside the file"}},
  };
  for (const Damage& damage : table) {
    SCOPED_TRACE(std::string(damage.field) + " = " + std::to_string(damage.value));
    const Bytes bytes = test::exact_copy(full_image().set(damage.field, damage.value).bytes());
    const auto error = test::expected_error([&] { GgufFile::from_bytes(bytes, "image.gguf"); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), damage.code) << error->what();
    EXPECT_EQ(error->detail().where, "image.gguf");
    for (const std::string_view part : damage.parts)
      EXPECT_NE(std::string_view(error->what()).find(part), std::string_view::npos)
          << "'" << part << "' is missing in: " << error->what();
  }
}

TEST(Gguf, NamesThatOccurTwiceAreRefused) {
  Image keys;
  keys.header(0, 2).key("k", GgufType::kBool).put("0", std::uint8_t{0});
  keys.key("k", GgufType::kBool).put("1", std::uint8_t{0});
  expect_error(ErrorCode::kFormat, {"file", "key 'k'", "twice"},
               [&] { GgufFile::from_bytes(keys.bytes(), "file"); });
  Image tensors;
  tensors.header(2, 0).tensor("t", {8}, 0, 0).tensor("t", {8}, 0, 32).align(32).data(64);
  expect_error(ErrorCode::kFormat, {"file", "tensor 't'", "twice"},
               [&] { GgufFile::from_bytes(tensors.bytes(), "file"); });
}

TEST(Gguf, ArraysNestToALimit) {
  const auto nested = [](int levels) {
    Image image;
    image.header(0, 1).key("deep", GgufType::kArray);
    for (int i = 1; i < levels; ++i) image.array("level", GgufType::kArray, 1);
    image.array("last", GgufType::kUint8, 1).put("value", std::uint8_t{1});
    return image;
  };
  EXPECT_NO_THROW(GgufFile::from_bytes(nested(4).bytes(), "file"));
  for (const int levels : {5, 6, 100'000})
    expect_error(ErrorCode::kUnsupported, {"nested too deeply", "metadata 'deep'"},
                 [&] { GgufFile::from_bytes(nested(levels).bytes(), "file"); });
}

TEST(Gguf, AMissingTensorOfASplitModelSaysSo) {
  GgufWriter writer;
  writer.add("split.count", std::uint16_t{3});
  const Bytes bytes = writer.bytes();
  const GgufFile file = GgufFile::from_bytes(bytes, "part.gguf");
  EXPECT_EQ(file.get_uint("split.count"), 3U);
  expect_error(ErrorCode::kFormat, {"part.gguf", "'blk.0.attn_q.weight'", "part of a split model"},
               [&] { file.tensor("blk.0.attn_q.weight"); });
}

TEST(Gguf, MessagesStayShortAndPrintable) {
  Image image;
  image.header(1, 0).tensor("\x1b[31m" + std::string(100'000, 'x'), {8}, 99, 0).align(32).data(32);
  const auto error = test::expected_error([&] { GgufFile::from_bytes(image.bytes(), "file"); });
  ASSERT_TRUE(error);
  EXPECT_LT(std::string(error->what()).size(), 600U);
  EXPECT_EQ(std::string(error->what()).find('\x1b'), std::string::npos);
}

TEST(Gguf, EveryTruncationIsAnError) {
  const Bytes bytes = full_image().bytes();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    SCOPED_TRACE(size);
    const Bytes exact = test::exact_copy(std::span(bytes).first(size));
    EXPECT_FALSE(loads_or_throws([&] { GgufFile::from_bytes(exact, "cut.gguf"); }));
  }
}

TEST(Gguf, EveryFieldWithEdgeValuesLoadsOrThrows) {
  const Image original = full_image();
  for (const Image::Field& field : original.fields()) {
    std::uint64_t now = 0;
    std::memcpy(&now, original.bytes().data() + field.offset, field.size);
    std::vector<std::uint64_t> values{0, 1, 2, 3, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 65535};
    for (int bit = 0; bit < 64; ++bit) {
      values.push_back(std::uint64_t{1} << bit);
      values.push_back((std::uint64_t{1} << bit) - 1);
      values.push_back(~(std::uint64_t{1} << bit));
      values.push_back(now ^ (std::uint64_t{1} << bit));
    }
    for (const std::uint64_t step : {1ULL, 2ULL, 8ULL, 32ULL}) {
      values.push_back(now + step);
      values.push_back(now - step);
    }
    for (const std::uint64_t value : values) {
      SCOPED_TRACE(field.name + " = " + std::to_string(value));
      Image image = original;
      image.set(field.name, value);
      loads_or_throws([&] { use(image.bytes()); });
    }
  }
}

TEST(Gguf, EveryHeaderByteWithEdgeValuesLoadsOrThrows) {
  const Image image = full_image();
  for (std::size_t at = 0; at < image.header_size(); ++at) {
    const auto now = std::to_integer<unsigned>(image.bytes()[at]);
    for (const unsigned value : {0U, 1U, 2U, 9U, 0x1fU, 0x20U, 0x7fU, 0x80U, 0xfeU, 0xffU, now ^ 1U,
                                 now ^ 0x80U, now + 1U, now - 1U}) {
      SCOPED_TRACE("byte " + std::to_string(at) + " = " + std::to_string(value & 255U));
      Bytes bytes = image.bytes();
      bytes[at] = static_cast<std::byte>(value & 255U);
      loads_or_throws([&] { use(bytes); });
    }
  }
}

// --- Against the ggml project's own package (tests/oracle/make_gguf_sample.py) ---

TEST(GgufSample, TensorsAreThoseThatThePackageWrote) {
  const std::string folder = SLUICE_TEST_DATA "/gguf/";
  const GgufFile file(folder + "sample.gguf");
  std::ifstream list(folder + "sample.tsv");
  std::string name;
  std::string type;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::size_t bytes = 0;
  std::uint32_t crc = 0;
  std::size_t count = 0;
  while (list >> name >> type >> rows >> cols >> bytes >> crc) {
    SCOPED_TRACE(name);
    const GgufTensor& tensor = file.tensor(name);
    EXPECT_EQ(to_string(tensor.type), type);
    EXPECT_EQ(tensor.shape, (Ints{rows, cols}));
    ASSERT_EQ(tensor.bytes, bytes);
    EXPECT_EQ(test::crc32(tensor.span()), crc);
    ++count;
  }
  EXPECT_EQ(count, 16U);  // eight types, each with its dequantised values
  EXPECT_EQ(file.tensors().size(), count);
}

TEST(GgufSample, MetadataIsWhatThePackageWrote) {
  const GgufFile file(SLUICE_TEST_DATA "/gguf/sample.gguf");
  EXPECT_EQ(file.get_string("general.architecture"), "llama");
  EXPECT_EQ(file.get_uint("kind.uint8"), 200U);
  EXPECT_EQ(file.get_int("kind.int8"), -100);
  EXPECT_EQ(file.get_uint("kind.uint16"), 60000U);
  EXPECT_EQ(file.get_int("kind.int16"), -30000);
  EXPECT_EQ(file.get_uint("kind.uint32"), 4000000000U);
  EXPECT_EQ(file.get_int("kind.int32"), -2000000000);
  EXPECT_EQ(file.get_uint("kind.uint64"), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(file.get_int("kind.int64"), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(file.get_float("kind.float32"), 0.375);
  EXPECT_EQ(file.get_float("kind.float64"), 0.1);
  EXPECT_TRUE(file.get_bool("kind.bool"));
  EXPECT_EQ(file.get_string("kind.string"), "na\xc3\xafve \xe2\x96\x81text");
  EXPECT_EQ(file.get_strings("kind.strings"), (std::vector<std::string_view>{"<s>", "",
                                                                             "\xe2\x96\x81"
                                                                             "a"}));
  EXPECT_EQ(file.get_ints("kind.ints"), (Ints{3, -1, 2}));
  EXPECT_EQ(file.get_floats("kind.floats"), (std::vector<double>{0.5, -1.25}));
  EXPECT_EQ(file.get_bools("kind.bools"), (std::vector<bool>{true, false, true}));
}

TEST(GgufSample, EveryTruncationOfASmallFileIsAnErrorOrCutsPadding) {
  const Bytes bytes = test::read_bytes(SLUICE_TEST_DATA "/gguf/small.gguf");
  const GgufFile whole = GgufFile::from_bytes(bytes, "small.gguf");
  std::size_t end = 0;  // of the last tensor; padding may follow
  for (const GgufTensor& tensor : whole.tensors())
    end = std::max(end, static_cast<std::size_t>(tensor.data - bytes.data()) + tensor.bytes);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    SCOPED_TRACE(size);
    const Bytes exact = test::exact_copy(std::span(bytes).first(size));
    EXPECT_EQ(loads_or_throws([&] { use(exact); }), size >= end);
  }
}

// --- A real model, where there is one ---

TEST(GgufModel, ReadsSmolLM2) {
  const char* const given = std::getenv("SLUICE_MODEL");
  const char* const cache = std::getenv("XDG_CACHE_HOME");
  const char* const home = std::getenv("HOME");
  std::string path = given != nullptr ? given : "";
  if (path.empty()) {
    path = cache != nullptr ? cache : std::string(home != nullptr ? home : "") + "/.cache";
    path += "/sluice/SmolLM2-135M-Instruct.Q4_1.gguf";
  }
  if (!std::ifstream(path)) GTEST_SKIP() << "there is no model at " << path;
  const GgufFile file(path);
  if (file.get_string_or("general.architecture", "") != "llama" ||
      file.get_uint_or("llama.block_count", 0) != 30)
    GTEST_SKIP() << path << " is another model";
  // The values of the model's published configuration.
  EXPECT_EQ(file.get_uint("llama.embedding_length"), 576U);
  EXPECT_EQ(file.get_uint("llama.attention.head_count"), 9U);
  EXPECT_EQ(file.get_uint("llama.attention.head_count_kv"), 3U);
  EXPECT_EQ(file.get_strings("tokenizer.ggml.tokens").size(), 49152U);
  EXPECT_EQ(file.tensors().size(), 272U);  // embedding, final norm, 9 in each of 30 layers
  EXPECT_EQ(file.tensor("token_embd.weight").shape, (Ints{49152, 576}));
  EXPECT_EQ(file.tensor("blk.29.ffn_down.weight").shape, (Ints{576, 1536}));
}

// --- The writer ---

TEST(GgufWriter, RoundTripOfEveryKind) {
  GgufWriter writer(64);
  writer.add("u8", std::uint8_t{1});
  writer.add("f32", 1.5F);
  writer.add("f64", 0.1);
  writer.add("yes", true);
  writer.add("text", "a\0b");
  writer.add("view", std::string_view("a\0b", 3));
  writer.add_array("floats", std::vector<float>{1, -2});
  writer.add_array("doubles", std::array{0.1, 2.0});
  const std::int32_t ints[] = {-1};
  writer.add_array("ints", ints);
  writer.add_array("bools", std::vector<bool>{true, false});
  writer.add_array("none", std::vector<std::string>{});
  writer.add_array("texts", std::vector<std::string>{"x", "", "yz"});

  const ElementType types[] = {ElementType::kF32,  ElementType::kF16,  ElementType::kBF16,
                               ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kQ4_1,
                               ElementType::kQ4_K, ElementType::kQ6_K};
  std::vector<Bytes> contents;
  for (const ElementType type : types) {
    const BlockShape block = block_shape(type);
    const std::int64_t shape[] = {2, 3, 2 * block.values};
    Bytes data(static_cast<std::size_t>(2 * 3 * 2 * block.bytes));
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<std::byte>(31 * i + contents.size());
    writer.add_tensor(to_string(type), type, shape, data);
    contents.push_back(std::move(data));
  }

  const TempFolder folder;
  writer.write(folder.path("all.gguf"));
  EXPECT_FALSE(std::ifstream(folder.path("all.gguf.partial")).good());
  const GgufFile file(folder.path("all.gguf"));
  EXPECT_EQ(file.alignment(), 64U);
  EXPECT_EQ(file.get_uint("u8"), 1U);
  EXPECT_EQ(file.get_float("f32"), 1.5);
  EXPECT_EQ(file.get_float("f64"), 0.1);
  EXPECT_TRUE(file.get_bool("yes"));
  EXPECT_EQ(file.get_string("text"), "a");
  EXPECT_EQ(file.get_string("view"), std::string_view("a\0b", 3));
  EXPECT_EQ(file.get_floats("floats"), (std::vector<double>{1, -2}));
  EXPECT_EQ(file.get_floats("doubles"), (std::vector<double>{0.1, 2}));
  EXPECT_EQ(file.get_ints("ints"), Ints{-1});
  EXPECT_EQ(file.get_bools("bools"), (std::vector<bool>{true, false}));
  EXPECT_TRUE(file.get_strings("none").empty());
  EXPECT_EQ(file.get_strings("texts"), (std::vector<std::string_view>{"x", "", "yz"}));
  ASSERT_EQ(file.tensors().size(), std::size(types));
  for (std::size_t i = 0; i < std::size(types); ++i) {
    const GgufTensor& tensor = file.tensor(to_string(types[i]));
    EXPECT_EQ(tensor.type, types[i]);
    EXPECT_EQ(tensor.shape, (Ints{2, 3, 2 * block_shape(types[i]).values}));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data) % 64, 0U);
    EXPECT_TRUE(std::equal(tensor.span().begin(), tensor.span().end(), contents[i].begin(),
                           contents[i].end()));
  }
}

TEST(GgufWriter, RefusesWhatNoFileCanHold) {
  const Bytes data(24);
  const auto add = [&](ElementType type, Ints shape) {
    return [&data, type, shape] {
      GgufWriter().add_tensor("t", type, shape, data);
    };
  };
  EXPECT_NO_THROW(add(ElementType::kF32, {3, 2})());
  expect_error(ErrorCode::kShape, {"tensor 't'", "24 bytes"}, add(ElementType::kF32, {3, 3}));
  expect_error(ErrorCode::kShape, {"24 bytes"}, add(ElementType::kF32, {1}));
  expect_error(ErrorCode::kShape, {"24 bytes"},
               add(ElementType::kF32, {std::int64_t{1} << 62, std::int64_t{1} << 62}));
  expect_error(ErrorCode::kShape, {"axis 1", "multiple of 32"}, add(ElementType::kQ8_0, {2, 33}));
  expect_error(ErrorCode::kShape, {"axis 0", "found 0"}, add(ElementType::kF32, {0, 2}));
  expect_error(ErrorCode::kShape, {"dimensions", "found 0"}, add(ElementType::kF32, {}));
  expect_error(ErrorCode::kShape, {"dimensions", "found 5"},
               add(ElementType::kF32, {1, 1, 1, 3, 2}));
  expect_error(ErrorCode::kConfig, {"alignment", "found 24"}, [] { GgufWriter(24); });
  expect_error(ErrorCode::kConfig, {"alignment", "found 4"}, [] { GgufWriter(4); });
  expect_error(ErrorCode::kConfig, {"'k'"}, [] {
    GgufWriter writer;
    writer.add("k", 1);
    writer.add("k", 2);
  });
  expect_error(ErrorCode::kConfig, {"tensor 't'"}, [&] {
    GgufWriter writer;
    writer.add_tensor("t", ElementType::kF32, Ints{6}, data);
    writer.add_tensor("t", ElementType::kF32, Ints{6}, data);
  });
}

TEST(GgufWriter, AFailedWriteLeavesNothingBehind) {
  const TempFolder folder;
  expect_error(ErrorCode::kIo, {"no/model.gguf", "No such file"},
               [&] { GgufWriter().write(folder.path("no/model.gguf")); });
  std::filesystem::create_directories(folder.path("taken/inside"));
  expect_error(ErrorCode::kIo, {folder.path("taken")},
               [&] { GgufWriter().write(folder.path("taken")); });
  EXPECT_FALSE(std::filesystem::exists(folder.path("taken.partial")));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
