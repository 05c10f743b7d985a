// What a few tokens need: products of one to a few rows with weights read once, straight from where they lie, at the speed of
// memory; and grouping rows by expert.
#include <math.h>
#include "job.h"

#define FEW 4  // rows at most; with 8 this file takes five times as long to compile, for little
#define MOST_OF_TOP 64

// Stable counting sort of rows by expert id in 0 .. experts, of which the last means nowhere.
int moesaic_group(const int64_t *expert, int64_t rows, int64_t experts, int64_t *order, int64_t *inverse, int64_t *counts) {
  int64_t *place = calloc(experts + 2, sizeof(int64_t));
  if (!place) return 1;
  for (int64_t n = 0; n < rows; n++) {
    if (expert[n] < 0 || expert[n] > experts) { free(place); return 2; }
    place[expert[n] + 1]++;
  }
  memcpy(counts, place + 1, experts * sizeof(int64_t));
  for (int64_t e = 0; e < experts; e++) place[e + 1] += place[e];
  for (int64_t n = 0; n < rows; n++) {
    int64_t at = place[expert[n]]++;
    order[at] = n, inverse[n] = at;
  }
  free(place);
  return 0;
}

// The k best of each row of scores (rows, width), best first, ties to the lowest column, NaN above everything: the first k of a
// stable descending sort. A vector of scores is passed over at once unless one of them beats the worst of the best so far.
int moesaic_top(const float *scores, int64_t rows, int64_t width, int64_t k, int64_t *best, int64_t threads) {
  if (k < 1 || k > width || k > MOST_OF_TOP) return 2;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (rows * width > 65536)
  for (int64_t r = 0; r < rows; r++) {
    const float *row = scores + r * width;
    int32_t key[MOST_OF_TOP], worst = INT32_MIN;
    int64_t *at = best + r * k;
    int held = 0;
    for (int64_t c = 0; c < width; c += LANES) {
      vf v = {0};
      int n = (int)least(LANES, width - c);
      if (n == LANES) v = load(row + c);
      else for (int l = 0; l < n; l++) v[l] = row[c + l];
      vi bits = (vi)(v + (vf){0});  // -0 + 0 is 0, so that both zeros tie
      vi order = bits ^ ((bits >> 31) & 0x7fffffff), nan = v != v;  // as integers, floats of one order
      order = (order & ~nan) | (nan & 0x7fffffff);
#if LANES == 16
      uint32_t beats = _mm512_cmpgt_epi32_mask((__m512i)order, _mm512_set1_epi32(worst));
      if (held < k) beats = 0xffff;
#else
      uint32_t beats = 0xffff;
#endif
      beats &= (uint32_t)((1u << n) - 1);
      for (; beats; beats &= beats - 1) {
        int l = __builtin_ctz(beats), i = held < k ? held : (int)k - 1;
        if (held == k && order[l] <= key[i]) continue;
        for (; i > 0 && key[i - 1] < order[l]; i--) key[i] = key[i - 1], at[i] = at[i - 1];
        key[i] = order[l], at[i] = c + l;
        if (held < k) held++;
        if (held == k) worst = key[k - 1];
      }
    }
  }
  return 0;
}

INLINE float total(vf v) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float t = 0;
  for (int l = 0; l < LANES; l++) t += v[l];
  return t;
#endif
}

// ---- y = x / sqrt(mean(x^2) + eps) * weight, row by row, in fp32 ------------------------------------------------------------

INLINE void norm_row(int xt, int wt, const void *x, const void *weight, void *y, long dim, float eps) {
  vf squares = {0};
  long d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vf v = load_as(xt, x, d);
    squares += v * v;
  }
  float sum = total(squares);
  for (; d < dim; d++) sum += load_as_1(xt, x, d) * load_as_1(xt, x, d);
  float scale = 1.0f / sqrtf(sum / dim + eps);
  for (d = 0; d + LANES <= dim; d += LANES) store_as(xt, y, d, load_as(xt, x, d) * scale * load_as(wt, weight, d));
  for (; d < dim; d++) store_as_1(xt, y, d, load_as_1(xt, x, d) * scale * load_as_1(wt, weight, d));
}

int moesaic_rms_norm(const char *x, const void *weight, char *y, int64_t rows, int64_t dim, double eps, int64_t x_type, int64_t w_type, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (rows * dim > 65536)
  for (int64_t r = 0; r < rows; r++) {
    long at = r * dim * size_of((int)x_type);
    if (x_type == F32) norm_row(F32, F32, x + at, weight, y + at, dim, (float)eps);
    else if (w_type == F32) norm_row(BF16, F32, x + at, weight, y + at, dim, (float)eps);
    else norm_row(BF16, BF16, x + at, weight, y + at, dim, (float)eps);
  }
  return 0;
}

// ---- y (m, out) = x (m, in) w^T, w (out, in): dot products along rows of w ------------------------------------------------

// "outs" rows of w, each read once from its beginning to its end, times m rows of x. Each sum is "chains" sums side by side,
// because an addition waits for the one before it.
INLINE void dots(int m, int outs, int chains, int xt, int wt, const char *x, const char *w, long in, float *y, long y_stride) {
  vf acc[FEW][4];  // outs * chains is 4 at most
#pragma GCC unroll 8
  for (int r = 0; r < m; r++)
#pragma GCC unroll 4
    for (int c = 0; c < outs * chains; c++) acc[r][c] = (vf){0};
  long i = 0;
#if HAVE_DOT
  if (xt == BF16 && wt == BF16)
    for (; i + 32 * chains <= in; i += 32 * chains)
#pragma GCC unroll 8
      for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++) {
          __m512i xi = _mm512_loadu_si512(x + 2 * (r * in + i + 32 * c));
#pragma GCC unroll 4
          for (int o = 0; o < outs; o++)
            acc[r][o * chains + c] = (vf)_mm512_dpbf16_ps((__m512)acc[r][o * chains + c], (__m512bh)xi, (__m512bh)_mm512_loadu_si512(w + 2 * (o * in + i + 32 * c)));
        }
#endif
  for (; i + LANES * chains <= in; i += LANES * chains)
#pragma GCC unroll 8
    for (int r = 0; r < m; r++)
#pragma GCC unroll 4
      for (int c = 0; c < chains; c++) {
        vf xi = load_as(xt, x, r * in + i + LANES * c);
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) acc[r][o * chains + c] += xi * load_as(wt, w, o * in + i + LANES * c);
      }
#pragma GCC unroll 8
  for (int r = 0; r < m; r++)
#pragma GCC unroll 4
    for (int o = 0; o < outs; o++) {
      vf sum = acc[r][o * chains];
#pragma GCC unroll 4
      for (int c = 1; c < chains; c++) sum += acc[r][o * chains + c];
      float t = total(sum);
      for (long k = i; k < in; k++) t += load_as_1(xt, x, r * in + k) * load_as_1(wt, w, o * in + k);
      y[r * y_stride + o] = t;
    }
}

// One row of w at a time is one stream of memory; with many rows of x, loading those for four rows of w at once saves more.
#define DOTS(M, OUTS)                                                                                                            \
  case M:                                                                                                                        \
    for (; from + OUTS <= to; from += OUTS) dots(M, OUTS, 4 / OUTS, xt, wt, x, w + size_of(wt) * from * in, in, y + from, out); \
    for (; from < to; from++) dots(M, 1, 1, xt, wt, x, w + size_of(wt) * from * in, in, y + from, out);                         \
    break;
INLINE void some_dots(int m, int xt, int wt, const char *x, const char *w, long in, long out, long from, long to, float *y) {
  switch (m) { DOTS(1, 1) DOTS(2, 1) DOTS(3, 4) DOTS(4, 4) }
}

// y is fp32 scratch (m, out) in fp32, else the scratch the result is rounded from.
int moesaic_linear(const void *x, const void *w, const float *bias, void *y, float *sums, int64_t m, int64_t in, int64_t out, int64_t x_type, int64_t w_type, int64_t threads) {
  if (m > FEW) return 2;
  float *to_sums = x_type == F32 ? y : sums;
#pragma omp parallel num_threads((int)threads) if (in * out > 400000)  // waking threads costs as much as reading half a MiB
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    long piece = up((out + all - 1) / all, 16), from = least(out, me * piece), to = least(out, from + piece);
    if (x_type == F32) some_dots((int)m, F32, F32, x, w, in, out, from, to, to_sums);
    else if (w_type == F32) some_dots((int)m, BF16, F32, x, w, in, out, from, to, to_sums);
    else some_dots((int)m, BF16, BF16, x, w, in, out, from, to, to_sums);
    for (long r = 0; r < m; r++)
      for (long o = from; o < to; o++) {
        float v = to_sums[r * out + o] + (bias ? bias[o] : 0.0f);
        if (x_type == F32) ((float *)y)[r * out + o] = v;
        else ((bf16 *)y)[r * out + o] = to_bf16_1(v);
      }
  }
  return 0;
}

// ---- y (m, n) += x (m, k) w, w (k, n): rows of w, each times a number -------------------------------------------------------

#define DEEP 8  // rows of w at once, each a stream
#if HAVE_DOT
#define PAIRS(B) B, B + 32, B + 1, B + 33, B + 2, B + 34, B + 3, B + 35, B + 4, B + 36, B + 5, B + 37, B + 6, B + 38, B + 7, B + 39
static const uint16_t low_halves[32] __attribute__((aligned(64))) = {PAIRS(0), PAIRS(8)};
static const uint16_t high_halves[32] __attribute__((aligned(64))) = {PAIRS(16), PAIRS(24)};
#endif
// Row d of the eight is row d * k / 8 + i: each is read on from row to row without a break, and no two lie in one page, where
// their prefetchers would get into each other's way (rows of 1 KiB: 21 GB/s this way, 12 as eight neighbours, of the 24 that one core reads).
INLINE void streams(int m, int wt, const float *x, long x_stride, const char *w, long stride, long k, long from, long to, float *y, long y_stride) {
  long apart = k / DEEP;
  for (long i = 0; i < apart; i++) {
    const char *wi = w + size_of(wt) * i * stride;
    long n = from, step = apart * stride;
#if HAVE_DOT
    // Two rows of w at a time as pairs (beside weights in bf16 x is of bf16 too): less than half the instructions of widening both.
    if (wt == BF16) {
      __m512i pairs[FEW][DEEP / 2];
#pragma GCC unroll 8
      for (int r = 0; r < m; r++)
#pragma GCC unroll 4
        for (int d = 0; d < DEEP / 2; d++) {
          const float *xd = x + r * x_stride + i + 2 * d * apart;
          pairs[r][d] = _mm512_set1_epi32((int)(to_bf16_1(xd[0]) | (uint32_t)to_bf16_1(xd[apart]) << 16));
        }
      for (; n + 32 <= to; n += 32) {
        __m512 acc[FEW][2];
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) acc[r][0] = (__m512)load(y + r * y_stride + n), acc[r][1] = (__m512)load(y + r * y_stride + n + 16);
#pragma GCC unroll 4
        for (int d = 0; d < DEEP; d += 2) {
          __m512i p = _mm512_loadu_si512(wi + 2 * (d * step + n)), q = _mm512_loadu_si512(wi + 2 * ((d + 1) * step + n));
          __m512i low = _mm512_permutex2var_epi16(p, *(const __m512i *)low_halves, q), high = _mm512_permutex2var_epi16(p, *(const __m512i *)high_halves, q);
#pragma GCC unroll 8
          for (int r = 0; r < m; r++) {
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], (__m512bh)low, (__m512bh)pairs[r][d / 2]);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], (__m512bh)high, (__m512bh)pairs[r][d / 2]);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) store(y + r * y_stride + n, (vf)acc[r][0]), store(y + r * y_stride + n + 16, (vf)acc[r][1]);
      }
    }
#endif
    for (; n + LANES <= to; n += LANES) {
      vf acc[FEW];
#pragma GCC unroll 8
      for (int r = 0; r < m; r++) acc[r] = load(y + r * y_stride + n);
#pragma GCC unroll 8
      for (int d = 0; d < DEEP; d++) {
        vf wd = load_as(wt, wi, d * step + n);
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) acc[r] += wd * x[r * x_stride + i + d * apart];
      }
#pragma GCC unroll 8
      for (int r = 0; r < m; r++) store(y + r * y_stride + n, acc[r]);
    }
    for (; n < to; n++)
      for (int r = 0; r < m; r++)
        for (int d = 0; d < DEEP; d++) y[r * y_stride + n] += x[r * x_stride + i + d * apart] * load_as_1(wt, wi, d * step + n);
  }
  for (long i = apart * DEEP; i < k; i++)
    for (int r = 0; r < m; r++)
      for (long n = from; n < to; n++) y[r * y_stride + n] += x[r * x_stride + i] * load_as_1(wt, w, i * stride + n);
}
#define STREAMS(M) case M: streams(M, wt, x, x_stride, w, stride, k, from, to, y, y_stride); break;
INLINE void some_streams(int m, int wt, const float *x, long x_stride, const char *w, long stride, long k, long from, long to, float *y, long y_stride) {
  switch (m) { STREAMS(1) STREAMS(2) STREAMS(3) STREAMS(4) }
}
static __attribute__((noinline)) void stream(int m, int wt, const float *x, long xs, const char *w, long s, long k, long from, long to, float *y, long ys) {
  if (wt == F32) some_streams(m, F32, x, xs, w, s, k, from, to, y, ys);
  else some_streams(m, BF16, x, xs, w, s, k, from, to, y, ys);
}

typedef struct { int64_t expert, first; int rows; } piece;  // up to FEW rows of one expert: grouped places

// The experts' forward for few rows (see experts.c for many): only chosen experts are read, each of their weights once.
int moesaic_experts_few(const job *given) {
  job found = *given;
  const job *j = &found;
  if (!sound(j)) return 2;
  if (!find_sums(&found)) return 1;
  long D = j->dim, H = j->hidden, W = H * (1 + j->gated), N = 0, pieces = 0, wide = size_of((int)j->w_type);
  for (long e = 0; e < j->experts; e++) N += j->counts[e];
  long floats = up(N * (2 * D + W + H), 16);
  float *pre = scratch(SHARED, sizeof(float) * floats + sizeof(piece) * N);
  if (!pre) return 1;
  float *hidden = pre + N * W, *x = hidden + N * H, *y = x + N * D;
  piece *list = (piece *)(pre + floats);
  for (long e = 0, at = 0; e < j->experts; at += j->counts[e++])
    for (long r = 0; r < j->counts[e]; r += FEW) list[pieces++] = (piece){e, at + r, (int)least(FEW, j->counts[e] - r)};
  int threads = (int)(N * D * W < 65536 ? 1 : j->threads);
  // Whole experts where there are enough of them, since long runs of memory are read fastest; else columns are shared out.
  long parts = pieces >= 2 * threads || (pieces && pieces % threads == 0) ? 1 : (2 * threads + pieces - 1) / most(pieces, 1);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    double times[PHASES + 1] = {0}, *clock = j->seconds ? times : NULL;
    times[PHASES] = now();
#pragma omp for schedule(dynamic, 1)
    for (long p = 0; p < pieces * parts; p++) {
      piece q = list[p / parts];
      long step = up((W + parts - 1) / parts, 4 * LANES), from = least(W, p % parts * step), to = least(W, from + step);
      float *xq = x + q.first * D, *preq = pre + q.first * W;
      for (int r = 0; r < q.rows; r++) {
        const char *row = (const char *)j->x + size_of((int)j->x_type) * j->token[j->order[q.first + r]] * D;
        // Parts of one piece write the same numbers here.
        if (parts == 1 || p % parts == 0) { if (j->x_type == F32) memcpy(xq + r * D, row, sizeof(float) * D); else for (long d = 0; d < D; d++) xq[r * D + d] = from_bf16_1(((const bf16 *)row)[d]); }
        memset(preq + r * W + from, 0, sizeof(float) * (to - from));
      }
      TICK(GATHER)
      if (parts > 1) continue;
      const char *w_in = (const char *)j->w_in + wide * q.expert * D * W, *w_out = (const char *)j->w_out + wide * q.expert * H * D;
      stream(q.rows, (int)j->w_type, xq, D, w_in, W, D, from, to, preq, W);
      TICK(PRODUCTS)
      for (int r = 0; r < q.rows; r++) activate_row(j, F32, preq + r * W, hidden + (q.first + r) * H);
      TICK(ACTIVATION)
      memset(y + q.first * D, 0, sizeof(float) * q.rows * D);
      stream(q.rows, (int)j->w_type, hidden + q.first * H, H, w_out, D, H, 0, D, y + q.first * D, D);
      TICK(PRODUCTS)
    }
    TICK(WAIT)
    if (parts > 1) {
#pragma omp for schedule(dynamic, 1)
      for (long p = 0; p < pieces * parts; p++) {
        piece q = list[p / parts];
        long step = up((W + parts - 1) / parts, 4 * LANES), from = least(W, p % parts * step), to = least(W, from + step);
        stream(q.rows, (int)j->w_type, x + q.first * D, D, (const char *)j->w_in + wide * q.expert * D * W, W, D, from, to, pre + q.first * W, W);
        TICK(PRODUCTS)
      }
      TICK(WAIT)
#pragma omp for schedule(dynamic, 1)
      for (long n = 0; n < N; n++) activate_row(j, F32, pre + n * W, hidden + n * H);
      TICK(ACTIVATION)
#pragma omp for schedule(dynamic, 1)
      for (long p = 0; p < pieces * parts; p++) {
        piece q = list[p / parts];
        long step = up((D + parts - 1) / parts, 4 * LANES), from = least(D, p % parts * step), to = least(D, from + step);
        for (int r = 0; r < q.rows; r++) memset(y + (q.first + r) * D + from, 0, sizeof(float) * (to - from));
        stream(q.rows, (int)j->w_type, hidden + q.first * H, H, (const char *)j->w_out + wide * q.expert * H * D, D, H, from, to, y + q.first * D, D);
        TICK(PRODUCTS)
      }
      TICK(WAIT)
    }
    long step = up((D + all - 1) / all, LANES), from = least(D, step * me), to = least(D, from + step);
    clear_sums(j, from, to);
    for (long i = 0; i < N; i++) {
      int64_t row = j->order[i];
      for (long d = from; d < to; d++) j->sum[j->token[row] * D + d] += j->weight[row] * y[i * D + d];
    }
    round_sums(j, from, to);
    TICK(COMBINE)
    report(j, clock, all);
  }
  return 0;
}
