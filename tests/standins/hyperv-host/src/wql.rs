//! The part of WQL that clients of Hyper-V use: `SELECT … FROM class WHERE …` with comparisons, `LIKE`,
//! `IS NULL`, `ISA`, `AND`, `OR`, `NOT` and brackets, and `ASSOCIATORS OF` / `REFERENCES OF`.
//!
//! Classes and properties are held to their exact spelling and to the schema: a property that the class does
//! not have, an array in a comparison, or a literal of another type is refused as WMI does
//! (`WBEM_E_INVALID_QUERY`).

mod lex;
mod like;

use crate::schema::{Class, Schema};
use lex::{Token, tokens};
use vmtide_cim::{CimError, CimInstance, CimType, CimValue, ObjectPath};

/// `WBEM_E_INVALID_CLASS`.
pub(crate) const INVALID_CLASS: u32 = 0x8004_1010;
/// `WBEM_E_INVALID_QUERY`.
pub(crate) const INVALID_QUERY: u32 = 0x8004_1017;

/// A query that was understood.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Query {
    /// `SELECT`.
    Select {
        /// The columns; empty for `*`.
        columns: Vec<String>,
        /// The class.
        class: String,
        /// What the instances must fulfil.
        condition: Option<Condition>,
    },
    /// `ASSOCIATORS OF` or `REFERENCES OF`.
    Related {
        /// The object asked about.
        path: ObjectPath,
        /// Whether the far ends are wanted, not the associations.
        ends: bool,
        /// `AssocClass`, or `ResultClass` of `REFERENCES OF`.
        class: Option<String>,
        /// `ResultClass` of `ASSOCIATORS OF`.
        result_class: Option<String>,
        /// `Role`.
        role: Option<String>,
    },
}

/// A condition of `WHERE`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Condition {
    And(Box<Self>, Box<Self>),
    Or(Box<Self>, Box<Self>),
    Not(Box<Self>),
    Compare { property: String, operator: &'static str, value: CimValue },
    Like { property: String, pattern: String },
    IsNull { property: String, is_null: bool },
    IsA { class: String },
}

/// The fault for a query that WMI does not take.
pub(crate) fn invalid(wql: &str, why: &str) -> CimError {
    CimError::Fault {
        action: format!("the query {wql}"),
        detail: format!("invalid query: {why}"),
        code: Some(INVALID_QUERY),
    }
}

impl Query {
    /// Reads a query.
    pub(crate) fn parse(wql: &str) -> Result<Self, CimError> {
        let tokens = tokens(wql).map_err(|why| invalid(wql, &why))?;
        let mut parser = Parser { tokens: &tokens, at: 0 };
        let query = parser.query().map_err(|why| invalid(wql, &why))?;
        if let Query::Select { columns, class, condition } = &query {
            let class = known_class(class)?;
            let unknown = columns.iter().find(|name| class.property(name).is_none());
            if let Some(name) = unknown {
                return Err(invalid(wql, &format!("{} has no property {name}", class.name)));
            }
            if let Some(condition) = condition {
                condition.check(class).map_err(|why| invalid(wql, &why))?;
            }
        }
        Ok(query)
    }
}

/// The class of that exact name.
pub(crate) fn known_class(name: &str) -> Result<&'static Class, CimError> {
    Schema::get().class(name).ok_or_else(|| CimError::Fault {
        action: format!("the class {name}"),
        detail: "invalid class".into(),
        code: Some(INVALID_CLASS),
    })
}

impl Condition {
    /// Whether an instance fulfils the condition. Comparisons with what is null are false.
    pub(crate) fn holds(&self, instance: &CimInstance) -> bool {
        match self {
            Self::And(a, b) => a.holds(instance) && b.holds(instance),
            Self::Or(a, b) => a.holds(instance) || b.holds(instance),
            Self::Not(a) => !a.holds(instance),
            Self::IsNull { property, is_null } => instance.value(property).is_none() == *is_null,
            Self::IsA { class } => Schema::get().is_a(&instance.class, class),
            Self::Like { property, pattern } => {
                let text = instance.value(property).and_then(CimValue::as_str);
                text.is_some_and(|text| like::matches(pattern, text))
            }
            Self::Compare { property, operator, value } => {
                let Some(found) = instance.value(property) else { return false };
                let Some(ordering) = compare(found, value) else { return false };
                match *operator {
                    "=" => ordering.is_eq(),
                    "<>" | "!=" => ordering.is_ne(),
                    "<" => ordering.is_lt(),
                    "<=" => ordering.is_le(),
                    ">" => ordering.is_gt(),
                    _ => ordering.is_ge(),
                }
            }
        }
    }

    fn check(&self, class: &Class) -> Result<(), String> {
        match self {
            Self::And(a, b) | Self::Or(a, b) => a.check(class).and_then(|()| b.check(class)),
            Self::Not(a) => a.check(class),
            Self::IsA { class } => known_class(class).map(|_| ()).map_err(|e| e.to_string()),
            Self::IsNull { property, .. } => property_of(class, property).map(|_| ()),
            Self::Like { property, .. } => match property_of(class, property)? {
                CimType::String => Ok(()),
                _ => Err(format!("{property} is no text to be LIKE something")),
            },
            Self::Compare { property, value, operator } => {
                let kind = property_of(class, property)?;
                let fits = match kind {
                    CimType::Boolean => {
                        matches!(value, CimValue::Boolean(_))
                            && matches!(*operator, "=" | "<>" | "!=")
                    }
                    CimType::String | CimType::DateTime | CimType::Reference => {
                        matches!(value, CimValue::String(_))
                    }
                    _ => matches!(value, CimValue::Uint64(_) | CimValue::Sint64(_)),
                };
                if fits { Ok(()) } else { Err(format!("{property} is compared with another type")) }
            }
        }
    }
}

/// The type of a property that may stand in a comparison.
fn property_of(class: &Class, name: &str) -> Result<CimType, String> {
    match class.property(name) {
        None => Err(format!("{} has no property {name}", class.name)),
        Some(property) if property.is_array => Err(format!("{name} is an array")),
        Some(property) => Ok(property.kind),
    }
}

/// Text is compared without regard to case, as WMI does.
fn compare(found: &CimValue, wanted: &CimValue) -> Option<std::cmp::Ordering> {
    match (found, wanted) {
        (CimValue::Boolean(a), CimValue::Boolean(b)) => Some(a.cmp(b)),
        (CimValue::Reference(path), CimValue::String(text)) => {
            let other: ObjectPath = text.parse().ok()?;
            Some(if *path == other { std::cmp::Ordering::Equal } else { std::cmp::Ordering::Less })
        }
        (found, CimValue::String(b)) => Some(found.as_str()?.to_lowercase().cmp(&b.to_lowercase())),
        (found, CimValue::Sint64(b)) => i64::try_from(found.as_u64()?).ok().map(|a| a.cmp(b)),
        (found, wanted) => Some(found.as_u64()?.cmp(&wanted.as_u64()?)),
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.tokens.get(self.at), Some(Token::Word(found)) if found.eq_ignore_ascii_case(word))
    }

    fn take(&mut self, word: &str) -> bool {
        let is = self.is_word(word);
        self.at += usize::from(is);
        is
    }

    fn expect(&mut self, word: &str) -> Result<(), String> {
        if self.take(word) { Ok(()) } else { Err(format!("{word} is missing")) }
    }

    fn name(&mut self) -> Result<String, String> {
        match self.next() {
            Some(Token::Word(name)) => Ok(name),
            other => Err(format!("a name is missing, {other:?} is there")),
        }
    }

    fn symbol(&mut self, symbol: &str) -> bool {
        let is = matches!(self.tokens.get(self.at), Some(Token::Symbol(found)) if *found == symbol);
        self.at += usize::from(is);
        is
    }

    fn query(&mut self) -> Result<Query, String> {
        let query = if self.take("select") {
            self.select()?
        } else if self.take("associators") {
            self.related(true)?
        } else if self.take("references") {
            self.related(false)?
        } else {
            return Err("it begins with none of SELECT, ASSOCIATORS, REFERENCES".into());
        };
        if self.at < self.tokens.len() {
            return Err("something follows its end".into());
        }
        Ok(query)
    }

    fn select(&mut self) -> Result<Query, String> {
        let mut columns = Vec::new();
        if !self.symbol("*") {
            columns.push(self.name()?);
            while self.symbol(",") {
                columns.push(self.name()?);
            }
        }
        self.expect("from")?;
        let class = self.name()?;
        let condition = if self.take("where") { Some(self.or()?) } else { None };
        Ok(Query::Select { columns, class, condition })
    }

    fn related(&mut self, ends: bool) -> Result<Query, String> {
        self.expect("of")?;
        let Some(Token::Braces(path)) = self.next() else {
            return Err("an object path in braces is missing".into());
        };
        let path = path.trim().parse().map_err(|error: CimError| error.to_string())?;
        let (mut class, mut result_class, mut role) = (None, None, None);
        if self.take("where") {
            while self.at < self.tokens.len() {
                let word = self.name()?;
                if !self.symbol("=") {
                    return Err(format!("{word} is not followed by ="));
                }
                let value = Some(self.name()?);
                match (word.to_ascii_lowercase().as_str(), ends) {
                    ("assocclass", true) | ("resultclass", false) => class = value,
                    ("resultclass", true) => result_class = value,
                    ("role", _) => role = value,
                    _ => return Err(format!("{word} is not known here")),
                }
            }
        }
        Ok(Query::Related { path, ends, class, result_class, role })
    }

    fn or(&mut self) -> Result<Condition, String> {
        let mut left = self.and()?;
        while self.take("or") {
            left = Condition::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Condition, String> {
        let mut left = self.not()?;
        while self.take("and") {
            left = Condition::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Condition, String> {
        if self.take("not") {
            return Ok(Condition::Not(Box::new(self.not()?)));
        }
        if self.symbol("(") {
            let inner = self.or()?;
            return if self.symbol(")") { Ok(inner) } else { Err("a bracket is missing".into()) };
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Condition, String> {
        let property = self.name()?;
        if self.take("isa") {
            let Some(Token::Text(class)) = self.next() else {
                return Err("ISA is not followed by a class".into());
            };
            if property != "__this" && !property.eq_ignore_ascii_case("__class") {
                return Err("only __this is a class".into());
            }
            return Ok(Condition::IsA { class });
        }
        if self.take("is") {
            let is_null = !self.take("not");
            self.expect("null")?;
            return Ok(Condition::IsNull { property, is_null });
        }
        if self.take("like") {
            return match self.next() {
                Some(Token::Text(pattern)) => Ok(Condition::Like { property, pattern }),
                _ => Err("LIKE is not followed by a pattern".into()),
            };
        }
        let Some(Token::Symbol(operator)) = self.next() else {
            return Err(format!("{property} is not compared with anything"));
        };
        if !matches!(operator, "=" | "<>" | "!=" | "<" | "<=" | ">" | ">=") {
            return Err(format!("{operator} is no comparison"));
        }
        let value = match self.next() {
            Some(Token::Text(text)) => CimValue::String(text),
            Some(Token::Number(number)) => match u64::try_from(number) {
                Ok(number) => CimValue::Uint64(number),
                Err(_) => CimValue::Sint64(number),
            },
            Some(Token::Word(word)) if word.eq_ignore_ascii_case("true") => CimValue::Boolean(true),
            Some(Token::Word(word)) if word.eq_ignore_ascii_case("false") => {
                CimValue::Boolean(false)
            }
            other => return Err(format!("{other:?} is no literal")),
        };
        Ok(Condition::Compare { property, operator, value })
    }
}

#[cfg(test)]
mod tests;
