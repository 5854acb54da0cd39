/* Runs a library for a test on another machine: commands come in through stdin, answers go out through stdout. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int qc_output_shape(int index, const int64_t *dims, int64_t *shape);

static void take(void *to, size_t size) {
  if (size && fread(to, 1, size, stdin) != size) exit(0);
}
static int64_t number(void) {
  int64_t value;
  take(&value, 8);
  return value;
}
static void give(const void *from, size_t size) { fwrite(from, 1, size, stdout); }
static void answer(int64_t value) {
  give(&value, 8);
  fflush(stdout);
}

static qc_model *model;
static qc_instance *instance;

static void run(void) {
  int64_t dims[QC_DIMENSIONS + 1], sizes[64];
  const void *inputs[64];
  void *outputs[64];
  take(dims, 8 * QC_DIMENSIONS);
  const int64_t n = number(), m = number();
  for (int64_t i = 0; i < n; i++) {
    const size_t size = (size_t)number();
    void *held = malloc(size + 1);
    take(held, size);
    inputs[i] = held;
  }
  for (int64_t i = 0; i < m; i++) {
    sizes[i] = number();
    outputs[i] = calloc(1, (size_t)sizes[i] + 1);
  }
  answer(qc_run(instance, dims, inputs, outputs));
  for (int64_t i = 0; i < m; i++) {
    give(outputs[i], (size_t)sizes[i]);
    free(outputs[i]);
  }
  for (int64_t i = 0; i < n; i++) free((void *)inputs[i]);
  fflush(stdout);
}

int main(void) {
  int64_t dims[QC_DIMENSIONS + 1], shape[16];
  for (int command; (command = getchar()) != EOF;) switch (command) {
      case 'o': {
        char name[4096] = {0};
        const size_t size = (size_t)number();
        if (size >= sizeof name) return 1;
        take(name, size);
        answer(qc_open(name, &model));
        break;
      }
      case 'd':
        give(qc_default_limits, 8 * QC_DIMENSIONS);
        fflush(stdout);
        break;
      case 'c': {
        take(dims, 8 * QC_DIMENSIONS);
        const qc_options options = {(int32_t)number(), NULL, NULL};
        qc_destroy(instance);
        answer(qc_create(model, dims, &options, &instance));
        break;
      }
      case 's': {
        const int index = (int)number();
        take(dims, 8 * QC_DIMENSIONS);
        const int rank = qc_output_shape(index, dims, shape);
        answer(rank);
        give(shape, 8 * (size_t)rank);
        fflush(stdout);
        break;
      }
      case 'r':
        run();
        break;
      case 'z':
        answer(qc_reset(instance));
        break;
      case 'e': {
        const char *text = qc_error((int)number());
        answer((int64_t)strlen(text));
        give(text, strlen(text));
        fflush(stdout);
        break;
      }
#ifdef CACHES
      case 'k':
      case 'w': {
        const int32_t index = (int32_t)number();
        void *cache = qc_cache(instance, index, shape);
        const size_t size = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]);
        if (command == 'w') {
          take(cache, size);
          qc_cache_changed(instance, index);
          break;
        }
        give(shape, 32);
        give(cache, size);
        fflush(stdout);
        break;
      }
#endif
#ifdef DECODER
      case 'f': {
        const int64_t count = number();
        int64_t *tokens = malloc(8 * (size_t)count + 8);
        take(tokens, 8 * (size_t)count);
        answer(qc_feed(instance, tokens, count));
        free(tokens);
        break;
      }
      case 'n': {
        qc_sampling sampling;
        int64_t token = 0;
        take(&sampling, sizeof sampling);
        answer(qc_sample(instance, &sampling, &token));
        answer(token);
        give(&sampling, sizeof sampling);
        fflush(stdout);
        break;
      }
#endif
      default:
        return 1;
    }
  qc_destroy(instance);
  qc_close(model);
  return 0;
}
