// SPDX-License-Identifier: MIT
/// Pages of a fixed number of tokens, shared between streams: who holds which page, which tokens
/// full pages hold, and the table that leads one stream through its pages (PagedAttention, arXiv
/// 2309.06180). Bookkeeping alone: it knows pages and slots, no keys.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

inline constexpr std::int32_t kNoPage = -1;

/// A page whose tokens are known, as long as it holds them: a page that is used anew gets another
/// generation.
struct NamedPage {
  std::int32_t page = kNoPage;
  std::uint32_t generation = 0;
};

/// Pages with reference counts, and an index of full pages by their tokens and by the page before
/// them. A page whose last holder lets go is free, yet found by its tokens until it is used anew.
/// Only construction allocates. One thread at a time.
class PagePool {
 public:
  /// \throws Error(kConfig) unless there is a page, a page has a token, and slots number below
  /// 2^31.
  PagePool(std::int64_t num_pages, std::int64_t page_size)
      : page_size_(page_size), free_pages_(num_pages) {
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    const auto fail = [](const char* field, std::int64_t found) {
      throw Error(ErrorCode::kConfig,
                  {"page store does not fit", "PagePool", field,
                   "at least 1, fewer than 2^31 tokens in all", std::to_string(found)});
    };
    if (page_size < 1 || page_size >= kMost) fail("page_size", page_size);
    if (num_pages < 1 || num_pages >= kMost / page_size) fail("num_pages", num_pages);
    pages_.resize(static_cast<std::size_t>(num_pages));
    tokens_.resize(static_cast<std::size_t>(num_pages * page_size));
    std::size_t buckets = 1;
    while (buckets < 2 * pages_.size()) buckets *= 2;
    buckets_.assign(buckets, kNoPage);
  }

  std::int64_t num_pages() const { return static_cast<std::int64_t>(pages_.size()); }
  std::int64_t page_size() const { return page_size_; }
  std::int64_t free_pages() const { return free_pages_; }
  /// Tables that hold the page.
  std::int32_t references(std::int32_t page) const { return at(page).references; }
  /// Pages of the longest run of free ones.
  std::int64_t longest_free_run() const { return longest_run().count; }

  /// Takes a free page, for one holder; kNoPage if there is none. The one behind `previous` if it
  /// is free, so that tables become few runs; else one with `wanted` free pages from it on, if any
  /// has that many, far from where others grow. O(1), or O(pages).
  std::int32_t acquire(std::int32_t previous, std::int64_t wanted = 1) {
    if (free_pages_ == 0) return kNoPage;
    std::int32_t page = previous + 1;
    if (previous == kNoPage || page >= num_pages() || at(page).references != 0) {
      const Run run = longest_run();
      // The page before a long run may be the end of a table that grows into it: leave it half.
      const std::int64_t half = run.first == 0 || run.count < kLongRun ? 0 : run.count / 2;
      page = static_cast<std::int32_t>(run.first + (run.count - half >= wanted ? half : 0));
    }
    take(page);
    return page;
  }
  /// Takes `count` free pages one behind the other, for one holder; kNoPage if there is no such
  /// run.
  std::int32_t acquire_run(std::int64_t count) {
    const Run run = longest_run();
    if (run.count < count || count < 1) return kNoPage;
    for (std::int64_t i = 0; i < count; ++i) take(static_cast<std::int32_t>(run.first + i));
    return static_cast<std::int32_t>(run.first);
  }
  /// One more holder. A free page whose tokens are still known comes back to life.
  void retain(std::int32_t page) {
    if (at(page).references++ == 0) --free_pages_;
  }
  /// One holder fewer.
  void release(std::int32_t page) {
    SLUICE_ASSERT(at(page).references > 0);
    if (--at(page).references == 0) ++free_pages_;
  }

  /// The page that holds these tokens behind the page `parent` ({} at a stream's start); no page if
  /// there is none. tokens: [page_size]. Hashes find it, comparison of the tokens decides.
  NamedPage find(NamedPage parent, std::span<const Token> tokens) const {
    SLUICE_ASSERT(static_cast<std::int64_t>(tokens.size()) == page_size_);
    if (!is_current(parent)) return {};
    for (std::int32_t page = buckets_[bucket(parent, tokens)]; page != kNoPage;
         page = at(page).next) {
      const Page& found = at(page);
      if (found.parent.page == parent.page && found.parent.generation == parent.generation &&
          std::equal(tokens.begin(), tokens.end(), tokens_of(page)))
        return {page, found.generation};
    }
    return {};
  }
  /// Says which tokens a full page holds, from now until it is used anew. Returns the page by which
  /// these tokens are known: another one if it was first; none if `parent` is known no more.
  NamedPage publish(std::int32_t page, NamedPage parent, std::span<const Token> tokens) {
    if (!is_current(parent)) return {};
    const NamedPage first = find(parent, tokens);
    if (first.page != kNoPage) return first;
    forget(page);
    Page& entry = at(page);
    std::copy(tokens.begin(), tokens.end(), tokens_of(page));
    entry.parent = parent;
    entry.bucket = bucket(parent, tokens);
    entry.next = std::exchange(buckets_[entry.bucket], page);
    entry.published = true;
    return {page, entry.generation};
  }
  /// The page is about to be written: nobody finds it by its tokens any more.
  void forget(std::int32_t page) {
    Page& entry = at(page);
    if (!entry.published) return;
    std::int32_t* link = &buckets_[entry.bucket];
    while (*link != page) link = &at(*link).next;
    *link = entry.next;
    entry.published = false;
    ++entry.generation;
  }

 private:
  struct Page {
    std::int32_t references = 0;
    std::uint32_t generation = 0;
    bool published = false;
    std::int32_t next = kNoPage;  // in the bucket
    std::size_t bucket = 0;
    NamedPage parent;
  };
  struct Run {
    std::int64_t first = 0;
    std::int64_t count = 0;
  };
  static constexpr std::int64_t kLongRun = 16;

  Page& at(std::int32_t page) {
    SLUICE_ASSERT(page >= 0 && page < num_pages());
    return pages_[static_cast<std::size_t>(page)];
  }
  const Page& at(std::int32_t page) const {
    SLUICE_ASSERT(page >= 0 && page < num_pages());
    return pages_[static_cast<std::size_t>(page)];
  }
  Token* tokens_of(std::int32_t page) { return tokens_.data() + page * page_size_; }
  const Token* tokens_of(std::int32_t page) const { return tokens_.data() + page * page_size_; }

  void take(std::int32_t page) {
    forget(page);
    at(page).references = 1;
    --free_pages_;
  }
  bool is_current(NamedPage parent) const {
    return parent.page == kNoPage ||
           (at(parent.page).published && at(parent.page).generation == parent.generation);
  }
  std::size_t bucket(NamedPage parent, std::span<const Token> tokens) const {
    std::uint64_t hash = 14695981039346656037ULL;
    const auto mix = [&hash](std::uint64_t value) {
      hash = (hash ^ value) * 1099511628211ULL;
    };
    mix(static_cast<std::uint64_t>(parent.page + 1));
    for (const Token token : tokens) mix(static_cast<std::uint64_t>(token));
    return static_cast<std::size_t>((hash ^ (hash >> 32U)) & (buckets_.size() - 1));
  }
  Run longest_run() const {
    Run best;
    Run run;
    for (std::int64_t page = 0; page < num_pages(); ++page) {
      if (pages_[static_cast<std::size_t>(page)].references != 0) continue;
      if (run.first + run.count != page) run = {page, 0};
      ++run.count;
      if (run.count > best.count) best = run;
    }
    return best;
  }

  std::int64_t page_size_;
  std::int64_t free_pages_;
  std::vector<Page> pages_;
  std::vector<Token> tokens_;          // [num_pages, page_size], of published pages
  std::vector<std::int32_t> buckets_;  // first page of each
};

/// The pages of one stream, in order: token t lives in slot table[t / page_size] * page_size + t
/// mod page_size. Two tables may hold a page; the first to write into it copies it first. Only
/// construction allocates. The pool must outlive it.
class PageTable {
 public:
  /// Runs of consecutive pages that a table may have: what a list of segments takes.
  static constexpr int kMaxRuns = 32;

  /// For at most `max_tokens` tokens. \throws Error(kConfig) unless max_tokens >= 1.
  PageTable(PagePool& pool, std::int64_t max_tokens) : pool_(&pool), max_tokens_(max_tokens) {
    if (max_tokens < 1)
      throw Error(ErrorCode::kConfig, {"page table does not fit", "PageTable", "max_tokens",
                                       "at least 1", std::to_string(max_tokens)});
    pages_.reserve(static_cast<std::size_t>(pages_for(max_tokens)));
  }
  ~PageTable() {
    for (const std::int32_t page : pages_) pool_->release(page);
  }
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;
  PageTable(PageTable&& other) noexcept
      : pool_(other.pool_),
        max_tokens_(other.max_tokens_),
        total_(std::exchange(other.total_, 0)),
        pages_(std::move(other.pages_)) {
    other.pages_.clear();
  }

  std::int64_t total() const { return total_; }
  std::int64_t max_tokens() const { return max_tokens_; }
  std::span<const std::int32_t> pages() const { return pages_; }
  std::int64_t slot(std::int64_t token) const {
    SLUICE_ASSERT(token >= 0 && token < total_);
    return pages_[static_cast<std::size_t>(token / page_size())] * page_size() +
           token % page_size();
  }
  /// Maximal runs of consecutive pages.
  int runs() const {
    int count = pages_.empty() ? 0 : 1;
    for (std::size_t i = 1; i < pages_.size(); ++i) count += pages_[i] != pages_[i - 1] + 1;
    return count;
  }
  /// Calls visit(first token, tokens, first slot) for each.
  template <class Visit>
  void each_run(Visit&& visit) const {
    for (std::size_t begin = 0; begin < pages_.size();) {
      std::size_t end = begin + 1;
      while (end < pages_.size() && pages_[end] == pages_[end - 1] + 1) ++end;
      const std::int64_t first = static_cast<std::int64_t>(begin) * page_size();
      const std::int64_t last = std::min(static_cast<std::int64_t>(end) * page_size(), total_);
      visit(first, last - first, pages_[begin] * page_size());
      begin = end;
    }
  }

  /// Whether append(tokens) would succeed.
  bool fits(std::int64_t tokens) const {
    if (total_ + tokens > max_tokens_) return false;
    const std::int64_t fresh = pages_for(total_ + tokens) - pages_held();
    const std::int64_t needed = fresh + (copies_tail() ? 1 : 0);
    if (needed > pool_->free_pages()) return false;
    return stays_short(fresh) || pool_->longest_free_run() >= pages_held() + fresh;
  }
  /// Tokens that would fit if the table were cut to its first `length` tokens.
  std::int64_t room_behind(std::int64_t length) const {
    SLUICE_ASSERT(length <= total_);
    const std::int64_t held = pages_for(length);
    std::int64_t free = pool_->free_pages();
    for (std::int64_t i = held; i < pages_held(); ++i) free += references(i) == 1;
    const std::int64_t in_tail = held * page_size() - length;
    if (in_tail > 0 && references(held - 1) > 1) {
      if (free == 0) return 0;
      --free;
    }
    return std::min(max_tokens_ - length, in_tail + free * page_size());
  }

  /// Gives slots to `tokens` new tokens. copy(from, to, slots) is called where rows must move: a
  /// partly filled page that another table holds too is left to it and copied; a table that would
  /// become more than kMaxRuns runs is copied into one. Precondition: fits(tokens).
  template <class Copy>
  void append(std::int64_t tokens, Copy&& copy) {
    SLUICE_ASSERT(fits(tokens));
    const std::int64_t fresh = pages_for(total_ + tokens) - pages_held();
    if (!stays_short(fresh)) gather(pages_held() + fresh, copy);
    if (tokens > 0 && total_ % page_size() != 0) {
      std::int32_t& tail = pages_.back();
      if (pool_->references(tail) > 1) {
        const std::int32_t before = pages_.size() > 1 ? pages_[pages_.size() - 2] : kNoPage;
        const std::int32_t page = pool_->acquire(before, fresh + 1);
        copy(tail * page_size(), page * page_size(), total_ % page_size());
        pool_->release(tail);
        tail = page;
      }
      pool_->forget(tail);
    }
    total_ += tokens;
    for (std::int64_t wanted = pages_for(total_) - pages_held(); wanted > 0; --wanted)
      pages_.push_back(pool_->acquire(pages_.empty() ? kNoPage : pages_.back(), wanted));
  }
  /// Takes back all but the first `length` tokens; whole pages behind them are let go.
  void truncate(std::int64_t length) {
    SLUICE_ASSERT(length <= total_);
    total_ = length;
    while (pages_held() > pages_for(length)) {
      pool_->release(pages_.back());
      pages_.pop_back();
    }
  }
  /// Becomes a table of the same pages: every count goes up, nothing is copied. Precondition:
  /// tables of one pool, other.total() <= max_tokens().
  void share(const PageTable& other) {
    SLUICE_ASSERT(pool_ == other.pool_ && other.total_ <= max_tokens_);
    for (const std::int32_t page : other.pages_) pool_->retain(page);
    truncate(0);
    pages_.assign(other.pages_.begin(), other.pages_.end());
    total_ = other.total_;
  }
  /// Goes on with a full page that holds the next tokens already. Precondition: no page is partly
  /// filled, and kMaxRuns is not exceeded.
  void adopt(std::int32_t page) {
    SLUICE_ASSERT(total_ % page_size() == 0 && total_ + page_size() <= max_tokens_);
    pool_->retain(page);
    pages_.push_back(page);
    total_ += page_size();
  }

 private:
  std::int64_t page_size() const { return pool_->page_size(); }
  std::int64_t pages_for(std::int64_t tokens) const {
    return (tokens + page_size() - 1) / page_size();
  }
  std::int64_t pages_held() const { return static_cast<std::int64_t>(pages_.size()); }
  std::int32_t references(std::int64_t index) const {
    return pool_->references(pages_[static_cast<std::size_t>(index)]);
  }
  bool copies_tail() const {
    return total_ % page_size() != 0 && pool_->references(pages_.back()) > 1;
  }
  /// Whether `fresh` more pages leave at most kMaxRuns runs, however they come to lie.
  bool stays_short(std::int64_t fresh) const {
    const std::int64_t needed = fresh + (copies_tail() ? 1 : 0);
    const std::int64_t now = runs();
    if (now + needed <= kMaxRuns) return true;
    return now + 2 <= kMaxRuns && pool_->longest_free_run() > needed;
  }
  /// Moves everything into a run of `pages` free pages, those behind the tokens given back.
  template <class Copy>
  void gather(std::int64_t pages, Copy&& copy) {
    const std::int32_t first = pool_->acquire_run(pages);
    for (std::int64_t i = 0; i < pages; ++i) {
      const std::int32_t to = first + static_cast<std::int32_t>(i);
      if (i >= pages_held()) {
        pool_->release(to);
        continue;
      }
      std::int32_t& page = pages_[static_cast<std::size_t>(i)];
      copy(page * page_size(), to * page_size(), std::min(page_size(), total_ - i * page_size()));
      pool_->release(page);
      page = to;
    }
  }

  PagePool* pool_;
  std::int64_t max_tokens_;
  std::int64_t total_ = 0;
  std::vector<std::int32_t> pages_;
};

}  // namespace sluice
