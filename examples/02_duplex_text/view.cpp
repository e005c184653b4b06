// SPDX-License-Identifier: MIT
#include "view.hpp"

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "panes.hpp"
#include "sluice/stream/clock.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

namespace {

using Kind = sluice::DuplexOutput::Kind;

class JsonView : public View {
 public:
  explicit JsonView(std::int64_t start_ns) : start_ns_(start_ns) {}

  void fed(const FedUnit& unit) override {
    constexpr const char* kKinds[] = {"prompt", "source", "closing"};
    line({{"kind", "fed"},
          {"unit", unit.unit},
          {"part", kKinds[static_cast<int>(unit.kind)]},
          {"tokens", unit.tokens},
          {"text", unit.text},
          {"time_ms", ms(unit.time_ns)}});
  }
  void read(std::int64_t units, std::int64_t tokens, std::int64_t time_ns) override {
    line({{"kind", "read"},
          {"units_read", units},
          {"tokens_read", tokens},
          {"time_ms", ms(time_ns)}});
  }
  void written(const Written& w) override {
    sluice::Json object;
    switch (w.output.kind) {
      case Kind::kFinal:
      case Kind::kProvisional:
        object = {{"kind", w.output.kind == Kind::kFinal ? "token" : "provisional"},
                  {"index", w.index},
                  {"token", w.output.token},
                  {"text", w.text}};
        break;
      case Kind::kConfirmed:
        object = {{"kind", "confirmed"},
                  {"index", w.index},
                  {"count", w.output.count},
                  {"tokens", std::vector<sluice::Token>(w.tokens.begin(), w.tokens.end())},
                  {"text", w.text}};
        break;
      case Kind::kRetracted:
        object = {{"kind", "retracted"}, {"index", w.index}, {"count", w.output.count}};
        break;
    }
    object["units_read"] = w.output.units_read;
    object["tokens_read"] = w.output.tokens_read;
    object["time_ms"] = ms(w.output.time_ns);
    line(object);
  }
  void end(std::string_view rest, std::string_view reason, std::int64_t time_ns) override {
    line({{"kind", "end"}, {"reason", reason}, {"text", rest}, {"time_ms", ms(time_ns)}});
  }
  void report(const sluice::Json& report) override { line(report); }

 private:
  double ms(std::int64_t time_ns) const { return static_cast<double>(time_ns - start_ns_) * 1e-6; }
  static void line(const sluice::Json& object) {
    support::write_stdout(object.dump(-1, ' ', false, sluice::Json::error_handler_t::replace) +
                          "\n");
  }

  std::int64_t start_ns_;
};

/// Final text on stdout. The source's echo and a line of progress on stderr, unless stdout is the
/// same terminal.
class PlainView : public View {
 public:
  PlainView()
      : echoes_(!support::stdout_is_terminal()), progress_(echoes_ ? "reading and writing" : "") {}

  void fed(const FedUnit& unit) override {
    if (!echoes_ || unit.text.empty()) return;
    progress_.clear();
    std::string line = "source   ";
    for (const char character : unit.text)
      line += character == '\n' || character == '\r' ? ' ' : character;
    std::cerr << line + "\n" << std::flush;
  }
  void read(std::int64_t units, std::int64_t, std::int64_t) override { units_read_ = units; }
  void written(const Written& w) override {
    if (w.output.kind == Kind::kFinal || w.output.kind == Kind::kConfirmed) {
      support::write_stdout(w.text);
      tokens_ += w.output.count;
    }
    if (echoes_) progress_.show(tokens_, -1, ", " + std::to_string(units_read_) + " units read");
  }
  void end(std::string_view rest, std::string_view, std::int64_t) override {
    progress_.clear();
    support::write_stdout(rest);
    if (!echoes_) support::write_stdout("\n");
  }

 private:
  bool echoes_;
  support::Progress progress_;
  std::int64_t units_read_ = 0;
  std::int64_t tokens_ = 0;
};

class PaneView : public View {
 public:
  explicit PaneView(bool types) : panes_(types) {}

  void fed(const FedUnit& unit) override {
    panes_.add_source(std::string(unit.text) +
                      (unit.kind == FedUnit::Kind::kPrompt && !unit.text.empty() ? "\n" : ""));
    panes_.draw(false);
  }
  void read(std::int64_t units, std::int64_t, std::int64_t) override { panes_.read(units); }
  void written(const Written& w) override {
    if (w.output.kind == Kind::kFinal || w.output.kind == Kind::kConfirmed) {
      panes_.add_target(w.text);
      tokens_ += w.output.count;
    }
    panes_.set_provisional(w.provisional, tokens_);
    panes_.draw(false);
  }
  void tick() override { panes_.draw(false); }
  void end(std::string_view rest, std::string_view, std::int64_t) override {
    panes_.add_target(rest);
    panes_.set_provisional({}, tokens_);
    panes_.close();
  }

 private:
  Panes panes_;
  std::int64_t tokens_ = 0;
};

}  // namespace

std::unique_ptr<View> make_view(const Options& options, std::int64_t start_ns) {
  if (options.json) return std::make_unique<JsonView>(start_ns);
  const char* const terminal = std::getenv("TERM");
  const bool draws = support::stdout_is_terminal() && terminal != nullptr &&
                     std::string_view(terminal) != "dumb" && std::string_view(terminal) != "";
  if (draws && !options.plain)
    return std::make_unique<PaneView>(!options.file && support::stdin_is_terminal());
  return std::make_unique<PlainView>();
}

}  // namespace duplex_text
