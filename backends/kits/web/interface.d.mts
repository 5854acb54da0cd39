/** Numbers with their shape. */
export interface Tensor<Data> {
  data: Data;
  dims: readonly number[];
}

export interface Port {
  name: string;
  dtype: string;
  shape: (number | string | null)[];
  role: string;
}

export interface Interface {
  title: string;
  task: "generate" | "embed" | "run";
  runtime: { package: string; minimum: string };
  tokenizer: boolean;
  bos: number | null;
  stop: number[];
  limit: number | null;
  pooling: string;
  normalize: boolean;
  inputs: Port[];
  outputs: Port[];
  caches: [string, string][];
}

export const INTERFACE: Interface;

export interface Inputs {
@@input_types@@
}

export interface Outputs {
@@output_types@@
}
