// SPDX-License-Identifier: MIT
/// Reads head maps from files: DuoAttention's gates (tab-separated values with a config.json beside
/// them), MoA's spans, and a JSON of our own. Needs sluice::io.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "sluice/cache/head_map.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/mapped_file.hpp"
#include "sluice/model/decoder_config.hpp"

namespace sluice {

namespace detail {

[[noreturn]] inline void bad_head_file(const std::string& path, const std::string& field,
                                       const std::string& expected, const std::string& found) {
  throw Error(ErrorCode::kFormat, {"the head map cannot be read", path, field, expected, found});
}

/// Models have some hundred layers of some hundred heads: a larger table is no head map.
inline constexpr std::int64_t kMostHeads = std::int64_t{1} << 20;

/// A number as text tools write it: 0.5, -9.25e-05.
inline double parse_gate(std::string_view text, const std::string& path, const std::string& at) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !std::isfinite(value))
    bad_head_file(path, at, "a finite decimal number", "'" + std::string(text.substr(0, 40)) + "'");
  return value;
}

/// A JSON array of arrays of numbers.
inline HeadTable json_table(const Json& root, std::string_view name, const std::string& path) {
  const std::string field(name);
  const char* const expected = "an array of equally long arrays of numbers";
  if (!root.is_object() || !root.contains(field) || !root[field].is_array() || root[field].empty())
    bad_head_file(path, field, expected, "something else");
  HeadTable table;
  for (const Json& line : root[field]) {
    if (!line.is_array() || line.empty()) bad_head_file(path, field, expected, "something else");
    const auto width = static_cast<std::int64_t>(line.size());
    if (table.num_layers++ == 0) table.num_heads = width;
    if (width != table.num_heads)
      bad_head_file(path, field, expected,
                    "rows of " + std::to_string(table.num_heads) + " and " + std::to_string(width));
    for (const Json& cell : line) {
      if (!cell.is_number()) bad_head_file(path, field, expected, "something else");
      table.values.push_back(cell.get<double>());
    }
  }
  return table;
}

}  // namespace detail

/// A tab-separated table of decimals, one row a layer: full_attention_heads.tsv of DuoAttention
/// and LServe. Blank lines at the end and carriage returns are allowed.
/// \throws Error(kIo), Error(kFormat) naming file, row and column.
inline HeadTable load_head_table(const std::string& path) {
  const MappedFile file(path);
  std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  HeadTable table;
  bool ended = false;
  while (!text.empty()) {
    const std::size_t newline = text.find('\n');
    std::string_view line = text.substr(0, newline);
    text.remove_prefix(newline == std::string_view::npos ? text.size() : newline + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.empty()) {
      ended = true;
      continue;
    }
    const std::string row = "row " + std::to_string(table.num_layers);
    if (ended) detail::bad_head_file(path, row, "no blank line between rows", "one");
    std::int64_t width = 0;
    for (bool more = true; more; ++width) {
      const std::size_t tab = line.find('\t');
      table.values.push_back(
          detail::parse_gate(line.substr(0, tab), path, row + ", column " + std::to_string(width)));
      more = tab != std::string_view::npos;
      if (more) line.remove_prefix(tab + 1);
      if (static_cast<std::int64_t>(table.values.size()) > detail::kMostHeads)
        detail::bad_head_file(path, row, "at most 2^20 values", "more");
    }
    if (table.num_layers++ == 0) table.num_heads = width;
    if (width != table.num_heads)
      detail::bad_head_file(path, row, std::to_string(table.num_heads) + " values",
                            std::to_string(width));
  }
  if (table.num_layers == 0) detail::bad_head_file(path, "rows", "at least 1", "0");
  return table;
}

/// What a DuoAttention map is made with besides its gates.
struct DuoAttentionOptions {
  double sparsity = 0.5;  ///< share of streaming heads
  /// Tokens that a streaming head keeps. Nothing: sink_size and recent_size of the config.json
  /// beside the gates (the sizes of the training).
  std::optional<std::int64_t> num_sink_tokens{};
  std::optional<std::int64_t> recent_size{};
  Eviction eviction = Eviction::kPerChunk;  ///< duo_attention_map
};

/// DuoAttention's map from a folder of its attn_patterns/ or from the .tsv in it.
/// \throws Error(kIo, kFormat, kShape, kConfig).
inline HeadMap load_duo_attention(const std::string& path,
                                  const DuoAttentionOptions& options = {}) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path given(path);
  const bool folder = fs::is_directory(given, ignored);
  const fs::path gates = folder ? given / "full_attention_heads.tsv" : given;
  const HeadTable table = load_head_table(gates.string());  // first: it is what was asked for
  std::int64_t sinks = options.num_sink_tokens.value_or(0);
  std::int64_t recent = options.recent_size.value_or(0);
  if (!options.num_sink_tokens || !options.recent_size) {
    const std::string config = (gates.parent_path() / "config.json").string();
    const Json root = read_json_file(config);
    if (!options.num_sink_tokens) sinks = json_int(root, "sink_size", config);
    if (!options.recent_size) recent = json_int(root, "recent_size", config);
  }
  return duo_attention_map(table, options.sparsity, sinks, recent, options.eviction);
}

/// MoA's moa_alpha_beta.json, {"alphas": [[..]], "betas": [[..]]} per layer and query head, sized
/// for `horizon` tokens (span_map). \throws Error(kIo, kFormat, kShape, kConfig).
inline HeadMap load_moa_spans(const std::string& path, std::int64_t num_kv_heads,
                              std::int64_t horizon, const SpanRule& rule = {}) {
  const Json root = read_json_file(path);
  return span_map(detail::json_table(root, "alphas", path), detail::json_table(root, "betas", path),
                  num_kv_heads, horizon, rule);
}

/// The library's own form, every retention written out:
///
///   {"sluice_head_map": 1, "eviction": "per query",
///    "layers": [{"full": true},
///               [{"full": true}, {"sinks": 4, "window": 256}],
///               {"sinks": 64, "alpha": 0, "beta": 0.125}]}
///
/// One entry a layer: an object for all its KV heads, or an array of one object a head. "window"
/// counts keys besides the sinks, the query's own included; alpha and beta make it
/// alpha + beta * horizon, sinks included, in whole blocks (span_entries). "eviction" may be absent
/// ("per query") or "per chunk" (then the query's own key is not counted).
/// \throws Error(kIo, kFormat, kShape, kConfig); Error(kConfig) also when a span needs a horizon
/// and none is given (0).
inline HeadMap load_head_map(const std::string& path, const DecoderConfig& model,
                             std::int64_t horizon = 0) {
  const Json root = read_json_file(path);
  if (json_int(root, "sluice_head_map", path) != 1)
    detail::bad_head_file(path, "sluice_head_map", "version 1",
                          std::to_string(json_int(root, "sluice_head_map", path)));
  const std::string eviction = json_string_or(root, "eviction", path, "per query");
  if (eviction != "per query" && eviction != "per chunk")
    detail::bad_head_file(path, "eviction", "\"per query\" or \"per chunk\"", eviction);
  const auto retention = [&](const Json& entry, const std::string& at) -> HeadRetention {
    if (!entry.is_object()) detail::bad_head_file(path, at, "an object", "something else");
    if (json_bool_or(entry, "full", path, false)) return HeadRetention::full();
    HeadRetention head;
    head.num_sink_tokens = json_int_or(entry, "sinks", path, 0);
    if (!json_has(entry, "beta") && !json_has(entry, "alpha")) {
      head.window_size = json_int(entry, "window", path);
      return head;
    }
    if (json_has(entry, "window")) detail::bad_head_file(path, at, "a window or a span", "both");
    if (horizon < 1)
      throw Error(ErrorCode::kConfig,
                  {"a span needs a horizon", path, at, "at least 1", std::to_string(horizon)});
    if (head.num_sink_tokens < 0 || head.num_sink_tokens > horizon)
      detail::bad_head_file(path, at + " sinks", "0 to the horizon, " + std::to_string(horizon),
                            std::to_string(head.num_sink_tokens));
    const SpanRule rule{.num_sink_tokens = head.num_sink_tokens,
                        .block = 64,
                        .smallest = head.num_sink_tokens + 64};
    head.window_size = span_entries(json_float_or(entry, "alpha", path, 0),
                                    json_float_or(entry, "beta", path, 0), horizon, rule) -
                       head.num_sink_tokens;
    return head;
  };
  const std::string layers_expected = std::to_string(model.num_layers()) + " entries";
  if (!json_has(root, "layers") || !root["layers"].is_array())
    detail::bad_head_file(path, "layers", layers_expected, "no array");
  const Json& layers = root["layers"];
  if (static_cast<std::int64_t>(layers.size()) != model.num_layers())
    detail::bad_head_file(path, "layers", layers_expected, std::to_string(layers.size()));
  std::vector<HeadRetention> heads;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string at = "layer " + std::to_string(l);
    if (!layers[l].is_array()) {
      heads.insert(heads.end(), static_cast<std::size_t>(model.num_kv_heads),
                   retention(layers[l], at));
      continue;
    }
    if (static_cast<std::int64_t>(layers[l].size()) != model.num_kv_heads)
      detail::bad_head_file(path, at, std::to_string(model.num_kv_heads) + " heads",
                            std::to_string(layers[l].size()));
    for (std::size_t head = 0; head < layers[l].size(); ++head)
      heads.push_back(retention(layers[l][head], at + ", head " + std::to_string(head)));
  }
  return HeadMap(model.num_layers(), model.num_kv_heads, std::move(heads),
                 eviction == "per chunk" ? Eviction::kPerChunk : Eviction::kPerQuery);
}

}  // namespace sluice
