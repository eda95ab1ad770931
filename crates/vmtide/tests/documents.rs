//! Help, completions, man pages and the list of commands.

use crate::common;

use common::{Place, files_below};

/// The commands that a help text lists, without `help` itself.
fn listed(help: &str) -> Vec<String> {
    let listing = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest);
    let listing = listing.split("\n\n").next().unwrap_or_default();
    let name = |line: &str| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| name.to_owned())
    };
    listing.lines().filter_map(name).collect()
}

/// All commands, each with those that it is one of (`key`, `key add`), and its help: as the program
/// says it, so that none can be forgotten here.
fn commands(place: &Place) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let words: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let help = place.run(&words).must_end_with(0).stdout;
        for name in listed(&help) {
            waiting.push([&path[..], &[name]].concat());
        }
        if !path.is_empty() {
            found.push((path, help));
        }
    }
    // The help is read as it is meant.
    for path in [&["backup"][..], &["key", "add"], &["bench"], &["man"]] {
        assert!(found.iter().any(|(found, _)| found == path), "{path:?} is not found");
    }
    // Hidden ones have a document of their own.
    for name in HIDDEN {
        let help = place.run(&[name, "--help"]).must_end_with(0).stdout;
        found.push((vec![(*name).to_owned()], help));
    }
    found
}

/// Commands that other programs start and that the help does not list.
const HIDDEN: &[&str] = &["bacula-backend"];

#[test]
fn every_command_has_help_with_examples() {
    let place = Place::new();
    let all = place.run(&["--help"]).must_end_with(0).stdout;
    assert!(all.contains("Exit codes:") && all.contains("130"), "{all}");
    for (path, help) in commands(&place) {
        let command = path.join(" ");
        let is_listed = path.len() == 1 && !HIDDEN.contains(&path[0].as_str());
        assert!(help.contains("Example") || !is_listed, "{command} has no example");
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
    for (path, _) in commands(&place) {
        if HIDDEN.contains(&path[0].as_str()) {
            continue;
        }
        let name = format!("vmtide-{}.1", path.join("-"));
        let page = pages.iter().find(|page| page.ends_with(&name)).expect(&name);
        let text = std::fs::read_to_string(page).unwrap();
        assert!(text.starts_with(".ie") || text.contains(".TH"), "{name}");
    }
    assert!(pages.iter().any(|page| page.ends_with("vmtide.1")));
    assert!(pages.iter().any(|page| page.ends_with("vmtide-key-add.1")), "{pages:?}");
}

#[test]
fn the_document_lists_every_command_and_option() {
    let read = |name: &str| {
        let path = format!("{}/../../docs/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    let (overview, bacula) = (read("commands.md"), read("bacula.md"));
    let mut missing = Vec::new();
    for (path, help) in commands(&Place::new()) {
        let command = path.join(" ");
        let document = if HIDDEN.contains(&command.as_str()) { &bacula } else { &overview };
        let named = match &path[..] {
            [command] if document == &overview => overview.contains(&format!("## {command}\n")),
            _ => document.contains(path.last().unwrap()),
        };
        if !named {
            missing.push(command.clone());
        }
        for option in help.split_whitespace().filter(|word| word.starts_with("--")) {
            let end =
                option.find(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '-');
            let option = &option[..end.unwrap_or(option.len())];
            // Options of all commands are in the overview.
            let is_there = option == "--" || [document, &overview].iter().any(|d| has(d, option));
            if !is_there {
                missing.push(format!("{command} {option}"));
            }
        }
    }
    assert!(missing.is_empty(), "not in the documents: {missing:?}");
}

/// Whether a document names an option: not only one that begins with its name.
fn has(document: &str, option: &str) -> bool {
    document.match_indices(option).any(|(at, _)| {
        let next = document[at + option.len()..].chars().next();
        !next.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    })
}
