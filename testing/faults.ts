/**
 * Runs downloads with random faults in every answer, and checks that they succeed, or fail as they should and leave
 * nothing behind.
 *
 * @module
 */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { fetchWheels, FetchWheelsError, type FetchWheelsOptions } from "../fetch_wheels.ts";
import { Random } from "./fuzz.ts";
import { type Bytes, file, gzip, makeSchema1, sha256, tarOf } from "./images.ts";
import { simulateLink } from "./network.ts";
import { type Fault, type RegistryOptions, type RequestContext, serveLayer, startRegistry } from "./registry.ts";
import { Scratch, snapshot } from "./scratch.ts";

/** Random bytes, in which no range equals another. They are not an archive. */
export const NOISE: Bytes = new Uint8Array(randomBytes(200_000));

/** An archive that holds one wheel of noise. */
export interface Layer {
  bytes: Bytes;
  digest: string;
  /** Digest of the wheel. */
  wheel: string;
}

const LARGE_SIZE = (40 << 20) + 4321;
let large: Layer | undefined;

/** Returns an archive of several ranges; made once. */
export function largeLayer(): Layer {
  large ??= makeLayer(randomBytes(LARGE_SIZE));
  return large;
}

function makeLayer(wheel: Uint8Array, compress = (bytes: Bytes) => bytes): Layer {
  const bytes = compress(tarOf(file("big.whl", wheel)));
  return { bytes, digest: sha256(bytes), wheel: sha256(wheel) };
}

/** Number of downloads at the same time. */
const PARALLEL_RUNS = 12;

/** Runs so many downloads; the same seed gives the same faults. Returns a line for each one that went wrong. */
export async function runPlans({ seed, runs }: { seed: number; runs: number }): Promise<string[]> {
  const small = [makeLayer(NOISE), makeLayer(NOISE, gzip)] as const;
  const failures: string[] = [];
  let next = 0;
  const work = async () => {
    while (next < runs) {
      const at = next++;
      const isLarge = at % 15 === 0;
      const layer = isLarge ? largeLayer() : small[at % 2 === 0 ? 0 : 1];
      const plan = drawPlan(new Random(seed + at), { isLarge, size: isLarge ? layer.bytes.length : NOISE.length });
      const ending = await runPlan(plan, layer).catch((error) => `wrong: ${error.stack}`);
      if (!plan.ending.split("|").includes(ending.split(":")[0] ?? "")) {
        failures.push(`${at}: ${ending} ${JSON.stringify(plan)}`);
      }
    }
  };
  await Promise.all(Array.from({ length: PARALLEL_RUNS }, work));
  return failures;
}

/** Where faults occur: the places that answer with the manifest, a token, the blob or a redirect to it. */
type Place = "manifests" | "token" | "blobs" | "storage";

/** Faults of a place's first requests, and of all further ones. */
type Faults = Partial<Record<Place, { first: Fault[][]; then: Fault[] }>>;

/** One download: what serves it, which faults occur, and how it must end (`right`, `cancelled`, or kinds of a failure). */
interface Plan {
  isLarge: boolean;
  isSchema1: boolean;
  auth: "none" | "bearer";
  storage: false | { signed: boolean; uses?: number };
  exists: boolean;
  /** Bytes per second of each connection. */
  rate: number;
  connections: number;
  faults: Faults;
  mirror?: Faults;
  cache?: "empty" | "entry" | "wrong entry" | "part" | "wrong part";
  /** Number of bytes after which the download is cancelled. */
  cancelAt?: number;
  ending: string;
}

/** Runs a planned download, and checks DEST and the cache. Returns `right`, `cancelled`, or the failure. */
async function runPlan(plan: Plan, layer: Layer): Promise<string> {
  const { isSchema1, isLarge, auth, storage, exists, faults, mirror, cache, connections, rate, cancelAt } = plan;
  using scratch = new Scratch();
  using kept = new Scratch();
  const schema1 = makeSchema1({ layers: [layer.bytes], name: "ns/wheels", tag: "1.0", architecture: "amd64" });
  const serveFaulty = (options: RegistryOptions, faults: Faults) => {
    const registry = startRegistry(options);
    if (isSchema1) registry.pushImage("ns/wheels", "1.0", schema1);
    else serveLayer(registry, layer.bytes, { digest: layer.digest });
    registry.faults = (context) => {
      const { first, then } = faults[placeOf(context)] ?? { first: [], then: [] };
      return first[context.count - 1] ?? then;
    };
    return registry;
  };
  await using registry = serveFaulty({ auth, storage }, faults);
  await using second = serveFaulty({}, mirror ?? {});
  const dest = scratch.at("dest");
  if (exists) scratch.at("dest/old.whl", "old");
  const before = snapshot(scratch.path);
  const entry = `blobs/${layer.digest.replace(":", "/")}`;
  const broken = layer.bytes.slice(0, isLarge ? 9 << 20 : 70_000);
  if (cache?.startsWith("wrong")) broken[broken.length >> 1] = (broken[broken.length >> 1] ?? 0) ^ 1;
  if (cache !== undefined && cache !== "empty") {
    kept.at(cache.endsWith("part") ? `${entry}.part` : entry, cache === "entry" ? layer.bytes : broken);
  }
  const controller = new AbortController();
  const { now, fetch } = simulateLink({ perConnection: rate });
  const options: FetchWheelsOptions = {
    dest,
    connections,
    protocol: "http",
    retries: 9,
    timeout: isLarge ? 0.5 : 0.15,
    now,
    fetch,
    delay: () => Promise.resolve(),
    mirrors: mirror && [second.url],
    cache: cache && kept.path,
    signal: controller.signal,
    onProgress(event) {
      if (event.type === "bytes" && event.received >= (cancelAt ?? Infinity)) controller.abort("cancelled");
    },
  };
  const ending = await fetchWheels(`${registry.host}/ns/wheels:1.0`, options).then(() => "right", (error) => {
    if (error === "cancelled") return error;
    assert(error instanceof FetchWheelsError, `not a FetchWheelsError: ${error?.stack ?? error}`);
    return `${error.kind}: ${error.message}`;
  });
  const after = snapshot(scratch.path);
  const expected = {
    "dest": "directory 755",
    "dest/big.whl": `file 644 ${layer.wheel}`,
  };
  assert.deepEqual(after, ending === "right" ? { ...before, ...expected } : before);
  if (cache && ending === "right") assert.equal(sha256(Deno.readFileSync(kept.at(entry))), layer.digest);
  return ending;
}

/** Returns the place that a request goes to. */
function placeOf({ origin, path }: RequestContext): Place {
  if (origin !== "registry") return origin;
  return path.includes("/blobs/") ? "blobs" : "manifests";
}

/** Draws a download of `size` bytes; a large one may use several connections. */
function drawPlan(random: Random, { isLarge, size }: { isLarge: boolean; size: number }): Plan {
  const isSchema1 = !isLarge && random.below(5) === 0;
  const auth = random.pick(["none", "bearer"] as const);
  const storage = random.pick([false, false, { signed: false }, { signed: true }, { signed: true, uses: 2 }] as const);
  const shared = {
    isLarge,
    isSchema1,
    auth,
    storage,
    exists: random.below(2) === 0,
    rate: random.pick([4e6, 20e6, 400e6]),
    connections: random.pick([1, 2, 4, 16]),
  };
  const at = () => random.below(isLarge ? 6 << 20 : size);
  const refusals = ["1", "880\xb5s", "Thu, 01 Jan 1970 00:00:00 GMT"];
  const status = (code: number): Fault => ({ kind: "status", code, headers: { "retry-after": random.pick(refusals) } });
  const anywhere = (): Fault =>
    random.below(3) === 0 ? { kind: "reset" } : status(random.pick([408, 429, 500, 502, 503, 504]));
  const early: (() => Fault)[] = [
    anywhere,
    () => ({ kind: "dieAt", byte: random.below(40) }),
    () => ({ kind: "stall", byte: 9 }),
  ];
  const inBlob: (() => Fault)[] = [
    anywhere,
    () => ({ kind: "dieAt", byte: at() }),
    () => ({ kind: "dieAt", byte: at() }),
    () => ({ kind: "stall", byte: at() }),
    () => ({ kind: "trickle", bytesPerSecond: isLarge ? 200 << 20 : 2 << 20 }),
    () => ({ kind: "wrongRange", shift: random.pick([-1, 1, 99]) }),
    () => ({ kind: "wrongRange", shift: 0, total: at() }),
    () => ({ kind: "ignoreRange" }),
    () => ({ kind: "status", code: random.pick([400, 416]) }),
    // Without a size, an answer that ends well is whole; and a length that comes twice is what the registry has.
    ...(isSchema1 ? [] : [(): Fault => ({ kind: "short", byte: at(), chunked: random.below(2) === 0 })]),
  ];
  const several = (least: number, draw: (() => Fault)[]) =>
    Array.from(
      { length: least + random.below(3) },
      () => Array.from({ length: 1 + random.below(2) }, () => random.pick(draw)()),
    )
      // 400 and 416 are answers to a range; a registry that gives them to a plain GET means it.
      .map((faults) => faults.filter((fault) => fault.kind !== "status" || ![400, 416].includes(fault.code)));
  const passing = (): Faults => {
    const body = { first: several(1, inBlob), then: [] };
    const expired: Fault = storage ? { kind: "expiredSignature" } : { kind: "expiredToken" };
    if (random.below(3) === 0 && (storage || auth === "bearer")) body.first[random.below(2)] = [expired];
    return {
      manifests: { first: several(0, early), then: [] },
      token: { first: several(0, [anywhere]), then: [] },
      blobs: storage ? { first: several(0, [anywhere]), then: [] } : body,
      ...(storage && { storage: body }),
    };
  };
  const lasting = (then: Fault[]): Faults => {
    const faults = passing();
    const place = storage ? "storage" : "blobs";
    const first: Fault[][] = random.pick([[], [[{ kind: "dieAt", byte: at() }]]]);
    return { ...faults, [place]: { first, then } };
  };
  const byte = random.below(size);
  const endings: (() => Pick<Plan, "faults" | "ending">)[] = [
    () => ({ faults: lasting([{ kind: "reset" }]), ending: "network" }),
    () => ({ faults: lasting([{ kind: "dieAt", byte: 0 }]), ending: "network" }),
    () => ({ faults: lasting([status(503)]), ending: "network" }),
    () => ({
      faults: lasting([{ kind: "status", code: 429, headers: { "retry-after": "3600" } }]),
      ending: "network",
    }),
    () => ({ faults: lasting([{ kind: "short", byte: 0 }]), ending: "integrity|network" }),
    () => ({ faults: lasting([{ kind: "wrongRange", shift: 7, claim: "asked" }]), ending: "right|integrity" }),
    () => ({ faults: { manifests: { first: [], then: [{ kind: "status", code: 404 }] } }, ending: "not-found" }),
    () => ({ faults: { manifests: { first: [], then: [{ kind: "status", code: 403 }] } }, ending: "auth" }),
    ...(storage ? [() => ({ faults: lasting([{ kind: "expiredSignature" }]), ending: "auth|network" })] : []),
    ...(auth === "bearer"
      ? [() => ({ faults: { manifests: { first: [], then: [{ kind: "expiredToken" as const }] } }, ending: "auth" })]
      : []),
  ];
  switch (random.below(9)) {
    case 0:
    case 1:
      return { ...shared, ...random.pick(endings)() };
    case 2: {
      const faults = passing();
      for (const place of ["blobs", "storage"] as const) {
        const { first, then } = faults[place] ?? { first: [], then: [] };
        const flip: Fault = { kind: "flipBit", byte };
        faults[place] = { first: first.map((faults) => [...faults, flip]), then: [...then, flip] };
      }
      return { ...shared, faults, ending: "integrity" };
    }
    case 3: {
      const bad: Fault[] = [{ kind: "flipBit", byte }, { kind: "reset" }, { kind: "dieAt", byte: at() }, status(429)];
      const mirror = {
        blobs: { first: several(1, inBlob), then: [random.pick(bad)] },
        manifests: { first: several(0, early), then: [] },
      };
      return { ...shared, faults: passing(), mirror, ending: "right" };
    }
    case 4:
    case 5: {
      const cache = random.pick(["empty", "entry", "wrong entry", "part", "wrong part"] as const);
      return { ...shared, faults: passing(), cache, ending: "right" };
    }
    case 6:
      return { ...shared, faults: passing(), cancelAt: at(), ending: "right|cancelled" };
    default:
      return { ...shared, faults: passing(), ending: "right" };
  }
}
