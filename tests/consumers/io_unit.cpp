// SPDX-License-Identifier: MIT
#include <sluice/core/error.hpp>
#include <sluice/io/gguf.hpp>
#include <sluice/io/load_tokenizer.hpp>

bool readers_are_linked();

/// Naming a file that is not there is enough: the readers behind the call must all link.
bool readers_are_linked() {
  try {
    sluice::load_tokenizer("no such file.json");
  } catch (const sluice::Error& error) {
    return error.code() == sluice::ErrorCode::kIo;
  }
  return false;
}
