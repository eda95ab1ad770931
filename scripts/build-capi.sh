#!/usr/bin/env bash
# Builds libvmtide and puts it below a directory: the shared library with its symbol versions, the static one, the header,
# the pkg-config file.
#
#   scripts/build-capi.sh [--debug] PREFIX      e.g. /usr/local
#
# cargo's own shared library has neither versions nor a soname; this one is linked from the static library.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=release
if [ "${1:-}" = --debug ]; then
    profile=debug
    shift
fi
prefix="${1:?say where to: scripts/build-capi.sh PREFIX}"
if [ "$profile" = release ]; then
    cargo build --quiet --locked --release -p vmtide-capi
else
    cargo build --quiet --locked -p vmtide-capi
fi
target="$(cargo metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')"
crates/vmtide-capi/link.sh "$target/$profile/libvmtide.a" "$prefix"
