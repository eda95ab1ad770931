#!/usr/bin/env bash
# link.sh LIBVMTIDE.A PREFIX: makes libvmtide.so with symbol versions from the static library, and installs both.
set -euo pipefail
archive="$1"
prefix="$2"
here="$(cd "$(dirname "$0")" && pwd)"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -n 1)"
major="${version%%.*}"
mkdir -p "$prefix/lib/pkgconfig" "$prefix/include"
# Only what the version script names is kept; the rest of the static library goes where nothing needs it.
symbols="$(sed -n 's/^ *\(vmtide_[a-z_]*\);$/-Wl,-u,\1/p' "$here/abi/vmtide.map")"
# shellcheck disable=SC2086 # one word each
"${CC:-cc}" -shared -o "$prefix/lib/libvmtide.so.$version" $symbols "$archive" \
    -Wl,--version-script="$here/abi/vmtide.map" -Wl,-soname,"libvmtide.so.$major" \
    -Wl,--gc-sections -Wl,-z,defs -Wl,-z,relro -Wl,-z,now -lpthread -ldl -lm -lgcc_s -lc
ln -sf "libvmtide.so.$version" "$prefix/lib/libvmtide.so.$major"
ln -sf "libvmtide.so.$major" "$prefix/lib/libvmtide.so"
install -m 644 "$archive" "$prefix/lib/libvmtide.a"
install -m 644 "$here/include/vmtide.h" "$prefix/include/vmtide.h"
sed -e "s|@PREFIX@|$prefix|" -e "s|@VERSION@|$version|" "$here/vmtide.pc.in" >"$prefix/lib/pkgconfig/vmtide.pc"
