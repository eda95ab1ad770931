//! The stand-in Hyper-V host as the stand-in WS-Management server wants to know it: its classes. For tests only.
//!
//! The program `standin-hyperv-host` serves such a host over HTTP or HTTPS, for tests of whole commands and for trying
//! things by hand.

use vmtide_cim::CimType;
use vmtide_standin_hyperv_host::schema::{Class, Parameter, Schema};
use wsman_server::{ClassSchema, Member, MethodSchema};

/// The classes of the stand-in host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostSchema;

impl wsman_server::Schema for HostSchema {
    fn class(&self, name: &str) -> Option<ClassSchema> {
        let mut classes = Schema::get().classes();
        classes.find(|class| class.name.eq_ignore_ascii_case(name)).map(described)
    }
}

fn described(class: &Class) -> ClassSchema {
    let properties = class.properties.iter().map(|property| {
        let is_key = class.keys.contains(&property.name);
        member(property.name, property.kind, property.is_array, is_key)
    });
    let methods = class.methods.iter().map(|method| MethodSchema {
        name: method.name.to_owned(),
        inputs: method.parameters.iter().filter(|p| p.is_input).map(parameter).collect(),
        outputs: method.parameters.iter().filter(|p| p.is_output).map(parameter).collect(),
    });
    ClassSchema {
        name: class.name.to_owned(),
        properties: properties.collect(),
        methods: methods.collect(),
    }
}

fn parameter(parameter: &Parameter) -> Member {
    let required = parameter.is_input && !parameter.is_optional;
    member(parameter.name, parameter.kind, parameter.is_array, required)
}

fn member(name: &str, kind: CimType, array: bool, required: bool) -> Member {
    Member { name: name.to_owned(), kind, array, required }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wsman_server::Schema as _;

    #[test]
    fn classes_have_their_keys_and_methods_their_order() {
        let service = HostSchema.class("msvm_virtualsystemsnapshotservice").unwrap();
        assert_eq!(service.keys().count(), 4);
        let create = service.methods.iter().find(|m| m.name == "CreateSnapshot").unwrap();
        let inputs: Vec<(&str, bool)> =
            create.inputs.iter().map(|input| (input.name.as_str(), input.required)).collect();
        let documented = [
            ("AffectedSystem", true),
            ("SnapshotSettings", false),
            ("SnapshotType", true),
            ("ResultingSnapshot", false),
        ];
        assert_eq!(inputs, documented);
        assert_eq!(create.outputs.len(), 2);
        assert!(HostSchema.class("Win32_Process").is_none());
    }
}
