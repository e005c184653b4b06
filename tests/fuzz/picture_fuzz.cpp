// SPDX-License-Identifier: MIT
/// Any bytes as PPM and PGM pictures, as Y4M and as raw frames: every picture that they hold is
/// read, and all pictures of a stream have one size.
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "fuzz/fuzz_target.hpp"
#include "sluice/io/frame_source.hpp"

namespace {

using sluice::ByteSource;
using sluice::Picture;
using sluice::PictureFormat;

volatile unsigned sink;  // keeps the reads

template <class Make>
void read_all(Make make, std::size_t size) {
  try {
    auto reader = make();
    Picture picture;
    PictureFormat first;
    std::size_t bytes = 0;
    for (std::int64_t index = 0; reader.read(picture); ++index) {
      if (index == 0) first = picture.format;
      if (picture.index != index || picture.format != first ||
          static_cast<std::int64_t>(picture.pixels.size()) != first.bytes())
        throw std::logic_error("a picture does not fit its stream");
      unsigned sum = 0;
      for (const std::uint8_t value : picture.pixels) sum += value;
      sink = sum;
      bytes += picture.pixels.size();
      // 4:2:0 turns one and a half bytes a pixel into three.
      if (bytes > 3 * size) throw std::logic_error("more pixels than bytes");
    }
  } catch (const sluice::Error&) {
  }
}

}  // namespace

extern "C" const char* sluice_fuzz_seeds() {
  return "pictures";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto source = [&] {
    return ByteSource::of_memory(bytes, "input");
  };
  read_all([&] { return sluice::NetpbmReader(source(), 30); }, size);
  read_all([&] { return sluice::Y4mReader(source()); }, size);
  read_all([&] { return sluice::RawVideoReader(source(), {3, 2, 1}, 30); }, size);
  return 0;
}
