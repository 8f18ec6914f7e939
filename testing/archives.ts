/**
 * Makers of compressed bytes and of tar members: rare, hostile and damaged forms. Also archives and trees that are
 * written as one line of text.
 *
 * @module
 */

import { dirname } from "node:path";
import { constants, crc32, deflateRawSync, zstdCompressSync } from "node:zlib";
import {
  type Bytes,
  concat,
  directory,
  file,
  fixChecksum,
  flatParts,
  hardlink,
  type Parts,
  paxRecords,
  rawHeader,
  type RawHeaderFields,
  rawTar,
  symlink,
  type TarMember,
  toBytes,
} from "./images.ts";

// ---------------------------------------------------------------------------------------------------------------------
// Compressed bytes
// ---------------------------------------------------------------------------------------------------------------------

/** The magic number of a zstd frame. */
export const ZSTD_MAGIC: Uint8Array = new Uint8Array([0x28, 0xb5, 0x2f, 0xfd]);

/** A skippable zstd frame of 4 bytes. */
export const SKIPPABLE: Bytes = toBytes("\x5a\x2a\x4d\x18\x04\0\0\0skip");

/** One zstd frame of stored blocks, with this window descriptor (RFC 8878, section 3.1.1.1.2). */
export function zstdStored(bytes: Uint8Array, window: number): Bytes {
  const blocks: Bytes[] = [];
  for (let at = 0; at < bytes.length; at += 65_536) {
    const block = bytes.subarray(at, at + 65_536);
    const header = block.length * 8 + Number(at + block.length === bytes.length);
    blocks.push(new Uint8Array([header, header >> 8, header >> 16]), new Uint8Array(block));
  }
  return concat(ZSTD_MAGIC, new Uint8Array([0, window]), ...blocks);
}

/** One zstd frame with a content checksum. */
export function zstdChecked(bytes: Uint8Array): Bytes {
  return new Uint8Array(zstdCompressSync(bytes, { params: { [constants.ZSTD_c_checksumFlag]: 1 } }));
}

/** One gzip member whose header has every optional field. */
export function gzipWithAllFields(bytes: Uint8Array): Bytes {
  const header = concat(new Uint8Array([31, 139, 8, 0x1e, 0, 0, 0, 0, 0, 3, 5, 0]), "extra", "name\0", "comment\0");
  const headerCrc = new Uint8Array(new Uint16Array([crc32(header) & 0xffff]).buffer);
  const trailer = new Uint8Array(new Uint32Array([crc32(bytes), bytes.length]).buffer);
  return concat(header, headerCrc, deflateRawSync(bytes), trailer);
}

/** A copy in which one bit of this byte differs. A negative position counts from the end. */
export function flip(bytes: Uint8Array, at: number): Bytes {
  const copy = new Uint8Array(bytes);
  const index = at < 0 ? bytes.length + at : at;
  copy[index] = (copy[index] ?? 0) ^ 0x10;
  return copy;
}

// ---------------------------------------------------------------------------------------------------------------------
// Members of any type, and extension headers
// ---------------------------------------------------------------------------------------------------------------------

/** A header alone. */
export function head(name: string | Uint8Array, typeflag: string, fields: Partial<RawHeaderFields> = {}): Bytes {
  return rawHeader({ name, typeflag, ...fields });
}

/** A file that contains "x", or `data`; `fields` may have another type. */
export function regular(
  name: string | Uint8Array,
  data: string | Uint8Array = "x",
  fields: Partial<RawHeaderFields> = {},
): Parts {
  return file(name, data, fields);
}

/** A header of this type with a body, such as an extension of the next header. */
export function meta(typeflag: string, body: string | Uint8Array): Parts {
  return regular("meta", body, { typeflag });
}

/** A PAX header of the next member. */
export function pax(records: Record<string, string | Uint8Array>): Parts {
  return meta("x", paxRecords(records));
}

/** A long name (L) or a long link (K) of GNU for the next member. */
export function gnu(typeflag: "L" | "K", text: string): Parts {
  return meta(typeflag, `${text}\0`);
}

const PAX_SPARSE = {
  "0.0": { "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "1" },
  "0.1": { "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,1", "GNU.sparse.name": "s.whl" },
  "1.0": { "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "s.whl" },
};

/** A sparse file in this version of PAX. */
export function sparse(version: keyof typeof PAX_SPARSE, name: string = "s.whl"): Parts {
  const data = version === "1.0" ? "1\n0\n1\n".padEnd(512, "\0") + "x" : "x";
  return [pax({ ...PAX_SPARSE[version], path: `GNUSparseFile.0/${name}` }), regular(name, data)];
}

/** GNU tar's own sparse format. The map continues in a block that the header's size does not count. */
export function oldSparse(name: string): Parts {
  const header = head(name, "S", { size: 1, magic: "gnu" });
  header[482] = 1; // "isextended"
  fixChecksum(header);
  return [header, new Uint8Array(512), "x"];
}

/** Bytes of Latin-1, most of which are not UTF-8. */
export function latin1(text: string): Bytes {
  return new Uint8Array([...text].map((letter) => letter.charCodeAt(0)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Archives as text
// ---------------------------------------------------------------------------------------------------------------------

/** Parses members of an archive: `path` (also its text), `path=text`, `dir/`, `link->target`, `hardlink=>target`. */
function parseMembers(text: string): TarMember[] {
  return text.split(" ").map((word): TarMember => {
    const [, name = "", operator, value = ""] = /^(.*?)(?:(->|=>|=)(.*))?$/.exec(word) ?? [];
    if (operator === "->") return { name, type: "symlink", linkname: value };
    if (operator === "=>") return { name, type: "link", linkname: value };
    return { name, data: name.endsWith("/") ? "" : operator === "=" ? value : name };
  });
}

/** What `contents()` returns of these files and links. */
export function treeOf(text: string): Record<string, string> {
  const all: Record<string, string> = {};
  for (const { name, data, type, linkname } of parseMembers(text)) {
    for (let dir = dirname(name); dir !== "."; dir = dirname(dir)) all[dir] = "/";
    all[name] = type === "symlink" ? `-> ${linkname}` : String(data);
  }
  return all;
}

/** Builds an archive of these members. */
export function layerOf(text: string): Bytes {
  const parts = parseMembers(text).map(({ name, data, type, linkname = "" }) => {
    if (type === "link") return hardlink(name, linkname);
    if (type === "symlink") return symlink(name, linkname);
    return name.endsWith("/") ? directory(name) : file(name, data);
  });
  return rawTar(...flatParts(parts));
}
