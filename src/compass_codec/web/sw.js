// The service worker: answers photo.cmps?w=640 and photo.cmps?layer=1 with a PNG. It fetches the bytes that the layer
// needs and no others, keeps them, and decodes here, away from the page, in slices: other requests wait for one at most.

import { CompassError, HEADER_READ, layerFor, payload, readHeader } from "./container.js";
import { Gpu } from "./gpu.js";
import { Decoder } from "./lean.js";
import { png } from "./png.js";

const CACHE = "compass-weights", KEPT = 256e6; // bytes of files and pixels that are kept, or those of one file
const SLICE = 40; // milliseconds
const files = new Map(), decoders = new Map();
let decoding = Promise.resolve(), gpu = null;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url), { searchParams } = url;
  const ours = url.origin === location.origin && url.pathname.toLowerCase().endsWith(".cmps");
  if (event.request.method === "GET" && ours && (searchParams.has("w") || searchParams.has("layer")))
    event.respondWith(answer(url, searchParams));
});

async function answer(url, wanted) {
  const address = url.origin + url.pathname;
  try {
    const file = files.get(address) ?? new File(address);
    files.delete(address); // and to the end: the one used last
    files.set(address, file);
    let total = 0;
    for (const [name, { bytes }] of [...files].reverse()) if ((total += bytes) > KEPT && name !== address) files.delete(name);
    const { body, layer } = await file.picture(wanted);
    return new Response(body, { headers: { "content-type": "image/png", "x-compass-layer": layer } });
  } catch (error) {
    files.delete(address); // another file may have its name meanwhile: the next request begins anew
    const known = error instanceof CompassError;
    console.error(`${url.pathname}: ${error.message}`);
    return new Response(`${error.message}\n`, { status: known ? 422 : 502, headers: { "content-type": "text/plain" } });
  }
}

class File {
  constructor(address) {
    Object.assign(this, { address, data: new Uint8Array(0), whole: false, etag: null, layers: [] });
    this.last = Promise.resolve();
  }

  get bytes() {
    return this.layers.reduce((sum, { rgb }) => sum + rgb.length, this.data.length);
  }

  /** The picture that `wanted` (w or layer) asks for: one at a time, as each builds on what the others fetched. */
  picture(wanted) {
    const next = this.last.catch(() => {}).then(() => this.decoded(wanted));
    this.last = next;
    return next;
  }

  async decoded(wanted) {
    await this.fetched(HEADER_READ);
    const header = readHeader(this.data);
    const layer = wanted.has("layer") ? Number(wanted.get("layer")) : layerFor(header, Number(wanted.get("w")));
    if (!header.layers[layer]) throw new CompassError(`no layer ${wanted.get("layer")}; the file has ${header.layers.length}`);
    const entry = header.layers[layer];
    await this.fetched(entry.end);
    const decoder = await decoderOf(header.model);
    for (let k = this.layers.length; k <= layer; k++) {
      const coded = payload(header.layers[k], this.data, `layer ${k}`);
      this.layers[k] = await inSlices(decoder.layer(coded, header.layers[k], this.layers[k - 1]));
    }
    const section = (name, of) => {
      const found = header.sections.find((s) => s.name === name && s.layer === of);
      return found ? payload(found, this.data, name) : null;
    };
    const coded = section("alpha", layer), alpha = coded && (await alphaOf(coded, entry));
    return { layer, body: await png(entry.width, entry.height, this.layers[layer].rgb, alpha, section("icc", 0)) };
  }

  /** Have the first `end` bytes of the file, or all of it. */
  async fetched(end) {
    const have = this.data.length;
    if (have >= end || this.whole) return;
    const headers = { range: `bytes=${have}-${end - 1}` };
    if (this.etag) headers["if-range"] = this.etag;
    const response = await fetch(this.address, { headers });
    if (response.status === 416) return void (this.whole = true);
    if (!response.ok) throw new CompassError(`HTTP status ${response.status}`);
    const part = new Uint8Array(await response.arrayBuffer());
    if (response.status === 206) {
      const all = new Uint8Array(have + part.length);
      all.set(this.data);
      all.set(part, have);
      this.data = all;
      this.whole = part.length < end - have;
    } else Object.assign(this, { data: part, whole: true, layers: [] }); // a server without ranges, or another file now
    this.etag = response.headers.get("etag");
  }
}

/** What a generator returns. It is given what the promises hold that it yields. One runs at a time, as all use a decoder's
    memory. */
function inSlices(steps) {
  const run = async () => {
    for (let sent; ; ) {
      for (const end = performance.now() + SLICE; performance.now() < end; ) {
        const { done, value } = steps.next(sent);
        if (done) return value;
        sent = value && (await value);
      }
      await new Promise((resolve) => setTimeout(resolve)); // some 4 ms: other requests
    }
  };
  const result = decoding.then(run);
  decoding = result.catch(() => {});
  return result;
}

/** The decoder of a set, by its identity. Its weights are fetched once and kept in Cache Storage. */
function decoderOf(identity) {
  if (!decoders.has(identity)) {
    const loading = load(identity);
    decoders.set(identity, loading);
    loading.catch(() => decoders.delete(identity));
  }
  return decoders.get(identity);
}

async function load(identity) {
  const address = new URL(`weights/${identity}.safetensors`, import.meta.url), cache = await caches.open(CACHE);
  let found = await cache.match(address);
  if (!found) {
    found = await fetch(address);
    if (!found.ok) throw new CompassError(`weights ${identity}: HTTP status ${found.status}`);
    await cache.put(address, found.clone());
  }
  const kernels = await fetch(new URL("kernels.wasm", import.meta.url));
  const decoder = await Decoder.load(await kernels.arrayBuffer(), await found.arrayBuffer());
  gpu ??= Gpu.load();
  gpu.then((ready) => ready && inSlices(decoder.accept(ready))); // until then WebAssembly does all
  return decoder;
}

/** The alpha of a layer, 1 byte a pixel, from a lossless WebP or a PNG. */
async function alphaOf(coded, { width, height }) {
  const type = coded[0] === 0x89 ? "image/png" : "image/webp";
  const picture = await createImageBitmap(new Blob([coded], { type }), { colorSpaceConversion: "none" });
  if (picture.width !== width || picture.height !== height) throw new CompassError("alpha of another size than its layer");
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, width, height), alpha = new Uint8Array(width * height);
  for (let k = 0; k < alpha.length; k++) alpha[k] = data[4 * k + 1];
  return alpha;
}
