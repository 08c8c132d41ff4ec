// The engine's interface: plain structs and one function table per instruction set.
//
// Symbols: T steps, B batch, I inputs, H units, P outputs (P = H without a projection), S streams
// (directions), N rows: T * B, or the tokens of a packed batch. G, D, V: the cell's gates, gate
// gradients and tape. K: its own values of a unit, such as peepholes. "E" is the storage type of the call, "A" its
// arithmetic type: float for storage of 16 and 32 bits, double for 64. Every array is contiguous and aligned to its
// elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/list.h"

namespace fastrnn {

#define FASTRNN_ONE(C) +1
constexpr int kCellCount = 0 FASTRNN_FOR_EACH_CELL(FASTRNN_ONE);
#undef FASTRNN_ONE

enum class DType : int { Float32, Float64, BFloat16, Float16, Count };

struct StreamWeights {
  const void* w_ih;  // (G*H, I)  E
  const void* w_hh;  // (G*H, P)  E
  const void* b_ih;  // (G*H)     E, or null
  const void* b_hh;  // (G*H)     E, or null
  const void* w_hr;  // (P, H)    E, or null without projection
};

// Gradients of a stream's parameters, each like the parameter, null when not wanted.
struct StreamGradients {
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

struct Problem {
  int64_t T, B, I, H, P, S;
  const int64_t* batch_sizes;    // (T), not increasing; null: every step has B rows
  const uint8_t* resets;         // (N), or null
  const uint8_t* reverse;        // (S)
  const StreamWeights* weights;  // (S)
  const void* const* params;     // (S * K), each (H)  E
  const void* x;                 // (N, I)     E
  const void* h0;                // (S, B, P)  E, or null for zeros
  const void* c0;                // (S, B, H)  E, or null for zeros
  int threads;
};

struct ForwardArgs : Problem {
  void* y;     // (N, S*P)      E
  void* hn;    // (S, B, P)     E
  void* cn;    // (S, B, H)     E, for cells with c
  void* tape;  // (S, N, V*H)   A, or null when no backward follows
  void* c;     // (S, N, H)     A, likewise
  void* m;     // (S, N, H)     A, likewise, with a projection: what it is applied to
};

struct BackwardArgs : Problem {
  const void* y;  // as forward left them
  const void* tape;
  const void* c;
  const void* m;
  const void* dy;                    // (N, S*P)     E
  const void* dhn;                   // (S, B, P)    E, or null for zeros
  const void* dcn;                   // (S, B, H)    E, or null for zeros
  const void* dc;                    // (S, N, H)    E, the gradient of c at every step, or null for zeros
  void* dgates;                      // (S, N, D*H)  E, or null where `gradients` say it all; may be the tape itself
                                     //              where the two have one size and type
  void* dh0;                         // (S, B, P)    E, or null when not wanted
  void* dc0;                         // (S, B, H)    E, for cells with c, likewise
  void* dh;                          // (S, N, P)    E, with a projection: the whole gradient of h
  void* dx;                          // (S, N, I)    E, each stream's gradient of x, or null when not wanted
  const StreamGradients* gradients;  // (S), or null; with 16-bit storage, for at most kFewRows rows only
  void* const* dparams;              // (S * K), each (H)  E
};

using ForwardFunction = void (*)(const ForwardArgs&);
using BackwardFunction = void (*)(const BackwardArgs&);

struct Kernels {
  ForwardFunction forward[kCellCount][int(DType::Count)];
  BackwardFunction backward[kCellCount][int(DType::Count)];
};

// Rows (steps x batch) up to which weights are read where they lie, since packing would cost more,
// and up to which the gradients of the weights are added up row by row.
constexpr int64_t kFewRows = 12;

const Kernels& kernels();      // those of the chosen instruction set
const char* isa();             // its name
int isas(const char** names);  // all that this machine can run, best first; returns their number

int processors();  // how many this process may use

// Scratch memory of the calling thread, kept from call to call and given back when it has long been
// far larger than needed; aligned to 64 bytes.
void* workspace(size_t bytes);

// Memory of its own, aligned likewise; none of no bytes.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* memory() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

// Runs body(thread, arg) on `threads` threads at once, or returns false without having run any.
bool run_parallel(int threads, void (*body)(int, void*), void* arg);

}  // namespace fastrnn
