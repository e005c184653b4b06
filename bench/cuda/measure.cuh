// SPDX-License-Identifier: MIT
/// What the CUDA benchmarks share: random content, timed graphs, the machine's own limits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include <sluice/sluice.cuh>

namespace sluice::bench {

/// bf16 of `scale` times near normal numbers.
static __global__ void fill_random(std::uint16_t* data, std::int64_t count, std::uint64_t salt,
                                   float scale = 1) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t z = (static_cast<std::uint64_t>(i) + salt) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    // A sum of uniforms: near normal, unit variance.
    float x = -2;
    for (int j = 0; j < 4; ++j) x += static_cast<float>((z >> (16 * j)) & 0xffff) * 0x1p-16F;
    data[i] = static_cast<std::uint16_t>(__float_as_uint(x * 1.7320508F * scale) >> 16);
  }
}

static __global__ void do_nothing() {}

/// Reads everything once, adds it up and writes next to nothing.
static __global__ void __launch_bounds__(512)
    read_all(const uint4* data, std::int64_t count, std::uint32_t* sink) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  std::uint32_t sum = 0;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  if (sum == 0x12345678U) *sink = sum;
}

/// Microseconds of one replay of what `record` launches: the median of `trials`, each of several.
inline double time_graph(const std::function<void(cudaStream_t)>& record, int replays, int trials,
                         double* spread) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
  check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  record(stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 3; ++i) check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
  std::vector<double> times;
  for (int trial = 0; trial < trials; ++trial) {
    check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
    for (int i = 0; i < replays; ++i)
      check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(1000.0 * static_cast<double>(milliseconds) / replays);
  }
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaEventDestroy(begin), "destroy");
  check_cuda(cudaEventDestroy(end), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
  std::sort(times.begin(), times.end());
  *spread = times.back() - times.front();
  return times[times.size() / 2];
}

/// Prints what the machine can do: the speed of reading, an empty kernel. Returns the former, TB/s.
inline double measure_machine() {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  double spread = 0;
  const double empty = time_graph(
      [](cudaStream_t stream) {
        for (int i = 0; i < 32; ++i) do_nothing<<<132, 128, 0, stream>>>();
      },
      50, 9, &spread);
  const std::int64_t bytes = std::int64_t{4} << 30;
  Buffer<std::uint16_t, cuda> data(static_cast<std::size_t>(bytes / 2));
  Buffer<std::uint32_t, cuda> sink(1);
  fill_random<<<1024, 256>>>(data.data(), bytes / 2, 7);
  double best = 0;
  for (const int blocks : {2, 4}) {
    const double time = time_graph(
        [&](cudaStream_t stream) {
          read_all<<<static_cast<unsigned>(blocks * properties.multiProcessorCount), 512, 0,
                     stream>>>(reinterpret_cast<const uint4*>(data.data()), bytes / 16,
                               sink.data());
        },
        2, 9, &spread);
    best = std::max(best, static_cast<double>(bytes) / time * 1e-6);
  }
  std::printf(
      "{\"bench\": \"machine\", \"device\": \"%s\", \"multiprocessors\": %d, "
      "\"l2_bytes\": %d, \"empty_kernel_us\": %.3f, \"read_tb_per_s\": %.3f}\n",
      properties.name, properties.multiProcessorCount, properties.l2CacheSize, empty / 32, best);
  std::fflush(stdout);
  return best;
}

}  // namespace sluice::bench
