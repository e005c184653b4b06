// SPDX-License-Identifier: MIT
#include "sluice/attention/draft_tree.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// cache-and-kernel-algorithms D.2, which ran Medusa's buffers for these paths.
TEST(DraftTree, OfPathsHasMedusasBuffers) {
  const std::vector<std::vector<int>> paths{{0}, {1}, {0, 0}, {0, 1}, {1, 0}, {0, 0, 0}};
  const DraftTree tree = DraftTree::from_paths(paths);
  ASSERT_EQ(tree.size(), 7);
  const std::array<double, 7> positions{0, 1, 1, 2, 2, 2, 3};
  const std::array<const char*, 7> rows{"1000000", "1100000", "1010000", "1101000",
                                        "1100100", "1010010", "1101001"};
  for (std::int64_t node = 0; node < 7; ++node) {
    const auto i = static_cast<std::size_t>(node);
    EXPECT_EQ(tree.positions(100)[i], on_all_axes(100 + positions[i])) << node;
    std::string row;
    for (std::int64_t key = 0; key < 7; ++key) row += tree.sees(node, key) ? '1' : '0';
    EXPECT_EQ(row, rows[i]) << node;
  }
  const auto path = [&](std::int64_t leaf) {
    std::vector<std::int64_t> nodes(7);
    nodes.resize(static_cast<std::size_t>(tree.path_to(leaf, nodes)));
    return nodes;
  };
  EXPECT_EQ(path(6), (std::vector<std::int64_t>{0, 1, 3, 6}));
  EXPECT_EQ(path(5), (std::vector<std::int64_t>{0, 2, 5}));
  EXPECT_EQ(path(4), (std::vector<std::int64_t>{0, 1, 4}));
  EXPECT_FALSE(tree.is_path());
}

TEST(DraftTree, RefusesPathsThatAreNoTree) {
  const auto code_of = [](const std::vector<std::vector<int>>& paths) {
    const auto error = test::error_of([&] { DraftTree::from_paths(paths); });
    return error ? std::string(to_string(error->code())) : "none";
  };
  EXPECT_EQ(code_of({{0}, {1, 0}}), "shape");
  EXPECT_EQ(code_of({{0}, {0}}), "shape");
  EXPECT_EQ(code_of({{}}), "shape");
  EXPECT_EQ(code_of({{1, 0}, {1}}), "none");  // in any order
  EXPECT_TRUE(test::error_of([] { DraftTree tree(0); }).has_value());
}

TEST(DraftTree, FindsTheChildThatGuessedRight) {
  DraftTree tree(5);
  tree.add(7, DraftTree::kNoNode);
  tree.add(3, 0);
  tree.add(4, 0);
  tree.add(3, 2);
  EXPECT_EQ(tree.child(0, 3), 1);
  EXPECT_EQ(tree.child(0, 4), 2);
  EXPECT_EQ(tree.child(2, 3), 3);
  EXPECT_EQ(tree.child(1, 3), DraftTree::kNoNode);
  tree.clear();
  EXPECT_EQ(tree.size(), 0);
  tree.add(9, DraftTree::kNoNode);
  tree.add(8, 0);
  EXPECT_TRUE(tree.is_path());
  EXPECT_TRUE(tree.sees(1, 0));
  EXPECT_FALSE(tree.sees(0, 1));
}

// On random trees (more than 64 nodes too) a node sees what walking up its parents meets, and of
// the stream what a token at its depth would; a tile's word agrees with its keys, one by one.
TEST(DraftMask, AgreesWithWalkingUpAndWithItsTiles) {
  Random random(4);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t count = test::between(random, 1, 90);
    DraftTree tree(90);
    for (std::int64_t i = 0; i < count; ++i)
      tree.add(0, i == 0 ? DraftTree::kNoNode : test::between(random, 0, i - 1));
    const std::int64_t first = test::between(random, 0, 60);
    const DraftMask mask{{test::between(random, 8, 40), test::between(random, 0, 4)}, &tree, first};
    const auto sees = [&](std::int64_t node, std::int64_t key) {
      if (key < first) {
        const std::int64_t at = first + tree.depth(node);
        return key < mask.own.num_sink_tokens || at - key < mask.own.window_size;
      }
      std::int64_t up = node;
      while (up != DraftTree::kNoNode && up != key - first) up = tree.parent(up);
      return up != DraftTree::kNoNode;
    };
    for (int tile = 0; tile < 30; ++tile) {
      const std::int64_t q0 = test::between(random, 0, count - 1);
      const std::int64_t q1 = test::between(random, q0, count - 1);
      const std::int64_t k0 = test::between(random, 0, first + count - 1);
      const std::int64_t k1 = test::between(random, k0, first + count - 1);
      bool all = true;
      bool none = true;
      for (std::int64_t q = q0; q <= q1; ++q)
        for (std::int64_t k = k0; k <= k1; ++k) {
          const bool seen = mask.visible({first + q, 0}, {k, TokenKind::kText, 0});
          ASSERT_EQ(seen, sees(q, k)) << "node " << q << " key " << k;
          (seen ? none : all) = false;
        }
      const TileVisibility word =
          mask.classify(first + q0, first + q1, {k0, TokenKind::kText, 0}, k1);
      EXPECT_TRUE(word != TileVisibility::kAll || all);
      EXPECT_TRUE(word != TileVisibility::kNone || none);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
