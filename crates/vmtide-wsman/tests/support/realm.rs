//! A Kerberos realm of MIT's own programs in a temporary directory, on a port of its own.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub const REALM: &str = "LAB.EXAMPLE";

/// A running realm; ends when it is dropped.
pub struct Realm {
    directory: tempfile::TempDir,
    kdc: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Realm {
    /// A realm with services for HTTP and for files on `localhost`, and their keytab.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let shown = place.display();
        let config = format!(
            "[libdefaults]\n default_realm = {REALM}\n dns_lookup_kdc = false\n dns_lookup_realm = false\n rdns = false\n \
             dns_canonicalize_hostname = false\n clockskew = 5\n[realms]\n {REALM} = {{\n kdc = {address}\n }}\n\
             [domain_realm]\n localhost = {REALM}\n"
        );
        std::fs::write(place.join("krb5.conf"), config).unwrap();
        let profile = format!(
            "[kdcdefaults]\n kdc_listen = {address}\n kdc_tcp_listen = {address}\n[realms]\n {REALM} = {{\n \
             database_name = {shown}/principal\n key_stash_file = {shown}/stash\n acl_file = {shown}/acl\n \
             supported_enctypes = aes256-cts-hmac-sha1-96:normal\n disable_pac = true\n }}\n[logging]\n kdc = FILE:{shown}/kdc.log\n"
        );
        std::fs::write(place.join("kdc.conf"), profile).unwrap();
        run(command("kdb5_util", place).args(["create", "-s", "-r", REALM, "-P", "not-a-secret"]));
        // (Without PACs: what MIT's have in them is not what Samba looks for.)
        // With a policy of its own, or every ticket would ask for authentication of the KDC's own liking.
        let keytab = place.join("keytab").display().to_string();
        for service in ["HTTP", "cifs"].map(|kind| format!("{kind}/localhost@{REALM}")) {
            admin(place, &format!("addprinc -randkey {service}"));
            admin(place, &format!("ktadd -k {keytab} {service}"));
        }
        let kdc = command("krb5kdc", place).args(["-n", "-r", REALM]).spawn().unwrap();
        let realm = Self { directory, kdc, address };
        realm.wait();
        realm
    }

    /// Adds a user; `flags` are those of kadmin's `addprinc`.
    pub fn user(&self, name: &str, password: &str, flags: &str) {
        let flags = format!("addprinc +requires_preauth {flags} -pw {password} {name}@{REALM}");
        admin(self.directory.path(), &flags);
    }

    /// Gives a user another password.
    #[allow(dead_code, reason = "not all tests that have a realm need it")]
    pub fn change_password(&self, name: &str, password: &str) {
        admin(self.directory.path(), &format!("cpw -pw {password} {name}@{REALM}"));
    }

    /// Takes a service (`HTTP`, `cifs`) out of the realm.
    pub fn forget_service(&self, kind: &str) {
        admin(self.directory.path(), &format!("delprinc -force {kind}/localhost@{REALM}"));
    }

    pub fn keytab(&self) -> PathBuf {
        self.directory.path().join("keytab")
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("krb5.conf")
    }

    fn wait(&self) {
        for _ in 0..300 {
            if TcpStream::connect(&self.address).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("krb5kdc does not listen");
    }
}

impl Drop for Realm {
    fn drop(&mut self) {
        let _ = self.kdc.kill();
        let _ = self.kdc.wait();
    }
}

fn command(program: &str, place: &Path) -> Command {
    let installed =
        ["/usr/sbin", "/usr/bin", "/sbin"].map(|directory| Path::new(directory).join(program));
    let found = installed.iter().find(|path| path.is_file());
    let found = found.unwrap_or_else(|| {
        panic!("{program} is missing: install krb5-kdc, krb5-admin-server and python3-gssapi")
    });
    let mut command = Command::new(found);
    command
        .env("KRB5_CONFIG", place.join("krb5.conf"))
        .env("KRB5_KDC_PROFILE", place.join("kdc.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn admin(place: &Path, query: &str) {
    run(command("kadmin.local", place).args(["-r", REALM, "-q", query]));
}

fn run(command: &mut Command) {
    let mut child = command.spawn().unwrap();
    let mut words = String::new();
    child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() && !words.contains("rror"), "{command:?}: {words}");
}
