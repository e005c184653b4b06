// SPDX-License-Identifier: MIT
/// Rotary position embedding (RoPE, Su et al., arXiv 2104.09864) for real positions on one or three
/// axes: frequencies with the usual context scalings, rotation of heads, delta rotation of keys
/// that are already rotated, and the table of cosines and sines that all layers of a model share.
/// Angles are formed in double: a float angle is off by several radians at position 10^8.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <numbers>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Which two elements of a head form pair i of R/2.
enum class RotaryPairing {
  kHalfSplit,    ///< (i, i + R/2): Llama in Transformers, NeoX, Qwen, Gemma, gpt-oss
  kInterleaved,  ///< (2i, 2i + 1): the paper, GPT-J, GGUF files of the Llama family
};

/// The pairing's name, for messages and JSON.
constexpr std::string_view to_string(RotaryPairing pairing) {
  switch (pairing) {
    case RotaryPairing::kHalfSplit: return "half-split";
    case RotaryPairing::kInterleaved: return "interleaved";
  }
  return "unknown";
}

/// No context scaling: f_i = theta^(-2i/R).
struct NoScaling {};

/// Position interpolation (arXiv 2306.15595): every frequency divided by `factor`.
struct LinearScaling {
  double factor = 1;
};

/// NTK-aware scaling with a fixed factor: theta becomes theta * factor^(R / (R - 2)), which leaves
/// the highest frequency alone and divides the lowest by `factor`. Needs R > 2.
struct NtkScaling {
  double factor = 1;
};

/// Llama 3.1: wavelengths above original_context / low_freq_factor are stretched by `factor`, those
/// below original_context / high_freq_factor are kept, between them f is interpolated.
struct Llama3Scaling {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_context = 8192;  ///< tokens
};

/// YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within original_context keep
/// their frequency, those that turn less than beta_slow times have it divided by `factor`, with a
/// linear ramp over the pair index between. Cosines and sines carry an attention factor.
struct YarnScaling {
  double factor = 1;
  double original_context = 4096;  ///< tokens
  double beta_fast = 32;           ///< turns
  double beta_slow = 1;            ///< turns
  /// Absent: 0.1 ln(factor) + 1, and 1 for factors up to 1. The two-mscale rule of DeepSeek is not
  /// derived here: give its ratio.
  std::optional<double> attention_factor = std::nullopt;
  /// Whether the ends of the ramp are rounded outwards to whole pairs (gpt-oss: false).
  bool truncate = true;
};

/// One of the context scalings. Formulas are those of Transformers' modeling_rope_utils.
using RotaryScaling =
    std::variant<NoScaling, LinearScaling, NtkScaling, Llama3Scaling, YarnScaling>;

/// What a rotation is made of. R below is rotary_dim.
struct RotaryConfig {
  int head_dim = 0;
  int rotary_dim = 0;  ///< R: even, 2 ... head_dim; elements from R on pass through
  double theta = 10000;
  RotaryPairing pairing = RotaryPairing::kHalfSplit;
  RotaryScaling scaling = NoScaling{};
  /// Pairs per axis (t, h, w), consecutive, summing to R/2; all zero: one axis.
  std::array<int, 3> sections{0, 0, 0};
  /// Divides each frequency after the scaling; [R/2], or empty. GGUF files that carry
  /// rope_freqs.weight (Llama 3.1) have their scaling in here and need NoScaling beside it.
  std::vector<float> frequency_factors = {};
};

/// The widest rotation: what delta rotation keeps on its stack.
inline constexpr int kMaxRotaryDim = 1024;

/// Elements that can be rotated. The arithmetic is float32 for all of them.
template <class T>
concept RotaryElement = std::same_as<T, float> || std::same_as<T, f16> || std::same_as<T, bf16>;

namespace detail {

/// Rotates num_pairs pairs of one head. cos_sin: [2, num_pairs]. y may equal x. Whole blocks are
/// read before they are written, which lets compilers vectorise although x and y may be the same.
template <RotaryPairing pairing, RotaryElement In, RotaryElement Out>
void rotate_pairs(const float* SLUICE_RESTRICT cos_sin, int num_pairs, const In* x, Out* y) {
  constexpr bool kHalves = pairing == RotaryPairing::kHalfSplit;
  constexpr int kBlock = 16;
  constexpr int kStride = kHalves ? 1 : 2;         // elements from pair to pair
  const int gap = kHalves ? num_pairs : 1;         // elements from a pair's first to its second
  const float* SLUICE_RESTRICT cosines = cos_sin;  // [num_pairs]
  const float* SLUICE_RESTRICT sines = cos_sin + num_pairs;  // [num_pairs]
  int pair = 0;
  for (; pair + kBlock <= num_pairs; pair += kBlock) {
    const In* from = x + pair * kStride;
    Out* to = y + pair * kStride;
    float first[kBlock];
    float second[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      first[j] = static_cast<float>(from[j * kStride]);
      second[j] = static_cast<float>(from[j * kStride + gap]);
    }
    for (int j = 0; j < kBlock; ++j) {
      const float a = first[j];
      const float b = second[j];
      first[j] = a * cosines[pair + j] - b * sines[pair + j];
      second[j] = b * cosines[pair + j] + a * sines[pair + j];
    }
    if constexpr (kHalves) {
      for (int j = 0; j < kBlock; ++j) to[j] = static_cast<Out>(first[j]);
      for (int j = 0; j < kBlock; ++j) to[j + gap] = static_cast<Out>(second[j]);
    } else {
      for (int j = 0; j < kBlock; ++j) {
        to[2 * j] = static_cast<Out>(first[j]);
        to[2 * j + 1] = static_cast<Out>(second[j]);
      }
    }
  }
  for (; pair < num_pairs; ++pair) {
    const float a = static_cast<float>(x[pair * kStride]);
    const float b = static_cast<float>(x[pair * kStride + gap]);
    y[pair * kStride] = static_cast<Out>(a * cosines[pair] - b * sines[pair]);
    y[pair * kStride + gap] = static_cast<Out>(b * cosines[pair] + a * sines[pair]);
  }
}

[[noreturn]] inline void throw_rotary_config(std::string what, std::string field,
                                             std::string expected, double found) {
  std::ostringstream text;
  text << found;
  throw Error(ErrorCode::kConfig,
              {std::move(what), "RotaryConfig", std::move(field), std::move(expected), text.str()});
}

inline void check_positive(double value, std::string field) {
  if (!(value > 0 && std::isfinite(value)))
    throw_rotary_config("option out of range", std::move(field), "a positive number", value);
}

/// Frequencies by pair, and the factor on cosines and sines.
struct RotaryFrequencies {
  std::vector<double> frequencies;  // [R/2], radians per token
  double attention_factor = 1;
};

inline std::vector<double> plain_frequencies(int rotary_dim, double theta) {
  std::vector<double> frequencies(static_cast<std::size_t>(rotary_dim / 2));
  for (int i = 0; i < rotary_dim / 2; ++i)
    frequencies[static_cast<std::size_t>(i)] = std::pow(theta, -2.0 * i / rotary_dim);
  return frequencies;
}

/// One overload per scaling: checks the scaling's own options, then computes.
struct ScaleFrequencies {
  int rotary_dim;
  double theta;

  RotaryFrequencies operator()(const NoScaling&) const {
    return {plain_frequencies(rotary_dim, theta)};
  }

  RotaryFrequencies operator()(const LinearScaling& scaling) const {
    check_positive(scaling.factor, "scaling.factor");
    RotaryFrequencies result{plain_frequencies(rotary_dim, theta)};
    for (double& f : result.frequencies) f /= scaling.factor;
    return result;
  }

  RotaryFrequencies operator()(const NtkScaling& scaling) const {
    check_positive(scaling.factor, "scaling.factor");
    if (rotary_dim <= 2)
      throw_rotary_config("NTK-aware scaling needs two pairs", "rotary_dim", "more than 2",
                          rotary_dim);
    const double exponent = static_cast<double>(rotary_dim) / (rotary_dim - 2);
    return {plain_frequencies(rotary_dim, theta * std::pow(scaling.factor, exponent))};
  }

  RotaryFrequencies operator()(const Llama3Scaling& scaling) const {
    check_positive(scaling.factor, "scaling.factor");
    check_positive(scaling.low_freq_factor, "scaling.low_freq_factor");
    check_positive(scaling.high_freq_factor, "scaling.high_freq_factor");
    check_positive(scaling.original_context, "scaling.original_context");
    if (scaling.high_freq_factor <= scaling.low_freq_factor)
      throw_rotary_config("no band to interpolate in", "scaling.high_freq_factor",
                          "more than low_freq_factor", scaling.high_freq_factor);
    RotaryFrequencies result{plain_frequencies(rotary_dim, theta)};
    for (double& f : result.frequencies) {
      const double turns = scaling.original_context * f / (2 * std::numbers::pi);
      const double kept = std::clamp(
          (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor),
          0.0, 1.0);
      f = (1 - kept) * f / scaling.factor + kept * f;
    }
    return result;
  }

  RotaryFrequencies operator()(const YarnScaling& scaling) const {
    check_positive(scaling.factor, "scaling.factor");
    check_positive(scaling.original_context, "scaling.original_context");
    check_positive(scaling.beta_fast, "scaling.beta_fast");
    check_positive(scaling.beta_slow, "scaling.beta_slow");
    if (scaling.beta_fast < scaling.beta_slow)
      throw_rotary_config("ramp runs backwards", "scaling.beta_fast", "at least beta_slow",
                          scaling.beta_fast);
    if (scaling.attention_factor)
      check_positive(*scaling.attention_factor, "scaling.attention_factor");
    if (theta <= 1)
      throw_rotary_config("YaRN needs falling frequencies", "theta", "more than 1", theta);

    // The (real) pair index whose wavelength fits `turns` times into the original context.
    const auto pair_with = [&](double turns) {
      return rotary_dim * std::log(scaling.original_context / (turns * 2 * std::numbers::pi)) /
             (2 * std::log(theta));
    };
    double low = pair_with(scaling.beta_fast);
    double high = pair_with(scaling.beta_slow);
    if (scaling.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, rotary_dim - 1.0);  // as released: the width, not the number of pairs
    if (low == high) high += 0.001;           // as released: a step instead of a ramp
    RotaryFrequencies result{plain_frequencies(rotary_dim, theta)};
    for (int i = 0; i < rotary_dim / 2; ++i) {
      double& f = result.frequencies[static_cast<std::size_t>(i)];
      const double stretched = std::clamp((i - low) / (high - low), 0.0, 1.0);
      f = stretched * f / scaling.factor + (1 - stretched) * f;
    }
    result.attention_factor = scaling.attention_factor.value_or(
        scaling.factor <= 1 ? 1.0 : 0.1 * std::log(scaling.factor) + 1.0);
    return result;
  }
};

}  // namespace detail

/// A rotation R(p) of heads by positions, immutable. For pair (a, b) with frequency f: a' = a
/// cos(pf) - b sin(pf), b' = b cos(pf) + a sin(pf). <R(p)q, R(s)k> depends on p - s only, and R(d)
/// R(s) = R(s + d). Cosines and sines of one position are a row: [2, num_pairs], cosines first.
/// All members are const and may be called from any thread; only construction allocates.
class Rotary {
 public:
  /// \throws Error kConfig, naming the option, for a config that makes no sense.
  explicit Rotary(RotaryConfig config) : config_(std::move(config)) {
    check_shape();
    const detail::ScaleFrequencies scale{config_.rotary_dim, config_.theta};
    frequencies_ = std::visit(scale, config_.scaling);
    for (std::size_t i = 0; i < config_.frequency_factors.size(); ++i)
      frequencies_.frequencies[i] /= static_cast<double>(config_.frequency_factors[i]);
  }

  const RotaryConfig& config() const { return config_; }
  int head_dim() const { return config_.head_dim; }
  int num_pairs() const { return config_.rotary_dim / 2; }
  /// Floats in a row of cosines and sines: 2 * num_pairs.
  int row_size() const { return config_.rotary_dim; }
  /// Whether the pairs are divided among time, height and width.
  bool has_three_axes() const { return config_.sections != std::array<int, 3>{0, 0, 0}; }
  /// Radians per token of a pair, scaling and frequency factors included.
  double frequency(int pair) const {
    SLUICE_ASSERT(pair >= 0 && pair < num_pairs());
    return frequencies_.frequencies[static_cast<std::size_t>(pair)];
  }
  /// What angles() multiplies cosines and sines by; 1 except for YaRN. A score of a rotated query
  /// and a rotated key carries its square.
  double attention_factor() const { return frequencies_.attention_factor; }

  /// Writes the row of a position: attention_factor * cos and sin of position * frequency. cos_sin:
  /// [2, num_pairs]. The angle's error is |position * frequency| * 2^-53, below the float rounding
  /// of the result up to positions of several 10^8.
  void angles(Position position, float* cos_sin) const {
    fill_row(on_all_axes(position), attention_factor(), cos_sin);
  }
  /// The same on three axes. A rotation with one axis uses t.
  void angles(const Position3& position, float* cos_sin) const {
    fill_row(position, attention_factor(), cos_sin);
  }
  /// The row without the attention factor: a pure rotation, for vectors that carry the factor
  /// already.
  void pure_angles(Position position, float* cos_sin) const {
    fill_row(on_all_axes(position), 1, cos_sin);
  }
  void pure_angles(const Position3& position, float* cos_sin) const {
    fill_row(position, 1, cos_sin);
  }

  /// Rotates one head. x, y: [head_dim]; y may equal x but not overlap it otherwise. Elements from
  /// rotary_dim on are copied. 16-bit elements are converted to float32 and rounded once.
  template <RotaryElement In, RotaryElement Out>
  void rotate(const float* cos_sin, const In* x, Out* y) const {
    if (config_.pairing == RotaryPairing::kHalfSplit)
      detail::rotate_pairs<RotaryPairing::kHalfSplit>(cos_sin, num_pairs(), x, y);
    else
      detail::rotate_pairs<RotaryPairing::kInterleaved>(cos_sin, num_pairs(), x, y);
    if constexpr (std::same_as<In, Out>) {
      if (x == y) return;
    }
    for (int i = config_.rotary_dim; i < config_.head_dim; ++i)
      y[i] = static_cast<Out>(static_cast<float>(x[i]));
  }

  /// Rotates the heads of one token, all by the same row. x, y: [num_heads, head_dim], consecutive;
  /// y may equal x.
  template <RotaryElement In, RotaryElement Out>
  void rotate_heads(const float* cos_sin, const In* x, std::int64_t num_heads, Out* y) const {
    for (std::int64_t head = 0; head < num_heads; ++head)
      rotate(cos_sin, x + head * config_.head_dim, y + head * config_.head_dim);
  }

  /// Rotates token t of x by row t. cos_sin: [tokens, 2, num_pairs], rows consecutive, as
  /// RotaryTable::row(0) gives them. x, y: [tokens, num_heads, head_dim] of equal extents; y may be
  /// x.
  template <class In, RotaryElement Out>
  requires RotaryElement<std::remove_const_t<In>>
  void rotate_tokens(const float* cos_sin, HeadsView<In> x, HeadsView<Out> y) const {
    SLUICE_ASSERT(x.head_dim == config_.head_dim && y.head_dim == config_.head_dim);
    SLUICE_ASSERT(x.tokens == y.tokens && x.num_heads == y.num_heads);
    for (std::int64_t token = 0; token < x.tokens; ++token)
      rotate_heads(cos_sin + token * row_size(), x.data + token * x.token_stride, x.num_heads,
                   y.data + token * y.token_stride);
  }
  /// The same in place.
  template <RotaryElement T>
  void rotate_tokens(const float* cos_sin, HeadsView<T> x) const {
    rotate_tokens(cos_sin, x, x);
  }

  /// Delta rotation: moves keys that were rotated at s to s + delta, in place, without applying the
  /// attention factor again. keys: [tokens, num_heads, head_dim]. Each call rounds 16-bit keys
  /// once, so move stored keys once, not at every step.
  template <RotaryElement T>
  void rotate_by(const Position3& delta, HeadsView<T> keys) const {
    SLUICE_ASSERT(keys.head_dim == config_.head_dim);
    float cos_sin[kMaxRotaryDim];  // [2, num_pairs]
    pure_angles(delta, cos_sin);
    for (std::int64_t token = 0; token < keys.tokens; ++token) {
      T* heads = keys.data + token * keys.token_stride;  // [num_heads, head_dim]
      rotate_heads(cos_sin, heads, keys.num_heads, heads);
    }
  }
  template <RotaryElement T>
  void rotate_by(Position delta, HeadsView<T> keys) const {
    rotate_by(on_all_axes(delta), keys);
  }
  /// Delta rotation of one token's keys. heads: [num_heads, head_dim], consecutive.
  template <RotaryElement T>
  void rotate_by(Position delta, T* heads, std::int64_t num_heads) const {
    rotate_by(on_all_axes(delta), HeadsView<T>(heads, 1, num_heads, config_.head_dim));
  }

 private:
  void check_shape() const {
    const RotaryConfig& c = config_;
    if (c.head_dim < 1)
      detail::throw_rotary_config("option out of range", "head_dim", "at least 1", c.head_dim);
    if (c.rotary_dim < 2 || c.rotary_dim % 2 != 0)
      detail::throw_rotary_config("elements are rotated in pairs", "rotary_dim",
                                  "an even number, at least 2", c.rotary_dim);
    if (c.rotary_dim > c.head_dim)
      detail::throw_rotary_config("more elements to rotate than a head has", "rotary_dim",
                                  "at most head_dim = " + std::to_string(c.head_dim), c.rotary_dim);
    if (c.rotary_dim > kMaxRotaryDim)
      detail::throw_rotary_config("rotation too wide", "rotary_dim",
                                  "at most " + std::to_string(kMaxRotaryDim), c.rotary_dim);
    detail::check_positive(c.theta, "theta");
    std::int64_t pairs = 0;
    for (const int section : c.sections) {
      if (section < 0)
        detail::throw_rotary_config("option out of range", "sections", "no negative section",
                                    section);
      pairs += section;
    }
    if (has_three_axes() && pairs != num_pairs())
      detail::throw_rotary_config("sections do not cover the pairs", "sections",
                                  "a sum of " + std::to_string(num_pairs()),
                                  static_cast<double>(pairs));
    if (!c.frequency_factors.empty() &&
        c.frequency_factors.size() != static_cast<std::size_t>(num_pairs()))
      detail::throw_rotary_config("one factor per pair", "frequency_factors",
                                  std::to_string(num_pairs()) + " factors",
                                  static_cast<double>(c.frequency_factors.size()));
    for (const float factor : c.frequency_factors)
      detail::check_positive(static_cast<double>(factor), "frequency_factors");
  }

  void fill_row(const Position3& position, double factor, float* cos_sin) const {
    const int pairs = num_pairs();
    const int first_h = has_three_axes() ? config_.sections[0] : pairs;
    const int first_w = has_three_axes() ? first_h + config_.sections[1] : pairs;
    for (int i = 0; i < pairs; ++i) {
      const Position on_axis = i < first_h ? position.t : i < first_w ? position.h : position.w;
      const double angle = on_axis * frequency(i);
      cos_sin[i] = static_cast<float>(factor * std::cos(angle));
      cos_sin[pairs + i] = static_cast<float>(factor * std::sin(angle));
    }
  }

  RotaryConfig config_;
  detail::RotaryFrequencies frequencies_;
};

/// Rows of cosines and sines for the tokens of a step, filled once and read by every layer. Only
/// construction allocates. A fill computes the rows whose position differs from the row's last one,
/// so filling again for the next layer costs one comparison a token. One thread fills; rows may be
/// read by many between fills.
class RotaryTable {
 public:
  /// Room for `capacity` tokens: [capacity, 2, num_pairs]. Keeps its own copy of the rotation.
  /// \throws Error kConfig if capacity < 0.
  RotaryTable(const Rotary& rotary, std::int64_t capacity)
      : rotary_(rotary),
        capacity_(checked(capacity)),
        rows_(static_cast<std::size_t>(capacity_ * rotary.row_size())),
        positions_(static_cast<std::size_t>(capacity_)) {
    // Equal to no position: the first fill computes every row.
    const Position none = std::numeric_limits<Position>::quiet_NaN();
    for (Position3& position : positions_.span()) position = on_all_axes(none);
  }

  const Rotary& rotary() const { return rotary_; }
  std::int64_t capacity() const { return capacity_; }
  /// Tokens of the last fill.
  std::int64_t size() const { return size_; }

  /// Row i for positions[i]. At most `capacity` positions.
  void fill(std::span<const Position> positions) {
    resize(static_cast<std::int64_t>(positions.size()));
    for (std::int64_t i = 0; i < size_; ++i)
      set(i, on_all_axes(positions[static_cast<std::size_t>(i)]));
  }
  void fill(std::span<const Position3> positions) {
    resize(static_cast<std::int64_t>(positions.size()));
    for (std::int64_t i = 0; i < size_; ++i) set(i, positions[static_cast<std::size_t>(i)]);
  }
  /// Row i for min(positions[i] + shift, ceiling), on every axis: queries of a reader that stands
  /// elsewhere in a segment's numbering.
  void fill_placed(std::span<const Position3> positions, Position shift, Position ceiling) {
    resize(static_cast<std::int64_t>(positions.size()));
    const auto place = [&](Position position) { return std::min(position + shift, ceiling); };
    for (std::int64_t i = 0; i < size_; ++i) {
      const Position3& from = positions[static_cast<std::size_t>(i)];
      set(i, {place(from.t), place(from.h), place(from.w)});
    }
  }
  /// Row i for first + i, i < count.
  void fill_run(Position first, std::int64_t count) {
    fill_clamped_run(first, count, std::numeric_limits<Position>::infinity());
  }
  /// Row i for min(first + i, ceiling), i < count: the ranks of a chunk's queries in a cache that
  /// fills up within the chunk.
  void fill_clamped_run(Position first, std::int64_t count, Position ceiling) {
    resize(count);
    for (std::int64_t i = 0; i < count; ++i)
      set(i, on_all_axes(std::min(first + static_cast<Position>(i), ceiling)));
  }

  /// Row of token i: [2, num_pairs]. Rows are consecutive.
  const float* row(std::int64_t i) const {
    SLUICE_ASSERT(i >= 0 && i < size_);
    return rows_.data() + i * rotary_.row_size();
  }
  /// All rows: [size, 2, num_pairs], what Rotary::rotate_tokens takes.
  const float* rows() const { return rows_.data(); }

 private:
  static std::int64_t checked(std::int64_t capacity) {
    if (capacity < 0)
      throw Error(ErrorCode::kConfig, {"option out of range", "RotaryTable", "capacity",
                                       "at least 0", std::to_string(capacity)});
    return capacity;
  }
  void resize(std::int64_t count) {
    SLUICE_ASSERT(count >= 0 && count <= capacity_);
    size_ = count;
  }
  void set(std::int64_t i, const Position3& position) {
    Position3& held = positions_[static_cast<std::size_t>(i)];
    if (held == position) return;
    held = position;
    float* row = rows_.data() + i * rotary_.row_size();
    // Past a ceiling all positions are one: copying is cheaper than the functions.
    if (i > 0 && positions_[static_cast<std::size_t>(i - 1)] == position)
      std::copy_n(row - rotary_.row_size(), rotary_.row_size(), row);
    else
      rotary_.angles(position, row);
  }

  Rotary rotary_;
  std::int64_t capacity_;
  std::int64_t size_ = 0;
  Buffer<float> rows_;           // [capacity, 2, num_pairs]
  Buffer<Position3> positions_;  // [capacity]
};

}  // namespace sluice
