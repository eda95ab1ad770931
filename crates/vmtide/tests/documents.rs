//! Help, completions, man pages and the list of commands.

#[allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared by test programs that each use a part of it; a failed unwrap is a failed test"
)]
mod common;

use common::{Place, files_below};

const COMMANDS: &[&str] = &[
    "init",
    "backup",
    "points",
    "show",
    "diff",
    "restore",
    "verify",
    "repair",
    "forget",
    "hold",
    "prune",
    "copy",
    "key",
    "info",
    "map",
    "check",
    "compare",
    "create",
    "resize",
    "convert",
    "chain",
    "delta",
    "serve",
    "agent",
    "track",
    "vm",
    "doctor",
    "stats",
    "bench",
    "completions",
    "man",
];

#[test]
fn every_command_has_help_with_examples() {
    let place = Place::new();
    let all = place.run(&["--help"]).must_end_with(0).stdout;
    assert!(all.contains("Exit codes:") && all.contains("130"), "{all}");
    for command in COMMANDS {
        assert!(all.contains(&format!("\n  {command} ")), "{command} is not listed");
        let help = place.run(&[command, "--help"]).must_end_with(0).stdout;
        assert!(help.contains("Example"), "{command} has no example");
        assert!(help.contains(&format!("vmtide {command}")), "{command} shows no use");
    }
    assert!(!all.contains("guardian"), "{all}");
    place.run(&["--version"]).must_end_with(0);
    place.run(&[]).must_end_with(2);
}

#[test]
fn completions_for_every_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.run(&["completions", shell]).must_end_with(0).stdout;
        for word in ["backup", "keep-daily", "read-data"] {
            assert!(script.contains(word), "{shell} lacks {word}");
        }
    }
    let script = place.run(&["completions", "bash"]).stdout;
    std::fs::write(place.path("vmtide.bash"), script).unwrap();
    let checked = std::process::Command::new("bash")
        .args(["-n", &place.text("vmtide.bash")])
        .status()
        .unwrap();
    assert!(checked.success());
    place.run(&["completions", "tcsh"]).must_end_with(2);
}

#[test]
fn a_man_page_for_every_command() {
    let place = Place::new();
    let directory = place.text("man/man1");
    place.run(&["man", &directory]).must_end_with(0);
    let pages = files_below(&place.path("man"));
    for command in COMMANDS {
        let name = format!("vmtide-{command}.1");
        let page = pages.iter().find(|page| page.ends_with(&name)).expect(&name);
        let text = std::fs::read_to_string(page).unwrap();
        assert!(text.starts_with(".ie") || text.contains(".TH"), "{name}");
    }
    assert!(pages.iter().any(|page| page.ends_with("vmtide.1")));
    assert!(pages.iter().any(|page| page.ends_with("vmtide-key-add.1")), "{pages:?}");
}

#[test]
fn the_document_lists_every_command_and_option() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/commands.md");
    let document = std::fs::read_to_string(path).unwrap();
    let place = Place::new();
    for command in COMMANDS {
        assert!(document.contains(&format!("## {command}")), "{command} is missing");
        let help = place.run(&[command, "--help"]).must_end_with(0).stdout;
        for option in help.split_whitespace().filter(|word| word.starts_with("--")) {
            let end = option.find(|c: char| !c.is_ascii_lowercase() && c != '-');
            let option = &option[..end.unwrap_or(option.len())];
            assert!(option == "--" || document.contains(option), "{command} {option} is missing");
        }
    }
}
