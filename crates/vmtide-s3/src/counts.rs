//! How many requests were made, by what they cost.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Requests of a store, retries included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RequestCounts {
    /// PUT and POST: the dear ones (AWS: some $5 a million).
    pub put: u64,
    /// LIST, charged as PUT.
    pub list: u64,
    /// GET and HEAD: the cheap ones (AWS: some $0.4 a million).
    pub get: u64,
    /// DELETE: free.
    pub delete: u64,
}

/// The same, counting.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    put: AtomicU64,
    list: AtomicU64,
    get: AtomicU64,
    delete: AtomicU64,
}

impl Counters {
    /// Counts a request. `is_list` where a GET lists.
    pub(crate) fn count(&self, method: &http::Method, is_list: bool) {
        let counter = match *method {
            http::Method::DELETE => &self.delete,
            http::Method::GET | http::Method::HEAD if is_list => &self.list,
            http::Method::GET | http::Method::HEAD => &self.get,
            _ => &self.put,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts now.
    pub(crate) fn get(&self) -> RequestCounts {
        RequestCounts {
            put: self.put.load(Ordering::Relaxed),
            list: self.list.load(Ordering::Relaxed),
            get: self.get.load(Ordering::Relaxed),
            delete: self.delete.load(Ordering::Relaxed),
        }
    }
}
