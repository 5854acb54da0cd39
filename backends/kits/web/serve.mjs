// Serves the artifact on this machine: `npm start`, then open the address it prints.
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../", import.meta.url));
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
// A page that is isolated from others may use several threads.
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

const server = createServer(async (request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  const file = join(ROOT, path.endsWith("/") ? `${path}index.html` : path);
  const found = await stat(file).catch(() => null);
  if (path === "/") {
    response.writeHead(302, { Location: "/web/" }).end();
  } else if (!file.startsWith(ROOT) || !found?.isFile()) {
    response.writeHead(404).end("not found");
  } else {
    const headers = { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream", "Content-Length": found.size };
    response.writeHead(200, { ...headers, ...ISOLATED });
    createReadStream(file).pipe(response);
  }
});

server.listen(Number(process.env.PORT ?? 8000), "127.0.0.1", () => {
  console.log(`http://localhost:${server.address().port}/web/`);
});
