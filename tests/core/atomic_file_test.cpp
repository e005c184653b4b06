// SPDX-License-Identifier: MIT
#include "sluice/core/atomic_file.hpp"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

namespace fs = std::filesystem;

class AtomicFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "sluice_atomic_file_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::size_t entries() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
};

std::vector<std::byte> filled(std::size_t size, unsigned value) {
  return std::vector<std::byte>(size, static_cast<std::byte>(value));
}

ErrorDetail io_error(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo) << error.what();
    return error.detail();
  }
  ADD_FAILURE() << "no error";
  return {};
}

TEST_F(AtomicFile, WritesReadsAndReplaces) {
  const fs::path path = folder_ / "state.bin";
  for (unsigned size : {0U, 1U, 1000U, 3'000'001U, 5U}) {
    write_file_atomically(path, filled(size, 0x40 + size % 7));
    EXPECT_EQ(read_file(path), filled(size, 0x40 + size % 7));
    EXPECT_EQ(entries(), 1U) << "a temporary file stayed";
  }
}

TEST_F(AtomicFile, KeepsAccessRightsOfTheOldFile) {
  const fs::path path = folder_ / "private.bin";
  write_file_atomically(path, filled(10, 1));
  fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
  write_file_atomically(path, filled(20, 2));
  EXPECT_EQ(fs::status(path).permissions(), fs::perms::owner_read | fs::perms::owner_write);
}

TEST_F(AtomicFile, ReplacesALinkAndNotItsTarget) {
  const fs::path target = folder_ / "target.bin";
  const fs::path link = folder_ / "link.bin";
  write_file_atomically(target, filled(3, 1));
  fs::create_symlink(target, link);
  write_file_atomically(link, filled(4, 2));
  EXPECT_FALSE(fs::is_symlink(link));
  EXPECT_EQ(read_file(target), filled(3, 1));
  EXPECT_EQ(read_file(link), filled(4, 2));
}

TEST_F(AtomicFile, WorksInTheCurrentFolder) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  write_file_atomically("here.bin", filled(7, 7));
  EXPECT_EQ(read_file("here.bin"), filled(7, 7));
  fs::current_path(before);
}

TEST_F(AtomicFile, ErrorsNameThePathAndTheReason) {
  const fs::path missing = folder_ / "no_such_folder" / "state.bin";
  auto detail = io_error([&] { write_file_atomically(missing, filled(1, 1)); });
  EXPECT_NE(detail.where.find(missing.string()), std::string::npos);
  EXPECT_EQ(detail.found, "No such file or directory");
  detail = io_error([&] { read_file(folder_ / "absent.bin"); });
  EXPECT_EQ(detail.where, (folder_ / "absent.bin").string());
  detail = io_error([&] { read_file(folder_); });
  EXPECT_EQ(detail.expected, "a regular file");
  const fs::path fifo = folder_ / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  detail = io_error([&] { read_file(fifo); });  // must not wait for a writer
  EXPECT_EQ(detail.expected, "a regular file");
  // A folder cannot be replaced by a file.
  const fs::path taken = folder_ / "taken";
  fs::create_directory(taken);
  const std::size_t before = entries();
  io_error([&] { write_file_atomically(taken, filled(1, 1)); });
  EXPECT_EQ(entries(), before) << "a temporary file stayed";
}

// A rename needs no right to write to what it replaces: a device would be gone for everybody.
TEST_F(AtomicFile, OnlyFilesAreReplaced) {
  const fs::path fifo = folder_ / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const fs::path link = folder_ / "link";
  fs::create_symlink("/dev/null", link);
  const fs::path dangling = folder_ / "dangling";
  fs::create_symlink(folder_ / "nothing", dangling);
  const std::size_t before = entries();
  for (const fs::path& path : {fifo, link, folder_}) {
    for (const auto& call :
         {std::function<void()>([&] { write_file_atomically(path, filled(1, 1)); }),
          std::function<void()>([&] { require_writable(path); })}) {
      const ErrorDetail detail = io_error(call);
      EXPECT_EQ(detail.where, path.string());
      EXPECT_EQ(detail.found, path == folder_ ? "a folder" : "a device or pipe");
      EXPECT_NE(detail.expected.find("a regular file"), std::string::npos);
    }
  }
  EXPECT_TRUE(fs::is_fifo(fifo));
  EXPECT_TRUE(fs::is_symlink(link));
  EXPECT_EQ(entries(), before);
  write_file_atomically(dangling, filled(2, 3));
  EXPECT_EQ(read_file(dangling), filled(2, 3));
}

TEST_F(AtomicFile, CanBeAskedForBeforehand) {
  const fs::path path = folder_ / "state.bin";
  require_writable(path);
  EXPECT_EQ(entries(), 0U);
  write_file_atomically(path, filled(5, 1));
  require_writable(path);
  EXPECT_EQ(read_file(path), filled(5, 1));
  EXPECT_EQ(entries(), 1U);
  const ErrorDetail detail = io_error([&] { require_writable(folder_ / "none" / "state.bin"); });
  EXPECT_EQ(detail.found, "No such file or directory");
}

TEST_F(AtomicFile, AFailedWriteLeavesTheOldContentAndNothingElse) {
  const fs::path path = folder_ / "state.bin";
  write_file_atomically(path, filled(1000, 1));
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {  // a limit on file size: the write fails in the middle, as on a full disk
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{50'000, 50'000};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) ::_exit(2);
    try {
      write_file_atomically(path, filled(200'000, 2));
    } catch (const Error& error) {
      ::_exit(error.code() == ErrorCode::kIo ? 0 : 3);
    }
    ::_exit(4);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(read_file(path), filled(1000, 1));
  EXPECT_EQ(entries(), 1U);
}

// A process that writes content 1, 2, 3, ... and tells after each is killed at random moments: the
// file then holds the last content that was told of, or the one after it, whole.
TEST_F(AtomicFile, SurvivesAKillAtAnyMoment) {
  constexpr std::size_t kSize = 300'000;
  const fs::path path = folder_ / "state.bin";
  write_file_atomically(path, filled(kSize, 0));
  Random random(1);
  for (int trial = 0; trial < 40; ++trial) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (unsigned value = 1; value < 250; ++value) {
        write_file_atomically(path, filled(kSize, value));
        if (::write(ends[1], &value, 1) != 1) break;
      }
      ::_exit(0);
    }
    ::close(ends[1]);
    unsigned told = 0;
    const auto hear = [&] {
      char byte = 0;
      if (::read(ends[0], &byte, 1) != 1) return false;
      ++told;
      return true;
    };
    const auto start = std::chrono::steady_clock::now();
    ASSERT_TRUE(hear());
    const auto one_write = std::chrono::steady_clock::now() - start;
    std::this_thread::sleep_for(one_write * random.uniform() * 2);
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    while (hear()) continue;
    ::close(ends[0]);
    const auto content = read_file(path);
    ASSERT_EQ(content.size(), kSize);
    const auto value = std::to_integer<unsigned>(content.front());
    for (std::byte byte : content) ASSERT_EQ(byte, content.front()) << "two contents mixed";
    ASSERT_TRUE(value == told || value == told + 1) << value << " after " << told;
    write_file_atomically(path, filled(kSize, 0));
  }
}

TEST_F(AtomicFile, TwoWritersLeaveOneWholeContent) {
  const fs::path path = folder_ / "state.bin";
  const auto write = [&](unsigned value) {
    for (int i = 0; i < 30; ++i) write_file_atomically(path, filled(10'000 + value, value));
  };
  std::jthread first(write, 1U);
  std::jthread second(write, 2U);
  first.join();
  second.join();
  const auto content = read_file(path);
  const auto value = std::to_integer<unsigned>(content.at(0));
  EXPECT_EQ(content, filled(10'000 + value, value));
  EXPECT_EQ(entries(), 1U);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
