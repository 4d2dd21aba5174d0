/** What lies beside the page: start.json names a model's folder and pictures, with which the page starts. */

import { InputError, type Named } from "../protocol";
import { MODEL_FILES } from "./model";

/** start.json. Addresses are relative to the page. */
export interface Start {
  model?: { name: string; address: string; fingerprint: string };
  pictures?: { folder: string; files: { name: string; address: string; size: number; changed: number }[] };
}

/** Read start.json; empty if the page is offline. */
export async function readStart(page: string): Promise<Start> {
  try {
    const response = await fetch(new URL("start.json", page), { cache: "no-cache" });
    return response.ok ? ((await response.json()) as Start) : {};
  } catch {
    return {};
  }
}

export async function fetchModel(page: string, model: NonNullable<Start["model"]>): Promise<Named[]> {
  return Promise.all(
    MODEL_FILES.map(async (name) => {
      const content = await fetchFile(new URL(`${model.address}/${name}`, page));
      return { path: `${model.name}/${name}`, file: new File([content], name) };
    }),
  );
}

/** A picture beside the page, as a file that is fetched when it is read. */
export class FileBeside extends File {
  constructor(
    name: string,
    private readonly address: URL,
    private readonly length: number,
    changed: number,
  ) {
    super([], name, { lastModified: changed });
  }

  override get size(): number {
    return this.length;
  }

  override async arrayBuffer(): Promise<ArrayBuffer> {
    return (await fetchFile(this.address)).arrayBuffer();
  }
}

export function picturesBeside(page: string, { folder, files }: NonNullable<Start["pictures"]>): Named[] {
  return files.map(({ name, address, size, changed }) => ({
    path: `${folder}/${name}`,
    file: new FileBeside(name, new URL(address, page), size, changed),
  }));
}

async function fetchFile(address: URL): Promise<Blob> {
  const response = await fetch(address).catch(() => null);
  if (!response?.ok) throw new InputError(`the server of this page does not give ${address.pathname}`);
  return response.blob();
}
