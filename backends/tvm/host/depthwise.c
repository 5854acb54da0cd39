/* A convolution in which every group has one channel, and `each` results: a row of places takes one element of the window
   after the other. */
static void depthwise(const float *x, const float *weight, const float *bias, float *y, int64_t batch, int64_t groups,
                      int64_t each, const int64_t *n, const int64_t *m, const int *w) {
  const int64_t size = w[0] * w[1] * w[2], stride = w[5];
  for (int64_t o = 0; o < batch * groups * each; o++) {
    const float *image = x + o / each * n[0] * n[1] * n[2], *kernel = weight + o % (groups * each) * size;
    for (int64_t i = 0; i < m[0] * m[1]; i++, y += m[2]) {
      const reach r = window_at(i / m[1], n[0], w), s = window_at(i % m[1], n[1], w + 1);
      for (int64_t j = 0; j < m[2]; j++) y[j] = bias == NULL ? 0.0f : bias[o % (groups * each)];
      for (int64_t k = r.low; k < r.high; k++)
        for (int64_t l = s.low; l < s.high; l++) {
          const float *from = image + row_of(i, k, l, n, m, w) * n[2];
          for (int64_t e = 0; e < w[2]; e++) {
            const int64_t first = e * w[8] - w[11];
            const reach t = reach_of(first, stride, m[2], n[2]);
            const float v = kernel[(k * w[1] + l) * w[2] + e];
            if (stride == 1)
              for (int64_t j = t.low; j < t.high; j++) y[j] += from[first + j] * v;
            else
              for (int64_t j = t.low; j < t.high; j++) y[j] += from[first + j * stride] * v;
          }
        }
    }
  }
}
