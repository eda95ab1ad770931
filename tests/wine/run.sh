#!/usr/bin/env bash
# Builds vmtide.exe and runs it under Wine: every tests/wine/*_test.py, in their order by name.
#
#   tests/wine/run.sh [NAME_test.py …]
#
# VMTIDE_BIN names the vmtide for Linux that reads what the one for Windows wrote, and the other way round; otherwise
# it is target/debug/vmtide. What the tests get in their environment: VMTIDE_EXE, the program for Windows;
# VMTIDE_EXE_STANDIN, the same with the stand-in for virtdisk.dll beside it; VMTIDE_DLL, the C library; VMTIDE_BIN, WINEPREFIX.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/../../scripts/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
. "$REPO_ROOT/scripts/lib/packages.sh"
# shellcheck source=scripts/lib/windows.sh
. "$REPO_ROOT/scripts/lib/windows.sh"

# No part takes a third of it on two slow cores.
LIMIT_S=900

export VMTIDE_BIN="${VMTIDE_BIN:-$REPO_ROOT/target/debug/vmtide}"
[ -x "$VMTIDE_BIN" ] || die "no vmtide at $VMTIDE_BIN: build it (cargo build -p vmtide), or set VMTIDE_BIN"
have qemu-img || die "qemu-img is missing: install qemu-utils (scripts/test.sh does)"
tests=("$@")
[ "${#tests[@]}" -gt 0 ] || mapfile -t tests < <(cd "$REPO_ROOT/tests/wine" && ls -- *_test.py)

programs=(vmtide vmtide-standin-virtdisk vmtide-capi)
libraries=(vmtide-windows-ffi vmtide-wmi-ffi vmtide-virtdisk-ffi vmtide-service-ffi vmtide-hyperv)
# shellcheck disable=SC2046 # options and names of crates, without blanks
mapfile -t built < <("$REPO_ROOT/scripts/build-windows.sh" $(printf -- '-p %s ' "${programs[@]}") \
    $(printf -- '--beside %s ' "${libraries[@]}"))
# shellcheck disable=SC2046
mapfile -t units < <("$REPO_ROOT/scripts/build-windows.sh" --tests $(printf -- '-p %s ' "${libraries[@]}") \
    $(printf -- '--beside %s ' "${programs[@]}"))
[ "${#units[@]}" -gt 0 ] || die "the tests of the libraries were not built"

# place DIRECTORY NAME…: what was built under these names, alone in a directory: Windows takes libraries from the
# directory of the program first.
place() {
    local directory="$1" name path
    shift
    rm -rf "$directory"
    mkdir -p "$directory"
    for name in "$@"; do
        path="$(printf '%s\n' "${built[@]}" | grep "/$name\$")" || die "$name was not built"
        cp --link --force "$path" "$directory/" 2>/dev/null || cp "$path" "$directory/"
    done
    supply_bcryptprimitives "$directory"
}

trap end_wine EXIT
ensure_wine
place "$REPO_ROOT/target/wine/program" vmtide.exe
place "$REPO_ROOT/target/wine/standin" vmtide.exe virtdisk.dll virtdisk-calls.exe
place "$REPO_ROOT/target/wine/library" vmtide.dll
export VMTIDE_DLL="$REPO_ROOT/target/wine/library/vmtide.dll"
export VMTIDE_EXE="$REPO_ROOT/target/wine/program/vmtide.exe"
export VMTIDE_EXE_STANDIN="$REPO_ROOT/target/wine/standin/vmtide.exe"
status=0
for unit in "${units[@]}"; do
    supply_bcryptprimitives "$(dirname "$unit")"
    step "$(basename "$unit") under Wine"
    timeout --kill-after=30 "$LIMIT_S" wine "$unit" || status=1
done
for test in "${tests[@]}"; do
    step "$test"
    PYTHONDONTWRITEBYTECODE=1 timeout --kill-after=30 "$LIMIT_S" python3 "$REPO_ROOT/tests/wine/$test" || status=1
done
exit "$status"
