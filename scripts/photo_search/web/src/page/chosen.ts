/** Files that the user chooses or drops, with their paths. */

import type { Named } from "../protocol";

/** What was chosen together: a folder with all below it, or single files. */
export interface Chosen {
  /** The folder's name, with which all paths begin; null for single files. */
  folder: string | null;
  files: Named[];
}

/** The files of an input, which is one for a folder if it has `webkitdirectory`. */
export function chosenIn(input: HTMLInputElement): Chosen[] {
  const files = [...(input.files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
  input.value = ""; // so that the same choice counts again
  const first = files[0];
  if (!first) return [];
  return [{ folder: input.webkitdirectory ? first.path.split("/")[0]! : null, files }];
}

/** Whether a folder is that of an exported model. */
export function isModel({ files }: Chosen): boolean {
  return files.some(({ path }) => path.split("/").at(-1) === "preprocessor_config.json");
}

/** What was dropped: each folder by itself, single files together. */
export async function dropped(items: DataTransferItemList): Promise<Chosen[]> {
  const entries = [...items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const folders = entries.filter((entry) => entry.isDirectory);
  const found = await Promise.all(folders.map(async (entry) => ({ folder: entry.name, files: await below(entry) })));
  const single = (await Promise.all(entries.filter((entry) => entry.isFile).map(below))).flat();
  return single.length ? [...found, { folder: null, files: single }] : found;
}

async function below(entry: FileSystemEntry): Promise<Named[]> {
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const found: Named[] = [];
  for (;;) {
    const part = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) return found; // a reader gives a hundred entries at a time
    for (const one of part) found.push(...(await below(one)));
  }
}
