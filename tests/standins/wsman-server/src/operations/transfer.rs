//! `Get`: one object, or the limit on envelopes of the service.

use super::{Answer, Failure, Service, response};
use crate::fault::{Fault, code};
use crate::soap::Request;
use crate::uri;

impl Service {
    /// One object by its keys.
    ///
    /// # Errors
    /// Faults.
    pub fn get(&self, request: &Request) -> Result<Answer, Failure> {
        if request.body.is_some() {
            return Err(
                Fault::sender("w:InvalidBody", code::INVALID_SOAP_BODY, "Get has no body").into()
            );
        }
        if request.resource == uri::CONFIG {
            let body = format!(
                "<cfg:Config xmlns:cfg=\"{}\"><cfg:MaxEnvelopeSizekb>{}</cfg:MaxEnvelopeSizekb><cfg:MaxTimeoutms>60000</cfg:MaxTimeoutms><cfg:MaxBatchItems>{}</cfg:MaxBatchItems></cfg:Config>",
                uri::CONFIG,
                self.options.max_envelope_bytes / 1024,
                super::enumerate::MAX_BATCH_ITEMS
            );
            return Ok((response(uri::ACTION_GET), body));
        }
        let resource = Self::resource(request)?;
        if resource.is_all() {
            let reason = "Get names one class, not all";
            return Err(
                Fault::sender("w:InvalidResourceURI", code::INVALID_RESOURCE_URI, reason).into()
            );
        }
        let path = self.object(request, &resource)?;
        let instance = self.cim.get(&path)?;
        Ok((
            response(uri::ACTION_GET),
            crate::values::instance(&instance, &resource.namespace, &*self.schema),
        ))
    }
}
