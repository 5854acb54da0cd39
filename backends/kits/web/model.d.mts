import type { Inputs, Interface, Outputs } from "./interface.mjs";

export type { Inputs, Interface, Outputs, Port, Tensor } from "./interface.mjs";
export { INTERFACE } from "./interface.mjs";

/** A file of the artifact cannot be used; the message starts with its name. */
export class ArtifactError extends Error {
  readonly file: string;
  constructor(file: string, message: string);
}

export interface Progress {
  /** The file being read. */
  file: string;
  /** Bytes read so far, of all files. */
  loaded: number;
  /** Bytes of all files. */
  total: number;
}

export interface OpenOptions {
  /** The runtime: a module of onnxruntime-web or onnxruntime-node; "onnxruntime-web" if absent. */
  ort?: any;
  /** Called while files are read. */
  onProgress?: (progress: Progress) => void;
  /** Options of the session, see `InferenceSession.SessionOptions`. */
  session?: object;
  /** Stops reading. */
  signal?: AbortSignal;
}

export interface GenerateOptions {
  /** Largest number of tokens; 64 if absent. */
  maxTokens?: number;
  /** 0 (if absent) always takes the most probable token; larger values draw, 1 as the model says. */
  temperature?: number;
  /** Stops after the token being computed. */
  signal?: AbortSignal;
}

export class Model {
  /** The artifact's manifest. */
  readonly manifest: any;
  readonly interface: Interface;
  /** Runs once. */
  run(inputs: Partial<Inputs>): Promise<Outputs>;
  /** Token ids of a text, as an input of a decoder. */
  encode(text: string): number[];
  /** Text of token ids; special tokens are left out. */
  decode(tokens: readonly number[]): string;
  /** Yields a continuation of the text piece by piece. */
  generate(prompt: string, options?: GenerateOptions): AsyncGenerator<string, void, void>;
  /** Yields the tokens of a continuation. */
  generateTokens(tokens: readonly number[], options?: GenerateOptions): AsyncGenerator<number, void, void>;
  /** The vector of a text. Vectors of length one are as alike as their `similarity` is large. */
  embed(text: string): Promise<Float32Array>;
  /** Frees the memory. */
  close(): Promise<void>;
}

/**
 * Reads an artifact, checks the runtime's version and every file against the manifest, and loads it.
 *
 * @param directory Where the artifact is; the folder above this module if absent.
 */
export function open(directory?: string | URL, options?: OpenOptions): Promise<Model>;

/** The product of two vectors. */
export function similarity(a: Float32Array, b: Float32Array): number;
