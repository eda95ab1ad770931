//! Management of Windows hosts by CIM, as far as backing up Hyper-V needs it.
//!
//! Hyper-V is driven by objects of the namespace `root\virtualization\v2`: queried by WQL, read by their
//! path, and acted on by methods that take scalars, references to other objects and whole instances as
//! text. [`Cim`] is that and nothing more. Two transports implement it, COM on the host and WS-Management
//! over the network, and a stand-in host in the tests; what is built on the trait does not know which one
//! it has. All is read as hostile: values come with a type that the peer chose, or, over WS-Management, as
//! mere text, and the accessors of [`CimInstance`] check every one.

mod cim;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod instance;
mod path;
pub mod remote;
mod value;
pub mod wql;
pub mod xml;

pub use cim::{Association, Cim, Link, MethodOutput, VIRTUALIZATION_NAMESPACE};
pub use error::{CimError, Result};
pub use instance::CimInstance;
pub use path::ObjectPath;
pub use value::{CimType, CimValue};
