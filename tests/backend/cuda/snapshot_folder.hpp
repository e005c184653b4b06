// SPDX-License-Identifier: MIT
/// Snapshots of sessions that move between CPU and GPU, whatever the cache holds.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/atomic_file.hpp>
#include <sluice/stream/backend_traits.hpp>
#include <sluice/stream/session.hpp>

#include "backend/cuda/random_decoder.hpp"
#include "stream/session_transactions.hpp"

namespace host_test {

/// A folder for what is saved.
class SnapshotFolder : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "sluice_cuda_snapshot_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string path(const char* name) const { return (folder_ / name).string(); }

  /// bound(model, options, text): how far apart logits may be on that text.
  template <sluice::KvElement Element, class Bound>
  void expect_moves(const Setting& setting, sluice::CachePolicy policy, Bound&& bound) const;

 private:
  std::filesystem::path folder_;
};

/// A stream of either backend, some of it written: the ring has gone round. Returns its tokens.
template <class AnySession>
std::vector<sluice::Token> begin_stream(AnySession& session) {
  std::vector<sluice::Token> text = some_tokens(60, 111);
  session.accept(text);
  for (int i = 0; i < 13; ++i) text.push_back(session.step().value());
  return text;
}
/// The largest relative error of two sessions' logits while both are given one text.
template <class A, class B>
double error_on(A& found, B& expected, std::span<const sluice::Token> text) {
  double worst = relative_error(found.logits(), expected.logits());
  for (const sluice::Token token : text) {
    found.accept({&token, 1});
    expected.accept({&token, 1});
    worst = std::max(worst, relative_error(found.logits(), expected.logits()));
  }
  return worst;
}

template <sluice::KvElement Element, class Bound>
void SnapshotFolder::expect_moves(const Setting& setting, sluice::CachePolicy policy,
                                  Bound&& bound) const {
  using namespace sluice;
  using test::expect_same_bits;
  SCOPED_TRACE(std::string(to_string(policy)) + ", head size " + std::to_string(setting.head_dim));
  const std::string first = path("first");
  const std::string second = path("second");
  const auto model = make_model(setting, 112);
  const auto placed = place_model<cuda, Element>(model);
  SessionOptions options = test::transaction_options(policy, 1);
  options.cache.window_size = 25;
  options.cache.num_sink_tokens = 4;
  const std::vector<Token> text = some_tokens(40, 113);
  const auto bound_behind = [&](std::vector<Token> begun) {
    begun.insert(begun.end(), text.begin(), text.end());
    return bound(model, options, begun);
  };

  // GPU to GPU: the same bits, the sampler's too.
  CudaSession<Element> device(placed, options);
  const std::vector<Token> of_the_device = begin_stream(device);
  const std::int64_t position = device.position();
  device.save(first);
  CudaSession<Element> same(placed, options);
  same.accept(some_tokens(9, 114));  // what it held is replaced
  same.restore(first);
  EXPECT_EQ(same.position(), position);
  expect_same_bits(same, device, "restored");
  same.save(second);
  EXPECT_EQ(read_file(first), read_file(second));

  // GPU to CPU. At first both have one state, and the CPU rounds nothing in its last product but
  // to float32: sums of 96 products, in another order.
  Session<Element> host(model, options);
  host.restore(first);
  EXPECT_EQ(host.position(), position);
  EXPECT_LE(relative_error(device.logits(), host.logits()), 96 * 0x1p-23);
  EXPECT_EQ(host.common_prefix(some_tokens(60, 111)), 60);
  EXPECT_LE(error_on(device, host, text), bound_behind(of_the_device));

  // The CPU's file of a state that it was given is what the GPU wrote but for the residual state.
  Session<Element> again(model, options);
  again.restore(first);
  again.save(second);
  const std::vector<std::byte> of_device = read_file(first);
  const std::vector<std::byte> of_host = read_file(second);
  ASSERT_EQ(of_device.size(), of_host.size() + 8 + sizeof(float) * kHidden);
  EXPECT_TRUE(std::equal(of_host.begin(), of_host.end() - 8, of_device.begin()));

  // CPU to GPU, from a stream of the CPU's own, and back without a change.
  Session<Element> origin(model, options);
  const std::vector<Token> of_the_cpu = begin_stream(origin);
  origin.save(first);
  CudaSession<Element> moved(placed, options);
  moved.restore(first);
  EXPECT_LE(relative_error(moved.logits(), origin.logits()), 96 * 0x1p-23);
  moved.save(second);
  EXPECT_EQ(read_file(first), read_file(second));
  // Checkpoints and forks know that the norm has been applied.
  CudaSession<Element> child = moved.fork();
  expect_same_bits(child, moved, "a fork");
  const CheckpointId id = moved.checkpoint();
  const std::vector<float> logits = copy(moved.logits());
  EXPECT_LE(error_on(moved, origin, text), bound_behind(of_the_cpu));
  moved.rollback_to(id);
  EXPECT_EQ(copy(moved.logits()), logits);
}

}  // namespace host_test
