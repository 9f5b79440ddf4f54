// The pages of a pool: which are free, which row holds which, and how many a row was promised. Only numbers;
// the memory is a session's.
//
// - A row is promised all the pages that it can ever need, or none. So a row that has begun never waits for a
//   page, and no two rows can wait for each other.
// - It takes a page when its text reaches it, and gives all of them back when its text has ended.
// - A page has as many references as rows that hold it, and is free when it has none. Rows share whole pages
//   of a common beginning only, to which none of them writes again.
// - The page that was given back last is taken first: memory that was never touched stays untouched. Of a row
//   that ends, its first page.
//
// tests/data/paging_cases.json holds this and chai_export/runtime/pages.py to the same.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace chai {

// Positions per page. A row wastes half a page on average; a kernel reads a page at a time.
constexpr std::int64_t kPageLength = 128;

class PagePool {
 public:
  // All pages are free at first.
  explicit PagePool(std::int64_t pages = 0, std::int64_t page_length = kPageLength);

  std::int64_t pages() const { return static_cast<std::int64_t>(references_.size()); }
  // Pages that rows hold, a shared one once.
  std::int64_t held() const { return pages() - static_cast<std::int64_t>(free_.size()); }
  // Free pages that are promised.
  std::int64_t outstanding() const;
  // The largest number of pages that were held at one time.
  std::int64_t peak() const { return peak_; }
  // Pages that were ever held, which are 0 … touched() - 1.
  std::int64_t touched() const { return touched_; }
  // Pages that `tokens` positions take.
  std::int64_t count(std::int64_t tokens) const { return (tokens + page_length_ - 1) / page_length_; }

  // Promises a row, new or not, pages for `tokens` in all; if they are not there nothing changes.
  bool promise(std::int64_t row, std::int64_t tokens);
  // Takes pages for a row until it holds `tokens`, of what it was promised. Throws std::logic_error if that
  // is less.
  void extend(std::int64_t row, std::int64_t tokens);
  // Begins a new row with the whole pages among the first `tokens` of another one; how many tokens these are.
  std::int64_t share(std::int64_t row, std::int64_t source, std::int64_t tokens);
  // Gives back what a row holds and was promised.
  void release(std::int64_t row);
  // Pages never touched so far that rows would hold at worst, if `row` were promised `tokens`.
  std::int64_t untouched_after(std::int64_t row, std::int64_t tokens) const;

  // Of a row, in the order of its positions.
  const std::vector<std::int32_t>& pages_of(std::int64_t row) const { return rows_.at(row).pages; }
  // The most pages that one of these rows holds, at least 1: the second size of their table.
  std::int64_t most_pages(const std::vector<std::int64_t>& rows) const;
  // `page_table` of these rows: [B][most_pages], -1 for none.
  std::vector<std::int32_t> table(const std::vector<std::int64_t>& rows) const;

 private:
  struct Row {
    std::int64_t promised = 0;  // those in `pages` included
    std::vector<std::int32_t> pages;

    std::int64_t held() const { return static_cast<std::int64_t>(pages.size()); }
  };

  std::int64_t promised_to(std::int64_t row) const;

  std::int64_t page_length_;
  std::int64_t peak_ = 0;
  std::int64_t touched_ = 0;
  std::vector<std::int32_t> free_;  // the next one last
  std::vector<std::int64_t> references_;
  std::map<std::int64_t, Row> rows_;
};

}  // namespace chai
