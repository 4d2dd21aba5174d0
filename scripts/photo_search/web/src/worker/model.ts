/**
 * An exported model: pictures and texts to features of unit norm, by ONNX Runtime.
 *
 * Shapes: B pictures, R side of the model's picture, L tokens, D features.
 */

import * as ort from "onnxruntime-web/wasm";
import runtime from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import binary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import { InputError, type Named } from "../protocol";
import { Reader, type Read } from "./reader";
import type { Bytes, Resample } from "./resize";

const MANIFEST = "sha256.json";
export const SETTINGS = "preprocessor_config.json";
const TOKENIZER = "tokenizer.json";
const IMAGE_GRAPH = "onnx/vision_model.onnx";
const TEXT_GRAPH = "onnx/text_model.onnx";
/** The files that are used, in the order of the fingerprint that scripts/search_photos.py computes too. */
const USED = [SETTINGS, TOKENIZER, IMAGE_GRAPH, TEXT_GRAPH];
/** What is read of a model's folder. */
export const MODEL_FILES = [MANIFEST, ...USED];
const EXPORT_AGAIN = "export the model again with scripts/export.py";

/** Threads need shared memory, which pages have if their server sends the headers of cross-origin isolation. */
export const THREADS = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
ort.env.wasm.numThreads = THREADS;
ort.env.wasm.wasmPaths = {
  mjs: new URL(runtime, self.location.href).href,
  wasm: new URL(binary, self.location.href).href,
};
ort.env.logLevel = "error";

/** A model's files as this browser keeps them. */
export interface ModelFiles {
  name: string;
  /** It differs between models that give other features. */
  fingerprint: string;
  /** Whether it lies beside the page; otherwise the user chose it. */
  isBeside: boolean;
  files: Record<string, Blob>;
}

interface Settings {
  size: { shortest_edge: number };
  crop_size: { height: number; width: number };
  resample: Resample;
  rescale_factor: number;
  do_normalize: boolean;
  image_mean: number[];
  image_std: number[];
}

/** Find the model in a chosen folder; null if there is none. Raises InputError if files are not those of the export. */
export async function modelIn(chosen: Named[], isBeside: boolean): Promise<ModelFiles | null> {
  const paths = new Map(chosen.map(({ path, file }) => [path, file]));
  const folders = [...paths.keys()].filter((path) => `/${path}`.endsWith(`/${SETTINGS}`));
  const root = folders.map((path) => path.slice(0, -SETTINGS.length)).sort((a, b) => a.length - b.length)[0];
  if (root === undefined) return null;
  const name = root.split("/").at(-2) ?? "model";
  const files: Record<string, Blob> = {};
  for (const file of MODEL_FILES) {
    const found = paths.get(root + file);
    if (!found) throw new InputError(`${name} has no ${file}: choose a folder that scripts/export.py wrote`);
    files[file] = found;
  }
  const hashes = await checkedHashes(name, files);
  const fingerprint = await sha256(new TextEncoder().encode(hashes.join("\n")));
  return { name, fingerprint, isBeside, files };
}

/** The hash of each used file, which must be that of the manifest. */
async function checkedHashes(name: string, files: Record<string, Blob>): Promise<string[]> {
  const manifest = await json<Record<string, string>>(files, MANIFEST);
  return Promise.all(
    USED.map(async (file) => {
      const found = await sha256(await files[file]!.arrayBuffer());
      if (found !== manifest[file])
        throw new InputError(`${name}/${file} is not the file that was exported: ${EXPORT_AGAIN}`);
      return found;
    }),
  );
}

/** A model that is ready. Each tower is loaded when it is first used. */
export class Model {
  private readonly sessions = new Map<string, Promise<ort.InferenceSession>>();
  private last: Promise<unknown> = Promise.resolve();

  private constructor(
    readonly source: ModelFiles,
    private readonly settings: Settings,
    private readonly reader: Reader,
  ) {}

  static async open(source: ModelFiles): Promise<Model> {
    const settings = await json<Settings>(source.files, SETTINGS);
    const { size, crop_size: crop, resample } = settings;
    if (
      !size ||
      crop?.height !== size.shortest_edge ||
      crop.width !== size.shortest_edge ||
      ![2, 3].includes(resample)
    ) {
      throw new InputError(`${source.name}/${SETTINGS} resizes in another way: ${EXPORT_AGAIN}`);
    }
    const tokenizer = await json<ConstructorParameters<typeof Reader>[0]>(source.files, TOKENIZER);
    try {
      return new Model(source, settings, new Reader(tokenizer));
    } catch (error) {
      throw new InputError(`${source.name}/${TOKENIZER} cannot be read (${String(error)}): ${EXPORT_AGAIN}`);
    }
  }

  get side(): number {
    return this.settings.size.shortest_edge;
  }

  get resample(): Resample {
    return this.settings.resample;
  }

  get contextLength(): number {
    return this.reader.contextLength;
  }

  /** Pictures, bytes [R, R, 3] each, to features [D] each. */
  async encodeImages(pictures: Bytes[]): Promise<Float32Array[]> {
    const { side } = this;
    const values = new Float32Array(pictures.length * 3 * side * side);
    pictures.forEach((picture, index) => this.normalise(picture, values.subarray(index * picture.length)));
    const found = await this.run(IMAGE_GRAPH, new ort.Tensor("float32", values, [pictures.length, 3, side, side]));
    const width = found.length / pictures.length;
    return pictures.map((_, index) => found.slice(index * width, (index + 1) * width));
  }

  /** A text to its feature [D]. */
  async encodeText(text: string): Promise<Float32Array> {
    const { ids } = this.read(text);
    return this.run(TEXT_GRAPH, new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]));
  }

  read(text: string): Read {
    return this.reader.read(text);
  }

  /** Write a picture, bytes [R, R, 3], as the image tower takes it, [3, R, R]. In float32 at each step, as NumPy. */
  private normalise(picture: Bytes, values: Float32Array): void {
    const { rescale_factor: scale, do_normalize: isNormalised, image_mean: mean, image_std: std } = this.settings;
    const size = picture.length / 3;
    const factor = Math.fround(scale);
    for (let channel = 0; channel < 3; channel += 1) {
      const [shift, width] = isNormalised ? [Math.fround(mean[channel]!), Math.fround(std[channel]!)] : [0, 1];
      for (let place = 0; place < size; place += 1) {
        const value = Math.fround(picture[place * 3 + channel]! * factor);
        values[channel * size + place] = Math.fround(value - shift) / width;
      }
    }
  }

  /** One call at a time, since a search may come while pictures are encoded. */
  private run(graph: string, given: ort.Tensor): Promise<Float32Array> {
    const result = this.last.then(() => this.runAlone(graph, given));
    this.last = result.catch(() => {});
    return result;
  }

  private async runAlone(graph: string, given: ort.Tensor): Promise<Float32Array> {
    const session = await this.session(graph);
    const { [session.outputNames[0]!]: output } = await session.run({ [session.inputNames[0]!]: given });
    const features = output!.data as Float32Array;
    const width = output!.dims.at(-1)!;
    for (let row = 0; row < features.length; row += width) {
      const norm = Math.hypot(...features.subarray(row, row + width));
      if (!(Math.abs(norm - 1) < 1e-3)) {
        throw new InputError(`${this.source.name} gives features that are not of unit norm: ${EXPORT_AGAIN}`);
      }
    }
    return features;
  }

  private session(graph: string): Promise<ort.InferenceSession> {
    const known = this.sessions.get(graph) ?? this.load(graph);
    this.sessions.set(graph, known);
    return known;
  }

  private async load(graph: string): Promise<ort.InferenceSession> {
    const bytes = await this.source.files[graph]!.arrayBuffer();
    try {
      return await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    } catch (error) {
      throw new InputError(
        `${this.source.name}/${graph} cannot be loaded (${String(error).split("\n")[0]}): ${EXPORT_AGAIN}`,
      );
    }
  }
}

export async function sha256(bytes: BufferSource): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function json<Content extends object>(files: Record<string, Blob>, name: string): Promise<Content> {
  try {
    const content: unknown = JSON.parse(await files[name]!.text());
    if (typeof content === "object" && content !== null) return content as Content;
  } catch {
    // told below
  }
  throw new InputError(`${name} is no JSON object: ${EXPORT_AGAIN}`);
}
