// An exported folder in transformers.js: `node in_node.mjs FOLDER WORK`.
// Reads WORK/strings.json, WORK/captions.json and WORK/pixels.json, writes WORK/node.json.
import fs from "node:fs";
import path from "node:path";
import {
  AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, Tensor, env,
} from "@huggingface/transformers";

const [folder, work] = process.argv.slice(2).map((name) => path.resolve(name));
const read = (name) => JSON.parse(fs.readFileSync(path.join(work, name), "utf8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const options = { dtype: "fp32", device: "cpu" };

const tokenizer = await AutoTokenizer.from_pretrained(name);
const ids = read("strings.json").map((text) => tokenizer.encode(text));

const text = await CLIPTextModelWithProjection.from_pretrained(name, options);
const inputs = tokenizer(read("captions.json"), { padding: true, truncation: true });
const { text_embeds } = await text({ input_ids: inputs.input_ids });

const vision = await CLIPVisionModelWithProjection.from_pretrained(name, options);
const pixels = read("pixels.json");
const pixel_values = new Tensor("float32", Float32Array.from(pixels.values.flat(Infinity)), pixels.shape);
const { image_embeds } = await vision({ pixel_values });

const processor = await AutoProcessor.from_pretrained(name);
const pictures = await Promise.all(read("pictures.json").map((file) => RawImage.read(path.join(work, file))));
const own = await vision(await processor(pictures));

fs.writeFileSync(path.join(work, "node.json"), JSON.stringify({
  ids, text_embeds: text_embeds.tolist(), image_embeds: image_embeds.tolist(), own_resize: own.image_embeds.tolist(),
}));
