/* From [batch, places, channels] to [batch, all, places], the channels behind others; 16 places at a time stay near. */
static void turn(const float *x, float *y, int64_t batch, int64_t places, int64_t channels, int64_t all, int64_t first) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t start = 0; start < places; start += 16)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t p = start; p < qc_min(start + 16, places); p++)
          y[(b * all + first + c) * places + p] = x[(b * places + p) * channels + c];
}
