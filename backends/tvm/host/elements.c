/* A step for each index: it says where an element lies along one axis; along the others, it lies where the index does. */
static int @NAME@(const @KIND@ *x, const int64_t *index, @KIND@ *y, int rank, int axis, int64_t size, const int64_t *n,
                  const int64_t *s) {
  int64_t count = 1;
  for (int d = 0; d < rank; d++) count *= n[d];
  for (int64_t i = 0; i < count; i++) {
    int64_t at = 0, rest = i;
    for (int d = rank - 1; d >= 0; d--) {
      int64_t j = rest % n[d];
      rest /= n[d];
      if (d == axis) {
        j = index[i] < 0 ? index[i] + size : index[i];
        if (j < 0 || j >= size) return QC_E_INDEX;
      }
      at += j * s[d];
    }
    @STEP@;
  }
  return 0;
}
