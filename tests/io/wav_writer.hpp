// SPDX-License-Identifier: MIT
/// WAV files for tests, sound and damaged ones, byte by byte.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "io/io_test_support.hpp"

namespace sluice::test {

/// Appends to bytes.
class WavWriter {
 public:
  WavWriter& word(std::string_view text) {
    for (const char letter : text) bytes_.push_back(static_cast<std::byte>(letter));
    return *this;
  }
  WavWriter& number(std::uint64_t value, int width) {
    for (int i = 0; i < width; ++i, value >>= 8) bytes_.push_back(static_cast<std::byte>(value));
    return *this;
  }
  const Bytes& bytes() const { return bytes_; }

 private:
  Bytes bytes_;
};

/// A file with samples as they lie in it.
inline Bytes wav_file(unsigned tag, unsigned bits, unsigned channels, std::uint32_t rate,
                      const Bytes& samples, std::uint32_t data_length = 0xFFFFFFFE) {
  const auto size = static_cast<std::uint32_t>(samples.size());
  if (data_length == 0xFFFFFFFE) data_length = size;
  WavWriter out;
  out.word("RIFF").number(36 + size, 4).word("WAVE");
  out.word("fmt ").number(16, 4).number(tag, 2).number(channels, 2).number(rate, 4);
  out.number(std::uint64_t{rate} * channels * bits / 8, 4).number(channels * bits / 8, 2);
  out.number(bits, 2);
  out.word("data").number(data_length, 4);
  Bytes file = out.bytes();
  file.insert(file.end(), samples.begin(), samples.end());
  return file;
}

inline Bytes floats_as_bytes(const std::vector<float>& values) {
  WavWriter out;
  for (const float value : values) out.number(std::bit_cast<std::uint32_t>(value), 4);
  return out.bytes();
}

}  // namespace sluice::test
