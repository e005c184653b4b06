// SPDX-License-Identifier: MIT
// Encoders against recorded outputs of PyTorch (tests/oracle/make_encoder_goldens.py), in any
// chunks.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/conformer.hpp"
#include "sluice/model/load_encoder.hpp"
#include "sluice/model/moonshine_encoder.hpp"
#include "sluice/model/vision_encoder.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::error_of;

NamedTensors read_golden(const std::string& name) {
  return read_tensors(SafetensorsFile(SLUICE_TEST_DATA "/encoders/" + name + ".safetensors"));
}

/// Everything that a layer makes of an input that arrives in chunks of the given sizes (repeated).
std::vector<float> stream_through(const StreamChain& chain, const std::vector<float>& input,
                                  const std::vector<std::int64_t>& chunks) {
  StreamChain::State state = chain.make_state();
  const std::int64_t width = chain.in_width();
  const std::int64_t frames = static_cast<std::int64_t>(input.size()) / width;
  std::vector<float> result;
  std::vector<float> rows;
  const auto keep = [&](std::int64_t count) {
    result.insert(result.end(), rows.begin(), rows.begin() + count * chain.out_width());
  };
  const auto room = [&](std::int64_t count) {
    rows.assign(static_cast<std::size_t>(count * chain.out_width()), 0.0F);
    return MatrixView<float>(rows.data(), count, chain.out_width());
  };
  std::size_t next = 0;
  for (std::int64_t done = 0; done < frames;) {
    const std::int64_t count = std::min(chunks[next++ % chunks.size()], frames - done);
    const MatrixView<float> out = room(chain.max_outputs(count));
    keep(chain.step({input.data() + done * width, count, width}, state, out));
    done += count;
  }
  const MatrixView<float> out = room(chain.max_flush_outputs());
  keep(chain.flush(state, out));
  return result;
}

void expect_golden(const std::vector<float>& found, const NamedTensors& golden) {
  const std::vector<float>& expected = golden.get("output").values;
  ASSERT_EQ(found.size(), expected.size());
  // Outputs of norms, of the size of one; a few hundred float32 roundings a layer on either side.
  for (std::size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], 3e-5) << "value " << i;
}

void expect_any_chunks(const StreamChain& chain, const NamedTensors& golden, std::int64_t longest,
                       int trials) {
  const std::vector<float>& input = golden.get("input").values;
  const std::vector<float> whole = stream_through(chain, input, {1 << 20});
  expect_golden(whole, golden);
  Random random(9);
  for (int trial = 0; trial < trials; ++trial) {
    std::vector<std::int64_t> chunks;
    for (int i = 0; i < 7; ++i) chunks.push_back(test::between(random, i == 0 ? 1 : 0, longest));
    ASSERT_EQ(stream_through(chain, input, chunks), whole) << "trial " << trial;
  }
}

ConformerConfig small_conformer(bool causal) {
  return {.num_mels = 16,
          .width = 16,
          .num_layers = 2,
          .num_heads = 2,
          .feed_forward_width = 24,
          .conv_kernel = 5,
          .subsampling_channels = 4,
          .subsampling_stages = 3,
          .causal = causal};
}

TEST(ConformerEncoder, EqualsPyTorchInAnyChunks) {
  const NamedTensors golden = read_golden("conformer_causal");
  const ConformerEncoder encoder(small_conformer(true), golden);
  expect_any_chunks(encoder.chain(FrameVisibility::chunked_limited(4, 1)), golden, 30, 1000);
}

// Ten frames see each other whole: windows that reach beyond the input on both sides.
TEST(ConformerEncoder, EqualsParakeetInAnyChunks) {
  const NamedTensors golden = read_golden("conformer");
  const ConformerEncoder encoder(small_conformer(false), golden);
  expect_any_chunks(encoder.chain(FrameVisibility::window(16, 16)), golden, 30, 1000);
}

// One set of weights, several contexts; what is seen counts.
TEST(ConformerEncoder, HasItsContextFromTheStream) {
  const NamedTensors golden = read_golden("conformer_causal");
  const ConformerEncoder encoder(small_conformer(true), golden);
  const std::vector<float>& input = golden.get("input").values;
  const auto wide =
      stream_through(encoder.chain(FrameVisibility::chunked_limited(8, 3)), input, {13});
  ASSERT_EQ(wide.size(), golden.get("output").values.size());
  EXPECT_NE(wide, golden.get("output").values);
  EXPECT_EQ(wide, stream_through(encoder.chain(FrameVisibility::chunked_limited(8, 3)), input,
                                 {1, 5, 2}));
}

// Specification, B.1: lengths behind the convolutions, and which mel frames an output reads.
TEST(ConformerEncoder, SubsamplesLikeNemo) {
  const NamedTensors golden = read_golden("conformer_causal");
  const StreamChain front = ConformerEncoder(small_conformer(true), golden).front();
  for (const auto& [frames, outputs] : {std::pair{1, 1},
                                        {8, 2},
                                        {9, 2},
                                        {16, 3},
                                        {17, 3},
                                        {25, 4},
                                        {57, 8},
                                        {65, 9},
                                        {105, 14},
                                        {112, 15},
                                        {121, 16}}) {
    const std::vector<float> input(static_cast<std::size_t>(frames * 16), 0.5F);
    EXPECT_EQ(stream_through(front, input, {7}).size(), static_cast<std::size_t>(outputs * 16))
        << frames;
  }
  const StreamLatency latency = latency_of(front);
  EXPECT_EQ(latency.stride, 8);
  EXPECT_EQ(latency.look_ahead, 0);
  EXPECT_EQ(latency.receptive_field, 15);
}

// What is in a file, under another name each.
template <class Name>
void write_renamed(const NamedTensors& tensors, const std::string& path, Name&& name) {
  std::vector<FileTensor> all;
  for (const auto& [own, tensor] : tensors)
    all.push_back({name(own), ElementType::kF32, tensor.shape,
                   reinterpret_cast<const std::byte*>(tensor.values.data()),
                   tensor.values.size() * sizeof(float)});
  write_safetensors(path, all);
}

// Names as `model.state_dict()` of a NeMo model has them, typed in.
std::string nemo_name(const std::string& own) {
  static const std::map<std::string, std::string> kOutside{
      {"subsampling.layers.0.weight", "encoder.pre_encode.conv.0.weight"},
      {"subsampling.layers.0.bias", "encoder.pre_encode.conv.0.bias"},
      {"subsampling.layers.2.weight", "encoder.pre_encode.conv.2.weight"},
      {"subsampling.layers.2.bias", "encoder.pre_encode.conv.2.bias"},
      {"subsampling.layers.3.weight", "encoder.pre_encode.conv.3.weight"},
      {"subsampling.layers.3.bias", "encoder.pre_encode.conv.3.bias"},
      {"subsampling.layers.5.weight", "encoder.pre_encode.conv.5.weight"},
      {"subsampling.layers.5.bias", "encoder.pre_encode.conv.5.bias"},
      {"subsampling.layers.6.weight", "encoder.pre_encode.conv.6.weight"},
      {"subsampling.layers.6.bias", "encoder.pre_encode.conv.6.bias"},
      {"subsampling.linear.weight", "encoder.pre_encode.out.weight"},
      {"subsampling.linear.bias", "encoder.pre_encode.out.bias"}};
  static const std::map<std::string, std::string> kInLayer{
      {"self_attn.q_proj.weight", "self_attn.linear_q.weight"},
      {"self_attn.q_proj.bias", "self_attn.linear_q.bias"},
      {"self_attn.k_proj.weight", "self_attn.linear_k.weight"},
      {"self_attn.k_proj.bias", "self_attn.linear_k.bias"},
      {"self_attn.v_proj.weight", "self_attn.linear_v.weight"},
      {"self_attn.v_proj.bias", "self_attn.linear_v.bias"},
      {"self_attn.o_proj.weight", "self_attn.linear_out.weight"},
      {"self_attn.o_proj.bias", "self_attn.linear_out.bias"},
      {"self_attn.relative_k_proj.weight", "self_attn.linear_pos.weight"},
      {"self_attn.bias_u", "self_attn.pos_bias_u"},
      {"self_attn.bias_v", "self_attn.pos_bias_v"},
      {"conv.norm.weight", "conv.batch_norm.weight"},
      {"conv.norm.bias", "conv.batch_norm.bias"},
      {"conv.norm.running_mean", "conv.batch_norm.running_mean"},
      {"conv.norm.running_var", "conv.batch_norm.running_var"}};
  if (const auto found = kOutside.find(own); found != kOutside.end()) return found->second;
  if (own.starts_with("layers.")) {
    const std::size_t inside = own.find('.', 7) + 1;
    const auto found = kInLayer.find(own.substr(inside));
    return "encoder." + own.substr(0, inside) +
           (found != kInLayer.end() ? found->second : own.substr(inside));
  }
  return "preprocessor." + own;  // the golden's input and output: other tensors of a model
}

TEST(ConformerEncoder, ReadsTheNamesOfNemoAndOfTransformers) {
  const std::string path = testing::TempDir() + "conformer_names.safetensors";
  for (const bool causal : {true, false}) {
    const NamedTensors golden = read_golden(causal ? "conformer_causal" : "conformer");
    const FrameVisibility visible =
        causal ? FrameVisibility::chunked_limited(4, 1) : FrameVisibility::window(16, 16);
    const auto output = [&](const NamedTensors& tensors) {
      return stream_through(ConformerEncoder(small_conformer(causal), tensors).chain(visible),
                            golden.get("input").values, {7});
    };
    const std::vector<float> expected = output(golden);
    expect_golden(expected, golden);
    write_renamed(golden, path, nemo_name);
    ASSERT_FALSE(SafetensorsFile(path).contains("encoder.layers.0.self_attn.q_proj.weight"));
    const NamedTensors nemo = read_conformer_tensors(SafetensorsFile(path));
    EXPECT_EQ(nemo.size() + 2, golden.size());
    EXPECT_EQ(output(nemo), expected);
    for (const std::string prefix : {"encoder.", ""}) {
      write_renamed(golden, path, [&](const std::string& own) { return prefix + own; });
      EXPECT_EQ(output(read_conformer_tensors(SafetensorsFile(path))), expected);
    }
    // Both names at once: whose values would count?
    write_renamed(golden, path, [&](const std::string& own) {
      return own == "layers.0.conv.norm.bias" ? "layers.1.conv.batch_norm.bias" : own;
    });
    const auto error = error_of([&] { read_conformer_tensors(SafetensorsFile(path)); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
    EXPECT_EQ(error->detail().field, "layers.1.conv.norm.bias");
  }
  std::remove(path.c_str());
  const SafetensorsFile other(SLUICE_TEST_DATA "/encoders/vision.safetensors");
  const auto error = error_of([&] { read_conformer_tensors(other); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
}

TEST(ConformerEncoder, RefusesTensorsThatDoNotFit) {
  const NamedTensors golden = read_golden("conformer_causal");
  ConformerConfig config = small_conformer(true);
  config.num_layers = 3;
  auto error = error_of([&] { ConformerEncoder encoder(config, golden); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  config = small_conformer(true);
  config.feed_forward_width = 25;
  error = error_of([&] { ConformerEncoder encoder(config, golden); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kShape);
  EXPECT_EQ(error->detail().field, "layers.0.feed_forward1.linear1.weight");
  config = small_conformer(true);
  config.num_heads = 3;
  error = error_of([&] { ConformerEncoder encoder(config, golden); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kConfig);
  EXPECT_TRUE(error_of([&] {
    read_tensors(SafetensorsFile(SLUICE_TEST_DATA "/encoders/vision.safetensors"), "nobody.");
  }));
}

MoonshineEncoderConfig small_moonshine(bool inclusive) {
  // One reading's bounds are the other's less one.
  const std::int64_t less = inclusive ? 1 : 0;
  return {.frame_size = 16,
          .width = 16,
          .num_heads = 2,
          .feed_forward_width = 24,
          .layers = {{6 - less, 3 - less}, {6 - less, 0}, {5 - less, 2 - less}},
          .inclusive = inclusive};
}

TEST(MoonshineEncoder, EqualsTransformersInAnyChunks) {
  const NamedTensors golden = read_golden("moonshine");
  expect_any_chunks(make_moonshine_encoder(small_moonshine(false), golden), golden, 200, 1000);
  expect_any_chunks(make_moonshine_encoder(small_moonshine(true), golden), golden, 200, 5);
}

// Specification, test B.4a.
TEST(MoonshineEncoder, CompressesFrames) {
  const FrameCompression compression(4, 0.75);
  const std::vector<float> frame{1, -1, 2, 0};
  std::vector<float> out(4);
  compression.apply({frame.data(), 1, 4}, {out.data(), 1, 4});
  const std::array<double, 4> expected{.329420, -.885772, .885772, -.329420};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(out[i], expected[i], 2e-6);
}

/// An encoder of the smallest model's windows, narrow and with random weights.
StreamChain random_moonshine(bool inclusive) {
  RandomTensors made(3);
  const std::int64_t width = 8;
  made.vector("embedder.comp.log_k", 1, -0.28768F);
  made.matrix("embedder.linear.weight", {width, 80});
  made.matrix("embedder.conv1.weight", {2 * width, width, 5});
  made.matrix("embedder.conv2.weight", {width, 2 * width, 5});
  MoonshineEncoderConfig config{
      .width = width, .num_heads = 2, .feed_forward_width = 8, .inclusive = inclusive};
  for (std::size_t l = 0; l < config.layers.size(); ++l) {
    const std::string at = "layers." + std::to_string(l) + ".";
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"})
      made.matrix(at + "self_attn." + name + ".weight", {width, width});
    made.matrix(at + "mlp.fc1.weight", {8, width}).matrix(at + "mlp.fc2.weight", {width, 8});
    made.vector(at + "input_layernorm.gamma", width, 0);
    made.vector(at + "post_attention_layernorm.gamma", width, 0);
  }
  made.vector("final_norm.gamma", width, 0);
  return make_moonshine_encoder(config, made.tensors());
}

// Specification, tests B.4a (features for so many samples) and B.4b (how many are final), and the
// first final feature after 5,200 samples (A.8).
TEST(MoonshineEncoder, HoldsBackWhatIsNotFinal) {
  for (const bool inclusive : {true, false}) {
    const StreamChain chain = random_moonshine(inclusive);
    for (const auto& [samples, features] :
         {std::pair{80, 1}, {160, 1}, {320, 1}, {640, 2}, {1280, 4}, {16000, 50}, {16080, 51}})
      EXPECT_EQ(
          stream_through(chain, std::vector<float>(static_cast<std::size_t>(samples), 0.1F), {333})
              .size(),
          static_cast<std::size_t>(features * 8))
          << samples;
    const auto final_after = [&](std::int64_t samples) {
      StreamChain::State state = chain.make_state();
      std::vector<float> input(static_cast<std::size_t>(samples));
      Random random(1);
      for (float& x : input) x = static_cast<float>(random.normal());
      std::vector<float> out(static_cast<std::size_t>(chain.max_outputs(samples) * 8));
      return chain.step({input.data(), samples, 1}, state,
                        {out.data(), chain.max_outputs(samples), 8});
    };
    // 20 features: the last needs 80 (4 * 19 + 1) samples.
    EXPECT_EQ(final_after(80 * (4 * 19 + 1)), inclusive ? 4 : 8);
    if (inclusive) {
      EXPECT_EQ(final_after(5199), 0);
      EXPECT_EQ(final_after(5200), 1);
    }
  }
}

// The provisional tail is what the end of the input would give, and asking changes nothing.
TEST(MoonshineEncoder, GivesAProvisionalTail) {
  const NamedTensors golden = read_golden("moonshine");
  const StreamChain chain = make_moonshine_encoder(small_moonshine(false), golden);
  const std::vector<float>& input = golden.get("input").values;
  const std::vector<float> whole = stream_through(chain, input, {64});
  StreamChain::State state = chain.make_state();
  StreamChain::State ahead = chain.make_state();
  std::vector<float> rows(static_cast<std::size_t>(64 * 16));
  std::vector<float> sure;
  for (std::size_t done = 0; done + 160 <= input.size(); done += 160) {
    const std::int64_t written =
        chain.step({input.data() + done, 160, 1}, state, {rows.data(), 64, 16});
    sure.insert(sure.end(), rows.begin(), rows.begin() + written * 16);
    const std::int64_t tail = provisional_rows(chain, state, ahead, {rows.data(), 64, 16});
    const std::vector<float> heard(input.begin(),
                                   input.begin() + static_cast<std::ptrdiff_t>(done + 160));
    std::vector<float> both = sure;
    both.insert(both.end(), rows.begin(), rows.begin() + tail * 16);
    ASSERT_EQ(both, stream_through(chain, heard, {64}));
  }
  EXPECT_EQ(sure, std::vector<float>(whole.begin(),
                                     whole.begin() + static_cast<std::ptrdiff_t>(sure.size())));
}

VisionEncoderConfig small_vision() {
  return {.width = 24,
          .num_layers = 3,
          .num_heads = 3,
          .feed_forward_width = 36,
          .out_width = 20,
          .patch_size = 7,
          .window_size = 28,
          .whole_layers = {1}};
}

TEST(VisionEncoder, EqualsQwen) {
  const NamedTensors golden = read_golden("vision");
  const VisionEncoder encoder(small_vision(), golden);
  const NamedTensors::Tensor& input = golden.get("input");
  for (const int threads : {1, 2}) {
    ThreadTeam team(threads);
    VisionEncoder::Workspace workspace(encoder, 3, 5, threads);
    for (int again = 0; again < 2; ++again) {
      const MatrixView<const float> tokens =
          encoder.encode({input.values.data(), input.shape[0], input.shape[1]}, workspace, team);
      expect_golden({tokens.data, tokens.data + tokens.rows * tokens.cols}, golden);
    }
  }
}

TEST(VisionEncoder, RefusesWhatDoesNotFit) {
  const NamedTensors golden = read_golden("vision");
  const auto refused = [&](auto change) {
    VisionEncoderConfig config = small_vision();
    change(config);
    return error_of([&] { VisionEncoder encoder(config, golden); });
  };
  EXPECT_FALSE(refused([](VisionEncoderConfig&) {}));
  EXPECT_TRUE(refused([](VisionEncoderConfig& c) { c.num_layers = 4; }));
  EXPECT_TRUE(refused([](VisionEncoderConfig& c) { c.num_heads = 5; }));
  EXPECT_TRUE(refused([](VisionEncoderConfig& c) { c.window_size = 30; }));
  EXPECT_TRUE(refused([](VisionEncoderConfig& c) { c.out_width = 21; }));
  EXPECT_TRUE(refused([](VisionEncoderConfig& c) { c.patch_size = 0; }));
}

}  // namespace SLUICE_TEST_UNIT
