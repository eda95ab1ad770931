//! Keeps something alive on an agent for as long as its client lives.

use crate::{AgentError, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::Duration;

/// Renews something again and again until it is stopped.
#[derive(Default)]
pub(crate) struct Keeper {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Default)]
struct State {
    ended: bool,
    lost: Option<String>,
}

impl Keeper {
    /// Calls `renew` at every `interval`, on a thread of its own. It ends by itself, at the latest when the request
    /// that it makes at the moment does: nobody waits for it.
    ///
    /// # Errors
    /// Where the thread cannot be started.
    pub fn start(
        self: &Arc<Self>,
        name: &str,
        interval: Duration,
        renew: impl FnMut() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let keeper = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || keeper.keep(interval, renew))
            .map(drop);
        spawned.map_err(|source| AgentError::Io {
            context: "start the thread that keeps a freeze".into(),
            source,
        })
    }

    /// Whether this was the call that stopped it.
    pub fn stop(&self) -> bool {
        let first = !std::mem::replace(&mut self.state.lock().ended, true);
        self.woken.notify_all();
        first
    }

    /// What was lost, where the agent said so.
    pub fn lost(&self) -> Option<String> {
        self.state.lock().lost.clone()
    }

    fn keep(&self, interval: Duration, mut renew: impl FnMut() -> Result<()>) {
        let mut state = self.state.lock();
        while !state.ended {
            if !self.woken.wait_for(&mut state, interval).timed_out() {
                continue;
            }
            let renewed = parking_lot::MutexGuard::unlocked(&mut state, &mut renew);
            match renewed {
                Ok(()) => {}
                Err(AgentError::NotFound { .. }) => {
                    state.lost = Some("the agent ended the freeze while it was read".into());
                    return;
                }
                // The next time is soon enough; readers notice for themselves when the agent is gone for good.
                Err(error) => tracing::debug!(%error, "a freeze could not be renewed"),
            }
        }
    }
}
