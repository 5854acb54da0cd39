// The page: shows progress while the model loads, then the panel that suits what the model can do.
import { INTERFACE, open, similarity } from "./model.mjs";

const $ = (id) => document.getElementById(id);
const frame = () => new Promise((resolve) => setTimeout(resolve)); // lets the page draw between two steps of the model

function mebibytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

function showProgress({ file, loaded, total }) {
  $("done").style.width = `${(100 * loaded) / total}%`;
  $("step").textContent = loaded < total ? `Reading ${file}` : "Preparing the model";
  $("amount").textContent = `${mebibytes(loaded)} of ${mebibytes(total)}`;
}

function showFacts({ manifest }) {
  const facts = [manifest.recipe, mebibytes(manifest.sizes.artifact), `qc ${manifest.qc}`].filter(Boolean);
  $("facts").replaceChildren(...facts.map((text) => element("li", text)));
}

function element(name, text, style = {}) {
  const made = Object.assign(document.createElement(name), { textContent: text });
  for (const [key, value] of Object.entries(style)) made.style.setProperty(key, value);
  return made;
}

function fail(error) {
  $("loading").hidden = true;
  $("failure").hidden = false;
  $("failure").textContent = error.message;
  document.body.dataset.state = "failed";
}

const PANELS = {
  generate(model) {
    let running = null;
    $("halt").onclick = () => running?.abort();
    document.querySelector("#generate form").onsubmit = async (event) => {
      event.preventDefault();
      running = new AbortController();
      $("go").disabled = true;
      $("halt").disabled = false;
      const prompt = $("prompt").value;
      $("text").replaceChildren(element("span", prompt));
      const options = { maxTokens: +$("tokens").value, temperature: +$("temperature").value, signal: running.signal };
      let count = 0;
      let first = 0;
      const began = performance.now();
      try {
        for await (const piece of model.generate(prompt, options)) {
          first ||= performance.now();
          count++;
          $("text").append(piece);
          $("speed").textContent = speed(count, began, first);
          await frame();
        }
      } catch (error) {
        fail(error);
      }
      $("go").disabled = false;
      $("halt").disabled = true;
      document.body.dataset.state = "done";
    };
  },

  async embed(model) {
    const known = new Map(); // vectors by sentence, so that each is computed once
    const vector = async (text) => {
      if (!known.has(text)) known.set(text, await model.embed(text));
      return known.get(text);
    };
    let latest = 0;
    const search = async () => {
      const mine = ++latest;
      const [query, lines] = [$("query").value.trim(), $("sentences").value.split("\n")];
      const sentences = lines.map((line) => line.trim()).filter(Boolean);
      if (!query) return;
      try {
        for (const sentence of sentences) {
          await vector(sentence);
          await frame();
          if (mine !== latest) return; // a newer question was asked
        }
        const began = performance.now();
        const asked = await model.embed(query);
        const took = performance.now() - began;
        const hits = sentences.map((text) => ({ text, score: similarity(asked, known.get(text)) }));
        hits.sort((a, b) => b.score - a.score);
        $("hits").replaceChildren(...hits.map(hit));
        $("pace").textContent = `${took.toFixed(1)} ms for the question; ${sentences.length} sentences compared`;
        document.body.dataset.state = "done";
      } catch (error) {
        fail(error);
      }
    };
    $("query").oninput = $("sentences").oninput = search;
    await search();
  },

  run(model) {
    const row = ({ name, dtype, shape }) => {
      const made = document.createElement("tr");
      made.append(element("td", name), element("td", dtype), element("td", shape.map((dim) => dim ?? "?").join(" × ")));
      return made;
    };
    $("ports").replaceChildren(...INTERFACE.inputs.map(row));
    $("zeros").onclick = async () => {
      const began = performance.now();
      try {
        const outputs = await model.run(Object.fromEntries(INTERFACE.inputs.map((port) => [port.name, zeros(port)])));
        const lines = Object.entries(outputs).map(([name, { dims }]) => `${name}  ${dims.join(" × ")}`);
        $("result").textContent = `${lines.join("\n")}\n${(performance.now() - began).toFixed(1)} ms`;
        document.body.dataset.state = "done";
      } catch (error) {
        fail(error);
      }
    };
  },
};

function hit({ text, score }) {
  const made = element("li", text, { "--share": String(Math.max(0, Math.min(1, score))) });
  made.append(element("b", score.toFixed(2)));
  return made;
}

function speed(count, began, first) {
  const rate = count > 1 ? ` · ${(((count - 1) * 1000) / (performance.now() - first)).toFixed(0)} pieces/s` : "";
  return `first piece after ${(first - began).toFixed(0)} ms${rate}`;
}

function zeros({ dtype, shape }) {
  const dims = shape.map((dim) => (typeof dim === "number" ? dim : 1));
  const Arrays = { float: Float32Array, double: Float64Array, int64: BigInt64Array, int32: Int32Array };
  return { data: new (Arrays[dtype] ?? Uint8Array)(dims.reduce((size, dim) => size * dim, 1)), dims };
}

try {
  const model = await open(undefined, { onProgress: showProgress });
  showFacts(model);
  $("loading").hidden = true;
  $(INTERFACE.task).hidden = false;
  document.body.dataset.state = "ready";
  await PANELS[INTERFACE.task](model);
} catch (error) {
  fail(error);
}
