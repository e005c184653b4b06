// SPDX-License-Identifier: MIT
/// Pictures of a video as rows of a vision transformer: patches of several frames, normalised, in
/// the order in which neighbours can be merged, embedded by one matrix; and where they stand.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/weight_matrix.hpp"
#include "sluice/position/vision_positions.hpp"

namespace sluice {

/// How pictures are cut. The defaults are those of Qwen2-VL and Qwen2.5-VL.
struct PatchConfig {
  std::int64_t width = 0;           ///< of a picture, pixels: a multiple of patch * merge
  std::int64_t height = 0;          ///< the same
  std::int64_t channels = 3;        ///< 1 to 4
  std::int64_t patch = 14;          ///< pixels, of a square patch's side
  std::int64_t temporal_patch = 2;  ///< frames that a patch reaches through
  std::int64_t merge = 2;  ///< patches of a square's side that the model merges to one token
  /// A value v of 0 to 255 enters as (v / 255 - mean) / deviation, per channel.
  std::array<double, 4> mean{0.48145466, 0.4578275, 0.40821073, 0.0};
  std::array<double, 4> deviation{0.26862954, 0.26130258, 0.27577711, 1.0};
};

/// Where a patch lies in its picture, in patches from the top left: the two axes of a vision
/// transformer's own rotary positions.
struct PatchPlace {
  std::int64_t row = 0;
  std::int64_t col = 0;
  friend bool operator==(const PatchPlace&, const PatchPlace&) = default;
};

/// A picture's size that is whole in patches, close to the given one in shape, with a number of
/// pixels between two bounds: both sides rounded to multiples of `factor` (patch * merge); if that
/// is too many or too few pixels, both are scaled alike and rounded down or up.
/// Source: "smart resize" of Qwen2-VL's image processor, halves to even as there.
/// \throws Error(kConfig) unless sides are positive, one at most 200 times the other, and the
/// bounds hold factor^2.
struct PictureSize {
  std::int64_t width = 0;
  std::int64_t height = 0;
  friend bool operator==(const PictureSize&, const PictureSize&) = default;
};
inline PictureSize patch_aligned_size(PictureSize size, std::int64_t factor,
                                      std::int64_t min_pixels, std::int64_t max_pixels) {
  const auto require = [](bool sound, const char* field, const char* expected, std::int64_t found) {
    if (!sound)
      throw Error(ErrorCode::kConfig, {"option out of range", "patch_aligned_size", field, expected,
                                       std::to_string(found)});
  };
  constexpr std::int64_t kMost = 1 << 20;
  require(size.width >= 1 && size.width <= kMost, "width", "1 to 2^20", size.width);
  require(size.height >= 1 && size.height <= kMost, "height", "1 to 2^20", size.height);
  require(std::max(size.width, size.height) <= 200 * std::min(size.width, size.height), "width",
          "at most 200 times the height, and the other way round", size.width);
  require(factor >= 1 && factor <= kMost, "factor", "1 to 2^20", factor);
  require(max_pixels >= factor * factor && min_pixels <= max_pixels, "max_pixels",
          "at least factor^2 and min_pixels", max_pixels);
  const auto unit = static_cast<double>(factor);
  const auto width = static_cast<double>(size.width);
  const auto height = static_cast<double>(size.height);
  const auto whole = [&](double units) {
    return std::max<std::int64_t>(static_cast<std::int64_t>(units), 1) * factor;
  };
  PictureSize result{whole(std::nearbyint(width / unit)), whole(std::nearbyint(height / unit))};
  const std::int64_t pixels = result.width * result.height;
  if (pixels > max_pixels) {
    const double scale = std::sqrt(width * height / static_cast<double>(max_pixels));
    result = {whole(std::floor(width / scale / unit)), whole(std::floor(height / scale / unit))};
  } else if (pixels < min_pixels) {
    const double scale = std::sqrt(static_cast<double>(min_pixels) / (width * height));
    result = {whole(std::ceil(width * scale / unit)), whole(std::ceil(height * scale / unit))};
  }
  return result;
}

/// Cuts frames into patch rows. Frames come one at a time; `temporal_patch` of them make one
/// temporal grid of rows_per_grid() rows. Rows of merge x merge neighbours follow each other (row
/// by row inside the square), squares row by row, so that the model's merger joins consecutive
/// rows; a row is [channels, temporal_patch, patch, patch].
///
/// Const after construction; what a stream changes is its State. Source: Qwen2-VL's image processor
/// (arXiv 2409.12191) as Hugging Face has it.
class PatchRows {
 public:
  /// Frames of a temporal grid that is not complete. A copy is a snapshot.
  struct State {
    std::vector<std::uint8_t> frames;  // [temporal_patch, height, width, channels]
    std::int64_t pending = 0;          // of them that are there
  };

  /// \throws Error(kConfig) naming the field.
  explicit PatchRows(const PatchConfig& config) : config_(config) {
    const auto require = [](bool sound, const char* field, std::string expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig, {"option out of range", "PatchConfig", field,
                                         std::move(expected), std::to_string(found)});
    };
    const auto number = [](std::int64_t value) {
      return static_cast<double>(value);
    };
    require(config.patch >= 1 && config.patch <= 1024, "patch", "1 to 1024", number(config.patch));
    require(config.merge >= 1 && config.merge <= 64, "merge", "1 to 64", number(config.merge));
    require(config.temporal_patch >= 1 && config.temporal_patch <= 64, "temporal_patch", "1 to 64",
            number(config.temporal_patch));
    require(config.channels >= 1 && config.channels <= 4, "channels", "1 to 4",
            number(config.channels));
    const std::int64_t unit = config.patch * config.merge;
    for (const auto& [field, side] :
         {std::pair{"width", config.width}, std::pair{"height", config.height}})
      require(side >= 1 && side <= 32768 && side % unit == 0, field,
              "a multiple of " + std::to_string(unit) + ", at most 32768", number(side));
    for (std::size_t c = 0; c < static_cast<std::size_t>(config.channels); ++c) {
      require(std::isfinite(config.mean[c]), "mean", "finite", config.mean[c]);
      require(std::isfinite(config.deviation[c]) && config.deviation[c] > 0, "deviation",
              "finite, above 0", config.deviation[c]);
      for (int value = 0; value < 256; ++value)
        values_[c][static_cast<std::size_t>(value)] = static_cast<float>(
            (static_cast<double>(value) / 255.0 - config.mean[c]) / config.deviation[c]);
    }
  }

  const PatchConfig& config() const noexcept { return config_; }
  /// Bytes of a frame: [height, width, channels].
  std::int64_t frame_bytes() const noexcept {
    return config_.height * config_.width * config_.channels;
  }
  /// Patches of a temporal grid, and values of one.
  std::int64_t rows_per_grid() const noexcept {
    return config_.height / config_.patch * (config_.width / config_.patch);
  }
  std::int64_t row_width() const noexcept {
    return config_.channels * config_.temporal_patch * config_.patch * config_.patch;
  }
  /// Tokens of a temporal grid after merging: rows_per_grid() / merge^2.
  std::int64_t tokens_per_grid() const noexcept {
    return rows_per_grid() / (config_.merge * config_.merge);
  }
  /// The tokens of `grids` temporal grids as a block for fill_positions(). frame_step: position
  /// units from one grid to the next (time_step() computes it).
  VisionGrid grid(std::int64_t grids, Position frame_step = 1,
                  TimeRounding rounding = TimeRounding::kNone) const noexcept {
    const std::int64_t unit = config_.patch * config_.merge;
    return {.frames = grids,
            .rows = config_.height / unit,
            .cols = config_.width / unit,
            .frame_step = frame_step,
            .rounding = rounding};
  }
  /// Where row `index` of a grid lies.
  PatchPlace place(std::int64_t index) const noexcept {
    const std::int64_t merge = config_.merge;
    const std::int64_t inside = index % (merge * merge);
    const std::int64_t square = index / (merge * merge);
    const std::int64_t squares = config_.width / (config_.patch * merge);
    return {square / squares * merge + inside / merge, square % squares * merge + inside % merge};
  }

  State make_state() const {
    return {
        std::vector<std::uint8_t>(static_cast<std::size_t>(config_.temporal_patch * frame_bytes())),
        0};
  }
  /// Accepts a frame, [height, width, channels]: whether it completes a grid, whose rows read()
  /// then gives until the next frame is accepted. Allocates nothing.
  bool accept(std::span<const std::uint8_t> frame, State& state) const noexcept {
    SLUICE_ASSERT(static_cast<std::int64_t>(frame.size()) == frame_bytes());
    if (state.pending == config_.temporal_patch) state.pending = 0;
    std::copy(frame.begin(), frame.end(), state.frames.data() + state.pending * frame_bytes());
    return ++state.pending == config_.temporal_patch;
  }
  /// At the end: a grid that lacks frames is filled up with its last one. Whether there is one.
  bool flush(State& state) const noexcept {
    if (state.pending == 0 || state.pending == config_.temporal_patch) return false;
    for (; state.pending < config_.temporal_patch; ++state.pending)
      std::copy_n(state.frames.data() + (state.pending - 1) * frame_bytes(), frame_bytes(),
                  state.frames.data() + state.pending * frame_bytes());
    return true;
  }
  /// Rows first .. first + out.rows - 1 of the grid that is complete. out: [rows, row_width()].
  void read(const State& state, std::int64_t first, MatrixView<float> out) const noexcept {
    SLUICE_ASSERT(state.pending == config_.temporal_patch);
    SLUICE_ASSERT(first >= 0 && first + out.rows <= rows_per_grid() && out.cols == row_width());
    for (std::int64_t i = 0; i < out.rows; ++i) {
      const PatchPlace corner = place(first + i);
      float* row = out.row(i);
      for (std::int64_t c = 0; c < config_.channels; ++c) {
        const float* const values = values_[static_cast<std::size_t>(c)].data();
        for (std::int64_t t = 0; t < config_.temporal_patch; ++t) {
          for (std::int64_t y = 0; y < config_.patch; ++y) {
            const std::int64_t line = corner.row * config_.patch + y;
            const std::uint8_t* pixel =
                state.frames.data() + t * frame_bytes() +
                (line * config_.width + corner.col * config_.patch) * config_.channels + c;
            for (std::int64_t x = 0; x < config_.patch; ++x, pixel += config_.channels)
              *row++ = values[*pixel];
          }
        }
      }
    }
  }
  void reset(State& state) const noexcept { state.pending = 0; }

  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.pending);
    writer.write_span(std::span<const std::uint8_t>(
        state.frames.data(), static_cast<std::size_t>(state.pending * frame_bytes())));
  }
  /// \throws Error(kFormat); the state is then to be reset.
  void restore(ByteReader& reader, State& state) const {
    state.pending = 0;
    const std::size_t begin = reader.offset();
    const auto pending = reader.read<std::int64_t>("pending");
    if (pending < 0 || pending > config_.temporal_patch)
      reader.fail_at(begin, "frames of an open grid", "pending",
                     "0 to " + std::to_string(config_.temporal_patch), std::to_string(pending));
    reader.read_span("frames", std::span<std::uint8_t>(state.frames)
                                   .first(static_cast<std::size_t>(pending * frame_bytes())));
    state.pending = pending;
  }

 private:
  PatchConfig config_;
  std::array<std::array<float, 256>, 4> values_{};  // [channel, stored value]
};

/// Patch rows times a matrix: the convolution whose kernel is its stride, with which vision
/// transformers begin. Const after construction.
class PatchEmbedding {
 public:
  struct State {
    PatchRows::State frames;
    detail::FrameScratch rows;
  };

  /// weight: [embedding, channels * temporal_patch * patch * patch], as PyTorch's Conv3d stores it;
  /// bias: [embedding] or null. \throws Error(kConfig, kShape). Allocates.
  PatchEmbedding(const PatchConfig& config, const WeightMatrix& weight, const float* bias = nullptr)
      : patches_(config), product_(weight, bias, "PatchEmbedding") {
    if (weight.cols != patches_.row_width())
      throw Error(ErrorCode::kShape,
                  {"weights do not fit the patches", "PatchEmbedding", "cols",
                   std::to_string(patches_.row_width()), std::to_string(weight.cols)});
  }

  const PatchRows& patches() const noexcept { return patches_; }
  /// Rows that a frame gives at most, and values of one.
  std::int64_t max_outputs() const noexcept { return patches_.rows_per_grid(); }
  std::int64_t out_width() const noexcept { return product_.rows(); }

  State make_state() const {
    return {patches_.make_state(), detail::FrameScratch(kBlock * patches_.row_width())};
  }
  /// Accepts a frame, [height, width, channels]; writes a grid's rows, [rows_per_grid(),
  /// out_width()], if it completes one: their number, or 0. Allocates nothing.
  std::int64_t step(std::span<const std::uint8_t> frame, State& state,
                    MatrixView<float> out) const {
    return patches_.accept(frame, state.frames) ? embed(state, out) : 0;
  }
  /// At the end: the same for a grid that was filled up.
  std::int64_t flush(State& state, MatrixView<float> out) const {
    return patches_.flush(state.frames) ? embed(state, out) : 0;
  }
  void reset(State& state) const noexcept { patches_.reset(state.frames); }

 private:
  static constexpr std::int64_t kBlock = 24;  // rows gathered at once

  std::int64_t embed(State& state, MatrixView<float> out) const {
    const std::int64_t rows = patches_.rows_per_grid();
    SLUICE_ASSERT(out.rows >= rows && out.cols == out_width());
    for (std::int64_t first = 0; first < rows; first += kBlock) {
      const std::int64_t count = std::min(kBlock, rows - first);
      const MatrixView<float> block(state.rows.data(), count, patches_.row_width());
      patches_.read(state.frames, first, block);
      product_.apply(block, out.middle_rows(first, count));
    }
    return rows;
  }

  PatchRows patches_;
  PackedLinear product_;  // [embedding, row_width]
};

}  // namespace sluice
