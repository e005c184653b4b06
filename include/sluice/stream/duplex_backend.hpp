// SPDX-License-Identifier: MIT
/// Duplex by backend tag, as backend_traits.hpp has Session: a program that names DuplexOn is the
/// same source for every backend. It changes the tag, and includes the header in which that backend
/// specialises duplex_backend (backend/cuda/duplex_session.hpp).
#pragma once

#include "sluice/cache/kv_element.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/element.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/backend_traits.hpp"
#include "sluice/stream/duplex.hpp"
#include "sluice/stream/policy.hpp"

namespace sluice {

/// What a backend's streams are that read while they write. A specialisation's Duplex has the
/// constructors and verbs of that for cpu, with the same results to rounding, and throws
/// Error(kUnsupported) where the backend does not do what is asked. Models are those of
/// backend_traits: place_model().
template <Backend Tag>
struct duplex_backend;

template <>
struct duplex_backend<cpu> {
  template <ReadWritePolicy Policy, KvElement Element, GroupLayout Layout>
  using Duplex = sluice::Duplex<Policy, Element, Element, Layout>;
};

/// Duplex on a backend; Element is the type of keys and values.
template <Backend Tag, ReadWritePolicy Policy, KvElement Element = f16,
          GroupLayout Layout = GroupedLayout>
using DuplexOn = typename duplex_backend<Tag>::template Duplex<Policy, Element, Layout>;

}  // namespace sluice
