/* Windows of images. kind 1: the largest; 0: the mean of what is inside; 2: the mean, padding counted as zeros. */
static void pool(int kind, const float *x, float *y, int64_t planes, int64_t h, int64_t w, int64_t oh, int64_t ow, int kh,
                 int kw, int sh, int sw, int dh, int dw, int ph, int pw, int eh, int ew) {
  for (int64_t b = 0; b < planes; b++, x += h * w)
    for (int64_t i = 0; i < oh; i++)
      for (int64_t j = 0; j < ow; j++) {
        float total = kind == 1 ? -INFINITY : 0.0f;
        int64_t inside = 0, counted = 0;
        for (int k = 0; k < kh; k++)
          for (int l = 0; l < kw; l++) {
            const int64_t row = i * sh + k * dh - ph, column = j * sw + l * dw - pw;
            if (row < h + eh && column < w + ew) counted++;
            if (row < 0 || row >= h || column < 0 || column >= w) continue;
            const float v = x[row * w + column];
            inside++;
            if (kind != 1)
              total += v;
            else if (v > total)
              total = v;
          }
        if (kind != 1) total /= (float)(kind == 0 ? inside : counted);
        *y++ = total;
      }
}
