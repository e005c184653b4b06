// SPDX-License-Identifier: MIT
/// Reads the tensors of an encoder from safetensors files. Needs sluice::io.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
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

/// How NeMo's checkpoints of FastConformer models call what ConformerEncoder reads, where they
/// differ: {NeMo's, ours}, parts of names between dots. Source: the module attributes in NeMo
/// (conformer_encoder.py, conformer_modules.py, multi_head_attention.py, subsampling.py); what is
/// named alike in both (norms, feed-forwards, pointwise and depthwise convolutions) is not listed.
inline constexpr std::array<std::pair<std::string_view, std::string_view>, 10> kNemoConformerNames{{
    {"pre_encode.conv", "subsampling.layers"},
    {"pre_encode.out", "subsampling.linear"},
    {"self_attn.linear_q", "self_attn.q_proj"},
    {"self_attn.linear_k", "self_attn.k_proj"},
    {"self_attn.linear_v", "self_attn.v_proj"},
    {"self_attn.linear_out", "self_attn.o_proj"},
    {"self_attn.linear_pos", "self_attn.relative_k_proj"},
    {"self_attn.pos_bias_u", "self_attn.bias_u"},
    {"self_attn.pos_bias_v", "self_attn.bias_v"},
    {"conv.batch_norm", "conv.norm"},
}};

/// The name under which ConformerEncoder asks for a tensor that NeMo calls `name`; a name that is
/// not NeMo's stays. Allocates it.
inline std::string conformer_tensor_name(std::string_view name) {
  std::string dotted = "." + std::string(name) + ".";
  for (const auto& [nemo, own] : kNemoConformerNames) {
    const std::string part = "." + std::string(nemo) + ".";
    const std::size_t at = dotted.find(part);
    if (at != std::string::npos) dotted.replace(at + 1, nemo.size(), own);
  }
  return dotted.substr(1, dotted.size() - 2);
}

/// The tensors of a FastConformer encoder, from a file with the names of NeMo
/// (encoder.pre_encode.conv.0.weight ...; its .nemo archive holds a checkpoint of PyTorch, which
/// safetensors' own tools convert) or of Transformers (encoder.subsampling.layers.0.weight ...),
/// whatever stands before them; a whole model's other tensors are left out.
/// \throws Error(kFormat) if no such encoder is in the file, or a tensor is there under both names.
/// Allocates.
inline NamedTensors read_conformer_tensors(const SafetensorsFile& file) {
  std::string prefix;
  bool found = false;
  for (const FileTensor& tensor : file.tensors())
    for (const std::string_view first : {"pre_encode.conv.0.weight", "subsampling.layers.0.weight"})
      if (const std::string_view name = tensor.name; !found && name.ends_with(first)) {
        prefix = name.substr(0, name.size() - first.size());
        found = true;
      }
  if (!found)
    throw Error(ErrorCode::kFormat,
                {"no FastConformer encoder in the file", file.path(), "tensors",
                 "pre_encode.conv.0.weight or subsampling.layers.0.weight", "neither"});
  const NamedTensors stored = read_tensors(file, prefix);
  NamedTensors result(file.path());
  for (const auto& [stored_name, tensor] : stored) {
    std::string name = conformer_tensor_name(stored_name);
    if (result.has(name))
      throw Error(ErrorCode::kFormat,
                  {"a tensor is there twice", file.path(), name, "one name", stored_name});
    result.add(std::move(name), tensor.shape, tensor.values);
  }
  return result;
}

}  // namespace sluice
