#!/usr/bin/env -S deno run --allow-net --allow-read --allow-write --allow-env=WHEELS*,PROJECT,REGISTRY_*,FETCH_WHEELS_*,DOCKER_*,XDG_*,SSL_CERT_FILE,HOME,PATH,TERM,HTTPS_PROXY,HTTP_PROXY,ALL_PROXY,NO_PROXY,https_proxy,http_proxy,all_proxy,no_proxy
/**
 * Downloads the final layer of a container image straight from its registry, verifies every byte, and leaves the Python
 * wheels in a directory, all or nothing, ready for `pip install --no-index --find-links`.
 *
 * On a command line:
 *
 * ```sh
 * deno run -P fetch_wheels.ts -d wheels loci/requirements:master-ubuntu_jammy
 * ```
 *
 * In a program:
 *
 * ```ts ignore
 * import { fetchWheels } from "./fetch_wheels.ts";
 *
 * const { files, layers } = await fetchWheels("registry.example/ns/wheels:1.0", { dest: "wheels" });
 * console.log(`${files.length} files from ${layers[0]?.digest}`);
 * ```
 *
 * Contents, in the order of the data:
 *
 *      fetchWheels()  the whole story on one page
 *  0   Helpers        errors, text that is safe to print, JSON, files, permissions
 *  1   Reference      text to {registry, repository, tag, digest}; platforms
 *  2   Credentials    where a user name and password, or an identity token, come from
 *  3   HTTP           one request: proxy, TLS, timeout, retry, redirects
 *  4   Registry       challenge to Authorization; manifests; blobs, resumed and in ranges
 *  5   Stores         the same answers from a mirror, a cache, an OCI layout, an archive
 *  6   Manifest       reference to index to manifest to what is to be fetched; signatures
 *  7   Bytes          verified, decompressed
 *  8   Archive        the tar reader; members made safe, selected
 *  9   Extract        members into the staging tree; the worker; wheels
 * 10   Publish        staging directory, locks, DEST; the tarball as it is
 * 11   Command line   options, help, progress, output, exit code
 *
 * @module
 */

import { Buffer } from "node:buffer";
import * as crypto from "node:crypto";
import * as fs from "node:fs";
import type { ClientRequestArgs, IncomingMessage } from "node:http";
import type { Agent } from "node:https";
import * as net from "node:net";
import { basename, dirname, join, posix, resolve as resolvePath } from "node:path";
import process from "node:process";
import { setImmediate as nextTask, setTimeout as sleep } from "node:timers/promises";
import type { ConnectionOptions, TLSSocket } from "node:tls";
import { Command, CommanderError, Option } from "npm:commander@^15.1.0";
import { Gunzip, ZstdDecompress } from "npm:minizlib@^3.1.0";

const VERSION = "0.2.0";
const MIN_DENO = "2.9.2"; // older ones lack file locks, or lose connections that are resumed

const DEFAULT_DEST = "/tmp/wheels";
const DEFAULT_WHEELS_FILE = "/opt/loci/wheels";
const DEFAULT_RETRIES = 5;
const MAX_RETRIES = 1000;
const DEFAULT_TIMEOUT = 30; // seconds without a byte after which a connection is given up
const MAX_TIMEOUT = 86_400;
const DEFAULT_CONNECTIONS = 4;
const MAX_CONNECTIONS = 16;

const FIRST_DELAY_MS = 500; // doubled for each further delay, which is random below it (full jitter)
const MAX_DELAY_MS = 30_000;
const MAX_RETRY_AFTER_MS = 60_000; // a build that would wait longer fails at once and says why
const TOTAL_RETRIES_FACTOR = 20; // bounds the failures of a whole download, as a multiple of the retries
const RETRY_REPORT_MS = 1000; // retries of several connections within this time are reported once
const DOCUMENT_TIMEOUT_FACTOR = 4; // a small document may take this many times the timeout in all
const MAX_REDIRECTS = 10;
const MAX_CHALLENGES = 10; // that are answered for one request, which may be redirected each time

const MAX_MANIFEST_BYTES = 4 * 1024 * 1024; // the distribution specification lets registries refuse larger ones
const MAX_TOKEN_BYTES = 1024 * 1024;
const MAX_JSON_DEPTH = 100;
const MAX_ERROR_BYTES = 64 * 1024; // of the body of an error response
const MAX_WORDS = 4096; // characters of a server's error that are searched for secrets
const MAX_SHOWN = 300; // characters of a name in a message
const MAX_LISTED = 50; // names in a message
const MAX_PAGES = 100; // of a list of referrers
const MAX_REFERRERS = 10_000;
const MAX_SIGNATURES = 10; // of one bundle: cosign writes one, and to verify thousands would take minutes
const MAX_INDEX_DEPTH = 5;
const DEFAULT_TOKEN_SECONDS = 60; // of a token whose answer does not say, by the token specification
const MAX_LINKS = 40; // as in Linux: a path through more symbolic links is a loop

const READ_BYTES = 512 * 1024; // larger buffers cost page faults, smaller ones cost calls
const RANGE_BYTES = 3 * 1024 * 1024; // memory is bounded by this times the ranges, which are MAX_WAITING for a connection
const MAX_WAITING = 2;
const PARALLEL_BYTES = 16 * 1024 * 1024; // below this, a second connection costs more than it brings
const PREFETCH_BYTES = 16 * 1024 * 1024; // of the next layer, while the previous one is extracted
const SAMPLE_MS = 100; // over which the rate of a download is measured
const JUDGED_SAMPLES = 3; // after which more connections may be given up
const PAUSE_MS = 5000; // after which they are tried again
const MAX_SAMPLES = 10; // of one measurement
const MAX_SETTLING_SAMPLES = 8; // that more connections have to deliver their first bytes
const FAST_BYTES_PER_SECOND = 100e6; // such a connection keeps verification and extraction busy
const WORTHWHILE_GAIN = 1.25; // more connections must raise the total rate by this factor, or they are given up

const INFLATED_BYTES = 256 * 1024; // the decoder's output buffers, and reads from a disk
const DEFLATED_BYTES = 64 * 1024; // the decoder's input, all of which it decodes at once
const DENSE_BYTES = 16 * 1024; // the same of data that inflates to many times its size: a thousand times is possible
const DENSE_FACTOR = 16;
const SAMPLE_BYTES = 128 * 1024; // at the beginning of a layer, which show how much it inflates
const TAR_BLOCK_BYTES = 512;
const MAX_EXTENSION_BYTES = 1024 * 1024; // of an extension header, with names and attributes; as in Go
const MAX_PATH = 4096; // characters; PATH_MAX of Linux
const MAX_COMPONENTS = 255; // of a path: Deno takes seconds to make a thousand nested directories
const MAX_NAME_BYTES = 4 * MAX_PATH; // of a name, which are decoded for each member; more than MAX_PATH characters
const MAX_MTIME_SECONDS = 2 ** 34; // limit of a file's time; the kernel lowers it to what the file system can hold

const WORKER_BYTES = 24 * 1024 * 1024; // below this, a second thread takes longer to start than it saves
const WORKER_NAME = "fetch_wheels extraction";
const MAX_PENDING_BYTES = 4 * 1024 * 1024; // that the worker has not taken yet; bounds the memory between the threads
const TEXT_FACTOR = 2; // of what inflates to more, decoding is the larger part of the work

const LOCK_NAME = "lock";
const JOURNAL_NAME = "journal";
const STAGING_NAME = /^\.(?:.*\.)?fetch_wheels-\d+-[0-9a-f]{8}$/s; // of any DEST
const LOCK_POLL_MS = 50;
const YOUNG_MS = 60_000; // a staging directory as young as this may not have its lock yet
const CONSTRAINTS = "upper-constraints.txt";

const MAX_BLOCKING_MS = 50; // for which one task may run before signals and messages are handled
const STDOUT_NAMES = ["-", "/dev/stdout"]; // as an output
const SHUTDOWN_MS = 1500; // for cleaning up after a signal; then the process ends
const REDRAW_MS = 200;
const RATE_MS = 5000; // over which the rate of the progress is measured
const LOG_PROGRESS_MS = 30_000; // in a log, a line of progress each time this has passed

const HUB = "docker.io";
const HUB_NAMES = [HUB, "index.docker.io", "registry.hub.docker.com"];
const HUB_HOST = "registry-1.docker.io";
const HUB_KEY = "https://index.docker.io/v1/"; // in Docker's configuration
const IDENTITY_USER = "<token>"; // stands for an identity token in a credential helper's answer

const OCI = "application/vnd.oci.image";
const DOCKER = "application/vnd.docker";
const INDEX_TYPES = [`${OCI}.index.v1+json`, `${DOCKER}.distribution.manifest.list.v2+json`];
const MANIFEST_TYPES = [`${OCI}.manifest.v1+json`, `${DOCKER}.distribution.manifest.v2+json`];
const SCHEMA1_TYPES = [`${DOCKER}.distribution.manifest.v1+prettyjws`, `${DOCKER}.distribution.manifest.v1+json`];
const CONFIG_TYPES = [`${OCI}.config.v1+json`, `${DOCKER}.container.image.v1+json`];
const TITLE = "org.opencontainers.image.title";

// deno-fmt-ignore
const EXIT_CODES: Record<ErrorKind, number> = {
  internal: 1, usage: 2, "not-found": 3, auth: 4, network: 5, integrity: 6, unsafe: 7, io: 8,
  interrupted: 130, terminated: 143,
};

/** The class of a failure; each has its own exit code. */
// deno-fmt-ignore
export type ErrorKind =
  | "internal" | "usage" | "not-found" | "auth" | "network" | "integrity" | "unsafe" | "io"
  | "interrupted" | "terminated";

/** The error that this module throws. Its message is one line, mostly `Cannot <action> "<value>": <cause>`. */
export class FetchWheelsError extends Error {
  /** The class of the failure. */
  readonly kind: ErrorKind;
  /** What the user can do about it, in one line. */
  readonly hint?: string;

  /** Creates an error of a kind with its message and, optionally, a hint and a cause. */
  constructor(kind: ErrorKind, message: string, options: { hint?: string; cause?: unknown } = {}) {
    super(message, { cause: options.cause });
    this.name = "FetchWheelsError";
    this.kind = kind;
    this.hint = options.hint;
  }
}

/** The parts of an image's name. */
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

/** An operating system and a processor architecture, under the names that registries use. */
export interface Platform {
  /** Such as `linux`. */
  os: string;
  /** Such as `amd64` or `arm64`. */
  architecture: string;
  /** Such as `v7`. */
  variant?: string;
}

/** Describes a blob or a manifest (OCI image specification, "Content Descriptors"). */
export interface Descriptor {
  /** Media type of the content. */
  mediaType?: string;
  /** Digest of the content. */
  digest: string;
  /** Size of the content in bytes; schema 1 does not say. */
  size?: number;
  /** In an index: the platform of the image. */
  platform?: Partial<Platform>;
  /** In an index: the type of an artifact. */
  artifactType?: string;
  /** Where else the content can be downloaded, for layers that registries may not distribute. */
  urls?: string[];
  /** Free-form metadata. */
  annotations?: Record<string, string>;
}

/** The parts of Docker's `config.json` and podman's `auth.json` that matter here. */
export interface DockerConfig {
  /** Entries by registry or, in podman's file, by namespace or repository. */
  auths?: Record<string, DockerAuthEntry>;
  /** Name of the helper for all registries. */
  credsStore?: string;
  /** Names of the helpers for single registries. */
  credHelpers?: Record<string, string>;
}

/** One entry of `auths`. */
export interface DockerAuthEntry {
  /** Base64 of `username:password`. */
  auth?: string;
  /** User name, if `auth` is empty. */
  username?: string;
  /** Password, if `auth` is empty. */
  password?: string;
  /** OAuth2 refresh token. */
  identitytoken?: string;
  /** Bearer token for the registry itself. */
  registrytoken?: string;
}

/** A user name and password, an identity token (OAuth2), a ready Bearer token, or the name of a credential helper. */
export type Credentials =
  | { username: string; password: string }
  | { identityToken: string }
  | { registryToken: string }
  | { helper: string };

type UserCredentials = Extract<Credentials, { username: string }>;
type UsableCredentials = Exclude<Credentials, { helper: string }>;

/** One challenge of a `WWW-Authenticate` header. */
export interface Challenge {
  /** Lower case, such as `bearer`. */
  scheme: string;
  /** Parameters by their names in lower case. */
  parameters: Record<string, string>;
  /** The value of a scheme that has no parameters. */
  token68?: string;
}

/** What `fetchWheels` reports while it works, for a log or a progress bar. */
export type ProgressEvent =
  | { type: "request"; method: string; url: string; status: number; bytes?: number; range?: string; ms: number }
  | { type: "retry"; reason: string; delayMs: number; attempt: number; retries: number }
  | { type: "resolved"; image: ImageReference; layers: LayerInfo[]; platform: string | null }
  | { type: "verified"; digest: string; key: string; format: SignatureFormat }
  | { type: "cached"; digest: string; size: number }
  | { type: "bytes"; received: number; total?: number }
  | { type: "extracted"; members: number }
  | { type: "warning"; message: string };

type Report = (event: ProgressEvent) => void;

/** Options of `fetchWheels`; the command line's under the names of the field. */
export interface FetchWheelsOptions {
  /** Directory that receives the files.
   * @default {"/tmp/wheels"} */
  dest?: string;
  /** Write the tarball as it is to this file or stream instead of extracting it. */
  output?: string | WritableStream<Uint8Array>;
  /** Layers to extract, base first: a position (1 is the base), `last`, a digest, or `all`.
   * @default {["last"]} */
  layers?: string[];
  /** Globs of members to extract, matched against paths and names. Without any, all are extracted. */
  include?: string[];
  /** Globs of members to skip, besides hidden ones; a directory stands for everything below it. */
  exclude?: string[];
  /** How many leading components of each path to drop.
   * @default {0} */
  stripComponents?: number;
  /** Replace DEST instead of adding to it.
   * @default {false} */
  clean?: boolean;
  /** Project whose `NAME===…` is dropped from `upper-constraints.txt`. */
  unpin?: string;
  /** Only list what would be extracted. */
  list?: boolean;
  /** Only resolve the source; download no layer. */
  dryRun?: boolean;
  /** `OS/ARCH[/VARIANT]` to choose from an index.
   * @default {`linux/` and the host's architecture} */
  platform?: string;
  /** Protocol of the registry; `detect` tries https first, and plain http for local names only.
   * @default {"detect"} */
  protocol?: "http" | "https" | "detect";
  /** Accept any certificate.
   * @default {false} */
  insecure?: boolean;
  /** File of PEM certificates to trust besides the usual ones. */
  caFile?: string;
  /** User name for the registry. */
  username?: string;
  /** Password or access token for `username`. */
  password?: string;
  /** Docker configuration as JSON text, which is asked before `authFiles`. */
  authConfig?: string;
  /** Docker's `config.json` and podman's `auth.json`, in order; read only if the registry challenges.
   * @default {[]} */
  authFiles?: string[];
  /** PEM files of public keys, one of which must have signed the image. */
  verifyKeys?: string[];
  /** How often a request is retried after a transient failure.
   * @default {5} */
  retries?: number;
  /** Seconds without a byte after which a connection is given up.
   * @default {30} */
  timeout?: number;
  /** How many connections may download at once, 1 to 16.
   * @default {4} */
  connections?: number;
  /** Base URLs of mirrors, which are asked first and never see the registry's credentials. */
  mirrors?: string[];
  /** Directory that keeps blobs by digest, laid out as the `blobs` of an OCI layout. */
  cache?: string;
  /**
   * URL of this module, from which it starts a worker for large archives. Without it, extraction runs in the caller's
   * thread. Omit it if the module is bundled with others, which the worker would run too.
   */
  workerUrl?: string;
  /** Cancels the fetch and cleans up. */
  signal?: AbortSignal;
  /** Replaces the global `fetch`. Proxies and certificates are then the caller's concern. */
  fetch?: typeof globalThis.fetch;
  /** Replaces the timer between retries. */
  delay?: (milliseconds: number, signal?: AbortSignal) => Promise<unknown>;
  /** Replaces `Date.now`. */
  now?: () => number;
  /** Replaces `Deno.env.get`, for proxies and the certificate store. */
  env?: (name: string) => string | undefined;
  /** Receives progress events. */
  onProgress?: (event: ProgressEvent) => void;
}

/** A layer, or another blob of the manifest, that was fetched. */
export interface LayerInfo {
  /** Digest of its bytes as they are stored in the registry. */
  digest: string;
  /** Its size in bytes; null before a schema 1 layer has been read. */
  size: number | null;
  /** Media type by the manifest, or null. */
  mediaType: string | null;
  /** Position among the manifest's layers; 1 is the base. */
  index: number;
  /** Number of layers in the manifest. */
  count: number;
}

/** How cosign stored a signature. */
export type SignatureFormat = "bundle" | "simplesigning";

/** What was done; the same as the document of `--json`. */
export interface FetchResult {
  /** The source as it was given; of a URL, neither password nor query. */
  source: string;
  /** The image, or null for a tarball or an image on disk. */
  image: { registry: string; repository: string; tag: string | null; digest: string | null } | null;
  /** Platform of the image, or null if nothing says it. */
  platform: string | null;
  /** What the reference named: the index, if there is one; null for a tarball. */
  resolved: { digest: string; mediaType: string } | null;
  /** The manifest that was chosen, or null for a tarball. */
  manifest: { digest: string; mediaType: string; artifactType: string | null } | null;
  /** The layers that were fetched, base first; empty for a tarball. */
  layers: LayerInfo[];
  /** The signature that was accepted, or null without `verifyKeys`. */
  verified: { digest: string; key: string; format: SignatureFormat } | null;
  /** Directory that received the files, or null with `output`. */
  dest: string | null;
  /** File that received the tarball, `-` for a stream, or null. */
  output: string | null;
  /** Files and links now in `dest`, with their sizes in bytes, and their digests if the registry names files by them. */
  files: FileInfo[];
  /** Members that were skipped. */
  skipped: { path: string; reason: string }[];
  /** Bytes received, compressed. */
  bytes: number;
  /** Duration in seconds. */
  seconds: number;
}

/** A file that was extracted or listed. */
export interface FileInfo {
  /** Path below `dest`. */
  path: string;
  /** Size in bytes. */
  size: number;
  /** Digest, if the registry names the file by it; else null. */
  digest: string | null;
}

/**
 * Fetches the final layer of an image, or a tarball, and extracts it into a directory, all or nothing.
 *
 * @example An invalid reference is rejected before any request
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
 * @returns What was fetched, and the files that are there now
 * @throws {FetchWheelsError} of each kind but `internal`; `dest` is then unchanged
 */
export async function fetchWheels(source: string, options: FetchWheelsOptions = {}): Promise<FetchResult> {
  try {
    const settings = await resolveOptions(options);
    const parsed = parseSource(source);
    using client = new HttpClient(settings);
    // Opened before any request: an unusable disk is better known before half a gigabyte has been downloaded.
    await using target = await openTarget(settings);
    let { mirrors } = settings;
    let isFresh = false;
    while (true) {
      const suspects: Suspects = new Set();
      try {
        return await fetchOnce(parsed, { source, settings, client, target, mirrors, isFresh, suspects });
      } catch (error) {
        if (suspects.size === 0 || !mayRefetch(error, settings)) throw error;
        const skipped = suspectedMirrors(suspects);
        mirrors = mirrors.filter((url) => !skipped.includes(url));
        isFresh = true; // the cache may have the beginning of what a mirror sent
        const without = skipped.map((url) => `mirror ${displayOrigin(url)}`).join(" and ") || "the cache";
        settings.report({ type: "warning", message: `${error.message}; retrying without ${without}` });
      }
    }
  } catch (error) {
    throw toPublicError(error, options.signal);
  }
}

/** Reports whether others may have the right bytes. What a stream has received cannot be retracted. */
function mayRefetch(error: unknown, { output, signal }: Settings): error is FetchWheelsError {
  const isIntegrity = error instanceof FetchWheelsError && error.kind === "integrity";
  return isIntegrity && !signal.aborted && typeof output !== "object";
}

/** What may have sent wrong bytes: mirrors, by their URLs, and the cache, by the digests of blobs that it had. */
type Suspects = Set<URL | string>;

/** Returns the mirrors to leave out: none while the cache is suspected, because mirrors continue what it has. */
function suspectedMirrors(suspects: Suspects): URL[] {
  const mirrors = [...suspects].filter((suspect) => suspect instanceof URL);
  return mirrors.length < suspects.size ? [] : mirrors;
}

type Attempt = SourceOptions & { source: string; target: Target };

async function fetchOnce(parsed: Source, attempt: Attempt): Promise<FetchResult> {
  const { source, settings, target } = attempt;
  const started = performance.now();
  const meter = new ByteMeter(settings.report);
  attempt.client.meter = meter;
  const origin = openSource(parsed, attempt);
  const resolved = "store" in origin ? await resolveImage(origin, settings) : undefined;
  const verified = resolved ? await verifySignature(resolved, settings) : null;
  const parts = resolved ? await selectParts(resolved, settings) : "tarball" in origin ? [origin.tarball] : [];
  const layers = resolved ? parts.map((part) => layerInfo(part, resolved)) : [];
  const platform = resolved?.platform ?? null;
  if (resolved) settings.report({ type: "resolved", image: resolved.image, layers, platform });
  meter.total = totalSize(parts);

  const open = (part: Part) => openPart(part, { origin, meter, signal: settings.signal });
  const label = parsed.kind === "url" ? displayUrl(parsed.url) : source;
  const otherLayers = resolved && !resolved.isArtifact ? resolved.manifest.layers.length - parts.length : 0;
  const delivery = { parts, otherLayers, open, label };
  const { files, skipped } = await target.receive(delivery);
  warnOfUnusableWheels(files, delivery, settings);

  const { dryRun, isPreview, dest } = settings;
  const sizeOnceRead = dryRun || layers.length > 1 ? null : meter.consumed; // for schema 1, which does not say it
  const output = typeof settings.output === "object" ? "-" : settings.output ?? null;
  const manifest = origin.kind === "docker-archive" ? undefined : resolved?.manifest; // `docker save` keeps none
  const { registry = "", repository = "", tag, digest }: Partial<ImageReference> = resolved?.image ?? {};
  return {
    source: label,
    image: origin.kind === "registry" ? { registry, repository, tag: tag ?? null, digest: digest ?? null } : null,
    platform,
    resolved: manifest && resolved ? resolved.named : null,
    manifest: manifest
      ? { digest: manifest.digest, mediaType: manifest.mediaType, artifactType: manifest.artifactType ?? null }
      : null,
    layers: layers.map((layer) => ({ ...layer, size: layer.size ?? sizeOnceRead })),
    verified,
    dest: isPreview || output !== null ? null : dest,
    output: isPreview ? null : output,
    files,
    skipped,
    bytes: meter.consumed,
    seconds: Math.round(performance.now() - started) / 1000,
  };
}

/** The options, validated, with every default in its place. */
type Settings = Awaited<ReturnType<typeof resolveOptions>>;

async function resolveOptions(options: FetchWheelsOptions) {
  const { layers = ["last"], include = [], exclude = [], stripComponents = 0 } = options;
  const { retries = DEFAULT_RETRIES, timeout = DEFAULT_TIMEOUT, connections = DEFAULT_CONNECTIONS } = options;
  for (const layer of layers) {
    if (/^(?:last|all|[1-9]\d{0,5})$/.test(layer) || DIGEST.test(layer)) continue;
    const expected = 'expected a layer number (1 is the base), "last", "all" or a digest';
    throw usageError(`Cannot use layer ${quote(layer)}: ${expected}`);
  }
  checkWholeNumber("strip-components", stripComponents, [0, 1000]);
  checkWholeNumber("retries", retries, [0, MAX_RETRIES]);
  checkWholeNumber("connections", connections, [1, MAX_CONNECTIONS]);
  if (!(timeout > 0 && timeout <= MAX_TIMEOUT)) {
    throw usageError(`--timeout must be between 1 and ${MAX_TIMEOUT} seconds`);
  }
  const { cache, caFile, platform, verifyKeys = [], signal = new AbortController().signal } = options;
  return {
    ...options,
    layers,
    retries,
    connections,
    dest: resolvePath(options.dest || DEFAULT_DEST),
    filter: { include, exclude, strip: stripComponents },
    isPreview: Boolean(options.list || options.dryRun), // nothing is written
    platform: platform === undefined ? hostPlatform() : parsePlatform(platform),
    protocol: options.protocol ?? "detect",
    certificates: caFile === undefined ? [] : await readCertificates(caFile, signal),
    credentials: givenCredentials(options),
    authFiles: options.authFiles ?? [],
    verifyKeys: await Promise.all(verifyKeys.map((file) => readVerifyKey(file, signal))),
    timeoutMs: timeout * 1000,
    mirrors: (options.mirrors ?? []).map(parseMirror),
    cache: cache === undefined ? undefined : resolvePath(cache),
    signal,
    delay: options.delay ?? ((milliseconds, signal) => sleep(milliseconds, undefined, { signal })),
    now: options.now ?? Date.now,
    env: options.env ?? readEnvironment,
    report: options.onProgress ?? (() => {}),
  };
}

function checkWholeNumber(name: string, value: number, [minimum, maximum]: [number, number]): void {
  if (Number.isInteger(value) && value >= minimum && value <= maximum) return;
  const isNegative = minimum === 0 && value < 0;
  throw usageError(`--${name} must be ${isNegative ? "0 or more" : `a whole number from ${minimum} to ${maximum}`}`);
}

function parseMirror(text: string): URL {
  if (/^https?:\/\//i.test(text) && URL.canParse(text)) return new URL(text);
  const shown = withoutSecrets(text).replace(/^.*@/s, ""); // a password may come without a scheme
  const message = `Cannot use mirror ${quote(shown)}: it is not an http(s) URL`;
  throw usageError(message, { hint: "an example is https://mirror.example:5000" });
}

// ---------------------------------------------------------------------------------------------------------------------
// 0 Helpers: errors, text that is safe to print, JSON, files, permissions.
// ---------------------------------------------------------------------------------------------------------------------

const usageError = errorsOfKind("usage");
const notFoundError = errorsOfKind("not-found");
const integrityError = errorsOfKind("integrity");
const ioError = errorsOfKind("io");

/** Returns a function that creates errors of one kind. */
function errorsOfKind(kind: ErrorKind) {
  return (message: string, options?: { hint?: string; cause?: unknown }) =>
    new FetchWheelsError(kind, message, options);
}

function unsafeError(member: string, state: string): FetchWheelsError {
  const hint = "the whole archive is rejected; --include '*.whl' extracts the wheels alone";
  return new FetchWheelsError("unsafe", `Cannot extract ${quote(member)}: ${state}`, { hint });
}

/** Converts what Deno throws for a canceled fetch and for missing permissions to this module's errors. */
function toPublicError(error: unknown, signal?: AbortSignal): unknown {
  if (signal?.aborted) return signal.reason;
  if (!(error instanceof Deno.errors.NotCapable)) return error;
  const flag = /--allow-[a-z]+/.exec(error.message)?.[0] ?? "the permission";
  const [, path] = /Requires all access to "(.*?)"/.exec(error.message) ?? [];
  if (path !== undefined) {
    const hint = "choose another path; below /dev, /proc and /sys, Deno asks for all permissions";
    return usageError(`Cannot use ${quote(path)}: Deno protects this path`, { hint, cause: error });
  }
  const needed = error.message.split(/, run|\. Run/)[0] ?? error.message;
  return usageError(`Cannot continue without a permission: ${needed}`, { hint: `run deno with ${flag}`, cause: error });
}

/** Quotes untrusted text: escaped, shortened, and on one line. */
function quote(text: string): string {
  return oneLine(JSON.stringify(shorten(text)));
}

function shorten(text: string): string {
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text;
}

/** Replaces the characters that move a cursor or begin a line. */
function oneLine(text: string): string {
  return text.replace(
    // deno-lint-ignore no-control-regex -- these are the ones to replace
    /[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Returns a URL for people: without its query, which may be a signature, and without a password. */
function displayUrl(url: URL): string {
  return `${url.protocol}//${url.host}${shorten(url.pathname)}${url.search === "" ? "" : "?…"}`;
}

/** Removes user information and queries from all URLs in a text. */
function withoutSecrets(text: string): string {
  return text
    .replace(/:\/\/[^\s/]*@/g, "://")
    .replace(/(:\/\/[^\s?"')]*)\?[^\s")]*/g, "$1?…");
}

function withoutUser(url: URL): URL {
  const bare = new URL(url);
  bare.username = "";
  bare.password = "";
  return bare;
}

/** Lists untrusted names on one line, the first MAX_LISTED of them. */
function listNames(names: Iterable<string>): string {
  const all = [...names];
  const shown = all.slice(0, MAX_LISTED).map((name) => oneLine(name.slice(0, MAX_SHOWN))).join(", ");
  return all.length > MAX_LISTED ? `${shown} and ${all.length - MAX_LISTED} more` : shown;
}

function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// deno-lint-ignore no-explicit-any -- what others send may be anything, and is checked field by field
type JsonObject = Record<string, any>;

/** Returns the JSON object in these bytes, or undefined for anything else. */
function parseJson(bytes: Uint8Array | undefined): JsonObject | undefined {
  const value = parseJsonValue(bytes);
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value : undefined;
}

function parseJsonValue(bytes: Uint8Array | undefined): unknown {
  try {
    const value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes ?? new Uint8Array()));
    dropConversions(value, MAX_JSON_DEPTH);
    return value;
  } catch {
    return undefined; // the caller names what is not JSON
  }
}

/** Makes each value convertible to text: it has no methods of its own, and the stack is enough for its depth. */
function dropConversions(value: JsonObject | null, depth: number): void {
  if (typeof value !== "object" || value === null) return;
  if (depth === 0) throw new RangeError("nested too deeply");
  for (const key of ["toString", "valueOf"]) if (Object.hasOwn(value, key)) delete value[key];
  for (const inner of Object.values(value)) dropConversions(inner, depth - 1);
}

/** Reads all bytes, or returns undefined if there are more than `limit`. */
async function readAll(bytes: AsyncIterable<Uint8Array>, limit: number): Promise<Uint8Array | undefined> {
  let kept = new Uint8Array(); // one buffer, because chunks may be as small as one byte
  let size = 0;
  for await (const chunk of bytes) {
    const end = size + chunk.length;
    if (end > limit) return undefined;
    if (end > kept.length) kept = Buffer.concat([kept, new Uint8Array(end)]);
    kept.set(chunk, size);
    size = end;
  }
  return kept.subarray(0, size);
}

/** Waits for a promise until the signal aborts. */
async function untilAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  promise.catch(() => {}); // not an unhandled rejection if the signal has aborted already
  signal.throwIfAborted();
  const aborted = Promise.withResolvers<never>();
  const onAbort = () => aborted.reject(signal.reason);
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    return await Promise.race([promise, aborted.promise]);
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}

/** Gives other tasks a turn, such as those of signals, each time this one has run for MAX_BLOCKING_MS. */
class Turns {
  #resumed = performance.now();

  constructor(private readonly signal?: AbortSignal) {}

  /** Throws if the signal has aborted. */
  async give(): Promise<void> {
    if (performance.now() - this.#resumed >= MAX_BLOCKING_MS) {
      await nextTask();
      this.#resumed = performance.now();
    }
    this.signal?.throwIfAborted();
  }
}

/** Yields chunks until the signal aborts, even if the source never yields another one. */
async function* interruptible(bytes: AsyncIterable<Uint8Array>, signal: AbortSignal): AsyncGenerator<Uint8Array> {
  const source = bytes[Symbol.asyncIterator]();
  try {
    while (true) {
      const { done, value } = await untilAborted(source.next(), signal);
      if (done) return;
      yield value;
    }
  } finally {
    source.return?.()?.catch(() => {}); // not awaited: it may be waiting for bytes that never come
  }
}

/** Reads ahead, up to `limit` bytes. Starts at once; ending the iteration or canceling abandons the source. */
function prefetch(bytes: AsyncIterable<Uint8Array>, limit: number): ReadableStream<Uint8Array> {
  const source = bytes[Symbol.asyncIterator]();
  return new ReadableStream<Uint8Array>({
    async pull(controller) {
      const { done, value } = await source.next();
      if (done) controller.close();
      else controller.enqueue(value);
    },
    cancel: () => void source.return?.()?.catch(() => {}), // not awaited: it may be waiting for bytes that never come
  }, { highWaterMark: limit, size: (chunk) => chunk?.length ?? 0 });
}

/** Counts and reports the bytes of a fetch. */
class ByteMeter {
  total: number | undefined; // bytes expected in all; undefined if something does not say its size
  consumed = 0;
  #ahead = 0; // bytes that have arrived, but wait for those before them

  constructor(private readonly report: Report) {}

  /** Counts bytes that have arrived; a negative number takes them back when they are delivered or lost. */
  arrived(bytes: number): void {
    this.#ahead += bytes;
    if (bytes > 0) this.#reportBytes();
  }

  received(bytes: number): void {
    this.consumed += bytes;
    this.#reportBytes();
  }

  #reportBytes(): void {
    this.report({ type: "bytes", received: this.consumed + this.#ahead, total: this.total });
  }
}

/** Runs a disk operation and puts its errors into this module's terms. */
function onDisk<T>(action: string, path: string, operation: () => T): T {
  try {
    return operation();
  } catch (error) {
    throw toDiskError(error, `Cannot ${action} ${quote(path)}`);
  }
}

function toDiskError(error: unknown, message: string): unknown {
  const code = errorCode(error);
  if (error instanceof FetchWheelsError || error instanceof Deno.errors.NotCapable || code === undefined) return error;
  return ioError(`${message}: ${DISK_STATES[code] ?? (error as Error).message}`, { cause: error });
}

function errorCode(error: unknown): string | undefined {
  return (error as NodeJS.ErrnoException | undefined)?.code ??
    (error instanceof Deno.errors.BrokenPipe ? "EPIPE" : undefined);
}

const DISK_STATES: Record<string, string> = {
  ENOSPC: "no space left on the disk",
  EDQUOT: "the disk quota is used up",
  EACCES: "permission denied",
  EPERM: "permission denied",
  EROFS: "the file system is read-only",
  EISDIR: "it is a directory",
  ENOTDIR: "a component of the path is not a directory",
  ENOENT: "no such file or directory",
  EEXIST: "it exists already",
  EPIPE: "broken pipe",
  ENAMETOOLONG: "the name is too long",
  EMFILE: "too many open files (see ulimit -n)",
  ENFILE: "too many open files in the system",
  ELOOP: "too many symbolic links",
};

/** Yields a file's bytes from an offset on, or some of them. */
async function* readFile(path: string, { offset = 0, size = Infinity } = {}): AsyncGenerator<Uint8Array> {
  using file = await Deno.open(path).catch((error) => {
    throw toDiskError(error, `Cannot read ${quote(path)}`);
  });
  if (offset > 0) onDisk("read", path, () => file.seekSync(offset, Deno.SeekMode.Start));
  yield* chunksOf(file, { path, size });
}

/** Yields a file's bytes from where it stands. */
async function* chunksOf(file: Deno.FsFile, options: { path: string; size?: number }): AsyncGenerator<Uint8Array> {
  const { path, size = Infinity } = options;
  for (let left = size; left > 0;) {
    const buffer = new Uint8Array(Math.min(INFLATED_BYTES, left));
    const length = await file.read(buffer).catch((error) => {
      throw toDiskError(error, `Cannot read ${quote(path)}`);
    });
    if (length === null) return;
    left -= length;
    yield buffer.subarray(0, length);
  }
}

/** Reads a small file of the user's whole. It may be a pipe that nobody writes to, so the signal ends the wait. */
async function readUserFile(path: string, signal: AbortSignal): Promise<Uint8Array> {
  assertGranted({ name: "read", path });
  return await untilAborted(Deno.readFile(path), signal).catch((error) => {
    throw toDiskError(error, `Cannot read ${quote(path)}`);
  });
}

function isGranted(descriptor: Deno.PermissionDescriptor): boolean {
  try {
    return Deno.permissions.querySync(descriptor).state === "granted";
  } catch (error) {
    if (error instanceof URIError) return false; // Deno rejects some host names, such as "a..b"
    throw error;
  }
}

/** Throws what Deno throws without a terminal. On one, it would prompt, and no signal would be handled meanwhile. */
function assertGranted(descriptor: Deno.NetPermissionDescriptor | Deno.ReadPermissionDescriptor): void {
  if (isGranted(descriptor)) return;
  const { name } = descriptor;
  const subject = name === "net" ? descriptor.host : descriptor.path;
  throw new Deno.errors.NotCapable(`Requires ${name} access to "${subject}", run again with the --allow-${name} flag`);
}

/** Reports whether a file exists and Deno may read it. */
function isReadable(path: string): boolean {
  return isGranted({ name: "read", path }) && fs.existsSync(path);
}

/** Treats a variable that Deno may not read as not set. */
function readEnvironment(name: string): string | undefined {
  return isGranted({ name: "env", variable: name }) ? Deno.env.get(name) : undefined;
}

function writeAll(file: Deno.FsFile, bytes: Uint8Array): void {
  for (let written = 0; written < bytes.length;) written += file.writeSync(bytes.subarray(written));
}

// ---------------------------------------------------------------------------------------------------------------------
// 1 Reference: text to {registry, repository, tag, digest}, by the grammar of the distribution project; platforms.
// ---------------------------------------------------------------------------------------------------------------------

const MAX_REFERENCE = 1024; // characters; a host, a name, a tag and a digest together have fewer
const DIGEST = /^(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/;
const DIGEST_RULE = "the digest must be sha256: and 64, or sha512: and 128 lower-case hexadecimal digits";
const TAG = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const TAG_RULE = 'a tag has 1 to 128 letters, digits, "_", "." and "-", and does not begin with "." or "-"';
const REPOSITORY = /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$/;
const REPOSITORY_RULE = 'a repository name has lower-case letters and digits, with ".", "_", "__" or "-" between them';
const HOST =
  /^(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:]+\])(?::(?!0+$)\d{1,5})?$/;

type Source =
  | { kind: "image"; image: ImageReference }
  | { kind: "url"; url: URL }
  | { kind: "file"; path: string }
  | { kind: "oci" | "oci-archive" | "docker-archive"; path: string; tag?: string };

function parseSource(text: string): Source {
  if (/^https?:\/\//i.test(text)) {
    if (URL.canParse(text)) return { kind: "url", url: new URL(text) };
    const shown = withoutSecrets((text.split("?")[0] ?? "").replace(/\/\/.*@/s, "//")); // a password may contain "/"
    throw usageError(`Cannot parse URL ${quote(shown)}: it is not valid`);
  }
  if (/^\.{0,2}\//.test(text)) return { kind: "file", path: text };
  const [, kind, path, tag] = /^(oci|oci-archive|docker-archive):(?!\/\/)(.+?)(?::([^/:]+))?$/s.exec(text) ?? [];
  if (kind === "docker-archive") return { kind, path: text.slice(kind.length + 1) };
  if (path !== undefined && (kind === "oci" || kind === "oci-archive")) return { kind, path, tag };
  if (/^(?:oci|oci-archive|docker-archive):$/.test(text)) {
    throw usageError(`Cannot use source "${text}": the path is missing`);
  }
  const transport = /^(?:(?:docker|oci|oci-archive|docker-archive):\/\/|(?:dir|docker-daemon|containers-storage):)/
    .exec(text)?.[0];
  if (transport !== undefined) {
    const shown = withoutSecrets(text);
    const hint = transport === "docker://"
      ? `for an image in a registry, write ${quote(shown.slice(transport.length))}`
      : "use an image reference, an http(s):// URL, a path, oci:DIR, oci-archive:FILE or docker-archive:FILE";
    throw usageError(`Cannot use source ${quote(shown)}: "${transport}" is not supported`, { hint });
  }
  return { kind: "image", image: parseImageReference(text) };
}

/**
 * Parses an image's name as `docker pull` does.
 *
 * @example
 * ```ts
 * import { parseImageReference } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * const { registry, repository, tag } = parseImageReference("python:3.13");
 * assert.deepEqual([registry, repository, tag], ["docker.io", "library/python", "3.13"]);
 * ```
 *
 * @param text `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`
 * @returns The parts; `tag` is `latest` only when neither tag nor digest is given
 * @throws {FetchWheelsError} of kind `usage`, which quotes the text and names the rule that it breaks
 */
export function parseImageReference(text: string): ImageReference {
  const shown = withoutSecrets(text).replace(/^[^/@]*:(?!\/\/).*@(?!sha\d)/s, "…@"); // a user name and a password
  const fail = (rule: string, hint?: string) =>
    usageError(`Cannot parse image reference ${quote(shown)}: ${rule}`, { hint });
  if (text === "") throw fail("it is empty");
  if (text.length > MAX_REFERENCE) throw fail(`it has more than ${MAX_REFERENCE} characters`);
  if (/\s/.test(text)) throw fail("it contains white space");
  const scheme = /^[a-z][a-z0-9+.-]*:\/\//i.exec(text)?.[0];
  const schemeHint = SCHEME_HINTS.find(([pattern]) => pattern.test(text))?.[1];
  if (scheme) throw fail("an image reference has no scheme", schemeHint);
  const [name = "", digest, ...more] = text.split("@");
  if (more.length > 0) throw fail('it contains more than one "@"');
  if (digest !== undefined && !DIGEST.test(digest)) throw fail(DIGEST_RULE);
  const [, path = "", tag] = /^(.*?)(?::([^/]*))?$/.exec(name) ?? [];
  if (tag !== undefined && !TAG.test(tag)) throw fail(TAG_RULE);

  const [first = ""] = /^[^/]+(?=\/)/.exec(path) ?? [];
  const isHost = /[.:A-Z]/.test(first) || first === "localhost";
  const isValidHost = HOST.test(first) && URL.canParse(`https://${first}/`);
  if (isHost && !isValidHost) throw fail(`${quote(first)} is not a host name with an optional port`);
  const isHub = !isHost || HUB_NAMES.includes(first);
  const rest = isHost ? path.slice(first.length + 1) : path;
  const repository = isHub && rest !== "" && !rest.includes("/") ? `library/${rest}` : rest;
  if (repository === "") throw fail("the name of the repository is missing");
  if (/[A-Z]/.test(repository)) {
    // Case matters in a tag, but not in a name.
    const lowered = text.replace(/^.*?(?=[:@][^/]*$|$)/, (name) => name.toLowerCase());
    const isUsable = REPOSITORY.test(repository.toLowerCase());
    throw fail("a repository name must be lower case", isUsable ? `try ${lowered}` : undefined);
  }
  if (repository.length > 255) throw fail("a repository name has at most 255 characters");
  if (!REPOSITORY.test(repository)) throw fail(REPOSITORY_RULE);
  if (/^[0-9a-f]{64}$/.test(rest)) throw fail("a name of 64 hexadecimal digits would be taken for an image ID");
  const reference: ImageReference = { registry: isHub ? HUB : first, repository };
  if (tag !== undefined || digest === undefined) reference.tag = tag ?? "latest";
  if (digest !== undefined) reference.digest = digest;
  return reference;
}

const SCHEME_HINTS: [pattern: RegExp, hint: string][] = [
  [/^https?:/i, "remove the scheme"],
  [/^file:/i, "write the path alone"],
  [/^/, "only http:// and https:// URLs are supported"],
];

function formatReference({ registry, repository, tag, digest }: ImageReference): string {
  return `${registry}${repository && `/${repository}`}${tag ? `:${tag}` : ""}${digest ? `@${digest}` : ""}`;
}

/**
 * Parses a platform into the names that registries use: `x86_64` is `amd64`, `aarch64` is `arm64`, `armhf` is `arm/v7`.
 *
 * @param text `OS/ARCH[/VARIANT]`
 * @throws {FetchWheelsError} of kind `usage`
 */
export function parsePlatform(text: string): Platform {
  if (/^[a-z0-9][a-z0-9._-]*(?:\/[a-z0-9][a-z0-9._-]*){1,2}$/i.test(text)) {
    const [os, architecture, variant] = text.split("/");
    return normalizePlatform({ os, architecture, variant });
  }
  const message = `Cannot parse platform ${quote(text)}: expected OS/ARCH or OS/ARCH/VARIANT`;
  throw usageError(message, { hint: "examples are linux/amd64 and linux/arm64" });
}

/** Returns the platform of this machine's wheels: Linux on every host, and the architecture, under any usual name. */
export function hostPlatform(arch: string = Deno.build.arch): Platform {
  return normalizePlatform({ os: "linux", architecture: arch });
}

function normalizePlatform({ os = "", architecture = "", variant }: Partial<Platform>): Platform {
  const [name, implied] = ARCHITECTURES.get(architecture.toLowerCase()) ?? [architecture.toLowerCase()];
  const chosen = (variant?.toLowerCase() || implied)?.replace(/^(?=\d)/, "v");
  return { os: os.toLowerCase(), architecture: name, ...(chosen !== undefined && { variant: chosen }) };
}

// deno-fmt-ignore
const ARCHITECTURES = new Map<string, [name: string, variant?: string]>([
  ["x86_64", ["amd64"]], ["x86-64", ["amd64"]], ["aarch64", ["arm64"]], ["armhf", ["arm", "v7"]], ["armel", ["arm", "v6"]],
]);

const IMPLIED_VARIANTS = new Map([["amd64", "v1"], ["arm64", "v8"], ["arm", "v7"]]); // if a platform names none

function formatPlatform({ os, architecture, variant }: Partial<Platform>): string {
  return [os, architecture, variant].filter(Boolean).join("/");
}

/** Reports whether something built for `offered` runs on `wanted`: containerd's rule, within one architecture. */
function isCompatible(offered: Platform, wanted: Platform): boolean {
  if (offered.os !== wanted.os || offered.architecture !== wanted.architecture) return false;
  const implied = IMPLIED_VARIANTS.get(wanted.architecture);
  const variant = offered.variant ?? implied;
  if (wanted.variant !== undefined) return variant === wanted.variant;
  return variant === implied || variantLevel(variant) < variantLevel(implied);
}

function variantLevel(variant = ""): number {
  return Number(/^v(\d+)$/.exec(variant)?.[1] ?? NaN);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 Credentials: where a user name and password, or an identity token, come from.
// ---------------------------------------------------------------------------------------------------------------------

const TOKEN = /^[\x21-\x7e]+$/;
const PASSWORD_HINT = "pass --username and --password-stdin, or set REGISTRY_USERNAME and REGISTRY_PASSWORD";

function givenCredentials({ username, password }: FetchWheelsOptions): UserCredentials | undefined {
  if (username === undefined && password === undefined) return undefined;
  if (!username) throw usageError("Cannot use a password: the user name is missing", { hint: PASSWORD_HINT });
  if (password === undefined) {
    throw usageError(`Cannot use user name ${quote(username)}: the password is missing`, { hint: PASSWORD_HINT });
  }
  if (username.includes(":")) throw usageError(`Cannot use user name ${quote(username)}: it contains a colon`);
  return { username, password };
}

/** Finds credentials for one image, when the registry asks for them. */
class CredentialFinder {
  #found: Promise<UsableCredentials | undefined> | undefined;

  constructor(private readonly settings: Settings) {}

  find(image: ImageReference): Promise<UsableCredentials | undefined> {
    this.#found ??= this.#search(image);
    return this.#found;
  }

  /** Reads each configuration in turn; the first one that knows the registry decides. */
  async #search(image: ImageReference): Promise<UsableCredentials | undefined> {
    const { credentials: given, authConfig, authFiles } = this.settings;
    if (given !== undefined) return given;
    for (const name of [...(authConfig === undefined ? [] : ["DOCKER_AUTH_CONFIG"]), ...authFiles]) {
      const body = name === "DOCKER_AUTH_CONFIG" ? Buffer.from(authConfig ?? "") : await this.#readFile(name);
      if (body === undefined) continue;
      const config = parseJson(body);
      if (config === undefined) this.#warn(`ignoring ${quote(name)}: it is not a JSON object`);
      const { credentials, problem } = lookUpCredentials(config ?? {}, image);
      if (problem !== undefined) this.#warn(`ignoring an entry in ${quote(name)}: ${problem}`);
      if (credentials === undefined) continue;
      const found = "helper" in credentials ? await this.#askHelper(credentials.helper, image) : credentials;
      if (found !== undefined) return found;
    }
    return undefined;
  }

  /** A file that does not exist, or that Deno may not read, is skipped silently. */
  async #readFile(path: string): Promise<Uint8Array | undefined> {
    const { signal } = this.settings;
    if (!isReadable(path)) return undefined;
    return await readUserFile(path, signal).catch((error) => {
      signal.throwIfAborted();
      this.#warn(error.message);
      return undefined;
    });
  }

  /** Runs `docker-credential-NAME get`. Each failure is a warning, and leads to an anonymous request. */
  async #askHelper(name: string, { registry }: ImageReference): Promise<UsableCredentials | undefined> {
    const { signal, timeoutMs, env } = this.settings;
    const program = `docker-credential-${name}`;
    const warn = (state: string): undefined => {
      this.#warn(`Cannot run credential helper ${quote(program)}: ${state}; continuing without credentials`);
    };
    if (!/^[\w.-]+$/.test(name)) return warn("its name is invalid");
    if (isMissing(program, env("PATH"))) return warn("it is not installed");
    if (!isGranted({ name: "run", command: program })) return warn(`deno needs --allow-run=${program}`);
    try {
      const limit = AbortSignal.any([signal, AbortSignal.timeout(timeoutMs)]);
      const pipes = { stdin: "piped", stdout: "piped", stderr: "null" } as const;
      const child = new Deno.Command(program, { args: ["get"], ...pipes, signal: limit }).spawn();
      const input = new TextEncoder().encode(registry === HUB ? HUB_KEY : registry);
      // A helper that does not read its input shows that by its answer.
      ReadableStream.from([input]).pipeTo(child.stdin).catch(() => {});
      // A grandchild may keep the pipe open after the helper has been killed, so the signal ends the wait as well.
      const stdout = await untilAborted(readAll(child.stdout, MAX_TOKEN_BYTES), limit);
      const { success } = await untilAborted(child.status, limit);
      const answer = success ? parseJson(stdout) : undefined;
      const { Username: username, Secret: secret } = answer ?? {};
      if (typeof username === "string" && typeof secret === "string" && secret !== "") {
        return username === IDENTITY_USER ? { identityToken: secret } : { username, password: secret };
      }
      const output = new TextDecoder().decode(stdout).trim();
      // Helpers say this for each registry that they do not know.
      if (/not found/i.test(output)) return undefined;
      return warn(success ? "its answer has no credentials" : `it failed (${quote(output)})`);
    } catch (error) {
      signal.throwIfAborted();
      const isSlow = (error as Error).name === "TimeoutError";
      return warn(isSlow ? `it did not answer within ${timeoutMs / 1000} s` : (error as Error).message);
    }
  }

  #warn(message: string): void {
    this.settings.report({ type: "warning", message });
  }
}

/** Reports whether the program is certainly not in PATH; without a look at PATH nothing is certain. */
function isMissing(program: string, path: string | undefined): boolean {
  const isAbsent = (file: string) => isGranted({ name: "read", path: file }) && !fs.existsSync(file);
  return path?.split(":").every((directory) => isAbsent(join(directory || ".", program))) ?? false;
}

/**
 * Finds what a Docker or podman configuration says about an image's registry. Reads no file and runs no helper.
 *
 * @example
 * ```ts
 * import { findCredentials } from "./fetch_wheels.ts";
 * import assert from "node:assert/strict";
 *
 * const config = { auths: { "registry.example:5000": { auth: btoa("user:password") } } };
 * const found = findCredentials(config, { registry: "registry.example:5000", repository: "ns/wheels" });
 * assert.deepEqual(found, { username: "user", password: "password" });
 * ```
 *
 * @param config The content of `config.json` or `auth.json`
 * @returns What `credHelpers`, else `credsStore`, else the most specific entry of `auths` says
 */
export function findCredentials(config: DockerConfig, image: ImageReference): Credentials | undefined {
  return lookUpCredentials(config, image).credentials;
}

function lookUpCredentials(
  config: DockerConfig,
  { registry, repository }: ImageReference,
): { credentials?: Credentials; problem?: string } {
  const helper = [...entriesFor(registry, config.credHelpers), config.credsStore].find(isFilledText);
  if (helper !== undefined) return { credentials: { helper } };
  const entry = entriesFor(`${registry}/${repository}`, config.auths).find(isFilled);
  if (entry === undefined) return {};
  if (isFilledText(entry.identitytoken)) return { credentials: { identityToken: entry.identitytoken } };
  if (isFilledText(entry.registrytoken)) {
    if (TOKEN.test(entry.registrytoken)) return { credentials: { registryToken: entry.registrytoken } };
    return { problem: `"registrytoken" for ${registry} has characters that are not allowed in a token` };
  }
  if (!isFilledText(entry.auth)) {
    return { credentials: { username: entry.username ?? "", password: entry.password ?? "" } };
  }
  const decoded = /^[A-Za-z0-9+/_-]+=*\s*$/.test(entry.auth) ? Buffer.from(entry.auth, "base64").toString("utf8") : "";
  const [, username, password = ""] = /^([^:]+):((?:.*[^\0])?)\0*$/s.exec(decoded) ?? [];
  const isValid = username !== undefined && !decoded.includes("\ufffd");
  if (isValid) return { credentials: { username, password } };
  return { problem: `"auth" for ${registry} is not base64 of "username:password"` };
}

function isFilled(entry: DockerAuthEntry | null): boolean {
  const { auth, username, password, identitytoken, registrytoken } = entry ?? {};
  return [auth, identitytoken, registrytoken, username && password].some(isFilledText);
}

function isFilledText(value: unknown): value is string {
  return typeof value === "string" && value !== "";
}

/** Returns the entries whose keys name `name`, or whole leading components of it, the most specific first. */
function entriesFor<T>(name: string, entries: Record<string, T> | null | undefined): T[] {
  const isHub = name === HUB || name.startsWith(`${HUB}/`);
  // Spelled as Docker or podman spells it; such a key precedes one that is equal only after normalizing.
  const isExact = (key: string) => key === name || name.startsWith(`${key}/`) || isHub && key === HUB_KEY;
  return Object.entries(entries ?? {})
    .map(([key, entry]) => ({ path: normalizeKey(key) ?? "", rank: isExact(key) ? 1 : 0, entry }))
    .filter(({ path }) => path !== "" && (name === path || name.startsWith(`${path}/`)))
    .sort((a, b) => b.path.length - a.path.length || b.rank - a.rank)
    .map(({ entry }) => entry);
}

/** Keys may have a scheme and an old version's path, or podman's namespace. A web login's tokens are ignored. */
function normalizeKey(key: string): string | undefined {
  const [, scheme, host = "", path = ""] = /^(https?:\/\/)?([^/]*)((?:.*[^/])?)\/*$/.exec(key) ?? [];
  if (/^\/v\d\/(?:access|refresh)-token$/.test(path)) return undefined;
  const isHub = HUB_NAMES.includes(host) || host === HUB_HOST;
  return `${isHub ? HUB : host}${scheme || /^\/v[12]$/.test(path) ? "" : path}`;
}

/** RFC 7617, with UTF-8 as registries expect it. */
function basicAuthorization({ username, password }: UserCredentials): string {
  return `Basic ${Buffer.from(`${username}:${password}`, "utf8").toString("base64")}`;
}

function urlCredentials(url: URL): UserCredentials | undefined {
  if (url.username === "") return undefined;
  try {
    return { username: decodeURIComponent(url.username), password: decodeURIComponent(url.password) };
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    throw usageError(`Cannot use URL ${quote(displayUrl(url))}: its user name or password is not percent-encoded`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 HTTP: one request with its proxy, certificates, timeout, redirects, and retries of transient failures.
// ---------------------------------------------------------------------------------------------------------------------

interface HttpRequest {
  headers?: Record<string, string>;
  form?: URLSearchParams; // of a POST; without it, the request is a GET
  authorizations?: ReadonlyMap<string, string | undefined>; // the Authorization header for each origin
  checkRedirect?: (url: URL) => void; // throws if a redirect must not be followed
  isVerified?: boolean; // a digest verifies the answer, so that a redirect to plain http does no harm
  signal?: AbortSignal;
}

/** The head of an answer; `read` returns the next chunk of the body, and undefined at its end. */
interface Answer {
  status: number;
  headers: Headers;
  read: () => Promise<Uint8Array | undefined>;
}

/** The head of an answer, and the means to read its body or to give it up. */
interface HttpResponse extends Answer {
  isOk: boolean;
  url: URL; // where the answer came from, after redirects
  requestUrl: URL; // what was requested
  proxy?: URL; // which passed the request on; in plain http it may have answered itself
  body(): AsyncGenerator<Uint8Array>; // each chunk is the caller's own
  cancel(reason?: Error): void;
}

type HttpDocument = { response: HttpResponse; body: Uint8Array | undefined };

/** A request that failed, or that the server asked to repeat. */
class RequestError extends FetchWheelsError {
  constructor(message: string, readonly details: FailureDetails = {}) {
    super(details.kind ?? "network", message, details);
  }
}

interface FailureDetails {
  kind?: ErrorKind;
  hint?: string;
  cause?: unknown;
  isTransient?: boolean; // whether a retry may help, which is the default
  isCertificate?: boolean; // it was refused; plain http must not be tried then, as that is what an attacker wants
  waitMs?: number; // how long the server asked to wait
  status?: number; // of the answer that asks for a retry
}

/** Sends requests: binds transport, timeout, retries, clock, signal and log once. Disposing closes connections. */
class HttpClient implements Disposable {
  readonly #transport: Transport;
  meter: ByteMeter | undefined; // of the bytes of blobs that arrive

  constructor(readonly settings: Settings) {
    this.#transport = new Transport(settings);
  }

  [Symbol.dispose](): void {
    this.#transport[Symbol.dispose]();
  }

  /** Requests the first of these URLs that can be connected to, once. A transient status is an error. */
  async request(urls: URL[], request: HttpRequest): Promise<HttpResponse> {
    const response = await this.#sendToFirst(urls, request);
    if (!isTransientStatus(response.status)) return response;
    const waitMs = retryAfter(response.headers.get("retry-after"), this.settings.now());
    const { message } = await this.statusError(response, `Cannot fetch ${quote(displayUrl(response.url))}`);
    throw new RequestError(message, { waitMs, status: response.status });
  }

  /** Reads a small answer whole, in bounded time. The body is undefined if it has more than `limit` bytes. */
  async readDocument(response: HttpResponse, limit: number): Promise<HttpDocument> {
    const milliseconds = this.settings.timeoutMs * DOCUMENT_TIMEOUT_FACTOR;
    const state = `not complete after ${milliseconds / 1000} s`;
    using _timer = startTimer(milliseconds, () => response.cancel(requestError(response.url, state)));
    try {
      const body = await readAll(response.body(), limit);
      if (response.isOk && body !== undefined) checkDocument(response.url, body);
      return { response, body };
    } finally {
      response.cancel();
    }
  }

  /** Makes the error for an answer that is not a success, with the registry's own words. */
  async statusError(response: HttpResponse, what: string, hint?: string): Promise<FetchWheelsError> {
    const { status, url, proxy } = response;
    // If the body breaks off, the status says enough.
    const document = await this.readDocument(response, MAX_ERROR_BYTES).catch(() => undefined);
    this.settings.signal.throwIfAborted();
    const text = new TextDecoder().decode(document?.body);
    if (status === 400 && url.protocol === "http:" && /HTTP request (?:was sent )?to (?:an )?HTTPS/i.test(text)) {
      const message = `${what}: ${displayUrl(url)} speaks https, not http`;
      return new RequestError(message, { hint: HTTPS_HINT, isTransient: false });
    }
    const kind = status === 404 ? "not-found" : status === 401 || status === 403 ? "auth" : "network";
    const words = registryWords(parseJson(document?.body));
    const subject = what.includes(quote(displayUrl(url))) ? "the server" : displayUrl(url);
    const through = proxy && url.protocol === "http:" ? ` through proxy ${displayOrigin(proxy)}` : "";
    const message = `${what}: ${subject} answered ${status}${through}${words && ` (${words})`}`;
    return new FetchWheelsError(kind, message, { hint });
  }

  async #sendToFirst(urls: URL[], request: HttpRequest): Promise<HttpResponse> {
    let failure: RequestError | undefined;
    for (const url of urls) {
      try {
        return await this.#followRedirects(url, request);
      } catch (error) {
        if (!(error instanceof RequestError) || error.details.isCertificate) throw error;
        if (failure === undefined || failure.details.isTransient === false) failure = error;
      }
    }
    throw failure;
  }

  /** Follows redirects itself, because `fetch` would take the credentials along to another origin. */
  async #followRedirects(url: URL, request: HttpRequest): Promise<HttpResponse> {
    const { authorizations, form, isVerified } = request;
    let current = url;
    for (let hops = 0; hops <= MAX_REDIRECTS; hops++) {
      const authorization = authorizations?.get(current.origin);
      const headers = { ...request.headers, ...(authorization !== undefined && { authorization }) };
      const response = await this.#send(current, { ...request, headers });
      const location = response.headers.get("location");
      if (![301, 302, 303, 307, 308].includes(response.status) || location === null) {
        return { ...response, requestUrl: url };
      }
      response.cancel();
      const next = resolveHttpUrl(location, current);
      if (next === undefined) throw finalError(current, "redirected to something that is not an http(s) URL");
      // Another origin gets no credentials, so that plain http does no harm to what a digest verifies.
      if (current.protocol === "https:" && next.protocol === "http:" && !isVerified) {
        throw finalError(current, `redirected from https to plain http (${displayUrl(next)})`);
      }
      if (form !== undefined && next.origin !== current.origin) {
        throw finalError(current, `redirected with a secret to ${displayOrigin(next)}`);
      }
      request.checkRedirect?.(next);
      current = next;
    }
    throw finalError(url, `more than ${MAX_REDIRECTS} redirects`);
  }

  /** Sends one request; ends with an answer's head or an error. */
  async #send(url: URL, { form, signal: own, ...request }: HttpRequest): Promise<HttpResponse> {
    const controller = new AbortController();
    const signal = AbortSignal.any([controller.signal, own ?? this.settings.signal]);
    // Deno would otherwise ask for gzip and decode it, and digests would differ.
    const defaults = { "accept-encoding": "identity", "user-agent": `fetch_wheels/${VERSION}` };
    const headers: Record<string, string> = { ...defaults, ...request.headers };
    const method = form === undefined ? "GET" : "POST";
    const proxy = this.#transport.proxyFor(url);
    const exchange: Exchange = { url, proxy, method, headers, form, controller, signal };
    const started = performance.now();
    using _timer = this.#limitSilence(exchange);
    const answer = await this.#transport.send(exchange);
    const ms = Math.round(performance.now() - started);
    const { status } = answer;
    const length = answer.headers.get("content-length");
    const bytes = length === null ? undefined : parseInt(length);
    this.settings.report({ type: "request", method, url: displayUrl(url), status, bytes, range: headers.range, ms });
    if (proxy !== undefined && status === 407) {
      controller.abort(); // the body is not read
      throw proxyStatusError(url, proxy, 407);
    }
    const isOk = status >= 200 && status < 300;
    const body = () => this.#body(exchange, answer);
    return { ...answer, isOk, url, requestUrl: url, proxy, body, cancel: (reason) => controller.abort(reason) };
  }

  /** Yields an answer's bytes; silence is an error, and so is a connection that breaks. */
  async *#body(exchange: Exchange, answer: Answer): AsyncGenerator<Uint8Array> {
    const { url, controller, signal } = exchange;
    const readInTime = async () => {
      // The timer runs only while this waits: a slow disk is not a silent network.
      using _timer = this.#limitSilence(exchange);
      return await untilAborted(answer.read(), signal);
    };
    let isEnded = false;
    try {
      for (let chunk = await readInTime(); chunk !== undefined; chunk = await readInTime()) yield chunk;
      isEnded = true;
    } catch (error) {
      signal.throwIfAborted();
      throw error instanceof FetchWheelsError ? error : connectionError(url, { error });
    } finally {
      if (!isEnded) controller.abort();
    }
  }

  #limitSilence({ url, proxy, controller }: Exchange): Disposable {
    const { timeoutMs } = this.settings;
    const through = proxy === undefined ? "" : ` through proxy ${displayOrigin(proxy)}`;
    const state = `no data received for ${timeoutMs / 1000} s${through}`;
    return startTimer(timeoutMs, () => controller.abort(requestError(url, state)));
  }
}

/** The state of one request, until its body has been read. */
interface Exchange {
  url: URL;
  proxy: URL | undefined;
  method: string;
  headers: Record<string, string>;
  form: URLSearchParams | undefined;
  controller: AbortController;
  signal: AbortSignal; // aborted by the controller, or by what ends the whole fetch
  /** Kept, because Deno ends the body of an aborted fetch only if this object has not been garbage-collected. */
  response?: Response;
}

/** Calls back after a time, unless it is disposed of before. */
function startTimer(milliseconds: number, callback: () => void): Disposable {
  const timer = setTimeout(callback, milliseconds);
  return { [Symbol.dispose]: () => clearTimeout(timer) };
}

/** Recognizes the pages of captive portals, and bodies that are compressed against the request. */
function checkDocument(url: URL, body: Uint8Array): void {
  const isHtml = /^\s*</.test(Buffer.from(body.subarray(0, 200)).toString("latin1"));
  if (!isHtml && !(body[0] === 0x1f && body[1] === 0x8b)) return;
  const state = isHtml ? "text/html (a login page or a proxy?)" : "compressed with gzip, which was not requested";
  throw integrityError(`Cannot read ${quote(displayUrl(url))}: the answer is ${state}`);
}

/** Retry budget. Progress resets `failures`; `total` bounds a whole download, which may have several budgets. */
class RetryBudget {
  #failures = 0;

  constructor(
    private readonly settings: Settings,
    private readonly total: { failures: number; reported?: { attempt: number; at: number } } = { failures: 0 },
  ) {}

  progress(): void {
    this.#failures = 0;
  }

  /** Repeats an operation after each transient failure. */
  async retry<T>(operation: () => Promise<T>): Promise<T> {
    while (true) {
      try {
        return await operation();
      } catch (error) {
        await this.spend(error);
      }
    }
  }

  /** Waits until the next attempt may start; throws the error if there must not be one. */
  async spend(error: unknown): Promise<void> {
    const { retries, signal, delay, now, report } = this.settings;
    const { total } = this;
    signal.throwIfAborted();
    if (!(error instanceof RequestError) || error.details.isTransient === false) throw error;
    const { message, details: { waitMs } } = error;
    if (retries > 0 && waitMs !== undefined && waitMs > MAX_RETRY_AFTER_MS) {
      const limit = MAX_RETRY_AFTER_MS / 1000;
      const state = `${message}; server asked to wait ${Math.ceil(waitMs / 1000)} s; the limit is ${limit} s`;
      throw new FetchWheelsError("network", state, { cause: error });
    }
    this.#failures++;
    total.failures++;
    if (this.#failures > retries || total.failures > retries * TOTAL_RETRIES_FACTOR) {
      // Final, so that an operation that contains this one does not repeat it.
      throw new RequestError(message, { ...error.details, isTransient: false });
    }
    // Full jitter, so that a fleet of builds does not retry in step.
    const backoffMs = Math.random() * Math.min(MAX_DELAY_MS, FIRST_DELAY_MS * 2 ** (this.#failures - 1));
    const delayMs = waitMs ?? backoffMs;
    // Connections that break together are one line in the log.
    if (this.#failures !== total.reported?.attempt || now() - total.reported.at >= RETRY_REPORT_MS) {
      total.reported = { attempt: this.#failures, at: now() };
      report({ type: "retry", reason: message, delayMs, attempt: this.#failures, retries });
    }
    await untilAborted(delay(delayMs, signal), signal);
  }
}

function isTransientStatus(status: number): boolean {
  return status === 408 || status === 429 || status >= 500;
}

/** Returns the milliseconds of a `Retry-After`, in seconds or as a date (RFC 9110); undefined if invalid, 0 or past. */
function retryAfter(value: string | null, now: number): number | undefined {
  if (value === null) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000 || undefined;
  const isDate = /^[A-Z][a-z]{2,8}, ?\d{2}[ -][A-Z][a-z]{2}[ -]\d{2,4} \d{2}:\d{2}:\d{2} GMT$/.test(value.trim());
  const wait = isDate ? Date.parse(value) - now : NaN;
  return wait > 0 ? wait : undefined;
}

function resolveHttpUrl(text: string, base: URL): URL | undefined {
  const url = URL.parse(text, base);
  return url !== null && /^https?:$/.test(url.protocol) ? withoutUser(url) : undefined;
}

function hostAndPort({ hostname, port, protocol }: URL): string {
  return `${hostname}:${port || ({ "http:": 80, "https:": 443 }[protocol] ?? 1080)}`; // or that of SOCKS
}

/** Without user information, path and query. */
function displayOrigin(url: URL): string {
  return `${url.protocol}//${url.host}`;
}

/** Returns the words of an error's body (distribution specification, "Error Codes"). */
function registryWords(json: JsonObject | undefined): string {
  const errors: { code?: unknown; message?: unknown }[] = Array.isArray(json?.errors) ? json.errors : [];
  const words = errors.map((error) => [error?.code, error?.message].filter(Boolean).join(": ")).join("; ");
  const text = String(words || json?.details || json?.message || "").slice(0, MAX_WORDS);
  return quote(withoutSecrets(text)).slice(1, -1).slice(0, MAX_SHOWN);
}

function requestError(url: URL, state: string, options?: FailureDetails): RequestError {
  return new RequestError(`Cannot fetch ${quote(displayUrl(url))}: ${state}`, options);
}

/** A failure that a retry cannot help. */
function finalError(url: URL, state: string): RequestError {
  return requestError(url, state, { isTransient: false });
}

const HTTP_HINT = "if the server speaks plain http: --protocol http (REGISTRY_PROTOCOL)";
const HTTPS_HINT = "use --protocol https (REGISTRY_PROTOCOL)";
const PROXY_HINT = "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY";
const NOT_HTTP: FailureDetails = { isTransient: false, hint: HTTPS_HINT };
const UNTRUSTED: FailureDetails = {
  isTransient: false,
  isCertificate: true,
  hint: "trust it with --ca-file PEM (REGISTRY_CA_FILE), or accept any certificate with --insecure",
};

/** What `fetch` and Node's modules throw, recognized by its words, because `fetch` has no codes; first match wins. */
// deno-fmt-ignore
const CONNECTION_FAILURES: [pattern: RegExp, state: string, options?: FailureDetails][] = [
  [/Too many open files|EMFILE|ENFILE/, "too many open files (see ulimit -n)", { kind: "io", isTransient: false }],
  [/Temporary failure in name resolution|EAI_AGAIN/, "the name server does not answer"],
  [/dns error|ENOTFOUND|failed to lookup/, "no such host", { isTransient: false }],
  [/certificate.*expired|CERT_HAS_EXPIRED/i, "it has expired", UNTRUSTED],
  [/NotValidYet|NOT_YET_VALID/, "it is not valid yet", UNTRUSTED],
  [/NotValidForName|not valid for name|ALTNAME/, "it is for another host name", UNTRUSTED],
  [/CaUsedAsEndEntity|SELF_SIGNED|self.signed/, "it is self-signed", UNTRUSTED],
  [/UnknownIssuer|UNABLE_TO_/, "its issuer is unknown", UNTRUSTED],
  [/certificate|CERT_/, "no reason given", UNTRUSTED],
  [/InvalidContentType|WRONG_VERSION_NUMBER|corrupt message/, "the server does not speak TLS", { isTransient: false }],
  [/invalid HTTP version|HPE_INVALID/, "the answer is not HTTP; the server may speak https", NOT_HTTP],
  [/port \d+ are blocked/, "fetch does not connect to this port", { isTransient: false }],
  [/refused/i, "connection refused"],
  [/unreachable|no route/i, "network unreachable"],
  [/timed? ?out/i, "connection timed out"],
];

/** Explains what a transport has thrown. If the proxy has failed, plain http is never the hint. */
function connectionError(url: URL, { error, proxy }: { error: unknown; proxy?: URL }): RequestError {
  const { message, cause } = error as Error;
  const text = `${message} ${cause instanceof Error ? cause.message : ""} ${errorCode(error) ?? ""}`;
  const words = text.replace(/https?:\/\/[^\s)]*/g, ""); // an image's name must not be taken for a failure
  const known = CONNECTION_FAILURES.find(([pattern]) => pattern.test(words));
  const [, reason = "connection lost", options = {}] = known ?? [];
  const state = options.isCertificate ? `the certificate is not trusted (${reason})` : reason;
  // Other proxies than those of https have no certificate: then it is the server's.
  if (proxy !== undefined && (!options.isCertificate || proxy.protocol === "https:")) {
    const hint = options.isCertificate ? options.hint : PROXY_HINT;
    return requestError(url, `proxy ${displayOrigin(proxy)}: ${state}`, { ...options, hint, cause: error });
  }
  if (options === NOT_HTTP && url.protocol === "https:") return finalError(url, "the answer is not HTTP");
  const isHttpLikely = url.protocol === "https:" && /TLS$|refused$/.test(state);
  const isRegistry = url.pathname.startsWith("/v2/"); // elsewhere, the URL is the user's own
  const hint = isRegistry ? HTTP_HINT : `if the server speaks plain http, use http://${url.host}${url.pathname}`;
  return requestError(url, state, { ...options, ...(isHttpLikely && { hint }), cause: error });
}

function proxyStatusError(url: URL, proxy: URL, status: number): RequestError {
  const hint = status === 407 ? "put the proxy's user name and password into the variable that names it" : PROXY_HINT;
  const state = `proxy ${displayOrigin(proxy)} answered ${status}`;
  return requestError(url, state, { isTransient: isTransientStatus(status), hint });
}

/**
 * Sends one request over the right route. `fetch` is the fast way. `node:https` does what `fetch` cannot: accept any
 * certificate, accept one that is its own authority, connect directly although the environment names a proxy, and name
 * the status with which a proxy refuses a tunnel.
 */
class Transport implements Disposable {
  readonly #findProxy: (url: URL) => URL | undefined;
  readonly #clients = new Map<string, Deno.HttpClient>();
  readonly #agents = new Map<string, Agent>();
  readonly #pinned = new Set<string>(); // origins whose certificate only `node:https` accepts
  #system: string[] | undefined; // the system's certificates, once they were needed

  constructor(private readonly settings: Settings) {
    this.#findProxy = readProxies(settings.env);
  }

  [Symbol.dispose](): void {
    for (const client of this.#clients.values()) client.close();
    for (const agent of this.#agents.values()) agent.destroy();
  }

  proxyFor(url: URL): URL | undefined {
    return this.settings.fetch === undefined ? this.#findProxy(url) : undefined;
  }

  async send(exchange: Exchange): Promise<Answer> {
    const { url, proxy, signal } = exchange;
    while (true) {
      try {
        return await this.#sendOnce(exchange);
      } catch (error) {
        signal.throwIfAborted();
        if (error instanceof Deno.errors.NotCapable) throw error;
        const failedProxy = /\(Connect\)/.test(String((error as Error).cause)) ? proxy : undefined;
        const failure = error instanceof FetchWheelsError ? error : connectionError(url, { error, proxy: failedProxy });
        const isUntrusted = failure instanceof RequestError && failure.details.isCertificate;
        if (!isUntrusted || !await this.#extendTrust(url)) throw failure;
      }
    }
  }

  /** After a certificate was refused: trusts the system's certificates as well, then what only `node:https` accepts. */
  async #extendTrust({ origin }: URL): Promise<boolean> {
    const { fetch, insecure, env, signal } = this.settings;
    if (fetch !== undefined || insecure || this.#pinned.has(origin)) return false;
    if (this.#system !== undefined) {
      this.#pinned.add(origin);
      return true;
    }
    const certificates = await readSystemCertificates(env, signal);
    if (this.#system !== undefined) return true; // a concurrent request was faster
    this.#system = certificates;
    for (const client of this.#clients.values()) client.close();
    this.#clients.clear();
    return true;
  }

  async #sendOnce(exchange: Exchange): Promise<Answer> {
    const { url, proxy } = exchange;
    const { fetch: given, insecure } = this.settings;
    if (given !== undefined) return await sendByFetch(given, exchange);
    assertGranted({ name: "net", host: hostAndPort(url) });
    if (proxy !== undefined) assertGranted({ name: "net", host: hostAndPort(proxy) });
    // `fetch` obeys the environment of the process by itself.
    const isFetchProxied = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].some(readEnvironment);
    const isMisrouted = proxy === undefined ? isFetchProxied : !proxy.protocol.startsWith("socks");
    const needsNode = insecure || isMisrouted || this.#pinned.has(url.origin);
    if (url.protocol === "https:" && needsNode) return await sendByNode(await this.#agentFor(exchange), exchange);
    // Deno sends a proxy's user name and password only to a proxy of plain http.
    const user = url.protocol === "http:" && proxy?.protocol === "https:" ? urlCredentials(proxy) : undefined;
    if (user !== undefined) exchange.headers["proxy-authorization"] = basicAuthorization(user);
    return await sendByFetch(fetch, exchange, this.#clientFor(exchange));
  }

  #clientFor({ url, proxy }: Exchange): Deno.HttpClient {
    // Connecting to a fixed address bypasses the environment's proxies, but only for plain http.
    const isFixed = proxy === undefined && url.protocol === "http:";
    const address = { transport: "tcp", hostname: bareHost(url.hostname), port: Number(url.port || 80) } as const;
    const through = proxy && { url: withoutUser(proxy).href, basicAuth: urlCredentials(proxy) };
    const key = proxy?.href ?? (isFixed ? url.origin : "");
    const client = this.#clients.get(key) ?? Deno.createHttpClient({
      caCerts: [...this.settings.certificates, ...this.#system ?? []],
      // HTTP/2 would put all ranges on one connection, and that is the one that is throttled.
      http2: false,
      proxy: through ?? (isFixed ? address : undefined),
    });
    this.#clients.set(key, client);
    return client;
  }

  /** Node's modules are loaded when they are needed, because most runs do without them. */
  async #agentFor({ url, proxy }: Exchange): Promise<Agent> {
    const https = await import("node:https");
    const isPinned = this.#pinned.has(url.origin);
    const key = `${isPinned} ${proxy?.href}`;
    const agent = this.#agents.get(key) ?? new https.Agent({ keepAlive: true });
    this.#agents.set(key, agent);
    agent.createConnection = (target, callback) => {
      const { exchange } = target as ClientRequestArgs & { exchange: Exchange };
      const connecting = this.#tlsOptions(isPinned).then((options) => connectSecurely(exchange, options));
      connecting.then((socket) => callback?.(null, socket), (error) => callback?.(error, error));
      return undefined as never; // the callback receives the socket
    };
    return agent;
  }

  /** Without `ca`, Node's modules trust the built-in roots; to read those, Deno wants another permission. */
  async #tlsOptions(isPinned: boolean): Promise<ConnectionOptions> {
    const { insecure, certificates } = this.settings;
    if (insecure) return { rejectUnauthorized: false };
    if (!isPinned) return {};
    const tls = await import("node:tls");
    const given = certificates.map((text) => new crypto.X509Certificate(text).raw);
    return {
      ca: [...certificates, ...this.#system ?? []],
      // The very certificate that the user gave needs no matching name in it.
      checkServerIdentity: (host, certificate) =>
        given.some((raw) => raw.equals(certificate.raw)) ? undefined : tls.checkServerIdentity(host, certificate),
    };
  }
}

async function sendByFetch(send: typeof fetch, exchange: Exchange, client?: Deno.HttpClient): Promise<Answer> {
  const { url, method, headers, form, signal } = exchange;
  const init = { method, headers, body: form, redirect: "manual", signal, client } as const;
  const response = await untilAborted(send(url, init), signal);
  exchange.response = response;
  return { status: response.status, headers: response.headers, read: bodyReader(response.body) };
}

/** Reads into buffers of its own if it can: half the time and a third of the memory of the default reader. */
function bodyReader(stream: ReadableStream<Uint8Array<ArrayBuffer>> | null): Answer["read"] {
  if (stream === null) return () => Promise.resolve(undefined);
  let reader: ReadableStreamBYOBReader;
  try {
    reader = stream.getReader({ mode: "byob" });
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // a stream that someone else made may not be a byte stream
    const plain = stream.getReader();
    return async () => (await plain.read()).value;
  }
  let size = READ_BYTES;
  return async () => {
    const { done, value } = await reader.read(new Uint8Array(size));
    if (done || value === undefined) return undefined;
    size = Math.min(READ_BYTES, 2 * value.length); // a buffer that is hardly filled wastes memory while it waits
    return value;
  };
}

async function sendByNode(agent: Agent, exchange: Exchange): Promise<Answer> {
  const { url, method, headers, form, signal } = exchange;
  const all = form === undefined ? headers : { ...headers, "content-type": "application/x-www-form-urlencoded" };
  const https = await import("node:https");
  const answered = Promise.withResolvers<IncomingMessage>();
  // The agent passes `exchange` on to its `createConnection`.
  const options = { method, headers: all, agent, signal, exchange };
  const request = https.request(url, options, answered.resolve);
  request.on("error", answered.reject); // also keeps an error after the answer from being uncaught
  request.end(form?.toString());
  const answer = await untilAborted(answered.promise, signal);
  answer.on("error", () => {}); // the reader gets it
  const chunks = answer[Symbol.asyncIterator]();
  const read = async () => (await chunks.next()).value as Uint8Array | undefined;
  const fields = Object.entries(answer.headersDistinct).map(([name, values = []]) => [name, values.join(", ")]);
  return { status: answer.statusCode ?? 0, headers: new Headers(fields as [string, string][]), read };
}

/** Opens a TLS connection to a server, through a tunnel if there is a proxy. */
async function connectSecurely(exchange: Exchange, options: ConnectionOptions): Promise<TLSSocket> {
  const tls = await import("node:tls");
  const { url, signal } = exchange;
  const host = bareHost(url.hostname);
  const servername = net.isIP(host) ? "" : host;
  const socket = await openTunnel(exchange, options);
  const opened = Promise.withResolvers<void>();
  const target = { host, port: Number(url.port || 443), servername, socket };
  const secure = tls.connect({ ...options, ...target }, opened.resolve);
  secure.on("error", opened.reject); // also keeps a later error from being uncaught
  await untilAborted(opened.promise, signal).catch((error) => {
    secure.destroy();
    throw error;
  });
  return secure;
}

/** Opens a tunnel through an HTTP proxy, if there is one (RFC 9110, section 9.3.6). */
async function openTunnel({ url, proxy, signal }: Exchange, options: ConnectionOptions) {
  if (proxy === undefined) return undefined;
  const [http, tls] = await Promise.all([import("node:http"), import("node:tls")]);
  if (proxy.protocol.startsWith("socks")) {
    const hint = "SOCKS proxies do not work with --insecure or --ca-file";
    throw requestError(url, `proxy ${displayOrigin(proxy)} cannot be used here`, { isTransient: false, hint });
  }
  const authority = `${url.hostname}:${url.port || 443}`;
  const user = urlCredentials(proxy);
  const headers = { host: authority, ...(user && { "proxy-authorization": basicAuthorization(user) }) };
  const isSecure = proxy.protocol === "https:";
  const address = { host: bareHost(proxy.hostname), port: Number(proxy.port || (isSecure ? 443 : 80)) };
  const createConnection = () => isSecure ? tls.connect({ ...options, ...address }) : net.connect(address);
  const opened = Promise.withResolvers<net.Socket>();
  const request = http.request({ method: "CONNECT", path: authority, headers, createConnection });
  request.on("error", (error) => opened.reject(connectionError(url, { error, proxy })));
  request.on("connect", (answer, socket) => {
    if (answer.statusCode === 200) return opened.resolve(socket as net.Socket);
    socket.destroy();
    opened.reject(proxyStatusError(url, proxy, answer.statusCode ?? 0));
  });
  request.end();
  return await untilAborted(opened.promise, signal).catch((error) => {
    request.destroy();
    throw error;
  });
}

/** Reads the usual variables, in upper or lower case, and returns a function that finds the proxy for a URL. */
function readProxies(env: (name: string) => string | undefined): (url: URL) => URL | undefined {
  const read = (name: string): URL | undefined => {
    const variable = [name, name.toLowerCase()].find((candidate) => env(candidate)?.trim());
    const text = variable && env(variable)?.trim();
    if (!text) return undefined;
    const full = /^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `http://${text}`;
    const url = URL.parse(full);
    if (url?.hostname && /^(?:https?|socks5h?):$/.test(url.protocol)) return url;
    // The value is not shown, because it may hold a password.
    throw usageError(`Cannot use the proxy in $${variable}: it is not an http, https or socks5 URL`);
  };
  const all = read("ALL_PROXY");
  const [forHttp, forHttps] = [read("HTTP_PROXY") ?? all, read("HTTPS_PROXY") ?? all];
  const exempt = (env("NO_PROXY") || env("no_proxy") || "").toLowerCase().split(/[\s,]+/).filter(Boolean);
  return (url) => {
    // Loopback never goes through a proxy, as in Go.
    if (isLoopback(url.hostname) || exempt.some((entry) => matchesNoProxy(url, entry))) return undefined;
    return url.protocol === "https:" ? forHttps : forHttp;
  };
}

/** An entry is `*`, a host with its subdomains (also `.host`, `*.host`), `host:port`, an address or a CIDR block. */
function matchesNoProxy(url: URL, entry: string): boolean {
  const host = bareHost(url.hostname).replace(/\.$/, "");
  const [, name = entry, port] = /^(\[[^\]]*\]|[^:]*):(\d+)$/.exec(entry) ?? [];
  const defaultPort = url.protocol === "https:" ? 443 : 80;
  if (port !== undefined && Number(port) !== Number(url.port || defaultPort)) return false;
  const wanted = bareHost(name).replace(/^\*?\./, "").replace(/\.$/, "");
  return wanted === "*" || host === wanted || isInBlock(host, wanted) || wanted !== "" && host.endsWith(`.${wanted}`);
}

/** Reports whether an address is in a CIDR block, or is the address that the block consists of. */
function isInBlock(address: string, block: string): boolean {
  const [base = "", bits = net.isIPv6(base) ? "128" : "32"] = block.split("/");
  const family = net.isIPv6(base) ? "ipv6" : "ipv4";
  const isBlock = net.isIP(base) !== 0 && /^\d{1,3}$/.test(bits) && Number(bits) <= (family === "ipv6" ? 128 : 32);
  if (!isBlock || net.isIP(address) === 0) return false;
  const list = new net.BlockList();
  list.addSubnet(base, Number(bits), family);
  return list.check(address, net.isIPv6(address) ? "ipv6" : "ipv4");
}

/** Removes the brackets of an IPv6 address. */
function bareHost(hostname: string): string {
  return hostname.replace(/^\[|\]$/g, "");
}

/** Loopback, private, link-local and unspecified addresses; RFC 1918, RFC 3927, RFC 4193, RFC 4291, RFC 6598. */
// deno-fmt-ignore
const PRIVATE_BLOCKS = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
  "192.168.0.0/16", "::/128", "::1/128", "fc00::/7", "fe80::/10"];

/** Reports whether a host is a private address, also as an IPv4-mapped IPv6 one, or `localhost`. */
function isPrivateHost(hostname: string): boolean {
  return isLoopback(hostname) || PRIVATE_BLOCKS.some((block) => isInBlock(bareHost(hostname), block));
}

/** Reports whether a host is private, or its name is usually resolved on the local network only. */
function isLocalHost(hostname: string): boolean {
  return isPrivateHost(hostname) || /^[^.:[\]]+$|\.(?:local|internal)$/.test(hostname);
}

function isLoopback(hostname: string): boolean {
  const host = bareHost(hostname);
  return /^(?:.+\.)?localhost\.?$/i.test(host) || ["127.0.0.0/8", "::1"].some((block) => isInBlock(host, block));
}

async function readCertificates(file: string, signal: AbortSignal): Promise<string[]> {
  if (!fs.existsSync(file)) throw usageError(`Cannot use certificates in ${quote(file)}: no such file`);
  const text = new TextDecoder().decode(await readUserFile(file, signal));
  const pattern = /-----BEGIN (?:TRUSTED )?CERTIFICATE-----[^-]*(?:-----END [A-Z ]*CERTIFICATE-----)?/g;
  const blocks = text.match(pattern) ?? [];
  const fail = (state: string) => usageError(`Cannot use certificates in ${quote(file)}: ${state}`);
  if (blocks.length === 0) throw fail("it has no PEM certificate");
  for (const [at, block] of blocks.entries()) {
    try {
      new crypto.X509Certificate(block);
      Deno.createHttpClient({ caCerts: [block] }).close();
    } catch {
      throw fail(`certificate ${at + 1} of ${blocks.length} is not valid PEM`);
    }
  }
  return blocks;
}

/** The usual files in which distributions keep their certificates, as Go lists them. */
// deno-fmt-ignore
const SYSTEM_CERTIFICATES = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem", "/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
  "/etc/ssl/cert.pem"];

/** Reads `$SSL_CERT_FILE`, else the system's bundle, as Go and curl do. A file that Deno may not read is skipped. */
async function readSystemCertificates(env: Settings["env"], signal: AbortSignal): Promise<string[]> {
  const file = env("SSL_CERT_FILE") || SYSTEM_CERTIFICATES.find(isReadable);
  return file === undefined ? [] : await readCertificates(file, signal);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 Registry: challenge to Authorization, on demand; manifests; blobs, resumed after failures and in parallel ranges.
// ---------------------------------------------------------------------------------------------------------------------

/** How one registry, or a mirror of it, is reached. */
interface RegistryOptions {
  image: ImageReference;
  bases: URL[]; // of which the first that can be connected to is used
  credentials: () => Promise<UsableCredentials | undefined>;
  isMirror: boolean; // a mirror gets `?ns=REGISTRY`, as containerd sends it, and no retries
}

interface GetOptions extends Pick<HttpRequest, "headers" | "isVerified" | "signal"> {
  expected?: number[]; // statuses besides success that are not an error
}

/** Serves one repository of a registry, and authorizes the requests at whichever origin challenges. */
class Registry implements ImageStore {
  readonly #settings: Settings; // a mirror's have no retries
  readonly #name: string;
  readonly #authorizers = new Map<string, Authorizer>();
  #bases: URL[];
  #hasPinged = false;

  constructor(readonly http: HttpClient, readonly options: RegistryOptions) {
    this.#settings = options.isMirror ? { ...http.settings, retries: 0 } : http.settings;
    this.#name = formatReference(options.image);
    this.#bases = options.bases;
  }

  async manifest(reference: string): Promise<ManifestAnswer> {
    const headers = { accept: [...INDEX_TYPES, ...MANIFEST_TYPES, ...SCHEMA1_TYPES].join(", ") };
    const options = { headers, isVerified: DIGEST.test(reference) };
    const { response, body } = await this.#getDocument(`manifests/${reference}`, options);
    if (body === undefined) {
      throw integrityError(`Cannot read manifest ${quote(this.#name)}: it has more than ${MAX_MANIFEST_BYTES} bytes`);
    }
    const contentType = response.headers.get("content-type") ?? undefined;
    return { body, contentType, digest: response.headers.get("docker-content-digest") ?? undefined };
  }

  blob({ digest, size }: Descriptor, offset: number): AsyncIterable<Uint8Array> {
    const { isMirror } = this.options;
    const get = (options: GetOptions) => this.#get(`blobs/${digest}`, options);
    return new BlobDownload(this.http, { get, name: digest, size, isMirror, isImmutable: true }).bytes(offset);
  }

  async referrers(digest: string): Promise<Descriptor[]> {
    const options = { headers: { accept: INDEX_TYPES.join(", ") }, expected: [400, 404, 405] };
    const found: Descriptor[] = [];
    let query: string | undefined = "";
    for (let page = 0; page < MAX_PAGES && found.length < MAX_REFERRERS && query !== undefined; page++) {
      const { response, body } = await this.#getDocument(`referrers/${digest}${query}`, options);
      const list = response.isOk ? parseJson(body)?.manifests : [];
      for (const entry of [list ?? []].flat()) {
        const { digest, mediaType } = entry ?? {};
        if (typeof digest === "string" && DIGEST.test(digest)) found.push({ digest, mediaType });
      }
      const [, next] = /<([^<>]*)>\s*;[^,<]*\brel="?next\b/i.exec(response.headers.get("link") ?? "") ?? [];
      query = next === undefined ? undefined : URL.parse(next, response.url)?.search;
    }
    return found;
  }

  #getDocument(path: string, options: GetOptions): Promise<HttpDocument> {
    const attempt = async () => this.http.readDocument(await this.#get(path, options), MAX_MANIFEST_BYTES);
    return new RetryBudget(this.#settings).retry(attempt);
  }

  /** GETs a path below `/v2/<repository>/`. An answer that is neither a success nor expected is an error. */
  async #get(path: string, { expected = [], ...request }: GetOptions): Promise<HttpResponse> {
    let hasRenewed = false;
    for (let answered = 0;; answered++) {
      await Promise.all([...this.#authorizers.values()].map((authorizer) => authorizer.refresh()));
      const sent = new Map([...this.#authorizers].map(([origin, { header }]) => [origin, header]));
      const urls = this.#bases.map((base) => this.#endpoint(base, path));
      const response = await this.http.request(urls, { ...request, authorizations: sent });
      this.#adoptOrigin(response);
      if (response.isOk) return response;
      const header = sent.get(response.url.origin);
      const isToken = header?.startsWith("Bearer ") ?? false;
      // ECR Public answers 400 to a token that has expired.
      const isRefusal = response.status === 401 || response.status === 400 && isToken;
      if (isRefusal && answered < MAX_CHALLENGES && (header === undefined || isToken && !hasRenewed)) {
        hasRenewed ||= isToken;
        if (await this.#answerChallenge(response, header)) continue;
      }
      if (expected.includes(response.status)) return response;
      if (await this.#authorizeByPing(response)) continue;
      throw await this.#answerError(response, path);
    }
  }

  #endpoint(base: URL, path: string): URL {
    const { image, isMirror } = this.options;
    const prefix = base.pathname.replace(/\/$/, "");
    // A mirror whose path begins with /v2 is a prefix as it is: containerd's override_path, Harbor's proxy projects.
    const root = /^\/v2(?:\/|$)/.test(prefix) ? prefix : `${prefix}/v2`;
    const url = new URL(`${root}/${image.repository}/${path}`, base);
    if (isMirror) url.searchParams.set("ns", image.registry);
    return url;
  }

  /** Stays with the URL that answered; a redirect from http to https on the same host is an upgrade of the registry. */
  #adoptOrigin({ url, requestUrl }: HttpResponse): void {
    const base = this.#bases.find(({ origin }) => origin === requestUrl.origin);
    if (base === undefined) return; // a concurrent request has adopted another origin
    const isUpgrade = requestUrl.protocol === "http:" && url.protocol === "https:" &&
      url.hostname === requestUrl.hostname && url.pathname === requestUrl.pathname;
    this.#bases = [isUpgrade ? new URL(base.pathname, url) : base];
  }

  #isOwn(url: URL): boolean {
    return this.#bases.some(({ origin }) => origin === url.origin);
  }

  /** Answers a refusal of the header `sent`. Returns false if it did not come from a registry. */
  async #answerChallenge({ url, headers, cancel }: HttpResponse, sent: string | undefined): Promise<boolean> {
    const challenges = parseChallenges(headers.get("www-authenticate") ?? "");
    // A storage that refuses an expired signature is not a registry.
    if (!this.#isOwn(url) && !(url.pathname.startsWith("/v2/") && challenges.length > 0)) return false;
    cancel();
    const { image, credentials } = this.options;
    const repository = /\/v2\/(.{1,255})\/(?:manifests|blobs|referrers)\//.exec(url.pathname)?.[1] ?? image.repository;
    // A registry that this one redirects to gets anonymous requests only.
    const find = this.#isOwn(url) ? credentials : () => Promise.resolve(undefined);
    const options = { base: url, name: this.#name, repository, credentials: find, settings: this.#settings };
    const authorizer = this.#authorizers.get(url.origin) ?? new Authorizer(this.http, options);
    this.#authorizers.set(url.origin, authorizer);
    await authorizer.answer(sent, challenges);
    return true;
  }

  /** Some registries answer 403 or 404 to anonymous requests, and challenge at `/v2/` only. */
  async #authorizeByPing({ status, url, headers, cancel }: HttpResponse): Promise<boolean> {
    const isCandidate = (status === 403 || status === 404) && !headers.has("www-authenticate") && this.#isOwn(url);
    if (!isCandidate || this.#hasPinged || this.#authorizers.has(url.origin)) return false;
    this.#hasPinged = true;
    const ping = await new RetryBudget(this.#settings).retry(() => this.http.request([new URL("/v2/", url)], {}));
    // Without credentials, only a token can help.
    const hasBearer = /\bbearer\b/i.test(ping.headers.get("www-authenticate") ?? "");
    const isUseful = hasBearer || await this.options.credentials() !== undefined;
    const isChallenged = ping.status === 401 && isUseful && await this.#answerChallenge(ping, undefined);
    ping.cancel();
    if (isChallenged) cancel();
    return isChallenged;
  }

  /** Makes the error of an answer; transient if it is a signed URL that has expired: the registry signs another one. */
  async #answerError(response: HttpResponse, path: string): Promise<FetchWheelsError> {
    const { status, url } = response;
    const isAuth = status === 401 || status === 403;
    const isMissing = status === 404 && path.startsWith("manifests/");
    const missing = isMissing ? "check the name and the tag; some registries answer 404 for private images" : undefined;
    const hint = isAuth && this.#isOwn(url) ? credentialsHint(await this.options.credentials()) : missing;
    const error = await this.http.statusError(response, `Cannot fetch ${quote(this.#name)}`, hint);
    if (this.#isOwn(url) || !isAuth) return error;
    return new RequestError(error.message, { kind: error.kind, hint: error.hint });
  }
}

function credentialsHint(credentials: UsableCredentials | undefined): string {
  if (credentials === undefined) return `check the name; if the image is private, ${PASSWORD_HINT}`;
  const user = "username" in credentials ? `, and whether ${quote(credentials.username)} may pull this image` : "";
  return `check the user name and the password${user}`;
}

interface AuthorizerOptions {
  base: URL; // which challenged
  name: string; // of the image, for messages
  repository: string; // at this origin
  credentials: () => Promise<UsableCredentials | undefined>;
  settings: Settings; // a mirror's have no retries
}

/** Turns the challenges of one origin into an Authorization header, and renews it. Concurrent requests share a renewal. */
class Authorizer {
  header: string | undefined;
  #expires = Infinity;
  #challenges: Challenge[] = [];
  #renewal: Promise<void> | undefined;

  constructor(readonly http: HttpClient, readonly options: AuthorizerOptions) {}

  async refresh(): Promise<void> {
    if (this.#expires <= this.http.settings.now()) await this.#renew();
  }

  /** Answers a refusal of `sent`. Without challenges, the last ones are answered again. */
  async answer(sent: string | undefined, challenges: Challenge[]): Promise<void> {
    if (this.header !== sent) return; // another request has renewed it in the meantime
    if (challenges.length > 0) this.#challenges = challenges;
    await this.#renew();
  }

  #renew(): Promise<void> {
    this.#renewal ??= this.#authorize().finally(() => this.#renewal = undefined);
    return this.#renewal;
  }

  /** Bearer first, then Basic, as the challenges allow. */
  async #authorize(): Promise<void> {
    const { base } = this.options;
    const { protocol } = this.http.settings;
    const bearer = this.#challenges.find(({ scheme, parameters }) => scheme === "bearer" && parameters.realm);
    if (bearer === undefined && !this.#challenges.some(({ scheme }) => scheme === "basic")) {
      const schemes = this.#challenges.map(({ scheme }) => scheme).join(", ") || "none";
      throw this.#error(`the registry requires an unsupported authentication scheme: ${schemes.slice(0, MAX_SHOWN)}`);
    }
    const realm = bearer && this.#parseRealm(bearer.parameters.realm ?? "");
    const credentials = await this.options.credentials();
    // Plain http shows a password to everyone between: only if the user asked for http, or nothing is between.
    const isExposed = (url: URL) => url.protocol === "http:" && protocol !== "http" && !isLoopback(url.hostname);
    const exposed = credentials && [base, realm ?? base].find(isExposed);
    if (exposed !== undefined) {
      const state = `no password is sent to ${displayUrl(exposed)} over plain http`;
      throw this.#error(state, "to allow it, pass --protocol http");
    }
    if (credentials !== undefined && "registryToken" in credentials) {
      this.header = `Bearer ${credentials.registryToken}`;
    } else if (realm !== undefined) {
      await this.#fetchToken(realm, bearer?.parameters ?? {});
    } else if (credentials === undefined) {
      throw this.#error("the registry requires a user name and a password", PASSWORD_HINT);
    } else if (!("username" in credentials)) {
      throw this.#error("the registry does not accept an identity token", PASSWORD_HINT);
    } else {
      this.header = basicAuthorization(credentials);
    }
  }

  #error(state: string, hint?: string): FetchWheelsError {
    return new FetchWheelsError("auth", `Cannot fetch ${quote(this.options.name)}: ${state}`, { hint });
  }

  #parseRealm(text: string): URL {
    const realm = resolveHttpUrl(text, this.options.base);
    if (realm === undefined) {
      throw this.#error(`the token service ${quote(text.split("?")[0] ?? "")} is not an http(s) URL`);
    }
    this.#checkRealm(realm);
    return realm;
  }

  /** Keeps a registry from sending the client to private services, such as a cloud's metadata (GHSA-xf85-363p-868w). */
  #checkRealm(realm: URL): void {
    const { base } = this.options;
    const what = `the token service ${quote(displayUrl(realm))}`;
    if (realm.protocol === "http:" && base.protocol === "https:") {
      throw this.#error(`${what} uses plain http, but the registry uses https`);
    }
    if (isPrivateHost(realm.hostname) && !isLocalHost(base.hostname)) {
      throw this.#error(`${what} has a private address, but the registry is public`);
    }
  }

  /** Token Authentication Specification. An identity token is POSTed; services without OAuth2 get it as a password. */
  async #fetchToken(realm: URL, { service = "", scope }: Challenge["parameters"]): Promise<void> {
    const { name, repository, settings } = this.options;
    const credentials = await this.options.credentials();
    const requested = settings.now();
    const scopes = [...new Set([`repository:${repository}:pull`, scope || []].flat())];
    const checkRedirect = (url: URL) => this.#checkRealm(url);
    const request = (url: URL, options: HttpRequest) =>
      new RetryBudget(settings).retry(async () => {
        const response = await this.http.request([url], { ...options, checkRedirect });
        return await this.http.readDocument(response, MAX_TOKEN_BYTES);
      });
    const url = new URL(realm);
    if (service !== "") url.searchParams.set("service", service);
    scopes.forEach((text) => url.searchParams.append("scope", text));
    const identity = credentials && "identityToken" in credentials ? credentials.identityToken : undefined;
    const form = new URLSearchParams({ grant_type: "refresh_token", client_id: "fetch_wheels", service });
    form.set("scope", scopes.join(" "));
    form.set("refresh_token", identity ?? "");
    const posted = identity === undefined ? undefined : await request(realm, { form });
    const given = credentials && "username" in credentials ? credentials : undefined;
    const user = identity === undefined ? given : { username: IDENTITY_USER, password: identity };
    const header = user && basicAuthorization(user);
    const authorizations = new Map([[url.origin, header]]);
    const { response, body } = posted?.response.isOk ? posted : await request(url, { authorizations });

    const what = `Cannot get a token for ${quote(name)}`;
    const json = parseJson(body);
    if (!response.isOk) {
      const isAuth = response.status === 401 || response.status === 403;
      const words = registryWords(json);
      const state = `${displayUrl(response.url)} answered ${response.status}${words && ` (${words})`}`;
      const hint = isAuth ? credentialsHint(credentials) : undefined;
      throw new FetchWheelsError(isAuth ? "auth" : "network", `${what}: ${state}`, { hint });
    }
    const token = json?.token || json?.access_token;
    if (typeof token !== "string" || !TOKEN.test(token)) {
      throw new FetchWheelsError("auth", `${what}: the answer of ${displayUrl(response.url)} has no token`);
    }
    const seconds = Number(json?.expires_in) > 0 ? Number(json?.expires_in) : DEFAULT_TOKEN_SECONDS;
    this.header = `Bearer ${token}`;
    this.#expires = requested + seconds * 1000;
  }
}

/**
 * Parses a `WWW-Authenticate` header, which may hold several challenges (RFC 9110, section 11.6.1).
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
 * @returns The challenges in order; of a malformed header, what was readable before the fault
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
    const scheme = take(/^([!#$%&'*+.^_`|~\w-]+)(?:\s+|(?=,|$))/)?.[1];
    if (scheme === undefined) return challenges;
    const token68 = take(/^([\w.~+/-]+=*)\s*(?=,|$)/)?.[1];
    challenges.push({ scheme: scheme.toLowerCase(), parameters: {}, ...(token68 !== undefined && { token68 }) });
  }
  return challenges;
}

interface DownloadOptions {
  /** Requests the content; an answer that is neither a success nor expected is an error. */
  get: (options: GetOptions) => Promise<HttpResponse>;
  name: string; // of the content, in messages
  size?: number; // in bytes; without it, the first answer says it
  isMirror: boolean; // the first answer that is not right ends the download
  isImmutable: boolean; // a digest names the content: requests for parts of it get the same, and may run in parallel
}

/** The bytes `[at, to)` that one connection delivers. Lowering `to` cuts it short. */
interface Span {
  at: number;
  to: number;
  hasBytes: boolean;
  hasEnded: boolean; // all of it has arrived; its connection is free
  turn: PromiseWithResolvers<void>; // resolved when it is the first span
}

function newSpan(at: number, to: number): Span {
  return { at, to, hasBytes: false, hasEnded: false, turn: Promise.withResolvers() };
}

/** Downloads one blob, not verified: resumes after each failure, and uses several connections if that is faster. */
class BlobDownload {
  readonly #pace: ConnectionPace;
  readonly #total = { failures: 0 };
  readonly #stop = new AbortController();
  readonly #signal: AbortSignal;
  /** What is being downloaded, in order; the first span is what the consumer reads. */
  readonly #spans: { span: Span; chunks: AsyncIterable<Uint8Array> }[] = [];
  #size: number; // Infinity as long as it is not known
  #location: URL | undefined; // where the registry redirected to; usable until its signature expires
  #validator: string | undefined; // strong entity tag, for `If-Range`
  #hasStableTags = true; // false once the same content has had two entity tags, as from different storages
  #ahead = 0; // bytes that have arrived, but have not been delivered
  #hasRanges = true; // false once the server has ignored a range; only a download that is resumed asks again
  /** One connection until the server announces ranges, two until it has sent one: a proxy may not pass them on. */
  #maxConnections = 1;

  constructor(readonly http: HttpClient, readonly options: DownloadOptions) {
    this.#size = options.size ?? Infinity;
    this.#pace = new ConnectionPace(options.isImmutable ? http.settings.connections : 1, http.settings.now);
    this.#signal = AbortSignal.any([http.settings.signal, this.#stop.signal]);
  }

  async *bytes(from: number): AsyncGenerator<Uint8Array> {
    const { now } = this.http.settings;
    const whole = newSpan(from, this.#size);
    this.#spans.push({ span: whole, chunks: this.#read(whole) });
    try {
      for (let first = this.#spans[0]; first !== undefined; first = this.#spans[0]) {
        for await (const chunk of first.chunks) {
          this.#countArrived(-chunk.length);
          const delivered = now();
          yield chunk;
          this.#pace.consumerMs += now() - delivered;
          this.#schedule(first.span);
        }
        this.#spans.shift();
        this.#spans[0]?.span.turn.resolve();
        this.#schedule(first.span);
      }
    } finally {
      this.#stop.abort(); // ends the spans that run ahead
      this.#countArrived(-this.#ahead);
    }
  }

  #countArrived(bytes: number): void {
    this.#ahead += bytes;
    this.http.meter?.arrived(bytes);
  }

  /** Starts what the pace allows: cuts the single stream short, and opens ranges behind it. */
  #schedule(first: Span): void {
    const bytesLeft = this.#size - first.at;
    const limit = this.#hasRanges && this.#size < Infinity ? this.#maxConnections : 1;
    const wanted = Math.min(this.#pace.connections(this.#countRunning(), bytesLeft), limit);
    const isSingle = this.#spans.length === 1 && first.to === this.#size;
    if (isSingle && wanted > 1 && bytesLeft > PARALLEL_BYTES) {
      first.to = Math.min(first.at + Math.max(RANGE_BYTES, this.#pace.sampleBytes), this.#size);
    }
    const isFree = () => this.#spans.filter(({ span }) => !span.hasEnded).length < wanted;
    let last = this.#spans.at(-1)?.span ?? first;
    while (last.to < this.#size && isFree() && this.#spans.length < MAX_WAITING * wanted) {
      const to = wanted === 1 ? this.#size : Math.min(last.to + RANGE_BYTES, this.#size);
      last = newSpan(last.to, to);
      this.#spans.push({ span: last, chunks: prefetch(this.#read(last), RANGE_BYTES + 1) });
    }
  }

  /** Yields the bytes of a span. A connection that dies is replaced by one that asks for the rest. */
  async *#read(span: Span): AsyncGenerator<Uint8Array> {
    const { settings } = this.http;
    const retries = this.options.isMirror ? 0 : settings.retries;
    const budget = new RetryBudget({ ...settings, retries, signal: this.#signal }, this.#total);
    using _ = {
      [Symbol.dispose]: () => {
        span.hasEnded = true;
        const first = this.#spans[0]?.span;
        if (first !== undefined && !this.#signal.aborted) this.#schedule(first);
      },
    };
    while (span.at < span.to) {
      const from = span.at;
      try {
        const { response, start } = await this.#open(span);
        span.to = Math.min(span.to, this.#size);
        let skip = span.at - start;
        for await (const chunk of response.body()) {
          const fresh = chunk.subarray(skip);
          skip -= chunk.length - fresh.length;
          if (fresh.length === 0) continue;
          // Bytes beyond the content's own end are passed on, so that the verification sees them.
          const wanted = span.to < this.#size ? fresh.subarray(0, span.to - span.at) : fresh;
          span.at += wanted.length;
          span.hasBytes = true;
          budget.progress();
          this.#pace.bytes += wanted.length;
          this.#countArrived(wanted.length);
          yield wanted;
          if (span.at >= span.to && span.to < this.#size) break;
        }
        if (span.to === Infinity) return;
        const isLimited = span.at - from >= READ_BYTES; // some servers limit the size of a range
        if (span.at < span.to && !isLimited) {
          throw this.#error(`the answer ended after ${span.at} of ${this.#size} bytes`);
        }
      } catch (error) {
        if (!this.#isRefusedAhead(span, error)) await budget.spend(error);
        else {
          this.#pace.lowerLimit(this.#countRunning());
          await untilAborted(span.turn.promise, this.#signal);
        }
      }
    }
  }

  #countRunning(): number {
    return this.#spans.filter(({ span }) => span.hasBytes && !span.hasEnded).length;
  }

  /** Reports whether the server has refused a further connection, of a span that can wait until it is the first. */
  #isRefusedAhead(span: Span, error: unknown): boolean {
    const isRefusal = error instanceof RequestError && error.details.status !== undefined;
    return isRefusal && !span.hasBytes && span !== this.#spans[0]?.span && !this.options.isMirror;
  }

  #error(state: string, details: FailureDetails = { kind: "integrity" }): RequestError {
    return new RequestError(`Cannot fetch ${quote(this.options.name)}: ${state}`, details);
  }

  /** Requests the bytes of a span, and finds out where the answer really begins. */
  async #open(
    span: Span,
    { isPart = span.at > 0 || span.to < this.#size } = {},
  ): Promise<{ response: HttpResponse; start: number }> {
    const { at, to } = span;
    const isResumed = at > 0 && !this.options.isImmutable;
    if (isResumed && this.#validator === undefined) {
      throw this.#error(`connection lost after ${at} bytes`, { isTransient: false });
    }
    const headers: Record<string, string> = {};
    if (isPart) headers.range = `bytes=${at}-${to === Infinity ? "" : to - 1}`;
    if (isPart && this.#validator !== undefined) headers["if-range"] = this.#validator;
    const response = await this.#request(headers);
    const isRange = isPart && response.status === 206 && this.#isRequestedRange(response, { at, to });
    const tag = response.headers.get("etag");
    if (isResumed && response.isOk && tag !== this.#validator && !(isRange && tag === null)) {
      response.cancel();
      throw this.#error("it changed during the download", { isTransient: false });
    }
    const isIgnored = headers["if-range"] !== undefined && !isRange;
    if (isIgnored && this.options.isImmutable) this.#hasStableTags = false;
    if (!this.#hasStableTags) this.#validator = undefined;
    else if (tag?.startsWith('"')) this.#validator = tag;
    if (isRange) {
      this.#maxConnections = Infinity;
      return { response, start: at };
    }
    if (isPart) this.#hasRanges = false;
    if (response.status !== 200) {
      response.cancel();
      if (isPart) return await this.#open(span, { isPart: false });
      throw await this.http.statusError(response, `Cannot fetch ${quote(this.options.name)}`);
    }
    this.#checkLength(response);
    if (response.headers.get("accept-ranges") === "bytes") this.#maxConnections = Math.max(2, this.#maxConnections);
    // An answer with everything goes on to the end, instead of a further one.
    if (span === this.#spans.at(-1)?.span) span.to = this.#size;
    return { response, start: 0 };
  }

  /** RFC 9110, section 14.4: start, end and total must be those that were requested; a shorter end is allowed. */
  #isRequestedRange({ headers }: HttpResponse, { at, to }: Pick<Span, "at" | "to">): boolean {
    const [, first, last, total] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(headers.get("content-range") ?? "") ?? [];
    const isTotal = total === "*" || this.#size === Infinity || Number(total) === this.#size;
    return Number(first) === at && Number(last) >= at && Number(last) < to && isTotal;
  }

  /** An answer of another length is not the content; a page in HTML is a login form or a proxy's message. */
  #checkLength(response: HttpResponse): void {
    const header = response.headers.get("content-length");
    const length = header === null ? undefined : parseInt(header); // it may be repeated: "5, 5"
    if (this.#size === Infinity) this.#size = length ?? Infinity;
    const isWrong = length !== undefined && length !== this.#size;
    const isHtml = /^text\/html\b/i.test(response.headers.get("content-type") ?? "");
    if (!isWrong && !(isHtml && (length === undefined || this.options.isMirror))) return;
    response.cancel();
    const html = `${displayUrl(response.url)} answered with text/html (a login page or a proxy?)`;
    if (isHtml) throw this.#error(html, { isTransient: false });
    const encoding = response.headers.get("content-encoding");
    const sent = encoding === null ? "" : ` as ${quote(encoding)}, which was not requested`;
    throw this.#error(`it has ${length} bytes${sent}, but the manifest says ${this.#size}`);
  }

  /** Requests the place that the registry redirected to until it refuses; then the registry signs another one. */
  async #request(headers: Record<string, string>): Promise<HttpResponse> {
    const request = { headers, isVerified: this.options.isImmutable, signal: this.#signal };
    for (let location = this.#location; location !== undefined; location = this.#location) {
      let isUsable = false;
      try {
        const response = await this.http.request([location], request);
        isUsable = response.isOk || response.status === 416;
        if (isUsable) return response;
        response.cancel();
      } finally {
        // Another span may have got a new one.
        if (!isUsable && this.#location === location) this.#location = undefined;
      }
    }
    const expected = headers.range === undefined ? [] : [400, 416];
    const response = await this.options.get({ ...request, expected });
    const { url, requestUrl } = response;
    if (response.isOk && url.origin !== requestUrl.origin && !url.pathname.startsWith("/v2/")) this.#location = url;
    return response;
  }
}

/**
 * Decides how many connections a download uses. It starts with one, because on a fast link ranges cost more than they
 * bring. More are opened while the network is what the download waits for, and given up if the total rate does not rise.
 */
class ConnectionPace {
  bytes = 0; // received since the start of the measurement
  consumerMs = 0; // spent since then waiting for the consumer
  sampleBytes = 0; // that arrive within SAMPLE_MS
  #started: number | undefined;
  #samples = 0;
  #connections = 1;
  #before: { rate: number; connections: number } | undefined; // before the last growth, until that is judged
  #isSettling = false;
  #pausedUntil = 0;

  constructor(private limit: number, private readonly now: () => number) {}

  /** Stays with as many connections as the server has accepted. */
  lowerLimit(accepted: number): void {
    this.limit = Math.max(1, Math.min(this.limit, accepted));
    this.#measure(this.#connections);
  }

  /** Returns the number of connections for the bytes that are left; `running` spans have delivered some. */
  connections(running: number, bytesLeft: number): number {
    const now = this.now();
    const elapsed = now - (this.#started ?? now);
    if (this.#started === undefined) this.#measure(1); // the time to connect says nothing about the rate
    if (elapsed < SAMPLE_MS * (this.#samples + 1)) return this.#connections;
    this.#samples++;
    const rate = this.bytes / elapsed * 1000;
    const isNetworkBound = this.consumerMs < elapsed / 2;
    this.sampleBytes = Math.round(rate * SAMPLE_MS / 1000);
    if (this.#isSettling) {
      if (running >= this.#connections || this.#samples >= MAX_SETTLING_SAMPLES) this.#measure(this.#connections);
    } else if (this.#before !== undefined) {
      const { rate: before, connections } = this.#before;
      if (rate >= before * WORTHWHILE_GAIN) {
        this.#before = undefined;
      } else if (this.#samples >= (isNetworkBound ? JUDGED_SAMPLES : MAX_SAMPLES)) {
        this.#before = undefined;
        this.#pausedUntil = now + PAUSE_MS;
        this.#measure(connections);
      }
    } else if (!isNetworkBound) {
      this.#measure(this.#connections); // a slow consumer hides the rate of the network
    } else if (rate < FAST_BYTES_PER_SECOND && this.#connections < this.limit) {
      const isLong = bytesLeft > Math.max(PARALLEL_BYTES, 2 * this.sampleBytes);
      if (isLong && now >= this.#pausedUntil) {
        this.#before = { rate, connections: this.#connections };
        this.#measure(this.#connections * 4);
        this.#isSettling = true;
      }
    }
    if (this.#samples >= MAX_SAMPLES) this.#measure(this.#connections); // the link may have changed
    return this.#connections;
  }

  #measure(connections: number): void {
    this.#connections = Math.min(connections, this.limit);
    this.#isSettling = false;
    this.#started = this.now();
    this.#samples = 0;
    this.bytes = 0;
    this.consumerMs = 0;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Stores: the same answers from a registry, a mirror, a cache, an OCI layout, a `docker save` archive.
// ---------------------------------------------------------------------------------------------------------------------

/** Chunks of bytes, in order. */
type Bytes = AsyncIterable<Uint8Array>;

/** A manifest as a store has it. `digest` is what the registry says is its digest. */
type ManifestAnswer = { body: Uint8Array; contentType?: string; digest?: string };

/** Serves one image. What it returns is not verified yet. */
interface ImageStore {
  /** Returns a manifest or an index, by tag or digest; a mirror need not have those of signatures. */
  manifest(reference: string, role?: "signature"): Promise<ManifestAnswer>;
  /** Yields a blob from an offset on, which is 0 except in a registry or a mirror. */
  blob(descriptor: Descriptor, offset: number): Bytes;
  /** Returns the manifests that refer to this digest, as far as the store can list them. */
  referrers(digest: string): Promise<Descriptor[]>;
}

/** Where the bytes come from: a store with an image, or a tarball. */
type Origin = ImageOrigin | { kind: "tarball"; tarball: Part; bytes: Bytes };
type ImageOrigin = { kind: ImageKind; image: ImageReference; store: ImageStore };
type ImageKind = "registry" | "oci" | "oci-archive" | "docker-archive";

/** `mirrors` are those to ask. `isFresh` says whether to ignore what the cache has, and to fetch it again. */
interface SourceOptions {
  settings: Settings;
  client: HttpClient;
  mirrors: URL[];
  isFresh: boolean;
  suspects: Suspects;
}

function openSource(source: Source, options: SourceOptions): Origin {
  if ((source.kind === "url" || source.kind === "file") && options.settings.verifyKeys.length > 0) {
    throw usageError("Cannot use --verify-key with a tarball: only images are signed");
  }
  switch (source.kind) {
    case "image":
      return { kind: "registry", image: source.image, store: openImageStore(source.image, options) };
    case "url": {
      const tarball = { name: displayUrl(source.url), index: 1 };
      return { kind: "tarball", tarball, bytes: urlBytes(source.url, options.client) };
    }
    case "file": {
      const tarball = { name: source.path, index: 1, size: fileSize(source.path) };
      return { kind: "tarball", tarball, bytes: readFile(source.path) };
    }
    default: {
      const { kind, path, tag } = source;
      const text = `${kind}:${path}${tag === undefined ? "" : `:${tag}`}`;
      const open = openMembers(source, { text, signal: options.settings.signal });
      const store = kind === "docker-archive" ? dockerArchiveStore(open, text) : layoutStore(open, text);
      return { kind, image: { registry: `${kind}:${path}`, repository: "", tag }, store };
    }
  }
}

/** Mirrors first, then the registry; before both the cache. */
function openImageStore(image: ImageReference, options: SourceOptions): ImageStore {
  const { settings, client, isFresh, suspects } = options;
  const { protocol, cache, report } = settings;
  const finder = new CredentialFinder(settings);
  const bases = baseUrls(image.registry, protocol);
  const registry = new Registry(client, { image, bases, credentials: () => finder.find(image), isMirror: false });
  const mirrors = options.mirrors.map((url) => {
    const user = Promise.resolve(urlCredentials(url));
    const mirror = { image, bases: [withoutUser(url)], credentials: () => user, isMirror: true };
    return { url, store: new Registry(client, mirror) };
  });
  const store = withMirrors(mirrors, { registry, image, settings, suspects });
  return cache === undefined ? store : withCache(store, { directory: cache, isFresh, report, suspects });
}

/** The Hub has a host of its own. Only hosts that are local are tried without TLS. */
function baseUrls(registry: string, protocol: Settings["protocol"]): URL[] {
  const host = registry === HUB ? HUB_HOST : registry;
  if (protocol !== "detect") return [new URL(`${protocol}://${host}`)];
  const secure = new URL(`https://${host}`);
  return isLocalHost(secure.hostname) ? [secure, new URL(`http://${host}`)] : [secure];
}

type Mirror = { url: URL; store: ImageStore };
type MirrorOptions = { registry: ImageStore; image: ImageReference; settings: Settings; suspects: Suspects };

/** Asks the mirrors in order; each is left at its first failure, and in the end the registry is asked. */
function withMirrors(mirrors: Mirror[], { registry, image, settings, suspects }: MirrorOptions): ImageStore {
  const usable = new Set(mirrors);
  const skip = (mirror: Mirror, error: unknown, role?: "signature") => {
    settings.signal.throwIfAborted();
    if (!(error instanceof FetchWheelsError)) throw error;
    if (role === "signature" && ["not-found", "auth"].includes(error.kind)) return;
    if (error instanceof RequestError || error.kind === "integrity") usable.delete(mirror);
    settings.report({ type: "warning", message: `skipping mirror ${displayOrigin(mirror.url)}: ${error.message}` });
  };
  /** Returns the first answer of a mirror, or undefined if no mirror answers. */
  const ask = async <T>(question: (store: ImageStore) => Promise<T>, role?: "signature"): Promise<T | undefined> => {
    for (const mirror of usable) {
      try {
        const answer = await question(mirror.store);
        if (answer === undefined) continue;
        suspects.add(mirror.url);
        return answer;
      } catch (error) {
        skip(mirror, error, role);
      }
    }
    return undefined;
  };
  return {
    async manifest(reference, role) {
      const answer = await ask(async (store) => {
        const manifest = await store.manifest(reference);
        readDocument(manifest, reference, image);
        return manifest;
      }, role);
      return answer ?? await registry.manifest(reference);
    },
    async *blob(descriptor, offset) {
      const role = isSignatureType(descriptor.mediaType) ? "signature" : undefined;
      let at = offset;
      for (const mirror of usable) {
        try {
          for await (const chunk of mirror.store.blob(descriptor, at)) {
            at += chunk.length;
            suspects.add(mirror.url);
            yield chunk;
          }
          return;
        } catch (error) {
          skip(mirror, error, role);
        }
      }
      yield* registry.blob(descriptor, at);
    },
    async referrers(digest) {
      const listed = async (store: ImageStore) => {
        const found = await store.referrers(digest);
        return found.length > 0 ? found : undefined;
      };
      return await ask(listed, "signature") ?? await registry.referrers(digest);
    },
  };
}

/** `isFresh` says whether to ignore what is in the directory, and to fetch it again. */
type CacheOptions = { directory: string; isFresh: boolean; report: Report; suspects: Suspects };

/** Keeps blobs, laid out as the `blobs` of an OCI layout. A kept blob is verified like one from the network. */
function withCache(store: ImageStore, options: CacheOptions): ImageStore {
  return {
    manifest: (reference, role) => store.manifest(reference, role),
    referrers: (digest) => store.referrers(digest),
    blob: (descriptor) => throughCache(descriptor, store, options),
  };
}

/** Yields a cached blob, or what `FILE.part` has of it; fetches and keeps the rest. Cache faults are only warnings. */
async function* throughCache(descriptor: Descriptor, store: ImageStore, options: CacheOptions): Bytes {
  const { directory, isFresh, report, suspects } = options;
  const { digest, size } = descriptor;
  const file = join(directory, blobPath(digest));
  const path = `${file}.part`;
  const warn = (message: string) => report({ type: "warning", message });
  /** Runs an operation of the cache. If it fails, warns and returns `otherwise`. */
  const attempt = <T, U>(operation: () => T, otherwise: U): T | U => {
    try {
      return operation();
    } catch (error) {
      const { message } = toDiskError(error, `Cannot use ${quote(path)}`) as Error;
      warn(`not caching the blob: ${message.split("\n")[0]}`);
      return otherwise;
    }
  };
  const stat = isFresh ? undefined : attempt(() => statIfExists(file), null);
  if (stat?.isFile() && stat.size === (size ?? stat.size)) {
    report({ type: "cached", digest, size: stat.size });
    suspects.add(digest);
    yield* readCached(file, stat.size, () => attempt(() => fs.rmSync(file, { force: true }), undefined));
    if (size !== undefined) suspects.delete(digest); // else it is verified later
    return;
  }
  if (stat) warn(`ignoring cached ${quote(file)}: its size is wrong`);
  using part = stat === null ? undefined : attempt(() => claimPartial(path), undefined);
  if (part === undefined) return yield* store.blob(descriptor, 0);
  if (isFresh) part.truncateSync(0);
  const kept = part.seekSync(0, Deno.SeekMode.End);
  let isKept = true;
  let isComplete = false;
  try {
    if (kept > 0) {
      suspects.add(digest);
      yield* readFile(path);
    }
    for await (const chunk of store.blob(descriptor, kept)) {
      if (isKept) isKept = attempt(() => writeAll(part, chunk), false) !== false;
      yield chunk;
    }
    isComplete = true;
    if (size !== undefined) suspects.delete(digest);
    attempt(() => part.syncSync(), undefined);
  } finally {
    // If the digest is wrong, the verification stops at the last byte instead of asking for the end.
    const isWrong = !isComplete && part.statSync().size >= (size ?? Infinity);
    if (!isKept || isWrong) attempt(() => fs.rmSync(path, { force: true }), undefined);
    else if (isComplete) attempt(() => fs.renameSync(path, file), undefined);
  }
}

/** Yields a cached file. If the digest is wrong, the verification stops at the last byte, and the file is removed. */
async function* readCached(file: string, size: number, remove: () => void): Bytes {
  let left = size;
  let isComplete = false;
  try {
    for await (const chunk of readFile(file)) {
      left -= chunk.length;
      yield chunk;
    }
    isComplete = true;
  } finally {
    if (!isComplete && left <= 0) remove();
  }
}

/** Returns undefined if another process has locked the file: it is fetching the blob, and will keep it. */
function claimPartial(path: string): Deno.FsFile | undefined {
  fs.mkdirSync(dirname(path), { recursive: true });
  const file = Deno.openSync(path, { read: true, write: true, create: true });
  // Its last owner may have published it between opening and locking: then this is the finished blob. A symbolic link
  // may lead anywhere, and is not followed.
  const { isFile, ino } = file.statSync();
  if (isFile && tryLock(file) === true && lstatIfExists(path)?.ino === ino) return file;
  file.close();
  return undefined;
}

function blobPath(digest: string): string {
  return `blobs/${digest.replace(":", "/")}`;
}

/** Opens a file of an OCI layout or an archive, by its path in it. */
type MemberOpener = (name: string) => Bytes;

type MemberOptions = { text: string; signal: AbortSignal };

function openMembers({ kind, path }: { kind: string; path: string }, { text, signal }: MemberOptions): MemberOpener {
  const isDirectory = kind === "oci";
  const stat = onDisk("read", path, () => statIfExists(path));
  const fail = (state: string) => notFoundError(`Cannot read ${quote(text)}: ${state}`);
  if (stat === undefined) throw fail("no such file or directory");
  if (stat.isDirectory() !== isDirectory) throw fail(isDirectory ? "it is not a directory" : "it is a directory");
  if (isDirectory) {
    return (name) => {
      const file = join(path, name);
      if (fileSize(file) === undefined) throw usageError(`Cannot read ${quote(file)}: it is not a regular file`);
      return interruptible(readFile(file), signal);
    };
  }
  if (stat.isFile()) return indexArchive(path, signal);
  const hint = "an image's archive is read more than once: save it to a file first";
  throw usageError(`Cannot read ${quote(text)}: it is not a regular file`, { hint });
}

/** Where a member lies in an archive, or the path that it is a link to. */
type ArchiveEntry = { offset: number; size: number } | { link: string };

/** Scans an archive on disk once, for where its members lie. A compressed one is decoded again for each member. */
function indexArchive(path: string, signal: AbortSignal): MemberOpener {
  const fail = (state: string) => integrityError(`Cannot read ${quote(path)}: ${state}`);
  let index: Promise<ArchiveIndex> | undefined;
  return async function* (name) {
    index ??= scanArchive(path, signal);
    const { isPlain, entries } = await index;
    let entry = entries.get(name);
    // `docker save` writes some members as links to others.
    for (let links = 0; entry !== undefined && "link" in entry; links++) {
      if (links > MAX_LINKS) throw fail(`${quote(name)} is a symbolic link that leads to itself`);
      entry = entries.get(entry.link);
    }
    if (entry === undefined) throw notFoundError(`Cannot read ${quote(path)}: it has no ${quote(name)}`);
    if (isPlain) return yield* readFile(path, entry);
    for await (const { offset, body } of tarMembers(decompress(interruptible(readFile(path), signal), path), path)) {
      if (offset !== entry.offset) continue;
      for await (const chunk of body) yield new Uint8Array(chunk);
      return;
    }
  };
}

type ArchiveIndex = { isPlain: boolean; entries: Map<string, ArchiveEntry> };

async function scanArchive(path: string, signal: AbortSignal): Promise<ArchiveIndex> {
  using file = onDisk("read", path, () => Deno.openSync(path));
  const head = new Uint8Array(TAR_BLOCK_BYTES);
  const isPlain = file.readSync(head) === head.length && isTarHeader(head);
  file.seekSync(0, Deno.SeekMode.Start);
  // Bodies of a plain archive are skipped without being read.
  const { size: end } = file.statSync();
  const skip = (bytes: number) => void file.seekSync(Math.min(bytes, end), Deno.SeekMode.Current);
  const seek = isPlain ? skip : undefined;
  const chunks = interruptible(chunksOf(file, { path }), signal);
  const bytes = isPlain ? chunks : decompress(chunks, path);
  const entries = new Map<string, ArchiveEntry>();
  for await (const { name, type, linkname, offset, size } of tarMembers(bytes, path, seek)) {
    const member = posix.normalize(name);
    if (type === "symbolic link") entries.set(member, { link: posix.join(posix.dirname(member), linkname) });
    else if (type === "hard link") entries.set(member, { link: posix.normalize(linkname) });
    else if (type === "file") entries.set(member, { offset, size });
  }
  return { isPlain, entries };
}

/** An OCI image layout: `index.json` leads to `blobs/<algorithm>/<hex>`. */
function layoutStore(open: MemberOpener, text: string): ImageStore {
  const fail = (state: string) => integrityError(`Cannot read ${quote(text)}: ${state}`);
  const readIndex = async (): Promise<Descriptor[]> => {
    const index = parseJson(await readAll(open("index.json"), MAX_MANIFEST_BYTES));
    const entries = index?.manifests === null ? [] : index?.manifests; // umoci writes null for an empty layout
    if (!Array.isArray(entries)) throw fail("its index.json is not an index");
    return readDescriptors(entries, fail);
  };
  const readSmall = async (digest: string) => await readAll(open(blobPath(digest)), MAX_MANIFEST_BYTES);
  const readBlob = async (digest: string): Promise<Uint8Array> => {
    if (!DIGEST.test(digest)) throw fail(`${quote(String(digest))} is not a digest`);
    const body = await readSmall(digest);
    if (body === undefined) throw fail(`manifest ${digest} has more than ${MAX_MANIFEST_BYTES} bytes`);
    return body;
  };
  /** Reads what an entry names; undefined if that is missing or not a manifest, because other entries may be chosen. */
  const readEntry = async ({ digest }: Descriptor): Promise<JsonObject | undefined> =>
    DIGEST.test(digest) ? parseJson(await ifExists(readSmall(digest))) : undefined;
  const isOfKind = ({ annotations }: Descriptor, kinds: string[]) =>
    kinds.some((kind) => annotations?.kind === `dev.cosignproject.cosign/${kind}`);
  // `oras cp -r` also lists the images of an index, and what refers to an image; cosign's tags hold signatures, and
  // `cosign save` names the kinds of its entries.
  const readRoots = async (): Promise<Descriptor[]> => {
    const entries = (await readIndex()).filter(({ digest }) => DIGEST.test(digest));
    const others = new Set<string>(); // digests of children and of what refers to an image
    for (const [digest, entry] of new Map(entries.map((entry) => [entry.digest, entry]))) {
      const { manifests, subject } = await readEntry(entry) ?? {};
      for (const child of [manifests ?? []].flat()) others.add(String(child?.digest));
      if (subject !== undefined) others.add(digest);
    }
    const isRoot = ({ digest, annotations }: Descriptor) =>
      !others.has(digest) &&
      !isOfKind({ digest, annotations }, ["sigs", "atts", "sboms"]) &&
      !/^sha(?:256|512)-/.test(String(annotations?.["org.opencontainers.image.ref.name"]));
    return entries.filter(isRoot);
  };
  return {
    async manifest(reference) {
      if (DIGEST.test(reference)) return { body: await readBlob(reference) };
      const entries = reference === "" ? await readRoots() : await readIndex();
      const signatures = reference.endsWith(".sig") ? entries.filter((entry) => isOfKind(entry, ["sigs"])) : [];
      const [saved] = signatures.length === 1 ? signatures : [];
      const { digest } = saved ?? chooseFromLayout(entries, { text, tag: reference || undefined });
      return { body: await readBlob(digest), digest };
    },
    blob: ({ digest }) => open(blobPath(digest)),
    async referrers(digest) {
      const found: Descriptor[] = [];
      for (const entry of await readIndex()) {
        const manifest = await readEntry(entry);
        if (manifest?.subject?.digest === digest) found.push(entry);
      }
      return found;
    },
  };
}

/** Without a tag, the layout must leave no choice; entries that refer to another image do not count. */
function chooseFromLayout(entries: Descriptor[], { text, tag }: { text: string; tag: string | undefined }): Descriptor {
  const nameOf = (entry: Descriptor) => entry?.annotations?.["org.opencontainers.image.ref.name"];
  const names = [...new Set(entries.map(nameOf).filter((name) => name !== undefined))];
  const isNamed = (entry: Descriptor) => nameOf(entry) === tag || String(nameOf(entry)).endsWith(`:${tag}`);
  const candidates = tag !== undefined
    ? entries.filter(isNamed)
    : names.length === 1 && entries.length > 1
    ? entries.filter((entry) => nameOf(entry) !== undefined)
    : entries;
  const [chosen, ...others] = candidates;
  if (chosen !== undefined && others.every(({ digest }) => digest === chosen.digest)) return chosen;
  const list = names.length > 0
    ? `the tags ${listNames(names.map(String))}`
    : `${plural(entries.length, "image")} without a tag`;
  const hint = tag === undefined && names.length > 0 ? "add one of them after a colon" : undefined;
  throw notFoundError(`Cannot choose an image in ${quote(text)}: it has ${list}`, { hint });
}

/** `docker save`: `manifest.json` names a configuration, which has the digests of the layers, and their files. */
function dockerArchiveStore(open: MemberOpener, text: string): ImageStore {
  const fail = (state: string) => integrityError(`Cannot read ${quote(text)}: ${state}`);
  const files = new Map<string, string>();
  const readManifest = async (): Promise<Uint8Array> => {
    const images = parseJsonValue(await readAll(open("manifest.json"), MAX_MANIFEST_BYTES));
    if (!Array.isArray(images)) throw fail("its manifest.json is not a list");
    if (images.length !== 1) {
      throw notFoundError(`Cannot choose in ${quote(text)}: it has ${plural(images.length, "image")}`);
    }
    const { Config: configName, Layers: layerNames } = images[0] ?? {};
    const body = await readAll(open(String(configName)), MAX_MANIFEST_BYTES) ?? new Uint8Array();
    const digest = digestOf(body, "sha256");
    const named = /[0-9a-f]{64}/.exec(String(configName))?.[0];
    if (named !== undefined && digest !== `sha256:${named}`) throw fail("its configuration has another digest");
    const diffIds: unknown = parseJson(body)?.rootfs?.diff_ids;
    if (!Array.isArray(diffIds) || !Array.isArray(layerNames) || diffIds.length !== layerNames.length) {
      throw fail("its layers are not those of its configuration");
    }
    files.set(digest, String(configName));
    diffIds.forEach((diffId, at) => files.set(String(diffId), String(layerNames[at])));
    const config = { mediaType: CONFIG_TYPES[1], digest, size: body.length };
    const layers = diffIds.map((diffId) => ({ digest: diffId }));
    return Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: MANIFEST_TYPES[1], config, layers }));
  };
  return {
    manifest: async () => ({ body: await readManifest() }),
    // crane, kaniko and containerd compress the layers, but these digests are of the layers before compression.
    async *blob({ digest }) {
      for await (const chunk of decompress(open(files.get(digest) ?? digest), digest)) yield new Uint8Array(chunk);
    },
    referrers: () => Promise.resolve([]),
  };
}

/** A URL's bytes; resumed only if the server can promise that they have not changed. */
function urlBytes(url: URL, http: HttpClient): Bytes {
  const user = urlCredentials(url);
  const bare = withoutUser(url);
  const name = displayUrl(bare);
  const authorizations = new Map(user && [[bare.origin, basicAuthorization(user)]]);
  const get = async ({ expected = [], ...request }: GetOptions) => {
    const response = await http.request([bare], { ...request, authorizations });
    if (response.isOk || expected.includes(response.status)) return response;
    const isImage = /:[^/]+$/.test(bare.pathname);
    const hint = isImage ? `for an image in a registry, write "${bare.host}${bare.pathname}"` : undefined;
    throw await http.statusError(response, `Cannot fetch ${quote(name)}`, hint);
  };
  return new BlobDownload(http, { get, name, isMirror: false, isImmutable: false }).bytes(0);
}

function statIfExists(path: string): fs.Stats | undefined {
  return fs.statSync(path, { throwIfNoEntry: false });
}

/** Returns the size of a file that can be read; undefined for a pipe. */
function fileSize(path: string): number | undefined {
  const stat = onDisk("read", path, () => statIfExists(path));
  if (stat === undefined) throw notFoundError(`Cannot read ${quote(path)}: no such file`);
  if (stat.isDirectory()) throw ioError(`Cannot read ${quote(path)}: it is a directory`);
  return stat.isFile() ? stat.size : undefined;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Manifest: reference to index to manifest to what is to be fetched, each body checked against its digest; signatures.
// ---------------------------------------------------------------------------------------------------------------------

/** An image's manifest, of any schema. */
interface Manifest {
  digest: string;
  mediaType: string;
  artifactType?: string;
  config?: Descriptor;
  /** Base first. */
  layers: Descriptor[];
  /** Schema 1 says the platform itself. */
  platform?: Partial<Platform>;
}

type ImageIndex = Pick<Manifest, "digest" | "mediaType"> & { entries: Descriptor[] };

/** An image whose manifest has been found. */
interface ResolvedImage extends ImageOrigin {
  /** The image's name, for messages. */
  name: string;
  /** What the reference named: the index, if there is one. */
  named: { digest: string; mediaType: string };
  manifest: Manifest;
  platform: string | null;
  isArtifact: boolean;
}

/** Finds the manifest for one platform. An index that does not have it is an error that lists what it has. */
async function resolveImage(origin: ImageOrigin, settings: Settings): Promise<ResolvedImage> {
  const { kind, image, store } = origin;
  const wanted = settings.platform;
  const name = formatReference(image);
  const offered = new Set<string>();
  const searched = new Set<string>(); // indexes may name the same one many times
  const read = async (reference: string) => readDocument(await store.manifest(reference), reference, image);
  const top = await read(image.digest ?? image.tag ?? (kind === "registry" ? "latest" : ""));

  const search = async (document: Manifest | ImageIndex, depth: number): Promise<Manifest | undefined> => {
    if ("layers" in document) return document;
    if (depth >= MAX_INDEX_DEPTH) {
      throw integrityError(`Cannot resolve ${quote(name)}: its indexes nest more than ${MAX_INDEX_DEPTH} levels deep`);
    }
    const images = document.entries.filter(isImageEntry);
    const candidates = images.length > 0 ? images : document.entries.filter(isUsableEntry);
    for (const { platform, artifactType, digest } of candidates) {
      offered.add(
        formatPlatform(platform ?? {}) || `${digest}${artifactType === undefined ? "" : ` (${artifactType})`}`,
      );
    }
    const chosen = selectEntry(candidates, wanted);
    // Indexes within an index need not name a platform; then each of them is searched.
    const nested = candidates.filter((entry) => !hasPlatform(entry) && INDEX_TYPES.includes(entry.mediaType ?? ""));
    for (const entry of chosen === undefined ? nested : [chosen]) {
      if (searched.has(entry.digest)) continue;
      searched.add(entry.digest);
      const found = await search(await read(entry.digest), depth + 1);
      if (found !== undefined) return hasPlatform(entry) ? { ...found, platform: entry.platform } : found;
    }
    return undefined;
  };

  const manifest = await search(top, 0);
  if (manifest === undefined) {
    const list = offered.size === 0 ? "its index is empty" : `it has ${listNames(offered)}`;
    const byDigest = `use one of them as SOURCE: ${image.registry}/${image.repository}@DIGEST`;
    const hasPlatforms = [...offered].some((text) => !/^sha\d+:/.test(text));
    const isByDigest = kind === "registry" && offered.size > 0;
    const hint = hasPlatforms ? "choose one with --platform" : isByDigest ? byDigest : undefined;
    throw notFoundError(`Cannot find ${formatPlatform(wanted)} in ${quote(name)}: ${list}`, { hint });
  }
  const stated = await statedPlatform(manifest, store);
  const platform = stated === undefined ? null : formatPlatform(stated);
  if (stated !== undefined && !isCompatible(stated, wanted)) {
    const offers = listNames([formatPlatform(stated)]);
    const message = `Cannot find ${formatPlatform(wanted)} in ${quote(name)}: the image is for ${offers}`;
    throw notFoundError(message, { hint: `to use it anyway, pass --platform ${offers}` });
  }
  const named = { digest: top.digest, mediaType: top.mediaType };
  return { ...origin, name, named, manifest, platform, isArtifact: isArtifactManifest(manifest) };
}

/** Returns the platform that an index or schema 1 says, else that of the image's configuration, if there is one. */
async function statedPlatform({ config, platform }: Manifest, store: ImageStore): Promise<Platform | undefined> {
  const isReadable = config && isImageConfig(config.mediaType) && (config.size ?? 0) <= MAX_MANIFEST_BYTES;
  const stated = platform ?? (isReadable ? parseJson(await ifExists(readBlob(store, config))) : undefined) ?? {};
  return isPlatform(stated) && hasPlatform({ platform: stated }) ? normalizePlatform(stated) : undefined;
}

/** Reads a small blob whole and verified; undefined if it is too large. */
async function readBlob(store: ImageStore, descriptor: Descriptor): Promise<Uint8Array | undefined> {
  return await readAll(verified(store.blob(descriptor, 0), descriptor), MAX_MANIFEST_BYTES);
}

/** Returns undefined for what a store does not have. */
function ifExists<T>(answer: Promise<T>): Promise<T | undefined> {
  return answer.catch((error) => {
    if (error instanceof FetchWheelsError && error.kind === "not-found") return undefined;
    throw error;
  });
}

/**
 * Chooses the image for a platform from an index's `manifests`, never one for another architecture; undefined if none
 * fits. Without a variant, the host's level of the architecture or a lower one is accepted.
 */
export function selectManifest(entries: Descriptor[], platform: Platform): Descriptor | undefined {
  return selectEntry(entries.filter(isImageEntry), platform);
}

function selectEntry(entries: Descriptor[], platform: Platform): Descriptor | undefined {
  if (entries.length === 1 && !entries.some(hasPlatform)) return entries[0];
  const wanted = normalizePlatform(platform);
  const level = (offered: Platform) => variantLevel(offered.variant ?? IMPLIED_VARIANTS.get(offered.architecture)) || 0;
  return entries.filter(hasPlatform)
    .map((entry) => ({ entry, offered: normalizePlatform(entry.platform ?? {}) }))
    .filter(({ offered }) => isCompatible(offered, wanted))
    .sort((a, b) => level(b.offered) - level(a.offered))[0]?.entry;
}

/** Some entries of an index are artifacts about the images beside them. */
function isImageEntry(entry: Descriptor): boolean {
  return isUsableEntry(entry) && isImageConfig(entry.artifactType);
}

/** Reports whether an entry is not an attestation of BuildKit, and has a digest that can be verified. */
function isUsableEntry({ digest, platform, annotations }: Descriptor): boolean {
  const isUnknown = platform?.os === "unknown" && platform.architecture === "unknown";
  return DIGEST.test(digest) && !isUnknown && annotations?.["vnd.docker.reference.type"] === undefined;
}

function hasPlatform({ platform }: { platform?: Partial<Platform> }): boolean {
  return Boolean(platform?.os && platform.architecture);
}

/** Docker once wrote configurations as plain bytes. */
function isImageConfig(mediaType: string | undefined): boolean {
  return !mediaType || mediaType === "application/octet-stream" || CONFIG_TYPES.includes(mediaType);
}

/** Verifies a manifest's digest and reads it. Its type is what the body says, else the header, else its JSON. */
function readDocument(answer: ManifestAnswer, reference: string, image: ImageReference): Manifest | ImageIndex {
  const { body, contentType = "", digest: claimed } = answer;
  const isNamed = DIGEST.test(reference);
  const name = formatReference(isNamed ? { ...image, tag: undefined, digest: reference } : image);
  const fail = (state: string) => integrityError(`Cannot read manifest ${quote(name)}: ${state}`);
  const format = formatOf(body);
  if (format !== undefined) throw fail(`it is ${format}, not JSON`);
  const expected = isNamed ? reference : DIGEST.test(claimed ?? "") ? claimed : undefined;
  const algorithm = expected?.split(":")[0] ?? "sha256";
  // Of a signed manifest, only the payload is read, because the digest covers nothing else.
  const content = digestOf(body, algorithm) === expected ? body : signedPayload(body);
  const actual = digestOf(content, algorithm);
  if (expected !== undefined && actual !== expected) {
    const claim = image.repository === "" ? "index.json" : "Docker-Content-Digest"; // a layout has no repository
    throw fail(`its digest is ${actual}${isNamed ? "" : `, but ${claim} says ${expected}`}`);
  }
  const json = parseJson(content);
  if (json === undefined) throw fail("it is not a JSON object");
  const digest = expected ?? digestOf(content, "sha256");

  const shape = json.manifests ? INDEX_TYPES[0] : json.layers ? MANIFEST_TYPES[0] : json.fsLayers && SCHEMA1_TYPES[1];
  const mediaType = [json.mediaType, contentType.split(";")[0]?.trim().toLowerCase(), shape]
    .find((type) => [...INDEX_TYPES, ...MANIFEST_TYPES, ...SCHEMA1_TYPES].includes(type));
  if (mediaType === undefined) throw fail("it is neither an index nor a manifest");
  if (INDEX_TYPES.includes(mediaType)) return { digest, mediaType, entries: readDescriptors(json.manifests, fail) };
  if (SCHEMA1_TYPES.includes(mediaType)) {
    // Schema 1 lists the final layer first, and does not say sizes.
    const blobs = Array.isArray(json.fsLayers) && json.fsLayers.map((layer) => ({ digest: layer?.blobSum }));
    const { architecture } = json;
    const platform = typeof architecture === "string" ? { os: "linux", architecture } : undefined;
    return { digest, mediaType, layers: readDescriptors(blobs, fail, DIGEST).reverse(), platform };
  }
  const [config] = readDescriptors(json.config?.digest === undefined ? [] : [json.config], fail, DIGEST);
  const artifactType = typeof json.artifactType === "string" ? json.artifactType : undefined;
  return { digest, mediaType, artifactType, config, layers: readDescriptors(json.layers, fail, DIGEST) };
}

/** A digest of an algorithm that this module does not know: an entry with one is not an error, but never chosen. */
const ANY_DIGEST = /^(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}|(?!sha(?:256|512):)[a-z0-9+._-]+:\S+)$/;

function readDescriptors(value: unknown, fail: (state: string) => Error, pattern = ANY_DIGEST): Descriptor[] {
  if (!Array.isArray(value)) throw fail("it has neither the manifests nor the layers that its media type promises");
  for (const { digest, size = 0, platform = {} } of value.map((entry) => entry ?? {})) {
    if (typeof digest !== "string" || !pattern.test(digest)) throw fail(`${quote(String(digest))} is not a digest`);
    if (!isPlatform(platform)) throw fail(`the platform of ${digest} is invalid`);
    if (!Number.isSafeInteger(size) || size < 0) throw fail(`the size of ${digest} is invalid`);
  }
  return value;
}

function isPlatform(value: JsonObject | null): boolean {
  return [value?.os, value?.architecture, value?.variant].every((part) => typeof (part ?? "") === "string");
}

/** A signed schema 1 manifest is named by the digest of its payload, which its signature says how to restore. */
function signedPayload(body: Uint8Array): Uint8Array {
  const json = parseJson(body);
  const header = json?.signatures?.[0]?.protected;
  if (json?.schemaVersion !== 1 || typeof header !== "string") return body;
  const format = parseJson(Buffer.from(header, "base64url"));
  if (!Number.isInteger(format?.formatLength) || typeof format?.formatTail !== "string") return body;
  return Buffer.concat([body.subarray(0, format.formatLength), Buffer.from(format.formatTail, "base64url")]);
}

function digestOf(bytes: Uint8Array, algorithm: string): string {
  return `${algorithm}:${crypto.createHash(algorithm).update(bytes).digest("hex")}`;
}

/** Something to fetch: an archive to extract, or a file of an artifact. */
interface Part {
  /** Undefined for a tarball. */
  descriptor?: Descriptor;
  /** What its bytes are called in messages. */
  name: string;
  /** Position among the manifest's layers; 1 is the base. */
  index: number;
  size?: number;
  /** Path of a file; other parts are archives. */
  path?: string;
  /** Directory that every member of an artifact's archive must lie in. It was selected as a whole, unless it is "". */
  directory?: string;
  /** Digest of the archive before compression. */
  contentDigest?: string;
  /** Titles of an artifact that were not selected, carried by its first part. */
  skipped?: FetchResult["skipped"];
}

/** Returns the size of all parts, if every one is known. */
function totalSize(parts: Part[]): number | undefined {
  return parts.some(({ size }) => size === undefined) ? undefined : parts.reduce((sum, { size = 0 }) => sum + size, 0);
}

function layerInfo({ descriptor, index, name }: Part, { manifest }: ResolvedImage): LayerInfo {
  const { digest = name, size = null, mediaType = null } = descriptor ?? {};
  return { digest, size, mediaType, index, count: manifest.layers.length };
}

/** Chooses what to fetch: the final layer, the layers that the user wants, or an artifact's files. */
async function selectParts(resolved: ResolvedImage, { layers, output, filter }: Settings): Promise<Part[]> {
  const { manifest, name, isArtifact } = resolved;
  const isDefault = layers.length === 1 && layers[0] === "last";
  const wanted = isArtifact && isDefault ? ["all"] : layers;
  const positions = new Set(wanted.flatMap((layer) => layerPositions(layer, resolved)));
  const parts = manifest.layers
    .map((descriptor, at): Part => ({ descriptor, name: descriptor.digest, index: at + 1, size: descriptor.size }))
    .filter((_, at) => positions.has(at));
  const selected = isArtifact ? await artifactParts(parts, resolved, filter) : parts;
  const needsOne = output !== undefined || isArtifact && !isDefault;
  if (!needsOne || selected.length === 1) return selected;
  const option = output === undefined ? "--layer" : "--output";
  const count = plural(selected.length, isArtifact ? "file" : "layer");
  const hint = `select one with ${isArtifact ? "--include" : "--layer"}`;
  throw usageError(`Cannot use ${option} with ${count} of ${quote(name)}`, { hint });
}

function isArtifactManifest({ config, artifactType, layers }: Manifest): boolean {
  return !isImageConfig(config?.mediaType) || !isImageConfig(artifactType) ||
    layers.some((layer) => titleOf(layer) !== undefined);
}

function layerPositions(wanted: string, { manifest: { layers }, name }: ResolvedImage): number[] {
  const { length } = layers;
  if (wanted === "all" && length > 0) return [...layers.keys()];
  const position = wanted === "last" ? length : Number(wanted);
  const at = DIGEST.test(wanted) ? layers.findIndex(({ digest }) => digest === wanted) : position - 1;
  if (layers[at] !== undefined) return [at];
  const state = length === 0 ? "it has no layers" : `it has ${plural(length, "layer")}, but no layer ${wanted}`;
  throw notFoundError(`Cannot fetch ${quote(name)}: ${state}`);
}

function titleOf({ annotations }: Descriptor): string | undefined {
  const title = annotations?.[TITLE];
  return typeof title === "string" ? title : undefined;
}

/** A media type of an archive, such as `application/vnd.oci.image.layer.v1.tar+gzip` or `application/x-tgz`. */
const TAR_TYPE = /(?:^|[./+-])(?:x-)?(?:tar|tgz|gtar)(?:$|[.+-])/;

/** An artifact's titled layers are files, or directories that `oras push` has packed; untitled ones must be archives. */
async function artifactParts(layers: Part[], resolved: ResolvedImage, filter: FilterOptions): Promise<Part[]> {
  const { manifest, name } = resolved;
  const select = await memberFilter(filter);
  const turns = new Turns();
  const skipped: FetchResult["skipped"] = [];
  const titles = new Set<string>();
  const paths = new Set<string>();
  const parts: Part[] = [];
  for (const part of layers) {
    await turns.give();
    const { annotations = {} } = part.descriptor ?? {};
    const mediaType = String(part.descriptor?.mediaType ?? "");
    const title = part.descriptor && titleOf(part.descriptor);
    if (title === undefined) {
      if (!TAR_TYPE.test(mediaType)) {
        const layer = `layer ${part.index} of ${manifest.layers.length}`;
        const state = `${layer} has no title, and its type ${quote(mediaType)} is not an archive`;
        const hint = manifest.layers.length > 1 ? "choose another layer with --layer" : undefined;
        throw notFoundError(`Cannot fetch ${quote(name)}: ${state}`, { hint });
      }
      parts.push(part);
      continue;
    }
    const fail = (state: string) => integrityError(`Cannot fetch file ${quote(title)} of ${quote(name)}: ${state}`);
    const source = cleanPath(title);
    if (title.includes("\0")) throw fail("its title contains NUL");
    if (isTooLong(title)) throw fail(TOO_LONG);
    if (isOutside(source)) {
      throw new FetchWheelsError("unsafe", `Cannot extract ${quote(title)}: its title contains ".."`);
    }
    if (titles.has(source)) throw fail("two layers have this title");
    titles.add(source);
    const isPacked = annotations["io.deis.oras.content.unpack"] === "true";
    const isRoot = source === ""; // `oras push REFERENCE ./`, whose title is "."
    if (isRoot && !isPacked) throw fail("its title is empty");
    const { path, reason } = isRoot ? { path: source } : select(source);
    if (reason !== undefined && !(isPacked && reason === TOO_SHORT)) skipped.push({ path: source, reason });
    else if (isPacked) {
      const contentDigest = annotations["io.deis.oras.content.digest"];
      const isKnown = contentDigest === undefined || DIGEST.test(contentDigest);
      if (!isKnown) throw fail("the digest of its content is invalid");
      parts.push({ ...part, name: title, directory: source, contentDigest });
    } else {
      if (paths.has(path)) throw fail(`two files would have the path ${quote(path)}`);
      paths.add(path);
      parts.push({ ...part, name: title, path });
    }
  }
  if (parts[0] === undefined) throw noMatchError(`artifact ${quote(name)}`, { skipped: skipped.length, filter });
  parts[0].skipped = skipped;
  return parts;
}

/** A public key that may have signed an image. */
interface VerifyKey {
  file: string;
  key: crypto.KeyObject;
  /** What cosign calls the key in a bundle. */
  hint: string;
  /** Digest algorithms to try; null for Ed25519, which signs the message itself. */
  algorithms: (string | null)[];
}

/** By the names of JSON Web Keys. For P-384 the standard is SHA-384, but cosign uses SHA-256 with every curve. */
// deno-fmt-ignore
const KEY_ALGORITHMS: Record<string, (string | null)[]> = {
  "RSA": ["sha256"], "P-256": ["sha256"], "P-384": ["sha384", "sha256"], "Ed25519": [null],
};

async function readVerifyKey(file: string, signal: AbortSignal): Promise<VerifyKey> {
  const fail = (state: string) => usageError(`Cannot use verification key ${quote(file)}: ${state}`);
  if (!fs.existsSync(file)) throw fail("no such file");
  const pem = new TextDecoder().decode(await readUserFile(file, signal));
  if (!pem.includes("-----BEGIN PUBLIC KEY-----")) throw fail("it has no PEM public key");
  try {
    const key = crypto.createPublicKey(pem);
    const { kty = "", crv = kty } = key.export({ format: "jwk" });
    const hint = crypto.createHash("sha256").update(key.export({ format: "der", type: "spki" })).digest("base64");
    const algorithms = KEY_ALGORITHMS[crv];
    if (algorithms !== undefined) return { file, key, hint, algorithms };
  } catch {
    // Keys of kinds that have no JSON Web Key, such as DSA, are as useless as broken ones.
  }
  throw fail(`it is not a valid key of a supported kind (${Object.keys(KEY_ALGORITHMS).join(", ")})`);
}

function isSignedBy({ key, algorithms }: VerifyKey, { message, signature }: StoredSignature): boolean {
  return algorithms.some((algorithm) => {
    try {
      return crypto.verify(algorithm, message, key, signature);
    } catch {
      return false; // a malformed signature is not a signature by this key
    }
  });
}

/** A signature as cosign stores it, before anything about it has been checked. */
interface StoredSignature {
  format: SignatureFormat;
  /** The bytes that were signed. */
  message: Uint8Array;
  signature: Uint8Array;
  /** Names the key that signed; only bundles have it. */
  hint?: string;
  /** The kind of statement that was signed, if that is not the signature of an image. */
  otherKind?: string;
  /** The digests that the statement is about. */
  digests: string[];
}

/** Checks, as cosign does without a transparency log, that a key signed what the reference named or the manifest. */
async function verifySignature(resolved: ResolvedImage, settings: Settings): Promise<FetchResult["verified"]> {
  const { verifyKeys, report } = settings;
  if (verifyKeys.length === 0) return null;
  const files = verifyKeys.map(({ file }) => quote(file)).join(" or ");
  const failures: FetchWheelsError[] = [];
  let state: string | undefined;
  for (const digest of new Set([resolved.named.digest, resolved.manifest.digest])) {
    for await (const stored of storedSignatures(resolved, { digest, failures })) {
      const { format, hint, otherKind, digests } = stored;
      const signer = verifyKeys.find((key) => isSignedBy(key, stored));
      if (signer !== undefined && otherKind === undefined && digests.includes(digest)) {
        const verified = { digest, key: signer.file, format };
        report({ type: "verified", ...verified });
        return verified;
      }
      const isOurs = verifyKeys.some((key) => key.hint === hint);
      if (otherKind !== undefined) state ??= `${quote(otherKind)} is not an image signature`;
      else if (signer !== undefined) state = `the signature is for another digest, ${listNames(digests) || "none"}`;
      else if (hint === undefined) state = `it is not signed by the key ${files}, or the signed payload was changed`;
      else state = isOurs ? "its payload was changed after it was signed" : `it is signed by a key other than ${files}`;
    }
  }
  const [failure] = failures;
  if (failure !== undefined) throw failure;
  throw integrityError(`Cannot verify the signature of ${quote(resolved.name)}: ${state ?? "it has no signature"}`);
}

/**
 * Yields the signatures of a digest: cosign 3's bundles, then the simple signing of cosign 1 and 2. A place that cannot
 * be read adds to `failures` only, because another one may have a signature.
 */
async function* storedSignatures(
  { store, image }: ResolvedImage,
  { digest, failures }: { digest: string; failures: FetchWheelsError[] },
): AsyncGenerator<StoredSignature> {
  const tag = digest.replace(":", "-");
  const attempt = <T>(answer: Promise<T>): Promise<T | undefined> =>
    answer.catch((error) => {
      if (!(error instanceof FetchWheelsError)) throw error;
      failures.push(error);
      return undefined;
    });
  const readExisting = async (reference: string): Promise<Partial<Manifest & ImageIndex>> => {
    const answer = await ifExists(store.manifest(reference, "signature"));
    return answer === undefined ? {} : readDocument(answer, reference, { ...image, tag: reference });
  };
  const read = async (reference: string) => await attempt(readExisting(reference)) ?? {};
  // Without the referrers API, the index has a tag.
  for (const list of [() => store.referrers(digest), async () => (await read(tag)).entries]) {
    for (const entry of await attempt(list()) ?? []) {
      if (!DIGEST.test(entry?.digest) || !MANIFEST_TYPES.includes(entry.mediaType ?? "")) continue;
      // The artifact type in an index is not reliable, so each manifest is read.
      const { artifactType, layers: [layer] = [] } = await read(entry.digest);
      const isBundle = [artifactType, layer?.mediaType].some((type) => String(type).startsWith(BUNDLE_TYPE));
      if (layer !== undefined && isBundle) yield* bundleSignatures(parseJson(await attempt(readBlob(store, layer))));
    }
  }
  for (const layer of (await read(`${tag}.sig`)).layers ?? []) {
    if (layer.mediaType !== SIMPLE_SIGNING_TYPE) continue;
    const message = await attempt(readBlob(store, layer)) ?? new Uint8Array();
    const signature = decodeBase64(layer.annotations?.["dev.cosignproject.cosign/signature"]);
    const critical = parseJson(message)?.critical;
    const digests = [String(critical?.image?.["docker-manifest-digest"])];
    const otherKind = critical?.type === SIMPLE_SIGNING_KIND ? undefined : String(critical?.type);
    yield { format: "simplesigning", message, signature, otherKind, digests };
  }
}

const BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle";
const SIMPLE_SIGNING_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIMPLE_SIGNING_KIND = "cosign container image signature";
const BUNDLE_KIND = "https://sigstore.dev/cosign/sign/v1";

function isSignatureType(mediaType: string | undefined): boolean {
  return mediaType === SIMPLE_SIGNING_TYPE || String(mediaType).startsWith(BUNDLE_TYPE);
}

/** The envelope in a bundle (DSSE) signs its type and its payload, an in-toto statement. */
function* bundleSignatures(bundle: JsonObject | undefined): Generator<StoredSignature> {
  const { payload, payloadType, signatures } = bundle?.dsseEnvelope ?? {};
  if (typeof payloadType !== "string" || !Array.isArray(signatures)) return;
  const content = decodeBase64(payload);
  const head = `DSSEv1 ${Buffer.byteLength(payloadType)} ${payloadType} ${content.length} `;
  const message = Buffer.concat([Buffer.from(head), content]);
  const { predicateType, subject } = parseJson(content) ?? {};
  const isImageSignature = payloadType === "application/vnd.in-toto+json" && predicateType === BUNDLE_KIND;
  const otherKind = isImageSignature ? undefined : String(predicateType ?? payloadType);
  const subjects: (JsonObject | null | undefined)[] = [subject].flat();
  const digests = subjects.flatMap((subject) => Object.entries(subject?.digest ?? {}).map((pair) => pair.join(":")));
  const hint = bundle?.verificationMaterial?.publicKey?.hint;
  for (const entry of signatures.slice(0, MAX_SIGNATURES)) {
    yield { format: "bundle", message, signature: decodeBase64(entry?.sig), hint, otherKind, digests };
  }
}

function decodeBase64(value: unknown): Uint8Array {
  return Buffer.from(typeof value === "string" ? value : "", "base64");
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Bytes: a part's bytes end well only if digest and size are right, so that nobody downstream can forget to check.
// ---------------------------------------------------------------------------------------------------------------------

type PartSource = { origin: Origin; meter: ByteMeter; signal: AbortSignal };

/** Yields the bytes of a part, verified if the image names it by digest. */
async function* openPart({ descriptor, name }: Part, { origin, meter, signal }: PartSource): Bytes {
  const bytes = "bytes" in origin
    ? origin.bytes
    : descriptor && verified(origin.store.blob(descriptor, 0), descriptor, name);
  if (bytes === undefined) return;
  try {
    for await (const chunk of interruptible(bytes, signal)) {
      meter.received(chunk.length);
      yield chunk;
    }
  } catch (error) {
    if (descriptor === undefined || !(error instanceof FetchWheelsError) || error.kind !== "not-found") throw error;
    const layer = descriptor.urls === undefined ? "layer" : "foreign layer, which registries may not distribute,";
    throw notFoundError(error.message, { hint: `the image names a ${layer} that is missing`, cause: error });
  }
}

/** Passes bytes on. Throws before the last one if the digest is wrong, and as soon as there are too many. */
async function* verified(bytes: Bytes, { digest, size }: Descriptor, name = digest): Bytes {
  const fail = (state: string) => integrityError(`Cannot verify ${quote(name)}: ${state}`);
  const hash = crypto.createHash(digest.split(":")[0] ?? "");
  const check = () => {
    const actual = hash.digest("hex");
    if (!digest.endsWith(`:${actual}`)) throw fail(`the digest of its bytes is ${actual}, not ${digest}`);
  };
  let received = 0;
  for await (const chunk of bytes) {
    received += chunk.length;
    if (size !== undefined && received > size) throw fail(`it has more than the ${size} bytes that its manifest says`);
    hash.update(chunk);
    if (received === size) check();
    yield chunk;
  }
  if (size !== undefined && received < size) throw fail(`it has ${received} bytes, but its manifest says ${size}`);
  if (size === undefined || size === 0) check();
}

/** Pulls exact amounts out of a stream of chunks. What it returns is a view that holds until the next call. */
class ByteReader {
  readonly #source: AsyncIterator<Uint8Array>;
  #chunk: Uint8Array = new Uint8Array();
  /** Bytes consumed so far. */
  position = 0;

  /** Bytes that can be read without waiting for the source. */
  get buffered(): number {
    return this.#chunk.length;
  }

  /** `endsEarly` makes the error for a source that ends too early; `seek` skips bytes of it without reading them. */
  constructor(source: Bytes, private readonly endsEarly: () => Error, private readonly seek?: (bytes: number) => void) {
    this.#source = source[Symbol.asyncIterator]();
  }

  /** Returns between one and `limit` bytes, or undefined at the end. */
  async some(limit: number): Promise<Uint8Array | undefined> {
    while (this.#chunk.length === 0) {
      const { done, value } = await this.#source.next();
      if (done) return undefined;
      // A view that is not a Buffer, whose subarray() is slow.
      this.#chunk = new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
    }
    return this.#take(limit);
  }

  /** Yields the next `size` bytes as they lie in the chunks. */
  async *pieces(size: number): Bytes {
    for (let left = size; left > 0;) {
      const piece = await this.some(left);
      if (piece === undefined) throw this.endsEarly();
      left -= piece.length;
      yield piece;
    }
  }

  /** Returns `size` bytes; copies them only if they lie in several chunks. */
  async exactly(size: number): Promise<Uint8Array> {
    if (this.#chunk.length >= size) return this.#take(size);
    const joined = new Uint8Array(size);
    let filled = 0;
    for await (const piece of this.pieces(size)) {
      joined.set(piece, filled);
      filled += piece.length;
    }
    return joined;
  }

  /** Returns the next `size` bytes, fewer at the end, and leaves them to be read. */
  async peek(size: number): Promise<Uint8Array> {
    while (this.#chunk.length < size) {
      const seen = new Uint8Array(this.#chunk); // the source may free a chunk when the next one is requested
      const { done, value } = await this.#source.next();
      this.#chunk = done ? seen : Buffer.concat([seen, value]);
      if (done) break;
    }
    return this.#chunk.subarray(0, size);
  }

  async skip(size: number): Promise<void> {
    const left = size - this.#take(size).length;
    if (this.seek !== undefined) {
      this.seek(left);
      this.position += left;
    } else for await (const _ of this.pieces(left));
  }

  /** Yields the rest. */
  async *rest(): Bytes {
    for (let piece = await this.some(Infinity); piece !== undefined; piece = await this.some(Infinity)) yield piece;
  }

  /** Reads to the end, so that checks on the source see all bytes. */
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
    this.position += view.length;
    return view;
  }
}

/** minizlib changes its options, so it gets a copy, and passes them on to `node:zlib`. Its types do not list this one. */
const INFLATE_OPTIONS: ConstructorParameters<typeof Gunzip>[0] & { chunkSize: number } = { chunkSize: INFLATED_BYTES };
const ZSTD_FRAME = 0xfd2fb528;
const ZSTD_SKIPPABLE = 0x184d2a50; // the first of 16 magic numbers

const MAGICS: [magic: string, format: string][] = [
  ["\x1f\x8b", "gzip data"],
  ["\x28\xb5\x2f\xfd", "zstd data"],
  ["\xfd7zXZ\0", "xz data"],
  ["BZh", "bzip2 data"],
  ["PK\x03\x04", "a zip file (a wheel?)"],
  ["7z\xbc\xaf\x27\x1c", "a 7z file"],
  ["\x04\x22M\x18", "lz4 data"],
];

/** Names what bytes are by how they begin; undefined for anything else, such as a tar archive or JSON. */
function formatOf(bytes: Uint8Array): string | undefined {
  const head = Buffer.from(bytes.subarray(0, TAR_BLOCK_BYTES)).toString("latin1");
  if (head === "") return "empty";
  if (/^\s*<(?:!doctype|html|\?xml)/i.test(head)) return "an HTML page (text/html; from a login page or a proxy?)";
  return MAGICS.find(([magic]) => head.startsWith(magic))?.[1];
}

/** Undoes gzip or zstd, as the first bytes say. Always drains its input, so that trailing bytes are verified too. */
async function* decompress(bytes: Bytes, name: string): Bytes {
  const fail = (state: string) => integrityError(`Cannot decompress ${quote(name)}: ${state}`);
  const reader = new ByteReader(bytes, () => fail("it ends early (truncated?)"));
  try {
    const head = await reader.peek(TAR_BLOCK_BYTES);
    const format = isTarHeader(head) ? undefined : formatOf(head);
    if (format === "gzip data") {
      yield* inflate(new Gunzip({ ...INFLATE_OPTIONS }), reader.rest(), fail);
    } else if (format === "zstd data" || (firstNumber(head) & 0xfffffff0) === ZSTD_SKIPPABLE) {
      yield* inflate(new ZstdDecompress({ ...INFLATE_OPTIONS }), zstdPieces(reader, fail), fail);
    } else if (format === undefined) yield* reader.rest();
    else throw integrityError(`Cannot read ${quote(name)}: it is ${format}, not a tar archive`);
    await reader.drain();
  } finally {
    reader.cancel();
  }
}

/** Estimates how many times their size some bytes inflate to, by the beginning of them. */
async function inflationOf(head: Uint8Array): Promise<number> {
  let size = 0;
  try {
    for await (const chunk of decompress(ReadableStream.from([head]), "")) {
      size += chunk.length;
      if (size > TEXT_FACTOR * head.length) break; // it may go on for gigabytes
    }
  } catch {
    // It is cut short. What else may be wrong with it will show when all of it is decoded.
  }
  return size / head.length;
}

/** Writes each piece and yields what came out. The decoder works synchronously and throws its errors from `write`. */
async function* inflate(decoder: Gunzip | ZstdDecompress, pieces: Bytes, fail: (state: string) => Error): Bytes {
  const ready: Uint8Array<ArrayBuffer>[] = [];
  decoder.on("data", (chunk) => ready.push(chunk as Uint8Array<ArrayBuffer>));
  const run = (step: () => void) => {
    try {
      step();
    } catch (error) {
      throw fail((error as Error).message.replace(/^zlib: /, ""));
    }
  };
  async function* drained(): Bytes {
    for (const chunk of ready.splice(0)) {
      // A buffer that is not full may be one that the decoder goes on to fill.
      const own = chunk.byteLength === chunk.buffer.byteLength ? chunk : new Uint8Array(chunk);
      yield own;
      // Freed at once: the garbage collector would take its time, and memory that was just used is faster.
      if (!own.buffer.detached) own.buffer.transfer(0);
    }
  }
  try {
    let size = DENSE_BYTES;
    const turns = new Turns();
    for await (const piece of pieces) {
      for (let at = 0; at < piece.length;) {
        const part = piece.subarray(at, at + size);
        run(() => decoder.write(part as Buffer));
        const inflated = ready.reduce((sum, { length }) => sum + length, 0);
        size = inflated > DENSE_FACTOR * part.length ? DENSE_BYTES : DEFLATED_BYTES;
        at += part.length;
        yield* drained();
        await turns.give();
      }
    }
    run(() => decoder.end());
    yield* drained();
  } finally {
    decoder.close();
  }
}

const MAX_BLOCKS = 16; // of zstd in one piece

/**
 * Cuts zstd (RFC 8878, section 3.1) into frame headers and blocks, because the decoder stops at the end of a frame
 * without a word about what follows in the same piece, and takes a truncated frame for a whole one. Drops skippable
 * frames. A block inflates to 128 KiB at most, so that a piece of some blocks cannot take much memory.
 */
async function* zstdPieces(reader: ByteReader, fail: (state: string) => Error): Bytes {
  for (let head = await reader.peek(8); head.length > 0; head = await reader.peek(8)) {
    const magic = firstNumber(head);
    if ((magic & 0xfffffff0) === ZSTD_SKIPPABLE) {
      await reader.skip(8 + firstNumber(head.subarray(4)));
      continue;
    }
    if (magic !== ZSTD_FRAME) throw fail("what follows a zstd frame is not another one");
    const descriptor = head[4] ?? 0;
    const isSingleSegment = (descriptor & 0x20) !== 0;
    const dictionaryBytes = [0, 1, 2, 4][descriptor & 3] ?? 0;
    const contentSizeBytes = [isSingleSegment ? 1 : 0, 2, 4, 8][descriptor >> 6] ?? 0;
    yield await reader.exactly(5 + (isSingleSegment ? 0 : 1) + dictionaryBytes + contentSizeBytes);
    const checksumBytes = descriptor & 4 ? 4 : 0;
    for (let isLast = false; !isLast;) {
      let size = 0;
      for (let blocks = 0; !isLast && (blocks === 0 || blocks < MAX_BLOCKS && size + 3 <= reader.buffered); blocks++) {
        const [low = 0, middle = 0, high = 0] = (await reader.peek(size + 3)).subarray(size);
        const block = low | middle << 8 | high << 16;
        isLast = (block & 1) === 1;
        const isRunLength = (block >> 1 & 3) === 1;
        size += 3 + (isRunLength ? 1 : block >> 3) + (isLast ? checksumBytes : 0);
      }
      yield* reader.pieces(size);
    }
  }
}

/** Reads four bytes, the least significant one first; 0 if there are fewer. */
function firstNumber(bytes: Uint8Array): number {
  return bytes.length < 4 ? 0 : new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 Archive: the tar reader; members made safe and selected. Only headers are interpreted, never the bodies of members.
// ---------------------------------------------------------------------------------------------------------------------

/** A member as its header and the extensions before it describe it. Nothing about it is safe yet. */
interface TarMember {
  name: string;
  linkname: string;
  /** `file`, `directory`, `hard link`, `symbolic link`, or a type that is not supported. */
  type: string;
  size: number;
  mode: number;
  /** Seconds since 1970. */
  mtime: number;
  /** Why it cannot be extracted; it matters only if the member is selected. */
  fault?: string;
  /** Where its body begins in the archive. */
  offset: number;
  /** Yields the body once, as views that hold until the next one, and only before the next member. */
  body: Bytes;
}

/** Types by their flag; `S` is GNU's old form of a sparse file. */
// deno-fmt-ignore
const MEMBER_TYPES: Record<string, string> = {
  "\0": "file", "0": "file", "7": "file", "S": "file", "1": "hard link", "2": "symbolic link",
  "3": "character device", "4": "block device", "5": "directory", "6": "FIFO", "V": "volume label",
};
const BODILESS_TYPES = "123456";

type TarHeader = Omit<TarMember, "offset" | "body">;

/** Records of PAX, or GNU's long names under the same keys; values are bytes, which need not be UTF-8. */
type TarExtensions = Map<string, Uint8Array>;

/**
 * Reads a tar archive (POSIX pax, ustar, GNU and v7 formats) member by member, without buffering any, modeled on Go's
 * `archive/tar`. Skips what the caller does not read of a body. Ends only after the end marker and what follows that.
 * `name` is what the archive is called in messages; `seek` skips bytes of the source without reading them.
 */
async function* tarMembers(bytes: Bytes, name: string, seek?: (bytes: number) => void): AsyncGenerator<TarMember> {
  const fail = (state: string) => integrityError(`Cannot read archive ${quote(name)}: ${state}`);
  const reader = new ByteReader(bytes, () => fail("it ends early (truncated?)"), seek);
  const globals: TarExtensions = new Map();
  const pax: TarExtensions = new Map();
  const gnu: TarExtensions = new Map();
  try {
    for (let block = await reader.exactly(TAR_BLOCK_BYTES); block.some((byte) => byte !== 0);) {
      if (!isTarHeader(block)) {
        throw fail(reader.position === TAR_BLOCK_BYTES ? "it is not a tar archive" : "a header is corrupt");
      }
      const flag = String.fromCharCode(block[156] ?? 0);
      if ("xgLK".includes(flag)) {
        const size = parseTarNumber(block.subarray(124, 136)) ?? -1;
        if (size < 0 || size > MAX_EXTENSION_BYTES) {
          throw fail("an extension header has more than 1 MiB, or no valid size");
        }
        const body = await reader.exactly(size);
        if (flag === "x") pax.clear();
        if (flag === "L") gnu.set("path", new Uint8Array(untilNul(body)));
        else if (flag === "K") gnu.set("linkpath", new Uint8Array(untilNul(body)));
        else if (!readPaxRecords(body, flag === "g" ? globals : pax)) throw fail("a PAX header is corrupt");
        await reader.skip(paddingAfter(size));
      } else {
        // PAX wins over GNU's long names, and both win over the header. An empty value stands for the header's.
        const isPlain = gnu.size + globals.size + pax.size === 0;
        const given = isPlain ? [] : [...gnu, ...globals, ...pax].filter(([, value]) => value.length > 0);
        const header = readTarHeader(block, flag, new Map(given));
        if (!(header.size >= 0)) throw fail(`the size of ${quote(header.name)} is invalid`);
        // GNU's old sparse files have further blocks of holes before the body, which the size does not include.
        for (let isMore = flag === "S" && block[482] === 1; isMore;) {
          isMore = (await reader.exactly(TAR_BLOCK_BYTES))[504] === 1;
        }
        const { size } = header;
        const offset = reader.position;
        yield { ...header, offset, body: reader.pieces(size) };
        await reader.skip(offset + size + paddingAfter(size) - reader.position);
        pax.clear();
        gnu.clear();
      }
      block = await reader.exactly(TAR_BLOCK_BYTES);
    }
    await reader.drain();
  } finally {
    reader.cancel();
  }
}

/** Puts a header and its extensions together. A size of NaN is invalid. */
function readTarHeader(block: Uint8Array, flag: string, extensions: TarExtensions): TarHeader {
  const { text: name, fault } = decodeName(extensions.get("path") ?? headerName(block));
  const target = decodeName(extensions.get("linkpath") ?? untilNul(block.subarray(157, 257)));
  const isSparse = flag === "S" || extensions.has("sparse");
  const isDirectory = flag === "5" || MEMBER_TYPES[flag] === "file" && name.endsWith("/");
  const mtime = parsePaxNumber(extensions.get("mtime"), /^-?\d+(?:\.\d*)?$/);
  const paxSize = extensions.get("size");
  const size = paxSize ? parsePaxNumber(paxSize, /^\d+$/) : parseTarNumber(block.subarray(124, 136));
  return {
    name,
    linkname: target.text,
    type: isDirectory ? "directory" : MEMBER_TYPES[flag] ?? "member of unknown type",
    size: isDirectory || BODILESS_TYPES.includes(flag) ? 0 : Number.isSafeInteger(size) ? size ?? NaN : NaN,
    mode: parseTarNumber(block.subarray(100, 108)) ?? 0o644,
    mtime: mtime ?? parseTarNumber(block.subarray(136, 148)) ?? 0,
    fault: isSparse ? "is a sparse file, which is not supported" : fault ?? target.fault,
  };
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

const POSIX_MAGIC = Buffer.from("ustar\0");
const NOTHING = new Uint8Array();

/** The prefix belongs to the name only after POSIX's magic; GNU keeps other things in its place. */
function headerName(block: Uint8Array): Uint8Array {
  const name = untilNul(block.subarray(0, 100));
  const prefix = POSIX_MAGIC.equals(block.subarray(257, 263)) ? untilNul(block.subarray(345, 500)) : NOTHING;
  return prefix.length === 0 ? name : Buffer.concat([prefix, Buffer.from("/"), name]);
}

/** Octal digits between blanks or NULs, or base 256 in two's complement; undefined for anything else. */
function parseTarNumber(field: Uint8Array): number | undefined {
  if ((field[0] ?? 0) & 0x80) {
    const bits = field.length * 8 - 1; // the first bit only says that base 256 follows
    const value = Number(BigInt.asIntN(bits, BigInt(`0x${Buffer.from(field).toString("hex")}`)));
    return Number.isSafeInteger(value) ? value : undefined;
  }
  const isBlank = (byte: number | undefined) => byte === 0 || byte === 0x20;
  let at = 0;
  let end = field.length;
  while (at < end && isBlank(field[at])) at++;
  while (end > at && isBlank(field[end - 1])) end--;
  let value = 0;
  for (; at < end; at++) {
    const digit = (field[at] ?? 0) - 0x30;
    if (digit < 0 || digit > 7) return undefined;
    value = value * 8 + digit;
  }
  return value;
}

const NAME_DECODER = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A name that is not UTF-8 is shown with replacement characters, and is a fault. */
function decodeName(field: Uint8Array): { text: string; fault?: string } {
  const bytes = field.subarray(0, MAX_NAME_BYTES);
  if (bytes.length === 0) return { text: "" };
  try {
    return { text: NAME_DECODER.decode(bytes) };
  } catch {
    return { text: Buffer.from(bytes).toString("utf8"), fault: "has a name that is not UTF-8" };
  }
}

/** Adds `LENGTH KEY=VALUE\n` records to a map. Goes by their lengths, because a value may hold anything. */
function readPaxRecords(body: Uint8Array, records: TarExtensions): boolean {
  const text = Buffer.from(body).toString("latin1"); // much faster to search than bytes, and as long
  for (let at = 0; at < text.length;) {
    const blank = text.indexOf(" ", at);
    const digits = text.slice(at, Math.max(at, blank));
    const end = at + Number(/^\d{1,9}$/.test(digits) ? digits : NaN);
    const equals = text.indexOf("=", blank);
    const isRecord = end <= text.length && equals > blank + 1 && equals < end && text[end - 1] === "\n";
    if (!isRecord) return false;
    // Keeps only keys that matter, and those of sparse files as one, so that many headers do not take much memory.
    const key = text.slice(blank + 1, equals).replace(/^GNU\.sparse\..*/s, "sparse");
    if (["path", "linkpath", "size", "mtime", "sparse"].includes(key)) {
      records.set(key, new Uint8Array(body.subarray(equals + 1, end - 1)));
    }
    at = end;
  }
  return true;
}

function parsePaxNumber(value: Uint8Array | undefined, pattern: RegExp): number | undefined {
  const text = Buffer.from(value ?? []).toString("latin1");
  return pattern.test(text) ? Number(text) : undefined;
}

function untilNul(field: Uint8Array): Uint8Array {
  const end = field.indexOf(0);
  return end < 0 ? field : field.subarray(0, end);
}

function paddingAfter(size: number): number {
  return (TAR_BLOCK_BYTES - size % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES;
}

/** Which members to extract: globs, and how many leading components to drop. */
type FilterOptions = { include: string[]; exclude: string[]; strip: number };

/** Where a member is extracted, or why it is skipped. */
type MemberFilter = (path: string) => { path: string; reason?: string };

const EXCLUDED = "excluded by --exclude";
const NOT_INCLUDED = "not matched by --include";
const RESERVED = "reserved name: fetch_wheels takes it for a staging directory of its own";
const HIDDEN = 'hidden (a component of its path begins with ".")';
const TOO_SHORT = "its path has too few components for --strip-components";
const UNSUPPORTED = "unsupported type: ";
const WHITEOUT = "whiteout";

/** Makes a filter for clean paths. A glob stands for a path, for a name, and for everything below either. */
async function memberFilter({ include, exclude, strip }: FilterOptions): Promise<MemberFilter> {
  const isIncluded = await globMatcher(include);
  const isExcluded = await globMatcher(exclude);
  return (path) => {
    const components = path.split("/");
    const matches = (matcher: (text: string) => boolean) =>
      components.some((name, at) => matcher(name) || matcher(components.slice(0, at + 1).join("/")));
    if (exclude.length > 0 && matches(isExcluded)) return { path, reason: EXCLUDED };
    if (include.length > 0 && !matches(isIncluded)) return { path, reason: NOT_INCLUDED };
    // The next run would follow a journal in it, which could name any path.
    if (components.some((name) => STAGING_NAME.test(name))) return { path, reason: RESERVED };
    const isHidden = components.some((name) => name.startsWith(".") && name !== "..");
    if (include.length === 0 && isHidden) return { path, reason: HIDDEN };
    return components.length <= strip ? { path, reason: TOO_SHORT } : { path: components.slice(strip).join("/") };
  };
}

async function globMatcher(globs: string[]): Promise<(text: string) => boolean> {
  if (globs.length === 0) return () => false;
  // Imported only if it is needed, because it takes 10 ms to load.
  // @ts-types="npm:@types/picomatch@^4.0.0"
  const { default: picomatch } = await import("npm:picomatch@^4.0.3");
  return picomatch(globs, { dot: true, nonegate: true });
}

/** Drops a leading "/", as tar and Docker do, and components that say nothing. */
function cleanPath(path: string): string {
  return path.split("/").filter((component) => component !== "" && component !== ".").join("/");
}

const TOO_LONG = `its path has more than ${MAX_PATH} characters or ${MAX_COMPONENTS} components`;

function isTooLong(path: string): boolean {
  return path.length > MAX_PATH || path.split("/").length > MAX_COMPONENTS;
}

/** Reports whether a clean path could lead outside of the directory that it is meant for. */
function isOutside(path: string): boolean {
  return path.includes("\0") || path.split("/").includes("..");
}

/** How one archive is extracted. In an artifact's directory, whiteouts are files like any other. */
type ArchivePlan = Part & { filter: FilterOptions; isDecompressed?: boolean };

/** A member that may be written: its path is clean and inside. `source` is its path before components were dropped. */
type ArchiveMember =
  | { kind: "file"; path: string; source: string; size: number; mode: number; mtime: number; body: Bytes }
  | { kind: "directory"; path: string; source: string; mode: number }
  | { kind: "hard link"; path: string; source: string; target: string }
  | { kind: "symbolic link"; path: string; source: string; target: string }
  | { kind: "skipped"; source: string; reason: string; removes?: Removal };

/** What a member removes from lower layers: what is below a path and, unless it is opaque, what is at the path. */
type Removal = { target: string; isOpaque: boolean };

/** Yields the members of an archive. An unsafe member rejects the whole archive, unless it is skipped. */
async function* archiveMembers(bytes: Bytes, plan: ArchivePlan): AsyncGenerator<ArchiveMember> {
  const { name, directory, contentDigest: digest } = plan;
  const content = plan.isDecompressed ? bytes : decompress(bytes, name);
  const globs = directory ? { include: ["**"], exclude: [] } : {};
  const filter = await memberFilter({ ...plan.filter, ...globs });
  for await (const member of tarMembers(digest ? verified(content, { digest }, name) : content, name)) {
    const safe = safeMember(member, filter, directory);
    if (safe !== undefined) yield safe;
  }
}

function damageError(member: string, state: string, options?: { hint?: string }): FetchWheelsError {
  return integrityError(`Cannot extract ${quote(member)}: ${state}`, options);
}

/** Applies every rule to a member; undefined for the archive's own root. */
function safeMember(member: TarMember, filter: MemberFilter, directory: string | undefined): ArchiveMember | undefined {
  const { name, type, linkname, size, mode, mtime, fault, body } = member;
  if (isTooLong(name)) throw damageError(name, TOO_LONG);
  const source = cleanPath(name);
  if (source === "" && type === "directory") return undefined;
  const { path, reason } = filter(source);
  const whiteout = directory === undefined ? whiteoutOf(source) : undefined;
  const removes = type === "directory" ? undefined : { target: source, isOpaque: false };
  if (reason === EXCLUDED || reason === NOT_INCLUDED) return whiteout ?? { kind: "skipped", source, reason, removes };
  if (isOutside(source)) throw unsafeError(name, `its path contains ${source.includes("\0") ? "NUL" : '".."'}`);
  if (source === "") throw damageError(name, "it has no name");
  if (directory && source !== directory && !source.startsWith(`${directory}/`)) {
    throw unsafeError(name, `it lies outside of its directory ${quote(directory)}`);
  }
  if (whiteout !== undefined) return whiteout;
  if (reason !== undefined) return { kind: "skipped", source, reason, removes };
  if (fault !== undefined) throw damageError(name, `it ${fault}`);
  switch (type) {
    case "file":
      // As in PEP 706: the owner can read and write, others cannot write, and special bits are dropped.
      return { kind: "file", path, source, size, mode: mode & 0o755 | 0o600, mtime, body };
    case "directory":
      return { kind: "directory", path, source, mode: mode & 0o755 | 0o700 };
    case "hard link": {
      const target = cleanPath(linkname);
      if (isOutside(target)) throw unsafeError(name, `it is a hard link to ${quote(linkname)}, which is outside`);
      return { kind: "hard link", path, source, target };
    }
    case "symbolic link":
      if (linkname !== "" && linkname.length <= MAX_PATH && !linkname.includes("\0")) {
        return { kind: "symbolic link", path, source, target: linkname };
      }
      throw damageError(name, "it is a symbolic link without a valid target");
    default:
      return { kind: "skipped", source, reason: `${UNSUPPORTED}${type}`, removes };
  }
}

/** OCI image specification, "Whiteouts": `.wh.NAME` removes NAME of lower layers, `.wh..wh..opq` empties its directory. */
function whiteoutOf(source: string): ArchiveMember | undefined {
  const name = posix.basename(source);
  if (!name.startsWith(".wh.") || isOutside(source)) return undefined;
  const directory = posix.dirname(source);
  const removed = name.slice(".wh.".length);
  const isOpaque = removed === ".wh..opq";
  const isNothing = !isOpaque && (["", ".", ".."].includes(removed) || removed.startsWith(".wh."));
  const target = cleanPath(isOpaque ? directory : `${directory}/${removed}`);
  return { kind: "skipped", source, reason: WHITEOUT, removes: isNothing ? undefined : { target, isOpaque } };
}

// ---------------------------------------------------------------------------------------------------------------------
// 9 Extract: members become a tree of entries, on a disk or only in a list; large archives in a thread of their own.
// ---------------------------------------------------------------------------------------------------------------------

/** An entry of the tree. `source` is its path in the archive, `layer` the ordinal of the archive that it came from. */
interface TreeEntry {
  kind: "file" | "directory" | "symbolic link";
  target?: string; // of a symbolic link
  size: number;
  digest: string | null;
  source: string;
  layer: number;
}

/** What archives left in a tree, by paths, parents before children; and what was skipped. */
type Extracted = { entries: Map<string, TreeEntry>; skipped: FetchResult["skipped"] };

/** A path in the tree, and in the archive. */
type Place = { path: string; source: string };

type FileMember = Extract<ArchiveMember, { kind: "file" }>;

/** Applies the members of one archive after the other, and lets none of them lead out of the tree. */
class TreeBuilder {
  readonly #umask: number;
  readonly #entries: Extracted["entries"] = new Map();
  readonly #skipped: Extracted["skipped"] = [];
  /** Paths in the tree by their paths in the archives, for hard links and whiteouts. */
  readonly #bySource = new Map<string, string>();
  /** Paths by the directory that they are in. */
  readonly #children = new Map<string, Set<string>>();
  /** Removals that this layer has asked for, because doing one again takes long and changes nothing. */
  readonly #removals = new Set<string>();
  /** Paths that members of lower layers had in their archives, and the directories above them. */
  readonly #lowerSources = new Set<string>();
  #layer = 0;
  #isImageLayer = false;

  /** `root` is an empty directory; without it, the tree is only a list. */
  constructor(private readonly settings: Pick<Settings, "report" | "signal">, private readonly root?: string) {
    // The root was created with all permissions, so what it lacks is the umask.
    this.#umask = root === undefined ? 0 : 0o777 & ~(Deno.statSync(root).mode ?? 0o777);
  }

  get size(): number {
    return this.#entries.size;
  }

  /** Adds an archive, which may replace entries of earlier ones. */
  async extract(plan: ArchivePlan, bytes: Bytes): Promise<void> {
    this.#layer++;
    this.#removals.clear();
    this.#isImageLayer = plan.descriptor !== undefined && plan.directory === undefined;
    for (const { source } of this.#entries.values()) {
      for (let path = source; path !== "." && !this.#lowerSources.has(path); path = posix.dirname(path)) {
        this.#lowerSources.add(path);
      }
    }
    const turns = new Turns(this.settings.signal); // because a few bytes may inflate to very many members
    for await (const member of archiveMembers(bytes, plan)) {
      await this.#add(member);
      await turns.give();
    }
  }

  /** Adds a file of an artifact. */
  async addDownload({ path = "", size = 0, descriptor }: Part, body: Bytes): Promise<void> {
    const mtime = Date.now() / 1000;
    await this.#addFile({ kind: "file", path, source: path, size, mode: 0o644, mtime, body }, descriptor?.digest);
  }

  /** Creates the symbolic links last, so that nothing is ever written through one. */
  async finish(): Promise<Extracted> {
    const turns = new Turns(this.settings.signal);
    for (const [path, { target }] of this.#entries) {
      if (target === undefined) continue;
      await turns.give();
      assertInside(path, this.#entries);
      this.#change("create", path, (full) => Deno.symlinkSync(target, full));
    }
    return { entries: this.#entries, skipped: this.#skipped };
  }

  async #add(member: ArchiveMember): Promise<void> {
    switch (member.kind) {
      case "skipped":
        if (member.removes !== undefined) this.#removeLower(member.removes);
        this.#skipped.push({ path: member.source, reason: member.reason });
        return;
      case "directory":
        this.#makeParents(member);
        return this.#makeDirectory(member.path, member);
      case "file":
        return await this.#addFile(member);
      case "hard link":
        return this.#addHardLink(member);
      case "symbolic link": {
        const { kind, path, source, target } = member;
        this.#makeRoom(member);
        this.#set(path, { kind, target, size: 0, digest: null, source });
      }
    }
  }

  async #addFile(member: FileMember, digest: string | null = null): Promise<void> {
    this.#makeRoom(member);
    const size = this.root === undefined ? member.size : await this.#writeFile(join(this.root, member.path), member);
    this.#set(member.path, { kind: "file", size, digest, source: member.source });
  }

  #set(path: string, entry: Omit<TreeEntry, "layer">): void {
    this.#entries.set(path, { ...entry, layer: this.#layer });
    this.#bySource.set(entry.source, path);
    const parent = posix.dirname(path);
    const children = this.#children.get(parent) ?? new Set();
    this.#children.set(parent, children.add(path));
    this.settings.report({ type: "extracted", members: this.size });
  }

  #addHardLink({ path, source, target }: Extract<ArchiveMember, { kind: "hard link" }>): void {
    const from = this.#bySource.get(target) ?? "";
    const entry = this.#entries.get(from);
    if (entry === undefined || entry.kind === "directory" || from === path) throw this.#linkError(source, target);
    this.#makeRoom({ path, source });
    if (!this.#entries.has(from)) throw this.#linkError(source, target); // it was in a directory that had to go
    const isFile = entry.kind === "file";
    if (isFile) this.#change("create", path, (full) => Deno.linkSync(join(this.root ?? "", from), full));
    this.#set(path, { ...entry, source });
  }

  #linkError(source: string, target: string): FetchWheelsError {
    const isSkipped = this.#skipped.some(({ path }) => path === target);
    const state = isSkipped ? "was not selected" : "is not an earlier file in the archive";
    const elsewhere = this.#isImageLayer ? "if the target is in a lower layer: --layer all" : undefined;
    const hint = isSkipped ? "select the target as well" : elsewhere;
    return damageError(source, `it is a hard link to ${quote(target)}, which ${state}`, { hint });
  }

  /** Removes what earlier archives put there. */
  #removeLower({ target, isOpaque }: Removal): void {
    if (target !== "" && !this.#lowerSources.has(target)) return;
    const removed = this.#bySource.get(target) ?? "";
    const { kind = "directory", layer = 0 } = this.#entries.get(removed) ?? {};
    if (kind !== "directory" && !isOpaque) {
      if (layer < this.#layer) this.#drop(removed);
      return;
    }
    const removal = `${target}${isOpaque ? "/" : ""}`;
    if (this.#removals.has(removal)) return;
    this.#removals.add(removal);
    const isRemoved = ({ source, layer }: TreeEntry) =>
      layer < this.#layer && (!isOpaque && source === target || target === "" || source.startsWith(`${target}/`));
    const used = new Set<string>();
    // Without its first components, a directory may be in several places.
    const paths = removed === "" ? [...this.#entries.keys()].reverse() : [...this.#below(removed), removed];
    for (const path of paths) {
      const entry = this.#entries.get(path);
      if (entry !== undefined && isRemoved(entry) && !used.has(path)) this.#drop(path);
      else used.add(posix.dirname(path));
    }
  }

  /** Yields the paths below a directory, children before parents. */
  *#below(directory: string): Generator<string> {
    for (const path of [...this.#children.get(directory) ?? []]) {
      yield* this.#below(path);
      yield path;
    }
  }

  #makeParents({ path, source }: Place): void {
    for (let slash = path.indexOf("/"); slash > 0; slash = path.indexOf("/", slash + 1)) {
      const parent = path.slice(0, slash);
      const entry = this.#entries.get(parent);
      if (entry?.kind === "directory") continue;
      if (entry?.layer === this.#layer) {
        if (entry.kind === "file") throw damageError(path, `${quote(parent)} is an earlier file in the archive`);
        throw unsafeError(path, `it would be written through the symbolic link ${quote(parent)}`);
      }
      // The path is the end of the source, from which leading components were dropped.
      this.#makeDirectory(parent, { source: source.slice(0, slash - path.length), mode: 0o755 });
    }
  }

  #makeDirectory(path: string, { source, mode }: { source: string; mode: number }): void {
    const entry = this.#entries.get(path);
    if (entry?.kind === "directory") {
      entry.layer = this.#layer;
      return this.#change("create", path, (full) => Deno.chmodSync(full, mode));
    }
    if (entry?.layer === this.#layer) throw damageError(path, `it is a directory, but it was a ${entry.kind} before`);
    if (entry !== undefined) this.#drop(path);
    this.#change("create", path, (full) => {
      Deno.mkdirSync(full, { mode });
      if (mode & this.#umask) Deno.chmodSync(full, mode);
    });
    this.#set(path, { kind: "directory", size: 0, digest: null, source });
  }

  /** Makes the parents, and removes what is at the path: of several members of one name, the last one wins. */
  #makeRoom({ path, source }: Place): void {
    this.#makeParents({ path, source });
    const entry = this.#entries.get(path);
    if (entry?.kind === "directory") {
      if (entry.layer === this.#layer) throw damageError(path, "it is not a directory, but it was one before");
      for (const other of this.#below(path)) this.#drop(other);
    }
    if (entry !== undefined) this.#drop(path);
  }

  #drop(path: string): void {
    const { source = "", kind } = this.#entries.get(path) ?? {};
    if (kind !== "symbolic link") this.#change("replace", path, (full) => Deno.removeSync(full));
    this.#entries.delete(path);
    this.#children.get(posix.dirname(path))?.delete(path);
    if (this.#bySource.get(source) === path) this.#bySource.delete(source);
  }

  /** Changes the disk, synchronously, which is much faster for thousands of small files. Does nothing for a list. */
  #change(action: string, path: string, change: (full: string) => void): void {
    const { root } = this;
    if (root !== undefined) onDisk(action, path, () => change(join(root, path)));
  }

  async #writeFile(full: string, { path, mode, mtime, body }: FileMember): Promise<number> {
    using file = onDisk("create", path, () => Deno.openSync(full, { write: true, createNew: true, mode }));
    let size = 0;
    for await (const bytes of body) {
      this.settings.signal.throwIfAborted();
      onDisk("write", path, () => writeAll(file, bytes));
      size += bytes.length;
    }
    const seconds = Math.min(Math.max(mtime, -MAX_MTIME_SECONDS), MAX_MTIME_SECONDS);
    onDisk("write", path, () => {
      if (mode & this.#umask) Deno.chmodSync(full, mode);
      file.utimeSync(seconds, seconds);
    });
    return size;
  }
}

/** Walks a link's target as the kernel would, through the tree's other links, and refuses to leave the tree. */
function assertInside(path: string, entries: Extracted["entries"]): void {
  const { target = "" } = entries.get(path) ?? {};
  const parentOf = (child: string) => child.slice(0, Math.max(0, child.lastIndexOf("/")));
  let place = parentOf(path); // as text, because joining components for each look-up would take seconds
  const todo = [target];
  for (let links = 1; todo.length > 0;) {
    const text = todo.pop() ?? "";
    if (text.startsWith("/")) throw unsafeError(path, `it is a symbolic link to the absolute path ${quote(text)}`);
    const [component = ""] = /^[^/]*/.exec(text) ?? [];
    const rest = text.slice(component.length).replace(/^\/+/, "");
    if (rest !== "") todo.push(rest);
    if (component === "" || component === ".") continue;
    if (component === "..") {
      if (place === "") throw unsafeError(path, `it is a symbolic link to ${quote(target)}, which is outside`);
      place = parentOf(place);
      continue;
    }
    const entered = place === "" ? component : `${place}/${component}`;
    const next = entries.get(entered)?.target;
    if (next === undefined) place = entered;
    else if (++links > MAX_LINKS) throw unsafeError(path, "its symbolic links form a loop");
    else todo.push(next);
  }
}

/** To the worker, which answers each message in turn: an archive of a tree, its bytes, and their end. */
type ToWorker =
  | { root: string; plan: ArchivePlan }
  | { chunk: Uint8Array<ArrayBuffer> }
  | "end of archive"
  | "finish"
  | "stop";

type FromWorker = { members: number } | { extracted: Extracted } | { error: ReturnType<typeof describeError> };

/**
 * A `TreeBuilder` in a thread of its own: the decoder is synchronous, and this thread has the network to read and a hash
 * to compute. The worker writes only to the staging directory; what is published is decided here.
 */
class WorkerTreeBuilder {
  readonly #worker: Worker;
  readonly #calls: PromiseWithResolvers<FromWorker>[] = [];
  readonly #failed = new AbortController();
  readonly #ended = Promise.withResolvers<void>();
  readonly #report: Report;
  readonly #signal: AbortSignal;

  constructor({ report, signal }: Settings, private readonly root: string, url: string) {
    this.#report = report;
    this.#signal = AbortSignal.any([signal, this.#failed.signal]);
    this.#worker = new Worker(url, { type: "module", name: WORKER_NAME });
    this.#worker.onmessage = ({ data }: MessageEvent<FromWorker>) => this.#receive(data);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const message = `Cannot extract in a worker: ${event.message}`;
      this.#receive({ error: { kind: "internal", message, hint: null } });
    };
  }

  async extract(plan: ArchivePlan, bytes: Bytes): Promise<void> {
    const reader = new ByteReader(
      interruptible(bytes, this.#signal),
      () => integrityError("the layer ends early"),
    );
    try {
      const isText = await inflationOf(await reader.peek(SAMPLE_BYTES)) > TEXT_FACTOR;
      this.#call({ root: this.root, plan: { ...plan, isDecompressed: isText } });
      await this.#send(isText ? decompress(reader.rest(), plan.name) : reader.rest());
      await this.#call("end of archive");
    } finally {
      reader.cancel();
    }
  }

  async #send(bytes: Bytes): Promise<void> {
    const pending: { size: number; answer: Promise<unknown> }[] = [];
    let pendingBytes = 0;
    for await (const chunk of bytes) {
      this.#signal.throwIfAborted();
      // The buffer of a small part of it is not worth sending, and one that is shared cannot be handed over.
      const isOwn = chunk.buffer instanceof ArrayBuffer && chunk.byteLength > chunk.buffer.byteLength / 2;
      const own = (isOwn ? chunk : new Uint8Array(chunk)) as Uint8Array<ArrayBuffer>;
      const size = own.length;
      pending.push({ size, answer: this.#call({ chunk: own }, [own.buffer]) });
      pendingBytes += size;
      while (pendingBytes > MAX_PENDING_BYTES) {
        const oldest = pending.shift();
        await oldest?.answer;
        pendingBytes -= oldest?.size ?? pendingBytes;
      }
    }
  }

  async finish(): Promise<Extracted> {
    const answer = await this.#call("finish");
    return "extracted" in answer ? answer.extracted : { entries: new Map(), skipped: [] };
  }

  /** Ends the work, so that no file appears later. */
  async stop(): Promise<void> {
    this.#worker.postMessage("stop");
    using _timer = startTimer(SHUTDOWN_MS / 2, this.#ended.resolve);
    await this.#ended.promise;
    this.#worker.terminate();
  }

  #call(message: ToWorker, transfer: ArrayBuffer[] = []): Promise<FromWorker> {
    const call = Promise.withResolvers<FromWorker>();
    this.#calls.push(call);
    this.#worker.postMessage(message, transfer);
    const answer = untilAborted(call.promise, this.#signal);
    answer.catch(() => {}); // of several calls that fail, only one is awaited
    return answer;
  }

  #receive(message: FromWorker): void {
    if ("error" in message) {
      const { kind, message: text, hint } = message.error;
      this.#failed.abort(new FetchWheelsError(kind, text, { hint: hint ?? undefined }));
    } else this.#calls.shift()?.resolve(message);
    if ("members" in message) this.#report({ type: "extracted", members: message.members });
    else this.#ended.resolve();
  }
}

/** The worker's side. */
async function serveExtraction(): Promise<void> {
  const port = globalThis as unknown as Worker;
  const stopped = new AbortController();
  const inbox = new ReadableStream<ToWorker>({
    start: (controller) =>
      void (port.onmessage = ({ data }) => {
        if (data === "stop") stopped.abort(new FetchWheelsError("internal", "Cannot extract: stopped"));
        controller.enqueue(data);
      }),
  }).getReader();
  const post = (answer: FromWorker) => port.postMessage(answer);
  let builder: TreeBuilder | undefined;

  async function take(): Promise<Exclude<ToWorker, "stop">> {
    const { value = "stop" } = await inbox.read();
    if (value === "stop") throw stopped.signal.reason;
    return value;
  }

  async function* chunks(): Bytes {
    for (let message = await take(); typeof message === "object" && "chunk" in message; message = await take()) {
      yield message.chunk;
      message.chunk.buffer.transfer(0); // frees the memory at once; the garbage collector would take its time
      post({ members: builder?.size ?? 0 });
    }
  }

  try {
    for (let message = await take(); typeof message === "object" && "plan" in message; message = await take()) {
      builder ??= new TreeBuilder({ report: () => {}, signal: stopped.signal }, message.root);
      post({ members: builder.size });
      await builder.extract(message.plan, chunks());
      post({ members: builder.size });
    }
    if (builder !== undefined) post({ extracted: await builder.finish() });
  } catch (error) {
    post({ error: describeError(toPublicError(error)) });
  }
}

/** Drops a project's own pin, which would forbid building any other version of it. Returns the file's new size. */
function dropPin(file: string, project: string): number {
  const normalize = (name = "") => name.toLowerCase().replace(/[-_.]+/g, "-"); // PEP 503
  return onDisk("write", file, () => {
    const lines = fs.readFileSync(file, "latin1").split("\n"); // keeps each byte, in any encoding
    const pin = /^(?:\xef\xbb\xbf)?\s*([\w.-]+)\s*===/; // perhaps after a byte order mark
    const kept = lines.filter((line) => normalize(pin.exec(line)?.[1]) !== normalize(project));
    const { mode } = fs.statSync(file);
    fs.unlinkSync(file); // another name may be linked to the same file
    fs.writeFileSync(file, kept.join("\n"), { mode, encoding: "latin1" });
    return fs.statSync(file).size;
  });
}

/** Warns if no file is a wheel, or if a wheel's platform tag (PEP 427) is for another platform. */
function warnOfUnusableWheels(files: FileInfo[], { parts, otherLayers }: Delivery, settings: Settings): void {
  const { dryRun, list, output, filter, platform, report } = settings;
  if (dryRun || output !== undefined) return;
  const warn = (message: string) => report({ type: "warning", message });
  const wheels = files.map(({ path }) => posix.basename(path)).filter((name) => name.toLowerCase().endsWith(".whl"));
  if (wheels.length === 0) {
    if (list && parts.some(({ directory }) => directory)) return; // its members are not listed
    const count = parts.length + otherLayers;
    const place = parts.length === 1 ? `layer ${parts[0]?.index} of ${count}` : `${parts.length} of ${count} layers`;
    const hasOthers = otherLayers > 0 && filter.include.length === 0;
    return warn(`no wheels found${hasOthers ? ` in ${place}; --layer all extracts every layer` : ""}`);
  }
  const foreign = wheels.filter((name) => !isWheelFor(name, platform));
  if (foreign.length === 0) return;
  const more = foreign.length > 3 ? ` and ${foreign.length - 3} more` : "";
  const doubt = parts[0]?.descriptor ? " (wrong image?)" : "";
  warn(`wheels not built for ${formatPlatform(platform)}${doubt}: ${foreign.slice(0, 3).map(quote).join(", ")}${more}`);
}

/** Patterns of the architectures that wheels call by other names. */
// deno-fmt-ignore
const WHEEL_MACHINES = new Map([
  ["amd64", "(?:x86_64|amd64)"], ["arm64", "(?:aarch64|arm64)"], ["386", "i[3-6]86"], ["arm", "arm(?:v\\d\\w*)?"],
  ["loong64", "loongarch64"], ["mips64le", "mips64(?:el|le)?"], ["mipsle", "mips(?:el|le)?"],
]);

function isWheelFor(name: string, { os, architecture, variant = "v7" }: Platform): boolean {
  const [, tags] = /^[^-]+-[^-]+(?:-\d[^-]*)?-[^-]+-[^-]+-([^-]+)\.whl$/.exec(name.toLowerCase()) ?? [];
  if (tags === undefined) return true;
  const system = os === "windows" ? "win" : os === "darwin" ? "macosx" : "(?:(?:many|musl)?linux|android)";
  const pattern = new RegExp(`^${system}(?:_|\\d).*?${WHEEL_MACHINES.get(architecture) ?? architecture}$`);
  return tags.split(".").some((tag) => {
    if (tag === "any" || os === "windows" && tag === "win32" && architecture === "386") return true;
    if (os === "darwin" && /^macosx_.*_(?:universal2?|fat\d*|intel)$/.test(tag)) return true;
    // armv8l is a processor of version 8 in 32-bit mode, which is version 7.
    const level = Math.min(7, Number(/armv(\d)/.exec(tag)?.[1] ?? 0));
    return pattern.test(tag) && (architecture !== "arm" || level <= Number(variant.slice(1)));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 Publish: everything is written to a staging directory, and moved into place once all of it is known to be right.
// ---------------------------------------------------------------------------------------------------------------------

/**
 * What a target receives: parts, base first, the means to read them, and for messages the source, and how many layers of
 * the image were not selected.
 */
type Delivery = { parts: Part[]; otherLayers: number; open: (part: Part) => Bytes; label: string };

type Received = Pick<FetchResult, "files" | "skipped">;

/** Where the bytes go. Disposing of it removes whatever was not published. */
type Target = AsyncDisposable & { receive(delivery: Delivery): Promise<Received> };

async function openTarget(settings: Settings): Promise<Target> {
  const { output, dest, clean, env, signal } = settings;
  if (clean && output === undefined) assertCleanable(dest, env("HOME"));
  if (settings.dryRun) return toTarget((delivery) => previewOnly(delivery, settings));
  if (settings.list) return toTarget((delivery) => listMembers(delivery, settings));
  if (output === undefined) {
    const staging = await StagingDirectory.open(onDisk("use", dest, () => treePlaces(dest)), settings);
    return toTarget((delivery) => receiveTree(delivery, staging.path, settings), staging);
  }
  const stat = typeof output === "string" ? onDisk("use", output, () => statIfExists(output)) : undefined;
  if (stat?.isDirectory()) throw ioError(`Cannot write ${quote(String(output))}: it is a directory`);
  const isStream = typeof output !== "string" || stat?.isFile() === false;
  if (isStream) return toTarget((delivery) => streamTarball(delivery, output, signal));
  // A link stays a link, and its target is replaced.
  const path = stat === undefined ? output : onDisk("use", output, () => fs.realpathSync(output));
  onDisk("write", path, () => fs.statSync(dirname(path))); // which is not created
  const staging = await StagingDirectory.open([[dirname(path), basename(path)]], settings);
  return toTarget((delivery) => receiveFile(delivery, path, join(staging.path, "new")), staging);
}

function toTarget(receive: Target["receive"], staging?: StagingDirectory): Target {
  return { receive, [Symbol.asyncDispose]: async () => await staging?.[Symbol.asyncDispose]() };
}

/** `--clean` must not remove more than a directory of wheels. */
function assertCleanable(dest: string, home: string | undefined): void {
  const real = (path: string) => onDisk("use", path, () => isReadable(path) ? fs.realpathSync(path) : path);
  const path = real(dest);
  const places = [["the root directory", "/"], ["the working directory", process.cwd()], ["the home directory", home]];
  for (const [name, place] of places) {
    const other = place && real(place);
    if (!other || other !== path && !other.startsWith(`${path}/`)) continue;
    const state = other === path ? name : `a parent of ${name}`;
    const message = `Cannot clean ${quote(dest)}: it is ${state}`;
    throw new FetchWheelsError("unsafe", message, { hint: "choose another --dest" });
  }
}

/** The manifest of an image proves that it exists; for a tarball, its first bytes do. */
async function previewOnly({ parts, open }: Delivery, { dest, clean, report }: Settings): Promise<Received> {
  for (const part of parts.filter(({ descriptor }) => descriptor === undefined)) {
    for await (const _ of open(part)) break;
  }
  const names = clean && fs.existsSync(dest) ? namesToClean(dest) : [];
  const more = names.length > 5 ? `, and ${names.length - 5} more` : "";
  const message = `--clean would remove from ${quote(dest)}: ${names.slice(0, 5).map(quote).join(", ")}${more}`;
  if (names.length > 0) report({ type: "warning", message });
  return describeTree(parts);
}

function namesToClean(dest: string): string[] {
  return onDisk("read", dest, () => fs.readdirSync(dest)).filter((name) => !name.startsWith(stagingPrefix("")));
}

/** Builds the tree without a disk. An artifact's files are listed from its manifest, without a download. */
async function listMembers({ parts, open }: Delivery, settings: Settings): Promise<Received> {
  const { filter } = settings;
  const builder = new TreeBuilder(settings);
  const titled: FileInfo[] = [];
  for (const part of parts) {
    const { path = part.directory || undefined, descriptor, size = 0 } = part;
    if (path === undefined) await builder.extract({ ...part, filter }, open(part));
    else titled.push({ path, size, digest: descriptor?.digest ?? null });
  }
  const { files, skipped } = describeTree(parts, await builder.finish());
  return { files: [...files, ...titled], skipped };
}

/** Lists a tree, if there is one; the titles that were not selected come first. */
function describeTree(parts: Part[], tree?: Extracted): Received {
  const files = [...tree?.entries ?? []].filter(([, { kind }]) => kind !== "directory");
  return {
    files: files.map(([path, { size, digest }]) => ({ path, size, digest })),
    skipped: [...parts.flatMap(({ skipped = [] }) => skipped), ...tree?.skipped ?? []],
  };
}

function noMatchError(what: string, options: { skipped: number; filter: FilterOptions; hint?: string }): Error {
  const { skipped, filter, hint } = options;
  const files = skipped === 0 ? "" : ` (${plural(skipped, "file")} skipped)`;
  const include = filter.include.map((glob) => `--include ${quote(glob)}`).join(" ");
  const state = include !== "" && skipped > 0 ? `nothing matched ${include}` : "it has no file to extract";
  return notFoundError(`Cannot extract ${what}: ${state}${files}`, { hint });
}

/** Locks a file until it is closed, between containers, too. Returns undefined if the file system has no locks. */
function tryLock(file: Deno.FsFile): boolean | undefined {
  try {
    return file.tryLockSync(true);
  } catch (error) {
    const isUnsupported = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP"].includes(errorCode(error) ?? "");
    if (isUnsupported || error instanceof Deno.errors.NotSupported) return undefined;
    throw error;
  }
}

/** A directory that does not exist or may not be listed has no names. */
function namesIn(directory: string): string[] {
  try {
    return fs.readdirSync(directory);
  } catch (error) {
    if (["ENOENT", "ENOTDIR", "EACCES"].includes(errorCode(error) ?? "")) return [];
    throw error;
  }
}

/** Hidden, so that nobody takes it for a wheel. A long name is replaced by its hash, because names have 255 bytes. */
function stagingPrefix(name: string): string {
  const short = Buffer.byteLength(name) <= 150 ? name : digestOf(Buffer.from(name), "sha256").slice(7, 39);
  return `.${short}${short && "."}fetch_wheels-`;
}

function stagingName(name: string): string {
  return `${stagingPrefix(name)}${process.pid}-${crypto.randomUUID().slice(0, 8)}`;
}

/** Removes a file or a directory; yields between. Needs no file descriptor for an empty one, as all may be in use. */
function* removeTree(path: string): Generator<void> {
  yield;
  const stat = lstatIfExists(path);
  if (stat === undefined) return;
  if (!stat.isDirectory()) return fs.unlinkSync(path);
  if (isDone(() => fs.rmdirSync(path))) return;
  // In reverse, so that a staging directory has its lock, which shows that it is dead, for as long as possible.
  for (const name of fs.readdirSync(path).sort().reverse()) yield* removeTree(join(path, name));
  fs.rmdirSync(path);
}

function lstatIfExists(path: string): fs.Stats | undefined {
  return fs.lstatSync(path, { throwIfNoEntry: false });
}

/** Where staging directories of a target may be: a directory, and the name in it that they stand for. */
type StagingPlace = [directory: string, name: string];

/** A hidden directory, locked while this run lives. Disposing of it removes it. */
class StagingDirectory implements AsyncDisposable {
  readonly path: string;
  #lock: Deno.FsFile | undefined;
  /** The first of the directories above it that had to be created. */
  #made: string | undefined;

  private constructor([directory, name]: StagingPlace, private readonly report: Report) {
    this.path = join(directory, stagingName(name));
  }

  /** Creates it in the first place, and removes from each place what dead runs left there. */
  static async open(
    places: [StagingPlace, ...StagingPlace[]],
    { report, signal }: Settings,
  ): Promise<StagingDirectory> {
    const staging = new StagingDirectory(places[0], report);
    try {
      onDisk("create", staging.path, () => staging.#create());
      for (const place of places) await runInterruptibly(staging.#sweep(place), signal);
      return staging;
    } catch (error) {
      await staging[Symbol.asyncDispose]();
      throw error;
    }
  }

  #create(): void {
    this.#made = fs.mkdirSync(dirname(this.path), { recursive: true });
    Deno.mkdirSync(this.path);
    // Another run would take this one for dead if the file were not locked from the start.
    const file = join(this.path, LOCK_NAME);
    this.#lock = Deno.openSync(`${file}.new`, { read: true, write: true, createNew: true });
    tryLock(this.#lock);
    fs.renameSync(`${file}.new`, file);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#lock?.close();
    try {
      // A journal that is still there names files that could not be put back: the next run tries again.
      if (!lstatIfExists(join(this.path, JOURNAL_NAME))) await runInterruptibly(removeTree(this.path));
      const made = this.#made ?? this.path;
      for (let path = dirname(this.path); path.startsWith(made); path = dirname(path)) {
        if (!isDone(() => fs.rmdirSync(path))) return;
      }
    } catch (error) {
      if (errorCode(error) === "ENOENT") return; // another run has removed it as well
      // A leftover does not matter: the next run removes it.
      const { message } = toDiskError(error, `Cannot remove ${quote(this.path)}`) as Error;
      this.report({ type: "warning", message });
    }
  }

  /** Removes what dead runs left behind, which their locks show, and first undoes what they had begun to publish. */
  *#sweep([directory, name]: StagingPlace): Generator<void> {
    const owner = fs.statSync(this.path).uid;
    const prefix = stagingPrefix(name);
    for (const found of onDisk("clean up", directory, () => namesIn(directory))) {
      if (!found.startsWith(prefix) || !/^\d+-[0-9a-f]{8}$/.test(found.slice(prefix.length))) continue;
      const path = join(directory, found);
      try {
        const stat = lstatIfExists(path);
        // The journal of another user must not make this run write anywhere.
        if (stat?.uid !== owner) continue;
        const [lockFile, journalFile] = [join(path, LOCK_NAME), join(path, JOURNAL_NAME)];
        using lock = fs.existsSync(lockFile) ? Deno.openSync(lockFile, { read: true, write: true }) : null;
        const isDead = lock === null ? Date.now() - stat.mtimeMs > YOUNG_MS : tryLock(lock);
        if (!isDead) continue;
        const journal = fs.existsSync(journalFile) ? parseJson(fs.readFileSync(journalFile)) : undefined;
        // DEST may have been moved or mounted elsewhere since.
        if (journal !== undefined) yield* undo(path, { dest: join(directory, name), steps: journal.steps });
        yield* removeTree(path);
      } catch (error) {
        if (errorCode(error) === "ENOENT") continue; // the run that it belongs to has removed it just now
        throw toDiskError(error, `Cannot clean up ${quote(path)}`);
      }
    }
  }
}

/** A tree is staged on DEST's file system: inside DEST if it exists, else beside it. */
function treePlaces(dest: string): [StagingPlace, StagingPlace] {
  const inside: StagingPlace = [dest, ""];
  const beside: StagingPlace = [dirname(dest), basename(dest)];
  const stat = statIfExists(dest);
  if (stat?.isDirectory()) return [inside, beside];
  if (stat !== undefined) throw ioError(`Cannot use ${quote(dest)}: it is not a directory`);
  if (lstatIfExists(dest)) throw ioError(`Cannot use ${quote(dest)}: it is a dangling symbolic link`);
  return [beside, inside];
}

async function receiveTree(delivery: Delivery, root: string, settings: Settings): Promise<Received> {
  const tree = join(root, "new");
  await runInterruptibly(removeTree(tree), settings.signal); // what an earlier attempt left
  onDisk("create", tree, () => Deno.mkdirSync(tree));
  const extracted = await extractParts(delivery, tree, settings);
  const constraints = extracted.entries.get(CONSTRAINTS);
  if (settings.unpin !== undefined && constraints?.kind === "file") {
    constraints.size = dropPin(join(tree, CONSTRAINTS), settings.unpin);
    constraints.digest = null;
  }
  const received = describeTree(delivery.parts, extracted);
  if (received.files.length === 0) throw noFileError(delivery, received.skipped.length, settings.filter);
  using _lock = await lockDest(settings);
  await publish(root, extracted.entries, settings);
  return received;
}

/** Applies each part to one tree. Further parts are downloaded meanwhile: the next layer, or several files of an artifact. */
async function extractParts({ parts, open }: Delivery, tree: string, settings: Settings): Promise<Extracted> {
  const { filter, workerUrl, connections } = settings;
  const hasFiles = parts.some(({ path }) => path !== undefined);
  const isLarge = parts.reduce((sum, { size = 0 }) => sum + size, 0) >= WORKER_BYTES;
  const local = new TreeBuilder(settings, tree);
  const isThreaded = workerUrl !== undefined && isLarge && !hasFiles;
  const worker = isThreaded ? new WorkerTreeBuilder(settings, tree, workerUrl) : undefined;
  const builder = worker ?? local;
  const parallel = hasFiles ? connections : 2;
  const streams = new Map<Part, ReadableStream<Uint8Array>>();
  try {
    for (const [at, part] of parts.entries()) {
      const bytes = streams.get(part) ?? open(part);
      for (const next of parts.slice(at + 1, at + parallel)) {
        if (!streams.has(next)) streams.set(next, prefetch(open(next), PREFETCH_BYTES));
      }
      if (part.path === undefined) await builder.extract({ ...part, filter }, bytes);
      else await local.addDownload(part, bytes);
    }
    return await builder.finish();
  } finally {
    streams.forEach((stream) => stream.cancel().catch(() => {})); // one that has failed says so again
    await worker?.stop();
  }
}

function noFileError({ parts, otherLayers, label }: Delivery, skipped: number, filter: FilterOptions): Error {
  const [part] = parts;
  const isLayer = part?.descriptor !== undefined && (part.path ?? part.directory) === undefined;
  const what = isLayer && parts.length === 1 ? `layer ${part.index} of ${quote(label)}` : quote(label);
  const hint = otherLayers > 0 ? "try another layer, or --layer all" : undefined;
  return noMatchError(what, { skipped, filter, hint });
}

/**
 * What a publication is about to change; kept on disk until all of it is done, so that the next run can undo it. A step
 * takes a path of DEST away to `old/INDEX`, puts a path of the staged tree into DEST, or makes a directory there.
 */
type Journal = { dest: string; steps: { action: "take" | "put" | "make"; path: string }[] };

/** Runs a rename or a removal; returns false if it is refused, as on overlayfs, for a mount point, or in a sticky directory. */
function isDone(operation: () => void): boolean {
  try {
    operation();
    return true;
  } catch (error) {
    const refusals = ["EXDEV", "EBUSY", "EPERM", "EACCES", "EEXIST", "ENOTEMPTY"];
    if (!refusals.includes(errorCode(error) ?? "")) throw error;
    return false;
  }
}

/**
 * Waits until no other run publishes into DEST, because each plans its steps by what it finds there. Locks DEST, or its
 * parent until DEST exists. Returns undefined if that cannot be locked, as on NFS, where a lock needs the right to write.
 */
async function lockDest({ dest, signal }: Settings): Promise<Deno.FsFile | undefined> {
  while (true) {
    signal.throwIfAborted();
    const directory = fs.existsSync(dest) ? dest : dirname(dest);
    let lock: Deno.FsFile | undefined;
    let isLocked: boolean | undefined;
    try {
      lock = Deno.openSync(directory);
      isLocked = tryLock(lock);
    } catch {
      lock?.close();
      return undefined;
    }
    const isCurrent = fs.existsSync(dest) === (directory === dest); // it may have been created meanwhile
    if (isLocked !== false && isCurrent) return lock;
    lock.close();
    if (isLocked === false) await sleep(LOCK_POLL_MS, undefined, { signal });
  }
}

/** Moves a staged tree into DEST, completely or not at all: a new DEST with one rename, else entry by entry. */
async function publish(root: string, entries: Extracted["entries"], settings: Settings): Promise<void> {
  const { dest, signal } = settings;
  const isNew = !fs.existsSync(dest);
  if (isNew && onDisk("publish", dest, () => isDone(() => fs.renameSync(join(root, "new"), dest)))) return;
  const journal = { dest, steps: planSteps(entries, settings) };
  try {
    await runInterruptibly(perform(root, journal), signal);
  } catch (error) {
    await runInterruptibly(undo(root, journal)); // if the process ends before all is undone, the next run goes on
    throw error;
  }
}

/** Runs disk operations that may take long, and lets other tasks run between them. */
async function runInterruptibly(operations: Iterable<void>, signal?: AbortSignal): Promise<void> {
  const turns = new Turns(signal);
  for (const _ of operations) await turns.give();
}

/** Directories come first, wheels next, text files last: readers of the constraints rely on the wheels. */
function planSteps(entries: Extracted["entries"], { dest, clean }: Settings): Journal["steps"] {
  const isEmpty = !fs.existsSync(dest);
  const old = clean && !isEmpty ? namesToClean(dest) : [];
  const steps: Journal["steps"] = old.map((path) => ({ action: "take", path }));
  if (isEmpty) steps.push({ action: "make", path: "" });
  const lookUp = clean || isEmpty ? () => undefined : directoryLookUp();
  const whole = new Set<string>(); // directories that DEST does not have, which are put with all that is in them
  const rank = ([path, { kind }]: [string, TreeEntry]) => kind === "directory" ? 0 : path.endsWith(".txt") ? 2 : 1;
  for (const [path, { kind }] of [...entries].sort((a, b) => rank(a) - rank(b))) {
    const isCovered = whole.has(posix.dirname(path));
    if (kind === "directory" && isCovered) whole.add(path);
    if (isCovered) continue;
    const target = join(dest, path);
    const existing = onDisk("publish", target, () => lookUp(target));
    if (kind !== "directory") {
      if (existing?.isDirectory()) throw ioError(`Cannot write ${quote(target)}: it is a directory`);
      if (existing !== undefined) steps.push({ action: "take", path });
      steps.push({ action: "put", path });
    } else if (existing === undefined) {
      whole.add(path);
      steps.push({ action: "put", path });
    } else if (existing.isSymbolicLink()) throw unsafeError(path, `${quote(target)} is a symbolic link`);
    else if (!existing.isDirectory()) throw ioError(`Cannot write ${quote(target)}: it is not a directory`);
  }
  return steps;
}

/** Looks entries up by reading each directory once, because looking up names that do not exist is slow. */
function directoryLookUp(): (path: string) => fs.Stats | undefined {
  const listings = new Map<string, Set<string>>();
  return (path) => {
    const directory = dirname(path);
    const names = listings.get(directory) ?? new Set(fs.readdirSync(directory));
    listings.set(directory, names);
    return names.has(basename(path)) ? lstatIfExists(path) : undefined;
  };
}

/**
 * Does the steps; yields after each. Before DEST changes, a journal says how to undo the change; removing it is the moment
 * at which the new state holds.
 */
function* perform(root: string, journal: Journal): Generator<void> {
  const file = join(root, JOURNAL_NAME);
  onDisk("write", root, () => {
    fs.mkdirSync(join(root, "old"), { recursive: true });
    fs.writeFileSync(`${file}.new`, JSON.stringify({ steps: journal.steps }));
    fs.renameSync(`${file}.new`, file);
  });
  for (const { action, target, staged, old, part } of locateSteps(root, journal)) {
    try {
      if (action === "take") yield* moveEntry({ from: target, to: old, part });
      else if (action === "make") {
        fs.mkdirSync(target, { recursive: true });
        fs.chmodSync(target, fs.statSync(staged).mode & 0o777);
      } else yield* moveEntry({ from: staged, to: target, part, marker: old });
    } catch (error) {
      throw toDiskError(error, `Cannot publish ${quote(target)}`);
    }
    yield;
  }
  onDisk("write", root, () => fs.rmSync(file));
}

/** Undoes the steps in reverse; yields after each. Each may have been done, or not, or in part. */
function* undo(root: string, journal: Journal): Generator<void> {
  for (const { action, target, staged, old, part } of locateSteps(root, journal).reverse()) {
    try {
      fs.rmSync(join(dirname(target), part), { force: true });
      if (action === "make") {
        if (lstatIfExists(target) && fs.readdirSync(target).length === 0) fs.rmdirSync(target);
      } else if (action === "take") {
        if (lstatIfExists(old)) yield* moveEntry({ from: old, to: target, part });
      } else {
        if (lstatIfExists(target) && (lstatIfExists(old) || !lstatIfExists(staged))) {
          yield* moveEntry({ from: target, to: staged, part, marker: old });
        }
        fs.rmSync(old, { force: true });
      }
    } catch (error) {
      throw toDiskError(error, `Cannot restore ${quote(target)}`);
    }
    yield;
  }
  onDisk("write", root, () => fs.rmSync(join(root, JOURNAL_NAME), { force: true }));
}

/** Adds to each step its path in DEST, its path in the staged tree, and where what it takes away is kept. */
function locateSteps(root: string, { dest, steps }: Journal) {
  const part = `${basename(root)}.part`;
  return steps.map(({ action, path }, index) => {
    return {
      action,
      target: join(dest, path),
      staged: join(root, "new", path),
      old: join(root, "old", `${index}`),
      part,
    };
  });
}

/**
 * What to move where; `part` is the name of a file that is still being copied. While something is being copied, both
 * paths exist, and the file `marker` says that what is in DEST is new.
 */
type Move = { from: string; to: string; part: string; marker?: string };

/** Renames a file or a directory; copies it if a rename is refused. */
function* moveEntry(move: Move): Generator<void> {
  if (isDone(() => fs.renameSync(move.from, move.to))) return;
  if (move.marker !== undefined) fs.writeFileSync(move.marker, "");
  yield* copyEntry(move);
}

/** Moves a file, or the entries of a directory, without renaming it. */
function* copyEntry({ from, to, part: name }: Move): Generator<void> {
  const stat = fs.lstatSync(from);
  const part = join(dirname(to), name);
  fs.rmSync(part, { force: true });
  if (stat.isDirectory()) {
    if (fs.mkdirSync(to, { recursive: true }) !== undefined) fs.chmodSync(to, stat.mode & 0o7777);
    fs.rmSync(join(from, name), { force: true }); // of an earlier attempt
    for (const entry of fs.readdirSync(from)) {
      yield* moveEntry({ from: join(from, entry), to: join(to, entry), part: name });
    }
    isDone(() => fs.rmdirSync(from)); // a mount point stays, empty
    return;
  }
  try {
    if (stat.isSymbolicLink()) fs.symlinkSync(fs.readlinkSync(from), part);
    else yield* copyFile(from, part);
    fs.renameSync(part, to);
  } finally {
    fs.rmSync(part, { force: true });
  }
  try {
    fs.unlinkSync(from);
  } catch (error) {
    fs.unlinkSync(to); // a copy is not a move
    throw error;
  }
}

/** Copies a file with its permissions and times. */
function* copyFile(from: string, to: string): Generator<void> {
  const { mode, atimeMs, mtimeMs } = fs.statSync(from);
  if (fileSize(from) === undefined) throw ioError(`Cannot move ${quote(from)}: it is not a regular file`);
  using source = Deno.openSync(from);
  using copy = Deno.openSync(to, { write: true, createNew: true });
  const buffer = new Uint8Array(READ_BYTES);
  for (let length = source.readSync(buffer); length !== null; length = source.readSync(buffer)) {
    writeAll(copy, buffer.subarray(0, length));
    yield;
  }
  fs.chmodSync(to, mode & 0o7777);
  copy.utimeSync(atimeMs / 1000, mtimeMs / 1000);
}

/** Writes a tarball as it is to a file that appears when it is complete. */
async function receiveFile(delivery: Delivery, path: string, staged: string): Promise<Received> {
  using file = onDisk("write", path, () => Deno.openSync(staged, { write: true, create: true, truncate: true }));
  const received = await copyTarball(delivery, (chunk) => onDisk("write", path, () => writeAll(file, chunk)));
  onDisk("publish", path, () => fs.renameSync(staged, path));
  return received;
}

async function copyTarball({ parts, open }: Delivery, write: (chunk: Uint8Array) => unknown): Promise<Received> {
  for (const part of parts) for await (const chunk of open(part)) await write(chunk);
  return describeTree(parts);
}

/** Writes a tarball as it is to a stream, or to a device or a pipe, which is not replaced. */
async function streamTarball(delivery: Delivery, output: string | WritableStream<Uint8Array>, signal: AbortSignal) {
  const name = typeof output === "string" ? output : "stdout";
  const untilWritten = <T>(promise: Promise<T>) =>
    untilAborted(promise, signal).catch((error) => {
      throw toDiskError(error, `Cannot write ${quote(name)}`);
    });
  if (typeof output !== "string") {
    const writer = output.getWriter();
    using _ = { [Symbol.dispose]: () => writer.releaseLock() };
    return await copyTarball(delivery, (chunk) => untilWritten(writer.write(chunk)));
  }
  // Opening a pipe waits for a reader. `FsFile.writable` does not report a full disk.
  using file = await untilWritten(Deno.open(output, { write: true }));
  return await copyTarball(delivery, async (chunk) => {
    for (let at = 0; at < chunk.length;) at += await untilWritten(file.write(chunk.subarray(at)));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 11 Command line: options, help, progress, output, exit code. stdout carries data only; all else goes to stderr.
// ---------------------------------------------------------------------------------------------------------------------

/** The outside world as the command line sees it. */
export interface Io extends Pick<FetchWheelsOptions, "workerUrl" | "signal"> {
  /** Returns the value of an environment variable. */
  env(name: string): string | undefined;
  /** Source of the password for `--password-stdin`. */
  stdin: ReadableStream<Uint8Array>;
  /** Receives data: help, version, the list, the JSON, the tarball. */
  stdout: WritableStream<Uint8Array>;
  /** Receives everything else, in whole lines; lines of progress begin with a carriage return instead. A promise that it
   * returns is awaited before the program ends. */
  stderr(text: string): void | Promise<void>;
  /** Returns the present width of the terminal that stderr is; undefined if it is not a terminal. */
  columns?(): number | undefined;
  /** Whether stdout is a terminal. */
  isStdoutTerminal?: boolean;
  /** Reads a password without showing it; set if stdin is a terminal. */
  promptPassword?(question: string): Promise<string>;
  /** Calls back at intervals until it is disposed of; replaces `setInterval`. */
  every?(milliseconds: number, callback: () => void): Disposable;
}

/** Runs the command line with these arguments, without the program's name, and returns the exit status. */
export async function main(args: string[], io: Io): Promise<number> {
  const output = new Output(io);
  // Looked up by hand, because parsing the command line may be what fails.
  const isJson = args.includes("--json");
  const isVerbose = args.some((arg) => /^(?:-v|--verbose)$/.test(arg));
  let status = 0;
  let text: string;
  try {
    text = await runCommandLine(args, { io, output });
  } catch (error) {
    output.endProgress();
    const failure = describeError(toPublicError(error, io.signal));
    output.log(failure.message);
    if (failure.hint !== null) output.log(`hint: ${failure.hint}`);
    if (isVerbose) describeCauses(error).forEach((line) => output.log(line));
    status = EXIT_CODES[failure.kind];
    text = isJson ? `${JSON.stringify({ error: failure }, null, 2)}\n` : "";
  }
  await output.flush(); // data on stdout comes after what was logged before
  try {
    const bytes = new TextEncoder().encode(text);
    if (bytes.length > 0) {
      const writer = io.stdout.getWriter();
      await writer.write(bytes);
      writer.releaseLock();
    }
    return status;
  } catch (error) {
    const code = errorCode(error) ?? "";
    if (code === "EPIPE" && !isJson) return status; // a reader such as `head` that has seen enough is not a failure
    output.log(`Cannot write "stdout": ${DISK_STATES[code] ?? (error as Error).message}`);
    if (status === 0 && isJson) output.log("hint: only the JSON document was lost; everything else was done");
    await output.flush();
    return EXIT_CODES.io;
  }
}

/** Does what the arguments ask for, and returns the text for stdout. */
async function runCommandLine(args: string[], { io, output }: { io: Io; output: Output }): Promise<string> {
  const commandLine = readCommandLine(args, io);
  if (typeof commandLine === "string") return commandLine;
  const { options } = commandLine;
  const given = commandLine.source ?? (io.env("WHEELS") || undefined);
  checkPermissions(given, options, args);
  const source = given ?? await readWheelsFile(options.wheelsFile, io);
  if (given === undefined) checkPermissions(source, options, args);
  const fetchOptions = await toFetchOptions(options, io);
  output.beginProgress(options);
  const result = await fetchWheels(source, { ...fetchOptions, onProgress: (event) => output.report(event) });
  output.endProgress();
  if (given !== undefined && (result.dest ?? result.output) !== null) rememberSource(given, options.wheelsFile, output);
  if (!options.quiet) describeResult(result, options).forEach((line) => output.log(line));
  if (options.json) return `${JSON.stringify(result, null, 2)}\n`;
  if (!options.list) return "";
  return result.files.map(({ path, size }) => `${String(size).padStart(12)}  ${oneLine(path)}\n`).join("");
}

/** Describes an error for stderr and for `--json`. */
function describeError(error: unknown): { kind: ErrorKind; message: string; hint: string | null } {
  if (error instanceof FetchWheelsError) {
    const { kind, message, hint = kind === "usage" ? "fetch_wheels --help lists the options" : null } = error;
    return { kind, message, hint };
  }
  const words = withoutSecrets(error instanceof Error ? error.message.split("\n")[0] ?? "" : String(error));
  const hint = "this is a bug in fetch_wheels; --verbose shows where";
  return { kind: "internal", message: `Cannot continue: ${words}`, hint };
}

/** Returns the stacks of an error and its causes, for `--verbose`. */
function describeCauses(error: unknown): string[] {
  if (!(error instanceof Error)) return [];
  return [...withoutSecrets(error.stack ?? error.message).split("\n"), ...describeCauses(error.cause)];
}

/** Writes log lines to stderr and, on a terminal, a line of progress below them, which is redrawn on a timer. */
class Output {
  #options: Partial<CommandOptions> = {};
  #timer: Disposable | undefined;
  #written: void | Promise<void> = undefined;
  #isDrawn = false;
  #progress: { received: number; total?: number } = { received: 0 };
  #files = 0;
  /** Times and amounts of the last seconds. */
  #samples: { at: number; received: number }[] = [];

  constructor(private readonly io: Io) {}

  /** If no line can be redrawn, logs one periodically, because CI systems end silent jobs. */
  beginProgress(options: CommandOptions): void {
    this.#options = options;
    if (options.quiet) return;
    const { every = everyInterval } = this.io;
    this.#samples = [{ at: performance.now(), received: 0 }];
    if (this.#columns() === 0) this.#timer = every(LOG_PROGRESS_MS, () => this.log(this.#progressLines()[0] ?? ""));
    else if (options.progress) this.#timer = every(REDRAW_MS, () => this.#draw());
  }

  endProgress(): void {
    this.#timer?.[Symbol.dispose]();
    this.#timer = undefined;
    this.#erase();
  }

  log(text: string): void {
    this.#erase();
    this.#written = this.io.stderr(`fetch_wheels: ${oneLine(text)}\n`);
  }

  /** Waits until everything has been written. */
  async flush(): Promise<void> {
    await this.#written;
  }

  report(event: ProgressEvent): void {
    if (event.type === "warning") this.log(`warning: ${event.message}`);
    else if (event.type === "extracted") this.#files = event.members;
    else if (event.type === "bytes") this.#progress = event;
    else if (this.#options.verbose || !this.#options.quiet && event.type !== "request") this.log(describeEvent(event));
  }

  /** Returns 0 if stderr is not a terminal that can redraw a line. */
  #columns(): number {
    return this.io.env("TERM") === "dumb" ? 0 : this.io.columns?.() ?? 0;
  }

  /** Draws the longest line that fits. The last column stays free, because some terminals wrap there. */
  #draw(): void {
    const width = this.#columns() - 1;
    if (width < 0) return;
    const lines = this.#progressLines();
    const choices = [...lines.slice(0, -1).map((text) => `fetch_wheels: ${text}`), ...lines];
    const line = choices.find(({ length }) => length <= width) ?? "";
    this.#isDrawn = true;
    this.io.stderr(`\r${line}\x1b[K`);
  }

  #erase(): void {
    if (this.#isDrawn) this.#written = this.io.stderr("\r\x1b[K");
    this.#isDrawn = false;
  }

  /** Describes the progress at decreasing lengths; a number that is cut off would be another one. */
  #progressLines(): string[] {
    const { received, total = 0 } = this.#progress;
    if (received === 0) return ["waiting for data", "waiting"];
    const speed = this.#measureRate();
    const percentage = total > 0 ? `${Math.floor(100 * Math.min(1, received / total))} %` : "";
    const amount = `${formatBytes(received)}${total > 0 ? ` of ${formatBytes(total)}` : ""}`;
    const rate = `${formatBytes(speed)}/s`;
    const seconds = Math.ceil(Math.max(0, total - received) / speed);
    const duration = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    const left = total === 0 ? "" : speed === 0 ? "stalled" : `${duration} left`;
    const choices = [
      [percentage, amount, rate, left, plural(this.#files, "file")],
      [percentage, amount, rate, left],
      [percentage, amount, left],
      [percentage || amount, left],
      [percentage || amount],
    ];
    return choices.map((parts) => parts.filter((part) => part !== "").join(", "));
  }

  /** Returns the bytes per second over the last seconds; without data, the rate falls to zero. */
  #measureRate(): number {
    const { received } = this.#progress;
    const at = performance.now();
    this.#samples.push({ at, received });
    while (this.#samples.length > 2 && at - (this.#samples[0]?.at ?? at) > RATE_MS) this.#samples.shift();
    const [first] = this.#samples;
    return first === undefined || at === first.at ? 0 : (received - first.received) / (at - first.at) * 1000;
  }
}

function everyInterval(milliseconds: number, callback: () => void): Disposable {
  const timer = setInterval(callback, milliseconds);
  return { [Symbol.dispose]: () => clearInterval(timer) };
}

function describeEvent(event: Exclude<ProgressEvent, { type: "bytes" | "extracted" | "warning" }>): string {
  switch (event.type) {
    case "request": {
      const { method, url, status, bytes, range, ms } = event;
      const size = bytes === undefined ? undefined : plural(bytes, "byte");
      return `${method} ${url}: ${[status, size, range].filter((part) => part !== undefined).join(", ")}, ${ms} ms`;
    }
    case "retry":
      return `${event.reason}; retrying in ${(event.delayMs / 1000).toFixed(1)} s (${event.attempt}/${event.retries})`;
    case "resolved": {
      const { image, layers, platform } = event;
      const [layer] = layers;
      const bytes = layers.reduce((sum, { size }) => sum + (size ?? 0), 0);
      const what = layers.length === 1 && layer !== undefined
        ? `layer ${layer.index} of ${layer.count}, ${layer.digest}`
        : `${layers.length} of ${plural(layer?.count ?? 0, "layer")}`;
      const name = `${formatReference(image)}${platform === null ? "" : ` for ${platform}`}`;
      return `${name}: ${what}${bytes === 0 ? "" : `, ${formatBytes(bytes)}`}`;
    }
    case "verified":
      return `signature of ${event.digest} verified with ${quote(event.key)}`;
    case "cached":
      return `${event.digest}, ${formatBytes(event.size)}, found in the cache`;
  }
}

function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** power).toFixed(power === 0 ? 0 : 1)} ${units[power]}`;
}

/** Returns the lines after a success. The last one names the image by digest, to be used as a source. */
function describeResult(result: FetchResult, { verbose }: CommandOptions): string[] {
  const { files, skipped, dest, output, bytes, seconds, layers, image, resolved } = result;
  const lines = skipped.filter(({ reason }) => verbose || reason.startsWith(UNSUPPORTED))
    .map(({ path, reason }) => `skipped ${quote(path)}: ${reason}`);
  const wheels = files.filter(({ path }) => path.endsWith(".whl")).length;
  const counts = `${plural(wheels, "wheel")}, ${plural(files.length - wheels, "other file")}`;
  const what = output === null ? counts : "the tarball";
  const where = dest ?? (output === "-" ? "stdout" : output);
  const origin = layers.length === 1 ? layers[0]?.digest : plural(layers.length, "layer");
  const from = layers.length === 0 ? "" : ` from ${origin}`;
  if (where !== null) lines.push(`${what}, ${formatBytes(bytes)} in ${seconds.toFixed(1)} s, to ${where}${from}`);
  if (image !== null && resolved !== null) {
    const { registry, repository } = image;
    lines.push(`resolved ${formatReference({ registry, repository, digest: resolved.digest })}`);
  }
  return lines;
}

/** The options as commander leaves them: the module's, and those that only a command line has. */
type CommandOptions =
  & Omit<FetchWheelsOptions, "output" | "mirrors" | "layers" | "verifyKeys">
  & { output?: string; mirror: string[]; layer?: string[]; verifyKey: string[]; wheelsFile: string }
  & { passwordStdin?: boolean; json?: boolean; progress: boolean; quiet?: boolean; verbose?: boolean };

const HELP_AFTER = `
SOURCE is an image (loci/requirements:master-ubuntu_jammy,
registry:5000/ns/name@sha256:...), an http(s):// URL of a tarball, a path that
begins with /, ./ or ../, or, without a network, oci:DIR[:TAG],
oci-archive:FILE[:TAG] or docker-archive:FILE. Without SOURCE, $WHEELS is used;
without that, the first line of the wheels file.
REGISTRY_USERNAME and REGISTRY_PASSWORD give credentials; without them, those
of docker login and podman login are used. HTTPS_PROXY, HTTP_PROXY, ALL_PROXY
and NO_PROXY are honored. An option wins over its environment variable, and
WHEELS_DEST over WHEELS_DIR.

Examples:
  fetch_wheels -d wheels loci/requirements:master-ubuntu_jammy
  fetch_wheels --ca-file ca.pem -d wheels registry.example:5000/ns/wheels:1.0
  fetch_wheels -o - registry.example:5000/ns/wheels:1.0 | tar tz

Exit status: 0 done, 1 a bug, 2 usage, 3 not found, 4 credentials, 5 network,
6 integrity, 7 unsafe archive, 8 disk, 130 SIGINT, 143 SIGTERM
`;

/** Returns the options in their groups. The description of an option names its environment variable as `($NAME)`. */
function optionGroups(): Record<string, Option[]> {
  const option = (flags: string, description: string) => new Option(flags, description);
  const repeated = (flags: string, description: string) =>
    option(flags, description).argParser((text, before: string[] = []) => [...before, text]);
  // A text that is not a number becomes NaN, which the check of the range rejects.
  const number = (flags: string, description: string) =>
    option(flags, description).argParser((text) => text.trim() === "" ? NaN : Number(text));
  // deno-fmt-ignore -- a table: one option, one line
  return {
    "Options:": [
      option("-V, --version", "print the version"),
      option("-h, --help", "print this help"),
    ],
    "Source:": [
      option("--platform <os/arch[/variant]>", "choose this from a multi-platform image (default: the host's)"),
      repeated("--layer <which>", "N (1 is the base), last, a digest, or all (repeatable; default: last)"),
      option("--wheels-file <file>", "file that remembers the source").default(DEFAULT_WHEELS_FILE),
    ],
    "Destination:": [
      option("-d, --dest <dir>", "extract here ($WHEELS_DIR)").default(DEFAULT_DEST),
      option("-o, --output <file>", "write the tarball as it is; - is stdout ($WHEELS_DEST)"),
      repeated("--include <glob>", "extract only these (repeatable)").default([], "all"),
      repeated("--exclude <glob>", "skip these, besides .* (repeatable)").default([], "none"),
      number("--strip-components <n>", "drop leading components of paths").default(0),
      option("--clean", "replace DEST instead of adding to it"),
      option("--unpin <name>", "drop NAME===... from upper-constraints.txt ($PROJECT)"),
    ],
    "Registry:": [
      option("--username <name>", "user name for the registry ($REGISTRY_USERNAME)"),
      option("--password-stdin", "read the password from stdin"),
      option("--protocol <name>", "http, https, or detect: https if possible ($REGISTRY_PROTOCOL)").default("detect"),
      option("--ca-file <pem>", "trust these certificates, too ($REGISTRY_CA_FILE)"),
      option("--insecure", "accept any certificate ($REGISTRY_INSECURE)"),
      repeated("--verify-key <pem>", "require a signature by this key (repeatable) ($FETCH_WHEELS_VERIFY_KEY)").default([], "none"),
    ],
    "Network:": [
      repeated("--mirror <url>", "try this registry first (repeatable) ($REGISTRY_MIRROR)").default([], "none"),
      option("--cache <dir>", "keep and reuse blobs by digest ($FETCH_WHEELS_CACHE)"),
      number("--connections <n>", "maximum number of connections for a download").default(DEFAULT_CONNECTIONS),
      number("--retries <n>", "retries after a transient failure").default(DEFAULT_RETRIES),
      number("--timeout <seconds>", "give up if no data arrives for this long").default(DEFAULT_TIMEOUT),
    ],
    "Output:": [
      option("--list", "print sizes and paths; extract nothing"),
      option("--dry-run", "resolve only; download no layer"),
      option("--json", "print one JSON document"),
      option("--no-progress", "show no progress on a terminal"),
      option("-q, --quiet", "print errors and warnings only"),
      option("-v, --verbose", "print each request"),
    ],
  };
}

/** Returns the source and the options, or the text of help or version. */
function readCommandLine(args: string[], io: Io): string | { source?: string; options: CommandOptions } {
  const command = new Command("fetch_wheels")
    .usage("[OPTIONS] [SOURCE]")
    .description(
      "Downloads the final layer of a container image, or an artifact, and leaves its wheels in a directory.",
    )
    .argument("[source]", "image, URL or path")
    .allowExcessArguments() // checked below, in this program's words
    .helpOption(false) // commander's own, like its version option, ends by throwing an error, which takes 6 ms
    .exitOverride()
    .configureOutput({ writeErr: () => {}, getOutHelpWidth: () => 80, getOutHasColors: () => false });
  for (const [heading, group] of Object.entries(optionGroups())) {
    for (const option of group) command.addOption(option.helpGroup(heading));
  }
  try {
    command.parse(args, { from: "user" });
  } catch (error) {
    throw error instanceof CommanderError ? commandLineError(error) : error;
  }
  const words = command.args.join(" ");
  if (words === "help" || command.getOptionValue("help")) return command.helpInformation() + HELP_AFTER;
  if (words === "version" || command.getOptionValue("version")) return `fetch_wheels ${VERSION}\n`;
  for (const option of command.options) {
    const variable = /\(\$(\w+)\)$/.exec(option.description)?.[1];
    const name = option.attributeName();
    const isGiven = command.getOptionValueSource(name) === "cli";
    const text = isGiven || variable === undefined ? undefined : io.env(variable);
    if (text) command.setOptionValueWithSource(name, parseVariable(option, text), "env");
    const isEmpty = [command.getOptionValue(name)].flat().includes("");
    if (isEmpty) throw usageError(`Cannot use ${isGiven ? option.long : `$${variable}`}: its value is empty`);
  }
  const options = command.opts<CommandOptions>();
  checkConflicts(command, options, io);
  return { source: command.args[0], options };
}

/** Reads a variable's value as LOCI does (`yes`, `true`, `t` and `1` are true), and lists as words. */
function parseVariable(option: Option, text: string): unknown {
  if (option.isBoolean()) return /^(?:yes|true|t|1)$/i.test(text.trim());
  return Array.isArray(option.defaultValue) ? text.trim().split(/\s+/) : text;
}

/** Puts commander's words into this program's. The value of an unknown option, as in `-pVALUE`, may be a secret. */
function commandLineError({ message }: CommanderError): FetchWheelsError {
  const [text = "", suggestion] = message.replace(/^error: /, "").split(/\n\(D(?=id you mean )/);
  const words = text.replace(/(?<=option '-[^-]).+(?='$)/s, "…").replace(/=.*(?='$)/s, "=…").replaceAll("'", '"');
  const hint = suggestion === undefined ? undefined : `d${suggestion.slice(0, -1)}`;
  return usageError(`Cannot parse the command line: ${words}`, { hint });
}

function checkConflicts(command: Command, options: CommandOptions, io: Io): void {
  const isGiven = (name: string) => command.getOptionValueSource(name) === "cli";
  const { quiet, verbose, list, dryRun, json, username, passwordStdin, protocol = "" } = options;
  if (isGiven("dest") && !isGiven("output")) options.output = undefined;
  const output = list || dryRun ? "" : options.output ?? ""; // a preview writes none
  const sources = command.args.length;
  const protocolName = isGiven("protocol") ? "--protocol" : "$REGISTRY_PROTOCOL";
  // deno-fmt-ignore -- a table: one rule, one line
  const rules: [isBroken: boolean | undefined, message: string, hint?: string][] = [
    [sources > 1, `Cannot use ${sources} sources: expected one`],
    [isGiven("dest") && isGiven("output"), "Cannot use --dest with --output: choose one destination"],
    [quiet && verbose, "Cannot use --quiet with --verbose: choose one"],
    [list && dryRun, "Cannot use --list with --dry-run: choose one"],
    [!/^(?:https?|detect)$/.test(protocol), `Cannot use ${protocolName} ${quote(protocol)}: expected http, https or detect`],
    [passwordStdin && !username, "Cannot use --password-stdin without --username", PASSWORD_HINT],
    [json && STDOUT_NAMES.includes(output), "Cannot use --json with --output -: both write to stdout"],
    [output === "-" && io.isStdoutTerminal, "Cannot write the tarball to stdout: it is a terminal", "redirect it, or force it with --output /dev/stdout"],
  ];
  for (const [isBroken, message, hint] of rules) {
    if (isBroken) throw usageError(message, { hint });
  }
}

/** A tarball's name without "./" would be an image's name. */
function checkSource(source: string): void {
  if (!/^[^/.:@][^:@]*\.(?:tar|tgz|tar\.\w+|whl)$/i.test(source)) return;
  if (!isReadable(source)) return;
  const message = `Cannot use source ${quote(source)}: without "./" it is an image reference`;
  throw usageError(message, { hint: `for the file, write ./${source}` });
}

async function toFetchOptions(options: CommandOptions, io: Io): Promise<FetchWheelsOptions> {
  const isStdout = STDOUT_NAMES.includes(options.output ?? "");
  const password = options.passwordStdin ? await readPassword(io) : io.env("REGISTRY_PASSWORD") || undefined;
  return {
    ...options,
    mirrors: options.mirror,
    layers: options.layer,
    verifyKeys: options.verifyKey,
    password: password?.replace(/\r?\n$/, "") || undefined, // BuildKit keeps the line break at the end of a secret
    authConfig: io.env("DOCKER_AUTH_CONFIG") || undefined,
    authFiles: authFiles(io),
    output: isStdout ? io.stdout : options.output,
    env: io.env,
    signal: io.signal,
    workerUrl: io.workerUrl,
  };
}

/** Returns the files in which `podman login` and `docker login` keep credentials, in the order of precedence. */
function authFiles(io: Io): string[] {
  const home = io.env("HOME");
  const runtime = io.env("XDG_RUNTIME_DIR");
  const config = io.env("XDG_CONFIG_HOME") || (home && join(home, ".config"));
  const docker = io.env("DOCKER_CONFIG") || (home && join(home, ".docker"));
  return [
    io.env("REGISTRY_AUTH_FILE"),
    runtime && join(runtime, "containers/auth.json"),
    config && join(config, "containers/auth.json"),
    docker && join(docker, "config.json"),
  ].filter((file): file is string => file !== undefined && file !== "");
}

async function readPassword(io: Io): Promise<string> {
  const { stdin, stderr, promptPassword, signal = new AbortController().signal } = io;
  const password = promptPassword?.("Password: ") ??
    new Response(stdin as ReadableStream<Uint8Array<ArrayBuffer>>).text();
  return await untilAborted(password, signal).catch((error) => {
    if (promptPassword !== undefined) stderr("\n"); // the message must not follow the question
    throw toDiskError(error, "Cannot read the password from stdin");
  });
}

async function readWheelsFile(file: string, { signal = new AbortController().signal }: Io): Promise<string> {
  const isThere = fs.existsSync(file);
  const text = isThere ? new TextDecoder().decode(await readUserFile(file, signal)) : "";
  const line = text.split("\n")[0]?.trim();
  if (line) return line;
  const action = isThere ? `write an image into ${file}` : `create ${file}`;
  throw usageError(`no image given: pass SOURCE, set $WHEELS, or ${action}`);
}

/**
 * Leaves the source for the next step of the build, as LOCI does, but no password, because the file becomes part of the
 * image. The wheels are there, so a failure is only a warning.
 */
function rememberSource(source: string, file: string, output: Output): void {
  if (!isGranted({ name: "read", path: file }) || !isGranted({ name: "write", path: file })) return;
  const url = URL.parse(source);
  const kept = url?.username || url?.password ? withoutUser(url).href : source;
  try {
    const isPipe = statIfExists(file)?.isFIFO() ?? false; // writing to it would wait for a reader
    if (!isPipe) fs.writeFileSync(file, `${kept}\n`);
  } catch (error) {
    if (errorCode(error) === "ENOENT") return; // no such directory
    const { message } = toPublicError(toDiskError(error, `Cannot write ${quote(file)}`)) as Error;
    output.log(`warning: ${message.split("\n")[0]}; the source is not remembered`);
  }
}

const PERMISSIONS = "--allow-net --allow-read --allow-write --allow-env='WHEELS*,PROJECT,REGISTRY_*,FETCH_WHEELS_*," +
  "DOCKER_*,XDG_*,SSL_CERT_FILE,HOME,PATH,TERM,HTTPS_PROXY,HTTP_PROXY,ALL_PROXY,NO_PROXY,https_proxy,http_proxy," +
  "all_proxy,no_proxy'";

/** Finds all missing permissions at once, before Deno prompts for each. */
function checkPermissions(source: string | undefined, options: CommandOptions, args: string[]): void {
  const { list, dryRun, cache, caFile, verifyKey, wheelsFile, output, dest = DEFAULT_DEST } = options;
  if (source !== undefined) checkSource(source);
  const parsed = source === undefined ? { kind: "file" as const, path: wheelsFile } : parseSource(source);
  const isStaged = !list && !dryRun && !/^(?:-|\/dev\/.*)$/.test(output ?? "");
  const isPath = (path: string | undefined) => path !== undefined;
  const written = [cache, isStaged ? join(output ?? dest, "..") : undefined].filter(isPath);
  const read = [...written, ...verifyKey, caFile, "path" in parsed ? parsed.path : undefined].filter(isPath);
  const urls = options.mirror.map(parseMirror);
  if (parsed.kind === "url") urls.push(parsed.url);
  if (parsed.kind === "image") urls.push(...baseUrls(parsed.image.registry, options.protocol ?? "detect").slice(0, 1));
  const variables = /'(.*)'/.exec(PERMISSIONS)?.[1]?.split(",") ?? [];
  const descriptors: Deno.PermissionDescriptor[] = [
    ...urls.map((url) => ({ name: "net", host: hostAndPort(url) }) as const),
    ...read.map((path) => ({ name: "read", path }) as const),
    ...written.map((path) => ({ name: "write", path }) as const),
    ...variables.map((variable) => ({ name: "env", variable }) as const),
  ];
  const missing = new Set(descriptors.filter((each) => !isGranted(each)).map(({ name }) => `--allow-${name}`));
  if (missing.size === 0) return;
  const command = [import.meta.filename ?? import.meta.url, ...args.map(withoutSecrets)].map((word) =>
    /^[\w./:@=+,-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
  );
  const hint = `deno run ${PERMISSIONS} ${command.join(" ")}`;
  throw usageError(`missing Deno permissions: ${[...missing].join(", ")}`, { hint });
}

/** Reads a line from a terminal without showing it. */
async function promptPassword(question: string, stderr: Io["stderr"]): Promise<string> {
  const hideTyping = () => Deno.stdin.setRaw(true, { cbreak: true }); // Ctrl-C still works
  Deno.addSignalListener("SIGCONT", hideTyping); // after Ctrl-Z the shell shows what is typed
  hideTyping();
  try {
    stderr(question);
    const decoder = new TextDecoder();
    const buffer = new Uint8Array(1024);
    let typed = "";
    for (let length: number | null = 0; length !== null && !/[\r\n\cD]/.test(typed);) {
      length = await Deno.stdin.read(buffer);
      typed += decoder.decode(buffer.subarray(0, length ?? 0), { stream: true });
    }
    typed = typed.replace(/[\r\n\cD].*$/s, "").replace(/^.*\cU/s, ""); // Ctrl-U erases the line
    while (/[\x7f\b]/.test(typed)) typed = typed.replace(/.?[\x7f\b]/su, ""); // what a backspace removes
    return typed;
  } finally {
    Deno.removeSignalListener("SIGCONT", hideTyping);
    Deno.stdin.setRaw(false);
    stderr("\n");
  }
}

/** Returns a function that writes to stderr in order, and does not block this thread while nobody reads there. */
function openStderr(): (text: string) => Promise<void> {
  let written = Promise.resolve();
  return (text) => {
    const bytes = new TextEncoder().encode(text);
    written = written.then(async () => {
      for (let at = 0; at < bytes.length;) at += await Deno.stderr.write(bytes.subarray(at));
    }).catch(() => {
      // A log that is closed, or on a full disk, is not a reason to fail if the wheels are right.
    });
    return written;
  };
}

/** Aborts at the first signal, so that everything is cleaned up. A second signal, or the time, ends the process. */
function abortOnSignals(): AbortSignal {
  const controller = new AbortController();
  const kinds = { SIGINT: "interrupted", SIGTERM: "terminated", SIGHUP: "terminated" } as const;
  for (const [name, kind] of Object.entries(kinds)) {
    Deno.addSignalListener(name as Deno.Signal, () => {
      if (controller.signal.aborted) Deno.exit(EXIT_CODES[kind]);
      controller.abort(new FetchWheelsError(kind, `interrupted (${name}); DEST is unchanged`));
      setTimeout(() => Deno.exit(EXIT_CODES[kind]), SHUTDOWN_MS);
    });
  }
  return controller.signal;
}

/** Compares the numbers by hand, because a collator that does it takes 20 ms to load. */
function isOlder(version: string, minimum: string): boolean {
  const padded = (text: string) => text.split(".").map((number) => `${parseInt(number)}`.padStart(6, "0")).join(".");
  return padded(version) < padded(minimum);
}

if ((globalThis as { name?: string }).name === WORKER_NAME) {
  await serveExtraction();
} else if (import.meta.main) {
  const stderr = openStderr();
  if (isOlder(Deno.version.deno, MIN_DENO)) {
    await stderr(`fetch_wheels: Deno ${Deno.version.deno} is too old; the oldest that works is ${MIN_DENO}\n`);
    Deno.exit(EXIT_CODES.usage);
  }
  const { filename } = import.meta; // undefined for a module from a URL
  const isModuleReadable = filename === undefined || isGranted({ name: "read", path: filename });
  const status = await main(Deno.args, {
    env: readEnvironment,
    stdin: Deno.stdin.readable,
    stdout: Deno.stdout.writable,
    stderr,
    columns: () => Deno.stderr.isTerminal() ? Deno.consoleSize().columns : undefined,
    isStdoutTerminal: Deno.stdout.isTerminal(),
    promptPassword: Deno.stdin.isTerminal() ? (question) => promptPassword(question, stderr) : undefined,
    workerUrl: isModuleReadable ? import.meta.url : undefined,
    signal: abortOnSignals(),
  });
  Deno.exit(status); // does not wait for anything that was given up
}
