//! The client: operations of CIM as operations of WS-Management.

use crate::answer::{self, short};
use crate::envelope::{self, Frame, Operation};
use crate::fault::{self, Asked};
use crate::options::{OptionsError, Scheme, WsmanOptions};
use crate::pool::Pool;
use crate::tls::Tls;
use crate::xml::{self, Element};
use std::time::Duration;
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimValue, Link, MethodOutput, ObjectPath, Result,
};

/// How often a request is sent when connections break, where it may be at all, and how long to wait in between.
const MAX_TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);

/// Batches without an instance and without an end, one after another, before an enumeration counts as stuck.
const MAX_EMPTY_BATCHES: u32 = 8;

/// A host's management objects over WS-Management.
///
/// Cheap to use from many threads; each request takes one of at most [`WsmanOptions::connections`] connections. Must
/// not be used from within an asynchronous task: calls block.
///
/// Questions (`query`, `get`, `associators`, `references`) are asked again when a connection breaks. Calls of methods
/// are sent again only where the host certainly did not get them.
pub struct WsmanCim {
    pool: Pool,
    url: String,
}

/// Who a host says it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The protocol, a URI.
    pub protocol_version: String,
    /// Its maker, e.g. `Microsoft Corporation`.
    pub product_vendor: String,
    /// Its version, e.g. `OS: 10.0.20348 SP: 0.0 Stack: 3.0`.
    pub product_version: String,
}

impl std::fmt::Debug for WsmanCim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WsmanCim").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Whether a request may be sent twice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// As often as it takes.
    Question,
    /// Only where it certainly was not run; else the enumeration that it is a part of is begun anew.
    Part,
    /// Never, once it may have arrived.
    Once,
}

impl WsmanCim {
    /// A client for the host of `options`. Asks nobody yet.
    ///
    /// # Errors
    /// [`OptionsError`] where the options make no sense or name files that cannot be used.
    pub fn new(options: WsmanOptions) -> Result<Self, OptionsError> {
        options.check()?;
        let tls = match options.scheme {
            Scheme::Http => None,
            Scheme::Https => Some(Tls::new(&options)?),
        };
        let url = format!("{}{}", options.peer(), crate::http::PATH);
        let pool = Pool::new(options, tls).map_err(|error| {
            OptionsError::Usage(format!("start the threads of the WinRM client: {error}"))
        })?;
        Ok(Self { pool, url })
    }

    /// Asks the host who it is: the cheapest request that shows that connection, certificate and user are right.
    ///
    /// # Errors
    /// As [`Cim::query`].
    pub fn identify(&self) -> Result<Identity> {
        let answer =
            self.send(Repeat::Question, "identification", None, &mut |_| Ok(envelope::identify()))?;
        let answer = answer
            .filter(|element| element.name == "IdentifyResponse")
            .ok_or_else(|| self.unexpected("no IdentifyResponse came"))?;
        let text = |name| answer.child(name).map(|child| short(&child.text)).unwrap_or_default();
        Ok(Identity {
            protocol_version: text("ProtocolVersion"),
            product_vendor: text("ProductVendor"),
            product_version: text("ProductVersion"),
        })
    }

    /// Sends what `make` writes for a message number, and gives the one element of the answer's body; how often it is
    /// sent is `repeat`'s matter.
    fn send(
        &self,
        repeat: Repeat,
        action: &str,
        message_id: Option<&str>,
        make: &mut dyn FnMut(&Frame<'_>) -> Result<String>,
    ) -> Result<Option<Element>> {
        let options = self.pool.options();
        let mut tried = 0;
        loop {
            let own;
            let message_id = match message_id {
                Some(known) => known,
                None => {
                    own = new_message_id();
                    own.as_str()
                }
            };
            let frame = Frame {
                to: &self.url,
                message_id,
                max_envelope_bytes: options.max_envelope_bytes,
                timeout: options.operation_timeout,
            };
            let envelope = make(&frame)?;
            tried += 1;
            let once = repeat == Repeat::Once;
            match self.pool.exchange(&envelope, action, once, tried > 1) {
                Ok(bytes) => return self.read(&bytes, action, message_id),
                Err(failure) => {
                    let failure = match repeat {
                        Repeat::Question => failure,
                        Repeat::Once => failure.of_call(self.peer()),
                        // A part that was run is lost with its answer, and the next one of the same context is
                        // another: who has not proven himself cannot say that it was not run.
                        Repeat::Part if failure.not_run => failure.of_call(self.peer()),
                        Repeat::Part => failure,
                    };
                    // What certainly was not run may always be sent again: the connection at rest was closed, then the
                    // host forgot who speaks.
                    let broke = matches!(failure.error, CimError::Unreachable { .. });
                    let may = failure.not_run || broke && repeat == Repeat::Question;
                    let again = may && tried < MAX_TRIES;
                    if !again {
                        return Err(failure.error);
                    }
                    tracing::debug!(peer = self.peer(), action, error = %failure.error, "sent again");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// The body of an answer; an error where it is a fault.
    fn read(&self, bytes: &[u8], action: &str, message_id: &str) -> Result<Option<Element>> {
        let options = self.pool.options();
        if bytes.is_empty() {
            return Err(self.unexpected("an empty answer"));
        }
        let mut envelope = xml::parse(bytes).map_err(|why| self.unexpected(&why))?;
        let body =
            answer::body(&envelope, Some(message_id)).map_err(|why| self.unexpected(&why))?;
        if let Some(fault) = body.filter(|element| element.name == "Fault") {
            let asked = Asked {
                peer: self.peer(),
                action,
                timeout: options.operation_timeout,
                max_envelope_bytes: options.max_envelope_bytes,
            };
            return Err(fault::error(fault, &asked));
        }
        let body = envelope.children.iter_mut().find(|child| child.name == "Body");
        Ok(body.filter(|body| !body.children.is_empty()).map(|body| body.children.remove(0)))
    }

    fn unexpected(&self, why: &str) -> CimError {
        CimError::protocol(self.peer(), short(why))
    }

    /// All that an enumeration finds. Where a connection breaks it begins anew: nobody knows what a lost batch held.
    fn enumerate(
        &self,
        operation: &Operation,
        namespace: &str,
        class: &str,
        action: &str,
    ) -> Result<Vec<CimInstance>> {
        let mut tried = 0;
        loop {
            tried += 1;
            match self.enumerate_once(operation, namespace, class, action) {
                // What did not even get there was tried again already.
                Err(CimError::Unreachable { before_request: false, .. }) if tried < MAX_TRIES => {
                    tracing::debug!(peer = self.peer(), action, "begun anew");
                    std::thread::sleep(PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    fn enumerate_once(
        &self,
        operation: &Operation,
        namespace: &str,
        class: &str,
        action: &str,
    ) -> Result<Vec<CimInstance>> {
        let limit = self.pool.options().max_result_bytes;
        let mut found = Vec::new();
        let (mut bytes, mut empty) = (0_u64, 0);
        let mut next = operation.clone();
        loop {
            let element =
                self.send(Repeat::Part, action, None, &mut |frame| next.envelope(frame))?;
            let element = element.ok_or_else(|| self.unexpected("an empty body"))?;
            let batch =
                answer::batch(&element, namespace, class).map_err(|why| self.unexpected(&why))?;
            bytes = bytes.saturating_add(size(&element));
            empty = if batch.instances.is_empty() { empty + 1 } else { 0 };
            found.extend(batch.instances);
            let Some(context) = batch.context else { return Ok(found) };
            let stuck = empty > MAX_EMPTY_BATCHES;
            if bytes > limit || stuck {
                // The host forgets an enumeration by itself as well.
                let release = operation.release(&context)?;
                let _ = self.send(Repeat::Part, action, None, &mut |frame| release.envelope(frame));
                return Err(if stuck {
                    self.unexpected(&format!("{action} neither finds anything nor ends"))
                } else {
                    CimError::TooLarge { action: action.to_owned(), limit_bytes: limit }
                });
            }
            next = operation.pull(&context)?;
        }
    }

    /// Follows an association in the way that the host takes: by its filter, by WQL, or by reading all instances of
    /// the association.
    fn follow(
        &self,
        path: &ObjectPath,
        association: &Association,
        instances_of_association: bool,
    ) -> Result<Vec<CimInstance>> {
        let class = association.class.as_deref().unwrap_or("all associations");
        let action = format!("{class} of {}", short(&path.class));
        let result = association.result_class.as_deref().unwrap_or_default();
        let filter = Operation::associated(path, association, instances_of_association)?;
        let refused = match self.enumerate(&filter, &path.namespace, result, &action) {
            Err(refused @ CimError::Fault { .. }) => refused,
            outcome => return outcome,
        };
        tracing::debug!(peer = self.peer(), %refused, "asked by WQL");
        let wql = association_wql(path, association, instances_of_association);
        let query = Operation::query(&path.namespace, &wql)?;
        match self.enumerate(&query, &path.namespace, result, &action) {
            Err(CimError::Fault { .. }) => {}
            outcome => return outcome,
        }
        if association.class.is_none() {
            return Err(refused);
        }
        tracing::debug!(peer = self.peer(), "all instances of the association are read");
        self.follow_by_reading(path, association, instances_of_association)
    }

    fn follow_by_reading(
        &self,
        path: &ObjectPath,
        association: &Association,
        instances_of_association: bool,
    ) -> Result<Vec<CimInstance>> {
        let class = association.class.as_deref().unwrap_or_default();
        let all = self.query(&path.namespace, &format!("SELECT * FROM {class}"))?;
        let role = |name: &str| {
            association.role.as_ref().is_none_or(|role| role.eq_ignore_ascii_case(name))
        };
        let mut found = Vec::new();
        for row in all {
            let ends: Vec<(&str, ObjectPath)> = row
                .properties
                .iter()
                .filter_map(|(name, value)| Some((name.as_str(), value.as_reference()?)))
                .collect();
            let Some(own) = ends.iter().position(|(name, end)| role(name) && end == path) else {
                continue;
            };
            if instances_of_association {
                found.push(row.clone());
                continue;
            }
            for (index, (_, end)) in ends.iter().enumerate() {
                if index == own || !wanted(end, association.result_class.as_deref()) {
                    continue;
                }
                match self.get(end) {
                    Ok(instance) => found.push(instance),
                    // It went away since the association was read.
                    Err(CimError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(found)
    }
}

/// Whether an object is of the class that is looked for. Of classes that CIM itself defines we do not know which ones
/// are below them.
fn wanted(path: &ObjectPath, class: Option<&str>) -> bool {
    class.is_none_or(|class| class.starts_with("CIM_") || class.eq_ignore_ascii_case(&path.class))
}

/// `ASSOCIATORS OF` or `REFERENCES OF`, as libvirt asks hosts.
fn association_wql(
    path: &ObjectPath,
    association: &Association,
    instances_of_association: bool,
) -> String {
    let object = ObjectPath { host: None, namespace: String::new(), ..path.clone() };
    let verb = if instances_of_association { "REFERENCES" } else { "ASSOCIATORS" };
    let clause = |keyword: &str, value: &Option<String>| {
        value.as_ref().map(|value| format!(" {keyword} = {value}"))
    };
    let clauses: String = if instances_of_association {
        [clause("ResultClass", &association.class), clause("Role", &association.role)]
            .into_iter()
            .flatten()
            .collect()
    } else {
        [
            clause("AssocClass", &association.class),
            clause("ResultClass", &association.result_class),
            clause("Role", &association.role),
        ]
        .into_iter()
        .flatten()
        .collect()
    };
    let filter = if clauses.is_empty() { clauses } else { format!(" WHERE{clauses}") };
    format!("{verb} OF {{{object}}}{filter}")
}

/// About the bytes of memory that what a tree says takes, rather more: an element becomes an instance with a path and
/// properties, a property or a value, none of which is smaller than some hundred bytes however short its text.
fn size(element: &Element) -> u64 {
    /// Half of an instance with one property, or some three properties. Less would let tiny instances take more memory
    /// than the limit says.
    const ELEMENT_BYTES: usize = 448;
    const ATTRIBUTE_BYTES: usize = 64;
    let attribute = |(name, value): &(String, String)| ATTRIBUTE_BYTES + name.len() + value.len();
    let attributes: usize = element.attributes.iter().map(attribute).sum();
    let own = ELEMENT_BYTES + 2 * element.text.len() + 2 * element.name.len() + attributes;
    let own = u64::try_from(own).unwrap_or(u64::MAX);
    element.children.iter().map(size).fold(own, u64::saturating_add)
}

fn new_message_id() -> String {
    let mut bytes = [0; 16];
    // Numbers only tell answers apart: one that does not change would do no harm.
    let _ = getrandom::fill(&mut bytes);
    let id = uuid::Builder::from_random_bytes(bytes).into_uuid();
    format!("uuid:{}", id.hyphenated().to_string().to_uppercase())
}

/// The class that a query is about: the word behind FROM.
fn class_of_query(wql: &str) -> &str {
    let mut words = wql.split_whitespace();
    let class = words.by_ref().skip_while(|word| !word.eq_ignore_ascii_case("FROM")).nth(1);
    class.unwrap_or("objects")
}

impl Cim for WsmanCim {
    fn peer(&self) -> &str {
        self.pool.peer()
    }

    fn link(&self) -> Option<Link> {
        self.pool.link()
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        let class = class_of_query(wql);
        let operation = Operation::query(namespace, wql)?;
        self.enumerate(&operation, namespace, class, &format!("query of {}", short(class)))
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        let operation = Operation::get(path)?;
        let action = format!("reading {}", short(&path.to_string()));
        let element =
            self.send(Repeat::Question, &action, None, &mut |frame| operation.envelope(frame))?;
        let element = element.ok_or_else(|| self.unexpected("an empty body"))?;
        let mut instance =
            answer::instance(&element, &path.namespace).map_err(|why| self.unexpected(&why))?;
        instance.path = Some(path.clone());
        Ok(instance)
    }

    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>> {
        self.follow(path, association, false)
    }

    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>> {
        self.follow(path, association, true)
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        let operation = Operation::invoke(path, method, parameters)?;
        let action = format!("call of {}", short(method));
        // One number for all tries: a host that got the first knows the second.
        let id = new_message_id();
        let element =
            self.send(Repeat::Once, &action, Some(&id), &mut |frame| operation.envelope(frame))?;
        let element = element.ok_or_else(|| self.unexpected("an empty body"))?;
        answer::method_output(&element, method).map_err(|why| self.unexpected(&why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_say_what_they_are_about() {
        assert_eq!(class_of_query("select * from Msvm_X where a='FROM y'"), "Msvm_X");
        assert_eq!(class_of_query("nonsense"), "objects");
    }

    #[test]
    fn associations_in_wql() {
        let path = ObjectPath {
            host: Some("H".into()),
            ..ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", r"A\B")])
        };
        let association = Association::new("Msvm_AffectedJobElement", "CIM_ManagedElement");
        assert_eq!(
            association_wql(&path, &association, false),
            r#"ASSOCIATORS OF {Msvm_ConcreteJob.InstanceID="A\\B"} WHERE AssocClass = Msvm_AffectedJobElement ResultClass = CIM_ManagedElement"#
        );
        assert_eq!(
            association_wql(&path, &association, true),
            r#"REFERENCES OF {Msvm_ConcreteJob.InstanceID="A\\B"} WHERE ResultClass = Msvm_AffectedJobElement"#
        );
        assert_eq!(
            association_wql(&path, &Association::default(), false),
            r#"ASSOCIATORS OF {Msvm_ConcreteJob.InstanceID="A\\B"}"#
        );
    }

    #[test]
    fn what_is_counted_is_what_is_kept() {
        // The shortest instances there are, which take the most memory for their text.
        let count = 1000;
        let items = "<aaaa><bbb/></aaaa>".repeat(count);
        let answer = format!("<PullResponse><Items>{items}</Items><EndOfSequence/></PullResponse>");
        let element = xml::parse(answer.as_bytes()).unwrap();
        let batch = answer::batch(&element, r"root\virtualization\v2", "Msvm_X").unwrap();
        assert_eq!(batch.instances.len(), count);
        // A vector of few elements has room for four, and a growing one for twice as many as it holds.
        let instance = 2 * size_of::<CimInstance>() + 4 * size_of::<(String, CimValue)>();
        assert!(size(&element) >= (count * instance) as u64, "{} {instance}", size(&element));
        let attribute = format!("<a type=\"{}\"/>", "x".repeat(5000));
        assert!(size(&xml::parse(attribute.as_bytes()).unwrap()) > 5000);
    }

    #[test]
    fn numbers_of_messages_differ() {
        assert_ne!(new_message_id(), new_message_id());
        assert_eq!(new_message_id().len(), "uuid:".len() + 36);
    }

    #[test]
    fn wanted_classes() {
        let path = ObjectPath::new("Msvm_A", &[]);
        assert!(
            wanted(&path, None) && wanted(&path, Some("msvm_a")) && wanted(&path, Some("CIM_B"))
        );
        assert!(!wanted(&path, Some("Msvm_B")));
    }
}
