#!/usr/bin/env bash
# Checks everything; installs what it needs and says so.
#
#   scripts/test.sh              all parts
#   scripts/test.sh PART…        some: lint rust e2e bacula wsman windows header deny fuzz; and slow ones: garage ceph
#
# lint   format of the code, clippy without warnings, shellcheck, Python that compiles, the systemd unit
# rust   all tests of the workspace
# e2e    real QEMU machines: a Linux guest backed up, restored and booted; cycles of writes, backups and kill -9;
#        what vmtide stored, read by independent programs (tests/interop)
# bacula the plugin in a real Bacula: director, storage daemon and file daemon on loopback
# wsman  the stand-in for WinRM, tried by pywinrm and pypsrp, with Kerberos from a real KDC
# windows vmtide.exe, built here and run under Wine (tests/wine), beside vmtide for Linux
# header the C header is that of the code (cbindgen)
# deny   licences, sources and known weaknesses of what vmtide depends on
# fuzz   a minute over the fuzz targets
# garage a real S3 server that passes over conditions; building it takes four minutes and more. Only where it is named,
#        or with VMTIDE_SLOW=1
# ceph   an S3 gateway of Ceph with a monitor and a disk, from the distribution's packages: versions, object lock, users with the
#        rights that docs/s3.md names, daemons killed during a backup. As garage only where it is named
#
# VMTIDE_CYCLES (8) says how many cycles, VMTIDE_KILLS (20) how many kills of commands on a repository;
# VMTIDE_FUZZ_SECONDS (60) how long to fuzz in all.
# VMTIDE_BEGIN_LIMIT_S and VMTIDE_END_LIMIT_S (none) are for machines of which nobody knows how slow they are and that end what takes
# too long: a part is begun only within so many seconds, the tests of the workspace that are built by then some minutes longer, and
# what is still at it at the end is ended. What was left out for that is told, and is neither passed nor failed.
# Every part runs, also after a failure; the last line counts, and the exit code is 1 when anything failed or nothing was run.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
. "$REPO_ROOT/scripts/lib/packages.sh"
# shellcheck source=scripts/lib/rust.sh
. "$REPO_ROOT/scripts/lib/rust.sh"

# In the order of what they tell: with a limit of time the last ones are left out first.
ALL_PARTS="lint rust e2e bacula wsman windows header deny fuzz"
SLOW_PARTS="garage ceph"
CYCLES="${VMTIDE_CYCLES:-8}"
KILLS="${VMTIDE_KILLS:-20}"
FUZZ_SECONDS="${VMTIDE_FUZZ_SECONDS:-60}"
# The tests of the workspace are begun for so much longer than the parts, where those have a limit.
EXTRA_RUST_S=900
# No limit is longer than any run.
NO_LIMIT_S=$((1 << 31))
BEGIN_LIMIT_S="${VMTIDE_BEGIN_LIMIT_S:-$NO_LIMIT_S}"
END_LIMIT_S="${VMTIDE_END_LIMIT_S:-$NO_LIMIT_S}"
# Longer than everything in it takes on two slow cores; a hang ends as a failure, not as a machine blocked for ever.
LIMIT_E2E_S=900
LIMIT_WSMAN_S=300
LIMIT_WINDOWS_S=2400
LIMIT_FUZZ_BUILD_S=900
LIMIT_GARAGE_S=2700
LIMIT_CEPH_S=2700
# cargo's own needs come first; a fuzz target lives in less than half.
FUZZ_ADDRESS_SPACE_KIB=$((1 << 20))

PASSED=0
FAILED=0
FAILURES=()
LEFT_OUT=()
# Whether only some of the tests of the workspace are built, because time was up.
BUILT_PARTLY=0

passed() {
    PASSED=$((PASSED + $1))
}

failed() {
    FAILED=$((FAILED + $1))
    FAILURES+=("$2")
    say "    FAILED: $2"
}

# time_is_up: whether the run as a whole has to end.
time_is_up() {
    [ "$SECONDS" -ge "$END_LIMIT_S" ]
}

# limited LIMIT_S COMMAND…: ends what takes longer, and what would go on when the run as a whole has to end.
limited() {
    local limit="$1"
    shift
    [ "$limit" -le $((END_LIMIT_S - SECONDS)) ] || limit=$((END_LIMIT_S - SECONDS))
    [ "$limit" -ge 1 ] || limit=1
    timeout --kill-after=30 "$limit" "$@"
}

# was_ended STATUS: whether that is what `limited` ends with because the run as a whole had to end.
was_ended() {
    time_is_up && { [ "$1" -eq 124 ] || [ "$1" -eq 137 ]; }
}

# check NAME COMMAND…: one check that counts as one test.
check() {
    local name="$1" status=0
    shift
    step "$name"
    if time_is_up; then
        LEFT_OUT+=("$name")
        return
    fi
    "$@" || status=$?
    if [ "$status" -eq 0 ]; then
        passed 1
    elif was_ended "$status"; then
        LEFT_OUT+=("$name (not finished)")
    else
        failed 1 "$name"
    fi
}

# counted NAME COMMAND…: runs what prints lines `test result: … N passed; M failed …`, and adds them up.
counted() {
    local name="$1" log status=0 good bad
    shift
    step "$name"
    if time_is_up; then
        LEFT_OUT+=("$name")
        return
    fi
    log="$(mktemp "$LOGS/counted.XXXXXX")"
    "$@" 2>&1 | tee "$log" || status=$?
    good="$(sum_of passed "$log")"
    bad="$(sum_of failed "$log")"
    passed "$good"
    if [ "$bad" -gt 0 ]; then
        failed "$bad" "$name"
    elif was_ended "$status"; then
        LEFT_OUT+=("$name (not finished)")
    elif [ "$status" -ne 0 ]; then
        # It did not compile, crashed, or took longer than its limit.
        failed 1 "$name (ended with $status)"
    elif [ "$good" -eq 0 ]; then
        failed 1 "$name (no test ran)"
    fi
}

# sum_of WORD LOG: the sum of N over all `N WORD` in the result lines of LOG.
sum_of() {
    sed -n "s/^test result: .*[^0-9]\([0-9][0-9]*\) $1.*/\1/p" "$2" | awk '{ sum += $1 } END { print sum + 0 }'
}

install_tools() {
    step "installing what is missing"
    ensure_rust
    ensure_qemu
    # libnbd's tools and nbdkit are independent implementations that the tests compare with; tools/restore.py gets
    # its Python packages in an environment of its own.
    ensure_packages "the test over SFTP" sshfs openssh-sftp-server
    ensure_packages "the tests of files inside disks" ntfs-3g lvm2 zstd
    ensure_packages "the tests" libnbd-bin nbdkit e2fsprogs xfsprogs fdisk mount openssl python3 python3-venv
    ensure_packages "the tests of the agent" python3-requests curl
    # Other readers of disk images, to compare with.
    ensure_packages "the tests of disk images" libvhdi-utils python3-libvhdi libvmdk-utils 7zip
    ensure_dissect
    ensure_s3_servers
    ensure_packages "the tests of SMB" samba smbclient qemu-utils procps
    # A Kerberos realm, which the tests run in a directory of their own, and MIT's library for the host's side of it.
    ensure_packages "the tests of WS-Management" krb5-kdc krb5-admin-server krb5-user python3-gssapi
    ensure_packages "the tests of the C library" gcc g++ binutils valgrind pkg-config
    ensure_packages "checking the scripts" shellcheck git systemd
}

# ensure_dissect: Python with dissect.hypervisor, in an environment of its own where the system's does not have it. From
# there on `python3` is that environment's, so it sees the system's modules, too.
ensure_dissect() {
    local venv="$REPO_ROOT/target/python-readers" modules="import dissect.hypervisor, pyvhdi, requests"
    python3 -c "$modules" 2>/dev/null && return 0
    if ! "$venv/bin/python3" -c "$modules" 2>/dev/null; then
        say "    installing for the tests of disk images: dissect.hypervisor (Python), in $venv"
        rm -rf "$venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv" || die "could not make a Python environment in $venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check dissect.hypervisor ||
            die "could not install dissect.hypervisor (needed for the tests of disk images)"
    fi
    PATH="$venv/bin:$PATH"
}

# ensure_s3_servers: S3 servers for the tests, outside of the tree, so that they are built once. s3s-fs checks signatures;
# moto has conditional writes, versions and object lock. 0.14.1 is the last s3s-fs for Rust 1.95.
ensure_s3_servers() {
    local cache="$HOME/.cache/vmtide-tests"
    if [ ! -x "$cache/bin/s3s-fs" ]; then
        say "    installing for the tests of S3: s3s-fs 0.14.1 (cargo install, some minutes), in $cache"
        QUICK_OPT_LEVEL=1 quick_cargo_install --root "$cache" --features binary --version 0.14.1 s3s-fs ||
            die "could not install s3s-fs (needed for the tests of S3)"
    fi
    if [ ! -x "$cache/moto/bin/moto_server" ]; then
        say "    installing for the tests of S3: moto 5.2.5 (Python), in $cache/moto"
        python3 -m venv "$cache/moto" || die "could not make a Python environment in $cache/moto"
        "$cache/moto/bin/pip" install --quiet --disable-pip-version-check 'moto[server]==5.2.5' ||
            die "could not install moto (needed for the tests of S3)"
    fi
}

check_scripts() {
    local -a scripts
    mapfile -t scripts < <(cd "$REPO_ROOT" && git ls-files --cached --others --exclude-standard |
        grep -E '^(scripts|bench|tests|\.ci)/' | while IFS= read -r file; do
        [ -f "$file" ] && head -n 1 "$file" | grep -qE '^#!.*\b(ba)?sh' && printf '%s\n' "$file"
    done)
    (cd "$REPO_ROOT" && shellcheck -x -P . -e SC1091 "${scripts[@]}" scripts/lib/*.sh && shellcheck -s sh scripts/guest/files.sh)
}

check_python() {
    PYTHONPYCACHEPREFIX="$LOGS/pycache" python3 -m compileall -q "$REPO_ROOT/tests/e2e" "$REPO_ROOT/tests/agent" "$REPO_ROOT/tests/wine" "$REPO_ROOT/tests/bacula" "$REPO_ROOT/tests/wsman" "$REPO_ROOT/bench" "$REPO_ROOT/tools" "$REPO_ROOT/scripts" \
        "$REPO_ROOT/clients/python"
}

# check_python_client: the package installed into an environment of its own, as users do it, and its tests there, also against
# the real agent, which the tests of the workspace have built.
check_python_client() {
    local venv="$LOGS/python-client" copy="$LOGS/python-client-source" vmtide
    vmtide="$(target_directory)/debug/vmtide" || return
    # Building leaves files beside the sources, which do not belong into the tree.
    cp -r "$REPO_ROOT/clients/python" "$copy" &&
        python3 -m venv "$venv" &&
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$copy" &&
        "$venv/bin/vmtide-rct" --version &&
        (cd "$copy/tests" && VMTIDE_BIN="$vmtide" timeout 400 "$venv/bin/python3" -m unittest --quiet)
}

# check_unit: the service's unit means what it says to systemd, which ends well although it ignores what it does not know, wants
# the program, which is not installed here, and may find fault with other units of the machine. That it says so of ours is tried
# with a line that means nothing.
check_unit() {
    local good="$LOGS/vmtide-agent.service" bad="$LOGS/vmtide-nonsense.service" said
    sed 's|^ExecStart=/usr/bin/vmtide |ExecStart=/bin/true |' "$REPO_ROOT/packaging/systemd/vmtide-agent.service" >"$good"
    sed 's|^ExecStart=|Nonsense=1\n&|' "$good" >"$bad"
    said="$(systemd-analyze verify --man=no "$good" "$bad" 2>&1 || true)"
    if grep -F vmtide-agent.service <<<"$said"; then
        return 1
    fi
    grep -qF vmtide-nonsense.service <<<"$said" || { printf 'systemd-analyze does not judge units here: %s\n' "$said"; return 1; }
}

# lint_what_is_built: clippy looks at what the tests are built from while it is built, instead of in a pass of its own, which
# takes half as long again. Until the end of the script all crates of the workspace are compiled with it: other builds would
# not find theirs. Warnings are cargo's to repeat, also of what was built before.
lint_what_is_built() {
    RUSTC_WORKSPACE_WRAPPER="$(dirname "$(cargo_of_toolchain)")/clippy-driver"
    [ -x "$RUSTC_WORKSPACE_WRAPPER" ] || { unset RUSTC_WORKSPACE_WRAPPER; return 1; }
    export RUSTC_WORKSPACE_WRAPPER CLIPPY_ARGS=""
}

# cargo_of_toolchain: the cargo itself, where `cargo` is rustup's.
cargo_of_toolchain() {
    if have rustup; then
        rustup which cargo
    else
        command -v cargo
    fi
}

# build_tests: the tests of the workspace, and all else in it; what was built is told in $LOGS/built. Fails where the compiler, or
# clippy in it, has any warning. Where no part may be begun any more before all is built, what is built by then is tested.
build_tests() {
    local log="$LOGS/build-tests" status=0 limit=$((BEGIN_LIMIT_S - SECONDS))
    limited $((limit > 1 ? limit : 1)) cargo test --quiet --workspace --locked --no-run --message-format json-render-diagnostics \
        2>"$log" >"$LOGS/built" || status=$?
    cat "$log"
    if [ "$status" -ne 0 ] && [ "$SECONDS" -ge "$BEGIN_LIMIT_S" ]; then
        BUILT_PARTLY=1
        LEFT_OUT+=("building all tests of the workspace (not finished)")
        status=0
    fi
    [ "$status" -eq 0 ] && ! grep -qE '^(warning|error)' "$log"
}

part_lint() {
    ensure_cargo_component rustfmt rustfmt
    ensure_cargo_component cargo-clippy clippy
    check "format (cargo fmt)" cargo fmt --all --check
    if [[ " ${parts[*]} " == *" rust "* ]] && lint_what_is_built; then
        check "the tests build, clippy without warnings" build_tests
    else
        check "clippy without warnings" cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
    fi
    check "shellcheck" check_scripts
    check "Python compiles" check_python
    check "the unit of the agent (systemd-analyze)" check_unit
}

part_header() {
    ensure_cargo_tool cbindgen "checking the C header" || { failed 1 "cbindgen cannot be installed"; return; }
    check "the C header is that of the code (cbindgen)" "$REPO_ROOT/scripts/check-c-header.py"
}

part_deny() {
    ensure_cargo_tool cargo-deny "checking licences and sources of dependencies" || { failed 1 "cargo-deny cannot be installed"; return; }
    check "licences, sources, bans (cargo deny)" cargo deny --log-level error check bans licenses sources
    step "known weaknesses (cargo deny check advisories)"
    if timeout 120 cargo deny fetch db >"$LOGS/advisories" 2>&1; then
        check "no known weakness" cargo deny --log-level error check advisories
    else
        say "    left out: the database of known weaknesses cannot be fetched from here: $(grep -m 1 -i -E 'error|fatal' "$LOGS/advisories" || tail -n 1 "$LOGS/advisories")"
    fi
}

part_rust() {
    # Outside of the limit, which is for tests that hang: how long compiling takes depends on what is there already.
    [ "$BUILT_PARTLY" = 1 ] || check "the tests build" build_tests
    local -a how=(--built "$LOGS/built" --left-out "$LOGS/left-out")
    [ "$BUILT_PARTLY" = 0 ] || how+=(--no-documentation)
    [ "$BEGIN_LIMIT_S" = "$NO_LIMIT_S" ] || how+=(--begin-within $((BEGIN_LIMIT_S + EXTRA_RUST_S - SECONDS)))
    [ "$END_LIMIT_S" = "$NO_LIMIT_S" ] || how+=(--end-within $((END_LIMIT_S - SECONDS)))
    counted "tests of the workspace (cargo test)" python3 "$REPO_ROOT/scripts/workspace-tests.py" "${how[@]}"
    [ ! -s "$LOGS/left-out" ] || LEFT_OUT+=("$(wc -l <"$LOGS/left-out") of the tests of the workspace ($(paste -sd, "$LOGS/left-out"))")
    if [ "$SECONDS" -ge "$BEGIN_LIMIT_S" ]; then
        LEFT_OUT+=("the Python package")
    else
        check "the Python package, installed, and its tests" check_python_client
    fi
}

# build_programs: all programs and libraries, in the development profile, whose checks for overflow are on. All of the workspace, and
# its examples, too: with them cargo takes the features of dependencies that the tests need, so that what the tests of the
# workspace have built is taken, and not built once more, from tokio up, with fewer.
build_programs() {
    cargo build --quiet --locked --workspace --lib --bins --examples
}

part_e2e() {
    local script
    step "building vmtide for the end-to-end tests"
    if ! build_programs; then
        failed 1 "vmtide does not build"
        return
    fi
    VMTIDE_BIN="$(target_directory)/debug/vmtide"
    export VMTIDE_BIN
    counted "a Linux guest, backed up, restored, booted" \
        limited "$LIMIT_E2E_S" python3 "$REPO_ROOT/tests/e2e/guest_test.py"
    counted "a Linux guest on a disk whose changes vmtide tracks" \
        limited "$LIMIT_E2E_S" python3 "$REPO_ROOT/tests/e2e/track_test.py"
    counted "a repository in a directory over SFTP" \
        limited "$LIMIT_E2E_S" python3 "$REPO_ROOT/tests/e2e/network_directory_test.py"
    for script in "$REPO_ROOT"/tests/interop/*.sh; do
        check "interoperation: $(basename "$script")" limited "$LIMIT_E2E_S" bash "$script"
    done
    counted "$CYCLES cycles of writes, backups, kill -9" \
        limited $((LIMIT_E2E_S + CYCLES * 60)) python3 "$REPO_ROOT/tests/e2e/cycles.py" --cycles "$CYCLES"
    counted "$KILLS kills -9 of commands that run at the same time on one repository" \
        limited $((LIMIT_E2E_S + KILLS * 20)) python3 "$REPO_ROOT/tests/e2e/kills.py" --kills "$KILLS"
}

part_wsman() {
    ensure_wsman_clients
    step "building the stand-in for WinRM and the tests with another hand's NTLM"
    if ! build_programs || ! cargo test --quiet --locked --workspace --test peer --no-run; then
        failed 1 "the stand-in for WinRM or the tests of WS-Management do not build"
        return
    fi
    VMTIDE_STANDIN_BIN="$(target_directory)/debug/standin-wsman-server"
    export VMTIDE_STANDIN_BIN
    counted "independent clients of WS-Management and the stand-in for WinRM" \
        limited "$LIMIT_WSMAN_S" "$HOME/.cache/vmtide-tests/wsman/bin/python3" "$REPO_ROOT/tests/wsman/run.py"
    counted "vmtide's client of WS-Management and NTLM of another hand (pyspnego)" \
        limited "$LIMIT_WSMAN_S" env VMTIDE_WSMAN_PYTHON="$HOME/.cache/vmtide-tests/wsman/bin/python3" cargo test --locked --workspace --test peer -- --ignored
}

# ensure_wsman_clients: pywinrm, pypsrp and pyspnego in an environment of the system's own Python, for which Debian has the
# module gssapi.
ensure_wsman_clients() {
    local venv="$HOME/.cache/vmtide-tests/wsman" wanted="$REPO_ROOT/tests/wsman/requirements.txt"
    if ! cmp -s "$wanted" "$venv/requirements.txt"; then
        say "    installing for the tests of WS-Management: pywinrm, pypsrp, pyspnego (Python), in $venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv" || die "could not make a Python environment in $venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$wanted" ||
            die "could not install pywinrm, pypsrp and pyspnego (needed for the tests of WS-Management)"
        cp "$wanted" "$venv/requirements.txt"
    fi
}

part_bacula() {
    ensure_bacula
    step "building vmtide and its plugin for Bacula"
    if ! build_programs; then
        failed 1 "vmtide or its plugin for Bacula does not build"
        return
    fi
    VMTIDE_BIN="$(target_directory)/debug/vmtide"
    export VMTIDE_BIN
    counted "vmtide's plugin in a real Bacula" \
        limited "$LIMIT_E2E_S" python3 "$REPO_ROOT/tests/bacula/run.py"
}

# ensure_bacula: Bacula 15, which Debian 12 has in backports. The director's package drags a mail server in, and its
# scripts ask questions: it is unpacked outside of the tree, and run from there.
ensure_bacula() {
    local cache="$HOME/.cache/vmtide-tests/bacula" codename version download
    local -a packages=(bacula-fd bacula-sd bacula-console bacula-common bacula-common-sqlite3 bacula-director-sqlite3)
    ensure_packages "the tests with Bacula" nbdkit samba qemu-utils
    codename="$(os_codename)"
    # shellcheck disable=SC2016 # dpkg-query fills it in, not the shell
    if ! dpkg-query -W -f '${Version}' bacula-fd 2>/dev/null | grep -q '^15\.' || ! package_installed bacula-director-sqlite3; then
        apt_update
        if [ "$codename" = bookworm ]; then
            enable_backports "$codename" || die "Bacula 15 is in $codename-backports, which cannot be reached"
        fi
        version="$(apt-cache madison bacula-fd | awk -F ' *[|] *' '$2 ~ /^15[.]/ && !seen { print $2; seen = 1 }')"
        [ -n "$version" ] || die "this system has no packages of Bacula 15 (needed for the tests with Bacula)"
        say "    installing for the tests with Bacula: ${packages[*]} $version"
        apt_quiet install --no-install-recommends dbconfig-no-thanks "${packages[@]/%/=$version}" ||
            die "could not install Bacula $version"
    fi
    if [ ! -x "$cache/usr/sbin/bacula-dir" ]; then
        # shellcheck disable=SC2016 # as above
        version="$(dpkg-query -W -f '${Version}' bacula-fd)"
        download="$(mktemp -d)"
        (cd "$download" && apt-get -q download "bacula-director=$version" >/dev/null 2>&1) ||
            die "could not download bacula-director $version"
        mkdir -p "$cache"
        dpkg -x "$download"/bacula-director_*.deb "$cache"
        rm -rf "$download"
    fi
}

part_windows() {
    step "building vmtide for Linux, to compare with"
    if ! build_programs; then
        failed 1 "vmtide does not build"
        return
    fi
    VMTIDE_BIN="$(target_directory)/debug/vmtide"
    export VMTIDE_BIN
    counted "vmtide.exe under Wine" \
        limited "$LIMIT_WINDOWS_S" bash "$REPO_ROOT/tests/wine/run.sh"
}

part_garage() {
    ensure_garage
    build_for_store Garage || return 0
    counted "repositories in Garage, which passes over conditions" \
        limited "$LIMIT_GARAGE_S" python3 "$REPO_ROOT/tests/e2e/garage_test.py"
}

part_ceph() {
    # Daemons that the tests start themselves, as this user; the packages start none.
    ensure_packages "the tests with Ceph" radosgw ceph-mon ceph-osd ceph-common
    build_for_store Ceph || return 0
    counted "repositories in Ceph" limited "$LIMIT_CEPH_S" python3 "$REPO_ROOT/tests/e2e/ceph_test.py"
}

# build_for_store SERVER: vmtide and the tests of its S3 store, and VMTIDE_BIN.
build_for_store() {
    step "building vmtide for the tests with $1"
    if ! build_programs || ! cargo test --quiet --locked --workspace --test real_servers --no-run; then
        failed 1 "vmtide or the tests of its S3 store do not build"
        return 1
    fi
    VMTIDE_BIN="$(target_directory)/debug/vmtide"
    export VMTIDE_BIN
}

# ensure_garage: Garage is AGPL-3.0: a process of its own that the tests talk to, and no part of anything here.
ensure_garage() {
    local cache="$HOME/.cache/vmtide-tests"
    if [ ! -x "$cache/bin/garage" ]; then
        ensure_packages "building Garage" build-essential pkg-config
        say "    installing for the tests of S3: Garage 2.5.0 (cargo install, four minutes and more), in $cache"
        QUICK_OPT_LEVEL=1 quick_cargo_install --root "$cache" --version 2.5.0 garage ||
            die "could not install Garage (needed for the tests of the part garage)"
    fi
}

target_directory() {
    cargo metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}

part_fuzz() {
    local target seconds
    local -a targets
    ensure_cargo_tool cargo-fuzz "fuzzing the parsers" || { failed 1 "cargo-fuzz cannot be installed"; return; }
    # libFuzzer itself is C++; its options need what stable Rust keeps for the nightly compiler.
    have c++ || ensure_packages "fuzzing (libFuzzer is C++)" g++
    export RUSTC_BOOTSTRAP=1
    unset RUSTC_WORKSPACE_WRAPPER CLIPPY_ARGS
    mapfile -t targets < <(cd "$REPO_ROOT" && cargo fuzz list)
    [ "${#targets[@]}" -gt 0 ] || { failed 1 "there are no fuzz targets"; return; }
    # No address sanitizer: unsafe code is forbidden here; what is looked for are panics, hangs and huge allocations.
    # Not optimised: in the seconds that each gets here, what is built sooner counts for more than what runs faster.
    check "building ${#targets[@]} fuzz targets" \
        limited "$LIMIT_FUZZ_BUILD_S" cargo fuzz build --dev --sanitizer none
    seconds=$(((FUZZ_SECONDS + ${#targets[@]} - 1) / ${#targets[@]}))
    for target in "${targets[@]}"; do
        check "fuzz $target for $seconds s" fuzz_one "$target" "$seconds"
    done
    unset RUSTC_BOOTSTRAP
}

# fuzz_one TARGET SECONDS: begins with what earlier runs found (fuzz/corpus) and with the seeds in the tree.
fuzz_one() {
    local corpus="fuzz/corpus/$1" seeds="fuzz/seeds/$1"
    local -a inputs=("$corpus")
    mkdir -p "$corpus"
    [ ! -d "$seeds" ] || inputs+=("$seeds")
    # The limit on address space finds large allocations that are never touched, which the one on memory does not.
    (
        ulimit -v "$FUZZ_ADDRESS_SPACE_KIB"
        exec timeout --kill-after=30 $(($2 + 120)) cargo fuzz run --dev --sanitizer none "$1" "${inputs[@]}" -- \
            -max_total_time="$2" -timeout=20 -rss_limit_mb=1024 -print_final_stats=1
    ) >"$LOGS/fuzz-$1" 2>&1 || {
        tail -n 40 "$LOGS/fuzz-$1" >&2
        return 1
    }
    say "    $(grep -E 'number_of_executed_units' "$LOGS/fuzz-$1" | tail -n 1 | sed 's/^stat:://')"
}

cd "$REPO_ROOT"
for part in "$@"; do
    case " $ALL_PARTS $SLOW_PARTS " in
        *" $part "*) ;;
        *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
LOGS="$(mktemp -d "${TMPDIR:-/tmp}/vmtide-test.XXXXXX")"
trap 'rm -rf "$LOGS"' EXIT
export CARGO_TERM_COLOR=never

install_tools
if [ "${VMTIDE_SLOW:-0}" = 1 ]; then
    ALL_PARTS="$ALL_PARTS $SLOW_PARTS"
fi
read -ra parts <<<"${*:-$ALL_PARTS}"
for part in "${parts[@]}"; do
    # The tests of the workspace have a limit of their own: what is built is to be tested.
    if [ "$SECONDS" -ge "$BEGIN_LIMIT_S" ] && [ "$part $BUILT_PARTLY" != "rust 1" ]; then
        LEFT_OUT+=("$part")
        continue
    fi
    "part_$part"
done

step "done"
for failure in "${FAILURES[@]}"; do
    say "    failed: $failure"
done
[ "${#LEFT_OUT[@]}" -eq 0 ] || {
    say "    left out on this slow machine, where nothing is begun after $BEGIN_LIMIT_S s and all is ended after $END_LIMIT_S s:"
    printf '        %s\n' "${LEFT_OUT[@]}" >&2
}
printf '%d passed, %d failed\n' "$PASSED" "$FAILED"
# Where there was no time for anything, nothing is known to be good.
[ "$FAILED" -eq 0 ] && [ "$PASSED" -gt 0 ]
