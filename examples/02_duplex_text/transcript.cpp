// SPDX-License-Identifier: MIT
#include "transcript.hpp"

#include <algorithm>
#include <utility>

#include "sluice/stream/policy.hpp"
#include "steering.hpp"

namespace duplex_text {

Transcript::Transcript(const sluice::Tokenizer& tokenizer)
    : tokenizer_(&tokenizer),
      classes_(word_classes(tokenizer)),
      final_(tokenizer),
      tail_(tokenizer) {}

Written Transcript::add(const sluice::DuplexOutput& output) {
  using Kind = sluice::DuplexOutput::Kind;
  Written written;
  written.output = output;
  written.index = tokens_;
  text_.clear();
  confirmed_.clear();
  const auto provisional = static_cast<std::int64_t>(provisional_.size());
  const auto count = std::min(output.count, provisional);
  switch (output.kind) {
    case Kind::kFinal: make_final(output.token, output.units_read); break;
    case Kind::kProvisional:
      written.index += provisional;
      if (provisional_.empty()) tail_ = final_;
      provisional_.push_back(output.token);
      tail_.push(output.token, text_);
      provisional_text_ += text_;
      break;
    case Kind::kConfirmed:
      for (std::int64_t i = 0; i < count; ++i)
        make_final(provisional_[static_cast<std::size_t>(i)], output.units_read);
      provisional_.erase(provisional_.begin(), provisional_.begin() + count);
      break;
    case Kind::kRetracted:
      written.index += provisional - count;
      provisional_.erase(provisional_.end() - count, provisional_.end());
      break;
  }
  if (output.kind == Kind::kConfirmed || output.kind == Kind::kRetracted) {
    tail_ = final_;
    provisional_text_.clear();
    for (const sluice::Token token : provisional_) tail_.push(token, provisional_text_);
  }
  written.text = text_;
  written.tokens = confirmed_;
  written.provisional = provisional_text_;
  return written;
}

std::string Transcript::finish() {
  end_word();
  return final_.finish();
}

void Transcript::make_final(sluice::Token token, std::int64_t units_read) {
  confirmed_.push_back(token);
  final_.push(token, text_);
  ++tokens_;
  const auto index = static_cast<std::size_t>(token);
  if (index < classes_.size() && (classes_[index] & sluice::WordUnits::kStartsWord) != 0)
    end_word();
  word_delay_ = units_read;
}

void Transcript::end_word() {
  const std::int64_t delay = std::exchange(word_delay_, -1);
  if (delay < 0) return;
  ++words_;
  if (delays_.size() < kMostWords) delays_.push_back(delay);
}

}  // namespace duplex_text
