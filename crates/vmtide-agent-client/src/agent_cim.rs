//! The management objects of a host, by way of the agent there.

use crate::AgentError;
use crate::client::AgentClient;
use crate::contract::json;
use crate::transport::Request;
use crate::v1::to_json;
use http::Method;
use vmtide_block::CancelToken;
use vmtide_cim::remote::{Call, Reply};
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath, Result,
};

/// The most of an answer: a host of a thousand VMs tells some ten megabytes of settings.
const MAX_BYTES: usize = 64 << 20;

/// A host's management objects as its agent lends them. What may be asked is bounded by the agent: Hyper-V's own
/// namespace, and calling methods only with a key that may write.
pub struct AgentCim {
    client: AgentClient,
}

impl AgentCim {
    /// Those of the host whose agent `client` talks to.
    pub const fn new(client: AgentClient) -> Self {
        Self { client }
    }

    fn ask(&self, call: &Call, action: &str) -> Result<Reply> {
        let transport = &self.client.shared().transport;
        let told = |error: AgentError| self.explained(error, action, call.changes());
        let request = Request::new(Method::POST, "/v1/cim")
            .body("application/json", to_json(&transport.agent, call).map_err(told)?)
            .at_most(MAX_BYTES);
        // A method must not be called twice because an answer was lost: who called it looks for what it made.
        let answer = match call.changes() {
            true => transport.once(&request),
            false => transport.document(&request, &CancelToken::new()),
        };
        json(&transport.agent, &answer.map_err(told)?).map_err(told)
    }

    fn instances(&self, call: &Call, action: &str) -> Result<Vec<CimInstance>> {
        match self.ask(call, action)? {
            Reply::Instances(instances) => Ok(instances),
            Reply::Error(error) => Err(error),
            Reply::Output(_) => Err(self.unexpected(action)),
        }
    }

    fn unexpected(&self, action: &str) -> CimError {
        CimError::protocol(self.peer(), format!("another kind of answer than {action} has"))
    }

    fn explained(&self, error: AgentError, action: &str, changes: bool) -> CimError {
        let peer = self.peer().to_owned();
        match error {
            AgentError::Unreachable { detail, .. } => {
                CimError::Unreachable { peer, detail, before_request: !changes }
            }
            AgentError::Certificate { detail, .. } => CimError::Untrusted { peer, detail },
            // 401 has no words of the agent, 403 has.
            AgentError::Denied { detail, .. } if detail.starts_with("denied") => {
                CimError::Denied { peer, detail }
            }
            AgentError::Denied { detail, .. } => CimError::Login { peer, detail },
            AgentError::NotFound { detail, .. } | AgentError::Unsupported { detail, .. } => {
                CimError::NotFound { what: action.to_owned(), detail }
            }
            AgentError::Refused { detail, .. } => {
                CimError::Fault { action: action.to_owned(), detail, code: None }
            }
            other => CimError::Protocol { peer, detail: other.to_string() },
        }
    }
}

impl Cim for AgentCim {
    fn peer(&self) -> &str {
        self.client.agent()
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        let call = Call::Query { namespace: namespace.into(), wql: wql.into() };
        self.instances(&call, &format!("the query {wql}"))
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        let action = format!("getting {path}");
        let mut found = self.instances(&Call::Get { path: path.clone() }, &action)?;
        match (found.pop(), found.is_empty()) {
            (Some(instance), true) => Ok(instance),
            _ => Err(self.unexpected(&action)),
        }
    }

    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>> {
        let (path, association) = (path.clone(), association.clone());
        let action = format!("the associators of {path}");
        self.instances(&Call::Associators { path, association }, &action)
    }

    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>> {
        let (path, association) = (path.clone(), association.clone());
        let action = format!("the references of {path}");
        self.instances(&Call::References { path, association }, &action)
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let parameters = parameters.collect();
        let action = format!("{}.{method}", path.class);
        let call = Call::Invoke { path: path.clone(), method: method.into(), parameters };
        match self.ask(&call, &action)? {
            Reply::Output(output) => Ok(output),
            Reply::Error(error) => Err(error),
            Reply::Instances(_) => Err(self.unexpected(&action)),
        }
    }
}
