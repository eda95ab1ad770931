//! Answers held against what the agent's own document promises.

use super::client::Answer;

/// What a schema promises, as far as the document says it: types, members that must be there, lists.
fn fits(
    document: &serde_json::Value,
    schema: &serde_json::Value,
    value: &serde_json::Value,
) -> bool {
    if let Some(name) = schema["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
        return fits(document, &document["components"]["schemas"][name], value);
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{other}"),
    };
    let typed = match &schema["type"] {
        serde_json::Value::Array(kinds) => kinds.iter().any(|kind| is(kind.as_str().unwrap())),
        kind => is(kind.as_str().unwrap()),
    };
    let members = schema["required"].as_array().into_iter().flatten().all(|name| {
        let name = name.as_str().unwrap();
        value.get(name).is_some_and(|member| fits(document, &schema["properties"][name], member))
    });
    // Nothing is told that the document does not know.
    let known = schema["properties"].as_object().is_none_or(|properties| {
        value
            .as_object()
            .is_none_or(|members| members.keys().all(|name| properties.contains_key(name)))
    });
    let items = value
        .as_array()
        .is_none_or(|items| items.iter().all(|item| fits(document, &schema["items"], item)));
    typed && members && known && items
}

/// Fails where an answer is not one that the document promises of the operation.
pub fn check_answer(
    document: &serde_json::Value,
    operation: &serde_json::Value,
    answer: &Answer,
    target: &str,
) {
    let status = answer.status.to_string();
    let promised = &operation["responses"][&status];
    assert!(promised.is_object(), "{target}: {status} {}", String::from_utf8_lossy(&answer.body));
    assert!(answer.complete, "{target}");
    let Some(kinds) = promised["content"].as_object() else {
        assert!(answer.body.is_empty(), "{target}");
        return;
    };
    let kind = answer.headers["content-type"].split(';').next().unwrap();
    assert!(kinds.contains_key(kind), "{target}: {kind}");
    if kind == "application/json" {
        let schema = &kinds[kind]["schema"];
        assert!(fits(document, schema, &answer.json()), "{target}: {}", answer.json());
    }
}
