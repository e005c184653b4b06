// SPDX-License-Identifier: MIT
#include "output.hpp"

#include "support/terminal.hpp"

namespace stream_text {

void Output::token(sluice::Token token, std::string_view text) {
  const std::int64_t index = index_++;
  if (!json()) return support::write_stdout(text);
  object({{"kind", "token"},
          {"index", index},
          {"token", token},
          {"text", text},
          {"time_ms", static_cast<double>(sluice::monotonic_ns() - start_ns_) * 1e-6}});
}

void Output::text(std::string_view text) {
  if (text.empty()) return;
  if (!json()) return support::write_stdout(text);
  object({{"kind", "text"}, {"text", text}});
}

void Output::object(const sluice::Json& object) {
  if (!json()) return;
  line_ = object.dump(-1, ' ', false, sluice::Json::error_handler_t::replace);
  line_ += '\n';
  support::write_stdout(line_);
}

}  // namespace stream_text
