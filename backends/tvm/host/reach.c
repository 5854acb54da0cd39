/* Of `count` elements that lie `step` apart, from `start` on, those from `low` to before `high` lie on an axis of n. */
typedef struct { int64_t low, high; } reach;
static inline reach reach_of(int64_t start, int64_t step, int64_t count, int64_t n) {
  const int64_t left = n - start, low = start < 0 ? qc_min((step - 1 - start) / step, count) : 0;
  const int64_t end = left > (count - 1) * step ? count : left <= 0 ? 0 : (left + step - 1) / step;
  return (reach){low, qc_max(low, end)};
}
/* The first element of a window at place i, along the axis that w begins with; and its elements on an axis of n. */
static inline int64_t start_of(int64_t i, const int *w) { return i * w[3] - w[9]; }
static inline reach window_at(int64_t i, int64_t n, const int *w) { return reach_of(start_of(i, w), w[6], w[0], n); }
/* The row, of rows of all planes of an image, in which element (k, l) of a window lies at place i of the first two axes. */
static inline int64_t row_of(int64_t i, int64_t k, int64_t l, const int64_t *n, const int64_t *m, const int *w) {
  return (start_of(i / m[1], w) + k * w[6]) * n[1] + start_of(i % m[1], w + 1) + l * w[7];
}
