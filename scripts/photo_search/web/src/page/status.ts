/** What the page holds and does: model, pictures, progress, messages. */

import { InputError, type Progress, type State, type Update } from "../protocol";
import { byId, counted, element } from "./elements";

const MOST_PROBLEMS = 200; // that are listed

/** Show which model and how many pictures there are, and what to do next. */
export function showState(state: State): void {
  const { model, pictures, problems, threads } = state;
  byId("model").textContent = model
    ? `${model.name}, reads ${model.contextLength} tokens`
    : "None yet. scripts/export.py writes one.";
  byId("pictures").textContent = pictures ? `${counted(pictures, "picture")} to search` : "None yet.";
  byId("runtime").textContent = `ONNX Runtime as WebAssembly, ${counted(threads, "thread")}.`;
  const list = byId<HTMLDetailsElement>("problems");
  list.hidden = !problems.length;
  list.querySelector("summary")!.textContent = `${counted(problems.length, "picture")} could not be read`;
  const lines = problems.slice(0, MOST_PROBLEMS).map(([name, reason]) => element("li", "", `${name}: ${reason}`));
  if (problems.length > lines.length) lines.push(element("li", "", `and ${problems.length - lines.length} more`));
  list.querySelector("ul")!.replaceChildren(...lines);
  if (!byId("hits").childElementCount && !document.body.ariaBusy) byId("summary").textContent = nextStep(state);
}

function nextStep({ model, pictures }: State): string {
  if (!model) return "Choose a model's folder to begin.";
  return pictures ? "Describe a picture, and the best of yours come first." : "Choose the pictures to search.";
}

/** Show how far a call is, and what is there meanwhile. */
export function showProgress({ what, done, total }: Progress, state?: State): void {
  if (state) showState(state);
  const bar = byId<HTMLProgressElement>("bar");
  byId("progress").hidden = false;
  byId("progress-text").textContent =
    total > 1 ? `${what}: ${done.toLocaleString("en")} of ${total.toLocaleString("en")}` : what;
  byId("stop").hidden = total <= 1;
  if (total > 1) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute("value");
}

/** Hide the bar. */
export function hideProgress(): void {
  byId("progress").hidden = true;
}

/** Show one line; none if `text` is empty. */
export function showMessage(text: string): void {
  const message = byId("message");
  message.hidden = !text;
  message.textContent = text;
  message.className = "";
}

/** An error is one line. What is no mistake of the user's is a fault of the page, and is said to be. */
export function showError(error: unknown): void {
  const told = error instanceof Error ? error.message : String(error);
  showMessage(error instanceof InputError ? told : `fault of this page: ${told}`);
  byId("message").className = "error";
}

/** What an update did, as one line. */
export function describeUpdate({ embedded, known, unchanged, removed, stopped }: Update): string {
  const parts = [`${counted(embedded, "picture")} read`, `${known} known by their contents`, `${unchanged} unchanged`];
  if (removed) parts.push(`${removed} removed`);
  return `${parts.join(", ")}.${stopped ? " Stopped: choose the pictures again, or load the page again, to go on." : ""}`;
}
