// SPDX-License-Identifier: MIT
/// Any bytes as a GGUF file: every value and every tensor byte that the reader offers is read.
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string_view>

#include "fuzz/fuzz_target.hpp"
#include "sluice/io/gguf.hpp"

namespace {

volatile unsigned sink;  // keeps the reads

void touch(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  for (const std::byte byte : bytes) sum += std::to_integer<unsigned>(byte);
  sink = sum;
}

template <class Get>
void attempt(Get get) {
  try {
    get();
  } catch (const sluice::Error&) {  // of another type than asked for
  }
}

void read_all(const sluice::GgufFile& file, std::span<const std::byte> bytes) {
  for (const sluice::GgufTensor& tensor : file.tensors()) {
    if (tensor.data < bytes.data() || tensor.bytes > bytes.size() ||
        static_cast<std::size_t>(tensor.data - bytes.data()) > bytes.size() - tensor.bytes)
      throw std::logic_error("a tensor lies outside the file");
    touch(tensor.span());
    if (file.find_tensor(tensor.name) != &tensor) throw std::logic_error("a tensor is not found");
  }
  for (const std::string_view key : file.keys()) {
    attempt([&] { sink = static_cast<unsigned>(file.get_uint(key)); });
    attempt([&] { sink = static_cast<unsigned>(file.get_int(key)); });
    attempt([&] { sink = file.get_float(key) > 0 ? 1U : 0U; });
    attempt([&] { sink = file.get_bool(key) ? 1U : 0U; });
    attempt([&] { touch(std::as_bytes(std::span(file.get_string(key)))); });
    attempt([&] { sink = static_cast<unsigned>(file.get_ints(key).size()); });
    attempt([&] { sink = static_cast<unsigned>(file.get_floats(key).size()); });
    attempt([&] { sink = static_cast<unsigned>(file.get_bools(key).size()); });
    attempt([&] {
      for (const std::string_view text : file.get_strings(key))
        touch(std::as_bytes(std::span(text)));
    });
  }
}

}  // namespace

extern "C" const char* sluice_fuzz_seeds() {
  return "gguf";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  attempt([&] { read_all(sluice::GgufFile::from_bytes(bytes, "input"), bytes); });
  return 0;
}
