//! The management objects of the Windows host that this runs on, over COM.
//!
//! [`ComCim`] is the transport of [`Cim`](vmtide_cim::Cim) for a program on the host itself: no network, no password,
//! the rights of its own account. COM gives values as `VARIANT`s whose type often differs from the one in the schema
//! (a `uint16` comes as a 32-bit integer, a `uint64` as text), so what is asked of an object is always its schema's
//! type, too. What can be decided without Windows is decided in modules that compile and are tested everywhere:
//!
//! * [`types`] from the numbers of CIM's types and what a `VARIANT` holds to typed values, and back;
//! * [`error`] what the `HRESULT`s of management mean, as the errors of every transport;
//! * [`statements`] queries for associators and references.
//!
//! The calls themselves exist on Windows only. Facts come from the public documentation of `wbemcli.h` ("WMI
//! infrastructure", "Numbers", "Semisynchronous calls"); the interfaces are those of the `windows` crate.

pub mod error;
pub mod statements;
pub mod types;

#[cfg(windows)]
mod apartment;
#[cfg(windows)]
mod com;
#[cfg(windows)]
mod object;
#[cfg(windows)]
mod variant;

#[cfg(windows)]
pub use com::ComCim;
