# shellcheck shell=bash
# Distribution packages on Debian and Ubuntu: says what is missing and why, then installs only that.
# Source after common.sh.

APT_LISTS_FRESH=""

# apt_quiet ARGS…: apt-get as root without questions; its chatter is shown only when it fails.
apt_quiet() {
    local log status=0
    log="$(mktemp)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" -eq 0 ] || tail -n 30 "$log" >&2
    rm -f "$log"
    return "$status"
}

# apt_update: refreshes the package lists, once per script.
apt_update() {
    [ -z "$APT_LISTS_FRESH" ] || return 0
    have apt-get || die "this script installs packages with apt-get (Debian 12+, Ubuntu 22.04+); elsewhere install by hand what it names and run it again"
    say "    refreshing the package lists (apt-get update)"
    apt_quiet update || die "apt-get update failed: check the network and /etc/apt/sources.list.d"
    APT_LISTS_FRESH=yes
}

package_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# package_available PACKAGE: whether it can be installed. Being named by another package, as rustup is in Debian 12, is
# enough for `apt-cache show`, but not for this.
package_available() {
    have apt-cache && apt-cache policy "$1" 2>/dev/null | grep '^ *Candidate: [^(]' >/dev/null
}

# ensure_packages WHY PACKAGE…: installs those that are missing.
ensure_packages() {
    local why="$1" package
    local -a missing=()
    shift
    for package in "$@"; do
        package_installed "$package" || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "    installing for $why: ${missing[*]}"
    apt_update
    apt_quiet install --no-install-recommends "${missing[@]}" || die "could not install ${missing[*]} (needed for $why)"
}

os_codename() {
    (
        # shellcheck source=/dev/null
        . /etc/os-release
        printf '%s' "${VERSION_CODENAME:-unknown}"
    )
}

# enable_backports CODENAME: adds the backports suite, from the mirror this machine already uses.
enable_backports() {
    local codename="$1" suite="$1-backports" sources mirror keyring signed_by=""
    apt_update
    # shellcheck disable=SC2016 # apt fills these in, not the shell
    sources="$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null || true)"
    mirror="$(awk -v suite="$suite" '$1 == suite && !seen { print $2; seen = 1 }' <<<"$sources")"
    [ -z "$mirror" ] || return 0
    mirror="$(awk -v suite="$codename" '$1 == suite && !seen { print $2; seen = 1 }' <<<"$sources")"
    mirror="${mirror:-http://deb.debian.org/debian}"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ ! -e "$keyring" ] || signed_by="Signed-By: $keyring"
    say "    adding the package source $suite (/etc/apt/sources.list.d/vmtide-backports.sources)"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n%s\n' "${mirror%/}" "$suite" "$signed_by" |
        sed '/^$/d' | as_root tee /etc/apt/sources.list.d/vmtide-backports.sources >/dev/null
    APT_LISTS_FRESH=""
    if (apt_update); then
        APT_LISTS_FRESH=yes
    else
        say "    $suite cannot be reached: going on without it"
        as_root rm -f /etc/apt/sources.list.d/vmtide-backports.sources
        return 1
    fi
}

# QEMU from Debian 12 itself (7.2) works with vmtide, but backports has the release most people run.
QEMU_PREFERRED=10.0
# The oldest QEMU that has copy-before-write with a time-out and snapshot-access.
QEMU_MINIMUM=7.1

qemu_version() {
    qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

# ensure_qemu: the emulator, its disk tools and its storage daemon, all of one version.
ensure_qemu() {
    local codename
    local -a release=()
    if ! have qemu-system-x86_64 || ! have qemu-img || ! have qemu-storage-daemon; then
        codename="$(os_codename)"
        if [ "$codename" = bookworm ] && enable_backports "$codename"; then
            release=(-t "$codename-backports")
        fi
        say "    installing the virtual machine monitor: qemu-system-x86 qemu-utils ${release[*]}"
        apt_update
        apt_quiet install --no-install-recommends "${release[@]}" qemu-system-x86 qemu-system-common qemu-system-data qemu-utils ||
            die "could not install QEMU"
    fi
    have qemu-storage-daemon || ensure_packages "the storage daemon" qemu-storage-daemon
    version_at_least "$(qemu_version)" "$QEMU_MINIMUM" ||
        die "QEMU $(qemu_version) is too old: $QEMU_MINIMUM or newer is needed (Debian 12, Ubuntu 24.04)"
    version_at_least "$(qemu_version)" "$QEMU_PREFERRED" ||
        say "    note: QEMU $(qemu_version) works; $QEMU_PREFERRED or newer is what vmtide is tested with most"
}
