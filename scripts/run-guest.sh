#!/usr/bin/env bash
# Runs the guest made by make-guest.sh in the foreground, until it powers off or QEMU is told to quit.
#
#   scripts/run-guest.sh DIR [--append KERNEL_WORDS] [--system FILE] [--data FILE | --data-nbd SOCKET]
#
# --system and --data boot other disks (raw or qcow2, by the file's content); --data-nbd takes the data disk from an NBD
# server at a Unix socket. In DIR/run are then:
#   qmp.sock      for vmtide: vmtide backup qemu+unix://DIR/run/qmp.sock …
#   inspect.sock  a second monitor, to look at QEMU independently
#   agent.sock    the guest agent     control.sock  the guest's command port (tests/e2e/lab/control.py)
#   console.log   what the guest says on its console
#
# The script becomes QEMU (exec): the process id of the script is QEMU's.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/lib/common.sh"

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# format_of FILE: qcow2 when it says so in its first bytes, else raw. QEMU must not guess for a guest.
format_of() {
    if [ "$(head -c 4 "$1" | od -An -tx1 | tr -d ' ')" = 514649fb ]; then
        printf qcow2
    else
        printf raw
    fi
}

DIR=""
APPEND=""
SYSTEM=""
DATA=""
while [ $# -gt 0 ]; do
    case "$1" in
        --append) APPEND="${2:?}" && shift 2 ;;
        --system) SYSTEM="${2:?}" && shift 2 ;;
        --data) DATA="${2:?}" && shift 2 ;;
        --data-nbd) DATA_NBD="${2:?}" && shift 2 ;;
        -*) usage ;;
        *) [ -z "$DIR" ] || usage; DIR="$1"; shift ;;
    esac
done
[ -n "$DIR" ] || usage
DIR="$(cd "$DIR" && pwd)"
SYSTEM="${SYSTEM:-$DIR/system.qcow2}"
DATA="${DATA:-$DIR/data.raw}"
if [ -n "${DATA_NBD:-}" ]; then
    DATA_DISK="driver=nbd,node-name=data,discard=unmap,server.type=unix,server.path=$DATA_NBD"
else
    DATA_DISK="driver=$(format_of "$DATA"),node-name=data,discard=unmap,file.driver=file,file.filename=$DATA,file.discard=unmap"
fi
RUN="$DIR/run"
# The kernel's limit for the path of a Unix socket is 107 bytes.
[ "${#RUN}" -le 90 ] || die "$DIR: the path is too long for Unix sockets in it, choose a shorter one"
have qemu-system-x86_64 || die "qemu-system-x86_64 is missing: scripts/make-guest.sh installs it"
mkdir -p "$RUN"
rm -f "$RUN"/*.sock

# tcg and not kvm: the same everywhere, also inside virtual machines and containers.
# no_timer_check: an emulated timer can be late on a busy machine, which Linux would take for a broken one.
exec qemu-system-x86_64 \
    -nodefaults -no-user-config -display none -no-reboot \
    -name vmtide-guest -machine q35 -accel tcg -cpu max -smp 1 -m 256 \
    -kernel "$DIR/vmlinuz" -initrd "$DIR/initrd" -append "console=ttyS0 quiet panic=-1 no_timer_check $APPEND" \
    -serial "file:$RUN/console.log" \
    -chardev "socket,id=qmp,path=$RUN/qmp.sock,server=on,wait=off" -mon chardev=qmp,mode=control \
    -chardev "socket,id=inspect,path=$RUN/inspect.sock,server=on,wait=off" -mon chardev=inspect,mode=control \
    -device virtio-serial-pci \
    -chardev "socket,id=agent,path=$RUN/agent.sock,server=on,wait=off" \
    -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 \
    -chardev "socket,id=control,path=$RUN/control.sock,server=on,wait=off" \
    -device virtserialport,chardev=control,name=org.vmtide.control \
    -blockdev "driver=$(format_of "$SYSTEM"),node-name=system,discard=unmap,file.driver=file,file.filename=$SYSTEM,file.discard=unmap" \
    -device virtio-blk-pci,id=disk-system,drive=system \
    -blockdev "$DATA_DISK" \
    -device virtio-blk-pci,id=disk-data,drive=data
