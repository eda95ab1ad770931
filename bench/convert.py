#!/usr/bin/env python3
"""Measure `vmtide convert` and `vmtide serve` against qemu-img and qemu-nbd, in turn, on one disk.

    bench/convert.py pairs                    every ordered pair of formats
    bench/convert.py compress                 compressed qcow2 and streamOptimized VMDK
    bench/convert.py serve                    random and sequential reads over NBD: dynamic VHDX, chains
    bench/convert.py report                   write results/convert.md from what was measured

The disk is that of bench/make-disk.py (`--disk` takes any other raw file). qemu-img makes the source
of every pair, so both programs read the same file. Each round runs every program once, the order
turning; round 0 warms up, compares what vmtide made with the source (`qemu-img compare`), tries the
options of qemu-img (`-m 16 -W`, `-m 16`, none) and keeps the fastest, and is not counted. Raw
figures are appended to work/results/convert.jsonl, and the report is made from these alone.

qemu-img does not wait until what it wrote is on the disk, vmtide does: `settled` is the wall time
plus that of a sync after the command, and is fair to both.
"""

import argparse
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
        figures = f"{row['wall_s']:8.2f} s wall {row['settled_s']:8.2f} s settled {row['cpu_s']:8.2f} s cpu {row['rss_bytes'] / MIB:6.0f} MiB rss"
    else:
        figures = f"{row['rate']:10.1f} {row['unit']}"
    print(f"round {row['round']} {row['tool']:<10} {row['step']:<28} {figures}  load {row['load_before']}", flush=True)


def files_of(path):
    """All files of an image: a VMDK may have several, which begin with its name."""
    return sorted(p for p in path.parent.glob(path.stem + "*") if p.is_file())


def source_of(kind, disk):
    """The image of this kind that qemu-img makes of the disk, made once."""
    extension, form, options, _ = KINDS[kind]
    path = HOME / "source" / kind / f"disk{extension}"
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


def command_of(tool, kind, source, source_form, target, qemu_options):
    """The command that converts `source` into `target`."""
    extension, form, options, arguments = KINDS[kind]
    if tool == "vmtide":
        return [VMTIDE, "convert", "--quiet", str(source), str(target), *arguments]
    return ["qemu-img", "convert", *qemu_options, "-f", source_form, "-O", form, *options, str(source), str(target)]


def convert_once(tool, step, number, kind, source, source_form, qemu_options, verify):
    """One measured conversion; answers with its figures."""
    folder = HOME / "target"
    remove(folder)
    folder.mkdir(parents=True)
    target = folder / f"disk{KINDS[kind][0]}"
    command = command_of(tool, kind, source, source_form, target, qemu_options)
    for file in files_of(source):
        warm(file)
    row = {"tool": tool, "step": step, "round": number, "command": " ".join(command), **measure(command)}
    row["target_bytes"] = sum(allocated(file) for file in files_of(target))
    if verify:
        run(["qemu-img", "compare", "-f", source_form, "-F", KINDS[kind][1], source, target])
    record(row)
    remove(folder)
    return row


def pair(step, source, source_form, kind, options):
    """All rounds of one pair."""
    choices, best = [c for c in QEMU_OPTIONS], QEMU_OPTIONS[-1]
    if not options.no_warm_up:
        walls = {}
        for choice in choices:
            try:
                walls[choice] = convert_once("qemu-img", step, 0, kind, source, source_form, choice, False)["wall_s"]
            except Failed as error:
                # Some formats cannot be written out of order.
                print(f"qemu-img {' '.join(choice)}: {str(error).splitlines()[-1]}", flush=True)
        best = min(walls, key=walls.get)
        convert_once("vmtide", step, 0, kind, source, source_form, (), True)
    for number in range(1, options.runs + 1):
        tools = ("qemu-img", "vmtide") if number % 2 else ("vmtide", "qemu-img")
        for tool in tools:
            convert_once(tool, step, number, kind, source, source_form, best, options.no_warm_up and tool == "vmtide")


def attempt(work, what):
    """Do the work; a failure is told and does not stop the rest. Answers with whether it succeeded."""
    try:
        work()
        return True
    except Failed as error:
        print(f"FAILED {what}: {error}", file=sys.stderr, flush=True)
        return False


def pairs(options):
    """Scenario `pairs`: every ordered pair, a format into itself too."""
    good = True
    for source in options.kinds:
        path = source_of(source, options.disk)
        for target in options.kinds:
            step = f"{source} → {target}"
            good &= attempt(lambda: pair(step, path, KINDS[source][1], target, options), step)
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
    extension, folder = KINDS[form][0], HOME / "source" / f"chain-{form}"
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
    """Scenario `serve`."""
    good = True
    for name, make, form in (("dynamic VHDX", lambda: source_of("vhdx", options.disk), "vhdx"),
                             ("qcow2", lambda: source_of("qcow2", options.disk), "qcow2"),
                             ("chain of 5 qcow2", lambda: chain_of("qcow2", options), "qcow2"),
                             ("chain of 5 VMDK", lambda: chain_of("vmdk", options), "vmdk")):

        def work():
            image = make()
            for file in image.parent.iterdir():
                warm(file)
            for number in range(0 if not options.no_warm_up else 1, options.runs + 1):
                for tool in ("qemu-nbd", "vmtide") if number % 2 else ("vmtide", "qemu-nbd"):
                    serve_once(tool, image, form, name, number, options)

        good &= attempt(work, name)
    return good


# --- report ---------------------------------------------------------------------------------


def load_results():
    """Counted rows by (step, tool), steps in order of first sight."""
    groups = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            row = json.loads(line)
            if row["round"] >= 1:
                groups.setdefault((row["step"], row["tool"]), []).append(row)
    return groups


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def times(groups, steps):
    """Wall and settled times of both programs, and how many times as fast vmtide is."""
    rows = []
    for step in steps:
        ours, theirs = groups.get((step, "vmtide")), groups.get((step, "qemu-img"))
        if not ours or not theirs:
            continue
        middle = lambda found, key: statistics.median(r[key] for r in found)
        span = lambda found: f"{min(r['wall_s'] for r in found):.2f}–{max(r['wall_s'] for r in found):.2f}"
        rows.append([step, len(ours), f"{middle(ours, 'wall_s'):.2f}", span(ours), f"{middle(theirs, 'wall_s'):.2f}", span(theirs),
                     f"**{middle(theirs, 'wall_s') / middle(ours, 'wall_s'):.2f}×**",
                     f"{middle(theirs, 'settled_s') / middle(ours, 'settled_s'):.2f}×",
                     f"{middle(ours, 'cpu_s'):.1f} / {middle(theirs, 'cpu_s'):.1f}",
                     f"{max(r['rss_bytes'] for r in ours) / MIB:.0f} / {max(r['rss_bytes'] for r in theirs) / MIB:.0f}",
                     f"{middle(ours, 'target_bytes') / MIB:.0f} / {middle(theirs, 'target_bytes') / MIB:.0f}",
                     "`" + " ".join(theirs[0]["command"].split(" -f ")[0].split()[2:]) + "`"])
    return table(["pair", "runs", "vmtide s", "min–max", "qemu-img s", "min–max", "faster", "settled", "CPU s", "peak MiB", "target MiB",
                  "qemu-img options"], rows) if rows else "Not measured yet."


def rates(groups, steps):
    rows = []
    for step in steps:
        ours, theirs = groups.get((step, "vmtide")), groups.get((step, "qemu-nbd"))
        if ours and theirs:
            middle = lambda found: statistics.median(r["rate"] for r in found)
            rows.append([step, len(ours), f"{middle(ours):.0f}", f"{middle(theirs):.0f}", ours[0]["unit"], f"**{middle(ours) / middle(theirs):.2f}×**"])
    return table(["read", "runs", "vmtide serve", "qemu-nbd", "", "as fast"], rows) if rows else "Not measured yet."


def report(options):
    """Write the tables, and fill the sections of a document that has markers for them."""
    groups = load_results()
    steps = list(dict.fromkeys(step for step, _ in groups))
    packed = [s for s in steps if any(name in s for name in COMPRESSED)]
    plain = [s for s in steps if "→" in s and s not in packed]
    sections = {"convert": times(groups, plain), "convert-compressed": times(groups, packed),
                "serve": rates(groups, [s for s in steps if "→" not in s])}
    version = run(["qemu-img", "--version"]).splitlines()[0]
    text = f"{version}; {run([VMTIDE, '--version']).strip()}; {os.cpu_count()} cores; disk of {allocated(options.disk) / MIB:.0f} MiB of data.\n\n"
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=("pairs", "compress", "serve", "report"))
    parser.add_argument("--disk", type=pathlib.Path, default=WORK / "disk/disk.raw", help="the raw disk (default: that of make-disk.py)")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds after the warm-up (default 3)")
    parser.add_argument("--seconds", type=int, default=8, help="of `serve`: how long each random read runs (default 8)")
    parser.add_argument("--no-warm-up", action="store_true", help="leave out round 0")
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(PLAIN), help="of `pairs`, comma separated: " + ",".join(KINDS))
    parser.add_argument("--discard", action="store_true", help="forget earlier figures of all scenarios first")
    parser.add_argument("--clean", action="store_true", help="remove the images made as sources at the end")
    parser.add_argument("--output", type=pathlib.Path, help="of `report`: a document with markers to fill, too")
    options = parser.parse_args()
    if set(options.kinds) - set(KINDS):
        sys.exit(f"kinds are {','.join(KINDS)}")
    if not options.disk.exists():
        sys.exit(f"no {options.disk}: run bench/make-disk.py first, or give --disk")
    options.disk = options.disk.resolve()
    if options.scenario == "report":
        return report(options)
    for program in (VMTIDE, "qemu-img", "qemu-nbd", *(("fio", "nbdcopy") if options.scenario == "serve" else ())):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: cargo build --release -p vmtide; apt-get install qemu-utils libnbd-bin fio")
    HOME.mkdir(parents=True, exist_ok=True)
    if options.discard:
        remove(RESULTS)
    good = {"pairs": pairs, "compress": compress, "serve": serve}[options.scenario](options)
    if options.clean:
        remove(HOME)
    return None if good else sys.exit(1)


if __name__ == "__main__":
    main()
