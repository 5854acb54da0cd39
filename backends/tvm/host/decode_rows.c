static float table_entry@(const uint8_t *planes, int distance, int entry) {
  uint32_t bits = 0;
  for (int i = 0; i < entry; i++) bits |= (uint32_t)planes[i * distance] << (8 * i);
  if (entry == 2) return (float)(int16_t)bits;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static int decode_rows@(const uint8_t *w, const int@_t *index, float *y, int64_t count, int64_t rows, int64_t columns,
    int64_t groups, int lanes, int bits, int block, int blocks, int per, int64_t record, int half, int zeros, int zero,
    int is_signed, int entry, int by_group, const uint8_t *table) {
  const int64_t code_bytes = (int64_t)lanes * block * bits / 8, scale_size = half ? 2 : 4, records = (groups + per - 1) / per;
  const int64_t head = table != NULL || by_group ? 0 : 16 * entry * lanes, unit = head + records * record;
  const int64_t scale_at = per * blocks * code_bytes, zero_at = scale_at + per * lanes * scale_size;
  const int each = bits == 3 ? 4 : 8 / bits, mask = (1 << bits) - 1;
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = index[i] < 0 ? index[i] + rows : index[i];
    if (row < 0 || row >= rows) return QC_E_INDEX;
    const int lane = (int)(row % lanes);
    /* 16 columns of a row lie in 16 bytes of one slot, or in 4 bytes of each of four. */
    const int run = entry > 1 ? 16 : 4, turn = entry > 1 ? lane % 4 : 0, at = entry > 1 ? lane / 4 * 16 : lane * 4;
    for (int64_t b = 0; b * block < columns; b++) {
      const int64_t g = b / blocks;
      const uint8_t *r = w + row / lanes * unit + head + g / per * record;
      const uint8_t *codes = r + ((g % per) * blocks + b % blocks) * code_bytes + at;
      const uint8_t *s = r + scale_at + ((g % per) * lanes + lane) * scale_size;
      float scale;
      if (half) { uint16_t h; memcpy(&h, s, 2); scale = half_to_float(h); } else memcpy(&scale, s, 4);
      int z = zero;
      if (zeros) { z = r[zero_at + (g % per) * lanes + lane]; if (is_signed) z = (int8_t)z; }
      const uint8_t *own = (by_group ? r + zero_at : w + row / lanes * unit) + (int64_t)turn * entry * 4 * lanes + at;
      float *to = y + i * columns + b * block;
      const int64_t end = qc_min(block, columns - b * block);
      for (int64_t k = 0; k < end; k++) {
        const int slot = (int)(k / run) * (run / 4) + turn, byte = (int)(k % run);
        int code;
        if (bits == 3) {
          const uint8_t low = codes[slot / 4 * 4 * lanes + byte], high = codes[(block / 16 + slot / 8) * 4 * lanes + byte];
          code = ((low >> (2 * (slot % 4))) & 3) | (((high >> (slot % 8)) & 1) << 2);
        } else {
          code = (codes[slot / each * 4 * lanes + byte] >> (bits * (slot % each))) & mask;
        }
        if (entry > 1) {
          to[k] = (table != NULL ? table_entry@(table + code, 16, entry) : table_entry@(own + code, 4 * lanes, entry)) * scale;
          continue;
        }
        if (entry == 1) code = table[code];
        if (is_signed) code = (int8_t)code;
        to[k] = (float)(code - z) * scale;
      }
    }
  }
  return 0;
}
