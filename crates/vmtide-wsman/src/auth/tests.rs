//! Contexts against the library's own other side; against others see `tests/`.

use super::*;
use sspi::{AuthIdentity, CredentialUse, ServerRequestFlags, Username};

fn options(user: &str, host: &str) -> WsmanOptions {
    let credentials = Credentials::new(user, Zeroizing::new("Pass-w0rd".into())).unwrap();
    WsmanOptions { credentials: Some(credentials), ..WsmanOptions::new(host) }
}

fn context(password: &str, binding: Option<&[u8]>) -> Context {
    let credentials = Credentials::new(r"LAB\user", Zeroizing::new(password.into())).unwrap();
    Context::new(Mechanism::Ntlm, &options(r"LAB\user", "hv1"), &credentials, binding).unwrap()
}

/// The accepting side's next token, by sspi's own server.
fn accept(server: &mut Ntlm, identity: &AuthIdentity, token: Vec<u8>) -> sspi::Result<Vec<u8>> {
    let mut handle = server
        .acquire_credentials_handle()
        .with_credential_use(CredentialUse::Inbound)
        .with_auth_data(identity)
        .execute(server)?
        .credentials_handle;
    let mut input = vec![SecurityBuffer::new(token, BufferType::Token)];
    let mut output = vec![SecurityBuffer::new(Vec::new(), BufferType::Token)];
    let builder = server
        .accept_security_context()
        .with_credentials_handle(&mut handle)
        .with_context_requirements(ServerRequestFlags::CONFIDENTIALITY)
        .with_target_data_representation(DataRepresentation::Native)
        .with_input(&mut input)
        .with_output(&mut output);
    server.accept_security_context_impl(builder)?.resolve_to_result()?;
    Ok(output.remove(0).buffer)
}

/// Both sides, authenticated.
fn connected(password: &str) -> sspi::Result<(Context, Ntlm)> {
    let identity = AuthIdentity {
        username: Username::new("user", Some("LAB")).unwrap(),
        password: String::from("Pass-w0rd").into(),
    };
    let mut client = context(password, None);
    let mut server = Ntlm::new();
    let negotiate = client.step(None).unwrap();
    assert!(negotiate.starts_with(b"NTLMSSP\0\x01"));
    let challenge = accept(&mut server, &identity, negotiate)?;
    let authenticate = client.step(Some(&challenge)).unwrap();
    assert!(authenticate.starts_with(b"NTLMSSP\0\x03"));
    accept(&mut server, &identity, authenticate)?;
    server.complete_auth_token(&mut [])?;
    Ok((client, server))
}

#[test]
fn messages_are_sealed_and_opened_in_their_order() {
    let (mut client, mut server) = connected("Pass-w0rd").unwrap();
    for text in [&b"one"[..], b"", b"and two"] {
        let (mut signature, mut data) = client.seal(text).unwrap();
        assert!(text.is_empty() || data != text);
        let mut buffers =
            [SecurityBufferRef::token_buf(&mut signature), SecurityBufferRef::data_buf(&mut data)];
        server.decrypt_message(&mut buffers).unwrap();
        assert_eq!(buffers[1].data(), text);
    }
    let mut answer = |text: &[u8]| {
        let (mut signature, mut data) = (vec![0; 16], text.to_vec());
        let mut buffers =
            [SecurityBufferRef::token_buf(&mut signature), SecurityBufferRef::data_buf(&mut data)];
        server.encrypt_message(sspi::EncryptionFlags::empty(), &mut buffers).unwrap();
        (signature, data)
    };
    let (signature, data) = answer(b"answer");
    assert_eq!(client.unseal(&signature, &data).unwrap(), b"answer");
    // The same again is a replay; a changed bit is a forgery; neither is read.
    assert!(client.unseal(&signature, &data).is_err());
}

#[test]
fn changed_messages_are_not_read() {
    for change in 0..3 {
        let (mut client, mut server) = connected("Pass-w0rd").unwrap();
        let (mut signature, mut data) = (vec![0; 16], b"answer".to_vec());
        let mut buffers =
            [SecurityBufferRef::token_buf(&mut signature), SecurityBufferRef::data_buf(&mut data)];
        server.encrypt_message(sspi::EncryptionFlags::empty(), &mut buffers).unwrap();
        match change {
            0 => data[0] ^= 1,
            1 => signature[4] ^= 1,
            _ => signature.truncate(15),
        }
        assert!(matches!(client.unseal(&signature, &data), Err(AuthError::Broken(_))), "{change}");
    }
}

#[test]
fn wrong_passwords_do_not_open() {
    assert!(connected("wrong").is_err());
}

#[test]
fn the_connection_is_bound() {
    let find =
        |haystack: &[u8], needle: &[u8]| haystack.windows(needle.len()).position(|w| w == needle);
    let mut server = Ntlm::new();
    let identity = AuthIdentity {
        username: Username::new("user", Some("LAB")).unwrap(),
        password: String::from("Pass-w0rd").into(),
    };
    let mut client = context("Pass-w0rd", Some(b"tls-server-end-point:0123"));
    let challenge = accept(&mut server, &identity, client.step(None).unwrap()).unwrap();
    let authenticate = client.step(Some(&challenge)).unwrap();
    // MsvAvChannelBindings (10) of 16 bytes: the MD5 of gss_channel_bindings with 25 bytes of data, and nothing else.
    let at = find(&authenticate, &[10, 0, 16, 0]).unwrap() + 4;
    let hex: String = authenticate[at..at + 16].iter().map(|byte| format!("{byte:02x}")).collect();
    // By Python's hashlib.
    assert_eq!(hex, "c917854cec381e133949cc1766cc20a8");
    assert_eq!(
        security_channel_bindings(b"abc")[24..],
        [3, 0, 0, 0, 32, 0, 0, 0, b'a', b'b', b'c']
    );
}

#[test]
fn hostile_challenges_are_errors() {
    let mut server = Ntlm::new();
    let identity = AuthIdentity {
        username: Username::new("user", Some("LAB")).unwrap(),
        password: String::from("Pass-w0rd").into(),
    };
    let mut client = context("Pass-w0rd", None);
    let challenge = accept(&mut server, &identity, client.step(None).unwrap()).unwrap();
    for length in 0..challenge.len() {
        let mut client = context("Pass-w0rd", None);
        client.step(None).unwrap();
        // A challenge may be cut behind what is used of it; never is it a panic.
        let _ = client.step(Some(&challenge[..length]));
    }
    let mut client = context("Pass-w0rd", None);
    client.step(None).unwrap();
    assert!(client.step(Some(&vec![0; 200_000])).is_err());
}

#[test]
fn mechanisms_by_what_is_known() {
    use Mechanism::{Kerberos, Ntlm};
    let both = vec![Kerberos, Ntlm];
    assert_eq!(Mechanism::candidates(&options("u@lab.example", "hv1")), both);
    assert_eq!(Mechanism::candidates(&options("u@lab.example", "192.0.2.1")), [Ntlm]);
    assert_eq!(Mechanism::candidates(&options(r"LAB\u", "hv1")), [Ntlm]);
    let named = WsmanOptions { kdc: Some("dc1".into()), ..options(r"LAB\u", "hv1") };
    assert_eq!(Mechanism::candidates(&named), both);
    let only =
        WsmanOptions { authentication: Authentication::Ntlm, ..options("u@lab.example", "hv1") };
    assert_eq!(Mechanism::candidates(&only), [Ntlm]);
}
