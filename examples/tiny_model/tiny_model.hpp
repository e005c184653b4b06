// SPDX-License-Identifier: MIT
/// A complete language model made from a seed: Llama architecture, byte-level tokeniser, chat
/// template, in the bytes of a GGUF file of some 200 KB. Its weights are random and its text is
/// noise; it is there so that programs and tests run without a download.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/random.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/io/gguf_writer.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "sluice/io/tokenizer.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/nn/quantised_blocks.hpp"

namespace tiny_model {

inline constexpr std::int64_t kHiddenSize = 64;
inline constexpr std::int64_t kIntermediateSize = 128;
inline constexpr std::int64_t kNumLayers = 2;
inline constexpr std::int64_t kNumQoHeads = 4;
inline constexpr std::int64_t kNumKvHeads = 2;
inline constexpr std::int64_t kHeadDim = 16;

/// <|endoftext|>, <|im_start|> (begin) and <|im_end|> (end) are tokens 0, 1 and 2.
inline constexpr std::array<std::string_view, 3> kControl{"<|endoftext|>", "<|im_start|>",
                                                          "<|im_end|>"};
/// In GPT-2's spelling, where a space is U+0120.
inline constexpr std::array<std::string_view, 29> kMerges{
    "\u0120 t",  "h e",      "i n",       "r e",      "\u0120t he", "o n", "e r",        "\u0120 a",
    "e n",       "o u",      "i t",       "n d",      "\u0120 s",   "o r", "\u0120 w",   "a t",
    "e s",       "\u0120 o", "i s",       "\u0120 b", "in g",       "e d", "\u0120a nd", "\u0120 h",
    "\u0120t o", "l l",      "\u0120o f", "a r",      "l e"};
inline constexpr std::int64_t kVocabSize =
    static_cast<std::int64_t>(kControl.size() + 256 + kMerges.size());

inline constexpr std::string_view kChatTemplate =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}";

namespace detail {

/// The 256 bytes in GPT-2's spelling: printable Latin-1 stands for itself, the others for the
/// characters from U+0100 on. All of them are one or two bytes of UTF-8.
inline std::vector<std::string> spelled_bytes() {
  std::vector<std::string> result;
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    const unsigned code = printable ? byte : next++;
    if (code < 0x80)
      result.push_back({static_cast<char>(code)});
    else
      result.push_back(
          {static_cast<char>(0xC0U | (code >> 6U)), static_cast<char>(0x80U | (code & 0x3FU))});
  }
  return result;
}

/// Adds a matrix [rows, cols] of independent uniform values with variance 1 / cols. Uniform,
/// because a normal distribution needs a logarithm, whose last bit differs between systems.
inline void add_matrix(sluice::GgufWriter& writer, sluice::Random& random, const std::string& name,
                       sluice::ElementType type, std::int64_t rows, std::int64_t cols,
                       double gain = 1.0) {
  const double range = gain * std::sqrt(3.0 / static_cast<double>(cols));
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (float& value : values) value = static_cast<float>((2.0 * random.uniform() - 1.0) * range);
  std::vector<std::byte> stored(static_cast<std::size_t>(sluice::storage_bytes(type, rows * cols)));
  sluice::quantise(type, values.data(), rows * cols, stored.data());
  writer.add_tensor(name, type, std::array{rows, cols}, stored);
}

/// Adds a norm weight [size], around one.
inline void add_norm(sluice::GgufWriter& writer, sluice::Random& random, const std::string& name,
                     std::int64_t size) {
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = static_cast<float>(0.9 + 0.2 * random.uniform());
  writer.add_tensor(name, sluice::ElementType::kF32, std::array{size},
                    std::as_bytes(std::span<const float>(values)));
}

inline void add_tokenizer(sluice::GgufWriter& writer) {
  std::vector<std::string> pieces(kControl.begin(), kControl.end());
  std::vector<std::int32_t> types(kControl.size(),
                                  static_cast<std::int32_t>(sluice::TokenType::kControl));
  for (std::string& byte : spelled_bytes()) pieces.push_back(std::move(byte));
  for (const std::string_view merge : kMerges) {
    const std::size_t space = merge.find(' ');
    pieces.push_back(std::string(merge.substr(0, space)) + std::string(merge.substr(space + 1)));
  }
  types.resize(pieces.size(), static_cast<std::int32_t>(sluice::TokenType::kNormal));
  writer.add("tokenizer.ggml.model", "gpt2");
  writer.add("tokenizer.ggml.pre", "gpt-2");
  writer.add_array("tokenizer.ggml.tokens", pieces);
  writer.add_array("tokenizer.ggml.token_type", types);
  writer.add_array("tokenizer.ggml.merges", kMerges);
  writer.add("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  writer.add("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  writer.add("tokenizer.ggml.add_bos_token", false);
  writer.add("tokenizer.chat_template", kChatTemplate);
}

}  // namespace detail

/// The content of the GGUF file. The same seed gives the same bytes on every machine. Allocates
/// some 600 KB on the way.
inline std::vector<std::byte> file_bytes(std::uint64_t seed = 0) {
  using sluice::ElementType;
  sluice::GgufWriter writer;
  writer.add("general.architecture", "llama");
  writer.add("general.name", "sluice tiny model, random weights");
  writer.add("llama.block_count", static_cast<std::uint32_t>(kNumLayers));
  writer.add("llama.context_length", std::uint32_t{2048});
  writer.add("llama.embedding_length", static_cast<std::uint32_t>(kHiddenSize));
  writer.add("llama.feed_forward_length", static_cast<std::uint32_t>(kIntermediateSize));
  writer.add("llama.attention.head_count", static_cast<std::uint32_t>(kNumQoHeads));
  writer.add("llama.attention.head_count_kv", static_cast<std::uint32_t>(kNumKvHeads));
  writer.add("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  writer.add("llama.rope.dimension_count", static_cast<std::uint32_t>(kHeadDim));
  writer.add("llama.rope.freq_base", 10000.0F);
  detail::add_tokenizer(writer);

  // Several types, so that whoever streams this model has used the readers of all of them.
  sluice::Random random(seed);
  const auto matrix = [&](const std::string& name, ElementType type, std::int64_t rows,
                          std::int64_t cols, double gain = 1.0) {
    detail::add_matrix(writer, random, name, type, rows, cols, gain);
  };
  constexpr std::int64_t kQuerySize = kNumQoHeads * kHeadDim;
  constexpr std::int64_t kKeySize = kNumKvHeads * kHeadDim;
  matrix("token_embd.weight", ElementType::kF16, kVocabSize, kHiddenSize, 8.0);
  for (std::int64_t layer = 0; layer < kNumLayers; ++layer) {
    const std::string at = "blk." + std::to_string(layer) + ".";
    detail::add_norm(writer, random, at + "attn_norm.weight", kHiddenSize);
    // Scores a few units wide: attention that looks somewhere.
    matrix(at + "attn_q.weight", ElementType::kQ8_0, kQuerySize, kHiddenSize, 2.0);
    matrix(at + "attn_k.weight", ElementType::kF16, kKeySize, kHiddenSize, 2.0);
    matrix(at + "attn_v.weight", ElementType::kQ8_0, kKeySize, kHiddenSize);
    matrix(at + "attn_output.weight", ElementType::kF32, kHiddenSize, kQuerySize);
    detail::add_norm(writer, random, at + "ffn_norm.weight", kHiddenSize);
    matrix(at + "ffn_gate.weight", ElementType::kQ8_0, kIntermediateSize, kHiddenSize);
    matrix(at + "ffn_up.weight", ElementType::kQ8_0, kIntermediateSize, kHiddenSize);
    matrix(at + "ffn_down.weight", ElementType::kF16, kHiddenSize, kIntermediateSize);
  }
  detail::add_norm(writer, random, "output_norm.weight", kHiddenSize);
  // Not tied: with random weights a tied output repeats the last token for ever.
  matrix("output.weight", ElementType::kQ8_0, kVocabSize, kHiddenSize);
  return writer.bytes();
}

/// The model, loaded from memory: no file is written.
inline sluice::LoadedModel load(std::uint64_t seed = 0) {
  struct Image {
    explicit Image(std::uint64_t s)
        : bytes(file_bytes(s)), file(sluice::GgufFile::from_bytes(bytes, "tiny model")) {}
    std::vector<std::byte> bytes;
    sluice::GgufFile file;
  };
  const auto image = std::make_shared<const Image>(seed);
  const std::shared_ptr<const sluice::GgufFile> file(image, &image->file);
  sluice::Tokenizer tokenizer(sluice::tokenizer_spec_from_gguf(*file));
  return sluice::pair_model(sluice::load_decoder(file), std::move(tokenizer), "tiny model");
}

}  // namespace tiny_model
