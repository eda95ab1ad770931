//! What the fuzz targets call; see `fuzz/README.md`.

/// Reads bytes as CIM-XML. What can be read can be written, and is the same when it is read again.
///
/// # Panics
/// Where it is not: that is what is looked for.
#[doc(hidden)]
#[allow(clippy::panic, reason = "a fuzz target reports what it finds by a panic")]
pub fn xml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(read) = crate::xml::from_xml(text) else {
        return;
    };
    // Characters that cannot be written, and what grows past the limit by being escaped.
    let Ok(written) = crate::xml::to_xml(&read) else {
        return;
    };
    let mut expected = read;
    without_nulls(&mut expected);
    match crate::xml::from_xml(&written) {
        Ok(again) if again == expected => {}
        other => panic!("{expected:?} was written as {written} and read as {other:?}"),
    }
}

/// Properties without a value are not written.
fn without_nulls(instance: &mut crate::CimInstance) {
    use crate::CimValue;
    instance.properties.retain(|(_, value)| *value != CimValue::Null);
    for (_, value) in &mut instance.properties {
        match value {
            CimValue::Instance(inner) => without_nulls(inner),
            CimValue::Array(_, items) => {
                for item in items {
                    if let CimValue::Instance(inner) = item {
                        without_nulls(inner);
                    }
                }
            }
            _ => {}
        }
    }
}
