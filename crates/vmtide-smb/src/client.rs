//! Logins that are kept: one connection to each server, made anew when it broke.

use crate::auth::Method;
use crate::crypto::Encryption;
use crate::error::{Result, SmbError};
use crate::link::Traffic;
use crate::path::SharePath;
use crate::patience::Patience;
use crate::requests::{Listed, Opened, Purpose};
use crate::session::{Session, SmbOptions};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// A server's connection, and what earlier ones of it carried.
#[derive(Default)]
struct Server {
    session: Option<Arc<Session>>,
    earlier: Traffic,
    /// Whether it was told that NTLM is used in the place of Kerberos: once is enough.
    has_warned: bool,
}

/// How a server was reached.
pub(crate) struct ServerLink {
    pub(crate) server: String,
    /// The cipher; none where messages are signed only.
    pub(crate) encryption: Option<&'static str>,
    /// What proved the user.
    pub(crate) login: &'static str,
    /// Why NTLM did although Kerberos was tried.
    pub(crate) fallback: Option<String>,
}

/// Files on servers over SMB. May be shared by threads; calls block.
pub struct SmbClient {
    options: SmbOptions,
    servers: Mutex<HashMap<String, Arc<Mutex<Server>>>>,
}

impl SmbClient {
    /// A client that logs in at servers when they are first needed.
    pub fn new(options: SmbOptions) -> Self {
        Self { options, servers: Mutex::default() }
    }

    /// Its options.
    pub const fn options(&self) -> &SmbOptions {
        &self.options
    }

    /// The connection to a server; a new one where there is none or it broke. One whose ticket has expired goes on with
    /// a new ticket.
    pub(crate) fn session(&self, server: &str) -> Result<Arc<Session>> {
        let slot = self.servers.lock().entry(server.to_lowercase()).or_default().clone();
        // Who else wants this server waits for the login; others do not.
        let mut slot = slot.lock();
        if let Some(session) = &slot.session {
            if !session.link.is_broken() && session.link.is_expired() {
                self.renew(session, server);
            }
            if !session.link.is_broken() {
                return Ok(session.clone());
            }
            let ended = session.traffic();
            slot.earlier.received_bytes += ended.received_bytes;
            slot.earlier.sent_bytes += ended.sent_bytes;
            slot.session = None;
        }
        let session = Arc::new(Session::connect(&self.options, server)?);
        if let Some(why) = session.fallback.as_ref().filter(|_| !slot.has_warned) {
            slot.has_warned = true;
            tracing::warn!(
                %server,
                "SMB: NTLM is used instead of Kerberos ({why}); --winrm-auth kerberos takes nothing weaker"
            );
        }
        slot.session = Some(session.clone());
        Ok(session)
    }

    /// Renews a session or ends it. Where only the domain's server does not answer it is asked again for a while: this one
    /// keeps all that is open, and what was written to it.
    fn renew(&self, session: &Session, server: &str) {
        let mut patience = Patience::new(self.options.reconnect_for / 2);
        while let Err(error) = session.renew(&self.options) {
            let may_do = matches!(error, SmbError::Unreachable { .. });
            if may_do && !session.link.is_broken() && patience.pause() {
                tracing::debug!(%server, %error, "a new ticket for the SMB session is asked for again");
                continue;
            }
            tracing::debug!(%server, %error, "the SMB session cannot go on");
            session.link.end("its Kerberos ticket has expired, and no other was taken");
            return;
        }
    }

    /// How a server was reached, which is logged in at where it was not.
    ///
    /// # Errors
    /// Those of a login.
    pub(crate) fn link(&self, server: &str) -> Result<ServerLink> {
        let session = self.session(server)?;
        Ok(ServerLink {
            server: server.to_owned(),
            encryption: session.negotiated.encryption.map(Encryption::name),
            login: if session.method == Method::Kerberos { "Kerberos" } else { "NTLM" },
            fallback: session.fallback.clone(),
        })
    }

    /// The servers that are connected, in their names' order.
    pub(crate) fn connected(&self) -> Vec<String> {
        // A login that is under way is not waited for with all servers held.
        let servers: Vec<_> =
            self.servers.lock().iter().map(|(name, slot)| (name.clone(), slot.clone())).collect();
        let connected = servers.into_iter().filter(|(_, slot)| slot.lock().session.is_some());
        let mut names: Vec<_> = connected.map(|(name, _)| name).collect();
        names.sort();
        names
    }

    /// How many bytes went over all connections so far.
    pub fn traffic(&self) -> Traffic {
        let servers: Vec<_> = self.servers.lock().values().cloned().collect();
        let mut sum = Traffic::default();
        for server in servers {
            let server = server.lock();
            let now = server.session.as_ref().map(|session| session.traffic()).unwrap_or_default();
            sum.received_bytes += server.earlier.received_bytes + now.received_bytes;
            sum.sent_bytes += server.earlier.sent_bytes + now.sent_bytes;
        }
        sum
    }

    /// Opens or makes `path` over the connection to its server: the session, the share's id there, the file's.
    pub(crate) fn open(
        &self,
        path: &SharePath,
        purpose: Purpose,
    ) -> Result<(Arc<Session>, u32, Opened)> {
        let session = self.session(&path.server)?;
        let renewals = session.link.renewals();
        match session.open(path, purpose) {
            // What is refused because the ticket has expired was not done, whatever it is.
            Err(_) if session.link.has_expired_since(renewals) => {
                let session = self.session(&path.server)?;
                let (tree, opened) = session.open(path, purpose)?;
                Ok((session, tree, opened))
            }
            outcome => outcome.map(|(tree, opened)| (session, tree, opened)),
        }
    }

    /// Opens `path` for the moment of `work`, and closes it.
    pub(crate) fn with_open<T>(
        &self,
        path: &SharePath,
        purpose: Purpose,
        work: impl Fn(&Session, u32, [u8; 16], u64) -> Result<T>,
    ) -> Result<T> {
        let what = path.to_string();
        let attempt = || {
            let (session, tree, opened) = self.open(path, purpose)?;
            let done = work(&session, tree, opened.id, opened.size_bytes);
            let closed = session.close(tree, opened.id, &what);
            let done = done?;
            closed.map(|()| done)
        };
        match attempt() {
            // Servers end idle connections; the next call finds out.
            Err(error) if error.is_connection_lost() && is_repeatable(purpose) => attempt(),
            other => other,
        }
    }

    pub(crate) fn list(&self, path: &SharePath) -> Result<Vec<Listed>> {
        let what = path.to_string();
        self.with_open(path, Purpose::Directory, |session, tree, id, _| {
            session.list(tree, id, &what)
        })
    }
}

/// Whether doing it twice is as doing it once.
const fn is_repeatable(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Read | Purpose::Directory | Purpose::CreateDirectory)
}

#[cfg(test)]
mod tests;
