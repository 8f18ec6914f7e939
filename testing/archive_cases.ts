/**
 * Compressed layers and archives with the result that each must have: the specification of the decoders and of the tar
 * reader as tables.
 *
 * @module
 */

import type { FetchWheelsOptions } from "../fetch_wheels.ts";
import {
  flip,
  gnu,
  gzipWithAllFields,
  head,
  latin1,
  meta,
  oldSparse,
  pax,
  regular,
  SKIPPABLE,
  sparse,
  ZSTD_MAGIC,
  zstdChecked,
  zstdStored,
} from "./archives.ts";
import {
  base256,
  type Bytes,
  concat,
  directory,
  gzip,
  gzipMembers,
  hardlink,
  type Parts,
  paxRecords,
  symlink,
  tarOf,
  zstd,
} from "./images.ts";

// ---------------------------------------------------------------------------------------------------------------------
// Compressions
// ---------------------------------------------------------------------------------------------------------------------

const NOTHING = new Uint8Array();
const first = (bytes: Bytes): Bytes => bytes.subarray(0, bytes.length >> 1);
const second = (bytes: Bytes): Bytes => bytes.subarray(bytes.length >> 1);
/** Returns all bytes but the last ones. */
export const cut = (bytes: Bytes, removed: number): Bytes => bytes.subarray(0, bytes.length - removed);

/** How a layer is compressed, and how the fetch must end. */
// deno-fmt-ignore
export const COMPRESSIONS: [name: string, ending: "right" | `integrity${string}`, compress: (tar: Bytes) => Bytes][] = [
  ["no compression", "right", (tar) => tar],
  ["gzip", "right", gzip],
  ["gzip of three members, one of them empty", "right", (tar) => gzipMembers(first(tar), NOTHING, second(tar))],
  ["gzip of an empty member first", "right", (tar) => gzipMembers(NOTHING, tar)],
  ["gzip with every optional header field", "right", gzipWithAllFields],
  ["gzip and zeros after it", "right", (tar) => concat(gzip(tar), new Uint8Array(2000))],
  ["gzip and garbage after it", "integrity", (tar) => concat(gzip(tar), "garbage")],
  ["gzip with a wrong CRC", "integrity", (tar) => flip(gzip(tar), -8)],
  ["gzip with a wrong length", "integrity", (tar) => flip(gzip(tar), -1)],
  ["gzip with a wrong CRC in the first member", "integrity", (tar) =>
    concat(flip(gzip(first(tar)), -8), gzip(second(tar)))],
  ["gzip with a flipped bit in the data", "integrity", (tar) => flip(gzip(tar), gzip(tar).length >> 1)],
  ["gzip with an unknown method", "integrity", (tar) => flip(gzip(tar), 2)],
  ["gzip that ends in the magic number", "integrity", (tar) => gzip(tar).subarray(0, 1)],
  ["gzip that ends after the magic number", "integrity", (tar) => gzip(tar).subarray(0, 2)],
  ["gzip that ends in the header", "integrity", (tar) => gzip(tar).subarray(0, 7)],
  ["gzip that ends after the header", "integrity", (tar) => gzip(tar).subarray(0, 10)],
  ["gzip that ends in the data", "integrity", (tar) => first(gzip(tar))],
  ["gzip that ends before the CRC", "integrity", (tar) => cut(gzip(tar), 8)],
  ["gzip that ends in the CRC", "integrity", (tar) => cut(gzip(tar), 6)],
  ["gzip that ends in the length", "integrity", (tar) => cut(gzip(tar), 1)],
  ["gzip that ends between members", "integrity", (tar) => gzip(first(tar))],
  ["gzip that ends in a later header", "integrity", (tar) => concat(gzip(tar), gzip(tar).subarray(0, 5))],
  ["zstd", "right", zstd],
  ["zstd of several frames", "right", (tar) => concat(zstd(first(tar)), zstd(second(tar)), zstd(NOTHING))],
  ["zstd of several frames with checksums", "right", (tar) =>
    concat(zstdChecked(first(tar)), zstdChecked(second(tar)))],
  ["zstd after a skippable frame, as pzstd writes it", "right", (tar) => concat(SKIPPABLE, zstd(tar))],
  ["zstd with skippable frames between and after", "right", (tar) =>
    concat(zstd(first(tar)), SKIPPABLE, SKIPPABLE, zstd(second(tar)), SKIPPABLE)],
  ["zstd with an empty skippable frame", "right", (tar) => concat("\x50\x2a\x4d\x18\0\0\0\0", zstd(tar))],
  ["zstd with a wrong checksum", "integrity", (tar) => flip(zstdChecked(tar), -1)],
  ["zstd with a wrong checksum in the first frame", "integrity", (tar) =>
    concat(flip(zstdChecked(first(tar)), -4), zstd(second(tar)))],
  ["zstd with a flipped bit in the data and a checksum", "integrity", (tar) =>
    flip(zstdChecked(tar), zstdChecked(tar).length - 50)],
  ["zstd that ends in the magic number", "integrity", (tar) => zstd(tar).subarray(0, 3)],
  ["zstd that ends after the magic number", "integrity", (tar) => zstd(tar).subarray(0, 4)],
  ["zstd that ends in the frame header", "integrity", (tar) => zstd(tar).subarray(0, 5)],
  ["zstd that ends in a block", "integrity", (tar) => first(zstd(tar))],
  ["zstd that ends before the checksum", "integrity", (tar) => cut(zstdChecked(tar), 4)],
  ["zstd that ends in the checksum", "integrity", (tar) => cut(zstdChecked(tar), 1)],
  ["zstd that ends between frames", "integrity", (tar) => zstd(first(tar))],
  ["zstd that ends in a second frame after a whole archive", "integrity", (tar) =>
    concat(zstd(tar), cut(zstd(tar), 40))],
  ["zstd that ends in a skippable frame", "integrity", (tar) => concat(zstd(tar), cut(SKIPPABLE, 1))],
  ["zstd that consists of a skippable frame", "integrity", () => SKIPPABLE],
  ["zstd and garbage after it", "integrity", (tar) => concat(zstd(tar), "garbage")],
  ["zstd with a window of 8 MiB", "right", (tar) => zstdStored(tar, 13 << 3)],
  ["zstd with a window of 2 GiB", "integrity: memory", (tar) => zstdStored(tar, 21 << 3)],
  ["zstd with a reserved block type", "integrity", () => concat(ZSTD_MAGIC, new Uint8Array([0, 13 << 3, 7, 0, 0]))],
];

// ---------------------------------------------------------------------------------------------------------------------
// Archives
// ---------------------------------------------------------------------------------------------------------------------

const MIB = 1 << 20;
const LONG = `${"long-directory/".repeat(9)}${"n".repeat(120)}.whl`;
/** What a tree holds, with the directories above this path. */
const below = (path: string, text: string): Record<string, string> =>
  Object.fromEntries([...path.matchAll(/\//g)].map(({ index }) => [path.slice(0, index), "/"]).concat([[path, text]]));
const LONG_THERE = below(LONG, "x");
const NESTED = tarOf(pax({ size: "abc" }), regular("s", "x", { typeflag: "S" }), regular("/../evil"), head("m", "M"));

type Accepted = [name: string, there: Record<string, string | null>, parts: Parts, options?: FetchWheelsOptions];
type Refused = [name: string, failure: string, parts: Parts, options?: FetchWheelsOptions];

/** Archives after `good.whl`, and what is there afterwards. Null stands for a member that is skipped and reported. */
// deno-fmt-ignore
export const ACCEPTED: Accepted[] = [
  // Names
  ["a long name in PAX", LONG_THERE, [pax({ path: LONG }), regular("cut")]],
  ["a long name in PAX whose short form ends in a slash", LONG_THERE,
    [pax({ path: LONG }), regular("long-directory/")]],
  ["a long name of GNU", LONG_THERE, [gnu("L", LONG), regular("cut", "x", { magic: "gnu" })]],
  ["a long name of GNU without a NUL", LONG_THERE, [meta("L", LONG), regular("cut", "x", { magic: "gnu" })]],
  ["a PAX path before a GNU long name, which loses", { b: "x" }, [pax({ path: "b" }), gnu("L", "c"), regular("d")]],
  ["a PAX path after a GNU long name, which loses", { b: "x" }, [gnu("L", "c"), pax({ path: "b" }), regular("d")]],
  ["a long name, which does not affect the second next member", { b: "x", c: "x" },
    [gnu("L", "b"), regular("d"), regular("c")]],
  ["a PAX path, which does not affect the second next member", { b: "x", c: "x" },
    [pax({ path: "b" }), regular("d"), regular("c")]],
  ["a long link of GNU", { ...LONG_THERE, l: "x" },
    [gnu("L", LONG), regular("cut"), gnu("K", LONG), hardlink("l", "cut")]],
  ["a long symlink of GNU and its long name", { ...below(LONG, "-> good.whl") },
    [gnu("K", "good.whl"), gnu("L", LONG), symlink("cut", "no")]],
  ["a PAX linkpath of a hard link", { h: "good.whl" }, [pax({ linkpath: "good.whl" }), hardlink("h", "none")]],
  ["a PAX linkpath of a symlink", { l: "-> good.whl" }, [pax({ linkpath: "good.whl" }), symlink("l", "none")]],
  ["a PAX linkpath before a GNU long link, which loses", { l: "-> good.whl" },
    [pax({ linkpath: "good.whl" }), gnu("K", "none"), symlink("l", "none")]],
  ["a name in UTF-8", { "käse-寿司.whl": "x" }, [regular("käse-寿司.whl")]],
  ["a name in UTF-8 in PAX", { "käse-寿司.whl": "x" }, [pax({ path: "käse-寿司.whl" }), regular("k")]],
  ["U+FFFD in a name", { "\ufffd.whl": "x" }, [regular("\ufffd.whl")]],
  ["a name with a byte order mark beside one without", { "\ufeffb.whl": "bom", "b.whl": "x" },
    [regular("\ufeffb.whl", "bom"), regular("b.whl")]],
  ["a byte order mark in a PAX path", { "\ufeffb.whl": "x" }, [pax({ path: "\ufeffb.whl" }), regular("b")]],
  ["a line break in a PAX path", { "two\nlines.whl": "x" }, [pax({ path: "two\nlines.whl" }), regular("b")]],
  ["an equals sign in a PAX path", { "b=c=.whl": "x" }, [pax({ path: "b=c=.whl" }), regular("b")]],
  ["a name of 100 bytes", { ["n".repeat(100)]: "x" }, [regular("n".repeat(100))]],
  ["a ustar prefix", below("a/b/c", "x"), [regular("c", "x", { prefix: "a/b" })]],
  ["a prefix without POSIX magic, which is not one", { b: "x", c: "x" },
    [regular("b", "x", { prefix: "14652023410", magic: "gnu" }), regular("c", "x", { prefix: "a", magic: "v7" })]],
  ["a v7 header", { b: "x" }, [regular("b", "x", { magic: "v7", typeflag: "\0" })]],
  ["names that end in a slash", { d: "/", e: "/" },
    [regular("d/", "", { magic: "v7", typeflag: "\0" }), regular("e/", "")]],
  ["absolute names", { w: "/", "w/a.whl": "x", "b": "x", ...below("nix/store/c", "x") },
    [directory("/"), regular("/w/a.whl"), pax({ path: "//b" }), regular("b"), gnu("L", "/nix/store/c"), regular("c")]],
  ["an absolute name by prefix", below("tmp/b", "x"), [regular("b", "x", { prefix: "/tmp" })]],
  ["absolute targets of hard links", { w: "/", "w/a": "x", h: "x", i: "x" },
    [regular("/w/a"), hardlink("/h", "/w/a"), pax({ linkpath: "/w/a" }), hardlink("i", "no")]],
  ["a leading ./ and more slashes", { s: "/", "s/b": "x" }, [directory("./"), directory("./s/"), regular(".//s//./b")]],
  // Records
  ["a PAX comment with a line break and the like of a size", { b: "", c: "Sx" },
    [pax({ comment: "\n12 size=512" }), regular("b", ""), regular("c", "Sx")]],
  ["a PAX comment that is not UTF-8 and has a NUL", { b: "x" }, [pax({ comment: latin1("\xff\0=") }), regular("b")]],
  ["a PAX header of 1 MiB", { b: "x" }, [pax({ comment: "y".repeat(MIB - " comment=".length - 9) }), regular("b")]],
  ["a size in PAX", { b: "x".repeat(600) }, [pax({ size: "600" }), head("b", "0"), "x".repeat(600)]],
  ["a size in PAX with zeros before it", { b: "x".repeat(600) },
    [pax({ size: "600".padStart(30, "0") }), head("b", "0"), "x".repeat(600)]],
  ["empty PAX records, which have no effect", { b: "x" },
    [pax({ path: "", linkpath: "", size: "", mtime: "" }), regular("b")]],
  ["a global PAX header", { b: "x" }, [meta("g", paxRecords({ comment: "0123abc", mtime: "1" })), regular("b")]],
  // Numbers
  ["numbers in base 256", { b: "x" },
    [regular("b", "x", { size: base256(1, 12), mode: base256(0o644, 8), mtime: base256(1, 12), uid: base256(5e6, 8),
    gid: base256(5e6, 8) })]],
  ["a negative owner", { b: "x" }, [regular("b", "x", { uid: -1, gid: -2 })]],
  ["a size between blanks", { b: "x", c: "x", d: "" },
    [regular("b", "x", { size: "          1 " }), regular("c", "x", { size: "1 " }),
    regular("d", "", { size: " ".repeat(12) })]],
  ["a size of twelve digits, or of none", { b: "x", c: "" },
    [regular("b", "x", { size: "000000000001" }), head("c", "0", { size: "" })]],
  ["a checksum of signed bytes", { "käse": "x" }, [regular("käse", "x", { checksum: "signed" })]],
  // Types
  ["an empty file", { b: "" }, [regular("b", "")]],
  ["an empty directory", { sub: "/" }, [directory("sub/")]],
  ["a contiguous file", { b: "x" }, [regular("b", "x", { typeflag: "7" })]],
  ["directories and links that have a size", { d: "/", h: "good.whl", l: "-> good.whl", b: "x" },
    [head("d", "5", { size: 9 }), head("h", "1", { linkname: "good.whl", size: 9 }),
    head("l", "2", { linkname: "good.whl", size: 600 }), regular("b")]],
  ["devices and a FIFO", { n3: null, n4: null, n6: null, b: "x" },
    [["3", "4", "6"].map((type) => head(`n${type}`, type)), regular("b")]],
  ["a GNU volume label", { "Backup 1": null, b: "x" }, [head("Backup 1", "V"), regular("b")]],
  ["unknown types with bodies", { D: null, X: null, A: null, N: null, M: null, Z: null, b: "x" },
    [[..."DXANMZ"].map((type) => regular(type, "x".repeat(700), { typeflag: type })), regular("b")]],
  ["an archive as a member", { "in.tar": new TextDecoder().decode(NESTED), b: "x" },
    [regular("in.tar", NESTED), regular("b")]],
  ["an archive as a skipped member", { ".in.tar": null, b: "x" }, [regular(".in.tar", NESTED), regular("b")]],
  // Members that are not selected
  ["sparse files that are not selected", { "s.img": null, "GNUSparseFile.0/s.img": null, "b.whl": "x" },
    [oldSparse("s.img"), sparse("1.0", "s.img"), regular("b.whl")], { include: ["*.whl"] }],
  ["names of staging directories, whose journals the next run would follow",
    { ".fetch_wheels-1-0123abcd/journal": null, "x/.y.fetch_wheels-1-0123abcd/lock": null, ".fetch_wheels-2-0123abcd": null },
    [regular(".fetch_wheels-1-0123abcd/journal"), regular("x/.y.fetch_wheels-1-0123abcd/lock"),
      head(".fetch_wheels-2-0123abcd", "2", { linkname: "x" })], { include: ["**"] }],
  ["a name that is not UTF-8 and not selected", { ".cache": null, "b": "x" },
    [directory(".cache"), regular(latin1(".cache/\xff")), pax({ path: latin1(".cache/\xfe") }),
    regular("c"), regular("b")]],
  ["a hard link to nothing that is not selected", { h: null }, [hardlink("h", "none")], { include: ["*.whl"] }],
  ["an absolute symlink that is not selected", { bin: null, "bin/python": null },
    [directory("bin"), symlink("bin/python", "/usr/bin/python3")], { include: ["*.whl"] }],
  ["a component that begins with a dot", { ".hidden": null, "a.b": "x" }, [regular(".hidden"), regular("a.b")]],
  ["a directory that begins with a dot", { ".d": null, ".d/b": null }, [directory(".d"), regular(".d/b")]],
  ["whiteouts", { s: "/", "s/.wh.b": null, "s/.wh..wh..opq": null },
    [directory("s"), regular("s/.wh.b"), regular("s/.wh..wh..opq")]],
  // Several members of one name, and links
  ["duplicates, of which the last wins", { b: "last", c: "x" },
    [regular("b", "first"), regular("c"), regular("b", "last")]],
  ["a directory twice", { d: "/", "d/b": "x" }, [directory("d"), regular("d/b"), directory("d")]],
  ["a symlink that a file replaces", { b: "x" }, [symlink("b", "good.whl"), regular("b")]],
  ["a file that a symlink replaces", { b: "-> good.whl" }, [regular("b"), symlink("b", "good.whl")]],
  ["a hard link that a file replaces", { b: "x", c: "y" }, [regular("b"), hardlink("c", "b"), regular("c", "y")]],
  ["a hard link whose first name a file replaces", { b: "y", c: "x" },
    [regular("b"), hardlink("c", "b"), regular("b", "y")]],
  ["hard links", { h: "good.whl", s: "/", "s/h": "good.whl" }, [hardlink("h", "./good.whl"), hardlink("s/h", "h")]],
  ["symlinks inside", { l: "-> good.whl", s: "/", "s/up": "-> ../l" },
    [symlink("l", "good.whl"), symlink("s/up", "../l")]],
  ["a symlink to nothing inside", { l: "-> s/none" }, [symlink("l", "s/none")]],
  ["a symlink inside through another", { a: "/", "a/b": "/", c: "-> a/b", l: "-> c/../../good.whl" },
    [directory("a/b"), symlink("c", "a/b"), symlink("l", "c/../../good.whl")]],
  // The end
  ["zeros after the end marker", { b: "x" }, [regular("b"), new Uint8Array(20 * 512)]],
  ["garbage and members after the end marker", { b: "x" },
    [regular("b"), new Uint8Array(1024), "garbage", regular("../c")]],
  ["an end marker of one block, as GNU tar and bsdtar accept it", { b: "x" },
    [regular("b"), new Uint8Array(512), regular("../c")]],
];

const BAD_SIZES = ["abc", "-1", "1e0", "0x1", "1.0", "+1", " 1", "1 ", "1\n", "NaN", "Infinity", "9".repeat(30)];
// deno-fmt-ignore
const BAD_RECORDS = [
  "0 a=b\n", "5 a=b\n", "7 a=b\n", "-6 a=b\n", "6 a=bX", "x a=b\n", "a=b\n", "6 aab\n", `${"9".repeat(30)} a=b\n`,
];

/** Archives after `good.whl` that are refused: the error's kind, and words that the message or the hint contains. */
// deno-fmt-ignore
export const REFUSED: Refused[] = [
  // Names and links that lead outside
  ["a path of ..", "unsafe", [directory("..")]],
  ["a path that begins with ..", "unsafe", [regular("../evil.whl")]],
  ["a path with .. in it that stays inside", "unsafe", [regular("sub/../evil.whl")]],
  ["a path that ends in ..", "unsafe", [directory("sub/..")]],
  ["an absolute path with ..", "unsafe", [regular("/../evil.whl")]],
  ["a path with .. after ./", "unsafe", [regular("./../evil.whl")]],
  ["a path with .. by prefix", "unsafe", [regular("evil.whl", "x", { prefix: ".." })]],
  ["a path with .. in PAX", "unsafe", [pax({ path: "../evil.whl" }), regular("a.whl")]],
  ["a path with .. in a GNU long name", "unsafe", [gnu("L", "../evil.whl"), regular("a.whl")]],
  ["a path with .. that is not selected", "unsafe", [regular(".wh.x/../../evil")]],
  ["a path with .. and a line break", "unsafe", [regular("two\nlines/../../evil")]],
  ["a device outside", "unsafe", [head("../null", "3")]],
  ["a NUL in a PAX path", "unsafe", [pax({ path: "evil.whl\0.txt" }), regular("a.whl")]],
  ["an absolute symlink", "unsafe: --include '*.whl'", [symlink("bin/python", "/usr/bin/python3")]],
  ["an absolute symlink in PAX", "unsafe: --include '*.whl'",
    [pax({ linkpath: "/etc/passwd" }), symlink("link", "good.whl")]],
  ["an absolute symlink in a GNU long link", "unsafe: --include '*.whl'",
    [gnu("K", "/etc/passwd"), symlink("link", "good.whl")]],
  ["a symlink to the directory above", "unsafe: --include '*.whl'", [symlink("link", "..")]],
  ["a symlink outside from a subdirectory", "unsafe", [symlink("sub/link", "../../evil")]],
  ["a symlink outside and in again", "unsafe", [symlink("link", "../there/good.whl")]],
  ["a symlink outside through another", "unsafe", [symlink("deep/up", ".."), symlink("deep/out", "up/../evil")]],
  ["a symlink outside through one that comes later", "unsafe",
    [symlink("out", "a/b/../.."), symlink("a/b", "../c"), directory("c")]],
  ["symlinks in a circle", "unsafe", [symlink("a", "b"), symlink("b", "a")]],
  ["a symlink, and a file through it to the outside", "unsafe", [symlink("link", "/tmp"), regular("link/evil.whl")]],
  ["a hard link to a path with ..", "unsafe", [hardlink("link", "../evil")]],
  ["a hard link to a symlink outside", "unsafe", [symlink("link", "/etc/passwd"), hardlink("hard", "link")]],
  ["a symlink, and a file through it to the inside", "unsafe|integrity",
    [directory("sub"), symlink("link", "sub"), regular("link/evil.whl")]],
  ["a symlink, and a directory in its place", "unsafe|integrity", [symlink("link", "good.whl"), directory("link")]],
  ["a symlink with a NUL in its target", "unsafe|integrity",
    [pax({ linkpath: "good.whl\0x" }), symlink("link", "good.whl")]],
  ["a symlink without a target", "unsafe|integrity", [symlink("link", "")]],
  ["a hard link through a symlink", "unsafe|integrity",
    [regular("sub/b"), symlink("link", "sub"), hardlink("hard", "link/b")]],
  // Links and names that fit nothing
  ["a hard link to nothing", "integrity: none.whl", [hardlink("link", "none.whl")]],
  ["a hard link to what comes later", "integrity", [hardlink("link", "b"), regular("b")]],
  ["a hard link to itself", "integrity", [hardlink("link", "link")]],
  ["a hard link to a directory", "integrity", [directory("sub"), hardlink("link", "sub")]],
  ["a hard link to a hidden member", "integrity: not selected",
    [regular(".cache/b.whl"), hardlink("b.whl", ".cache/b.whl")]],
  ["a hard link to a member that is not included", "integrity: not selected",
    [regular("archive/b"), hardlink("b.whl", "/archive/b")], { include: ["*.whl"] }],
  ["a hard link to an excluded member", "integrity: not selected", [regular("c.whl"), hardlink("b.whl", "c.whl")],
    { exclude: ["c.*"] }],
  ["a directory over a file", "integrity", [directory("good.whl/")]],
  ["a file below a file", "integrity", [regular("good.whl/evil")]],
  ["a file over a directory", "integrity", [directory("sub"), regular("sub")]],
  ["a file over a directory that is not empty", "integrity", [regular("sub/b"), regular("sub")]],
  ["a symlink over a directory", "integrity", [regular("sub/b"), symlink("sub", "good.whl")]],
  ["a file without a name", "integrity", [regular(".")]],
  ["a name that is not UTF-8", "integrity: UTF-8", [regular(latin1("\xff.whl"))]],
  ["a PAX name that is not UTF-8", "integrity: UTF-8", [pax({ path: latin1("\xff.whl") }), regular("a")]],
  ["a symlink whose target is not UTF-8", "integrity: UTF-8", [head("link", "2", { linkname: latin1("\xff") })]],
  // Headers
  ["a huge size and a short body", "integrity", [head("a.whl", "0", { size: 8 ** 11 - 1 }), "x"]],
  ["a huger size in base 256", "integrity", [head("a.whl", "0", { size: 2 ** 62 }), "x"]],
  ["a size in base 256 beyond 64 bits", "integrity", [head("a.whl", "0", { size: 2 ** 90 }), "x"]],
  ["a huge size in PAX", "integrity", [pax({ size: "9".repeat(15) }), regular("a.whl")]],
  ["a negative size in base 256", "integrity", [head("a.whl", "0", { size: -512 }), "x"]],
  ["a negative size in base 256 that is not selected", "integrity", [head(".a", "0", { size: -512 }), "x"]],
  ["a negative size in octal", "integrity", [head("a.whl", "0", { size: "-0000000001" }), "x"]],
  ["a size that is not a number", "integrity", [head("a.whl", "0", { size: "twelve" }), "x"]],
  ["a size with a digit that is not octal", "integrity", [head("a.whl", "0", { size: "00000000008" }), "x"]],
  ...BAD_SIZES.map((size): Refused => [`a PAX size of ${JSON.stringify(size)}`, "integrity",
    [pax({ size }), regular("a.whl")]]),
  ...BAD_RECORDS.map((line): Refused => [`a PAX record of ${JSON.stringify(line)}`, "integrity",
    [meta("x", line), regular("a.whl")]]),
  ["a PAX header of more than 1 MiB", "integrity", [pax({ comment: "y".repeat(MIB) }), regular("a.whl")]],
  ["a global PAX header of more than 1 MiB", "integrity",
    [meta("g", paxRecords({ comment: "y".repeat(MIB) })), regular("a.whl")]],
  ["a GNU long name of more than 1 MiB", "integrity", [gnu("L", "y".repeat(MIB)), regular("a.whl")]],
  ["a path of more than 4,096 characters", "integrity: 4096", [pax({ path: `${"a/".repeat(40_000)}b.whl` }), regular("a.whl")]],
  ["a path of more than 255 components", "integrity: 255", [pax({ path: `${"a/".repeat(255)}b.whl` }), regular("a.whl")]],
  ["a symbolic link to more than 4,096 characters", "integrity",
    [pax({ linkpath: "a/".repeat(40_000) }), symlink("link", "x")]],
  ["a PAX header of a huge size", "integrity", [head("p", "x", { size: 2 ** 40 })]],
  ["a PAX header of a negative size", "integrity", [head("p", "x", { size: -1 }), regular("a.whl")]],
  ["a wrong checksum", "integrity", [regular("a.whl", "x", { checksum: 1 })]],
  ["noise in a header's place", "integrity", ["noise".repeat(100)]],
  ...(["0.0", "0.1", "1.0"] as const).map((version): Refused =>
    [`a sparse file of PAX ${version}`, "integrity: sparse", sparse(version)]),
  ["a sparse file of old GNU", "integrity: sparse", oldSparse("a.whl")],
];
