// The memory checker's records, and the reports it makes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine.hpp"

namespace hessreg::emulator {

// One access to some of the four bytes of a cell; block_serial 0 is none.
struct AccessRecord {
  uint32_t block_serial, epoch, grid_epoch, clock;
  uint16_t thread;  // in the block
  uint8_t bytes;    // a bit for each
  bool atomic;
  Site site;
};

// What happened last to four bytes of memory.
struct Cell {
  std::array<AccessRecord, 2> writes;  // the newest; the newest of other bytes
  std::array<AccessRecord, 3> reads;   // the newest; of another lane of its warp; of another warp
  uint32_t initialised_in;             // serial of the block that the next field is about
  uint8_t initialised;                 // a bit for each byte
};

struct Report {
  std::string finding;  // reported once for each site
  std::string detail;
  Site site;  // may be empty: then the finding names the place
  std::string thread;
  std::string against;  // the other side of a race, at other_site
  Site other_site;
};

// A report that ends the launch, as the access would trap or destroy the host's memory.
[[noreturn]] void report_fatal(std::string finding, Site site);

// A report after which the launch goes on.
void report_once(Report report);

// "file:line" for each site.
std::vector<std::string> source_lines(const std::vector<Site>& sites);

void begin_checked_launch();
std::string take_reports();

void note_profiled_access(const void* address, size_t bytes, Access access, Site site, bool shared);
void finish_profiled_block(const Block& block);

}  // namespace hessreg::emulator
