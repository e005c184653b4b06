// SPDX-License-Identifier: MIT
/// Pictures one behind the other: PPM and PGM files and streams of them, Y4M, raw frames, and any
/// video through a pipe from ffmpeg. Nothing seeks. The content is untrusted: sizes are checked
/// before memory is taken.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/byte_source.hpp"
#include "sluice/io/detail/child_process.hpp"

namespace sluice {

/// What all pictures of a stream have in common.
struct PictureFormat {
  std::int64_t width = 0;     ///< pixels
  std::int64_t height = 0;    ///< pixels
  std::int64_t channels = 3;  ///< 3: R, G, B; 1: grey

  std::int64_t bytes() const noexcept { return width * height * channels; }
  friend bool operator==(const PictureFormat&, const PictureFormat&) = default;
};

/// A picture: 8 bits a channel, interleaved, row by row from the top. [height, width, channels]
struct Picture {
  PictureFormat format;
  std::vector<std::uint8_t> pixels;
  std::int64_t index = 0;    ///< of the frame, from 0
  std::int64_t time_ns = 0;  ///< media time: (index + 1) / rate, when the frame is complete
};

/// Where pictures come from. All of a stream have one format: a frame of another size is an error.
class PictureReader {
 public:
  virtual ~PictureReader() = default;
  /// Reads the next picture; false at the end. Memory is taken for the first one only.
  /// \throws Error(kFormat) "frame size changed" for a picture of another format than the first,
  /// "truncated" and what else the reader says.
  virtual bool read(Picture& picture) = 0;
  /// What errors call it.
  virtual const std::string& name() const = 0;
};

namespace detail {

inline constexpr std::int64_t kMaxPictureSide = 1 << 15;
inline constexpr std::int64_t kMaxPicturePixels = 1 << 26;

inline std::string text_of(const PictureFormat& format) {
  return std::to_string(format.width) + " x " + std::to_string(format.height) +
         (format.channels == 1 ? " grey" : "");
}

inline void check_picture_size(const ByteSource& source, std::uint64_t offset, const char* field,
                               std::int64_t width, std::int64_t height) {
  const auto sound = [](std::int64_t side) {
    return side >= 1 && side <= kMaxPictureSide;
  };
  if (!sound(width) || !sound(height) || width * height > kMaxPicturePixels)
    source.fail_at(offset, "picture size out of range", field,
                   "sides of 1 to 32768, at most 2^26 pixels",
                   std::to_string(width) + " x " + std::to_string(height));
}

/// The picture's number, time and format; the first one's format is that of all.
class PictureClock {
 public:
  explicit PictureClock(double rate) : period_ns_(1e9 / rate) {
    if (!(rate > 0) || !std::isfinite(period_ns_))
      throw Error(ErrorCode::kConfig, {"option out of range", "PictureReader", "rate",
                                       "frames a second, above 0", std::to_string(rate)});
  }
  void begin(Picture& picture, const PictureFormat& format, const ByteSource& source,
             std::uint64_t offset) {
    if (!first_) first_ = format;
    if (format != *first_)
      source.fail_at(offset, "frame size changed", "frame " + std::to_string(next_),
                     text_of(*first_), text_of(format));
    picture.format = format;
    picture.index = next_++;
    picture.time_ns = std::llround(static_cast<double>(next_) * period_ns_);
  }
  std::int64_t next() const noexcept { return next_; }

 private:
  double period_ns_;
  std::optional<PictureFormat> first_;
  std::int64_t next_ = 0;
};

// Reads `size` bytes; false if there is none at all. Memory grows with what is there, not with what
// a header says.
inline bool read_pixels(ByteSource& source, std::vector<std::uint8_t>& pixels, std::int64_t size,
                        const char* field) {
  constexpr std::size_t kPiece = 1 << 20;
  const auto wanted = static_cast<std::size_t>(size);
  const std::uint64_t begin = source.offset();
  std::size_t done = 0;
  while (done < wanted) {
    const std::size_t end = pixels.size() == wanted ? wanted : std::min(wanted, done + kPiece);
    pixels.resize(end);
    const std::size_t count = source.read(std::as_writable_bytes(std::span(pixels).subspan(done)));
    done += count;
    if (done == 0) return false;
    if (done < end)
      source.fail_at(begin, "truncated picture", field, std::to_string(size) + " bytes",
                     std::to_string(done));
  }
  return true;
}

// The same behind a header, where pixels must follow.
inline void expect_pixels(ByteSource& source, std::vector<std::uint8_t>& pixels, std::int64_t size,
                          const char* field) {
  if (!read_pixels(source, pixels, size, field))
    source.fail_at(source.offset(), "truncated picture", field, std::to_string(size) + " bytes",
                   "0");
}

}  // namespace detail

/// Pictures in Netpbm's binary forms, P6 (PPM, colour) and P5 (PGM, grey), 8 bits, one behind the
/// other in one source: a file, or what `ffmpeg -f image2pipe -c:v ppm` writes.
/// Source: the ppm and pgm manual pages of Netpbm, without comments inside the raster.
class NetpbmReader final : public PictureReader {
 public:
  /// rate: frames a second, for time stamps. \throws Error(kConfig).
  NetpbmReader(ByteSource source, double rate) : source_(std::move(source)), clock_(rate) {}

  bool read(Picture& picture) override {
    const std::uint64_t begin = source_.offset();
    std::array<std::byte, 1> letter;
    if (source_.read(letter) == 0) return false;
    const char kind = letter[0] == std::byte{'P'} ? next_letter("magic number") : '\0';
    if (kind != '5' && kind != '6')
      source_.fail_at(begin, "not a binary PPM or PGM picture", "magic number", "P5 or P6",
                      kind == '\0' ? "another letter" : std::string{'P', kind});
    if (!is_space(next_letter("magic number")))
      source_.fail_at(begin, "not a binary PPM or PGM picture", "magic number",
                      "white space behind it", "another letter");
    const std::int64_t width = number("width");
    const std::int64_t height = number("height");
    detail::check_picture_size(source_, begin, "width and height", width, height);
    const std::int64_t most = number("largest value");
    if (most != 255)
      source_.fail_at(begin, "picture depth is not implemented", "largest value", "255",
                      std::to_string(most), ErrorCode::kUnsupported);
    clock_.begin(picture, {width, height, kind == '6' ? 3 : 1}, source_, begin);
    detail::expect_pixels(source_, picture.pixels, picture.format.bytes(), "pixels");
    return true;
  }
  const std::string& name() const override { return source_.name(); }

 private:
  static bool is_space(char letter) {
    return letter == ' ' || letter == '\n' || letter == '\t' || letter == '\r' || letter == '\v' ||
           letter == '\f';
  }
  char next_letter(const char* field) {
    std::array<std::byte, 1> letter;
    const std::uint64_t begin = source_.offset();
    if (source_.read(letter) == 0)
      source_.fail_at(begin, "truncated picture", field, "another letter", "the end");
    return static_cast<char>(letter[0]);
  }
  // A number with white space and comments before it and one white space behind it.
  std::int64_t number(const char* field) {
    const std::uint64_t begin = source_.offset();
    char letter = next_letter(field);
    while (is_space(letter) || letter == '#') {
      if (letter == '#')
        while (letter != '\n') letter = next_letter(field);
      letter = next_letter(field);
    }
    std::int64_t value = 0;
    int digits = 0;
    for (; letter >= '0' && letter <= '9' && digits < 9; ++digits) {
      value = 10 * value + (letter - '0');
      letter = next_letter(field);
    }
    if (digits == 0 || !is_space(letter))
      source_.fail_at(begin, "not a number", field, "1 to 9 digits and white space",
                      "another letter");
    return value;
  }

  ByteSource source_;
  detail::PictureClock clock_;
};

/// Frames of one size without headers, R, G, B or grey: `ffmpeg -f rawvideo -pix_fmt rgb24`. A size
/// that is not the stream's shows as a cut-off last frame at best: prefer a form with headers.
class RawVideoReader final : public PictureReader {
 public:
  /// \throws Error(kConfig, kFormat).
  RawVideoReader(ByteSource source, PictureFormat format, double rate)
      : source_(std::move(source)), format_(format), clock_(rate) {
    detail::check_picture_size(source_, 0, "width and height", format.width, format.height);
    if (format.channels != 1 && format.channels != 3)
      throw Error(ErrorCode::kConfig, {"option out of range", "RawVideoReader", "channels",
                                       "1 or 3", std::to_string(format.channels)});
  }
  bool read(Picture& picture) override {
    const std::uint64_t begin = source_.offset();
    if (!detail::read_pixels(source_, picture.pixels, format_.bytes(), "frame")) return false;
    clock_.begin(picture, format_, source_, begin);
    return true;
  }
  const std::string& name() const override { return source_.name(); }

 private:
  ByteSource source_;
  PictureFormat format_;
  detail::PictureClock clock_;
};

/// YUV4MPEG2: 8 bits, 4:2:0 in its placements, 4:2:2, 4:4:4 and mono, turned into R, G, B (mono
/// into grey) by ITU-R BT.601, limited range unless the header says XCOLORRANGE=FULL; chroma is
/// repeated, not interpolated. The rate is the header's. Source: mjpegtools' yuv4mpeg(5).
/// Deviation: interlaced frames are given as they lie.
class Y4mReader final : public PictureReader {
 public:
  /// Reads the header. rate: frames a second; 0: the header's.
  /// \throws Error(kFormat) naming the parameter; kUnsupported for another sampling or depth.
  explicit Y4mReader(ByteSource source, double rate = 0) : source_(std::move(source)) {
    const std::string header = line("header");
    if (header.substr(0, 9) != "YUV4MPEG2" || (header.size() > 9 && header[9] != ' '))
      source_.fail_at(0, "not a Y4M stream", "header", "YUV4MPEG2", "other letters");
    std::string sampling = "420";
    std::size_t at = 9;
    while (at < header.size()) {
      const std::size_t end = std::min(header.find(' ', at + 1), header.size());
      const std::string_view field = std::string_view(header).substr(at + 1, end - at - 1);
      at = end;
      if (field.empty()) continue;
      const std::string_view value = field.substr(1);
      if (field[0] == 'W') format_.width = number(value, "width");
      if (field[0] == 'H') format_.height = number(value, "height");
      if (field[0] == 'C') sampling = value;
      if (field == "XCOLORRANGE=FULL") full_range_ = true;
      if (field[0] == 'F') {
        const std::size_t colon = value.find(':');
        if (colon == std::string_view::npos)
          source_.fail_at(0, "not a fraction", "frame rate", "number:number", std::string(value));
        numerator_ = number(value.substr(0, colon), "frame rate");
        denominator_ = number(value.substr(colon + 1), "frame rate");
      }
    }
    detail::check_picture_size(source_, 0, "width and height", format_.width, format_.height);
    if (sampling == "mono") {
      format_.channels = 1;
    } else if (sampling == "420" || sampling == "420jpeg" || sampling == "420mpeg2" ||
               sampling == "420paldv") {
      across_ = down_ = 2;
    } else if (sampling == "422") {
      across_ = 2;
    } else if (sampling != "444") {
      source_.fail_at(0, "sampling is not implemented", "colour space",
                      "420, 420jpeg, 420mpeg2, 420paldv, 422, 444 or mono", sampling,
                      ErrorCode::kUnsupported);
    }
    if (rate == 0 && (numerator_ < 1 || denominator_ < 1))
      source_.fail_at(0, "frame rate out of range", "frame rate", "above 0",
                      std::to_string(numerator_) + ":" + std::to_string(denominator_));
    rate_ = rate != 0 ? rate : static_cast<double>(numerator_) / static_cast<double>(denominator_);
    clock_.emplace(rate_);
    chroma_width_ = (format_.width + across_ - 1) / across_;
    chroma_height_ = (format_.height + down_ - 1) / down_;
    planes_size_ = format_.width * format_.height;
    if (format_.channels == 3) planes_size_ += 2 * chroma_width_ * chroma_height_;
  }

  /// Frames a second.
  double rate() const noexcept { return rate_; }
  const PictureFormat& format() const noexcept { return format_; }

  bool read(Picture& picture) override {
    const std::uint64_t begin = source_.offset();
    std::array<std::byte, 1> front;
    if (source_.read(front) == 0) return false;
    const std::string header = static_cast<char>(front[0]) + line("frame header");
    if (header.substr(0, 5) != "FRAME" || (header.size() > 5 && header[5] != ' '))
      source_.fail_at(begin, "not a Y4M frame", "frame header", "FRAME", "other letters");
    clock_->begin(picture, format_, source_, begin);
    detail::expect_pixels(source_, planes_, planes_size_, "frame");
    picture.pixels.resize(static_cast<std::size_t>(format_.bytes()));
    convert(picture.pixels.data());
    return true;
  }
  const std::string& name() const override { return source_.name(); }

 private:
  std::string line(const char* field) {
    constexpr std::size_t kMost = 1024;
    const std::uint64_t begin = source_.offset();
    std::string text;
    std::array<std::byte, 1> letter;
    for (;;) {
      if (source_.read(letter) == 0)
        source_.fail_at(begin, "truncated Y4M stream", field, "a line", "the end");
      if (letter[0] == std::byte{'\n'}) return text;
      if (text.size() == kMost)
        source_.fail_at(begin, "line is too long", field, "at most " + std::to_string(kMost),
                        "more");
      text.push_back(static_cast<char>(letter[0]));
    }
  }
  std::int64_t number(std::string_view text, const char* field) const {
    std::int64_t value = 0;
    bool sound = !text.empty() && text.size() <= 9;
    for (const char letter : text) {
      sound = sound && letter >= '0' && letter <= '9';
      if (!sound) break;
      value = 10 * value + (letter - '0');
    }
    if (!sound)
      source_.fail_at(0, "not a number", field, "1 to 9 digits",
                      std::string(text.substr(0, 20)) + " (text)");
    return value;
  }

  void convert(std::uint8_t* pixels) const {
    const std::uint8_t* const luma = planes_.data();
    if (format_.channels == 1) {
      std::copy_n(luma, planes_.size(), pixels);
      return;
    }
    const std::uint8_t* const blue = luma + format_.width * format_.height;
    const std::uint8_t* const red = blue + chroma_width_ * chroma_height_;
    const float luma_scale = full_range_ ? 1.0F : 255.0F / 219.0F;
    const float chroma_scale = full_range_ ? 1.0F : 255.0F / 224.0F;
    const float black = full_range_ ? 0.0F : 16.0F;
    const auto byte = [](float value) {
      return static_cast<std::uint8_t>(std::clamp(value + 0.5F, 0.0F, 255.0F));
    };
    for (std::int64_t y = 0; y < format_.height; ++y) {
      for (std::int64_t x = 0; x < format_.width; ++x) {
        const std::int64_t chroma = y / down_ * chroma_width_ + x / across_;
        const float l = luma_scale * (static_cast<float>(luma[y * format_.width + x]) - black);
        const float b = chroma_scale * (static_cast<float>(blue[chroma]) - 128.0F);
        const float r = chroma_scale * (static_cast<float>(red[chroma]) - 128.0F);
        // From the luma weights of BT.601: 0.299, 0.587, 0.114.
        *pixels++ = byte(l + 1.402F * r);
        *pixels++ = byte(l - 0.344136F * b - 0.714136F * r);
        *pixels++ = byte(l + 1.772F * b);
      }
    }
  }

  ByteSource source_;
  PictureFormat format_;
  std::int64_t numerator_ = 0;
  std::int64_t denominator_ = 0;
  std::int64_t across_ = 1;  // luma samples a chroma sample
  std::int64_t down_ = 1;
  std::int64_t chroma_width_ = 0;
  std::int64_t chroma_height_ = 0;
  bool full_range_ = false;
  double rate_ = 0;
  std::optional<detail::PictureClock> clock_;
  std::int64_t planes_size_ = 0;
  std::vector<std::uint8_t> planes_;  // Y, Cb, Cr of a frame
};

/// PPM and PGM files, one picture each, in the order of the list.
class PictureFiles final : public PictureReader {
 public:
  /// \throws Error(kConfig).
  PictureFiles(std::vector<std::string> paths, double rate)
      : paths_(std::move(paths)), clock_(rate) {}
  bool read(Picture& picture) override {
    const auto next = static_cast<std::size_t>(clock_.next());
    if (next == paths_.size()) return false;
    ByteSource source = ByteSource::open(paths_[next]);
    NetpbmReader reader(std::move(source), 1);
    if (!reader.read(picture))
      throw Error(ErrorCode::kFormat,
                  {"no picture in the file", paths_[next], "magic number", "P5 or P6", "the end"});
    const PictureFormat format = picture.format;
    clock_.begin(picture, format, ByteSource::of_memory({}, paths_[next]), 0);
    return true;
  }
  const std::string& name() const override { return name_; }

 private:
  std::vector<std::string> paths_;
  std::string name_ = "picture files";
  detail::PictureClock clock_;
};

/// What ffmpeg is asked for.
struct FfmpegVideoConfig {
  std::string program = "ffmpeg";  ///< looked for in PATH
  /// Arguments before the input, for devices and formats: {"-f", "v4l2"}.
  std::vector<std::string> input_arguments = {};
  double rate = 2;          ///< frames a second: ffmpeg repeats or leaves out frames
  std::int64_t width = 0;   ///< pixels; 0: the video's, or what keeps its shape
  std::int64_t height = 0;  ///< the same
  /// Asked ten times a second while pictures are waited for: true ends them, whatever ffmpeg does
  /// (a pipe that nobody writes, a camera that is gone). Null: never.
  bool (*stop_when)() = nullptr;
};

/// Any video that ffmpeg reads: files, devices, network streams. ffmpeg runs beside this program
/// and scales; it is started without a shell, so a path is a path whatever letters it has. Its
/// failure is reported after the frames that came before it.
class FfmpegVideo final : public PictureReader {
 public:
  /// \throws Error(kIo) if the program cannot be started; kConfig naming the field.
  FfmpegVideo(std::string input, const FfmpegVideoConfig& config)
      : name_(input),
        process_(arguments(std::move(input), config)),
        stops_(config.stop_when),
        reader_(output(), config.rate) {}

  /// False also where stop_when answered true. \throws Error(kIo) with ffmpeg's status and last
  /// words if it fails.
  bool read(Picture& picture) override {
    std::optional<Error> cut;
    try {
      if (reader_.read(picture)) return true;
    } catch (const Error& error) {
      // Refused while more comes: whoever waited for ffmpeg's end now would wait for ever, since
      // nobody reads what it goes on writing.
      std::byte more{};
      if (output().read_some(std::span(&more, 1)) > 0) throw;
      cut = error;
    }
    if (stops_ != nullptr && stops_()) return false;
    process_.finish();  // its own words, if it has any, say more than where the pictures end
    if (cut) throw *cut;
    return false;
  }
  const std::string& name() const override { return name_; }

 private:
  ByteSource output() const {
    ByteSource source = process_.output(name_);
    source.stop_when(stops_);
    return source;
  }

  static std::vector<std::string> arguments(std::string input, const FfmpegVideoConfig& config) {
    const auto require = [](bool sound, const char* field, const char* expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig, {"option out of range", "FfmpegVideoConfig", field,
                                         expected, std::to_string(found)});
    };
    require(std::isfinite(config.rate) && config.rate > 0, "rate", "frames a second, above 0",
            config.rate);
    for (const auto& [field, side] :
         {std::pair{"width", config.width}, std::pair{"height", config.height}})
      require(side >= 0 && side <= detail::kMaxPictureSide, field, "0 to 32768",
              static_cast<double>(side));
    std::array<char, 400> rate{};  // of the longest double; std::to_chars knows no locale
    const char* const end =
        std::to_chars(rate.data(), rate.data() + rate.size(), config.rate, std::chars_format::fixed)
            .ptr;
    std::string filter = "fps=" + std::string(static_cast<const char*>(rate.data()), end);
    if (config.width > 0 || config.height > 0)
      filter += ",scale=" + std::to_string(config.width > 0 ? config.width : -1) + ":" +
                std::to_string(config.height > 0 ? config.height : -1);
    // "file:" keeps a path that begins with a dash or a protocol's name a path.
    const bool is_path = config.input_arguments.empty() && input.find("://") == std::string::npos;
    std::vector<std::string> all{config.program, "-nostdin", "-hide_banner", "-loglevel", "error"};
    all.insert(all.end(), config.input_arguments.begin(), config.input_arguments.end());
    all.insert(all.end(), {"-i", is_path ? "file:" + input : std::move(input), "-an", "-sn", "-vf",
                           filter, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"});
    return all;
  }

  std::string name_;
  detail::ChildProcess process_;
  bool (*stops_)();
  NetpbmReader reader_;
};

/// A PictureReader for PacedSource (stream/paced_source.hpp): a picture is due when it is complete;
/// joining keeps the newer one. `reader` must outlive this object.
class PictureFrames {
 public:
  using Frame = Picture;
  explicit PictureFrames(PictureReader& reader) : reader_(reader) {}

  Frame make_frame() const { return {}; }
  bool read(Frame& frame) { return reader_.read(frame); }
  std::int64_t time_ns(const Frame& frame) const noexcept { return frame.time_ns; }
  bool merge(Frame& into, Frame& next) const {
    std::swap(into, next);
    return true;
  }

 private:
  PictureReader& reader_;
};

}  // namespace sluice
