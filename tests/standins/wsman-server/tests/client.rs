//! vmtide's own client against the stand-in: logins, operations, and what each kind of failure is told as.
//!
//! That both understand each other proves little by itself; `tests/wsman` tries the stand-in with clients that have
//! nothing to do with vmtide.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;
use std::time::Duration;
use vmtide_cim::{
    Association, Cim, CimError, CimType, CimValue, ObjectPath, VIRTUALIZATION_NAMESPACE,
};
use vmtide_wsman::{
    Authentication, ClientCertificate, Credentials, Fingerprint, Scheme, WsmanCim, WsmanOptions,
};
use wsman_server::sample::{self, World};
use wsman_server::{ChannelBinding, Effect, Operation, Server, ServerOptions, Switch, User};
use zeroize::Zeroizing;

const USER: &str = "Jörg";
const PASSWORD: &str = "Pässw0rd €";

struct Lab {
    world: Arc<World>,
    server: Server,
    place: tempfile::TempDir,
}

impl Lab {
    fn new(disks: usize, change: impl FnOnce(&mut ServerOptions)) -> Self {
        let mut options = ServerOptions {
            users: vec![User::new(USER, PASSWORD), User::without_rights("guest", "guest")],
            ..ServerOptions::default()
        };
        change(&mut options);
        let world = World::new(disks);
        let server = Server::start(options, world.clone(), Arc::new(sample::schema())).unwrap();
        let place = tempfile::tempdir().unwrap();
        if let Some(pem) = server.authority_pem() {
            std::fs::write(place.path().join("authority.pem"), pem).unwrap();
        }
        Self { world, server, place }
    }

    fn http() -> Self {
        Self::new(5, |_| {})
    }

    fn https(change: impl FnOnce(&mut ServerOptions)) -> Self {
        Self::new(5, |options| {
            options.tls_names = Some(vec!["127.0.0.1".into(), "localhost".into()]);
            change(options);
        })
    }

    fn options(&self) -> WsmanOptions {
        let mut options = WsmanOptions::new("127.0.0.1");
        options.port = Some(self.server.address().port());
        options.credentials = Some(credentials(USER, PASSWORD));
        options.authentication = Authentication::Ntlm;
        options.operation_timeout = Duration::from_secs(20);
        if self.server.authority_pem().is_some() {
            options.scheme = Scheme::Https;
            options.ca_file = Some(self.place.path().join("authority.pem"));
        }
        options
    }

    fn client(&self, change: impl FnOnce(&mut WsmanOptions)) -> WsmanCim {
        let mut options = self.options();
        change(&mut options);
        WsmanCim::new(options).unwrap()
    }

    fn how(&self) -> &'static str {
        self.server.log().last().unwrap().user.clone().unwrap().1
    }
}

fn credentials(user: &str, password: &str) -> Credentials {
    Credentials::new(user, Zeroizing::new(password.into())).unwrap()
}

fn disk(number: usize) -> ObjectPath {
    ObjectPath::new("Sample_Disk", &[("InstanceID", &format!(r"Sample:disk\{number}"))])
}

fn service() -> ObjectPath {
    ObjectPath::new(
        "Sample_Service",
        &[("CreationClassName", "Sample_Service"), ("Name", "sample")],
    )
}

fn want_disk(found: &vmtide_cim::CimInstance, number: usize) {
    assert_eq!(found.class, "Sample_Disk");
    assert_eq!(found.text("InstanceID").unwrap(), format!(r"Sample:disk\{number}"));
    assert_eq!(found.number::<u64>("Size").unwrap(), (number as u64) << 40);
    assert_eq!(found.optional_bool("Enabled").unwrap(), Some(number.is_multiple_of(2)));
    assert_eq!(found.texts("Tags").unwrap(), ["<first>", "zweites & drittes", "日本語"]);
    assert_eq!(found.numbers("Offsets").unwrap(), [u64::MAX]);
    assert_eq!(found.text("Created").unwrap(), "20261121120000.000000+000");
    let parent = found.optional_reference("Parent").unwrap();
    assert_eq!(parent, (number > 0).then(|| disk(number.saturating_sub(1))));
    assert_eq!(found.optional_text("Missing").unwrap(), None);
}

fn try_it(client: &WsmanCim) {
    for number in 0..3 {
        want_disk(&client.get(&disk(number)).unwrap(), number);
    }
}

#[test]
fn ntlm_over_http_seals_every_message() {
    let lab = Lab::http();
    try_it(&lab.client(|_| {}));
    assert_eq!(lab.how(), "NTLM");
    assert!(
        lab.server
            .log()
            .iter()
            .filter(|seen| seen.operation == Some(Operation::Get))
            .all(|seen| seen.sealed)
    );
    try_it(&lab.client(|options| options.authentication = Authentication::Negotiate));
    assert_eq!(lab.how(), "NTLM");
}

#[test]
fn logins_over_tls_are_bound_to_it() {
    let lab = Lab::https(|options| options.channel_binding = ChannelBinding::Strict);
    try_it(&lab.client(|_| {}));
    try_it(&lab.client(|options| options.authentication = Authentication::Negotiate));
    let fingerprint = ring_sha256(lab.server.certificate_der().unwrap());
    try_it(&lab.client(|options| {
        options.ca_file = None;
        options.fingerprint = Some(Fingerprint(fingerprint));
    }));
}

fn ring_sha256(bytes: &[u8]) -> [u8; 32] {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().try_into().unwrap()
}

#[test]
fn basic_and_certificates_over_tls() {
    let lab = Lab::https(|options| {
        options.basic = true;
        options.certificates = true;
    });
    try_it(&lab.client(|options| options.authentication = Authentication::Basic));
    assert_eq!(lab.how(), "Basic");
    let pem = lab.server.client_certificate(USER).unwrap();
    let (certificate, key) = (lab.place.path().join("c.pem"), lab.place.path().join("c.key"));
    std::fs::write(&certificate, pem.certificate).unwrap();
    std::fs::write(&key, pem.key).unwrap();
    try_it(&lab.client(|options| {
        options.authentication = Authentication::Certificate;
        options.client_certificate = Some(ClientCertificate { certificate, key });
    }));
    assert_eq!(lab.how(), "Certificate");
}

#[test]
fn every_way_not_to_get_in_is_told_apart() {
    let lab = Lab::http();
    let error = |change: &dyn Fn(&mut WsmanOptions)| lab.client(change).get(&disk(1)).unwrap_err();
    for authentication in [Authentication::Ntlm, Authentication::Negotiate] {
        let wrong = error(&|options| {
            options.authentication = authentication;
            options.credentials = Some(credentials(USER, "wrong"));
        });
        assert!(matches!(wrong, CimError::Login { .. }), "{wrong}");
        assert!(!wrong.to_string().contains("wrong\""), "{wrong}");
    }
    let nobody = error(&|options| options.credentials = Some(credentials("nobody", "x")));
    assert!(matches!(nobody, CimError::Login { .. }), "{nobody}");
    let guest = error(&|options| options.credentials = Some(credentials("guest", "guest")));
    assert!(matches!(guest, CimError::Denied { .. }), "{guest}");
    let secured = Lab::https(|_| {});
    let untrusted = secured.client(|options| options.ca_file = None).get(&disk(1)).unwrap_err();
    assert!(matches!(untrusted, CimError::Untrusted { .. }), "{untrusted}");
    let pinned = secured.client(|options| options.fingerprint = Some(Fingerprint([1; 32])));
    let pinned = pinned.get(&disk(1)).unwrap_err();
    assert!(matches!(pinned, CimError::Untrusted { .. }), "{pinned}");
    assert!(secured.server.log().is_empty(), "something was sent to a host that is not trusted");
    let options = lab.options();
    drop(lab);
    let down = WsmanCim::new(options).unwrap().get(&disk(1)).unwrap_err();
    assert!(matches!(down, CimError::Unreachable { before_request: true, .. }), "{down}");
}

#[test]
fn a_host_that_wants_bindings_refuses_a_login_from_elsewhere() {
    let lab = Lab::https(|options| options.basic = false);
    let refused = lab
        .client(|options| options.authentication = Authentication::Basic)
        .get(&disk(1))
        .unwrap_err();
    assert!(matches!(refused, CimError::Login { .. }), "{refused}");
}

#[test]
fn queries_come_in_batches_that_fit() {
    let lab = Lab::new(400, |_| {});
    for (envelope, least) in [(8192, 50), (153_600, 4)] {
        let client = lab.client(|options| options.max_envelope_bytes = envelope);
        let before = lab.server.log().len();
        let found = client.query(VIRTUALIZATION_NAMESPACE, "SELECT * FROM Sample_Disk").unwrap();
        assert_eq!(found.len(), 400);
        for (number, found) in found.iter().enumerate() {
            want_disk(found, number);
        }
        let parts = lab.server.log().len() - before;
        assert!(parts >= least, "{parts} requests for envelopes of {envelope} bytes");
    }
    let small = lab.client(|options| options.max_result_bytes = 100_000);
    let error = small.query(VIRTUALIZATION_NAMESPACE, "SELECT * FROM Sample_Disk").unwrap_err();
    assert!(matches!(error, CimError::TooLarge { .. }), "{error}");
}

#[test]
fn queries_find_what_they_name() {
    let lab = Lab::http();
    let client = lab.client(|_| {});
    let query = |wql: &str| client.query(VIRTUALIZATION_NAMESPACE, wql);
    let id = vmtide_cim::wql::quote(r"Sample:disk\3");
    let found = query(&format!("SELECT * FROM Sample_Disk WHERE InstanceID = {id}")).unwrap();
    assert_eq!(found.len(), 1);
    want_disk(&found[0], 3);
    let none = query("SELECT * FROM Sample_Disk WHERE InstanceID = 'x'").unwrap();
    assert!(none.is_empty());
    let unknown = query("SELECT * FROM Sample_Nothing").unwrap_err();
    assert!(matches!(unknown, CimError::NotFound { .. }), "{unknown}");
    let bad = query("SELECT * FROM Sample_Disk WHERE nonsense").unwrap_err();
    assert!(matches!(bad, CimError::Fault { .. }), "{bad}");
    let missing = client.get(&disk(4711)).unwrap_err();
    assert!(matches!(missing, CimError::NotFound { .. }), "{missing}");
}

#[test]
fn associations_are_followed_also_where_the_host_faults_on_them() {
    for associations in [true, false] {
        let lab = Lab::new(5, |options| options.associations = associations);
        let client = lab.client(|_| {});
        let links =
            Association { class: Some("Sample_ServiceDisk".into()), ..Association::default() };
        let found = client.references(&disk(2), &links).unwrap();
        assert_eq!(found.len(), 1, "with the filter: {associations}");
        assert_eq!(found[0].optional_reference("Antecedent").unwrap(), Some(service()));
        let disks = Association::new("Sample_ServiceDisk", "Sample_Disk");
        let mut found = client.associators(&service(), &disks).unwrap();
        found.sort_by_key(|disk| disk.text("InstanceID").unwrap().to_owned());
        assert_eq!(found.len(), 5, "with the filter: {associations}");
        for (number, found) in found.iter().enumerate() {
            want_disk(found, number);
        }
    }
}

fn parameters() -> Vec<(&'static str, CimValue)> {
    let settings = "<INSTANCE CLASSNAME=\"X\"><PROPERTY NAME=\"ä\"><VALUE>]]>&amp;\r\n</VALUE></PROPERTY></INSTANCE>";
    vec![
        ("Disk", CimValue::from(&disk(2))),
        ("Settings", settings.into()),
        ("Kind", CimValue::Uint16(32768)),
        (
            "Offsets",
            CimValue::Array(CimType::Uint64, vec![CimValue::Uint64(0), CimValue::Uint64(u64::MAX)]),
        ),
        ("Flag", true.into()),
    ]
}

#[test]
fn methods_get_what_they_were_given() {
    let lab = Lab::http();
    let client = lab.client(|_| {});
    let given = parameters();
    let output = client.invoke(&service(), "Echo", &given).unwrap();
    assert_eq!(output.return_value, 4096);
    let out = &output.parameters;
    assert_eq!(out.optional_reference("Disk").unwrap(), Some(disk(2)));
    assert_eq!(out.text("Settings").unwrap(), given[1].1.as_str().unwrap());
    assert_eq!(out.number::<u16>("Kind").unwrap(), 32768);
    assert_eq!(out.numbers("Offsets").unwrap(), [0, u64::MAX]);
    assert_eq!(out.optional_bool("Flag").unwrap(), Some(true));
    assert_eq!(out.optional_reference("Job").unwrap(), None);
    let little = client.invoke(&service(), "Echo", &given[..1]).unwrap();
    assert_eq!(little.parameters.optional_text("Settings").unwrap(), None);
    let mut wrong = parameters();
    wrong.swap(1, 2);
    let error = client.invoke(&service(), "Echo", &wrong).unwrap_err();
    assert!(matches!(error, CimError::Fault { code: Some(2_150_858_817), .. }), "{error}");
    assert_eq!(lab.world.calls(), 2);
}

fn count(lab: &Lab) -> Result<u32, CimError> {
    let output = lab.client(|_| {}).invoke(&service(), "Count", &[])?;
    Ok(output.parameters.number("Calls").unwrap())
}

#[test]
fn a_method_whose_answer_is_lost_is_not_called_again() {
    let lab = Lab::http();
    for effect in
        [Effect::CutAfter, Effect::CutDuring, Effect::TimedOut, Effect::Garbage, Effect::Nested]
    {
        let before = lab.world.calls();
        lab.server.switches().add(Switch::once(effect, Operation::Invoke));
        let error = count(&lab).unwrap_err();
        assert!(!error.was_not_run(), "{effect:?}: {error}");
        assert_eq!(lab.world.calls(), before + 1, "{effect:?}: {error}");
    }
    lab.server.switches().add(Switch::once(Effect::CutBefore, Operation::Invoke));
    let before = lab.world.calls();
    // Nobody can know that it was not run: no answer looks the same either way.
    let error = count(&lab).unwrap_err();
    assert!(!error.was_not_run(), "{error}");
    assert_eq!(lab.world.calls(), before);
    assert_eq!(count(&lab).unwrap(), before + 1);
}

#[test]
fn a_method_on_a_connection_that_ended_meanwhile_is_called_once() {
    let lab = Lab::http();
    let client = lab.client(|_| {});
    for round in 1..=5 {
        lab.server.cut_connections();
        std::thread::sleep(Duration::from_millis(20));
        let output = client.invoke(&service(), "Count", &[]);
        match output {
            Ok(output) => {
                assert_eq!(output.parameters.number::<u32>("Calls").unwrap(), lab.world.calls())
            }
            Err(error) => assert!(!error.was_not_run(), "round {round}: {error}"),
        }
        assert!(lab.world.calls() <= round, "round {round}: called twice");
    }
}

#[test]
fn questions_are_asked_again_when_a_connection_breaks() {
    let lab = Lab::http();
    let client = lab.client(|_| {});
    for effect in [Effect::CutBefore, Effect::CutAfter, Effect::CutDuring] {
        lab.server.switches().add(Switch::once(effect, Operation::Get));
        want_disk(&client.get(&disk(1)).unwrap(), 1);
        lab.server.switches().add(Switch::once(effect, Operation::Enumerate));
        assert_eq!(
            client.query(VIRTUALIZATION_NAMESPACE, "SELECT * FROM Sample_Disk").unwrap().len(),
            5
        );
    }
}

#[test]
fn what_hosts_do_on_bad_days_is_told_apart() {
    let lab = Lab::http();
    let error = |effect| {
        lab.server.switches().clear();
        lab.server
            .switches()
            .add(Switch { operation: Some(Operation::Get), ..Switch::always(effect) });
        lab.client(|_| {}).get(&disk(1)).unwrap_err()
    };
    let found = error(Effect::AccessDenied);
    assert!(matches!(found, CimError::Denied { .. }), "{found}");
    let found = error(Effect::TimedOut);
    assert!(matches!(found, CimError::Timeout { .. }), "{found}");
    let found = error(Effect::Unauthorized);
    assert!(matches!(found, CimError::Login { .. }), "{found}");
    for effect in [Effect::Garbage, Effect::Nested] {
        let found = error(effect);
        assert!(matches!(found, CimError::Protocol { .. }), "{effect:?}: {found}");
    }
    for effect in [Effect::EmptyError, Effect::Unavailable] {
        let found = error(effect);
        assert!(
            matches!(
                found,
                CimError::Protocol { .. } | CimError::Unreachable { .. } | CimError::Fault { .. }
            ),
            "{effect:?}: {found}"
        );
    }
    let found = error(Effect::CutBefore);
    assert!(matches!(found, CimError::Unreachable { .. }), "{found}");
    let text = found.to_string();
    assert!(!text.contains('\n') && !text.contains(PASSWORD), "{text}");
}

#[test]
fn an_answer_without_end_is_not_read_to_its_end() {
    let lab = Lab::https(|options| options.basic = true);
    lab.server.switches().add(Switch::once(Effect::Oversized, Operation::Get));
    let client = lab.client(|options| options.authentication = Authentication::Basic);
    let error = client.get(&disk(1)).unwrap_err();
    assert!(matches!(error, CimError::TooLarge { .. } | CimError::Protocol { .. }), "{error}");
}

#[test]
fn an_expired_enumeration_is_begun_again_or_told() {
    let lab = Lab::new(400, |_| {});
    lab.server
        .switches()
        .add(Switch { skip: 1, ..Switch::once(Effect::ExpiredEnumeration, Operation::Pull) });
    match lab.client(|_| {}).query(VIRTUALIZATION_NAMESPACE, "SELECT * FROM Sample_Disk") {
        Ok(found) => assert_eq!(found.len(), 400, "half an answer was taken for a whole one"),
        Err(error) => assert!(matches!(error, CimError::Fault { .. }), "{error}"),
    }
}

#[test]
fn many_threads_share_a_client() {
    let lab = Lab::http();
    let client = lab.client(|options| options.connections = 3);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let client = &client;
            scope.spawn(move || {
                (0..10).for_each(|round| {
                    let number = (thread + round) % 5;
                    want_disk(&client.get(&disk(number)).unwrap(), number);
                })
            });
        }
    });
    let connections: std::collections::HashSet<u64> =
        lab.server.log().iter().map(|seen| seen.connection).collect();
    assert!(connections.len() <= 3, "{} connections", connections.len());
}

#[test]
fn identify_says_who_it_is() {
    let lab = Lab::http();
    let identity = lab.client(|_| {}).identify().unwrap();
    assert_eq!(identity.product_vendor, "Microsoft Corporation");
    assert!(identity.product_version.ends_with("Stack: 3.0"), "{identity:?}");
}
