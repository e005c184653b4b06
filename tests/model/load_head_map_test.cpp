// SPDX-License-Identifier: MIT
#include "sluice/model/load_head_map.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
namespace fs = std::filesystem;

class LoadHeadMap : public ::testing::Test {
 protected:
  LoadHeadMap()
      : folder_(fs::temp_directory_path() /
                ("sluice_head_map_" + std::to_string(::getpid()) + "_" +
                 ::testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::create_directories(folder_);
  }
  ~LoadHeadMap() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return (folder_ / name).string();
  }

  /// The code and the message of what `action` throws.
  template <class Action>
  static ErrorCode code_of(Action&& action, std::string* message = nullptr) {
    const std::optional<Error> error = test::error_of(action);
    if (!error) ADD_FAILURE() << "no error";
    if (error && message != nullptr) *message = error->what();
    return error ? error->code() : ErrorCode::kOrder;
  }

  static DecoderConfig model(std::size_t layers, std::int64_t kv_heads) {
    DecoderConfig config;
    config.layers.resize(layers);
    config.num_kv_heads = kv_heads;
    return config;
  }

  fs::path folder_;
};

TEST_F(LoadHeadMap, DuoAttentionsFiles) {
  const std::string gates =
      write("full_attention_heads.tsv", "1.0\t-9.25e-05\r\n0.25\t0.75\n0\t1.5\n");
  write("config.json", R"({"sink_size": 128, "recent_size": 256, "model": "any"})");
  const HeadTable table = load_head_table(gates);
  EXPECT_EQ(table.num_layers, 3);
  EXPECT_EQ(table.num_heads, 2);
  EXPECT_EQ(table.values, (std::vector<double>{1, -9.25e-05, .25, .75, 0, 1.5}));

  for (const std::string& path : {folder_.string(), gates}) {
    const HeadMap map = load_duo_attention(path);
    EXPECT_EQ(map.eviction(), Eviction::kPerChunk);
    EXPECT_EQ(map.num_full(), 3);
    EXPECT_TRUE(map.at(0, 0).is_full() && map.at(1, 1).is_full() && map.at(2, 1).is_full());
    EXPECT_EQ(map.at(0, 1), (HeadRetention{128, 256}));
  }
  // Deployment sizes take the place of those of the training.
  const HeadMap map = load_duo_attention(folder_.string(), {.sparsity = 0.75,
                                                            .num_sink_tokens = 16,
                                                            .recent_size = 64,
                                                            .eviction = Eviction::kPerQuery});
  EXPECT_EQ(map.num_full(), 2);
  EXPECT_EQ(map.at(1, 1), (HeadRetention{16, 64}));
  EXPECT_EQ(map.eviction(), Eviction::kPerQuery);
}

TEST_F(LoadHeadMap, TablesThatAreDamaged) {
  std::string message;
  const auto code = [&](const std::string& text) {
    return code_of([&] { load_head_table(write("gates.tsv", text)); }, &message);
  };
  EXPECT_EQ(code(""), ErrorCode::kFormat);
  EXPECT_EQ(code("\n\n"), ErrorCode::kFormat);
  EXPECT_EQ(code("0.5\t0.5\n0.5\n"), ErrorCode::kFormat);
  EXPECT_NE(message.find("row 1"), std::string::npos) << message;
  EXPECT_EQ(code("0.5\tx\n"), ErrorCode::kFormat);
  EXPECT_NE(message.find("row 0, column 1"), std::string::npos) << message;
  EXPECT_EQ(code("0.5\t0.5\t\n"), ErrorCode::kFormat);
  EXPECT_EQ(code("nan\n"), ErrorCode::kFormat);
  EXPECT_EQ(code("1e999\n"), ErrorCode::kFormat);
  EXPECT_EQ(code("0.5 0.5\n"), ErrorCode::kFormat);
  EXPECT_EQ(code("0.5\n\n0.5\n"), ErrorCode::kFormat);
  EXPECT_EQ(code_of([&] { load_head_table((folder_ / "absent.tsv").string()); }), ErrorCode::kIo);
  try {
    load_duo_attention((folder_ / "absent.tsv").string());
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {  // about what was asked for, not about what stands beside it
    EXPECT_EQ(error.detail().where, (folder_ / "absent.tsv").string());
  }
  write("gates.tsv", "0.5\t0.25\n");
  EXPECT_EQ(code_of([&] { load_duo_attention((folder_ / "gates.tsv").string()); }), ErrorCode::kIo)
      << "no config.json, and no sizes given";
  write("config.json", R"({"sink_size": "many", "recent_size": 4})");
  EXPECT_EQ(code_of([&] { load_duo_attention((folder_ / "gates.tsv").string()); }),
            ErrorCode::kFormat);
}

TEST_F(LoadHeadMap, SpansOfMoA) {
  const std::string path = write(
      "spans.json", R"({"alphas": [[0, 0], [-1024, 2048]], "betas": [[0.125, 0.625], [1, 0]]})");
  const HeadMap map = load_moa_spans(path, 2, 3072);
  EXPECT_EQ(map.at(0, 0), (HeadRetention{64, 384 - 64}));
  EXPECT_EQ(map.at(0, 1), (HeadRetention{64, 1920 - 64}));
  EXPECT_EQ(map.at(1, 0), (HeadRetention{64, 2048 - 64}));
  for (const char* text :
       {"{}", "[]", R"({"alphas": [], "betas": []})", R"({"alphas": [[1]], "betas": [["1"]]})",
        R"({"alphas": [[1], [1, 2]], "betas": [[1], [1, 2]]})"})
    EXPECT_EQ(code_of([&] { load_moa_spans(write("bad.json", text), 1, 100); }), ErrorCode::kFormat)
        << text;
}

TEST_F(LoadHeadMap, OurOwnForm) {
  const std::string path = write("map.json", R"({"sluice_head_map": 1, "layers": [
      {"full": true},
      [{"full": true}, {"sinks": 4, "window": 256}],
      {"sinks": 64, "alpha": 0, "beta": 0.125}]})");
  const HeadMap map = load_head_map(path, model(3, 2), 4096);
  EXPECT_EQ(map.eviction(), Eviction::kPerQuery);
  EXPECT_TRUE(map.at(0, 0).is_full() && map.at(0, 1).is_full() && map.at(1, 0).is_full());
  EXPECT_EQ(map.at(1, 1), (HeadRetention{4, 256}));
  EXPECT_EQ(map.at(2, 0), (HeadRetention{64, 512 - 64}));
  EXPECT_EQ(map.at(2, 1), map.at(2, 0));
  EXPECT_EQ(code_of([&] { load_head_map(path, model(3, 2)); }), ErrorCode::kConfig)
      << "a span without a horizon";
  EXPECT_EQ(code_of([&] { load_head_map(path, model(4, 2), 4096); }), ErrorCode::kFormat);
  EXPECT_EQ(code_of([&] { load_head_map(path, model(3, 3), 4096); }), ErrorCode::kFormat);
}

TEST_F(LoadHeadMap, FieldsThatAreWrong) {
  for (const char* text :
       {"{}", "3", R"({"sluice_head_map": 2, "layers": [{"full": true}]})",
        R"({"sluice_head_map": 1})", R"({"sluice_head_map": 1, "layers": {"full": true}})",
        R"({"sluice_head_map": 1, "layers": [3]})", R"({"sluice_head_map": 1, "layers": [[]]})",
        R"({"sluice_head_map": 1, "layers": [{"sinks": 4}]})",
        R"({"sluice_head_map": 1, "layers": [{"window": 4, "beta": 1}]})",
        R"({"sluice_head_map": 1, "layers": [{"sinks": -4, "beta": 1}]})",
        R"({"sluice_head_map": 1, "eviction": "never", "layers": [{"full": true}]})"})
    EXPECT_EQ(code_of([&] { load_head_map(write("bad.json", text), model(1, 1), 100); }),
              ErrorCode::kFormat)
        << text;
  EXPECT_EQ(code_of([&] {
              load_head_map(
                  write("bad.json", R"({"sluice_head_map": 1, "layers": [{"window": 0}]})"),
                  model(1, 1));
            }),
            ErrorCode::kConfig);
}

/// Damaged files give a map or a typed error, nothing else.
TEST_F(LoadHeadMap, RandomDamage) {
  const std::string gates = "1.0\t-9.25e-05\t0.5\n0.25\t0.75\t1\n";
  const std::string json =
      R"({"sluice_head_map": 1, "layers": [[{"full": true}, {"sinks": 4, "window": 256}], {"sinks": 64, "alpha": 0, "beta": 0.125}]})";
  Random random(1);
  for (int i = 0; i < 1000; ++i) {
    std::string text = i % 2 == 0 ? gates : json;
    for (std::uint64_t n = 1 + random.below(4); n > 0 && !text.empty(); --n) {
      const std::size_t at = random.below(text.size());
      switch (random.below(3)) {
        case 0: text[at] = static_cast<char>(random.below(256)); break;
        case 1: text.erase(at, 1 + random.below(5)); break;
        default: text.insert(at, 1, text[random.below(text.size())]); break;
      }
    }
    const std::string path = write("damaged", text);
    try {
      if (i % 2 == 0)
        static_cast<void>(full_heads(load_head_table(path), 0.5));
      else
        static_cast<void>(load_head_map(path, model(2, 2), 1000));
    } catch (const Error& error) {
      ASSERT_NE(error.code(), ErrorCode::kOrder);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
