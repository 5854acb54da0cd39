/* Scales and zero points of rows, or of all rows together, from their smallest and largest entries. Codes have `bits`;
   `shift` is subtracted from zero points, so that codes fit signed bytes. */
static void grids(const float *low, const float *high, float *scale, int32_t *zero, int64_t rows, int together,
    int symmetric, int bits, float clip, int shift) {
  const float top = (float)((1u << bits) - 1), half = (float)((1u << (bits - 1)) - 1);
  for (int64_t i = 0; i < rows; i++) {
    float a = low[i], b = high[i];
    if (together && i > 0) {
      scale[i] = scale[0];
      zero[i] = zero[0];
      continue;
    }
    for (int64_t j = 1; together && j < rows; j++) {
      a = fminf(a, low[j]);
      b = fmaxf(b, high[j]);
    }
    if (symmetric) {
      scale[i] = fmaxf(fmaxf(-a, b) * (clip / half), 1e-30f);
      zero[i] = 0;
      continue;
    }
    a = clip * fminf(a, 0.0f);
    b = clip * fmaxf(b, 0.0f);
    scale[i] = fmaxf((b - a) / top, 1e-30f);
    zero[i] = (int32_t)rintf(-a / scale[i]) - shift;
  }
}
