//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#[allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]
mod support;

mod backup;
mod copy;
mod hyperv_winrm;
mod restore;
mod restore_vm;
