/**
 * Builds what tests, demo and benchmark serve: wheels, valid and malformed tar archives, layers, manifests.
 *
 * All output is deterministic, except the signature of a signed schema 1 manifest, so that digests can be compared.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, sign } from "node:crypto";
import { crc32, deflateRawSync, gunzipSync, gzipSync, zstdCompressSync, zstdDecompressSync } from "node:zlib";

/** Bytes backed by an `ArrayBuffer`, the type that `Response` requires. */
export type Bytes = Uint8Array<ArrayBuffer>;

/** Media types of manifests, configs and layers. */
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

/** The time of every archive member and manifest. Zip cannot store years before 1980. */
const FIXED_DATE = new Date("2024-01-01T00:00:00Z");

const TAR_BLOCK_BYTES = 512;
/** Size of a header's name and link name fields. */
const NAME_BYTES = 100;

// ---------------------------------------------------------------------------------------------------------------------
// Bytes
// ---------------------------------------------------------------------------------------------------------------------

/** Encodes text as UTF-8. Copies bytes. */
export function toBytes(data: string | Uint8Array): Bytes {
  return typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
}

/** Joins the parts into one array. */
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

/** Returns the digest of these bytes as registries write it: `sha256:<hex>`. */
export function sha256(bytes: Uint8Array): string {
  return `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
}

/** Returns the digest of these bytes as registries write it: `sha512:<hex>`. */
export function sha512(bytes: Uint8Array): string {
  return `sha512:${createHash("sha512").update(bytes).digest("hex")}`;
}

/** Compresses the bytes into one gzip member. */
export function gzip(bytes: Uint8Array): Bytes {
  return new Uint8Array(gzipSync(bytes));
}

/** Compresses each part into a gzip member of its own, as eStargz does. */
export function gzipMembers(...parts: Uint8Array[]): Bytes {
  return concat(...parts.map(gzip));
}

/** Makes gzip that does not compress, so that as many bytes come in as go out. */
export function gzipStored(bytes: Uint8Array): Bytes {
  const [head, tail] = [gzip(bytes).subarray(0, 10), gzip(bytes).subarray(-8)];
  return concat(head, deflateRawSync(bytes, { level: 0 }), tail);
}

/** Compresses the bytes into one zstd frame. */
export function zstd(bytes: Uint8Array): Bytes {
  return new Uint8Array(zstdCompressSync(bytes));
}

// ---------------------------------------------------------------------------------------------------------------------
// Wheels: a zip of stored entries with the three metadata files that pip requires
// ---------------------------------------------------------------------------------------------------------------------

/** Describes a wheel to build. */
export interface WheelFields {
  /** Project name, such as `demo-hello`. The module's name is the same with `_` for `-`. */
  name: string;
  version: string;
  /** Compatibility tag. @default "py3-none-any" */
  tag?: string;
  /** Source text of the module. @default sets `__version__` */
  body?: string;
}

/** File name and content of a wheel. */
export interface Wheel {
  filename: string;
  bytes: Bytes;
}

/** Builds a wheel that `pip install` accepts. */
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
  // RECORD cannot contain its own hash.
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
    // "Made by" is Unix (3 << 8), so that readers use the mode in the upper half of the external attributes.
    const tail = littleEndian([2, 0], [2, 0], [2, 0], [4, 0o100644 * 0x10000], [4, offset]);
    directory.push(concat(littleEndian([4, 0x02014b50], [2, (3 << 8) | 20]), common, tail, name));
    offset += local.length;
  }
  const central = concat(...directory);
  const count = files.length;
  const end = [[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, central.length], [4, offset], [2, 0]];
  return concat(...locals, central, littleEndian(...end as [number, number][]));
}

/** Returns the fields that local headers and directory entries share, from "version needed" on. */
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
// Tar: valid archives (makeTar) and headers with arbitrary fields (rawHeader, rawTar)
// ---------------------------------------------------------------------------------------------------------------------

/** A member of a valid archive. */
export interface TarMember {
  /** A name that ends in `/` means a directory. */
  name: string;
  data?: string | Uint8Array;
  /** @default "file", or "directory" if the name ends in `/` */
  type?: "file" | "directory" | "symlink" | "link" | "character-device" | "block-device" | "fifo";
  linkname?: string;
  /** @default 0o644, or 0o755 for a directory */
  mode?: number;
  /** @default 2024-01-01 */
  mtime?: Date;
  /** Additional PAX records of this member. */
  pax?: Record<string, string>;
}

const TYPEFLAGS: Record<NonNullable<TarMember["type"]>, string> = {
  file: "0",
  link: "1",
  symlink: "2",
  "character-device": "3",
  "block-device": "4",
  directory: "5",
  fifo: "6",
};

/** Builds an uncompressed ustar archive. Writes PAX records for names that are long or not ASCII. */
export function makeTar(members: TarMember[]): Promise<Bytes> {
  return Promise.resolve(packMembers(members));
}

function packMembers(members: TarMember[]): Bytes {
  return rawTar(...members.flatMap(tarParts));
}

function tarParts({ name, data = "", type, linkname = "", mode, mtime = FIXED_DATE, pax }: TarMember): Bytes[] {
  const isDirectory = type === "directory" || (type === undefined && name.endsWith("/"));
  const path = isDirectory && !name.endsWith("/") ? `${name}/` : name;
  const body = toBytes(data);
  const records = { ...paxIfNeeded("path", path), ...paxIfNeeded("linkpath", linkname), ...pax };
  const header = rawHeader({
    name: toBytes(path).subarray(0, NAME_BYTES),
    linkname: toBytes(linkname).subarray(0, NAME_BYTES),
    typeflag: TYPEFLAGS[type ?? (isDirectory ? "directory" : "file")],
    mode: mode ?? (isDirectory ? 0o755 : 0o644),
    mtime: Math.floor(mtime.getTime() / 1000),
    size: body.length,
  });
  if (Object.keys(records).length === 0) return [header, body];
  const paxBody = paxRecords(records);
  return [rawHeader({ name: "PaxHeader", typeflag: "x", size: paxBody.length }), paxBody, header, body];
}

/** Returns a PAX record for a name that a ustar header cannot hold. */
function paxIfNeeded(key: string, name: string): Record<string, string> {
  const isPlain = name.length <= NAME_BYTES && /^[ -~]*$/.test(name);
  return isPlain ? {} : { [key]: name };
}

/** A number becomes octal digits, or base 256 if these cannot hold it. Text and bytes fill the field unchanged. */
export type NumberField = number | string | Uint8Array;

/** Fields of one header block. Only their lengths are checked. */
export interface RawHeaderFields {
  name: string | Uint8Array;
  size?: NumberField;
  /** @default "0", a regular file */
  typeflag?: string;
  linkname?: string | Uint8Array;
  /** @default 0o644 */
  mode?: NumberField;
  /** @default 0 */
  uid?: NumberField;
  /** @default 0 */
  gid?: NumberField;
  /** Seconds. @default 2024-01-01 */
  mtime?: NumberField;
  prefix?: string | Uint8Array;
  /** @default "ustar" */
  magic?: "ustar" | "gnu" | "v7";
  /** Replaces the correct sum, or selects the sum of signed bytes, which some old programs write. */
  checksum?: number | "signed";
}

/** Builds one header block. */
export function rawHeader(fields: RawHeaderFields): Bytes {
  const { name, size = 0, typeflag = "0", linkname = "", mode = 0o644, prefix = "", magic = "ustar" } = fields;
  const { uid = 0, gid = 0, mtime = FIXED_DATE.getTime() / 1000, checksum } = fields;
  const block = new Uint8Array(TAR_BLOCK_BYTES);
  put(block, 0, NAME_BYTES, name);
  put(block, 100, 8, numberField(mode, 8));
  put(block, 108, 8, numberField(uid, 8));
  put(block, 116, 8, numberField(gid, 8));
  put(block, 124, 12, numberField(size, 12));
  put(block, 136, 12, numberField(mtime, 12));
  put(block, 156, 1, typeflag);
  put(block, 157, NAME_BYTES, linkname);
  put(block, 257, 8, { ustar: "ustar\x0000", gnu: "ustar  \0", v7: "" }[magic]);
  put(block, 345, 155, prefix);
  fixChecksum(block, checksum);
  return block;
}

/** Sets the checksum of a header block, by default to the correct one. */
export function fixChecksum(block: Uint8Array, checksum: number | "signed" = tarChecksum(block)): void {
  const sum = checksum === "signed" ? tarChecksum(new Int8Array(block)) : checksum;
  put(block, 148, 8, `${octal(sum, 6)}\0 `);
}

/** Sums the bytes as if the checksum's own field contained blanks. */
function tarChecksum(block: Uint8Array | Int8Array): number {
  let sum = 8 * 0x20;
  for (const [at, byte] of block.entries()) {
    if (at < 148 || at >= 156) sum += byte;
  }
  return sum;
}

function put(block: Uint8Array, offset: number, length: number, value: string | Uint8Array): void {
  const bytes = toBytes(value);
  if (bytes.length > length) throw new RangeError(`${bytes.length} bytes do not fit into a field of ${length}`);
  block.set(bytes, offset);
}

function numberField(value: NumberField, width: number): string | Uint8Array {
  if (typeof value !== "number") return value;
  return value >= 0 && value < 8 ** (width - 1) ? octal(value, width - 1) : base256(value, width);
}

function octal(value: number, digits: number): string {
  return value.toString(8).padStart(digits, "0");
}

/** Encodes a whole number as GNU tar does if octal digits do not suffice: two's complement with the top bit set. */
export function base256(value: number, width: number): Bytes {
  const field = new Uint8Array(width);
  let rest = BigInt(value);
  for (let at = width - 1; at >= 0; at--) {
    field[at] = Number(rest & 0xffn);
    rest >>= 8n;
  }
  field[0] = value < 0 ? 0xff : 0x80;
  return field;
}

/** Joins headers and bodies: pads each part to whole blocks and appends the end marker, two zero blocks. */
export function rawTar(...parts: (Uint8Array | string)[]): Bytes {
  return concat(rawMembers(...parts), new Uint8Array(2 * TAR_BLOCK_BYTES));
}

/** Joins headers and bodies like `rawTar`, without the end marker. */
export function rawMembers(...parts: (Uint8Array | string)[]): Bytes {
  const padded = parts.flatMap((part) => {
    const bytes = typeof part === "string" ? toBytes(part) : part;
    return [bytes, new Uint8Array((TAR_BLOCK_BYTES - bytes.length % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES)];
  });
  return concat(...padded);
}

/** Parts of an archive, in order: headers, bodies, and lists of these. */
export type Parts = (string | Uint8Array | Parts)[];

/** Builds an archive of any members, as `rawTar`. */
export function tarOf(...parts: Parts): Bytes {
  return rawTar(...flatParts(parts));
}

/** Returns the headers and bodies of nested parts. */
export function flatParts(parts: Parts): (string | Uint8Array)[] {
  return parts.flatMap((part) => Array.isArray(part) ? flatParts(part) : [part]);
}

/** A file that contains its own name, or `data`. */
export function file(
  name: string | Uint8Array,
  data: string | Uint8Array = name,
  fields: Partial<RawHeaderFields> = {},
): Parts {
  return [rawHeader({ name, size: toBytes(data).length, ...fields }), data];
}

/** A symbolic link. */
export function symlink(name: string, linkname: string): Parts {
  return [rawHeader({ name, linkname, typeflag: "2" })];
}

/** A hard link. */
export function hardlink(name: string, linkname: string): Parts {
  return [rawHeader({ name, linkname, typeflag: "1" })];
}

/** A directory. */
export function directory(name: string, mode: number = 0o755): Parts {
  return [rawHeader({ name, typeflag: "5", mode })];
}

/** Returns the offsets of all headers of a valid archive, those of PAX and GNU extensions included. */
export function headerOffsets(tar: Uint8Array): number[] {
  const offsets: number[] = [];
  for (let at = 0; at < tar.length && tar[at] !== 0;) {
    offsets.push(at);
    const size = parseInt(new TextDecoder().decode(tar.subarray(at + 124, at + 135)), 8);
    at += TAR_BLOCK_BYTES * (1 + Math.ceil(size / TAR_BLOCK_BYTES));
  }
  return offsets;
}

/** Builds the body of a PAX header (typeflag `x` or `g`): lines of `LENGTH KEY=VALUE`. */
export function paxRecords(records: Record<string, string | Uint8Array>): Bytes {
  return concat(...Object.entries(records).map(([key, value]) => paxLine(concat(` ${key}=`, value, "\n"))));
}

function paxLine(rest: Uint8Array): Bytes {
  // The length includes its own digits, so it may need one digit more than the first guess.
  let length = rest.length + String(rest.length).length;
  if (String(length).length > String(rest.length).length) length++;
  return concat(String(length), rest);
}

// ---------------------------------------------------------------------------------------------------------------------
// Images: configs, manifests, indexes
// ---------------------------------------------------------------------------------------------------------------------

/** Platform of an index entry. */
export interface PlatformFields {
  architecture: string;
  os: string;
  variant?: string;
}

/** Descriptor of a blob or a manifest. */
export interface DescriptorFields {
  mediaType: string;
  digest: string;
  size: number;
  platform?: PlatformFields;
  annotations?: Record<string, string>;
}

/** A manifest or an index that can be pushed. */
export interface MadeManifest {
  manifest: Bytes;
  mediaType: string;
  /** Digest by which a registry serves the manifest. A signed schema 1 manifest is hashed without its signatures. */
  digest: string;
  /** Descriptor for an index. */
  descriptor: DescriptorFields;
}

/** A manifest with its config and layers. */
export interface MadeImage extends MadeManifest {
  /** Empty for schema 1, which has no config. */
  config: Bytes;
  /** Layers and config by digest. */
  blobs: Map<string, Bytes>;
}

/** Describes an image to build. */
export interface ImageFields {
  /** Base first; compressed or not. */
  layers: Uint8Array[];
  /** @default "amd64" */
  architecture?: string;
  /** @default "linux" */
  os?: string;
  variant?: string;
  /** @default "oci" */
  format?: "oci" | "docker";
  /** @default detected from the layer's bytes */
  layerMediaType?: string;
  /** Digests of the uncompressed layers, for tests whose layers are too large to decompress. @default computed */
  diffIds?: string[];
}

/** Builds an OCI or Docker schema 2 image. */
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

/** Builds an OCI index or a Docker manifest list. */
export function makeIndex(entries: DescriptorFields[], format: "oci" | "docker" = "oci"): MadeManifest {
  const mediaType = format === "oci" ? MEDIA.ociIndex : MEDIA.dockerList;
  const manifest = json({ schemaVersion: 2, mediaType, manifests: entries });
  const descriptor = describe(manifest, mediaType);
  return { manifest, mediaType, digest: descriptor.digest, descriptor };
}

/** Returns the files of an OCI layout with these images and tagged manifests. */
export function layoutMembers(
  images: MadeImage[],
  tagged: Record<string, MadeManifest>,
): (TarMember & { data: Bytes })[] {
  const tags = Object.entries(tagged);
  const blobs = [
    ...images.flatMap(({ manifest, blobs }) => [manifest, ...blobs.values()]),
    ...tags.map(([, made]) => made.manifest),
  ];
  const manifests = tags.map(([tag, { descriptor }]) => {
    return { ...descriptor, annotations: { "org.opencontainers.image.ref.name": tag } };
  });
  const unique = new Map(blobs.map((data) => [sha256(data), data]));
  return [
    ...[...unique].map(([digest, data]) => ({ name: `blobs/${digest.replace(":", "/")}`, data })),
    { name: "oci-layout", data: json({ imageLayoutVersion: "1.0.0" }) },
    { name: "index.json", data: json({ schemaVersion: 2, manifests }) },
  ];
}

/** Builds an OCI archive of one image, in which the blobs precede `index.json`, as skopeo writes it. */
export function makeOciArchive(image: MadeImage): Bytes {
  const blobs = [...image.blobs, [image.digest, image.manifest] as const];
  const { platform: _, ...descriptor } = image.descriptor;
  return packMembers([
    { name: "oci-layout", data: json({ imageLayoutVersion: "1.0.0" }) },
    ...blobs.map(([digest, data]) => ({ name: `blobs/${digest.replace(":", "/")}`, data })),
    { name: "index.json", data: json({ schemaVersion: 2, manifests: [descriptor] }) },
  ]);
}

/** Builds an archive as `docker save` does, of an image with these uncompressed layers. */
export function makeDockerArchive(layers: Uint8Array[], { architecture = "amd64", os = "linux" } = {}): Bytes {
  const config = json({ architecture, os, rootfs: { type: "layers", diff_ids: layers.map(sha256) } });
  const configName = `${sha256(config).slice("sha256:".length)}.json`;
  const files = layers.map((data, at) => ({ name: `${at}/layer.tar`, data }));
  const manifest = [{ Config: configName, RepoTags: ["wheels:1.0"], Layers: files.map(({ name }) => name) }];
  return packMembers([{ name: configName, data: config }, ...files, { name: "manifest.json", data: json(manifest) }]);
}

/** Describes a schema 1 image to build. */
export interface Schema1Fields {
  /** Base first, as for `makeImage`. The manifest lists the final layer first. */
  layers: Uint8Array[];
  /** Repository, which the manifest contains. */
  name: string;
  tag: string;
  architecture: string;
  /** Wraps the manifest in a JWS signed with a new key, as Docker does. @default false */
  signed?: boolean;
}

/** Builds an image in Docker's schema 1. */
export function makeSchema1({ layers, name, tag, architecture, signed = false }: Schema1Fields): MadeImage {
  const topFirst = layers.map(asPlain).reverse();
  const ids = topFirst.map((layer, at) => sha256(concat(`${at} `, layer)).slice("sha256:".length));
  const history = ids.map((id, at) => {
    const parent = ids[at + 1];
    return { id, ...(parent !== undefined && { parent }), created: FIXED_DATE, architecture, os: "linux", config: {} };
  });
  // Docker indents by three blanks. The JWS refers to the payload's exact bytes.
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
  // The digest does not cover the signatures.
  const digest = sha256(toBytes(payload));
  const descriptor = { mediaType, digest, size: manifest.length, platform: { architecture, os: "linux" } };
  const blobs = new Map(topFirst.map((layer) => [sha256(layer), layer]));
  return { manifest, mediaType, digest, config: new Uint8Array(), blobs, descriptor };
}

/** Builds Docker's "pretty" JWS: signatures inside the payload's braces; `protected` says how to remove them. */
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

/** Returns the key ID of Docker's signatures: 240 bits of the key's hash in base 32, in groups of four letters. */
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
  // Layers may be large, so copy only shared buffers.
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

/** Decompresses a layer. Returns layers that are corrupt on purpose unchanged. */
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
