//! The agent's certificate, and TLS with it.
//!
//! Where the operator gives no certificate, one is made at the first start and kept in the state directory: its
//! SHA-256 fingerprint, or the file itself, is what clients pin. Whichever it is, it is looked at again while the
//! agent runs, so that a renewed one is used without a restart; connections that are open keep theirs.

use crate::auth::FileStamp;
use crate::config::CertificateFiles;
use crate::error::{AgentError, Result};
use parking_lot::{Mutex, RwLock};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SupportedCipherSuite};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// The names of the files in the state directory.
const CERTIFICATE_FILE: &str = "agent-cert.pem";
const KEY_FILE: &str = "agent-key.pem";
/// How long a certificate made here is valid, in years. Clients pin it, so it changes only when somebody wants it to.
const VALID_YEARS: i32 = 20;
/// The largest file of certificates or keys that is read.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// The SHA-256 of a certificate, by which clients know it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// That of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        Self(bytes)
    }
}

/// As `openssl x509 -fingerprint -sha256` writes it: pairs of capital digits with colons.
impl fmt::Display for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let colon = if at == 0 { "" } else { ":" };
            write!(formatter, "{colon}{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The certificate and key as they are now. Any number of threads may ask.
#[derive(Debug)]
pub struct TlsIdentity {
    files: CertificateFiles,
    current: RwLock<Arc<CertifiedKey>>,
    stamp: Mutex<(FileStamp, FileStamp)>,
}

impl TlsIdentity {
    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// Where they cannot be read, are none, or do not belong together.
    pub fn open(files: CertificateFiles) -> Result<Arc<Self>> {
        let stamp = stamps(&files);
        let current = read(&files)?;
        Ok(Arc::new(Self {
            files,
            current: RwLock::new(Arc::new(current)),
            stamp: Mutex::new(stamp),
        }))
    }

    /// Opens the certificate in the state directory; makes one where there is none, for this host and `listen`.
    ///
    /// # Errors
    /// As [`open`](Self::open); where it cannot be written.
    pub fn open_or_make(state_directory: &Path, listen: IpAddr) -> Result<Arc<Self>> {
        let files = CertificateFiles {
            certificate: state_directory.join(CERTIFICATE_FILE),
            key: state_directory.join(KEY_FILE),
        };
        // The certificate is written last: without it, what is there is half of a start that was interrupted.
        if !files.certificate.exists() {
            make(&files, listen)?;
        }
        Self::open(files)
    }

    /// The certificate's fingerprint.
    pub fn fingerprint(&self) -> Fingerprint {
        let current = self.current.read();
        Fingerprint::of(current.cert.first().map_or(&[], |certificate| certificate.as_ref()))
    }

    /// Where the certificate is.
    pub fn certificate_file(&self) -> &Path {
        &self.files.certificate
    }

    /// Reads the files again where they changed. What does not fit together, because the second file is still to
    /// come, is tried again when it changes; until then the one from before stays in use.
    pub fn reload(&self) {
        let stamp = stamps(&self.files);
        let mut last = self.stamp.lock();
        if *last == stamp {
            return;
        }
        *last = stamp;
        match read(&self.files) {
            Ok(read) => {
                *self.current.write() = Arc::new(read);
                tracing::info!(fingerprint = %self.fingerprint(), "certificate read again");
            }
            Err(error) => tracing::error!(%error, "the certificate from before stays in use"),
        }
    }

    /// How connections are made private with it: TLS 1.3, and 1.2 where `tls12`; HTTP/2 and HTTP/1.1.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where the library does not take it.
    pub fn server_config(self: &Arc<Self>, tls12: bool) -> Result<Arc<ServerConfig>> {
        let versions: &[&rustls::SupportedProtocolVersion] = if tls12 {
            &[&rustls::version::TLS13, &rustls::version::TLS12]
        } else {
            &[&rustls::version::TLS13]
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(versions)
            .map_err(|error| AgentError::refused("set up TLS", error))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.ignore_client_order = true;
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for TlsIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read()))
    }
}

/// ring, with AES-128-GCM first: a disk is streamed a quarter faster with it than with AES-256-GCM, and nobody can
/// break either.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    let rank = |suite: &SupportedCipherSuite| {
        let fast = [
            cipher_suite::TLS13_AES_128_GCM_SHA256.suite(),
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256.suite(),
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256.suite(),
        ];
        usize::from(!fast.contains(&suite.suite()))
    };
    provider.cipher_suites.sort_by_key(rank);
    provider
}

fn stamps(files: &CertificateFiles) -> (FileStamp, FileStamp) {
    (FileStamp::of(&files.certificate), FileStamp::of(&files.key))
}

fn read(files: &CertificateFiles) -> Result<CertifiedKey> {
    let wrong = |path: &Path, reason: String| {
        AgentError::refused(format!("read {}", path.display()), reason)
    };
    let pem = read_pem(&files.certificate)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| wrong(&files.certificate, format!("no certificates in PEM: {error}")))?;
    if chain.is_empty() {
        return Err(wrong(&files.certificate, "holds no certificate in PEM".into()));
    }
    let pem = read_pem(&files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| wrong(&files.key, format!("no private key in PEM: {error}")))?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key)
        .map_err(|error| wrong(&files.key, format!("a key that cannot be used: {error}")))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        let certificate = files.certificate.display();
        wrong(&files.key, format!("is not the key of the certificate {certificate}"))
    })?;
    Ok(certified)
}

fn read_pem(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |error| AgentError::io(format!("read {}", path.display()), error);
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_PEM_BYTES {
        return Err(AgentError::refused(format!("read {}", path.display()), "is too large"));
    }
    Ok(Zeroizing::new(std::fs::read(path).map_err(failed)?))
}

/// Makes a key and a certificate signed with it.
fn make(files: &CertificateFiles, listen: IpAddr) -> Result<()> {
    let refused = |error| AgentError::refused("make a certificate", error);
    let key = rcgen::KeyPair::generate().map_err(refused)?;
    let params = parameters(listen).map_err(refused)?;
    let certificate = params.self_signed(&key).map_err(refused)?;
    let secret = Zeroizing::new(key.serialize_pem());
    write_new(&files.key, secret.as_bytes(), true)?;
    write_new(&files.certificate, certificate.pem().as_bytes(), false)
}

fn parameters(listen: IpAddr) -> std::result::Result<rcgen::CertificateParams, rcgen::Error> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".into(), "::1".into()];
    names.extend(host_name());
    if !listen.is_unspecified() && !listen.is_loopback() {
        names.push(listen.to_string());
    }
    let mut params = rcgen::CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let name = host_name().unwrap_or_else(|| "localhost".into());
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("vmtide agent on {name}"));
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let year = i32::from(jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).year());
    // Since the beginning of the year: clocks differ.
    params.not_before = rcgen::date_time_ymd(year, 1, 1);
    params.not_after = rcgen::date_time_ymd(year.saturating_add(VALID_YEARS), 12, 31);
    Ok(params)
}

/// The name of this host, where it is one that a certificate can hold.
fn host_name() -> Option<String> {
    #[cfg(unix)]
    let name = rustix::system::uname().nodename().to_str().ok()?.to_owned();
    #[cfg(not(unix))]
    let name = std::env::var("COMPUTERNAME").ok()?.to_ascii_lowercase();
    let is_good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let fits = (1..=63).contains(&name.len()) && name.chars().all(is_good) && name != "localhost";
    fits.then_some(name)
}

/// Writes a file so that it is there completely or not at all.
fn write_new(path: &Path, content: &[u8], secret: bool) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut temporary = PathBuf::from(path);
        temporary.set_extension(format!("{}.new", std::process::id()));
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        {
            let mode = if secret { 0o600 } else { 0o644 };
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
        }
        // Windows: who may read it is what the state directory says, which is not looked at here.
        #[cfg(not(unix))]
        let _ = secret;
        let mut file = options.open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(&temporary, path)
    };
    write().map_err(|error| AgentError::io(format!("write {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    #[test]
    fn a_certificate_is_made_once_and_its_key_kept_secret() {
        let directory = tempfile::tempdir().unwrap();
        let first = TlsIdentity::open_or_make(directory.path(), HOST).unwrap();
        let again = TlsIdentity::open_or_make(directory.path(), HOST).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.fingerprint().to_string().len(), 32 * 3 - 1);
        assert!(first.server_config(false).is_ok() && first.server_config(true).is_ok());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let key = std::fs::metadata(directory.path().join(KEY_FILE)).unwrap();
            assert_eq!(key.permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_start_that_was_interrupted_is_made_good() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(KEY_FILE), "half").unwrap();
        TlsIdentity::open_or_make(directory.path(), HOST).unwrap();
    }

    #[test]
    fn a_new_certificate_is_used_once_both_files_fit() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let identity = TlsIdentity::open_or_make(one.path(), HOST).unwrap();
        let next = TlsIdentity::open_or_make(other.path(), HOST).unwrap();
        let before = identity.fingerprint();
        let copy = |name: &str| {
            std::fs::copy(other.path().join(name), one.path().join(name)).unwrap();
        };
        copy(CERTIFICATE_FILE);
        identity.reload();
        assert_eq!(identity.fingerprint(), before);
        copy(KEY_FILE);
        identity.reload();
        assert_eq!(identity.fingerprint(), next.fingerprint());
    }

    #[test]
    fn what_is_no_certificate_is_refused_with_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let files = CertificateFiles {
            certificate: directory.path().join("cert.pem"),
            key: directory.path().join("key.pem"),
        };
        assert!(TlsIdentity::open(files.clone()).is_err());
        std::fs::write(&files.certificate, "nothing").unwrap();
        std::fs::write(&files.key, "nothing").unwrap();
        let error = TlsIdentity::open(files).unwrap_err().to_string();
        assert!(error.contains("cert.pem"), "{error}");
    }
}
