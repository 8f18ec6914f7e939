/**
 * The benchmark's layers: what they hold, and how they get into a registry. All random numbers come from a cipher with a
 * fixed key, so that a layer has the same files everywhere. It goes into the registry's storage as if it had been pushed,
 * and stays there for the next run.
 *
 * @module
 */

import { createCipheriv, createHash } from "node:crypto";
import { dirname } from "node:path";

/** Part of a layer's name. Raise it when what is in a layer changes. */
const RECIPE = 2;
const MIB = 2 ** 20;
const COMPRESSORS = { gzip: "gzip -6n", zstd: "zstd -3 -q" };

export type Format = keyof typeof COMPRESSORS;

type Members = Generator<[path: string, content: Uint8Array<ArrayBuffer>]>;

export interface Shape {
  name: string;
  /** Bytes, or files. */
  amount: number;
  members(random: Random, amount: number): Members;
}

/** A layer in the registry, as the tag `1` of a repository of its own. */
export interface Layer {
  repository: string;
  digest: string;
  size: number;
  files: number;
  /** What `digestTree()` returns for the layer's files. */
  tree: string;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1 Shapes: what is in a layer
// ---------------------------------------------------------------------------------------------------------------------

export const TEXT: Shape = { name: "text", amount: 180 * MIB, members: textMembers };
export const SMALL_FILES: Shape = { name: "small-files", amount: 20_000, members: smallMembers };
export const TINY: Shape = { name: "tiny", amount: 100_000, members: wheelMembers };

export function wheels(mebibytes: number): Shape {
  return { name: `wheels-${mebibytes}`, amount: mebibytes * MIB, members: wheelMembers };
}

class Random {
  readonly #cipher = createCipheriv("aes-128-ctr", new Uint8Array(16), new Uint8Array(16));
  #numbers = new Uint32Array();
  #next = 0;

  bytes(length: number): Uint8Array<ArrayBuffer> {
    return new Uint8Array(this.#cipher.update(new Uint8Array(length)));
  }

  /** Above 0 and below 1. */
  uniform(): number {
    if (this.#next === this.#numbers.length) {
      this.#numbers = new Uint32Array(this.bytes(64 * 1024).buffer);
      this.#next = 0;
    }
    return (this.#numbers[this.#next++]! + 0.5) / 2 ** 32;
  }

  integer(least: number, below: number): number {
    return least + Math.floor(this.uniform() * (below - least));
  }

  /** By Box and Muller. */
  lognormal(median: number, sigma: number): number {
    const normal = Math.sqrt(-2 * Math.log(this.uniform())) * Math.cos(2 * Math.PI * this.uniform());
    return Math.ceil(median * Math.exp(sigma * normal));
  }
}

/**
 * To gzip, a wheel is almost noise: wheels from PyPI shrink by 1.3 % and take twice as long to inflate as noise, which
 * gzip merely stores. In every other 64 KiB, two bytes of three lose their top bit here, which gives the same shrinkage
 * and the same time.
 */
function* wheelMembers(random: Random, bytes: number): Members {
  let constraints = "";
  for (let number = 1, left = bytes; left > 0; number++) {
    const wheel = random.bytes(Math.min(random.lognormal(150_000, 1.8), 80_000_000, left));
    for (let at = 0; at < wheel.length; at++) if (at & 0x10000 && at % 3) wheel[at]! &= 0x7f;
    left -= wheel.length;
    yield [`package_${number}-1.${number % 30}-py3-none-any.whl`, wheel];
    constraints += `package-${number}===1.${number % 30}\n`;
  }
  yield ["upper-constraints.txt", new TextEncoder().encode(constraints)];
}

function* textMembers(random: Random, bytes: number): Members {
  const write = textWriter(random);
  for (let number = 1, left = bytes; left > 0; number++) {
    const text = write(Math.min(random.lognormal(60_000, 1), left));
    left -= text.length;
    yield [`text/${number % 40}/file_${number}.txt`, text];
  }
}

function* smallMembers(random: Random, files: number): Members {
  const write = textWriter(random);
  for (let number = 1; number <= files; number++) {
    yield [`package_${number % 200}/module_${number}.py`, write(Math.min(random.lognormal(1200, 1), 50_000))];
  }
}

/** Writes words with Zipf's frequencies, and repeats phrases, until gzip -6 shrinks them about as well as Python code. */
function textWriter(random: Random): (bytes: number) => Uint8Array<ArrayBuffer> {
  const letters =
    "eeeeeeeeeeeetttttttttaaaaaaaaoooooooiiiiiiinnnnnnnsssssshhhhhhrrrrrrddddllllcccuuummmwwffggyyppbbvk_";
  const words = Array.from({ length: 5000 }, () => {
    const length = random.integer(2, 11);
    const word = Array.from({ length }, () => letters[random.integer(0, letters.length)]).join("");
    return new TextEncoder().encode(word + (random.uniform() < 0.15 ? "\n    " : " "));
  });
  return (bytes) => {
    const text = new Uint8Array(bytes);
    for (let at = 0; at < bytes;) {
      const earlier = at - random.integer(200, 20_000);
      const piece = earlier >= 0 && random.uniform() < 0.03
        ? text.slice(earlier, earlier + random.integer(20, 120))
        : words[Math.floor(words.length ** random.uniform()) - 1]!;
      text.set(piece.subarray(0, bytes - at), at);
      at += piece.length;
    }
    return text;
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 Making a layer, unless an earlier run did
// ---------------------------------------------------------------------------------------------------------------------

export interface LayerOptions {
  shape: Shape;
  format: Format;
  /** The shape's amount is multiplied by this. */
  scale: number;
  /** The registry's root directory. */
  storage: string;
  signal: AbortSignal;
}

export async function findOrMakeLayer(options: LayerOptions): Promise<Layer> {
  const { shape, format, storage } = options;
  const amount = Math.ceil(shape.amount * options.scale);
  const repository = `bench/${shape.name}-${amount}-${format}-${RECIPE}`;
  const record = `${storage}/${repository.replace("/", "-")}.json`; // written last: with it, the layer is complete
  try {
    return JSON.parse(await Deno.readTextFile(record));
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  console.error(`bench: making ${repository}`);
  await Deno.mkdir(storage, { recursive: true });
  const path = `${storage}/unfinished-${Deno.pid}`;
  try {
    const archive = await writeArchive(shape.members(new Random(), amount), path, options);
    const digest = await digestFile(path);
    const { size } = await Deno.stat(path);
    const layer = { repository, digest, size, files: archive.files, tree: archive.tree };
    await storeImage(layer, path, { storage, diffId: archive.diffId, format });
    await Deno.writeTextFile(record, JSON.stringify(layer));
    return layer;
  } finally {
    await Deno.remove(path).catch(() => {}); // unless it has its final name
  }
}

async function writeArchive(members: Members, path: string, { format, signal }: LayerOptions) {
  const args = ["-c", `exec ${COMPRESSORS[format]} >"$1"`, "bash", path];
  await using compressor = new Deno.Command("bash", { args, stdin: "piped", signal }).spawn();
  const writer = compressor.stdin.getWriter();
  const hash = createHash("sha256");
  const lines: string[] = [];
  const write = async (bytes: Uint8Array<ArrayBuffer>) => {
    hash.update(bytes);
    await writer.write(bytes);
  };
  try {
    for (const [name, content] of members) {
      await write(tarHeader(name, content.length));
      await write(content);
      await write(new Uint8Array(-content.length & 511));
      lines.push(treeLine(name, content));
    }
    await write(new Uint8Array(1024));
    await writer.close();
  } catch (error) {
    if (!(error instanceof Deno.errors.BrokenPipe)) throw error; // else the compressor has ended, with a status
  }
  const { success, code } = await compressor.status;
  signal.throwIfAborted();
  if (!success) throw new Error(`Cannot make a layer with "${COMPRESSORS[format]}": exit status ${code}`);
  return { diffId: `sha256:${hash.digest("hex")}`, tree: sha256(lines.toSorted().join("\n")), files: lines.length };
}

function tarHeader(name: string, size: number): Uint8Array<ArrayBuffer> {
  const octal = (value: number, digits: number) => value.toString(8).padStart(digits, "0") + "\0";
  const start = name.padEnd(100, "\0") + octal(0o644, 7) + octal(0, 7) + octal(0, 7) + octal(size, 11) +
    octal(1_700_000_000, 11);
  const end = "0" + "\0".repeat(100) + "ustar\0" + "00";
  const encode = (checksum: string) => new TextEncoder().encode((start + checksum + end).padEnd(512, "\0"));
  const sum = encode(" ".repeat(8)).reduce((total, byte) => total + byte, 0);
  return encode(octal(sum, 6) + " ");
}

/** Stores an image as distribution's filesystem driver keeps it: blobs by digest, and links from the repository. */
async function storeImage(
  layer: Layer,
  path: string,
  { storage, diffId, format }: { storage: string; diffId: string; format: Format },
): Promise<void> {
  const write = async (file: string, text: string) => {
    await Deno.mkdir(dirname(file), { recursive: true });
    await Deno.writeTextFile(file, text);
  };
  const writeJson = async (value: unknown) => {
    const text = JSON.stringify(value);
    const digest = `sha256:${sha256(text)}`;
    await write(blobPath(storage, digest), text);
    return { size: text.length, digest };
  };
  const oci = "application/vnd.oci.image";
  const architecture = Deno.build.arch === "x86_64" ? "amd64" : "arm64";
  const rootfs = { type: "layers", diff_ids: [diffId] };
  const config = await writeJson({ architecture, os: "linux", config: {}, rootfs });
  const manifest = await writeJson({
    schemaVersion: 2,
    mediaType: `${oci}.manifest.v1+json`,
    config: { mediaType: `${oci}.config.v1+json`, ...config },
    layers: [{ mediaType: `${oci}.layer.v1.tar+${format}`, size: layer.size, digest: layer.digest }],
  });
  await Deno.mkdir(dirname(blobPath(storage, layer.digest)), { recursive: true });
  await Deno.rename(path, blobPath(storage, layer.digest));
  const repository = `${storage}/docker/registry/v2/repositories/${layer.repository}`;
  const part = (digest: string) => digest.replace(":", "/");
  for (const { digest } of [layer, config]) await write(`${repository}/_layers/${part(digest)}/link`, digest);
  for (const directory of [`revisions/${part(manifest.digest)}`, "tags/1/current"]) {
    await write(`${repository}/_manifests/${directory}/link`, manifest.digest);
  }
}

/** The file that holds a blob. */
export function blobPath(storage: string, digest: string): string {
  const hex = digest.slice("sha256:".length);
  return `${storage}/docker/registry/v2/blobs/sha256/${hex.slice(0, 2)}/${hex}/data`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 Digests: of bytes, of a file, and of all paths and contents below a directory
// ---------------------------------------------------------------------------------------------------------------------

export function digestTree(root: string): { tree: string; files: number } {
  const lines: string[] = [];
  const walk = (prefix: string) => {
    for (const { name, isDirectory } of Deno.readDirSync(`${root}/${prefix}`)) {
      if (isDirectory) walk(`${prefix}${name}/`);
      else lines.push(treeLine(prefix + name, Deno.readFileSync(`${root}/${prefix}${name}`)));
    }
  };
  walk("");
  return { tree: sha256(lines.toSorted().join("\n")), files: lines.length };
}

function treeLine(path: string, content: Uint8Array): string {
  return `${sha256(content)} ${path}`;
}

function sha256(content: Uint8Array | string): string {
  return createHash("sha256").update(content).digest("hex");
}

async function digestFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  using file = await Deno.open(path);
  for await (const chunk of file.readable) hash.update(chunk);
  return `sha256:${hash.digest("hex")}`;
}
