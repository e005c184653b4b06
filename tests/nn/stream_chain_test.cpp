// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_chain.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_conformer.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/stream_pool.hpp"
#include "sluice/nn/stream_recurrent.hpp"
#include "support/frame_stream.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::error_of;
using test::expect_close;
using test::expect_declared_latency;
using test::expect_exact_streaming;
using test::Frames;
using test::random_values;
using test::run_whole;

using Values = std::vector<float>;

static_assert(StreamLayer<StreamConv1d> && StreamLayer<StreamConv2d> &&
              StreamLayer<StreamConvTranspose1d> && StreamLayer<StreamPool1d> &&
              StreamLayer<StreamRunningMean> && StreamLayer<StreamDelay>);
static_assert(StreamLayer<FrameLinear> && StreamLayer<FrameActivation> && StreamLayer<FrameGlu> &&
              StreamLayer<FrameAffine> && StreamLayer<FrameNorm> && StreamLayer<StreamGroupNorm>);
static_assert(StreamLayer<StreamLstm> && StreamLayer<StreamGru> && StreamLayer<StreamAttention>);
static_assert(StreamLayer<AnyStreamLayer> && StreamLayer<StreamChain> &&
              StreamLayer<StreamParallel> && StreamLayer<StreamResidual>);
static_assert(!StreamLayer<PackedLinear>, "rows in, rows out, but no stream");

StreamConv1d conv_of(std::int64_t in, std::int64_t out, const StreamKernelConfig& time,
                     const Values& weight, const Values& bias) {
  return {{.in_channels = in, .out_channels = out, .time = time},
          WeightMatrix::of(weight.data(), out, in * time.kernel),
          bias.empty() ? nullptr : bias.data()};
}

StreamConv1d random_conv(Random& random, std::int64_t in, std::int64_t out,
                         const StreamKernelConfig& time) {
  return conv_of(in, out, time, random_values(random, out * in * time.kernel, 0.5),
                 random_values(random, out));
}

StreamAttention random_attention(Random& random, std::int64_t width,
                                 const FrameVisibility& visible) {
  const auto matrix = [&] {
    const Values weight = random_values(random, width * width, 0.3);
    return PackedLinear(WeightMatrix::of(weight.data(), width, width));
  };
  return {{.width = width, .num_heads = 2, .visibility = visible},
          {.query = matrix(), .key = matrix(), .value = matrix(), .output = matrix()}};
}

// frame-stream A.3: two centred kernels with a bias; the end goes through layer by layer.
TEST(StreamChain, FlushesLayerByLayer) {
  const StreamConv1d layer = conv_of(1, 1, StreamKernelConfig::same(3), {1, 2, 3}, {1});
  const StreamChain chain({layer, layer});
  const Frames in(1, Values{1, 2, 3, 4});
  EXPECT_EQ(run_whole(chain, in).values, (Values{64, 103, 94, 46}));
  auto state = chain.make_state();
  Frames out(8, 1);
  EXPECT_EQ(chain.step(in.view().middle_rows(0, 3), state, out.view()), 1);
  EXPECT_EQ(chain.step(in.view().middle_rows(3, 1), state, out.view().middle_rows(1, 7)), 1);
  EXPECT_EQ(chain.flush(state, out.view().middle_rows(2, 6)), 2);
  EXPECT_EQ(Values(out.values.begin(), out.values.begin() + 4), (Values{64, 103, 94, 46}));
  // Zero frames in front instead are another function, because the first layer adds its bias.
  chain.reset(state);
  const Frames padded(1, Values{1, 2, 3, 4, 0, 0});
  EXPECT_EQ(chain.step(padded.view(), state, out.view()), 4);
  EXPECT_EQ(out.values[3], 61);
}

// What a composition computes, by its parts one after the other on whole sequences.
TEST(StreamChain, IsItsLayersOneAfterTheOther) {
  Random random(1);
  const StreamConv1d first = random_conv(random, 4, 6, StreamKernelConfig::same(3, 2));
  const FrameActivation relu(FrameFunction::kRelu, 6);
  const StreamPool1d pool(Pooling::kMax, 6, 2, 2);
  const StreamAttention attention = random_attention(random, 6, FrameVisibility::chunks(3, 1));
  const StreamConv1d last = random_conv(random, 6, 3, StreamKernelConfig::same(5));
  const std::vector<AnyStreamLayer> layers{first, relu, pool, attention, last};
  for (const std::int64_t block : {1, 3, 64}) {
    const StreamChain chain(layers, block);
    for (const std::int64_t frames : {0, 1, 2, 5, 90}) {
      const Frames in = Frames::random(random, frames, 4);
      Frames rows = run_whole(first, in);
      rows = run_whole(relu, rows);
      rows = run_whole(pool, rows);
      rows = run_whole(attention, rows);
      rows = run_whole(last, rows);
      EXPECT_TRUE(test::same_bits(run_whole(chain, in).values, rows.values));
      expect_exact_streaming(chain, in, random.next(), frames == 90 ? 400 : 20);
    }
    expect_declared_latency(chain, 120);
    EXPECT_EQ(chain.state_bytes(), first.state_bytes() + pool.state_bytes() +
                                       attention.state_bytes() + last.state_bytes());
  }
}

// A residual branch with look-ahead and one in chunks, nested, against whole sequences.
TEST(StreamResidual, DelaysTheInputAsTheBranch) {
  Random random(2);
  const StreamConv1d conv = random_conv(random, 5, 5, StreamKernelConfig::same(7));
  const StreamConv1d conv2 = random_conv(random, 5, 5, StreamKernelConfig::same(3));
  const FrameActivation silu(FrameFunction::kSilu, 5);
  const StreamResidual inner(conv2, 0.5F);
  const StreamResidual outer(StreamChain({conv, silu, inner}));
  const Frames in = Frames::random(random, 80, 5);
  const Frames behind = run_whole(silu, run_whole(conv, in));
  const Frames branch = run_whole(conv2, behind);
  std::vector<double> expected;
  for (std::size_t i = 0; i < in.values.size(); ++i)
    expected.push_back(static_cast<double>(in.values[i]) + static_cast<double>(behind.values[i]) +
                       0.5 * static_cast<double>(branch.values[i]));
  expect_close(run_whole(outer, in), expected, 3e-7);
  expect_exact_streaming(outer, in, 3);
  expect_declared_latency(outer, 40);
  EXPECT_EQ(latency_of(outer).look_ahead, 4);
  EXPECT_EQ(latency_of(outer).receptive_field, 9);
  // Of the kernels 6 and 2 frames, of the inputs 4 and 1 that wait; what counts them.
  EXPECT_EQ(outer.state_bytes(), (6 + 2 + 4 + 1) * 5 * sizeof(float) + 2 * 17 + 2 * 8);

  StreamAttention attention = random_attention(random, 4, FrameVisibility{4, 1, 4});
  const StreamResidual chunked(attention);
  const Frames frames = Frames::random(random, 50, 4);
  const Frames attended = run_whole(attention, frames);
  expected.clear();
  for (std::size_t i = 0; i < frames.values.size(); ++i)
    expected.push_back(static_cast<double>(frames.values[i]) +
                       static_cast<double>(attended.values[i]));
  expect_close(run_whole(chunked, frames), expected, 3e-7);
  expect_exact_streaming(chunked, frames, 4);
  expect_declared_latency(chunked, 40);
}

TEST(StreamParallel, BranchesWaitForTheSlowest) {
  Random random(3);
  const StreamConv1d wide = random_conv(random, 4, 6, StreamKernelConfig::same(9, 2));
  const StreamConv1d narrow = random_conv(random, 4, 6, StreamKernelConfig::causal(3, 2));
  const StreamConv1d short_one = random_conv(random, 4, 6, StreamKernelConfig::same(3, 2));
  const Frames in = Frames::random(random, 81, 4);
  const Frames a = run_whole(wide, in);
  const Frames b = run_whole(narrow, in);
  const Frames c = run_whole(short_one, in);
  for (const BranchMerge merge :
       {BranchMerge::kAdd, BranchMerge::kMultiply, BranchMerge::kConcat}) {
    const StreamParallel all({narrow, wide, short_one}, merge, 16);
    std::vector<double> expected;
    for (std::int64_t t = 0; t < a.rows; ++t) {
      if (merge == BranchMerge::kConcat) {
        for (const Frames* part : {&b, &a, &c})
          expected.insert(expected.end(), part->row(t), part->row(t) + 6);
        continue;
      }
      for (std::int64_t i = 0; i < 6; ++i) {
        const double x = static_cast<double>(a.at(t, i));
        const double y = static_cast<double>(b.at(t, i));
        const double z = static_cast<double>(c.at(t, i));
        expected.push_back(merge == BranchMerge::kAdd ? x + y + z : x * y * z);
      }
    }
    expect_close(run_whole(all, in), expected, 3e-7);
    expect_exact_streaming(all, in, random.next());
    expect_declared_latency(all, 60);
    EXPECT_EQ(latency_of(all).look_ahead, 4);
    EXPECT_EQ(latency_of(all).receptive_field, 9);
  }
  // A long past and a long future in different branches: an output sees both.
  const StreamParallel both({random_conv(random, 4, 4, StreamKernelConfig::causal(20)),
                             random_conv(random, 4, 4, StreamKernelConfig::same(5))},
                            BranchMerge::kAdd);
  EXPECT_EQ(latency_of(both).receptive_field, 22);
  EXPECT_EQ(latency_of(both).look_ahead, 2);
  expect_exact_streaming(both, in, 5, 100);
}

TEST(Compositions, RefuseWhatDoesNotFit) {
  Random random(4);
  const StreamConv1d four = random_conv(random, 4, 4, StreamKernelConfig::causal(3));
  const StreamConv1d strided = random_conv(random, 4, 4, StreamKernelConfig::causal(3, 2));
  const StreamConv1d shorter = random_conv(random, 4, 4, StreamKernelConfig::valid(3));
  const StreamConv1d narrower = random_conv(random, 4, 3, StreamKernelConfig::causal(3));
  const auto code_of = [](auto&& make) {
    const auto error = error_of(make);
    return error.value_or(Error(ErrorCode::kIo, {})).code();
  };
  EXPECT_EQ(code_of([&] { const StreamChain chain({four, four}); }), ErrorCode::kIo);
  EXPECT_EQ(code_of([&] { const StreamChain chain({narrower, four}); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { const StreamChain chain({}); }), ErrorCode::kConfig);
  EXPECT_EQ(code_of([&] { const StreamChain chain({four}, 0); }), ErrorCode::kConfig);
  EXPECT_EQ(code_of([&] { const StreamResidual residual(narrower); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { const StreamResidual residual(strided); }), ErrorCode::kConfig);
  EXPECT_EQ(code_of([&] { const StreamResidual residual(shorter); }), ErrorCode::kConfig);
  const auto parallel = [&](std::vector<AnyStreamLayer> branches, BranchMerge merge) {
    return code_of([&] { const StreamParallel all(std::move(branches), merge); });
  };
  EXPECT_EQ(parallel({four, narrower}, BranchMerge::kAdd), ErrorCode::kShape);
  EXPECT_EQ(parallel({four, narrower}, BranchMerge::kConcat), ErrorCode::kIo);
  EXPECT_EQ(parallel({four, strided}, BranchMerge::kAdd), ErrorCode::kConfig);
  EXPECT_EQ(parallel({four, shorter}, BranchMerge::kAdd), ErrorCode::kConfig);
  EXPECT_EQ(parallel({}, BranchMerge::kAdd), ErrorCode::kConfig);
  const auto error = error_of([&] { const StreamChain chain({four, narrower, four}); });
  EXPECT_STREQ(error->what(),
               "shape: widths do not fit in StreamChain, field input of layer 2: expected 3, found "
               "4");
}

// frame-stream A.6: what stands before the first frame is GLU(bias) = 1 sigmoid(0).
TEST(ConformerConvolution, StartsWhereTheModelDid) {
  EXPECT_EQ(projected_zeros({1, 0}), (Values{0.5F}));

  Random random(5);
  const std::int64_t width = 6;
  const std::int64_t kernel = 5;
  const Values expand = random_values(random, 2 * width * width, 0.4);
  const Values project = random_values(random, width * width, 0.4);
  const Values depthwise = random_values(random, width * kernel, 0.4);
  const Values scale = random_values(random, width);
  const Values shift = random_values(random, width);
  ConformerConvolution parts{
      .expand = WeightMatrix::of(expand.data(), 2 * width, width),
      .expand_bias = random_values(random, 2 * width),
      .depthwise = WeightMatrix::of(depthwise.data(), width, kernel),
      .depthwise_bias = random_values(random, width),
      .time = StreamKernelConfig::causal(kernel),
      .project = WeightMatrix::of(project.data(), width, width),
      .project_bias = random_values(random, width),
  };
  const Frames in = Frames::random(random, 60, width);
  for (const ConformerStart start : {ConformerStart::kZeros, ConformerStart::kProjectedZeros}) {
    parts.start = start;
    const StreamChain module = conformer_convolution(parts, FrameAffine(scale, shift));
    // The order of WeNet: zero frames in front of the first linear layer; of NeMo: behind the gate.
    const auto gated = [&](std::int64_t t) {
      std::vector<double> row(width);
      if (t < 0 && start == ConformerStart::kZeros) return row;
      for (std::int64_t c = 0; c < width; ++c) {
        double a = static_cast<double>(parts.expand_bias[c]);
        double b = static_cast<double>(parts.expand_bias[width + c]);
        for (std::int64_t i = 0; t >= 0 && i < width; ++i) {
          a += static_cast<double>(expand[c * width + i]) * static_cast<double>(in.at(t, i));
          b += static_cast<double>(expand[(width + c) * width + i]) *
               static_cast<double>(in.at(t, i));
        }
        row[c] = a / (1.0 + std::exp(-b));
      }
      return row;
    };
    std::vector<double> expected;
    for (std::int64_t t = 0; t < in.rows; ++t) {
      std::vector<double> swish(width);
      for (std::int64_t c = 0; c < width; ++c) {
        double sum = static_cast<double>(parts.depthwise_bias[c]);
        for (std::int64_t i = 0; i < kernel; ++i)
          sum += static_cast<double>(depthwise[c * kernel + i]) * gated(t - (kernel - 1 - i))[c];
        sum = sum * static_cast<double>(scale[c]) + static_cast<double>(shift[c]);
        swish[c] = sum / (1.0 + std::exp(-sum));
      }
      for (std::int64_t c = 0; c < width; ++c) {
        double sum = static_cast<double>(parts.project_bias[c]);
        for (std::int64_t i = 0; i < width; ++i)
          sum += static_cast<double>(project[c * width + i]) * swish[i];
        expected.push_back(sum);
      }
    }
    expect_close(run_whole(module, in), expected, 2e-6);
    expect_exact_streaming(module, in, random.next());
  }
  EXPECT_EQ(conformer_convolution(parts, FrameAffine(scale, shift)).state_bytes(),
            static_cast<std::size_t>((kernel - 1) * width * 4 + 17));
  parts.expand_bias.pop_back();
  EXPECT_TRUE(error_of([&] { conformer_convolution(parts, FrameAffine(scale, shift)); }));
}

// A recurrent network, an encoder block and upsampling in one: everything together.
TEST(Compositions, AWholeNetworkInAnyChunks) {
  Random random(6);
  const std::int64_t width = 6;
  const Values gates = random_values(random, 4 * width * width, 0.4);
  const StreamLstm lstm(WeightMatrix::of(gates.data(), 4 * width, width),
                        WeightMatrix::of(gates.data(), 4 * width, width));
  const Values up = random_values(random, width * width * 4, 0.4);
  const FrameNorm norm({}, Values(width, 1.0F));
  const StreamChain network({
      random_conv(random, 3, width, StreamKernelConfig::nemo_causal(3, 2)),
      FrameActivation(FrameFunction::kRelu, width),
      StreamResidual(StreamChain(
          {norm, random_attention(random, width, FrameVisibility::chunked_limited(6, 2))})),
      StreamResidual(
          StreamChain({norm, random_conv(random, width, width, StreamKernelConfig::same(5))})),
      lstm,
      StreamConvTranspose1d(width, width, 4, 2, WeightMatrix::of(up.data(), width, width * 4)),
      StreamGroupNorm(2, Values(width, 1.0F), Values(width, 0.0F)),
  });
  const Frames in = Frames::random(random, 77, 3);
  expect_exact_streaming(network, in, 7, 300);
  EXPECT_EQ(latency_of(network).receptive_field, kUnboundedFrames);
  expect_declared_latency(network, 77);
}

// Bytes from elsewhere: damaged, truncated, of another layer. The state stays as it was.
TEST(StreamStates, RestoreNothingFromBadBytes) {
  Random random(8);
  const StreamChain chain({random_conv(random, 3, 4, StreamKernelConfig::same(5, 2)),
                           StreamPool1d(Pooling::kMax, 4, 3, 3),
                           StreamResidual(random_attention(random, 4, {2, 1, 2})),
                           StreamParallel({random_conv(random, 4, 4, StreamKernelConfig::same(3)),
                                           random_conv(random, 4, 4, StreamKernelConfig::same(5))},
                                          BranchMerge::kAdd, 4),
                           StreamDelay(4, 2), StreamRunningMean(4)});
  const StreamChain other({random_conv(random, 3, 4, StreamKernelConfig::same(7, 2)),
                           StreamPool1d(Pooling::kMax, 4, 3, 3),
                           StreamResidual(random_attention(random, 4, {2, 1, 2})),
                           StreamParallel({random_conv(random, 4, 4, StreamKernelConfig::same(3)),
                                           random_conv(random, 4, 4, StreamKernelConfig::same(5))},
                                          BranchMerge::kAdd, 4),
                           StreamDelay(4, 2), StreamRunningMean(4)});
  const Frames in = Frames::random(random, 61, 3);
  auto state = chain.make_state();
  Frames out(80, 4);
  chain.step(in.view().middle_rows(0, 30), state, out.view());
  const std::vector<std::byte> bytes = save_stream_state(chain, state);
  const auto refused = [&](std::span<const std::byte> damaged) {
    const auto error = error_of([&] { restore_stream_state(chain, damaged, state); });
    return error.has_value() && error->code() == ErrorCode::kFormat;
  };
  for (std::size_t size = 0; size < bytes.size(); size += 7)
    EXPECT_TRUE(refused(std::span(bytes).first(size)));
  for (std::size_t i = 0; i < bytes.size(); i += 11) {
    std::vector<std::byte> damaged = bytes;
    damaged[i] ^= std::byte{4};
    EXPECT_TRUE(refused(damaged));
  }
  auto other_state = other.make_state();
  EXPECT_TRUE(refused(save_stream_state(other, other_state)));
  // Damage with a checksum that fits: counts out of range are found, or it is a state.
  int found = 0;
  for (const std::byte change : {std::byte{0x81}, std::byte{1}, std::byte{2}})
    for (std::size_t i = 32; i + 8 < bytes.size(); ++i) {
      ByteWriter writer;
      for (std::size_t k = 0; k + 8 < bytes.size(); ++k)
        writer.write(static_cast<std::uint8_t>(k == i ? bytes[k] ^ change : bytes[k]));
      writer.write_checksum();
      auto copy = state;
      if (error_of([&] { restore_stream_state(chain, writer.bytes(), copy); })) {
        ++found;
      } else {
        chain.step(in.view().middle_rows(30, 31), copy, out.view());
        chain.flush(copy, out.view());
      }
    }
  EXPECT_GT(found, 50);
  auto restored = chain.make_state();
  restore_stream_state(chain, bytes, restored);
  Frames a(80, 4);
  Frames b(80, 4);
  const std::int64_t rows = chain.step(in.view().middle_rows(30, 31), state, a.view());
  EXPECT_EQ(chain.step(in.view().middle_rows(30, 31), restored, b.view()), rows);
  EXPECT_EQ(a.values, b.values);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
