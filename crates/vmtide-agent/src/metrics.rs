//! What is counted, in the text form that Prometheus reads (version 0.0.4).
//!
//! Labels are from fixed sets, never from what clients send: neither paths nor names of keys, so that the number
//! of series is bounded and nobody who reads them learns which disks there are.

use crate::count::Count;
use crate::state::Shared;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::{Duration, Instant, SystemTime};

/// Upper bounds of the classes of duration, in seconds: until the head of the answer.
const BUCKETS_SECONDS: [f64; 6] = [0.001, 0.01, 0.1, 1.0, 10.0, 60.0];

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Counters of one agent.
#[derive(Debug)]
pub struct Metrics {
    started: SystemTime,
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    durations: Mutex<BTreeMap<&'static str, Durations>>,
    /// Connections that are open, from their first byte on.
    pub connections: Count,
    /// Threads that answer requests and may block; not those of transfers and lists, which count their own.
    pub threads: Count,
}

impl Default for Metrics {
    fn default() -> Self {
        let started = SystemTime::now();
        Self {
            started,
            requests: Mutex::default(),
            durations: Mutex::default(),
            connections: Count::default(),
            threads: Count::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Durations {
    /// Per class of [`BUCKETS_SECONDS`], and all longer ones.
    classes: [u64; BUCKETS_SECONDS.len() + 1],
    sum_seconds: f64,
}

/// What others count, at the moment of asking.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    /// Transfers under way.
    pub transfers: usize,
    /// Lists of changed ranges under way.
    pub change_lists: usize,
    /// Calls of management objects under way.
    pub calls: usize,
    /// Freezes of disks that are held.
    pub freezes: usize,
    /// Freezes of VMs that are held, or being made or ended.
    pub vm_freezes: usize,
    /// Disks that are open for their content.
    pub open_disks: usize,
    /// Disks that are attached to the host.
    pub attached_disks: usize,
    /// Threads that block in a disk, in the platform, or until a client takes what they made.
    pub blocking_threads: usize,
    /// Sums over all transfers.
    pub totals: crate::transfers::TransferTotals,
}

impl Metrics {
    /// Counts one request. `duration` is the time until its head was answered.
    pub fn request(&self, route: &'static str, status: u16, duration: Duration) {
        *self.requests.lock().entry((route, status)).or_default() += 1;
        let seconds = duration.as_secs_f64();
        let class = BUCKETS_SECONDS.iter().position(|bound| seconds <= *bound);
        let mut durations = self.durations.lock();
        let entry = durations.entry(route).or_default();
        entry.sum_seconds += seconds;
        if let Some(count) = entry.classes.get_mut(class.unwrap_or(BUCKETS_SECONDS.len())) {
            *count += 1;
        }
    }

    /// All of it as text.
    pub fn render(&self, gauges: &Gauges) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut text, gauges);
        text
    }

    fn write(&self, text: &mut String, gauges: &Gauges) -> fmt::Result {
        let version = env!("CARGO_PKG_VERSION");
        head(text, "vmtide_agent_info", "gauge", "The version of the agent.")?;
        writeln!(text, "vmtide_agent_info{{version=\"{version}\"}} 1")?;
        head(text, "vmtide_agent_requests_total", "counter", "Requests by route and status.")?;
        for ((route, status), count) in &*self.requests.lock() {
            let labels = format!("{{route=\"{route}\",status=\"{status}\"}}");
            writeln!(text, "vmtide_agent_requests_total{labels} {count}")?;
        }
        self.write_durations(text)?;
        self.write_gauges(text, gauges)?;
        let totals = gauges.totals;
        for (name, kind, help, value) in [
            ("read_bytes_total", "counter", "Content read from disks.", totals.read_bytes),
            ("written_bytes_total", "counter", "Content written to disks.", totals.written_bytes),
            ("sent_bytes_total", "counter", "Bytes sent for content.", totals.sent_bytes),
            (
                "received_bytes_total",
                "counter",
                "Bytes received for content.",
                totals.received_bytes,
            ),
        ] {
            head(text, &format!("vmtide_agent_{name}"), kind, help)?;
            writeln!(text, "vmtide_agent_{name} {value}")?;
        }
        let started = self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        head(text, "process_start_time_seconds", "gauge", "When the agent started.")?;
        writeln!(text, "process_start_time_seconds {}", started.as_secs_f64())?;
        write_process(text)
    }

    fn write_gauges(&self, text: &mut String, gauges: &Gauges) -> fmt::Result {
        for (name, help, value) in [
            ("connections", "Connections that are open.", self.connections.now()),
            ("transfers", "Transfers of content under way.", gauges.transfers),
            ("change_lists", "Lists of changed ranges under way.", gauges.change_lists),
            ("calls", "Calls of management objects under way.", gauges.calls),
            ("freezes", "Freezes of disks that are held.", gauges.freezes),
            ("vm_freezes", "Freezes of VMs that are held.", gauges.vm_freezes),
            ("open_disks", "Disks that are open for their content.", gauges.open_disks),
            ("attached_disks", "Disks that are attached to the host.", gauges.attached_disks),
            ("blocking_threads", "Threads that block for requests.", gauges.blocking_threads),
        ] {
            head(text, &format!("vmtide_agent_{name}"), "gauge", help)?;
            writeln!(text, "vmtide_agent_{name} {value}")?;
        }
        Ok(())
    }

    fn write_durations(&self, text: &mut String) -> fmt::Result {
        let name = "vmtide_agent_request_seconds";
        head(text, name, "histogram", "Time until the head of the answer, by route.")?;
        for (route, durations) in &*self.durations.lock() {
            let mut count = 0;
            let bounds = BUCKETS_SECONDS.iter().map(ToString::to_string);
            for (bound, class) in bounds.chain(["+Inf".to_owned()]).zip(durations.classes) {
                count += class;
                writeln!(text, "{name}_bucket{{route=\"{route}\",le=\"{bound}\"}} {count}")?;
            }
            writeln!(text, "{name}_sum{{route=\"{route}\"}} {}", durations.sum_seconds)?;
            writeln!(text, "{name}_count{{route=\"{route}\"}} {count}")?;
        }
        Ok(())
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// What the system knows of this process.
#[cfg(target_os = "linux")]
fn write_process(text: &mut String) -> fmt::Result {
    if let Some(bytes) = resident_bytes() {
        head(text, "process_resident_memory_bytes", "gauge", "Memory in use.")?;
        writeln!(text, "process_resident_memory_bytes {bytes}")?;
    }
    if let Ok(handles) = std::fs::read_dir("/proc/self/fd") {
        head(text, "process_open_fds", "gauge", "Open handles.")?;
        // One of them is that of the directory.
        writeln!(text, "process_open_fds {}", handles.count().saturating_sub(1))?;
    }
    Ok(())
}

/// What the system knows of this process.
#[cfg(windows)]
fn write_process(text: &mut String) -> fmt::Result {
    use vmtide_windows_ffi::process;
    if let Ok(bytes) = process::resident_bytes() {
        head(text, "process_resident_memory_bytes", "gauge", "Memory in use.")?;
        writeln!(text, "process_resident_memory_bytes {bytes}")?;
    }
    if let Ok(handles) = process::handle_count() {
        head(text, "process_open_fds", "gauge", "Open handles.")?;
        writeln!(text, "process_open_fds {handles}")?;
    }
    Ok(())
}

#[cfg(not(any(target_os = "linux", windows)))]
fn write_process(_text: &mut String) -> fmt::Result {
    Ok(())
}

/// The line `VmRSS: 1234 kB` of proc(5).
#[cfg(target_os = "linux")]
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The layer around all handlers that counts.
pub async fn record(State(state): State<Shared>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = route_of(request.uri().path());
    let response = next.run(request).await;
    state.metrics.request(route, response.status().as_u16(), began.elapsed());
    response
}

/// The route that a path belongs to, from a fixed set.
fn route_of(path: &str) -> &'static str {
    if let Some(rest) = path.strip_prefix("/vdisk/") {
        return match rest.rsplit('/').next() {
            Some("info") => "/vdisk/info",
            Some("rct") => "/vdisk/rct",
            Some("changes") => "/vdisk/changes",
            Some("content") => "/vdisk/content",
            _ => "other",
        };
    }
    let Some(rest) = path.strip_prefix("/v1") else {
        return "other";
    };
    let mut parts = rest.split('/').skip(1);
    let last = rest.rsplit('/').next();
    match (parts.next(), last) {
        (None, _) => "/v1",
        (Some("health"), _) => "/v1/health",
        (Some("metrics"), _) => "/v1/metrics",
        (Some("jobs"), _) => "/v1/jobs",
        (Some("disks" | "freezes" | "vms"), Some("content")) => "/v1/content",
        (Some("disks" | "freezes" | "vms"), Some("changes")) => "/v1/changes",
        (Some("disks"), Some("tracking" | "checkpoints")) => "/v1/tracking",
        (Some("disks"), _) => "/v1/disks",
        (Some("freezes"), _) => "/v1/freezes",
        (Some("vms"), _) => "/v1/vms",
        (Some("cim"), _) => "/v1/cim",
        (Some("files"), _) => "/v1/files",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_from_fixed_sets_and_add_up() {
        let metrics = Metrics::default();
        for (path, status) in [
            ("/vdisk/srv/a.vhdx/content", 200),
            ("/v1/disks/content", 200),
            ("/v1/disks/content", 429),
            ("/v1/freezes/0123/disks/0/content", 200),
            ("/v1/secret", 404),
            ("/v1", 200),
        ] {
            metrics.request(route_of(path), status, Duration::from_millis(5));
        }
        metrics.request("/v1/content", 200, Duration::from_secs(3600));
        let text = metrics.render(&Gauges::default());
        for line in [
            "vmtide_agent_requests_total{route=\"/v1/content\",status=\"200\"} 3",
            "vmtide_agent_requests_total{route=\"/v1/content\",status=\"429\"} 1",
            "vmtide_agent_requests_total{route=\"other\",status=\"404\"} 1",
            "vmtide_agent_request_seconds_bucket{route=\"/v1/content\",le=\"0.001\"} 0",
            "vmtide_agent_request_seconds_bucket{route=\"/v1/content\",le=\"60\"} 3",
            "vmtide_agent_request_seconds_bucket{route=\"/v1/content\",le=\"+Inf\"} 4",
            "vmtide_agent_request_seconds_count{route=\"/v1/content\"} 4",
            "vmtide_agent_transfers 0",
            "vmtide_agent_connections 0",
            "vmtide_agent_open_disks 0",
            "vmtide_agent_attached_disks 0",
            "vmtide_agent_blocking_threads 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
        assert!(!text.contains("secret") && !text.contains("a.vhdx"));
    }

    #[cfg(any(target_os = "linux", windows))]
    #[test]
    fn memory_and_handles_are_told() {
        let text = Metrics::default().render(&Gauges::default());
        for name in ["process_resident_memory_bytes ", "process_open_fds "] {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            assert!(line.parse::<u64>().unwrap() > 0);
        }
    }
}
