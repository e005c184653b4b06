// SPDX-License-Identifier: MIT
/// A process that saves its session in a loop is killed, again and again, at random moments: the
/// file always holds one of the states that it saved, whole, and never an older one than the last
/// that was finished. For tests of every backend that survives a fork.
#pragma once

#include <gtest/gtest.h>

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/session.hpp"
#include "support/property.hpp"

namespace sluice::test {

/// With a folder for what is saved.
class KilledSession : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "sluice_killed_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path() const { return (folder_ / "state").string(); }
  std::filesystem::path folder_;
};

inline SessionOptions killed_options() {
  SessionOptions options;
  options.cache.num_sink_tokens = 2;
  options.cache.window_size = 8;
  options.cache.chunk_size = 4;
  options.sampler.temperature = 1;
  options.history = 8;
  return options;
}

inline constexpr std::int64_t kSaveBegins = -1;

/// The child: restores, then writes a token and saves, for ever, and tells the parent that a save
/// begins, and after it how many tokens the session has written.
template <class Make>
[[noreturn]] void save_for_ever(Make&& make, const std::string& path, int pipe) {
  try {
    auto session = make();
    session.restore(path);
    for (;;) {
      session.step();
      static_cast<void>(session.logits());  // what a save would compute first
      if (::write(pipe, &kSaveBegins, sizeof kSaveBegins) != sizeof kSaveBegins) break;
      session.save(path);
      const std::int64_t position = session.position();
      if (::write(pipe, &position, sizeof position) != sizeof position) break;
    }
  } catch (...) {
  }
  ::_exit(1);
}

/// make(): an empty session; path: the file, alone in its folder.
template <class Make>
void expect_kills_survived(Make&& make, const std::string& path, int kills) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  auto reference = make();  // what every saved state must continue as
  reference.accept(std::vector<Token>{1, 2, 3, 4, 5});
  reference.save(path);
  Random random(1);
  std::int64_t at_least = reference.position();
  int inside_a_save = 0;
  std::int64_t saves = 0;
  for (int kill = 0; kill < kills; ++kill) {
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(pipe[0]);
      save_for_ever(make, path, pipe[1]);
    }
    ::close(pipe[1]);
    // Killed a random time after one of its first saves has ended; or, every other child, after the
    // next has begun, within the time that the one before it took.
    const std::int64_t first = between(random, 0, 2);
    std::int64_t told = 0;
    const auto hear = [&] {
      ASSERT_EQ(::read(pipe[0], &told, sizeof told), static_cast<ssize_t>(sizeof told));
    };
    std::int64_t range = 1'500'000;
    for (std::int64_t i = 0; i <= first; ++i) {
      ASSERT_NO_FATAL_FAILURE(hear());
      ASSERT_EQ(told, kSaveBegins);
      const std::int64_t begin = monotonic_ns();
      ASSERT_NO_FATAL_FAILURE(hear());
      if (kill % 2 == 1) range = monotonic_ns() - begin;
      at_least = told;
      ++saves;
    }
    if (kill % 2 == 1) {
      ASSERT_NO_FATAL_FAILURE(hear());
      ASSERT_EQ(told, kSaveBegins);
    }
    const std::int64_t until = monotonic_ns() + between(random, 0, range);
    while (monotonic_ns() < until) {
    }
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child failed by itself";
    while (::read(pipe[0], &told, sizeof told) == static_cast<ssize_t>(sizeof told)) {
      if (told == kSaveBegins) continue;
      at_least = told;
      ++saves;
    }
    ::close(pipe[0]);

    auto restored = make();
    ASSERT_NO_THROW(restored.restore(path)) << "kill " << kill;
    // The last save that was told, or the one behind it, killed between its rename and its word.
    ASSERT_GE(restored.position(), at_least);
    ASSERT_LE(restored.position(), at_least + 1);
    inside_a_save +=
        static_cast<int>(std::distance(std::filesystem::directory_iterator(folder), {})) - 1;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
      if (entry.path() != path) std::filesystem::remove(entry.path());
    while (reference.position() < restored.position()) reference.step();
    ASSERT_EQ(reference.position(), restored.position());
    ASSERT_TRUE(std::ranges::equal(reference.logits(), restored.logits())) << "kill " << kill;
  }
  testing::Test::RecordProperty("kills_that_left_a_temporary_file", std::to_string(inside_a_save));
  EXPECT_GT(inside_a_save, 0) << "no kill fell into a save: the test proves nothing";
  EXPECT_GE(saves, kills);
}

}  // namespace sluice::test
