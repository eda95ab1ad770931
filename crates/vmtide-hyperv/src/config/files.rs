//! The configuration files of a VM, as they are, for an exact restore.
//!
//! `.vmcx`, `.vmrs` and `.vmgs` together are what Hyper-V imports. They lie beside each other under one
//! name; those of a checkpoint hold the moment, and nobody writes them. Each is kept as base64 of its gzip
//! form, because guest state is mostly zeros and a restore point is a small document.

use crate::{HostFiles, VmSettings};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use std::io::{Read, Write};
use vmtide_hypervisor::{HypervisorError, NativeFile, Result, VmConfig};

/// A larger file is not kept, in bytes. Only the saved memory of a VM (`.vmrs`) is larger: as large as the
/// memory of the VM.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The files of one VM, packed, are not kept beyond this, in bytes: a restore point's configuration has a
/// limit of 8 MiB, and other documents are in it too.
const MAX_PACKED_BYTES: usize = 4 << 20;

/// The extensions that Hyper-V imports, the most important one first.
const EXTENSIONS: [&str; 3] = ["vmcx", "vmgs", "vmrs"];

/// What the name of a packed file ends in.
const PACKED: &str = ".gz.base64";

/// What was kept.
#[derive(Debug, Default)]
pub struct CapturedFiles {
    /// The files, packed.
    pub files: Vec<NativeFile>,
    /// What could not be kept, one line each.
    pub warnings: Vec<String>,
}

/// Reads the configuration files of a VM or a checkpoint. What cannot be read is a warning: the portable
/// configuration is kept in any case.
pub fn capture_files(files: &dyn HostFiles, settings: &VmSettings) -> CapturedFiles {
    let mut captured = CapturedFiles::default();
    let Some(file) = &settings.configuration_file else {
        captured.warnings.push(
            "the host does not say where the configuration files are; a restore makes the VM from its settings".into(),
        );
        return captured;
    };
    let mut places = vec![split(&join(&settings.configuration_root, file))];
    if let Some((root, file)) = &settings.guest_state {
        let place = split(&join(root, file));
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let mut packed_bytes = 0;
    for (directory, stem) in places {
        for name in names(files, &directory, &stem, &mut captured.warnings) {
            keep(files, &directory, &name, &mut packed_bytes, &mut captured);
        }
    }
    let is_definition = |file: &NativeFile| extension(file.name.trim_end_matches(PACKED)) == "vmcx";
    if !captured.files.iter().any(is_definition) {
        captured.warnings.push(
            "the configuration file (.vmcx) was not kept; a restore makes the VM from its settings"
                .into(),
        );
    }
    captured
}

/// The configuration files in a directory that have the stem, the most important ones first.
fn names(
    files: &dyn HostFiles,
    directory: &str,
    stem: &str,
    warnings: &mut Vec<String>,
) -> Vec<(String, u64)> {
    let listing = match files.list(directory) {
        Ok(listing) => listing.unwrap_or_default(),
        Err(error) => {
            warnings.push(format!("the configuration files in {directory} were not kept: {error}"));
            return Vec::new();
        }
    };
    let rank = |name: &str| EXTENSIONS.iter().position(|known| *known == extension(name));
    let mut found: Vec<_> = listing
        .into_iter()
        .filter(|entry| {
            let (own, _) = entry.name.rsplit_once('.').unwrap_or((&entry.name, ""));
            own.to_lowercase() == stem.to_lowercase() && rank(&entry.name).is_some()
        })
        .map(|entry| (entry.name, entry.size_bytes))
        .collect();
    found.sort_by_key(|(name, _)| rank(name));
    found
}

fn keep(
    files: &dyn HostFiles,
    directory: &str,
    (name, size_bytes): &(String, u64),
    packed_bytes: &mut usize,
    captured: &mut CapturedFiles,
) {
    let packed_name = format!("{name}{PACKED}");
    if captured.files.iter().any(|file| file.name == packed_name) {
        return;
    }
    let skipped = |why: String| {
        let what = match extension(name).as_str() {
            "vmrs" => {
                "the saved state is not in the restore point, and the restored VM starts anew"
            }
            _ => "an exact restore may lack it",
        };
        format!("{name} was not kept: {why}; {what}")
    };
    if *size_bytes > MAX_FILE_BYTES {
        let why = format!("it has {size_bytes} bytes, and {MAX_FILE_BYTES} are the most");
        captured.warnings.push(skipped(why));
        return;
    }
    let content = match files.read_file(&join(directory, name), MAX_FILE_BYTES) {
        Ok(Some(content)) => content,
        Ok(None) => return,
        Err(error) => {
            captured.warnings.push(skipped(error.to_string()));
            return;
        }
    };
    match pack(&content) {
        Ok(packed) if packed.len() <= MAX_PACKED_BYTES.saturating_sub(*packed_bytes) => {
            *packed_bytes += packed.len();
            captured.files.push(NativeFile { name: packed_name, content: packed });
        }
        Ok(packed) => captured
            .warnings
            .push(skipped(format!("packed it has {} bytes, which is too much", packed.len()))),
        Err(error) => captured.warnings.push(skipped(error.to_string())),
    }
}

fn pack(content: &[u8]) -> std::io::Result<String> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content)?;
    Ok(STANDARD.encode(encoder.finish()?))
}

/// The content of a document that is kept as base64, packed or not.
///
/// # Errors
/// [`HypervisorError::Protocol`] where it is not what its name says, or larger than any that is kept.
pub fn decode(file: &NativeFile) -> Result<Vec<u8>> {
    let bad = |detail: String| HypervisorError::protocol(&file.name, detail);
    let content = STANDARD
        .decode(file.content.trim())
        .map_err(|error| bad(format!("it is no base64: {error}")))?;
    if !file.name.ends_with(PACKED) {
        return Ok(content);
    }
    let mut unpacked = Vec::new();
    GzDecoder::new(content.as_slice())
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut unpacked)
        .map_err(|error| bad(format!("it cannot be unpacked: {error}")))?;
    if unpacked.len() as u64 > MAX_FILE_BYTES {
        return Err(bad(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(unpacked)
}

/// The configuration files that a restore point keeps, by their names on the host, without directories.
///
/// # Errors
/// As [`decode`]; [`HypervisorError::Protocol`] for a name that is none of one file.
pub fn configuration_files(config: &VmConfig) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for file in &config.native {
        let plain = file.name.strip_suffix(PACKED).or_else(|| file.name.strip_suffix(".base64"));
        let Some(plain) = plain.filter(|name| EXTENSIONS.contains(&extension(name).as_str()))
        else {
            continue;
        };
        if plain.contains(['\\', '/', ':']) || plain.contains("..") {
            return Err(HypervisorError::protocol(plain, "it is no name of a file"));
        }
        found.push((plain.to_owned(), decode(file)?));
    }
    Ok(found)
}

/// The extension, in lower case; empty where there is none.
fn extension(name: &str) -> String {
    name.rsplit_once('.').map_or(String::new(), |(_, extension)| extension.to_lowercase())
}

/// A path below `root`, or the path itself where it is absolute.
fn join(root: &str, path: &str) -> String {
    if path.starts_with('\\') || path.get(1..2) == Some(":") {
        return path.to_owned();
    }
    format!("{}\\{path}", root.trim_end_matches(['\\', '/']))
}

/// The directory and the stem of the name.
fn split(path: &str) -> (String, String) {
    let (directory, name) = path.rsplit_once(['\\', '/']).unwrap_or(("", path));
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    (directory.to_owned(), stem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_within_limits() {
        let content = vec![0; 4 << 20];
        let packed = pack(&content).unwrap();
        assert!(packed.len() < 8192, "{}", packed.len());
        let file = NativeFile { name: format!("A.vmgs{PACKED}"), content: packed };
        assert_eq!(decode(&file).unwrap(), content);
        let bomb = pack(&vec![0; (64 << 20) + 1]).unwrap();
        let bomb = NativeFile { name: format!("A.vmrs{PACKED}"), content: bomb };
        assert!(decode(&bomb).unwrap_err().to_string().contains("larger"));
        let plain = NativeFile { name: "A.vmcx.base64".into(), content: STANDARD.encode("abc") };
        assert_eq!(decode(&plain).unwrap(), b"abc");
        for content in ["no base64!", &STANDARD.encode("no gzip")] {
            let broken = NativeFile { name: format!("A.vmcx{PACKED}"), content: content.into() };
            assert!(decode(&broken).is_err(), "{content}");
        }
        let evil = NativeFile { name: format!(r"..\A.vmcx{PACKED}"), content: String::new() };
        let config = VmConfig { native: vec![evil], ..VmConfig::default() };
        assert!(configuration_files(&config).is_err());
    }

    #[test]
    fn paths_are_put_together_as_windows_does() {
        assert_eq!(join(r"C:\VMs\web", r"Snapshots\A.vmcx"), r"C:\VMs\web\Snapshots\A.vmcx");
        assert_eq!(join(r"C:\VMs\", r"D:\x.vmgs"), r"D:\x.vmgs");
        assert_eq!(join(r"\\s\share", "x"), r"\\s\share\x");
        assert_eq!(split(r"C:\V\Snapshots\A.vmcx"), (r"C:\V\Snapshots".into(), "A".into()));
    }
}
