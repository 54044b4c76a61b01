// Applies CUDA's ordering rules to every access: what is ordered by a barrier of the block or of
// the grid, by __syncwarp, or by a fence and an atomic, is no race, whatever the schedule that was
// run.
#include "checker.hpp"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <new>
#include <span>
#include <unordered_map>
#include <utility>

// The extent of this module in memory; the linker defines both.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) const char _end[];

namespace hessreg::emulator {

namespace {

using Cells = std::unique_ptr<Cell[], FreeDeleter>;

struct Region {
  uintptr_t start, end;
  std::string name;
  int registrations;
  Cells cells;  // the first one holds the word that `start` lies in
};

// What an access touches; made into text only for a report.
struct Target {
  bool shared;
  const char* name;
  size_t offset;
};

std::string describe(const Target& target) {
  return (target.shared ? "shared " : "") + std::string(target.name) + "+" +
         std::to_string(target.offset);
}

bool enabled = false;
std::map<uintptr_t, Region> regions;  // by start

// Which blocks have published what they wrote through this address: a fence, then an atomic.
std::unordered_map<const void*, std::vector<Publication>> publications;

// Zero pages appear only where a cell is touched.
Cells make_cells(size_t count) {
  void* memory = std::calloc(count, sizeof(Cell));
  if (!memory) throw std::bad_alloc();
  return Cells(static_cast<Cell*>(memory));
}

uintptr_t word_of(uintptr_t address) { return address & ~uintptr_t{3}; }

// Calls visit(offset of the word from `base`, mask of its bytes) for each four-byte word.
template <typename Visit>
void for_each_word(uintptr_t base, uintptr_t address, size_t bytes, Visit visit) {
  const uintptr_t end = address + bytes;
  for (uintptr_t word = word_of(address); word < end; word += 4) {
    const uintptr_t first = std::max(address, word) - word,
                    last = std::min(end - word, uintptr_t{4});
    visit((word - base) / 4, static_cast<uint8_t>((1u << last) - (1u << first)));
  }
}

// ---- Races

bool published(const AccessRecord& record, const Block& to) {
  const auto found = to.acquired.find(record.block_serial);
  if (found == to.acquired.end()) return false;
  const Publication& publication = found->second;
  if (record.epoch != publication.epoch) return record.epoch < publication.epoch;
  return record.thread / kWarpSize == publication.warp &&
         record.clock <= publication.clock[record.thread % kWarpSize];
}

bool ordered(const AccessRecord& record, const Fiber& fiber, bool atomic, bool shared) {
  const Block& block = *fiber.block;
  if (record.block_serial == 0 || record.grid_epoch != engine.grid_epoch) return true;
  if (record.atomic && atomic) return true;
  if (record.block_serial != block.serial) return shared || published(record, block);
  if (record.epoch != block.epoch || record.thread == fiber.index_in_block) return true;
  return record.thread / kWarpSize == fiber.warp &&
         record.clock <= fiber.clock[record.thread % kWarpSize];
}

const AccessRecord* find_conflict(std::span<const AccessRecord> records, uint8_t bytes,
                                  Access access, bool shared) {
  const auto conflict = std::ranges::find_if(records, [&](const AccessRecord& record) {
    return (record.bytes & bytes) != 0 &&
           !ordered(record, current_fiber(), access == Access::kAtomic, shared);
  });
  return conflict == records.end() ? nullptr : &*conflict;
}

void report_race(const char* kind, const AccessRecord& record, Site site, const Target& target) {
  const bool same_block = record.block_serial == current_fiber().block->serial;
  report_once({.finding = "race",
               .detail = " (" + std::string(kind) + ") on " + describe(target),
               .site = site,
               .thread = describe(current_fiber()),
               .against = "not ordered with thread " + std::to_string(record.thread) +
                          (same_block ? " of the same block" : " of another block"),
               .other_site = record.site});
}

// An older write of the same bytes need not be kept: the newer one is ordered after it, or a race
// has been reported.
void remember_write(Cell& cell, const AccessRecord& record) {
  if ((record.bytes & cell.writes[0].bytes) == 0) cell.writes[1] = cell.writes[0];
  cell.writes[0] = record;
}

void remember_read(Cell& cell, const AccessRecord& record) {
  auto& [newest, other_lane, other_warp] = cell.reads;
  const bool same_warp = newest.block_serial == record.block_serial &&
                         newest.thread / kWarpSize == record.thread / kWarpSize;
  if (!same_warp) {
    other_warp = newest;
    other_lane = {};
  } else if (newest.thread != record.thread) {
    other_lane = newest;
  }
  newest = record;
}

void remember(Cell& cell, uint8_t bytes, Access access, Site site) {
  const Fiber& fiber = current_fiber();
  const AccessRecord record{.block_serial = fiber.block->serial,
                            .epoch = fiber.block->epoch,
                            .grid_epoch = engine.grid_epoch,
                            .clock = fiber.clock[static_cast<size_t>(fiber.lane)],
                            .thread = static_cast<uint16_t>(fiber.index_in_block),
                            .bytes = bytes,
                            .atomic = access == Access::kAtomic,
                            .site = site};
  access == Access::kRead ? remember_read(cell, record) : remember_write(cell, record);
}

void check_race(Cell& cell, uint8_t bytes, Access access, Site site, const Target& target) {
  const bool reads = access == Access::kRead;
  if (const auto* write = find_conflict(cell.writes, bytes, access, target.shared)) {
    report_race(reads ? "read after write" : "write after write", *write, site, target);
  } else if (!reads) {
    const auto* read = find_conflict(cell.reads, bytes, access, target.shared);
    if (read) report_race("write after read", *read, site, target);
  }
  remember(cell, bytes, access, site);
}

void check_initialised(Cell& cell, uint8_t bytes, Access access, Site site, const Target& target) {
  const uint32_t block = current_fiber().block->serial;
  if (cell.initialised_in != block) {
    cell.initialised_in = block;
    cell.initialised = 0;
  }
  if (access != Access::kWrite && (cell.initialised & bytes) != bytes) {
    report_once({.finding = "uninitialised read",
                 .detail = " of " + describe(target),
                 .site = site,
                 .thread = describe(current_fiber()),
                 .against = "",
                 .other_site = {}});
  }
  if (access != Access::kRead) cell.initialised |= bytes;
}

// ---- Bounds

std::string verb(Access access) { return access == Access::kRead ? "read" : "write"; }

std::string out_of_bounds(Access access, size_t bytes, const std::string& where) {
  return "out-of-bounds " + verb(access) + " of " + std::to_string(bytes) + " bytes, " + where;
}

// The last region that starts at or below the address.
Region* region_below(uintptr_t address) {
  const auto above = regions.upper_bound(address);
  return above == regions.begin() ? nullptr : &std::prev(above)->second;
}

[[noreturn]] void report_unknown_memory(uintptr_t address, size_t bytes, Access access, Site site) {
  constexpr uintptr_t kNear = 4096;
  const Region* below = region_below(address);
  const auto above = regions.upper_bound(address);
  std::string where = "far from every registered argument";
  if (above != regions.end() && above->first - address <= kNear) {
    where = std::to_string(above->first - address) + " bytes before " + above->second.name;
  }
  if (below && address < below->end + kNear) {
    where = std::to_string(static_cast<int64_t>(address + bytes - below->end)) +
            " bytes past the end of " + below->name;
  }
  report_fatal(out_of_bounds(access, bytes, where), site);
}

bool within(uintptr_t address, const void* start, size_t bytes) {
  return address - reinterpret_cast<uintptr_t>(start) < bytes;
}

// The thread's own variables, the kernel's parameters and the module's constants.
bool is_private_or_constant(uintptr_t address, Access access) {
  if (within(address, current_fiber().stack, kStackBytes)) return true;
  if (access != Access::kRead) return false;
  return within(address, engine.launch.arguments, engine.launch.argument_bytes) ||
         within(address, __ehdr_start, static_cast<size_t>(_end - __ehdr_start));
}

// ---- Accesses

// A fence and an atomic publish what the block wrote before; an atomic on the same address sees it.
void exchange_publications(const void* address) {
  Fiber& fiber = current_fiber();
  std::vector<Publication>& list = publications[address];
  for (const Publication& publication : list) {
    fiber.block->acquired.insert_or_assign(publication.block_serial, publication);
  }
  if (fiber.fenced) {
    list.push_back({fiber.block->serial, fiber.block->epoch, fiber.warp, fiber.clock});
  }
}

void check_shared(const void* address, size_t bytes, Access access, Site site) {
  SharedMemory& shared = current_fiber().block->shared;
  const auto piece = shared.find(address, bytes);
  if (!piece.array) {
    report_fatal(out_of_bounds(access, bytes, "in no shared array"), site);
  }
  const Target target{true, piece.array, piece.offset};
  if (!shared.cells) shared.cells = make_cells(SharedMemory::kBytes / sizeof(uint32_t));
  for_each_word(0, shared.offset(address), bytes, [&](size_t word, uint8_t mask) {
    check_race(shared.cells[word], mask, access, site, target);
    check_initialised(shared.cells[word], mask, access, site, target);
  });
}

void check_global(Region& region, uintptr_t address, size_t bytes, Access access, Site site) {
  const Target target{false, region.name.c_str(), address - region.start};
  for_each_word(word_of(region.start), address, bytes, [&](size_t word, uint8_t mask) {
    check_race(region.cells[word], mask, access, site, target);
  });
}

}  // namespace

void note_access(const void* pointer, size_t bytes, Access access, Site site) {
  if (!enabled || !current_thread) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_private_or_constant(address, access)) return;
  ++engine.statistics.accesses;
  Fiber& fiber = current_fiber();
  const bool shared = fiber.block->shared.contains(pointer);
  if (access == Access::kAtomic) exchange_publications(pointer);
  if (shared) {
    check_shared(pointer, bytes, access, site);
  } else {
    Region* region = region_below(address);
    if (!region || address + bytes > region->end) {
      report_unknown_memory(address, bytes, access, site);
    }
    check_global(*region, address, bytes, access, site);
    if (access == Access::kWrite) fiber.fenced = false;
  }
  if (config().profile) note_profiled_access(pointer, bytes, access, site, shared);
  const int period = config().preempt_period;
  if (period > 0 && engine.scheduler.random() % static_cast<uint64_t>(period) == 0) {
    make_ready(fiber);
    suspend(fiber);
  }
}

void enable_checker() { enabled = true; }
bool checker_enabled() { return enabled; }

void begin_checked_launch() { publications.clear(); }

void register_memory(const void* address, size_t bytes, std::string name) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  const size_t words = (bytes + 3) / 4 + 1;
  const auto [entry, added] =
      regions.try_emplace(start, Region{start, start + bytes, std::move(name), 0, nullptr});
  Region& region = entry->second;
  ++region.registrations;
  if (!added && start + bytes <= region.end) return;
  region.end = start + bytes;
  region.cells = make_cells(words);
}

void unregister_memory(const void* address) {
  const auto entry = regions.find(reinterpret_cast<uintptr_t>(address));
  if (entry != regions.end() && --entry->second.registrations == 0) regions.erase(entry);
}

}  // namespace hessreg::emulator
