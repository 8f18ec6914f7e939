import { dirname, join } from "node:path";
import { sha256, toBytes } from "./images.ts";

/** A temporary directory; `using` removes it. */
export class Scratch implements Disposable {
  /** Its path, without symbolic links. */
  readonly path: string = Deno.realPathSync(Deno.makeTempDirSync({ prefix: "fetch_wheels_test-" }));

  /** Returns a path in the directory; with contents, creates the file. */
  at(name: string, contents?: string | Uint8Array): string {
    const path = join(this.path, name);
    if (contents === undefined) return path;
    Deno.mkdirSync(dirname(path), { recursive: true });
    Deno.writeFileSync(path, toBytes(contents));
    return path;
  }

  /** Removes the directory. */
  [Symbol.dispose](): void {
    Deno.removeSync(this.path, { recursive: true });
  }
}

/** Describes each path below a directory: its type, its mode, and the digest of its contents or its target. */
export function snapshot(dir: string, prefix = ""): Record<string, string> {
  const all: Record<string, string> = {};
  for (const { name } of Deno.readDirSync(dir)) {
    const [path, key] = [join(dir, name), prefix + name];
    const stat = Deno.lstatSync(path);
    const mode = ((stat.mode ?? 0) & 0o7777).toString(8);
    if (stat.isSymlink) all[key] = `link ${Deno.readLinkSync(path)}`;
    else if (stat.isDirectory) Object.assign(all, { [key]: `directory ${mode}` }, snapshot(path, `${key}/`));
    else if (stat.isFile) all[key] = `file ${mode} ${sha256(Deno.readFileSync(path))}`;
    else all[key] = `other ${mode}`;
  }
  return all;
}

/** Returns the text of each file below a directory; links have `-> ` and their target, directories have `/`. */
export function contents(dir: string): Record<string, string> {
  const texts = Object.entries(snapshot(dir)).map(([path, entry]) => {
    if (entry.startsWith("link")) return [path, `-> ${Deno.readLinkSync(join(dir, path))}`];
    return [path, entry.startsWith("directory") ? "/" : Deno.readTextFileSync(join(dir, path))];
  });
  return Object.fromEntries(texts);
}
