//! A store on which many simulated processes take turns.
//!
//! Every call of the store is a point at which the scheduler, and not the operating system, decides
//! who goes on: only one thread runs at a time, chosen by the seed. There it also decides what else
//! happens: the process dies, or stands still while hours pass; the call fails and was not carried
//! out, or was, or will be later; time passes.

use super::random::Random;
use jiff::SignedDuration;
use parking_lot::{Condvar, Mutex};
use std::collections::HashSet;
use std::sync::Arc;
use vmtide_repo::{
    MemoryStore, ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, RepoError, Result,
};

/// What may go wrong, in thousandths of calls.
#[derive(Clone, Copy, Debug)]
pub struct Dangers {
    pub crash: u64,
    pub sleep: u64,
    pub fault: u64,
    pub time: u64,
}

type Delayed = Box<dyn FnOnce(&MemoryStore) + Send>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    AsleepUntil(u64),
    Done,
}

struct Process {
    state: State,
    dead: bool,
    /// Something went wrong for it: it may fail.
    disturbed: bool,
    wake: Arc<Condvar>,
    /// How often it gets a turn, against the others; changes from time to time, so that one may do
    /// much while another hardly moves.
    speed: u64,
}

struct Turns {
    random: Random,
    processes: Vec<Process>,
    turn: Option<usize>,
    steps: u64,
    delayed: Vec<(u64, Delayed)>,
}

pub struct World {
    pub memory: MemoryStore,
    dangers: Dangers,
    turns: Mutex<Turns>,
    /// Processes that others on the same host know to be gone.
    pub gone: Arc<Mutex<HashSet<u32>>>,
}

/// What becomes of a call.
enum Fate {
    Go,
    Refuse,
    DoAndRefuse,
    Delay,
}

impl World {
    pub fn new(memory: MemoryStore, seed: u64, processes: usize, dangers: Dangers) -> Arc<Self> {
        let processes = (0..processes)
            .map(|_| Process {
                state: State::Ready,
                dead: false,
                disturbed: false,
                wake: Arc::new(Condvar::new()),
                speed: 1,
            })
            .collect();
        let turns = Turns {
            random: Random::new(seed),
            processes,
            turn: None,
            steps: 0,
            delayed: Vec::new(),
        };
        let turns = Mutex::new(turns);
        Arc::new(Self { memory, dangers, turns, gone: Arc::default() })
    }

    /// The store as one process sees it.
    pub fn store(self: &Arc<Self>, process: usize) -> Arc<dyn ObjectStore> {
        Arc::new(SimulatedStore { world: Arc::clone(self), process })
    }

    /// Lets the first one begin, once all threads wait.
    pub fn begin(&self) {
        self.pass_on(&mut self.turns.lock());
    }

    /// Waits for the first turn of a process.
    pub fn wait_for_turn(&self, process: usize) {
        let mut turns = self.turns.lock();
        let wake = Arc::clone(&turns.processes[process].wake);
        while turns.turn != Some(process) {
            wake.wait(&mut turns);
        }
    }

    /// A process has come to its end.
    pub fn end(&self, process: usize) {
        let mut turns = self.turns.lock();
        turns.processes[process].state = State::Done;
        self.pass_on(&mut turns);
    }

    /// Whether something went wrong for a process, so that it may fail.
    pub fn is_disturbed(&self, process: usize) -> bool {
        self.turns.lock().processes[process].disturbed
    }

    pub fn is_dead(&self, process: usize) -> bool {
        self.turns.lock().processes[process].dead
    }

    /// Carries out what was delayed and nobody waits for.
    pub fn settle(&self) {
        let delayed = std::mem::take(&mut self.turns.lock().delayed);
        delayed.into_iter().for_each(|(_, call)| call(&self.memory));
    }

    fn pass_on(&self, turns: &mut Turns) {
        turns.steps += 1;
        let steps = turns.steps;
        let (due, later) =
            std::mem::take(&mut turns.delayed).into_iter().partition(|(at, _)| *at <= steps);
        turns.delayed = later;
        for (_, call) in due {
            let call: Delayed = call;
            call(&self.memory);
        }
        if turns.random.thousandth(self.dangers.time) {
            let minutes = turns.random.below(90) as i64;
            self.memory.advance(SignedDuration::from_mins(minutes));
        }
        for process in &mut turns.processes {
            if matches!(process.state, State::AsleepUntil(until) if until <= steps) {
                process.state = State::Ready;
            }
        }
        let ready = |turns: &Turns| -> Vec<usize> {
            let of = |state| {
                let all = turns.processes.iter().enumerate();
                all.filter(move |(_, process)| process.state == state).map(|(n, _)| n)
            };
            of(State::Ready).collect()
        };
        let mut candidates = ready(turns);
        if candidates.is_empty() {
            // Only sleepers are left: the first one wakes.
            let sleepers =
                turns.processes.iter().enumerate().filter_map(|(n, process)| match process.state {
                    State::AsleepUntil(until) => Some((until, n)),
                    _ => None,
                });
            if let Some((until, number)) = sleepers.min() {
                turns.steps = until;
                turns.processes[number].state = State::Ready;
                candidates = vec![number];
            }
        }
        if turns.random.below(60) == 0 || steps < 2 {
            for number in 0..turns.processes.len() {
                turns.processes[number].speed = [1, 1, 8, 60, 400][turns.random.below(5) as usize];
            }
        }
        let total: u64 = candidates.iter().map(|number| turns.processes[*number].speed).sum();
        turns.turn = None;
        if total > 0 {
            let mut place = turns.random.below(total);
            turns.turn = candidates.into_iter().find(|number| {
                let speed = turns.processes[*number].speed;
                let is_it = place < speed;
                place = place.saturating_sub(speed);
                is_it
            });
        }
        if let Some(next) = turns.turn {
            turns.processes[next].wake.notify_one();
        }
    }

    /// Gives others their turns, and says what becomes of the call when it is made.
    fn call(&self, process: usize, changes: bool) -> Result<Fate> {
        let mut turns = self.turns.lock();
        if turns.processes[process].dead {
            return Err(failed("the process is dead"));
        }
        let wake = Arc::clone(&turns.processes[process].wake);
        let wait = |turns: &mut parking_lot::MutexGuard<'_, Turns>| {
            self.pass_on(turns);
            while turns.turn != Some(process) {
                wake.wait(turns);
            }
        };
        wait(&mut turns);
        if turns.random.thousandth(self.dangers.sleep) {
            // It stands still before its next step; mostly long enough to be taken for dead.
            let steps = 10 + turns.random.below(400);
            let until = turns.steps + steps;
            turns.processes[process].state = State::AsleepUntil(until);
            turns.processes[process].disturbed = true;
            if turns.random.below(4) > 0 {
                self.memory.advance(SignedDuration::from_mins(61));
            }
            wait(&mut turns);
        }
        if turns.random.thousandth(self.dangers.crash) {
            turns.processes[process].dead = true;
            turns.processes[process].disturbed = true;
            if turns.random.below(2) == 0 {
                self.gone.lock().insert(process as u32);
            }
            // What it had sent may arrive all the same.
            if changes && turns.random.below(3) == 0 {
                return Ok(if turns.random.below(2) == 0 {
                    Fate::DoAndRefuse
                } else {
                    Fate::Delay
                });
            }
            return Err(failed("the process died"));
        }
        if turns.random.thousandth(self.dangers.fault) {
            turns.processes[process].disturbed = true;
            return Ok(match turns.random.below(3) {
                0 if changes => Fate::DoAndRefuse,
                1 if changes => Fate::Delay,
                _ => Fate::Refuse,
            });
        }
        Ok(Fate::Go)
    }

    fn change(
        &self,
        process: usize,
        carry_out: impl FnOnce(&MemoryStore) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        match self.call(process, true)? {
            Fate::Go => carry_out(&self.memory),
            Fate::Refuse => Err(failed("refused")),
            Fate::DoAndRefuse => {
                carry_out(&self.memory)?;
                Err(failed("the answer was lost"))
            }
            Fate::Delay => {
                let mut turns = self.turns.lock();
                let at = turns.steps + 1 + turns.random.below(500);
                turns.delayed.push((at, Box::new(|memory| drop(carry_out(memory)))));
                Err(failed("no answer; it may arrive later"))
            }
        }
    }

    fn look<T>(&self, process: usize, look: impl FnOnce(&MemoryStore) -> Result<T>) -> Result<T> {
        match self.call(process, false)? {
            Fate::Go => look(&self.memory),
            _ => Err(failed("refused")),
        }
    }
}

fn failed(why: &str) -> RepoError {
    RepoError::io("simulated store", std::io::Error::other(why.to_owned()))
}

struct SimulatedStore {
    world: Arc<World>,
    process: usize,
}

struct SimulatedWriter {
    world: Arc<World>,
    process: usize,
    name: String,
    content: Vec<u8>,
}

impl ObjectWriter for SimulatedWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.content.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let (name, content) = (self.name, self.content);
        self.world.change(self.process, move |memory| memory.put(&name, &content))
    }
}

struct SimulatedReader {
    world: Arc<World>,
    process: usize,
    name: String,
    length_bytes: u64,
}

impl ObjectReader for SimulatedReader {
    fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// So that frames are read in part as well.
    fn rereads_cheaply(&self) -> bool {
        true
    }

    /// As an object store does it: what is removed meanwhile is not there.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.world.look(self.process, |memory| memory.open(&self.name)?.read_at(buffer, offset))
    }
}

impl ObjectStore for SimulatedStore {
    fn location(&self) -> String {
        "simulation".into()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(SimulatedWriter {
            world: Arc::clone(&self.world),
            process: self.process,
            name: name.into(),
            content: Vec::new(),
        }))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        let opened = self.world.look(self.process, |memory| memory.open(name))?;
        Ok(Box::new(SimulatedReader {
            world: Arc::clone(&self.world),
            process: self.process,
            name: name.into(),
            length_bytes: opened.length_bytes(),
        }))
    }

    /// Object stores answer page by page, and things come and go meanwhile.
    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        const PAGE: usize = 8;
        let mut after = String::new();
        loop {
            let mut page = Vec::new();
            self.world.look(self.process, |memory| {
                memory.list(prefix, &mut |entry| {
                    if entry.name > after && page.len() <= PAGE {
                        page.push(entry);
                    }
                    Ok(())
                })
            })?;
            let is_last = page.len() <= PAGE;
            page.truncate(PAGE);
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.name);
            page.into_iter().try_for_each(&mut *visit)?;
            if is_last {
                return Ok(());
            }
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let name = name.to_owned();
        self.world.change(self.process, move |memory| memory.remove(&name))
    }

    fn remove_unfinished(&self) -> Result<u64> {
        Ok(0)
    }
}
