#!/usr/bin/env bash
# A restore onto a real block device, and in place onto one that differs: a loop device, so as root.
set -euo pipefail

VMTIDE_BIN="${VMTIDE_BIN:-$(dirname "$0")/../../target/debug/vmtide}"
if [ "$(id -u)" -ne 0 ]; then
    echo "block devices are left out: loop devices need root"
    exit 0
fi

WORK="$(mktemp -d "${TMPDIR:-/tmp}/vmtide-block.XXXXXX")"
DEVICE=""
MOUNTED=""
clean_up() {
    [ -z "$MOUNTED" ] || umount "$MOUNTED"
    [ -z "$DEVICE" ] || losetup --detach "$DEVICE"
    rm -rf "$WORK"
}
trap clean_up EXIT

export VMTIDE_PASSWORD="block device" VMTIDE_STATE_DIR="$WORK/state"
truncate -s 64M "$WORK/disk.raw"
dd if=/dev/urandom of="$WORK/disk.raw" bs=1M count=9 seek=3 conv=notrunc status=none
dd if=/dev/urandom of="$WORK/disk.raw" bs=4096 count=1 conv=notrunc status=none
truncate -s 80M "$WORK/device"
DEVICE="$(losetup --find --show "$WORK/device")"

"$VMTIDE_BIN" -q init "$WORK/repo" >"$WORK/log"
"$VMTIDE_BIN" -q backup "$WORK/disk.raw" -r "$WORK/repo" >"$WORK/log"
"$VMTIDE_BIN" -q restore disk@latest -r "$WORK/repo" --to "$DEVICE" >"$WORK/log"
cmp -n "$((64 << 20))" "$WORK/disk.raw" "$DEVICE"

# A device that holds something is not overwritten unless asked to.
if "$VMTIDE_BIN" -q restore disk@latest -r "$WORK/repo" --to "$DEVICE" >"$WORK/log" 2>&1; then
    echo "a device with data was overwritten without --force" >&2
    exit 1
fi

# In place: only what differs is written.
printf 'changed' | dd of="$DEVICE" bs=1 seek=5000000 conv=notrunc status=none
"$VMTIDE_BIN" restore disk@latest -r "$WORK/repo" --to "$DEVICE" --in-place --json >"$WORK/log"
cmp -n "$((64 << 20))" "$WORK/disk.raw" "$DEVICE"
python3 - "$WORK/log" <<'PYTHON'
import json, sys
summary = [json.loads(line) for line in open(sys.argv[1])][-1]
written = sum(disk["written_bytes"] for disk in summary["disks"])
assert written == 65536, f"{written} bytes were written for a change of 7: {summary}"
PYTHON

# A device that is mounted is refused, whatever is asked for, and its file system stays whole.
mkfs.ext4 -q -F "$DEVICE"
mkdir "$WORK/mnt"
mount "$DEVICE" "$WORK/mnt"
MOUNTED="$WORK/mnt"
echo precious >"$WORK/mnt/file"
for how in --force --in-place; do
    code=0
    "$VMTIDE_BIN" -q restore disk@latest -r "$WORK/repo" --to "$DEVICE" "$how" >"$WORK/log" 2>&1 || code=$?
    if [ "$code" -ne 1 ] || ! grep -q "is in use (mounted" "$WORK/log"; then
        echo "a mounted device was not refused with $how (code $code): $(cat "$WORK/log")" >&2
        exit 1
    fi
done
umount "$WORK/mnt"
MOUNTED=""
e2fsck -fn "$DEVICE" >"$WORK/log" 2>&1
mount "$DEVICE" "$WORK/mnt"
MOUNTED="$WORK/mnt"
[ "$(cat "$WORK/mnt/file")" = precious ]
umount "$WORK/mnt"
MOUNTED=""
"$VMTIDE_BIN" -q restore disk@latest -r "$WORK/repo" --to "$DEVICE" --force >"$WORK/log"
cmp -n "$((64 << 20))" "$WORK/disk.raw" "$DEVICE"

# A device that is too small is refused before anything is written.
losetup --detach "$DEVICE"
truncate -s 32M "$WORK/device"
DEVICE="$(losetup --find --show "$WORK/device")"
before="$(sha256sum <"$DEVICE")"
if "$VMTIDE_BIN" -q restore disk@latest -r "$WORK/repo" --to "$DEVICE" --force >"$WORK/log" 2>&1; then
    echo "a disk was restored onto a device that is too small" >&2
    exit 1
fi
[ "$before" = "$(sha256sum <"$DEVICE")" ]
echo "test result: ok. 7 passed; 0 failed"
