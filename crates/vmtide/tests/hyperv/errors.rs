//! How the program ends where a host cannot be worked with: by its exit code, in one line, each in other words, and without
//! the password.

use super::{Lab, NO_GROUP, PASSWORD, Way};
use std::net::TcpListener;
use std::sync::Arc;
use wsman_server::{Server, ServerOptions, User};

/// A password that nobody has.
const GUESS: &str = "Guess-0815";

/// A port that nobody listens on.
fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A host like the lab's, over HTTPS with a certificate of an authority of its own.
fn over_https(lab: &Lab) -> Server {
    let users = vec![User::new(&lab.samba.as_ref().unwrap().login().user, PASSWORD)];
    let tls_names = Some(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]);
    let options = ServerOptions { users, tls_names, ..ServerOptions::default() };
    Server::start(options, lab.world.cim(), Arc::new(hyperv_winrm::HostSchema)).unwrap()
}

/// One line of the table: what is wrong, the source, settings, the exit code, what the line says.
type Case<'a> = (&'a str, String, Vec<(&'a str, &'a str)>, i32, &'a [&'a str]);

#[test]
fn each_refusal_has_its_code_and_its_words() {
    let lab = Lab::new(Way::Winrm);
    let (host, trusted) = (over_https(&lab), over_https(&lab));
    let authority = lab.place.text("authority.pem");
    std::fs::write(&authority, trusted.authority_pem().unwrap()).unwrap();
    let https = |server: &Server| format!("hyperv+winrm://{}/web", server.address());
    let by_name = |url: String| url.replace("127.0.0.1", "localhost");
    let nobody = format!("127.0.0.1:{}", closed_port());
    let domain_user = [("VMTIDE_WINRM_AUTH", "kerberos"), ("VMTIDE_WINRM_USER", "ann@lab.example")];
    let trust = [("VMTIDE_WINRM_HTTPS", "true"), ("VMTIDE_WINRM_CA_FILE", authority.as_str())];
    let smb_user = lab.samba.as_ref().unwrap().login().user;
    let cases: [Case<'_>; 7] = [
        (
            "wrong password",
            lab.url("web"),
            vec![("VMTIDE_WINRM_PASSWORD", GUESS)],
            4,
            &["login", "wrong user name or password"],
        ),
        (
            "wrong password for SMB",
            lab.url("web"),
            vec![("VMTIDE_SMB_USER", smb_user.as_str()), ("VMTIDE_SMB_PASSWORD", GUESS)],
            4,
            &["over SMB"],
        ),
        (
            "the domain's server is down",
            by_name(lab.url("web")),
            [&domain_user[..], &[("VMTIDE_WINRM_KDC", nobody.as_str())]].concat(),
            1,
            &["cannot reach", "the domain's server"],
        ),
        (
            "a certificate of another authority",
            https(&host),
            trust.to_vec(),
            1,
            &["certificate is not trusted", "VMTIDE_WINRM_FINGERPRINT"],
        ),
        (
            "no rights",
            lab.url("web"),
            vec![("VMTIDE_WINRM_USER", NO_GROUP)],
            4,
            &["permission denied", "Remote Management Users"],
        ),
        (
            "host down",
            format!("hyperv+winrm://{nobody}/web"),
            vec![],
            1,
            &["cannot reach", "Enable-PSRemoting"],
        ),
        ("no such VM", lab.url("nothing"), vec![], 6, &["nothing", "no VM of this name"]),
    ];
    let mut told = Vec::new();
    for (what, source, settings, code, parts) in cases {
        let run = lab.run_where(&["backup", &source], &settings);
        let run = run.must_end_with(code);
        // One that comes after the freeze says that it is undone, too.
        let lines: Vec<&str> = run.stderr.lines().filter(|line| *line != "undoing web").collect();
        assert_eq!(lines.len(), 1, "{what}: {}", run.stderr);
        assert!(lines[0].starts_with("error: "), "{what}: {}", run.stderr);
        for part in parts {
            assert!(lines[0].contains(part), "{what}: no {part:?} in {}", run.stderr);
        }
        assert_eq!(run.stdout, "", "{what}");
        let json = lab.run_where(&["backup", &source, "--json"], &settings).must_end_with(code);
        let last = json.events().pop().unwrap();
        assert_eq!((&last["type"], &last["exit_code"]), (&"error".into(), &code.into()), "{what}");
        for secret in [GUESS, PASSWORD] {
            let all = [&run.stderr, &json.stdout, &json.stderr].map(String::as_str).concat();
            assert!(!all.contains(secret), "{what}: a password is told");
        }
        told.push(lines[0].to_owned());
    }
    told.sort();
    told.dedup();
    assert_eq!(told.len(), 7, "each has words of its own: {told:#?}");
    // The same host, where its authority is trusted, is no error.
    let settings = [&trust[..], &[("VMTIDE_WINRM_AUTH", "ntlm")]].concat();
    let run = lab.run_where(&["backup", &https(&trusted)], &settings);
    assert!([0, 3].contains(&run.code), "{}", run.stderr);
    let left = lab.world.leftovers();
    assert!(left.recovery_snapshots.is_empty(), "{left:?}");
}
