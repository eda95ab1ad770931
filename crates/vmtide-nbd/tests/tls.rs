//! TLS, ours against ours and against QEMU and libnbd.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and the numbers here are small"
)]

use crate::support;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::sync::Arc;
use support::{Lab, noise, run, tool};
use vmtide_block::{BlockDevice, BlockError, MemoryDevice, WritableBlockDevice};
use vmtide_nbd::{
    Export, NbdDevice, NbdOptions, NbdServer, NbdUrl, ServerHandle, ServerOptions,
    TlsServerOptions, list_exports,
};

/// Makes an authority with certificates for a server and a client, in the usual file names.
fn certificates(lab: &Lab, directory: &str) -> String {
    let directory = lab.path(directory);
    std::fs::create_dir(&directory).unwrap();
    let named = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let authority_key = KeyPair::generate().unwrap();
    let mut params = named("test authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = params.self_signed(&authority_key).unwrap();
    std::fs::write(directory.join("ca-cert.pem"), authority.pem()).unwrap();
    let issuer = Issuer::new(params, authority_key);
    for (who, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, who);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        std::fs::write(directory.join(format!("{who}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(directory.join(format!("{who}-key.pem")), key.serialize_pem()).unwrap();
    }
    directory.display().to_string()
}

fn serve(lab: &Lab, directory: &str, memory: Arc<MemoryDevice>) -> ServerHandle {
    let options = ServerOptions {
        tls: Some(TlsServerOptions::in_directory(directory, true)),
        ..ServerOptions::default()
    };
    NbdServer::new()
        .options(options)
        .export(Export::writable(memory).named("disk"))
        .listen_unix(lab.path("s"))
        .unwrap()
}

fn url(server: &ServerHandle, directory: &str) -> NbdUrl {
    let mut url = server.url();
    assert!(url.tls);
    url.tls_certificates = Some(directory.into());
    url
}

#[test]
fn many_threads_read_and_write_over_tls() {
    let lab = Lab::new();
    let directory = certificates(&lab, "pki");
    let memory = Arc::new(MemoryDevice::new(8 << 20));
    let server = serve(&lab, &directory, memory.clone());
    let url = url(&server, &directory);
    assert_eq!(list_exports(&url, &NbdOptions::default()).unwrap()[0].name, "disk");
    for connections in [1, 3] {
        let options = NbdOptions { connections, ..NbdOptions::default() };
        let disk = NbdDevice::connect(&url, &options).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let disk = &disk;
                scope.spawn(move || {
                    let base = thread << 21;
                    for step in 0..4 {
                        let data = noise((2 << 20) - 77, thread * 10 + step);
                        disk.write_at(&data, base).unwrap();
                        let mut got = vec![0; data.len()];
                        disk.read_at(&mut got, base).unwrap();
                        assert!(got == data);
                    }
                });
            }
        });
    }
}

#[test]
fn who_is_not_trusted_gets_nothing() {
    let lab = Lab::new();
    let directory = certificates(&lab, "pki");
    let other = certificates(&lab, "other");
    let server = serve(&lab, &directory, Arc::new(MemoryDevice::new(4096)));
    let connect = |url: &NbdUrl| NbdDevice::connect(url, &NbdOptions::default());
    // No TLS: refused with the way out.
    let plain = NbdUrl::unix(lab.text("s"), "disk");
    let error = connect(&plain).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::PermissionDenied));
    assert!(error.to_string().contains("nbds"), "{error}");
    // A server signed by somebody else, and a server of another name.
    assert!(connect(&url(&server, &other)).is_err());
    let mut misnamed = url(&server, &directory);
    misnamed.tls_hostname = Some("example.com".to_owned());
    assert!(connect(&misnamed).is_err());
    // A client without a certificate.
    std::fs::remove_file(format!("{directory}/client-cert.pem")).unwrap();
    assert!(connect(&url(&server, &directory)).is_err());
}

#[test]
fn an_unverified_server_is_used_only_when_told_so() {
    let lab = Lab::new();
    let directory = certificates(&lab, "pki");
    let server = serve(&lab, &directory, Arc::new(MemoryDevice::new(4096)));
    let mut unverified = url(&server, &directory);
    unverified.tls_hostname = Some("example.com".to_owned());
    unverified.tls_verify_peer = false;
    let disk = NbdDevice::connect(&unverified, &NbdOptions::default()).unwrap();
    assert_eq!(disk.size_bytes(), 4096);
}

#[test]
fn our_client_reads_from_qemu_nbd_over_tls() {
    let lab = Lab::new();
    let directory = certificates(&lab, "pki");
    let bytes = noise(5 << 20, 1);
    std::fs::write(lab.path("disk.raw"), &bytes).unwrap();
    let credentials =
        format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={directory}");
    let _server =
        lab.qemu_nbd("disk.raw", "raw", &["-r", "--object", &credentials, "--tls-creds", "tls0"]);
    let mut url = lab.url("");
    url.tls = true;
    url.tls_certificates = Some(directory.into());
    let disk = NbdDevice::connect(&url, &NbdOptions::default()).unwrap();
    let mut got = vec![0; bytes.len()];
    disk.read_at(&mut got, 0).unwrap();
    assert!(got == bytes);
    url.tls = false;
    let error = NbdDevice::connect(&url, &NbdOptions::default()).unwrap_err();
    assert!(matches!(error, BlockError::Io { .. }), "{error}");
}

#[test]
fn nbdcopy_reads_from_our_server_over_tls() {
    let lab = Lab::new();
    let directory = certificates(&lab, "pki");
    let bytes = noise(3 << 20, 2);
    let memory = Arc::new(MemoryDevice::from_bytes(bytes.clone()));
    let server = serve(&lab, &directory, memory);
    let out = lab.text("out.raw");
    let mut url = url(&server, &directory);
    url.tls_hostname = Some("localhost".to_owned());
    run(tool("nbdcopy").args([&url.to_string(), &out]));
    assert!(std::fs::read(out).unwrap() == bytes);
}
