//! `/v1/vms`, `/v1/cim` and `/v1/files` as `docs/agent-protocol.md` promises them, over a stand-in for a platform.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "tests: a failed unwrap is a failed test, and one story is told in one piece"
)]

use crate::support::agent::Agent;
use crate::support::client::{Answer, Client, escape};
use crate::support::hypervisor::{DISK, EchoCim, Script, TestHypervisor, content, wanted};
use crate::support::openapi::check_answer;
use crate::support::provider::{TestDisk, TestProvider};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmtide_agent::limits::Limits;
use vmtide_agent::vms::VmPlatform;

/// An agent with the VM `web`, whose disks are a.vhdx and b.vhdx of the agent's root, or lie elsewhere.
fn agent_with(elsewhere: bool, limits: Limits) -> (Arc<Script>, Agent) {
    agent_of(&TestDisk::memory(vec![1; 4096]), elsewhere, limits)
}

/// The same where a.vhdx is this disk.
fn agent_of(first: &Arc<TestDisk>, elsewhere: bool, limits: Limits) -> (Arc<Script>, Agent) {
    let second = TestDisk::memory(vec![1; 4096]);
    let provider = TestProvider::new(&[("a.vhdx", Arc::clone(first)), ("b.vhdx", second)]);
    let hypervisor = TestHypervisor::new(&["a.vhdx".into(), "b.vhdx".into()]);
    let script = Arc::clone(&hypervisor.script);
    // The directory is known only once the agent is there: the platform's own names of disks are short ones.
    let root = Arc::new(parking_lot::Mutex::new(std::path::PathBuf::new()));
    let of_paths = Arc::clone(&root);
    let platform = VmPlatform {
        hypervisor: Arc::new(hypervisor),
        cim: Some(Arc::new(EchoCim)),
        host_path: Some(Arc::new(move |path| of_paths.lock().join(path))),
    };
    let agent = Agent::start_with(provider, limits, Some(platform));
    *root.lock() = agent.directory.path().join(if elsewhere { "." } else { "disks" });
    (script, agent)
}

fn agent() -> (Arc<Script>, Agent) {
    agent_with(false, Limits::default())
}

fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn begin(client: &Client, token: &str) -> String {
    let began = client.json("POST", "/v1/vms/freezes", &wanted(token));
    assert!(began.status == 202, "{}", began.json());
    format!("/v1/vms/freezes/{}", began.json()["id"].as_str().unwrap())
}

fn state(client: &Client, freeze: &str) -> String {
    client.get(freeze).json()["state"].as_str().unwrap().to_owned()
}

/// The freeze once it stands as wanted.
fn when(client: &Client, freeze: &str, wanted: &str) -> Value {
    until(wanted, || state(client, freeze) == wanted);
    client.get(freeze).json()
}

fn frozen(client: &Client, token: &str) -> String {
    let freeze = begin(client, token);
    when(client, &freeze, "frozen");
    freeze
}

fn post(client: &Client, target: &str) -> Answer {
    client.request("POST", target, &[], b"")
}

fn delete(client: &Client, target: &str) -> Answer {
    client.request("DELETE", target, &[], b"")
}

#[test]
fn a_vm_is_frozen_read_and_committed() {
    let (script, agent) = agent();
    let reader = agent.reader();
    until("reaping at the start", || script.reaps.load(Ordering::SeqCst) == 1);
    assert_eq!(reader.get("/v1/vms").json()["vms"][0]["name"], "web");
    assert_eq!(reader.get("/v1/vms/config?vm=6b17").json()["disks"][1]["id"], "scsi0:1");
    assert_eq!(reader.get("/v1/vms/config?vm=db").code(), "not_found");
    let health = reader.get("/v1/vms/health").json();
    assert_eq!(health["checks"][0], json!({"name": "host", "state": "ok", "detail": "answers"}));
    let health = reader.get("/v1/vms/health?vm=web").json();
    assert_eq!(
        (&health["checks"][1]["detail"], &health["checks"][1]["mend"]),
        (&json!("web"), &json!("raise it"))
    );
    assert_eq!(post(&reader, "/v1/vms/reap").code(), "read_only_key");
    assert_eq!(script.reaps.load(Ordering::SeqCst), 1);
    let reaped = post(&agent.writer(), "/v1/vms/reap");
    assert_eq!(reaped.json()["removed"][0], "a checkpoint");
    until("the line before it began", || {
        let log = agent.directory.path().join("state/audit.log");
        let log = std::fs::read_to_string(log).unwrap_or_default();
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let is_begun = |line: &Value| line["call"] == "reap" && line["status"] == 0;
        lines.any(|line| is_begun(&line) && line["key"] == "writer")
    });

    let freeze = frozen(&reader, "firstfirst");
    let view = reader.get(&freeze).json();
    let moment = &view["moment"];
    assert_eq!(
        (&moment["consistency"], &moment["warnings"][0]),
        (&json!("app"), &json!("a warning"))
    );
    assert_eq!(moment["config"]["name"], "web");
    assert_eq!(
        moment["disks"][0]["changes"],
        json!({"kind": "ranges", "count": 2, "total_bytes": 1536})
    );
    assert_eq!(moment["disks"][1]["changes"]["reason"]["code"], "first-backup");
    let request = script.request.lock().clone().unwrap();
    assert_eq!((request.vm.as_str(), request.bases.len()), ("web", 1));

    for disk in 0..2 {
        let read = reader.get(&format!("{freeze}/disks/{disk}/content"));
        assert!(read.complete && read.body == content(disk), "{disk}");
    }
    let part = reader.get(&format!("{freeze}/disks/1/content?ranges=512:1024&format=ranges"));
    assert!(part.status == 200 && part.complete);
    let changes = reader.get(&format!("{freeze}/disks/0/changes?limit=1")).json();
    assert_eq!(changes["ranges"], json!([{"offset": 4096, "length": 512}]));
    let next = changes["next_cursor"].as_u64().unwrap();
    let changes = reader.get(&format!("{freeze}/disks/0/changes?cursor={next}")).json();
    assert_eq!(changes["ranges"], json!([{"offset": 65536, "length": 1024}]));
    assert_eq!(changes["next_cursor"], Value::Null);
    let all = reader.get(&format!("{freeze}/disks/1/changes")).json();
    assert_eq!(all["ranges"], json!([{"offset": 0, "length": DISK}]));
    assert_eq!(reader.get(&format!("{freeze}/disks/2/content")).code(), "unknown_freeze");

    assert_eq!(reader.get(&format!("{freeze}/check")).json(), json!({}));
    script.lost.store(true, Ordering::SeqCst);
    assert_eq!(reader.get(&format!("{freeze}/check")).code(), "moment_lost");

    assert!(script.handles.load(Ordering::SeqCst) == 2);
    post(&reader, &format!("{freeze}/commit"));
    let view = when(&reader, &freeze, "committed");
    assert_eq!(
        (&view["notes"], &view["moment"]),
        (&json!(["an AVHDX that still merges"]), &Value::Null)
    );
    assert_eq!(script.handles_at_end.load(Ordering::SeqCst), 0);
    // The answer was lost: it is asked again, and nothing happens twice.
    assert_eq!(post(&reader, &format!("{freeze}/commit")).json()["state"], "committed");
    assert_eq!(script.commits.load(Ordering::SeqCst), 1);
    assert_eq!(delete(&reader, &freeze).code(), "wrong_state");
    assert_eq!(reader.get(&format!("{freeze}/disks/0/content")).code(), "unknown_freeze");
    assert_eq!(script.aborts.load(Ordering::SeqCst), 0);
}

#[test]
fn a_moment_is_sealed_once_and_then_committed_or_given_up() {
    let (script, agent) = agent();
    let reader = agent.reader();
    assert_eq!(reader.get("/v1/vms?select=w*").json()["vms"].as_array().unwrap().len(), 1);
    assert_eq!(reader.get("/v1/vms?select=db,tag:x").json()["vms"], json!([]));
    assert_eq!(reader.get("/v1/vms?select=tag:").code(), "bad_request");
    let freeze = frozen(&reader, "sealed000");
    post(&reader, &format!("{freeze}/seal"));
    let view = when(&reader, &freeze, "sealed");
    assert_eq!(
        view["seal"],
        json!({"tracking": {"scsi0:0": "rctX:sealed"}, "warnings": ["disk 1 has no name"]})
    );
    assert_eq!(post(&reader, &format!("{freeze}/seal")).json()["seal"], view["seal"]);
    assert_eq!(reader.get(&format!("{freeze}/disks/0/content")).code(), "unknown_freeze");
    post(&reader, &format!("{freeze}/commit"));
    when(&reader, &freeze, "committed");
    assert_eq!(
        (script.seals.load(Ordering::SeqCst), script.commits.load(Ordering::SeqCst)),
        (1, 1)
    );
    assert_eq!(post(&reader, &format!("{freeze}/seal")).code(), "wrong_state");

    script.fail_seal.store(true, Ordering::SeqCst);
    let freeze = frozen(&reader, "sealed001");
    post(&reader, &format!("{freeze}/seal"));
    let view = when(&reader, &freeze, "seal_failed");
    assert_eq!(view["error"]["detail"], "no reference point");
    assert_eq!(post(&reader, &format!("{freeze}/commit")).code(), "wrong_state");
    delete(&reader, &freeze);
    when(&reader, &freeze, "aborted");
    assert_eq!(script.handles_at_end.load(Ordering::SeqCst), 0);
}

#[test]
fn a_lost_answer_freezes_nothing_twice() {
    let (script, agent) = agent();
    let reader = agent.reader();
    script.hold_freeze.store(true, Ordering::SeqCst);
    let body = wanted("lostanswer");
    let first = reader.json("POST", "/v1/vms/freezes", &body);
    let again = reader.json("POST", "/v1/vms/freezes", &body);
    assert_eq!((first.status, again.status), (202, 200));
    assert_eq!(
        (&first.json()["id"], &first.json()["state"]),
        (&again.json()["id"], &json!("freezing"))
    );
    assert_eq!(reader.json("POST", "/v1/vms/freezes", &wanted("lostanswer")).code(), "token_used");
    script.hold_freeze.store(false, Ordering::SeqCst);
    let freeze = format!("/v1/vms/freezes/{}", first.json()["id"].as_str().unwrap());
    when(&reader, &freeze, "frozen");
    assert_eq!(script.freezes.load(Ordering::SeqCst), 1);
    // The mark is the client's own.
    let other = agent.other();
    let of_other = other.json("POST", "/v1/vms/freezes", &body);
    assert_eq!(of_other.status, 202);
    assert_eq!(other.get(&freeze).code(), "unknown_freeze");
    assert_eq!(delete(&other, &freeze).code(), "unknown_freeze");
    assert_eq!(reader.get("/v1/vms/freezes").json()["freezes"].as_array().unwrap().len(), 1);

    for (change, word) in [
        (json!({"job": "../../x"}), "job"),
        (json!({"lineage": "x"}), "lineage"),
        (json!({"client_token": "a"}), "client_token"),
        (json!({"ttl_seconds": 1}), "ttl_seconds"),
        (json!({"vm": ""}), "vm"),
        (json!({"strange": 1}), "strange"),
        (json!({"consistency": "perfect"}), "perfect"),
    ] {
        let mut body = wanted("another-one".replace('-', "").as_str());
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let refused = reader.json("POST", "/v1/vms/freezes", &body);
        assert_eq!((refused.status, refused.code().as_str()), (400, "bad_request"), "{word}");
        assert!(refused.json()["error"]["message"].as_str().unwrap().contains(word), "{word}");
    }
}

#[test]
fn a_freeze_that_is_not_wanted_any_more_is_given_up_at_any_step() {
    let (script, agent) = agent();
    let reader = agent.reader();
    script.hold_freeze.store(true, Ordering::SeqCst);
    let freeze = begin(&reader, "whilefreezing");
    until("the platform", || script.freezes.load(Ordering::SeqCst) == 1);
    assert_eq!(post(&reader, &format!("{freeze}/commit")).code(), "wrong_state");
    assert!(matches!(delete(&reader, &freeze).status, 200 | 202));
    // The platform was told to stop, and it was the end of it.
    when(&reader, &freeze, "aborted");
    assert_eq!(delete(&reader, &freeze).status, 200);
    script.hold_freeze.store(false, Ordering::SeqCst);

    let freeze = frozen(&reader, "whilefrozen");
    let mut reading =
        reader.send("GET", &format!("{freeze}/disks/0/content?ranges=0:1048576,0:1048576,0:1048576,0:1048576,0:1048576,0:1048576,0:1048576,0:1048576"), &[], b"");
    reading.next(4096).unwrap().unwrap();
    assert!(matches!(delete(&reader, &freeze).status, 200 | 202));
    when(&reader, &freeze, "aborted");
    // Whoever reads is cut off, so that the handle is closed before the platform is told.
    assert_eq!(script.handles_at_end.load(Ordering::SeqCst), 0);
    assert_eq!(post(&reader, &format!("{freeze}/commit")).code(), "wrong_state");
    assert_eq!(
        (script.aborts.load(Ordering::SeqCst), script.commits.load(Ordering::SeqCst)),
        (1, 0)
    );

    script.fail_freeze.store(true, Ordering::SeqCst);
    let freeze = begin(&reader, "itfails00");
    let view = when(&reader, &freeze, "failed");
    assert_eq!(
        view["error"],
        json!({"code": "consistency_not_reached", "what": "consistency", "detail": "VSS said no", "wanted": "app"})
    );
    script.fail_freeze.store(false, Ordering::SeqCst);

    script.fail_commit.store(true, Ordering::SeqCst);
    let freeze = frozen(&reader, "commitfails");
    post(&reader, &format!("{freeze}/commit"));
    let view = when(&reader, &freeze, "commit_failed");
    assert!(view["error"]["detail"] == "32775", "{view}");
}

#[test]
fn an_agent_that_ends_gives_up_what_it_holds() {
    let (script, agent) = agent();
    frozen(&agent.reader(), "untiltheend");
    drop(agent);
    until("the end of the freeze", || script.aborts.load(Ordering::SeqCst) == 1);
    assert_eq!(script.handles.load(Ordering::SeqCst), 0);
}

#[test]
fn only_vms_whose_disks_are_served_are_frozen() {
    let (script, agent) = agent_with(true, Limits::default());
    let reader = agent.reader();
    let freeze = begin(&reader, "elsewhere1");
    let view = when(&reader, &freeze, "failed");
    assert_eq!(view["error"]["code"], "denied");
    assert!(view["error"]["detail"].as_str().unwrap().contains("--root"), "{view}");
    assert_eq!(script.freezes.load(Ordering::SeqCst), 0, "the VM was not touched");
    // What is left out need not be served.
    let mut body = wanted("elsewhere2");
    body["exclude"] = json!(["scsi0:0", "scsi0:1"]);
    let began = reader.json("POST", "/v1/vms/freezes", &body).json();
    when(&reader, &format!("/v1/vms/freezes/{}", began["id"].as_str().unwrap()), "frozen");
}

#[test]
fn a_vm_whose_disk_has_a_parent_elsewhere_is_not_frozen() {
    let disk = TestDisk::memory(vec![1; 4096]);
    *disk.parent.lock() = Some("b.vhdx".into());
    let (script, agent) = agent_of(&disk, false, Limits::default());
    let reader = agent.reader();
    delete(&reader, &frozen(&reader, "parent0000"));
    // The agent could read it, whoever asks.
    *disk.parent.lock() = Some("../keys".into());
    let freeze = begin(&reader, "parent0001");
    let view = when(&reader, &freeze, "failed");
    assert_eq!(view["error"]["code"], "denied");
    let detail = view["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("its parent ../keys"), "{detail}");
    assert_eq!(script.freezes.load(Ordering::SeqCst), 1, "the VM was not touched");
}

#[test]
fn places_are_limited_and_given_back() {
    let limits = Limits { freezes_per_client: 2, freezes_total: 3, ..Limits::default() };
    let (_, agent) = agent_with(false, limits);
    let (reader, other) = (agent.reader(), agent.other());
    let first = frozen(&reader, "first000");
    frozen(&reader, "second00");
    let refused = reader.json("POST", "/v1/vms/freezes", &wanted("third000"));
    assert_eq!((refused.status, refused.code().as_str()), (429, "too_many_freezes"));
    frozen(&other, "others00");
    assert_eq!(other.json("POST", "/v1/vms/freezes", &wanted("others01")).code(), "busy");
    delete(&reader, &first);
    when(&reader, &first, "aborted");
    frozen(&reader, "third000");
}

#[test]
fn a_host_without_vms_says_so() {
    let provider = TestProvider::new(&[("a.vhdx", TestDisk::memory(vec![1; 4096]))]);
    let agent = Agent::start(provider, Limits::default());
    let reader = agent.reader();
    for target in ["/v1/vms", "/v1/vms/config?vm=web", "/v1/vms/freezes", "/v1/vms/freezes/0"] {
        let refused = reader.get(target);
        assert_eq!((refused.status, refused.code().as_str()), (501, "unsupported"), "{target}");
    }
    assert_eq!(reader.json("POST", "/v1/vms/freezes", &wanted("nothing0")).code(), "unsupported");
    assert_eq!(
        reader.json("POST", "/v1/cim", &json!({"get": {"path": "A"}})).code(),
        "unsupported"
    );
    // Files are there all the same.
    assert_eq!(reader.get(&format!("/v1/files?path={}", escape(&agent.path("")))).status, 200);
}

#[test]
fn management_objects_are_asked_and_only_writers_change_them() {
    let (_, agent) = agent();
    let (reader, writer) = (agent.reader(), agent.writer());
    let ask = |client: &Client, call: Value| client.json("POST", "/v1/cim", &call);
    let vmms = r"root\virtualization\v2";
    let told = ask(&reader, json!({"query": {"namespace": vmms, "wql": "SELECT * FROM Msvm_X"}}));
    let text =
        |answer: &Answer| answer.json()["instances"][0]["properties"][0][1]["string"].clone();
    assert_eq!(text(&told), "SELECT * FROM Msvm_X");
    let path = format!("{vmms}:Msvm_X.Name=\"a\"");
    assert_eq!(text(&ask(&reader, json!({"get": {"path": path}}))), path);
    let association = json!({"class": "Msvm_Y", "result_class": null, "role": null});
    let call = json!({"associators": {"path": path, "association": association}});
    assert_eq!(text(&ask(&reader, call)), "Msvm_Y");
    let call = json!({"references": {"path": path, "association": association}});
    assert!(ask(&reader, call).json()["error"]["not_found"].is_object());

    let invoke = |path: &str| json!({"invoke": {"path": path, "method": "Start", "parameters": [["State", {"uint16": 2}]]}});
    assert_eq!(ask(&reader, invoke(&path)).code(), "read_only_key");
    let output = ask(&writer, invoke(&path)).json();
    assert_eq!(output["output"]["return_value"], 4096);
    assert_eq!(output["output"]["parameters"]["properties"], json!([["State", {"uint16": 2}]]));
    // A method is in the audit log before it is run, and again with its answer; what was looked at is, too.
    let log = agent.directory.path().join("state/audit.log");
    let of_call = |call: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(&log).unwrap();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["call"] == call).collect()
    };
    until("the calls in the audit log", || of_call("Msvm_X.Start").len() == 3);
    let lines = of_call("Msvm_X.Start");
    let told = |at: usize| (&lines[at]["status"], &lines[at]["key"], &lines[at]["vm"]);
    assert_eq!(told(0), (&json!(403), &json!("reader"), &json!("a")));
    assert_eq!(told(1), (&json!(0), &json!("writer"), &json!("a")));
    assert_eq!(told(2), (&json!(200), &json!("writer"), &json!("a")));
    assert_eq!(of_call("query Msvm_X").len(), 1);
    for bad in [
        invoke(r"root\cimv2:Win32_Process"),
        json!({"query": {"namespace": r"root\subscription", "wql": "SELECT *"}}),
        // The agent sees the whole host; its clients do not.
        json!({"query": {"namespace": r"root\cimv2", "wql": "SELECT CommandLine FROM Win32_Process"}}),
        json!({"query": {"namespace": r"root\cimv2", "wql": "SELECT * FROM CIM_DataFile"}}),
        json!({"query": {"namespace": vmms, "wql": r"ASSOCIATORS OF {\\.\root\cimv2:X.A=1}"}}),
        json!({"get": {"path": r#"root\cimv2:Win32_Process.Handle="4""#}}),
        json!({"invoke": {"path": path, "method": "A b", "parameters": []}}),
        json!({"invoke": {"path": "", "method": "A", "parameters": []}}),
        json!({"eval": {}}),
    ] {
        assert_eq!(ask(&writer, bad.clone()).code(), "bad_request", "{bad}");
    }
}

#[test]
fn files_are_made_read_and_removed_below_the_roots_only() {
    let (_, agent) = agent();
    let (reader, writer) = (agent.reader(), agent.writer());
    let at = |route: &str, name: &str| format!("{route}?path={}", escape(&agent.path(name)));
    let directory = at("/v1/files/directories", "vm/new");
    assert_eq!(post(&reader, &directory).code(), "read_only_key");
    assert_eq!((post(&writer, &directory).status, post(&writer, &directory).status), (201, 201));
    let file = at("/v1/files/content", "vm/new/web.vmcx");
    let body = vec![7; 300_000];
    assert_eq!(reader.request("POST", &file, &[], &body).code(), "read_only_key");
    assert_eq!(writer.request("POST", &file, &[], &body).status, 201);
    assert_eq!(writer.request("POST", &file, &[], b"x").code(), "exists");
    assert!(reader.get(&file).body == body);
    let list = reader.get(&at("/v1/files", "vm/new")).json();
    assert_eq!(list["files"], json!([{"name": "web.vmcx", "size_bytes": 300_000}]));
    assert!(list["free_bytes"].as_u64().unwrap() > 0);

    let outside = agent.directory.path().join("keys").display().to_string();
    let outside = |route: &str| format!("{route}?path={}", escape(&outside));
    assert_eq!(reader.get(&outside("/v1/files/content")).code(), "not_found");
    assert_eq!(delete(&writer, &outside("/v1/files")).code(), "not_found");
    assert_eq!(post(&writer, &outside("/v1/files/directories")).code(), "not_found");
    assert_eq!(
        writer.request("POST", &outside("/v1/files/content"), &[], b"x").code(),
        "not_found"
    );
    std::os::unix::fs::symlink(agent.directory.path(), agent.path("vm/out")).unwrap();
    assert_eq!(reader.get(&at("/v1/files", "vm/out")).code(), "not_found");
    assert_eq!(reader.get(&at("/v1/files/content", "vm/out/keys")).code(), "not_found");
    assert_eq!(post(&writer, &at("/v1/files/directories", "vm/out/x")).code(), "not_found");

    assert_eq!(delete(&writer, &directory).status, 204);
    assert_eq!(reader.get(&file).status, 200, "one that is not empty stays");
    assert_eq!(delete(&reader, &at("/v1/files", "vm/new/web.vmcx")).code(), "read_only_key");
    assert_eq!(delete(&writer, &at("/v1/files", "vm/new/web.vmcx")).status, 204);
    assert_eq!(delete(&writer, &directory).status, 204);
    assert_eq!(reader.get(&at("/v1/files", "vm/new")).code(), "not_found");
    assert_eq!(delete(&writer, &at("/v1/files/directories", "")).code(), "denied");
}

#[test]
fn every_route_of_the_document_answers_as_it_says() {
    let (_, agent) = agent();
    let writer = agent.writer();
    let document = writer.get("/v1/openapi.json").json();
    let mut operations = 0;
    let starts = ["/v1/vms", "/v1/cim", "/v1/files"];
    let routes = document["paths"].as_object().unwrap().iter();
    for (route, methods) in routes.filter(|(route, _)| starts.iter().any(|s| route.starts_with(s)))
    {
        for (method, operation) in methods.as_object().unwrap() {
            operations += 1;
            let id = operation["operationId"].as_str().unwrap();
            let token = format!("route{operations:05}");
            let freeze = route.contains("{id}").then(|| frozen(&writer, &token));
            let mut target = match &freeze {
                Some(freeze) => {
                    route.replace("/v1/vms/freezes/{id}", freeze).replace("{index}", "0")
                }
                None => route.clone(),
            };
            let path = match id {
                "removeFile" | "readFile" => agent.path("b.vhdx"),
                "writeFile" => agent.path("new.vmcx"),
                "makeDirectory" | "removeDirectory" => agent.path("made"),
                _ => agent.path(""),
            };
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                match parameter["name"].as_str().unwrap() {
                    "path" => target.push_str(&format!("?path={}", escape(&path))),
                    "vm" => target.push_str("?vm=web"),
                    _ => {}
                }
            }
            if id == "readFile" {
                std::fs::write(&path, "x").unwrap();
            }
            if id == "removeDirectory" {
                std::fs::create_dir_all(&path).unwrap();
            }
            let body = match id {
                "freezeVm" => wanted(&token).to_string(),
                "renewVmFreeze" => json!({"ttl_seconds": 60}).to_string(),
                "readVmRanges" => json!([{"offset": 0, "length": 512}]).to_string(),
                "cim" => json!({"get": {"path": r"root\virtualization\v2:X"}}).to_string(),
                "writeFile" => "content".to_owned(),
                _ => String::new(),
            };
            let headers = [("content-type", "application/json")];
            let headers = if body.is_empty() { &headers[..0] } else { &headers[..] };
            let answer = writer.request(&method.to_uppercase(), &target, headers, body.as_bytes());
            check_answer(&document, operation, &answer, &target);
            if let Some(freeze) = freeze {
                delete(&writer, &freeze);
            }
            for left in writer.get("/v1/vms/freezes").json()["freezes"].as_array().unwrap() {
                delete(&writer, &format!("/v1/vms/freezes/{}", left["id"].as_str().unwrap()));
            }
        }
    }
    assert!(operations >= 19, "{operations}");
}
