// SPDX-License-Identifier: MIT
/// One call from a path to everything that a text stream needs: decoder, tokeniser, chat template.
/// Needs sluice::io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/io/load_tokenizer.hpp"
#include "sluice/io/mapped_file.hpp"
#include "sluice/io/safetensors.hpp"
#include "sluice/io/tokenizer.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/model/load_safetensors.hpp"

namespace sluice {

/// A model as files hold it. All parts are immutable: any number of threads and streams share them.
struct LoadedModel {
  std::shared_ptr<const Decoder> decoder;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::string chat_template;  ///< Jinja source, "" where the model has none
  std::string path;           ///< as it was given
};

/// Puts a decoder and its tokeniser together. A model often has more embedding rows than its
/// tokeniser has tokens, for alignment; the other way round a text could name a row that is not
/// there. `path` is what errors call the model.
/// \throws Error(kFormat) if the tokeniser's vocabulary is larger than the embedding.
inline LoadedModel pair_model(std::shared_ptr<const Decoder> decoder, Tokenizer tokenizer,
                              std::string path) {
  const auto tokens = static_cast<std::int64_t>(tokenizer.vocab_size());
  if (tokens > decoder->config().vocab_size)
    throw Error(ErrorCode::kFormat, {"the tokeniser does not fit the model", path, "vocabulary",
                                     "at most " + std::to_string(decoder->config().vocab_size) +
                                         " tokens, the rows of the embedding",
                                     std::to_string(tokens)});
  LoadedModel model;
  model.chat_template = tokenizer.chat_template();
  model.decoder = std::move(decoder);
  model.tokenizer = std::make_shared<const Tokenizer>(std::move(tokenizer));
  model.path = std::move(path);
  return model;
}

/// How a model comes into memory. Weights are used as they lie in the file, and nothing is arranged
/// anew: by default a load reads the headers and the tokeniser, and the weights are read when they
/// are first used.
struct LoadOptions {
  bool read_all = false;     ///< read the whole file now: the first step then waits for no disk
  bool lock_memory = false;  ///< and keep it in memory (mlock), where the system lets us
  /// Called between the pieces of what these two read, with bytes done and bytes in all; may throw
  /// to give up.
  std::function<void(std::size_t done, std::size_t total)> progress{};
};

namespace detail {

/// Files: GgufFile or SafetensorsFile.
template <class File>
void read_files(std::span<const File> files, const LoadOptions& options) {
  if (!options.read_all && !options.lock_memory) return;
  std::size_t total = 0;
  for (const File& file : files) total += file.bytes().size();
  std::size_t before = 0;
  for (const File& file : files) {
    read_pages(file.bytes(), file.path(), options.lock_memory, [&](std::size_t done) {
      if (options.progress) options.progress(before + done, total);
    });
    before += file.bytes().size();
  }
}

}  // namespace detail

/// Loads a GGUF file, whose metadata holds the tokeniser, or a Hugging Face folder: config.json,
/// safetensors (one file or shards), tokenizer.json and, where they exist, tokenizer_config.json
/// and chat_template.jinja. Weights stay memory-mapped; what is allocated is the tokeniser's tables
/// and the vectors of norms and biases. Nothing is returned unless everything is there.
/// `options`: whether the weights are read at once.
/// \throws Error: kIo when a file cannot be opened or read, kUnsupported for a single .safetensors
/// or .json file and for what load_decoder() and load_tokenizer() do not implement, kFormat, kShape
/// and kConfig for content that contradicts itself. Each names file, field, expected and found.
inline LoadedModel load_model(const std::string& path, const LoadOptions& options = {}) {
  const std::filesystem::path where(path);
  std::error_code ignored;  // what cannot be asked about fails to open below, with the reason
  if (std::filesystem::is_directory(where, ignored)) {
    auto files = std::make_shared<const SafetensorsModel>(path);
    detail::read_files(files->files(), options);
    std::shared_ptr<const Decoder> decoder =
        load_decoder(std::move(files), (where / "config.json").string());
    return pair_model(std::move(decoder), load_tokenizer(where), path);
  }
  if (where.extension() == ".safetensors" || where.extension() == ".json")
    throw Error(ErrorCode::kUnsupported,
                {"one file of a Hugging Face model", path, "", "the folder that holds it",
                 "a " + where.extension().string() + " file"});
  const auto file = std::make_shared<const GgufFile>(path);
  detail::read_files(std::span<const GgufFile>(file.get(), 1), options);
  Tokenizer tokenizer(tokenizer_spec_from_gguf(*file));
  return pair_model(load_decoder(file), std::move(tokenizer), path);
}

}  // namespace sluice
