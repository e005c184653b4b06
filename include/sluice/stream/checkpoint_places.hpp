// SPDX-License-Identifier: MIT
/// Where a session keeps its checkpoints: a fixed number of places, the oldest of which gives way,
/// and which of them an update starts from. What a place holds is the session's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"

namespace sluice {

/// Names a checkpoint of one session. Ids are never used twice.
struct CheckpointId {
  std::uint64_t serial = 0;  ///< 0: none

  friend constexpr bool operator==(const CheckpointId&, const CheckpointId&) = default;
};

namespace detail {

/// How to get back to the first `kept` tokens: from where the stream stands, or from a place.
template <class Place>
struct WayBack {
  std::int64_t kept = 0;
  const Place* from = nullptr;
};

/// The places of one session. Place has a `serial` (0: free), fed(), the tokens that its cache has
/// had, and `cache`, whose max_truncate() tells how many of these can be taken back behind it. Only
/// add() allocates.
template <class Place>
class CheckpointPlaces {
 public:
  /// session: what errors call the session.
  explicit CheckpointPlaces(const char* session) : session_(session) {}

  void add(Place place) { places_.push_back(std::move(place)); }
  bool empty() const { return places_.empty(); }
  const Place& front() const { return places_.front(); }

  /// A place for a new checkpoint, whose serial is set: a free one, else that of the oldest.
  /// \throws Error(kConfig) if there are none.
  Place& take() {
    if (places_.empty())
      throw Error(ErrorCode::kConfig,
                  {"the session has no room for checkpoints",
                   std::string(session_) + "::checkpoint", "checkpoints", "at least 1", "0"});
    Place& place = *std::ranges::min_element(places_, {}, &Place::serial);
    place.serial = ++last_serial_;
    return place;
  }
  /// The place to go back to; later checkpoints expire. \throws Error(kOrder) for an id that was
  /// not given, or has expired: nothing changes then.
  const Place& go_back(CheckpointId id) {
    const auto found = find(id);
    if (found == places_.end())
      throw Error(ErrorCode::kOrder,
                  {id.serial == 0 || id.serial > last_serial_ ? "no such checkpoint"
                                                              : "the checkpoint has expired",
                   std::string(session_) + "::rollback_to", "id", "a checkpoint that is held",
                   std::to_string(id.serial)});
    for (Place& place : places_)
      if (place.serial > id.serial) place.serial = 0;
    return *found;
  }
  bool holds(CheckpointId id) const { return find(id) != places_.end(); }
  void release(CheckpointId id) {
    for (Place& place : places_)
      if (place.serial == id.serial) place.serial = 0;
  }
  /// Forgets checkpoints of more than `fed` tokens; with 0 all of them.
  void expire(std::int64_t fed) {
    for (Place& place : places_)
      if (fed == 0 || place.fed() > fed) place.serial = 0;
  }
  /// Tokens fed before the newest checkpoint.
  std::int64_t newest() const {
    std::int64_t fed = 0;
    for (const Place& place : places_)
      if (place.serial != 0) fed = std::max(fed, place.fed());
    return fed;
  }

  /// How to keep the most of the first `limit` tokens of a stream of which `fed` are in the cache
  /// and `max_truncate` can be taken back.
  WayBack<Place> way_back(std::int64_t limit, std::int64_t fed, std::int64_t max_truncate) const {
    if (limit <= 0) return {};
    limit = std::min(limit, fed);
    if (fed - limit <= max_truncate) return {limit, nullptr};
    WayBack<Place> best;
    for (const Place& place : places_) {
      if (place.serial == 0) continue;
      const std::int64_t total = place.cache.total();
      if (total > limit && total - limit > place.cache.max_truncate()) continue;
      if (std::min(total, limit) > best.kept) best = {std::min(total, limit), &place};
    }
    return best;
  }

 private:
  auto find(CheckpointId id) const {
    return std::find_if(places_.begin(), places_.end(), [&](const Place& place) {
      return id.serial != 0 && place.serial == id.serial;
    });
  }

  const char* session_;
  std::vector<Place> places_;
  std::uint64_t last_serial_ = 0;
};

}  // namespace detail

}  // namespace sluice
