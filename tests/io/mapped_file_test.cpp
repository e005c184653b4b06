// SPDX-License-Identifier: MIT
#include "sluice/io/mapped_file.hpp"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "support/sanitizers.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;
using test::TempFolder;

std::string text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

static_assert(!std::is_copy_constructible_v<MappedFile>);
static_assert(std::is_nothrow_move_constructible_v<MappedFile>);

TEST(MappedFile, GivesContentAndPath) {
  const TempFolder folder;
  std::string content(100'000, '\0');  // more than one page
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i % 251);
  const MappedFile file(folder.write("data", content));
  EXPECT_EQ(file.path(), folder.path("data"));
  EXPECT_EQ(text_of(file), content);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.bytes().data()) % 4096, 0U);
}

TEST(MappedFile, EmptyFileIsAnEmptySpan) {
  const TempFolder folder;
  const MappedFile file(folder.write("empty", ""));
  EXPECT_TRUE(file.bytes().empty());
}

TEST(MappedFile, MovingKeepsTheAddresses) {
  const TempFolder folder;
  MappedFile first(folder.write("first", "one"));
  const std::byte* const address = first.bytes().data();
  MappedFile second = std::move(first);
  EXPECT_EQ(second.bytes().data(), address);
  EXPECT_TRUE(first.bytes().empty());
  MappedFile third(folder.write("third", "three"));
  third = std::move(second);
  EXPECT_EQ(third.bytes().data(), address);
  EXPECT_EQ(text_of(third), "one");
}

TEST(MappedFile, SurvivesReplacementOfTheFile) {
  const TempFolder folder;
  const MappedFile file(folder.write("data", "old"));
  std::filesystem::rename(folder.write("new", "NEW!"), folder.path("data"));
  EXPECT_EQ(text_of(file), "old");
}

TEST(MappedFile, ErrorsNameThePathAndTheReason) {
  const TempFolder folder;
  expect_error(ErrorCode::kIo, {folder.path("absent"), "No such file"},
               [&] { MappedFile{folder.path("absent")}; });
  expect_error(ErrorCode::kIo, {folder.path(), "regular file", "a directory"},
               [&] { MappedFile{folder.path()}; });
  ASSERT_EQ(::mkfifo(folder.path("pipe").c_str(), 0600), 0);
  expect_error(ErrorCode::kIo, {folder.path("pipe"), "regular file"},  // and does not wait
               [&] { MappedFile{folder.path("pipe")}; });
  expect_error(ErrorCode::kIo, {"zero byte"},
               [&] { MappedFile{folder.write("data", "x") + std::string("\0y", 2)}; });
  if (::geteuid() != 0) {  // nothing is forbidden to root
    ASSERT_EQ(::chmod(folder.path("data").c_str(), 0), 0);
    expect_error(ErrorCode::kIo, {folder.path("data"), "Permission denied"},
                 [&] { MappedFile{folder.path("data")}; });
  }
}

TEST(ReadPages, TellsEveryPieceAndLocks) {
  const TempFolder folder;
  constexpr std::size_t kSize = (std::size_t{33} << 20) + 5;  // two whole pieces and some
  const MappedFile file(folder.write("data", std::string(kSize, 'x')));
  // Whether a process may depends on its limit and its privileges, and the system knows.
  const bool may_lock = ::mlock(file.bytes().data(), kSize) == 0;
  ::munlock(file.bytes().data(), kSize);
  for (const bool lock : {false, true}) {
    if (lock && !may_lock) {
      expect_error(ErrorCode::kIo, {folder.path("data"), "ulimit -l"},
                   [&] { read_pages(file.bytes(), file.path(), lock); });
      continue;
    }
    std::vector<std::size_t> told;
    read_pages(file.bytes(), file.path(), lock, [&](std::size_t done) { told.push_back(done); });
    EXPECT_EQ(told,
              (std::vector<std::size_t>{std::size_t{16} << 20, std::size_t{32} << 20, kSize}));
    std::vector<unsigned char> resident((kSize + 4095) / 4096);
    ASSERT_EQ(::mincore(const_cast<std::byte*>(file.bytes().data()), kSize, resident.data()), 0);
    EXPECT_TRUE(std::all_of(resident.begin(), resident.end(), [](auto page) { return page & 1; }));
  }
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word && word != "VmLck:") {
  }
  std::size_t locked_kib = 0;
  // The sanitizers' runtime answers mlock() without locking.
  if (status >> locked_kib && may_lock && !SLUICE_TEST_SANITIZED) {
    EXPECT_GE(locked_kib, kSize / 1024);
  }
}

TEST(ReadPages, AnEmptyMappingIsRead) {
  read_pages({}, "nothing", true, [](std::size_t) { FAIL(); });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
