# shellcheck shell=bash
# Building for 64-bit Windows on Linux, and running what was built under Wine. Source after common.sh and packages.sh.

WINDOWS_TARGET=x86_64-pc-windows-gnu
# Shared with nothing: the compiler may be another than the one for Linux.
WINDOWS_TARGET_DIR="${VMTIDE_WINDOWS_TARGET_DIR:-$REPO_ROOT/target/windows}"

# ensure_windows_toolchain: a linker and C compiler for Windows, and a Rust that has, or can build, its standard library
# for it. Sets WINDOWS_CARGO and WINDOWS_CARGO_ARGS.
ensure_windows_toolchain() {
    ensure_packages "building for Windows" gcc-mingw-w64-x86-64
    WINDOWS_CARGO=(cargo)
    WINDOWS_CARGO_ARGS=()
    if have rustc && [ -d "$(rustc --print target-libdir --target "$WINDOWS_TARGET")" ]; then
        return 0
    fi
    # Debian has the sources of the standard library, which cargo builds with the compiler they belong to. That is a
    # feature of nightly compilers, which this variable switches on in others.
    package_installed rustc-web || package_available rustc-web ||
        die "there is no Rust for Windows here: rustup target add $WINDOWS_TARGET, and run this again"
    ensure_packages "building for Windows" rustc-web cargo-web rust-web-src
    WINDOWS_CARGO=(env RUSTC_BOOTSTRAP=1 RUSTC=/usr/bin/rustc /usr/bin/cargo)
    WINDOWS_CARGO_ARGS=("-Zbuild-std=std,panic_abort")
}

# windows_cargo SUBCOMMAND ARGS…: cargo for Windows. Flags and wrappers that are meant for Linux are left out.
windows_cargo() {
    local subcommand="$1"
    shift
    env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u RUSTC_WORKSPACE_WRAPPER CARGO_TARGET_DIR="$WINDOWS_TARGET_DIR" \
        "${WINDOWS_CARGO[@]}" "$subcommand" "${WINDOWS_CARGO_ARGS[@]}" --target "$WINDOWS_TARGET" "$@"
}

# ensure_wine: Wine for 64-bit programs, with an installation of its own in target/wine, made once.
# Sets WINEPREFIX and what keeps Wine quiet.
ensure_wine() {
    ensure_packages "running what is built for Windows" wine wine64 gcc-mingw-w64-x86-64
    export WINEPREFIX="$REPO_ROOT/target/wine/prefix" WINEDEBUG=-all WINEARCH=win64
    # It has no use for a browser and .NET, and asks for them otherwise; nor for menus on the desktop.
    export WINEDLLOVERRIDES="mscoree=;mshtml=;winemenubuilder.exe="
    unset DISPLAY WAYLAND_DISPLAY
    [ -d "$WINEPREFIX/drive_c" ] || say "    setting Wine up in $WINEPREFIX"
    mkdir -p "$WINEPREFIX"
    # Starts what the programs need, and makes the installation where it is missing.
    timeout 180 wine wineboot --update >/dev/null 2>&1 || die "Wine cannot be set up in $WINEPREFIX"
}

# end_wine: ends the programs under our WINEPREFIX, and Wine's server with them.
end_wine() {
    timeout 60 wineserver -k >/dev/null 2>&1 || true
}

# supply_bcryptprimitives DIRECTORY: puts the library that Wine before 9 lacks beside a program.
supply_bcryptprimitives() {
    x86_64-w64-mingw32-gcc -shared -O2 -Wall -Wextra -o "$1/bcryptprimitives.dll" \
        "$REPO_ROOT/tests/wine/bcryptprimitives.c" -ladvapi32
}

# windows_path PATH: a path of Linux as Wine's programs see it.
windows_path() {
    local path
    path="$(realpath -m "$1")"
    printf 'Z:%s' "${path//\//\\}"
}
