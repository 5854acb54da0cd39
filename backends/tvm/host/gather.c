static int gather@(const void *t, const int@_t *i, void *y, int64_t outer, int64_t n, int64_t count, int64_t size) {
  for (int64_t o = 0; o < outer; o++)
    for (int64_t j = 0; j < count; j++) {
      int64_t at = i[j] < 0 ? i[j] + n : i[j];
      if (at < 0 || at >= n) return QC_E_INDEX;
      memcpy((char *)y + (o * count + j) * size, (const char *)t + (o * n + at) * size, (size_t)size);
    }
  return 0;
}
