// Stacks and the switch between them: one fiber for each CUDA thread.
#pragma once

#include <cstddef>
#include <vector>

namespace hessreg::emulator {

constexpr size_t kStackBytes = 64 << 10;

// A suspended thread of execution; its registers lie on its stack. Null until it is suspended.
using Context = void*;

// Suspends the running one as `from` and goes on with `to`.
extern "C" void hessreg_emu_switch(Context* from, Context to);

// A context that will call `entry`, which must not return.
Context make_context(char* stack, void (*entry)());

// Stacks with a guard page below each. The last one given back is in the cache: it is taken next.
class StackPool {
 public:
  char* take();
  void give_back(char* stack) { free_.push_back(stack); }

 private:
  std::vector<char*> free_;
};

}  // namespace hessreg::emulator
