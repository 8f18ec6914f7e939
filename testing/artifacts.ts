/**
 * Makers of OCI artifacts as `oras push` writes them, and of image signatures as cosign writes them, right and wrong.
 *
 * Artifacts are deterministic. Keys are made for each run, so signatures are not.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import {
  type Bytes,
  concat,
  type DescriptorFields,
  gzip,
  type MadeImage,
  makeIndex,
  makeTar,
  MEDIA,
  type PlatformFields,
  sha256,
  type TarMember,
  toBytes,
} from "./images.ts";
import type { TestRegistry } from "./registry.ts";

/** Media types of artifacts and signatures. */
export const ARTIFACT_MEDIA = {
  empty: "application/vnd.oci.empty.v1+json",
  /** The artifact type that oras writes if none is given. */
  unknown: "application/vnd.unknown.artifact.v1",
  bundle: "application/vnd.dev.sigstore.bundle.v0.3+json",
  simpleSigning: "application/vnd.dev.cosign.simplesigning.v1+json",
  statement: "application/vnd.in-toto+json",
} as const;

/** Annotations of layers. */
export const ANNOTATION = {
  title: "org.opencontainers.image.title",
  unpack: "io.deis.oras.content.unpack",
  contentDigest: "io.deis.oras.content.digest",
  signature: "dev.cosignproject.cosign/signature",
} as const;

const PREDICATE_TYPE = "https://sigstore.dev/cosign/sign/v1";

// ---------------------------------------------------------------------------------------------------------------------
// Artifacts
// ---------------------------------------------------------------------------------------------------------------------

/** One layer of an artifact: a file, or a directory as a tar.gz. */
export interface ArtifactLayer {
  /** The path of the file; without a title the layer has no name. */
  title?: string;
  data: string | Uint8Array;
  /** @default "application/vnd.oci.image.layer.v1.tar", which oras writes for every file */
  mediaType?: string;
  /** Annotations besides the title. */
  annotations?: Record<string, string>;
  /** The digest in the manifest. @default the digest of `data` */
  digest?: string;
  /** The size in the manifest. @default the size of `data` */
  size?: number;
}

/** Parts of an artifact. */
export interface ArtifactFields {
  layers: ArtifactLayer[];
  /** `null` leaves the field out, as `oras push --image-spec v1.0` does. @default `ARTIFACT_MEDIA.unknown` */
  artifactType?: string | null;
  /** @default the empty config */
  config?: { mediaType: string; data: string | Uint8Array };
  /** The platform in an index's entry. */
  platform?: PlatformFields;
  /** The manifest that this one refers to. */
  subject?: DescriptorFields;
  annotations?: Record<string, string>;
}

/** An artifact or a signature, ready to be pushed; the entry for an index has its artifact type. */
export interface MadeArtifact extends MadeImage {
  descriptor: DescriptorFields & { artifactType?: string };
}

/** Makes an artifact as `oras push` does. */
export function makeArtifact(fields: ArtifactFields): MadeArtifact {
  const { artifactType = ARTIFACT_MEDIA.unknown, platform, subject, annotations } = fields;
  const { mediaType: configType, data } = fields.config ?? { mediaType: ARTIFACT_MEDIA.empty, data: "{}" };
  const config = toBytes(data);
  const blobs = new Map([[sha256(config), config]]);
  const layers = fields.layers.map((layer) => {
    const bytes = toBytes(layer.data);
    const digest = layer.digest ?? sha256(bytes);
    blobs.set(digest, bytes);
    return {
      mediaType: layer.mediaType ?? MEDIA.ociLayer,
      digest,
      size: layer.size ?? bytes.length,
      annotations: { ...layer.annotations, ...(layer.title !== undefined && { [ANNOTATION.title]: layer.title }) },
    };
  });
  const manifest = toJson({
    schemaVersion: 2,
    mediaType: MEDIA.ociManifest,
    ...(artifactType !== null && { artifactType }),
    config: { mediaType: configType, digest: sha256(config), size: config.length },
    layers,
    ...(subject && { subject: { mediaType: subject.mediaType, digest: subject.digest, size: subject.size } }),
    ...(annotations && { annotations }),
  });
  const descriptor = {
    mediaType: MEDIA.ociManifest,
    digest: sha256(manifest),
    size: manifest.length,
    ...(artifactType !== null && { artifactType }),
    ...(platform && { platform }),
    ...(annotations && { annotations }),
  };
  return { manifest, mediaType: MEDIA.ociManifest, digest: descriptor.digest, config, blobs, descriptor };
}

/** Makes the layer that `oras push TITLE/` writes for a directory. The members' names begin with the title. */
export async function makeDirectoryLayer(
  title: string,
  members: TarMember[],
  options: { contentDigest?: string } = {},
): Promise<ArtifactLayer> {
  const named = members.map((member) => ({ ...member, name: `${title}/${member.name}` }));
  const tar = await makeTar([{ name: `${title}/`, type: "directory" }, ...named]);
  const { contentDigest = sha256(tar) } = options;
  return {
    title,
    data: gzip(tar),
    mediaType: MEDIA.ociLayerGzip,
    annotations: { [ANNOTATION.contentDigest]: contentDigest, [ANNOTATION.unpack]: "true" },
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys
// ---------------------------------------------------------------------------------------------------------------------

/** Every kind of key and hash that cosign signs with. cosign itself uses both hashes with P-384. */
export const KEY_KINDS = ["P-256", "P-384", "P-384 with SHA-256", "RSA", "Ed25519"] as const;

/** One of `KEY_KINDS`. */
export type KeyKind = typeof KEY_KINDS[number];

/** A key pair. */
export interface SigningKey {
  /** The public key as PEM SPKI, which `--verify-key` reads. */
  pem: string;
  /** The private key as PEM PKCS #8, which `--verify-key` must reject. */
  privatePem: string;
  /** What cosign calls the key in a bundle: the SHA-256 of the public key, in base64. */
  hint: string;
  /** Signs these bytes; returns base64. */
  sign(bytes: Uint8Array): string;
}

/** Makes a key pair. */
export function makeKey(kind: KeyKind): SigningKey {
  const { publicKey, privateKey } = makeKeyPair(kind);
  const spki = publicKey.export({ format: "der", type: "spki" });
  return {
    pem: publicKey.export({ format: "pem", type: "spki" }).toString(),
    privatePem: privateKey.export({ format: "pem", type: "pkcs8" }).toString(),
    hint: createHash("sha256").update(spki).digest("base64"),
    sign: (bytes) => sign(HASHES[kind], bytes, privateKey).toString("base64"),
  };
}

const HASHES: Record<KeyKind, string | null> = {
  "P-256": "sha256",
  "P-384": "sha384",
  "P-384 with SHA-256": "sha256",
  "RSA": "sha256",
  "Ed25519": null,
};

function makeKeyPair(kind: KeyKind): { publicKey: KeyObject; privateKey: KeyObject } {
  switch (kind) {
    case "P-256":
      return generateKeyPairSync("ec", { namedCurve: "P-256" });
    case "P-384":
    case "P-384 with SHA-256":
      return generateKeyPairSync("ec", { namedCurve: "P-384" });
    case "RSA":
      return generateKeyPairSync("rsa", { modulusLength: 2048 });
    case "Ed25519":
      return generateKeyPairSync("ed25519");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Signatures
// ---------------------------------------------------------------------------------------------------------------------

/** How a signature is stored: as cosign 3 does, or as cosign 1 and 2 did. */
export type SignatureFormat = "bundle" | "simplesigning";

/** A parsed JSON document that a test changes. */
// deno-lint-ignore no-explicit-any
export type Json = any;

/**
 * Changes to a signature, in the order in which they are made. `raw` and `served` return new bytes; the other functions
 * change their argument. Changes before signing make a valid signature of something else.
 */
export interface SignatureChanges {
  /** Changes the in-toto statement, or the payload of simple signing, before it is signed. */
  payload?: (payload: Json) => void;
  /** Text to sign instead of the statement or the payload. */
  text?: string;
  /** Type of the payload in the DSSE envelope, which is signed together with the payload. */
  payloadType?: string;
  /** Changes the DSSE envelope, or `{ signature, payload }` of simple signing, after signing. */
  signed?: (signed: Json) => void;
  /** Changes the bundle. */
  bundle?: (bundle: Json) => void;
  /** Replaces the blob; the descriptor matches. */
  raw?: (bytes: Bytes) => Uint8Array;
  /** Replaces the blob; the descriptor is still that of the original. */
  served?: (bytes: Bytes) => Uint8Array;
  /** Changes the manifest. */
  manifest?: (manifest: Json) => void;
}

/** Signatures that must be rejected. Signatures of other keys, of other images and of none are not among them. */
// deno-fmt-ignore
export const WRONG_SIGNATURES: Record<SignatureFormat, Record<string, SignatureChanges>> = {
  bundle: {
    "an empty signature": { signed: ({ signatures }) => signatures[0].sig = "" },
    "a signature that is not base64": { signed: ({ signatures }) => signatures[0].sig = "not base64!" },
    "a signature of three bytes": { signed: ({ signatures }) => signatures[0].sig = "AAAA" },
    "no signature in the envelope": { signed: (envelope) => envelope.signatures = [] },
    "another payload type, signed": { payloadType: "application/json" },
    "another payload type, not signed": { signed: (envelope) => envelope.payloadType = "application/json" },
    "another predicate": { payload: (statement) => statement.predicateType = "https://slsa.dev/provenance/v1" },
    "no predicate": { payload: (statement) => delete statement.predicateType },
    "a subject without a sha256": { payload: ({ subject }) => subject[0].digest = { sha512: `${"01".repeat(64)}` } },
    "a statement without a subject": { payload: (statement) => delete statement.subject },
    "a statement that is null": { text: "null" },
    "a subject that is null": { payload: (statement) => statement.subject = [null] },
    "a statement that is not JSON": { text: "{" },
    "a bundle that is not what its descriptor says": { served: (bytes) => concat(bytes, " ") },
    "a bundle that is not JSON": { raw: () => toBytes("{") },
    "a bundle that is null": { raw: () => toBytes("null") },
    "a bundle without an envelope": { bundle: (bundle) => delete bundle.dsseEnvelope },
    "an envelope that is empty": { bundle: (bundle) => bundle.dsseEnvelope = {} },
    "an envelope whose signature is null": { signed: (envelope) => envelope.signatures = [null] },
    "a referrer of another type": { manifest: (it) => it.artifactType = it.layers[0].mediaType = "text/spdx" },
    "a referrer without layers": { manifest: (manifest) => manifest.layers = [] },
    "a media type that is not text": { manifest: (it) => it.artifactType = it.layers[0].mediaType = 5 },
  },
  simplesigning: {
    "an empty signature": { signed: (signed) => signed.signature = "" },
    "a signature that is not base64": { signed: (signed) => signed.signature = "not base64!" },
    "a changed payload with a descriptor to match": { raw: (bytes) => concat(bytes, " ") },
    "another type of claim": { payload: ({ critical }) => critical.type = "atomic container signature" },
    "no type of claim": { payload: ({ critical }) => delete critical.type },
    "a payload without an image": { payload: ({ critical }) => delete critical.image },
    "a payload that is null": { text: "null" },
    "a payload that is not JSON": { text: "cosign container image signature" },
    "no annotation": { manifest: ({ layers }) => delete layers[0].annotations },
    "an annotation that is not text": { manifest: ({ layers }) => layers[0].annotations[ANNOTATION.signature] = 5 },
    "a layer of another type": { manifest: ({ layers }) => layers[0].mediaType = "text/plain" },
    "a manifest without layers": { manifest: (manifest) => manifest.layers = [] },
  },
};

/** Parts of a signature. */
export interface SignatureFields {
  subject: DescriptorFields;
  key: SigningKey;
  format: SignatureFormat;
  change?: SignatureChanges;
}

/** Makes the manifest and the blob of a signature. */
export function makeSignature(fields: SignatureFields): MadeArtifact {
  return fields.format === "bundle" ? makeBundle(fields) : makeSimpleSignature(fields);
}

function makeBundle({ subject, key, change = {} }: SignatureFields): MadeArtifact {
  const [algorithm = "", hex = ""] = subject.digest.split(":");
  const statement = {
    _type: "https://in-toto.io/Statement/v1",
    subject: [{ digest: { [algorithm]: hex } }],
    predicateType: PREDICATE_TYPE,
    predicate: {},
  };
  change.payload?.(statement);
  const payload = toBytes(change.text ?? JSON.stringify(statement));
  const payloadType = change.payloadType ?? ARTIFACT_MEDIA.statement;
  const envelope = {
    payload: Buffer.from(payload).toString("base64"),
    payloadType,
    signatures: [{ sig: key.sign(dsseBytes(payloadType, payload)) }],
  };
  change.signed?.(envelope);
  const bundle = {
    mediaType: ARTIFACT_MEDIA.bundle,
    verificationMaterial: { publicKey: { hint: key.hint } },
    dsseEnvelope: envelope,
  };
  change.bundle?.(bundle);
  const annotations = {
    "dev.sigstore.bundle.content": "dsse-envelope",
    "dev.sigstore.bundle.predicateType": PREDICATE_TYPE,
    "org.opencontainers.image.created": "2024-01-01T00:00:00Z",
  };
  const layer = { data: toJson(bundle), mediaType: ARTIFACT_MEDIA.bundle };
  return finish(change, { layers: [layer], artifactType: ARTIFACT_MEDIA.bundle, subject, annotations });
}

/** What a DSSE signature covers ("pre-authentication encoding"). */
function dsseBytes(type: string, payload: Uint8Array): Bytes {
  const head = `DSSEv1 ${Buffer.byteLength(type)} ${type} ${payload.length} `;
  return toBytes(Buffer.concat([Buffer.from(head), payload]));
}

function makeSimpleSignature({ subject, key, change = {} }: SignatureFields): MadeArtifact {
  const payload = {
    critical: {
      identity: { "docker-reference": "" },
      image: { "docker-manifest-digest": subject.digest },
      type: "cosign container image signature",
    },
    optional: null,
  };
  change.payload?.(payload);
  const text = change.text ?? JSON.stringify(payload);
  const signed = { payload: text, signature: key.sign(toBytes(text)) };
  change.signed?.(signed);
  const annotations = { [ANNOTATION.signature]: signed.signature };
  const layer = { data: toBytes(signed.payload), mediaType: ARTIFACT_MEDIA.simpleSigning, annotations };
  const rootfs = { type: "layers", diff_ids: [sha256(layer.data)] };
  const config = { mediaType: MEDIA.ociConfig, data: JSON.stringify({ architecture: "", os: "", rootfs }) };
  return finish(change, { layers: [layer], artifactType: null, config });
}

/** Makes the artifact, and applies the changes that concern its bytes and its manifest. */
function finish(change: SignatureChanges, fields: ArtifactFields): MadeArtifact {
  const layers = fields.layers.map((layer) => {
    const bytes = toBytes(layer.data);
    const written = toBytes(change.raw?.(bytes) ?? bytes);
    const data = change.served?.(written) ?? written;
    return { ...layer, data, digest: sha256(written), size: written.length };
  });
  const artifact = makeArtifact({ ...fields, layers });
  if (change.manifest === undefined) return artifact;
  const parsed = JSON.parse(new TextDecoder().decode(artifact.manifest));
  change.manifest(parsed);
  const manifest = toJson(parsed);
  const { artifactType } = parsed;
  const descriptor = { ...artifact.descriptor, digest: sha256(manifest), size: manifest.length, artifactType };
  return { ...artifact, manifest, digest: descriptor.digest, descriptor };
}

/** The tag that holds the signatures of a digest: an index of bundles, or the manifest of simple signatures. */
export function signatureTag(digest: string, format: SignatureFormat): string {
  const tag = digest.replace(":", "-");
  return format === "bundle" ? tag : `${tag}.sig`;
}

/**
 * Stores signatures of one subject. Bundles are found by the referrers API; if the registry has none, also by the
 * fallback tag. A simple signature stands in the manifest that its tag names.
 */
export function pushSignatures(
  registry: TestRegistry,
  repository: string,
  { subject, format, signatures }: { subject: string; format: SignatureFormat; signatures: MadeArtifact[] },
): void {
  for (const signature of signatures) registry.pushImage(repository, signature.digest, signature);
  const [only] = signatures;
  if (only === undefined) return;
  const tag = signatureTag(subject, format);
  if (format === "simplesigning") {
    registry.pushImage(repository, tag, only);
    return;
  }
  if (registry.hasReferrers) return;
  const index = makeIndex(signatures.map(({ descriptor }) => descriptor));
  registry.pushManifest(repository, tag, index.manifest, index.mediaType);
}

function toJson(value: unknown): Bytes {
  return toBytes(JSON.stringify(value));
}
