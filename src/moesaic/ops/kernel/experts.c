// The feed-forward experts of a sparse layer, forward and backward, from tokens to tokens: gather, product, activation, product,
// weighted sum, in buffers that stay in cache.
//
// Work goes in waves of whole experts. In a wave, tasks (an expert's rows, cut evenly) run on any thread; then every thread adds
// the wave's rows into its own columns of the result, in the order of the rows. So nothing of the size (rows x dim) is
// stored (but for an expert that takes them all), no two threads write one number, and the sums have one order whatever the number of threads.
#include "job.h"
#include "product.h"

#define CHUNK 256   // rows of one expert in a task
#define GROUP 256   // bytes of a row of weights that are packed in one go: whole lines, in runs
#define DEPTH 1024  // rows of one expert added up in one go for the gradient of its weights

typedef struct { int64_t expert, first, rows, part, parts; } task;  // rows: grouped places

// ---- one product on one thread --------------------------------------------------------------------------------------------

typedef struct { void *at; long stride; int type; } target;

typedef struct { const char *at; long stride, rows, bytes; } region;  // of memory that will be read next

INLINE void prefetch(region r, long part, long parts) {
  for (long i = r.rows * part / parts; i < r.rows * (part + 1) / parts; i++)
    for (long b = 0; b < r.bytes; b += 64) __builtin_prefetch(r.at + i * r.stride + b, 0, 2);
}

// Tiles of a packed "a" (all its panels) times one packed panel of b, columns col.. of the target.
INLINE void panel_times(int word, const uint32_t *pa, const uint32_t *pb, long height, long k, target c, int type, long col, long cols, int add, region next) {
  long kw = words(word, k);
  float small[ROWS * COLS] __attribute__((aligned(64)));
  for (long i = 0; i < height; i += ROWS) {
    int h = (int)least(ROWS, height - i);
    const uint32_t *a = pa + i * kw;
    prefetch(next, i / ROWS, (height + ROWS - 1) / ROWS);
    if (type == F32 && col + COLS <= cols) {
      any_tile(word, h, a, pb, kw, (float *)c.at + i * c.stride + col, c.stride, add);
      continue;
    }
    any_tile(word, h, a, pb, kw, small, COLS, 0);
    for (int r = 0; r < h; r++) {
      long at = (i + r) * c.stride + col;
      int n = (int)least(COLS, cols - col), j = 0;
      if (add) {  // only ever into fp32
        for (; j < n; j++) ((float *)c.at)[at + j] += small[r * COLS + j];
        continue;
      }
      for (; j + LANES <= n; j += LANES) store_as(type, c.at, at + j, load(small + r * COLS + j));
      for (; j < n; j++) store_as_1(type, c.at, at + j, small[r * COLS + j]);
    }
  }
}

INLINE long columns_of_group(int type) { return GROUP / (COLS * size_of(type)) * COLS; }
// The part of b (k, n), or (n, k) transposed, that is packed first from column j.
INLINE region group_of(const matrix *b, int type, int transposed, long k, long n, long j) {
  long wide = least(columns_of_group(type), n - j), size = size_of(type);
  return (region){(const char *)b->base + j * size * (transposed ? b->stride : 1), b->stride * size, transposed ? wide : k, (transposed ? k : wide) * size};
}

// c (m, n) = a (m, k) b, where b is (k, n), or (n, k) transposed. Reads b once.
INLINE void multiply(uint32_t *pa, uint32_t *pb, const matrix *a, int a_type, int a_word, const matrix *b, int b_type, int b_word,
                     int transposed, long m, long k, long n, target c, int c_type, region after, double *clock) {
  long kw = words(a_word, k);
  for (long i = 0; i < m; i += ROWS) pack_along(pa + i * kw, ROWS, a, a_type, a_word, i, m, k);
  TICK(GATHER)
  long group = columns_of_group(b_type);
  for (long j = 0; j < n; j += group) {
    long end = least(n, j + group);
    if (!transposed) pack_down(pb, COLS, b, b_type, b_word, k, j, end, n);
    // The hardware does not follow a panel's rows from page to page, so weights are asked for one group ahead.
    region next = end < n ? group_of(b, b_type, transposed, k, n, end) : after;
    for (long p = j; p < end; p += COLS) {
      uint32_t *panel = pb + (p - j) * kw;
      if (transposed) pack_along(panel, COLS, b, b_type, b_word, p, n, k);
      region share = next;
      share.rows = next.rows * least(end - j, p - j + COLS) / (end - j) - next.rows * (p - j) / (end - j);
      share.at += next.rows * (p - j) / (end - j) * next.stride;
      panel_times(a_word, pa, panel, m, k, c, c_type, p, n, 0, share);
    }
  }
  TICK(PRODUCTS)
}

// c (m, columns from .. to of n) = a^T b with a (k, m) and b (k, n): the gradient of weights, k rows of one expert.
INLINE void multiply_rows(uint32_t *pa, uint32_t *pb, const matrix *a, const matrix *b, int type, int word, long m, long k, long n,
                          long from, long to, target c, int c_type, double *clock) {
  float *wide = NULL;
  if (c_type != F32 && k > DEPTH) wide = scratch(WIDE, sizeof(float) * m * (to - from));
  for (long at = 0; at < k; at += DEPTH) {
    long deep = least(DEPTH, k - at), kw = words(word, deep);
    matrix ak = *a, bk = *b;
    if (a->index) ak.index += at; else ak.base = row_of(a, type, at);
    if (b->index) bk.index += at; else bk.base = row_of(b, type, at);
    pack_down(pa, ROWS, &ak, type, word, deep, 0, m, m);
    TICK(GATHER)
    long group = columns_of_group(type);
    for (long j = from; j < to; j += COLS) {
      uint32_t *panel = pb + (j - from) % group * kw;
      if ((j - from) % group == 0) pack_down(pb, COLS, &bk, type, word, deep, j, least(to, j + group), n);
      if (wide) panel_times(word, pa, panel, m, deep, (target){wide - from, to - from, F32}, F32, j, to, at > 0, (region){0});
      else panel_times(word, pa, panel, m, deep, c, c_type, j, n, at > 0, (region){0});
    }
    TICK(PRODUCTS)
  }
  for (long i = 0; wide && i < m; i++)
    for (long j = from; j < to; j++) store_as_1(c_type, c.at, i * c.stride + j, wide[i * (to - from) + j - from]);
}

// ---- tasks ----------------------------------------------------------------------------------------------------------------

typedef struct {  // shared by all threads of a call
  const job *j;
  long width, deepest;   // columns of w_in; rows of the busiest expert
  int64_t *token;        // of each grouped place
  int64_t *starts;       // (experts + 1) first grouped place
  float *wave;           // (rows of the wave, dim): outputs, or gradients of inputs
  char *dpre, *scaled;   // backward, x_type: (rows of the wave, width), (rows of the wave, hidden)
  long first;            // grouped place at which the wave starts
  long num, num_more;    // tasks of the wave: rows, gradients of weights
} call;

INLINE uint32_t *panels_a(const call *c, int word) {
  const job *j = c->j;
  long a = (CHUNK + 2 * ROWS) * words(word, most(j->dim, c->width)), b = (most(j->dim, j->hidden) + ROWS) * words(word, least(c->deepest, DEPTH));
  return scratch(PANELS_A, 4 * (most(a, b) + 2 * LANES));
}
INLINE uint32_t *panels_b(const call *c, int word) {
  return scratch(PANELS_B, 2 * GROUP * (words(word, most(most(c->j->dim, c->width), least(c->deepest, DEPTH))) + 2));
}

// Whose weights this thread will probably read next.
INLINE long next_expert(const call *c, task t) { return least(c->j->experts - 1, t.expert + c->j->threads); }

INLINE void forward_task(const call *c, task t, int xt, int wt, int xw, int ww, double *clock) {
  const job *j = c->j;
  long D = j->dim, H = j->hidden, W = c->width;
  uint32_t *pa = panels_a(c, xw), *pb = panels_b(c, xw);
  char *pre = scratch(ROW_BUFFER, size_of(xt) * t.rows * (W + H)), *hidden = pre + size_of(xt) * t.rows * W;
  if (j->pre) pre = (char *)j->pre + size_of(xt) * t.first * W;
  matrix x = {j->x, c->token + t.first, D, xt}, h = {hidden, NULL, H, xt};
  matrix w_in = {(const char *)j->w_in + size_of(wt) * t.expert * D * W, NULL, W, wt};
  matrix w_out = {(const char *)j->w_out + size_of(wt) * t.expert * H * D, NULL, D, wt};
  multiply(pa, pb, &x, xt, xw, &w_in, wt, ww, 0, t.rows, D, W, (target){pre, W, xt}, xt, group_of(&w_out, wt, 0, H, D, 0), clock);
  for (long r = 0; r < t.rows; r++) activate_row(j, xt, pre + size_of(xt) * r * W, hidden + size_of(xt) * r * H);
  TICK(ACTIVATION)
  matrix later = w_in;
  later.base = (const char *)w_in.base + size_of(wt) * (next_expert(c, t) - t.expert) * D * W;
  multiply(pa, pb, &h, xt, xw, &w_out, wt, ww, 0, t.rows, H, D, (target){c->wave + (t.first - c->first) * D, D, F32}, F32,
           group_of(&later, wt, 0, D, W, 0), clock);
}

// From the gradient g of the unweighted hidden row: the gradient of the weight, of the row before the activation, and the weighted row.
INLINE float activate_back_row(const job *j, int type, float weight, const void *pre, const float *g, void *dpre, void *scaled) {
  long H = j->hidden, i = 0;
  int act = (int)j->activation;
  vf total = {0};
  float dweight = 0;
  for (; i + LANES <= H; i += LANES) {
    vf slope, a = activate_both(act, load_as(type, pre, i), &slope), gi = load(g + i), dh = gi * weight;
    if (j->gated) {
      vf u = load_as(type, pre, H + i);
      store_as(type, dpre, i, dh * u * slope), store_as(type, dpre, H + i, dh * a);
      a *= u;
    } else {
      store_as(type, dpre, i, dh * slope);
    }
    total += gi * a;
    store_as(type, scaled, i, a * weight);
  }
  for (int l = 0; l < LANES; l++) dweight += total[l];
  for (; i < H; i++) {
    vf slope, v = activate_both(act, splat(load_as_1(type, pre, i)), &slope);
    float a = v[0], dh = g[i] * weight;
    if (j->gated) {
      float u = load_as_1(type, pre, H + i);
      store_as_1(type, dpre, i, dh * u * slope[0]), store_as_1(type, dpre, H + i, dh * a);
      a *= u;
    } else {
      store_as_1(type, dpre, i, dh * slope[0]);
    }
    dweight += g[i] * a;
    store_as_1(type, scaled, i, a * weight);
  }
  return dweight;
}

INLINE void backward_task(const call *c, task t, int xt, int wt, int xw, int ww, double *clock) {
  const job *j = c->j;
  long D = j->dim, H = j->hidden, W = c->width, at = t.first - c->first;
  uint32_t *pa = panels_a(c, xw), *pb = panels_b(c, xw);
  float *g = scratch(ROW_BUFFER, sizeof(float) * t.rows * H);
  char *dpre = c->dpre + size_of(xt) * at * W, *scaled = c->scaled + size_of(xt) * at * H;
  const char *pre = (const char *)j->pre + size_of(xt) * t.first * W;
  matrix dy = {j->dy, c->token + t.first, D, xt}, dp = {dpre, NULL, W, xt};
  matrix w_in = {(const char *)j->w_in + size_of(wt) * t.expert * D * W, NULL, W, wt};
  matrix w_out = {(const char *)j->w_out + size_of(wt) * t.expert * H * D, NULL, D, wt};
  multiply(pa, pb, &dy, xt, xw, &w_out, wt, ww, 1, t.rows, D, H, (target){g, H, F32}, F32, j->sum ? group_of(&w_in, wt, 1, W, D, 0) : (region){0}, clock);
  for (long r = 0; r < t.rows; r++) {
    int64_t row = j->order[t.first + r];
    float dw = activate_back_row(j, xt, j->weight[row], pre + size_of(xt) * r * W, g + r * H, dpre + size_of(xt) * r * W, scaled + size_of(xt) * r * H);
    if (j->dweight) j->dweight[row] = dw;
  }
  TICK(ACTIVATION)
  matrix later = w_out;
  later.base = (const char *)w_out.base + size_of(wt) * (next_expert(c, t) - t.expert) * H * D;
  if (j->sum)
    multiply(pa, pb, &dp, xt, xw, &w_in, wt, ww, 1, t.rows, W, D, (target){c->wave + at * D, D, F32}, F32,
             group_of(&later, wt, 1, D, H, 0), clock);
}

// Gradient of one expert's matrices: columns [part / parts, (part + 1) / parts) of w_in (even tasks) or w_out (odd ones).
INLINE void weights_task(const call *c, task t, int xt, int wt, int xw, double *clock) {
  const job *j = c->j;
  long D = j->dim, H = j->hidden, W = c->width, at = t.first - c->first;
  int out = t.part & 1;
  long m = out ? H : D, n = out ? D : W, piece = up((n + t.parts - 1) / t.parts, COLS), from = t.part / 2 * piece, to = least(n, from + piece);
  char *dw = out ? j->dw_out : j->dw_in;
  if (!dw || from >= to) return;
  dw += size_of(wt) * t.expert * m * n;
  if (!t.rows) {
    for (long i = 0; i < m; i++) memset(dw + size_of(wt) * (i * n + from), 0, size_of(wt) * (to - from));
    TICK(PRODUCTS)
    return;
  }
  uint32_t *pa = panels_a(c, xw), *pb = panels_b(c, xw);
  matrix x = {j->x, c->token + t.first, D, xt}, dp = {c->dpre + size_of(xt) * at * W, NULL, W, xt};
  matrix dy = {j->dy, c->token + t.first, D, xt}, h = {c->scaled + size_of(xt) * at * H, NULL, H, xt};
  multiply_rows(pa, pb, out ? &h : &x, out ? &dy : &dp, xt, xw, m, t.rows, n, from, to, (target){dw, n, wt}, wt, clock);
}

enum { FORWARD, BACKWARD, WEIGHTS };
#define KIND(NAME, XT, WT, XW, WW)                                                                \
  static __attribute__((noinline)) void NAME(const call *c, int what, task t, double *clock) {    \
    if (what == FORWARD) forward_task(c, t, XT, WT, XW, WW, clock);                               \
    else if (what == BACKWARD) backward_task(c, t, XT, WT, XW, WW, clock);                        \
    else weights_task(c, t, XT, WT, XW, clock);                                                   \
  }
KIND(run_fp32, F32, F32, PLAIN, PLAIN)
#if HAVE_DOT
KIND(run_bf16, BF16, BF16, DOT, DOT)
KIND(run_mixed, BF16, F32, DOT, DOT)
#else
KIND(run_bf16, BF16, BF16, PLAIN, PLAIN)
KIND(run_mixed, BF16, F32, PLAIN, ROUNDED)
#endif

static void run(const call *c, int what, task t, double *clock) {
  if (c->j->x_type == F32) run_fp32(c, what, t, clock);
  else if (c->j->w_type == F32) run_mixed(c, what, t, clock);
  else run_bf16(c, what, t, clock);
}

// ---- waves ----------------------------------------------------------------------------------------------------------------

// Add the wave's rows into columns from .. to of the sums, in their order.
static void add_rows(const call *c, long end, long from, long to, int weighted) {
  const job *j = c->j;
  for (long i = c->first; i < end; i++) {
    float w = weighted ? j->weight[j->order[i]] : 1.0f;
    const float *row = c->wave + (i - c->first) * j->dim;
    float *sum = j->sum + c->token[i] * j->dim;
    if (i + 1 < end)  // tokens lie anywhere: the next one's sums are asked for while this one's are added to
      for (long d = from; d < to; d += 16) __builtin_prefetch(j->sum + c->token[i + 1] * j->dim + d, 1, 3);
    long d = from;
    for (; d + LANES <= to; d += LANES) store(sum + d, load(sum + d) + load(row + d) * w);
    for (; d < to; d++) sum[d] += row[d] * w;
  }
}

// All a thread will need, so that running out of memory is noticed before anything is computed.
static int reserve(const call *c, int backward, int wide) {
  const job *j = c->j;
  long buffer = CHUNK * (backward ? 4 * j->hidden : wide * (c->width + j->hidden));
  long sums = backward && j->w_type != F32 && c->deepest > DEPTH ? 4 * j->dim * most(c->width, j->dim) : 0;
  return panels_a(c, PLAIN) && panels_b(c, PLAIN) && scratch(ROW_BUFFER, buffer) && (!sums || scratch(WIDE, sums));
}

static long chunks_of(long rows, long threads) {
  return rows > 2 * CHUNK ? up((rows + CHUNK - 1) / CHUNK, threads) : (rows + CHUNK - 1) / CHUNK;
}

// The tasks of the wave of experts e .. stop.
static void list_tasks(call *c, long e, long stop, int threads, int backward, task *tasks, task *more) {
  c->num = c->num_more = 0;
  c->first = c->starts[e];
  for (; e < stop; e++) {
    // A busy expert is cut into as many parts for each thread as for any other. Columns of its weights' gradients are not
    // cut below 128: each cut packs all of its rows again.
    long n = c->j->counts[e], parts = chunks_of(n, threads);
    for (long p = 0; p < parts; p++) tasks[c->num++] = (task){e, c->starts[e] + n * p / parts, n * (p + 1) / parts - n * p / parts, 0, 1};
    long pieces = n > 2 * CHUNK ? most(1, least(threads, least(c->width, c->j->dim) / 128)) : 1;
    for (long p = 0; backward && p < 2 * pieces; p++) more[c->num_more++] = (task){e, c->starts[e], n, p, pieces};
  }
}

static int go(const job *given, int backward) {
  job found = *given;
  const job *j = &found;
  long E = j->experts, D = j->dim, H = j->hidden, width = H * (1 + j->gated);
  int threads = (int)most(1, j->threads);
  if (!sound(j)) return 2;
  if (!find_sums(&found)) return 1;
  call c = {.j = j, .width = width};
  c.starts = malloc(sizeof(int64_t) * (E + 1 + 1));
  if (!c.starts) return 1;
  c.starts[0] = 0;
  long chunks = 0;
  for (long e = 0; e < E; e++) {
    c.starts[e + 1] = c.starts[e] + j->counts[e];
    c.deepest = most(c.deepest, j->counts[e]);
    chunks += chunks_of(j->counts[e], threads);
  }
  long rows = c.starts[E], wave_rows = most(2048, 512 * threads), biggest = least(rows, most(wave_rows, c.deepest));
  int wide = j->x_type == F32 ? 4 : 2;
  task *tasks = malloc(sizeof(task) * (chunks + 1)), *more = malloc(sizeof(task) * (2 * E * (long)(2 + 4 * threads) + 1));
  c.token = malloc(sizeof(int64_t) * (rows + 1));
  char *block = scratch(SHARED, (size_t)biggest * (sizeof(float) * D + (backward ? wide * (width + H) : 0)) + 256);
  int failed = !tasks || !more || !c.token || !block;
  if (!failed) {
    c.wave = (float *)block;
    c.dpre = block + up(sizeof(float) * D * biggest, 64), c.scaled = c.dpre + up((long)wide * width * biggest, 64);
  }
  int short_of_memory = 0;  // not "failed": a thread that starts late must still come to the barrier
#pragma omp parallel num_threads(threads) if (!failed)
  if (!failed) {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    long piece = up((D + all - 1) / all, LANES), from = least(D, piece * me), to = least(D, from + piece);
    if (!reserve(&c, backward, wide)) {
#pragma omp atomic write
      short_of_memory = 1;
    }
#pragma omp barrier
    if (!short_of_memory) {
      double times[PHASES + 1] = {0}, *clock = j->seconds ? times : NULL;
      times[PHASES] = now();
      clear_sums(j, from, to);
#pragma omp for schedule(static)
      for (long i = 0; i < rows; i++) c.token[i] = j->token[j->order[i]];
      TICK(COMBINE)
      for (long e = 0; e < E;) {
        long stop = e, first = c.starts[e];
        while (stop < E && (stop == e || c.starts[stop + 1] - first <= wave_rows)) stop++;
#pragma omp single
        list_tasks(&c, e, stop, threads, backward, tasks, more);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < c.num; i++) run(&c, backward ? BACKWARD : FORWARD, tasks[i], clock);
        TICK(WAIT)
        if (j->sum) add_rows(&c, c.starts[stop], from, to, !backward);
        TICK(COMBINE)
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < c.num_more; i++) run(&c, WEIGHTS, more[i], clock);
        TICK(WAIT)
        e = stop;
      }
      round_sums(j, from, to);
      TICK(COMBINE)
      report(j, clock, all);
    }
  }
  free(c.starts), free(c.token), free(tasks), free(more);
  if (mine.size[SHARED] > KEPT) release(SHARED);
  return failed || short_of_memory;
}

int moesaic_experts_forward(const job *j) { return go(j, 0); }
int moesaic_experts_backward(const job *j) { return go(j, 1); }
