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

static inline int64_t qc_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t qc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t qc_div(int64_t a, int64_t b) { return b == 0 ? 0 : a / b; }
static inline int64_t qc_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  float f;
  if (exponent == 0) {
    f = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13);
  memcpy(&f, &bits, 4);
  return f;
}

const char *qc_error(int code) {
  static const char *const texts[] = {
      "no error", "a null pointer, or a dimension that is not positive", "the weights file cannot be opened or mapped",
      "the weights file is cut short, changed, or of another model", "not enough memory",
      "larger than the limits of the instance", "a token, position or index outside of its table",
      "this processor lacks instructions that the library was compiled for"};
  return code >= 0 && code <= QC_E_CPU ? texts[code] : "an unknown error";
}

/* ---- weights ---- */

static inline uint64_t rotate_left(uint64_t x, int r) { return x << r | x >> (64 - r); }
static uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdu;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53u;
  return x ^ x >> 33;
}

/* 64 bits that change with every bit of the data, and with its order: interleaved lanes, each a chain of rotations and
   products, mixed in order. It finds damage; it is no signature. */
static uint64_t hash_of(const unsigned char *data, size_t size) {
  uint64_t lanes[LANES], word, total = mix((uint64_t)size);
  for (int j = 0; j < LANES; j++) lanes[j] = (uint64_t)j * 0x9e3779b97f4a7c15u;
  const size_t row = LANES * 8;
  for (size_t at = 0; at < size; at += row)
    for (size_t j = 0; j < LANES; j++) {
      const size_t here = at + j * 8;
      word = 0;
      if (here < size) memcpy(&word, data + here, size - here < 8 ? size - here : 8);
      lanes[j] = rotate_left(lanes[j] + word * 0xc2b2ae3d27d4eb4fu, 31) * 0x9e3779b185ebca87u;
    }
  for (int j = 0; j < LANES; j++) total = mix(total ^ lanes[j]) + (uint64_t)j;
  return total;
}

int qc_open_memory(const void *bytes, size_t size, qc_model **model) {
  uint64_t header[8];
  if (bytes == NULL || model == NULL || (uintptr_t)bytes % LINE != 0) return QC_E_ARGUMENT;
  *model = NULL;
  if (!cpu_fits()) return QC_E_CPU;
  if (size != WEIGHT_BYTES + HEADER) return QC_E_WEIGHTS;
  memcpy(header, bytes, sizeof header);
  if (memcmp(bytes, "QCTVMW1", 8) != 0 || header[1] != WEIGHT_BYTES || header[2] != MODEL_ID || header[3] != WEIGHT_HASH)
    return QC_E_WEIGHTS;
  if (hash_of((const unsigned char *)bytes + HEADER, WEIGHT_BYTES) != WEIGHT_HASH) return QC_E_WEIGHTS;
  qc_model *made = malloc(sizeof *made);
  if (made == NULL) return QC_E_MEMORY;
  *made = (qc_model){bytes, size, 0, tiles_allowed()};
  *model = made;
  return QC_OK;
}

int qc_open(const char *weights_file, qc_model **model) {
  struct stat facts;
  if (weights_file == NULL || model == NULL) return QC_E_ARGUMENT;
  *model = NULL;
  const int file = open(weights_file, O_RDONLY | O_CLOEXEC);
  if (file < 0) return QC_E_FILE;
  if (fstat(file, &facts) != 0) {
    close(file);
    return QC_E_FILE;
  }
  if ((uint64_t)facts.st_size != WEIGHT_BYTES + HEADER) {
    close(file);
    return QC_E_WEIGHTS;
  }
  const size_t size = (size_t)facts.st_size;
  void *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (bytes == MAP_FAILED) return QC_E_FILE;
  const int code = qc_open_memory(bytes, size, model);
  if (code != QC_OK)
    munmap(bytes, size);
  else
    (*model)->mapped = 1;
  return code;
}

void qc_close(qc_model *model) {
  if (model == NULL) return;
  if (model->mapped) munmap((void *)(uintptr_t)model->bytes, model->size);
  free(model);
}

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
#define TRY(call) do { const int code_ = (call); if (code_ != QC_OK) return code_; } while (0)
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

static void *aligned(size_t size, size_t *total) {
  void *made = NULL;
  size = (size + LINE - 1) / LINE * LINE + 2 * LINE;
  if (posix_memalign(&made, LINE, size) != 0) return NULL;
  memset(made, 0, size);
  *total += size;
  return made;
}

int qc_create(const qc_model *model, const int64_t *limits, const qc_options *options, qc_instance **instance) {
  if (model == NULL || instance == NULL) return QC_E_ARGUMENT;
  *instance = NULL;
  if (limits == NULL) limits = qc_default_limits;
  for (int i = 0; i < QC_DIMENSIONS; i++)
    if (limits[i] < 0 || limits[i] > INT32_MAX) return QC_E_ARGUMENT;
  qc_instance *q = calloc(1, sizeof *q);
  if (q == NULL) return QC_E_MEMORY;
  q->model = model;
  q->memory = sizeof *q;
  memcpy(q->limits, limits, sizeof(int64_t) * QC_DIMENSIONS);
  if (options != NULL) q->options = *options;
  pthread_mutex_init(&q->lock, NULL);
  pthread_cond_init(&q->wake, NULL);
  pthread_cond_init(&q->done, NULL);
  int64_t room[CACHES + 1];
  int code = cache_sizes(q, limits, room);
  buffer_sizes(limits, q->planned);
  for (int i = 0; i < BUFFERS; i++) {
    if (q->planned[i] > INT32_MAX) code = QC_E_LIMIT;
    q->planned[i] = qc_up(qc_max(q->planned[i], 0), LINE);
  }
  if (code == QC_OK) {
    q->arena = aligned((size_t)plan(q->offsets, q->planned), &q->memory);
    if (q->arena == NULL) code = QC_E_MEMORY;
  }
  for (int i = 0; i < CACHES && code == QC_OK; i++) {
    q->caches[i] = room[i] > INT32_MAX ? NULL : aligned((size_t)room[i], &q->memory);
    if (q->caches[i] == NULL) code = room[i] > INT32_MAX ? QC_E_LIMIT : QC_E_MEMORY;
  }
  if (code == QC_OK && VOCABULARY > 0) {
    q->logits = aligned(sizeof(float) * VOCABULARY * 3, &q->memory);
    q->ones = aligned(sizeof(int64_t) * (size_t)q->room, &q->memory);
    q->running = aligned(sizeof(int64_t) * (size_t)q->room, &q->memory);
    if (q->logits == NULL || q->ones == NULL || q->running == NULL) code = QC_E_MEMORY;
    for (int64_t i = 0; i < q->room && code == QC_OK; i++) {
      q->ones[i] = 1;
      q->running[i] = i;
    }
  }
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

int qc_reset(qc_instance *q) {
  if (q == NULL) return QC_E_ARGUMENT;
  q->past = 0;
  return QC_OK;
}

void qc_destroy(qc_instance *q) {
  if (q == NULL) return;
  pthread_mutex_lock(&q->lock);
  q->stopping = 1;
  pthread_cond_broadcast(&q->wake);
  pthread_mutex_unlock(&q->lock);
  for (int32_t i = 0; i < q->started; i++) pthread_join(q->workers[i].thread, NULL);
  for (int i = 0; i < CACHES; i++) free(q->caches[i]);
  pthread_cond_destroy(&q->wake);
  pthread_cond_destroy(&q->done);
  pthread_mutex_destroy(&q->lock);
  free(q->workers);
  free(q->logits);
  free(q->ones);
  free(q->running);
  free(q->arena);
  free(q);
}

size_t qc_memory(const qc_instance *q) { return q == NULL ? 0 : q->memory; }

static int checked_run(qc_instance *q, const int64_t *dims, const void *const *inputs, void *const *outputs, int64_t skip) {
  int64_t sizes[BUFFERS + 1];
  for (int i = 0; i < QC_DIMENSIONS; i++) {
    if (dims[i] < 0) return QC_E_ARGUMENT;
    if (dims[i] > q->limits[i]) return QC_E_LIMIT;
  }
  TRY(check_dims(q, dims));
  buffer_sizes(dims, sizes);
  for (int i = 0; i < BUFFERS; i++)
    if (sizes[i] > q->planned[i]) return QC_E_LIMIT;
  return run(q, dims, inputs, outputs, skip);
}

int qc_run(qc_instance *q, const int64_t *dims, const void *const *inputs, void *const *outputs) {
  if (q == NULL || dims == NULL || inputs == NULL || outputs == NULL) return QC_E_ARGUMENT;
  for (int i = 0; i < INPUTS; i++)
    if (inputs[i] == NULL && !input_is_cache[i]) return QC_E_ARGUMENT;
  for (int i = 0; i < OUTPUTS; i++)
    if (outputs[i] == NULL && !output_is_cache[i]) return QC_E_ARGUMENT;
  return checked_run(q, dims, inputs, outputs, 0);
}
@DECODER@
