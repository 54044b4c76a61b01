// How the accesses of a warp combine: shared-memory wavefronts (bank conflicts) and global sectors,
// by line of the source.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "checker.hpp"

namespace hessreg::emulator {

namespace {

constexpr size_t kBanks = 32, kBankBytes = 4, kWavefrontBytes = kBanks * kBankBytes;
constexpr size_t kSectorBytes = 32;

// The accesses of a warp's lanes at their n-th visit of a site.
struct Request {
  size_t bytes;
  bool shared;
  Access access;
  std::map<int, uintptr_t> addresses;  // by lane
};

struct Tally {
  uint64_t requests = 0, transactions = 0, fewest_possible = 0;
};

using LineKey = std::tuple<std::string, bool, Access, size_t>;
using SiteKey = std::tuple<Site, bool, Access, size_t>;

std::map<std::tuple<uint32_t, int, Site, uint32_t>, Request> requests;  // block, warp, site, visit
std::map<std::pair<const Fiber*, Site>, uint32_t> visits;
std::map<SiteKey, Tally> tallies;

// Lanes that ask for the same word are served together; different words of one bank are not.
uint64_t count_wavefronts(const uintptr_t* begin, const uintptr_t* end, size_t bytes) {
  std::map<uintptr_t, std::set<uintptr_t>> words_of_bank;
  for (const uintptr_t* address = begin; address != end; ++address) {
    for (size_t byte = 0; byte < bytes; byte += kBankBytes) {
      const uintptr_t word = (*address + byte) / kBankBytes;
      words_of_bank[word % kBanks].insert(word);
    }
  }
  size_t wavefronts = 1;
  for (const auto& [bank, words] : words_of_bank) wavefronts = std::max(wavefronts, words.size());
  return wavefronts;
}

void tally_shared(const Request& request, Tally& tally) {
  const size_t lanes = kWavefrontBytes / std::max(kBankBytes, request.bytes);
  const auto& addresses = request.addresses;
  for (size_t first = 0; first < 32; first += lanes) {
    std::vector<uintptr_t> group;
    const auto end = addresses.lower_bound(static_cast<int>(first + lanes));
    for (auto entry = addresses.lower_bound(static_cast<int>(first)); entry != end; ++entry)
      group.push_back(entry->second);
    if (group.empty()) continue;
    tally.transactions +=
        count_wavefronts(group.data(), group.data() + group.size(), request.bytes);
    ++tally.fewest_possible;
  }
}

void tally_global(const Request& request, Tally& tally) {
  std::set<uintptr_t> sectors, bytes;
  for (const auto& [lane, address] : request.addresses) {
    for (uintptr_t byte = address; byte < address + request.bytes; ++byte) {
      bytes.insert(byte);
      sectors.insert(byte / kSectorBytes);
    }
  }
  tally.transactions += sectors.size();
  tally.fewest_possible += (bytes.size() + kSectorBytes - 1) / kSectorBytes;
}

}  // namespace

void note_profiled_access(const void* address, size_t bytes, Access access, Site site,
                          bool shared) {
  const Fiber& fiber = current_fiber();
  const uint32_t visit = visits[{&fiber, site}]++;
  Request& request = requests[{fiber.block->serial, fiber.warp, site, visit}];
  request.bytes = bytes;
  request.shared = shared;
  request.access = access;
  request.addresses[fiber.lane] = reinterpret_cast<uintptr_t>(address);
}

void finish_profiled_block(const Block& block) {
  if (requests.empty()) return;
  for (const Fiber& fiber : block.fibers) {
    visits.erase(visits.lower_bound({&fiber, Site()}), visits.lower_bound({&fiber + 1, Site()}));
  }
  const auto begin = requests.lower_bound({block.serial, 0, Site(), 0});
  const auto end = requests.lower_bound({block.serial + 1, 0, Site(), 0});
  for (auto entry = begin; entry != end; ++entry) {
    const Request& request = entry->second;
    Tally& tally =
        tallies[{std::get<Site>(entry->first), request.shared, request.access, request.bytes}];
    ++tally.requests;
    request.shared ? tally_shared(request, tally) : tally_global(request, tally);
  }
  requests.erase(begin, end);
}

std::vector<ProfileEntry> take_profile() {
  std::vector<Site> sites;
  for (const auto& [key, tally] : tallies) sites.push_back(std::get<Site>(key));
  const std::vector<std::string> lines = source_lines(sites);
  std::map<LineKey, Tally> by_line;  // a line has a site for each instance of its template
  size_t next = 0;
  for (const auto& [key, tally] : tallies) {
    const auto& [site, shared, access, bytes] = key;
    Tally& sum = by_line[{lines[next++], shared, access, bytes}];
    sum.requests += tally.requests;
    sum.transactions += tally.transactions;
    sum.fewest_possible += tally.fewest_possible;
  }
  std::vector<ProfileEntry> entries;
  for (const auto& [key, tally] : by_line) {
    const auto& [where, shared, access, bytes] = key;
    entries.push_back(
        {where, shared, access, bytes, tally.requests, tally.transactions, tally.fewest_possible});
  }
  tallies.clear();
  return entries;
}

}  // namespace hessreg::emulator
