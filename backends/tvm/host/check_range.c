static int check_range(const int64_t *p, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; i++)
    if (p[i] < 0 || p[i] >= end) return QC_E_INDEX;
  return 0;
}
