/** The pictures that were found. */

import type { Answer, Hit, SentenceScore } from "../protocol";
import { byId, counted, element } from "./elements";

const FAR = 0.25; // a sentence for which a quarter of all pictures fit better is shown pale
let addresses: string[] = [];

/** Show what was found for a text. */
export function showAnswer(text: string, { hits, pictures, tokens, read }: Answer): void {
  clearResults();
  const parts = [`The best ${hits.length} of ${counted(pictures, "picture")}.`];
  if (hits[0]?.sentences.length) parts.push("Beside each sentence: the picture's place for that sentence alone.");
  byId("summary").textContent = parts.join(" ");
  byId("length").textContent = tokens > read ? `The text has ${tokens} tokens; the model reads the first ${read}.` : "";
  byId("hits").append(...hits.map((hit, index) => card(hit, index + 1, pictures)));
  byId("more").hidden = hits.length >= pictures;
  document.body.dataset["answered"] = text; // whoever drives the page from outside waits for it
}

/** Show none. */
export function clearResults(): void {
  byId("hits").replaceChildren();
  byId("summary").textContent = byId("length").textContent = "";
  byId("more").hidden = true;
  addresses.forEach((address) => URL.revokeObjectURL(address));
  addresses = [];
}

function card(hit: Hit, number: number, pictures: number): HTMLLIElement {
  const name = hit.name.slice(hit.name.lastIndexOf("/") + 1);
  const title = element("h3", "", `${number}. ${name}`);
  const path = element("p", "pale path", hit.name === name ? "" : hit.name.slice(0, -name.length - 1));
  const score = element("p", "score", hit.score.toFixed(3));
  score.title = "cosine of picture and text";
  const head = element("div", "head", element("div", "names", title, path), score);
  const rows = hit.sentences.map((one) => row(one, pictures));
  const item = element("li", "", thumbnail(hit, name), head);
  if (rows.length) {
    const table = element("table", "", element("tbody", "", ...rows));
    table.ariaLabel = "sentences";
    item.append(table);
  }
  item.dataset["name"] = hit.name;
  item.dataset["score"] = String(hit.score);
  return item;
}

function thumbnail({ thumbnail: blob }: Hit, name: string): HTMLElement {
  if (!blob) return element("div", "gone", "no small picture");
  const image = element("img", "");
  image.src = URL.createObjectURL(blob);
  image.alt = name;
  addresses.push(image.src);
  return image;
}

function row({ text, score, rank }: SentenceScore, pictures: number): HTMLTableRowElement {
  const place = element("td", "place", `${rank.toLocaleString("en")} of ${pictures.toLocaleString("en")}`);
  place.title = `cosine ${score.toFixed(3)}`;
  return element("tr", rank > FAR * pictures ? "far" : "", place, element("td", "", text));
}
