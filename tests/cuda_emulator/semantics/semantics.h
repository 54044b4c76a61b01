// Kernels that show what the emulator makes of CUDA's instructions.
#pragma once

#include <cstdint>

namespace hessreg::semantics {

constexpr int kShuffles = 8;

void shuffles(int* out);                          // [32, kShuffles]
void wide_shuffle(const double* x, double* out);  // [32]
void partial_warps(int* out);                     // [3, 40]
void votes_of_rest(int* out);                     // [16], of a warp that 16 lanes have left
void votes_of_block(int* out);                    // [3, 64]
void reductions(const int* x, int* out);          // x: [32], out: [6]
void atomics(int* out);                           // [6]

// a: [16, k], b: [8, k] (transposed), c: [16, 8]
void mma_tf32(const float* a, const float* b, float* c, bool rounded);  // to TF32 before
void mma_bf16(const uint16_t* a, const uint16_t* b, float* c);

void round_to_tf32(const float* x, float* out, int n);
void power_of_two(const float* x, float* out, int n);
void float_to_half(const float* x, uint16_t* out, int n);
void half_to_float(const uint16_t* x, float* out, int n);
void float_to_bfloat16(const float* x, uint16_t* out, int n);
void bfloat16_to_float(const uint16_t* x, float* out, int n);

// out[i] is the i-th thread of the grid to come after a barrier; next: one zero.
void thread_order(int* next, int* out, int blocks, int threads);

// What shared memory holds at the start of a block: out[0] of a static, out[1] of a dynamic array.
void initial_shared_memory(float* out);

// A warp loads 16 bytes for each lane from shared memory, `stride` times 16 bytes apart.
void load_vectors(float* out, int stride);

// Transposes [4, 8] on the way to shared memory.
void transpose(const float* x, float* out);
void transpose_wide(const double* x, double* out);

int64_t most_shared_memory();  // dynamic, of a block

// The address at which each thread finds a parameter of 4000 bytes.
void parameter_addresses(uint64_t* out, int threads);

// Writes x[index] for an index of an array of 4.
void write_local(int* x, int index);
// x[0] = value + 1, x[1] = 1 << value % 64
void calculate_with_integers(int* x, int value);
// Reads memory that is no argument of the launch.
void read_unregistered(const float* x, float* out);
// Two threads write (or read) a word's halves; one of another warp reads (or writes) the first
// half.
void race_on_half_word(uint16_t* x, bool write_last);  // x: [4]
// Two warps read x[0]; the second one writes it, ordered after its own reads only.
void race_with_first_warp(int* x);
// Writes an element of the first of two neighbouring shared arrays of 16.
void write_shared(float* out, int index);
// out[0] = the element of a constant table
void read_constant(float* out, int index);

// Each fails.
void diverge_at_barriers();
void deadlock();
void call_outside_mask();
void use_too_much_shared_memory();
void use_dynamic_shared_memory_of_none();
void sync_grid_without_cooperative_launch();
void launch(int blocks, int threads, int shared_bytes, bool cooperative);  // with any sizes

}  // namespace hessreg::semantics
