static void *aligned(size_t size, size_t *total) {
  void *made = NULL;
  size = (size + LINE - 1) / LINE * LINE + 2 * LINE;
  if (posix_memalign(&made, LINE, size) != 0) return NULL;
  memset(made, 0, size);
  *total += size;
  return made;
}

/* What buffers need at most. Most grow with every dimension, but what lies between two of them does not: so it is the
   largest of all corners, where some dimensions are at their limits and the others nothing. */
enum { CORNERS = 8 }; /* dimensions that are tried in turn; the others are at their limits */
static void plan_sizes(qc_instance *q) {
  int64_t dims[QC_DIMENSIONS + 1], sizes[BUFFERS + 1];
  for (int corner = 0; corner < 1 << qc_min(QC_DIMENSIONS, CORNERS); corner++) {
    for (int i = 0; i < QC_DIMENSIONS; i++) dims[i] = i < CORNERS && (corner >> i & 1) ? 0 : q->limits[i];
    if (!sizes_fit(dims, 0)) continue;
    buffer_sizes(dims, sizes);
    for (int i = 0; i < BUFFERS; i++) q->planned[i] = qc_max(q->planned[i], sizes[i]);
  }
}

/* Limits and sizes of buffers of a new instance, and how much room its caches need. */
static int size_instance(qc_instance *q, const qc_model *model, const int64_t *limits, int64_t *room) {
  q->model = model;
  q->memory = sizeof *q;
  for (int i = 0; i < QC_DIMENSIONS; i++) {
    if (limits[i] < 0 || limits[i] > INT32_MAX) return QC_E_ARGUMENT;
    q->limits[i] = limits[i];
  }
  if (!sizes_fit(limits, 0)) return QC_E_LIMIT;
  TRY(cache_sizes(q, limits, room));
  plan_sizes(q);
  for (int i = 0; i < BUFFERS; i++) {
    if (q->planned[i] > INT32_MAX) return QC_E_LIMIT;
    q->planned[i] = qc_up(q->planned[i], LINE);
  }
  for (int i = 0; i < CACHES; i++)
    if (room[i] > INT32_MAX) return QC_E_LIMIT;
  return QC_OK;
}

/* Memory for a text: logits, a mask, and positions. */
static int begin_text(qc_instance *q) {
  if (VOCABULARY == 0) return QC_OK;
  const int64_t rows = WHOLE_LOGITS > 0 ? q->limits[WHOLE_LOGITS > 0 ? WHOLE_LOGITS - 1 : 0] : 1;
  q->logits = aligned(sizeof(float) * VOCABULARY * (size_t)qc_max(rows, 3), &q->memory);
  q->ones = aligned(sizeof(int64_t) * (size_t)q->room, &q->memory);
  q->running = aligned(sizeof(int64_t) * (size_t)q->room, &q->memory);
  if (q->logits == NULL || q->ones == NULL || q->running == NULL) return QC_E_MEMORY;
  for (int64_t i = 0; i < q->room; i++) {
    q->ones[i] = 1;
    q->running[i] = i;
  }
  return QC_OK;
}

int qc_reset(qc_instance *q) {
  if (q == NULL) return QC_E_ARGUMENT;
  q->past = 0;
  return QC_OK;
}

size_t qc_memory(const qc_instance *q) { return q == NULL ? 0 : q->memory; }

/* Whether a run may have these dimensions; `arrays` says whether it writes whole outputs. */
static int check_sizes(const qc_instance *q, const int64_t *dims, int arrays) {
  int64_t sizes[BUFFERS + 1];
  for (int i = 0; i < QC_DIMENSIONS; i++) {
    if (dims[i] < 0) return QC_E_ARGUMENT;
    if (dims[i] > q->limits[i]) return QC_E_LIMIT;
  }
  if (!sizes_fit(dims, arrays)) return QC_E_LIMIT;
  TRY(check_dims(q, dims));
  buffer_sizes(dims, sizes);
  for (int i = 0; i < BUFFERS; i++)
    if (sizes[i] > q->planned[i]) return QC_E_LIMIT;
  return QC_OK;
}
