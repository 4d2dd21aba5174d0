// The page in headless Chromium: `node in_chromium.mjs WEB WORK`. Reads WORK/task.json, writes WORK/found.json.
// Lines on stdout ask run.py for something; a line on stdin says that it is done.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline/promises";

const [web, work] = process.argv.slice(2).map((name) => path.resolve(name));
const playwright = createRequire(path.join(web, "package.json"))("playwright-core");
const task = JSON.parse(fs.readFileSync(path.join(work, "task.json"), "utf8"));
const stdin = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
process.env.PW_EXPERIMENTAL_SERVICE_WORKER_NETWORK_EVENTS = "1"; // so that requests of service workers are seen

const found = { faults: [], answers: {}, messages: {} };
let isOffline = false;
const context = await playwright.chromium.launchPersistentContext(path.join(work, "profile"), {
  executablePath: task.chromium,
  args: ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
  serviceWorkers: "allow",
  viewport: { width: 390, height: 844 },
});
context.setDefaultTimeout(60_000); // a page that never answers fails
context.on("request", (request) => {
  const { protocol, host } = new URL(request.url());
  const isOurs = ["blob:", "data:"].includes(protocol) || host === new URL(task.address).host;
  if (!isOurs) found.faults.push(`a request to another host: ${request.url()}`);
});
context.on("weberror", (error) => found.faults.push(`page error: ${error.error()}`));
context.on("console", (message) => {
  const isUnreachable = isOffline && message.text().startsWith("Failed to load resource");
  if (message.type() === "error" && !isUnreachable)
    found.faults.push(`console: ${message.text()} (${message.location().url})`);
});

let page = context.pages()[0];
const text = (id) => page.locator(`#${id}`).textContent();
const idle = () => page.locator("body:not([aria-busy])").waitFor();

async function message(name) {
  await idle();
  found.messages[name] = await text("message");
}

async function choose(input, chosen) {
  await idle();
  await page.locator(`#${input}-input`).setInputFiles(chosen);
  await page.waitForFunction(() => true); // the change event comes before this
  await idle();
}

async function search(query) {
  await page.locator("#text").fill(query);
  await page.locator("#text").press("Control+Enter");
  await page.waitForFunction((asked) => document.body.dataset.answered === asked, query);
  await page.waitForFunction(() => [...document.querySelectorAll("#hits img")].every((image) => image.complete));
  return page.locator("#hits li").evaluateAll((items) =>
    items.map((item) => ({
      name: item.dataset.name,
      score: Number(item.dataset.score),
      sentences: [...item.querySelectorAll("tr")].map((row) => ({
        text: row.cells[1].textContent,
        rank: Number(row.cells[0].textContent.split(" of ")[0]),
        score: Number(row.cells[0].title.split(" ")[1]),
      })),
      isShown: (item.querySelector("img")?.naturalWidth ?? 0) > 0,
    })),
  );
}

async function searchAll(name) {
  found.answers[name] = [];
  for (const query of task.queries) found.answers[name].push(await search(query));
}

async function ask(line) {
  console.log(line);
  await stdin.next();
}

async function drop(folder) {
  const session = await context.newCDPSession(page);
  const data = { items: [], files: [folder], dragOperationsMask: 1 };
  for (const type of ["dragEnter", "dragOver", "drop"]) {
    await session.send("Input.dispatchDragEvent", { type, x: 100, y: 100, data });
  }
  await page.waitForFunction(() => document.body.hasAttribute("aria-busy"));
  await idle();
}

await page.goto(task.address);
await idle();
found.messages.start = await text("pictures");
found.isolated = await page.evaluate(() => self.crossOriginIsolated);
await choose("folder", task.photos);
await message("first");
found.problems = await page.locator("#problems li").allTextContents();
await searchAll("first");
found.width = await page.evaluate(() => document.documentElement.scrollWidth);
found.long = [await search(task.long[0]), await search(task.long[1])];
await search(task.tooLong);
found.messages.length = await text("length");
await choose("folder", task.photos);
await message("again");
await ask("change the pictures");
await choose("folder", task.photos);
await message("changed");
await searchAll("changed");

await page.evaluate(
  () =>
    new Promise((resolve, reject) => {
      navigator.serviceWorker.ready.then(() => resolve());
      setTimeout(() => reject(new Error("the page has no service worker")), 30_000);
    }),
);
await ask("stop the server");
isOffline = true;
await page.reload();
await idle();
found.messages.offline = await text("pictures");
await searchAll("offline");
await choose("model", task.damaged);
await message("damaged");
await searchAll("damaged");
await drop(task.otherModel);
await message("other model");
found.messages.emptied = await text("pictures");
await ask("index with the other model");
await drop(task.photos);
await message("embedded again");
await searchAll("other model");
await choose("files", task.files);
await message("files");

const firstPage = page;
page = await context.newPage();
await page.goto(task.address);
await idle();
found.messages.second = await text("pictures");
await page.locator("footer summary").click();
await page.locator("#forget").click();
await page.locator("#confirm button[value=delete]").click();
await page.waitForFunction(() => document.querySelector("#pictures").textContent.startsWith("None"));
await idle();
found.messages.forgotten = [await text("model"), await text("pictures"), await page.locator("#hits li").count()].join(
  "; ",
);
page = firstPage;
await choose("files", task.files);
await message("other tab");

await context.close();
fs.writeFileSync(path.join(work, "found.json"), JSON.stringify(found));
process.exit(0);
