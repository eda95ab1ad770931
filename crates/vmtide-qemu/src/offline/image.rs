//! What `qemu-img` says about an image file, and its dirty bitmaps.

use crate::inventory::{Bitmap, Drive};
use crate::names::GRANULARITY_BYTES;
use crate::qmp::one_line;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use vmtide_hypervisor::{DiskId, HypervisorError, Result};

/// The most bytes of a tool's answer that are looked at.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// An image file.
#[derive(Clone, Debug)]
pub(super) struct ImageFile {
    path: PathBuf,
    key: String,
    format: String,
}

/// The absolute path without links: one image has one lock, however it is called.
pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => HypervisorError::NotFound {
            what: format!("image {}", path.display()),
            detail: "there is no such file".into(),
        },
        _ => HypervisorError::io(format!("find {}", path.display()), error),
    })
}

impl ImageFile {
    /// The image at a canonical path, not looked at yet.
    pub fn at(path: PathBuf) -> Self {
        let key = path.display().to_string();
        Self { path, key, format: String::new() }
    }

    /// Finds the image and its format.
    pub fn find(path: &Path, format: Option<&str>) -> Result<Self> {
        let mut image = Self::at(canonical(path)?);
        if let Some(format) = format {
            image.format = format.into();
        }
        let info = image.info()?;
        if image.format.is_empty() {
            image.format = info["format"].as_str().unwrap_or("raw").into();
        }
        Ok(image)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What locks and journals call it.
    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn format(&self) -> &str {
        &self.format
    }

    fn info(&self) -> Result<Value> {
        let mut command = tool("qemu-img");
        command.args(["info", "--output=json"]);
        if !self.format.is_empty() {
            command.args(["-f", &self.format]);
        }
        command.arg(&self.path);
        let output = self.run(command, "look at")?;
        let text = output.stdout.get(..MAX_ANSWER_BYTES).unwrap_or(&output.stdout);
        serde_json::from_slice(text)
            .map_err(|error| HypervisorError::protocol("qemu-img info", error.to_string()))
    }

    /// The image as the drive `id`, with its bitmaps as they are now.
    pub fn drive(&self, id: DiskId) -> Result<Drive> {
        let info = self.info()?;
        let size_bytes = info["virtual-size"].as_u64().ok_or_else(|| {
            HypervisorError::protocol("qemu-img info", format!("no size of {}", self.key))
        })?;
        let data = &info["format-specific"]["data"];
        let compat = data["compat"].as_str();
        Ok(Drive {
            id,
            qom_path: None,
            node: self.key.clone(),
            driver: self.format.clone(),
            size_bytes,
            filename: self.key.clone(),
            keeps_bitmaps: self.format == "qcow2" && compat.is_some_and(|c| c != "0.10"),
            bitmaps: bitmaps(data),
        })
    }

    pub fn add_bitmap(&self, name: &str) -> Result<()> {
        let mut command = tool("qemu-img");
        command
            .args(["bitmap", "--add", "-g", &GRANULARITY_BYTES.to_string(), "-f", &self.format])
            .arg(&self.path)
            .arg(name);
        self.run(command, "start a dirty bitmap in").map(drop)
    }

    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        let mut command = tool("qemu-img");
        command.args(["bitmap", "--remove", "-f", &self.format]).arg(&self.path).arg(name);
        self.run(command, "remove a dirty bitmap from").map(drop)
    }

    fn run(&self, mut command: Command, action: &str) -> Result<Output> {
        let output = command
            .output()
            .map_err(|error| HypervisorError::io("run qemu-img (install qemu-utils)", error))?;
        if output.status.success() {
            return Ok(output);
        }
        Err(self.failure(action, &String::from_utf8_lossy(&output.stderr)))
    }

    /// The error for a tool's complaint about this image.
    pub fn failure(&self, action: &str, complaint: &str) -> HypervisorError {
        let complaint = one_line(complaint);
        if complaint.contains("lock") {
            return HypervisorError::Unsupported {
                what: format!("opening {} while another program uses it", self.key),
                detail:
                    "its VM seems to run: back up the running VM with qemu+unix:///PATH/OF/MONITOR"
                        .into(),
            };
        }
        let action = format!("{action} {}", self.key);
        if complaint.contains("Permission denied") {
            return HypervisorError::Denied { what: action, detail: complaint };
        }
        HypervisorError::failed(action, complaint)
    }
}

/// A tool of QEMU with nothing to read and messages in English.
pub(super) fn tool(name: &str) -> Command {
    let mut command = crate::process::command(name);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// The bitmaps in qcow2's part of `qemu-img info`. `auto` means that it records, `in-use` that it
/// was not saved.
fn bitmaps(data: &Value) -> Vec<Bitmap> {
    data["bitmaps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|bitmap| {
            let flag = |name: &str| {
                bitmap["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == name))
            };
            Some(Bitmap {
                name: bitmap["name"].as_str()?.to_owned(),
                granularity_bytes: bitmap["granularity"].as_u64()?,
                recording: flag("auto"),
                persistent: true,
                inconsistent: flag("in-use"),
            })
        })
        .collect()
}
