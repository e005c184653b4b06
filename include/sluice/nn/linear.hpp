// SPDX-License-Identifier: MIT
/// Linear layers over stored weights: y = x W^T + bias for weights of any element type, alone,
/// added to y, or several that share x in one fork-join. Sums are float32, activations float32
/// or rounded to bf16 or 8 bits as the workspace says (Activations); the plain reference adds in
/// float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "sluice/backend/cpu/kernel_table.hpp"
#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// The plain reference: y[t, r] = sum over c of x[t, c] W[r, c] + bias[r], or y[t, r] += that if
/// `accumulate`. Each weight is converted as dequantise() does, sums are float64 in column order
/// and rounded once. x: [tokens, cols]; bias: [rows] or null; y: [tokens, rows]. Allocates nothing.
inline void linear_reference(const WeightMatrix& weight, MatrixView<const float> x,
                             const float* bias, MatrixView<float> y, bool accumulate = false) {
  SLUICE_ASSERT(x.cols == weight.cols && y.cols == weight.rows && y.rows == x.rows);
  constexpr std::int64_t kStrip = 256;  // a multiple of every type's block
  float values[kStrip];
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t r = 0; r < weight.rows; ++r) {
      double sum = bias != nullptr ? static_cast<double>(bias[r]) : 0.0;
      for (std::int64_t c = 0; c < weight.cols; c += kStrip) {
        const std::int64_t count = std::min(kStrip, weight.cols - c);
        dequantise(weight.type, weight.row(r) + storage_bytes(weight.type, c), count, values);
        for (std::int64_t i = 0; i < count; ++i)
          sum += static_cast<double>(values[i]) * static_cast<double>(x.row(t)[c + i]);
      }
      float& target = y.row(t)[r];
      target = static_cast<float>(accumulate ? static_cast<double>(target) + sum : sum);
    }
  }
}

namespace detail {

inline void linear_many(std::span<const LinearTask> tasks, MatrixView<const float> x,
                        LinearWorkspace& /*workspace*/, ThreadTeam& /*team*/, generic_backend) {
  for (const LinearTask& task : tasks)
    linear_reference(task.weight, x, task.bias, task.y, task.accumulate);
}

}  // namespace detail

/// Several products of one x in one fork-join, such as query, key and value, or gate and up:
/// y_i = x W_i^T + bias_i, or y_i += that where the task says accumulate.
/// x: [tokens, cols]; of each task, weight: [rows_i, cols], bias: [rows_i] or null,
/// y: [tokens, rows_i]; the y must not overlap x, each other or the weights. Zero tokens do
/// nothing.
///
/// With a few tokens the weights are read from memory once. The result is the same bits for any
/// team size, since members share out whole rows. With float32 activations a token may differ by
/// float32 rounding between different token counts, because few and many tokens take different
/// paths; where activations are rounded (Activations::kInt8 and quantised weights, kInt8 or kBf16
/// and bf16 weights) it is the same bits whatever tokens are beside it. Shapes are asserted.
/// Allocates nothing. Chunks that go through oneDNN (OneDnn) are rounded otherwise than few tokens
/// are, and oneDNN allocates. The workspace and the team serve one call at a time.
template <Backend Tag = cpu>
void linear_many(std::span<const LinearTask> tasks, MatrixView<const float> x,
                 LinearWorkspace& workspace, ThreadTeam& team, Tag tag = {}) {
  for ([[maybe_unused]] const LinearTask& task : tasks)
    SLUICE_ASSERT(task.weight.cols == x.cols && task.y.cols == task.weight.rows &&
                  task.y.rows == x.rows);
  detail::linear_many(tasks, x, workspace, team, tag);
}

/// y = x W^T + bias; see linear_many for shapes and guarantees.
template <Backend Tag = cpu>
void linear(const WeightMatrix& weight, MatrixView<const float> x, const float* bias,
            MatrixView<float> y, LinearWorkspace& workspace, ThreadTeam& team, Tag tag = {}) {
  const LinearTask task{.weight = weight, .bias = bias, .y = y};
  linear_many(std::span<const LinearTask>(&task, 1), x, workspace, team, tag);
}

/// y += x W^T + bias, as for a residual stream; see linear_many.
template <Backend Tag = cpu>
void linear_add(const WeightMatrix& weight, MatrixView<const float> x, const float* bias,
                MatrixView<float> y, LinearWorkspace& workspace, ThreadTeam& team, Tag tag = {}) {
  const LinearTask task{.weight = weight, .bias = bias, .y = y, .accumulate = true};
  linear_many(std::span<const LinearTask>(&task, 1), x, workspace, team, tag);
}

}  // namespace sluice

#if SLUICE_KERNELS_INCLUDED
#include "sluice/backend/cpu/linear.hpp"  // the kernels of sluice::cpu
#endif
