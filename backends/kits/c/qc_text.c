#include "qc_text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OTHER, LETTER, DIGIT, SPACE, PUNCTUATION, NOTHING };
enum { PAIRS, WHOLE_WORDS, PIECES };

enum { MOST = 8, WORD = 256 }; /* characters that one becomes, and that a word has which is looked up */

struct qc_text {
  int32_t *numbers; /* the file behind its first 8 bytes, which holds all that follows */
  int32_t tokens, pairs, ranges, specials, changes, become, kind, first, last, unknown, longest, hangul;
  const int32_t *bytes, *range, *pair, *special, *order, *change, *becomes, *begin;
  const char *spelled;
};

static int32_t wide(int32_t n) { /* of the file's byte order */
  const unsigned char *b = (const unsigned char *)&n;
  return (int32_t)((uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
}

/* Whether all places that the tables name lie in them, with so many bytes of spelling behind. */
static int sound(const qc_text *text, size_t spelled) {
  const int32_t tokens = text->tokens;
  if (text->specials > tokens || text->begin[0] < 0 || (size_t)text->begin[tokens] > spelled) return 0;
  for (int32_t i = 0; i < tokens; i++) {
    if (text->begin[i] > text->begin[i + 1] || text->order[i] < 0 || text->order[i] >= tokens) return 0;
  }
  for (int32_t i = 0; i < text->specials; i++) {
    if (text->special[i] < 0 || text->special[i] >= tokens) return 0;
  }
  for (int32_t i = 0; i < text->changes; i++) {
    const int32_t *change = text->change + 3 * i;
    if (change[1] < 0 || change[2] < 0 || (int64_t)change[1] + change[2] > text->become) return 0;
  }
  return 1;
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
  int32_t *const head[] = {&text->tokens, &text->pairs, &text->ranges,  &text->specials, &text->changes, &text->become,
                           &text->kind,   &text->first, &text->last,    &text->unknown,  &text->longest, &text->hangul};
  const size_t heads = sizeof head / sizeof *head;
  for (size_t i = 0; i < heads && (i + 1) * 4 <= (size_t)size; i++) *head[i] = wide(n[i]);
  const int64_t counts[] = {(int64_t)heads + 256, 3 * (int64_t)text->ranges,  4 * (int64_t)text->pairs, text->specials,
                            text->tokens,         3 * (int64_t)text->changes, text->become,             text->tokens + (int64_t)1};
  int64_t count = 0;
  int negative = 0;
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) count += counts[i], negative |= counts[i] < 0;
  if (negative || count * 4 > size) {
    qc_text_close(text);
    return NULL;
  }
  for (int64_t i = (int64_t)heads; i < count; i++) n[i] = wide(n[i]);
  text->bytes = n + heads;
  text->range = text->bytes + 256;
  text->pair = text->range + 3 * text->ranges;
  text->special = text->pair + 4 * text->pairs;
  text->order = text->special + text->specials;
  text->change = text->order + text->tokens;
  text->becomes = text->change + 3 * text->changes;
  text->begin = text->becomes + text->become;
  text->spelled = (const char *)(text->begin + text->tokens + 1);
  if (sound(text, (size_t)(size - count * 4))) return text;
  qc_text_close(text);
  return NULL;
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
  const int64_t whole = text->kind == WHOLE_WORDS ? token_of(text, at, size) : -1;
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

/* What a character becomes: itself, other ones, none. */
static size_t become(const qc_text *text, uint32_t code, uint32_t *found) {
  if (text->hangul && code >= 0xac00 && code <= 0xd7a3) {
    const uint32_t place = code - 0xac00, end = place % 28;
    found[0] = 0x1100 + place / 588;
    found[1] = 0x1161 + place % 588 / 28;
    found[2] = 0x11a7 + end;
    return end ? 3 : 2;
  }
  int32_t low = 0, high = text->changes;
  while (low < high) {
    const int32_t middle = (low + high) / 2, *change = text->change + 3 * middle;
    if ((uint32_t)change[0] < code) low = middle + 1;
    else if ((uint32_t)change[0] > code) high = middle;
    else {
      for (int32_t i = 0; i < change[2] && i < MOST; i++) found[i] = (uint32_t)text->becomes[change[1] + i];
      return (size_t)(change[2] < MOST ? change[2] : MOST);
    }
  }
  *found = code;
  return 1;
}

static size_t spell(uint32_t code, char *out) {
  const size_t size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (size_t i = size - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
  out[0] = (char)(size == 1 ? code : (0xf00u >> size & 0xff) | code);
  return size;
}

/* The pieces of a word whose bytes stand behind two that are free: each the longest that there is, or unknown. */
static size_t pieces(const qc_text *text, char *spelled, size_t size, size_t characters, int64_t *tokens) {
  size_t count = 0, done = 0;
  if (!size) return 0;
  while (characters <= (size_t)text->longest && done < size) {
    char *at = spelled + 2 + done, held[2];
    const size_t front = done ? 2 : 0;
    memcpy(held, at - 2, 2);
    if (front) memcpy(at - 2, "##", 2);
    size_t end = size - done;
    int64_t found = -1;
    while (end && (found = token_of(text, at - front, front + end)) < 0) end--;
    memcpy(at - 2, held, 2);
    if (found < 0) break;
    tokens[count++] = found;
    done += end;
  }
  if (done == size) return count;
  tokens[0] = text->unknown;
  return 1;
}

/* Words of BERT: what its normalizer makes of the characters, cut at spaces, signs by themselves. */
static size_t words(const qc_text *text, const char *at, size_t left, int64_t *tokens) {
  char spelled[2 + 4 * WORD];
  size_t count = 0, size = 0, characters = 0;
  uint32_t code, made[MOST];
  while (left) {
    const size_t part = character(at, left, &code);
    at += part;
    left -= part;
    const size_t becomes = kind(text, code) == NOTHING ? 0 : become(text, code, made);
    for (size_t i = 0; i < becomes; i++) {
      const int is = kind(text, made[i]);
      if (is == SPACE || is == PUNCTUATION) {
        count += pieces(text, spelled, size, characters, tokens + count);
        size = characters = 0;
      }
      if (is == SPACE) continue;
      if (characters < WORD) size += spell(made[i], spelled + 2 + size);
      characters++;
      if (is == PUNCTUATION) {
        count += pieces(text, spelled, size, characters, tokens + count);
        size = characters = 0;
      }
    }
  }
  return count + pieces(text, spelled, size, characters, tokens + count);
}

static size_t part(const qc_text *text, const char *at, size_t size, int64_t *tokens) {
  if (text->kind == PIECES) return words(text, at, size, tokens);
  size_t count = 0;
  for (size_t done = 0; done < size;) {
    const size_t next = word(text, at + done, size - done);
    count += paired(text, at + done, next, tokens + count);
    done += next;
  }
  return count;
}

int64_t qc_text_encode(const qc_text *text, const char *bytes, size_t size, int64_t *tokens) {
  size_t count = 0, done = 0;
  if (text->first >= 0) tokens[count++] = text->first;
  while (done < size) {
    size_t end = done;
    int64_t special = -1;
    while (end < size && (special = special_at(text, bytes + end, size - end)) < 0) end++;
    count += part(text, bytes + done, end - done, tokens + count);
    done = end;
    if (special >= 0) {
      tokens[count++] = special;
      done += (size_t)(text->begin[special + 1] - text->begin[special]);
    }
  }
  if (text->last >= 0) tokens[count++] = text->last;
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
