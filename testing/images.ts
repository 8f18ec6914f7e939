/**
 * Makers of what tests, demo and benchmark serve: real wheels, honest and hostile tar archives, layers, manifests.
 *
 * Everything is deterministic (fixed dates, no randomness but in a signature), so that digests can be compared.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, sign } from "node:crypto";
import { crc32, gunzipSync, gzipSync, zstdCompressSync, zstdDecompressSync } from "node:zlib";
import { packTar } from "npm:modern-tar@^0.8.6";

/** The bytes of everything here; a plain `ArrayBuffer` below them, as `Response` and `Blob` want it. */
export type Bytes = Uint8Array<ArrayBuffer>;

/** Media types of manifests, configs and layers, by the name that the field gives them. */
export const MEDIA = {
  ociIndex: "application/vnd.oci.image.index.v1+json",
  ociManifest: "application/vnd.oci.image.manifest.v1+json",
  ociConfig: "application/vnd.oci.image.config.v1+json",
  ociLayer: "application/vnd.oci.image.layer.v1.tar",
  ociLayerGzip: "application/vnd.oci.image.layer.v1.tar+gzip",
  ociLayerZstd: "application/vnd.oci.image.layer.v1.tar+zstd",
  dockerList: "application/vnd.docker.distribution.manifest.list.v2+json",
  dockerManifest: "application/vnd.docker.distribution.manifest.v2+json",
  dockerSchema1: "application/vnd.docker.distribution.manifest.v1+json",
  dockerSchema1Signed: "application/vnd.docker.distribution.manifest.v1+prettyjws",
  dockerConfig: "application/vnd.docker.container.image.v1+json",
  dockerLayer: "application/vnd.docker.image.rootfs.diff.tar.gzip",
} as const;

/** The time that every member carries: 2024-01-01, late enough for a zip, whose years begin at 1980. */
const FIXED_DATE = new Date("2024-01-01T00:00:00Z");

const TAR_BLOCK_BYTES = 512;

// ---------------------------------------------------------------------------------------------------------------------
// Bytes
// ---------------------------------------------------------------------------------------------------------------------

/** Text to its UTF-8 bytes; bytes stay what they are. */
export function toBytes(data: string | Uint8Array): Bytes {
  return typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
}

/** One array of all the parts. */
export function concat(...parts: (string | Uint8Array)[]): Bytes {
  const arrays = parts.map((part) => typeof part === "string" ? toBytes(part) : part);
  const all = new Uint8Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let at = 0;
  for (const array of arrays) {
    all.set(array, at);
    at += array.length;
  }
  return all;
}

/** The digest of these bytes as registries write it: `sha256:<hex>`. */
export function sha256(bytes: Uint8Array): string {
  return `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
}

/** The digest of these bytes as registries write it: `sha512:<hex>`. */
export function sha512(bytes: Uint8Array): string {
  return `sha512:${createHash("sha512").update(bytes).digest("hex")}`;
}

/** A gzip file of one member. */
export function gzip(bytes: Uint8Array): Bytes {
  return new Uint8Array(gzipSync(bytes));
}

/** A gzip file of several members, one for each argument, as pigz and eStargz write them. */
export function gzipMembers(...parts: Uint8Array[]): Bytes {
  return concat(...parts.map(gzip));
}

/** One zstd frame. */
export function zstd(bytes: Uint8Array): Bytes {
  return new Uint8Array(zstdCompressSync(bytes));
}

// ---------------------------------------------------------------------------------------------------------------------
// Wheels: a zip of stored entries, with the three files of metadata that pip insists on
// ---------------------------------------------------------------------------------------------------------------------

/** What a wheel is made of. */
export interface WheelFields {
  /** The project's name, such as `demo-hello`; the module is the same with `_` for `-`. */
  name: string;
  version: string;
  /** Compatibility tag. @default "py3-none-any" */
  tag?: string;
  /** The module's source text. @default one that sets `__version__` */
  body?: string;
}

/** A wheel's file name and content. */
export interface Wheel {
  filename: string;
  bytes: Bytes;
}

/** Make a real wheel, which `pip install` accepts. */
export function makeWheel({ name, version, tag = "py3-none-any", body }: WheelFields): Wheel {
  const module = name.replaceAll(/[-_.]+/g, "_").toLowerCase();
  const info = `${module}-${version}.dist-info`;
  const purelib = tag.endsWith("-none-any");
  const files: [string, Bytes][] = [
    [`${module}/__init__.py`, toBytes(body ?? `__version__ = "${version}"\n`)],
    [`${info}/METADATA`, toBytes(`Metadata-Version: 2.1\nName: ${name}\nVersion: ${version}\n`)],
    [`${info}/WHEEL`, toBytes(`Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: ${purelib}\nTag: ${tag}\n`)],
  ];
  const record = files.map(([path, data]) => `${path},${recordHash(data)},${data.length}\n`).join("");
  // RECORD cannot hold its own hash, so its line has none.
  files.push([`${info}/RECORD`, toBytes(`${record}${info}/RECORD,,\n`)]);
  return { filename: `${module}-${version}-${tag}.whl`, bytes: zip(files) };
}

function recordHash(data: Uint8Array): string {
  return `sha256=${createHash("sha256").update(data).digest("base64url")}`;
}

function zip(files: [path: string, data: Uint8Array][]): Bytes {
  const locals: Bytes[] = [];
  const directory: Bytes[] = [];
  let offset = 0;
  for (const [path, data] of files) {
    const name = toBytes(path);
    const common = zipCommonFields(name, data);
    const local = concat(littleEndian([4, 0x04034b50]), common, name, data);
    locals.push(local);
    // Version 2.0 on Unix (3 << 8), so that the mode in the upper half of the external attributes counts.
    const tail = littleEndian([2, 0], [2, 0], [2, 0], [4, 0o100644 * 0x10000], [4, offset]);
    directory.push(concat(littleEndian([4, 0x02014b50], [2, (3 << 8) | 20]), common, tail, name));
    offset += local.length;
  }
  const central = concat(...directory);
  const count = files.length;
  const end = [[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, central.length], [4, offset], [2, 0]];
  return concat(...locals, central, littleEndian(...end as [number, number][]));
}

/** The fields that an entry's local header and its line in the directory share, from "version needed" on. */
function zipCommonFields(name: Uint8Array, data: Uint8Array): Bytes {
  const day = ((FIXED_DATE.getUTCFullYear() - 1980) << 9) | (1 << 5) | 1;
  return littleEndian(
    [2, 20],
    [2, 0x0800], // names are UTF-8
    [2, 0], // stored
    [2, 0],
    [2, day],
    [4, crc32(data)],
    [4, data.length],
    [4, data.length],
    [2, name.length],
    [2, 0],
  );
}

function littleEndian(...fields: [size: number, value: number][]): Bytes {
  const bytes: number[] = [];
  for (const [size, value] of fields) {
    for (let i = 0; i < size; i++) bytes.push(Math.floor(value / 256 ** i) % 256);
  }
  return new Uint8Array(bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tar: what a good tool writes (makeTar), and what none would write (rawHeader, rawTar)
// ---------------------------------------------------------------------------------------------------------------------

/** A member of an honest archive. */
export interface TarMember {
  /** A name that ends in `/` is a directory's. */
  name: string;
  data?: string | Uint8Array;
  /** @default "file", or "directory" after the name */
  type?: "file" | "directory" | "symlink" | "link" | "character-device" | "block-device" | "fifo";
  linkname?: string;
  /** @default 0o644, or 0o755 for a directory */
  mode?: number;
  /** @default 2024-01-01 */
  mtime?: Date;
  /** Extended attributes of this member. */
  pax?: Record<string, string>;
}

/** Make an uncompressed archive, its names in PAX form where they are long. */
export async function makeTar(entries: TarMember[]): Promise<Bytes> {
  const packed = await packTar(entries.map(({ name, data = "", type, linkname, mode, mtime = FIXED_DATE, pax }) => {
    const body = toBytes(data);
    const header = {
      name,
      size: body.length,
      type: type ?? (name.endsWith("/") ? "directory" : "file"),
      mtime,
      ...(linkname !== undefined && { linkname }),
      ...(mode !== undefined && { mode }),
      ...(pax !== undefined && { pax }),
    };
    return { header, body };
  }));
  return new Uint8Array(packed);
}

/** The fields of one header block, of which nothing is checked but that it fits. */
export interface RawHeaderFields {
  name: string | Uint8Array;
  /** A number is written in octal, or in base 256 where octal cannot hold it; text and bytes fill the field as is. */
  size?: number | string | Uint8Array;
  /** @default "0", a regular file */
  typeflag?: string;
  linkname?: string | Uint8Array;
  /** @default 0o644 */
  mode?: number;
  prefix?: string | Uint8Array;
  /** @default "ustar" */
  magic?: "ustar" | "gnu" | "v7";
  /** Written instead of the right sum. */
  checksum?: number;
}

/** Make one header block by hand. */
export function rawHeader(fields: RawHeaderFields): Bytes {
  const { name, size = 0, typeflag = "0", linkname = "", mode = 0o644, prefix = "", magic = "ustar" } = fields;
  const block = new Uint8Array(TAR_BLOCK_BYTES);
  put(block, 0, 100, name);
  put(block, 100, 8, octal(mode, 7));
  put(block, 108, 8, octal(0, 7));
  put(block, 116, 8, octal(0, 7));
  put(block, 124, 12, typeof size === "number" ? sizeField(size) : size);
  put(block, 136, 12, octal(FIXED_DATE.getTime() / 1000, 11));
  put(block, 156, 1, typeflag);
  put(block, 157, 100, linkname);
  put(block, 257, 8, { ustar: "ustar\x0000", gnu: "ustar  \0", v7: "" }[magic]);
  put(block, 345, 155, prefix);
  // The sum is taken as if its own field were blanks.
  put(block, 148, 8, " ".repeat(8));
  const sum = fields.checksum ?? block.reduce((total, byte) => total + byte, 0);
  put(block, 148, 8, `${octal(sum, 6)}\0 `);
  return block;
}

function put(block: Uint8Array, offset: number, length: number, value: string | Uint8Array): void {
  const bytes = toBytes(value);
  if (bytes.length > length) throw new RangeError(`${bytes.length} bytes do not fit into a field of ${length}`);
  block.set(bytes, offset);
}

function octal(value: number, digits: number): string {
  return value.toString(8).padStart(digits, "0");
}

/** Octal up to 8 GiB; beyond that, and below zero, GNU's two's complement with the top bit set. */
function sizeField(size: number): string | Uint8Array {
  if (size >= 0 && size < 8 ** 11) return octal(size, 11);
  const field = new Uint8Array(12).fill(size < 0 ? 0xff : 0);
  new DataView(field.buffer).setBigInt64(4, BigInt(size));
  field[0] = size < 0 ? 0xff : 0x80;
  return field;
}

/** Put headers and bodies together: each part is filled up to whole blocks, and the two empty blocks follow. */
export function rawTar(...parts: (Uint8Array | string)[]): Bytes {
  const padded = parts.flatMap((part) => {
    const bytes = toBytes(part);
    return [bytes, new Uint8Array((TAR_BLOCK_BYTES - bytes.length % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES)];
  });
  return concat(...padded, new Uint8Array(2 * TAR_BLOCK_BYTES));
}

/** The body of a PAX header (typeflag `x` or `g`): lines of `LENGTH KEY=VALUE`. */
export function paxRecords(record: Record<string, string>): Bytes {
  return concat(...Object.entries(record).map(([key, value]) => paxLine(` ${key}=${value}\n`)));
}

function paxLine(rest: string): Bytes {
  const bytes = toBytes(rest).length;
  // The length counts its own digits, so it may need one more than a first guess.
  let length = bytes + String(bytes).length;
  if (String(length).length > String(bytes).length) length++;
  return toBytes(`${length}${rest}`);
}

// ---------------------------------------------------------------------------------------------------------------------
// Images: configs, manifests, indexes
// ---------------------------------------------------------------------------------------------------------------------

/** The platform of an index's entry. */
export interface PlatformFields {
  architecture: string;
  os: string;
  variant?: string;
}

/** What a manifest or an index says about something that it names. */
export interface DescriptorFields {
  mediaType: string;
  digest: string;
  size: number;
  platform?: PlatformFields;
  annotations?: Record<string, string>;
}

/** A manifest or an index, ready to be pushed. */
export interface MadeManifest {
  manifest: Bytes;
  mediaType: string;
  /** What a registry calls the manifest; for a signed schema 1 that is not the hash of all its bytes. */
  digest: string;
  /** What an index says about it. */
  descriptor: DescriptorFields;
}

/** A manifest with all that it names. */
export interface MadeImage extends MadeManifest {
  /** Empty for schema 1, which has none. */
  config: Bytes;
  /** Layers and config by their digests. */
  blobs: Map<string, Bytes>;
}

/** What an image is made of. */
export interface ImageFields {
  /** Compressed or not, base first, so the final one is last. */
  layers: Uint8Array[];
  /** @default "amd64" */
  architecture?: string;
  /** @default "linux" */
  os?: string;
  variant?: string;
  /** @default "oci" */
  format?: "oci" | "docker";
  /** @default what the layer's bytes look like */
  layerMediaType?: string;
  /** Digests of the uncompressed layers, which saves inflating big ones. @default computed */
  diffIds?: string[];
}

/** Make an image of schema 2 or OCI. */
export function makeImage(fields: ImageFields): MadeImage {
  const { architecture = "amd64", os = "linux", variant, format = "oci" } = fields;
  const layers = fields.layers.map(asPlain);
  const platform = { architecture, os, ...(variant !== undefined && { variant }) };
  const rootfs = { type: "layers", diff_ids: fields.diffIds ?? layers.map((layer) => sha256(inflate(layer))) };
  const config = json({
    created: FIXED_DATE,
    ...platform,
    config: {},
    rootfs,
    history: layers.map(() => ({ created: FIXED_DATE })),
  });
  const mediaType = format === "oci" ? MEDIA.ociManifest : MEDIA.dockerManifest;
  const manifest = json({
    schemaVersion: 2,
    mediaType,
    config: describe(config, format === "oci" ? MEDIA.ociConfig : MEDIA.dockerConfig),
    layers: layers.map((layer) => describe(layer, fields.layerMediaType ?? layerMediaType(layer, format))),
  });
  const blobs = new Map([config, ...layers].map((blob) => [sha256(blob), blob]));
  const descriptor = { ...describe(manifest, mediaType), platform };
  return { manifest, mediaType, digest: descriptor.digest, config, blobs, descriptor };
}

/** Make an OCI index or a Docker manifest list. */
export function makeIndex(entries: DescriptorFields[], format: "oci" | "docker" = "oci"): MadeManifest {
  const mediaType = format === "oci" ? MEDIA.ociIndex : MEDIA.dockerList;
  const manifest = json({ schemaVersion: 2, mediaType, manifests: entries });
  const descriptor = describe(manifest, mediaType);
  return { manifest, mediaType, digest: descriptor.digest, descriptor };
}

/** What a schema 1 image is made of. */
export interface Schema1Fields {
  /** Base first, as for `makeImage`; the manifest lists them the other way round. */
  layers: Uint8Array[];
  /** The repository, which schema 1 names inside. */
  name: string;
  tag: string;
  architecture: string;
  /** Wrap it as Docker did, in a JWS signed with a key of its own. @default false */
  signed?: boolean;
}

/** Make an image of the old schema 1. */
export function makeSchema1({ layers, name, tag, architecture, signed = false }: Schema1Fields): MadeImage {
  const topFirst = layers.map(asPlain).reverse();
  const ids = topFirst.map((layer, at) => sha256(concat(`${at} `, layer)).slice("sha256:".length));
  const history = ids.map((id, at) => {
    const parent = ids[at + 1];
    return { id, ...(parent !== undefined && { parent }), created: FIXED_DATE, architecture, os: "linux", config: {} };
  });
  // Three blanks: what Docker used, and what the JWS below cuts its payload by.
  const payload = JSON.stringify(
    {
      schemaVersion: 1,
      name,
      tag,
      architecture,
      fsLayers: topFirst.map((layer) => ({ blobSum: sha256(layer) })),
      history: history.map((entry) => ({ v1Compatibility: JSON.stringify(entry) })),
    },
    null,
    3,
  );
  const manifest = toBytes(signed ? signSchema1(payload) : payload);
  const mediaType = signed ? MEDIA.dockerSchema1Signed : MEDIA.dockerSchema1;
  // The signatures are no part of what the digest covers.
  const digest = sha256(toBytes(payload));
  const descriptor = { mediaType, digest, size: manifest.length, platform: { architecture, os: "linux" } };
  const blobs = new Map(topFirst.map((layer) => [sha256(layer), layer]));
  return { manifest, mediaType, digest, config: new Uint8Array(), blobs, descriptor };
}

/** Docker's "pretty" JWS: the signatures stand inside the payload's own braces, which `protected` tells how to undo. */
function signSchema1(payload: string): string {
  const tail = "\n}";
  const head = payload.slice(0, -tail.length);
  const claims = {
    formatLength: toBytes(head).length,
    formatTail: base64url(tail),
    time: FIXED_DATE.toISOString().replace(".000", ""),
  };
  const protectedPart = base64url(JSON.stringify(claims));
  const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const signature = sign("sha256", toBytes(`${protectedPart}.${base64url(payload)}`), {
    key: privateKey,
    dsaEncoding: "ieee-p1363",
  });
  const { crv, kty, x, y } = publicKey.export({ format: "jwk" });
  const kid = keyFingerprint(new Uint8Array(publicKey.export({ format: "der", type: "spki" })));
  const signatures = [{
    header: { jwk: { crv, kid, kty, x, y }, alg: "ES256" },
    signature: signature.toString("base64url"),
    protected: protectedPart,
  }];
  const nested = JSON.stringify(signatures, null, 3).replaceAll("\n", "\n   ");
  return `${head},\n   "signatures": ${nested}${tail}`;
}

/** The name that Docker's signatures give a key: 240 bits of its hash in base 32, by fours. */
function keyFingerprint(der: Uint8Array): string {
  const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
  let bits = 0n;
  for (const byte of createHash("sha256").update(der).digest().subarray(0, 30)) bits = bits << 8n | BigInt(byte);
  const letters = Array.from({ length: 48 }, (_, at) => alphabet.charAt(Number(bits >> BigInt(5 * (47 - at)) & 31n)));
  return letters.join("").match(/.{4}/g)?.join(":") ?? "";
}

function base64url(text: string): string {
  return Buffer.from(text).toString("base64url");
}

function asPlain(bytes: Uint8Array): Bytes {
  // A copy only where the type asks for one: layers may be big.
  return bytes.buffer instanceof ArrayBuffer ? bytes as Bytes : new Uint8Array(bytes);
}

function json(value: unknown): Bytes {
  return toBytes(JSON.stringify(value));
}

function describe(bytes: Uint8Array, mediaType: string): DescriptorFields {
  return { mediaType, digest: sha256(bytes), size: bytes.length };
}

type Compression = "gzip" | "zstd" | "none";

function compressionOf(layer: Uint8Array): Compression {
  if (layer[0] === 0x1f && layer[1] === 0x8b) return "gzip";
  if (layer[0] === 0x28 && layer[1] === 0xb5 && layer[2] === 0x2f && layer[3] === 0xfd) return "zstd";
  return "none";
}

function layerMediaType(layer: Uint8Array, format: "oci" | "docker"): string {
  if (format === "docker") return MEDIA.dockerLayer;
  return { gzip: MEDIA.ociLayerGzip, zstd: MEDIA.ociLayerZstd, none: MEDIA.ociLayer }[compressionOf(layer)];
}

/** The layer's archive; broken layers, which tests make on purpose, stand for themselves. */
function inflate(layer: Bytes): Uint8Array {
  try {
    switch (compressionOf(layer)) {
      case "gzip":
        return gunzipSync(layer);
      case "zstd":
        return zstdDecompressSync(layer);
      case "none":
        return layer;
    }
  } catch {
    return layer;
  }
}
