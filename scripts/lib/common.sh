# shellcheck shell=bash
# Small helpers every script here sources: saying what happens, stopping with one clear line, running as root.

# The root of the source tree, wherever the script was called from.
REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export REPO_ROOT

# say TEXT…: one line to the person at the terminal. On standard error, so that standard output stays for results.
say() {
    printf '%s\n' "$*" >&2
}

# step TEXT…: the head of a part of the work, with the seconds since the script began.
step() {
    printf '\n==> [%4ds] %s\n' "$SECONDS" "$*" >&2
}

# die TEXT…: one line that says what is wrong and what to do, then the end.
die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# as_root COMMAND…: runs it as root: directly, or through sudo (which may ask for a password on a terminal).
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "this needs root: $* — run the script as root or install sudo"
    fi
}

# version_at_least HAVE WANT: true when the dotted version HAVE is WANT or newer.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# need_space DIR MIB WHAT: stops early instead of half-way when DIR has less room than WHAT needs.
need_space() {
    local available
    available="$(df --output=avail -m "$1" | tail -n 1 | tr -d ' ')"
    [ "$available" -ge "$2" ] || die "$3 needs $2 MiB in $1, which has $available MiB free: make room or choose another directory"
}

# The things of the administrator (mke2fs, sfdisk, depmod) are not on every user's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export PATH
