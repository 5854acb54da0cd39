/* Text to token ids and back, by the tables in tokenizer.bin. */
#ifndef QC_TEXT_H
#define QC_TEXT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qc_text qc_text;

/* Reads the tables; NULL if there are none that this code reads. Any number of threads may share them. */
qc_text *qc_text_open(const char *file);

void qc_text_close(qc_text *text);

/* Token ids of a text in UTF-8, with those that texts start and end with. At most one for each byte and two more; returns
   how many. */
int64_t qc_text_encode(const qc_text *text, const char *bytes, size_t size, int64_t *tokens);

/* The bytes that a token stands for, none for a special one. Those of several tokens may make up one character. */
const char *qc_text_decode(const qc_text *text, int64_t token, size_t *size);

#ifdef __cplusplus
}
#endif
#endif
