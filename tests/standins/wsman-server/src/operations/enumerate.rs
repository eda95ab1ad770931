//! Enumerations (DSP0226 clause 8): Enumerate, Pull, Release, in batches that fit into an envelope.

use super::{Answer, Failure, Service, response};
use crate::fault::{Fault, WBEM_INVALID_CLASS, code};
use crate::soap::{self, Request};
use crate::uri::{self, Resource};
use crate::write;
use crate::xml::Element;
use std::collections::VecDeque;
use vmtide_cim::{CimError, CimInstance};

/// The most items of a batch (`MaxBatchItems`).
pub const MAX_BATCH_ITEMS: usize = 32_000;
/// The most enumerations that are open at once; the oldest go first.
const MAX_CONTEXTS: usize = 1500;

/// An enumeration that is open.
pub struct Context {
    /// The resource URI it was begun with; Pull must name the same.
    resource: String,
    /// When it was begun, in numbers of enumerations.
    number: usize,
    /// What is still to come, in XML.
    items: VecDeque<String>,
}

/// What is enumerated of an instance.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Object,
    Reference,
    Both,
}

impl Service {
    /// Begins an enumeration.
    ///
    /// # Errors
    /// Faults.
    pub fn enumerate(&self, request: &Request) -> Result<Answer, Failure> {
        let body = element(request, "Enumerate")?;
        let allowed = [
            (uri::ENUMERATION, "Expires"),
            (uri::WSMAN, "Filter"),
            (uri::ENUMERATION, "Filter"),
            (uri::WSMAN, "OptimizeEnumeration"),
            (uri::WSMAN, "MaxElements"),
            (uri::WSMAN, "EnumerationMode"),
            (uri::CIM_BINDING, "PolymorphismMode"),
        ];
        only(body, &allowed)?;
        let resource = Self::resource(request)?;
        if !request.selectors.is_empty() {
            let reason = "an enumeration has no selectors";
            return Err(Fault::selectors(code::UNEXPECTED_SELECTORS, reason).into());
        }
        let mode = match body.child(uri::WSMAN, "EnumerationMode").map(|mode| mode.text.trim()) {
            None => Mode::Object,
            Some("EnumerateEPR") => Mode::Reference,
            Some("EnumerateObjectAndEPR") => Mode::Both,
            Some(other) => {
                return Err(Fault::schema(format!("there is no enumeration mode {other:?}")).into());
            }
        };
        let filter =
            body.child(uri::WSMAN, "Filter").or_else(|| body.child(uri::ENUMERATION, "Filter"));
        let (instances, whole) = self.filtered(&resource, filter)?;
        let items =
            instances.iter().map(|found| self.item(found, &resource.namespace, mode, whole));
        let items: VecDeque<String> = items.collect();
        let optimize = body.child(uri::WSMAN, "OptimizeEnumeration").is_some();
        let max = body.child(uri::WSMAN, "MaxElements").map(count).transpose()?.unwrap_or(1);
        let action = response(uri::ACTION_ENUMERATE);
        let id = soap::random_uuid();
        let mut context = Context { resource: request.resource.clone(), number: 0, items };
        let mut out = String::from("<n:EnumerateResponse>");
        let mut rest = "";
        if optimize {
            let room = room(request, &action, &frame(&id, "Enumerate", "w:Items"));
            let batch = batch(&mut context, max, room, request.max_envelope_bytes)?;
            rest = if context.items.is_empty() { "<w:EndOfSequence/>" } else { "" };
            out.push_str(&identifier(rest.is_empty(), &id));
            out.push_str(&format!("<w:Items>{batch}</w:Items>"));
        } else {
            out.push_str(&identifier(true, &id));
        }
        out.push_str(rest);
        out.push_str("</n:EnumerateResponse>");
        if rest.is_empty() {
            self.keep(id, context);
        }
        Ok((action, out))
    }

    /// The next batch.
    ///
    /// # Errors
    /// Faults.
    pub fn pull(&self, request: &Request) -> Result<Answer, Failure> {
        let body = element(request, "Pull")?;
        let allowed = ["EnumerationContext", "MaxTime", "MaxElements", "MaxCharacters"];
        only(body, &allowed.map(|name| (uri::ENUMERATION, name)))?;
        let id = identifier_of(body)?;
        let max = body.child(uri::ENUMERATION, "MaxElements").map(count).transpose()?.unwrap_or(1);
        let mut contexts = self.contexts.lock();
        let context = contexts.get_mut(&id).ok_or_else(Fault::enumeration)?;
        if context.resource != request.resource {
            let reason = "Pull names another resource URI than Enumerate did";
            let code = code::PULL_NOT_SAME_AS_ENUMERATE;
            return Err(Fault::receiver("n:InvalidEnumerationContext", code, reason).into());
        }
        let action = response(uri::ACTION_PULL);
        let room = room(request, &action, &frame(&id, "Pull", "n:Items"));
        let batch = batch(context, max, room, request.max_envelope_bytes)?;
        let end = context.items.is_empty();
        if end {
            contexts.remove(&id);
        }
        let rest = if end { "<n:EndOfSequence/>" } else { "" };
        let context = if end { String::new() } else { identifier(true, &id) };
        Ok((
            action,
            format!("<n:PullResponse>{context}<n:Items>{batch}</n:Items>{rest}</n:PullResponse>"),
        ))
    }

    /// Ends an enumeration early.
    ///
    /// # Errors
    /// Faults.
    pub fn release(&self, request: &Request) -> Result<Answer, Failure> {
        let body = element(request, "Release")?;
        only(body, &[(uri::ENUMERATION, "EnumerationContext")])?;
        let id = identifier_of(body)?;
        self.contexts.lock().remove(&id).ok_or_else(Fault::enumeration)?;
        Ok((response(uri::ACTION_RELEASE), String::new()))
    }

    /// Forgets all enumerations.
    pub fn expire(&self) {
        self.contexts.lock().clear();
    }

    fn keep(&self, id: String, mut context: Context) {
        let mut contexts = self.contexts.lock();
        context.number = contexts.values().map(|known| known.number).max().unwrap_or(0) + 1;
        if contexts.len() >= MAX_CONTEXTS {
            let oldest =
                contexts.iter().min_by_key(|(_, known)| known.number).map(|(id, _)| id.clone());
            oldest.and_then(|id| contexts.remove(&id));
        }
        contexts.insert(id, context);
    }

    /// The instances, and whether they are whole: columns of a query are not.
    fn filtered(
        &self,
        resource: &Resource,
        filter: Option<&Element>,
    ) -> Result<(Vec<CimInstance>, bool), Failure> {
        let namespace = &resource.namespace;
        let Some(filter) = filter else {
            if resource.is_all() {
                let reason = "an enumeration without a filter names a class";
                return Err(Fault::sender(
                    "w:InvalidResourceURI",
                    code::INVALID_RESOURCE_URI,
                    reason,
                )
                .into());
            }
            let class = self
                .schema
                .class(&resource.class)
                .ok_or_else(|| Fault::no_class(namespace, &resource.class))?;
            return Ok((
                self.cim.query(namespace, &format!("SELECT * FROM {}", class.name))?,
                true,
            ));
        };
        let dialect = filter
            .attribute("", "Dialect")
            .unwrap_or("http://www.w3.org/TR/1999/REC-xpath-19991116");
        match dialect {
            uri::DIALECT_WQL => self.wql(resource, filter),
            uri::DIALECT_ASSOCIATION if self.options.associations => {
                Ok((self.associated(resource, filter)?, true))
            }
            _ => Err(Fault::sender(
                "n:FilterDialectRequestedUnavailable",
                code::FILTER_DIALECT,
                format!("the filter dialect {dialect:?} is not available for this resource"),
            )
            .into()),
        }
    }

    fn wql(
        &self,
        resource: &Resource,
        filter: &Element,
    ) -> Result<(Vec<CimInstance>, bool), Failure> {
        // Seen of real hosts: a query with a class in the URI is a fault.
        if !resource.is_all() {
            return Err(Fault::sender(
                "w:InvalidResourceURI",
                code::WQL_NEEDS_ALL_CLASSES,
                "a WQL filter needs * for the class in the resource URI",
            )
            .into());
        }
        let wql = filter.text.trim();
        if wql.is_empty() || !filter.children.is_empty() {
            return Err(cannot_process("the filter is no text").into());
        }
        let whole = match selected(wql) {
            Some((columns, class)) => {
                if self.schema.class(class).is_none() {
                    return Err(Fault::no_class(&resource.namespace, class).into());
                }
                columns == "*"
            }
            None => true,
        };
        let found = self.cim.query(&resource.namespace, wql).map_err(|error| match &error {
            CimError::Fault { code: Some(WBEM_INVALID_CLASS), .. } => error.into(),
            CimError::Fault { code, detail, .. } => {
                let fault = cannot_process(detail);
                Failure::Fault(code.map_or(fault.clone(), |code| fault.provider(code)))
            }
            _ => Failure::from(error),
        })?;
        Ok((found, whole))
    }

    fn item(&self, instance: &CimInstance, namespace: &str, mode: Mode, whole: bool) -> String {
        let object = || {
            if whole {
                crate::values::instance(instance, namespace, &*self.schema)
            } else {
                crate::values::fragment(instance, namespace)
            }
        };
        let reference = || {
            let path = self.path_of(instance, namespace);
            format!("<a:EndpointReference>{}</a:EndpointReference>", crate::values::endpoint(&path))
        };
        match mode {
            Mode::Object => object(),
            Mode::Reference => reference(),
            Mode::Both => format!("<w:Item>{}{}</w:Item>", object(), reference()),
        }
    }
}

fn cannot_process(why: &str) -> Fault {
    let reason = format!("the filter cannot be processed: {why}");
    Fault::sender("n:CannotProcessFilter", code::CANNOT_PROCESS_FILTER, reason)
}

/// The columns and the class of a SELECT; none of anything else (`ASSOCIATORS OF …`).
fn selected(wql: &str) -> Option<(&str, &str)> {
    let words: Vec<&str> = wql.split_whitespace().collect();
    let (first, rest) = words.split_first()?;
    if !first.eq_ignore_ascii_case("select") {
        return None;
    }
    let from = rest.iter().position(|word| word.eq_ignore_ascii_case("from"))?;
    let class = rest.get(from + 1)?;
    let columns = if from == 1 { rest.first().copied()? } else { "" };
    Some((columns, class))
}

/// The body, which must be that element of WS-Enumeration.
fn element<'a>(request: &'a Request, name: &str) -> Result<&'a Element, Fault> {
    let found = request.body.as_ref().filter(|body| body.is(uri::ENUMERATION, name));
    found.ok_or_else(|| {
        Fault::sender("w:InvalidBody", code::INVALID_SOAP_BODY, format!("the body is not n:{name}"))
    })
}

/// Every child is one of these, and there once.
fn only(body: &Element, allowed: &[(&str, &str)]) -> Result<(), Fault> {
    for (at, child) in body.children.iter().enumerate() {
        let before = body.children.get(..at).unwrap_or_default();
        let known = allowed.iter().any(|(namespace, name)| child.is(namespace, name));
        if !known || before.iter().any(|other| other.is(&child.namespace, &child.name)) {
            return Err(Fault::schema(format!("{} is not expected in {}", child.name, body.name)));
        }
    }
    Ok(())
}

fn count(element: &Element) -> Result<usize, Fault> {
    let number = element.text.trim().parse::<usize>().ok().filter(|number| *number > 0);
    let number =
        number.ok_or_else(|| Fault::schema(format!("{} is no number from 1", element.name)))?;
    Ok(number.min(MAX_BATCH_ITEMS))
}

fn identifier(there: bool, id: &str) -> String {
    if there {
        write::simple("n:EnumerationContext", &format!("uuid:{id}"))
    } else {
        "<n:EnumerationContext/>".into()
    }
}

fn identifier_of(body: &Element) -> Result<String, Fault> {
    let context = body.child(uri::ENUMERATION, "EnumerationContext");
    let context = context.ok_or_else(|| Fault::schema("n:EnumerationContext is missing"))?;
    let id = context.text.trim().strip_prefix("uuid:").ok_or_else(Fault::enumeration)?;
    Ok(id.to_owned())
}

/// The largest body around a batch.
fn frame(id: &str, what: &str, items: &str) -> String {
    format!(
        "<n:{what}Response>{}<{items}></{items}><n:EndOfSequence/></n:{what}Response>",
        identifier(true, id)
    )
}

/// How many bytes of items fit into the answer.
fn room(request: &Request, action: &str, frame: &str) -> usize {
    let without = soap::envelope(action, &request.message_id, frame).len();
    request.max_envelope_bytes.saturating_sub(without)
}

/// Takes as many items as are asked for and fit. None that fits is a fault; it stays for a Pull that allows more.
fn batch(context: &mut Context, max: usize, room: usize, limit: usize) -> Result<String, Fault> {
    let mut out = String::new();
    for _ in 0..max {
        let Some(next) = context.items.front() else { break };
        if out.len() + next.len() > room {
            if out.is_empty() {
                return Err(Fault::too_large(limit));
            }
            break;
        }
        out.push_str(next);
        context.items.pop_front();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::selected;

    #[test]
    fn the_class_of_a_query_is_found() {
        assert_eq!(selected("SELECT * FROM Msvm_X WHERE a='from b'"), Some(("*", "Msvm_X")));
        assert_eq!(selected("select A,B from X"), Some(("A,B", "X")));
        assert_eq!(selected("select A, B from X"), Some(("", "X")));
        assert_eq!(selected("ASSOCIATORS OF {X.A='b'}"), None);
    }
}
