/**
 * Set-ups in which the program waits: for a server, a proxy, a decoder, a helper, or a pipe.
 *
 * @module
 */

import { randomBytes } from "node:crypto";
import { layerOf } from "./archives.ts";
import { type Bytes, concat, file, gzip, makeImage, rawHeader, tarOf } from "./images.ts";
import { startProxy } from "./proxies.ts";
import { type Fault, type RegistryOptions, startRegistry } from "./registry.ts";
import type { Scratch } from "./scratch.ts";

/** Something that the program waits for: its arguments and surroundings, and whether the wait has begun. */
export interface Wait {
  args: string[];
  env?: Record<string, string>;
  /** A shell script that starts the program, `"$@"`. */
  script?: string;
  hasBegun?: () => boolean;
  /** Nobody can read what the program writes to stderr. */
  isSilent?: boolean;
}

/** Starts what the program waits for. Servers are added to `cleanup`. */
export type StartWait = (scratch: Scratch, cleanup: AsyncDisposableStack) => Wait;

/** For images of linux/amd64, also on other machines. */
const PLATFORM = ["--platform", "linux/amd64"];

/** An archive of one file, whose bytes cannot be compressed. */
function randomLayer(size: number): Bytes {
  return tarOf(file("a.whl", randomBytes(size)));
}

/** A registry that fails each request for the layer in this way. */
function waitForLayer(cleanup: AsyncDisposableStack, layer: Bytes, fault: Fault): Wait {
  const image = makeImage({ layers: [layer] });
  const registry = cleanup.use(startRegistry());
  registry.pushImage("ns/wheels", "1.0", image);
  const isLayer = (path: string) => path.includes("/blobs/") && image.blobs.get(path.split("/").at(-1) ?? "") === layer;
  registry.faults = ({ path }) => isLayer(path) ? [fault] : [];
  const hasBegun = () => registry.requests.some(({ path }) => isLayer(path));
  return { args: [...PLATFORM, `${registry.host}/ns/wheels:1.0`], hasBegun };
}

/** A registry, and the beginning of its first request. */
function waitForRegistry(cleanup: AsyncDisposableStack, options: RegistryOptions): Wait {
  const registry = cleanup.use(startRegistry(options));
  return { args: [...PLATFORM, `${registry.host}/ns/wheels:1.0`], hasBegun: () => registry.requests.length > 0 };
}

/** A server that accepts connections, and sends nothing. */
function waitForHandshake(cleanup: AsyncDisposableStack, options: string[]): Wait {
  const listener = cleanup.use(Deno.listen({ hostname: "127.0.0.1", port: 0 }));
  let accepted = 0;
  (async () => {
    for await (const connection of listener) {
      cleanup.use(connection);
      accepted++;
    }
  })();
  const { port } = listener.addr as Deno.NetAddr;
  return { args: ["--protocol", "https", ...options, `127.0.0.1:${port}/ns/name`], hasBegun: () => accepted > 0 };
}

/** Each thing that the program may wait for. */
export const WAITS: Record<string, StartWait> = {
  "headers": (_, cleanup) => waitForRegistry(cleanup, { onRequest: () => Promise.withResolvers<Response>().promise }),
  "a body": (_, cleanup) => waitForLayer(cleanup, randomLayer(200_000), { kind: "stall", byte: 150_000 }),
  "ranges, and a worker": (_, cleanup) =>
    waitForLayer(cleanup, randomLayer((40 << 20) + 4321), { kind: "stall", byte: 3 << 20 }),
  "the time before a retry": (_, cleanup) =>
    waitForLayer(cleanup, randomLayer(1000), { kind: "status", code: 503, headers: { "retry-after": "50" } }),
  "a decoder": (scratch) => {
    const size = 2 ** 33 - 1;
    const zeros = gzip(new Uint8Array(64 << 20));
    const parts = Array.from({ length: size / (64 << 20) + 1 }, () => zeros);
    return { args: ["--list", scratch.at("bomb.tar.gz", concat(gzip(rawHeader({ name: "a.whl", size })), ...parts))] };
  },
  "CONNECT": (_, cleanup) => {
    const proxy = cleanup.use(startProxy({ behavior: "silent" }));
    const args = ["--protocol", "https", "--insecure", "registry.example/ns/wheels:1.0"];
    return { args, env: { HTTPS_PROXY: proxy.url }, hasBegun: () => proxy.requests.length > 0 };
  },
  "a credential helper, and its child": (scratch, cleanup) => {
    const { args } = waitForRegistry(cleanup, { auth: "basic", users: { user: "secret" } });
    const helper = scratch.at("bin/docker-credential-hangs", '#!/bin/sh\nsleep 5 &\ntouch "$0.began"\nwait\n');
    Deno.chmodSync(helper, 0o755);
    scratch.at("docker/config.json", JSON.stringify({ credsStore: "hangs" }));
    const env = { DOCKER_CONFIG: scratch.at("docker"), PATH: `${scratch.at("bin")}:${Deno.env.get("PATH")}` };
    const hasBegun = () => [...Deno.readDirSync(scratch.at("bin"))].some(({ name }) => name.endsWith(".began"));
    return { args, env, hasBegun };
  },
  "--password-stdin": (_, cleanup) => {
    const { args } = waitForRegistry(cleanup, {});
    return { args: ["--username", "user", "--password-stdin", ...args], script: 'mkfifo in; exec "$@" 0<>in' };
  },
  "stdout": (scratch) => {
    const source = scratch.at("layer.tar", new Uint8Array(1 << 20));
    return { args: ["-o", "-", source], script: 'mkfifo out; exec "$@" 1<>out' };
  },
  "a pipe as source": () => ({ args: ["./pipe"], script: 'mkfifo pipe; exec "$@"' }),
  "a pipe as output": (scratch) => {
    return { args: ["-o", "pipe", scratch.at("layer.tar", layerOf("a.whl"))], script: 'mkfifo pipe; exec "$@"' };
  },
  "a pipe as --ca-file": () => ({ args: ["--ca-file", "pipe", "ns/name"], script: 'mkfifo pipe; exec "$@"' }),
  "a pipe as --verify-key": () => ({ args: ["--verify-key", "pipe", "ns/name"], script: 'mkfifo pipe; exec "$@"' }),
  "a pipe as --wheels-file": () => ({ args: ["--wheels-file", "pipe"], script: 'mkfifo pipe; exec "$@"' }),
  "a pipe with credentials": (_, cleanup) => {
    const wait = waitForRegistry(cleanup, { auth: "basic", users: { user: "secret" } });
    return { ...wait, env: { REGISTRY_AUTH_FILE: "pipe" }, script: 'mkfifo pipe; exec "$@"' };
  },
  "a TLS handshake": (_, cleanup) => waitForHandshake(cleanup, []),
  "a TLS handshake with --insecure": (_, cleanup) => waitForHandshake(cleanup, ["--insecure"]),
  "stderr": () => {
    const fill = "head -c 65536 /dev/zero >&2";
    return { args: ["./pipe"], script: `mkfifo pipe err; exec 2<>err; ${fill}; exec "$@"`, isSilent: true };
  },
};
