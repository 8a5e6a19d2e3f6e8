// A PNG file of decoded pixels: what a browser shows, with alpha and the ICC profile.

import { crc32 } from "./container.js";

/** RGB, 3 bytes a pixel, with alpha, 1 byte a pixel, and an ICC profile, each or null. */
export async function png(width, height, rgb, alpha, icc) {
  const channels = alpha ? 4 : 3, line = 1 + width * channels, raw = new Uint8Array(height * line);
  for (let y = 0, from = 0; y < height; y++)
    for (let x = 0, to = y * line + 1; x < width; x++) {
      raw[to++] = rgb[from++];
      raw[to++] = rgb[from++];
      raw[to++] = rgb[from++];
      if (alpha) raw[to++] = alpha[y * width + x];
    }
  const head = new Uint8Array(13);
  new DataView(head.buffer).setUint32(0, width);
  new DataView(head.buffer).setUint32(4, height);
  head.set([8, alpha ? 6 : 2], 8);
  const profile = icc ? [chunk("iCCP", new Uint8Array([...ascii("ICC"), 0, 0, ...(await deflated(icc))]))] : [];
  const signature = new Uint8Array([0x89, ...ascii("PNG\r\n\x1a\n")]);
  const parts = [signature, chunk("IHDR", head), ...profile, chunk("IDAT", await deflated(raw)), chunk("IEND", new Uint8Array(0))];
  return new Blob(parts, { type: "image/png" });
}

const ascii = (text) => [...text].map((c) => c.charCodeAt(0));

async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(name, data) {
  const out = new Uint8Array(data.length + 12), view = new DataView(out.buffer);
  view.setUint32(0, data.length);
  out.set(ascii(name), 4);
  out.set(data, 8);
  view.setUint32(8 + data.length, crc32(out.subarray(4, 8 + data.length)));
  return out;
}
