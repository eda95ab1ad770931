//! What the world behind the server consists of, as the server checks it.

use vmtide_cim::CimType;

/// A property of a class or a parameter of a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name, in the case that counts.
    pub name: String,
    /// Its type; of an array that of the elements. An embedded instance as text is a [`CimType::String`].
    pub kind: CimType,
    /// Whether it is an array.
    pub array: bool,
    /// For a property: whether it is a key. For a parameter: whether it must be given.
    pub required: bool,
}

impl Member {
    /// A single value that is no key and may be left out.
    pub fn new(name: &str, kind: CimType) -> Self {
        Self { name: name.into(), kind, array: false, required: false }
    }

    /// The same as an array.
    #[must_use]
    pub const fn array(mut self) -> Self {
        self.array = true;
        self
    }

    /// The same as a key, or as a parameter that must be given.
    #[must_use]
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

/// A method with its parameters in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MethodSchema {
    /// Its name, in the case that counts.
    pub name: String,
    /// What goes in.
    pub inputs: Vec<Member>,
    /// What comes out, without the return value.
    pub outputs: Vec<Member>,
}

/// A class, with all that it inherits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClassSchema {
    /// Its name.
    pub name: String,
    /// Its properties in the order in which answers show them.
    pub properties: Vec<Member>,
    /// Its methods.
    pub methods: Vec<MethodSchema>,
}

impl ClassSchema {
    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &Member> {
        self.properties.iter().filter(|property| property.required)
    }
}

/// The classes that a world knows.
pub trait Schema: Send + Sync {
    /// The class of that name, without regard to case; none where there is no such class.
    fn class(&self, name: &str) -> Option<ClassSchema>;
}

/// A schema as a list.
#[derive(Clone, Debug, Default)]
pub struct Table(pub Vec<ClassSchema>);

impl Schema for Table {
    fn class(&self, name: &str) -> Option<ClassSchema> {
        self.0.iter().find(|class| class.name.eq_ignore_ascii_case(name)).cloned()
    }
}
