#include "qc_check.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "model.h"
#include "qc_files.h"

/* SHA-256, FIPS 180-4. */
typedef struct {
  uint32_t state[8];
  uint64_t bytes;
  uint8_t block[64];
} sha256;

static const uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void mix(sha256 *s) {
  uint32_t w[64], v[8];
  for (int i = 0; i < 16; i++) {
    const uint8_t *b = s->block + 4 * i;
    w[i] = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
  }
  for (int i = 16; i < 64; i++) {
    const uint32_t a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + a + w[i - 7] + b;
  }
  memcpy(v, s->state, sizeof v);
  for (int i = 0; i < 64; i++) {
    const uint32_t a = turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25), choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
    const uint32_t first = v[7] + a + choice + ROUND[i] + w[i];
    const uint32_t b = turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22);
    const uint32_t most = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
    memmove(v + 1, v, 7 * sizeof *v);
    v[4] += first;
    v[0] = first + b + most;
  }
  for (int i = 0; i < 8; i++) s->state[i] += v[i];
}

static void start(sha256 *s) {
  static const uint32_t FIRST[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(s->state, FIRST, sizeof FIRST);
  s->bytes = 0;
}

static void add(sha256 *s, const uint8_t *data, size_t count) {
  while (count) {
    const size_t used = s->bytes % 64, part = count < 64 - used ? count : 64 - used;
    memcpy(s->block + used, data, part);
    s->bytes += part;
    data += part;
    count -= part;
    if (s->bytes % 64 == 0) mix(s);
  }
}

static void finish(sha256 *s, char text[65]) {
  static const uint8_t PADDING[64] = {0x80};
  const uint64_t bits = s->bytes * 8;
  uint8_t length[8];
  for (int i = 0; i < 8; i++) length[i] = (uint8_t)(bits >> (56 - 8 * i));
  add(s, PADDING, 1 + (119 - s->bytes % 64) % 64);
  add(s, length, 8);
  for (int i = 0; i < 8; i++) snprintf(text + 8 * i, 9, "%08x", s->state[i]);
}

static int check(const char *directory, const qc_file *file, char *message, size_t size) {
  static const char *const NAMED = "%s: ";
  char path[4096], found[65];
  uint8_t buffer[1 << 14];
  const int written = snprintf(message, size, NAMED, file->name);
  const size_t at = written < 0 || (size_t)written > size ? size : (size_t)written;
  if ((size_t)snprintf(path, sizeof path, "%s/%s", directory, file->name) >= sizeof path) {
    snprintf(message + at, size - at, "its path is too long");
    return 1;
  }
  FILE *stream = fopen(path, "rb");
  if (!stream) {
    snprintf(message + at, size - at, "missing at %s", path);
    return 1;
  }
  sha256 sum;
  start(&sum);
  for (size_t count; (count = fread(buffer, 1, sizeof buffer, stream));) add(&sum, buffer, count);
  fclose(stream);
  if (sum.bytes != file->bytes) {
    snprintf(message + at, size - at, "expected %llu bytes, found %llu", file->bytes, (unsigned long long)sum.bytes);
    return 1;
  }
  finish(&sum, found);
  if (strcmp(found, file->sha256)) {
    snprintf(message + at, size - at, "content differs from what was compiled; copy it again from its origin");
    return 1;
  }
  return 0;
}

int qc_check(const char *directory, char *message, size_t size) {
  if (qc_model_id() != QC_MODEL_ID) {
    snprintf(message, size, "libmodel.a: of another model than model.h; take both from one artifact, and build again");
    return 1;
  }
  for (size_t i = 0; i < sizeof QC_FILES / sizeof *QC_FILES; i++) {
    if (check(directory, &QC_FILES[i], message, size)) return 1;
  }
  return 0;
}
