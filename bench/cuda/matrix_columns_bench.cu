// SPDX-License-Identifier: MIT
/// Times the four products of a decoder's layer with 1 to 8 vectors at once, each alone and in
/// turn as a layer has them, in replayed CUDA graphs over layers of their own: by
/// MatrixColumnsPlan, by cuBLASLt, by MatrixVectorPlan where there is one vector. One JSON object
/// a line, on stdout.
///
/// usage: matrix_columns_bench [--layers N]
///   --layers N  layers of a graph (16; of the 8B geometry, 7.0 GB)
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <sluice/backend/cuda/decoder_kernels.cuh>
#include <sluice/backend/cuda/matrix_columns.cuh>
#include <sluice/backend/cuda/matrix_product.cuh>
#include <sluice/backend/cuda/matrix_vector.cuh>

#include "cuda/measure.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;
using enum VectorEpilogue;

struct Geometry {
  const char* name;
  std::int64_t hidden;
  std::int64_t fused;
  std::int64_t intermediate;
};

struct Part {
  const char* name;
  VectorEpilogue epilogue;
  std::int64_t rows;
  std::int64_t cols;
  bool norm;
};

/// The matrices of some layers, and what their products read and write.
class Layers {
 public:
  Layers(const Geometry& g, std::int64_t layers)
      : parts{{{"query_key_value", kStore, g.fused, g.hidden, true},
               {"output", kAdd, g.hidden, g.hidden, false},
               {"gate_up", kGatedSilu, 2 * g.intermediate, g.hidden, true},
               {"down", kAdd, g.hidden, g.intermediate, false}}},

        widest_(std::max(g.fused, 2 * g.intermediate)),
        norm_(size(widest_)),
        x_(size(kMost * widest_)),
        y_(size(kMost * widest_)),
        rounded_(size(kMost * widest_)) {
    const std::vector<float> ones(x_.size(), 1.0F);
    norm_.upload(std::vector<float>(norm_.size(), 1.0F));
    x_.upload(ones);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      matrices_[i] = Buffer<bf16, cuda>(size(layers * parts[i].rows * parts[i].cols));
      fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(matrices_[i].data()),
                                 static_cast<std::int64_t>(matrices_[i].size()), (i + 1) << 33,
                                 1 / std::sqrt(static_cast<float>(parts[i].cols)));
    }
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  const std::array<Part, 4> parts;

  void by_vector(std::size_t i, std::int64_t layer, cudaStream_t stream) {
    MatrixVectorTask<bf16> task;
    fill_task(task, i, layer);
    vector_.launch(task, parts[i].epilogue, stream, i == 1);
  }
  void by_columns(std::size_t i, std::int64_t layer, int count, cudaStream_t stream) {
    MatrixColumnsTask<bf16> task;
    fill_task(task, i, layer);
    task.count = count;
    task.x_stride = parts[i].cols;
    task.y_stride = parts[i].epilogue == kGatedSilu ? parts[i].rows / 2 : parts[i].rows;
    columns_.launch(task, parts[i].epilogue, stream, i == 1);
  }
  /// With `whole`, also what cuBLASLt leaves to other kernels: norm and activation.
  void by_cublas(std::size_t i, std::int64_t layer, int count, bool whole, cudaStream_t stream) {
    const Part& part = parts[i];
    auto* const rounded = reinterpret_cast<std::uint16_t*>(rounded_.data());
    if (whole && part.norm)
      detail::launch_kernel("rms_norm_kernel", detail::rms_norm_kernel<bf16>,
                            dim3(static_cast<unsigned>(count)), detail::kRowThreads, stream, true,
                            x_.data(), norm_.data(), 1e-5F, rounded, static_cast<int>(part.cols));
    products_.launch(matrix(i, layer), part.rows, part.cols, rounded_.data(), count, y_.data(),
                     part.epilogue == kAdd, stream);
    if (!whole || part.epilogue != kGatedSilu) return;
    const std::int64_t elements = count * part.rows / 2;
    detail::launch_kernel(
        "gated_silu_kernel", detail::gated_silu_kernel<bf16>,
        dim3(static_cast<unsigned>((elements / 2 + detail::kRowThreads - 1) / detail::kRowThreads)),
        detail::kRowThreads, stream, true, y_.data(), rounded, elements);
  }

 private:
  static constexpr std::int64_t kMost = MatrixColumnsPlan<bf16>::kMostColumns;
  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
  const bf16* matrix(std::size_t i, std::int64_t layer) const {
    return matrices_[i].data() + layer * parts[i].rows * parts[i].cols;
  }
  template <class Task>
  void fill_task(Task& task, std::size_t i, std::int64_t layer) {
    task.matrix = matrix(i, layer);
    task.rows = parts[i].rows;
    task.cols = parts[i].cols;
    task.x = x_.data();
    task.norm = parts[i].norm ? norm_.data() : nullptr;
    task.norm_eps = 1e-5F;
    task.y = y_.data();
  }

  std::int64_t widest_;
  MatrixVectorPlan<bf16> vector_{true};
  MatrixColumnsPlan<bf16> columns_{true};
  MatrixProducts<bf16> products_;
  std::array<Buffer<bf16, cuda>, 4> matrices_;
  Buffer<float, cuda> norm_;
  Buffer<float, cuda> x_;
  Buffer<float, cuda> y_;
  Buffer<bf16, cuda> rounded_;
};

void measure(const Geometry& g, std::int64_t layers, double ceiling) {
  Layers work(g, layers);
  const auto report = [&](const char* part, const char* by, int count, double bytes,
                          const std::function<void(std::int64_t, cudaStream_t)>& layer) {
    layer(0, nullptr);  // cuBLASLt chooses outside the capture
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    double spread = 0;
    const double us = time_graph(
                          [&](cudaStream_t stream) {
                            for (std::int64_t l = 0; l < layers; ++l) layer(l, stream);
                          },
                          6, 9, &spread) /
                      static_cast<double>(layers);
    std::printf(
        "{\"bench\": \"matrix_columns\", \"model\": \"%s\", \"part\": \"%s\", \"by\": \"%s\", "
        "\"vectors\": %d, \"us\": %.3f, \"spread_us\": %.3f, \"tb_per_s\": %.3f, "
        "\"of_read_ceiling\": %.3f}\n",
        g.name, part, by, count, us, spread / static_cast<double>(layers), bytes / us * 1e-6,
        bytes / us * 1e-6 / ceiling);
    std::fflush(stdout);
  };
  double all = 0;
  for (std::size_t i = 0; i <= work.parts.size(); ++i) {
    // The last turn: all four.
    const bool whole = i == work.parts.size();
    const char* const name = whole ? "layer" : work.parts[i].name;
    if (!whole) all += 2 * static_cast<double>(work.parts[i].rows * work.parts[i].cols);
    const double bytes =
        whole ? all : 2 * static_cast<double>(work.parts[i].rows * work.parts[i].cols);
    const auto each = [&](const std::function<void(std::size_t)>& product) {
      for (std::size_t j = whole ? 0 : i; j < (whole ? i : i + 1); ++j) product(j);
    };
    for (const int count : {1, 2, 4, 8}) {
      if (count == 1)
        report(name, "matrix_vector", 1, bytes, [&](std::int64_t l, cudaStream_t stream) {
          each([&](std::size_t j) { work.by_vector(j, l, stream); });
        });
      report(name, "matrix_columns", count, bytes, [&](std::int64_t l, cudaStream_t stream) {
        each([&](std::size_t j) { work.by_columns(j, l, count, stream); });
      });
      report(name, "cublaslt", count, bytes, [&](std::int64_t l, cudaStream_t stream) {
        each([&](std::size_t j) { work.by_cublas(j, l, count, whole, stream); });
      });
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::int64_t layers = 16;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--layers") == 0 && i + 1 < count &&
        std::atoll(arguments[i + 1]) > 0) {
      layers = std::atoll(arguments[++i]);
    } else {
      std::fprintf(stderr, "usage: matrix_columns_bench [--layers N]\n");
      return 2;
    }
  }
  try {
    const double ceiling = measure_machine();
    measure({"llama-2-7b", 4096, 12288, 11008}, layers, ceiling);
    measure({"llama-3-8b", 4096, 6144, 14336}, layers, ceiling);
  } catch (const Error& error) {
    std::fprintf(stderr, "matrix_columns_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
