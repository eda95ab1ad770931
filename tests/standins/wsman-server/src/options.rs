//! How a server is set up.

use std::path::PathBuf;

/// A user that may log in.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// The name without a domain; compared without regard to case.
    pub name: String,
    /// The password.
    pub password: String,
    /// Whether the user may use the service; without it every operation is answered with "access denied", as for a
    /// user who is in none of the groups.
    pub allowed: bool,
    /// Whether the user may see Hyper-V's namespace, as who is in the group Hyper-V Administrators.
    pub hyper_v: bool,
}

impl User {
    /// A user who may do everything.
    pub fn new(name: &str, password: &str) -> Self {
        Self { name: name.into(), password: password.into(), allowed: true, hyper_v: true }
    }

    /// A user who is known and has no rights.
    pub fn without_rights(name: &str, password: &str) -> Self {
        Self { allowed: false, ..Self::new(name, password) }
    }

    /// A user who is in the group Remote Management Users and in no other.
    pub fn without_hyper_v(name: &str, password: &str) -> Self {
        Self { hyper_v: false, ..Self::new(name, password) }
    }
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User")
            .field("name", &self.name)
            .field("allowed", &self.allowed)
            .field("hyper_v", &self.hyper_v)
            .finish_non_exhaustive()
    }
}

/// How strictly a login over TLS is tied to the connection (`CbtHardeningLevel`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Bindings are not looked at.
    None,
    /// Bindings that are sent must be right: a host's default.
    #[default]
    Relaxed,
    /// Bindings must be sent and right.
    Strict,
}

/// Kerberos at the server's side: MIT's library in a process of Python with `python3-gssapi`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kerberos {
    /// The interpreter that has the module `gssapi`, e.g. `/usr/bin/python3`.
    pub python: PathBuf,
    /// The keytab with the service's key (`HTTP/host@REALM`).
    pub keytab: PathBuf,
    /// `krb5.conf` of the realm; none for the system's.
    pub config: Option<PathBuf>,
    /// Names of principals that have no rights; all others that the realm knows have them.
    pub without_rights: Vec<String>,
}

/// How a server is set up. The defaults are those of a host after `winrm quickconfig`, but for the port.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: String,
    /// Names and addresses in the server's certificate; none speaks plain HTTP.
    pub tls_names: Option<Vec<String>>,
    /// Whether the server's certificate is signed with SHA-384 instead of SHA-256, which changes how logins are bound to
    /// it (RFC 5929 4.1).
    pub tls_sha384: bool,
    /// Whether Basic is offered. It is taken over plain HTTP only with `allow_unencrypted`.
    pub basic: bool,
    /// Whether Negotiate with NTLM is offered.
    pub ntlm: bool,
    /// Kerberos, by Negotiate and by its own scheme; none does not offer it.
    pub kerberos: Option<Kerberos>,
    /// Whether a client's certificate made by [`Server::client_certificate`](crate::Server::client_certificate) logs its
    /// user in.
    pub certificates: bool,
    /// Whether messages over plain HTTP need not be sealed (`AllowUnencrypted`).
    pub allow_unencrypted: bool,
    /// How logins are tied to TLS.
    pub channel_binding: ChannelBinding,
    /// Who may log in, but for Kerberos.
    pub users: Vec<User>,
    /// The host's own name, in NTLM's challenge and in faults.
    pub machine: String,
    /// The largest envelope in bytes (`MaxEnvelopeSizekb`), of requests and of answers.
    pub max_envelope_bytes: usize,
    /// Whether `w:ResourceURI` must be marked with `s:mustUnderstand`. Real hosts do not insist: pywinrm leaves it out.
    pub require_must_understand: bool,
    /// Whether associations can be asked for. Real hosts fault on many of them.
    pub associations: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            tls_names: None,
            tls_sha384: false,
            basic: false,
            ntlm: true,
            kerberos: None,
            certificates: false,
            allow_unencrypted: false,
            channel_binding: ChannelBinding::Relaxed,
            users: vec![User::new("admin", "P4ssw0rd!")],
            machine: "STANDIN".into(),
            max_envelope_bytes: 500 * 1024,
            require_must_understand: true,
            associations: true,
        }
    }
}
