/**
 * Pillow's resize (Resample.c) of 8-bit RGB, to the last bit: each output pixel is a sum over the input pixels below
 * the filter, weighted in fixed point, first along rows, then along columns.
 *
 * Pixels are bytes [height, width, 4], whose fourth channel is left out, or [height, width, 3].
 */

export interface Pixels {
  width: number;
  height: number;
  /** Bytes per pixel, of which the first three are read. */
  channels: 3 | 4;
  data: Bytes;
}

export type Bytes = Uint8Array | Uint8ClampedArray;

/** The sides of a picture whose shorter one becomes `side`, as training computes them. */
export function scaledSize(width: number, height: number, side: number): [number, number] {
  const shorter = Math.min(width, height);
  return [Math.trunc((side * width) / shorter), Math.trunc((side * height) / shorter)];
}

const PRECISION = 22; // bits after the point: a byte, a sign and a bit of overshoot fit before it
const FILTERS = {
  2: { support: 1, weight: (x: number) => Math.max(0, 1 - Math.abs(x)) },
  3: { support: 2, weight: bicubic },
};
/** Pillow's numbers of the filters: bilinear and bicubic. */
export type Resample = keyof typeof FILTERS;

/** Resize the shorter side to `side` and cut the middle [side, side] out, as bytes [side, side, 3]. */
export function resizedCentre(pixels: Pixels, side: number, resample: Resample): Bytes {
  const [width, height] = scaledSize(pixels.width, pixels.height, side);
  const columns = weights(pixels.width, width, roundHalfEven((width - side) / 2), side, resample);
  const rows = weights(pixels.height, height, roundHalfEven((height - side) / 2), side, resample);
  const lost = { width: pixels.width - width, height: pixels.height - height };
  // since Pillow 13, a picture that loses height rather than width loses it first. The order changes the rounding
  if (lost.height > 0 && lost.height > 2 * lost.width) {
    const [first, end] = extent(columns);
    return alongRows(alongColumns(pixels, rows, first, end), moved(columns, first), 0, side).data;
  }
  const [first, end] = extent(rows);
  return alongColumns(alongRows(pixels, columns, first, end), moved(rows, first), 0, side).data;
}

interface Weighted {
  /** Place of the first input pixel. */
  first: number;
  /** Fixed-point weights of it and those that follow. */
  factors: Int32Array;
}

/** Weights of the output places `start` to `start + count`, of `to` places made from `from`. */
function weights(from: number, to: number, start: number, count: number, resample: Resample): Weighted[] {
  const { support, weight } = FILTERS[resample];
  const scale = from / to;
  const filterScale = Math.max(scale, 1);
  const reach = support * filterScale;
  return Array.from({ length: count }, (_, index) => {
    const place = start + index;
    if (from === to) return { first: place, factors: Int32Array.of(1 << PRECISION) }; // Pillow leaves the pass out
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const raw = Array.from({ length: end - first }, (_, x) => weight((x + first - centre + 0.5) * (1 / filterScale)));
    const sum = raw.reduce((total, one) => total + one, 0);
    return { first, factors: Int32Array.from(raw, (one) => fixed(sum === 0 ? one : one / sum)) };
  });
}

function fixed(weight: number): number {
  return Math.trunc(weight * (1 << PRECISION) + (weight < 0 ? -0.5 : 0.5));
}

function bicubic(signed: number): number {
  const a = -0.5;
  const x = Math.abs(signed);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** The input places that are read: the first one, and the one behind the last. */
function extent(all: Weighted[]): [number, number] {
  return [
    Math.min(...all.map(({ first }) => first)),
    Math.max(...all.map(({ first, factors }) => first + factors.length)),
  ];
}

/** Weights for a picture that begins at the input place `start`. */
function moved(all: Weighted[], start: number): Weighted[] {
  return all.map(({ first, factors }) => ({ first: first - start, factors }));
}

/** The rows from `start` to `end` at the new width. */
function alongRows({ width, channels, data }: Pixels, columns: Weighted[], start: number, end: number): Pixels {
  const result = new Uint8Array((end - start) * columns.length * 3);
  let out = 0;
  for (let y = start; y < end; y += 1) {
    for (const { first, factors } of columns) {
      sum(data, (y * width + first) * channels, channels, factors, result, out);
      out += 3;
    }
  }
  return { width: columns.length, height: end - start, channels: 3, data: result };
}

/** The columns from `start` to `end` at the new height. */
function alongColumns({ width, channels, data }: Pixels, rows: Weighted[], start: number, end: number): Pixels {
  const result = new Uint8Array(rows.length * (end - start) * 3);
  let out = 0;
  for (const { first, factors } of rows) {
    for (let x = start; x < end; x += 1) {
      sum(data, (first * width + x) * channels, width * channels, factors, result, out);
      out += 3;
    }
  }
  return { width: end - start, height: rows.length, channels: 3, data: result };
}

const HALF = 1 << (PRECISION - 1);

/** Write one pixel: the weighted sum of those at `place`, `place + step`, ... */
function sum(data: Bytes, place: number, step: number, factors: Int32Array, result: Uint8Array, out: number): void {
  let red = HALF;
  let green = HALF;
  let blue = HALF;
  for (let index = 0; index < factors.length; index += 1) {
    const factor = factors[index]!;
    red += data[place]! * factor;
    green += data[place + 1]! * factor;
    blue += data[place + 2]! * factor;
    place += step;
  }
  result[out] = byte(red);
  result[out + 1] = byte(green);
  result[out + 2] = byte(blue);
}

function byte(sum: number): number {
  return Math.min(255, Math.max(0, sum >> PRECISION));
}

/** Python's round(): halves go to the even neighbour. */
function roundHalfEven(value: number): number {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}
