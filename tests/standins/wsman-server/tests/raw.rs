//! Requests as no client makes them: the server answers or ends the connection, and goes on.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use wsman_server::{Server, ServerOptions, sample};

fn server() -> Server {
    // Basic over plain HTTP and unsealed messages make requests readable here.
    let options =
        ServerOptions { basic: true, allow_unencrypted: true, ..ServerOptions::default() };
    Server::start(options, sample::World::new(3), Arc::new(sample::schema())).unwrap()
}

/// What comes back until the server ends the connection or has nothing more to say.
fn talk(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    // A connection that is reset was ended too.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// `admin:P4ssw0rd!` as Basic writes it.
const LOGIN: &str = "Authorization: Basic YWRtaW46UDRzc3cwcmQh\r\n";
const SOAP: &str = "Content-Type: application/soap+xml;charset=UTF-8\r\n";
const IDENTIFY: &str = "<s:Envelope xmlns:s=\"http://www.w3.org/2003/05/soap-envelope\" xmlns:i=\"http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd\"><s:Header/><s:Body><i:Identify/></s:Body></s:Envelope>";

fn post(headers: &str, body: &str) -> String {
    format!(
        "POST /wsman HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn what_is_no_request_is_answered_or_ended() {
    let server = server();
    let cases: [(String, &str); 9] = [
        ("GET /wsman HTTP/1.1\r\n\r\n".into(), "HTTP/1.1 405 "),
        ("POST /other HTTP/1.1\r\n\r\n".into(), "HTTP/1.1 404 "),
        (post("", IDENTIFY), "HTTP/1.1 401 "),
        (post(&format!("{LOGIN}Content-Type: text/plain\r\n"), IDENTIFY), "HTTP/1.1 415 "),
        (
            post(
                &format!("{LOGIN}Content-Type: application/soap+xml;charset=latin1\r\n"),
                IDENTIFY,
            ),
            "HTTP/1.1 415 ",
        ),
        (post(&format!("{LOGIN}{SOAP}"), IDENTIFY), "HTTP/1.1 200 "),
        (post(&format!("{LOGIN}{SOAP}"), "<x"), "HTTP/1.1 500 "),
        ("nonsense\r\n\r\n".into(), ""),
        (format!("POST /wsman HTTP/1.1\r\n{LOGIN}Content-Length: 99999999999\r\n\r\n"), ""),
    ];
    for (request, wanted) in cases {
        let answer = talk(&server, request.as_bytes());
        let good = if wanted.is_empty() { answer.is_empty() } else { answer.starts_with(wanted) };
        assert!(good, "{request}\n\n{answer}");
    }
}

#[test]
fn requests_in_pieces_and_in_a_row_are_understood() {
    let server = server();
    let chunked = format!(
        "POST /wsman?PSVersion=5 HTTP/1.1\r\n{LOGIN}{SOAP}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n10\r\n{}\r\n{:x};x=y\r\n{}\r\n0\r\n\r\n",
        &IDENTIFY[..16],
        IDENTIFY.len() - 16,
        &IDENTIFY[16..]
    );
    let plain = post(&format!("{LOGIN}{SOAP}"), IDENTIFY);
    let answer = talk(&server, format!("{chunked}{plain}").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(answer.matches("IdentifyResponse>").count(), 2, "{answer}");
}

#[test]
fn connections_that_end_anywhere_hurt_nobody() {
    let server = server();
    let request = post(&format!("{LOGIN}{SOAP}"), IDENTIFY);
    for cut in (0..request.len()).step_by(7) {
        talk(&server, &request.as_bytes()[..cut]);
    }
    assert!(talk(&server, request.as_bytes()).starts_with("HTTP/1.1 200 "));
}

#[test]
fn envelopes_that_are_sealed_without_a_login_that_can_are_refused() {
    let server = server();
    let sealed = "Content-Type: multipart/encrypted;protocol=\"application/HTTP-SPNEGO-session-encrypted\";boundary=\"Encrypted Boundary\"\r\n";
    let answer = talk(&server, post(&format!("{LOGIN}{sealed}"), IDENTIFY).as_bytes());
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}
