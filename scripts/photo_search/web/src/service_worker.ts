/** Keeps the page's own files, so that it works offline after the first visit. All else goes to its server. */

export {}; // a module, in which `self` can be declared
declare const self: ServiceWorkerGlobalScope;
// the build puts these in
declare const __FILES__: string[];
declare const __VERSION__: string;

const CACHE = `photo-search-${__VERSION__}`;
const files = new Set(__FILES__.map((name) => new URL(name, self.registration.scope).href));

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches.open(CACHE).then((cache) => cache.addAll([...files].map((name) => new Request(name, { cache: "reload" })))),
  );
});

void self.skipWaiting(); // the next load of the page is the new one

self.addEventListener("activate", (event) => {
  event.waitUntil(removeOlder().then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const address = new URL(event.request.url);
  address.hash = address.search = "";
  if (event.request.method === "GET" && files.has(address.href)) event.respondWith(kept(event.request, address.href));
});

async function kept(request: Request, address: string): Promise<Response> {
  const cache = await caches.open(CACHE);
  return (await cache.match(address)) ?? fetch(request);
}

async function removeOlder(): Promise<void> {
  const names = (await caches.keys()).filter((name) => name.startsWith("photo-search-") && name !== CACHE);
  await Promise.all(names.map((name) => caches.delete(name)));
}
