/* A compiled model as a C library. Needs libc, libm and pthread; nothing is allocated after qc_create. */
#ifndef QC_MODEL_H
#define QC_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Every function returns one of these. */
enum {
  QC_OK = 0,
  QC_E_ARGUMENT = 1, /* a null pointer, or dimensions that are negative or do not fit together */
  QC_E_FILE = 2,     /* the weights file cannot be opened or mapped */
  QC_E_WEIGHTS = 3,  /* it is cut short, changed, or of another model */
  QC_E_MEMORY = 4,   /* not enough memory */
  QC_E_LIMIT = 5,    /* larger than the limits that the instance was created with */
  QC_E_INDEX = 6,    /* a token, position or index outside of its table */
  QC_E_CPU = 7,      /* this processor lacks instructions that the library was compiled for */
  QC_E_DEVICE = 8    /* no device was found, or its driver failed */
};
const char *qc_error(int code);

@DIMENSIONS@

@PORTS@

/* Which model this header is of. The library says which one it is of: the same, if both come from one artifact. */
#define QC_MODEL_ID ((uint64_t)@ID@)
uint64_t qc_model_id(void);

typedef struct qc_model qc_model;       /* the weights: read only, shared by instances */
typedef struct qc_instance qc_instance; /* working memory and caches: one thread at a time */

/* A part of some work: units [begin, end). */
typedef void (*qc_task)(const void *context, int32_t begin, int32_t end);

typedef struct {
  int32_t threads; /* threads of the instance, the caller's included; 0 and 1: only the caller's */
  /* Instead of own threads: must call task on disjoint ranges that together are [0, count), and return when all
     are done. */
  void (*parallel_for)(void *user, qc_task task, const void *context, int32_t count);
  void *user;
} qc_options;

/* Maps a weights file and checks its size, its hash, and that it belongs to this library. */
int qc_open(const char *weights_file, qc_model **model);
/* The same for bytes in memory, aligned to 64, which stay the caller's. */
int qc_open_memory(const void *bytes, size_t size, qc_model **model);
/* After all instances are destroyed. */
void qc_close(qc_model *model);

/* limits: the largest value of each dimension, or NULL for qc_default_limits. options: NULL for one thread. */
extern const int64_t qc_default_limits[QC_DIMENSIONS > 0 ? QC_DIMENSIONS : 1];
int qc_create(const qc_model *model, const int64_t *limits, const qc_options *options, qc_instance **instance);
/* Forgets what the caches hold. */
int qc_reset(qc_instance *instance);
void qc_destroy(qc_instance *instance);
/* Bytes that an instance holds. */
size_t qc_memory(const qc_instance *instance);

/* Runs once: dims has QC_DIMENSIONS numbers, inputs and outputs one array per port, in order, without gaps. Ports of a
   cache that the instance keeps are ignored, and may be NULL. */
int qc_run(qc_instance *instance, const int64_t *dims, const void *const *inputs, void *const *outputs);

@CACHES@@DECODER@
#ifdef __cplusplus
}
#endif
#endif
