// SPDX-License-Identifier: MIT
/// What device_session.hpp declares, as plain float64 loops on the host: with it the host's half of
/// a session on a GPU is tested where there is no GPU. Rows lie in the slots that the device's lie
/// in, so what has been written over is gone here too. It says that there are two devices.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <sluice/backend/cuda/device_session.hpp>
#include <sluice/core/error.hpp>

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
}
template <class Element>
void CudaDeviceModel<Element>::set_output(std::span<const Element> x) {
  content_->output = widened(x, shape().vocab_size * shape().hidden_size, "output");
}
template <class Element>
void CudaDeviceModel<Element>::set_output_norm(std::span<const float> x) {
  content_->output_norm = widened(x, shape().hidden_size, "output norm");
}
template <class Element>
void CudaDeviceModel<Element>::set_layer(std::int64_t layer, const CudaLayerContent<Element>& x) {
  const CudaDecoderShape& s = shape();
  content_->layers[static_cast<std::size_t>(layer)] = {
      widened(x.attention_norm, s.hidden_size, "attention norm"),
      widened(x.query, s.query_size() * s.hidden_size, "query"),
      widened(x.key, s.kv_size() * s.hidden_size, "key"),
      widened(x.value, s.kv_size() * s.hidden_size, "value"),
      widened(x.output, s.hidden_size * s.query_size(), "output of attention"),
      widened(x.feed_forward_norm, s.hidden_size, "feed-forward norm"),
      widened(x.gate, s.intermediate_size * s.hidden_size, "gate"),
      widened(x.up, s.intermediate_size * s.hidden_size, "up"),
      widened(x.down, s.hidden_size * s.intermediate_size, "down")};
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
  return sizeof(Element) * (content_->embedding.size() + content_->output.size());
}

template <class Element>
struct CudaDeviceSession<Element>::State {
  State(const CudaDeviceModel<Element>& model, const CudaDeviceSessionConfig& c)
      : m(model.content()), config(c) {
    const auto rows = static_cast<std::size_t>(m.shape.num_layers * c.capacity);
    keys.assign(rows, Row(static_cast<std::size_t>(m.shape.kv_size())));
    values = keys;
  }

  std::size_t place(std::int64_t layer, std::int64_t index) const {
    const std::int64_t ring = config.capacity - config.num_sink_tokens;
    const std::int64_t beyond = index - config.num_sink_tokens;
    const std::int64_t slot = beyond < 0 ? index : config.num_sink_tokens + beyond % ring;
    return static_cast<std::size_t>(layer * config.capacity + slot);
  }
  /// One head of a row.
  Row head_of(const Row& row, std::int64_t head) const {
    const auto begin = row.begin() + head * m.shape.head_dim;
    return Row(begin, begin + m.shape.head_dim);
  }

  Row attended(std::int64_t layer, const Row& query) const {
    const CudaDecoderShape& s = m.shape;
    const bool limited = config.window_size < std::numeric_limits<std::int64_t>::max() / 4;
    const std::int64_t ceiling = limited && config.position_rule == PositionRule::kInCache
                                     ? config.num_sink_tokens + config.window_size - 1
                                     : std::numeric_limits<std::int64_t>::max();
    Row out;
    for (std::int64_t head = 0; head < s.num_qo_heads; ++head) {
      const std::int64_t kv = head / (s.num_qo_heads / s.num_kv_heads);
      const auto turned = [&](std::int64_t index) {
        return rotated(head_of(query, head), m.rotation,
                       config.origin + static_cast<double>(index));
      };
      const Row own = turned(total);
      const Row for_sinks = turned(std::min(total, ceiling));
      std::vector<std::int64_t> seen;
      for (std::int64_t i = 0; i <= total; ++i)
        if (i < config.num_sink_tokens || i > total - config.window_size) seen.push_back(i);
      std::vector<double> scores;
      for (const std::int64_t i : seen) {
        const Row key = head_of(keys[place(layer, i)], kv);
        const Row& q = i < config.num_sink_tokens ? for_sinks : own;
        double score = 0;
        for (std::size_t d = 0; d < key.size(); ++d) score += q[d] * key[d];
        scores.push_back(score * s.sm_scale);
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      Row sum(static_cast<std::size_t>(s.head_dim));
      double weights = 0;
      for (std::size_t j = 0; j < seen.size(); ++j) {
        const double weight = std::exp(scores[j] - top);
        weights += weight;
        const Row value = head_of(values[place(layer, seen[j])], kv);
        for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += weight * value[d];
      }
      for (const double x : sum) out.push_back(x / weights);
    }
    return out;
  }

  /// One token; logits of the next.
  std::vector<float> step(Token token) {
    const CudaDecoderShape& s = m.shape;
    const auto round = [](Row row) {
      for (double& x : row)
        x = static_cast<double>(static_cast<float>(Element(static_cast<float>(x))));
      return row;
    };
    Row x(m.embedding.begin() + token * s.hidden_size,
          m.embedding.begin() + (token + 1) * s.hidden_size);
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const PlainLayer& w = m.layers[static_cast<std::size_t>(l)];
      const Row in = normed(x, w.attention_norm, s.norm_eps);
      const Row key = product(w.key, in);
      Row turned;
      for (std::int64_t head = 0; head < s.num_kv_heads; ++head)
        for (const double k :
             rotated(head_of(key, head), m.rotation, config.origin + static_cast<double>(total)))
          turned.push_back(k);
      keys[place(l, total)] = round(std::move(turned));
      values[place(l, total)] = round(product(w.value, in));
      add(x, product(w.output, attended(l, product(w.query, in))));
      const Row inner = normed(x, w.feed_forward_norm, s.norm_eps);
      Row gate = product(w.gate, inner);
      const Row up = product(w.up, inner);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(x, product(w.down, gate));
    }
    ++total;
    const Row out = product(m.tied ? m.embedding : m.output, normed(x, m.output_norm, s.norm_eps));
    return {out.begin(), out.end()};
  }

  const typename CudaDeviceModel<Element>::Content& m;
  CudaDeviceSessionConfig config;
  std::int64_t total = 0;
  std::vector<Row> keys, values;           // [layers, capacity], rows of all heads
  std::vector<std::vector<float>> logits;  // of the last chunk's tokens
};

namespace {

double nll_of(std::span<const float> logits, Token next) {
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  return std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(next)]);
}

}  // namespace

template <class Element>
CudaDeviceSession<Element>::CudaDeviceSession(const CudaDeviceModel<Element>& model,
                                              const CudaDeviceSessionConfig& config)
    : state_(new State(model, config)) {}
template <class Element>
CudaDeviceSession<Element>::~CudaDeviceSession() = default;
template <class Element>
CudaDeviceSession<Element>::CudaDeviceSession(CudaDeviceSession&& other) noexcept = default;
template <class Element>
CudaDeviceSession<Element>& CudaDeviceSession<Element>::operator=(
    CudaDeviceSession&& other) noexcept = default;
template <class Element>
std::int64_t CudaDeviceSession<Element>::total() const {
  return state_->total;
}
template <class Element>
void CudaDeviceSession<Element>::set_total(std::int64_t total) {
  state_->total = total;
}
template <class Element>
void CudaDeviceSession<Element>::read(std::span<const Token> tokens) {
  state_->logits.clear();
  for (const Token token : tokens) state_->logits.push_back(state_->step(token));
}
template <class Element>
void CudaDeviceSession<Element>::step(Token token) {
  read({&token, 1});
}
template <class Element>
Token CudaDeviceSession<Element>::best() {
  const std::vector<float>& last = state_->logits.back();
  return static_cast<Token>(std::max_element(last.begin(), last.end()) - last.begin());
}
template <class Element>
std::span<const float> CudaDeviceSession<Element>::logits() {
  return state_->logits.back();
}
template <class Element>
double CudaDeviceSession<Element>::likelihood(Token next) {
  return nll_of(state_->logits.back(), next);
}
template <class Element>
void CudaDeviceSession<Element>::likelihoods(std::span<const Token> next, std::span<float> nll) {
  for (std::size_t i = 0; i < next.size(); ++i)
    nll[i] = static_cast<float>(nll_of(state_->logits[i], next[i]));
}
template <class Element>
std::size_t CudaDeviceSession<Element>::cache_bytes() const {
  return 2 * sizeof(Element) * state_->keys.size() * state_->keys.front().size();
}

template class CudaDeviceModel<bf16>;
template class CudaDeviceModel<f16>;
template class CudaDeviceSession<bf16>;
template class CudaDeviceSession<f16>;

}  // namespace sluice
