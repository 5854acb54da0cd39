/* A convolution in which every group has one channel, and `each` results. */
static void depthwise(const float *x, const float *w, const float *bias, float *y, int64_t batch, int64_t groups,
                      int64_t each, int64_t h, int64_t width, int64_t oh, int64_t ow, int kh, int kw, int sh, int sw,
                      int dh, int dw, int ph, int pw) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t o = 0; o < groups * each; o++) {
      const float *plane = x + (b * groups + o / each) * h * width, *kernel = w + o * kh * kw;
      for (int64_t i = 0; i < oh; i++)
        for (int64_t j = 0; j < ow; j++) {
          float total = bias == NULL ? 0.0f : bias[o];
          for (int k = 0; k < kh; k++) {
            const int64_t row = i * sh + k * dh - ph;
            if (row < 0 || row >= h) continue;
            for (int l = 0; l < kw; l++) {
              const int64_t column = j * sw + l * dw - pw;
              if (column >= 0 && column < width) total += plane[row * width + column] * kernel[k * kw + l];
            }
          }
          *y++ = total;
        }
    }
}
