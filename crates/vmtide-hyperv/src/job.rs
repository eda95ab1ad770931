//! Jobs: what Hyper-V does while nobody holds the line.
//!
//! A method that takes long answers 4096 and names an `Msvm_ConcreteJob`. The job is looked at until its
//! state is final, with pauses that grow. It stays for some five minutes after its end, so its texts and
//! results are read at once; one that is gone before that (the management service was started again) has
//! an unknown outcome, and whoever waits looks for what it would have made.

use crate::Host;
use crate::host::{from_cim, is_unknown_class};
use crate::model::codes;
use vmtide_block::{BlockError, CancelToken};
use vmtide_cim::{Association, CimError, CimInstance, CimValue, ObjectPath, xml};
use vmtide_hypervisor::{HypervisorError, Result};

/// The class of jobs.
const JOB: &str = "Msvm_ConcreteJob";

/// The class that tells what a job worked on.
const ELEMENT: &str = "Msvm_AffectedJobElement";

/// `ElementEffects`: created.
const CREATED: u64 = 5;

/// The first pause between two looks, in milliseconds. Most checkpoints take a second or two.
const FIRST_PAUSE_MS: u64 = 100;

/// How many looks in a row may fail for lack of a connection before waiting is given up. The job goes on
/// in any case; asking again does no harm.
const MAX_FAILED_LOOKS: u32 = 5;

/// The longest text of the host that goes into an error or a warning, in characters.
const MAX_TEXT_CHARS: usize = 600;

/// What came of a job that did its work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobOutcome {
    /// What the host warned of, one line each.
    pub warnings: Vec<String>,
    /// The objects the job made or worked on, those it made first. Empty where the host tells none.
    pub affected: Vec<ObjectPath>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum JobEnd {
    /// It did its work.
    Done(JobOutcome),
    /// It did not: the code, and the host's words.
    Failed { code: u32, detail: String },
    /// It is gone, and nobody knows how it ended.
    Vanished,
}

/// `JobState` of `Msvm_ConcreteJob`, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    UnderWay,
    Completed,
    CompletedWithWarnings,
    Failed(&'static str),
}

impl State {
    fn of(number: u16) -> Option<Self> {
        Some(match number {
            // New, starting, running, suspended, shutting down; service: "supports problem discovery".
            2..=6 | 11 => Self::UnderWay,
            7 => Self::Completed,
            8 => Self::Failed("the job was terminated"),
            9 => Self::Failed("the job was killed"),
            10 => Self::Failed("the job failed"),
            32768 => Self::CompletedWithWarnings,
            _ => return None,
        })
    }
}

/// How far a job is, or how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobPhase {
    /// Under way, or in a state of which nobody knows what it leads to.
    Open,
    /// It did its work.
    Done,
    /// It did not, with this code.
    Failed(u32),
}

/// A job as the host lists it, for some five minutes after its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobRecord {
    /// `InstanceID`.
    pub id: Option<String>,
    /// How far it is.
    pub phase: JobPhase,
    /// `JobType`; none where the host does not say.
    pub kind: Option<u16>,
    /// When it began by the host's clock, in seconds since 1970.
    pub begun_s: Option<i64>,
    /// When its state changed last.
    pub changed_s: Option<i64>,
}

impl JobRecord {
    fn of(instance: &CimInstance) -> Self {
        /// `JobState`: killed; what it began may go on.
        const KILLED: u16 = 9;
        let time = |name: &str| {
            let text = instance.optional_text(name).ok().flatten()?;
            crate::cycle::seconds_of(text)
        };
        let number = instance.number::<u16>("JobState").ok().filter(|number| *number != KILLED);
        let state = number.and_then(State::of);
        let code = || instance.optional_number::<u32>("ErrorCode").ok().flatten();
        Self {
            id: instance.optional_text("InstanceID").ok().flatten().map(str::to_owned),
            phase: match state {
                Some(State::Completed | State::CompletedWithWarnings) => JobPhase::Done,
                Some(State::Failed(_)) => JobPhase::Failed(code().unwrap_or(codes::FAILED)),
                Some(State::UnderWay) | None => JobPhase::Open,
            },
            kind: instance.optional_number::<u16>("JobType").ok().flatten(),
            begun_s: time("StartTime").or_else(|| time("TimeSubmitted")),
            changed_s: time("TimeOfLastStateChange"),
        }
    }
}

/// What a job worked on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobElement {
    /// `InstanceID` of the job.
    pub job: String,
    /// The object.
    pub element: ObjectPath,
    /// Whether the job made it.
    pub created: bool,
}

impl Host {
    /// A job; none where the host has forgotten it.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub(crate) fn job(&self, job: &ObjectPath) -> Result<Option<JobRecord>> {
        match self.cim().get(job) {
            Ok(instance) => Ok(Some(JobRecord::of(&instance))),
            Err(CimError::NotFound { .. }) => Ok(None),
            Err(error) => Err(from_cim(error)),
        }
    }

    /// All jobs that the host has not forgotten, of whatever program.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub(crate) fn jobs(&self) -> Result<Vec<JobRecord>> {
        Ok(self.query(&format!("SELECT * FROM {JOB}"))?.iter().map(JobRecord::of).collect())
    }

    /// What all these jobs worked on.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub(crate) fn job_elements(&self) -> Result<Vec<JobElement>> {
        let rows = self.query(&format!("SELECT * FROM {ELEMENT}"))?;
        let read = |row: &CimInstance| {
            let end = |name: &str| row.optional_reference(name).ok().flatten();
            let (job, element) = end("AffectingElement").zip(end("AffectedElement"))?;
            let effects = row.numbers("ElementEffects").unwrap_or_default();
            let job = job.key("InstanceID")?.to_owned();
            Some(JobElement { job, element, created: effects.contains(&CREATED) })
        };
        Ok(rows.iter().filter_map(read).collect())
    }

    /// Waits for a job. `what` says in words what it does.
    ///
    /// On cancellation the host is asked to stop the job, and its end is waited for within
    /// [`cancel_grace_ms`](crate::HostOptions::cancel_grace_ms). A job that ends well nevertheless is
    /// answered as done, so that the caller can remove what it made.
    ///
    /// # Errors
    /// [`HypervisorError::Failed`] with the host's words and what to do, also where the job is gone
    /// and its outcome unknown; [`HypervisorError::Timeout`] past the limit, while the job goes on;
    /// [`HypervisorError::Block`] with [`BlockError::Cancelled`].
    pub fn wait(&self, job: &ObjectPath, what: &str, cancel: &CancelToken) -> Result<JobOutcome> {
        match self.follow(job, what, cancel)? {
            JobEnd::Done(outcome) => Ok(outcome),
            JobEnd::Failed { code, detail } => Err(codes::error(what, code, &detail)),
            JobEnd::Vanished => Err(vanished(what)),
        }
    }

    /// Waits for a job and tells how it ended.
    pub(crate) fn follow(
        &self,
        job: &ObjectPath,
        what: &str,
        cancel: &CancelToken,
    ) -> Result<JobEnd> {
        let options = self.options();
        let clock = options.clock.as_ref();
        let mut deadline = clock.now_ms().saturating_add(options.job_timeout_ms);
        let mut cancelled = false;
        let mut pause_ms = FIRST_PAUSE_MS.min(options.poll_interval_ms).max(1);
        let mut failed_looks = 0;
        loop {
            match self.cim().get(job) {
                Ok(instance) => {
                    failed_looks = 0;
                    if let Some(end) = self.end_of(job, &instance)? {
                        return match end {
                            JobEnd::Failed { .. } if cancelled => Err(BlockError::Cancelled.into()),
                            end => Ok(end),
                        };
                    }
                }
                Err(CimError::NotFound { .. }) => return Ok(JobEnd::Vanished),
                Err(error @ (CimError::Unreachable { .. } | CimError::Timeout { .. })) => {
                    failed_looks += 1;
                    if failed_looks >= MAX_FAILED_LOOKS {
                        return Err(from_cim(error));
                    }
                    tracing::warn!(%error, "cannot see how far the job is: {what}");
                }
                Err(error) => return Err(from_cim(error)),
            }
            if cancel.is_cancelled() && !cancelled {
                cancelled = true;
                self.terminate(job);
                deadline = deadline.min(clock.now_ms().saturating_add(options.cancel_grace_ms));
            }
            if clock.now_ms() >= deadline {
                return Err(match cancelled {
                    true => BlockError::Cancelled.into(),
                    false => HypervisorError::Timeout {
                        action: format!("{what} (the host works on)"),
                        timeout_ms: options.job_timeout_ms,
                    },
                });
            }
            clock.sleep_ms(pause_ms);
            pause_ms = (pause_ms + pause_ms / 2).min(options.poll_interval_ms).max(1);
        }
    }

    /// How the job ended; none while it is under way.
    fn end_of(&self, job: &ObjectPath, instance: &CimInstance) -> Result<Option<JobEnd>> {
        let number = instance.number::<u16>("JobState").map_err(from_cim)?;
        let Some(state) = State::of(number) else {
            return Err(HypervisorError::protocol(
                self.peer(),
                format!("a job is in state {number}, which is none of the documented ones"),
            ));
        };
        Ok(match state {
            State::UnderWay => None,
            State::Completed => {
                Some(JobEnd::Done(JobOutcome { warnings: vec![], affected: self.affected(job) }))
            }
            State::CompletedWithWarnings => {
                let mut warnings = self.texts(job, instance);
                if warnings.is_empty() {
                    warnings
                        .push("the host completed it with warnings and does not say which".into());
                }
                Some(JobEnd::Done(JobOutcome { warnings, affected: self.affected(job) }))
            }
            State::Failed(word) => {
                let code = instance.optional_number::<u32>("ErrorCode").ok().flatten();
                let texts = self.texts(job, instance);
                let detail = if texts.is_empty() { word.to_owned() } else { texts.join("; ") };
                Some(JobEnd::Failed { code: code.unwrap_or(codes::FAILED), detail })
            }
        })
    }

    /// What the host says about the end of a job, each text once. Whatever cannot be had is left out: the
    /// job's end is known.
    fn texts(&self, job: &ObjectPath, instance: &CimInstance) -> Vec<String> {
        let mut texts = Vec::new();
        for name in ["ErrorDescription", "ErrorSummaryDescription"] {
            if let Ok(Some(text)) = instance.optional_text(name) {
                add_text(&mut texts, text);
            }
        }
        match self.cim().invoke(job, "GetErrorEx", &[]) {
            Ok(output) => {
                for error in output.parameters.texts("Errors").unwrap_or_default() {
                    let message = xml::from_xml(error);
                    if let Ok(Some(text)) =
                        message.as_ref().map(|error| error.optional_text("Message").ok().flatten())
                    {
                        add_text(&mut texts, text);
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "the errors of a job cannot be read"),
        }
        texts
    }

    /// The objects that a job worked on, those it made first. `Msvm_AffectedJobElement` says what was done
    /// to each; real hosts also have rows that say nothing (effect 0). Where the rows cannot be had the
    /// association is followed without them, and where that fails too the answer is empty: the work is
    /// done, and what it made is then found by comparing what was there before and after.
    pub(crate) fn affected(&self, job: &ObjectPath) -> Vec<ObjectPath> {
        let class = Some(ELEMENT.to_owned());
        let role = Some("AffectingElement".to_owned());
        let rows = Association { class: class.clone(), result_class: None, role };
        match self.cim().references(job, &rows) {
            Ok(found) => {
                let (mut made, mut others) = (Vec::new(), Vec::new());
                for row in found {
                    let Ok(Some(element)) = row.optional_reference("AffectedElement") else {
                        continue;
                    };
                    let effects = row.numbers("ElementEffects").unwrap_or_default();
                    let list = if effects.contains(&CREATED) { &mut made } else { &mut others };
                    if !list.contains(&element) {
                        list.push(element);
                    }
                }
                others.retain(|element| !made.contains(element));
                made.append(&mut others);
                return made;
            }
            Err(error) => tracing::debug!(%error, "the results of a job cannot be read"),
        }
        let all = Association { class, result_class: None, role: None };
        match self.cim().associators(job, &all) {
            Ok(found) => found.into_iter().filter_map(|found| found.path).collect(),
            Err(error) => {
                tracing::debug!(%error, "the results of a job cannot be followed");
                Vec::new()
            }
        }
    }

    /// Asks the host to stop a job. It may refuse or be too late.
    fn terminate(&self, job: &ObjectPath) {
        /// `RequestedState`: terminate.
        const TERMINATE: u16 = 4;
        let parameters = [("RequestedState", CimValue::Uint16(TERMINATE))];
        match self.cim().invoke(job, "RequestStateChange", &parameters) {
            Ok(output) => {
                tracing::debug!(code = output.return_value, "asked the host to stop a job")
            }
            Err(error) if is_unknown_class(&error) => {}
            Err(error) => tracing::debug!(%error, "the host does not stop the job"),
        }
    }
}

/// The error for a job that is gone.
pub(crate) fn vanished(what: &str) -> HypervisorError {
    HypervisorError::failed(
        what,
        "the host has forgotten its job, so how it ended is not known; the management service (vmms) \
         may have been started again: see the event log Hyper-V-VMMS",
    )
}

/// Adds a text of the host as one line of bounded length, once.
fn add_text(texts: &mut Vec<String>, text: &str) {
    let line: String = text
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(MAX_TEXT_CHARS)
        .collect();
    if !line.is_empty() && !texts.iter().any(|known| known.contains(&line)) {
        texts.push(line);
    }
}
