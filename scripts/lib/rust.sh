# shellcheck shell=bash
# The Rust toolchain and the cargo tools the checks use. Source after common.sh and packages.sh.

# What `rust-version` in Cargo.toml asks for.
wanted_rust() {
    sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$REPO_ROOT/Cargo.toml" | head -n 1
}

rust_is_new_enough() {
    have cargo && have rustc && version_at_least "$(rustc --version | awk '{ print $2 }')" "$1"
}

# ensure_rust: cargo and rustc, new enough; a C compiler for the libraries that need one.
ensure_rust() {
    local wanted
    wanted="$(wanted_rust)"
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    export PATH
    have cc || ensure_packages "compiling (zstd and ring carry C)" gcc libc6-dev
    if ! rust_is_new_enough "$wanted"; then
        ensure_rustup "$wanted"
    fi
    rust_is_new_enough "$wanted" ||
        die "Rust $wanted or newer is needed, found: $(rustc --version 2>/dev/null || echo none). Install it from https://rustup.rs and run this again"
}

# ensure_rustup WANTED: a newer toolchain through rustup; rustup itself from the distribution, or from its own site.
ensure_rustup() {
    local installer
    say "    installing Rust (at least $1) for this user with rustup, in ${CARGO_HOME:-$HOME/.cargo} and ${RUSTUP_HOME:-$HOME/.rustup}"
    if ! have rustup && package_available rustup; then
        ensure_packages "installing Rust" rustup
    fi
    if have rustup; then
        rustup toolchain install stable --profile minimal --component clippy,rustfmt >&2 && rustup default stable >&2
        return
    fi
    ensure_packages "downloading rustup" curl ca-certificates
    installer="$(mktemp)"
    if ! curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs -o "$installer"; then
        rm -f "$installer"
        die "cannot download rustup: check the network, or install Rust $1 or newer by hand"
    fi
    sh "$installer" -y --no-modify-path --profile minimal --component clippy,rustfmt --default-toolchain stable >&2
    rm -f "$installer"
}

# ensure_cargo_component BINARY COMPONENT: rustfmt and clippy come with most toolchains, not with all.
ensure_cargo_component() {
    have "$1" && "$1" --version >/dev/null 2>&1 && return 0
    have rustup || die "$1 is missing: install your distribution's package for it"
    say "    installing the $2 component with rustup"
    rustup component add "$2" >&2
}

# ensure_cargo_tool TOOL WHY: a cargo subcommand built from the package registry; takes minutes, once.
ensure_cargo_tool() {
    have "$1" && return 0
    say "    installing $1 for $2 (cargo install, some minutes, once)"
    quick_cargo_install "$1"
}

# quick_cargo_install ARGS…: a program for tests from the package registry, made to be built soon and not to run fast: some of them
# optimise over all of their dependencies when they are released. It has a target directory and flags of its own: it must
# not disturb, nor be disturbed by, the workspace's. QUICK_OPT_LEVEL (0) is for those that have work to do.
quick_cargo_install() {
    env -u CARGO_TARGET_DIR -u RUSTFLAGS -u RUSTC_WORKSPACE_WRAPPER CARGO_PROFILE_RELEASE_LTO=off \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL="${QUICK_OPT_LEVEL:-0}" CARGO_PROFILE_RELEASE_DEBUG=0 \
        CARGO_PROFILE_RELEASE_STRIP=debuginfo CARGO_INCREMENTAL=0 \
        cargo install --locked --quiet "$@" </dev/null >&2
}
