//! Real S3 servers for tests, one process of each for all tests of a binary. `scripts/test.sh`
//! installs them; a test that finds none fails and says so.

#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::allow_attributes_without_reason,
    reason = "a test: what fails here fails the test; not every crate uses all of it"
)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The keys that the servers are started with.
pub const KEY_ID: &str = "AKIAVMTIDETEST";
pub const SECRET_KEY: &str = "secret/of+the=tests";

/// A running server.
pub struct Server {
    pub endpoint: String,
    port: u16,
    directory: tempfile::TempDir,
    kind: Kind,
    /// Ends with this process: the shell that holds the server reads from it.
    _process: Child,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    S3sFs,
    Moto,
}

/// s3s-fs: a real implementation of signatures and multipart; its conditional writes are not
/// atomic.
pub fn s3s_fs() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(Kind::S3sFs))
}

/// moto: conditional writes, versions, object lock; it checks no signatures.
pub fn moto() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(Kind::Moto))
}

impl Server {
    fn start(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let command = match kind {
            Kind::S3sFs => format!(
                "{} --host 127.0.0.1 --port {port} --access-key '{KEY_ID}' --secret-key \
                 '{SECRET_KEY}' {}",
                program("VMTIDE_S3S_FS", "s3s-fs", "bin/s3s-fs").display(),
                directory.path().display()
            ),
            Kind::Moto => format!(
                "{} -H 127.0.0.1 -p {port}",
                program("VMTIDE_MOTO_SERVER", "moto_server", "moto/bin/moto_server").display()
            ),
        };
        let log = std::fs::File::create(directory.path().with_extension("log")).unwrap();
        let process = Command::new("sh")
            .arg("-c")
            .arg(format!("{command} & server=$!; read -r line; kill $server"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !answers(port) {
            let in_time = begun.elapsed() < Duration::from_secs(60);
            assert!(in_time, "{command} does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let endpoint = format!("http://127.0.0.1:{port}");
        Self { endpoint, port, directory, kind, _process: process }
    }

    /// A new bucket. `object_lock` only with moto.
    pub fn bucket(&self, object_lock: bool) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let bucket = format!("vmtide-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        match self.kind {
            Kind::S3sFs => std::fs::create_dir(self.directory.path().join(&bucket)).unwrap(),
            Kind::Moto if object_lock => {
                self.raw("PUT", &bucket, "x-amz-bucket-object-lock-enabled: true\r\n", "");
            }
            Kind::Moto => self.raw("PUT", &bucket, "", ""),
        }
        bucket
    }

    /// Lets the bucket keep versions.
    pub fn keep_versions(&self, bucket: &str) {
        let xml = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        self.raw("PUT", &format!("{bucket}?versioning="), "", xml);
    }

    /// How many PUT and POST requests for a bucket's objects moto has answered, by its own log. The
    /// repository is given as `s3://BUCKET/…`.
    pub fn puts(&self, repository: &str) -> usize {
        let bucket = repository.strip_prefix("s3://").unwrap().split('/').next().unwrap();
        let log = std::fs::read_to_string(self.directory.path().with_extension("log")).unwrap();
        let ours = |line: &&str| {
            ["PUT", "POST"].iter().any(|verb| line.contains(&format!("\"{verb} /{bucket}/")))
        };
        log.lines().filter(ours).count()
    }

    /// A request without signature, which only moto accepts.
    pub fn raw(&self, method: &str, path: &str, headers: &str, body: &str) {
        let answer = self.ask(method, path, headers, body);
        assert!(answer.starts_with("HTTP/1.1 2"), "{method} {path}: {answer}");
    }

    /// As [`raw`](Self::raw), with the whole answer.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        write!(
            stream,
            "{method} /{path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, \
             Signature=0\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// A port that nobody listens on, below those that the system gives to connections: one of these
/// can be connected with itself while nobody listens, and is taken then.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let from = std::process::id();
    (0..5000)
        .map(|_| 20_000 + (from + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000)
        .map(|port| u16::try_from(port).unwrap())
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port")
}

/// Whether a server answers there.
fn answers(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let mut begin = [0; 7];
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").is_ok()
        && stream.read_exact(&mut begin).is_ok()
        && begin == *b"HTTP/1."
}

/// Where a server's program is: named, in the cache of `scripts/test.sh`, or on the path.
fn program(variable: &str, name: &str, cached: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let cache = std::env::home_dir().unwrap_or_default().join(".cache/vmtide-tests").join(cached);
    if cache.is_file() {
        return cache;
    }
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|p| is_program(p))
    });
    on_path.unwrap_or_else(|| {
        panic!("{name} is needed: run scripts/test.sh once, or set {variable} to its path")
    })
}

fn is_program(path: &Path) -> bool {
    path.is_file()
}
