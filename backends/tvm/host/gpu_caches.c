static size_t cache_bytes(const qc_instance *q, int32_t index) {
  return (size_t)(q->batch * cache_heads[index] * q->room * cache_row[index]);
}

/* A copy of a cache on the host. */
void *qc_cache(qc_instance *q, int32_t index, int64_t *shape) {
  if (q == NULL || shape == NULL || index < 0 || index >= CACHES) return NULL;
  shape[0] = q->batch;
  shape[1] = cache_heads[index];
  shape[2] = q->room;
  shape[3] = cache_row[index];
  if (stage(q, (int64_t)cache_bytes(q, index)) != QC_OK) return NULL;
  return buffer_read(&q->queue, q->caches[index], q->stage, cache_bytes(q, index)) == QC_OK ? q->stage : NULL;
}

int qc_cache_changed(qc_instance *q, int32_t index) {
  if (q == NULL || index < 0 || index >= CACHES || q->staged < cache_bytes(q, index)) return QC_E_ARGUMENT;
  return buffer_write(&q->queue, q->caches[index], q->stage, cache_bytes(q, index));
}
