/* Text generation, on one text at a time. */

/* Appends tokens to the text and computes the logits behind the last of them: qc_logits(instance), QC_VOCABULARY
   numbers. A text that the limits of the instance do not hold is QC_E_LIMIT, and nothing has changed. */
int qc_feed(qc_instance *instance, const int64_t *tokens, int64_t count);
const float *qc_logits(const qc_instance *instance);
/* Tokens of the text so far. */
int64_t qc_length(const qc_instance *instance);

typedef struct {
  float temperature; /* 0: always the most probable token */
  int32_t top_k;     /* 0: all tokens */
  float top_p;       /* 0 or 1: all tokens */
  uint64_t seed;     /* of the first draw; qc_sample advances it */
} qc_sampling;
/* Chooses the next token from the logits; greedy if sampling is NULL. */
int qc_sample(qc_instance *instance, qc_sampling *sampling, int64_t *token);

/* Says that the caches hold `count` tokens. */
int qc_set_length(qc_instance *instance, int64_t count);
