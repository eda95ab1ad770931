#!/usr/bin/env bash
# vmtide at work on a real virtual machine, from nothing, in minutes:
#
#   scripts/demo.sh [--keep] [--dir DIR]
#
# Installs what is missing (and says what), builds vmtide, makes a small Linux guest from the distribution's
# packages and boots it in QEMU. Then: a full backup while it runs; the guest writes and deletes files; an
# incremental backup; the disks are destroyed; they are restored; the restored guest boots and checks every file.
#
# Everything happens in a temporary directory (below TMPDIR, or DIR), which is removed at the end; --keep keeps it.
# Nothing is left running.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
. "$REPO_ROOT/scripts/lib/packages.sh"
# shellcheck source=scripts/lib/rust.sh
. "$REPO_ROOT/scripts/lib/rust.sh"

KEEP=""
PARENT="${TMPDIR:-/tmp}"
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) KEEP=yes && shift ;;
        --dir) PARENT="${2:?}" && shift 2 ;;
        *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

WORK=""
QEMU_PID=""

# At every end, also by Ctrl-C: the guest is switched off and the directory removed.
clean_up() {
    local status=$?
    trap - EXIT
    if [ -n "$QEMU_PID" ]; then
        kill -9 "$QEMU_PID" 2>/dev/null || true
        wait "$QEMU_PID" 2>/dev/null || true
    fi
    if [ -n "$WORK" ] && [ -n "$KEEP" ]; then
        say "kept: $WORK"
    elif [ -n "$WORK" ]; then
        rm -rf "$WORK"
    fi
    [ "$status" -eq 0 ] || say "the demonstration did not come to its end (exit code $status)"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# show COMMAND…: the command as one would type it, then the command.
show() {
    say "    \$ ${*//$WORK\//}"
    "$@"
}

# vmtide_json NAME ARGUMENTS…: shows and runs vmtide; its events go to NAME.json, the last one is the summary.
vmtide_json() {
    local name="$1"
    shift
    say "    \$ vmtide ${*//$WORK\//}"
    "$VMTIDE" "$@" --json >"$WORK/$name.json" || die "vmtide $1 failed: $(tail -n 1 "$WORK/$name.json")"
}

# summary NAME PYTHON: a value out of the summary of NAME.json, called `s` in the expression.
summary() {
    python3 -c 'import json, sys
s = json.loads(open(sys.argv[1]).read().splitlines()[-1])
print(eval(sys.argv[2]))' "$WORK/$1.json" "$2"
}

start_guest() {
    "$REPO_ROOT/scripts/run-guest.sh" "$WORK" "$@" >"$WORK/qemu.log" 2>&1 </dev/null &
    QEMU_PID=$!
}

# wait_console TEXT: until the guest's console says TEXT.
wait_console() {
    local tenths=0
    until grep -qs "$1" "$WORK/run/console.log"; do
        kill -0 "$QEMU_PID" 2>/dev/null || die "QEMU ended early: $(tail -n 3 "$WORK/qemu.log" "$WORK/run/console.log")"
        tenths=$((tenths + 1))
        [ "$tenths" -lt 1800 ] || die "the guest did not start within 180 s: $(tail -n 3 "$WORK/run/console.log")"
        sleep 0.1
    done
}

guest() {
    say "    guest: $*"
    say "        $(python3 "$REPO_ROOT/tests/e2e/lab/control.py" "$WORK/run/control.sock" "$@")" || die "the guest failed at: $*"
}

step "installing what is missing"
ensure_rust
ensure_qemu
ensure_packages "this demonstration" python3

step "building vmtide (cargo build --release; the first time takes minutes)"
cd "$REPO_ROOT"
cargo build --release --locked -p vmtide </dev/null
VMTIDE="$(cargo metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release/vmtide"
BUILD_SECONDS=$SECONDS

mkdir -p "$PARENT"
WORK="$(mktemp -d "$(cd "$PARENT" && pwd)/vmtide-demo.XXXXXX")"
need_space "$WORK" 2048 "the demonstration"
cd "$WORK"
# A secret never goes on the command line: vmtide takes it from the environment, a file or a command.
VMTIDE_PASSWORD="$(head -c 18 /dev/urandom | base64)"
export VMTIDE_PASSWORD
# What vmtide remembers between runs (its journals) stays here, too.
export VMTIDE_STATE_DIR="$WORK/state"

step "making a small Linux guest from distribution packages: a 2 GiB system disk, a 256 MiB data disk"
"$REPO_ROOT/scripts/make-guest.sh" "$WORK"

step "booting it in QEMU (emulated, without KVM, so that it works everywhere)"
start_guest
wait_console "VMTIDE GUEST READY"
guest write 1 60 1000

step "an encrypted repository, and a full backup while the guest runs"
SOURCE="qemu+unix://$WORK/run/qmp.sock"
vmtide_json init init "$WORK/repository"
vmtide_json full backup "$SOURCE" -r "$WORK/repository" --consistency fs

step "the guest goes on: it writes and deletes files"
guest write 2 20 1000
guest delete 10
guest check

step "an incremental backup: only what changed is read"
vmtide_json incremental backup "$SOURCE" -r "$WORK/repository" --consistency fs

step "disaster: random damage in the running guest's disk, then both disks are lost"
dd if=/dev/urandom of="$WORK/system.qcow2" bs=1M seek=20 count=20 conv=notrunc status=none
kill -9 "$QEMU_PID"
wait "$QEMU_PID" 2>/dev/null || true
QEMU_PID=""
show rm "$WORK/system.qcow2" "$WORK/data.raw"

step "restoring the newest restore point"
POINT="$(summary incremental 's["point"]')"
vmtide_json restore restore "$POINT" -r "$WORK/repository" --to "$WORK/restored" --format qcow2

step "booting the restored disks: the guest checks every file's checksum"
SYSTEM="$(summary restore '[d["path"] for d in s["disks"] if "system" in d["id"]][0]')"
DATA="$(summary restore '[d["path"] for d in s["disks"] if "data" in d["id"]][0]')"
rm -f "$WORK/run/console.log"
start_guest --system "$SYSTEM" --data "$DATA" --append vmtide.check=1
wait_console "VMTIDE CHECK"
wait "$QEMU_PID" || true
QEMU_PID=""
VERDICT="$(grep -a -o 'CHECK .*' "$WORK/run/console.log" | tr -d '\r')"
say "        $VERDICT"
case "$VERDICT" in
    # 60 files written, 20 more, 10 deleted; on each of two disks.
    "CHECK OK 140 files"*) ;;
    *) die "the restored guest does not have what it had: $VERDICT" ;;
esac

step "done"
python3 - "$WORK" "$((SECONDS - BUILD_SECONDS))" <<'PYTHON'
import json, sys

def load(name):
    with open(f"{sys.argv[1]}/{name}.json") as file:
        return json.loads(file.read().splitlines()[-1])

def mib(number):
    return f"{number / (1 << 20):10.1f}"

print(f"{'MiB':28}{'disk':>10}{'changed':>10}{'read':>10}{'stored':>10}{'seconds':>10}")
for name in ("full", "incremental"):
    backup = load(name)
    sums = [sum(disk[key] for disk in backup["disks"]) for key in ("size_bytes", "changed_bytes", "read_bytes", "stored_bytes")]
    print(f"{name + ' backup':28}{''.join(mib(number) for number in sums)}{backup['duration_ms'] / 1000:10.1f}")
restore = load("restore")
print(f"{'restore':28}{mib(sum(disk['size_bytes'] for disk in restore['disks']))}{'':30}{restore['duration_ms'] / 1000:10.1f}")
print(f"\nThe restored guest found all its files whole. All of this took {sys.argv[2]} s after the build.")
PYTHON
