/** Texts to token ids, as the model was trained to read them. */

import { Tokenizer } from "@huggingface/tokenizers";

/** A text as tokens. */
export interface Read {
  /** What the model reads: at most its length, with the end token kept. */
  ids: number[];
  /** Tokens of the whole text. */
  tokens: number;
}

/** The tokenizer of an exported model, made from its tokenizer.json. */
export class Reader {
  readonly contextLength: number;
  private readonly tokenizer: Tokenizer;

  constructor(settings: { truncation: { max_length: number } }) {
    this.contextLength = settings.truncation.max_length;
    if (!Number.isInteger(this.contextLength)) throw new Error("it does not say how many tokens the model reads");
    this.tokenizer = new Tokenizer(settings, {});
  }

  /** The library does not cut long texts, so they are cut here: as training does it, in front of the end token. */
  read(text: string): Read {
    const ids = this.tokenizer.encode(text.replace(/\p{Surrogate}/gu, "?")).ids;
    const kept = ids.length > this.contextLength ? [...ids.slice(0, this.contextLength - 1), ids.at(-1)!] : ids;
    return { ids: kept, tokens: ids.length };
  }
}
