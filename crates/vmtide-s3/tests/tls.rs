//! HTTPS: an authority of one's own is trusted where it is given, and not otherwise.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test: what fails here fails the test")]

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use vmtide_repo::{ObjectStore, RepoError};
use vmtide_s3::{S3Options, S3Store, StaticCredentials};

/// Answers one request with "there is no such object".
fn answer(stream: TcpStream, config: &Arc<ServerConfig>) -> std::io::Result<()> {
    let connection = ServerConnection::new(Arc::clone(config)).map_err(std::io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    let mut line = String::new();
    while stream.read_line(&mut line)? > 2 {
        line.clear();
    }
    let xml = "<Error><Code>NoSuchKey</Code></Error>";
    let head = "HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length";
    write!(stream.get_mut(), "{head}: {}\r\n\r\n{xml}", xml.len())?;
    stream.get_mut().conn.send_close_notify();
    stream.get_mut().flush()
}

#[test]
fn an_authority_of_ones_own_is_trusted_where_it_is_given() {
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, key.cert.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls_pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that does not trust us hangs up.
            let _ = answer(stream, &config);
        }
    });
    let open = |ca_file: Option<&std::path::Path>| {
        let mut options = S3Options::parse("s3://bucket/x").unwrap();
        options.endpoint = Some(format!("https://localhost:{port}"));
        options.ca_file = ca_file.map(Into::into);
        options.credentials = Some(StaticCredentials {
            key_id: "AKIA".into(),
            secret_key: "secret".to_owned().into(),
            token: None,
        });
        S3Store::connect(&options)?.open("points/p").map(drop)
    };
    let missing = open(Some(&ca_file)).unwrap_err();
    assert!(matches!(missing, RepoError::NotFound { .. }), "{missing}");
    let refused = open(None).unwrap_err();
    assert!(refused.to_string().contains("certificate"), "{refused}");
    std::fs::write(&ca_file, "nothing").unwrap();
    let empty = open(Some(&ca_file)).unwrap_err();
    assert!(empty.to_string().contains("no certificate in it"), "{empty}");
}
