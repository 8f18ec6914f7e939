/**
 * `deno task demo`: an embedded registry with an image of wheels for two architectures, and the real command line that
 * fetches those of this machine into ./demo-wheels.
 *
 * @module
 */

import { fileURLToPath } from "node:url";
import { gzip, makeImage, makeIndex, makeTar, makeWheel, type TarMember } from "./images.ts";
import { startRegistry, type TestRegistry } from "./registry.ts";

const DEST = "demo-wheels";
const REPOSITORY = "demo/wheels";
const TAG = "1.0";
const ARCHITECTURES = ["amd64", "arm64"];
const PROJECTS = ["demo-hello", "demo-numbers", "demo-paths"];

/** The last layer of an image for this architecture: wheels that say so, a list of them, and a file to leave out. */
async function makeWheelsLayer(architecture: string): Promise<Uint8Array> {
  const wheels = PROJECTS.map((name): TarMember => {
    const body = `"""A wheel from the layer for ${architecture}."""\n\nARCHITECTURE = "${architecture}"\n`;
    const { filename, bytes } = makeWheel({ name, version: TAG, body });
    return { name: filename, data: bytes };
  });
  const constraints = PROJECTS.map((name) => `${name}===${TAG}\n`).join("");
  const texts = [{ name: "upper-constraints.txt", data: constraints }, { name: ".dockerenv", data: "" }];
  return gzip(await makeTar([...wheels, ...texts]));
}

async function pushDemoImage(registry: TestRegistry): Promise<void> {
  const base = gzip(await makeTar([{ name: "etc/os-release", data: "ID=demo\n" }]));
  const entries = [];
  for (const architecture of ARCHITECTURES) {
    const image = makeImage({ architecture, layers: [base, await makeWheelsLayer(architecture)] });
    registry.pushImage(REPOSITORY, image.digest, image);
    entries.push(image.descriptor);
  }
  const index = makeIndex(entries);
  registry.pushManifest(REPOSITORY, TAG, index.manifest, index.mediaType);
}

async function fetchImage(reference: string): Promise<void> {
  const args = ["run", "-q", "-P", "fetch_wheels.ts"];
  args.push("-d", DEST, reference);
  console.log(`\n$ deno ${args.join(" ")}`);
  await run(Deno.execPath(), args);
}

async function listWheels(): Promise<void> {
  const names = (await Array.fromAsync(Deno.readDir(DEST))).map(({ name }) => name).sort();
  console.log(`\n${DEST} now holds ${names.length} files:`);
  for (const name of names) {
    const { size } = await Deno.stat(`${DEST}/${name}`);
    console.log(`${String(size).padStart(8)} bytes  ${name}`);
  }
}

async function installWheel(): Promise<void> {
  if (!await succeeds("python3", ["-m", "pip", "--version"])) {
    console.log("\nPython 3 with pip is not here, so no wheel is installed.");
    return;
  }
  const target = await Deno.makeTempDir();
  try {
    const args = ["-m", "pip", "install", "--no-index", "--find-links", DEST, "--target", target];
    args.push("--no-cache-dir", "--disable-pip-version-check", "demo-hello");
    console.log(`\n$ python3 ${args.join(" ")}`);
    await run("python3", args, { PIP_ROOT_USER_ACTION: "ignore" });
    const program = "import demo_hello; print(demo_hello.__doc__)";
    console.log(`\n$ PYTHONPATH=${target} python3 -c "${program}"`);
    await run("python3", ["-c", program], { PYTHONPATH: target });
  } finally {
    await Deno.remove(target, { recursive: true });
  }
}

/** Run a command that writes to this terminal. */
async function run(command: string, args: string[], env: Record<string, string> = {}): Promise<void> {
  const child = new Deno.Command(command, { args, env, stdin: "null", stdout: "inherit", stderr: "inherit" }).spawn();
  const { code } = await child.status;
  if (code !== 0) throw new Error(`${command} failed with exit status ${code}`);
}

async function succeeds(command: string, args: string[]): Promise<boolean> {
  try {
    return (await new Deno.Command(command, { args, stdin: "null" }).output()).success;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

async function removeOld(): Promise<void> {
  try {
    await Deno.remove(DEST, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

async function demo(): Promise<void> {
  Deno.chdir(fileURLToPath(new URL("..", import.meta.url)));
  await removeOld();
  await using registry = startRegistry();
  await pushDemoImage(registry);
  const reference = `${registry.host}/${REPOSITORY}:${TAG}`;
  console.log(`A registry runs at ${registry.url}.`);
  console.log(`It holds ${reference}, an index for ${ARCHITECTURES.map((name) => `linux/${name}`).join(" and ")}.`);
  await fetchImage(reference);
  await listWheels();
  await installWheel();
  console.log("\nThe demo worked.");
}

if (import.meta.main) {
  try {
    await demo();
  } catch (error) {
    console.error(`The demo failed: ${error instanceof Error ? error.message : String(error)}`);
    Deno.exitCode = 1;
  }
}
