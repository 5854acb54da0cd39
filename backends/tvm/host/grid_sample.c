/* Where a number in [-1, 1] lies on an axis of n: edges at the centres of the outer elements if `aligned`, else at their
   ends. What lies beyond stays there (padding 0), moves to the next element (1), or is mirrored at the edges (2). */
static float grid_place(float g, int64_t n, int nearest, int padding, int aligned) {
  const float size = (float)n, low = aligned ? 0.0f : -0.5f, range = aligned ? size - 1.0f : size;
  float at = aligned ? (g + 1.0f) / 2.0f * (size - 1.0f) : ((g + 1.0f) * size - 1.0f) / 2.0f;
  if (nearest) at = rintf(at);
  if (padding == 2 && range > 0.0f) {
    const float beyond = at < low ? low - at : at > low + range ? at - low - range : 0.0f;
    const float times = floorf(beyond / range), rest = beyond - times * range;
    const int even = times - 2.0f * floorf(times / 2.0f) == 0.0f;
    if (beyond > 0.0f) at = (at < low) == even ? low + rest : low + range - rest;
  }
  return padding == 0 ? fminf(fmaxf(at, -2.0f), size + 1.0f) : fminf(fmaxf(at, 0.0f), size - 1.0f);
}

/* Images at the places of a grid: between four elements, or at the nearest. 32 places at a time, for all channels. */
static void grid_sample(const float *x, const float *grid, float *y, int64_t batch, int64_t channels, int64_t h, int64_t w,
                        int64_t places, int nearest, int padding, int aligned) {
  for (int64_t b = 0; b < batch; b++, grid += 2 * places)
    for (int64_t start = 0; start < places; start += 32) {
      const int64_t count = qc_min(32, places - start);
      int64_t index[32][4];
      float weight[32][4];
      for (int64_t p = 0; p < count; p++) {
        const float column = grid_place(grid[2 * (start + p)], w, nearest, padding, aligned);
        const float row = grid_place(grid[2 * (start + p) + 1], h, nearest, padding, aligned);
        for (int k = 0; k < 4; k++) {
          const int64_t i = (int64_t)floorf(row) + k / 2, j = (int64_t)floorf(column) + k % 2;
          const float v = (1.0f - fabsf(row - (float)i)) * (1.0f - fabsf(column - (float)j));
          index[p][k] = qc_min(qc_max(i, 0), h - 1) * w + qc_min(qc_max(j, 0), w - 1);
          weight[p][k] = i < 0 || i >= h || j < 0 || j >= w ? 0.0f : v;
        }
      }
      for (int64_t c = b * channels; c < (b + 1) * channels; c++)
        for (int64_t p = 0; p < count; p++) {
          float total = 0.0f;
          for (int k = 0; k < 4; k++) total += x[c * h * w + index[p][k]] * weight[p][k];
          y[c * places + start + p] = total;
        }
    }
}
