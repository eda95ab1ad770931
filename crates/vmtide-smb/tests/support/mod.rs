//! A real Samba server for one test: its own smbd as the current user, on a port of its own, with its own accounts.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, and each uses its part"
)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmtide_smb::{Login, Mapping, Method, PathMap, SmbClient, SmbOptions};
use zeroize::Zeroizing;

pub const PASSWORD: &str = "Backup!2026";

/// A running smbd. `vms` may be written, `look` only read, `private` is for somebody else.
pub struct Samba {
    pub directory: tempfile::TempDir,
    pub port: u16,
    user: String,
    smbd: Child,
}

fn program(name: &str) -> PathBuf {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{name} is missing: install the packages samba and smbclient"))
}

impl Samba {
    pub fn start() -> Self {
        Self::with("")
    }

    /// With more lines in the section of the server.
    pub fn with(settings: &str) -> Self {
        Self::with_environment(settings, &[])
    }

    /// That takes tickets by a keytab, with the settings of Kerberos in a file of that name.
    pub fn with_tickets(realm: &str, keytab: &Path, krb5_conf: &Path) -> Self {
        let settings = format!(
            "realm = {realm}\n kerberos method = dedicated keytab\n dedicated keytab file = {}\n",
            keytab.display()
        );
        Self::with_environment(&settings, &[("KRB5_CONFIG", krb5_conf)])
    }

    fn with_environment(settings: &str, environment: &[(&str, &Path)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for name in ["vms", "look", "private", "run", "state", "sam"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = |name: &str| root.join(name).display().to_string();
        let config = format!(
            "[global]\n server role = standalone server\n workgroup = LAB\n netbios name = HV1\n\
             smb ports = {port}\n interfaces = 127.0.0.1/8\n bind interfaces only = yes\n\
             pid directory = {run}\n lock directory = {run}\n ncalrpc dir = {run}\n\
             state directory = {state}\n cache directory = {state}\n private dir = {sam}\n\
             passdb backend = tdbsam:{sam}/passdb.tdb\n log file = {run}/log\n log level = 1\n\
             map to guest = never\n load printers = no\n disable spoolss = yes\n\
             server multi channel support = no\n{settings}\n\
             [vms]\n path = {vms}\n read only = no\n\
             [look]\n path = {look}\n read only = yes\n\
             [private]\n path = {private}\n valid users = nobody\n",
            run = at("run"),
            state = at("state"),
            sam = at("sam"),
            vms = at("vms"),
            look = at("look"),
            private = at("private"),
        );
        let file = root.join("smb.conf");
        std::fs::write(&file, config).unwrap();
        let user = Command::new("id").arg("-un").output().unwrap();
        let user = String::from_utf8(user.stdout).unwrap().trim().to_owned();
        let mut add = Command::new(program("smbpasswd"))
            .args(["-c", file.to_str().unwrap(), "-L", "-s", "-a", &user])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        write!(add.stdin.take().unwrap(), "{PASSWORD}\n{PASSWORD}\n").unwrap();
        assert!(add.wait().unwrap().success(), "smbpasswd failed");
        let smbd = Command::new(program("smbd"))
            .args(["--foreground", "--no-process-group", "-s", file.to_str().unwrap()])
            .envs(environment.iter().copied())
            // Where it ends, it ends all of its group.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut samba = Self { directory, port, user, smbd };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = samba.smbd.try_wait().unwrap();
            assert!(ended.is_none(), "smbd ended: {ended:?}\n{}", samba.log());
            assert!(Instant::now() < deadline, "smbd does not listen\n{}", samba.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        samba
    }

    /// The account that may log in.
    pub fn user(&self) -> &str {
        &self.user
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("run/log")).unwrap_or_default()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn login(&self) -> Login {
        Login {
            user: self.user.clone(),
            password: Zeroizing::new(PASSWORD.into()),
            method: Method::Ntlm,
            kdc: None,
        }
    }

    pub fn options(&self) -> SmbOptions {
        SmbOptions { port: self.port, ..SmbOptions::new(self.login()) }
    }

    pub fn client(&self) -> Arc<SmbClient> {
        Arc::new(SmbClient::new(self.options()))
    }
}

impl Drop for Samba {
    fn drop(&mut self) {
        // Asked to end, it ends its children, too.
        let pid = self.smbd.id().to_string();
        drop(Command::new("kill").arg(&pid).status());
        drop(self.smbd.wait());
    }
}

/// `C:\VMs` of the host is the share `vms`, `D:` the one that is only read, `E:` somebody else's.
pub fn map() -> PathMap {
    let mut map = PathMap::new("127.0.0.1");
    for text in [r"C:\VMs=\\127.0.0.1\vms", r"D:=\\127.0.0.1\look", r"E:=\\127.0.0.1\private"] {
        map.mappings.push(text.parse::<Mapping>().unwrap());
    }
    map
}

/// Something between client and server that can cut connections.
pub struct Proxy {
    pub port: u16,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    is_closed: Arc<AtomicBool>,
}

impl Proxy {
    pub fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let is_closed = Arc::new(AtomicBool::new(false));
        let (all, closed) = (streams.clone(), is_closed.clone());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                if closed.load(Ordering::SeqCst) {
                    continue;
                }
                let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
                let copies = [&client, &server].map(|stream| stream.try_clone().unwrap());
                all.lock().unwrap().extend(copies);
                for (mut from, mut to) in
                    [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(length @ 1..) = from.read(&mut buffer) {
                            if to.write_all(&buffer[..length]).is_err() {
                                break;
                            }
                        }
                        drop(to.shutdown(Shutdown::Both));
                    });
                }
            }
        });
        Self { port, streams, is_closed }
    }

    /// Cuts all connections that are open now.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Takes no connection any more, or takes them again.
    pub fn close(&self, closed: bool) {
        self.is_closed.store(closed, Ordering::SeqCst);
    }
}

/// Bytes that differ everywhere.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
