// SPDX-License-Identifier: MIT
// quick_start MODEL "prompt": 200 tokens through a cache of 4 sinks and 252 keys. Without the limit
// it would write for ever, in the same memory.
#include <exception>
#include <iostream>
#include <stdexcept>

#include "sluice/io/detokenizer.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/session.hpp"

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("usage: quick_start MODEL PROMPT");
  const sluice::LoadedModel model = sluice::load_model(argv[1]);

  sluice::SessionOptions options;
  options.cache.num_sink_tokens = 4;
  options.cache.window_size = 252;
  options.sampler.temperature = 0.8;
  options.sampler.top_k = 40;
  options.num_threads = 2;
  sluice::Session<> session(model.decoder, options);

  session.accept(model.tokenizer->encode(argv[2]));
  sluice::StreamingDetokenizer text(*model.tokenizer);
  for (int i = 0; i < 200; ++i) {
    const auto token = session.step();
    if (!token) break;
    std::cout << text.push(*token) << std::flush;
  }
  std::cout << text.finish() << '\n';
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
