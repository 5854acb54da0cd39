static void pack_b(const float *b, float *w, int64_t k, int64_t n, int64_t rows, int64_t columns, int64_t unit) {
  for (int64_t u = 0; u * unit < n; u++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < unit; j++)
        *w++ = u * unit + j < n ? b[i * rows + (u * unit + j) * columns] : 0.0f;
}
