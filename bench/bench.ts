/**
 * fetch_wheels beside the pipelines and tools that people use in its place: one layer of many wheels, one real
 * registry (Debian's `docker-registry`), the same disk, turn by turn.
 *
 *     deno task bench --scenario loopback --rounds 3
 *
 * It prints Markdown and never fails over a number: what it reports are ratios, with their spread.
 *
 * Every server runs on this machine and ends with the benchmark. The layer (the same bytes everywhere) and a crane that
 * `go` built are kept below the temporary directory for the next run. Set `TMPDIR` to measure another disk.
 *
 * @module
 */

import { createCipheriv, createHash } from "node:crypto";
import { tmpdir } from "node:os";
import { dirname } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const USAGE = `deno task bench [OPTIONS]
  --scenario NAME   only this one: loopback, throttled, delayed
  --rounds N        turns of each contestant in each scenario (5)
  --megabytes N     size of the layer (600)
  --module FILE     the fetch_wheels.ts to measure (the one beside bench/)`;

const REPOSITORY = "bench/wheels";
/** Part of the cached layer's name; to be raised when `makeLayer()` makes other bytes. */
const RECIPE = 1;
const THROTTLE_BYTES_PER_SECOND = 40_000_000;
const DELAY_MS = 50;
/** A /30 of private addresses for the two ends of the delayed link; it is more specific than any route in its way. */
const NEAR = "10.231.197.1", FAR = "10.231.197.2";
/** What clients that download in parallel ask for at a time. */
const RANGE_BYTES = 4 * 2 ** 20;
const SAMPLE_MS = 10;

/** Set off by Ctrl-C. Whatever waits looks here, so that every way out runs through the same clean-up. */
const interrupt = new AbortController();

// ---------------------------------------------------------------------------------------------------------------------
// 1 Contestants: shell text, since that is what people type. Each one leaves the files in $OUT. The curl pipelines are
//   handed the blob's URL, which spares them the manifest; skopeo, crane and fetch_wheels look it up, as in real life.
// ---------------------------------------------------------------------------------------------------------------------

interface Contestant {
  name: string;
  needs: string[];
  script: string;
}

const FETCH_WHEELS = "fetch_wheels";

function fetchWheels(options: string): string {
  const permissions = "--allow-net --allow-read --allow-write --allow-env";
  return `"$DENO" run ${permissions} "$MODULE" -q ${options} -d "$OUT" "$HOST_PORT/${REPOSITORY}:1"`;
}

const CONTESTANTS: Contestant[] = [
  { name: FETCH_WHEELS, needs: [], script: fetchWheels("") },
  { name: `${FETCH_WHEELS} --connections 8`, needs: [], script: fetchWheels("--connections 8") },
  {
    name: "LOCI: curl -o FILE, tar xzf",
    needs: ["curl", "tar", "gzip"],
    script: `curl -fsS -o "$SCRATCH/layer" "$BLOB"; tar xzf "$SCRATCH/layer" -C "$OUT"`,
  },
  {
    name: "curl | tar xz",
    needs: ["curl", "tar", "gzip"],
    script: `curl -fsS "$BLOB" | tar xz -C "$OUT"`,
  },
  {
    // A named pipe in the place of `>(…)`: the shell waits for openssl, so that its CPU time is counted as well.
    name: "curl | tee >(openssl sha256) | bsdtar xf -",
    needs: ["curl", "tee", "openssl", "bsdtar"],
    script: `mkfifo "$SCRATCH/copy"; openssl sha256 -r "$SCRATCH/copy" >"$SCRATCH/sum" &
      curl -fsS "$BLOB" | tee "$SCRATCH/copy" | bsdtar xf - -C "$OUT"; wait $!; grep -q "^$SHA256 " "$SCRATCH/sum"`,
  },
  {
    name: "skopeo copy, tar xzf",
    needs: ["skopeo", "tar", "gzip"],
    script: `skopeo --insecure-policy copy -q --src-tls-verify=false "docker://$HOST_PORT/${REPOSITORY}:1" \\
      "dir:$SCRATCH/image"; tar xzf "$SCRATCH/image/$SHA256" -C "$OUT"`,
  },
  {
    name: "crane export | tar x",
    needs: ["crane", "tar"],
    script: `crane export --insecure "$HOST_PORT/${REPOSITORY}:1" - | tar x -C "$OUT"`,
  },
];

// ---------------------------------------------------------------------------------------------------------------------
// 2 The run: scenarios, and in each of them rounds. A round lets everybody run once, in an order that rotates, so that
//   a machine that grows slower or a page cache that grows fuller meets all alike; ratios are taken inside a round.
// ---------------------------------------------------------------------------------------------------------------------

/** Where the clients find the registry, and what has to stand before a command for it to be there. */
interface Site {
  hostPort: string;
  wrapper: string[];
}

interface Scenario {
  name: string;
  title: string;
  /** Starts the servers; `stack` ends them. Throws `Skipped` where this machine cannot do it. */
  open(stack: AsyncDisposableStack, bench: Bench): Promise<Site>;
}

/** What every step needs. */
interface Bench {
  /** A directory that is removed at the end. */
  scratch: string;
  /** The registry's directory, kept for the next run. */
  storage: string;
  denoDir: string;
  /** The `fetch_wheels.ts` to measure; empty if there is none. */
  module: string;
  layer: Layer;
}

class Skipped extends Error {}

async function main(): Promise<void> {
  const { values } = parseArgs({
    args: Deno.args,
    options: {
      scenario: { type: "string" },
      rounds: { type: "string", default: "5" },
      megabytes: { type: "string", default: "600" },
      module: { type: "string", default: fileURLToPath(new URL("../fetch_wheels.ts", import.meta.url)) },
      help: { type: "boolean", short: "h" },
    },
  });
  const [rounds, megabytes] = [Number(values.rounds), Number(values.megabytes)];
  const chosen = SCENARIOS.filter(({ name }) => name === (values.scenario ?? name));
  if (values.help || chosen.length === 0 || !(rounds >= 1) || !(megabytes >= 1)) {
    console.log(USAGE);
    return;
  }
  for (const name of ["NO_PROXY", "no_proxy"]) Deno.env.set(name, `127.0.0.1,${NEAR}`);

  await using stack = new AsyncDisposableStack();
  const bench = await openBench(stack, megabytes, await Deno.realPath(values.module).catch(() => ""));
  const contestants = await present(bench);
  console.log(await headLines(bench, contestants));
  for (const scenario of chosen) {
    console.log(`\n### ${scenario.title}\n`);
    try {
      await using servers = new AsyncDisposableStack();
      const site = await scenario.open(servers, bench);
      console.log(await probe(site, bench) + "\n");
      console.log(table(await race(contestants, rounds, site, bench)));
    } catch (error) {
      if (!(error instanceof Skipped)) throw error;
      console.log(`Skipped: ${error.message}.`);
    }
  }
}

async function openBench(stack: AsyncDisposableStack, megabytes: number, module: string): Promise<Bench> {
  const cache = `${tmpdir()}/fetch_wheels-bench-${Deno.uid()}`;
  await Deno.mkdir(cache, { recursive: true, mode: 0o700 });
  // The name can be guessed and programs are run from there: it must not be somebody else's.
  if ((await Deno.lstat(cache)).uid !== Deno.uid()) throw new Error(`Cannot use "${cache}": it has another owner`);
  Deno.env.set("PATH", `${Deno.env.get("PATH")}:/usr/sbin:/sbin:${cache}`); // the last for a crane that go built
  const scratch = await Deno.makeTempDir({ dir: cache, prefix: "run-" });
  stack.defer(() => Deno.remove(scratch, { recursive: true }));
  const storage = `${cache}/${megabytes}MB-${RECIPE}`;
  const known = readOrNothing(`${storage}/layer.json`); // written last: with it, the storage is complete
  const layer: Layer = known ? JSON.parse(known) : await makeLayer(megabytes, scratch, storage);
  const { denoDir } = JSON.parse(await output(Deno.execPath(), ["info", "--json"]));
  return { scratch, storage, denoDir, module, layer };
}

/** Those who can start here; says why the others cannot. */
async function present(bench: Bench): Promise<Contestant[]> {
  if (bench.module) await output(Deno.execPath(), ["cache", "-q", bench.module]); // a namespace has no way to a registry
  const noCrane = await installCrane(dirname(bench.storage)).then(() => "", (error) => ` (${error.message})`);
  return CONTESTANTS.filter(({ name, needs }) => {
    const missing = name.startsWith(FETCH_WHEELS) && !bench.module
      ? "its module"
      : needs.find((program) => !which(program));
    if (!missing) return true;
    console.log(`Skipped: ${name}: ${missing} is missing${missing === "crane" ? noCrane : ""}.\n`);
    return false;
  });
}

async function installCrane(directory: string): Promise<void> {
  if (which("crane")) return;
  if (!which("go")) throw new Error("and no go to install it with");
  say("go install crane");
  await output("go", ["install", "github.com/google/go-containerregistry/cmd/crane@latest"], { GOBIN: directory });
}

/** One measured run. */
interface Cost {
  seconds: number;
  cpuSeconds: number;
  /** Of the process that used most. */
  largestMiB: number;
  /** Of all processes at one moment. */
  togetherMiB: number;
}

/** A contestant's runs, one a round, or why there are none. */
type Results = Map<string, Cost[] | string>;

async function race(contestants: Contestant[], rounds: number, site: Site, bench: Bench): Promise<Results> {
  const results: Results = new Map(contestants.map(({ name }) => [name, []]));
  for (let round = 0; round < rounds; round++) {
    const first = round % contestants.length;
    for (const contestant of [...contestants.slice(first), ...contestants.slice(0, first)]) {
      const costs = results.get(contestant.name);
      if (!Array.isArray(costs)) continue; // it failed in an earlier round
      say(`round ${round + 1} of ${rounds}: ${contestant.name}`);
      try {
        costs.push(await turn(contestant, site, bench));
      } catch (error) {
        interrupt.signal.throwIfAborted();
        results.set(contestant.name, `failed: ${(error as Error).message}`);
      }
    }
  }
  return results;
}

/** Runs one contestant into a fresh directory, checks what is there, removes it. */
async function turn({ script }: Contestant, site: Site, bench: Bench): Promise<Cost> {
  const directory = await Deno.makeTempDir({ dir: bench.scratch, prefix: "turn-" });
  try {
    const out = `${directory}/out`;
    await Deno.mkdir(out);
    await output("sync", []); // nobody pays for what the one before left to write
    const cost = await timed(script, site, bench, { OUT: out, SCRATCH: directory });
    const found = count(out);
    const { files, bytes } = bench.layer;
    if (found.files !== files || found.bytes !== bytes) {
      throw new Error(`left ${found.files} files of ${found.bytes} bytes, not ${files} of ${bytes}`);
    }
    return cost;
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

function count(directory: string): { files: number; bytes: number } {
  const sum = { files: 0, bytes: 0 };
  for (const entry of Deno.readDirSync(directory)) {
    const path = `${directory}/${entry.name}`;
    const inner = entry.isDirectory ? count(path) : { files: 1, bytes: Deno.lstatSync(path).size };
    sum.files += inner.files;
    sum.bytes += inner.bytes;
  }
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 Measuring. Wall and CPU time are the shell's own (`time` adds up every process it waited for, to the millisecond),
//   since GNU time and Python are not on every machine and Deno cannot ask for its children's usage. Memory is read
//   from /proc while they run: VmHWM is the kernel's own high-water mark, so that a look every 10 ms misses only what a
//   process grows by in its last 10 ms. (The maximum that wait4 gives is no use: until a child has called exec, it
//   counts the parent's memory.)
// ---------------------------------------------------------------------------------------------------------------------

const TIMED = `set -euo pipefail; TIMEFORMAT='%R %U %S'; exec 3>&2; { time eval "$SCRIPT" >/dev/null 2>&3; } 2>&1`;

type Variables = Record<string, string>;

async function timed(script: string, site: Site, bench: Bench, variables: Variables = {}): Promise<Cost> {
  const [program = "", ...args] = [...site.wrapper, "bash", "-c", TIMED];
  const env = { // nothing of the caller's: no proxy, no credentials, no options by environment
    PATH: Deno.env.get("PATH") ?? "",
    HOME: bench.scratch,
    DENO_DIR: bench.denoDir,
    DENO_NO_UPDATE_CHECK: "1",
    SCRIPT: script,
    DENO: Deno.execPath(),
    MODULE: bench.module,
    HOST_PORT: site.hostPort,
    BLOB: `http://${site.hostPort}/v2/${REPOSITORY}/blobs/${bench.layer.digest}`,
    SHA256: bench.layer.digest.slice("sha256:".length),
    ...variables,
  };
  interrupt.signal.throwIfAborted();
  const child = new Deno.Command(program, { args, env, clearEnv: true, stdout: "piped", stderr: "piped" }).spawn();
  using _ = killedOnInterrupt(child.pid);
  let running = true;
  const ended = child.output().finally(() => running = false);
  let [largest, together] = [0, 0];
  while (running) {
    const memory = processTree(child.pid).map(memoryOf);
    largest = Math.max(largest, ...memory.map(({ highest }) => highest));
    together = Math.max(together, memory.reduce((sum, { now }) => sum + now, 0));
    await delay(SAMPLE_MS);
  }
  const { success, code, stdout, stderr } = await ended;
  interrupt.signal.throwIfAborted();
  const [wall, user, system] = new TextDecoder().decode(stdout).trim().split(" ").map(Number);
  if (!success || wall === undefined || user === undefined || system === undefined) {
    throw new Error(new TextDecoder().decode(stderr).trim().split("\n")[0] || `exit status ${code}`);
  }
  return { seconds: wall, cpuSeconds: user + system, largestMiB: largest / 1024, togetherMiB: together / 1024 };
}

/** A process and its descendants. Only a main thread's children are followed: shells and tar have no other thread. */
function processTree(pid: number): number[] {
  const children = readOrNothing(`/proc/${pid}/task/${pid}/children`).split(" ").filter(Boolean).map(Number);
  return [pid, ...children.flatMap(processTree)];
}

/** In KiB. */
function memoryOf(pid: number): { highest: number; now: number } {
  const status = readOrNothing(`/proc/${pid}/status`);
  const field = (name: string) => Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1] ?? 0);
  return { highest: field("VmHWM"), now: field("VmRSS") };
}

function readOrNothing(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return ""; // the process has ended meanwhile
  }
}

function killedOnInterrupt(pid: number): Disposable {
  const killAll = () => processTree(pid).forEach((one) => kill(one, "SIGKILL"));
  interrupt.signal.addEventListener("abort", killAll);
  return { [Symbol.dispose]: () => interrupt.signal.removeEventListener("abort", killAll) };
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 The layer. To gzip a wheel is noise, but not quite: wheels from PyPI shrink by 1.3 % and take twice as long to
//   inflate as noise, which gzip merely stores. In every other 64 KiB two bytes of three lose their top bit, which comes
//   to the same shrinkage and the same time. Sizes are lognormal; the random numbers come from a cipher with a fixed
//   key, so that the layer is the same everywhere. It goes into the registry's storage as if it had been pushed.
// ---------------------------------------------------------------------------------------------------------------------

interface Layer {
  digest: string;
  size: number;
  /** What lies in the directory after a run. */
  files: number;
  bytes: number;
}

const MEDIAN_WHEEL_BYTES = 150_000, WHEEL_SIGMA = 1.8, MAX_WHEEL_BYTES = 80_000_000;

const PACK = `cd "$1"; tar --sort=name --owner=0 --group=0 --numeric-owner --mode=644 --mtime=@1700000000 -cf ../tar *
cd ..; sha256sum tar; gzip -6n tar; sha256sum tar.gz`;

async function makeLayer(megabytes: number, scratch: string, storage: string): Promise<Layer> {
  say(`making a layer of ${megabytes} MB`);
  const directory = `${scratch}/wheels`;
  await Deno.mkdir(directory);
  const cipher = createCipheriv("aes-128-ctr", new Uint8Array(16), new Uint8Array(16));
  const random = (bytes: number): Uint8Array<ArrayBuffer> => cipher.update(new Uint8Array(bytes)).slice();
  const uniform = () => (new DataView(random(4).buffer).getUint32(0) + 1) / (2 ** 32 + 1);
  let constraints = "";
  for (let number = 1, bytes = 0; bytes < megabytes * 1e6; number++) {
    interrupt.signal.throwIfAborted();
    const normal = Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()); // Box and Muller
    const size = Math.round(Math.min(MEDIAN_WHEEL_BYTES * Math.exp(WHEEL_SIGMA * normal) + 1000, MAX_WHEEL_BYTES));
    const wheel = random(size);
    for (let at = 0; at < size; at++) if (at & 0x10000 && at % 3) wheel[at]! &= 0x7f;
    wheel.set([0x50, 0x4b, 3, 4]); // "PK", as zip files begin
    await Deno.writeFile(`${directory}/package_${number}-1.${number % 30}-py3-none-any.whl`, wheel);
    constraints += `package-${number}===1.${number % 30}\n`;
    bytes += size;
  }
  await Deno.writeTextFile(`${directory}/upper-constraints.txt`, constraints);
  const sums = await output("bash", ["-euc", PACK, "bash", directory]);
  const [diffId = "", digest = ""] = sums.match(/^[0-9a-f]{64}/gm)?.map((hex) => `sha256:${hex}`) ?? [];
  const path = `${scratch}/tar.gz`;
  const layer = { digest, size: (await Deno.stat(path)).size, ...count(directory) };
  await store(storage, path, layer, diffId);
  await Deno.remove(directory, { recursive: true });
  await Deno.writeTextFile(`${storage}/layer.json`, JSON.stringify(layer));
  return layer;
}

/** Lays the image out as distribution's filesystem driver keeps it: blobs by digest, and links that say who has them. */
async function store(storage: string, path: string, layer: Layer, diffId: string): Promise<void> {
  const root = `${storage}/docker/registry/v2`, repository = `${root}/repositories/${REPOSITORY}`;
  const write = async (directory: string, file: string, text: string) => {
    await Deno.mkdir(directory, { recursive: true });
    await Deno.writeTextFile(`${directory}/${file}`, text);
  };
  const blobDirectory = (digest: string) => `${root}/blobs/sha256/${digest.slice(7, 9)}/${digest.slice(7)}`;
  const writeJson = async (value: unknown) => {
    const text = JSON.stringify(value);
    const digest = `sha256:${createHash("sha256").update(text).digest("hex")}`;
    await write(blobDirectory(digest), "data", text);
    return { size: text.length, digest };
  };
  const docker = "application/vnd.docker";
  const rootfs = { type: "layers", diff_ids: [diffId] };
  const config = await writeJson({ architecture: "amd64", os: "linux", config: {}, rootfs });
  const manifest = await writeJson({
    schemaVersion: 2,
    mediaType: `${docker}.distribution.manifest.v2+json`,
    config: { mediaType: `${docker}.container.image.v1+json`, ...config },
    layers: [{ mediaType: `${docker}.image.rootfs.diff.tar.gzip`, size: layer.size, digest: layer.digest }],
  });
  await Deno.mkdir(blobDirectory(layer.digest), { recursive: true });
  await Deno.rename(path, `${blobDirectory(layer.digest)}/data`);
  const part = (digest: string) => digest.replace(":", "/");
  for (const { digest } of [layer, config]) await write(`${repository}/_layers/${part(digest)}`, "link", digest);
  for (const directory of [`revisions/${part(manifest.digest)}`, "tags/1/current"]) {
    await write(`${repository}/_manifests/${directory}`, "link", manifest.digest);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Scenarios: the registry itself; nginx before it, which holds each connection to a rate; a network namespace on the
//   far end of a slow link, where the clients run.
// ---------------------------------------------------------------------------------------------------------------------

const SCENARIOS: Scenario[] = [
  {
    name: "loopback",
    title: "Loopback",
    open: async (stack, bench) => ({ hostPort: await startRegistry(stack, bench, "127.0.0.1"), wrapper: [] }),
  },
  {
    name: "throttled",
    title: `Each connection held to ${THROTTLE_BYTES_PER_SECOND / 1e6} MB/s`,
    open: async (stack, bench) => ({ hostPort: await startThrottle(stack, bench), wrapper: [] }),
  },
  { name: "delayed", title: `${DELAY_MS} ms of delay (round trip)`, open: openDelayed },
];

async function startRegistry(stack: AsyncDisposableStack, bench: Bench, address: string): Promise<string> {
  const hostPort = `${address}:${freePort(address)}`;
  const config = `${bench.scratch}/registry.yml`;
  await Deno.writeTextFile(
    config,
    `version: 0.1
log: { level: error, accesslog: { disabled: true } }
storage: { cache: { blobdescriptor: inmemory }, filesystem: { rootdirectory: "${bench.storage}" } }
http: { addr: "${hostPort}" }
`,
  );
  await serve(stack, "docker-registry", ["serve", config], hostPort);
  return hostPort;
}

/**
 * nginx's `limit_rate` is a pause after each send, as long as what was sent takes at the rate; what is sent last is
 * free. So the buffers are kept small beside a range (a client must not get 8 MiB in one free send) and big enough for
 * pauses of several milliseconds, the timer's unit. Nothing is kept on disk: it would read ahead of the client.
 * `probe()` shows that the rate is in force for a whole blob and for ranges alike.
 */
async function startThrottle(stack: AsyncDisposableStack, bench: Bench): Promise<string> {
  if (!which("nginx")) throw new Skipped("nginx is missing");
  const registry = await startRegistry(stack, bench, "127.0.0.1");
  const hostPort = `127.0.0.1:${freePort("127.0.0.1")}`;
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((kind) => `${kind}_temp_path ${kind};`);
  await Deno.writeTextFile(
    `${bench.scratch}/nginx.conf`,
    `daemon off; pid nginx.pid; error_log stderr error; worker_processes 1;
events { worker_connections 256; }
http {
  access_log off; ${temporary.join(" ")}
  upstream registry { server ${registry}; keepalive 16; }
  server {
    listen ${hostPort};
    location / {
      proxy_pass http://registry; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_buffering on; proxy_buffers 16 64k; proxy_busy_buffers_size 512k; proxy_max_temp_file_size 0;
      limit_rate ${THROTTLE_BYTES_PER_SECOND};
    }
  }
}
`,
  );
  await serve(stack, "nginx", ["-p", bench.scratch, "-e", "stderr", "-c", "nginx.conf"], hostPort);
  return hostPort;
}

/** Both ends of a veth pair hold packets for half of the delay. The far end is a namespace that the clients run in. */
async function openDelayed(stack: AsyncDisposableStack, bench: Bench): Promise<Site> {
  const missing = ["ip", "tc"].find((program) => !which(program));
  if (missing) throw new Skipped(`${missing} is missing`);
  if (Deno.uid() !== 0) throw new Skipped("network namespaces need root");
  const [name, near, far] = [`fwbench${Deno.pid}`, `fwb${Deno.pid}n`, `fwb${Deno.pid}f`];
  // The default limit of 1000 packets would be a loss at this speed, and that is another scenario.
  const netem = ["root", "netem", "delay", `${DELAY_MS / 2}ms`, "limit", "100000"];
  try {
    await output("ip", ["netns", "add", name]);
    stack.defer(() => output("ip", ["netns", "del", name]).then(() => {}));
    await output("ip", ["link", "add", near, "type", "veth", "peer", "name", far, "netns", name]);
    stack.defer(() => output("ip", ["link", "del", near]).then(() => {}));
    await output("ip", ["addr", "add", `${NEAR}/30`, "dev", near]);
    await output("ip", ["-n", name, "addr", "add", `${FAR}/30`, "dev", far]);
    await output("ip", ["link", "set", near, "up"]);
    await output("ip", ["-n", name, "link", "set", far, "up"]);
    await output("ip", ["-n", name, "link", "set", "lo", "up"]);
    await output("tc", ["qdisc", "add", "dev", near, ...netem]);
    await output("tc", ["-n", name, "qdisc", "add", "dev", far, ...netem]);
  } catch (error) {
    interrupt.signal.throwIfAborted();
    throw new Skipped(`no namespace with a delay here: ${(error as Error).message.replace(/^Error: |\.$/g, "")}`);
  }
  return { hostPort: await startRegistry(stack, bench, NEAR), wrapper: ["ip", "netns", "exec", name] };
}

/** Starts a server, waits until it answers, and has `stack` stop it. */
async function serve(stack: AsyncDisposableStack, program: string, args: string[], hostPort: string): Promise<void> {
  const server = new Deno.Command(program, { args, stdout: "null", stderr: "inherit" }).spawn();
  stack.defer(async () => {
    kill(server.pid, "SIGTERM");
    await server.status;
  });
  for (let attempt = 0; attempt < 100; attempt++) {
    interrupt.signal.throwIfAborted();
    const up = await fetch(`http://${hostPort}/v2/`).then((response) => response.text(), () => undefined);
    if (up !== undefined) return;
    await delay(100);
  }
  throw new Error(`Cannot start "${program}": it does not answer at ${hostPort}`);
}

function freePort(hostname: string): number {
  using listener = Deno.listen({ hostname, port: 0 });
  return listener.addr.port;
}

/** What the network gives to bare curl: shows that the scenario is in force, and that no server is what limits it. */
async function probe(site: Site, bench: Bench): Promise<string> {
  if (!which("curl")) return "No curl, hence no look at the network itself.";
  say("looking at the network");
  const seconds = async (script: string) => (await timed(script, site, bench)).seconds;
  const rate = (bytes: number, time: number) => `${(bytes / 1e6 / time).toFixed(0)} MB/s`;
  const [one, four] = ["-o /dev/null $BLOB ", "curl -fsS -o /dev/null $BLOB -r"];
  const { layer } = bench;
  const quarter = Math.ceil(layer.size / 4);
  const starts = [0, 1, 2, 3].map((index) => index * quarter);
  const range = Math.min(RANGE_BYTES, layer.size);
  await seconds(`curl -fsS ${one}`); // into the page cache
  const whole = await seconds(`curl -fsS ${one}`);
  const ranges = await seconds(`curl -fsS -r 0-${range - 1} ${one.repeat(8)}`);
  const parallel = await seconds(starts.map((at) => `${four} ${at}-${at + quarter - 1} &`).join(" ") + " wait");
  return `Bare curl to /dev/null: one connection ${rate(layer.size, whole)}, one connection in ranges of 4 MiB ` +
    `${rate(8 * range, ranges)}, four connections ${rate(layer.size, parallel)}.`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Report
// ---------------------------------------------------------------------------------------------------------------------

function table(results: Results): string {
  const escape = (text: string) => text.replaceAll("|", "\\|");
  const rows = [
    "| contestant | seconds | times as long as fetch_wheels | CPU seconds | peak MiB: largest process (all) |",
    "| --- | --- | --- | --- | --- |",
  ];
  const own = results.get(FETCH_WHEELS);
  for (const [name, costs] of results) {
    if (!Array.isArray(costs)) {
      rows.push(`| ${escape(name)} | ${escape(costs)} | | | |`);
      continue;
    }
    const column = (field: keyof Cost) => costs.map((cost) => cost[field]);
    const ratios = Array.isArray(own) ? own.map((cost, round) => (costs[round]?.seconds ?? NaN) / cost.seconds) : [];
    const memory = `${Math.max(...column("largestMiB")).toFixed(0)} (${Math.max(...column("togetherMiB")).toFixed(0)})`;
    const times = [spread(column("seconds"), 2), spread(ratios, 2), spread(column("cpuSeconds"), 2)];
    rows.push(`| ${[escape(name), ...times, memory].join(" | ")} |`);
  }
  return rows.join("\n");
}

/** Median (least..greatest). */
function spread(values: number[], digits: number): string {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const middle = ((sorted[(sorted.length - 1) >> 1] ?? NaN) + (sorted[sorted.length >> 1] ?? NaN)) / 2;
  const text = (value = NaN) => value.toFixed(digits);
  return sorted.length === 0 ? "" : `${text(middle)} (${text(sorted[0])}..${text(sorted.at(-1))})`;
}

async function headLines(bench: Bench, contestants: Contestant[]): Promise<string> {
  const cpu = /model name\s*: (.*)/.exec(readOrNothing("/proc/cpuinfo"))?.[1] ?? Deno.build.arch;
  const memory = `${(Deno.systemMemoryInfo().total / 2 ** 30).toFixed(0)} GiB of memory`;
  const fileSystem = (await output("df", ["--output=fstype", bench.scratch])).trim().split("\n").at(-1);
  const programs = [...new Set(["docker-registry", "nginx", ...contestants.flatMap(({ needs }) => needs)])];
  const versions = await Promise.all(programs.filter((one) => one !== "tee").map(version));
  const ms = bench.module ? await startUpTimes(bench) : [];
  return `Machine: ${navigator.hardwareConcurrency} cores (${cpu}), ${memory}, ${fileSystem}, Linux ${Deno.osRelease()}.
Layer: ${(bench.layer.size / 1e6).toFixed(0)} MB, ${bench.layer.files} files, gzip -6.
Versions: deno ${Deno.version.deno}, ${versions.filter(Boolean).join(", ")}.
${ms.length ? `Start-up, \`fetch_wheels.ts --version\`: ${spread(ms, 0)} ms.` : "Start-up: no module to measure."}

Medians with (least..greatest); ratios are taken within each round; memory is the greatest of all rounds.`;
}

async function startUpTimes(bench: Bench): Promise<number[]> {
  const times = [];
  for (let run = 0; run < 10; run++) {
    const start = performance.now();
    await output(Deno.execPath(), ["run", "--allow-net", "--allow-read", "--allow-env", bench.module, "--version"]);
    times.push(performance.now() - start);
  }
  return times;
}

async function version(program: string): Promise<string> {
  if (!which(program)) return "";
  const flag = { nginx: "-v", openssl: "version", crane: "version" }[program] ?? "--version";
  const { stdout, stderr } = await new Deno.Command(program, { args: [flag] }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  return `${program} ${/\d+\.\d[\w.+-]*/.exec(text)?.[0] ?? "of unknown version"}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Programs
// ---------------------------------------------------------------------------------------------------------------------

/** Runs a program to its end and returns its stdout; throws with the first line of its stderr. */
async function output(program: string, args: string[], env: Record<string, string> = {}): Promise<string> {
  const child = new Deno.Command(program, { args, env, stdout: "piped", stderr: "piped" }).spawn();
  using _ = killedOnInterrupt(child.pid); // but what starts after the interrupt, to undo things, is left to run
  const { success, stdout, stderr } = await child.output();
  if (success) return new TextDecoder().decode(stdout);
  throw new Error(new TextDecoder().decode(stderr).trim().split("\n")[0] || `${program} failed`);
}

function which(program: string): string | undefined {
  const directories = Deno.env.get("PATH")?.split(":") ?? [];
  return directories.find((directory) => {
    try {
      return Deno.statSync(`${directory}/${program}`).isFile;
    } catch {
      return false;
    }
  });
}

function kill(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch {
    // It has ended already.
  }
}

/** Progress: to stderr, so that stdout is the report alone. */
function say(step: string): void {
  console.error(`bench: ${step}`);
}

if (import.meta.main) {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    Deno.addSignalListener(signal, () => interrupt.abort());
  }
  try {
    await main();
    Deno.exit(0);
  } catch (error) {
    say(interrupt.signal.aborted ? "interrupted" : (error as Error).message);
    Deno.exit(interrupt.signal.aborted ? 130 : 1);
  }
}
