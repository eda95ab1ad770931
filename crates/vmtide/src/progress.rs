//! Showing how far a job is: a bar on a terminal, events for programs, nothing otherwise.

use crate::output::Output;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmtide_block::{CancelToken, Progress};

/// How often a bar moves: often enough to look alive, rarely enough to cost nothing.
const DRAW_INTERVAL: Duration = Duration::from_millis(125);

/// How often programs are told: logs of a night must stay readable.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// A progress event.
#[derive(Serialize)]
struct ProgressEvent {
    total_bytes: u64,
    done_bytes: u64,
    transferred_bytes: u64,
    bytes_per_second: u64,
    eta_seconds: Option<u64>,
}

/// Shows progress from a thread of its own until dropped.
pub struct ProgressDisplay {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ProgressDisplay {
    /// Shows `progress` as `output` does things. `bar_allowed` is false where log lines would run
    /// into it.
    pub fn start(
        output: &Arc<Output>,
        progress: &Arc<Progress>,
        cancel: &CancelToken,
        bar_allowed: bool,
    ) -> Self {
        let on_terminal = std::io::stderr().is_terminal() && bar_allowed;
        let with_bar = on_terminal && !output.is_json() && !output.is_quiet();
        let (stop, stopped) = channel();
        let shown = Shown {
            output: Arc::clone(output),
            progress: Arc::clone(progress),
            cancel: cancel.clone(),
            begun: Instant::now(),
        };
        if with_bar {
            *output.bar.lock() = Some(new_bar());
        }
        let interval = if with_bar { DRAW_INTERVAL } else { EVENT_INTERVAL };
        // Without a thread there is only nothing to see.
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || shown.run(&stopped, interval))
            .ok();
        Self { stop: Some(stop), thread }
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A thread that only draws has nothing to tell when it ends abnormally.
            let _ = thread.join();
        }
    }
}

struct Shown {
    output: Arc<Output>,
    progress: Arc<Progress>,
    cancel: CancelToken,
    begun: Instant,
}

impl Shown {
    fn run(&self, stopped: &Receiver<()>, interval: Duration) {
        let mut told = false;
        while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            if self.cancel.is_cancelled() && !told {
                told = true;
                self.output.remark("interrupted: cleaning up (once more to stop at once)");
            }
            self.show();
        }
        if let Some(bar) = self.output.bar.lock().take() {
            bar.finish_and_clear();
        }
    }

    fn show(&self) {
        let now = self.progress.snapshot();
        if let Some(bar) = &*self.output.bar.lock() {
            bar.set_length(now.total_bytes);
            bar.set_position(now.done_bytes);
            return;
        }
        if !self.output.is_json() {
            return;
        }
        let elapsed_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let bytes_per_second = now.done_bytes.saturating_mul(1000) / elapsed_ms.max(1);
        let left = now.total_bytes.saturating_sub(now.done_bytes);
        self.output.event(
            "progress",
            &ProgressEvent {
                total_bytes: now.total_bytes,
                done_bytes: now.done_bytes,
                transferred_bytes: now.transferred_bytes,
                bytes_per_second,
                eta_seconds: left.checked_div(bytes_per_second),
            },
        );
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let template = "{msg} [{bar:24}] {percent:>3}% {binary_bytes}/{binary_total_bytes} \
                    {binary_bytes_per_sec} ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
