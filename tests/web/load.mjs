// Opens an artifact in Node and prints what it computes for a text, or why it was refused, as JSON.
//   node load.mjs ARTIFACT TEXT [VERSION]     VERSION: pretend that the runtime is of that version
import * as ort from "onnxruntime-web";

const [artifact, text, version] = process.argv.slice(2);
const { ArtifactError, INTERFACE, open } = await import(`${artifact}/web/model.mjs`);
const progress = [];
const runtime = version ? { ...ort, env: { ...ort.env, versions: { web: version } } } : ort;
try {
  const model = await open(artifact, { ort: runtime, onProgress: ({ loaded, total }) => progress.push(loaded / total) });
  const found = { progress };
  if (INTERFACE.task === "embed") {
    found.vector = Array.from(await model.embed(text));
  } else {
    found.prompt = model.encode(text);
    found.again = model.decode(found.prompt);
    found.tokens = [];
    for await (const token of model.generateTokens(found.prompt, { maxTokens: 12 })) found.tokens.push(token);
    found.text = "";
    for await (const piece of model.generate(text, { maxTokens: 12 })) found.text += piece;
  }
  console.log(JSON.stringify(found));
} catch (error) {
  if (!(error instanceof ArtifactError)) throw error;
  console.log(JSON.stringify({ file: error.file, message: error.message }));
}
