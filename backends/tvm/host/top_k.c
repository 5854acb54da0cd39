/* The k largest (or smallest) of each row of n, sorted, the first of equals first. */
static void top_k_@(const @ *x, @ *y, int64_t *index, int64_t rows, int64_t n, int64_t k, int largest) {
  for (int64_t r = 0; r < rows; r++, x += n, y += k, index += k)
    for (int64_t i = 0; i < k; i++) {
      int64_t best = -1;
      for (int64_t j = 0; j < n; j++) {
        int taken = 0;
        for (int64_t t = 0; t < i; t++) taken |= index[t] == j;
        if (!taken && (best < 0 || (largest ? x[j] > x[best] : x[j] < x[best]))) best = j;
      }
      y[i] = best < 0 ? 0 : x[best];
      index[i] = best;
    }
}
