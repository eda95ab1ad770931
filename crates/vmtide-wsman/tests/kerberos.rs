//! Kerberos with a real KDC (MIT), against the stand-in, whose acceptor is MIT's library.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

#[path = "support/realm.rs"]
mod realm;
#[path = "support/relay.rs"]
mod relay;
mod support;
#[path = "support/warned.rs"]
mod warned;

use realm::{REALM, Realm};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use support::{PASSWORD, options, server, tls_options, trusting};
use vmtide_cim::{Cim, CimError, VIRTUALIZATION_NAMESPACE as NS};
use vmtide_wsman::{Authentication, WsmanCim, WsmanOptions};
use warned::warnings;
use wsman_server::{Kerberos, Server, ServerOptions};

const ALL: &str = "SELECT * FROM Sample_Disk";

fn accepting(realm: &Realm, options: ServerOptions) -> ServerOptions {
    ServerOptions {
        kerberos: Some(Kerberos {
            python: "/usr/bin/python3".into(),
            keytab: realm.keytab(),
            config: Some(realm.config()),
            without_rights: vec![format!("guest@{REALM}")],
        }),
        ..options
    }
}

/// As `user` of the realm.
fn as_user(server: &Server, realm: &Realm, user: &str, password: &str) -> WsmanOptions {
    WsmanOptions {
        host: "localhost".into(),
        authentication: Authentication::Kerberos,
        kdc: Some(realm.address.clone()),
        ..options(server, &format!("{user}@lab.example"), password)
    }
}

fn ask(options: WsmanOptions) -> Result<usize, CimError> {
    WsmanCim::new(options).unwrap().query(NS, ALL).map(|found| found.len())
}

#[test]
fn messages_are_sealed_by_the_tickets_key() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "");
    let (server, world) =
        server(accepting(&realm, ServerOptions { ntlm: false, ..ServerOptions::default() }), 60);
    let client = WsmanCim::new(as_user(&server, &realm, "admin", PASSWORD)).unwrap();
    for _ in 0..3 {
        let found = client.query(NS, ALL).map(|found| found.len());
        assert!(matches!(found, Ok(60)), "{found:?}: {:?}", server.log().last());
    }
    let service = vmtide_cim::ObjectPath::new(
        "Sample_Service",
        &[("CreationClassName", "Sample_Service"), ("Name", "sample")],
    );
    client.invoke(&service, "Count", &[]).unwrap();
    assert_eq!(world.calls(), 1);
    let log = server.log();
    assert!(log.iter().all(|seen| seen.connection == 1));
    let asked: Vec<_> = log
        .iter()
        .filter(|seen| {
            seen.operation.is_some_and(|operation| operation != wsman_server::Operation::Login)
        })
        .collect();
    assert!(!asked.is_empty() && asked.iter().all(|seen| seen.sealed), "{log:?}");
    assert!(
        asked.iter().all(|seen| seen
            .user
            .as_ref()
            .is_some_and(|(user, _)| user == &format!("admin@{REALM}"))),
        "{log:?}"
    );
}

#[test]
fn tickets_log_in_over_tls() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "");
    let (server, _) = server(accepting(&realm, ServerOptions { ntlm: false, ..tls_options() }), 30);
    let (options, _file) = trusting(&server, as_user(&server, &realm, "admin", PASSWORD));
    let outcome = ask(options);
    assert!(matches!(outcome, Ok(30)), "{outcome:?}: {:?}", server.log());
    assert!(server.log().iter().all(|seen| !seen.sealed));
}

#[test]
fn the_domain_refuses_in_its_own_words() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "");
    realm.user("guest", PASSWORD, "");
    realm.user("gone", PASSWORD, "-expire 2020-01-01");
    realm.user("stale", PASSWORD, "-pwexpire 2020-01-01");
    let (server, _) = server(accepting(&realm, ServerOptions::default()), 1);
    let login = |user: &str, password: &str| match ask(as_user(&server, &realm, user, password)) {
        Err(CimError::Login { detail, .. }) => detail,
        other => panic!("{user}: {other:?}"),
    };
    assert_eq!(login("admin", "Guess-1"), "wrong password");
    assert!(login("nobody", PASSWORD).contains("refused the user"));
    assert!(login("gone", PASSWORD).contains("expired"));
    assert!(login("stale", PASSWORD).contains("expired"));
    let denied = ask(as_user(&server, &realm, "guest", PASSWORD)).unwrap_err();
    assert!(matches!(denied, CimError::Denied { .. }), "{denied}");
    realm.forget_service("HTTP");
    assert!(login("admin", PASSWORD).contains("does not know HTTP/localhost"));
}

#[test]
fn without_the_domain_there_is_ntlm_or_nothing() {
    let realm = Realm::start();
    // NTLM hands a name with its domain on as it is.
    let users = vec![wsman_server::User::new("admin@lab.example", PASSWORD)];
    let (server, _) =
        server(accepting(&realm, ServerOptions { users, ..ServerOptions::default() }), 1);
    let dead = Some("127.0.0.1:1".to_owned());
    let kerberos = WsmanOptions { kdc: dead, ..as_user(&server, &realm, "admin", PASSWORD) };
    let error = ask(kerberos.clone()).unwrap_err();
    assert!(
        matches!(&error, CimError::Unreachable { detail, .. } if detail.contains("VMTIDE_WINRM_KDC")),
        "{error}"
    );
    let either = WsmanOptions { authentication: Authentication::Negotiate, ..kerberos };
    let client = WsmanCim::new(either).unwrap();
    let ((), warned) = warnings(|| {
        for _ in 0..2 {
            assert_eq!(client.query(NS, ALL).unwrap().len(), 1);
            server.cut_connections();
        }
    });
    // Whoever answers for the domain can bring this about: it is told, and once is enough.
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(warned[0].contains("NTLM is used instead of Kerberos"), "{warned:?}");
    let user = server.log().into_iter().find_map(|seen| seen.user);
    assert!(user.is_some(), "{:?}", server.log());
}

/// Somebody between us and the host, who cannot prove to be it, does not get by an empty answer what leads to NTLM.
#[test]
fn an_answer_without_a_proof_does_not_lead_to_ntlm() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "");
    // For its options alone.
    let (server, _) = server(ServerOptions::default(), 1);
    // Nothing at all, SPNEGO without a token, SPNEGO that says that all is well, and a token of no bytes.
    for answer in ["", "Negotiate oQA=", "Negotiate oQcwBaADCgEA", "Negotiate oQYwBKICBAA="] {
        let (port, said) = nobody(answer);
        let negotiate = WsmanOptions {
            port: Some(port),
            authentication: Authentication::Negotiate,
            ..as_user(&server, &realm, "admin", PASSWORD)
        };
        let error = ask(negotiate).unwrap_err();
        assert!(matches!(error, CimError::Protocol { .. }), "{answer:?}: {error}");
        assert!(error.to_string().contains("prove"), "{answer:?}: {error}");
        let said = said.lock().unwrap().clone();
        // A ticket was shown. "NTLMSSP" in base64 begins so.
        assert!(said.contains("Negotiate YI"), "{answer:?}: {said}");
        assert!(!said.contains("TlRMTVNTU"), "{answer:?}: {said}");
    }
}

/// Somebody who answers whatever comes with 200 and this token. Its port, and what was said to it.
fn nobody(token: &'static str) -> (u16, Arc<Mutex<String>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let said = Arc::new(Mutex::new(String::new()));
    let heard = said.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, heard) = (stream.unwrap(), heard.clone());
            std::thread::spawn(move || {
                let mut buffer = [0; 64 << 10];
                let mut request = String::new();
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    heard.lock().unwrap().push_str(&text);
                    request.push_str(&text);
                    // Requests of a login have no body.
                    if request.ends_with("\r\n\r\n") {
                        request.clear();
                        let answer = match token {
                            "" => String::new(),
                            token => format!("WWW-Authenticate: {token}\r\n"),
                        };
                        let answer =
                            format!("HTTP/1.1 200 OK\r\n{answer}Content-Length: 0\r\n\r\n");
                        drop(stream.write_all(answer.as_bytes()));
                    }
                }
            });
        }
    });
    (port, said)
}

#[test]
fn tickets_that_expire_are_got_anew() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "-maxlife 2sec");
    let (server, _) = server(accepting(&realm, ServerOptions::default()), 1);
    let client = WsmanCim::new(as_user(&server, &realm, "admin", PASSWORD)).unwrap();
    assert_eq!(client.query(NS, ALL).unwrap().len(), 1);
    // Longer than the ticket and the difference of clocks that is let pass.
    std::thread::sleep(std::time::Duration::from_secs(8));
    server.cut_connections();
    assert_eq!(client.query(NS, ALL).unwrap().len(), 1);
}

#[test]
fn a_ticket_that_expires_on_the_way_is_named() {
    let realm = Realm::start();
    realm.user("admin", PASSWORD, "-maxlife 2sec");
    let (server, _) = server(accepting(&realm, ServerOptions::default()), 1);
    // The ticket is in the first request; it lives for 2 s, and clocks may differ by 5.
    let port = relay::start(server.address().port(), 0, std::time::Duration::from_secs(10));
    let slow = WsmanOptions { port: Some(port), ..as_user(&server, &realm, "admin", PASSWORD) };
    let error = ask(slow).unwrap_err();
    assert!(
        matches!(&error, CimError::Login { detail, .. } if detail.contains("ticket") && detail.contains("expired")),
        "{error}"
    );
}
