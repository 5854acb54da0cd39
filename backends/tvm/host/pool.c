/* Windows of images, a row of places at a time. kind 1: the largest; 0: the mean of what is inside; 2: the mean, padding
   counted as zeros. */
static void pool(int kind, const float *x, float *y, int64_t planes, const int64_t *n, const int64_t *m, const int *w) {
  const int64_t stride = w[5];
  for (int64_t b = 0; b < planes; b++, x += n[0] * n[1] * n[2])
    for (int64_t i = 0; i < m[0] * m[1]; i++, y += m[2]) {
      const reach r = window_at(i / m[1], n[0], w), s = window_at(i % m[1], n[1], w + 1);
      for (int64_t j = 0; j < m[2]; j++) y[j] = kind == 1 ? -INFINITY : 0.0f;
      for (int64_t k = r.low; k < r.high; k++)
        for (int64_t l = s.low; l < s.high; l++) {
          const float *from = x + row_of(i, k, l, n, m, w) * n[2];
          for (int64_t e = 0; e < w[2]; e++) {
            const int64_t first = e * w[8] - w[11];
            const reach t = reach_of(first, stride, m[2], n[2]);
            for (int64_t j = t.low; j < t.high; j++) {
              const float v = from[first + j * stride];
              y[j] = kind != 1 ? y[j] + v : v > y[j] ? v : y[j];
            }
          }
        }
      if (kind == 1) continue;
      const int more = kind == 2; /* padding at the end counts */
      const reach p = window_at(i / m[1], n[0] + more * w[12], w), q = window_at(i % m[1], n[1] + more * w[13], w + 1);
      for (int64_t j = 0; j < m[2]; j++) {
        const reach t = window_at(j, n[2] + more * w[14], w + 2);
        y[j] /= (float)(more ? p.high * q.high * t.high : (p.high - p.low) * (q.high - q.low) * (t.high - t.low));
      }
    }
}
