// x86-64 switches stacks in assembly, other machines by way of ucontext.
#include "fibers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#if !defined(__x86_64__) || defined(HESSREG_EMU_PORTABLE_SWITCH)

// Each swap is a system call: 12 times slower than the assembly below.
#include <ucontext.h>

namespace hessreg::emulator {

extern "C" void hessreg_emu_switch(Context* from, Context to) {
  static ucontext_t scheduler;  // the only context that is not made by make_context
  if (!*from) *from = &scheduler;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

Context make_context(char* stack, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack + kStackBytes) - 1;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes - sizeof *context;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace hessreg::emulator

#else

asm(R"(
.text
.globl hessreg_emu_switch
.hidden hessreg_emu_switch
.type hessreg_emu_switch,@function
hessreg_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hessreg_emu_switch,.-hessreg_emu_switch
)");

namespace hessreg::emulator {

Context make_context(char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // a return address that ends backtraces, and the alignment the ABI asks for
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

}  // namespace hessreg::emulator

#endif

namespace hessreg::emulator {

char* StackPool::take() {
  if (!free_.empty()) {
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  const auto guard_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard_bytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) {
    throw std::runtime_error("no memory for another stack: too many threads alive at once");
  }
  return static_cast<char*>(memory) + guard_bytes;
}

}  // namespace hessreg::emulator
