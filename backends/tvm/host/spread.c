/* Adds rows to the windows of an image, the places of each row as `patches` takes them. */
static void spread(const float *x, float *y, int64_t batch, int64_t channels, int64_t first, int64_t count, int64_t h,
                   int64_t w, int64_t oh, int64_t ow, int kh, int kw, int sh, int sw, int dh, int dw, int ph, int pw) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t i = 0; i < oh; i++)
      for (int64_t j = 0; j < ow; j++)
        for (int64_t c = 0; c < count; c++) {
          float *plane = y + (b * channels + first + c) * h * w;
          for (int k = 0; k < kh; k++) {
            const int64_t row = i * sh + k * dh - ph;
            for (int l = 0; l < kw; l++, x++) {
              const int64_t column = j * sw + l * dw - pw;
              if (row >= 0 && row < h && column >= 0 && column < w) plane[row * w + column] += *x;
            }
          }
        }
}
