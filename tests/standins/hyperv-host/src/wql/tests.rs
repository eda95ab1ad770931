use super::*;

fn vm(name: &str, state: u16) -> CimInstance {
    CimInstance::new("Msvm_ComputerSystem")
        .with("Name", name)
        .with("ElementName", "Web 01")
        .with("EnabledState", CimValue::Uint16(state))
        .with("Caption", CimValue::Null)
}

fn holds(condition: &str) -> bool {
    let wql = format!("SELECT * FROM Msvm_ComputerSystem WHERE {condition}");
    match Query::parse(&wql).unwrap() {
        Query::Select { condition: Some(condition), .. } => condition.holds(&vm(r"A\B_1", 2)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn conditions_hold_as_wql_says() {
    for condition in [
        r"Name='A\\B_1'",
        r"name_x IS NULL OR Name = 'a\\b_1'",
        "EnabledState=2 AND NOT EnabledState<>2",
        "EnabledState>=2 AND (EnabledState<3 OR EnabledState=9)",
        "Caption IS NULL AND Name IS NOT NULL",
        r"Name LIKE 'A\\B[_]%'",
        "Name LIKE '_%1' AND ElementName LIKE 'w[a-f]b %'",
        "__this ISA 'CIM_ComputerSystem'",
        "EnabledState > -1",
    ] {
        if condition.starts_with("name_x") {
            let wql = format!("SELECT * FROM Msvm_ComputerSystem WHERE {condition}");
            assert!(Query::parse(&wql).is_err());
            continue;
        }
        assert!(holds(condition), "{condition}");
    }
    for condition in
        ["EnabledState=3", "Caption='x'", "Name LIKE 'B%'", "__this ISA 'CIM_ConcreteJob'"]
    {
        assert!(!holds(condition), "{condition}");
    }
}

#[test]
fn what_wmi_refuses_is_refused() {
    for wql in [
        "SELECT * FROM Msvm_ComputerSystem WHERE enabledstate=2",
        "SELECT Names FROM Msvm_ComputerSystem",
        "SELECT * FROM Msvm_ComputerSystem WHERE EnabledState='2'",
        "SELECT * FROM Msvm_ComputerSystem WHERE OperationalStatus=2",
        r"SELECT * FROM Msvm_ComputerSystem WHERE Name='A\B'",
        "SELECT * FROM Msvm_ComputerSystem WHERE Name='A' Name='B'",
        "SELECT * FROM Msvm_ComputerSystem WHERE Name LIKE 1",
        "DELETE FROM Msvm_ComputerSystem",
    ] {
        match Query::parse(wql) {
            Err(CimError::Fault { code, .. }) => assert_eq!(code, Some(INVALID_QUERY), "{wql}"),
            other => panic!("{wql}: {other:?}"),
        }
    }
    match Query::parse("SELECT * FROM msvm_computersystem") {
        Err(CimError::Fault { code, .. }) => assert_eq!(code, Some(INVALID_CLASS)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn associations_are_read_with_braces_in_keys() {
    let wql = r#"ASSOCIATORS OF {Msvm_ConcreteJob.InstanceID="a}b\\c"} WHERE AssocClass=Msvm_AffectedJobElement ResultClass = CIM_SettingData"#;
    let Query::Related { path, ends, class, result_class, role } = Query::parse(wql).unwrap()
    else {
        panic!("no association");
    };
    assert_eq!(path.key("InstanceID"), Some(r"a}b\c"));
    assert!(ends && role.is_none());
    assert_eq!(class.as_deref(), Some("Msvm_AffectedJobElement"));
    assert_eq!(result_class.as_deref(), Some("CIM_SettingData"));
}
