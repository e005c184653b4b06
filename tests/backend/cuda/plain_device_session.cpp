// SPDX-License-Identifier: MIT
/// What device_session.hpp and device_duplex.hpp declare, as plain float64 loops on the host: with
/// it the host's half of a session or a duplex on a GPU is tested where there is no GPU. Rows lie
/// in the slots that the device's lie in, so what has been written over is gone here too. It says
/// that there are two devices.
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <sluice/backend/cuda/device_duplex.hpp>
#include <sluice/backend/cuda/device_session.hpp>
#include <sluice/core/error.hpp>

#include "backend/cuda/quantised_sample.hpp"

namespace sluice {

namespace {

using Row = std::vector<double>;

template <class T>
Row widened(std::span<const T> x, std::int64_t count, const char* name) {
  if (static_cast<std::int64_t>(x.size()) != count)
    throw Error(ErrorCode::kShape, {"content does not fit", "plain device", name,
                                    std::to_string(count), std::to_string(x.size())});
  Row result;
  for (const T value : x) result.push_back(static_cast<double>(static_cast<float>(value)));
  return result;
}

/// A quantised matrix, its rows from `first` on, every `step`th.
Row unpacked(const CudaPackedRows& packed, std::int64_t rows, std::int64_t cols, const char* name,
             std::int64_t first = 0, std::int64_t step = 1) {
  if (packed.rows != rows ||
      static_cast<std::int64_t>(packed.content.size()) != quantised_bytes(packed.type, rows, cols))
    throw Error(ErrorCode::kShape, {"content does not fit", "plain device", name,
                                    std::to_string(rows), std::to_string(packed.rows)});
  const std::vector<float> values = sluice_test::unpacked(
      packed.type, {packed.content.begin(), packed.content.end()}, rows, cols);
  Row result;
  for (std::int64_t r = first; r < rows; r += step)
    result.insert(result.end(), values.begin() + r * cols, values.begin() + (r + 1) * cols);
  return result;
}

struct PlainLayer {
  Row attention_norm, query, key, value, output, feed_forward_norm, gate, up, down;
};

Row product(const Row& matrix, const Row& x) {
  Row y(matrix.size() / x.size());
  for (std::size_t r = 0; r < y.size(); ++r)
    for (std::size_t c = 0; c < x.size(); ++c) y[r] += matrix[r * x.size() + c] * x[c];
  return y;
}
Row normed(const Row& x, const Row& weight, double eps) {
  double square = 0;
  for (const double value : x) square += value * value;
  const double scale = 1 / std::sqrt(square / static_cast<double>(x.size()) + eps);
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * weight[i];
  return y;
}
void add(Row& x, const Row& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}
/// A head rotated to a position; channels beyond the pairs stay.
Row rotated(Row x, const CudaRotation& rotation, double position) {
  const std::size_t pairs = rotation.frequencies.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    const std::size_t a = rotation.interleaved ? 2 * i : i;
    const std::size_t b = rotation.interleaved ? 2 * i + 1 : i + pairs;
    const double c = rotation.attention_factor * std::cos(position * rotation.frequencies[i]);
    const double s = rotation.attention_factor * std::sin(position * rotation.frequencies[i]);
    const double first = x[a] * c - x[b] * s;
    x[b] = x[b] * c + x[a] * s;
    x[a] = first;
  }
  return x;
}

}  // namespace

template <class Element>
struct CudaDeviceModel<Element>::Content {
  CudaDecoderShape shape;
  CudaRotation rotation;
  bool tied;
  int device = 0;
  std::size_t bytes = 0;  // of matrices
  Row embedding{}, output{}, output_norm{};
  std::vector<PlainLayer> layers{};
};

template <class Element>
void CudaDeviceModel<Element>::require_device(int device) {
  if (device < kCurrentDevice || device > 1)
    throw Error(ErrorCode::kDevice,
                {"no such GPU", "plain device", "device", "0 to 1", std::to_string(device)});
}
template <class Element>
CudaDeviceModel<Element>::CudaDeviceModel(const CudaDecoderShape& shape, CudaRotation rotation,
                                          bool tied, int device)
    : content_(new Content{.shape = shape,
                           .rotation = std::move(rotation),
                           .tied = tied,
                           .device = std::max(device, 0)}) {
  require_device(device);
  content_->layers.resize(static_cast<std::size_t>(shape.num_layers));
}
template <class Element>
CudaDeviceModel<Element>::~CudaDeviceModel() = default;
template <class Element>
void CudaDeviceModel<Element>::set_embedding(std::span<const Element> x) {
  content_->embedding = widened(x, shape().vocab_size * shape().hidden_size, "embedding");
  content_->bytes += x.size_bytes();
}
template <class Element>
void CudaDeviceModel<Element>::set_output(std::span<const Element> x) {
  content_->output = widened(x, shape().vocab_size * shape().hidden_size, "output");
  content_->bytes += x.size_bytes();
}
template <class Element>
void CudaDeviceModel<Element>::set_output(const CudaPackedRows& x) {
  content_->output = unpacked(x, shape().vocab_size, shape().hidden_size, "output");
  content_->bytes += x.content.size();
}
template <class Element>
void CudaDeviceModel<Element>::set_output_norm(std::span<const float> x) {
  content_->output_norm = widened(x, shape().hidden_size, "output norm");
}
template <class Element>
void CudaDeviceModel<Element>::set_layer(std::int64_t layer, const CudaLayerContent<Element>& x) {
  const CudaDecoderShape& s = shape();
  const auto matrix = [&](std::span<const Element> plain, const CudaPackedRows& packed,
                          std::int64_t rows, std::int64_t cols, const char* name) {
    content_->bytes += plain.size_bytes() + packed.content.size();
    return packed.content.empty() ? widened(plain, rows * cols, name)
                                  : unpacked(packed, rows, cols, name);
  };
  // Gate and up are one quantised matrix.
  const auto half = [&](std::span<const Element> plain, std::int64_t which, const char* name) {
    if (x.packed_gate_up.content.empty())
      return matrix(plain, {}, s.intermediate_size, s.hidden_size, name);
    content_->bytes += x.packed_gate_up.content.size() / 2;
    return unpacked(x.packed_gate_up, 2 * s.intermediate_size, s.hidden_size, name, which, 2);
  };
  content_->layers[static_cast<std::size_t>(layer)] = {
      widened(x.attention_norm, s.hidden_size, "attention norm"),
      matrix(x.query, x.packed_query, s.query_size(), s.hidden_size, "query"),
      matrix(x.key, x.packed_key, s.kv_size(), s.hidden_size, "key"),
      matrix(x.value, x.packed_value, s.kv_size(), s.hidden_size, "value"),
      matrix(x.output, x.packed_output, s.hidden_size, s.query_size(), "output of attention"),
      widened(x.feed_forward_norm, s.hidden_size, "feed-forward norm"),
      half(x.gate, 0, "gate"),
      half(x.up, 1, "up"),
      matrix(x.down, x.packed_down, s.hidden_size, s.intermediate_size, "down")};
}
template <class Element>
const CudaDecoderShape& CudaDeviceModel<Element>::shape() const {
  return content_->shape;
}
template <class Element>
const CudaRotation& CudaDeviceModel<Element>::rotation() const {
  return content_->rotation;
}
template <class Element>
int CudaDeviceModel<Element>::device_index() const {
  return content_->device;
}
template <class Element>
std::size_t CudaDeviceModel<Element>::bytes() const {
  return content_->bytes;
}

namespace {

/// What a stream keeps: members of RetentionConfig.
struct PlainExtents {
  std::int64_t sinks, window, capacity;
  PositionRule position_rule;
  Position origin;

  bool is_limited() const { return window < std::numeric_limits<std::int64_t>::max() / 4; }
  /// Whether the token `index` is among what the token `reader` sees, or saw.
  bool shows(std::int64_t index, std::int64_t reader) const {
    return index < sinks || index > reader - window;
  }
};

/// A token's keys or values, [num_kv_heads, head_dim], as they are stored: codes times scales,
/// which is exact in float64.
struct StoredRow {
  StoredRow() = default;
  explicit StoredRow(const CudaDecoderShape& shape)
      : values(static_cast<std::size_t>(shape.kv_size())),
        scales(static_cast<std::size_t>(shape.num_kv_heads), 1.0F) {}

  void copy_from(const StoredRow& other) {  // allocates nothing
    std::copy(other.values.begin(), other.values.end(), values.begin());
    std::copy(other.scales.begin(), other.scales.end(), scales.begin());
  }

  Row values;
  std::vector<float> scales;  // [num_kv_heads]; 1 where there are none
};

/// Of a token's key or value in one head, on the device.
template <class Cache>
std::size_t bytes_of_row(std::int64_t head_dim) {
  return static_cast<std::size_t>(head_dim) * sizeof(Cache) + (CudaCode<Cache> ? sizeof(float) : 0);
}

/// Rounds a row as a cache of that type stores it.
template <class Cache>
StoredRow stored(const Row& row, const CudaDecoderShape& shape) {
  StoredRow result(shape);
  const auto dim = static_cast<std::size_t>(shape.head_dim);
  const std::vector<float> narrow(row.begin(), row.end());
  for (std::size_t head = 0; head < result.scales.size(); ++head) {
    float& scale = result.scales[head];
    const float* const x = narrow.data() + head * dim;
    if constexpr (CudaCode<Cache>) {
      float peak = 0;
      for (std::size_t d = 0; d < dim; ++d) peak = std::max(peak, std::abs(x[d]));
      scale = std::max(peak / (std::same_as<Cache, std::int8_t> ? 127.0F : 448.0F), 0x1p-126F);
    }
    for (std::size_t d = 0; d < dim; ++d) {
      const float code = x[d] / scale;
      const Cache n = [&] {
        if constexpr (std::same_as<Cache, std::int8_t>)
          return static_cast<std::int8_t>(std::nearbyint(code));
        else
          return Cache(code);
      }();
      result.values[head * dim + d] =
          static_cast<double>(static_cast<float>(n)) * static_cast<double>(scale);
    }
  }
  return result;
}

template <class Cache, class Content>
struct PlainStream {
  PlainStream(const Content& model, const PlainExtents& extents) : m(model), x(extents) {
    const auto rows = static_cast<std::size_t>(m.shape.num_layers * x.capacity);
    keys.assign(rows, StoredRow(m.shape));
    values = keys;
  }

  std::size_t place(std::int64_t layer, std::int64_t index) const {
    const std::int64_t beyond = index - x.sinks;
    const std::int64_t slot = beyond < 0 ? index : x.sinks + beyond % (x.capacity - x.sinks);
    return static_cast<std::size_t>(layer * x.capacity + slot);
  }
  /// The index that the token in step stands for: `total`, but of a tree its depth's.
  std::int64_t reader() const {
    return depths.empty() ? total
                          : draft_base + depths[static_cast<std::size_t>(total - draft_base)];
  }
  /// Whether the token in step sees the one that is stored as `index`.
  bool sees(std::int64_t index) const {
    if (depths.empty() || index < draft_base) return x.shows(index, reader());
    const auto words = ancestors.size() / depths.size();
    const auto node = static_cast<std::size_t>(total - draft_base);
    const auto other = static_cast<std::size_t>(index - draft_base);
    return (ancestors[node * words + other / 64] >> (other % 64) & 1) != 0;
  }
  /// One head of a row.
  Row head_of(const Row& row, std::int64_t head) const {
    const auto begin = row.begin() + head * m.shape.head_dim;
    return Row(begin, begin + m.shape.head_dim);
  }

  /// Attention of the token `total` over this stream and the first `visible` tokens of another.
  Row attended(std::int64_t layer, const Row& query, const PlainStream* source,
               std::int64_t visible) const {
    const CudaDecoderShape& s = m.shape;
    // Where a reader stands in the cache, in tokens: the last of its window at most.
    const bool ranks = x.is_limited() && x.position_rule == PositionRule::kInCache;
    const double rank =
        static_cast<double>(ranks ? std::min(reader(), x.sinks + x.window - 1) : reader());
    Row out;
    for (std::int64_t head = 0; head < s.num_qo_heads; ++head) {
      const std::int64_t kv = head / (s.num_qo_heads / s.num_kv_heads);
      std::vector<double> scores;
      std::vector<const Row*> seen;
      Row q;
      double turned_to = std::numeric_limits<double>::quiet_NaN();
      const auto see = [&](const PlainStream& stream, std::int64_t index, double position) {
        if (position != turned_to) q = rotated(head_of(query, head), m.rotation, position);
        turned_to = position;
        const Row key = stream.head_of(stream.keys[stream.place(layer, index)].values, kv);
        double score = 0;
        for (std::size_t d = 0; d < key.size(); ++d) score += q[d] * key[d];
        scores.push_back(score * s.sm_scale);
        seen.push_back(&stream.values[stream.place(layer, index)].values);
      };
      for (std::int64_t i = 0; source != nullptr && i < visible; ++i) {
        const PlainExtents& of = source->x;
        if (!of.shows(i, visible - 1)) continue;
        // In the cache the oldest token of the window follows the sinks.
        const std::int64_t gone = of.position_rule == PositionRule::kInCache && i >= of.sinks
                                      ? std::max<std::int64_t>(visible - of.window - of.sinks, 0)
                                      : 0;
        see(*source, i, x.origin + rank + static_cast<double>(gone));
      }
      for (std::int64_t i = 0; i <= total; ++i)
        if (sees(i)) see(*this, i, x.origin + (i < x.sinks ? rank : static_cast<double>(reader())));
      const double top = *std::max_element(scores.begin(), scores.end());
      Row sum(static_cast<std::size_t>(s.head_dim));
      double weights = 0;
      for (std::size_t j = 0; j < seen.size(); ++j) {
        const double weight = std::exp(scores[j] - top);
        weights += weight;
        const Row value = head_of(*seen[j], kv);
        for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += weight * value[d];
      }
      for (const double y : sum) out.push_back(y / weights);
    }
    return out;
  }

  Row embedding(Token token) const {
    const auto begin = m.embedding.begin() + token * m.shape.hidden_size;
    return {begin, begin + m.shape.hidden_size};
  }

  /// One token's row of embeddings; logits of the next.
  std::vector<float> step(Row y, const PlainStream* source = nullptr, std::int64_t visible = 0) {
    const CudaDecoderShape& s = m.shape;
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const PlainLayer& w = m.layers[static_cast<std::size_t>(l)];
      const Row in = normed(y, w.attention_norm, s.norm_eps);
      const Row key = product(w.key, in);
      Row turned;
      for (std::int64_t head = 0; head < s.num_kv_heads; ++head)
        for (const double k :
             rotated(head_of(key, head), m.rotation, x.origin + static_cast<double>(reader())))
          turned.push_back(k);
      keys[place(l, total)] = stored<Cache>(turned, s);
      values[place(l, total)] = stored<Cache>(product(w.value, in), s);
      add(y, product(w.output, attended(l, product(w.query, in), source, visible)));
      const Row inner = normed(y, w.feed_forward_norm, s.norm_eps);
      Row gate = product(w.gate, inner);
      const Row up = product(w.up, inner);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(y, product(w.down, gate));
    }
    ++total;
    hidden.assign(y.begin(), y.end());
    return logits_of(hidden, false);
  }
  /// Logits behind a residual stream, or behind one that the final norm was applied to.
  std::vector<float> logits_of(const std::vector<float>& state, bool is_normed) const {
    const Row y(state.begin(), state.end());
    const Row out = product(m.tied ? m.embedding : m.output,
                            is_normed ? y : normed(y, m.output_norm, m.shape.norm_eps));
    return {out.begin(), out.end()};
  }

  std::size_t bytes() const {
    return 2 * keys.size() * keys.front().scales.size() * bytes_of_row<Cache>(m.shape.head_dim);
  }

  const Content& m;
  PlainExtents x;
  std::int64_t total = 0;
  std::vector<StoredRow> keys, values;  // [layers, capacity]
  std::vector<float> hidden;            // the residual stream behind the last token
  // Of the tree that is read: its first index, and what CudaDeviceSession::read_draft() says.
  std::int64_t draft_base = 0;
  std::span<const std::int32_t> depths;
  std::span<const std::uint64_t> ancestors;
};

Token best_of(std::span<const float> logits) {
  return static_cast<Token>(std::ranges::max_element(logits) - logits.begin());
}
double nll_of(std::span<const float> logits, Token next) {
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  return std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(next)]);
}

template <class Config>
PlainExtents extents_of(const Config& c) {
  return {c.num_sink_tokens, c.window_size, c.capacity, c.position_rule, c.origin};
}

}  // namespace

template <class Element, class Cache>
struct CudaDeviceSession<Element, Cache>::State {
  State(const CudaDeviceModel<Element>& model, const CudaDeviceSessionConfig& config)
      : stream(model.content(), extents_of(config)), place_slots(config.place_slots) {
    stream.hidden.resize(static_cast<std::size_t>(model.shape().hidden_size));
    for (int i = 0; i < config.places; ++i) {
      Place& place = places.emplace_back();
      place.rows.resize(
          static_cast<std::size_t>(2 * model.shape().num_layers * config.place_slots));
      for (StoredRow& row : place.rows) row = StoredRow(model.shape());
      place.hidden = stream.hidden;
    }
  }

  /// Calls visit(row, number) for keys and values in the first slots of all layers.
  template <class Visit>
  void each_row(std::int64_t slots, Visit&& visit) {
    std::size_t number = 0;
    for (auto* rows : {&stream.keys, &stream.values})
      for (std::int64_t l = 0; l < stream.m.shape.num_layers; ++l)
        for (std::int64_t slot = 0; slot < slots; ++slot)
          visit((*rows)[static_cast<std::size_t>(l * stream.x.capacity + slot)], number++);
  }
  /// Calls visit(row, head, at, is_key) for each head's part of the rows of a layer's first slots;
  /// at: its place in [num_kv_heads, slots].
  template <class Visit>
  void each_head(std::int64_t layer, std::int64_t slots, Visit&& visit) {
    for (auto* rows : {&stream.keys, &stream.values})
      for (std::int64_t head = 0; head < stream.m.shape.num_kv_heads; ++head)
        for (std::int64_t slot = 0; slot < slots; ++slot)
          visit((*rows)[static_cast<std::size_t>(layer * stream.x.capacity + slot)],
                static_cast<std::size_t>(head), static_cast<std::size_t>(head * slots + slot),
                rows == &stream.keys);
  }
  /// Another state was put behind the last token.
  void set_state(std::int64_t total, bool is_normed) {
    stream.total = total;
    normed = is_normed;
    stale = true;
  }
  const std::vector<float>& last_logits() {
    if (stale) logits.assign(1, stream.logits_of(stream.hidden, normed));
    stale = false;
    return logits.back();
  }

  struct Place {
    std::vector<StoredRow> rows;  // as each_row() numbers them
    std::vector<float> hidden;
    bool normed = false;
  };

  PlainStream<Cache, typename CudaDeviceModel<Element>::Content> stream;
  std::int64_t place_slots;
  std::vector<std::vector<float>> logits;  // of the last chunk's tokens
  bool stale = false;                      // logits are not those of stream.hidden
  bool normed = false;                     // stream.hidden is normed
  std::vector<std::vector<float>> draft;   // logits of its tokens
  std::vector<Place> places;
};

template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::CudaDeviceSession(const CudaDeviceModel<Element>& model,
                                                     const CudaDeviceSessionConfig& config)
    : state_(new State(model, config)) {}
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::~CudaDeviceSession() = default;
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>::CudaDeviceSession(CudaDeviceSession&& other) noexcept = default;
template <class Element, class Cache>
CudaDeviceSession<Element, Cache>& CudaDeviceSession<Element, Cache>::operator=(
    CudaDeviceSession&& other) noexcept = default;
template <class Element, class Cache>
std::int64_t CudaDeviceSession<Element, Cache>::total() const {
  return state_->stream.total;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::set_total(std::int64_t total) {
  state_->stream.total = total;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::read(std::span<const Token> tokens) {
  state_->logits.clear();
  state_->stale = state_->normed = false;
  auto& stream = state_->stream;
  for (const Token token : tokens) state_->logits.push_back(stream.step(stream.embedding(token)));
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::step(Token token) {
  read({&token, 1});
}
template <class Element, class Cache>
Token CudaDeviceSession<Element, Cache>::best() {
  return best_of(state_->last_logits());
}
template <class Element, class Cache>
std::span<const float> CudaDeviceSession<Element, Cache>::logits() {
  return state_->last_logits();
}
template <class Element, class Cache>
double CudaDeviceSession<Element, Cache>::likelihood(Token next) {
  return nll_of(state_->last_logits(), next);
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::likelihoods(std::span<const Token> next,
                                                    std::span<float> nll) {
  for (std::size_t i = 0; i < next.size(); ++i)
    nll[i] = static_cast<float>(nll_of(state_->logits[i], next[i]));
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::read_draft(std::span<const Token> tokens,
                                                   std::span<const std::int32_t> depths,
                                                   std::span<const std::uint64_t> ancestors) {
  auto& stream = state_->stream;
  const std::vector<float> hidden = stream.hidden;
  const std::int64_t total = stream.total;
  stream.draft_base = total;
  stream.depths = depths;
  stream.ancestors = ancestors;
  state_->draft.clear();
  for (const Token token : tokens) state_->draft.push_back(stream.step(stream.embedding(token)));
  stream.hidden = hidden;
  stream.total = total;
  stream.depths = {};
}
template <class Element, class Cache>
Token CudaDeviceSession<Element, Cache>::draft_best(std::int64_t i) {
  return best_of(draft_logits(i));
}
template <class Element, class Cache>
std::span<const float> CudaDeviceSession<Element, Cache>::draft_logits(std::int64_t i) {
  return state_->draft[static_cast<std::size_t>(i)];
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::move_slot(std::int64_t from, std::int64_t to) {
  auto& stream = state_->stream;
  for (auto* rows : {&stream.keys, &stream.values})
    for (std::int64_t l = 0; l < stream.m.shape.num_layers; ++l)
      (*rows)[static_cast<std::size_t>(l * stream.x.capacity + to)] =
          (*rows)[static_cast<std::size_t>(l * stream.x.capacity + from)];
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::keep_draft(std::int64_t tokens) {
  state_->stream.total += tokens;
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::capture(int place, std::int64_t slots) {
  State& s = *state_;
  auto& to = s.places[static_cast<std::size_t>(place)];
  if (slots > s.place_slots) throw std::logic_error("more slots than a place has");
  s.each_row(slots, [&](const StoredRow& row, std::size_t i) { to.rows[i].copy_from(row); });
  std::copy(s.stream.hidden.begin(), s.stream.hidden.end(), to.hidden.begin());
  to.normed = s.normed;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::revert(int place, std::int64_t slots, std::int64_t total) {
  State& s = *state_;
  const auto& from = s.places[static_cast<std::size_t>(place)];
  s.each_row(slots, [&](StoredRow& row, std::size_t i) { row.copy_from(from.rows[i]); });
  std::copy(from.hidden.begin(), from.hidden.end(), s.stream.hidden.begin());
  s.set_state(total, from.normed);
}
template <class Element, class Cache>
std::size_t CudaDeviceSession<Element, Cache>::place_bytes() const {
  const CudaDecoderShape& shape = state_->stream.m.shape;
  return static_cast<std::size_t>(2 * shape.num_layers * state_->place_slots * shape.num_kv_heads) *
             bytes_of_row<Cache>(shape.head_dim) +
         static_cast<std::size_t>(shape.hidden_size) * sizeof(float);
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::copy_from(const CudaDeviceSession& other,
                                                  std::int64_t slots) {
  State& s = *state_;
  State& from = *other.state_;
  std::vector<const StoredRow*> rows;
  from.each_row(slots, [&](const StoredRow& row, std::size_t) { rows.push_back(&row); });
  s.each_row(slots, [&](StoredRow& row, std::size_t i) { row = *rows[i]; });
  s.stream.hidden = from.stream.hidden;
  s.set_state(from.stream.total, from.normed);
}

template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::download(std::int64_t layer, std::int64_t slots,
                                                 const CudaCacheRows<Cache>& rows) const {
  state_->each_head(
      layer, slots, [&](const StoredRow& row, std::size_t head, std::size_t at, bool is_key) {
        const std::span<Cache> to = is_key ? rows.keys : rows.values;
        const std::span<float> scales = is_key ? rows.key_scales : rows.value_scales;
        const std::size_t dim = row.values.size() / row.scales.size();
        for (std::size_t d = 0; d < dim; ++d)  // exact: a code, or a rounded number
          to[at * dim + d] = Cache(static_cast<float>(row.values[head * dim + d] /
                                                      static_cast<double>(row.scales[head])));
        if (!scales.empty()) scales[at] = row.scales[head];
      });
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::upload(std::int64_t layer, std::int64_t slots,
                                               const CudaCacheRows<Cache>& rows) {
  state_->each_head(
      layer, slots, [&](StoredRow& row, std::size_t head, std::size_t at, bool is_key) {
        const std::span<Cache> from = is_key ? rows.keys : rows.values;
        const std::span<float> scales = is_key ? rows.key_scales : rows.value_scales;
        const std::size_t dim = row.values.size() / row.scales.size();
        row.scales[head] = scales.empty() ? 1 : scales[at];
        for (std::size_t d = 0; d < dim; ++d)
          row.values[head * dim + d] = static_cast<double>(static_cast<float>(from[at * dim + d])) *
                                       static_cast<double>(row.scales[head]);
      });
}
template <class Element, class Cache>
bool CudaDeviceSession<Element, Cache>::hidden(std::span<float> to) const {
  std::copy(state_->stream.hidden.begin(), state_->stream.hidden.end(), to.begin());
  return state_->normed;
}
template <class Element, class Cache>
void CudaDeviceSession<Element, Cache>::set_hidden(std::span<const float> hidden, bool normed) {
  std::copy(hidden.begin(), hidden.end(), state_->stream.hidden.begin());
  state_->set_state(state_->stream.total, normed);
}

template <class Element, class Cache>
std::size_t CudaDeviceSession<Element, Cache>::cache_bytes() const {
  return state_->stream.bytes();
}

// --- Reading while writing -----------------------------------------------------------------------

template <class Element>
struct CudaDeviceDuplex<Element>::State {
  State(const CudaDeviceModel<Element>& model, const CudaDeviceDuplexConfig& c)
      : config(c),
        source(model.content(), extents_of(c.source)),
        target(model.content(), extents_of(c.target)) {}

  CudaDeviceDuplexConfig config;
  PlainStream<Element, typename CudaDeviceModel<Element>::Content> source, target;
  std::vector<float> logits;
};

template <class Element>
CudaDeviceDuplex<Element>::CudaDeviceDuplex(const CudaDeviceModel<Element>& model,
                                            const CudaDeviceDuplexConfig& config)
    : state_(new State(model, config)) {}
template <class Element>
CudaDeviceDuplex<Element>::~CudaDeviceDuplex() = default;

template <class Element>
void CudaDeviceDuplex<Element>::read(std::span<const Token> tokens) {
  if (static_cast<std::int64_t>(tokens.size()) > state_->config.max_tokens)
    throw std::logic_error("more tokens than were announced");
  auto& source = state_->source;
  for (const Token token : tokens) source.step(source.embedding(token));
}
template <class Element>
void CudaDeviceDuplex<Element>::read(std::span<const float> rows) {
  auto& source = state_->source;
  const auto width = static_cast<std::size_t>(source.m.shape.hidden_size);
  if (rows.size() > static_cast<std::size_t>(state_->config.max_rows) * width)
    throw std::logic_error("more rows than were announced");
  for (std::size_t at = 0; at < rows.size(); at += width) {
    const std::span<const float> row = rows.subspan(at, width);
    source.step(Row(row.begin(), row.end()));
  }
}
template <class Element>
void CudaDeviceDuplex<Element>::step(Token token, std::int64_t visible) {
  auto& target = state_->target;
  state_->logits = target.step(target.embedding(token), &state_->source, visible);
}
template <class Element>
void CudaDeviceDuplex<Element>::set_target_total(std::int64_t total) {
  state_->target.total = total;
}
template <class Element>
Token CudaDeviceDuplex<Element>::best() const {
  return best_of(state_->logits);
}
template <class Element>
std::span<const float> CudaDeviceDuplex<Element>::logits() const {
  if (!state_->config.logits) return {};
  return state_->logits;
}
template <class Element>
std::size_t CudaDeviceDuplex<Element>::cache_bytes() const {
  return state_->source.bytes() + state_->target.bytes();
}

template class CudaDeviceModel<bf16>;
template class CudaDeviceModel<f16>;
template class CudaDeviceSession<bf16>;
template class CudaDeviceSession<f16>;
template class CudaDeviceSession<f16, std::int8_t>;
template class CudaDeviceSession<f16, fp8_e4m3>;
template class CudaDeviceDuplex<bf16>;
template class CudaDeviceDuplex<f16>;

}  // namespace sluice
