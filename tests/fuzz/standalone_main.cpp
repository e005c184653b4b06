// SPDX-License-Identifier: MIT
/// Runs a fuzz target without libFuzzer: the seed files as they are, then mutations of them, the
/// same ones every time. After a crash, the last line on stderr says where to start again.
///
/// usage: <target> [iterations [first iteration [seed file or folder]...]]
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "fuzz/fuzz_target.hpp"
#include "sluice/core/random.hpp"

namespace {

using Input = std::vector<std::uint8_t>;
using sluice::Random;

void add_seeds(const std::filesystem::path& path, std::vector<Input>& seeds) {
  if (std::filesystem::is_directory(path)) {
    std::vector<std::filesystem::path> entries(std::filesystem::directory_iterator(path), {});
    std::sort(entries.begin(), entries.end());  // the same order on every file system
    for (const auto& entry : entries) add_seeds(entry, seeds);
    return;
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read the seed %s\n", path.c_str());
    std::exit(2);
  }
  seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// A place in [0, size): half of the time near the front, where headers are.
std::size_t place(Random& random, std::size_t size) {
  const std::size_t range = random.below(2) == 0 ? std::min<std::size_t>(size, 256) : size;
  return range == 0 ? 0 : random.below(range);
}

std::uint64_t edge_value(Random& random) {
  constexpr std::uint64_t kSmall[] = {0, 1, 2, 3, 4, 7, 8, 12, 16, 31, 32, 33, 64, 127, 255, 256};
  switch (random.below(4)) {
    case 0: return kSmall[random.below(std::size(kSmall))];
    case 1: return (std::uint64_t{1} << random.below(64)) - random.below(3);
    case 2: return ~kSmall[random.below(std::size(kSmall))];
    default: return random.next();
  }
}

void mutate(Input& input, const std::vector<Input>& seeds, Random& random) {
  const std::size_t at = place(random, input.size());
  const std::size_t left = input.size() - at;
  switch (random.below(9)) {
    case 0:  // one bit
      if (left > 0) input[at] = static_cast<std::uint8_t>(input[at] ^ (1U << random.below(8)));
      break;
    case 1:  // one byte
      if (left > 0) input[at] = static_cast<std::uint8_t>(random.next());
      break;
    case 2: {  // a number of 1, 2, 4 or 8 bytes
      const std::size_t width = std::size_t{1} << random.below(4);
      const std::uint64_t value = edge_value(random);
      if (left >= width) std::memcpy(input.data() + at, &value, width);
      break;
    }
    case 3: {  // a run of bytes goes
      const std::size_t length = std::min<std::size_t>(left, 1 + random.below(16));
      input.erase(input.begin() + static_cast<std::ptrdiff_t>(at),
                  input.begin() + static_cast<std::ptrdiff_t>(at + length));
      break;
    }
    case 4: {  // a run of bytes comes twice
      const std::size_t length = std::min<std::size_t>(left, 1 + random.below(64));
      const Input copy(input.begin() + static_cast<std::ptrdiff_t>(at),
                       input.begin() + static_cast<std::ptrdiff_t>(at + length));
      const auto to = static_cast<std::ptrdiff_t>(place(random, input.size()));
      input.insert(input.begin() + to, copy.begin(), copy.end());
      break;
    }
    case 5:  // the end goes
      if (random.below(4) == 0) input.resize(at);
      break;
    case 6: {  // part of another seed
      const Input& other = seeds[random.below(seeds.size())];
      const std::size_t from = place(random, other.size());
      const std::size_t length = std::min({other.size() - from, left, 1 + random.below(64)});
      std::copy_n(other.begin() + static_cast<std::ptrdiff_t>(from), length,
                  input.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    }
    case 7: {  // a character that text formats give a meaning
      constexpr char kCharacters[] = "\"\\{}[]:,0123456789-+.eEtfn \n/u";
      if (left > 0)
        input[at] = static_cast<std::uint8_t>(kCharacters[random.below(sizeof(kCharacters) - 1)]);
      break;
    }
    default: {  // the next written number becomes another
      const auto is_digit = [](std::uint8_t byte) {
        return byte >= '0' && byte <= '9';
      };
      const auto first =
          std::find_if(input.begin() + static_cast<std::ptrdiff_t>(at), input.end(), is_digit);
      const auto last = std::find_if_not(first, input.end(), is_digit);
      if (first == last) break;
      const std::string text = std::to_string(edge_value(random));
      const auto offset = first - input.begin();
      input.erase(first, last);
      input.insert(input.begin() + offset, text.begin(), text.end());
    }
  }
}

void feed(const Input& input) {
  // An own block of exactly this size, so that a sanitizer sees every step past its end.
  const Input exact(input.begin(), input.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t iterations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100'000;
  const std::uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  std::vector<Input> seeds;
  for (int i = 3; i < argc; ++i) add_seeds(argv[i], seeds);
  if (seeds.empty() && sluice_fuzz_seeds != nullptr)
    add_seeds(std::filesystem::path(SLUICE_TEST_DATA) / sluice_fuzz_seeds(), seeds);
  seeds.emplace_back();  // and from nothing

  for (const Input& seed : seeds) feed(seed);
  for (std::uint64_t i = first; i < first + iterations; ++i) {
    if (i % 10'000 == 0)
      std::fprintf(stderr, "from iteration %llu\n", static_cast<unsigned long long>(i));
    Random random(i);  // an iteration depends on its number alone
    Input input = seeds[random.below(seeds.size())];
    const std::uint64_t steps = 1 + random.below(8);
    for (std::uint64_t step = 0; step < steps; ++step) mutate(input, seeds, random);
    feed(input);
  }
  std::fprintf(stderr, "%llu inputs\n", static_cast<unsigned long long>(iterations + seeds.size()));
  return 0;
}
