// SPDX-License-Identifier: MIT
// duplex_text: reads text while it arrives and writes at the same time.
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <variant>

#include "backend.hpp"
#include "options.hpp"
#include "runner.hpp"
#include "steering.hpp"
#include "turns.hpp"
#include "units.hpp"

#include "sluice/core/error.hpp"
#include "sluice/model/load_model.hpp"
#include "support/terminal.hpp"
#include "tiny_model/tiny_model.hpp"

namespace {

using namespace duplex_text;

int fail(const char* message, int status) {
  std::cerr << "duplex_text: " << message << '\n';
  return status;
}

/// The model to be used where none is named, or nothing.
std::optional<std::string> find_model() {
  const auto variable = [](const char* name) {
    const char* const value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (const std::string path = variable("SLUICE_MODEL"); !path.empty()) return path;
  std::filesystem::path cache = variable("XDG_CACHE_HOME");
  if (cache.empty()) cache = std::filesystem::path(variable("HOME")) / ".cache";
  const std::filesystem::path path = cache / "sluice" / "SmolLM2-135M-Instruct.Q4_1.gguf";
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored)) return path.string();
  return std::nullopt;
}

int run(Options options) {
  options.backend = BackendTraits::kName;
  BackendTraits::require_device();
  if (!options.model) options.model = find_model();
  sluice::LoadedModel model;
  if (options.model) {
    model = sluice::load_model(*options.model);
  } else {
    model = tiny_model::load(0);
    options.notes.push_back("no model was found: this is the seeded tiny one, its text is noise");
  }
  try {
    const Turns turns = make_turns(*model.tokenizer, options.prompt);
    if (options.layout == LayoutKind::kBatch && options.file && options.source_tokens == 0)
      options.source_tokens = count_tokens(*model.tokenizer, *options.file, options.unit) +
                              static_cast<std::int64_t>(turns.prompt.size() + turns.closing.size());
    if (options.in_arrival_order())
      return Runner(model, options, turns, ArrivalLayout(options.layout)).run();
    return Runner(model, options, turns, make_grouped_layout(options, options.source_tokens)).run();
  } catch (const sluice::Error& error) {
    // Option values that make no sense together, or not with this model.
    if (error.code() == sluice::ErrorCode::kConfig) return fail(error.what(), 2);
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::variant<Options, int> parsed = parse_options(argc, argv);
  if (const int* status = std::get_if<int>(&parsed)) return *status;
  support::catch_signals();
  int status = 0;
  try {
    status = run(std::move(std::get<Options>(parsed)));
  } catch (const support::StdoutClosed&) {
    status = 0;
  } catch (const std::bad_alloc&) {
    status = fail("out of memory", 1);
  } catch (const std::exception& error) {
    status = fail(error.what(), 1);  // behind a signal it may be its doing
  }
  return support::caught_signal() != 0 ? 128 + support::caught_signal() : status;
}
