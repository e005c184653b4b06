// SPDX-License-Identifier: MIT
// Carries the tests' precompiled header, and nothing else.
