// SPDX-License-Identifier: MIT
/// Times attention over segment lists (decode) and over sinks and window (prefill), each alone, in
/// replayed CUDA graphs with keys and values of their own for each layer. One JSON object a line.
///
/// usage: segment_attention_bench [--case segments|prefill] [--only NAME] [--sweep] [--overlap]
/// --only: of segments' cases this one.
/// --sweep: other schedules of segments beside the plan's own. --overlap: launches that may start
/// before the one before them has ended.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include <sluice/backend/cuda/chunk_attention.cuh>
#include <sluice/backend/cuda/segment_attention.cuh>

#include "cuda/measure.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;

constexpr int kHeadDim = 128;

struct SegmentBenchCase {
  const char* name;
  int batch;
  int num_qo_heads;
  int num_kv_heads;
  std::int64_t queries;
  std::int64_t sinks;  // a list is the sinks, the window in two runs,
  std::int64_t window;
  std::int64_t source;  // and the visible prefix of another group
  int layers;
};

constexpr SegmentBenchCase kSegmentCases[] = {
    {"1028", 1, 32, 8, 1, 4, 1024, 0, 32},
    {"4100", 1, 32, 8, 1, 4, 4096, 0, 32},
    {"32772", 1, 32, 8, 1, 4, 32768, 0, 16},
    {"groups-4096+1028", 1, 32, 8, 1, 4, 1024, 4096, 32},
    {"4100-4-queries", 1, 32, 8, 4, 4, 4096, 0, 32},
    {"4100-16-queries", 1, 32, 8, 16, 4, 4096, 0, 32},
    {"batch8x4096", 8, 32, 8, 1, 4, 4092, 0, 16},
};

std::vector<double> frequencies() {
  std::vector<double> result;
  for (int i = 0; i < kHeadDim / 2; ++i) result.push_back(std::pow(500000.0, -2.0 * i / kHeadDim));
  return result;
}

template <class Element, int kColumnTiles>
void measure_segments(const SegmentBenchCase& c, const char* type, SegmentSchedule schedule,
                      bool overlap) {
  using Variant = device::AttentionVariant<device::GroupCausalWindow>;
  const std::int64_t slots = c.sinks + c.window + c.source;
  SegmentAttentionShape shape;
  shape.num_qo_heads = c.num_qo_heads;
  shape.num_kv_heads = c.num_kv_heads;
  shape.batch_size = c.batch;
  shape.max_queries = c.queries;
  shape.max_segments = 4;
  shape.max_keys = slots;
  const std::vector<double> turns = frequencies();
  const std::int64_t rows = c.num_kv_heads * slots;  // of one session, one layer
  const auto all = static_cast<std::size_t>(rows * c.batch * c.layers);
  Buffer<std::uint8_t, cuda> keys(all * kHeadDim * sizeof(Element));
  Buffer<std::uint8_t, cuda> values(all * kHeadDim * sizeof(Element));
  Buffer<float, cuda> scales(all);
  const auto fill = [](auto& buffer, std::uint64_t salt) {
    fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(buffer.data()),
                               static_cast<std::int64_t>(buffer.bytes() / 2), salt);
  };
  fill(keys, 1);
  fill(values, 1ULL << 40);
  const std::vector<float> ones(all, 0.02F);
  scales.upload(ones);
  Buffer<std::int64_t, cuda> snapshot{std::span<const std::int64_t>(&c.source, 1)};
  std::vector<SegmentLists<Element>> lists;
  for (int layer = 0; layer < c.layers; ++layer) {
    lists.emplace_back(shape);
    std::vector<device::SegmentReader> readers;
    for (int b = 0; b < c.batch; ++b) {
      const std::int64_t row = (static_cast<std::int64_t>(layer) * c.batch + b) * rows;
      std::vector<device::Segment<Element>> list;
      const auto add = [&](std::int64_t slot, std::int64_t count, std::int64_t index) {
        device::Segment<Element> s;
        s.first_index = index;
        s.count = s.visible = count;
        s.group = 1;
        s.keys = reinterpret_cast<const Element*>(keys.data()) + (row + slot) * kHeadDim;
        s.values = reinterpret_cast<const Element*>(values.data()) + (row + slot) * kHeadDim;
        s.key_head_stride = s.value_head_stride = slots * kHeadDim;
        s.key_token_stride = s.value_token_stride = kHeadDim;
        s.key_scales = s.value_scales = scales.data() + row + slot;
        s.key_scale_head_stride = s.value_scale_head_stride = slots;
        s.key_scale_token_stride = s.value_scale_token_stride = 1;
        list.push_back(s);
      };
      if (c.source > 0) {
        add(c.sinks + c.window, c.source, 0);
        list.back().group = 0;
        list.back().visible_tokens = snapshot.data();
      }
      const std::int64_t oldest = 1000000;
      add(0, c.sinks, 0);
      list.back().ceiling = static_cast<double>(c.sinks + c.window - 1);
      add(c.sinks + c.window / 3, c.window - c.window / 3, oldest);
      add(c.sinks, c.window / 3, oldest + c.window - c.window / 3);
      lists.back().set(b, 0, list);
      const std::int64_t first = oldest + c.window - c.queries;
      readers.push_back(
          {first, static_cast<double>(first), static_cast<std::int32_t>(c.queries), 0});
    }
    lists.back().set_readers(readers);
  }
  const auto size = static_cast<std::size_t>(c.batch * c.queries * c.num_qo_heads * kHeadDim);
  Buffer<std::uint16_t, cuda> input(size);
  Buffer<std::uint16_t, cuda> output(size);
  fill(input, 1ULL << 41);
  const SegmentAttentionPlan<Element, kHeadDim, Variant, kColumnTiles> plan(
      shape, {turns, 1, false}, schedule);
  SegmentAttentionTensors x;
  x.query = input.data();
  x.out = output.data();
  x.input_type = x.output_type = ElementType::kBF16;
  x.query_token_stride = x.out_token_stride = c.num_qo_heads * kHeadDim;
  x.query_session_stride = x.out_session_stride = c.queries * c.num_qo_heads * kHeadDim;
  const Variant variant{0.0883883476F, {{c.window + c.queries, c.sinks}, 1, false}, {}, {}};
  const auto record = [&](cudaStream_t stream) {
    for (const SegmentLists<Element>& list : lists)
      plan.launch(list.view(), x, variant, stream, overlap);
  };
  double spread = 0;
  const double one = time_graph(record, 1, 3, &spread);
  const double time =
      time_graph(record, std::max(1, static_cast<int>(5000 / one)), 9, &spread) / c.layers;
  const double bytes = static_cast<double>(rows) * c.batch * 2 *
                       (kHeadDim * sizeof(Element) + (sizeof(Element) == 1 ? 4 : 0));
  std::printf(
      "{\"bench\": \"segment_attention\", \"case\": \"%s\", \"batch\": %d, \"heads\": \"%d:%d\", "
      "\"head_dim\": 128, \"keys\": %lld, \"queries\": %lld, \"type\": \"%s\", \"column_tiles\": "
      "%d, "
      "\"splits\": %d, \"cluster\": %d, \"overlap\": %s, \"layers\": %d, \"us\": %.3f, "
      "\"spread_us\": %.3f, \"tb_per_s\": %.3f}\n",
      c.name, c.batch, c.num_qo_heads, c.num_kv_heads, static_cast<long long>(slots),
      static_cast<long long>(c.queries), type, kColumnTiles, plan.schedule().splits,
      plan.schedule().cluster, overlap ? "true" : "false", c.layers, time, spread / c.layers,
      bytes / time * 1e-6);
  std::fflush(stdout);
}

/// A chunk of 32,768 tokens at the start of a stream.
void measure_prefill(std::int64_t window, ChunkKernel kernel) {
  constexpr std::int64_t kTokens = 32768;
  constexpr std::int64_t kHeads = 32;
  constexpr std::int64_t kSinks = 4;
  const std::int64_t capacity = kSinks + window + kTokens - 1;
  const std::vector<double> turns = frequencies();
  const DecodeStepConfig config{
      .num_sink_tokens = kSinks, .window_size = window, .capacity = capacity, .frequencies = turns};
  const DecodeStep step(config);
  ChunkAttentionPlan<bf16, kHeadDim> plan({kHeads, kHeads, kHeadDim}, config, kTokens, kernel);
  Buffer<float, cuda> input(static_cast<std::size_t>(kTokens * 3 * kHeads * kHeadDim));
  Buffer<bf16, cuda> output(static_cast<std::size_t>(kTokens * kHeads * kHeadDim));
  Buffer<bf16, cuda> keys(static_cast<std::size_t>(kHeads * capacity * kHeadDim));
  Buffer<bf16, cuda> values(static_cast<std::size_t>(kHeads * capacity * kHeadDim));
  // Two bf16 side by side are a float like the second.
  fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(input.data()),
                             static_cast<std::int64_t>(input.bytes() / 2), 1);
  ChunkAttentionTensors<bf16> x;
  x.query = input.data();
  x.key = input.data() + kHeads * kHeadDim;
  x.value = input.data() + 2 * kHeads * kHeadDim;
  x.stride = 3 * kHeads * kHeadDim;
  x.out = output.data();
  x.keys = keys.data();
  x.values = values.data();
  x.head_stride = capacity * kHeadDim;
  x.token_stride = kHeadDim;
  constexpr float kScale = 0.0883883476F;
  plan.rotate(step, 0, kTokens, nullptr);
  plan.launch(step, x, 0, kTokens, kScale, nullptr);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  double pairs = 0;  // keys that queries see
  for (std::int64_t i = 0; i < kTokens; ++i)
    pairs += static_cast<double>(std::min(i + 1, window) +
                                 std::clamp<std::int64_t>(i + 1 - window, 0, kSinks));
  double spread = 0;
  const double alone =
      time_graph([&](cudaStream_t stream) { plan.attend(step, x, 0, kTokens, kScale, stream); }, 3,
                 9, &spread);
  double spread_all = 0;
  const double with_append =
      time_graph([&](cudaStream_t stream) { plan.launch(step, x, 0, kTokens, kScale, stream); }, 3,
                 9, &spread_all);
  const double flops = 4.0 * kHeadDim * kHeads * pairs;
  std::printf(
      "{\"bench\": \"prefill_attention\", \"kernel\": \"%s\", \"heads\": \"32:32\", \"head_dim\": "
      "128, "
      "\"tokens\": %lld, \"sinks\": %lld, \"window\": %lld, \"us\": %.1f, \"spread_us\": %.1f, "
      "\"tflop_per_s\": %.1f, \"with_rotation_and_append_us\": %.1f}\n",
      plan.kernel() == ChunkKernel::kHopper ? "wgmma" : "mma", static_cast<long long>(kTokens),
      static_cast<long long>(kSinks), static_cast<long long>(window), alone, spread,
      flops / alone * 1e-6, with_append);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  std::string only;
  std::string name;
  bool overlap = false;
  std::vector<SegmentSchedule> schedules{{}};
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--case") == 0 && i + 1 < count) {
      only = arguments[++i];
    } else if (std::strcmp(arguments[i], "--only") == 0 && i + 1 < count) {
      name = arguments[++i];
    } else if (std::strcmp(arguments[i], "--overlap") == 0) {
      overlap = true;
    } else if (std::strcmp(arguments[i], "--sweep") == 0) {
      schedules.insert(schedules.end(),
                       {{4, 2}, {8, 2}, {8, 8}, {11, 1}, {12, 2}, {12, 6}, {16, 1}, {16, 2}});
    } else {
      std::fprintf(stderr,
                   "usage: segment_attention_bench [--case segments|prefill] [--only NAME] "
                   "[--sweep] [--overlap]\n");
      return 2;
    }
  }
  try {
    measure_machine();
    if (only.empty() || only == "prefill")
      for (const std::int64_t window : {1024, 4096})
        for (const ChunkKernel kernel : {ChunkKernel::kMma, ChunkKernel::kAuto})
          measure_prefill(window, kernel);
    if (only.empty() || only == "segments")
      for (const SegmentBenchCase& c : kSegmentCases)
        for (const SegmentSchedule schedule : schedules) {
          if (!name.empty() && name != c.name) continue;
          measure_segments<bf16, 1>(c, "bf16", schedule, overlap);
          if (c.queries > 1) measure_segments<bf16, 2>(c, "bf16", schedule, overlap);
          if (c.queries == 1) measure_segments<std::int8_t, 1>(c, "int8", schedule, overlap);
          if (c.queries == 1) measure_segments<fp8_e4m3, 1>(c, "fp8_e4m3", schedule, overlap);
        }
  } catch (const Error& error) {
    std::fprintf(stderr, "segment_attention_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
