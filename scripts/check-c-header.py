#!/usr/bin/env python3
"""Holds vmtide.h, which is written by hand for its readers, against the Rust code that stands behind it.

    scripts/check-c-header.py

cbindgen makes declarations of the code: those of every exported function, and of every structure under another name. A C compiler
then gets the header and both. It refuses two declarations of one function that differ, and a structure of which a member has another
size or place on one side. Needs cbindgen (0.28 or newer) and cc.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CRATE = Path(__file__).resolve().parents[1] / "crates/vmtide-capi"
HEADER = CRATE / "include/vmtide.h"
# The structures of the code, by the names that they have in the header.
STRUCTURES = {
    "Watch": "vmtide_watch",
    "Range": "vmtide_range",
    "Extent": "vmtide_extent",
    "OpenOptions": "vmtide_open_options",
    "NewOptions": "vmtide_new_options",
    "Agent": "vmtide_agent_options",
    "BackupOptions": "vmtide_backup_options",
    "DeltaOptions": "vmtide_delta_options",
    "ApplyOptions": "vmtide_apply_options",
}
CALLBACKS = {"WriteCallback": "vmtide_write_callback", "ReadCallback": "vmtide_read_callback"}


def fail(text):
    sys.exit(f"check-c-header: {text}")


def run(*words):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def generate(directory, name, names, lines):
    """What cbindgen makes of the code, with these names; comments and directives left out."""
    config = directory / f"{name}.toml"
    renamed = "".join(f'{key} = "{value}"\n' for key, value in names.items())
    config.write_text(f'language = "C"\nstyle = "type"\nno_includes = true\ndocumentation = false\n{lines}\n[export.rename]\n{renamed}')
    text = run("cbindgen", "--quiet", "--config", config, CRATE)
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def functions(text):
    return set(re.findall(r"\b(vmtide_\w+)\s*\((?!\*)", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))


def layout_checks(structures):
    """Assertions for every member of every structure of the code."""
    found = dict(re.findall(r"typedef struct \w*\s*\{(.*?)\}\s*rust_(\w+);", structures, re.DOTALL))
    found = {name: body for body, name in found.items()}
    checks = []
    for name in STRUCTURES.values():
        if name not in found:
            fail(f"{name} is not what any structure of the code is called")
        checks.append(f'_Static_assert(sizeof({name}) == sizeof(rust_{name}), "the size of {name}");')
        members = re.findall(r"(?:\(\*(\w+)\)\([^;]*\)|\b(\w+));", found[name])
        for member in (pointer or plain for pointer, plain in members):
            checks.append(f'_Static_assert(offsetof({name}, {member}) == offsetof(rust_{name}, {member}), "{name}.{member}");')
            checks.append(
                f"_Static_assert(sizeof((({name} *)0)->{member}) == sizeof(((rust_{name} *)0)->{member}), \"{name}.{member}\");"
            )
    return "\n".join(checks)


def main():
    for tool in ("cbindgen", "cc"):
        if shutil.which(tool) is None:
            fail(f"{tool} is missing: cargo install --locked cbindgen, and a C compiler")
    with tempfile.TemporaryDirectory() as path:
        directory = Path(path)
        left_out = ", ".join(f'"{name}"' for name in [*STRUCTURES, *CALLBACKS])
        wanted = ", ".join(f'"{name}"' for name in STRUCTURES)
        prototypes = generate(directory, "prototypes", {**STRUCTURES, **CALLBACKS}, f"[export]\nexclude = [{left_out}]")
        names = {name: f"rust_{own}" for name, own in STRUCTURES.items()}
        structures = generate(directory, "structures", names, f'[export]\nitem_types = ["structs"]\ninclude = [{wanted}]')
        ours, theirs = functions(HEADER.read_text()), functions(prototypes)
        if ours != theirs:
            fail(f"only in the header: {sorted(ours - theirs)}; only in the code: {sorted(theirs - ours)}")
        program = directory / "check.c"
        program.write_text(f"#include <stddef.h>\n#include <vmtide.h>\n{prototypes}\n{structures}\n{layout_checks(structures)}\n")
        run("cc", "-std=c11", "-fsyntax-only", "-Wall", "-Werror", f"-I{HEADER.parent}", program)
    print(f"vmtide.h is that of the code: {len(ours)} functions, {len(STRUCTURES)} structures")


if __name__ == "__main__":
    main()
