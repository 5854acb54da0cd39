/* Checks the files of a model before they are used. */
#ifndef QC_CHECK_H
#define QC_CHECK_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Compares the library with the header that the program was built with, and size and SHA-256 of every file that belongs
   to this model with what was compiled. Returns 0, or 1 and a message that starts with the name of the first file that
   is missing or differs. */
int qc_check(const char *directory, char *message, size_t size);

#ifdef __cplusplus
}
#endif
#endif
