// SPDX-License-Identifier: MIT
/// One stream of a model: reads tokens, writes tokens, for ever, in memory that is fixed when the
/// session is made. Verbs: accept (read), step (write one token), result (what step wrote), reset,
/// save and restore.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/atomic_file.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/likelihood.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/sampler.hpp"

namespace sluice {

/// What a session is made of.
struct SessionOptions {
  CacheOptions cache;
  SamplerOptions sampler;
  int num_threads = 1;  ///< of the session's own team; not used when `team` is set
  /// A team shared with other sessions that never step at the same time; null: the session's own.
  std::shared_ptr<ThreadTeam> team;
  /// In which form activations meet quantised and bf16 weights: exact, or rounded and faster.
  Activations activations = Activations::kFloat32;
};

/// A stream over a shared model. Key and Value are the cache's element types.
///
/// Everything is allocated by the constructor; accept() and step() allocate nothing. One thread at
/// a time uses a session; different sessions of one model are independent.
template <RotaryElement Key = f16, RotaryElement Value = Key>
class Session {
 public:
  /// \throws Error(kConfig) naming the option that makes no sense (sinks, window, chunk, capacity,
  /// sampling, threads).
  Session(std::shared_ptr<const Decoder> model, const SessionOptions& options)
      : model_(std::move(model)),
        options_(options),
        team_(options.team ? options.team : std::make_shared<ThreadTeam>(options.num_threads)),
        cache_(model_->make_cache<Key, Value>(plan_cache(model_->config(), options.cache))),
        workspace_(*model_, cache_.max_chunk(), cache_.max_entries(), team_->size(),
                   DecoderWorkspace::kDefaultSegments, options.activations),
        sampler_(options.sampler, model_->config().vocab_size),
        logits_(static_cast<std::size_t>(model_->config().vocab_size)) {
    if (recomputes())
      history_ = Buffer<Token>(static_cast<std::size_t>(2 * options.cache.window_size));
    metrics_.set_cache_bytes(static_cast<std::int64_t>(cache_.bytes()));
  }

  const Decoder& model() const { return *model_; }
  const SessionOptions& options() const { return options_; }
  const KvCache<Key, Value>& cache() const { return cache_; }
  ThreadTeam& team() { return *team_; }
  StreamMetrics& metrics() { return metrics_; }
  const StreamMetrics& metrics() const { return metrics_; }
  /// Tokens of the stream so far, read and written, a pending one included. 64 bits: for ever.
  std::int64_t position() const { return position_; }

  /// Reads tokens, any number: longer than a chunk they are fed in chunks, which changes nothing in
  /// the result. Logits are formed when they are asked for (a recomputed window is rebuilt then).
  /// \throws Error(kShape) for a token outside the vocabulary, Error(kCapacity) when a full cache
  /// cannot hold them all. Nothing was read then.
  void accept(std::span<const Token> tokens) {
    accept_scored(tokens, MatrixView<float>(), [](std::size_t, double) {});
  }

  /// accept(), and calls visit(i, nll) with the negative log-likelihood of each tokens[i] given all
  /// that the stream held before it (in nats; nothing for the stream's very first token). scratch:
  /// [rows, vocab_size], rows >= 1, where logits are formed; without rows nothing is scored.
  template <class Visit>
  void accept_scored(std::span<const Token> tokens, MatrixView<float> scratch, Visit&& visit) {
    check(tokens);
    if (tokens.empty()) return;
    const std::int64_t begin = monotonic_ns();
    if (wrote_since_input_) metrics_.on_turn_end();
    wrote_since_input_ = false;
    metrics_.on_input(begin, static_cast<std::int64_t>(tokens.size()));
    feed_pending();
    for (std::size_t done = 0; done < tokens.size();) {
      const std::size_t count =
          std::min(tokens.size() - done, static_cast<std::size_t>(chunk_limit(scratch)));
      const std::span<const Token> chunk = tokens.subspan(done, count);
      if (scratch.rows > 0 && has_state_)
        visit(done, negative_log_likelihood(current_logits(), chunk[0]));
      feed(chunk);
      // Row r of the chunk predicts token r + 1; the last row predicts what comes next.
      if (scratch.rows > 0) {
        const auto inner = static_cast<std::int64_t>(count) - 1;
        for (std::int64_t first = 0; first < inner; first += scratch.rows) {
          const std::int64_t rows = std::min(scratch.rows, inner - first);
          const MatrixView<float> logits = scratch.middle_rows(0, rows);
          model_->logits(first, logits, workspace_, *team_);
          for (std::int64_t r = 0; r < rows; ++r) {
            const auto next = static_cast<std::size_t>(first + r + 1);
            visit(done + next,
                  negative_log_likelihood(
                      {logits.row(r), static_cast<std::size_t>(logits.cols)}, chunk[next]));
          }
        }
      }
      done += count;
    }
    for (const Token token : tokens) sampler_.accept(token);
    position_ += static_cast<std::int64_t>(tokens.size());
    metrics_.on_input_done(monotonic_ns() - begin, static_cast<std::int64_t>(tokens.size()));
  }

  /// Whether step() can write: something was read, and a full cache has room.
  bool is_ready() const {
    return has_state_ && (!pending_ || recomputes() || cache_.status(1) == CacheStatus::kOk);
  }

  /// Writes the next token: feeds the one written before, then samples. Empty when !is_ready().
  /// Throws and allocates nothing.
  std::optional<Token> step() {
    if (!is_ready()) return std::nullopt;
    feed_pending();
    const Token token = sampler_.sample(current_logits());
    sampler_.accept(token);
    pending_ = token;
    ++position_;
    wrote_since_input_ = true;
    metrics_.on_output(monotonic_ns());
    return token;
  }

  /// The token that the last step() wrote; empty after accept() or reset().
  std::optional<Token> result() const { return pending_; }

  /// Logits of the next token, all that was read and written considered. [vocab_size]
  /// Precondition: is_ready().
  std::span<const float> logits() {
    feed_pending();
    return current_logits();
  }

  /// Forgets the stream; the memory stays. Metrics stay too: they have a reset() of their own.
  void reset() {
    cache_.reset();
    sampler_.reset();
    metrics_.on_turn_end();
    pending_.reset();
    position_ = 0;
    history_size_ = 0;
    has_state_ = logits_fresh_ = window_stale_ = wrote_since_input_ = false;
  }

  /// Writes a snapshot that restore() continues from bit for bit: cache, sampler, logits. Survives a
  /// kill at any byte: the file is replaced as a whole. Allocates.
  /// \throws Error(kIo).
  void save(const std::string& path) {
    if (has_state_) logits();
    ByteWriter writer;
    writer.write(kSnapshotMagic);
    writer.write(kSnapshotVersion);
    write_identity(writer);
    writer.write(static_cast<std::uint8_t>(has_state_));
    writer.write(position_);
    writer.write(static_cast<std::uint8_t>(wrote_since_input_));
    sampler_.save(writer);
    cache_.save(writer);
    writer.write_span(std::span<const Token>(history_.data(), static_cast<std::size_t>(history_size_)));
    if (has_state_) writer.write_span(std::span<const float>(logits_.span()));
    writer.write_checksum();
    write_file_atomically(path, writer.bytes());
  }

  /// Continues a saved stream. The model, the cache options and the sampler's vocabulary must be
  /// those of the saved session. Allocates.
  /// \throws Error(kIo, kFormat) naming file, field, expected and found. A file that is damaged or
  /// of another session leaves this one as it was, or, if it lies beyond its checksum, reset.
  void restore(const std::string& path) {
    const std::vector<std::byte> bytes = read_file(path);
    ByteReader reader(bytes, path);
    reader.verify_checksum();
    reader.read_expected("magic", kSnapshotMagic);
    reader.read_expected("version", kSnapshotVersion);
    check_identity(reader);
    try {
      reset();
      const bool has_state = reader.template read<std::uint8_t>("has_state") != 0;
      const auto position = reader.template read<std::int64_t>("position");
      const bool wrote = reader.template read<std::uint8_t>("wrote") != 0;
      sampler_.restore(reader);
      cache_.restore(reader);
      const std::vector<Token> history = reader.template read_vector<Token>(
          "history", static_cast<std::uint64_t>(history_.size()));
      std::copy(history.begin(), history.end(), history_.data());
      history_size_ = static_cast<std::int64_t>(history.size());
      if (has_state) reader.template read_span<float>("logits", logits_.span());
      has_state_ = logits_fresh_ = has_state;
      position_ = position;
      wrote_since_input_ = wrote;
    } catch (...) {
      reset();
      throw;
    }
  }

 private:
  static constexpr std::uint64_t kSnapshotMagic = 0x314e5345'43554c53;  // "SLUCESN1"
  static constexpr std::uint32_t kSnapshotVersion = 1;

  bool recomputes() const { return options_.cache.policy == CachePolicy::kRecompute; }

  /// A recomputed window scores one token at a time: each has a window of its own.
  std::int64_t chunk_limit(const MatrixView<float>& scratch) const {
    if (recomputes()) return scratch.rows > 0 ? 1 : options_.cache.window_size;
    return cache_.max_chunk();
  }

  void check(std::span<const Token> tokens) const {
    const std::int64_t vocab = model_->config().vocab_size;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i] < 0 || tokens[i] >= vocab)
        throw Error(ErrorCode::kShape,
                    {"token outside the vocabulary", "Session::accept",
                     "tokens[" + std::to_string(i) + "]", "0 to " + std::to_string(vocab - 1),
                     std::to_string(tokens[i])});
    if (options_.cache.policy != CachePolicy::kFull) return;
    const std::int64_t coming =
        static_cast<std::int64_t>(tokens.size()) + (pending_.has_value() ? 1 : 0);
    const std::int64_t room = options_.cache.capacity - cache_.total();
    if (coming > room)
      throw Error(ErrorCode::kCapacity, {"the full cache cannot hold that many tokens",
                                         "Session::accept", "tokens",
                                         "at most " + std::to_string(room),
                                         std::to_string(coming)});
  }

  void feed_pending() {
    if (!pending_) return;
    const Token token = *pending_;
    feed({&token, 1});
    pending_.reset();
  }

  /// One chunk through the model.
  void feed(std::span<const Token> tokens) {
    has_state_ = true;
    logits_fresh_ = false;
    if (recomputes()) {
      remember(tokens);
      window_stale_ = true;
      return;
    }
    model_->forward(tokens, cache_, workspace_, *team_);
    cache_.commit();
  }

  /// Keeps the last window_size tokens: the buffer has twice the room and is moved down when full.
  void remember(std::span<const Token> tokens) {
    const std::int64_t window = options_.cache.window_size;
    for (const Token token : tokens) {
      if (history_size_ == 2 * window) {
        std::copy_n(history_.data() + window + 1, window - 1, history_.data());
        history_size_ = window - 1;
      }
      history_[static_cast<std::size_t>(history_size_++)] = token;
    }
  }

  /// Rebuilds keys and values of the window from its tokens, at positions from 0.
  void recompute() {
    const std::int64_t count = std::min(history_size_, options_.cache.window_size);
    const Token* tokens = history_.data() + (history_size_ - count);
    cache_.reset();
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t chunk = std::min(cache_.max_chunk(), count - done);
      model_->forward({tokens + done, static_cast<std::size_t>(chunk)}, cache_, workspace_, *team_);
      cache_.commit();
      done += chunk;
    }
    window_stale_ = false;
  }

  std::span<const float> current_logits() {
    if (!logits_fresh_) {
      if (window_stale_) recompute();
      const std::int64_t last = workspace_.hidden_states().rows - 1;
      model_->logits(last, {logits_.data(), 1, static_cast<std::int64_t>(logits_.size())},
                     workspace_, *team_);
      logits_fresh_ = true;
    }
    return logits_.span();
  }

  /// What tells one model and one set of options from another: extents, and a few weights.
  std::array<std::int64_t, 13> identity() const {
    const DecoderConfig& c = model_->config();
    const std::vector<float>& norm = model_->weights().output_norm;
    std::uint64_t hash = 0;
    for (const float value : norm) hash = hash * 1099511628211ULL + std::bit_cast<std::uint32_t>(value);
    const CacheOptions& cache = options_.cache;
    return {c.vocab_size, c.hidden_size, c.num_layers(), c.num_qo_heads, c.num_kv_heads,
            c.head_dim, static_cast<std::int64_t>(hash), static_cast<std::int64_t>(cache.policy),
            cache.num_sink_tokens, cache.window_size, cache.capacity, cache.chunk(),
            static_cast<std::int64_t>(cache.position_rule)};
  }
  static constexpr std::array<const char*, 13> kIdentityFields{
      "vocab_size", "hidden_size", "num_layers", "num_qo_heads", "num_kv_heads",
      "head_dim", "weights", "policy", "num_sink_tokens", "window_size", "capacity", "chunk_size",
      "position_rule"};

  void write_identity(ByteWriter& writer) const {
    for (const std::int64_t value : identity()) writer.write(value);
  }
  void check_identity(ByteReader& reader) const {
    const auto mine = identity();
    for (std::size_t i = 0; i < mine.size(); ++i) reader.read_expected(kIdentityFields[i], mine[i]);
  }

  std::shared_ptr<const Decoder> model_;
  SessionOptions options_;
  std::shared_ptr<ThreadTeam> team_;
  KvCache<Key, Value> cache_;
  DecoderWorkspace workspace_;
  Sampler sampler_;
  StreamMetrics metrics_;
  Buffer<float> logits_;   // [vocab_size]
  Buffer<Token> history_;  // [2 * window_size], kRecompute only
  std::int64_t history_size_ = 0;
  std::int64_t position_ = 0;
  std::optional<Token> pending_;   // written, not yet fed
  bool has_state_ = false;         // something was fed
  bool logits_fresh_ = false;      // logits_ belongs to the last fed token
  bool window_stale_ = false;      // kRecompute: history_ is ahead of the cache
  bool wrote_since_input_ = false;
};

}  // namespace sluice
