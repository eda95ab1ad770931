//! The store: one bucket, or a prefix in it.

use crate::answer::Answer;
use crate::bucket::{BucketState, Versioning};
use crate::client::{Client, Request};
use crate::counts::RequestCounts;
use crate::failure::Failure;
use crate::options::{S3Options, ServerEncryption};
use crate::reader::S3Reader;
use crate::spool::{self, Content};
use crate::writer::S3Writer;
use crate::{versions, xml};
use http::Method;
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use vmtide_repo::{
    ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, RepoError, Result, Retention,
    check_object_name, check_prefix, is_object_name,
};

/// The object that makes a prefix a repository.
const CONFIGURATION: &str = "vmtide.repo";

/// How many parts of large objects are on their way at once, over all writers of a store. Their
/// length ([`PART_BYTES`](crate::writer)) times this is held in memory where there is no spool.
const PARTS_IN_FLIGHT: usize = 4;

/// Threads that move bytes. The callers' threads wait and compute.
const RUNTIME_THREADS: usize = 2;

/// How old an upload is that nobody will complete. No pack takes that long; a shorter time could
/// meet a backup that stood still.
const ABANDONED: SignedDuration = SignedDuration::from_hours(48);

/// What all parts of a store share.
pub(crate) struct Core {
    /// None only while it ends.
    runtime: Option<Runtime>,
    pub(crate) client: Client,
    location: String,
    prefix: String,
    encryption: Option<ServerEncryption>,
    storage_class: Option<String>,
    pub(crate) spool_directory: PathBuf,
    /// Files could not be made in it.
    pub(crate) spool_failed: AtomicBool,
    pub(crate) parts: Arc<Semaphore>,
    /// Whether to ask for conditional writes; off once a server refused the question.
    pub(crate) conditional: AtomicBool,
    /// Bytes held by readers that read ahead.
    pub(crate) ahead_bytes: AtomicU64,
    pub(crate) state: Mutex<BucketState>,
}

impl Core {
    /// Waits for something on the runtime.
    pub(crate) fn run<T>(&self, task: impl Future<Output = T>) -> Result<T> {
        match &self.runtime {
            Some(runtime) => Ok(runtime.block_on(task)),
            None => Err(RepoError::Invalid("the store is closed".into())),
        }
    }

    /// Lets something run beside.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Result<tokio::task::JoinHandle<T>> {
        match &self.runtime {
            Some(runtime) => Ok(runtime.spawn(task)),
            None => Err(RepoError::Invalid("the store is closed".into())),
        }
    }

    /// Makes a request and waits for its answer; what it failed with as it is.
    pub(crate) fn try_send(&self, request: &Request) -> Result<Result<Answer, Failure>> {
        self.run(self.client.send(request))
    }

    /// Makes a request and waits for its answer.
    pub(crate) fn send(&self, request: &Request, what: &str) -> Result<Answer> {
        self.try_send(request)?.map_err(|failure| self.error(failure, what))
    }

    /// As [`send`](Self::send), with the content of the answer in `buffer`.
    pub(crate) fn send_into(
        &self,
        request: &Request,
        buffer: &mut [u8],
        what: &str,
    ) -> Result<Answer> {
        self.run(self.client.send_into(request, buffer))?
            .map_err(|failure| self.error(failure, what))
    }

    /// The error of `what` having failed.
    pub(crate) fn error(&self, failure: Failure, what: &str) -> RepoError {
        failure.into_error(what, &self.location, &self.client.endpoint.server)
    }

    /// The key of an object.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The name of the object with this key, where it can be one of a repository here.
    fn name<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.prefix).filter(|name| is_object_name(name))
    }

    /// The place, for people.
    pub(crate) fn location(&self) -> &str {
        &self.location
    }

    /// The headers that say how an object is to be kept.
    pub(crate) fn object_headers(
        &self,
        request: Request,
        retention: Option<&Retention>,
        write_id: &str,
    ) -> Request {
        let mut request = request
            .header("content-type", "application/octet-stream")
            .header(crate::upload::WRITE_ID, write_id);
        request = match &self.encryption {
            None => request,
            Some(ServerEncryption::S3) => request.header("x-amz-server-side-encryption", "AES256"),
            Some(ServerEncryption::Kms(key)) => {
                let request = request.header("x-amz-server-side-encryption", "aws:kms");
                match key {
                    Some(key) => request.header("x-amz-server-side-encryption-aws-kms-key-id", key),
                    None => request,
                }
            }
        };
        if let Some(class) = &self.storage_class {
            request = request.header("x-amz-storage-class", class);
        }
        if let Some(retention) = retention {
            request = request
                .header("x-amz-object-lock-mode", crate::bucket::mode_name(retention.mode))
                .header(
                    "x-amz-object-lock-retain-until-date",
                    &crate::bucket::date(retention.until),
                );
        }
        request
    }

    /// Visits all keys with a prefix.
    ///
    /// # Errors
    /// Those of `visit`; [`RepoError::Io`] also where the server's listing is not whole: what is
    /// missing in it would count as not there, and what only it needs would be removed.
    pub(crate) fn list_keys(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(xml::ObjectInPage) -> Result<()>,
    ) -> Result<()> {
        self.list_in_pages(prefix, None, visit)
    }

    /// As [`list_keys`](Self::list_keys), with at most `page_keys` in a page; none for as many as
    /// the server gives.
    pub(crate) fn list_in_pages(
        &self,
        prefix: &str,
        page_keys: Option<u32>,
        visit: &mut dyn FnMut(xml::ObjectInPage) -> Result<()>,
    ) -> Result<()> {
        let what = format!("list {prefix}");
        let mut token: Option<String> = None;
        loop {
            let mut request = Request::new(Method::GET, "")
                .query("list-type", "2")
                .query("prefix", prefix.to_owned());
            if let Some(token) = &token {
                request = request.query("continuation-token", token.clone());
            }
            if let Some(keys) = page_keys {
                request = request.query("max-keys", keys.to_string());
            }
            let answer = self.send(&request, &what)?;
            let page: xml::ObjectPage = xml::parse_page(&what, "ListBucketResult", &answer.body)?;
            page.contents.into_iter().try_for_each(&mut *visit)?;
            if !page.is_truncated {
                return Ok(());
            }
            // Servers that pass over `list-type=2` answer so. A page that leads to itself would
            // keep us for ever.
            if page.next_continuation_token.is_none() || page.next_continuation_token == token {
                return Err(xml::not_whole(&what));
            }
            token = page.next_continuation_token;
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A repository's objects in a bucket. Clones share everything.
#[derive(Clone)]
pub struct S3Store {
    pub(crate) core: Arc<Core>,
}

impl std::fmt::Debug for S3Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("S3Store").field(&self.core.location).finish()
    }
}

impl S3Store {
    /// The place of `options`. Asks nobody yet.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for options that cannot be, [`RepoError::NotFound`] for a profile that
    /// is in no file, [`RepoError::Denied`] for keys that are incomplete; those of reading files.
    pub fn connect(options: &S3Options) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("vmtide-s3")
            .enable_all()
            .build()
            .map_err(|error| RepoError::io("start the threads of the S3 store", error))?;
        let prefix = match options.prefix.as_str() {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let core = Core {
            runtime: Some(runtime),
            client: Client::new(options)?,
            location: options.url(),
            prefix,
            encryption: options.encryption.clone(),
            storage_class: options.storage_class.clone(),
            spool_directory: options.spool_directory.clone().unwrap_or_else(spool::directory),
            spool_failed: AtomicBool::new(false),
            parts: Arc::new(Semaphore::new(PARTS_IN_FLIGHT)),
            conditional: AtomicBool::new(true),
            ahead_bytes: AtomicU64::new(0),
            state: Mutex::default(),
        };
        Ok(Self { core: Arc::new(core) })
    }

    /// For a new repository: a place where there is nothing but what an interrupted `init` leaves.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect); [`RepoError::AlreadyExists`] where something is there.
    pub fn create(options: &S3Options) -> Result<Self> {
        let store = Self::connect(options)?;
        let core = &store.core;
        let mut found = None;
        let stop = || RepoError::Invalid(String::new());
        let listed = core.list_keys(&core.prefix, &mut |object| {
            let name = object.key.strip_prefix(&core.prefix).unwrap_or_default().to_owned();
            let harmless = ["keys/", "probe/"].iter().any(|prefix| name.starts_with(prefix));
            if harmless || name.is_empty() {
                return Ok(());
            }
            found = Some(name);
            Err(stop())
        });
        match (found, listed) {
            (Some(name), _) if name == CONFIGURATION => Err(RepoError::AlreadyExists {
                what: format!("a repository at {}", core.location),
                hint: String::new(),
            }),
            (Some(name), _) => Err(RepoError::AlreadyExists {
                what: format!("{name} in {}", core.location),
                hint: "a new repository needs an empty prefix".into(),
            }),
            (None, listed) => listed.map(|()| store),
        }
    }

    /// How many requests were made until now, retries included.
    pub fn requests(&self) -> RequestCounts {
        self.core.client.counters.get()
    }

    /// Whether the bucket keeps versions; asked for once.
    pub fn versioning(&self) -> Result<Versioning> {
        versions::versioning(&self.core)
    }

    /// Until when an object is kept by object lock; none where it is not.
    ///
    /// # Errors
    /// [`RepoError::NotFound`], `Denied`, `Io`.
    pub fn retained_until(&self, name: &str) -> Result<Option<Timestamp>> {
        check_object_name(name)?;
        let found = versions::retention_of(&self.core, &self.core.key(name), None)?;
        Ok(found.map(|retention| retention.until))
    }
}

impl ObjectStore for S3Store {
    fn location(&self) -> String {
        self.core.location.clone()
    }

    fn is_distant(&self) -> bool {
        true
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        check_object_name(name)?;
        Ok(Box::new(S3Writer::new(Arc::clone(&self.core), name, None)?))
    }

    fn create_retained(&self, name: &str, retention: &Retention) -> Result<Box<dyn ObjectWriter>> {
        check_object_name(name)?;
        Ok(Box::new(S3Writer::new(Arc::clone(&self.core), name, Some(*retention))?))
    }

    fn retain(&self, name: &str, retention: &Retention) -> Result<()> {
        check_object_name(name)?;
        versions::retain(&self.core, name, retention)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        check_object_name(name)?;
        Ok(Box::new(S3Reader::open(Arc::clone(&self.core), name)?))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        check_prefix(prefix)?;
        let core = &self.core;
        core.list_keys(&core.key(prefix), &mut |object| {
            let Some(name) = core.name(&object.key) else { return Ok(()) };
            let modified = xml::time(&object.last_modified).ok_or_else(|| {
                let text = format!("{:?} is no time", object.last_modified);
                RepoError::io(
                    format!("list {prefix} in {}", core.location),
                    std::io::Error::new(std::io::ErrorKind::InvalidData, text),
                )
            })?;
            visit(ObjectEntry { name: name.to_owned(), length_bytes: object.size, modified })
        })
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_object_name(name)?;
        versions::remove(&self.core, name)
    }

    fn remove_unfinished(&self) -> Result<u64> {
        let core = &self.core;
        let what = "list unfinished uploads";
        let mut markers: Option<(String, String)> = None;
        loop {
            let mut request =
                Request::new(Method::GET, "").query("uploads", "").query("prefix", &*core.prefix);
            if let Some((key, upload)) = &markers {
                request = request.query("key-marker", key).query("upload-id-marker", upload);
            }
            let answer = match core.try_send(&request)? {
                Ok(answer) => answer,
                // What cannot be seen stays until a rule of the bucket removes it.
                Err(failure) if failure.is_denied() || failure.is_unknown() => return Ok(0),
                Err(failure) => return Err(core.error(failure, what)),
            };
            let page: xml::UploadPage = xml::parse(what, &answer.body)?;
            let limit = Timestamp::now() - ABANDONED;
            for upload in page.uploads {
                let old = xml::time(&upload.initiated).is_some_and(|begun| begun < limit);
                if old && core.name(&upload.key).is_some() {
                    crate::upload::abort(core, &upload.key, &upload.upload_id);
                }
            }
            let next = page.next_key_marker.zip(page.next_upload_id_marker);
            if !page.is_truncated || next.is_none() || next == markers {
                // How long the parts were, S3 does not say here.
                return Ok(0);
            }
            markers = next;
        }
    }

    fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.write(content)?;
        writer.finish()
    }
}

impl Core {
    /// Whether to ask that nothing is replaced.
    pub(crate) fn is_conditional(&self) -> bool {
        self.conditional.load(Ordering::Relaxed)
    }

    /// Content of a small request of its own.
    pub(crate) fn document(text: &str) -> Content {
        Content::of(text.as_bytes(), true)
    }
}
