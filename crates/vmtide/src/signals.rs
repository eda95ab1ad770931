//! Ctrl-C and the wish of the system to end.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vmtide_block::CancelToken;
use vmtide_engine::{EngineError, Result};

/// From now on the first SIGINT or SIGTERM cancels the token, so that the job can abort in order;
/// the second ends the process at once. What the platform still holds then is in the journal, and
/// the next run removes it.
pub fn cancel_on_signals() -> Result<CancelToken> {
    let cancelled = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let register = || {
            // The order matters: this one looks at the flag before the next one sets it.
            let exit = i32::from(crate::exit::Exit::Interrupted.code());
            flag::register_conditional_shutdown(signal, exit, Arc::clone(&cancelled))?;
            flag::register(signal, Arc::clone(&cancelled))
        };
        register().map_err(|error| EngineError::io("set up the handling of signals", error))?;
    }
    Ok(CancelToken::from_flag(cancelled))
}
