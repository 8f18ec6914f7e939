/**
 * Certificates for test servers, made by `openssl`.
 *
 * @module
 */

import { join } from "node:path";

/** A certificate and its private key, both in PEM. */
export interface Certificate {
  cert: string;
  key: string;
}

/** A certificate that an authority has signed. */
export interface SignedCertificate extends Certificate {
  /** Certificate of the authority in PEM, for `--ca-file`. */
  ca: string;
}

const LOCAL_NAMES = ["localhost", "127.0.0.1"];
const DAYS_VALID = "30";

let ownAuthority: Promise<Certificate> | undefined;

/**
 * Returns a self-signed certificate for localhost and 127.0.0.1 that is its own authority; made once per process.
 * OpenSSL accepts such a certificate if it is trusted; rustls rejects every authority as a server's certificate.
 */
export function makeCertificate(): Promise<Certificate> {
  ownAuthority ??= makeAuthority("localhost", LOCAL_NAMES);
  return ownAuthority;
}

/** Makes an authority and a certificate that it signed for these names and addresses. */
export async function makeSignedCertificate(names: string[] = LOCAL_NAMES): Promise<SignedCertificate> {
  const authority = await makeAuthority("test authority");
  const { cert, key } = await issue({ subject: "signed", names, isAuthority: false, authority });
  return { cert, key, ca: authority.cert };
}

/** Makes a self-signed authority; with names it can also be a server's certificate. */
export function makeAuthority(subject: string, names: string[] = []): Promise<Certificate> {
  return issue({ subject, names, isAuthority: true });
}

/** Returns a bundle of PEM certificates with a comment before each, as distributions write them. */
export function makeBundle(...certificates: string[]): string {
  return certificates.map((pem, at) => `# Authority ${at + 1}\n${pem.trim()}\n`).join("\n");
}

interface Issue {
  /** Common name. */
  subject: string;
  /** Host names and addresses. */
  names: string[];
  isAuthority: boolean;
  /** Signer; without one, the certificate is self-signed. */
  authority?: Certificate;
}

async function issue({ subject, names, isAuthority, authority }: Issue): Promise<Certificate> {
  const directory = await Deno.makeTempDir();
  try {
    const [cert, key, signer] = [join(directory, "cert.pem"), join(directory, "key.pem"), join(directory, "ca.pem")];
    // deno-fmt-ignore
    const args = [
      "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", DAYS_VALID,
      "-subj", `/CN=${subject}`, "-addext", `basicConstraints=critical,CA:${isAuthority ? "TRUE" : "FALSE"}`,
      "-keyout", key, "-out", cert,
    ];
    if (names.length > 0) args.push("-addext", `subjectAltName=${names.map(alternativeName).join(",")}`);
    if (authority !== undefined) {
      await Deno.writeTextFile(signer, `${authority.cert}${authority.key}`);
      args.push("-CA", signer, "-CAkey", signer);
    }
    const { success, stderr } = await new Deno.Command("openssl", { args, stdin: "null" }).output();
    if (!success) throw new Error(`openssl failed: ${new TextDecoder().decode(stderr)}`);
    return { cert: await Deno.readTextFile(cert), key: await Deno.readTextFile(key) };
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

function alternativeName(name: string): string {
  const isAddress = name.includes(":") || /^[\d.]+$/.test(name);
  return `${isAddress ? "IP" : "DNS"}:${name}`;
}
