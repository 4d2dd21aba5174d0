/** The worker: it holds model and index, and answers the page's calls. */

import {
  InputError,
  type Answer,
  type Calls,
  type Named,
  type Progress,
  type Reply,
  type Request,
  type State,
  type Update,
} from "../protocol";
import { fetchModel, picturesBeside, readStart } from "./beside";
import { checkExactPixels } from "./images";
import { isBelow, update } from "./indexing";
import { IndexStore, type Contents } from "./index_store";
import { Model, modelIn, THREADS, type ModelFiles } from "./model";
import { search } from "./searching";

const LOCK = "photo-search-index"; // one page at a time writes the index
const NO_ROOM = "this browser has no room left: free some of the disk, or choose fewer pictures";
const OTHER_MODEL = "another tab has changed or deleted the model: load this page again";
const CHOOSE_A_MODEL = "choose a model first: a folder that scripts/export.py wrote";

class Service implements Calls {
  private model: Model | null = null;
  private contents: Contents = { pictures: new Map(), features: new Map() };
  /** Files that were chosen since the page was opened, by path: another model reads them again. */
  private readonly chosen = new Map<string, Named>();
  private isStopped = false;

  private constructor(private readonly store: IndexStore) {}

  static async start(): Promise<Service> {
    checkExactPixels();
    return new Service(await IndexStore.open());
  }

  async open(page: string): Promise<Update | null> {
    const [kept, start] = [await this.store.model(), await readStart(page)];
    if (kept) this.model = await Model.open(kept);
    this.contents = await this.store.contents();
    const isNewer = start.model && (!kept || (kept.isBeside && kept.fingerprint !== start.model.fingerprint));
    if (isNewer) {
      this.report({ what: "Fetching the model", done: 0, total: 1 });
      const model = await modelIn(await fetchModel(page, start.model!), true);
      if (model) await this.take(model);
    }
    if (!start.pictures?.files.length || !this.model) return null;
    return this.addPictures(picturesBeside(page, start.pictures), start.pictures.folder);
  }

  async useModel(files: Named[]): Promise<State> {
    const model = await modelIn(files, false);
    if (!model) throw new InputError("no exported model there: choose a folder that scripts/export.py wrote");
    await this.take(model);
    const chosen = [...this.chosen.values()];
    if (chosen.length) await this.addPictures(chosen, null);
    return this.state();
  }

  async addPictures(files: Named[], folder: string | null): Promise<Update> {
    if (folder !== null) [...this.chosen.keys()].filter(isBelow(folder)).forEach((path) => this.chosen.delete(path));
    for (const named of files) this.chosen.set(named.path, named);
    const model = this.ready();
    return alone(async () => {
      if ((await this.store.model())?.fingerprint !== model.source.fingerprint) throw new InputError(OTHER_MODEL);
      this.isStopped = false;
      this.contents = await this.store.contents(); // another page may have written it
      const index = { store: this.store, contents: this.contents, model };
      this.report({ what: "Looking at the files", done: 0, total: 1 });
      return update(
        index,
        files,
        folder,
        (progress) => this.report(progress),
        () => this.isStopped,
      );
    });
  }

  async search(text: string, top: number): Promise<Answer> {
    return search(this.store, this.contents, this.ready(), text, top);
  }

  async state(): Promise<State> {
    return this.held();
  }

  async stop(): Promise<void> {
    this.isStopped = true;
  }

  async forget(): Promise<State> {
    await alone(() => this.store.clear());
    this.model = null;
    this.contents = await this.store.contents();
    this.chosen.clear();
    return this.held();
  }

  private held(): State {
    const { pictures, features } = this.contents;
    const all = [...pictures.values()];
    return {
      model: this.model && { name: this.model.source.name, contextLength: this.model.contextLength },
      pictures: all.filter(({ sha256 }) => features.has(sha256)).length,
      problems: all
        .flatMap(({ name, problem }): [string, string][] => (problem === null ? [] : [[name, problem]]))
        .sort(),
      threads: THREADS,
    };
  }

  /** Try a model, and keep it if it works: a model that cannot be used changes nothing. */
  private async take(files: ModelFiles): Promise<void> {
    this.report({ what: "Loading the model", done: 0, total: 1 });
    const model = await Model.open(files);
    await model.encodeText("a test");
    await model.encodeImages([new Uint8Array(3 * model.side ** 2)]);
    await alone(() => this.store.setModel(files));
    this.model = model;
    this.contents = await this.store.contents();
  }

  private report(progress: Progress): void {
    send({ progress, state: this.held() });
  }

  private ready(): Model {
    if (!this.model) throw new InputError(CHOOSE_A_MODEL);
    return this.model;
  }
}

/** Run while no other page writes the index. */
async function alone<Value>(work: () => Promise<Value>): Promise<Value> {
  const done: { value: Value }[] = [];
  await navigator.locks.request(LOCK, { ifAvailable: true }, async (lock) => {
    if (!lock) throw new InputError("the index is being written, here or in another tab: wait for it to end");
    done.push({ value: await work() });
  });
  return done[0]!.value;
}

function asTold(error: unknown): Error {
  if (!(error instanceof Error)) return new Error(String(error));
  return error.name === "QuotaExceededError" ? new InputError(NO_ROOM) : error;
}

function send(reply: Reply): void {
  self.postMessage(reply);
}

const service = Service.start();

self.onmessage = async ({ data: { id, call, given } }: MessageEvent<Request>): Promise<void> => {
  try {
    const method = (await service)[call] as (...given: unknown[]) => Promise<unknown>;
    send({ id, value: await method.apply(await service, given) });
  } catch (error) {
    const told = asTold(error);
    send({ id, error: told.message.split("\n")[0]!, expected: told instanceof InputError });
  }
};
