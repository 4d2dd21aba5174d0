/** The worker's calls as functions of the page. */

import { InputError, type Calls, type Progress, type Reply, type State } from "../protocol";

interface Waiting {
  resolve: (value: never) => void;
  reject: (error: Error) => void;
}

/** Start the worker. `report` is told how far long calls are; `failed`, what the worker cannot answer to a call. */
export function connect(report: (progress: Progress, state: State) => void, failed: (error: Error) => void): Calls {
  const worker = new Worker(new URL("../worker/worker.ts", import.meta.url), { type: "module" });
  const waiting = new Map<number, Waiting>();
  let last = 0;

  worker.onmessage = ({ data }: MessageEvent<Reply>): void => {
    if ("progress" in data) {
      report(data.progress, data.state);
      return;
    }
    const { resolve, reject } = waiting.get(data.id)!;
    waiting.delete(data.id);
    if ("value" in data) resolve(data.value as never);
    else reject(data.expected ? new InputError(data.error) : new Error(data.error));
  };
  worker.onerror = (event): void => failed(new Error(event.message || "the worker could not be started"));

  const call = <Name extends keyof Calls>(name: Name) =>
    ((...given: Parameters<Calls[Name]>) =>
      new Promise((resolve, reject) => {
        last += 1;
        waiting.set(last, { resolve, reject });
        worker.postMessage({ id: last, call: name, given });
      })) as Calls[Name];

  return {
    open: call("open"),
    useModel: call("useModel"),
    addPictures: call("addPictures"),
    search: call("search"),
    state: call("state"),
    stop: call("stop"),
    forget: call("forget"),
  };
}
