#!/usr/bin/env -S deno run --allow-net --allow-read --allow-write --allow-env=WHEELS*,REGISTRY_*,PROJECT,FETCH_WHEELS_CACHE,DOCKER_CONFIG,HOME,HTTPS_PROXY,NO_PROXY,https_proxy,no_proxy
/**
 * Takes the final layer out of a container image, straight from its registry, checks every byte, and leaves the Python
 * wheels in a directory, all or nothing, ready for `pip install --no-index --find-links`.
 *
 * On a command line:
 *
 * ```sh
 * deno run --allow-net --allow-read --allow-write --allow-env fetch_wheels.ts -d wheels loci/requirements:master-ubuntu_jammy
 * ```
 *
 * In a program:
 *
 * ```ts ignore
 * import { fetchWheels } from "./fetch_wheels.ts";
 *
 * const { files, layer } = await fetchWheels("registry.example/ns/wheels:1.0", { dest: "wheels" });
 * console.log(`${files.length} files from ${layer?.digest}`);
 * ```
 *
 * Contents, which is the way that the data takes:
 *
 *      fetchWheels()  the summary
 *  1   Reference      text to {registry, repository, tag, digest}
 *  2   Credentials    where a user name and a password come from
 *  3   Transport      one request: TLS, proxy, timeouts, retries, redirects followed by hand
 *  4   Auth           a 401's challenges to an Authorization header
 *  5   Manifest       tag to index to manifest to layer descriptor, each body checked against its digest
 *  6   Layer          the blob's verified bytes (whole, resumed, in parallel ranges, kept in a cache), decompressed
 *  7   Tar            members, made safe
 *  8   Disk           staging, publishing, cleaning up
 *  9   Sources        the same bytes from a URL, a file, an OCI layout or an archive
 * 10   Command line   options, help, output, exit code
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { once } from "node:events";
import * as fs from "node:fs";
import * as https from "node:https";
import { basename, dirname, join, posix, resolve as resolvePath } from "node:path";
import process from "node:process";
import { Readable } from "node:stream";
import * as tls from "node:tls";
import { Command, CommanderError, InvalidArgumentError, Option } from "npm:commander@^15.1.0";
import { Gunzip, ZstdDecompress } from "npm:minizlib@^3.1.0";
// @ts-types="npm:@types/picomatch@^4.0.0"
import picomatch from "npm:picomatch@^4.0.3";

const VERSION = "0.1.0";

const DEFAULT_DEST = "/tmp/wheels";
const DEFAULT_WHEELS_FILE = "/opt/loci/wheels";
const DEFAULT_RETRIES = 5;
/** Seconds without a byte after which a connection counts as dead. */
const DEFAULT_TIMEOUT = 30;

/** Before the first retry, doubled for each further one, drawn at random below (full jitter). */
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 30_000;
/** A build that would wait longer than this does better to fail and say why. */
const LONGEST_RETRY_AFTER_MS = 60_000;
/** A link that drops again and again may cost this many tries for each one that may fail without a byte in between. */
const WHOLE_RETRIES_FACTOR = 20;
const DEFAULT_CONNECTIONS = 4;
const MAX_CONNECTIONS = 16;
/** Below this a second connection costs more than it brings. */
const PARALLEL_FROM_BYTES = 32 * 1024 * 1024;
/** Memory is bounded by this times the connections: measured, the largest that keeps four of them under 200 MiB in all. */
const RANGE_BYTES = 4 * 1024 * 1024;
/** Below this a second thread takes longer to start than it saves. */
const WORKER_FROM_BYTES = 128 * 1024 * 1024;
/** Often enough to look alive, and seldom enough to cost nothing. */
const REDRAW_MS = 100;
/** After a signal, the time for cleaning up; then the process ends. */
const SHUTDOWN_MS = 1500;
const CONSTRAINTS = "upper-constraints.txt";
const WORKER_NAME = "fetch_wheels extraction";
const BATCH_BYTES = 512 * 1024;
/** Batches that may be on their way to the worker, which bounds the memory that they take. */
const BATCHES_AHEAD = 4;
const MAX_REDIRECTS = 10;
const LOCK_NAME = "lock";
/** A staging directory as young as this may not have its lock yet. */
const YOUNG_MS = 60_000;
/** The distribution specification lets registries refuse larger manifests, and so clients may too. */
const MAX_MANIFEST_BYTES = 4 * 1024 * 1024;
const MAX_TOKEN_BYTES = 1024 * 1024;
/** Of an error's body, only so much is read and shown. */
const MAX_ERROR_BYTES = 64 * 1024;
/** Of a name in a message, only so many characters are shown. */
const MAX_SHOWN = 300;
const MAX_INDEX_DEPTH = 5;
/** What a token lives when its answer does not say, by the token specification. */
const DEFAULT_TOKEN_SECONDS = 60;
/** As Linux: a path through more symbolic links than this is a loop. */
const MAX_LINKS = 40;
/** Size of the decoder's output buffers, and of reads from a disk. */
const INFLATED_BYTES = 256 * 1024;
/** Size of a gzip decoder's input, which inflates to a thousand times as much at most. */
const DEFLATED_BYTES = 64 * 1024;
/** Window of zstd frames, as a power of two: 128 MiB, which is the limit of the zstd tool. */
const MAX_ZSTD_WINDOW_LOG = 27;
const TAR_BLOCK_BYTES = 512;
/** An extension header holds names and attributes; Go's limit is the same. */
const MAX_EXTENSION_BYTES = 1024 * 1024;

const HUB = "docker.io";
const HUB_NAMES = [HUB, "index.docker.io", "registry.hub.docker.com"];
const HUB_HOST = "registry-1.docker.io";
/** What the Hub is called in Docker's configuration, and the user name that stands for an identity token there. */
const HUB_KEY = "https://index.docker.io/v1/";
const IDENTITY_USER = "<token>";

const INDEX_TYPES = [
  "application/vnd.oci.image.index.v1+json",
  "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFEST_TYPES = [
  "application/vnd.oci.image.manifest.v1+json",
  "application/vnd.docker.distribution.manifest.v2+json",
];
const SCHEMA1_TYPES = [
  "application/vnd.docker.distribution.manifest.v1+prettyjws",
  "application/vnd.docker.distribution.manifest.v1+json",
];

const EXIT_CODES: Record<ErrorKind, number> = {
  internal: 1,
  usage: 2,
  "not-found": 3,
  auth: 4,
  network: 5,
  integrity: 6,
  unsafe: 7,
  io: 8,
  interrupted: 130,
  terminated: 143,
};

/** What went wrong, by class; each has an exit code of its own. */
export type ErrorKind =
  | "internal"
  | "usage"
  | "not-found"
  | "auth"
  | "network"
  | "integrity"
  | "unsafe"
  | "io"
  | "interrupted"
  | "terminated";

/** The one error that this module throws on purpose. Its message is one line, `Cannot <action> "<value>": <cause>`. */
export class FetchWheelsError extends Error {
  /** The class of the failure. */
  readonly kind: ErrorKind;
  /** What can be done about it, in one line, where something can. */
  readonly hint?: string;

  /** Makes an error of a kind, with its message and, where there is one, a hint and a cause. */
  constructor(kind: ErrorKind, message: string, options: { hint?: string; cause?: unknown } = {}) {
    super(message, { cause: options.cause });
    this.name = "FetchWheelsError";
    this.kind = kind;
    this.hint = options.hint;
  }
}

/** An image's name in parts. */
export interface ImageReference {
  /** Host, with its port if it has one; `docker.io` for the Docker Hub. */
  registry: string;
  /** Name within the registry, such as `library/python`. */
  repository: string;
  /** Tag; `latest` when the text has neither tag nor digest. */
  tag?: string;
  /** Digest, such as `sha256:…`; it decides when there is a tag too. */
  digest?: string;
}

/** An operating system and a processor architecture, in the registries' names. */
export interface Platform {
  /** Such as `linux`. */
  os: string;
  /** Such as `amd64` or `arm64`. */
  architecture: string;
  /** Such as `v7`. */
  variant?: string;
}

/** What a manifest or an index says of a blob or a manifest (OCI image specification, "Content Descriptors"). */
export interface Descriptor {
  /** Media type of what is described. */
  mediaType?: string;
  /** Digest of its bytes. */
  digest: string;
  /** Its bytes' number; schema 1 does not say. */
  size?: number;
  /** In an index: what the image runs on. */
  platform?: Partial<Platform>;
  /** Free-form notes. */
  annotations?: Record<string, string>;
}

/** What `docker login` and `podman login` write, as far as it matters here. */
export interface DockerConfig {
  /** By registry, or, podman's, by namespace or repository. */
  auths?: Record<string, { auth?: string; identitytoken?: string; username?: string; password?: string }>;
  /** Name of the helper for all registries. */
  credsStore?: string;
  /** Names of the helpers for single registries. */
  credHelpers?: Record<string, string>;
}

/** A user name and a password, an identity token (OAuth2), or the name of the helper to ask for either. */
export type Credentials = { username: string; password: string } | { identityToken: string } | { helper: string };

type UserCredentials = Extract<Credentials, { username: string }>;
type UsableCredentials = Exclude<Credentials, { helper: string }>;

/** One challenge of a `WWW-Authenticate` header. */
export interface Challenge {
  /** Lower case, such as `bearer`. */
  scheme: string;
  /** Parameters by their names in lower case. */
  parameters: Record<string, string>;
  /** The one value of schemes that have no parameters. */
  token68?: string;
}

/** What `fetchWheels` tells of its way, for a log or a progress bar. */
export type ProgressEvent =
  | { type: "request"; url: string; status: number }
  | { type: "retry"; reason: string; delayMs: number }
  | { type: "resolved"; image: ImageReference; layer: LayerInfo; platform: string | null }
  | { type: "member"; path: string; size: number }
  | { type: "cached"; digest: string; size: number }
  | { type: "bytes"; received: number; total?: number }
  | { type: "extracted"; members: number }
  | { type: "warning"; message: string };

/** How `fetchWheels` goes about it. */
export interface FetchWheelsOptions {
  /**
   * Directory that receives the files.
   * @default {"/tmp/wheels"}
   */
  dest?: string;
  /** Write the tarball as it is to this file, or stream, instead of extracting it. */
  output?: string | WritableStream<Uint8Array>;
  /**
   * Which layer: its place (1 is the base), `last`, or its digest.
   * @default {"last"}
   */
  layer?: string;
  /** Globs of what to extract, on paths and on names; without any it is everything. */
  include?: string[];
  /** Globs of what to leave out, besides what begins with a dot; a directory stands for what is below it, too. */
  exclude?: string[];
  /**
   * How many leading components of each path to drop.
   * @default {0}
   */
  stripComponents?: number;
  /**
   * Replace DEST instead of adding to it.
   * @default {false}
   */
  clean?: boolean;
  /** Project whose `NAME===…` is dropped from `upper-constraints.txt`. */
  unpin?: string;
  /** Only tell what the layer holds, in `files` and by `member` events. */
  list?: boolean;
  /** Only resolve; fetch no layer. */
  dryRun?: boolean;
  /**
   * `OS/ARCH[/VARIANT]` to choose from an index.
   * @default {`linux/` and the host's architecture}
   */
  platform?: string;
  /**
   * How the registry is spoken to; `detect` tries https first, and plain http for local names only.
   * @default {"detect"}
   */
  protocol?: "http" | "https" | "detect";
  /**
   * Accept any certificate.
   * @default {false}
   */
  insecure?: boolean;
  /** File of PEM certificates to trust besides the usual ones. */
  caFile?: string;
  /** User name for the registry. */
  username?: string;
  /** Password or access token that goes with `username`. */
  password?: string;
  /**
   * Docker's `config.json` and podman's `auth.json`; the first that knows the registry counts, when it asks.
   * @default {[]}
   */
  authFiles?: string[];
  /**
   * How often a request that failed for a passing reason is tried again.
   * @default {5}
   */
  retries?: number;
  /**
   * Seconds without a byte after which a connection is given up.
   * @default {30}
   */
  timeout?: number;
  /**
   * How many connections may fetch a large layer at once, 1 to 16.
   * @default {4}
   */
  connections?: number;
  /** Base URLs of mirrors, which are asked first, and without the registry's credentials. */
  mirrors?: string[];
  /** Directory that keeps layers by digest, laid out as the `blobs` of an OCI layout. */
  cache?: string;
  /**
   * URL of this module, by which a worker unpacks large layers in a thread of its own. Without one all is done in the
   * caller's thread; leave it out where the module is bundled with others, which the worker would run, too.
   */
  workerUrl?: string;
  /** Stops everything and cleans up. */
  signal?: AbortSignal;
  /** Used in place of the global `fetch`. */
  fetch?: typeof globalThis.fetch;
  /** Used in place of a timer between retries. */
  delay?: (milliseconds: number, signal?: AbortSignal) => Promise<void>;
  /** Used in place of `Date.now`. */
  now?: () => number;
  /** Is told what happens. */
  onProgress?: (event: ProgressEvent) => void;
}

/** The layer that was fetched. */
export interface LayerInfo {
  /** Digest of its bytes as they are stored in the registry. */
  digest: string;
  /** Their number; null before a schema 1 layer has been read. */
  size: number | null;
  /** As the manifest says, or null. */
  mediaType: string | null;
  /** Place among the image's layers; 1 is the base. */
  index: number;
  /** How many layers the image has. */
  count: number;
}

/** What was done; the same as the document of `--json`. */
export interface FetchResult {
  /** The source as it was given. */
  source: string;
  /** The image, or null for a tarball. */
  image: { registry: string; repository: string; tag: string | null; digest: string | null } | null;
  /** Platform chosen from an index, or null where there was nothing to choose. */
  platform: string | null;
  /** The image's manifest, or null for a tarball. */
  manifest: { digest: string; mediaType: string } | null;
  /** The layer, or null for a tarball. */
  layer: LayerInfo | null;
  /** Directory that received the files, or null with `output`. */
  dest: string | null;
  /** File that received the tarball, `-` for a stream, or null. */
  output: string | null;
  /** Files and links now in `dest`, with their sizes in bytes. */
  files: { path: string; size: number }[];
  /** Members that were left out. */
  skipped: { path: string; reason: string }[];
  /** Bytes received, compressed. */
  bytes: number;
  /** Seconds that it took. */
  seconds: number;
}

/**
 * Fetches the final layer of an image, or a tarball, and extracts it into a directory, all or nothing.
 *
 * @example An image that does not parse is refused before anything is sent
 * ```ts
 * import { fetchWheels, FetchWheelsError } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * await assert.rejects(
 *   fetchWheels("registry.example/Upper/Case:1.0", { dest: "wheels" }),
 *   (error) => error instanceof FetchWheelsError && error.kind === "usage",
 * );
 * ```
 *
 * @param source Image reference, `http(s)://` URL of a tarball, a path that begins with `/`, `./` or `../`, or
 * `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE`
 * @param options How to go about it
 * @returns What was fetched, from where, and the files that are there now
 * @throws {FetchWheelsError} of each kind but `internal`; `dest` is then as it was
 */
export async function fetchWheels(source: string, options: FetchWheelsOptions = {}): Promise<FetchResult> {
  using settings = settle(options);
  try {
    return await fetchOnce(source, settings);
  } catch (error) {
    const isIntegrity = error instanceof FetchWheelsError && error.kind === "integrity";
    const isSecondHand = settings.mirrors.length > 0 || settings.cache !== undefined;
    if (!isIntegrity || !isSecondHand || typeof settings.output === "object") throw explain(error, settings);
    settings.onProgress({ type: "warning", message: `${error.message}; once more, from the registry alone` });
    return await fetchOnce(source, { ...settings, mirrors: [], isFresh: true })
      .catch((again) => Promise.reject(explain(again, settings)));
  }
}

async function fetchOnce(source: string, settings: Settings): Promise<FetchResult> {
  const started = performance.now();
  const parsed = parseSource(source);
  const isLook = settings.list || settings.dryRun;
  // Before anything is asked for: a disk that cannot be written to is better known before half a gigabyte came.
  using target = openTarget(settings);
  const { bytes, layer, ...origin } = await openSource(parsed, settings);
  const progress: Progress = { received: 0, total: layer?.size ?? undefined, settings };
  const { files, skipped } = await target.receive(watched(bytes, progress), layer);
  warnOfForeignWheels(files, settings);
  return {
    source,
    ...origin,
    layer: layer && { ...layer, size: layer.size ?? (settings.dryRun ? null : progress.received) },
    dest: isLook || settings.output !== undefined ? null : settings.dest,
    output: isLook ? null : typeof settings.output === "object" ? "-" : settings.output ?? null,
    files,
    skipped,
    bytes: progress.received,
    seconds: Math.round(performance.now() - started) / 1000,
  };
}

/** The options with every default in its place. Disposing of them closes the connections. */
interface Settings extends
  Required<
    Pick<
      FetchWheelsOptions,
      "dest" | "protocol" | "insecure" | "retries" | "timeout" | "connections" | "signal" | "fetch" | "delay" | "now"
    >
  >,
  Pick<FetchWheelsOptions, "output" | "clean" | "unpin" | "list" | "dryRun" | "cache" | "workerUrl">,
  Disposable {
  platform: Platform;
  layer: string;
  choice: Choice;
  onProgress: (event: ProgressEvent) => void;
  credentials?: UserCredentials;
  authFiles: string[];
  mirrors: URL[];
  /** Whether what the cache has is to be thrown away. */
  isFresh: boolean;
}

function settle(options: FetchWheelsOptions): Settings {
  const { retries = DEFAULT_RETRIES, timeout = DEFAULT_TIMEOUT, protocol = "detect", insecure = false } = options;
  if (!Number.isInteger(retries) || retries < 0) throw usage("use", String(retries), "retries is no whole number");
  if (!(timeout > 0 && timeout <= 86_400)) throw usage("use", String(timeout), "timeout is not from 0 to 86400 s");
  const { connections = DEFAULT_CONNECTIONS } = options;
  if (!Number.isInteger(connections) || connections < 1 || connections > MAX_CONNECTIONS) {
    throw usage("use", String(connections), `connections are from 1 to ${MAX_CONNECTIONS}`);
  }
  const { layer = "last", include = [], exclude = [], stripComponents: strip = 0 } = options;
  if (!/^(?:last|[1-9]\d{0,5})$/.test(layer) && !DIGEST.test(layer)) {
    throw usage("use layer", layer, "it is no place from 1 on, not last, and no digest");
  }
  if (!Number.isInteger(strip) || strip < 0) throw usage("use", String(strip), "it is no number of components");
  const { clean, unpin, list, dryRun } = options;
  const platform = options.platform === undefined ? hostPlatform() : parsePlatform(options.platform);
  const credentials = givenCredentials(options);
  const mirrors = (options.mirrors ?? []).map(parseMirror);
  const pem = options.caFile === undefined ? [] : readCertificates(options.caFile);
  // HTTP/2 would put all ranges on one connection, and that is the one that is throttled.
  const client = Deno.createHttpClient({ caCerts: pem, http2: false });
  return {
    dest: resolvePath(options.dest || DEFAULT_DEST),
    output: options.output,
    ...{ platform, protocol, insecure, credentials, retries, timeout, connections, mirrors, layer },
    ...{ clean, unpin, list, dryRun },
    choice: { include, exclude, strip },
    cache: options.cache === undefined ? undefined : resolvePath(options.cache),
    isFresh: false,
    authFiles: options.authFiles ?? [],
    workerUrl: options.workerUrl,
    signal: options.signal ?? new AbortController().signal,
    fetch: options.fetch ?? trustingFetch(client, pem, insecure),
    delay: options.delay ?? delay,
    now: options.now ?? Date.now,
    onProgress: options.onProgress ?? (() => {}),
    [Symbol.dispose]: () => client.close(),
  };
}

function parseMirror(text: string): URL {
  if (/^https?:\/\//i.test(text) && URL.canParse(text)) return new URL(text);
  throw usage("use mirror", withoutSecrets(text), "it is no http(s) URL", "such as https://mirror.lan:5000");
}

/** Puts what Deno and Node throw for the disk and for missing permissions into this module's terms. */
function explain(error: unknown, settings?: Settings): unknown {
  if (settings?.signal.aborted) return settings.signal.reason;
  if (!(error instanceof Deno.errors.NotCapable)) return error;
  const flag = /--allow-[a-z]+/.exec(error.message)?.[0] ?? "the permission";
  const message = `Cannot go on: ${error.message.split(",")[0]}`;
  return new FetchWheelsError("io", message, { hint: `run deno with ${flag}`, cause: error });
}

function usage(action: string, value: string, cause: string, hint?: string): FetchWheelsError {
  return new FetchWheelsError("usage", `Cannot ${action} ${quote(value)}: ${cause}`, { hint });
}

function integrity(action: string, value: string, cause: string, source?: unknown): FetchWheelsError {
  return new FetchWheelsError("integrity", `Cannot ${action} ${quote(value)}: ${cause}`, { cause: source });
}

/** Quoted, for what an archive, a registry or a user says may hold anything, and any amount of it. */
function quote(text: string): string {
  return oneLine(JSON.stringify(text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text));
}

/** Without the characters that move a cursor or begin a line. */
function oneLine(text: string): string {
  return text.replace(
    // deno-lint-ignore no-control-regex -- these are what it is about
    /[\x00-\x1f\x7f-\x9f\u2028\u2029]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

// ---------------------------------------------------------------------------------------------------------------------
// 1 Reference: text to {registry, repository, tag, digest}, by the rules of the distribution project's grammar.
// ---------------------------------------------------------------------------------------------------------------------

const DIGEST = /^(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/;
const TAG = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const REPOSITORY = /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$/;
const HOST =
  /^(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?$/;

/**
 * Reads an image's name as `docker pull` does.
 *
 * @example
 * ```ts
 * import { parseImageReference } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * assert.deepEqual(parseImageReference("python:3.13"), {
 *   registry: "docker.io",
 *   repository: "library/python",
 *   tag: "3.13",
 * });
 * ```
 *
 * @param text `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`
 * @returns The parts; `tag` is `latest` only when neither tag nor digest is given
 * @throws {FetchWheelsError} of kind `usage`, which quotes the text and says which rule it breaks
 */
export function parseImageReference(text: string): ImageReference {
  const fail = (rule: string, hint?: string) => usage("parse image reference", text, rule, hint);
  if (text === "") throw fail("it is empty");
  if (/\s/.test(text)) throw fail("it holds white space");
  const scheme = /^[a-z][a-z0-9+.-]*:\/\//i.exec(text)?.[0];
  if (scheme) throw fail(`an image has no "${scheme}" in front`, `leave out "${scheme}"`);

  const [name = "", digest, ...more] = text.split("@");
  if (more.length > 0) throw fail('it holds more than one "@"');
  if (digest !== undefined && !DIGEST.test(digest)) {
    throw fail("the digest is neither sha256: and 64 nor sha512: and 128 lower-case hexadecimal digits");
  }
  const colon = name.indexOf(":", name.lastIndexOf("/") + 1);
  const tag = colon < 0 ? undefined : name.slice(colon + 1);
  if (tag !== undefined && !TAG.test(tag)) {
    throw fail('a tag is 1 to 128 letters, digits, "_", "." and "-", and begins with none of the last two');
  }

  const path = colon < 0 ? name : name.slice(0, colon);
  const slash = path.indexOf("/");
  const first = path.slice(0, Math.max(slash, 0));
  const isHost = /[.:A-Z]/.test(first) || first === "localhost";
  if (isHost && !isValidHost(first)) throw fail(`${quote(first)} is no host name with an optional port`);
  const isHub = !isHost || HUB_NAMES.includes(first);
  const rest = isHost ? path.slice(slash + 1) : path;
  const repository = isHub && rest !== "" && !rest.includes("/") ? `library/${rest}` : rest;
  if (repository === "") throw fail("the name of the repository is missing");
  if (/[A-Z]/.test(repository)) throw fail("a repository's name is lower case");
  if (repository.length > 255) throw fail("a repository's name has at most 255 characters");
  if (!REPOSITORY.test(repository)) {
    throw fail('a repository\'s name is lower-case letters and digits, with ".", "_", "__" or "-" between them');
  }
  const reference: ImageReference = { registry: isHub ? HUB : first, repository };
  if (tag !== undefined) reference.tag = tag;
  else if (digest === undefined) reference.tag = "latest";
  if (digest !== undefined) reference.digest = digest;
  return reference;
}

function isValidHost(host: string): boolean {
  const port = /:(\d+)$/.exec(host)?.[1];
  return HOST.test(host) && Number(port ?? 443) > 0 && URL.canParse(`https://${host}/`);
}

function formatReference({ registry, repository, tag, digest }: ImageReference): string {
  return `${registry}${repository && `/${repository}`}${tag === undefined ? "" : `:${tag}`}${
    digest === undefined ? "" : `@${digest}`
  }`;
}

/**
 * Reads a platform and puts it into the registries' names: `x86_64` is `amd64`, `aarch64` is `arm64`, `armhf` is `arm/v7`.
 *
 * @param text `OS/ARCH[/VARIANT]`
 * @throws {FetchWheelsError} of kind `usage`
 */
export function parsePlatform(text: string): Platform {
  const [os = "", architecture = "", variant, ...more] = text.toLowerCase().split("/");
  const parts = variant === undefined ? [os, architecture] : [os, architecture, variant];
  if (more.length > 0 || !parts.every((part) => /^[a-z0-9][a-z0-9._-]*$/.test(part))) {
    throw usage("parse platform", text, "it is not OS/ARCH or OS/ARCH/VARIANT", "such as linux/amd64 or linux/arm64");
  }
  return normalizePlatform({ os, architecture, variant });
}

/**
 * The platform that this machine's wheels are for. Images are for Linux, whatever runs this.
 *
 * @param arch Processor architecture, in any usual name
 */
export function hostPlatform(arch: string = Deno.build.arch): Platform {
  return normalizePlatform({ os: "linux", architecture: arch });
}

function normalizePlatform({ os = "", architecture = "", variant }: Partial<Platform>): Platform {
  const [name = "", implied] = ARCHITECTURES.get(architecture) ?? [architecture];
  const chosen = (variant || implied)?.replace(/^(?=\d)/, "v");
  return chosen === undefined ? { os, architecture: name } : { os, architecture: name, variant: chosen };
}

const ARCHITECTURES = new Map<string, [name: string, variant?: string]>([
  ["x86_64", ["amd64"]],
  ["x86-64", ["amd64"]],
  ["aarch64", ["arm64"]],
  ["armhf", ["arm", "v7"]],
  ["armel", ["arm", "v6"]],
  ["arm", ["arm", "v7"]],
]);

function formatPlatform({ os, architecture, variant }: Partial<Platform>): string {
  return [os, architecture, variant].filter(Boolean).join("/");
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 Credentials: where a user name and a password come from.
// ---------------------------------------------------------------------------------------------------------------------

function givenCredentials({ username, password }: FetchWheelsOptions): UserCredentials | undefined {
  if (username === undefined && password === undefined) return undefined;
  if (!username) throw new FetchWheelsError("usage", "Cannot use a password: the user name is missing");
  if (password === undefined) throw usage("use user name", username, "the password is missing", PASSWORD_HINT);
  if (username.includes(":")) throw usage("use user name", username, "HTTP has no way to send a colon in it");
  return { username, password };
}

/** The first of these files that knows the registry decides, as `docker login` and `podman login` left it there. */
async function storedCredentials(image: ImageReference, settings: Settings): Promise<UsableCredentials | undefined> {
  for (const file of settings.authFiles) {
    const config = readAuthFile(file, settings);
    const found = config && findCredentials(config, image);
    if (found === undefined) continue;
    return "helper" in found ? await askHelper(found.helper, { image, settings }) : found;
  }
  return undefined;
}

/** A file that is not there, or not to be read, is no news; one that is broken is a warning, and no failure. */
function readAuthFile(file: string, { onProgress }: Settings): DockerConfig | undefined {
  try {
    if (!fs.existsSync(file)) return undefined;
    const config = parseJson(fs.readFileSync(file));
    if (config !== undefined) return config;
    onProgress({ type: "warning", message: `${quote(file)} is left out: it is no JSON object` });
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return undefined;
    onProgress({ type: "warning", message: (diskError("read", file, error) as Error).message });
  }
  return undefined;
}

/**
 * Finds what a Docker or podman configuration says of an image's registry. Reads no file and runs no helper.
 *
 * @example
 * ```ts
 * import { findCredentials } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * const config = { auths: { "registry.example:5000": { auth: btoa("user:password") } } };
 * assert.deepEqual(findCredentials(config, { registry: "registry.example:5000", repository: "ns/wheels" }), {
 *   username: "user",
 *   password: "password",
 * });
 * ```
 *
 * @param config What `config.json` or `auth.json` holds
 * @param image Where the image is, as `parseImageReference` says it
 * @returns `credHelpers` before `credsStore` before `auths`; of these the most specific whole-part match
 */
export function findCredentials(
  config: DockerConfig,
  { registry, repository }: Pick<ImageReference, "registry" | "repository">,
): Credentials | undefined {
  const [, helper = config.credsStore] = mostSpecific(config.credHelpers, registry) ?? [];
  if (typeof helper === "string" && helper !== "") return { helper };
  const [, entry] = mostSpecific(config.auths, `${registry}/${repository}`) ?? [];
  if (typeof entry?.identitytoken === "string" && entry.identitytoken !== "") {
    return { identityToken: entry.identitytoken };
  }
  if (typeof entry?.auth !== "string") {
    return entry?.username && entry.password ? { username: entry.username, password: entry.password } : undefined;
  }
  const [, username, password] = /^([^:]+):(.*?)\0*$/s.exec(Buffer.from(entry.auth, "base64").toString("utf8")) ?? [];
  return username === undefined || password === undefined ? undefined : { username, password };
}

/** Keys carry a scheme and a path from old days, or, podman's, a namespace; host and port must be equal in any case. */
function mostSpecific<T>(entries: Record<string, T> | undefined, name: string): [key: string, entry: T] | undefined {
  return Object.entries(entries ?? {})
    .map(([key, entry]): [string, T] => [normalizeKey(key), entry])
    .filter(([key]) => name === key || name.startsWith(`${key}/`))
    .sort(([a], [b]) => b.length - a.length)[0];
}

function normalizeKey(key: string): string {
  const [, scheme, host = "", path = ""] = /^(https?:\/\/)?([^/]*)(.*?)\/*$/.exec(key) ?? [];
  const isHub = HUB_NAMES.includes(host) || host === HUB_HOST;
  return `${isHub ? HUB : host}${scheme || /^\/v[12]$/.test(path) ? "" : path}`;
}

/** `docker-credential-NAME get`. Whatever goes wrong is told, and leads to an anonymous try. */
async function askHelper(
  name: string,
  { image, settings }: { image: ImageReference; settings: Settings },
): Promise<UsableCredentials | undefined> {
  const program = `docker-credential-${name}`;
  const warn = (state: string): undefined => {
    const message = `Cannot ask ${quote(program)}: ${state}; trying without credentials`;
    settings.onProgress({ type: "warning", message });
  };
  if (!/^[\w.-]+$/.test(name)) return warn("that is no name for a helper");
  if (Deno.permissions.querySync({ name: "run", command: program }).state !== "granted") {
    return warn(`it needs deno's --allow-run=${program}`);
  }
  try {
    const child = new Deno.Command(program, {
      args: ["get"],
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
      signal: settings.signal,
    }).spawn();
    const writer = child.stdin.getWriter();
    await writer.write(new TextEncoder().encode(image.registry === HUB ? HUB_KEY : image.registry)).catch(() => {});
    await writer.close().catch(() => {}); // one that does not listen shows it by its answer
    const { success, stdout } = await child.output();
    const answer = success ? parseJson(stdout) : undefined;
    const [username, secret] = [answer?.Username, answer?.Secret];
    if (typeof username === "string" && typeof secret === "string" && secret !== "") {
      return username === IDENTITY_USER ? { identityToken: secret } : { username, password: secret };
    }
    const said = new TextDecoder().decode(stdout).trim();
    // To have none for this registry is what most helpers say most of the time.
    return /not found/i.test(said) ? undefined : warn(success ? "its answer holds no credentials" : quote(said));
  } catch (error) {
    settings.signal.throwIfAborted();
    return warn(error instanceof Deno.errors.NotFound ? "it is not installed" : (error as Error).message);
  }
}

const PASSWORD_HINT = "give --username and --password-stdin, or set REGISTRY_USERNAME and REGISTRY_PASSWORD";

/** RFC 7617, with UTF-8 as registries expect it. */
function basic({ username, password }: UserCredentials): string {
  return `Basic ${Buffer.from(`${username}:${password}`, "utf8").toString("base64")}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 Transport: one request. Whatever passes by itself is tried again; whatever does not is said at once.
// ---------------------------------------------------------------------------------------------------------------------

/** An answer, where it came from in the end, and the means to give it up. */
interface Exchange {
  response: Response;
  /** Where the answer came from, and what was asked in the first place. */
  url: URL;
  asked: URL;
  controller: AbortController;
}

/** What is sent: headers, and for a POST a form. */
interface Message {
  headers: Record<string, string>;
  form?: string;
}

/** What may still go wrong. Bytes that come in restore the tries, but not without end. */
interface Patience {
  failures: number;
  readonly whole: { failures: number };
}

/** Asks the first of these URLs that can be connected to, and again while the failure may pass. */
async function request(
  urls: URL[],
  headers: Record<string, string>,
  { settings, patience = newPatience(), form }: { settings: Settings; patience?: Patience; form?: string },
): Promise<Exchange> {
  while (true) {
    try {
      const exchange = await askFirst(urls, { headers, form }, settings);
      if (!isTransient(exchange.response.status)) return exchange;
      const waitMs = retryAfter(exchange.response.headers.get("retry-after"), settings.now());
      const body = await readError(exchange, settings);
      const { message } = statusError("fetch", displayUrl(exchange.url), { exchange, body });
      throw new RequestError("status", message, { waitMs });
    } catch (error) {
      await beforeRetry(error, patience, settings);
    }
  }
}

function newPatience(whole = { failures: 0 }): Patience {
  return { failures: 0, whole };
}

/** Waits until it is time for another try. Throws the failure where another try is of no use, or there is none left. */
async function beforeRetry(error: unknown, patience: Patience, settings: Settings): Promise<void> {
  settings.signal.throwIfAborted();
  if (!(error instanceof RequestError) || !error.mayPass) throw error;
  const { message, waitMs } = error;
  if (waitMs !== undefined && waitMs > LONGEST_RETRY_AFTER_MS) {
    const state = `${message}; it asks to wait ${Math.ceil(waitMs / 1000)} s, which is too long`;
    throw new FetchWheelsError("network", state, { cause: error });
  }
  const isOver = ++patience.whole.failures > settings.retries * WHOLE_RETRIES_FACTOR;
  if (++patience.failures > settings.retries || isOver) throw error;
  const delayMs = waitMs ?? backoff(patience.failures - 1);
  settings.onProgress({ type: "retry", reason: message, delayMs });
  await settings.delay(delayMs, settings.signal);
}

function isTransient(status: number): boolean {
  return status === 408 || status === 429 || status >= 500;
}

/** Exponential with full jitter, so that a fleet of builds does not come back in step. */
function backoff(attempt: number): number {
  return Math.random() * Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** attempt);
}

/** Milliseconds that a `Retry-After` asks for, in seconds or as a date (RFC 9110); undefined for nonsense and the past. */
function retryAfter(value: string | null, now: number): number | undefined {
  if (value === null) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000;
  const isDate = /^[A-Z][a-z]{2,8}, ?\d{2}[ -][A-Z][a-z]{2}[ -]\d{2,4} \d{2}:\d{2}:\d{2} GMT$/.test(value.trim());
  const wait = isDate ? Date.parse(value) - now : NaN;
  return wait > 0 ? wait : undefined;
}

function delay(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const stop = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function askFirst(urls: URL[], message: Message, settings: Settings): Promise<Exchange> {
  let failure: RequestError | undefined;
  for (const url of urls) {
    try {
      return await followRedirects(url, message, settings);
    } catch (error) {
      // A refused certificate must not lead to plain http: that is what an attacker would want.
      if (!(error instanceof RequestError) || error.reason === "certificate") throw error;
      if (failure === undefined || !failure.mayPass) failure = error;
    }
  }
  throw failure;
}

/** Redirects are followed by hand, for `fetch` would take the credentials along to whoever answers. */
async function followRedirects(url: URL, { headers, form }: Message, settings: Settings): Promise<Exchange> {
  let { authorization, ...rest } = headers;
  const carriedSecret = authorization !== undefined || form !== undefined;
  let current = url;
  for (let hops = 0; hops <= MAX_REDIRECTS; hops++) {
    const sent = authorization === undefined ? rest : { ...rest, authorization };
    const exchange = await send(current, { headers: sent, form }, settings);
    const location = exchange.response.headers.get("location");
    if (![301, 302, 303, 307, 308].includes(exchange.response.status) || location === null) {
      return { ...exchange, asked: url };
    }
    await exchange.response.body?.cancel();
    const next = redirectTarget(location, current);
    if (carriedSecret && current.protocol === "https:" && next.protocol === "http:") {
      throw network("follow", current, `it redirects to plain http (${displayUrl(next)}), and a password is in use`);
    }
    if (next.origin !== current.origin && form !== undefined) {
      throw network("follow", current, "it redirects a secret elsewhere");
    }
    if (next.origin !== current.origin) authorization = undefined;
    current = next;
  }
  throw network("follow", url, `it redirects more than ${MAX_REDIRECTS} times`);
}

function redirectTarget(location: string, base: URL): URL {
  const target = URL.canParse(location, base.href) ? new URL(location, base) : undefined;
  if (target === undefined || !/^https?:$/.test(target.protocol)) {
    throw network("follow", base, "it redirects to what is no http(s) URL");
  }
  target.username = target.password = "";
  return target;
}

/** One request, no more. Ends with an answer's head or a `RequestError`. */
async function send(url: URL, { headers, form }: Message, settings: Settings): Promise<Exchange> {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(silence(url, settings)), settings.timeout * 1000);
  try {
    const response = await settings.fetch(url, {
      // Deno would otherwise ask for gzip and decode it, and no digest would fit.
      headers: { "accept-encoding": "identity", "user-agent": `fetch_wheels/${VERSION}`, ...headers },
      ...(form === undefined ? {} : { method: "POST", body: new URLSearchParams(form) }),
      redirect: "manual",
      signal: AbortSignal.any([controller.signal, settings.signal]),
    });
    settings.onProgress({ type: "request", url: displayUrl(url), status: response.status });
    return { response, url, asked: url, controller };
  } catch (error) {
    settings.signal.throwIfAborted();
    controller.signal.throwIfAborted();
    throw error instanceof Deno.errors.NotCapable ? error : requestError(url, error);
  } finally {
    clearTimeout(timer);
  }
}

/** The bytes of an answer; a connection that is silent for too long is an error, and so is one that dies. */
async function* answerBody({ response, url, controller }: Exchange, settings: Settings): AsyncGenerator<Uint8Array> {
  if (response.body === null) return;
  const reader = response.body.getReader();
  const silent = () => controller.abort(silence(url, settings));
  try {
    while (true) {
      // The clock runs only while this waits: a slow disk is not a silent network.
      const timer = setTimeout(silent, settings.timeout * 1000);
      const { done, value } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      yield value;
    }
  } catch (error) {
    settings.signal.throwIfAborted();
    controller.signal.throwIfAborted();
    throw error instanceof FetchWheelsError ? error : requestError(url, error);
  } finally {
    controller.abort(); // whatever is left of the body
  }
}

/** A small answer as a whole, asked for again where it breaks off. */
async function askWhole(
  ask: (patience: Patience) => Promise<Exchange>,
  { limit, settings }: { limit: number; settings: Settings },
): Promise<{ exchange: Exchange; body: Uint8Array | undefined }> {
  const patience = newPatience();
  while (true) {
    const exchange = await ask(patience);
    try {
      return { exchange, body: await readAll(exchange, limit, settings) };
    } catch (error) {
      await beforeRetry(error, patience, settings);
    }
  }
}

async function readAll(exchange: Exchange, limit: number, settings: Settings): Promise<Uint8Array | undefined> {
  return await gather(answerBody(exchange, settings), limit);
}

/** All of these bytes, or undefined where there are more than so many. */
async function gather(bytes: AsyncIterable<Uint8Array>, limit: number): Promise<Uint8Array | undefined> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of bytes) {
    size += chunk.length;
    if (size > limit) return undefined;
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

type RequestReason = "certificate" | "not-tls" | "refused" | "unreachable" | "silent" | "broken" | "status";

/** A request that got no answer, one that broke off, or one that says to come again. */
class RequestError extends FetchWheelsError {
  readonly reason: RequestReason;
  /** What the server asked to wait. */
  readonly waitMs?: number;

  constructor(
    reason: RequestReason,
    message: string,
    options: { kind?: ErrorKind; hint?: string; cause?: unknown; waitMs?: number } = {},
  ) {
    super(options.kind ?? "network", message, options);
    this.reason = reason;
    this.waitMs = options.waitMs;
  }

  /** Whether another try may help. */
  get mayPass(): boolean {
    return this.reason !== "certificate" && this.reason !== "not-tls";
  }
}

function silence(url: URL, { timeout }: Settings): RequestError {
  return new RequestError("silent", `Cannot fetch ${quote(displayUrl(url))}: nothing came for ${timeout} s`);
}

/** What `fetch` and `node:https` throw, told by its words, for it has nothing else. */
const CONNECTION_FAILURES: [pattern: RegExp, reason: RequestReason, words: string][] = [
  [/peer certificate|CERT|SELF_SIGNED|UNABLE_TO_/, "certificate", "its certificate is not trusted"],
  [/InvalidContentType|WRONG_VERSION_NUMBER/, "not-tls", "it does not speak TLS"],
  [/refused/i, "refused", "the connection is refused"],
  [/dns error|ENOTFOUND|EAI_AGAIN/, "unreachable", "there is no such host"],
  [/unreachable|no route/i, "unreachable", "the network is unreachable"],
  [/timed? ?out/i, "silent", "the connection timed out"],
];

const CONNECTION_HINTS: Partial<Record<RequestReason, string>> = {
  certificate: "trust it with --ca-file PEM (REGISTRY_CA_FILE), or accept any certificate with --insecure",
  "not-tls": "if it speaks plain http: --protocol http (REGISTRY_PROTOCOL)",
};

function requestError(url: URL, error: unknown): RequestError {
  const { message, cause } = error as Error;
  const text = `${message} ${cause instanceof Error ? cause.message : ""} ${(error as { code?: string }).code ?? ""}`;
  const said = text.replace(/https?:\/\/[^\s)]*/g, ""); // what the user wrote must not be taken for a failure
  const found = CONNECTION_FAILURES.find(([pattern]) => pattern.test(said));
  const [, reason, words] = found ?? [/./, "broken" as const, "the connection broke"];
  const isHttpLikely = url.protocol === "https:" && reason === "refused";
  const hint = CONNECTION_HINTS[isHttpLikely ? "not-tls" : reason];
  const detail = reason === "certificate" || reason === "broken" ? ` (${brief(said)})` : "";
  const state = `Cannot fetch ${quote(displayUrl(url))}: ${words}${detail}`;
  return new RequestError(reason, state, { hint, cause: error });
}

function network(action: string, url: URL, state: string): FetchWheelsError {
  return new FetchWheelsError("network", `Cannot ${action} ${quote(displayUrl(url))}: ${state}`);
}

/** The last words of an error's chain, without the URL in its middle. */
function brief(text: string): string {
  return quote(text.trim().split(/\): (?:client error \(\w+\): )?|peer certificate: /).at(-1) ?? text).slice(1, -1)
    .slice(0, 120);
}

/** For people: without the query, which may be a signature, and without a password. */
function displayUrl(url: URL): string {
  return `${url.origin}${url.pathname}${url.search === "" ? "" : "?…"}`;
}

/** An answer that is no success, with the registry's own words (distribution specification, "Error Codes"). */
function statusError(
  action: string,
  value: string,
  { exchange: { response, url }, body, hint }: { exchange: Exchange; body: Uint8Array | undefined; hint?: string },
): FetchWheelsError {
  const kind = response.status === 404 ? "not-found" : [401, 403].includes(response.status) ? "auth" : "network";
  const said = registryWords(parseJson(body));
  const words = `${value === displayUrl(url) ? "it" : displayUrl(url)} answered ${response.status}${
    said === "" ? "" : ` (${said})`
  }`;
  return new FetchWheelsError(kind, `Cannot ${action} ${quote(value)}: ${words}`, { hint });
}

function registryWords(json: ReturnType<typeof parseJson>): string {
  const errors: { code?: unknown; message?: unknown }[] = Array.isArray(json?.errors) ? json.errors : [];
  const words = errors.map((error) => [error?.code, error?.message].filter(Boolean).join(": ")).join("; ");
  return quote(String(words || json?.details || json?.message || "")).slice(1, -1).slice(0, 300);
}

/** The body of an error. That it breaks off is no news: the status is, and it is in the message. */
async function readError(exchange: Exchange, settings: Settings): Promise<Uint8Array | undefined> {
  return await readAll(exchange, MAX_ERROR_BYTES, settings).catch(() => undefined);
}

/**
 * `fetch`, but with the certificates that the user trusts. rustls, below `fetch`, refuses a server's certificate that is
 * its own CA even when it is trusted, and cannot be told to accept any: then `node:https` does it.
 */
function trustingFetch(client: Deno.HttpClient, pem: string[], insecure: boolean): typeof globalThis.fetch {
  if (insecure) return (input, init) => nodeFetch(input, init, { ca: [], rejectUnauthorized: false });
  const pinned = pem.map((text) => Buffer.from(text.replace(/-----[^-]+-----|\s/g, ""), "base64"));
  // The very certificate that the user gave needs no fitting name in it.
  const checkServerIdentity = (host: string, certificate: tls.PeerCertificate) =>
    pinned.some((raw) => raw.equals(certificate.raw)) ? undefined : tls.checkServerIdentity(host, certificate);
  return async (input, init) => {
    try {
      return await fetch(input, { ...init, client });
    } catch (error) {
      const isRefused = error instanceof TypeError && /peer certificate/.test(String(error.cause));
      if (pem.length === 0 || !isRefused) throw error;
      return await nodeFetch(input, init, { ca: pem, checkServerIdentity });
    }
  };
}

function readCertificates(file: string): string[] {
  const text = onDisk("read", file, () => fs.readFileSync(file, "utf8"));
  const found = text.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g);
  if (found === null) throw usage("use certificates", file, "it holds no PEM certificate");
  return [...found];
}

/** `node:https` in the shape of `fetch`, for what is sent here. Proxies are taken from the environment, as `fetch` does by itself. */
async function nodeFetch(
  input: RequestInfo | URL,
  init: RequestInit = {},
  options: tls.ConnectionOptions,
): Promise<Response> {
  const url = new URL(input instanceof Request ? input.url : input);
  if (url.protocol !== "https:") return await fetch(input, init);
  const names = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];
  const proxyEnv = Object.fromEntries(names.map((name) => [name, Deno.env.get(name)]));
  const agent = new https.Agent({ proxyEnv, ...options } as https.AgentOptions);
  const { method, body } = init;
  const form = body === undefined ? {} : { "content-type": "application/x-www-form-urlencoded" };
  const headers = { ...Object.fromEntries(new Headers(init.headers)), ...form };
  const signal = init.signal ?? undefined;
  const sent = https.request(url, { ...options, agent, method, headers, signal });
  sent.end(body?.toString());
  const [answer] = await once(sent, "response");
  const { statusCode: status, statusMessage: statusText } = answer;
  const fields = Object.entries(answer.headers as Record<string, string | string[]>);
  const isEmpty = status === 204 || status === 304;
  return new Response(isEmpty ? null : Readable.toWeb(answer) as ReadableStream<Uint8Array<ArrayBuffer>>, {
    status,
    statusText,
    headers: fields.flatMap(([name, value]) => [value].flat().map((one): [string, string] => [name, one])),
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 Auth: a 401's challenges to an Authorization header, on demand. A public image costs one token, a local one none.
// ---------------------------------------------------------------------------------------------------------------------

/** A registry or a mirror of it, as far as one repository is concerned. */
interface Registry {
  readonly isMirror: boolean;
  /** Whether it has failed to answer, which would only cost time again. */
  isDown: boolean;
  /** GETs a path below `/v2/<repository>/`. An answer that is neither a success nor expected is an error. */
  get(path: string, options: GetOptions): Promise<Exchange>;
}

interface GetOptions {
  headers?: Record<string, string>;
  expected?: number[];
  patience?: Patience;
}

/** A header that was obtained, the challenge it answers, and until when it may be used. */
interface Authorization {
  header: string;
  challenges: Challenge[];
  realmBase: URL;
  expires: number;
}

/** What stands between a name and its bytes. */
interface Access {
  image: ImageReference;
  settings: Settings;
  /** Undefined as long as nobody looked for any, null where there are none. */
  credentials?: UsableCredentials | null;
  isMirror: boolean;
}

/** Mirrors first, and the registry itself last. No mirror sees the registry's credentials. */
function openRegistries(image: ImageReference, settings: Settings): Registry[] {
  const origin: Access = { image, settings, credentials: settings.credentials, isMirror: false };
  const mirrors = settings.mirrors.map((url) => {
    const credentials = url.username === "" ? undefined : decodedUser(url);
    // No retries: the next one is the better try.
    return openRegistry([withoutUser(url)], {
      image,
      settings: { ...settings, retries: 0 },
      credentials,
      isMirror: true,
    });
  });
  return [...mirrors, openRegistry(baseUrls(image.registry, settings.protocol), origin)];
}

function openRegistry(bases: URL[], access: Access): Registry {
  const { image, settings, isMirror } = access;
  let live = bases;
  let authorization: Authorization | undefined;
  const name = formatReference(image);

  const get = async (path: string, { headers = {}, expected = [], patience = newPatience() }: GetOptions) => {
    if (authorization !== undefined && authorization.expires <= settings.now()) {
      authorization = await authorize(authorization.challenges, authorization.realmBase, access);
    }
    for (let refusals = 0;;) {
      const urls = live.map((base) => endpoint(base, path, access));
      const sent = authorization?.header;
      const all: Record<string, string> = sent === undefined ? headers : { ...headers, authorization: sent };
      const exchange = await request(urls, all, { settings, patience });
      const { response: { status, ok, headers: answered }, url, asked } = exchange;
      live = live.filter(({ origin }) => origin === asked.origin);
      if (ok || expected.includes(status)) return exchange;
      // A token may have run out on the way, so one is renewed; a password that is refused stays so.
      const isFinal = sent !== undefined && (++refusals > 1 || sent.startsWith("Basic "));
      if (status !== 401 || url.origin !== asked.origin || isFinal) {
        const body = await readError(exchange, settings);
        const error = statusError("fetch", name, { exchange, body, hint: authHint(status, access) });
        if (url.origin === asked.origin || error.kind !== "auth") throw error;
        // A signed URL that has run out: the registry will sign another one.
        await beforeRetry(new RequestError("status", error.message, error), patience, settings);
        continue;
      }
      await exchange.response.body?.cancel();
      authorization = await authorize(parseChallenges(answered.get("www-authenticate") ?? ""), url, access);
    }
  };
  return { isMirror, isDown: false, get };
}

/** A mirror is told by `ns` whose image is meant, as containerd does. */
function endpoint(base: URL, path: string, { image, isMirror }: Access): URL {
  const url = new URL(`${base.pathname.replace(/\/$/, "")}/v2/${image.repository}/${path}`, base);
  if (isMirror) url.searchParams.set("ns", image.registry);
  return url;
}

function withoutUser(url: URL): URL {
  const bare = new URL(url);
  bare.username = bare.password = "";
  return bare;
}

/** What a mirror cannot give, the next one may, and in the end the registry. */
async function askEach<T>(
  registries: Registry[],
  ask: (registry: Registry) => Promise<T>,
  settings: Settings,
): Promise<T> {
  for (const registry of registries.filter(({ isDown }) => !isDown)) {
    try {
      return await ask(registry);
    } catch (error) {
      tellOfMirror(error, registry, settings);
    }
  }
  throw new Error("there is no registry");
}

/** Passes on what is not a mirror's failure. */
function tellOfMirror(error: unknown, registry: Registry, settings: Settings): void {
  settings.signal.throwIfAborted();
  if (!registry.isMirror || !(error instanceof FetchWheelsError)) throw error;
  registry.isDown = error instanceof RequestError;
  settings.onProgress({ type: "warning", message: `a mirror is left out: ${error.message}` });
}

function authHint(status: number, { credentials }: Access): string | undefined {
  if (status === 404) return "check the name and the tag; some registries say so of private images, too";
  if (status !== 401 && status !== 403) return undefined;
  return !credentials
    ? `check the name; if the image is private, ${PASSWORD_HINT}`
    : `check the user name and the password${
      "username" in credentials ? `, and whether ${quote(credentials.username)} may pull this image` : ""
    }`;
}

/** The Hub has a host of its own. Only names that cannot be reached from elsewhere are tried without TLS. */
function baseUrls(registry: string, protocol: Settings["protocol"]): URL[] {
  const host = registry === HUB ? HUB_HOST : registry;
  if (protocol !== "detect") return [new URL(`${protocol}://${host}`)];
  const https = new URL(`https://${host}`);
  return isLocalName(https.hostname) ? [https, new URL(`http://${host}`)] : [https];
}

function isLocalName(host: string): boolean {
  const isPrivate =
    /^(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01])|169\.254)\.[\d.]+$|^\[(?:f[cd][0-9a-f]|fe[89ab])[0-9a-f]:/.test(host);
  return isPrivate || isLoopback(host) || /^[^.:[\]]+$|\.(?:local|internal|localhost)$/.test(host);
}

function isLoopback(host: string): boolean {
  return host === "localhost" || host === "[::1]" || /^127\.[\d.]+$/.test(host);
}

/** Plain http shows a password to everyone on the way: only where the user said so, or nobody is on the way. */
function mayCarrySecrets(url: URL, { protocol }: Settings): boolean {
  return url.protocol === "https:" || protocol === "http" || isLoopback(url.hostname);
}

/** Bearer first, then Basic, as the challenge allows. */
async function authorize(challenges: Challenge[], realmBase: URL, access: Access): Promise<Authorization> {
  const { image, settings } = access;
  access.credentials ??= access.isMirror ? null : await storedCredentials(image, settings) ?? null;
  const { credentials } = access;
  const fail = (state: string, hint?: string) =>
    new FetchWheelsError("auth", `Cannot fetch ${quote(formatReference(image))}: ${state}`, { hint });
  const bearer = challenges.find(({ scheme, parameters }) => scheme === "bearer" && parameters.realm);
  if (bearer === undefined && !challenges.some(({ scheme }) => scheme === "basic")) {
    const schemes = challenges.map(({ scheme }) => scheme).join(", ") || "none";
    throw fail(`the registry answered 401 and asks for neither Bearer nor Basic, but ${schemes}`);
  }
  const realm = bearer?.parameters.realm ?? realmBase.href;
  const url = URL.canParse(realm, realmBase.href) ? new URL(realm, realmBase) : undefined;
  if (url === undefined || !/^https?:$/.test(url.protocol)) {
    throw fail(`the token service ${quote(realm.split("?")[0] ?? "")} is no http(s) URL`);
  }
  const exposed = [realmBase, url].find((target) => !mayCarrySecrets(target, settings));
  if (credentials !== null && exposed !== undefined) {
    throw fail(`no password is sent to ${displayUrl(exposed)} over plain http`, "if that is meant: --protocol http");
  }
  if (bearer === undefined) {
    if (credentials === null) throw fail("the registry asks for a user name and a password", PASSWORD_HINT);
    if (!("username" in credentials)) throw fail("the registry takes no identity token", PASSWORD_HINT);
    return { challenges, realmBase, header: basic(credentials), expires: Infinity };
  }
  if (bearer.parameters.service !== undefined) url.searchParams.set("service", bearer.parameters.service);
  url.searchParams.set("scope", `repository:${image.repository}:pull`);
  return { challenges, realmBase, ...await fetchToken(url, access) };
}

/** Distribution project, "Token Authentication Specification". */
async function fetchToken(url: URL, access: Access): Promise<Pick<Authorization, "header" | "expires">> {
  const { image, settings, credentials } = access;
  const name = formatReference(image);
  const asked = settings.now();
  const identity = credentials && "identityToken" in credentials ? credentials.identityToken : undefined;
  const user = identity === undefined ? credentials : { username: IDENTITY_USER, password: identity };
  const headers: Record<string, string> = user && "username" in user ? { authorization: basic(user) } : {};
  const limits = { limit: MAX_TOKEN_BYTES, settings };
  const get = () => askWhole((patience) => request([url], headers, { settings, patience }), limits);
  const bare = new URL(url);
  for (const name of ["service", "scope"]) bare.searchParams.delete(name);
  const post = (form: string) => askWhole((patience) => request([bare], {}, { settings, patience, form }), limits);
  // An identity token is exchanged by OAuth2's POST; not every token service has that, and then it is a password.
  const posted = identity === undefined ? undefined : await post(refreshForm(url, identity));
  const { exchange, body } = posted?.exchange.response.ok ? posted : await get();
  const hint = authHint(exchange.response.status, access);
  if (!exchange.response.ok) throw statusError("get a token for", name, { exchange, body, hint });
  const answer = parseJson(body);
  const token = answer?.token || answer?.access_token;
  if (typeof token !== "string" || !/^[\x21-\x7e]+$/.test(token)) {
    const state = `${displayUrl(url)} answered without one`;
    throw new FetchWheelsError("auth", `Cannot get a token for ${quote(name)}: ${state}`);
  }
  const seconds = Number(answer?.expires_in) > 0 ? Number(answer?.expires_in) : DEFAULT_TOKEN_SECONDS;
  return { header: `Bearer ${token}`, expires: asked + seconds * 1000 };
}

function refreshForm({ searchParams }: URL, refreshToken: string): string {
  const form = new URLSearchParams({
    grant_type: "refresh_token",
    client_id: "fetch_wheels",
    refresh_token: refreshToken,
  });
  for (const name of ["service", "scope"]) form.set(name, searchParams.get(name) ?? "");
  return form.toString();
}

// deno-lint-ignore no-explicit-any -- what others send may be anything, and is looked at field by field
function parseJson(bytes: Uint8Array | undefined): Record<string, any> | undefined {
  const value = parseValue(bytes);
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value : undefined;
}

function parseValue(bytes: Uint8Array | undefined): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes ?? new Uint8Array()));
  } catch {
    return undefined; // the caller says what it is that is no JSON
  }
}

/**
 * Reads a `WWW-Authenticate` header, which may hold several challenges (RFC 9110, section 11.6.1).
 *
 * @example
 * ```ts
 * import { parseChallenges } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * assert.deepEqual(parseChallenges('Bearer realm="https://auth.example/token",service="r", Basic realm="r"'), [
 *   { scheme: "bearer", parameters: { realm: "https://auth.example/token", service: "r" } },
 *   { scheme: "basic", parameters: { realm: "r" } },
 * ]);
 * ```
 *
 * @param header The header's value; several headers are joined with commas, as `Headers` does
 * @returns The challenges in their order; of a malformed header, what was readable before the fault
 */
export function parseChallenges(header: string): Challenge[] {
  const challenges: Challenge[] = [];
  let rest = header;
  const take = (pattern: RegExp): RegExpExecArray | undefined => {
    const match = pattern.exec(rest);
    if (match === null) return undefined;
    rest = rest.slice(match[0].length);
    return match;
  };
  while (take(/^[\s,]+/) || rest !== "") {
    // A parameter is a token and "=" before a value; anything else at the start of a list element is a new scheme.
    const parameter = take(/^([!#$%&'*+.^_`|~\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([!#$%&'*+.^_`|~\w-]+))\s*/);
    const current = challenges.at(-1);
    if (parameter !== undefined) {
      const [, name = "", quoted, bare = ""] = parameter;
      if (current === undefined || current.token68 !== undefined) return challenges;
      const key = name.toLowerCase();
      if (!Object.hasOwn(current.parameters, key)) current.parameters[key] = quoted?.replace(/\\(.)/g, "$1") ?? bare;
      if (rest !== "" && !rest.startsWith(",")) return challenges;
      continue;
    }
    const scheme = take(/^([!#$%&'*+.^_`|~\w-]+)(?:\s+|(?=,|$))/);
    if (scheme === undefined) return challenges;
    const challenge: Challenge = { scheme: scheme[1]?.toLowerCase() ?? "", parameters: {} };
    challenges.push(challenge);
    const token68 = take(/^([\w.~+/-]+=*)\s*(?=,|$)/);
    if (token68 !== undefined) challenge.token68 = token68[1];
  }
  return challenges;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Manifest: tag to index to manifest to layer descriptor, each body checked against the digest that named it.
// ---------------------------------------------------------------------------------------------------------------------

/** An image's manifest, of whatever schema. */
interface Manifest {
  digest: string;
  mediaType: string;
  /** Base first. */
  layers: Descriptor[];
}

/** What a manifest's path can lead to. */
type Document = ({ kind: "image" } & Manifest) | { kind: "index"; entries: Descriptor[] };

/** The manifest for one platform; an index that does not have it is an error that lists what it has. */
async function resolveManifest(
  image: ImageReference,
  registries: Registry[],
  settings: Settings,
): Promise<{ manifest: Manifest; platform: string | null }> {
  const offered = new Set<string>();
  let platform: string | null = null;

  const descend = async (reference: string, depth: number): Promise<Manifest | undefined> => {
    const ask = (registry: Registry) => fetchDocument(reference, { image, registry, settings });
    const document = await askEach(registries, ask, settings);
    if (document.kind === "image") return document;
    if (depth >= MAX_INDEX_DEPTH) {
      throw integrity("resolve", formatReference(image), `its indexes nest more than ${MAX_INDEX_DEPTH} deep`);
    }
    const images = document.entries.filter(isImage);
    images.filter(hasPlatform).forEach((entry) => offered.add(formatPlatform(entry.platform ?? {})));
    const chosen = selectManifest(images, settings.platform);
    if (chosen !== undefined && hasPlatform(chosen)) platform = formatPlatform(chosen.platform ?? {});
    // Indexes within an index need not say a platform; then each of them is looked into.
    const nested = images.filter((entry) => !hasPlatform(entry) && INDEX_TYPES.includes(entry.mediaType ?? ""));
    for (const entry of chosen === undefined ? nested : [chosen]) {
      const found = await descend(entry.digest, depth + 1);
      if (found !== undefined) return found;
    }
    return undefined;
  };

  const manifest = await descend(image.digest ?? image.tag ?? "latest", 0);
  if (manifest !== undefined) return { manifest, platform };
  const wanted = formatPlatform(settings.platform);
  const list = offered.size === 0 ? "it names no platform" : `it is for ${[...offered].join(", ")}`;
  throw new FetchWheelsError("not-found", `Cannot find ${wanted} in ${quote(formatReference(image))}: ${list}`, {
    hint: offered.size === 0 ? undefined : "choose one with --platform, if its wheels are what you want",
  });
}

/**
 * Chooses from an index as the OCI image specification means it, and never another architecture.
 *
 * @param entries The index's `manifests`
 * @param platform The platform asked for
 * @returns The entry, or undefined where none fits
 */
export function selectManifest(entries: Descriptor[], platform: Platform): Descriptor | undefined {
  const images = entries.filter(isImage);
  if (images.length === 1 && !images.some(hasPlatform)) return images[0];
  const wanted = normalizePlatform(platform);
  const fits = images.filter(hasPlatform)
    .map((entry) => ({ entry, offered: normalizePlatform(entry.platform ?? {}) }))
    .filter(({ offered }) => offered.os === wanted.os && offered.architecture === wanted.architecture);
  const implied = IMPLIED_VARIANTS.get(wanted.architecture);
  const fit = platform.variant
    ? fits.find(({ offered }) => (offered.variant ?? implied) === wanted.variant)
    : fits.find(({ entry }) => !entry.platform?.variant) ?? fits.find(({ offered }) => offered.variant === implied) ??
      fits[0];
  return fit?.entry;
}

/** What an architecture means that is named without a variant. */
const IMPLIED_VARIANTS = new Map([["amd64", "v1"], ["arm64", "v8"], ["arm", "v7"]]);

/** Attestations stand in an index beside the images that they are about. */
function isImage({ platform, annotations }: Descriptor): boolean {
  const isUnknown = platform?.os === "unknown" && platform.architecture === "unknown";
  return !isUnknown && annotations?.["vnd.docker.reference.type"] === undefined;
}

function hasPlatform({ platform }: Descriptor): boolean {
  return Boolean(platform?.os && platform.architecture);
}

async function fetchDocument(
  reference: string,
  { image, registry, settings }: { image: ImageReference; registry: Registry; settings: Settings },
): Promise<Document> {
  const accept = [...INDEX_TYPES, ...MANIFEST_TYPES, ...SCHEMA1_TYPES].join(", ");
  const ask = (patience: Patience) => registry.get(`manifests/${reference}`, { headers: { accept }, patience });
  const { exchange, body } = await askWhole(ask, { limit: MAX_MANIFEST_BYTES, settings });
  const name = formatReference(DIGEST.test(reference) ? { ...image, tag: undefined, digest: reference } : image);
  const fail = (state: string) => integrity("read manifest", name, state);
  if (body === undefined) throw fail(`it has more than ${MAX_MANIFEST_BYTES} bytes`);
  const isNamed = DIGEST.test(reference);
  const content = isNamed && digestOf(body, reference) === reference ? body : signedPayload(body);
  const digest = digestOf(content, isNamed ? reference : "sha256:");
  if (isNamed && digest !== reference) throw fail(`its bytes have the digest ${digest}`);
  const json = parseJson(content);
  if (json === undefined) throw fail("it is no JSON object");
  return readDocument(json, { digest, contentType: exchange.response.headers.get("content-type") ?? "", fail });
}

function digestOf(bytes: Uint8Array, like: string): string {
  const algorithm = like.slice(0, like.indexOf(":"));
  return `${algorithm}:${createHash(algorithm).update(bytes).digest("hex")}`;
}

/**
 * A signed schema 1 manifest is named by the digest of its payload, which its signature says how to restore. Nothing but
 * the payload may be read then, for the digest speaks of nothing else.
 */
function signedPayload(body: Uint8Array): Uint8Array {
  const json = parseJson(body);
  const header = json?.signatures?.[0]?.protected;
  if (json?.schemaVersion !== 1 || typeof header !== "string") return body;
  const format = parseJson(Buffer.from(header, "base64url"));
  if (!Number.isInteger(format?.formatLength) || typeof format?.formatTail !== "string") return body;
  return Buffer.concat([body.subarray(0, format.formatLength), Buffer.from(format.formatTail, "base64url")]);
}

/** The type is what the body says, else what the header says, else what the JSON looks like. */
function readDocument(
  json: NonNullable<ReturnType<typeof parseJson>>,
  { digest, contentType, fail }: { digest: string; contentType: string; fail: (state: string) => FetchWheelsError },
): Document {
  const known = [...INDEX_TYPES, ...MANIFEST_TYPES, ...SCHEMA1_TYPES];
  const looks = Array.isArray(json.manifests)
    ? INDEX_TYPES[0]
    : Array.isArray(json.layers)
    ? MANIFEST_TYPES[0]
    : Array.isArray(json.fsLayers)
    ? SCHEMA1_TYPES[1]
    : undefined;
  const headed = contentType.split(";")[0]?.trim().toLowerCase();
  const mediaType = [json.mediaType, headed, looks].find((type) => known.includes(type));
  if (mediaType === undefined) throw fail("it is neither an index nor a manifest");
  if (INDEX_TYPES.includes(mediaType)) {
    return { kind: "index", entries: readDescriptors(json.manifests, fail) };
  }
  // Schema 1 lists the final layer first, and says nothing of sizes.
  const layers = SCHEMA1_TYPES.includes(mediaType)
    ? readDescriptors(json.fsLayers?.map?.((layer: { blobSum?: unknown }) => ({ digest: layer?.blobSum })), fail)
      .reverse()
    : readDescriptors(json.layers, fail);
  return { kind: "image", digest, mediaType, layers };
}

function readDescriptors(value: unknown, fail: (state: string) => FetchWheelsError): Descriptor[] {
  if (!Array.isArray(value)) throw fail("it lists neither manifests nor layers, as its media type promises");
  for (const { digest, size, platform } of value.map((entry) => entry ?? {})) {
    if (typeof digest !== "string" || !DIGEST.test(digest)) throw fail(`${quote(String(digest))} in it is no digest`);
    if (!isPlatform(platform ?? {})) throw fail(`the platform of ${digest} is none`);
    if (size !== undefined && !(Number.isSafeInteger(size) && size >= 0)) throw fail(`the size of ${digest} is none`);
  }
  return value;
}

function isPlatform(value: unknown): boolean {
  const { os, architecture, variant } = value as Record<string, unknown>;
  return [os, architecture, variant].every((part) => typeof (part ?? "") === "string");
}

/** The final layer, unless the user asks for another one. */
function chooseLayer({ layers }: Manifest, name: string, wanted: string): { layer: Descriptor; info: LayerInfo } {
  const index = wanted === "last"
    ? layers.length - 1
    : DIGEST.test(wanted)
    ? layers.findIndex(({ digest }) => digest === wanted)
    : Number(wanted) - 1;
  const layer = layers[index];
  if (layer === undefined) {
    const which = wanted === "last" ? "it has no layers" : `of its ${layers.length} layers none is ${wanted}`;
    throw new FetchWheelsError("not-found", `Cannot fetch ${quote(name)}: ${which}`);
  }
  const { digest, size = null, mediaType = null } = layer;
  return { layer, info: { digest, size, mediaType, index: index + 1, count: layers.length } };
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Layer: the blob's bytes. They end well only when digest and size are right, so nobody downstream can forget to ask.
// ---------------------------------------------------------------------------------------------------------------------

/** Mirrors first; where one breaks off, the next goes on. */
async function* blobBytes(
  layer: Descriptor,
  { registries, settings, at }: { registries: Registry[]; settings: Settings; at: number },
): AsyncGenerator<Uint8Array> {
  for (const registry of registries.filter(({ isDown }) => !isDown)) {
    try {
      for await (const chunk of download({ layer, registry, settings, at })) {
        at += chunk.length;
        yield chunk;
      }
      return;
    } catch (error) {
      tellOfMirror(error, registry, settings);
    }
  }
}

/** A blob on its way from one registry, with what was learnt of it. */
interface Blob {
  readonly registry: Registry;
  readonly digest: string;
  readonly settings: Settings;
  /** Tries on the whole, shared by all its ranges. */
  readonly whole: { failures: number };
  /** From the manifest; for schema 1 from the first answer. */
  size: number | undefined;
  /** Where the registry redirected to; good until the signature in it runs out. */
  location?: URL;
  /** Strong entity tag, for `If-Range`. */
  validator?: string;
  /** False when the server has shown that it has no ranges, or not the right ones. */
  hasRanges: boolean;
  /** A wrong length that was claimed for the whole blob. */
  claimed?: number;
}

/** An answer with the blob's bytes from a place on. */
interface Opened {
  exchange: Exchange;
  start: number;
}

async function* download(
  { layer, registry, settings, at }: { layer: Descriptor; registry: Registry; settings: Settings; at: number },
): AsyncGenerator<Uint8Array> {
  const stop = new AbortController();
  const signal = AbortSignal.any([settings.signal, stop.signal]);
  const { digest, size } = layer;
  const whole = { failures: 0 };
  const blob: Blob = { registry, digest, settings: { ...settings, signal }, whole, size, hasRanges: true };
  try {
    if (size === undefined || size - at < PARALLEL_FROM_BYTES || settings.connections === 1) {
      yield* range(blob, { from: at, to: size });
      return;
    }
    // The first answer decides: a server without ranges sends everything, and then that is it.
    const opened = await open(blob, { at, to: at + RANGE_BYTES, patience: newPatience(whole) });
    if (blob.hasRanges) yield* inParallel(blob, { from: at, size, opened });
    else yield* range(blob, { from: at, to: size, opened });
  } finally {
    stop.abort();
  }
}

/** Ranges over several connections, delivered in order. Each of them is resumed by itself. */
async function* inParallel(
  blob: Blob,
  { from, size, opened }: { from: number; size: number; opened: Opened | undefined },
): AsyncGenerator<Uint8Array> {
  const underway: Promise<Uint8Array[]>[] = [];
  let next = from;
  while (true) {
    for (; blob.hasRanges && next < size && underway.length < blob.settings.connections; next += RANGE_BYTES) {
      const to = Math.min(next + RANGE_BYTES, size);
      const chunks = Array.fromAsync(range(blob, { from: next, to, opened }));
      chunks.catch(() => {}); // it is awaited below, unless an earlier one fails first
      underway.push(chunks);
      opened = undefined;
    }
    // Should the server turn out to have no ranges after all, what is left comes in one stream, not once for each range.
    if (underway[0] === undefined) return yield* range(blob, { from: next, to: size });
    yield* await underway[0];
    underway.shift(); // not before: what is being delivered takes its part of the memory, too
  }
}

/** The blob's bytes in `[from, to)`. A connection that dies is replaced by one that asks for the rest. */
async function* range(
  blob: Blob,
  { from, to, opened }: { from: number; to: number | undefined; opened?: Opened },
): AsyncGenerator<Uint8Array> {
  const patience = newPatience(blob.whole);
  let at = from;
  while (to === undefined || at < to) {
    try {
      opened ??= await open(blob, { at, to, patience });
      const { exchange, start } = opened;
      opened = undefined;
      to ??= blob.size;
      let skip = at - start;
      for await (const chunk of answerBody(exchange, blob.settings)) {
        // At the blob's own end nothing is cut off, so that too many bytes are seen as such.
        const end = to === undefined || to === blob.size ? undefined : skip + to - at;
        const wanted = chunk.subarray(skip, end);
        skip = Math.max(0, skip - chunk.length);
        if (wanted.length === 0) continue;
        at += wanted.length;
        patience.failures = 0;
        yield wanted;
        if (end !== undefined && at === to) break;
      }
      if (to === undefined) return;
      if (at < to) throw endedEarly(blob, at);
    } catch (error) {
      await beforeRetry(error, patience, blob.settings);
    }
  }
}

function endedEarly({ digest, size }: Blob, at: number): RequestError {
  const message = `Cannot fetch layer ${quote(digest)}: the answer ended after ${at} of ${size} bytes`;
  return new RequestError("broken", message, { kind: "integrity" });
}

/** Asks for `[at, to)`, closed, and finds out where the answer really begins. */
async function open(
  blob: Blob,
  { at, to, patience }: { at: number; to: number | undefined; patience: Patience },
): Promise<Opened> {
  const isPart = blob.hasRanges && to !== undefined && (at > 0 || to !== blob.size);
  const headers: Record<string, string> = isPart ? { range: `bytes=${at}-${to - 1}` } : {};
  if (isPart && blob.validator !== undefined) headers["if-range"] = blob.validator;
  const exchange = await askForBlob(blob, headers, patience);
  const { status, headers: answered } = exchange.response;
  const length = Number(answered.get("content-length") ?? NaN);
  const tag = answered.get("etag");
  if (tag?.startsWith('"')) blob.validator = tag;
  if (status === 206 && isPart && isAskedFor(answered.get("content-range"), { at, to, size: blob.size })) {
    return { exchange, start: at };
  }
  if (isPart) blob.hasRanges = false;
  if (status !== 200) {
    await exchange.response.body?.cancel();
    if (isPart) return await open(blob, { at, to, patience });
    const body = await readError(exchange, blob.settings);
    throw statusError("fetch", blob.digest, { exchange, body });
  }
  blob.size ??= Number.isNaN(length) ? undefined : length;
  if (blob.size !== undefined && length !== blob.size && !Number.isNaN(length)) {
    // Once may be a fault on the way; twice the same is what the registry holds.
    if (blob.claimed === length) {
      await exchange.response.body?.cancel();
      throw wrongLength(blob, length);
    }
    blob.claimed = length;
  }
  return { exchange, start: 0 };
}

function wrongLength({ digest, size }: Blob, length: number): FetchWheelsError {
  return integrity("verify layer", digest, `it has ${length} bytes, and its manifest says ${size}`);
}

/** RFC 9110, section 14.4: start, end and total must be those that were asked for; a shorter end is allowed. */
function isAskedFor(
  contentRange: string | null,
  { at, to, size }: { at: number; to: number; size: number | undefined },
): boolean {
  const [, first, last, total] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(contentRange ?? "") ?? [];
  const isTotal = total === "*" || size === undefined || Number(total) === size;
  return Number(first) === at && Number(last) >= at && Number(last) < to && isTotal;
}

/** The place that the registry redirected to is asked directly, until it refuses; the registry signs a new one then. */
async function askForBlob(blob: Blob, headers: Record<string, string>, patience: Patience): Promise<Exchange> {
  const { registry, digest, settings, location } = blob;
  if (location !== undefined) {
    const exchange = await request([location], headers, { settings, patience });
    if (exchange.response.ok || exchange.response.status === 416) return exchange;
    await exchange.response.body?.cancel();
    blob.location = undefined;
  }
  const expected = headers.range === undefined ? [] : [400, 416];
  const exchange = await registry.get(`blobs/${digest}`, { headers, expected, patience });
  if (exchange.response.ok && exchange.url.origin !== exchange.asked.origin) blob.location = exchange.url;
  return exchange;
}

/** Passes bytes on and counts them; throws at their end, or as soon as there are too many, unless they are the right ones. */
async function* verified(bytes: AsyncIterable<Uint8Array>, { digest, size }: Descriptor): AsyncGenerator<Uint8Array> {
  const hash = createHash(digest.slice(0, digest.indexOf(":")));
  let received = 0;
  for await (const chunk of bytes) {
    received += chunk.length;
    if (size !== undefined && received > size) {
      throw integrity("verify layer", digest, `more than its ${size} bytes came`);
    }
    hash.update(chunk);
    yield chunk;
  }
  if (size !== undefined && received < size) {
    throw integrity("verify layer", digest, `${received} of its ${size} bytes came`);
  }
  const actual = hash.digest("hex");
  if (!digest.endsWith(`:${actual}`)) throw integrity("verify layer", digest, `its bytes hash to ${actual}`);
}

/** Keeps what passes by, laid out as the `blobs` of an OCI layout. What is kept is no more trusted than the network. */
async function* throughCache(
  layer: Descriptor,
  { settings, fetchFrom }: { settings: Settings; fetchFrom: (at: number) => AsyncIterable<Uint8Array> },
): AsyncGenerator<Uint8Array> {
  const file = join(settings.cache ?? "", "blobs", layer.digest.replace(":", "/"));
  if (!settings.isFresh && await isIntact(file, { layer, settings })) {
    settings.onProgress({ type: "cached", digest: layer.digest, size: fs.statSync(file).size });
    return yield* verified(readFile(file), layer);
  }
  using part = PartialBlob.claim(file, settings);
  const bytes = part === undefined ? fetchFrom(0) : part.resume(fetchFrom);
  try {
    for await (const chunk of verified(bytes, layer)) {
      part?.append(chunk);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof FetchWheelsError && error.kind === "integrity") part?.discard();
    throw error;
  }
  part?.publish();
}

async function isIntact(
  file: string,
  { layer, settings }: { layer: Descriptor; settings: Settings },
): Promise<boolean> {
  try {
    if (!fs.existsSync(file)) return false;
    for await (const _ of verified(readFile(file), layer)) settings.signal.throwIfAborted();
    return true;
  } catch (error) {
    settings.signal.throwIfAborted();
    settings.onProgress({ type: "warning", message: `the cache is wrong: ${(error as Error).message}` });
    return false;
  }
}

/** A blob of the cache that is not whole yet. Its lock says who may write to it; without one, nothing is kept. */
class PartialBlob implements Disposable {
  readonly #path: string;
  readonly #file: Deno.FsFile;
  readonly #settings: Settings;
  /** Bytes that were there when it was claimed, and are passed on before new ones are fetched. */
  readonly #size: number;
  #passed = 0;
  #isKept = true;

  static claim(blob: string, settings: Settings): PartialBlob | undefined {
    const path = `${blob}.part`;
    try {
      fs.mkdirSync(dirname(path), { recursive: true });
      const file = tryLock(path, "any");
      if (typeof file === "string") return undefined; // someone else is fetching it, and will keep it
      // Its last owner may have published it between opening and locking: then this is the finished blob.
      if (fs.statSync(path, { throwIfNoEntry: false })?.ino === file.statSync().ino) {
        return new PartialBlob(path, file, settings);
      }
      file.close();
    } catch (error) {
      warnOfCache(error, path, settings);
    }
    return undefined;
  }

  private constructor(path: string, file: Deno.FsFile, settings: Settings) {
    [this.#path, this.#file, this.#settings] = [path, file, settings];
    if (settings.isFresh) file.truncateSync(0);
    this.#size = file.statSync().size;
  }

  async *resume(fetchFrom: (at: number) => AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    if (this.#size > 0) yield* readFile(this.#path);
    yield* fetchFrom(this.#size);
  }

  append(chunk: Uint8Array): void {
    const isNew = this.#passed >= this.#size;
    this.#passed += chunk.length;
    if (!isNew || !this.#isKept) return;
    try {
      this.#file.seekSync(0, Deno.SeekMode.End);
      writeAll(this.#file, chunk);
    } catch (error) {
      warnOfCache(error, this.#path, this.#settings);
      this.discard();
    }
  }

  publish(): void {
    if (!this.#isKept) return;
    try {
      this.#file.syncSync();
      fs.renameSync(this.#path, this.#path.replace(/\.part$/, ""));
    } catch (error) {
      warnOfCache(error, this.#path, this.#settings);
    }
  }

  discard(): void {
    if (this.#isKept) fs.rmSync(this.#path, { force: true });
    this.#isKept = false;
  }

  [Symbol.dispose](): void {
    this.#file.close();
  }
}

function warnOfCache(error: unknown, path: string, { onProgress }: Settings): void {
  const { message } = diskError("write", path, error) as Error;
  onProgress({ type: "warning", message: `the layer is not kept: ${message.split("\n")[0]}` });
}

/** Pulls exact amounts out of a stream of chunks. What it returns is a view that holds until the next call. */
class ByteReader {
  readonly #source: AsyncIterator<Uint8Array>;
  readonly #endsEarly: () => FetchWheelsError;
  #chunk: Uint8Array = new Uint8Array();
  #position = 0;

  /** `endsEarly` makes the error for a source that ends before the bytes that are asked for. */
  constructor(source: AsyncIterable<Uint8Array>, endsEarly: () => FetchWheelsError) {
    this.#source = source[Symbol.asyncIterator]();
    this.#endsEarly = endsEarly;
  }

  /** Bytes consumed so far. */
  get position(): number {
    return this.#position;
  }

  /** Returns between one and `limit` bytes, or undefined at the end. */
  async some(limit: number): Promise<Uint8Array | undefined> {
    if (this.#chunk.length === 0 && !await this.#pull()) return undefined;
    return this.#take(limit);
  }

  /** Returns `size` bytes; copies them only if they lie in several chunks. */
  async exactly(size: number): Promise<Uint8Array> {
    if (this.#chunk.length >= size) return this.#take(size);
    const joined = new Uint8Array(size);
    for (let filled = 0; filled < size;) {
      const part = await this.some(size - filled);
      if (part === undefined) throw this.#endsEarly();
      joined.set(part, filled);
      filled += part.length;
    }
    return joined;
  }

  /** Returns the next `size` bytes, fewer at the end, and leaves them to be read. */
  async peek(size: number): Promise<Uint8Array> {
    while (this.#chunk.length < size) {
      const seen = this.#chunk;
      this.#chunk = new Uint8Array();
      const isMore = await this.#pull();
      if (seen.length > 0) this.#chunk = Buffer.concat([seen, this.#chunk]);
      if (!isMore) break;
    }
    return this.#chunk.subarray(0, size);
  }

  async skip(size: number): Promise<void> {
    for (let left = size; left > 0;) {
      const part = await this.some(left);
      if (part === undefined) throw this.#endsEarly();
      left -= part.length;
    }
  }

  /** Reads to the end, so that whatever checks the source sees all of it. */
  async drain(): Promise<void> {
    while (await this.some(Infinity) !== undefined);
  }

  /** Gives the source up. Does not wait for it: it may be waiting for bytes that never come. */
  cancel(): void {
    this.#source.return?.()?.catch(() => {}); // its failure no longer matters to anyone
  }

  #take(limit: number): Uint8Array {
    const view = this.#chunk.subarray(0, limit);
    this.#chunk = this.#chunk.subarray(view.length);
    this.#position += view.length;
    return view;
  }

  async #pull(): Promise<boolean> {
    while (this.#chunk.length === 0) {
      const { done, value } = await this.#source.next();
      if (done) return false;
      this.#chunk = value;
    }
    return true;
  }
}

/** minizlib passes its options on to `node:zlib`; its types do not list this one. */
const INFLATE_OPTIONS: ConstructorParameters<typeof Gunzip>[0] & { chunkSize: number } = { chunkSize: INFLATED_BYTES };

const GZIP_MAGIC = "\x1f\x8b";
const ZSTD_MAGIC = "\x28\xb5\x2f\xfd";
/** Skippable frames of zstd begin with any of 16 magic numbers. */
const ZSTD_SKIPPABLE_MAGICS = Array.from({ length: 16 }, (_, low) => `${String.fromCharCode(0x50 + low)}\x2a\x4d\x18`);

/** What begins like this cannot be read; it is named for what it is. */
const OTHER_MAGICS: [magic: string, name: string][] = [
  ["\xfd7zXZ\0", "an xz file"],
  ["BZh", "a bzip2 file"],
  ["PK\x03\x04", "a zip file (a wheel?)"],
  ["7z\xbc\xaf\x27\x1c", "a 7z file"],
  ["\x04\x22M\x18", "an lz4 file"],
];

/**
 * Undoes gzip or zstd, as the first bytes say; other bytes pass as they are. Always drains its input, so that trailing
 * bytes are verified too.
 *
 * @param name What the bytes are, for messages
 */
async function* decompress(bytes: AsyncIterable<Uint8Array>, name: string): AsyncGenerator<Uint8Array> {
  const reader = new ByteReader(bytes, () => integrity("decompress", name, "the data ends early (truncated?)"));
  try {
    const head = await reader.peek(TAR_BLOCK_BYTES);
    const text = Buffer.from(head).toString("latin1");
    if (text.startsWith(GZIP_MAGIC)) {
      yield* inflate(new Gunzip({ ...INFLATE_OPTIONS }), gzipPieces(reader), name);
    } else if ([ZSTD_MAGIC, ...ZSTD_SKIPPABLE_MAGICS].some((magic) => text.startsWith(magic))) {
      yield* inflate(new ZstdDecompress({ ...INFLATE_OPTIONS }), zstdPieces(reader, name), name);
    } else {
      const other = isTarHeader(head) ? undefined : otherFormat(text);
      if (other !== undefined) throw integrity("read", name, `it is ${other}, not a tar archive`);
      for (let part = await reader.some(Infinity); part !== undefined; part = await reader.some(Infinity)) yield part;
    }
    await reader.drain();
  } finally {
    reader.cancel();
  }
}

function otherFormat(head: string): string | undefined {
  if (head === "") return "empty";
  if (/^\s*<(?:!doctype|html|\?xml)/i.test(head)) return "an HTML or XML page";
  return OTHER_MAGICS.find(([magic]) => head.startsWith(magic))?.[1];
}

/** Small pieces, because a piece can inflate to a thousand times its size, all at once. */
async function* gzipPieces(reader: ByteReader): AsyncGenerator<Uint8Array> {
  for (let piece = await reader.some(DEFLATED_BYTES); piece !== undefined; piece = await reader.some(DEFLATED_BYTES)) {
    yield piece;
  }
}

/** Writes each piece and yields what came out of it. The decoder works synchronously and throws its errors from `write`. */
async function* inflate(
  decoder: Gunzip | ZstdDecompress,
  pieces: AsyncIterable<Uint8Array>,
  name: string,
): AsyncGenerator<Uint8Array> {
  const ready: Uint8Array[] = [];
  const run = (step: () => void) => {
    try {
      step();
    } catch (error) {
      const state = (error as Error).message.replace(/^zlib: /, "");
      throw integrity("decompress", name, state, error);
    }
  };
  decoder.on("data", (chunk) => ready.push(chunk));
  try {
    for await (const piece of pieces) {
      run(() => decoder.write(piece as Buffer));
      yield* ready.splice(0);
    }
    run(() => decoder.end());
    yield* ready.splice(0);
  } finally {
    decoder.close();
  }
}

/**
 * Cuts zstd (RFC 8878, section 3.1) into frame headers and blocks, because the decoder stops at the end of a frame
 * without a word about what follows in the same piece, and takes a truncated frame for a whole one. Drops skippable
 * frames. A block inflates to 128 KiB at most, so that a piece cannot take much memory.
 */
async function* zstdPieces(reader: ByteReader, name: string): AsyncGenerator<Uint8Array> {
  const fail = (state: string) => integrity("decompress", name, state);
  for (let head = await reader.peek(18); head.length > 0; head = await reader.peek(18)) {
    const view = new DataView(head.buffer, head.byteOffset, head.byteLength);
    const magic = head.length < 8 ? 0 : view.getUint32(0, true);
    if ((magic & 0xfffffff0) === 0x184d2a50) {
      await reader.skip(8 + view.getUint32(4, true));
      continue;
    }
    if (magic !== 0xfd2fb528) throw fail("what follows a zstd frame is not another one");
    const descriptor = view.getUint8(4);
    const isSingleSegment = (descriptor & 0x20) !== 0;
    const dictionaryBytes = [0, 1, 2, 4][descriptor & 3] ?? 0;
    const contentSizeBytes = [isSingleSegment ? 1 : 0, 2, 4, 8][descriptor >> 6] ?? 0;
    if (!isSingleSegment && view.getUint8(5) >> 3 > MAX_ZSTD_WINDOW_LOG - 10) {
      throw fail(`it needs a window of more than ${2 ** (MAX_ZSTD_WINDOW_LOG - 20)} MiB`);
    }
    yield await reader.exactly(5 + (isSingleSegment ? 0 : 1) + dictionaryBytes + contentSizeBytes);
    const checksumBytes = descriptor & 4 ? 4 : 0;
    for (let isLast = false; !isLast;) {
      const [low = 0, middle = 0, high = 0] = await reader.peek(3);
      const block = low | middle << 8 | high << 16;
      isLast = (block & 1) === 1;
      const isRunLength = (block >> 1 & 3) === 1;
      yield await reader.exactly(3 + (isRunLength ? 1 : block >> 3) + (isLast ? checksumBytes : 0));
    }
  }
}

function isWorker(): boolean {
  return (globalThis as { name?: string }).name === WORKER_NAME;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Tar: members, made safe. An archive that tries to reach outside is refused whole, for nothing in it can be trusted.
// ---------------------------------------------------------------------------------------------------------------------

/** A member as it may be written: its path is relative, clean and inside. */
type Member =
  | { kind: "file"; path: string; mode: number; mtime: Date | undefined; body: AsyncIterable<Uint8Array> }
  | { kind: "directory"; path: string; mode: number }
  | { kind: "hardlink"; path: string; target: string }
  | { kind: "symlink"; path: string; target: string }
  | { kind: "skipped"; path: string; reason: string };

/** What of an archive is wanted: globs, and how many components of its paths are not. */
interface Choice {
  include: string[];
  exclude: string[];
  strip: number;
}

async function* tarMembers(bytes: AsyncIterable<Uint8Array>, choice: Choice): AsyncGenerator<Member> {
  const choose = chooser(choice);
  for await (const entry of new TarReader(bytes, "the layer").members()) {
    const member = choose(safeMember(entry));
    if (member !== undefined) yield member;
  }
}

/** A member as its header and the extensions before it describe it. Nothing about it is safe yet. */
interface TarMember {
  name: string;
  linkname: string;
  type: MemberType;
  size: number;
  mode: number;
  /** Seconds since 1970. */
  mtime: number;
  /** Why it cannot be extracted; it matters only if the member is selected. */
  fault?: string;
  /** Where its body begins in the archive. */
  offset: number;
  /** Returns the next bytes of the body, as a view that holds until the next call, or undefined at its end. */
  read(): Promise<Uint8Array | undefined>;
}

type MemberType = "file" | "directory" | "hard link" | "symbolic link" | UnsupportedType;
type UnsupportedType = "character device" | "block device" | "FIFO" | "volume label" | "member of unknown type";

/** Types by their flag; `S` is GNU's old form of a sparse file. */
const MEMBER_TYPES: Record<string, MemberType> = {
  "\0": "file",
  "0": "file",
  "7": "file",
  "S": "file",
  "1": "hard link",
  "2": "symbolic link",
  "3": "character device",
  "4": "block device",
  "5": "directory",
  "6": "FIFO",
  "V": "volume label",
};

/** Types that have no body, whatever their size field says. */
const BODILESS = new Set<MemberType>([
  "directory",
  "hard link",
  "symbolic link",
  "character device",
  "block device",
  "FIFO",
]);

/** Records of a PAX header, or GNU's long names under the same keys; values are bytes, which need not be UTF-8. */
type TarExtensions = Map<string, Uint8Array>;

/**
 * Reads a tar archive (POSIX pax, ustar, GNU and v7 formats) member by member, without buffering any, modelled on Go's
 * `archive/tar`. Only headers are interpreted. A body that the caller does not read is skipped.
 */
class TarReader {
  readonly #reader: ByteReader;
  readonly #name: string;
  #globals: TarExtensions = new Map();
  #pax: TarExtensions = new Map();
  #gnu: TarExtensions = new Map();

  /** `name` is what the archive is called in messages. */
  constructor(bytes: AsyncIterable<Uint8Array>, name: string) {
    this.#name = name;
    this.#reader = new ByteReader(bytes, () => this.#fail("it ends early (truncated?)"));
  }

  /** Yields the members. Ends only after the end marker, and after all that follows it has been read. */
  async *members(): AsyncGenerator<TarMember> {
    const reader = this.#reader;
    try {
      while (true) {
        const block = await reader.exactly(TAR_BLOCK_BYTES);
        if (block.every((byte) => byte === 0)) break;
        if (!isTarHeader(block)) {
          throw this.#fail(reader.position === TAR_BLOCK_BYTES ? "it is not a tar archive" : "a header is corrupt");
        }
        const typeflag = String.fromCharCode(block[156] ?? 0);
        const ownSize = parseTarNumber(block.subarray(124, 136));
        if ("xgLK".includes(typeflag)) {
          await this.#readExtension(typeflag, ownSize);
          continue;
        }
        const member = this.#member(block, typeflag, ownSize);
        if (typeflag === "S") await this.#skipSparseMaps(block);
        let left = member.size;
        member.offset = reader.position;
        member.read = async () => {
          const part = left === 0 ? undefined : await reader.some(left);
          if (part === undefined && left > 0) throw this.#fail("it ends early (truncated?)");
          left -= part?.length ?? 0;
          return part;
        };
        yield member;
        await reader.skip(left + paddingAfter(member.size));
      }
      await reader.drain();
    } finally {
      reader.cancel();
    }
  }

  async #readExtension(typeflag: string, size: number | undefined): Promise<void> {
    if (size === undefined || size < 0) throw this.#fail("the size of an extension header is invalid");
    if (size > MAX_EXTENSION_BYTES) throw this.#fail(`an extension header has more than ${MAX_EXTENSION_BYTES} bytes`);
    const body = (await this.#reader.exactly(size)).slice();
    await this.#reader.skip(paddingAfter(size));
    if (typeflag === "L") this.#gnu.set("path", untilNul(body));
    else if (typeflag === "K") this.#gnu.set("linkpath", untilNul(body));
    else {
      const target = typeflag === "g" ? this.#globals : this.#pax;
      if (!parsePaxRecords(body, target)) throw this.#fail("a PAX header is corrupt");
    }
  }

  /** Puts header and extensions together; PAX wins over GNU's long names, and both win over the header. */
  #member(block: Uint8Array, typeflag: string, ownSize: number | undefined): TarMember {
    const extensions = new Map([...this.#gnu, ...this.#globals, ...this.#pax].filter(([, value]) => value.length > 0));
    this.#pax = new Map();
    this.#gnu = new Map();

    const name = decodeName(extensions.get("path") ?? headerName(block));
    const linkname = decodeName(extensions.get("linkpath") ?? untilNul(block.subarray(157, 257)));
    const isSparse = typeflag === "S" || [...extensions.keys()].some((key) => key.startsWith("GNU.sparse."));
    let type = MEMBER_TYPES[typeflag] ?? "member of unknown type";
    if (type === "file" && name.text.endsWith("/")) type = "directory";

    const paxSize = extensions.get("size");
    const size = BODILESS.has(type) ? 0 : paxSize === undefined ? ownSize : parsePaxSize(paxSize);
    if (size === undefined || size < 0) throw this.#fail(`the size of ${quote(name.text)} is invalid`);
    return {
      name: name.text,
      linkname: linkname.text,
      type,
      size,
      mode: parseTarNumber(block.subarray(100, 108)) ?? 0o644,
      mtime: parsePaxTime(extensions.get("mtime")) ?? parseTarNumber(block.subarray(136, 148)) ?? 0,
      fault: isSparse ? "is a sparse file, which is not supported" : name.fault ?? linkname.fault,
      offset: 0,
      read: () => Promise.resolve(undefined),
    };
  }

  /** GNU's old sparse files have further blocks of holes before the body, which the size does not include. */
  async #skipSparseMaps(header: Uint8Array): Promise<void> {
    let isExtended = header[482] === 1;
    while (isExtended) isExtended = (await this.#reader.exactly(TAR_BLOCK_BYTES))[504] === 1;
  }

  #fail(state: string): FetchWheelsError {
    return integrity("read archive", this.#name, state);
  }
}

/** Reports whether the block's checksum is right; some writers summed signed bytes. */
function isTarHeader(block: Uint8Array): boolean {
  if (block.length < TAR_BLOCK_BYTES) return false;
  let unsigned = 0;
  let signed = 0;
  for (let at = 0; at < TAR_BLOCK_BYTES; at++) {
    const byte = at >= 148 && at < 156 ? 0x20 : block[at] ?? 0;
    unsigned += byte;
    signed += byte < 128 ? byte : byte - 256;
  }
  const stored = parseTarNumber(block.subarray(148, 156));
  return stored === unsigned || stored === signed;
}

/** The prefix belongs to the name only after POSIX's magic; GNU keeps other things in its place. */
function headerName(block: Uint8Array): Uint8Array {
  const name = untilNul(block.subarray(0, 100));
  const isPosix = Buffer.from(block.subarray(257, 263)).toString("latin1") === "ustar\0";
  const prefix = isPosix ? untilNul(block.subarray(345, 500)) : new Uint8Array();
  return prefix.length === 0 ? name : Buffer.concat([prefix, Buffer.from("/"), name]);
}

/** Octal digits between blanks or NULs, or base 256 in two's complement; undefined for anything else. */
function parseTarNumber(field: Uint8Array): number | undefined {
  if ((field[0] ?? 0) & 0x80) {
    const isNegative = ((field[0] ?? 0) & 0x40) !== 0;
    let value = isNegative ? -1n : 0n;
    for (const [at, byte] of field.entries()) {
      value = value << 8n | BigInt(at === 0 && !isNegative ? byte & 0x7f : byte);
    }
    return Number.isSafeInteger(Number(value)) ? Number(value) : undefined;
  }
  const text = Buffer.from(field).toString("latin1").replace(/^[ \0]+|[ \0]+$/g, "");
  if (text === "") return 0;
  return /^[0-7]+$/.test(text) ? parseInt(text, 8) : undefined;
}

/** Adds `LENGTH KEY=VALUE\n` records to a map. Goes by their lengths: a value may hold anything, line breaks included. */
function parsePaxRecords(body: Uint8Array, records: TarExtensions): boolean {
  for (let at = 0; at < body.length;) {
    const blank = body.indexOf(0x20, at);
    const digits = blank < 0 ? "" : Buffer.from(body.subarray(at, blank)).toString("latin1");
    const end = at + Number(/^\d{1,9}$/.test(digits) ? digits : NaN);
    const equals = body.indexOf(0x3d, blank);
    const isRecord = end <= body.length && equals > blank + 1 && equals < end && body[end - 1] === 0x0a;
    if (!isRecord) return false;
    const key = Buffer.from(body.subarray(blank + 1, equals)).toString("utf8");
    records.set(key, body.subarray(equals + 1, end - 1));
    at = end;
  }
  return true;
}

function parsePaxSize(value: Uint8Array): number | undefined {
  const text = Buffer.from(value).toString("latin1");
  return /^\d+$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : undefined;
}

function parsePaxTime(value: Uint8Array | undefined): number | undefined {
  const text = Buffer.from(value ?? []).toString("latin1");
  return /^-?\d+(?:\.\d*)?$/.test(text) ? Number(text) : undefined;
}

function untilNul(field: Uint8Array): Uint8Array {
  const end = field.indexOf(0);
  return end < 0 ? field : field.subarray(0, end);
}

const NAME_DECODER = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A name that is not UTF-8 is shown with replacement characters, and is a fault. */
function decodeName(bytes: Uint8Array): { text: string; fault?: string } {
  try {
    return { text: NAME_DECODER.decode(bytes) };
  } catch {
    return { text: Buffer.from(bytes).toString("utf8"), fault: "has a name that is not UTF-8" };
  }
}

function paddingAfter(size: number): number {
  return (TAR_BLOCK_BYTES - size % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES;
}

/** The member, with every rule applied; undefined for the archive's own root. */
function safeMember(member: TarMember): Member | undefined {
  const fail = (state: string) => integrity("read archive member", member.name, state);
  if (member.fault !== undefined) throw fail(`it ${member.fault}`);
  const path = insidePath(member.name, member.name);
  if (path === "") {
    if (member.type === "directory") return undefined;
    throw fail("it has no name");
  }
  const { type, mode, linkname } = member;
  switch (type) {
    case "file":
      return {
        kind: "file",
        path,
        mode: (mode & 0o777) | 0o600,
        mtime: new Date(member.mtime * 1000),
        body: bodyOf(member),
      };
    case "directory":
      return { kind: "directory", path, mode: (mode & 0o777) | 0o700 };
    case "hard link":
      return { kind: "hardlink", path, target: insidePath(linkname, member.name) };
    case "symbolic link":
      if (/^$|\0/.test(linkname)) throw fail("it links to nowhere");
      return { kind: "symlink", path, target: linkname };
    default:
      return { kind: "skipped", path, reason: `it is a ${type}` };
  }
}

async function* bodyOf(member: TarMember): AsyncGenerator<Uint8Array> {
  for (let part = await member.read(); part !== undefined; part = await member.read()) yield part;
}

/** Leaves out what is not wanted. A glob stands for a path, for a name, and for all that is below either. */
function chooser({ include, exclude, strip }: Choice): (member: Member | undefined) => Member | undefined {
  const matcher = (globs: string[]) => globs.length === 0 ? undefined : picomatch(globs, { dot: true, nonegate: true });
  const [isIncluded, isExcluded] = [matcher(include), matcher(exclude)];

  const reasonAgainst = (path: string): string | undefined => {
    const components = path.split("/");
    const names = components.flatMap((name, at) => [name, components.slice(0, at + 1).join("/")]);
    const isWanted = isIncluded !== undefined && names.some((name) => isIncluded(name));
    if (isExcluded !== undefined && names.some((name) => isExcluded(name))) return "it is excluded";
    if (isIncluded !== undefined && !isWanted) return "it is not included";
    const isHidden = components.some((component) => component.startsWith("."));
    if (isHidden && !isWanted) return 'its path has a component that begins with "."';
    return components.length <= strip ? `its path has no more than ${strip} components` : undefined;
  };

  return (member) => {
    if (member === undefined || member.kind === "skipped") return member;
    const { path } = member;
    const reason = reasonAgainst(path);
    if (reason !== undefined) return { kind: "skipped", path, reason };
    const stripped = (text: string) => text.split("/").slice(strip).join("/");
    const shorter = { ...member, path: stripped(path) };
    return shorter.kind === "hardlink" ? { ...shorter, target: stripped(shorter.target) } : shorter;
  };
}

/** A path without `.` and empty components. One that could lead outside condemns the archive. */
function insidePath(path: string, member: string): string {
  const fail = (state: string) => unsafe(member, state);
  if (path.startsWith("/")) throw fail(`the path ${quote(path)} is absolute`);
  if (path.includes("\0")) throw fail(`the path ${quote(path)} holds a NUL`);
  const components = path.split("/").filter((component) => component !== "" && component !== ".");
  if (components.includes("..")) throw fail(`the path ${quote(path)} holds ".."`);
  return components.join("/");
}

function unsafe(member: string, state: string): FetchWheelsError {
  return new FetchWheelsError("unsafe", `Cannot extract ${quote(member)}: ${state}`, {
    hint: "the archive was refused whole; look at who made it",
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 Disk: everything is written to a staging directory, and renamed into place when all of it is known to be right.
// ---------------------------------------------------------------------------------------------------------------------

/** Where the bytes go. Disposing of it removes whatever was not published. */
interface Target extends Disposable {
  receive(bytes: AsyncIterable<Uint8Array>, layer: LayerInfo | null): Promise<Received>;
}

type Received = Pick<FetchResult, "files" | "skipped">;

function openTarget(settings: Settings): Target {
  if (settings.dryRun) return { receive: lookAtOnly, [Symbol.dispose]() {} };
  if (settings.list) return { receive: (bytes) => listMembers(bytes, settings), [Symbol.dispose]() {} };
  return settings.output === undefined ? new StagedTree(settings) : new Tarball(settings.output);
}

/** A layer is described by its manifest; of a tarball the first bytes show that it is there. */
async function lookAtOnly(bytes: AsyncIterable<Uint8Array>, layer: LayerInfo | null): Promise<Received> {
  if (layer === null) { for await (const _ of bytes) break; }
  return { files: [], skipped: [] };
}

async function listMembers(bytes: AsyncIterable<Uint8Array>, { choice, onProgress }: Settings): Promise<Received> {
  const [files, skipped]: [FetchResult["files"], FetchResult["skipped"]] = [[], []];
  for await (const member of tarMembers(decompress(bytes, "the layer"), choice)) {
    const { kind, path } = member;
    if (kind === "skipped") skipped.push({ path, reason: member.reason });
    if (kind === "skipped" || kind === "directory") continue;
    let size = 0;
    if (kind === "file") { for await (const chunk of member.body) size += chunk.length; }
    files.push({ path, size });
    onProgress({ type: "member", path, size });
  }
  return { files, skipped };
}

/** What a dead run left behind is known by its lock, which the kernel took away; what a living run has is left alone. */
function sweep(directory: string, prefix: string): void {
  for (const name of fs.readdirSync(directory)) {
    if (!name.startsWith(prefix) || !/^\d+-[0-9a-f]{8}$/.test(name.slice(prefix.length))) continue;
    const path = join(directory, name);
    const stat = fs.statSync(path, { throwIfNoEntry: false });
    if (stat === undefined) continue;
    const lock = tryLock(stat.isDirectory() ? join(path, LOCK_NAME) : path, "existing");
    if (lock === "locked" || lock === "missing" && Date.now() - stat.mtimeMs < YOUNG_MS) continue;
    fs.rmSync(path, { recursive: true, force: true });
    if (typeof lock === "object") lock.close();
  }
}

/** Opens a file and takes its lock, which lasts as long as the file is open. Locks hold between containers, too. */
function tryLock(path: string, which: "existing" | "any"): Deno.FsFile | "locked" | "missing" {
  if (which === "existing" && !fs.existsSync(path)) return "missing";
  const file = Deno.openSync(path, { read: true, write: true, create: which === "any" });
  if (file.tryLockSync(true)) return file;
  file.close();
  return "locked";
}

/** The tree of an archive, on DEST's file system and out of sight until it is published. */
class StagedTree implements Target {
  readonly #dest: string;
  readonly #settings: Settings;
  readonly #root: string;
  readonly #tree: string;
  /** The topmost directory that had to be made for the staging directory, if any. */
  readonly #made: string | undefined;
  readonly #lock: Deno.FsFile | undefined;
  /** Whether staging is beside DEST, which then comes to be by one rename, or in it. */
  readonly #isBeside: boolean;
  #isPublished = false;

  constructor(settings: Settings) {
    const { dest, clean } = settings;
    const exists = onDisk("use", dest, () => {
      const stat = fs.statSync(dest, { throwIfNoEntry: false });
      if (stat !== undefined && !stat.isDirectory()) throw occupied(dest, "it is no directory");
      return stat !== undefined;
    });
    [this.#dest, this.#settings] = [dest, settings];
    this.#isBeside = !exists || clean === true && onDisk("use", dest, () => canBeSwapped(dest));
    const [place, name] = this.#isBeside ? [dirname(dest), basename(dest)] : [dest, ""];
    this.#root = join(place, stagingName(name));
    this.#tree = join(this.#root, "new");
    this.#made = onDisk("create", dest, () => fs.mkdirSync(place, { recursive: true }));
    onDisk("clean up", place, () => sweep(place, stagingPrefix(name)));
    onDisk("create", this.#root, () => fs.mkdirSync(this.#root));
    onDisk("create", this.#tree, () => fs.mkdirSync(this.#tree));
    this.#lock = onDisk("lock", this.#root, () => lockNew(join(this.#root, LOCK_NAME)));
  }

  async receive(bytes: AsyncIterable<Uint8Array>, layer: LayerInfo | null): Promise<Received> {
    const { choice, unpin, workerUrl } = this.#settings;
    const url = (layer?.size ?? 0) < WORKER_FROM_BYTES ? undefined : workerUrl;
    const order: Order = { tree: this.#tree, choice };
    const tell = (members: number) => this.#settings.onProgress({ type: "extracted", members });
    const { entries, skipped } =
      await (url === undefined ? extractTo(order, { bytes, tell }) : extractInWorker(order, { bytes, url, tell }));
    if (unpin !== undefined && entries.get(CONSTRAINTS)?.kind === "file") {
      entries.set(CONSTRAINTS, { kind: "file", size: dropPin(join(this.#tree, CONSTRAINTS), unpin) });
    }
    const files = [...entries].filter(([, { kind }]) => kind !== "directory")
      .map(([path, { size }]) => ({ path, size }));
    if (files.length === 0) throw noFile(layer, skipped.length);
    this.#publish(entries);
    return { files, skipped };
  }

  #publish(entries: Entries): void {
    const undo: (() => void)[] = [];
    try {
      if (this.#settings.clean && fs.existsSync(this.#dest)) this.#putAside(undo);
      if (this.#isBeside && this.#renameTree()) return;
      this.#placeAll(entries, undo);
    } catch (error) {
      undo.reverse().forEach((step) => step());
      throw error;
    }
    this.#isPublished = true;
  }

  /** What `--clean` replaces: DEST as a whole where that can be renamed, else all that is in it but staging. */
  #putAside(undo: (() => void)[]): void {
    const old = join(this.#root, "old");
    const move = (from: string, to: string) => {
      onDisk("replace", from, () => fs.renameSync(from, to));
      undo.push(() => fs.renameSync(to, from));
    };
    if (this.#isBeside) return move(this.#dest, old);
    onDisk("create", old, () => fs.mkdirSync(old));
    const names = onDisk("read", this.#dest, () => fs.readdirSync(this.#dest));
    const others = names.filter((name) => !name.startsWith(stagingPrefix("")));
    others.forEach((name) => move(join(this.#dest, name), join(old, name)));
  }

  #placeAll(entries: Entries, undo: (() => void)[]): void {
    const order = ([path, { kind }]: [string, { kind: string }]) =>
      kind === "directory" ? 0 : path.endsWith(".txt") ? 2 : 1;
    // Constraints last: what reads them may then count on the wheels.
    for (const [path, { kind }] of [...entries].sort((a, b) => order(a) - order(b))) {
      const target = join(this.#dest, path);
      onDisk("publish", target, () => undo.push(this.#place(path, target, kind === "directory")));
    }
  }

  /** The quick way, where DEST is not there: one rename. False if it is there by now. */
  #renameTree(): boolean {
    try {
      fs.renameSync(this.#tree, this.#dest);
      return this.#isPublished = true;
    } catch (error) {
      if (["EEXIST", "ENOTEMPTY"].includes((error as NodeJS.ErrnoException).code ?? "")) return false;
      throw diskError("publish", this.#dest, error);
    }
  }

  /** Moves one entry into place, and returns what takes it back. */
  #place(path: string, target: string, isDirectory: boolean): () => void {
    const staged = join(this.#tree, path);
    const there = fs.lstatSync(target, { throwIfNoEntry: false });
    if (isDirectory) {
      if (there?.isSymbolicLink()) throw unsafe(path, `${quote(target)} is a symbolic link`);
      if (there !== undefined && !there.isDirectory()) throw occupied(target, "it is no directory");
      if (there !== undefined) return () => {};
      fs.mkdirSync(target);
      fs.chmodSync(target, fs.statSync(staged).mode & 0o777);
      return () => fs.rmdirSync(target);
    }
    if (there?.isDirectory()) throw occupied(target, "it is a directory");
    if (there === undefined) {
      fs.renameSync(staged, target);
      return () => fs.unlinkSync(target);
    }
    const backup = join(this.#root, `old-${path.replaceAll("/", "-").slice(-100)}-${crypto.randomUUID()}`);
    fs.renameSync(target, backup);
    try {
      fs.renameSync(staged, target);
    } catch (error) {
      fs.renameSync(backup, target);
      throw error;
    }
    return () => fs.renameSync(backup, target);
  }

  [Symbol.dispose](): void {
    onDisk("remove", this.#root, () => fs.rmSync(this.#root, { recursive: true, force: true }));
    this.#lock?.close();
    if (this.#isPublished || this.#made === undefined) return;
    for (let made = dirname(this.#root); made.startsWith(this.#made); made = dirname(made)) {
      if (fs.readdirSync(made).length > 0) return;
      onDisk("remove", made, () => fs.rmdirSync(made));
    }
  }
}

/** Neither a link nor a mount point, in a directory that may be written to: one rename can take it away. */
function canBeSwapped(dest: string): boolean {
  const [there, parent] = [fs.lstatSync(dest), fs.statSync(dirname(dest))];
  if (!there.isDirectory() || there.dev !== parent.dev) return false;
  try {
    fs.accessSync(dirname(dest), fs.constants.W_OK);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable || (error as NodeJS.ErrnoException).code === "EACCES") return false;
    throw error;
  }
}

function noFile(layer: LayerInfo | null, skipped: number): FetchWheelsError {
  const { index = 1, count = 1 } = layer ?? {};
  const what = `it holds no file to extract${skipped === 0 ? "" : `, ${skipped} of its members being left out`}`;
  const others = Array.from({ length: count }, (_, at) => at + 1).filter((place) => place !== index);
  const hint = others.length === 0 ? undefined : `the image's other layers: --layer ${others.join(", --layer ")}`;
  return new FetchWheelsError("not-found", `Cannot extract layer ${index} of ${count}: ${what}`, { hint });
}

/** Drops a project's own pin, which would forbid to build any other version of it. Returns the file's new size. */
function dropPin(file: string, project: string): number {
  const normalize = (name: string) => name.toLowerCase().replace(/[-_.]+/g, "-"); // PEP 503
  return onDisk("write", file, () => {
    const lines = fs.readFileSync(file, "utf8").split("\n");
    const kept = lines.filter((line) => normalize(/^\s*([\w.-]+)\s*===/.exec(line)?.[1] ?? "") !== normalize(project));
    const { mode } = fs.statSync(file);
    fs.unlinkSync(file); // not the contents of whatever may be linked to it
    fs.writeFileSync(file, kept.join("\n"), { mode });
    return fs.statSync(file).size;
  });
}

/** PEP 427: the last part of a wheel's name says what it runs on, often several times over. */
function warnOfForeignWheels(files: FetchResult["files"], { platform, onProgress }: Settings): void {
  const wanted = WHEEL_MACHINES.get(platform.architecture) ?? platform.architecture;
  const foreign = files.map(({ path }) => posix.basename(path)).filter((name) => {
    const tags = /^[^-]+-[^-]+(?:-\d[^-]*)?-[^-]+-[^-]+-([^-]+)\.whl$/.exec(name)?.[1]?.split(".") ?? ["any"];
    return !tags.some((tag) => tag === "any" || new RegExp(`^(?:many|musl)?linux.*_${wanted}$`).test(tag));
  });
  if (foreign.length === 0) return;
  const names = foreign.slice(0, 3).map(quote).join(", ") +
    (foreign.length > 3 ? ` and ${foreign.length - 3} more` : "");
  const message = `not for ${formatPlatform(platform)}, so the image is built wrongly: ${names}`;
  onProgress({ type: "warning", message });
}

/** Architectures in the names that wheels have for them. */
const WHEEL_MACHINES = new Map([["amd64", "x86_64"], ["arm64", "aarch64"], ["386", "i686"], ["arm", "armv[67]l"]]);

/** What a writer of trees is told. */
interface Order {
  tree: string;
  choice: Choice;
}

/** What is in a tree: paths, parents before children. */
type Entries = Map<string, { kind: "file" | "directory" | "symlink"; size: number }>;

/** What an archive left in a tree, and what it did not. */
interface Extracted {
  entries: Entries;
  skipped: FetchResult["skipped"];
}

async function extractTo(
  { tree, choice }: Order,
  { bytes, tell }: { bytes: AsyncIterable<Uint8Array>; tell: (members: number) => void },
): Promise<Extracted> {
  const writer = new TreeWriter(tree);
  for await (const member of tarMembers(decompress(bytes, "the layer"), choice)) {
    await writer.add(member);
    tell(writer.entries.size);
  }
  writer.makeSymlinks();
  return { entries: writer.entries, skipped: writer.skipped };
}

/** Writes members below a directory that is empty at first, and lets none of them lead out of it. */
class TreeWriter {
  readonly #tree: string;
  readonly entries: Entries = new Map();
  readonly skipped: FetchResult["skipped"] = [];
  readonly #symlinks = new Map<string, string>();

  constructor(tree: string) {
    this.#tree = tree;
  }

  async add(member: Member): Promise<void> {
    const { kind, path } = member;
    if (kind === "skipped") return void this.skipped.push({ path, reason: member.reason });
    this.#makeParents(path);
    const full = join(this.#tree, path);
    if (kind === "directory") {
      this.#makeDirectory(path);
      return onDisk("create", path, () => fs.chmodSync(full, member.mode));
    }
    this.#makeRoom(path);
    switch (kind) {
      case "file": {
        const size = await writeMember(full, member);
        return void this.entries.set(path, { kind, size });
      }
      case "hardlink":
        return this.#linkTo(member.target, path);
      case "symlink":
        this.#symlinks.set(path, member.target);
        return void this.entries.set(path, { kind, size: 0 });
    }
  }

  #linkTo(name: string, path: string): void {
    const target = this.entries.get(name);
    if (target === undefined || target.kind === "directory") {
      throw integrity("extract", path, `it links to ${quote(name)}, which is no file before it`);
    }
    this.entries.set(path, target);
    const link = this.#symlinks.get(name);
    if (link !== undefined) this.#symlinks.set(path, link);
    else onDisk("create", path, () => fs.linkSync(join(this.#tree, name), join(this.#tree, path)));
  }

  /** Last of all, so that nothing is ever written through one. */
  makeSymlinks(): void {
    for (const [path, target] of this.#symlinks) {
      assertInside(path, this.#symlinks);
      onDisk("create", path, () => fs.symlinkSync(target, join(this.#tree, path)));
    }
  }

  #makeParents(path: string): void {
    for (let slash = path.indexOf("/"); slash > 0; slash = path.indexOf("/", slash + 1)) {
      const parent = path.slice(0, slash);
      const there = this.entries.get(parent)?.kind;
      if (there === "symlink") throw unsafe(path, `it would be written through the symbolic link ${quote(parent)}`);
      if (there === "file") throw integrity("extract", path, `${quote(parent)} is a file before it`);
      this.#makeDirectory(parent);
    }
  }

  #makeDirectory(path: string): void {
    const there = this.entries.get(path)?.kind;
    if (there === "directory") return;
    if (there !== undefined) throw integrity("extract", path, `it is a directory, and a ${there} before`);
    onDisk("create", path, () => fs.mkdirSync(join(this.#tree, path)));
    this.entries.set(path, { kind: "directory", size: 0 });
  }

  /** The last of several members of one name is the one that counts, as for tar. */
  #makeRoom(path: string): void {
    const there = this.entries.get(path)?.kind;
    if (there === "directory") throw integrity("extract", path, "it is no directory, but one before");
    if (there === "file") onDisk("replace", path, () => fs.unlinkSync(join(this.#tree, path)));
    this.#symlinks.delete(path);
    this.entries.delete(path);
  }
}

/** What passes between the threads: a directory, batches of bytes, and their end; a word for each batch, and the outcome. */
type ToWorker = { order: Order } | { batch: Uint8Array<ArrayBuffer>[] } | "end" | "stop";
type FromWorker = { taken: "a batch"; members: number } | { extracted: Extracted } | {
  error: Pick<FetchWheelsError, "kind" | "message" | "hint">;
};

type Outcome = Exclude<FromWorker, { taken: string }>;

/**
 * The same in a thread of its own: Deno inflates on the thread that asks for it, and this one has the network to read and
 * a hash to compute. The worker writes only to the staging directory; what is published is decided here.
 */
async function extractInWorker(
  order: Order,
  { bytes, url, tell }: { bytes: AsyncIterable<Uint8Array>; url: string; tell: (members: number) => void },
): Promise<Extracted> {
  const worker = new Worker(url, { type: "module", name: WORKER_NAME });
  const post = (message: ToWorker, transfer: ArrayBuffer[] = []) => worker.postMessage(message, transfer);
  const outcome = Promise.withResolvers<Outcome>();
  let [ahead, isOver, word] = [0, false, Promise.withResolvers<void>()];
  const over = (how: Outcome) => {
    isOver = true;
    outcome.resolve(how);
  };
  worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
    if ("taken" in data) {
      ahead--;
      tell(data.members);
    } else over(data);
    word.resolve();
  };
  worker.onerror = (event) => {
    event.preventDefault();
    over({ error: { kind: "internal", message: `Cannot extract the layer: ${event.message}` } });
    word.resolve();
  };
  try {
    post({ order });
    for await (const batch of inBatches(bytes)) {
      post({ batch }, batch.map(({ buffer }) => buffer));
      for (ahead++; ahead >= BATCHES_AHEAD && !isOver; word = Promise.withResolvers()) await word.promise;
      if (isOver) break;
    }
    post("end");
  } catch (error) {
    post("stop"); // and not only terminate: a file in the making must not appear after the clean-up
    throw error;
  } finally {
    await outcome.promise;
    worker.terminate();
  }
  const result = await outcome.promise;
  if ("extracted" in result) return result.extracted;
  throw new FetchWheelsError(result.error.kind, result.error.message, result.error);
}

/** A message costs more than the bytes in it, up to some size. */
async function* inBatches(bytes: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array<ArrayBuffer>[]> {
  let [batch, size]: [Uint8Array<ArrayBuffer>[], number] = [[], 0];
  for await (const chunk of bytes) {
    // A buffer that is shared cannot be handed over.
    const isOwn = chunk.buffer instanceof ArrayBuffer && chunk.byteLength === chunk.buffer.byteLength;
    batch.push((isOwn ? chunk : chunk.slice()) as Uint8Array<ArrayBuffer>);
    if ((size += chunk.length) < BATCH_BYTES) continue;
    yield batch;
    [batch, size] = [[], 0];
  }
  if (batch.length > 0) yield batch;
}

/** The other end. */
async function serveExtraction(): Promise<void> {
  const port = globalThis as unknown as Worker;
  const { readable, writable } = new TransformStream<ToWorker, ToWorker>();
  const writer = writable.getWriter();
  port.onmessage = ({ data }: MessageEvent<ToWorker>) => void writer.write(data);
  const reader = readable.getReader();
  const next = async () => (await reader.read()).value ?? "stop";
  let members = 0;

  async function* received(): AsyncGenerator<Uint8Array> {
    for (let message = await next(); message !== "end"; message = await next()) {
      if (typeof message === "string" || !("batch" in message)) throw new DOMException("stopped", "AbortError");
      yield* message.batch;
      port.postMessage({ taken: "a batch", members });
    }
  }
  const first = await next();
  if (typeof first === "string" || !("order" in first)) return;
  try {
    const tell = (number: number) => void (members = number);
    port.postMessage({ extracted: await extractTo(first.order, { bytes: received(), tell }) });
  } catch (thrown) {
    const error = explain(thrown);
    const [kind, hint] = error instanceof FetchWheelsError ? [error.kind, error.hint] : ["internal" as const];
    port.postMessage({ error: { kind, message: (error as Error).message, hint } });
  }
}

async function writeMember(full: string, { path, body, mode, mtime }: Member & { kind: "file" }): Promise<number> {
  let size = 0;
  // Synchronous, for it is much the faster way to write thousands of small files.
  const file = onDisk("create", path, () => fs.openSync(full, "wx", mode));
  const output = { writeSync: (bytes: Uint8Array) => fs.writeSync(file, bytes) };
  try {
    for await (const chunk of body) {
      onDisk("write", path, () => writeAll(output, chunk));
      size += chunk.length;
    }
    onDisk("write", path, () => {
      fs.fchmodSync(file, mode); // what was given to open is subject to the umask
      if (mtime !== undefined && Number.isFinite(mtime.getTime())) fs.futimesSync(file, mtime, mtime);
    });
  } finally {
    fs.closeSync(file);
  }
  return size;
}

function writeAll(file: { writeSync(bytes: Uint8Array): number }, bytes: Uint8Array): void {
  for (let written = 0; written < bytes.length;) written += file.writeSync(bytes.subarray(written));
}

function lockNew(path: string): Deno.FsFile {
  const file = Deno.openSync(path, { read: true, write: true, createNew: true });
  file.lockSync(true);
  return file;
}

/** Walks a link's target as the kernel would, through the archive's other links, and refuses to leave the root. */
function assertInside(path: string, symlinks: Map<string, string>): void {
  const place = path.split("/").slice(0, -1);
  const todo = [symlinks.get(path) ?? ""];
  for (let links = 1; todo.length > 0;) {
    const text = todo.pop() ?? "";
    if (text.startsWith("/")) throw unsafe(path, `it links to the absolute path ${quote(text)}`);
    const [component = "", ...rest] = text.split("/");
    if (rest.length > 0) todo.push(rest.join("/").replace(/^\/+/, ""));
    if (component === "" || component === ".") continue;
    if (component !== "..") place.push(component);
    else if (place.pop() === undefined) throw unsafe(path, `it links to ${quote(symlinks.get(path) ?? "")}, outside`);
    const next = component === ".." ? undefined : symlinks.get(place.join("/"));
    if (next === undefined) continue;
    if (++links > MAX_LINKS) throw unsafe(path, "its links go round in a circle");
    place.pop();
    todo.push(next);
  }
}

/** A tarball as it is: a file that appears when it is whole, or a stream. */
class Tarball implements Target {
  readonly #output: string | WritableStream<Uint8Array>;
  readonly #staged: string | undefined;
  #file: Deno.FsFile | undefined;

  constructor(output: string | WritableStream<Uint8Array>) {
    this.#output = output;
    if (typeof output !== "string") return;
    const there = onDisk("use", output, () => fs.statSync(output, { throwIfNoEntry: false }));
    // A link stays one, and its target is what is replaced.
    const file = there?.isFile() ? onDisk("use", output, () => fs.realpathSync(output)) : output;
    this.#output = file;
    if (there?.isDirectory()) throw occupied(file, "it is a directory");
    // A device or a pipe must be written to, not replaced.
    if (there === undefined || there.isFile()) this.#staged = join(dirname(file), stagingName(basename(file)));
    onDisk("write", file, () => {
      if (this.#staged) sweep(dirname(file), stagingPrefix(basename(file)));
      this.#file = this.#staged ? lockNew(this.#staged) : Deno.openSync(file, { write: true });
    });
  }

  async receive(bytes: AsyncIterable<Uint8Array>): Promise<Received> {
    const output = this.#output;
    if (typeof output !== "string") {
      await ReadableStream.from(bytes).pipeTo(output, { preventClose: true }).catch((error) => {
        throw diskError("write", "stdout", error);
      });
      return { files: [], skipped: [] };
    }
    for await (const chunk of bytes) onDisk("write", output, () => this.#file && writeAll(this.#file, chunk));
    const staged = this.#staged;
    if (staged !== undefined) onDisk("publish", output, () => fs.renameSync(staged, output));
    return { files: [], skipped: [] };
  }

  [Symbol.dispose](): void {
    const staged = this.#staged;
    if (staged !== undefined) onDisk("remove", staged, () => fs.rmSync(staged, { force: true }));
    this.#file?.close();
  }
}

/** Hidden, so that nobody takes it for a wheel. */
function stagingName(name: string): string {
  return `${stagingPrefix(name)}${process.pid}-${crypto.randomUUID().slice(0, 8)}`;
}

function stagingPrefix(name: string): string {
  return `.${name}${name && "."}fetch_wheels-`;
}

function occupied(path: string, state: string): FetchWheelsError {
  return new FetchWheelsError("io", `Cannot write ${quote(path)}: ${state}`);
}

function onDisk<T>(action: string, path: string, body: () => T): T {
  try {
    return body();
  } catch (error) {
    throw diskError(action, path, error);
  }
}

function diskError(action: string, path: string, error: unknown): unknown {
  const { code, message } = error as NodeJS.ErrnoException;
  if (error instanceof FetchWheelsError || error instanceof Deno.errors.NotCapable || code === undefined) return error;
  const state = DISK_STATES[code] ?? message;
  return new FetchWheelsError("io", `Cannot ${action} ${quote(path)}: ${state}`, { cause: error });
}

const DISK_STATES: Record<string, string> = {
  ENOSPC: "no space is left on the disk",
  EDQUOT: "the disk quota is used up",
  EACCES: "permission denied",
  EPERM: "permission denied",
  EROFS: "the file system is read-only",
  EISDIR: "it is a directory",
  ENOTDIR: "a part of its path is no directory",
  ENOENT: "no such file or directory",
  EEXIST: "it is there already",
  EPIPE: "its reader has gone away",
  ENAMETOOLONG: "the name is too long",
};

// ---------------------------------------------------------------------------------------------------------------------
// 9 Sources: the same bytes from a registry, a URL, a file, an OCI layout or an archive.
// ---------------------------------------------------------------------------------------------------------------------

/** What a source's text means. */
type Source =
  | { kind: "image"; image: ImageReference }
  | { kind: "url"; url: URL }
  | { kind: "file"; path: string }
  | { kind: "oci" | "oci-archive" | "docker-archive"; text: string; path: string; tag?: string };

function parseSource(text: string): Source {
  if (/^https?:\/\//i.test(text)) {
    if (!URL.canParse(text)) throw usage("parse URL", withoutSecrets(text.split("?")[0] ?? ""), "it is none");
    return { kind: "url", url: new URL(text) };
  }
  if (/^\.{0,2}\//.test(text)) return { kind: "file", path: text };
  const [, kind, path, tag] = /^(oci|oci-archive|docker-archive):(.+?)(?::([^/:]+))?$/s.exec(text) ?? [];
  if (kind === "docker-archive") return { kind, text, path: text.slice(kind.length + 1) };
  if (path !== undefined && (kind === "oci" || kind === "oci-archive")) return { kind, text, path, tag };
  return { kind: "image", image: parseImageReference(text) };
}

/** Bytes on their way, and all that is known about them. */
interface OpenedSource extends Pick<FetchResult, "image" | "platform" | "manifest" | "layer"> {
  bytes: AsyncIterable<Uint8Array>;
}

async function openSource(source: Source, settings: Settings): Promise<OpenedSource> {
  switch (source.kind) {
    case "image":
      return await openImage(source.image, settings);
    case "url":
      return { ...NO_IMAGE, bytes: await openUrl(source.url, settings) };
    case "file":
      return { ...NO_IMAGE, bytes: openFile(source.path) };
    default:
      return await openLayout(source, settings);
  }
}

const NO_IMAGE = { image: null, platform: null, manifest: null, layer: null };

async function openImage(image: ImageReference, settings: Settings): Promise<OpenedSource> {
  const registries = openRegistries(image, settings);
  const { manifest, platform, layer, info } = await resolveLayer(image, registries, settings);
  const fetchFrom = (at: number) => blobBytes(layer, { registries, settings, at });
  const { registry: host, repository, tag = null, digest = null } = image;
  return {
    image: { registry: host, repository, tag, digest },
    platform,
    manifest: { digest: manifest.digest, mediaType: manifest.mediaType },
    layer: info,
    bytes: settings.cache === undefined ? verified(fetchFrom(0), layer) : throughCache(layer, { settings, fetchFrom }),
  };
}

/** The same for every image, wherever it lies: from its name to the layer that is wanted. */
async function resolveLayer(image: ImageReference, registries: Registry[], settings: Settings) {
  const { manifest, platform } = await resolveManifest(image, registries, settings);
  const { layer, info } = chooseLayer(manifest, formatReference(image), settings.layer);
  settings.onProgress({ type: "resolved", image, layer: info, platform });
  return { manifest, platform, layer, info };
}

/** A file of a layout or an archive, by its path in there. */
type Shelf = (name: string) => AsyncIterable<Uint8Array>;

/** An image that lies on the disk answers as a registry does, so that the same code resolves and verifies it. */
async function openLayout(
  { kind, text, path, tag }: Extract<Source, { text: string }>,
  settings: Settings,
): Promise<OpenedSource> {
  const isDirectory = kind === "oci";
  if (fs.statSync(path, { throwIfNoEntry: false })?.isDirectory() !== isDirectory) {
    const state = fs.existsSync(path) ? `it is ${isDirectory ? "no" : "a"} directory` : "there is no such file";
    throw new FetchWheelsError("not-found", `Cannot read ${quote(text)}: ${state}`);
  }
  const shelf = isDirectory ? (name: string) => openFile(join(path, name)) : archiveShelf(path);
  const answer = kind === "docker-archive" ? await dockerAnswers(shelf, text) : ociAnswers(shelf, { text, tag });
  const get = async (asked: string): Promise<Exchange> => {
    const url = new URL("file:///");
    return {
      response: new Response(ReadableStream.from(await answer(asked))),
      url,
      asked: url,
      controller: new AbortController(),
    };
  };
  const image = { registry: text, repository: "" };
  const registry: Registry = { isMirror: false, isDown: false, get };
  const { manifest, platform, layer, info } = await resolveLayer(image, [registry], settings);
  const { digest, mediaType } = manifest;
  const bytes = verified(await answer(`blobs/${layer.digest}`), layer);
  return {
    ...NO_IMAGE,
    platform,
    manifest: kind === "docker-archive" ? null : { digest, mediaType },
    layer: info,
    bytes,
  };
}

/** Reads an archive up to the file that is wanted. Members that are links lead on, as `docker save` makes them. */
function archiveShelf(path: string): Shelf {
  return async function* shelf(name: string, links = 0): AsyncGenerator<Uint8Array> {
    if (links > MAX_LINKS) throw integrity("read", path, `${quote(name)} is a link that leads to itself`);
    for await (const member of new TarReader(decompress(openFile(path), path), path).members()) {
      if (posix.normalize(member.name) !== name) continue;
      if (member.linkname === "") return yield* bodyOf(member);
      const base = member.type === "symbolic link" ? posix.dirname(name) : ".";
      return yield* shelf(posix.join(base, member.linkname), links + 1);
    }
    throw new FetchWheelsError("not-found", `Cannot read ${quote(path)}: it holds no ${quote(name)}`);
  };
}

/** OCI image layout: `index.json` leads to `blobs/<algorithm>/<hex>`. */
function ociAnswers(
  shelf: Shelf,
  { text, tag }: { text: string; tag: string | undefined },
): (asked: string) => Promise<AsyncIterable<Uint8Array>> {
  return async (asked) => {
    const digest = asked.slice(asked.indexOf("/") + 1);
    if (DIGEST.test(digest)) return shelf(`blobs/${digest.replace(":", "/")}`);
    const index = parseJson(await gather(shelf("index.json"), MAX_MANIFEST_BYTES));
    const entries: Descriptor[] = Array.isArray(index?.manifests) ? index.manifests : [];
    const nameOf = (entry: Descriptor) => entry?.annotations?.["org.opencontainers.image.ref.name"];
    const names = new Set(entries.map(nameOf).filter((name) => name !== undefined));
    const chosen = tag === undefined ? entries : entries.filter((entry) => nameOf(entry) === tag);
    if (chosen.length > 0 && (tag !== undefined || names.size < 2)) return jsonBytes({ manifests: chosen });
    const list = names.size === 0 ? "it names no tags" : `it has the tags ${[...names].join(", ")}`;
    const hint = tag === undefined ? "add one of them, after a colon" : undefined;
    throw new FetchWheelsError("not-found", `Cannot choose an image in ${quote(text)}: ${list}`, { hint });
  };
}

/** `docker save`: `manifest.json` names a configuration, which holds the digests of the layers, and their files. */
async function dockerAnswers(
  shelf: Shelf,
  text: string,
): Promise<(asked: string) => Promise<AsyncIterable<Uint8Array>>> {
  const fail = (state: string) => integrity("read", text, state);
  const images = parseValue(await gather(shelf("manifest.json"), MAX_MANIFEST_BYTES));
  if (!Array.isArray(images)) throw fail("its manifest.json is no list");
  if (images.length !== 1) {
    throw new FetchWheelsError("not-found", `Cannot choose in ${quote(text)}: it holds ${images.length} images`);
  }
  const { Config: name, Layers: files } = images[0] ?? {};
  const body = await gather(shelf(String(name)), MAX_MANIFEST_BYTES) ?? new Uint8Array();
  const named = /[0-9a-f]{64}/.exec(String(name))?.[0];
  if (named !== undefined && digestOf(body, "sha256:") !== `sha256:${named}`) {
    throw fail("its configuration has another digest");
  }
  const config = parseJson(body);
  const digests: unknown = config?.rootfs?.diff_ids;
  if (!Array.isArray(digests) || !Array.isArray(files) || digests.length !== files.length) {
    throw fail("its layers are not those of its configuration");
  }
  const manifest = { mediaType: MANIFEST_TYPES[0], layers: digests.map((digest) => ({ digest })) };
  const digest = digestOf(Buffer.from(JSON.stringify(manifest)), "sha256:");
  const { os, architecture, variant } = config ?? {};
  const top = { mediaType: INDEX_TYPES[0], manifests: [{ digest, platform: { os, architecture, variant } }] };
  return (asked) => {
    const reference = asked.slice(asked.indexOf("/") + 1);
    if (asked.startsWith("blobs/")) return Promise.resolve(shelf(String(files[digests.indexOf(reference)])));
    return Promise.resolve(jsonBytes(reference === digest ? manifest : top));
  };
}

function jsonBytes(value: unknown): AsyncIterable<Uint8Array> {
  return ReadableStream.from([new TextEncoder().encode(JSON.stringify(value))]);
}

async function openUrl(url: URL, settings: Settings): Promise<AsyncIterable<Uint8Array>> {
  const { username, password } = decodedUser(url);
  const headers: Record<string, string> = username === "" ? {} : { authorization: basic({ username, password }) };
  const exchange = await request([withoutUser(url)], headers, { settings });
  if (!exchange.response.ok) {
    throw statusError("fetch", displayUrl(url), { exchange, body: await readError(exchange, settings) });
  }
  return answerBody(exchange, settings);
}

function decodedUser(url: URL): UserCredentials {
  try {
    return { username: decodeURIComponent(url.username), password: decodeURIComponent(url.password) };
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    throw usage("use URL", displayUrl(url), "its user name or password is not encoded well");
  }
}

function openFile(path: string): AsyncIterable<Uint8Array> {
  const stat = onDisk("read", path, () => fs.statSync(path, { throwIfNoEntry: false }));
  if (stat === undefined) throw new FetchWheelsError("not-found", `Cannot read ${quote(path)}: there is no such file`);
  if (stat.isDirectory()) throw new FetchWheelsError("io", `Cannot read ${quote(path)}: it is a directory`);
  return readFile(path);
}

async function* readFile(path: string): AsyncGenerator<Uint8Array> {
  try {
    for await (const chunk of fs.createReadStream(path, { highWaterMark: INFLATED_BYTES })) yield chunk;
  } catch (error) {
    throw diskError("read", path, error);
  }
}

/** Passes bytes on, tells of them, and stops when it is told to. */
async function* watched(bytes: AsyncIterable<Uint8Array>, progress: Progress): AsyncGenerator<Uint8Array> {
  const { settings, total } = progress;
  for await (const chunk of bytes) {
    settings.signal.throwIfAborted();
    progress.received += chunk.length;
    settings.onProgress({ type: "bytes", received: progress.received, total });
    yield chunk;
  }
}

/** How far the source has been read. */
interface Progress {
  received: number;
  total?: number;
  settings: Settings;
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 Command line: options, help, output, exit code. stdout carries data only; all else goes to stderr, line by line.
// ---------------------------------------------------------------------------------------------------------------------

/** The outside world, as far as the command line touches it. */
export interface Io {
  /** Value of an environment variable. */
  env(name: string): string | undefined;
  /** For `--password-stdin`. */
  stdin: ReadableStream<Uint8Array>;
  /** For data: help, version, the tarball. */
  stdout: WritableStream<Uint8Array>;
  /** For everything else, in whole lines. */
  stderr(text: string): void;
  /** As in `FetchWheelsOptions`. */
  workerUrl?: string;
  /** Width of the terminal that stderr is, asked for each time it is needed; undefined where it is none. */
  columns?(): number | undefined;
  /** Stops everything; its reason may be a `FetchWheelsError` that says why. */
  signal?: AbortSignal;
}

/**
 * The command line.
 *
 * @param args Arguments, without the program's name
 * @param io The outside world
 * @returns Exit code
 */
export async function main(args: string[], io: Io): Promise<number> {
  const bar = new ProgressBar(args.includes("--no-progress") ? { ...io, columns: () => undefined } : io);
  const log = (text: string) => {
    bar.clear();
    io.stderr(`fetch_wheels: ${oneLine(text)}\n`);
  };
  let [isVerbose, isJson] = [args.includes("-v") || args.includes("--verbose"), args.includes("--json")];
  try {
    const { source, options, print } = readCommandLine(args, io);
    if (print !== undefined) {
      await writeText(io.stdout, print);
      return 0;
    }
    [isVerbose, isJson] = [options.verbose === true, options.json === true];
    const result = await runFetch(source, { options, io, log, bar });
    if (isJson) await writeText(io.stdout, `${JSON.stringify(result, null, 2)}\n`);
    return 0;
  } catch (error) {
    bar.clear();
    if (error === PIPE_CLOSED) return 0; // whoever read the list has seen enough
    const { kind, message, hint } = describeError(error);
    log(message);
    if (hint !== null) log(`hint: ${hint}`);
    if (isVerbose) traceOf(explain(error)).forEach(log);
    if (isJson) await writeText(io.stdout, `${JSON.stringify({ error: { kind, message, hint } }, null, 2)}\n`);
    return EXIT_CODES[kind];
  }
}

const PIPE_CLOSED = new DOMException("the pipe is closed", "AbortError");

function isPipeClosed(error: unknown): boolean {
  return error instanceof FetchWheelsError && (error.cause as NodeJS.ErrnoException).code === "EPIPE";
}

async function runFetch(
  source: string | undefined,
  { options, io, log, bar }: { options: CommandOptions; io: Io; log: (text: string) => void; bar: ProgressBar },
): Promise<FetchResult> {
  const given = await fetchOptions(options, io);
  const text = source ?? (io.env("WHEELS") || readWheelsFile(options.wheelsFile));
  const level = options.quiet ? "quiet" : options.verbose ? "verbose" : "normal";
  const tell = progressLog(log, level);
  const pipe = new AbortController();
  const signal = AbortSignal.any([pipe.signal, ...(io.signal ? [io.signal] : [])]);
  let printed = Promise.resolve();
  const onProgress = (event: ProgressEvent) => {
    if (level !== "quiet" && !options.list) bar.update(event);
    if (event.type !== "member" || options.json) return tell(event);
    const line = `${String(event.size).padStart(12)}  ${oneLine(event.path)}\n`;
    printed = printed.then(() => writeText(io.stdout, line)).catch((error) =>
      pipe.abort(isPipeClosed(error) ? PIPE_CLOSED : error)
    );
  };
  const result = await fetchWheels(text, { ...given, workerUrl: io.workerUrl, signal, onProgress });
  await printed;
  pipe.signal.throwIfAborted();
  bar.clear();
  const isRemembered = result.dest !== null || result.output !== null;
  if (isRemembered && (source !== undefined || io.env("WHEELS"))) rememberSource(text, options.wheelsFile, log);
  if (level !== "quiet") describeResult(result, level).forEach(log);
  return result;
}

/** An error as it is told, on stderr and by `--json`. */
function describeError(thrown: unknown): { kind: ErrorKind; message: string; hint: string | null } {
  const error = explain(thrown);
  if (error instanceof FetchWheelsError) {
    const help = error.kind === "usage" ? "fetch_wheels --help lists the options" : null;
    return { kind: error.kind, message: error.message, hint: error.hint ?? help };
  }
  const words = withoutSecrets(error instanceof Error ? error.message.split("\n")[0] ?? "" : String(error));
  const hint = "this is a fault of fetch_wheels; --verbose shows where";
  return { kind: "internal", message: `Cannot go on: ${words}`, hint };
}

/** The whole chain of an error's causes, for `--verbose`. */
function traceOf(error: unknown): string[] {
  if (!(error instanceof Error)) return [];
  return [...withoutSecrets(error.stack ?? error.message).split("\n"), ...traceOf(error.cause)];
}

/** What others say in their errors may hold a URL with a password or a signature. */
function withoutSecrets(text: string): string {
  return text.replace(/(https?:\/\/)[^\s/]*@/gi, "$1").replace(/(https?:\/\/[^\s?"]*)\?[^\s")]*/gi, "$1?…");
}

/** The options as commander leaves them: the module's own, and what only a command line has. */
interface CommandOptions extends Omit<FetchWheelsOptions, "output" | "mirrors"> {
  output?: string;
  mirror: string[];
  passwordStdin?: boolean;
  json?: boolean;
  wheelsFile: string;
  quiet?: boolean;
  verbose?: boolean;
}

interface CommandLine {
  source?: string;
  options: CommandOptions;
  /** Help or version, to be printed instead of doing anything. */
  print?: string;
}

const HELP_AFTER = `
SOURCE is an image (loci/requirements:master-ubuntu_jammy,
registry:5000/ns/name@sha256:...), an http(s):// URL of a tarball, a path that
begins with /, ./ or ../, or, without a network, oci:DIR[:TAG],
oci-archive:FILE[:TAG] or docker-archive:FILE. Without one, $WHEELS counts;
without that, the first line of the wheels file.
REGISTRY_USERNAME and REGISTRY_PASSWORD give credentials; without them, those
of docker login and podman login count. HTTPS_PROXY and NO_PROXY are honoured.

Examples:
  fetch_wheels -d wheels loci/requirements:master-ubuntu_jammy
  fetch_wheels --ca-file ca.pem -d wheels registry.lan:5000/ns/wheels:1.0
  fetch_wheels -o - registry.lan:5000/ns/wheels:1.0 | tar tz

Exit codes: 0 done, 1 a bug, 2 usage, 3 not found, 4 credentials, 5 network,
6 integrity, 7 unsafe archive, 8 disk, 130 SIGINT, 143 SIGTERM`;

function wholeNumber(text: string): number {
  if (!/^\d{1,6}$/.test(text)) throw new InvalidArgumentError("It is no whole number.");
  return Number(text);
}

function collect(text: string, before: string[]): string[] {
  return [...before, text];
}

function truth(text: string): boolean {
  return /^(?:yes|true|t|1)$/i.test(text);
}

/** An option with the environment variable that stands for it, and how to read that. */
interface OptionRow {
  option: Option;
  env?: string;
  read?: (text: string) => unknown;
}

/** The options in their groups. Made anew for each command line, for commander keeps what it reads in them. */
function optionGroups(): Record<string, OptionRow[]> {
  const option = (flags: string, description: string) => new Option(flags, description);
  const words = (text: string) => text.trim().split(/\s+/);
  return {
    "Source:": [
      { option: option("--platform <os/arch[/variant]>", "choose this from a multi-platform image") },
      { option: option("--layer <which>", "N (1 is the base), last, or a digest").default("last") },
      { option: option("--wheels-file <file>", "where the source is remembered").default(DEFAULT_WHEELS_FILE) },
    ],
    "Destination:": [
      { option: option("-d, --dest <dir>", "extract here").default(DEFAULT_DEST), env: "WHEELS_DIR" },
      { option: option("-o, --output <file>", "write the tarball as it is; - is stdout"), env: "WHEELS_DEST" },
      { option: option("--include <glob>", "extract only these (repeatable)").argParser(collect).default([], "all") },
      {
        option: option("--exclude <glob>", "leave these out, besides .* (repeatable)").argParser(collect).default(
          [],
          "none",
        ),
      },
      { option: option("--strip-components <n>", "drop so many leading components").argParser(wholeNumber).default(0) },
      { option: option("--clean", "replace DEST instead of adding to it") },
      { option: option("--unpin <name>", "drop NAME===... from upper-constraints.txt"), env: "PROJECT" },
    ],
    "Registry:": [
      { option: option("--username <name>", "user name for the registry"), env: "REGISTRY_USERNAME" },
      { option: option("--password-stdin", "read its password from stdin") },
      {
        option: option("--protocol <name>", "how to speak to it").choices(["http", "https", "detect"]).default(
          "detect",
        ),
        env: "REGISTRY_PROTOCOL",
      },
      { option: option("--ca-file <pem>", "trust these certificates, too"), env: "REGISTRY_CA_FILE" },
      { option: option("--insecure", "accept any certificate"), env: "REGISTRY_INSECURE", read: truth },
    ],
    "Network:": [
      {
        option: option("--mirror <url>", "ask here first (repeatable)").argParser(collect).default([], "none"),
        env: "REGISTRY_MIRROR",
        read: words,
      },
      { option: option("--cache <dir>", "keep and reuse layers by digest"), env: "FETCH_WHEELS_CACHE" },
      {
        option: option("--connections <n>", "fetch a large layer over so many").argParser(wholeNumber)
          .default(DEFAULT_CONNECTIONS),
      },
      {
        option: option("--retries <n>", "tries after a failure that may pass").argParser(wholeNumber).default(
          DEFAULT_RETRIES,
        ),
      },
      {
        option: option("--timeout <seconds>", "wait so long for a byte").argParser(wholeNumber).default(
          DEFAULT_TIMEOUT,
        ),
      },
    ],
    "Output:": [
      { option: option("--list", "print sizes and paths; extract nothing") },
      { option: option("--dry-run", "resolve; fetch no layer") },
      { option: option("--json", "print one JSON document") },
      { option: option("--no-progress", "no progress bar on a terminal") },
      { option: option("-q, --quiet", "say nothing but errors") },
      { option: option("-v, --verbose", "tell of each request") },
    ],
  };
}

function readCommandLine(args: string[], io: Io): CommandLine {
  let print: string | undefined;
  const command = new Command("fetch_wheels")
    .usage("[OPTIONS] [SOURCE]")
    .description("Fetches the final layer of a container image and leaves its wheels in a directory.")
    .argument("[source]", "image, URL or path")
    .version(`fetch_wheels ${VERSION}`, "-V, --version", "print the version")
    .helpOption("-h, --help", "print this help")
    .addHelpText("after", HELP_AFTER)
    .exitOverride()
    .configureOutput({ writeOut: (text) => print = (print ?? "") + text, writeErr: () => {}, ...PLAIN_OUTPUT });
  const groups = Object.entries(optionGroups());
  for (const [heading, rows] of groups) {
    for (const { option, env } of rows) {
      if (env !== undefined) option.description += ` ($${env})`;
      command.addOption(option.helpGroup(heading));
    }
  }
  try {
    command.parse(args, { from: "user" });
    for (const { option, env, read = (text: string) => text } of groups.flatMap(([, rows]) => rows)) {
      const text = env === undefined ? undefined : io.env(env);
      if (!text || command.getOptionValueSource(option.attributeName()) === "cli") continue;
      if (option.argChoices && !option.argChoices.includes(text)) {
        throw usage(`use ${env}`, text, `it is none of ${option.argChoices.join(", ")}`);
      }
      command.setOptionValueWithSource(option.attributeName(), read(text), "env");
    }
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.exitCode === 0) return { options: command.opts(), print };
    const [message = "", ...more] = error.message.replace(/^error: |(?<= but got \d+): .*/g, "").replaceAll("'", '"')
      .split("\n");
    throw new FetchWheelsError("usage", `Cannot read the command line: ${message.replace(/\.$/, "")}`, {
      hint: more.join(" ").replace(/[()]/g, "") || undefined,
    });
  }
  const options = command.opts<CommandOptions>();
  const [dest, output] = ["dest", "output"].map((name) => command.getOptionValueSource(name));
  if (dest === "cli" && output === "cli") {
    throw new FetchWheelsError("usage", 'Cannot use "--dest" with "--output": one of them says where the layer goes');
  }
  if (dest === "cli") options.output = undefined;
  if (options.json && options.output === "-") {
    throw new FetchWheelsError("usage", 'Cannot use "--json" with "--output -": stdout takes one of them');
  }
  if (options.dest === "") throw usage("use", "--dest", "its value is empty");
  if (options.output === "") throw usage("use", "--output", "its value is empty");
  return { source: command.args[0], options };
}

const PLAIN_OUTPUT = {
  getOutHelpWidth: () => 80,
  getErrHelpWidth: () => 80,
  getOutHasColors: () => false,
  getErrHasColors: () => false,
};

/** The options have the module's names already; what is left is what the command line says in another way. */
async function fetchOptions(options: CommandOptions, io: Io): Promise<FetchWheelsOptions> {
  const { output, passwordStdin, username, mirror: mirrors } = options;
  const password = passwordStdin ? await readPassword(io.stdin) : io.env("REGISTRY_PASSWORD") || undefined;
  if (passwordStdin && !username) throw usage("use", "--password-stdin", "the user name is missing", PASSWORD_HINT);
  const isStdout = output === "-" || output === "/dev/stdout";
  return { ...options, mirrors, password, authFiles: authFiles(io), output: isStdout ? io.stdout : output };
}

function authFiles(io: Io): string[] {
  const home = io.env("HOME");
  const docker = io.env("DOCKER_CONFIG") || (home && join(home, ".docker"));
  return [io.env("REGISTRY_AUTH_FILE"), docker && join(docker, "config.json")].filter((file) => !!file) as string[];
}

/** Everything but the line's end: blanks may be part of a password. */
async function readPassword(stdin: ReadableStream<Uint8Array>): Promise<string> {
  return (await new Response(stdin as ReadableStream<Uint8Array<ArrayBuffer>>).text()).replace(/\r?\n$/, "");
}

function readWheelsFile(file: string): string {
  const hint = "give SOURCE, or set WHEELS; fetch_wheels --help tells more";
  const isThere = onDisk("read", file, () => fs.existsSync(file));
  if (!isThere) throw new FetchWheelsError("usage", `Cannot start: there is no source, and no ${file}`, { hint });
  const line = onDisk("read", file, () => fs.readFileSync(file, "utf8")).split("\n")[0]?.trim();
  if (!line) throw new FetchWheelsError("usage", `Cannot start: there is no source in ${file}`, { hint });
  return line;
}

/** As LOCI does, for the next step of the build. The wheels are there already, so a failure is no more than a warning. */
function rememberSource(source: string, file: string, log: (text: string) => void): void {
  try {
    if (fs.existsSync(dirname(file))) fs.writeFileSync(file, `${source}\n`);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return; // the flags that deno was given say that it is not wanted
    const shown = diskError("write", file, error) as Error;
    log(`warning: ${shown.message.split("\n")[0]}; the source is not remembered`);
  }
}

function progressLog(
  log: (text: string) => void,
  level: "quiet" | "normal" | "verbose",
): (event: ProgressEvent) => void {
  return (event) => {
    if (event.type === "warning") return log(`warning: ${event.message}`);
    if (level === "quiet") return;
    switch (event.type) {
      case "request":
        return level === "verbose" ? log(`${event.url} answered ${event.status}`) : undefined;
      case "retry":
        return log(`${event.reason}; trying again in ${(event.delayMs / 1000).toFixed(1)} s`);
      case "resolved": {
        const { image, layer, platform } = event;
        const size = layer.size === null ? "" : `, ${formatBytes(layer.size)}`;
        const where = platform === null ? "" : ` for ${platform}`;
        return log(`${formatReference(image)}${where}: layer ${layer.index} of ${layer.count}, ${layer.digest}${size}`);
      }
      case "cached":
        return log(`${event.digest}, ${formatBytes(event.size)}, comes from the cache`);
      case "bytes":
      case "extracted":
      case "member":
        return;
    }
  };
}

/** One line on a terminal that is drawn again and again, and gone when something else is said. */
class ProgressBar {
  readonly #io: Pick<Io, "columns" | "stderr">;
  readonly #started = performance.now();
  #received = 0;
  #total: number | undefined;
  #members = 0;
  #drawn = -Infinity;
  #isShown = false;

  constructor(io: Pick<Io, "columns" | "stderr">) {
    this.#io = io;
  }

  update(event: ProgressEvent): void {
    if (event.type === "bytes") [this.#received, this.#total] = [event.received, event.total];
    else if (event.type === "extracted") this.#members = event.members;
    else return;
    const [columns, now] = [this.#io.columns?.(), performance.now()];
    if (columns === undefined || now - this.#drawn < REDRAW_MS) return;
    [this.#drawn, this.#isShown] = [now, true];
    // Not into the last column: there, some terminals begin a new line.
    this.#io.stderr(`\r${this.#line(now).slice(0, Math.max(0, columns - 1))}\x1b[K`);
  }

  #line(now: number): string {
    const speed = this.#received / Math.max(1, now - this.#started) * 1000;
    const total = this.#total ?? 0;
    const share = total > 0 ? `${Math.floor(100 * this.#received / total)} %`.padStart(5) : "";
    const size = `${formatBytes(this.#received)}${total > 0 ? ` of ${formatBytes(total)}` : ""}`;
    const left = total > 0 && speed > 0 ? `, ${Math.ceil((total - this.#received) / speed)} s left` : "";
    return `fetch_wheels: ${share} ${size}, ${formatBytes(speed)}/s${left}, ${this.#members} members`;
  }

  clear(): void {
    if (this.#isShown) this.#io.stderr("\r\x1b[K");
    this.#isShown = false;
  }
}

function describeResult(result: FetchResult, level: "normal" | "verbose"): string[] {
  const { files, skipped, dest, output, bytes, seconds, layer } = result;
  const named = level === "verbose" ? skipped : skipped.filter(({ reason }) => reason.startsWith("it is a "));
  const lines = named.map(({ path, reason }) => `left out ${quote(path)}: ${reason}`);
  const wheels = files.filter(({ path }) => path.endsWith(".whl")).length;
  const count = (number: number, noun: string) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const what = dest === null
    ? "the tarball"
    : `${count(wheels, "wheel")}, ${count(files.length - wheels, "other file")}`;
  if (dest === null && output === null) return lines;
  const where = dest ?? (output === "-" ? "stdout" : output);
  const origin = layer === null ? "" : ` from ${layer.digest}`;
  return [...lines, `${what}, ${formatBytes(bytes)} in ${seconds.toFixed(1)} s, to ${where}${origin}`];
}

function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** power).toFixed(power === 0 ? 0 : 1)} ${units[power]}`;
}

async function writeText(stream: WritableStream<Uint8Array>, text: string): Promise<void> {
  const writer = stream.getWriter();
  await writer.write(new TextEncoder().encode(text)).catch((error) => {
    throw diskError("write", "stdout", error);
  });
  writer.releaseLock();
}

function sayOnStderr(text: string): void {
  try {
    Deno.stderr.writeSync(new TextEncoder().encode(text));
  } catch {
    // nobody listens, or a full disk takes the log: no reason to fail where the wheels are right
  }
}

if (isWorker()) {
  await serveExtraction();
} else if (import.meta.main) {
  const controller = new AbortController();
  const stop = (kind: "interrupted" | "terminated", name: Deno.Signal) => {
    const abort = () => {
      if (controller.signal.aborted) Deno.exit(EXIT_CODES[kind]);
      controller.abort(new FetchWheelsError(kind, `Cannot go on: ${name} came`));
      Deno.unrefTimer(setTimeout(() => Deno.exit(EXIT_CODES[kind]), SHUTDOWN_MS));
    };
    Deno.addSignalListener(name, abort);
    return { [Symbol.dispose]: () => Deno.removeSignalListener(name, abort) };
  };
  using _interrupt = stop("interrupted", "SIGINT");
  using _terminate = stop("terminated", "SIGTERM");
  using _hangUp = stop("terminated", "SIGHUP");
  Deno.exitCode = await main(Deno.args, {
    env: (name) => Deno.env.get(name),
    stdin: Deno.stdin.readable,
    stdout: Deno.stdout.writable,
    stderr: sayOnStderr,
    columns: () => Deno.stderr.isTerminal() ? Deno.consoleSize().columns : undefined,
    workerUrl: import.meta.url,
    signal: controller.signal,
  });
}
