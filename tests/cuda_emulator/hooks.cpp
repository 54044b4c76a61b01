// What -fsanitize=thread, alignment, bounds-strict, ... make the compiler call from kernel files.
// libtsan and libubsan are not linked: these definitions lead to the emulator's checker.
#include <string>

#include "checker.hpp"

using hessreg::emulator::Access;
using hessreg::emulator::Site;

namespace {

// How libubsan's handlers are told about a place; the handlers' further data follow it.
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};

std::string at(const void* data) {
  const auto* place = static_cast<const SourcePlace*>(data);
  const std::string path = place->file ? place->file : "?";
  return " at " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(place->line);
}

void report_undefined(const std::string& what, const void* data) {
  using namespace hessreg::emulator;
  if (!current_thread) return;
  report_once({.finding = what + at(data),
               .detail = "",
               .site = {},
               .thread = describe(current_fiber()),
               .against = "",
               .other_site = {}});
}

}  // namespace

extern "C" {

#define HESSREG_SITE Site(__builtin_return_address(0))
#define HESSREG_ACCESS_HOOK(name, bytes, access) \
  void __tsan_##name##bytes(void* address) { note_access(address, bytes, access, HESSREG_SITE); }
#define HESSREG_ACCESS_HOOKS(bytes)                          \
  HESSREG_ACCESS_HOOK(read, bytes, Access::kRead)            \
  HESSREG_ACCESS_HOOK(write, bytes, Access::kWrite)          \
  HESSREG_ACCESS_HOOK(volatile_read, bytes, Access::kRead)   \
  HESSREG_ACCESS_HOOK(volatile_write, bytes, Access::kWrite) \
  HESSREG_ACCESS_HOOK(unaligned_read, bytes, Access::kRead)  \
  HESSREG_ACCESS_HOOK(unaligned_write, bytes, Access::kWrite)
HESSREG_ACCESS_HOOKS(1)
HESSREG_ACCESS_HOOKS(2)
HESSREG_ACCESS_HOOKS(4)
HESSREG_ACCESS_HOOKS(8)
HESSREG_ACCESS_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  note_access(address, bytes, Access::kRead, HESSREG_SITE);
}
void __tsan_write_range(void* address, size_t bytes) {
  note_access(address, bytes, Access::kWrite, HESSREG_SITE);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t) {
  using namespace hessreg::emulator;
  if (current_thread) report_fatal("misaligned access" + at(data), Site());
}
void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  const auto value = static_cast<intptr_t>(index);
  report_undefined("array index " + std::to_string(value) + " out of bounds", data);
}
void __ubsan_handle_add_overflow(void* data, uintptr_t, uintptr_t) {
  report_undefined("signed integer overflow in an addition", data);
}
void __ubsan_handle_sub_overflow(void* data, uintptr_t, uintptr_t) {
  report_undefined("signed integer overflow in a subtraction", data);
}
void __ubsan_handle_mul_overflow(void* data, uintptr_t, uintptr_t) {
  report_undefined("signed integer overflow in a multiplication", data);
}
void __ubsan_handle_negate_overflow(void* data, uintptr_t) {
  report_undefined("signed integer overflow in a negation", data);
}
void __ubsan_handle_shift_out_of_bounds(void* data, uintptr_t, uintptr_t) {
  report_undefined("shift out of range", data);
}
void __ubsan_handle_divrem_overflow(void* data, uintptr_t, uintptr_t) {
  report_undefined("integer division by zero or overflow", data);
}

}  // extern "C"
