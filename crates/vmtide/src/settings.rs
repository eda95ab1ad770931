//! The settings file: TOML whose keys are the names of options.
//!
//! Options of all commands stand at the top, those of one command in a table of its name, those of
//! `key add` in `[key.add]`. The settings become the defaults of the options, so the command line
//! and the environment go before them, and there is no second list of options to keep in step: a
//! key that is no option is an error.

use clap::{ArgAction, Command};
use std::path::{Path, PathBuf};
use toml::{Table, Value};
use vmtide_engine::{EngineError, Result};

/// Options that make no sense in a settings file.
const NOT_IN_FILES: &[&str] = &["config", "help", "version"];

/// Gives the options of `command` the defaults of the settings file that `arguments` name, or of
/// the default ones.
///
/// # Errors
/// [`EngineError::Usage`] where a file is no TOML or a key no option; where a named file cannot
/// be read.
pub fn apply(mut command: Command, arguments: &[std::ffi::OsString]) -> Result<Command> {
    // Subcommands get the global options only when built; their own ones are there already.
    for (path, must_exist) in files(arguments) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => continue,
            Err(error) => {
                let context = format!("read the settings file {}", path.display());
                return Err(EngineError::io(context, error));
            }
        };
        let table: Table = text.parse().map_err(|error| {
            EngineError::usage(format!("settings file {}: {error}", path.display()))
        })?;
        command = apply_table(command, &path, "", &table)?;
    }
    Ok(command)
}

/// The files to read, in order, and whether they must be there.
fn files(arguments: &[std::ffi::OsString]) -> Vec<(PathBuf, bool)> {
    let named = named_on_command_line(arguments)
        .or_else(|| std::env::var_os("VMTIDE_CONFIG").map(PathBuf::from));
    if let Some(path) = named {
        return vec![(path, true)];
    }
    crate::places::settings_files().into_iter().map(|path| (path, false)).collect()
}

/// The value of `--config`, found before the command line is parsed, because parsing needs the
/// defaults that the file gives.
fn named_on_command_line(arguments: &[std::ffi::OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter().skip(1).take_while(|argument| *argument != "--");
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument.to_str().and_then(|text| text.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    None
}

fn apply_table(mut command: Command, file: &Path, prefix: &str, table: &Table) -> Result<Command> {
    for (key, value) in table {
        let full_key = format!("{prefix}{key}");
        let wrong = |what: &str| {
            EngineError::usage(format!("settings file {}: {full_key}: {what}", file.display()))
        };
        if let Value::Table(inner) = value {
            if command.find_subcommand(key).is_none() {
                return Err(wrong("there is no command of this name"));
            }
            let mut result = Ok(());
            let prefix = format!("{full_key}.");
            command = command.mut_subcommand(key, |subcommand| {
                match apply_table(subcommand.clone(), file, &prefix, inner) {
                    Ok(changed) => changed,
                    Err(error) => {
                        result = Err(error);
                        subcommand
                    }
                }
            });
            result?;
            continue;
        }
        let argument = command
            .get_arguments()
            .find(|argument| argument.get_long() == Some(key.as_str()))
            .filter(|_| !NOT_IN_FILES.contains(&key.as_str()))
            .ok_or_else(|| wrong("there is no option of this name"))?;
        let is_list = matches!(argument.get_action(), ArgAction::Append);
        let id = argument.get_id().clone();
        let values =
            words(value, is_list).ok_or_else(|| wrong("this is no value for an option"))?;
        command = command.mut_arg(id, |argument| argument.default_values(values));
    }
    Ok(command)
}

fn words(value: &Value, is_list: bool) -> Option<Vec<String>> {
    match value {
        Value::Array(items) if is_list => items.iter().map(word).collect(),
        other => word(other).map(|word| vec![word]),
    }
}

fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(flag) => Some(flag.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Verb};
    use clap::{CommandFactory, FromArgMatches};

    fn parse(settings: &str, line: &[&str]) -> Result<Cli> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("vmtide.toml");
        std::fs::write(&file, settings).unwrap();
        let mut words = vec!["vmtide".to_owned(), "--config".into(), file.display().to_string()];
        words.extend(line.iter().map(|word| (*word).to_owned()));
        let words: Vec<_> = words.into_iter().map(std::ffi::OsString::from).collect();
        let command = apply(Cli::command(), &words)?;
        let matches = command.try_get_matches_from(&words).unwrap();
        Ok(Cli::from_arg_matches(&matches).unwrap())
    }

    #[test]
    fn settings_are_defaults_and_the_command_line_wins() {
        let settings = "repository = \"/backup\"\nverbose = 2\njson = true\n\
                        [backup]\ntag = [\"a=b\", \"c=d\"]\ncompression = 7\nlevel = \"full\"\n";
        let cli = parse(settings, &["backup", "x.raw", "--compression", "3"]).unwrap();
        assert_eq!(cli.global.repository.as_deref(), Some("/backup"));
        assert_eq!((cli.global.verbose, cli.global.json), (2, true));
        let Verb::Backup(backup) = cli.command else { panic!("not a backup") };
        assert_eq!(backup.tag.len(), 2);
        assert_eq!(backup.compression, 3);
        let quick = parse(settings, &["backup", "x.raw", "--compression", "-7"]).unwrap();
        let Verb::Backup(quick) = quick.command else { panic!("not a backup") };
        assert_eq!(quick.compression, -7);
        let cli = parse(settings, &["points", "-r", "/other"]).unwrap();
        assert_eq!(cli.global.repository.as_deref(), Some("/other"));
    }

    #[test]
    fn what_is_no_option_is_an_error_that_names_it() {
        for (settings, word) in [
            ("repositry = \"x\"", "repositry"),
            ("[backup]\nrepo = 1", "backup.repo"),
            ("[bakup]\n", "bakup"),
            ("[key.add]\nlabl = \"x\"", "key.add.labl"),
            ("config = \"x\"", "config"),
            ("repository = [\"x\"]", "repository"),
            ("= 1", "settings file"),
        ] {
            let error = parse(settings, &["points"]).unwrap_err();
            assert!(matches!(error, EngineError::Usage(_)), "{settings}");
            assert!(error.to_string().contains(word), "{settings}: {error}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let words = ["vmtide", "--config=/nonexistent/vmtide.toml", "points"];
        let words: Vec<_> = words.iter().map(std::ffi::OsString::from).collect();
        let error = apply(Cli::command(), &words).unwrap_err();
        assert_eq!(crate::exit::of_error(&error).code(), 6);
    }
}
