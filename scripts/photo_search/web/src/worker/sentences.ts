/** The sentences of a caption, found by the rule of photo_search/sentences.py, which explains it. */

const CLOSING = "\"'”’»)\\]";
const SPACE = "[\\s\\x1c-\\x1f\\x85]"; // as Python has it
const WORD = "\\p{L}\\p{N}_";
const END = new RegExp(
  `[.!?…؟।]+[${CLOSING}]*${SPACE}+|[。！？｡]+[${CLOSING}」』）】》]*${SPACE}*|${SPACE}*\\n${SPACE}*`,
  "gu",
);
const WITHIN = new Set("mr mrs ms dr prof st mt vs e.g i.e cf approx fig ca".split(" "));
const NUMBERED = new Set("no nos vol pg pp".split(" "));
const UNITS = new Set("ft in cm mm m km kg lb lbs oz sq min sec hr hrs yd".split(" "));
const OPEN = new Set("etc inc jr sr co ltd".split(" "));
const INITIAL = new RegExp(`(?:^|(?<![${WORD}])[A-Z][${WORD}.'’-]*${SPACE})[A-Z]$`, "u");
const ASKED_IN_QUOTES = /[!?…]+["'”’»]+$/u;
const DOTTED = new RegExp(`^[${WORD}](\\.[${WORD}])+$`, "u");
const CAPITAL = new RegExp(`(?<![${WORD}])[A-Z]$`, "u");
const EDGES = new RegExp(`^${SPACE}+|${SPACE}+$`, "gu");
const SPACES = new RegExp(`${SPACE}+`, "u");

/** Return the sentences of a caption, without the spaces around them; none for a blank caption. */
export function splitSentences(caption: string): string[] {
  const sentences: string[] = [];
  const hasCapitals = caption.toLowerCase() !== caption;
  let start = 0;
  for (const end of caption.matchAll(END)) {
    const after = end.index + end[0].length;
    const sentence = stripped(caption.slice(start, after));
    if (sentence && (end[0].includes("\n") || isEnd(sentence, caption.slice(after, after + 3), hasCapitals))) {
      sentences.push(sentence);
      start = after;
    }
  }
  const last = stripped(caption.slice(start));
  return last ? [...sentences, last] : sentences;
}

/** Whether `sentence`, which ends in a mark, is complete, given the first characters after it. */
function isEnd(sentence: string, following: string, hasCapitals: boolean): boolean {
  if (!following) return true;
  const goesOn = /^\p{Lowercase}/u.test(following);
  const isCutShort = ASKED_IN_QUOTES.test(sentence) || sentence.endsWith("...") || sentence.endsWith("…");
  if (hasCapitals && goesOn && isCutShort) return false;
  if (!sentence.endsWith(".")) return true;
  const before = sentence.replace(/\.+$/, "");
  const words = stripped(before).split(SPACES).filter(Boolean);
  const word = (words.at(-1) ?? "").toLowerCase().replace(/^["'“‘(]+/, "");
  if (WITHIN.has(word) || /^\p{Nd}+$/u.test(before) || INITIAL.test(before)) return false;
  if (NUMBERED.has(word) && /^\p{Nd}/u.test(following)) return false;
  if (CAPITAL.test(before) && /^[A-Z]\./.test(following)) return false; // "by J. R. Smith"
  const isOpen = OPEN.has(word) || DOTTED.test(word);
  const isMeasure = UNITS.has(word) && words.length > 1 && /\p{Nd}$/u.test(words.at(-2)!);
  return !((isOpen || isMeasure) && goesOn);
}

function stripped(text: string): string {
  return text.replace(EDGES, "");
}
