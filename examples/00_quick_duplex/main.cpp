// SPDX-License-Identifier: MIT
// quick_duplex MODEL: reads words from standard input as they come and writes two tokens for each
// while it goes on reading. Both sides keep 4 sinks and 508 keys: neither ever ends by itself.
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>

#include "sluice/io/detokenizer.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/duplex.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) throw std::invalid_argument("usage: quick_duplex MODEL < TEXT");
  const sluice::LoadedModel model = sluice::load_model(argv[1]);

  sluice::DuplexOptions options;
  options.source = {.policy = sluice::CachePolicy::kSinkWindow, .window_size = 508};
  options.target = options.source;
  options.target_prefix = model.tokenizer->encode("\n");
  options.max_target_tokens = 400;
  sluice::Duplex duplex(model.decoder, options, sluice::WaitK(3, sluice::FixedUnits{2}));

  std::jthread reader([&] {  // units come from any thread, at any rate
    for (std::string word; std::cin >> word;)
      if (duplex.feed(model.tokenizer->encode(" " + word)) == sluice::FeedStatus::kStopped) return;
    duplex.end_input();
  });
  sluice::StreamingDetokenizer text(*model.tokenizer);
  for (const sluice::DuplexOutput& output : duplex)
    std::cout << text.push(output.token) << std::flush;
  std::cout << text.finish() << '\n';
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
