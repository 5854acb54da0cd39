/* A step for each element of slices, of which tuples of indices say where they lie. */
static int @NAME@(const @KIND@ *x, const int64_t *index, @KIND@ *y, int64_t count, int64_t depth, const int64_t *n,
                  int64_t width) {
  for (int64_t i = 0; i < count * width;) {
    int64_t at = 0;
    for (int64_t d = 0; d < depth; d++, index++) {
      const int64_t j = *index < 0 ? *index + n[d] : *index;
      if (j < 0 || j >= n[d]) return QC_E_INDEX;
      at = at * n[d] + j;
    }
    at *= width;
    for (const int64_t end = i + width; i < end; i++, at++) @STEP@;
  }
  return 0;
}
