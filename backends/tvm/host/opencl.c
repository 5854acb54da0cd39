/* ---- the device: OpenCL ---- */

#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>

#define CL_TRY(call) do { if ((call) != CL_SUCCESS) return QC_E_DEVICE; } while (0)

typedef cl_mem buffer;
typedef cl_kernel kernel;
typedef cl_command_queue queue;
typedef struct {
  cl_device_id id;
  cl_context context;
  cl_program program;
} device;

/* The first GPU of all platforms, or else their first device of any kind. */
static int device_begin(device *d) {
  enum { MOST = 16 };
  cl_platform_id platforms[MOST];
  cl_uint count = 0;
  cl_int code = CL_SUCCESS;
  if (clGetPlatformIDs(MOST, platforms, &count) != CL_SUCCESS) return QC_E_DEVICE;
  const cl_device_type wanted[] = {CL_DEVICE_TYPE_GPU, CL_DEVICE_TYPE_ALL};
  for (int kind = 0; kind < 2 && d->id == NULL; kind++)
    for (cl_uint i = 0; i < count && i < MOST && d->id == NULL; i++) {
      cl_uint found = 0;
      if (clGetDeviceIDs(platforms[i], wanted[kind], 1, &d->id, &found) != CL_SUCCESS || found == 0) d->id = NULL;
    }
  if (d->id == NULL) return QC_E_DEVICE;
  d->context = clCreateContext(NULL, 1, &d->id, NULL, NULL, &code);
  return code == CL_SUCCESS ? QC_OK : QC_E_DEVICE;
}

static void device_end(device *d) {
  if (d->program != NULL) clReleaseProgram(d->program);
  if (d->context != NULL) clReleaseContext(d->context);
}

/* All kernels as one program: compilers take long to begin. Quotients are rounded as elsewhere where the device can: codes
   of activations are rounded from them. */
static int program_make(device *d, const kernel_facts *facts) {
  cl_int code = CL_SUCCESS;
  const char *sources[KERNELS + 1];
  for (int i = 0; i < KERNELS; i++) sources[i] = facts[i].source;
  d->program = clCreateProgramWithSource(d->context, KERNELS, sources, NULL, &code);
  CL_TRY(code);
  cl_device_fp_config able = 0;
  CL_TRY(clGetDeviceInfo(d->id, CL_DEVICE_SINGLE_FP_CONFIG, sizeof able, &able, NULL));
  const char *options = able & CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT ? "-cl-fp32-correctly-rounded-divide-sqrt" : "";
  CL_TRY(clBuildProgram(d->program, 1, &d->id, options, NULL, NULL));
  return QC_OK;
}

static int kernel_make(const device *d, const kernel_facts *facts, kernel *made) {
  cl_int code = CL_SUCCESS;
  *made = clCreateKernel(d->program, facts->name, &code);
  return code == CL_SUCCESS ? QC_OK : QC_E_DEVICE;
}

static void kernel_free(kernel k) {
  if (k != NULL) clReleaseKernel(k);
}

static int queue_make(const device *d, queue *made) {
  cl_int code = CL_SUCCESS;
  *made = clCreateCommandQueue(d->context, d->id, 0, &code);
  return code == CL_SUCCESS ? QC_OK : QC_E_DEVICE;
}

static void queue_free(const device *d, queue q) {
  (void)d;
  if (q == NULL) return;
  clFinish(q);
  clReleaseCommandQueue(q);
}

static int buffer_make(const device *d, size_t size, const void *content, buffer *made) {
  cl_int code = CL_SUCCESS;
  const cl_mem_flags flags = CL_MEM_READ_WRITE | (content != NULL ? CL_MEM_COPY_HOST_PTR : 0);
  *made = clCreateBuffer(d->context, flags, size, (void *)(uintptr_t)content, &code);
  return code == CL_SUCCESS ? QC_OK : QC_E_MEMORY;
}

static void buffer_free(const device *d, buffer b) {
  (void)d;
  if (b != NULL) clReleaseMemObject(b);
}

static int buffer_write(const queue *q, buffer to, const void *from, size_t size) {
  CL_TRY(clEnqueueWriteBuffer(*q, to, CL_TRUE, 0, size, from, 0, NULL, NULL));
  return QC_OK;
}

static int buffer_read(const queue *q, buffer from, void *to, size_t size) {
  CL_TRY(clEnqueueReadBuffer(*q, from, CL_TRUE, 0, size, to, 0, NULL, NULL));
  return QC_OK;
}

static int kernel_run(const queue *q, kernel k, const kernel_facts *facts, const buffer *buffers,
                      const int32_t *integers, const int64_t *blocks) {
  size_t global[3], local[3];
  for (int i = 0; i < facts->buffers + facts->integers; i++) {
    const int32_t at = facts->argument[i];
    if (i < facts->buffers)
      CL_TRY(clSetKernelArg(k, (cl_uint)i, sizeof(cl_mem), &buffers[at]));
    else
      CL_TRY(clSetKernelArg(k, (cl_uint)i, sizeof(cl_int), &integers[at]));
  }
  for (int i = 0; i < 3; i++) {
    local[i] = (size_t)facts->block[i];
    global[i] = (size_t)blocks[i] * local[i];
  }
  CL_TRY(clEnqueueNDRangeKernel(*q, k, 3, NULL, global, local, 0, NULL, NULL));
  return QC_OK;
}
