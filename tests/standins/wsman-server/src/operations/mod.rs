//! What is asked, and its answer: the operations of WS-Management on classes of WMI.

mod associations;
mod enumerate;
mod invoke;
mod transfer;

use crate::fault::{Fault, code};
use crate::options::ServerOptions;
use crate::schema::Schema;
use crate::soap::{self, Request};
use crate::switches::Operation;
use crate::uri::{self, Resource};
use enumerate::Context;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use vmtide_cim::{Cim, CimError, CimInstance, CimValue, ObjectPath};

/// What the operations work on; one for all connections of a server.
pub struct Service {
    /// The world.
    pub cim: Arc<dyn Cim>,
    /// What it consists of.
    pub schema: Arc<dyn Schema>,
    /// How the server is set up.
    pub options: Arc<ServerOptions>,
    /// The enumerations that are open, by their contexts.
    contexts: Mutex<HashMap<String, Context>>,
}

/// Why there is no answer.
pub enum Failure {
    /// There is one: a fault.
    Fault(Fault),
    /// The world is gone; so is the connection.
    Cut,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<CimError> for Failure {
    fn from(error: CimError) -> Self {
        Fault::of_world(&error).map_or(Self::Cut, Self::Fault)
    }
}

/// An action and a body.
type Answer = (String, String);

impl Service {
    /// A service with no enumerations.
    pub fn new(cim: Arc<dyn Cim>, schema: Arc<dyn Schema>, options: Arc<ServerOptions>) -> Self {
        Self { cim, schema, options, contexts: Mutex::default() }
    }

    /// What a request asks for.
    pub fn operation(request: &Request) -> Operation {
        match request.action.as_str() {
            _ if request.is_identify() => Operation::Identify,
            uri::ACTION_GET => Operation::Get,
            uri::ACTION_ENUMERATE => Operation::Enumerate,
            uri::ACTION_PULL => Operation::Pull,
            uri::ACTION_RELEASE => Operation::Release,
            _ => Operation::Invoke,
        }
    }

    /// Does what is asked, and wraps the answer into an envelope.
    ///
    /// # Errors
    /// A fault, or that there will be no answer.
    pub fn run(&self, request: &Request) -> Result<String, Failure> {
        let operation = Self::operation(request);
        let (action, body) = match operation {
            Operation::Identify => (String::new(), self.identify(true)),
            Operation::Get => self.get(request)?,
            Operation::Enumerate => self.enumerate(request)?,
            Operation::Pull => self.pull(request)?,
            Operation::Release => self.release(request)?,
            Operation::Invoke | Operation::Login => self.invoke(request)?,
        };
        let envelope = if operation == Operation::Identify {
            format!(
                "<s:Envelope xmlns:s=\"{}\"><s:Header/><s:Body>{body}</s:Body></s:Envelope>",
                uri::SOAP
            )
        } else {
            soap::envelope(&action, &request.message_id, &body)
        };
        if envelope.len() > request.max_envelope_bytes {
            let mut fault = Fault::too_large(request.max_envelope_bytes);
            if operation == Operation::Invoke {
                // The method ran: what it did cannot be undone, and its answer cannot be told.
                fault = fault.detail("UnreportableSuccess");
            }
            return Err(fault.into());
        }
        Ok(envelope)
    }

    /// Who is here. To somebody who is not logged in the version is not told.
    pub fn identify(&self, known: bool) -> String {
        let version = if known { "10.0.20348" } else { "0.0.0" };
        format!(
            "<wsmid:IdentifyResponse xmlns:wsmid=\"{}\"><wsmid:ProtocolVersion>{}</wsmid:ProtocolVersion><wsmid:ProductVendor>Microsoft Corporation</wsmid:ProductVendor><wsmid:ProductVersion>OS: {version} SP: 0.0 Stack: 3.0</wsmid:ProductVersion></wsmid:IdentifyResponse>",
            uri::IDENTITY,
            uri::WSMAN
        )
    }

    /// The resource of a request as a class of WMI.
    fn resource(request: &Request) -> Result<Resource, Fault> {
        Resource::parse(&request.resource).ok_or_else(|| {
            Fault::sender(
                "w:InvalidResourceURI",
                code::INVALID_RESOURCE_URI,
                format!("the resource URI {:?} names no class of WMI", request.resource),
            )
        })
    }

    /// The one object that resource and selectors name. Real hosts take a part of the keys where that is enough:
    /// libvirt names services by their CreationClassName alone.
    fn object(&self, request: &Request, resource: &Resource) -> Result<ObjectPath, Failure> {
        let path = crate::values::path(resource, &request.selectors, &*self.schema)?;
        let class = self.schema.class(&resource.class).unwrap_or_default();
        if class.keys().all(|key| path.key(&key.name).is_some()) {
            return Ok(path);
        }
        if path.keys.is_empty() {
            let reason = format!("the request names no keys of {}", class.name);
            return Err(Fault::selectors(code::INSUFFICIENT_SELECTORS, reason).into());
        }
        let conditions: Vec<String> = path
            .keys
            .iter()
            .map(|(name, value)| format!("{name} = {}", vmtide_cim::wql::quote(value)))
            .collect();
        let wql = format!("SELECT * FROM {} WHERE {}", class.name, conditions.join(" AND "));
        let found = self.cim.query(&path.namespace, &wql)?;
        match found.as_slice() {
            [one] => Ok(self.path_of(one, &resource.namespace)),
            [] => Err(CimError::NotFound {
                what: path.to_string(),
                detail: "no instance has these keys".into(),
            }
            .into()),
            _ => {
                let reason = format!("{path} names several instances");
                Err(Fault::selectors(code::AMBIGUOUS_SELECTORS, reason).into())
            }
        }
    }

    /// The path of an instance: its own, or that of its keys.
    fn path_of(&self, instance: &CimInstance, namespace: &str) -> ObjectPath {
        if let Some(path) = &instance.path {
            return path.clone();
        }
        let class = self.schema.class(&instance.class).unwrap_or_default();
        let keys = class.keys().filter_map(|key| {
            let value = instance.value(&key.name)?;
            let text = match value {
                CimValue::String(text) | CimValue::DateTime(text) => text.clone(),
                CimValue::Reference(path) => path.to_string(),
                other => other.as_u64().map(|number| number.to_string()).unwrap_or_default(),
            };
            Some((key.name.clone(), text))
        });
        ObjectPath {
            host: None,
            namespace: namespace.into(),
            class: instance.class.clone(),
            keys: keys.collect(),
        }
    }
}

/// The response action of a request's.
fn response(action: &str) -> String {
    format!("{action}Response")
}
