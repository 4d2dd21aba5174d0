import { createHash } from "node:crypto";
import { defineConfig, type Plugin } from "vite";

/** Tell the service worker which files make the page, and name its cache after their contents. */
function listOfFiles(): Plugin {
  return {
    name: "list-of-files",
    enforce: "post",
    generateBundle(_, bundle) {
      const worker = bundle["service_worker.js"];
      if (worker?.type !== "chunk") throw new Error("no service_worker.js was built");
      const names = Object.keys(bundle)
        .filter((name) => name !== worker.fileName)
        .sort();
      const digest = createHash("sha256").update(worker.code);
      for (const name of names) {
        const file = bundle[name]!;
        digest.update(name).update(file.type === "chunk" ? file.code : file.source);
      }
      const files = JSON.stringify(["./", "icon.svg", ...names.filter((name) => name !== "index.html")]);
      worker.code = worker.code
        .replace("__FILES__", () => files)
        .replace("__VERSION__", () => JSON.stringify(digest.digest("hex")));
    },
  };
}

export default defineConfig({
  base: "./",
  // the variant of ONNX Runtime that takes its WebAssembly from files of their own, which the page hosts
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser"] },
  worker: { format: "es" },
  build: {
    target: "es2023",
    assetsInlineLimit: 0,
    modulePreload: false,
    rollupOptions: {
      input: { index: "index.html", service_worker: "src/service_worker.ts" },
      output: {
        entryFileNames: (chunk) => (chunk.name === "service_worker" ? "[name].js" : "assets/[name]-[hash].js"),
      },
    },
  },
  plugins: [listOfFiles()],
});
