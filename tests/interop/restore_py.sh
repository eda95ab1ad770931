#!/usr/bin/env bash
# Restores with tools/restore.py, which shares no code with vmtide, what vmtide stored, and compares.
#
#   tests/interop/restore_py.sh
#
# VMTIDE_BIN names the vmtide to test; otherwise it is target/debug/vmtide. VMTIDE_PYTHON names a
# Python that has the packages of tools/requirements.txt; otherwise an environment with them is made
# and removed again. Needs python3, python3-venv and coreutils.
set -euo pipefail

ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
VMTIDE="${VMTIDE_BIN:-$ROOT/target/debug/vmtide}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

die() {
    echo "restore_py.sh: $*" >&2
    exit 1
}

[[ -x "$VMTIDE" ]] || die "no vmtide at $VMTIDE: build it (cargo build) or set VMTIDE_BIN"
PYTHON="${VMTIDE_PYTHON:-$WORK/venv/bin/python}"
if [[ -z "${VMTIDE_PYTHON:-}" ]]; then
    python3 -m venv "$WORK/venv" || die "python3-venv is missing"
    "$WORK/venv/bin/pip" install --quiet --disable-pip-version-check -r "$ROOT/tools/requirements.txt" ||
        die "the packages of tools/requirements.txt cannot be installed"
fi

export VMTIDE_STATE_DIR="$WORK/state" VMTIDE_PASSWORD="correct horse" PYTHONDONTWRITEBYTECODE=1
IMAGE="$WORK/disk.raw"
SIZE=$((96 * 1024 * 1024 + 1536)) # Ends within a block.

vmtide() {
    "$VMTIDE" "$@" >"$WORK/vmtide.log" 2>&1 || {
        cat "$WORK/vmtide.log" >&2
        die "vmtide $* failed"
    }
}

restore_py() {
    "$PYTHON" "$ROOT/tools/restore.py" "$@"
}

# write_at OFFSET LENGTH KIND: puts bytes of a kind into the image. Random ones do not compress,
# text does, zeros are to become holes.
write_at() {
    case "$3" in
    random) head -c "$2" /dev/urandom ;;
    text) { yes "vmtide $1" || true; } | head -c "$2" ;;
    zero) head -c "$2" /dev/zero ;;
    esac | dd of="$IMAGE" bs=64K seek="$1" oflag=seek_bytes conv=notrunc status=none
}

# backup NUMBER: takes a restore point and keeps what the disk was.
backup() {
    vmtide backup "$IMAGE" -r "$REPO"
    cp --sparse=always "$IMAGE" "$WORK/reference.$1"
}

# The id of restore point NUMBER, from 1, oldest first.
point_id() {
    restore_py "$REPO" | sed -n "${1}p" | cut -d' ' -f1
}

# check NUMBER REFERENCE: restores a point and compares it.
check() {
    local id disk
    id="$(point_id "$1")"
    [[ -n "$id" ]] || die "restore.py lists no point $1"
    disk="$(restore_py "$REPO" "$id" | head -n 1 | sed 's/  [0-9]* bytes$//')"
    restore_py "$REPO" "$id" "$disk" "$WORK/restored"
    cmp "$WORK/restored" "$WORK/reference.$2" || die "point $1 ($ENCRYPTION): bytes differ"
    local restored_kib
    restored_kib="$(du --block-size=1K "$WORK/restored" | cut -f1)"
    ((restored_kib < SIZE / 1024 / 2)) || die "the restored image is not sparse: $restored_kib KiB"
    rm "$WORK/restored"
    echo "ok: $ENCRYPTION, $3"
}

# flip PACK: flips one bit in the middle of a file.
flip() {
    local at byte
    at=$(($(stat -c %s "$1") / 2))
    byte="$(od -An -tu1 -j "$at" -N 1 "$1")"
    printf '%b' "\\x$(printf '%02x' $((byte ^ 1)))" |
        dd of="$1" bs=1 seek="$at" conv=notrunc status=none
}

# Damages packs, lets a backup heal them, brings them back, and damages what healed them.
healing() {
    local code=0
    cp -a "$REPO/packs" "$WORK/packs"
    find "$REPO/packs" -type f | while read -r pack; do flip "$pack"; done
    "$VMTIDE" verify -r "$REPO" --read-data >"$WORK/vmtide.log" 2>&1 || code=$?
    [[ "$code" == 5 ]] || die "verify of damaged packs: exit code $code"
    code=0
    "$VMTIDE" backup "$IMAGE" -r "$REPO" --level full >"$WORK/vmtide.log" 2>&1 || code=$?
    [[ "$code" == 0 || "$code" == 3 ]] || die "backup of damaged packs: exit code $code"
    find "$REPO/healed" -type f | grep -q . || die "nothing was healed"
    check 2 3 "healed"
    cp -a "$WORK/packs/." "$REPO/packs/"
    "$VMTIDE" verify -r "$REPO" --read-data >"$WORK/vmtide.log" 2>&1 || die "verify of what came back"
    find "$REPO/packs" -type f | while read -r pack; do
        [[ -e "$WORK/packs/${pack#"$REPO/packs/"}" ]] || flip "$pack"
    done
    "$VMTIDE" verify -r "$REPO" --read-data >"$WORK/vmtide.log" 2>&1 || true
    check 2 3 "an original that came back, and what healed it is damaged"
    rm -r "$WORK/packs"
}

# expect CODE WHAT COMMAND…: the command ends with this exit code.
expect() {
    local expected="$1" what="$2" code=0
    shift 2
    "$@" >"$WORK/expect.log" 2>&1 || code=$?
    [[ "$code" == "$expected" ]] || {
        cat "$WORK/expect.log" >&2
        die "$what: exit code $code instead of $expected"
    }
    echo "ok: $ENCRYPTION, $what: exit code $code"
}

for ENCRYPTION in aes-256-gcm none; do
    REPO="$WORK/repository-$ENCRYPTION"
    rm -f "$IMAGE" "$WORK"/reference.*
    truncate -s "$SIZE" "$IMAGE"
    write_at 0 3000000 text
    write_at 8388608 9000000 random
    write_at 50000001 777777 random
    write_at $((SIZE - 1000)) 1000 random
    vmtide init "$REPO" --encryption "$ENCRYPTION"
    backup 1

    write_at 9000000 500000 text
    write_at 12345678 4096 random
    write_at 1000000 1000000 zero
    backup 2

    write_at 70000000 2000000 random
    write_at 8388608 3000000 zero
    backup 3

    check 1 1 "full"
    check 2 2 "incremental"
    check 3 3 "incremental on an incremental"

    # Half of the first packs is dead now: prune moves the rest, and forwards lead to it.
    vmtide forget "$(point_id 1)" -r "$REPO"
    vmtide prune -r "$REPO"
    check 1 2 "after forget and prune"
    check 2 3 "after forget and prune, the newer"
    echo "   forwards: $(find "$REPO/forward" -type f 2>/dev/null | wc -l)"

    healing

    held="$(point_id 1)"
    vmtide hold "$held" -r "$REPO" --reason "interoperation" --until 1d
    rm -f "$REPO/points/$held"
    check 1 2 "kept by a hold alone"

    if [[ "$ENCRYPTION" != none ]]; then
        vmtide key add -r "$REPO" --recovery --recovery-file "$WORK/paper"
        tr -d '-' <"$WORK/paper" | tr '[:upper:]01' '[:lower:]oi' | tr -d '\n' >"$WORK/typed"
        printf '\r\n' >>"$WORK/typed"
        restore_py --password-file "$WORK/typed" "$REPO" >/dev/null || die "a recovery key in small letters"
        rm "$WORK/paper" "$WORK/typed"
        VMTIDE_PASSWORD=wrong expect 4 "wrong password" restore_py "$REPO"
    fi
    expect 6 "no such point" restore_py "$REPO" 00000000 disk "$WORK/none"
    expect 6 "no repository" restore_py "$WORK/absent"
    disk="$(restore_py "$REPO" "$(point_id 1)" | head -n 1 | sed 's/  [0-9]* bytes$//')"
    # One bit in the middle of every pack: whichever is read first is found.
    find "$REPO/packs" -type f | while read -r pack; do flip "$pack"; done
    expect 5 "flipped bits" restore_py "$REPO" "$(point_id 1)" "$disk" "$WORK/none"
    [[ ! -e "$WORK/none" && ! -e "$WORK/none.partial" ]] || die "a damaged restore left a file"
done
echo "restore_py.sh: all restored as they were"
