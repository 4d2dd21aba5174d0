/** Pictures from files: decoded by the browser, upright, transparent pixels on white. */

import { InputError } from "../protocol";
import { scaledSize, type Pixels } from "./resize";
import { withoutExif } from "./upright";

/** The same bound as Pillow's, which photo_search/images.py has. */
const MOST_PIXELS = 89_478_485;
const TOO_LARGE = "too large for this browser";
const THUMBNAIL = 360; // pixels of the longer side
/** What turns a decoded picture of [width, height] upright, by EXIF orientation: a canvas transform. */
const TURNS: Record<number, (width: number, height: number) => [number, number, number, number, number, number]> = {
  1: () => [1, 0, 0, 1, 0, 0],
  2: (width) => [-1, 0, 0, 1, width, 0],
  3: (width, height) => [-1, 0, 0, -1, width, height],
  4: (_, height) => [1, 0, 0, -1, 0, height],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (_, height) => [0, 1, -1, 0, height, 0],
  7: (width, height) => [0, -1, -1, 0, height, width],
  8: (width) => [0, -1, 1, 0, 0, width],
};

export interface Decoded {
  pixels: Pixels;
  thumbnail: Blob;
}

/** Decode the bytes of a file, which are changed. Raises InputError with the reason if they cannot be used. */
export async function decode(bytes: Uint8Array<ArrayBuffer>, side: number): Promise<Decoded> {
  if (!bytes.length) throw new InputError("empty file");
  try {
    const canvas = await upright(bytes, side);
    const { width, height } = canvas;
    const data = context(canvas).getImageData(0, 0, width, height).data;
    return { pixels: { width, height, channels: 4, data }, thumbnail: await small(canvas) };
  } catch (error) {
    if (error instanceof DOMException || error instanceof RangeError) throw new InputError(TOO_LARGE);
    throw error;
  }
}

/** Raises InputError if this browser alters the pixels that a page reads, as some do against fingerprinting. */
export function checkExactPixels(): void {
  const canvas = new OffscreenCanvas(16, 16);
  const drawn = context(canvas);
  const wanted = drawn.createImageData(16, 16);
  wanted.data.forEach((_, place, data) => (data[place] = place % 4 === 3 ? 255 : (place * 37) % 256));
  drawn.putImageData(wanted, 0, 0);
  const found = drawn.getImageData(0, 0, 16, 16).data;
  if (found.some((value, place) => value !== wanted.data[place])) {
    throw new InputError(
      "this browser alters the pixels that pages read: allow canvas data for this page and reload it",
    );
  }
}

async function upright(bytes: Uint8Array<ArrayBuffer>, side: number): Promise<OffscreenCanvas> {
  const { orientation } = withoutExif(bytes);
  const bitmap = await bitmapOf(bytes);
  try {
    const { width, height } = bitmap;
    if (width * height > MOST_PIXELS) throw new InputError(`more than ${MOST_PIXELS} pixels`);
    const [scaledWidth, scaledHeight] = scaledSize(width, height, side);
    if (scaledWidth * scaledHeight > MOST_PIXELS) throw new InputError(`${width} x ${height} pixels are too narrow`);
    const canvas = orientation < 5 ? new OffscreenCanvas(width, height) : new OffscreenCanvas(height, width);
    const drawn = context(canvas);
    drawn.fillStyle = "white";
    drawn.fillRect(0, 0, canvas.width, canvas.height);
    drawn.setTransform(...TURNS[orientation]!(width, height));
    drawn.imageSmoothingEnabled = false;
    drawn.drawImage(bitmap, 0, 0);
    return canvas;
  } finally {
    bitmap.close();
  }
}

async function bitmapOf(bytes: Uint8Array<ArrayBuffer>): Promise<ImageBitmap> {
  try {
    // colours as they are in the file, as training reads them: without the conversion that its profile asks for
    return await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new InputError("damaged, or in a format that this browser does not read");
  }
}

async function small(canvas: OffscreenCanvas): Promise<Blob> {
  const scale = Math.min(1, THUMBNAIL / Math.max(canvas.width, canvas.height));
  const thumbnail = new OffscreenCanvas(...sides(canvas, scale));
  const drawn = context(thumbnail);
  drawn.imageSmoothingQuality = "high";
  drawn.drawImage(canvas, 0, 0, thumbnail.width, thumbnail.height);
  return thumbnail.convertToBlob({ type: "image/jpeg", quality: 0.8 });
}

function sides(canvas: OffscreenCanvas, scale: number): [number, number] {
  return [Math.max(1, Math.round(canvas.width * scale)), Math.max(1, Math.round(canvas.height * scale))];
}

function context(canvas: OffscreenCanvas): OffscreenCanvasRenderingContext2D {
  const found = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!found) throw new InputError(TOO_LARGE);
  return found;
}
