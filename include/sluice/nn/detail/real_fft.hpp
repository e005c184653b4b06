// SPDX-License-Identifier: MIT
/// The power spectrum of a short real frame, in double, from tables made once.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <utility>

#include "sluice/core/config.hpp"
#include "sluice/core/memory.hpp"

namespace sluice::detail {

/// Discrete Fourier transforms of one length: the length-2n real one through a complex one of
/// length n (Stockham's self-sorting form, radices 5, 4, 3 and 2). Const after construction: any
/// number of threads may share one, each with its own work space. Allocates at construction only.
class RealFft {
 public:
  /// Lengths that can be planned: even products of 2, 3 and 5, at most 2^20.
  static constexpr bool supports(std::int64_t size) {
    if (size < 2 || size > (std::int64_t{1} << 20) || size % 2 != 0) return false;
    for (const std::int64_t prime : {2, 3, 5})
      while (size % prime == 0) size /= prime;
    return size == 1;
  }

  /// Precondition: supports(size).
  explicit RealFft(std::int64_t size)
      : half_(size / 2), split_(static_cast<std::size_t>(2 * (half_ / 2 + 1))) {
    SLUICE_ASSERT(supports(size));
    std::size_t twiddles = 0;
    std::int64_t rest = half_;
    for (const int radix : {5, 3, 4, 2}) {
      while (rest % radix == 0) {
        stages_[static_cast<std::size_t>(num_stages_++)] = {radix, rest};
        twiddles += static_cast<std::size_t>(2 * (radix - 1) * (rest / radix));
        rest /= radix;
      }
    }
    twiddles_ = Buffer<double>(twiddles);
    std::size_t next = 0;
    for (int i = 0; i < num_stages_; ++i) {
      const auto [radix, n] = stages_[static_cast<std::size_t>(i)];
      for (std::int64_t p = 0; p < n / radix; ++p) {
        for (int j = 1; j < radix; ++j) {
          const auto [re, im] = root(p * j, n);
          twiddles_[next++] = re;
          twiddles_[next++] = im;
        }
      }
    }
    for (std::int64_t k = 0; k <= half_ / 2; ++k) {
      const auto [re, im] = root(k, size);
      split_[static_cast<std::size_t>(2 * k)] = re;
      split_[static_cast<std::size_t>(2 * k + 1)] = im;
    }
  }

  std::int64_t size() const noexcept { return 2 * half_; }
  /// Values of work space that power_spectrum() needs.
  std::int64_t work_size() const noexcept { return 4 * half_; }

  /// power[k] = |sum over i of input[i] exp(-2 pi i k / size)|^2, k = 0 .. size / 2. input: [size];
  /// power: [size / 2 + 1]; work: [work_size()], any content. Nothing overlaps.
  void power_spectrum(const double* input, double* work, double* power) const noexcept {
    const std::int64_t n = half_;
    Complex from{work, work + n};
    Complex to{work + 2 * n, work + 3 * n};
    for (std::int64_t k = 0; k < n; ++k) {
      from.re[k] = input[2 * k];
      from.im[k] = input[2 * k + 1];
    }
    const double* twiddles = twiddles_.data();
    std::int64_t stride = 1;
    for (int i = 0; i < num_stages_; ++i) {
      const auto [radix, length] = stages_[static_cast<std::size_t>(i)];
      switch (radix) {
        case 2: stage<2>(length, stride, twiddles, from, to); break;
        case 3: stage<3>(length, stride, twiddles, from, to); break;
        case 4: stage<4>(length, stride, twiddles, from, to); break;
        default: stage<5>(length, stride, twiddles, from, to); break;
      }
      twiddles += 2 * (radix - 1) * (length / radix);
      stride *= radix;
      std::swap(from, to);
    }
    // Even and odd samples apart: X[k] = E[k] + w^k O[k], X[n - k] its mirror image.
    for (std::int64_t k = 0; k <= n / 2; ++k) {
      const std::int64_t mirror = k == 0 ? 0 : n - k;
      const double even_re = 0.5 * (from.re[k] + from.re[mirror]);
      const double even_im = 0.5 * (from.im[k] - from.im[mirror]);
      const double odd_re = 0.5 * (from.im[k] + from.im[mirror]);
      const double odd_im = 0.5 * (from.re[mirror] - from.re[k]);
      const double w_re = split_[static_cast<std::size_t>(2 * k)];
      const double w_im = split_[static_cast<std::size_t>(2 * k + 1)];
      const double turned_re = w_re * odd_re - w_im * odd_im;
      const double turned_im = w_re * odd_im + w_im * odd_re;
      power[n - k] = square(even_re - turned_re) + square(even_im - turned_im);
      power[k] = square(even_re + turned_re) + square(even_im + turned_im);
    }
  }

 private:
  struct Complex {
    double* re;
    double* im;
  };
  struct Stage {
    int radix;
    std::int64_t length;
  };

  static double square(double x) { return x * x; }

  // exp(-2 pi i k / n), exact where it lies on an axis.
  static std::pair<double, double> root(std::int64_t k, std::int64_t n) {
    k %= n;
    if (4 * k % n == 0) {
      constexpr std::array<std::pair<double, double>, 4> kAxes{
          {{1.0, 0.0}, {0.0, -1.0}, {-1.0, 0.0}, {0.0, 1.0}}};
      return kAxes[static_cast<std::size_t>(4 * k / n)];
    }
    const double angle = 2.0 * std::numbers::pi * static_cast<double>(k) / static_cast<double>(n);
    return {std::cos(angle), -std::sin(angle)};
  }

  // One radix-R step of transforms of length n that lie `stride` values apart.
  template <int R>
  static void stage(std::int64_t n, std::int64_t stride, const double* twiddles, Complex from,
                    Complex to) noexcept {
    const std::int64_t m = n / R;
    for (std::int64_t p = 0; p < m; ++p) {
      std::array<double, R> w_re;
      std::array<double, R> w_im;
      w_re[0] = 1.0;
      w_im[0] = 0.0;
      for (std::size_t j = 1; j < R; ++j) {
        w_re[j] = *twiddles++;
        w_im[j] = *twiddles++;
      }
      const double* const in_re = from.re + stride * p;
      const double* const in_im = from.im + stride * p;
      double* SLUICE_RESTRICT const out_re = to.re + stride * R * p;
      double* SLUICE_RESTRICT const out_im = to.im + stride * R * p;
      for (std::int64_t q = 0; q < stride; ++q) {
        std::array<double, R> a_re;
        std::array<double, R> a_im;
        for (std::size_t k = 0; k < R; ++k) {
          a_re[k] = in_re[q + stride * m * static_cast<std::int64_t>(k)];
          a_im[k] = in_im[q + stride * m * static_cast<std::int64_t>(k)];
        }
        butterfly<R>(a_re, a_im);
        for (std::size_t j = 0; j < R; ++j) {
          const std::int64_t place = q + stride * static_cast<std::int64_t>(j);
          out_re[place] = a_re[j] * w_re[j] - a_im[j] * w_im[j];
          out_im[place] = a_re[j] * w_im[j] + a_im[j] * w_re[j];
        }
      }
    }
  }

  // The transform of R values, in place.
  template <int R>
  static void butterfly(std::array<double, R>& re, std::array<double, R>& im) noexcept {
    if constexpr (R == 2) {
      re = {re[0] + re[1], re[0] - re[1]};
      im = {im[0] + im[1], im[0] - im[1]};
    } else if constexpr (R == 4) {
      const std::array<double, 4> s{re[0] + re[2], re[0] - re[2], re[1] + re[3], re[1] - re[3]};
      const std::array<double, 4> t{im[0] + im[2], im[0] - im[2], im[1] + im[3], im[1] - im[3]};
      re = {s[0] + s[2], s[1] + t[3], s[0] - s[2], s[1] - t[3]};
      im = {t[0] + t[2], t[1] - s[3], t[0] - t[2], t[1] + s[3]};
    } else {
      // Conjugate pairs of roots share their sums and differences.
      constexpr int kPairs = (R - 1) / 2;
      constexpr std::array<double, 5> kCos =
          R == 3 ? std::array<double, 5>{1.0, -0.5, -0.5, 0.0, 0.0}
                 : std::array<double, 5>{1.0, 0.30901699437494742, -0.80901699437494742,
                                         -0.80901699437494742, 0.30901699437494742};
      constexpr std::array<double, 5> kSin =
          R == 3 ? std::array<double, 5>{0.0, 0.86602540378443865, -0.86602540378443865, 0.0, 0.0}
                 : std::array<double, 5>{0.0, 0.95105651629515357, 0.58778525229247313,
                                         -0.58778525229247313, -0.95105651629515357};
      const std::array<double, R> a_re = re;
      const std::array<double, R> a_im = im;
      for (int k = 1; k <= kPairs; ++k) {
        re[0] += a_re[at(k)] + a_re[at(R - k)];
        im[0] += a_im[at(k)] + a_im[at(R - k)];
      }
      for (int j = 1; j <= kPairs; ++j) {
        double sum_re = a_re[0];
        double sum_im = a_im[0];
        double turn_re = 0.0;
        double turn_im = 0.0;
        for (int k = 1; k <= kPairs; ++k) {
          const double c = kCos[at(j * k % R)];
          const double s = kSin[at(j * k % R)];
          sum_re += c * (a_re[at(k)] + a_re[at(R - k)]);
          sum_im += c * (a_im[at(k)] + a_im[at(R - k)]);
          turn_re += s * (a_im[at(k)] - a_im[at(R - k)]);
          turn_im += s * (a_re[at(k)] - a_re[at(R - k)]);
        }
        re[at(j)] = sum_re + turn_re;
        im[at(j)] = sum_im - turn_im;
        re[at(R - j)] = sum_re - turn_re;
        im[at(R - j)] = sum_im + turn_im;
      }
    }
  }

  static constexpr std::size_t at(int index) { return static_cast<std::size_t>(index); }

  std::int64_t half_;               // complex length
  std::array<Stage, 20> stages_{};  // [num_stages_], outermost first
  int num_stages_ = 0;
  Buffer<double> twiddles_;  // per stage [length / radix, radix - 1, (re, im)]
  Buffer<double> split_;     // [half / 2 + 1, (re, im)]: exp(-2 pi i k / size)
};

}  // namespace sluice::detail
