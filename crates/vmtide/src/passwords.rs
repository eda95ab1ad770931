//! Where passwords come from: a file, a command, the environment, or a person at the terminal;
//! never the command line, which every user of the machine can read.

use crate::cli::PasswordArgs;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use vmtide_engine::{EngineError, Result};
use vmtide_repo::Password;
use zeroize::Zeroizing;

/// The most bytes a password has; more is a mistake, e.g. a disk image as a password file.
const MAX_BYTES: usize = 64 << 10;

/// Where one password may come from, in order of preference.
#[derive(Clone, Copy)]
pub struct PasswordSource<'a> {
    file: Option<&'a Path>,
    command: Option<&'a str>,
    variable: &'static str,
    purpose: &'static str,
    advice: &'static str,
}

impl<'a> PasswordSource<'a> {
    /// The password of the repository.
    pub fn of_repository(args: &'a PasswordArgs) -> Self {
        Self {
            file: args.password_file.as_deref(),
            command: args.password_command.as_deref(),
            variable: "VMTIDE_PASSWORD",
            purpose: "repository password",
            advice: "set VMTIDE_PASSWORD, or use --password-file or --password-command",
        }
    }

    /// The password in a file, and nothing else.
    pub const fn of_file(file: &'a Path) -> Self {
        Self {
            file: Some(file),
            command: None,
            variable: "VMTIDE_PASSWORD",
            purpose: "password of the other repository",
            advice: "give a password file",
        }
    }

    /// The password of a second repository, that something is copied to.
    pub const fn of_target(file: Option<&'a Path>, command: Option<&'a str>) -> Self {
        Self {
            file,
            command,
            variable: "VMTIDE_TO_PASSWORD",
            purpose: "password of the repository to copy to",
            advice: "set VMTIDE_TO_PASSWORD, or use --to-password-file or --to-password-command",
        }
    }

    /// A further password for the repository.
    pub const fn for_new_key(file: Option<&'a Path>, command: Option<&'a str>) -> Self {
        Self {
            file,
            command,
            variable: "VMTIDE_NEW_PASSWORD",
            purpose: "new password",
            advice: "set VMTIDE_NEW_PASSWORD, or use --new-password-file or --new-password-command",
        }
    }

    /// An existing password.
    ///
    /// # Errors
    /// [`EngineError::Usage`] where there is none; that of reading the file or the command.
    pub fn get(&self) -> Result<Password> {
        self.without_asking()?.map_or_else(|| self.ask(false), Ok)
    }

    /// A new password; a person types it twice.
    ///
    /// # Errors
    /// As [`get`](Self::get), and where the password is empty or both times differ.
    pub fn get_new(&self) -> Result<Password> {
        self.without_asking()?.map_or_else(|| self.ask(true), Ok)
    }

    fn without_asking(&self) -> Result<Option<Password>> {
        if self.file.is_some() && self.command.is_some() {
            return Err(EngineError::usage(format!(
                "both a file and a command for the {}: give one",
                self.purpose
            )));
        }
        if let Some(path) = self.file {
            return self.read_file(path).map(Some);
        }
        if let Some(command) = self.command {
            return self.run_command(command).map(Some);
        }
        match std::env::var(self.variable) {
            Ok(text) => self.checked(Zeroizing::new(text.into_bytes())).map(Some),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(_) => Err(EngineError::usage(format!("{} is not UTF-8", self.variable))),
        }
    }

    fn read_file(&self, path: &Path) -> Result<Password> {
        let io =
            |error| EngineError::io(format!("read the password file {}", path.display()), error);
        let file = std::fs::File::open(path).map_err(io)?;
        let text = read_bounded(file).map_err(io)?;
        self.checked(without_line_end(text))
    }

    fn run_command(&self, command: &str) -> Result<Password> {
        let io = |error| EngineError::io("run the password command", error);
        let mut child =
            shell(command).stdin(Stdio::inherit()).stdout(Stdio::piped()).spawn().map_err(io)?;
        let text = match child.stdout.take() {
            Some(stdout) => read_bounded(stdout).map_err(io)?,
            None => Zeroizing::default(),
        };
        let status = child.wait().map_err(io)?;
        if !status.success() {
            return Err(EngineError::refused("the password command failed", status.to_string()));
        }
        self.checked(without_line_end(text))
    }

    fn ask(&self, twice: bool) -> Result<Password> {
        if !std::io::stdin().is_terminal() {
            return Err(EngineError::usage(format!("no {}: {}", self.purpose, self.advice)));
        }
        let read = |prompt: String| {
            rpassword::prompt_password(prompt)
                .map(|text| Zeroizing::new(text.into_bytes()))
                .map_err(|error| EngineError::io("read the password from the terminal", error))
        };
        let first = read(format!("{}: ", self.purpose))?;
        if twice && *read(format!("{} again: ", self.purpose))? != *first {
            return Err(EngineError::usage("the two passwords differ"));
        }
        self.checked(first)
    }

    fn checked(&self, text: Zeroizing<Vec<u8>>) -> Result<Password> {
        if text.is_empty() {
            return Err(EngineError::usage(format!("the {} is empty", self.purpose)));
        }
        Ok(Password::new(text.to_vec()))
    }
}

/// The system's own shell with this command line.
#[cfg(unix)]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    shell
}

/// The system's own shell with this command line, which it gets as it is: `cmd` takes off the outer
/// quotation marks and knows no other quoting.
#[cfg(windows)]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("cmd");
    std::os::windows::process::CommandExt::raw_arg(&mut shell, format!("/D /S /C \"{command}\""));
    shell
}

fn read_bounded(reader: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_BYTES + 1));
    reader.take(MAX_BYTES as u64 + 1).read_to_end(&mut text)?;
    if text.len() > MAX_BYTES {
        let message = format!("longer than {MAX_BYTES} bytes: this is no password");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
    }
    Ok(text)
}

/// Editors and `echo` end a file with a line feed that nobody means.
fn without_line_end(mut text: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    if text.last() == Some(&b'\n') {
        text.pop();
        if text.last() == Some(&b'\r') {
            text.pop();
        }
    }
    text
}
