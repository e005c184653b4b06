// SPDX-License-Identifier: MIT
/// Any bytes as a chat template: what parses is rendered, and must end.
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "fuzz/fuzz_target.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/chat_template.hpp"

extern "C" const char* sluice_fuzz_seeds() {
  return "chat/templates";
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::array<sluice::ChatMessage, 3> kMessages = {{
      {"system", "Be brief."},
      {"user", " H\xC3\xA9llo 'you' \n"},
      {"assistant", "<think>\nso\n</think>\n\nYes."},
  }};
  try {
    const sluice::ChatTemplate chat(std::string(reinterpret_cast<const char*>(data), size), "<s>",
                                    "</s>");
    const std::string text = chat.render(kMessages, true);
    if (sluice::detail::find_invalid_utf8(text) != std::string_view::npos)
      throw std::logic_error("rendered text is not UTF-8");
  } catch (const sluice::Error&) {
  }
  return 0;
}
