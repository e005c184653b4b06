// SPDX-License-Identifier: MIT
/// A small random listening model as a GGUF file, sounds to feed it, and what it must write, in
/// double: log-mels by their definition, whole convolutions, a trunk that keeps rows in lists, and
/// the rule of writing as it reads. It shares no arithmetic with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/io/gguf_writer.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/listener_engine.hpp"

namespace sluice::test {

/// Tensors by name, with their shapes, and the numbers of the file's keys.
struct TinyListen {
  std::int64_t width = 32, layers = 2, heads = 2, head_dim = 16, feed_forward = 64, vocab = 60;
  std::int64_t mels = 20, frame_length = 100, hop = 40, fft_size = 128, frame_window = 12;
  std::int64_t trained_delay = 2;
  double sample_rate = 4000, mel_low = 50, mel_high = 1900, log_floor = 1e-6;
  std::map<std::string, std::pair<std::vector<std::int64_t>, std::vector<float>>> tensors;
  std::vector<std::string> pieces;
  std::vector<bool> ends_word;

  explicit TinyListen(std::uint64_t seed) {
    Random random(seed);
    const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, double gain,
                         double offset = 0) {
      std::int64_t count = 1;
      for (const std::int64_t extent : shape) count *= extent;
      const double fan = shape.size() > 1 ? std::sqrt(static_cast<double>(shape.back())) : 1;
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i)
        values.push_back(static_cast<float>(offset + gain * random.normal() / fan));
      tensors[name] = {std::move(shape), std::move(values)};
    };
    // Large embeddings in front of the norms: what was written before weighs as much as the sound.
    add("token_embd.weight", {vocab, width}, std::sqrt(static_cast<double>(width)));
    // Texts end early now and then.
    for (std::int64_t i = 0; i < width; ++i)
      tensors["token_embd.weight"].second[static_cast<std::size_t>(2 * width + i)] *= 1.6F;
    add("output_norm.weight", {width}, 0.2, 1);
    for (std::int64_t l = 0; l < layers; ++l) {
      const std::string at = "blk." + std::to_string(l) + ".";
      add(at + "attn_norm.weight", {width}, 0.2, 1);
      add(at + "ffn_norm.weight", {width}, 0.2, 1);
      for (const char* name : {"attn_q", "attn_k"})
        add(at + name + ".weight", {heads * head_dim, width}, 1.3);
      add(at + "attn_v.weight", {heads * head_dim, width}, 1.5);
      add(at + "attn_output.weight", {width, heads * head_dim}, 1.5);
      add(at + "ffn_gate.weight", {feed_forward, width}, 1);
      add(at + "ffn_up.weight", {feed_forward, width}, 1);
      add(at + "ffn_down.weight", {width, feed_forward}, 1);
    }
    add("listen.mel_mean", {mels}, 0.5, -5);
    add("listen.mel_std", {mels}, 0.1, 2);
    add("listen.conv1.weight", {width, 3 * mels}, 1.5);
    add("listen.conv1.bias", {width}, 0.1);
    add("listen.conv2.weight", {width, 3 * width}, 2);
    add("listen.conv2.bias", {width}, 0.1);
    add("listen.proj.weight", {width, width}, 2);
    add("listen.proj.bias", {width}, 0.1);
    add("listen.ctc.weight", {vocab + 1, width}, 2);
    add("listen.ctc.bias", {vocab + 1}, 0.1);
    tensors["listen.ctc.bias"].second.back() += 4;  // blanks are usual
    for (std::int64_t i = 0; i < vocab; ++i) {
      ends_word.push_back(i > 2 && i % 3 != 0);
      pieces.push_back(i == 0   ? "<unk>"
                       : i == 1 ? "<s>"
                       : i == 2 ? "</s>"
                                : "p" + std::to_string(i) + (ends_word.back() ? "\u2581" : ""));
    }
  }

  const std::vector<float>& tensor(const std::string& name) const {
    return tensors.at(name).second;
  }

  /// The file, but for the keys and tensors left out; replaced: other values for number keys.
  GgufWriter file(const std::vector<std::string>& without = {},
                  const std::map<std::string, double>& replaced = {}) const {
    GgufWriter writer;
    const auto left_out = [&](const std::string& name) {
      return std::find(without.begin(), without.end(), name) != without.end();
    };
    const auto integer = [&](const std::string& key, std::int64_t value) {
      const auto other = replaced.find(key);
      if (!left_out(key))
        writer.add(key, static_cast<std::uint32_t>(other == replaced.end()
                                                       ? value
                                                       : static_cast<std::int64_t>(other->second)));
    };
    const auto number = [&](const std::string& key, double value) {
      const auto other = replaced.find(key);
      if (!left_out(key))
        writer.add(key, static_cast<float>(other == replaced.end() ? value : other->second));
    };
    writer.add("general.architecture", "llama");
    integer("llama.embedding_length", width);
    integer("llama.feed_forward_length", feed_forward);
    integer("llama.block_count", layers);
    integer("llama.attention.head_count", heads);
    integer("llama.attention.head_count_kv", heads);
    integer("llama.attention.key_length", head_dim);
    integer("llama.attention.value_length", head_dim);
    integer("llama.rope.dimension_count", head_dim);
    integer("llama.context_length", 4096);
    number("llama.attention.layer_norm_rms_epsilon", 1e-5);
    number("llama.rope.freq_base", 10000);
    integer("listen.version", 1);
    integer("listen.sample_rate", static_cast<std::int64_t>(sample_rate));
    integer("listen.frame_length", frame_length);
    integer("listen.hop", hop);
    integer("listen.fft_size", fft_size);
    number("listen.mel_low_hz", mel_low);
    number("listen.mel_high_hz", mel_high);
    number("listen.log_floor", log_floor);
    integer("listen.frame_window", frame_window);
    integer("listen.trained_delay", trained_delay);
    integer("tokenizer.ggml.bos_token_id", 1);
    integer("tokenizer.ggml.eos_token_id", 2);
    if (!left_out("tokenizer.ggml.tokens")) writer.add_array("tokenizer.ggml.tokens", pieces);
    for (const auto& [name, tensor] : tensors)
      if (!left_out(name))
        writer.add_tensor(name, ElementType::kF32, tensor.first,
                          std::as_bytes(std::span<const float>(tensor.second)));
    return writer;
  }

  /// Sounds with pauses: tones that jump, and noise.
  std::vector<float> sound(std::int64_t samples, std::uint64_t seed) const {
    Random random(seed);
    std::vector<float> result;
    double phase = 0;
    double pitch = 300;
    double gain = 0.3;
    std::int64_t left = 0;
    while (static_cast<std::int64_t>(result.size()) < samples) {
      if (left-- <= 0) {
        left = 200 + static_cast<std::int64_t>(random.below(1500));
        pitch = 80 + 1700 * random.uniform();
        gain = random.below(4) == 0 ? 0.001 : 0.05 + 0.4 * random.uniform();
      }
      phase += 2 * std::numbers::pi * pitch / sample_rate;
      result.push_back(static_cast<float>(gain * (std::sin(phase) + 0.2 * random.normal())));
    }
    return result;
  }
};

/// What is written: words and ends of utterances.
struct Heard {
  bool endpoint = false;
  std::int64_t utterance = 0;
  std::int64_t word = 0;  // its number; at an endpoint how many
  std::vector<Token> pieces;
  std::int64_t samples = 0;
  std::int64_t spoken = -1;
  bool operator==(const Heard&) const = default;
};

/// A model that keeps its file's bytes.
inline std::shared_ptr<const ListenModel> load_tiny(const GgufWriter& writer) {
  auto bytes = std::make_shared<std::vector<std::byte>>(writer.bytes());
  const std::shared_ptr<const GgufFile> file(
      new GgufFile(GgufFile::from_bytes(*bytes, "tiny.gguf")),
      [bytes](const GgufFile* own) { delete own; });
  return load_listen_model(file);
}

/// The settings of a NaiveListener, in rows; 0: never.
struct HearingRule {
  std::int64_t wait_words = 1, delay = 2, endpoint_rows = 20, max_rows = 120, silence_rows = 40;
};

inline ListenerOptions options_for(const ListenModel& model, const HearingRule& rule) {
  const auto milliseconds = [&](std::int64_t rows) {
    return static_cast<double>(rows) * model.milliseconds_per_row();
  };
  ListenerOptions options;
  options.wait_words = rule.wait_words;
  options.delay_rows = rule.delay;
  options.endpoint_ms = milliseconds(rule.endpoint_rows);
  options.max_utterance_ms = milliseconds(rule.max_rows);
  options.silence_ms = milliseconds(rule.silence_rows);
  return options;
}

/// Time, for a listener that has a deadline: told of everything that is done, in order, and asked
/// what is put off.
class HearingPace {
 public:
  virtual ~HearingPace() = default;
  /// A row of samples up to `end` was read; last: its utterance ends with it.
  virtual void row(std::int64_t end, bool last) = 0;
  /// Nothing more is done with it.
  virtual void row_done() = 0;
  /// Whether a piece that is due is predicted now; inside_word: behind another one of its word that
  /// was written with the same row.
  virtual bool allows(bool inside_word) = 0;
  /// A piece was predicted.
  virtual void forward() = 0;
};

/// The definition.
class NaiveListener {
 public:
  explicit NaiveListener(const TinyListen& model, HearingPace* pace = nullptr)
      : m_(model), pace_(pace) {}

  /// Smallest difference between the best and the second best score of any decision made: words are
  /// only comparable while rounding stays below it.
  double margin() const { return margin_; }
  /// Pieces written, and words that were broken off to wait (an early end of the text).
  std::int64_t pieces_written() const { return pieces_written_; }
  std::int64_t early_ends() const { return early_ends_; }

  std::vector<Heard> run(std::span<const float> samples, const HearingRule& rule) {
    std::vector<Heard> heard;
    const Rows mels = log_mels(samples);
    std::size_t base = 0;
    for (;;) {
      // Silence that was forgotten is no utterance.
      const std::int64_t utterance =
          std::count_if(heard.begin(), heard.end(), [](const Heard& h) { return h.endpoint; });
      const Rows rows = source_rows(mels, base);
      const std::size_t used = write(rows, base, samples.size(), rule, utterance, heard);
      if (used == 0) return heard;
      base += 4 * (used - 1) + 1;
    }
  }

 private:
  using Row = std::vector<double>;
  using Rows = std::vector<Row>;
  struct Group {
    // [layer][row]
    std::vector<Rows> keys, values;
  };

  Row product(const std::string& name, const Row& x, const std::string& bias = {}) const {
    const std::vector<float>& weight = m_.tensor(name);
    Row y;
    for (std::size_t r = 0; r < weight.size() / x.size(); ++r) {
      double sum = bias.empty() ? 0 : static_cast<double>(m_.tensor(bias)[r]);
      for (std::size_t i = 0; i < x.size(); ++i)
        sum += static_cast<double>(weight[r * x.size() + i]) * x[i];
      y.push_back(sum);
    }
    return y;
  }

  Rows log_mels(std::span<const float> samples) const {
    const auto length = static_cast<std::size_t>(m_.frame_length);
    const auto hop = static_cast<std::size_t>(m_.hop);
    const auto size = static_cast<std::size_t>(m_.fft_size);
    const auto mel = [](double hz) {
      return 2595 * std::log10(1 + hz / 700);
    };
    Row window;
    for (std::size_t n = 0; n < length; ++n)
      window.push_back(0.5 - 0.5 * std::cos(2 * std::numbers::pi * static_cast<double>(n) /
                                            static_cast<double>(length)));
    Row cosine;
    Row sine;
    for (std::size_t n = 0; n < size; ++n) {
      const double angle =
          2 * std::numbers::pi * static_cast<double>(n) / static_cast<double>(size);
      cosine.push_back(std::cos(angle));
      sine.push_back(std::sin(angle));
    }
    Rows rows;
    for (std::size_t start = 0; start + length <= samples.size(); start += hop) {
      Row power;
      for (std::size_t bin = 0; bin <= size / 2; ++bin) {
        double re = 0;
        double im = 0;
        for (std::size_t n = 0; n < length; ++n) {
          const double x = window[n] * static_cast<double>(samples[start + n]);
          re += x * cosine[bin * n % size];
          im -= x * sine[bin * n % size];
        }
        power.push_back(re * re + im * im);
      }
      Row row;
      for (std::int64_t i = 0; i < m_.mels; ++i) {
        const double low = mel(m_.mel_low);
        const double step = (mel(m_.mel_high) - low) / static_cast<double>(m_.mels + 1);
        double energy = 0;
        for (std::size_t bin = 0; bin < power.size(); ++bin) {
          const double place =
              mel(static_cast<double>(bin) * m_.sample_rate / static_cast<double>(size));
          const double weight =
              1 - std::abs(place - (low + step * static_cast<double>(i + 1))) / step;
          if (weight > 0) energy += weight * power[bin];
        }
        const auto index = static_cast<std::size_t>(i);
        row.push_back((std::log(energy + static_cast<double>(static_cast<float>(m_.log_floor))) -
                       static_cast<double>(m_.tensor("listen.mel_mean")[index])) /
                      static_cast<double>(m_.tensor("listen.mel_std")[index]));
      }
      rows.push_back(row);
    }
    return rows;
  }

  /// Every second row of a causal convolution over three rows.
  Rows convolve(const Rows& in, const std::string& name) const {
    Rows out;
    for (std::size_t t = 0; t < in.size(); t += 2) {
      Row x;
      for (std::size_t back : {2, 1, 0})
        for (std::size_t c = 0; c < in[0].size(); ++c) x.push_back(t >= back ? in[t - back][c] : 0);
      Row y = product(name + ".weight", x, name + ".bias");
      for (double& v : y) v = 0.5 * v * (1 + std::erf(v / std::numbers::sqrt2));
      out.push_back(y);
    }
    return out;
  }

  Rows source_rows(const Rows& mels, std::size_t base) const {
    const Rows all(mels.begin() + static_cast<std::ptrdiff_t>(std::min(base, mels.size())),
                   mels.end());
    if (all.empty()) return {};
    Rows rows = convolve(convolve(all, "listen.conv1"), "listen.conv2");
    for (Row& row : rows) row = product("listen.proj.weight", row, "listen.proj.bias");
    return rows;
  }

  Row norm(Row x, const std::string& name) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    const double root = std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] *= static_cast<double>(m_.tensor(name)[i]) / root;
    return x;
  }

  /// One row of the trunk, which joins `own`; it sees the rows [first, own's end) of it, and
  /// [other_first, other_end) of the other group.
  Row trunk(Row x, Group& own, std::size_t first, const Group* other, std::size_t other_first,
            std::size_t other_end) const {
    own.keys.resize(static_cast<std::size_t>(m_.layers));
    own.values.resize(static_cast<std::size_t>(m_.layers));
    const auto dim = static_cast<std::size_t>(m_.head_dim);
    for (std::size_t l = 0; l < own.keys.size(); ++l) {
      const std::string at = "blk." + std::to_string(l) + ".";
      const Row normed = norm(x, at + "attn_norm.weight");
      const Row query = product(at + "attn_q.weight", normed);
      own.keys[l].push_back(product(at + "attn_k.weight", normed));
      own.values[l].push_back(product(at + "attn_v.weight", normed));
      const auto position = static_cast<double>(own.keys[l].size() - 1);
      Row attended(query.size());
      for (std::size_t h = 0; h < static_cast<std::size_t>(m_.heads); ++h) {
        double sum = 0;
        Row mix(dim);
        const auto see = [&](const Group& group, std::size_t begin, std::size_t end) {
          for (std::size_t j = begin; j < end; ++j) {
            double score = 0;
            for (std::size_t i = 0; i < dim; i += 2) {
              const double angle =
                  (position - static_cast<double>(j)) *
                  std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(dim));
              const double* q = query.data() + h * dim + i;
              const double* k = group.keys[l][j].data() + h * dim + i;
              score += std::cos(angle) * (q[0] * k[0] + q[1] * k[1]) +
                       std::sin(angle) * (q[0] * k[1] - q[1] * k[0]);
            }
            const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
            sum += weight;
            for (std::size_t d = 0; d < dim; ++d)
              mix[d] += weight * group.values[l][j][h * dim + d];
          }
        };
        see(own, first, own.keys[l].size());
        if (other != nullptr) see(*other, other_first, other_end);
        for (std::size_t d = 0; d < dim; ++d) attended[h * dim + d] = mix[d] / sum;
      }
      const Row back = product(at + "attn_output.weight", attended);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += back[i];
      const Row wide = norm(x, at + "ffn_norm.weight");
      Row gate = product(at + "ffn_gate.weight", wide);
      const Row up = product(at + "ffn_up.weight", wide);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      const Row down = product(at + "ffn_down.weight", gate);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += down[i];
    }
    return norm(x, "output_norm.weight");
  }

  Token best(const Row& scores) {
    std::size_t first = 0;
    for (std::size_t i = 1; i < scores.size(); ++i)
      if (scores[i] > scores[first]) first = i;
    for (std::size_t i = 0; i < scores.size(); ++i)
      if (i != first) margin_ = std::min(margin_, scores[first] - scores[i]);
    return static_cast<Token>(first);
  }

  /// One utterance; returns how many of the rows it took, 0: the sound ended with it.
  /// end: all samples, where what is written at the input's end stands.
  std::size_t write(const Rows& rows, std::size_t base, std::size_t end, const HearingRule& rule,
                    std::int64_t utterance, std::vector<Heard>& heard) {
    if (rows.empty()) return 0;
    const auto window = static_cast<std::size_t>(m_.frame_window);
    const auto blank = static_cast<Token>(m_.vocab);
    Group source;
    Group target;
    std::vector<std::size_t> counted;  // row of each counted word
    std::vector<std::size_t> clock;    // samples at the end of each row
    Token label = blank;
    Token last = 1;
    bool sounded = false;
    std::int64_t blanks = 0;
    std::size_t awaited = 0;
    std::int64_t written = 0;
    std::vector<Token> word;
    std::size_t now_at = 0;
    const auto put_word = [&] {
      const auto number = static_cast<std::size_t>(written);
      heard.push_back(
          {false, utterance, written++, word, static_cast<std::int64_t>(now_at),
           number < counted.size() ? static_cast<std::int64_t>(clock[counted[number]]) : -1});
      word.clear();
    };
    for (std::size_t j = 0;; ++j) {
      const Row hidden = trunk(rows[j], source, j + 1 > window ? j + 1 - window : 0, nullptr, 0, 0);
      clock.push_back(static_cast<std::size_t>(m_.hop) * (base + 4 * j) +
                      static_cast<std::size_t>(m_.frame_length));
      now_at = clock.back();
      const Token now = best(product("listen.ctc.weight", hidden, "listen.ctc.bias"));
      blanks = now == blank ? blanks + 1 : 0;
      if (now != label && now != blank && m_.ends_word[static_cast<std::size_t>(now)])
        counted.push_back(j);
      label = now;
      sounded = sounded || now != blank;
      const auto passed = [](std::int64_t count, std::int64_t limit) {
        return limit > 0 && count >= limit;
      };
      const std::size_t seen = j + 1;
      const bool ended = seen == rows.size();
      const bool pause = (!counted.empty() && passed(blanks, rule.endpoint_rows)) ||
                         passed(static_cast<std::int64_t>(seen), rule.max_rows);
      const bool silence = !pause && counted.empty() && passed(blanks, rule.silence_rows);
      if (pace_ != nullptr) pace_->row(static_cast<std::int64_t>(now_at), pause || silence);
      bool inside_word = false;
      // As after every row, and then once more if the utterance ends here.
      for (const bool finished : {false, true}) {
        if (pace_ != nullptr && finished && !pause && !silence) pace_->row_done();
        if (finished && !ended && !pause) break;
        if (finished && silence) break;  // nothing was said
        if (finished && !pause) now_at = end;
        if (finished && !sounded) break;  // no row had a label
        for (;;) {
          if (!finished) {
            const auto due = static_cast<std::size_t>(written + rule.wait_words);
            if (counted.size() < awaited || counted.size() < due) break;
            if (static_cast<std::int64_t>(seen) <
                static_cast<std::int64_t>(counted[due - 1]) + 1 + rule.delay)
              break;
            if (pace_ != nullptr && !pace_->allows(inside_word)) break;
          }
          if (pace_ != nullptr) pace_->forward();
          Row x;
          for (std::int64_t i = 0; i < m_.width; ++i)
            x.push_back(static_cast<double>(
                m_.tensor("token_embd.weight")[static_cast<std::size_t>(last * m_.width + i)]));
          const Row state = trunk(x, target, 0, &source, seen > window ? seen - window : 0, seen);
          Row logits = product("token_embd.weight", state);
          logits[0] = logits[1] = -1e30;
          const Token token = best(logits);
          if (token == 2) {
            for (std::size_t l = 0; l < target.keys.size(); ++l) {
              target.keys[l].pop_back();
              target.values[l].pop_back();
            }
            ++early_ends_;
            awaited = counted.size() + 1;
            break;
          }
          ++pieces_written_;
          word.push_back(token);
          last = token;
          inside_word = true;
          if (!m_.ends_word[static_cast<std::size_t>(token)] && word.size() < 16) continue;
          put_word();
          inside_word = false;
          if (finished && written >= static_cast<std::int64_t>(counted.size()) + 8) break;
        }
      }
      if (pace_ != nullptr && (pause || silence)) pace_->row_done();
      if (!ended && !pause && !silence) continue;
      if (!silence) {
        if (!word.empty()) put_word();
        // What has no word is no utterance either.
        if (written > 0)
          heard.push_back({true, utterance, written, {}, static_cast<std::int64_t>(now_at), -1});
      }
      return pause || silence ? seen : 0;
    }
  }

  const TinyListen& m_;
  HearingPace* pace_;
  double margin_ = std::numeric_limits<double>::infinity();
  std::int64_t pieces_written_ = 0;
  std::int64_t early_ends_ = 0;
};

}  // namespace sluice::test
