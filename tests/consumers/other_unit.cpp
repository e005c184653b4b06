// SPDX-License-Identifier: MIT
// The whole library in two units is linked by the test two_units.
#include <sluice/core/version.hpp>

const sluice::Version* version_of_other_unit() { return &sluice::kVersion; }
