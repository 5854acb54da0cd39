void *qc_cache(qc_instance *q, int32_t index, int64_t *shape) {
  if (q == NULL || shape == NULL || index < 0 || index >= CACHES) return NULL;
  shape[0] = q->batch;
  shape[1] = cache_heads[index];
  shape[2] = q->room;
  shape[3] = cache_row[index];
  return q->caches[index];
}

int qc_cache_changed(qc_instance *q, int32_t index) {
  return q == NULL || index < 0 || index >= CACHES ? QC_E_ARGUMENT : QC_OK;
}
