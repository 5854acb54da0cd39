int qc_run(qc_instance *q, const int64_t *dims, const void *const *inputs, void *const *outputs) {
  if (q == NULL || dims == NULL || inputs == NULL || outputs == NULL) return QC_E_ARGUMENT;
  for (int i = 0; i < INPUTS; i++)
    if (inputs[i] == NULL && !input_is_cache[i]) return QC_E_ARGUMENT;
  for (int i = 0; i < OUTPUTS; i++)
    if (outputs[i] == NULL && !output_is_cache[i]) return QC_E_ARGUMENT;
  return checked_run(q, dims, inputs, outputs, 0);
}
