//! A stand-in for WinRM and clients of it. The stand-in shares no code with the client: NTLM, sealing, SPNEGO and XML
//! are written there from the documents, and its NTLM and Kerberos are tried with Python's clients as well.

#![allow(dead_code, reason = "every test uses a part of it")]

use std::sync::Arc;
use vmtide_wsman::{Authentication, Credentials, Scheme, WsmanCim, WsmanOptions};
use wsman_server::sample::{self, World};
use wsman_server::{Server, ServerOptions};

pub const PASSWORD: &str = "P4ssw0rd!";

/// A server in front of the sample world.
pub fn server(options: ServerOptions, disks: usize) -> (Server, Arc<World>) {
    let world = World::new(disks);
    let server = Server::start(options, world.clone(), Arc::new(sample::schema())).unwrap();
    (server, world)
}

/// A server with TLS, for the names that tests use.
pub fn tls_options() -> ServerOptions {
    let names = ["127.0.0.1", "localhost"].map(str::to_owned);
    ServerOptions { tls_names: Some(names.to_vec()), ..ServerOptions::default() }
}

/// How a client reaches the server as `user`.
pub fn options(server: &Server, user: &str, password: &str) -> WsmanOptions {
    let scheme = if server.url().starts_with("https") { Scheme::Https } else { Scheme::Http };
    WsmanOptions {
        port: Some(server.address().port()),
        scheme,
        authentication: Authentication::Ntlm,
        credentials: Some(Credentials::new(user, password.to_owned().into()).unwrap()),
        ..WsmanOptions::new("127.0.0.1")
    }
}

/// The server's user with all rights, by NTLM.
pub fn client(server: &Server) -> WsmanCim {
    WsmanCim::new(options(server, "admin", PASSWORD)).unwrap()
}

/// The options with trust in the server's authority; the file must live as long as the options are used.
pub fn trusting(server: &Server, options: WsmanOptions) -> (WsmanOptions, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), server.authority_pem().unwrap()).unwrap();
    (WsmanOptions { ca_file: Some(file.path().to_owned()), ..options }, file)
}
