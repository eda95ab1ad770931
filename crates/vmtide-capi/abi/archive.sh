#!/usr/bin/env bash
# archive.sh: makes of program_0_1.c the program that is kept, once, when a version is released. Against the header and the symbols alone: no
# library is needed. It says so and stops where the file is there already: what is kept is not made again.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
kept="$here/program-0.1-$(uname -m)-linux"
[ ! -e "$kept" ] || { echo "$kept is there: it is kept as it was built" >&2; exit 1; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# A library without code, with the names and versions of the real one.
sed -n 's/^ *\(vmtide_[a-z_]*\);$/void \1(void) {}/p' "$here/vmtide.map" >"$work/stub.c"
cc -shared -fPIC -o "$work/libvmtide.so" "$work/stub.c" -Wl,-soname,libvmtide.so.0 -Wl,--version-script="$here/vmtide.map"
cc -std=c11 -O1 -Wall -Wextra -Werror -s -Wl,-z,norelro -Wl,--build-id=none -o "$kept" -I"$here/../include" "$here/program_0_1.c" \
    -L"$work" -lvmtide
