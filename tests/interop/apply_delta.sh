#!/usr/bin/env bash
# Applies deltas of vmtide with tools/apply_delta.py, which shares no code with it, and compares.
#
#   tests/interop/apply_delta.sh
#
# VMTIDE_BIN names the vmtide to test; otherwise it is target/debug/vmtide. VMTIDE_PYTHON names a Python that has the
# packages of tools/requirements.txt; otherwise an environment with them is made and removed again.
set -euo pipefail

ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
VMTIDE="${VMTIDE_BIN:-$ROOT/target/debug/vmtide}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

die() {
    echo "apply_delta.sh: $*" >&2
    exit 1
}

[[ -x "$VMTIDE" ]] || die "no vmtide at $VMTIDE: build it (cargo build) or set VMTIDE_BIN"
PYTHON="${VMTIDE_PYTHON:-$WORK/venv/bin/python}"
if [[ -z "${VMTIDE_PYTHON:-}" ]]; then
    python3 -m venv "$WORK/venv" || die "python3-venv is missing"
    "$WORK/venv/bin/pip" install --quiet --disable-pip-version-check -r "$ROOT/tools/requirements.txt" ||
        die "the packages of tools/requirements.txt cannot be installed"
fi
export VMTIDE_STATE_DIR="$WORK/state" PYTHONDONTWRITEBYTECODE=1
cd "$WORK"

head -c 9M /dev/urandom >old.raw
truncate -s 24M old.raw
cp old.raw middle.raw
# Scattered blocks, text, a hole, and a disk that is larger afterwards.
for block in 3 17 300 301 302 1000 1800 2303; do
    head -c 4096 /dev/urandom | dd of=middle.raw bs=4096 seek="$block" conv=notrunc status=none
done
head -c 2M /dev/zero | dd of=middle.raw bs=1M seek=5 conv=notrunc status=none
cp middle.raw new.raw
{ yes vmtide || true; } | head -c 3M | dd of=new.raw bs=1M seek=11 conv=notrunc status=none
truncate -s 30M new.raw
head -c 100000 /dev/urandom | dd of=new.raw bs=1M seek=28 conv=notrunc status=none

"$VMTIDE" -q delta create middle.raw --base old.raw -o a.delta >/dev/null
"$VMTIDE" -q delta create new.raw --base middle.raw -o b.delta --compression none >/dev/null
"$VMTIDE" -q delta merge a.delta b.delta -o ab.delta >/dev/null
cp old.raw one.raw
cp old.raw two.raw
"$PYTHON" "$ROOT/tools/apply_delta.py" a.delta one.raw
cmp one.raw middle.raw || die "a delta was not applied as it should be"
"$PYTHON" "$ROOT/tools/apply_delta.py" b.delta one.raw
cmp one.raw new.raw || die "a delta of a disk that grew was not applied as it should be"
"$PYTHON" "$ROOT/tools/apply_delta.py" ab.delta two.raw
cmp two.raw new.raw || die "a merged delta was not applied as it should be"
if "$PYTHON" "$ROOT/tools/apply_delta.py" a.delta middle.raw 2>/dev/null; then
    die "a wrong base was taken"
fi
dd if=/dev/zero of=a.delta bs=1 seek=5000 count=1 conv=notrunc status=none
code=0
"$PYTHON" "$ROOT/tools/apply_delta.py" a.delta 2>/dev/null || code=$?
[[ "$code" == 5 ]] || die "an altered delta was taken ($code)"
echo "deltas read by an independent program are what they should be"
