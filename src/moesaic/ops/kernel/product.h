// Matrix products of tiles held in registers, on packed panels.
//
// Both operands are packed into 32-bit words, panel by panel: "a" as [K][ROWS], "b" as [K][COLS]. A word is one float, or, where
// the processor multiplies bf16 pairs, two bf16 that are neighbours along K. So one loop serves every format, and gathering
// rows, transposing weights and converting formats all happen while packing, which costs a few per cent of the product.
#pragma once
#include "vec.h"

#if LANES == 16
#define ROWS 14  // 28 accumulators, 2 vectors of b, 1 of a: 31 of 32 registers
#elif LANES == 8
#define ROWS 6  // 12 + 2 + 1 of 16
#elif defined(__aarch64__)
#define ROWS 12  // 24 + 2 + 1 of 32
#else
#define ROWS 6
#endif
#define COLS (2 * LANES)

// How a matrix becomes words: the format it is stored in, and the kind of word.
//   PLAIN: float to float, or bf16 to float.  DOT: bf16 or float to a bf16 pair.  ROUNDED: float to float through bf16.
enum { PLAIN, DOT, ROUNDED };
INLINE int per_word(int word) { return word == DOT ? 2 : 1; }
INLINE long words(int word, long k) { return word == DOT ? (k + 1) / 2 : k; }

INLINE uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
INLINE uint32_t half(int type, const void *p, long i) { return type == BF16 ? ((const bf16 *)p)[i] : to_bf16_1(((const float *)p)[i]); }
INLINE uint32_t one_word(int type, int word, const void *p, long i) {
  if (word == PLAIN) return bits(load_as_1(type, p, i));
  return (uint32_t)half(type, p, i) << 16;
}

// Words along a row: LANES words that start at element i.
INLINE vu words_along(int type, int word, const void *p, long i) {
  if (word == DOT && type == BF16) return *(const vu_u *)((const bf16 *)p + i);
#if HAVE_DOT
  if (word == DOT) return (vu)_mm512_cvtne2ps_pbh((__m512)load((const float *)p + i + 16), (__m512)load((const float *)p + i));
#endif
  if (word == ROUNDED && type == F32) return round_bf16(load((const float *)p + i));
  return (vu)load_as(type, p, i);
}
INLINE uint32_t word_along(int type, int word, const void *p, long i, long end) {
  if (word != DOT) return one_word(type, word, p, i);
  return half(type, p, i) | (i + 1 < end ? half(type, p, i + 1) << 16 : 0);
}
// Words across two neighbouring rows (or of one row where a word is a float).
INLINE vu words_across(int type, int word, const void *p, const void *q, long i) {
  if (word != DOT) return words_along(type, word, p, i);
  if (type == BF16) return widen(*(const vh_u *)((const bf16 *)p + i)) | (widen(*(const vh_u *)((const bf16 *)q + i)) << 16);
#if HAVE_DOT
  static const uint16_t interleave[32] __attribute__((aligned(64))) = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512bh both = _mm512_cvtne2ps_pbh((__m512)load((const float *)q + i), (__m512)load((const float *)p + i));
  return (vu)_mm512_permutexvar_epi16(*(const __m512i *)interleave, (__m512i)both);
#endif
  return (round_bf16(load((const float *)p + i)) >> 16) | round_bf16(load((const float *)q + i));
}
INLINE uint32_t word_across(int type, int word, const void *p, const void *q, long i) {
  if (word != DOT) return one_word(type, word, p, i);
  return half(type, p, i) | half(type, q, i) << 16;
}

typedef struct {  // rows of a matrix: row r is base + (index ? index[r] : r) * stride elements
  const void *base;
  const int64_t *index;
  long stride;
  int type;
} matrix;
INLINE const void *row_of(const matrix *m, int type, long r) {
  return (const char *)m->base + (m->index ? m->index[r] : r) * m->stride * size_of(type);
}

// Panels of columns col .. end (at most "all" of the matrix), words running down K = rows. Panel n is at dst + n * words(rows) * panel.
// Row by row over all panels, so that memory is read in long runs even where rows are scattered.
INLINE void pack_down(uint32_t *dst, int panel, const matrix *m, int type, int word, long rows, long col, long end, long all) {
  long next = words(word, rows) * panel;
  for (long r = 0; r < rows; r += per_word(word), dst += panel) {
    const void *p = row_of(m, type, r);
    const void *q = word == DOT && r + 1 < rows ? row_of(m, type, r + 1) : NULL;
    uint32_t *d = dst;
    for (long at = col; at < end; at += panel, d += next) {
      int c = 0;
      // A vector may run past the panel's width into its next row, which is written later; not so in the last row.
      int fits = panel % LANES == 0 || r + per_word(word) < rows;
      if (fits && (q || word != DOT) && at + (panel + LANES - 1) / LANES * LANES <= all) {
        for (; c < panel; c += LANES) *(vu_u *)(d + c) = words_across(type, word, p, q, at + c);
        continue;
      }
      int width = all - at < panel ? (int)(all - at) : panel;
      for (; c < width; c++) d[c] = q || word != DOT ? word_across(type, word, p, q, at + c) : half(type, p, at + c);
      for (; c < panel; c++) d[c] = 0;
    }
  }
}

INLINE void transpose(vu v[LANES]) {
#if LANES == 16
// Halves, quarters, pairs and words change places between rows i and i + S. (Shuffles are spelt differently by the compilers.)
#if defined(__clang__)
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (vu){__VA_ARGS__})
#endif
#define STAGE(S, LOW, HIGH)                            \
  for (int i = 0; i < 16; i++)                         \
    if (!(i & S)) {                                    \
      vu a = v[i], b = v[i + S];                       \
      v[i] = SHUFFLE(a, b, LOW), v[i + S] = SHUFFLE(a, b, HIGH); \
    }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  STAGE(8, LOW8, HIGH8) STAGE(4, LOW4, HIGH4) STAGE(2, LOW2, HIGH2) STAGE(1, LOW1, HIGH1)
#undef STAGE
#else
  vu t[LANES];
  for (int i = 0; i < LANES; i++) t[i] = v[i];
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) v[i][j] = t[j][i];
#endif
}

// Panel of rows row .. row + panel of the matrix, words running along the row: K = columns. dst is [words(cols)][panel].
INLINE void pack_along(uint32_t *dst, int panel, const matrix *m, int type, int word, long row, long rows, long cols) {
  int width = rows - row < panel ? (int)(rows - row) : panel;
  long whole = cols / (LANES * per_word(word)) * LANES, end = words(word, cols);
  for (int i = 0; i < panel; i += LANES) {
    const void *p[LANES];
    int n = width - i < 0 ? 0 : width - i < LANES ? width - i : LANES;
    for (int j = 0; j < n; j++) p[j] = row_of(m, type, row + i + j);
    int room = panel < LANES ? LANES : panel - i;  // where a vector is wider than the panel, the next row overwrites the rest
    for (long k = 0; k < whole; k += LANES) {
      vu v[LANES];
      for (int j = 0; j < LANES; j++) v[j] = j < n ? words_along(type, word, p[j], k * per_word(word)) : (vu){0};
      transpose(v);
      if (room >= LANES)
        for (int j = 0; j < LANES; j++) *(vu_u *)(dst + (k + j) * panel + i) = v[j];
      else
        for (int j = 0; j < LANES; j++) {
          uint32_t *d = dst + (k + j) * panel + i;
          for (int c = 0; c < room; c++) d[c] = v[j][c];
        }
    }
    for (long k = whole; k < end; k++)
      for (int j = 0; j < LANES && i + j < panel; j++)
        dst[k * panel + i + j] = j < n ? word_along(type, word, p[j], k * per_word(word), cols) : 0;
  }
}

INLINE vf multiply_add(int word, vu a, vu b, vf c) {
#if HAVE_DOT
  if (word == DOT) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return (vf)a * (vf)b + c;
}

// c (height x COLS, stride ld) = or += a panel times b panel.
INLINE void tile(int height, int word, const uint32_t *a, const uint32_t *b, long k, float *c, long ld, int add) {
  vf acc[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < height; i++) acc[i][0] = acc[i][1] = (vf){0};
  for (; k > 0; k--, a += ROWS, b += COLS) {
    vu b0 = *(const vu *)b, b1 = *(const vu *)(b + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
      vu ai = a[i] - (vu){0};
      acc[i][0] = multiply_add(word, ai, b0, acc[i][0]);
      acc[i][1] = multiply_add(word, ai, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < height; i++) {
    float *ci = c + i * ld;
    if (add) acc[i][0] += load(ci), acc[i][1] += load(ci + LANES);
    store(ci, acc[i][0]), store(ci + LANES, acc[i][1]);
  }
}

#define HEIGHT(H) case H: tile(H, word, a, b, k, c, ld, add); return;
#define HEIGHTS(NAME, WORD)                                                                                     \
  static __attribute__((noinline)) void NAME(int height, const uint32_t *a, const uint32_t *b, long k, float *c, long ld, int add) { \
    enum { word = WORD };                                                                                       \
    switch (height) { HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6) HEIGHTS_MORE }                \
  }
#if ROWS == 14
#define HEIGHTS_MORE HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12) HEIGHT(13) HEIGHT(14)
#elif ROWS == 12
#define HEIGHTS_MORE HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#else
#define HEIGHTS_MORE
#endif
HEIGHTS(tile_plain, PLAIN)
#if HAVE_DOT
HEIGHTS(tile_dot, DOT)
#endif

INLINE void any_tile(int word, int height, const uint32_t *a, const uint32_t *b, long k, float *c, long ld, int add) {
#if HAVE_DOT
  if (word == DOT) { tile_dot(height, a, b, k, c, ld, add); return; }
#endif
  tile_plain(height, a, b, k, c, ld, add);
}
