// SPDX-License-Identifier: MIT
#include "support/text_source.hpp"

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sluice/core/error.hpp"
#include "support/terminal.hpp"

namespace support {

namespace {

constexpr std::size_t kReadBytes = std::size_t{1} << 16;

[[noreturn]] void fail(const char* what, const std::string& name) {
  throw sluice::Error(sluice::ErrorCode::kIo,
                      {what, name, "", "success", std::generic_category().message(errno)});
}

/// Printable ASCII other than the space: no part of a character that could be white space.
bool is_solid(char character) {
  return character > ' ' && character < '\x7f';
}

bool is_continuation(char character) {
  return (static_cast<unsigned char>(character) & 0xC0U) == 0x80U;
}

/// The last place at or after `first` where `text` may be cut, or 0. `adds_space`: the tokeniser
/// puts a space in front of a text, some of them only if none is there.
std::size_t last_cut(std::string_view text, std::size_t first, bool adds_space) {
  for (std::size_t at = text.size(); at-- > std::max<std::size_t>(first, 1);) {
    if (text[at] == ' ' && is_solid(text[at - 1]) &&
        (!adds_space || (at + 1 < text.size() && is_solid(text[at + 1]))))
      return at;
    if (!adds_space && at >= 2 && is_solid(text[at]) && text[at - 1] == '\n' &&
        is_solid(text[at - 2]))
      return at;
  }
  return 0;
}

/// Where `text` stops being UTF-8 (RFC 3629), or npos.
std::size_t invalid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at]);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if ((lead >= 0x80 && lead < 0xC2) || lead > 0xF4 || length > text.size() - at) return at;
    for (std::size_t i = 1; i < length; ++i)
      if (!is_continuation(text[at + i])) return at;
    if (length > 2) {
      // Overlong forms, surrogates and numbers beyond U+10FFFF show in the second byte.
      const auto second = static_cast<unsigned char>(text[at + 1]);
      if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
          (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F))
        return at;
    }
    at += length;
  }
  return std::string_view::npos;
}

}  // namespace

std::size_t whole_characters(std::string_view text) {
  std::size_t at = text.size();
  while (at > 0 && text.size() - at < 4 && is_continuation(text[at - 1])) --at;
  return at > 0 && static_cast<unsigned char>(text[at - 1]) >= 0xC0U ? at - 1 : text.size();
}

void require_utf8(std::string_view text, const std::string& source, std::int64_t offset) {
  const std::size_t invalid = invalid_utf8(text);
  if (invalid == std::string_view::npos) return;
  throw sluice::Error(
      sluice::ErrorCode::kText,
      {"text is not valid UTF-8", source,
       "byte " + std::to_string(offset + static_cast<std::int64_t>(invalid)), "valid UTF-8",
       "a byte of value " + std::to_string(static_cast<unsigned char>(text[invalid]))});
}

TextSource TextSource::from_text(std::string text) {
  TextSource source("the prompt", -1, false);
  source.total_bytes_ = static_cast<std::int64_t>(text.size());
  source.text_ = std::move(text);
  return source;
}

TextSource TextSource::from_file(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail("open failed", path.empty() ? "''" : path);
  TextSource source(path, descriptor, true);
  struct stat status {};
  if (::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0)
    source.total_bytes_ = status.st_size;
  return source;
}

TextSource TextSource::from_stdin() {
  return {"stdin", STDIN_FILENO, false};
}

TextSource::TextSource(TextSource&& other) noexcept
    : name_(std::move(other.name_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      owns_(std::exchange(other.owns_, false)),
      text_(std::move(other.text_)),
      total_bytes_(other.total_bytes_),
      bytes_read_(other.bytes_read_) {}

TextSource::~TextSource() {
  if (owns_) ::close(descriptor_);
}

bool TextSource::read(std::string& out) {
  if (descriptor_ < 0) {
    out += text_;
    bytes_read_ += static_cast<std::int64_t>(text_.size());
    return !std::exchange(text_, std::string()).empty();
  }
  const std::size_t old_size = out.size();
  out.resize(old_size + kReadBytes);
  ssize_t count = -1;
  while (caught_signal() == 0) {
    // A signal that comes before the read, or to another thread, interrupts none.
    constexpr int kAskMs = 100;
    pollfd waiting{descriptor_, POLLIN, 0};
    if (::poll(&waiting, 1, kAskMs) <= 0) continue;
    count = ::read(descriptor_, out.data() + old_size, kReadBytes);
    if (count >= 0 || errno != EINTR) break;
  }
  const int error = errno;
  out.resize(old_size + static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
  if (count < 0 && caught_signal() == 0) {
    errno = error;
    fail("read failed", name_);
  }
  bytes_read_ += std::max<ssize_t>(count, 0);
  return count > 0;
}

TokenSource::TokenSource(const sluice::Tokenizer& tokenizer, TextSource source, bool begins)
    : tokenizer_(&tokenizer),
      source_(std::move(source)),
      wants_bos_(begins && tokenizer.adds_bos()) {}

bool TokenSource::next(std::vector<sluice::Token>& tokens) {
  const std::size_t old_size = tokens.size();
  bytes_before_ = bytes_done_;
  if (std::exchange(wants_bos_, false)) tokens.push_back(*tokenizer_->bos());
  while (tokens.size() == old_size && !ended_) {
    if (!source_.read(waiting_) || source_.exhausted()) {
      ended_ = true;
      if (caught_signal() == 0) encode(std::exchange(waiting_, std::string()), tokens);
      break;
    }
    std::size_t cut = last_cut(waiting_, searched_, tokenizer_->drops_leading_space());
    if (cut == 0 && waiting_.size() >= kLongestPart) cut = whole_characters(waiting_);
    // The last two bytes are searched again: what comes next decides about them.
    searched_ = cut == 0 ? std::max<std::size_t>(waiting_.size(), 2) - 2 : 0;
    if (cut == 0) continue;
    encode(std::string_view(waiting_).substr(0, cut), tokens);
    waiting_.erase(0, cut);
  }
  return tokens.size() > old_size;
}

void TokenSource::encode(std::string_view text, std::vector<sluice::Token>& tokens) {
  require_utf8(text, source_.name(), bytes_done_);
  // The space that the tokeniser puts in front of a text is there in front of a later part.
  std::string_view part = text;
  if (bytes_done_ > 0 && tokenizer_->drops_leading_space() && part.starts_with(' '))
    part.remove_prefix(1);
  bytes_done_ += static_cast<std::int64_t>(text.size());
  const std::vector<sluice::Token> encoded = tokenizer_->encode(part, {.add_special = false});
  tokens.insert(tokens.end(), encoded.begin(), encoded.end());
}

double TokenSource::fraction(double part) const {
  if (source_.total_bytes() <= 0) return -1;
  const double bytes =
      static_cast<double>(bytes_before_) + part * static_cast<double>(bytes_done_ - bytes_before_);
  return bytes / static_cast<double>(source_.total_bytes());
}

}  // namespace support
