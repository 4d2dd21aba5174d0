/** Bring the index up to date with chosen files: only what is new or changed is read, batch by batch. */

import { isPicture } from "../pictures";
import { InputError, type Named, type Progress, type Update } from "../protocol";
import { decode } from "./images";
import type { Contents, Embedded, IndexStore, Picture } from "./index_store";
import { sha256, type Model } from "./model";
import { resizedCentre, type Bytes } from "./resize";

/** Pictures that are encoded at a time, and stored in one transaction. */
const BATCH = 16;

interface Reading {
  picture: Picture;
  /** Of contents that have no feature yet. */
  pixels: Bytes | null;
  thumbnail: Blob | null;
}

/** What an update works on. `contents` is what the store holds, and is kept up to date. */
export interface Index {
  store: IndexStore;
  contents: Contents;
  model: Model;
}

/** Read what is new among `files`. With `folder`, what is below it in the index and not among them is removed. */
export async function update(
  index: Index,
  files: Named[],
  folder: string | null,
  report: (progress: Progress) => void,
  isStopped: () => boolean,
): Promise<Update> {
  const named = new Map(files.filter(({ path }) => isPicture(path)).map(({ path, file }) => [path, file]));
  if (!named.size)
    throw new InputError("no pictures there (JPEG, PNG, WebP, BMP, GIF; HEIC and TIFF if the browser reads them)");
  const known = index.contents.pictures;
  const changed = [...named].filter(([name, file]) => !isKnown(known.get(name), file)).sort(byName);
  const done: Update = { embedded: 0, known: 0, unchanged: named.size - changed.length, removed: 0, stopped: false };
  const start = performance.now();
  for (let first = 0; first < changed.length && !isStopped(); first += BATCH) {
    await addBatch(index, changed.slice(first, first + BATCH), done);
    const read = Math.min(first + BATCH, changed.length);
    const seconds = ((performance.now() - start) / 1000 / read) * (changed.length - read);
    report({ what: `Reading pictures, ${timeLeft(seconds)}`, done: read, total: changed.length });
  }
  done.stopped = isStopped();
  const gone = folder === null ? [] : [...known.keys()].filter(isBelow(folder)).filter((name) => !named.has(name));
  done.removed = gone.length;
  await remove(index, gone);
  return done;
}

/** Tells of paths whether they are below a folder. */
export function isBelow(folder: string): (path: string) => boolean {
  return (path) => path.startsWith(`${folder}/`);
}

async function addBatch(index: Index, batch: [string, File][], done: Update): Promise<void> {
  const readings: Reading[] = [];
  let next = read(index, ...batch[0]!);
  for (let place = 0; place < batch.length; place += 1) {
    const current = next; // the next one is decoded while this one is resized: two at a time are in memory
    if (place + 1 < batch.length) next = read(index, ...batch[place + 1]!);
    readings.push(await current);
  }
  const fresh = new Map(readings.filter(({ pixels }) => pixels).map((reading) => [reading.picture.sha256, reading]));
  const features = fresh.size ? await index.model.encodeImages([...fresh.values()].map(({ pixels }) => pixels!)) : [];
  const embedded = new Map<string, Embedded>();
  [...fresh].forEach(([key, { thumbnail }], place) =>
    embedded.set(key, { feature: features[place]!, thumbnail: thumbnail! }),
  );
  const pictures = readings.map(({ picture }) => picture);
  await index.store.add(pictures, embedded);
  for (const picture of pictures) index.contents.pictures.set(picture.name, picture);
  for (const [key, { feature }] of embedded) index.contents.features.set(key, feature);
  done.embedded += embedded.size;
  done.known += pictures.filter(({ problem }) => problem === null).length - embedded.size;
}

async function read(index: Index, name: string, file: File): Promise<Reading> {
  const picture: Picture = { name, size: file.size, changed: file.lastModified, sha256: "", problem: null };
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    picture.sha256 = await sha256(bytes);
    if (index.contents.features.has(picture.sha256)) return { picture, pixels: null, thumbnail: null };
    const { pixels, thumbnail } = await decode(bytes, index.model.side);
    return { picture, pixels: resizedCentre(pixels, index.model.side, index.model.resample), thumbnail };
  } catch (error) {
    picture.problem = reason(error);
    return { picture, pixels: null, thumbnail: null };
  }
}

/** Remove files from the index, and the features that no file has any more. */
async function remove({ store, contents }: Index, names: string[]): Promise<void> {
  for (const name of names) contents.pictures.delete(name);
  const used = new Set([...contents.pictures.values()].map((picture) => picture.sha256));
  const unused = [...contents.features.keys()].filter((key) => !used.has(key));
  for (const key of unused) contents.features.delete(key);
  if (names.length || unused.length) await store.remove(names, unused);
}

/** A file whose bytes were not read is tried again: it has no sha256. */
function isKnown(picture: Picture | undefined, file: File): boolean {
  return !!picture?.sha256 && picture.size === file.size && picture.changed === file.lastModified;
}

function reason(error: unknown): string {
  if (error instanceof InputError) return error.message;
  if (error instanceof DOMException) return "it cannot be read any more: it has changed or gone";
  throw error;
}

function timeLeft(seconds: number): string {
  return seconds < 90 ? `${Math.ceil(seconds)} s left` : `${Math.ceil(seconds / 60)} min left`;
}

function byName(one: [string, File], other: [string, File]): number {
  return one[0] < other[0] ? -1 : 1;
}
