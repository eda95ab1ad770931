//! Repositories in S3 by other ways of access: keys that may not remove, buckets in the name of the
//! host, keys of a machine, a container, a web identity. The server is one of our own, which shows what
//! it was asked.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::common;
#[allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::format_push_string,
    reason = "shared by test programs that each use a part of it; a failed unwrap is a failed test"
)]
#[path = "../../vmtide-s3/tests/support/faulty.rs"]
mod faulty;

use common::{Place, Run, finish};
use faulty::FaultyServer;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex};

const MIB: usize = 1 << 20;
const REPOSITORY: &str = "s3://bucket/vm";

fn run(place: &Place, variables: &[(&str, &str)], arguments: &[&str]) -> Run {
    finish(
        place
            .command(arguments)
            .env("VMTIDE_REPOSITORY", REPOSITORY)
            .env("TMPDIR", place.directory.path())
            .envs(variables.iter().copied()),
    )
}

const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "secret")];

#[test]
fn keys_that_may_not_remove_back_up_verify_and_restore_and_forget_says_what_they_may_not() {
    let (place, server) = (Place::new(), FaultyServer::start(true));
    let variables = [&KEYS[..], &[("AWS_ENDPOINT_URL", &*server.endpoint)]].concat();
    let job = |arguments: &[&str]| run(&place, &variables, arguments);
    // Somebody with all rights made the repository; something in it can be pruned.
    job(&["init"]).must_end_with(0);
    place.image("web.raw", 2 * MIB);
    job(&["backup", "web.raw"]).must_end_with(0);
    std::fs::write(place.path("web.raw"), vec![7; 2 * MIB]).unwrap();
    job(&["backup", "web.raw"]).must_end_with(0);
    let points = job(&["points", "--json"]).must_end_with(0).summary();
    let id = |number: usize| points["points"][number]["id"].as_str().unwrap().to_owned();
    job(&["forget", &id(0)]).must_end_with(0);

    server.deny_removal();
    let before = server.paths();
    let mut image = std::fs::read(place.path("web.raw")).unwrap();
    image[MIB..MIB + 4096].fill(9);
    std::fs::write(place.path("web.raw"), &image).unwrap();
    job(&["backup", "web.raw"]).must_end_with(0);
    job(&["verify", "--read-data"]).must_end_with(0);
    job(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
    assert!(std::fs::read(place.path("back.raw")).unwrap() == image);
    let doctor = job(&["doctor", REPOSITORY]);
    let said = format!("{}{}", doctor.stdout, doctor.stderr);
    assert!(said.contains("may not remove"), "{said}");

    for arguments in [&["forget", &id(1)][..], &["forget", "--keep-last", "1"], &["prune"]] {
        let refused = job(arguments).must_end_with(4);
        let errors: Vec<_> =
            refused.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{arguments:?}: {}", refused.stderr);
        for words in ["may not remove objects", "AccessDenied", "use one that may"] {
            assert!(errors[0].contains(words), "{arguments:?}: {}", errors[0]);
        }
    }
    let now = server.paths();
    let gone: Vec<_> = before.iter().filter(|path| !now.contains(path)).collect();
    assert!(gone.is_empty(), "{gone:?}");
    let points = job(&["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"].as_array().unwrap().len(), 2, "{points}");
    // What the refused prune left is in nobody's way.
    job(&["backup", "web.raw"]).must_end_with(0);
    job(&["verify", "--read-data"]).must_end_with(0);
}

#[test]
fn the_bucket_stands_in_the_host_where_it_is_asked_for() {
    let (place, server) = (Place::new(), FaultyServer::start(true));
    // Names below a made-up host are nobody's: the server is asked as a proxy.
    let variables = [
        &KEYS[..],
        &[
            ("http_proxy", &*server.endpoint),
            ("VMTIDE_S3_ENDPOINT", "http://s3.example"),
            ("VMTIDE_S3_PATH_STYLE", "false"),
            ("VMTIDE_S3_ALLOW_HTTP", "true"),
        ],
    ]
    .concat();
    let job = |arguments: &[&str]| run(&place, &variables, arguments);
    job(&["init"]).must_end_with(0);
    place.image("web.raw", 2 * MIB);
    job(&["backup", "web.raw"]).must_end_with(0);
    job(&["verify", "--read-data"]).must_end_with(0);
    job(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(0);
    assert!(
        std::fs::read(place.path("back.raw")).unwrap()
            == std::fs::read(place.path("web.raw")).unwrap()
    );
    let seen = server.requests();
    assert!(seen.len() > 10, "{}", seen.len());
    for request in seen {
        assert_eq!(request.header("host"), Some("bucket.s3.example"), "{request:?}");
        let path = request.target.strip_prefix("http://bucket.s3.example/").unwrap();
        assert!(path.starts_with("vm/") || path.starts_with('?'), "{request:?}");
        let authorization = request.header("authorization").unwrap();
        assert!(authorization.contains("SignedHeaders=host;") || authorization.contains(";host;"));
    }
}

/// Answers every request on a connection of its own, by its first line and headers, and keeps what it was
/// asked.
struct Answering {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Answering {
    fn start(answer: impl Fn(&str) -> String + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let own = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut head, mut length) = (String::new(), 0);
                loop {
                    let from = head.len();
                    if reader.read_line(&mut head).unwrap_or(0) == 0
                        || head[from..].trim().is_empty()
                    {
                        break;
                    }
                    let line = head[from..].to_lowercase();
                    if let Some(value) = line.strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let body = answer(&head);
                own.lock().unwrap().push(head);
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                );
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

const INSTANCE: &str = r#"{"AccessKeyId":"ASIAMACHINE","SecretAccessKey":"secret","Token":"token-of-it",
    "Expiration":"2099-01-01T00:00:00Z"}"#;

/// Makes a repository and backs up with these variables; every request is signed with these keys.
fn must_sign_with(key_id: &str, token: &str, variables: &[(&str, &str)]) {
    let (place, server) = (Place::new(), FaultyServer::start(true));
    let variables = [variables, &[("AWS_ENDPOINT_URL_S3", &*server.endpoint)]].concat();
    run(&place, &variables, &["init"]).must_end_with(0);
    place.image("web.raw", MIB);
    run(&place, &variables, &["backup", "web.raw"]).must_end_with(0);
    let seen = server.requests();
    assert!(seen.len() > 5, "{}", seen.len());
    for request in seen {
        let authorization = request.header("authorization").unwrap();
        assert!(authorization.contains(&format!("Credential={key_id}/")), "{request:?}");
        assert_eq!(request.header("x-amz-security-token"), Some(token), "{request:?}");
    }
}

#[test]
fn keys_come_from_the_machine() {
    let imds = Answering::start(|head| {
        let is_token = head.starts_with("PUT /latest/api/token ");
        if is_token {
            return "session".into();
        }
        assert!(head.to_lowercase().contains("x-aws-ec2-metadata-token: session"), "{head}");
        if head.contains("/security-credentials/ ") { "role".into() } else { INSTANCE.into() }
    });
    must_sign_with(
        "ASIAMACHINE",
        "token-of-it",
        &[("AWS_METADATA_ENDPOINT", imds.endpoint.as_str())],
    );
    let asked = imds.asked();
    assert!(asked.iter().any(|head| head.contains("/security-credentials/role ")), "{asked:?}");
}

#[test]
fn keys_come_from_the_container() {
    let place = Place::new();
    let token = place.text("token");
    std::fs::write(&token, "word-of-the-container").unwrap();
    let agent = Answering::start(|_| INSTANCE.into());
    let address = format!("{}/credentials", agent.endpoint);
    must_sign_with(
        "ASIAMACHINE",
        "token-of-it",
        &[
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", address.as_str()),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.as_str()),
        ],
    );
    let asked = agent.asked().concat().to_lowercase();
    assert!(asked.contains("get /credentials "), "{asked}");
    assert!(asked.contains("authorization: word-of-the-container"), "{asked}");
}

#[test]
fn keys_come_from_a_web_identity() {
    let place = Place::new();
    let token = place.text("token");
    std::fs::write(&token, "identity").unwrap();
    let sts = Answering::start(|_| {
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
         <SessionToken>token-of-the-role</SessionToken><SecretAccessKey>secret</SecretAccessKey>\
         <AccessKeyId>ASIAROLE</AccessKeyId><Expiration>2099-01-01T00:00:00Z</Expiration>\
         </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            .into()
    });
    must_sign_with(
        "ASIAROLE",
        "token-of-the-role",
        &[
            ("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()),
            ("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/backup"),
            ("AWS_ENDPOINT_URL_STS", sts.endpoint.as_str()),
        ],
    );
    let asked = sts.asked().concat();
    for words in ["Action=AssumeRoleWithWebIdentity", "WebIdentityToken=identity", "role%2Fbackup"]
    {
        assert!(asked.contains(words), "{words}: {asked}");
    }
}

#[test]
fn keys_that_end_are_asked_for_again_and_where_there_are_none_that_is_told() {
    let (place, server) = (Place::new(), FaultyServer::start(true));
    // They end at once: so they are asked for again.
    let place_of_keys =
        Answering::start(|_| INSTANCE.replace("2099-01-01T00:00:00Z", "2020-01-01T00:00:00Z"));
    std::fs::write(place.path("token"), "word").unwrap();
    let address = format!("{}/credentials", place_of_keys.endpoint);
    let token = place.text("token");
    let variables = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*address),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &*token),
        ("AWS_ENDPOINT_URL_S3", &*server.endpoint),
    ];
    run(&place, &variables, &["init"]).must_end_with(0);
    assert!(place_of_keys.asked().len() > 1, "{:?}", place_of_keys.asked().len());
    // Where nobody has any, that is told, with code 4.
    let nobody = [
        ("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9"),
        ("AWS_ENDPOINT_URL_S3", &*server.endpoint),
    ];
    let refused = run(&place, &nobody, &["points"]).must_end_with(4);
    assert!(refused.stderr.contains("no keys found"), "{}", refused.stderr);
}
