// SPDX-License-Identifier: MIT
// Pictures that need no file: a disc that goes round before stripes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "sluice/io/frame_source.hpp"

namespace watch {

class Scene final : public sluice::PictureReader {
 public:
  Scene(const sluice::PictureFormat& format, double rate) : format_(format), rate_(rate) {}

  bool read(sluice::Picture& picture) override {
    picture.format = format_;
    picture.pixels.resize(static_cast<std::size_t>(format_.bytes()));
    picture.index = next_++;
    picture.time_ns =
        static_cast<std::int64_t>(static_cast<double>(picture.index + 1) * 1e9 / rate_);
    const double angle = static_cast<double>(picture.index) * 0.11;
    const auto size = static_cast<double>(std::min(format_.width, format_.height));
    const double x0 = static_cast<double>(format_.width) / 2 + 0.3 * size * std::cos(angle);
    const double y0 = static_cast<double>(format_.height) / 2 + 0.3 * size * std::sin(angle);
    std::uint8_t* pixel = picture.pixels.data();
    for (std::int64_t y = 0; y < format_.height; ++y)
      for (std::int64_t x = 0; x < format_.width; ++x, pixel += 3) {
        const bool disc =
            std::hypot(static_cast<double>(x) - x0, static_cast<double>(y) - y0) < 0.18 * size;
        const auto stripe = static_cast<std::uint8_t>((x + picture.index) / 8 % 2 == 0 ? 200 : 60);
        pixel[0] = disc ? 230 : stripe;
        pixel[1] = disc ? 40 : static_cast<std::uint8_t>(y * 255 / format_.height);
        pixel[2] = disc ? 30 : stripe;
      }
    return true;
  }
  const std::string& name() const override { return name_; }

 private:
  sluice::PictureFormat format_;
  double rate_;
  std::int64_t next_ = 0;
  std::string name_ = "scene";
};

}  // namespace watch
