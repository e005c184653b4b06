// SPDX-License-Identifier: MIT
/// Times decode attention in replayed CUDA graphs: a graph is the layers of one step and the
/// advance() that ends it, each layer with keys and values of its own, together far more than the
/// second-level cache holds. One JSON object a line, on stdout.
///
/// usage: decode_attention_bench [--sweep] [--case NAME] [--type bf16|f16|int8|fp8]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <sluice/sluice.cuh>

#include "cuda/measure.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;

struct BenchCase {
  const char* name;
  int batch;
  int num_qo_heads;
  int num_kv_heads;
  std::int64_t sinks;
  std::int64_t window;
  int layers;
};

constexpr BenchCase kCases[] = {
    {"1028", 1, 32, 8, 4, 1024, 32},         {"4100", 1, 32, 8, 4, 4096, 32},
    {"32772", 1, 32, 8, 4, 32768, 16},       {"batch8x4096", 8, 32, 8, 4, 4092, 16},
    {"batch64x4096", 64, 32, 8, 4, 4092, 8}, {"1028-mha", 1, 32, 32, 4, 1024, 32},
    {"4100-ratio7", 1, 28, 4, 4, 4096, 32},  {"4100-ratio16", 1, 32, 2, 4, 4096, 64},
};

/// Bytes at random: numbers of either type of codes, the code of NaN left out.
__global__ void fill_codes(std::uint32_t* data, std::int64_t count, std::uint64_t salt) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t z = (static_cast<std::uint64_t>(i) + salt) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    data[i] = static_cast<std::uint32_t>(z >> 32) & 0xbfbfbfbfU;
  }
}

/// Scales of rows of codes: 0.01 to 0.02.
__global__ void fill_scales(float* data, std::int64_t count) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride)
    data[i] = 0.01F + 0.0001F * static_cast<float>(i % 101);
}

template <class Element>
void measure(const BenchCase& c, bool sweep, const char* type) {
  constexpr int kHeadDim = 128;
  constexpr bool kCodes = sizeof(Element) == 1;
  const std::int64_t capacity = c.sinks + c.window;
  std::vector<double> frequencies;
  for (int i = 0; i < kHeadDim / 2; ++i)
    frequencies.push_back(std::pow(500000.0, -2.0 * i / kHeadDim));
  const DecodeStepConfig config{.num_sink_tokens = c.sinks,
                                .window_size = c.window,
                                .capacity = capacity,
                                .batch_size = c.batch,
                                .frequencies = frequencies};
  DecodeStep step(config);
  step.set_totals(std::vector<std::int64_t>(static_cast<std::size_t>(c.batch), 1000000));
  const std::int64_t per_layer = std::int64_t{c.batch} * c.num_kv_heads * capacity * kHeadDim;
  const std::int64_t heads = c.num_qo_heads + 2 * c.num_kv_heads;
  const std::int64_t rows_per_layer = per_layer / kHeadDim;
  // On real memory nothing is zero: zeros would be faster than any model.
  const std::size_t cache = static_cast<std::size_t>(per_layer * c.layers) * sizeof(Element);
  Buffer<std::uint8_t, cuda> keys(cache);
  Buffer<std::uint8_t, cuda> values(cache);
  Buffer<float, cuda> scales(kCodes ? static_cast<std::size_t>(2 * rows_per_layer * c.layers) : 0);
  Buffer<std::uint16_t, cuda> input(static_cast<std::size_t>(c.batch * heads * kHeadDim));
  Buffer<std::uint16_t, cuda> output(static_cast<std::size_t>(c.batch * c.num_qo_heads * kHeadDim));
  for (int kv = 0; kv < 2; ++kv) {
    std::uint8_t* const data = kv == 0 ? keys.data() : values.data();
    const std::uint64_t salt = kv == 0 ? 1 : 1ULL << 40;
    if (kCodes)
      fill_codes<<<1024, 256>>>(reinterpret_cast<std::uint32_t*>(data), per_layer * c.layers / 4,
                                salt);
    else
      fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(data), per_layer * c.layers,
                                 salt);
  }
  if (kCodes) fill_scales<<<1024, 256>>>(scales.data(), 2 * rows_per_layer * c.layers);
  fill_random<<<64, 256>>>(input.data(), c.batch * heads * kHeadDim, 1ULL << 41);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

  using Plan = DecodeAttentionPlan<Element, kHeadDim>;
  const DecodeAttentionShape shape{c.num_qo_heads, c.num_kv_heads, kHeadDim};
  std::vector<DecodeSchedule> schedules{{}};
  if (sweep) {
    const int tiles = static_cast<int>((capacity + Plan::kTile - 1) / Plan::kTile);
    const int tiles_of_heads = (c.num_qo_heads / c.num_kv_heads + 7) / 8;
    const int units = c.batch * c.num_kv_heads * tiles_of_heads;
    for (const int warps : {4, 5, 6, 7, 8, 9, 11, 12}) {
      for (const int cluster : {1, 2, 4, 8, 16}) {
        const double most = units >= 64 ? 80 : 24;  // warps per multiprocessor, waves included
        for (int splits = cluster; splits <= 512; splits += cluster) {
          const double resident = static_cast<double>(splits) * warps * units / 132;
          const int rounds = (tiles + warps * splits - 1) / (warps * splits);
          const int before = splits == cluster ? 0
                                               : (tiles + warps * (splits - cluster) - 1) /
                                                     (warps * (splits - cluster));
          if (rounds == before || resident < 2.5 || resident > most) continue;
          schedules.push_back({warps, splits, cluster});
        }
      }
    }
  }
  for (const DecodeSchedule& schedule : schedules) {
    for (const bool overlap : {false, true}) {
      const Plan plan(shape, config, overlap, schedule);
      const auto record = [&](cudaStream_t stream) {
        for (int layer = 0; layer < c.layers; ++layer) {
          DecodeAttentionTensors<Element> x;
          x.query = input.data();
          x.key = input.data() + c.num_qo_heads * kHeadDim;
          x.value = input.data() + (c.num_qo_heads + c.num_kv_heads) * kHeadDim;
          x.query_stride = x.key_stride = x.value_stride = heads * kHeadDim;
          x.out = output.data();
          x.out_stride = std::int64_t{c.num_qo_heads} * kHeadDim;
          x.keys = reinterpret_cast<Element*>(keys.data()) + layer * per_layer;
          x.values = reinterpret_cast<Element*>(values.data()) + layer * per_layer;
          if (kCodes) {
            x.key_scales = scales.data() + 2 * layer * rows_per_layer;
            x.value_scales = x.key_scales + rows_per_layer;
            x.scale_sequence_stride = c.num_kv_heads * capacity;
            x.scale_head_stride = capacity;
          }
          x.sequence_stride = c.num_kv_heads * capacity * kHeadDim;
          x.head_stride = capacity * kHeadDim;
          x.token_stride = kHeadDim;
          plan.launch(step, x, 0.0883883476F, stream);
        }
        step.advance(stream, overlap);
      };
      double spread = 0;
      const double one = time_graph(record, 1, 3, &spread);
      const int replays = std::max(1, static_cast<int>((sweep ? 1500 : 10000) / one));
      const double time = time_graph(record, replays, sweep ? 3 : 15, &spread) / c.layers;
      const double bytes = 2.0 * static_cast<double>(rows_per_layer) *
                           (kHeadDim * sizeof(Element) + (kCodes ? sizeof(float) : 0));
      std::printf(
          "{\"bench\": \"decode_attention\", \"case\": \"%s\", \"batch\": %d, \"heads\": "
          "\"%d:%d\", "
          "\"head_dim\": 128, \"keys\": %lld, \"type\": \"%s\", \"warps\": %d, \"splits\": %d, "
          "\"cluster\": %d, "
          "\"default\": %s, \"overlap\": %s, \"layers\": %d, \"us\": %.3f, \"spread_us\": %.3f, "
          "\"tb_per_s\": %.3f}\n",
          c.name, c.batch, c.num_qo_heads, c.num_kv_heads, static_cast<long long>(capacity), type,
          plan.schedule().warps, plan.schedule().splits, plan.schedule().cluster,
          schedule == DecodeSchedule{} ? "true" : "false", overlap ? "true" : "false", c.layers,
          time, spread / c.layers, bytes / time * 1e-6);
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  bool sweep = false;
  std::string only;
  std::string type = "bf16";
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--sweep") == 0) {
      sweep = true;
    } else if (std::strcmp(arguments[i], "--case") == 0 && i + 1 < count) {
      only = arguments[++i];
    } else if (std::strcmp(arguments[i], "--type") == 0 && i + 1 < count) {
      type = arguments[++i];
    } else {
      std::fprintf(stderr,
                   "usage: decode_attention_bench [--sweep] [--case NAME] "
                   "[--type bf16|f16|int8|fp8]\n");
      return 2;
    }
  }
  const auto run = [&]() -> void (*)(const BenchCase&, bool, const char*) {
    if (type == "bf16") return measure<bf16>;
    if (type == "f16") return measure<f16>;
    if (type == "int8") return measure<std::int8_t>;
    if (type == "fp8") return measure<fp8_e4m3>;
    return nullptr;
  }();
  if (run == nullptr) {
    std::fprintf(stderr, "decode_attention_bench: no type %s\n", type.c_str());
    return 2;
  }
  try {
    measure_machine();
    for (const BenchCase& c : kCases)
      if (only.empty() || only == c.name) run(c, sweep, type.c_str());
  } catch (const Error& error) {
    std::fprintf(stderr, "decode_attention_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
