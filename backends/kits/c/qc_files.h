/* The files that this model consists of, as they were compiled; written by qc. */
#ifndef QC_FILES_H
#define QC_FILES_H

typedef struct {
  const char *name;
  unsigned long long bytes;
  const char *sha256;
} qc_file;

static const qc_file QC_FILES[] = {
@@c_files@@
};

#endif
