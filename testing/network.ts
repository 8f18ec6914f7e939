/**
 * Replacements for `fetch`: hosts that exist only in a test, and a link of limited speed. Also answers of such hosts.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { setImmediate as nextTask } from "node:timers/promises";
import { toBytes } from "./images.ts";

/** Answers the requests to one origin. */
export type Answer = (request: Request) => Response | Promise<Response>;

/** A network of hosts that exist only in a test, for public names and addresses. */
export interface FakeNetwork {
  fetch: typeof fetch;
  requests: Request[];
  /** Returns the requests to one origin. */
  requestsTo(origin: string): Request[];
}

/** Answers the requests of `hosts`, and records all. Other hosts are unknown, in Deno's words. */
export function fakeNetwork(hosts: Record<string, Answer>): FakeNetwork {
  const requests: Request[] = [];
  const fetch: typeof globalThis.fetch = async (input, init) => {
    const request = new Request(input, init);
    requests.push(request);
    const answer = hosts[new URL(request.url).origin];
    if (answer === undefined) throw connectError(request.url, UNKNOWN_HOST);
    return await answer(request);
  };
  const requestsTo = (origin: string) => requests.filter(({ url }) => new URL(url).origin === origin);
  return { fetch, requests, requestsTo };
}

/** What Deno reports if a host does not exist. */
export const UNKNOWN_HOST = "dns error: failed to lookup address information: Name or service not known";

/** An error as `fetch` throws it if it cannot connect. */
export function connectError(url: string, reason: string): TypeError {
  const cause = new Error(`error sending request for url (${url}): client error (Connect): ${reason}`);
  return new TypeError("fetch failed", { cause });
}

/** Redirects to a location. */
export function redirect(location: string, status = 307): Response {
  return new Response(null, { status, headers: { location } });
}

/** Answers with one byte every 50 ms. */
export function trickle(text: string | Uint8Array, status = 200): Response {
  const bytes = toBytes(text);
  let sent = 0;
  let timer: ReturnType<typeof setInterval> | undefined;
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      timer = setInterval(() => controller.enqueue(bytes.slice(sent, ++sent)), 50);
    },
    cancel: () => clearInterval(timer),
  });
  return new Response(body, { status, headers: { "content-type": "application/json" } });
}

/** Bytes per second. */
export interface LinkSpeed {
  perConnection: number;
  /** @default Infinity */
  total?: number;
}

/** A link whose clock advances as bytes arrive. */
export interface SimulatedLink {
  fetch: typeof fetch;
  now(): number;
  /** Advances the clock by so many milliseconds. */
  wait(ms: number): void;
  /** Returns the number of connections that are open. */
  open(): number;
  /** Returns the largest number of connections that were open at the same time. */
  most(): number;
}

/**
 * Simulates a link with a clock: each connection delivers at most `perConnection` bytes a second, all of them together at
 * most `total`. Nothing waits; `fetch` advances the clock as bytes arrive, but not while an answer is outstanding.
 */
export function simulateLink({ perConnection, total = Infinity }: LinkSpeed): SimulatedLink {
  let clock = 1e12;
  let most = 0;
  const open = new Set<unknown>();
  const outstanding = new Set<Promise<unknown>>();
  const simulated: typeof fetch = async (input, init) => {
    const answer = fetch(input, init);
    outstanding.add(answer);
    const response = await answer.finally(() => outstanding.delete(answer));
    if (response.body === null || !response.ok) return response;
    const reader = response.body.getReader();
    open.add(reader);
    most = Math.max(most, open.size);
    const close = () => open.delete(reader);
    init?.signal?.addEventListener("abort", () => {
      close();
      reader.cancel().catch(() => {}); // aborting `response` has no effect once it has been garbage-collected
    });
    const pull = async (controller: ReadableStreamDefaultController) => {
      await Promise.allSettled(outstanding);
      const { done, value } = await reader.read();
      await nextTask(); // the consumer takes what has arrived before more arrives
      if (!done) {
        clock += value.length / Math.min(total, perConnection * open.size) * 1000;
        return controller.enqueue(value);
      }
      close();
      controller.close();
    };
    const body = new ReadableStream({ pull, cancel: (reason) => reader.cancel(reason) }, { highWaterMark: 0 });
    return new Response(body, { status: response.status, headers: response.headers });
  };
  const wait = (ms: number) => void (clock += ms);
  return { fetch: simulated, now: () => clock, wait, most: () => most, open: () => open.size };
}

/** A blob that is sent in parts, so that it need not be in memory as a whole. */
export interface StreamedBlob {
  digest: string;
  size: number;
  /** Answers a request for all of the blob or for a closed range. */
  answer(request: Request): Response;
}

/** Joins parts to a blob; the same part may occur many times. */
export function streamedBlob(parts: Uint8Array[]): StreamedBlob {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  const size = parts.reduce((sum, { length }) => sum + length, 0);
  const between = function* (first: number, last: number) {
    let at = 0;
    for (const part of parts) {
      if (at <= last && at + part.length > first) yield part.subarray(Math.max(0, first - at), last + 1 - at);
      at += part.length;
    }
  };
  const answer = ({ headers }: Request) => {
    const range = /^bytes=(\d+)-(\d+)$/.exec(headers.get("range") ?? "");
    const [first, last] = range === null ? [0, size - 1] : [Number(range[1]), Number(range[2])];
    const said = {
      "accept-ranges": "bytes",
      "content-length": `${last + 1 - first}`,
      "content-range": `bytes ${first}-${last}/${size}`,
    };
    const status = range === null ? 200 : 206;
    return new Response(ReadableStream.from(between(first, last)), { status, headers: said });
  };
  return { digest: `sha256:${hash.digest("hex")}`, size, answer };
}
