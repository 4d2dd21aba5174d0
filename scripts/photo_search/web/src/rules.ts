/** What tests/browser compares with Python outside of a browser. */
export { isPicture } from "./pictures";
export { resizedCentre } from "./worker/resize";
export { splitSentences } from "./worker/sentences";
export { Reader } from "./worker/reader";
export { withoutExif } from "./worker/upright";
