// SPDX-License-Identifier: MIT
// stream_text: streams text through a language model at constant memory and constant latency.
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <string_view>
#include <variant>

#include "backend.hpp"
#include "options.hpp"
#include "report.hpp"
#include "runner.hpp"
#include "support/terminal.hpp"

#include "sluice/core/atomic_file.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/model/load_head_map.hpp"
#include "sluice/model/load_model.hpp"

namespace {

using namespace stream_text;

/// A signal came while the model was loading.
struct Interrupted {};

int fail(const char* message, int status) {
  std::cerr << "stream_text: " << message << '\n';
  return status;
}

/// What was asked for is done by another backend.
[[noreturn]] void unsupported(const char* field, const std::string& expected,
                              std::string_view found) {
  throw sluice::Error(sluice::ErrorCode::kUnsupported,
                      {"the backend " + std::string(BackendTraits::kName) + " does not do this",
                       "stream_text", field, expected, std::string(found)});
}

template <class Element>
int run(const sluice::LoadedModel& model, const Options& options) {
  if constexpr (BackendTraits::kStores<Element>) {
    using Session = sluice::SessionOn<Backend, Element>;
    return Runner<Session>(model, options, Session(model.decoder, session_options(options))).run();
  } else {
    unsupported("--kv-type", "another type", to_string(options.kv_type));
  }
}

int run_chosen(const sluice::LoadedModel& model, const Options& options) {
  if constexpr (std::same_as<Backend, sluice::cpu>)
    return run_choosing(model, options);
  else
    unsupported("--policy", "sink-window, window or full", to_string(options.choosing));
}

/// The head map that --heads names.
sluice::HeadMap load_heads(const Options& options, const sluice::DecoderConfig& config) {
  if (options.heads.ends_with(".json"))
    return sluice::load_head_map(options.heads, config, options.cache.capacity);
  return sluice::load_duo_attention(options.heads, {.sparsity = options.sparsity});
}

sluice::LoadedModel load(const Options& options) {
  support::Progress progress("loading");
  return sluice::load_model(options.model, {.read_all = true,
                                            .lock_memory = options.lock_memory,
                                            .progress = [&](std::size_t done, std::size_t total) {
                                              if (support::caught_signal() != 0)
                                                throw Interrupted();
                                              progress.show_bytes(done, total);
                                            }});
}

int run(Options options) {
  options.backend = BackendTraits::kName;
  BackendTraits::require_device();
  for (const auto& written : {options.save, options.latency_log})
    if (written) sluice::require_writable(*written);  // not only after hours of streaming
  const sluice::LoadedModel model = load(options);
  if (!options.heads.empty() && options.cache.policy == sluice::CachePolicy::kPerHead)
    options.cache.heads = load_heads(options, model.decoder->config());
  try {
    print_setting(model, options);
    if (options.choosing != Choosing::kNone) return run_chosen(model, options);
    switch (options.kv_type) {
      case KvType::kF32: return run<float>(model, options);
      case KvType::kF16: return run<sluice::f16>(model, options);
      case KvType::kBF16: return run<sluice::bf16>(model, options);
      case KvType::kInt8: return run<std::int8_t>(model, options);
      case KvType::kFp8: return run<sluice::fp8_e4m3>(model, options);
      case KvType::kQ8_0: return run<sluice::q8_0>(model, options);
      case KvType::kQ4_0: return run<sluice::q4_0>(model, options);
    }
  } catch (const sluice::Error& error) {
    // Option values that make no sense together, or not with this model.
    if (error.code() == sluice::ErrorCode::kConfig) return fail(error.what(), 2);
    throw;
  }
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::variant<Options, int> parsed = parse_options(argc, argv);
  if (const int* status = std::get_if<int>(&parsed)) return *status;
  support::catch_signals();
  int status = 0;
  try {
    status = run(std::get<Options>(parsed));
  } catch (const support::StdoutClosed&) {
    status = 0;
  } catch (const Interrupted&) {
    return 128 + support::caught_signal();
  } catch (const std::bad_alloc&) {
    status = fail("out of memory", 1);
  } catch (const std::exception& error) {
    status = fail(error.what(), 1);  // behind a signal it may be its doing
  }
  return support::caught_signal() != 0 ? 128 + support::caught_signal() : status;
}
