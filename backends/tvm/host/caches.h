/* For tools: the cache number `index`, in the order of the ports, of [batch, heads, room, bytes of a row] at the limits:
   a row is a head at a position, as it is stored. The shape is written to shape[4]. The cache stays there until the next
   call; what is written to it counts once qc_cache_changed is called. */
void *qc_cache(qc_instance *instance, int32_t index, int64_t *shape);
int qc_cache_changed(qc_instance *instance, int32_t index);
