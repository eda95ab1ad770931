//! The OpenAPI 3.1 document of `/v1`, as `docs/agent-protocol.md` describes it.
//!
//! Written by hand, from one table of routes; a test asks a running agent for every one of them and compares the
//! answers with what the document promises.

use serde_json::{Map, Value, json};

/// An operation of the table: route, method, summary, rights, parameters, body, answer.
struct Operation {
    route: &'static str,
    method: &'static str,
    id: &'static str,
    summary: &'static str,
    needs_write: bool,
    /// Parameters of the query; those that must be there begin with `!`.
    query: &'static [&'static str],
    body: Body,
    status: u16,
    answer: Answer,
}

#[derive(Clone, Copy)]
enum Body {
    None,
    Json(&'static str),
    Content,
}

#[derive(Clone, Copy)]
enum Answer {
    Nothing,
    Json(&'static str),
    Content,
    Text,
}

const READ: &[&str] = &["!path", "ranges", "from", "format", "compress"];
const READ_LIST: &[&str] = &["!path", "from", "format", "compress"];
const READ_FROZEN: &[&str] = &["ranges", "from", "format", "compress"];
const READ_FROZEN_LIST: &[&str] = &["from", "format", "compress"];

const fn operation(
    route: &'static str,
    method: &'static str,
    id: &'static str,
    summary: &'static str,
) -> Operation {
    Operation {
        route,
        method,
        id,
        summary,
        needs_write: false,
        query: &[],
        body: Body::None,
        status: 200,
        answer: Answer::Nothing,
    }
}

impl Operation {
    const fn query(mut self, query: &'static [&'static str]) -> Self {
        self.query = query;
        self
    }
    const fn writes(mut self) -> Self {
        self.needs_write = true;
        self
    }
    const fn takes(mut self, body: Body) -> Self {
        self.body = body;
        self
    }
    const fn gives(mut self, status: u16, answer: Answer) -> Self {
        self.status = status;
        self.answer = answer;
        self
    }
}

const OPERATIONS: &[Operation] = &[
    operation("/v1", "get", "showAgent", "Version, rights of the key, limits")
        .gives(200, Answer::Json("Agent")),
    operation("/v1/health", "get", "health", "Whether the agent answers; without a key")
        .gives(200, Answer::Json("Health")),
    operation("/v1/openapi.json", "get", "openapi", "This document")
        .gives(200, Answer::Json("Any")),
    operation("/v1/metrics", "get", "metrics", "Counters in the text form of Prometheus")
        .gives(200, Answer::Text),
    operation("/v1/disks", "get", "showDisk", "What a disk is")
        .query(&["!path"])
        .gives(200, Answer::Json("Disk")),
    operation("/v1/disks", "post", "createDisk", "Makes a disk; never replaces a file")
        .query(&["!path"])
        .writes()
        .takes(Body::Json("NewDisk"))
        .gives(201, Answer::Json("Disk")),
    operation("/v1/disks/tracking", "get", "showTracking", "The state of change tracking")
        .query(&["!path"])
        .gives(200, Answer::Json("Tracking")),
    operation("/v1/disks/tracking", "put", "setTracking", "Switches change tracking")
        .query(&["!path"])
        .writes()
        .takes(Body::Json("TrackingSwitch"))
        .gives(200, Answer::Json("Tracking")),
    operation("/v1/disks/tracking/checkpoints", "post", "seal", "Seals a tracking id now")
        .query(&["!path"])
        .writes()
        .gives(201, Answer::Json("Checkpoint")),
    operation("/v1/disks/changes", "get", "changes", "A page of the ranges changed since an id")
        .query(&["!path", "!since", "cursor", "limit"])
        .gives(200, Answer::Json("Changes")),
    operation("/v1/disks/content", "get", "read", "Content of the live disk")
        .query(READ)
        .gives(200, Answer::Content),
    operation("/v1/disks/content", "post", "readRanges", "Content; the ranges in the body")
        .query(READ_LIST)
        .takes(Body::Json("Ranges"))
        .gives(200, Answer::Content),
    operation("/v1/disks/content", "put", "write", "Writes content and flushes it")
        .query(&["!path", "offset"])
        .writes()
        .takes(Body::Content)
        .gives(200, Answer::Json("Written")),
    operation("/v1/freezes", "get", "listFreezes", "The freezes of this key")
        .gives(200, Answer::Json("Freezes")),
    operation("/v1/freezes", "post", "freeze", "Fixes one moment of several disks")
        .takes(Body::Json("NewFreeze"))
        .gives(201, Answer::Json("Freeze")),
    operation("/v1/freezes/{id}", "get", "showFreeze", "One freeze")
        .gives(200, Answer::Json("Freeze")),
    operation("/v1/freezes/{id}", "put", "renewFreeze", "Begins its life anew")
        .takes(Body::Json("Renewal"))
        .gives(200, Answer::Json("Freeze")),
    operation("/v1/freezes/{id}", "delete", "endFreeze", "Ends it").gives(204, Answer::Nothing),
    operation(
        "/v1/freezes/{id}/disks/{index}/content",
        "get",
        "readFrozen",
        "Content at the moment",
    )
    .query(READ_FROZEN)
    .gives(200, Answer::Content),
    operation(
        "/v1/freezes/{id}/disks/{index}/content",
        "post",
        "readFrozenRanges",
        "Content; the ranges in the body",
    )
    .query(READ_FROZEN_LIST)
    .takes(Body::Json("Ranges"))
    .gives(200, Answer::Content),
    operation(
        "/v1/freezes/{id}/disks/{index}/changes",
        "get",
        "frozenChanges",
        "Changed ranges of a frozen disk",
    )
    .query(&["!since", "cursor", "limit"])
    .gives(200, Answer::Json("Changes")),
    operation("/v1/vms", "get", "listVms", "The VMs of this host")
        .query(&["select"])
        .gives(200, Answer::Json("Vms")),
    operation("/v1/vms/config", "get", "showVm", "The configuration of a VM")
        .query(&["!vm"])
        .gives(200, Answer::Json("VmConfig")),
    operation(
        "/v1/vms/health",
        "get",
        "examineVms",
        "What works on the host and its VMs, and what does not",
    )
    .query(&["vm"])
    .gives(200, Answer::Json("HealthChecks")),
    operation("/v1/vms/reap", "post", "reap", "Removes what killed jobs left")
        .writes()
        .query(&["orphans"])
        .gives(200, Answer::Json("ReapReport")),
    operation("/v1/vms/freezes", "get", "listVmFreezes", "The freezes of VMs of this key")
        .gives(200, Answer::Json("VmFreezes")),
    operation(
        "/v1/vms/freezes",
        "post",
        "freezeVm",
        "Begins to freeze a VM, once for each client_token",
    )
    .takes(Body::Json("NewVmFreeze"))
    .gives(202, Answer::Json("VmFreeze")),
    operation(
        "/v1/vms/freezes/{id}",
        "get",
        "showVmFreeze",
        "How a freeze of a VM stands, and its moment",
    )
    .gives(200, Answer::Json("VmFreeze")),
    operation("/v1/vms/freezes/{id}", "put", "renewVmFreeze", "Begins its life anew")
        .takes(Body::Json("Renewal"))
        .gives(200, Answer::Json("VmFreeze")),
    operation(
        "/v1/vms/freezes/{id}",
        "delete",
        "abortVmFreeze",
        "Gives it up; 200 once it is over",
    )
    .gives(202, Answer::Json("VmFreeze")),
    operation(
        "/v1/vms/freezes/{id}/seal",
        "post",
        "sealVmFreeze",
        "Names its moment for good; 200 once it has",
    )
    .gives(202, Answer::Json("VmFreeze")),
    operation(
        "/v1/vms/freezes/{id}/commit",
        "post",
        "commitVmFreeze",
        "Keeps its tracking; 200 once it is over",
    )
    .gives(202, Answer::Json("VmFreeze")),
    operation(
        "/v1/vms/freezes/{id}/check",
        "get",
        "checkVmFreeze",
        "Whether its disks showed one moment up to now",
    )
    .gives(200, Answer::Json("Any")),
    operation(
        "/v1/vms/freezes/{id}/disks/{index}/content",
        "get",
        "readVm",
        "Content at the moment",
    )
    .query(READ_FROZEN)
    .gives(200, Answer::Content),
    operation(
        "/v1/vms/freezes/{id}/disks/{index}/content",
        "post",
        "readVmRanges",
        "Content; the ranges in the body",
    )
    .query(READ_FROZEN_LIST)
    .takes(Body::Json("Ranges"))
    .gives(200, Answer::Content),
    operation(
        "/v1/vms/freezes/{id}/disks/{index}/changes",
        "get",
        "vmChanges",
        "What may differ from the base",
    )
    .query(&["cursor", "limit"])
    .gives(200, Answer::Json("Changes")),
    operation(
        "/v1/cim",
        "post",
        "cim",
        "Asks the host's management objects of VMs; calling a method needs a key that may write",
    )
    .takes(Body::Json("Any"))
    .gives(200, Answer::Json("Any")),
    operation(
        "/v1/files",
        "get",
        "listFiles",
        "The files of a directory, and what is free on its volume",
    )
    .query(&["!path"])
    .gives(200, Answer::Json("Directory")),
    operation("/v1/files", "delete", "removeFile", "Removes a file")
        .query(&["!path"])
        .writes()
        .gives(204, Answer::Nothing),
    operation("/v1/files/content", "get", "readFile", "A small file, whole")
        .query(&["!path"])
        .gives(200, Answer::Content),
    operation("/v1/files/content", "post", "writeFile", "Makes a small file; never replaces one")
        .query(&["!path"])
        .writes()
        .takes(Body::Content)
        .gives(201, Answer::Nothing),
    operation(
        "/v1/files/directories",
        "post",
        "makeDirectory",
        "Makes a directory with its parents",
    )
    .query(&["!path"])
    .writes()
    .gives(201, Answer::Nothing),
    operation(
        "/v1/files/directories",
        "delete",
        "removeDirectory",
        "Removes a directory that is empty",
    )
    .query(&["!path"])
    .writes()
    .gives(204, Answer::Nothing),
    operation("/v1/jobs", "get", "listJobs", "The transfers of this key, running and ended")
        .gives(200, Answer::Json("Jobs")),
    operation("/v1/jobs/{id}", "get", "showJob", "One transfer").gives(200, Answer::Json("Job")),
    operation("/v1/jobs/{id}", "delete", "cancelJob", "Cancels a running transfer")
        .gives(204, Answer::Nothing),
];

/// The document.
pub fn document() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.route).or_insert_with(|| json!({}));
        path[operation.method] = describe(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "vmtide agent",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Change tracking and content of virtual disks over HTTPS",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "security": [{ "bearer": [] }, { "authKey": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "authKey": { "type": "apiKey", "in": "header", "name": "auth_key" },
            },
            "schemas": schemas(),
        },
    })
}

fn describe(operation: &Operation) -> Value {
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "x-rights": if operation.needs_write { "read-write" } else { "read-only" },
        "responses": {
            operation.status.to_string(): answer(operation.answer),
            "default": { "description": "An error", "content": json_content("Error") },
        },
    });
    if operation.status == 202 {
        // What was begun may be over already.
        described["responses"]["200"] = answer(operation.answer);
    }
    let names = operation.route.split(['{', '}']).skip(1).step_by(2);
    let in_path = names.map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }));
    let parameters: Vec<Value> =
        in_path.chain(operation.query.iter().map(|name| parameter(name))).collect();
    if !parameters.is_empty() {
        described["parameters"] = Value::Array(parameters);
    }
    match operation.body {
        Body::None => {}
        Body::Json(schema) => {
            described["requestBody"] = json!({ "required": true, "content": json_content(schema) });
        }
        Body::Content => {
            described["requestBody"] = json!({ "required": true, "content": binary_content() });
        }
    }
    if operation.id == "health" {
        described["security"] = json!([]);
    }
    described
}

fn parameter(name: &str) -> Value {
    let required = name.starts_with('!');
    let name = name.trim_start_matches('!');
    let schema = match name {
        "from" | "cursor" | "limit" | "offset" => json!({ "type": "integer", "minimum": 0 }),
        "format" => json!({ "enum": ["raw", "ranges"] }),
        "compress" => json!({ "enum": ["none", "zstd"] }),
        _ => json!({ "type": "string" }),
    };
    json!({ "name": name, "in": "query", "required": required, "schema": schema })
}

fn answer(answer: Answer) -> Value {
    match answer {
        Answer::Nothing => json!({ "description": "Done" }),
        Answer::Json(schema) => json!({ "description": "Done", "content": json_content(schema) }),
        Answer::Text => {
            json!({ "description": "Done", "content": { "text/plain": { "schema": { "type": "string" } } } })
        }
        Answer::Content => json!({
            "description": "The content; 206 where a Range was asked for",
            "headers": {
                "vmtide-job": { "schema": { "type": "string" } },
                "vmtide-content-bytes": { "schema": { "type": "integer" } },
            },
            "content": binary_content(),
        }),
    }
}

fn json_content(schema: &str) -> Value {
    json!({ "application/json": { "schema": { "$ref": format!("#/components/schemas/{schema}") } } })
}

fn binary_content() -> Value {
    json!({ "application/octet-stream": {}, "application/vnd.vmtide.ranges": {} })
}

/// An object all of whose members are there; those that may be null have a `?`.
fn object(members: &[(&str, Value)]) -> Value {
    let properties: Map<String, Value> = members
        .iter()
        .map(|(name, schema)| (name.trim_end_matches('?').to_owned(), schema.clone()))
        .collect();
    let required: Vec<&str> = members.iter().map(|(name, _)| name.trim_end_matches('?')).collect();
    json!({ "type": "object", "properties": properties, "required": required })
}

/// The same for what clients send: members with a `?` may be left out.
fn wanted(members: &[(&str, Value)]) -> Value {
    let mut schema = object(members);
    let required = members.iter().map(|(name, _)| *name).filter(|name| !name.ends_with('?'));
    schema["required"] = required.collect::<Vec<_>>().into();
    schema
}

fn list_of(schema: &str) -> Value {
    json!({ "type": "array", "items": { "$ref": format!("#/components/schemas/{schema}") } })
}

#[allow(clippy::too_many_lines, reason = "a table")]
fn schemas() -> Value {
    let (integer, text, flag) = (
        || json!({ "type": "integer", "minimum": 0 }),
        || json!({ "type": "string" }),
        || json!({ "type": "boolean" }),
    );
    let or_null = |kind: &str| json!({ "type": [kind, "null"] });
    let time = || json!({ "type": "string", "format": "date-time" });
    let mut all = Map::new();
    let mut add = |name: &str, schema| all.insert(name.to_owned(), schema);
    add("Any", json!({ "type": "object" }));
    add("Error", object(&[("error", object(&[("code", text()), ("message", text())]))]));
    add("Health", object(&[("status", text())]));
    add(
        "Agent",
        object(&[
            ("api", integer()),
            ("version", text()),
            ("key", json!({ "type": "object" })),
            ("limits", json!({ "type": "object" })),
        ]),
    );
    add("Range", object(&[("offset", integer()), ("length", integer())]));
    add("Ranges", list_of("Range"));
    add(
        "Disk",
        object(&[
            ("path", text()),
            ("virtual_size_bytes", integer()),
            ("physical_size_bytes", integer()),
            ("block_size_bytes", integer()),
            ("logical_sector_bytes", integer()),
            ("physical_sector_bytes", integer()),
            ("parent_path?", or_null("string")),
            ("virtual_storage_type", integer()),
            ("provider_sub_type", integer()),
            ("format", text()),
            ("disk_id?", or_null("string")),
        ]),
    );
    add(
        "NewDisk",
        wanted(&[
            ("format", text()),
            ("virtual_size_bytes", integer()),
            ("fixed", flag()),
            ("logical_sector_bytes?", or_null("integer")),
            ("physical_sector_bytes?", or_null("integer")),
            ("block_size_bytes?", or_null("integer")),
            ("disk_id?", or_null("string")),
        ]),
    );
    add(
        "Tracking",
        object(&[("enabled", flag()), ("newer_changes", flag()), ("most_recent_id", text())]),
    );
    add("TrackingSwitch", wanted(&[("enabled", flag())]));
    add("Checkpoint", object(&[("tracking_id", text())]));
    add(
        "Changes",
        object(&[
            ("ranges", list_of("Range")),
            ("next_cursor?", or_null("integer")),
            ("disk_size_bytes", integer()),
        ]),
    );
    add(
        "Written",
        object(&[
            ("written_bytes", integer()),
            ("zeroed_bytes", integer()),
            ("position", integer()),
        ]),
    );
    add(
        "NewFreeze",
        wanted(&[
            ("disks", json!({ "type": "array", "items": text() })),
            ("ttl_seconds?", or_null("integer")),
        ]),
    );
    add("Renewal", wanted(&[("ttl_seconds?", or_null("integer"))]));
    add(
        "FrozenDisk",
        object(&[
            ("index", integer()),
            ("path", text()),
            ("size_bytes", integer()),
            ("tracking_id?", or_null("string")),
        ]),
    );
    add(
        "Freeze",
        object(&[
            ("id", text()),
            ("created_at", time()),
            ("expires_at", time()),
            ("ttl_seconds", integer()),
            ("disks", list_of("FrozenDisk")),
        ]),
    );
    add("Freezes", object(&[("freezes", list_of("Freeze"))]));
    add(
        "Job",
        object(&[
            ("id", text()),
            ("kind", json!({ "enum": ["read", "write"] })),
            ("disk", text()),
            ("state", json!({ "enum": ["running", "complete", "failed", "cancelled", "aborted"] })),
            ("error?", or_null("string")),
            ("total_bytes?", or_null("integer")),
            ("done_bytes", integer()),
            ("wire_bytes", integer()),
            ("started_at", time()),
            ("ended_at?", json!({ "type": ["string", "null"], "format": "date-time" })),
        ]),
    );
    add("Jobs", object(&[("jobs", list_of("Job"))]));
    add_vm_schemas(&mut add);
    Value::Object(all)
}

fn add_vm_schemas(add: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let integer = || json!({ "type": "integer", "minimum": 0 });
    let text = || json!({ "type": "string" });
    let or_null = |kind: &str| json!({ "type": [kind, "null"] });
    let texts = || json!({ "type": "array", "items": text() });
    let summary =
        [("name", text()), ("id?", or_null("string")), ("state", text()), ("disks", integer())];
    add("Vm", object(&summary));
    add("Vms", object(&[("vms", list_of("Vm"))]));
    add("VmConfig", json!({ "type": "object" }));
    let state = json!({ "type": "string", "enum": ["ok", "warn", "fail"] });
    let check =
        [("name", text()), ("state", state), ("detail", text()), ("mend?", or_null("string"))];
    // What to do is left out where there is nothing to do.
    add("HealthCheck", wanted(&check));
    add("HealthChecks", object(&[("checks", list_of("HealthCheck"))]));
    add("ReapReport", object(&[("removed", texts()), ("in_use", texts()), ("notes", texts())]));
    let base = [("disk", text()), ("tracking_id?", or_null("string")), ("size_bytes", integer())];
    add("VmBase", wanted(&base));
    add(
        "NewVmFreeze",
        wanted(&[
            ("client_token", text()),
            ("vm", text()),
            ("job", text()),
            ("lineage", text()),
            ("consistency", json!({ "enum": ["app", "fs", "crash"] })),
            ("allow_downgrade?", json!({ "type": "boolean" })),
            ("bases?", list_of("VmBase")),
            ("exclude?", texts()),
            ("ttl_seconds?", or_null("integer")),
        ]),
    );
    add(
        "VmFreeze",
        object(&[
            ("id", text()),
            ("client_token", text()),
            ("vm", text()),
            (
                "state",
                json!({ "enum": [
                    "freezing", "frozen", "sealing", "sealed", "seal_failed", "committing", "committed", "commit_failed", "aborting", "aborted",
                    "abort_failed", "failed",
                ] }),
            ),
            ("created_at", json!({ "type": "string", "format": "date-time" })),
            ("expires_at?", json!({ "type": ["string", "null"], "format": "date-time" })),
            ("ttl_seconds", integer()),
            ("error?", json!({ "type": ["object", "null"] })),
            ("notes", texts()),
            ("moment?", json!({ "type": ["object", "null"] })),
            ("seal?", json!({ "type": ["object", "null"] })),
        ]),
    );
    add("VmFreezes", object(&[("freezes", list_of("VmFreeze"))]));
    add("File", object(&[("name", text()), ("size_bytes", integer())]));
    add(
        "Directory",
        object(&[
            ("path", text()),
            ("free_bytes?", or_null("integer")),
            ("files", list_of("File")),
        ]),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_reference_leads_to_a_schema_and_ids_are_unique() {
        let document = document();
        let text = document.to_string();
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
        let ids: BTreeSet<_> = OPERATIONS.iter().map(|operation| operation.id).collect();
        assert_eq!(ids.len(), OPERATIONS.len());
    }

    #[test]
    fn the_document_for_people_has_the_same_routes() {
        let people = include_str!("../../../docs/agent-protocol.md");
        for operation in OPERATIONS {
            let route = operation.route.replace("{id}", "ID").replace("{index}", "N");
            let method = operation.method.to_uppercase();
            let line = people.lines().find(|line| {
                let cell = line.split('|').nth(1).unwrap_or_default();
                cell.contains(&method) && cell.split(['`', '?', ' ', '[']).any(|word| word == route)
            });
            assert!(line.is_some(), "{method} {route} is not in docs/agent-protocol.md");
        }
    }
}
