/** Which names are those of pictures: the rule of photo_search/images.py and folders.py. */

const SUFFIXES = new Set("jpg jpeg png webp bmp gif tif tiff ppm heic heif".split(" "));

/** Whether a path below a chosen folder is that of a picture. Hidden files and folders are not read. */
export function isPicture(path: string): boolean {
  const parts = path.split("/").filter(Boolean);
  const name = parts.at(-1) ?? "";
  const isHidden = parts.some((part) => part.startsWith("."));
  return !isHidden && name.includes(".") && SUFFIXES.has(name.slice(name.lastIndexOf(".") + 1).toLowerCase());
}
