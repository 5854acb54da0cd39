// Opens the page of an artifact in headless Chromium, uses it as a person would, and prints what it found as JSON.
//   node browse.mjs ARTIFACT SCREENSHOT CHROMIUM [TEXT]
import { spawn } from "node:child_process";
import { once } from "node:events";
import puppeteer from "puppeteer-core";

const [artifact, screenshot, executablePath, text] = process.argv.slice(2);
const server = spawn(process.execPath, [`${artifact}/web/serve.mjs`], { env: { ...process.env, PORT: "0" } });
const [line] = await once(server.stdout, "data");
const address = String(line).trim();
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
try {
  const page = await browser.newPage();
  const found = { errors: [], progress: [], foreign: [] };
  page.on("pageerror", (error) => found.errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && found.errors.push(message.text()));
  page.on("request", (request) => request.url().startsWith(new URL(address).origin) || found.foreign.push(request.url()));
  await page.setViewport({ width: 900, height: 820, deviceScaleFactor: 2 });
  await page.exposeFunction("noted", (width) => found.progress.push(width));
  await page.evaluateOnNewDocument(() => {
    addEventListener("DOMContentLoaded", () => {
      const done = document.getElementById("done");
      new MutationObserver(() => window.noted(parseFloat(done.style.width))).observe(done, { attributes: true });
    });
  });
  await page.goto(address);
  await page.waitForFunction(() => document.body.dataset.state, { timeout: 120_000 });
  found.task = await page.evaluate(async () => (await import("./interface.mjs")).INTERFACE.task);
  found.failure = await page.$eval("#failure", (element) => element.textContent);
  if (!found.failure && found.task === "generate") await page.click("#go");
  if (!found.failure && found.task === "run") await page.click("#zeros");
  await page.waitForFunction(() => ["done", "failed"].includes(document.body.dataset.state), { timeout: 120_000 });
  found.output = await page.$eval(found.task === "embed" ? "#hits" : "#text", (element) => element.innerText);
  found.result = await page.$eval("#result", (element) => element.innerText);
  await page.screenshot({ path: screenshot });
  if (text) {
    found.numbers = await page.evaluate(async (text) => {
      const { open } = await import("./model.mjs");
      const model = await open();
      if (model.interface.task === "embed") return Array.from(await model.embed(text));
      return Array.fromAsync(model.generateTokens(model.encode(text), { maxTokens: 16 }));
    }, text);
  }
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
  server.kill();
}
