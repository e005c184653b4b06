// SPDX-License-Identifier: MIT
#include <sluice/core/error.hpp>
#include <sluice/io/gguf.hpp>
#include <sluice/io/load_tokenizer.hpp>

#if CONSUMER_WITH_AUDIO
#include <sluice/io/sound_file.hpp>
#endif

bool readers_are_linked();

/// Naming a file that is not there is enough: the readers behind the call must all link.
bool readers_are_linked() {
  int missing = 0;
  try {
    sluice::load_tokenizer("no such file.json");
  } catch (const sluice::Error& error) {
    if (error.code() == sluice::ErrorCode::kIo) ++missing;
  }
#if CONSUMER_WITH_AUDIO
  try {
    sluice::open_audio("no such file.flac");
  } catch (const sluice::Error& error) {
    if (error.code() == sluice::ErrorCode::kIo) ++missing;
  }
  return missing == 2;
#else
  return missing == 1;
#endif
}
