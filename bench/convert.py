#!/usr/bin/env python3
"""Measure `vmtide convert` and `vmtide serve` against qemu-img and qemu-nbd, in turn, on one disk.

    bench/convert.py pairs                    every ordered pair of formats
    bench/convert.py compress                 compressed qcow2 and streamOptimized VMDK
    bench/convert.py serve                    random and sequential reads over NBD: raw, dynamic VHDX, qcow2, chains
    bench/convert.py report                   write results/convert.md from what was measured

The disk is that of bench/make-disk.py (`--disk` takes any other raw file). qemu-img makes the source
of every pair, so both programs read the same file. Each round runs every program once, the order
turning; round 0 warms up, compares what vmtide made with the source (`qemu-img compare`), tries the
options of qemu-img (`-m 16 -W`, `-m 16`, none) and keeps the fastest, and is not counted. Raw
figures are appended to work/results/convert.jsonl, and the report is made from these alone.

Every pair is measured in two modes, which are fair to both. `cached`: neither waits until what it
wrote is on the disk, as qemu-img always and vmtide with `--no-sync`. `durable`: vmtide with `--sync`;
the time of qemu-img is that of the command and of an fsync of every file it made.

With `--scatter-memory` bench/scatter_memory.py runs meanwhile: in a virtual machine that gives free
memory back to its host, times are else a matter of chance.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

from measure import WORK, Failed, allocated, measure, remove, warm

HERE = pathlib.Path(__file__).resolve().parent
VMTIDE = os.environ.get("VMTIDE_BIN") or str(HERE.parent / "target/release/vmtide")
HOME = WORK / "convert"
RESULTS = WORK / "results/convert.jsonl"
MIB = 1 << 20
GIB = 1 << 30
MODES = ("cached", "durable")
# In the order in which they are tried; the fastest in round 0 is measured.
QEMU_OPTIONS = (("-m", "16", "-W"), ("-m", "16"), ())

# name: file extension, format of qemu-img, its options, arguments of vmtide
KINDS = {
    "raw": (".raw", "raw", (), ()),
    "qcow2": (".qcow2", "qcow2", (), ()),
    "vhdx": (".vhdx", "vhdx", (), ()),
    "vhdx-fixed": (".vhdx", "vhdx", ("-o", "subformat=fixed"), ("--subformat", "fixed")),
    "vhd": (".vhd", "vpc", ("-o", "force_size=on"), ()),
    "vhd-fixed": (".vhd", "vpc", ("-o", "subformat=fixed,force_size=on"), ("--subformat", "fixed")),
    "vmdk": (".vmdk", "vmdk", (), ()),
    "vmdk-flat": (".vmdk", "vmdk", ("-o", "subformat=monolithicFlat"), ("--subformat", "monolithicFlat")),
    "vmdk-2gb": (".vmdk", "vmdk", ("-o", "subformat=twoGbMaxExtentSparse"), ("--subformat", "twoGbMaxExtentSparse")),
    "vmdk-stream": (".vmdk", "vmdk", ("-o", "subformat=streamOptimized"), ("--subformat", "streamOptimized")),
    "qcow2-zlib": (".qcow2", "qcow2", ("-c",), ("--compress",)),
}
PLAIN = ("raw", "qcow2", "vhdx", "vhd", "vmdk")
COMPRESSED = ("qcow2-zlib", "vmdk-stream")


def run(command, **options):
    """Run a command that is not measured; stop with its text when it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr[-1500:]}")
    return done.stdout


def record(row):
    """Append one measured row, and show it."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    row = {"time": int(time.time()), **row}
    with open(RESULTS, "a") as out:
        out.write(json.dumps(row) + "\n")
    if "wall_s" in row:
        figures = f"{row['mode']:<7} {row['taken_s']:8.2f} s {row['cpu_s']:8.2f} s cpu {row['rss_bytes'] / MIB:6.0f} MiB rss"
    else:
        figures = f"{row['rate']:10.1f} {row['unit']}"
    print(f"round {row['round']} {row['tool']:<10} {row['step']:<28} {figures}  load {row['load_before']}", flush=True)


def files_of(path):
    """All files of an image: a VMDK may have several, which begin with its name."""
    return sorted(p for p in path.parent.glob(path.stem + "*") if p.is_file())


def sync_files(folder):
    """Bring the files of a directory, and their names, to the disk."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def slice_of(disk, size):
    """The first `size` bytes of a disk as a sparse file of its own, made once."""
    path = HOME / f"disk-{size // MIB}.raw"
    if not path.exists():
        part = path.with_suffix(".part")
        with open(disk, "rb") as whole, open(part, "wb") as out:
            out.truncate(size)
            for at in range(0, size, MIB):
                piece = whole.read(min(MIB, size - at))
                if piece.count(0) != len(piece):
                    out.seek(at)
                    out.write(piece)
        part.rename(path)
    return path


def source_of(kind, disk):
    """The image of this kind that qemu-img makes of the disk, made once."""
    extension, form, options, _ = KINDS[kind]
    path = HOME / "source" / f"{kind}-{disk.stat().st_size // MIB}" / f"disk{extension}"
    if kind == "raw":
        return disk
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / "part"
        remove(part)
        part.mkdir()
        run(["qemu-img", "convert", "-m", "16", "-f", "raw", "-O", form, *options, disk, part / path.name])
        for file in sorted(part.iterdir(), key=lambda f: f == part / path.name):
            file.rename(path.parent / file.name)
        part.rmdir()
    return path


def command_of(tool, kind, source, source_form, target, qemu_options, mode):
    """The command that converts `source` into `target`."""
    extension, form, options, arguments = KINDS[kind]
    if tool == "vmtide":
        sync = "--sync" if mode == "durable" else "--no-sync"
        return [VMTIDE, "convert", "--quiet", sync, str(source), str(target), *arguments]
    return ["qemu-img", "convert", *qemu_options, "-f", source_form, "-O", form, *options, str(source), str(target)]


def convert_once(tool, step, number, kind, source, source_form, qemu_options, mode, verify):
    """One measured conversion; answers with its figures."""
    folder = HOME / "target"
    remove(folder)
    folder.mkdir(parents=True)
    target = folder / f"disk{KINDS[kind][0]}"
    command = command_of(tool, kind, source, source_form, target, qemu_options, mode)
    for file in files_of(source):
        warm(file)
    figures = measure(command, settle=lambda: sync_files(folder))
    size = int(json.loads(run(["qemu-img", "info", "--output=json", "-f", source_form, source]))["virtual-size"])
    row = {"tool": tool, "step": step, "mode": mode, "round": number, "size_bytes": size, "command": " ".join(command), **figures}
    row["taken_s"] = row["settled_s" if mode == "durable" else "wall_s"]
    row["target_bytes"] = sum(allocated(file) for file in files_of(target))
    if verify:
        run(["qemu-img", "compare", "-f", source_form, "-F", KINDS[kind][1], source, target])
    record(row)
    remove(folder)
    return row


def pair(step, source, source_form, kind, options):
    """All rounds of one pair in all modes."""
    best = dict.fromkeys(options.modes, QEMU_OPTIONS[-1])
    if not options.no_warm_up:
        for mode in options.modes:
            taken = {}
            for choice in QEMU_OPTIONS:
                try:
                    taken[choice] = convert_once("qemu-img", step, 0, kind, source, source_form, choice, mode, False)["taken_s"]
                except Failed as error:
                    # Some formats cannot be written out of order.
                    print(f"qemu-img {' '.join(choice)}: {str(error).splitlines()[-1]}", flush=True)
            best[mode] = min(taken, key=taken.get)
        convert_once("vmtide", step, 0, kind, source, source_form, (), options.modes[0], True)
    for number in range(1, options.runs + 1):
        tools = ("qemu-img", "vmtide") if number % 2 else ("vmtide", "qemu-img")
        for mode in options.modes:
            for tool in tools:
                verify = options.no_warm_up and tool == "vmtide" and number == 1
                convert_once(tool, step, number, kind, source, source_form, best[mode], mode, verify)


def attempt(work, what):
    """Do the work; a failure is told and does not stop the rest. Answers with whether it succeeded."""
    try:
        work()
        return True
    except Failed as error:
        print(f"FAILED {what}: {error}", file=sys.stderr, flush=True)
        return False


def pairs(options):
    """Scenario `pairs`: every ordered pair, a format into itself too, or those that are named."""
    named = [tuple(p.split(":", 1)) for p in options.pair or ()]
    good = True
    for source, target in named or [(s, t) for s in options.kinds for t in options.kinds]:
        if source not in KINDS or target not in KINDS:
            sys.exit(f"{source}:{target}: kinds are {','.join(KINDS)}")
        step = f"{source} → {target}"
        good &= attempt(lambda: pair(step, source_of(source, options.disk), KINDS[source][1], target, options), step)
    return good


def compress(options):
    """Scenario `compress`: from raw and qcow2 into compressed images, and back."""
    good = True
    for source, target in [(s, t) for t in COMPRESSED for s in ("raw", "vhdx")] + [(s, "raw") for s in COMPRESSED]:
        step = f"{source} → {target}"
        good &= attempt(lambda: pair(step, source_of(source, options.disk), KINDS[source][1], target, options), step)
    return good


# --- serve ----------------------------------------------------------------------------------


def chain_of(form, options):
    """A chain of five images over the disk, each with some hundred changes of its own."""
    extension, folder = KINDS[form][0], HOME / "source" / f"chain-{form}-{options.disk.stat().st_size // MIB}"
    top = folder / f"layer5{extension}"
    if top.exists():
        return top
    remove(folder)
    folder.mkdir(parents=True)
    size = options.disk.stat().st_size
    base = folder / f"layer0{extension}"
    run(["qemu-img", "convert", "-f", "raw", "-O", KINDS[form][1], options.disk, base])
    random_source = random.Random("chain")
    for depth in range(1, 6):
        layer = folder / f"layer{depth}{extension}"
        run(["qemu-img", "create", "-q", "-f", KINDS[form][1], "-b", f"layer{depth - 1}{extension}", "-F", KINDS[form][1], layer])
        writes = []
        for _ in range(300):
            at = random_source.randrange(size >> 16) << 16
            writes += ["-c", f"write -q -P {random_source.randrange(1, 255)} {at} 64k"]
        run(["qemu-io", "-f", KINDS[form][1], *writes, layer])
    return top


class Served:
    """A server of one image on a Unix socket, as long as the `with` block runs."""

    def __init__(self, tool, image, form):
        self.socket = HOME / "serve.sock"
        remove(self.socket)
        if tool == "vmtide":
            command = [VMTIDE, "serve", str(image), "--nbd", f"unix:{self.socket}", "--quiet"]
        else:
            command = ["qemu-nbd", "-r", "-t", "-e", "16", "-f", form, "-k", str(self.socket), str(image)]
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.uri = f"nbd+unix:///?socket={self.socket}"

    def __enter__(self):
        end = time.monotonic() + 30
        while not self.socket.exists():
            if self.child.poll() is not None or time.monotonic() > end:
                raise Failed(f"{self.child.args}: does not serve")
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(30)


def fio(uri, block, seconds):
    """Random reads of `block` bytes for `seconds`; answers with reads per second."""
    out = run(["fio", "--name=read", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", f"--bs={block}", "--iodepth=32", "--time_based",
               f"--runtime={seconds}", "--ramp_time=1", "--randseed=7", "--output-format=json"])
    return json.loads(out[out.index("{"):])["jobs"][0]["read"]["iops"]


def serve_once(tool, image, form, name, number, options):
    """All reads from one server."""
    load = round(os.getloadavg()[0], 2)
    with Served(tool, image, form) as server:
        for block in (4096, 65536):
            rate = fio(server.uri, block, options.seconds)
            record({"tool": tool, "step": f"{name}, random {block >> 10} KiB", "round": number, "rate": round(rate, 1), "unit": "reads/s",
                    "load_before": load})
        begun = time.monotonic()
        run(["nbdcopy", server.uri, "null:"])
        taken = time.monotonic() - begun
        record({"tool": tool, "step": f"{name}, nbdcopy", "round": number, "rate": round(options.disk.stat().st_size / MIB / taken, 1),
                "unit": "MiB/s", "load_before": load})


def serve(options):
    """Scenario `serve`. Chains are of formats that QEMU reads: it refuses to read a differencing VHDX."""
    good = True
    for name, make, form in (("raw", lambda: source_of("raw", options.disk), "raw"),
                             ("dynamic VHDX", lambda: source_of("vhdx", options.disk), "vhdx"),
                             ("qcow2", lambda: source_of("qcow2", options.disk), "qcow2"),
                             ("chain of 5 qcow2", lambda: chain_of("qcow2", options), "qcow2"),
                             ("chain of 5 VMDK", lambda: chain_of("vmdk", options), "vmdk")):

        def work():
            image = make()
            for file in [image] if form == "raw" else filter(pathlib.Path.is_file, image.parent.iterdir()):
                warm(file)
            for number in range(0 if not options.no_warm_up else 1, options.runs + 1):
                for tool in ("qemu-nbd", "vmtide") if number % 2 else ("vmtide", "qemu-nbd"):
                    serve_once(tool, image, form, name, number, options)

        good &= attempt(work, name)
    return good


# --- report ---------------------------------------------------------------------------------


def load_results():
    """Counted rows by (step, size, mode, tool), in order of first sight."""
    groups = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            row = json.loads(line)
            if row["round"] >= 1:
                groups.setdefault((row["step"], row.get("size_bytes"), row.get("mode"), row["tool"]), []).append(row)
    return groups


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def middle(rows, key):
    return statistics.median(row[key] for row in rows)


def compared(groups, step, size, mode):
    """One mode's cells: vmtide's and qemu-img's times with their spans, and how many times as fast vmtide is."""
    ours, theirs = (groups.get((step, size, mode, tool)) for tool in ("vmtide", "qemu-img"))
    if not ours or not theirs:
        return ["–", "–", "–"]
    span = lambda rows: f"{middle(rows, 'taken_s'):.2f} ({min(r['taken_s'] for r in rows):.2f}–{max(r['taken_s'] for r in rows):.2f})"
    return [span(ours), span(theirs), f"**{middle(theirs, 'taken_s') / middle(ours, 'taken_s'):.2f}×**"]


def times(groups, steps):
    """Both modes of every pair in one line, and what it took of processor and memory."""
    rows = []
    for step, size in steps:
        both = [[row for mode in MODES for row in groups.get((step, size, mode, tool), [])] for tool in ("vmtide", "qemu-img")]
        if not all(both):
            continue
        ours, theirs = both
        rows.append([step, f"{size / GIB:g}", max(len(groups.get((step, size, mode, "vmtide"), [])) for mode in MODES),
                     *compared(groups, step, size, "cached"), *compared(groups, step, size, "durable"),
                     f"{middle(ours, 'cpu_s'):.2f} / {middle(theirs, 'cpu_s'):.2f}",
                     f"{max(r['rss_bytes'] for r in ours) / MIB:.0f} / {max(r['rss_bytes'] for r in theirs) / MIB:.0f}",
                     f"{middle(ours, 'target_bytes') / MIB:.0f} / {middle(theirs, 'target_bytes') / MIB:.0f}"])
    return table(["pair", "GiB", "runs", "cached: vmtide s", "qemu-img s", "", "durable: vmtide s", "qemu-img s", "", "CPU s", "peak MiB",
                  "target MiB"], rows) if rows else "Not measured yet."


def rates(groups, steps):
    rows = []
    for step, size in steps:
        ours, theirs = (groups.get((step, size, None, tool)) for tool in ("vmtide", "qemu-nbd"))
        if ours and theirs:
            span = lambda found: f"{middle(found, 'rate'):.0f} ({min(r['rate'] for r in found):.0f}–{max(r['rate'] for r in found):.0f})"
            rows.append([step, len(ours), span(ours), span(theirs), ours[0]["unit"], f"**{middle(ours, 'rate') / middle(theirs, 'rate'):.2f}×**"])
    return table(["read", "runs", "vmtide serve", "qemu-nbd", "", "as fast"], rows) if rows else "Not measured yet."


def report(options):
    """Write the tables, and fill the sections of a document that has markers for them."""
    groups = load_results()
    steps = list(dict.fromkeys((step, size) for step, size, _, _ in groups))
    pairs_found = [s for s in steps if "→" in s[0]]
    packed = [s for s in pairs_found if any(name in s[0] for name in COMPRESSED)]
    sections = {"convert": times(groups, [s for s in pairs_found if s not in packed]), "convert-compressed": times(groups, packed),
                "serve": rates(groups, [s for s in steps if s not in pairs_found])}
    version = run(["qemu-img", "--version"]).splitlines()[0]
    text = f"{version}; {run([VMTIDE, '--version']).strip()}; {os.cpu_count()} cores.\n\n"
    text += "\n\n".join(f"## {name}\n\n{body}" for name, body in sections.items()) + "\n"
    (RESULTS.parent / "convert.md").write_text(text)
    print(text)
    if options.output:
        document = options.output.read_text()
        for name, body in sections.items():
            begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
            if begin not in document:
                sys.exit(f"{options.output} lacks the marker {begin}")
            head, rest = document.split(begin, 1)
            document = head + begin + "\n" + body + "\n" + end + rest.split(end, 1)[1]
        options.output.write_text(document)


@contextlib.contextmanager
def scattered_memory():
    """bench/scatter_memory.py at work."""
    with subprocess.Popen([sys.executable, HERE / "scatter_memory.py"], stdout=subprocess.PIPE, text=True) as child:
        try:
            if child.stdout.readline().strip() != "ready":
                raise Failed("scatter_memory.py ended early")
            yield
        finally:
            child.kill()


def parse_size(text):
    """A size like 512M or 2G, in bytes."""
    units = {"M": MIB, "G": GIB}
    if text[-1:].upper() not in units or not text[:-1].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 512M or 2G")
    return int(text[:-1]) * units[text[-1].upper()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=("pairs", "compress", "serve", "report"))
    parser.add_argument("--disk", type=pathlib.Path, default=WORK / "disk/disk.raw", help="the raw disk (default: that of make-disk.py)")
    parser.add_argument("--size", type=parse_size, help="only the first bytes of the disk, e.g. 1G")
    parser.add_argument("--modes", type=lambda s: s.split(","), default=list(MODES), help="of conversions, comma separated: " + ",".join(MODES))
    parser.add_argument("--pair", action="append", metavar="FROM:TO", help="of `pairs`: only this one; may be given again")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds after the warm-up (default 3)")
    parser.add_argument("--seconds", type=int, default=8, help="of `serve`: how long each random read runs (default 8)")
    parser.add_argument("--no-warm-up", action="store_true", help="leave out round 0")
    parser.add_argument("--scatter-memory", action="store_true", help="run bench/scatter_memory.py meanwhile")
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(PLAIN), help="of `pairs`, comma separated: " + ",".join(KINDS))
    parser.add_argument("--discard", action="store_true", help="forget earlier figures of all scenarios first")
    parser.add_argument("--clean", action="store_true", help="remove the images made as sources at the end")
    parser.add_argument("--output", type=pathlib.Path, help="of `report`: a document with markers to fill, too")
    options = parser.parse_args()
    if set(options.kinds) - set(KINDS):
        sys.exit(f"kinds are {','.join(KINDS)}")
    if set(options.modes) - set(MODES):
        sys.exit(f"modes are {','.join(MODES)}")
    if not options.disk.exists():
        sys.exit(f"no {options.disk}: run bench/make-disk.py first, or give --disk")
    options.disk = options.disk.resolve()
    if options.scenario == "report":
        return report(options)
    for program in (VMTIDE, "qemu-img", "qemu-nbd", *(("fio", "nbdcopy") if options.scenario == "serve" else ())):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: cargo build --release -p vmtide; apt-get install qemu-utils libnbd-bin fio")
    HOME.mkdir(parents=True, exist_ok=True)
    if options.size:
        options.disk = slice_of(options.disk, options.size)
    if options.discard:
        remove(RESULTS)
    scenario = {"pairs": pairs, "compress": compress, "serve": serve}[options.scenario]
    if options.scatter_memory:
        with scattered_memory():
            good = scenario(options)
    else:
        good = scenario(options)
    if options.clean:
        remove(HOME)
    return None if good else sys.exit(1)


if __name__ == "__main__":
    main()
