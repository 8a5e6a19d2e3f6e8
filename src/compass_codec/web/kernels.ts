// What of the decoder must be fast: matrix products, depthwise convolutions, a few passes over activations, and the
// range decoder. AssemblyScript; `make wasm` makes kernels.wasm of it. Arrays are float32 and channels last: [places,
// channels] or [rows, columns, channels]. The caller places them in memory; counts of channels are multiples of 8.
// Nothing here depends on the browser: WebAssembly's floating point is the same everywhere.

/** Where free memory begins. */
export const base: usize = __heap_base;

const CHUNK: i32 = 64; // rows of a matrix that stay in a processor's cache while all columns are made

/** out [n, m] = a [n, k] times b, plus bias [m], plus what out holds if `add`. b lies in panels of 8 columns: [m / 8, k, 8]. */
export function multiply(a: usize, b: usize, bias: usize, out: usize, n: i32, k: i32, m: i32, add: bool): void {
  for (let start = 0; start < n; start += CHUNK) {
    const end = min(start + CHUNK, n);
    for (let j = 0; j < m; j += 8) {
      const panel = b + <usize>j * k * 4;
      const low = v128.load(bias + <usize>j * 4), high = v128.load(bias + <usize>j * 4, 16);
      let i = start;
      for (; i + 4 <= end; i += 4) {
        const a0 = a + <usize>i * k * 4, a1 = a0 + <usize>k * 4, a2 = a1 + <usize>k * 4, a3 = a2 + <usize>k * 4;
        const o0 = out + (<usize>i * m + j) * 4, o1 = o0 + <usize>m * 4, o2 = o1 + <usize>m * 4, o3 = o2 + <usize>m * 4;
        let s00 = low, s01 = high, s10 = low, s11 = high, s20 = low, s21 = high, s30 = low, s31 = high;
        if (add) {
          s00 = f32x4.add(s00, v128.load(o0)); s01 = f32x4.add(s01, v128.load(o0, 16));
          s10 = f32x4.add(s10, v128.load(o1)); s11 = f32x4.add(s11, v128.load(o1, 16));
          s20 = f32x4.add(s20, v128.load(o2)); s21 = f32x4.add(s21, v128.load(o2, 16));
          s30 = f32x4.add(s30, v128.load(o3)); s31 = f32x4.add(s31, v128.load(o3, 16));
        }
        let at = panel;
        for (let x: usize = 0; x < <usize>k * 4; x += 4) {
          const b0 = v128.load(at), b1 = v128.load(at, 16);
          at += 32;
          const v0 = v128.load32_splat(a0 + x), v1 = v128.load32_splat(a1 + x);
          const v2 = v128.load32_splat(a2 + x), v3 = v128.load32_splat(a3 + x);
          s00 = f32x4.add(s00, f32x4.mul(v0, b0)); s01 = f32x4.add(s01, f32x4.mul(v0, b1));
          s10 = f32x4.add(s10, f32x4.mul(v1, b0)); s11 = f32x4.add(s11, f32x4.mul(v1, b1));
          s20 = f32x4.add(s20, f32x4.mul(v2, b0)); s21 = f32x4.add(s21, f32x4.mul(v2, b1));
          s30 = f32x4.add(s30, f32x4.mul(v3, b0)); s31 = f32x4.add(s31, f32x4.mul(v3, b1));
        }
        v128.store(o0, s00); v128.store(o0, s01, 16);
        v128.store(o1, s10); v128.store(o1, s11, 16);
        v128.store(o2, s20); v128.store(o2, s21, 16);
        v128.store(o3, s30); v128.store(o3, s31, 16);
      }
      for (; i < end; i++) {
        const row = a + <usize>i * k * 4, o = out + (<usize>i * m + j) * 4;
        let s0 = low, s1 = high, at = panel;
        if (add) {
          s0 = f32x4.add(s0, v128.load(o));
          s1 = f32x4.add(s1, v128.load(o, 16));
        }
        for (let x: usize = 0; x < <usize>k * 4; x += 4) {
          const v = v128.load32_splat(row + x);
          s0 = f32x4.add(s0, f32x4.mul(v, v128.load(at)));
          s1 = f32x4.add(s1, f32x4.mul(v, v128.load(at, 16)));
          at += 32;
        }
        v128.store(o, s0);
        v128.store(o, s1, 16);
      }
    }
  }
}

/** Rows `first` to `last` (less one) of a depthwise 3x3 convolution of x [rows, columns, c], zero around it; taps [3, 3, c]. */
export function depthwise(x: usize, taps: usize, bias: usize, out: usize, rows: i32, columns: i32, c: i32, first: i32, last: i32): void {
  const line = <usize>columns * c * 4, place = <usize>c * 4;
  for (let i = first; i < last; i++) {
    const up = max(i - 1, 0), down = min(i + 2, rows);
    for (let j = 0; j < columns; j++) {
      const left = max(j - 1, 0), right = min(j + 2, columns);
      const o = out + <usize>i * line + <usize>j * place;
      for (let channel: usize = 0; channel < place; channel += 16) {
        let sum = v128.load(bias + channel);
        for (let y = up; y < down; y++) {
          const from = x + <usize>y * line + channel, tap = taps + <usize>(y - i + 1) * 3 * place + channel;
          for (let z = left; z < right; z++) {
            sum = f32x4.add(sum, f32x4.mul(v128.load(from + <usize>z * place), v128.load(tap + <usize>(z - j + 1) * place)));
          }
        }
        v128.store(o + channel, sum);
      }
    }
  }
}

/** Each row of x [n, c] over the root of its mean square, in place. */
export function normalise(x: usize, n: i32, c: i32, epsilon: f32): void {
  const place = <usize>c * 4;
  for (let row = x; row < x + <usize>n * place; row += place) {
    let squares = f32x4.splat(0);
    for (let k: usize = 0; k < place; k += 16) {
      const v = v128.load(row + k);
      squares = f32x4.add(squares, f32x4.mul(v, v));
    }
    const sum = f32x4.extract_lane(squares, 0) + f32x4.extract_lane(squares, 1) + f32x4.extract_lane(squares, 2) + f32x4.extract_lane(squares, 3);
    const scale = f32x4.splat(1 / sqrt<f32>(sum / <f32>c + epsilon));
    for (let k: usize = 0; k < place; k += 16) v128.store(row + k, f32x4.mul(v128.load(row + k), scale));
  }
}

/** x [n, 2 c], halves a and b of each row, to silu(a) b, [n, c]. */
export function gate(x: usize, out: usize, n: i32, c: i32): void {
  for (let i = 0; i < n; i++) {
    const row = x + <usize>i * c * 8, o = out + <usize>i * c * 4;
    for (let k: usize = 0; k < <usize>c * 4; k += 4) {
      const a = load<f32>(row + k);
      store<f32>(o + k, (a / (1 + Mathf.exp(-a))) * load<f32>(row + k + <usize>c * 4));
    }
  }
}

/** x [n, m] in place: floor(x scale), kept between `low` and `high`; integers in float32, exact. */
export function requantise(x: usize, scale: usize, n: i32, m: i32, low: f32, high: f32): void {
  const least = f32x4.splat(low), most = f32x4.splat(high);
  for (let i = 0; i < n; i++) {
    const row = x + <usize>i * m * 4;
    for (let k: usize = 0; k < <usize>m * 4; k += 16) {
      const v = f32x4.floor(f32x4.mul(v128.load(row + k), v128.load(scale + k)));
      v128.store(row + k, f32x4.min(f32x4.max(v, least), most));
    }
  }
}

/** x += y of n numbers (a multiple of 4), then kept between `low` and `high`. */
export function add(x: usize, y: usize, n: i32, low: f32, high: f32): void {
  const least = f32x4.splat(low), most = f32x4.splat(high);
  for (let k: usize = 0; k < <usize>n * 4; k += 16) {
    const v = f32x4.add(v128.load(x + k), v128.load(y + k));
    v128.store(x + k, f32x4.min(f32x4.max(v, least), most));
  }
}

/** Negative numbers of n (a multiple of 4) become zero. */
export function relu(x: usize, n: i32): void {
  for (let k: usize = 0; k < <usize>n * 4; k += 16) v128.store(x + k, f32x4.max(v128.load(x + k), f32x4.splat(0)));
}

// The range decoder of constriction: words of 32 bits, a state of 64, probabilities of 24.
let lower: u64, range: u64, point: u64, word: usize, end: usize;

function next(): u64 {
  if (word >= end) return 0;
  word += 4;
  return <u64>bswap(load<u32>(word - 4));
}

/** Begin with `bytes` of words at `at`, a multiple of 4. */
export function begin(at: usize, bytes: i32): void {
  word = at;
  end = at + bytes;
  lower = 0;
  range = u64.MAX_VALUE;
  point = next() << 32;
  point |= next();
}

/** The next n symbols, int32 positions in a table of `size` symbols that has size + 1 cumulative frequencies, uint32.
    False if no encoder writes such words. */
export function symbols(table: usize, size: i32, out: usize, n: i32): bool {
  for (let i = 0; i < n; i++) {
    const scale = range >> 24, quantile = (point - lower) / scale;
    if (quantile >= 1 << 24) return false;
    let low = 0, high = size;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (<u64>load<u32>(table + ((<usize>middle) << 2)) <= quantile) low = middle;
      else high = middle;
    }
    const left = <u64>load<u32>(table + ((<usize>low) << 2)), right = <u64>load<u32>(table + ((<usize>low) << 2), 4);
    lower += scale * left;
    range = scale * (right - left);
    if (range < <u64>1 << 32) {
      lower <<= 32;
      range <<= 32;
      point = (point << 32) | next();
    }
    store<i32>(out + ((<usize>i) << 2), low);
  }
  return true;
}
