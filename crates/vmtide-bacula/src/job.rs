//! What the plugin says of a job before it begins.

use crate::command::PluginCommand;
use crate::link::{Link, Said};
use crate::{BackendError, Result};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Back up.
    Backup,
    /// Only say how much it would be.
    Estimate,
    /// Restore.
    Restore,
}

/// The level of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Everything.
    Full,
    /// Since the previous job.
    Incremental,
    /// Since the last full one.
    Differential,
}

impl Level {
    /// Bacula's letter.
    pub const fn letter(self) -> char {
        match self {
            Self::Full => 'F',
            Self::Incremental => 'I',
            Self::Differential => 'D',
        }
    }
}

/// What becomes of a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It is replaced.
    Always,
    /// It is replaced by a newer one.
    IfNewer,
    /// It is replaced by an older one.
    IfOlder,
    /// It stays.
    Never,
}

/// A job.
#[derive(Clone, Debug)]
pub struct Job {
    /// What is to be done.
    pub purpose: Purpose,
    /// The level.
    pub level: Level,
    /// Bacula's unique name of the job.
    pub name: String,
    /// Bacula's number of the job.
    pub id: u32,
    /// The job that this one is relative to, by its unique name; empty for a full one.
    pub previous: String,
    /// What becomes of files that are there.
    pub replace: Replace,
    /// The plugin line.
    pub command: PluginCommand,
    /// The memory that the plugin gave for data: the number of its descriptor, and its size in bytes.
    pub memory: Option<(i32, usize)>,
}

impl Job {
    /// Reads the lines up to the end of their block.
    ///
    /// # Errors
    /// [`BackendError::Usage`] for the plugin line, [`BackendError::Protocol`] for the rest.
    pub fn read(link: &mut Link) -> Result<Self> {
        let begin = link.line()?;
        if begin != "Job" {
            return Err(BackendError::protocol(format!("{begin:?} instead of a job")));
        }
        let mut purpose = None;
        let mut level = Level::Full;
        let (mut name, mut previous) = (String::new(), String::new());
        let mut id = 0;
        let mut replace = Replace::Always;
        let mut command = None;
        let mut memory = None;
        loop {
            let line = match link.hear()? {
                Said::Line(line) => line,
                Said::End => break,
                Said::Data => {
                    return Err(BackendError::protocol("data inside a job's description"));
                }
            };
            let (key, value) = line.split_once('=').unwrap_or((&line, ""));
            let wrong = || BackendError::protocol(format!("{line:?} for a job"));
            match key {
                "Type" => {
                    purpose = Some(match value {
                        "backup" => Purpose::Backup,
                        "estimate" => Purpose::Estimate,
                        "restore" => Purpose::Restore,
                        _ => return Err(wrong()),
                    });
                }
                "Level" => {
                    level = match value {
                        "F" => Level::Full,
                        "I" => Level::Incremental,
                        "D" => Level::Differential,
                        _ => {
                            return Err(BackendError::Refused(format!(
                                "jobs of level {value:?} are not possible: use Full, Incremental or \
                                 Differential"
                            )));
                        }
                    }
                }
                "Name" => value.clone_into(&mut name),
                "JobId" => id = value.parse().map_err(|_| wrong())?,
                "Previous" => value.clone_into(&mut previous),
                "Replace" => {
                    replace = match value {
                        "w" => Replace::IfNewer,
                        "o" => Replace::IfOlder,
                        "n" => Replace::Never,
                        _ => Replace::Always,
                    }
                }
                "Memory" => {
                    let (number, length) = value.split_once(' ').ok_or_else(wrong)?;
                    let number = number.parse().map_err(|_| wrong())?;
                    memory = Some((number, length.parse().map_err(|_| wrong())?));
                }
                "Command" => command = Some(PluginCommand::parse(value)?),
                // Known to the protocol and of no use here.
                _ => {}
            }
        }
        match (purpose, command) {
            (Some(purpose), Some(command)) => {
                Ok(Self { purpose, level, name, id, previous, replace, command, memory })
            }
            _ => Err(BackendError::protocol("a job without its type or plugin line")),
        }
    }
}
