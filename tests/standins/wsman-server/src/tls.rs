//! TLS of the server, with an authority of its own that is made at every start.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;

/// A certificate with its key, in PEM.
#[derive(Clone)]
pub struct Pem {
    /// The certificate.
    pub certificate: String,
    /// Its key in PKCS #8.
    pub key: String,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pem").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// The authority and the server's certificate.
pub struct Identity {
    authority: CertifiedIssuer<'static, KeyPair>,
    /// How connections are made private.
    pub config: Arc<ServerConfig>,
    /// The server's certificate in DER.
    pub certificate: Vec<u8>,
    /// Whether that is signed with SHA-384, not SHA-256.
    sha384: bool,
}

impl Identity {
    /// Makes an authority and a certificate for these names and addresses.
    ///
    /// # Errors
    /// What the library does not take, in its words.
    pub fn make(names: &[String], client_certificates: bool, sha384: bool) -> Result<Self, String> {
        let refused = |error: rcgen::Error| error.to_string();
        let mut params = params(&[], "vmtide stand-in authority").map_err(refused)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // The hash of a signature goes with the authority's curve.
        let algorithm =
            if sha384 { &rcgen::PKCS_ECDSA_P384_SHA384 } else { &rcgen::PKCS_ECDSA_P256_SHA256 };
        let key = KeyPair::generate_for(algorithm).map_err(refused)?;
        let authority = CertifiedIssuer::self_signed(params, key).map_err(refused)?;
        let key = KeyPair::generate().map_err(refused)?;
        let mut params = self::params(names, "vmtide stand-in WinRM").map_err(refused)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &authority).map_err(refused)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = config(&provider, &authority, client_certificates)?
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .map_err(|error| error.to_string())?;
        Ok(Self {
            authority,
            config: Arc::new(config),
            certificate: certificate.der().to_vec(),
            sha384,
        })
    }

    /// The authority's certificate in PEM.
    pub fn authority_pem(&self) -> String {
        self.authority.pem()
    }

    /// A certificate that logs `user` in, and its fingerprint by which it is known later.
    ///
    /// # Errors
    /// What the library does not take, in its words.
    pub fn client(&self, user: &str) -> Result<(Pem, [u8; 32]), String> {
        let refused = |error: rcgen::Error| error.to_string();
        let key = KeyPair::generate().map_err(refused)?;
        let mut params = params(&[], user).map_err(refused)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.authority).map_err(refused)?;
        let pem = Pem { certificate: certificate.pem(), key: key.serialize_pem() };
        Ok((pem, sha256(certificate.der())))
    }

    /// The application data that binds a login to this server's TLS (RFC 5929 4.1).
    pub fn binding(&self) -> Vec<u8> {
        let mut data = b"tls-server-end-point:".to_vec();
        let hash = if self.sha384 { &ring::digest::SHA384 } else { &ring::digest::SHA256 };
        data.extend_from_slice(ring::digest::digest(hash, &self.certificate).as_ref());
        data
    }
}

fn params(names: &[String], common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2090, 1, 1);
    Ok(params)
}

fn config(
    provider: &Arc<CryptoProvider>,
    authority: &CertifiedIssuer<'static, KeyPair>,
    client_certificates: bool,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>, String> {
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    if !client_certificates {
        return Ok(builder.with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).map_err(|error| error.to_string())?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| error.to_string())?;
    Ok(builder.with_client_cert_verifier(verifier))
}

/// The fingerprint by which a client's certificate is known.
pub fn fingerprint(certificates: Option<&[CertificateDer<'_>]>) -> Option<[u8; 32]> {
    certificates.and_then(<[_]>::first).map(|certificate| sha256(certificate))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    out
}
