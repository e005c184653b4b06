// SPDX-License-Identifier: MIT
/// A path to a model: GGUF file, Hugging Face folder, and what can be wrong with either.
#include "sluice/model/load_model.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "sluice/core/atomic_file.hpp"
#include "sluice/stream/session.hpp"
#include "support/test_unit.hpp"
#include "tiny_model/tiny_model.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
namespace fs = std::filesystem;

/// A folder of its own for each test, gone afterwards.
class LoadModel : public ::testing::Test {
 protected:
  LoadModel()
      : folder_(fs::temp_directory_path() /
                ("sluice_load_model_" + std::to_string(::getpid()) + "_" +
                 ::testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::create_directories(folder_);
  }
  ~LoadModel() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }

  /// The weights of a recorded model (128 tokens) under a tokeniser of four.
  void write_folder(const std::string& tokenizer) const {
    const fs::path source = fs::path(SLUICE_TEST_DATA) / "models" / "llama3";
    for (const char* name : {"config.json", "model.safetensors"})
      fs::copy_file(source / name, folder_ / name);
    write("tokenizer.json", tokenizer);
  }

  fs::path folder_;
};

const std::string kTokenizer = R"({"added_tokens": [{"id": 3, "content": "<|end|>", "special": true,
  "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
  "normalizer": null, "post_processor": null, "decoder": {"type": "ByteLevel"},
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
  "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})";

ErrorCode code_of(const std::string& path, std::string* message = nullptr) {
  try {
    static_cast<void>(load_model(path));
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return error.code();
  }
  ADD_FAILURE() << path << " was loaded";
  return ErrorCode::kOrder;
}

TEST_F(LoadModel, GgufFile) {
  write_file_atomically(path("tiny.gguf"), tiny_model::file_bytes());
  const LoadedModel model = load_model(path("tiny.gguf"));
  EXPECT_EQ(model.path, path("tiny.gguf"));
  EXPECT_EQ(model.decoder->config().family, "llama");
  EXPECT_EQ(model.decoder->config().vocab_size, tiny_model::kVocabSize);
  EXPECT_EQ(model.decoder->config().num_layers(), tiny_model::kNumLayers);
  EXPECT_EQ(model.decoder->weights().embedding.type, ElementType::kF16);
  EXPECT_EQ(model.decoder->weights().layers[1].query.type, ElementType::kQ8_0);
  EXPECT_EQ(model.tokenizer->vocab_size(), static_cast<std::size_t>(tiny_model::kVocabSize));
  EXPECT_EQ(model.tokenizer->eos(), 2);
  EXPECT_EQ(model.chat_template, tiny_model::kChatTemplate);
}

TEST_F(LoadModel, TheTinyModelOnDiskIsTheOneInMemory) {
  write_file_atomically(path("tiny.gguf"), tiny_model::file_bytes(3));
  const auto write_text = [](const LoadedModel& model) {
    Session<> session(model.decoder, {});
    session.accept(model.tokenizer->encode("the end of it"));
    std::vector<Token> tokens;
    for (int i = 0; i < 30; ++i) tokens.push_back(session.step().value());
    return tokens;
  };
  const std::vector<Token> tokens = write_text(tiny_model::load(3));
  EXPECT_EQ(write_text(load_model(path("tiny.gguf"))), tokens);
  EXPECT_NE(write_text(tiny_model::load(4)), tokens);
}

TEST_F(LoadModel, TinyModelReadsEveryByteAndItsMerges) {
  const LoadedModel model = tiny_model::load();
  std::string bytes;
  for (char32_t code = 1; code < 0x800; ++code) detail::append_utf8(bytes, code);
  bytes += " the other of it";
  const std::vector<Token> tokens = model.tokenizer->encode(bytes);
  EXPECT_EQ(model.tokenizer->decode(tokens), bytes);
  EXPECT_EQ(model.tokenizer->encode(" the").size(), 1U);
}

TEST_F(LoadModel, HuggingFaceFolder) {
  write_folder(kTokenizer);
  write("tokenizer_config.json", R"({"eos_token": "<|end|>", "chat_template": "from config"})");
  const LoadedModel model = load_model(folder_.string());
  EXPECT_EQ(model.decoder->config().vocab_size, 128);
  EXPECT_EQ(model.tokenizer->encode("ab"), std::vector<Token>{2});
  EXPECT_EQ(model.tokenizer->eos(), 3);
  EXPECT_EQ(model.chat_template, "from config");
  write("chat_template.jinja", "of its own");
  EXPECT_EQ(load_model(folder_.string()).chat_template, "of its own");
}

TEST_F(LoadModel, FolderWithoutAPart) {
  write_folder(kTokenizer);
  for (const char* part : {"config.json", "model.safetensors", "tokenizer.json"}) {
    fs::rename(folder_ / part, folder_ / "away");
    EXPECT_EQ(code_of(folder_.string()), ErrorCode::kIo) << part;
    fs::rename(folder_ / "away", folder_ / part);
  }
  EXPECT_NO_THROW(load_model(folder_.string()));
}

TEST_F(LoadModel, TokeniserLargerThanTheEmbedding) {
  std::string vocab;
  for (int i = 0; i < 130; ++i)
    vocab += ", \"" + std::string(2, static_cast<char>('a' + i % 26)) +
             std::string(static_cast<std::size_t>(1 + i / 26), 'z') +
             "\": " + std::to_string(i + 4);
  std::string tokenizer = kTokenizer;
  const std::string last = "\"ab\": 2";
  tokenizer.insert(tokenizer.find(last) + last.size(), vocab);
  write_folder(tokenizer);
  std::string message;
  EXPECT_EQ(code_of(folder_.string(), &message), ErrorCode::kFormat);
  EXPECT_NE(message.find("at most 128 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("found 134"), std::string::npos) << message;
}

TEST_F(LoadModel, PathsThatAreNoModel) {
  EXPECT_EQ(code_of(path("none.gguf")), ErrorCode::kIo);
  EXPECT_EQ(code_of(folder_.string()), ErrorCode::kIo);
  write("model.safetensors", "");
  write("config.json", "{}");
  EXPECT_EQ(code_of(path("model.safetensors")), ErrorCode::kUnsupported);
  EXPECT_EQ(code_of(path("config.json")), ErrorCode::kUnsupported);
  write("text.txt", "not a model, but long enough to hold the header of one");
  EXPECT_EQ(code_of(path("text.txt")), ErrorCode::kFormat);
}

TEST_F(LoadModel, ReadsTheWholeFileWhenAsked) {
  write_folder(kTokenizer);
  std::vector<std::size_t> told;
  std::size_t all = 0;
  LoadOptions options;
  options.progress = [&](std::size_t done, std::size_t total) {
    told.push_back(done);
    all = total;
  };
  static_cast<void>(load_model(folder_.string(), options));
  EXPECT_TRUE(told.empty());  // nothing is read that was not asked for
  options.read_all = true;
  static_cast<void>(load_model(folder_.string(), options));
  ASSERT_FALSE(told.empty());
  EXPECT_EQ(all, fs::file_size(folder_ / "model.safetensors"));
  EXPECT_EQ(told.back(), all);
  struct GivenUp {};
  options.progress = [](std::size_t, std::size_t) { throw GivenUp(); };
  EXPECT_THROW(static_cast<void>(load_model(folder_.string(), options)), GivenUp);
}

}  // namespace SLUICE_TEST_UNIT
