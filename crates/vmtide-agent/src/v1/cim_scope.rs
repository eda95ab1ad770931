//! What an agent's client may ask of the host's management objects.
//!
//! The agent asks them with rights that see the whole host: files, processes with their arguments, event logs, other
//! machines on its network; and some classes change what they list. A key is for VMs. So of Hyper-V's own namespace
//! everything that is a plain query may be asked, and of the system's the three questions that clients have, as they
//! put them and no other.

use vmtide_cim::remote::{Call, SYSTEM_NAMESPACE};

/// Whether the host may be asked this, beyond [`Call::check`].
///
/// # Errors
/// Why not.
pub(super) fn check(call: &Call) -> Result<(), String> {
    match call {
        Call::Query { namespace, wql } if is_system(namespace) => check_system(wql),
        Call::Query { wql, .. } => match class_of(wql) {
            Some(_) => Ok(()),
            None => Err("queries are SELECT … FROM one class".into()),
        },
        Call::Get { path }
        | Call::Associators { path, .. }
        | Call::References { path, .. }
        | Call::Invoke { path, .. } => {
            if is_system(&path.namespace) {
                return Err(format!("objects of {SYSTEM_NAMESPACE} are not served"));
            }
            match is_name(&path.class) {
                true => Ok(()),
                false => Err("the path names no class".into()),
            }
        }
    }
}

fn is_system(namespace: &str) -> bool {
    namespace.eq_ignore_ascii_case(SYSTEM_NAMESPACE)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// The class of `SELECT names FROM class …`; none for any other statement, such as `ASSOCIATORS OF`, whose path could
/// be one of another namespace.
pub(super) fn class_of(wql: &str) -> Option<&str> {
    let mut words = wql.split_ascii_whitespace();
    words.next().filter(|word| word.eq_ignore_ascii_case("SELECT"))?;
    let is_selected = |word: &str| {
        word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b',' | b'*'))
    };
    loop {
        let word = words.next()?;
        if word.eq_ignore_ascii_case("FROM") {
            break;
        }
        if !is_selected(word) {
            return None;
        }
    }
    words.next().filter(|class| is_name(class))
}

/// The version of the system, whether Hyper-V's service runs, and the room on a volume.
fn check_system(wql: &str) -> Result<(), String> {
    let words: Vec<&str> = wql.split_ascii_whitespace().collect();
    let are = |wanted: &[&str]| {
        words.len() == wanted.len()
            && words.iter().zip(wanted).all(|(word, wanted)| word.eq_ignore_ascii_case(wanted))
    };
    let is_drive = |word: &str| {
        let letter = word.strip_prefix("DeviceID='").and_then(|rest| rest.strip_suffix(":'"));
        letter.is_some_and(|letter| {
            letter.len() == 1 && letter.bytes().all(|byte| byte.is_ascii_alphabetic())
        })
    };
    let is_served = are(&["SELECT", "*", "FROM", "Win32_OperatingSystem"])
        || are(&["SELECT", "*", "FROM", "Win32_Service", "WHERE", "Name='vmms'"])
        || words.split_last().is_some_and(|(last, _)| {
            is_drive(last) && are(&["SELECT", "*", "FROM", "Win32_LogicalDisk", "WHERE", last])
        });
    match is_served {
        true => Ok(()),
        false => Err(format!(
            "of {SYSTEM_NAMESPACE} only the system's version, Hyper-V's service and the room on a volume are told"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_cim::{Association, ObjectPath, VIRTUALIZATION_NAMESPACE};

    fn query(namespace: &str, wql: &str) -> Result<(), String> {
        let call = Call::Query { namespace: namespace.into(), wql: wql.into() };
        call.check().and_then(|()| check(&call))
    }

    #[test]
    fn of_the_system_three_questions_are_answered() {
        for served in [
            "SELECT * FROM Win32_OperatingSystem",
            "select  * from win32_operatingsystem",
            "SELECT * FROM Win32_Service WHERE Name='vmms'",
            "SELECT * FROM Win32_LogicalDisk WHERE DeviceID='C:'",
        ] {
            assert_eq!(query("ROOT\\cimv2", served), Ok(()), "{served}");
        }
        for refused in [
            "SELECT Name FROM CIM_DataFile WHERE Drive='C:'",
            "SELECT CommandLine FROM Win32_Process",
            "SELECT * FROM Win32_Product",
            "SELECT * FROM Win32_PingStatus WHERE Address='10.0.0.5'",
            "SELECT * FROM Win32_Service",
            "SELECT * FROM Win32_Service WHERE Name='vmms' OR Name LIKE '%'",
            "SELECT * FROM Win32_LogicalDisk WHERE DeviceID='C:' OR 1=1",
            "SELECT * FROM Win32_LogicalDisk WHERE DeviceID='\\\\x:'",
            "ASSOCIATORS OF {Win32_Process.Handle=4}",
            "SELECT * FROM",
            "",
        ] {
            assert!(query(SYSTEM_NAMESPACE, refused).is_err(), "{refused}");
        }
        let path = ObjectPath {
            namespace: SYSTEM_NAMESPACE.into(),
            ..ObjectPath::new("Win32_Process", &[("Handle", "4")])
        };
        let association = Association::default();
        for call in [
            Call::Get { path: path.clone() },
            Call::Associators { path: path.clone(), association: association.clone() },
            Call::References { path, association },
        ] {
            assert!(check(&call).is_err(), "{call:?}");
        }
    }

    #[test]
    fn of_virtualization_plain_queries_are() {
        let ask = |wql: &str| query(VIRTUALIZATION_NAMESPACE, wql);
        for served in [
            "SELECT * FROM Msvm_ComputerSystem",
            "SELECT Name, ElementName FROM Msvm_ComputerSystem WHERE Name='a'",
            "SELECT * FROM Msvm_VirtualSystemSettingData WHERE InstanceID LIKE 'Microsoft:%'",
        ] {
            assert_eq!(ask(served), Ok(()), "{served}");
        }
        for refused in [
            r"ASSOCIATORS OF {\\.\root\cimv2:Win32_Process.Handle=4}",
            r"REFERENCES OF {root\cimv2:Win32_Process.Handle=4}",
            r"SELECT * FROM root\cimv2:Win32_Process",
            r"SELECT * FROM \\.\root\cimv2:Win32_Process",
            "SELECT *",
            "DELETE FROM Msvm_ComputerSystem",
        ] {
            assert!(ask(refused).is_err(), "{refused}");
        }
        assert_eq!(class_of("SELECT a,b FROM X WHERE y"), Some("X"));
    }
}
