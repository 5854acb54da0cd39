// Runs the launches of a compiled model on a WebGPU device. Expressions of the table become functions, so a page with a
// content security policy must allow 'unsafe-eval' for this module.

const HEADER = 64, MAGIC = 'QCTVMW1';
const FUNCTIONS = {
  qc_min: Math.min,
  qc_max: Math.max,
  qc_div: (a, b) => (b === 0 ? 0 : Math.floor(a / b)),
  qc_wide: (a, b) => (a === 1 ? b : a),
  qc_bound: (at, size) => Math.min(Math.max(at < 0 ? at + size : at, 0), size),
  qc_step: (size, stride) => (size === 1 ? 0 : stride),
  qc_scaled: (size, scale) => Math.floor(Math.fround(size * scale)),
  qc_up: (a, unit) => Math.ceil(a / unit) * unit,
};
const { STORAGE, COPY_SRC, COPY_DST, UNIFORM, MAP_READ } = globalThis.GPUBufferUsage ?? {};

/** A model on a device. */
export class Model {
  /**
   * Loads the files next to `base`.
   * @param {string|URL} base Where `launches.json` lies.
   * @param {{device?: GPUDevice, room?: number, batch?: number}} options `room`: tokens that caches hold; `batch`: texts.
   */
  static async open(base, options = {}) {
    const file = async (name) => {
      const response = await fetch(new URL(name, base));
      if (!response.ok) throw new Error(`${name} is missing (${response.status})`);
      return response;
    };
    const table = await (await file('launches.json')).json();
    const weights = await (await file('model.weights')).arrayBuffer();
    if (new TextDecoder().decode(weights.slice(0, MAGIC.length)) !== MAGIC) throw new Error('model.weights is no weights file');
    const device = options.device ?? (await requestDevice());
    const model = new Model(table, device, options);
    const modules = Object.entries(table.kernels).map(async ([name, kernel]) => {
      const code = await (await file(kernel.file)).text();
      const module = device.createShaderModule({ code });
      const wrong = (await module.getCompilationInfo()).messages.find(({ type }) => type === 'error');
      if (wrong) throw new Error(`${kernel.file}:${wrong.lineNum}: ${wrong.message}`);
      const compute = { module, entryPoint: kernel.entry };
      model.pipelines[name] = await device.createComputePipelineAsync({ layout: 'auto', compute });
    });
    await Promise.all(modules);
    model.weights = table.weights.map(({ offset, bytes }) => {
      if (HEADER + offset + bytes > weights.byteLength) throw new Error('model.weights is cut short');
      const buffer = model.buffer(bytes);
      device.queue.writeBuffer(buffer, 0, weights, HEADER + offset, bytes);
      return buffer;
    });
    return model;
  }

  constructor(table, device, { room = 256, batch = 1 }) {
    this.table = table;
    this.device = device;
    this.pipelines = {};
    this.fixed = { qc_room: room, qc_batch: batch, qc_skip: 0 };
    const names = [...Object.values(table.dimensions), ...Object.keys(this.fixed)];
    this.size = functions(names);
    this.grids = {}; // what evaluates the sizes of a kernel's grid
    this.caches = table.caches.map((bytes) => this.buffer(this.size(bytes, this.fixed)));
    this.status = this.buffer(4);
  }

  buffer(bytes, usage = STORAGE | COPY_SRC | COPY_DST) {
    return this.device.createBuffer({ size: Math.max(4, Math.ceil(bytes / 4) * 4), usage });
  }

  /**
   * Runs once.
   * @param {Record<string, number>} dimensions Sizes by the model's names for them.
   * @param {Record<string, ArrayLike<number|bigint>>} inputs Elements by name; caches are kept here.
   * @returns {Promise<Record<string, Float32Array|Int32Array>>} Elements of the outputs that are no caches, by name.
   */
  async run(dimensions, inputs) {
    const { table, device } = this, made = [];
    const sizes = { ...this.fixed };
    for (const [name, symbol] of Object.entries(table.dimensions)) {
      if (!Number.isInteger(dimensions[name])) throw new Error(`the dimension ${name} is missing`);
      sizes[symbol] = dimensions[name];
    }
    const own = (bytes, usage) => made[made.push(this.buffer(bytes, usage)) - 1];
    const places = { status: [this.status], weight: this.weights, cache: this.caches };
    places.arena = table.arena.map((bytes) => own(this.size(bytes, sizes)));
    places.output = table.outputs.map(({ bytes, cache }) => (cache ? null : own(this.size(bytes, sizes))));
    places.input = table.inputs.map(({ name, bytes, type, cache }) => {
      if (cache) return null;
      if (inputs[name] === undefined) throw new Error(`the input ${name} is missing`);
      const Kind = type === 'FLOAT' ? Float32Array : Int32Array;
      const elements = Kind.from(inputs[name], Number), size = this.size(bytes, sizes);
      if (elements.byteLength !== size) throw new Error(`${name} has ${elements.length} elements, not ${size / 4}`);
      const buffer = own(size);
      device.queue.writeBuffer(buffer, 0, elements);
      return buffer;
    });
    device.queue.writeBuffer(this.status, 0, new Int32Array(1));
    const encoder = device.createCommandEncoder();
    for (const launch of table.launches) this.encode(encoder, launch, sizes, places, own);
    const wanted = [{ name: '', buffer: this.status, type: 'INT32' }];
    table.outputs.forEach(({ name, type, cache }, i) => cache || wanted.push({ name, buffer: places.output[i], type }));
    for (const entry of wanted) {
      entry.copy = own(entry.buffer.size, MAP_READ | COPY_DST);
      encoder.copyBufferToBuffer(entry.buffer, 0, entry.copy, 0, entry.buffer.size);
    }
    device.queue.submit([encoder.finish()]);
    const found = {};
    for (const { name, copy, type } of wanted) {
      await copy.mapAsync(GPUMapMode.READ);
      const bytes = copy.getMappedRange().slice(0);
      found[name] = type === 'FLOAT' ? new Float32Array(bytes) : new Int32Array(bytes);
    }
    made.forEach((buffer) => buffer.destroy());
    if (found[''][0] !== 0) throw new Error('a token, position or index is outside of its table');
    delete found[''];
    return found;
  }

  encode(encoder, launch, sizes, places, own) {
    if (launch.when && !this.size(launch.when, sizes)) return;
    const kernel = this.table.kernels[launch.kernel], integers = {};
    for (const [name, text] of Object.entries(launch.integers)) integers[name] = this.size(text, sizes);
    const grid = (this.grids[launch.kernel] ??= functions(Object.keys(integers)));
    const blocks = kernel.grid.map((text) => grid(text, integers));
    if (blocks.some((count) => count <= 0)) return;
    const most = this.device.limits.maxComputeWorkgroupsPerDimension;
    const x = Math.min(blocks[0], most), z = Math.ceil(blocks[0] / x); // long first axes are folded into the third
    const numbers = own(4 * (kernel.integers.length + 1), UNIFORM | COPY_DST);
    this.device.queue.writeBuffer(numbers, 0, Int32Array.from([...kernel.integers.map((n) => integers[n]), blocks[0] - 1]));
    const resources = launch.buffers.map((place) => {
      const [kind, number] = place.split(':');
      return places[kind][Number(number)];
    });
    const entries = [...resources, numbers].map((buffer, binding) => ({ binding, resource: { buffer } }));
    const pipeline = this.pipelines[launch.kernel], pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, this.device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(x, blocks[1], z);
    pass.end();
  }
}

/** A function that evaluates expressions of these names, each compiled once. */
function functions(names) {
  const words = [...names, ...Object.keys(FUNCTIONS)], known = new Map();
  return (text, values) => {
    if (!known.has(text)) known.set(text, new Function(...words, `"use strict"; return Number(${text});`));
    return known.get(text)(...names.map((name) => values[name] ?? 0), ...Object.values(FUNCTIONS));
  };
}

async function requestDevice() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error('this browser offers no WebGPU device');
  const names = ['maxStorageBufferBindingSize', 'maxBufferSize', 'maxStorageBuffersPerShaderStage'];
  return adapter.requestDevice({ requiredLimits: Object.fromEntries(names.map((n) => [n, adapter.limits[n]])) });
}
