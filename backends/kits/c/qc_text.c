#include "qc_text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OTHER, LETTER, DIGIT, SPACE };

struct qc_text {
  int32_t *numbers; /* the file behind its first 8 bytes, which holds all that follows */
  int32_t tokens, pairs, ranges, specials, whole, bos;
  const int32_t *bytes, *range, *pair, *special, *order, *begin;
  const char *spelled;
};

static int32_t wide(int32_t n) { /* of the file's byte order */
  const unsigned char *b = (const unsigned char *)&n;
  return (int32_t)((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
}

qc_text *qc_text_open(const char *file) {
  FILE *stream = fopen(file, "rb");
  qc_text *text = calloc(1, sizeof *text);
  char magic[8];
  long size = 0;
  if (stream && text && fread(magic, 1, 8, stream) == 8 && !memcmp(magic, "QCTEXT01", 8) && !fseek(stream, 0, SEEK_END)) {
    size = ftell(stream) - 8;
    text->numbers = size > 0 ? malloc((size_t)size) : NULL;
  }
  if (!text || !text->numbers || fseek(stream, 8, SEEK_SET) || fread(text->numbers, 1, (size_t)size, stream) != (size_t)size) {
    if (stream) fclose(stream);
    qc_text_close(text);
    return NULL;
  }
  fclose(stream);
  int32_t *n = text->numbers;
  for (int i = 0; i < 6; i++) n[i] = wide(n[i]);
  text->tokens = n[0], text->pairs = n[1], text->ranges = n[2], text->specials = n[3], text->whole = n[4], text->bos = n[5];
  const size_t count = 6 + 256 + 3 * (size_t)n[2] + 4 * (size_t)n[1] + (size_t)n[3] + 2 * (size_t)n[0] + 1;
  if (count * 4 > (size_t)size) {
    qc_text_close(text);
    return NULL;
  }
  for (size_t i = 6; i < count; i++) n[i] = wide(n[i]);
  text->bytes = n + 6;
  text->range = text->bytes + 256;
  text->pair = text->range + 3 * text->ranges;
  text->special = text->pair + 4 * text->pairs;
  text->order = text->special + text->specials;
  text->begin = text->order + text->tokens;
  text->spelled = (const char *)(text->begin + text->tokens + 1);
  return text;
}

void qc_text_close(qc_text *text) {
  if (text) free(text->numbers);
  free(text);
}

/* The character at the front and how many bytes it has; a byte that begins none stands alone. */
static size_t character(const char *at, size_t left, uint32_t *code) {
  const unsigned char *b = (const unsigned char *)at;
  const size_t size = b[0] < 0x80 ? 1 : b[0] >= 0xf0 ? 4 : b[0] >= 0xe0 ? 3 : b[0] >= 0xc0 ? 2 : 1;
  *code = b[0];
  if (size == 1 || size > left) return 1;
  *code = b[0] & (0x7fu >> size);
  for (size_t i = 1; i < size; i++) {
    if ((b[i] & 0xc0) != 0x80) return *code = b[0], 1;
    *code = *code << 6 | (b[i] & 0x3fu);
  }
  return size;
}

static int kind(const qc_text *text, uint32_t code) {
  int32_t low = 0, high = text->ranges;
  while (low < high) {
    const int32_t middle = (low + high) / 2, *range = text->range + 3 * middle;
    if (code < (uint32_t)range[0]) high = middle;
    else if (code > (uint32_t)range[1]) low = middle + 1;
    else return range[2];
  }
  return OTHER;
}

/* Bytes of characters of one kind from the front on; of the last one in `last`. */
static size_t run_of(const qc_text *text, const char *at, size_t left, int wanted, size_t *last) {
  size_t done = 0;
  uint32_t code;
  while (done < left) {
    const size_t size = character(at + done, left - done, &code);
    if (kind(text, code) != wanted) break;
    done += size;
    *last = size;
  }
  return done;
}

/* The bytes of the first word: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t word(const qc_text *text, const char *at, size_t left) {
  static const char *const ENDS[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  for (size_t i = 0; i < sizeof ENDS / sizeof *ENDS; i++) {
    const size_t size = strlen(ENDS[i]);
    if (size <= left && !memcmp(at, ENDS[i], size)) return size;
  }
  const size_t blank = at[0] == ' ' && left > 1;
  uint32_t code;
  size_t last = 0;
  character(at + blank, left - blank, &code);
  int first = kind(text, code);
  if (first != SPACE) return blank + run_of(text, at + blank, left - blank, first, &last);
  const size_t spaces = run_of(text, at, left, SPACE, &last);
  return spaces == left || spaces == last ? spaces : spaces - last;
}

static const int32_t *pair_of(const qc_text *text, int64_t a, int64_t b) {
  int32_t low = 0, high = text->pairs;
  while (low < high) {
    const int32_t middle = (low + high) / 2, *pair = text->pair + 4 * middle;
    if (pair[0] < a || (pair[0] == a && pair[1] < b)) low = middle + 1;
    else if (pair[0] == a && pair[1] == b) return pair;
    else high = middle;
  }
  return NULL;
}

static int compared(const qc_text *text, int32_t token, const char *at, size_t size) {
  const size_t held = (size_t)(text->begin[token + 1] - text->begin[token]);
  const int found = memcmp(text->spelled + text->begin[token], at, held < size ? held : size);
  return found ? found : (held > size) - (held < size);
}

/* The token that is spelled so, or -1. */
static int64_t token_of(const qc_text *text, const char *at, size_t size) {
  int32_t low = 0, high = text->tokens - text->specials;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const int found = compared(text, text->order[middle], at, size);
    if (!found) return text->order[middle];
    if (found < 0) low = middle + 1;
    else high = middle;
  }
  return -1;
}

/* Bytes become tokens, then the pair of the lowest rank one token, the first of several, until no pair does. */
static size_t paired(const qc_text *text, const char *at, size_t size, int64_t *tokens) {
  const int64_t whole = text->whole ? token_of(text, at, size) : -1;
  if (whole >= 0) return tokens[0] = whole, 1;
  size_t count = size;
  for (size_t i = 0; i < size; i++) tokens[i] = text->bytes[(unsigned char)at[i]];
  for (;;) {
    const int32_t *best = NULL;
    size_t place = 0;
    for (size_t i = 0; i + 1 < count; i++) {
      const int32_t *pair = pair_of(text, tokens[i], tokens[i + 1]);
      if (pair && (!best || pair[3] < best[3])) best = pair, place = i;
    }
    if (!best) return count;
    tokens[place] = best[2];
    count--;
    memmove(tokens + place + 1, tokens + place + 2, (count - place - 1) * sizeof *tokens);
  }
}

/* The special token at the front, or -1. */
static int64_t special_at(const qc_text *text, const char *at, size_t left) {
  for (int32_t i = 0; i < text->specials; i++) {
    const int32_t token = text->special[i];
    const size_t size = (size_t)(text->begin[token + 1] - text->begin[token]);
    if (size && size <= left && !memcmp(text->spelled + text->begin[token], at, size)) return token;
  }
  return -1;
}

int64_t qc_text_encode(const qc_text *text, const char *bytes, size_t size, int64_t *tokens) {
  size_t count = 0, done = 0;
  if (text->bos >= 0) tokens[count++] = text->bos;
  while (done < size) {
    size_t end = done;
    int64_t special = -1;
    while (end < size && (special = special_at(text, bytes + end, size - end)) < 0) end++;
    while (done < end) {
      const size_t part = word(text, bytes + done, end - done);
      count += paired(text, bytes + done, part, tokens + count);
      done += part;
    }
    if (special >= 0) {
      tokens[count++] = special;
      done += (size_t)(text->begin[special + 1] - text->begin[special]);
    }
  }
  return (int64_t)count;
}

const char *qc_text_decode(const qc_text *text, int64_t token, size_t *size) {
  *size = 0;
  if (token < 0 || token >= text->tokens) return "";
  for (int32_t i = 0; i < text->specials; i++) {
    if (text->special[i] == token) return "";
  }
  *size = (size_t)(text->begin[token + 1] - text->begin[token]);
  return text->spelled + text->begin[token];
}
