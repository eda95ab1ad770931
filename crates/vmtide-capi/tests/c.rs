//! The library as C and Python see it: built with its symbol versions, the header held against what is exported, the
//! examples and the wrong arguments compiled and run, some of it under valgrind.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where the test stands in the tree.
const HERE: &str = env!("CARGO_MANIFEST_DIR");

fn run(command: &mut Command) -> String {
    let name = format!("{command:?}");
    let output = command.output().unwrap_or_else(|error| {
        panic!("{name}: {error}; scripts/test.sh installs what the tests need (gcc, binutils, valgrind, python3)")
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{name}: {}\n{out}\n{err}", output.status);
    out
}

/// The static library that cargo made beside this test.
fn archive() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let beside = test.parent().unwrap().join("libvmtide.a");
    assert!(beside.is_file(), "{} is missing", beside.display());
    beside
}

/// The installed library: `lib`, `include`.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = PREFIX.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        run(Command::new(format!("{HERE}/link.sh")).arg(archive()).arg(directory.path()));
        directory
    });
    directory.path()
}

/// Compiles a C program against the installed library.
fn compile(source: &str, directory: &Path) -> PathBuf {
    let program = directory.join("program");
    let lib = prefix().join("lib");
    run(Command::new("cc")
        .args(["-std=c11", "-g", "-Wall", "-Wextra", "-Werror"])
        .arg(format!("-I{}", prefix().join("include").display()))
        .arg(format!("{HERE}/{source}"))
        .arg("-o")
        .arg(&program)
        .arg(format!("-L{}", lib.display()))
        .arg(format!("-Wl,-rpath,{}", lib.display()))
        .arg("-lvmtide"));
    program
}

/// Runs a program under valgrind: no invalid access, no memory that is lost.
fn valgrind(program: &Path, arguments: &[&str], directory: &Path) -> String {
    run(Command::new("valgrind")
        .args(["--quiet", "--error-exitcode=99", "--leak-check=full"])
        .args(["--errors-for-leak-kinds=definite", "--fair-sched=yes"])
        .arg(program)
        .arg(directory)
        .args(arguments))
}

fn lines_of(path: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{HERE}/{path}")).unwrap();
    text.lines().map(ToOwned::to_owned).collect()
}

/// The prototypes of the header, in one line each.
fn prototypes() -> Vec<String> {
    let text = std::fs::read_to_string(format!("{HERE}/include/vmtide.h")).unwrap();
    let mut code = String::new();
    for (index, part) in text.split("/*").enumerate() {
        let after = if index == 0 { Some(part) } else { part.split_once("*/").map(|it| it.1) };
        code.push_str(after.unwrap_or_default());
    }
    let code: Vec<&str> = code.lines().filter(|line| !line.starts_with('#')).collect();
    let mut found: Vec<String> = code
        .join("\n")
        .split(';')
        .map(|statement| statement.split_whitespace().collect::<Vec<_>>().join(" "))
        .map(|statement| statement.trim_start_matches("extern \"C\" { ").to_owned())
        .filter(|statement| statement.contains(" vmtide_") || statement.contains("*vmtide_"))
        .filter(|statement| statement.ends_with(')') && !statement.starts_with("typedef"))
        .filter(|statement| !statement.contains('{') && !statement.contains('}'))
        .map(|statement| format!("{statement};"))
        .collect();
    found.sort_by_key(|prototype| name_of(prototype));
    found
}

fn name_of(prototype: &str) -> String {
    let before = prototype.split('(').next().unwrap();
    before.rsplit([' ', '*']).next().unwrap().to_owned()
}

#[test]
fn what_was_released_is_there_and_the_header_says_what_is_exported() {
    let header = prototypes();
    for line in lines_of("abi/0.1.txt").iter().filter(|line| !line.starts_with('#')) {
        assert!(header.contains(line), "released, and not in the header any more: {line}");
    }
    let names: Vec<String> = header.iter().map(|prototype| name_of(prototype)).collect();
    let map = lines_of("abi/vmtide.map");
    let mut versioned: Vec<String> = map
        .iter()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|name| name.starts_with("vmtide_"))
        .map(ToOwned::to_owned)
        .collect();
    versioned.sort();
    assert_eq!(names, versioned, "header and version script");
    let library = prefix().join("lib/libvmtide.so");
    let symbols = run(Command::new("nm")
        .args(["-D", "--defined-only", "--with-symbol-versions"])
        .arg(library));
    let mut exported: Vec<&str> =
        symbols.lines().filter_map(|line| line.split(" T ").nth(1)).collect();
    exported.sort_unstable();
    let expected: Vec<String> = names.iter().map(|name| format!("{name}@@VMTIDE_0.1")).collect();
    assert_eq!(exported, expected, "nothing else is exported, and all of it with a version");
}

#[test]
fn structures_and_numbers_are_as_they_were_released() {
    run(Command::new("cc")
        .args(["-std=c11", "-fsyntax-only", "-Wall", "-Werror"])
        .arg(format!("-I{HERE}/include"))
        .arg(format!("{HERE}/abi/layout_0_1.c")));
    // And the header is C++, too.
    run(Command::new("c++")
        .args(["-x", "c++", "-std=c++11", "-fsyntax-only", "-Wall", "-Werror"])
        .arg(format!("{HERE}/include/vmtide.h")));
}

/// The program was compiled with the header of 0.1, and is kept as it was built (abi/archive.sh).
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn a_program_of_0_1_runs_with_the_library_of_today() {
    let directory = tempfile::tempdir().unwrap();
    let program = format!("{HERE}/abi/program-0.1-x86_64-linux");
    let printed = run(Command::new(program)
        .arg(directory.path())
        .env("LD_LIBRARY_PATH", prefix().join("lib")));
    assert!(printed.contains("0 handles left"), "{printed}");
}

#[test]
fn the_example_in_c_runs() {
    let directory = tempfile::tempdir().unwrap();
    let program = compile("examples/backup.c", directory.path());
    let printed = run(Command::new(&program).arg(directory.path()));
    let summaries: Vec<serde_json::Value> =
        printed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(summaries.len(), 2, "{printed}");
    assert_eq!(summaries[0]["level"], "full");
    assert_eq!(summaries[1]["level"], "incremental");
    // Of the second only the range that it was told.
    assert_eq!(summaries[1]["disks"][0]["read_bytes"], 1 << 20);
}

#[test]
fn the_example_in_python_runs() {
    let directory = tempfile::tempdir().unwrap();
    let library = prefix().join("lib/libvmtide.so");
    run(Command::new("python3")
        .arg(format!("{HERE}/examples/delta.py"))
        .arg(library)
        .arg(directory.path()));
}

#[test]
fn wrong_arguments_are_errors_and_valgrind_finds_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let program = compile("tests/c/wrong_arguments.c", directory.path());
    run(Command::new(&program).arg(directory.path()));
    let directory = tempfile::tempdir().unwrap();
    let printed = valgrind(&program, &[], directory.path());
    assert!(printed.contains("all wrong arguments are errors"), "{printed}");
}

#[test]
fn ten_thousand_cycles_take_no_more_memory_than_a_thousand() {
    let directory = tempfile::tempdir().unwrap();
    let program = compile("tests/c/cycles.c", directory.path());
    run(Command::new(&program).arg(directory.path()).arg("10000"));
    let directory = tempfile::tempdir().unwrap();
    valgrind(&program, &["50"], directory.path());
}

#[test]
fn an_image_that_a_program_hosts_has_its_changes_tracked() {
    let directory = tempfile::tempdir().unwrap();
    let program = compile("tests/c/tracking.c", directory.path());
    run(Command::new(&program).arg(directory.path()));
}

/// A qcow2 image of which the header does not say of what format its parent is, as old ones do not.
fn child_without_backing_format(directory: &Path) {
    std::fs::write(directory.join("base.raw"), [7; 1 << 20]).unwrap();
    let child = directory.join("child.qcow2");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"])
        .arg(&child));
    let mut bytes = std::fs::read(&child).unwrap();
    let of_format = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|four| four == of_format).unwrap();
    // An extension that nobody knows.
    bytes[at + 3] ^= 1;
    std::fs::write(&child, bytes).unwrap();
}

/// With the static library, by what pkg-config says of it: the program needs no library of ours to run.
#[test]
fn the_static_library_is_enough_and_parents_get_the_format_that_is_given() {
    let directory = tempfile::tempdir().unwrap();
    child_without_backing_format(directory.path());
    let said = run(Command::new("pkg-config")
        .args(["--static", "--cflags", "--libs", "vmtide"])
        .env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig")));
    let words = said.split_whitespace();
    let program = directory.path().join("program");
    run(Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(format!("{HERE}/tests/c/parents.c"))
        // The shared library, which is beside it, would be taken first.
        .args(words.map(|word| if word == "-lvmtide" { "-l:libvmtide.a" } else { word })));
    let printed = run(Command::new(&program).arg(directory.path()));
    assert!(printed.contains("the parent is read"), "{printed}");
}
