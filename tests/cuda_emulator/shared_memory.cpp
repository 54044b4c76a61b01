// Shared memory of a block, and asynchronous copies into it.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "checker.hpp"
#include "engine.hpp"

namespace hessreg::emulator {

namespace {

constexpr size_t kRedZoneBytes = 64;
constexpr size_t kArrayAlignment = 16;
constexpr size_t kStaticLimit = 48 << 10;
constexpr int kPoison = 0xff;  // NaN in every float format, -1 as an integer

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

void FreeDeleter::operator()(void* memory) const { std::free(memory); }

SharedMemory::SharedMemory() {
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
}

SharedMemory::~SharedMemory() { munmap(base_, kBytes); }

void SharedMemory::reset(size_t dynamic_bytes) {
  arrays_.clear();
  used_ = static_bytes_ = 0;
  dynamic_bytes_ = dynamic_bytes;
  std::memset(dynamic_part(), kPoison, dynamic_bytes);
}

void* SharedMemory::static_array(const SharedArray& array, Location location) {
  for (const Placed& placed : arrays_) {
    if (placed.array.tag == array.tag) return base_ + placed.offset;
  }
  static_bytes_ += array.bytes;
  if (static_bytes_ > kStaticLimit) {
    fail("static shared memory over 48 KiB with " + std::string(array.name), location);
  }
  const size_t offset = round_up(used_, std::max(array.alignment, kArrayAlignment));
  used_ = offset + array.bytes + kRedZoneBytes;
  arrays_.push_back({array, offset});
  std::memset(base_ + offset, kPoison, array.bytes);
  return base_ + offset;
}

bool SharedMemory::contains(const void* address) const {
  return address >= base_ && address < base_ + kBytes;
}

SharedMemory::Piece SharedMemory::find(const void* address, size_t bytes) const {
  const size_t at = offset(address);
  if (at >= kDynamicOffset) {
    const bool inside = at + bytes <= kDynamicOffset + dynamic_bytes_;
    return {inside ? "dynamic" : nullptr, at - kDynamicOffset};
  }
  for (const Placed& placed : arrays_) {
    if (at >= placed.offset && at + bytes <= placed.offset + placed.array.bytes) {
      return {placed.array.name, at - placed.offset};
    }
  }
  return {nullptr, 0};
}

void* static_shared(const SharedArray& array, Location location) {
  return current_fiber().block->shared.static_array(array, location);
}

void* dynamic_shared(Location location) {
  if (engine.launch.shared_bytes == 0) {
    fail("dynamic shared memory used, but the launch gave none,", location);
  }
  return current_fiber().block->shared.dynamic_part();
}

// The source is read when the copy starts; the bytes land only in async_wait, so that a wait left
// out or too short leaves poison behind.
void async_copy(void* shared, const void* global, size_t bytes, Location location) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!aligned(shared) || !aligned(global)) fail("misaligned cp.async", location);
  note_access(global, bytes, Access::kRead, Site(location));
  Fiber& fiber = current_fiber();
  fiber.copies.push_back({shared, global, bytes});
  ++fiber.uncommitted_copies;
}

void async_commit() {
  Fiber& fiber = current_fiber();
  fiber.copy_groups.push_back(fiber.uncommitted_copies);
  fiber.uncommitted_copies = 0;
}

void async_wait(size_t pending_groups, Location location) {
  Fiber& fiber = current_fiber();
  if (fiber.copy_groups.size() <= pending_groups) return;
  const auto last_group = fiber.copy_groups.end() - static_cast<std::ptrdiff_t>(pending_groups);
  size_t landing = 0;
  for (auto group = fiber.copy_groups.begin(); group != last_group; ++group) landing += *group;
  fiber.copy_groups.erase(fiber.copy_groups.begin(), last_group);
  for (size_t i = 0; i < landing; ++i) {
    const AsyncCopy& copy = fiber.copies[i];
    note_access(copy.shared, copy.bytes, Access::kWrite, Site(location));
    std::memcpy(copy.shared, copy.global, copy.bytes);
  }
  fiber.copies.erase(fiber.copies.begin(),
                     fiber.copies.begin() + static_cast<std::ptrdiff_t>(landing));
}

}  // namespace hessreg::emulator
