// SPDX-License-Identifier: MIT
#include "report.hpp"

#include <cmath>
#include <iostream>

#include "support/report_text.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

namespace {

using sluice::Json;
using support::format;

std::string number_text(double value, const char* pattern) {
  return std::isnan(value) ? "none" : format(pattern, value);
}

/// With nothing measured there is no latency, which 0 would claim.
Json latency_json(const sluice::LatencySummary& s) {
  Json json = support::latency_json(s);
  if (s.count == 0)
    for (auto& [name, value] : json.items())
      if (name != "count") value = nullptr;
  return json;
}

std::string policy_text(const Options& o) {
  const std::string first = ", first token after " + std::to_string(o.first) + " units";
  const std::string longest = std::to_string(o.longest) + " tokens";
  switch (o.policy) {
    case PolicyKind::kWaitK: return "wait-k, k = " + std::to_string(o.k);
    case PolicyKind::kSeparator: {
      std::string text = "separator";
      for (const std::string& separator : o.separators) text += " " + Json(separator).dump();
      return text + first;
    }
    case PolicyKind::kLocalAgreement: return "local-agreement, hypotheses of " + longest + first;
    case PolicyKind::kHoldN:
      return "hold-n, n = " + std::to_string(o.n) + ", hypotheses of " + longest + first;
    case PolicyKind::kAttention:
      return format("attention, alpha = %g, newest %lld tokens, layer %lld", o.alpha,
                    static_cast<long long>(o.newest), static_cast<long long>(o.layer)) +
             first;
    case PolicyKind::kSpeak:
      return "speak, threshold " + format("%g", o.threshold) + ", turns of " + longest + first;
    case PolicyKind::kBatch: return "batch";
  }
  return "unknown";
}

std::string layout_text(const Options& o) {
  std::string text(to_string(o.layout));
  if (o.layout == LayoutKind::kGroup) text += format(", phi = %g", o.phi);
  if (o.layout == LayoutKind::kGap) text += format(", delta = %g", o.gap);
  if (o.layout == LayoutKind::kBatch) text += ", target from " + std::to_string(o.source_tokens);
  return text;
}

Json policy_json(const Options& o) {
  Json policy{{"name", to_string(o.policy)}};
  switch (o.policy) {
    case PolicyKind::kWaitK: policy["k"] = o.k; break;
    case PolicyKind::kSeparator: policy["separators"] = o.separators; break;
    case PolicyKind::kHoldN: policy["n"] = o.n; [[fallthrough]];
    case PolicyKind::kLocalAgreement: policy["longest"] = o.longest; break;
    case PolicyKind::kAttention:
      policy["alpha"] = o.alpha;
      policy["newest"] = o.newest;
      policy["layer"] = o.layer;
      break;
    case PolicyKind::kSpeak:
      policy["threshold"] = o.threshold;
      policy["silence"] = o.silence;
      policy["longest"] = o.longest;
      break;
    case PolicyKind::kBatch: break;
  }
  if (o.policy != PolicyKind::kWaitK && o.policy != PolicyKind::kBatch) policy["first"] = o.first;
  return policy;
}

}  // namespace

void print_setting(const sluice::LoadedModel& model, const Options& options,
                   const sluice::DuplexOptions& duplex, std::int64_t cache_bytes) {
  const sluice::DecoderConfig& config = model.decoder->config();
  const support::ModelFacts facts = support::facts_of(*model.decoder);
  std::cerr << "model    " << model.path << ": " << config.family << ", "
            << format("%.1f M parameters, ", static_cast<double>(facts.parameters) * 1e-6)
            << support::megabytes(facts.bytes) << " (" << facts.types << ")\n"
            << "groups   " << groups_text(options) << "; positions "
            << to_string(options.source.position_rule) << "; " << support::megabytes(cache_bytes)
            << ", fixed\n"
            << "layout   " << layout_text(options) << '\n'
            << "policy   " << policy_text(options) << "; source units: " << to_string(options.unit)
            << "s, at most " << options.max_unit_tokens << " tokens\n"
            << "running  " << options.backend << ", ";
  if (options.shared_threads > 0)
    std::cerr << (duplex.concurrent ? "both sides" : "in turns") << " with one team of "
              << options.shared_threads << (options.shared_threads == 1 ? " thread" : " threads");
  else if (duplex.concurrent && options.backend != "cpu")
    std::cerr << "both sides at once";
  else if (duplex.concurrent)
    std::cerr << "source " << options.source_threads << " + target " << options.target_threads
              << (options.target_threads == 1 ? " thread" : " threads");
  else
    std::cerr << "in turns";
  const sluice::SamplerOptions& s = options.sampler;
  if (s.temperature == 0)
    std::cerr << "; greedy";
  else
    std::cerr << "; temperature " << s.temperature << ", top-k " << s.top_k << ", top-p " << s.top_p
              << ", min-p " << s.min_p << ", seed " << s.seed;
  if (s.repetition_penalty != 1)
    std::cerr << "; repeat penalty " << s.repetition_penalty << " over " << s.repetition_window;
  std::cerr << '\n';
  for (const std::string& note : options.notes) std::cerr << "note     " << note << '\n';
  if (options.policy != PolicyKind::kBatch || options.layout != LayoutKind::kBatch)
    std::cerr << "note     a model that was not trained to write while it reads, in this layout, "
                 "writes worse than it can\n";
}

void print_report(const Options& options, const Outcome& outcome, bool whole) {
  const sluice::DuplexReport& m = outcome.metrics;
  std::cerr << "ended    " << outcome.ending << "; " << m.units_read << " of " << m.units_fed
            << " units read, " << outcome.tokens << " tokens (" << outcome.words
            << " words) written";
  if (m.tokens_retracted > 0) std::cerr << ", " << m.tokens_retracted << " taken back";
  std::cerr << '\n';
  if (!whole) return;
  const auto row = [](const char* name, const std::string& text) {
    std::cerr << format("%-9s", name) << text << '\n';
  };
  const auto latency = [](const sluice::LatencySummary& s) {
    return s.count == 0 ? "none" : support::latency_text(s);
  };
  row("first", std::isnan(m.ttft_from_first_unit_ms)
                   ? "none"
                   : format("%.1f ms after the first source unit, %.1f ms after the last (below 0: "
                            "before it)",
                            m.ttft_from_first_unit_ms, m.ttft_from_last_unit_ms));
  row("waited", format("%lld units, %lld tokens seen before the first token",
                       static_cast<long long>(m.unit_wait), static_cast<long long>(m.token_wait)));
  row("between", latency(m.inter_token));
  row("answer", latency(m.unit_to_token) + (m.unit_to_token.count == 0 ? "" : ", unit to token"));
  row("lag", "AL " + number_text(outcome.lagging.al, "%.2f") + ", LAAL " +
                 number_text(outcome.lagging.laal, "%.2f") + " in " +
                 std::string(to_string(options.unit)) + "s of the source" +
                 (options.reference_words == 0 ? " (own length for a reference)" : ""));
  row("source", format("%lld tokens read, %.1f ms in the model",
                       static_cast<long long>(m.source_tokens), m.source_busy_ms));
  row("target", format("%lld model calls, %.1f ms in the model",
                       static_cast<long long>(m.target_forwards), m.target_busy_ms));
  row("overlap", format("%.1f ms in all; source over target work ", m.wall_ms) +
                     number_text(m.work_ratio(), "%.2f") + ", at most " +
                     number_text(sluice::overlap_bound(m.work_ratio()), "%.2f") +
                     " times as fast as in turns");
  row("memory", "groups " + support::megabytes(outcome.cache_bytes) + ", resident " +
                    support::megabytes(support::resident_bytes()) + ", at most " +
                    support::megabytes(support::peak_resident_bytes()));
}

Json report_json(const sluice::LoadedModel& model, const Options& options, const Outcome& outcome) {
  const sluice::DuplexReport& m = outcome.metrics;
  const support::ModelFacts facts = support::facts_of(*model.decoder);
  const sluice::SamplerOptions& s = options.sampler;
  const auto optional = [](auto value, bool given) {
    return given ? Json(value) : Json();
  };
  return {
      {"kind", "report"},
      {"ended", outcome.ending},
      {"ttft_from_first_unit_ms", m.ttft_from_first_unit_ms},
      {"ttft_from_last_unit_ms", m.ttft_from_last_unit_ms},
      {"unit_wait", m.unit_wait},
      {"token_wait", m.token_wait},
      {"inter_token_ms", latency_json(m.inter_token)},
      {"unit_to_token_ms", latency_json(m.unit_to_token)},
      {"units_fed", m.units_fed},
      {"source_units", outcome.source_units},
      {"source_tokens", m.source_tokens},
      {"units_read", m.units_read},
      {"tokens_written", m.tokens_written},
      {"tokens_retracted", m.tokens_retracted},
      {"tokens_final", outcome.tokens},
      {"words_final", outcome.words},
      {"target_forwards", m.target_forwards},
      {"source_busy_ms", m.source_busy_ms},
      {"target_busy_ms", m.target_busy_ms},
      {"wall_ms", m.wall_ms},
      {"work_ratio", m.work_ratio()},
      {"overlap_bound", sluice::overlap_bound(m.work_ratio())},
      {"al", outcome.lagging.al},
      {"laal", outcome.lagging.laal},
      {"reference_words", options.reference_words == 0 ? outcome.words : options.reference_words},
      {"cache_bytes", outcome.cache_bytes},
      {"resident_bytes", support::resident_bytes()},
      {"peak_resident_bytes", support::peak_resident_bytes()},
      {"setting",
       {{"model", model.path},
        {"family", model.decoder->config().family},
        {"parameters", facts.parameters},
        {"weight_types", facts.types},
        {"policy", policy_json(options)},
        {"layout", to_string(options.layout)},
        {"phi", optional(options.phi, options.layout == LayoutKind::kGroup)},
        {"delta", optional(options.gap, options.layout == LayoutKind::kGap)},
        {"layout_source_tokens",
         optional(options.source_tokens, options.layout == LayoutKind::kBatch)},
        {"groups", groups_text(options)},
        {"position", to_string(options.source.position_rule)},
        {"unit", to_string(options.unit)},
        {"max_unit_tokens", options.max_unit_tokens},
        {"words_per_minute", options.words_per_minute},
        {"backend", options.backend},
        {"concurrent", !options.sequential},
        {"source_threads", options.source_threads},
        {"target_threads", options.target_threads},
        {"shared_threads", options.shared_threads},
        {"max_tokens", options.max_tokens},
        {"temperature", s.temperature},
        {"top_k", s.top_k},
        {"top_p", s.top_p},
        {"min_p", s.min_p},
        {"repeat_penalty", s.repetition_penalty},
        {"repeat_last_n", s.repetition_window},
        {"seed", s.seed},
        {"command", options.command}}}};
}

}  // namespace duplex_text
