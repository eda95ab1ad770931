//! The management objects that backup and restore need, as typed records.

pub mod types;
