#!/usr/bin/env bash
# Builds vmtide.exe for 64-bit Windows, on Linux; installs what it needs and says so.
#
#   scripts/build-windows.sh                        for tests: quick to build, assertions on
#   scripts/build-windows.sh --release              for use
#   scripts/build-windows.sh -p CRATE … [--tests]   other crates of the workspace, or the tests of their libraries
#
# --beside CRATE … builds as if these were wanted, too, in programs and tests alike: who asks for programs and then for
# tests, of the same crates together, has their dependencies built once, with the features that both need.
#
# Writes the paths of what it built to standard output, one a line. They lie below target/windows;
# VMTIDE_WINDOWS_TARGET_DIR names another directory.
set -euo pipefail

# shellcheck source=scripts/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
. "$REPO_ROOT/scripts/lib/packages.sh"
# shellcheck source=scripts/lib/windows.sh
. "$REPO_ROOT/scripts/lib/windows.sh"

# What every Windows has. Anything else would have to be shipped beside the program.
SYSTEM_LIBRARIES='^(api-ms-win-.*|advapi32|bcrypt|bcryptprimitives|combase|crypt32|dbghelp|dnsapi|kernel32|ktmw32|msvcrt|ncrypt|ntdll|ole32|oleaut32|propsys|rpcrt4|secur32|shell32|user32|userenv|virtdisk|ws2_32)\.dll$'

profile=windows-test
kind=executable
packages=()
beside=()
arguments=()
while [ "$#" -gt 0 ]; do
    case "$1" in
        --release) profile=release ;;
        --tests) kind=tests ;;
        --beside) [ "$#" -ge 2 ] || die "--beside needs a crate"; beside+=("$2"); shift ;;
        -p) [ "$#" -ge 2 ] || die "-p needs a crate"; packages+=("$2"); shift ;;
        *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
[ "${#packages[@]}" -gt 0 ] || packages=(vmtide)
for package in "${packages[@]}" "${beside[@]}"; do
    arguments+=(-p "$package")
done

# built CRATE…: the paths of these crates in cargo's messages, which are read from standard input.
built() {
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") != "compiler-artifact" or "/registry/" in message["manifest_path"]:
        continue
    paths = [path for path in message["filenames"] if path.endswith((".exe", ".dll"))]
    if not paths:
        continue
    with open(message["manifest_path"], encoding="utf-8") as manifest:
        name = next((line.split("\"")[1] for line in manifest if line.startswith("name = ")), "")
    if name in sys.argv[1:]:
        print(*paths, sep="\n")
' "$@"
}

cd "$REPO_ROOT"
ensure_windows_toolchain
have python3 || ensure_packages "reading what cargo built" python3
step "building ${packages[*]} for Windows ($profile)"
if [ "$kind" = tests ]; then
    arguments+=(--lib --no-run)
    subcommand="test"
else
    subcommand="build"
    # Asked for examples, cargo takes the features that tests need.
    [ "${#beside[@]}" -eq 0 ] || arguments+=(--lib --bins --examples)
fi
messages="$(mktemp)"
trap 'rm -f "$messages"' EXIT
windows_cargo "$subcommand" --locked --quiet --profile "$profile" "${arguments[@]}" \
    --message-format json-render-diagnostics >"$messages"
built "${packages[@]}" <"$messages" | sort -u | while IFS= read -r path; do
    foreign="$(x86_64-w64-mingw32-objdump -p "$path" | sed -n 's/^[[:space:]]*DLL Name: //p' | tr '[:upper:]' '[:lower:]' |
        grep -vE "$SYSTEM_LIBRARIES" || true)"
    [ -z "$foreign" ] || die "$path needs libraries that not every Windows has: $foreign"
    printf '%s\n' "$path"
done
