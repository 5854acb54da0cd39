// What differs between models; written by qc. Everything else in this folder is the same for every model.
export const INTERFACE = @@facts@@;
