/* Where element j of an axis of m lies on an axis of n. */
static float resize_place(int64_t j, int64_t n, int64_t m, float scale, int rule) {
  if (rule == 2) return (float)j / scale;
  if (rule != 0 && m == 1) return 0.0f;
  return rule == 3 ? (float)j * (float)(n - 1) / (float)(m - 1) : ((float)j + 0.5f) / scale - 0.5f;
}

/* An axis of n elements as one of m: values lie on lines between two, or are those of the nearest. A place is looked for
   once for 32 neighbours, whose lines of memory stay near. */
static void resize(const float *x, float *y, int64_t outer, int64_t n, int64_t m, int64_t inner, float scale, int rule,
                   int value) {
  for (int64_t start = 0; start < outer; start += 32)
    for (int64_t j = 0; j < m; j++) {
      float place = fminf(fmaxf(resize_place(j, n, m, scale, rule), 0.0f), (float)(n - 1));
      if (value == 1) place = ceilf(place - 0.5f);
      if (value == 2) place = roundf(place);
      if (value == 3) place = floorf(place);
      if (value == 4) place = ceilf(place);
      const int64_t first = qc_min((int64_t)place, n - 1), second = qc_min(first + 1, n - 1);
      const float rest = place - (float)first;
      for (int64_t o = start; o < qc_min(start + 32, outer); o++) {
        const float *a = x + (o * n + first) * inner, *b = x + (o * n + second) * inner;
        float *to = y + (o * m + j) * inner;
        if (value != 0)
          for (int64_t i = 0; i < inner; i++) to[i] = a[i];
        else
          for (int64_t i = 0; i < inner; i++) to[i] = a[i] * (1.0f - rest) + b[i] * rest;
      }
    }
}
