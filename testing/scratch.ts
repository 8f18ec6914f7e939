import { dirname, join } from "node:path";
import { toBytes } from "./images.ts";

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
