// SPDX-License-Identifier: MIT
/// A cache in two or four bits a channel: keys quantised per channel over groups of tokens, values
/// per token (KIVI, arXiv 2402.02750), the newest tokens as they are. It keeps everything, or sinks
/// and a window.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kivi_codes.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// How a KiviKvCache groups.
struct KiviConfig {
  std::int64_t group = 32;      ///< tokens of a group of keys, channels of a group of values
  std::int64_t residual = 128;  ///< newest tokens that stay as they are; a multiple of `group`
  /// Who is kept: a full cache, or sinks and a window with Eviction::kPerQuery and rotated keys.
  RetentionConfig retention{};
};

/// Keys and values of one stream, quantised as KIVI does: keys, rotated once, collect as Tail until
/// `residual` of them are committed, which are then quantised together; a value is quantised when
/// `residual` newer ones are committed. Sinks are never quantised. Which keys are, depends on the
/// number of tokens alone and not on how they were cut into chunks; uncommitted tokens never are,
/// so a roll-back leaves no trace.
///
/// Attention reads codes where they lie: scales of keys go into the query once a group of tokens,
/// scales of values into the weights, zeros are added once a group, so that a score differs from
/// that of a widened key by the rounding of float32 sums whose terms are as large as scale * code
/// and zero: by (head_dim + 4) 2^-24 sum |q| (|scale code| + |zero|) at most. Only construction
/// allocates: bytes(), and a block to quantise from. Protocol of a step: as KvCache. One thread at
/// a time; store() of different rows may run on several.
template <int kBits, RotaryElement Tail = f16>
class KiviKvCache {
 public:
  using KeyType = Tail;
  using ValueType = Tail;
  using Element = KiviElement<kBits, Tail>;
  using SegmentType = Segment<Element>;
  using Codes = KiviCodes<kBits>;
  /// Runs of the retention end where sinks, coded values, coded keys and the two rings do.
  static constexpr int kMaxSegments = Retention::kMaxSegments + 5;

  /// rotaries: [num_layers], each null or outliving the cache. \throws Error(kConfig, kShape)
  /// naming the extent that does not fit: groups that are no whole words or do not divide the
  /// channels, a residual that is no multiple of the group, a retention of another kind.
  KiviKvCache(const KvShape& shape, const KiviConfig& config,
              std::span<const Rotary* const> rotaries)
      : shape_(shape),
        config_(checked(shape, config, rotaries)),
        rotaries_(rotaries.begin(), rotaries.end()),
        retention_(config.retention) {
    const RetentionConfig& kept = config.retention;
    sinks_ = kept.num_sink_tokens;
    heads_ = shape.num_layers * shape.num_kv_heads;
    tail_ = config.residual + kept.max_chunk;
    // Everything that a query may see is coded or in the tail; groups leave as a whole.
    groups_ = (kept.capacity - sinks_ + config.group - 1) / config.group + 1;
    const std::int64_t coded = groups_ * config.group;
    sink_keys_ = Buffer<Tail>(size(heads_ * sinks_ * shape.head_dim));
    sink_values_ = Buffer<Tail>(size(heads_ * sinks_ * shape.value_dim));
    tail_keys_ = Buffer<Tail>(size(heads_ * tail_ * shape.head_dim));
    tail_values_ = Buffer<Tail>(size(heads_ * tail_ * shape.value_dim));
    key_words_ = Buffer<std::uint32_t>(size(heads_ * coded * shape.head_dim / Codes::kPerWord));
    value_words_ = Buffer<std::uint32_t>(size(heads_ * coded * shape.value_dim / Codes::kPerWord));
    key_scales_ = Buffer<f16>(size(heads_ * groups_ * 2 * shape.head_dim));
    value_scales_ = Buffer<f16>(size(heads_ * coded * value_scales()));
    block_ = Buffer<float>(size(config.group * std::max(shape.head_dim, shape.value_dim)));
  }

  const KvShape& shape() const { return shape_; }
  const KiviConfig& config() const { return config_; }
  std::span<const Retention> retentions() const { return {&retention_, 1}; }
  std::int64_t total() const { return retention_.total(); }
  std::int64_t committed() const { return retention_.committed(); }
  Position write_position(std::int64_t index) const { return retention_.write_position(index); }
  bool takes_positions() const { return false; }
  std::int64_t max_chunk() const { return retention_.config().max_chunk; }
  std::int64_t max_entries() const { return retention_.config().capacity; }
  std::int64_t room_behind(std::int64_t fed) const {
    return retention_.window() >= kUnlimitedWindow ? retention_.config().capacity - fed
                                                   : kUnlimitedWindow;
  }
  /// Bytes of codes, scales, sinks and tail.
  std::size_t bytes() const {
    std::size_t bytes = 0;
    each_buffer(*this, [&](const auto& buffer) { bytes += buffer.bytes(); });
    return bytes;
  }
  /// Tokens whose keys, or values, are quantised.
  std::int64_t coded_keys() const { return coded_keys_; }
  std::int64_t coded_values() const { return coded_values_; }
  /// Tokens that can be taken back: those that are not committed.
  std::int64_t max_truncate() const { return total() - committed(); }

  CacheStatus status(std::int64_t tokens) const {
    // The floats of what is not committed must leave those of the committed tail alone.
    return total() - committed() + tokens <= max_chunk() ? retention_.status(tokens)
                                                         : CacheStatus::kFull;
  }
  void append(std::int64_t tokens) { retention_.append(tokens); }
  /// Makes the appended tokens final, and quantises what the residual has no room for.
  void commit() {
    retention_.commit();
    const std::int64_t past_sinks = std::max<std::int64_t>(0, total() - sinks_);
    for (; coded_keys_ + config_.residual <= past_sinks; coded_keys_ += config_.residual)
      for (std::int64_t first = 0; first < config_.residual; first += config_.group)
        for (std::int64_t head = 0; head < heads_; ++head) code_keys(head, coded_keys_ + first);
    for (; coded_values_ + config_.residual < past_sinks; ++coded_values_)
      for (std::int64_t head = 0; head < heads_; ++head) code_value(head, coded_values_);
  }
  void rollback() { retention_.rollback(); }
  void reset() {
    retention_.reset();
    coded_keys_ = coded_values_ = 0;
  }

  /// Writes keys and values of the newest tokens; as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = rotaries_[size(layer)];
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const std::int64_t head = layer * shape_.num_kv_heads + h;
        const std::int64_t index = total() - keys.tokens + t;
        Tail* key = row<Tail>(sink_keys_, tail_keys_, head, index, shape_.head_dim);
        if (rotary != nullptr)
          rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, h), key);
        else
          convert(keys.head(t, h), shape_.head_dim, key);
        convert(values.head(t, h), shape_.value_dim,
                row<Tail>(sink_values_, tail_values_, head, index, shape_.value_dim));
      }
  }

  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t, int = 0) const {
    return {{}, retention_.window(), sinks_, retention_.reader_place()};
  }
  /// What the newest tokens see, in the runs in which it is stored: sinks, what is coded, what has
  /// coded keys alone, the tail.
  int segments(std::int64_t layer, std::int64_t queries, std::span<SegmentType, kMaxSegments> out,
               int = 0) const {
    std::array<SegmentRule, Retention::kMaxSegments> rules;
    const int count = retention_.rules(queries, rules);
    int written = 0;
    for (int i = 0; i < count; ++i) {
      const SegmentRule& rule = rules[size(i)];
      for (std::int64_t done = 0; done < rule.count;) {
        const std::int64_t token = rule.first_index + done - sinks_;
        SegmentType& run = out[size(written++)];
        run = SegmentType{};
        run.rule = rule;
        run.rule.first_index += done;
        run.rule.first_position += static_cast<Position>(done);
        run.rule.first_slot += done;
        run.rule.count = std::min(rule.count - done, run_length(token));
        run.rule.visible = std::clamp<std::int64_t>(rule.visible - done, 0, run.rule.count);
        done += run.rule.count;
        place(layer * shape_.num_kv_heads, token, run);
      }
    }
    return written;
  }

  /// A state that revert() returns to: a copy of everything.
  struct Checkpoint {
    Retention retention;
    std::int64_t coded_keys;
    std::int64_t coded_values;
    Buffer<std::byte> content;
    std::size_t bytes() const { return content.bytes(); }
    std::int64_t total() const { return retention.total(); }
    std::int64_t max_truncate() const { return 0; }
  };
  /// As KvCache's.
  Checkpoint make_checkpoint() const { return {retention_, 0, 0, Buffer<std::byte>(bytes())}; }
  void capture(Checkpoint& checkpoint) const {
    SLUICE_ASSERT(total() == committed());
    checkpoint.retention = retention_;
    checkpoint.coded_keys = coded_keys_;
    checkpoint.coded_values = coded_values_;
    std::byte* to = checkpoint.content.data();
    each_buffer(*this, [&](const auto& buffer) { to = detail::pack(buffer, to); });
  }
  void revert(const Checkpoint& checkpoint) {
    retention_ = checkpoint.retention;
    coded_keys_ = checkpoint.coded_keys;
    coded_values_ = checkpoint.coded_values;
    const std::byte* from = checkpoint.content.data();
    each_buffer(*this, [&](auto& buffer) { from = detail::unpack(from, buffer); });
  }
  void copy_from(const KiviKvCache& other) {
    retention_ = other.retention_;
    coded_keys_ = other.coded_keys_;
    coded_values_ = other.coded_values_;
    const auto copy = [](const auto& from, auto& to) {
      std::copy_n(from.data(), from.size(), to.data());
    };
    copy(other.sink_keys_, sink_keys_);
    copy(other.sink_values_, sink_values_);
    copy(other.tail_keys_, tail_keys_);
    copy(other.tail_values_, tail_values_);
    copy(other.key_words_, key_words_);
    copy(other.value_words_, value_words_);
    copy(other.key_scales_, key_scales_);
    copy(other.value_scales_, value_scales_);
  }
  KiviKvCache sibling() const { return KiviKvCache(shape_, config_, rotaries_); }

  /// Appends retention, codes and tail, all of the storage. Allocates in the writer.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    retention_.save(writer);
    each_buffer(*this, [&](const auto& buffer) { detail::put_elements(writer, buffer.span()); });
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field; the cache is then reset.
  void restore(ByteReader& reader) {
    reset();
    try {
      for (const auto& [field, value] : identity())
        reader.read_expected<std::int64_t>(field, value);
      retention_.restore(reader);
      each_buffer(*this, [&](auto& buffer) { detail::get_elements(reader, buffer.span()); });
    } catch (...) {
      reset();
      throw;
    }
    const std::int64_t past_sinks = std::max<std::int64_t>(0, total() - sinks_);
    coded_keys_ = past_sinks / config_.residual * config_.residual;
    coded_values_ = std::max<std::int64_t>(0, past_sinks - config_.residual);
  }

 private:
  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  static const KiviConfig& checked(const KvShape& shape, const KiviConfig& c,
                                   std::span<const Rotary* const> rotaries) {
    const auto need = [](bool fine, ErrorCode code, const char* field, const std::string& expected,
                         std::int64_t found) {
      if (!fine)
        throw Error(code, {"cache configuration does not fit", "KiviKvCache", field, expected,
                           std::to_string(found)});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 32;
    static_cast<void>(Retention(c.retention));
    need(shape.num_layers >= 1, ErrorCode::kShape, "num_layers", "at least 1", shape.num_layers);
    need(shape.num_kv_heads >= 1, ErrorCode::kShape, "num_kv_heads", "at least 1",
         shape.num_kv_heads);
    need(c.group >= 1 && c.group <= kMost && c.group % Codes::kPerWord == 0, ErrorCode::kConfig,
         "group", "a multiple of " + std::to_string(Codes::kPerWord), c.group);
    need(c.residual >= c.group && c.residual <= kMost && c.residual % c.group == 0,
         ErrorCode::kConfig, "residual", "a multiple of the group, " + std::to_string(c.group),
         c.residual);
    need(shape.head_dim >= 1 && shape.head_dim <= kMaxRotaryDim, ErrorCode::kShape, "head_dim",
         "1 to " + std::to_string(kMaxRotaryDim), shape.head_dim);
    need(shape.value_dim >= 1 && shape.value_dim % c.group == 0, ErrorCode::kShape, "value_dim",
         "a multiple of the group, " + std::to_string(c.group), shape.value_dim);
    need(c.retention.eviction == Eviction::kPerQuery, ErrorCode::kConfig, "eviction", "per query",
         static_cast<std::int64_t>(c.retention.eviction));
    need(c.retention.key_form == KeyForm::kRotated, ErrorCode::kConfig, "key_form", "rotated",
         static_cast<std::int64_t>(c.retention.key_form));
    need(static_cast<std::int64_t>(rotaries.size()) == shape.num_layers, ErrorCode::kShape,
         "rotaries", std::to_string(shape.num_layers) + " entries",
         static_cast<std::int64_t>(rotaries.size()));
    for (const Rotary* rotary : rotaries)
      need(rotary == nullptr || rotary->head_dim() == shape.head_dim, ErrorCode::kShape,
           "rotary head_dim", std::to_string(shape.head_dim),
           rotary == nullptr ? 0 : rotary->head_dim());
    return c;
  }

  std::array<std::pair<const char*, std::int64_t>, 10> identity() const {
    return {{{"layout", 2},
             {"bits", kBits},
             {"tail type", static_cast<std::int64_t>(KvRow<Tail>::kTag)},
             {"num_layers", shape_.num_layers},
             {"num_kv_heads", shape_.num_kv_heads},
             {"head_dim", shape_.head_dim},
             {"value_dim", shape_.value_dim},
             {"group", config_.group},
             {"residual", config_.residual},
             {"sinks", sinks_}}};
  }
  template <class Self, class Visit>
  static void each_buffer(Self& self, Visit&& visit) {
    visit(self.sink_keys_);
    visit(self.sink_values_);
    visit(self.tail_keys_);
    visit(self.tail_values_);
    visit(self.key_words_);
    visit(self.value_words_);
    visit(self.key_scales_);
    visit(self.value_scales_);
  }

  /// A token's row where it is not quantised. head: of all layers.
  template <class T, class Sinks, class Ring>
  T* row(Sinks& sinks, Ring& ring, std::int64_t head, std::int64_t index, std::int64_t dim) const {
    if (index < sinks_) return sinks.data() + (head * sinks_ + index) * dim;
    return ring.data() + (head * tail_ + (index - sinks_) % tail_) * dim;
  }
  std::int64_t coded_rows() const { return groups_ * config_.group; }
  std::int64_t value_scales() const { return 2 * shape_.value_dim / config_.group; }

  /// Tokens from `token` on, itself included, that are stored in one form and one run.
  std::int64_t run_length(std::int64_t token) const {
    if (token < 0) return -token;
    std::int64_t length = std::numeric_limits<std::int64_t>::max();
    const auto until = [&](std::int64_t end) {
      length = std::min(length, end - token);
    };
    if (token < coded_keys_) until(std::min(coded_keys_, next_multiple(token, coded_rows())));
    if (token < coded_values_) until(coded_values_);
    if (token >= coded_values_) until(next_multiple(token, tail_));
    return length;
  }
  static std::int64_t next_multiple(std::int64_t of, std::int64_t unit) {
    return of - of % unit + unit;
  }

  /// Says where the keys and values of a run that begins with `token` lie, from head `head` on.
  void place(std::int64_t head, std::int64_t token, SegmentType& run) const {
    const bool sink = token < 0;
    const std::int64_t rows = sink ? sinks_ : tail_;
    if (!sink && token < coded_keys_) {
      const std::int64_t dim = shape_.head_dim;
      const std::int64_t group = token / config_.group % groups_;
      run.key_token_stride = config_.group * dim / Codes::kPerWord;
      run.key_head_stride = groups_ * run.key_token_stride;
      run.key_scale_token_stride = 2 * dim;
      run.key_scale_head_stride = groups_ * 2 * dim;
      run.keys =
          as_element(key_words_.data() + head * run.key_head_stride + group * run.key_token_stride);
      run.key_scales = key_scales_.data() + (head * groups_ + group) * 2 * dim;
      run.key_first = token % config_.group;
    } else {
      run.key_token_stride = shape_.head_dim;
      run.key_head_stride = rows * shape_.head_dim;
      run.keys = as_element(
          row<const Tail>(sink_keys_, tail_keys_, head, sinks_ + token, shape_.head_dim));
    }
    if (!sink && token < coded_values_) {
      const std::int64_t at = value_row(head, token);
      run.value_token_stride = shape_.value_dim / Codes::kPerWord;
      run.value_head_stride = coded_rows() * run.value_token_stride;
      run.value_scale_token_stride = value_scales();
      run.value_scale_head_stride = coded_rows() * value_scales();
      run.values = as_element(value_words_.data() + at * run.value_token_stride);
      run.value_scales = value_scales_.data() + at * value_scales();
    } else {
      run.value_token_stride = shape_.value_dim;
      run.value_head_stride = rows * shape_.value_dim;
      run.values = as_element(
          row<const Tail>(sink_values_, tail_values_, head, sinks_ + token, shape_.value_dim));
    }
  }
  template <class T>
  static const Element* as_element(const T* from) {
    return static_cast<const Element*>(static_cast<const void*>(from));
  }
  // Tokens are counted behind the sinks from here on. Codes lie in a ring of whole groups.
  std::uint32_t* key_group(std::int64_t head, std::int64_t group) {
    return key_words_.data() +
           (head * groups_ + group % groups_) * config_.group * shape_.head_dim / Codes::kPerWord;
  }
  std::int64_t value_row(std::int64_t head, std::int64_t token) const {
    return head * coded_rows() + token % coded_rows();
  }

  /// Quantises the keys of a group of tokens: a channel's codes follow each other.
  void code_keys(std::int64_t head, std::int64_t first) {
    const std::int64_t dim = shape_.head_dim;
    for (std::int64_t t = 0; t < config_.group; ++t)
      convert(row<Tail>(sink_keys_, tail_keys_, head, sinks_ + first + t, dim), dim,
              block_.data() + t * dim);
    std::uint32_t* words = key_group(head, first / config_.group);
    f16* scales = key_scales_.data() + (head * groups_ + first / config_.group % groups_) * 2 * dim;
    for (std::int64_t d = 0; d < dim; ++d) {
      const GroupScale scale = Codes::quantise(block_.data() + d, config_.group, dim,
                                               words + d * config_.group / Codes::kPerWord);
      scales[d] = scale.scale;
      scales[dim + d] = scale.zero;
    }
  }
  void code_value(std::int64_t head, std::int64_t token) {
    const std::int64_t dim = shape_.value_dim;
    convert(row<Tail>(sink_values_, tail_values_, head, sinks_ + token, dim), dim, block_.data());
    const std::int64_t at = value_row(head, token);
    f16* scales = value_scales_.data() + at * value_scales();
    for (std::int64_t d = 0; d < dim; d += config_.group) {
      const GroupScale scale =
          Codes::quantise(block_.data() + d, config_.group, 1,
                          value_words_.data() + (at * dim + d) / Codes::kPerWord);
      *scales++ = scale.scale;
      *scales++ = scale.zero;
    }
  }

  template <class From, class To>
  static void convert(const From* from, std::int64_t count, To* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
  }

  KvShape shape_;
  KiviConfig config_;
  std::vector<const Rotary*> rotaries_;
  Retention retention_;
  std::int64_t sinks_ = 0;
  std::int64_t heads_ = 0;         // of all layers
  std::int64_t tail_ = 0;          // rows of the ring of unquantised tokens
  std::int64_t groups_ = 0;        // groups of codes of a head
  std::int64_t coded_keys_ = 0;    // tokens behind the sinks
  std::int64_t coded_values_ = 0;  // likewise
  Buffer<Tail> sink_keys_;         // [heads, sinks, head_dim]
  Buffer<Tail> sink_values_;
  Buffer<Tail> tail_keys_;  // [heads, tail, head_dim]
  Buffer<Tail> tail_values_;
  Buffer<std::uint32_t> key_words_;    // [heads, groups, head_dim, words of a group]
  Buffer<std::uint32_t> value_words_;  // [heads, tokens, words of a row]
  Buffer<f16> key_scales_;             // [heads, groups, 2, head_dim]
  Buffer<f16> value_scales_;           // [heads, tokens, groups of a row, 2]
  Buffer<float> block_;                // [group, channels], being quantised
};

}  // namespace sluice
