// SPDX-License-Identifier: MIT
/// The lag measures of simultaneous translation and recognition in any unit (words, milliseconds),
/// without and with the time that computing took, for one sentence and for a stream of them. As
/// SimulEval and StreamLAAL's scripts define them; lagging.hpp has AL and LAAL in whole units.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/core/error.hpp"

namespace sluice {

/// Lags of one output, in the unit of the delays (average_proportion: none). NaN where the inputs
/// define no value: without any output, without a source, without a reference.
struct LagScores {
  double average_proportion = std::numeric_limits<double>::quiet_NaN();   ///< AP
  double average_lagging = std::numeric_limits<double>::quiet_NaN();      ///< AL
  double length_adaptive = std::numeric_limits<double>::quiet_NaN();      ///< LAAL
  double differentiable = std::numeric_limits<double>::quiet_NaN();       ///< DAL
  double average_token_delay = std::numeric_limits<double>::quiet_NaN();  ///< ATD
  double start_offset = std::numeric_limits<double>::quiet_NaN();         ///< the first delay
  double end_offset = std::numeric_limits<double>::quiet_NaN();  ///< the last delay less the source
  /// The last delay over the source: what SimulEval calls its real-time factor. Not compute time
  /// over audio time, which goes by that name elsewhere.
  double last_delay_ratio = std::numeric_limits<double>::quiet_NaN();
};

/// What the source of an output is, for ATD: how long the tokens are that it is cut into.
enum class LagSource : std::uint8_t {
  kWords,         ///< delays count words: source tokens and target tokens take one each
  kMilliseconds,  ///< delays are ms of audio: source tokens of 300 ms, target tokens of none
};

/// AL and LAAL's sum: the mean of d_i - (i - 1) * slope, i = 1, 2, ..., up to the first output with
/// d_i >= source, that one included.
inline double mean_lag(std::span<const double> delays, double source, double slope) {
  if (delays.empty()) return std::numeric_limits<double>::quiet_NaN();
  if (delays.front() > source) return delays.front();
  double sum = 0;
  for (std::size_t i = 0; i < delays.size(); ++i) {
    sum += delays[i] - static_cast<double>(i) * slope;
    if (delays[i] >= source) return sum / static_cast<double>(i + 1);
  }
  return sum / static_cast<double>(delays.size());
}

namespace detail {

/// ATD (Kano et al., arXiv 2211.13173) as SimulEval computes it. Output t is paired with a source
/// token: the t-th, held back where earlier chunks wrote more than they had read, and at most the
/// last one read. It lasts from the later of its delay and the output before it, for the time that
/// it takes up itself and, with computing, took to compute.
inline double average_token_delay(std::span<const double> delays, std::span<const double> elapsed,
                                  LagSource source) {
  const bool words = source == LagSource::kWords;
  const double source_token = words ? 1 : 300;
  const double target_token = words ? 1 : 0;
  double sum = 0;
  double read = 0;          // delay of the chunk: the source up to here is cut into tokens
  double read_before = 0;   // of the chunk before
  std::int64_t tokens = 0;  // source tokens up to and with this chunk
  std::int64_t tokens_before = 0;
  std::int64_t outputs_before = 0;  // outputs of earlier chunks
  double target_end = 0;
  double computing = 0;  // up to the output before
  // End of source token s (1-based): whole tokens within each chunk, the remainder last.
  std::vector<double> token_ends{0.0};
  for (std::size_t i = 0; i < delays.size(); ++i) {
    if (i == 0 || delays[i] != delays[i - 1]) {
      outputs_before = static_cast<std::int64_t>(i);
      tokens_before = tokens;
      read_before = read;
      read = delays[i];
      double end = read_before;
      while (end < read) {
        end = std::min(end + source_token, read);
        token_ends.push_back(end);
        ++tokens;
      }
    }
    const double own = elapsed.empty() ? 0 : elapsed[i] - delays[i] - computing;
    computing += own;
    target_end = std::max(delays[i], target_end) + target_token + own;
    const std::int64_t ahead = std::max<std::int64_t>(0, outputs_before - tokens_before);
    const std::int64_t paired = std::min(static_cast<std::int64_t>(i) + 1 - ahead, tokens);
    sum += target_end - token_ends[static_cast<std::size_t>(std::max<std::int64_t>(paired, 0))];
  }
  return sum / static_cast<double>(delays.size());
}

}  // namespace detail

/// The measures of one output. delays: [outputs], d_i is the source read when output i was emitted,
/// never falling. elapsed: empty, or [outputs]: the same with the time that all computing up to
/// then took, and then the measures are the computation-aware ones. source: the source's length, in
/// the same unit. reference_length: of the reference, in outputs; 0: there is none, and the output
/// stands for it. Allocates for ATD. \throws Error(kShape) if elapsed has another length.
inline LagScores lag_scores(std::span<const double> delays, std::span<const double> elapsed,
                            double source, std::int64_t reference_length, LagSource unit) {
  if (!elapsed.empty() && elapsed.size() != delays.size())
    throw Error(ErrorCode::kShape, {"one time for each output", "lag_scores", "elapsed",
                                    std::to_string(delays.size()), std::to_string(elapsed.size())});
  LagScores scores;
  if (delays.empty() || !(source > 0)) return scores;
  const std::span<const double> times = elapsed.empty() ? delays : elapsed;
  const auto written = static_cast<double>(delays.size());
  const auto reference = reference_length > 0 ? static_cast<double>(reference_length) : written;
  double sum = 0;
  for (const double time : times) sum += time;
  scores.average_proportion = sum / (source * reference);
  scores.average_lagging = mean_lag(times, source, source / reference);
  scores.length_adaptive = mean_lag(times, source, source / std::max(written, reference));
  const double step = source / written;
  double spread = 0;
  double lag = 0;
  for (std::size_t i = 0; i < times.size(); ++i) {
    spread = i == 0 ? times[i] : std::max(times[i], spread + step);
    lag += spread - static_cast<double>(i) * step;
  }
  scores.differentiable = lag / written;
  scores.average_token_delay = detail::average_token_delay(delays, elapsed, unit);
  scores.start_offset = times.front();
  scores.end_offset = times.back() - source;
  scores.last_delay_ratio = times.back() / source;
  return scores;
}

/// Where the output of a whole stream parts into the sentences of a reference: the cut with the
/// least edit distance between words (insertions, deletions and substitutions cost 1 each), as
/// mwerSegmenter does it (Matusov et al., IWSLT 2005). Sentence s is output words
/// [cuts[s], cuts[s + 1]); cuts begins with 0 and ends with the number of output words. Of equally
/// good cuts the one that gives words between two sentences to the earlier. Time and memory:
/// product of the lengths (one byte each).
inline std::vector<std::size_t> resegment(std::span<const std::string> output,
                                          std::span<const std::vector<std::string>> reference) {
  std::vector<const std::string*> words;
  std::vector<std::size_t> ends;  // in words
  for (const std::vector<std::string>& sentence : reference) {
    for (const std::string& word : sentence) words.push_back(&word);
    ends.push_back(words.size());
  }
  const std::size_t rows = output.size() + 1;
  const std::size_t cols = words.size() + 1;
  enum Step : std::uint8_t { kMatch, kInsertion, kDeletion };
  std::vector<std::uint8_t> steps(rows * cols, kMatch);
  std::vector<std::size_t> cost(cols);
  for (std::size_t j = 0; j < cols; ++j) {
    cost[j] = j;
    steps[j] = kDeletion;
  }
  for (std::size_t i = 1; i < rows; ++i) {
    std::size_t diagonal = cost[0];
    cost[0] = i;
    steps[i * cols] = kInsertion;
    for (std::size_t j = 1; j < cols; ++j) {
      const std::size_t above = cost[j];
      // Ties: an insertion as late as the path allows belongs to the earlier sentence.
      std::size_t best = above + 1;
      std::uint8_t step = kInsertion;
      if (const std::size_t match = diagonal + (output[i - 1] == *words[j - 1] ? 0 : 1);
          match < best) {
        best = match;
        step = kMatch;
      }
      if (cost[j - 1] + 1 < best) {
        best = cost[j - 1] + 1;
        step = kDeletion;
      }
      diagonal = above;
      cost[j] = best;
      steps[i * cols + j] = step;
    }
  }
  std::vector<std::size_t> cuts(reference.size() + 1);
  std::size_t i = output.size();
  std::size_t j = words.size();
  std::size_t sentence = reference.size();
  // Backwards: the first row met in a sentence's last column is where it ends.
  while (sentence > 0) {
    if (j == ends[sentence - 1]) {
      cuts[sentence--] = i;
      continue;
    }
    switch (steps[i * cols + j]) {
      case kMatch: --i, --j; break;
      case kInsertion: --i; break;
      default: --j; break;
    }
  }
  if (!cuts.empty()) cuts.front() = 0;
  return cuts;
}

/// One reference sentence of a stream, in milliseconds of audio.
struct StreamSentence {
  double start = 0;                  ///< where it begins in the stream
  double length = 0;                 ///< of its audio
  std::int64_t reference_words = 0;  ///< of its reference
  std::size_t first_output = 0;      ///< its words of the output: [first_output, end_output)
  std::size_t end_output = 0;
};

/// The mean over sentences, those without output left out.
struct StreamLag {
  double laal = std::numeric_limits<double>::quiet_NaN();
  double laal_with_computing = std::numeric_limits<double>::quiet_NaN();
  std::int64_t sentences = 0;  ///< that had output
};

/// StreamLAAL (Papi et al., arXiv 2406.06097): LAAL of each sentence from its own start, and the
/// mean. delays, elapsed: [outputs of the stream] in ms since its start, elapsed with all computing
/// so far (empty: not measured); computing of earlier outputs is taken out of each sentence as the
/// script does. clamp: a word written before its sentence began has lag 0 (the released script);
/// otherwise it is negative (simulstream). Allocates.
/// \throws Error(kShape) for sentences outside the output.
inline StreamLag stream_laal(std::span<const double> delays, std::span<const double> elapsed,
                             std::span<const StreamSentence> sentences, bool clamp = true) {
  if (!elapsed.empty() && elapsed.size() != delays.size())
    throw Error(ErrorCode::kShape, {"one time for each output", "stream_laal", "elapsed",
                                    std::to_string(delays.size()), std::to_string(elapsed.size())});
  // Elapsed times count the computing of the whole talk: what an output took by itself remains.
  std::vector<double> corrected;
  for (std::size_t i = 0; i < elapsed.size(); ++i) {
    if (i == 0)
      corrected.push_back(elapsed[0]);
    else if (elapsed[i] == elapsed[i - 1])
      corrected.push_back(corrected[i - 1] - delays[i - 1] + delays[i]);
    else
      corrected.push_back(elapsed[i] - elapsed[i - 1] + delays[i - 1]);
  }
  StreamLag result;
  double sum = 0;
  double sum_with_computing = 0;
  std::vector<double> own;
  for (const StreamSentence& sentence : sentences) {
    if (sentence.first_output > sentence.end_output || sentence.end_output > delays.size())
      throw Error(ErrorCode::kShape, {"a sentence outside the output", "stream_laal", "end_output",
                                      "at most " + std::to_string(delays.size()),
                                      std::to_string(sentence.end_output)});
    const std::size_t count = sentence.end_output - sentence.first_output;
    if (count == 0) continue;
    const auto longest =
        std::max(static_cast<double>(count), static_cast<double>(sentence.reference_words));
    const auto of = [&](std::span<const double> times) {
      own.clear();
      for (const double time : times.subspan(sentence.first_output, count))
        own.push_back(clamp ? std::max(time - sentence.start, 0.0) : time - sentence.start);
      return mean_lag(own, sentence.length, sentence.length / longest);
    };
    sum += of(delays);
    if (!corrected.empty()) sum_with_computing += of(corrected);
    ++result.sentences;
  }
  if (result.sentences == 0) return result;
  result.laal = sum / static_cast<double>(result.sentences);
  if (!corrected.empty())
    result.laal_with_computing = sum_with_computing / static_cast<double>(result.sentences);
  return result;
}

}  // namespace sluice
