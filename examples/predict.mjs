// Classify image files with a DVERGE service, all in one request: node predict.mjs IMAGE...
// DVERGE_URL is the service's address (http://localhost:3000), DVERGE_TOKEN its token.
// Needs only Node 18 or newer; predict() also works in browsers, unchanged.
import { readFile } from "node:fs/promises";

const ATTEMPTS = 5;

/** Return the predictions for some Blobs or Files, in their order; waits while the service is full. */
export async function predict(url, images, token) {
  const body = new FormData();
  for (const image of images) body.append("images", image);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let attempt = 1; ; attempt++) {
    const signal = AbortSignal.timeout(60_000);
    const response = await fetch(`${url}/predict`, { method: "POST", headers, body, signal });
    if (response.ok) return (await response.json()).predictions;
    if (response.status !== 503 || attempt === ATTEMPTS) {
      const isJson = response.headers.get("content-type")?.startsWith("application/json");
      if (!isJson) throw new Error(`${response.status} ${response.statusText}`); // a proxy's own page
      const { error } = await response.json();
      throw new Error(`${error.code}: ${error.message}`);
    }
    const seconds = Number(response.headers.get("retry-after") ?? 1);
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

const { DVERGE_URL = "http://localhost:3000", DVERGE_TOKEN } = process.env;
const paths = process.argv.slice(2);
try {
  const images = await Promise.all(paths.map(async (path) => new Blob([await readFile(path)])));
  const found = await predict(DVERGE_URL, images, DVERGE_TOKEN);
  found.forEach(({ label, probability, suspicious }, at) => {
    const notes = [probability?.toFixed(3), suspicious && "suspicious"].filter(Boolean);
    console.log([paths[at], label, ...notes].join("\t"));
  });
} catch (error) {
  console.error(error.cause?.message ?? error.message);
  process.exitCode = 1;
}
