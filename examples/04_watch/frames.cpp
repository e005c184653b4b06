// SPDX-License-Identifier: MIT
#include "frames.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>
#include <utility>

#include "sluice/core/error.hpp"

namespace watch {

using sluice::Error;
using sluice::ErrorCode;

void CloseFile::operator()(std::FILE* file) const {
  if (file != stdin) std::fclose(file);
  if (child > 0) {
    ::kill(child, SIGTERM);
    ::waitpid(child, nullptr, 0);
  }
}

Pictures Pictures::generated(const PictureFormat& format, std::int64_t most) {
  return {format, most};
}

Pictures Pictures::from_stdin(const PictureFormat& format, std::int64_t most) {
  Pictures pictures(format, most);
  pictures.name_ = "stdin";
  pictures.file_ = {stdin, CloseFile{}};
  return pictures;
}

Pictures Pictures::from_video(const std::string& path, const PictureFormat& format,
                              std::int64_t most) {
  const auto fail = [&](const char* what) {
    throw Error(ErrorCode::kIo,
                {what, path, "ffmpeg", "a program to decode with", std::strerror(errno)});
  };
  int ends[2];
  if (::pipe(ends) != 0) fail("no pipe");
  const std::string filter = "fps=" + std::to_string(format.fps) +
                             ",scale=" + std::to_string(format.width) + ":" +
                             std::to_string(format.height);
  // A path that begins with a dash is no option.
  const std::string input = "file:" + path;
  const pid_t child = ::fork();
  if (child < 0) fail("ffmpeg cannot be started");
  if (child == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::close(ends[0]);
    ::close(ends[1]);
    ::execlp("ffmpeg", "ffmpeg", "-v", "error", "-nostdin", "-i", input.c_str(), "-vf",
             filter.c_str(), "-f", "rawvideo", "-pix_fmt", "rgb24", "-", nullptr);
    ::_exit(127);
  }
  ::close(ends[1]);
  Pictures pictures(format, most);
  pictures.name_ = path;
  pictures.file_ = {::fdopen(ends[0], "rb"), CloseFile{child}};
  return pictures;
}

bool Pictures::read(Frame& frame) {
  if (next_ >= most_) return false;
  frame.index = next_;
  if (file_ == nullptr) {
    std::uint8_t* pixel = frame.pixels.data();
    for (std::int64_t f = 0; f < format_.frames; ++f) {
      const std::int64_t time = next_ * format_.frames + f;
      const double angle = static_cast<double>(time) * 0.11;
      const auto size = static_cast<double>(std::min(format_.width, format_.height));
      const double x0 = static_cast<double>(format_.width) / 2 + 0.3 * size * std::cos(angle);
      const double y0 = static_cast<double>(format_.height) / 2 + 0.3 * size * std::sin(angle);
      for (std::int64_t y = 0; y < format_.height; ++y)
        for (std::int64_t x = 0; x < format_.width; ++x, pixel += 3) {
          const bool disc =
              std::hypot(static_cast<double>(x) - x0, static_cast<double>(y) - y0) < 0.18 * size;
          const auto stripe = static_cast<std::uint8_t>((x + time) / 8 % 2 == 0 ? 200 : 60);
          pixel[0] = disc ? 230 : stripe;
          pixel[1] = disc ? 40 : static_cast<std::uint8_t>(y * 255 / format_.height);
          pixel[2] = disc ? 30 : stripe;
        }
    }
    ++next_;
    return true;
  }
  const std::size_t got = std::fread(frame.pixels.data(), 1, format_.bytes(), file_.get());
  if (got == format_.bytes()) {
    ++next_;
    return true;
  }
  if (std::ferror(file_.get()) != 0)
    throw Error(ErrorCode::kIo, {"frames cannot be read", name_, "frame " + std::to_string(next_),
                                 "", std::strerror(errno)});
  if (got != 0)
    throw Error(ErrorCode::kFormat,
                {"a frame is cut short", name_, "frame " + std::to_string(next_),
                 std::to_string(format_.bytes()) + " bytes", std::to_string(got)});
  if (next_ == 0)
    throw Error(ErrorCode::kIo, {"no frame came", name_, "frame 0",
                                 std::to_string(format_.bytes()) + " bytes", "the end"});
  return false;
}

bool Pictures::merge(Frame& into, Frame& next) const {
  std::swap(into, next);
  return true;
}

}  // namespace watch
