//! Connections: TLS by rustls with ring, trusting the system's authorities or those of a file.

use crate::credentials::variable;
use crate::endpoint::Endpoint;
use crate::options::S3Options;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vmtide_repo::{RepoError, Result};

/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection is kept for the next request. Servers and load balancers drop them after
/// 20 s to some minutes; a request on a dropped one costs a retry.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// The client that all requests of a store go through.
///
/// # Errors
/// [`RepoError::Invalid`] where no authorities are found; those of reading the file.
pub(crate) fn client(options: &S3Options, endpoint: &Endpoint) -> Result<reqwest::Client> {
    let ca_file = options.ca_file.clone().or_else(|| variable("AWS_CA_BUNDLE").map(PathBuf::from));
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls(ca_file.as_deref())?)
        .user_agent(concat!("vmtide/", env!("CARGO_PKG_VERSION")))
        // A redirect means that the bucket is elsewhere: that is said, with where.
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .tcp_nodelay(true)
        .http1_only()
        // No timeout for reading: that of reqwest runs while content is sent, too, and would end
        // every long one. The client looks after what moves.
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT);
    if endpoint.is_loopback {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|error| RepoError::Invalid(format!("set up the connection to S3: {error}")))
}

fn tls(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let mut authorities = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let unusable = |error: &dyn std::fmt::Display| {
                RepoError::Invalid(format!("CA file {}: {error}", path.display()))
            };
            let pem = std::fs::read(path)
                .map_err(|error| RepoError::io(format!("read {}", path.display()), error))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|error| unusable(&error))?;
                authorities.add(certificate).map_err(|error| unusable(&error))?;
            }
            if authorities.is_empty() {
                return Err(unusable(&"no certificate in it"));
            }
        }
        // Where the system has none, HTTPS fails with a message of its own; HTTP needs none.
        None => {
            authorities.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| RepoError::Invalid(format!("set up TLS: {error}")))?
        .with_root_certificates(authorities)
        .with_no_client_auth();
    Ok(config)
}
