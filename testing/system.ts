/**
 * Faults of the operating system: failing calls, missing rights, and mounted file systems.
 *
 * @module
 */

import { Scratch } from "./scratch.ts";

/** Replaces a function of `Deno`, or a method of a class, until disposal. */
export function stub<T extends object, K extends keyof T>(
  target: T,
  name: K,
  make: (original: T[K]) => T[K],
): Disposable {
  const original = target[name];
  target[name] = make(original);
  return { [Symbol.dispose]: () => void (target[name] = original) };
}

/** An error as the operating system's calls throw it. */
export function systemError(code: string): Error {
  return Object.assign(new Error(`${code} (os error)`), { code });
}

/** Makes the renames from the `first` to the `last` one fail; the others are done. */
export function failingRenames(code: string, first: number, last: number): Disposable & { count: number } {
  const state = { count: 0 };
  const stubbed = stub(Deno, "renameSync", (rename) => (from, to) => {
    if (state.count++ >= first && state.count <= last + 1) throw systemError(code);
    return rename(from, to);
  });
  return Object.assign(state, stubbed);
}

/** Reports whether a process handles SIGINT; without /proc, it is taken to after a second. */
export async function handlesSignals(pid: number): Promise<boolean> {
  try {
    const status = Deno.readTextFileSync(`/proc/${pid}/status`);
    const [, mask = "0"] = /^SigCgt:\s*(\S+)$/m.exec(status) ?? [];
    return !status.startsWith("Name:\tbash") && (BigInt(`0x${mask}`) & 2n) !== 0n;
  } catch {
    return await new Promise((resolve) => setTimeout(() => resolve(true), 1000));
  }
}

/** Returns the size of the first file of this name below a directory, or -1. */
export function sizeBelow(dir: string, name: string): number {
  for (const entry of Deno.readDirSync(dir)) {
    const path = `${dir}/${entry.name}`;
    const size = entry.name === name ? Deno.lstatSync(path).size : entry.isDirectory ? sizeBelow(path, name) : -1;
    if (size >= 0) return size;
  }
  return -1;
}

/** A mounted file system; `using` unmounts it. */
export class Mount implements Disposable {
  readonly #path: string;
  /** False without the right to mount. */
  readonly isMounted: boolean;

  /** Creates the directory and mounts with these arguments of `mount`. */
  constructor(path: string, ...args: string[]) {
    this.#path = path;
    Deno.mkdirSync(path, { recursive: true });
    this.isMounted = new Deno.Command("mount", { args: [...args, path], stderr: "null" }).outputSync().success;
  }

  /** Unmounts. */
  [Symbol.dispose](): void {
    if (this.isMounted) new Deno.Command("umount", { args: [this.#path] }).outputSync();
  }
}

/** Reports whether this process may mount a file system. */
export function canMountHere(): boolean {
  if (Deno.build.os !== "linux") return false;
  using scratch = new Scratch();
  using mount = new Mount(scratch.path, "-t", "tmpfs", "none");
  return mount.isMounted;
}
