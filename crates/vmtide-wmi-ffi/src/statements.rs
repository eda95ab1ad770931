//! The statements of WQL for associations. What stands in them is checked: a path between braces ends at the first
//! closing brace that is not in a string, and names of classes are bare words.

use vmtide_cim::{Association, CimError, ObjectPath, Result};

/// `ASSOCIATORS OF {path} WHERE …`.
///
/// # Errors
/// [`CimError::Protocol`] for names that cannot stand there.
pub fn associators(path: &ObjectPath, association: &Association) -> Result<String> {
    let conditions = [
        ("AssocClass", &association.class),
        ("ResultClass", &association.result_class),
        // The role of the object that was asked about.
        ("Role", &association.role),
    ];
    statement("ASSOCIATORS OF", path, &conditions)
}

/// `REFERENCES OF {path} WHERE …`: the association instances themselves.
///
/// # Errors
/// As [`associators`].
pub fn references(path: &ObjectPath, association: &Association) -> Result<String> {
    let conditions = [("ResultClass", &association.class), ("Role", &association.role)];
    statement("REFERENCES OF", path, &conditions)
}

fn statement(
    verb: &str,
    path: &ObjectPath,
    conditions: &[(&str, &Option<String>)],
) -> Result<String> {
    let mut text = format!("{verb} {{{}}}", relative(path));
    let mut joint = " WHERE";
    for (name, value) in conditions {
        let Some(value) = value else { continue };
        if value.is_empty() || !value.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(CimError::protocol("a query", format!("{value:?} is no name of a class")));
        }
        // Conditions stand beside each other, without AND.
        text.push_str(&format!("{joint} {name}={value}"));
        joint = "";
    }
    Ok(text)
}

/// The path within its namespace, as methods and statements take it.
pub fn relative(path: &ObjectPath) -> String {
    ObjectPath { host: None, namespace: String::new(), ..path.clone() }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn associations_are_asked_by_statements() {
        let path = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", r#"A\"{B}"#)]);
        let association = Association {
            class: Some("Msvm_AffectedJobElement".into()),
            result_class: Some("Msvm_X".into()),
            role: Some("AffectingElement".into()),
        };
        assert_eq!(
            associators(&path, &association).unwrap(),
            r#"ASSOCIATORS OF {Msvm_ConcreteJob.InstanceID="A\\\"{B}"} WHERE AssocClass=Msvm_AffectedJobElement ResultClass=Msvm_X Role=AffectingElement"#
        );
        assert_eq!(
            references(&path, &Association::new("Msvm_A", "ignored")).unwrap(),
            r#"REFERENCES OF {Msvm_ConcreteJob.InstanceID="A\\\"{B}"} WHERE ResultClass=Msvm_A"#
        );
        let all = references(&path, &Association::default()).unwrap();
        assert!(!all.contains("WHERE"));
        assert!(associators(&path, &Association::new("A B", "C")).is_err());
    }
}
