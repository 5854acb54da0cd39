#define TRY(call) do { const int code_ = (call); if (code_ != QC_OK) return code_; } while (0)

static inline int64_t qc_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t qc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t qc_div(int64_t a, int64_t b) { return b == 0 ? 0 : a / b - (a % b < 0); }
static inline int64_t qc_wide(int64_t a, int64_t b) { return a == 1 ? b : a; }
static inline int64_t qc_bound(int64_t at, int64_t size) { return qc_min(qc_max(at < 0 ? at + size : at, 0), size); }
static inline int64_t qc_step(int64_t size, int64_t stride) { return size == 1 ? 0 : stride; }
static inline int64_t qc_scaled(int64_t size, float scale) { return (int64_t)((float)size * scale); }
static inline int64_t qc_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

/* The same of sizes that may be more than integers hold. */
static inline double wide_max(double a, double b) { return a > b ? a : b; }
static inline double wide_min(double a, double b) { return a < b ? a : b; }
static inline double wide_div(double a, double b) { return b == 0 ? 0 : floor(a / b); }
static inline double wide_wide(double a, double b) { return a == 1 ? b : a; }
static inline double wide_bound(double at, double size) { return wide_min(wide_max(at < 0 ? at + size : at, 0), size); }
static inline double wide_step(double size, double stride) { return size == 1 ? 0 : stride; }
static inline double wide_scaled(double size, double scale) { return ceil(size * scale); }
static inline double wide_up(double a, double unit) { return floor((a + unit - 1) / unit) * unit; }

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
      "no error", "a null pointer, or dimensions that are negative or do not fit together", "the weights file cannot be opened or mapped",
      "the weights file is cut short, changed, or of another model", "not enough memory",
      "larger than the limits of the instance", "a token, position or index outside of its table",
      "this processor lacks instructions that the library was compiled for",
      "no device was found, or its driver failed"};
  return code >= 0 && code <= QC_E_DEVICE ? texts[code] : "an unknown error";
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
  qc_model *made = calloc(1, sizeof *made);
  if (made == NULL) return QC_E_MEMORY;
  made->bytes = bytes;
  made->size = size;
  const int code = model_begin(made);
  if (code != QC_OK) {
    model_end(made);
    free(made);
    return code;
  }
  *model = made;
  return QC_OK;
}

uint64_t qc_model_id(void) { return MODEL_ID; }

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
#ifdef MADV_HUGEPAGE
  madvise(bytes, size, MADV_HUGEPAGE); /* of pages that are read for the first time; it may be refused */
#endif
  const int code = qc_open_memory(bytes, size, model);
  if (code != QC_OK)
    munmap(bytes, size);
  else
    (*model)->mapped = 1;
  return code;
}

void qc_close(qc_model *model) {
  if (model == NULL) return;
  model_end(model);
  if (model->mapped) munmap((void *)(uintptr_t)model->bytes, model->size);
  free(model);
}
