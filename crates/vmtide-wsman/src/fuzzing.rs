//! What the fuzz targets call: the parsers of what a host sends, which must neither panic nor take much memory,
//! whatever comes. The tests run them over seeds and mutations of them.

use crate::auth::{Context, Mechanism, sealed, ticket_refusal};
use crate::fault::{self, Asked};
use crate::options::{Credentials, WsmanOptions};
use crate::{answer, binding, xml};
use std::time::Duration;
use vmtide_sspi::der;
use zeroize::Zeroizing;

/// An answer: as a tree, as a batch, a result of a method, a fault.
pub fn answers(input: &[u8]) {
    let Ok(envelope) = xml::parse(input) else { return };
    let Ok(Some(body)) = answer::body(&envelope, None) else { return };
    let asked = Asked { peer: "p", action: "a", timeout: Duration::ZERO, max_envelope_bytes: 1 };
    let text = fault::error(body, &asked).to_string();
    assert!(!text.contains('\n') && text.len() < 8192);
    if let Ok(batch) = answer::batch(body, r"root\virtualization\v2", "Msvm_X") {
        for path in batch.instances.iter().filter_map(|instance| instance.path.as_ref()) {
            let _ = path.to_string();
        }
    }
    let _ = answer::instance(body, "");
    let _ = answer::method_output(body, "M");
}

/// What comes before a user is known: sealed messages, tokens of SPNEGO, challenges of NTLM, certificates.
pub fn tokens(input: &[u8]) {
    if let Ok(parts) = sealed::read(input) {
        assert!(parts.signature.len() + parts.data.len() < input.len());
    }
    let _ = der::mechanism_token(input);
    let _ = binding::binding_hash(input);
    let _ = ticket_refusal(input);
    let Ok(credentials) = Credentials::new("u", Zeroizing::new("p".into())) else { return };
    let options = WsmanOptions::new("h");
    if let Ok(mut context) = Context::new(Mechanism::Ntlm, &options, &credentials, None)
        && context.step(None).is_ok()
        && context.step(Some(input)).is_ok()
    {
        let (signature, data) = input.split_at(input.len().min(16));
        assert!(context.unseal(signature, data).is_err());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Runs a target over the seed in the tree, its prefixes, and the seed with single bytes changed.
    fn mutate(target: fn(&[u8]), directory: &str, name: &str, seed: &[u8]) {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(directory);
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&home).unwrap();
            std::fs::write(home.join(name), seed).unwrap();
        }
        let kept = std::fs::read(home.join(name)).unwrap_or_default();
        assert!(
            kept == seed,
            "{directory}/{name}: another seed is kept; VMTIDE_WRITE_SEEDS=1 writes them anew"
        );
        target(seed);
        for length in 0..seed.len() {
            target(&seed[..length]);
            for value in [0, 0xff, seed[length].wrapping_add(1)] {
                let mut changed = seed.to_vec();
                changed[length] = value;
                target(&changed);
            }
        }
    }

    #[test]
    fn answers_of_all_kinds() {
        let wrap = |body: &str| {
            format!("<s:Envelope xmlns:s=\"e\"><s:Header/><s:Body>{body}</s:Body></s:Envelope>")
        };
        for (name, body) in [
            (
                "batch",
                "<n:PullResponse><n:Items><w:Item><p:Msvm_X xsi:type=\"p:Msvm_Y_Type\"><p:InstanceID>A&amp;B</p:InstanceID>\
                 <p:N xsi:nil=\"true\"/><p:T><c:Datetime>2026-11-21T12:30:00.5+01:00</c:Datetime></p:T><p:L>1</p:L><p:L>2</p:L>\
                 </p:Msvm_X></w:Item></n:Items><n:EnumerationContext>uuid:1</n:EnumerationContext></n:PullResponse>",
            ),
            (
                "method",
                "<p:M_OUTPUT><p:Job><a:Address>x</a:Address><a:ReferenceParameters>\
                 <w:ResourceURI>http://h/wbem/wsman/1/wmi/root/virtualization/v2/Msvm_ConcreteJob</w:ResourceURI>\
                 <w:SelectorSet><w:Selector Name=\"InstanceID\">J</w:Selector></w:SelectorSet></a:ReferenceParameters></p:Job>\
                 <p:S><![CDATA[<INSTANCE/>]]></p:S><p:ReturnValue>4096</p:ReturnValue></p:M_OUTPUT>",
            ),
            (
                "fault",
                "<s:Fault><s:Code><s:Subcode><s:Value>w:InternalError</s:Value></s:Subcode></s:Code><s:Reason><s:Text>r</s:Text></s:Reason>\
                 <s:Detail><f:WSManFault Code=\"1\"><f:Message><f:ProviderFault><f:WSManFault Code=\"-5\"><f:Message>m</f:Message>\
                 </f:WSManFault></f:ProviderFault></f:Message></f:WSManFault></s:Detail></s:Fault>",
            ),
        ] {
            mutate(answers, "wsman_answers", name, wrap(body).as_bytes());
        }
    }

    #[test]
    fn tokens_of_all_kinds() {
        mutate(
            tokens,
            "wsman_tokens",
            "sealed",
            &sealed::write("p", b"0123456789abcdef", b"data", 4),
        );
        mutate(
            tokens,
            "wsman_tokens",
            "spnego",
            &[0xa1, 9, 0x30, 7, 0xa2, 5, 4, 3, b'a', b'b', b'c'],
        );
        // A host's word that a ticket has expired (KRB-ERROR within GSSAPI, RFC 4121 4.1).
        let refusal = b"\x60\x4c\x06\x09\x2a\x86\x48\x86\xf7\x12\x01\x02\x02\x03\x00\x7e\x3d\x30\x3b\
            \xa0\x03\x02\x01\x05\xa1\x03\x02\x01\x1e\xa4\x11\x18\x0f20261121123000Z\xa5\x03\x02\x01\x00\
            \xa6\x03\x02\x01\x20\xa9\x05\x1b\x03LAB\xaa\x0b\x30\x09\xa0\x03\x02\x01\x02\xa1\x02\x30\x00";
        assert!(ticket_refusal(refusal).is_some());
        mutate(tokens, "wsman_tokens", "refusal", refusal);
        // A challenge (MS-NLMP 2.2.1.2): flags for Unicode, sealing and keys, target "H", a time.
        let mut challenge = b"NTLMSSP\0\x02\0\0\0\x02\0\x02\0\x38\0\0\0\x35\x82\x88\xe2\x01\x23\x45\x67\x89\xab\xcd\xef".to_vec();
        challenge.extend([0; 8]);
        challenge
            .extend([0x10, 0, 0x10, 0, 0x3a, 0, 0, 0, 10, 0, 0x63, 0x45, 0, 0, 0, 15, b'H', 0]);
        challenge.extend([7, 0, 8, 0, 1, 2, 3, 4, 5, 6, 7, 1, 0, 0, 0, 0]);
        mutate(tokens, "wsman_tokens", "challenge", &challenge);
    }
}
