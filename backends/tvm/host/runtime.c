/* What every library has in common: weights, memory, threads. */
#define _GNU_SOURCE
#include "model.h"

#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

@CONSTANTS@

enum { LANES = 1024, LINE = 64, HEADER = 64 };

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

typedef struct {
  pthread_t thread;
  struct qc_instance *instance;
  int32_t number;
} worker;

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
  worker *workers;
  int32_t count, started, waiting, stopping;
  uint64_t generation;
  const task *job;
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

static void *work(void *given) {
  worker *w = given;
  qc_instance *q = w->instance;
  uint64_t seen = 0;
  pthread_mutex_lock(&q->lock);
  for (;;) {
    while (q->generation == seen && !q->stopping) pthread_cond_wait(&q->wake, &q->lock);
    if (q->stopping) break;
    seen = q->generation;
    const task *t = q->job;
    pthread_mutex_unlock(&q->lock);
    const int64_t parts = (t->units + t->grain - 1) / t->grain, threads = q->started + 1;
    run_part(t, (int32_t)(parts * w->number / threads), (int32_t)(parts * (w->number + 1) / threads));
    pthread_mutex_lock(&q->lock);
    if (--q->waiting == 0) pthread_cond_signal(&q->done);
  }
  pthread_mutex_unlock(&q->lock);
  return NULL;
}

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
  pthread_mutex_lock(&q->lock);
  q->job = t;
  q->waiting = q->started;
  q->generation++;
  pthread_cond_broadcast(&q->wake);
  pthread_mutex_unlock(&q->lock);
  run_part(t, 0, (int32_t)((int64_t)parts / (q->started + 1)));
  pthread_mutex_lock(&q->lock);
  while (q->waiting > 0) pthread_cond_wait(&q->done, &q->lock);
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
      q->workers[i].instance = q;
      q->workers[i].number = i + 1;
      if (pthread_create(&q->workers[i].thread, NULL, work, &q->workers[i]) != 0)
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
  q->stopping = 1;
  pthread_cond_broadcast(&q->wake);
  pthread_mutex_unlock(&q->lock);
  for (int32_t i = 0; i < q->started; i++) pthread_join(q->workers[i].thread, NULL);
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
  TRY(check_sizes(q, dims));
  return run(q, dims, inputs, outputs, skip);
}

@RUN@@DECODER@
