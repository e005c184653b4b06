// SPDX-License-Identifier: MIT
/// Trees of drafted tokens for speculative decoding (Medusa, arXiv 2401.10774): candidates for the
/// next tokens, verified in one forward. Siblings share a position; a node sees what the stream
/// holds and its own ancestors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/attention/variant.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Nodes in the order in which they are fed: a parent before its children. Node 0 is the root, the
/// token that was sampled last; others continue it. Only construction allocates.
class DraftTree {
 public:
  static constexpr std::int64_t kNoNode = -1;

  /// An empty tree of at most `max_nodes` nodes.
  /// \throws Error(kConfig) unless 1 <= max_nodes <= 4096.
  explicit DraftTree(std::int64_t max_nodes)
      : words_((checked(max_nodes) + 63) / 64), max_nodes_(max_nodes) {
    const auto count = static_cast<std::size_t>(max_nodes);
    tokens_.reserve(count);
    parents_.reserve(count);
    depths_.reserve(count);
    positions_.resize(count);
    ancestors_.resize(count * static_cast<std::size_t>(words_));
  }

  /// The shape that a list of paths describes: path (1, 0) is the first choice behind the root's
  /// second choice. Nodes are numbered behind the root by length of path, then lexicographically
  /// (Medusa's order); tokens are all 0 (set_token).
  /// \throws Error(kShape) for an empty path, a path given twice or one whose parent is missing.
  static DraftTree from_paths(std::span<const std::vector<int>> paths) {
    std::vector<std::vector<int>> sorted(paths.begin(), paths.end());
    std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
      return a.size() != b.size() ? a.size() < b.size() : a < b;
    });
    DraftTree tree(static_cast<std::int64_t>(sorted.size()) + 1);
    tree.add(0, kNoNode);
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      std::vector<int> parent = sorted[i];
      if (!parent.empty()) parent.pop_back();
      const auto found =
          std::find(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(i), parent);
      const bool known = parent.empty() || found != sorted.begin() + static_cast<std::ptrdiff_t>(i);
      if (sorted[i].empty() || !known || (i > 0 && sorted[i] == sorted[i - 1]))
        throw Error(ErrorCode::kShape, {"paths are no tree", "DraftTree::from_paths",
                                        "path " + std::to_string(i) + " in sorted order",
                                        "a new path that continues another", ""});
      tree.add(0, parent.empty() ? 0 : 1 + (found - sorted.begin()));
    }
    return tree;
  }

  /// Forgets all nodes.
  void clear() {
    tokens_.clear();
    parents_.clear();
    depths_.clear();
  }

  /// Adds a node behind `parent` (kNoNode for the root, which comes first); returns its number.
  /// Precondition: size() < max_nodes(), parent < size().
  std::int64_t add(Token token, std::int64_t parent) {
    const std::int64_t node = size();
    SLUICE_ASSERT(node < max_nodes_ && parent < node && (parent == kNoNode) == (node == 0));
    tokens_.push_back(token);
    parents_.push_back(parent);
    depths_.push_back(parent == kNoNode ? 0 : depth(parent) + 1);
    std::uint64_t* row = ancestors_.data() + node * words_;
    if (parent == kNoNode)
      std::fill_n(row, words_, std::uint64_t{0});
    else
      std::copy_n(ancestors_.data() + parent * words_, words_, row);
    row[node / 64] |= std::uint64_t{1} << (node % 64);
    return node;
  }

  std::int64_t size() const { return static_cast<std::int64_t>(tokens_.size()); }
  std::int64_t max_nodes() const { return max_nodes_; }
  std::span<const Token> tokens() const { return tokens_; }
  Token token(std::int64_t node) const { return tokens_[at(node)]; }
  void set_token(std::int64_t node, Token token) { tokens_[at(node)] = token; }
  /// kNoNode for the root.
  std::int64_t parent(std::int64_t node) const { return parents_[at(node)]; }
  /// Nodes above it.
  std::int64_t depth(std::int64_t node) const { return depths_[at(node)]; }
  /// Whether `node` sees `key`: its ancestors and itself.
  bool sees(std::int64_t node, std::int64_t key) const {
    const std::uint64_t word = ancestors_[at(node) * static_cast<std::size_t>(words_) +
                                          static_cast<std::size_t>(key / 64)];
    return (word >> (key % 64) & 1U) != 0;
  }
  /// The child of `node` with that token, the first of several; kNoNode if there is none.
  std::int64_t child(std::int64_t node, Token token) const {
    for (std::int64_t i = node + 1; i < size(); ++i)
      if (parent(i) == node && this->token(i) == token) return i;
    return kNoNode;
  }
  /// Whether every node but the last has one child: a plain run of tokens.
  bool is_path() const { return size() == 0 || depths_.back() == size() - 1; }
  /// Writes the nodes from the root to `node`, depth(node) + 1 of them; returns how many.
  /// Precondition: they fit.
  std::int64_t path_to(std::int64_t node, std::span<std::int64_t> path) const {
    const std::int64_t count = depth(node) + 1;
    SLUICE_ASSERT(count <= static_cast<std::int64_t>(path.size()));
    for (std::int64_t i = count - 1; i >= 0; --i, node = parent(node))
      path[static_cast<std::size_t>(i)] = node;
    return count;
  }
  /// Where the nodes stand if the root stands at `first`. [size()], valid until the next call.
  std::span<const Position3> positions(Position first) const {
    for (std::size_t i = 0; i < tokens_.size(); ++i)
      positions_[i] = on_all_axes(first + static_cast<Position>(depths_[i]));
    return std::span(positions_).first(tokens_.size());
  }

 private:
  static std::int64_t checked(std::int64_t max_nodes) {
    if (max_nodes < 1 || max_nodes > 4096)
      throw Error(ErrorCode::kConfig, {"a draft of that size makes no sense", "DraftTree",
                                       "max_nodes", "1 to 4096", std::to_string(max_nodes)});
    return max_nodes;
  }
  std::size_t at(std::int64_t node) const {
    SLUICE_ASSERT(node >= 0 && node < size());
    return static_cast<std::size_t>(node);
  }

  std::int64_t words_;  // of a row of ancestors_
  std::int64_t max_nodes_;
  std::vector<Token> tokens_;
  std::vector<std::int64_t> parents_;
  std::vector<std::int64_t> depths_;
  std::vector<std::uint64_t> ancestors_;  // [max_nodes, words_], one bit a node
  mutable std::vector<Position3> positions_;
};

/// What the nodes of a draft see: of the stream's tokens, those that a token at their depth would
/// (`own`); of the draft, their ancestors and themselves. The draft must be no deeper than the
/// window, which a chunk never is.
struct DraftMask {
  CausalWindow own{};
  const DraftTree* draft = nullptr;
  std::int64_t first_index = 0;  ///< stream index of node 0

  bool visible(QueryInfo query, KeyInfo key) const {
    const std::int64_t node = query.index - first_index;
    if (key.index >= first_index) return draft->sees(node, key.index - first_index);
    return own.visible({first_index + draft->depth(node), query.position}, key);
  }
  TileVisibility classify(std::int64_t query_first, std::int64_t query_last, KeyInfo key_first,
                          std::int64_t key_last) const {
    if (key_last >= first_index) return TileVisibility::kSome;
    std::int64_t least = draft->depth(query_first - first_index);
    std::int64_t most = least;
    for (std::int64_t q = query_first + 1; q <= query_last; ++q) {
      least = std::min(least, draft->depth(q - first_index));
      most = std::max(most, draft->depth(q - first_index));
    }
    return own.classify(first_index + least, first_index + most, key_first, key_last);
  }
};

}  // namespace sluice
