/* What every library has in common: weights, memory, threads. */
#define _GNU_SOURCE
#include "model.h"

#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

@CONSTANTS@

enum { LANES = 1024, LINE = 64, HEADER = 64, PARTS = 2, TRIES = 200 };

struct qc_model {
  const unsigned char *bytes;
  size_t size;
  int mapped;
  int tiles; /* whether this processor and system have what `tiles_allowed` asks for */
};

typedef struct task {
  void (*run)(const struct task *, int32_t, int32_t);
  const void *p[10];
  int32_t i[24];
  int32_t grain, units;
} task;

struct qc_instance {
  const qc_model *model;
  unsigned char *arena;
  float *caches[CACHES + 1];
  int64_t limits[QC_DIMENSIONS + 1], offsets[BUFFERS + 1], planned[BUFFERS + 1];
  int64_t past, room, batch;
  size_t memory;
  float *logits;
  int64_t *ones, *running; /* a mask, and positions, of a whole text */
  qc_options options;
  pthread_t *workers;
  int32_t count, started;
  const task *job;
  int32_t parts;                                   /* of the job */
  uint64_t jobs;                                   /* so far */
  _Atomic uint64_t left;                           /* number of the job, and, in the low half, parts that nobody took */
  _Atomic int32_t unfinished, sleeping, waiting, stopping;
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
};

static int model_begin(qc_model *model) {
  model->tiles = tiles_allowed();
  return QC_OK;
}
static void model_end(qc_model *model) { (void)model; }

@WEIGHTS@

/* ---- threads ---- */

static void run_part(const void *context, int32_t begin, int32_t end) {
  const task *t = context;
  const int64_t from = (int64_t)begin * t->grain, to = qc_min((int64_t)end * t->grain, t->units);
  if (from < to) t->run(t, (int32_t)from, (int32_t)to);
}

static void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Takes a part of the job and computes it; returns whether there was one. The job stays until all parts are done. */
static int take_part(qc_instance *q) {
  uint64_t left = atomic_load(&q->left);
  do {
    if ((uint32_t)left == 0) return 0;
  } while (!atomic_compare_exchange_weak(&q->left, &left, left - 1));
  const task *t = q->job;
  const int64_t all = (t->units + t->grain - 1) / t->grain, part = (int64_t)(uint32_t)left - 1;
  run_part(t, (int32_t)(all * part / q->parts), (int32_t)(all * (part + 1) / q->parts));
  if (atomic_fetch_sub(&q->unfinished, 1) == 1 && atomic_load(&q->waiting)) {
    pthread_mutex_lock(&q->lock);
    pthread_cond_signal(&q->done);
    pthread_mutex_unlock(&q->lock);
  }
  return 1;
}

static void *work(void *given) {
  qc_instance *q = given;
  for (;;) {
    int found = 0;
    for (int tries = 0; tries < TRIES && !found; tries++) {
      found = take_part(q);
      if (!found) rest();
    }
    if (found) continue;
    pthread_mutex_lock(&q->lock);
    atomic_fetch_add(&q->sleeping, 1);
    while ((uint32_t)atomic_load(&q->left) == 0 && !atomic_load(&q->stopping)) pthread_cond_wait(&q->wake, &q->lock);
    atomic_fetch_sub(&q->sleeping, 1);
    pthread_mutex_unlock(&q->lock);
    if (atomic_load(&q->stopping)) return NULL;
  }
}

/* Computes all units, in parts that this thread and the workers take until none is left: it waits for no thread that
   has not begun. Workers look for the next job for some microseconds before they sleep. */
static void launch(qc_instance *q, task *t, int64_t units, int32_t grain) {
  t->units = (int32_t)units;
  t->grain = grain;
  const int32_t parts = (int32_t)((units + grain - 1) / grain);
  if (parts <= 0) return;
  if (q->options.parallel_for != NULL && parts > 1) {
    q->options.parallel_for(q->options.user, run_part, t, parts);
    return;
  }
  if (q->started == 0 || parts == 1) {
    run_part(t, 0, parts);
    return;
  }
  q->job = t;
  q->parts = (int32_t)qc_min(parts, (int64_t)PARTS * (q->started + 1));
  atomic_store(&q->unfinished, q->parts);
  atomic_store(&q->left, (++q->jobs << 32) | (uint32_t)q->parts);
  if (atomic_load(&q->sleeping) > 0) {
    pthread_mutex_lock(&q->lock);
    pthread_cond_broadcast(&q->wake);
    pthread_mutex_unlock(&q->lock);
  }
  while (take_part(q)) continue;
  for (int tries = 0; tries < TRIES && atomic_load(&q->unfinished) > 0; tries++) rest();
  if (atomic_load(&q->unfinished) == 0) return;
  pthread_mutex_lock(&q->lock);
  atomic_store(&q->waiting, 1);
  while (atomic_load(&q->unfinished) > 0) pthread_cond_wait(&q->done, &q->lock);
  atomic_store(&q->waiting, 0);
  pthread_mutex_unlock(&q->lock);
}

/* ---- what was generated for this model ---- */

#define A(i) (q->arena + q->offsets[i])
#define W(offset) (q->model->bytes + HEADER + (offset))
#define I(i) (inputs[i])
#define O(i) (outputs[i])
#define K(i) (q->caches[i])
#define PTRS(...) {__VA_ARGS__}
#define INTS(...) {__VA_ARGS__}
#define DIMS(...) (const int64_t[]){__VA_ARGS__}
#define CALL(kernel, np, ni, pointers, integers, units, grain) \
  do { task t_ = {run_##kernel, pointers, integers, 0, 0}; launch(q, &t_, units, grain); } while (0)

@GENERATED@

/* ---- instances ---- */

/* Places buffers, in order, each at the lowest address where none lies that lives at the same time. */
static int64_t plan(int64_t *offsets, const int64_t *sizes) {
  int64_t end = 0;
  for (int i = 0; i < BUFFERS; i++) {
    int64_t at = 0;
    for (int moved = 1; moved;) {
      moved = 0;
      for (int j = 0; j < i; j++) {
        const int together = buffer_last[j] >= buffer_first[i] && buffer_last[i] >= buffer_first[j];
        if (together && sizes[j] > 0 && offsets[j] < at + sizes[i] && at < offsets[j] + sizes[j]) {
          at = offsets[j] + sizes[j];
          moved = 1;
        }
      }
    }
    offsets[i] = at;
    end = qc_max(end, at + sizes[i]);
  }
  return end;
}

@INSTANCES@
int qc_create(const qc_model *model, const int64_t *limits, const qc_options *options, qc_instance **instance) {
  int64_t room[CACHES + 1];
  if (model == NULL || instance == NULL) return QC_E_ARGUMENT;
  *instance = NULL;
  qc_instance *q = calloc(1, sizeof *q);
  if (q == NULL) return QC_E_MEMORY;
  if (options != NULL) q->options = *options;
  pthread_mutex_init(&q->lock, NULL);
  pthread_cond_init(&q->wake, NULL);
  pthread_cond_init(&q->done, NULL);
  int code = size_instance(q, model, limits == NULL ? qc_default_limits : limits, room);
  if (code == QC_OK) {
    q->arena = aligned((size_t)plan(q->offsets, q->planned), &q->memory);
    if (q->arena == NULL) code = QC_E_MEMORY;
  }
  for (int i = 0; i < CACHES && code == QC_OK; i++) {
    q->caches[i] = aligned((size_t)room[i], &q->memory);
    if (q->caches[i] == NULL) code = QC_E_MEMORY;
  }
  if (code == QC_OK) code = begin_text(q);
  q->count = q->options.parallel_for == NULL && q->options.threads > 1 ? q->options.threads - 1 : 0;
  if (code == QC_OK && q->count > 0) {
    q->workers = calloc((size_t)q->count, sizeof *q->workers);
    if (q->workers == NULL) code = QC_E_MEMORY;
    q->memory += (size_t)q->count * sizeof *q->workers;
    for (int32_t i = 0; i < q->count && code == QC_OK; i++) {
      if (pthread_create(&q->workers[i], NULL, work, q) != 0)
        code = QC_E_MEMORY;
      else
        q->started++;
    }
  }
  if (code != QC_OK) {
    qc_destroy(q);
    return code;
  }
  *instance = q;
  return QC_OK;
}

void qc_destroy(qc_instance *q) {
  if (q == NULL) return;
  pthread_mutex_lock(&q->lock);
  atomic_store(&q->stopping, 1);
  pthread_cond_broadcast(&q->wake);
  pthread_mutex_unlock(&q->lock);
  for (int32_t i = 0; i < q->started; i++) pthread_join(q->workers[i], NULL);
  free(q->arena);
  for (int i = 0; i < CACHES; i++) free(q->caches[i]);
  pthread_cond_destroy(&q->wake);
  pthread_cond_destroy(&q->done);
  pthread_mutex_destroy(&q->lock);
  free(q->workers);
  free(q->logits);
  free(q->ones);
  free(q->running);
  free(q);
}

static int checked_run(qc_instance *q, const int64_t *dims, const void *const *inputs, void *const *outputs, int64_t skip) {
  TRY(check_sizes(q, dims, skip == 0));
  return run(q, dims, inputs, outputs, skip);
}

@RUN@@CACHES@@DECODER@
