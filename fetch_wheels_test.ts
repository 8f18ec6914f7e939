import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import {
  type Challenge,
  type Credentials,
  type Descriptor,
  type DockerConfig,
  type ErrorKind,
  type FetchResult,
  fetchWheels,
  FetchWheelsError,
  type FetchWheelsOptions,
  findCredentials,
  hostPlatform,
  type Io,
  parseChallenges,
  parseImageReference,
  parsePlatform,
  type ProgressEvent,
  selectManifest,
} from "./fetch_wheels.ts";
import { ACCEPTED, COMPRESSIONS, cut, REFUSED } from "./testing/archive_cases.ts";
import {
  flip,
  head,
  layerOf,
  meta,
  pax,
  regular,
  SKIPPABLE,
  treeOf,
  zstdChecked,
  zstdStored,
} from "./testing/archives.ts";
import {
  ANNOTATION,
  ARTIFACT_MEDIA,
  type ArtifactFields,
  type ArtifactLayer,
  KEY_KINDS,
  type KeyKind,
  type MadeArtifact,
  makeArtifact,
  makeDirectoryLayer,
  makeKey,
  makeSignature,
  pushSignatures,
  type SignatureChanges,
  type SignatureFormat,
  signatureTag,
  type SigningKey,
  WRONG_SIGNATURES,
} from "./testing/artifacts.ts";
import { fuzz } from "./testing/fuzz.ts";
import {
  base256,
  type Bytes,
  concat,
  directory,
  file,
  flatParts,
  gzip,
  gzipMembers,
  gzipStored,
  hardlink,
  headerOffsets,
  layoutMembers,
  type MadeImage,
  type MadeManifest,
  makeDockerArchive,
  makeImage,
  makeIndex,
  makeOciArchive,
  makeSchema1,
  makeTar,
  makeWheel,
  MEDIA,
  type Parts,
  paxRecords,
  rawHeader,
  rawMembers,
  sha256,
  sha512,
  symlink,
  type TarMember,
  tarOf,
  toBytes,
  zstd,
} from "./testing/images.ts";
import { makeAuthority, makeBundle, makeCertificate, makeSignedCertificate } from "./testing/certificates.ts";
import { largeLayer, NOISE, runPlans } from "./testing/faults.ts";
import {
  type Answer,
  connectError,
  fakeNetwork,
  type LinkSpeed,
  redirect,
  simulateLink,
  streamedBlob,
  trickle,
  UNKNOWN_HOST,
} from "./testing/network.ts";
import {
  damageableCaches,
  isInstalled,
  type Outcome,
  PERMISSIONS,
  PROGRAM,
  run,
  runDeno,
  runProgram,
  spawnDeno,
  spawnProgram,
  type Surroundings,
} from "./testing/program.ts";
import { isInPath, type ProxyBehavior, startProxy } from "./testing/proxies.ts";
import {
  type Fault,
  type LoggedRequest,
  type RegistryOptions,
  type RequestContext,
  serveLayer,
  startRegistry,
  type TestRegistry,
} from "./testing/registry.ts";
import { createHash, generateKeyPairSync, type KeyObject, randomBytes } from "node:crypto";
import { lookup } from "node:dns/promises";
import { basename, dirname, join } from "node:path";
import { setImmediate as nextTask } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { contents, Scratch, snapshot } from "./testing/scratch.ts";
import { canMountHere, failingRenames, handlesSignals, Mount, sizeBelow, stub, systemError } from "./testing/system.ts";
import { watchDownload, type WatchOptions } from "./testing/terminal.ts";
import { WAITS } from "./testing/waits.ts";
import denoJson from "./deno.json" with { type: "json" };
import cosign from "./testing/signatures.json" with { type: "json" };

// ---------------------------------------------------------------------------------------------------------------------
// Helpers
// ---------------------------------------------------------------------------------------------------------------------

const BASE = gzip(await makeTar([{ name: "etc/os-release", data: "ID=test\n" }]));
const LAYER = gzip(await makeTar([{ name: "a-1-py3-none-any.whl", data: "wheel" }]));
const IMAGE = makeImage({ layers: [BASE, LAYER] });
const HEX = "0123456789abcdef".repeat(4);

/** A registry that holds `ns/wheels:1.0`. */
function serveImage(options: RegistryOptions = {}, image: MadeImage = IMAGE): TestRegistry {
  const registry = startRegistry(options);
  registry.pushImage("ns/wheels", "1.0", image);
  return registry;
}

/** Fetches the layer's tarball into memory, for linux/amd64, over plain http, without delays between retries. */
async function pull(from: TestRegistry | string, options: FetchWheelsOptions = {}) {
  const source = typeof from === "string" ? from : `${from.host}/ns/wheels:1.0`;
  const chunks: Uint8Array[] = [];
  const output = new WritableStream<Uint8Array>({ write: (chunk) => void chunks.push(chunk) });
  const { delay } = recordDelays();
  const result = await fetchWheels(source, { output, platform: "linux/amd64", protocol: "http", delay, ...options });
  return { ...result, tarball: concat(...chunks) };
}

/** Returns a `delay` that does not wait, and the milliseconds that it was called with. */
function recordDelays(): { delays: number[]; delay: (milliseconds: number) => Promise<void> } {
  const delays: number[] = [];
  return { delays, delay: (milliseconds) => Promise.resolve(void delays.push(milliseconds)) };
}

/** Returns an `onProgress` that records the messages of warnings. */
function recordWarnings(): { warnings: string[]; onProgress: (event: ProgressEvent) => void } {
  const warnings: string[] = [];
  return { warnings, onProgress: (event) => void (event.type === "warning" && warnings.push(event.message)) };
}

/** Starts a server of one handler on a free port of 127.0.0.1. */
function serve(handler: (request: Request) => Response | Promise<Response>): Deno.HttpServer<Deno.NetAddr> {
  return Deno.serve({ port: 0, hostname: "127.0.0.1", onListen: () => {} }, handler);
}

/**
 * Asserts that an attempt fails with a `FetchWheelsError` whose message is one line without a full stop.
 *
 * @param attempt A promise, or a function that throws or returns a promise
 * @param kind Kind of the error; alternatives are separated by `|`
 * @param message What the message must match
 */
async function assertFails(attempt: unknown, kind: string, message = /./): Promise<FetchWheelsError> {
  try {
    await (typeof attempt === "function" ? attempt() : attempt);
  } catch (error) {
    assert(error instanceof FetchWheelsError, `not a FetchWheelsError: ${Deno.inspect(error)}`);
    assert(kind.split("|").includes(error.kind), `expected ${kind}, got ${error.kind}: ${error.message}`);
    assert.match(error.message, /^.*[^.]$/); // without the s flag: one line
    assert.match(error.message, message);
    return error;
  }
  assert.fail(`expected ${kind}, but it did not fail: ${attempt}`);
}

/** A hook that demands the token `t`, and passes requests to the token service, `/token`, to `answer`. */
function tokenGate(answer: (request: Request) => unknown): RegistryOptions["onRequest"] {
  return (request, { path }) => {
    if (path === "/token") return Response.json(answer(request));
    if (request.headers.get("authorization") === "Bearer t") return undefined;
    const challenge = `Bearer realm="${new URL("/token?account=x", request.url)}",service="s"`;
    return new Response(null, { status: 401, headers: { "www-authenticate": challenge } });
  };
}

/** A hook that redirects requests for blobs to the location that `target` returns, if any. */
function redirectBlobs(target: (path: string) => string | undefined): RegistryOptions["onRequest"] {
  return (_request, { path }) => {
    const location = path.includes("/blobs/") ? target(path) : undefined;
    return location === undefined ? undefined : redirect(location);
  };
}

/** Returns the requests whose path contains `part`, each as `ORIGIN PATH`. */
function paths(registry: TestRegistry, part: string): string[] {
  return registry.requests.map(({ origin, path }) => `${origin} ${path}`).filter((path) => path.includes(part));
}

/** Returns a host and port on which nothing listens. */
async function closedHost(): Promise<string> {
  await using registry = startRegistry();
  return registry.host;
}

const isRoot = Deno.uid() === 0;

/**
 * Asserts that a source is rejected, and that DEST and everything beside it is unchanged, whether DEST exists or not.
 * `failure` is the error's kind, and after a colon words of its message or hint: `integrity: not selected`.
 */
async function assertRefused(source: string, failure: string, options: FetchWheelsOptions = {}): Promise<void> {
  const [kind = "", words = ""] = failure.split(": ");
  using scratch = new Scratch();
  scratch.at("beside", "beside");
  scratch.at("there/good.whl", "old");
  scratch.at("there/sub/other.txt", "other");
  Deno.symlinkSync("good.whl", scratch.at("there/link"));
  Deno.chmodSync(scratch.at("there/good.whl"), 0o640);
  const before = snapshot(scratch.path);
  for (const dest of ["there", "absent", "absent/below"]) {
    const attempt = fetchWheels(source, { retries: 0, ...options, dest: scratch.at(dest) });
    const { message, hint } = await assertFails(attempt, kind);
    assert(`${message} ${hint}`.includes(words), `expected "${words}": ${message}, ${hint}`);
    assert.deepEqual(snapshot(scratch.path), before, dest);
  }
}

const GOOD: TarMember[] = [{ name: "a.whl", data: "wheel" }, { name: "sub/b.txt", data: "text" }];
const GOOD_CONTENTS = { "a.whl": "wheel", "sub": "/", "sub/b.txt": "text" };

/** Serves an image whose layer is `largeLayer()`; returns the reference. */
function serveLarge(registry: TestRegistry): string {
  const { bytes, digest } = largeLayer();
  return serveLayer(registry, bytes, { digest, mediaType: MEDIA.ociLayer });
}

/** Returns the requests for a blob's bytes, which the storage answers if there is one. */
function blobRequests({ requests, storageUrl }: TestRegistry): LoggedRequest[] {
  return requests.filter(({ origin, path }) =>
    storageUrl === undefined ? path.includes("/blobs/") : origin === "storage"
  );
}

/** Returns the ranges of the requests for a blob's bytes; undefined is a request for all. */
function askedRanges(registry: TestRegistry): (string | undefined)[] {
  return blobRequests(registry).map(({ range }) => range);
}

/** Returns the first and last byte of a closed range. */
function limits(range: string | undefined): [first: number, last: number] {
  const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? "") ?? assert.fail(`not a closed range: ${range}`);
  return [Number(first), Number(last)];
}

/** Returns a function that gives each request for a blob the next faults, and none after the last. */
function blobFaults(...faults: Fault[][]): (context: RequestContext) => Fault[] {
  return ({ path, count }) => /\/blobs\/|^\/data\//.test(path) ? faults[count - 1] ?? [] : [];
}

/** As `blobFaults()`, at the storage only. */
function storageFaults(...faults: Fault[][]): (context: RequestContext) => Fault[] {
  return ({ origin, count }) => origin === "storage" ? faults[count - 1] ?? [] : [];
}

/** Returns a function that gives these faults to requests whose `ORIGIN PATH` contains `part`: the first of each path. */
function faultsAt(part: string, faults: Fault[], first = Infinity): (context: RequestContext) => Fault[] {
  return ({ origin, path, count }) => `${origin} ${path}`.includes(part) && count <= first ? faults : [];
}

/** Compares bytes; faster than deepEqual. */
function assertSame(actual: Uint8Array, expected: Uint8Array, message?: string): void {
  assert.equal(actual.length, expected.length, message);
  assert(Buffer.compare(actual, expected) === 0, message ?? "the bytes differ");
}

async function waitFor(condition: () => boolean | Promise<boolean>): Promise<void> {
  for (let i = 0; i < 500; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assert.fail(`timed out waiting for ${condition}`);
}

/** Writes an OCI layout with these images and tagged manifests; returns its source. */
function writeLayout(scratch: Scratch, images: MadeImage[], tagged: Record<string, MadeManifest>): string {
  for (const { name, data } of layoutMembers(images, tagged)) scratch.at(`layout/${name}`, data);
  return `oci:${scratch.at("layout")}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1 Reference
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("parseImageReference() reads names as docker pull does", () => {
  const digest = `sha256:${HEX}`;
  const long = "a".repeat(247);
  const table: [text: string, registry: string, repository: string, tag?: string, digest?: string][] = [
    ["python", "docker.io", "library/python", "latest"],
    ["python:3.13", "docker.io", "library/python", "3.13"],
    ["loci/requirements:master-ubuntu_jammy", "docker.io", "loci/requirements", "master-ubuntu_jammy"],
    ["docker.io/python", "docker.io", "library/python", "latest"],
    ["index.docker.io/loci/x", "docker.io", "loci/x", "latest"],
    ["registry.hub.docker.com/python:1", "docker.io", "library/python", "1"],
    ["registry-1.docker.io/python", "registry-1.docker.io", "python", "latest"],
    ["docker.io.example/python", "docker.io.example", "python", "latest"],
    ["localhost:5000", "docker.io", "library/localhost", "5000"],
    ["localhost/x", "localhost", "x", "latest"],
    ["localhost:5000/x/y:1", "localhost:5000", "x/y", "1"],
    ["registry:5000/ns/name", "registry:5000", "ns/name", "latest"],
    ["registry/ns/name", "docker.io", "registry/ns/name", "latest"],
    ["quay.io/a/b/c/d:v1.2_3-X", "quay.io", "a/b/c/d", "v1.2_3-X"],
    ["MyHost/x", "MyHost", "x", "latest"],
    ["10.0.0.1/x", "10.0.0.1", "x", "latest"],
    ["[::1]:5000/x:1", "[::1]:5000", "x", "1"],
    [`python@${digest}`, "docker.io", "library/python", undefined, digest],
    [`q.io/x:1@${digest}`, "q.io", "x", "1", digest],
    [`q.io/x@sha512:${HEX}${HEX}`, "q.io", "x", undefined, `sha512:${HEX}${HEX}`],
    [`x:${"t".repeat(128)}`, "docker.io", "library/x", "t".repeat(128)],
    [long, "docker.io", `library/${long}`, "latest"],
    [`registry.example:5000/${"a".repeat(255)}`, "registry.example:5000", "a".repeat(255), "latest"],
  ];
  for (const [text, registry, repository, tag, digest] of table) {
    const expected = { registry, repository, ...(tag && { tag }), ...(digest && { digest }) };
    assert.deepEqual(parseImageReference(text), expected, text);
  }
});

Deno.test("parseImageReference() quotes what it rejects and names the rule", async () => {
  const [digest, upper] = [`sha256:${HEX}`, `sha256:${HEX.toUpperCase()}`];
  // deno-fmt-ignore
  const table: [rule: RegExp, texts: string[]][] = [
    [/empty/, [""]],
    [/white space/, [" x", "x y", "x\n"]],
    [/scheme/, ["docker://x", "https://q.io/x"]],
    [/lower case/, ["Python", "q.io/ns/Name"]],
    [/tag/, ["x:", "x:-a", "x:.a", "x:a:b", "x:ä", `x:${"t".repeat(129)}`]],
    [/digest/, ["x@", "x@latest", `x@${upper}`, `x@${digest}0`, `x@sha512:${HEX}`, `x@md5:${HEX}`]],
    [/"@"/, [`x@${digest}@${digest}`]],
    [/missing/, ["q.io/", "q.io:5000/"]],
    [/repository/, ["/x", "a//b", "a/b/", "a/-b", "a/b_", "a/b___c", "a/b..c", "ns/../x", "a/b%2f", "a/b+c"]],
    [/host/, ["q.io:/x", "q.io:port/x", "q.io:0/x", "q.io:65536/x", "-q.io/x", "::1/x", "[::1/x"]],
    [/host/, ["[2001:db8:3:4::192.0.2.33]:5000/debian", "[fe80::1%eth0]/x"]],
    [/255/, ["a".repeat(248), `q.io/${"a".repeat(256)}`]],
    [/64 hexadecimal digits/, [HEX, `${HEX}:1`]],
    [/1024 characters/, [`${":".repeat(60_000)}/x`, `${"a".repeat(20_000)}@@`]],
  ];
  for (const [rule, texts] of table) {
    for (const text of texts) {
      const { message } = await assertFails(() => parseImageReference(text), "usage", rule);
      const shown = text.length > 300 ? `${text.slice(0, 300)}…` : text;
      assert(message.startsWith(`Cannot parse image reference ${JSON.stringify(shown)}: `), message);
    }
  }
});

Deno.test("parseImageReference() suggests the lower-case name and keeps the tag", async () => {
  const table = {
    "Python": "python",
    "Quay.io/NS/Name:v1-RC": "quay.io/ns/name:v1-RC",
    "localhost:5000/NS/x": "localhost:5000/ns/x",
    [`Ns/Name:Tag@sha256:${HEX}`]: `ns/name:Tag@sha256:${HEX}`,
  };
  for (const [text, suggestion] of Object.entries(table)) {
    const { hint } = await assertFails(() => parseImageReference(text), "usage", /lower case/);
    assert(hint?.endsWith(` ${suggestion}`), hint);
  }
});

Deno.test("parsePlatform() returns the names that registries use", () => {
  const table: [text: string, os: string, architecture: string, variant?: string][] = [
    ["linux/amd64", "linux", "amd64"],
    ["linux/x86_64", "linux", "amd64"],
    ["linux/x86-64", "linux", "amd64"],
    ["linux/aarch64", "linux", "arm64"],
    ["linux/armhf", "linux", "arm", "v7"],
    ["linux/armel", "linux", "arm", "v6"],
    ["linux/arm/v6", "linux", "arm", "v6"],
    ["linux/arm/6", "linux", "arm", "v6"],
    ["Linux/ARM64/V8", "linux", "arm64", "v8"],
    ["windows/amd64", "windows", "amd64"],
    ["linux/constructor", "linux", "constructor"],
  ];
  for (const [text, os, architecture, variant] of table) {
    assert.deepEqual(parsePlatform(text), { os, architecture, ...(variant && { variant }) }, text);
  }
});

Deno.test("parsePlatform() rejects malformed text", async () => {
  for (const text of ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/arm/", "linux amd64", "linux/a b"]) {
    const { message } = await assertFails(() => parsePlatform(text), "usage");
    assert(message.includes(JSON.stringify(text)), message);
  }
});

Deno.test("hostPlatform() is Linux with this machine's architecture", () => {
  assert.deepEqual(hostPlatform("x86_64"), { os: "linux", architecture: "amd64" });
  assert.deepEqual(hostPlatform("aarch64"), { os: "linux", architecture: "arm64" });
  assert.deepEqual(hostPlatform(), hostPlatform(Deno.build.arch));
});

// ---------------------------------------------------------------------------------------------------------------------
// 2 Credentials
// ---------------------------------------------------------------------------------------------------------------------

const USER = "jörg";
const PASSWORD = "pa:ss wörd: 密 ";
const users = { [USER]: PASSWORD };
const CREDENTIALS = { username: USER, password: PASSWORD };
const LOGIN = { REGISTRY_USERNAME: USER, REGISTRY_PASSWORD: PASSWORD };

/** Arguments that write the layer's tarball to stdout. The last of several equal options wins. */
const TO_STDOUT = ["--protocol", "http", "--platform", "linux/amd64", "--retries", "0", "-o", "-"];

/** Runs the command line, and asserts the exit code and the output of a success. Returns stderr. */
async function exits(expected: number, args: string[], options?: Surroundings, start = run): Promise<string> {
  const { code, bytes, stderr } = await start([...TO_STDOUT, ...args], options);
  assert.equal(code, expected, stderr);
  if (code === 0) assert.deepEqual(bytes, LAYER);
  return stderr;
}

Deno.test("credentials come from stdin or the environment, and are never printed", async () => {
  const other = { REGISTRY_USERNAME: "other", REGISTRY_PASSWORD: "other" };
  const table: [args: string[], given: Surroundings][] = [
    [["--username", USER, "--password-stdin"], { stdin: `${PASSWORD}\n` }],
    [["--username", USER, "--password-stdin"], { stdin: PASSWORD, env: other }],
    [[], { env: LOGIN }],
  ];
  for (const [args, given] of table) {
    await using registry = serveImage({ auth: "basic", users });
    const stderr = await exits(0, [...args, "-v", `${registry.host}/ns/wheels:1.0`], given);
    const secrets = ["pa:ss", "密", Buffer.from(`${USER}:${PASSWORD}`).toString("base64")];
    for (const secret of secrets) assert(!stderr.includes(secret), stderr);
  }
});

Deno.test("one trailing newline of REGISTRY_PASSWORD is dropped", async () => {
  const table: [password: string, value: string, code: number][] = [
    ["pw", "pw\n", 0],
    ["pw", "pw", 0],
    ["pw\n", "pw\n\n", 0],
    [" pw ", " pw \n", 0],
    ["pw", "pw\n\n", 4],
    ["pw", "pw ", 4],
  ];
  for (const [password, value, expected] of table) {
    for (const auth of ["basic", "bearer"] as const) {
      await using registry = serveImage({ auth, users: { [USER]: password } });
      await exits(expected, [`${registry.host}/ns/wheels:1.0`], { env: { ...LOGIN, REGISTRY_PASSWORD: value } });
    }
  }
});

Deno.test("a user name without a password, or the reverse, is a usage error before any request", async () => {
  const halves = [{ username: "u" }, { password: "p" }, { username: "", password: "p" }];
  for (const options of [...halves, { username: "with:colon", password: "p" }]) {
    const fetch = () => assert.fail("a request was sent");
    await assertFails(() => pull("localhost:5000/x", { ...options, fetch }), "usage");
  }
});

const HOST = "registry.example:5000";
const HUB_AUTH = "https://index.docker.io/v1/";
const account = (name: string) => ({ auth: btoa(`${name}:pass:word`) });
const decoded = (username: string) => ({ username, password: "pass:word" });

Deno.test("findCredentials() finds only entries of the image's registry, the most specific first", () => {
  const umlaut = { auth: Buffer.from("user:pässwörd", "utf8").toString("base64") };
  const hub = { [HUB_AUTH]: account("hub") };
  const web = { [`${HUB_AUTH}access-token`]: account("access"), [`${HUB_AUTH}refresh-token`]: account("refresh") };
  const exact = { [HOST]: account("b") };
  const [image, hubImage] = [`${HOST}/ns/name`, "docker.io/library/name"];
  const table: [auths: DockerConfig["auths"], name: string, expected: Credentials | undefined][] = [
    [undefined, image, undefined],
    [{ [HOST]: account("a") }, image, decoded("a")],
    [{ [HOST]: umlaut }, image, { username: "user", password: "pässwörd" }],
    [{ [`https://${HOST}/v1/`]: account("a") }, image, decoded("a")],
    [{ [`${HOST}/v2/`]: account("a") }, image, decoded("a")],
    [{ "registry.example": account("a") }, image, undefined],
    [{ [HOST]: account("a") }, "registry.example/ns/name", undefined],
    [{ [`${HOST}0`]: account("a"), "example:5000": account("b") }, image, undefined],
    [hub, hubImage, decoded("hub")],
    [{ "docker.io": account("hub") }, hubImage, decoded("hub")],
    [hub, `${HOST}/index.docker.io/v1`, undefined],
    [{ ...hub, ...web }, hubImage, decoded("hub")],
    [{ ...web, ...hub }, hubImage, decoded("hub")],
    [web, hubImage, undefined],
    [{ [`https://${HOST}/v1/`]: account("a"), ...exact }, image, decoded("b")],
    [{ ...exact, [`https://${HOST}/v1/`]: account("a") }, image, decoded("b")],
    [{ [`https://${HOST}`]: account("a"), ...exact }, image, decoded("b")],
    [{ [HOST]: account("a"), [`${HOST}/ns`]: account("b") }, image, decoded("b")],
    [{ [HOST]: account("a"), [`${HOST}/ns/na`]: account("b") }, image, decoded("a")],
    [{ [`${HOST}/ns/name`]: account("c"), [`${HOST}/ns`]: account("b") }, image, decoded("c")],
    [{ [HOST]: account("a"), [`${HOST}/ns`]: {} }, image, decoded("a")],
    [{ [HOST]: account("a"), [`${HOST}/ns`]: { auth: "" } }, image, decoded("a")],
    [{ [`https://${HOST}`]: account("a"), [HOST]: { auth: "" } }, image, decoded("a")],
    [{ [HOST]: { ...account("a"), identitytoken: "t" } }, image, { identityToken: "t" }],
    [{ [HOST]: { auth: "", identitytoken: "t" } }, image, { identityToken: "t" }],
    [{ [HOST]: { ...account("a"), registrytoken: "t" } }, image, { registryToken: "t" }],
    [{ [HOST]: { username: "u", password: "p" } }, image, { username: "u", password: "p" }],
    [{ [HOST]: { auth: "", username: "u", password: "p" } }, image, { username: "u", password: "p" }],
    [{ [HOST]: { auth: btoa("no colon") } }, image, undefined],
    ...JSON.parse(`[[null], [{ "${HOST}": null }], [{ "${HOST}": { "auth": 1, "identitytoken": 5 } }]]`)
      .map(([auths]: [DockerConfig["auths"]]) => [auths, image, undefined]),
  ];
  const check = (config: DockerConfig, name: string, expected: Credentials | undefined) => {
    const slash = name.indexOf("/");
    const parts = { registry: name.slice(0, slash), repository: name.slice(slash + 1) };
    assert.deepEqual(findCredentials(config, parts), expected, JSON.stringify([config, name]));
  };
  for (const [auths, name, expected] of table) check({ auths }, name, expected);
  const auths = { [HOST]: account("a") };
  check({ auths, credsStore: "store" }, image, { helper: "store" });
  check({ credHelpers: { [HOST]: "own" }, credsStore: "store" }, image, { helper: "own" });
  check({ credHelpers: { "other.example": "own" }, credsStore: "store" }, image, { helper: "store" });
  check({ credHelpers: { [HOST]: "" }, auths }, image, decoded("a"));
  check({ ...JSON.parse('{"credHelpers": null, "credsStore": null}'), auths }, image, decoded("a"));
});

/** Where credentials are looked for, first to last: the variable, its value below a directory, and the file there. */
const PLACES: [variable: string, value: string, file: string][] = [
  ["DOCKER_AUTH_CONFIG", "", ""],
  ["REGISTRY_AUTH_FILE", "auth.json", "auth.json"],
  ["XDG_RUNTIME_DIR", "run", "run/containers/auth.json"],
  ["XDG_CONFIG_HOME", "config", "config/containers/auth.json"],
  ["DOCKER_CONFIG", "docker", "docker/config.json"],
];

Deno.test("credentials are found in the places of Docker, podman and GitLab, in order", async (t) => {
  const onRequest: RegistryOptions["onRequest"] = ({ headers }, { path }) => {
    const isReady = headers.get("authorization") === "Bearer registry-token";
    const blob = IMAGE.blobs.get(path.split("/").at(-1) ?? "");
    return isReady ? new Response(path.includes("/blobs/") ? blob : IMAGE.manifest) : undefined;
  };
  await using registry = serveImage({ auth: "bearer", users: { user: "pass:word" }, onRequest });
  const { host } = registry;
  const check = async (env: Record<string, string>, expected = 0) => {
    const stderr = await exits(expected, [`${host}/ns/wheels:1.0`], { env });
    assert.doesNotMatch(stderr, /pass:word|registry-token/);
    return stderr;
  };
  const config = (name: string, key = host) => JSON.stringify({ auths: { [key]: account(name) } });
  const [right, wrong, unrelated] = [config("user"), config("wrong"), config("wrong", "other.example")];
  for (const [at, [variable, value, file]] of PLACES.entries()) {
    await t.step(variable, async () => {
      using scratch = new Scratch();
      const put = (text: string, [variable, value, file] = PLACES[at] ?? assert.fail()): Record<string, string> => {
        if (file !== "") scratch.at(file, text);
        return { [variable]: file === "" ? text : scratch.at(value) };
      };
      await check(put(right));
      await check({ ...put(wrong), REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: "pass:word" });
      for (const later of PLACES.slice(at + 1)) {
        await check({ ...put(right), ...put(wrong, later) });
        assert.match(await check({ ...put(wrong), ...put(right, later) }, 4), /check the user name/);
        await check({ ...put(unrelated), ...put(right, later) });
        const warnings = await check({ ...put(`{"pass:word`), ...put(right, later) });
        assert.match(warnings, new RegExp(`warning: .*${file || variable}`), value);
      }
    });
  }
  for (const file of [".config/containers/auth.json", ".docker/config.json"]) {
    await t.step(`~/${file}`, async () => {
      using scratch = new Scratch();
      scratch.at(".docker/config.json", wrong);
      scratch.at(file, right);
      await check({ HOME: scratch.path });
      await check({ HOME: scratch.path, XDG_CONFIG_HOME: "", XDG_RUNTIME_DIR: "", DOCKER_CONFIG: "" });
    });
  }
  const entries: Record<string, DockerConfig["auths"]> = {
    "registrytoken": { [host]: { registrytoken: "registry-token" } },
    "registrytoken beside auth": { [host]: { ...account("wrong"), registrytoken: "registry-token" } },
    "username and password": { [host]: { auth: "", ...decoded("user") } },
    "an empty auth of the repository": { [host]: account("user"), [`${host}/ns/wheels`]: { auth: "" } },
  };
  await steps(t, entries, (auths) => check({ DOCKER_AUTH_CONFIG: JSON.stringify({ auths }) }));
  await t.step("not read for a registry that does not ask", async () => {
    await using open = serveImage();
    const stderr = await exits(0, [`${open.host}/ns/wheels:1.0`], { env: { DOCKER_AUTH_CONFIG: "{" } });
    assert.doesNotMatch(stderr, /warn/);
  });
});

Deno.test("an identity token is exchanged by POST, or by GET if the service does not support POST", async () => {
  for (const identityTokens of [["identity"], undefined]) {
    await using registry = serveImage({ auth: "bearer", users: { "<token>": "identity" }, identityTokens });
    const authConfig = JSON.stringify({ auths: { [registry.host]: { identitytoken: "identity" } } });
    assert.deepEqual((await pull(registry, { authConfig })).tarball, LAYER);
    const sent = registry.requests.filter(({ origin }) => origin === "token");
    assert.deepEqual(sent.map(({ method }) => method), identityTokens === undefined ? ["POST", "GET"] : ["POST"]);
    const form = new URLSearchParams(sent[0]?.body);
    const fields = [form.get("grant_type"), form.get("refresh_token"), form.get("scope")];
    assert.deepEqual(fields, ["refresh_token", "identity", "repository:ns/wheels:pull"]);
  }
});

/** Returns a function that runs the program in a process with these permissions, besides those that it needs. */
function programWith(permissions: string[]): typeof run {
  return (args, surroundings) => runProgram(args, surroundings, [...PERMISSIONS, ...permissions]);
}

Deno.test("a credential helper is run with the registry's key on stdin", async (t) => {
  await using registry = serveImage({ auth: "basic", users: { user: "pass:word" } });
  using scratch = new Scratch();
  const script = `#!/bin/sh\n[ "$1 $(cat)" = "get ${registry.host}" ] || exit 1\n` +
    `echo '{"ServerURL":"x","Username":"user","Secret":"pass:word"}'\n`;
  Deno.chmodSync(scratch.at("docker-credential-mine", script), 0o755);
  const config = JSON.stringify({ credHelpers: { [registry.host]: "mine" } });
  const env = { DOCKER_AUTH_CONFIG: config, PATH: `${scratch.path}:${Deno.env.get("PATH")}` };
  const source = `${registry.host}/ns/wheels:1.0`;
  await t.step("with --allow-run", async () => {
    await exits(0, [source], { env }, programWith(["--allow-run"]));
  });
  await t.step("without --allow-run", async () => {
    const stderr = await exits(4, [source], { env }, runProgram);
    assert.match(stderr, /warning: .*--allow-run=docker-credential-mine/);
  });
  await t.step("which does not answer", async () => {
    scratch.at("docker-credential-mine", "#!/bin/sh\nexec sleep 60\n");
    const stderr = await exits(4, ["--timeout", "0.3", source], { env }, programWith(["--allow-run"]));
    assert.match(stderr, /warning: .*"docker-credential-mine": it did not answer within 0\.3 s; continuing/);
  });
  await t.step("an answer without an end is not kept in memory", async () => {
    Deno.chmodSync(scratch.at("docker-credential-mine", "#!/bin/sh\nexec yes\n"), 0o755);
    const stderr = await exits(4, ["--timeout", "5", source], { env }, programWith(["--allow-run"]));
    assert.match(stderr, /warning: .*docker-credential-mine.*it failed/);
  });
});

Deno.test("an unusable helper, and an auth that is not base64, cause a warning", async (t) => {
  await using registry = serveImage({ auth: "bearer" });
  const { host } = registry;
  const allowed = [[], ["--allow-run"]];
  const auths = ["!!!!", "dXNlcjpwYXNz=OnNlY3JldA", btoa("no colon"), "ÿÿ"];
  const table: [config: DockerConfig, words: RegExp, permissions?: string[]][] = [
    ...allowed.flatMap((permissions): typeof table => [
      [{ credsStore: "nowhere" }, /docker-credential-nowhere.*not installed/, permissions],
      [{ credHelpers: { [host]: "nowhere" } }, /docker-credential-nowhere.*not installed/, permissions],
    ]),
    [{ credsStore: "../x" }, /name is invalid/],
    ...auths.map((auth): typeof table[0] => [{ auths: { [host]: { auth } } }, new RegExp(`${host}.*base64`)]),
    [{ auths: { [host]: { registrytoken: "a\nb" } } }, new RegExp(`registrytoken.*${host}.*not allowed`)],
  ];
  for (const [config, words, permissions] of table) {
    await t.step(`${JSON.stringify(config).replace(host, "HOST")} ${permissions}`, async () => {
      const env = { DOCKER_AUTH_CONFIG: JSON.stringify(config) };
      const start = permissions && programWith(permissions);
      const stderr = await exits(0, [`${host}/ns/wheels:1.0`], { env }, start);
      assert.match(stderr, new RegExp(`warning: .*${words.source}`));
      assert.doesNotMatch(stderr, /allow-run|!!!|ÿÿ|dXNl|bm8g/);
    });
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 3 HTTP
// ---------------------------------------------------------------------------------------------------------------------

/** The end of the layer's path; the config is a blob, too. */
const LAYER_PATH = `/blobs/${sha256(LAYER)}`;
const PUBLIC = "registry.example/ns/wheels:1.0";

/** Asserts that an image can be fetched. */
async function pullsLayer(from: TestRegistry | string, options?: FetchWheelsOptions): Promise<void> {
  assert.deepEqual((await pull(from, options)).tarball, LAYER);
}

/** As `assertFails()`, but the words may also be in the hint. Returns message and hint. */
async function explanation(attempt: () => unknown, kind: string, words = /./): Promise<string> {
  const { message, hint = "" } = await assertFails(attempt, kind);
  const text = `${message}; ${hint}`;
  assert.match(text, words);
  return text;
}

/** As the option `delay`: fails on a retry. */
function noRetry(): never {
  return assert.fail("a final failure was retried");
}

/** Runs a step for each entry of a table. */
async function steps<T>(
  t: Deno.TestContext,
  table: Record<string, T>,
  check: (value: T, name: string) => Promise<unknown>,
): Promise<void> {
  for (const [name, value] of Object.entries(table)) await t.step(name, async () => void await check(value, name));
}

/** A hook that answers the requests whose path contains `part`. */
function answerTo(part: string, answer: (request: Request) => Response | undefined): RegistryOptions["onRequest"] {
  return (request, { path }) => path.includes(part) ? answer(request) : undefined;
}

function authorizations(requests: { headers: Headers }[]): (string | null)[] {
  return requests.map(({ headers }) => headers.get("authorization"));
}

/** Answers as a registry that has IMAGE under every name. */
function answerImage({ url }: Request): Response {
  const [, kind, reference = ""] = /\/(manifests|blobs)\/([^/]+)$/.exec(new URL(url).pathname) ?? [];
  if (kind === "manifests") return new Response(IMAGE.manifest, { headers: { "content-type": IMAGE.mediaType } });
  const blob = IMAGE.blobs.get(reference);
  return blob === undefined ? new Response(null, { status: 404 }) : new Response(blob);
}

/** Redirects a request to the same path of another server. */
function redirectTo({ url }: TestRegistry, request: Request, status?: number): Response {
  return redirect(`${url}${new URL(request.url).pathname}`, status);
}

/** Answers `answer` to requests with this Authorization, and a challenge to others. */
function gate(expected: string, challenge: string, answer: Answer = answerImage): Answer {
  const headers = { "www-authenticate": challenge };
  const refuse = () => new Response(null, { status: 401, headers });
  return (request) => request.headers.get("authorization") === expected ? answer(request) : refuse();
}

const TOKENS = "https://auth.example/token";
const issueToken: Answer = () => Response.json({ token: "t" });
const BASIC = `Basic ${Buffer.from(`${USER}:${PASSWORD}`).toString("base64")}`;
const bearer = (realm: string) => `Bearer realm="${realm}",service="s"`;

// Redirects

Deno.test("a redirect to another origin is followed without Authorization", async () => {
  for (const auth of ["basic", "bearer"] as const) {
    for (const status of [301, 302, 303, 307, 308] as const) {
      await using registry = serveImage({ auth, users, storage: { status } });
      await pullsLayer(registry, CREDENTIALS);
      const storage = registry.requests.filter(({ origin }) => origin === "storage");
      assert.deepEqual(new Set(authorizations(storage)), new Set([null]), `${auth} ${status}`);
    }
  }
});

Deno.test("a relative Location is resolved, and keeps Authorization on its origin", async () => {
  const onRequest = redirectBlobs((path) => path.endsWith(LAYER_PATH) ? "../blobs/./x" : undefined);
  await using registry = serveImage({ auth: "basic", users, onRequest });
  registry.pushBlob(LAYER, "x");
  await pullsLayer(registry, CREDENTIALS);
  const blobs = registry.requests.filter(({ path }) => path.includes("/blobs/"));
  assert(blobs.length > 1 && blobs.every(({ headers }) => headers.has("authorization")));
});

Deno.test("ten redirects are followed, and eleven are not", async () => {
  let redirects = 10;
  const onRequest = redirectBlobs((path) => path.endsWith(LAYER_PATH) && redirects-- > 0 ? path : undefined);
  await using registry = serveImage({ onRequest });
  await pullsLayer(registry);
  redirects = Infinity;
  await assertFails(() => pull(registry), "network", /redirect/);
  assert.equal(paths(registry, LAYER_PATH).length, 22);
});

Deno.test("https is redirected to http for bytes that a digest verifies, and without credentials", async (t) => {
  const isManifest = ({ url }: Request) => url.includes("/manifests/");
  const isLayer = ({ url }: Request) => url.endsWith(LAYER_PATH);
  const table: Record<string, { target: string; isRedirected: (request: Request) => boolean; isAllowed: boolean }> = {
    "a blob": { target: ":1.0", isRedirected: isLayer, isAllowed: true },
    "a manifest by digest": { target: `@${IMAGE.digest}`, isRedirected: isManifest, isAllowed: true },
    "a manifest by tag": { target: ":1.0", isRedirected: isManifest, isAllowed: false },
  };
  const logins: [expected: string, challenge: string, credentials: FetchWheelsOptions][] = [
    ["Bearer t", bearer(TOKENS), {}],
    ["Bearer t", bearer(TOKENS), CREDENTIALS],
    [BASIC, 'Basic realm="r"', CREDENTIALS],
  ];
  await steps(t, table, async ({ target, isRedirected, isAllowed }) => {
    for (const [expected, challenge, credentials] of logins) {
      const toStorage = ({ url }: Request) => redirect(url.replace(/.*example/, "http://minio.example"));
      const answer = (request: Request) => isRedirected(request) ? toStorage(request) : answerImage(request);
      const network = fakeNetwork({
        "https://registry.example": gate(expected, challenge, answer),
        "http://minio.example": answerImage,
        "https://auth.example": issueToken,
      });
      const options: FetchWheelsOptions = { protocol: "https", fetch: network.fetch, ...credentials };
      const source = `registry.example/ns/wheels${target}`;
      if (isAllowed) await pullsLayer(source, options);
      else await assertFails(() => pull(source, options), "network", /plain http/);
      assert.deepEqual(authorizations(network.requestsTo("http://minio.example")), isAllowed ? [null] : []);
    }
  });
  await t.step("a token request is refused", async () => {
    const network = fakeNetwork({
      "https://registry.example": gate("Bearer t", bearer(TOKENS)),
      "https://auth.example": () => redirect("http://auth.example/token"),
      "http://auth.example": issueToken,
    });
    await assertFails(() => pull(PUBLIC, { protocol: "https", fetch: network.fetch }), "network", /http/);
    assert.deepEqual(network.requestsTo("http://auth.example"), []);
  });
  await t.step("between real servers", async () => {
    await using storage = serveImage();
    const onRequest = answerTo(LAYER_PATH, (request) => {
      return request.headers.has("authorization") ? redirectTo(storage, request) : undefined;
    });
    await using registry = serveImage({ tls: await makeSignedCertificate(), auth: "basic", users, onRequest });
    await pullsLayer(registry, { protocol: "https", insecure: true, ...CREDENTIALS });
    assert.deepEqual(authorizations(storage.requests), [null]);
  });
});

Deno.test("a redirect's query and user information are never printed", async () => {
  const gone = await closedHost();
  const signed = { storage: { signed: true } };
  const urls = [`http://${gone}/?Signature=CERT`, "ftp://u:secret@h/?Signature=x", "http://u:secret@:x/?Signature=x"];
  const table: [options: RegistryOptions, faults: Fault[], kind: ErrorKind][] = [
    [signed, [{ kind: "expiredSignature" }], "auth"],
    [signed, [{ kind: "reset" }], "network"],
    [signed, [{ kind: "dieAt", byte: 0 }], "network"],
    ...urls.map((url): typeof table[0] => [{ onRequest: redirectBlobs(() => url) }, [], "network"]),
  ];
  for (const [options, faults, kind] of table) {
    await using registry = serveImage({ ...options, faults: faultsAt("storage", faults) });
    const events: ProgressEvent[] = [];
    const attempt = () => pull(registry, { retries: 1, onProgress: (event) => events.push(event) });
    const text = await explanation(attempt, kind);
    const { stderr } = await run([...TO_STDOUT, "-v", `${registry.host}/ns/wheels:1.0`]);
    assert.match(stderr, /GET .*\/blobs\/.*: 307\b/);
    for (const shown of [JSON.stringify(events), text, stderr]) {
      assert.doesNotMatch(shown, /Signature=|expires=|secret/);
    }
  }
});

Deno.test("the message of an error has few characters, whatever the registry sends", async (t) => {
  const path = `/${"a".repeat(50_000)}`;
  const challenge = { "www-authenticate": "a, ".repeat(10_000) };
  const table: Record<string, (request: Request) => Response> = {
    "many schemes": () => new Response(null, { status: 401, headers: challenge }),
    "a long path": ({ url }) => new URL(url).pathname === path ? new Response(null, { status: 404 }) : redirect(path),
  };
  await steps(t, table, async (onRequest) => {
    await using registry = startRegistry({ onRequest });
    const { message } = await assertFails(pull(registry), "auth|not-found");
    assert(message.length < 1000, message);
  });
});

Deno.test("user information is removed from every URL in an error", async () => {
  const closed = await closedHost();
  const urls = ["http", "https", "socks5", "socks5h", "ftp"].map((scheme) => `${scheme}://peter:secret@${closed}/x`);
  for (const url of [...urls, "peter:secret@proxy.example:3128", "http://secret@h/", "http://a:b:secret@h/"]) {
    const fetch = () => Promise.reject(connectError(url, `invalid proxy "${url}", ${url}`));
    const text = await explanation(() => pull(PUBLIC, { fetch, protocol: "https", retries: 0 }), "network");
    assert.doesNotMatch(text, /secret|peter/, url);
  }
  for (const url of urls) {
    for (const args of [[url], ["--mirror", url, `${closed}/ns/wheels`]]) {
      assert.doesNotMatch((await run([...TO_STDOUT, "-v", ...args])).stderr, /secret|peter/, url);
    }
  }
});

Deno.test("each request is a GET that asks for bytes as they are", async () => {
  const tls = await makeCertificate();
  for (const options of [{ auth: "bearer", storage: true }, { auth: "bearer", storage: true, tls }] as const) {
    await using registry = serveImage(options);
    await pullsLayer(registry, { protocol: "detect", insecure: true });
    assert.equal(registry.requests.length, 7);
    for (const { method, headers } of registry.requests) {
      assert.deepEqual([method, headers.get("accept-encoding")], ["GET", "identity"]);
    }
  }
});

// The protocol

Deno.test("detect tries https, then http at a local host, and stays with the protocol that worked", async () => {
  await using registry = serveImage({ auth: "basic", users });
  const protocols: string[] = [];
  const counting: typeof fetch = (input, init) => {
    protocols.push(new URL(String(input)).protocol);
    return fetch(input, init);
  };
  await pullsLayer(registry, { ...CREDENTIALS, protocol: "detect", fetch: counting });
  assert.deepEqual([protocols.length > 3, protocols.lastIndexOf("https:")], [true, 0]);
});

Deno.test("detect retries when plain http fails for a moment", async () => {
  await using registry = serveImage({ faults: faultsAt("/manifests/", [{ kind: "reset" }], 1) });
  await pullsLayer(registry, { protocol: "detect" });
});

Deno.test("detect accepts a redirect from http to https", async () => {
  await using target = serveImage({ tls: await makeCertificate() });
  await using registry = serveImage({ onRequest: answerTo("/blobs/", (request) => redirectTo(target, request)) });
  await pullsLayer(registry, { protocol: "detect", insecure: true, retries: 0 });
});

Deno.test("detect speaks plain http to local names only", async () => {
  // deno-fmt-ignore
  const near = ["localhost", "127.0.0.1", "127.9.9.9:5000", "[::1]:5000", "10.1.2.3", "172.16.0.1", "172.31.0.1",
    "192.168.0.1", "169.254.1.1", "[fd12::1]", "[fe80::1]", "registry:5000", "r.local", "r.svc.internal"];
  // deno-fmt-ignore
  const far = ["r.example", "172.32.0.1", "172.15.0.1", "11.0.0.1", "8.8.8.8", "10.example.com", "127.example.com",
    "localhost.example.com", "r.local.example", "r.notlocal", "[2001:db8::1]", "[fd::1]"];
  for (const host of [...near, ...far]) {
    const protocols: string[] = [];
    const fetch = (input: RequestInfo | URL) => {
      protocols.push(new URL(String(input)).protocol);
      return Promise.reject(connectError(String(input), "Connection refused (os error 111)"));
    };
    const error = await assertFails(() => pull(`${host}/x`, { protocol: "detect", retries: 0, fetch }), "network");
    assert.deepEqual(protocols, near.includes(host) ? ["https:", "http:"] : ["https:"], host);
    if (far.includes(host)) assert.match(error.hint ?? "", /--protocol http\b/);
  }
});

Deno.test("a password is sent over plain http only with --protocol http or to loopback", async () => {
  const table: [host: string, protocol: "detect" | "http" | "https", challenge: string, expected: boolean][] = [
    ["r.example", "https", 'Bearer realm="http://10.0.0.1/token"', false],
    ["r.example", "https", 'Bearer realm="https://10.0.0.1/token"', false],
    ["r.example", "https", 'Bearer realm="https://auth.example/token"', true],
    ["10.0.0.1", "detect", 'Bearer realm="https://r.example/token"', false],
    ...["Basic", 'Bearer realm="/token"'].flatMap((challenge): typeof table => [
      ["10.0.0.1", "detect", challenge, false],
      ["registry:5000", "detect", challenge, false],
      ["10.0.0.1", "http", challenge, true],
      ["r.example", "http", challenge, true],
      ["127.0.0.1:5000", "detect", challenge, true],
      ["localhost:5000", "detect", challenge, true],
      ["[::1]:5000", "detect", challenge, true],
    ]),
  ];
  for (const [host, protocol, challenge, expected] of table) {
    let isSent = false;
    const fetch = (input: RequestInfo | URL, init?: RequestInit) => {
      if (protocol === "detect" && String(input).startsWith("https:")) return Promise.reject(new TypeError("refused"));
      isSent ||= new Headers(init?.headers).has("authorization");
      return Promise.resolve(new Response(null, { status: 401, headers: { "www-authenticate": challenge } }));
    };
    const { hint = "" } = await assertFails(() => pull(`${host}/x/y`, { ...CREDENTIALS, protocol, fetch }), "auth");
    assert.equal(isSent, expected, `${host} ${protocol} ${challenge}`);
    if (!expected && protocol === "detect") assert.match(hint, /--protocol http\b/);
  }
});

Deno.test("a public registry cannot send its clients to a private realm", async (t) => {
  // deno-fmt-ignore
  const hosts = ["169.254.169.254", "10.0.0.5", "172.16.0.1", "192.168.1.1", "127.9.9.9", "0.0.0.0", "2130706433",
    "0x7f.1", "[::ffff:169.254.169.254]", "[::ffff:10.0.0.5]", "[::1]", "[::]", "[fe80::1]", "[fd00::1]", "localhost",
    "localhost.", "a.localhost", "A.LOCALHOST.:8443"];
  const http = ["169.254.169.254/latest/meta-data", "127.0.0.1:8080/token", "auth.example/token"];
  const realms = [...hosts.map((host) => `https://${host}/token`), ...http.map((rest) => `http://${rest}`)];
  for (const realm of [...realms, "ftp://auth.example/token"]) {
    await t.step(realm, async () => {
      const { origin, hostname, protocol } = new URL(realm);
      const ways: Record<string, Answer>[] = [
        { "https://registry.example": gate("Bearer t", bearer(realm)) },
        { "https://auth.example": () => redirect(realm, 302) },
        { "https://auth.example": () => redirect("https://b.example/"), "https://b.example": () => redirect(realm) },
      ];
      for (const way of ways) {
        for (const credentials of [{}, CREDENTIALS]) {
          const registry = { "https://registry.example": gate("Bearer t", bearer(TOKENS)) };
          const network = fakeNetwork({ [origin]: issueToken, ...registry, ...way });
          const options: FetchWheelsOptions = { protocol: "https", fetch: network.fetch, retries: 0, ...credentials };
          const { message } = await assertFails(pull(PUBLIC, options), "auth|network");
          if (protocol.startsWith("http")) assert(message.includes(hostname), message);
          assert.deepEqual(network.requests.filter(({ url }) => url === new URL(realm).href), []);
          assert.deepEqual(authorizations(network.requestsTo("https://registry.example")), [null]);
        }
      }
    });
  }
  await t.step("as the realm of a mirror", async () => {
    const network = fakeNetwork({
      "https://mirror.example": gate("Bearer t", bearer("https://10.0.0.5/token")),
      "https://registry.example": answerImage,
      "https://10.0.0.5": issueToken,
    });
    await pullsLayer(PUBLIC, { protocol: "https", fetch: network.fetch, mirrors: ["https://mirror.example"] });
    assert(network.requestsTo("https://mirror.example").length > 0);
    assert.deepEqual(network.requestsTo("https://10.0.0.5"), []);
  });
});

Deno.test("a realm may be a public host, or a private host of a private registry", async () => {
  const table: [registry: string, realm: string][] = [
    ["https://registry.example", TOKENS],
    ["https://registry.example", "https://8.8.8.8/token"],
    ["https://registry.example", "https://localhost.example/token"],
    ["http://registry.example", "http://auth.example/token"],
    ["http://registry.example", TOKENS],
    ["https://127.0.0.1:5000", "https://127.0.0.1:5001/token"],
    ["https://localhost:5000", "https://127.0.0.1/token"],
    ["https://10.0.0.7", "https://10.0.0.8/token"],
    ["https://[fd00::7]:5000", "https://[fd00::8]/token"],
  ];
  for (const [registry, realm] of table) {
    const { host, protocol } = new URL(registry);
    const { origin } = new URL(realm);
    const network = fakeNetwork({
      [registry]: gate("Bearer t", bearer(realm)),
      [origin]: () => redirect("https://auth2.example/"),
      "https://auth2.example": issueToken,
    });
    const scheme = protocol === "http:" ? "http" : "https";
    await pullsLayer(`${host}/ns/wheels:1.0`, { protocol: scheme, fetch: network.fetch, ...CREDENTIALS });
    assert.deepEqual(authorizations(network.requestsTo(origin)), [BASIC], realm);
    assert.deepEqual(authorizations(network.requestsTo("https://auth2.example")), [null], realm);
  }
});

// Certificates

Deno.test("an untrusted certificate is refused at once, and the hint names both ways out", async () => {
  const elsewhere = await makeSignedCertificate(["other.example"]);
  using scratch = new Scratch();
  const table = [
    { tls: await makeCertificate() },
    { tls: await makeSignedCertificate() },
    { tls: elsewhere, caFile: scratch.at("ca.pem", elsewhere.ca) },
  ];
  for (const { tls, caFile } of table) {
    await using registry = serveImage({ tls });
    for (const protocol of ["detect", "https"] as const) {
      const attempt = () => pull(registry, { protocol, caFile, delay: noRetry });
      const text = await explanation(attempt, "network", /certificate.*--ca-file.*--insecure/);
      assert.doesNotMatch(text, /\w\(\w|Error\(|CaUsedAsEndEntity|UnknownIssuer|os error|\bclient error\b/);
    }
    assert.equal(registry.requests.length, 0);
  }
});

Deno.test("a certificate is trusted by caFile, even if it is its own authority, or by insecure", async () => {
  const [own, signed] = [await makeCertificate(), await makeSignedCertificate()];
  using scratch = new Scratch();
  for (const { tls, ca } of [{ tls: own, ca: own.cert }, { tls: signed, ca: signed.ca }]) {
    await using registry = serveImage({ tls, auth: "bearer", users, storage: { signed: true } });
    for (const trust of [{ caFile: scratch.at("ca.pem", `A comment\n${ca}${tls.key}`) }, { insecure: true }]) {
      await pullsLayer(registry, { ...trust, ...CREDENTIALS, protocol: "https" });
    }
  }
});

Deno.test("certificates of SSL_CERT_FILE, of --ca-file and of bundles are trusted", async (t) => {
  const tls = await makeSignedCertificate();
  const [first, last] = await Promise.all([makeAuthority("first"), makeAuthority("last")]);
  const text = makeBundle(first.cert, tls.ca, last.cert);
  using scratch = new Scratch();
  const [right, wrong] = [scratch.at("right.pem", tls.ca), scratch.at("wrong.pem", first.cert)];
  const [bundle, crlf] = [scratch.at("bundle.pem", text), scratch.at("crlf.pem", text.replaceAll("\n", "\r\n"))];
  await using registry = serveImage({ tls, auth: "bearer" });
  const table: Record<string, { args?: string[]; file?: string; expected?: number }> = {
    "SSL_CERT_FILE": { file: right },
    "a bundle in SSL_CERT_FILE": { file: bundle },
    "SSL_CERT_FILE beside another --ca-file": { args: ["--ca-file", wrong], file: right },
    "--ca-file beside another SSL_CERT_FILE": { args: ["--ca-file", right], file: wrong },
    "a bundle in --ca-file": { args: ["--ca-file", bundle] },
    "a bundle with CRLF": { args: ["--ca-file", crlf] },
    "neither": { args: ["--ca-file", wrong], file: wrong, expected: 5 },
  };
  await steps(t, table, async ({ args = [], file, expected = 0 }) => {
    const env: Record<string, string> = file === undefined ? {} : { SSL_CERT_FILE: file };
    for (const start of [run, runProgram]) {
      const all = ["--protocol", "https", ...args, `${registry.host}/ns/wheels:1.0`];
      const stderr = await exits(expected, all, { env }, start);
      if (expected === 5) assert.match(stderr, /certificate/);
    }
  });
});

Deno.test("a --ca-file that is not valid PEM is a usage error that names the file", async (t) => {
  const { cert } = await makeAuthority("good");
  const lines = cert.trim().split("\n");
  const middle = Math.floor(lines.length / 2);
  const noEnd = lines.slice(0, -1).join("\n");
  const notDer = "-----BEGIN CERTIFICATE-----\naGVsbG8gd29ybGQ=\n-----END CERTIFICATE-----\n";
  const table: Record<string, string | Uint8Array> = {
    "truncated before its end": noEnd,
    "truncated in the middle": lines.slice(0, middle).join("\n"),
    "garbage in a block": lines.with(middle, "!!!! this is not base64 !!!!").join("\n"),
    "base64 of something else": notDer,
    "a line is missing": lines.toSpliced(middle, 1).join("\n"),
    "one bad block in a bundle": makeBundle(cert, notDer, cert),
    "a truncated block at the end of a bundle": `${cert}${noEnd}`,
    "a truncated block at the start of a bundle": `${noEnd}\n${cert}`,
    "empty": "",
    "not PEM": "hello\n",
    "DER": Buffer.from(lines.slice(1, -1).join(""), "base64"),
  };
  await using registry = serveImage({ tls: await makeSignedCertificate() });
  await steps(t, table, async (contents) => {
    using scratch = new Scratch();
    const file = scratch.at("authority.pem", contents);
    const stderr = await exits(2, ["--protocol", "https", "--ca-file", file, `${registry.host}/ns/wheels:1.0`]);
    assert(stderr.includes(file), stderr);
    assert.equal(registry.requests.length, 0);
  });
});

Deno.test("insecure survives an answer that is given up halfway", async () => {
  await using registry = startRegistry({ tls: await makeCertificate() });
  registry.pushManifest("ns/wheels", "1.0", new Uint8Array(5 << 20), MEDIA.ociManifest);
  await assertFails(() => pull(registry, { protocol: "https", insecure: true }), "integrity");
});

// Proxies

interface ProxiedPath {
  /** Variable that names the proxy of this code path. */
  variable: string;
  /** Where the proxy connects to. */
  registry: TestRegistry;
  args: string[];
  env?: Record<string, string>;
}

/** A registry over http and one over https, and each code path of requests through a proxy to them. */
async function startProxied() {
  await using stack = new AsyncDisposableStack();
  const tls = await makeSignedCertificate(["registry.example", "registry.corp", "198.51.100.7", "2001:db8::1"]);
  const caFile = stack.use(new Scratch()).at("ca.pem", tls.ca);
  const plain = stack.use(serveImage());
  const secure = stack.use(serveImage({ tls }));
  const https = ["--protocol", "detect"];
  const env = { SSL_CERT_FILE: caFile };
  const codePaths: Record<string, ProxiedPath> = {
    "http": { variable: "HTTP_PROXY", registry: plain, args: [] },
    "http, insecure": { variable: "http_proxy", registry: plain, args: ["--insecure"] },
    "http, all_proxy": { variable: "all_proxy", registry: plain, args: [] },
    "https, --ca-file": { variable: "HTTPS_PROXY", registry: secure, args: [...https, "--ca-file", caFile] },
    "https, SSL_CERT_FILE": { variable: "https_proxy", registry: secure, args: https, env },
    "https, --insecure": { variable: "https_proxy", registry: secure, args: [...https, "--insecure"] },
    "https, ALL_PROXY": { variable: "ALL_PROXY", registry: secure, args: [...https, "--insecure"] },
  };
  /** Checks all code paths at the same time. */
  const onEachPath = (check: (path: ProxiedPath) => Promise<void>) => Promise.all(Object.values(codePaths).map(check));
  const running = stack.move();
  return { codePaths, onEachPath, [Symbol.asyncDispose]: () => running.disposeAsync() };
}

Deno.test("loopback never goes through a proxy, with or without a password", async (t) => {
  const [tls, own] = [await makeSignedCertificate(), await makeCertificate()];
  using scratch = new Scratch();
  const [caFile, ownFile] = [scratch.at("ca.pem", tls.ca), scratch.at("own.pem", own.cert)];
  await using proxy = startProxy();
  const variables = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
  const proxies = Object.fromEntries(variables.map((name) => [name, proxy.url]));
  const table: [host: string, options: RegistryOptions, args: string[], env?: Record<string, string>][] = [
    ["127.0.0.1", { auth: "basic" }, []],
    ["localhost", { auth: "bearer", storage: true }, []],
    ["localhost", { auth: "bearer" }, ["--protocol", "detect"]],
    ["127.0.0.1", { auth: "bearer", tls }, ["--protocol", "https", "--insecure"]],
    ["localhost", { auth: "bearer", tls, storage: true }, ["--protocol", "https", "--ca-file", caFile]],
    ["localhost", { auth: "bearer", tls: own }, ["--protocol", "https", "--ca-file", ownFile]],
    ["localhost", { auth: "bearer", tls }, ["--protocol", "https"], { SSL_CERT_FILE: caFile }],
    ["localhost", { auth: "bearer", tls }, ["--protocol", "https"], { DENO_CERT: caFile }],
  ];
  for (const [host, options, args, more] of table) {
    await t.step(`${host} ${options.auth} ${args.slice(1, 3)} ${Object.keys(more ?? {})}`, async () => {
      await using registry = serveImage({ ...options, users });
      const source = `${registry.host.replace("127.0.0.1", host)}/ns/wheels:1.0`;
      await exits(0, [...args, source], { env: { ...proxies, ...LOGIN, ...more } }, runProgram);
      assert.deepEqual(proxy.requests, []);
    });
  }
});

Deno.test("a proxy's user name and password are never printed, and an unusable proxy is an error", async (t) => {
  const table: [value: string, code: number][] = [
    ["http://peter:secret@127.0.0.1:1", 5],
    ["http://peter:sec%40ret@127.0.0.1:1", 5],
    ["https://peter:secret@127.0.0.1:1", 5],
    ["socks5://peter:secret@127.0.0.1:1", 5],
    ["peter:secret@127.0.0.1:1", 5],
    ["http://peter:secret@[bad", 2],
    ["http://peter:sec/ret@host:3128", 2],
    ["http://peter:secret@host:99999", 2],
    ["ftp://peter:secret@host", 2],
    ["http://", 2],
  ];
  await using proxied = await startProxied();
  using scratch = new Scratch();
  await steps(t, proxied.codePaths, async ({ variable, registry, args, env }) => {
    for (const [value, expected] of table) {
      for (const form of [["-v"], ["--json", "-o", scratch.at("layer")]]) {
        const given = { env: { ...env, [variable]: value } };
        const { code, stdout, stderr } = await run([...TO_STDOUT, ...args, ...form, PUBLIC], given);
        const text = stderr + stdout;
        assert.equal(code, expected, `${value}: ${text}`);
        assert.doesNotMatch(text, /secret|sec(?:%40|@|\/)ret|peter/, value);
        if (code === 2) assert(text.includes(variable), `${value}: ${text}`);
      }
    }
    assert.deepEqual(registry.requests, []);
  });
  await t.step("from the real environment", async () => {
    for (const args of [[], ["--insecure"]]) {
      for (const value of ["socks5://peter:secret@127.0.0.1:1", "peter:secret@127.0.0.1:1"]) {
        const env = { HTTPS_PROXY: value };
        const text = await exits(5, ["--protocol", "https", ...args, PUBLIC], { env }, runProgram);
        assert.doesNotMatch(text, /secret|peter/);
      }
    }
  });
});

Deno.test("a proxy may speak https: its certificate is verified, and it gets the user name for http, too", async (t) => {
  const tls = await makeSignedCertificate();
  using scratch = new Scratch();
  const trust = ["--ca-file", scratch.at("ca.pem", tls.ca)];
  const seen: (string | null)[] = [];
  await using server = Deno.serve({ ...tls, port: 0, hostname: "127.0.0.1", onListen: () => {} }, (request) => {
    seen.push(request.headers.get("proxy-authorization"));
    return answerImage(request);
  });
  const host = `127.0.0.1:${server.addr.port}`;
  const given = { env: { HTTP_PROXY: `https://us%40r:p%25@${host}`, HTTPS_PROXY: `https://${host}` } };
  await t.step("a registry of plain http", async () => {
    await exits(0, [...trust, PUBLIC], given);
    assert.deepEqual(new Set(seen), new Set([`Basic ${btoa("us@r:p%")}`]));
  });
  for (const protocol of ["http", "https"]) {
    await t.step(`an untrusted certificate, for ${protocol}`, async () => {
      const stderr = await exits(5, ["--protocol", protocol, PUBLIC], given);
      assert(stderr.includes(`proxy https://${host}: the certificate is not trusted (`), stderr);
      assert.match(stderr, /hint: .*--ca-file/);
    });
  }
});

Deno.test("NO_PROXY means the same on every code path", async (t) => {
  const table: [value: string, host: string, isDirect: boolean][] = [
    ["", "registry.corp", false],
    ["*", "registry.corp", true],
    ["corp", "registry.corp", true],
    [".corp", "registry.corp", true],
    ["*.corp", "registry.corp", true],
    ["registry.corp", "registry.corp:5000", true],
    ["other.example,  Registry.CORP", "registry.corp", true],
    ["registry.corp:5000", "registry.corp:5000", true],
    ["registry.corp:5001", "registry.corp:5000", false],
    ["istry.corp,a.registry.corp,corp.example", "registry.corp", false],
    ["198.51.100.7", "198.51.100.7:5000", true],
    ["198.51.100.0/24", "198.51.100.7:5000", true],
    ["198.51.100.0/30,198.51.101.0/24", "198.51.100.7:5000", false],
    ["2001:db8::/32", "[2001:db8::1]:5000", true],
    ["2001:db9::/32", "[2001:db8::1]:5000", false],
  ];
  await using proxied = await startProxied();
  for (const [value, host, isDirect] of table) {
    await t.step(`${value} for ${host}`, async () => {
      await proxied.onEachPath(async ({ variable, registry, args, env }) => {
        await using proxy = startProxy({ route: () => registry.host });
        const exempting = variable === variable.toUpperCase() ? "no_proxy" : "NO_PROXY";
        const given = { env: { ...env, [variable]: proxy.url, [exempting]: value } };
        // These hosts have no registry, so direct requests fail. A name look-up cannot be canceled.
        const timeout = host.startsWith("registry") ? "20" : "1";
        const all = [...TO_STDOUT, ...args, "--timeout", timeout, `${host}/ns/wheels:1.0`];
        const { code, stderr } = await run(all, given);
        assert.equal(code === 0, !isDirect, stderr);
        assert.equal(proxy.requests.length > 0, !isDirect, stderr);
        if (isDirect) assert(!stderr.includes(proxy.host), stderr);
      });
    });
  }
});

Deno.test("a silent proxy fails after the timeout, on every code path", async () => {
  await using proxied = await startProxied();
  await proxied.onEachPath(async ({ variable, args, env }) => {
    await Promise.all((["silent", "silent-tunnel"] as const).map(async (behavior) => {
      await using proxy = startProxy({ behavior });
      const given = { env: { ...env, [variable]: proxy.url } };
      const stderr = await exits(5, [...args, "--timeout", "3", PUBLIC], given);
      assert.match(stderr, /\b3 s\b/);
      if (behavior === "silent") assert(stderr.includes(proxy.host), stderr);
      assert.equal(proxy.requests.length, 1);
    }));
  });
});

Deno.test("a process that waits for a silent proxy ends after the timeout, and on SIGINT", async (t) => {
  for (const [timeout, expected] of [["1", 5], ["60", 130]] as const) {
    for (const more of [["--insecure"], []]) {
      await t.step(`exit ${expected} ${more}`, async () => {
        const arrived = Promise.withResolvers<void>();
        const behavior = (): ProxyBehavior => {
          arrived.resolve();
          return "silent";
        };
        await using proxy = startProxy({ behavior });
        const args = [...TO_STDOUT, "--protocol", "https", "--timeout", timeout, ...more, PUBLIC];
        const child = spawnProgram(args, { env: { HTTPS_PROXY: proxy.url } });
        await Promise.race([arrived.promise, child.status]);
        const start = performance.now();
        if (expected === 130) child.kill("SIGINT");
        // A program that hangs must not make the test hang.
        const timer = setTimeout(() => child.kill("SIGKILL"), 5000);
        const { code, stderr } = await child.output();
        clearTimeout(timer);
        assert.equal(code, expected, new TextDecoder().decode(stderr));
        assert(performance.now() - start < 3000);
      });
    }
  }
});

Deno.test("a failure of the proxy is reported as the proxy's, with its status", async (t) => {
  const table: [behavior: ProxyBehavior, words: RegExp, requests: number, isAmbiguous?: boolean][] = [
    [403, /\b403\b/, 1, true],
    [407, /\b407\b[^]*\n.*hint: put the proxy's user name and password/, 1],
    [502, /\b502\b/, 2, true],
    ["close", /./, 2, true],
  ];
  await using proxied = await startProxied();
  await steps(t, proxied.codePaths, async ({ variable, registry, args, env }) => {
    const check = async (host: string, words: RegExp) => {
      const given = { env: { ...env, [variable]: `http://peter:secret@${host}` } };
      const stderr = await exits(5, [...args, "--retries", "1", PUBLIC], given);
      assert.match(stderr, words);
      assert.match(stderr, /proxy/i);
      assert(stderr.includes(host), stderr);
      assert.doesNotMatch(stderr, /--protocol http\b|peter|secret/);
    };
    for (const [behavior, words, requests, isAmbiguous] of table) {
      // The answer to a plain request could be the registry's.
      if (isAmbiguous && variable.toLowerCase() !== "https_proxy" && !args.includes("detect")) continue;
      await using proxy = startProxy({ behavior });
      await check(proxy.host, words);
      assert.equal(proxy.requests.length, requests, String(behavior));
    }
    await check(await closedHost(), /refused/i);
    await using proxy = startProxy({ route: () => registry.host, credentials: "us@r:p:w %" });
    // ALL_PROXY gives way to the variable of the scheme.
    const all: Record<string, string> = /^all/i.test(variable) ? {} : { ALL_PROXY: "http://127.0.0.1:1" };
    const given = { ...env, ...all, [variable]: `http://us%40r:p%3Aw%20%25@${proxy.host}` };
    await exits(0, [...args, PUBLIC], { env: given });
    assert(registry.requests.every(({ headers }) => !headers.has("proxy-authorization")));
  });
});

// Failures and retries

Deno.test("transient failures are retried, others are not", async () => {
  const transient = [408, 429, 500, 502, 503, 504];
  const kinds: Record<number, ErrorKind> = { 403: "auth", 404: "not-found" };
  for (const code of [...transient, 400, 403, 404, 405, 410, 451]) {
    await using registry = serveImage({ faults: faultsAt(LAYER_PATH, [{ kind: "status", code }]) });
    const attempt = () => pull(registry, { retries: 3 });
    await assertFails(attempt, kinds[code] ?? "network", new RegExp(String(code)));
    assert.equal(paths(registry, LAYER_PATH).length, transient.includes(code) ? 4 : 1, String(code));
  }
});

Deno.test("a connection that is reset or refused is retried", async (t) => {
  await t.step("reset once", async () => {
    await using registry = serveImage({ auth: "bearer", storage: true, faults: faultsAt("", [{ kind: "reset" }], 1) });
    await pullsLayer(registry, { retries: 1 });
  });
  await t.step("reset within a manifest", async () => {
    await using registry = serveImage({ faults: faultsAt("/manifests/", [{ kind: "dieAt", byte: 20 }], 1) });
    await pullsLayer(registry);
  });
  await t.step("refused each time", async () => {
    const host = await closedHost();
    const { delays, delay } = recordDelays();
    await assertFails(() => pull(`${host}/ns/wheels`, { retries: 3, delay }), "network", /refused/);
    assert.equal(delays.length, 3);
  });
});

Deno.test("the name of an image is not taken for a failure", async () => {
  await using registry = serveImage();
  registry.pushImage("ns/wheels", "SELF_SIGNED_CERT", IMAGE);
  await pullsLayer(`${registry.host}/ns/wheels:SELF_SIGNED_CERT`, { protocol: "detect" });
});

Deno.test("an unknown host is not retried, and a failing name server is", async (t) => {
  const temporary = "dns error: failed to lookup address information: Temporary failure in name resolution";
  await steps(t, { [UNKNOWN_HOST]: 0, [temporary]: 2 }, async (expected, reason) => {
    const { delays, delay } = recordDelays();
    const fetch = (input: RequestInfo | URL) => Promise.reject(connectError(String(input), reason));
    const attempt = () => pull(PUBLIC, { protocol: "https", retries: 2, fetch, delay });
    await assertFails(attempt, "network", /registry\.example/);
    assert.equal(delays.length, expected);
  });
  const isUnknown = await lookup("registry.invalid").then(() => false, ({ code }) => code === "ENOTFOUND");
  const fromNameServer = async () => {
    for (const insecure of [false, true]) {
      for (const protocol of ["http", "https", "detect"] as const) {
        const attempt = () => pull("registry.invalid/x", { insecure, protocol, delay: noRetry });
        await assertFails(attempt, "network", /registry\.invalid/);
      }
    }
  };
  await t.step({ name: "an answer of a real name server", ignore: !isUnknown, fn: fromNameServer });
  await t.step("the next mirror is used at once", async () => {
    const { fetch } = fakeNetwork({ "https://registry.example": answerImage });
    await pullsLayer(PUBLIC, { protocol: "https", fetch, delay: noRetry, mirrors: ["https://mirror.example"] });
  });
});

Deno.test("delays grow, and are random", async () => {
  await using registry = serveImage({ faults: faultsAt("", [{ kind: "status", code: 503 }]) });
  const { random } = Math;
  using _restored = { [Symbol.dispose]: () => void (Math.random = random) };
  const delaysFor = async (value: number, retries = 4): Promise<number[]> => {
    Math.random = () => value;
    const { delays, delay } = recordDelays();
    await assertFails(() => pull(registry, { retries, delay }), "network", /503/);
    return delays;
  };
  const [low, high] = [await delaysFor(0.25), await delaysFor(0.75)];
  assert.equal(low.length, 4);
  assert(low.every((delay, at) => delay > (low[at - 1] ?? 0) && delay < (high[at] ?? 0)), `${low}; ${high}`);
  assert.deepEqual(await delaysFor(1, 9), [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
  assert.deepEqual(await delaysFor(0), [0, 0, 0, 0]);
});

Deno.test("Retry-After is obeyed if it is valid and not too long", async () => {
  const now = Date.parse("2030-01-01T00:00:00Z");
  const obeyed: Record<string, number> = { "7": 7000, "60": 60_000, "Tue, 01 Jan 2030 00:00:20 GMT": 20_000 };
  const ignored = ["0", "Mon, 31 Dec 2029 23:00:00 GMT", "soon", "-5", "1.5", "", "880\xb5s"];
  const refused: Record<string, RegExp> = {
    "61": /\b61 s\b/,
    "99999999999999999999": /wait/,
    "Tue, 01 Jan 2030 00:02:00 GMT": /\b120 s\b/,
  };
  const body = JSON.stringify({ errors: [{ code: "TOOMANYREQUESTS", message: "come back tomorrow" }] });
  for (const value of [...Object.keys(obeyed), ...ignored, ...Object.keys(refused)]) {
    for (const [code, part] of [[429, "/manifests/"], [503, LAYER_PATH]] as const) {
      const fault: Fault = { kind: "status", code, headers: { "retry-after": value }, body };
      await using registry = serveImage({ faults: faultsAt(part, [fault], 1) });
      const { delays, delay } = recordDelays();
      const attempt = () => pull(registry, { delay, now: () => now });
      const words = refused[value];
      if (words === undefined) assert.deepEqual((await attempt()).tarball, LAYER);
      else {
        const { message } = await assertFails(attempt, "network", words);
        assert(message.includes(String(code)) && message.includes("come back tomorrow"), message);
        assert.equal(paths(registry, part).length, 1);
      }
      const isOwn = delays.length === 1 && delays.every((delay) => delay >= 0 && delay <= 500);
      if (ignored.includes(value)) assert(isOwn, `"${value}": ${delays}`);
      else assert.deepEqual(delays, [obeyed[value] ?? []].flat(), value);
    }
  }
});

Deno.test("a registry that is silent fails after the timeout, before its answer or within", async () => {
  const never = () => new Promise<undefined>(() => {});
  const tls = await makeCertificate();
  for (const options of [{}, { onRequest: never }, { tls }, { tls, onRequest: never }]) {
    await using registry = serveImage({ ...options, faults: [{ kind: "stall", byte: 0 }] });
    const trust = "tls" in options ? { protocol: "https", insecure: true } as const : {};
    const attempt = () => pull(registry, { ...trust, timeout: 0.05, retries: 1 });
    await assertFails(attempt, "network", /: no data received for 0\.05 s$/);
  }
});

Deno.test("a fetch that never settles ends with the timeout, or with the signal", async () => {
  const options = { fetch: () => Promise.withResolvers<Response>().promise, protocol: "http", dryRun: true } as const;
  await assertFails(fetchWheels("q.io/x", { ...options, timeout: 0.1, retries: 0 }), "network", /0\.1 s/);
  const controller = new AbortController();
  const waiting = fetchWheels("q.io/x", { ...options, signal: controller.signal });
  controller.abort(new Error("enough"));
  await assert.rejects(waiting, /enough/);
});

Deno.test("signal ends a wait between two attempts", async () => {
  const fault: Fault = { kind: "status", code: 503, headers: { "retry-after": "60" } };
  await using registry = serveImage({ faults: faultsAt("", [fault]) });
  const controller = new AbortController();
  const reason = new Error("enough");
  const onProgress = ({ type }: ProgressEvent) => type === "retry" && setTimeout(() => controller.abort(reason));
  const options = { delay: undefined, signal: controller.signal, onProgress };
  await assert.rejects(pull(registry, options), reason);
});

const PAGE = "<!DOCTYPE html><html><body>Log in</body></html>";

/** Options of a registry over http and over https, and the options to fetch from it. */
async function bothSchemes(): Promise<Record<string, { options: RegistryOptions; trust: FetchWheelsOptions }>> {
  const tls = await makeSignedCertificate();
  return {
    http: { options: {}, trust: {} },
    https: { options: { tls }, trust: { protocol: "https", insecure: true } },
  };
}

Deno.test("JSON that is nested deeply is not an internal error", async () => {
  for (const depth of [10, 1000, 2000, 2400, 2600, 2800, 2900, 3000, 3200, 10_000]) {
    const body = `{"message":${"[".repeat(depth)}${"]".repeat(depth)}}`;
    await using registry = startRegistry({ onRequest: () => new Response(body, { status: 404 }) });
    await assertFails(pull(registry), "not-found");
  }
});

Deno.test("an HTML page or compressed bytes instead of a document are named", async (t) => {
  const html = { "content-type": "text/html; charset=utf-8" };
  const manifest = { "content-type": MEDIA.ociManifest };
  type Body = string | Uint8Array<ArrayBuffer>;
  const table: [name: string, body: Body, headers: Record<string, string>, words: RegExp][] = [
    ["a login page", PAGE, html, /text\/html.*(?:login|proxy)/s],
    ["a login page of the wrong type", `\n ${PAGE.toLowerCase()}`, manifest, /HTML|text\/html/i],
    ["gzip", gzip(IMAGE.manifest), manifest, /gzip/],
    ["gzip that says so", gzip(IMAGE.manifest), { "content-encoding": "gzip" }, /gzip/],
  ];
  for (const { options, trust } of Object.values(await bothSchemes())) {
    for (const [name, body, headers, words] of table) {
      for (const part of ["/manifests/1.0", "/manifests/sha256:", "/token"]) {
        const onRequest = answerTo(part, () => new Response(body, { headers }));
        await using registry = serveImage({ ...options, ...part === "/token" && { auth: "bearer" }, onRequest });
        const source = `${registry.host}/ns/wheels${part.includes("sha256") ? `@${IMAGE.digest}` : ":1.0"}`;
        await t.step(`${name} for ${part}`, async () => {
          await explanation(() => pull(source, { ...trust, delay: noRetry }), "integrity|network|auth", words);
        });
      }
    }
  }
  await t.step("a gzip-encoded layer", async () => {
    const headers = { "content-encoding": "gzip" };
    const onRequest = answerTo(LAYER_PATH, () => new Response(gzip(LAYER), { headers }));
    await using registry = serveImage({ onRequest });
    await explanation(() => pull(registry, { retries: 0 }), "integrity", /gzip/);
  });
});

Deno.test("a small document that trickles fails after four timeouts, and a layer does not", async (t) => {
  const table: [name: string, part: string, answer: () => Response, kind: ErrorKind][] = [
    ["a manifest", "/manifests/", () => trickle(IMAGE.manifest), "network"],
    ["an endless manifest", "/manifests/", () => trickle(" ".repeat(1e5)), "network"],
    ["a token", "/token", () => trickle(`{"token":"${"t".repeat(500)}"}`), "network"],
    ["an error", "/manifests/", () => trickle(" ".repeat(500), 404), "not-found"],
  ];
  await steps(t, await bothSchemes(), async ({ options, trust }) => {
    await Promise.all(table.map(async ([name, part, answer, kind]) => {
      const auth = part === "/token" ? "bearer" : "none";
      await using registry = serveImage({ ...options, auth, onRequest: answerTo(part, answer) });
      const signal = AbortSignal.timeout(5000);
      await assertFails(() => pull(registry, { ...trust, timeout: 0.2, retries: 0, signal }), kind);
      assert(!signal.aborted, name);
    }));
  });
  await t.step("a layer", async () => {
    const slow: Fault = { kind: "trickle", bytesPerSecond: LAYER.length / 1.2 };
    await using registry = serveImage({ faults: faultsAt(LAYER_PATH, [slow]) });
    await pullsLayer(registry, { timeout: 0.2, delay: noRetry });
  });
});

Deno.test("http sent to an https port, and https sent to an http port, are named", async (t) => {
  const bodies = {
    "Go": "Client sent an HTTP request to an HTTPS server.\n",
    "nginx": "<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>",
  };
  await steps(t, bodies, async (body) => {
    await using registry = startRegistry({ onRequest: () => new Response(body, { status: 400 }) });
    await explanation(() => pull(registry), "network", /https.*--protocol https\b/s);
    assert.equal(registry.requests.length, 1);
  });
  await t.step("http at an https port that closes the connection", async () => {
    await using registry = serveImage({ tls: await makeSignedCertificate() });
    await explanation(() => pull(registry, { retries: 0 }), "network", /https/i);
  });
  await t.step("https at an http port", async () => {
    await using registry = serveImage();
    for (const insecure of [false, true]) {
      const attempt = () => pull(registry, { insecure, protocol: "https", delay: noRetry });
      await explanation(attempt, "network", /\bhttp\b.*--protocol http\b/is);
    }
  });
  await t.step("https, and an answer that is not HTTP", async () => {
    const fetch = () => Promise.reject(connectError(PUBLIC, "invalid HTTP version parsed"));
    const { hint } = await assertFails(
      pull(PUBLIC, { protocol: "https", fetch, delay: noRetry }),
      "network",
      /not HTTP$/,
    );
    assert.equal(hint, undefined);
  });
});

Deno.test("several ranges that get a 401 at the same time share one renewal", async () => {
  const { bytes, digest } = largeLayer();
  let waiting = 0;
  const all = Promise.withResolvers<void>();
  const onRequest: RegistryOptions["onRequest"] = async (_request, { path, count }) => {
    if (!path.endsWith(digest) || count <= 2 || waiting === 2) return undefined;
    // The first request is served slowly, so that it is split; two ranges are held until both have the old token.
    if (++waiting === 2) {
      registry.revokeTokens();
      all.resolve();
    }
    await all.promise;
    return undefined;
  };
  const slow: Fault = { kind: "trickle", bytesPerSecond: 8e6 };
  await using registry = startRegistry({ auth: "bearer", onRequest, faults: faultsAt(digest, [slow], 1) });
  const source = serveLarge(registry);
  const { tarball } = await pull(source, { connections: 4, timeout: 5, retries: 0 });
  assertSame(tarball, bytes);
  assert(registry.requests.filter(({ status }) => status === 401).length >= 3);
  assert.equal(paths(registry, "token /token").length, 2);
});

Deno.test("a token that is refused with 400 is renewed once, as with 401", async (t) => {
  const message = "Your authorization token has expired. Reauthenticate and try again.";
  const body = JSON.stringify({ errors: [{ code: "DENIED", message }] });
  const expired: Fault = { kind: "status", code: 400, headers: { "content-type": "application/json" }, body };
  // The manifest's first answer is the challenge.
  await steps(t, { "/manifests/": 2, [LAYER_PATH]: 1 }, async (first, part) => {
    for (const [auth, last] of [["bearer", first], ["bearer", Infinity], ["none", Infinity]] as const) {
      await using registry = serveImage({ auth });
      const from = auth === "none" ? 1 : first;
      registry.faults = ({ path, count }) => path.includes(part) && count >= from && count <= last ? [expired] : [];
      if (last === first) await pullsLayer(registry);
      else await assertFails(() => pull(registry, { delay: noRetry }), "network", /400.*has expired/);
      assert.equal(paths(registry, "token /token").length, auth === "none" ? 0 : 2);
      assert.equal(paths(registry, part).length, auth === "none" ? 1 : first + 1);
    }
  });
});

Deno.test("a port that fetch does not connect to is named, and not retried", async () => {
  const error = await assertFails(pull("127.0.0.1:1/ns/wheels", { delay: () => assert.fail("retried") }), "network");
  assert.match(error.message, /port/);
});

// ---------------------------------------------------------------------------------------------------------------------
// 4 Registry
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("parseChallenges() reads what registries send", () => {
  const bearer = (parameters: Record<string, string>): Challenge => ({ scheme: "bearer", parameters });
  const basic: Challenge = { scheme: "basic", parameters: { realm: "r" } };
  const negotiate: Challenge = { scheme: "negotiate", parameters: {} };
  const table: [header: string, expected: Challenge[]][] = [
    ["", []],
    [" , ,", []],
    ['Basic realm="r"', [basic]],
    ["bAsIC ReAlM=r", [basic]],
    ['Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"', [
      bearer({ realm: "https://a/t", service: "s", scope: "repository:x:pull,push" }),
    ]],
    ['Bearer realm="a", Basic realm="r"', [bearer({ realm: "a" }), basic]],
    ['Basic realm="r", Bearer realm="a",service=s', [basic, bearer({ realm: "a", service: "s" })]],
    ['Bearer realm="a",,, Basic realm="r",', [bearer({ realm: "a" }), basic]],
    ['Bearer realm = "a" , service\t=\t"s"', [bearer({ realm: "a", service: "s" })]],
    [String.raw`Bearer realm="a \"b\", Basic \\ c"`, [bearer({ realm: 'a "b", Basic \\ c' })]],
    ['Bearer realm="a=b"', [bearer({ realm: "a=b" })]],
    ['Bearer realm=""', [bearer({ realm: "" })]],
    ['Bearer realm="a",constructor="b"', [bearer({ realm: "a", constructor: "b" })]],
    ["Negotiate", [negotiate]],
    ['Negotiate, Basic realm="r"', [negotiate, basic]],
    ['Negotiate YII/+a-._~==, Basic realm="r"', [{ ...negotiate, token68: "YII/+a-._~==" }, basic]],
    ["NTLM abc", [{ scheme: "ntlm", parameters: {}, token68: "abc" }]],
    ['Bearer realm="a", Negotiate abc', [bearer({ realm: "a" }), { ...negotiate, token68: "abc" }]],
    ['Basic realm="r", Bearer realm="open', [basic, bearer({})]],
    ['Bearer realm="a",service="s', [bearer({ realm: "a" })]],
    ['Bearer realm="a",service=', [bearer({ realm: "a" })]],
    ['Bearer realm="a" service="s"', [bearer({ realm: "a" })]],
    ['Basic realm="r", @', [basic]],
    ['realm="a"', []],
    ['"Bearer"', []],
  ];
  for (const [header, expected] of table) assert.deepEqual(parseChallenges(header), expected, header);
});

Deno.test("an anonymous token is requested once, and an open registry needs none", async () => {
  await using closed = serveImage({ auth: "bearer" });
  await pull(closed);
  assert.deepEqual(closed.requests.map(({ origin, path, status }) => [origin, path.split("/").at(-2), status]), [
    ["registry", "manifests", 401],
    ["token", "", 200],
    ["registry", "manifests", 200],
    ["registry", "blobs", 200], // the configuration, which says the platform
    ["registry", "blobs", 200],
  ]);
  const { search, headers } = closed.requests[1] ?? assert.fail();
  assert.equal(new URLSearchParams(search).get("scope"), "repository:ns/wheels:pull");
  assert.equal(new URLSearchParams(search).get("service"), "test-registry");
  assert.equal(headers.get("authorization"), null);

  await using open = serveImage();
  await pull(open);
  assert.equal(open.requests.length, 3);
});

Deno.test("Bearer is preferred to Basic, whichever comes first", async () => {
  const challenge = ({ realm }: { realm: string }) => `Basic realm="r", Bearer realm="${realm}"`;
  await using registry = serveImage({ auth: "bearer", users, challenge });
  await pullsLayer(registry, CREDENTIALS);
  const sent = registry.requests.map(({ origin, headers }) =>
    `${origin} ${headers.get("authorization")?.split(" ")[0]}`
  );
  assert.deepEqual([...new Set(sent)], ["registry undefined", "token Basic", "registry Bearer"]);
});

Deno.test("the field of a token may be token or access_token", async () => {
  for (const answer of [{ token: "t" }, { access_token: "t" }, { token: "", access_token: "t" }]) {
    await using registry = serveImage({ onRequest: tokenGate(() => answer) });
    await pullsLayer(registry);
  }
  for (const answer of [{}, { token: 1 }, { token: "a\nb" }, [], null]) {
    await using registry = serveImage({ onRequest: tokenGate(() => answer) });
    await assertFails(() => pull(registry), "auth", /token/);
  }
});

Deno.test("a realm keeps its own query", async () => {
  let query = "";
  const onRequest = tokenGate(({ url }) => {
    query = new URL(url).search;
    return { token: "t" };
  });
  await using registry = serveImage({ onRequest });
  await pull(registry);
  const expected = { account: "x", service: "s", scope: "repository:ns/wheels:pull" };
  assert.deepEqual(Object.fromEntries(new URLSearchParams(query)), expected);
});

Deno.test("a token that is refused is renewed once, and a second refusal is final", async () => {
  for (const part of ["/manifests/", LAYER_PATH]) {
    await using registry = serveImage({ auth: "bearer" });
    let refusals = 1;
    registry.faults = ({ origin, path }) => {
      const isRefused = path.includes(part) && paths(registry, "token /").length > 0 && refusals-- > 0;
      return origin === "registry" && isRefused ? [{ kind: "expiredToken" }] : [];
    };
    await pullsLayer(registry);
    assert.equal(paths(registry, "token /").length, 2, part);
    refusals = Infinity;
    await assertFails(() => pull(registry), "auth", /401/);
    assert.equal(paths(registry, "token /").length, 4, part);
  }
});

Deno.test("credentials that are refused, missing or not applicable are an error, not an anonymous request", async (t) => {
  const wrong = { username: USER, password: "wrong horse" };
  type Case = { challenge?: string; credentials?: FetchWheelsOptions; sent: boolean[]; words: RegExp };
  const table: Record<string, Case> = {
    "refused": { credentials: wrong, sent: [false, true], words: /401.*; check the user name/ },
    "missing": { sent: [false], words: /--username/ },
    "no challenge": { challenge: "", credentials: CREDENTIALS, sent: [false], words: /none/ },
    "an unknown scheme": { challenge: "Negotiate", credentials: CREDENTIALS, sent: [false], words: /negotiate/ },
    "no realm": { challenge: 'Bearer service="s"', credentials: CREDENTIALS, sent: [false], words: /bearer/ },
    "a realm of FTP": { challenge: 'Bearer realm="ftp://h/"', credentials: CREDENTIALS, sent: [false], words: /http/ },
  };
  await steps(t, table, async ({ challenge, credentials, sent, words }) => {
    for (const auth of ["basic", "bearer"] as const) {
      await using registry = serveImage({ auth, users, challenge });
      const text = await explanation(() => pull(registry, credentials), "auth", words);
      assert(!text.includes("wrong horse"));
      const atRegistry = registry.requests.filter(({ origin }) => origin === "registry" || sent.length > 1);
      assert.deepEqual(atRegistry.map(({ headers }) => headers.has("authorization")), sent);
    }
  });
});

Deno.test("a token is used until it expires, which is after 60 s by default", async () => {
  const table: [answer: { expires_in?: unknown }, elapsed: number, tokens: number][] = [
    [{}, 55, 1],
    [{}, 61, 2],
    [{ expires_in: 300 }, 290, 1],
    [{ expires_in: 300 }, 301, 2],
    [{ expires_in: 0 }, 55, 1],
    [{ expires_in: -1 }, 61, 2],
    [{ expires_in: "x" }, 55, 1],
  ];
  for (const [answer, elapsed, tokens] of table) {
    let clock = 1e12;
    await using registry = serveImage({ onRequest: tokenGate(() => ({ token: "t", ...answer })) });
    await pull(registry, {
      now: () => clock,
      onProgress: ({ type }) => void (type === "resolved" && (clock += elapsed * 1000)),
    });
    assert.equal(paths(registry, "/token").length, tokens, JSON.stringify([answer, elapsed]));
    assert.equal(registry.requests.filter(({ status }) => status === 401).length, 1);
  }
});

Deno.test("a token that expires during a download is renewed without losing a byte", async (t) => {
  await t.step("again and again on one connection", async () => {
    await using registry = startRegistry({ auth: "bearer" });
    serveLayer(registry, NOISE);
    registry.faults = ({ path, count }) => {
      if (!path.includes("/blobs/")) return [];
      if (count % 2 === 0) registry.revokeTokens();
      return [{ kind: "dieAt", byte: 50_000 }];
    };
    assertSame((await pull(registry, { retries: 1 })).tarball, NOISE);
    const blobs = blobRequests(registry);
    assert.deepEqual(blobs.map(({ status }) => status === 401), blobs.map((_, at) => at % 2 === 1));
    assert(blobs.length >= 7);
    for (let at = 1; at + 1 < blobs.length; at += 2) assert.equal(blobs[at]?.range, blobs[at + 1]?.range);
  });
  await t.step("on several connections", async () => {
    await using registry = startRegistry({ auth: "bearer" });
    registry.faults = ({ path, count }) => {
      if (path.includes("/blobs/") && count === 4) registry.revokeTokens();
      return [];
    };
    await pullsLarge(registry, { delay: () => Promise.resolve() });
    const tokens = paths(registry, "token /token").length;
    assert(tokens >= 2 && tokens <= 5, `${tokens} tokens`);
  });
});

Deno.test("a redirect from http to https on the same host makes https the registry's origin", async (t) => {
  for (const value of [bearer("https://registry.example/token"), bearer("/token"), 'Basic realm="r"']) {
    for (const isUpgraded of [() => true, ({ url }: Request) => url.endsWith(LAYER_PATH)]) {
      await t.step(`${value} ${isUpgraded}`, async () => {
        const gated = gate(value.startsWith("Basic") ? BASIC : "Bearer t", value);
        const network = fakeNetwork({
          "http://registry.example": (request) =>
            isUpgraded(request) ? redirect(request.url.replace("http:", "https:"), 301) : answerImage(request),
          "https://registry.example": (request) =>
            request.url.includes("/token") ? issueToken(request) : gated(request),
        });
        await pullsLayer(PUBLIC, { protocol: "http", fetch: network.fetch, ...CREDENTIALS });
        const plain = network.requestsTo("http://registry.example");
        assert.equal(plain.filter(isUpgraded).length, 1);
        assert(plain.every(({ headers }) => !headers.has("authorization")));
      });
    }
  }
  await t.step("between real servers", async () => {
    await using secure = serveImage({ tls: await makeSignedCertificate(), auth: "bearer", users });
    await using plain = startRegistry({ onRequest: (request) => redirectTo(secure, request, 308) });
    await pullsLayer(plain, { insecure: true, ...CREDENTIALS });
    assert.equal(plain.requests.length, 1);
  });
});

Deno.test("a redirect to another registry that challenges gets an anonymous token from there", async (t) => {
  /** A hook that redirects the requests whose path contains `part` and that carry what `auth` demands. */
  const passOn = (other: TestRegistry, part: string, auth: RegistryOptions["auth"]) =>
    answerTo(part, (request) => {
      const isReady = auth === "none" || request.headers.has("authorization");
      return isReady ? redirectTo(other, request) : undefined;
    });
  for (const part of [LAYER_PATH, "/manifests/"]) {
    for (const auth of ["none", "basic", "bearer"] as const) {
      await t.step(`${part} ${auth}`, async () => {
        await using other = serveImage({ auth: "bearer" });
        const onRequest = passOn(other, part, auth);
        await using registry = serveImage({ auth, ...auth !== "none" && { users }, onRequest });
        await pullsLayer(registry, { delay: noRetry, ...auth !== "none" && CREDENTIALS });
        assert.equal(paths(other, "token /token").length, 1);
        const atOther = authorizations(other.requests).filter((value) => value !== null);
        assert(atOther.length > 0 && atOther.every((value) => value.startsWith("Bearer ")));
        assert(authorizations(registry.requests).every((value) => value === null || !atOther.includes(value)));
      });
    }
  }
  await t.step("and no password, if that is not enough", async () => {
    await using other = serveImage({ auth: "bearer", users });
    await using registry = serveImage({ auth: "basic", users, onRequest: passOn(other, "/", "basic") });
    await assertFails(() => pull(registry, { ...CREDENTIALS, delay: noRetry }), "auth");
    assert(authorizations(other.requests).every((value) => value === null));
  });
  await t.step("whose realm must not be private", async () => {
    const network = fakeNetwork({
      "https://registry.example": ({ url }) => redirect(url.replace("registry.example", "other.example")),
      "https://other.example": gate("Bearer t", bearer("https://127.0.0.1/token")),
      "https://127.0.0.1": issueToken,
    });
    await assertFails(() => pull(PUBLIC, { protocol: "https", fetch: network.fetch }), "auth|network", /127\.0\.0\.1/);
    assert.deepEqual(network.requestsTo("https://127.0.0.1"), []);
  });
});

Deno.test("the retries of a token request are not multiplied by those of the blob", async () => {
  const onRequest = (request: Request, { path }: RequestContext) => {
    if (path === "/token") return new Response(null, { status: 503 });
    const challenge = { "www-authenticate": `Bearer realm="${new URL("/token", request.url)}"` };
    return path.includes(LAYER_PATH) ? new Response(null, { status: 401, headers: challenge }) : undefined;
  };
  await using registry = serveImage({ onRequest });
  await assertFails(pull(registry, { retries: 5 }), "network", /503/);
  assert.equal(paths(registry, "/token").length, 6);
});

Deno.test("challenges are not answered without end", async () => {
  let hosts = 0;
  const { fetch, requests } = fakeNetwork({});
  const network: typeof globalThis.fetch = async (input, init) => {
    const { pathname, host, origin } = new URL(new Request(input, init).url);
    await fetch(input, init).catch(() => {}); // only records the request
    if (pathname === "/token") return Response.json({ token: "t" });
    if (host === "q.io") return redirect(`https://h${hosts++}.example/v2/ns/x/manifests/1.0`);
    const challenge = `Bearer realm="${origin}/token"`;
    return new Response(null, { status: 401, headers: { "www-authenticate": challenge } });
  };
  await assertFails(fetchWheels("q.io/ns/x:1.0", { fetch: network, dryRun: true, retries: 0 }), "auth");
  assert(requests.length < 50, `${requests.length}`);
});

Deno.test("/v2/ is requested once if the first answer is 403 or 404 without a challenge", async (t) => {
  for (const status of [403, 404]) {
    const onRequest: RegistryOptions["onRequest"] = ({ headers }, { origin, path }) => {
      const isHidden = origin === "registry" && path !== "/v2/" && !headers.has("authorization");
      return isHidden ? new Response(null, { status }) : undefined;
    };
    const accounts: [name: string, options: RegistryOptions, credentials: FetchWheelsOptions][] = [
      ["basic", { auth: "basic", users }, CREDENTIALS],
      ["bearer", { auth: "bearer", users }, CREDENTIALS],
      ["anonymous", { auth: "bearer" }, {}],
    ];
    for (const [name, options, credentials] of accounts) {
      await t.step(`${status} ${name}`, async () => {
        await using registry = serveImage({ ...options, onRequest });
        await pullsLayer(registry, credentials);
        assert.equal(registry.requests.filter(({ path }) => path === "/v2/").length, 1);
        assert.equal(paths(registry, "/manifests/").length, 2);
        await assertFails(() => pull(`${registry.host}/ns/other`, credentials), "not-found|auth");
      });
    }
    await t.step(`${status} from an open registry`, async () => {
      await using registry = startRegistry();
      registry.faults = ({ path }) => path === "/v2/" ? [] : [{ kind: "status", code: status }];
      await assertFails(() => pull(registry, CREDENTIALS), status === 403 ? "auth" : "not-found");
      assert.deepEqual(paths(registry, "/v2/"), ["registry /v2/ns/wheels/manifests/1.0", "registry /v2/"]);
      assert.deepEqual(authorizations(registry.requests), [null, null]);
    });
  }
});

Deno.test("a challenge's scope for another repository is requested beside the image's own", async (t) => {
  const [own, other] = ["repository:ns/wheels:pull", "repository:upstream/wheels:pull"];
  const table: [scope: string | undefined, expected: string[]][] = [
    [other, [own, other]],
    [own, [own]],
    ["", [own]],
    [undefined, [own]],
  ];
  for (const [scope, expected] of table) {
    for (const identityTokens of [undefined, ["identity"]]) {
      await t.step(`${scope} by ${identityTokens ? "POST" : "GET"}`, async () => {
        const challenge = ({ realm }: { realm: string }) =>
          `Bearer realm="${realm}"${scope === undefined ? "" : `,scope="${scope}"`}`;
        await using registry = serveImage({ auth: "bearer", identityTokens, challenge });
        using scratch = new Scratch();
        const auths = { [registry.host]: { identitytoken: "identity" } };
        const file = scratch.at("auth.json", JSON.stringify({ auths }));
        await pullsLayer(registry, identityTokens && { authFiles: [file] });
        const requests = registry.requests.filter(({ origin }) => origin === "token");
        const scopes = requests.flatMap(({ search, body }) => new URLSearchParams(body ?? search).getAll("scope"));
        assert.deepEqual(scopes.flatMap((text) => text.split(" ")).toSorted(), expected);
      });
    }
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 5 Stores
// ---------------------------------------------------------------------------------------------------------------------

/** As in the program. */
const RANGE = 3 << 20;

/** A link on which several connections are faster than one. */
const LINK: LinkSpeed = { perConnection: 20e6 };

/** Options of `pullsLarge()`; `onChunk` is called with each chunk of the output, which waits for it. */
type LargeOptions = FetchWheelsOptions & { onChunk?: (chunk: Uint8Array) => void | Promise<void> };

/** Serves `largeLayer()`, fetches it over a simulated link, and checks its bytes. Returns the link. */
async function pullsLarge(registry: TestRegistry, options: LargeOptions = {}, link = simulateLink(LINK)) {
  const { onChunk, ...rest } = options;
  serveLarge(registry);
  const chunks: Uint8Array[] = [];
  const write = (chunk: Uint8Array) => {
    chunks.push(chunk);
    return onChunk?.(chunk);
  };
  const output = new WritableStream({ write });
  await pull(registry, { output, now: link.now, fetch: link.fetch, delay: noRetry, ...rest });
  assertSame(concat(...chunks), largeLayer().bytes);
  return link;
}

/** Serves NOISE as a layer, fetches it, and checks its bytes. Returns the requested ranges. */
async function pullsNoise(from: RegistryOptions, options?: FetchWheelsOptions): Promise<(string | undefined)[]> {
  await using registry = startRegistry(from);
  serveLayer(registry, NOISE);
  assertSame((await pull(registry, options)).tarball, NOISE);
  return askedRanges(registry);
}

/** Asserts that a request for all bytes was followed by closed ranges without gaps, up to the end. */
function assertContiguous(registry: TestRegistry): void {
  const { length } = largeLayer().bytes;
  const [whole, ...ranges] = askedRanges(registry);
  assert.equal(whole, undefined);
  const sorted = ranges.map(limits).toSorted(([a], [b]) => a - b);
  assert(sorted.length > 0, "no ranges");
  for (const [at, [first, last]] of sorted.entries()) {
    assert(last - first < RANGE || last === length - 1, JSON.stringify(sorted));
    assert.equal(last + 1, sorted[at + 1]?.[0] ?? length, JSON.stringify(sorted));
  }
}

Deno.test("a download uses as many connections as the link makes worthwhile", async (t) => {
  type Case = {
    link?: LinkSpeed;
    connections?: number;
    most: number;
    /** How long the consumer takes for each chunk. */
    consumerMs?: number;
    /** How long it takes for one chunk, after the first one and so many requests. */
    pause?: { requests: number; ms: number };
  };
  // deno-fmt-ignore
  const cases: Record<string, Case> = {
    "four on a link that limits each connection": { most: 4 },
    "no more than --connections": { connections: 2, most: 2 },
    "one with --connections 1": { connections: 1, most: 1 },
    "one on a fast link": { link: { perConnection: 400e6 }, most: 1 },
    "one if the consumer is slower than the link": { link: { perConnection: 40e6 }, most: 1, consumerMs: 20 },
    "four although the consumer is slow to start": { most: 4, pause: { requests: 1, ms: 2000 } },
    "four although the consumer pauses after they are opened": { most: 4, pause: { requests: 5, ms: 400 } },
  };
  await steps(t, cases, async ({ link = LINK, connections, most, consumerMs = 0, pause }) => {
    await using registry = startRegistry();
    const simulated = simulateLink(link);
    let chunks = 0;
    let hasPaused = false;
    const onChunk = () => {
      chunks++;
      const isPause = pause !== undefined && !hasPaused && chunks > 1 && askedRanges(registry).length >= pause.requests;
      hasPaused ||= isPause;
      simulated.wait(isPause ? pause.ms : consumerMs);
    };
    await pullsLarge(registry, { connections, onChunk }, simulated);
    assert.equal(simulated.most(), most);
    if (most === 1) return assert.deepEqual(askedRanges(registry), [undefined]);
    assertContiguous(registry);
    assert(askedRanges(registry).slice(1).map(limits).every(([first, last]) => last - first < RANGE));
  });
  await t.step("sixteen, in steps", async () => {
    await using registry = startRegistry();
    const link = await pullsLarge(registry, { connections: 16 }, simulateLink({ perConnection: 1e6 }));
    assert(link.most() > 4, `${link.most()}`);
    assertContiguous(registry);
  });
  await t.step("one again if more do not raise the rate", async () => {
    await using registry = startRegistry();
    await pullsLarge(registry, {}, simulateLink({ perConnection: 10e6, total: 10e6 }));
    assertContiguous(registry);
    const [first, last] = limits(askedRanges(registry).at(-1));
    assert(last - first > RANGE, `${first} ${last}`);
  });
  await t.step("several are tried again after a pause", async () => {
    await using registry = startRegistry();
    await pullsLarge(registry, {}, simulateLink({ perConnection: 4e6, total: 4e6 }));
    const single = askedRanges(registry).slice(1).map(limits).filter(([first, last]) => last - first > RANGE);
    const pauses = single.slice(1).map(([first], at) => (first - (single[at]?.[0] ?? 0)) / 4e6);
    assert(pauses.length > 0 && pauses.every((seconds) => seconds > 5), `${pauses}`);
  });
  await t.step("several from a server that throttles each connection", async () => {
    await using registry = startRegistry({ faults: [{ kind: "trickle", bytesPerSecond: 16e6 }] });
    serveLarge(registry);
    assertSame((await pull(registry, { delay: noRetry })).tarball, largeLayer().bytes);
    assertContiguous(registry);
  });
  await t.step("one from a server that refuses more, which costs no retry", async () => {
    await using registry = startRegistry();
    const link = simulateLink({ perConnection: 0.5e6 });
    let refused = 0;
    const fetch: typeof link.fetch = (input, init) => {
      if (link.open() === 0) return link.fetch(input, init);
      refused++;
      return Promise.resolve(new Response(null, { status: 503 }));
    };
    await pullsLarge(registry, { fetch }, link);
    assert.equal(link.most(), 1);
    assert(refused > 0 && refused < 10, `${refused}`);
  });
  await t.step("bytes count when they arrive, also those that wait for others", async () => {
    await using registry = startRegistry();
    let delivered = 0;
    let ahead = 0;
    const onChunk = ({ length }: Uint8Array) => void (delivered += length);
    const onProgress = (event: ProgressEvent) => {
      if (event.type === "bytes") ahead = Math.max(ahead, event.received - delivered);
    };
    await pullsLarge(registry, { onChunk, onProgress });
    assert(ahead > 2 * RANGE, `${ahead}`);
  });
});

Deno.test("a connection whose range has arrived takes another, before the consumer has read the first", async () => {
  await using registry = startRegistry();
  const blocked = Promise.withResolvers<void>();
  const pulling = pullsLarge(registry, {
    onChunk: () => askedRanges(registry).length > 1 ? blocked.promise : undefined,
  });
  await waitFor(() => askedRanges(registry).length === 8); // two for each connection
  blocked.resolve();
  await pulling;
});

Deno.test("a download falls back to one connection if the server has no ranges", async (t) => {
  await t.step("and does not say so: nothing is requested twice", async () => {
    await using registry = startRegistry({ onRequest: blobAnswers(() => new Response(largeLayer().bytes)) });
    await pullsLarge(registry);
    assert.deepEqual(askedRanges(registry), [undefined]);
  });
  const faults: Record<string, Fault> = {
    "although it says so, and answers 200": { kind: "ignoreRange" },
    "although it says so, and answers 416": { kind: "status", code: 416 },
    "although it says so, and answers another range": { kind: "wrongRange", shift: 99 },
  };
  await steps(t, faults, async (fault) => {
    await using registry = startRegistry({ faults: ({ range }) => range === undefined ? [] : [fault] });
    const { most } = await pullsLarge(registry);
    const asked = askedRanges(registry);
    const ranges = asked.filter((range) => range !== undefined);
    assert(ranges.length <= 2 && asked.length - ranges.length <= 3 && most() <= 2, asked.join());
  });
});

Deno.test("a server that limits the size of a range is asked for the rest, without retries", async () => {
  await using registry = startRegistry({ faults: faultsAt("/blobs/", [{ kind: "dieAt", byte: 1 << 20 }], 1) });
  const limited: typeof fetch = (input, init) => {
    const request = new Request(input, init);
    const [, from] = /^bytes=(\d+)-/.exec(request.headers.get("range") ?? "") ?? [];
    if (from !== undefined) request.headers.set("range", `bytes=${from}-${Number(from) + (1 << 20) - 1}`);
    return fetch(request);
  };
  await pullsLarge(registry, { fetch: limited, retries: 1, delay: () => Promise.resolve() });
  assert(askedRanges(registry).length > 40);
});

Deno.test("a range that fails is resumed, and the others go on", async (t) => {
  const at = 1 << 20;
  // deno-fmt-ignore
  const cases: Record<string, Record<number, Fault>> = {
    "by dying and by silence": { 3: { kind: "dieAt", byte: at }, 5: { kind: "stall", byte: at } },
    "by a short body and a refusal": { 3: { kind: "short", byte: at }, 5: { kind: "status", code: 503 } },
    "the single stream, after it was cut": { 1: { kind: "dieAt", byte: 6 << 20 } },
  };
  await steps(t, cases, async (faults) => {
    await using registry = startRegistry({
      faults: ({ path, count }) => path.includes("/blobs/") ? [faults[count] ?? []].flat() : [],
    });
    await pullsLarge(registry, { timeout: 0.5, delay: () => Promise.resolve() });
    const ranges = askedRanges(registry).slice(1).map(limits);
    const ends = ranges.map(([, last]) => last);
    const repeated = ends.filter((last, at) => ends.indexOf(last) !== at);
    assert.equal(repeated.length, 1 in faults ? 0 : 2, JSON.stringify(ranges));
    for (const end of repeated) {
      const [one, two] = ranges.filter(([, last]) => last === end).map(([first]) => first).toSorted((a, b) => a - b);
      assert(two !== undefined && one !== undefined && two - one <= at);
    }
  });
});

Deno.test("a cancelled download ends at once, whatever it is waiting for", async (t) => {
  const never = new Promise<undefined>(() => {});
  const cases: Record<string, { options?: RegistryOptions; consumer?: Promise<void> }> = {
    "the bodies of all connections": { options: { faults: [{ kind: "stall", byte: 8 << 20 }] } },
    "the answer to a range": { options: { onRequest: ({ headers }) => headers.has("range") ? never : undefined } },
    "the consumer": { consumer: never },
  };
  await steps(t, cases, async ({ options, consumer }) => {
    await using registry = startRegistry(options);
    const controller = new AbortController();
    let received = 0;
    const onChunk = ({ length }: Uint8Array) => {
      received += length;
      return received > 5 << 20 ? consumer : undefined;
    };
    const pulling = pullsLarge(registry, { onChunk, signal: controller.signal, timeout: 60 });
    pulling.catch(() => {}); // until it is awaited below
    await waitFor(() => received > 0 && askedRanges(registry).length > 1);
    controller.abort(new Error("enough"));
    await assert.rejects(pulling, /enough/);
    assert(received < largeLayer().bytes.length);
  });
});

Deno.test("a connection that dies or is silent is replaced by another, which requests the rest", async (t) => {
  for (const storage of [false, { signed: true }]) {
    for (const kind of ["dieAt", "stall"] as const) {
      await t.step(`${kind}${storage ? ", in a storage" : ""}`, async () => {
        const fault: Fault = { kind, byte: 60_000 };
        const faults = (storage ? storageFaults : blobFaults)([fault], [fault]);
        const [whole, ...rest] = await pullsNoise({ storage, auth: "bearer", faults }, { timeout: 0.1 });
        assert.equal(whole, undefined);
        const starts = rest.map(limits).map(([first]) => first);
        assert(rest.every((range) => limits(range)[1] === NOISE.length - 1), rest.join());
        assert(starts.length === 2 && starts.every((start, at) => start > (starts[at - 1] ?? 0)), starts.join());
        assert((starts[1] ?? 0) <= 120_000);
        if (kind === "stall") assert.deepEqual(starts, [60_000, 120_000]);
      });
    }
  }
});

/** A hook that answers requests for blobs with these in turn, and repeats the last. */
function blobAnswers(...answers: ((request: Request) => Response | undefined)[]): RegistryOptions["onRequest"] {
  return (request, { path, count }) =>
    path.includes("/blobs/") ? (answers[count - 1] ?? answers.at(-1))?.(request) : undefined;
}

/** An answer with a part of NOISE, whatever its headers say. */
function part(from: number, to: number, headers: Record<string, string> = {}): Response {
  const content = NOISE.subarray(from, to);
  const body = ReadableStream.from([content]);
  const status = headers["content-range"] === undefined ? 200 : 206;
  return new Response(body, { status, headers: { "content-length": String(content.length), ...headers } });
}

/** Names a part of NOISE as `Content-Range` does. */
function contentRange(first: number, last: number, total: number | "*" = NOISE.length): Record<string, string> {
  return { "content-range": `bytes ${first}-${last}/${total}` };
}

Deno.test("If-Range is sent with a strong validator, and with no other", async () => {
  for (const [etag, expected] of [['"a"', '"a"'], ['W/"a"', null], [undefined, null], ["", null]] as const) {
    const asked: (string | null)[] = [];
    const onRequest = blobAnswers(
      () => part(0, 60_000, { "content-length": String(NOISE.length), ...(etag !== undefined && { etag }) }),
      (request) => void asked.push(request.headers.get("if-range")),
      () => undefined,
    );
    await pullsNoise({ onRequest });
    assert.deepEqual(asked, [expected], etag);
  }
});

Deno.test("a blob whose entity tags differ is resumed without them", async () => {
  const asked: (string | null)[] = [];
  const whole = (etag: string) => part(0, 60_000, { "content-length": String(NOISE.length), etag });
  const onRequest = blobAnswers(
    () => whole('"a"'),
    ({ headers }) => (asked.push(headers.get("if-range")), whole('"b"')),
    ({ headers }) => void asked.push(headers.get("if-range")),
  );
  const ranges = await pullsNoise({ onRequest });
  assert.deepEqual(asked, ['"a"', null]);
  assert.deepEqual(ranges, [undefined, ...Array(2).fill(`bytes=60000-${NOISE.length - 1}`)]);
});

Deno.test("a storage that fails for good is left: the registry is asked for another place", async () => {
  const whole = { "content-length": String(NOISE.length) };
  const onRequest = (_: Request, { count }: RequestContext) =>
    count === 1 ? part(0, 60_000, whole) : new Response(null, { status: 503 });
  await using storage = startRegistry({ onRequest });
  await pullsNoise({ onRequest: blobAnswers(() => redirect(`${storage.url}/x`), () => undefined) });
  assert.equal(storage.requests.length, 2);
});

Deno.test("a range is requested again after one was ignored: another server may answer", async () => {
  const dying = () => part(0, 60_000, { "content-length": String(NOISE.length) });
  const ranges = await pullsNoise({ onRequest: blobAnswers(dying, dying, () => undefined) });
  const rest = `bytes=60000-${NOISE.length - 1}`;
  assert.deepEqual(ranges, [undefined, rest, rest]);
});

Deno.test("a Content-Length may be repeated", async () => {
  await using registry = startRegistry();
  serveLayer(registry, NOISE);
  const twice: typeof fetch = async (input, init) => {
    const { body, status, headers } = await fetch(input, init);
    const length = headers.get("content-length");
    return new Response(body, { status, headers: { "content-length": `${length}, ${length}` } });
  };
  assertSame((await pull(registry, { fetch: twice })).tarball, NOISE);
});

Deno.test("the answer to a range is used only if Content-Range names that range", async (t) => {
  const size = NOISE.length;
  // deno-fmt-ignore
  const cases: Record<string, (first: number) => Response> = {
    "begins later": (first) => part(first + 1, size, contentRange(first + 1, size - 1)),
    "begins earlier": (first) => part(first - 1, size, contentRange(first - 1, size - 1)),
    "another total": (first) => part(first, size, contentRange(first, size - 1, size + 1)),
    "ends later": (first) => part(first, size, contentRange(first, size, size + 1)),
    "ends before it begins": (first) => part(first, size, contentRange(first, first - 1)),
    "another unit": (first) => part(0, size, { "content-range": `items ${first}-${size - 1}/${size}` }),
    "no range": () => part(0, size, { "content-range": `bytes */${size}` }),
    "nothing": (first) => new Response(NOISE.subarray(first), { status: 206 }),
    "an unknown total, which is allowed": (first) => part(first, size, contentRange(first, size - 1, "*")),
    "an earlier end, which is allowed": (first) => part(first, first + 999, contentRange(first, first + 998)),
  };
  await steps(t, cases, async (answer, name) => {
    const second = ({ headers }: Request) => answer(limits(headers.get("range") ?? "")[0]);
    const onRequest = blobAnswers(() => undefined, second, () => undefined);
    const ranges = await pullsNoise({ onRequest, faults: blobFaults([{ kind: "dieAt", byte: 60_000 }]) });
    if (name.includes("total, which")) assert.equal(ranges[2], undefined);
    else if (name.includes("allowed")) assert.equal(limits(ranges[2])[0], limits(ranges[1])[0] + 999);
    else assert.equal(ranges.length, 3);
  });
});

Deno.test("from a server without ranges, everything is requested again, and the known bytes are skipped", async (t) => {
  const dies: Fault = { kind: "dieAt", byte: 100_000 };
  const ignores: Fault = { kind: "ignoreRange" };
  const again = (byte: number): Fault[][] => [[dies], [ignores, { kind: "dieAt", byte }], [ignores]];
  const places = [[false, blobFaults], [true, storageFaults]] as const;
  const cases: Record<string, { faults: Fault[][]; ranges: (boolean | undefined)[] }> = {
    "200": { faults: [[dies], [ignores]], ranges: [false, true] },
    "200 that dies within the known bytes": { faults: again(30_000), ranges: [false, undefined, undefined] },
    "200 that dies behind the known bytes": { faults: again(150_000), ranges: [false, true, undefined] },
  };
  await steps(t, cases, async ({ faults, ranges }) => {
    for (const [storage, faultsIn] of places) {
      const asked = await pullsNoise({ storage, faults: faultsIn(...faults) });
      assert.equal(asked.length, ranges.length, asked.join());
      ranges.forEach((is, at) => is === undefined || assert.equal(asked[at] !== undefined, is, asked.join()));
    }
  });
  await steps(t, { "416, to each range": 416, "400, to each range": 400 }, async (code) => {
    const refusals = Array<Fault[]>(9).fill([{ kind: "status", code }]);
    for (const [storage, faultsIn] of places) {
      const faults = (context: RequestContext) =>
        faultsIn(...context.range === undefined ? [[dies]] : refusals)(context);
      const asked = await pullsNoise({ storage, faults });
      assert(asked.length <= 4 && asked[1] !== undefined && asked.at(-1) === undefined, asked.join());
    }
  });
});

Deno.test("retries are counted since the last new byte, and in all", async (t) => {
  const cases: Record<string, { faults: Fault[]; retries: number; requests: number | null }> = {
    "no byte at all": { faults: [{ kind: "dieAt", byte: 0 }], retries: 3, requests: 4 },
    "no new byte": { faults: [{ kind: "ignoreRange" }, { kind: "dieAt", byte: 9 }], retries: 3, requests: 4 },
    "some bytes each time": { faults: [{ kind: "dieAt", byte: 20_000 }], retries: 1, requests: null },
    "too few each time": { faults: [{ kind: "dieAt", byte: 2000 }], retries: 1, requests: 21 },
    "too few each time, more retries": { faults: [{ kind: "dieAt", byte: 2000 }], retries: 2, requests: 41 },
  };
  await steps(t, cases, async ({ faults, retries, requests }) => {
    if (requests === null) return void await pullsNoise({ faults }, { retries });
    await using registry = startRegistry({ faults });
    serveLayer(registry, NOISE);
    await assertFails(() => pull(registry, { retries }), "network");
    assert.equal(askedRanges(registry).length, requests);
  });
});

Deno.test("a body that is complete by its length, but too short, is continued", async (t) => {
  for (const chunked of [false, true]) {
    const short = (byte: number): Fault => ({ kind: "short", byte, chunked });
    const suffix = chunked ? "; chunked" : "";
    const cases: Record<string, Fault[][]> = {
      [`at first${suffix}`]: [[short(60_000)]],
      [`in a range${suffix}`]: [[{ kind: "dieAt", byte: 60_000 }], [short(999)], [short(999)]],
      [`and empty${suffix}`]: [[short(0)]],
      // With a Content-Length that is wrong, the answer is not used at all.
      [`each time${suffix}`]: Array(chunked ? 20 : 4).fill([short(30_000)]),
    };
    await steps(t, cases, (faults) => pullsNoise({ faults: blobFaults(...faults) }));
  }
});

Deno.test("a layer of schema 1, whose size is unknown, is resumed", async (t) => {
  const layer = gzip(await makeTar([{ name: "a.whl", data: NOISE }]));
  const image = makeSchema1({ ...SCHEMA1_FIELDS, layers: [BASE, layer] });
  const cut = async function* () {
    yield layer.slice(0, 60_000);
    await Promise.reject(new Error("cut"));
  };
  const onRequest = blobAnswers(() => new Response(ReadableStream.from(cut())), () => undefined);
  const cases: Record<string, { options: RegistryOptions; range: RegExp }> = {
    "by the length of its first answer": { options: {}, range: new RegExp(`^bytes=\\d+-${layer.length - 1}$`) },
    "by an open range if that has none": { options: { onRequest }, range: /^bytes=\d+-$/ },
  };
  await steps(t, cases, async ({ options, range }) => {
    await using registry = serveImage({ ...options, faults: blobFaults([{ kind: "dieAt", byte: 60_000 }]) }, image);
    assertSame((await pull(registry)).tarball, layer);
    const asked = askedRanges(registry);
    assert.equal(asked.length, 2);
    assert.match(asked[1] ?? "", range);
  });
});

Deno.test("the location of a redirected blob is used until its signature expires", async () => {
  for (const uses of [Infinity, 2]) {
    await using registry = startRegistry({ storage: { signed: true, uses }, auth: "bearer" });
    await pullsLarge(registry);
    const redirects = paths(registry, "/blobs/").length;
    const stored = blobRequests(registry);
    const count = stored.filter(({ status }) => status !== 403).length;
    assert(redirects >= count / uses && redirects <= (uses === Infinity ? 1 : count), `${redirects} of ${count}`);
    assert(stored.every(({ headers, status }) => !headers.has("authorization") && [200, 206, 403].includes(status)));
  }
  const faults = faultsAt("storage", [{ kind: "expiredSignature" }]);
  await using registry = startRegistry({ storage: { signed: true }, faults });
  serveLayer(registry, NOISE);
  await assertFails(pull(registry, { retries: 2 }), "auth|network");
  assert(paths(registry, "storage").length <= 4);
});

Deno.test("mirrors are used first, with the registry's name and without its credentials", async (t) => {
  for (const auth of ["none", "bearer"] as const) {
    await t.step(`a mirror with auth ${auth}, behind one that is down and one that has nothing`, async () => {
      await using registry = serveImage({ auth: "basic", users });
      await using empty = startRegistry();
      await using mirror = serveImage({ auth, storage: true });
      const mirrors = [`http://${await closedHost()}`, `${empty.url}/`, mirror.url];
      assertSame((await pull(registry, { mirrors, ...CREDENTIALS })).tarball, LAYER);
      assert.deepEqual(registry.requests, []);
      assert(empty.requests.length > 0);
      for (const { origin, path, search, headers } of [...empty.requests, ...mirror.requests]) {
        const authorization = headers.get("authorization") ?? "";
        assert(auth === "none" ? authorization === "" : !authorization.startsWith("Basic"), authorization);
        if (origin !== "registry" || path === "/v2/") continue;
        assert.match(path, /^\/v2\/ns\/wheels\/(?:manifests\/1\.0|blobs\/sha256:)/);
        assert.equal(new URLSearchParams(search).get("ns"), registry.host);
      }
    });
  }
  await t.step("for the Hub", async () => {
    await using mirror = startRegistry();
    mirror.pushImage("library/python", "3", IMAGE);
    assertSame((await pull("python:3", { mirrors: [mirror.url] })).tarball, LAYER);
    assert(mirror.requests.every(({ search }) => search === "?ns=docker.io"));
  });
});

Deno.test("a mirror gets no retries: after its first failure, the next mirror or the registry continues", async (t) => {
  const middle = LAYER.length >> 1;
  const faults: Record<string, Fault> = {
    "reset": { kind: "reset" },
    "500": { kind: "status", code: 500 },
    "404": { kind: "status", code: 404 },
    "403": { kind: "status", code: 403 },
    "401 without a challenge": { kind: "status", code: 401 },
    "a redirect to nowhere": { kind: "status", code: 307, headers: { location: "" } },
    "503 and Retry-After": { kind: "status", code: 503, headers: { "retry-after": "3600" } },
    "429": { kind: "status", code: 429 },
    "silence from the start": { kind: "stall", byte: 0 },
    "silence in the body": { kind: "stall", byte: middle },
    "death in the body": { kind: "dieAt", byte: middle },
    "a short body": { kind: "short", byte: middle },
    "a short chunked body": { kind: "short", byte: middle, chunked: true },
  };
  await steps(t, faults, async (fault) => {
    for (const part of ["/manifests/", LAYER_PATH]) {
      await using bad = serveImage({ faults: faultsAt(part, [fault]) });
      await using good = serveImage();
      await using registry = startRegistry();
      await pullsLayer(registry, { mirrors: [bad.url, good.url], timeout: 0.3, delay: noRetry });
      const count = paths(bad, part).length;
      // Deno itself repeats a request if a connection that was kept open is closed.
      if (fault.kind === "reset") assert(count <= 2, `${count} requests`);
      else assert.equal(count, fault.kind === "status" && fault.code === 307 ? 11 : 1);
      assert(good.requests.length > 0);
      assert.equal(registry.requests.length, 0);
    }
  });
  await t.step("silence before the answer, and a refused connection", async () => {
    await using bad = serveImage({ onRequest: () => new Promise<undefined>(() => {}) });
    await using registry = serveImage();
    const mirrors = [bad.url, `http://${await closedHost()}`];
    await pullsLayer(registry, { mirrors, timeout: 0.3, delay: noRetry });
    assert.equal(paths(bad, "/manifests/").length, 1);
  });
  await t.step("a token service that is down", async () => {
    const onRequest = ({ url }: Request) =>
      new URL(url).pathname === "/token" ? new Response(null, { status: 503 }) : undefined;
    await using bad = serveImage({ auth: "bearer", onRequest });
    await using registry = serveImage();
    await pullsLayer(registry, { mirrors: [bad.url], delay: noRetry });
    assert.equal(paths(bad, "/token").length, 1);
  });
  await t.step("death of several ranges", async () => {
    const faults = ({ path, count }: RequestContext): Fault[] =>
      path.includes("/blobs/") && count > 2 ? [{ kind: "reset" }] : [];
    await using bad = startRegistry({ faults });
    await using registry = startRegistry();
    serveLarge(bad);
    await pullsLarge(registry, { mirrors: [bad.url] });
    const [first] = limits(askedRanges(registry)[0]);
    assert(first >= 2 * RANGE, `${first}`);
  });
  await t.step("another manifest than its digest names", async () => {
    await using registry = serveImage();
    await using mirror = startRegistry();
    const other = makeImage({ layers: [NOISE] });
    mirror.pushManifest("ns/wheels", IMAGE.digest, other.manifest, other.mediaType);
    await pullsLayer(`${registry.host}/ns/wheels@${IMAGE.digest}`, { mirrors: [mirror.url] });
  });
  await t.step("if all fail, the registry's own failure is reported", async () => {
    await using registry = startRegistry();
    await using mirror = startRegistry({ auth: "basic" });
    const { message } = await assertFails(() => pull(registry, { mirrors: [mirror.url] }), "not-found");
    assert(message.includes(registry.host), message);
  });
});

Deno.test("an HTML page or a wrong length from a mirror never reaches the output", async (t) => {
  const html = { "content-type": "text/html" };
  const answers: Record<string, () => Response> = {
    "a page": () => new Response(PAGE, { headers: html }),
    "a chunked page": () => new Response(ReadableStream.from([toBytes(PAGE)]), { headers: html }),
    "a page of the layer's length": () => new Response(PAGE.padEnd(LAYER.length), { headers: html }),
    "a page as octet-stream": () => new Response(PAGE, { headers: { "content-type": "application/octet-stream" } }),
    "too few bytes": () => new Response(LAYER.slice(0, -1)),
    "too many bytes": () => new Response(concat(LAYER, "x")),
    "no bytes": () => new Response(""),
    "no content": () => new Response(null, { status: 204 }),
  };
  await steps(t, answers, async (answer) => {
    for (const part of [LAYER_PATH, "/manifests/"]) {
      await using mirror = serveImage({ onRequest: answerTo(part, answer) });
      await using registry = serveImage();
      await pullsLayer(registry, { mirrors: [mirror.url] });
      assert.equal(paths(mirror, part).length, 1);
    }
  });
});

Deno.test("a mirror's path that begins with /v2 is the prefix of its requests, and of its scope", async (t) => {
  const table = {
    "/v2/dockerhub": "dockerhub/ns/wheels",
    "/v2/dockerhub/": "dockerhub/ns/wheels",
    "/v2/a/b": "a/b/ns/wheels",
    "/v2": "ns/wheels",
    "/v2/": "ns/wheels",
    "/": "ns/wheels",
  };
  await steps(t, table, async (repository, path) => {
    for (const auth of ["none", "bearer"] as const) {
      await using mirror = startRegistry({ auth });
      mirror.pushImage(repository, "1.0", IMAGE);
      await using registry = startRegistry();
      await pullsLayer(registry, { mirrors: [`${mirror.url}${path}`] });
      assert(paths(mirror, "registry ").every((text) => text.startsWith(`registry /v2/${repository}/`)));
      assert.equal(registry.requests.length, 0);
      const tokens = mirror.requests.filter(({ origin }) => origin === "token");
      const scopes = tokens.flatMap(({ search }) => new URLSearchParams(search).getAll("scope"));
      const hasScope = scopes.join(" ").split(" ").includes(`repository:${repository}:pull`);
      assert.equal(hasScope, auth === "bearer");
    }
  });
  await t.step("another path comes before /v2", async () => {
    const network = fakeNetwork({ "https://mirror.example": answerImage });
    for (const mirror of ["https://mirror.example/v2beta", "https://mirror.example/proxy/v2"]) {
      await pullsLayer(PUBLIC, { protocol: "https", fetch: network.fetch, mirrors: [mirror] });
      assert(network.requests.at(-1)?.url.startsWith(`${mirror}/v2/ns/wheels/blobs/`));
    }
  });
});

Deno.test("the registry continues where a mirror broke off", async () => {
  await using registry = startRegistry();
  await using mirror = startRegistry();
  for (const each of [registry, mirror]) serveLayer(each, NOISE);
  mirror.faults = blobFaults([{ kind: "stall", byte: 60_000 }], [{ kind: "reset" }]);
  assertSame((await pull(registry, { mirrors: [mirror.url], timeout: 0.1 })).tarball, NOISE);
  assert.deepEqual(askedRanges(registry), [`bytes=60000-${NOISE.length - 1}`]);
});

Deno.test("wrong bytes from a mirror are detected, and fetched again from the registry", async () => {
  using scratch = new Scratch();
  const layer = gzip(await makeTar(GOOD));
  for (const byte of [0, 30, layer.length - 1]) {
    for (const target of [{ dest: scratch.at("dest") }, { output: scratch.at("out") }]) {
      await using registry = startRegistry();
      await using mirror = startRegistry();
      for (const each of [registry, mirror]) serveLayer(each, layer);
      mirror.faults = [{ kind: "flipBit", byte }];
      const options: FetchWheelsOptions = { ...target, mirrors: [mirror.url], protocol: "http" };
      await fetchWheels(`${registry.host}/ns/wheels:1.0`, options);
      if (target.output) assertSame(Deno.readFileSync(target.output), layer);
      else assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
      registry.faults = [{ kind: "flipBit", byte }];
      const before = snapshot(scratch.path);
      await assertFails(fetchWheels(`${registry.host}/ns/wheels:1.0`, options), "integrity");
      assert.deepEqual(snapshot(scratch.path), before);
    }
  }
});

Deno.test("after wrong bytes from a mirror, only the mirrors that sent something are left out", async () => {
  const onRequest = answerTo(LAYER_PATH, () => new Response(LAYER.map((byte) => byte ^ 1)));
  await using wrong = serveImage({ onRequest });
  await using right = serveImage();
  await using registry = startRegistry();
  using scratch = new Scratch();
  const { warnings, onProgress } = recordWarnings();
  await pull(registry, { mirrors: [wrong.url, right.url], output: scratch.at("out"), onProgress });
  assert.match(warnings.join(), new RegExp(`^Cannot [^;]*; retrying without mirror ${wrong.url}$`));
  assertSame(Deno.readFileSync(scratch.at("out")), LAYER);
  assert.deepEqual(registry.requests, []);
});

/** A registry with a small layer, a cache for it, and a directory for both DEST and the cache. */
async function serveCached() {
  const scratch = new Scratch();
  const layer = gzip(await makeTar([{ name: "a.whl", data: NOISE }]));
  const registry = startRegistry();
  const reference = serveLayer(registry, layer);
  const entry = `blobs/${sha256(layer).replace(":", "/")}`;
  /** Fetches the layer, checks its file, and returns the warnings. */
  const fetch = async (options: FetchWheelsOptions = {}) => {
    const { warnings, onProgress } = recordWarnings();
    const shared = { dest: scratch.at("dest"), cache: scratch.at("cache"), protocol: "http", onProgress } as const;
    await fetchWheels(reference, { ...shared, delay: () => Promise.resolve(), ...options });
    assertSame(Deno.readFileSync(scratch.at("dest/a.whl")), NOISE);
    Deno.removeSync(scratch.at("dest"), { recursive: true });
    return warnings;
  };
  /** Asserts that the cache contains the layer and nothing else. */
  const assertKept = () => {
    assertSame(Deno.readFileSync(scratch.at(`cache/${entry}`)), layer);
    assert.equal(Object.keys(snapshot(scratch.at("cache"))).length, 3, JSON.stringify(snapshot(scratch.path)));
  };
  const close = async () => {
    await registry[Symbol.asyncDispose]();
    scratch[Symbol.dispose]();
  };
  return { scratch, registry, reference, layer, entry, fetch, assertKept, [Symbol.asyncDispose]: close };
}

Deno.test("a cached layer is not requested again, unless it is wrong", async (t) => {
  await using cached = await serveCached();
  const { scratch, registry, layer, entry, fetch, assertKept } = cached;
  for (const time of ["first", "second"]) {
    await t.step(`the ${time} time`, async () => {
      await fetch();
      assertKept();
      assert.equal(askedRanges(registry).length, 1);
    });
  }
  const flipped = layer.slice();
  flipped[1000] = (flipped[1000] ?? 0) ^ 1;
  const wrong = {
    "with a wrong entry: flipped bit": flipped,
    "with a wrong entry: cut": layer.slice(0, 1000),
    "with a wrong entry: empty": toBytes(""),
    "with a wrong entry: long": concat(layer, "x"),
  };
  await steps(t, wrong, async (bytes) => {
    scratch.at(`cache/${entry}`, bytes);
    const before = askedRanges(registry).length;
    const [warning = ""] = await fetch({ mirrors: [registry.url] });
    assertKept();
    assert.equal(askedRanges(registry).length, before + 1);
    assert.match(warning, bytes.length === layer.length ? /; retrying without the cache$/ : /its size is wrong$/);
  });
  await t.step("with a wrong entry, to a stream, in two runs", async () => {
    scratch.at(`cache/${entry}`, flipped);
    const args = ["--protocol", "http", "--cache", scratch.at("cache"), "-o", "-", cached.reference];
    assert.equal((await run(args)).code, 6);
    assertSame((await run(args)).bytes, layer);
    assertKept();
  });
  await t.step("with a run that ends before it has read all", async () => {
    const source = serveLayer(registry, LARGE_NOISE);
    const options = { cache: scratch.at("cache-large") };
    await pull(source, options);
    const output = new WritableStream({ write: () => Promise.reject(systemError("ENOSPC")) });
    await assertFails(pull(source, { ...options, output }), "io");
    await nextTask(); // lets the generators end
    await pull(source, options);
    assert.equal(paths(registry, sha256(LARGE_NOISE)).length, 1);
  });
  await t.step("by its sha512", async () => {
    const digest = sha512(layer);
    const source = serveLayer(registry, layer, { digest });
    const options = { dest: scratch.at("dest512"), cache: scratch.at("cache512"), protocol: "http" } as const;
    for (const _ of [1, 2]) assert.equal((await fetchWheels(source, options)).layers[0]?.digest, digest);
    assertSame(Deno.readFileSync(scratch.at("dest512/a.whl")), NOISE);
    assertSame(Deno.readFileSync(scratch.at(`cache512/blobs/sha512/${digest.split(":")[1]}`)), layer);
    assert.equal(paths(registry, digest).length, 1);
  });
});

Deno.test("a download continues what a failed one left in the cache", async (t) => {
  await using cached = await serveCached();
  const { scratch, registry, reference, layer, entry, fetch, assertKept } = cached;
  const partial = scratch.at(`cache/${entry}.part`);
  const rest = `bytes=60000-${layer.length - 1}`;
  /** Fetches the layer and removes the cache; returns the first range that was requested. */
  const fetchRest = async () => {
    const before = askedRanges(registry).length;
    registry.faults = [];
    await fetch();
    assertKept();
    Deno.removeSync(scratch.at("cache"), { recursive: true });
    return askedRanges(registry)[before];
  };
  await t.step("after an error", async () => {
    const refused = Array<Fault[]>(9).fill([{ kind: "status", code: 500 }]);
    registry.faults = blobFaults([{ kind: "stall", byte: 60_000 }], ...refused);
    await assertFails(() => fetch({ timeout: 0.1, retries: 1 }), "network");
    assertSame(Deno.readFileSync(partial), layer.subarray(0, 60_000));
    assert.equal(await fetchRest(), rest);
  });
  await t.step("after SIGKILL, which releases its lock", async () => {
    registry.faults = [{ kind: "stall", byte: 60_000 }];
    const place = ["-d", scratch.at("killed"), "--cache", scratch.at("cache")];
    const child = spawnProgram(["--protocol", "http", ...place, reference]);
    await waitFor(() => Object.keys(snapshot(scratch.path)).some((path) => path.endsWith(".part")));
    await waitFor(() => Deno.statSync(partial).size === 60_000);
    child.kill("SIGKILL");
    await child.output();
    assert.equal(await fetchRest(), rest);
  });
  const noise = new Uint8Array(randomBytes(60_000));
  const parts: Record<string, { bytes: Uint8Array; first?: string }> = {
    "a part that is right": { bytes: layer.slice(0, 60_000), first: rest },
    "a part that is whole": { bytes: layer, first: undefined },
    "a part that is empty": { bytes: toBytes("") },
    "a part that is wrong": { bytes: noise },
    "a part that is right, then wrong": { bytes: concat(layer.subarray(0, 60_000), noise) },
    "a part that is too long": { bytes: concat(layer, noise) },
  };
  await steps(t, parts, async ({ bytes, ...expected }) => {
    scratch.at(`cache/${entry}.part`, bytes);
    const first = await fetchRest();
    if ("first" in expected) assert.equal(first, expected.first);
  });
});

Deno.test("several processes can share a cache and a DEST", async () => {
  await using cached = await serveCached();
  const { scratch, registry, reference, fetch, assertKept } = cached;
  registry.faults = [{ kind: "trickle", bytesPerSecond: 1_000_000 }];
  const place = ["-d", scratch.at("shared"), "--cache", scratch.at("cache")];
  const args = ["--protocol", "http", ...place, reference];
  const ours = { dest: scratch.at("shared"), cache: scratch.at("cache"), protocol: "http" } as const;
  const [one, two] = await Promise.all([runProgram(args), runProgram(args), fetchWheels(reference, ours)]);
  assert.deepEqual([one.code, two.code], [0, 0], one.stderr + two.stderr);
  assert.deepEqual(Object.keys(contents(scratch.at("shared"))), ["a.whl"]);
  assertKept();
  const before = askedRanges(registry).length;
  await fetch();
  assert.equal(askedRanges(registry).length, before);
});

Deno.test("a cache that cannot be written causes a warning, and is not used", async (t) => {
  await t.step("because it is a file", async () => {
    await using cached = await serveCached();
    const file = cached.scratch.at("file", "file");
    const warnings = await cached.fetch({ cache: file });
    assert(warnings.some((text) => text.includes(file)), warnings.join());
  });
  await t.step("because another process fetches the same blob", async () => {
    await using cached = await serveCached();
    const part = cached.scratch.at(`cache/${cached.entry}.part`, "other");
    using other = Deno.openSync(part, { read: true, write: true });
    other.lockSync(true);
    await cached.fetch();
    assert.equal(Deno.readTextFileSync(part), "other");
  });
  await t.step("because the file of an unfinished blob is a pipe", async () => {
    await using cached = await serveCached();
    const part = cached.scratch.at(`cache/${cached.entry}.part`, "");
    Deno.removeSync(part);
    assert(new Deno.Command("mkfifo", { args: [part] }).outputSync().success);
    await cached.fetch();
    assert(Deno.statSync(part).isFifo);
  });
  await t.step("because the file of an unfinished blob is a symbolic link", async () => {
    await using cached = await serveCached();
    const target = cached.scratch.at("target", "target");
    const part = cached.scratch.at(`cache/${cached.entry}.part`, "");
    Deno.removeSync(part);
    Deno.symlinkSync(target, part);
    await cached.fetch();
    assert.equal(Deno.readTextFileSync(target), "target");
  });
  for (const [option, words] of [["size=100k", /no space/], ["ro", /read-only/]] as const) {
    const name = `because of ${option}${canMount ? "" : " (needs root and mount)"}`;
    const fn = async () => {
      await using cached = await serveCached();
      const disk = cached.scratch.at("cache");
      Deno.mkdirSync(disk);
      assert(new Deno.Command("mount", { args: ["-t", "tmpfs", "-o", option, "none", disk] }).outputSync().success);
      try {
        const warnings = await cached.fetch();
        assert(warnings.some((text) => words.test(text)), warnings.join());
        assert(Object.values(snapshot(disk)).every((entry) => entry.startsWith("directory")));
      } finally {
        new Deno.Command("umount", { args: [disk] }).outputSync();
      }
    };
    await t.step({ name, ignore: !canMount, fn });
  }
});

Deno.test("a URL's password and query are sent to its own server only, and never printed", async (t) => {
  const seen: { port: number; authorization: string | null }[] = [];
  const layer = gzip(await makeTar(GOOD));
  const see = ({ url, headers }: Request) => {
    seen.push({ port: Number(new URL(url).port), authorization: headers.get("authorization") });
    return new URL(url);
  };
  await using store = serve((request) => new Response(see(request).search === "?sig=S3CRET" ? layer : null));
  const answers: Record<string, () => Response> = {
    "/moved.tar.gz": () => redirect(`http://127.0.0.1:${store.addr.port}/blob?sig=S3CRET`, 302),
    "/near/moved": () => redirect("../layer.tar.gz"),
    "/layer.tar.gz": () => new Response(layer),
    "/empty.tar": () => new Response(tarOf()),
    "/failing": () => new Response("gone", { status: 500 }),
  };
  await using site = serve((request) => answers[see(request).pathname]?.() ?? new Response("gone", { status: 404 }));
  const at = (path: string) => `http://user:pa%20ss@127.0.0.1:${site.addr.port}${path}`;

  for (const path of ["/layer.tar.gz", "/layer.tar.gz?token=S3CRET", "/near/moved", "/moved.tar.gz"]) {
    await t.step(path, async () => {
      using scratch = new Scratch();
      seen.length = 0;
      const wheels = scratch.at("loci/wheels", "");
      const args = ["-v", "--json", "--wheels-file", wheels, "-d", scratch.at("dest"), at(path)];
      const { code, stdout, stderr } = await run(args);
      assert.equal(code, 0, stderr);
      assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
      assert.doesNotMatch(stdout + stderr, /S3CRET|pa%20ss|pa ss/);
      assert.equal(Deno.readTextFileSync(wheels), `${at(path).replace(/user.*@/, "")}\n`);
      for (const { port, authorization } of seen) {
        assert.equal(authorization, port === site.addr.port ? `Basic ${btoa("user:pa ss")}` : null);
      }
      assert.equal(seen.length, path.includes("moved") ? 2 : 1);
    });
  }
  const failing = { "/gone?sig=S3CRET": 3, "/empty.tar?sig=S3CRET": 3, "/failing?sig=S3CRET": 5 };
  await steps(t, failing, (code, path) => failsWithoutSecret(at(path), code));
  await t.step("the result names no image", async () => {
    using scratch = new Scratch();
    const result = await fetchWheels(at("/layer.tar.gz"), { dest: scratch.at("d") });
    const { image, manifest, layers, platform } = result;
    assert.deepEqual([image, manifest, layers, platform], [null, null, [], null]);
  });
});

/** Asserts that a URL is refused with this exit code, that its secrets are not printed, and that nothing is written. */
async function failsWithoutSecret(url: string, expected: number): Promise<void> {
  using scratch = new Scratch();
  const { code, stderr } = await run(["-v", "--retries", "0", "-d", scratch.at("dest"), url]);
  assert.equal(code, expected, stderr);
  assert.doesNotMatch(stderr, /S3CRET|pa%20ss|pa ss/);
  assert.deepEqual(snapshot(scratch.path), {});
}

Deno.test("a URL is resumed only with a strong validator that still holds", async (t) => {
  const size = NOISE.length;
  const rest = (first: number, etag?: string) =>
    part(first, size, { ...contentRange(first, size - 1), ...etag && { etag } });
  const table: Record<string, { etag?: string; second: (first: number) => Response; words?: RegExp }> = {
    "a range": { etag: '"a"', second: (first) => rest(first, '"a"') },
    "a range without a validator": { etag: '"a"', second: (first) => rest(first) },
    "everything, unchanged": { etag: '"a"', second: () => part(0, size, { etag: '"a"' }) },
    "everything, changed": { etag: '"a"', second: () => part(0, size, { etag: '"b"' }), words: /changed/ },
    "everything, without a validator": { etag: '"a"', second: () => part(0, size), words: /changed/ },
    "a range of something else": { etag: '"a"', second: (first) => rest(first, '"b"'), words: /changed/ },
    "a weak validator": { etag: 'W/"a"', second: (first) => rest(first), words: /connection lost/ },
    "no validator": { second: (first) => rest(first), words: /connection lost/ },
  };
  await steps(t, table, async ({ etag, second, words }) => {
    const asked: (string | null)[] = [];
    await using server = serve(({ headers }) => {
      asked.push(headers.get("if-range"));
      if (asked.length > 1) return second(limits(headers.get("range") ?? "")[0]);
      return part(0, 60_000, { "content-length": `${size}`, ...etag && { etag } });
    });
    const source = `http://127.0.0.1:${server.addr.port}/wheels.tar`;
    if (words !== undefined) return void await assertFails(() => pull(source), "network", words);
    assertSame((await pull(source)).tarball, NOISE);
    assert.deepEqual(asked, [null, etag]);
  });
  await t.step("a range without a validator that breaks off, and another", async () => {
    const asked: (string | null)[] = [];
    await using server = serve(({ headers }) => {
      asked.push(headers.get("if-range"));
      const [first] = asked.length === 1 ? [0] : limits(headers.get("range") ?? "");
      if (asked.length === 3) return rest(first);
      const range = asked.length === 1 ? { etag: '"a"' } : contentRange(first, size - 1);
      return part(first, first + 60_000, { "content-length": `${size - first}`, ...range });
    });
    const { tarball } = await pull(`http://127.0.0.1:${server.addr.port}/wheels.tar`);
    assertSame(tarball, NOISE);
    assert.deepEqual(asked, [null, '"a"', '"a"']);
  });
});

Deno.test("an invalid URL is a usage error that prints no secret", async (t) => {
  const urls = ["http://user:S3CRET@ho st/x?S3CRET", "https://user:S3CRET@[::1/x", "http://us%er:S3CRET@127.0.0.1/x"];
  urls.push("https://user:pa'S3CRET@h:99999/x", "https://user:p@S3CRET@h:99999/x", "https://user:p/S3CRET@h/x");
  urls.push("docker://user:S3CRET@registry.example/x", "user:S3CRET@registry.example/x");
  for (const url of urls) await t.step(url, () => failsWithoutSecret(url, 2));
});

Deno.test("a path that begins with / or ./ is a tarball", async () => {
  using scratch = new Scratch();
  const path = scratch.at("layer.tar.gz", gzip(await makeTar(GOOD)));
  const { files } = await fetchWheels(path, { dest: scratch.at("dest") });
  assert.equal(files.length, 2);
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
  const { code, stderr } = await runProgram(["-q", "-d", "relative", "./layer.tar.gz"], { cwd: scratch.path });
  assert.deepEqual([code, stderr], [0, ""]);
  assert.deepEqual(contents(scratch.at("relative")), GOOD_CONTENTS);
});

Deno.test("a missing file is not found, and a directory is an io error", async () => {
  using scratch = new Scratch();
  await assertRefused(scratch.at("none.tar"), "not-found");
  await assertRefused(scratch.path, "io");
});

Deno.test("an OCI layout, as a directory or an archive, is resolved and verified as from a registry", async (t) => {
  using scratch = new Scratch();
  const [amd64, arm64] = [IMAGE, makeImage({ layers: [BASE, gzip(await makeTar(GOOD))], architecture: "arm64" })];
  const images = [amd64, arm64];
  const index = makeIndex(images.map(({ descriptor }) => descriptor));
  const tagged = { single: amd64, multi: index };
  const layout = writeLayout(scratch, images, tagged);
  const archive = `oci-archive:${scratch.at("layout.tar", await makeTar(layoutMembers(images, tagged)))}`;
  for (const source of [layout, archive]) {
    await t.step(source.split(":")[0] ?? "", async () => {
      for (const [tag, architecture] of [["single", "amd64"], ["multi", "amd64"], ["multi", "arm64"]]) {
        const dest = scratch.at(`${source.slice(0, 5)}/${tag}/${architecture}`);
        const result = await fetchWheels(`${source}:${tag}`, { dest, platform: `linux/${architecture}` });
        assert.deepEqual(
          contents(dest),
          architecture === "arm64" ? GOOD_CONTENTS : { "a-1-py3-none-any.whl": "wheel" },
        );
        assert.deepEqual([result.layers[0]?.index, result.layers[0]?.count], [2, 2]);
      }
      await assertRefused(`${source}:none`, "not-found");
      const { resolved } = await fetchWheels(source, { dryRun: true }); // `single` is part of `multi`
      assert.equal(resolved?.digest, index.digest);
      await assertRefused(`${source}:multi`, `not-found: in "${source}:multi"`, { platform: "linux/s390x" });
    });
  }
  await t.step("a blob that is not what its digest says", async () => {
    const digest = [...amd64.blobs.keys()].at(-1)?.split(":")[1];
    const blob = scratch.at(`layout/blobs/sha256/${digest}`);
    Deno.writeFileSync(blob, gzip(await makeTar(GOOD)));
    await assertRefused(`${layout}:single`, "integrity");
    scratch.at(`layout/blobs/sha256/${index.digest.slice(7)}`, amd64.manifest);
    await assertRefused(`${layout}:multi`, "integrity: but index.json says sha256:");
  });
  using other = new Scratch();
  const two = writeLayout(other, images, { one: amd64, two: arm64 });
  await assertFails(fetchWheels(two), "not-found", /one, two$/);
  await assertRefused(`oci:${scratch.at("nowhere")}`, "not-found");
  await assertRefused(`oci-archive:${scratch.at("layout")}`, "not-found");
});

Deno.test("entries of a layout that cannot be read do not hide the others", async (t) => {
  const large = new Uint8Array((4 << 20) + 1);
  const beside: Record<string, { digest: string; mediaType?: string }> = {
    "a digest of an unknown algorithm": { digest: "blake3:abc" },
    "a manifest that is missing": { digest: `sha256:${HEX}`, mediaType: MEDIA.ociManifest },
    "a blob that is too large for a manifest": { digest: sha256(large), mediaType: MEDIA.ociManifest },
  };
  const named = { digest: sha512(IMAGE.manifest), mediaType: IMAGE.mediaType, size: IMAGE.manifest.length };
  const bundle = makeSignature({ subject: named, key: keyOf("P-256"), format: "bundle" });
  for (const [name, entry] of Object.entries(beside)) {
    for (const tag of ["", ":1"]) {
      await t.step(`${name}, the image ${tag === "" ? "without" : "with"} a tag in the source`, async () => {
        using scratch = new Scratch();
        const source = writeLayout(scratch, [IMAGE, bundle], {});
        for (const blob of [large, IMAGE.manifest]) scratch.at(`layout/blobs/sha512/${sha512(blob).slice(7)}`, blob);
        scratch.at(`layout/blobs/sha256/${sha256(large).slice(7)}`, large);
        const tagged = { ...named, annotations: { "org.opencontainers.image.ref.name": "1" } };
        scratch.at("layout/index.json", JSON.stringify({ manifests: [entry, tagged, bundle.descriptor] }));
        await assertSigned(`${source}${tag}`, { format: "bundle", digest: named.digest });
      });
    }
  }
  await t.step("a layout without entries, as umoci writes it, is not damaged", async () => {
    using scratch = new Scratch();
    const source = writeLayout(scratch, [], {});
    scratch.at("layout/index.json", '{"schemaVersion":2,"manifests":null}');
    await assertRefused(source, "not-found: 0 images");
  });
});

Deno.test("an abort ends the scan of an image archive", async () => {
  using scratch = new Scratch();
  const zeros = Array<Uint8Array>(128).fill(gzip(new Uint8Array(64 << 20)));
  const archive = concat(gzip(rawHeader({ name: "zeros", size: base256(8 * 2 ** 30, 12) })), ...zeros);
  const source = `oci-archive:${scratch.at("archive.tar.gz", archive)}`;
  const started = performance.now();
  await assert.rejects(fetchWheels(source, { dest: scratch.at("dest"), signal: AbortSignal.timeout(100) }), /timeout/);
  assert(performance.now() - started < 2000, `${performance.now() - started} ms`);
  assert.deepEqual(Object.keys(contents(scratch.path)), ["archive.tar.gz"]);
});

Deno.test("a docker save archive is verified by the digests of its configuration", async (t) => {
  using scratch = new Scratch();
  const [base, top] = [await makeTar([{ name: "base.txt", data: "base" }]), await makeTar(GOOD)];
  const rootfs = { type: "layers", diff_ids: [sha256(base), sha256(top)] };
  const config = JSON.stringify({ os: "linux", architecture: "arm64", rootfs });
  const name = `${sha256(toBytes(config)).slice(7)}.json`;
  const archive = (changes: Partial<Record<"top" | "config", string | Uint8Array>> = {}, images = 1) => {
    const image = { Config: name, RepoTags: ["wheels:1"], Layers: ["a/layer.tar", "b/layer.tar"] };
    return makeTar([
      { name: "a/layer.tar", data: base },
      { name: "b/layer.tar", type: "symlink", linkname: "../c/layer.tar" },
      { name: "c/layer.tar", data: changes.top ?? top },
      { name, data: changes.config ?? config },
      { name: "manifest.json", data: JSON.stringify(Array(images).fill(image)) },
    ]);
  };
  const options = { platform: "linux/arm64", dest: scratch.at("dest") };
  const source = `docker-archive:${scratch.at("good.tar", await archive())}`;
  await t.step("the final layer, of an archive as it is or compressed", async () => {
    const { platform, layers: [layer] } = await fetchWheels(source, options);
    assert.deepEqual([platform, layer?.digest, contents(options.dest)], ["linux/arm64", sha256(top), GOOD_CONTENTS]);
    const compressed = scratch.at("good.tar.gz", gzip(await archive()));
    await fetchWheels(`docker-archive:${compressed}`, { ...options, layers: ["1"], dest: scratch.at("base") });
    assert.deepEqual(contents(scratch.at("base")), { "base.txt": "base" });
  });
  await t.step("compressed layers, as crane, kaniko and containerd write them", async () => {
    for (const [name, compress] of Object.entries({ gzip, zstd })) {
      const compressed = `docker-archive:${scratch.at(`${name}.tar`, await archive({ top: compress(top) }))}`;
      const { layers: [layer] } = await fetchWheels(compressed, { ...options, dest: scratch.at(name) });
      assert.deepEqual([layer?.digest, contents(scratch.at(name))], [sha256(top), GOOD_CONTENTS]);
    }
  });
  const confused = config.replace("arm64", "amd64");
  const table: Record<string, [archive: Uint8Array, kind: string, platform?: string]> = {
    "another layer than its configuration says": [await archive({ top: base }), "integrity"],
    "another configuration than its name says": [await archive({ config: confused }), "integrity"],
    "two images": [await archive({}, 2), "not-found"],
    "another platform": [await archive(), "not-found", "linux/amd64"],
    "no manifest.json": [await makeTar(GOOD), "not-found"],
    "a truncated archive": [(await archive()).subarray(0, 2048), "integrity"],
  };
  await steps(t, table, ([bytes, kind, platform = "linux/arm64"]) => {
    return assertRefused(`docker-archive:${scratch.at("bad.tar", bytes)}`, kind, { platform });
  });
});

Deno.test({
  name: "downloads with random faults succeed, or fail as they should and leave nothing",
  // Deno leaks the body of an answer that arrives in the moment in which its fetch is aborted.
  sanitizeResources: false,
  async fn() {
    const seed = Number(Deno.env.get("FETCH_WHEELS_SEED") ?? randomBytes(4).readUInt32LE());
    console.log(`FETCH_WHEELS_SEED=${seed} repeats the faults`);
    const failures = await runPlans({ seed, runs: Number(Deno.env.get("FETCH_WHEELS_RUNS") ?? 300) });
    assert.equal(failures.join("\n"), "", `with FETCH_WHEELS_SEED=${seed}`);
  },
});

Deno.test("a layer is decompressed by what its bytes say, whatever its media type claims", async (t) => {
  const tar = await makeTar(GOOD);
  const layers = {
    "gzip": gzip(tar),
    "gzip of several members": gzipMembers(tar.subarray(0, 700), tar.subarray(700, 701), tar.subarray(701)),
    "gzip and zeros behind it": concat(gzip(tar), new Uint8Array(2000)),
    "zstd": zstd(tar),
    "zstd of several frames": concat(zstd(tar.subarray(0, 700)), zstd(tar.subarray(700))),
    "zstd and a frame to be skipped, as in zstd:chunked": concat(zstd(tar), "\x50\x2a\x4d\x18\x04\0\0\0skip"),
    "plain": tar,
  };
  await using registry = startRegistry();
  for (const [name, layer] of Object.entries(layers)) {
    for (const mediaType of [MEDIA.ociLayer, MEDIA.ociLayerGzip, MEDIA.ociLayerZstd, MEDIA.dockerLayer]) {
      await t.step(`${name} as ${mediaType}`, async () => {
        using scratch = new Scratch();
        const dest = scratch.at("dest");
        const result = await fetchWheels(serveLayer(registry, layer, { mediaType }), { dest });
        assert.deepEqual(contents(dest), GOOD_CONTENTS);
        const expected = { digest: sha256(layer), size: layer.length, mediaType, index: 1, count: 1 };
        assert.deepEqual(result.layers, [expected]);
        assert.equal(result.bytes, layer.length);
        assert.deepEqual(result.files.toSorted((a, b) => a.path < b.path ? -1 : 1), [
          { path: "a.whl", size: 5, digest: null },
          { path: "sub/b.txt", size: 4, digest: null },
        ]);
      });
    }
  }
});

Deno.test("a layer that is not what its descriptor says is refused, and DEST stays as it was", async (t) => {
  const tar = await makeTar(GOOD);
  const layer = gzip(tar);
  const other = toBytes("other");
  const flipped = layer.slice();
  flipped[30] = (flipped[30] ?? 0) ^ 0xff;
  const longer = concat(layer, new Uint8Array(9));
  const cases: Record<string, [Uint8Array<ArrayBuffer>, Parameters<typeof serveLayer>[2]?]> = {
    "wrong sha256": [layer, { digest: sha256(other) }],
    "wrong sha512": [layer, { digest: sha512(other) }],
    "wrong digest of a plain archive": [tar, { digest: sha256(other) }],
    "wrong digest of a zstd archive": [zstd(tar), { digest: sha256(other) }],
    "a byte less than said": [layer, { size: layer.length + 1 }],
    "a byte more than said": [layer, { size: layer.length - 1 }],
    "bytes behind the end that the digest does not cover": [longer, { digest: sha256(layer) }],
    "gzip cut in its header": [layer.slice(0, 5)],
    "gzip cut in its data": [layer.slice(0, layer.length >> 1)],
    "gzip cut in its trailer": [layer.slice(0, -3)],
    "gzip without its second member": [gzip(tar.subarray(0, 700))],
    "gzip cut in its second member": [concat(gzip(tar.subarray(0, 700)), gzip(tar.subarray(700)).subarray(0, -20))],
    "gzip with a flipped bit": [flipped],
    "gzip with a wrong checksum": [concat(layer.subarray(0, -8), new Uint8Array(4), layer.subarray(-4))],
    "gzip of nothing": [gzip(new Uint8Array())],
    "zstd cut": [zstd(tar).slice(0, -3)],
    "plain archive cut": [tar.slice(0, 600)],
    "empty": [new Uint8Array()],
  };
  await using registry = startRegistry();
  await steps(t, cases, ([bytes, said]) => assertRefused(serveLayer(registry, bytes, said), "integrity"));
});

Deno.test({
  name: "a layer of 320 MiB of noise or zeros needs little memory, on one connection or several",
  ignore: Deno.build.os !== "linux",
  async fn(t) {
    const stored = gzipStored(new Uint8Array(randomBytes(1 << 20)));
    const cases: [name: string, block: Uint8Array, count: number, connections: number, limitMiB: number][] = [
      ["noise, one connection", stored, 320, 1, 200],
      ["noise, four connections", stored, 320, 4, 200],
      ["zeros", gzip(new Uint8Array(160 << 20)), 2, 1, 110],
    ];
    for (const [name, block, count, connections, limitMiB] of cases) {
      await t.step(name, async () => {
        const size = 320 << 20;
        const header = gzip(rawHeader({ name: "big.whl", size }));
        // One member of gzip, which is sent again and again.
        const blob = streamedBlob([header, ...Array<Uint8Array>(count).fill(block), gzip(new Uint8Array(1024))]);
        await using registry = startRegistry({ onRequest: answerTo(blob.digest, blob.answer) });
        const reference = serveLayer(registry, toBytes(""), blob);
        using scratch = new Scratch();
        const workerUrl = new URL("fetch_wheels.ts", import.meta.url).href; // as the command line has it
        const options = JSON.stringify({ dest: scratch.at("dest"), connections, workerUrl });
        const clock = "now: () => performance.now() * 50"; // as if the link were slow
        const script = `import { fetchWheels } from ${JSON.stringify(workerUrl)};
          const { files } = await fetchWheels(${JSON.stringify(reference)}, { ...${options}, ${clock} });
          const [, peak] = /VmHWM:\\s*(\\d+) kB/.exec(Deno.readTextFileSync("/proc/self/status"));
          console.log(JSON.stringify({ files, peak: Number(peak) }));`;
        const { code, stdout, stderr } = await runDeno(["eval", script]);
        assert.equal(code, 0, stderr);
        const { files, peak } = JSON.parse(stdout);
        assert.deepEqual(files, [{ path: "big.whl", size, digest: null }]);
        assert.equal(askedRanges(registry).length > 1, connections > 1);
        assert(peak > 10 * 1024 && peak < limitMiB * 1024, `a peak of ${peak} KiB`);
      });
    }
  },
});

// ---------------------------------------------------------------------------------------------------------------------
// 6 Manifest
// ---------------------------------------------------------------------------------------------------------------------

const SBOM = "application/spdx+json";

/** Returns an entry of an index from its platform and its artifact type; `~` before them marks an attestation. */
function entryOf(text: string): Descriptor {
  const [platform = "", artifactType] = text.replace("~", "").split(" ");
  const [os = "", architecture = "", variant] = platform.split("/");
  return {
    digest: `sha256:${HEX}`,
    ...platform !== "" && { platform: { os, architecture, ...variant && { variant } } },
    ...artifactType !== undefined && { artifactType },
    ...text.startsWith("~") && { annotations: { "vnd.docker.reference.type": "attestation-manifest" } },
  };
}

Deno.test("selectManifest() follows containerd's rule for levels, and skips what is not an image", () => {
  // deno-fmt-ignore
  const table: [platform: string, entries: string[], expected: number | undefined][] = [
    ["linux/amd64", ["linux/arm64", "linux/amd64"], 1],
    ["linux/amd64", ["windows/amd64", "linux/amd64"], 1],
    ["linux/amd64", ["linux/386", "windows/amd64"], undefined],
    ["linux/amd64", ["linux/constructor", "linux/amd64"], 1],
    ["linux/amd64", [], undefined],
    ["linux/amd64", [""], 0],
    ["linux/amd64", ["", ""], undefined],
    ["linux/amd64", ["", "linux/arm64"], undefined],
    ["linux/amd64", ["unknown/unknown", ""], 1],
    ["linux/amd64", ["~unknown/unknown", ""], 1],
    ["linux/amd64", ["~unknown/unknown"], undefined],
    ["linux/amd64", ["~linux/amd64", "linux/amd64"], 1],
    ["linux/amd64", ["LINUX/X86_64"], 0],
    ["linux/amd64", ["linux/arm64", "Linux/AMD64"], 1],
    ["linux/arm64", ["linux/AArch64"], 0],
    ["linux/arm/v7", ["linux/ARM/V7"], 0],
    ["linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1],
    ["linux/amd64", ["linux/amd64/v3", "linux/amd64/v2"], undefined],
    ["linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], 1],
    ["linux/amd64", ["linux/amd64/v1", "linux/amd64"], 0],
    ["linux/amd64/v2", ["linux/amd64", "linux/amd64/v2"], 1],
    ["linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], undefined],
    ["linux/arm64", ["linux/arm64/v8", "linux/arm64"], 0],
    ["linux/arm64/v8", ["linux/arm64", "linux/arm64/v8"], 0],
    ["linux/arm64", ["linux/arm64/v9"], undefined],
    ["linux/arm64", ["linux/arm/v7", "linux/arm"], undefined],
    ["linux/arm/v7", ["linux/arm/v6", "linux/arm/v7"], 1],
    ["linux/arm/v7", ["linux/arm"], 0],
    ["linux/arm/v6", ["linux/arm", "linux/arm/v7"], undefined],
    ["linux/armhf", ["linux/arm/v6", "linux/arm/v7"], 1],
    ["linux/arm", ["linux/arm/v8", "linux/arm/v6"], 1],
    ["linux/arm", ["linux/arm/v5", "linux/arm/v6"], 1],
    ["linux/amd64", ["", ` ${SBOM}`], 0],
    ["linux/amd64", [` ${SBOM}`, ""], 1],
    ["linux/amd64", [`linux/amd64 ${SBOM}`, "linux/amd64"], 1],
    ["linux/amd64", [`linux/amd64 ${SBOM}`], undefined],
    ["linux/amd64", [`linux/amd64 ${MEDIA.ociConfig}`], 0],
    ["linux/amd64", ["linux/amd64 "], 0],
  ];
  for (const [platform, texts, expected] of table) {
    const entries = texts.map(entryOf);
    const chosen = selectManifest(entries, parsePlatform(platform));
    const at = chosen === undefined ? undefined : entries.indexOf(chosen);
    assert.equal(at, expected, `${platform} from ${JSON.stringify(texts)}`);
  }
});

/** Runs the command line, asserts the exit code, and returns the outcome. */
async function expectCode(expected: number, args: string[], given?: Surroundings, start = run): Promise<Outcome> {
  const outcome = await start(args, given);
  assert.equal(outcome.code, expected, outcome.stderr);
  return outcome;
}

/** Runs a step for each row of a table. Its name is the row's first text, or else the row itself. */
async function eachRow<T>(t: Deno.TestContext, table: readonly T[], check: (row: T) => unknown): Promise<void> {
  for (const row of table) {
    const head: unknown = Array.isArray(row) ? row[0] : row;
    const name = typeof head === "string" ? head : Deno.inspect(row, { depth: 1, breakLength: Infinity });
    await t.step(name, async () => void await check(row));
  }
}

const ARM = makeImage({ layers: [BASE, gzip(toBytes("not for amd64"))], architecture: "arm64" });
const DOCKER = makeImage({ layers: [BASE, LAYER], format: "docker" });
const SCHEMA1_FIELDS = { layers: [BASE, LAYER], name: "ns/wheels", tag: "1.0", architecture: "amd64" };
const SCHEMA1 = makeSchema1(SCHEMA1_FIELDS);
const SIGNED = makeSchema1({ ...SCHEMA1_FIELDS, signed: true });

/** An index whose second image is IMAGE. */
const INDEX = makeIndex([ARM.descriptor, IMAGE.descriptor]);

// deno-lint-ignore no-explicit-any -- tests read and change all fields
function parseManifest({ manifest }: MadeManifest): any {
  return JSON.parse(new TextDecoder().decode(manifest));
}

/** Pushes an image's or an index's document under a tag or a digest. */
function pushAs(registry: TestRegistry, reference: string, { manifest, mediaType }: MadeManifest): void {
  registry.pushManifest("ns/wheels", reference, manifest, mediaType);
}

Deno.test("manifests of each kind lead to the final layer, by tag, by digest and by both", async (t) => {
  const table: [name: string, image: MadeImage, index?: "oci" | "docker"][] = [
    ["OCI manifest", IMAGE],
    ["Docker schema 2", DOCKER],
    ["Docker schema 1", SCHEMA1],
    ["Docker schema 1, signed", SIGNED],
    ["OCI index", IMAGE, "oci"],
    ["Docker list", DOCKER, "docker"],
    ["Docker list of schema 1, signed", SIGNED, "docker"],
  ];
  for (const [name, image, format] of table) {
    await using registry = serveImage({}, image);
    const top = format === undefined ? image : makeIndex([ARM.descriptor, image.descriptor], format);
    pushAs(registry, "1.0", top);
    for (const suffix of [":1.0", `@${top.digest}`, `:absent@${top.digest}`]) {
      await t.step(`${name}, ${suffix.slice(0, 12)}`, async () => {
        const result = await pull(`${registry.host}/ns/wheels${suffix}`);
        const { digest, mediaType } = image;
        assert.deepEqual(result.tarball, LAYER);
        assert.deepEqual(result.resolved, { digest: top.digest, mediaType: top.mediaType });
        assert.deepEqual(result.manifest, { digest, mediaType, artifactType: null });
        const layers = result.layers.map(({ digest, size, index, count }) => [digest, size, index, count]);
        assert.deepEqual(layers, [[sha256(LAYER), LAYER.length, 2, 2]]);
        assert.equal(result.platform, "linux/amd64");
        assert.equal(result.image?.digest, suffix.includes("@") ? top.digest : null);
      });
    }
  }
  await t.step("sha512", async () => {
    await using registry = serveImage();
    const digest = sha512(IMAGE.manifest);
    pushAs(registry, digest, IMAGE);
    const { tarball, manifest } = await pull(`${registry.host}/ns/wheels@${digest}`);
    assert.deepEqual([tarball, manifest?.digest], [LAYER, digest]);
  });
});

Deno.test("one request accepts each kind of manifest", async () => {
  await using registry = serveImage();
  await pull(registry);
  const accept = registry.requests[0]?.headers.get("accept")?.split(",").map((type) => type.trim().split(";")[0]);
  const { ociIndex, ociManifest, dockerList, dockerManifest, dockerSchema1, dockerSchema1Signed } = MEDIA;
  const kinds = [ociIndex, ociManifest, dockerList, dockerManifest, dockerSchema1, dockerSchema1Signed];
  assert.deepEqual(accept?.sort(), [...kinds].sort());
});

Deno.test("a manifest is what its body says, else the header, else its fields", async (t) => {
  const { layers } = parseManifest(IMAGE);
  const wrong = parseManifest(ARM).layers;
  const bodies: [body: Record<string, unknown>, header: string][] = [
    [{ mediaType: MEDIA.ociIndex, manifests: [IMAGE.descriptor], layers: wrong }, MEDIA.ociManifest],
    [{ mediaType: MEDIA.ociManifest, manifests: [ARM.descriptor], layers }, MEDIA.ociIndex],
    [{ manifests: [IMAGE.descriptor], layers: wrong }, MEDIA.dockerList],
    [{ manifests: [ARM.descriptor], layers }, `${MEDIA.dockerManifest.toUpperCase()}; charset=utf-8`],
    [{ mediaType: "application/x-odd", manifests: [ARM.descriptor], layers }, MEDIA.dockerManifest],
  ];
  const table = bodies.map(([body, header]) => [JSON.stringify({ schemaVersion: 2, ...body }), header] as const);
  for (const { manifest, mediaType } of [IMAGE, DOCKER, SCHEMA1, SIGNED, INDEX]) {
    const bare = new TextDecoder().decode(manifest).replace(`"mediaType":"${mediaType}",`, "");
    for (const type of ["", "text/plain", "application/json; charset=utf-8", mediaType]) table.push([bare, type]);
  }
  for (const [body, header] of table) {
    await t.step(`as "${header}": ${body.slice(0, 80)}`, async () => {
      await using registry = serveImage();
      registry.pushManifest("ns/wheels", "1.0", toBytes(body), header);
      await pullsLayer(registry);
    });
  }
});

Deno.test("indexes nest at most five levels deep, and are searched in order if they name no platform", async () => {
  await using registry = serveImage();
  let { descriptor } = IMAGE;
  for (let depth = 1; depth <= 6; depth++) {
    const index = makeIndex(depth % 2 === 0 ? [ARM.descriptor, descriptor] : [descriptor]);
    pushAs(registry, `depth${depth}`, index);
    ({ descriptor } = index);
    if (depth % 2 !== 0) descriptor = { ...descriptor, platform: { os: "linux", architecture: "amd64" } };
  }
  await pullsLayer(`${registry.host}/ns/wheels:depth5`);
  await assertFails(pull(`${registry.host}/ns/wheels:depth6`), "integrity", /deep/);

  const indexes = [makeIndex([ARM.descriptor]), makeIndex([IMAGE.descriptor])];
  for (const index of indexes) pushAs(registry, index.digest, index);
  pushAs(registry, "1.0", makeIndex(indexes.map(({ descriptor }) => descriptor)));
  await pullsLayer(registry);
  await assertFails(pull(registry, { platform: "linux/s390x" }), "not-found", /linux\/arm64.*linux\/amd64/);
});

Deno.test("entries that cannot be chosen are skipped, and those that could be are listed", async (t) => {
  const { platform, ...bare } = IMAGE.descriptor;
  const on = (architecture: string, variant?: string) => ({ os: "linux", architecture, ...variant && { variant } });
  const other = { mediaType: MEDIA.ociManifest, digest: `sha256:${HEX}`, size: 5 };
  const sbom = { ...other, artifactType: SBOM };
  const blake3 = { ...other, digest: `blake3:${HEX}` };
  const attestation = { ...bare, ...entryOf("~unknown/unknown") };
  const table: Record<string, { entries: unknown[]; missing?: RegExp }> = {
    "an image without a platform beside an artifact": { entries: [bare, sbom] },
    "an SBOM for the same platform first": { entries: [{ ...sbom, platform }, IMAGE.descriptor] },
    "blake3 for the same platform": { entries: [{ ...blake3, platform }, IMAGE.descriptor] },
    "blake3 without a platform": { entries: [blake3, bare] },
    "upper case": { entries: [{ ...bare, platform: { os: "Linux", architecture: "AMD64" } }] },
    "blake3 alone": { entries: [{ ...blake3, platform }], missing: /empty/ },
    "nothing": { entries: [], missing: /empty/ },
    "a higher level alone": { entries: [{ ...bare, platform: on("amd64", "v3") }], missing: /linux\/amd64\/v3/ },
    "other platforms": {
      entries: [ARM.descriptor, { ...bare, platform: on("arm", "v7") }, attestation],
      missing: /linux\/amd64.*linux\/arm64, linux\/arm\/v7$/,
    },
  };
  await steps(t, table, async ({ entries, missing }) => {
    await using registry = serveImage();
    const index = JSON.stringify({ schemaVersion: 2, mediaType: MEDIA.ociIndex, manifests: entries });
    registry.pushManifest("ns/wheels", "1.0", toBytes(index), MEDIA.ociIndex);
    await (missing === undefined ? pullsLayer(registry) : assertFails(pull(registry), "not-found", missing));
  });
});

Deno.test("an image without an index is for the platform that its config names", async (t) => {
  const table: [config: string | undefined, platform: string, expected: string | null, hint?: string][] = [
    ['{"architecture":"arm64","os":"linux"}', "linux/amd64", null, "linux/arm64"],
    ['{"architecture":"amd64","os":"windows"}', "linux/amd64", null, "windows/amd64"],
    ['{"architecture":"arm","os":"linux","variant":"v7"}', "linux/arm64", null, "linux/arm/v7"],
    ['{"architecture":"AMD64","os":"Linux"}', "linux/amd64", "linux/amd64"],
    ['{"architecture":"x86_64","os":"linux"}', "linux/amd64", "linux/amd64"],
    ['{"architecture":"","os":""}', "linux/amd64", null],
    ['{"architecture":5,"os":"linux"}', "linux/amd64", null],
    ["{}", "linux/amd64", null],
    ["not JSON", "linux/amd64", null],
    [undefined, "linux/amd64", null],
  ];
  await eachRow(t, table, async ([config, platform, expected, hint]) => {
    await using registry = startRegistry();
    const bytes = toBytes(config ?? "{}");
    const digest = config === undefined ? `sha256:${HEX}` : registry.pushBlob(bytes);
    const manifest = toBytes(JSON.stringify({
      schemaVersion: 2,
      config: { mediaType: MEDIA.ociConfig, digest, size: bytes.length },
      layers: [{ mediaType: MEDIA.ociLayerGzip, digest: registry.pushBlob(LAYER), size: LAYER.length }],
    }));
    registry.pushManifest("ns/wheels", "1.0", manifest, MEDIA.ociManifest);
    using scratch = new Scratch();
    const dest = scratch.at("dest");
    const modes: FetchWheelsOptions[] = [{}, { output: undefined, dest }, { list: true }, { dryRun: true }];
    for (const reference of [":1.0", `@${sha256(manifest)}`]) {
      for (const options of modes) {
        const attempt = () => pull(`${registry.host}/ns/wheels${reference}`, { ...options, platform });
        if (hint === undefined) assert.equal((await attempt()).platform, expected);
        else assert.match((await assertFails(attempt, "not-found")).hint ?? "", new RegExp(`--platform ${hint}$`));
      }
    }
    assert.equal([...Deno.readDirSync(scratch.path)].length, hint === undefined ? 1 : 0);
  });
});

Deno.test("a value of the wrong type is the sender's fault, not a bug", async (t) => {
  const wrong = { toString: 0, valueOf: 0 };
  const { config, layers: [layer] } = parseManifest(IMAGE);
  const manifests: [kind: string, body: unknown][] = [
    ["integrity", { layers: [{ ...layer, digest: wrong }] }],
    ["integrity", { config: { ...config, digest: wrong }, layers: [layer] }],
    ["integrity", { fsLayers: [{ blobSum: wrong }] }],
    ["integrity", { fsLayers: { map: 0 } }],
    ["integrity", { layers: [{ ...layer, digest: JSON.parse("[".repeat(3000) + "]".repeat(3000)) }] }],
    ["not-found", { config: { ...config, mediaType: "text/x" }, layers: [{ ...layer, mediaType: null }] }],
    ["not-found", { config: { ...config, mediaType: "text/x" }, layers: [{ ...layer, mediaType: { length: 999 } }] }],
    ["integrity", { manifests: [null] }],
    ["integrity", { manifests: [{ ...IMAGE.descriptor, digest: [IMAGE.digest] }] }],
    ["not-found", { manifests: [IMAGE, ARM].map(({ digest }) => ({ digest, artifactType: wrong })) }],
    ["not-found", { manifests: [IMAGE, ARM].map(({ digest }) => ({ digest, platform: null })) }],
  ];
  await eachRow(t, manifests, async ([kind, body]) => {
    await using registry = serveImage();
    registry.pushManifest("ns/wheels", "1.0", toBytes(JSON.stringify(body)), "");
    await assertFails(pull(registry), kind);
    using scratch = new Scratch();
    scratch.at("layout/index.json", JSON.stringify(body));
    scratch.at("layout/oci-layout", '{"imageLayoutVersion":"1.0.0"}');
    await assertFails(fetchWheels(`oci:${scratch.at("layout")}`), "integrity|not-found");
  });
  for (const error of [{ code: wrong }, { message: wrong }, wrong, null]) {
    await t.step(`an error: ${JSON.stringify(error)}`, async () => {
      const onRequest = () => Response.json({ errors: [error], details: wrong }, { status: 404 });
      await using registry = serveImage({ onRequest });
      await assertFails(pull(registry), "not-found");
    });
  }
});

Deno.test("long words of a server do not block the program", async () => {
  for (const words of ["a".repeat(60_000), "://".repeat(20_000), `https://${"@".repeat(60_000)}`]) {
    const onRequest = () => Response.json({ errors: [{ code: words, message: words }] }, { status: 404 });
    await using registry = serveImage({ onRequest });
    const started = performance.now();
    const { message } = await assertFails(pull(registry), "not-found");
    assert(performance.now() - started < 2000, `${performance.now() - started} ms`);
    assert(message.length < 1000);
  }
});

Deno.test("large documents of a registry do not block the program", async (t) => {
  const theirs = keyOf("P-256", "theirs").sign(toBytes("x"));
  const manySignatures: SignatureChanges = {
    text: "x".repeat(1 << 20),
    signed: (envelope) => envelope.signatures = Array(20_000).fill({ sig: theirs }),
  };
  const referrers = (text: string, headers?: HeadersInit): Partial<SignedFields> => {
    return { options: { onRequest: answerTo("/referrers/", () => new Response(text, { headers })) } };
  };
  const list = (link: string) => referrers('{"manifests":[]}', { link });
  const cases: Record<string, [fields: Partial<SignedFields>, words: RegExp]> = {
    "20,000 signatures in a bundle": [{ change: manySignatures }, /not an image signature/],
    "290,000 referrers": [referrers(`{"manifests":[${'{"digest":""},'.repeat(290_000)}null]}`), /no signature/],
    "a link to the next page that never ends": [list("<".repeat(100_000)), /no signature/],
    "many links, none to the next page": [list("<>;".repeat(30_000)), /no signature/],
  };
  await steps(t, cases, async ([fields, words]) => {
    await using registry = serveSigned({ format: "bundle", ...fields });
    const started = performance.now();
    await assertUnsigned(registry, words);
    assert(performance.now() - started < 3000, `${performance.now() - started} ms`);
  });
  await t.step("indexes that name the same index many times", async () => {
    await using registry = serveImage();
    let index = makeIndex([ARM.descriptor]);
    for (let depth = 0; depth < 4; depth++) {
      pushAs(registry, index.digest, index);
      index = makeIndex(Array(50).fill(index.descriptor));
    }
    pushAs(registry, "1.0", index);
    await assertFails(pull(registry), "not-found", /linux\/arm64$/);
    assert.equal(paths(registry, "/manifests/").length, 5);
  });
  await t.step("a list of platforms is shortened, and kept on one line", async () => {
    await using registry = serveImage();
    const platforms = Array.from({ length: 999 }, (_, at) => ({ os: "a\nb", architecture: `${at}` }));
    pushAs(registry, "1.0", makeIndex(platforms.map((platform) => ({ ...IMAGE.descriptor, platform }))));
    await assertFails(pull(registry), "not-found", /^.{0,900}a\\u000ab\/49 and 949 more$/);
  });
});

Deno.test("a document with another digest than the one that names it is refused", async (t) => {
  const named = `sha256:${HEX}`;
  await using registry = serveImage();
  pushAs(registry, named, IMAGE);
  await t.step("named by the user", async () => {
    await assertFails(pull(`${registry.host}/ns/wheels:1.0@${named}`), "integrity", new RegExp(IMAGE.digest));
  });
  await t.step("named by an index", async () => {
    pushAs(registry, "1.0", makeIndex([{ ...IMAGE.descriptor, digest: named }]));
    await assertFails(pull(registry), "integrity", new RegExp(IMAGE.digest));
  });
  for (const claimed of [named, IMAGE.digest, "", "md5:1"]) {
    await t.step(`with Docker-Content-Digest "${claimed}"`, async () => {
      const headers = { "content-type": IMAGE.mediaType, "docker-content-digest": claimed };
      const onRequest = answerTo("/manifests/1.0", () => new Response(IMAGE.manifest, { headers }));
      await using other = serveImage({ onRequest });
      if (claimed === named) await assertFails(pull(other), "integrity", new RegExp(`Docker-Content-Digest.*${HEX}`));
      else assert.equal((await pull(other)).resolved?.digest, IMAGE.digest);
    });
  }
  await t.step("layers that a signed payload does not cover are ignored", async () => {
    const extra = `,\n   "fsLayers": [{"blobSum": "${sha256(BASE)}"}],\n   "signatures": [`;
    const text = new TextDecoder().decode(SIGNED.manifest).replace(/,\s*"signatures": \[/, extra);
    assert.notEqual(text, new TextDecoder().decode(SIGNED.manifest));
    registry.pushManifest("ns/wheels", SIGNED.digest, toBytes(text), SIGNED.mediaType);
    registry.pushBlob(BASE);
    await pull(`${registry.host}/ns/wheels@${SIGNED.digest}`).catch(({ kind }) => assert.equal(kind, "integrity"));
    assert.deepEqual(paths(registry, sha256(BASE)), []);
  });
});

Deno.test("a body that is not a manifest is refused, and named if it is HTML or compressed", async (t) => {
  const digest = `sha256:${HEX}`;
  const notUtf8 = concat('{"layers":[],"x":"', new Uint8Array([0xff]), '"}');
  const texts = ["", "[]", "null", '"x"', "{}", '{"schemaVersion":2,"layers":['];
  const types = [{ mediaType: MEDIA.ociManifest }, { mediaType: MEDIA.ociIndex }, { mediaType: MEDIA.dockerSchema1 }];
  const digests = ["", 5, null, "sha256:0", digest.toUpperCase(), `${digest}\n`, "../../../other/blobs/x"];
  const objects = [
    ...types,
    ...types.map((type) => ({ ...type, layers: {}, manifests: {}, fsLayers: {} })),
    ...types.map((type) => ({ ...type, layers: [null], manifests: [null], fsLayers: [null] })),
    ...digests.map((digest) => ({ layers: [{ digest }] })),
    ...digests.map((digest) => ({ manifests: [{ digest }] })),
    ...digests.map((blobSum) => ({ fsLayers: [{ blobSum }] })),
    ...[-1, 1.5, "5", null].map((size) => ({ layers: [{ digest, size }] })),
    { manifests: [{ digest, platform: { os: "linux", architecture: "amd64", variant: 8 } }] },
  ];
  const html = "<!doctype html><html><body>Sign in</body></html>";
  const table: [body: string | Uint8Array, words?: RegExp][] = [
    [html, /text\/html.*login.*proxy/],
    [`\n ${html.toUpperCase()}`, /text\/html/],
    [gzip(IMAGE.manifest), /gzip/],
  ];
  for (const body of [...texts, notUtf8, ...objects.map((object) => JSON.stringify(object))]) table.push([body]);
  for (const [body, words] of table) {
    await t.step(String(body), async () => {
      await using registry = startRegistry();
      registry.pushManifest("ns/wheels", "1.0", toBytes(body), "application/json");
      await assertFails(pull(registry), "integrity", words);
      assert.equal(registry.requests.length, 1);
      registry.pushManifest("ns/wheels", digest, toBytes(body), MEDIA.ociManifest);
      await assertFails(pull(`${registry.host}/ns/wheels@${digest}`), "integrity", words);
    });
  }
});

Deno.test("a manifest has at most 4 MiB", async () => {
  await using registry = serveImage();
  const padded = (size: number) => concat(IMAGE.manifest, " ".repeat(size - IMAGE.manifest.length));
  registry.pushManifest("ns/wheels", "largest", padded(4 << 20), IMAGE.mediaType);
  registry.pushManifest("ns/wheels", "larger", padded((4 << 20) + 1), IMAGE.mediaType);
  await pullsLayer(`${registry.host}/ns/wheels:largest`);
  await assertFails(pull(`${registry.host}/ns/wheels:larger`), "integrity", /4194304|4 MiB/);
});

Deno.test("an image or a layer that the registry does not have is an error of its own", async (t) => {
  await using registry = serveImage();
  await eachRow(t, ["ns/wheels:2.0", "ns/other:1.0", `ns/wheels@sha256:${HEX}`], async (name) => {
    const error = await assertFails(pull(`${registry.host}/${name}`), "not-found", /UNKNOWN/);
    assert(error.message.includes(name), error.message);
  });
  const table = { "a layer": undefined, "a foreign layer": ["https://cdn.example/layer"] };
  await steps(t, table, async (urls) => {
    const layers = [{ mediaType: MEDIA.ociLayerGzip, digest: `sha256:${HEX}`, size: 5, urls }];
    const manifest = toBytes(JSON.stringify({ schemaVersion: 2, layers }));
    registry.pushManifest("ns/wheels", "missing", manifest, MEDIA.ociManifest);
    const { message, hint } = await assertFails(pull(`${registry.host}/ns/wheels:missing`), "not-found", /UNKNOWN/);
    assert.match(hint ?? "", urls === undefined ? /layer/ : /foreign/);
    assert.doesNotMatch(`${message} ${hint}`, /check the|the tag/);
  });
});

// Artifacts

const PLAIN = { platform: "linux/amd64", protocol: "http", retries: 0 } as const;

/** A registry that holds this document as `ns/wheels:1.0`, and all images that it may refer to. */
function serveAll(top: MadeManifest, images: MadeImage[], options: RegistryOptions = {}): TestRegistry {
  const registry = startRegistry(options);
  for (const image of images) registry.pushImage("ns/wheels", image.digest, image);
  pushAs(registry, "1.0", top);
  return registry;
}

function serveArtifact(fields: ArtifactFields, options: RegistryOptions = {}): TestRegistry {
  const artifact = makeArtifact(fields);
  return serveAll(artifact, [artifact], options);
}

/** The reference of a registry's image; text is a source already. */
function sourceOf(from: TestRegistry | string): string {
  return typeof from === "string" ? from : `${from.host}/ns/wheels:1.0`;
}

/** The digests of the blobs that were requested, in order. */
function blobsRequested({ requests }: TestRegistry): string[] {
  return requests.filter(({ path }) => path.includes("/blobs/")).map(({ path }) => path.split("/").at(-1) ?? "");
}

/** Extracts into a directory of its own; the result also has the warnings and everything that was extracted. */
async function extract(from: TestRegistry | string, options: FetchWheelsOptions = {}) {
  using scratch = new Scratch();
  const dest = scratch.at("dest");
  const warnings: string[] = [];
  const onProgress = (event: ProgressEvent) => void (event.type === "warning" && warnings.push(event.message));
  const result = await fetchWheels(sourceOf(from), { ...PLAIN, onProgress, ...options, dest });
  const tree = options.list || options.dryRun ? {} : contents(dest);
  return { ...result, warnings, tree, paths: Object.keys(tree).filter((path) => tree[path] !== "/").sort() };
}

/** Asserts that a fetch fails for this reason, which the message or the hint names, and publishes nothing. */
async function assertRejected(
  from: TestRegistry | string,
  options: FetchWheelsOptions,
  kind: string,
  words = /./,
): Promise<string> {
  using scratch = new Scratch();
  const dest = dirname(scratch.at("dest/old.whl", "old"));
  const { message, hint } = await assertFails(fetchWheels(sourceOf(from), { ...PLAIN, dest, ...options }), kind);
  assert.match(`${message} ${hint}`, words);
  assert.deepEqual(contents(scratch.path), { "dest": "/", "dest/old.whl": "old" });
  return message;
}

const WHEELS: ArtifactLayer[] = [
  { title: "a.whl", data: "wheel a" },
  { title: "sub/b.whl", data: "wheel b", mediaType: "application/x-wheel" },
  { title: "notes.txt", data: "notes" },
  { title: ".hidden.whl", data: "hidden" },
  { title: "/abs/c.whl", data: "wheel c" },
];

Deno.test("a manifest is an artifact by its config, by its artifact type, or by a title", async (t) => {
  const image = { mediaType: MEDIA.ociConfig, data: `{"architecture":"amd64","os":"linux"}` };
  const other = { mediaType: "application/vnd.unknown.config.v1+json", data: "{}" };
  const table: [name: string, fields: Partial<ArtifactFields>][] = [
    ["the empty config, and an artifact type", {}],
    ["the empty config alone", { artifactType: null }],
    ["a config of its own type", { artifactType: null, config: other }],
    ["an image config, and an artifact type", { artifactType: "application/vnd.example", config: image }],
    ["an image config, and titles", { artifactType: null, config: image }],
    ["a Docker config, and titles", { artifactType: null, config: { ...image, mediaType: MEDIA.dockerConfig } }],
  ];
  await eachRow(t, table, async ([, fields]) => {
    await using registry = serveArtifact({ layers: WHEELS.slice(0, 2), ...fields });
    const { manifest, tree } = await extract(registry);
    assert.deepEqual(tree, { "a.whl": "wheel a", "sub": "/", "sub/b.whl": "wheel b" });
    const { artifactType = ARTIFACT_MEDIA.unknown } = fields;
    assert.equal(manifest?.artifactType, artifactType);
  });
});

Deno.test("an artifact's files are selected by their titles, and only selected blobs are requested", async (t) => {
  const table: [options: FetchWheelsOptions, files: string[], titles?: string[]][] = [
    [{}, ["a.whl", "abs/c.whl", "notes.txt", "sub/b.whl"], ["a.whl", "sub/b.whl", "notes.txt", "/abs/c.whl"]],
    [{ include: ["a.*"] }, ["a.whl"]],
    [{ include: ["sub"] }, ["sub/b.whl"]],
    [{ exclude: ["*.txt", "abs"] }, ["a.whl", "sub/b.whl"]],
    [{ stripComponents: 1 }, ["b.whl", "c.whl"], ["sub/b.whl", "/abs/c.whl"]],
    [{ include: [".hidden.whl"] }, [".hidden.whl"]],
    [{ layers: ["1"] }, ["a.whl"]],
    [{ layers: [sha256(toBytes("wheel b"))] }, ["sub/b.whl"]],
    [{ list: true, include: ["*.whl"], exclude: [".*"] }, ["a.whl", "abs/c.whl", "sub/b.whl"], []],
    [{ dryRun: true }, [], []],
  ];
  await eachRow(t, table, async ([options, expected, titles = expected]) => {
    await using registry = serveArtifact({ layers: WHEELS });
    const { files, paths, layers, skipped } = await extract(registry, options);
    assert.deepEqual(files.map(({ path }) => path).sort(), expected);
    if (options.include?.[0] === "a.*") {
      assert.deepEqual(skipped.map(({ path }) => path), ["sub/b.whl", "notes.txt", ".hidden.whl", "abs/c.whl"]);
    }
    if (!options.list) assert.deepEqual(paths, expected);
    const selected = WHEELS.filter(({ title = "" }) => titles.includes(title));
    assert.deepEqual(blobsRequested(registry).sort(), selected.map(({ data }) => sha256(toBytes(data))).sort());
    for (const { size, digest } of files) assert(layers.some((it) => it.size === size && it.digest === digest));
    for (const { index, count } of layers) assert(index >= 1 && index <= 5 && count === 5);
  });
  await using registry = serveArtifact({ layers: WHEELS });
  const rejected: [options: FetchWheelsOptions, kind: string, words: RegExp][] = [
    [{ include: ["*.zip"] }, "not-found", /\*\.zip/],
    [{ output: "-" }, "usage", /--output|--layer/],
    [{ output: "-", include: ["*.whl"] }, "usage", /--output|--layer/],
    [{ layers: ["1", "2"] }, "usage", /--output|--layer/],
  ];
  await eachRow(t, rejected, ([options, kind, words]) => assertRejected(registry, options, kind, words));
  assert.deepEqual(blobsRequested(registry), []);
  await t.step("-o writes one file", async () => {
    const { tarball } = await pull(registry, { include: ["notes.txt"] });
    assert.equal(new TextDecoder().decode(tarball), "notes");
  });
});

Deno.test("an artifact's titles and media types are checked before a blob is requested", async (t) => {
  const types = ["application/x-wheel", "text/plain"];
  const untitled = types.map((mediaType) => ({ data: "x", mediaType }));
  const untitledWords = /layer 1 of 2 has no title.*x-wheel" is not.*--layer/;
  // deno-fmt-ignore
  const table: [name: string, titles: (string | ArtifactLayer)[], kind: string, RegExp, FetchWheelsOptions?][] = [
    ["two equal titles", ["a.whl", "b.whl", "a.whl"], "integrity", /a\.whl.*two layers have this/],
    ["two titles that are equal without a slash", ["a.whl", "/a.whl"], "integrity", /a\.whl.*two layers have this/],
    ["two equal paths without directories", ["x/a.whl", "y/a.whl"], "integrity", /a\.whl/, { stripComponents: 1 }],
    ["..", ["a.whl", "../b.whl"], "unsafe", /^(?!.*--include).*\.\.\/b\.whl/],
    [".. after a directory", ["sub/../../b.whl"], "unsafe", /\.\./],
    ["NUL", ["a.whl\0b"], "integrity", /NUL/],
    ["no name", ["/"], "integrity", /empty/],
    ["no title and no archive", untitled, "not-found", untitledWords],
  ];
  await eachRow(t, table, async ([, titles, kind, words, options = {}]) => {
    const layers = titles.map((title, at) => typeof title === "string" ? { title, data: `${at}` } : title);
    await using registry = serveArtifact({ layers });
    await assertRejected(registry, options, kind, words);
    assert.deepEqual(blobsRequested(registry), []);
  });
  await t.step("a wrong digest names the title", async () => {
    await using registry = serveArtifact({ layers: [{ title: "a.whl", data: "a", digest: sha256(LAYER) }] });
    await assertRejected(registry, {}, "integrity", /Cannot verify "a\.whl"/);
  });
  await t.step("several blobs are requested at once", async () => {
    const both = Promise.withResolvers<void>();
    let count = 0;
    const onRequest = async (_: Request, { path }: RequestContext) => {
      if (path.includes("/blobs/") && ++count === 2) both.resolve();
      if (path.includes("/blobs/")) await both.promise;
      return undefined;
    };
    await using registry = serveArtifact({ layers: WHEELS.slice(0, 2) }, { onRequest });
    assert.equal((await extract(registry, { signal: AbortSignal.timeout(10_000) })).paths.length, 2);
  });
  await eachRow(t, [MEDIA.ociLayerGzip, "application/vnd.cncf.helm.chart.content.v1.tar+gzip"], async (mediaType) => {
    await using registry = serveArtifact({ layers: [{ data: LAYER, mediaType }] });
    assert.deepEqual((await extract(registry)).tree, { "a-1-py3-none-any.whl": "wheel" });
  });
});

Deno.test("a directory of an artifact is extracted below its title, and its tar verified", async (t) => {
  const members = ["x.whl", "deep/y.txt", ".hidden"].map((name) => ({ name, data: name }));
  const tar = await makeTar([{ name: "./", type: "directory" }, ...members]);
  const root = (contentDigest = sha256(tar)): ArtifactLayer => ({
    title: ".",
    data: gzip(tar),
    annotations: { [ANNOTATION.unpack]: "true", [ANNOTATION.contentDigest]: contentDigest },
  });
  const whiteout = await makeDirectoryLayer("dir", [{ name: "x", data: "x" }, { name: ".wh.x", data: "w" }]);
  const packed = await makeDirectoryLayer("dir", members);
  const single = { title: "a.whl", data: "a.whl" };
  const unverified = { ...packed, annotations: { [ANNOTATION.unpack]: "true" } };
  const all = ["a.whl", "dir/.hidden", "dir/deep/y.txt", "dir/x.whl"];
  const table: [name: string, layer: ArtifactLayer, options: FetchWheelsOptions, expected: string[]][] = [
    ["with its digest", packed, {}, all],
    ["without a digest", unverified, {}, all],
    ["selected as a whole", packed, { include: ["dir"] }, all.slice(1)],
    ["not selected", packed, { include: ["*.whl"] }, ["a.whl"]],
    ["shortened", packed, { include: ["dir"], stripComponents: 1 }, [".hidden", "deep/y.txt", "x.whl"]],
    ["with a file named as a whiteout", whiteout, {}, ["a.whl", "dir/.wh.x", "dir/x"]],
    ["packed as .", root(), {}, ["a.whl", "deep/y.txt", "x.whl"]],
    ["packed as ., its members selected", root(), { include: ["*.whl"] }, ["a.whl", "x.whl"]],
    ["without the annotation", { ...packed, title: "d.tar.gz", annotations: {} }, {}, ["a.whl", "d.tar.gz"]],
  ];
  await eachRow(t, table, async ([, layer, options, expected]) => {
    await using registry = serveArtifact({ layers: [single, layer] });
    assert.deepEqual((await extract(registry, options)).paths, expected);
  });
  const other = await makeDirectoryLayer("other", members);
  const described = (contentDigest: string) => makeDirectoryLayer("dir", members, { contentDigest });
  const bad: [name: string, layer: ArtifactLayer, kind: string, words: RegExp][] = [
    ["another digest", await described(`sha256:${HEX}`), "integrity", /dir/],
    ["another digest of .", root(`sha256:${HEX}`), "integrity", /"\."/],
    ["an unknown digest", await described("md5:1"), "integrity", /digest/],
    ["a member outside", await makeDirectoryLayer("dir", [{ name: "../../x", data: "x" }]), "unsafe", /\.\./],
    ["a member beside the directory", { ...other, title: "dir" }, "unsafe", /"dir"/],
  ];
  await eachRow(t, bad, async ([, layer, kind, words]) => {
    await using registry = serveArtifact({ layers: [single, layer] });
    await assertRejected(registry, {}, kind, words);
  });
});

Deno.test("an index of artifacts is resolved by platform, or to its only entry", async (t) => {
  const artifactOf = (name: string, fields: Partial<ArtifactFields>) =>
    makeArtifact({ layers: [{ title: `${name}.whl`, data: name }], ...fields });
  const on = (architecture: string) => artifactOf(architecture, { platform: { os: "linux", architecture } });
  const [amd64, arm64] = [on("amd64"), on("arm64")];
  const one = artifactOf("one", { artifactType: "application/vnd.one" });
  const two = artifactOf("two", { artifactType: "application/vnd.two" });
  const table: [name: string, entries: MadeImage[], expected: string | RegExp, platform?: string][] = [
    ["by platform", [arm64, amd64], "amd64.whl"],
    ["by another platform", [arm64, amd64], "arm64.whl", "linux/arm64"],
    ["the only one", [one], "one.whl"],
    ["an image beside an artifact without a platform", [one, IMAGE], "a-1-py3-none-any.whl"],
    ["several without a platform", [one, two], /sha256:.*vnd\.one.*sha256:.*vnd\.two.*SOURCE: .*\/ns\/wheels@DIGEST/],
    ["a platform that is missing", [amd64, arm64], /linux\/amd64.*linux\/arm64/, "linux/s390x"],
  ];
  await eachRow(t, table, async ([, entries, expected, platform = "linux/amd64"]) => {
    const index = makeIndex(entries.map(({ descriptor }) => descriptor));
    await using registry = serveAll(index, entries);
    if (typeof expected !== "string") return void await assertRejected(registry, { platform }, "not-found", expected);
    const { paths, resolved } = await extract(registry, { platform });
    assert.deepEqual([paths, resolved?.digest], [[expected], index.digest]);
  });
});

// Signatures

const FORMATS: SignatureFormat[] = ["bundle", "simplesigning"];
const keys = new Map<string, SigningKey>();

/** Returns a key, which is made when it is first needed. */
function keyOf(kind: KeyKind, owner = "ours"): SigningKey {
  const name = `${kind} ${owner}`;
  const key = keys.get(name) ?? makeKey(kind);
  keys.set(name, key);
  return key;
}

interface SignedFields {
  format: SignatureFormat;
  key?: SigningKey;
  subject?: MadeManifest;
  change?: SignatureChanges;
  /** The signatures, if not one by `key`. */
  signatures?: MadeArtifact[];
  options?: RegistryOptions;
}

/** A registry with the index of two images, and signatures. */
function serveSigned(fields: SignedFields): TestRegistry {
  const { format, key = keyOf("P-256"), subject = INDEX, change, options } = fields;
  const { signatures = [makeSignature({ subject: subject.descriptor, key, format, change })] } = fields;
  const registry = serveAll(INDEX, [IMAGE, ARM], options);
  pushSignatures(registry, "ns/wheels", { subject: subject.digest, format, signatures });
  return registry;
}

const KEYS = new Scratch();
globalThis.addEventListener("unload", () => KEYS[Symbol.dispose]());

/** Returns the file of a public key. */
function keyFile(key: SigningKey = keyOf("P-256"), name = "ours.pem"): string {
  return KEYS.at(name, key.pem);
}

/** Asserts that a signature is rejected before a layer is requested; returns the message. */
async function assertUnsigned(registry: TestRegistry, words = /./, options: FetchWheelsOptions = {}): Promise<string> {
  const message = await assertRejected(registry, { verifyKeys: [keyFile()], ...options }, "integrity", words);
  assert(!blobsRequested(registry).includes(sha256(LAYER)));
  return message;
}

/** Asserts that our key verifies a source, without an extraction. */
async function assertSigned(
  from: TestRegistry | string,
  { format, digest = INDEX.digest, ...options }: FetchWheelsOptions & { format: SignatureFormat; digest?: string },
): Promise<void> {
  const { verified } = await extract(from, { verifyKeys: [keyFile()], dryRun: true, ...options });
  assert.deepEqual(verified, { digest, key: keyFile(), format });
}

Deno.test("verifyKeys accepts signatures that cosign made", async (t) => {
  for (const signature of cosign.signatures) {
    for (const referrers of [true, false]) {
      for (const [name, lines] of Object.entries(cosign.keys)) {
        const isAccepted = signature.accepted && signature.keys.includes(name);
        await t.step(`${signature.name}, referrers ${referrers}: ${isAccepted ? "" : "not "}by ${name}`, async () => {
          await using registry = startRegistry({ referrers });
          for (const blob of cosign.subject.blobs) registry.pushBlob(toBytes(Buffer.from(blob, "base64")));
          for (const blob of signature.blobs) registry.pushBlob(toBytes(JSON.stringify(blob)));
          const manifests = { ...cosign.subject.manifests, ...signature.manifests };
          for (const [reference, manifest] of Object.entries(manifests)) {
            // The referrers API must do without the tag.
            if (referrers && /^sha256-[0-9a-f]*$/.test(reference)) continue;
            registry.pushManifest("ns/wheels", reference, toBytes(JSON.stringify(manifest)), manifest.mediaType);
          }
          const key = KEYS.at("cosign.pem", `${lines.join("\n")}\n`);
          const source = `${registry.host}/ns/wheels:1`;
          if (!isAccepted) return void await assertRejected(source, { verifyKeys: [key] }, "integrity");
          const { verified } = await extract(source, { verifyKeys: [key], dryRun: true });
          assert.deepEqual(verified, { digest: signature.digest, key, format: signature.format });
        });
      }
    }
  }
});

Deno.test("verifyKeys accepts each kind of key, in both formats, from the referrers API and by tag", async (t) => {
  for (const kind of KEY_KINDS) {
    for (const format of FORMATS) {
      for (const referrers of [true, false]) {
        await t.step(`${kind}, ${format}, ${referrers ? "with" : "without"} referrers`, async () => {
          const key = keyOf(kind);
          await using registry = serveSigned({ format, key, options: { referrers } });
          const { verified, paths } = await extract(registry, { verifyKeys: [keyFile(key)] });
          assert.deepEqual(verified, { digest: INDEX.digest, key: keyFile(key), format });
          assert.deepEqual(paths, ["a-1-py3-none-any.whl"]);
          const requested = blobsRequested(registry);
          assert.equal(requested.indexOf(sha256(LAYER)), requested.length - 1, "the layer comes last");
          const tags = registry.requests.filter(({ path }) => path.endsWith("/manifests/1.0"));
          assert.equal(tags.length, 1, "a tag that is read twice may name two images");
        });
      }
    }
  }
});

Deno.test("an unsigned image, another key, another digest and a changed payload have their own words", async (t) => {
  const payloads: Record<SignatureFormat, [digest: SignatureChanges, changed: SignatureChanges]> = {
    bundle: [
      { payload: (statement) => statement.subject[0].digest.sha256 = HEX },
      { signed: (envelope) => envelope.payload = Buffer.from(`${atob(envelope.payload)} `).toString("base64") },
    ],
    // Without a hint of the key, a payload that does not fit its descriptor shows the change.
    simplesigning: [
      { payload: ({ critical }) => critical.image["docker-manifest-digest"] = `sha256:${HEX}` },
      { served: (bytes) => bytes.with(-1, 0x20) },
    ],
  };
  for (const format of FORMATS) {
    const [digest, changed] = payloads[format];
    const causes: [fields: Partial<SignedFields>, words: RegExp][] = [
      [{ signatures: [] }, /no signature/],
      [{ key: keyOf("P-256", "theirs") }, /key.*ours\.pem/],
      [{ change: digest }, /another digest.*0123456789abcdef/],
      [{ change: changed }, format === "bundle" ? /payload was changed/ : /Cannot verify "sha256:.*digest/],
    ];
    const messages: string[] = [];
    for (const [fields, words] of causes) {
      await t.step(`${format}: ${words}`, async () => {
        await using registry = serveSigned({ format, ...fields });
        messages.push((await assertUnsigned(registry, words)).replace(/127\.0\.0\.1:\d+/, ""));
      });
    }
    assert.equal(new Set(messages).size, causes.length, messages.join("\n"));
  }
});

Deno.test("verifyKeys rejects everything but a signature of the image", async (t) => {
  for (const format of FORMATS) {
    const table: Record<string, Partial<SignedFields>> = {
      "a key of another kind": { key: keyOf("Ed25519") },
      "a signature of another platform's manifest": { subject: ARM },
    };
    for (const [name, change] of Object.entries(WRONG_SIGNATURES[format])) table[name] = { change };
    for (const [name, fields] of Object.entries(table)) {
      await t.step(`${format}: ${name}`, async () => {
        await using registry = serveSigned({ format, ...fields });
        await assertUnsigned(registry);
      });
    }
  }
  const modes: FetchWheelsOptions[] = [{ list: true }, { dryRun: true }, { output: "-" }, { cache: KEYS.at("cache") }];
  await eachRow(t, modes, async (options) => {
    await using signed = serveSigned({ format: "bundle" });
    await extract(signed, { verifyKeys: [keyFile()], cache: KEYS.at("cache") });
    await using registry = serveSigned({ format: "bundle", signatures: [] });
    await assertUnsigned(registry, /no signature/, options);
  });
  for (const [status, kind] of [[500, "network"], [503, "network"], [401, "auth"]] as const) {
    await t.step(`an answer of ${status} is not taken for a missing signature`, async () => {
      const onRequest = (_: Request, { path }: RequestContext) =>
        /referrers|sha256-/.test(path) ? new Response(null, { status }) : undefined;
      await using registry = serveSigned({ format: "bundle", options: { onRequest } });
      await assertRejected(registry, { verifyKeys: [keyFile()] }, kind);
      assert(!blobsRequested(registry).includes(sha256(LAYER)));
    });
  }
});

Deno.test("verifyKeys finds the right signature among others", async (t) => {
  const [ours, theirs] = [keyOf("P-256"), keyOf("P-256", "theirs")];
  const sign = (key: SigningKey, change?: SignatureChanges, format: SignatureFormat = "bundle") =>
    makeSignature({ subject: INDEX.descriptor, key, format, change });
  const attestation = sign(ours, { payload: (it) => it.predicateType = "https://slsa.dev/provenance/v1" });
  const sbom = makeArtifact({ layers: [{ data: "{}" }], artifactType: SBOM, subject: INDEX.descriptor });
  const broken = sign(ours, { raw: () => toBytes("null") });
  const options = { referrers: { artifactType: ARTIFACT_MEDIA.empty } };
  const twoSignatures: SignatureChanges = {
    signed: (envelope) => envelope.signatures.unshift({ sig: theirs.sign(toBytes("x")) }),
  };
  const twoSubjects: SignatureChanges = { payload: (it) => it.subject.unshift({ digest: { sha256: HEX } }) };
  const table: [name: string, fields: Omit<SignedFields, "format">, digest?: string][] = [
    ["others before it", { signatures: [sbom, attestation, broken, sign(theirs), sign(ours)] }],
    ["others after it", { signatures: [sign(ours), sign(theirs), broken, attestation, sbom] }],
    ["a second signature in one envelope", { change: twoSignatures }],
    ["a second subject", { change: twoSubjects }],
    ["a manifest without an artifact type", { change: { manifest: (manifest) => delete manifest.artifactType } }],
    ["an index with another artifact type, as GHCR's", { options }],
    ["a signature of the chosen manifest", { subject: IMAGE }, IMAGE.digest],
  ];
  await eachRow(t, table, async ([, fields, digest = INDEX.digest]) => {
    await using registry = serveSigned({ format: "bundle", ...fields });
    const verifyKeys = [keyFile(keyOf("Ed25519"), "other.pem"), keyFile()];
    await assertSigned(registry, { format: "bundle", digest, verifyKeys });
  });
  await t.step("a signature by another key is named rather than an attestation", async () => {
    await using registry = serveSigned({ format: "bundle", signatures: [sign(theirs), attestation] });
    await assertUnsigned(registry, /signed by a key other/);
  });
  await t.step("a foreign signature whose blob is missing", async () => {
    const missing = { ...sign(theirs), blobs: new Map() };
    await using registry = serveSigned({ format: "bundle", signatures: [missing, sign(ours)] });
    await assertSigned(registry, { format: "bundle" });
    await using alone = serveSigned({ format: "bundle", signatures: [missing] });
    await assertRejected(alone, { verifyKeys: [keyFile()] }, "not-found");
  });
  for (const status of [403, 406, 415, 501, 200]) {
    await t.step(`referrers that answer ${status === 200 ? "HTML" : status} do not hide other signatures`, async () => {
      const html = { status, headers: { "content-type": "text/html" } };
      const onRequest = answerTo("referrers", () => new Response("<html>", html));
      for (const subject of [INDEX, IMAGE]) {
        await using registry = serveSigned({ format: "simplesigning", subject, options: { onRequest } });
        const events: string[] = [];
        const onProgress = (event: ProgressEvent) => {
          if (event.type === "verified") events.push(`${event.digest} ${event.key} ${event.format}`);
        };
        await assertSigned(registry, { format: "simplesigning", digest: subject.digest, onProgress });
        assert.deepEqual(events, [`${subject.digest} ${keyFile()} simplesigning`]);
      }
      await using unsigned = serveSigned({ format: "simplesigning", signatures: [], options: { onRequest } });
      const kind = status === 403 ? "auth" : "network|integrity";
      await assertFails(extract(unsigned, { verifyKeys: [keyFile()], dryRun: true }), kind, /^(?!.*no signature)/);
    });
  }
  await t.step("a signature on the last page of the referrers", async () => {
    const signatures = ["first", "second"].map((owner) => sign(keyOf("P-256", owner))).concat(sign(ours));
    const options = { referrers: { pageSize: 1 } };
    await using registry = serveSigned({ format: "bundle", signatures, options });
    const { verified } = await extract(registry, { verifyKeys: [keyFile()], dryRun: true });
    assert.equal(verified?.digest, INDEX.digest);
    assert.equal(paths(registry, "referrers").length, 3);
    registry.requests.length = 0;
    await assertUnsigned(registry, /key.*other\.pem/, { verifyKeys: [keyFile(keyOf("P-256", "other"), "other.pem")] });
    assert.equal(paths(registry, "referrers").length, 4, "three pages of the index, one of the image");
  });
  await t.step("a second layer of simple signing", async () => {
    const [first, second] = [sign(theirs, {}, "simplesigning"), sign(ours, {}, "simplesigning")];
    const layers = [first, second].flatMap((signature) => parseManifest(signature).layers);
    const manifest = toBytes(JSON.stringify({ ...parseManifest(first), layers }));
    const blobs = new Map([...first.blobs, ...second.blobs]);
    const signatures = [{ ...first, manifest, digest: sha256(manifest), blobs }];
    await using registry = serveSigned({ format: "simplesigning", signatures });
    await assertSigned(registry, { format: "simplesigning" });
  });
  await t.step("without the option nothing is verified", async () => {
    await using registry = serveSigned({ format: "bundle", signatures: [] });
    assert.equal((await extract(registry)).verified, null);
    assert.deepEqual(paths(registry, "referrers"), []);
  });
});

Deno.test("signatures may lie at a mirror or in an OCI layout", async (t) => {
  const ours = (format: SignatureFormat, referrers = true) => serveSigned({ format, options: { referrers } });
  const none = (referrers = true) => serveSigned({ format: "bundle", signatures: [], options: { referrers } });
  for (const format of FORMATS) {
    const table: [name: string, mirror: () => TestRegistry, origin: () => TestRegistry][] = [
      ["at the mirror", () => ours(format), none],
      ["at the mirror by tag", () => ours(format, false), none],
      ["at the registry", none, () => ours(format)],
      ["at the registry, and a mirror without referrers", () => none(false), () => ours(format)],
    ];
    for (const [name, startMirror, start] of table) {
      await t.step(`${format} ${name}`, async () => {
        await using mirror = startMirror();
        await using registry = start();
        const options = { verifyKeys: [keyFile()], mirrors: [mirror.url], dryRun: true };
        const { verified, warnings } = await extract(registry, options);
        assert.equal(verified?.digest, INDEX.digest);
        assert.doesNotMatch(warnings.join("\n"), /skipping mirror/);
      });
    }
  }
  await t.step("at the mirror of a registry that cannot be reached", async () => {
    await using mirror = ours("simplesigning", false);
    const source = `${await closedHost()}/ns/wheels:1.0`;
    await assertSigned(source, { format: "simplesigning", mirrors: [mirror.url] });
  });
  const signed = { subject: INDEX.descriptor, key: keyOf("P-256") };
  const bundle = makeSignature({ ...signed, format: "bundle" });
  const simple = makeSignature({ ...signed, format: "simplesigning" });
  const [bundleTag, simpleTag] = FORMATS.map((format) => signatureTag(INDEX.digest, format)) as [string, string];
  const layouts: [name: string, tags: Record<string, MadeManifest>, format: SignatureFormat | null][] = [
    ["bundles without a tag, as oras cp -r writes them", { "": bundle }, "bundle"],
    ["an index of bundles by tag", { [bundleTag]: makeIndex([bundle.descriptor]) }, "bundle"],
    ["a simple signature by tag", { [simpleTag]: simple }, "simplesigning"],
    ["no signature", {}, null],
  ];
  for (const [name, tags, format] of layouts) {
    for (const tag of ["1.0", ""]) {
      await t.step(`${name}, the image ${tag === "" ? "without" : "with"} a tag`, async () => {
        using scratch = new Scratch();
        const layout = writeLayout(scratch, [IMAGE, ARM, bundle, simple], { index: INDEX, ...tags });
        const named = [[tag, INDEX], ["", IMAGE], ["", ARM], ...Object.entries(tags)] as [string, MadeManifest][];
        const manifests = named.map(([tag, { descriptor }]) => (
          { ...descriptor, ...tag && { annotations: { "org.opencontainers.image.ref.name": tag } } }
        ));
        scratch.at("layout/index.json", JSON.stringify({ schemaVersion: 2, manifests }));
        const source = tag === "" ? layout : `${layout}:${tag}`;
        if (format !== null) await assertSigned(source, { format });
        else await assertRejected(source, { verifyKeys: [keyFile()], dryRun: true }, "integrity", /no signature/);
      });
    }
  }
});

Deno.test("verifyKeys must be public keys of a supported kind, and the source an image", async (t) => {
  await using registry = serveSigned({ format: "bundle" });
  const pemOf = ({ publicKey }: { publicKey: KeyObject }) =>
    publicKey.export({ format: "pem", type: "spki" }).toString();
  const { pem, privatePem } = keyOf("P-256");
  const table: [name: string, text: string | undefined][] = [
    ["absent.pem", undefined],
    ["empty.pem", ""],
    ["garbage.pem", "garbage"],
    ["truncated.pem", pem.slice(0, 80)],
    ["damaged.pem", pem.replace(/\n[^-]{20}/, "\n!!!!!!!!!!!!!!!!!!!!")],
    ["private.pem", privatePem],
    ["x25519.pem", pemOf(generateKeyPairSync("x25519"))],
    ["secp256k1.pem", pemOf(generateKeyPairSync("ec", { namedCurve: "secp256k1" }))],
    ["P-521.pem", pemOf(generateKeyPairSync("ec", { namedCurve: "P-521" }))],
    ["DSA.pem", pemOf(generateKeyPairSync("dsa", { modulusLength: 2048, divisorLength: 256 }))],
    ["PSS.pem", pemOf(generateKeyPairSync("rsa-pss", { modulusLength: 2048 }))],
  ];
  await eachRow(t, table, async ([name, text]) => {
    const verifyKeys = [keyFile(), KEYS.at(name, text)];
    await assertRejected(registry, { verifyKeys }, "usage", new RegExp(name.replace(".", "\\.")));
  });
  const saved = KEYS.at("saved.tar", makeDockerArchive([gzip(tarOf(file("a.whl")))]));
  const sources: [name: string, source: string, kind: string, words: RegExp][] = [
    ["a file", KEYS.at("layer.tar.gz", LAYER), "usage", /--verify-key/],
    ["a URL", `${registry.url}/layer.tar.gz`, "usage", /--verify-key/],
    ["an archive of docker save", `docker-archive:${saved}`, "integrity", /no signature/],
  ];
  const verifyKeys = [keyFile()];
  await eachRow(t, sources, ([, source, kind, words]) => assertRejected(source, { verifyKeys }, kind, words));
  assert.deepEqual(registry.requests, []);
});

Deno.test("a layout of cosign save has one image, and its signatures", async () => {
  using scratch = new Scratch();
  const saved = makeSignature({ subject: IMAGE.descriptor, key: keyOf("P-256"), format: "simplesigning" });
  const images = { image: IMAGE, sigs: saved, atts: makeArtifact({ layers: [{ data: "{}" }] }) };
  const source = writeLayout(scratch, Object.values(images), {});
  const manifests = Object.entries(images).map(([kind, { descriptor }]) => (
    { ...descriptor, annotations: { kind: `dev.cosignproject.cosign/${kind}` } }
  ));
  scratch.at("layout/index.json", JSON.stringify({ schemaVersion: 2, manifests }));
  await assertSigned(source, { format: "simplesigning", digest: IMAGE.digest, dryRun: false });
});

// ---------------------------------------------------------------------------------------------------------------------
// 7 Bytes
// ---------------------------------------------------------------------------------------------------------------------

const MODULE_URL = new URL("fetch_wheels.ts", import.meta.url).href;

/** For a fetch that may hang. */
function fetchInTime(source: string, options: FetchWheelsOptions): Promise<FetchResult> {
  return fetchWheels(source, { ...PLAIN, signal: AbortSignal.timeout(30_000), ...options });
}

const LARGE_NOISE = new Uint8Array(randomBytes(1_500_000));

/** Returns so many bytes in which no range equals another. */
function noise(size: number): Bytes {
  return LARGE_NOISE.subarray(0, size);
}

/** Returns a source and options that yield these bytes from an HTTP server in chunks of this size. */
function serveChunks(bytes: Uint8Array, size: number): [source: string, options: FetchWheelsOptions] {
  const chunks = function* () {
    for (let offset = 0; offset < bytes.length; offset += size) yield bytes.slice(offset, offset + size);
  };
  return ["http://127.0.0.1/layer", { fetch: () => Promise.resolve(new Response(ReadableStream.from(chunks()))) }];
}

Deno.test("a layer is decompressed completely or refused, whatever the sizes of its chunks", async (t) => {
  await eachRow(t, COMPRESSIONS, async ([, ending, compress]) => {
    for (const [size, chunk] of [[3000, 1], [200_000, 65_536], [200_000, Infinity]] as const) {
      using scratch = new Scratch();
      const tar = await makeTar([{ name: "a.whl", data: noise(size) }, { name: "b.txt", data: "text" }]);
      const [source, options] = serveChunks(compress(tar), chunk);
      if (ending !== "right") await assertRefused(source, ending, options);
      else {
        await fetchInTime(source, { ...options, dest: scratch.at("dest") });
        const [wheel, text] = [noise(size), "text"].map((data) => `file 644 ${sha256(toBytes(data))}`);
        assert.deepEqual(snapshot(scratch.at("dest")), { "a.whl": wheel, "b.txt": text });
      }
    }
  });
});

Deno.test("a zstd header that lies in two chunks is read in a worker, which frees a chunk after its use", async () => {
  using scratch = new Scratch();
  const tar = tarOf(rawHeader({ name: "a.whl", size: 25 << 20 }), new Uint8Array(25 << 20));
  // The first block's header begins one byte before the end of the first 256 KiB.
  const skipped = new Uint8Array((256 << 10) - 1 - 6 - 8);
  const header = new Uint8Array(new Uint32Array([0x184d2a50, skipped.length]).buffer);
  const source = scratch.at("layer.tar.zst", concat(header, skipped, zstdStored(tar, 13 << 3)));
  const { files } = await fetchInTime(source, { dest: scratch.at("dest"), workerUrl: MODULE_URL });
  assert.deepEqual(files.map(({ size }) => size), [25 << 20]);
});

Deno.test("a layer that inflates to more than twice its size is decompressed before the worker", async (t) => {
  // Together the parts are large enough for the worker.
  const block = concat(noise(20_000), new Uint8Array(40_000));
  const count = 1400;
  const size = count * block.length;
  const header = rawHeader({ name: "a.whl", size });
  const end = new Uint8Array(1024 + 512 - size % 512);
  const hash = createHash("sha256");
  for (let number = 0; number < count; number++) hash.update(block);
  const compressed = (compress: (part: Bytes) => Uint8Array) =>
    concat(compress(header), ...Array<Uint8Array>(count).fill(compress(block)), compress(end));
  const [gzipped, zstandard] = [compressed(gzip), compressed(zstdChecked)];
  // deno-fmt-ignore
  const cases: [name: string, ending: "right" | `integrity${string}`, layer: Bytes][] = [
    ["gzip", "right", gzipped],
    ["zstd", "right", zstandard],
    ["zstd with skippable frames", "right", compressed((part) => concat(zstd(part), SKIPPABLE))],
    ["gzip that ends in the data", "integrity: end of file", cut(gzipped, 1000)],
    ["gzip with a flipped bit in the data", "integrity", flip(gzipped, 500_000)],
    ["gzip and garbage after it", "integrity", concat(gzipped, "garbage")],
    ["zstd that ends in the checksum", "integrity: ends early", cut(zstandard, 1)],
    ["zstd with a flipped bit in the data", "integrity", flip(zstandard, 500_000)],
    ["gzip inside gzip", "integrity: not a tar archive", compressed((part) => gzip(gzipStored(part)))],
  ];
  await eachRow(t, cases, async ([, ending, layer]) => {
    using scratch = new Scratch();
    const source = scratch.at("layer", layer);
    if (ending !== "right") return await assertRefused(source, ending, { workerUrl: MODULE_URL });
    let sent = 0;
    using _ = stub(Worker.prototype, "postMessage", (original) =>
      function (this: Worker, ...args: unknown[]) {
        sent += (args[0] as { chunk?: Uint8Array }).chunk?.length ?? 0;
        original.apply(this, args as Parameters<typeof original>);
      });
    await fetchInTime(source, { dest: scratch.at("dest"), workerUrl: MODULE_URL });
    assert.equal(sent, header.length + size + end.length);
    assert.deepEqual(snapshot(scratch.at("dest")), { "a.whl": `file 644 sha256:${hash.copy().digest("hex")}` });
  });
});

Deno.test("a file in another format is refused with the names of file and format", async (t) => {
  // deno-fmt-ignore
  const table: [file: string, format: RegExp, bytes: string | Uint8Array][] = [
    ["layer.tar.xz", /\bxz\b/, concat(new Uint8Array([0xfd]), "7zXZ\0\0\x04", noise(2000))],
    ["layer.tar.bz2", /\bbzip2\b/, concat("BZh91AY&SY", noise(2000))],
    ["a-1-py3-none-any.whl", /\b(?:zip|wheel)\b/, makeWheel({ name: "a", version: "1" }).bytes],
    ["page.html", /\bHTML\b/, `<!DOCTYPE html>\n<html><body>${"Sign in ".repeat(200)}</body></html>`],
    ["blanks.html", /\bHTML\b/, `\n  <html lang="en">${"Sign in ".repeat(200)}</html>`],
    ["empty.tar", /\bempty\b/, ""],
  ];
  await eachRow(t, table, async ([name, format, bytes]) => {
    using scratch = new Scratch();
    const source = scratch.at(name, bytes);
    const { message, hint } = await assertFails(fetchInTime(source, { dest: scratch.at("dest") }), "integrity");
    assert(message.includes(name), message);
    assert.match(`${message.replaceAll(name, "")} ${hint}`, format);
    await assertRefused(source, "integrity");
  });
});

// ---------------------------------------------------------------------------------------------------------------------
// 8 Archive
// ---------------------------------------------------------------------------------------------------------------------

const ONLY_WHEELS = { include: ["*.whl"] };
const MIB = 1 << 20;

Deno.test("an archive is accepted with", async (t) => {
  await eachRow(t, ACCEPTED, async ([, there, parts, options = {}]) => {
    using scratch = new Scratch();
    const tar = tarOf(regular("good.whl", "good.whl"), ...parts);
    const rows = Object.entries({ "good.whl": "good.whl", ...there });
    const expected = Object.fromEntries(rows.filter(([, text]) => text !== null));
    const paths = Object.keys(expected).filter((path) => expected[path] !== "/").sort();
    Deno.mkdirSync(scratch.at("there"));
    const sources: [string, FetchWheelsOptions][] = [
      [scratch.at("layer.tar", tar), { dest: scratch.at("absent") }],
      [scratch.at("layer.tar"), { dest: scratch.at("there") }],
      [scratch.at("layer.tar"), { list: true }],
      [scratch.at("layer.tar.zst", zstd(tar)), { dest: scratch.at("zstd") }],
    ];
    const [url, serve] = serveChunks(tar, tar.length > MIB ? 4093 : 1);
    sources.push([url, { ...serve, dest: scratch.at("chunks") }]);
    for (const [source, { dest, ...rest }] of sources) {
      const result = await fetchInTime(source, { dest, ...rest, ...options });
      if (dest !== undefined) assert.deepEqual(contents(dest), expected);
      const found = result.files.map(({ path }) => path);
      // A list may contain duplicates.
      assert.deepEqual((rest.list ? [...new Set(found)] : found).sort(), paths);
      const file = source.endsWith("zst") ? "layer.tar.zst" : "layer.tar";
      assert.equal(result.bytes, Deno.statSync(scratch.at(file)).size);
      const skipped = result.skipped.map(({ path }) => path).filter((path) => !path.includes("\ufffd"));
      assert.deepEqual(skipped, rows.filter(([, text]) => text === null).map(([path]) => path));
      for (const { reason } of result.skipped) assert.match(reason, /\w/);
    }
    const names = [...Deno.readDirSync(scratch.path)].map(({ name }) => name).sort();
    assert.deepEqual(names, ["absent", "chunks", "layer.tar", "layer.tar.zst", "there", "zstd"]);
  });
});

Deno.test("an archive is refused, and DEST stays as it was, for", async (t) => {
  using scratch = new Scratch();
  for (const [name, failure, parts, options] of REFUSED) {
    const tar = tarOf(regular("good.whl"), ...parts);
    await t.step(name, () => assertRefused(scratch.at("layer.tar", tar), failure, options));
  }
});

Deno.test("an archive that is cut is refused, and DEST stays as it was", async (t) => {
  using scratch = new Scratch();
  const tar = tarOf(regular("good.whl"), pax({ path: "long.whl" }), regular("b.whl", "x".repeat(600)));
  // deno-fmt-ignore
  const places = {
    "in the first header": 300, "before a body": 512, "in a body": 515, "in the padding of a body": 600,
    "between two members": 1024, "in a later header": 1200, "before PAX records": 1536, "in PAX records": 1540,
    "between PAX records and their member": 2048, "in the last body": 2700, "in the padding of the last body": 3300,
    "before the end marker": 3584, "in the end marker": 3600,
  };
  assert.equal(tar.length, 3584 + 1024);
  for (const [name, length] of Object.entries(places)) {
    const part = tar.slice(0, length);
    for (const [form, layer] of Object.entries({ plain: part, gzip: gzip(part), zstd: zstd(part) })) {
      await t.step(`${name}, ${form}`, () => assertRefused(scratch.at("layer", layer), "integrity"));
    }
  }
  // One zero block ends an archive for GNU tar and bsdtar as well.
  await fetchInTime(scratch.at("layer", tar.slice(0, 4096)), { dest: scratch.at("dest") });
});

Deno.test("modes are the archive's, not the umask's; only the owner may write, and no special bit stays", async () => {
  // deno-fmt-ignore
  const modes: [name: string, mode: number | Uint8Array, expected: number][] = [
    ["a", 0o644, 0o644], ["b", 0o755, 0o755], ["c", 0o4755, 0o755], ["d", 0o2777, 0o755], ["e", 0o1666, 0o644],
    ["f", 0, 0o600], ["g", 0o444, 0o644], ["h", 0o777, 0o755], ["i", 0o666, 0o644], ["j", 0o600, 0o600],
    ["k", 0o100664, 0o644], ["l", base256(0o711, 8), 0o711], ["m", 0o111, 0o711],
  ];
  using scratch = new Scratch();
  const parts = modes.map(([name, mode]) => [regular(name, "x", { mode }), head(`dir-${name}`, "5", { mode })]);
  const through = ["sh", "-c", 'umask 077; exec "$@"', "sh"];
  await expectCode(0, ["-d", scratch.at("dest"), scratch.at("layer.tar", tarOf(...parts))], { through }, runProgram);
  for (const [name, , expected] of modes) {
    const permissions = (path: string) => ((Deno.statSync(scratch.at(`dest/${path}`)).mode ?? 0) & 0o7777).toString(8);
    assert.equal(permissions(name), expected.toString(8), name);
    assert.equal(permissions(`dir-${name}`), (expected | 0o100).toString(8), `dir-${name}`);
  }
});

Deno.test("times are those of the archive, and none fails an extraction", async () => {
  // deno-fmt-ignore
  const times: [name: string, seconds: number | undefined, parts: Parts][] = [
    ["plain", 1_704_067_200, regular("plain")],
    ["before 1970", -86_400, regular("before 1970", "x", { mtime: -86_400 })],
    ["before 1970 in PAX", -1, [pax({ mtime: "-0.5" }), regular("before 1970 in PAX")]],
    ["fraction", 1_704_067_200, [pax({ mtime: "1704067200.123456789" }), regular("fraction")]],
    ["after 2242", 9e9, regular("after 2242", "x", { mtime: 9e9 })],
    ["far before", undefined, regular("far before", "x", { mtime: -(2 ** 62) })],
    ["far after", undefined, regular("far after", "x", { mtime: 2 ** 62 })],
    ["beyond 64 bits", undefined, regular("beyond 64 bits", "x", { mtime: 2 ** 80 })],
    ["garbage", undefined, regular("garbage", "x", { mtime: "noon" })],
    ["empty", undefined, regular("empty", "x", { mtime: "" })],
    ...["", "abc", "1e999", "-", ".5", "1.2.3", "9".repeat(40),
    `-${"9".repeat(40)}`].map((mtime, at): typeof times[0] =>
      [`pax ${at}`, undefined, [pax({ mtime, atime: mtime, ctime: mtime }), regular(`pax ${at}`)]]),
  ];
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", tarOf(...times.map(([, , parts]) => parts)));
  await fetchInTime(source, { dest: scratch.at("dest") });
  for (const [name, seconds] of times) {
    if (seconds === undefined) continue;
    // The file system may not support a time. It changes it in the same way for everybody.
    const probe = scratch.at("probe", "");
    Deno.utimeSync(probe, seconds, seconds);
    const [actual, expected] = [scratch.at(`dest/${name}`), probe].map((path) =>
      Math.floor(Number(Deno.statSync(path).mtime) / 1000)
    );
    assert.equal(actual, expected, name);
  }
});

Deno.test("extension headers do not accumulate in memory", async (t) => {
  const value = "y".repeat(MIB - 100);
  await eachRow(t, ["x", "g"], async (typeflag) => {
    const before = Deno.memoryUsage().external;
    let largest = before;
    const chunks = function* () {
      for (let number = 0; number < 600; number++) {
        yield rawMembers(...flatParts(meta(typeflag, paxRecords({ [`comment.${number}`]: value }))));
        largest = Math.max(largest, Deno.memoryUsage().external);
      }
      yield tarOf(regular("a.whl"));
    };
    const fetch = () => Promise.resolve(new Response(ReadableStream.from(chunks())));
    using scratch = new Scratch();
    const ending = await fetchInTime("http://127.0.0.1/layer", { fetch, dest: scratch.at("dest") })
      .then(() => "extracted", (error) => error.kind);
    assert.match(ending, /^(?:extracted|integrity)$/);
    assert(largest - before < 200 * MIB, `${Math.round((largest - before) / MIB)} MiB`);
  });
});

/** Size of a layer that is extracted in a worker. */
const WORKER_LAYER_BYTES = 25 * MIB;
/** A hidden member that makes a layer large enough for the worker. */
const padding = () =>
  rawMembers(head(".padding", "0", { size: WORKER_LAYER_BYTES }), new Uint8Array(WORKER_LAYER_BYTES));
const imageOf = (tar: Bytes) => makeImage({ layers: [noise(300_000), gzip(tar)] });

type FormContext = { scratch: Scratch; registry: TestRegistry };

/** The ways in which an archive reaches the reader. */
// deno-fmt-ignore
const FORMS: Record<string, (tar: Bytes, place: FormContext) => [source: string, options?: FetchWheelsOptions]> = {
  "tar": (tar, { scratch }) => [scratch.at("layer.tar", tar)],
  "tar.gz": (tar, { scratch }) => [scratch.at("layer.tar.gz", gzip(tar))],
  "tar.zst": (tar, { scratch }) => [scratch.at("layer.tar.zst", zstd(tar))],
  "registry": (tar, { registry }) => [serveLayer(registry, gzip(tar))],
  "worker": (tar, { registry }) =>
    [serveLayer(registry, concat(padding(), tar), { mediaType: MEDIA.ociLayer }), { workerUrl: MODULE_URL }],
  "oci-archive": (tar, { scratch }) => [`oci-archive:${scratch.at("oci.tar", makeOciArchive(imageOf(tar)))}`],
  "docker-archive": (tar, { scratch }) =>
    [`docker-archive:${scratch.at("docker.tar", makeDockerArchive([noise(300_000), tar]))}`],
};

/** Why two members are skipped, their names, and the name of a wheel that is not. */
interface Skip {
  reason: string;
  names: [skipped: string, wheel: string, skipped: string];
  options?: FetchWheelsOptions;
  typeflag?: string;
}

// deno-fmt-ignore
const SKIPS: Skip[] = [
  { reason: "a hidden name", names: [".first", "a.whl", ".cache/pip/selfcheck.json"] },
  { reason: "--include", names: ["upper-constraints.txt", "a.whl", "second/b.txt"], options: ONLY_WHEELS },
  { reason: "--exclude", names: ["tests/a", "a.whl", "b.txt"], options: { exclude: ["tests", "*.txt"] } },
  { reason: "--strip-components", names: ["README", "w/a.whl", "LICENSE"], options: { stripComponents: 1 } },
  { reason: "a device", names: ["tty", "a.whl", "null"], typeflag: "3" },
  { reason: "an unknown type", names: ["first", "a.whl", "second"], typeflag: "Z" },
];

/** Returns a small skipped member, a wheel of this size, and a large skipped member. */
function skippingMembers({ names: [small, wheel, large], typeflag = "0" }: Skip, size: number): Bytes[] {
  const body = (size: number) => typeflag === "3" ? "" : noise(size);
  const members = [
    regular(small, body(100), { typeflag }),
    regular(wheel, noise(size)),
    regular(large, body(300_000), { typeflag }),
  ];
  return members.map((parts) => rawMembers(...flatParts(parts)));
}

Deno.test("a selected file after a skipped member is extracted completely", async (t) => {
  for (const [form, serve] of Object.entries(FORMS)) {
    for (const skip of SKIPS) {
      for (const size of [1000, 1_500_000]) {
        await t.step(`${form}, skipped for ${skip.reason}, then ${size} bytes`, async () => {
          using scratch = new Scratch();
          await using registry = startRegistry();
          const tar = concat(...skippingMembers(skip, size), new Uint8Array(1024));
          const [source, options] = serve(tar, { scratch, registry });
          const all = { protocol: "http", dest: scratch.at("dest"), ...skip.options, ...options } as const;
          const { skipped, files } = await fetchInTime(source, all);
          assert.deepEqual(snapshot(scratch.at("dest")), { "a.whl": `file 644 ${sha256(noise(size))}` });
          assert.deepEqual(files.map(({ path, size }) => [path, size]), [["a.whl", size]]);
          const others = skipped.map(({ path }) => path).filter((path) => path !== ".padding");
          assert.deepEqual(others, [skip.names[0], skip.names[2]]);
        });
      }
    }
  }
});

Deno.test("an archive that is damaged in or after a skipped member is refused", async (t) => {
  const end = new Uint8Array(1024);
  // deno-fmt-ignore
  const damages: [damage: string, apply: (members: Bytes[]) => Bytes][] = [
    ["cut in the first", ([small = end]) => small.subarray(0, 550)],
    ["cut in the last", (members) => concat(...members).subarray(0, -(members.at(-1)?.length ?? 0) / 2)],
    ["cut after the last", (members) => concat(...members)],
    ["followed by noise", (members) => concat(...members, noise(512), end)],
    ["followed by a bad size", (members) => concat(...members, head(".bad", "0", { size: "twelve" }), end)],
    ["followed by a wrong checksum", (members) => concat(...members, head(".bad", "0", { checksum: 1 }), end)],
  ];
  for (const [form, serve] of Object.entries(FORMS)) {
    // Two cases suffice for the worker, whose layers are large.
    const isSlow = form === "worker";
    for (const skip of isSlow ? SKIPS.slice(0, 1) : SKIPS) {
      for (const [damage, apply] of isSlow ? damages.slice(1, 3) : damages) {
        await t.step(`${form}, skipped for ${skip.reason}, ${damage}`, async () => {
          using scratch = new Scratch();
          await using registry = startRegistry();
          const [source, options] = serve(apply(skippingMembers(skip, 1000)), { scratch, registry });
          await assertRefused(source, "integrity", { protocol: "http", ...skip.options, ...options });
        });
      }
    }
  }
});

Deno.test("a pipe or a device is refused as an image archive", async (t) => {
  using scratch = new Scratch();
  assert(new Deno.Command("mkfifo", { args: [scratch.at("pipe")] }).outputSync().success);
  await eachRow(t, [`oci-archive:${scratch.at("pipe")}`, "docker-archive:/dev/null"], async (source) => {
    const stderr = await exits(2, [source]);
    assert.match(stderr, /: it is not a regular file\n.*hint: .*save it to a file first/);
  });
});

Deno.test("an image archive is refused when it is damaged or when its links lead in a circle", async (t) => {
  using scratch = new Scratch();
  const tar = tarOf(regular("a.whl"));
  const archives = { "oci-archive": makeOciArchive(imageOf(tar)), "docker-archive": makeDockerArchive([NOISE, tar]) };
  for (const [kind, archive] of Object.entries(archives)) {
    const offsets = headerOffsets(archive);
    const source = (bytes: Bytes) => `${kind}:${scratch.at("bad.tar", bytes)}`;
    for (const [at, offset] of offsets.entries()) {
      await t.step(`${kind}, header ${at + 1}`, async () => {
        await assertRefused(source(archive.slice(0, offset + 100)), "integrity");
        await assertRefused(source(archive.slice(0, offset + 515)), "integrity");
        await assertRefused(source(flip(archive, offset + 130)), "integrity");
      });
    }
  }
  const manifest = JSON.stringify([{ Config: "c.json", Layers: ["layer.tar"] }]);
  // deno-fmt-ignore
  const circles: [name: string, kind: string, ...parts: Parts][] = [
    ["a manifest that links to itself", "docker-archive", symlink("manifest.json", "manifest.json")],
    ["two links to each other", "docker-archive", symlink("manifest.json", "b"), symlink("b", "manifest.json")],
    ["a hard link to itself", "docker-archive", hardlink("manifest.json", "manifest.json")],
    ["a config that links to itself", "docker-archive", regular("manifest.json", manifest), symlink("c.json", "./c.json")],
    ["an index that links to itself", "oci-archive", symlink("index.json", "index.json")],
    ["a member of 8 PiB", "oci-archive", rawHeader({ name: "large", size: base256(Number.MAX_SAFE_INTEGER, 12) })],
  ];
  for (const [name, kind, ...parts] of circles) {
    const source = `${kind}:${scratch.at("circle.tar", tarOf(...parts))}`;
    await t.step(name, () => assertRefused(source, "integrity|unsafe|not-found"));
  }
});

Deno.test("hard links share one file", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", tarOf(regular("b"), hardlink("c", "b")));
  await fetchInTime(source, { dest: scratch.at("dest") });
  assert.equal(Deno.statSync(scratch.at("dest/c")).ino, Deno.statSync(scratch.at("dest/b")).ino);
});

Deno.test("mutated archives give files or an error of the right kind, and never change DEST on failure", async () => {
  const { cases } = await fuzz({ seed: 1, seconds: 4 });
  assert(cases > 20, `only ${cases} cases`);
});

// ---------------------------------------------------------------------------------------------------------------------
// 9 Extract
// ---------------------------------------------------------------------------------------------------------------------

function imageOfLayers(layers: string[]): MadeImage {
  return makeImage({ layers: layers.map((layer) => gzip(layerOf(layer))) });
}

function serveLayers(layers: string[]): TestRegistry {
  return serveImage({}, imageOfLayers(layers));
}

/** Extracts all layers of an image into a directory of its own. */
function extractAll(from: TestRegistry, options: FetchWheelsOptions = {}) {
  return extract(from, { layers: ["all"], ...options });
}

/** Layers that change each other, and the files of all of them together; umoci extracts some differently. */
// deno-fmt-ignore
const STACKS: [name: string, layers: string[], expected: string, odd?: "odd"][] = [
  ["directories are merged, files replaced", ["w/a w/b=old", "w/b=new w/c"], "w/a w/b=new w/c"],
  ["a whiteout removes a file", ["w/a w/b", "w/.wh.a"], "w/b"],
  ["a whiteout removes a directory", ["w/a w/sub/b x/c", ".wh.w"], "x/c"],
  ["a whiteout of something that does not exist", ["a", ".wh.none none/.wh.b none/c"], "a none/c"],
  ["a file removed by one layer and added by the next", ["w/a=old w/b", ".wh.w", "w/a=new"], "w/a=new"],
  ["a layer that occurs twice", ["a", ".wh.a b", "a"], "a b"],
  ["a whiteout before the file of its own layer", ["w/a=old", "w/.wh.a w/a=new"], "w/a=new"],
  ["a whiteout after the file of its own layer", ["w/a=old", "w/a=new w/.wh.a"], "w/a=new"],
  ["a whiteout of a directory that its own layer uses", ["w/a w/sub/b", "w/new .wh.w"], "w/new"],
  ["an opaque directory", ["w/a w/sub/b x/c", "w/ w/.wh..wh..opq w/new"], "w/new x/c"],
  ["an opaque directory, marked last", ["w/a w/sub/b", "w/sub/new w/new w/.wh..wh..opq"], "w/new w/sub/new"],
  ["an opaque root", ["w/a b", ".wh..wh..opq c"], "c"],
  ["a directory replaced by a file", ["w/a w/sub/b", "w=file"], "w=file"],
  ["a directory replaced by a link", ["w/a w/sub/b", "w->c c"], "c w->c"],
  ["a file replaced by a directory", ["w=file", "w/ w/a"], "w/a"],
  ["a link replaced by a file, which is not written through it", ["a link->a", "link=new"], "a link=new"],
  ["a file replaced by a link", ["a link=file", "link->a"], "a link->a"],
  ["a hard link to a file of an earlier layer", ["w/a", "w/b=>w/a"], "w/a w/b=w/a"],
  ["a hard link to a link of an earlier layer", ["a b->a", "c=>b"], "a b->a c->a"],
  ["a hard link to a file that is replaced, or removed", ["a=old c", "b=>a a=new d=>c", ".wh.c"], "a=new b=old d=c"],
  ["whiteouts of nothing, of a directory, and of its parent", ["w/a", "w/.wh. w/.wh.. w/.wh... w/b"], "w/a w/b", "odd"],
];

const hasUmoci = isInPath("umoci") && isInPath("tar");

/** Unpacks an image with umoci and returns its tree. */
function unpackByUmoci(layers: string[]): Record<string, string> {
  using scratch = new Scratch();
  const image = imageOfLayers(layers);
  const annotations = { "org.opencontainers.image.ref.name": "1.0" };
  const archive = makeOciArchive({ ...image, descriptor: { ...image.descriptor, annotations } });
  const script = `tar xf "$1" && umoci unpack ${isRoot ? "" : "--rootless"} --image .:1.0 bundle`;
  const args = ["-c", script, "sh", scratch.at("image.tar", archive)];
  const { success, stderr } = new Deno.Command("sh", { args, cwd: scratch.path }).outputSync();
  assert(success, new TextDecoder().decode(stderr));
  return contents(scratch.at("bundle/rootfs"));
}

Deno.test(`layers are applied base first, with whiteouts${hasUmoci ? ", as umoci does" : ""}`, async (t) => {
  await eachRow(t, STACKS, async ([, layers, text, isUmociOdd]) => {
    await using registry = serveLayers(layers);
    const { files, tree, paths } = await extractAll(registry);
    assert.deepEqual(tree, treeOf(text));
    const listed = (await extractAll(registry, { list: true })).files;
    for (const reported of [files, listed]) assert.deepEqual(reported.map(({ path }) => path).sort(), paths);
    if (hasUmoci && isUmociOdd === undefined) assert.deepEqual(unpackByUmoci(layers), tree);
  });
  await t.step("in a worker", async () => {
    const filler = new Uint8Array(25 << 20);
    const base = tarOf(file("big", filler));
    const layers = [base, ...["w/a w/b", "w/.wh.a big=small", "w/c=>w/b"].map(layerOf)];
    await using registry = serveImage({}, makeImage({ layers }));
    const workerUrl = MODULE_URL;
    assert.deepEqual((await extractAll(registry, { workerUrl })).tree, treeOf("big=small w/b w/c=w/b"));
    await using hostile = serveImage({}, makeImage({ layers: [...layers, layerOf("../evil")] }));
    await assertFails(() => extractAll(hostile, { workerUrl }), "unsafe", /\.\.\/evil/);
  });
});

Deno.test("thousands of members that replace each other take no longer than others", async () => {
  const layer = Array.from({ length: 5000 }, (_, at) => `w/${at}`).join(" ");
  const whiteouts = Array.from({ length: 5000 }, (_, at) => `w/.wh.${at}`).join(" ");
  const names = (form: (at: number) => string) => Array.from({ length: 15_000 }, (_, at) => form(at)).join(" ");
  const directories = names((at) => `${at}/`);
  const opaque = `${layer} ${"w/.wh..wh..opq ".repeat(8000).trim()}`;
  const table: [layers: string[], count: number][] = [
    [[layer, layer, ".wh.w"], 0],
    [[layer, whiteouts], 0],
    [[`${layer} ${whiteouts}`, ".wh.w"], 0],
    [[directories, names((at) => `.wh.${at}`)], 0],
    [[directories, names((at) => `${at}`)], 15_000],
    [[layer, opaque], 5000],
  ];
  for (const [layers, count] of table) {
    await using registry = serveLayers(layers);
    const started = performance.now();
    const { files } = await extractAll(registry, { list: true });
    assert.equal(files.length, count);
    assert(performance.now() - started < 2000, `${performance.now() - started} ms`);
  }
});

Deno.test("long links and titles take no longer than others", async (t) => {
  const deep = "a/".repeat(250);
  const links = Array.from({ length: 39 }, (_, at) => {
    return [pax({ path: `${deep}${at}`, linkpath: `${"../a/".repeat(800)}${at + 1}` }), head("l", "2")];
  });
  const files = Array.from({ length: 3000 }, (_, at) => head(`${at % 5}`, "0"));
  const table: [name: string, tar: Bytes, count: number][] = [
    ["a chain of symbolic links", tarOf(...links, pax({ path: `${deep}39` }), regular("x")), 40],
    ["a global link name", tarOf(meta("g", paxRecords({ linkpath: "y".repeat(MIB - 100) })), ...files), 5],
  ];
  await eachRow(t, table, async ([, tar, count]) => {
    using scratch = new Scratch();
    const started = performance.now();
    const { files } = await fetchWheels(scratch.at("layer.tar", tar), { list: true });
    assert.equal(files.length, count);
    assert(performance.now() - started < 2000, `${performance.now() - started} ms`);
  });
  await t.step("a title", async () => {
    await using registry = serveArtifact({ layers: [{ title: `${"a/".repeat(50_000)}b`, data: "" }] });
    await assertFails(() => extract(registry, ONLY_WHEELS), "integrity", /255 components/);
  });
});

Deno.test("whiteouts are applied before --include and --strip-components", async () => {
  await using registry = serveLayers([
    "wheels/a.whl wheels/b.whl old/deep/c.whl etc/passwd",
    "wheels/.wh.b.whl .wh.old wheels/d.whl bin/sh",
  ]);
  const include = ["wheels/*.whl", "old/**"];
  const { tree } = await extractAll(registry, { include, stripComponents: 1 });
  assert.deepEqual(tree, { "a.whl": "wheels/a.whl", "d.whl": "wheels/d.whl" });
  const { paths } = await extractAll(registry, { include: ["*", ".*"] });
  assert.deepEqual(paths, ["bin/sh", "etc/passwd", "wheels/a.whl", "wheels/d.whl"]);
});

Deno.test("what a skipped member of a later layer replaces is not extracted", async (t) => {
  const table: [name: string, upper: Uint8Array, expected: string][] = [
    ["a directory by a file", layerOf("w"), "b.whl"],
    ["a directory by a symbolic link", layerOf("w->opt"), "b.whl"],
    ["a file by a FIFO", tarOf([rawHeader({ name: "w/a.whl", typeflag: "6" })]), "b.whl"],
    ["a directory by itself", tarOf(directory("w")), "b.whl w/a.whl"],
  ];
  await eachRow(t, table, async ([, upper, expected]) => {
    await using registry = serveImage({}, makeImage({ layers: [layerOf("w/a.whl b.whl"), upper] }));
    assert.equal((await extractAll(registry, ONLY_WHEELS)).paths.join(" "), expected);
  });
});

Deno.test("a hard link to a member that is not there says why", async (t) => {
  const table: [layers: string[], options: FetchWheelsOptions, message: RegExp, hint: RegExp][] = [
    [["a.whl", "b.whl=>a.whl"], { layers: ["last"] }, /"a\.whl".*not an earlier file/, /--layer all/],
    [["a.txt b.whl=>a.txt"], { include: ["*.whl"] }, /"a\.txt".*not selected/, /select/],
    [["w/a", "w=>w/a"], {}, /"w\/a".*not an earlier file/, /./],
    [["a=>a"], {}, /"a"/, /./],
  ];
  await eachRow(t, table, async ([layers, options, message, hint]) => {
    await using registry = serveLayers(layers);
    assert.match((await assertFails(() => extractAll(registry, options), "integrity", message)).hint ?? "", hint);
  });
});

Deno.test("the next layer is downloaded while the previous one is extracted", async () => {
  using scratch = new Scratch();
  const size = 64 << 20;
  const first = gzip(await makeTar([{ name: "big.bin", data: new Uint8Array(size) }]));
  const second = gzip(layerOf("a.whl"));
  let extracted: number | undefined;
  const onRequest = answerTo(sha256(second), () => {
    extracted ??= sizeBelow(scratch.path, "big.bin");
    return undefined;
  });
  await using registry = serveImage({ onRequest }, makeImage({ layers: [first, second] }));
  await fetchWheels(sourceOf(registry), { ...PLAIN, layers: ["all"], dest: scratch.at("dest") });
  assert(extracted !== undefined && extracted < size, `${extracted} of ${size} bytes were extracted`);
  assert.equal(Deno.statSync(scratch.at("dest/big.bin")).size, size);
});

Deno.test("all layers are verified before anything is published", async () => {
  const layers = ["a.whl", "b.whl", "c.whl"];
  for (const bad of layers) {
    await using registry = serveLayers(layers);
    registry.pushBlob(gzip(layerOf("x.whl")), sha256(gzip(layerOf(bad))));
    await assertRefused(sourceOf(registry), "integrity", { layers: ["all"], protocol: "http" });
  }
});

Deno.test("an image without wheels is warned about, and --layer named if there are other layers", async (t) => {
  // deno-fmt-ignore
  const table: [name: string, layers: string[], options: FetchWheelsOptions, expected: RegExp][] = [
    ["the wheels are in another layer", ["a.whl", "notes.txt"], { layers: ["last"] }, /layer 2 of 2.*--layer all/],
    ["all layers are selected", ["a.whl", "notes.txt"], {}, /^$/],
    ["no layer has a wheel", ["a.txt", "notes.txt"], {}, /^no wheels found$/],
    ["the last layer has a wheel", ["notes.txt", "a.WHL"], { layers: ["last"] }, /^$/],
    ["there is one layer", ["notes.txt"], {}, /^no wheels found$/],
    ["--list", ["notes.txt"], { list: true }, /^no wheels found$/],
    ["two of three layers", ["a", "b", "c"], { layers: ["1", "2"] }, /found in 2 of 3 layers; --layer all/],
  ];
  await eachRow(t, table, async ([, layers, options, expected]) => {
    await using registry = serveLayers(layers);
    assert.match((await extractAll(registry, options)).warnings.join("\n"), expected);
  });
  await t.step("no hint at other layers if all were used", async () => {
    await using registry = serveLayers([".x", ".y"]);
    assert.equal((await assertFails(extractAll(registry), "not-found")).hint, undefined);
    assert.match((await assertFails(extractAll(registry, { layers: ["1"] }), "not-found")).hint ?? "", /--layer all/);
  });
  await t.step("artifacts", async () => {
    const layers = [{ title: "a.txt", data: "a" }, await makeDirectoryLayer("dir", [{ name: "x.whl" }])];
    await using registry = serveArtifact({ layers });
    const options = { exclude: ["dir"], layers: ["last"] };
    assert.deepEqual((await extractAll(registry, options)).warnings, ["no wheels found"]);
    assert.deepEqual((await extractAll(registry, { list: true, layers: ["last"] })).warnings, []);
    await using archives = serveArtifact({ layers: [".x", ".y"].map((text) => ({ data: layerOf(text) })) });
    const { hint } = await assertFails(extractAll(archives, { layers: ["1"] }), "not-found");
    assert.equal(hint, undefined);
    const link = await makeDirectoryLayer("dir", [{ name: "x", type: "link", linkname: "dir/none" }]);
    await using linked = serveArtifact({ layers: [link] });
    assert.equal((await assertFails(extract(linked), "integrity", /hard link/)).hint, undefined);
  });
});

Deno.test("wheels for another machine are warned about", async (t) => {
  // deno-fmt-ignore
  const table: [platform: string, fitting: string, foreign: string][] = [
    ["linux/amd64", "any manylinux_2_17_x86_64.manylinux2014_x86_64 LINUX_X86_64",
      "linux_aarch64 win_amd64 macosx_11_0_x86_64"],
    ["linux/arm64", "linux_aarch64 musllinux_1_2_aarch64 win_amd64.linux_aarch64", "manylinux2014_x86_64 linux_armv7l"],
    ["linux/386", "manylinux1_i686 linux_i386", "linux_x86_64 win32"],
    ["linux/arm/v7", "linux_armv7l musllinux_1_1_armv7l linux_armv6l linux_armv8l", "linux_aarch64"],
    ["linux/arm/v6", "linux_armv6l", "linux_armv7l linux_armv8l"],
    ["linux/arm/v5", "linux_armv5tel", "linux_armv6l"],
    ["linux/loong64", "linux_loongarch64", "linux_x86_64"],
    ["linux/mips64le", "linux_mips64 linux_mips64el", "linux_mips"],
    ["linux/s390x", "linux_s390x", "linux_ppc64le"],
    ["windows/amd64", "win_amd64 WIN_AMD64 any", "manylinux2014_x86_64 win32 win_arm64"],
    ["windows/386", "win32", "win_amd64"],
    ["darwin/arm64", "macosx_11_0_arm64 macosx_10_9_universal2", "macosx_10_9_x86_64 linux_aarch64"],
    ["darwin/amd64", "macosx_10_9_x86_64 macosx_10_9_intel", "macosx_11_0_arm64"],
  ];
  await eachRow(t, table, async ([platform, fitting, foreign]) => {
    for (const tag of [...fitting.split(" "), ...foreign.split(" ")]) {
      using scratch = new Scratch();
      const source = scratch.at("layer.tar", layerOf(`sub/a-1-1b-cp312-cp312-${tag}.whl b.whl`));
      const { stderr } = await expectCode(0, ["--platform", platform, "-d", scratch.at("dest"), source]);
      assert.equal(/warning: .*not built for/.test(stderr), foreign.split(" ").includes(tag), `${tag}: ${stderr}`);
      assert.doesNotMatch(stderr, /image/); // a tarball is not an image
    }
  });
  await t.step("an image", async () => {
    await using registry = serveLayers([[1, 2, 3, 4, 5].map((at) => `a-${at}-py3-none-win32.whl`).join(" ")]);
    assert.match((await extractAll(registry)).warnings.join(), /linux\/amd64.*image.*"a-1-py3.*and 2 more$/);
  });
});

// ---------------------------------------------------------------------------------------------------------------------
// 10 Publish
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("publishing into DEST adds and replaces files, keeps the others, and places text files last", async () => {
  using scratch = new Scratch();
  const dest = scratch.at("dest");
  scratch.at("dest/a.whl", "old");
  scratch.at("dest/kept.whl", "kept");
  scratch.at("dest/sub/kept.txt", "kept");
  Deno.chmodSync(scratch.at("dest/sub"), 0o750);
  const names = ["a.txt", "a.whl", "sub/b.txt", "sub/b.whl", "z.whl"];
  const source = scratch.at("layer.tar", layerOf(names.map((name) => `${name}=new`).join(" ")));
  using watcher = Deno.watchFs(dest);
  await fetchWheels(source, { dest });
  scratch.at("dest/over", "");

  const fresh = Object.fromEntries(names.map((name) => [name, "new"]));
  assert.deepEqual(contents(dest), { ...fresh, "kept.whl": "kept", "sub/kept.txt": "kept", sub: "/", over: "" });
  assert.equal((Deno.statSync(scratch.at("dest/sub")).mode ?? 0) & 0o777, 0o750);
  const appeared = new Set<string>();
  for await (const { paths } of watcher) {
    paths.map((path) => path.slice(dest.length + 1)).forEach((name) => names.includes(name) && appeared.add(name));
    if (paths.some((path) => path.endsWith("/over"))) break;
  }
  assert.deepEqual([...appeared].map((name) => name.slice(-3)), ["whl", "whl", "whl", "txt", "txt"]);
});

Deno.test("DEST is unchanged if something stands in the way", async (t) => {
  // deno-fmt-ignore
  const table: [name: string, kind: string, make: (scratch: Scratch) => void][] = [
    ["a directory in a file's place", "io", (scratch) => scratch.at("dest/z.whl/full", "")],
    ["an empty directory in a file's place", "io", (scratch) => Deno.mkdirSync(scratch.at("dest/z.whl"))],
    ["a directory in the last text's place", "io", (scratch) => Deno.mkdirSync(scratch.at("dest/y.txt"))],
    ["a file in a directory's place", "io", (scratch) => scratch.at("dest/new", "")],
    ["a link in a directory's place", "unsafe", (scratch) => Deno.symlinkSync("../outside", scratch.at("dest/new"))],
    ["a link to nothing in its place", "unsafe", (scratch) => Deno.symlinkSync("../none", scratch.at("dest/new"))],
  ];
  await eachRow(t, table, async ([, kind, make]) => {
    using scratch = new Scratch();
    scratch.at("outside/b.whl", "outside");
    scratch.at("dest/a.whl", "old");
    scratch.at("dest/sub/c.whl", "old");
    make(scratch);
    const source = scratch.at("layer.tar", layerOf("a.whl=new new/b.whl=new sub/c.whl=new y.txt=new z.whl=new"));
    const before = snapshot(scratch.path);
    await assertFails(fetchWheels(source, { dest: scratch.at("dest") }), kind);
    assert.deepEqual(snapshot(scratch.path), before);
  });
});

Deno.test("a symbolic link in DEST is replaced, not written through; DEST itself may be one", async () => {
  using scratch = new Scratch();
  scratch.at("outside.whl", "outside");
  Deno.mkdirSync(scratch.at("real"));
  Deno.symlinkSync("../outside.whl", scratch.at("real/a.whl"));
  Deno.symlinkSync("real", scratch.at("dest"));
  await fetchWheels(scratch.at("layer.tar", layerOf("a.whl=new")), { dest: scratch.at("dest") });
  assert.deepEqual(contents(scratch.at("real")), { "a.whl": "new" });
  assert.equal(Deno.readTextFileSync(scratch.at("outside.whl")), "outside");
  assert.equal(Deno.readLinkSync(scratch.at("dest")), "real");
});

Deno.test("two runs to one DEST at the same time both succeed", async () => {
  using scratch = new Scratch();
  const sources = ["one", "two"].map((name) => scratch.at(name, layerOf(`${name}.whl both sub/${name}`)));
  const dest = scratch.at("new/dest");
  await Promise.all(sources.map((source) => fetchWheels(source, { dest })));
  const expected = ["both", "one.whl", "sub", "sub/one", "sub/two", "two.whl"];
  assert.deepEqual(Object.keys(contents(dest)).sort(), expected);
  assert.deepEqual([...Deno.readDirSync(scratch.at("new"))].map(({ name }) => name), ["dest"]);
});

Deno.test("a run waits while another publishes into DEST, and a signal ends the wait", async (t) => {
  for (const place of ["there", "absent"]) {
    for (const end of ["unlock", "abort"] as const) {
      await t.step(`${place}, ${end}`, async () => {
        using scratch = new Scratch();
        const source = scratch.at("layer.tar", layerOf("a.whl"));
        if (place === "there") Deno.mkdirSync(scratch.at(place));
        const before = snapshot(scratch.path);
        using other = Deno.openSync(place === "there" ? scratch.at(place) : scratch.path);
        other.lockSync(true);
        const waiting = Promise.withResolvers<void>();
        using _ = stub(Deno.FsFile.prototype, "tryLockSync", (tryLock) =>
          function (this: Deno.FsFile, isExclusive) {
            const isLocked = tryLock.call(this, isExclusive);
            if (!isLocked && this.statSync().isDirectory) waiting.resolve();
            return isLocked;
          });
        const controller = new AbortController();
        const fetching = fetchWheels(source, { dest: scratch.at(place), signal: controller.signal });
        await Promise.race([waiting.promise, fetching.then(() => assert.fail("it did not wait"))]);
        if (end === "abort") {
          controller.abort(new Error("enough"));
          await assert.rejects(fetching, /enough/);
          return assert.deepEqual(snapshot(scratch.path), before);
        }
        other.unlockSync();
        await fetching;
        assert.deepEqual(contents(scratch.at(place)), { "a.whl": "a.whl" });
      });
    }
  }
  await t.step("a directory that cannot be opened is not locked", async () => {
    using scratch = new Scratch();
    const source = scratch.at("layer.tar", layerOf("a.whl"));
    const dest = scratch.at("dest");
    let refused = 0;
    using _ = stub(Deno, "openSync", (open) => (path, options) => {
      if (path !== scratch.path) return open(path, options);
      refused++;
      throw systemError("EACCES");
    });
    await fetchWheels(source, { dest });
    assert.equal(refused, 1);
    assert.deepEqual(contents(dest), { "a.whl": "a.whl" });
  });
});

Deno.test("the lock of a staging directory appears under its name only when it is locked", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl"));
  const names: (string | undefined)[] = [];
  using _ = stub(Deno.FsFile.prototype, "tryLockSync", (tryLock) =>
    function (this: Deno.FsFile, isExclusive) {
      names.push(Object.keys(snapshot(scratch.path)).find((path) => path.includes("/lock")));
      return tryLock.call(this, isExclusive);
    });
  await fetchWheels(source, { dest: scratch.at("dest") });
  assert(names[0]?.endsWith("/lock.new") && names[1]?.endsWith("/lock"), names.join());
});

Deno.test("an abort stops a download, with its own reason, and leaves nothing", async () => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, NOISE);
  registry.faults = [{ kind: "stall", byte: 150_000 }];
  using scratch = new Scratch();
  const controller = new AbortController();
  const reason = new Error("enough");
  const onProgress = ({ type }: { type: string }) => type === "bytes" && controller.abort(reason);
  for (const options of [{ signal: controller.signal, onProgress }, { signal: AbortSignal.abort(reason) }]) {
    const fetching = fetchWheels(reference, { dest: scratch.at("new/dest"), ...options });
    await assert.rejects(fetching, (error) => error === reason);
    assert.deepEqual(snapshot(scratch.path), {});
  }
});

Deno.test("an abort ends the extraction of what has arrived already, and leaves nothing", async (t) => {
  using scratch = new Scratch();
  const members = Array.from({ length: 3000 }, (_, at) => file(`${at}.whl`, ""));
  const source = scratch.at("layer.tar.gz", gzip(tarOf(...members)));
  await eachRow(t, ["dest", "list"], async (mode) => {
    const controller = new AbortController();
    let count = 0;
    const onProgress = ({ type }: ProgressEvent) => {
      if (type === "extracted") count++;
      if (count === 10) controller.abort(new Error("enough"));
    };
    const options = { signal: controller.signal, onProgress, list: mode === "list" };
    await assert.rejects(fetchWheels(source, { dest: scratch.at("dest"), ...options }), /enough/);
    assert.equal(count, 10);
    assert.deepEqual(Object.keys(snapshot(scratch.path)), ["layer.tar.gz"]);
  });
});

Deno.test("a staging directory loses its lock last, so that the next run can remove the rest", async () => {
  using scratch = new Scratch();
  const removed: string[] = [];
  using _stub = stub(Deno, "removeSync", (remove) => (path) => {
    removed.push(basename(String(path)));
    remove(path);
  });
  const source = scratch.at("layer.tar", rawMembers(...flatParts(regular("z.whl"))));
  await assertFails(fetchWheels(source, { dest: scratch.at("dest") }), "integrity");
  assert.deepEqual(removed, ["z.whl", "lock"]);
});

Deno.test("the staging directory of a live run is kept, and that of a dead one removed", async () => {
  await using registry = startRegistry();
  const wheel = randomBytes(2 << 20);
  const layer = gzip(await makeTar([{ name: "a.whl", data: wheel }]));
  const reference = serveLayer(registry, layer);
  for (const place of ["there", "absent"]) {
    using scratch = new Scratch();
    if (place === "there") Deno.mkdirSync(scratch.at(place));
    const parent = place === "there" ? scratch.at(place) : scratch.path;
    const hidden = () => [...Deno.readDirSync(parent)].map(({ name }) => name).filter((name) => name.startsWith("."));
    registry.faults = [{ kind: "stall", byte: layer.length >> 1 }];
    const start = async () => {
      const before = hidden();
      const child = spawnProgram(["--protocol", "http", "-d", scratch.at(place), reference]);
      const fresh = () => hidden().find((name) => !before.includes(name)) ?? "none";
      await waitFor(() => fresh() !== "none" && "new/a.whl" in snapshot(join(parent, fresh())));
      return { child, staging: fresh() };
    };
    const live = await start();
    const dead = await start();
    dead.child.kill("SIGKILL");
    await dead.child.output();
    assert.deepEqual(hidden().toSorted(), [live.staging, dead.staging].toSorted());
    registry.faults = [];
    await fetchWheels(reference, { dest: scratch.at(place), protocol: "http" });
    assert.deepEqual(hidden(), [live.staging]);
    Deno.removeSync(scratch.at(`${place}/a.whl`));
    registry.dropConnections();
    const { code, stderr } = await live.child.output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
    assert.deepEqual(Object.keys(snapshot(scratch.path)), [place, `${place}/a.whl`]);
    assertSame(Deno.readFileSync(scratch.at(`${place}/a.whl`)), wheel);
  }
});

/** Ways to publish: into a new DEST, into one with files, and with `--clean`. */
const PUBLICATIONS: [name: string, clean: boolean, isThere: boolean][] = [
  ["a new DEST", false, false],
  ["an existing DEST", false, true],
  ["--clean", true, true],
];

/** A scratch directory with a DEST, and a source that adds, replaces and removes files of DEST. */
function startPublication(isThere: boolean) {
  const scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl=new sub/b.whl=new fresh/c.whl=new c.txt=new"));
  const bad = scratch.at("bad.tar", "not an archive");
  const dest = scratch.at("new/dest");
  Deno.mkdirSync(scratch.at("new"));
  const old = isThere ? ["a.whl", "sub/b.whl", "sub/kept.whl", "kept.txt"] : [];
  old.forEach((name) => scratch.at(`new/dest/${name}`, "old"));
  return { scratch, source, bad, dest, before: snapshot(scratch.path) };
}

const PUBLISHED = { "a.whl": "new", "sub/b.whl": "new", "fresh/c.whl": "new", "c.txt": "new", fresh: "/", sub: "/" };

for (const [name, clean, isThere] of PUBLICATIONS) {
  const expected = clean || !isThere ? PUBLISHED : { ...PUBLISHED, "sub/kept.whl": "old", "kept.txt": "old" };

  Deno.test(`every rename may fail: ${name}`, async (t) => {
    for (const code of ["EXDEV", "EBUSY", "EPERM", "EIO"]) {
      let hasFailed = true;
      for (let first = 0; hasFailed; first++) {
        for (const last of [first, Infinity]) {
          await t.step(`${code} from ${first} to ${last}`, async () => {
            const { scratch, source, dest, before } = startPublication(isThere);
            using _ = scratch;
            using failing = failingRenames(code, first, last);
            const error = await fetchWheels(source, { dest, clean }).then(() => undefined, (error) => error);
            hasFailed = failing.count > first;
            failing[Symbol.dispose]();
            if (error === undefined) return assert.deepEqual(contents(dest), expected);
            assert(error instanceof FetchWheelsError && error.kind === "io", `${error?.stack}`);
            // What could not be put back is kept for the next run.
            if (last === Infinity) await fetchWheels(scratch.at("bad.tar"), { dest }).catch(() => {});
            assert.deepEqual(snapshot(scratch.path), before);
          });
        }
      }
    }
  });

  Deno.test(`a run that fails restores what a killed run had moved away: ${name}`, async (t) => {
    for (const isCopied of [false, true]) {
      let isKilled = true;
      for (let changes = 1; isKilled; changes++) {
        await t.step(`${isCopied ? "copies" : "renames"}, killed before change ${changes}`, async () => {
          const { scratch, source, bad, dest, before } = startPublication(isThere);
          using _ = scratch;
          const script = scratch.at(
            "killed.ts",
            `
            import { fetchWheels } from ${JSON.stringify(PROGRAM)};
            const { renameSync, removeSync } = Deno;
            let left = ${changes};
            const count = () => left-- === 0 && Deno.kill(Deno.pid, "SIGKILL");
            Deno.removeSync = (path, options) => {
              count();
              removeSync(path, options);
              if (/\\/journal$/.test(path)) left = Infinity; // the new state holds
            };
            Deno.renameSync = (from, to) => {
              count();
              const isStaged = /fetch_wheels-[^/]*\\/(?:new|old)(?:\\/| |$)/.test(from + " " + to);
              const isPart = from.endsWith(".part");
              if (${isCopied} && isStaged && !isPart) throw Object.assign(new Error("refused"), { code: "EXDEV" });
              renameSync(from, to);
              if (to === ${JSON.stringify(dest)}) left = Infinity;
            };
            await fetchWheels(${JSON.stringify(source)}, { dest: ${JSON.stringify(dest)}, clean: ${clean} });`,
          );
          const { signal, code, stderr } = await spawnDeno(["run", "--no-check", ...PERMISSIONS, script]).output();
          Deno.removeSync(script);
          isKilled = signal === "SIGKILL";
          if (!isKilled) assert.equal(code, 0, new TextDecoder().decode(stderr));
          Deno.renameSync(scratch.at("new"), scratch.at("moved"));
          await assertFails(fetchWheels(bad, { dest: scratch.at("moved/dest"), clean }), "integrity");
          Deno.renameSync(scratch.at("moved"), scratch.at("new"));
          // Of a new DEST that could not be renamed into place, the directory stays.
          if (isKilled && isCopied && !isThere) Deno.mkdirSync(scratch.at("new/dest"), { recursive: true });
          const restored = isCopied && !isThere ? { ...before, "new/dest": "directory 755" } : before;
          if (isKilled) assert.deepEqual(snapshot(scratch.path), restored);
          else assert.deepEqual(contents(dest), expected);
        });
      }
    }
  });

  Deno.test(`a signal ends a publication that copies: ${name}`, async () => {
    const { scratch, source, dest, before } = startPublication(isThere);
    using _ = scratch;
    let copies = 0;
    const controller = new AbortController();
    using _rename = stub(Deno, "renameSync", (rename) => (from, to) => {
      const isCopy = /\.part$/.test(`${from}`);
      if (isCopy && ++copies === 2) controller.abort(new Error("enough"));
      for (const started = performance.now(); isCopy && performance.now() - started < 60;);
      if (!isCopy && /fetch_wheels-[^/]*\/(?:new|old)(?:\/| |$)/.test(`${from} ${to}`)) throw systemError("EXDEV");
      return rename(from, to);
    });
    await assert.rejects(fetchWheels(source, { dest, clean, signal: controller.signal }), /enough/);
    assert.deepEqual(snapshot(scratch.path), before);
  });
}

/** What a test needs that not every machine has. */
interface Need {
  name: string;
  isMet: boolean;
}

/** Declares a test that is ignored, and says why, if its need is not met. */
function testWith({ name: needed, isMet }: Need, name: string, fn: (t: Deno.TestContext) => Promise<void>): void {
  Deno.test({ name: isMet ? name : `${name} (needs ${needed})`, ignore: !isMet, fn });
}

const ROOT: Need = { name: "root", isMet: isRoot };

testWith(ROOT, "a journal of another user is not followed", async () => {
  using scratch = new Scratch();
  const staging = ".dest.fetch_wheels-1-0123abcd";
  const journal = { steps: [{ action: "take", path: "authorized_keys" }] };
  scratch.at(`${staging}/old/0`, "evil");
  scratch.at(`${staging}/journal`, JSON.stringify(journal));
  scratch.at(`${staging}/lock`, "");
  scratch.at("dest/authorized_keys", "good");
  Deno.chownSync(scratch.at(staging), 1234, 1234);
  const before = snapshot(scratch.path);
  await assertFails(fetchWheels(scratch.at("none.tar"), { dest: scratch.at("dest") }), "not-found");
  assert.deepEqual(snapshot(scratch.path), before);
  Deno.chownSync(scratch.at(staging), Deno.uid(), Deno.gid()); // so that the test can fail: its own is followed
  await assertFails(fetchWheels(scratch.at("none.tar"), { dest: scratch.at("dest") }), "not-found");
  assert.equal(Deno.readTextFileSync(scratch.at("dest/authorized_keys")), "evil");
});

Deno.test("a file system without locks is used without them; another failure to lock leaves nothing", async (t) => {
  const table = [["ENOSYS", 0], ["ENOLCK", 0], ["EOPNOTSUPP", 0], ["EIO", 8]] as const;
  await eachRow(t, table, async ([code, expected]) => {
    using scratch = new Scratch();
    const source = scratch.at("layer.tar", layerOf("a.whl"));
    scratch.at("there/old.whl", "old");
    const before = snapshot(scratch.path);
    using _ = stub(Deno.FsFile.prototype, "tryLockSync", () => () => {
      throw systemError(code);
    });
    for (const target of ["-d there", "-d new/dest", "-o out"]) {
      const [option = "", path = ""] = target.split(" ");
      const { code: status, lines } = await run([option, scratch.at(path), source]);
      assert.equal(status, expected, lines.join("\n"));
      if (expected !== 0) assert.deepEqual(snapshot(scratch.path), before);
      assert(!Object.keys(snapshot(scratch.path)).some((path) => path.includes("fetch_wheels")));
    }
  });
});

Deno.test("DEST that cannot be used fails before any request", async (t) => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, gzip(layerOf("a.whl")));
  using scratch = new Scratch();
  scratch.at("file", "file");
  Deno.symlinkSync("none", scratch.at("dangling"));
  Deno.symlinkSync("loop", scratch.at("loop"));
  const before = snapshot(scratch.path);
  await eachRow(t, ["file", "file/below", "dangling", "dangling/below", "loop"], async (dest) => {
    const error = await assertFails(fetchWheels(reference, { dest: scratch.at(dest) }), "io");
    assert(error.message.includes(scratch.path), error.message);
    assert.deepEqual(snapshot(scratch.path), before);
  });
  assert.deepEqual(registry.requests, []);
});

Deno.test("a name of 250 bytes is not too long for DEST or an output file", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl"));
  const name = "é".repeat(125);
  await fetchWheels(source, { dest: scratch.at(name) });
  await fetchWheels(source, { dest: scratch.at(name), clean: true });
  assert.deepEqual(contents(scratch.at(name)), { "a.whl": "a.whl" });
  await fetchWheels(source, { output: scratch.at(`${name}.tar`) });
  assert.deepEqual(Object.keys(snapshot(scratch.path)).length, 4);
});

/** Starts the program without these rights of root. */
function without(...capabilities: string[]): string[] {
  const dropped = capabilities.map((name) => `-${name}`).join(",");
  return isRoot ? ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped] : [];
}

const SETPRIV: Need = { name: "setpriv", isMet: !isRoot || isInstalled("setpriv") };

testWith(SETPRIV, "a DEST without the needed permissions fails and is unchanged", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl"));
  scratch.at("dest/old.whl", "old");
  const table: [mode: number, target: string[]][] = [
    [0o555, ["-d", "dest"]],
    [0o555, ["-d", "dest", "--clean"]],
    [0o333, ["-d", "dest", "--clean"]],
    [0o555, ["-d", "dest/new"]],
    [0o555, ["-o", "dest/out"]],
  ];
  for (const [mode, target] of table.filter(([mode]) => isRoot || mode !== 0o333)) {
    Deno.chmodSync(scratch.at("dest"), mode);
    const before = snapshot(scratch.path);
    const through = without("dac_override", "dac_read_search");
    const { lines } = await expectCode(8, [...target, source], { through, cwd: scratch.path }, runProgram);
    assert.match(lines[0] ?? "", /permission denied/i);
    assert.deepEqual(snapshot(scratch.path), before);
  }
});

const canMount = canMountHere();
const MOUNT: Need = { name: "root and mount", isMet: canMount };
const MOUNT_AND_SETPRIV: Need = { name: "root, mount and setpriv", isMet: canMount && SETPRIV.isMet };

testWith(MOUNT, "a full disk is an error, and DEST is unchanged", async (t) => {
  using scratch = new Scratch();
  const wheel = "x".repeat(2 << 20);
  const source = scratch.at("layer.tar", await makeTar([{ name: "a.whl" }, { name: "b.whl", data: wheel }]));
  const small = scratch.at("small.tar", layerOf("a.whl sub/b.whl"));
  const [disk, dest] = [scratch.at("disk"), scratch.at("disk/there")];
  const others = [{ dest: scratch.at("disk/new/dest") }, { output: scratch.at("disk/out") }];
  const targets: FetchWheelsOptions[] = [{ dest }, { dest, clean: true }, ...others];
  /** Fetches to a disk with this limit, which is unchanged if that fails. Returns the error. */
  const fetchTo = async (limit: string, source: string, options: FetchWheelsOptions) => {
    using _ = new Mount(disk, "-t", "tmpfs", "-o", limit, "none");
    scratch.at("disk/there/a.whl", "old");
    const before = snapshot(disk);
    const error = await fetchWheels(source, options).then(() => undefined, (error) => error);
    if (error === undefined) return undefined;
    assert(error instanceof FetchWheelsError && error.kind === "io", `${error?.stack}`);
    assert.deepEqual(snapshot(disk), before, limit);
    return error;
  };
  for (const options of targets) {
    const name = JSON.stringify(options).replaceAll(`${disk}/`, "");
    await t.step(`blocks: ${name}`, async () => {
      assert.match((await fetchTo("size=1m", source, options))?.message ?? "", /no space/);
    });
    await t.step(`inodes: ${name}`, async () => {
      let inodes = 3;
      while (await fetchTo(`nr_inodes=${inodes}`, small, options)) inodes++;
      assert(inodes >= ("output" in options ? 4 : 6), `${inodes}`);
    });
  }
});

testWith(MOUNT, "a full disk that is mounted in DEST leaves DEST unchanged", async () => {
  const wheels = [{ name: "sub/a.whl" }, { name: "sub/b.whl", data: "x".repeat(2 << 20) }, { name: "c.whl" }];
  for (const clean of [false, true]) {
    using scratch = new Scratch();
    const source = scratch.at("layer.tar", await makeTar(wheels));
    using _ = new Mount(scratch.at("dest/sub"), "-t", "tmpfs", "-o", "size=1m", "none");
    for (const name of ["c.whl", "sub/a.whl", "sub/deep/old.whl"]) scratch.at(`dest/${name}`, "old");
    const before = snapshot(scratch.at("dest"));
    await assertFails(fetchWheels(source, { dest: scratch.at("dest"), clean }), "io", /no space/);
    assert.deepEqual(snapshot(scratch.at("dest")), before);
  }
});

testWith(MOUNT_AND_SETPRIV, "--clean replaces a DEST that cannot be renamed", async (t) => {
  const prepare = (scratch: Scratch, base: string) => {
    for (const name of ["old.whl", "sub/a.whl", "sub/deep/b.whl"]) scratch.at(`${base}/dest/${name}`, "old");
    Deno.symlinkSync("old.whl", scratch.at(`${base}/dest/link`));
    return scratch.at(base);
  };
  const table: Record<string, (scratch: Scratch) => Disposable[]> = {
    "in a lower layer of overlayfs": (scratch) => {
      const memory = new Mount(scratch.at("memory"), "-t", "tmpfs", "none");
      const lower = prepare(scratch, "memory/lower");
      const [upper, work] = ["memory/upper", "memory/work"].map((name) => scratch.at(name));
      [upper, work].forEach((path) => Deno.mkdirSync(path ?? ""));
      const options = `lowerdir=${lower},upperdir=${upper},workdir=${work}`;
      return [new Mount(scratch.at("place"), "-t", "overlay", "-o", options, "overlay"), memory];
    },
    "a bind mount": (scratch) => {
      prepare(scratch, "other");
      return [new Mount(scratch.at("place/dest"), "--bind", scratch.at("other/dest"))];
    },
    "in a sticky directory of another user": (scratch) => {
      const place = prepare(scratch, "place");
      [place, join(place, "dest")].forEach((path) => Deno.chownSync(path, 1234, 1234));
      Deno.chmodSync(place, 0o1777);
      return [];
    },
  };
  await steps(t, table, async (mount) => {
    using scratch = new Scratch();
    using mounts = new DisposableStack();
    mount(scratch).toReversed().forEach((mounted) => mounts.use(mounted));
    const dest = scratch.at("place/dest");
    const before = snapshot(scratch.at("place"));
    const source = scratch.at("layer.tar", "not an archive");
    const args = ["--clean", "-d", dest, source];
    await expectCode(6, args, { through: without("fowner") }, runProgram);
    assert.deepEqual(snapshot(scratch.at("place")), before);
    Deno.writeFileSync(source, layerOf("sub=file old.whl/new.whl c.txt"));
    await expectCode(0, args, { through: without("fowner") }, runProgram);
    assert.deepEqual(contents(dest), treeOf("sub=file old.whl/new.whl c.txt"));
    assert.deepEqual([...Deno.readDirSync(scratch.at("place"))].map(({ name }) => name), ["dest"]);
  });
});

Deno.test("--clean refuses what is more than a directory of wheels; --dry-run names what it would remove", async (t) => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl"));
  scratch.at("home/work/sub/old.whl", "old");
  scratch.at("elsewhere/me/old.whl", "old");
  Deno.symlinkSync("home", scratch.at("link"));
  const before = snapshot(scratch.path);
  const previous = Deno.cwd();
  using _ = { [Symbol.dispose]: () => Deno.chdir(previous) };
  Deno.chdir(scratch.at("home/work"));
  const dests = [".", "..", "../../home/work", "../..", "../../link", "../../link/work", "/"];
  dests.push(scratch.at("elsewhere"), scratch.at("elsewhere/me"));
  for (const dest of dests) {
    await t.step(dest.replace(scratch.path, "$HOME"), async () => {
      for (const more of [[], ["--dry-run"]]) {
        const env = { HOME: scratch.at("elsewhere/me") };
        const { lines } = await expectCode(7, ["--clean", ...more, "-d", dest, source], { env });
        assert.match(lines[0] ?? "", /Cannot clean/);
        assert.deepEqual(snapshot(scratch.path), before);
      }
    });
  }
  await t.step("--dry-run", async () => {
    scratch.at("home/work/sub/.fetch_wheels-1-0123abcd/lock", "");
    const before = snapshot(scratch.path);
    const { stderr } = await expectCode(0, ["--clean", "--dry-run", "-d", scratch.at("home/work/sub"), source]);
    assert.match(stderr, /: "old\.whl"$/m);
    assert.deepEqual(snapshot(scratch.path), before);
  });
});

Deno.test("running out of file descriptors is an error of its own, and leaves nothing", async () => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, gzip(layerOf("a.whl sub/b.whl")));
  using scratch = new Scratch();
  using caches = new Scratch();
  const env = damageableCaches(caches);
  const codes = new Set<number>();
  for (let limit = 12; limit < 60; limit++) {
    const through = ["bash", "-c", `ulimit -n ${limit} && exec "$@"`, "bash"];
    const args = ["--protocol", "http", "-d", scratch.at("new/dest"), reference];
    const { code, stderr } = await spawnProgram(args, { through, env }).output();
    const text = new TextDecoder().decode(stderr);
    if (!text.includes("fetch_wheels: ") || text.includes("panicked")) continue; // Deno itself failed
    codes.add(code);
    if (code === 0) break;
    assert.equal(code, 8, `${limit}: ${text}`);
    assert.match(text, /too many open files/i);
    assert.doesNotMatch(text, /retrying/);
    assert.deepEqual(snapshot(scratch.path), {});
  }
  assert.deepEqual([...codes].sort(), [0, 8]);
});

Deno.test("--json to a full disk or a closed pipe exits with 8 and one line", async (t) => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", layerOf("a.whl"));
  const bad = scratch.at("bad.tar", "not an archive");
  const scripts = { "a full disk": 'exec "$@" >/dev/full', "a closed pipe": '"$@" | true; exit "${PIPESTATUS[0]}"' };
  await steps(t, scripts, async (script) => {
    for (const tarball of [source, bad]) {
      const args = ["--json", "-q", "-d", scratch.at("dest"), tarball];
      const { lines } = await expectCode(8, args, { through: ["bash", "-c", script, "bash"] }, runProgram);
      assert.equal(lines.filter((line) => line.includes("stdout")).length, 1, lines.join("\n"));
    }
  });
});

Deno.test("an output file receives the tarball as it is, or nothing", async (t) => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const output = scratch.at("out.tar.gz");
  const layer = gzip(await makeTar(GOOD));
  await t.step("a wrong size, no file before", async () => {
    await assertFails(fetchWheels(serveLayer(registry, layer, { size: 9 }), { output }), "integrity");
    assert.deepEqual(snapshot(scratch.path), {});
  });
  await t.step("right", async () => {
    const result = await fetchWheels(serveLayer(registry, layer), { output });
    assert.deepEqual(Object.keys(snapshot(scratch.path)), ["out.tar.gz"]);
    assert.deepEqual(Deno.readFileSync(output), layer);
    assert.deepEqual([result.output, result.dest, result.files], [output, null, []]);
  });
  await t.step("a wrong digest, a file before", async () => {
    const before = snapshot(scratch.path);
    const digest = sha256(toBytes("other"));
    await assertFails(fetchWheels(serveLayer(registry, layer, { digest }), { output }), "integrity");
    assert.deepEqual(snapshot(scratch.path), before);
  });
  await t.step("not an archive, which does not matter", async () => {
    await fetchWheels(serveLayer(registry, toBytes("plain text")), { output });
    assert.equal(Deno.readTextFileSync(output), "plain text");
  });
  await t.step("through a symbolic link, which stays", async () => {
    Deno.symlinkSync("out.tar.gz", scratch.at("link"));
    await fetchWheels(serveLayer(registry, layer), { output: scratch.at("link") });
    assert.equal(Deno.readLinkSync(scratch.at("link")), "out.tar.gz");
    assert.deepEqual(Deno.readFileSync(output), layer);
  });
  await t.step("/dev/null, which stays a device", async () => {
    await fetchWheels(serveLayer(registry, layer), { output: "/dev/null" });
    assert(Deno.statSync("/dev/null").isCharDevice);
  });
  await t.step("what a killed run left is removed", async () => {
    scratch.at(".out.tar.gz.fetch_wheels-1-0123abcd/lock", "");
    await fetchWheels(serveLayer(registry, layer), { output });
    assert.deepEqual(Object.keys(snapshot(scratch.path)).sort(), ["link", "out.tar.gz"]);
  });
  await t.step("a directory, or a file below something that is not one", async () => {
    const before = snapshot(scratch.path);
    for (const wrong of [scratch.path, scratch.at("none/out"), join(output, "out")]) {
      await assertFails(fetchWheels(serveLayer(registry, layer), { output: wrong }), "io");
      assert.deepEqual(snapshot(scratch.path), before);
    }
  });
});

Deno.test("an output may be a pipe, which is written to and not replaced", async (t) => {
  const scripts = {
    "a named pipe": 'mkfifo pipe; cat pipe > got & timeout -k 1 5 "$@" -o pipe && wait',
    "a pipe of the shell": 'timeout -k 1 5 "$@" -o >(cat > got)',
  };
  await steps(t, scripts, async (script) => {
    using scratch = new Scratch();
    const source = scratch.at("layer", "as it is");
    await expectCode(0, [source], { through: ["/bin/bash", "-c", script, "bash"], cwd: scratch.path }, runProgram);
    await waitFor(() => Deno.readTextFileSync(scratch.at("got")) === "as it is");
  });
});

Deno.test("a signal ends the program within two seconds, whatever it waits for", async (t) => {
  const codes = { SIGINT: 130, SIGTERM: 143, SIGHUP: 143 } as const;
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  const table: [name: string, sent: (keyof typeof codes)[]][] = signals.map((it) => ["a body", [it, "SIGTERM"]]);
  for (const [at, name] of Object.keys(WAITS).entries()) table.push([name, [signals[at % 3] ?? "SIGINT"]]);
  for (const [name, sent] of table) {
    await t.step(`${sent.join(", ")} while it waits for ${name}`, async () => {
      using scratch = new Scratch();
      await using cleanup = new AsyncDisposableStack();
      scratch.at("work/dest/old.whl", "old");
      const wait = WAITS[name]?.(scratch, cleanup) ?? assert.fail(name);
      const { args, env, script = 'exec "$@"', hasBegun = () => true, isSilent } = wait;
      const before = snapshot(scratch.at("work/dest"));
      const target = args.some((arg) => /^(?:-o|--list)$/.test(arg)) ? [] : ["-d", "dest"];
      const protocol = args.includes("--protocol") ? [] : ["--protocol", "http"];
      const surroundings = { env, cwd: scratch.at("work"), through: ["bash", "-c", script, "bash"] };
      const child = spawnProgram([...protocol, ...target, ...args], surroundings, [...PERMISSIONS, "--allow-run"]);
      await waitFor(async () => hasBegun() && await handlesSignals(child.pid));
      await new Promise((resolve) => setTimeout(resolve, 100)); // so that it waits, and not only begins to
      const started = performance.now();
      sent.forEach((signal) => child.kill(signal));
      const killer = setTimeout(() => child.kill("SIGKILL"), 5000);
      const { code, stderr } = await child.output();
      clearTimeout(killer);
      const text = new TextDecoder().decode(stderr);
      assert(performance.now() - started < 2000, `${performance.now() - started} ms: ${text}`);
      assert(sent.map((signal) => codes[signal]).includes(code as 130), `${code}: ${text}`);
      if (sent.length > 1) return;
      if (!isSilent) assert.match(text, new RegExp(sent[0] ?? ""));
      assert.deepEqual(snapshot(scratch.at("work/dest")), before);
      const left = [...Deno.readDirSync(scratch.at("work"))].filter(({ name }) => name.startsWith("."));
      assert.deepEqual(left, []);
    });
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 11 Command line
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("--help fits 80 columns and goes to stdout", async () => {
  const { code, stdout, stderr } = await run(["--help"]);
  assert.deepEqual([code, stderr], [0, ""]);
  assert(stdout.endsWith("\n") && !stdout.includes("\x1b"));
  for (const line of stdout.split("\n")) assert(line.length <= 80, line);
  for (const args of [["-h"], ["help"]]) assert.equal((await run(args)).stdout, stdout);
});

Deno.test("--version prints the version of deno.json", async () => {
  for (const args of [["--version"], ["-V"], ["version"]]) {
    const { code, stdout, stderr } = await run(args);
    assert.deepEqual([code, stdout, stderr], [0, `fetch_wheels ${denoJson.version}\n`, ""]);
  }
});

Deno.test("a usage error exits with 2 and says in two lines what is wrong and what to do", async (t) => {
  using scratch = new Scratch();
  const tarball = scratch.at("wheels.TGZ", "");
  const relative = tarball.slice(1); // as if the working directory were the root
  // deno-fmt-ignore
  const cases: [args: string[], expected: RegExp, env?: Record<string, string>][] = [
    [[], /: no image given: pass SOURCE, set \$WHEELS, or create \/nowhere\/wheels$/m],
    [["--dset", "x", "ns/name"], /"--dset"\n.*hint: did you mean --dest\?$/m],
    [["--pasword-stdin=S3CRET", "ns/name"], /unknown option "--pasword-stdin=…"$/m],
    [["--clean=yes", "ns/name"], /unknown option "--clean=…"$/m],
    [["-x", "ns/name"], /"-x"/],
    [["-qpS3CRET'=S3CRET", "ns/name"], /unknown option "-p…"$/m],
    [["ns/name", "ns/other"], /2 sources/],
    [["ns/name", "--dest"], /--dest/],
    [["--protocol", "ftp", "ns/name"], /--protocol "ftp": expected http, https or detect/],
    [["ns/name"], /\$REGISTRY_PROTOCOL "ftp"/, { REGISTRY_PROTOCOL: "ftp" }],
    [["--retries", "many", "ns/name"], /: --retries must be a whole number from 0/],
    [["--retries", "", "ns/name"], /: --retries must be a whole number from 0/],
    [["--retries", "-1", "ns/name"], /: --retries must be 0 or more$/m],
    [["--strip-components", "-1", "ns/name"], /: --strip-components must be 0 or more$/m],
    [["--connections", "17", "ns/name"], /: --connections must be .* 1 to 16$/m],
    [["--timeout", "0", "ns/name"], /: --timeout must be between 1 and 86400 seconds$/m],
    [["--timeout", "soon", "ns/name"], /: --timeout must be between 1 and 86400 seconds$/m],
    [["--layer", "0", "ns/name"], /layer "0": expected a layer number \(1 is the base\), "last", "all" or a digest$/m],
    [["--platform", "linux", "ns/name"], /"linux"/],
    [["--mirror", "cache.lan", "ns/name"], /"cache.lan".*\n.*https:/],
    [["--mirror", "user:S3CRET@cache.lan", "ns/name"], /"cache.lan"/],
    [["--password-stdin", "ns/name"], /--password-stdin without --username/],
    [["--username", "u", "ns/name"], /password/],
    [["ns/name"], /user name/, { REGISTRY_PASSWORD: "S3CRET" }],
    [["--username", "u:v", "ns/name"], /u:v/, { REGISTRY_PASSWORD: "S3CRET" }],
    [["-q", "-v", "ns/name"], /--quiet with --verbose/],
    [["--list", "--dry-run", "ns/name"], /--list with --dry-run/],
    [["-o", "out", "ns/name"], /--dest with --output/],
    [["--dest=", "ns/name"], /--dest: its value is empty/],
    [["--cache", "", "ns/name"], /--cache: its value is empty/],
    [["--include", "*.whl", "--include=", "ns/name"], /--include: its value is empty/],
    [["ns/name"], /\$FETCH_WHEELS_VERIFY_KEY: its value is empty/, { FETCH_WHEELS_VERIFY_KEY: " " }],
    [[""], /""/],
    [["registry.example/Upper/case:V1"], /lower case\n.*registry\.example\/upper\/case:V1$/m],
    [["$WHEELS"], /lower case\n.*--help/],
    [["ns/name:bad tag"], /bad tag/],
    [["registry.example:5000/ns/name@"], /"…@": the digest/],
    [["ns/name@sha256:123"], /sha256:123/],
    [[], /bad\\ntag/, { WHEELS: "ns/name:bad\ntag" }],
    [["docker://quay.io/ns/x:1"], /"docker:\/\/".*\n.*"quay.io\/ns\/x:1"/],
    [["oci://dir"], /"oci:\/\/".*\n.*oci:DIR/],
    [["oci:"], /"oci:": the path is missing/],
    [["dir:/tmp/x"], /"dir:".*\n.*oci:DIR/],
    [["docker-daemon:x:1"], /"docker-daemon:".*\n.*docker-archive:FILE/],
    [["https://user:S3CRET@[/x"], /URL/],
    [[relative], new RegExp(`hint: .*\\./${relative}`)],
  ];
  const cwd = Deno.cwd();
  Deno.chdir("/");
  await eachRow(t, cases, async ([args, expected, env]) => {
    const dest = args[1] === "--dest" || args[0] === "--dest=" ? [] : ["-d", scratch.at("dest")];
    const { code, stdout, stderr, lines } = await run([...dest, ...args], { env });
    assert.deepEqual([code, stdout], [2, ""], stderr);
    assert.match(stderr, expected);
    assert.match(lines[0] ?? "", /^fetch_wheels: (?:Cannot|no image|--[a-z-]+ must) .*[^.]$/);
    assert.match(lines[1] ?? "", /^fetch_wheels: hint: ./);
    if (!args.includes("-v")) assert.equal(lines.length, 2); // -v adds the stack
    assert(!stderr.includes("S3CRET"));
    assert.deepEqual(snapshot(scratch.path), { "wheels.TGZ": snapshot(scratch.path)["wheels.TGZ"] });
  });
  Deno.chdir(cwd);
});

Deno.test("standard output: conflicts, and a terminal that would receive a tarball", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", tarOf(file("a.whl")));
  const io = { isStdoutTerminal: true };
  for (const output of ["-", "/dev/stdout"]) {
    const both = await run(["--json", "-o", output, source]);
    assert.deepEqual([both.code, JSON.parse(both.stdout).error.kind], [2, "usage"]);
  }
  const refused = await run(["-o", "-", source], { io });
  assert.deepEqual([refused.code, refused.stdout], [2, ""]);
  assert.match(refused.stderr, /terminal\n.*--output \/dev\/stdout/);
  for (const args of [["-o", "/dev/stdout"], ["--list"], ["--list", "-o", "-"]]) {
    const { stdout } = await expectCode(0, [...args, source], { io });
    assert(stdout.includes("a.whl"));
  }
});

/** Words and constructions that style.md rejects. */
const POOR_ENGLISH =
  /\b(?:told|tells?|news|whoever|is none|counts|by lot|gone on|(?<!there )is no \w+)\b|\b(?:ca|wo|does|is|do)n't\b/i;

Deno.test("each kind of error has its exit code, and one line that is a full sentence", async (t) => {
  await using registry = startRegistry({ auth: "basic", users: { user: "right" } });
  await using open = startRegistry();
  using scratch = new Scratch();
  const stop = (kind: ErrorKind) => AbortSignal.abort(new FetchWheelsError(kind, "interrupted; DEST is unchanged"));
  const bug = () => {
    throw new Error("a bug\nin two lines");
  };
  const cases: [code: number, kind: ErrorKind, source: string, io?: Partial<Io>][] = [
    [1, "internal", scratch.path, { env: bug }],
    [2, "usage", "ns/name:"],
    [3, "not-found", scratch.at("none.tar")],
    [3, "not-found", `${open.host}/ns/none:1.0`],
    [4, "auth", sourceOf(registry)],
    [5, "network", `${await closedHost()}/ns/wheels:1.0`],
    [6, "integrity", scratch.at("broken.tar", "not an archive")],
    [7, "unsafe", scratch.at("unsafe.tar", tarOf(file("../evil.whl")))],
    [8, "io", scratch.path],
    [130, "interrupted", scratch.at("a.tar", ""), { signal: stop("interrupted") }],
    [143, "terminated", scratch.at("a.tar", ""), { signal: stop("terminated") }],
  ];
  await eachRow(t, cases, async ([expected, kind, source, io]) => {
    const args = ["--retries", "0", "--protocol", "http", "-d", scratch.at("dest"), source];
    const { code, stdout, lines } = await run(["--json", ...args], { io });
    const { error } = JSON.parse(stdout);
    assert.deepEqual([code, error.kind], [expected, kind], lines.join("\n"));
    const errors = lines.filter((line) => !/: (?:warning|hint): /.test(line));
    assert.deepEqual(errors, [`fetch_wheels: ${error.message}`]);
    assert.match(error.message, /^(?:Cannot .+: .+|interrupted.*)[^.]$/);
    if (error.hint !== null) assert.equal(lines.at(-1), `fetch_wheels: hint: ${error.hint}`);
    for (const line of lines) assert.doesNotMatch(line, POOR_ENGLISH);
    const verbose = await run(["-v", ...args], { io });
    assert.equal(verbose.code, expected);
    assert(verbose.lines.some((line) => /^fetch_wheels: +at /.test(line)), verbose.stderr);
  });
});

Deno.test("messages name the cause in the words of the style guide", async (t) => {
  const members: TarMember[] = ["a", "b", "c", "d", "e"].map((name) => ({ name: `${name}.txt`, data: name }));
  await using registry = serveImage({}, makeImage({ layers: [BASE, gzip(await makeTar(members))] }));
  const later = { status: 503, headers: { "retry-after": "61" } };
  await using busy = startRegistry({ onRequest: () => new Response(null, later) });
  await using silent = startRegistry({ onRequest: () => new Promise(() => {}) });
  using scratch = new Scratch();
  const source = sourceOf(registry);
  const foreign = makeImage({ layers: [gzip(await makeTar([{ name: "a-1-cp3-cp3-linux_s390x.whl", data: "x" }]))] });
  registry.pushImage("ns/foreign", "1.0", foreign);
  const orphan = scratch.at("orphan.tar", tarOf(file("a.whl"), hardlink("b.whl", "x")));
  // deno-fmt-ignore
  const cases: [code: number, args: string[], expected: RegExp][] = [
    [3, ["--layer", "5", source], /has 2 layers,.* no layer 5$/m],
    [3, [`${source}x`], /hint: .*some registries answer 404 for private images/],
    [3, [`http://${source}`], /hint: for an image in a registry, write "127\.0\.0\.1:\d+\/ns\/wheels:1\.0"$/m],
    [3, ["--include", "*.nope", source], /nothing matched --include "\*\.nope" \(5 files skipped\)/],
    [0, ["--mirror", `http://${await closedHost()}`, source], /warning: skipping mirror .*: /],
    [5, ["--retries", "1", `${busy.host}/ns/wheels`], /server asked to wait 61 s; the limit is 60 s$/m],
    [5, ["--timeout", "0.05", `${silent.host}/ns/wheels`], /no data received for 0\.05 s$/m],
    [6, [orphan], /is a hard link to "x", which is not an earlier file in the archive/],
    [0, [`${registry.host}/ns/foreign:1.0`], /wheels not built for linux\/amd64 \(wrong image\?\): .*s390x/],
    [5, [`https://${registry.host}/layer.tar`], /hint: .*http:\/\/(?!.*--protocol)/],
  ];
  await eachRow(t, cases, async ([expected, args, message]) => {
    const options = ["--retries", "0", "--protocol", "http", "--platform", "linux/amd64", "-d", scratch.at("dest")];
    const { stderr } = await expectCode(expected, [...options, ...args]);
    assert.match(stderr, message);
    assert.doesNotMatch(stderr, POOR_ENGLISH);
  });
});

Deno.test("output that nobody reads is an error, but not of a list", async (t) => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", await makeTar(GOOD));
  const failing = (error: Error) => new WritableStream({ write: () => Promise.reject(error) });
  const closed = new Deno.errors.BrokenPipe("Broken pipe (os error 32)");
  const full = Object.assign(new Error("No space left on device"), { code: "ENOSPC" });
  const cases: [code: number, args: string[], error: Error, expected: RegExp][] = [
    [0, ["--list"], closed, /^(?!.*Cannot)/],
    [0, ["--help"], closed, /^$/],
    [8, ["--list"], full, /Cannot write "stdout": no space left on the disk\n$/],
    [8, ["--json"], closed, /Cannot write "stdout": broken pipe\nfetch_wheels: hint: only the JSON .*\n$/],
    [8, ["--json", "--bogus"], closed, /Cannot write "stdout": broken pipe\n$/],
    [8, ["-o", "-"], closed, /Cannot write .*: broken pipe\n$/],
  ];
  for (const [expected, args, error, message] of cases) {
    await t.step(`${args.join(" ")}: ${error.message}`, async () => {
      const dest = args[0] === "-o" ? [] : ["-d", scratch.at("dest")];
      const { stderr } = await expectCode(expected, [...args, ...dest, source], { io: { stdout: failing(error) } });
      assert.match(stderr, message);
    });
  }
  await t.step("a reader of -o - that ends early", async () => {
    const through = ["bash", "-c", '"$@" | head -c 1; exit "${PIPESTATUS[0]}"', "bash"];
    const args = ["-o", "-", scratch.at("large", new Uint8Array(8 << 20))];
    const { stderr } = await expectCode(8, args, { through }, runProgram);
    assert.match(stderr, /broken pipe/);
  });
});

Deno.test("-q writes errors and warnings only, -v one line a request, and the last line names the digest", async () => {
  const password = "S3CRET";
  await using registry = startRegistry({ auth: "bearer", users: { user: password }, storage: { signed: true } });
  using scratch = new Scratch();
  const layer = gzip(await makeTar([...GOOD, { name: "tty", type: "character-device" }]));
  const reference = serveLayer(registry, layer);
  const env = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: password };
  const fetch = (...flags: string[]) =>
    run([...flags, "--protocol", "http", "-d", scratch.at("dest"), reference], { env });
  const quiet = await fetch("-q");
  assert.deepEqual([quiet.code, quiet.stdout, quiet.stderr], [0, "", ""]);

  const normal = await fetch();
  assert.deepEqual([normal.code, normal.stdout], [0, ""]);
  const [resolved, skipped, summary, last] = normal.lines;
  assert.match(resolved ?? "", new RegExp(`ns/wheels:1.0: layer 1 of 1, ${sha256(layer)}, \\d+ B$`));
  assert.match(skipped ?? "", /: skipped "tty": /);
  assert.match(summary ?? "", /: 1 wheel, 1 other file, .* in \d\.\d s, to /);
  assert(summary?.endsWith(` to ${scratch.at("dest")} from ${sha256(layer)}`), summary);
  assert.match(last ?? "", new RegExp(`: resolved ${registry.host}/ns/wheels@sha256:[0-9a-f]{64}$`));
  assert.equal(normal.lines.length, 4);
  const pinned = await run(["--dry-run", "--protocol", "http", last?.split(" ").at(-1) ?? ""], { env });
  assert.equal(pinned.code, 0, pinned.stderr);

  registry.requests.length = 0;
  const verbose = await fetch("-v");
  const requests = verbose.lines.filter((line) => line.includes(" GET "));
  assert.equal(requests.length, registry.requests.length);
  for (const line of requests) assert.match(line, /: GET http:\S+: \d{3}(?:, \d+ bytes?)?(?:, bytes=\S+)?, \d+ ms$/);
  for (const part of ["/token?…: 200", "/manifests/1.0: 401", "/manifests/1.0: 200", "/blobs/sha256:", ": 307"]) {
    assert(verbose.stderr.includes(part), part);
  }
  const tokens = registry.requests.flatMap(({ headers }) => headers.get("authorization")?.split(" ")[1] ?? []);
  const signatures = registry.requests.flatMap(({ origin, search }) => origin === "storage" ? search.slice(1) : []);
  assert(tokens.length > 1 && signatures.length > 0);
  for (const secret of [password, ...tokens, ...signatures]) assert(!verbose.stderr.includes(secret), secret);
});

Deno.test("a name with a line break stays in one line", async () => {
  using scratch = new Scratch();
  const source = scratch.at("a\nb.tar", tarOf(file("c\nd"), file("e.whl")));
  await expectCode(0, ["-v", "-d", scratch.at("two\nlines"), source]); // run() checks each line
  assert.equal((await run(["--list", source])).stdout, "           3  c\\u000ad\n           5  e.whl\n");
});

Deno.test("one line reports a retry, with a counter", async () => {
  await using registry = serveImage();
  registry.faults = ({ count }) => count === 1 ? [{ kind: "reset" }] : [];
  using scratch = new Scratch();
  const args = ["--protocol", "http", "--layer", "1", "-d", scratch.at("dest"), sourceOf(registry)];
  const { lines } = await expectCode(0, ["--platform", "linux/amd64", ...args]);
  assert.match(lines[0] ?? "", /: .+; retrying in 0\.\d s \(1\/5\)$/);
});

Deno.test("progress is one line of the terminal's width, redrawn on a timer, and gone at the end", async (t) => {
  const table: [columns: number, expected: RegExp][] = [
    [80, /^fetch_wheels: [1-5]\d %, \d{3}\.\d kB of 1\.0 MB, \d+\.\d [kM]B\/s, 0:\d\d left, 0 files$/],
    [55, /^fetch_wheels: [1-5]\d %, \d{3}\.\d kB of 1\.0 MB, 0:\d\d left$/],
    [40, /^fetch_wheels: [1-5]\d %, 0:\d\d left$/],
    [20, /^[1-5]\d %, 0:\d\d left$/],
    [10, /^[1-5]\d %$/],
    [6, /^[1-5]\d %$/],
  ];
  await eachRow(t, table, async ([columns, expected]) => {
    const { intervals, drawn, stderr } = await watchDownload({ columns, until: /\r[^\r]*[1-5]\d %/ });
    assert.equal(intervals.length, 1);
    assert((intervals[0] ?? 0) <= 500, `${intervals}`);
    assert.match(drawn.findLast((text) => /[1-5]\d %/.test(text)) ?? "", expected);
    for (const text of drawn) assert(text.length < columns, text);
    assert.match(stderr, /\r.\[Kfetch_wheels: 1 wheel, .*\n.*\n$/);
  });
});

Deno.test("without a terminal that can redraw, progress is one line every 30 s", async (t) => {
  const logged = /^fetch_wheels: [1-5]\d %, \d{3}\.\d kB of 1\.0 MB, .*\/s, 0:\d\d left, 0 files$/m;
  const table: WatchOptions[] = [
    { columns: undefined },
    { columns: 0 },
    { columns: 80, term: "dumb" },
    { columns: undefined, args: ["--no-progress"] },
  ];
  await eachRow(t, table, async (settings) => {
    const { intervals, drawn, stderr } = await watchDownload({ ...settings, until: logged });
    assert.deepEqual([intervals, drawn, stderr.includes("\r")], [[30_000], [], false]);
  });
  for (const args of [["-q"], ["--no-progress"]]) {
    await t.step(`${args} on a terminal`, async () => {
      const { intervals, stderr } = await watchDownload({ columns: 80, args });
      assert.deepEqual([intervals, stderr.includes("\r")], [[], false]);
    });
  }
});

Deno.test("-o - writes the layer as it is to stdout, and all else to stderr", async () => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const layer = toBytes("as it is\n");
  const args = ["--protocol", "http", "-o", "-", serveLayer(registry, layer)];
  const { code, stdout, lines } = await run(args, { env: { WHEELS_DIR: scratch.at("dest") } });
  assert.deepEqual([code, stdout], [0, "as it is\n"]);
  assert(lines.length > 0);
  assert.deepEqual(snapshot(scratch.path), {});
  serveLayer(registry, layer, { digest: sha256(toBytes("other")) });
  assert.equal((await run(args)).code, 6);
});

Deno.test("LOCI's variables give source and destination; SOURCE and options win", async (t) => {
  using scratch = new Scratch();
  const one = scratch.at("one.tar", tarOf(file("one.whl")));
  const two = scratch.at("two.tar", tarOf(file("two.whl")));
  const [a, b] = [scratch.at("a"), scratch.at("b")];
  const before = snapshot(scratch.path);
  const cases: [args: string[], env: Record<string, string>, created: string][] = [
    [[], { WHEELS: one, WHEELS_DIR: a }, "a/one.whl"],
    [[two], { WHEELS: one, WHEELS_DIR: a }, "a/two.whl"],
    [["-d", b], { WHEELS: one, WHEELS_DIR: a }, "b/one.whl"],
    [[], { WHEELS: one, WHEELS_DEST: a, WHEELS_DIR: b }, "a"],
    [["-o", b], { WHEELS: one, WHEELS_DEST: a }, "b"],
    [["-d", b], { WHEELS: one, WHEELS_DEST: a }, "b/one.whl"],
    [[one], { WHEELS: "", WHEELS_DEST: "", WHEELS_DIR: a }, "a/one.whl"],
  ];
  await eachRow(t, cases, async ([args, env, created]) => {
    await expectCode(0, args, { env });
    const after = Object.entries(snapshot(scratch.path)).filter(([path]) => !(path in before));
    assert.deepEqual(after.filter(([, entry]) => entry.startsWith("file")).map(([path]) => path), [created]);
    Deno.removeSync(scratch.at(created.split("/")[0] ?? ""), { recursive: true });
  });
});

Deno.test("the wheels file gives the source, and remembers it", async (t) => {
  using scratch = new Scratch();
  const one = scratch.at("one.tar", tarOf(file("one.whl")));
  const two = scratch.at("two.tar", tarOf(file("two.whl")));
  const wheels = scratch.at("loci/wheels", `${one}\nsecond line\n`);
  const args = ["--wheels-file", wheels, "-d", scratch.at("dest")];
  const remembered = () => Deno.readTextFileSync(wheels);
  const fetch = async (args: string[], env?: Record<string, string>) => {
    const { code, stderr } = await run(args, { env });
    return code === 0 ? remembered() : `${code} ${stderr}`;
  };

  assert.equal(await fetch(args), `${one}\nsecond line\n`);
  assert.deepEqual(Object.keys(contents(scratch.at("dest"))), ["one.whl"]);
  assert.equal(await fetch([...args, two]), `${two}\n`);
  assert.equal(await fetch(args, { WHEELS: one }), `${one}\n`);
  assert.match(await fetch([...args, scratch.at("none.tar")]), /^3 /);
  assert.match(await fetch(["--list", ...args, two]), new RegExp(`^${one}\n$`));
  assert.equal(remembered(), `${one}\n`);
  Deno.removeSync(wheels);
  assert.equal(await fetch([...args, two]), `${two}\n`);
  await t.step("a directory that does not exist is not created", async () => {
    const { code, stderr } = await run(["--wheels-file", scratch.at("none/wheels"), "-q", ...args.slice(2), two]);
    assert.deepEqual([code, stderr], [0, ""]);
    assert.throws(() => Deno.statSync(scratch.at("none")), Deno.errors.NotFound);
  });
  await t.step("a file that cannot be written is a warning", async () => {
    for (
      const [path, words] of [[scratch.at("dest"), "is a directory"], ["/dev/full", "protects this path"]] as const
    ) {
      const { stderr } = await expectCode(0, ["--wheels-file", path, "-q", ...args.slice(2), two], {}, runProgram);
      assert.match(stderr, new RegExp(`: warning: Cannot .*${words}; the source is not remembered\n$`));
    }
  });
  await t.step("an empty file has no source", async () => {
    Deno.writeTextFileSync(wheels, "\n");
    assert.match(await fetch(args), new RegExp(`^2 .*no image given: .*write an image into ${wheels}`));
  });
});

Deno.test("variables give protocol and certificates, and options win", async (t) => {
  const certificate = await makeCertificate();
  await using plain = startRegistry();
  await using secure = startRegistry({ tls: certificate });
  using scratch = new Scratch();
  const caFile = scratch.at("ca.pem", certificate.cert);
  const layer = gzip(await makeTar(GOOD));
  const [http, https] = [serveLayer(plain, layer), serveLayer(secure, layer)];
  const booleans = Object.entries({ yes: 0, true: 0, t: 0, 1: 0, YES: 0, True: 0, T: 0, no: 5, false: 5, 0: 5, "": 5 });
  const cases: [code: number, source: string, env: Record<string, string>, args?: string[]][] = [
    [5, http, { REGISTRY_PROTOCOL: "https" }],
    [0, http, { REGISTRY_PROTOCOL: "http" }],
    [0, http, { REGISTRY_PROTOCOL: "https" }, ["--protocol", "http"]],
    [5, http, { REGISTRY_PROTOCOL: "http" }, ["--protocol", "https"]],
    ...booleans.map(([text, code]): [number, string, object] => [code, https, { REGISTRY_INSECURE: text }]),
    [0, https, { REGISTRY_INSECURE: "no" }, ["--insecure"]],
    [0, https, { REGISTRY_CA_FILE: caFile }],
    [0, https, { REGISTRY_CA_FILE: "/nowhere/ca.pem" }, ["--ca-file", caFile]],
    [2, https, { REGISTRY_CA_FILE: scratch.at("not.pem", "text") }],
  ] as [number, string, Record<string, string>, string[]?][];
  await eachRow(t, cases, async ([expected, source, env, args = []]) => {
    const { code, stderr } = await run([...args, "--retries", "0", "-d", scratch.at("dest"), source], { env });
    assert.equal(code, expected, stderr);
    if (code === 5 && source === https) assert.match(stderr, /hint: .*--ca-file.*--insecure/);
  });
});

Deno.test("credentials come from stdin or the environment", async (t) => {
  const password = "  S3CRET: pässwörd ";
  await using registry = startRegistry({ auth: "bearer", users: { user: password } });
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  using scratch = new Scratch();
  const both = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: password };
  const wrong = { ...both, REGISTRY_PASSWORD: "S3CRET-wrong" };
  const fromStdin = ["--username", "user", "--password-stdin"];
  const directory = new ReadableStream({
    start: (stream) => stream.error(Object.assign(new Error(), { code: "EISDIR" })),
  });
  const prompted = { promptPassword: (question: string) => Promise.resolve(question && password) };
  const cases: [name: string, code: number, args: string[], surroundings: Surroundings][] = [
    ["--password-stdin", 0, fromStdin, { stdin: password }],
    ["a line break", 0, fromStdin, { stdin: `${password}\n` }],
    ["a line break of Windows", 0, fromStdin, { stdin: `${password}\r\n` }],
    ["a prompt", 0, fromStdin, { io: prompted }],
    ["the environment", 0, [], { env: both }],
    ["BuildKit's secret", 0, [], { env: { ...both, REGISTRY_PASSWORD: `${password}\n` } }],
    ["an option and the environment", 0, ["--password-stdin"], { env: wrong, stdin: password }],
    ["another --username", 4, ["--username", "other"], { env: both }],
    ["a wrong password", 4, [], { env: wrong }],
    ["no password", 4, [], {}],
    ["an empty stdin", 2, fromStdin, { stdin: "\n" }],
    ["a directory as stdin", 8, fromStdin, { io: { stdin: directory } }],
  ];
  await eachRow(t, cases, async ([, expected, args, surroundings]) => {
    const options = ["-v", "--protocol", "http", "--retries", "0", "-d", scratch.at("dest")];
    const { code, stderr, stdout } = await run([...options, ...args, reference], surroundings);
    assert.deepEqual([code, stdout], [expected, ""], stderr);
    assert(!stderr.includes("S3CRET"), stderr);
  });
});

const SCRIPT: Need = { name: "util-linux", isMet: isInstalled("script") };

testWith(SCRIPT, "a terminal is asked for the password, without echo", async (t) => {
  await using registry = startRegistry({ auth: "basic", users: { user: "pä" } });
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  await eachRow(
    t,
    [["px\x7fä\r", 0], ["px\r", 4], ["px\x15pä\r", 0], ["\x04", 2], ["p\x03", 130]] as const,
    async ([typed, expected]) => {
      using scratch = new Scratch();
      const program = [Deno.execPath(), "run", ...PERMISSIONS, PROGRAM, "--username", "user", "--password-stdin"];
      const command = [...program, "--protocol", "http", "-d", scratch.at("dest"), reference].join(" ");
      const args = ["-qec", command, "/dev/null"];
      const child = new Deno.Command("script", { args, stdin: "piped", stdout: "piped" }).spawn();
      let screen = "";
      const writer = child.stdin.getWriter();
      for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
        if (!screen.includes("Password: ") && (screen + text).includes("Password: ")) {
          await writer.write(toBytes(typed));
        }
        screen += text;
      }
      await writer.close();
      assert.equal((await child.status).code, expected, screen);
      assert.doesNotMatch(screen, /p[xä]/);
    },
  );
});

Deno.test("mirrors and a cache come from options or the environment", async (t) => {
  await using registry = startRegistry();
  await using mirror = startRegistry();
  await using other = startRegistry();
  const layer = gzip(await makeTar(GOOD));
  const [reference = ""] = [registry, mirror].map((each) => serveLayer(each, layer));
  const dead = `http://${await closedHost()}`;
  const cases: [args: string[], text: string, asked: TestRegistry[]][] = [
    [[], mirror.url, [mirror]],
    [[], ` ${dead} \t${other.url}\n${mirror.url} `, [mirror, other]],
    [["--mirror", mirror.url], other.url, [mirror]],
    [["--mirror", other.url, "--mirror", mirror.url], "", [mirror, other]],
    [[], "", [registry]],
  ];
  for (const [at, [args, text, asked]] of cases.entries()) {
    await t.step(`${at}: ${args.length / 2} options, "${text && "REGISTRY_MIRROR"}"`, async () => {
      using scratch = new Scratch();
      const all = [registry, mirror, other];
      for (const { requests } of all) requests.length = 0;
      const env = { REGISTRY_MIRROR: text };
      await expectCode(0, ["--protocol", "http", "-d", scratch.at("dest"), ...args, reference], { env });
      assert.deepEqual(all.filter(({ requests }) => requests.length > 0), asked);
    });
  }
  await t.step("FETCH_WHEELS_CACHE and --cache", async () => {
    using scratch = new Scratch();
    const env = { FETCH_WHEELS_CACHE: scratch.at("one") };
    for (const [place, args] of [["one", []], ["two", ["--cache", scratch.at("two")]]] as const) {
      await expectCode(0, ["--protocol", "http", "-d", scratch.at("dest"), ...args, reference], { env });
      assert(snapshot(scratch.at(place))[`blobs/${sha256(layer).replace(":", "/")}`]);
    }
    assert.deepEqual([...Deno.readDirSync(scratch.path)].map(({ name }) => name).toSorted(), ["dest", "one", "two"]);
  });
});

Deno.test("permissions: those of the first line suffice, and can be narrowed", async (t) => {
  const [shebang = ""] = Deno.readTextFileSync(PROGRAM).split("\n");
  const permissions = shebang.match(/--allow-\S+/g) ?? [];
  await using registry = startRegistry({ auth: "basic", users: { user: "S3CRET" }, tls: await makeCertificate() });
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  const env = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: "S3CRET", REGISTRY_INSECURE: "yes", WHEELS: reference };
  using scratch = new Scratch();
  const environment = permissions.find((flag) => flag.startsWith("--allow-env=")) ?? "";
  const files = [`--allow-read=${scratch.path},/nowhere`, `--allow-write=${scratch.path}`];
  const narrow = [`--allow-net=${registry.host}`, ...files, environment];
  const config = ["-q", "-P", "--config", fileURLToPath(new URL("deno.json", import.meta.url))];
  for (const [at, flags] of [permissions, narrow, config].entries()) {
    await t.step(flags.join(" "), async () => {
      const dest = scratch.at(`dest${at}`);
      const { code, stdout, stderr } = await runProgram(["--clean", "-d", dest], { env }, ["--no-prompt", ...flags]);
      assert.deepEqual([code, stdout], [0, ""], stderr);
      assert.deepEqual(contents(dest), GOOD_CONTENTS);
    });
  }
});

Deno.test("missing permissions are named together, with the complete command", async (t) => {
  await using registry = serveImage();
  using scratch = new Scratch();
  const source = sourceOf(registry);
  const dest = scratch.at("a directory's");
  const args = ["--protocol", "http", "--platform", "linux/amd64", "-d", dest, source];
  const all = ["--allow-net", "--allow-read", "--allow-write", "--allow-env"];
  const cases: [granted: string[], missing: string][] = [
    [[], all.join(", ")],
    [["--allow-net", "--allow-env"], "--allow-read, --allow-write"],
    [["--allow-net=a.example", "--allow-read", "--allow-write=/nowhere", "--allow-env"], "--allow-net, --allow-write"],
    [["--allow-net", "--allow-read", "--allow-write", "--allow-env=HOME"], "--allow-env"],
  ];
  await eachRow(t, cases, async ([granted, missing]) => {
    const { code, lines } = await runProgram(args, {}, ["--no-prompt", ...granted]);
    assert.equal(code, 2);
    assert(lines[0]?.endsWith(`: ${missing}`), lines[0]);
    const command = lines[1]?.split(": hint: ")[1] ?? "";
    const env = { PATH: `${dirname(Deno.execPath())}:${Deno.env.get("PATH")}` };
    const { success, stderr } = await new Deno.Command("bash", { args: ["-c", command], env }).output();
    assert(success, new TextDecoder().decode(stderr));
    assert(lines.length === 2 && contents(dest)["a-1-py3-none-any.whl"] === "wheel");
    Deno.removeSync(dest, { recursive: true });
  });
  await t.step("the command hides a password", async () => {
    const { lines } = await runProgram(["https://user:S3CRET@files.example/x.tar"], {}, ["--no-prompt"]);
    assert.match(lines[1] ?? "", /hint: .*files\.example\/x\.tar$/);
    assert(!lines.join().includes("S3CRET"));
  });
  await t.step("a proxy's host is named", async () => {
    const granted = ["--allow-net=files.example", ...all.slice(1)];
    const env = { HTTPS_PROXY: "http://127.0.0.1:9" };
    const { stderr } = await runProgram(["https://files.example/x.tar"], { env }, ["--no-prompt", ...granted]);
    assert.match(stderr, /without a permission: Requires net access to "127\.0\.0\.1:9"\n.*hint: .*--allow-net\n$/);
    const odd = await runProgram(["https://a..b/x.tar"], {}, ["--no-prompt", ...granted]);
    assert.match(odd.stderr, /missing Deno permissions: --allow-net$/m);
  });
  await t.step({
    name: "on a terminal, nothing is asked",
    ignore: !SCRIPT.isMet,
    async fn() {
      await using secure = startRegistry({ auth: "bearer" }); // its token service is another host
      const later = [`--allow-net=${secure.host}`, ...all.slice(1), PROGRAM, "-d", dest, serveLayer(secure, BASE)];
      for (const [args, expected] of [[[PROGRAM, source], all.join(", ")], [later, "Requires net access"]] as const) {
        const command = [Deno.execPath(), "run", ...args].map((arg) => `"${arg}"`).join(" ");
        const { code, stdout } = await new Deno.Command("script", { args: ["-qec", command, "/dev/null"] }).output();
        const screen = new TextDecoder().decode(stdout);
        assert.equal(code, 2, screen);
        assert.match(screen, new RegExp(expected));
        assert.doesNotMatch(screen, /Allow\?|\[y/);
      }
    },
  });
});

Deno.test("the module can be imported without any permission", async () => {
  using scratch = new Scratch();
  const script = `import { parseImageReference } from ${JSON.stringify(MODULE_URL)};
    console.log(parseImageReference("ns/name").registry);`;
  const config = fileURLToPath(new URL("deno.json", import.meta.url));
  const args = ["run", "--no-prompt", "--config", config, scratch.at("script.ts", script)];
  const { code, stdout, stderr } = await runDeno(args);
  assert.deepEqual([code, stdout, stderr], [0, "docker.io\n", ""]);
});

Deno.test("--list and --dry-run change nothing; --json describes the result in one document", async (t) => {
  const layer = gzip(await makeTar([...GOOD, { name: ".x" }]));
  const image = makeImage({ layers: [BASE, layer] });
  await using registry = serveImage({}, image);
  using scratch = new Scratch();
  const source = sourceOf(registry);
  const args = ["--protocol", "http", "-d", scratch.at("dest"), "--platform", "linux/amd64"];
  const files = [{ path: "a.whl", size: 5, digest: null }, { path: "sub/b.txt", size: 4, digest: null }];
  await t.step("--list", async () => {
    const { code, stdout } = await run(["--list", ...args, source]);
    assert.deepEqual([code, stdout], [0, "           5  a.whl\n           4  sub/b.txt\n"]);
    const result: FetchResult = JSON.parse((await run(["--list", "--json", ...args, source])).stdout);
    assert.deepEqual([result.files, result.dest, result.skipped[0]?.path], [files, null, ".x"]);
  });
  await t.step("--dry-run", async () => {
    registry.requests.length = 0;
    const { code, stdout, lines } = await run(["--dry-run", "--json", ...args, source]);
    const { resolved, files } = JSON.parse(stdout);
    assert.deepEqual([code, files, paths(registry, sha256(layer))], [0, [], []]);
    assert.equal(lines.at(-1), `fetch_wheels: resolved ${registry.host}/ns/wheels@${resolved.digest}`);
    assert.equal((await run(["--dry-run", scratch.at("none.tar")])).code, 3);
  });
  assert.deepEqual(snapshot(scratch.path), {});
  await t.step("--json", async () => {
    const { code, stdout, stderr } = await run(["-q", "--json", "--unpin", "x", ...args, source]);
    const result: FetchResult = JSON.parse(stdout);
    const { digest, mediaType } = image;
    assert.deepEqual([code, stderr], [0, ""]);
    assert.deepEqual(result, {
      source,
      image: { registry: registry.host, repository: "ns/wheels", tag: "1.0", digest: null },
      platform: "linux/amd64",
      resolved: { digest, mediaType },
      manifest: { digest, mediaType, artifactType: null },
      layers: [{ digest: sha256(layer), size: layer.length, mediaType: MEDIA.ociLayerGzip, index: 2, count: 2 }],
      verified: null,
      dest: scratch.at("dest"),
      output: null,
      files,
      skipped: [{ path: ".x", reason: result.skipped[0]?.reason }],
      bytes: layer.length,
      seconds: result.seconds,
    });
  });
  for (const [bad, kind, expected] of [[[`${source}x`], "not-found", 3], [["--bogus"], "usage", 2]] as const) {
    await t.step(`--json ${kind}`, async () => {
      const { code, stdout, stderr } = await run(["--json", ...args, ...bad]);
      const { error } = JSON.parse(stdout);
      assert.deepEqual([code, error.kind], [expected, kind]);
      assert(stderr.includes(error.message) && stderr.includes(error.hint), stderr);
    });
  }
});

Deno.test("--layer selects layers by number, digest or name; an empty layer names the others", async (t) => {
  const empty = gzip(await makeTar([{ name: ".wh.old" }]));
  await using registry = serveImage({}, makeImage({ layers: [BASE, LAYER, empty] }));
  using scratch = new Scratch();
  const common = ["--platform", "linux/amd64", "-d", scratch.at("dest"), sourceOf(registry)];
  const table: [layers: string[], code: number, expected: RegExp][] = [
    [["2"], 0, /layer 2 of 3/],
    [["1"], 0, /layer 1 of 3/],
    [[sha256(LAYER)], 0, /layer 2 of 3/],
    [["1", "2"], 0, /: 2 of 3 layers, .*\n.* from 2 layers$/m],
    [["all"], 0, /: 3 of 3 layers/],
    [["last"], 3, /hint: .*--layer/],
    [["4"], 3, /has 3 layers,.* no layer 4/],
    [[sha256(toBytes("x"))], 3, /has 3 layers,.* no layer sha256:/],
    [["first"], 2, /use layer "first"/],
  ];
  await eachRow(t, table, async ([layers, code, expected]) => {
    const { stderr } = await expectCode(code, [...layers.flatMap((layer) => ["--layer", layer]), ...common]);
    assert.match(stderr, expected);
  });
});

Deno.test("--include, --exclude and --strip-components select what is extracted", async (t) => {
  using scratch = new Scratch();
  const names = ["a.whl", "a.txt", "sub/b.whl", "sub/deep/c.whl", ".hidden/d.whl", ".wh.e"];
  const source = scratch.at("layer.tar", await makeTar(names.map((name) => ({ name, data: name }))));
  const table: [args: string[], expected: string[]][] = [
    [[], ["a.txt", "a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "*.whl"], [".hidden/d.whl", "a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "*.whl", "--exclude", ".*"], ["a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "sub"], ["sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "sub/*.whl"], ["sub/b.whl"]],
    [["--include", "a.{whl,txt}"], ["a.txt", "a.whl"]],
    [["--exclude", "sub"], ["a.txt", "a.whl"]],
    [["--exclude", "sub/deep", "--exclude", "[a].txt"], ["a.whl", "sub/b.whl"]],
    [["--exclude", "!a.whl"], ["a.txt", "a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--strip-components", "1"], ["b.whl", "deep/c.whl"]],
    [["--strip-components", "2", "--exclude", "a*"], ["c.whl"]],
  ];
  await eachRow(t, table, async ([args, expected]) => {
    await expectCode(0, [...args, "--clean", "-d", scratch.at("dest"), source]);
    const entries = Object.entries(contents(scratch.at("dest")));
    assert.deepEqual(entries.filter(([, text]) => text !== "/").map(([path]) => path).sort(), expected);
  });
});

Deno.test("--unpin drops a project's pin under any spelling of its name, and nothing else", async (t) => {
  using scratch = new Scratch();
  const kept = "oslo-config-extra===1\n# oslo.config===9\nnova===1\n";
  const pins = `Oslo.Config===9.1\n${kept}oslo_config===9.2;python_version<'4'\n`;
  const members = [file("upper-constraints.txt", pins), hardlink("copy.txt", "upper-constraints.txt"), file("a.whl")];
  const source = scratch.at("layer.tar", tarOf(...members));
  const cases = [[["--unpin", "OSLO-config"], {}], [[], { PROJECT: "oslo_config" }]] as const;
  await eachRow(t, cases, async ([args, env]) => {
    const { stdout } = await expectCode(0, [...args, "--json", "-d", scratch.at("dest"), source], { env });
    const expected = { "upper-constraints.txt": kept, "copy.txt": pins, "a.whl": "a.whl" };
    assert.deepEqual(contents(scratch.at("dest")), expected);
    const { files }: FetchResult = JSON.parse(stdout);
    assert.equal(files.find(({ path }) => path === "upper-constraints.txt")?.size, kept.length);
  });
});

Deno.test("--unpin keeps the bytes of other lines, in any encoding, and a byte order mark does not hide a pin", async () => {
  using scratch = new Scratch();
  const pins = concat("\ufeffx===1\n# ", new Uint8Array([0x6b, 0xe4]), "\ny===1\n");
  const source = scratch.at("layer.tar", tarOf(regular("upper-constraints.txt", pins)));
  await fetchWheels(source, { dest: scratch.at("dest"), unpin: "x" });
  assert.deepEqual(Deno.readFileSync(scratch.at("dest/upper-constraints.txt")), pins.slice("\ufeffx===1\n".length + 2));
});

Deno.test("a file that --unpin changes has no digest", async () => {
  const pins = { title: "upper-constraints.txt", data: "x===1\ny===1\n" };
  await using registry = serveArtifact({ layers: [pins, { title: "a.whl", data: "a" }] });
  const { files } = await extract(registry, { unpin: "x" });
  const digests = files.map(({ path, digest }) => [path, digest]);
  assert.deepEqual(digests, [["upper-constraints.txt", null], ["a.whl", sha256(toBytes("a"))]]);
});

Deno.test("the bundle runs with an empty cache and without a package registry", async () => {
  using scratch = new Scratch();
  const bundle = scratch.at("fetch_wheels.js");
  const [, ...args] = denoJson.tasks.bundle.command.replace("fetch_wheels.js", bundle).split(" ");
  const bundled = await spawnDeno(args, { cwd: dirname(PROGRAM) }).output();
  assert(bundled.success, new TextDecoder().decode(bundled.stderr));
  const source = scratch.at("layer.tar.gz", gzip(await makeTar(GOOD)));
  const env = { DENO_DIR: scratch.at("cache") };
  const command = ["run", "--cached-only", ...PERMISSIONS, bundle, "-d", scratch.at("dest"), source];
  const { code, stderr } = await runDeno(command, { env, cwd: scratch.path });
  assert.equal(code, 0, stderr);
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
});

// ---------------------------------------------------------------------------------------------------------------------
// README
// ---------------------------------------------------------------------------------------------------------------------

const readText = (name: string) => Deno.readTextFileSync(new URL(name, import.meta.url));
const README = readText("README.md");

/** The rows of the README's table that has this heading, as cells. */
function readmeTable(heading: string): string[][] {
  const [, rows = ""] = new RegExp(`^\\| ${heading} .*\\n\\|[- |]+\\n((?:\\|.*\\n)+)`, "m").exec(README) ?? [];
  return rows.trim().split("\n").map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

Deno.test("README: the option table names the flags and variables of --help, and has at most 15,000 bytes", async () => {
  assert(toBytes(README).length <= 15_000, `${toBytes(README).length} bytes`);
  const { stdout } = await run(["--help"]);
  const help = stdout.split(/\n(?= {2}-)|\n\n/).filter((text) => /^ {2}-/.test(text));
  assert(help.length > 20, stdout);
  const rows = readmeTable("option");
  const flagsIn = (text: string) => [...text.matchAll(/(?<![\w-])--?[a-zA-Z][a-z-]*/g)].map(([flag]) => flag).sort();
  assert.deepEqual(flagsIn(rows.map(([flags]) => flags).join()), flagsIn(help.map((text) => text.slice(0, 33)).join()));
  for (const text of help) {
    const [flag = ""] = /--[a-z-]+/.exec(text) ?? [];
    const [, variable = ""] = /\(\$([A-Z_]+)\)/.exec(text) ?? [];
    const [, value = ""] = /\bdefault:\s+"?([^;)]*?)"?\)/.exec(text) ?? [];
    const [, , named = "", standard = ""] = rows.find(([flags = ""]) => flagsIn(flags).includes(flag)) ?? [];
    if (flag !== "--password-stdin") assert.equal(named, variable && `\`${variable}\``, text);
    if (value !== "none") assert.equal(standard.split(";")[0]?.replaceAll("`", ""), value, text);
  }
});

Deno.test("README: the exit code table has every kind and its code", () => {
  const [, source = ""] = /const EXIT_CODES[^{]*(\{[^}]*\})/.exec(readText("fetch_wheels.ts")) ?? [];
  const codes = [...source.matchAll(/([a-z-]+)"?: (\d+)/g)].map(([, kind, code]) => [code, kind]);
  assert.equal(codes.length, 10);
  assert.deepEqual(readmeTable("exit code").map((row) => row.slice(0, 2)), [["0", ""], ...codes]);
});

Deno.test("README: shebang, deno.json, hint and README grant the same permissions", () => {
  const program = readText("fetch_wheels.ts");
  const [shebang = ""] = program.split("\n");
  assert(shebang.length < 255, "Linux cuts longer ones");
  const { net, read, write, env } = denoJson.permissions.default;
  assert.deepEqual([net, read, write], [true, true, true]);
  const flags = ["--allow-net", "--allow-read", "--allow-write"];
  assert.equal(shebang, `#!/usr/bin/env -S deno run ${flags.join(" ")} --allow-env=${env.join()}`);
  const hint = /^const PERMISSIONS =([^;]*);/m.exec(program)?.[1]?.replace(/["+\s]+/g, " ").replaceAll(", ", ",") ?? "";
  assert.equal(hint.trim(), `${flags.join(" ")} --allow-env='${env.join()}'`);
  assert(README.includes(`${flags.join(" ")} \\\n    --allow-env='${env.join()}' \\\n`));
});

Deno.test("README: the tasks that it names exist", () => {
  const named = [...README.matchAll(/deno(?:@[\d.]+)? task (?:-q )?([\w:-]+)|`(compile:[\w-]+)`/g)];
  for (const [text, task = "", compile] of named) assert(Object.hasOwn(denoJson.tasks, compile ?? task), text);
  assert(named.length >= 6);
});

/** The arguments of each fetch_wheels command in the README's code blocks. */
function readmeCommands(): string[][] {
  const blocks = [...README.matchAll(/^ *```(?:sh|console|dockerfile|yaml)\n.*?^ *```/gms)];
  const lines = blocks.join("\n").replace(/\\\n\s*/g, "").split("\n");
  return lines.filter((line) => !/deno install|^ *COPY/.test(line)).flatMap((line) =>
    /\bfetch_wheels(?:\.ts)? ([^|<>]*)/.exec(line)?.[1] ?? []
  ).map((text) => text.match(/"[^"]*"|'[^']*'|[^\s'"]+/g)?.map((word) => word.replace(/^["']|["']$/g, "")) ?? []);
}

Deno.test("README: every fetch_wheels command in its code blocks works", async (t) => {
  await using registry = serveImage({ auth: "basic", users: { builder: "secret" } });
  using scratch = new Scratch();
  const key = makeKey("P-256");
  const signature = makeSignature({ subject: IMAGE.descriptor, key, format: "bundle" });
  pushSignatures(registry, "ns/wheels", { subject: IMAGE.digest, format: "bundle", signatures: [signature] });
  const values = new Map([["-d", scratch.at("dest")], ["--cache", scratch.at("cache")]]);
  values.set("--verify-key", scratch.at("cosign.pub", key.pem));
  const commands = readmeCommands();
  assert(commands.length >= 9, `${commands.length}`);
  for (const words of commands) {
    await t.step(words.join(" "), async () => {
      const isSource = (word: string) => /^registry\.example|^oci:|^\$/.test(word);
      assert(words.some(isSource), "no source");
      const source = sourceOf(registry);
      const args = words.map((word, at) => isSource(word) ? source : values.get(words[at - 1] ?? "") ?? word);
      const surroundings = { env: { REGISTRY_USERNAME: "builder", REGISTRY_PASSWORD: "secret" }, stdin: "secret\n" };
      await expectCode(0, [...args, "--platform", "linux/amd64", "--dry-run"], surroundings);
    });
  }
});
