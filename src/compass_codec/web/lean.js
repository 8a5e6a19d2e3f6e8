// The decoder of the backbone "lean": bytes of a layer to its pixels, as docs/format.md says. What leads to symbols is
// integers in float32, so that they are those of the encoder; the rest is float32.
//
// Arrays live in WebAssembly's memory, channels last, and are named by their address. What a layer needs is put behind
// the weights and given up when it is done. Transforms and LIFF may run on another engine than Kernels: gpu.js.
//
// Decoding is a generator, which yields every few milliseconds: one thread can answer other requests in between. Where it
// yields a promise, it goes on with what that promises. Loops over numbers are in plain functions: Firefox runs them slowly in
// generators.

import { CompassError } from "./container.js";

const ACTIVATION = 511, EXACT = 2 ** 24, LEVELS = 64, SKIPPED = 3, STEPS = 4, SYMBOL_LIMIT = 2 ** 20;
const FINE = 16, MEAN_UNIT = 64, MEAN_LIMIT = 2 ** 15 - 1, CELL = 16, UNSHUFFLE = 8;
export const AXIS = 9; // numbers of a place along an axis before its functions
export const EPSILON = 1e-6; // of normalisation
const PIECE = 1024; // places between two steps
const PHASES = [[0, 0], [1, 1], [0, 1], [1, 0]];
const LAMBDAS = [0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18];
const half = (n) => (n + 1) >> 1;
const silu = (x) => x / (1 + Math.exp(-x));
/** Parts of n, as [first, count]. */
const pieces = (n, size = PIECE) => Array.from({ length: Math.ceil(n / size) }, (_, k) => [k * size, Math.min(size, n - k * size)]);

/** The kernels, and the memory that they work in: `take` places an array, `mark` and `release` give up what came after.
    Gpu (gpu.js) has the same methods, as far as transforms and LIFF use them. */
export class Kernels {
  static async load(wasm) {
    const memory = new WebAssembly.Memory({ initial: 1, maximum: 65536 });
    const { instance } = await WebAssembly.instantiate(wasm, { env: { memory, abort: () => {} } });
    return new Kernels(memory, instance.exports);
  }
  constructor(memory, run) {
    this.memory = memory;
    this.run = run;
    this.top = (run.base.value + 15) & ~15;
    this.view();
  }
  view() {
    this.f32 = new Float32Array(this.memory.buffer);
    this.i32 = new Int32Array(this.memory.buffer);
    this.u8 = new Uint8Array(this.memory.buffer);
  }
  /** The address of so many numbers of 4 bytes. */
  take(count) {
    const at = this.top;
    this.top = Math.ceil((at + 4 * count) / 16) * 16;
    const lacking = this.top - this.memory.buffer.byteLength;
    if (lacking > 0) {
      try {
        this.memory.grow(Math.ceil(Math.max(lacking, this.memory.buffer.byteLength / 4) / 65536));
      } catch {
        throw new CompassError("the picture takes more memory than there is");
      }
      this.view();
    }
    return at;
  }
  put(numbers) {
    const at = this.take(numbers.length);
    (numbers instanceof Float32Array ? this.f32 : this.i32).set(numbers, at / 4);
    return at;
  }
  zeros(count) {
    const at = this.take(count);
    this.f32.fill(0, at / 4, at / 4 + count);
    return at;
  }
  mark() {
    return this.top;
  }
  release(top) {
    this.top = top;
  }
  /** Weights [m, k], row by row, and a bias [m] (or none), as `multiply` takes them. Columns are filled up to 8. */
  matrix(weight, bias, m, k) {
    const columns = Math.ceil(m / 8) * 8, panels = new Float32Array(columns * k), shifts = new Float32Array(columns);
    for (let j = 0; j < m; j++)
      for (let x = 0; x < k; x++) panels[((j >> 3) * k + x) * 8 + (j & 7)] = weight[j * k + x];
    if (bias) shifts.set(bias);
    return { panels: this.put(panels), bias: this.put(shifts), m: columns, k };
  }
  /** A depthwise convolution of x [rows, columns, c], in steps. */
  *depthwise(x, taps, bias, rows, columns, c) {
    const out = this.take(rows * columns * c);
    for (const [at, count] of pieces(rows, Math.ceil(PIECE / columns))) {
      this.run.depthwise(x, taps, bias, out, rows, columns, c, at, at + count);
      yield;
    }
    return out;
  }
  /** x [n, k] times a matrix, [n, m], in steps: a new array, or what is added to `onto`. */
  *multiply(x, n, { panels, bias, k, m }, onto) {
    const out = onto ?? this.take(n * m);
    for (const [at, count] of pieces(n)) {
      this.run.multiply(x + 4 * at * k, panels, bias, out + 4 * at * m, count, k, m, onto !== undefined);
      yield;
    }
    return out;
  }
  /** Adds to x [rows, columns, c], in place: a depthwise convolution, and two matrices with a gate or ReLU between. A gate has
      a normalisation before it. */
  *block(x, rows, columns, { taps, bias, p1, p2, gated }) {
    const { run } = this, n = rows * columns, c = p2.m, mark = this.mark();
    const h = yield* this.depthwise(x, taps, bias, rows, columns, c), wide = this.take(Math.min(n, PIECE) * p1.m);
    for (const [at, count] of pieces(n)) {
      const part = h + 4 * at * c;
      if (gated) run.normalise(part, count, c, EPSILON);
      run.multiply(part, p1.panels, p1.bias, wide, count, c, p1.m, false);
      if (gated) run.gate(wide, part, count, c);
      else run.relu(wide, count * p1.m);
      yield* this.multiply(gated ? part : wide, count, p2, x + 4 * at * c);
    }
    this.release(mark);
  }
  /** Numbers of x: [rows, columns, size], where number e of place i, j is x[down[i, e] + across[j, e]]. */
  *gather(x, down, across, size) {
    const rows = down.length / size, line = across.length, out = this.take(rows * line), values = this.f32;
    yield* each(rows, (i) => {
      for (let k = 0, to = out / 4 + i * line; k < line; )
        for (let e = 0; e < size; e++, k++) values[to++] = values[x / 4 + down[i * size + e] + across[k]];
    });
    return out;
  }
  /** The first `count` numbers of x. */
  *numbers(x, count) {
    return this.f32.subarray(x / 4, x / 4 + count);
  }
  /** To `out` the prediction of a layer, [height, width, 3], from the one below, low [h, w, 3], and LIFF's features. `down` and
      `across` are tables as `axis` makes them, n the number of functions. */
  *sample(low, w, features, stride, down, across, n, out) {
    const size = AXIS + n, height = down.length / size, width = across.length / size, wide = half(w);
    const f = this.f32, product = new Float32Array(w * 3 * n);
    const widened = new Map(); // rows of the lower layer
    const line = (y) => {
      if (!widened.has(y)) {
        const row = new Float32Array(width * 3);
        for (let x = 0, at = 0; x < width; x++, at += size)
          for (let k = 0; k < 4; k++) {
            const from = low / 4 + (y * w + across[at + 1 + k]) * 3, weight = across[at + 5 + k];
            for (let c = 0; c < 3; c++) row[3 * x + c] += weight * f[from + c];
          }
        widened.set(y, row);
      }
      return widened.get(y);
    };
    yield* each(height, (y) => {
      const own = down.subarray(y * size, (y + 1) * size), row = own[0], to = out / 4 + y * width * 3;
      for (const old of widened.keys()) if (old < own[1]) widened.delete(old);
      const [p, q, r, s] = [1, 2, 3, 4].map((k) => line(own[k])), [a, b, c, d] = own.subarray(5, 9);
      for (let x = 0; x < 3 * width; x++) f[to + x] = a * p[x] + b * q[x] + c * r[x] + d * s[x];
      for (let x = 0; x < w; x++) {
        let from = features / 4 + ((row >> 1) * wide + (x >> 1)) * stride + ((row & 1) * 2 + (x & 1)) * 3 * n;
        for (let c = 0, at = x * 3 * n; c < 3; c++) for (let k = 0; k < n; k++) product[at++] = f[from++] * own[AXIS + k];
      }
      for (let x = 0; x < width; x++)
        for (let c = 0, at = across[x * size] * 3 * n; c < 3; c++) {
          let sum = 0;
          for (let k = 0; k < n; k++) sum += product[at++] * across[x * size + AXIS + k];
          f[to + 3 * x + c] += sum;
        }
    });
  }
}

/** Tensors of a safetensors file, as Float32Array or Int32Array, each made once it is asked for. */
export class Tensors {
  constructor(buffer, prefix = "", header, start) {
    const view = new DataView(buffer);
    this.start = start ?? 8 + Number(view.getBigUint64(0, true));
    this.header = header ?? JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, this.start - 8)));
    this.buffer = buffer;
    this.prefix = prefix;
  }
  part(name) {
    return new Tensors(this.buffer, `${this.prefix}${name}.`, this.header, this.start);
  }
  shape(name) {
    return this.entry(name).shape;
  }
  has(name) {
    return `${this.prefix}${name}` in this.header;
  }
  entry(name) {
    const entry = this.header[this.prefix + name];
    if (!entry) throw new CompassError(`the weights have no ${this.prefix}${name}`);
    return entry;
  }
  get(name) {
    const { dtype, data_offsets: [from, to] } = this.entry(name);
    const bytes = this.buffer.slice(this.start + from, this.start + to);
    if (dtype === "F32") return new Float32Array(bytes);
    if (dtype === "I32") return new Int32Array(bytes);
    if (dtype === "I8") return Float32Array.from(new Int8Array(bytes));
    if (dtype === "F16") {
      const halves = new Uint16Array(bytes), out = new Float32Array(halves.length);
      for (let k = 0; k < out.length; k++) out[k] = HALVES[halves[k]];
      return out;
    }
    throw new CompassError(`weights of type ${dtype}`);
  }
}

/** All finite numbers of 16 bits. */
const HALVES = new Float32Array(2 ** 16).map((_, bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return (bits & 0x8000 ? -1 : 1) * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
});

/** Calls `part` with 0 to n - 1, in steps. */
function* each(n, part) {
  for (let i = 0; i < n; i++) {
    part(i);
    yield;
  }
}

/** Depthwise weights [c, 1, 3, 3] as [3, 3, c]. */
function taps(weight, c) {
  const out = new Float32Array(9 * c);
  for (let i = 0; i < c; i++) for (let k = 0; k < 9; k++) out[k * c + i] = weight[i * 9 + k];
  return out;
}

/** Gains of a table [levels, c] of logarithms at a real level. */
function gains(table, level) {
  const c = table.length / LAMBDAS.length, i = Math.min(Math.floor(level), LAMBDAS.length - 2), t = level - i;
  return Float32Array.from({ length: c }, (_, k) => Math.exp((1 - t) * table[i * c + k] + t * table[(i + 1) * c + k]));
}

function levelOf(quality) {
  const t = (quality - 1) / 99, x = Math.log(LAMBDAS[0]) + 1.417 * t + 3.188 * t * t;
  const knots = LAMBDAS.map(Math.log);
  const i = knots.slice(1, -1).filter((knot) => knot < x).length;
  return i + (x - knots[i]) / (knots[i + 1] - knots[i]);
}

/** A 1x1 or depthwise convolution of integers: floor((sum + bias) scale), kept between two bounds. */
class IntegerConv {
  constructor(kernels, tensors, name, low = -EXACT, high = EXACT) {
    const weight = tensors.get(`${name}.weight`), [m, k] = tensors.shape(`${name}.weight`);
    const bias = Float32Array.from(tensors.get(`${name}.bias`));
    Object.assign(this, { kernels, m, low, high, scale: kernels.put(tensors.get(`${name}.scale`)) });
    if (tensors.shape(`${name}.weight`)[3] === 3) this.taps = kernels.put(taps(weight, m)), (this.bias = kernels.put(bias));
    else this.matrix = kernels.matrix(weight, bias, m, k);
  }
  /** x [n, k] to [n, m], or [rows, columns, m] to the same. */
  *apply(x, n, columns) {
    const { kernels, m } = this;
    const out = this.matrix
      ? yield* kernels.multiply(x, n, this.matrix)
      : yield* kernels.depthwise(x, this.taps, this.bias, n / columns, columns, m);
    kernels.run.requantise(out, this.scale, n, m, this.low, this.high);
    return out;
  }
}

class IntegerBlock {
  constructor(kernels, tensors, name) {
    this.kernels = kernels;
    this.dw = new IntegerConv(kernels, tensors, `${name}.dw`, -ACTIVATION, ACTIVATION);
    this.p1 = new IntegerConv(kernels, tensors, `${name}.p1`, 0, ACTIVATION);
    this.p2 = new IntegerConv(kernels, tensors, `${name}.p2`);
  }
  /** Adds to x [n, c], in place. */
  *apply(x, n, columns) {
    const mark = this.kernels.mark();
    const more = yield* this.p2.apply(yield* this.p1.apply(yield* this.dw.apply(x, n, columns), n), n);
    this.kernels.run.add(x, more, n * this.p2.m, -ACTIVATION, ACTIVATION);
    this.kernels.release(mark);
  }
}

/** Symbols of a layer: the integers of its hyper-decoder and context model, and the range decoder. */
class Entropy {
  constructor(kernels, tensors) {
    this.kernels = kernels;
    const conv = (name, low, high) => new IntegerConv(kernels, tensors.part("exact"), name, low, high);
    const block = (name) => new IntegerBlock(kernels, tensors.part("exact"), name);
    const later = [0, 1, 2];
    this.up = [0, 1].map((k) => conv(`up.${k}`, 0, ACTIVATION));
    this.blocks = [0, 1].map((k) => block(`block.${k}`));
    this.first = conv("first");
    this.into = later.map((k) => conv(`into.${k}`, 0, ACTIVATION));
    this.context = later.map((k) => block(`context.${k}`));
    this.more = later.map((k) => conv(`more.${k}`));
    this.known = tensors.part("exact").get("known");
    this.m = this.known.length;
    this.h = this.blocks[1].p2.m;
    const z = tensors.get("tables.z"), [channels, size] = tensors.shape("tables.z");
    this.z = Array.from({ length: channels }, (_, k) => this.table(z.subarray(k * size, (k + 1) * size)));
    const y = tensors.get("tables.y");
    let at = 0;
    this.y = [...tensors.get("tables.y_lengths")].map((length) => this.table(y.subarray(at, (at += length))));
  }
  /** Frequencies of -w..w and the escape to what `symbols` takes. */
  table(frequencies) {
    const cumulative = new Int32Array(frequencies.length + 1);
    frequencies.forEach((f, k) => (cumulative[k + 1] = cumulative[k] + f));
    return { at: this.kernels.put(cumulative), size: frequencies.length, width: (frequencies.length >> 1) - 1 };
  }

  /** Begin with a layer's bytes. */
  begin(data) {
    let at = 0;
    const varint = () => {
      let value = 0, shift = 0, byte;
      do {
        byte = data[at++];
        if (byte === undefined || shift > 28) throw new CompassError("a layer's symbols make no sense");
        value += (byte & 127) * 2 ** shift;
        shift += 7;
      } while (byte > 127);
      if (value > 2 * SYMBOL_LIMIT) throw new CompassError("a layer's symbols make no sense");
      return value % 2 ? -(value + 1) / 2 : value / 2;
    };
    const count = varint();
    if (count < 0 || count > data.length) throw new CompassError("a layer's symbols make no sense");
    this.escapes = Array.from({ length: count }, varint).reverse();
    const words = data.subarray(at), padded = Math.ceil(words.length / 4), place = this.kernels.take(padded + 1);
    this.kernels.i32.fill(0, place / 4, place / 4 + padded + 1);
    this.kernels.u8.set(words, place);
    this.kernels.run.begin(place, 4 * padded);
  }
  /** Calls `put(i, symbol)` with the next n symbols of a table. */
  symbols(table, n, put) {
    const { kernels } = this, mark = kernels.mark(), out = kernels.take(n);
    if (!kernels.run.symbols(table.at, table.size, out, n)) throw new CompassError("a layer's symbols make no sense");
    for (let i = 0; i < n; i++) {
      const symbol = kernels.i32[out / 4 + i] - table.width;
      put(i, symbol > table.width ? (this.escapes.pop() ?? 0) : symbol);
    }
    kernels.release(mark);
  }

  /** A layer's bytes to the quantised latent [h, w, M]. `seen` is called with the symbols of z too, for tests. */
  *read(data, h, w, seen) {
    const { kernels, m } = this, rows = Math.ceil(h / 4), columns = Math.ceil(w / 4), n = this.z.length;
    if (data.length < Math.floor(this.least(rows * columns) / 8) - 8)
      throw new CompassError(`a layer of ${data.length} bytes is too short for its size`);
    const y = kernels.zeros(h * w * m), mark = kernels.mark();
    this.begin(data);
    const z = kernels.take(rows * columns * n), known = new Int32Array(n * rows * columns);
    this.z.forEach((table, c) => {
      this.symbols(table, rows * columns, (i, symbol) => {
        known[c * rows * columns + i] = symbol;
        kernels.f32[z / 4 + i * n + c] = Math.max(-ACTIVATION, Math.min(ACTIVATION, symbol));
      });
    });
    seen?.(known);
    yield* this.walk(yield* this.features(z, rows, columns, h, w), y, h, w);
    kernels.release(mark);
    return y;
  }
  /** Bits of the likeliest symbols of z. */
  least(places) {
    return places * this.z.reduce((sum, { at, size }) => {
      const cumulative = this.kernels.i32.subarray(at / 4, at / 4 + size + 1);
      let most = 1;
      for (let k = 0; k < size; k++) most = Math.max(most, cumulative[k + 1] - cumulative[k]);
      return sum + 24 - Math.log2(most);
    }, 0);
  }

  *features(x, rows, columns, h, w) {
    for (const [k, [height, width]] of [[half(h), half(w)], [h, w]].entries()) {
      const wide = yield* this.up[k].apply(x, rows * columns);
      x = yield* doubled(this.kernels, wide, columns, this.h, height, width);
      [rows, columns] = [height, width];
      yield* this.blocks[k].apply(x, rows * columns, columns);
    }
    return x;
  }

  *walk(features, y, h, w) {
    const { kernels, m } = this, quarter = m / STEPS;
    const first = yield* this.first.apply(features, h * w);
    for (let step = 0; step < STEPS; step++) {
      const mark = kernels.mark(), hidden = step ? yield* this.hidden(step, features, y, h, w) : 0;
      const index = new Uint8Array(h * w * quarter), means = new Float32Array(h * w * quarter);
      const where = new Uint32Array(h * w * quarter), counts = new Uint32Array(LEVELS + 1);
      let n = 0;
      for (const [phase, [row, column]] of PHASES.entries()) {
        const rows = Math.ceil((h - row) / 2), columns = Math.ceil((w - column) / 2);
        if (rows < 1 || columns < 1) continue;
        const channel = ((phase - step) & 3) * quarter;
        const more = step ? yield* this.moreAt(step, phase, hidden, w, row, column, rows, columns) : 0;
        const values = kernels.f32;
        yield* each(quarter, (c) => {
          for (let i = 0; i < rows; i++)
            for (let j = 0; j < columns; j++, n++) {
              const place = (2 * i + row) * w + 2 * j + column;
              let scale = values[first / 4 + place * 2 * m + channel + c];
              let mean = values[first / 4 + place * 2 * m + m + channel + c];
              if (step) {
                const at = more / 4 + (i * columns + j) * 2 * quarter + c;
                scale += values[at];
                mean += values[at + quarter];
              }
              index[n] = Math.max(0, Math.min(LEVELS - 1, Math.floor(scale / FINE)));
              means[n] = Math.max(-MEAN_LIMIT, Math.min(MEAN_LIMIT, mean)) / MEAN_UNIT;
              where[n] = place * m + channel + c;
              counts[index[n] + 1]++;
            }
        });
      }
      for (let k = 0; k < LEVELS; k++) counts[k + 1] += counts[k];
      const order = new Uint32Array(n), ends = counts.slice(0, LEVELS);
      for (let k = 0; k < n; k++) order[ends[index[k]]++] = k;
      for (let k = 0; k < n; k++) kernels.f32[y / 4 + where[k]] = means[k];
      for (let level = SKIPPED; level < LEVELS; level++) {
        const from = counts[level], count = counts[level + 1] - from;
        if (!count) continue;
        this.symbols(this.y[level], count, (i, symbol) => {
          kernels.f32[y / 4 + where[order[from + i]]] += symbol;
        });
        yield;
      }
      kernels.release(mark);
    }
  }

  /** What a later step knows: [h, w, G], from what is known of y, and features. */
  *hidden(step, features, y, h, w) {
    const { kernels, m, h: wide } = this, quarter = m / STEPS, places = h * w;
    const hidden = kernels.take(places * this.into[step - 1].m), mark = kernels.mark();
    const x = kernels.take(places * (m + wide)), values = kernels.f32;
    yield* each(places, (place) => {
      const i = Math.floor(place / w), phase = PHASES.findIndex(([r, c]) => r === (i & 1) && c === ((place - i * w) & 1));
      const to = x / 4 + place * (m + wide), from = y / 4 + place * m;
      for (let group = 0; group < STEPS; group++) {
        const seen = ((phase - group) & 3) < step;
        for (let c = group * quarter; c < (group + 1) * quarter; c++) {
          const v = seen ? Math.floor(Math.fround(Math.fround(values[from + c] * this.known[c]) + 0.5)) : 0;
          values[to + c] = Math.max(-ACTIVATION, Math.min(ACTIVATION, v));
        }
      }
      values.copyWithin(to + m, features / 4 + place * wide, features / 4 + (place + 1) * wide);
    });
    const out = yield* this.into[step - 1].apply(x, places), size = places * this.into[step - 1].m;
    kernels.f32.copyWithin(hidden / 4, out / 4, out / 4 + size);
    kernels.release(mark);
    yield* this.context[step - 1].apply(hidden, places, w);
    return hidden;
  }

  /** What is added to scales and means of a phase, [rows, columns, 2 M / 4]. */
  *moreAt(step, phase, hidden, w, row, column, rows, columns) {
    const { kernels } = this, conv = this.more[step - 1], { matrix } = conv, g = matrix.k, m = conv.m / STEPS;
    const x = kernels.take(rows * columns * g);
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < columns; j++) {
        const from = hidden / 4 + ((2 * i + row) * w + 2 * j + column) * g;
        kernels.f32.copyWithin(x / 4 + (i * columns + j) * g, from, from + g);
      }
    const part = { panels: matrix.panels + 4 * phase * m * g, bias: matrix.bias + 4 * phase * m, m, k: g };
    const out = yield* kernels.multiply(x, rows * columns, part);
    kernels.run.requantise(out, conv.scale + 4 * phase * m, rows * columns, m, -EXACT, EXACT);
    return out;
  }
}

/** x [h, w, 4 c] to [height, width, c]: each place becomes 2 x 2, cropped. */
function doubled(engine, x, w, c, height, width) {
  const down = table(height, c, (i) => (i >> 1) * w * 4 * c + (i & 1) * 2);
  return engine.gather(x, down, table(width, c, (j, e) => (j >> 1) * 4 * c + 4 * e + (j & 1)), c);
}

/** What `gather` takes for one axis: `offset` of each place and number. */
function table(places, size, offset) {
  const out = new Int32Array(places * size);
  for (let i = 0, at = 0; i < places; i++) for (let e = 0; e < size; e++) out[at++] = offset(i, e);
  return out;
}

/** Analysis and synthesis, which base and enhancement layers share. They run on an engine: Kernels, or Gpu. */
class Transforms {
  constructor(tensors) {
    this.tensors = tensors;
    this.raw = new Map();
    const blocks = (name) => {
      let n = 0;
      while (tensors.has(`${name}.${n}.norm`)) n++;
      return Array.from({ length: n }, (_, k) => `${name}.${k}`);
    };
    for (const name of ["a8", "a16", "s16", "s8"]) this[name] = blocks(name);
  }
  get(name) {
    if (!this.raw.has(name)) this.raw.set(name, this.tensors.get(name));
    return this.raw.get(name);
  }
  /** A 1x1 convolution; its inputs and outputs are multiplied by factors, or not. */
  linear(engine, name, inputs, outputs) {
    const [m, k] = this.tensors.shape(`${name}.weight`);
    let weight = this.get(`${name}.weight`), bias = this.get(`${name}.bias`);
    if (inputs) weight = weight.map((w, at) => w * inputs[at % k]);
    if (outputs) (weight = weight.map((w, at) => w * outputs[Math.floor(at / k)])), (bias = bias.map((b, j) => b * outputs[j]));
    return engine.matrix(weight, bias, m, k);
  }
  /** Adds a block's part to x [rows, columns, c], in place. */
  *block(engine, name, level, x, rows, columns) {
    const mark = engine.mark(), norm = this.get(`${name}.norm`), scale = gains(this.get(`${name}.log_gain`), level);
    const last = this.get(`${name}.p2.weight`).map((w, k) => w * scale[k % norm.length]);
    yield* engine.block(x, rows, columns, {
      taps: engine.put(taps(this.get(`${name}.dw.weight`), norm.length)),
      bias: engine.put(this.get(`${name}.dw.bias`)),
      p1: this.linear(engine, `${name}.p1`, norm),
      p2: engine.matrix(last, this.get(`${name}.p2.bias`), norm.length, norm.length),
      gated: true,
    });
    engine.release(mark);
  }

  /** Adds to y the latent [h, w, M] of RGB [height, width, 3], -1/2..1/2. */
  *analysis(engine, rgb, height, width, level, y) {
    const rows = Math.ceil(height / UNSHUFFLE), columns = Math.ceil(width / UNSHUFFLE), h = half(rows), w = half(columns);
    const eighth = yield* engine.gather(rgb, ...unshuffled(height, width, rows, columns), 192);
    const x = yield* engine.multiply(eighth, rows * columns, this.linear(engine, "embed"));
    for (const name of this.a8) yield* this.block(engine, name, level, x, rows, columns);
    const x16 = yield* this.halved(engine, x, rows, columns, h, w);
    for (const name of this.a16) yield* this.block(engine, name, level, x16, h, w);
    yield* engine.multiply(x16, h * w, this.linear(engine, "to_y", null, gains(this.get("log_gain"), level)), y);
  }
  /** The latent y [h, w, M] to 192 channels at 1/8 of the size, a picture less 1/2. */
  *synthesis(engine, y, height, width, level) {
    const h = Math.ceil(height / CELL), w = Math.ceil(width / CELL);
    const rows = Math.ceil(height / UNSHUFFLE), columns = Math.ceil(width / UNSHUFFLE);
    const from = this.linear(engine, "from_y", gains(this.get("log_inv_gain"), level));
    const x16 = yield* engine.multiply(y, h * w, from);
    for (const name of this.s16) yield* this.block(engine, name, level, x16, h, w);
    const x = yield* this.doubled(engine, x16, h, w, rows, columns);
    for (const name of this.s8) yield* this.block(engine, name, level, x, rows, columns);
    return yield* engine.multiply(x, rows * columns, this.linear(engine, "out"));
  }
  /** The convolution 2x2 of stride 2; the last row and column are repeated. */
  *halved(engine, x, rows, columns, h, w) {
    const [m, c] = this.tensors.shape("down.weight"), weight = this.get("down.weight"), turned = new Float32Array(m * 4 * c);
    for (let j = 0; j < m; j++)
      for (let i = 0; i < c; i++) for (let k = 0; k < 4; k++) turned[(j * 4 + k) * c + i] = weight[(j * c + i) * 4 + k];
    const down = table(h, 4 * c, (i, e) => Math.min(rows - 1, 2 * i + (e >= 2 * c)) * columns * c);
    const across = table(w, 4 * c, (j, e) => Math.min(columns - 1, 2 * j + (Math.floor(e / c) & 1)) * c + (e % c));
    const wide = yield* engine.gather(x, down, across, 4 * c);
    return yield* engine.multiply(wide, h * w, engine.matrix(turned, this.get("down.bias"), m, 4 * c));
  }
  /** The transposed convolution 2x2 of stride 2, cropped. */
  *doubled(engine, x, h, w, rows, columns) {
    const [k, c] = this.tensors.shape("up.weight"), weight = this.get("up.weight");
    const turned = new Float32Array(4 * c * k), bias = this.get("up.bias"), shifts = new Float32Array(4 * c);
    for (let i = 0; i < k; i++)
      for (let j = 0; j < 4 * c; j++) turned[j * k + i] = weight[i * 4 * c + j]; // j: channel, then place
    for (let j = 0; j < 4 * c; j++) shifts[j] = bias[j >> 2];
    const wide = yield* engine.multiply(x, h * w, engine.matrix(turned, shifts, 4 * c, k));
    return yield* doubled(engine, wide, w, c, rows, columns);
  }
}

/** Tables that gather a picture as 192 channels at 1/8 of its size; the last row and column are repeated. */
function unshuffled(height, width, rows, columns) {
  const down = table(rows, 192, (i, e) => Math.min(height - 1, 8 * i + ((e >> 3) & 7)) * width * 3);
  return [down, table(columns, 192, (j, e) => Math.min(width - 1, 8 * j + (e & 7)) * 3 + (e >> 6))];
}

/** LIFF: predicts a layer from the one below it, on an engine: Kernels, or Gpu. */
class LIFF {
  constructor(tensors) {
    const embed = tensors.get("embed.weight"), [channels] = tensors.shape("embed.weight");
    this.embed = new Float32Array(channels * 108); // in: 12 channels, 3 x 3; now 3 x 3, then channels
    for (let j = 0; j < channels; j++)
      for (let colour = 0; colour < 3; colour++) {
        const own = embed.subarray(j * 108 + colour * 36, j * 108 + (colour + 1) * 36);
        const mean = own.reduce((a, b) => a + b) / 36;
        own.forEach((v, k) => (this.embed[j * 108 + (k % 9) * 12 + colour * 4 + Math.floor(k / 9)] = v - mean));
      }
    this.c = channels;
    this.blocks = [];
    for (let k = 0; tensors.has(`blocks.${k}.dw.weight`); k++) {
      const part = tensors.part(`blocks.${k}`), m = part.shape("p1.weight")[0];
      const dw = taps(part.get("dw.weight"), channels);
      this.blocks.push({ dw, m, p1: part.get("p1.weight"), p2: part.get("p2.weight") });
    }
    this.out = tensors.get("out.weight");
    this.taps = tensors.shape("out.weight")[0] / 12;
    const side = Math.floor(Math.sqrt(this.taps - 1)) + 1, all = Array.from({ length: this.taps }, (_, k) => k);
    this.rows = along(tensors.part("rows_phi"), all.map((k) => Math.floor(k / side)));
    this.columns = along(tensors.part("columns_phi"), all.map((k) => k % side));
  }

  /** RGB [h, w, 3] of the layer below, -1/2..1/2, to that of a layer, [height, width, 3]. */
  *predict(engine, low, h, w, height, width) {
    const cells = [(2 * h) / height, (2 * w) / width], out = engine.take(height * width * 3), mark = engine.mark();
    const features = yield* this.features(engine, low, h, w);
    const down = yield* axis(this.rows, this.taps, h, height, cells[0], cells[1]);
    const across = yield* axis(this.columns, this.taps, w, width, cells[1], cells[0]);
    yield* engine.sample(low, w, features.at, features.m, down, across, this.taps, out);
    engine.release(mark);
    return out;
  }

  /** Features at half of the lower layer's size, and the count of their channels. */
  *features(engine, low, h, w) {
    const { c } = this, rows = half(h), columns = half(w), n = rows * columns, x = engine.zeros(n * c), mark = engine.mark();
    const seen = yield* engine.gather(low, ...neighbours(h, w, rows, columns), 108);
    yield* engine.multiply(seen, n, engine.matrix(this.embed, null, c, 108), x);
    engine.release(mark);
    for (const { dw, m, p1, p2 } of this.blocks) {
      const bias = engine.put(new Float32Array(c));
      yield* engine.block(x, rows, columns, {
        taps: engine.put(dw),
        bias,
        p1: engine.matrix(p1, null, m, c),
        p2: engine.matrix(p2, null, c, m),
        gated: false,
      });
      engine.release(mark);
    }
    const out = engine.matrix(this.out, null, 12 * this.taps, c);
    return { at: yield* engine.multiply(x, n, out), m: out.m };
  }
}

/** Tables that gather 3 x 3 neighbours of 2 x 2 pixels from a picture; rows and columns at its edges are repeated. */
function neighbours(h, w, rows, columns) {
  const at = (i, count, size, near, k) => Math.min(size - 1, 2 * Math.max(0, Math.min(count - 1, i + near)) + k);
  const down = table(rows, 108, (i, e) => at(i, rows, h, Math.floor(e / 36) - 1, (e >> 1) & 1) * w * 3);
  const colour = (e) => (e >> 2) % 3;
  return [down, table(columns, 108, (j, e) => at(j, columns, w, (Math.floor(e / 12) % 3) - 1, e & 1) * 3 + colour(e))];
}

/** The function of the place along an axis: cosines of these orders, and what a small network adds. */
function along(tensors, orders) {
  const layers = ["first", "second", "last"].map((name) => {
    const weight = tensors.get(`${name}.weight`), bias = tensors.get(`${name}.bias`);
    return (x) => Array.from(bias, (v, j) => x.reduce((sum, value, k) => sum + value * weight[j * x.length + k], v));
  });
  return (offset, cell, across) => {
    const added = layers[2](layers[1](layers[0]([offset, cell, across]).map(silu)).map(silu));
    return orders.map((order, k) => Math.cos(0.5 * Math.PI * order * (offset + 1)) + added[k]);
  };
}

/** What `sample` takes for one axis, [high, AXIS + n]: of each of `high` samples the nearest of `low` samples; the four that
    bicubic interpolation takes, edges repeated, and their weights (Keys' kernel with a = -0.75); and the n functions `phi` of the
    offset from the nearest, -1..1 within it. */
function* axis(phi, n, low, high, cell, across) {
  const out = new Float32Array(high * (AXIS + n));
  yield* each(high, (i) => {
    const nearest = Math.floor(((2 * i + 1) * low) / (2 * high)), at = i * (AXIS + n);
    const position = ((i + 0.5) * low) / high - 0.5, base = Math.floor(position);
    out[at] = nearest;
    for (let k = 0; k < 4; k++) {
      const source = base + k - 1, t = Math.abs(position - source);
      out[at + 1 + k] = Math.max(0, Math.min(low - 1, source));
      out[at + 5 + k] = t <= 1 ? (1.25 * t - 2.25) * t * t + 1 : -0.75 * (((t - 5) * t + 8) * t - 4);
    }
    out.set(phi(((2 * i + 1) * low - (2 * nearest + 1) * high) / high, cell, across), at + AXIS);
  });
  return out;
}

/** A set of weights, ready to decode: `decode` gives the layers of a file in turn. */
export class Decoder {
  /** `wasm` are the bytes of kernels.wasm, `weights` those of the set's safetensors file for browsers. */
  static async load(wasm, weights) {
    return new Decoder(await Kernels.load(wasm), new Tensors(weights));
  }
  constructor(kernels, tensors) {
    this.kernels = kernels;
    this.gpu = null; // or a Gpu, for the pixels of layers that are not small
    [this.base, this.residual] = ["base", "residual"].map((part) => new Entropy(kernels, tensors.part(part)));
    this.transforms = new Transforms(tensors.part("base"));
    this.liff = new LIFF(tensors.part("liff"));
  }
  /** A layer's bytes to {width, height, rgb}, 3 bytes a pixel, in steps; `below` is what this gave for the layer below. */
  *layer(data, { width, height, quality }, below, seen) {
    if (data[0] === 1) return { width, height, rgb: oneColour(data, width * height) };
    const { kernels } = this, mark = kernels.mark(), entropy = below ? this.residual : this.base;
    const h = Math.ceil(height / CELL), w = Math.ceil(width / CELL), count = h * w * entropy.m;
    try {
      const y = yield* entropy.read(data, h, w, seen && ((z) => seen("z", z)));
      const latent = kernels.f32.slice(y / 4, y / 4 + count);
      seen?.("y", latent);
      kernels.release(mark);
      const rgb = yield* this.pixels(latent, height, width, levelOf(quality), below);
      return { width, height, rgb };
    } finally {
      kernels.release(mark); // also after an error
    }
  }
  /** A latent's pixels, by the GPU where there is one and the layer is not small. Where it fails, WebAssembly makes them. */
  *pixels(latent, height, width, level, below) {
    const { gpu } = this;
    if (gpu && height * width >= gpu.least) {
      try {
        return yield* gpu.checked(this.reconstructed(gpu, latent, height, width, level, below));
      } catch (error) {
        console.warn(`WebGPU: ${error.message}`);
        if (!(error instanceof RangeError)) this.gpu = null; // after others than too large a layer, for good
      }
    }
    return yield* this.reconstructed(this.kernels, latent, height, width, level, below);
  }
  /** Takes a Gpu for layers to come, if it makes of two small ones what WebAssembly makes. */
  *accept(gpu) {
    const level = levelOf(60), latent = (places) => Float32Array.from({ length: places * this.base.m }, (_, k) => 2 * Math.sin(k));
    try {
      let below = null;
      for (const [height, width] of [[40, 56], [60, 84]]) {
        const places = Math.ceil(height / CELL) * Math.ceil(width / CELL);
        const rgb = yield* this.reconstructed(this.kernels, latent(places), height, width, level, below);
        const other = yield* gpu.checked(this.reconstructed(gpu, latent(places), height, width, level, below));
        if (other.some((v, k) => Math.abs(v - rgb[k]) > 1)) throw new Error("the device computes other pixels");
        below = { width, height, rgb };
      }
      this.gpu = gpu;
    } catch (error) {
      console.warn(`WebGPU: ${error.message}`);
    }
  }
  *reconstructed(engine, latent, height, width, level, below) {
    const mark = engine.mark(), rows = Math.ceil(height / UNSHUFFLE), columns = Math.ceil(width / UNSHUFFLE);
    try {
      const y = engine.put(latent), inner = engine.mark();
      if (below) {
        const low = engine.put(centred(below.rgb));
        const prediction = yield* this.liff.predict(engine, low, below.height, below.width, height, width);
        yield* this.transforms.analysis(engine, prediction, height, width, level, y);
        engine.release(inner);
      }
      const out = yield* this.transforms.synthesis(engine, y, height, width, level);
      const values = yield* engine.numbers(out, rows * columns * 192);
      const rgb = new Uint8ClampedArray(height * width * 3); // which rounds and clamps
      let k = 0;
      yield* each(height, (i) => {
        for (let j = 0; j < width; j++) {
          const at = ((i >> 3) * columns + (j >> 3)) * 192 + (i & 7) * 8 + (j & 7);
          for (let c = 0; c < 3; c++, k++) rgb[k] = 255 * Math.fround(values[at + 64 * c] + 0.5);
        }
      });
      return rgb;
    } finally {
      engine.release(mark);
    }
  }
}

/** 0..255 as -1/2..1/2. */
function centred(rgb) {
  const out = new Float32Array(rgb.length);
  for (let k = 0; k < out.length; k++) out[k] = rgb[k] / 255 - 0.5;
  return out;
}

function oneColour(data, pixels) {
  if (data.length !== 4) throw new CompassError(`a layer of one colour has 4 bytes, not ${data.length}`);
  return new Uint8ClampedArray(3 * pixels).map((_, k) => data[1 + (k % 3)]);
}
