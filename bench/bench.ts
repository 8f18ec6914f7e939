/**
 * Measures fetch_wheels beside the tools and pipelines that people use instead of it, turn by turn on one machine: a real
 * registry (Debian's `docker-registry`) on loopback, layers of several shapes, a limited and a delayed link, a cache hit,
 * start-up time and peak memory.
 *
 *     deno task bench --scenario wheels --rounds 3
 *
 * It prints Markdown. Every number is compared with its target, but a missed target is not a failure: the exit status
 * says only whether the benchmark itself worked.
 *
 * The layers are made from a seed, and kept below the temporary directory for the next run, as are `oras` and `crane` if
 * they had to be built. Every server runs on this machine and ends with the benchmark.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { statfsSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { blobPath, digestTree, findOrMakeLayer, SMALL_FILES, TEXT, TINY, wheels } from "./layers.ts";
import type { Format, Layer, Shape } from "./layers.ts";

const USAGE = `deno task bench [OPTIONS]
  --scenario NAME   run only this scenario, or those whose names begin with "NAME-"; may be repeated
  --rounds N        turns of each contestant in each scenario (default: 3)
  --module FILE     the fetch_wheels.ts to measure (default: the one in the directory above)
  --output DIR      extract below DIR (default: /dev/shm if it has room, else the temporary directory)
  --large           run growth-3000 too, with a layer of 3 GB
  --scale X         multiply the size of every layer by X, to try the benchmark itself (default: 1)
  --list            print the scenarios and their targets`;

/** Measured where a link is slow, to show what it gives. */
const PROBE_BYTES = 32_000_000;
const SAMPLE_MS = 20;
const TURN_LIMIT_MS = 300_000;

/** Aborted by Ctrl-C. Everything that waits observes it, so that every exit runs the same clean-up. */
const interrupt = new AbortController();

// ---------------------------------------------------------------------------------------------------------------------
// 1 Contestants: shell text, because that is what people type. Each leaves the layer's files in $OUT. oras, crane and
//   curl are given the blob's digest, which saves them the manifest; skopeo and fetch_wheels resolve the tag.
// ---------------------------------------------------------------------------------------------------------------------

interface Contestant {
  title: string;
  /** Programs that the script runs, apart from coreutils. */
  needs: string[];
  script: string;
}

const DENO_RUN = `"$DENO" run --allow-net --allow-read --allow-write --allow-env`;
const FETCH = `--protocol http -q -d "$OUT" "$HOST_PORT/$REPOSITORY:1"`; // the peers know it, too

const OWN = "fetch_wheels";

/** Creates files as deep as fetch_wheels does in its staging directory. */
const CREATOR = `
const [directory, count] = Deno.args;
for (let at = 0; at < Number(count); at++) {
  const parent = \`\${directory}/.staging/new/package\${Math.floor(at / 100)}\`;
  if (at % 100 === 0) Deno.mkdirSync(parent, { recursive: true });
  Deno.openSync(\`\${parent}/file\${at}.py\`, { write: true, createNew: true }).close();
}
`;

const CONTESTANTS: Record<string, Contestant> = {
  [OWN]: { title: "fetch_wheels", needs: [], script: `${DENO_RUN} "$MODULE" ${FETCH}` },
  oras: {
    title: "oras blob fetch | bsdtar xf -",
    needs: ["oras", "bsdtar"],
    script: `oras blob fetch --plain-http -o - "$HOST_PORT/$REPOSITORY@$DIGEST" | bsdtar xf - -C "$OUT"`,
  },
  crane: {
    title: "crane blob | bsdtar xf -",
    needs: ["crane", "bsdtar"],
    script: `crane blob "$HOST_PORT/$REPOSITORY@$DIGEST" | bsdtar xf - -C "$OUT"`,
  },
  curl: {
    // A named pipe instead of `>(…)`: the shell can wait for openssl, check its answer, and include its CPU time.
    title: "curl | tee >(openssl sha256) | bsdtar xf -",
    needs: ["curl", "openssl", "bsdtar"],
    script: `mkfifo "$SCRATCH/copy"; openssl sha256 -r "$SCRATCH/copy" >"$SCRATCH/sum" &
      curl -fsS "$BLOB" | tee "$SCRATCH/copy" | bsdtar xf - -C "$OUT"; wait $!; grep -q "^$SHA256 " "$SCRATCH/sum"`,
  },
  unverified: {
    title: "curl | bsdtar xf - (not verified)",
    needs: ["curl", "bsdtar"],
    script: `curl -fsS "$BLOB" | bsdtar xf - -C "$OUT"`,
  },
  skopeo: {
    title: "skopeo copy, bsdtar xf FILE",
    needs: ["skopeo", "bsdtar"],
    script: `skopeo --insecure-policy --tmpdir "$SCRATCH" copy -q --src-tls-verify=false \\
      "docker://$HOST_PORT/$REPOSITORY:1" "dir:$SCRATCH/image"; bsdtar xf "$SCRATCH/image/$SHA256" -C "$OUT"`,
  },
  loci: {
    title: "LOCI: curl -o FILE, tar xzf FILE (not verified)",
    needs: ["curl", "tar", "gzip"],
    script: `curl -fsS -o "$SCRATCH/layer" "$BLOB"; tar xzf "$SCRATCH/layer" -C "$OUT"`,
  },
  cached: { title: "fetch_wheels --cache", needs: [], script: `${DENO_RUN} "$MODULE" --cache "$CACHE" ${FETCH}` },
  local: {
    title: "openssl sha256 FILE & bsdtar xf FILE",
    needs: ["openssl", "bsdtar"],
    script: `openssl sha256 -r "$FILE" >"$SCRATCH/sum" & bsdtar xf "$FILE" -C "$OUT"
      wait $!; grep -q "^$SHA256 " "$SCRATCH/sum"`,
  },
  version: { title: "fetch_wheels --version", needs: [], script: `${DENO_RUN} "$MODULE" --version` },
  empty: { title: "deno run of an empty module", needs: [], script: `"$DENO" run "$EMPTY"` },
  commander: {
    title: "deno run of a module that only imports commander",
    needs: [],
    script: `"$DENO" run "$COMMANDER"`,
  },
  creator: {
    title: "Deno creating 20,000 empty files",
    needs: [],
    script: `${DENO_RUN} "$CREATOR" "$OUT" ${SMALL_FILES.amount}`,
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// 2 Scenarios and their targets. The first contestant is the one that is measured against the target; its speed is
//   compared, within each round, with that of the fastest of `peers`.
// ---------------------------------------------------------------------------------------------------------------------

interface Scenario {
  name: string;
  title: string;
  /** Without a layer, nothing is extracted. */
  layer?: { shape: Shape; format: Format };
  link?: { delayMs: number; bytesPerSecond: number };
  contestants: string[];
  peers: string[];
  target: Target;
  /** What takes milliseconds is measured so many times in each round. */
  repeats?: number;
  samplesPss?: boolean;
}

interface Target {
  text: string;
  /** One round's number. */
  measure(own: Cost, peerSeconds: number): number;
  format(value: number): string;
  isMet(values: number[]): boolean;
}

function speedAtLeast(bound: number, aim?: number): Target {
  return {
    text: `speed at least ${bound.toFixed(1)}${aim ? `, aim at ${aim.toFixed(1)}` : ""}`,
    measure: (own, peerSeconds) => peerSeconds / own.seconds,
    format: (value) => value.toFixed(2),
    isMet: (values) => median(values) >= bound,
  };
}

function timeAtMost(bound: number): Target {
  return {
    text: `at most ${bound.toFixed(1)} times the peer's time`,
    measure: (own, peerSeconds) => own.seconds / peerSeconds,
    format: (value) => value.toFixed(2),
    isMet: (values) => median(values) <= bound,
  };
}

function millisecondsAtMost(bound: number): Target {
  return {
    text: `at most ${bound} ms`,
    measure: (own) => own.seconds * 1000,
    format: (value) => value.toFixed(0),
    isMet: (values) => median(values) <= bound,
  };
}

/** Shows what another scenario cannot go below. */
const COMPARISON: Target = {
  text: "none",
  measure: (own) => own.seconds * 1000,
  format: (value) => `${value.toFixed(0)} ms`,
  isMet: () => true,
};

const MEMORY_TARGET: Target = {
  text: "never above 180 MiB",
  measure: (own) => own.peakMiB,
  format: (value) => value.toFixed(0),
  isMet: (values) => Math.max(...values) <= 180,
};

const VERIFYING = ["oras", "crane", "curl"];

function scenarios(large: boolean): Scenario[] {
  const gzip = (shape: Shape) => ({ shape, format: "gzip" as const });
  const zstd = (shape: Shape) => ({ shape, format: "zstd" as const });
  const ofGzip = { contestants: [OWN, ...VERIFYING, "skopeo", "loci"], peers: VERIFYING };
  const ofZstd = { contestants: [OWN, ...VERIFYING, "skopeo"], peers: VERIFYING }; // LOCI's `tar xzf` reads only gzip
  const growth = (large ? [100, 400, 1600, 3000] : [100, 400, 1600]).map((mebibytes): Scenario => ({
    name: `growth-${mebibytes}`,
    title: `Memory, ${mebibytes} MiB of wheels, gzip -6`,
    layer: gzip(wheels(mebibytes)),
    contestants: [OWN],
    peers: [],
    target: MEMORY_TARGET,
    samplesPss: true,
  }));
  // deno-fmt-ignore
  return [
    { name: "wheels-gzip", title: "400 MiB of wheels, gzip -6", layer: gzip(wheels(400)), ...ofGzip,
      target: speedAtLeast(1, 1.2) },
    { name: "wheels-zstd", title: "400 MiB of wheels, zstd -3", layer: zstd(wheels(400)), ...ofZstd,
      target: speedAtLeast(1, 1.2) },
    { name: "text-gzip", title: "180 MiB of text, gzip -6", layer: gzip(TEXT), ...ofGzip, target: speedAtLeast(1.1) },
    { name: "text-zstd", title: "180 MiB of text, zstd -3", layer: zstd(TEXT), ...ofZstd, target: speedAtLeast(0.6) },
    { name: "small-files", title: "20,000 small files, gzip -6", layer: gzip(SMALL_FILES), ...ofGzip,
      target: speedAtLeast(0.7, 1) },
    { name: "creation", title: "What opening the files takes Deno, with the same permissions", contestants: ["creator"],
      peers: [], target: COMPARISON },
    { name: "limited", title: "400 MiB of wheels, each connection limited to 40 MB/s", layer: gzip(wheels(400)),
      link: { delayMs: 0, bytesPerSecond: 40e6 }, contestants: [OWN, "unverified"], peers: ["unverified"],
      target: speedAtLeast(3.5) },
    { name: "delayed", title: "400 MiB of wheels, round-trip time of 50 ms", layer: gzip(wheels(400)),
      link: { delayMs: 25, bytesPerSecond: 0 }, contestants: [OWN, ...VERIFYING], peers: ["curl"],
      target: speedAtLeast(1) },
    { name: "tiny", title: "Layer of 100 kB", layer: gzip(TINY), contestants: [OWN, ...VERIFYING], peers: VERIFYING,
      target: millisecondsAtMost(150), repeats: 5 },
    { name: "version", title: "--version", contestants: ["version", "commander", "empty"], peers: [],
      target: millisecondsAtMost(70), repeats: 5 },
    { name: "cached", title: "Cache hit, 400 MiB of wheels, gzip -6", layer: gzip(wheels(400)),
      contestants: ["cached", "local"], peers: ["local"], target: timeAtMost(1.1) },
    ...growth,
  ];
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 The run. In each round every contestant runs once, in an order that rotates, so that a machine that becomes slower
//   affects all alike; ratios are taken within a round. One turn before the first round warms the caches: the page cache,
//   V8's code cache, and the one of `fetch_wheels --cache`.
// ---------------------------------------------------------------------------------------------------------------------

interface Options {
  scenarios: Scenario[];
  rounds: number;
  scale: number;
  module: string;
  output?: string;
}

interface Bench {
  options: Options;
  /** The registry's, kept for the next run. */
  storage: string;
  /** On the same disk; removed at the end. */
  scratch: string;
  workspace: Workspace;
  denoDir: string;
  /** Programs, and why they are not there. */
  missing: Map<string, string>;
  registry: string;
}

/** A contestant's runs, in the order of the rounds, or why there are none. */
type Results = Map<string, Cost[] | string>;

interface Verdict {
  title: string;
  target: Target;
  /** One a round. */
  values: number[];
  /** The peers that could not run. */
  absent: string[];
}

async function main(): Promise<void> {
  const options = await readOptions(Deno.args);
  if (options === undefined) return;
  Deno.env.set("NO_PROXY", "127.0.0.1");
  Deno.env.set("no_proxy", "127.0.0.1");
  await using stack = new AsyncDisposableStack();
  const bench = await openBench(stack, options);
  console.log(await headLines(bench));
  const verdicts: Verdict[] = [];
  const peaks: number[] = [];
  for (const scenario of options.scenarios) {
    console.log(`\n### ${scenario.name}: ${scenario.title}\n`);
    try {
      const results = await runScenario(scenario, bench);
      const verdict = judge(scenario, results);
      console.log(`${table(scenario, results)}\n\nTarget: ${scenario.target.text}: ${outcome(verdict)}.`);
      verdicts.push(verdict);
      const own = results.get(OWN);
      if (Array.isArray(own)) peaks.push(...own.map(({ peakMiB }) => peakMiB));
    } catch (error) {
      interrupt.signal.throwIfAborted();
      console.log(`Not measured: ${(error as Error).message}.`); // for lack of a program that makes the layer, say
      verdicts.push({ title: scenario.title, target: scenario.target, values: [], absent: [] });
    }
  }
  if (peaks.length > 0) {
    verdicts.push({ title: "Memory, all layers above", target: MEMORY_TARGET, values: peaks, absent: [] });
  }
  console.log(`\n### Targets\n\n${targetTable(verdicts)}`);
}

/** `undefined` if there is nothing to run. */
async function readOptions(args: string[]): Promise<Options | undefined> {
  const { values } = parseArgs({
    args,
    options: {
      scenario: { type: "string", multiple: true },
      rounds: { type: "string", default: "3" },
      module: { type: "string", default: fileURLToPath(new URL("../fetch_wheels.ts", import.meta.url)) },
      output: { type: "string" },
      large: { type: "boolean", default: false },
      scale: { type: "string", default: "1" },
      list: { type: "boolean" },
      help: { type: "boolean", short: "h" },
    },
  });
  const known = scenarios(values.large);
  if (values.help) {
    console.log(USAGE);
    return undefined;
  }
  if (values.list) {
    for (const { name, title, target } of known) console.log(`${name.padEnd(13)}${title}: ${target.text}`);
    return undefined;
  }
  const names = values.scenario ?? [];
  const selects = (wanted: string, { name }: Scenario) => name === wanted || name.startsWith(`${wanted}-`);
  const unknown = names.find((wanted) => !known.some((scenario) => selects(wanted, scenario)));
  if (unknown !== undefined) throw new Error(`Cannot run scenario "${unknown}": not in --list`);
  const [rounds, scale] = [Number(values.rounds), Number(values.scale)];
  if (!(Number.isInteger(rounds) && rounds > 0)) throw new Error("--rounds must be 1 or more");
  if (!(scale > 0)) throw new Error("--scale must be greater than 0");
  return {
    scenarios: known.filter((scenario) => names.length === 0 || names.some((wanted) => selects(wanted, scenario))),
    rounds,
    scale,
    module: await Deno.realPath(values.module),
    output: values.output && await Deno.realPath(values.output),
  };
}

async function openBench(stack: AsyncDisposableStack, options: Options): Promise<Bench> {
  const cache = `${tmpdir()}/fetch_wheels-bench-${Deno.uid()}`;
  await Deno.mkdir(`${cache}/bin`, { recursive: true, mode: 0o700 });
  // The name is predictable and programs are run from there, so that the directory must not be another user's.
  if ((await Deno.lstat(cache)).uid !== Deno.uid()) throw new Error(`Cannot use "${cache}": it has another owner`);
  Deno.env.set("PATH", `${Deno.env.get("PATH")}:/usr/sbin:/sbin:${cache}/bin`);
  const makeTempDir = async (parent: string) => {
    const path = await Deno.makeTempDir({ dir: parent, prefix: "fetch_wheels-bench-" });
    stack.defer(() => Deno.remove(path, { recursive: true }));
    return path;
  };
  const scratch = await makeTempDir(cache);
  const workspace = await openWorkspace(options, scratch, makeTempDir);
  await Deno.writeTextFile(`${scratch}/empty.ts`, "");
  await Deno.writeTextFile(`${scratch}/commander.ts`, 'import "npm:commander@^15.1.0";\n');
  await Deno.writeTextFile(`${scratch}/creator.ts`, CREATOR);
  // Deno's caches are its own: processes that open them at the same time can break them, and each start is slow then.
  const denoDir = `${cache}/deno`;
  for (let run = 0; run < 2; run++) {
    await output(Deno.execPath(), ["run", "-A", options.module, "--version"], { DENO_DIR: denoDir });
  }
  const missing = await installPrograms(options, `${cache}/bin`);
  const storage = `${cache}/registry`;
  const registry = await startRegistry(stack, { storage, scratch });
  return { options, storage, scratch, workspace, denoDir, missing, registry };
}

/** Where the contestants write. */
interface Workspace {
  path: string;
  /** The same directory as the contestants see it. */
  inside: string;
  /** What runs a contestant. */
  wrapper: string[];
}

/**
 * In memory if there is room. Deno grants access to /dev only with --allow-all, but fetch_wheels is to run with the
 * permissions that its users give it: a mount namespace shows the contestants the directory in another place.
 */
async function openWorkspace(options: Options, scratch: string, makeTempDir: (parent: string) => Promise<string>) {
  if (options.output === undefined && hasRoom("/dev/shm", options)) {
    const [path, inside] = [await makeTempDir("/dev/shm"), `${scratch}/memory`];
    await Deno.mkdir(inside);
    const asRoot = Deno.uid() === 0 ? [] : ["--map-root-user"];
    const bind = `mount --bind "$0" "$1"; shift; exec "$@"`;
    const wrapper = ["unshare", "--mount", ...asRoot, "bash", "-euc", bind, path, inside];
    try {
      await output("unshare", [...wrapper.slice(1), "true"]);
      return { path, inside, wrapper };
    } catch (error) {
      interrupt.signal.throwIfAborted();
      say(`writing to disk, because memory cannot be used: ${(error as Error).message}`);
    }
  }
  const path = await makeTempDir(options.output ?? tmpdir());
  return { path, inside: path, wrapper: [] };
}

/** For the largest layer three times: the copy that LOCI and skopeo keep, the files, and the blob cache. */
function hasRoom(directory: string, options: Options): boolean {
  const amounts = options.scenarios.map(({ layer }) => (layer?.shape.amount ?? 0) * options.scale);
  try {
    const { bavail, bsize } = statfsSync(directory);
    return bavail * bsize > 3 * Math.max(...amounts);
  } catch {
    return false; // the directory does not exist
  }
}

const GO_PACKAGES: Record<string, string> = {
  oras: "oras.land/oras/cmd/oras@v1.3.6",
  crane: "github.com/google/go-containerregistry/cmd/crane@latest",
};

/** Builds what is missing and can be built. Returns the programs that are still missing, with the reason. */
async function installPrograms(options: Options, directory: string): Promise<Map<string, string>> {
  const missing = new Map<string, string>();
  for (const program of new Set(options.scenarios.flatMap(programsOf))) {
    if (which(program)) continue;
    const source = GO_PACKAGES[program];
    if (source === undefined || !which("go")) {
      missing.set(program, source === undefined ? "not installed" : "not installed, and no go to build it with");
      continue;
    }
    say(`go install ${source}`);
    try {
      await output("go", ["install", source], { GOBIN: directory });
    } catch (error) {
      interrupt.signal.throwIfAborted();
      missing.set(program, `cannot be built: ${(error as Error).message}`);
    }
  }
  return missing;
}

function programsOf({ contestants }: Scenario): string[] {
  return contestants.flatMap((name) => CONTESTANTS[name]!.needs);
}

async function runScenario(scenario: Scenario, bench: Bench): Promise<Results> {
  const { contestants, repeats = 1 } = scenario;
  await using stack = new AsyncDisposableStack();
  const layer = scenario.layer && await findOrMakeLayer({
    ...scenario.layer,
    scale: bench.options.scale,
    storage: bench.storage,
    signal: interrupt.signal,
  });
  const hostPort = scenario.link ? await startRelay(stack, scenario.link, bench.registry) : bench.registry;
  const place: Place = { bench, layer, hostPort, samplesPss: scenario.samplesPss ?? false };
  if (scenario.link) console.log(await probe(place) + "\n");
  const results: Results = new Map();
  for (const name of contestants) {
    const missing = CONTESTANTS[name]!.needs.find((program) => bench.missing.has(program));
    results.set(name, missing ? `${missing}: ${bench.missing.get(missing)}` : []);
  }
  const turns = bench.options.rounds * repeats;
  for (let round = -1; round < turns; round++) {
    const first = Math.max(round, 0) % contestants.length;
    const order = round < 0 ? contestants.slice(0, 1) : [...contestants.slice(first), ...contestants.slice(0, first)];
    for (const name of order) {
      const costs = results.get(name);
      if (!Array.isArray(costs)) continue; // missing, or failed in an earlier round
      say(`${scenario.name}: ${round < 0 ? "warming up" : `turn ${round + 1} of ${turns}`}: ${name}`);
      try {
        const cost = await takeTurn(CONTESTANTS[name]!.script, place);
        if (round >= 0) costs.push(cost);
      } catch (error) {
        interrupt.signal.throwIfAborted();
        results.set(name, `failed: ${(error as Error).message}`);
      }
    }
  }
  return results;
}

/** Where a script runs, and what it fetches. */
interface Place {
  bench: Bench;
  layer?: Layer;
  hostPort: string;
  samplesPss: boolean;
}

/** Runs a script with an empty $OUT, and compares what it extracted with what the layer holds. */
async function takeTurn(script: string, place: Place): Promise<Cost> {
  const directory = `${place.bench.workspace.path}/turn`;
  try {
    await Deno.mkdir(`${directory}/out`, { recursive: true });
    await output("sync", []); // so that nobody pays for what the one before left to write
    const cost = await measure(script, place);
    if (place.layer) {
      const { tree, files } = digestTree(`${directory}/out`);
      if (tree !== place.layer.tree) {
        throw new Error(`extracted ${files} files that are not the layer's ${place.layer.files} files`);
      }
    }
    return cost;
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 Measuring. Wall and CPU time are the shell's own: `time` adds up all processes it waited for, to the millisecond.
//   Memory is read from /proc while they run: VmRSS of all processes at one moment, and VmHWM, the kernel's own maximum,
//   which loses only what a process grows by after the last look. (The maximum that wait4 reports is useless: until a
//   child has called exec, it includes the parent's memory.) The shell that measures is not included.
// ---------------------------------------------------------------------------------------------------------------------

/** One measured run. */
interface Cost {
  seconds: number;
  cpuSeconds: number;
  /** Of all processes together: the greatest sum of VmRSS, or the greatest VmHWM if that is greater. */
  peakMiB: number;
  /** VmHWM of the process that used most. */
  largestMiB: number;
  /** The greatest sum of PSS, or 0 if it was not sampled: to read it stops the process for a moment. */
  pssMiB: number;
}

const TIMED = `set -euo pipefail; TIMEFORMAT='%R %U %S'; exec 3>&2; { time eval "$SCRIPT" >/dev/null 2>&3; } 2>&1`;

async function measure(script: string, place: Place): Promise<Cost> {
  interrupt.signal.throwIfAborted();
  const [program = "", ...args] = [...place.bench.workspace.wrapper, "bash", "-c", TIMED];
  const child = new Deno.Command(program, {
    args,
    env: { ...variables(place), SCRIPT: script },
    clearEnv: true, // no proxy, no credentials, no options from the caller's environment
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  using _ = killedOnAbort(child.pid, AbortSignal.any([interrupt.signal, AbortSignal.timeout(TURN_LIMIT_MS)]));
  let isRunning = true;
  const ended = child.output().finally(() => isRunning = false);
  let [peakMiB, largestMiB, pssMiB] = [0, 0, 0];
  while (isRunning) {
    const tree = processTree(child.pid).slice(1);
    const status = tree.map((pid) => readOrNothing(`/proc/${pid}/status`));
    const rollups = place.samplesPss ? tree.map((pid) => readOrNothing(`/proc/${pid}/smaps_rollup`)) : [];
    largestMiB = Math.max(largestMiB, ...status.map((text) => mebibytesOf("VmHWM", text)));
    peakMiB = Math.max(peakMiB, largestMiB, sum(status.map((text) => mebibytesOf("VmRSS", text))));
    pssMiB = Math.max(pssMiB, sum(rollups.map((text) => mebibytesOf("Pss", text))));
    await delay(SAMPLE_MS);
  }
  const { success, code, stdout, stderr } = await ended;
  interrupt.signal.throwIfAborted();
  const [seconds, user, system] = new TextDecoder().decode(stdout).trim().split(" ").map(Number);
  if (!success || seconds === undefined || user === undefined || system === undefined) {
    throw new Error(new TextDecoder().decode(stderr).trim().split("\n")[0] || `exit status ${code}`);
  }
  return { seconds, cpuSeconds: user + system, peakMiB, largestMiB, pssMiB };
}

/** What the scripts know of their surroundings. */
function variables({ bench, layer, hostPort }: Place): Record<string, string> {
  const repository = layer?.repository ?? "";
  const digest = layer?.digest ?? "";
  return {
    PATH: Deno.env.get("PATH") ?? "",
    HOME: bench.scratch,
    DENO_DIR: bench.denoDir,
    DENO_NO_UPDATE_CHECK: "1",
    DENO: Deno.execPath(),
    MODULE: bench.options.module,
    EMPTY: `${bench.scratch}/empty.ts`,
    COMMANDER: `${bench.scratch}/commander.ts`,
    CREATOR: `${bench.scratch}/creator.ts`,
    OUT: `${bench.workspace.inside}/turn/out`,
    SCRATCH: `${bench.workspace.inside}/turn`,
    CACHE: `${bench.workspace.inside}/cache`,
    HOST_PORT: hostPort,
    REPOSITORY: repository,
    DIGEST: digest,
    SHA256: digest.slice("sha256:".length),
    BLOB: `http://${hostPort}/v2/${repository}/blobs/${digest}`,
    FILE: blobPath(bench.storage, digest),
  };
}

/** A process and its descendants. Only the main thread's children are followed: shells and tar have no other thread. */
function processTree(pid: number): number[] {
  const children = readOrNothing(`/proc/${pid}/task/${pid}/children`).split(" ").filter(Boolean).map(Number);
  return [pid, ...children.flatMap(processTree)];
}

/** A field of a file in /proc, which says kB and means KiB. */
function mebibytesOf(field: string, text: string): number {
  return Number(new RegExp(`^${field}:\\s+(\\d+)`, "m").exec(text)?.[1] ?? 0) / 1024;
}

function sum(values: number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

function readOrNothing(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return ""; // no such file, or the process has ended meanwhile
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Servers: the registry, and before it a relay (relay.ts) that stands for a slow link.
// ---------------------------------------------------------------------------------------------------------------------

async function startRegistry(
  stack: AsyncDisposableStack,
  { storage, scratch }: { storage: string; scratch: string },
): Promise<string> {
  if (!which("docker-registry")) throw new Error("Cannot start docker-registry: it is not installed");
  const hostPort = `127.0.0.1:${freePort()}`;
  const config = `${scratch}/registry.yml`;
  await Deno.writeTextFile(
    config,
    `version: 0.1
log: { level: error, accesslog: { disabled: true } }
storage: { cache: { blobdescriptor: inmemory }, filesystem: { rootdirectory: "${storage}" } }
http: { addr: "${hostPort}" }
`,
  );
  const command = new Deno.Command("docker-registry", { args: ["serve", config], stdout: "null", stderr: "inherit" });
  stopLater(stack, command.spawn());
  for (let attempt = 0; attempt < 100; attempt++) {
    interrupt.signal.throwIfAborted();
    const answer = await fetch(`http://${hostPort}/v2/`).then((response) => response.text(), () => undefined);
    if (answer !== undefined) return hostPort;
    await delay(100);
  }
  throw new Error(`Cannot start docker-registry: it does not answer at ${hostPort}`);
}

async function startRelay(
  stack: AsyncDisposableStack,
  { delayMs, bytesPerSecond }: NonNullable<Scenario["link"]>,
  registry: string,
): Promise<string> {
  const relay = fileURLToPath(new URL("relay.ts", import.meta.url));
  const args = ["run", "--allow-net=127.0.0.1", relay, registry.split(":")[1]!, `${delayMs}`, `${bytesPerSecond}`];
  const child = new Deno.Command(Deno.execPath(), { args, stdout: "piped" }).spawn();
  stopLater(stack, child);
  const reader = child.stdout.getReader();
  const { value } = await reader.read(); // one line: its port
  await reader.cancel();
  interrupt.signal.throwIfAborted();
  return `127.0.0.1:${new TextDecoder().decode(value).trim()}`;
}

function stopLater(stack: AsyncDisposableStack, child: Deno.ChildProcess): void {
  stack.defer(async () => {
    kill(child.pid, "SIGTERM");
    await child.status;
  });
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** What a link gives to bare curl: shows that its limits are in force, and that the relay is not a limit of its own. */
async function probe(place: Place): Promise<string> {
  if (!which("curl")) return "Not probed: curl is missing.";
  const get = `curl -fsS -o /dev/null -r 0-${PROBE_BYTES - 1} "$BLOB"`;
  const url = `http://${place.hostPort}/v2/`;
  const first = Number(await output("curl", ["-fsS", "-o", "/dev/null", "-w", "%{time_starttransfer}", url]));
  const rate = async (connections: number) => {
    const { seconds } = await measure(`for _ in $(seq ${connections}); do ${get} & done; wait`, place);
    const bytes = connections * Math.min(PROBE_BYTES, place.layer?.size ?? 0);
    return `${(bytes / 1e6 / (seconds - first)).toFixed(0)} MB/s`;
  };
  const [one, four] = [await rate(1), await rate(4)];
  return `The link is a relay in user space (bench/relay.ts). It gives bare curl the first byte after ` +
    `${(first * 1000).toFixed(0)} ms, then ${one} on one connection and ${four} on four.`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Report
// ---------------------------------------------------------------------------------------------------------------------

function table({ peers }: Scenario, results: Results): string {
  const lines = [
    row("contestant", "seconds", "speed", "CPU seconds", "peak MiB: all processes (largest)"),
    "|---|---|---|---|---|",
  ];
  for (const [name, costs] of results) {
    const { title } = CONTESTANTS[name]!;
    if (!Array.isArray(costs)) {
      lines.push(row(title, costs, "", "", ""));
      continue;
    }
    const speeds = costs.map(({ seconds }, round) => fastest(peers, results, round) / seconds);
    const greatest = (field: keyof Cost) => Math.max(...costs.map((cost) => cost[field])).toFixed(0);
    const isSeen = greatest("peakMiB") !== "0"; // else every run was shorter than the time between two samples
    const pss = greatest("pssMiB") === "0" ? "" : `, PSS ${greatest("pssMiB")}`;
    lines.push(row(
      title,
      spread(costs.map(({ seconds }) => seconds), (value) => value.toFixed(3)),
      spread(speeds, (value) => value.toFixed(2)),
      spread(costs.map(({ cpuSeconds }) => cpuSeconds), (value) => value.toFixed(2)),
      isSeen ? `${greatest("peakMiB")} (${greatest("largestMiB")}${pss})` : "",
    ));
  }
  return lines.join("\n");
}

function row(...cells: string[]): string {
  return `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
}

/** The seconds of the fastest peer in one round; NaN if no peer ran. */
function fastest(peers: string[], results: Results, round: number): number {
  const seconds = peers.flatMap((name) => {
    const costs = results.get(name);
    return Array.isArray(costs) ? costs[round]?.seconds ?? [] : [];
  });
  return seconds.length > 0 ? Math.min(...seconds) : NaN;
}

function judge({ title, contestants, peers, target }: Scenario, results: Results): Verdict {
  const own = results.get(contestants[0]!);
  const values = Array.isArray(own)
    ? own.map((cost, round) => target.measure(cost, fastest(peers, results, round))).filter(Number.isFinite)
    : [];
  return { title, target, values, absent: peers.filter((name) => !Array.isArray(results.get(name))) };
}

function outcome({ target, values, absent }: Verdict): string {
  if (values.length === 0) return "not measured";
  return (target.isMet(values) ? "met" : "missed") + (absent.length > 0 ? ` (without ${absent.join(", ")})` : "");
}

function targetTable(verdicts: Verdict[]): string {
  const lines = verdicts.map((verdict) =>
    row(verdict.title, verdict.target.text, spread(verdict.values, verdict.target.format), outcome(verdict))
  );
  return [row("scenario", "target", "measured", "result"), "|---|---|---|---|", ...lines].join("\n");
}

/** Median (least..greatest). */
function spread(values: number[], format: (value: number) => string): string {
  const finite = values.filter(Number.isFinite);
  if (finite.length === 0) return "";
  return `${format(median(finite))} (${format(Math.min(...finite))}..${format(Math.max(...finite))})`;
}

function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1]! + sorted[sorted.length >> 1]!) / 2;
}

async function headLines({ options, workspace, scratch }: Bench): Promise<string> {
  const cpu = /model name\s*: (.*)/.exec(readOrNothing("/proc/cpuinfo"))?.[1] ?? Deno.build.arch;
  const memory = `${(Deno.systemMemoryInfo().total / 2 ** 30).toFixed(0)} GiB of memory`;
  const fileSystem = async (path: string) => (await output("df", ["--output=fstype", path])).trim().split("\n").at(-1);
  const programs = new Set(["docker-registry", ...options.scenarios.flatMap(programsOf)]);
  const versions = await Promise.all([...programs].map(version));
  const module = createHash("sha256").update(Deno.readFileSync(options.module)).digest("hex").slice(0, 12);
  return `Date: ${new Date().toISOString().slice(0, 16)}Z, load average at the start ${Deno.loadavg()[0]!.toFixed(2)}.
Machine: ${navigator.hardwareConcurrency} cores (${cpu}), ${memory}, Linux ${Deno.osRelease()}.
Output to ${await fileSystem(workspace.path)}, registry on ${await fileSystem(scratch)} (in the page cache).
Versions: deno ${Deno.version.deno}, ${versions.join(", ")}; fetch_wheels.ts sha256 ${module}….
Rounds: ${options.rounds}.${options.scale === 1 ? "" : ` Not comparable: layers are scaled by ${options.scale}.`}

Medians with (least..greatest). Speed is the time of the fastest peer in the same round, divided by the contestant's.
Memory is the greatest of all rounds.`;
}

async function version(program: string): Promise<string> {
  if (!which(program)) return `${program} missing`;
  const flag = ["openssl", "crane", "oras"].includes(program) ? "version" : "--version";
  const text = await output(program, [flag]);
  const number = /\d+\.\d[\w.+-]*/.exec(text)?.[0] ?? "of unknown version";
  const zstd = text.includes("libzstd") ? " with libzstd" : " without libzstd";
  return `${program} ${number}${program === "bsdtar" ? zstd : ""}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Programs
// ---------------------------------------------------------------------------------------------------------------------

/** Runs a program to its end and returns its stdout; throws with the first line of its stderr. */
async function output(program: string, args: string[], env: Record<string, string> = {}): Promise<string> {
  const child = new Deno.Command(program, { args, env, stdout: "piped", stderr: "piped" }).spawn();
  using _ = killedOnAbort(child.pid, interrupt.signal);
  const { success, stdout, stderr } = await child.output();
  if (success) return new TextDecoder().decode(stdout);
  throw new Error(new TextDecoder().decode(stderr).trim().split("\n")[0] || `${program} failed`);
}

function killedOnAbort(pid: number, signal: AbortSignal): Disposable {
  const killAll = () => processTree(pid).forEach((one) => kill(one, "SIGKILL"));
  signal.addEventListener("abort", killAll);
  return { [Symbol.dispose]: () => signal.removeEventListener("abort", killAll) };
}

function kill(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch {
    // It has ended already.
  }
}

function which(program: string): boolean {
  return (Deno.env.get("PATH") ?? "").split(":").some((directory) => isFile(`${directory}/${program}`));
}

function isFile(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isFile() ?? false;
}

/** Progress: to stderr, so that stdout is the report alone. */
function say(step: string): void {
  console.error(`bench: ${step}`);
}

if (import.meta.main) {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
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
