static int gather_nd(const void *x, const int64_t *index, void *y, int64_t count, int64_t depth,
    const int64_t *n, int64_t size) {
  for (int64_t i = 0; i < count; i++) {
    int64_t at = 0;
    for (int64_t d = 0; d < depth; d++) {
      int64_t j = index[i * depth + d];
      if (j < 0) j += n[d];
      if (j < 0 || j >= n[d]) return QC_E_INDEX;
      at = at * n[d] + j;
    }
    memcpy((char *)y + i * size, (const char *)x + at * size, (size_t)size);
  }
  return 0;
}
