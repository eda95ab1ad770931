//! Methods: parameters checked against the schema, as XML Schema does it on a real host.

use super::{Answer, Failure, Service, response};
use crate::fault::{Fault, code};
use crate::schema::{Member, MethodSchema};
use crate::soap::Request;
use crate::uri;
use crate::values;
use crate::xml::Element;
use std::fmt::Write;
use vmtide_cim::{CimValue, MethodOutput};

impl Service {
    /// Calls a method.
    ///
    /// # Errors
    /// Faults; that the world is gone.
    pub fn invoke(&self, request: &Request) -> Result<Answer, Failure> {
        let unsupported = |what: &str| {
            let reason = format!("the action {} is not supported{what}", request.action);
            Fault::sender("a:ActionNotSupported", code::ACTION_NOT_SUPPORTED, reason)
        };
        if request.action.starts_with("http://schemas.xmlsoap.org/") {
            return Err(unsupported("").into());
        }
        let resource = Self::resource(request)?;
        let class = self.schema.class(&resource.class);
        let class = class.ok_or_else(|| Fault::no_class(&resource.namespace, &resource.class))?;
        let name =
            request.action.strip_prefix(&request.resource).and_then(|rest| rest.strip_prefix('/'));
        let name = name.ok_or_else(|| {
            let reason = "the action is not the resource URI with a method";
            Fault::sender("w:ActionMismatch", code::ACTION_MISMATCH, reason)
        })?;
        let method = class.methods.iter().find(|method| method.name == name);
        let method =
            method.ok_or_else(|| unsupported(&format!(": {} has no such method", class.name)))?;
        let body = request.body.as_ref();
        let body = body.filter(|body| body.is(&request.resource, &format!("{name}_INPUT")));
        let body = body.ok_or_else(|| {
            Fault::schema(format!("the body is not {name}_INPUT in the namespace of the resource"))
        })?;
        let parameters = self.parameters(request, method, body)?;
        let path = self.object(request, &resource)?;
        let given: Vec<(&str, CimValue)> =
            parameters.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let output = self.cim.invoke(&path, name, &given)?;
        Ok((response(&request.action), written(&request.resource, method, &output)))
    }

    /// The parameters in their order; those that are nil are left out.
    fn parameters(
        &self,
        request: &Request,
        method: &MethodSchema,
        body: &Element,
    ) -> Result<Vec<(String, CimValue)>, Fault> {
        if !body.text.trim().is_empty() {
            return Err(Fault::schema(format!("{} has text", body.name)));
        }
        let mut rest = body.children.as_slice();
        let mut found = Vec::new();
        for member in &method.inputs {
            let bears = |element: &&Element| element.is(&request.resource, &member.name);
            let count = rest.iter().take_while(bears).count();
            let (own, after) = rest.split_at(count);
            rest = after;
            if own.is_empty() {
                if member.required {
                    return Err(Fault::schema(format!("the parameter {} is missing", member.name)));
                }
                continue;
            }
            let own: Vec<&Element> = own.iter().collect();
            let value = values::parameter(member, &own, &*self.schema)?;
            if value == CimValue::Null {
                if member.required {
                    return Err(Fault::schema(format!("the parameter {} is nil", member.name)));
                }
                continue;
            }
            found.push((member.name.clone(), value));
        }
        match rest.first() {
            None => Ok(found),
            Some(extra) => Err(Fault::schema(format!(
                "the parameter {} of {} is unknown, in another namespace, or out of order",
                extra.name, method.name
            ))),
        }
    }
}

/// `Method_OUTPUT`: every out parameter, nil where there is none, and the return value.
fn written(resource: &str, method: &MethodSchema, output: &MethodOutput) -> String {
    let name = &method.name;
    let mut out = format!(
        "<p:{name}_OUTPUT xmlns:xsi=\"{}\" xmlns:p=\"{resource}\" xmlns:cim=\"{}\">",
        uri::XSI,
        uri::CIM_COMMON
    );
    for member in &method.outputs {
        values::element(&mut out, "p", &member.name, &output_value(member, output));
    }
    // Writing to a string does not fail.
    let _ = write!(out, "<p:ReturnValue>{}</p:ReturnValue></p:{name}_OUTPUT>", output.return_value);
    out
}

fn output_value(member: &Member, output: &MethodOutput) -> CimValue {
    output.parameters.value(&member.name).cloned().unwrap_or(CimValue::Null)
}
