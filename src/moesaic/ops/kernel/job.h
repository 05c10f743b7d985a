// One call of the experts' kernels: what Python fills in (ops/kernel/call.py mirrors it field by field), and memory for it.
#pragma once
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "vec.h"

#define PHASES 5
enum { GATHER, PRODUCTS, ACTIVATION, COMBINE, WAIT };

typedef struct {
  int64_t tokens, rows, dim, hidden, experts, gated, activation, threads, x_type, w_type;
  const void *x, *w_in, *w_out;  // (tokens, dim) x_type; (experts, dim, width), (experts, hidden, dim) w_type; width = hidden * (1 + gated)
  const int64_t *token, *order, *counts;  // of each natural row; natural row at each grouped place; rows per expert
  const float *weight;                    // of each natural row
  void *pre;                              // (rows, width) x_type, products before the activation, kept for backward; or NULL
  float *sum;                             // (tokens, dim) sums: y forwards, gradient of x backwards
  void *out;                              // (tokens, dim) x_type: where the sums go; the same place as sum in fp32
  const void *dy;                         // (tokens, dim) x_type
  void *dw_in, *dw_out;                   // gradients in w_type, or NULL
  float *dweight;                         // (rows,) natural order, or NULL
  double *seconds;                        // mean over threads of each phase, or NULL
} job;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long up(long a, long to) { return (a + to - 1) / to * to; }

enum { PANELS_A, PANELS_B, ROW_BUFFER, WIDE, SHARED, SLOTS };
typedef struct {  // of one thread; grows, stays
  char *at[SLOTS];
  size_t size[SLOTS];
} workspace;
static __thread workspace mine;

static void *scratch(int slot, size_t size) {
  size += 4096;
  if (mine.size[slot] < size) {
    free(mine.at[slot]);
    mine.at[slot] = NULL, mine.size[slot] = 0;
    size_t whole = (size + (2u << 20) - 1) & ~(size_t)((2u << 20) - 1);
    void *p = NULL;
    if (posix_memalign(&p, 2u << 20, whole)) return NULL;
#if defined(MADV_HUGEPAGE)
    madvise(p, whole, MADV_HUGEPAGE);
#endif
    mine.at[slot] = p, mine.size[slot] = whole;
  }
  return mine.at[slot];
}
