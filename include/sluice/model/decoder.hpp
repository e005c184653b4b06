// SPDX-License-Identifier: MIT
/// The decoder of the Llama family over a segment cache: embedding, layers of attention and gated
/// feed-forward, final norm, output projection. The model is immutable and shared; caches and
/// workspaces belong to streams.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/attention_mass.hpp"
#include "sluice/attention/cluster_cache.hpp"
#include "sluice/attention/draft_tree.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/attention/retrieval_cache.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/group.hpp"
#include "sluice/cache/kind_kv_cache.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/paged_kv_cache.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/nn/embedding.hpp"
#include "sluice/nn/linear.hpp"
#include "sluice/nn/norm.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Weights of one layer. Vectors are float32, empty where the family has none; matrices are views
/// into storage that DecoderWeights::storage keeps alive.
struct DecoderLayerWeights {
  std::vector<float> attention_norm;  ///< [hidden_size]
  WeightMatrix query;                 ///< [num_qo_heads * head_dim, hidden_size]
  WeightMatrix key;                   ///< [num_kv_heads * head_dim, hidden_size]
  WeightMatrix value;                 ///< [num_kv_heads * head_dim, hidden_size]
  WeightMatrix output;                ///< [hidden_size, num_qo_heads * head_dim]
  std::vector<float> query_bias;      ///< Qwen2
  std::vector<float> key_bias;
  std::vector<float> value_bias;
  std::vector<float> output_bias;
  std::vector<float> query_norm;              ///< [head_dim] (Qwen3, Gemma 3)
  std::vector<float> key_norm;                ///< [head_dim]
  std::vector<float> post_attention_norm;     ///< [hidden_size], before the residual sum (Gemma 3)
  std::vector<float> feed_forward_norm;       ///< [hidden_size]
  WeightMatrix gate;                          ///< [intermediate_size, hidden_size]
  WeightMatrix up;                            ///< [intermediate_size, hidden_size]
  WeightMatrix down;                          ///< [hidden_size, intermediate_size]
  std::vector<float> post_feed_forward_norm;  ///< [hidden_size] (Gemma 3)
};

/// All weights of a decoder.
struct DecoderWeights {
  WeightMatrix embedding;  ///< [vocab_size, hidden_size]
  std::vector<DecoderLayerWeights> layers;
  std::vector<float> output_norm;       ///< [hidden_size]
  WeightMatrix output;                  ///< [vocab_size, hidden_size]; the embedding where tied
  std::shared_ptr<const void> storage;  ///< keeps the matrices' bytes alive
};

/// What forward() is given: one chunk of a stream.
struct DecoderInput {
  std::span<const Token> tokens{};  ///< [T], in [0, vocab_size); not read where embeddings has rows
  /// [T, hidden_size]: inputs that are no tokens (frames of an encoder), already scaled.
  MatrixView<const float> embeddings{};
  /// [T] or empty: one position after the other, from the cache's KvCache::write_position().
  std::span<const Position3> positions{};

  std::int64_t count() const {
    return embeddings.rows > 0 ? embeddings.rows : static_cast<std::int64_t>(tokens.size());
  }
};

/// What forward() asks of a cache. KvCache is one; so are caches that keep what scores highest or
/// read pages that an index picks. A cache may also have
///   void begin_layer(layer)                     before a layer's rows are stored,
///   void select(layer, AttentionQuery)          before its segments are listed,
///   int late_segments(layer, count, out)        after attention over those: more segments, whose
///                                               part is merged (with one class of heads), and
///   bool observes(layer), void observe(const ObservedAttention<Key, Value>&)   after attention.
template <class Cache>
concept DecoderCache = requires(Cache& cache, const Cache& seen, std::int64_t count,
                                HeadsView<const float> rows, const float* rotation,
                                std::span<typename Cache::SegmentType, Cache::kMaxSegments> out) {
  typename Cache::KeyType;
  typename Cache::ValueType;
  { seen.total() } -> std::same_as<std::int64_t>;
  { seen.write_position(count) } -> std::same_as<Position>;
  { seen.takes_positions() } -> std::same_as<bool>;
  { seen.num_classes(count) } -> std::same_as<int>;
  { seen.head_class(count, 0) } -> std::same_as<HeadClassView>;
  { seen.segments(count, count, out, 0) } -> std::same_as<int>;
  cache.append(count);
  cache.store(count, rows, rows, rotation, count, count);
};

/// How much of each query head's attention falls on the newest tokens of another group: what
/// policies in the manner of EDAtt (arXiv 2212.07850) ask for. A pass of its own beside attention,
/// formed for chunks of one token.
struct MassProbe {
  std::int64_t layer = 0;
  std::int32_t group = 0;   ///< the group whose newest tokens are meant
  std::int64_t newest = 0;  ///< how many tokens; 0: off
};

/// A reader: who it is, and what it sees beside its own cache. Views must outlive the call.
template <class Key, class Value>
struct GroupReader {
  std::int32_t own_group = 0;
  std::span<const GroupView<Key, Value>> sees{};
  /// New tokens of the chunk see each other, later ones too (GroupCausalWindow).
  bool bidirectional = false;
  MassProbe probe{};
};

/// The reader that a cache's element types ask for.
template <class Cache>
using GroupReaderOf = GroupReader<typename Cache::KeyType, typename Cache::ValueType>;

/// Scratch of forward() for one stream, sized for a chunk and a cache; allocated at construction.
class DecoderWorkspace;

/// A model: configuration and weights, immutable after construction. Any number of threads may call
/// forward() with caches and workspaces of their own.
class Decoder {
 public:
  /// \throws Error(kConfig, kShape) naming the tensor whose extents do not fit the configuration.
  Decoder(DecoderConfig config, DecoderWeights weights, const std::string& where = "Decoder")
      : config_(std::move(config)), weights_(std::move(weights)) {
    config_.validate(where);
    for (const RotaryConfig& rotary : config_.rotaries) rotaries_.emplace_back(rotary);
    check_weights(where);
  }
  // Caches keep pointers to the rotations.
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  /// Segments that one call of forward() can see, all groups together.
  static constexpr int kMaxSegments = AttentionWorkspace<cpu>::kMaxSegments;

  const DecoderConfig& config() const { return config_; }
  const DecoderWeights& weights() const { return weights_; }
  const Rotary& rotary(std::int64_t layer) const {
    return rotaries_[static_cast<std::size_t>(
        config_.layers[static_cast<std::size_t>(layer)].rotary)];
  }

  KvShape kv_shape() const {
    return {config_.num_layers(), config_.num_kv_heads, config_.head_dim, config_.head_dim};
  }

  /// A cache for one stream of this model. The model must outlive it.
  /// \throws Error(kConfig) if the plan's retentions count from different positions; what KvCache
  /// throws.
  template <KvElement Key, KvElement Value = Key>
  KvCache<Key, Value> make_cache(const CachePlan& plan) const {
    for (const RetentionConfig& retention : plan.retentions)
      if (retention.origin != plan.retentions.front().origin)
        throw Error(
            ErrorCode::kConfig,
            {"layers count from different positions", "Decoder::make_cache", "origin",
             std::to_string(plan.retentions.front().origin), std::to_string(retention.origin)});
    return KvCache<Key, Value>(kv_shape(), plan.retentions, layer_configs(plan));
  }

  /// Bytes of keys and values of make_cache(), before it is made. \throws as make_cache().
  template <KvElement Key, KvElement Value = Key>
  std::size_t cache_bytes(const CachePlan& plan) const {
    return KvCache<Key, Value>::bytes_needed(kv_shape(), plan.retentions, layer_configs(plan));
  }

  /// A cache that keeps what scores highest, for one stream of this model. The model must outlive
  /// it. directions: as ScoredKvCache's. \throws what ScoredKvCache throws.
  template <RotaryElement Key, RotaryElement Value = Key>
  ScoredKvCache<Key, Value> make_scored_cache(const ScorePolicy& policy,
                                              std::span<const float> directions = {}) const {
    return ScoredKvCache<Key, Value>(kv_shape(), config_.num_qo_heads,
                                     static_cast<float>(config_.sm_scale), policy, rotaries(),
                                     directions);
  }

  /// A full cache of which steps read the pages that their queries pick, for one stream of this
  /// model. The model must outlive it. A workspace needs room for as many segments as pages are
  /// read. \throws what PageSelectKvCache throws.
  template <RotaryElement Key, RotaryElement Value = Key>
  PageSelectKvCache<Key, Value> make_page_select_cache(const PageSelection& selection,
                                                       std::int64_t capacity,
                                                       std::int64_t max_chunk) const {
    return PageSelectKvCache<Key, Value>(kv_shape(), config_.num_qo_heads, selection, rotaries(),
                                         capacity, max_chunk);
  }

  /// A full cache of which most layers read what scored highest in another layer, for one stream of
  /// this model. The model must outlive it. \throws what TokenSelectKvCache throws,
  /// Error(kUnsupported) for a model with trained windows.
  template <RotaryElement Key, RotaryElement Value = Key>
  TokenSelectKvCache<Key, Value> make_token_select_cache(const TokenSelection& selection,
                                                         std::int64_t capacity,
                                                         std::int64_t max_chunk) const {
    for (const DecoderLayerConfig& layer : config_.layers)
      if (layer.window_size < kUnlimitedWindow)
        throw Error(ErrorCode::kUnsupported,
                    {"layers with trained windows share no tokens with others",
                     "Decoder::make_token_select_cache", "window_size", "none",
                     std::to_string(layer.window_size)});
    return TokenSelectKvCache<Key, Value>(kv_shape(), config_.num_qo_heads,
                                          static_cast<float>(config_.sm_scale), selection,
                                          rotaries(), capacity, max_chunk);
  }

  /// A full cache of which steps read the clusters of keys that their queries score highest, for
  /// one stream of this model. The model must outlive it. \throws what ClusterSelectKvCache throws,
  /// Error(kUnsupported) for a model with trained windows.
  template <RotaryElement Key, RotaryElement Value = Key>
  ClusterSelectKvCache<Key, Value> make_cluster_select_cache(const ClusterSelection& selection,
                                                             std::int64_t capacity,
                                                             std::int64_t max_chunk) const {
    for (const DecoderLayerConfig& layer : config_.layers)
      if (layer.window_size < kUnlimitedWindow)
        throw Error(ErrorCode::kUnsupported,
                    {"clusters know no windows", "Decoder::make_cluster_select_cache",
                     "window_size", "none", std::to_string(layer.window_size)});
    return ClusterSelectKvCache<Key, Value>(kv_shape(), config_.num_qo_heads,
                                            static_cast<float>(config_.sm_scale), selection,
                                            rotaries(), capacity, max_chunk);
  }

  /// A cache whose frames go to the host and come back for questions, for one stream of this model.
  /// The model must outlive it. A workspace needs room for top_frames + 2 segments.
  /// \throws what RetrievalKvCache throws.
  template <RotaryElement Key, RotaryElement Value = Key>
  RetrievalKvCache<Key, Value> make_retrieval_cache(const RetrievalConfig& config) const {
    return RetrievalKvCache<Key, Value>(kv_shape(), config_.num_qo_heads, config, rotaries());
  }

  /// A cache that keeps text and frames by kind, for one conversation with this model about a video
  /// (StreamingVLM). The model must outlive it. A workspace needs room for its segments.
  /// \throws what KindKvCache throws, Error(kUnsupported) for a model with trained windows.
  template <RotaryElement Key, RotaryElement Value = Key>
  KindKvCache<Key, Value> make_kind_cache(const KindRetentionConfig& config) const {
    for (const DecoderLayerConfig& layer : config_.layers)
      if (layer.window_size < kUnlimitedWindow)
        throw Error(ErrorCode::kUnsupported,
                    {"layers with trained windows have no kinds", "Decoder::make_kind_cache",
                     "window_size", "none", std::to_string(layer.window_size)});
    return KindKvCache<Key, Value>(kv_shape(), config, rotaries());
  }

  /// A cache of which layers become lazy while a prompt is read, for one stream of this model. The
  /// model must outlive it. \throws what LazyLayerKvCache throws.
  template <RotaryElement Key, RotaryElement Value = Key>
  LazyLayerKvCache<Key, Value> make_lazy_layer_cache(const LazyLayerConfig& config) const {
    return LazyLayerKvCache<Key, Value>(kv_shape(), config_.num_qo_heads,
                                        static_cast<float>(config_.sm_scale), config, rotaries());
  }

  /// Pages for the streams of this model that share them, each with a PagedKvCache of its own. The
  /// model must outlive it. \throws what PageStore throws.
  template <RotaryElement Key, RotaryElement Value = Key>
  std::shared_ptr<PageStore<Key, Value>> make_page_store(std::int64_t num_pages,
                                                         std::int64_t page_size) const {
    return std::make_shared<PageStore<Key, Value>>(kv_shape(), rotaries(), num_pages, page_size);
  }

  /// A group of tokens of this model, for streams that read while they write. The model must
  /// outlive it. \throws Error(kConfig) as Group does.
  template <KvElement Key, KvElement Value = Key>
  std::unique_ptr<Group<Key, Value>> make_group(std::string name, std::int32_t id,
                                                const CachePlan& plan) const {
    return std::make_unique<Group<Key, Value>>(std::move(name), id, make_cache<Key, Value>(plan));
  }

  /// Feeds tokens and leaves the hidden states, final norm applied, in the workspace: row t belongs
  /// to tokens[t]. The cache gets the tokens' keys and values, uncommitted: the caller commits or
  /// rolls back. Allocates nothing.
  /// Preconditions: cache.status(tokens.size()) == kOk, tokens in [0, vocab_size), at most the
  /// workspace's chunk.
  template <DecoderCache Cache>
  void forward(std::span<const Token> tokens, Cache& cache, DecoderWorkspace& workspace,
               ThreadTeam& team) const {
    forward(DecoderInput{tokens}, cache, GroupReaderOf<Cache>{}, workspace, team);
  }

  /// The same for a reader among groups: the chunk is written to `cache` alone and sees, beside it,
  /// the first tokens of other groups' caches, in place. Writers of those may go on meanwhile.
  /// Preconditions: all caches are of this model; the workspace has room for their keys and
  /// segments; positions given explicitly need rotated keys in text positions
  /// (PositionRule::kInText, or a full cache): ranks are counted, not given.
  template <DecoderCache Cache>
  void forward(const DecoderInput& input, Cache& cache, const GroupReaderOf<Cache>& reader,
               DecoderWorkspace& workspace, ThreadTeam& team) const {
    SLUICE_ASSERT(input.positions.empty() || cache.takes_positions());
    run(input, cache, reader, workspace, team, [&](const CausalWindow& own) {
      return GroupCausalWindow{own, reader.own_group, reader.bidirectional};
    });
  }

  /// The same with a visibility of the caller's for whole sequences of several groups in one cache
  /// (group_mask.hpp). It takes the place of the causal window, trained windows of layers included.
  template <DecoderCache Cache, Visibility Mask>
  void forward(const DecoderInput& input, Cache& cache, const Mask& mask,
               DecoderWorkspace& workspace, ThreadTeam& team) const {
    SLUICE_ASSERT(input.positions.empty() || cache.takes_positions());
    run(input, cache, GroupReaderOf<Cache>{}, workspace, team,
        [&](const CausalWindow&) { return mask; });
  }

  /// Feeds a tree of drafted tokens (attention/draft_tree.hpp): row i of the hidden states belongs
  /// to node i, which stands `depth` behind the cache's tokens and sees them, its ancestors and
  /// itself, within each layer's window. The caller keeps the accepted path (KvCache::keep_path)
  /// and commits, or rolls back. Preconditions: those above for draft.size() tokens; unless the
  /// draft is a single path, keys are stored rotated (raw keys are placed by their slots, not by
  /// their depths).
  template <DecoderCache Cache>
  void forward(const DraftTree& draft, Cache& cache, DecoderWorkspace& workspace,
               ThreadTeam& team) const {
    const std::int64_t first = cache.total();
    const DecoderInput input{.tokens = draft.tokens(),
                             .positions = draft.positions(cache.write_position(first))};
    run(input, cache, GroupReaderOf<Cache>{}, workspace, team, [&](const CausalWindow& own) {
      return DraftMask{own, &draft, first};
    });
  }

  /// Logits of rows [first, first + logits.rows) of the last forward(). logits: [rows, vocab_size].
  void logits(std::int64_t first, MatrixView<float> logits, DecoderWorkspace& workspace,
              ThreadTeam& team) const;

  /// The same for hidden states that the caller kept. hidden: [rows, hidden_size], as
  /// DecoderWorkspace::hidden_states() gave them.
  void logits(MatrixView<const float> hidden, MatrixView<float> logits, DecoderWorkspace& workspace,
              ThreadTeam& team) const;

 private:
  // Rows of a chunk that a member of the team claims together for what goes row by row.
  static constexpr std::int64_t kTokensAtOnce = 16;

  /// Of each layer.
  std::vector<const Rotary*> rotaries() const {
    std::vector<const Rotary*> result;
    for (std::int64_t layer = 0; layer < config_.num_layers(); ++layer)
      result.push_back(&rotary(layer));
    return result;
  }

  /// How each layer uses a cache of the plan.
  std::vector<LayerCacheConfig> layer_configs(const CachePlan& plan) const {
    std::vector<LayerCacheConfig> layers;
    for (std::int64_t layer = 0; layer < config_.num_layers(); ++layer) {
      const auto l = static_cast<std::size_t>(layer);
      layers.push_back(
          {plan.retention_of_layer[l], &rotary(layer),
           plan.retention_of_head.empty() ? std::vector<int>{} : plan.retention_of_head[l]});
    }
    return layers;
  }

  /// make_mask(CausalWindow of a layer) gives the layer's visibility.
  template <class Cache, class MakeMask>
  void run(const DecoderInput& input, Cache& cache, const GroupReaderOf<Cache>& reader,
           DecoderWorkspace& workspace, ThreadTeam& team, MakeMask&& make_mask) const;

  /// The segments that the newest `count` tokens see in one class of a layer's heads, other groups'
  /// first.
  template <class Cache>
  static int gather(std::int64_t layer, int part, std::int64_t count, const Cache& cache,
                    const GroupReaderOf<Cache>& reader,
                    std::span<typename Cache::SegmentType> segments);

  void check_weights(const std::string& where) const;

  DecoderConfig config_;
  DecoderWeights weights_;
  std::vector<Rotary> rotaries_;
};

class DecoderWorkspace {
 public:
  /// Segments for which a workspace has room unless told otherwise.
  static constexpr int kDefaultSegments = 16;
  /// Distinct reader places (shift and ceiling) among one call's segments, at most.
  static constexpr int kMaxPlaces = 40;

  /// For chunks of up to `max_tokens` tokens that see up to `max_keys` entries in `max_segments`
  /// segments, those of other groups included (a group with sinks and a window has up to four).
  /// `activations`: the arithmetic of all products with weights, logits included. `onednn`: whether
  /// those of chunks go through oneDNN, in programs that have it.
  DecoderWorkspace(const Decoder& model, std::int64_t max_tokens, std::int64_t max_keys,
                   int team_size, int max_segments = kDefaultSegments,
                   Activations activations = Activations::kFloat32,
                   OneDnn onednn = OneDnn::kWhereFaster)
      : max_tokens_(max_tokens),
        hidden_(buffer(max_tokens, model.config().hidden_size)),
        normed_(buffer(max_tokens, model.config().hidden_size)),
        query_(buffer(max_tokens, model.config().num_qo_heads * model.config().head_dim)),
        key_(buffer(max_tokens, model.config().num_kv_heads * model.config().head_dim)),
        value_(buffer(max_tokens, model.config().num_kv_heads * model.config().head_dim)),
        attended_(buffer(max_tokens, model.config().num_qo_heads * model.config().head_dim)),
        gate_(buffer(max_tokens, std::max(model.config().intermediate_size,
                                          model.config().num_qo_heads * model.config().head_dim))),
        up_(buffer(max_tokens, model.config().intermediate_size)),
        linear_(widest(model.config()), team_size, activations,
                std::min(max_tokens, LinearWorkspace::kDefaultTokens), onednn,
                widths(model.config())),
        lse_(static_cast<std::size_t>(max_tokens * model.config().num_qo_heads)),
        late_lse_(static_cast<std::size_t>(max_tokens * model.config().num_qo_heads)),
        mass_(static_cast<std::size_t>(model.config().num_qo_heads)),
        segments_(sizeof(Segment<float>) * kSegmentSlots) {
    const DecoderConfig& config = model.config();
    const AttentionShape shape{.num_qo_heads = config.num_qo_heads,
                               .num_kv_heads = config.num_kv_heads,
                               .head_dim = config.head_dim,
                               .value_dim = config.head_dim,
                               .max_queries = max_tokens,
                               .max_keys = max_keys,
                               .max_segments = max_segments,
                               .max_places = std::min(max_segments, kMaxPlaces)};
    for (std::size_t r = 0; r < config.rotaries.size(); ++r) {
      const Rotary rotary(config.rotaries[r]);
      attention_.push_back(std::make_unique<AttentionWorkspace<cpu>>(&rotary, shape, team_size));
      write_rotation_.emplace_back(rotary, max_tokens);
    }
  }

  std::int64_t max_tokens() const { return max_tokens_; }
  /// Rows of the last forward(), final norm applied. [tokens, hidden_size]
  MatrixView<const float> hidden_states() const {
    const auto width = static_cast<std::int64_t>(normed_.size()) / max_tokens_;
    return {normed_.data(), tokens_, width};
  }
  /// What the last forward() with a MassProbe measured: the share of each query head.
  /// [num_qo_heads]
  std::span<const float> attention_mass() const { return mass_.span(); }

 private:
  friend class Decoder;

  // A cache writes behind those of other groups, and may be given room for as many as it ever has.
  static constexpr std::size_t kSegmentSlots = 2 * Decoder::kMaxSegments;

  /// Storage for the segments of a call: hundreds of them are too many for the stack.
  template <class SegmentType>
  std::span<SegmentType> segment_slots() {
    static_assert(std::is_trivially_copyable_v<SegmentType> &&
                  sizeof(SegmentType) <= sizeof(Segment<float>));
    return {reinterpret_cast<SegmentType*>(segments_.data()), kSegmentSlots};
  }

  static Buffer<float> buffer(std::int64_t rows, std::int64_t cols) {
    return Buffer<float>(static_cast<std::size_t>(rows * cols));
  }
  static std::array<std::int64_t, 3> widths(const DecoderConfig& config) {
    return {config.hidden_size, config.intermediate_size, config.num_qo_heads * config.head_dim};
  }
  static std::int64_t widest(const DecoderConfig& config) {
    return std::ranges::max(widths(config));
  }

  std::int64_t max_tokens_;
  std::int64_t tokens_ = 0;  // rows of the last forward
  Buffer<float> hidden_;     // [max_tokens, hidden_size], the residual stream
  Buffer<float> normed_;     // [max_tokens, hidden_size]
  Buffer<float> query_;      // [max_tokens, num_qo_heads, head_dim]
  Buffer<float> key_;        // [max_tokens, num_kv_heads, head_dim]
  Buffer<float> value_;      // [max_tokens, num_kv_heads, head_dim]
  Buffer<float> attended_;   // [max_tokens, num_qo_heads, head_dim]
  Buffer<float> gate_;       // [max_tokens, intermediate_size]; before it what attention got late
  Buffer<float> up_;         // [max_tokens, intermediate_size]
  LinearWorkspace linear_;
  Buffer<float> lse_;       // [max_tokens, num_qo_heads], of a layer that is probed or observed
  Buffer<float> late_lse_;  // [max_tokens, num_qo_heads], of segments that came late
  Buffer<float> mass_;      // [num_qo_heads]
  Buffer<std::byte> segments_;
  std::vector<std::unique_ptr<AttentionWorkspace<cpu>>> attention_;  // one per rotary
  std::vector<RotaryTable> write_rotation_;                          // one per rotary
};

namespace detail {
/// Whether a cache's segments are of rows, as a KvCache's: KIVI's codes can't be read beside other
/// groups, nor probed.
template <class Cache>
inline constexpr bool kHasRows =
    std::same_as<typename Cache::SegmentType,
                 Segment<typename Cache::KeyType, typename Cache::ValueType>>;
}  // namespace detail

template <class Cache, class MakeMask>
void Decoder::run(const DecoderInput& input, Cache& cache, const GroupReaderOf<Cache>& reader,
                  DecoderWorkspace& w, ThreadTeam& team, MakeMask&& make_mask) const {
  using SegmentType = typename Cache::SegmentType;
  const std::int64_t count = input.count();
  SLUICE_ASSERT(count >= 1 && count <= w.max_tokens_);
  SLUICE_ASSERT(input.positions.empty() ||
                static_cast<std::int64_t>(input.positions.size()) == count);
  const DecoderConfig& c = config_;
  const auto eps = static_cast<float>(c.norm_eps);
  const std::int64_t first_index = cache.total();
  const Position first_position = cache.write_position(first_index);
  cache.append(count);
  w.tokens_ = count;
  for (RotaryTable& rotation : w.write_rotation_) {
    if (input.positions.empty())
      rotation.fill_run(first_position, count);
    else
      rotation.fill(input.positions);
  }

  const MatrixView<float> hidden(w.hidden_.data(), count, c.hidden_size);
  const MatrixView<float> normed(w.normed_.data(), count, c.hidden_size);
  const MatrixView<float> query(w.query_.data(), count, c.num_qo_heads * c.head_dim);
  const MatrixView<float> key(w.key_.data(), count, c.num_kv_heads * c.head_dim);
  const MatrixView<float> value(w.value_.data(), count, c.num_kv_heads * c.head_dim);
  const MatrixView<float> attended(w.attended_.data(), count, c.num_qo_heads * c.head_dim);
  const MatrixView<float> gate(w.gate_.data(), count, c.intermediate_size);
  const MatrixView<float> up(w.up_.data(), count, c.intermediate_size);
  const auto norm = [&](MatrixView<const float> x, const std::vector<float>& weight,
                        MatrixView<float> y) {
    team.for_each_range(x.rows, kTokensAtOnce, [&](WorkRange range, int) {
      const std::int64_t rows = range.end - range.begin;
      rms_norm(x.middle_rows(range.begin, rows), weight.data(), eps,
               y.middle_rows(range.begin, rows), c.norm_adds_one);
    });
  };
  const auto bias = [](const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  };
  // y += W x, through the family's norm of the branch where it has one.
  const auto add_branch = [&](const WeightMatrix& weight, MatrixView<const float> x,
                              const float* offset, const std::vector<float>& post_norm) {
    if (post_norm.empty()) {
      linear_add(weight, x, offset, hidden, w.linear_, team, cpu{});
      return;
    }
    linear(weight, x, offset, normed, w.linear_, team, cpu{});
    norm(normed, post_norm, normed);
    for (std::int64_t i = 0; i < count * c.hidden_size; ++i) hidden.data[i] += normed.data[i];
  };

  if (input.embeddings.rows > 0)
    std::copy_n(input.embeddings.data, count * c.hidden_size, hidden.data);
  else
    embed(weights_.embedding, input.tokens, static_cast<float>(c.embedding_scale), hidden);
  for (std::int64_t l = 0; l < c.num_layers(); ++l) {
    const DecoderLayerWeights& layer = weights_.layers[static_cast<std::size_t>(l)];
    const DecoderLayerConfig& layer_config = c.layers[static_cast<std::size_t>(l)];
    const auto rotary_index = static_cast<std::size_t>(layer_config.rotary);

    norm(hidden, layer.attention_norm, normed);
    const std::array<LinearTask, 3> projections{
        LinearTask{layer.query, bias(layer.query_bias), query},
        LinearTask{layer.key, bias(layer.key_bias), key},
        LinearTask{layer.value, bias(layer.value_bias), value}};
    linear_many(projections, normed, w.linear_, team, cpu{});
    if (!layer.query_norm.empty()) {
      norm({query.data, count * c.num_qo_heads, c.head_dim}, layer.query_norm,
           {query.data, count * c.num_qo_heads, c.head_dim});
      norm({key.data, count * c.num_kv_heads, c.head_dim}, layer.key_norm,
           {key.data, count * c.num_kv_heads, c.head_dim});
    }
    const HeadsView<const float> keys(key.data, count, c.num_kv_heads, c.head_dim);
    const HeadsView<const float> values(value.data, count, c.num_kv_heads, c.head_dim);
    const float* rotation = w.write_rotation_[rotary_index].rows();
    if constexpr (requires { cache.begin_layer(l); }) cache.begin_layer(l);
    team.for_each_range(count, kTokensAtOnce, [&](WorkRange range, int) {
      cache.store(l, keys, values, rotation, range.begin, range.end);
    });

    const AttentionQuery rows{{query.data, count, c.num_qo_heads, c.head_dim},
                              first_index,
                              first_position,
                              input.positions.empty() ? nullptr : input.positions.data()};
    if constexpr (requires { cache.select(l, rows); }) cache.select(l, rows);
    for (int part = 0; part < cache.num_classes(l); ++part) {
      const std::span<SegmentType> segments = w.segment_slots<SegmentType>();
      const std::span<const SegmentType> seen(
          segments.data(),
          static_cast<std::size_t>(gather(l, part, count, cache, reader, segments)));
      const HeadClassView heads = cache.head_class(l, part);
      const auto mask = make_mask(CausalWindow{
          std::min(heads.window_size, layer_config.window_size), heads.num_sink_tokens});
      const AttentionVariant<std::remove_const_t<decltype(mask)>> variant{
          static_cast<float>(c.sm_scale), mask};
      AttentionQuery of_class = rows;
      of_class.kv_heads = heads.kv_heads;
      const bool probed = reader.probe.newest > 0 && reader.probe.layer == l && count == 1;
      constexpr bool waits = requires(std::span<SegmentType> out) {
        cache.late_segments(l, count, out);
      };
      bool observed = false;
      if constexpr (requires { cache.observes(l); }) observed = cache.observes(l);
      attend(of_class, seen, variant,
             HeadsView<float>(attended.data, count, c.num_qo_heads, c.head_dim),
             probed || observed || waits ? w.lse_.data() : nullptr, *w.attention_[rotary_index],
             team, cpu{});
      if constexpr (waits) {
        SLUICE_ASSERT(cache.num_classes(l) == 1);
        const auto late = static_cast<std::size_t>(cache.late_segments(l, count, segments));
        if (late > 0) {
          const HeadsView<float> part_out(w.gate_.data(), count, c.num_qo_heads, c.head_dim);
          attend(of_class, std::span<const SegmentType>(segments.data(), late), variant, part_out,
                 w.late_lse_.data(), *w.attention_[rotary_index], team, cpu{});
          merge_partials(HeadsView<float>(attended.data, count, c.num_qo_heads, c.head_dim),
                         w.lse_.data(),
                         HeadsView<const float>(w.gate_.data(), count, c.num_qo_heads, c.head_dim),
                         w.late_lse_.data());
        }
      }
      if constexpr (detail::kHasRows<Cache>) {
        if (probed)
          attention_mass(of_class, seen, variant.sm_scale, &rotary(l), c.num_kv_heads,
                         w.lse_.span(), reader.probe.group, reader.probe.newest, w.mass_.span());
      } else {
        SLUICE_ASSERT(!probed);
      }
      if constexpr (requires { cache.observes(l); })
        if (observed)
          cache.observe(ObservedAttention<typename Cache::KeyType, typename Cache::ValueType>{
              l, part, of_class, seen, w.lse_.data()});
    }
    add_branch(layer.output, attended, bias(layer.output_bias), layer.post_attention_norm);

    norm(hidden, layer.feed_forward_norm, normed);
    const std::array<LinearTask, 2> expand{LinearTask{layer.gate, nullptr, gate},
                                           LinearTask{layer.up, nullptr, up}};
    linear_many(expand, normed, w.linear_, team, cpu{});
    team.for_each_range(count, kTokensAtOnce, [&](WorkRange range, int) {
      const std::int64_t begin = range.begin * c.intermediate_size;
      gate_up(c.activation, gate.data + begin, up.data + begin, gate.data + begin,
              (range.end - range.begin) * c.intermediate_size);
    });
    add_branch(layer.down, gate, nullptr, layer.post_feed_forward_norm);
  }
  norm(hidden, weights_.output_norm, normed);
}

template <class Cache>
int Decoder::gather(std::int64_t layer, int part, std::int64_t count, const Cache& cache,
                    const GroupReaderOf<Cache>& reader,
                    std::span<typename Cache::SegmentType> segments) {
  using SegmentType = typename Cache::SegmentType;
  static_assert(Cache::kMaxSegments <= kMaxSegments);
  int written = 0;
  const auto take = [&](const auto& found, int more, std::int32_t group) {
    for (int i = 0; i < more; ++i) {
      SLUICE_ASSERT(written < kMaxSegments);
      SegmentType& segment = segments[static_cast<std::size_t>(written++)];
      segment = found[static_cast<std::size_t>(i)];
      segment.rule.group = group;
    }
  };
  if (!reader.sees.empty()) {
    if constexpr (detail::kHasRows<Cache>) {
      using Foreign = KvCache<typename Cache::KeyType, typename Cache::ValueType>;
      std::array<SegmentType, Foreign::kMaxSegments> found;
      const ReaderPlace own = cache.head_class(layer, part).place;
      for (const auto& view : reader.sees) {
        SLUICE_ASSERT(view.cache->num_classes(layer) == cache.num_classes(layer));
        take(found,
             view.cache->snapshot_segments(layer, view.visible,
                                           {own.shift + view.shift, own.ceiling + view.shift},
                                           found, part),
             view.group);
      }
    } else {
      SLUICE_ASSERT(reader.sees.empty());
    }
  }
  // The cache's own are written where they are read.
  constexpr auto kMost = static_cast<std::size_t>(Cache::kMaxSegments);
  const std::span<SegmentType, kMost> own =
      segments.subspan(static_cast<std::size_t>(written)).template first<kMost>();
  const int more = cache.segments(layer, count, own, part);
  for (int i = 0; i < more; ++i) own[static_cast<std::size_t>(i)].rule.group = reader.own_group;
  return written + more;
}

inline void Decoder::logits(std::int64_t first, MatrixView<float> logits, DecoderWorkspace& w,
                            ThreadTeam& team) const {
  SLUICE_ASSERT(first >= 0 && first + logits.rows <= w.tokens_);
  this->logits(w.hidden_states().middle_rows(first, logits.rows), logits, w, team);
}

inline void Decoder::logits(MatrixView<const float> hidden, MatrixView<float> logits,
                            DecoderWorkspace& w, ThreadTeam& team) const {
  linear(weights_.output, hidden, nullptr, logits, w.linear_, team, cpu{});
}

inline void Decoder::check_weights(const std::string& where) const {
  const auto fail = [&](const std::string& tensor, const std::string& expected,
                        const std::string& found) {
    throw Error(ErrorCode::kShape,
                {"tensor does not fit the model", where, tensor, expected, found});
  };
  const auto matrix = [&](const std::string& name, const WeightMatrix& m, std::int64_t rows,
                          std::int64_t cols) {
    if (m.rows != rows || m.cols != cols || m.data == nullptr)
      fail(name, "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
           "[" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]");
    if (cols % block_shape(m.type).values != 0)
      fail(name, "columns in whole blocks of " + std::to_string(block_shape(m.type).values),
           std::to_string(cols));
  };
  const auto vector = [&](const std::string& name, const std::vector<float>& v, std::int64_t size,
                          bool optional) {
    if (!(optional && v.empty()) && static_cast<std::int64_t>(v.size()) != size)
      fail(name, "[" + std::to_string(size) + "]", "[" + std::to_string(v.size()) + "]");
  };
  const DecoderConfig& c = config_;
  const std::int64_t q_size = c.num_qo_heads * c.head_dim;
  const std::int64_t kv_size = c.num_kv_heads * c.head_dim;
  matrix("embedding", weights_.embedding, c.vocab_size, c.hidden_size);
  matrix("output", weights_.output, c.vocab_size, c.hidden_size);
  vector("output_norm", weights_.output_norm, c.hidden_size, false);
  if (weights_.layers.size() != c.layers.size())
    fail("layers", std::to_string(c.layers.size()), std::to_string(weights_.layers.size()));
  for (std::size_t l = 0; l < weights_.layers.size(); ++l) {
    const DecoderLayerWeights& layer = weights_.layers[l];
    const std::string at = "layer " + std::to_string(l) + " ";
    vector(at + "attention_norm", layer.attention_norm, c.hidden_size, false);
    matrix(at + "query", layer.query, q_size, c.hidden_size);
    matrix(at + "key", layer.key, kv_size, c.hidden_size);
    matrix(at + "value", layer.value, kv_size, c.hidden_size);
    matrix(at + "output", layer.output, c.hidden_size, q_size);
    vector(at + "query_bias", layer.query_bias, q_size, true);
    vector(at + "key_bias", layer.key_bias, kv_size, true);
    vector(at + "value_bias", layer.value_bias, kv_size, true);
    vector(at + "output_bias", layer.output_bias, c.hidden_size, true);
    vector(at + "query_norm", layer.query_norm, c.head_dim, true);
    vector(at + "key_norm", layer.key_norm, c.head_dim, true);
    if (layer.query_norm.empty() != layer.key_norm.empty())
      fail(at + "key_norm", "query and key norms together", "one of them");
    vector(at + "post_attention_norm", layer.post_attention_norm, c.hidden_size, true);
    vector(at + "feed_forward_norm", layer.feed_forward_norm, c.hidden_size, false);
    matrix(at + "gate", layer.gate, c.intermediate_size, c.hidden_size);
    matrix(at + "up", layer.up, c.intermediate_size, c.hidden_size);
    matrix(at + "down", layer.down, c.hidden_size, c.intermediate_size);
    vector(at + "post_feed_forward_norm", layer.post_feed_forward_norm, c.hidden_size, true);
    const int rotary = c.layers[l].rotary;
    if (rotary < 0 || rotary >= static_cast<int>(rotaries_.size()))
      fail(at + "rotary", "below " + std::to_string(rotaries_.size()), std::to_string(rotary));
    if (rotaries_[static_cast<std::size_t>(rotary)].head_dim() != c.head_dim)
      fail(at + "rotary", "head_dim " + std::to_string(c.head_dim),
           std::to_string(rotaries_[static_cast<std::size_t>(rotary)].head_dim()));
  }
}

}  // namespace sluice
