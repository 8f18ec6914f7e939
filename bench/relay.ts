/**
 * A TCP relay on loopback that stands for a link: it delays each direction, and limits the rate of each connection.
 * It is a process of its own, so that it competes with the benchmark's timers for nothing. No root is needed, and no
 * kernel module (`tc netem` is missing from many kernels).
 *
 *     deno run --allow-net=127.0.0.1 bench/relay.ts PORT DELAY_MS BYTES_PER_SECOND
 *
 * PORT is the server's, DELAY_MS is half of the round-trip time, a rate of 0 means no limit. The relay's own port is the
 * first line of stdout. It does not imitate what TCP itself does on a slow link (slow start, packet loss).
 *
 * @module
 */

import { setTimeout as sleep } from "node:timers/promises";

const BUFFER_BYTES = 256 * 1024;
/** On the link at one time: enough for 2 GB/s over 25 ms, so that only the rate limits the bandwidth. */
const MAX_QUEUED_BYTES = 64 * 2 ** 20;
/** A timer is late by some milliseconds on a busy machine. A sender that was late by so much may catch up. */
const MAX_LATE_MS = 25;

const [serverPort = 0, delayMs = 0, bytesPerSecond = 0] = Deno.args.map(Number);

/** Bytes on the link. `due` is when they arrive at its far end, on the clock of `performance.now()`. */
interface Parcel {
  buffer: Uint8Array;
  length: number;
  due: number;
}

async function connect(client: Deno.TcpConn): Promise<void> {
  using near = client;
  // The client considers itself connected already. On a real link that takes a round trip, and its request half of one.
  const firstDue = performance.now() + 3 * delayMs;
  using far = await Deno.connect({ hostname: "127.0.0.1", port: serverPort });
  near.setNoDelay();
  far.setNoDelay();
  await Promise.all([forward(near, far, firstDue), forward(far, near, 0)]);
}

async function forward(from: Deno.TcpConn, to: Deno.TcpConn, firstDue: number): Promise<void> {
  const queue: Parcel[] = [];
  const spare: Uint8Array[] = [];
  let queuedBytes = 0;
  let ended = false;
  let changed = Promise.withResolvers<void>();

  function notify(): void {
    changed.resolve();
    changed = Promise.withResolvers();
  }

  async function receive(): Promise<void> {
    while (true) {
      const buffer = spare.pop() ?? new Uint8Array(BUFFER_BYTES);
      const length = await from.read(buffer);
      if (length === null) break;
      queue.push({ buffer, length, due: Math.max(performance.now() + delayMs, firstDue) });
      queuedBytes += length;
      notify();
      while (queuedBytes > MAX_QUEUED_BYTES) await changed.promise;
    }
    ended = true;
    notify();
  }

  async function send(): Promise<void> {
    let free = 0; // when the link has room for the next bytes
    while (true) {
      const parcel = queue.shift();
      if (parcel === undefined) {
        if (ended) break;
        await changed.promise;
        continue;
      }
      await until(Math.max(parcel.due, free));
      if (bytesPerSecond > 0) {
        free = Math.max(free, performance.now() - MAX_LATE_MS) + parcel.length / bytesPerSecond * 1000;
      }
      await writeAll(to, parcel.buffer.subarray(0, parcel.length));
      queuedBytes -= parcel.length;
      spare.push(parcel.buffer);
      notify();
    }
    await to.closeWrite();
  }

  await Promise.all([receive(), send()]);
}

async function until(time: number): Promise<void> {
  const ms = time - performance.now();
  if (ms >= 1) await sleep(ms);
}

async function writeAll(to: Deno.TcpConn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await to.write(bytes.subarray(at));
}

const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
console.log(listener.addr.port);
for await (const client of listener) {
  connect(client).catch(() => {}); // the other end has gone: `using` closes both
}
