// SPDX-License-Identifier: MIT
/// What a fuzz target is: a function that takes any bytes and must not crash, with a folder of
/// well-formed files to start from. libFuzzer runs the same targets (pass it the folder).
#pragma once

#include <cstddef>
#include <cstdint>

/// Feeds one input; returns 0. Anything but sluice::Error that leaves the reader is a failure.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

/// Seed files, a folder or a file below tests/data; a target may leave it out and get noise only.
extern "C" __attribute__((weak)) const char* sluice_fuzz_seeds();
