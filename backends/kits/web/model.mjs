// Loads the artifact and runs it, in a browser and in Node. Types and their meaning: model.d.mts.
import { INTERFACE } from "./interface.mjs";

export { INTERFACE };

const FORMAT_VERSION = 1;
const TOKENIZER = ["tokenizer.json", "tokenizer_config.json"];

export class ArtifactError extends Error {
  constructor(file, message) {
    super(`${file}: ${message}`);
    this.name = "ArtifactError";
    this.file = file;
  }
}

export async function open(directory = new URL("../", import.meta.url), options = {}) {
  const { onProgress = () => {}, session = {}, signal } = options;
  const ort = options.ort ?? (await import("onnxruntime-web"));
  const base = directoryUrl(directory);
  const manifest = parse("manifest.json", await read(base, "manifest.json", signal));
  if (manifest.format_version !== FORMAT_VERSION) {
    throw new ArtifactError("manifest.json", `expected format version ${FORMAT_VERSION}, found ${manifest.format_version}`);
  }
  checkRuntime(ort, manifest.runtime);
  const files = await readFiles(base, manifest, { onProgress, signal });
  const tokenizer = await loadTokenizer(files);
  const weights = Object.keys(files).filter((name) => name.startsWith("model") && name !== "model.onnx");
  const externalData = weights.map((path) => ({ path, data: files[path] }));
  const opened = await ort.InferenceSession.create(files["model.onnx"], { ...session, externalData });
  return new Model(ort, opened, tokenizer, manifest);
}

export function similarity(a, b) {
  return a.reduce((sum, x, i) => sum + x * b[i], 0);
}

export class Model {
  #ort;
  #session;
  #tokenizer;

  constructor(ort, session, tokenizer, manifest) {
    this.#ort = ort;
    this.#session = session;
    this.#tokenizer = tokenizer;
    this.manifest = manifest;
    this.interface = INTERFACE;
  }

  async run(inputs) {
    const feeds = {};
    for (const { name, dtype, shape } of INTERFACE.inputs) {
      const given = inputs[name];
      if (given === undefined) throw new TypeError(`${name}: expected ${dtype} [${shape}], found nothing`);
      feeds[name] = new this.#ort.Tensor(TENSOR_TYPES[dtype] ?? dtype, given.data, given.dims);
    }
    return this.#session.run(feeds);
  }

  encode(text) {
    const tokens = this.#needTokenizer().encode(text, { add_special_tokens: false }).ids;
    return INTERFACE.bos === null ? tokens : [INTERFACE.bos, ...tokens];
  }

  decode(tokens) {
    const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
    return tokens.length ? this.#needTokenizer().decode([...tokens], options) : "";
  }

  async *generate(prompt, options = {}) {
    // A token's text depends on its neighbours, so new is what the last piece with the token has more than without it.
    const held = [];
    let start = 0;
    let shown = 0;
    for await (const token of this.generateTokens(this.encode(prompt), options)) {
      held.push(token);
      const before = this.decode(held.slice(start, shown));
      const after = this.decode(held.slice(start));
      if (after.length > before.length && !after.endsWith("\ufffd")) {
        yield after.slice(before.length);
        start = shown;
        shown = held.length;
      }
    }
    const rest = this.decode(held.slice(start)).slice(this.decode(held.slice(start, shown)).length);
    if (rest) yield rest;
  }

  async *generateTokens(tokens, { maxTokens = 64, temperature = 0, signal } = {}) {
    this.#need("generate");
    const limit = INTERFACE.limit ?? Infinity;
    if (tokens.length === 0 || tokens.length >= limit) {
      throw new RangeError(`expected a prompt of 1 to ${limit - 1} tokens, found ${tokens.length}`);
    }
    const { name } = INTERFACE.outputs.find((port) => port.role === "logits");
    let caches = {};
    let fresh = [...tokens];
    let past = 0;
    for (let count = Math.min(maxTokens, limit - tokens.length); count > 0 && !signal?.aborted; count--) {
      const outputs = await this.run({ ...textInputs(fresh, past), ...caches });
      const token = pick(outputs[name], temperature);
      if (INTERFACE.stop.includes(token)) return;
      yield token;
      if (INTERFACE.caches.length) {
        caches = Object.fromEntries(INTERFACE.caches.map(([before, after]) => [before, outputs[after]]));
        past += fresh.length;
        fresh = [token];
      } else {
        fresh.push(token);
      }
    }
  }

  async embed(text) {
    this.#need("embed");
    let tokens = this.#needTokenizer().encode(text).ids;
    if (INTERFACE.limit !== null && tokens.length > INTERFACE.limit) {
      tokens = [...tokens.slice(0, INTERFACE.limit - 1), tokens.at(-1)];
    }
    const outputs = await this.run(textInputs(tokens, 0));
    const found = INTERFACE.outputs.find((port) => port.role === "embedding");
    if (found) return outputs[found.name].data;
    const { data, dims } = outputs[INTERFACE.outputs.find((port) => port.role === "hidden").name];
    return pool(data, tokens.length, dims.at(-1));
  }

  async close() {
    await this.#session.release();
  }

  #need(task) {
    if (INTERFACE.task !== task) throw new TypeError(`this model cannot ${task}; it can ${INTERFACE.task}`);
  }

  #needTokenizer() {
    if (this.#tokenizer) return this.#tokenizer;
    throw new ArtifactError("tokenizer.json", "the model was compiled without one, so it takes token ids, not text");
  }
}

const TENSOR_TYPES = { float: "float32", double: "float64" };
const ARRAYS = { int64: BigInt64Array, int32: Int32Array, float: Float32Array, float16: Uint16Array };

function textInputs(tokens, past) {
  const inputs = {};
  for (const { name, dtype, shape, role } of INTERFACE.inputs) {
    if (role.startsWith("past_")) {
      // Of the symbolic axes of a cache the first is the batch, the others time.
      const dims = shape.map((dim, axis) => (typeof dim === "number" ? dim : axis === 0 ? 1 : 0));
      if (past === 0) inputs[name] = { data: new ARRAYS[dtype](0), dims };
      continue;
    }
    const numbers = {
      tokens: () => tokens,
      mask: () => Array(past + tokens.length).fill(1),
      positions: () => tokens.map((_, i) => past + i),
      token_types: () => tokens.map(() => 0),
    }[role]();
    const data = ARRAYS[dtype].from(numbers, dtype === "int64" ? BigInt : Number);
    inputs[name] = { data, dims: shape.length === 1 ? [data.length] : [1, data.length] };
  }
  return inputs;
}

function pick({ data, dims }, temperature) {
  const last = data.subarray(data.length - dims.at(-1));
  const best = last.reduce((found, x, i) => (x > last[found] ? i : found), 0);
  if (temperature <= 0) return best;
  const weights = Array.from(last, (x) => Math.exp((x - last[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, x) => sum + x, 0);
  const drawn = weights.findIndex((x) => (left -= x) < 0);
  return drawn < 0 ? best : drawn;
}

const POOLINGS = {
  mean: (rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length),
  max: (rows) => rows[0].map((_, i) => rows.reduce((most, row) => Math.max(most, row[i]), -Infinity)),
  cls: (rows) => rows[0],
  lasttoken: (rows) => rows.at(-1),
};

function pool(data, length, width) {
  const rows = Array.from({ length }, (_, i) => Float64Array.from(data.subarray(i * width, (i + 1) * width)));
  const vector = POOLINGS[INTERFACE.pooling](rows);
  const size = INTERFACE.normalize ? Math.max(Math.hypot(...vector), 1e-12) : 1;
  return Float32Array.from(vector, (x) => x / size);
}

function checkRuntime({ env }, { package: name, minimum }) {
  const found = env.versions.web ?? env.versions.node ?? env.versions.common;
  const numbers = (version) => version.split(/[.-]/).map(Number);
  const [have, need] = [numbers(found), numbers(minimum)];
  const at = need.findIndex((n, i) => n !== (have[i] ?? 0));
  if (at >= 0 && !((have[at] ?? 0) > need[at])) {
    throw new ArtifactError("manifest.json", `the model needs ${name} ${minimum} or later, found ${found}`);
  }
}

async function loadTokenizer(files) {
  if (!files["tokenizer.json"]) return null;
  const { Tokenizer } = await import("@huggingface/tokenizers");
  const [tokenizer, config] = TOKENIZER.map((name) => (files[name] ? parse(name, files[name]) : {}));
  return new Tokenizer({ ...tokenizer, truncation: null, padding: null }, config);
}

async function readFiles(base, manifest, { onProgress, signal }) {
  const wanted = Object.keys(manifest.files).filter((n) => /^model[^/]*\.onnx(\.data)?$/.test(n) || TOKENIZER.includes(n));
  if (INTERFACE.tokenizer && !wanted.includes("tokenizer.json")) {
    throw new ArtifactError("tokenizer.json", "missing in the manifest; compile the model again");
  }
  const total = wanted.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  const files = {};
  let done = 0;
  for (const file of wanted) {
    const { bytes, sha256 } = manifest.files[file];
    files[file] = await read(base, file, signal, (loaded) => onProgress({ file, loaded: done + loaded, total }));
    if (files[file].length !== bytes) throw new ArtifactError(file, `expected ${bytes} bytes, found ${files[file].length}`);
    if ((await digest(file, files[file])) !== sha256) {
      throw new ArtifactError(file, "content differs from the manifest's SHA-256; copy it again from its origin");
    }
    done += bytes;
    onProgress({ file, loaded: done, total });
  }
  return files;
}

async function digest(file, bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) throw new ArtifactError(file, "cannot be checked: the page must come over https or from localhost");
  const sum = new Uint8Array(await subtle.digest("SHA-256", bytes));
  return Array.from(sum, (x) => x.toString(16).padStart(2, "0")).join("");
}

function parse(file, bytes) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new ArtifactError(file, `not readable JSON (${error.message})`);
  }
}

function directoryUrl(directory) {
  const text = String(directory);
  return new URL(text.endsWith("/") ? text : `${text}/`, globalThis.document?.baseURI ?? `file://${globalThis.process?.cwd()}/`);
}

async function read(base, file, signal, onChunk = () => {}) {
  const url = new URL(file, base);
  if (url.protocol === "file:") return readLocal(url, file, onChunk);
  const response = await fetch(url, { signal }).catch((error) => {
    if (signal?.aborted) throw error;
    throw new ArtifactError(file, `cannot be read from ${url} (${error.message})`);
  });
  if (!response.ok) throw new ArtifactError(file, `missing at ${url} (HTTP ${response.status})`);
  const parts = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    loaded += part.value.length;
    onChunk(loaded);
  }
  const bytes = new Uint8Array(loaded);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

async function readLocal(url, file, onChunk) {
  const { readFile } = await import(/* @vite-ignore */ "node:fs/promises");
  const buffer = await readFile(url).catch((error) => {
    throw new ArtifactError(file, `missing at ${url.pathname} (${error.code})`);
  });
  onChunk(buffer.length);
  return new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.length);
}
