//! Jobs: work that takes simulated time, its states, its end and what it leaves to be read.

use crate::services::arguments::Arguments;
use crate::services::reference::ConvertPoint;
use crate::services::snapshot::NewSnapshot;
use crate::state::{State, guid};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue, ObjectPath};

/// How long a job that is done can be read (`TimeBeforeRemoval`).
const KEPT_MS: u64 = 5 * 60 * 1000;

/// `ElementEffects`: the job made the element.
pub(crate) const EFFECT_CREATE: u16 = 5;

/// A job.
pub(crate) struct Job {
    pub(crate) id: Uuid,
    pub(crate) method: String,
    pub(crate) caption: String,
    pub(crate) begun_ms: u64,
    /// When it will have done its work; none for one that never ends.
    pub(crate) due_ms: Option<u64>,
    pub(crate) effect: Option<Effect>,
    pub(crate) end: Option<End>,
    /// The elements it worked on, each with its effect.
    pub(crate) affected: Vec<(ObjectPath, u16)>,
}

/// How a job ended.
pub(crate) struct End {
    pub(crate) at_ms: u64,
    /// 7 completed, 8 terminated, 10 exception, 32768 completed with warnings.
    pub(crate) state: u16,
    pub(crate) error: Option<JobError>,
}

/// Why a job failed, or what it warns of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobError {
    pub(crate) code: u16,
    pub(crate) description: String,
}

impl JobError {
    pub(crate) fn new(code: u16, description: impl Into<String>) -> Self {
        Self { code, description: description.into() }
    }
}

/// What a job does when its time has come.
pub(crate) enum Effect {
    /// Makes a checkpoint.
    CreateSnapshot(NewSnapshot),
    /// Removes a checkpoint, and its descendants where that was asked for.
    DestroySnapshots(Vec<Uuid>),
    /// Turns a checkpoint into a reference point.
    Convert(ConvertPoint),
    /// Removes a reference point.
    DestroyPoint(Uuid),
    /// Goes back to a checkpoint.
    Apply(Uuid),
    /// Brings a VM into a state.
    ChangeState(Uuid, u16),
    /// Calls the method only when its time has come, whether or not anybody still waits for it.
    Late(Box<LateCall>),
    /// Anything that is done when the method is called, with its result.
    Done(Result<Vec<(ObjectPath, u16)>, JobError>),
}

/// A call whose work comes long after its answer.
pub(crate) struct LateCall {
    path: ObjectPath,
    method: String,
    arguments: Arguments,
    /// The file that it names, which a host reads when it is asked.
    file: Option<(std::path::PathBuf, Vec<u8>)>,
}

/// What a method answers: its code, and its out parameters by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) code: u32,
    pub(crate) parameters: Vec<(&'static str, CimValue)>,
}

impl Answer {
    /// An answer without results.
    pub(crate) const fn code(code: u32) -> Self {
        Self { code, parameters: Vec::new() }
    }

    /// The answer with one more out parameter.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<CimValue>) -> Self {
        self.parameters.push((name, value.into()));
        self
    }
}

impl State {
    /// Begins a job; the answer of the method that did. `result` is the out parameter for what is made, which
    /// is only filled where the work is done at once.
    pub(crate) fn begin(
        &mut self,
        method: &str,
        caption: String,
        effect: Effect,
        result: Option<&'static str>,
    ) -> Answer {
        if self.faults.synchronous {
            return match self.run(effect) {
                Ok(affected) => {
                    let made = affected.iter().find(|(_, effect)| *effect == EFFECT_CREATE);
                    match (result, made) {
                        (Some(name), Some((path, _))) if !self.hides(method) => {
                            Answer::code(0).with(name, path)
                        }
                        _ => Answer::code(0),
                    }
                }
                Err(error) => Answer::code(error.code.into()),
            };
        }
        let id = self.random.guid();
        let endless = self.faults.endless_job.as_deref() == Some(method);
        let due_ms = (!endless).then(|| self.now_ms + self.options.job_ms);
        let job = Job {
            id,
            method: method.to_owned(),
            caption,
            begun_ms: self.now_ms,
            due_ms,
            effect: Some(effect),
            end: None,
            affected: Vec::new(),
        };
        self.jobs.insert(id, job);
        Answer::code(4096).with("Job", &self.path_of_id("Msvm_ConcreteJob", &guid(id)))
    }

    /// Begins a job that does all its work after `ms`, and cannot be stopped.
    pub(crate) fn begin_late(
        &mut self,
        path: &ObjectPath,
        method: &str,
        arguments: &Arguments,
        ms: u64,
    ) -> Answer {
        let id = self.random.guid();
        let file = self.local(arguments.text("SystemDefinitionFile"));
        let file = file.and_then(|file| Some((file.clone(), std::fs::read(file).ok()?)));
        let call = LateCall {
            file,
            path: path.clone(),
            method: method.to_owned(),
            arguments: arguments.clone(),
        };
        let job = Job {
            id,
            method: method.to_owned(),
            caption: "Working slowly".into(),
            begun_ms: self.now_ms,
            due_ms: Some(self.now_ms + ms),
            effect: Some(Effect::Late(Box::new(call))),
            end: None,
            affected: Vec::new(),
        };
        self.jobs.insert(id, job);
        Answer::code(4096).with("Job", &self.path_of_id("Msvm_ConcreteJob", &guid(id)))
    }

    /// What was still to be done to a VM that is removed fails: it is that VM's, and not of another that gets its id later.
    pub(crate) fn end_late_work_on(&mut self, vm: Uuid) {
        let id = guid(vm);
        for job in self.jobs.values_mut() {
            let Some(Effect::Late(late)) = &job.effect else { continue };
            let makes = ["ImportSystemDefinition", "DefineSystem"].contains(&late.method.as_str());
            if !makes && format!("{:?}", late.arguments).to_uppercase().contains(&id) {
                let gone = JobError::new(32768, "The virtual machine was deleted (standin).");
                job.effect = Some(Effect::Done(Err(gone)));
            }
        }
    }

    fn call_late(&mut self, late: &LateCall) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        let gone = late.file.as_ref().filter(|(file, _)| !file.exists());
        if let Some((file, content)) = gone {
            let directory = file.parent().expect("a file has a directory");
            let made = std::fs::create_dir_all(directory);
            made.and_then(|()| std::fs::write(file, content)).expect("the file is there again");
        }
        let synchronous = std::mem::replace(&mut self.faults.synchronous, true);
        let answer = self.call(&late.path, &late.method, &late.arguments);
        self.faults.synchronous = synchronous;
        if let Some((file, _)) = gone {
            std::fs::remove_file(file).expect("the file goes again");
        }
        let answer = answer.map_err(|error| JobError::new(32768, error.to_string()))?;
        if answer.code != 0 {
            let code = u16::try_from(answer.code).unwrap_or(32768);
            return Err(JobError::new(code, "The operation failed (standin)."));
        }
        let made = answer.parameters.iter().flat_map(|(_, value)| value.elements());
        let made = made.filter_map(CimValue::as_reference);
        Ok(made.map(|path| (path, EFFECT_CREATE)).collect())
    }

    /// Whether the result of a method is not told.
    fn hides(&self, method: &str) -> bool {
        self.faults.nothing_named
            || self.faults.no_resulting_point && method == "ConvertToReferencePoint"
    }

    /// Does what is due by now.
    pub(crate) fn catch_up(&mut self) {
        loop {
            let due = |job: &Job| job.due_ms.filter(|due| job.end.is_none() && *due <= self.now_ms);
            let next = self.jobs.values().filter_map(|job| due(job).map(|due| (due, job.id))).min();
            let Some((_, id)) = next else { break };
            self.finish(id);
        }
        self.merge_step();
        let now_ms = self.now_ms;
        self.jobs.retain(|_, job| job.end.as_ref().is_none_or(|end| now_ms < end.at_ms + KEPT_MS));
    }

    fn finish(&mut self, id: Uuid) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (effect, method) = (job.effect.take(), job.method.clone());
        let result = effect.map_or_else(|| Ok(Vec::new()), |effect| self.run(effect));
        let warning = JobError::new(32768, "The operation was completed with warnings (standin).");
        let end = match &result {
            Err(error) => End { at_ms: self.now_ms, state: 10, error: Some(error.clone()) },
            Ok(_) if self.faults.job_warnings => {
                End { at_ms: self.now_ms, state: 32768, error: Some(warning) }
            }
            Ok(_) => End { at_ms: self.now_ms, state: 7, error: None },
        };
        self.note(format!("job {method} ended: {result:?}"));
        let mut affected = result.unwrap_or_default();
        if self.hides(&method) {
            affected.retain(|(_, effect)| *effect != EFFECT_CREATE);
        }
        if self.faults.affected_without_effect {
            affected.iter_mut().for_each(|(_, effect)| *effect = 0);
        }
        if self.faults.jobs_vanish {
            self.jobs.remove(&id);
        } else if let Some(job) = self.jobs.get_mut(&id) {
            job.affected = affected;
            job.end = Some(end);
        }
    }

    fn run(&mut self, effect: Effect) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        match effect {
            Effect::CreateSnapshot(new) => self.create_snapshot(new),
            Effect::DestroySnapshots(ids) => self.destroy_snapshots(&ids),
            Effect::Convert(convert) => self.convert_snapshot(&convert),
            Effect::DestroyPoint(id) => self.destroy_point(id),
            Effect::Apply(id) => self.apply_snapshot(id),
            Effect::ChangeState(vm, state) => self.set_vm_state(vm, state).map(|()| Vec::new()),
            Effect::Late(late) => self.call_late(&late),
            Effect::Done(result) => result,
        }
    }

    /// Ends a job before its time; whether it was still under way.
    pub(crate) fn terminate(&mut self, id: Uuid) -> bool {
        let now_ms = self.now_ms;
        let ends =
            |job: &&mut Job| job.end.is_none() && !matches!(job.effect, Some(Effect::Late(_)));
        let Some(job) = self.jobs.get_mut(&id).filter(ends) else { return false };
        job.effect = None;
        job.end = Some(End { at_ms: now_ms, state: 8, error: None });
        true
    }
}

impl Job {
    /// `JobState`: 2 new, 3 starting, 4 running, then how it ended.
    pub(crate) fn state(&self, now_ms: u64) -> u16 {
        if let Some(end) = &self.end {
            return end.state;
        }
        let length = self.due_ms.map_or(400, |due| due - self.begun_ms).max(1);
        match (now_ms - self.begun_ms) * 4 / length {
            0 => 2,
            1 => 3,
            _ => 4,
        }
    }

    /// `JobType`, as far as the documents number it.
    pub(crate) fn kind(&self) -> u16 {
        match self.method.as_str() {
            "DefineSystem" => 1,
            "ModifySystemSettings" => 2,
            "DestroySystem" => 3,
            "AddResourceSettings" => 30,
            "ModifyResourceSettings" => 31,
            "RemoveResourceSettings" => 32,
            "ImportSystemDefinition" => 61,
            "ExportSystemDefinition" => 62,
            "CreateSnapshot" => 70,
            "ApplySnapshot" => 71,
            "DestroySnapshot" | "DestroySnapshotTree" => 72,
            "RealizePlannedSystem" => 141,
            _ => 0,
        }
    }

    /// `PercentComplete`.
    pub(crate) fn percent(&self, now_ms: u64) -> u16 {
        if self.end.is_some() {
            return 100;
        }
        let length = self.due_ms.map_or(u64::MAX, |due| due - self.begun_ms).max(1);
        u16::try_from((now_ms - self.begun_ms).saturating_mul(100) / length).unwrap_or(99).min(99)
    }

    /// The errors as `GetErrorEx` tells them.
    pub(crate) fn errors(&self) -> Vec<String> {
        let error = self.end.as_ref().and_then(|end| end.error.as_ref());
        let write = |error: &JobError| {
            let instance = CimInstance::new("Msvm_Error")
                .with("Message", error.description.as_str())
                .with("MessageID", "18014")
                .with("OwningEntity", "Hyper-V")
                .with("ErrorType", CimValue::Uint16(4));
            crate::embedded::write(&instance)
        };
        error.map(write).into_iter().collect()
    }
}
