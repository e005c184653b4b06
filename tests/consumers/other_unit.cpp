// SPDX-License-Identifier: MIT
#include <sluice/sluice.hpp>

const sluice::Version* version_of_other_unit() { return &sluice::kVersion; }
