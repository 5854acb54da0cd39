
/* ---- text generation ---- */

int qc_feed(qc_instance *q, const int64_t *tokens, int64_t count) {
  int64_t dims[QC_DIMENSIONS + 1];
  if (q == NULL || tokens == NULL || count < 1) return QC_E_ARGUMENT;
  if (count > q->room - q->past) return QC_E_LIMIT;
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0) return QC_E_INDEX; /* a table of any model is read from its end then */
  const int64_t before = q->past;
  while (count > 0) {
    const int64_t part = qc_min(count, most_at_once(q));
    const void *inputs[INPUTS + 1] = {0};
    void *outputs[OUTPUTS + 1] = {0};
    if (part < 1) return QC_E_LIMIT;
    set_dims(dims, part, q->past);
    fill_inputs(q, inputs, tokens);
    outputs[LOGITS] = q->logits;
    const int code = checked_run(q, dims, inputs, outputs, part - 1);
    if (code != QC_OK) {
      q->past = before;
      return code;
    }
    if (WHOLE_LOGITS > 0) memmove(q->logits, q->logits + (part - 1) * VOCABULARY, sizeof(float) * VOCABULARY);
    q->past += part;
    tokens += part;
    count -= part;
  }
  return QC_OK;
}

const float *qc_logits(const qc_instance *q) { return q == NULL ? NULL : q->logits; }
int64_t qc_length(const qc_instance *q) { return q == NULL ? 0 : q->past; }

int qc_set_length(qc_instance *q, int64_t count) {
  if (q == NULL || count < 0) return QC_E_ARGUMENT;
  if (count > q->room) return QC_E_LIMIT;
  q->past = count;
  return QC_OK;
}

/* Moves the k largest of n numbers to the front, in no order: Hoare's selection. */
static void select_largest(float *value, int32_t *index, int32_t n, int32_t k) {
  int32_t low = 0, high = n - 1;
  while (low < high) {
    const float pivot = value[low + (high - low) / 2];
    int32_t i = low, j = high;
    while (i <= j) {
      while (value[i] > pivot) i++;
      while (value[j] < pivot) j--;
      if (i <= j) {
        const float v = value[i];
        value[i] = value[j];
        value[j] = v;
        const int32_t t = index[i];
        index[i++] = index[j];
        index[j--] = t;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      return;
  }
}

int qc_sample(qc_instance *q, qc_sampling *s, int64_t *token) {
  if (q == NULL || token == NULL) return QC_E_ARGUMENT;
  int32_t best = 0, count = VOCABULARY;
  for (int32_t i = 1; i < VOCABULARY; i++)
    if (q->logits[i] > q->logits[best]) best = i;
  *token = best;
  if (s == NULL || !(s->temperature > 0)) return QC_OK;
  float *value = q->logits + VOCABULARY;
  int32_t *index = (int32_t *)(value + VOCABULARY);
  for (int32_t i = 0; i < VOCABULARY; i++) {
    index[i] = i;
    value[i] = expf((q->logits[i] - q->logits[best]) / s->temperature);
  }
  if (s->top_k > 0 && s->top_k < count) {
    select_largest(value, index, count, s->top_k);
    count = s->top_k;
  }
  double total = 0;
  for (int32_t i = 0; i < count; i++) total += value[i];
  if (s->top_p > 0 && s->top_p < 1) {
    /* The smallest set of tokens that holds so much: the front is doubled until it does, then shortened. */
    int32_t front = qc_min(32, count);
    for (;; front = (int32_t)qc_min(2 * (int64_t)front, count)) {
      select_largest(value, index, count, front);
      double held = 0;
      for (int32_t i = 0; i < front; i++) held += value[i];
      if (held >= s->top_p * total || front == count) break;
    }
    for (int32_t i = 1; i < front; i++) { /* insertion: the front is short */
      const float v = value[i];
      const int32_t t = index[i];
      int32_t j = i;
      for (; j > 0 && value[j - 1] < v; j--) {
        value[j] = value[j - 1];
        index[j] = index[j - 1];
      }
      value[j] = v;
      index[j] = t;
    }
    double held = 0;
    int32_t kept = 0;
    while (kept < front && held < s->top_p * total) held += value[kept++];
    count = kept;
    total = held;
  }
  s->seed += 0x9e3779b97f4a7c15u;
  double draw = (double)(mix(s->seed) >> 11) * 0x1p-53 * total;
  int32_t i = 0;
  while (i + 1 < count && draw >= value[i]) draw -= value[i++];
  *token = index[i];
  return QC_OK;
}
