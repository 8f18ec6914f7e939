/**
 * HTTP proxies for tests: one in the test's own process that records its requests and can fail, and Debian's tinyproxy.
 * Also nginx, as a reverse proxy with TLS and passwords before a registry.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { join } from "node:path";
import type { Certificate } from "./certificates.ts";
import type { MadeImage } from "./images.ts";
import { closeQuietly, copyBytes } from "./registry.ts";

/** What a proxy does with a request. */
export type ProxyBehavior =
  | "relay"
  /** Read the request and never answer. */
  | "silent"
  /** Accept CONNECT, and relay nothing. */
  | "silent-tunnel"
  /** Close the connection without an answer. */
  | "close"
  /** Answer with this status, such as 403, 407 or 502. */
  | number;

/** How a test proxy behaves. */
export interface ProxyOptions {
  /**
   * Returns the address to connect to for `host:port`, so that tests can use any host name.
   * @default the target itself
   */
  route?: (target: string) => string;
  /** @default "relay" */
  behavior?: ProxyBehavior | ((request: ProxyRequest) => ProxyBehavior);
  /** `user:password` that `Proxy-Authorization` must carry; other requests are answered with 407. */
  credentials?: string;
}

/** One request, as it arrived. */
export interface ProxyRequest {
  method: string;
  /** `host:port` of CONNECT, or an absolute URL. */
  target: string;
  /** All headers, `Proxy-Authorization` included. */
  headers: Headers;
  /** User name and password of `Proxy-Authorization`, decoded; empty without one. */
  credentials: string;
}

/** Starts a proxy on a free port of 127.0.0.1. Close it with `await using`. */
export function startProxy(options: ProxyOptions = {}): TestProxy {
  return new TestProxy(options);
}

const MAX_HEAD_BYTES = 64 * 1024;
const HEAD_END = "\r\n\r\n";

/** A running proxy; made by `startProxy()`. It understands CONNECT, and GET with an absolute URL. */
export class TestProxy implements AsyncDisposable {
  /** Every request, in the order of arrival. */
  readonly requests: ProxyRequest[] = [];
  /** `127.0.0.1:PORT`. */
  readonly host: string;
  /** As it stands in `HTTPS_PROXY`, without credentials. */
  readonly url: string;

  readonly #options: ProxyOptions;
  readonly #listener: Deno.TcpListener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly #connections = new Set<Deno.TcpConn>();
  readonly #exchanges = new Set<Promise<void>>();
  readonly #accepting: Promise<void>;

  constructor(options: ProxyOptions) {
    this.#options = options;
    this.host = `127.0.0.1:${this.#listener.addr.port}`;
    this.url = `http://${this.host}`;
    this.#accepting = this.#accept();
  }

  /** Closes all connections and waits until nothing is left. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    await this.#accepting;
    this.#connections.forEach(closeQuietly);
    await Promise.all(this.#exchanges);
  }

  async #accept(): Promise<void> {
    for await (const client of this.#listener) {
      this.#connections.add(client);
      const exchange = this.#handle(client).finally(() => {
        this.#exchanges.delete(exchange);
        this.#connections.delete(client);
      });
      this.#exchanges.add(exchange);
    }
  }

  /** Serves one request; each connection is used once, which `Connection: close` announces. */
  async #handle(client: Deno.TcpConn): Promise<void> {
    try {
      const head = await readHead(client);
      if (head === undefined) return;
      const request = parseRequest(head.text);
      this.requests.push(request);
      const behavior = this.#behaviorFor(request);
      if (behavior === "close") return;
      if (behavior === "silent" || (behavior === "silent-tunnel" && request.method !== "CONNECT")) {
        await drain(client);
      } else if (behavior === "silent-tunnel") {
        await writeAll(client, Buffer.from(`HTTP/1.1 200 Connection established${HEAD_END}`));
        await drain(client);
      } else if (behavior === "relay") {
        await this.#relay(client, request, head.rest);
      } else {
        await refuse(client, behavior);
      }
    } catch {
      // The client or a test's end closed the connection.
    } finally {
      closeQuietly(client);
    }
  }

  #behaviorFor(request: ProxyRequest): ProxyBehavior {
    const { behavior = "relay", credentials = request.credentials } = this.#options;
    if (request.credentials !== credentials) return 407;
    return typeof behavior === "function" ? behavior(request) : behavior;
  }

  async #relay(client: Deno.TcpConn, request: ProxyRequest, rest: Uint8Array): Promise<void> {
    const { route = (target) => target } = this.#options;
    const isTunnel = request.method === "CONNECT";
    const url = isTunnel ? undefined : new URL(request.target);
    const target = url === undefined ? request.target : `${url.hostname}:${url.port || 80}`;
    const { hostname, port } = new URL(`http://${route(target)}/`);
    const address = { hostname: hostname.replace(/^\[|\]$/g, ""), port: Number(port || 80) };
    const server = await Deno.connect(address).catch(() => undefined);
    if (server === undefined) return await refuse(client, 502);
    this.#connections.add(server);
    try {
      if (url === undefined) await writeAll(client, Buffer.from(`HTTP/1.1 200 Connection established${HEAD_END}`));
      else await writeAll(server, originRequest(request, url));
      await writeAll(server, rest);
      const closeBoth = () => [client, server].forEach(closeQuietly);
      await Promise.all([
        copyBytes(client, server).finally(closeBoth),
        copyBytes(server, client).finally(closeBoth),
      ]);
    } finally {
      closeQuietly(server);
      this.#connections.delete(server);
    }
  }
}

/** Reads up to the empty line that ends the headers; undefined if the client closes before. */
async function readHead(client: Deno.TcpConn): Promise<{ text: string; rest: Uint8Array } | undefined> {
  const buffer = new Uint8Array(4096);
  let bytes = Buffer.alloc(0);
  while (bytes.length < MAX_HEAD_BYTES) {
    const length = await client.read(buffer);
    if (length === null) return undefined;
    bytes = Buffer.concat([bytes, buffer.subarray(0, length)]);
    const end = bytes.indexOf(HEAD_END);
    if (end >= 0) return { text: bytes.toString("latin1", 0, end), rest: bytes.subarray(end + HEAD_END.length) };
  }
  return undefined;
}

function parseRequest(head: string): ProxyRequest {
  const [line = "", ...fields] = head.split("\r\n");
  const [method = "", target = ""] = line.split(" ");
  const headers = new Headers(fields.map((field): [string, string] => {
    const colon = field.indexOf(":");
    return [field.slice(0, colon), field.slice(colon + 1).trim()];
  }));
  const encoded = /^basic (\S+)$/i.exec(headers.get("proxy-authorization") ?? "")?.[1] ?? "";
  return { method, target, headers, credentials: Buffer.from(encoded, "base64").toString() };
}

/** Returns the request as its origin expects it (RFC 9112, section 3.2.1). */
function originRequest({ method, headers }: ProxyRequest, url: URL): Uint8Array {
  const kept = [...headers].filter(([name]) => !/^(?:proxy-.*|connection|keep-alive)$/.test(name));
  const fields = [...kept, ["connection", "close"]].map(([name, value]) => `${name}: ${value}\r\n`);
  return Buffer.from(`${method} ${url.pathname}${url.search} HTTP/1.1\r\n${fields.join("")}\r\n`, "latin1");
}

async function refuse(client: Deno.TcpConn, status: number): Promise<void> {
  const body = "<html>refused by the proxy</html>";
  const challenge = status === 407 ? 'Proxy-Authenticate: Basic realm="proxy"\r\n' : "";
  const fields = `${challenge}Content-Type: text/html\r\nContent-Length: ${body.length}\r\nConnection: close`;
  await writeAll(client, Buffer.from(`HTTP/1.1 ${status} Refused\r\n${fields}${HEAD_END}${body}`));
}

async function writeAll(connection: Deno.TcpConn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await connection.write(bytes.subarray(at));
}

/** Reads until the client closes. */
async function drain(client: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(4096);
  while (await client.read(buffer) !== null) { /* Ignores what the client sends. */ }
}

// ---------------------------------------------------------------------------------------------------------------------
// Installed programs
// ---------------------------------------------------------------------------------------------------------------------

/** A program that runs until it is disposed of. */
export interface RunningServer extends AsyncDisposable {
  /** `127.0.0.1:PORT`. */
  host: string;
}

/** Reports whether a program is in PATH. */
export function isInPath(program: string): boolean {
  return (Deno.env.get("PATH") ?? "").split(":").some((directory) => {
    try {
      return Deno.statSync(join(directory, program)).isFile;
    } catch {
      return false;
    }
  });
}

/** How tinyproxy behaves. */
export interface TinyproxyOptions {
  /** Proxy that tinyproxy passes requests to. */
  upstream: string;
  /** User name and password that clients must send. */
  credentials?: { username: string; password: string };
  /** Regular expressions of hosts that tinyproxy answers with 403. */
  denied?: string[];
}

/** Starts Debian's tinyproxy. */
export function startTinyproxy({ upstream, credentials, denied }: TinyproxyOptions): Promise<RunningServer> {
  return startServer("tinyproxy", (directory, port) => {
    const lines = [`Port ${port}`, "Listen 127.0.0.1", "Timeout 30", "LogLevel Critical", `Upstream http ${upstream}`];
    if (credentials !== undefined) lines.push(`BasicAuth ${credentials.username} ${credentials.password}`);
    if (denied !== undefined) {
      const filter = join(directory, "filter");
      Deno.writeTextFileSync(filter, `${denied.join("\n")}\n`);
      lines.push(`Filter "${filter}"`);
    }
    const config = join(directory, "tinyproxy.conf");
    Deno.writeTextFileSync(config, `${lines.join("\n")}\n`);
    return ["-d", "-c", config];
  });
}

/** Starts Debian's docker-registry without passwords; `http` and `lines` add to its configuration. */
export function startDockerRegistry({ http = "", lines = [] as string[] } = {}): Promise<RunningServer> {
  return startServer("docker-registry", (directory, port) => {
    const config = join(directory, "config.yml");
    const text = [
      "version: 0.1",
      "log: {level: error, accesslog: {disabled: true}}",
      `storage: {filesystem: {rootdirectory: ${directory}/storage}}`,
      `http: {addr: "127.0.0.1:${port}", relativeurls: true${http}}`,
      ...lines,
    ];
    Deno.writeTextFileSync(config, text.join("\n"));
    return ["serve", config];
  });
}

/** Pushes an image as `ns/wheels:1.0` by the distribution API. */
export async function pushByApi(host: string, { manifest, mediaType, blobs }: MadeImage): Promise<void> {
  const request = async (method: string, url: URL, body?: BodyInit, contentType = "application/octet-stream") => {
    const response = await fetch(url, { method, body, headers: { "content-type": contentType } });
    await response.body?.cancel();
    if (!response.ok) throw new Error(`${method} ${url}: ${response.status}`);
    return response.headers.get("location") ?? "";
  };
  const base = new URL(`http://${host}/v2/ns/wheels/`);
  for (const [digest, blob] of blobs) {
    const uploads = new URL("blobs/uploads/", base);
    const location = new URL(await request("POST", uploads), uploads);
    location.searchParams.set("digest", digest);
    await request("PUT", location, blob);
  }
  await request("PUT", new URL("manifests/1.0", base), manifest, mediaType);
}

/** How nginx behaves. */
export interface NginxOptions {
  /** `host:port` of the registry behind nginx. */
  upstream: string;
  tls: Certificate;
  /** User name and password that clients must send. */
  credentials: { username: string; password: string };
}

/** Starts nginx with TLS and the passwords of `htpasswd` before a registry. */
export async function startNginx({ upstream, tls, credentials }: NginxOptions): Promise<RunningServer> {
  const { username, password } = credentials;
  const { stdout } = await new Deno.Command("htpasswd", { args: ["-nbm", username, password] }).output();
  return await startServer("nginx", (directory, port) => {
    const files = { "cert.pem": tls.cert, "key.pem": tls.key, "htpasswd": new TextDecoder().decode(stdout) };
    for (const [name, text] of Object.entries(files)) Deno.writeTextFileSync(join(directory, name), text);
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    const config = `daemon off; master_process off; pid ${directory}/pid; error_log stderr crit; events {}
      http {
        access_log off; client_max_body_size 0;
        ${temporary.map((name) => `${name}_temp_path ${directory}/${name};`).join(" ")}
        server {
          listen 127.0.0.1:${port} ssl;
          ssl_certificate ${directory}/cert.pem; ssl_certificate_key ${directory}/key.pem;
          auth_basic "registry"; auth_basic_user_file ${directory}/htpasswd;
          location / { proxy_pass http://${upstream}; proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-Proto https; proxy_set_header Authorization ""; }
        }
      }`;
    Deno.writeTextFileSync(join(directory, "nginx.conf"), config);
    return ["-p", directory, "-e", "stderr", "-c", join(directory, "nginx.conf")];
  });
}

/** How long a program may take until it accepts connections. */
const START_LIMIT_MS = 10_000;
const START_POLL_MS = 20;

/** Starts a program with a free port and a temporary directory, and waits until it accepts connections. */
export async function startServer(
  program: string,
  configure: (directory: string, port: number) => string[],
): Promise<RunningServer> {
  await using stack = new AsyncDisposableStack();
  const directory = await Deno.makeTempDir();
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const probe = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = probe.addr;
  probe.close();
  const args = configure(directory, port);
  const child = new Deno.Command(program, { args, stdin: "null", stdout: "null", stderr: "null" }).spawn();
  let hasExited = false;
  const exited = child.status.then(() => void (hasExited = true));
  stack.defer(async () => {
    if (!hasExited) child.kill("SIGTERM");
    await exited;
  });
  const deadline = Date.now() + START_LIMIT_MS;
  while (!await accepts(port)) {
    if (hasExited || Date.now() > deadline) throw new Error(`${program} did not start`);
    await new Promise((resolve) => setTimeout(resolve, START_POLL_MS));
  }
  const running = stack.move();
  return { host: `127.0.0.1:${port}`, [Symbol.asyncDispose]: () => running.disposeAsync() };
}

async function accepts(port: number): Promise<boolean> {
  try {
    const connection = await Deno.connect({ hostname: "127.0.0.1", port });
    connection.close();
    return true;
  } catch {
    return false;
  }
}
