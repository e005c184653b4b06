// SPDX-License-Identifier: MIT
#include "units.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include "sluice/core/error.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

namespace {

constexpr std::string_view kWhite = " \t\n\r\v\f";

bool is_white(char character) {
  return kWhite.find(character) != std::string_view::npos;
}

std::size_t sentence_end(std::string_view text, std::size_t begin) {
  static constexpr std::array<std::string_view, 3> kFullWidth{"\xE3\x80\x82", "\xEF\xBC\x81",
                                                              "\xEF\xBC\x9F"};
  static constexpr std::array<std::string_view, 6> kClosing{"\"",           "'",           ")", "]",
                                                            "\xE2\x80\x9D", "\xE2\x80\x99"};
  for (std::size_t at = begin; at < text.size(); ++at) {
    const std::string_view rest = text.substr(at);
    for (const std::string_view mark : kFullWidth)
      if (rest.starts_with(mark)) return at + mark.size();
    if (rest.starts_with("\n\n")) return at + 2;
    if (rest.starts_with("\n\r\n")) return at + 3;
    if (std::string_view(".!?").find(text[at]) == std::string_view::npos) continue;
    std::size_t end = at + 1;
    for (bool more = true; more;) {
      more = false;
      for (const std::string_view mark : kClosing)
        if (text.substr(end).starts_with(mark)) {
          end += mark.size();
          more = true;
        }
    }
    if (end < text.size() && is_white(text[end])) return end;
  }
  return std::string_view::npos;
}

std::int64_t count_words(std::string_view text) {
  std::int64_t words = 0;
  bool inside = false;
  for (const char character : text) {
    const bool white = is_white(character);
    words += !white && !inside ? 1 : 0;
    inside = !white;
  }
  return words;
}

[[noreturn]] void fail(const char* what) {
  throw sluice::Error(sluice::ErrorCode::kIo,
                      {what, "wakeup", "", "success", std::generic_category().message(errno)});
}

}  // namespace

Wakeup::Wakeup() {
  if (::pipe2(descriptors_, O_CLOEXEC | O_NONBLOCK) != 0) fail("pipe failed");
}

Wakeup::~Wakeup() {
  for (const int descriptor : descriptors_) ::close(descriptor);
}

void Wakeup::raise() noexcept {
  [[maybe_unused]] const ssize_t written = ::write(descriptors_[1], "x", 1);  // full: raised before
}

bool Wakeup::wait(int descriptor, int timeout_ms) const {
  std::array<pollfd, 2> files{pollfd{descriptors_[0], POLLIN, 0}, pollfd{descriptor, POLLIN, 0}};
  for (;;) {
    const int ready = ::poll(files.data(), descriptor < 0 ? 1 : 2, timeout_ms);
    if (ready < 0 && errno != EINTR) fail("poll failed");
    if (support::caught_signal() != 0 || (ready > 0 && files[0].revents != 0)) return false;
    if (ready >= 0) return true;
  }
}

std::size_t unit_end(std::string_view text, UnitKind kind) {
  const std::size_t begin = text.find_first_not_of(kWhite);
  if (begin == std::string_view::npos) return begin;
  switch (kind) {
    case UnitKind::kWord: return text.find_first_of(kWhite, begin);
    case UnitKind::kLine: {
      const std::size_t feed = text.find('\n', begin);
      return feed == std::string_view::npos ? feed : feed + 1;
    }
    case UnitKind::kSentence: return sentence_end(text, begin);
  }
  return std::string_view::npos;
}

UnitReader::UnitReader(const sluice::Tokenizer& tokenizer, support::TextSource source,
                       UnitKind kind, std::int64_t max_tokens, const Wakeup& wakeup)
    : tokenizer_(&tokenizer),
      source_(std::move(source)),
      kind_(kind),
      max_tokens_(static_cast<std::size_t>(max_tokens)),
      wakeup_(&wakeup) {}

bool UnitReader::next(SourceUnit& unit) {
  if (given_ == current_.tokens.size() && !read_unit()) return false;
  const bool first = given_ == 0;
  const std::size_t count = std::min(max_tokens_, current_.tokens.size() - given_);
  const auto begin = current_.tokens.begin() + static_cast<std::ptrdiff_t>(given_);
  unit.text = first ? current_.text : std::string();
  unit.words = first ? current_.words : 0;
  unit.tokens.assign(begin, begin + static_cast<std::ptrdiff_t>(count));
  given_ += count;
  return true;
}

bool UnitReader::read_unit() {
  for (;;) {
    std::size_t end = unit_end(waiting_, kind_);
    while (end == std::string::npos && !ended_) {
      if (waiting_.size() >= kLongestText) {
        end = support::whole_characters(waiting_);
        break;
      }
      if (!wakeup_->wait(source_.descriptor(), -1)) return false;
      ended_ = !source_.read(waiting_);
      if (support::caught_signal() != 0) return false;
      end = unit_end(waiting_, kind_);
    }
    // At the end of the source the rest is a unit, unless it is white space alone.
    if (end == std::string::npos) end = waiting_.size();
    const std::string_view text = std::string_view(waiting_).substr(0, end);
    support::require_utf8(text, source_.name(), bytes_done_);
    const bool empty = text.find_first_not_of(kWhite) == std::string_view::npos;
    if (empty && ended_ && end == waiting_.size()) return false;
    // The space that the tokeniser puts in front of a text is there in front of a later unit.
    std::string_view part = text;
    if (bytes_done_ > 0 && tokenizer_->drops_leading_space() && part.starts_with(' '))
      part.remove_prefix(1);
    current_.tokens = tokenizer_->encode(part, {.add_special = false});
    current_.text = text;
    current_.words = count_words(text);
    given_ = 0;
    bytes_done_ += static_cast<std::int64_t>(end);
    waiting_.erase(0, end);
    if (!current_.tokens.empty()) return true;
  }
}

std::int64_t count_tokens(const sluice::Tokenizer& tokenizer, const std::string& file,
                          UnitKind kind) {
  const Wakeup never;
  UnitReader reader(tokenizer, support::TextSource::from_file(file), kind,
                    std::numeric_limits<std::int32_t>::max(), never);
  std::int64_t tokens = 0;
  for (SourceUnit unit; reader.next(unit);) tokens += static_cast<std::int64_t>(unit.tokens.size());
  return tokens;
}

}  // namespace duplex_text
