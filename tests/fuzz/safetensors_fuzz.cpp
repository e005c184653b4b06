// SPDX-License-Identifier: MIT
/// Any bytes as a safetensors file, and as the index of a sharded model.
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string_view>

#include "fuzz/fuzz_target.hpp"
#include "sluice/io/safetensors.hpp"

namespace {

volatile unsigned sink;  // keeps the reads

template <class Get>
void attempt(Get get) {
  try {
    get();
  } catch (const sluice::Error&) {  // the file is damaged, and said so
  }
}

void read_all(const sluice::SafetensorsFile& file, std::span<const std::byte> bytes) {
  std::size_t total = 0;
  for (const sluice::SafetensorsTensor& tensor : file.tensors()) {
    if (tensor.data < bytes.data() || tensor.bytes > bytes.size() ||
        static_cast<std::size_t>(tensor.data - bytes.data()) > bytes.size() - tensor.bytes)
      throw std::logic_error("a tensor lies outside the file");
    unsigned sum = 0;
    for (const std::byte byte : tensor.span()) sum += std::to_integer<unsigned>(byte);
    sink = sum;
    total += tensor.bytes;
    if (file.find_tensor(tensor.name) != &tensor) throw std::logic_error("a tensor is not found");
  }
  if (total > bytes.size()) throw std::logic_error("tensors overlap");
  for (const sluice::SafetensorsUnsupported& tensor : file.unsupported())
    attempt([&] { sink = static_cast<unsigned>(file.tensor(tensor.name).bytes); });
}

}  // namespace

extern "C" const char* sluice_fuzz_seeds() {
  return "safetensors";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  attempt([&] { read_all(sluice::SafetensorsFile::from_bytes(bytes, "input"), bytes); });
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  attempt([&] {
    for (const auto& [shard, tensors] : sluice::detail::parse_safetensors_index(text, "input")) {
      if (shard.empty() || shard.find('/') != shard.npos)
        throw std::logic_error("a shard leaves its folder");
      sink = static_cast<unsigned>(tensors.size());
    }
  });
  return 0;
}
