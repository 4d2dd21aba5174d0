/** The page: it passes what the user does to the worker, and shows what comes back. */

import { InputError } from "../protocol";
import { chosenIn, dropped, isModel, type Chosen } from "./chosen";
import { connect } from "./client";
import { byId } from "./elements";
import { clearResults, showAnswer } from "./results";
import { describeUpdate, hideProgress, showError, showMessage, showProgress, showState } from "./status";

const TOP = 10;
const MORE = 20;
const NARROW = matchMedia("(max-width: 48rem)"); // as in style.css: results are below the screen
const CHOOSERS = ["model", "folder", "files"] as const;
const worker = connect(showProgress, showError);
const text = byId<HTMLTextAreaElement>("text");
let shown = TOP;

/** Run a long call: choosing waits meanwhile, and an error is told. */
async function busy(work: () => Promise<void>): Promise<void> {
  const buttons = [...CHOOSERS.map((kind) => `choose-${kind}`), "forget"].map((id) => byId<HTMLButtonElement>(id));
  buttons.forEach((button) => (button.disabled = true));
  document.body.setAttribute("aria-busy", "true");
  showMessage("");
  try {
    await work();
  } catch (error) {
    showError(error);
  } finally {
    hideProgress();
    buttons.forEach((button) => (button.disabled = false));
  }
  const state = await worker.state().catch(showError);
  document.body.removeAttribute("aria-busy");
  if (state) showState(state);
}

async function take(choices: Chosen[]): Promise<void> {
  const model = choices.find(isModel);
  if (model) await useModel(model);
  for (const choice of choices) {
    if (choice !== model) await addPictures(choice);
  }
}

async function useModel({ files }: Chosen): Promise<void> {
  const state = await worker.useModel(files);
  clearResults();
  showMessage(
    state.pictures ? "" : "The model is ready. Choose the pictures to search: those of another model are not kept.",
  );
}

async function addPictures({ files, folder }: Chosen): Promise<void> {
  showMessage(describeUpdate(await worker.addPictures(files, folder)));
}

async function search(): Promise<void> {
  const asked = text.value;
  try {
    showAnswer(asked, await worker.search(asked, shown));
    showMessage("");
    if (shown === TOP && NARROW.matches) byId("results").scrollIntoView({ block: "start" });
  } catch (error) {
    clearResults();
    showError(error);
  }
}

function listenToSearch(): void {
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    shown = TOP;
    void search();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId<HTMLFormElement>("search").requestSubmit();
  });
  byId("more").addEventListener("click", () => {
    shown += MORE;
    void search();
  });
}

function listenToChoices(): void {
  for (const kind of CHOOSERS) {
    const input = byId<HTMLInputElement>(`${kind}-input`);
    byId(`choose-${kind}`).addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      const [choice] = chosenIn(input);
      if (choice) void busy(() => (kind === "model" ? useModel(choice) : addPictures(choice)));
    });
  }
  byId("stop").addEventListener("click", () => void worker.stop());
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    const choices = event.dataTransfer && dropped(event.dataTransfer.items);
    if (choices) void busy(async () => take(await choices));
  });
}

function listenToForget(): void {
  const dialog = byId<HTMLDialogElement>("confirm");
  byId("forget").addEventListener("click", () => {
    dialog.returnValue = "keep";
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "delete") return;
    void busy(async () => {
      await worker.forget();
      clearResults();
      showMessage("Deleted. The files beside this page, if any, are read again when it is loaded.");
    });
  });
}

async function start(): Promise<void> {
  if (!self.isSecureContext || !("serviceWorker" in navigator)) {
    throw new InputError("this page needs https, or a server on this machine (127.0.0.1 or localhost)");
  }
  await navigator.serviceWorker.register(new URL("service_worker.js", document.baseURI));
  const done = await worker.open(document.baseURI);
  if (done?.stopped) showMessage(describeUpdate(done));
}

listenToSearch();
listenToChoices();
listenToForget();
showProgress({ what: "Starting", done: 0, total: 1 });
void busy(start);
