// SPDX-License-Identifier: MIT
// make_tiny_model: writes a seeded model with random weights as a GGUF file.
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>

#include <CLI/CLI.hpp>

#include "sluice/core/atomic_file.hpp"
#include "tiny_model.hpp"

int main(int argc, char** argv) {
  std::string output;
  std::uint64_t seed = 0;
  CLI::App app{"Writes a tiny Llama model with random weights as a GGUF file. Its text is noise."};
  app.option_defaults()->always_capture_default();
  app.add_option("OUTPUT", output, "file to write")->required()->always_capture_default(false);
  app.add_option("-s,--seed", seed, "the same seed gives the same bytes");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    sluice::write_file_atomically(output, tiny_model::file_bytes(seed));
  } catch (const std::exception& error) {
    std::cerr << "make_tiny_model: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
