//! The contract of rct-service where a platform misbehaves, which no real one does when asked: pages that are short,
//! ids that are unknown, disks that are held, reads that fail in the middle.
//!
//! What every platform does is in `tests/agent/matrix.py`, from outside.

use crate::support::agent::Agent;
use crate::support::client::{Answer, Client, escape};
use crate::support::provider::{TestDisk, TestProvider};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_agent::limits::Limits;
use vmtide_block::ByteRange;

const SIZE: usize = 2 << 20;
const ID: &str = "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001";

struct Lab {
    disk: Arc<TestDisk>,
    agent: Agent,
}

#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
impl Lab {
    fn new() -> Self {
        let bytes = (0..SIZE).map(|at| u8::try_from((at / 7 + at / 4096) % 251).unwrap());
        let disk = TestDisk::memory(bytes.collect());
        let provider = TestProvider::new(&[("a.vhdx", Arc::clone(&disk))]);
        Self { disk, agent: Agent::start(provider, Limits::default()) }
    }

    fn target(&self, verb: &str) -> String {
        format!("/vdisk/{}/{verb}", escape(&self.agent.path("a.vhdx")))
    }

    fn get(&self, verb: &str) -> Answer {
        self.agent.reader().get(&self.target(verb))
    }

    fn changes(&self, id: &str) -> Answer {
        self.get(&format!("rct/{id}/changes"))
    }

    fn bytes(&self, ranges: &[ByteRange]) -> Vec<u8> {
        let mut all = Vec::new();
        for range in ranges {
            let mut bytes = vec![0; usize::try_from(range.length).unwrap()];
            self.disk.content.read_at(&mut bytes, range.offset).unwrap();
            all.extend(bytes);
        }
        all
    }
}

fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

#[test]
fn answers_are_those_of_rct_service_to_the_byte() {
    let lab = Lab::new();
    let info = lab.get("info");
    assert_eq!(
        (info.status, text(&info).as_str(), info.headers["content-type"].as_str()),
        (
            200,
            "{\"virtual_size\":2097152,\"parent_path\":null,\"virtual_storage_type\":3,\
             \"provider_sub_type\":3}",
            "application/json"
        )
    );
    let none = "{\"enabled\":true,\"newer_changes\":false,\"most_recent_id\":\"\"}";
    assert_eq!(text(&lab.get("rct")), none);
    lab.disk.changed_since(ID, vec![ByteRange::new(0, 65536), ByteRange::new(131_072, 512)]);
    assert_eq!(
        text(&lab.get("rct")),
        format!("{{\"enabled\":true,\"newer_changes\":true,\"most_recent_id\":\"{ID}\"}}")
    );
    let changes = lab.changes(ID);
    assert_eq!(
        (changes.status, text(&changes).as_str(), changes.headers["content-type"].as_str()),
        (
            200,
            "[{\"offset\":0,\"length\":65536},{\"offset\":131072,\"length\":512}]",
            "application/json"
        )
    );
    let switched = lab.agent.writer().request("PUT", &lab.target("rct?enabled=false"), &[], b"");
    assert_eq!((switched.status, switched.body.as_slice()), (200, b"".as_slice()));
    assert_eq!(switched.headers["content-length"], "0");
    let off = "{\"enabled\":false,\"newer_changes\":false,\"most_recent_id\":\"\"}";
    assert_eq!(text(&lab.get("rct")), off);
}

#[test]
fn ids_that_cannot_be_used_are_404_and_say_so() {
    let lab = Lab::new();
    let unknown = lab.changes("rctX:0:2");
    assert_eq!((unknown.status, text(&unknown).as_str()), (404, "RCT ID not found: rctX:0:2"));
    let long = "i".repeat(255);
    assert_eq!(text(&lab.changes(&long)), format!("RCT ID not found: {long}"));
    lab.agent.writer().request("PUT", &lab.target("rct?enabled=false"), &[], b"");
    let disabled = lab.changes(ID);
    assert_eq!(disabled.status, 404);
    assert!(text(&disabled).starts_with(&format!("RCT ID not found: {ID}")), "{disabled:?}");
}

#[test]
fn short_pages_are_one_answer_and_an_incremental_download_is_the_disk() {
    let lab = Lab::new();
    let ranges: Vec<_> = (0..50u64).map(|at| ByteRange::new(at * 40_000, 10_000)).collect();
    lab.disk.changed_since(ID, ranges.clone());
    for page_bytes in [0, 1, 4096, 30_001] {
        // A page of one byte would be two million questions.
        let page_bytes = if page_bytes == 1 { 1001 } else { page_bytes };
        lab.disk.faults.page_bytes.store(page_bytes, Ordering::SeqCst);
        let found: Vec<ByteRange> = serde_json::from_slice(&lab.changes(ID).body).unwrap();
        assert_eq!(found, ranges, "pages of {page_bytes} bytes");
    }
    let expected = lab.bytes(&ranges);
    let body = serde_json::to_value(&ranges).unwrap();
    let posted = lab.agent.reader().json("POST", &lab.target("content"), &body);
    assert!(posted.status == 200 && posted.complete && posted.body == expected);
    let list: Vec<_> =
        ranges.iter().map(|range| format!("{}:{}", range.offset, range.length)).collect();
    let got = lab.get(&format!("content?ranges={}", list.join(",")));
    assert!(got.status == 200 && got.complete && got.body == expected);
    assert_eq!(got.headers["content-length"], expected.len().to_string());
}

#[test]
fn a_platform_that_says_nothing_is_an_error_and_never_no_changes() {
    let lab = Lab::new();
    lab.disk.changed_since(ID, vec![ByteRange::new(0, 512)]);
    lab.disk.faults.processed_zero.store(true, Ordering::SeqCst);
    let answer = lab.changes(ID);
    assert!(answer.status == 404 && text(&answer).contains("lost"), "{}", text(&answer));
    lab.disk.faults.processed_zero.store(false, Ordering::SeqCst);
    lab.disk.faults.page_bytes.store(65536, Ordering::SeqCst);
    lab.disk.faults.changes_fail_from.store(1 << 20, Ordering::SeqCst);
    // It may have begun; then it is cut off, which a client notices.
    let answer = lab.agent.reader().try_get(&lab.target(&format!("rct/{ID}/changes")));
    assert!(answer.is_none_or(|answer| answer.status >= 500 || !answer.complete));
}

#[test]
fn a_read_that_fails_never_looks_like_an_end() {
    let lab = Lab::new();
    lab.disk.faults.reads_fail_from.store(1 << 20, Ordering::SeqCst);
    let whole = lab.target(&format!("content?ranges=0:{SIZE}"));
    let answer = lab.agent.reader().try_get(&whole);
    assert!(answer.is_none_or(|answer| answer.status >= 500 || !answer.complete));
    let good = lab.get("content?ranges=0:1000");
    assert!(good.complete && good.body == lab.bytes(&[ByteRange::new(0, 1000)]));
}

#[test]
fn a_disk_that_is_held_is_a_conflict() {
    let lab = Lab::new();
    lab.disk.faults.in_use.store(true, Ordering::SeqCst);
    for verb in ["info", "rct", "content?ranges=0:512", "rct/x/changes"] {
        let answer = lab.get(verb);
        assert_eq!(answer.status, 409, "{verb}: {}", text(&answer));
        assert!(text(&answer).contains("in use"), "{}", text(&answer));
    }
}

#[test]
fn more_clients_than_may_read_at_once_wait_for_each_other() {
    let lab = Lab::new();
    lab.disk.faults.read_delay_ms.store(20, Ordering::SeqCst);
    let expected = lab.bytes(&[ByteRange::new(5, 300_000)]);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..Limits::default().streams_per_client * 3)
            .map(|_| scope.spawn(|| lab.get("content?ranges=5:300000")))
            .collect();
        for reader in readers {
            let answer = reader.join().unwrap();
            assert_eq!((answer.status, answer.complete), (200, true), "{}", text(&answer));
            assert!(answer.body == expected);
        }
    });
    assert_eq!(lab.disk.handles.load(Ordering::SeqCst), 0, "handles are left open");
}

#[test]
fn a_key_is_needed_and_rights_count() {
    let lab = Lab::new();
    let nobody = Client { key: String::new(), ..lab.agent.reader() };
    assert_eq!(nobody.get(&lab.target("info")).status, 401);
    let reader = lab.agent.reader().request("PUT", &lab.target("rct?enabled=false"), &[], b"");
    assert_eq!(reader.status, 403);
    let old = Client { key: String::new(), ..lab.agent.reader() };
    let headers = [("AUTH_KEY", lab.agent.keys.reader.as_str())];
    assert_eq!(old.request("GET", &lab.target("info"), &headers, b"").status, 200);
}
