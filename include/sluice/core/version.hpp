// SPDX-License-Identifier: MIT
/// The library's version. CMake reads the three numbers from here: this is the only place that
/// states them.
#pragma once

#define SLUICE_VERSION_MAJOR 0
#define SLUICE_VERSION_MINOR 1
#define SLUICE_VERSION_PATCH 0

namespace sluice {

/// Version of the headers that a translation unit was compiled with.
struct Version {
  int major;
  int minor;
  int patch;
};

inline constexpr Version kVersion{SLUICE_VERSION_MAJOR, SLUICE_VERSION_MINOR, SLUICE_VERSION_PATCH};

}  // namespace sluice
