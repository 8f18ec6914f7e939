/**
 * Runs the command line, in this process or as a program of its own.
 *
 * @module
 */

import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { type Io, main } from "../fetch_wheels.ts";
import { concat, toBytes } from "./images.ts";
import type { Scratch } from "./scratch.ts";

/** Path of the program. */
export const PROGRAM: string = fileURLToPath(new URL("../fetch_wheels.ts", import.meta.url));

/** Inputs of a run besides its arguments. */
export interface Surroundings {
  env?: Record<string, string>;
  stdin?: string;
  cwd?: string;
  /** A program and its arguments that start the process. */
  through?: string[];
  /** Parts of the `Io` that replace those of a run in this process. */
  io?: Partial<Io>;
}

/** Result of a run. */
export interface Outcome {
  code: number;
  stdout: string;
  /** stdout as bytes. */
  bytes: Uint8Array;
  stderr: string;
  /** The lines of stderr. */
  lines: string[];
}

/** Runs the command line in this process. The wheels file does not exist unless the arguments name one. */
export async function run(args: string[], { env = {}, stdin = "", io = {} }: Surroundings = {}): Promise<Outcome> {
  const chunks: Uint8Array[] = [];
  let stderr = "";
  const code = await main(["--wheels-file", "/nowhere/wheels", ...args], {
    env: (name) => env[name],
    stdin: ReadableStream.from([toBytes(stdin)]),
    stdout: new WritableStream({ write: (chunk) => void chunks.push(chunk) }),
    stderr: (text) => void (stderr += text),
    ...io,
  });
  return outcome(code, concat(...chunks), stderr);
}

/** Permissions that the program needs, except `--allow-run`. */
export const PERMISSIONS = ["--no-prompt", "--allow-net", "--allow-read", "--allow-write", "--allow-env"];

/** Starts Deno in a process. */
export function spawnDeno(args: string[], { env = {}, cwd, through = [] }: Surroundings = {}): Deno.ChildProcess {
  const [command = "", ...rest] = [...through, Deno.execPath(), ...args];
  const options = {
    args: rest,
    env: { NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", ...env },
    cwd,
    stdin: "null" as const,
  };
  return new Deno.Command(command, { ...options, stdout: "piped", stderr: "piped" }).spawn();
}

/** Runs Deno in a process. */
export async function runDeno(args: string[], surroundings?: Surroundings): Promise<Outcome> {
  const { code, stdout, stderr } = await spawnDeno(args, surroundings).output();
  return outcome(code, stdout, new TextDecoder().decode(stderr));
}

/** Starts the program in a process, by default with all the permissions that it needs. */
export function spawnProgram(
  args: string[],
  surroundings?: Surroundings,
  permissions = PERMISSIONS,
): Deno.ChildProcess {
  return spawnDeno(["run", ...permissions, PROGRAM, "--wheels-file", "/nowhere/wheels", ...args], surroundings);
}

/** Runs the program in a process, by default with all the permissions that it needs. */
export async function runProgram(
  args: string[],
  surroundings?: Surroundings,
  permissions = PERMISSIONS,
): Promise<Outcome> {
  const { code, stdout, stderr } = await spawnProgram(args, surroundings, permissions).output();
  return outcome(code, stdout, new TextDecoder().decode(stderr));
}

/** Asserts that stderr consists of whole lines with the program's name. */
function outcome(code: number, stdout: Uint8Array, stderr: string): Outcome {
  const lines = stderr.split("\n");
  assert.equal(lines.pop(), "", `stderr does not end with a line break: ${stderr}`);
  for (const line of lines) assert.match(line, /^fetch_wheels: ./);
  return { code, stdout: new TextDecoder().decode(stdout), bytes: stdout, stderr, lines };
}

/** Reports whether a program runs with `--version`. */
export function isInstalled(program: string): boolean {
  try {
    return new Deno.Command(program, { args: ["--version"], stdout: "null", stderr: "null" }).outputSync().success;
  } catch {
    return false;
  }
}

/**
 * Makes a directory for Deno's caches that may be damaged, and returns the variable that names it: a process that cannot
 * open its caches breaks them for good. The packages are those of the real directory.
 */
export function damageableCaches(scratch: Scratch): Record<string, string> {
  const { stdout } = new Deno.Command(Deno.execPath(), { args: ["info", "--json"] }).outputSync();
  const { npmCache } = JSON.parse(new TextDecoder().decode(stdout));
  Deno.symlinkSync(npmCache, scratch.at("npm"));
  return { DENO_DIR: scratch.path };
}
