// SPDX-License-Identifier: MIT
// Pictures for the watcher: a scene made up on the spot, raw frames from a pipe, or a video file
// that ffmpeg decodes.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace watch {

/// What is encoded together: 8-bit RGB, [frames, height, width, 3].
struct Picture {
  std::int64_t index = -1;  // in the stream, from 0
  std::vector<std::uint8_t> pixels;
};

/// What a source delivers.
struct PictureFormat {
  std::int64_t width = 0;
  std::int64_t height = 0;
  double fps = 0;           // frames a second
  std::int64_t frames = 1;  // of a picture

  std::size_t bytes() const { return static_cast<std::size_t>(frames * width * height * 3); }
  double pictures_per_second() const { return fps / static_cast<double>(frames); }
};

/// Ends the program behind a pipe too.
struct CloseFile {
  pid_t child = 0;
  void operator()(std::FILE* file) const;
};

/// A sluice::MergingSource: picture i is complete at i / pictures_per_second(); of two that are
/// joined, the newer one stays.
class Pictures {
 public:
  using Frame = Picture;

  /// A disc that goes round before stripes, `most` pictures of it.
  static Pictures generated(const PictureFormat& format, std::int64_t most);
  /// Raw frames on stdin, one behind the other.
  static Pictures from_stdin(const PictureFormat& format, std::int64_t most);
  /// Whatever ffmpeg reads, scaled to the format's size and rate.
  /// \throws sluice::Error(kIo) when it cannot be started.
  static Pictures from_video(const std::string& path, const PictureFormat& format,
                             std::int64_t most);

  Frame make_frame() const { return {-1, std::vector<std::uint8_t>(format_.bytes())}; }
  /// \throws sluice::Error(kIo) for a read error, Error(kFormat) for a frame that is cut short.
  bool read(Frame& frame);
  std::int64_t time_ns(const Frame& frame) const {
    return static_cast<std::int64_t>(static_cast<double>(frame.index) * 1e9 /
                                     format_.pictures_per_second());
  }
  bool merge(Frame& into, Frame& next) const;

 private:
  Pictures(const PictureFormat& format, std::int64_t most) : format_(format), most_(most) {}

  PictureFormat format_;
  std::int64_t most_;
  std::int64_t next_ = 0;
  std::string name_;
  std::unique_ptr<std::FILE, CloseFile> file_;  // null: generated
};

}  // namespace watch
