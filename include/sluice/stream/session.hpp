// SPDX-License-Identifier: MIT
/// One stream of a model: reads tokens, writes tokens, for ever, in memory that is fixed when the
/// session is made. Verbs: accept (read), update (read a text that replaces the one before), step
/// (write one token, or what a draft guessed), result (what step wrote), checkpoint and
/// rollback_to, fork, reset, save and restore.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/attention/cluster_cache.hpp"
#include "sluice/attention/draft_tree.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/retrieval_cache.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/paged_kv_cache.hpp"
#include "sluice/core/atomic_file.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/checkpoint_places.hpp"
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
  /// A team shared with other sessions; null: the session's own. Of several that step at the same
  /// time one has its help at each moment, and the others go on alone.
  std::shared_ptr<ThreadTeam> team;
  /// In which form activations meet quantised and bf16 weights: exact, or rounded and faster.
  Activations activations = Activations::kFloat32;
  /// Whether chunks go through oneDNN, in programs compiled with it; what that rounds and allocates
  /// is said there. The GPU has no use for it.
  OneDnn onednn = OneDnn::kWhereFaster;
  /// The first tokens of the stream that the session remembers, for common_prefix() and update(): 4
  /// bytes each. 0: none.
  std::int64_t history = 0;
  /// Checkpoints held at once; Session::checkpoint_bytes() says what each costs.
  int checkpoints = 0;
  /// Reading takes a checkpoint by itself at the first end of a chunk that is this many tokens
  /// behind the newest one (or the beginning). 0: never.
  std::int64_t checkpoint_every = 0;
};

/// What Session::update() found and did. Everything was read if kept + computed is the number of
/// tokens given.
struct UpdateResult {
  std::int64_t common_prefix = 0;  ///< tokens that the old and the new text begin with
  std::int64_t kept = 0;           ///< of these, tokens whose keys and values stayed
  std::int64_t computed = 0;       ///< tokens that were fed
};

namespace detail {

/// What accept() and update() ask between chunks when they are given nothing.
struct NeverStop {
  bool operator()() const { return false; }
};

/// How many tokens `tokens` and a stream begin with in common. history: the stream's first tokens,
/// as far as they are remembered.
inline std::int64_t common_prefix(std::span<const Token> history, std::span<const Token> tokens) {
  return std::ranges::mismatch(history, tokens).in1 - history.begin();
}

/// \throws Error(kShape) naming the first token outside a vocabulary of `vocab` tokens.
inline void check_vocabulary(std::span<const Token> tokens, std::int64_t vocab, const char* where) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab)
      throw Error(ErrorCode::kShape,
                  {"token outside the vocabulary", where, "tokens[" + std::to_string(i) + "]",
                   "0 to " + std::to_string(vocab - 1), std::to_string(tokens[i])});
}
/// \throws Error(kCapacity) if `coming` tokens are more than a full cache has room for.
inline void check_room(std::int64_t coming, std::int64_t room, const char* where) {
  if (coming > room)
    throw Error(ErrorCode::kCapacity,
                {"the full cache cannot hold that many tokens", where, "tokens",
                 "at most " + std::to_string(room), std::to_string(coming)});
}
/// \throws Error(kOrder) unless node 0 is the token written last, Error(kShape) for a token outside
/// the vocabulary.
inline void check_draft(const DraftTree& draft, std::optional<Token> pending, std::int64_t vocab,
                        const char* where) {
  if (!pending || draft.size() == 0 || draft.token(0) != *pending)
    throw Error(ErrorCode::kOrder,
                {"the draft does not begin with the token written last", where, "node 0",
                 pending ? std::to_string(*pending) : "a token written by step()",
                 draft.size() == 0 ? "an empty draft" : std::to_string(draft.token(0))});
  check_vocabulary(draft.tokens(), vocab, where);
}
/// \throws Error(kCapacity) unless the draft fits.
inline void check_draft_room(const DraftTree& draft, CacheStatus status, std::int64_t max_chunk,
                             const char* where) {
  if (status != CacheStatus::kOk)
    throw Error(ErrorCode::kCapacity,
                {"the draft does not fit the chunk or the cache", where, "nodes",
                 "at most " + std::to_string(max_chunk) + ", and room in a full cache",
                 std::to_string(draft.size())});
}
/// Options that every backend checks alike. \throws Error(kConfig) naming the one out of range.
inline const SessionOptions& checked_session(const SessionOptions& options) {
  constexpr std::int64_t kMaxHistory = std::int64_t{1} << 40;
  const auto fail = [](const char* field, const char* expected, std::int64_t found) {
    throw Error(ErrorCode::kConfig,
                {"option out of range", "SessionOptions", field, expected, std::to_string(found)});
  };
  if (options.history < 0 || options.history > kMaxHistory)
    fail("history", "0 to 2^40", options.history);
  if (options.checkpoints < 0) fail("checkpoints", "0 or more", options.checkpoints);
  if (options.checkpoint_every < 0) fail("checkpoint_every", "0 or more", options.checkpoint_every);
  if (options.checkpoint_every > 0 && options.checkpoints == 0)
    fail("checkpoints", "at least 1, for checkpoint_every", options.checkpoints);
  return options;
}

// --- Snapshots -----------------------------------------------------------------------------------
// magic, version, what identifies model and options; has_state, position, wrote_since_input;
// sampler; cache; the tokens of a recomputed window; the tokens of the history; the hidden state
// behind the last token, final norm applied. All backends write and read these. One may add more
// behind them, which the others pass over. The checksum ends the file.

inline constexpr std::uint64_t kSnapshotMagic = 0x314e5345'43554c53;  // "SLUCESN1"
inline constexpr std::uint32_t kSnapshotVersion = 2;

/// What tells one model and one set of options from another: extents, and a few weights.
inline std::array<std::int64_t, 14> session_identity(const Decoder& model,
                                                     const SessionOptions& options) {
  const DecoderConfig& c = model.config();
  std::uint64_t hash = 0;
  for (const float value : model.weights().output_norm)
    hash = hash * 1099511628211ULL + std::bit_cast<std::uint32_t>(value);
  const CacheOptions& cache = options.cache;
  return {c.vocab_size,
          c.hidden_size,
          c.num_layers(),
          c.num_qo_heads,
          c.num_kv_heads,
          c.head_dim,
          static_cast<std::int64_t>(hash),
          static_cast<std::int64_t>(cache.policy),
          cache.num_sink_tokens,
          cache.window_size,
          cache.capacity,
          cache.chunk(),
          static_cast<std::int64_t>(cache.position_rule),
          static_cast<std::int64_t>(options.activations)};
}
/// Magic, version and identity.
inline void write_snapshot_begin(ByteWriter& writer, const Decoder& model,
                                 const SessionOptions& options) {
  writer.write(kSnapshotMagic);
  writer.write(kSnapshotVersion);
  for (const std::int64_t value : session_identity(model, options)) writer.write(value);
}
/// \throws Error(kFormat) naming what differs.
inline void expect_snapshot_begin(ByteReader& reader, const Decoder& model,
                                  const SessionOptions& options) {
  constexpr std::array<const char*, 14> kFields{
      "vocab_size", "hidden_size", "num_layers",    "num_qo_heads",    "num_kv_heads",
      "head_dim",   "weights",     "policy",        "num_sink_tokens", "window_size",
      "capacity",   "chunk_size",  "position_rule", "activations"};
  reader.read_expected("magic", kSnapshotMagic);
  reader.read_expected("version", kSnapshotVersion);
  const auto mine = session_identity(model, options);
  for (std::size_t i = 0; i < mine.size(); ++i) reader.read_expected(kFields[i], mine[i]);
}
/// Reads a count and that many tokens of a vocabulary into the front of a buffer.
/// \throws Error(kFormat) for more than fit, or a token outside the vocabulary.
inline std::int64_t read_tokens(ByteReader& reader, const char* field, std::int64_t vocab,
                                Buffer<Token>& into) {
  const std::size_t begin = reader.offset();
  const std::vector<Token> tokens =
      reader.template read_vector<Token>(field, static_cast<std::uint64_t>(into.size()));
  for (const Token token : tokens)
    if (token < 0 || token >= vocab)
      reader.fail_at(begin, "token outside the vocabulary", field, "below " + std::to_string(vocab),
                     std::to_string(token));
  std::copy(tokens.begin(), tokens.end(), into.data());
  return static_cast<std::int64_t>(tokens.size());
}
/// The first tokens of the stream, as far as they are remembered. \throws as read_tokens(), and
/// unless they are as many as a stream of `position` tokens has.
inline void read_history(ByteReader& reader, std::int64_t vocab, std::int64_t position,
                         Buffer<Token>& into) {
  const std::int64_t held = read_tokens(reader, "history", vocab, into);
  const std::int64_t expected = std::min(static_cast<std::int64_t>(into.size()), position);
  if (position < 0 || held != expected)
    throw Error(ErrorCode::kFormat, {"inconsistent snapshot", reader.source(), "history",
                                     std::to_string(expected), std::to_string(held)});
}

}  // namespace detail

/// A stream over a shared model. Key and Value are the cache's element types; Cache is a KvCache, a
/// PagedKvCache, whose pages sessions share, or one of the caches that look at queries:
///
/// | cache              | checkpoint, fork | save, restore | step(draft) | update() keeps    |
/// |--------------------|------------------|---------------|-------------|-------------------|
/// | KvCache            | yes              | yes           | yes         | what a window has |
/// | PagedKvCache       | yes              | yes           | yes         | the common prefix |
/// | ScoredKvCache      | yes (all rows)   | yes           | no          | a checkpoint      |
/// | PageSelectKvCache  | yes              | yes           | yes         | the common prefix |
/// | TokenSelectKvCache | yes              | yes           | yes         | the common prefix |
/// | ClusterSelectKvCache | yes            | yes           | yes         | the common prefix |
/// | LazyLayerKvCache   | yes (all rows)   | yes           | no          | nothing           |
/// | RetrievalKvCache   | no               | no            | no          | nothing           |
///
/// What a cache does not do throws Error(kUnsupported) that says why. Scored caches that score by
/// surprisal (SirLLM) are given that of every token, those read and those written; proxy queries
/// (StreamMem) are the caller's to feed, which needs Decoder::forward().
///
/// Layers that become lazy (LightTransfer) are chosen by a prompt. That is the first chunk that is
/// read, of up to max_prompt tokens, or with LazyLayerConfig::prompt_in_chunks all that is read
/// before end_prompt() or the first step(). What is kept depends on all of the prompt, so update()
/// reads a text anew.
///
/// Everything is allocated by the constructor; no verb but fork(), save() and restore() allocates.
/// One thread at a time uses a session; different sessions of one model are independent, except a
/// session and its forks, which share their scratch: one thread at a time uses all of them.
template <KvElement Key = f16, KvElement Value = Key, class Cache = KvCache<Key, Value>>
class Session {
 public:
  /// \throws Error(kConfig) naming the option that makes no sense (sinks, window, chunk, capacity,
  /// sampling, threads, history, checkpoints).
  Session(std::shared_ptr<const Decoder> model,
          const SessionOptions& options) requires(std::same_as<Cache, KvCache<Key, Value>>)
      : Session(
            model, options, nullptr,
            model->template make_cache<Key, Value>(plan_cache(model->config(), options.cache))) {}
  /// Over a cache that the caller made for this model. options.cache must say kFull, and describes
  /// it in snapshots. \throws Error(kConfig) as above, or for another policy.
  Session(std::shared_ptr<const Decoder> model, const SessionOptions& options,
          Cache&& cache) requires(!std::same_as<Cache, KvCache<Key, Value>>)
      : Session(std::move(model), options, nullptr, std::move(cache)) {
    if (options.cache.policy != CachePolicy::kFull)
      throw Error(ErrorCode::kConfig, {"a cache of the caller's keeps everything", "SessionOptions",
                                       "cache.policy", std::string(to_string(CachePolicy::kFull)),
                                       std::string(to_string(options.cache.policy))});
  }

  const Decoder& model() const { return *model_; }
  const SessionOptions& options() const { return options_; }
  const Cache& cache() const { return cache_; }
  ThreadTeam& team() { return *team_; }
  StreamMetrics& metrics() { return metrics_; }
  const StreamMetrics& metrics() const { return metrics_; }
  /// Tokens of the stream so far, read and written, a pending one included. 64 bits: for ever.
  std::int64_t position() const { return position_; }

  /// Reads tokens, any number: longer than a chunk they are fed in chunks, which changes nothing in
  /// the result. Logits are formed when they are asked for (a recomputed window is rebuilt then).
  /// It can be cancelled: asks stop() between chunks, before each but the first, and reads no
  /// further once it says true. Returns how many tokens were read: the stream is then what
  /// accept(tokens.first(read)) leaves, ready to go on in any direction.
  /// \throws Error(kShape) for a token outside the vocabulary, Error(kCapacity) when a full cache
  /// cannot hold them all. Nothing was read then.
  template <std::predicate Stop = detail::NeverStop>
  std::int64_t accept(std::span<const Token> tokens, Stop&& stop = Stop()) {
    check(tokens, 0, cache_.total(), pending_ ? 1 : 0);
    return read(
        tokens, MatrixView<float>(), [](std::size_t, double) {}, stop);
  }

  /// accept(), and calls visit(i, nll) with the negative log-likelihood of each tokens[i] given all
  /// that the stream held before it (in nats; nothing for the stream's very first token). scratch:
  /// [rows, vocab_size], rows >= 1, where logits are formed; without rows nothing is scored.
  template <class Visit>
  void accept_scored(std::span<const Token> tokens, MatrixView<float> scratch, Visit&& visit) {
    check(tokens, 0, cache_.total(), pending_ ? 1 : 0);
    read(tokens, scratch, visit, detail::NeverStop());
  }

  /// How many tokens the stream and `tokens` begin with in common, as far as the session remembers
  /// (SessionOptions::history). A session's tokens are text, so equal ids are equal inputs.
  std::int64_t common_prefix(std::span<const Token> tokens) const {
    return detail::common_prefix(
        history_.span().first(static_cast<std::size_t>(std::min(remembered(), position_))), tokens);
  }

  /// Makes `tokens` the stream: what reset() and accept(tokens) leave, to the rounding between one
  /// cut into chunks and another, without computing their common prefix again (the update mode of
  /// Stream2LLM, arXiv 2604.16395). Keeps what can be kept exactly: the whole prefix where the
  /// cache still holds all that it sees, else what the best checkpoint gives; the last token is
  /// always computed. stop() is asked as accept() does; after it said true the stream is
  /// tokens.first(kept + computed).
  /// Without SessionOptions::history nothing of the own stream is kept. A PagedKvCache that would
  /// keep nothing takes over pages of the same beginning that others of its store have computed.
  /// Checkpoints of more tokens than were kept
  /// expire. \throws what accept() throws: the stream is then as it was.
  template <std::predicate Stop = detail::NeverStop>
  UpdateResult update(std::span<const Token> tokens, Stop&& stop = Stop()) {
    UpdateResult result;
    result.common_prefix = common_prefix(tokens);
    const std::int64_t limit =
        std::min(result.common_prefix, static_cast<std::int64_t>(tokens.size()) - 1);
    const GoBack way = way_back(limit);
    check(tokens, way.kept, way.kept, 0);
    if (tokens.empty()) {
      reset();
      return result;
    }
    go_back(way);
    result.kept = way.kept;
    if constexpr (requires { cache_.adopt_prefix(tokens); })
      if (way.kept == 0) result.kept = cache_.adopt_prefix(tokens);
    const auto [kept, rest] = std::pair(tokens.first(static_cast<std::size_t>(result.kept)),
                                        tokens.subspan(static_cast<std::size_t>(result.kept)));
    sampler_.reset();
    position_ = 0;
    for (const Token token : kept) take(token);
    result.computed = read(
        rest, MatrixView<float>(), [](std::size_t, double) {}, stop);
    return result;
  }

  /// Whether step() can write: something was read, and a full cache has room.
  bool is_ready() const {
    return has_state_ && (!pending_ || recomputes() || cache_.status(1) == CacheStatus::kOk);
  }

  /// Writes the next token: feeds the one written before, then samples. Empty when !is_ready().
  /// Throws and allocates nothing.
  std::optional<Token> step() {
    if (!is_ready()) return std::nullopt;
    if constexpr (kHasPrompt) cache_.end_prompt();
    feed_pending();
    const Token token = sampler_.sample(current_logits());
    write(token);
    return token;
  }

  /// Writes several tokens at once: verifies a tree of guesses in one forward (speculative
  /// decoding, arXiv 2211.17192; trees as in Medusa, arXiv 2401.10774). Samples behind the root,
  /// goes on to the child that guessed the sample, and so on; what was not guessed is taken back
  /// without a trace. Returns the tokens written, one at least, valid until the next call: those
  /// that step() would have written one after the other, to rounding, because each is sampled from
  /// the model's own logits. The drafter is the caller's. Allocates nothing. \throws Error(kOrder)
  /// unless node 0 is the token that step() wrote last; Error(kShape) for a token outside the
  /// vocabulary; Error(kCapacity) if the nodes do not fit a chunk or the cache; Error(kUnsupported)
  /// with kRecompute, and for a tree with branches over raw keys. The stream is then as it was.
  std::span<const Token> step(const DraftTree& draft) {
    if constexpr (!requires(std::span<const std::int64_t> path) { cache_.keep_path(1, path); })
      unsupported("verify drafts", "what a rejected path has left there cannot be taken out");
    else
      return verify(draft);
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
    saved_.expire(0);
    pending_.reset();
    position_ = 0;
    window_tokens_ = 0;
    has_state_ = logits_fresh_ = window_stale_ = wrote_since_input_ = false;
  }

  /// Remembers this moment, sampler included, in one of SessionOptions::checkpoints places; the
  /// oldest gives way when there is no free one. Costs a copy of checkpoint_bytes() at most.
  /// Allocates nothing. \throws Error(kConfig) if the session was made without checkpoints.
  CheckpointId checkpoint() {
    if constexpr (!kHasCheckpoints)
      unsupported("go back", "frames that have gone to the host are not taken back");
    Saved* const place = &saved_.take();
    if constexpr (kHasCheckpoints) cache_.capture(place->cache);
    sampler_.capture(place->sampler);
    std::copy_n(hidden_.data(), hidden_.size(), place->hidden.data());
    std::copy_n(window_.data(), window_tokens_, place->window.data());
    place->window_tokens = window_tokens_;
    place->position = position_;
    place->pending = pending_;
    place->has_state = has_state_;
    place->wrote_since_input = wrote_since_input_;
    return {place->serial};
  }

  /// Returns to a checkpoint: everything that follows is, bit for bit, what followed then. Later
  /// checkpoints expire; this one stays. Allocates nothing. \throws Error(kOrder) for an id that
  /// was not given, or has expired: its place was taken, or the stream was taken back behind it
  /// (rollback_to, update, reset, restore). The stream is then as it was.
  void rollback_to(CheckpointId id) {
    const Saved* const found = &saved_.go_back(id);
    if constexpr (kHasCheckpoints) cache_.revert(found->cache);
    sampler_.revert(found->sampler);
    std::copy_n(found->hidden.data(), hidden_.size(), hidden_.data());
    std::copy_n(found->window.data(), found->window_tokens, window_.data());
    window_tokens_ = found->window_tokens;
    position_ = found->position;
    pending_ = found->pending;
    if (pending_) remember_at(position_ - 1, *pending_);  // another may have been there since
    has_state_ = found->has_state;
    wrote_since_input_ = found->wrote_since_input;
    logits_fresh_ = false;
    window_stale_ = recomputes() && has_state_;
  }
  /// Whether rollback_to() would find it.
  bool holds(CheckpointId id) const { return saved_.holds(id); }
  /// Gives a checkpoint's place back. Ids that are not held are passed over.
  void release(CheckpointId id) { saved_.release(id); }
  /// Bytes that each of SessionOptions::checkpoints costs, used or not: the rows of windowed layers
  /// (those of layers that keep everything stay in place), the sampler, one hidden state. 0 without
  /// checkpoints.
  std::size_t checkpoint_bytes() const {
    if (saved_.empty()) return 0;
    const Saved& saved = saved_.front();
    return sizeof(Saved) + saved.cache.bytes() + saved.sampler.bytes() + saved.hidden.bytes() +
           saved.window.bytes();
  }

  /// A second stream that continues from here, on its own from now on. Windows are copied; of a
  /// PagedKvCache the pages are shared until one of the two writes into one. Shares model, threads
  /// and scratch with this session. Allocates the new session, without checkpoints held.
  /// \throws Error(kCapacity) if a paged cache's store has no place for another table.
  Session fork() const {
    if constexpr (!kHasCheckpoints) {
      unsupported("fork", "frames on the host belong to one stream");
    } else {
      Session child = sibling();
      fork_into(child);
      return child;
    }
  }
  /// Makes `child`, a fork() of this session or of one it was forked from, continue from here.
  /// Allocates nothing. \throws Error(kConfig) if it has another model or other options.
  void fork_into(Session& child) const {
    if (child.model_ != model_ ||
        detail::session_identity(*child.model_, child.options_) !=
            detail::session_identity(*model_, options_) ||
        child.history_.size() != history_.size())
      throw Error(ErrorCode::kConfig,
                  {"a fork continues a session that was made alike", "Session::fork_into",
                   "options", "those of the session", ""});
    if constexpr (!kHasCheckpoints) {
      unsupported("fork", "frames on the host belong to one stream");
    } else {
      child.reset();
      child.cache_.copy_from(cache_);
    }
    child.sampler_.copy_from(sampler_);
    std::copy_n(hidden_.data(), hidden_.size(), child.hidden_.data());
    std::copy_n(window_.data(), window_tokens_, child.window_.data());
    std::copy_n(history_.data(), std::min(remembered(), position_), child.history_.data());
    child.window_tokens_ = window_tokens_;
    child.position_ = position_;
    child.pending_ = pending_;
    child.has_state_ = has_state_;
    child.wrote_since_input_ = wrote_since_input_;
    child.window_stale_ = recomputes() && has_state_;
  }
  /// Samples from another random sequence from now on: so that forks of one stream differ.
  void reseed(std::uint64_t seed) { sampler_.reseed(seed); }

  /// Writes a snapshot that restore() continues from bit for bit: cache, sampler, last hidden
  /// state, remembered tokens; no checkpoints. Survives a kill at any byte: the file is replaced as
  /// a whole. A session of another backend with the same options and element types continues from
  /// it too, to rounding. Feeds a pending token first. Allocates. \throws Error(kIo).
  void save(const std::string& path) {
    if constexpr (!requires(ByteWriter & into) { cache_.save(into); })
      unsupported("save", "its frames are on the host, in a store of this process");
    feed_pending();
    ByteWriter writer;
    detail::write_snapshot_begin(writer, *model_, options_);
    writer.write(static_cast<std::uint8_t>(has_state_));
    writer.write(position_);
    writer.write(static_cast<std::uint8_t>(wrote_since_input_));
    sampler_.save(writer);
    if constexpr (requires { cache_.save(writer); }) cache_.save(writer);
    writer.write_span(window_.span().first(static_cast<std::size_t>(window_tokens_)));
    writer.write_span(
        history_.span().first(static_cast<std::size_t>(std::min(remembered(), position_))));
    writer.write_span(std::span<const float>(hidden_.span()));
    writer.write_checksum();
    write_file_atomically(path, writer.bytes());
  }

  /// Continues a saved stream. The model, the cache options and the sampler's vocabulary must be
  /// those of the saved session. Allocates.
  /// \throws Error(kIo, kFormat) naming file, field, expected and found. A file that is damaged or
  /// of another session leaves this one as it was, or, if it lies beyond its checksum, reset.
  void restore(const std::string& path) {
    if constexpr (!requires(ByteReader & from) { cache_.restore(from); })
      unsupported("restore", "its frames are on the host, in a store of this process");
    const std::vector<std::byte> bytes = read_file(path);
    ByteReader reader(bytes, path);
    reader.verify_checksum();
    detail::expect_snapshot_begin(reader, *model_, options_);
    try {
      reset();
      const bool has_state = reader.template read<std::uint8_t>("has_state") != 0;
      const auto position = reader.template read<std::int64_t>("position");
      const bool wrote = reader.template read<std::uint8_t>("wrote") != 0;
      sampler_.restore(reader);
      if constexpr (requires { cache_.restore(reader); }) cache_.restore(reader);
      const std::int64_t vocab = model_->config().vocab_size;
      window_tokens_ = detail::read_tokens(reader, "window tokens", vocab, window_);
      detail::read_history(reader, vocab, position, history_);
      reader.template read_span<float>("hidden state", hidden_.span());
      has_state_ = has_state;
      window_stale_ = recomputes() && has_state;
      position_ = position;
      wrote_since_input_ = wrote;
    } catch (...) {
      reset();
      throw;
    }
  }

  /// Ends the prompt that says which layers become lazy (LazyLayerKvCache::end_prompt); step() does
  /// it by itself. \throws Error(kOrder) if nothing was read.
  void end_prompt() requires(requires(Cache& cache) { cache.end_prompt(); }) {
    cache_.end_prompt();
  }

  /// Turns to a question: what is read and written until end_question() sees the init tokens and
  /// the frames that answer it best, or those given (RetrievalKvCache::begin_question). Feeds a
  /// pending token first. \throws what RetrievalKvCache::begin_question throws.
  void begin_question(std::span<const std::int64_t> frames = {}) requires(requires(Cache& cache) {
    cache.end_question();
  }) {
    feed_pending();
    cache_.begin_question(frames);
    std::copy_n(hidden_.data(), hidden_.size(), stream_hidden_.data());
    stream_position_ = position_;
    stream_has_state_ = has_state_;
    has_state_ = logits_fresh_ = false;
  }
  /// Forgets question and answer: the stream goes on where it was, samples aside.
  void end_question() requires(requires(Cache& cache) { cache.end_question(); }) {
    if (!cache_.asking()) return;
    cache_.end_question();
    std::copy_n(stream_hidden_.data(), hidden_.size(), hidden_.data());
    position_ = stream_position_;
    has_state_ = stream_has_state_;
    pending_.reset();
    logits_fresh_ = false;
  }

 private:
  static constexpr bool kHasCheckpoints = requires { typename Cache::Checkpoint; };
  static constexpr bool kHasPrompt = requires(Cache & cache) { cache.end_prompt(); };
  static constexpr std::int64_t kSurprisalRows = 8;  // formed at once
  /// Stands for a checkpoint where there are none.
  struct NoCheckpoint {
    std::size_t bytes() const { return 0; }
    std::int64_t total() const { return 0; }
    std::int64_t max_truncate() const { return 0; }
  };
  template <class Of>
  static auto checkpoint_type() {
    if constexpr (requires { typename Of::Checkpoint; })
      return std::type_identity<typename Of::Checkpoint>();
    else
      return std::type_identity<NoCheckpoint>();
  }
  using CacheCheckpoint = typename decltype(checkpoint_type<Cache>())::type;

  [[noreturn]] static void unsupported(const char* what, const char* why) {
    throw Error(ErrorCode::kUnsupported, {std::string("a session over this cache cannot ") + what,
                                          "Session", "cache", "another cache", why});
  }
  std::int64_t max_truncate() const {
    if constexpr (requires { cache_.max_truncate(); })
      return cache_.max_truncate();
    else
      return 0;
  }

  /// A checkpoint's place.
  struct Saved {
    std::uint64_t serial = 0;  // 0: free
    CacheCheckpoint cache;
    Sampler::Checkpoint sampler;
    Buffer<float> hidden;
    Buffer<Token> window;
    std::int64_t window_tokens = 0;
    std::int64_t position = 0;
    std::optional<Token> pending{};
    bool has_state = false;
    bool wrote_since_input = false;

    /// Tokens in the cache.
    std::int64_t fed() const { return position - (pending ? 1 : 0); }
  };

  using GoBack = detail::WayBack<Saved>;

  Session(std::shared_ptr<const Decoder> model, const SessionOptions& options,
          std::shared_ptr<DecoderWorkspace> workspace, Cache&& cache)
      : model_(std::move(model)),
        options_(detail::checked_session(options)),
        team_(options.team ? options.team : std::make_shared<ThreadTeam>(options.num_threads)),
        cache_(std::move(cache)),
        workspace_(workspace
                       ? std::move(workspace)
                       : std::make_shared<DecoderWorkspace>(
                             *model_, cache_.max_chunk(), cache_.max_entries(), team_->size(),
                             std::max(DecoderWorkspace::kDefaultSegments, Cache::kMaxSegments),
                             options.activations, options.onednn)),
        sampler_(options.sampler, model_->config().vocab_size),
        logits_(static_cast<std::size_t>(model_->config().vocab_size)),
        hidden_(static_cast<std::size_t>(model_->config().hidden_size)),
        history_(static_cast<std::size_t>(options.history)),
        path_(static_cast<std::size_t>(cache_.max_chunk())),
        fed_(static_cast<std::size_t>(cache_.max_chunk())),
        written_(static_cast<std::size_t>(cache_.max_chunk())) {
    if constexpr (requires { cache_.policy().source; }) {
      if (cache_.policy().source == ScoreSource::kProxyQueries)
        throw Error(ErrorCode::kUnsupported,
                    {"proxy queries are fed and taken back by the caller", "Session", "cache",
                     "another score source, or Decoder::forward()", "proxy queries"});
      if (cache_.policy().source == ScoreSource::kGiven)
        surprisal_logits_ =
            Buffer<float>(static_cast<std::size_t>(kSurprisalRows * model_->config().vocab_size));
      surprisals_ = Buffer<float>(static_cast<std::size_t>(cache_.max_chunk()));
    }
    if (recomputes())
      window_ = Buffer<Token>(static_cast<std::size_t>(2 * options.cache.window_size));
    if constexpr (!kHasCheckpoints) {
      stream_hidden_ = Buffer<float>(hidden_.size());
      if (options.checkpoints > 0)
        unsupported("go back", "frames that have gone to the host are not taken back");
    }
    const auto empty_checkpoint = [&] {
      if constexpr (kHasCheckpoints)
        return cache_.make_checkpoint();
      else
        return CacheCheckpoint{};
    };
    for (int i = 0; i < options.checkpoints; ++i)
      saved_.add({.cache = empty_checkpoint(),
                  .sampler = sampler_.make_checkpoint(),
                  .hidden = Buffer<float>(hidden_.size()),
                  .window = Buffer<Token>(window_.size())});
    metrics_.set_cache_bytes(static_cast<std::int64_t>(cache_.bytes()));
  }

  /// An empty session made alike, which shares threads and scratch.
  Session sibling() const {
    SessionOptions options = options_;
    options.team = team_;
    if constexpr (std::same_as<Cache, KvCache<Key, Value>>)
      return Session(
          model_, options, workspace_,
          model_->template make_cache<Key, Value>(plan_cache(model_->config(), options.cache)));
    else
      return Session(model_, options, workspace_, cache_.sibling());
  }

  bool recomputes() const { return options_.cache.policy == CachePolicy::kRecompute; }

  /// A recomputed window scores one token at a time: each has a window of its own.
  std::int64_t chunk_limit(const MatrixView<float>& scratch) const {
    if (recomputes()) return scratch.rows > 0 ? 1 : options_.cache.window_size;
    if constexpr (requires { cache_.next_chunk(); })
      return cache_.next_chunk();
    else
      return cache_.max_chunk();
  }

  /// Whether `pending` tokens and tokens[first ..] can follow the first `fed` tokens of the cache.
  void check(std::span<const Token> tokens, std::int64_t first, std::int64_t fed,
             std::int64_t pending) const {
    detail::check_vocabulary(tokens, model_->config().vocab_size, "Session::accept");
    if (options_.cache.is_bounded())
      detail::check_room(static_cast<std::int64_t>(tokens.size()) - first + pending,
                         room_behind(fed), "Session::accept");
  }
  void check(const DraftTree& draft) const {
    const auto fail = [](ErrorCode code, const char* what, const char* field,
                         const std::string& expected, const std::string& found) {
      throw Error(code, {what, "Session::step", field, expected, found});
    };
    if (recomputes())
      fail(ErrorCode::kUnsupported, "a recomputed window cannot verify drafts", "cache.policy",
           "another policy", "recompute");
    detail::check_draft(draft, pending_, model_->config().vocab_size, "Session::step");
    detail::check_draft_room(draft, cache_.status(draft.size()), cache_.max_chunk(),
                             "Session::step");
    if (options_.cache.key_form == KeyForm::kRaw && !draft.is_path())
      fail(ErrorCode::kUnsupported, "raw keys are placed by slot, not by depth", "draft",
           "a single path, or rotated keys", "a tree with branches");
  }
  std::int64_t room_behind(std::int64_t fed) const {
    if constexpr (requires { cache_.room_behind(fed); })
      return cache_.room_behind(fed);
    else
      return options_.cache.capacity - fed;
  }

  /// The chunks of accept() and update(); returns how many tokens were read.
  template <class Visit, class Stop>
  std::int64_t read(std::span<const Token> tokens, MatrixView<float> scratch, Visit&& visit,
                    Stop&& stop) {
    if (tokens.empty()) return 0;
    const std::int64_t begin = monotonic_ns();
    if (wrote_since_input_) metrics_.on_turn_end();
    wrote_since_input_ = false;
    metrics_.on_input(begin, 0);
    feed_pending();
    std::size_t done = 0;
    while (done < tokens.size() && (done == 0 || !stop())) {
      const std::size_t count =
          std::min(tokens.size() - done, static_cast<std::size_t>(chunk_limit(scratch)));
      const std::span<const Token> chunk = tokens.subspan(done, count);
      if (scratch.rows > 0 && has_state_)
        visit(done, negative_log_likelihood(current_logits(), chunk[0]));
      if constexpr (requires { cache_.room_behind(0); })
        if (cache_.status(static_cast<std::int64_t>(count)) != CacheStatus::kOk)
          throw Error(ErrorCode::kCapacity,
                      {"the cache has no room for the chunk", "Session::accept", "chunk",
                       std::to_string(cache_.room_behind(cache_.total())), std::to_string(count)});
      feed(chunk);
      // Row r of the chunk predicts token r + 1; the last row predicts what comes next.
      if (scratch.rows > 0) {
        const auto inner = static_cast<std::int64_t>(count) - 1;
        for (std::int64_t first = 0; first < inner; first += scratch.rows) {
          const std::int64_t rows = std::min(scratch.rows, inner - first);
          const MatrixView<float> logits = scratch.middle_rows(0, rows);
          model_->logits(first, logits, *workspace_, *team_);
          for (std::int64_t r = 0; r < rows; ++r) {
            const auto next = static_cast<std::size_t>(first + r + 1);
            visit(done + next,
                  negative_log_likelihood({logits.row(r), static_cast<std::size_t>(logits.cols)},
                                          chunk[next]));
          }
        }
      }
      for (const Token token : chunk) take(token);
      metrics_.on_input(begin, static_cast<std::int64_t>(count));
      done += count;
      if (options_.checkpoint_every > 0 && position_ - saved_.newest() >= options_.checkpoint_every)
        checkpoint();
    }
    metrics_.on_input_done(monotonic_ns() - begin, static_cast<std::int64_t>(done));
    return static_cast<std::int64_t>(done);
  }

  /// How to keep the most of the first `limit` tokens.
  GoBack way_back(std::int64_t limit) const {
    if (!kHasCheckpoints || kHasPrompt || recomputes()) return {};
    return saved_.way_back(limit, cache_.total(), max_truncate());
  }
  void go_back(const GoBack& way) {
    const std::int64_t kept = way.kept;
    if (kept == 0) {
      reset();
      return;
    }
    if constexpr (kHasCheckpoints)
      if (way.from != nullptr) {
        cache_.revert(way.from->cache);
        std::copy_n(way.from->hidden.data(), hidden_.size(), hidden_.data());
      }
    if constexpr (requires { cache_.truncate(kept); })
      if (cache_.total() > kept) cache_.truncate(cache_.total() - kept);
    saved_.expire(kept);
    pending_.reset();
    position_ = kept;
    logits_fresh_ = false;
  }

  void feed_pending() {
    if (!pending_) return;
    const Token token = *pending_;
    feed({&token, 1});
    pending_.reset();
  }

  /// The stream has one token more.
  void take(Token token) {
    sampler_.accept(token);
    remember_at(position_++, token);
  }
  /// Takes a sampled token into the stream; it is fed when something follows.
  void write(Token token) {
    take(token);
    pending_ = token;
    wrote_since_input_ = true;
    metrics_.on_output(monotonic_ns());
  }

  /// One chunk through the model.
  void feed(std::span<const Token> tokens) {
    has_state_ = true;
    logits_fresh_ = false;
    if (recomputes()) {
      slide(tokens);
      window_stale_ = true;
      return;
    }
    const bool follows = cache_.total() > 0;
    model_->forward(tokens, cache_, *workspace_, *team_);
    if constexpr (requires { cache_.policy().source; })
      if (cache_.policy().source == ScoreSource::kGiven) give_surprisals(tokens, follows);
    if constexpr (requires { cache_.commit(*team_); })
      cache_.commit(*team_);
    else
      cache_.commit();
    name(tokens);
    keep_hidden(static_cast<std::int64_t>(tokens.size()) - 1);
  }

  /// Tells a cache how surprising each token of the last forward is, under the model's own logits.
  /// The stream's first token, which nothing predicts, gets the largest of its chunk.
  void give_surprisals(std::span<const Token> tokens, bool follows) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    const std::int64_t vocab = model_->config().vocab_size;
    float* const scores = surprisals_.data();
    scores[0] = 0;
    if (follows) {
      model_->logits(
          MatrixView<const float>(hidden_.data(), 1, static_cast<std::int64_t>(hidden_.size())),
          MatrixView<float>(surprisal_logits_.data(), 1, vocab), *workspace_, *team_);
      scores[0] = static_cast<float>(negative_log_likelihood(
          surprisal_logits_.span().first(static_cast<std::size_t>(vocab)), tokens[0]));
    }
    for (std::int64_t first = 0; first + 1 < count; first += kSurprisalRows) {
      const std::int64_t rows = std::min(kSurprisalRows, count - 1 - first);
      model_->logits(first, MatrixView<float>(surprisal_logits_.data(), rows, vocab), *workspace_,
                     *team_);
      for (std::int64_t r = 0; r < rows; ++r)
        scores[first + r + 1] = static_cast<float>(negative_log_likelihood(
            surprisal_logits_.span().subspan(static_cast<std::size_t>(r * vocab),
                                             static_cast<std::size_t>(vocab)),
            tokens[static_cast<std::size_t>(first + r + 1)]));
    }
    if (!follows) scores[0] = *std::max_element(scores, scores + count);
    cache_.give_scores(surprisals_.span().first(static_cast<std::size_t>(count)));
  }

  /// Tells a cache that shares pages by their tokens what was committed.
  void name(std::span<const Token> tokens) {
    if constexpr (requires { cache_.name_tokens(tokens); }) cache_.name_tokens(tokens);
  }

  /// Of the last forward.
  void keep_hidden(std::int64_t row) {
    std::copy_n(workspace_->hidden_states().row(row), hidden_.size(), hidden_.data());
  }

  std::int64_t remembered() const { return options_.history; }
  void remember_at(std::int64_t index, Token token) {
    if (index < remembered()) history_[static_cast<std::size_t>(index)] = token;
  }

  /// Keeps the last window_size tokens: the buffer has twice the room and is moved down when full.
  void slide(std::span<const Token> tokens) {
    const std::int64_t window = options_.cache.window_size;
    for (const Token token : tokens) {
      if (window_tokens_ == 2 * window) {
        std::copy_n(window_.data() + window + 1, window - 1, window_.data());
        window_tokens_ = window - 1;
      }
      window_[static_cast<std::size_t>(window_tokens_++)] = token;
    }
  }

  /// Rebuilds keys and values of the window from its tokens, at positions from 0.
  void recompute() {
    const std::int64_t count = std::min(window_tokens_, options_.cache.window_size);
    const Token* tokens = window_.data() + (window_tokens_ - count);
    cache_.reset();
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t chunk = std::min(cache_.max_chunk(), count - done);
      model_->forward({tokens + done, static_cast<std::size_t>(chunk)}, cache_, *workspace_,
                      *team_);
      cache_.commit();
      keep_hidden(chunk - 1);
      done += chunk;
    }
    window_stale_ = false;
  }

  std::span<const float> current_logits() {
    if (!logits_fresh_) {
      if (window_stale_) recompute();
      model_->logits(
          MatrixView<const float>(hidden_.data(), 1, static_cast<std::int64_t>(hidden_.size())),
          MatrixView<float>(logits_.data(), 1, static_cast<std::int64_t>(logits_.size())),
          *workspace_, *team_);
      logits_fresh_ = true;
    }
    return logits_.span();
  }

  std::span<const Token> verify(const DraftTree& draft) {
    check(draft);
    model_->forward(draft, cache_, *workspace_, *team_);
    std::int64_t accepted = 0;  // nodes
    for (std::int64_t node = 0; node != DraftTree::kNoNode;) {
      path_[static_cast<std::size_t>(accepted)] = node;
      keep_hidden(node);
      logits_fresh_ = false;
      const Token token = sampler_.sample(current_logits());
      written_[static_cast<std::size_t>(accepted++)] = token;
      write(token);
      node = draft.child(node, token);
    }
    cache_.keep_path(draft.size(), path_.span().first(static_cast<std::size_t>(accepted)));
    cache_.commit();
    for (std::int64_t i = 0; i < accepted; ++i)
      fed_[static_cast<std::size_t>(i)] = draft.token(path_[static_cast<std::size_t>(i)]);
    name(fed_.span().first(static_cast<std::size_t>(accepted)));
    return written_.span().first(static_cast<std::size_t>(accepted));
  }

  std::shared_ptr<const Decoder> model_;
  SessionOptions options_;
  std::shared_ptr<ThreadTeam> team_;
  Cache cache_;
  std::shared_ptr<DecoderWorkspace> workspace_;  // shared with forks
  Sampler sampler_;
  StreamMetrics metrics_;
  Buffer<float> logits_;            // [vocab_size]
  Buffer<float> hidden_;            // [hidden_size], of the last fed token
  Buffer<Token> history_;           // [SessionOptions::history], the stream's first tokens
  Buffer<std::int64_t> path_;       // [chunk], of a verified draft
  Buffer<Token> fed_;               // [chunk], the tokens of path_
  Buffer<Token> written_;           // [chunk], by step(draft)
  Buffer<Token> window_;            // [2 * window_size], kRecompute only
  Buffer<float> surprisals_;        // [chunk], caches that score by it
  Buffer<float> surprisal_logits_;  // [kSurprisalRows, vocab_size]
  Buffer<float> stream_hidden_;     // hidden_ behind an open question
  std::int64_t stream_position_ = 0;
  bool stream_has_state_ = false;
  std::int64_t window_tokens_ = 0;
  detail::CheckpointPlaces<Saved> saved_{"Session"};
  std::int64_t position_ = 0;
  std::optional<Token> pending_;  // written, not yet fed
  bool has_state_ = false;        // something was fed
  bool logits_fresh_ = false;     // logits_ belongs to the last fed token
  bool window_stale_ = false;     // kRecompute: window_ is ahead of the cache
  bool wrote_since_input_ = false;
};

/// A session over a cache that keeps what scores highest (Decoder::make_scored_cache).
template <RotaryElement Key = f16, RotaryElement Value = Key>
using ScoredSession = Session<Key, Value, ScoredKvCache<Key, Value>>;
/// A session that keeps everything and reads the pages that its queries pick.
template <RotaryElement Key = f16, RotaryElement Value = Key>
using PageSelectSession = Session<Key, Value, PageSelectKvCache<Key, Value>>;
/// A session that keeps everything and reads, in most layers, what scored highest in another.
template <RotaryElement Key = f16, RotaryElement Value = Key>
using TokenSelectSession = Session<Key, Value, TokenSelectKvCache<Key, Value>>;
/// A session that keeps everything and reads the clusters of keys that its queries need.
template <RotaryElement Key = f16, RotaryElement Value = Key>
using ClusterSelectSession = Session<Key, Value, ClusterSelectKvCache<Key, Value>>;
/// A session of which layers become lazy by its prompt.
template <RotaryElement Key = f16, RotaryElement Value = Key>
using LazyLayerSession = Session<Key, Value, LazyLayerKvCache<Key, Value>>;
/// A session whose frames go to the host and come back for questions.
template <RotaryElement Key = f16, RotaryElement Value = Key>
using RetrievalSession = Session<Key, Value, RetrievalKvCache<Key, Value>>;

/// A session over pages of a store that others share (Decoder::make_page_store).
template <RotaryElement Key = f16, RotaryElement Value = Key>
using PagedSession = Session<Key, Value, PagedKvCache<Key, Value>>;

}  // namespace sluice
