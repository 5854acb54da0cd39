// Times sessions of onnxruntime-web against each other; called by web.py with a JSON of {name: {model, data, inputs}}.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";

const [plan, rounds] = [JSON.parse(readFileSync(process.argv[2], "utf-8")), Number(process.argv[3])];
ort.env.wasm.numThreads = 1;
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };
const tensor = ({ dtype, dims, value }) => {
  const data = ARRAYS[dtype].from(
    { length: dims.reduce((a, b) => a * b, 1) },
    value === null ? (_, i) => Math.sin(i) : (_, i) => (dtype === "int64" ? BigInt(value ?? 0) : value),
  );
  return new ort.Tensor(dtype, data, dims);
};
const sessions = {};
for (const [name, { model, data, inputs }] of Object.entries(plan)) {
  const externalData = data.map((path) => ({ path: path.split("/").at(-1), data: new Uint8Array(readFileSync(path)) }));
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(model)), { externalData });
  const feeds = Object.fromEntries(Object.entries(inputs).map(([key, port]) => [key, tensor(port)]));
  await session.run(feeds);
  const began = performance.now();
  await session.run(feeds);
  const runs = Math.min(100, Math.ceil(20 / (performance.now() - began))); // 20 ms, as the clock is coarse
  sessions[name] = { session, feeds, runs };
}
const times = Object.fromEntries(Object.keys(sessions).map((name) => [name, []]));
for (let round = 0; round < rounds; round++) {
  for (const [name, { session, feeds, runs }] of Object.entries(sessions)) {
    const began = process.cpuUsage();
    for (let i = 0; i < runs; i++) await session.run(feeds);
    const { user, system } = process.cpuUsage(began);
    times[name].push((user + system) / 1000 / runs);
  }
}
console.log(JSON.stringify(times));
