// SPDX-License-Identifier: MIT
// quick_listen MODEL FILE.wav: writes down what is said, word by word, as it is heard. The memory
// is what the constructor took, however long the audio lasts.
#include <exception>
#include <iostream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "sluice/io/audio_input.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/listener.hpp"

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("usage: quick_listen MODEL FILE.wav");
  const auto model = sluice::load_listen_model(argv[1]);
  sluice::AudioInput audio = sluice::open_wav(argv[2]);  // any rate, any number of channels
  sluice::Listener listener(model, {.wait_words = 2});

  const auto show = [&](const sluice::ListenEvent& event) {
    if (event.kind == sluice::ListenEvent::Kind::kEndpoint) std::cout << std::endl;
    if (event.kind != sluice::ListenEvent::Kind::kWord) return;
    std::string word;
    for (const sluice::Token piece : event.tokens()) model->append_text(piece, word);
    std::cout << word << ' ' << std::flush;
  };
  std::vector<float> samples(320);  // pieces of any length give the same words
  while (const auto count = audio.read(samples)) {
    listener.accept(std::span(samples).first(static_cast<std::size_t>(count)));
    listener.for_each(show);
  }
  listener.finish();
  listener.for_each(show);
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
