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
use std::sync::Arc;
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
    let dead =
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let without = |method| {
        let mut options = options(&samba, &realm, method, PASSWORD);
        options.login.kdc = Some(dead.clone());
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
            assert!(read_all(&reader) == content, "{name}");
            more.join().unwrap().unwrap();
        });
        writer.flush().unwrap();
        drop(writer);
        let written = std::fs::read(samba.path("vms").join(&name)).unwrap();
        assert!(written == [&content[..], &content].concat(), "{name}");
    }
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
