/* Running sums along the middle axis. */
static void cum_sum_@(const @ *x, @ *y, int64_t outer, int64_t n, int64_t inner) {
  for (int64_t o = 0; o < outer; o++, x += n * inner, y += n * inner)
    for (int64_t i = 0; i < n * inner; i++) y[i] = x[i] + (i < inner ? 0 : y[i - inner]);
}
