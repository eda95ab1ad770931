//! The filter that follows associations (DSP0227 clause 17).

use super::{Failure, Service};
use crate::fault::{Fault, code};
use crate::uri::{self, Resource};
use crate::xml::Element;
use vmtide_cim::{Association, CimInstance};

impl Service {
    /// What a filter of this dialect finds.
    ///
    /// # Errors
    /// Faults.
    pub fn associated(
        &self,
        resource: &Resource,
        filter: &Element,
    ) -> Result<Vec<CimInstance>, Failure> {
        let wrong = |why: &str| {
            let reason = format!("the association filter cannot be processed: {why}");
            Fault::sender("n:CannotProcessFilter", code::CANNOT_PROCESS_FILTER, reason)
        };
        if !resource.is_all() {
            return Err(wrong("it needs * for the class in the resource URI").into());
        }
        let [inner] = filter.children.as_slice() else {
            return Err(wrong("it has not one element").into());
        };
        let instances = inner.is(uri::CIM_BINDING, "AssociatedInstances");
        if !instances && !inner.is(uri::CIM_BINDING, "AssociationInstances") {
            return Err(wrong("it is neither AssociatedInstances nor AssociationInstances").into());
        }
        // An xs:sequence: what is there comes in this order.
        let order: &[&str] = if instances {
            &[
                "Object",
                "AssociationClassName",
                "Role",
                "ResultClassName",
                "ResultRole",
                "IncludeResultProperty",
            ]
        } else {
            &["Object", "ResultClassName", "Role", "IncludeResultProperty"]
        };
        let mut next = 0;
        for child in &inner.children {
            let at = order.iter().skip(next).position(|name| child.is(uri::CIM_BINDING, name));
            let at = at.ok_or_else(|| {
                Fault::schema(format!("{} is not expected here in {}", child.name, inner.name))
            })?;
            next += at + usize::from(child.name != "IncludeResultProperty");
        }
        let text = |name: &str| {
            let found =
                inner.child(uri::CIM_BINDING, name).map(|child| child.text.trim().to_owned());
            found.filter(|text| !text.is_empty())
        };
        let object =
            inner.child(uri::CIM_BINDING, "Object").ok_or_else(|| wrong("it has no Object"))?;
        let path = crate::values::reference("Object", object, &*self.schema)?;
        let class = text(if instances { "AssociationClassName" } else { "ResultClassName" });
        if let Some(class) = class.as_deref().filter(|class| self.schema.class(class).is_none()) {
            return Err(Fault::no_class(&resource.namespace, class).into());
        }
        let role = text("Role");
        Ok(if instances {
            let result_class = text("ResultClassName");
            self.cim.associators(&path, &Association { class, result_class, role })?
        } else {
            self.cim.references(&path, &Association { class, result_class: None, role })?
        })
    }
}
