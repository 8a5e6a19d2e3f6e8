// The transforms and LIFF by WebGPU: the methods of Kernels (lean.js) that they use. Float32 alone, for pixels: WGSL bounds the
// errors of its operations, but rounds and sums as the device likes. Symbols are made by WebAssembly.
//
// An array is a buffer of its own, [places, channels], with channels last and a multiple of 4.

import { AXIS, EPSILON } from "./lean.js";

const SHADERS = `
const AXIS = ${AXIS}u;
const EPSILON = ${EPSILON};
override GATED = false; // a normalisation before the product, a gate behind it
override RELU = false;
override ADD = false; // to what out holds

@group(0) @binding(0) var<uniform> size: vec4u;
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
@group(0) @binding(2) var<storage, read> weight: array<vec4f>;
@group(0) @binding(3) var<storage, read> bias: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4f>;
// the same, where numbers are taken one by one
@group(0) @binding(1) var<storage, read> source: array<f32>;
@group(0) @binding(2) var<storage, read> offsets_down: array<i32>;
@group(0) @binding(3) var<storage, read> offsets_across: array<i32>;
@group(0) @binding(2) var<storage, read> down: array<f32>;
@group(0) @binding(3) var<storage, read> across: array<f32>;
@group(0) @binding(4) var<storage, read_write> to: array<f32>;
@group(0) @binding(5) var<storage, read> features: array<f32>;

var<workgroup> left: array<vec4f, 128>; // 32 rows of x, 16 deep
var<workgroup> right: array<vec4f, 128>; // 16 rows of the matrix, 32 columns
var<workgroup> other: array<vec4f, 128>; // the columns of the gate's second half

// x [n, k] times weight [k, m], plus bias [m]; with GATED out is [n, m / 2]. size: n, k / 4, m / 4. A workgroup makes 32 x 32
// numbers, each of its 64 threads 4 x 4.
@compute @workgroup_size(8, 8)
fn multiply(
  @builtin(workgroup_id) tile: vec3u,
  @builtin(local_invocation_id) own: vec3u,
  @builtin(local_invocation_index) thread: u32,
) {
  let n = size.x;
  let k = size.y;
  let m = size.z;
  let width = select(m, m / 2, GATED);
  var sums = mat4x4f(); // a column for each row of out
  var others = mat4x4f();
  var squares = vec4f();
  for (var start = 0u; start < k; start += 4) {
    for (var t = thread; t < 128; t += 64) {
      let row = 32 * tile.y + t / 4;
      let at = start + t % 4;
      let depth = 4 * start + t / 8;
      let column = 8 * tile.x + t % 8;
      let inside = depth < 4 * k && column < width;
      left[t] = vec4f();
      right[t] = vec4f();
      if (row < n && at < k) { left[t] = x[row * k + at]; }
      if (inside) { right[t] = weight[depth * m + column]; }
      if (GATED && inside) { other[t] = weight[depth * m + width + column]; }
    }
    workgroupBarrier();
    for (var d = 0u; d < 4; d++) {
      let i = 16 * own.y + d;
      let j = 32 * d + own.x;
      let v = mat4x4f(left[i], left[i + 4], left[i + 8], left[i + 12]);
      sums += mat4x4f(right[j], right[j + 8], right[j + 16], right[j + 24]) * v;
      if (GATED) {
        others += mat4x4f(other[j], other[j + 8], other[j + 16], other[j + 24]) * v;
        squares += vec4f(dot(v[0], v[0]), dot(v[1], v[1]), dot(v[2], v[2]), dot(v[3], v[3]));
      }
    }
    workgroupBarrier();
  }
  let row = 32 * tile.y + 4 * own.y;
  let column = 8 * tile.x + own.x;
  if (column >= width) { return; }
  for (var r = 0u; r < 4 && row + r < n; r++) {
    let at = (row + r) * width + column;
    var v = sums[r];
    if (GATED) { // sums are linear in x: they are normalised in place of it
      let scale = inverseSqrt(squares[r] / f32(4 * k) + EPSILON);
      let a = v * scale + bias[column];
      v = a / (1 + exp(-max(a, vec4f(-80)))) * (others[r] * scale + bias[width + column]);
    } else {
      v += bias[column];
    }
    if (RELU) { v = max(v, vec4f()); }
    if (ADD) { v += out[at]; }
    out[at] = v;
  }
}

// A depthwise 3x3 convolution of x [rows, columns, c], zero around it; weight [3, 3, c]. size: rows, columns, c / 4.
@compute @workgroup_size(64)
fn depthwise(@builtin(global_invocation_id) id: vec3u) {
  let c = size.z;
  let place = vec2u(id.x / c, id.y);
  let channel = id.x % c;
  if (place.x >= size.y) { return; }
  var sum = bias[channel];
  for (var k = 0u; k < 9; k++) {
    let near = place + vec2u(k % 3, k / 3); // one more than the neighbour's
    if (near.x > 0 && near.y > 0 && near.x <= size.y && near.y <= size.x) {
      sum += x[((near.y - 1) * size.y + near.x - 1) * c + channel] * weight[k * c + channel];
    }
  }
  out[(place.y * size.y + place.x) * c + channel] = sum;
}

// size: numbers of a place, numbers of a row.
@compute @workgroup_size(64)
fn gather(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= size.y) { return; }
  to[id.y * size.y + id.x] = source[offsets_down[id.y * size.x + id.x % size.x] + offsets_across[id.x]];
}

// source is the lower layer. size: columns, columns of the lower layer, channels of features, functions.
@compute @workgroup_size(64)
fn sample(@builtin(global_invocation_id) id: vec3u) {
  let n = size.w;
  let c = id.x % 3;
  let i = id.y * (AXIS + n);
  let j = id.x / 3 * (AXIS + n);
  if (id.x >= 3 * size.x) { return; }
  var sum = 0.0;
  for (var y = 0u; y < 4; y++) {
    var line = 0.0;
    for (var x = 0u; x < 4; x++) {
      line += across[j + 5 + x] * source[(u32(down[i + 1 + y]) * size.y + u32(across[j + 1 + x])) * 3 + c];
    }
    sum += down[i + 5 + y] * line;
  }
  let row = u32(down[i]);
  let column = u32(across[j]);
  let place = row / 2 * ((size.y + 1) / 2) + column / 2;
  let at = place * size.z + (row % 2 * 6 + column % 2 * 3 + c) * n;
  for (var k = 0u; k < n; k++) { sum += features[at + k] * down[i + AXIS + k] * across[j + AXIS + k]; }
  to[id.y * 3 * size.x + id.x] = sum;
}
`;
const PIPELINES = [
  ["multiply", "multiply"],
  ["added", "multiply", { ADD: 1 }],
  ["gated", "multiply", { GATED: 1 }],
  ["rectified", "multiply", { RELU: 1 }],
  ["depthwise", "depthwise"],
  ["gather", "gather"],
  ["sample", "sample"],
];
const LEAST = 2 ** 16; // pixels of a layer: smaller ones are done sooner than weights have gone there and pixels have come back
const ERRORS = ["validation", "out-of-memory", "internal"];

/** What a promise gives, in a generator whose caller waits for promises. */
function* waited(promise) {
  const [{ value, reason }] = yield Promise.allSettled([promise]);
  if (reason) throw reason;
  return value;
}

export class Gpu {
  /** Null without WebGPU, where the only adapter is software, and where a shader does not compile. */
  static async load() {
    try {
      const adapter = await navigator.gpu?.requestAdapter();
      if (!adapter || (adapter.info.isFallbackAdapter ?? adapter.isFallbackAdapter)) return null;
      const { maxStorageBufferBindingSize, maxBufferSize } = adapter.limits;
      const gpu = new Gpu(await adapter.requestDevice({ requiredLimits: { maxStorageBufferBindingSize, maxBufferSize } }));
      const module = gpu.device.createShaderModule({ code: SHADERS });
      const made = PIPELINES.map(async ([name, entryPoint, constants]) => {
        const compute = { module, entryPoint, constants };
        gpu.pipelines[name] = await gpu.device.createComputePipelineAsync({ layout: "auto", compute });
      });
      await Promise.all(made);
      return gpu;
    } catch (error) {
      console.warn(`WebGPU: ${error.message}`);
      return null;
    }
  }
  constructor(device) {
    this.device = device;
    this.pipelines = {};
    this.taken = [];
    this.least = LEAST;
    this.most = Math.min(device.limits.maxStorageBufferBindingSize, device.limits.maxBufferSize); // bytes of an array
  }
  /** Runs steps, and throws what the device reports of them. */
  *checked(steps) {
    let reported;
    for (const kind of ERRORS) this.device.pushErrorScope(kind);
    try {
      const result = yield* steps;
      reported = ERRORS.map(() => this.device.popErrorScope());
      const error = (yield* waited(Promise.all(reported))).find(Boolean);
      if (error) throw new Error(error.message);
      return result;
    } finally {
      if (!reported) for (const _ of ERRORS) this.device.popErrorScope().catch(() => {});
    }
  }

  mark() {
    return this.taken.length;
  }
  release(mark) {
    for (const buffer of this.taken.splice(mark)) buffer.destroy(); // once what was submitted is done
  }
  buffer(count, usage, mappedAtCreation = false) {
    if (4 * count > this.most) throw new RangeError(`an array of ${4 * count} bytes; the device takes ${this.most}`);
    const made = this.device.createBuffer({ size: 4 * count, usage, mappedAtCreation });
    this.taken.push(made);
    return made;
  }
  take(count) {
    return this.buffer(count, GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC);
  }
  zeros(count) {
    return this.take(count); // as WebGPU makes them
  }
  put(numbers, usage = GPUBufferUsage.STORAGE) {
    const made = this.buffer(numbers.length, usage, true);
    new numbers.constructor(made.getMappedRange()).set(numbers);
    made.unmap();
    return made;
  }
  /** Weights [m, k], row by row, as [k, m]. Columns are filled up to 4. */
  matrix(weight, bias, m, k) {
    const columns = Math.ceil(m / 4) * 4, turned = new Float32Array(k * columns), shifts = new Float32Array(columns);
    for (let j = 0; j < m; j++) for (let i = 0; i < k; i++) turned[i * columns + j] = weight[j * k + i];
    if (bias) shifts.set(bias);
    return { weight: this.put(turned), bias: this.put(shifts), m: columns, k };
  }
  *numbers(x, count) {
    const copy = this.buffer(count, GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST);
    const encoder = this.device.createCommandEncoder();
    encoder.copyBufferToBuffer(x, 0, copy, 0, 4 * count);
    this.device.queue.submit([encoder.finish()]);
    yield* waited(copy.mapAsync(GPUMapMode.READ));
    return new Float32Array(copy.getMappedRange());
  }

  /** Runs a shader in columns x rows workgroups; the buffers are its bindings from 1 on. */
  *run(name, sizes, buffers, columns, rows) {
    const { device } = this, pipeline = this.pipelines[name], limit = device.limits.maxComputeWorkgroupsPerDimension;
    if (columns > limit || rows > limit) throw new RangeError(`${columns} x ${rows} workgroups; the device takes ${limit}`);
    const all = [this.put(Uint32Array.from({ ...sizes, length: 4 }), GPUBufferUsage.UNIFORM), ...buffers];
    const entries = all.map((buffer, binding) => ({ binding, resource: { buffer } }));
    const encoder = device.createCommandEncoder(), pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(columns, rows);
    pass.end();
    device.queue.submit([encoder.finish()]);
    yield;
  }
  *product(name, x, n, { weight, bias, m, k }, out, columns = m) {
    yield* this.run(name, [n, k / 4, m / 4], [x, weight, bias, out], Math.ceil(columns / 32), Math.ceil(n / 32));
    return out;
  }
  multiply(x, n, matrix, onto) {
    return this.product(onto ? "added" : "multiply", x, n, matrix, onto ?? this.take(n * matrix.m));
  }
  *block(x, rows, columns, { taps, bias, p1, p2, gated }) {
    const mark = this.mark(), n = rows * columns, c = p2.m, h = this.take(n * c), wide = this.take(n * p2.k);
    yield* this.run("depthwise", [rows, columns, c / 4], [x, taps, bias, h], Math.ceil((columns * c) / 256), rows);
    yield* this.product(gated ? "gated" : "rectified", h, n, p1, wide, p2.k);
    yield* this.multiply(wide, n, p2, x);
    this.release(mark);
  }
  *gather(x, down, across, size) {
    const rows = down.length / size, line = across.length, out = this.take(rows * line);
    yield* this.run("gather", [size, line], [x, this.put(down), this.put(across), out], Math.ceil(line / 64), rows);
    return out;
  }
  *sample(low, w, features, stride, down, across, n, out) {
    const height = down.length / (AXIS + n), width = across.length / (AXIS + n);
    const buffers = [low, this.put(down), this.put(across), out, features];
    yield* this.run("sample", [width, w, stride, n], buffers, Math.ceil((3 * width) / 64), height);
  }
}
