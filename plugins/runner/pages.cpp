#include "runner/pages.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace chai {

PagePool::PagePool(std::int64_t pages, std::int64_t page_length)
    : page_length_(page_length),
      free_(static_cast<std::size_t>(pages)),
      references_(static_cast<std::size_t>(pages), 0) {
  std::iota(free_.rbegin(), free_.rend(), 0);
}

std::int64_t PagePool::outstanding() const {
  std::int64_t pages = 0;
  for (const auto& [_, row] : rows_) pages += row.promised - row.held();
  return pages;
}

std::int64_t PagePool::promised_to(std::int64_t row) const {
  const auto found = rows_.find(row);
  return found == rows_.end() ? 0 : found->second.promised;
}

bool PagePool::promise(std::int64_t row, std::int64_t tokens) {
  const std::int64_t wanted = count(tokens) - promised_to(row);
  if (wanted > static_cast<std::int64_t>(free_.size()) - outstanding()) return false;
  rows_[row].promised += std::max<std::int64_t>(wanted, 0);
  return true;
}

void PagePool::extend(std::int64_t row, std::int64_t tokens) {
  if (count(tokens) > promised_to(row)) throw std::logic_error("a row grows past its promise");
  Row& found = rows_[row];
  while (found.held() < count(tokens)) {
    const std::int32_t page = free_.back();
    free_.pop_back();
    references_[static_cast<std::size_t>(page)] = 1;
    found.pages.push_back(page);
    touched_ = std::max<std::int64_t>(touched_, page + 1);
  }
  peak_ = std::max(peak_, held());
}

std::int64_t PagePool::share(std::int64_t row, std::int64_t source, std::int64_t tokens) {
  if (rows_.count(row) > 0) throw std::logic_error("a row that has begun is no copy of another one");
  const std::vector<std::int32_t>& all = pages_of(source);
  const std::int64_t whole = std::min(tokens / page_length_, static_cast<std::int64_t>(all.size()));
  const Row begun{whole, {all.begin(), all.begin() + whole}};
  for (const std::int32_t page : begun.pages) ++references_[static_cast<std::size_t>(page)];
  rows_[row] = begun;
  return whole * page_length_;
}

void PagePool::release(std::int64_t row) {
  const std::vector<std::int32_t> pages = pages_of(row);
  rows_.erase(row);
  for (auto page = pages.rbegin(); page != pages.rend(); ++page)
    if (--references_[static_cast<std::size_t>(*page)] == 0) free_.push_back(*page);
}

std::int64_t PagePool::untouched_after(std::int64_t row, std::int64_t tokens) const {
  const std::int64_t wanted = std::max<std::int64_t>(0, count(tokens) - promised_to(row));
  return std::max<std::int64_t>(0, held() + outstanding() + wanted - touched_);
}

std::int64_t PagePool::most_pages(const std::vector<std::int64_t>& rows) const {
  std::int64_t most = 1;
  for (const std::int64_t row : rows) most = std::max(most, rows_.at(row).held());
  return most;
}

std::vector<std::int32_t> PagePool::table(const std::vector<std::int64_t>& rows) const {
  const auto columns = static_cast<std::size_t>(most_pages(rows));
  std::vector<std::int32_t> table(rows.size() * columns, -1);
  for (std::size_t line = 0; line < rows.size(); ++line) {
    const std::vector<std::int32_t>& pages = pages_of(rows[line]);
    std::copy(pages.begin(), pages.end(), table.begin() + static_cast<std::ptrdiff_t>(line * columns));
  }
  return table;
}

}  // namespace chai
