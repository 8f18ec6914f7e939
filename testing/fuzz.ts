/**
 * Mutates archives at random and checks that `fetchWheels` extracts them or refuses them: no internal error, no hang,
 * nothing written outside DEST, and DEST unchanged after a failure.
 *
 * The test suite calls `fuzz()` for some seconds. By hand, and several times faster with the files in memory:
 *
 * ```sh
 * TMPDIR=/dev/shm deno run -A testing/fuzz.ts --seconds 600 --seed 7
 * deno run -A testing/fuzz.ts --seed 7 --case 1234
 * ```
 *
 * @module
 */

import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { isDeepStrictEqual, parseArgs } from "node:util";
import { fetchWheels, FetchWheelsError, type FetchWheelsOptions } from "../fetch_wheels.ts";
import {
  base256,
  type Bytes,
  concat,
  fixChecksum,
  gzip,
  gzipMembers,
  headerOffsets,
  makeDockerArchive,
  makeImage,
  makeOciArchive,
  makeTar,
  paxRecords,
  rawHeader,
  type RawHeaderFields,
  rawMembers,
  rawTar,
  toBytes,
  zstd,
} from "./images.ts";
import { snapshot } from "./scratch.ts";

/** Limits of a run. */
export interface FuzzOptions {
  /** Selects the mutations. The same seed gives the same cases. */
  seed: number;
  /** Stop after so many seconds. */
  seconds: number;
  /** Run only the case of this number. */
  only?: number;
  /** Receives the number of cases so far, every ten seconds. */
  onProgress?: (cases: number) => void;
}

/** Result of a run. */
export interface FuzzResult {
  cases: number;
  /** Number of cases by outcome: `extracted` or the kind of the error. */
  outcomes: Record<string, number>;
}

type WorkerMessage = { started: number } | { finished: FuzzResult } | { failure: string };

/** Much longer than the slowest case. */
const CASE_DEADLINE_MS = 20_000;
const WORKER_NAME = "fuzz";

/**
 * Runs cases until the time is over or a case fails. They run in a worker, so that an endless loop is detected as well.
 *
 * @throws {Error} if a case fails; the message has the seed, the case's number and the path of the stored input
 */
export async function fuzz({ onProgress, ...options }: FuzzOptions): Promise<FuzzResult> {
  const directory = Deno.realPathSync(Deno.makeTempDirSync({ prefix: "fetch_wheels_fuzz-" }));
  const outcome = Promise.withResolvers<FuzzResult>();
  let current = options.only ?? 0;
  const fail = (state: string) => {
    const again = `deno run -A testing/fuzz.ts --seed ${options.seed} --case ${current}`;
    outcome.reject(new Error(`${state}\nrepeat with: ${again}\ninput and DEST: ${directory}`));
  };
  const restart = () =>
    setTimeout(() => fail(`case ${current} runs for more than ${CASE_DEADLINE_MS} ms`), CASE_DEADLINE_MS);
  let timer = restart();
  const ticker = setInterval(() => onProgress?.(current), 10_000);
  const worker = new Worker(import.meta.url, { type: "module", name: WORKER_NAME });
  worker.onmessage = ({ data }: MessageEvent<WorkerMessage>) => {
    clearTimeout(timer);
    timer = restart();
    if ("started" in data) current = data.started;
    else if ("finished" in data) outcome.resolve(data.finished);
    else fail(data.failure);
  };
  worker.onerror = (event) => {
    event.preventDefault();
    fail(`uncaught: ${event.message}`);
  };
  worker.postMessage({ ...options, directory });
  try {
    const result = await outcome.promise;
    Deno.removeSync(directory, { recursive: true });
    return result;
  } finally {
    clearTimeout(timer);
    clearInterval(ticker);
    worker.terminate();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The worker: runs one case after the other
// ---------------------------------------------------------------------------------------------------------------------

type Job = Omit<FuzzOptions, "onProgress"> & { directory: string };

async function serveFuzzing(job: Job, post: (message: WorkerMessage) => void): Promise<void> {
  const bases = await makeBases();
  const result: FuzzResult = { cases: 0, outcomes: {} };
  const end = performance.now() + job.seconds * 1000;
  for (let number = job.only ?? 0; performance.now() < end; number++) {
    post({ started: number });
    try {
      const outcome = await runCase(bases, { ...job, number });
      result.cases++;
      result.outcomes[outcome] = (result.outcomes[outcome] ?? 0) + 1;
    } catch (error) {
      return post({ failure: `case ${number}: ${(error as Error).stack}` });
    }
    if (job.only !== undefined) break;
  }
  post({ finished: result });
}

const OLD_FILES = { "old.whl": "old", "sub/old.txt": "old text", "good.whl": "old and good" };

/** Returns `extracted` or the kind of the error. Throws if `fetchWheels` did something that it must not do. */
async function runCase(bases: Bytes[], { seed, number, directory }: Job & { number: number }): Promise<string> {
  const random = new Random(Math.imul(seed, 1_000_003) + number);
  const { source, options } = makeCase(bases, { random, directory });
  const box = join(directory, "box");
  const dest = join(box, "a/b/dest");
  if (!existsSync(box)) {
    for (const [name, text] of Object.entries(OLD_FILES)) write(join(dest, name), toBytes(text));
    // Links that lead outside are detected only if their targets exist.
    for (const name of ["a/beside.txt", "a/b/evil", "a/b/old.whl"]) write(join(box, name), toBytes("outside"));
  }
  const before = snapshot(box);
  try {
    const { files } = await fetchWheels(source, { ...options, dest });
    checkTree(before, { after: snapshot(box), files: options.list ? [] : files, isCleaned: options.clean === true });
    for (const { path } of options.list ? [] : files) checkLink(dest, path);
    Deno.removeSync(box, { recursive: true });
    return "extracted";
  } catch (error) {
    checkError(error);
    const after = snapshot(box);
    if (!isDeepStrictEqual(after, before)) {
      throw new Error(`the failure ${error.message} changed files:\n${JSON.stringify({ before, after }, null, 1)}`);
    }
    return error.kind;
  }
}

/** Asserts that the error is one that a malformed archive may cause. */
function checkError(error: unknown): asserts error is FetchWheelsError {
  if (!(error instanceof FetchWheelsError)) throw error;
  const { kind, message, hint = "" } = error;
  // A name may be too long for the file system, or the name of a directory in DEST.
  const isExpected = ["integrity", "unsafe", "not-found"].includes(kind) ||
    (kind === "io" && /name.* too long|directory/i.test(message));
  if (!isExpected) throw new Error(`unexpected ${kind}: ${message}`, { cause: error });
  // deno-lint-ignore no-control-regex
  if (/[\0-\x1f\x7f]/.test(message + hint)) throw new Error(`control characters in ${JSON.stringify([message, hint])}`);
}

/** Asserts that DEST holds exactly the reported and the old files, and that nothing else changed. */
function checkTree(
  before: Record<string, string>,
  { after, files, isCleaned }: { after: Record<string, string>; files: { path: string }[]; isCleaned: boolean },
): void {
  const inDest = "a/b/dest/";
  const expected = new Set(files.map(({ path }) => inDest + path));
  for (const [path, entry] of Object.entries(before)) {
    const mayChange = expected.has(path) || (isCleaned && path.startsWith(inDest));
    if (!mayChange && after[path] !== entry) throw new Error(`${path} changed from ${entry} to ${after[path]}`);
  }
  for (const [path, entry] of Object.entries(after)) {
    if (path in before || entry.startsWith("directory") && path.startsWith(inDest)) continue;
    if (!expected.has(path)) throw new Error(`${path} exists but was not reported`);
  }
  for (const path of expected) {
    if (!(path in after)) throw new Error(`${path} was reported but does not exist`);
  }
}

/** Asserts that a file is not a link to something outside. */
function checkLink(dest: string, path: string): void {
  const full = join(dest, path);
  if (!Deno.lstatSync(full).isSymlink) return;
  const isInside = !Deno.readLinkSync(full).startsWith("/") &&
    (!existsSync(full) || Deno.realPathSync(full).startsWith(`${dest}/`) || Deno.realPathSync(full) === dest);
  if (!isInside) throw new Error(`${path} links to ${Deno.readLinkSync(full)}`);
}

function write(path: string, bytes: Uint8Array): void {
  Deno.mkdirSync(dirname(path), { recursive: true });
  Deno.writeFileSync(path, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cases
// ---------------------------------------------------------------------------------------------------------------------

/** Generates the same numbers from the same seed on every machine (mulberry32). */
export class Random {
  #state: number;

  /** Starts the sequence of this seed. */
  constructor(seed: number) {
    this.#state = seed | 0;
  }

  /** Returns a whole number from 0 to below the limit. */
  below(limit: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor(((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 * limit);
  }

  /** Returns one of the choices. */
  pick<T>(choices: readonly T[]): T {
    return choices[this.below(choices.length)] as T;
  }
}

/** Builds the valid archives that are mutated. Together they use every feature of the reader. */
async function makeBases(): Promise<Bytes[]> {
  const long = `${"long/".repeat(30)}name.whl`;
  const mixed = await makeTar([
    { name: "./" },
    { name: ".hidden", data: "x".repeat(700) },
    { name: "good.whl", data: "good" },
    { name: "sub/" },
    { name: "sub/b.whl", data: "b".repeat(513), mode: 0o4777 },
    { name: "sub/link", type: "symlink", linkname: "../good.whl" },
    { name: "hard.whl", type: "link", linkname: "good.whl" },
    { name: long, data: "long" },
    { name: "null", type: "character-device" },
    { name: "käse.whl", data: "käse", pax: { comment: "a\nb", mtime: "-0.5" } },
    { name: "upper-constraints.txt", data: "a===1\nb===2\n" },
  ]);
  const gnu = (fields: RawHeaderFields) => rawHeader({ magic: "gnu", ...fields });
  const old = rawTar(
    gnu({ name: "label", typeflag: "V" }),
    gnu({ name: "long name", typeflag: "L", size: long.length }),
    long,
    gnu({ name: "cut", size: base256(5, 12), mtime: -1 }),
    "hello",
    gnu({ name: "long link", typeflag: "K", size: 9 }),
    "good.whl\0",
    gnu({ name: "link", typeflag: "2", linkname: "cut" }),
    gnu({ name: "sparse", typeflag: "S", size: 3 }),
    "abc",
    rawHeader({ name: "v7", size: 3, typeflag: "\0", magic: "v7" }),
    "abc",
  );
  const hidden = { name: ".pad", data: "p".repeat(70_000) };
  const large = await makeTar([hidden, { name: "a.whl", data: noise(70_000) }]);
  return [mixed, mixed, old, large];
}

function noise(size: number): Bytes {
  const random = new Random(size);
  return Uint8Array.from({ length: size }, () => random.below(256));
}

// deno-fmt-ignore
const CHOICES: FetchWheelsOptions[] = [
  {}, {}, {}, { list: true }, { clean: true }, { stripComponents: 1 }, { include: ["*.whl"] },
  { exclude: ["sub", "*.txt"] }, { unpin: "a" }, { layers: ["1"] },
];

/** Builds the input of one case: an archive, compressed, perhaps in another archive, mutated in one stage or two. */
function makeCase(
  bases: Bytes[],
  { random, directory }: { random: Random; directory: string },
): { source: string; options: FetchWheelsOptions } {
  const stages = [
    random.pick(["tar", "tar", "tar", "bytes", "image"]),
    random.pick(["", "", "", "tar", "bytes", "image"]),
  ];
  let tar = random.below(3) === 0 ? generateTar(random) : random.pick(bases);
  if (stages.includes("tar")) tar = mutateTar(tar, random);
  const middle = random.below(tar.length);
  const compressions: ((tar: Bytes) => Bytes)[] = [
    (tar) => tar,
    gzip,
    zstd,
    (tar) => gzipMembers(tar.subarray(0, middle), tar.subarray(middle)),
    (tar) => concat("\x50\x2a\x4d\x18\x04\0\0\0skip", zstd(tar.subarray(0, middle)), zstd(tar.subarray(middle))),
  ];
  let bytes = random.pick(compressions)(tar);
  if (stages.includes("bytes")) bytes = mutateBytes(bytes, random);
  const kind = random.pick(["file", "url", "oci-archive", "docker-archive"] as const);
  if (kind === "oci-archive") bytes = makeOciArchive(makeImage({ layers: [gzip(bases[0] ?? tar), bytes] }));
  if (kind === "docker-archive") bytes = makeDockerArchive([bases[0] ?? tar, bytes]);
  if (kind.endsWith("archive") && stages.includes("image")) {
    bytes = random.pick([mutateTar, mutateJson, mutateBytes])(bytes, random);
  }
  const input = join(directory, "input");
  write(input, bytes);
  const choice = random.pick(CHOICES);
  const options = { platform: "linux/amd64", retries: 0, ...choice };
  if (kind !== "url") return { source: kind === "file" ? input : `${kind}:${input}`, options };
  const chunkBytes = random.pick([7, 511, 4096, 65_536]);
  const fetch = () => Promise.resolve(new Response(chunksOf(bytes, chunkBytes)));
  return { source: "http://127.0.0.1/layer", options: { ...options, fetch } };
}

function chunksOf(bytes: Bytes, size: number): ReadableStream<Bytes> {
  return ReadableStream.from(function* () {
    for (let at = 0; at < bytes.length; at += size) yield bytes.slice(at, at + size);
  }());
}

// ---------------------------------------------------------------------------------------------------------------------
// Mutations
// ---------------------------------------------------------------------------------------------------------------------

/** Names that collide with each other and with files in DEST. */
// deno-fmt-ignore
const NAMES = [
  "a", "b", "a/b", "a/b/c", "./a", "a/", "sub", "sub/link", "good.whl", "hard.whl", "old.whl", "link", "link/x",
];
// deno-fmt-ignore
const ODD_NAMES = [
  "", ".", "..", "/", "../evil", "/evil", "a/../../evil", "sub/..", "../old.whl", "../../beside.txt", "null",
  "../".repeat(30), "a/".repeat(49), "x".repeat(99), "n".repeat(300), "ä.whl", "\ufeffa", "\ufffd", "a\nb", "a\\b",
  ".hidden/x", ".wh.good.whl", ".wh..wh..opq", ".fetch_wheels-1", "upper-constraints.txt",
];
// deno-fmt-ignore
const NUMBERS = [
  0, 1, -1, 511, 512, 513, 0o777, 0o7777, 8 ** 7, 8 ** 11 - 1, 2 ** 31, 2 ** 32, 2 ** 53, 2 ** 62, -(2 ** 62),
];
const TYPEFLAGS = [..."\x000001112222334567LKxgSVDXANMZ"];
// deno-fmt-ignore
const PAX_KEYS = [
  "path", "linkpath", "size", "mtime", "atime", "uid", "comment", "hdrcharset", "SCHILY.xattr.user.x",
  "GNU.sparse.name", "GNU.sparse.size", "GNU.sparse.major", "GNU.sparse.map", "__proto__", "constructor",
];
// deno-fmt-ignore
const JSON_VALUES = [
  "null", "0", "-1", "[]", "{}", "true", '""', '"../x"', '"x"', "}", "[", '"\\u0000"', '"/etc/x"', '"linux"',
];

function pickName(random: Random): string {
  return random.pick(random.below(5) === 0 ? ODD_NAMES : NAMES);
}

/** Builds an archive of some members whose names and links collide. */
function generateTar(random: Random): Bytes {
  const members = Array.from({ length: 2 + random.below(6) }, () => insertedMembers(random));
  return concat(...members, new Uint8Array(1024));
}

/** Changes, removes, inserts or repeats some bytes. */
function mutateBytes(bytes: Bytes, random: Random): Bytes {
  const at = random.below(bytes.length + 1);
  const length = random.pick([1, 2, 4, 100, 512, 512, 1024, 5000]);
  const unit = random.pick([1, 512]);
  const start = at - at % unit;
  const rest = bytes.subarray(start);
  const other = random.below(bytes.length + 1);
  switch (random.below(7)) {
    case 0: {
      const changed = bytes.slice();
      for (let i = random.below(4); i >= 0; i--) {
        const index = random.below(changed.length);
        changed[index] = (changed[index] ?? 0) ^ (1 << random.below(8));
      }
      return changed;
    }
    case 1: {
      const changed = bytes.slice();
      if (start < bytes.length) changed[start] = random.pick([0, 1, 0x20, 0x2e, 0x2f, 0x37, 0x7f, 0x80, 0xff]);
      return changed;
    }
    case 2:
      return bytes.slice(0, start);
    case 3:
      return concat(bytes.subarray(0, start), bytes.subarray(start + length));
    case 4:
      return concat(bytes.subarray(0, start), bytes.subarray(other, other + length), rest);
    case 5:
      return concat(bytes.subarray(0, start), new Uint8Array(length).fill(random.pick([0, 0x20, 0xff])), rest);
    default:
      return concat(bytes.subarray(0, start), bytes.subarray(other));
  }
}

/** Changes fields of headers, or inserts members and extensions. */
function mutateTar(tar: Bytes, random: Random): Bytes {
  let mutated = tar;
  for (let i = random.below(3); i >= 0; i--) {
    const offset = random.pick(headerOffsets(tar));
    const inserted = random.below(4) === 0 ? insertedMembers(random) : undefined;
    if (inserted !== undefined) mutated = concat(mutated.subarray(0, offset), inserted, mutated.subarray(offset));
    else if (random.below(5) === 0) mutated = mutateBytes(mutated, random);
    else if (offset + 512 <= mutated.length) mutated = mutateHeader(mutated, { offset, random });
  }
  return mutated;
}

function mutateHeader(tar: Bytes, { offset, random }: { offset: number; random: Random }): Bytes {
  const changed = tar.slice();
  const header = changed.subarray(offset, offset + 512);
  const set = (at: number, length: number, value: string | Uint8Array) => {
    header.fill(0, at, at + length);
    header.set(toBytes(value).subarray(0, length), at);
  };
  const number = (width: number) => {
    const value = random.pick(NUMBERS);
    const octal = Math.abs(value).toString(8).padStart(width - 1, "0");
    const texts = ["9", "-1", "", " ".repeat(width), "1".repeat(width), octal, `${octal} `];
    return random.pick([...texts, base256(value, width)]);
  };
  // deno-fmt-ignore
  const fields: (() => void)[] = [
    () => set(0, 100, pickName(random)), () => set(0, 100, pickName(random)),
    () => set(157, 100, pickName(random)), () => set(345, 155, pickName(random)),
    () => set(124, 12, number(12)), () => set(124, 12, number(12)), () => set(136, 12, number(12)),
    () => set(100, 8, number(8)), () => set(108, 8, number(8)),
    () => set(156, 1, random.pick(TYPEFLAGS)), () => set(156, 1, random.pick(TYPEFLAGS)),
    () => set(257, 8, random.pick(["ustar\x0000", "ustar  \0", "", "ustar", "garbage!"])),
    () => void (header[random.below(512)] = random.below(256)),
  ];
  random.pick(fields)();
  if (random.below(8) > 0) fixChecksum(header);
  return changed;
}

function insertedMembers(random: Random): Bytes {
  const [name, linkname] = [0, 1].map(() => toBytes(pickName(random)).subarray(0, 100)) as [Bytes, Bytes];
  const body = random.pick(["", "x", "y".repeat(600)]);
  const member = (typeflag: string, body: string | Uint8Array) => [
    rawHeader({ name, linkname, typeflag, size: toBytes(body).length }),
    body,
  ];
  const names = [pickName(random), pickName(random)];
  const value = random.pick([...names, String(random.pick(NUMBERS)), "a\0b", "0".repeat(300), "1e9", "-0.5"]);
  const records = toBytes(paxRecords({ [random.pick(PAX_KEYS)]: value }));
  // deno-fmt-ignore
  return random.pick([
    () => rawMembers(...member(random.pick(TYPEFLAGS), body)),
    () => rawMembers(...member("2", ""), ...member("0", body)),
    () => rawMembers(...member("x", records)),
    () => rawMembers(...member(random.pick(["x", "g"]), mutateBytes(records, random))),
    () => rawMembers(...member(random.pick(["L", "K"]), random.pick([pickName(random), "n".repeat(5000)]))),
    () => new Uint8Array(random.pick([512, 1024, 1536])),
  ])();
}

/** Replaces a string of a JSON file in the archive by another value, without changing its length. */
function mutateJson(archive: Bytes, random: Random): Bytes {
  const text = Array.from(archive, (byte) => String.fromCharCode(byte)).join("");
  const strings = [...text.matchAll(/"[^"\n\0]{1,200}"/g)];
  if (strings.length === 0) return archive;
  const { index, 0: { length } } = random.pick(strings);
  const value = random.pick(JSON_VALUES);
  const changed = archive.slice();
  changed.set(toBytes(value.padEnd(length)).subarray(0, length), index);
  return changed;
}

if ((globalThis as { name?: string }).name === WORKER_NAME) {
  const scope = globalThis as unknown as Worker;
  scope.onmessage = ({ data }: MessageEvent<Job>) => void serveFuzzing(data, (message) => scope.postMessage(message));
} else if (import.meta.main) {
  const { values } = parseArgs({
    options: { seconds: { type: "string" }, seed: { type: "string" }, case: { type: "string" } },
  });
  const seed = Number(values.seed ?? randomBytes(3).readUIntBE(0, 3));
  const only = values.case === undefined ? undefined : Number(values.case);
  console.error(`fuzz: seed ${seed}`);
  const onProgress = (cases: number) => console.error(`fuzz: ${cases} cases`);
  try {
    console.log(await fuzz({ seed, seconds: Number(values.seconds ?? 60), only, onProgress }));
  } catch (error) {
    console.error(`fuzz: ${(error as Error).message}`);
    Deno.exitCode = 1;
  }
}
