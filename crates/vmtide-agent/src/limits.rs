//! What one client may use at once.

/// What one client may use at once.
#[derive(Debug, Default)]
pub struct Limits {}
