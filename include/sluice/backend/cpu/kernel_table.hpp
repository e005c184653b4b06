// SPDX-License-Identifier: MIT
/// The kernels of one instruction set as a table of functions: what a program that holds several
/// sets (SLUICE_KERNEL_TARGETS in CMake) picks from at its start.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "sluice/core/backend.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#if SLUICE_KERNELS_INCLUDED
#include "sluice/backend/cpu/simd.hpp"
#endif

namespace sluice {

/// What the kernels of this program are compiled for: "AVX-512", "AVX", "SSE2" or "portable"; in a
/// program that holds several sets the name of the one in use, as SLUICE_KERNEL_TARGETS gives it,
/// or "baseline". That is the last one in the list that the processor has and that lacks no
/// extension of those chosen before it, or the one that the environment variable
/// SLUICE_KERNEL_TARGET names; it is chosen at the first call or the first
/// workspace, once. \throws Error(kConfig) if that variable names no set of this program, or one
/// that the processor lacks; so does then the construction of every workspace.
std::string_view kernel_target();

#if SLUICE_KERNELS_INCLUDED
SLUICE_KERNEL std::string_view kernel_target() {
  return simd::kSetName;
}
#endif

enum class Activation;
enum class Activations : std::uint8_t;
struct AttentionShape;
struct LinearTask;
class LinearWorkspace;
template <Backend Tag>
class AttentionWorkspace;

namespace detail {

struct AttentionCall;
struct AttentionExtents;
struct LinearExtents;

struct KernelTable {
  const char* name;
  std::uint64_t extensions;  // simd::kExtensions of the units
  LinearExtents (*linear_extents)(std::int64_t cols, std::int64_t tokens, Activations activations);
  void (*linear_many)(std::span<const LinearTask> tasks, MatrixView<const float> x,
                      LinearWorkspace& workspace, ThreadTeam& team, cpu);
  AttentionExtents (*attention_extents)(const AttentionShape& shape);
  void (*run_attention)(const AttentionCall& call, std::uint32_t key_tag, std::uint32_t value_tag,
                        AttentionWorkspace<cpu>& workspace, ThreadTeam& team);
  void (*rms_norm_row)(const float* x, const float* weight, std::int64_t count, float eps,
                       bool add_one_to_weight, float* y);
  void (*gate_up)(Activation activation, const float* gate, const float* up, float* out,
                  std::int64_t count);
};

}  // namespace detail

}  // namespace sluice
