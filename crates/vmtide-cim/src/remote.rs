//! A connection to management objects that somebody else has: what is asked of it and answered, as JSON.
//!
//! An agent on a host lends its own connection to clients that have none. What may be asked is decided by
//! [`Call::check`], the same for both ends: objects of Hyper-V's namespace, and of the one that tells of the system
//! itself for reading.

use crate::{
    Association, Cim, CimError, CimInstance, CimType, CimValue, MethodOutput, ObjectPath, Result,
    VIRTUALIZATION_NAMESPACE,
};
use serde::{Deserialize, Serialize};

/// The namespace that tells of the operating system, its services and its volumes.
pub const SYSTEM_NAMESPACE: &str = r"root\cimv2";

/// The longest query, in bytes; real ones have some hundred.
const MAX_QUERY_BYTES: usize = 16 << 10;
/// The most parameters of a call; the longest signature of the namespace has nine.
const MAX_PARAMETERS: usize = 32;
/// How deep instances may stand in instances.
const MAX_DEPTH: usize = 8;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// [`Cim::query`].
    Query {
        /// The namespace.
        namespace: String,
        /// The query.
        wql: String,
    },
    /// [`Cim::get`].
    Get {
        /// The object.
        path: ObjectPath,
    },
    /// [`Cim::associators`].
    Associators {
        /// The object.
        path: ObjectPath,
        /// The association.
        association: Association,
    },
    /// [`Cim::references`].
    References {
        /// The object.
        path: ObjectPath,
        /// The association.
        association: Association,
    },
    /// [`Cim::invoke`].
    Invoke {
        /// The object.
        path: ObjectPath,
        /// The method.
        method: String,
        /// Its parameters, in the order of its documentation.
        parameters: Vec<(String, CimValue)>,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Of a query, associators and references.
    Instances(Vec<CimInstance>),
    /// Of a method.
    Output(MethodOutput),
    /// It failed.
    Error(CimError),
}

impl Call {
    /// Whether it may change something.
    pub const fn changes(&self) -> bool {
        matches!(self, Self::Invoke { .. })
    }

    /// Whether it may be asked at all.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> std::result::Result<(), String> {
        let is = |namespace: &str, wanted: &str| namespace.eq_ignore_ascii_case(wanted);
        let (namespace, may_read_system) = match self {
            Self::Query { namespace, wql } => {
                if wql.len() > MAX_QUERY_BYTES || wql.contains('\0') {
                    return Err("the query is longer than any real one".into());
                }
                (namespace, true)
            }
            Self::Get { path } => (&path.namespace, true),
            Self::Associators { path, association } | Self::References { path, association } => {
                let names = [&association.class, &association.result_class, &association.role];
                if !names.into_iter().flatten().all(|name| is_name(name)) {
                    return Err("a name of the association is none".into());
                }
                (&path.namespace, true)
            }
            Self::Invoke { path, method, parameters } => {
                check_invoke(method, parameters)?;
                (&path.namespace, false)
            }
        };
        let allowed = is(namespace, VIRTUALIZATION_NAMESPACE)
            || may_read_system && is(namespace, SYSTEM_NAMESPACE);
        if allowed { Ok(()) } else { Err(format!("the namespace {namespace} is not served")) }
    }

    /// Asks it of `cim`. Blocks.
    pub fn ask(&self, cim: &dyn Cim) -> Reply {
        let instances = |answer: Result<Vec<CimInstance>>| match answer {
            Ok(instances) => Reply::Instances(instances),
            Err(error) => Reply::Error(error),
        };
        match self {
            Self::Query { namespace, wql } => instances(cim.query(namespace, wql)),
            Self::Get { path } => instances(cim.get(path).map(|instance| vec![instance])),
            Self::Associators { path, association } => {
                instances(cim.associators(path, association))
            }
            Self::References { path, association } => instances(cim.references(path, association)),
            Self::Invoke { path, method, parameters } => {
                let parameters =
                    parameters.iter().map(|(name, value)| (name.as_str(), value.clone()));
                let parameters: Vec<_> = parameters.collect();
                match cim.invoke(path, method, &parameters) {
                    Ok(output) => Reply::Output(output),
                    Err(error) => Reply::Error(error),
                }
            }
        }
    }
}

fn check_invoke(
    method: &str,
    parameters: &[(String, CimValue)],
) -> std::result::Result<(), String> {
    if !is_name(method) || parameters.len() > MAX_PARAMETERS {
        return Err("no method of that name has so many parameters".into());
    }
    for (name, value) in parameters {
        if !is_name(name) || !is_sound(value, 0) {
            return Err("a parameter is none: arrays have elements of their one type".into());
        }
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    (1..=256).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Whether a value from outside keeps what [`CimValue`] promises.
fn is_sound(value: &CimValue, depth: usize) -> bool {
    let fits = |kind: CimType, item: &CimValue| {
        item.cim_type() == Some(kind) && !matches!(item, CimValue::Array(..))
    };
    match value {
        _ if depth > MAX_DEPTH => false,
        // JSON has no others.
        CimValue::Real32(value) => value.is_finite(),
        CimValue::Real64(value) => value.is_finite(),
        CimValue::Array(kind, items) => {
            items.iter().all(|item| fits(*kind, item) && is_sound(item, depth + 1))
        }
        CimValue::Instance(instance) => instance
            .properties
            .iter()
            .all(|(name, value)| is_name(name) && is_sound(value, depth + 1)),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invoke(namespace: &str, value: CimValue) -> Call {
        let mut path = ObjectPath::new("Msvm_X", &[("Name", "vmms")]);
        path.namespace = namespace.into();
        Call::Invoke { path, method: "Do".into(), parameters: vec![("A".into(), value)] }
    }

    #[test]
    fn calls_and_replies_survive_the_way() {
        let inner = CimInstance::new("Msvm_Y").with("N", CimValue::Uint64(u64::MAX));
        let call = invoke(
            VIRTUALIZATION_NAMESPACE,
            CimValue::Array(
                CimType::Instance,
                vec![CimValue::Instance(Box::new(inner.clone())); 2],
            ),
        );
        call.check().unwrap();
        let text = serde_json::to_string(&call).unwrap();
        assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
        let mut instance = inner.with("P", &ObjectPath::new("C", &[("K", r#"a\"b"#)]));
        instance.path = Some(ObjectPath::new("C", &[]));
        instance.set("Z", CimValue::Null);
        let reply = Reply::Instances(vec![instance]);
        let text = serde_json::to_string(&reply).unwrap();
        assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply);
        let error = CimError::Fault { action: "a".into(), detail: "d".into(), code: Some(5) };
        let text = serde_json::to_string(&Reply::Error(error.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), Reply::Error(error));
    }

    #[test]
    fn what_is_not_served_is_refused() {
        let text = || CimValue::from("x");
        assert!(invoke("ROOT\\Virtualization\\V2", text()).check().is_ok());
        for namespace in ["root\\cimv2", "root\\default", ""] {
            assert!(invoke(namespace, text()).check().is_err(), "{namespace}");
        }
        let query = |namespace: &str, wql: &str| {
            Call::Query { namespace: namespace.into(), wql: wql.into() }.check()
        };
        assert!(query("root\\cimv2", "SELECT * FROM Win32_OperatingSystem").is_ok());
        assert!(query("root\\securitycenter2", "SELECT * FROM X").is_err());
        assert!(query("root\\cimv2", &"x".repeat(20_000)).is_err());
        let mixed = CimValue::Array(CimType::Uint8, vec![text()]);
        let nested = CimValue::Array(CimType::String, vec![CimValue::strings(["a"])]);
        for bad in [mixed, nested] {
            assert!(invoke(VIRTUALIZATION_NAMESPACE, bad).check().is_err());
        }
        let mut deep = CimInstance::new("X");
        for _ in 0..20 {
            deep = CimInstance::new("X").with("A", CimValue::Instance(Box::new(deep)));
        }
        let deep = invoke(VIRTUALIZATION_NAMESPACE, CimValue::Instance(Box::new(deep)));
        assert!(deep.check().is_err());
        assert!(serde_json::from_str::<ObjectPath>(r#""a b""#).is_err());
    }
}
