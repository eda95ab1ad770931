//! An estimate: what a backup would offer, without freezing the VM. What changed is known only by freezing,
//! so every disk counts with its whole size, whatever the level.

use crate::backup::{excluded, now, open_source};
use crate::job::Job;
use crate::link::Link;
use crate::names::{VmPaths, namespace};
use crate::{BackendError, BackendOptions, Result};

/// Does it, until the plugin says good-bye.
///
/// # Errors
/// Whatever a backup would fail for before it begins.
pub fn run(job: &Job, options: &BackendOptions, link: &mut Link) -> Result<()> {
    let (_, config, name) = open_source(job, options, Vec::new())?;
    let paths = VmPaths::new(namespace(&job.command.source, &job.command.source_text), &name);
    let exclude = excluded(job, &config);
    let disks = config.disks.iter().filter(|disk| !exclude.contains(&disk.id));
    let mut files: Vec<(String, u64)> =
        disks.map(|disk| (paths.disk(&disk.id.0), disk.size_bytes)).collect();
    if files.is_empty() {
        return Err(BackendError::Usage(format!("{name} has no disk that is not left out")));
    }
    let size = serde_json::to_vec_pretty(&config).map_or(0, |json| json.len() as u64);
    files.push((paths.configuration(), size));
    link.end()?;
    loop {
        match link.line()?.as_str() {
            "Next" => {
                if let Some((path, size)) = files.pop() {
                    for line in [
                        format!("File {path}"),
                        format!("Size {size}"),
                        format!("Time {}", now()),
                        "Kind plain".into(),
                    ] {
                        link.command(&line)?;
                    }
                }
                link.end()?;
            }
            "End ok" => return link.end(),
            other => return Err(BackendError::protocol(format!("{other:?} during an estimate"))),
        }
    }
}
