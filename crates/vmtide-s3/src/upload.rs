//! Sending objects: one PUT, or parts that are on their way beside the writer's work.

use crate::answer::Answer;
use crate::client::Request;
use crate::failure::Failure;
use crate::spool::Content;
use crate::store::Core;
use crate::xml;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::JoinHandle;
use vmtide_repo::{RepoError, Result, Retention};

/// The header with a random number of the writer. It stays with the object, so that a writer whose
/// answer was lost, and that is told on its second try that the name is taken, finds itself.
pub(crate) const WRITE_ID: &str = "x-amz-meta-vmtide-write";

/// The most parts of an object (S3's limit).
const MAX_PARTS: usize = 10_000;

/// What an object is sent with.
pub(crate) struct Object {
    pub(crate) core: Arc<Core>,
    pub(crate) name: String,
    pub(crate) key: String,
    pub(crate) retention: Option<Retention>,
    pub(crate) write_id: String,
}

impl Object {
    fn what(&self) -> String {
        format!("write {}", self.name)
    }

    fn error(&self, failure: Failure) -> RepoError {
        self.core.error(failure, &self.what())
    }

    /// Sends an object whole.
    pub(crate) fn put(&self, content: &Content) -> Result<()> {
        self.conditionally(|conditional| {
            let request = Request::new(Method::PUT, &self.key).content(content.clone());
            let mut request =
                self.core.object_headers(request, self.retention.as_ref(), &self.write_id);
            if let Some(md5) = content.md5 {
                request = request.header("content-md5", &BASE64_STANDARD.encode(md5));
            }
            if conditional { request.header("if-none-match", "*") } else { request }
        })
    }

    /// Makes the request that lets an object appear, without replacing another where the server can
    /// do that.
    fn conditionally(&self, request: impl Fn(bool) -> Request) -> Result<()> {
        let conditional = self.core.is_conditional();
        match self.core.try_send(&request(conditional))? {
            Ok(_) => Ok(()),
            Err(failure) if conditional && failure.is_unknown() => {
                // Names are unique: it is safe without, too.
                self.core.conditional.store(false, Ordering::Relaxed);
                tracing::debug!("the server has no conditional writes");
                self.core.try_send(&request(false))?.map(drop).map_err(|error| self.error(error))
            }
            Err(failure)
                if failure.is(412, "PreconditionFailed") || failure.is(404, "NoSuchUpload") =>
            {
                self.taken(failure)
            }
            Err(failure) => Err(self.error(failure)),
        }
    }

    /// The name is taken: by this very writer, whose answer was lost, or by another.
    fn taken(&self, failure: Failure) -> Result<()> {
        match self.core.try_send(&Request::new(Method::HEAD, &self.key))? {
            Ok(answer) if answer.header(WRITE_ID) == Some(self.write_id.as_str()) => Ok(()),
            Ok(_) => Err(RepoError::AlreadyExists {
                what: format!("{} in {}", self.name, self.core.location()),
                hint: String::new(),
            }),
            Err(_) => Err(self.error(failure)),
        }
    }
}

/// An object being sent in parts.
pub(crate) struct Upload {
    object: Arc<Object>,
    id: String,
    parts: Vec<JoinHandle<Result<Answer, Failure>>>,
    failed: Arc<AtomicBool>,
    ended: bool,
}

impl Upload {
    /// Begins it.
    ///
    /// # Errors
    /// `Denied`, `Io`.
    pub(crate) fn begin(object: Arc<Object>) -> Result<Self> {
        let core = &object.core;
        let request = Request::new(Method::POST, &object.key).query("uploads", "");
        let request = core.object_headers(request, object.retention.as_ref(), &object.write_id);
        let answer = core.send(&request, &object.what())?;
        let begun: xml::UploadBegun = xml::parse(&object.what(), &answer.body)?;
        Ok(Self {
            object,
            id: begun.upload_id,
            parts: Vec::new(),
            failed: Arc::default(),
            ended: false,
        })
    }

    /// Sends the next part beside, once fewer than the most are on their way.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for too many parts. Failures of parts come to light in
    /// [`finish`](Self::finish), at the latest.
    pub(crate) fn send(&mut self, content: Content) -> Result<()> {
        if self.parts.len() >= MAX_PARTS {
            return Err(RepoError::Invalid(format!(
                "{} would have more than {MAX_PARTS} parts",
                self.object.name
            )));
        }
        if self.failed.load(Ordering::Relaxed) {
            return self.wait().map(drop);
        }
        let core = Arc::clone(&self.object.core);
        let number = self.parts.len() + 1;
        let request = Request::new(Method::PUT, &self.object.key)
            .query("partNumber", number.to_string())
            .query("uploadId", self.id.clone())
            .content(content);
        let permit = core.run(Arc::clone(&core.parts).acquire_owned())?;
        let failed = Arc::clone(&self.failed);
        let sender = Arc::clone(&core);
        self.parts.push(core.spawn(async move {
            let outcome = sender.client.send(&request).await;
            failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
            drop((request, permit));
            outcome
        })?);
        Ok(())
    }

    /// Waits for all parts. Answers with their tags.
    fn wait(&mut self) -> Result<Vec<String>> {
        let core = Arc::clone(&self.object.core);
        let mut tags = Vec::with_capacity(self.parts.len());
        for part in std::mem::take(&mut self.parts) {
            let answer = core
                .run(part)?
                .map_err(|error| RepoError::Invalid(format!("send a part: {error}")))?
                .map_err(|failure| self.object.error(failure))?;
            tags.push(answer.header("etag").unwrap_or_default().to_owned());
        }
        Ok(tags)
    }

    /// Makes the object of the parts.
    ///
    /// # Errors
    /// [`RepoError::AlreadyExists`], `Denied`, `Io`.
    pub(crate) fn finish(mut self) -> Result<()> {
        let tags = self.wait()?;
        let content = Content::of(xml::complete_upload(&tags).as_bytes(), false);
        self.object.conditionally(|conditional| {
            let request = Request::new(Method::POST, &self.object.key)
                .query("uploadId", self.id.clone())
                .header("content-type", "application/xml")
                .content(content.clone())
                .error_in_body();
            if conditional { request.header("if-none-match", "*") } else { request }
        })?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.ended {
            self.parts.drain(..).for_each(|part| part.abort());
            abort(&self.object.core, &self.object.key, &self.id);
        }
    }
}

/// Gives up an upload. What stays of it where that fails, a rule of the bucket or `prune` removes.
pub(crate) fn abort(core: &Core, key: &str, id: &str) {
    let request = Request::new(Method::DELETE, key).query("uploadId", id);
    let limit = std::time::Duration::from_secs(10);
    let sent = core.run(async { tokio::time::timeout(limit, core.client.send(&request)).await });
    if !matches!(sent, Ok(Ok(Ok(_)))) {
        tracing::debug!(key, "an unfinished upload could not be aborted");
    }
}
