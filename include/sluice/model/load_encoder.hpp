// SPDX-License-Identifier: MIT
/// Reads the tensors of an encoder from safetensors files. Needs sluice::io.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/safetensors.hpp"
#include "sluice/model/named_tensors.hpp"
#include "sluice/nn/quantised_blocks.hpp"

namespace sluice {

/// All tensors whose names begin with `prefix`, under their names without it, as float32.
/// \throws Error(kFormat) if there is none. Allocates.
inline NamedTensors read_tensors(const SafetensorsFile& file, std::string_view prefix = "") {
  NamedTensors result(file.path());
  for (const FileTensor& tensor : file.tensors()) {
    const std::string_view name = tensor.name;
    if (name.substr(0, prefix.size()) != prefix) continue;
    std::int64_t count = 1;
    for (const std::int64_t extent : tensor.shape) count *= extent;
    std::vector<std::uint64_t> aligned((tensor.bytes + 7) / 8);
    if (tensor.bytes > 0) std::memcpy(aligned.data(), tensor.data, tensor.bytes);
    std::vector<float> values(static_cast<std::size_t>(count));
    dequantise(tensor.type, aligned.data(), count, values.data());
    result.add(std::string(name.substr(prefix.size())), tensor.shape, std::move(values));
  }
  if (result.size() == 0)
    throw Error(ErrorCode::kFormat, {"no tensors of the encoder", file.path(), "prefix",
                                     "tensors whose names begin with it", std::string(prefix)});
  return result;
}

}  // namespace sluice
