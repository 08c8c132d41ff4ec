// The emulator: runs kernels in CUDA's model of threads, blocks and clusters on one thread of the CPU.
//
// Every CUDA thread is a fiber, every resident block is alive, and a seeded scheduler that means ill
// decides who goes next at each operation below. docs/emulator.md says what is modelled and what is not.
// Kernels do not call this: they use csrc/cuda/ptx.cuh, which is inline assembly for nvcc and calls
// of these functions for g++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// A place in a kernel; the default argument of every operation is the line that called it.
struct Site {
  const char* file = nullptr;
  int line = 0;
  const void* pc = nullptr;  // instead of a line: an address in the program
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Site{file, line, nullptr};
  }
};

struct Launch {
  Dim grid;
  int threads = 32;  // per block
  int cluster = 1;   // blocks per cluster, along x
  size_t shared = 0;
};

struct Options {
  uint64_t seed = 0;       // of the scheduler: the same seed runs in the same order
  int resident = 1 << 30;  // clusters alive at once
  bool races = false;      // report conflicting accesses that nothing orders
  int64_t in_vain = -1;    // the number of a wait for a flag whose bound passes, whoever sets the flag
};

struct Stats {
  uint64_t switches = 0, products = 0, stores = 0, waits = 0;  // fibers resumed, mma, st.async, waits for flags
};

// Runs `kernel` in every thread. Throws std::runtime_error for whatever the emulator finds wrong.
Stats launch(const Launch& shape, const std::function<void()>& kernel, const Options& options);

// ---- of the calling thread
const Dim& thread_index();
const Dim& block_index();
const Dim& block_size();
const Dim& grid_size();
unsigned cluster_rank();
char* shared_memory();
[[noreturn]] void fail(const std::string& message);

// A point where another thread may go on.
void point(const char* what, Site at);

// ---- barriers
void barrier(int id, int threads, Site at);               // bar.sync
bool barrier_or(int id, int threads, bool own, Site at);  // bar.red.or: has one of the threads said so?
void cluster_arrive(Site at);
void cluster_wait(Site at);

// ---- warps: every lane of `mask` brings an argument, the last to arrive calculates for all
void collective(void* argument, unsigned mask, const char* what, Site at, void (*compute)(void** arguments));
void sync_warp(unsigned mask, Site at);
void count_product();

// ---- addresses of shared memory, (rank + 1) << 24 | offset, so that no small integer is one by accident
uint32_t shared_address(const void* p);
uint32_t map_to_rank(uint32_t address, unsigned rank);
const char* shared_read(uint32_t address, int bytes, Site at);  // of the own block, recorded as a read

// ---- mbarriers: the 8 bytes hold a cookie that must survive, the state is kept aside
void mbarrier_init(uint32_t address, uint32_t count, Site at);
void mbarrier_expect(uint32_t address, int64_t bytes, Site at);  // arrive.expect_tx
void mbarrier_arrive(uint32_t address, Site at);                 // also of another block of the cluster
void mbarrier_wait(uint32_t address, uint32_t parity, Site at);
void store_async(uint32_t address, const void* value, int bytes, uint32_t mbarrier, Site at);

// ---- cp.async: the target is poison until it is waited for
void copy_async16(uint32_t target, const void* source, int bytes, Site at);
void copy_commit();
void copy_wait(int pending, Site at);

// ---- flags in global memory
void fence(Site at);                                     // fence.acq_rel.gpu
void flag_set(uint64_t* flag, uint64_t value, Site at);  // st.relaxed.gpu: it passes on what came before the fence
void raise(int* flag, Site at);                          // st.relaxed.sys of 1, which orders nothing
// ld.acquire.gpu in a loop until the flag is at least `value`; false, the bound of the wait, where all others wait,
// too.
bool flag_wait(const uint64_t* flag, uint64_t value, Site at);

}  // namespace simt
