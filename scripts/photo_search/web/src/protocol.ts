/** What the page and its worker say to each other. */

/** A file that the user chose, or that lies beside the page. */
export interface Named {
  /** With the name of the chosen folder in front: "photos/2024/garden.jpg". */
  path: string;
  file: File;
}

/** One sentence of the text against one picture. */
export interface SentenceScore {
  text: string;
  /** Cosine. */
  score: number;
  /** 1 for the picture that fits this sentence best. */
  rank: number;
}

export interface Hit {
  name: string;
  score: number;
  /** In the order of the text; none if the text is a single sentence. */
  sentences: SentenceScore[];
  thumbnail: Blob | null;
}

export interface Answer {
  hits: Hit[];
  /** Number of pictures that were searched. */
  pictures: number;
  /** Tokens of the text, and how many of them the model reads. */
  tokens: number;
  read: number;
}

/** What indexing did, in numbers of files. */
export interface Update {
  embedded: number;
  /** New names of contents that had a feature: renamed, moved or copied files. */
  known: number;
  unchanged: number;
  removed: number;
  /** Whether it was stopped before the end. */
  stopped: boolean;
}

export interface State {
  model: { name: string; contextLength: number } | null;
  /** Number of pictures that can be searched. */
  pictures: number;
  /** Why pictures could not be read: name, reason. */
  problems: [string, string][];
  threads: number;
}

export interface Progress {
  what: string;
  done: number;
  total: number;
}

/** The calls that the worker answers. */
export interface Calls {
  /** Read what this browser holds, and the model and pictures beside the page, if any: the update of the latter. */
  open(page: string): Promise<Update | null>;
  useModel(files: Named[]): Promise<State>;
  /** Bring the index up to date. With `folder`, pictures below it that are not among `files` leave the index. */
  addPictures(files: Named[], folder: string | null): Promise<Update>;
  search(text: string, top: number): Promise<Answer>;
  state(): Promise<State>;
  stop(): Promise<void>;
  /** Delete model, index and small pictures from this browser. */
  forget(): Promise<State>;
}

export type Request = {
  [Name in keyof Calls]: { id: number; call: Name; given: Parameters<Calls[Name]> };
}[keyof Calls];

export type Reply =
  | { id: number; value: unknown }
  | { id: number; error: string; expected: boolean }
  | { progress: Progress; state: State };

/** Bad input. The message says in one line what is wrong and what to do. */
export class InputError extends Error {}
