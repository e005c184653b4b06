// SPDX-License-Identifier: MIT
/// Backend tags. A tag is a template parameter of storage, kernels and models; overload resolution
/// picks the specialisation at compile time, so one public name serves every backend.
#pragma once

#include <concepts>

namespace sluice {

/// Root of all tags: plain portable loops.
struct generic_backend {};

/// The host processor, through Eigen and the vector layer.
struct cpu : generic_backend {};

template <class Tag>
concept Backend = std::derived_from<Tag, generic_backend>;

/// In place of a device's index: the one that the calling thread uses now (the first, if nobody
/// chose).
inline constexpr int kCurrentDevice = -1;

}  // namespace sluice
