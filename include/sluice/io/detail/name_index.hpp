// SPDX-License-Identifier: MIT
/// Lookup by name in a vector of named things. Sorted indices instead of a hash table: the names
/// come from untrusted files, which could be built to collide in a hash whose seed is known.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string_view>
#include <vector>

namespace sluice::detail {

/// Indices into a vector, in the order of the names of its elements. `name_of(item)` gives a name.
class NameIndex {
 public:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  NameIndex() = default;
  template <class Items, class NameOf>
  NameIndex(const Items& items, NameOf name_of) : order_(items.size()) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) {
      const std::string_view left = name_of(items[a]);
      const std::string_view right = name_of(items[b]);
      return left != right ? left < right : a < b;
    });
  }

  /// The index of the first element that bears the name of an earlier one, or kNone.
  template <class Items, class NameOf>
  std::size_t duplicate(const Items& items, NameOf name_of) const {
    for (std::size_t rank = 1; rank < order_.size(); ++rank) {
      if (name_of(items[order_[rank]]) == name_of(items[order_[rank - 1]])) return order_[rank];
    }
    return kNone;
  }

  /// The index of the element with this name, or kNone.
  template <class Items, class NameOf>
  std::size_t find(const Items& items, NameOf name_of, std::string_view name) const {
    const auto found =
        std::lower_bound(order_.begin(), order_.end(), name,
                         [&](std::size_t a, std::string_view b) { return name_of(items[a]) < b; });
    if (found == order_.end() || name_of(items[*found]) != name) return kNone;
    return *found;
  }

 private:
  std::vector<std::size_t> order_;  // [items]
};

}  // namespace sluice::detail
