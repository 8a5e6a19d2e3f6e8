// The header of a .cmps file and the bytes of its layers; docs/format.md describes every byte. No networks here.

export const HEADER_READ = 544; // bytes of the longest header
const MAX_PIXELS = 178956970, MAX_SIDE = 2 ** 21 - 1, MAX_LAYERS = 16;
// Kinds of sections: field, most bytes, and what comes before what: -1 before layer 0, 0 behind its layer, 1 behind all.
const KINDS = {
  1: { name: "icc", most: 2 ** 24 - 1, place: -1 },
  2: { name: "exif", most: 2 ** 24 - 1, place: 1 },
  3: { name: "xmp", most: 2 ** 24 - 1, place: 1 },
  4: { name: "alpha", most: 2 ** 28 - 1, place: 0 },
};

/** What is wrong with a file, in one line. */
export class CompassError extends Error {
  name = "CompassError";
}

const CRC = new Uint32Array(256).map((_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** CRC-32 of zlib and PNG. */
export function crc32(bytes) {
  let crc = -1;
  for (let i = 0; i < bytes.length; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }
  take(count) {
    if (this.at + count > this.data.length) throw new CompassError("cut off inside the header");
    return this.data.subarray(this.at, (this.at += count));
  }
  byte() {
    return this.take(1)[0];
  }
  uint32() {
    const [a, b, c, d] = this.take(4);
    return (a | (b << 8) | (c << 16) | (d << 24)) >>> 0;
  }
  varint(name, low, high) {
    let value = 0, shift = 0, byte;
    do {
      byte = this.byte();
      value += (byte & 127) * 2 ** shift;
      shift += 7;
      if (byte > 127 && shift > 28) throw new CompassError(`the header's ${name} is out of range`);
    } while (byte > 127);
    if ((byte === 0 && shift > 7) || value < low || value > high)
      throw new CompassError(`the header's ${name} is out of range`);
    return value;
  }
}

/** The header of a file, of which `data` (Uint8Array) is the first part: model (hex), length, and its layers and sections
    with start, length, checksum; a layer's `end` is the length of the shortest file that holds it and its alpha. */
export function readHeader(data) {
  const reader = new Reader(data);
  if (String.fromCharCode(...reader.take(4)) !== "CMPS") throw new CompassError("not a .cmps file");
  const version = reader.byte(), flags = reader.byte();
  if (version !== 2) throw new CompassError(`format version ${version}; this program reads version 2`);
  if (flags & ~1) throw new CompassError("the file uses features that this program does not know");
  const model = [...reader.take(6)].map((b) => b.toString(16).padStart(2, "0")).join("");
  const count = reader.byte();
  if (count < 1 || count > MAX_LAYERS) throw new CompassError(`the header claims ${count} layers`);
  const layers = [];
  for (let k = 0; k < count; k++) {
    const width = reader.varint("width", 1, MAX_SIDE), height = reader.varint("height", 1, MAX_SIDE);
    const digits = reader.varint("scale factor", 1, 99999999), exponent = (reader.byte() << 24) >> 24;
    if (exponent < -16 || exponent > 6) throw new CompassError("the header's scale factor is out of range");
    const quality = reader.varint("quality", 100, 10000) / 100;
    const length = reader.varint("layer length", 1, 2 ** 28 - 1), checksum = reader.uint32();
    layers.push({ width, height, scale: Number(`${digits}e${exponent}`), quality, length, checksum });
  }
  const sections = flags & 1 ? readTable(reader, count) : [];
  const head = data.subarray(0, reader.at);
  if (reader.uint32() !== crc32(head)) throw new CompassError("the header is damaged (its checksum does not match)");
  layers.forEach((layer, k) => {
    const below = layers[k - 1];
    if (below && (layer.width < below.width || layer.height < below.height || layer.scale < below.scale))
      throw new CompassError("the header's layers get smaller");
    if (layer.width * layer.height > MAX_PIXELS) throw new CompassError(`a layer of ${layer.width} x ${layer.height}`);
  });
  let at = reader.at;
  const put = (parts) => parts.forEach((part) => ((part.start = at), (at += part.length)));
  put(sections.filter((s) => s.place < 0));
  layers.forEach((layer, k) => {
    put([layer, ...sections.filter((s) => s.place === 0 && s.layer === k)]);
    layer.end = at;
  });
  put(sections.filter((s) => s.place > 0));
  return { model, layers, sections, length: reader.at };
}

function readTable(reader, layers) {
  const count = reader.byte(), table = [];
  if (!count) throw new CompassError("the header's table of sections is empty");
  const order = (s) => (s.place ? s.place * (MAX_LAYERS + 1) : s.layer) * 8 + s.kind;
  for (let k = 0; k < count; k++) {
    const kind = reader.byte(), layer = reader.byte(), known = KINDS[kind];
    if (!known) throw new CompassError(`the header names a section of kind ${kind}, which this program does not know`);
    if (layer >= (known.place ? 1 : layers)) throw new CompassError(`the header names ${known.name} of layer ${layer}`);
    const entry = { kind, layer, name: known.name, place: known.place };
    if (k && order(entry) <= order(table[k - 1]))
      throw new CompassError("the header's sections are repeated or out of order");
    entry.length = reader.varint(`length of ${known.name}`, 1, known.most);
    entry.checksum = reader.uint32();
    table.push(entry);
  }
  return table;
}

/** The bytes of a layer or section, checked; `what` names it. */
export function payload(entry, data, what) {
  const part = data.subarray(entry.start, entry.start + entry.length);
  if (part.length < entry.length)
    throw new CompassError(`cut off after ${data.length} bytes; ${what} ends at ${entry.start + entry.length}`);
  if (crc32(part) !== entry.checksum) throw new CompassError(`${what} is damaged (its checksum does not match)`);
  return part;
}

/** The smallest layer that is at least so wide, or the largest there is. */
export function layerFor(header, width) {
  const found = header.layers.findIndex((layer) => layer.width >= width);
  return found < 0 ? header.layers.length - 1 : found;
}
