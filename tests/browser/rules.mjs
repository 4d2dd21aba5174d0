// The page's rules outside of a browser: `node rules.mjs WEB WORK` reads WORK/rules.json, writes WORK/found.json.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [web, work] = process.argv.slice(2).map((name) => path.resolve(name));
const { build } = await import(pathToFileURL(createRequire(path.join(web, "package.json")).resolve("vite")));
await build({
  root: web,
  configFile: false,
  publicDir: false,
  logLevel: "error",
  ssr: { noExternal: true },
  build: { ssr: "src/rules.ts", outDir: path.join(work, "built"), emptyOutDir: false },
});
const rules = await import(pathToFileURL(path.join(work, "built/rules.js")));

const given = JSON.parse(fs.readFileSync(path.join(work, "rules.json"), "utf8"));
const reader = new rules.Reader(JSON.parse(fs.readFileSync(given.tokenizer, "utf8")));
const bytes = (name) => new Uint8Array(fs.readFileSync(path.join(work, name)));
fs.writeFileSync(
  path.join(work, "found.json"),
  JSON.stringify({
    names: given.names.map(rules.isPicture),
    sentences: given.captions.map(rules.splitSentences),
    ids: given.strings.map((text) => reader.read(text)),
    resized: given.pictures.map(({ file, width, height, side, resample }) =>
      Buffer.from(rules.resizedCentre({ width, height, channels: 3, data: bytes(file) }, side, resample)).toString(
        "base64",
      ),
    ),
    orientations: given.files.map((name) => rules.withoutExif(bytes(name)).orientation),
  }),
);
