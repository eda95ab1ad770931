//! Repositories in buckets of S3 and of what speaks its protocol.
//!
//! [`S3Store`] is an [`ObjectStore`](vmtide_repo::ObjectStore): objects of a repository become
//! objects of a bucket below a prefix. It asks nothing of the server but what every S3 server does:
//! PUT, GET of a range, LIST and DELETE, strongly consistent. Conditional writes are used where
//! they work and needed nowhere. [`probe`](S3Store::probe) tries a server and says which
//! guarantees it gives; [`StoreGuarantees::refusal`] says why one cannot hold a repository.
//!
//! Requests are made here, over `reqwest`, because object lock, versions and the recognition of an
//! own write whose answer was lost need headers that no general client sets; signatures and the
//! credentials of machines, containers and web identities come from `object_store`. All of it runs
//! on a small runtime of the store's own: callers are ordinary threads.

mod answer;
mod body;
mod bucket;
mod client;
mod connect;
mod counts;
mod credentials;
mod endpoint;
mod failure;
mod options;
mod probe;
mod profile;
mod reader;
mod retry;
mod spool;
mod store;
mod upload;
mod versions;
mod writer;
mod xml;

pub use bucket::{BucketRetention, ObjectLockState, Versioning};
pub use counts::RequestCounts;
pub use options::{S3Options, ServerEncryption, StaticCredentials};
pub use probe::{Guarantee, ProbeDepth, StoreGuarantees};
pub use store::S3Store;
