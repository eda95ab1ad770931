//! TLS: certificates in the directory layout that QEMU, libnbd and nbdkit share.
//!
//! A directory holds `ca-cert.pem` (who is trusted) and, for a client, `client-cert.pem` with
//! `client-key.pem`; for a server, `server-cert.pem` with `server-key.pem`. The ring provider is
//! given to every configuration explicitly; nothing is installed for the process.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockError, Result};

/// How a client proves a server and itself. What a URL says (`tls-certificates`, `tls-hostname`,
/// `tls-verify-peer`) goes before what stands here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsClientOptions {
    /// A directory with `ca-cert.pem` and, where the server demands a certificate of its
    /// clients, `client-cert.pem` and `client-key.pem`. Without it the system's authorities are
    /// trusted.
    pub certificates: Option<PathBuf>,
    /// The name the server's certificate must carry; otherwise the URL's host, or `localhost`
    /// on a Unix socket.
    pub hostname: Option<String>,
    /// Accepts any certificate. The connection is then encrypted but may end at an attacker.
    pub accept_any_certificate: bool,
}

/// How a server proves itself and, where it wants, its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsServerOptions {
    /// The server's certificate in PEM, with those between it and an authority behind it.
    pub certificate: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
    /// The authorities in PEM of which a client needs a certificate; none lets everybody in.
    pub client_authorities: Option<PathBuf>,
}

impl TlsServerOptions {
    /// Those of a directory with `server-cert.pem`, `server-key.pem` and, to verify clients,
    /// `ca-cert.pem`.
    pub fn in_directory(directory: impl AsRef<Path>, verify_clients: bool) -> Self {
        let directory = directory.as_ref();
        Self {
            certificate: directory.join("server-cert.pem"),
            key: directory.join("server-key.pem"),
            client_authorities: verify_clients.then(|| directory.join("ca-cert.pem")),
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn unusable(path: &Path, error: impl std::fmt::Display) -> BlockError {
    BlockError::io(
        format!("read the certificate or key {}", path.display()),
        io::Error::new(io::ErrorKind::InvalidInput, error.to_string()),
    )
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unusable(path, error))?;
    if all.is_empty() {
        return Err(unusable(path, "there is no certificate in it"));
    }
    Ok(all)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| unusable(path, error))
}

fn authorities(path: &Path) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(|error| unusable(path, error))?;
    }
    Ok(store)
}

fn system_authorities() -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if store.is_empty() {
        return Err(BlockError::unsupported(
            "verify the NBD server",
            "this system has no trusted authorities; give a directory with ca-cert.pem \
             (tls-certificates=DIR)",
        ));
    }
    Ok(store)
}

/// Accepts any certificate, for `tls-verify-peer=0`.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl TlsClientOptions {
    fn config(&self) -> Result<ClientConfig> {
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| BlockError::unsupported("set up TLS", error.to_string()))?;
        let builder = if self.accept_any_certificate {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        } else {
            builder.with_root_certificates(match &self.certificates {
                Some(directory) => authorities(&directory.join("ca-cert.pem"))?,
                None => system_authorities()?,
            })
        };
        let Some(directory) = &self.certificates else {
            return Ok(builder.with_no_client_auth());
        };
        let path = directory.join("client-cert.pem");
        if !path.exists() {
            return Ok(builder.with_no_client_auth());
        }
        builder
            .with_client_auth_cert(
                certificates(&path)?,
                private_key(&directory.join("client-key.pem"))?,
            )
            .map_err(|error| unusable(&path, error))
    }
}

impl TlsServerOptions {
    /// Reads the files.
    ///
    /// # Errors
    /// [`BlockError::Io`] where one is missing or invalid.
    pub(crate) fn config(&self) -> Result<Arc<ServerConfig>> {
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| BlockError::unsupported("set up TLS", error.to_string()))?;
        let builder = match &self.client_authorities {
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|error| unusable(path, error))?;
                builder.with_client_cert_verifier(verifier)
            }
            None => builder.with_no_client_auth(),
        };
        builder
            .with_single_cert(certificates(&self.certificate)?, private_key(&self.key)?)
            .map(Arc::new)
            .map_err(|error| unusable(&self.certificate, error))
    }
}

/// Makes TLS on a stream whose server has agreed to `NBD_OPT_STARTTLS`.
pub(crate) fn client_handshake(
    options: &TlsClientOptions,
    default_hostname: &str,
    stream: &mut (impl io::Read + io::Write),
) -> Result<ClientConnection> {
    let hostname = options.hostname.as_deref().unwrap_or(default_hostname);
    let name = ServerName::try_from(hostname.to_owned()).map_err(|error| {
        BlockError::unsupported("start TLS", format!("host name {hostname:?}: {error}"))
    })?;
    let failed = |error: io::Error| BlockError::io(format!("start TLS with {hostname}"), error);
    let mut connection = ClientConnection::new(Arc::new(options.config()?), name)
        .map_err(|error| failed(io::Error::other(error)))?;
    while connection.is_handshaking() {
        let (read, written) = connection.complete_io(stream).map_err(failed)?;
        if read == 0 && written == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(connection)
}

/// Makes TLS on a stream whose client has sent `NBD_OPT_STARTTLS` and got its answer.
pub(crate) fn server_handshake(
    config: &Arc<ServerConfig>,
    stream: &mut (impl io::Read + io::Write),
) -> io::Result<ServerConnection> {
    let mut connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        let (read, written) = connection.complete_io(stream)?;
        if read == 0 && written == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(connection)
}
