// SPDX-License-Identifier: MIT
#include "report.hpp"

#include <cstddef>
#include <iostream>
#include <span>
#include <string_view>

#include "sluice/core/atomic_file.hpp"
#include "sluice/model/cache_plan.hpp"
#include "support/report_text.hpp"
#include "support/terminal.hpp"

namespace stream_text {

namespace {

using sluice::CachePolicy;
using sluice::Json;
using support::facts_of;
using support::format;
using support::latency_json;
using support::latency_text;
using support::megabytes;
using support::ModelFacts;
using support::peak_resident_bytes;
using support::resident_bytes;

std::string cache_text(const Options& options) {
  const sluice::CacheOptions& cache = options.cache;
  if (options.choosing == Choosing::kLightTransfer)
    return std::string(to_string(options.choosing)) + ", half of the layers up to " +
           std::to_string(cache.capacity) + " tokens, others " +
           std::to_string(cache.num_sink_tokens) + " sinks + " + std::to_string(cache.window_size) +
           " keys";
  if (options.choosing != Choosing::kNone)
    return std::string(to_string(options.choosing)) + ", " + std::to_string(cache.window_size) +
           (keeps_all(options.choosing) ? " entries read of up to " + std::to_string(cache.capacity)
                                        : " entries a head");
  const std::string policy(to_string(cache.policy));
  switch (cache.policy) {
    case CachePolicy::kSinkWindow:
      return policy + ", " + std::to_string(cache.num_sink_tokens) + " sinks + " +
             std::to_string(cache.window_size) + " keys";
    case CachePolicy::kWindow:
      return policy + ", " + std::to_string(cache.window_size) + " keys, no sinks";
    case CachePolicy::kFull:
      return policy + ", up to " + std::to_string(cache.capacity) + " tokens";
    case CachePolicy::kRecompute:
      return policy + ", " + std::to_string(cache.window_size) + " tokens, rebuilt every time";
    case CachePolicy::kPerHead:
      return policy + ", " + std::to_string(cache.heads.num_full()) + " of " +
             std::to_string(cache.heads.num_layers() * cache.heads.num_kv_heads()) +
             " KV heads keep all, up to " + std::to_string(cache.capacity) + " tokens";
  }
  return policy;
}

/// Null where a file says what each head keeps, or nothing leaves.
Json window_json(const Options& options) {
  const sluice::CacheOptions& cache = options.cache;
  if (options.choosing != Choosing::kNone) return cache.window_size;
  const bool windowed = cache.policy != CachePolicy::kFull && cache.policy != CachePolicy::kPerHead;
  return windowed ? Json(cache.window_size) : Json();
}

std::string_view policy_name(const Options& options) {
  return options.choosing != Choosing::kNone ? to_string(options.choosing)
                                             : to_string(options.cache.policy);
}
/// Whether the stream ends when --capacity tokens are held.
bool is_bounded(const Options& options) {
  return options.choosing == Choosing::kNone ? options.cache.is_bounded()
                                             : keeps_all(options.choosing);
}

std::string_view key_form(const Options& options) {
  return options.cache.key_form == sluice::KeyForm::kRaw ? "raw" : "rotated";
}

/// What a number belongs to: written with every number.
Json setting_json(const sluice::LoadedModel& model, const Options& options) {
  const ModelFacts facts = facts_of(*model.decoder);
  const sluice::CacheOptions& cache = options.cache;
  return {{"model", model.path},
          {"family", model.decoder->config().family},
          {"parameters", facts.parameters},
          {"weight_bytes", facts.bytes},
          {"weight_types", facts.types},
          {"policy", policy_name(options)},
          {"sinks", cache.policy == CachePolicy::kSinkWindow ? cache.num_sink_tokens : 0},
          {"window", window_json(options)},
          {"capacity", is_bounded(options) ? Json(cache.capacity) : Json()},
          {"position", to_string(cache.position_rule)},
          {"keys", key_form(options)},
          {"kv_type", to_string(options.kv_type)},
          {"chunk", cache.chunk()},
          {"backend", options.backend},
          {"threads", options.threads},
          {"activations", to_string(options.activations)},
          {"temperature", options.sampler.temperature},
          {"top_k", options.sampler.top_k},
          {"top_p", options.sampler.top_p},
          {"min_p", options.sampler.min_p},
          {"repeat_penalty", options.sampler.repetition_penalty},
          {"repeat_last_n", options.sampler.repetition_window},
          {"seed", options.sampler.seed},
          {"command", options.command}};
}

}  // namespace

std::string_view to_string(Ending ending) {
  switch (ending) {
    case Ending::kLimit: return "limit";
    case Ending::kEndToken: return "end token";
    case Ending::kInputEnd: return "end of input";
    case Ending::kQuit: return "quit";
    case Ending::kCacheFull: return "cache full";
    case Ending::kSignal: return "signal";
  }
  return "unknown";
}

std::int64_t cache_bytes(const sluice::Decoder& model, const Options& options) {
  sluice::CacheOptions held = options.cache;
  // As many entries as a window of them, or everything.
  if (options.choosing != Choosing::kNone && !keeps_all(options.choosing))
    held.policy = CachePolicy::kWindow;
  // Of so many channels, with the scale that they share.
  std::int64_t channels = 32;
  std::int64_t bytes = 64;
  switch (options.kv_type) {
    case KvType::kF32: bytes = 128; break;
    case KvType::kF16:
    case KvType::kBF16: break;
    case KvType::kInt8:
    case KvType::kFp8:
      channels = model.config().head_dim;
      bytes = channels + 4;
      break;
    case KvType::kQ8_0: bytes = 34; break;
    case KvType::kQ4_0: bytes = 18; break;
  }
  std::int64_t elements = support::cache_bytes(model, held, 1);
  if (options.choosing == Choosing::kLightTransfer) {
    // Every layer has the prompt's room and that of a window.
    held.policy = CachePolicy::kSinkWindow;
    elements += support::cache_bytes(model, held, 1);
  }
  return elements * bytes / channels;
}

void print_setting(const sluice::LoadedModel& model, const Options& options) {
  const sluice::CacheOptions& cache = options.cache;
  const sluice::DecoderConfig& config = model.decoder->config();
  const ModelFacts facts = facts_of(*model.decoder);
  const std::int64_t bytes = cache_bytes(*model.decoder, options);
  std::cerr << "model    " << model.path << ": " << config.family << ", "
            << format("%.1f M parameters, ", static_cast<double>(facts.parameters) * 1e-6)
            << megabytes(facts.bytes) << " (" << facts.types << "), trained on "
            << config.context_length << " tokens\n"
            << "cache    " << cache_text(options) << "; positions "
            << to_string(cache.position_rule) << ", keys " << key_form(options) << ", "
            << to_string(options.kv_type) << "; " << megabytes(bytes) << ", fixed\n"
            << "running  " << options.backend << ", " << options.threads
            << (options.threads == 1 ? " thread" : " threads") << ", reads " << cache.chunk()
            << " tokens at once";
  const sluice::SamplerOptions& s = options.sampler;
  if (options.mode != Mode::kPerplexity) {
    if (s.temperature == 0)
      std::cerr << "; greedy";
    else
      std::cerr << "; temperature " << s.temperature << ", top-k " << s.top_k << ", top-p "
                << s.top_p << ", min-p " << s.min_p << ", seed " << s.seed;
    if (s.repetition_penalty != 1)
      std::cerr << "; repeat penalty " << s.repetition_penalty << " over " << s.repetition_window;
  }
  std::cerr << '\n';
  for (const std::string& note : options.notes) std::cerr << "note     " << note << '\n';
  if (cache.policy == CachePolicy::kSinkWindow && cache.num_sink_tokens == 0)
    std::cerr << "warning  no sinks: text falls apart once the first tokens have left the window\n";
  if (cache.position_rule == sluice::PositionRule::kInText && cache.policy != CachePolicy::kFull)
    std::cerr << "note     positions in the text grow without end; the model was trained up to "
              << config.context_length << '\n';
  support::require_memory(bytes, cache_text(options));
}

void print_report(const Options& options, const Outcome& outcome) {
  const sluice::StreamMetrics::Report& m = outcome.metrics;
  std::cerr << "ended    " << to_string(outcome.ending) << "; " << cache_text(options)
            << "; positions " << to_string(options.cache.position_rule) << '\n'
            << "read     " << m.tokens_read << " tokens"
            << format(", %.1f tokens/s\n", m.prefill_tokens_per_s);
  if (outcome.read_latency.count > 0)
    std::cerr << "a token  " << latency_text(outcome.read_latency) << '\n';
  if (m.tokens_written > 0) {
    std::cerr << "wrote    " << m.tokens_written << " tokens"
              << format(", %.1f tokens/s\n", m.decode_tokens_per_s);
    if (m.ttft_from_last_input.count > 0)
      std::cerr << format("first    %.2f ms after the last input, %.2f ms after the first",
                          m.ttft_from_last_input.p50_ms, m.ttft_from_first_input.p50_ms)
                << (m.turns > 1 ? " (median of the rounds)\n" : "\n");
    if (m.inter_token.count > 0) std::cerr << "between  " << latency_text(m.inter_token) << '\n';
  }
  std::cerr << "memory   cache " << megabytes(m.cache_bytes) << ", resident "
            << megabytes(resident_bytes()) << ", at most " << megabytes(peak_resident_bytes())
            << '\n';
}

Json report_json(const sluice::LoadedModel& model, const Options& options, const Outcome& outcome) {
  const sluice::StreamMetrics::Report& m = outcome.metrics;
  Json report{{"kind", "report"},
              {"ended", to_string(outcome.ending)},
              {"tokens_read", m.tokens_read},
              {"tokens_written", m.tokens_written},
              {"turns", m.turns},
              {"ttft_from_last_input_ms", latency_json(m.ttft_from_last_input)},
              {"ttft_from_first_input_ms", latency_json(m.ttft_from_first_input)},
              {"inter_token_ms", latency_json(m.inter_token)},
              {"prefill_tokens_per_s", m.prefill_tokens_per_s},
              {"decode_tokens_per_s", m.decode_tokens_per_s},
              {"cache_bytes", m.cache_bytes},
              {"resident_bytes", resident_bytes()},
              {"peak_resident_bytes", peak_resident_bytes()},
              {"setting", setting_json(model, options)}};
  if (outcome.read_latency.count > 0) report["read_token_ms"] = latency_json(outcome.read_latency);
  return report;
}

Json perplexity_json(const sluice::LoadedModel& model, const Options& options,
                     const Outcome& outcome, const Scores& scores) {
  Json meta = report_json(model, options, outcome);
  meta.erase("kind");
  const sluice::CacheOptions& cache = options.cache;
  return {{"kind", "perplexity"},
          {"policy", policy_name(options)},
          {"sinks", cache.policy == CachePolicy::kSinkWindow ? cache.num_sink_tokens : 0},
          {"window", window_json(options)},
          {"tokens", scores.tokens},
          {"ppl", scores.perplexity},
          {"nll_mean", scores.nll_mean()},
          {"scored", scores.scored},
          {"score_every", options.score_every},
          {"meta", std::move(meta)}};
}

void write_latency_log(const sluice::LoadedModel& model, const Options& options,
                       const std::vector<StepBin>& bins) {
  Json parts = Json::array();
  for (const StepBin& bin : bins) {
    const auto us = [&](double q) {
      return static_cast<double>(bin.latency.quantile_ns(q)) * 1e-3;
    };
    parts.push_back({{"from", bin.from},
                     {"to", bin.to},
                     {"median_us", us(0.5)},
                     {"p99_us", us(0.99)},
                     {"p999_us", us(0.999)},
                     {"max_us", us(1)},
                     {"rss_bytes", bin.resident_bytes}});
  }
  const Json setting = setting_json(model, options);
  const Json log{{"kind", "endless"},
                 {"model", model.path},
                 {"policy", setting["policy"]},
                 {"sinks", setting["sinks"]},
                 {"window", setting["window"]},
                 {"bins", std::move(parts)},
                 {"meta", setting}};
  const std::string line = log.dump(-1, ' ', false, sluice::Json::error_handler_t::replace) + "\n";
  sluice::write_file_atomically(*options.latency_log, std::as_bytes(std::span<const char>(line)));
}

}  // namespace stream_text
