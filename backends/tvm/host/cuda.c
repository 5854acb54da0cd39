/* ---- the device: CUDA, through its driver, which is found when the library runs ---- */

#include <dlfcn.h>

typedef struct {
  int (*cuInit)(unsigned);
  int (*cuDeviceGet)(int *, int);
  int (*cuDevicePrimaryCtxRetain)(void **, int);
  int (*cuDevicePrimaryCtxRelease_v2)(int);
  int (*cuCtxSetCurrent)(void *);
  int (*cuModuleLoadData)(void **, const void *);
  int (*cuModuleUnload)(void *);
  int (*cuModuleGetFunction)(void **, void *, const char *);
  int (*cuStreamCreate)(void **, unsigned);
  int (*cuStreamDestroy_v2)(void *);
  int (*cuStreamSynchronize)(void *);
  int (*cuMemAlloc_v2)(unsigned long long *, size_t);
  int (*cuMemFree_v2)(unsigned long long);
  int (*cuMemcpyHtoDAsync_v2)(unsigned long long, const void *, size_t, void *);
  int (*cuMemcpyDtoHAsync_v2)(void *, unsigned long long, size_t, void *);
  int (*cuLaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                        void **);
} driver;

static const char *const driver_names[] = {
    "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuCtxSetCurrent",
    "cuModuleLoadData", "cuModuleUnload", "cuModuleGetFunction", "cuStreamCreate", "cuStreamDestroy_v2",
    "cuStreamSynchronize", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2",
    "cuLaunchKernel"};

enum { DRIVER_FUNCTIONS = sizeof driver_names / sizeof driver_names[0] };

typedef unsigned long long buffer;
typedef struct {
  void *library, *context, *module;
  int id;
  driver call;
} device;
typedef void *kernel;
typedef struct {
  const device *device;
  void *stream;
} queue;

#define CU_TRY(call) do { if ((call) != 0) return QC_E_DEVICE; } while (0)

static int device_begin(device *d) {
  void *found[DRIVER_FUNCTIONS];
  d->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (d->library == NULL) return QC_E_DEVICE;
  for (int i = 0; i < DRIVER_FUNCTIONS; i++) {
    found[i] = dlsym(d->library, driver_names[i]);
    if (found[i] == NULL) return QC_E_DEVICE;
  }
  _Static_assert(sizeof d->call == sizeof found, "one name for each function");
  memcpy(&d->call, found, sizeof found);
  CU_TRY(d->call.cuInit(0));
  CU_TRY(d->call.cuDeviceGet(&d->id, 0));
  CU_TRY(d->call.cuDevicePrimaryCtxRetain(&d->context, d->id));
  CU_TRY(d->call.cuCtxSetCurrent(d->context));
  return QC_OK;
}

static void device_end(device *d) {
  if (d->context != NULL) {
    d->call.cuCtxSetCurrent(d->context);
    if (d->module != NULL) d->call.cuModuleUnload(d->module);
    d->call.cuDevicePrimaryCtxRelease_v2(d->id);
  }
  if (d->library != NULL) dlclose(d->library);
}

static int program_make(device *d, const kernel_facts *facts) {
  (void)facts; /* the image holds all kernels */
  CU_TRY(d->call.cuModuleLoadData(&d->module, kernel_image));
  return QC_OK;
}

static int kernel_make(const device *d, const kernel_facts *facts, kernel *made) {
  CU_TRY(d->call.cuCtxSetCurrent(d->context));
  CU_TRY(d->call.cuModuleGetFunction(made, d->module, facts->name));
  return QC_OK;
}

static void kernel_free(kernel k) { (void)k; }

static int queue_make(const device *d, queue *made) {
  made->device = d;
  CU_TRY(d->call.cuCtxSetCurrent(d->context));
  CU_TRY(d->call.cuStreamCreate(&made->stream, 1)); /* it does not wait for other streams */
  return QC_OK;
}

static void queue_free(const device *d, queue q) {
  if (q.stream == NULL) return;
  d->call.cuCtxSetCurrent(d->context);
  d->call.cuStreamSynchronize(q.stream);
  d->call.cuStreamDestroy_v2(q.stream);
}

static int buffer_write(const queue *q, buffer to, const void *from, size_t size) {
  const driver *call = &q->device->call;
  CU_TRY(call->cuCtxSetCurrent(q->device->context));
  CU_TRY(call->cuMemcpyHtoDAsync_v2(to, from, size, q->stream));
  CU_TRY(call->cuStreamSynchronize(q->stream));
  return QC_OK;
}

static int buffer_read(const queue *q, buffer from, void *to, size_t size) {
  const driver *call = &q->device->call;
  CU_TRY(call->cuCtxSetCurrent(q->device->context));
  CU_TRY(call->cuMemcpyDtoHAsync_v2(to, from, size, q->stream));
  CU_TRY(call->cuStreamSynchronize(q->stream));
  return QC_OK;
}

static int buffer_make(const device *d, size_t size, const void *content, buffer *made) {
  const queue first = {d, NULL};
  CU_TRY(d->call.cuCtxSetCurrent(d->context));
  if (d->call.cuMemAlloc_v2(made, size) != 0) {
    *made = 0;
    return QC_E_MEMORY;
  }
  return content == NULL ? QC_OK : buffer_write(&first, *made, content, size);
}

static void buffer_free(const device *d, buffer b) {
  if (b == 0) return;
  d->call.cuCtxSetCurrent(d->context);
  d->call.cuMemFree_v2(b);
}

static int kernel_run(const queue *q, kernel k, const kernel_facts *facts, const buffer *buffers,
                      const int32_t *integers, const int64_t *blocks) {
  void *parameters[MOST_ARGUMENTS];
  const unsigned x = (unsigned)blocks[0], y = (unsigned)blocks[1], z = (unsigned)blocks[2];
  const unsigned *block = (const unsigned *)facts->block;
  for (int i = 0; i < facts->buffers + facts->integers; i++) {
    const int32_t at = facts->argument[i];
    parameters[i] = (void *)(i < facts->buffers ? (uintptr_t)&buffers[at] : (uintptr_t)&integers[at]);
  }
  CU_TRY(q->device->call.cuCtxSetCurrent(q->device->context));
  CU_TRY(q->device->call.cuLaunchKernel(k, x, y, z, block[0], block[1], block[2], 0, q->stream, parameters, NULL));
  return QC_OK;
}
