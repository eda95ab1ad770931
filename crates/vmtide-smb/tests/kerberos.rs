//! Kerberos over SMB: tickets of a real KDC (MIT) at a real Samba, whose acceptor is Heimdal's.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

#[path = "../../vmtide-wsman/tests/support/realm.rs"]
mod realm;
#[path = "../../vmtide-wsman/tests/support/relay.rs"]
mod relay;
mod support;
#[path = "../../vmtide-wsman/tests/support/warned.rs"]
mod warned;

use realm::{REALM, Realm};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{PASSWORD, Samba, pattern};
use vmtide_block::{BlockDevice, WritableBlockDevice};
use vmtide_smb::{
    Login, Method, PathMap, Protection, SharePath, SmbClient, SmbError, SmbFile, SmbOptions,
};
use warned::warnings;
use zeroize::Zeroizing;

/// Longer than the shortest ticket here lives, with the difference of clocks that the realm lets pass (5 s).
const UNTIL_EXPIRED: Duration = Duration::from_secs(10);

/// The password in the realm where that of the account at Samba must not do.
const IN_REALM: &str = "Realm!2026";

fn samba(realm: &Realm) -> Samba {
    Samba::with_tickets(REALM, &realm.keytab(), &realm.config())
}

/// Samba's account, as a user of the realm.
fn options(samba: &Samba, realm: &Realm, method: Method, password: &str) -> SmbOptions {
    let login = Login {
        user: format!(r"lab.example\{}", samba.user()),
        password: Zeroizing::new(password.into()),
        method,
        kdc: Some(realm.address.clone()),
    };
    SmbOptions { port: samba.port, ..SmbOptions::new(login) }
}

fn open(options: SmbOptions) -> Result<SmbFile, SmbError> {
    SmbFile::open(&Arc::new(SmbClient::new(options)), &place("x"))
}

fn place(name: &str) -> SharePath {
    let mut map = PathMap::new("localhost");
    map.mappings.push(r"C:\VMs=\\localhost\vms".parse().unwrap());
    map.locate(&format!(r"C:\VMs\{name}")).unwrap()
}

fn read_all(file: &SmbFile) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.size_bytes()).unwrap()];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn tickets_log_in_and_their_key_protects() {
    let realm = Realm::start();
    let samba = samba(&realm);
    // By NTLM this password would be wrong.
    realm.user(samba.user(), IN_REALM, "");
    let content = pattern(1, 3 << 20);
    std::fs::write(samba.path("vms/x"), &content).unwrap();
    for method in [Method::Kerberos, Method::Negotiate] {
        for protection in [Protection::Encrypted, Protection::Signed] {
            let options = options(&samba, &realm, method, IN_REALM);
            let (file, warned) = warnings(|| open(SmbOptions { protection, ..options }));
            let file = file.unwrap_or_else(|error| panic!("{error}\n{}", samba.log()));
            assert!(read_all(&file) == content, "{method:?} {protection:?}");
            assert_eq!(warned, [""; 0], "{method:?}");
        }
    }
    let ntlm = open(options(&samba, &realm, Method::Ntlm, IN_REALM)).err().unwrap();
    assert!(matches!(ntlm, SmbError::Login { .. }), "{ntlm}");
}

#[test]
fn the_domain_refuses_in_the_same_words_as_over_winrm() {
    let realm = Realm::start();
    let samba = samba(&realm);
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    realm.user(samba.user(), PASSWORD, "");
    for method in [Method::Kerberos, Method::Negotiate] {
        let error = open(options(&samba, &realm, method, "Guess-1")).err().unwrap();
        assert!(
            matches!(&error, SmbError::Login { detail, .. } if detail == "wrong password"),
            "{error}"
        );
    }
    let nobody = Login {
        user: "nobody@lab.example".into(),
        ..options(&samba, &realm, Method::Kerberos, PASSWORD).login
    };
    let error = open(SmbOptions { port: samba.port, ..SmbOptions::new(nobody) }).err().unwrap();
    assert!(error.to_string().contains("refused the user"), "{error}");

    realm.forget_service("cifs");
    let error = open(options(&samba, &realm, Method::Kerberos, PASSWORD)).err().unwrap();
    assert!(
        matches!(&error, SmbError::Login { detail, .. } if detail.contains("does not know cifs/localhost")),
        "{error}"
    );
}

/// What Kerberos lacks leads to NTLM where that is let, as over WinRM, and is told once.
#[test]
fn without_the_domain_there_is_ntlm_or_nothing() {
    let realm = Realm::start();
    let samba = samba(&realm);
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    realm.user(samba.user(), PASSWORD, "");
    let without = |method| {
        let mut options = options(&samba, &realm, method, PASSWORD);
        // Nobody listens there.
        options.login.kdc = Some("127.0.0.1:1".into());
        options
    };
    let error = open(without(Method::Kerberos)).err().unwrap();
    assert!(matches!(error, SmbError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("VMTIDE_WINRM_KDC"), "{error}");
    let unnamed = |method| {
        let mut options = without(method);
        options.login.kdc = Some("https://dc1/x".into());
        options
    };
    let error = open(unnamed(Method::Negotiate)).err().unwrap();
    assert!(error.to_string().contains("no KDC"), "{error}");

    realm.forget_service("cifs");
    for options in
        [without(Method::Negotiate), options(&samba, &realm, Method::Negotiate, PASSWORD)]
    {
        let client = Arc::new(SmbClient::new(options));
        let ((), warned) = warnings(|| {
            for _ in 0..2 {
                let file = SmbFile::open(&client, &place("x")).unwrap();
                assert_eq!(read_all(&file), b"x");
            }
        });
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert!(warned[0].contains("NTLM is used instead of Kerberos"), "{warned:?}");
    }
}

/// Somebody between us and the server, who cannot prove to be it, does not get by an empty answer what leads to NTLM.
#[test]
fn an_answer_without_a_proof_does_not_lead_to_ntlm() {
    const SUCCESS: u32 = 0;
    const MORE_PROCESSING_REQUIRED: u32 = 0xC000_0016;
    let realm = Realm::start();
    let samba = samba(&realm);
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    realm.user(samba.user(), PASSWORD, "");
    for code in [SUCCESS, MORE_PROCESSING_REQUIRED] {
        let (port, said) = without_token(samba.port, code);
        let negotiate = SmbOptions { port, ..options(&samba, &realm, Method::Negotiate, PASSWORD) };
        let error = open(negotiate).err().unwrap();
        assert!(matches!(error, SmbError::Protocol { .. }), "{code:#x}: {error}");
        assert!(error.to_string().contains("prove"), "{code:#x}: {error}");
        let said = said.lock().unwrap().clone();
        let has = |text: &[u8]| said.windows(text.len()).any(|part| part == text);
        // A ticket was shown, for the service of this name.
        assert!(has(b"cifs") && !has(b"NTLMSSP"), "{code:#x}");
    }
}

/// Somebody on the way to a server who takes the token out of its answers to logins, and gives them this status. The port,
/// and what clients said.
fn without_token(server: u16, code: u32) -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let said = Arc::new(Mutex::new(Vec::new()));
    let heard = said.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, heard) = (client.unwrap(), heard.clone());
            let mut server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            std::thread::spawn(move || {
                // One after the other, as a login goes.
                while let Some(asked) = message(&mut client) {
                    heard.lock().unwrap().extend_from_slice(&asked);
                    server.write_all(&asked).unwrap();
                    let Some(mut answer) = message(&mut server) else { break };
                    // SESSION_SETUP, behind four bytes of length.
                    if answer[4 + 12] == 1 {
                        answer[4 + 8..4 + 12].copy_from_slice(&code.to_le_bytes());
                        answer[4 + 64 + 6..4 + 64 + 8].fill(0);
                    }
                    client.write_all(&answer).unwrap();
                }
            });
        }
    });
    (port, said)
}

/// The next message with its length; none at the end.
fn message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 4];
    stream.read_exact(&mut message).ok()?;
    let length = u32::from_be_bytes(message[..4].try_into().unwrap());
    message.resize(4 + usize::try_from(length).unwrap(), 0);
    stream.read_exact(&mut message[4..]).ok()?;
    Some(message)
}

/// Samba ends a session with its ticket. Readers and writers go on with a new one; what was written and not flushed when
/// it ended is not in doubt.
#[test]
fn a_session_whose_ticket_ends_goes_on_with_another() {
    let realm = Realm::start();
    let samba = samba(&realm);
    realm.user(samba.user(), IN_REALM, "-maxlife 3sec");
    let content = pattern(2, 1 << 20);
    std::fs::write(samba.path("vms/x"), &content).unwrap();
    let both = [Protection::Encrypted, Protection::Signed].map(|protection| {
        let options = options(&samba, &realm, Method::Kerberos, IN_REALM);
        let client = Arc::new(SmbClient::new(SmbOptions { protection, ..options }));
        let reader = SmbFile::open(&client, &place("x")).unwrap();
        assert!(read_all(&reader) == content);
        let name = format!("{protection:?}");
        let writer = SmbFile::create(&client, &place(&name)).unwrap();
        writer.resize(2 << 20).unwrap();
        writer.write_at(&content, 0).unwrap();
        (client, reader, writer, name)
    });
    std::thread::sleep(UNTIL_EXPIRED);
    for (client, reader, writer, name) in both {
        // Not asked twice where the server may have made it; when it only wants a ticket it has not.
        drop(SmbFile::create(&client, &place(&format!("{name} 2"))).unwrap());
        std::thread::scope(|scope| {
            let more = scope.spawn(|| writer.write_at(&content, 1 << 20));
            for _ in 0..3 {
                scope.spawn(|| assert!(read_all(&reader) == content, "{name}"));
            }
            more.join().unwrap().unwrap();
        });
        writer.flush().unwrap();
        drop(writer);
        let written = std::fs::read(samba.path("vms").join(&name)).unwrap();
        assert!(written == [&content[..], &content].concat(), "{name}");
    }
}

/// The server keeps all that is open while nobody gives another ticket, so that is waited for.
#[test]
fn a_ticket_that_is_not_to_be_had_at_once_is_asked_for_again() {
    let realm = Realm::start();
    let samba = samba(&realm);
    realm.user(samba.user(), IN_REALM, "-maxlife 3sec");
    let (kdc, refusals) = often_dead(&realm.address);
    let mut options = options(&samba, &realm, Method::Kerberos, IN_REALM);
    options.login.kdc = Some(kdc);
    let writer = SmbFile::create(&Arc::new(SmbClient::new(options)), &place("x")).unwrap();
    writer.resize(4).unwrap();
    writer.write_at(b"ab", 0).unwrap();
    std::thread::sleep(UNTIL_EXPIRED);
    refusals.store(2, Ordering::SeqCst);
    writer.write_at(b"cd", 2).unwrap();
    assert_eq!(refusals.load(Ordering::SeqCst), 0);
    writer.flush().unwrap();
    drop(writer);
    assert_eq!(std::fs::read(samba.path("vms/x")).unwrap(), b"abcd");
}

/// Something before a domain's server that ends as many connections as it is told, and else hands on what comes.
fn often_dead(server: &str) -> (String, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (server, refusals) = (server.to_owned(), Arc::new(AtomicU32::new(0)));
    let left = refusals.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            if left.load(Ordering::SeqCst) > 0 {
                left.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let mut server = TcpStream::connect(&server).unwrap();
            // One question and its answer, each behind its length.
            let asked = message(&mut client).unwrap();
            server.write_all(&asked).unwrap();
            client.write_all(&message(&mut server).unwrap()).unwrap();
        }
    });
    (address, refusals)
}

/// Where no other ticket is to be had that is what is said, at once.
#[test]
fn a_session_that_cannot_go_on_says_why() {
    let realm = Realm::start();
    let samba = samba(&realm);
    realm.user(samba.user(), IN_REALM, "-maxlife 3sec");
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    let file = open(options(&samba, &realm, Method::Kerberos, IN_REALM)).unwrap();
    assert_eq!(read_all(&file), b"x");
    realm.change_password(samba.user(), "Another!2026");
    std::thread::sleep(UNTIL_EXPIRED);
    let error = file.read_at(&mut [0], 0).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::PermissionDenied), "{error}");
    assert!(error.to_string().contains("wrong password"), "{error}");
}

/// The domain took the password, and the ticket is what the server does not take any more: so it is said.
#[test]
fn a_ticket_that_expires_on_the_way_is_no_wrong_password() {
    let realm = Realm::start();
    let samba = samba(&realm);
    realm.user(samba.user(), PASSWORD, "-maxlife 2sec");
    std::fs::write(samba.path("vms/x"), b"x").unwrap();
    let slow = SmbOptions {
        port: relay::start(samba.port, 1, UNTIL_EXPIRED),
        ..options(&samba, &realm, Method::Kerberos, PASSWORD)
    };
    let error = open(slow).err().unwrap();
    assert!(
        matches!(&error, SmbError::Login { detail, .. } if detail.contains("ticket")),
        "{error}\n{}",
        samba.log()
    );
    assert!(!error.to_string().contains("password"), "{error}");
}
