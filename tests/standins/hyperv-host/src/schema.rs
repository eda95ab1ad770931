//! The classes that the host knows: names, keys, properties, methods, each exactly as documented.
//!
//! The tables beside this file hold the facts of the class and method pages of Microsoft's "Hyper-V WMI
//! provider (V2)" (and a little of `Win32_*` for what a check-up asks): names, types, arrays, keys, and the
//! parameters of methods in their documented order. What the pages do not say is which parameters may be left
//! out; `?` marks those that the pages call optional, or that every published caller leaves out.
//!
//! Names are held to their exact spelling everywhere, although WMI itself forgives case: a transport over
//! the network does not, and a typing error shows.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use vmtide_cim::{CimType, ObjectPath};

/// The tables, in the order in which they are read.
const TABLES: [&str; 4] = [
    include_str!("schema/systems.txt"),
    include_str!("schema/services.txt"),
    include_str!("schema/settings.txt"),
    include_str!("schema/base.txt"),
];

/// All classes.
#[derive(Debug, Default)]
pub struct Schema {
    classes: BTreeMap<&'static str, Class>,
}

/// A class.
#[derive(Clone, Debug)]
pub struct Class {
    /// The name.
    pub name: &'static str,
    /// What it derives from.
    pub superclass: Option<&'static str>,
    /// The namespace, with backslashes.
    pub namespace: &'static str,
    /// The names of its keys.
    pub keys: Vec<&'static str>,
    /// Its own and inherited properties, in documented order.
    pub properties: Vec<Property>,
    /// Its methods.
    pub methods: Vec<Method>,
}

/// A property of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// The name.
    pub name: &'static str,
    /// The type, that of the elements for an array.
    pub kind: CimType,
    /// Whether it is an array.
    pub is_array: bool,
}

/// A method of a class.
#[derive(Clone, Debug)]
pub struct Method {
    /// The name.
    pub name: &'static str,
    /// In and out parameters, in documented order.
    pub parameters: Vec<Parameter>,
}

/// A parameter of a method.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name.
    pub name: &'static str,
    /// The type, that of the elements for an array.
    pub kind: CimType,
    /// Whether it is an array.
    pub is_array: bool,
    /// For a reference: the class that it leads to.
    pub class: Option<&'static str>,
    /// Whether the caller passes it.
    pub is_input: bool,
    /// Whether the method answers with it.
    pub is_output: bool,
    /// Whether the caller may leave it out.
    pub is_optional: bool,
}

impl Schema {
    /// The one schema.
    pub fn get() -> &'static Self {
        static SCHEMA: LazyLock<Schema> = LazyLock::new(Schema::read);
        &SCHEMA
    }

    /// A class by its exact name.
    pub fn class(&self, name: &str) -> Option<&Class> {
        self.classes.get(name)
    }

    /// All classes, by name.
    pub fn classes(&self) -> impl Iterator<Item = &Class> {
        self.classes.values()
    }

    /// Whether the class `name` is `ancestor` or derives from it.
    pub fn is_a(&self, name: &str, ancestor: &str) -> bool {
        let mut at = Some(name);
        while let Some(name) = at {
            if name == ancestor {
                return true;
            }
            at = self.class(name).and_then(|class| class.superclass);
        }
        false
    }

    /// The class `ancestor` and all that derive from it.
    pub fn family(&self, ancestor: &str) -> Vec<&Class> {
        self.classes().filter(|class| self.is_a(class.name, ancestor)).collect()
    }

    fn read() -> Self {
        let mut schema = Self::default();
        for table in TABLES {
            let mut namespace = vmtide_cim::VIRTUALIZATION_NAMESPACE;
            for block in blocks(table) {
                if let Some(name) = block.strip_prefix("namespace ") {
                    namespace = name.trim();
                    continue;
                }
                let class = Class::read(namespace, block);
                assert!(
                    schema.classes.insert(class.name, class).is_none(),
                    "a class is there twice"
                );
            }
        }
        schema.inherit();
        schema
    }

    /// Gives every class the properties of its ancestors that it does not list itself.
    fn inherit(&mut self) {
        let names: Vec<&str> = self.classes.keys().copied().collect();
        for name in names {
            let mut inherited: Vec<Property> = Vec::new();
            let mut at = self.classes[name].superclass;
            while let Some(superclass) = at {
                let class = self.classes.get(superclass);
                let class = class.unwrap_or_else(|| panic!("{name} derives from {superclass}"));
                inherited.extend(class.properties.iter().cloned());
                at = class.superclass;
            }
            let class = self.classes.get_mut(name).expect("it was listed");
            for property in inherited {
                if class.property(property.name).is_none() {
                    class.properties.push(property);
                }
            }
            for key in &class.keys {
                assert!(
                    class.properties.iter().any(|property| property.name == *key),
                    "{name} has no {key}"
                );
            }
        }
    }
}

impl Class {
    /// A property by its exact name.
    pub fn property(&self, name: &str) -> Option<&Property> {
        self.properties.iter().find(|property| property.name == name)
    }

    /// A method by its exact name.
    pub fn method(&self, name: &str) -> Option<&Method> {
        self.methods.iter().find(|method| method.name == name)
    }

    /// Whether `path` has this class and exactly its keys.
    pub fn is_path(&self, path: &ObjectPath) -> bool {
        path.class == self.name
            && path.keys.len() == self.keys.len()
            && self.keys.iter().all(|key| path.keys.contains_key(*key))
    }

    fn read(namespace: &'static str, block: &'static str) -> Self {
        let mut lines = block.lines();
        let head = lines.next().and_then(|line| line.strip_prefix("class "));
        let head = head.unwrap_or_else(|| panic!("no class: {block}"));
        let (name, superclass) = match head.split_once(" : ") {
            Some((name, superclass)) => (name, Some(superclass)),
            None => (head, None),
        };
        let mut class = Self {
            name,
            superclass,
            namespace,
            keys: Vec::new(),
            properties: Vec::new(),
            methods: Vec::new(),
        };
        let mut kind = "";
        for line in lines {
            let indent = line.len() - line.trim_start().len();
            let mut words = line.split_whitespace();
            if indent == 4 {
                let method = class.methods.last_mut().expect("a parameter follows its method");
                method.parameters.push(Parameter::read(line));
                continue;
            }
            // A deeper indent goes on with the line before.
            if indent == 2 {
                kind = words.next().unwrap_or_default();
            }
            match kind {
                "key" => class.keys.extend(words),
                "method" => {
                    let name = words.next().expect("a method has a name");
                    class.methods.push(Method { name, parameters: Vec::new() });
                }
                _ => class.properties.extend(words.map(|name| Property::read(kind, name))),
            }
        }
        class
    }
}

impl Property {
    fn read(kind: &'static str, name: &'static str) -> Self {
        let (kind, is_array) = split_array(kind);
        let kind = if kind == "ref" { "reference" } else { kind };
        let kind = CimType::from_name(kind).unwrap_or_else(|| panic!("{name} has type {kind}"));
        Self { name, kind, is_array }
    }
}

impl Method {
    /// A parameter by its exact name.
    pub fn parameter(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|parameter| parameter.name == name)
    }
}

impl Parameter {
    fn read(line: &'static str) -> Self {
        let mut words = line.split_whitespace();
        let mut next = || words.next().unwrap_or_else(|| panic!("no parameter: {line}"));
        let (direction, kind, name) = (next(), next(), next());
        let (kind, is_array) = split_array(kind);
        let (kind, class) = match kind.strip_prefix("ref:") {
            Some(class) => ("reference", Some(class)),
            None => (kind, None),
        };
        let kind = CimType::from_name(kind).unwrap_or_else(|| panic!("{line}: no type"));
        let plain = direction.trim_end_matches('?');
        Self {
            name,
            kind,
            is_array,
            class,
            is_input: plain != "out",
            is_output: plain != "in",
            is_optional: direction.ends_with('?'),
        }
    }
}

fn split_array(kind: &'static str) -> (&'static str, bool) {
    kind.strip_suffix("[]").map_or((kind, false), |kind| (kind, true))
}

/// The blocks of a table, which empty lines separate.
fn blocks(table: &'static str) -> impl Iterator<Item = &'static str> {
    table.split("\n\n").map(|block| block.trim_matches('\n')).filter(|block| !block.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_read_and_inherit() {
        let schema = Schema::get();
        let settings = schema.class("Msvm_VirtualSystemSettingData").unwrap();
        assert_eq!(settings.property("Notes").map(|notes| notes.is_array), Some(true));
        assert_eq!(settings.keys, ["InstanceID"]);
        assert!(settings.property("instanceid").is_none());
        let snapshots = schema.class("Msvm_VirtualSystemSnapshotSettingData").unwrap();
        assert!(snapshots.property("ElementName").is_some(), "inherited");
        assert!(schema.is_a("Msvm_ConcreteJob", "CIM_ConcreteJob"));
        assert!(schema.is_a("Msvm_StorageAllocationSettingData", "CIM_SettingData"));
        assert!(!schema.is_a("CIM_SettingData", "Msvm_StorageAllocationSettingData"));
        let system = schema.class("Win32_OperatingSystem").unwrap();
        assert_eq!(system.namespace, r"root\cimv2");
    }

    #[test]
    fn parameters_keep_their_documented_order() {
        let service = Schema::get().class("Msvm_VirtualSystemSnapshotService").unwrap();
        let create = service.method("CreateSnapshot").unwrap();
        let names: Vec<&str> = create.parameters.iter().map(|p| p.name).collect();
        let documented =
            ["AffectedSystem", "SnapshotSettings", "SnapshotType", "ResultingSnapshot", "Job"];
        assert_eq!(names, documented);
        let resulting = create.parameter("ResultingSnapshot").unwrap();
        assert!(resulting.is_input && resulting.is_output && resulting.is_optional);
        assert_eq!(resulting.class, Some("CIM_VirtualSystemSettingData"));
    }
}
