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
  main,
  parseChallenges,
  parseImageReference,
  parsePlatform,
  type ProgressEvent,
  selectManifest,
} from "./fetch_wheels.ts";
import {
  concat,
  gzip,
  gzipMembers,
  type MadeImage,
  type MadeManifest,
  makeImage,
  makeIndex,
  makeSchema1,
  makeTar,
  makeWheel,
  MEDIA,
  paxRecords,
  rawHeader,
  rawTar,
  sha256,
  sha512,
  type TarMember,
  toBytes,
  zstd,
} from "./testing/images.ts";
import {
  type Certificate,
  type Fault,
  type LoggedRequest,
  makeCertificate,
  type RegistryOptions,
  type RequestContext,
  startRegistry,
  type TestRegistry,
} from "./testing/registry.ts";
import { createHash, randomBytes } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { deflateRawSync } from "node:zlib";
import denoJson from "./deno.json" with { type: "json" };

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

/** Fetch the layer's tarball into memory, for linux/amd64, over plain http, without waiting between tries. */
async function pull(from: TestRegistry | string, options: FetchWheelsOptions = {}) {
  const source = typeof from === "string" ? from : `${from.host}/ns/wheels:1.0`;
  const chunks: Uint8Array[] = [];
  const output = new WritableStream<Uint8Array>({ write: (chunk) => void chunks.push(chunk) });
  const delay = () => Promise.resolve();
  const result = await fetchWheels(source, { output, platform: "linux/amd64", protocol: "http", delay, ...options });
  return { ...result, tarball: concat(...chunks) };
}

/** The error of what must fail, and fail in this way. */
async function failure(attempt: () => unknown, kind: ErrorKind, message = /^Cannot /): Promise<FetchWheelsError> {
  try {
    await attempt();
  } catch (error) {
    assert(error instanceof FetchWheelsError, `not one of ours: ${error instanceof Error ? error.stack : error}`);
    assert.equal(error.kind, kind, error.message);
    assert.match(error.message, message);
    return error;
  }
  assert.fail(`this did not fail: ${attempt}`);
}

/** A hook that wants the token `t`, and hands the token service's requests, at `/token`, to `answer`. */
function tokenGate(answer: (request: Request) => unknown): RegistryOptions["onRequest"] {
  return (request, { path }) => {
    if (path === "/token") return Response.json(answer(request));
    if (request.headers.get("authorization") === "Bearer t") return undefined;
    const challenge = `Bearer realm="${new URL("/token?account=x", request.url)}",service="s"`;
    return new Response(null, { status: 401, headers: { "www-authenticate": challenge } });
  };
}

/** A hook that redirects requests for blobs to where this function says. */
function redirectBlobs(target: (path: string) => string | undefined): RegistryOptions["onRequest"] {
  return (_request, { path }) => {
    const location = path.includes("/blobs/") ? target(path) : undefined;
    return location === undefined ? undefined : new Response(null, { status: 307, headers: { location } });
  };
}

/** The paths of the requests in which this occurs, each after its origin. */
function paths(registry: TestRegistry, part: string): string[] {
  return registry.requests.map(({ origin, path }) => `${origin} ${path}`).filter((path) => path.includes(part));
}

/** A host where nobody listens. */
async function closedHost(): Promise<string> {
  await using registry = startRegistry();
  return registry.host;
}

const PROGRAM = fileURLToPath(new URL("fetch_wheels.ts", import.meta.url));
const isRoot = new TextDecoder().decode(new Deno.Command("id", { args: ["-u"] }).outputSync().stdout).trim() === "0";

/** A temporary directory; `using` removes it. */
class Scratch implements Disposable {
  readonly path: string = Deno.realPathSync(Deno.makeTempDirSync({ prefix: "fetch_wheels_test-" }));

  /** A path in it; with contents, a file is there. */
  at(name: string, contents?: string | Uint8Array): string {
    const path = join(this.path, name);
    if (contents === undefined) return path;
    Deno.mkdirSync(dirname(path), { recursive: true });
    Deno.writeFileSync(path, toBytes(contents));
    return path;
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.path, { recursive: true });
  }
}

/** All that a directory holds: what each path is, its mode, and its contents or its target. */
function snapshot(dir: string, prefix = ""): Record<string, string> {
  const all: Record<string, string> = {};
  for (const { name } of Deno.readDirSync(dir)) {
    const [path, key] = [join(dir, name), prefix + name];
    const stat = Deno.lstatSync(path);
    const mode = ((stat.mode ?? 0) & 0o7777).toString(8);
    if (stat.isSymlink) all[key] = `link ${Deno.readLinkSync(path)}`;
    else if (stat.isDirectory) Object.assign(all, { [key]: `directory ${mode}` }, snapshot(path, `${key}/`));
    else if (stat.isFile) all[key] = `file ${mode} ${sha256(Deno.readFileSync(path))}`;
    else all[key] = `other ${mode}`;
  }
  return all;
}

/** The files below a directory with their text, links with `-> ` and their target, directories with `/`. */
function contents(dir: string): Record<string, string> {
  const texts = Object.entries(snapshot(dir)).map(([path, entry]) => {
    if (entry.startsWith("link")) return [path, `-> ${Deno.readLinkSync(join(dir, path))}`];
    return [path, entry.startsWith("directory") ? "/" : Deno.readTextFileSync(join(dir, path))];
  });
  return Object.fromEntries(texts);
}

/** Asserts that a fetch fails as it should: `kind` may name alternatives, as in `io|unsafe`. */
async function assertFails(fetching: Promise<FetchResult>, kind: string): Promise<FetchWheelsError> {
  const error = await fetching.then(
    ({ files }) => assert.fail(`no ${kind}: ${JSON.stringify(files)} came`),
    (error) => error,
  );
  assert(error instanceof FetchWheelsError, `no FetchWheelsError: ${error?.stack ?? error}`);
  assert(kind.split("|").includes(error.kind), `${kind} expected: ${error.kind}, ${error.message}`);
  assert.match(error.message, /^Cannot .*[^.]$/); // without the s flag: one line
  return error;
}

/** Asserts that a source is refused, and that DEST and all beside it stay as they are, whether it is there or not. */
async function assertRefused(source: string, kind: string, options: FetchWheelsOptions = {}): Promise<void> {
  using scratch = new Scratch();
  scratch.at("beside", "beside");
  scratch.at("there/good.whl", "old");
  scratch.at("there/sub/other.txt", "other");
  Deno.symlinkSync("good.whl", scratch.at("there/link"));
  Deno.chmodSync(scratch.at("there/good.whl"), 0o640);
  const before = snapshot(scratch.path);
  for (const dest of ["there", "absent", "absent/below"]) {
    await assertFails(fetchWheels(source, { retries: 0, ...options, dest: scratch.at(dest) }), kind);
    assert.deepEqual(snapshot(scratch.path), before, dest);
  }
}

/** Serves a layer in an image of its own, whose manifest may say something else of it; returns the reference. */
function serveLayer(
  registry: TestRegistry,
  layer: Uint8Array<ArrayBuffer>,
  said: { digest?: string; size?: number; mediaType?: string } = {},
): string {
  const { digest = sha256(layer), size = layer.length, mediaType = MEDIA.ociLayerGzip } = said;
  const config = { mediaType: MEDIA.ociConfig, digest: registry.pushBlob(toBytes("{}")), size: 2 };
  const layers = [{ mediaType, digest: registry.pushBlob(layer, digest), size }];
  const manifest = JSON.stringify({ schemaVersion: 2, mediaType: MEDIA.ociManifest, config, layers });
  registry.pushManifest("ns/wheels", "1.0", toBytes(manifest), MEDIA.ociManifest);
  return `${registry.host}/ns/wheels:1.0`;
}

const GOOD: TarMember[] = [{ name: "a.whl", data: "wheel" }, { name: "sub/b.txt", data: "text" }];
const GOOD_CONTENTS = { "a.whl": "wheel", "sub": "/", "sub/b.txt": "text" };

interface Surroundings {
  env?: Record<string, string>;
  stdin?: string;
  cwd?: string;
  /** A program and its arguments that start the process. */
  through?: string[];
}

interface Outcome {
  code: number;
  stdout: string;
  bytes: Uint8Array;
  stderr: string;
  lines: string[];
}

/** Runs the command line in this process. No wheels file is there, unless the arguments name one. */
async function run(args: string[], { env = {}, stdin = "" }: Surroundings = {}): Promise<Outcome> {
  const chunks: Uint8Array[] = [];
  let stderr = "";
  const code = await main(["--wheels-file", "/nowhere/wheels", ...args], {
    env: (name) => env[name],
    stdin: ReadableStream.from([toBytes(stdin)]),
    stdout: new WritableStream({ write: (chunk) => void chunks.push(chunk) }),
    stderr: (text) => void (stderr += text),
  });
  return outcome(code, concat(...chunks), stderr);
}

const PERMISSIONS = ["--no-prompt", "--allow-net", "--allow-read", "--allow-write", "--allow-env"];

/** Starts deno in a process of its own. */
function spawnDeno(args: string[], { env = {}, cwd, through = [] }: Surroundings = {}): Deno.ChildProcess {
  const [command = "", ...rest] = [...through, Deno.execPath(), ...args];
  const options = { args: rest, env: { NO_COLOR: "1", ...env }, cwd, stdin: "null" as const };
  return new Deno.Command(command, { ...options, stdout: "piped", stderr: "piped" }).spawn();
}

async function runDeno(args: string[], surroundings?: Surroundings): Promise<Outcome> {
  const { code, stdout, stderr } = await spawnDeno(args, surroundings).output();
  return outcome(code, stdout, new TextDecoder().decode(stderr));
}

/** Whatever is said is said in whole lines that tell who says it. */
function outcome(code: number, stdout: Uint8Array, stderr: string): Outcome {
  const lines = stderr.split("\n");
  assert.equal(lines.pop(), "", `an unfinished line: ${stderr}`);
  for (const line of lines) assert.match(line, /^fetch_wheels: ./);
  return { code, stdout: new TextDecoder().decode(stdout), bytes: stdout, stderr, lines };
}

function isInstalled(program: string): boolean {
  try {
    return new Deno.Command(program, { args: ["--version"], stdout: "null", stderr: "null" }).outputSync().success;
  } catch {
    return false;
  }
}

/** Noise, so that no byte can stand for another. It is no archive, which only an extraction minds. */
const NOISE = new Uint8Array(randomBytes(200_000));

const LARGE_SIZE = (40 << 20) + 4321;
let large: { bytes: Uint8Array<ArrayBuffer>; digest: string; wheel: string } | undefined;

/** An archive of some ranges with one wheel in it, made when it is first needed. */
function largeLayer(): NonNullable<typeof large> {
  if (large !== undefined) return large;
  const wheel = randomBytes(LARGE_SIZE);
  const bytes = rawTar(rawHeader({ name: "big.whl", size: LARGE_SIZE }), wheel);
  return large = { bytes, digest: sha256(bytes), wheel: sha256(wheel) };
}

function serveLarge(registry: TestRegistry): string {
  const { bytes, digest } = largeLayer();
  return serveLayer(registry, bytes, { digest, mediaType: MEDIA.ociLayer });
}

/** What was asked of the blob: the ranges, undefined for all of it. With storage, of that. */
function askedRanges({ requests, storageUrl }: TestRegistry): (string | undefined)[] {
  const isBlob = ({ origin, path }: LoggedRequest) =>
    storageUrl === undefined ? path.includes("/blobs/") : origin === "storage";
  return requests.filter(isBlob).map(({ range }) => range);
}

/** The first and last byte of a closed range. */
function limits(range: string | undefined): [first: number, last: number] {
  const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? "") ?? assert.fail(`no closed range: ${range}`);
  return [Number(first), Number(last)];
}

/** Faults of each request for the blob, one after the other; none after the last. */
function blobFaults(...faults: Fault[][]): (context: RequestContext) => Fault[] {
  return ({ path, count }) => /\/blobs\/|^\/data\//.test(path) ? faults[count - 1] ?? [] : [];
}

/** As deepEqual, but quick where there is a lot. */
function assertSame(actual: Uint8Array, expected: Uint8Array, message?: string): void {
  assert.equal(actual.length, expected.length, message);
  assert(Buffer.compare(actual, expected) === 0, message ?? "the bytes differ");
}

async function waitFor(condition: () => boolean | Promise<boolean>): Promise<void> {
  for (let i = 0; i < 500; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assert.fail(`did not come to pass: ${condition}`);
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
    ["[2001:db8::1]/x", "[2001:db8::1]", "x", "latest"],
    ["q.io/a.b/c_d/e__f/g---h", "q.io", "a.b/c_d/e__f/g---h", "latest"],
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

Deno.test("parseImageReference() quotes what it refuses and names the rule", async () => {
  const [digest, upper] = [`sha256:${HEX}`, `sha256:${HEX.toUpperCase()}`];
  // deno-fmt-ignore
  const table: [rule: RegExp, texts: string[]][] = [
    [/empty/, [""]],
    [/white space/, [" x", "x y", "x\n"]],
    [/"docker:\/\/"|"https:\/\/"/, ["docker://x", "https://q.io/x"]],
    [/lower case/, ["Python", "q.io/ns/Name"]],
    [/tag/, ["x:", "x:-a", "x:.a", "x:a:b", "x:ä", `x:${"t".repeat(129)}`]],
    [/digest/, ["x@", "x@latest", `x@${upper}`, `x@${digest}0`, `x@sha512:${HEX}`, `x@md5:${HEX}`, "user:pass@q.io/x"]],
    [/"@"/, [`x@${digest}@${digest}`]],
    [/missing/, ["q.io/", "q.io:5000/"]],
    [/repository/, ["/x", "a//b", "a/b/", "a/-b", "a/b_", "a/b___c", "a/b..c", "ns/../x", "a/b%2f", "a/b+c"]],
    [/host/, ["q.io:/x", "q.io:port/x", "q.io:65536/x", "-q.io/x", "::1/x", "[::1/x"]],
    [/255/, ["a".repeat(248), `q.io/${"a".repeat(256)}`]],
  ];
  for (const [rule, texts] of table) {
    for (const text of texts) {
      const { message } = await failure(() => parseImageReference(text), "usage", rule);
      assert(message.includes(JSON.stringify(text)), message);
    }
  }
});

Deno.test("parsePlatform() puts platforms into the registries' names", () => {
  const table: [text: string, os: string, architecture: string, variant?: string][] = [
    ["linux/amd64", "linux", "amd64"],
    ["linux/x86_64", "linux", "amd64"],
    ["linux/x86-64", "linux", "amd64"],
    ["linux/aarch64", "linux", "arm64"],
    ["linux/armhf", "linux", "arm", "v7"],
    ["linux/armel", "linux", "arm", "v6"],
    ["linux/arm/v6", "linux", "arm", "v6"],
    ["Linux/ARM64", "linux", "arm64"],
    ["windows/amd64", "windows", "amd64"],
    ["linux/constructor", "linux", "constructor"],
  ];
  for (const [text, os, architecture, variant] of table) {
    assert.deepEqual(parsePlatform(text), { os, architecture, ...(variant && { variant }) }, text);
  }
});

Deno.test("parsePlatform() refuses what is no platform", async () => {
  for (const text of ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/arm/", "linux amd64", "linux/a b"]) {
    const error = await failure(() => parsePlatform(text), "usage");
    assert(error.message.includes(JSON.stringify(text)), error.message);
  }
});

Deno.test("hostPlatform() is Linux for this machine's architecture", () => {
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

Deno.test("credentials come from stdin or the environment, and are never shown", async () => {
  const other = { REGISTRY_USERNAME: "other", REGISTRY_PASSWORD: "other" };
  const table: [args: string[], given: { env?: Record<string, string>; stdin?: string }][] = [
    [["--username", USER, "--password-stdin"], { stdin: `${PASSWORD}\n` }],
    [["--username", USER, "--password-stdin"], { stdin: PASSWORD, env: other }],
    [[], { env: { REGISTRY_USERNAME: USER, REGISTRY_PASSWORD: PASSWORD } }],
  ];
  for (const [args, given] of table) {
    await using registry = serveImage({ auth: "basic", users });
    const common = ["-v", "-o", "-", "--protocol", "http", `${registry.host}/ns/wheels:1.0`];
    const { code, bytes, stderr } = await run([...args, ...common], given);
    assert.equal(code, 0, stderr);
    assert.deepEqual(bytes, LAYER);
    const secrets = ["pa:ss", "密", Buffer.from(`${USER}:${PASSWORD}`).toString("base64")];
    for (const secret of secrets) assert(!stderr.includes(secret), stderr);
  }
});

Deno.test("half a pair of credentials is a usage error before any request", async () => {
  const halves = [{ username: "u" }, { password: "p" }, { username: "", password: "p" }];
  for (const options of [...halves, { username: "not:sendable", password: "p" }]) {
    const fetch = () => assert.fail("a request was sent");
    await failure(() => pull("localhost:5000/x", { ...options, fetch }), "usage");
  }
});

const HOST = "registry.example:5000";
const account = (name: string) => ({ auth: btoa(`${name}:pass:word`) });
const said = (username: string) => ({ username, password: "pass:word" });

Deno.test("findCredentials() finds what belongs to the registry, and only that", () => {
  const umlaut = { auth: Buffer.from("user:pässwörd", "utf8").toString("base64") };
  const hub = { "https://index.docker.io/v1/": account("hub") };
  const table: [config: DockerConfig, name: string, expected: Credentials | undefined][] = [
    [{}, `${HOST}/ns/name`, undefined],
    [{ auths: { [HOST]: account("a") } }, `${HOST}/ns/name`, said("a")],
    [{ auths: { [HOST]: umlaut } }, `${HOST}/ns/name`, { username: "user", password: "pässwörd" }],
    [{ auths: { [`https://${HOST}/v1/`]: account("a") } }, `${HOST}/ns/name`, said("a")],
    [{ auths: { [`${HOST}/v2/`]: account("a") } }, `${HOST}/ns/name`, said("a")],
    [{ auths: { "registry.example": account("a") } }, `${HOST}/ns/name`, undefined],
    [{ auths: { [HOST]: account("a") } }, "registry.example/ns/name", undefined],
    [{ auths: { [`${HOST}0`]: account("a"), "example:5000": account("b") } }, `${HOST}/ns/name`, undefined],
    [{ auths: hub }, "docker.io/library/name", said("hub")],
    [{ auths: { "docker.io": account("hub") } }, "docker.io/library/name", said("hub")],
    [{ auths: hub }, `${HOST}/index.docker.io/v1`, undefined],
    [{ auths: { [HOST]: account("a"), [`${HOST}/ns`]: account("b") } }, `${HOST}/ns/name`, said("b")],
    [{ auths: { [HOST]: account("a"), [`${HOST}/ns/na`]: account("b") } }, `${HOST}/ns/name`, said("a")],
    [{ auths: { [`${HOST}/ns/name`]: account("c"), [`${HOST}/ns`]: account("b") } }, `${HOST}/ns/name`, said("c")],
    [{ auths: { [HOST]: { ...account("a"), identitytoken: "t" } } }, `${HOST}/ns/name`, { identityToken: "t" }],
    [{ auths: { [HOST]: { username: "u", password: "p" } } }, `${HOST}/n`, { username: "u", password: "p" }],
    [{ auths: { [HOST]: { auth: btoa("no colon") } } }, `${HOST}/n`, undefined],
    [{ auths: { [HOST]: account("a") }, credsStore: "store" }, `${HOST}/n`, { helper: "store" }],
    [{ credHelpers: { [HOST]: "own" }, credsStore: "store" }, `${HOST}/n`, { helper: "own" }],
    [{ credHelpers: { "other.example": "own" }, credsStore: "store" }, `${HOST}/n`, { helper: "store" }],
    [{ credHelpers: { [HOST]: "" }, auths: { [HOST]: account("a") } }, `${HOST}/n`, said("a")],
  ];
  for (const [config, name, expected] of table) {
    const slash = name.indexOf("/");
    const image = { registry: name.slice(0, slash), repository: name.slice(slash + 1) };
    assert.deepEqual(findCredentials(config, image), expected, JSON.stringify([config, name]));
  }
});

Deno.test("what docker login and podman login left is used, and only when the registry asks", async (t) => {
  await using registry = serveImage({ auth: "bearer", users: { user: "pass:word" }, identityTokens: ["identity"] });
  const auths = { [registry.host]: account("user") };
  const args = ["--protocol", "http", "-o", "-", "--platform", "linux/amd64", `${registry.host}/ns/wheels:1.0`];
  const table: [
    name: string,
    files: Record<string, unknown>,
    env: Record<string, string>,
    code: number,
    said: RegExp,
  ][] = [
    ["Docker's file at home", { ".docker/config.json": { auths } }, { HOME: "." }, 0, /layer 2/],
    ["$DOCKER_CONFIG", { "d/config.json": { auths } }, { DOCKER_CONFIG: "d", HOME: "nowhere" }, 0, /layer 2/],
    ["$REGISTRY_AUTH_FILE", { "auth.json": { auths } }, { REGISTRY_AUTH_FILE: "auth.json" }, 0, /layer 2/],
    [
      "an identity token",
      {
        "auth.json": { auths: { [registry.host]: { identitytoken: "identity" } } },
      },
      { REGISTRY_AUTH_FILE: "auth.json" },
      0,
      /layer 2/,
    ],
    [
      "a wrong password, which is no reason to go on without",
      {
        "auth.json": { auths: { [registry.host]: account("wrong") } },
      },
      { REGISTRY_AUTH_FILE: "auth.json" },
      4,
      /check the user name/,
    ],
    [
      "a broken file, and the next one",
      { "auth.json": "{", "d/config.json": { auths } },
      {
        REGISTRY_AUTH_FILE: "auth.json",
        DOCKER_CONFIG: "d",
      },
      0,
      /warning: "[^"]*auth.json" is left out/,
    ],
    [
      "a helper that is not there",
      { "d/config.json": { credsStore: "nowhere" } },
      { DOCKER_CONFIG: "d" },
      4,
      /not installed/,
    ],
    [
      "a helper that has a path in its name",
      { "d/config.json": { credsStore: "../x" } },
      { DOCKER_CONFIG: "d" },
      4,
      /no name/,
    ],
  ];
  for (const [name, files, env, code, said] of table) {
    await t.step(name, async () => {
      using scratch = new Scratch();
      for (const [path, value] of Object.entries(files)) {
        scratch.at(path, typeof value === "string" ? value : JSON.stringify(value));
      }
      const placed = Object.entries(env).map(([key, value]) => [key, scratch.at(value)]);
      const outcome = await run(args, { env: Object.fromEntries(placed) });
      assert.equal(outcome.code, code, outcome.stderr);
      assert.match(outcome.stderr, said);
      if (code === 0) assert.deepEqual(outcome.bytes, LAYER);
      assert(!/pass:word|identity/.test(outcome.stderr), outcome.stderr);
    });
  }
  await t.step("none of them is read for a registry that does not ask", async () => {
    await using open = serveImage();
    using scratch = new Scratch();
    const env = { REGISTRY_AUTH_FILE: scratch.at("auth.json", "{") };
    const { code, stderr } = await run([...args.slice(0, -1), `${open.host}/ns/wheels:1.0`], { env });
    assert.equal(code, 0);
    assert.doesNotMatch(stderr, /auth.json/);
  });
});

Deno.test("an identity token is exchanged by POST, or by GET where there is none", async () => {
  for (const identityTokens of [["identity"], undefined]) {
    await using registry = serveImage({ auth: "bearer", users: { "<token>": "identity" }, identityTokens });
    using scratch = new Scratch();
    const config = { auths: { [registry.host]: { identitytoken: "identity" } } };
    const { tarball } = await pull(registry, { authFiles: [scratch.at("auth.json", JSON.stringify(config))] });
    assert.deepEqual(tarball, LAYER);
    const asked = registry.requests.filter(({ origin }) => origin === "token");
    assert.deepEqual(asked.map(({ method }) => method), identityTokens === undefined ? ["POST", "GET"] : ["POST"]);
    const form = new URLSearchParams(asked[0]?.body);
    assert.deepEqual([form.get("grant_type"), form.get("refresh_token"), form.get("scope")], [
      "refresh_token",
      "identity",
      "repository:ns/wheels:pull",
    ]);
  }
});

Deno.test("a credential helper is asked by name, for the registry by its key", async (t) => {
  await using registry = serveImage({ auth: "basic", users: { user: "pass:word" } });
  using scratch = new Scratch();
  const script = `#!/bin/sh\n[ "$1 $(cat)" = "get ${registry.host}" ] || exit 1\n` +
    `echo '{"ServerURL":"x","Username":"user","Secret":"pass:word"}'\n`;
  Deno.chmodSync(scratch.at("docker-credential-mine", script), 0o755);
  const config = { credHelpers: { [registry.host]: "mine" } };
  const env = {
    DOCKER_CONFIG: dirname(scratch.at("docker/config.json", JSON.stringify(config))),
    PATH: `${scratch.path}:${Deno.env.get("PATH")}`,
  };
  const args = [PROGRAM, "--protocol", "http", "-d", scratch.at("dest"), "--platform", "linux/amd64"];
  const source = `${registry.host}/ns/wheels:1.0`;
  await t.step("with --allow-run", async () => {
    const { code, stderr } = await runDeno(["run", ...PERMISSIONS, "--allow-run", ...args, source], { env });
    assert.equal(code, 0, stderr);
  });
  await t.step("without", async () => {
    const { code, stderr } = await runDeno(["run", ...PERMISSIONS, ...args, source], { env });
    assert.equal(code, 4, stderr);
    assert.match(stderr, /warning: .*--allow-run=docker-credential-mine/);
  });
});

// ---------------------------------------------------------------------------------------------------------------------
// 3 Transport
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("a redirect to another origin is followed without Authorization", async () => {
  for (const auth of ["basic", "bearer"] as const) {
    for (const status of [301, 302, 303, 307, 308] as const) {
      await using registry = serveImage({ auth, users, storage: { status } });
      assert.deepEqual((await pull(registry, CREDENTIALS)).tarball, LAYER);
      const storage = registry.requests.filter(({ origin }) => origin === "storage");
      assert.deepEqual(storage.map(({ headers }) => headers.get("authorization")), [null], `${auth} ${status}`);
    }
  }
});

Deno.test("a relative Location is resolved, and keeps Authorization on its origin", async () => {
  const onRequest = redirectBlobs((path) => path.endsWith("/x") ? undefined : `../blobs/./x`);
  await using registry = serveImage({ auth: "basic", users, onRequest });
  registry.pushBlob(LAYER, "x");
  assert.deepEqual((await pull(registry, CREDENTIALS)).tarball, LAYER);
  const blobs = registry.requests.filter(({ path }) => path.includes("/blobs/"));
  assert.deepEqual(blobs.map(({ headers }) => headers.has("authorization")), [true, true]);
});

Deno.test("ten redirects are followed, and no eleventh", async () => {
  let redirects = 10;
  await using registry = serveImage({ onRequest: redirectBlobs((path) => redirects-- > 0 ? path : undefined) });
  assert.deepEqual((await pull(registry)).tarball, LAYER);
  redirects = Infinity;
  await failure(() => pull(registry), "network", /redirect/);
  assert.equal(paths(registry, "/blobs/").length, 22);
});

Deno.test("https is redirected to http without credentials only", async () => {
  const tls = await makeCertificate();
  await using plain = serveImage();
  const onRequest = redirectBlobs((path) => `${plain.url}${path}`);
  await using open = serveImage({ tls, onRequest });
  await using closed = serveImage({ tls, auth: "basic", users, onRequest });
  const options = { protocol: "https", insecure: true } as const;
  assert.deepEqual((await pull(open, options)).tarball, LAYER);
  assert.equal(plain.requests.length, 1);
  await failure(() => pull(closed, { ...options, ...CREDENTIALS }), "network", /http/);
  assert.equal(plain.requests.length, 1);
});

Deno.test("what a redirect leads to is never shown with its query or its password", async () => {
  const gone = await closedHost();
  const signed = { storage: { signed: true } };
  const table: [options: RegistryOptions, faults: Fault[], kind: ErrorKind][] = [
    [signed, [{ kind: "expiredSignature" }], "auth"],
    [signed, [{ kind: "reset" }], "network"],
    [signed, [{ kind: "dieAt", byte: 0 }], "network"],
    ...[`http://${gone}/?Signature=CERT`, "ftp://u:secret@h/?Signature=x", "http://u:secret@:x/?Signature=x"].map(
      (url): [RegistryOptions, Fault[], ErrorKind] => [{ onRequest: redirectBlobs(() => url) }, [], "network"],
    ),
  ];
  for (const [options, faults, kind] of table) {
    await using registry = serveImage(options);
    registry.faults = ({ origin }) => origin === "storage" ? faults : [];
    const events: ProgressEvent[] = [];
    const attempt = () => pull(registry, { retries: 1, onProgress: (event) => events.push(event) });
    const { message, hint = "" } = await failure(attempt, kind);
    const args = ["-v", "-o", "-", "--protocol", "http", "--retries", "0", `${registry.host}/ns/wheels:1.0`];
    const { stderr } = await run(args);
    assert.match(stderr, /\/blobs\/.* answered 307\n/);
    for (const said of [JSON.stringify(events), message, hint, stderr]) {
      assert(!/Signature=|expires=|secret/.test(said), said);
    }
  }
});

Deno.test("each request is a GET that asks for bytes as they are", async () => {
  const tls = await makeCertificate();
  for (const options of [{ auth: "bearer", storage: true }, { auth: "bearer", storage: true, tls }] as const) {
    await using registry = serveImage(options);
    await pull(registry, { protocol: "detect", insecure: true });
    assert.equal(registry.requests.length, 5);
    for (const { method, headers } of registry.requests) {
      assert.deepEqual([method, headers.get("accept-encoding")], ["GET", "identity"]);
    }
  }
});

Deno.test("detect tries https, then http at this machine, and stays with what worked", async () => {
  await using registry = serveImage({ auth: "basic", users });
  const asked: string[] = [];
  const counting: typeof fetch = (input, init) => {
    asked.push(new URL(String(input)).protocol);
    return fetch(input, init);
  };
  await pull(registry, { ...CREDENTIALS, protocol: "detect", fetch: counting });
  assert.deepEqual(asked, ["https:", "http:", "http:", "http:"]);
});

Deno.test("detect tries again when plain http fails for a moment", async () => {
  await using registry = serveImage();
  registry.faults = ({ count, path }) => path.includes("/manifests/") && count === 1 ? [{ kind: "reset" }] : [];
  assert.deepEqual((await pull(registry, { protocol: "detect" })).tarball, LAYER);
});

Deno.test("detect keeps to http after a redirect to https", async () => {
  await using target = serveImage({ tls: await makeCertificate() });
  await using registry = serveImage({
    onRequest: (_request, { path }) => path.includes("/blobs/") ? undefined : Response.redirect(`${target.url}${path}`),
  });
  assert.deepEqual((await pull(registry, { protocol: "detect", insecure: true, retries: 0 })).tarball, LAYER);
});

Deno.test("detect speaks plain http to names of the neighbourhood only", async () => {
  // deno-fmt-ignore
  const near = ["localhost", "127.0.0.1", "127.9.9.9:5000", "[::1]:5000", "10.1.2.3", "172.16.0.1", "172.31.0.1",
    "192.168.0.1", "169.254.1.1", "[fd12::1]", "[fe80::1]", "registry:5000", "r.local", "r.svc.internal"];
  // deno-fmt-ignore
  const far = ["r.example", "172.32.0.1", "172.15.0.1", "11.0.0.1", "8.8.8.8", "10.example.com", "127.example.com",
    "localhost.example.com", "r.local.example", "r.notlocal", "[2001:db8::1]", "[fd::1]"];
  for (const host of [...near, ...far]) {
    const asked: string[] = [];
    const fetch = (input: RequestInfo | URL) => {
      asked.push(new URL(String(input)).protocol);
      return Promise.reject(new TypeError("fetch failed", { cause: new Error("Connection refused (os error 111)") }));
    };
    const error = await failure(() => pull(`${host}/x`, { protocol: "detect", retries: 0, fetch }), "network");
    assert.deepEqual(asked, near.includes(host) ? ["https:", "http:"] : ["https:"], host);
    if (far.includes(host)) assert.match(error.hint ?? "", /--protocol http\b/);
  }
});

Deno.test("a password goes over plain http where it was said or nobody listens", async () => {
  const table: [host: string, protocol: "detect" | "http" | "https", challenge: string, expected: boolean][] = [
    ["r.example", "https", 'Bearer realm="http://10.0.0.1/token"', false],
    ["r.example", "https", 'Bearer realm="https://10.0.0.1/token"', true],
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
    const { hint = "" } = await failure(() => pull(`${host}/x/y`, { ...CREDENTIALS, protocol, fetch }), "auth");
    assert.equal(isSent, expected, `${host} ${protocol} ${challenge}`);
    if (!expected && protocol === "detect") assert.match(hint, /--protocol http\b/);
  }
});

Deno.test("an untrusted certificate is refused at once, and the hint names both ways out", async () => {
  await using registry = serveImage({ tls: await makeCertificate() });
  const delay = () => assert.fail("it was tried again");
  for (const protocol of ["detect", "https"] as const) {
    const { hint = "" } = await failure(() => pull(registry, { protocol, delay }), "network", /certificate/);
    assert.match(hint, /--ca-file.*--insecure/);
  }
  assert.equal(registry.requests.length, 0);
});

Deno.test("a certificate is trusted by caFile, also one that is its own CA, or by insecure", async () => {
  const own = await makeCertificate();
  using directory = new Scratch();
  const signed = await makeSignedCertificate(directory.path);
  const { caFile } = signed;
  for (const tls of [own, signed]) {
    await using registry = serveImage({ tls, auth: "bearer", users, storage: { signed: true } });
    for (const trust of [{ caFile }, { insecure: true }]) {
      assert.deepEqual((await pull(registry, { ...trust, ...CREDENTIALS, protocol: "https" })).tarball, LAYER);
    }
  }
  await Deno.writeTextFile(caFile, signed.cert);
  await using registry = serveImage({ tls: own });
  await failure(() => pull(registry, { caFile, protocol: "https" }), "network", /certificate/);
});

/** A certificate that `makeCertificate()`'s has signed; rustls takes this one, but not one that is its own CA. */
async function makeSignedCertificate(directory: string): Promise<Certificate & { caFile: string }> {
  const [caFile, certFile, keyFile] = [`${directory}/ca.pem`, `${directory}/cert.pem`, `${directory}/key.pem`];
  const signer = await makeCertificate();
  await Deno.writeTextFile(caFile, `A comment\n${signer.cert}${signer.key}`);
  // deno-fmt-ignore
  const args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30",
    "-subj", "/CN=signed", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
    "-CA", caFile, "-CAkey", caFile, "-keyout", keyFile, "-out", certFile];
  const { success, stderr } = await new Deno.Command("openssl", { args, stdin: "null" }).output();
  assert(success, new TextDecoder().decode(stderr));
  return { caFile, cert: await Deno.readTextFile(certFile), key: await Deno.readTextFile(keyFile) };
}

Deno.test("insecure survives an answer that is given up halfway", async () => {
  await using registry = startRegistry({ tls: await makeCertificate() });
  registry.pushManifest("ns/wheels", "1.0", new Uint8Array(5 << 20), MEDIA.ociManifest);
  await failure(() => pull(registry, { protocol: "https", insecure: true }), "integrity");
});

Deno.test("HTTPS_PROXY and NO_PROXY are honoured, however certificates are checked", async () => {
  using directory = new Scratch();
  const tls = await makeSignedCertificate(directory.path);
  await using registry = serveImage({ tls });
  await using proxy = startProxy();
  const outside = Object.entries(Deno.env.toObject()).filter(([name]) => !/proxy/i.test(name));
  const inherited = { ...Object.fromEntries(outside), DENO_NO_UPDATE_CHECK: "1" };
  const program = new URL("./fetch_wheels.ts", import.meta.url).href;
  // deno-fmt-ignore
  const args = ["run", "--no-check", "--allow-net", "--allow-read", "--allow-write", "--allow-env", program, "-o", "-",
    "--wheels-file", "/nonexistent/wheels", "--platform", "linux/amd64", "--retries=0", `${registry.host}/ns/wheels:1.0`];
  const ways = [["DENO_CERT", []], ["ca-file", ["--ca-file", tls.caFile]], ["insecure", ["--insecure"]]] as const;
  await Promise.all(ways.flatMap(([way, more]) =>
    ["", "127.0.0.1"].map(async (exempt) => {
      const user = `${way}${exempt}:password`;
      const proxies = { HTTPS_PROXY: `http://${user}@${proxy.host}`, NO_PROXY: exempt };
      const env = { ...inherited, ...proxies, ...(way === "DENO_CERT" && { DENO_CERT: tls.caFile }) };
      const command = new Deno.Command(Deno.execPath(), { args: [...args, ...more], env, clearEnv: true });
      const { success, stdout, stderr } = await command.output();
      assert(success, new TextDecoder().decode(stderr));
      assert.deepEqual(new Uint8Array(stdout), LAYER);
      assert.equal(proxy.users.includes(user), exempt === "", user);
    })
  ));
});

/** A proxy that knows CONNECT and remembers who asked. */
function startProxy(): AsyncDisposable & { host: string; users: string[] } {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const users: string[] = [];
  const relays: Promise<unknown>[] = [];
  const relay = async (client: Deno.TcpConn) => {
    const buffer = new Uint8Array(4096);
    let head = "";
    while (!head.includes("\r\n\r\n")) {
      head += new TextDecoder().decode(buffer.subarray(0, await client.read(buffer) ?? 0));
    }
    users.push(Buffer.from(/^proxy-authorization: basic (\S+)/im.exec(head)?.[1] ?? "", "base64").toString());
    const [, hostname = "", port] = /^CONNECT (\S+):(\d+) /.exec(head) ?? [];
    const server = await Deno.connect({ hostname, port: Number(port) });
    await client.write(toBytes("HTTP/1.1 200 OK\r\n\r\n"));
    await Promise.allSettled([client.readable.pipeTo(server.writable), server.readable.pipeTo(client.writable)]);
  };
  const accepting = (async () => {
    for await (const client of listener) relays.push(relay(client));
  })();
  return {
    host: `127.0.0.1:${listener.addr.port}`,
    users,
    async [Symbol.asyncDispose]() {
      listener.close();
      await accepting;
      await Promise.allSettled(relays);
    },
  };
}

Deno.test("passing failures are tried again, others are not", async () => {
  const passing = [408, 429, 500, 502, 503, 504];
  const kinds: Record<number, ErrorKind> = { 403: "auth", 404: "not-found" };
  for (const code of [...passing, 400, 403, 404, 405, 410, 451]) {
    await using registry = serveImage();
    registry.faults = [{ kind: "status", code }];
    const attempt = () => pull(registry, { retries: 3 });
    await failure(attempt, kinds[code] ?? "network", new RegExp(String(code)));
    assert.equal(paths(registry, "/blobs/").length, passing.includes(code) ? 4 : 1, String(code));
  }
});

Deno.test("a connection that is reset or refused is tried again", async (t) => {
  await t.step("reset, then right", async () => {
    await using registry = serveImage({ auth: "bearer", storage: true });
    registry.faults = ({ count }) => count === 1 ? [{ kind: "reset" }] : [];
    assert.deepEqual((await pull(registry, { retries: 1 })).tarball, LAYER);
  });
  await t.step("reset within a manifest, then right", async () => {
    await using registry = serveImage();
    registry.faults = ({ count, path }) =>
      path.includes("/manifests/") && count === 1 ? [{ kind: "dieAt", byte: 20 }] : [];
    assert.deepEqual((await pull(registry)).tarball, LAYER);
  });
  await t.step("refused for good", async () => {
    const host = await closedHost();
    const delays: number[] = [];
    const delay = (milliseconds: number) => Promise.resolve(void delays.push(milliseconds));
    await failure(() => pull(`${host}/ns/wheels`, { retries: 3, delay }), "network", /refused/);
    assert.equal(delays.length, 3);
  });
});

Deno.test("a refused connection is one whatever the image is called", async () => {
  await using registry = serveImage();
  registry.pushImage("ns/wheels", "SELF_SIGNED_CERT", IMAGE);
  const { tarball } = await pull(`${registry.host}/ns/wheels:SELF_SIGNED_CERT`, { protocol: "detect" });
  assert.deepEqual(tarball, LAYER);
});

Deno.test("delays grow, and are drawn by lot", async () => {
  await using registry = serveImage();
  registry.faults = () => [{ kind: "status", code: 503 }];
  const { random } = Math;
  using _restored = { [Symbol.dispose]: () => void (Math.random = random) };
  const delaysFor = async (lot: number, retries = 4): Promise<number[]> => {
    Math.random = () => lot;
    const delays: number[] = [];
    const delay = (milliseconds: number) => Promise.resolve(void delays.push(milliseconds));
    await failure(() => pull(registry, { retries, delay }), "network", /503/);
    return delays;
  };
  const [low, high] = [await delaysFor(0.25), await delaysFor(0.75)];
  assert.equal(low.length, 4);
  assert(low.every((delay, at) => delay > (low[at - 1] ?? 0) && delay < (high[at] ?? 0)), `${low}; ${high}`);
  assert.deepEqual(await delaysFor(1, 9), [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
  assert.deepEqual(await delaysFor(0), [0, 0, 0, 0]);
});

Deno.test("Retry-After is obeyed where it makes sense", async () => {
  const now = Date.parse("2030-01-01T00:00:00Z");
  const obeyed: [value: string, milliseconds: number][] = [
    ["7", 7000],
    ["60", 60_000],
    ["Tue, 01 Jan 2030 00:00:20 GMT", 20_000],
  ];
  const ignored = ["Mon, 31 Dec 2029 23:00:00 GMT", "soon", "-5", "1.5", "", "880\xb5s"];
  const refused: [value: string, words: RegExp][] = [
    ["61", /\b61 s\b.*/],
    ["99999999999999999999", /wait/],
    ["Tue, 01 Jan 2030 00:02:00 GMT", /\b120 s\b/],
  ];
  const body = JSON.stringify({ errors: [{ code: "TOOMANYREQUESTS", message: "come back tomorrow" }] });
  for (const value of [...obeyed, ...ignored, ...refused].map((entry) => [entry].flat()[0] as string)) {
    for (const [code, part] of [[429, "/manifests/"], [503, "/blobs/"]] as const) {
      await using registry = serveImage();
      const fault: Fault = { kind: "status", code, headers: { "retry-after": value }, body };
      registry.faults = ({ path, count }) => path.includes(part) && count === 1 ? [fault] : [];
      const delays: number[] = [];
      const delay = (milliseconds: number) => Promise.resolve(void delays.push(milliseconds));
      const attempt = () => pull(registry, { delay, now: () => now });
      const [, words] = refused.find(([text]) => text === value) ?? [];
      if (words === undefined) assert.deepEqual((await attempt()).tarball, LAYER);
      else {
        const { message } = await failure(attempt, "network", words);
        assert(message.includes(String(code)) && message.includes("come back tomorrow"), message);
        assert.equal(paths(registry, part).length, 1);
      }
      const own = delays.length === 1 && delays.every((delay) => delay >= 0 && delay <= 500);
      if (ignored.includes(value)) assert(own, `"${value}": ${delays}`);
      else assert.deepEqual(delays, obeyed.filter(([text]) => text === value).map(([, wait]) => wait), value);
    }
  }
});

Deno.test("a registry that falls silent is given up, before its answer or within", async () => {
  const never = () => new Promise<undefined>(() => {});
  const tls = await makeCertificate();
  for (const options of [{}, { onRequest: never }, { tls }, { tls, onRequest: never }]) {
    await using registry = serveImage(options);
    registry.faults = [{ kind: "stall", byte: 0 }];
    const trust = "tls" in options ? { protocol: "https", insecure: true } as const : {};
    const attempt = () => pull(registry, { ...trust, timeout: 0.05, retries: 1 });
    await failure(attempt, "network", /: nothing came for 0\.05 s$/);
  }
});

Deno.test("signal ends a wait between two tries", async () => {
  await using registry = serveImage();
  registry.faults = () => [{ kind: "status", code: 503, headers: { "retry-after": "60" } }];
  const controller = new AbortController();
  const reason = new Error("enough");
  const onProgress = ({ type }: ProgressEvent) => type === "retry" && setTimeout(() => controller.abort(reason));
  const options = { delay: undefined, signal: controller.signal, onProgress };
  await assert.rejects(pull(registry, options), reason);
});

// ---------------------------------------------------------------------------------------------------------------------
// 4 Auth
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

Deno.test("a public image costs four requests, a second registry without tokens two", async () => {
  await using closed = serveImage({ auth: "bearer" });
  await pull(closed);
  assert.deepEqual(closed.requests.map(({ origin, path, status }) => [origin, path.split("/").at(-2), status]), [
    ["registry", "manifests", 401],
    ["token", "", 200],
    ["registry", "manifests", 200],
    ["registry", "blobs", 200],
  ]);
  const { search, headers } = closed.requests[1] ?? assert.fail();
  assert.equal(new URLSearchParams(search).get("scope"), "repository:ns/wheels:pull");
  assert.equal(new URLSearchParams(search).get("service"), "test-registry");
  assert.equal(headers.get("authorization"), null);

  await using open = serveImage();
  await pull(open);
  assert.equal(open.requests.length, 2);
});

Deno.test("Basic and Bearer take a password with colons, blanks and letters beyond ASCII", async () => {
  const expected = `Basic ${Buffer.from(`${USER}:${PASSWORD}`, "utf8").toString("base64")}`;
  for (const auth of ["basic", "bearer"] as const) {
    await using registry = serveImage({ auth, users });
    assert.deepEqual((await pull(registry, CREDENTIALS)).tarball, LAYER);
    const sent = registry.requests.map(({ headers }) => headers.get("authorization"));
    assert.deepEqual(sent.slice(0, 2), [null, expected]);
  }
});

Deno.test("Bearer is preferred to Basic, whichever comes first", async () => {
  const challenge = ({ realm }: { realm: string }) => `Basic realm="r", Bearer realm="${realm}"`;
  await using registry = serveImage({ auth: "bearer", users, challenge });
  assert.deepEqual((await pull(registry, CREDENTIALS)).tarball, LAYER);
  const sent = registry.requests.map(({ origin, headers }) => `${origin} ${headers.get("authorization")}`.split(" "));
  assert.deepEqual(sent.map((words) => words.slice(0, 2).join(" ")), [
    "registry null",
    "token Basic",
    "registry Bearer",
    "registry Bearer",
  ]);
});

Deno.test("the token may be called token or access_token", async () => {
  for (const answer of [{ token: "t" }, { access_token: "t" }, { token: "", access_token: "t" }]) {
    await using registry = serveImage({ onRequest: tokenGate(() => answer) });
    assert.deepEqual((await pull(registry)).tarball, LAYER);
  }
  for (const answer of [{}, { token: 1 }, { token: "a\nb" }, [], null]) {
    await using registry = serveImage({ onRequest: tokenGate(() => answer) });
    await failure(() => pull(registry), "auth", /token/);
  }
});

Deno.test("a realm's own query is kept", async () => {
  let query = "";
  await using registry = serveImage({
    onRequest: tokenGate(({ url }) => {
      query = new URL(url).search;
      return { token: "t" };
    }),
  });
  await pull(registry);
  assert.deepEqual(Object.fromEntries(new URLSearchParams(query)), {
    account: "x",
    service: "s",
    scope: "repository:ns/wheels:pull",
  });
});

Deno.test("a refused token is renewed once, then given up", async () => {
  for (const part of ["/manifests/", "/blobs/"]) {
    await using registry = serveImage({ auth: "bearer" });
    let refused = 1;
    registry.faults = ({ origin, path }) => {
      const isRefused = path.includes(part) && paths(registry, "token /").length > 0 && refused-- > 0;
      return origin === "registry" && isRefused ? [{ kind: "expiredToken" }] : [];
    };
    assert.deepEqual((await pull(registry)).tarball, LAYER);
    assert.equal(paths(registry, "token /").length, 2, part);
    refused = Infinity;
    await failure(() => pull(registry), "auth", /401/);
    assert.equal(paths(registry, "token /").length, 4, part);
  }
});

Deno.test("refused credentials are an error, not an anonymous try", async () => {
  for (const auth of ["basic", "bearer"] as const) {
    await using registry = serveImage({ auth, users });
    const wrong = { username: USER, password: "wrong horse" };
    const { message, hint } = await failure(() => pull(registry, wrong), "auth", /401/);
    assert(!`${message}${hint}`.includes("wrong horse"));
    assert.deepEqual(registry.requests.map(({ headers }) => headers.has("authorization")), [false, true]);
  }
});

Deno.test("a private image without credentials is an error that says how to give them", async () => {
  for (const auth of ["basic", "bearer"] as const) {
    await using registry = serveImage({ auth, users });
    const { hint = "" } = await failure(() => pull(registry), "auth");
    assert.match(hint, /--username/);
  }
});

Deno.test("a challenge that cannot be met gets no credentials", async () => {
  for (const challenge of ["", "Negotiate", 'Bearer service="s"', 'Bearer realm="ftp://h/"']) {
    await using registry = serveImage({ auth: "basic", users, challenge });
    await failure(() => pull(registry, CREDENTIALS), "auth");
    assert.deepEqual(registry.requests.map(({ headers }) => headers.has("authorization")), [false], challenge);
  }
});

Deno.test("a token is used until it expires, which is after 60 s unless it says", async () => {
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

Deno.test("a token that runs out in the middle of a download is renewed without losing a byte", async (t) => {
  await t.step("again and again on one connection", async () => {
    await using registry = startRegistry({ auth: "bearer" });
    serveLayer(registry, NOISE);
    registry.faults = ({ path, count }) => {
      if (!path.includes("/blobs/")) return [];
      if (count % 2 === 0) registry.revokeTokens();
      return [{ kind: "dieAt", byte: 50_000 }];
    };
    assertSame((await pull(registry, { retries: 1 })).tarball, NOISE);
    const blobs = registry.requests.filter(({ path }) => path.includes("/blobs/"));
    assert.deepEqual(blobs.map(({ status }) => status === 401), blobs.map((_, at) => at % 2 === 1));
    assert(blobs.length >= 7);
    for (let at = 1; at + 1 < blobs.length; at += 2) assert.equal(blobs[at]?.range, blobs[at + 1]?.range);
  });
  await t.step("on several at once", async () => {
    await using registry = startRegistry({ auth: "bearer" });
    serveLarge(registry);
    registry.faults = ({ path, count }) => {
      if (path.includes("/blobs/") && count === 3) registry.revokeTokens();
      return [];
    };
    assertSame((await pull(registry)).tarball, largeLayer().bytes);
    const tokens = paths(registry, "token /").length;
    assert(tokens >= 2 && tokens <= 5, `${tokens} tokens`);
  });
});

Deno.test("a mirror is asked first, for the registry by its name, and without the registry's credentials", async (t) => {
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
        if (origin !== "registry") continue;
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

Deno.test("whatever fails at a mirror, the next one or the registry makes good", async (t) => {
  const later = { "retry-after": "3600" };
  const faults: Record<string, Fault> = {
    "500": { kind: "status", code: 500 },
    "429, for an hour": { kind: "status", code: 429, headers: later },
    "404": { kind: "status", code: 404 },
    "403": { kind: "status", code: 403 },
    "401 without a challenge": { kind: "status", code: 401 },
    "no redirect's end": { kind: "status", code: 307, headers: { location: "" } },
    "reset": { kind: "reset" },
    "silence": { kind: "stall", byte: 0 },
    "a cut answer": { kind: "short", byte: 0, chunked: true },
    "an answer that breaks off": { kind: "dieAt", byte: 0 },
  };
  for (const [name, fault] of Object.entries(faults)) {
    await t.step(name, async () => {
      for (const part of ["/manifests/", "/blobs/"]) {
        await using registry = serveImage();
        await using mirror = serveImage();
        mirror.faults = ({ path }) => path.includes(part) ? [fault] : [];
        const delays: number[] = [];
        const delay = (milliseconds: number) => Promise.resolve(void delays.push(milliseconds));
        const { tarball } = await pull(registry, { mirrors: [mirror.url], timeout: 0.1, delay });
        assertSame(tarball, LAYER);
        assert(paths(mirror, part).length > 0);
        assert(paths(registry, part).length > 0);
        assert(delays.every((delay) => delay <= 30_000), `${delays}`);
      }
    });
  }
  await t.step("another manifest than its digest names", async () => {
    await using registry = serveImage();
    await using mirror = startRegistry();
    const other = makeImage({ layers: [NOISE] });
    mirror.pushManifest("ns/wheels", IMAGE.digest, other.manifest, other.mediaType);
    const source = `${registry.host}/ns/wheels@${IMAGE.digest}`;
    assertSame((await pull(source, { mirrors: [mirror.url] })).tarball, LAYER);
  });
  await t.step("and the registry's own failure is what is told", async () => {
    await using registry = startRegistry();
    await using mirror = startRegistry({ auth: "basic" });
    const { message } = await failure(() => pull(registry, { mirrors: [mirror.url] }), "not-found");
    assert(message.includes(registry.host), message);
  });
});

// ---------------------------------------------------------------------------------------------------------------------
// 5 Manifest
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("selectManifest() chooses what runs there, and nothing else", () => {
  const digest = `sha256:${HEX}`;
  const on = (text: string, annotations?: Record<string, string>): Descriptor => {
    const [os = "", architecture = "", variant] = text.split("/");
    return { digest, platform: { os, architecture, ...(variant && { variant }) }, ...(annotations && { annotations }) };
  };
  const about = { "vnd.docker.reference.type": "attestation-manifest" };
  const attestation = on("unknown/unknown", about);
  const bare: Descriptor = { digest };
  const table: [platform: string, entries: Descriptor[], expected: number | undefined][] = [
    ["linux/amd64", [on("linux/arm64"), on("linux/amd64")], 1],
    ["linux/amd64", [on("windows/amd64"), on("linux/amd64")], 1],
    ["linux/amd64", [on("linux/arm64")], undefined],
    ["linux/amd64", [on("linux/386"), on("windows/amd64")], undefined],
    ["linux/amd64", [], undefined],
    ["linux/amd64", [bare], 0],
    ["linux/amd64", [bare, bare], undefined],
    ["linux/amd64", [attestation, bare], 1],
    ["linux/amd64", [on("unknown/unknown"), bare], 1],
    ["linux/amd64", [bare, on("linux/arm64")], undefined],
    ["linux/amd64", [attestation], undefined],
    ["linux/amd64", [on("linux/amd64", about), on("linux/amd64")], 1],
    ["linux/amd64", [on("unknown/unknown"), on("linux/amd64"), attestation], 1],
    ["linux/amd64", [on("linux/x86_64")], 0],
    ["linux/amd64", [on("linux/amd64/v3"), on("linux/amd64")], 1],
    ["linux/amd64", [on("linux/amd64/v3"), on("linux/amd64/v2")], 0],
    ["linux/amd64/v2", [on("linux/amd64"), on("linux/amd64/v2")], 1],
    ["linux/amd64/v4", [on("linux/amd64"), on("linux/amd64/v3")], undefined],
    ["linux/arm64", [on("linux/arm64/v8")], 0],
    ["linux/arm64/v8", [on("linux/arm64")], 0],
    ["linux/arm64/v8", [on("linux/arm64/v9")], undefined],
    ["linux/arm/v7", [on("linux/arm/v6"), on("linux/arm/v7")], 1],
    ["linux/arm/v7", [on("linux/arm")], 0],
    ["linux/arm/v6", [on("linux/arm"), on("linux/arm/v7")], undefined],
    ["linux/armhf", [on("linux/arm/v6"), on("linux/arm/v7")], 1],
    ["linux/arm64", [on("linux/arm/v7"), on("linux/arm")], undefined],
    ["linux/amd64", [on("linux/constructor"), on("linux/amd64")], 1],
  ];
  for (const [platform, entries, expected] of table) {
    const actual = selectManifest(entries, parsePlatform(platform));
    const at = actual === undefined ? undefined : entries.indexOf(actual);
    assert.equal(at, expected, `${platform} from ${JSON.stringify(entries)}`);
  }
});

const ARM = makeImage({ layers: [BASE, gzip(toBytes("not for amd64"))], architecture: "arm64" });
const DOCKER = makeImage({ layers: [BASE, LAYER], format: "docker" });
const SCHEMA1_FIELDS = { layers: [BASE, LAYER], name: "ns/wheels", tag: "1.0", architecture: "amd64" };
const SCHEMA1 = makeSchema1(SCHEMA1_FIELDS);
const SIGNED = makeSchema1({ ...SCHEMA1_FIELDS, signed: true });

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
    let { digest } = image;
    if (format !== undefined) {
      registry.pushImage("ns/wheels", ARM.digest, ARM);
      const index = makeIndex([ARM.descriptor, image.descriptor], format);
      digest = registry.pushManifest("ns/wheels", "1.0", index.manifest, index.mediaType);
    }
    for (const suffix of [":1.0", `@${digest}`, `:absent@${digest}`]) {
      await t.step(`${name}, ${suffix.slice(0, 12)}`, async () => {
        const { tarball, manifest, layer, platform, image: named } = await pull(`${registry.host}/ns/wheels${suffix}`);
        assert.deepEqual(tarball, LAYER);
        assert.deepEqual(manifest, { digest: image.digest, mediaType: image.mediaType });
        assert.deepEqual([layer?.digest, layer?.size, layer?.index, layer?.count], [sha256(LAYER), LAYER.length, 2, 2]);
        assert.equal(platform, format === undefined ? null : "linux/amd64");
        assert.equal(named?.digest, suffix.includes("@") ? digest : null);
        assert.deepEqual(paths(registry, "/blobs/").at(-1), `registry /v2/ns/wheels/blobs/${sha256(LAYER)}`);
      });
    }
  }
});

Deno.test("a manifest may be named by its sha512", async () => {
  await using registry = serveImage();
  const digest = sha512(IMAGE.manifest);
  registry.pushManifest("ns/wheels", digest, IMAGE.manifest, IMAGE.mediaType);
  const { tarball, manifest } = await pull(`${registry.host}/ns/wheels@${digest}`);
  assert.deepEqual(tarball, LAYER);
  assert.equal(manifest?.digest, digest);
});

Deno.test("each kind of manifest is accepted in one request", async () => {
  await using registry = serveImage();
  await pull(registry);
  const accept = registry.requests[0]?.headers.get("accept")?.split(",").map((type) => type.trim().split(";")[0]);
  const { ociIndex, ociManifest, dockerList, dockerManifest, dockerSchema1, dockerSchema1Signed } = MEDIA;
  const kinds = [ociIndex, ociManifest, dockerList, dockerManifest, dockerSchema1, dockerSchema1Signed];
  assert.deepEqual(accept?.sort(), [...kinds].sort());
});

Deno.test("a missing or odd media type does no harm", async () => {
  const index = makeIndex([ARM.descriptor, IMAGE.descriptor]);
  for (const [name, { manifest, mediaType }] of Object.entries({ IMAGE, DOCKER, SCHEMA1, SIGNED, index })) {
    const text = new TextDecoder().decode(manifest).replace(`"mediaType":"${mediaType}",`, "");
    for (const type of ["", "text/plain", "application/json; charset=utf-8", mediaType]) {
      await using registry = serveImage();
      registry.pushManifest("ns/wheels", "1.0", toBytes(text), type);
      assert.deepEqual((await pull(registry)).tarball, LAYER, `${name} as "${type}"`);
    }
  }
});

Deno.test("a manifest is what its body says, else what the header says", async () => {
  const { layers } = JSON.parse(new TextDecoder().decode(IMAGE.manifest));
  const wrong = JSON.parse(new TextDecoder().decode(ARM.manifest)).layers;
  const table: [body: Record<string, unknown>, header: string][] = [
    [{ mediaType: MEDIA.ociIndex, manifests: [IMAGE.descriptor], layers: wrong }, MEDIA.ociManifest],
    [{ mediaType: MEDIA.ociManifest, manifests: [ARM.descriptor], layers }, MEDIA.ociIndex],
    [{ manifests: [IMAGE.descriptor], layers: wrong }, MEDIA.dockerList],
    [{ manifests: [ARM.descriptor], layers }, `${MEDIA.dockerManifest.toUpperCase()}; charset=utf-8`],
    [{ mediaType: "application/x-odd", manifests: [ARM.descriptor], layers }, MEDIA.dockerManifest],
  ];
  for (const [body, header] of table) {
    await using registry = serveImage();
    registry.pushManifest("ns/wheels", "1.0", toBytes(JSON.stringify({ schemaVersion: 2, ...body })), header);
    assert.deepEqual((await pull(registry)).tarball, LAYER, JSON.stringify([body, header]));
  }
});

Deno.test("indexes nest five deep and no deeper", async () => {
  await using registry = serveImage();
  let { descriptor } = IMAGE;
  for (let depth = 1; depth <= 6; depth++) {
    const index = makeIndex(depth % 2 === 0 ? [ARM.descriptor, descriptor] : [descriptor]);
    registry.pushManifest("ns/wheels", `depth${depth}`, index.manifest, index.mediaType);
    ({ descriptor } = index);
    if (depth % 2 !== 0) descriptor = { ...descriptor, platform: { os: "linux", architecture: "amd64" } };
  }
  assert.deepEqual((await pull(`${registry.host}/ns/wheels:depth5`)).tarball, LAYER);
  await failure(() => pull(`${registry.host}/ns/wheels:depth6`), "integrity", /deep/);
});

Deno.test("indexes without a platform are looked into, one after the other", async () => {
  await using registry = serveImage();
  const indexes = [makeIndex([ARM.descriptor]), makeIndex([IMAGE.descriptor])];
  for (const { manifest, mediaType, digest } of indexes) {
    registry.pushManifest("ns/wheels", digest, manifest, mediaType);
  }
  const outer = makeIndex(indexes.map(({ descriptor }) => descriptor));
  registry.pushManifest("ns/wheels", "1.0", outer.manifest, outer.mediaType);
  assert.deepEqual((await pull(registry)).tarball, LAYER);
  const attempt = () => pull(registry, { platform: "linux/s390x" });
  await failure(attempt, "not-found", /linux\/arm64.*linux\/amd64/);
});

Deno.test("no matching platform is an error that lists those that exist", async () => {
  await using registry = serveImage();
  const annotations = { "vnd.docker.reference.type": "attestation-manifest" };
  const index = makeIndex([
    ARM.descriptor,
    { ...IMAGE.descriptor, platform: { os: "linux", architecture: "arm", variant: "v7" } },
    { ...IMAGE.descriptor, platform: { os: "unknown", architecture: "unknown" }, annotations },
  ]);
  registry.pushManifest("ns/wheels", "1.0", index.manifest, index.mediaType);
  const { message } = await failure(() => pull(registry), "not-found", /linux\/amd64.*linux\/arm64.*linux\/arm\/v7/);
  assert.doesNotMatch(message, /unknown/);
  assert.equal(registry.requests.length, 1);

  const empty = makeIndex([]);
  registry.pushManifest("ns/wheels", "empty", empty.manifest, empty.mediaType);
  await failure(() => pull(`${registry.host}/ns/wheels:empty`), "not-found");
});

Deno.test("a body that does not hash to the digest that named it is refused", async (t) => {
  const named = `sha256:${HEX}`;
  await using registry = serveImage();
  registry.pushManifest("ns/wheels", named, IMAGE.manifest, IMAGE.mediaType);
  await t.step("named by the user", async () => {
    await failure(() => pull(`${registry.host}/ns/wheels:1.0@${named}`), "integrity", new RegExp(IMAGE.digest));
  });
  await t.step("named by an index", async () => {
    const index = makeIndex([{ ...IMAGE.descriptor, digest: named }]);
    registry.pushManifest("ns/wheels", "1.0", index.manifest, index.mediaType);
    await failure(() => pull(registry), "integrity", new RegExp(IMAGE.digest));
  });
  await t.step("and what follows a signed payload is no part of it", async () => {
    const extra = `,\n   "fsLayers": [{"blobSum": "${sha256(BASE)}"}],\n   "signatures": [`;
    const text = new TextDecoder().decode(SIGNED.manifest).replace(/,\s*"signatures": \[/, extra);
    assert.notEqual(text, new TextDecoder().decode(SIGNED.manifest));
    registry.pushManifest("ns/wheels", SIGNED.digest, toBytes(text), SIGNED.mediaType);
    registry.pushBlob(BASE);
    await pull(`${registry.host}/ns/wheels@${SIGNED.digest}`).catch(({ kind }) => assert.equal(kind, "integrity"));
  });
  assert(!paths(registry, "/blobs/").some((path) => path.endsWith(sha256(BASE))));
});

Deno.test("what is no manifest is refused", async (t) => {
  const digest = `sha256:${HEX}`;
  const notUtf8 = concat('{"layers":[],"x":"', new Uint8Array([0xff]), '"}');
  const texts = ["", "<html>", "[]", "null", '"x"', "{}", '{"schemaVersion":2,"layers":['];
  const types = [{ mediaType: MEDIA.ociManifest }, { mediaType: MEDIA.ociIndex }, { mediaType: MEDIA.dockerSchema1 }];
  const digests = ["", 5, null, "sha256:0", digest.toUpperCase(), `${digest}\n`, "../../../other/blobs/x"];
  const objects = [
    ...types,
    ...types.map((type) => ({ ...type, layers: {}, manifests: {}, fsLayers: {} })),
    ...types.map((type) => ({ ...type, layers: [null], manifests: [null], fsLayers: [null] })),
    ...digests.flatMap((digest) => [
      { layers: [{ digest }] },
      { manifests: [{ digest }] },
      { fsLayers: [{ blobSum: digest }] },
    ]),
    ...[-1, 1.5, "5", null].map((size) => ({ layers: [{ digest, size }] })),
    { manifests: [{ digest, platform: { os: "linux", architecture: "amd64", variant: 8 } }] },
  ];
  for (const body of [...texts, notUtf8, ...objects.map((object) => JSON.stringify(object))]) {
    await t.step(String(body), async () => {
      await using registry = startRegistry();
      registry.pushManifest("ns/wheels", "1.0", toBytes(body), "application/json");
      await failure(() => pull(registry), "integrity");
      assert.equal(registry.requests.length, 1);
    });
  }
});

Deno.test("a manifest has at most 4 MiB", async () => {
  await using registry = serveImage();
  const padded = (size: number) => concat(IMAGE.manifest, " ".repeat(size - IMAGE.manifest.length));
  registry.pushManifest("ns/wheels", "largest", padded(4 << 20), IMAGE.mediaType);
  registry.pushManifest("ns/wheels", "larger", padded((4 << 20) + 1), IMAGE.mediaType);
  assert.deepEqual((await pull(`${registry.host}/ns/wheels:largest`)).tarball, LAYER);
  await failure(() => pull(`${registry.host}/ns/wheels:larger`), "integrity", /4194304|4 MiB/);
});

Deno.test("what the registry does not have is not found", async (t) => {
  await using registry = serveImage();
  for (const name of ["ns/wheels:2.0", "ns/other:1.0", `ns/wheels@sha256:${HEX}`]) {
    await t.step(name, async () => {
      const error = await failure(() => pull(`${registry.host}/${name}`), "not-found", /UNKNOWN/);
      assert(error.message.includes(name), error.message);
    });
  }
  await t.step("a layer", async () => {
    registry.pushManifest("ns/wheels", "1.0", ARM.manifest, ARM.mediaType);
    await failure(() => pull(registry), "not-found", /BLOB_UNKNOWN/);
  });
});

// ---------------------------------------------------------------------------------------------------------------------
// 6 Layer
// ---------------------------------------------------------------------------------------------------------------------

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
        assert.deepEqual(result.layer, expected);
        assert.equal(result.bytes, layer.length);
        assert.deepEqual(result.files.toSorted((a, b) => a.path < b.path ? -1 : 1), [
          { path: "a.whl", size: 5 },
          { path: "sub/b.txt", size: 4 },
        ]);
      });
    }
  }
});

Deno.test("a layer may be named by its sha512", async () => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const layer = gzip(await makeTar(GOOD));
  const reference = serveLayer(registry, layer, { digest: sha512(layer) });
  const { layer: info } = await fetchWheels(reference, { dest: scratch.at("dest") });
  assert.equal(info?.digest, sha512(layer));
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
});

Deno.test("a layer that is not what its descriptor says is refused, and DEST stays as it was", async (t) => {
  const tar = await makeTar(GOOD);
  const layer = gzip(tar);
  const other = toBytes("other");
  const flipped = layer.slice();
  flipped[30] = (flipped[30] ?? 0) ^ 0xff;
  const cases: Record<string, [Uint8Array<ArrayBuffer>, Parameters<typeof serveLayer>[2]?]> = {
    "wrong sha256": [layer, { digest: sha256(other) }],
    "wrong sha512": [layer, { digest: sha512(other) }],
    "wrong digest of a plain archive": [tar, { digest: sha256(other) }],
    "wrong digest of a zstd archive": [zstd(tar), { digest: sha256(other) }],
    "a byte less than said": [layer, { size: layer.length + 1 }],
    "a byte more than said": [layer, { size: layer.length - 1 }],
    "bytes behind the end that the digest does not cover": [concat(layer, new Uint8Array(9)), {
      digest: sha256(layer),
    }],
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
  for (const [name, [bytes, said]] of Object.entries(cases)) {
    await t.step(name, () => assertRefused(serveLayer(registry, bytes, said), "integrity"));
  }
});

Deno.test("a connection that dies or falls silent is replaced by one that asks for the rest", async (t) => {
  const last = NOISE.length - 1;
  for (const storage of [false, true]) {
    for (const fault of [{ kind: "dieAt", byte: 60_000 }, { kind: "stall", byte: 60_000 }] satisfies Fault[]) {
      await t.step(`${fault.kind}${storage ? ", in a storage" : ""}`, async () => {
        await using registry = startRegistry({ storage: storage && { signed: true }, auth: "bearer" });
        serveLayer(registry, NOISE);
        registry.faults = storage
          ? ({ origin, count }) => origin === "storage" && count < 3 ? [fault] : []
          : blobFaults([fault], [fault]);
        assertSame((await pull(registry, { timeout: 0.1 })).tarball, NOISE);
        const [whole, ...rest] = askedRanges(registry);
        assert.equal(whole, undefined);
        const starts = rest.map((range) => limits(range)).map(([first, end]) => (assert.equal(end, last), first));
        assert(starts.length === 2 && starts.every((start, at) => start > (starts[at - 1] ?? 0)), starts.join());
        assert((starts[1] ?? 0) <= 120_000);
        if (fault.kind === "stall") assert.deepEqual(starts, [60_000, 120_000]);
      });
    }
  }
});

/** A hook that answers requests for blobs with these in turn, the last one again and again; the registry does the rest. */
function blobAnswers(...answers: ((request: Request) => Response | undefined)[]): RegistryOptions["onRequest"] {
  return (request, { path, count }) =>
    path.includes("/blobs/") ? (answers[count - 1] ?? answers.at(-1))?.(request) : undefined;
}

/** An answer with a part of the noise, whatever its headers claim. */
function part(from: number, to: number, headers: Record<string, string> = {}): Response {
  const content = NOISE.subarray(from, to);
  const body = new ReadableStream({ start: (controller) => (controller.enqueue(content), controller.close()) });
  const status = headers["content-range"] === undefined ? 200 : 206;
  return new Response(body, { status, headers: { "content-length": String(content.length), ...headers } });
}

Deno.test("If-Range is sent with a strong validator, and with no other", async () => {
  for (const [etag, expected] of [['"a"', '"a"'], ['W/"a"', null], [undefined, null], ["", null]] as const) {
    const asked: (string | null)[] = [];
    await using registry = startRegistry({
      onRequest: blobAnswers(
        () => part(0, 60_000, { "content-length": String(NOISE.length), ...(etag !== undefined && { etag }) }),
        (request) => void asked.push(request.headers.get("if-range")),
        () => undefined,
      ),
    });
    serveLayer(registry, NOISE);
    assertSame((await pull(registry)).tarball, NOISE);
    assert.deepEqual(asked, [expected], etag);
  }
});

Deno.test("a range's answer counts only where Content-Range says that it is that range", async (t) => {
  const size = NOISE.length;
  const cases: Record<string, (first: number) => Response> = {
    "begins later": (first) => part(first + 1, size, { "content-range": `bytes ${first + 1}-${size - 1}/${size}` }),
    "begins earlier": (first) => part(first - 1, size, { "content-range": `bytes ${first - 1}-${size - 1}/${size}` }),
    "another total": (first) => part(first, size, { "content-range": `bytes ${first}-${size - 1}/${size + 1}` }),
    "ends later": (first) => part(first, size, { "content-range": `bytes ${first}-${size}/${size + 1}` }),
    "ends before it begins": (first) => part(first, size, { "content-range": `bytes ${first}-${first - 1}/${size}` }),
    "another unit": (first) => part(0, size, { "content-range": `items ${first}-${size - 1}/${size}` }),
    "no range": () => part(0, size, { "content-range": `bytes */${size}` }),
    "nothing": (first) => new Response(NOISE.subarray(first), { status: 206 }),
    "an unknown total, which is allowed": (first) =>
      part(first, size, { "content-range": `bytes ${first}-${size - 1}/*` }),
    "an earlier end, which is allowed": (first) =>
      part(first, first + 999, { "content-range": `bytes ${first}-${first + 998}/${size}` }),
  };
  for (const [name, answer] of Object.entries(cases)) {
    await t.step(name, async () => {
      const onRequest = blobAnswers(
        () => undefined,
        ({ headers }) => answer(limits(headers.get("range") ?? "")[0]),
        () => undefined,
      );
      await using registry = startRegistry({ onRequest });
      serveLayer(registry, NOISE);
      registry.faults = blobFaults([{ kind: "dieAt", byte: 60_000 }]);
      assertSame((await pull(registry)).tarball, NOISE);
      const [, second, third] = askedRanges(registry);
      if (name.includes("total, which")) assert.equal(third, undefined);
      else if (name.includes("allowed")) assert.equal(limits(third)[0], limits(second)[0] + 999);
      else assert.equal(askedRanges(registry).length, 3);
    });
  }
});

Deno.test("a server without ranges is asked for everything, and what was read is skipped", async (t) => {
  const dies: Fault = { kind: "dieAt", byte: 100_000 };
  const cases: Record<string, { faults: Fault[][]; ranges: (boolean | undefined)[] }> = {
    "200": { faults: [[dies], [{ kind: "ignoreRange" }]], ranges: [false, true] },
    "200 that dies before news": {
      faults: [[dies], [{ kind: "ignoreRange" }, { kind: "dieAt", byte: 30_000 }], [{ kind: "ignoreRange" }]],
      ranges: [false, undefined, undefined],
    },
    "200 that dies after news": {
      faults: [[dies], [{ kind: "ignoreRange" }, { kind: "dieAt", byte: 150_000 }], [{ kind: "ignoreRange" }]],
      ranges: [false, true, undefined],
    },
  };
  for (const [name, { faults, ranges }] of Object.entries(cases)) {
    await t.step(name, async () => {
      for (const storage of [false, true]) {
        await using registry = startRegistry({ storage });
        serveLayer(registry, NOISE);
        registry.faults = storage
          ? ({ origin, count }) => origin === "storage" ? faults[count - 1] ?? [] : []
          : blobFaults(...faults);
        assertSame((await pull(registry)).tarball, NOISE);
        const asked = askedRanges(registry);
        assert.equal(asked.length, ranges.length, asked.join());
        ranges.forEach((is, at) => is === undefined || assert.equal(asked[at] !== undefined, is, asked.join()));
      }
    });
  }
  for (const code of [416, 400]) {
    await t.step(`${code}, to each range`, async () => {
      for (const storage of [false, true]) {
        await using registry = startRegistry({ storage });
        serveLayer(registry, NOISE);
        registry.faults = ({ range, ...context }) =>
          range === undefined ? blobFaults([dies])(context) : [{ kind: "status", code }];
        if (storage) {
          registry.faults = ({ origin, range, count }) =>
            origin !== "storage" ? [] : range !== undefined ? [{ kind: "status", code }] : count === 1 ? [dies] : [];
        }
        assertSame((await pull(registry)).tarball, NOISE);
        const asked = askedRanges(registry);
        assert(asked.length <= 4 && asked[1] !== undefined && asked.at(-1) === undefined, asked.join());
      }
    });
  }
});

Deno.test("tries are counted since the last byte, and on the whole", async (t) => {
  const cases: Record<string, { faults: Fault[]; retries: number; requests: number | null }> = {
    "no byte at all": { faults: [{ kind: "dieAt", byte: 0 }], retries: 3, requests: 4 },
    "no byte that is new": { faults: [{ kind: "ignoreRange" }, { kind: "dieAt", byte: 9 }], retries: 3, requests: 4 },
    "some bytes each time": { faults: [{ kind: "dieAt", byte: 20_000 }], retries: 1, requests: null },
    "too few each time": { faults: [{ kind: "dieAt", byte: 2000 }], retries: 1, requests: 21 },
    "too few each time, more patience": { faults: [{ kind: "dieAt", byte: 2000 }], retries: 2, requests: 41 },
  };
  for (const [name, { faults, retries, requests }] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using registry = startRegistry();
      serveLayer(registry, NOISE);
      registry.faults = faults;
      if (requests === null) return assertSame((await pull(registry, { retries })).tarball, NOISE);
      await failure(() => pull(registry, { retries }), "network");
      assert.equal(askedRanges(registry).length, requests);
    });
  }
});

Deno.test("a body that ends well but early is made whole", async (t) => {
  for (const chunked of [false, true]) {
    const short = (byte: number): Fault => ({ kind: "short", byte, chunked });
    const cases: Record<string, Fault[][]> = {
      "at first": [[short(60_000)]],
      "in a range": [[{ kind: "dieAt", byte: 60_000 }], [short(999)], [short(999)]],
      "and empty": [[short(0)]],
      "each time": Array(20).fill([short(30_000)]),
    };
    for (const [name, faults] of Object.entries(cases)) {
      await t.step(`${name}${chunked ? ", of no length" : ""}`, async () => {
        await using registry = startRegistry();
        serveLayer(registry, NOISE);
        registry.faults = blobFaults(...faults);
        assertSame((await pull(registry)).tarball, NOISE);
      });
    }
  }
});

Deno.test("a layer of schema 1, which has no size, is resumed", async (t) => {
  const layer = gzip(await makeTar([{ name: "a.whl", data: NOISE }]));
  const cut = async function* () {
    yield layer.slice(0, 60_000);
    throw await Promise.reject(new Error("cut"));
  };
  const cases: Record<string, { first?: () => Response; range: boolean }> = {
    "by the length of its first answer": { range: true },
    "from the start, where that has none": {
      first: () => new Response(ReadableStream.from(cut())),
      range: false,
    },
  };
  for (const [name, { first, range }] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using registry = serveImage(
        { onRequest: first && blobAnswers(first, () => undefined) },
        makeSchema1({ ...SCHEMA1_FIELDS, layers: [BASE, layer] }),
      );
      registry.faults = blobFaults([{ kind: "dieAt", byte: 60_000 }]);
      assertSame((await pull(registry)).tarball, layer);
      const asked = askedRanges(registry);
      assert.equal(asked.length, 2);
      if (range) assert.equal(limits(asked[1])[1], layer.length - 1);
      else assert.equal(asked[1], undefined);
    });
  }
});

/** A hook that serves a blob's ranges, and holds their bodies back until `wanted` of them are under way at once. */
function crowd(bytes: Uint8Array<ArrayBuffer>, wanted: number) {
  let [underway, most] = [0, 0];
  const { promise, resolve } = Promise.withResolvers<void>();
  const onRequest: RegistryOptions["onRequest"] = ({ headers }, { path }) => {
    if (!path.includes("/blobs/") || !headers.has("range")) return undefined;
    const [first, last] = limits(headers.get("range") ?? "");
    most = Math.max(most, ++underway);
    if (underway === wanted) resolve();
    const pull = async (controller: ReadableStreamDefaultController) => {
      await promise;
      controller.enqueue(bytes.subarray(first, last + 1));
      underway--;
      controller.close();
    };
    const said = { "content-length": `${last + 1 - first}`, "content-range": `bytes ${first}-${last}/${bytes.length}` };
    return new Response(new ReadableStream({ pull }, { highWaterMark: 0 }), { status: 206, headers: said });
  };
  return { onRequest, most: () => most };
}

/** As the program has it. */
const RANGE = 4 << 20;

Deno.test("a large layer comes in ranges over so many connections at once, in order", async (t) => {
  const { bytes } = largeLayer();
  const starts = Array.from({ length: Math.ceil(bytes.length / RANGE) }, (_, at) => at * RANGE);
  const ranges = starts.map((start) => `bytes=${start}-${Math.min(start + RANGE, bytes.length) - 1}`);
  for (const [connections, expected] of [[2, 2], [undefined, 4], [16, ranges.length]] as const) {
    await t.step(`connections: ${connections}`, async () => {
      const { onRequest, most } = crowd(bytes, expected);
      await using registry = startRegistry({ onRequest });
      serveLarge(registry);
      assertSame((await pull(registry, { connections, timeout: 5, retries: 0 })).tarball, bytes);
      assert.deepEqual(askedRanges(registry).toSorted((a, b) => limits(a)[0] - limits(b)[0]), ranges);
      assert.equal(most(), expected);
    });
  }
  await t.step("connections: 1 is a single stream", async () => {
    await using registry = startRegistry();
    serveLarge(registry);
    assertSame((await pull(registry, { connections: 1 })).tarball, bytes);
    assert.deepEqual(askedRanges(registry), [undefined]);
  });
  await t.step("a server without ranges is asked once", async () => {
    await using registry = startRegistry();
    serveLarge(registry);
    registry.faults = [{ kind: "ignoreRange" }];
    assertSame((await pull(registry)).tarball, bytes);
    assert.deepEqual(askedRanges(registry), [ranges[0]]);
  });
});

Deno.test("what a blob redirects to is asked for once, and again when its signature has run out", async () => {
  const count = Math.ceil(largeLayer().bytes.length / RANGE);
  for (const [uses, least, most] of [[Infinity, 1, 1], [2, count / 2, count]] as const) {
    await using registry = startRegistry({ storage: { signed: true, uses }, auth: "bearer" });
    serveLarge(registry);
    assertSame((await pull(registry)).tarball, largeLayer().bytes);
    const resolved = paths(registry, "/blobs/").length;
    assert(resolved >= least && resolved <= most, `resolved ${resolved} times for ${uses} uses`);
    const stored = registry.requests.filter(({ origin }) => origin === "storage");
    assert(stored.every(({ headers, status }) => !headers.has("authorization") && [206, 403].includes(status)));
  }
  await using registry = startRegistry({ storage: { signed: true } });
  serveLayer(registry, NOISE);
  registry.faults = ({ origin }) => origin === "storage" ? [{ kind: "expiredSignature" }] : [];
  await assertFails(pull(registry, { retries: 2 }), "auth|network");
  assert(paths(registry, "storage").length <= 4);
});

Deno.test("a range that fails is resumed by itself, and the others go on", async (t) => {
  const { bytes } = largeLayer();
  const cases: Record<string, [third: Fault[], fifth: Fault[]]> = {
    "by dying and falling silent": [[{ kind: "dieAt", byte: 1 << 20 }], [{ kind: "stall", byte: 1 << 20 }]],
    "by a short body and a refusal": [[{ kind: "short", byte: 1 << 20 }], [{ kind: "status", code: 503 }]],
  };
  for (const [name, [third, fifth]] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using registry = startRegistry();
      serveLarge(registry);
      const faults = new Map([[2 * RANGE, third], [4 * RANGE, fifth]]);
      registry.faults = ({ range }) => {
        const start = range === undefined ? -1 : limits(range)[0];
        const found = faults.get(start) ?? [];
        faults.delete(start);
        return found;
      };
      assertSame((await pull(registry, { timeout: 0.5 })).tarball, bytes);
      const asked = askedRanges(registry).map(limits).toSorted(([a], [b]) => a - b);
      assert.equal(asked.length, Math.ceil(bytes.length / RANGE) + 2, JSON.stringify(asked));
      for (const [first, last] of asked) assert.equal(last, Math.min(bytes.length, first - first % RANGE + RANGE) - 1);
    });
  }
  await t.step("by an answer with everything, which costs no more than the rest of the layer", async () => {
    await using registry = startRegistry();
    serveLarge(registry);
    registry.faults = ({ range }) => range?.startsWith(`bytes=${RANGE}-`) ? [{ kind: "ignoreRange" }] : [];
    assertSame((await pull(registry)).tarball, bytes);
    const whole = askedRanges(registry).filter((range) => range === undefined).length;
    assert(whole <= 4, `everything was asked for ${whole} times more`);
  });
});

Deno.test("a mirror that breaks off in the middle is gone on for", async (t) => {
  await t.step("by the registry, from there", async () => {
    await using registry = startRegistry();
    await using mirror = startRegistry();
    for (const each of [registry, mirror]) serveLayer(each, NOISE);
    mirror.faults = blobFaults(...Array(50).fill([{ kind: "stall", byte: 60_000 }]).fill([{ kind: "reset" }], 1));
    assertSame((await pull(registry, { mirrors: [mirror.url], timeout: 0.1 })).tarball, NOISE);
    assert.deepEqual(askedRanges(registry), [`bytes=60000-${NOISE.length - 1}`]);
  });
  await t.step("in parallel", async () => {
    await using registry = startRegistry();
    await using mirror = startRegistry();
    for (const each of [registry, mirror]) serveLarge(each);
    mirror.faults = ({ path, count }) => path.includes("/blobs/") && count > 2 ? [{ kind: "reset" }] : [];
    assertSame((await pull(registry, { mirrors: [mirror.url] })).tarball, largeLayer().bytes);
    assert(askedRanges(registry).every((range) => limits(range)[0] >= RANGE), askedRanges(registry).join());
  });
});

Deno.test("wrong bytes from a mirror are seen, and fetched again from the registry", async () => {
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

/** A registry with a small layer, and a cache for it. */
async function serveCached(scratch: Scratch) {
  const layer = gzip(await makeTar([{ name: "a.whl", data: NOISE }]));
  const registry = startRegistry();
  const reference = serveLayer(registry, layer);
  const entry = `blobs/${sha256(layer).replace(":", "/")}`;
  const fetch = async (options: FetchWheelsOptions = {}) => {
    const warnings: string[] = [];
    const onProgress = (event: ProgressEvent) => void (event.type === "warning" && warnings.push(event.message));
    const shared = { dest: scratch.at("dest"), cache: scratch.at("cache"), protocol: "http", onProgress } as const;
    await fetchWheels(reference, { ...shared, delay: () => Promise.resolve(), ...options });
    assertSame(Deno.readFileSync(scratch.at("dest/a.whl")), NOISE);
    Deno.removeSync(scratch.at("dest"), { recursive: true });
    return warnings;
  };
  const assertKept = () => {
    assertSame(Deno.readFileSync(scratch.at(`cache/${entry}`)), layer);
    assert.deepEqual(Object.keys(snapshot(scratch.at("cache"))).length, 3, JSON.stringify(snapshot(scratch.path)));
  };
  return {
    registry,
    reference,
    layer,
    entry,
    fetch,
    assertKept,
    [Symbol.asyncDispose]: () => registry[Symbol.asyncDispose](),
  };
}

Deno.test("a layer in the cache is not asked for again, unless it is wrong", async (t) => {
  using scratch = new Scratch();
  await using cached = await serveCached(scratch);
  const { registry, layer, entry, fetch, assertKept } = cached;
  await t.step("at first", async () => {
    await fetch();
    assertKept();
    assert.equal(askedRanges(registry).length, 1);
  });
  await t.step("then", async () => {
    await fetch();
    assertKept();
    assert.equal(askedRanges(registry).length, 1);
  });
  const flipped = layer.slice();
  flipped[1000] = (flipped[1000] ?? 0) ^ 1;
  const wrong = {
    "flipped bit": flipped,
    "cut": layer.slice(0, 1000),
    "empty": toBytes(""),
    "long": concat(layer, "x"),
  };
  for (const [name, bytes] of Object.entries(wrong)) {
    await t.step(`with an entry that is wrong: ${name}`, async () => {
      scratch.at(`cache/${entry}`, bytes);
      const before = askedRanges(registry).length;
      await fetch();
      assertKept();
      assert.equal(askedRanges(registry).length, before + 1);
    });
  }
  await t.step("by its sha512", async () => {
    const digest = sha512(layer);
    const source = serveLayer(registry, layer, { digest });
    const options = { dest: scratch.at("dest512"), cache: scratch.at("cache512"), protocol: "http" } as const;
    for (const _ of [1, 2]) await fetchWheels(source, options);
    assertSame(Deno.readFileSync(scratch.at(`cache512/blobs/sha512/${digest.split(":")[1]}`)), layer);
    assert.equal(paths(registry, digest).length, 1);
  });
});

Deno.test("what a failed download left in the cache is gone on with", async (t) => {
  using scratch = new Scratch();
  await using cached = await serveCached(scratch);
  const { registry, reference, layer, entry, fetch, assertKept } = cached;
  const partial = `${scratch.at(`cache/${entry}`)}.part`;
  const reset = () => Deno.removeSync(scratch.at("cache"), { recursive: true });
  const refused = Array<Fault[]>(9).fill([{ kind: "status", code: 500 }]);

  await t.step("after an error", async () => {
    registry.faults = blobFaults([{ kind: "stall", byte: 60_000 }], ...refused);
    await failure(() => fetch({ timeout: 0.1, retries: 1 }), "network");
    assertSame(Deno.readFileSync(partial), layer.subarray(0, 60_000));
    registry.faults = [];
    await fetch();
    assert.equal(askedRanges(registry).at(-1), `bytes=60000-${layer.length - 1}`);
    assertKept();
    reset();
  });
  await t.step("after SIGKILL, which takes its lock away", async () => {
    registry.faults = [{ kind: "stall", byte: 60_000 }];
    const place = ["-d", scratch.at("killed"), "--cache", scratch.at("cache")];
    const child = spawnDeno(["run", ...PERMISSIONS, PROGRAM, "--protocol", "http", ...place, reference]);
    await waitFor(() => Object.keys(snapshot(scratch.path)).some((path) => path.endsWith(".part")));
    await waitFor(() => Deno.statSync(partial).size === 60_000);
    child.kill("SIGKILL");
    await child.output();
    registry.faults = [];
    await fetch();
    assert.equal(askedRanges(registry).at(-1), `bytes=60000-${layer.length - 1}`);
    assertKept();
    reset();
  });
  const noise = new Uint8Array(randomBytes(60_000));
  const parts = {
    "right": layer.slice(0, 60_000),
    "whole": layer,
    "empty": toBytes(""),
    "wrong": noise,
    "right, then wrong": concat(layer.subarray(0, 60_000), noise),
    "too long": concat(layer, noise),
  };
  for (const [name, bytes] of Object.entries(parts)) {
    await t.step(`which is ${name}`, async () => {
      scratch.at(`cache/${entry}.part`, bytes);
      const before = askedRanges(registry).length;
      await fetch();
      assertKept();
      const [first] = askedRanges(registry).slice(before);
      if (name === "right") assert.equal(first, `bytes=60000-${layer.length - 1}`);
      if (name === "whole") assert.equal(first, undefined);
      reset();
    });
  }
});

Deno.test("several processes may share a cache, and a DEST", async () => {
  using scratch = new Scratch();
  await using cached = await serveCached(scratch);
  const { registry, reference, fetch, assertKept } = cached;
  registry.faults = [{ kind: "trickle", bytesPerSecond: 1_000_000 }];
  const place = ["-d", scratch.at("shared"), "--cache", scratch.at("cache")];
  const args = ["run", ...PERMISSIONS, PROGRAM, "--protocol", "http", ...place, reference];
  const ours = { dest: scratch.at("shared"), cache: scratch.at("cache"), protocol: "http" } as const;
  const [one, two] = await Promise.all([runDeno(args), runDeno(args), fetchWheels(reference, ours)]);
  assert.deepEqual([one.code, two.code], [0, 0], one.stderr + two.stderr);
  assert.deepEqual(Object.keys(contents(scratch.at("shared"))), ["a.whl"]);
  assertKept();
  const before = askedRanges(registry).length;
  await fetch();
  assert.equal(askedRanges(registry).length, before);
});

Deno.test("a cache that cannot be written to is said, and done without", async (t) => {
  await t.step("because it is a file", async () => {
    using scratch = new Scratch();
    await using cached = await serveCached(scratch);
    scratch.at("file", "file");
    const warnings = await cached.fetch({ cache: scratch.at("file") });
    assert(warnings.some((text) => text.includes(scratch.at("file"))), warnings.join());
  });
  for (const [option, words] of [["size=100k", /no space/], ["ro", /read-only/]] as const) {
    await t.step({
      name: `because of ${option}${canMount ? "" : " (needs root and mount)"}`,
      ignore: !canMount,
      async fn() {
        using scratch = new Scratch();
        await using cached = await serveCached(scratch);
        const disk = scratch.at("cache");
        Deno.mkdirSync(disk);
        assert(new Deno.Command("mount", { args: ["-t", "tmpfs", "-o", option, "none", disk] }).outputSync().success);
        try {
          const warnings = await cached.fetch();
          assert(warnings.some((text) => words.test(text)), warnings.join());
          assert(Object.values(snapshot(disk)).every((entry) => entry.startsWith("directory")));
        } finally {
          new Deno.Command("umount", { args: [disk] }).outputSync();
        }
      },
    });
  }
});

Deno.test({
  name: "a large layer needs little memory: 320 MiB through less than 200 MiB, in one stream or in ranges",
  ignore: Deno.build.os !== "linux",
  async fn(t) {
    // One member of gzip that holds a whole block of noise, stored, and is sent again and again.
    const count = 320;
    const size = 1 << 20;
    const header = gzip(rawHeader({ name: "big.whl", size: count * size }));
    const block = gzipStored(new Uint8Array(randomBytes(size)));
    const end = gzip(new Uint8Array(1024));
    const parts = [header, ...Array<Uint8Array>(count).fill(block), end];
    const hash = createHash("sha256");
    for (const part of parts) hash.update(part);
    const digest = `sha256:${hash.digest("hex")}`;
    const total = header.length + count * block.length + end.length;
    const between = function* (first: number, last: number) {
      let at = 0;
      for (const part of parts) {
        if (at <= last && at + part.length > first) yield part.subarray(Math.max(0, first - at), last + 1 - at);
        at += part.length;
      }
    };
    for (const connections of [1, 4]) {
      await t.step(`connections: ${connections}`, async () => {
        await using registry = startRegistry({
          onRequest: (request, { path }) => {
            if (!path.includes(digest)) return undefined;
            const range = request.headers.get("range");
            const [first, last] = range === null ? [0, total - 1] : limits(range);
            const said = {
              "content-length": `${last + 1 - first}`,
              "content-range": `bytes ${first}-${last}/${total}`,
            };
            const status = range === null ? 200 : 206;
            return new Response(ReadableStream.from(between(first, last)), { status, headers: said });
          },
        });
        const reference = serveLayer(registry, toBytes(""), { digest, size: total });
        using scratch = new Scratch();
        const workerUrl = new URL("fetch_wheels.ts", import.meta.url).href; // as the command line has it
        const options = JSON.stringify({ dest: scratch.at("dest"), connections, workerUrl });
        const script = `import { fetchWheels } from ${JSON.stringify(workerUrl)};
          const { files } = await fetchWheels(${JSON.stringify(reference)}, ${options});
          const [, peak] = /VmHWM:\\s*(\\d+) kB/.exec(Deno.readTextFileSync("/proc/self/status"));
          console.log(JSON.stringify({ files, peak: Number(peak) }));`;
        const { code, stdout, stderr } = await runDeno(["eval", script]);
        assert.equal(code, 0, stderr);
        const { files, peak } = JSON.parse(stdout);
        assert.deepEqual(files, [{ path: "big.whl", size: count * size }]);
        assert.equal(askedRanges(registry).length, connections === 1 ? 1 : Math.ceil(total / RANGE));
        assert(peak > 10 * 1024 && peak < 200 * 1024, `a peak of ${peak} KiB`);
      });
    }
  },
});

/** gzip that does not compress, so that as many bytes come in as go out. */
function gzipStored(bytes: Uint8Array): Uint8Array {
  const [head, tail] = [gzip(bytes).subarray(0, 10), gzip(bytes).subarray(-8)];
  return concat(head, deflateRawSync(bytes, { level: 0 }), tail);
}

/** The same numbers from the same seed, everywhere (mulberry32). */
class Lot {
  #state: number;

  constructor(seed: number) {
    this.#state = seed | 0;
  }

  below(limit: number): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor(((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 * limit);
  }

  pick<T>(choices: readonly T[]): T {
    return choices[this.below(choices.length)] as T;
  }
}

/** Where something may go wrong: the places that answer with the manifest, a token, the blob or a redirect to it. */
type Place = "manifests" | "token" | "blobs" | "storage";

/** Faults of a place's first requests, and of all that follow. */
type Trouble = Partial<Record<Place, { first: Fault[][]; then: Fault[] }>>;

/** One download: what serves it, what goes wrong, and how it must end (`right`, or the kinds of a failure). */
interface Plan {
  isLarge: boolean;
  isSchema1: boolean;
  auth: "none" | "bearer";
  storage: false | { signed: boolean };
  there: boolean;
  connections: number;
  trouble: Trouble;
  mirror?: Trouble;
  cache?: "empty" | "entry" | "wrong entry" | "part" | "wrong part";
  ending: string;
}

function drawPlan(lot: Lot, isLarge: boolean): Plan {
  const isSchema1 = !isLarge && lot.below(5) === 0;
  const auth = lot.pick(["none", "bearer"] as const);
  const storage = lot.pick([false, false, { signed: false }, { signed: true }] as const);
  const shared = { isLarge, isSchema1, auth, storage, there: lot.below(2) === 0, connections: lot.pick([1, 2, 4, 16]) };
  const at = () => lot.below(isLarge ? 6 << 20 : NOISE.length);
  const refusals = ["1", "880\xb5s", "Thu, 01 Jan 1970 00:00:00 GMT"];
  const status = (code: number): Fault => ({ kind: "status", code, headers: { "retry-after": lot.pick(refusals) } });
  const anywhere = (): Fault =>
    lot.below(3) === 0 ? { kind: "reset" } : status(lot.pick([408, 429, 500, 502, 503, 504]));
  const early: (() => Fault)[] = [
    anywhere,
    () => ({ kind: "dieAt", byte: lot.below(40) }),
    () => ({ kind: "stall", byte: 9 }),
  ];
  const inBlob: (() => Fault)[] = [
    anywhere,
    () => ({ kind: "dieAt", byte: at() }),
    () => ({ kind: "dieAt", byte: at() }),
    () => ({ kind: "stall", byte: at() }),
    () => ({ kind: "trickle", bytesPerSecond: isLarge ? 200 << 20 : 2 << 20 }),
    () => ({ kind: "wrongRange", shift: lot.pick([-1, 1, 99]) }),
    () => ({ kind: "wrongRange", shift: 0, total: at() }),
    () => ({ kind: "ignoreRange" }),
    () => ({ kind: "status", code: lot.pick([400, 416]) }),
    // Without a size, an answer that ends well is whole; and a length that comes twice is what the registry has.
    ...(isSchema1 ? [] : [(): Fault => ({ kind: "short", byte: at(), chunked: lot.below(2) === 0 })]),
  ];
  const several = (least: number, draw: (() => Fault)[]) =>
    Array.from({ length: least + lot.below(3) }, () => Array.from({ length: 1 + lot.below(2) }, () => lot.pick(draw)()))
      // 400 and 416 are answers to a range; a registry that gives them to a plain GET means it.
      .map((faults) => faults.filter((fault) => fault.kind !== "status" || ![400, 416].includes(fault.code)));
  const passing = (): Trouble => {
    const body = { first: several(1, inBlob), then: [] };
    const expired: Fault = storage ? { kind: "expiredSignature" } : { kind: "expiredToken" };
    if (lot.below(3) === 0 && (storage || auth === "bearer")) body.first[lot.below(2)] = [expired];
    return {
      manifests: { first: several(0, early), then: [] },
      token: { first: several(0, [anywhere]), then: [] },
      blobs: storage ? { first: several(0, [anywhere]), then: [] } : body,
      ...(storage && { storage: body }),
    };
  };
  const lasting = (then: Fault[]): Trouble => {
    const trouble = passing();
    const place = storage ? "storage" : "blobs";
    const first: Fault[][] = lot.pick([[], [[{ kind: "dieAt", byte: at() }]]]);
    return { ...trouble, [place]: { first, then } };
  };
  const byte = lot.below(isLarge ? largeLayer().bytes.length : NOISE.length);
  const endings: (() => Pick<Plan, "trouble" | "ending">)[] = [
    () => ({ trouble: lasting([{ kind: "reset" }]), ending: "network" }),
    () => ({ trouble: lasting([{ kind: "dieAt", byte: 0 }]), ending: "network" }),
    () => ({ trouble: lasting([status(503)]), ending: "network" }),
    () => ({
      trouble: lasting([{ kind: "status", code: 429, headers: { "retry-after": "3600" } }]),
      ending: "network",
    }),
    () => ({ trouble: lasting([{ kind: "short", byte: 0 }]), ending: "integrity|network" }),
    () => ({ trouble: lasting([{ kind: "wrongRange", shift: 7, claim: "asked" }]), ending: "right|integrity" }),
    () => ({ trouble: { manifests: { first: [], then: [{ kind: "status", code: 404 }] } }, ending: "not-found" }),
    () => ({ trouble: { manifests: { first: [], then: [{ kind: "status", code: 403 }] } }, ending: "auth" }),
    ...(storage ? [() => ({ trouble: lasting([{ kind: "expiredSignature" }]), ending: "auth|network" })] : []),
    ...(auth === "bearer"
      ? [() => ({ trouble: { manifests: { first: [], then: [{ kind: "expiredToken" as const }] } }, ending: "auth" })]
      : []),
  ];
  switch (lot.below(8)) {
    case 0:
    case 1:
      return { ...shared, ...lot.pick(endings)() };
    case 2: {
      const trouble = passing();
      for (const place of ["blobs", "storage"] as const) {
        const { first, then } = trouble[place] ?? { first: [], then: [] };
        const flip: Fault = { kind: "flipBit", byte };
        trouble[place] = { first: first.map((faults) => [...faults, flip]), then: [...then, flip] };
      }
      return { ...shared, trouble, ending: "integrity" };
    }
    case 3: {
      const bad: Fault[] = [{ kind: "flipBit", byte }, { kind: "reset" }, { kind: "dieAt", byte: at() }, status(429)];
      const mirror = {
        blobs: { first: several(1, inBlob), then: [lot.pick(bad)] },
        manifests: { first: several(0, early), then: [] },
      };
      return { ...shared, trouble: passing(), mirror, ending: "right" };
    }
    case 4:
    case 5: {
      const cache = lot.pick(["empty", "entry", "wrong entry", "part", "wrong part"] as const);
      return { ...shared, trouble: passing(), cache, ending: "right" };
    }
    default:
      return { ...shared, trouble: passing(), ending: "right" };
  }
}

const placeOf = ({ origin, path }: RequestContext): Place =>
  origin === "registry" ? path.includes("/blobs/") ? "blobs" : "manifests" : origin;

async function runPlan(plan: Plan, layer: { bytes: Uint8Array<ArrayBuffer>; digest: string }): Promise<string> {
  const { isSchema1, isLarge, auth, storage, there, trouble, mirror, cache, connections } = plan;
  using scratch = new Scratch();
  using kept = new Scratch();
  const serve = (options: RegistryOptions, trouble: Trouble) => {
    const registry = startRegistry(options);
    if (isSchema1) registry.pushImage("ns/wheels", "1.0", makeSchema1({ ...SCHEMA1_FIELDS, layers: [layer.bytes] }));
    else serveLayer(registry, layer.bytes, { digest: layer.digest });
    registry.faults = (context) => {
      const { first, then } = trouble[placeOf(context)] ?? { first: [], then: [] };
      return first[context.count - 1] ?? then;
    };
    return registry;
  };
  await using registry = serve({ auth, storage }, trouble);
  await using second = serve({}, mirror ?? {});
  const dest = scratch.at("dest");
  if (there) scratch.at("dest/old.whl", "old");
  const before = snapshot(scratch.path);
  const entry = `blobs/${layer.digest.replace(":", "/")}`;
  const broken = layer.bytes.slice(0, isLarge ? 9 << 20 : 70_000);
  if (cache?.startsWith("wrong")) broken[broken.length >> 1] = (broken[broken.length >> 1] ?? 0) ^ 1;
  if (cache !== undefined && cache !== "empty") {
    kept.at(cache.endsWith("part") ? `${entry}.part` : entry, cache === "entry" ? layer.bytes : broken);
  }
  const options = {
    ...{ dest, connections, protocol: "http", retries: 9, timeout: isLarge ? 0.5 : 0.15 } as const,
    delay: () => Promise.resolve(),
    mirrors: mirror && [second.url],
    cache: cache && kept.path,
  };
  const ending = await fetchWheels(`${registry.host}/ns/wheels:1.0`, options).then(() => "right", (error) => {
    assert(error instanceof FetchWheelsError, `not one of ours: ${error?.stack ?? error}`);
    return `${error.kind}: ${error.message}`;
  });
  const after = snapshot(scratch.path);
  const expected = {
    "dest": "directory 755",
    "dest/big.whl": `file 644 ${isLarge ? largeLayer().wheel : sha256(NOISE)}`,
  };
  assert.deepEqual(after, ending === "right" ? { ...before, ...expected } : before);
  if (cache && ending === "right") assert.equal(sha256(Deno.readFileSync(kept.at(entry))), layer.digest);
  return ending;
}

Deno.test("hundreds of downloads with faults by lot end right, or fail as they should and leave nothing", async () => {
  const seed = Number(Deno.env.get("FETCH_WHEELS_SEED") ?? randomBytes(4).readUInt32LE());
  console.log(`FETCH_WHEELS_SEED=${seed} replays the faults`);
  const tar = rawTar(rawHeader({ name: "big.whl", size: NOISE.length }), NOISE);
  const layers = [tar, gzip(tar)].map((bytes) => ({ bytes, digest: sha256(bytes) }));
  const failures: string[] = [];
  const runs = Array.from({ length: 300 }, (_, at) => async () => {
    const plan = drawPlan(new Lot(seed + at), at % 15 === 0);
    const layer = plan.isLarge ? largeLayer() : layers[at % 2] ?? assert.fail();
    const ending = await runPlan(plan, layer).catch((error) => `wrong: ${error.stack}`);
    if (!plan.ending.split("|").includes(ending.split(":")[0] ?? "")) {
      failures.push(`${at}: ${ending} ${JSON.stringify(plan)}`);
    }
  });
  const work = async () => {
    for (let next = runs.shift(); next !== undefined; next = runs.shift()) await next();
  };
  await Promise.all(Array.from({ length: 12 }, work));
  assert.equal(failures.join("\n"), "", `with FETCH_WHEELS_SEED=${seed}`);
});

// ---------------------------------------------------------------------------------------------------------------------
// 7 Tar
// ---------------------------------------------------------------------------------------------------------------------

type Parts = (string | Uint8Array | Parts)[];
const file = (
  name: string,
  data = name,
  fields = {},
): Parts => [rawHeader({ name, size: data.length, ...fields }), data];
const symlink = (name: string, linkname: string): Parts => [rawHeader({ name, linkname, typeflag: "2" })];
const hardlink = (name: string, linkname: string): Parts => [rawHeader({ name, linkname, typeflag: "1" })];
const directory = (name: string, mode = 0o755): Parts => [rawHeader({ name, typeflag: "5", mode })];
const meta = (
  typeflag: string,
  body: Uint8Array,
): Parts => [rawHeader({ name: "m", typeflag, size: body.length }), body];
const pax = (records: Record<string, string>): Parts => meta("x", paxRecords(records));
const gnu = (typeflag: "L" | "K", text: string): Parts => meta(typeflag, toBytes(`${text}\0`));
const sparse = (fields: Record<string, string>): Parts =>
  pax(Object.fromEntries(Object.entries(fields).map(([key, value]) => [`GNU.sparse.${key}`, value])));

const flat = (parts: Parts): (string | Uint8Array)[] => parts.flatMap((p) => Array.isArray(p) ? flat(p) : [p]);
const tarOf = (...parts: Parts) => rawTar(...flat(parts));

/** What must be refused, by the kind of the error. */
const HOSTILE: Record<string, [name: string, ...parts: Parts][]> = {
  "unsafe": [
    ["an absolute path", file("/tmp/evil.whl")],
    ["an absolute path by prefix", file("evil.whl", "x", { prefix: "/tmp" })],
    ["an absolute path in PAX", pax({ path: "/tmp/evil.whl" }), file("a.whl")],
    ["an absolute path in a GNU long name", gnu("L", "/tmp/evil.whl"), file("a.whl")],
    ["an absolute directory", directory("/tmp/evil/")],
    ["a path of ..", directory("..")],
    ["a path that begins with ..", file("../evil.whl")],
    ["a path with .. in it that stays inside", file("sub/../evil.whl")],
    ["a path that ends in ..", directory("sub/..")],
    ["a path with .. behind ./", file("./../evil.whl")],
    ["a path with .. by prefix", file("evil.whl", "x", { prefix: ".." })],
    ["a path with .. in PAX", pax({ path: "../evil.whl" }), file("a.whl")],
    ["a path with .. in a GNU long name", gnu("L", "../evil.whl"), file("a.whl")],
    ["a path with .. in what would be left out", file(".wh.x/../../evil")],
    ["a path with .. and a line break", file("two\nlines/../../evil")],
    ["a device outside", rawHeader({ name: "../null", typeflag: "3" })],
    ["a NUL in a PAX path", pax({ path: "evil.whl\0.txt" }), file("a.whl")],
    ["a symlink to an absolute path", symlink("link", "/etc/passwd")],
    ["a symlink to an absolute path in PAX", pax({ linkpath: "/etc/passwd" }), symlink("link", "good.whl")],
    ["a symlink to an absolute path in a GNU long link", gnu("K", "/etc/passwd"), symlink("link", "good.whl")],
    ["a symlink to the directory above", symlink("link", "..")],
    ["a symlink outside from a subdirectory", symlink("sub/link", "../../evil")],
    ["a symlink outside and in again", symlink("link", "../there/good.whl")],
    ["a symlink outside through another", symlink("deep/up", ".."), symlink("deep/out", "up/../evil")],
    [
      "a symlink outside through one that comes later",
      symlink("out", "a/b/../.."),
      symlink("a/b", "../c"),
      directory("c"),
    ],
    ["a symlink, and a file through it to the outside", symlink("link", "/tmp"), file("link/evil.whl")],
    ["a hard link to an absolute path", hardlink("link", "/etc/passwd")],
    ["a hard link to an absolute path in PAX", pax({ linkpath: "/etc/passwd" }), hardlink("link", "good.whl")],
    ["a hard link to a path with ..", hardlink("link", "../evil")],
    ["a hard link to a symlink outside", symlink("link", "/etc/passwd"), hardlink("hard", "link")],
  ],
  "unsafe|integrity": [
    ["a symlink, and a file through it to the inside", directory("sub"), symlink("link", "sub"), file("link/evil.whl")],
    ["a symlink, and a directory in its place", symlink("link", "good.whl"), directory("link")],
    ["a symlink with a NUL in its target", pax({ linkpath: "good.whl\0x" }), symlink("link", "good.whl")],
    ["a hard link through a symlink", file("sub/b"), symlink("link", "sub"), hardlink("hard", "link/b")],
  ],
  "integrity": [
    ["a hard link to nothing", hardlink("link", "none.whl")],
    ["a hard link to what comes later", hardlink("link", "b"), file("b")],
    ["a hard link to itself", hardlink("link", "link")],
    ["a hard link to a directory", directory("sub"), hardlink("link", "sub")],
    ["a huge size and a short body", rawHeader({ name: "a.whl", size: 8 ** 11 - 1 }), "x"],
    ["a huger size in base 256", rawHeader({ name: "a.whl", size: 2 ** 62 }), "x"],
    ["a huge size in PAX", pax({ size: "9".repeat(15) }), file("a.whl")],
    ["a huge size of PAX records", rawHeader({ name: "p", typeflag: "x", size: 2 ** 40 })],
    ["a negative size in base 256", rawHeader({ name: "a.whl", size: -512 }), "x"],
    ["a negative size in octal", rawHeader({ name: "a.whl", size: "-0000000001" }), "x"],
    ["a size that is no number", rawHeader({ name: "a.whl", size: "twelve" }), "x"],
    ["a wrong checksum", file("a.whl", "x", { checksum: 1 })],
    ["noise in a header's place", "noise".repeat(100)],
    ...["abc", "-1", "1e0", "0x1", "1.0", "+1", " 1", "1 ", "1\n", "NaN", "Infinity", "9".repeat(30)].map((
      size,
    ): [string, ...Parts] => [`a PAX size of ${JSON.stringify(size)}`, pax({ size }), file("a.whl", "x")]),
    ["a global PAX size that is none", meta("g", paxRecords({ size: "abc" })), file("a.whl", "x")],
    ["a sparse file of PAX 0.1", sparse({ size: "9", numblocks: "1", map: "0,1" }), file("a", "x")],
    [
      "a sparse file of PAX 1.0",
      sparse({ major: "1", minor: "0", realsize: "9" }),
      file("a", "1\n0\n1\n".padEnd(513, "\0")),
    ],
    ["a sparse file of old GNU", file("a.whl", "x", { typeflag: "S", magic: "gnu" })],
    [
      "a sparse file behind a comment like a size",
      pax({ comment: "\n12 size=512" }),
      file("a", "", { typeflag: "0" }),
      file("b", "x", { typeflag: "S" }),
    ],
    ["a directory over a file", directory("good.whl/")],
    ["a file below a file", file("good.whl/evil")],
    ["a file over a directory", directory("sub"), file("sub")],
    ["a file over a directory that is not empty", file("sub/b"), file("sub")],
    ["a symlink over a directory", file("sub/b"), symlink("sub", "good.whl")],
    ["a file without a name", file(".", "x")],
  ],
};

Deno.test("an archive is refused, and DEST stays as it was, for", async (t) => {
  using scratch = new Scratch();
  for (const [kind, rows] of Object.entries(HOSTILE)) {
    for (const [name, ...parts] of rows) {
      await t.step(name, () => assertRefused(scratch.at("layer.tar", tarOf(file("good.whl"), ...parts)), kind));
    }
  }
});

Deno.test("an archive that is cut is refused, and DEST stays as it was", async (t) => {
  using scratch = new Scratch();
  const tar = tarOf(file("good.whl"), pax({ path: "long.whl" }), file("b.whl", "x".repeat(600)));
  const places = {
    "in the first header": 300,
    "before a body": 512,
    "in a body": 515,
    "in the padding of a body": 600,
    "between two members": 1024,
    "in a later header": 1200,
    "before PAX records": 1536,
    "between PAX records and their member": 2048,
    "in the last body": 2700,
    "before the end's empty blocks": 3584,
  };
  assert.equal(tar.length, 3584 + 1024);
  for (const [name, length] of Object.entries(places)) {
    for (const [form, layer] of Object.entries({ plain: tar.slice(0, length), gzip: gzip(tar.slice(0, length)) })) {
      await t.step(`${name}, ${form}`, () => assertRefused(scratch.at("layer", layer), "integrity"));
    }
  }
});

const LONG = `${"long-directory/".repeat(9)}${"n".repeat(120)}.whl`;
const LONG_THERE = Object.fromEntries(
  [...LONG.matchAll(/\//g)].map(({ index }) => [LONG.slice(0, index), "/"]).concat([[LONG, "x"]]),
);

/** What must be taken, and what is there afterwards; null stands for a member that is left out and named. */
const HONEST: [name: string, there: Record<string, string | null>, ...parts: Parts][] = [
  ["a long name in PAX", LONG_THERE, pax({ path: LONG }), file("cut", "x")],
  ["a long name of GNU", LONG_THERE, gnu("L", LONG), file("cut", "x", { magic: "gnu" })],
  [
    "a long link of GNU",
    { ...LONG_THERE, l: "x" },
    gnu("L", LONG),
    file("cut", "x"),
    gnu("K", LONG),
    hardlink("l", "cut"),
  ],
  ["a name in UTF-8", { "käse-寿司.whl": "x" }, file("käse-寿司.whl", "x")],
  ["a name in UTF-8 in PAX", { "käse-寿司.whl": "x" }, pax({ path: "käse-寿司.whl" }), file("k", "x")],
  ["a ustar prefix", { a: "/", "a/b": "/", "a/b/c": "x" }, file("c", "x", { prefix: "a/b" })],
  ["a v7 header", { b: "x" }, file("b", "x", { magic: "v7", typeflag: "\0" })],
  ["a size in PAX", { b: "x".repeat(600) }, pax({ size: "600" }), rawHeader({ name: "b" }), "x".repeat(600)],
  ["a global PAX header", { b: "x" }, meta("g", paxRecords({ comment: "0123abc" })), file("b", "x")],
  ["a PAX comment like a size", { b: "", c: "Sx" }, pax({ comment: "\n12 size=512" }), file("b", ""), file("c", "Sx")],
  ["an empty file", { b: "" }, file("b", "")],
  ["an empty directory", { sub: "/" }, directory("sub/")],
  ["a directory that has a size", { d: "/", b: "x" }, rawHeader({ name: "d", typeflag: "5", size: 9 }), file("b", "x")],
  ["a contiguous file", { b: "x" }, file("b", "x", { typeflag: "7" })],
  ["duplicates, of which the last one wins", { b: "last", c: "c" }, file("b", "first"), file("c"), file("b", "last")],
  ["a directory twice", { d: "/", "d/b": "x" }, directory("d"), file("d/b", "x"), directory("d")],
  ["a symlink whose name a file takes", { b: "x" }, symlink("b", "good.whl"), file("b", "x")],
  ["a file whose name a symlink takes", { b: "-> good.whl" }, file("b", "x"), symlink("b", "good.whl")],
  ["a hard link whose name a file takes", { b: "x", c: "y" }, file("b", "x"), hardlink("c", "b"), file("c", "y")],
  ["a hard link whose first name is taken", { b: "y", c: "x" }, file("b", "x"), hardlink("c", "b"), file("b", "y")],
  ["a leading ./ and more slashes", { s: "/", "s/b": "x" }, directory("./"), directory("./s/"), file(".//s//./b", "x")],
  ["a component that begins with a dot", { ".hidden": null, "a.b": "x" }, file(".hidden"), file("a.b", "x")],
  ["a directory that begins with a dot", { ".d": null, ".d/b": null }, directory(".d"), file(".d/b")],
  [
    "a whiteout",
    { s: "/", "s/.wh.b": null, "s/.wh..wh..opq": null },
    directory("s"),
    file("s/.wh.b"),
    file("s/.wh..wh..opq"),
  ],
  [
    "a device and a FIFO",
    { n3: null, n4: null, n6: null },
    ["3", "4", "6"].map((t) => rawHeader({ name: `n${t}`, typeflag: t })),
  ],
  ["hard links", { h: "good.whl", s: "/", "s/h": "good.whl" }, hardlink("h", "./good.whl"), hardlink("s/h", "h")],
  [
    "a hard link that has a size",
    { h: "good.whl" },
    rawHeader({ name: "h", linkname: "good.whl", typeflag: "1", size: 9 }),
  ],
  [
    "symlinks inside",
    { l: "-> good.whl", s: "/", "s/up": "-> ../l" },
    symlink("l", "good.whl"),
    symlink("s/up", "../l"),
  ],
  ["a symlink to nothing inside", { l: "-> s/none" }, symlink("l", "s/none")],
  [
    "a symlink inside through another",
    { a: "/", "a/b": "/", c: "-> a/b", l: "-> c/../../good.whl" },
    directory("a/b"),
    symlink("c", "a/b"),
    symlink("l", "c/../../good.whl"),
  ],
  ["zeros behind the end", { b: "x" }, file("b", "x"), new Uint8Array(20 * 512)],
];

Deno.test("an archive is taken with", async (t) => {
  for (const [name, there, ...parts] of HONEST) {
    await t.step(name, async () => {
      using scratch = new Scratch();
      const source = scratch.at("layer.tar", tarOf(file("good.whl"), ...parts));
      Deno.mkdirSync(scratch.at("there"));
      for (const dest of ["absent", "there"]) {
        const result = await fetchWheels(source, { dest: scratch.at(dest) });
        const expected = Object.entries({ "good.whl": "good.whl", ...there });
        const isLeftOut = ([, text]: [string, string | null]) => text === null;
        assert.deepEqual(contents(scratch.at(dest)), Object.fromEntries(expected.filter((row) => !isLeftOut(row))));
        const files = expected.filter((row) => !isLeftOut(row) && row[1] !== "/").map(([path]) => path);
        assert.deepEqual(result.files.map(({ path }) => path).sort(), files.sort());
        assert.deepEqual(result.skipped.map(({ path }) => path), expected.filter(isLeftOut).map(([path]) => path));
        for (const { reason } of result.skipped) assert.match(reason, /\w/);
      }
      assert.deepEqual([...Deno.readDirSync(scratch.path)].map(({ name }) => name).sort(), [
        "absent",
        "layer.tar",
        "there",
      ]);
    });
  }
});

Deno.test("hard links share one file", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", tarOf(file("b"), hardlink("c", "b")));
  await fetchWheels(source, { dest: scratch.at("dest") });
  assert.equal(Deno.statSync(scratch.at("dest/c")).ino, Deno.statSync(scratch.at("dest/b")).ino);
  assert.equal(Deno.statSync(scratch.at("dest/c")).nlink, 2);
});

Deno.test("modes come from the archive, not from the umask, without setuid, setgid and sticky bits; so do times", async () => {
  using scratch = new Scratch();
  const modes = { "a": 0o644, "b": 0o755, "c": 0o4755, "d": 0o2777, "e": 0o1666, "f": 0, "g": 0o444 };
  const files = Object.entries(modes).map(([name, mode]) => file(name, name, { mode }));
  const source = scratch.at("layer.tar", tarOf(directory("sub", 0o2775), directory("bare", 0), files));
  const args = ["run", ...PERMISSIONS, PROGRAM, "--wheels-file", scratch.at("none/none"), source];
  for (const dest of ["absent", "there"]) {
    if (dest === "there") Deno.mkdirSync(scratch.at(dest));
    const through = ["/bin/sh", "-c", 'umask 077; exec "$@"', "sh"];
    const { code, stderr } = await runDeno([...args, "-d", scratch.at(dest)], { through });
    assert.equal(code, 0, stderr);
    const actual = Object.entries(snapshot(scratch.at(dest))).map(([path, entry]) => [path, entry.split(" ")[1]]);
    const expected = { a: "644", b: "755", c: "755", d: "777", e: "666", f: "600", g: "644", sub: "775", bare: "700" };
    assert.deepEqual(Object.fromEntries(actual), expected);
    assert.equal(Deno.statSync(scratch.at(`${dest}/a`)).mtime?.toISOString(), "2024-01-01T00:00:00.000Z");
  }
});

Deno.test("a skipped member before a large one does not stop the extraction", async (t) => {
  using scratch = new Scratch();
  const large = randomBytes(1 << 20);
  const wheel = (name: string): Parts => [rawHeader({ name, size: large.length }), large];
  const table: [name: string, options: FetchWheelsOptions, ...parts: Parts][] = [
    ["hidden", {}, file(".hidden", "x".repeat(100)), wheel("a.whl")],
    ["not included", { include: ["*.whl"] }, file("u.txt", "x"), wheel("a.whl")],
    ["excluded", { exclude: ["*.txt"] }, file("u.txt", "x"), wheel("a.whl")],
    ["too short", { stripComponents: 1 }, file("README", "x"), wheel("w/a.whl")],
  ];
  for (const [name, options, ...parts] of table) {
    for (const [form, pack] of Object.entries({ plain: (tar: Uint8Array) => tar, gzip, zstd })) {
      await t.step(`${name}, ${form}`, async () => {
        const dest = scratch.at(`${name}-${form}`);
        const source = scratch.at(`${name}.${form}`, pack(tarOf(...parts)));
        await fetchWheels(source, { ...options, dest, signal: AbortSignal.timeout(10_000) });
        assertSame(Deno.readFileSync(join(dest, "a.whl")), large);
      });
    }
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 8 Disk
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("publishing into DEST adds, replaces and leaves the rest, constraints last", async () => {
  using scratch = new Scratch();
  const dest = scratch.at("dest");
  scratch.at("dest/a.whl", "old");
  scratch.at("dest/kept.whl", "kept");
  scratch.at("dest/sub/kept.txt", "kept");
  Deno.chmodSync(scratch.at("dest/sub"), 0o750);
  const names = ["a.txt", "a.whl", "sub/b.txt", "sub/b.whl", "z.whl"];
  const source = scratch.at("layer.tar", tarOf(names.map((name) => file(name, "new"))));
  using watcher = Deno.watchFs(dest);
  await fetchWheels(source, { dest });
  scratch.at("dest/over", "");

  const fresh = Object.fromEntries(names.map((name) => [name, "new"]));
  const kept = { "kept.whl": "kept", "sub/kept.txt": "kept" };
  assert.deepEqual(contents(dest), { ...fresh, ...kept, sub: "/", over: "" });
  assert.equal((Deno.statSync(scratch.at("dest/sub")).mode ?? 0) & 0o777, 0o750);

  const appeared: string[] = [];
  for await (const { paths } of watcher) {
    for (const path of paths) {
      const name = path.slice(dest.length + 1);
      if (names.includes(name) && !appeared.includes(name)) appeared.push(name);
    }
    if (paths.some((path) => path.endsWith("/over"))) break;
  }
  assert.deepEqual(appeared.toSorted(), names.toSorted());
  const lastWheel = Math.max(...appeared.map((name, at) => name.endsWith(".whl") ? at : -1));
  assert(lastWheel < appeared.indexOf("a.txt") && lastWheel < appeared.indexOf("sub/b.txt"), appeared.join());
});

Deno.test("publishing that fails in the middle is taken back", async (t) => {
  const names = ["a.whl", "new/b.whl", "sub/c.whl", "y.txt", "z.whl"];
  const obstacles: Record<string, { kind: string; make(scratch: Scratch): void }> = {
    "a directory in a file's place": { kind: "io", make: (scratch) => scratch.at("dest/z.whl/full", "") },
    "an empty directory in a file's place": { kind: "io", make: (scratch) => Deno.mkdirSync(scratch.at("dest/z.whl")) },
    "a directory in the last text's place": { kind: "io", make: (scratch) => Deno.mkdirSync(scratch.at("dest/y.txt")) },
    "a file in a directory's place": { kind: "io", make: (scratch) => scratch.at("dest/new", "") },
    "a symlink to the outside in a directory's place": {
      kind: "io|unsafe",
      make: (scratch) => Deno.symlinkSync("../outside", scratch.at("dest/new")),
    },
    "a symlink to nowhere in a directory's place": {
      kind: "io|unsafe",
      make: (scratch) => Deno.symlinkSync("../nowhere", scratch.at("dest/new")),
    },
  };
  for (const [name, { kind, make }] of Object.entries(obstacles)) {
    await t.step(name, async () => {
      using scratch = new Scratch();
      scratch.at("outside/b.whl", "outside");
      scratch.at("dest/a.whl", "old");
      scratch.at("dest/sub/c.whl", "old");
      make(scratch);
      const source = scratch.at("layer.tar", tarOf(names.map((name) => file(name, "new"))));
      const before = snapshot(scratch.path);
      await assertFails(fetchWheels(source, { dest: scratch.at("dest") }), kind);
      assert.deepEqual(snapshot(scratch.path), before);
    });
  }
});

Deno.test("a symlink in DEST is replaced by a file of its name, not written through", async () => {
  using scratch = new Scratch();
  scratch.at("outside.whl", "outside");
  Deno.mkdirSync(scratch.at("dest"));
  Deno.symlinkSync("../outside.whl", scratch.at("dest/a.whl"));
  await fetchWheels(scratch.at("layer.tar", tarOf(file("a.whl", "new"))), { dest: scratch.at("dest") });
  assert.deepEqual(contents(scratch.at("dest")), { "a.whl": "new" });
  assert.equal(Deno.readTextFileSync(scratch.at("outside.whl")), "outside");
});

Deno.test("DEST may be a symlink to a directory, and stays one", async () => {
  using scratch = new Scratch();
  Deno.mkdirSync(scratch.at("real"));
  Deno.symlinkSync("real", scratch.at("dest"));
  await fetchWheels(scratch.at("layer.tar", tarOf(file("a.whl"))), { dest: scratch.at("dest") });
  assert.deepEqual(contents(scratch.at("real")), { "a.whl": "a.whl" });
  assert.equal(Deno.readLinkSync(scratch.at("dest")), "real");
});

Deno.test("two runs to one DEST at the same time both succeed", async () => {
  using scratch = new Scratch();
  const [one, two] = ["one", "two"].map((name) => scratch.at(name, tarOf(file(`${name}.whl`), file("both"))));
  const dest = scratch.at("new/dest");
  await Promise.all([one, two].map((source) => fetchWheels(source ?? "", { dest })));
  assert.deepEqual(Object.keys(contents(dest)).sort(), ["both", "one.whl", "two.whl"]);
  assert.deepEqual([...Deno.readDirSync(scratch.at("new"))].map(({ name }) => name), ["dest"]);
});

Deno.test("an abort stops a download, with its own reason, and leaves nothing", async () => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, gzip(tarOf(file("a.whl"))));
  registry.faults = [{ kind: "stall", byte: 20 }];
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

Deno.test("what a killed run left is removed by the next one to that DEST", async (t) => {
  await using registry = startRegistry();
  const layer = gzip(await makeTar([{ name: "a.whl", data: randomBytes(1 << 20) }]));
  const reference = serveLayer(registry, layer);
  for (const dest of ["absent", "there"]) {
    await t.step(`where DEST is ${dest}`, async () => {
      registry.faults = [{ kind: "stall", byte: layer.length >> 1 }];
      using scratch = new Scratch();
      if (dest === "there") Deno.mkdirSync(scratch.at(dest));
      const parent = dest === "there" ? scratch.at(dest) : scratch.path;
      const args = ["run", ...PERMISSIONS, PROGRAM, "--protocol", "http", "-d", scratch.at(dest), reference];
      const child = spawnDeno(args);
      await waitFor(() => Object.keys(snapshot(parent)).some((path) => path.endsWith("a.whl")));
      child.kill("SIGKILL");
      await child.output();
      const left = [...Deno.readDirSync(parent)].map(({ name }) => name);
      assert(left.length === 1 && left[0]?.startsWith("."), left.join());
      registry.faults = [];
      await fetchWheels(reference, { dest: scratch.at(dest) });
      const expected = dest === "there" ? ["there", "there/a.whl"] : ["absent", "absent/a.whl"];
      assert.deepEqual(Object.keys(snapshot(scratch.path)), expected);
    });
  }
});

Deno.test("a living run's staging directory is left alone, a dead one's beside it is removed", async () => {
  await using registry = startRegistry();
  const layer = gzip(await makeTar([{ name: "a.whl", data: NOISE }]));
  const reference = serveLayer(registry, layer);
  for (const place of ["there", "absent"]) {
    using scratch = new Scratch();
    if (place === "there") Deno.mkdirSync(scratch.at(place));
    const parent = place === "there" ? scratch.at(place) : scratch.path;
    const hidden = () => [...Deno.readDirSync(parent)].map(({ name }) => name).filter((name) => name.startsWith("."));
    registry.faults = [{ kind: "stall", byte: layer.length >> 1 }];
    const start = async () => {
      const before = hidden();
      const child = spawnDeno([
        "run",
        ...PERMISSIONS,
        PROGRAM,
        "--protocol",
        "http",
        "-d",
        scratch.at(place),
        reference,
      ]);
      const fresh = () => hidden().find((name) => !before.includes(name)) ?? "none";
      await waitFor(() => fresh() !== "none" && "new/a.whl" in snapshot(join(parent, fresh())));
      return { child, staging: fresh() };
    };
    const [alive, dead] = [await start(), await start()];
    dead.child.kill("SIGKILL");
    await dead.child.output();
    assert.deepEqual(hidden().toSorted(), [alive.staging, dead.staging].toSorted());
    registry.faults = [];
    await fetchWheels(reference, { dest: scratch.at(place), protocol: "http" });
    assert.deepEqual(hidden(), [alive.staging]);
    Deno.removeSync(scratch.at(`${place}/a.whl`));
    registry.dropConnections();
    const { code, stderr } = await alive.child.output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
    assert.deepEqual(Object.keys(snapshot(scratch.path)), [place, `${place}/a.whl`]);
    assertSame(Deno.readFileSync(scratch.at(`${place}/a.whl`)), NOISE);
  }
});

Deno.test("DEST that cannot be one is an error of the disk, before anything is asked for", async (t) => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  using scratch = new Scratch();
  scratch.at("file", "file");
  const before = snapshot(scratch.path);
  for (const dest of ["file", "file/below"]) {
    await t.step(dest, async () => {
      const error = await assertFails(fetchWheels(reference, { dest: scratch.at(dest) }), "io");
      assert(error.message.includes(scratch.path), error.message);
      assert.deepEqual(snapshot(scratch.path), before);
    });
  }
  assert.deepEqual(registry.requests, []);
});

const hasSetpriv = !isRoot || isInstalled("setpriv");

Deno.test({
  name: `a DEST that may not be written to is an error of the disk${hasSetpriv ? "" : " (needs setpriv)"}`,
  ignore: !hasSetpriv,
  async fn() {
    using scratch = new Scratch();
    const source = scratch.at("layer.tar", tarOf(file("a.whl")));
    scratch.at("dest/old.whl", "old");
    Deno.chmodSync(scratch.at("dest"), 0o555);
    const before = snapshot(scratch.path);
    // Modes do not bind root, unless it gives up that right.
    const drop = "-dac_override,-dac_read_search";
    const through = isRoot ? ["setpriv", "--bounding-set", drop, "--inh-caps", drop] : [];
    for (const target of [["-d", scratch.at("dest")], ["-d", scratch.at("dest/new")], ["-o", scratch.at("dest/out")]]) {
      const args = ["run", ...PERMISSIONS, PROGRAM, "--wheels-file", scratch.at("no/no"), ...target, source];
      const { code, lines } = await runDeno(args, { through });
      assert.equal(code, 8, lines.join("\n"));
      assert.match(lines[0] ?? "", /permission denied/i);
      assert.deepEqual(snapshot(scratch.path), before);
    }
  },
});

const canMount = isRoot && Deno.build.os === "linux" && tryMount();

function tryMount(): boolean {
  using scratch = new Scratch();
  const isDone = new Deno.Command("mount", { args: ["-t", "tmpfs", "none", scratch.path] }).outputSync().success;
  if (isDone) new Deno.Command("umount", { args: [scratch.path] }).outputSync();
  return isDone;
}

Deno.test({
  name: `a full disk is an error of the disk, and DEST stays as it was${canMount ? "" : " (needs root and mount)"}`,
  ignore: !canMount,
  async fn() {
    using scratch = new Scratch();
    const source = scratch.at("layer.tar", tarOf(file("a.whl"), file("b.whl", "x".repeat(2 << 20))));
    const disk = scratch.at("disk");
    Deno.mkdirSync(disk);
    const mount = new Deno.Command("mount", { args: ["-t", "tmpfs", "-o", "size=1m", "none", disk] }).outputSync();
    assert(mount.success);
    try {
      scratch.at("disk/there/a.whl", "old");
      const before = snapshot(disk);
      for (
        const options of [{ dest: join(disk, "there") }, { dest: join(disk, "new") }, { output: join(disk, "out") }]
      ) {
        const { message } = await assertFails(fetchWheels(source, options), "io");
        assert.match(message, /no space/);
        assert.deepEqual(snapshot(disk), before);
      }
    } finally {
      new Deno.Command("umount", { args: [disk] }).outputSync();
    }
  },
});

Deno.test("an output file receives the layer as it is, or nothing", async (t) => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const output = scratch.at("out.tar.gz");
  const layer = gzip(await makeTar(GOOD));

  await t.step("broken, where nothing was", async () => {
    await assertFails(fetchWheels(serveLayer(registry, layer, { size: 9 }), { output }), "integrity");
    assert.deepEqual(snapshot(scratch.path), {});
  });
  await t.step("right", async () => {
    const result = await fetchWheels(serveLayer(registry, layer), { output });
    assert.deepEqual(contents(scratch.path), { "out.tar.gz": Deno.readTextFileSync(output) });
    assert.deepEqual(Deno.readFileSync(output), layer);
    assert.deepEqual([result.output, result.dest, result.files], [output, null, []]);
  });
  await t.step("broken, where something was", async () => {
    const before = snapshot(scratch.path);
    const digest = sha256(toBytes("other"));
    await assertFails(fetchWheels(serveLayer(registry, layer, { digest }), { output }), "integrity");
    assert.deepEqual(snapshot(scratch.path), before);
  });
  await t.step("no archive at all, which is not looked into", async () => {
    await fetchWheels(serveLayer(registry, toBytes("plain text")), { output });
    assert.equal(Deno.readTextFileSync(output), "plain text");
  });
  await t.step("through a symlink, which stays", async () => {
    Deno.symlinkSync("out.tar.gz", scratch.at("link"));
    await fetchWheels(serveLayer(registry, layer), { output: scratch.at("link") });
    assert.equal(Deno.readLinkSync(scratch.at("link")), "out.tar.gz");
    assert.deepEqual(Deno.readFileSync(output), layer);
  });
  await t.step("/dev/null, which stays what it is", async () => {
    await fetchWheels(serveLayer(registry, layer), { output: "/dev/null" });
    assert(Deno.statSync("/dev/null").isCharDevice);
  });
  await t.step("a directory, or a file in none, which is an error of the disk", async () => {
    const before = snapshot(scratch.path);
    for (const wrong of [scratch.path, scratch.at("none/out"), join(output, "out")]) {
      await assertFails(fetchWheels(serveLayer(registry, layer), { output: wrong }), "io");
      assert.deepEqual(snapshot(scratch.path), before);
    }
  });
});

Deno.test("an output may be a pipe, which is written to and not replaced", async (t) => {
  const scripts = {
    "of a name": 'mkfifo pipe; cat pipe > got & timeout -k 1 5 "$@" -o pipe && wait',
    "of the shell": 'timeout -k 1 5 "$@" -o >(cat > got)',
  };
  for (const [name, script] of Object.entries(scripts)) {
    await t.step(name, async () => {
      using scratch = new Scratch();
      const source = scratch.at("layer", "as it is");
      const surroundings = { through: ["/bin/bash", "-c", script, "bash"], cwd: scratch.path };
      const { code, lines } = await runDeno(["run", ...PERMISSIONS, PROGRAM, source], surroundings);
      assert.equal(code, 0, lines.join("\n"));
      await waitFor(() => Deno.readTextFileSync(scratch.at("got")) === "as it is");
    });
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 9 Sources
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("a source may be a URL of a tarball, whose secrets are told to its own server only", async (t) => {
  const seen: { port: number; authorization: string | null }[] = [];
  const layer = gzip(await makeTar(GOOD));
  const serve = (handler: (url: URL) => Response) =>
    Deno.serve({ port: 0, hostname: "127.0.0.1", onListen: () => {} }, (request) => {
      const url = new URL(request.url);
      seen.push({ port: Number(url.port), authorization: request.headers.get("authorization") });
      return handler(url);
    });
  await using store = serve(({ search }) => new Response(search === "?sig=S3CRET" ? layer : null));
  await using site = serve(({ pathname }) => {
    const to = `http://127.0.0.1:${store.addr.port}/blob?sig=S3CRET`;
    if (pathname === "/moved.tar.gz") return new Response(null, { status: 302, headers: { location: to } });
    if (pathname === "/near/moved") {
      return new Response(null, { status: 307, headers: { location: "../layer.tar.gz" } });
    }
    if (pathname === "/layer.tar.gz") return new Response(layer);
    return new Response("gone", { status: pathname === "/failing" ? 500 : 404 });
  });
  const at = (path: string) => `http://user:pa%20ss@127.0.0.1:${site.addr.port}${path}`;

  for (const path of ["/layer.tar.gz", "/layer.tar.gz?token=S3CRET", "/near/moved", "/moved.tar.gz"]) {
    await t.step(path, async () => {
      using scratch = new Scratch();
      seen.length = 0;
      const { code, stderr } = await run(["-v", "-d", scratch.at("dest"), at(path)]);
      assert.equal(code, 0, stderr);
      assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
      assert.doesNotMatch(stderr, /S3CRET|pa%20ss|pa ss/);
      for (const { port, authorization } of seen) {
        assert.equal(authorization, port === site.addr.port ? `Basic ${btoa("user:pa ss")}` : null);
      }
      assert.equal(seen.length, path.includes("moved") ? 2 : 1);
    });
  }
  for (const [path, code] of [["/gone?sig=S3CRET", 3], ["/failing?sig=S3CRET", 5]] as const) {
    await t.step(path, async () => {
      using scratch = new Scratch();
      const result = await run(["-v", "--retries", "0", "-d", scratch.at("dest"), at(path)]);
      assert.equal(result.code, code, result.stderr);
      assert.doesNotMatch(result.stderr, /S3CRET|pa%20ss|pa ss/);
      assert.deepEqual(snapshot(scratch.path), {});
    });
  }
  await t.step("a URL's result names no image", async () => {
    using scratch = new Scratch();
    const { image, manifest, layer: info, platform } = await fetchWheels(at("/layer.tar.gz"), {
      dest: scratch.at("d"),
    });
    assert.deepEqual([image, manifest, info, platform], [null, null, null, null]);
  });
});

Deno.test("a URL that is none, or none that can be used, is an error of usage that tells no secret", async (t) => {
  for (
    const url of ["http://user:S3CRET@ho st/x?S3CRET", "https://user:S3CRET@[::1/x", "http://us%er:S3CRET@127.0.0.1/x"]
  ) {
    await t.step(url, async () => {
      using scratch = new Scratch();
      const { code, stderr } = await run(["-d", scratch.at("dest"), url]);
      assert.equal(code, 2, stderr);
      assert.doesNotMatch(stderr, /S3CRET/);
      assert.deepEqual(snapshot(scratch.path), {});
    });
  }
});

Deno.test("a source may be a path that begins with / or ./", async () => {
  using scratch = new Scratch();
  const path = scratch.at("layer.tar.gz", gzip(await makeTar(GOOD)));
  const { files } = await fetchWheels(path, { dest: scratch.at("dest") });
  assert.equal(files.length, 2);
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
  const args = ["run", ...PERMISSIONS, PROGRAM, "-q", "-d", "relative", "./layer.tar.gz"];
  const { code, stderr } = await runDeno(args, { cwd: scratch.path });
  assert.deepEqual([code, stderr], [0, ""]);
  assert.deepEqual(contents(scratch.at("relative")), GOOD_CONTENTS);
});

Deno.test("a path where nothing is is not found; one of a directory is an error of the disk", async () => {
  using scratch = new Scratch();
  await assertRefused(scratch.at("none.tar"), "not-found");
  await assertRefused(scratch.path, "io");
});

/** A directory's files as members of an archive. */
function membersOf(dir: string): TarMember[] {
  return Object.entries(snapshot(dir)).filter(([, entry]) => entry.startsWith("file"))
    .map(([path]) => ({ name: path, data: Deno.readFileSync(join(dir, path)) }));
}

Deno.test("an OCI layout, as a directory or an archive, is resolved and verified as a registry is", async (t) => {
  using scratch = new Scratch();
  const images = [await makeWheelsImage("amd64"), await makeWheelsImage("arm64")] as const;
  const index = makeIndex(images.map(({ descriptor }) => descriptor));
  const layout = writeLayout(scratch, [...images], { single: images[0], multi: index });
  const archive = `oci-archive:${scratch.at("layout.tar", await makeTar(membersOf(scratch.at("layout"))))}`;
  for (const source of [layout, archive]) {
    await t.step(source.split(":")[0] ?? "", async () => {
      for (const [tag, architecture] of [["single", "amd64"], ["multi", "amd64"], ["multi", "arm64"]]) {
        const dest = scratch.at(`${source.slice(0, 5)}/${tag}/${architecture}`);
        const result = await fetchWheels(`${source}:${tag}`, { dest, platform: `linux/${architecture}` });
        assert.deepEqual(Object.keys(contents(dest)), [`for_${architecture}-1.0-py3-none-any.whl`]);
        assert.deepEqual([result.layer?.index, result.layer?.count], [2, 2]);
      }
      await assertRefused(`${source}:none`, "not-found");
      assert.match((await assertFails(fetchWheels(source), "not-found")).message, /single, multi$/);
      await assertRefused(`${source}:multi`, "not-found", { platform: "linux/s390x" });
    });
  }
  await t.step("a blob that is not what its digest says", async () => {
    const digest = [...images[0].blobs.keys()].at(-1)?.split(":")[1];
    const blob = scratch.at(`layout/blobs/sha256/${digest}`);
    Deno.writeFileSync(blob, gzip(await makeTar(GOOD)));
    await assertRefused(`${layout}:single`, "integrity");
  });
  await assertRefused(`oci:${scratch.at("nowhere")}`, "not-found");
  await assertRefused(`oci-archive:${scratch.at("layout")}`, "not-found");
});

Deno.test("an archive of docker save is verified by the digests of its configuration", async (t) => {
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
    const { platform, layer } = await fetchWheels(source, options);
    assert.deepEqual([platform, layer?.digest, contents(options.dest)], ["linux/arm64", sha256(top), GOOD_CONTENTS]);
    const compressed = scratch.at("good.tar.gz", gzip(await archive()));
    await fetchWheels(`docker-archive:${compressed}`, { ...options, layer: "1", dest: scratch.at("base") });
    assert.deepEqual(contents(scratch.at("base")), { "base.txt": "base" });
  });
  const table: [name: string, archive: Uint8Array, kind: string, platform?: string][] = [
    ["another layer than its configuration says", await archive({ top: base }), "integrity"],
    [
      "another configuration than its name says",
      await archive({ config: config.replace("arm64", "amd64") }),
      "integrity",
    ],
    ["two images", await archive({}, 2), "not-found"],
    ["another platform", await archive(), "not-found", "linux/amd64"],
    ["no manifest.json", await makeTar(GOOD), "not-found"],
    ["a truncated archive", (await archive()).subarray(0, 2048), "integrity"],
  ];
  for (const [what, bytes, kind, platform = "linux/arm64"] of table) {
    await t.step(what, () => assertRefused(`docker-archive:${scratch.at("bad.tar", bytes)}`, kind, { platform }));
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// 10 Command line
// ---------------------------------------------------------------------------------------------------------------------

Deno.test("--help goes to stdout, fits 80 columns, and names what there is and no more", async () => {
  for (const flag of ["--help", "-h"]) {
    const { code, stdout, stderr } = await run([flag]);
    assert.deepEqual([code, stderr], [0, ""]);
    assert(stdout.endsWith("\n") && !stdout.includes("\x1b"));
    for (const line of stdout.split("\n")) assert(line.length <= 80, line);
    const options =
      "dest output platform protocol insecure ca-file username password-stdin retries timeout wheels-file " +
      "quiet verbose version help";
    for (const name of options.split(" ")) assert(stdout.includes(`--${name}`), name);
    const variables = "WHEELS WHEELS_DIR WHEELS_DEST REGISTRY_PROTOCOL REGISTRY_INSECURE REGISTRY_CA_FILE " +
      "REGISTRY_USERNAME REGISTRY_PASSWORD";
    for (const name of variables.split(" ")) assert.match(stdout, new RegExp(`\\b${name}\\b`));
    assert(stdout.includes("/tmp/wheels") && stdout.includes("/opt/loci/wheels"));
    const unknown = (await run(["--no-such-option"])).lines[0] ?? "";
    for (const [name] of stdout.matchAll(/--[a-z][a-z-]+/g)) {
      assert.notEqual((await run([name])).lines[0], unknown.replace("--no-such-option", name));
    }
  }
});

Deno.test("--version is that of deno.json, and goes to stdout", async () => {
  for (const flag of ["--version", "-V"]) {
    const { code, stdout, stderr } = await run([flag]);
    assert.deepEqual([code, stdout, stderr], [0, `fetch_wheels ${denoJson.version}\n`, ""]);
  }
});

Deno.test("errors of usage exit with 2 and say in two lines what is wrong and what to do", async (t) => {
  const cases: { args: string[]; env?: Record<string, string>; says: RegExp }[] = [
    { args: [], says: /no source/ },
    { args: ["--dset", "x", "ns/name"], says: /--dset.*\n.*--dest\b/ },
    { args: ["--no-such-option", "ns/name"], says: /--no-such-option/ },
    { args: ["-x", "ns/name"], says: /-x/ },
    { args: ["ns/name", "ns/other"], says: /argument/ },
    { args: ["ns/name", "--dest"], says: /--dest/ },
    { args: ["--protocol", "ftp", "ns/name"], says: /ftp.*\n?.*https/ },
    { args: ["ns/name"], env: { REGISTRY_PROTOCOL: "ftp" }, says: /REGISTRY_PROTOCOL.*ftp/ },
    { args: ["--retries", "many", "ns/name"], says: /many/ },
    { args: ["--retries", "-1", "ns/name"], says: /-1/ },
    { args: ["--timeout", "0", "ns/name"], says: /timeout/ },
    { args: ["--timeout", "soon", "ns/name"], says: /soon/ },
    { args: ["--platform", "linux", "ns/name"], says: /"linux"/ },
    { args: ["--platform", "", "ns/name"], says: /platform/ },
    { args: ["--password-stdin", "ns/name"], says: /user name/ },
    { args: ["--username", "u", "ns/name"], says: /password/ },
    { args: ["ns/name"], env: { REGISTRY_PASSWORD: "S3CRET" }, says: /user name/ },
    { args: ["--username", "u:v", "ns/name"], env: { REGISTRY_PASSWORD: "S3CRET" }, says: /u:v/ },
    { args: [""], says: /""/ },
    { args: ["registry.example/Upper/case"], says: /Upper/ },
    { args: ["ns/name:bad tag"], says: /bad tag/ },
    { args: ["ns/name@sha256:123"], says: /sha256:123/ },
    { args: [], env: { WHEELS: "ns/name:bad\ntag" }, says: /bad/ },
  ];
  for (const { args, env = {}, says } of cases) {
    await t.step(JSON.stringify([args, env]), async () => {
      using scratch = new Scratch();
      const withDest = args.at(-1) === "--dest" ? args : ["-d", scratch.at("dest"), ...args];
      const { code, stdout, stderr, lines } = await run(withDest, { env });
      assert.equal(code, 2, stderr);
      assert.equal(stdout, "");
      assert.match(stderr, says);
      assert.match(lines[0] ?? "", /^fetch_wheels: Cannot .*[^.]$/);
      assert.match(lines[1] ?? "", /^fetch_wheels: hint: ./);
      assert.equal(lines.length, 2);
      assert(!stderr.includes("S3CRET"));
      assert.deepEqual(snapshot(scratch.path), {});
    });
  }
});

Deno.test("each kind of failure has its exit code, and is said without a stack unless --verbose", async (t) => {
  await using registry = startRegistry({
    auth: "basic",
    users: { user: "right" },
    onRequest: (_, { path }) => path.includes("/open/") ? new Response(null, { status: 404 }) : undefined,
  });
  using scratch = new Scratch();
  const unused = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = unused.addr;
  unused.close();
  const cases: [number, string][] = [
    [3, scratch.at("none.tar")],
    [3, `${registry.host}/open/none:1.0`],
    [4, `${registry.host}/ns/wheels:1.0`],
    [5, `127.0.0.1:${port}/ns/wheels:1.0`],
    [6, scratch.at("broken.tar", "no archive")],
    [7, scratch.at("unsafe.tar", tarOf(file("../evil.whl")))],
    [8, scratch.path],
  ];
  for (const [expected, source] of cases) {
    await t.step(`${expected} ${source.split("/").slice(-2).join("/")}`, async () => {
      const args = ["--retries", "0", "--protocol", "http", "-d", scratch.at("dest"), source];
      const { code, stdout, lines } = await run(args);
      assert.deepEqual([code, stdout], [expected, ""], lines.join("\n"));
      assert.match(lines.findLast((line) => !line.includes(": hint: ")) ?? "", /^fetch_wheels: Cannot .+: .+[^.]$/);
      assert(!lines.some((line) => /^fetch_wheels: +at /.test(line)));
      const verbose = await run(["-v", ...args]);
      assert.equal(verbose.code, expected);
      assert(verbose.lines.some((line) => /^fetch_wheels: +at /.test(line)), verbose.stderr);
    });
  }
});

Deno.test("--quiet says nothing, --verbose tells of requests, else a line a step", async () => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const reference = serveLayer(registry, gzip(await makeTar([...GOOD, { name: "tty", type: "character-device" }])));
  const [quiet, normal, verbose] = await Promise.all(
    [["-q"], [], ["-v"]].map((flags, at) =>
      run([...flags, "--protocol", "http", "-d", scratch.at(`${at}`), reference])
    ),
  );
  assert.deepEqual([quiet?.code, normal?.code, verbose?.code], [0, 0, 0]);
  assert.deepEqual([quiet?.stdout, normal?.stdout, verbose?.stdout], ["", "", ""]);
  assert.equal(quiet?.stderr, "");
  assert.match(normal?.stderr ?? "", /sha256:[0-9a-f]{64}/);
  assert.match(normal?.stderr ?? "", /tty/);
  assert.match(normal?.lines.at(-1) ?? "", /\/1 from sha256:[0-9a-f]{64}$/);
  assert(!normal?.stderr.includes("/v2/"));
  assert.match(verbose?.stderr ?? "", /\/v2\/ns\/wheels\/manifests\/1\.0/);
  assert.match(verbose?.stderr ?? "", /\/v2\/ns\/wheels\/blobs\/sha256:/);
});

Deno.test("a path with a line break in it is told in one line", async () => {
  using scratch = new Scratch();
  const { code } = await run(["-d", scratch.at("two\nlines"), scratch.at("a\nb.tar", tarOf(file("c\nd"), file("e")))]);
  assert.equal(code, 0); // and run() looks at each line
});

Deno.test("-o - writes the layer as it is to stdout, and all else to stderr", async () => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const layer = toBytes("as it is\n");
  const reference = serveLayer(registry, layer);
  const args = ["--protocol", "http", "-o", "-", reference];
  const { code, stdout, lines } = await run(args, { env: { WHEELS_DIR: scratch.at("dest") } });
  assert.deepEqual([code, stdout], [0, "as it is\n"]);
  assert(lines.length > 0);
  assert.deepEqual(snapshot(scratch.path), {});
  serveLayer(registry, layer, { digest: sha256(toBytes("other")) });
  assert.equal((await run(args)).code, 6);
});

Deno.test("-o - to a reader that goes away is no fault of the program", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer", new Uint8Array(8 << 20));
  const through = ["/bin/bash", "-c", 'set -o pipefail; "$@" | head -c 1', "bash"];
  const { code, lines } = await runDeno(["run", ...PERMISSIONS, PROGRAM, "-o", "-", source], { through });
  assert.notEqual(code, 0);
  assert.notEqual(code, 1, lines.join("\n"));
});

Deno.test("LOCI's variables choose source and target; options and SOURCE beat them", async (t) => {
  using scratch = new Scratch();
  const one = scratch.at("one.tar", tarOf(file("one.whl")));
  const two = scratch.at("two.tar", tarOf(file("two.whl")));
  const [a, b] = [scratch.at("a"), scratch.at("b")];
  const cases: { name: string; args: string[]; env: Record<string, string>; there: string[] }[] = [
    { name: "WHEELS, WHEELS_DIR", args: [], env: { WHEELS: one, WHEELS_DIR: a }, there: ["a/one.whl"] },
    { name: "SOURCE beats WHEELS", args: [two], env: { WHEELS: one, WHEELS_DIR: a }, there: ["a/two.whl"] },
    { name: "--dest beats WHEELS_DIR", args: ["-d", b], env: { WHEELS: one, WHEELS_DIR: a }, there: ["b/one.whl"] },
    { name: "WHEELS_DEST", args: [], env: { WHEELS: one, WHEELS_DEST: a, WHEELS_DIR: b }, there: ["a"] },
    { name: "--output beats WHEELS_DEST", args: ["-o", b], env: { WHEELS: one, WHEELS_DEST: a }, there: ["b"] },
    { name: "--dest beats WHEELS_DEST", args: ["-d", b], env: { WHEELS: one, WHEELS_DEST: a }, there: ["b/one.whl"] },
    { name: "empty is unset", args: [one], env: { WHEELS: "", WHEELS_DEST: "", WHEELS_DIR: a }, there: ["a/one.whl"] },
  ];
  const before = snapshot(scratch.path);
  for (const { name, args, env, there } of cases) {
    await t.step(name, async () => {
      const { code, stderr } = await run(args, { env });
      assert.equal(code, 0, stderr);
      const after = Object.entries(snapshot(scratch.path)).filter(([path, entry]) =>
        !(path in before) && entry.startsWith("file")
      );
      assert.deepEqual(after.map(([path]) => path), there);
      for (const path of after.map(([path]) => path.split("/")[0] ?? "")) {
        Deno.removeSync(scratch.at(path), { recursive: true });
      }
    });
  }
});

Deno.test("the wheels file gives the source, and remembers it", async (t) => {
  using scratch = new Scratch();
  const one = scratch.at("one.tar", tarOf(file("one.whl")));
  const two = scratch.at("two.tar", tarOf(file("two.whl")));
  const wheels = scratch.at("loci/wheels", `${one}\nsecond line\n`);
  const args = ["--wheels-file", wheels, "-d", scratch.at("dest")];
  const remembered = () => Deno.readTextFileSync(wheels);

  await t.step("its first line is the source, and it stays as it is", async () => {
    assert.equal((await run(args)).code, 0);
    assert.deepEqual(Object.keys(contents(scratch.at("dest"))), ["one.whl"]);
    assert.equal(remembered(), `${one}\nsecond line\n`);
  });
  await t.step("SOURCE is written to it", async () => {
    assert.equal((await run([...args, two])).code, 0);
    assert.equal(remembered(), `${two}\n`);
  });
  await t.step("WHEELS is written to it", async () => {
    assert.equal((await run(args, { env: { WHEELS: one } })).code, 0);
    assert.equal(remembered(), `${one}\n`);
  });
  await t.step("a source that failed is not", async () => {
    assert.equal((await run([...args, scratch.at("none.tar")])).code, 3);
    assert.equal(remembered(), `${one}\n`);
  });
  await t.step("it is made where its directory exists", async () => {
    Deno.removeSync(wheels);
    assert.equal((await run([...args, two])).code, 0);
    assert.equal(remembered(), `${two}\n`);
  });
  await t.step("and not where that does not", async () => {
    const { code, stderr } = await run(["--wheels-file", scratch.at("none/wheels"), "-q", ...args.slice(2), two]);
    assert.deepEqual([code, stderr], [0, ""]);
    assert.throws(() => Deno.statSync(scratch.at("none")), Deno.errors.NotFound);
  });
  await t.step("an empty one is no source", async () => {
    Deno.writeTextFileSync(wheels, "\n");
    const { code, lines } = await run(args);
    assert.equal(code, 2);
    assert(lines[0]?.includes(wheels));
  });
});

Deno.test("REGISTRY_PROTOCOL says how to speak to the registry, and --protocol beats it", async () => {
  await using registry = startRegistry();
  using scratch = new Scratch();
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  const args = ["--retries", "0", "-d", scratch.at("dest"), reference];
  const codes = [
    await run(args, { env: { REGISTRY_PROTOCOL: "https" } }),
    await run(args, { env: { REGISTRY_PROTOCOL: "http" } }),
    await run(["--protocol", "http", ...args], { env: { REGISTRY_PROTOCOL: "https" } }),
    await run(["--protocol", "https", ...args], { env: { REGISTRY_PROTOCOL: "http" } }),
  ].map(({ code }) => code);
  assert.deepEqual(codes, [5, 0, 0, 5]);
});

Deno.test("REGISTRY_INSECURE and REGISTRY_CA_FILE make a certificate do that nobody knows", async (t) => {
  const certificate = await makeCertificate();
  await using registry = startRegistry({ tls: certificate });
  using scratch = new Scratch();
  const caFile = scratch.at("ca.pem", certificate.cert);
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  const cases: [number, Record<string, string>, string[]][] = [
    ...["yes", "true", "t", "1", "YES", "True", "T"].map((text) =>
      [0, { REGISTRY_INSECURE: text }, []] as [0, object, []]
    ),
    ...["no", "false", "0", ""].map((text) => [5, { REGISTRY_INSECURE: text }, []] as [5, object, []]),
    [0, { REGISTRY_INSECURE: "no" }, ["--insecure"]],
    [0, { REGISTRY_CA_FILE: caFile }, []],
    [0, {}, ["--ca-file", caFile]],
    [0, { REGISTRY_CA_FILE: "/nowhere/ca.pem" }, ["--ca-file", caFile]],
  ] as [number, Record<string, string>, string[]][];
  for (const [expected, env, args] of cases) {
    await t.step(JSON.stringify([env, args]), async () => {
      const { code, stderr } = await run([...args, "--retries", "0", "-d", scratch.at("dest"), reference], { env });
      assert.equal(code, expected, stderr);
      if (code !== 0) assert.match(stderr, /hint: .*--ca-file.*--insecure/);
    });
  }
});

Deno.test("credentials come from stdin or the environment, and no secret is ever printed", async (t) => {
  const password = "  S3CRET: pässwörd ";
  await using registry = startRegistry({ auth: "bearer", users: { user: password }, storage: { signed: true } });
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  using scratch = new Scratch();
  const both = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: password };
  const wrong = { ...both, REGISTRY_PASSWORD: "S3CRET-wrong" };
  const cases: { name: string; args?: string[]; env?: Record<string, string>; stdin?: string; code: number }[] = [
    { name: "--password-stdin", args: ["--username", "user", "--password-stdin"], stdin: password, code: 0 },
    { name: "a line's end", args: ["--username", "user", "--password-stdin"], stdin: `${password}\n`, code: 0 },
    {
      name: "Windows' line's end",
      args: ["--username", "user", "--password-stdin"],
      stdin: `${password}\r\n`,
      code: 0,
    },
    { name: "the environment", env: both, code: 0 },
    { name: "an option beats the environment", args: ["--password-stdin"], env: wrong, stdin: password, code: 0 },
    { name: "--username beats it", args: ["--username", "other"], env: both, code: 4 },
    { name: "a wrong password", env: wrong, code: 4 },
    { name: "no password", code: 4 },
  ];
  for (const { name, args = [], env, stdin, code: expected } of cases) {
    await t.step(name, async () => {
      const options = ["-v", "--protocol", "http", "--retries", "0", "-d", scratch.at("dest")];
      const { code, stderr, stdout } = await run([...options, ...args, reference], { env, stdin });
      assert.equal(code, expected, stderr);
      assert.equal(stdout, "");
      const queries = registry.requests.filter(({ origin }) => origin === "storage").map(({ search }) =>
        search.slice(1)
      );
      const headers = registry.requests.flatMap(({ headers }) => headers.get("authorization")?.split(" ")[1] ?? []);
      assert(code !== 0 || queries.length > 0 && headers.length > 1);
      for (const secret of ["S3CRET", ...queries, ...headers]) {
        assert(!stderr.includes(secret), `${secret} in ${stderr}`);
      }
    });
  }
});

Deno.test("mirrors and a cache are given by option or by environment, and options win", async (t) => {
  await using registry = startRegistry();
  await using mirror = startRegistry();
  await using other = startRegistry();
  const layer = gzip(await makeTar(GOOD));
  const [reference] = [registry, mirror].map((each) => serveLayer(each, layer));
  const dead = `http://${await closedHost()}`;
  const cases: { name: string; args?: string[]; env?: Record<string, string>; asked: TestRegistry[] }[] = [
    { name: "REGISTRY_MIRROR", env: { REGISTRY_MIRROR: mirror.url }, asked: [mirror] },
    {
      name: "several in it",
      env: { REGISTRY_MIRROR: ` ${dead} \t${other.url}\n${mirror.url} ` },
      asked: [other, mirror],
    },
    {
      name: "--mirror beats it",
      args: ["--mirror", mirror.url],
      env: { REGISTRY_MIRROR: other.url },
      asked: [mirror],
    },
    { name: "--mirror, repeated", args: ["--mirror", other.url, "--mirror", mirror.url], asked: [other, mirror] },
    { name: "empty", env: { REGISTRY_MIRROR: "" }, asked: [registry] },
  ];
  for (const { name, args = [], env = {}, asked } of cases) {
    await t.step(name, async () => {
      using scratch = new Scratch();
      for (const each of [registry, mirror, other]) each.requests.length = 0;
      const options = ["--protocol", "http", "-d", scratch.at("dest")];
      const { code, stderr } = await run([...options, ...args, reference ?? ""], { env });
      assert.equal(code, 0, stderr);
      const seen = [registry, mirror, other].filter(({ requests }) => requests.length > 0);
      assert.deepEqual(seen.map(({ url }) => url).toSorted(), asked.map(({ url }) => url).toSorted());
    });
  }
  await t.step("FETCH_WHEELS_CACHE, which --cache beats", async () => {
    using scratch = new Scratch();
    const env = { FETCH_WHEELS_CACHE: scratch.at("one") };
    for (const [place, args] of [["one", []], ["two", ["--cache", scratch.at("two")]]] as const) {
      const { code } = await run(["--protocol", "http", "-d", scratch.at("dest"), ...args, reference ?? ""], { env });
      assert.equal(code, 0);
      assert(snapshot(scratch.at(place))[`blobs/${sha256(layer).replace(":", "/")}`]);
    }
    assert.deepEqual([...Deno.readDirSync(scratch.path)].map(({ name }) => name).toSorted(), ["dest", "one", "two"]);
  });
});

for (const [signal, expected] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
  Deno.test(`${signal} in a download that stands still exits with ${expected} and leaves nothing`, async (t) => {
    await using registry = startRegistry();
    const layer = gzip(await makeTar([{ name: "a.whl", data: randomBytes(1 << 20) }]));
    const reference = serveLayer(registry, layer);
    registry.faults = [{ kind: "stall", byte: layer.length >> 1 }];
    for (const target of ["there", "absent/below", "out"]) {
      await t.step(target, async () => {
        using scratch = new Scratch();
        scratch.at("there/old.whl", "old");
        const before = snapshot(scratch.path);
        const option = target === "out" ? "-o" : "-d";
        const args = ["run", ...PERMISSIONS, PROGRAM, "--protocol", "http", option, scratch.at(target), reference];
        const child = spawnDeno(args);
        const isStaged = () =>
          Object.entries(snapshot(scratch.path)).some(([path, entry]) =>
            !(path in before) && entry.startsWith("file") && !entry.endsWith(sha256(new Uint8Array()))
          );
        await waitFor(isStaged);
        child.kill(signal);
        const { code, stderr } = await child.output();
        const { lines } = outcome(code, new Uint8Array(), new TextDecoder().decode(stderr));
        assert.equal(code, expected);
        assert.match(lines.at(-1) ?? "", new RegExp(signal));
        assert.deepEqual(snapshot(scratch.path), before);
      });
    }
  });
}

Deno.test("a signal ends a download in ranges, and a wait, within two seconds", async (t) => {
  const cases: Record<string, Fault> = {
    "ranges": { kind: "stall", byte: 1 << 20 },
    "a trickle": { kind: "trickle", bytesPerSecond: 1 << 20 },
    "a wait": { kind: "status", code: 503, headers: { "retry-after": "50" } },
  };
  for (const [signal, expected] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    for (const [name, fault] of Object.entries(cases)) {
      await t.step(`${signal} in ${name}`, async () => {
        await using registry = startRegistry();
        const reference = serveLarge(registry);
        registry.faults = [fault];
        using scratch = new Scratch();
        const args = ["--protocol", "http", "-d", scratch.at("dest"), reference];
        const child = spawnDeno(["run", ...PERMISSIONS, PROGRAM, ...args]);
        await waitFor(() => askedRanges(registry).length >= (name === "a wait" ? 1 : 4));
        await new Promise((resolve) => setTimeout(resolve, 100));
        const killed = performance.now();
        child.kill(signal);
        const { code, stderr } = await child.output();
        assert(performance.now() - killed < 2000);
        assert.equal(code, expected, new TextDecoder().decode(stderr));
        assert.deepEqual(snapshot(scratch.path), {});
      });
    }
  }
});

Deno.test("the program runs with the permissions that its first line names", async () => {
  const [shebang = ""] = Deno.readTextFileSync(PROGRAM).split("\n");
  const permissions = shebang.match(/--allow-\S+/g) ?? [];
  assert.equal(shebang, `#!/usr/bin/env -S deno run ${permissions.join(" ")}`);
  await using registry = startRegistry({ auth: "basic", users: { user: "S3CRET" }, tls: await makeCertificate() });
  const reference = serveLayer(registry, gzip(await makeTar(GOOD)));
  using scratch = new Scratch();
  const env = { WHEELS: reference, WHEELS_DIR: scratch.at("dest"), REGISTRY_INSECURE: "yes" };
  const account = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: "S3CRET" };
  const args = ["run", "--no-prompt", ...permissions, PROGRAM, "--wheels-file", scratch.at("none/none")];
  const { code, stdout, stderr } = await runDeno(args, { env: { ...env, ...account } });
  assert.deepEqual([code, stdout], [0, ""], stderr);
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
});

Deno.test("a missing permission is named, and the option that gives it", async () => {
  using scratch = new Scratch();
  const source = scratch.at("layer.tar", tarOf(file("a.whl")));
  const permissions = PERMISSIONS.filter((name) => name !== "--allow-write");
  const { code, lines } = await runDeno(["run", ...permissions, PROGRAM, "-d", scratch.at("dest"), source]);
  assert.equal(code, 8);
  assert.match(lines[1] ?? "", /hint: .*--allow-write/);
});

Deno.test("the module can be imported without any permission, and parses", async () => {
  using scratch = new Scratch();
  const url = new URL("fetch_wheels.ts", import.meta.url).href;
  const script = `import { parseImageReference } from ${JSON.stringify(url)};
    console.log(parseImageReference("ns/name").registry);`;
  const config = fileURLToPath(new URL("deno.json", import.meta.url));
  const args = ["run", "--no-prompt", "--config", config, scratch.at("script.ts", script)];
  const { code, stdout, stderr } = await runDeno(args);
  assert.deepEqual([code, stdout, stderr], [0, "docker.io\n", ""]);
});

Deno.test("--include, --exclude and --strip-components choose what is extracted", async (t) => {
  using scratch = new Scratch();
  const names = ["a.whl", "a.txt", "sub/b.whl", "sub/deep/c.whl", ".hidden/d.whl", ".wh.e"];
  const source = scratch.at("layer.tar", await makeTar(names.map((name) => ({ name, data: name }))));
  const table: [args: string[], expected: string[]][] = [
    [[], ["a.txt", "a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "*.whl"], ["a.whl", "sub/b.whl", "sub/deep/c.whl"].concat(".hidden/d.whl").sort()],
    [["--include", "*.whl", "--exclude", ".*"], ["a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "sub"], ["sub/b.whl", "sub/deep/c.whl"]],
    [["--include", "sub/*.whl"], ["sub/b.whl"]],
    [["--include", "a.{whl,txt}"], ["a.txt", "a.whl"]],
    [["--exclude", "sub"], ["a.txt", "a.whl"]],
    [["--exclude", "sub/deep", "--exclude", "[a].txt"], ["a.whl", "sub/b.whl"]],
    [["--exclude", "!a.whl"], ["a.txt", "a.whl", "sub/b.whl", "sub/deep/c.whl"]],
    [["--include", ".wh.e"], [".wh.e"]],
    [["--strip-components", "1"], ["b.whl", "deep/c.whl"]],
    [["--strip-components", "2", "--exclude", "a*"], ["c.whl"]],
  ];
  for (const [at, [args, expected]] of table.entries()) {
    await t.step(JSON.stringify(args), async () => {
      const dest = scratch.at(`dest${at}`);
      const { code, stderr } = await run([...args, "-d", dest, source]);
      assert.equal(code, 0, stderr);
      const there = Object.entries(contents(dest)).filter(([, text]) => text !== "/").map(([path]) => path);
      assert.deepEqual(there.sort(), expected);
    });
  }
});

Deno.test("a hard link follows --strip-components", async () => {
  using scratch = new Scratch();
  const members: TarMember[] = [{ name: "top/a.whl", data: "wheel" }, {
    name: "top/b.whl",
    type: "link",
    linkname: "top/a.whl",
  }];
  const source = scratch.at("layer.tar", await makeTar(members));
  await fetchWheels(source, { dest: scratch.at("dest"), stripComponents: 1 });
  assert.deepEqual(contents(scratch.at("dest")), { "a.whl": "wheel", "b.whl": "wheel" });
});

Deno.test("--layer takes a layer by its place or its digest, and an empty one says which are left", async (t) => {
  const empty = gzip(await makeTar([{ name: ".wh.old" }]));
  await using registry = serveImage({}, makeImage({ layers: [BASE, LAYER, empty] }));
  using scratch = new Scratch();
  const source = `${registry.host}/ns/wheels:1.0`;
  const common = ["--platform", "linux/amd64", "-d", scratch.at("dest")];
  const table: [layer: string, code: number, said: RegExp][] = [
    ["2", 0, /layer 2 of 3/],
    ["1", 0, /layer 1 of 3/],
    [sha256(LAYER), 0, /layer 2 of 3/],
    ["last", 3, /hint: .*--layer 1, --layer 2$/m],
    ["4", 3, /of its 3 layers none is 4/],
    [sha256(toBytes("x")), 3, /of its 3 layers none is sha256/],
    ["0", 2, /--layer|use layer/],
    ["first", 2, /use layer "first"/],
  ];
  for (const [layer, code, said] of table) {
    await t.step(layer, async () => {
      const outcome = await run([...common, "--layer", layer, source]);
      assert.equal(outcome.code, code, outcome.stderr);
      assert.match(outcome.stderr, said);
    });
  }
});

Deno.test("--unpin drops a project's pin, however it spells its name, and nothing else", async (t) => {
  using scratch = new Scratch();
  const pins =
    "Oslo.Config===9.1\noslo-config-extra===1\n# oslo.config===9\nnova===1\noslo_config===9.2;python_version<'4'\n";
  const kept = "oslo-config-extra===1\n# oslo.config===9\nnova===1\n";
  const members: TarMember[] = [{ name: "upper-constraints.txt", data: pins, mode: 0o640 }, {
    name: "copy.txt",
    type: "link",
    linkname: "upper-constraints.txt",
  }];
  const source = scratch.at("layer.tar", await makeTar(members));
  for (const [args, env] of [[["--unpin", "OSLO-config"], {}], [[], { PROJECT: "oslo_config" }]] as const) {
    await t.step(JSON.stringify(env), async () => {
      const { code, stderr, stdout } = await run([...args, "--json", "-d", scratch.at("dest"), source], { env });
      assert.equal(code, 0, stderr);
      assert.deepEqual(contents(scratch.at("dest")), { "upper-constraints.txt": kept, "copy.txt": pins });
      const { files } = JSON.parse(stdout);
      assert.deepEqual(files[0], { path: "upper-constraints.txt", size: kept.length });
    });
  }
});

Deno.test("--list and --dry-run look, and touch nothing; --json says it in one document", async (t) => {
  await using registry = serveImage({}, makeImage({ layers: [BASE, gzip(await makeTar([...GOOD, { name: ".x" }]))] }));
  using scratch = new Scratch();
  const source = `${registry.host}/ns/wheels:1.0`;
  const args = ["--protocol", "http", "-d", scratch.at("dest"), "--platform", "linux/amd64"];
  const files = [{ path: "a.whl", size: 5 }, { path: "sub/b.txt", size: 4 }];
  await t.step("--list", async () => {
    const { code, stdout } = await run(["--list", ...args, source]);
    assert.deepEqual([code, stdout], [0, "           5  a.whl\n           4  sub/b.txt\n"]);
  });
  await t.step("--list --json", async () => {
    const { stdout } = await run(["--list", "--json", ...args, source]);
    const result = JSON.parse(stdout);
    assert.deepEqual([result.files, result.dest, result.skipped[0].path], [files, null, ".x"]);
  });
  await t.step("--dry-run fetches no layer", async () => {
    registry.requests.length = 0;
    const { code, stdout } = await run(["--dry-run", "--json", ...args, source]);
    assert.deepEqual([code, JSON.parse(stdout).files, paths(registry, "/blobs/")], [0, [], []]);
  });
  await t.step("--dry-run of a file that is not there", async () => {
    assert.equal((await run(["--dry-run", scratch.at("none.tar")])).code, 3);
  });
  assert.deepEqual(snapshot(scratch.path), {});
  await t.step("--json", async () => {
    const { code, stdout, stderr } = await run(["-q", "--json", ...args, source]);
    const result: FetchResult = JSON.parse(stdout);
    assert.deepEqual([code, stderr], [0, ""]);
    assert.deepEqual(Object.keys(result), [
      ...["source", "image", "platform", "manifest", "layer", "dest", "output", "files", "skipped", "bytes", "seconds"],
    ]);
    assert.deepEqual(result.image, { registry: registry.host, repository: "ns/wheels", tag: "1.0", digest: null });
    assert.deepEqual([result.files, result.dest, result.layer?.index], [files, scratch.at("dest"), 2]);
  });
  for (const [bad, kind, expected] of [[[`${source}x`], "not-found", 3], [["--bogus"], "usage", 2]] as const) {
    await t.step(`--json ${kind}`, async () => {
      const { code, stdout, stderr } = await run(["--json", ...args, ...bad]);
      const { error } = JSON.parse(stdout);
      assert.deepEqual([code, error.kind], [expected, kind]);
      assert(stderr.includes(error.message), stderr);
    });
  }
});

Deno.test("--list ends quietly when its reader goes away, and not when the disk is full", async () => {
  using scratch = new Scratch();
  const members = Array.from({ length: 5000 }, (_, at) => ({ name: `${"n".repeat(80)}${at}`, data: "x" }));
  const source = scratch.at("layer.tar", await makeTar(members));
  const through = ["bash", "-c", '"$@" | head -n 1 >/dev/null; exit "${PIPESTATUS[0]}"', "bash"];
  const { code, stderr } = await runDeno(["run", ...PERMISSIONS, PROGRAM, "--list", source], { through });
  assert.deepEqual([code, stderr], [0, ""]);
  const full = ["bash", "-c", 'exec "$@" >/dev/full', "bash"];
  const failed = await runDeno(["run", ...PERMISSIONS, PROGRAM, "--list", source], { through: full });
  assert.equal(failed.code, 8, failed.stderr);
});

Deno.test("the bundle runs with an empty cache and no package registry", async () => {
  using scratch = new Scratch();
  const { bundle } = denoJson.tasks;
  const [, ...args] = bundle.command.replace("fetch_wheels.js", scratch.at("fetch_wheels.js")).split(" ");
  const cwd = dirname(PROGRAM);
  const bundled = await spawnDeno(args, { cwd }).output();
  assert(bundled.success, new TextDecoder().decode(bundled.stderr));
  const source = scratch.at("layer.tar.gz", gzip(await makeTar(GOOD)));
  const env = { DENO_DIR: scratch.at("cache") };
  const run = ["run", "--cached-only", ...PERMISSIONS, scratch.at("fetch_wheels.js"), "-d", scratch.at("dest"), source];
  const { code, stderr } = await runDeno(run, { env, cwd: scratch.path });
  assert.equal(code, 0, stderr);
  assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
});

Deno.test("--clean replaces DEST, or leaves it as it is", async (t) => {
  for (const kind of ["a directory", "a link to one"]) {
    await t.step(kind, async () => {
      using scratch = new Scratch();
      scratch.at("real/old.whl", "old");
      scratch.at("real/sub/b.txt", "old");
      const dest = kind === "a directory" ? scratch.at("real") : scratch.at("link");
      if (kind !== "a directory") Deno.symlinkSync("real", dest);
      const good = scratch.at("good.tar", await makeTar(GOOD));
      const bad = scratch.at("bad.tar", tarOf(file("../evil")));
      const before = snapshot(scratch.path);
      await assertFails(fetchWheels(bad, { dest, clean: true }), "unsafe");
      assert.deepEqual(snapshot(scratch.path), before);
      const { code, stderr } = await run(["--clean", "-d", dest, good]);
      assert.equal(code, 0, stderr);
      assert.deepEqual(contents(scratch.at("real")), GOOD_CONTENTS);
      const beside = kind === "a directory" ? ["bad.tar", "good.tar", "real"] : ["bad.tar", "good.tar", "link", "real"];
      assert.deepEqual([...Deno.readDirSync(scratch.path)].map(({ name }) => name).sort(), beside);
    });
  }
  await t.step("a DEST that is not there", async () => {
    using scratch = new Scratch();
    await fetchWheels(scratch.at("good.tar", await makeTar(GOOD)), { dest: scratch.at("dest"), clean: true });
    assert.deepEqual(contents(scratch.at("dest")), GOOD_CONTENTS);
  });
});

Deno.test("progress is one line of the terminal's width, on a terminal only, and gone in the end", async (t) => {
  await using registry = startRegistry();
  const reference = serveLayer(registry, gzip(await makeTar([{ name: "a.whl", data: randomBytes(1 << 20) }])));
  const table: [columns: number | undefined, flags: string[], isShown: boolean][] = [
    [80, [], true],
    [20, [], true],
    [undefined, [], false],
    [80, ["--no-progress"], false],
    [80, ["-q"], false],
  ];
  for (const [columns, flags, isShown] of table) {
    await t.step(JSON.stringify([columns, ...flags]), async () => {
      using scratch = new Scratch();
      const said: string[] = [];
      const code = await main([...flags, "--protocol", "http", "-d", scratch.at("dest"), reference], {
        env: () => undefined,
        stdin: new Blob([]).stream(),
        stdout: new WritableStream(),
        stderr: (text) => void said.push(text),
        columns: () => columns,
      });
      assert.equal(code, 0, said.join(""));
      // deno-lint-ignore no-control-regex -- what moves the cursor is what it is about
      const drawn = said.filter((text) => /^\r.+\x1b\[K$/.test(text));
      assert.equal(drawn.length > 0, isShown, JSON.stringify(said));
      for (const text of drawn) assert(text.length - 4 < (columns ?? 0), text);
      if (columns === 80 && isShown) assert.match(drawn[0] ?? "", /\d % .* of 1\.0 MB, .*\/s, \d+ s left, \d members/);
      if (isShown) assert.equal(said.at(-2), "\r\x1b[K");
      assert(flags.includes("-q") || said.at(-1)?.endsWith("\n"), JSON.stringify(said));
    });
  }
});

Deno.test("a wheel for another machine is warned of, for its image is built wrongly", async (t) => {
  const table: [name: string, platform: string, isForeign: boolean][] = [
    ["a-1-py3-none-any.whl", "linux/amd64", false],
    ["a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "linux/amd64", false],
    ["a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "linux/arm64", true],
    ["a-1-1build-cp312-cp312-linux_aarch64.whl", "linux/arm64/v8", false],
    ["a-1-1build-cp312-cp312-linux_aarch64.whl", "linux/amd64", true],
    ["a-1-cp312-cp312-musllinux_1_1_armv7l.whl", "linux/arm/v7", false],
    ["a-1-cp312-cp312-win_amd64.whl", "linux/amd64", true],
    ["a-1-cp312-cp312-linux_s390x.whl", "linux/s390x", false],
    ["no wheel's name.whl", "linux/amd64", false],
  ];
  for (const [name, platform, isForeign] of table) {
    await t.step(`${name} ${platform}`, async () => {
      using scratch = new Scratch();
      const source = scratch.at("layer.tar", await makeTar([{ name: `sub/${name}`, data: "wheel" }]));
      const { code, stderr } = await run(["--platform", platform, "-d", scratch.at("dest"), source]);
      assert.deepEqual([code, /warning: not for .*built wrongly/.test(stderr)], [0, isForeign], stderr);
    });
  }
});

const hasPip = isInstalled("python3") &&
  new Deno.Command("python3", { args: ["-m", "pip", "--version"], stdout: "null", stderr: "null" }).outputSync()
    .success;

Deno.test({
  name: `pip installs what came out of a registry${hasPip ? "" : " (needs: apt-get install -y python3-pip)"}`,
  ignore: !hasPip,
  async fn() {
    const { filename, bytes } = makeWheel({ name: "fetched-package", version: "1.5", body: "answer = 42\n" });
    const constraints = { name: "upper-constraints.txt", data: "fetched-package===1.5\n" };
    const layer = gzip(await makeTar([{ name: filename, data: bytes }, constraints]));
    await using registry = serveImage({ auth: "bearer", storage: true }, makeImage({ layers: [BASE, layer] }));
    using scratch = new Scratch();
    const dest = scratch.at("dest");
    await fetchWheels(`${registry.host}/ns/wheels:1.0`, { dest, platform: "linux/amd64", protocol: "http" });
    const options = ["--no-index", "--find-links", dest, "-c", join(dest, "upper-constraints.txt")];
    const python = async (...args: string[]) => {
      const env = { PYTHONPATH: scratch.at("site"), PIP_CONFIG_FILE: "/dev/null", PIP_ROOT_USER_ACTION: "ignore" };
      const { success, stdout, stderr } = await new Deno.Command("python3", { args, env }).output();
      assert(success, new TextDecoder().decode(stderr));
      return new TextDecoder().decode(stdout).trim();
    };
    const target = ["--target", scratch.at("site"), "--no-cache-dir", "--disable-pip-version-check"];
    await python("-m", "pip", "install", "--quiet", ...options, ...target, "fetched-package");
    assert.equal(await python("-c", "import fetched_package; print(fetched_package.answer)"), "42");
  },
});

// ---------------------------------------------------------------------------------------------------------------------
// A real registry
// ---------------------------------------------------------------------------------------------------------------------

const hasRegistry = isInstalled("docker-registry") && isInstalled("skopeo");
const installHint = hasRegistry ? "" : " (needs: apt-get install -y docker-registry skopeo)";

/** Starts Debian's docker-registry with its storage in `scratch`; `http` and `auth` are lines of its configuration. */
async function startRealRegistry(
  scratch: Scratch,
  { http = [], auth = [] }: { http?: string[]; auth?: string[] } = {},
) {
  const probe = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = probe.addr;
  probe.close();
  const config = [
    "version: 0.1",
    "log: {level: error, accesslog: {disabled: true}}",
    `storage: {filesystem: {rootdirectory: ${scratch.at("storage")}}}`,
    "compatibility: {schema1: {enabled: true}}",
    "http:",
    `  addr: 127.0.0.1:${port}`,
    ...http,
    ...auth,
  ];
  const args = ["serve", scratch.at("config.yml", config.join("\n"))];
  const child = new Deno.Command("docker-registry", { args, stdin: "null", stdout: "null", stderr: "null" }).spawn();
  const close = async () => {
    child.kill();
    await child.status;
  };
  const isUp = () => Deno.connect({ hostname: "127.0.0.1", port }).then((c) => (c.close(), true), () => false);
  await waitFor(isUp).catch(async (error) => {
    await close();
    throw error;
  });
  return { host: `127.0.0.1:${port}`, [Symbol.asyncDispose]: close };
}

async function skopeo(...args: string[]): Promise<void> {
  const command = new Deno.Command("skopeo", { args: ["--insecure-policy", ...args] });
  const { success, stderr } = await command.output();
  assert(success, new TextDecoder().decode(stderr));
}

/** Writes an OCI layout with these manifests by their tags, and all that they name. */
function writeLayout(scratch: Scratch, images: MadeImage[], tagged: Record<string, MadeManifest>): string {
  const put = (bytes: Uint8Array) => void scratch.at(`layout/blobs/sha256/${sha256(bytes).split(":")[1]}`, bytes);
  for (const { manifest, blobs } of images) [manifest, ...blobs.values()].forEach(put);
  const manifests = Object.entries(tagged).map(([tag, { manifest, descriptor }]) => {
    put(manifest);
    return { ...descriptor, annotations: { "org.opencontainers.image.ref.name": tag } };
  });
  scratch.at("layout/oci-layout", JSON.stringify({ imageLayoutVersion: "1.0.0" }));
  scratch.at("layout/index.json", JSON.stringify({ schemaVersion: 2, manifests }));
  return `oci:${scratch.at("layout")}`;
}

async function makeWheelsImage(architecture: string): Promise<MadeImage> {
  const { filename, bytes } = makeWheel({ name: `for-${architecture}`, version: "1.0" });
  const base = gzip(await makeTar([{ name: "etc/os-release", data: "ID=test\n" }]));
  const layer = gzip(await makeTar([{ name: filename, data: bytes }, { name: ".wh.old" }]));
  return makeImage({ architecture, layers: [base, layer] });
}

Deno.test({
  name: `a real registry: schema 2, schema 1, OCI and an index, by tag and by digest${installHint}`,
  ignore: !hasRegistry,
  async fn(t) {
    using scratch = new Scratch();
    const images = [await makeWheelsImage("amd64"), await makeWheelsImage("arm64")] as const;
    const index = makeIndex(images.map(({ descriptor }) => descriptor));
    const layout = writeLayout(scratch, [...images], { single: images[0], multi: index });
    await using registry = await startRealRegistry(scratch);
    const copy = (...args: string[]) => skopeo("copy", "--quiet", "--dest-tls-verify=false", ...args);
    const at = (name: string) => `${registry.host}/ns/${name}`;
    const pushed = [
      { name: "oci:1", mediaType: MEDIA.ociManifest, args: [`${layout}:single`] },
      { name: "v2s2:1", mediaType: MEDIA.dockerManifest, args: ["--format", "v2s2", `${layout}:single`] },
      { name: "v2s1:1", mediaType: MEDIA.dockerSchema1Signed, args: ["--format", "v2s1", `${layout}:single`] },
      { name: "index:1", mediaType: MEDIA.ociManifest, args: ["--all", `${layout}:multi`] },
    ];
    for (const { name, mediaType, args } of pushed) {
      await t.step(name, async () => {
        await copy(...args, `docker://${at(name)}`);
        const platforms = name === "index:1" ? ["amd64", "arm64"] : ["amd64"];
        for (const [i, architecture] of platforms.entries()) {
          const options = { platform: `linux/${architecture}`, dest: scratch.at(`dest/${name}/${architecture}`) };
          const there = [`for_${architecture}-1.0-py3-none-any.whl`];
          const byTag = await fetchWheels(at(name), options);
          assert.deepEqual(Object.keys(contents(options.dest)), there);
          assert.equal(byTag.manifest?.mediaType, mediaType);
          assert.deepEqual([byTag.layer?.index, byTag.layer?.count], [2, 2]);
          assert.deepEqual(byTag.skipped.map(({ path }) => path), [".wh.old"]);
          assert.equal(byTag.layer?.digest, [...images[i]?.blobs.keys() ?? []].at(-1));

          const digest = name === "index:1" ? index.digest : byTag.manifest?.digest;
          Deno.removeSync(options.dest, { recursive: true });
          const byDigest = await fetchWheels(`${at(name).split(":1")[0]}@${digest}`, options);
          assert.deepEqual(Object.keys(contents(options.dest)), there);
          assert.deepEqual([byDigest.manifest, byDigest.layer], [byTag.manifest, byTag.layer]);
        }
      });
    }
    await t.step("a platform that is not there", async () => {
      const options = { platform: "linux/s390x", dest: scratch.at("dest/none") };
      const { message, hint } = await assertFails(fetchWheels(at("index:1"), options), "not-found");
      assert.match(`${message} ${hint}`, /linux\/amd64.*linux\/arm64/);
    });
    await t.step("a tag, and a repository, that are not there", async () => {
      for (const name of ["oci:2", "none:1"]) {
        await assertFails(fetchWheels(at(name), { dest: scratch.at("d") }), "not-found");
      }
    });
  },
});

const HTPASSWD_PASSWORD = "pass: wörd ";
/** Of that password, by `htpasswd -nbB -C 5`. */
const BCRYPT = "$2y$05$kD09ToOQ3.S3sayBPOjqEe729WXHR2ZofKspWyIMC/ixgYdvHEHoS";

Deno.test({
  name: `a real registry: over TLS, with a password${installHint}`,
  ignore: !hasRegistry,
  async fn(t) {
    using scratch = new Scratch();
    const { cert, key } = await makeCertificate();
    const [certificate, keyFile] = [scratch.at("cert.pem", cert), scratch.at("key.pem", key)];
    const htpasswd = scratch.at("htpasswd", `user:${BCRYPT}\n`);
    await using registry = await startRealRegistry(scratch, {
      http: [`  tls: {certificate: ${certificate}, key: ${keyFile}}`],
      auth: [`auth: {htpasswd: {realm: test, path: ${htpasswd}}}`],
    });
    const image = await makeWheelsImage("amd64");
    const layout = writeLayout(scratch, [image], { single: image });
    const target = `docker://${registry.host}/ns/wheels:1`;
    await skopeo(
      "copy",
      "--dest-tls-verify=false",
      "--dest-creds",
      `user:${HTPASSWD_PASSWORD}`,
      `${layout}:single`,
      target,
    );

    const right = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: HTPASSWD_PASSWORD };
    const cases: { name: string; args: string[]; env?: Record<string, string>; code: number }[] = [
      { name: "--ca-file", args: ["--ca-file", certificate], env: right, code: 0 },
      { name: "--insecure", args: ["--insecure"], env: right, code: 0 },
      { name: "an unknown certificate", args: [], env: right, code: 5 },
      { name: "a wrong password", args: ["--insecure"], env: { ...right, REGISTRY_PASSWORD: "wrong" }, code: 4 },
      { name: "no password", args: ["--ca-file", certificate], code: 4 },
    ];
    for (const { name, args, env, code: expected } of cases) {
      await t.step(name, async () => {
        using target = new Scratch();
        const options = [...args, "--platform", "linux/amd64", "--retries", "0", "-d", target.at("dest")];
        const { code, stderr } = await run([...options, `${registry.host}/ns/wheels:1`], { env });
        assert.equal(code, expected, stderr);
        const there = code === 0 ? ["dest", "dest/for_amd64-1.0-py3-none-any.whl"] : [];
        assert.deepEqual(Object.keys(snapshot(target.path)), there);
        assert(!stderr.includes(HTPASSWD_PASSWORD));
      });
    }
  },
});
