// SPDX-License-Identifier: MIT
/// Writes a whole file at once, so that a reader never meets a half-written one.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <ios>
#include <span>
#include <string>
#include <system_error>

#include "sluice/core/error.hpp"

namespace sluice::detail {

/// Writes `bytes` beside `path` and then renames, which replaces `path` in one step.
/// \throws Error(kIo) with the system's reason; `path` is then as it was before.
inline void write_file(const std::string& path, std::span<const std::byte> bytes) {
  const std::string partial = path + ".partial";
  const auto fail = [&](const char* what, const std::string& where) {
    const int reason = errno;
    std::remove(partial.c_str());
    throw Error(ErrorCode::kIo, {what, where, "", "", std::generic_category().message(reason)});
  };
  {
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    if (!file) fail("cannot create the file", partial);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file) fail("cannot write the file", partial);
  }
  if (std::rename(partial.c_str(), path.c_str()) != 0) fail("cannot rename the file to", path);
}

}  // namespace sluice::detail
