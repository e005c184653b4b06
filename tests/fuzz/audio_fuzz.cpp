// SPDX-License-Identifier: MIT
/// Any bytes as a WAV file and as raw samples: everything that they hold is read, in pieces whose
/// lengths come from the bytes, and mixed to finite samples.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fuzz/fuzz_target.hpp"
#include "sluice/io/audio_input.hpp"

namespace {

using sluice::AudioInput;
using sluice::ByteSource;
using sluice::PcmReader;

void read_all(PcmReader reader, std::size_t size) {
  const sluice::AudioFormat format = reader.format();
  const std::optional<std::int64_t> promised = reader.frames_promised();
  // Rates that a table is made for quickly; others are read as they are.
  const bool common = format.sample_rate == 8000 || format.sample_rate == 48000;
  AudioInput input(
      std::make_unique<PcmReader>(std::move(reader)),
      {.sample_rate = common ? 16000 : format.sample_rate, .non_finite = sluice::NonFinite::kZero});
  std::vector<float> piece(1 + size % 700);
  try {
    while (const std::int64_t count = input.read(piece))
      for (std::int64_t i = 0; i < count; ++i)
        if (!std::isfinite(piece[static_cast<std::size_t>(i)]))
          throw std::logic_error("a sample is not finite");
  } catch (const sluice::Error&) {  // cut short
  }
  // At most what the header says, and what the bytes can hold at twice the rate.
  if (promised && !common && input.samples() > *promised)
    throw std::logic_error("more samples than promised");
  if (input.samples() > static_cast<std::int64_t>(2 * size + 2))
    throw std::logic_error("more samples than bytes");
}

}  // namespace

extern "C" const char* sluice_fuzz_seeds() {
  return "wav";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    read_all(sluice::read_wav(ByteSource::of_memory(bytes, "input")), size);
  } catch (const sluice::Error&) {
  }
  for (const sluice::SampleEncoding encoding :
       {sluice::SampleEncoding::kU8, sluice::SampleEncoding::kS16, sluice::SampleEncoding::kS24,
        sluice::SampleEncoding::kF32, sluice::SampleEncoding::kF64})
    read_all(PcmReader(ByteSource::of_memory(bytes, "input"),
                       {16000, static_cast<std::int64_t>(1 + size % 3)}, encoding),
             size);
  return 0;
}
