//! Disk images in files, without change tracking.

use super::{
    ChangePage, DiskInfo, DiskProvider, FrozenDisks, NewDisk, ProviderError, Result, TrackingState,
};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};
use vmtide_image::{BackingPolicy, Format, OpenOptions, image_info, list_chain, open_read_only};

/// Disk images in files.
#[derive(Debug, Default)]
pub struct ImageProvider {}

fn options() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

fn of_block(path: &Path, error: BlockError) -> ProviderError {
    let path = path.display().to_string();
    let reason = error.to_string();
    match error {
        BlockError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            ProviderError::NotFound { path }
        }
        BlockError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            ProviderError::Denied { path, reason }
        }
        BlockError::Damaged { .. } | BlockError::Unsupported { .. } => {
            ProviderError::NotADisk { path, reason }
        }
        _ => ProviderError::Failed { path, reason },
    }
}

impl DiskProvider for ImageProvider {
    fn info(&self, path: &Path) -> Result<DiskInfo> {
        let info = image_info(path, None).map_err(|error| of_block(path, error))?;
        let parent_path = match &info.backing {
            None => None,
            Some(backing) => {
                let chain = list_chain(path, &options()).map_err(|error| of_block(path, error))?;
                let found = chain.into_iter().next().and_then(|layer| layer.parent?.path);
                Some(found.map_or_else(|| backing.name.clone(), |path| path.display().to_string()))
            }
        };
        let is_fixed = info.format == Format::Raw || info.subformat.as_deref() == Some("fixed");
        Ok(DiskInfo {
            virtual_size_bytes: info.size_bytes,
            physical_size_bytes: info.file_size_bytes,
            block_size_bytes: u32::try_from(info.block_size_bytes.unwrap_or(0)).unwrap_or(0),
            logical_sector_bytes: info.logical_sector_bytes.unwrap_or(512),
            physical_sector_bytes: info.physical_sector_bytes.unwrap_or(512),
            virtual_storage_type: match info.format {
                Format::Vhd => 2,
                Format::Vhdx => 3,
                _ => 0,
            },
            provider_sub_type: match (is_fixed, &parent_path) {
                (true, _) => 2,
                (false, None) => 3,
                (false, Some(_)) => 4,
            },
            parent_path,
            format: info.format.to_string(),
            disk_id: info.identifiers.get("virtual_disk_id").cloned(),
        })
    }

    fn tracking(&self, path: &Path) -> Result<TrackingState> {
        self.info(path)?;
        Ok(TrackingState { enabled: false, newer_changes: false, most_recent_id: String::new() })
    }

    fn set_tracking(&self, path: &Path, _enabled: bool) -> Result<()> {
        Err(unsupported(path))
    }

    fn changes(&self, path: &Path, _id: &str, _range: ByteRange) -> Result<ChangePage> {
        Err(ProviderError::TrackingDisabled { path: path.display().to_string() })
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>> {
        open_read_only(path, &options()).map_err(|error| of_block(path, error))
    }

    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>> {
        Err(unsupported(path))
    }

    fn create(&self, path: &Path, _disk: &NewDisk) -> Result<()> {
        Err(unsupported(path))
    }

    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>> {
        Err(unsupported(paths.first().map_or(Path::new(""), PathBuf::as_path)))
    }
}

fn unsupported(path: &Path) -> ProviderError {
    ProviderError::Unsupported {
        path: path.display().to_string(),
        reason: "this build has no change tracking".into(),
    }
}
