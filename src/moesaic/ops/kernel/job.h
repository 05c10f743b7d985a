// One call of the experts' kernels: what Python fills in (ops/kernel/call.py mirrors it field by field), and memory for it.
#pragma once
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#else  // one thread; calls into a runtime would be left without a target
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
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
  float *sum;                             // (tokens, dim) sums: y forwards, gradient of x backwards; NULL: memory found here
  void *out;                              // (tokens, dim) x_type: where the sums go, or NULL if nobody wants them
  const void *dy;                         // (tokens, dim) x_type
  void *dw_in, *dw_out;                   // gradients in w_type, or NULL
  float *dweight;                         // (rows,) natural order, or NULL
  double *seconds;                        // mean over threads of each phase, or NULL
} job;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long up(long a, long to) { return (a + to - 1) / to * to; }

// Whether counts, order and tokens stay inside their tensors: whatever they say, nothing is read or written outside.
static int sound(const job *j) {
  int64_t placed = 0;
  for (int64_t e = 0; e < j->experts; e++) {
    if (j->counts[e] < 0 || j->counts[e] > j->rows - placed) return 0;
    placed += j->counts[e];
  }
  for (int64_t i = 0; i < placed; i++) {
    int64_t row = j->order[i];
    if (row < 0 || row >= j->rows || j->token[row] < 0 || j->token[row] >= j->tokens) return 0;
  }
  return 1;
}

enum { PANELS_A, PANELS_B, ROW_BUFFER, WIDE, SHARED, SUMS, SLOTS };
typedef struct {  // of one thread; grows, stays until the thread ends
  char *at[SLOTS];
  size_t size[SLOTS];
} workspace;
static __thread workspace mine;

static pthread_key_t ending;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void give_back(void *p) {
  for (int slot = 0; slot < SLOTS; slot++) free(((workspace *)p)->at[slot]);
}
static void watch_ending(void) { pthread_key_create(&ending, give_back); }

#define KEPT (64u << 20)  // bytes of shared memory beyond which it is given back after a call
static void release(int slot) {
  free(mine.at[slot]);
  mine.at[slot] = NULL, mine.size[slot] = 0;
}

static void *scratch(int slot, size_t size) {
  size += 4096;
  if (mine.size[slot] < size) {
    pthread_once(&once, watch_ending);
    pthread_setspecific(ending, &mine);
    release(slot);
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

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
#define TICK(phase) if (clock) { double t_ = now(); clock[phase] += t_ - clock[PHASES]; clock[PHASES] = t_; }

// Add one thread's share to the mean over threads. To be called by each of them, once.
static void report(const job *j, const double *clock, int threads) {
  if (clock)
#pragma omp critical
    for (int p = 0; p < PHASES; p++) j->seconds[p] += clock[p] / threads;
}

// Where sums are made: in the result itself where that is fp32, else in memory that stays, since fresh memory costs more than the sums.
static int find_sums(job *j) {
  if (!j->out) { j->sum = NULL; return 1; }
  if (j->x_type == F32) j->sum = j->out;
  else if (!j->sum) j->sum = scratch(SUMS, sizeof(float) * j->tokens * j->dim);
  return j->sum != NULL;
}

// A thread's columns from .. to of the sums, before and after: cleared, and rounded to where they go.
static void clear_sums(const job *j, long from, long to) {
  for (long t = 0; t < j->tokens && j->sum && from < to; t++) memset(j->sum + t * j->dim + from, 0, sizeof(float) * (to - from));
}
static void round_sums(const job *j, long from, long to) {
  if (!j->sum || (const void *)j->sum == j->out) return;
  for (long t = 0; t < j->tokens; t++) {
    const float *sum = j->sum + t * j->dim;
    bf16 *out = (bf16 *)j->out + t * j->dim;
    long d = from;
    for (; d + LANES <= to; d += LANES) store_bf16(out + d, load(sum + d));
    for (; d < to; d++) out[d] = to_bf16_1(sum[d]);
  }
}

// A row's hidden units from its products with w_in.
INLINE void activate_row(const job *j, int type, const void *pre, void *hidden) {
  long H = j->hidden, i = 0;
  int act = (int)j->activation;
  for (; i + LANES <= H; i += LANES) {
    vf y = activate(act, load_as(type, pre, i));
    if (j->gated) y *= load_as(type, pre, H + i);
    store_as(type, hidden, i, y);
  }
  for (; i < H; i++) {
    float y = activate(act, splat(load_as_1(type, pre, i)))[0];
    if (j->gated) y *= load_as_1(type, pre, H + i);
    store_as_1(type, hidden, i, y);
  }
}
