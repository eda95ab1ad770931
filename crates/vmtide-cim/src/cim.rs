//! What a transport can do.

use crate::{CimInstance, CimValue, ObjectPath, Result};
use serde::{Deserialize, Serialize};

/// The namespace in which Hyper-V lives since Windows Server 2012.
pub const VIRTUALIZATION_NAMESPACE: &str = r"root\virtualization\v2";

/// A connection to the management objects of one host.
///
/// Calls block, each for at most the transport's timeout. A connection may be shared by threads.
pub trait Cim: Send + Sync {
    /// Who is asked, for messages: `https://host:5986` or `this host`. Without credentials.
    fn peer(&self) -> &str;

    /// All instances that a WQL query finds, read to the end, each with its path where the transport can
    /// tell it. Values from outside go into the query through [`wql::quote`](crate::wql::quote) only.
    ///
    /// # Errors
    /// What the host or the way to it says; [`TooLarge`](crate::CimError::TooLarge) past the transport's
    /// limit on answers.
    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>>;

    /// One instance by its path.
    ///
    /// # Errors
    /// [`NotFound`](crate::CimError::NotFound), or as [`query`](Self::query).
    fn get(&self, path: &ObjectPath) -> Result<CimInstance>;

    /// The instances that an association leads to from `path`. Real hosts fault on some of these over
    /// WS-Management: what can be found by a key or by the prefix of an `InstanceID` is queried instead.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    fn associators(&self, path: &ObjectPath, association: &Association)
    -> Result<Vec<CimInstance>>;

    /// The association instances themselves that refer to `path`, where `association.class` says which
    /// (e.g. `Msvm_AffectedJobElement` with its `ElementEffects`). `result_class` and the roles of the
    /// far side do not apply.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>>;

    /// Calls a method of an object. Parameters are passed in the order given, which is that of the
    /// method's documentation: WS-Management validates it. An optional parameter is left out.
    ///
    /// The answer's code is not judged here: 4096, "job started", is the normal one.
    ///
    /// # Errors
    /// Where the call did not reach the method or its answer did not come back whole. Whether the method
    /// ran is then unknown unless the error says otherwise ([`CimError::was_not_run`](crate::CimError::was_not_run)).
    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput>;

    /// How the host was reached, for people who look whether that is as it should be; none before it was, and where
    /// there is no network in between. Asks nobody.
    fn link(&self) -> Option<Link> {
        None
    }
}

/// How a connection over a network was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The protocol, and what protects its messages: `WinRM over HTTPS`.
    pub protocol: String,
    /// What proved the user: `Kerberos`, `NTLM`, `a password (Basic)`, `a certificate`.
    pub login: &'static str,
    /// Why NTLM proved the user although Kerberos was tried.
    pub fallback: Option<String>,
    /// When the host's certificate ends, in seconds since 1970; none where there is none or it does not say.
    pub certificate_end_unix_s: Option<i64>,
}

/// Which association to follow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Association {
    /// The association's class, e.g. `Msvm_VirtualSystemSettingDataComponent`; none for any.
    pub class: Option<String>,
    /// The class of what it leads to; none for any.
    pub result_class: Option<String>,
    /// The role that the object asked about plays in it, e.g. `GroupComponent`; none for any.
    pub role: Option<String>,
}

impl Association {
    /// The association `class` to instances of `result_class`.
    pub fn new(class: &str, result_class: &str) -> Self {
        Self { class: Some(class.into()), result_class: Some(result_class.into()), role: None }
    }
}

/// What a method answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MethodOutput {
    /// The method's own code: 0 done, 4096 a job was started, others as its documentation says.
    pub return_value: u32,
    /// The out parameters.
    pub parameters: CimInstance,
}
