// SPDX-License-Identifier: MIT
/// Where the real model is, if this machine has it: $SLUICE_MODEL, else the user's cache folder.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace sluice::test {

inline std::optional<std::string> smollm2_path() {
  if (const char* named = std::getenv("SLUICE_MODEL"); named != nullptr && *named != '\0')
    return std::string(named);
  std::filesystem::path cache;
  if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg != nullptr && *xdg != '\0')
    cache = xdg;
  else if (const char* home = std::getenv("HOME"); home != nullptr)
    cache = std::filesystem::path(home) / ".cache";
  const auto path = cache / "sluice" / "SmolLM2-135M-Instruct.Q4_1.gguf";
  if (std::filesystem::exists(path)) return path.string();
  return std::nullopt;
}

}  // namespace sluice::test
