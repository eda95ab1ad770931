#!/usr/bin/env bash
# Makes a small Linux guest for demonstrations and tests, from the distribution's own packages.
#
#   scripts/make-guest.sh OUT_DIR [--system-mib N] [--data-mib N]
#
# OUT_DIR gets: vmlinuz, initrd       for QEMU's -kernel and -initrd
#               system.qcow2          GPT with one ext4 partition: the root of the guest
#               data.raw              ext4 on the bare disk: a second disk, to test VMs of several disks
#
# Nothing is mounted and nothing needs root, but for installing packages that are missing: mke2fs fills a
# file system from a directory. What the guest does when it runs is in scripts/guest/.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
. "$REPO_ROOT/scripts/lib/packages.sh"

CACHE_DIR="${XDG_CACHE_HOME:-$HOME/.cache}/vmtide/packages"
# Where the partition starts: 1 MiB, as every partitioning tool of today does.
PARTITION_OFFSET=1048576
# Modules the initial RAM disk loads, with what they depend on: both disk buses and the serial ports.
GUEST_MODULES="virtio_pci virtio_blk virtio_scsi sd_mod virtio_console ext4"

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# fetch_package NAME: the path of the distribution's newest NAME.deb, downloaded once.
fetch_package() {
    local name="$1" version file
    version="$(apt-cache show --no-all-versions "$name" 2>/dev/null | awk '$1 == "Version:" && !seen { print $2; seen = 1 }')"
    [ -n "$version" ] || die "the package lists have no $name: run apt-get update and look at the package sources"
    file="$CACHE_DIR/${name}_${version//:/%3a}_$ARCHITECTURE.deb"
    if [ ! -e "$file" ]; then
        say "    downloading $name $version"
        # In a directory of its own, so that only a complete download gets its final name.
        local download
        download="$(mktemp -d "$CACHE_DIR/download.XXXXXX")"
        (cd "$download" && apt-get -q -o APT::Sandbox::User= download "$name") >"$download/log" 2>&1 </dev/null ||
            { cat "$download/log" >&2; die "could not download $name: check the network"; }
        mv "$download"/*.deb "$file"
        rm -rf "$download"
    fi
    printf '%s\n' "$file"
}

# kernel_packages: the versioned packages that hold the kernel and its modules.
kernel_packages() {
    local meta first
    # Debian's, else Ubuntu's: both are kernels for virtual machines.
    for meta in "linux-image-cloud-$ARCHITECTURE" linux-image-virtual ""; do
        apt-cache show "$meta" >/dev/null 2>&1 && break
    done
    first="$(apt-cache depends "$meta" | awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ && !seen { print $2; seen = 1 }')"
    [ -n "$first" ] || die "cannot find the kernel package behind $meta"
    printf '%s\n' "$first"
    apt-cache depends "$first" | awk '$1 == "Depends:" && $2 ~ /^linux-modules-[0-9]/ { print $2 }'
}

# copy_with_libraries PROGRAM ROOT: PROGRAM into ROOT/usr/sbin, its shared libraries to where the loader looks.
copy_with_libraries() {
    local program="$1" root="$2" library
    local -a libraries
    install -D -m 755 "$program" "$root/usr/sbin/$(basename "$program")"
    mapfile -t libraries < <(ldd "$program" | awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }')
    for library in "${libraries[@]}"; do
        [ -e "$library" ] || die "a library of $(basename "$program") is missing: $(ldd "$program" | grep 'not found')"
        install -D -m 755 "$library" "$root$library"
    done
}

# put_busybox ROOT: one program that is all the commands of the guest.
put_busybox() {
    local root="$1" applet
    mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,etc,usr/sbin}
    install -m 755 "$BUSYBOX" "$root/bin/busybox"
    for applet in sh mount umount cat echo sleep insmod findfs switch_root mkdir rm mv ls grep sed awk head tail wc \
        sync sha256sum poweroff dd tr cut df touch basename printf stat; do
        ln -sf busybox "$root/bin/$applet"
    done
}

# module_files: the module files to load, in the order of their dependencies. Those built in have none.
module_files() {
    local module
    for module in $GUEST_MODULES; do
        modprobe --dirname "$WORK/packages" --set-version "$KERNEL_VERSION" --show-depends "$module" ||
            die "the kernel $KERNEL_VERSION has no module $module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

make_initrd() {
    local root="$WORK/initrd" files file number=100
    put_busybox "$root"
    mkdir -p "$root/modules" "$root/newroot"
    files="$(module_files)"
    for file in $files; do
        number=$((number + 1))
        # Decompressed here: the guest's insmod need not know every compression.
        case "$file" in
            *.ko) cat "$file" ;;
            *.ko.xz) xz -dc "$file" ;;
            *.ko.zst) zstd -qdc "$file" ;;
            *) die "a kernel module of unknown compression: $file" ;;
        esac >"$root/modules/$number-$(basename "${file%%.ko*}").ko"
    done
    install -m 755 "$REPO_ROOT/scripts/guest/initrd-init" "$root/init"
    (cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 >"$OUT/initrd"
}

make_system_disk() {
    local root="$WORK/root" raw="$WORK/system.raw" partition_kib
    put_busybox "$root"
    mkdir -p "$root"/{data,srv/files,usr/share/vmtide}
    install -m 755 "$REPO_ROOT/scripts/guest/init" "$root/sbin/init"
    install -m 755 "$REPO_ROOT/scripts/guest/control" "$root/usr/sbin/vmtide-control"
    install -m 644 "$REPO_ROOT/scripts/guest/files.sh" "$root/usr/share/vmtide/files.sh"
    copy_with_libraries "$WORK/packages/usr/sbin/qemu-ga" "$root"
    echo '# generation 0' >"$root/srv/manifest"
    # Real files, so that compression and deduplication have something real to work on.
    mkdir -p "$root/usr/lib/modules" "$root/boot"
    cp -r "$WORK/packages/lib/modules/$KERNEL_VERSION" "$root/usr/lib/modules/"
    cp "$WORK"/packages/boot/* "$root/boot/"
    # What the guest cuts the contents of files from: the same in every guest made by this script.
    python3 - "$root/usr/share/vmtide" <<'PYTHON'
import random, sys
random.seed(2026)
with open(sys.argv[1] + "/noise", "wb") as noise:
    noise.write(random.randbytes(8 << 20))
with open(sys.argv[1] + "/log", "w") as log:
    words = "accepted closed connection error from host lease login port query renewed request session timeout user".split()
    while log.tell() < 8 << 20:
        log.writelines(f"{line:08} {' '.join(random.choices(words, k=6))} {random.randrange(1 << 32)}\n" for line in range(8192))
PYTHON

    truncate -s "${SYSTEM_MIB}M" "$raw"
    printf 'label: gpt\nstart=%s, type=linux, name="vmtide-root"\n' $((PARTITION_OFFSET / 512)) | sfdisk --quiet "$raw"
    # The last MiB is for the copy of the partition table.
    partition_kib=$((SYSTEM_MIB * 1024 - 2 * PARTITION_OFFSET / 1024))
    mke2fs -q -F -t ext4 -L vmtide-root -E "offset=$PARTITION_OFFSET,root_owner=0:0" -d "$root" "$raw" "${partition_kib}k"
    qemu-img convert -q -f raw -O qcow2 -o compat=1.1,lazy_refcounts=off "$raw" "$OUT/system.qcow2"
}

make_data_disk() {
    local root="$WORK/data"
    mkdir -p "$root/files"
    echo '# generation 0' >"$root/manifest"
    rm -f "$OUT/data.raw"
    truncate -s "${DATA_MIB}M" "$OUT/data.raw"
    mke2fs -q -F -t ext4 -L vmtide-data -E root_owner=0:0 -d "$root" "$OUT/data.raw"
}

OUT=""
SYSTEM_MIB=2048
DATA_MIB=256
while [ $# -gt 0 ]; do
    case "$1" in
        --system-mib) SYSTEM_MIB="${2:?}" && shift 2 ;;
        --data-mib) DATA_MIB="${2:?}" && shift 2 ;;
        -*) usage ;;
        *) [ -z "$OUT" ] || usage; OUT="$1"; shift ;;
    esac
done
[ -n "$OUT" ] || usage
[ "$SYSTEM_MIB" -ge 512 ] || die "--system-mib $SYSTEM_MIB is too small for the guest's files: 512 or more"
[ "$DATA_MIB" -ge 32 ] || die "--data-mib $DATA_MIB is too small: 32 or more"

ARCHITECTURE="$(dpkg --print-architecture)"
[ "$ARCHITECTURE" = amd64 ] || die "the test guest is made on amd64 only, this machine is $ARCHITECTURE"

ensure_packages "making the guest" busybox-static cpio e2fsprogs fdisk gzip kmod python3 xz-utils zstd
ensure_qemu
apt-cache show qemu-guest-agent >/dev/null 2>&1 || apt_update
BUSYBOX="$(command -v busybox)"

mkdir -p "$OUT" "$CACHE_DIR"
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d "${TMPDIR:-/tmp}/vmtide-guest.XXXXXX")"
trap 'rm -rf "$WORK"' EXIT
need_space "$WORK" 1024 "making the guest"

mkdir -p "$WORK/packages"
mapfile -t KERNEL_PACKAGES < <(kernel_packages)
AGENT_PACKAGE="$(fetch_package qemu-guest-agent)"
# The libraries of the guest agent are copied from this machine.
mapfile -t AGENT_LIBRARIES < <(dpkg-deb -f "$AGENT_PACKAGE" Depends | tr ',' '\n' | sed 's/|.*//; s/(.*//; s/ //g' | grep '^lib')
ensure_packages "the guest's agent" "${AGENT_LIBRARIES[@]}"
dpkg-deb -x "$AGENT_PACKAGE" "$WORK/packages"
for package in "${KERNEL_PACKAGES[@]}"; do
    dpkg-deb -x "$(fetch_package "$package")" "$WORK/packages"
done
# Packages of merged-/usr distributions carry /usr/lib/modules; depmod and modprobe look below /lib.
[ -d "$WORK/packages/lib/modules" ] || ln -s usr/lib "$WORK/packages/lib"
KERNEL_VERSION="$(basename "$WORK"/packages/lib/modules/*)"
depmod -b "$WORK/packages" "$KERNEL_VERSION"
cat "$WORK"/packages/boot/vmlinuz-* >"$OUT/vmlinuz"

make_initrd
make_system_disk
make_data_disk
say "    guest with Linux $KERNEL_VERSION: $SYSTEM_MIB MiB system disk (qcow2), $DATA_MIB MiB data disk (raw) in $OUT"
