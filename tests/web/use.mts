import { open, similarity, type Inputs } from "MODULE";

const model = await open("https://example.org/model/", { onProgress: ({ loaded, total }) => console.log(loaded / total) });
const inputs: Partial<Inputs> = { input_ids: { data: BigInt64Array.of(3n), dims: [1, 1] } };
const outputs = await model.run(inputs);
const logits: Float32Array = outputs.logits.data;
for await (const piece of model.generate("Once", { maxTokens: logits.length })) console.log(piece.length);
console.log(similarity(await model.embed("a"), await model.embed("b")).toFixed(2));
// @ts-expect-error: the model has no input of that name
await model.run({ input_idz: inputs.input_ids });
// @ts-expect-error: token ids are 64-bit integers
await model.run({ input_ids: { data: new Float32Array(1), dims: [1, 1] } });
