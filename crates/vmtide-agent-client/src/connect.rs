//! Connections: TLS by rustls with ring, to exactly the agent that is meant.
//!
//! An agent makes its certificate itself at its first start and shows the fingerprint, so the usual way is to
//! pin that. Whoever has authorities of their own gives their file, or has them in the system. The fingerprint
//! that was seen is kept, so that an error can say which it was.

use crate::options::{AgentOptions, Fingerprint};
use crate::{AgentError, Result};
use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long an agent may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection is kept for the next request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections kept for the next requests: as many as a job has workers, with room.
const IDLE_CONNECTIONS: usize = 64;

/// The fingerprint of the certificate that the agent showed last.
pub(crate) type Seen = Arc<Mutex<Option<Fingerprint>>>;

/// The HTTP client, and where it notes the certificates it is shown.
///
/// # Errors
/// [`AgentError::Usage`] where no authorities are found and none is needed; those of reading the file.
pub(crate) fn http_client(options: &AgentOptions) -> Result<(reqwest::Client, Seen)> {
    let seen = Seen::default();
    let unusable =
        |error: &dyn std::fmt::Display| AgentError::usage(format!("set up TLS: {error}"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier {
        expected: match options.fingerprint {
            Some(fingerprint) => Expected::Fingerprint(fingerprint),
            None => Expected::Authorities(authorities(options.ca_file.as_deref(), &provider)?),
        },
        seen: Arc::clone(&seen),
        provider: Arc::clone(&provider),
    };
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let http = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("vmtide/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .tcp_nodelay(true)
        .http1_only()
        // Agents are hosts of one's own network; a proxy would only see whole disks pass.
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .build()
        .map_err(|error| unusable(&error))?;
    Ok((http, seen))
}

fn authorities(
    ca_file: Option<&Path>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca_file {
        let unusable = |error: &dyn std::fmt::Display| {
            AgentError::usage(format!("CA file {}: {error}", path.display()))
        };
        let pem = std::fs::read(path).map_err(|source| AgentError::Io {
            context: format!("read {}", path.display()),
            source,
        })?;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| unusable(&error))?;
            roots.add(certificate).map_err(|error| unusable(&error))?;
        }
        if roots.is_empty() {
            return Err(unusable(&"no certificate in it"));
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().map_err(|_| {
        AgentError::usage(
            "this system has no trusted authorities: give the fingerprint of the agent's certificate \
             (VMTIDE_AGENT_FINGERPRINT), or a file of authorities (VMTIDE_AGENT_CA_FILE)",
        )
    })
}

#[derive(Debug)]
enum Expected {
    Fingerprint(Fingerprint),
    Authorities(Arc<WebPkiServerVerifier>),
}

/// Takes the certificate that is expected, and notes which one came.
#[derive(Debug)]
struct Verifier {
    expected: Expected,
    seen: Seen,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let digest = ring::digest::digest(&ring::digest::SHA256, end_entity.as_ref());
        let mut shown = Fingerprint([0; 32]);
        for (to, from) in shown.0.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        *self.seen.lock() = Some(shown);
        match &self.expected {
            Expected::Fingerprint(expected) if *expected == shown => {
                Ok(ServerCertVerified::assertion())
            }
            Expected::Fingerprint(_) => Err(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            Expected::Authorities(inner) => {
                inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What is wrong with the agent's certificate, where `error` is about that: no retry mends it.
pub(crate) fn certificate_error(
    error: &(dyn std::error::Error + 'static),
    options: &AgentOptions,
    seen: &Seen,
) -> Option<String> {
    let inner = find_tls_error(error)?;
    let shown = seen.lock().map_or_else(|| "no certificate".to_owned(), |seen| seen.to_string());
    let rustls::Error::InvalidCertificate(reason) = inner else {
        return Some(format!("no TLS connection: {inner}"));
    };
    Some(match options.fingerprint {
        Some(expected) => format!(
            "its certificate is {shown} and not {expected}: either it was made anew (the agent prints its \
             fingerprint at its start), or this is another host that poses as the agent"
        ),
        None => format!(
            "its certificate is not trusted: {reason:?}; if the agent made it itself and printed {shown}, set \
             VMTIDE_AGENT_FINGERPRINT to that, else give its authority with VMTIDE_AGENT_CA_FILE"
        ),
    })
}

fn find_tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An io::Error is transparent to `source`: what it wraps has to be taken out.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        current = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
