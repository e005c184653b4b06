// SPDX-License-Identifier: MIT
/// Named groups of tokens (source, target, one of several writers): each has a cache, a counter and
/// a retention of its own, one thread that writes it and any number that read it while it grows. A
/// reader sees the first n tokens of a group, n being a snapshot that it holds; nothing is copied
/// and nothing is locked.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// What one reader sees of another group: its first `visible` tokens, from a place that is `shift`
/// away from the reader's own position. Shift 0: each group counts for itself (group position
/// encoding); other shifts put groups one behind the other (contiguous_views).
template <class Key, class Value = Key>
struct GroupView {
  const KvCache<Key, Value>* cache = nullptr;
  std::int32_t group = 0;
  std::int64_t visible = 0;
  Position shift = 0;
};

/// A group. The writer appends to cache(), commits and publishes; a reader takes a snapshot of what
/// was published and holds it while it reads. The release of publish() and the acquire of
/// published() order the rows; the release of hold() and the acquire of room() order the reads of a
/// row before it is overwritten.
template <KvElement Key, KvElement Value = Key>
class Group {
 public:
  static constexpr int kMaxReaders = 16;

  /// \throws Error(kConfig) if the cache evicts on request: what a snapshot shows would depend on
  /// the requests.
  Group(std::string name, std::int32_t id, KvCache<Key, Value>&& cache)
      : name_(std::move(name)), id_(id), cache_(std::move(cache)) {
    for (const Retention& retention : cache_.retentions())
      if (!retention.supports_snapshots())
        throw Error(ErrorCode::kConfig, {"a group that others read must evict by itself", "Group",
                                         name_ + " eviction", "per query", "on request"});
    for (Reader& reader : readers_) reader.held.store(kNobody, std::memory_order_relaxed);
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  const std::string& name() const { return name_; }
  std::int32_t id() const { return id_; }
  /// The writer's.
  KvCache<Key, Value>& cache() { return cache_; }
  const KvCache<Key, Value>& cache() const { return cache_; }

  /// Writer: everything committed may now be read. Precondition: nothing is uncommitted.
  void publish() { published_.store(cache_.total(), std::memory_order_release); }
  /// Any thread: tokens that a reader may take as its snapshot.
  std::int64_t published() const { return published_.load(std::memory_order_acquire); }

  /// A reader that holds snapshot 0; returns its number. Not while others read or write. A reader
  /// that waits for more must go on holding what is published, or the writer runs out of room.
  /// \throws Error(kConfig) if the group could not grow while it is read (CacheOptions::lead);
  /// Error(kCapacity) when there are kMaxReaders.
  int open_reader() {
    if (cache_.max_lead() < 1)
      throw Error(ErrorCode::kConfig,
                  {"a group that is read while it grows needs room beyond its window", "Group",
                   name_ + " lead", "at least 1", std::to_string(cache_.max_lead())});
    for (int r = 0; r < kMaxReaders; ++r) {
      std::atomic<std::int64_t>& held = readers_[static_cast<std::size_t>(r)].held;
      if (held.load(std::memory_order_relaxed) != kNobody) continue;
      held.store(0, std::memory_order_release);
      return r;
    }
    throw Error(ErrorCode::kCapacity,
                {"too many readers", "Group", name_, "at most " + std::to_string(kMaxReaders), ""});
  }
  /// The reader reads no more: the writer need not wait for it.
  void close_reader(int reader) {
    readers_[static_cast<std::size_t>(reader)].held.store(kNobody, std::memory_order_release);
  }
  /// Reader: from now on it reads the first `snapshot` tokens, never fewer again. Precondition:
  /// snapshot <= published(), not below what it held.
  void hold(int reader, std::int64_t snapshot) {
    SLUICE_ASSERT(snapshot <= published());
    readers_[static_cast<std::size_t>(reader)].held.store(snapshot, std::memory_order_release);
  }
  /// What a reader sees of this group with a snapshot.
  GroupView<Key, Value> view(std::int64_t snapshot, Position shift = 0) const {
    return {&cache_, id_, snapshot, shift};
  }

  /// Writer: tokens that may be appended now without overwriting what a reader holds, and without
  /// outgrowing a full cache; how many fit in one step is the cache's status().
  std::int64_t room() const {
    std::int64_t room = std::numeric_limits<std::int64_t>::max();
    for (const Retention& retention : cache_.retentions()) {
      if (retention.window() >= kUnlimitedWindow) {
        room = std::min(room, retention.config().capacity - retention.total());
        continue;
      }
      for (const Reader& reader : readers_) {
        const std::int64_t held = reader.held.load(std::memory_order_acquire);
        if (held != kNobody) room = std::min(room, held + retention.max_lead() - retention.total());
      }
    }
    return std::max<std::int64_t>(room, 0);
  }

  /// Forgets all tokens. Nobody may read or write meanwhile; readers hold snapshot 0 again.
  void reset() {
    cache_.reset();
    publish();
    for (Reader& reader : readers_)
      if (reader.held.load(std::memory_order_relaxed) != kNobody)
        reader.held.store(0, std::memory_order_release);
  }

 private:
  static constexpr std::int64_t kNobody = -1;

  /// A cache line each: readers do not slow each other down.
  struct alignas(64) Reader {
    std::atomic<std::int64_t> held;
  };

  std::string name_;
  std::int32_t id_;
  KvCache<Key, Value> cache_;
  alignas(64) std::atomic<std::int64_t> published_{0};
  std::array<Reader, kMaxReaders> readers_;
};

/// Groups by name and by number (their place in the set).
template <KvElement Key, KvElement Value = Key>
class GroupSet {
 public:
  /// Takes a group in. \throws Error(kConfig) unless its id is its place, or if the name is taken.
  Group<Key, Value>& add(std::unique_ptr<Group<Key, Value>> group) {
    if (group->id() != static_cast<std::int32_t>(groups_.size()))
      throw Error(ErrorCode::kConfig,
                  {"groups are numbered in order", "GroupSet", group->name(),
                   std::to_string(groups_.size()), std::to_string(group->id())});
    for (const auto& other : groups_)
      if (other->name() == group->name())
        throw Error(ErrorCode::kConfig,
                    {"two groups of one name", "GroupSet", "name", "a new name", group->name()});
    groups_.push_back(std::move(group));
    return *groups_.back();
  }

  std::int32_t size() const { return static_cast<std::int32_t>(groups_.size()); }
  Group<Key, Value>& operator[](std::int32_t id) {
    SLUICE_ASSERT(id >= 0 && id < size());
    return *groups_[static_cast<std::size_t>(id)];
  }
  const Group<Key, Value>& operator[](std::int32_t id) const {
    SLUICE_ASSERT(id >= 0 && id < size());
    return *groups_[static_cast<std::size_t>(id)];
  }
  /// \throws Error(kConfig) naming the groups there are.
  Group<Key, Value>& operator[](std::string_view name) {
    std::string names;
    for (const auto& group : groups_) {
      if (group->name() == name) return *group;
      names += (names.empty() ? "" : ", ") + group->name();
    }
    throw Error(ErrorCode::kConfig,
                {"no such group", "GroupSet", "name", names, std::string(name)});
  }

 private:
  std::vector<std::unique_ptr<Group<Key, Value>>> groups_;
};

/// One entry of a reader's own order of groups.
struct OrderedGroup {
  std::int32_t group = 0;
  std::int64_t visible = 0;  ///< of other groups: the reader's snapshot; of its own: ignored
};

/// Views for a reader that sees several groups one behind the other, in an order of its own, each
/// group contiguous with the one before (Hogwild! Inference, arXiv 2504.06261, section 3: every
/// worker reads the others' runs and then its own). order: the groups that the reader sees, its own
/// among them, once each. Writes the others' views in that order; returns how many. A group behind
/// the reader's own begins where the own tokens end so far, those of the chunk to come not counted.
/// Extents are those of the first layer's retention. Allocates nothing.
/// \throws Error(kConfig) unless `own` is in the order once; Error(kShape) if views is too short.
template <class Key, class Value>
int contiguous_views(const GroupSet<Key, Value>& groups, std::span<const OrderedGroup> order,
                     std::int32_t own, std::span<GroupView<Key, Value>> views) {
  const auto ranks = [&](const OrderedGroup& entry) {
    const KvCache<Key, Value>& cache = groups[entry.group].cache();
    return static_cast<Position>(
        cache.retentions().front().ranks(entry.group == own ? cache.total() : entry.visible));
  };
  Position own_start = 0;
  int own_entries = 0;
  Position end = 0;
  for (const OrderedGroup& entry : order) {
    if (entry.group == own) {
      own_start = end;
      ++own_entries;
    }
    end += ranks(entry);
  }
  if (own_entries != 1)
    throw Error(ErrorCode::kConfig, {"a reader sees its own group once", "contiguous_views",
                                     "order", "1 entry", std::to_string(own_entries)});
  if (views.size() + 1 < order.size())
    throw Error(ErrorCode::kShape,
                {"no room for the views", "contiguous_views", "views",
                 std::to_string(order.size() - 1), std::to_string(views.size())});
  const Position own_origin = groups[own].cache().write_position(0);
  Position start = 0;
  int written = 0;
  for (const OrderedGroup& entry : order) {
    if (entry.group != own) {
      // Both count from their own origins; laid out, they count from their starts.
      const Position origin = groups[entry.group].cache().write_position(0);
      views[static_cast<std::size_t>(written++)] =
          groups[entry.group].view(entry.visible, (own_start - own_origin) - (start - origin));
    }
    start += ranks(entry);
  }
  return written;
}

}  // namespace sluice
