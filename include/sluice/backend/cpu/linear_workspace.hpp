// SPDX-License-Identifier: MIT
/// What the processor's matrix products are given, the choice of arithmetic, and their scratch: all
/// that callers see of them. The kernels are behind two functions, so that a program may link them
/// (sluice::kernels) instead of compiling them wherever it multiplies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "sluice/core/config.hpp"
#if SLUICE_ONEDNN
#include "sluice/backend/cpu/linear_onednn.hpp"
#endif
#include "sluice/core/backend.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// In which form activations meet weights: how far they may be rounded for products that are faster
/// then. Sums are float32 (within a block of 8-bit products exact) whatever is chosen; F32 and F16
/// weights are always multiplied with float32 activations.
enum class Activations : std::uint8_t {
  /// As they are: products and sums in float32, the accurate choice.
  kFloat32,
  /// Rounded to bf16 (8 bits of mantissa, the precision of the weights themselves) where weights
  /// are
  /// BF16: twice as fast for chunks of tokens where the processor multiplies pairs of bf16
  /// (AVX512_BF16), the same results at about the speed of kFloat32 elsewhere. The rule is in
  /// backend/cpu/linear_bf16.hpp. Quantised weights (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K) still meet
  /// float32
  /// activations.
  kBf16,
  /// Rounded to 8 bits per token and block of 32 columns where weights are quantised, with exact
  /// integer products within a block, and as with kBf16 where weights are BF16: up to twice as fast
  /// where the processor multiplies bytes (AVX-512 VNNI); on plain AVX2
  /// prompts gain and single tokens of some types lose. The rule and the error bound are in
  /// backend/cpu/linear_int8.hpp.
  kInt8,
};

/// "f32", "bf16" or "int8".
constexpr std::string_view to_string(Activations activations) {
  switch (activations) {
    case Activations::kFloat32: return "f32";
    case Activations::kBf16: return "bf16";
    case Activations::kInt8: return "int8";
  }
  return "unknown";
}

/// Whether products of chunks go through oneDNN, in programs that are compiled with SLUICE_ONEDNN:
/// chunks of 32 tokens and more, where activations may be rounded and weights are BF16 (kBf16,
/// kInt8) or quantised (kInt8). Activations are then rounded to bf16, and so are quantised weights:
/// each factor is within 2^-8 of itself, an output within (2^-7 + 2^-16) * sum |x W| of the product
/// with neither rounded (2^-8 where weights are BF16) plus the float32 rounding of sums. F32 and
/// F16 weights, kFloat32 and few tokens stay as they are: a token's outputs then depend, by that
/// rounding, on how a text is cut into chunks, though not on the team's size. See
/// backend/cpu/linear_onednn.hpp for the order of sums, and for the small blocks that oneDNN
/// allocates in a chunk.
enum class OneDnn : std::uint8_t {
  /// Where the processor has AMX tiles (and activations are rounded at all). The default.
  kWhereFaster,
  /// Wherever oneDNN has products of bf16: AVX512_BF16 or AMX.
  kAlways,
  kNever,
};

/// One product of linear_many: y = x weight^T + bias, or y += that if `accumulate` is set.
struct LinearTask {
  WeightMatrix weight;          ///< [rows, cols]
  const float* bias = nullptr;  ///< [rows], or null for none
  MatrixView<float> y;          ///< [tokens, rows]
  bool accumulate = false;      ///< add to what y holds
};

namespace detail {

/// Where a member is in its share of the passes over all tasks.
struct alignas(64) StreamCursor {
  std::atomic<std::int64_t> next_block{0};
};

/// What depends on the instruction set of the kernels.
struct LinearExtents {
  std::int64_t member = 0;   ///< floats of scratch of a member
  std::int64_t rounded = 0;  ///< of all of them together, for tokens in rounded form
  int int8_chains = 0;       ///< chains of additions of the products with activations of 8 bits
  bool fused = false;        ///< additions of products round once
};
LinearExtents linear_extents(std::int64_t cols, std::int64_t tokens, Activations activations);

}  // namespace detail

/// Scratch of linear layers, fixed at construction: for each team member, tiles of converted
/// weights and rearranged tokens; for all of them together, tokens in rounded form; and the choice
/// of arithmetic. One workspace serves one call at a time.
class LinearWorkspace {
 public:
  /// Tokens whose rounded form is held at once unless told otherwise.
  static constexpr std::int64_t kDefaultTokens = 512;

  /// For matrices of up to `max_cols` columns and teams of up to `team_size` members. Allocates for
  /// each member 384 KiB, or a panel of 2 kWidth rows where that is more, and 12 tokens of
  /// max_cols, whichever `activations` are chosen; and where those are rounded about two bytes per
  /// column of `max_tokens` tokens. Longer chunks are served in parts of that many, each of which
  /// converts the weights again. \throws Error(kConfig) unless all are positive.
  ///
  /// With oneDNN (see OneDnn): for matrices of `onednn_cols` columns, by default of max_cols alone,
  /// each at most max_cols. Allocates for it two bytes per column of max_tokens tokens, 512 at
  /// most, and for each member of 64 rows, and 64 floats a token. \throws Error(kConfig) if kAlways
  /// is asked of a program without SLUICE_ONEDNN, or with activations that are not rounded;
  /// Error(kUnsupported) if it is asked where oneDNN lacks them.
  LinearWorkspace(std::int64_t max_cols, int team_size,
                  Activations activations = Activations::kFloat32,
                  std::int64_t max_tokens = kDefaultTokens, OneDnn onednn = OneDnn::kWhereFaster,
                  std::span<const std::int64_t> onednn_cols = {})
      : max_cols_(checked(max_cols, "max_cols")),
        max_tokens_(checked(max_tokens, "max_tokens")),
        team_size_(static_cast<int>(checked(team_size, "team_size"))),
        activations_(activations),
        extents_(detail::linear_extents(max_cols, max_tokens, activations)),
        storage_(static_cast<std::size_t>(extents_.member * team_size)),
        rounded_(static_cast<std::size_t>(extents_.rounded)),
        cursors_(std::make_unique<detail::StreamCursor[]>(static_cast<std::size_t>(team_size))) {
    set_up(onednn, onednn_cols);
  }

  std::int64_t max_cols() const noexcept { return max_cols_; }
  std::int64_t max_tokens() const noexcept { return max_tokens_; }
  int team_size() const noexcept { return team_size_; }
  /// In which form products through this workspace take activations.
  Activations activations() const noexcept { return activations_; }
  /// Bytes held.
  std::size_t bytes() const noexcept {
    std::size_t sum = storage_.bytes() + rounded_.bytes();
#if SLUICE_ONEDNN
    if (onednn_ != nullptr) sum += onednn_->bytes();
#endif
    return sum;
  }
  /// The scratch of one member: enough for any path at max_cols columns.
  float* member(int index) {
    SLUICE_ASSERT(index >= 0 && index < team_size_);
    return storage_.data() + index * extents_.member;
  }
  /// Rounded tokens, shared by all members.
  float* rounded() {
    return rounded_.data();
  }
  /// One for each member.
  detail::StreamCursor* cursors() {
    return cursors_.get();
  }
  /// Whether products of chunks go through oneDNN.
  bool uses_onednn() const noexcept {
#if SLUICE_ONEDNN
    return onednn_ != nullptr;
#else
    return false;
#endif
  }
#if SLUICE_ONEDNN
  /// Those products, or null.
  detail::OneDnnProducts* onednn() {
    return onednn_.get();
  }
#endif

 private:
  static std::int64_t checked(std::int64_t value, const char* field) {
    if (value < 1)
      throw Error(ErrorCode::kConfig, {"extent out of range", "LinearWorkspace", field,
                                       "at least 1", std::to_string(value)});
    return value;
  }

  void set_up(OneDnn onednn, [[maybe_unused]] std::span<const std::int64_t> cols) {
    const auto refuse = [](const char* expected, const char* found) {
      throw Error(ErrorCode::kConfig, {"products through oneDNN cannot be had", "LinearWorkspace",
                                       "onednn", expected, found});
    };
#if SLUICE_ONEDNN
    const bool rounds = activations_ != Activations::kFloat32;
    if (onednn == OneDnn::kAlways && !rounds)
      refuse("activations that are rounded", "activations of f32");
    if (onednn == OneDnn::kNever || !rounds || max_tokens_ < detail::OneDnnProducts::kFewestTokens)
      return;
    if (onednn == OneDnn::kWhereFaster && !detail::OneDnnProducts::has_tiles()) return;
    if (cols.empty()) cols = {&max_cols_, 1};
    for (const std::int64_t count : cols)
      if (count < 1 || count > max_cols_)
        throw Error(ErrorCode::kConfig,
                    {"extent out of range", "LinearWorkspace", "onednn_cols",
                     "1 to " + std::to_string(max_cols_), std::to_string(count)});
    try {
      onednn_ = std::make_unique<detail::OneDnnProducts>(cols, max_tokens_, team_size_);
    } catch (const Error&) {  // of another oneDNN than was asked for here: ours do it
      if (onednn == OneDnn::kAlways) throw;
    }
#else
    if (onednn == OneDnn::kAlways) refuse("a program with SLUICE_ONEDNN", "one without");
#endif
  }

  std::int64_t max_cols_;
  std::int64_t max_tokens_;
  int team_size_;
  Activations activations_;
  detail::LinearExtents extents_;
  Buffer<float> storage_;
  Buffer<float> rounded_;
  std::unique_ptr<detail::StreamCursor[]> cursors_;
#if SLUICE_ONEDNN
  std::unique_ptr<detail::OneDnnProducts> onednn_;
#endif
};

namespace detail {

// The products behind linear_many in nn/linear.hpp.
void linear_many(std::span<const LinearTask> tasks, MatrixView<const float> x,
                 LinearWorkspace& workspace, ThreadTeam& team, cpu);

}  // namespace detail

}  // namespace sluice
