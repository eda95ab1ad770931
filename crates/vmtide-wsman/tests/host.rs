//! The client against a stand-in for WinRM: operations, logins, trust.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod support;

use support::{PASSWORD, client, options, server, tls_options, trusting};
use vmtide_cim::{
    Association, Cim, CimError, CimType, CimValue, ObjectPath, VIRTUALIZATION_NAMESPACE as NS,
};
use vmtide_wsman::{Authentication, ClientCertificate, Fingerprint, WsmanCim, WsmanOptions};
use wsman_server::{ChannelBinding, Operation, ServerOptions, User};

fn service() -> ObjectPath {
    ObjectPath::new(
        "Sample_Service",
        &[("CreationClassName", "Sample_Service"), ("Name", "sample")],
    )
}

fn disk(number: usize) -> ObjectPath {
    ObjectPath::new("Sample_Disk", &[("InstanceID", &format!(r"Sample:disk\{number}"))])
}

#[test]
fn what_is_there_is_found_in_batches() {
    let (server, _) = server(ServerOptions::default(), 70);
    let client = client(&server);
    let disks = client.query(NS, "SELECT * FROM Sample_Disk").unwrap();
    assert_eq!(disks.len(), 70);
    for (number, disk) in disks.iter().enumerate() {
        assert_eq!(disk.class, "Sample_Disk");
        assert_eq!(disk.text("InstanceID").unwrap(), format!(r"Sample:disk\{number}"));
        assert_eq!(disk.number::<u64>("Size").unwrap(), (number as u64) << 40);
        assert_eq!(disk.optional_bool("Enabled").unwrap(), Some(number % 2 == 0));
        assert_eq!(disk.texts("Tags").unwrap(), ["<first>", "zweites & drittes", "日本語"]);
        assert_eq!(disk.numbers("Offsets").unwrap(), [u64::MAX]);
        let created = CimValue::DateTime("20261121120000.000000+000".into());
        assert_eq!(disk.value("Created"), Some(&created));
        let parent = disk.optional_reference("Parent").unwrap();
        assert_eq!(parent.is_some(), number > 0);
    }
    let log = server.log();
    assert!(log.iter().filter(|seen| seen.operation == Some(Operation::Pull)).count() >= 3);
    // All over one connection, logged in once, and nothing but the login unsealed.
    assert!(log.iter().all(|seen| seen.connection == 1), "{log:?}");
    let plain = log.iter().filter(|seen| !seen.sealed && seen.operation != Some(Operation::Login));
    assert_eq!(plain.filter(|seen| seen.operation.is_some()).count(), 0, "{log:?}");
    assert!(
        log.iter().any(|seen| seen.user.as_ref().is_some_and(|(user, _)| user.contains("admin")))
    );
}

#[test]
fn conditions_and_columns() {
    let (server, _) = server(ServerOptions::default(), 3);
    let client = client(&server);
    let wanted = vmtide_cim::wql::quote(r"Sample:disk\1");
    let found = client
        .query(NS, &format!("SELECT * FROM Sample_Disk WHERE InstanceID = {wanted}"))
        .unwrap();
    assert_eq!(found.len(), 1);
    let named = client.query(NS, "SELECT Size FROM Sample_Disk").unwrap();
    assert_eq!((named.len(), named[0].class.as_str()), (3, "Sample_Disk"));
    assert!(named.iter().all(|disk| disk.value("Comment").is_none()));
    assert!(
        client.query(NS, "SELECT * FROM Sample_Disk WHERE InstanceID = 'none'").unwrap().is_empty()
    );
}

#[test]
fn objects_and_what_they_are_associated_with() {
    let (server, _) = server(ServerOptions::default(), 5);
    let client = client(&server);
    let third = client.get(&disk(3)).unwrap();
    assert_eq!(third.path, Some(disk(3)));
    assert_eq!(third.optional_reference("Parent").unwrap(), Some(disk(2)));
    let association = Association::new("Sample_ServiceDisk", "Sample_Disk");
    let all = client.associators(&service(), &association).unwrap();
    assert_eq!(all.len(), 5);
    let rows = client.references(&disk(3), &association).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].optional_reference("Dependent").unwrap(), Some(disk(3)));
    assert_eq!(rows[0].optional_reference("Antecedent").unwrap(), Some(service()));
}

#[test]
fn associations_that_the_host_refuses_are_read_plainly() {
    let (server, _) = server(ServerOptions { associations: false, ..ServerOptions::default() }, 5);
    let client = client(&server);
    let association = Association::new("Sample_ServiceDisk", "Sample_Disk");
    let all = client.associators(&service(), &association).unwrap();
    assert_eq!(all.iter().filter(|disk| disk.class == "Sample_Disk").count(), 5);
    assert_eq!(
        client
            .associators(&disk(3), &Association::new("Sample_ServiceDisk", "CIM_X"))
            .unwrap()
            .len(),
        1
    );
    let rows = client.references(&disk(3), &association).unwrap();
    assert_eq!(rows.len(), 1);
    let role = Association { role: Some("Antecedent".into()), ..association };
    assert!(client.references(&disk(3), &role).unwrap().is_empty());
    let any = client.associators(&service(), &Association::default()).unwrap_err();
    assert!(matches!(any, CimError::Fault { .. }), "{any}");
}

#[test]
fn methods_with_parameters_of_all_kinds() {
    let (server, world) = server(ServerOptions::default(), 2);
    let client = client(&server);
    let settings = "<INSTANCE CLASSNAME=\"X\"><PROPERTY NAME=\"A\" TYPE=\"string\"><VALUE>a]]>b &amp; ü</VALUE></PROPERTY></INSTANCE>";
    let offsets =
        CimValue::Array(CimType::Uint64, vec![CimValue::Uint64(0), CimValue::Uint64(u64::MAX)]);
    let parameters = [
        ("Disk", CimValue::from(&disk(1))),
        ("Settings", settings.into()),
        ("Kind", CimValue::Uint16(32768)),
        ("Offsets", offsets),
        ("Flag", true.into()),
    ];
    let answer = client.invoke(&service(), "Echo", &parameters).unwrap();
    assert_eq!(answer.return_value, 4096);
    let echoed = answer.parameters;
    assert_eq!(echoed.optional_reference("Disk").unwrap(), Some(disk(1)));
    assert_eq!(echoed.text("Settings").unwrap(), settings);
    assert_eq!(echoed.number::<u16>("Kind").unwrap(), 32768);
    assert_eq!(echoed.numbers("Offsets").unwrap(), [0, u64::MAX]);
    assert_eq!(echoed.optional_bool("Flag").unwrap(), Some(true));
    let plain = [("Disk", CimValue::from(&disk(0))), ("Settings", " a < b\r\n & \"c\" ".into())];
    let plain = client.invoke(&service(), "Echo", &plain).unwrap();
    assert_eq!(plain.parameters.text("Settings").unwrap(), " a < b\r\n & \"c\" ");
    // In the wrong order, and one too many: the host's schema refuses both, and nothing is called.
    let calls = world.calls();
    for wrong in [
        vec![("Kind", CimValue::Uint16(1)), ("Disk", CimValue::from(&disk(0)))],
        vec![("Disk", CimValue::from(&disk(0))), ("Other", true.into())],
    ] {
        let error = client.invoke(&service(), "Echo", &wrong).unwrap_err();
        assert!(matches!(error, CimError::Fault { .. }), "{error}");
    }
    assert_eq!(world.calls(), calls);
}

#[test]
fn refusals_are_told_apart() {
    let users = vec![User::new("admin", PASSWORD), User::without_rights("guest", "guest")];
    let (server, _) = server(ServerOptions { users, ..ServerOptions::default() }, 1);
    let asked = |options: WsmanOptions| {
        WsmanCim::new(options).unwrap().query(NS, "SELECT * FROM Sample_Disk")
    };
    asked(options(&server, r"STANDIN\admin", PASSWORD)).unwrap();
    for (user, password) in
        [("admin", "Guess-1"), ("nobody", PASSWORD), ("admin@lab.example", "Guess-1")]
    {
        let error = asked(options(&server, user, password)).unwrap_err();
        assert!(
            matches!(&error, CimError::Login { detail, .. } if detail.contains("wrong user name or password")),
            "{error}"
        );
        assert!(!error.to_string().contains(password));
    }
    let error = asked(options(&server, "guest", "guest")).unwrap_err();
    assert!(
        matches!(&error, CimError::Denied { detail, .. } if detail.contains("Hyper-V Administrators")),
        "{error}"
    );
    let client = client(&server);
    let error = client.query(NS, "SELECT * FROM Nothing_Here").unwrap_err();
    assert!(matches!(error, CimError::NotFound { .. }), "{error}");
    let error = client.query(NS, "nonsense").unwrap_err();
    assert!(matches!(error, CimError::Fault { .. }), "{error}");
    let error = client.get(&disk(9)).unwrap_err();
    assert!(matches!(error, CimError::NotFound { .. }), "{error}");
    let error = client.query(r"root\nothing", "SELECT * FROM Sample_Disk").unwrap_err();
    assert!(matches!(error, CimError::NotFound { .. } | CimError::Fault { .. }), "{error}");
}

#[test]
fn a_host_that_is_down_is_unreachable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let (server, _) = server(ServerOptions::default(), 1);
    let down = WsmanOptions { port: Some(port), ..options(&server, "admin", PASSWORD) };
    let error = WsmanCim::new(down).unwrap().invoke(&service(), "Count", &[]).unwrap_err();
    assert!(
        matches!(&error, CimError::Unreachable { before_request: true, detail, .. } if detail.contains("Enable-PSRemoting")),
        "{error}"
    );
}

#[test]
fn trust_in_certificates() {
    let (server, _) = server(tls_options(), 1);
    let base = options(&server, "admin", PASSWORD);
    let digest = ring::digest::digest(&ring::digest::SHA256, server.certificate_der().unwrap());
    let shown = Fingerprint(digest.as_ref().try_into().unwrap());
    let (trusting, _file) = trusting(&server, base.clone());
    WsmanCim::new(trusting.clone()).unwrap().identify().unwrap();
    let pinned = WsmanOptions { fingerprint: Some(shown), ..base.clone() };
    WsmanCim::new(pinned).unwrap().identify().unwrap();
    let other = WsmanOptions { fingerprint: Some(Fingerprint([7; 32])), ..base.clone() };
    for options in [base, other] {
        let error = WsmanCim::new(options).unwrap().identify().unwrap_err();
        assert!(matches!(error, CimError::Untrusted { .. }), "{error}");
        assert!(error.to_string().contains(&shown.to_string()), "{error}");
    }
    // A certificate of the right authority for another name.
    let elsewhere =
        ServerOptions { tls_names: Some(vec!["other.example".into()]), ..tls_options() };
    let (elsewhere, _) = support::server(elsewhere, 1);
    let (named, _file) = support::trusting(&elsewhere, options(&elsewhere, "admin", PASSWORD));
    let error = WsmanCim::new(named).unwrap().identify().unwrap_err();
    assert!(matches!(error, CimError::Untrusted { .. }), "{error}");
    assert!(elsewhere.log().is_empty(), "something was sent to a host that is not trusted");
}

#[test]
fn logins_over_tls() {
    let strict = ServerOptions {
        channel_binding: ChannelBinding::Strict,
        basic: true,
        certificates: true,
        ..tls_options()
    };
    let (server, _) = server(strict, 1);
    let (base, _file) = trusting(&server, options(&server, "admin", PASSWORD));
    let login = |options: WsmanOptions| WsmanCim::new(options).unwrap().get(&disk(0)).map(|_| ());
    login(base.clone()).unwrap();
    let basic = WsmanOptions { authentication: Authentication::Basic, ..base.clone() };
    login(basic).unwrap();
    let wrong = WsmanOptions {
        authentication: Authentication::Basic,
        ..options(&server, "admin", "wrong")
    };
    let error = login(WsmanOptions { ca_file: base.ca_file.clone(), ..wrong }).unwrap_err();
    assert!(matches!(error, CimError::Login { .. }), "{error}");
    let pem = server.client_certificate("admin").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&certificate, pem.certificate).unwrap();
    std::fs::write(&key, pem.key).unwrap();
    login(WsmanOptions {
        authentication: Authentication::Certificate,
        credentials: None,
        client_certificate: Some(ClientCertificate { certificate, key }),
        ..base
    })
    .unwrap();
    let ways: std::collections::BTreeSet<_> =
        server.log().into_iter().filter_map(|seen| seen.user.map(|(_, way)| way)).collect();
    assert_eq!(ways.len(), 3, "{ways:?}");
    assert!(server.log().iter().all(|seen| !seen.sealed));
}

#[test]
fn a_host_that_takes_basic_only_is_told_so() {
    let (server, _) = server(ServerOptions { ntlm: false, basic: true, ..tls_options() }, 1);
    let (base, _file) = trusting(&server, options(&server, "admin", PASSWORD));
    let error = WsmanCim::new(base).unwrap().identify().unwrap_err();
    assert!(
        matches!(&error, CimError::Login { detail, .. } if detail.contains("Basic")),
        "{error}"
    );
}

#[test]
fn hosts_say_who_they_are() {
    let (server, _) = server(ServerOptions::default(), 1);
    let identity = client(&server).identify().unwrap();
    assert!(
        !identity.product_vendor.is_empty() && !identity.product_version.is_empty(),
        "{identity:?}"
    );
}
