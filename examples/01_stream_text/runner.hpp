// SPDX-License-Identifier: MIT
// The three things that the program does with a session: write on, score a stream, talk.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat.hpp"
#include "options.hpp"
#include "output.hpp"
#include "report.hpp"
#include "step_log.hpp"
#include "support/terminal.hpp"
#include "support/text_source.hpp"

#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/io/detokenizer.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/session.hpp"

namespace stream_text {

inline sluice::SessionOptions session_options(const Options& options) {
  return {.cache = options.cache,
          .sampler = options.sampler,
          .num_threads = options.threads,
          .team = nullptr,
          .activations = options.activations};
}

/// The program over one of the caches that look at queries. \throws as Runner.
int run_choosing(const sluice::LoadedModel& model, const Options& options);

/// One session and what the options ask of it.
template <class Session>
class Runner {
 public:
  /// Takes over the session. \throws sluice::Error(kIo, kFormat) for a snapshot that cannot be
  /// continued.
  Runner(const sluice::LoadedModel& model, const Options& options, Session&& session)
      : model_(model),
        options_(options),
        tokenizer_(*model.tokenizer),
        session_(std::move(session)),
        output_(options.format),
        detokenizer_(tokenizer_) {
    piece_.reserve(3 * tokenizer_.max_bytes() + 3);
    if (options.load) session_.restore(*options.load);
    if (options.latency_log) log_.emplace(steps_to_come(), options.endless_bins);
  }

  /// Runs to the end and writes everything that was asked for. The status to exit with, signals
  /// aside.
  int run() {
    Outcome outcome;
    Scores scores;
    switch (options_.mode) {
      case Mode::kGenerate: outcome.ending = generate(); break;
      case Mode::kPerplexity: outcome.ending = score(scores); break;
      case Mode::kChat: outcome.ending = chat(); break;
    }
    if (options_.save) session_.save(*options_.save);
    if (log_) write_latency_log(model_, options_, log_->finish());
    outcome.metrics = session_.metrics().report();
    outcome.read_latency = summarise(read_latency_);
    output_.object(options_.mode == Mode::kPerplexity
                       ? perplexity_json(model_, options_, outcome, scores)
                       : report_json(model_, options_, outcome));
    print_report(options_, outcome);
    if (outcome.ending != Ending::kCacheFull) return 0;
    std::cerr << "stream_text: the full cache holds " << options_.cache.capacity
              << " tokens and no more; --capacity raises it, --policy sink-window has no end\n";
    return 1;
  }

 private:
  bool recomputes() const { return options_.cache.policy == sluice::CachePolicy::kRecompute; }

  std::int64_t steps_to_come() const {
    if (options_.mode == Mode::kGenerate) return options_.predict;
    if (options_.mode == Mode::kPerplexity) return options_.read_limit.value_or(-1);
    return -1;
  }

  static double share(std::size_t done, std::span<const sluice::Token> tokens) {
    return static_cast<double>(done) / static_cast<double>(tokens.size());
  }

  /// How many of `wanted` more tokens a full cache has room for; others have room for ever.
  std::int64_t room_for(std::int64_t wanted) const {
    if constexpr (requires { session_.cache().room_behind(0); })
      return std::min(wanted, session_.cache().room_behind(session_.cache().total()));
    if (!options_.cache.is_bounded()) return wanted;
    return std::min(wanted, options_.cache.capacity - session_.cache().total());
  }

  support::TokenSource input() {
    const bool begins = session_.position() == 0;
    if (options_.prompt)
      return {tokenizer_, support::TextSource::from_text(*options_.prompt), begins};
    if (options_.file && *options_.file != "-")
      return {tokenizer_, support::TextSource::from_file(*options_.file), begins};
    if (options_.load && !options_.file)
      return {tokenizer_, support::TextSource::from_text(std::string()), begins};
    if (support::stdin_is_terminal())
      std::cerr << "reading from the terminal; Ctrl-D ends the text\n";
    return {tokenizer_, support::TextSource::from_stdin(), begins};
  }

  /// Reads tokens, a chunk at a time so that Ctrl-C and the progress line come through. False when
  /// a signal was caught. `source`: where they came from, if it knows how far it is.
  bool read(std::span<const sluice::Token> tokens, support::Progress& progress,
            const support::TokenSource* source = nullptr) {
    // A recomputed window is rebuilt at the end of every call: as few calls as possible.
    const auto most = static_cast<std::size_t>(
        recomputes() ? std::numeric_limits<std::int64_t>::max() : session_.cache().max_chunk());
    std::size_t done = 0;
    while (done < tokens.size() && support::caught_signal() == 0) {
      const std::size_t count = std::min(tokens.size() - done, most);
      session_.accept(tokens.subspan(done, count));
      done += count;
      tokens_read_ += static_cast<std::int64_t>(count);
      progress.show(tokens_read_, source == nullptr ? -1 : source->fraction(share(done, tokens)));
    }
    return support::caught_signal() == 0;
  }

  // --- Writing -----------------------------------------------------------------------------------

  /// Writes up to `limit` tokens; for ever if it is below 0.
  Ending write(std::int64_t limit) {
    const auto ends = tokenizer_.end_tokens();
    for (std::int64_t written = 0; limit < 0 || written < limit; ++written) {
      if (support::caught_signal() != 0) return Ending::kSignal;
      const std::int64_t begin = sluice::monotonic_ns();
      const std::optional<sluice::Token> token = session_.step();
      const std::int64_t end = sluice::monotonic_ns();
      if (!token) return Ending::kCacheFull;
      if (log_) log_->record(end - begin);
      piece_.clear();
      detokenizer_.push(*token, piece_);
      output_.token(*token, piece_);
      if (!options_.ignore_eos && std::binary_search(ends.begin(), ends.end(), *token))
        return Ending::kEndToken;
    }
    return Ending::kLimit;
  }

  Ending generate() {
    {
      support::TokenSource source = input();
      support::Progress progress("reading");
      std::vector<sluice::Token> tokens;
      while (source.next(tokens)) {
        if (!read(tokens, progress, &source)) return Ending::kSignal;
        tokens.clear();
      }
      if (support::caught_signal() != 0) return Ending::kSignal;
    }
    begin_empty_stream();
    // On a terminal the text reads on from its prompt; in a pipe it is what the model wrote.
    if (options_.prompt && !output_.json() && support::stdout_is_terminal() &&
        support::stderr_is_terminal())
      std::cerr << *options_.prompt;
    const Ending ending = write(options_.predict);
    output_.text(detokenizer_.finish());
    if (!output_.json() && support::stdout_is_terminal()) support::write_stdout("\n");
    return ending;
  }

  /// A model has to read something before it can write: without any text, its begin token.
  void begin_empty_stream() {
    if (session_.position() > 0) return;
    std::optional<sluice::Token> token = tokenizer_.bos();
    if (!token) token = tokenizer_.eos();
    if (!token)
      throw sluice::Error(sluice::ErrorCode::kText,
                          {"nothing to continue: the input is empty and the model has no begin "
                           "token",
                           "input", "", "some text", "none"});
    session_.accept({&*token, 1});
  }

  // --- Perplexity --------------------------------------------------------------------------------

  Ending score(Scores& scores) {
    const std::int64_t vocab = model_.decoder->config().vocab_size;
    const std::int64_t rows = options_.token_wise || recomputes()
                                  ? 1
                                  : std::min<std::int64_t>(session_.cache().max_chunk(), 32);
    sluice::Buffer<float> memory(static_cast<std::size_t>(rows * vocab));  // [rows, vocab]
    const sluice::MatrixView<float> logits(memory.data(), rows, vocab);

    support::TokenSource source = input();
    support::Progress progress("scoring");
    std::vector<sluice::Token> tokens;
    Ending ending = Ending::kInputEnd;
    Points points{scores, options_.ppl_stride, output_.json()};
    while (ending == Ending::kInputEnd && source.next(tokens)) {
      auto count = static_cast<std::int64_t>(tokens.size());
      if (options_.read_limit && count > *options_.read_limit - scores.position) {
        count = *options_.read_limit - scores.position;
        ending = Ending::kLimit;
      }
      if (const std::int64_t room = room_for(count); room < count) {
        count = room;
        ending = Ending::kCacheFull;
      }
      const std::span<const sluice::Token> run(tokens.data(), static_cast<std::size_t>(count));
      for (std::size_t done = 0; done < run.size();) {
        if (support::caught_signal() != 0) {
          ending = Ending::kSignal;
          break;
        }
        done += score_some(run.subspan(done), logits, points);
        const double fraction = options_.read_limit ? static_cast<double>(scores.position) /
                                                          static_cast<double>(*options_.read_limit)
                                                    : source.fraction(share(done, run));
        if (scores.scored > 0)
          progress.show(scores.position, fraction,
                        ", perplexity " + std::to_string(std::exp(scores.nll_mean())));
      }
      tokens.clear();
    }
    progress.clear();
    if (support::caught_signal() != 0) ending = Ending::kSignal;
    if (scores.scored == 0) {
      if (ending == Ending::kSignal) return ending;
      throw sluice::Error(sluice::ErrorCode::kText,
                          {"nothing to score", "input", "",
                           options_.score_every > 1 ? "more tokens than --score-every " +
                                                          std::to_string(options_.score_every)
                                                    : std::string("at least two tokens"),
                           std::to_string(scores.position)});
    }
    points.finish();
    if (!output_.json()) {
      std::string line = "perplexity " + std::to_string(std::exp(scores.nll_mean())) + " over " +
                         std::to_string(scores.position) + " tokens, " +
                         std::to_string(scores.scored) + " scored";
      if (options_.score_every > 1)
        line += " (every " + std::to_string(options_.score_every) + ".)";
      line += ", " + std::to_string(scores.nll_mean()) + " nats a token\n";
      support::write_stdout(line);
    }
    return ending;
  }

  /// The running average, and its points: tokens, perplexity of all so far, perplexity since the
  /// last point.
  struct Points {
    Scores& scores;
    std::int64_t stride;
    bool silent;
    double recent_sum = 0;
    std::int64_t recent = 0;
    std::int64_t next = stride;

    void add(double nll) {
      scores.nll_sum += nll;
      recent_sum += nll;
      ++scores.scored;
      ++recent;
    }
    /// The stream has `position` tokens now.
    void advance_to(std::int64_t position) {
      scores.position = position;
      if (stride == 0 || position < next || recent == 0) return;
      next = (position / stride + 1) * stride;
      point();
    }
    void finish() {
      if (scores.tokens.empty() || scores.tokens.back() != scores.position) point();
    }
    void point() {
      scores.tokens.push_back(scores.position);
      scores.perplexity.push_back(std::exp(scores.nll_mean()));
      if (!silent && stride > 0 && recent > 0)
        support::write_stdout(
            std::to_string(scores.position) + '\t' + std::to_string(scores.perplexity.back()) +
            '\t' + std::to_string(std::exp(recent_sum / static_cast<double>(recent))) + '\n');
      recent_sum = 0;
      recent = 0;
    }
  };

  /// Reads and scores some of `tokens`; returns how many. A stream's very first token is not
  /// scored: nothing predicts it.
  std::size_t score_some(std::span<const sluice::Token> tokens, sluice::MatrixView<float> logits,
                         Points& points) {
    const std::int64_t position = points.scores.position;
    if (options_.score_every > 1) {
      const std::int64_t every = options_.score_every;
      if (session_.is_ready() && position % every == 0)
        points.add(sluice::negative_log_likelihood(session_.logits(), tokens[0]));
      const auto count =
          std::min(tokens.size(), static_cast<std::size_t>(every - position % every));
      session_.accept(tokens.first(count));
      points.advance_to(position + static_cast<std::int64_t>(count));
      return count;
    }
    constexpr std::size_t kRecomputed = 8;  // each takes as long as a whole window
    const std::size_t most =
        options_.token_wise
            ? 1
            : (recomputes() ? kRecomputed : static_cast<std::size_t>(session_.cache().max_chunk()));
    const std::size_t count = std::min(tokens.size(), most);
    const std::int64_t begin = sluice::monotonic_ns();
    session_.accept_scored(tokens.first(count), logits, [&](std::size_t i, double nll) {
      points.add(nll);
      points.advance_to(position + static_cast<std::int64_t>(i) + 1);
    });
    const std::int64_t duration = sluice::monotonic_ns() - begin;
    points.advance_to(position + static_cast<std::int64_t>(count));
    if (options_.token_wise) {
      read_latency_.record(duration);
      if (log_) log_->record(duration);
    }
    return count;
  }

  // --- Dialogue ----------------------------------------------------------------------------------

  Ending chat() {
    const ChatRounds rounds(tokenizer_, options_.system);
    const bool asks = support::stdin_is_terminal() && support::stderr_is_terminal();
    if (asks) std::cerr << "a line is a message; /reset starts anew, /quit or Ctrl-D ends\n";
    LineReader lines;
    support::Progress progress("reading");
    for (std::int64_t round = 0;;) {
      if (asks) std::cerr << "> " << std::flush;
      const std::optional<std::string> line = lines.next();
      if (support::caught_signal() != 0) return Ending::kSignal;
      if (!line) return Ending::kInputEnd;
      if (*line == "/quit") return Ending::kQuit;
      if (*line == "/reset") {
        session_.reset();
        last_written_ = 0;
        continue;
      }
      if (line->empty()) continue;
      std::vector<sluice::Token> tokens;
      try {
        tokens = session_.position() == 0 ? rounds.first(*line) : rounds.next(*line, last_written_);
      } catch (const sluice::Error& error) {
        // One bad line does not end an endless dialogue.
        if (error.code() != sluice::ErrorCode::kText) throw;
        std::cerr << "stream_text: " << error.what() << '\n';
        continue;
      }
      const std::int64_t before = session_.position();
      if (!read(tokens, progress)) return Ending::kSignal;
      progress.clear();
      detokenizer_ = sluice::StreamingDetokenizer(tokenizer_);
      const Ending ending = write(options_.predict);
      output_.text(detokenizer_.finish());
      if (!output_.json()) support::write_stdout("\n");
      last_written_ = session_.result().value_or(0);
      ++round;
      const auto read_now = static_cast<std::int64_t>(tokens.size());
      output_.object({{"kind", "round"},
                      {"round", round},
                      {"tokens_read", read_now},
                      {"tokens_written", session_.position() - before - read_now},
                      {"ended", to_string(ending)},
                      {"resident_bytes", support::resident_bytes()}});
      if (ending == Ending::kSignal || ending == Ending::kCacheFull) return ending;
    }
  }

  /// Lines of stdin without their line feeds.
  class LineReader {
   public:
    std::optional<std::string> next() {
      std::size_t end = buffer_.find('\n');
      while (end == std::string::npos && source_.read(buffer_)) end = buffer_.find('\n');
      if (end == std::string::npos && buffer_.empty()) return std::nullopt;
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end == std::string::npos ? end : end + 1);
      if (line.ends_with('\r')) line.pop_back();
      return line;
    }

   private:
    support::TextSource source_ = support::TextSource::from_stdin();
    std::string buffer_;
  };

  const sluice::LoadedModel& model_;
  const Options& options_;
  const sluice::Tokenizer& tokenizer_;
  Session session_;
  Output output_;
  sluice::StreamingDetokenizer detokenizer_;
  std::optional<StepLog> log_;
  sluice::LatencyHistogram read_latency_;
  std::string piece_;
  std::int64_t tokens_read_ = 0;
  sluice::Token last_written_ = 0;  // of the last reply
};

}  // namespace stream_text
