/**
 * A container registry inside the test's own process, with blobs on another origin, a token service, TLS, and faults.
 *
 * Each origin is a `Deno.serve` behind a relay of bytes, because a server cannot drop a connection and a relay can.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import type { Certificate } from "./certificates.ts";
import { type Bytes, MEDIA, sha256, toBytes } from "./images.ts";

export { type Certificate, makeCertificate } from "./certificates.ts";

/** The server of an origin: the registry, the storage that blobs are redirected to, or the token service. */
export type OriginName = "registry" | "storage" | "token";

/** One request, as received. */
export interface LoggedRequest {
  origin: OriginName;
  method: string;
  path: string;
  /** The query, with its `?`. */
  search: string;
  headers: Headers;
  /** Status of the answer; 0 until there is an answer. */
  status: number;
  /** The `Range` header. */
  range?: string;
  /** Form of a POST to the token service. */
  body?: string;
}

/** Argument of hooks and of functions that choose faults. */
export interface RequestContext {
  origin: OriginName;
  method: string;
  path: string;
  /** The `Range` header. */
  range?: string;
  /** 1 for the first request of this path at this origin. */
  count: number;
}

/**
 * A fault of one answer. Faults of one answer combine: which bytes are sent (`ignoreRange`, `wrongRange`, `flipBit`,
 * `short`), then how fast (`trickle`), then how the body ends (the earlier of `stall` and `dieAt`). Faults that replace
 * the answer (`reset`, `status`, `expiredToken`, `expiredSignature`) win over all others.
 */
export type Fault =
  /** Drop the connection after this many bytes of the body; Content-Length announces all of it. */
  | { kind: "dieAt"; byte: number }
  /** Send nothing after this many bytes of the body, until the client or the registry closes. */
  | { kind: "stall"; byte: number }
  | { kind: "trickle"; bytesPerSecond: number }
  /** End the body after this many bytes, with a Content-Length to match or, if chunked, without one. */
  | { kind: "short"; byte: number; chunked?: boolean }
  /**
   * Answer with a range that begins this many bytes later (earlier, if negative). `Content-Range` names that range or,
   * with `claim: "asked"`, the requested one; `total` replaces the blob's size.
   */
  | { kind: "wrongRange"; shift: number; claim?: "shifted" | "asked"; total?: number }
  /** Answer 200 with the whole blob. */
  | { kind: "ignoreRange" }
  /** Flip a bit in this byte of the blob (not of the body), if the byte is sent. */
  | { kind: "flipBit"; byte: number }
  | { kind: "status"; code: number; headers?: Record<string, string>; body?: string }
  /** Answer 401 and a challenge to any token; at the registry only. */
  | { kind: "expiredToken" }
  /** Answer 403 in XML as object stores do; at the storage only. */
  | { kind: "expiredSignature" }
  /** Drop the connection without an answer. */
  | { kind: "reset" };

/** How requests for blobs are redirected to the storage origin. */
export interface StorageOptions {
  /** Redirect to signed URLs. @default false */
  signed?: boolean;
  /** Seconds that a signature is valid. @default 300 */
  expiresIn?: number;
  /** Number of requests that a signature is valid for. @default Infinity */
  uses?: number;
  /** Status of the redirect. @default 307 */
  status?: 301 | 302 | 303 | 307 | 308;
}

/** How the registry behaves. */
export interface RegistryOptions {
  /** @default "none" */
  auth?: "none" | "basic" | "bearer";
  /** Passwords by user name. With `bearer` and no users, requests without credentials get a token. */
  users?: Record<string, string>;
  /** Refresh tokens that the token service accepts by POST; without any, it answers 405 to POST. */
  identityTokens?: string[];
  /** Field that holds the token in the token service's answer. @default "token" */
  tokenField?: "token" | "access_token";
  /** Seconds that a token is valid. Without it, 60 seconds, and the answer has no `expires_in`. */
  expiresIn?: number;
  /** Replaces the `WWW-Authenticate` header; `scope` is empty for `/v2/`. */
  challenge?: string | ((challenge: { realm: string; service: string; scope: string }) => string);
  /** Redirect requests for blobs to another origin. @default false */
  storage?: boolean | StorageOptions;
  /**
   * Answer `/referrers/`; without it the answer is 404, as before version 1.1 of the distribution specification. An
   * artifact type stands in every entry instead of the manifest's own, as GHCR's does. A page size splits the list, and
   * each page links to the next one.
   * @default true
   */
  referrers?: boolean | { artifactType?: string; pageSize?: number };
  /** Certificate and key in PEM, for all origins. */
  tls?: Certificate;
  /** The first value of `TestRegistry.faults`. */
  faults?: TestRegistry["faults"];
  /** Called first; a response that it returns is the answer. */
  onRequest?: (
    request: Request,
    context: RequestContext,
  ) => Response | undefined | Promise<Response | undefined>;
}

/** An image to push: a `MadeImage`, or these fields of one. */
export interface PushableImage {
  manifest: Bytes;
  mediaType: string;
  digest: string;
  blobs: Map<string, Bytes>;
}

/** Starts a registry on a free port of 127.0.0.1. Close it with `await using`. */
export function startRegistry(options: RegistryOptions = {}): TestRegistry {
  return new TestRegistry(options);
}

/**
 * Serves an image of one layer, which its manifest may describe wrongly; returns the reference. It has no configuration,
 * so that the layer is the only blob that is requested.
 */
export function serveLayer(
  registry: TestRegistry,
  layer: Bytes,
  described: { digest?: string; size?: number; mediaType?: string } = {},
): string {
  const { digest = sha256(layer), size = layer.length, mediaType = MEDIA.ociLayerGzip } = described;
  const layers = [{ mediaType, digest: registry.pushBlob(layer, digest), size }];
  const manifest = JSON.stringify({ schemaVersion: 2, mediaType: MEDIA.ociManifest, layers });
  registry.pushManifest("ns/wheels", "1.0", toBytes(manifest), MEDIA.ociManifest);
  return `${registry.host}/ns/wheels:1.0`;
}

const SERVICE = "test-registry";
const CHUNK_BYTES = 64 * 1024;
const DEFAULT_TOKEN_SECONDS = 60;
const DEFAULT_SIGNATURE_SECONDS = 300;

/** A path of the registry's protocol: name, kind, reference. */
const API_PATH = /^\/v2\/(?:(.+)\/(manifests|blobs|referrers)\/([^/]+))?$/;

interface StoredManifest {
  bytes: Bytes;
  mediaType: string;
}

interface Grant {
  /** Scope of a token, or path of the blob of a signature. */
  subject: string;
  /** Milliseconds since 1970. */
  expires: number;
  usesLeft: number;
}

// ---------------------------------------------------------------------------------------------------------------------
// The registry
// ---------------------------------------------------------------------------------------------------------------------

/** A running registry; made by `startRegistry()`. */
export class TestRegistry implements AsyncDisposable {
  /** All requests to all origins, in the order of arrival. */
  readonly requests: LoggedRequest[] = [];
  /** Faults of every request for a blob, at either origin; or a function that returns the faults of a request. */
  faults: Fault[] | ((context: RequestContext) => Fault[]);

  readonly #options: RegistryOptions;
  readonly #closing = new AbortController();
  readonly #origins: Partial<Record<OriginName, Origin>> = {};
  readonly #manifests = new Map<string, Map<string, StoredManifest>>();
  readonly #blobs = new Map<string, Bytes>();
  readonly #counts = new Map<string, number>();
  readonly #tokens = new Map<string, Grant>();
  readonly #signatures = new Map<string, Grant>();

  constructor(options: RegistryOptions) {
    this.#options = options;
    this.faults = options.faults ?? [];
    const names: OriginName[] = ["registry"];
    if (options.storage) names.push("storage");
    if (options.auth === "bearer") names.push("token");
    for (const name of names) {
      this.#origins[name] = new Origin(options.tls, (request, drop) => this.#handle(name, request, drop));
    }
  }

  /** `127.0.0.1:PORT`, the host of an image reference. */
  get host(): string {
    return this.#origin("registry").host;
  }

  /** The registry's origin, such as `http://127.0.0.1:PORT`. */
  get url(): string {
    return this.#origin("registry").url;
  }

  /** Origin of the storage, if there is one. */
  get storageUrl(): string | undefined {
    return this.#origins.storage?.url;
  }

  /** Origin of the token service, if there is one. */
  get tokenUrl(): string | undefined {
    return this.#origins.token?.url;
  }

  /** Whether this registry has the referrers API. */
  get hasReferrers(): boolean {
    return this.#options.referrers !== false;
  }

  /** Stores a blob under its sha256 or under the given digest, which may be wrong; every repository has the blob. */
  pushBlob(bytes: Bytes, digest: string = sha256(bytes)): string {
    this.#blobs.set(digest, bytes);
    return digest;
  }

  /** Stores a manifest or an index under its sha256, and under a tag or a digest that may be wrong. */
  pushManifest(repository: string, tagOrDigest: string, bytes: Bytes, mediaType: string): string {
    const digest = sha256(bytes);
    const stored = this.#manifests.get(repository) ?? new Map<string, StoredManifest>();
    this.#manifests.set(repository, stored);
    for (const reference of [digest, tagOrDigest]) stored.set(reference, { bytes, mediaType });
    return digest;
  }

  /** Stores an image: all its blobs, and its manifest under the tag and under its digest. */
  pushImage(repository: string, tag: string, image: PushableImage): string {
    for (const [digest, blob] of image.blobs) this.pushBlob(blob, digest);
    this.pushManifest(repository, image.digest, image.manifest, image.mediaType);
    this.pushManifest(repository, tag, image.manifest, image.mediaType);
    return image.digest;
  }

  /** Invalidates all tokens that were issued so far. */
  revokeTokens(): void {
    this.#tokens.clear();
  }

  /** Invalidates all signed URLs that were issued so far. */
  revokeSignatures(): void {
    this.#signatures.clear();
  }

  /** Drops all open connections. */
  dropConnections(): void {
    for (const origin of Object.values(this.#origins)) origin.dropAll();
  }

  /** Closes at once, also in the middle of an answer. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort();
    await Promise.all(Object.values(this.#origins).map((origin) => origin.close()));
  }

  #origin(name: OriginName): Origin {
    const origin = this.#origins[name];
    if (origin === undefined) throw new Error(`This registry has no ${name} origin`);
    return origin;
  }

  async #handle(origin: OriginName, request: Request, drop: () => void): Promise<Response> {
    const { pathname: path, search } = new URL(request.url);
    const range = request.headers.get("range") ?? undefined;
    const key = `${origin} ${path}`;
    const count = (this.#counts.get(key) ?? 0) + 1;
    this.#counts.set(key, count);
    const shared = { origin, method: request.method, path, ...(range !== undefined && { range }) };
    const logged: LoggedRequest = { ...shared, search, headers: new Headers(request.headers), status: 0 };
    this.requests.push(logged);

    const context = { ...shared, count };
    const faults = this.#faultsOf(context);
    if (faults.some(({ kind }) => kind === "reset")) {
      drop();
      return new Response(null, { status: 500 }); // The client is gone.
    }
    const response = await this.#hooked(request, context) ?? await this.#answer(request, { context, faults, logged });
    logged.status = response.status;
    return response;
  }

  #faultsOf(context: RequestContext): Fault[] {
    if (typeof this.faults === "function") return this.faults(context);
    const isBlob = context.origin === "storage" || API_PATH.exec(context.path)?.[2] === "blobs";
    return isBlob ? this.faults : [];
  }

  /** Returns the hook's answer. A hook that never answers must not keep the registry from closing. */
  async #hooked(request: Request, context: RequestContext): Promise<Response | undefined> {
    const { onRequest } = this.#options;
    if (onRequest === undefined) return undefined;
    const closed = Promise.withResolvers<undefined>();
    const onClose = () => closed.resolve(undefined);
    this.#closing.signal.addEventListener("abort", onClose);
    try {
      return await Promise.race([onRequest(request, context), closed.promise]);
    } finally {
      this.#closing.signal.removeEventListener("abort", onClose);
    }
  }

  async #answer(request: Request, { context, faults, logged }: Exchange): Promise<Response> {
    const status = faultOf(faults, "status");
    if (status !== undefined) {
      return new Response(status.body ?? null, { status: status.code, headers: status.headers ?? {} });
    }
    switch (context.origin) {
      case "registry":
        return this.#answerApi(request, context.path, faults);
      case "storage":
        return this.#answerStorage(request, context.path, faults);
      case "token":
        return await this.#answerToken(request, logged);
    }
  }

  #answerApi(request: Request, path: string, faults: Fault[]): Response {
    const match = API_PATH.exec(path);
    if (match === null) return apiError(404, "NOT_FOUND", "page not found");
    const [, name = "", kind, reference = ""] = match;
    if (faultOf(faults, "expiredToken") !== undefined || !this.#isAuthorized(request, name)) {
      return this.#unauthorized(name);
    }
    if (request.method !== "GET" && request.method !== "HEAD") {
      return apiError(405, "UNSUPPORTED", "The operation is unsupported.");
    }
    switch (kind) {
      case "manifests":
        return this.#answerManifest(request, { name, reference, faults });
      case "blobs":
        return this.#answerBlob(request, reference, faults);
      case "referrers":
        return this.#answerReferrers(request, { name, reference, faults });
      default:
        return new Response("{}", { headers: { "content-type": "application/json", ...API_VERSION } });
    }
  }

  #answerManifest(request: Request, { name, reference, faults }: ManifestRequest): Response {
    const repository = this.#manifests.get(name);
    if (repository === undefined) return apiError(404, "NAME_UNKNOWN", "repository name not known to registry");
    const stored = repository.get(reference);
    if (stored === undefined) return apiError(404, "MANIFEST_UNKNOWN", "manifest unknown");
    // Report the requested digest even if the stored bytes do not match, so that tests can serve wrong content.
    const digest = reference.includes(":") ? reference : this.#digestOfTag(repository, stored);
    return deliver(request, { ...stored, digest, ranges: false }, { faults, closing: this.#closing.signal });
  }

  /** Lists the manifests with this subject, in an index that may be empty (specification, "Listing Referrers"). */
  #answerReferrers(request: Request, { name, reference, faults }: ManifestRequest): Response {
    if (!this.hasReferrers) return apiError(404, "NOT_FOUND", "page not found");
    const { referrers } = this.#options;
    const { searchParams } = new URL(request.url);
    const filter = searchParams.get("artifactType");
    const stored = new Map([...this.#manifests.get(name) ?? []].map(([, it]) => [sha256(it.bytes), it]));
    const all = [...stored].flatMap(([digest, it]) => this.#referrerEntry(digest, it, reference))
      .filter(({ artifactType }) => filter === null || artifactType === filter);
    const start = Number(searchParams.get("from"));
    const { pageSize = all.length } = typeof referrers === "object" ? referrers : {};
    const manifests = all.slice(start, start + pageSize);
    const mediaType = "application/vnd.oci.image.index.v1+json";
    const bytes = new TextEncoder().encode(JSON.stringify({ schemaVersion: 2, mediaType, manifests }));
    const content = { bytes, mediaType, digest: sha256(bytes), ranges: false };
    const response = deliver(request, content, { faults, closing: this.#closing.signal });
    response.headers.delete("docker-content-digest");
    const next = start + pageSize;
    if (next < all.length) {
      response.headers.set("link", `</v2/${name}/referrers/${reference}?from=${next}>; rel="next"`);
    }
    if (filter !== null) response.headers.set("oci-filters-applied", "artifactType");
    return response;
  }

  #referrerEntry(digest: string, { bytes, mediaType }: StoredManifest, subject: string): ReferrerEntry[] {
    const manifest = parseObject(bytes);
    if (manifest.subject?.digest !== subject) return [];
    const { referrers } = this.#options;
    const own = manifest.artifactType ?? manifest.config?.mediaType;
    const artifactType = (typeof referrers === "object" ? referrers.artifactType : undefined) ?? own;
    return [{ mediaType, digest, size: bytes.length, artifactType, annotations: manifest.annotations }];
  }

  /** Returns the digest of a manifest; a signed schema 1 manifest's digest is not the hash of its bytes. */
  #digestOfTag(repository: Map<string, StoredManifest>, stored: StoredManifest): string {
    const own = sha256(stored.bytes);
    for (const [reference, { bytes }] of repository) {
      if (bytes === stored.bytes && reference.startsWith("sha256:") && reference !== own) return reference;
    }
    return own;
  }

  #answerBlob(request: Request, digest: string, faults: Fault[]): Response {
    const bytes = this.#blobs.get(digest);
    if (bytes === undefined) return apiError(404, "BLOB_UNKNOWN", "blob unknown to registry");
    if (this.#origins.storage !== undefined) return this.#redirect(digest);
    const content = { bytes, digest, mediaType: "application/octet-stream", ranges: true };
    return deliver(request, content, { faults, closing: this.#closing.signal });
  }

  #redirect(digest: string): Response {
    const { signed = false, expiresIn = DEFAULT_SIGNATURE_SECONDS, uses = Infinity, status = 307 } = this.#storage;
    const url = new URL(`/data/${digest.replace(":", "/")}`, this.storageUrl);
    if (signed) {
      const signature = randomUUID();
      const expires = Date.now() + expiresIn * 1000;
      this.#signatures.set(signature, { subject: url.pathname, expires, usesLeft: uses });
      url.searchParams.set("X-Signature", signature);
      url.searchParams.set("expires", String(Math.floor(expires / 1000)));
    }
    return new Response(null, { status, headers: { location: url.href, ...API_VERSION } });
  }

  get #storage(): StorageOptions {
    const { storage } = this.#options;
    return typeof storage === "object" ? storage : {};
  }

  #answerStorage(request: Request, path: string, faults: Fault[]): Response {
    if (request.method !== "GET" && request.method !== "HEAD") return xmlError(405, "MethodNotAllowed");
    const digest = path.replace(/^\/data\//, "").replace("/", ":");
    const bytes = this.#blobs.get(digest);
    if (bytes === undefined) return xmlError(404, "NoSuchKey");
    // Object stores reject a signed URL together with Authorization; this detects a header that leaks.
    if (this.#storage.signed && request.headers.has("authorization")) return xmlError(400, "InvalidArgument");
    if (faultOf(faults, "expiredSignature") !== undefined || !this.#isSigned(request, path)) {
      return xmlError(403, "AccessDenied", "Request has expired");
    }
    const content = { bytes, digest, mediaType: "application/octet-stream", ranges: true };
    return deliver(request, content, { faults, closing: this.#closing.signal });
  }

  #isSigned(request: Request, path: string): boolean {
    if (!this.#storage.signed) return true;
    return useGrant(this.#signatures, new URL(request.url).searchParams.get("X-Signature") ?? "", path);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Authentication
  // -------------------------------------------------------------------------------------------------------------------

  #isAuthorized(request: Request, name: string): boolean {
    const [scheme, value = ""] = (request.headers.get("authorization") ?? "").split(" ");
    switch (this.#options.auth ?? "none") {
      case "none":
        return true;
      case "basic":
        return scheme?.toLowerCase() === "basic" && this.#isUser(value);
      case "bearer":
        return scheme?.toLowerCase() === "bearer" && useGrant(this.#tokens, value, scopeOf(name));
    }
  }

  /** Reports whether this is a user's `name:password` in base64. */
  #isUser(value: string): boolean {
    const text = Buffer.from(value, "base64").toString("utf8");
    const colon = text.indexOf(":");
    const password = Object.entries(this.#options.users ?? {}).find(([user]) => user === text.slice(0, colon))?.[1];
    return colon > 0 && password === text.slice(colon + 1);
  }

  #unauthorized(name: string): Response {
    const response = apiError(401, "UNAUTHORIZED", "authentication required");
    response.headers.set("www-authenticate", this.#challenge(scopeOf(name)));
    return response;
  }

  #challenge(scope: string): string {
    const { auth, challenge } = this.#options;
    const realm = this.tokenUrl === undefined ? SERVICE : `${this.tokenUrl}/token`;
    if (typeof challenge === "function") return challenge({ realm, service: SERVICE, scope });
    if (challenge !== undefined) return challenge;
    if (auth !== "bearer") return `Basic realm="${realm}"`;
    return `Bearer realm="${realm}",service="${SERVICE}"${scope && `,scope="${scope}"`}`;
  }

  async #answerToken(request: Request, logged: LoggedRequest): Promise<Response> {
    if (request.method === "POST") {
      logged.body = await request.text();
      return this.#answerTokenPost(new URLSearchParams(logged.body));
    }
    const { searchParams } = new URL(request.url);
    const [scheme, value = ""] = (request.headers.get("authorization") ?? "").split(" ");
    const needsUser = Object.keys(this.#options.users ?? {}).length > 0 || scheme !== "";
    if (needsUser && !(scheme?.toLowerCase() === "basic" && this.#isUser(value))) {
      return apiError(401, "UNAUTHORIZED", "incorrect username or password");
    }
    return this.#grantToken(searchParams.getAll("scope"), this.#options.tokenField ?? "token");
  }

  #answerTokenPost(form: URLSearchParams): Response {
    const { identityTokens = [] } = this.#options;
    if (identityTokens.length === 0) return apiError(405, "UNSUPPORTED", "The operation is unsupported.");
    const accepted = form.get("grant_type") === "refresh_token" &&
      identityTokens.includes(form.get("refresh_token") ?? "");
    if (!accepted) return apiError(401, "UNAUTHORIZED", "invalid refresh token");
    // OAuth 2 always calls the field `access_token` (RFC 6749, section 5.1).
    return this.#grantToken((form.get("scope") ?? "").split(" "), "access_token");
  }

  #grantToken(scopes: string[], field: "token" | "access_token"): Response {
    const { expiresIn } = this.#options;
    const token = randomUUID();
    const expires = Date.now() + (expiresIn ?? DEFAULT_TOKEN_SECONDS) * 1000;
    this.#tokens.set(token, { subject: scopes.join(" "), expires, usesLeft: Infinity });
    return Response.json({ [field]: token, ...(expiresIn !== undefined && { expires_in: expiresIn }) });
  }
}

interface Exchange {
  context: RequestContext;
  faults: Fault[];
  logged: LoggedRequest;
}

interface ManifestRequest {
  name: string;
  reference: string;
  faults: Fault[];
}

interface ReferrerEntry {
  mediaType: string;
  digest: string;
  size: number;
  artifactType?: string;
  annotations?: Record<string, string>;
}

/** The fields of a manifest that concern its referrers. */
interface ReferrerManifest {
  artifactType?: string;
  config?: { mediaType?: string };
  subject?: { digest?: string };
  annotations?: Record<string, string>;
}

/** Parses a manifest; tests also store bodies that are not JSON. */
function parseObject(bytes: Bytes): ReferrerManifest {
  try {
    return Object(JSON.parse(new TextDecoder().decode(bytes)));
  } catch {
    return {};
  }
}

const API_VERSION = { "docker-distribution-api-version": "registry/2.0" };

function apiError(status: number, code: string, message: string): Response {
  return Response.json({ errors: [{ code, message }] }, { status, headers: API_VERSION });
}

function xmlError(status: number, code: string, message: string = code): Response {
  const body =
    `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>${code}</Code><Message>${message}</Message></Error>`;
  return new Response(body, { status, headers: { "content-type": "application/xml" } });
}

function scopeOf(name: string): string {
  return name && `repository:${name}:pull`;
}

/** Reports whether this secret is valid for the subject, and uses up one of its requests. */
function useGrant(grants: Map<string, Grant>, secret: string, subject: string): boolean {
  const grant = grants.get(secret);
  if (grant === undefined || grant.expires <= Date.now() || grant.usesLeft <= 0) return false;
  if (subject !== "" && !grant.subject.split(" ").includes(subject)) return false;
  grant.usesLeft--;
  return true;
}

function faultOf<K extends Fault["kind"]>(faults: Fault[], kind: K): Extract<Fault, { kind: K }> | undefined {
  return faults.find((fault): fault is Extract<Fault, { kind: K }> => fault.kind === kind);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies: which bytes are sent, and how fast
// ---------------------------------------------------------------------------------------------------------------------

interface Content {
  bytes: Bytes;
  digest: string;
  mediaType: string;
  ranges: boolean;
}

interface Conditions {
  faults: Fault[];
  closing: AbortSignal;
}

/** Bytes from `start` up to but not including `end`. */
interface Segment {
  start: number;
  end: number;
}

function deliver(request: Request, content: Content, { faults, closing }: Conditions): Response {
  const { bytes, digest, mediaType, ranges } = content;
  const etag = `"${digest}"`;
  const headers = new Headers({ ...API_VERSION, "content-type": mediaType, "docker-content-digest": digest, etag });
  if (ranges) headers.set("accept-ranges", "bytes");
  const asked = ranges && faultOf(faults, "ignoreRange") === undefined
    ? requestedSegment(request.headers, bytes.length, etag)
    : undefined;
  if (asked === "unsatisfiable") {
    headers.set("content-range", `bytes */${bytes.length}`);
    return new Response(null, { status: 416, headers });
  }

  let segment = { start: 0, end: bytes.length };
  if (asked !== undefined) {
    const wrong = faultOf(faults, "wrongRange");
    segment = shifted(asked, wrong?.shift ?? 0, bytes.length);
    const { start, end } = wrong?.claim === "asked" ? asked : segment;
    headers.set("content-range", `bytes ${start}-${end - 1}/${wrong?.total ?? bytes.length}`);
  }
  const body = faultyBytes(bytes, segment, faults);
  if (!faultOf(faults, "short")?.chunked) headers.set("content-length", String(body.length));
  const stream = request.method === "HEAD" ? null : flow(body, { faults, closing });
  return new Response(stream, { status: asked === undefined ? 200 : 206, headers });
}

/** Returns the requested range; undefined for all bytes, or if `If-Range` does not match. */
function requestedSegment(headers: Headers, size: number, etag: string): Segment | "unsatisfiable" | undefined {
  const match = /^bytes=(\d*)-(\d*)$/.exec(headers.get("range")?.trim() ?? "");
  const [, first = "", last = ""] = match ?? [];
  if (match === null || first + last === "") return undefined;
  if ((headers.get("if-range") ?? etag) !== etag) return undefined;
  if (first === "") {
    // "-N" is the last N bytes.
    return Number(last) === 0 ? "unsatisfiable" : { start: Math.max(0, size - Number(last)), end: size };
  }
  const start = Number(first);
  const end = last === "" ? size : Math.min(Number(last) + 1, size);
  if (last !== "" && Number(last) < start) return undefined;
  return start >= size ? "unsatisfiable" : { start, end };
}

/** Moves a segment, and keeps at least one byte of it within the blob. */
function shifted({ start, end }: Segment, shift: number, size: number): Segment {
  const moved = Math.min(Math.max(start + shift, 0), size - 1);
  return { start: moved, end: Math.min(Math.max(end + shift, moved + 1), size) };
}

function faultyBytes(bytes: Bytes, { start, end }: Segment, faults: Fault[]): Bytes {
  const body = bytes.subarray(start, Math.min(end, start + (faultOf(faults, "short")?.byte ?? Infinity)));
  const flips = faults.filter((fault) => fault.kind === "flipBit").map(({ byte }) => byte - start)
    .filter((at) => at >= 0 && at < body.length);
  if (flips.length === 0) return body;
  const flipped = body.slice();
  for (const at of flips) flipped[at] = (flipped[at] ?? 0) ^ 1;
  return flipped;
}

/** Streams a body. `Deno.serve` drops the connection if a body is shorter than its Content-Length. */
function flow(body: Bytes, { faults, closing }: Conditions): ReadableStream<Bytes> {
  const dieAt = faultOf(faults, "dieAt")?.byte ?? Infinity;
  const stallAt = faultOf(faults, "stall")?.byte ?? Infinity;
  const rate = faultOf(faults, "trickle")?.bytesPerSecond ?? Infinity;
  const end = Math.min(body.length, dieAt, stallAt);
  const stalls = stallAt === end && end < Math.min(body.length, dieAt);
  // Ten chunks per second resemble a slow connection, not one with interruptions.
  const step = Math.max(1, Math.min(CHUNK_BYTES, Math.floor(rate / 10)));
  const gone = new AbortController();
  const over = AbortSignal.any([closing, gone.signal]);
  let sent = 0;
  return new ReadableStream<Bytes>({
    async pull(controller) {
      if (sent === end && stalls) await untilAborted(over);
      if (sent > 0 && rate < Infinity && sent < end) await pause(step / rate * 1000, over);
      if (gone.signal.aborted) return;
      if (sent === end || closing.aborted) return controller.close();
      const chunk = body.subarray(sent, Math.min(sent + step, end));
      sent += chunk.length;
      controller.enqueue(chunk);
    },
    cancel() {
      gone.abort();
    },
  }, { highWaterMark: 0 });
}

async function untilAborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

async function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  // The caller checks the signal.
  await delay(milliseconds, undefined, { signal }).catch(() => {});
}

// ---------------------------------------------------------------------------------------------------------------------
// Origins: a server behind a relay that can drop connections
// ---------------------------------------------------------------------------------------------------------------------

type Handler = (request: Request, drop: () => void) => Promise<Response>;

interface Connection {
  client: Deno.TcpConn;
  server: Deno.TcpConn;
}

class Origin {
  readonly host: string;
  readonly url: string;
  readonly #server: Deno.HttpServer<Deno.NetAddr>;
  readonly #listener: Deno.TcpListener;
  /** Keyed by the relay's port, which the server sees as the client's. */
  readonly #connections = new Map<number, Connection>();
  readonly #relays = new Set<Promise<void>>();
  readonly #accepting: Promise<void>;
  #closed = false;

  constructor(tls: Certificate | undefined, handler: Handler) {
    const options = { hostname: "127.0.0.1", port: 0, onListen: () => {} };
    this.#server = Deno.serve(
      tls === undefined ? options : { ...options, ...tls },
      (request, info) => handler(request, () => this.#drop(info.remoteAddr.port)),
    );
    this.#listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    this.host = `127.0.0.1:${this.#listener.addr.port}`;
    this.url = `${tls === undefined ? "http" : "https"}://${this.host}`;
    this.#accepting = this.#accept();
  }

  dropAll(): void {
    for (const port of this.#connections.keys()) this.#drop(port);
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#listener.close();
    this.dropAll();
    await this.#accepting;
    await Promise.all(this.#relays);
    await this.#server.shutdown();
  }

  #drop(port: number): void {
    const connection = this.#connections.get(port);
    if (connection === undefined) return;
    this.#connections.delete(port);
    for (const side of [connection.client, connection.server]) closeQuietly(side);
  }

  async #accept(): Promise<void> {
    for await (const client of this.#listener) {
      const relay = this.#relay(client).finally(() => this.#relays.delete(relay));
      this.#relays.add(relay);
    }
  }

  async #relay(client: Deno.TcpConn): Promise<void> {
    const server = await Deno.connect({ hostname: "127.0.0.1", port: this.#server.addr.port });
    const { port } = server.localAddr;
    this.#connections.set(port, { client, server });
    if (this.#closed) return this.#drop(port);
    client.setNoDelay();
    server.setNoDelay();
    // Close both sides when either ends, because HTTP does not use half-closed connections.
    const done = () => this.#drop(port);
    await Promise.all([copyBytes(client, server).finally(done), copyBytes(server, client).finally(done)]);
  }
}

/** Copies bytes until either connection ends. */
export async function copyBytes(from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
  const buffer = new Uint8Array(4 * CHUNK_BYTES);
  try {
    for (let length = await from.read(buffer); length !== null; length = await from.read(buffer)) {
      for (let at = 0; at < length;) at += await to.write(buffer.subarray(at, length));
    }
  } catch {
    // The other direction, a fault or the client closed the connection.
  }
}

/** Closes a connection that may already be closed. */
export function closeQuietly(connection: Deno.TcpConn): void {
  try {
    connection.close();
  } catch {
    // Already closed.
  }
}
