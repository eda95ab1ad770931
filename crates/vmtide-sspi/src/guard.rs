//! Calls into the authentication library: without its logs, and without its panics.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls `call`. The library logs tokens and plain messages, which must stay out of ours; and where it meets bytes
/// that it did not think of it may panic, which must end the connection and not the process.
pub fn guarded<T>(call: impl FnOnce() -> sspi::Result<T>) -> sspi::Result<T> {
    let silent = tracing::subscriber::NoSubscriber::default();
    let result = tracing::subscriber::with_default(silent, || catch_unwind(AssertUnwindSafe(call)));
    result.unwrap_or_else(|_| {
        Err(sspi::Error::new(
            sspi::ErrorKind::InvalidToken,
            "the authentication library cannot read what came",
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors() {
        let error = guarded::<()>(|| panic!("x")).unwrap_err();
        assert_eq!(error.error_type, sspi::ErrorKind::InvalidToken);
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
    }
}
