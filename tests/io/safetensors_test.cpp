// SPDX-License-Identifier: MIT
#include "sluice/io/safetensors.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <map>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::Bytes;
using test::expect_error;
using test::loads_or_throws;
using test::TempFolder;
using Ints = std::vector<std::int64_t>;

static_assert(!std::is_copy_constructible_v<SafetensorsFile>);
static_assert(std::is_move_constructible_v<SafetensorsFile>);

/// A file from a header's text and a ramp of data bytes, independent of the library's writer.
Bytes image(std::string_view header, std::size_t data_size,
            std::uint64_t length = std::numeric_limits<std::uint64_t>::max()) {
  if (length == std::numeric_limits<std::uint64_t>::max()) length = header.size();
  Bytes bytes(sizeof(length));
  std::memcpy(bytes.data(), &length, sizeof(length));
  const auto text = std::as_bytes(std::span(header));
  bytes.insert(bytes.end(), text.begin(), text.end());
  for (std::size_t i = 0; i < data_size; ++i) bytes.push_back(static_cast<std::byte>(7 * i + 3));
  return bytes;
}

SafetensorsFile parse(const Bytes& bytes) {
  return SafetensorsFile::from_bytes(bytes, "image.st");
}

constexpr std::string_view kHeader =
    R"({"__metadata__":{"format":"pt"},)"
    R"("b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},)"
    R"("a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},)"
    R"("ids":{"dtype":"I64","shape":[1],"data_offsets":[32,40]},)"
    R"("none":{"dtype":"F16","shape":[0,7],"data_offsets":[40,40]},)"
    R"("one":{"dtype":"F16","shape":[],"data_offsets":[40,42]}}  )";
constexpr std::size_t kDataSize = 42;

void use(std::span<const std::byte> bytes) {
  const Bytes exact = test::exact_copy(bytes);
  const SafetensorsFile file = SafetensorsFile::from_bytes(exact, "image.st");
  unsigned sum = 0;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    ASSERT_GE(tensor.data, exact.data());
    ASSERT_LE(tensor.data + tensor.bytes, exact.data() + exact.size());
    sum += test::touch(tensor.span());
    ASSERT_EQ(file.find_tensor(tensor.name), &tensor);
  }
  for (const SafetensorsUnsupported& tensor : file.unsupported()) {
    ASSERT_TRUE(file.contains(tensor.name));
    ASSERT_FALSE(loads_or_throws([&] { file.tensor(tensor.name); }));
  }
  static_cast<void>(sum);
}

TEST(Safetensors, ReadsAHandMadeFile) {
  const Bytes bytes = image(kHeader, kDataSize);
  const SafetensorsFile file = parse(bytes);
  const std::byte* const buffer = bytes.data() + 8 + kHeader.size();
  ASSERT_EQ(file.tensors().size(), 4U);  // in the order of the data
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.tensors()[1].name, "b");
  const SafetensorsTensor& b = file.tensor("b");
  EXPECT_EQ(b.type, ElementType::kF32);
  EXPECT_EQ(b.shape, (Ints{2, 3}));
  EXPECT_EQ(b.bytes, 24U);
  EXPECT_EQ(b.data, buffer + 8);
  EXPECT_EQ(file.tensor("a").type, ElementType::kBF16);
  EXPECT_EQ(file.tensor("a").data, buffer);
  EXPECT_EQ(file.tensor("one").type, ElementType::kF16);
  EXPECT_EQ(file.tensor("one").shape, Ints{});
  EXPECT_EQ(file.tensor("none").shape, (Ints{0, 7}));
  EXPECT_EQ(file.tensor("none").bytes, 0U);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.path(), "image.st");
}

TEST(Safetensors, OtherDtypesAreListedAndRefusedWhenAskedFor) {
  const Bytes bytes = image(kHeader, kDataSize);
  const SafetensorsFile file = parse(bytes);
  ASSERT_EQ(file.unsupported().size(), 1U);
  EXPECT_EQ(file.unsupported()[0].name, "ids");
  EXPECT_EQ(file.unsupported()[0].dtype, "I64");
  EXPECT_EQ(file.unsupported()[0].shape, Ints{1});
  EXPECT_TRUE(file.contains("ids"));
  expect_error(ErrorCode::kUnsupported, {"image.st", "'ids'", "F32, F16 or BF16", "'I64'"},
               [&] { file.tensor("ids"); });
  expect_error(ErrorCode::kUnsupported, {"'I64'"}, [&] { file.find_tensor("ids"); });
  EXPECT_EQ(file.find_tensor("absent"), nullptr);
  expect_error(ErrorCode::kFormat, {"image.st", "'absent'", "none among 5"},
               [&] { file.tensor("absent"); });
  // Of a dtype that is not known at all, the place is still checked.
  EXPECT_NO_THROW(parse(image(R"({"q":{"dtype":"Q9","shape":[3],"data_offsets":[0,5]}})", 5)));
  expect_error(ErrorCode::kFormat, {"fill the file"},
               [] { parse(image(R"({"q":{"dtype":"Q9","shape":[3],"data_offsets":[0,5]}})", 6)); });
}

TEST(Safetensors, DamageIsNamed) {
  struct Damage {
    std::string header;
    std::size_t data_size;
    std::vector<std::string_view> parts;
  };
  const auto one = [](std::string_view info) {
    return R"({"t":)" + std::string(info) + "}";
  };
  const Damage table[] = {
      {"[1,2,3,4,5]", 0, {"header (byte 8)", "'{'", "'['"}},
      {" {}", 0, {"header (byte 8)", "'{'", "' '"}},
      {"{\"t\":}", 0, {"JSON (byte 13)"}},
      {"{} x", 0, {"JSON (byte 11)"}},
      {"{\"t\":1}", 0, {"tensor 't'", "'dtype'", "integer 1"}},
      {one(R"({"shape":[1],"data_offsets":[0,4]})"), 4, {"'dtype'", "no such field"}},
      {one(R"({"dtype":7,"shape":[1],"data_offsets":[0,4]})"), 4, {"'dtype'", "a string"}},
      {one(R"({"dtype":"F32","data_offsets":[0,4]})"), 4, {"'shape'", "no such field"}},
      {one(R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})"), 4, {"'shape'", "array"}},
      {one(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})"), 4, {"'shape'[0]"}},
      {one(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"), 4, {"extent", "found -1"}},
      {one(R"({"dtype":"F32","shape":[1]})"), 4, {"'data_offsets'", "no such field"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})"), 4, {"data_offsets", "1 numbers"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})"), 8, {"3 numbers"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})"), 4, {"found 4, 0"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})"), 4, {"found -4, 0"}},
      {one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"), 4, {"outside the file", "0, 8"}},
      {one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"),
       4,
       {"shape of tensor 't'", "4 bytes of F32", "2 values"}},
      {one(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})"), 1, {"1 bytes of F4"}},
      {one(R"({"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]})"),
       4,  // times four bytes wraps around to 4
       {"4 bytes of F32", "4611686018427387905 values"}},
      {one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})"),
       0,
       {"impossible extent"}},
      {one(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]})"),
       4,
       {"'shape'[0]"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), 8, {"gap", "at 0", "found 4"}},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"), 5, {"fill the file", "at 5"}},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
       R"("u":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       12,
       {"overlap", "'u'", "at 8", "found 4"}},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8,
       {"duplicate", "'t'"}},
      {R"({"__metadata__":[]})", 0, {"'__metadata__'", "array of 0"}},
      {R"({"__metadata__":{"n":1}})", 0, {"'__metadata__' 'n'", "a string", "integer 1"}},
      {"{\"a\":" + std::string(1000, '['), 0, {"nested too deeply"}},
  };
  for (const Damage& damage : table) {
    SCOPED_TRACE(damage.header.substr(0, 100));
    const Bytes bytes = test::exact_copy(image(damage.header, damage.data_size));
    const auto error = test::expected_error([&] { parse(bytes); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kFormat) << error->what();
    EXPECT_TRUE(error->detail().where.starts_with("image.st")) << error->what();
    for (const std::string_view part : damage.parts)
      EXPECT_NE(std::string_view(error->what()).find(part), std::string_view::npos)
          << "'" << part << "' is missing in: " << error->what();
  }
}

TEST(Safetensors, HeaderLengthIsBounded) {
  const auto with_length = [](std::uint64_t length) {
    return [length] {
      parse(image(kHeader, kDataSize, length));
    };
  };
  const std::string most = "2 to " + std::to_string(kHeader.size() + kDataSize);
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{kHeader.size() + kDataSize + 1},
        std::uint64_t{1} << 32, std::uint64_t{1} << 63,
        std::numeric_limits<std::uint64_t>::max() - 7})
    expect_error(ErrorCode::kFormat,
                 {"header length (byte 0)", most, "found " + std::to_string(length)},
                 with_length(length));
  expect_error(ErrorCode::kFormat, {"JSON"}, with_length(kHeader.size() - 3));
  expect_error(ErrorCode::kFormat, {"JSON"}, with_length(kHeader.size() + 1));
  // A file longer than the format's limit of 100 MB; sparse, so it costs no space on the disk.
  const TempFolder folder;
  const std::string path = folder.write("big.safetensors", image("{}", 0, 100'000'001));
  std::filesystem::resize_file(path, 100'000'100);
  expect_error(ErrorCode::kFormat, {path, "2 to 100000000", "found 100000001"},
               [&] { SafetensorsFile{path}; });
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const Bytes bytes = image(kHeader, kDataSize);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    SCOPED_TRACE(size);
    const Bytes exact = test::exact_copy(std::span(bytes).first(size));
    EXPECT_FALSE(loads_or_throws([&] { parse(exact); }));
  }
}

TEST(Safetensors, EveryByteWithEdgeValuesLoadsOrThrows) {
  const Bytes original = image(kHeader, kDataSize);
  for (std::size_t at = 0; at < 8 + kHeader.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      // All values for the length, those that mean something to JSON for the text.
      if (at >= 8 && std::string_view("\"\\{}[],:0123456789-.eFBI \x01\x7f\x80\xff")
                             .find(static_cast<char>(value)) == std::string_view::npos)
        continue;
      SCOPED_TRACE("byte " + std::to_string(at) + " = " + std::to_string(value));
      Bytes bytes = original;
      bytes[at] = static_cast<std::byte>(value);
      loads_or_throws([&] { use(bytes); });
    }
  }
}

TEST(Safetensors, EveryNumberWithEdgeValuesLoadsOrThrows) {
  const std::string_view digits = "0123456789";
  for (std::size_t at = kHeader.find_first_of(digits); at != std::string_view::npos;) {
    const std::size_t end = kHeader.find_first_not_of(digits, at);
    for (const std::string_view value : {"0",
                                         "1",
                                         "-1",
                                         "2",
                                         "3",
                                         "4",
                                         "8",
                                         "41",
                                         "42",
                                         "43",
                                         "65536",
                                         "2147483648",
                                         "4294967296",
                                         "4611686018427387904",
                                         "4611686018427387905",
                                         "9223372036854775807",
                                         "9223372036854775808",
                                         "18446744073709551615",
                                         "18446744073709551616",
                                         "1e3",
                                         "1e400",
                                         "null",
                                         "\"8\"",
                                         "[]",
                                         "{}"}) {
      std::string header(kHeader);
      header.replace(at, end - at, value);
      SCOPED_TRACE(header);
      loads_or_throws([&] { use(image(header, kDataSize)); });
    }
    at = kHeader.find_first_of(digits, end);
  }
}

TEST(SafetensorsSample, TensorsAreThoseThatThePackageWrote) {
  const std::string folder = SLUICE_TEST_DATA "/safetensors/";
  const SafetensorsFile file(folder + "sample.safetensors");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  std::ifstream list(folder + "sample.tsv");
  std::size_t count = 0;
  for (std::string line; std::getline(list, line); ++count) {
    SCOPED_TRACE(line);
    std::istringstream columns(line);
    std::string name;
    std::string dtype;
    std::string extents;
    std::size_t bytes = 0;
    std::uint32_t crc = 0;
    std::getline(columns, name, '\t');
    std::getline(columns, dtype, '\t');
    std::getline(columns, extents, '\t');
    columns >> bytes >> crc;
    if (dtype == "I64") {
      EXPECT_THROW(file.tensor(name), Error);
      continue;
    }
    const SafetensorsTensor& tensor = file.tensor(name);
    EXPECT_EQ(to_string(tensor.type), dtype);
    Ints shape;
    std::istringstream numbers(extents);
    for (std::string extent; std::getline(numbers, extent, 'x');)
      shape.push_back(std::stoll(extent));
    EXPECT_EQ(tensor.shape, shape);
    ASSERT_EQ(tensor.bytes, bytes);
    EXPECT_EQ(test::crc32(tensor.span()), crc);
  }
  EXPECT_EQ(count, 6U);
  EXPECT_EQ(file.tensors().size(), 5U);
}

// --- The writer ---

class WrittenSafetensors : public ::testing::Test {
 protected:
  FileTensor make(std::string name, ElementType type, Ints shape) {
    std::size_t size = static_cast<std::size_t>(block_shape(type).bytes);
    for (const std::int64_t extent : shape) size *= static_cast<std::size_t>(extent);
    Bytes& data = contents_.emplace(name, Bytes(size)).first->second;
    for (std::size_t i = 0; i < size; ++i) data[i] = static_cast<std::byte>(5 * i + name.size());
    return {std::move(name), type, std::move(shape), data.data(), size};
  }
  void check(const FileTensor& read, const FileTensor& written) const {
    EXPECT_EQ(read.name, written.name);
    EXPECT_EQ(read.type, written.type);
    EXPECT_EQ(read.shape, written.shape);
    ASSERT_EQ(read.bytes, written.bytes);
    EXPECT_TRUE(std::equal(read.span().begin(), read.span().end(), written.span().begin()));
  }

  const TempFolder folder_;
  std::map<std::string, Bytes> contents_;
};

TEST_F(WrittenSafetensors, RoundTrip) {
  const FileTensor tensors[] = {make("z.weight", ElementType::kF32, {3, 5}),
                                make("a \"quoted\"\xc3\xa9", ElementType::kF16, {7}),
                                make("scalar", ElementType::kBF16, {}),
                                make("none", ElementType::kF32, {2, 0})};
  const std::string path = folder_.path("model.safetensors");
  write_safetensors(path, tensors, {{"key", "value"}});
  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata().size(), 1U);
  EXPECT_EQ(file.metadata().at("key"), "value");
  ASSERT_EQ(file.tensors().size(), std::size(tensors));
  for (const FileTensor& tensor : tensors) check(file.tensor(tensor.name), tensor);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.tensor("z.weight").data) % 8, 0U);

  write_safetensors(path, {});
  EXPECT_TRUE(SafetensorsFile(path).tensors().empty());
}

TEST_F(WrittenSafetensors, WriterRefusesWhatNoFileCanHold) {
  const auto write = [](FileTensor tensor) {
    return [tensor] {
      safetensors_bytes(std::vector<FileTensor>(1, tensor));
    };
  };
  expect_error(ErrorCode::kUnsupported, {"'q'", "Q8_0"}, write(make("q", ElementType::kQ8_0, {1})));
  expect_error(ErrorCode::kConfig, {"'__metadata__'"},
               write(make("__metadata__", ElementType::kF32, {1})));
  expect_error(ErrorCode::kText, {"UTF-8"}, write(make("\xff", ElementType::kF32, {1})));
  FileTensor wrong = make("t", ElementType::kF32, {2});
  wrong.shape = {3};
  expect_error(ErrorCode::kShape, {"'t'", "12 bytes", "found 8"}, write(wrong));
  const FileTensor t = make("same", ElementType::kF32, {1});
  expect_error(ErrorCode::kConfig, {"'same'"},
               [&] { safetensors_bytes(std::vector<FileTensor>(2, t)); });
  expect_error(ErrorCode::kIo, {"no/x.safetensors", "No such file"},
               [&] { write_safetensors(folder_.path("no/x.safetensors"), {}); });
}

// --- Models of one file or of shards ---

class ShardedModel : public WrittenSafetensors {
 protected:
  void shard(std::string_view file, std::initializer_list<FileTensor> tensors) {
    write_safetensors(folder_.path(file), std::vector<FileTensor>(tensors));
  }
  void index(std::string_view weight_map) {
    folder_.write("model.safetensors.index.json",
                  R"({"metadata":{"total_size":1},"weight_map":)" + std::string(weight_map) + "}");
  }
  void SetUp() override {
    shard("one.safetensors", {a_, b_});
    shard("two.safetensors", {c_});
    index(R"({"a":"one.safetensors","c":"two.safetensors","b":"one.safetensors"})");
  }
  auto load() {
    return [this] {
      SafetensorsModel{folder_.path()};
    };
  }

  const FileTensor a_ = make("a", ElementType::kF32, {2, 2});
  const FileTensor b_ = make("b", ElementType::kF16, {3});
  const FileTensor c_ = make("c", ElementType::kBF16, {1, 2, 3});
};

TEST_F(ShardedModel, JoinsTheShards) {
  for (const std::string& path : {folder_.path(), folder_.path("model.safetensors.index.json")}) {
    SafetensorsModel first(path);
    const SafetensorsModel model = std::move(first);
    EXPECT_EQ(model.path(), path);
    EXPECT_EQ(model.files().size(), 2U);
    EXPECT_EQ(model.tensors().size(), 3U);
    check(model.tensor("a"), a_);
    check(model.tensor("b"), b_);
    check(model.tensor("c"), c_);
    EXPECT_EQ(model.find_tensor("d"), nullptr);
    expect_error(ErrorCode::kFormat, {path, "'d'", "none among 3"}, [&] { model.tensor("d"); });
  }
}

TEST_F(ShardedModel, OneFileGoesBeforeAnIndex) {
  shard("model.safetensors", {c_});
  for (const std::string& path : {folder_.path(), folder_.path("model.safetensors")}) {
    const SafetensorsModel model(path);
    EXPECT_EQ(model.tensors().size(), 1U);
    check(model.tensor("c"), c_);
  }
}

TEST_F(ShardedModel, OtherDtypesAreListed) {
  folder_.write("model.safetensors", image(kHeader, kDataSize));
  const SafetensorsModel model(folder_.path());
  EXPECT_EQ(model.tensors().size(), 4U);
  EXPECT_EQ(model.unsupported().size(), 1U);
  EXPECT_TRUE(model.contains("ids"));
  expect_error(ErrorCode::kUnsupported, {"'ids'", "'I64'"}, [&] { model.tensor("ids"); });
}

TEST_F(ShardedModel, ShardsMayBeSymbolicLinks) {  // as in the caches of model hubs
  const TempFolder elsewhere;
  std::filesystem::rename(folder_.path("two.safetensors"), elsewhere.path("blob"));
  std::filesystem::create_symlink(elsewhere.path("blob"), folder_.path("two.safetensors"));
  check(SafetensorsModel(folder_.path()).tensor("c"), c_);
}

TEST_F(ShardedModel, DamageIsNamed) {
  const std::string index_path = folder_.path("model.safetensors.index.json");
  for (const std::string_view name :
       {"../two.safetensors", "/etc/passwd", "sub/two.safetensors", "..", ".", "", "a\\\\b",
        "two\\u0000.safetensors", "two\\n"}) {
    SCOPED_TRACE(name);
    index(R"({"a":"one.safetensors","c":")" + std::string(name) + "\"}");
    expect_error(ErrorCode::kFormat, {index_path, "'weight_map' 'c'", "a file name without"},
                 load());
  }
  index(R"({"a":7})");
  expect_error(ErrorCode::kFormat, {index_path, "'weight_map' 'a'", "integer 7"}, load());
  index("[]");
  expect_error(ErrorCode::kFormat, {index_path, "'weight_map'", "an object", "array of 0"}, load());
  index(R"({"a":"one.safetensors","a":"two.safetensors"})");
  expect_error(ErrorCode::kFormat, {index_path, "duplicate", "'a'"}, load());
  folder_.write("model.safetensors.index.json", "{}");
  expect_error(ErrorCode::kFormat, {index_path, "'weight_map'", "no such field"}, load());
  folder_.write("model.safetensors.index.json", "[]");
  expect_error(ErrorCode::kFormat, {index_path, "an object", "array of 0"}, load());

  index(R"({"a":"one.safetensors","c":"three.safetensors"})");
  expect_error(ErrorCode::kIo, {"three.safetensors", "No such file"}, load());
  index(R"({"a":"two.safetensors","c":"two.safetensors"})");
  expect_error(ErrorCode::kFormat, {"two.safetensors", "lacks", "'a'"}, load());
  shard("three.safetensors", {c_});
  index(R"({"c":"two.safetensors","a":"one.safetensors","x":"three.safetensors"})");
  expect_error(ErrorCode::kFormat, {"three.safetensors", "'x'"}, load());
  shard("three.safetensors", {a_, make("x", ElementType::kF32, {1})});
  expect_error(ErrorCode::kFormat, {"two shards", "three.safetensors", "'a'", "one.safetensors"},
               load());
  folder_.write("three.safetensors", "short");
  expect_error(ErrorCode::kFormat, {"three.safetensors", "header length (byte 0)"}, load());
}

TEST_F(ShardedModel, AFolderWithoutAModelIsNamed) {
  const TempFolder empty;
  expect_error(ErrorCode::kIo, {empty.path(), "model.safetensors", "neither"},
               [&] { SafetensorsModel{empty.path()}; });
  expect_error(ErrorCode::kIo, {"/none", "No such file"},
               [&] { SafetensorsModel{empty.path("none")}; });
}

TEST(SafetensorsIndex, EveryTruncationAndMutationLoadsOrThrows) {
  const std::string text =
      R"({"metadata":{"total_size":12},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})";
  for (std::size_t size = 0; size < text.size(); ++size) {
    const std::vector<char> exact(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_FALSE(loads_or_throws([&] {
      detail::parse_safetensors_index({exact.data(), size}, "index.json");
    }));
  }
  for (std::size_t at = 0; at < text.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::vector<char> exact(text.begin(), text.end());
      exact[at] = static_cast<char>(value);
      loads_or_throws([&] {
        for (const auto& [shard, tensors] :
             detail::parse_safetensors_index({exact.data(), exact.size()}, "index.json"))
          EXPECT_EQ(shard.find('/'), std::string::npos);
      });
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
