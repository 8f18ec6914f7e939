/**
 * A download that is watched as on a terminal: with a timer that the test drives, and a server that waits for the test.
 *
 * @module
 */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { main } from "../fetch_wheels.ts";
import { gzip, makeImage, makeTar, sha256 } from "./images.ts";
import { startRegistry } from "./registry.ts";
import { Scratch } from "./scratch.ts";

/** How a download is watched. */
export interface WatchOptions {
  /** Width of the terminal; undefined if stderr is not one. */
  columns?: number;
  /** Value of $TERM. */
  term?: string;
  /** Further arguments of the command line. */
  args?: string[];
  /** What stderr must match before the second half of the layer arrives. */
  until?: RegExp;
}

/** What was seen of a download. */
export interface WatchedDownload {
  stderr: string;
  /** Milliseconds between the ticks of each timer that was started. */
  intervals: number[];
  /** Texts that were drawn over the previous one. */
  drawn: string[];
}

const POLL_MS = 20;
const WAIT_LIMIT_MS = 10_000;

/** Runs a download whose second half arrives once `until` holds for stderr, which is checked after each tick. */
export async function watchDownload({ columns, term, args = [], until }: WatchOptions): Promise<WatchedDownload> {
  const layer = gzip(await makeTar([{ name: "a.whl", data: randomBytes(1 << 20) }]));
  const { promise: isReleased, resolve: release } = Promise.withResolvers<void>();
  async function* halves() {
    yield layer.subarray(0, layer.length >> 1);
    await isReleased;
    yield layer.subarray(layer.length >> 1);
  }
  let isAsked = false;
  await using registry = startRegistry({
    onRequest(_request, { path }) {
      if (!path.endsWith(sha256(layer))) return undefined;
      isAsked = true;
      return new Response(ReadableStream.from(halves()), { headers: { "content-length": `${layer.length}` } });
    },
  });
  registry.pushImage("ns/wheels", "1.0", makeImage({ layers: [layer] }));
  using scratch = new Scratch();
  let stderr = "";
  let tick = () => {};
  const intervals: number[] = [];
  const common = ["--wheels-file", "/nowhere/wheels", "--protocol", "http", "--platform", "linux/amd64"];
  const running = main([...args, ...common, "-d", scratch.at("dest"), `${registry.host}/ns/wheels:1.0`], {
    env: (name) => name === "TERM" ? term : undefined,
    stdin: ReadableStream.from([]),
    stdout: new WritableStream(),
    stderr: (text) => void (stderr += text),
    columns: () => columns,
    every(milliseconds, callback) {
      intervals.push(milliseconds);
      tick = callback;
      return { [Symbol.dispose]: () => void (tick = () => {}) };
    },
  });
  const started = performance.now();
  while (!isAsked || !(until?.test(stderr) ?? true)) {
    assert(performance.now() - started < WAIT_LIMIT_MS, stderr);
    await delay(POLL_MS);
    tick();
  }
  release();
  assert.equal(await running, 0, stderr);
  tick(); // a timer that is disposed of does nothing
  // deno-lint-ignore no-control-regex -- the sequences that move the cursor are what is tested
  const drawn = [...stderr.matchAll(/\r([^\r\n]+)\x1b\[K/g)].map(([, text]) => text ?? "");
  return { stderr, intervals, drawn };
}
