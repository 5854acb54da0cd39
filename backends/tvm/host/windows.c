/* Windows of images as rows, channel by channel: m places along each axis of n elements, of `count` channels behind the
   first. Rows take what lies under the window, and zero where nothing does; or, `back`, are added to it. */
static void windows(float *image, float *rows, int back, int64_t batch, int64_t channels, int64_t first, int64_t count,
                    const int64_t *n, const int64_t *m, const int *w) {
  const int64_t plane = n[0] * n[1] * n[2], size = w[0] * w[1] * w[2], step = w[8];
  for (int64_t b = 0; b < batch; b++)
    for (int64_t i = 0; i < m[0] * m[1]; i++) {
      const int64_t deep = start_of(i / m[1], w), high = start_of(i % m[1], w + 1);
      const reach r = window_at(i / m[1], n[0], w), s = window_at(i % m[1], n[1], w + 1);
      for (int64_t j = 0; j < m[2]; j++, rows += count * size) {
        const reach t = window_at(j, n[2], w + 2);
        const int64_t reached = (r.high - r.low) * (s.high - s.low) * (t.high - t.low);
        if (!back && reached < size) memset(rows, 0, (size_t)(count * size) * sizeof(float));
        for (int64_t k = r.low; k < r.high; k++)
          for (int64_t l = s.low; l < s.high; l++) {
            const int64_t line = ((deep + k * w[6]) * n[1] + high + l * w[7]) * n[2] + start_of(j, w + 2);
            float *x = image + (b * channels + first) * plane, *row = rows + (k * w[1] + l) * w[2];
            for (int64_t c = 0; c < count; c++, x += plane, row += size)
              for (int64_t e = t.low; e < t.high; e++)
                if (back)
                  x[line + e * step] += row[e];
                else
                  row[e] = x[line + e * step];
          }
      }
    }
}
