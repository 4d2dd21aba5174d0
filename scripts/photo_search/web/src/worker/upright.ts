/**
 * The EXIF orientation of a picture's file, by the rule of photo_search/images.py, and a copy without its EXIF data.
 *
 * Browsers differ in which orientations they apply, and to which formats. They decode the copy, so that the picture is
 * turned once, by this rule.
 */

export interface Oriented {
  /** 1 to 8. */
  orientation: number;
  /** The file, whose EXIF data no decoder finds. */
  bytes: Uint8Array<ArrayBuffer>;
}

/** Damaged EXIF data count as 1. The bytes are changed in place. */
export function withoutExif(bytes: Uint8Array<ArrayBuffer>): Oriented {
  const parts = startsWith(bytes, 0, "\xff\xd8")
    ? partsOfJpeg(bytes)
    : startsWith(bytes, 1, "PNG")
      ? partsOfPng(bytes)
      : startsWith(bytes, 0, "RIFF") && startsWith(bytes, 8, "WEBP")
        ? partsOfWebp(bytes)
        : { exif: [], xmp: null };
  const data = joined(parts.exif.map(({ start, end }) => bytes.subarray(start, end)));
  let found: number | null | undefined;
  try {
    found = orientationOfTiff(startsWith(data, 0, "Exif\0\0") ? data.subarray(6) : data) ?? orientationOfXmp(parts.xmp);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it leads beyond its end
  }
  for (const { name } of parts.exif) bytes.fill(0x78, name, name + 4); // another name: "xxxx"
  return { orientation: found && found >= 1 && found <= 8 ? found : 1, bytes };
}

interface Parts {
  exif: { name: number; start: number; end: number }[];
  xmp: Uint8Array | null;
}

const XMP = "http://ns.adobe.com/xap/1.0/\0";

function partsOfJpeg(bytes: Uint8Array): Parts {
  const parts: Parts = { exif: [], xmp: null };
  let place = 2;
  while (place + 4 <= bytes.length) {
    if (bytes[place] !== 0xff) place += 1;
    else if (bytes[place + 1] === 0xff) place += 1;
    else if (bytes[place + 1] === 0xda || bytes[place + 1] === 0xd9)
      break; // the picture itself, or the end
    else if (bytes[place + 1] === 0 || bytes[place + 1] === 1 || (bytes[place + 1]! & 0xf8) === 0xd0) place += 2;
    else {
      const [start, end] = [place + 4, place + 2 + ((bytes[place + 2]! << 8) | bytes[place + 3]!)];
      if (bytes[place + 1] === 0xe1 && startsWith(bytes, start, "Exif\0\0")) {
        parts.exif.push({ name: start, start: start + 6, end });
      } else if (bytes[place + 1] === 0xe1 && startsWith(bytes, start, XMP)) {
        parts.xmp = bytes.subarray(start + XMP.length, end);
      }
      place = end;
    }
  }
  return parts;
}

function partsOfPng(bytes: Uint8Array): Parts {
  const parts: Parts = { exif: [], xmp: null };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let place = 8; place + 8 <= bytes.length; place += 12 + view.getUint32(place)) {
    if (startsWith(bytes, place + 4, "eXIf")) {
      parts.exif.push({ name: place + 4, start: place + 8, end: place + 8 + view.getUint32(place) });
    }
  }
  return parts;
}

function partsOfWebp(bytes: Uint8Array): Parts {
  const parts: Parts = { exif: [], xmp: null };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let size = 0;
  for (let place = 12; place + 8 <= bytes.length; place += 8 + size + (size & 1)) {
    size = view.getUint32(place + 4, true);
    const part = { name: place, start: place + 8, end: place + 8 + size };
    if (startsWith(bytes, place, "EXIF")) parts.exif.push(part);
    if (startsWith(bytes, place, "XMP ")) parts.xmp = bytes.subarray(part.start, part.end);
  }
  return parts;
}

/** The tag 274 of a TIFF's first directory; null if there is none. Raises RangeError beyond the end. */
function orientationOfTiff(data: Uint8Array): number | null {
  const isLittle = startsWith(data, 0, "II");
  if (!isLittle && !startsWith(data, 0, "MM")) return null;
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const directory = view.getUint32(4, isLittle);
  const count = view.getUint16(directory, isLittle);
  for (let place = directory + 2; place < directory + 2 + 12 * count; place += 12) {
    if (view.getUint16(place, isLittle) !== 274) continue;
    const kind = view.getUint16(place + 2, isLittle);
    if (kind === 3) return view.getUint16(place + 8, isLittle);
    if (kind === 4) return view.getUint32(place + 8, isLittle);
    return 1;
  }
  return null;
}

function orientationOfXmp(xmp: Uint8Array | null): number | null {
  const found = xmp && /tiff:Orientation(?:="|>)([0-9])/.exec(new TextDecoder("latin1").decode(xmp));
  return found ? Number(found[1]) : null;
}

function joined(parts: Uint8Array[]): Uint8Array {
  const result = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  let place = 0;
  for (const part of parts) {
    result.set(part, place);
    place += part.length;
  }
  return result;
}

function startsWith(bytes: Uint8Array, place: number, text: string): boolean {
  for (let index = 0; index < text.length; index += 1) {
    if (bytes[place + index] !== text.charCodeAt(index)) return false;
  }
  return true;
}
