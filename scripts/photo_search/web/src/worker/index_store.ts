/**
 * The index of pictures in IndexedDB. A feature belongs to the contents of a file, by their sha256, so that renamed
 * files keep it and copies share it. Features of another model go when the model changes.
 */

import type { ModelFiles } from "./model";

const DATABASE = "photo-search";
const VERSION = 1;
const TABLES = ["model", "pictures", "features", "thumbnails"] as const;
type Table = (typeof TABLES)[number];

/** A file that was read: its feature, or why it has none. */
export interface Picture {
  name: string;
  size: number;
  /** Time of its last change, in milliseconds. */
  changed: number;
  sha256: string;
  problem: string | null;
}

/** What a search and an update read. */
export interface Contents {
  pictures: Map<string, Picture>;
  /** By sha256. */
  features: Map<string, Float32Array>;
}

/** New contents, by sha256. */
export interface Embedded {
  feature: Float32Array;
  thumbnail: Blob;
}

/** The open database. Every method is one transaction. */
export class IndexStore {
  private constructor(private readonly database: IDBDatabase) {}

  static async open(): Promise<IndexStore> {
    const opening = indexedDB.open(DATABASE, VERSION);
    opening.onupgradeneeded = () => TABLES.forEach((table) => opening.result.createObjectStore(table));
    const database = await result(opening);
    database.onversionchange = () => database.close();
    return new IndexStore(database);
  }

  async model(): Promise<ModelFiles | null> {
    const found = this.tables("readonly", "model").model.get("current");
    return ((await result(found)) as ModelFiles | undefined) ?? null;
  }

  /** Keep a model. The index is emptied if it is of another one. */
  async setModel(model: ModelFiles): Promise<void> {
    const known = await this.model();
    const tables = this.tables("readwrite", ...TABLES);
    tables.model.put(model, "current");
    if (known?.fingerprint !== model.fingerprint) {
      for (const table of ["pictures", "features", "thumbnails"] as const) tables[table].clear();
    }
    await finished(tables.model.transaction);
  }

  async contents(): Promise<Contents> {
    const tables = this.tables("readonly", "pictures", "features");
    const [pictures, keys, features] = await Promise.all([
      result<Picture[]>(tables.pictures.getAll()),
      result(tables.features.getAllKeys()),
      result<Float32Array[]>(tables.features.getAll()),
    ]);
    return {
      pictures: new Map(pictures.map((picture) => [picture.name, picture])),
      features: new Map(keys.map((key, index) => [String(key), features[index]!])),
    };
  }

  async add(pictures: Picture[], embedded: Map<string, Embedded>): Promise<void> {
    const tables = this.tables("readwrite", "pictures", "features", "thumbnails");
    for (const picture of pictures) tables.pictures.put(picture, picture.name);
    for (const [sha256, { feature, thumbnail }] of embedded) {
      tables.features.put(feature, sha256);
      tables.thumbnails.put(thumbnail, sha256);
    }
    await finished(tables.pictures.transaction);
  }

  /** Forget files, and contents that no file has any more. */
  async remove(names: Iterable<string>, contents: Iterable<string>): Promise<void> {
    const tables = this.tables("readwrite", "pictures", "features", "thumbnails");
    for (const name of names) tables.pictures.delete(name);
    for (const sha256 of contents) {
      tables.features.delete(sha256);
      tables.thumbnails.delete(sha256);
    }
    await finished(tables.pictures.transaction);
  }

  async thumbnail(sha256: string): Promise<Blob | null> {
    const found = this.tables("readonly", "thumbnails").thumbnails.get(sha256);
    return ((await result(found)) as Blob | undefined) ?? null;
  }

  async clear(): Promise<void> {
    const tables = this.tables("readwrite", ...TABLES);
    for (const table of TABLES) tables[table].clear();
    await finished(tables.model.transaction);
  }

  private tables<Name extends Table>(mode: IDBTransactionMode, ...names: Name[]): Record<Name, IDBObjectStore> {
    const transaction = this.database.transaction(names, mode);
    return Object.fromEntries(names.map((name) => [name, transaction.objectStore(name)])) as Record<
      Name,
      IDBObjectStore
    >;
  }
}

function result<Value>(request: IDBRequest<Value>): Promise<Value> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}
