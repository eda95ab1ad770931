#!/usr/bin/env python3
"""Runs all tests of the workspace, as `cargo test --workspace` does, with a limit for each part instead of one for all.

    scripts/workspace-tests.py [--built FILE] [--no-documentation] [--begin-within SECONDS] [--end-within SECONDS] [--left-out FILE]

The parts are the test programs that cargo has built (it builds what is missing; with `--built` they are those in what a `cargo test
--no-run --message-format json` has printed, which may have been ended), those with many modules module by module, and the tests in the
documentation. A part that takes a quarter of an hour hangs, and has failed. With `--begin-within` no part is begun later than that,
with `--end-within` none goes on longer, and FILE gets the names of those that were left out, one a line; unit tests come first. Where a
test fails the others run.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Longer than any takes on two cores with a fifth of the usual speed.
LIMIT_S = 900
CARGO = ["cargo", "test", "--quiet", "--workspace", "--locked"]
# A program with more modules than this is run module by module.
MANY_MODULES = 4


def build():
    """What cargo says of what it builds, a line each."""
    built = subprocess.run([*CARGO, "--no-run", "--message-format", "json"], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if built.returncode != 0:
        sys.exit("workspace-tests: the tests do not build")
    return built.stdout


def programs(built):
    """The test programs: the package's directory, the target's name, whether it is the package's own unit tests, the path."""
    found = []
    for line in built.splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            # The last line of a cargo that was ended.
            continue
        if message.get("reason") == "compiler-artifact" and message.get("executable") and message["profile"]["test"]:
            directory = Path(message["manifest_path"]).parent
            found.append((directory, message["target"]["name"], "test" not in message["target"]["kind"], message["executable"]))
    if not found:
        sys.exit("workspace-tests: cargo names no test program")
    return found


def environment(directory):
    """What cargo tells a test at run time."""
    return dict(os.environ, CARGO_MANIFEST_DIR=str(directory), CARGO="cargo")


def modules(program, directory):
    """The modules at the root of a test program, where there are many; otherwise none."""
    listed = subprocess.run([program, "--list", "--format", "terse"], stdout=subprocess.PIPE, text=True, cwd=directory,
                            env=environment(directory), check=True)
    names = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]
    roots = sorted({name.split("::")[0] for name in names if "::" in name})
    # A filter finds its text anywhere in a name: it must not find the tests of another module.
    is_told_apart = all(sum(f"{root}::" in name for name in names) == sum(name.startswith(f"{root}::") for name in names)
                        for root in roots)
    is_all = all("::" in name for name in names)
    return roots if len(roots) > MANY_MODULES and is_told_apart and is_all else []


def parts(built, has_documentation):
    """What is run: a name, a command, a directory. The unit tests come first, then of each package the first, of each the second, …:
    what is left out at the end is not all of one package."""
    units, others = [], []
    for directory, name, is_unit, program in sorted(programs(built)):
        package = directory.name
        if is_unit:
            units.append((f"{package} (unit tests of {name})", [program, "--quiet"], directory))
            continue
        roots = modules(program, directory)
        if not roots:
            others.append((f"{package} {name}", [program, "--quiet"], directory))
        others += [(f"{package} {name} {root}", [program, "--quiet", f"{root}::"], directory) for root in roots]
    turns = collections.Counter()

    def turn(part):
        turns[part[2]] += 1
        return turns[part[2]]

    others.sort(key=turn)
    return [*units, *others, *([("the documentation", [*CARGO, "--doc"], ROOT)] if has_documentation else [])]


def run(name, command, directory, end):
    """Whether it ended well; None where it was ended because time was up."""
    begun = time.monotonic()
    print(f"\n{name}", flush=True)
    # A group of its own: what hangs may have begun others.
    process = subprocess.Popen(command, cwd=directory, env=environment(directory), stdin=subprocess.DEVNULL, process_group=0)
    try:
        status = process.wait(max(1, min(LIMIT_S, end - begun)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        if time.monotonic() >= end:
            return None
        status = f"still at it after {LIMIT_S} s"
    if status != 0:
        print(f"{name}: {status} after {time.monotonic() - begun:.0f} s", flush=True)
    return status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, metavar="FILE")
    parser.add_argument("--no-documentation", action="store_true")
    parser.add_argument("--begin-within", type=float, metavar="SECONDS", default=float("inf"))
    parser.add_argument("--end-within", type=float, metavar="SECONDS", default=float("inf"))
    parser.add_argument("--left-out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    limit, end = (time.monotonic() + within for within in (arguments.begin_within, arguments.end_within))
    built = arguments.built.read_text() if arguments.built else build()
    bad, left = [], []
    for name, command, directory in parts(built, not arguments.no_documentation):
        if time.monotonic() > min(limit, end):
            left.append(name)
            continue
        is_good = run(name, command, directory, end)
        if is_good is None:
            left.append(f"{name} (not finished)")
        elif not is_good:
            bad.append(name)
    if left and arguments.left_out:
        arguments.left_out.write_text("".join(f"{name}\n" for name in left))
    for name in bad:
        print(f"failed: {name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
