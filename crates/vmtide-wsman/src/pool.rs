//! The sessions of a client: a few, each used by one request at a time, kept for the next.

use crate::options::WsmanOptions;
use crate::session::{Failure, Session};
use crate::tls::Tls;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use vmtide_cim::{CimError, Link};

/// How long a session may rest. HTTP.sys closes connections after 120 s of silence; what is younger is open.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// How long a session may rest before a request that must not be sent twice goes over a new one. Devices between
/// here and the host forget connections without a word, and then nobody can tell whether the request arrived.
const MAX_IDLE_ONCE: Duration = Duration::from_secs(5);

/// Sessions at rest, and how many there are in all.
#[derive(Default)]
struct State {
    resting: Vec<Session>,
    count: usize,
}

/// The sessions to one host.
pub(crate) struct Pool {
    /// Taken out when it ends, which must not wait for what still runs.
    runtime: Option<Runtime>,
    options: WsmanOptions,
    tls: Option<Tls>,
    peer: String,
    state: Mutex<State>,
    returned: Condvar,
    /// Whether it was told that NTLM is used in the place of Kerberos: once is enough.
    has_warned: AtomicBool,
    /// What proved the user when the last session was opened, and why NTLM did although Kerberos was tried.
    login: Mutex<Option<(&'static str, Option<String>)>>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Pool {
    /// Makes no connection yet.
    ///
    /// # Errors
    /// Of starting a thread.
    pub fn new(options: WsmanOptions, tls: Option<Tls>) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("wsman")
            .enable_all()
            .build()?;
        let peer = options.peer();
        Ok(Self {
            runtime: Some(runtime),
            options,
            tls,
            peer,
            state: Mutex::default(),
            returned: Condvar::new(),
            has_warned: AtomicBool::new(false),
            login: Mutex::default(),
        })
    }

    pub fn options(&self) -> &WsmanOptions {
        &self.options
    }

    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// How the host was reached; none before it was.
    pub fn link(&self) -> Option<Link> {
        let (login, fallback) = self.login.lock().clone()?;
        let shown = self.tls.as_ref().and_then(|tls| *tls.seen.lock());
        let protocol = match self.tls {
            Some(_) => "WinRM over HTTPS",
            None => "WinRM over HTTP, each message sealed",
        };
        Some(Link {
            protocol: protocol.to_owned(),
            login,
            fallback,
            certificate_end_unix_s: shown.and_then(|shown| shown.end_unix_s),
        })
    }

    /// Sends an envelope over a session, which is new if `fresh`. `once`: it must not be sent twice.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn exchange(
        &self,
        envelope: &str,
        action: &str,
        once: bool,
        fresh: bool,
    ) -> Result<Bytes, Failure> {
        let Some(runtime) = &self.runtime else {
            return Err(not_run(CimError::protocol(&self.peer, "the client has ended")));
        };
        let resting = self.take(action, once, fresh)?;
        let place = Place(self);
        let outcome = runtime.block_on(async {
            let mut session = match resting {
                Some(session) => session,
                None => {
                    let opened = Session::open(&self.options, self.tls.as_ref(), &self.peer).await;
                    let session = opened.map_err(not_run)?;
                    let login = session.login(&self.options);
                    *self.login.lock() = Some((login, session.fallback.clone()));
                    session
                }
            };
            if let Some(why) = session.fallback.take() {
                self.warn_of_ntlm(&why);
            }
            let answer = session.exchange(envelope, action, &self.options, &self.peer).await?;
            Ok((session, answer))
        });
        let (session, answer) = outcome?;
        if session.is_open() {
            place.keep(session);
        }
        Ok(answer)
    }

    /// Tells once that the user is proven by less than could be. Whoever can answer in the place of the domain's servers
    /// can bring that about.
    fn warn_of_ntlm(&self, why: &str) {
        if !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                peer = %self.peer,
                "WinRM: NTLM is used instead of Kerberos ({why}); --winrm-auth kerberos takes nothing weaker"
            );
        }
    }

    /// A resting session, or the right to open one (none); waits where all are in use.
    fn take(&self, action: &str, once: bool, fresh: bool) -> Result<Option<Session>, Failure> {
        let limit = if once { MAX_IDLE_ONCE } else { MAX_IDLE };
        // Each of those before may take its whole time.
        let patience = self.options.operation_timeout.saturating_mul(2) + MAX_IDLE;
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        loop {
            while let Some(session) = state.resting.pop() {
                if !fresh && session.is_open() && session.idle() < limit {
                    return Ok(Some(session));
                }
                state.count = state.count.saturating_sub(1);
            }
            if state.count < self.options.connections {
                state.count += 1;
                return Ok(None);
            }
            if self.returned.wait_until(&mut state, deadline).timed_out() {
                return Err(no_place(&self.peer, action, patience, once));
            }
        }
    }
}

/// All connections are in use for too long. It is not tried again: that was the wait. Of a call it is said that it was
/// not sent, so that nobody looks for what it might have made.
fn no_place(peer: &str, action: &str, patience: Duration, once: bool) -> Failure {
    let timeout_ms = crate::fault::milliseconds(patience);
    let error = match once {
        true => CimError::Unreachable {
            peer: peer.into(),
            detail: format!(
                "{action}: all connections were in use for {timeout_ms} ms, so it was not sent"
            ),
            before_request: true,
        },
        false => CimError::Timeout { action: format!("{action} (no free connection)"), timeout_ms },
    };
    Failure { error, not_run: false, unproven: false }
}

const fn not_run(error: CimError) -> Failure {
    let not_run = matches!(error, CimError::Unreachable { .. });
    Failure { error, not_run, unproven: false }
}

/// A place among the connections; given back when it is dropped.
struct Place<'a>(&'a Pool);

impl Place<'_> {
    /// Gives the session back with its place.
    fn keep(self, session: Session) {
        let mut state = self.0.state.lock();
        state.resting.push(session);
        // What is dropped with the place below is counted again by who takes the session.
        state.count += 1;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.count = state.count.saturating_sub(1);
        drop(state);
        self.0.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_finds_no_connection_was_not_sent() {
        let failed = |once| no_place("hv1", "call of X", Duration::from_secs(1), once);
        let call = failed(true);
        assert!(call.error.was_not_run() && !call.not_run, "{call:?}");
        assert!(call.error.to_string().contains("not sent"), "{}", call.error);
        assert!(matches!(failed(false).error, CimError::Timeout { .. }));
    }
}
