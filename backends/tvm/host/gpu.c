/* What every library for a GPU has in common: weights, memory, launches. */
#define _GNU_SOURCE
#include "model.h"

#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

@CONSTANTS@

enum { LINE = 64, HEADER = 64, LANES = 1024, MOST_ARGUMENTS = 64 };

/* A kernel: its parameters are buffers, then integers; each is one of those of a launch, by number. */
typedef struct {
  const char *name, *source;
  int32_t buffers, integers, argument[MOST_ARGUMENTS], block[3];
  void (*grid)(const int32_t *n, int64_t *blocks);
} kernel_facts;

@DEVICE@

struct qc_model {
  const unsigned char *bytes;
  size_t size;
  int mapped;
  device device;
  buffer weights[WEIGHTS + 1];
};

struct qc_instance {
  const qc_model *model;
  queue queue;
  kernel kernels[KERNELS + 1];
  buffer arena[BUFFERS + 1], caches[CACHES + 1], inputs[INPUTS + 1], outputs[OUTPUTS + 1], status;
  int64_t slot[BUFFERS + 1], held[OUTPUTS + 1];
  int64_t limits[QC_DIMENSIONS + 1], planned[BUFFERS + 1];
  int64_t past, room, batch;
  size_t memory, staged;
  float *logits;
  int64_t *ones, *running; /* a mask, and positions, of a whole text */
  void *stage;             /* where numbers are converted */
};

static int cpu_fits(void) { return 1; }
static int model_begin(qc_model *model);
static void model_end(qc_model *model);

@WEIGHTS@

/* ---- what was generated for this model ---- */

static int launch(qc_instance *q, int number, const buffer *buffers, const int32_t *integers);

#define A(i) (q->arena[q->slot[i]])
#define W(i) (q->model->weights[i])
#define I(i) (q->inputs[i])
#define O(i) (q->outputs[i])
#define K(i) (q->caches[i])
#define S(i) (q->status)
#define BUFFERS(...) (const buffer[]){__VA_ARGS__}
#define INTS(...) (const int32_t[]){__VA_ARGS__}

@GENERATED@

/* ---- weights on the device ---- */

static int model_begin(qc_model *model) {
  TRY(device_begin(&model->device));
  TRY(program_make(&model->device, kernels));
  for (int i = 0; i < WEIGHTS; i++) {
    const unsigned char *from = model->bytes + HEADER + weight_offset[i];
    TRY(buffer_make(&model->device, (size_t)weight_size[i], from, &model->weights[i]));
  }
  return QC_OK;
}

static void model_end(qc_model *model) {
  for (int i = 0; i < WEIGHTS; i++) buffer_free(&model->device, model->weights[i]);
  device_end(&model->device);
}

/* ---- instances ---- */

@INSTANCES@
/* Gives each buffer, in order, a slot whose buffers before it are not needed any more, the smallest that holds it or
   else the largest, which grows; or a new one. */
static int plan(int64_t *slot, const int64_t *sizes, int64_t *slot_size) {
  int count = 0;
  int32_t last[BUFFERS + 1];
  for (int i = 0; i < BUFFERS; i++) {
    int best = -1;
    for (int j = 0; j < count; j++) {
      if (last[j] >= buffer_first[i]) continue;
      if (best < 0) {
        best = j;
        continue;
      }
      const int fits = slot_size[j] >= sizes[i], fitted = slot_size[best] >= sizes[i];
      if (fits ? !fitted || slot_size[j] < slot_size[best] : !fitted && slot_size[j] > slot_size[best]) best = j;
    }
    if (best < 0) {
      best = count++;
      slot_size[best] = 0;
    }
    slot[i] = best;
    slot_size[best] = qc_max(slot_size[best], sizes[i]);
    last[best] = buffer_last[i];
  }
  return count;
}

static int own_buffer(qc_instance *q, int64_t size, buffer *made) {
  q->memory += (size_t)qc_max(size, LINE);
  return buffer_make(&q->model->device, (size_t)qc_max(size, LINE), NULL, made);
}

static int make_instance(qc_instance *q, const qc_model *model, const int64_t *limits) {
  int64_t room[CACHES + 1], slots[BUFFERS + 1], inputs[INPUTS + 1];
  TRY(size_instance(q, model, limits, room));
  TRY(queue_make(&model->device, &q->queue));
  for (int i = 0; i < KERNELS; i++) TRY(kernel_make(&model->device, &kernels[i], &q->kernels[i]));
  const int count = plan(q->slot, q->planned, slots);
  for (int i = 0; i < count; i++) TRY(own_buffer(q, slots[i], &q->arena[i]));
  for (int i = 0; i < CACHES; i++) TRY(own_buffer(q, room[i], &q->caches[i]));
  input_sizes(limits, inputs);
  for (int i = 0; i < INPUTS; i++)
    if (!input_is_cache[i]) TRY(own_buffer(q, inputs[i], &q->inputs[i]));
  TRY(own_buffer(q, LINE, &q->status));
  return begin_text(q);
}

int qc_create(const qc_model *model, const int64_t *limits, const qc_options *options, qc_instance **instance) {
  (void)options; /* the device has its own threads */
  if (model == NULL || instance == NULL) return QC_E_ARGUMENT;
  *instance = NULL;
  qc_instance *q = calloc(1, sizeof *q);
  if (q == NULL) return QC_E_MEMORY;
  q->model = model;
  const int code = make_instance(q, model, limits == NULL ? qc_default_limits : limits);
  if (code != QC_OK) {
    qc_destroy(q);
    return code;
  }
  *instance = q;
  return QC_OK;
}

void qc_destroy(qc_instance *q) {
  if (q == NULL) return;
  const device *d = &q->model->device;
  for (int i = 0; i < BUFFERS; i++) buffer_free(d, q->arena[i]);
  for (int i = 0; i < CACHES; i++) buffer_free(d, q->caches[i]);
  for (int i = 0; i < INPUTS; i++) buffer_free(d, q->inputs[i]);
  for (int i = 0; i < OUTPUTS; i++) buffer_free(d, q->outputs[i]);
  buffer_free(d, q->status);
  for (int i = 0; i < KERNELS; i++) kernel_free(q->kernels[i]);
  queue_free(d, q->queue);
  free(q->logits);
  free(q->ones);
  free(q->running);
  free(q->stage);
  free(q);
}

/* ---- runs ---- */

static int launch(qc_instance *q, int number, const buffer *buffers, const int32_t *integers) {
  int64_t blocks[3] = {1, 1, 1};
  kernels[number].grid(integers, blocks);
  if (blocks[0] <= 0 || blocks[1] <= 0 || blocks[2] <= 0) return QC_OK;
  return kernel_run(&q->queue, q->kernels[number], &kernels[number], buffers, integers, blocks);
}

static int stage(qc_instance *q, int64_t size) {
  if ((size_t)size <= q->staged) return QC_OK;
  free(q->stage);
  q->stage = malloc((size_t)size);
  q->memory += (size_t)size - q->staged;
  q->staged = q->stage == NULL ? 0 : (size_t)size;
  return q->stage == NULL ? QC_E_MEMORY : QC_OK;
}

/* Elements have 4 bytes on the device. Kinds: f(loat), i(nt32), l(ong: int64), b(ytes, or truth values), s(igned bytes). */
static int put_in(qc_instance *q, buffer to, const void *from, int64_t count, char kind) {
  if (count == 0) return QC_OK;
  if (kind == 'f' || kind == 'i') return buffer_write(&q->queue, to, from, (size_t)count * 4);
  TRY(stage(q, count * 4));
  int32_t *staged = q->stage;
  for (int64_t i = 0; i < count; i++) {
    if (kind == 'l')
      staged[i] = (int32_t)qc_max(INT32_MIN, qc_min(INT32_MAX, ((const int64_t *)from)[i]));
    else
      staged[i] = kind == 'b' ? ((const uint8_t *)from)[i] : ((const int8_t *)from)[i];
  }
  return buffer_write(&q->queue, to, staged, (size_t)count * 4);
}

static int take_out(qc_instance *q, buffer from, void *to, int64_t count, char kind) {
  if (count == 0) return QC_OK;
  if (kind == 'f' || kind == 'i') return buffer_read(&q->queue, from, to, (size_t)count * 4);
  TRY(stage(q, count * 4));
  TRY(buffer_read(&q->queue, from, q->stage, (size_t)count * 4));
  const int32_t *staged = q->stage;
  for (int64_t i = 0; i < count; i++) {
    if (kind == 'l')
      ((int64_t *)to)[i] = staged[i];
    else
      ((uint8_t *)to)[i] = (uint8_t)staged[i];
  }
  return QC_OK;
}

/* With `skip`, one text is fed, and the logits behind its last token are all that is wanted. Buffers of outputs are made
   when they are first needed: a text needs few of them. */
static int checked_run(qc_instance *q, const int64_t *dims, const void *const *inputs, void *const *outputs, int64_t skip) {
  int64_t in[INPUTS + 1], out[OUTPUTS + 1];
  int32_t wrong = 0;
  TRY(check_sizes(q, dims, skip == 0));
  input_sizes(dims, in);
  output_sizes(dims, out);
  for (int i = 0; i < OUTPUTS; i++) {
    if (output_is_cache[i]) continue;
    if (skip > 0 && WHOLE_LOGITS == 0 && outputs[i] != NULL) out[i] = (int64_t)VOCABULARY * 4;
    if (q->held[i] >= qc_max(out[i], 4)) continue;
    buffer_free(&q->model->device, q->outputs[i]);
    if (q->held[i] > 0) q->memory -= (size_t)qc_max(q->held[i], LINE);
    q->held[i] = 0;
    memset(&q->outputs[i], 0, sizeof q->outputs[i]);
    TRY(own_buffer(q, out[i], &q->outputs[i]));
    q->held[i] = qc_max(out[i], 4);
  }
  TRY(buffer_write(&q->queue, q->status, &wrong, 4));
  for (int i = 0; i < INPUTS; i++)
    if (!input_is_cache[i]) TRY(put_in(q, q->inputs[i], inputs[i], in[i] / 4, input_kind[i]));
  TRY(run(q, dims, skip));
  TRY(buffer_read(&q->queue, q->status, &wrong, 4));
  if (wrong) return QC_E_INDEX;
  for (int i = 0; i < OUTPUTS; i++)
    if (outputs[i] != NULL && !output_is_cache[i])
      TRY(take_out(q, q->outputs[i], outputs[i], out[i] / 4, output_kind[i]));
  return QC_OK;
}

@RUN@@CACHES@@DECODER@
