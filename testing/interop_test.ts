/**
 * Compares fetch_wheels with the programs that write archives and images: GNU tar, bsdtar, Python, Go, oras, crane and
 * skopeo. Also a real registry behind real proxies. A test whose program is not installed is ignored.
 *
 * @module
 */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { fetchWheels, type FetchWheelsOptions } from "../fetch_wheels.ts";
import { makeSignedCertificate } from "./certificates.ts";
import {
  gzip,
  type MadeImage,
  makeImage,
  makeIndex,
  makeOciArchive,
  makeTar,
  makeWheel,
  MEDIA,
  toBytes,
} from "./images.ts";
import { run, runProgram } from "./program.ts";
import { isInPath, pushByApi, startDockerRegistry, startNginx, startProxy, startTinyproxy } from "./proxies.ts";
import { Scratch, snapshot } from "./scratch.ts";

/** Runs a program that must succeed; returns its output. */
async function execute([program = "", ...args]: string[], cwd?: string): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, { args, cwd, stdin: "null" }).output();
  assert(success, `${program} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
  return new TextDecoder().decode(stdout).trim();
}

const WRITE_WITH_PYTHON = `
import os, sys, tarfile
form, out = sys.argv[1:]
with tarfile.open(out, "w", format=getattr(tarfile, form + "_FORMAT")) as archive:
    for directory, directories, files in sorted(os.walk(".")):
        for name in sorted(directories + files):
            try:
                info = archive.gettarinfo(os.path.join(directory, name))
                info.uid = info.gid = 1000 if form == "USTAR" else 3_000_000
                archive.addfile(info, open(info.name, "rb") if info.isreg() else None)
            except ValueError:
                assert form == "USTAR"
`;

const WRITE_WITH_GO = `
package main

import (
	"archive/tar"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

func main() {
	formats := map[string]tar.Format{"USTAR": tar.FormatUSTAR, "PAX": tar.FormatPAX, "GNU": tar.FormatGNU}
	out, _ := os.Create(os.Args[2])
	archive := tar.NewWriter(out)
	filepath.Walk(".", func(path string, info fs.FileInfo, err error) error {
		target, _ := os.Readlink(path)
		header, _ := tar.FileInfoHeader(info, target)
		header.Name, header.Format = path, formats[os.Args[1]]
		if os.Args[1] != "USTAR" {
			header.Uid, header.Gid = 3000000, 3000000
		}
		if os.Args[1] != "PAX" {
			header.ModTime = header.ModTime.Truncate(time.Second)
			header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
		}
		if info.IsDir() {
			header.Name += "/"
		}
		if path == "hard.whl" {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, "a.whl", 0
		}
		if archive.WriteHeader(header) == nil && header.Typeflag == tar.TypeReg {
			data, _ := os.ReadFile(path)
			archive.Write(data)
		}
		return nil
	})
	if archive.Close() != nil {
		os.Exit(1)
	}
}
`;

/** Makes a tree with what a format may not support: long names and links, non-ASCII names, unusual times. */
function makeTree(scratch: Scratch): void {
  const long = `${"directory/".repeat(20)}${"n".repeat(120)}.whl`;
  const names = ["a.whl", "sub/dir/deep.whl", "käse-寿司.whl", "old.whl", "new.whl", long, `${"d".repeat(90)}/f`];
  for (const name of names) Deno.chmodSync(scratch.at(`tree/${name}`, name), 0o644);
  Deno.writeFileSync(scratch.at("tree/large.bin"), new Uint8Array(randomBytes(300_000)), { mode: 0o600 });
  Deno.writeFileSync(scratch.at("tree/empty.txt"), new Uint8Array(), { mode: 0o600 });
  Deno.linkSync(scratch.at("tree/a.whl"), scratch.at("tree/hard.whl"));
  Deno.linkSync(scratch.at(`tree/${long}`), scratch.at("tree/hard-long.whl"));
  Deno.symlinkSync("../a.whl", scratch.at("tree/sub/link.whl"));
  Deno.symlinkSync(`../${long}`, scratch.at("tree/sub/long-link.whl"));
  Deno.chmodSync(scratch.at("tree/sub/dir/deep.whl"), 0o755);
  Deno.utimeSync(scratch.at("tree/old.whl"), -86_400, -86_400);
  Deno.utimeSync(scratch.at("tree/new.whl"), 9e9, 9e9);
}

/** A snapshot with the times of files in seconds. */
function timedSnapshot(dir: string): Record<string, string> {
  const time = (path: string) => Math.floor(Number(Deno.statSync(join(dir, path)).mtime) / 1000);
  const entries = Object.entries(snapshot(dir));
  return Object.fromEntries(entries.map(([path, entry]) => {
    if (entry.startsWith("directory")) return [path, "directory"];
    return [path, entry.startsWith("file") ? `${entry} ${time(path)}` : entry];
  }));
}

/** A program that writes archives. `command` writes the tree in the current directory. */
interface ArchiveWriter {
  isInstalled: boolean;
  formats: string[];
  command: (format: string, out: string, scratch: Scratch) => string[];
}

/** An owner that v7 and ustar can represent, or one that they cannot. */
const ownerFor = (format: string) => /v7|ustar/.test(format) ? 1 : 3_000_000;

const WRITERS: Record<string, ArchiveWriter> = {
  "GNU tar": {
    isInstalled: isInPath("tar"),
    formats: ["v7", "oldgnu", "gnu", "ustar", "posix"],
    command: (format, out) => ["tar", `--format=${format}`, `--owner=a:${ownerFor(format)}`, "-cf", out, "."],
  },
  "bsdtar": {
    isInstalled: isInPath("bsdtar"),
    formats: ["v7", "ustar", "gnutar", "pax"],
    command: (format, out) => ["bsdtar", `--format=${format}`, `--uid=${ownerFor(format)}`, "-cf", out, "."],
  },
  "Python": {
    isInstalled: isInPath("python3"),
    formats: ["USTAR", "GNU", "PAX"],
    command: (format, out) => ["python3", "-c", WRITE_WITH_PYTHON, format, out],
  },
  "Go": {
    isInstalled: isInPath("go"),
    formats: ["USTAR", "GNU", "PAX"],
    command: (format, out, scratch) => ["go", "run", scratch.at("main.go", WRITE_WITH_GO), format, out],
  },
};

for (const [program, { isInstalled, formats, command }] of Object.entries(WRITERS)) {
  Deno.test({
    name: `archives of ${program} are listed and extracted as GNU tar extracts them`,
    ignore: !isInstalled || !isInPath("tar"),
    async fn(t) {
      for (const format of formats) {
        await t.step(format, async () => {
          using scratch = new Scratch();
          makeTree(scratch);
          const [out, reference] = [scratch.at("out.tar"), scratch.at("reference")];
          Deno.mkdirSync(reference);
          const run = ([name = "", ...args]: string[], cwd: string) =>
            new Deno.Command(name, { args, cwd, env: { LC_ALL: "C.UTF-8", GO111MODULE: "off" } }).outputSync();
          // A program that cannot represent a member in this format omits it and continues.
          const { stderr } = run(command(format, out, scratch), scratch.at("tree"));
          run(["tar", "--no-same-owner", "-xpf", out], reference);
          const expected = timedSnapshot(reference);
          const isComplete = /gnu|pax|posix/i.test(format);
          const least = isComplete ? Object.keys(snapshot(scratch.at("tree"))).length : 8;
          assert(Object.keys(expected).length >= least, new TextDecoder().decode(stderr));
          const { files } = await fetchWheels(out, { dest: scratch.at("dest") });
          assert.deepEqual(timedSnapshot(scratch.at("dest")), expected);
          const names = Object.keys(expected).filter((path) => expected[path] !== "directory").sort();
          assert.deepEqual(files.map(({ path }) => path).sort(), names);
          const list = await fetchWheels(out, { list: true });
          assert.deepEqual(list.files.map(({ path }) => path).sort(), names);
        });
      }
    },
  });
}

const PLAIN = { platform: "linux/amd64", protocol: "http" } as const;

Deno.test({
  name: "what oras pushes is what oras pulls",
  ignore: !isInPath("oras") || !isInPath("docker-registry"),
  async fn(t) {
    using scratch = new Scratch();
    await using registry = await startDockerRegistry();
    const names = ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl", "notes.txt", "dir/deep/c.txt"];
    for (const name of names) scratch.at(`work/${name}`, name);
    Deno.symlinkSync("c.txt", scratch.at("work/dir/deep/link"));
    const oras = (...args: string[]) => execute(["oras", ...args], scratch.at("work"));
    const at = (tag: string) => `${registry.host}/ns/artifact:${tag}`;
    const files = ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl:application/x-wheel", "notes.txt", "dir/"];
    const typed = ["--artifact-type", "application/vnd.example.wheels"];
    const table: [tag: string, args: string[]][] = [
      ["plain", []],
      ["typed", typed],
      ["old", ["--image-spec", "v1.0"]],
      ["amd64", ["--artifact-platform", "linux/amd64", ...typed]],
    ];
    for (const [tag, args] of table) {
      await t.step([tag, ...args].join(" "), async () => {
        await oras("push", "--plain-http", ...args, at(tag), ...files);
        await oras("pull", "--plain-http", "-o", scratch.at(`${tag}/oras`), at(tag));
        await fetchWheels(at(tag), { ...PLAIN, dest: scratch.at(`${tag}/dest`) });
        const [actual, expected] = ["dest", "oras"].map((name) => {
          const entries = Object.entries(snapshot(scratch.at(`${tag}/${name}`)));
          return Object.fromEntries(entries.map(([path, entry]) => [path, entry.replace(/^file \d+/, "file")]));
        });
        assert.deepEqual(actual, expected);
        assert.equal(actual?.["dir/deep/link"], "link c.txt");
      });
    }
    await t.step("an index of artifacts, copied to a layout with what refers to it", async () => {
      const args = ["--artifact-platform", "linux/arm64", ...typed];
      await oras("push", "--plain-http", ...args, at("arm64"), "notes.txt");
      await oras("manifest", "index", "create", "--plain-http", at("index"), "amd64", "arm64");
      await oras("attach", "--plain-http", "--artifact-type", "application/spdx+json", at("index"), "notes.txt");
      const digest = await oras("resolve", "--plain-http", at("index"));
      for (
        const [name, source, suffix] of [["tagged", at("index"), ":1"], [
          "bare",
          at("x").replace(":x", `@${digest}`),
          "",
        ]]
      ) {
        const layout = scratch.at(`layout-${name}`);
        await oras("cp", "-r", "--from-plain-http", "--to-oci-layout", source ?? "", `${layout}${suffix}`);
        for (const from of [at("index"), `oci:${layout}`, `oci:${layout}${suffix}`]) {
          const { resolved, layers } = await fetchWheels(from, { ...PLAIN, platform: "linux/arm64", dryRun: true });
          assert.deepEqual([resolved?.digest, layers.length], [digest, 1]);
        }
      }
    });
  },
});

Deno.test({
  name: "a dry run resolves to what crane digest prints",
  ignore: !isInPath("crane") || !isInPath("docker-registry"),
  async fn(t) {
    using scratch = new Scratch();
    await using registry = await startDockerRegistry();
    const image = makeImage({ layers: [toBytes("layer")] });
    const archive = scratch.at("image.tar", makeOciArchive(image));
    const layout = scratch.at("layout");
    Deno.mkdirSync(layout);
    await execute(["tar", "-xf", archive, "-C", layout]);
    const reference = `${registry.host}/ns/image:1`;
    await execute(["crane", "push", "--insecure", layout, reference]);
    const index = makeIndex([image.descriptor]);
    const headers = { "content-type": index.mediaType };
    const url = `http://${registry.host}/v2/ns/image/manifests/index`;
    const response = await fetch(url, { method: "PUT", headers, body: index.manifest });
    await response.body?.cancel();
    for (const tag of ["1", "index"]) {
      await t.step(tag, async () => {
        const source = reference.replace(/1$/, tag);
        const { resolved } = await fetchWheels(source, { ...PLAIN, dryRun: true });
        assert.equal(resolved?.digest, await execute(["crane", "digest", "--insecure", source]));
      });
    }
  },
});

const hasRegistry = isInPath("docker-registry") && isInPath("skopeo");

/** Builds an image with one wheel for an architecture in its final layer. */
async function makeWheelsImage(architecture: string): Promise<{ image: MadeImage; filename: string }> {
  const { filename, bytes } = makeWheel({ name: `for-${architecture}`, version: "1.0" });
  const base = await makeTar([{ name: "etc/os-release", data: "ID=test\n" }]);
  const layer = await makeTar([{ name: filename, data: bytes }, { name: ".wh.old" }]);
  return { image: makeImage({ architecture, layers: [gzip(base), gzip(layer)] }), filename };
}

Deno.test({
  name: "a real registry serves schema 1, schema 2, OCI and an index, by tag and by digest",
  ignore: !hasRegistry,
  async fn(t) {
    using scratch = new Scratch();
    await using registry = await startDockerRegistry({ lines: ["compatibility: {schema1: {enabled: true}}"] });
    const [amd64, arm64] = [await makeWheelsImage("amd64"), await makeWheelsImage("arm64")];
    const copy = async (source: string, tag: string, ...args: string[]) => {
      const target = `docker://${registry.host}/ns/wheels:${tag}`;
      await execute(["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", ...args, source, target]);
    };
    const archives = { amd64: amd64.image, arm64: arm64.image };
    for (const [name, image] of Object.entries(archives)) {
      await copy(`oci-archive:${scratch.at(`${name}.tar`, makeOciArchive(image))}`, name);
    }
    await copy(`oci-archive:${scratch.at("amd64.tar")}`, "v2s2", "--format", "v2s2");
    await copy(`oci-archive:${scratch.at("amd64.tar")}`, "v2s1", "--format", "v2s1");
    const index = makeIndex([amd64.image.descriptor, arm64.image.descriptor]);
    const url = `http://${registry.host}/v2/ns/wheels/manifests/index`;
    const headers = { "content-type": index.mediaType };
    await (await fetch(url, { method: "PUT", headers, body: index.manifest })).body?.cancel();

    const table: [tag: string, mediaType: string, image: { image: MadeImage; filename: string }, arch: string][] = [
      ["amd64", MEDIA.ociManifest, amd64, "amd64"],
      ["v2s2", MEDIA.dockerManifest, amd64, "amd64"],
      ["v2s1", MEDIA.dockerSchema1Signed, amd64, "amd64"],
      ["index", MEDIA.ociManifest, amd64, "amd64"],
      ["index", MEDIA.ociManifest, arm64, "arm64"],
    ];
    for (const [tag, mediaType, { image, filename }, arch] of table) {
      await t.step(`${tag} for ${arch}`, async () => {
        const options = { ...PLAIN, platform: `linux/${arch}`, clean: true, dest: scratch.at("dest") };
        const byTag = await fetchWheels(`${registry.host}/ns/wheels:${tag}`, options);
        assert.deepEqual(Object.keys(snapshot(options.dest)), [filename]);
        assert.equal(byTag.manifest?.mediaType, mediaType);
        const [layer] = byTag.layers;
        assert.deepEqual([layer?.digest, layer?.index, layer?.count], [[...image.blobs.keys()].at(-1), 2, 2]);
        assert.deepEqual(byTag.skipped.map(({ path }) => path), [".wh.old"]);
        const byDigest = await fetchWheels(`${registry.host}/ns/wheels@${byTag.resolved?.digest}`, options);
        assert.deepEqual(byDigest.manifest, byTag.manifest);
        assert.deepEqual(byDigest.layers, byTag.layers);
      });
    }
    await t.step("a missing platform, tag and repository", async () => {
      for (const [name, platform] of [["wheels:index", "s390x"], ["wheels:none", "amd64"], ["none:1", "amd64"]]) {
        const options = { ...PLAIN, platform: `linux/${platform}`, dest: scratch.at("none") };
        await assert.rejects(fetchWheels(`${registry.host}/ns/${name}`, options), { kind: "not-found" });
      }
    });
  },
});

Deno.test({
  name: "a real registry with TLS and a password",
  ignore: !hasRegistry || !isInPath("htpasswd"),
  async fn(t) {
    using scratch = new Scratch();
    const password = "pass: wörd ";
    const { cert, key, ca } = await makeSignedCertificate();
    const [certFile, keyFile, caFile] = [
      scratch.at("cert.pem", cert),
      scratch.at("key.pem", key),
      scratch.at("ca", ca),
    ];
    const passwords = scratch.at("htpasswd", await execute(["htpasswd", "-nbBC", "5", "user", password]));
    await using registry = await startDockerRegistry({
      lines: [`auth: {htpasswd: {realm: test, path: ${passwords}}}`],
      http: `, tls: {certificate: ${certFile}, key: ${keyFile}}`,
    });
    const { image, filename } = await makeWheelsImage("amd64");
    const source = `oci-archive:${scratch.at("image.tar", makeOciArchive(image))}`;
    const login = ["--dest-tls-verify=false", "--dest-creds", `user:${password}`];
    const reference = `${registry.host}/ns/wheels:1`;
    await execute(["skopeo", "--insecure-policy", "copy", "-q", ...login, source, `docker://${reference}`]);
    const user = { username: "user", password };
    const table: [name: string, options: FetchWheelsOptions, kind?: string][] = [
      ["caFile", { caFile, ...user }],
      ["insecure", { insecure: true, ...user }],
      ["an unknown certificate", user, "network"],
      ["a wrong password", { caFile, ...user, password: "wrong" }, "auth"],
      ["no password", { caFile }, "auth"],
    ];
    for (const [name, options, kind] of table) {
      await t.step(name, async () => {
        const dest = scratch.at(`dest/${name}`);
        const fetching = fetchWheels(reference, { platform: "linux/amd64", retries: 0, dest, ...options });
        if (kind === undefined) assert.deepEqual((await fetching).files.map(({ path }) => path), [filename]);
        else await assert.rejects(fetching, { kind });
      });
    }
  },
});

const hasPip = isInPath("python3") &&
  new Deno.Command("python3", { args: ["-m", "pip", "--version"], stdout: "null", stderr: "null" }).outputSync()
    .success;

Deno.test({
  name: "pip installs the wheels of a real registry",
  ignore: !hasRegistry || !hasPip,
  async fn() {
    using scratch = new Scratch();
    await using registry = await startDockerRegistry();
    const { filename, bytes } = makeWheel({ name: "fetched-package", version: "1.5", body: "answer = 42\n" });
    const constraints = { name: "upper-constraints.txt", data: "fetched-package===1.5\n" };
    const layer = gzip(await makeTar([{ name: filename, data: bytes }, constraints]));
    const archive = scratch.at("image.tar", makeOciArchive(makeImage({ layers: [layer] })));
    const reference = `${registry.host}/ns/wheels:1.0`;
    const copy = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false"];
    await execute([...copy, `oci-archive:${archive}`, `docker://${reference}`]);
    const dest = scratch.at("dest");
    await fetchWheels(reference, { ...PLAIN, dest });
    const site = scratch.at("site");
    const found = ["--no-index", "--find-links", dest, "-c", join(dest, "upper-constraints.txt")];
    const quiet = ["--quiet", "--no-cache-dir", "--disable-pip-version-check", "--root-user-action", "ignore"];
    const install = ["python3", "-m", "pip", "install", "--isolated", ...quiet, ...found, "--target", site];
    await execute([...install, "fetched-package"]);
    const script = `import sys; sys.path.insert(0, "${site}"); import fetched_package; print(fetched_package.answer)`;
    assert.equal(await execute(["python3", "-c", script]), "42");
  },
});

const SERVERS = ["docker-registry", "nginx", "htpasswd", "tinyproxy"];
const missingServers = SERVERS.filter((program) => !isInPath(program));

Deno.test({
  name: `docker-registry behind nginx and tinyproxy, both with passwords${
    missingServers.length ? ` (needs ${missingServers})` : ""
  }`,
  ignore: missingServers.length > 0,
  async fn(t) {
    const tls = await makeSignedCertificate(["registry.example", "denied.example", "127.0.0.1"]);
    using scratch = new Scratch();
    const caFile = scratch.at("ca.pem", tls.ca);
    await using registry = await startDockerRegistry();
    const layer = gzip(await makeTar([{ name: "a-1-py3-none-any.whl", data: "wheel" }]));
    await pushByApi(registry.host, makeImage({ layers: [layer] }));
    const user = { username: "user", password: "S3CRET" };
    await using nginx = await startNginx({ upstream: registry.host, tls, credentials: user });
    await using names = startProxy({ route: () => nginx.host });
    const credentials = { username: "peter", password: "pr0xy" };
    await using proxy = await startTinyproxy({ upstream: names.host, credentials, denied: ["^denied\\."] });
    const closed = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    closed.close();
    await using broken = await startTinyproxy({ upstream: `127.0.0.1:${closed.addr.port}` });

    const login = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: "S3CRET\n" };
    const wrong = { REGISTRY_USERNAME: "user", REGISTRY_PASSWORD: "wrong" };
    const [direct, named] = [`${nginx.host}/ns/wheels:1.0`, "registry.example/ns/wheels:1.0"];
    const https = (url: string) => ({ ...login, HTTPS_PROXY: `http://${url}` });
    const through = https(`peter:pr0xy@${proxy.host}`);
    const table: [name: string, source: string, env: Record<string, string>, code: number, words?: RegExp][] = [
      ["nginx", direct, login, 0],
      ["nginx, not through a proxy", direct, https("127.0.0.1:1"), 0],
      ["nginx, wrong password", direct, wrong, 4, /401/],
      ["nginx, no password", direct, {}, 4],
      ["tinyproxy", named, through, 0],
      ["tinyproxy, by ALL_PROXY", named, { ...login, ALL_PROXY: through.HTTPS_PROXY }, 0],
      ["tinyproxy, wrong registry password", named, { ...through, ...wrong }, 4, /401/],
      ["tinyproxy, no proxy password", named, https(proxy.host), 5, /proxy.*\b407\b/is],
      // tinyproxy answers 401 to a wrong password.
      ["tinyproxy, wrong proxy password", named, https(`peter:wr0ng@${proxy.host}`), 5, /proxy.*\b401\b/is],
      ["tinyproxy, denied host", "denied.example/ns/wheels:1.0", through, 5, /proxy.*\b403\b/is],
      ["tinyproxy, dead upstream", named, https(broken.host), 5, /proxy.*\b50\d\b/is],
    ];
    /** Runs the command line, and asserts the exit code and the output of a success. Returns stderr. */
    const exits = async (expected: number, args: string[], env: Record<string, string>, start = run) => {
      const common = ["--platform", "linux/amd64", "--retries", "0", "-o", "-"];
      const { code, bytes, stderr } = await start([...common, ...args], { env });
      assert.equal(code, expected, stderr);
      if (code === 0) assert.deepEqual(bytes, layer);
      return stderr;
    };
    for (const trust of [["--ca-file", caFile], ["--insecure"]]) {
      for (const [name, source, env, code, words = /./] of table) {
        await t.step(`${name}, ${trust[0]}`, async () => {
          const stderr = await exits(code, ["--protocol", "https", ...trust, "-v", source], env);
          assert.match(stderr, words);
          assert.doesNotMatch(stderr, /peter|pr0xy|wr0ng|S3CRET/);
          if (words.source.startsWith("proxy")) assert.doesNotMatch(stderr, /--protocol http\b/);
        });
      }
      await t.step(`from the real environment, ${trust[0]}`, async () => {
        await exits(0, ["--protocol", "https", ...trust, named], through, runProgram);
      });
    }
    await t.step("http at nginx's https port", async () => {
      assert.match(await exits(5, ["--protocol", "http", direct], login), /https/i);
    });
  },
});
