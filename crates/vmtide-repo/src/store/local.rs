//! Objects as files of a local directory.
pub struct LocalStore;
