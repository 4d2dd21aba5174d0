/**
 * Search by paragraph: exact, over all pictures, with what each sentence of the text adds.
 *
 * The rules are those of photo_search/searching.py. Shapes: D features.
 */

import { InputError, type Answer, type Hit } from "../protocol";
import type { Contents, IndexStore } from "./index_store";
import type { Model } from "./model";
import { splitSentences } from "./sentences";

/** The `top` pictures of the highest cosines, the best first; equal scores are in the order of their names. */
export async function search(
  store: IndexStore,
  { pictures, features }: Contents,
  model: Model,
  text: string,
  top: number,
): Promise<Answer> {
  if (!text.trim()) throw new InputError("nothing to look for: describe a picture");
  const found = [...pictures.values()].filter(({ sha256 }) => features.has(sha256));
  if (!found.length) throw new InputError("no pictures to search: choose a folder of photos first");
  found.sort((one, other) => (one.name < other.name ? -1 : 1));
  const vectors = found.map(({ sha256 }) => features.get(sha256)!);
  const split = splitSentences(text);
  const sentences = split.length > 1 ? split : [];
  const scores = cosines(vectors, await model.encodeText(text));
  const bySentence: Float32Array[] = [];
  for (const sentence of sentences) bySentence.push(cosines(vectors, await model.encodeText(sentence)));
  const order = found.map((_, row) => row).sort((one, other) => scores[other]! - scores[one]!); // stable
  const hits = order.slice(0, top).map(async (row): Promise<Hit> => ({
    name: found[row]!.name,
    score: scores[row]!,
    sentences: sentences.map((sentence, place) => {
      const all = bySentence[place]!;
      return {
        text: sentence,
        score: all[row]!,
        rank: 1 + all.reduce((count, one) => count + Number(one > all[row]!), 0),
      };
    }),
    thumbnail: await store.thumbnail(found[row]!.sha256),
  }));
  const { tokens, ids } = model.read(text);
  return { hits: await Promise.all(hits), pictures: found.length, tokens, read: ids.length };
}

/** The product of each feature [D] with `direction` [D]. */
function cosines(vectors: Float32Array[], direction: Float32Array): Float32Array {
  return Float32Array.from(vectors, (vector) => {
    let sum = 0;
    for (let place = 0; place < direction.length; place += 1) sum += vector[place]! * direction[place]!;
    return sum;
  });
}
