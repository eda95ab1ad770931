//! The plugin line of a file set: `vmtide: source=… consistency=…`.
//!
//! Everything in it is checked before anything is done, so that `estimate` finds every mistake. It goes
//! with the backup onto the volumes, so it must not hold secrets.

use crate::{BackendError, Result};
use std::path::PathBuf;
use vmtide_engine::source::SourceSpec;
use vmtide_hypervisor::Consistency;
use vmtide_image::{BackingPolicy, Format};

/// The name of the plugin, which begins the line.
const PLUGIN: &str = "vmtide";

/// What a plugin line can say, for errors.
const KEYS: &str = "source, name, disk, exclude, consistency, downgrade, format, backing, backing_format, \
                    search, track, state_dir, timeout_s";

/// A plugin line that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginCommand {
    /// What to back up.
    pub source: SourceSpec,
    /// As it was written.
    pub source_text: String,
    /// The VM's name in the catalogue; none takes its own.
    pub name: Option<String>,
    /// Only these disks; empty for all.
    pub disks: Vec<String>,
    /// Not these.
    pub exclude: Vec<String>,
    /// The consistency; none is the best that can be had.
    pub consistency: Option<Consistency>,
    /// Whether less will do, with a warning.
    pub allow_downgrade: bool,
    /// The format of an image; none finds it.
    pub format: Option<Format>,
    /// Which files an image may name.
    pub backing: Option<BackingPolicy>,
    /// The format of a parent whose child does not say it.
    pub backing_format: Option<Format>,
    /// Directories in which parents are looked for, beside the image's own.
    pub search: Vec<PathBuf>,
    /// Whether to track changes in a qcow2 image at rest.
    pub track: bool,
    /// Where state is kept; none is vmtide's own place.
    pub state_directory: Option<PathBuf>,
    /// How long, in seconds, the plugin waits for a sign of life.
    pub timeout_s: Option<u64>,
}

impl PluginCommand {
    /// Understands a plugin line.
    ///
    /// # Errors
    /// [`BackendError::Usage`] with the word that is wrong.
    pub fn parse(line: &str) -> Result<Self> {
        let usage = |text: String| BackendError::Usage(text);
        let Some((PLUGIN, rest)) = line.split_once(':') else {
            return Err(usage(format!("{line:?} does not begin with \"{PLUGIN}:\"")));
        };
        let mut given = Given::default();
        for (key, value) in words(rest).map_err(usage)? {
            given.take(&key, value).map_err(usage)?;
        }
        let source_text =
            given.source.ok_or_else(|| usage("source=… is missing: what to back up".into()))?;
        let source = SourceSpec::parse(&source_text)?;
        if given.command.allow_downgrade && given.command.consistency.is_none() {
            return Err(usage(
                "downgrade=yes needs consistency=… that it may fall short of".into(),
            ));
        }
        if !given.command.disks.is_empty() && !given.command.exclude.is_empty() {
            return Err(usage("disk= and exclude= exclude each other".into()));
        }
        Ok(Self { source, source_text, ..given.command })
    }
}

struct Given {
    source: Option<String>,
    seen: Vec<String>,
    command: PluginCommand,
}

impl Default for Given {
    fn default() -> Self {
        Self {
            source: None,
            seen: Vec::new(),
            command: PluginCommand {
                source: SourceSpec::Image(PathBuf::new()),
                source_text: String::new(),
                name: None,
                disks: Vec::new(),
                exclude: Vec::new(),
                consistency: None,
                allow_downgrade: false,
                format: None,
                backing: None,
                backing_format: None,
                search: Vec::new(),
                track: false,
                state_directory: None,
                timeout_s: None,
            },
        }
    }
}

impl Given {
    fn take(&mut self, key: &str, value: String) -> Result<(), String> {
        if value.is_empty() {
            return Err(format!("{key}= has no value"));
        }
        let command = &mut self.command;
        match key {
            "disk" => command.disks.extend(list(&value)),
            "exclude" => command.exclude.extend(list(&value)),
            "search" => command.search.push(absolute(key, value)?),
            _ if self.seen.iter().any(|seen| seen == key) => {
                return Err(format!("{key}= is there twice"));
            }
            "source" => self.source = Some(value),
            "name" => command.name = Some(check_name(value)?),
            "consistency" => command.consistency = Some(value.parse()?),
            "downgrade" => command.allow_downgrade = yes_or_no(key, &value)?,
            "track" => command.track = yes_or_no(key, &value)?,
            "format" => command.format = Some(format(key, &value)?),
            "backing_format" => command.backing_format = Some(format(key, &value)?),
            "backing" => {
                command.backing = Some(match value.as_str() {
                    "refuse" => BackingPolicy::Refuse,
                    "same-directory" => BackingPolicy::SameDirectory,
                    "allow" => BackingPolicy::Allow,
                    _ => {
                        return Err(format!(
                            "backing={value}: use refuse, same-directory or allow"
                        ));
                    }
                });
            }
            "state_dir" => command.state_directory = Some(absolute(key, value)?),
            "timeout_s" => {
                let seconds = value.parse().ok().filter(|seconds| (10..=86_400).contains(seconds));
                command.timeout_s = Some(
                    seconds.ok_or_else(|| format!("timeout_s={value}: use 10 to 86400 seconds"))?,
                );
            }
            _ => return Err(format!("unknown parameter {key}= (known: {KEYS})")),
        }
        self.seen.push(key.to_owned());
        Ok(())
    }
}

fn list(value: &str) -> impl Iterator<Item = String> + '_ {
    value.split(',').map(str::trim).filter(|part| !part.is_empty()).map(ToOwned::to_owned)
}

fn format(key: &str, value: &str) -> Result<Format, String> {
    value.parse().map_err(|_| format!("{key}={value} is none that vmtide knows"))
}

fn absolute(key: &str, value: String) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(format!("{key}= needs an absolute path")) }
}

fn yes_or_no(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "yes" | "true" | "1" => Ok(true),
        "no" | "false" | "0" => Ok(false),
        _ => Err(format!("{key}={value}: use yes or no")),
    }
}

/// A name becomes a directory in the catalogue.
fn check_name(name: String) -> Result<String, String> {
    let bad = name.len() > 255
        || name == "."
        || name == ".."
        || name.contains('/')
        || name.chars().any(char::is_control);
    if bad { Err(format!("name={name:?} cannot name a directory")) } else { Ok(name) }
}

/// `key=value` pairs between blanks; a value in single or double quotes may hold blanks, and in double
/// quotes a backslash takes the next letter as it is.
fn words(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    let mut letters = text.chars().peekable();
    loop {
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        if letters.peek().is_none() {
            return Ok(pairs);
        }
        let mut key = String::new();
        while let Some(letter) = letters.next_if(|letter| *letter != '=' && !letter.is_whitespace())
        {
            key.push(letter);
        }
        if letters.next() != Some('=') || key.is_empty() {
            return Err(format!("{key:?} is no parameter: write KEY=VALUE"));
        }
        let mut value = String::new();
        match letters.next_if(|letter| *letter == '"' || *letter == '\'') {
            None => {
                while let Some(letter) = letters.next_if(|letter| !letter.is_whitespace()) {
                    value.push(letter);
                }
            }
            Some(quote) => loop {
                match letters.next() {
                    Some(letter) if letter == quote => break,
                    Some('\\') if quote == '"' => value.extend(letters.next()),
                    Some(letter) => value.push(letter),
                    None => return Err(format!("the quote that begins {key}= is not closed")),
                }
            },
        }
        pairs.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(line: &str) -> String {
        PluginCommand::parse(line).unwrap_err().to_string()
    }

    #[test]
    fn a_line_is_understood() {
        let line = r#"vmtide: source=qemu+unix:///run/web.qmp consistency=fs downgrade=yes disk=a,b
            name="my \"web\" server" timeout_s=60"#;
        let command = PluginCommand::parse(line).unwrap();
        assert_eq!(command.source, SourceSpec::Qemu("qemu+unix:///run/web.qmp".into()));
        assert_eq!(command.consistency, Some(Consistency::FileSystem));
        assert!(command.allow_downgrade);
        assert_eq!(command.disks, ["a", "b"]);
        assert_eq!(command.name.as_deref(), Some("my \"web\" server"));
        assert_eq!(command.timeout_s, Some(60));
        let image = PluginCommand::parse("vmtide:source='/vm images/a.qcow2' track=yes").unwrap();
        assert_eq!(image.source, SourceSpec::Image("/vm images/a.qcow2".into()));
        assert!(image.track);
        let line = "vmtide: source=/a.qcow2 backing_format=raw search=/b search='/c d'";
        let image = PluginCommand::parse(line).unwrap();
        assert_eq!(image.backing_format, Some(Format::Raw));
        assert_eq!(image.search, [PathBuf::from("/b"), PathBuf::from("/c d")]);
    }

    #[test]
    fn every_mistake_is_named() {
        for (line, word) in [
            ("bpipe: source=/a", "vmtide"),
            ("vmtide", "vmtide"),
            ("vmtide: name=x", "source"),
            ("vmtide: source=", "source="),
            ("vmtide: source=/a source=/b", "twice"),
            ("vmtide: source=/a sorce=/b", "sorce"),
            ("vmtide: source=/a consistency=good", "good"),
            ("vmtide: source=/a downgrade=yes", "consistency"),
            ("vmtide: source=/a track=maybe", "maybe"),
            ("vmtide: source=/a format=vhdy", "vhdy"),
            ("vmtide: source=/a backing=x", "same-directory"),
            ("vmtide: source=/a backing_format=vhdy", "backing_format=vhdy"),
            ("vmtide: source=/a search=b", "absolute"),
            ("vmtide: source=/a name=a/b", "a/b"),
            ("vmtide: source=/a name=..", ".."),
            ("vmtide: source=/a disk=a exclude=b", "exclude"),
            ("vmtide: source=/a name='x", "quote"),
            ("vmtide: source=/a verbose", "verbose"),
            ("vmtide: source=/a timeout_s=0", "timeout_s"),
            ("vmtide: source=/a state_dir=x", "absolute"),
            ("vmtide: source=gopher://x", "gopher"),
        ] {
            let error = error(line);
            assert!(error.contains(word) && !error.contains('\n'), "{line}: {error}");
        }
    }
}
