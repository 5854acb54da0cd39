/* Each window of an image as a row: channel by channel, row by row. */
static void patches(const float *x, float *y, int64_t batch, int64_t channels, int64_t first, int64_t count, int64_t h,
                    int64_t w, int64_t oh, int64_t ow, int kh, int kw, int sh, int sw, int dh, int dw, int ph, int pw) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t i = 0; i < oh; i++)
      for (int64_t j = 0; j < ow; j++)
        for (int64_t c = 0; c < count; c++) {
          const float *plane = x + (b * channels + first + c) * h * w;
          for (int k = 0; k < kh; k++) {
            const int64_t row = i * sh + k * dh - ph;
            for (int l = 0; l < kw; l++) {
              const int64_t column = j * sw + l * dw - pw;
              *y++ = row >= 0 && row < h && column >= 0 && column < w ? plane[row * w + column] : 0.0f;
            }
          }
        }
}
