//! TLS by rustls with ring, to exactly the host that is meant.
//!
//! Hosts mostly have certificates that they made themselves or that the company's authority made. The first are
//! pinned by their fingerprint, the others checked as usual. The fingerprint that was seen is kept, so that an error
//! can say which it was.

use crate::options::{Fingerprint, OptionsError, WsmanOptions};
use crate::{binding, certificate};
use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::path::Path;
use std::sync::Arc;

/// A certificate that a host showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub fingerprint: Fingerprint,
    /// When it ends, in seconds since 1970, where it says so.
    pub end_unix_s: Option<i64>,
}

/// The certificate that the host showed last.
pub(crate) type Seen = Arc<Mutex<Option<Shown>>>;

/// What connections are made with.
pub(crate) struct Tls {
    pub config: Arc<ClientConfig>,
    pub seen: Seen,
}

impl Tls {
    /// # Errors
    /// Where files cannot be read or hold nothing of use, or nobody is trusted.
    pub fn new(options: &WsmanOptions) -> Result<Self, OptionsError> {
        let seen = Seen::default();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier {
            expected: match options.fingerprint {
                Some(fingerprint) => Expected::Fingerprint(fingerprint),
                None => Expected::Authorities(authorities(options.ca_file.as_deref(), &provider)?),
            },
            seen: Arc::clone(&seen),
            provider: Arc::clone(&provider),
        };
        let unusable = |error: rustls::Error| OptionsError::usage(format!("set up TLS: {error}"));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &options.client_certificate {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let chain = certificates(&files.certificate)?;
                let key = PrivateKeyDer::from_pem_file(&files.key)
                    .map_err(|error| OptionsError::file(&files.key, error))?;
                builder.with_client_auth_cert(chain, key).map_err(unusable)?
            }
        };
        // A session that is taken up again shows no certificate, and bindings need it.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self { config: Arc::new(config), seen })
    }

    /// What is wrong with the host's certificate, where `error` is about TLS; and whether trust is the matter.
    pub fn explain(
        &self,
        error: &std::io::Error,
        pinned: Option<Fingerprint>,
    ) -> Option<(bool, String)> {
        let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        let rustls::Error::InvalidCertificate(reason) = inner else {
            return Some((false, format!("no TLS connection: {inner}")));
        };
        let shown = self
            .seen
            .lock()
            .map_or_else(|| "no certificate".to_owned(), |seen| seen.fingerprint.to_string());
        let text = match pinned {
            Some(expected) => format!(
                "it is {shown} and not {expected}: either it was made anew, or this is another host that poses as it"
            ),
            None => format!(
                "{reason:?}; if the host made it itself and {shown} is its fingerprint, set VMTIDE_WINRM_FINGERPRINT \
                 to that, else give its authority with VMTIDE_WINRM_CA_FILE"
            ),
        };
        Some((true, text))
    }
}

/// The certificates of a PEM file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OptionsError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| OptionsError::file(path, error))?;
    if found.is_empty() { Err(OptionsError::file(path, "no certificate in it")) } else { Ok(found) }
}

fn authorities(
    ca_file: Option<&Path>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, OptionsError> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| OptionsError::file(path, error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().map_err(|_| {
        OptionsError::usage(
            "this system has no trusted authorities: give the fingerprint of the host's certificate \
             (VMTIDE_WINRM_FINGERPRINT), or a file of authorities (VMTIDE_WINRM_CA_FILE)",
        )
    })
}

/// What ties the authentication to the TLS connection to this certificate (RFC 5929). Hosts can require it.
pub(crate) fn channel_binding(certificate: &[u8]) -> Vec<u8> {
    let digest = ring::digest::digest(binding::binding_hash(certificate), certificate);
    [&b"tls-server-end-point:"[..], digest.as_ref()].concat()
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
    ) -> Result<ServerCertVerified, rustls::Error> {
        let digest = ring::digest::digest(&ring::digest::SHA256, end_entity.as_ref());
        let mut shown = Fingerprint([0; 32]);
        for (to, from) in shown.0.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        let end_unix_s = certificate::end_unix_s(end_entity.as_ref());
        *self.seen.lock() = Some(Shown { fingerprint: shown, end_unix_s });
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
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
