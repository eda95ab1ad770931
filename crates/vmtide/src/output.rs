//! What goes to the user: text for people, or newline-delimited JSON events.
//!
//! Results go to standard output, remarks to standard error. With `--json` standard output holds
//! nothing but one JSON object per line; the last one is the `summary`, or the `error`.

use crate::exit::Exit;
use indicatif::ProgressBar;
use parking_lot::Mutex;
use serde::Serialize;
use std::io::Write;
use vmtide_engine::{Event, Observer, Phase};

/// Standard output and standard error of one run.
pub struct Output {
    json: bool,
    quiet: bool,
    /// Drawn at the bottom of the terminal while a job runs; lines go above it.
    pub(crate) bar: Mutex<Option<ProgressBar>>,
}

#[derive(Serialize)]
struct Tagged<'a, T> {
    r#type: &'static str,
    #[serde(flatten)]
    value: &'a T,
}

impl Output {
    /// Output in this form. `quiet` leaves out everything but results, warnings and errors.
    pub const fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, bar: Mutex::new(None) }
    }

    /// Whether events are written instead of text.
    pub const fn is_json(&self) -> bool {
        self.json
    }

    /// Whether remarks are left out.
    pub const fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A line of the result, for people only.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.json {
            self.write_out(text.as_ref());
        }
    }

    /// Text that must reach somebody, or the run ends before anything depends on it.
    ///
    /// # Errors
    /// Those of writing to standard output.
    pub fn must_write(&self, text: &str) -> std::io::Result<()> {
        let mut written = Ok(());
        self.above_bar(|| {
            let mut out = std::io::stdout().lock();
            written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        });
        written
    }

    /// Lines of the result, for people only.
    pub fn lines(&self, lines: impl IntoIterator<Item = String>) {
        lines.into_iter().for_each(|line| self.line(line));
    }

    /// A remark on what goes on, for people only.
    pub fn remark(&self, text: impl AsRef<str>) {
        if !self.json && !self.quiet {
            self.write_err(text.as_ref());
        }
    }

    /// Something the user should look at.
    pub fn warning(&self, message: &str) {
        if self.json {
            self.event("warning", &serde_json::json!({ "message": message }));
        } else {
            self.write_err(&format!("warning: {message}"));
        }
    }

    /// Why the run fails, and how it ends.
    pub fn error(&self, message: &str, exit: Exit) {
        if self.json {
            let event = serde_json::json!({ "message": message, "exit_code": exit.code() });
            self.event("error", &event);
        }
        self.write_err(&format!("error: {message}"));
    }

    /// An event, for programs only.
    pub fn event(&self, kind: &'static str, value: &impl Serialize) {
        if self.json {
            self.write_json(&Tagged { r#type: kind, value });
        }
    }

    /// The last event, for programs only.
    pub fn summary(&self, value: &impl Serialize) {
        self.event("summary", value);
    }

    fn write_json(&self, value: &impl Serialize) {
        match serde_json::to_string(value) {
            Ok(line) => self.write_out(&line),
            Err(error) => self.write_err(&format!("error: an event cannot be written: {error}")),
        }
    }

    /// Whoever stops reading is not interested in more: a closed pipe is no error of ours.
    fn write_out(&self, line: &str) {
        self.above_bar(|| {
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        });
    }

    fn write_err(&self, line: &str) {
        self.above_bar(|| {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        });
    }

    fn above_bar(&self, write: impl FnOnce()) {
        match &*self.bar.lock() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn show_phase(&self, phase: Phase, detail: &str) {
        let text = match phase {
            Phase::Freeze => "freezing",
            Phase::Store => "storing",
            Phase::Commit => "committing",
            Phase::Release => "releasing",
            Phase::Abort => "undoing",
            Phase::Prepare => "preparing",
            Phase::Restore => "restoring",
            Phase::Register => "registering",
            Phase::Verify => "verifying",
            Phase::Prune => "pruning",
            Phase::Repair => "repairing",
            Phase::Convert => "converting",
            Phase::Compare => "comparing",
            Phase::Check => "checking",
            Phase::Merge => "merging",
            Phase::Copy => "copying",
            Phase::Measure => "measuring",
            Phase::Delta => "making a delta of",
            Phase::Apply => "applying",
        };
        let bar = self.bar.lock().clone();
        match bar {
            Some(bar) => bar.set_message(format!("{text} {detail}")),
            None if phase == Phase::Abort => self.remark(format!("{text} {detail}")),
            None => {}
        }
    }
}

/// The events of one of several VMs that are worked on at the same time: each says of which.
pub struct OfVm<'a> {
    /// Where they go.
    pub output: &'a Output,
    /// The VM.
    pub vm: &'a str,
}

#[derive(Serialize)]
struct EventOfVm<'a> {
    #[serde(flatten)]
    event: &'a Event,
    vm: &'a str,
}

impl Observer for OfVm<'_> {
    fn event(&self, event: Event) {
        if self.output.json {
            self.output.write_json(&EventOfVm { event: &event, vm: self.vm });
            return;
        }
        match event {
            Event::Warning { message } => self.output.warning(&format!("{}: {message}", self.vm)),
            other => Observer::event(self.output, other),
        }
    }
}

impl Observer for Output {
    fn event(&self, event: Event) {
        if self.json {
            self.write_json(&event);
            return;
        }
        match event {
            Event::Phase { phase, detail } => self.show_phase(phase, &detail),
            Event::Warning { message } => self.warning(&message),
            _ => {}
        }
    }
}
